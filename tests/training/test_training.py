"""The loop: independence of the split, exact resume, checkpoints that are complete or absent, stops and divergence."""

import contextlib
import gc
import json
import math
import os
import signal
import textwrap
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import launch, python
from small_training import Source, config, network, parameters, squared_error
from torch import nn

from mopl.experiments.cos_dpo import StepBatch
from mopl.ranking.synthetic import synthetic as ranking_data
from mopl.training import (
    CheckpointFolder,
    RunLog,
    TrainingConfig,
    TrainingDiverged,
    TrainingInterrupted,
    make_accelerator,
    part_of_batch,
    read_log,
    shuffled_indices,
    train,
    write_file,
    write_folder,
)
from mopl.training.accumulation import accumulate
from mopl.training.batches import to_device
from mopl.training.optimizer import rounding_of


def test_one_update_is_adamw_on_the_gradient_of_the_mean_over_the_batch():
    model, twin, source = network(), network(), Source()
    train(model, source, squared_error, config(steps=1, gradient_clip=None))
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.05, weight_decay=0.0)
    squared_error(twin, source(0, 0, 1), 0)[0].backward()
    optimizer.step()
    torch.testing.assert_close(parameters(model), parameters(twin), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("accumulation", [2, 4, 8])
@pytest.mark.parametrize("batch_size", [8, 11])
def test_the_update_does_not_depend_on_how_the_batch_is_split(accumulation, batch_size):
    whole, split = network(), network()
    # SGD, because Adam's first steps are signs and would hide a wrong scale of the gradient.
    for model, parts in ((whole, 1), (split, accumulation)):
        settings = config(steps=3, accumulation=parts, gradient_clip=None)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, Source(batch_size), squared_error, settings, optimizer=sgd)
    torch.testing.assert_close(parameters(split), parameters(whole), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(parameters(whole), parameters(network()), atol=1e-3)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_parts_of_two_processes_add_up_to_the_batch(accumulation):
    """What each of them does, one after the other; DDP then averages their gradients."""
    whole, source = network(), Source(11)
    expected, _ = squared_error(whole, source(0, 0, 1), 0)
    expected.backward()
    losses, gradients = [], []
    for rank in range(2):
        model, cpu = network(), torch.device("cpu")
        process = SimpleNamespace(num_processes=2, process_index=rank, device=cpu)
        prepared = SimpleNamespace(model=model, no_sync=contextlib.nullcontext, backward=torch.Tensor.backward)
        loss, _ = accumulate(process, prepared, source, squared_error, config(accumulation=accumulation), 0)
        losses.append(loss)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(sum(losses), expected.detach())
    torch.testing.assert_close(sum(gradients) / 2, torch.cat([p.grad.flatten() for p in whole.parameters()]))


def test_clipping_bounds_the_length_of_the_update_and_keeps_its_direction():
    steps = {}
    for clip in (None, 0.01):
        model = network()
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        result = train(model, Source(), squared_error, config(steps=1, gradient_clip=clip), optimizer=sgd)
        steps[clip] = parameters(model) - parameters(network())
    norm = result.last["gradient_norm"]  # before clipping
    assert steps[None].norm() == pytest.approx(norm, rel=1e-5) and norm > 0.1
    torch.testing.assert_close(steps[0.01], steps[None] * 0.01 / norm, rtol=1e-3, atol=1e-6)


def test_logged_values_are_means_over_the_whole_batch_however_it_is_split(tmp_path):
    records = []
    for parts in (1, 3):
        result = train(network(), Source(11), squared_error, config(steps=1, accumulation=parts))
        records.append(result.last)
    for name in ("loss", "error", "gradient_norm"):
        assert records[0][name] == pytest.approx(records[1][name], rel=1e-5)
    assert records[0]["loss"] == pytest.approx(records[0]["error"], rel=1e-6)


def test_more_parts_than_lists_is_an_error_that_names_them():
    with pytest.raises(ValueError, match=r"batch of 3 lists cannot be split into 1 process.* x 4"):
        train(network(), Source(3), squared_error, config(accumulation=4))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_stopping_and_resuming_gives_the_same_bits_as_training_in_one_go(tmp_path, dropout, schedule):
    settings = config(schedule=schedule, warmup=4)
    straight, resumed = network(dropout), network(dropout)
    train(straight, Source(), squared_error, settings)

    class Killed(Exception):
        pass

    def until_ten(model, batch, step):
        if step == 12:  # two steps after the checkpoint, so that work is lost and must be repeated
            raise Killed
        return squared_error(model, batch, step)

    log = RunLog(tmp_path)
    with pytest.raises(Killed):
        train(resumed, Source(), until_ten, settings, directory=tmp_path / "checkpoints", log=log)
    again = network(dropout)
    torch.manual_seed(99)  # the state of the global generator must not matter
    train(again, Source(), squared_error, settings, directory=tmp_path / "checkpoints", resume=True, log=log)
    assert torch.equal(parameters(again), parameters(straight))
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == [5, 10, 15, 20]


TESTS = str(Path(__file__).parents[1])
SCRIPT = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    import torch
    from small_training import Source, config, network, parameters, squared_error
    from mopl.training import RunLog, train

    folder, kill_at = sys.argv[1], int(sys.argv[2])
    real_save = torch.save
    def save(states, path):
        real_save(states, path)
        if f"step-{{kill_at:06d}}" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save = save
    model = network()
    train(model, Source(), squared_error, config(), directory=folder + "/checkpoints", resume=True, log=RunLog(folder))
    torch.save(parameters(model), folder + "/result.pt")
"""


def run_script(folder, kill_at):
    script = textwrap.dedent(SCRIPT.format(tests=TESTS))
    return python("-c", script, str(folder), str(kill_at))


def test_a_kill_in_the_middle_of_writing_a_checkpoint_costs_only_the_steps_since_the_last_one(tmp_path):
    killed = run_script(tmp_path, 15)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = CheckpointFolder(tmp_path / "checkpoints")
    assert [checkpoint.step for checkpoint in folder.all()] == [5, 10]
    assert any(entry.name.startswith(".writing-") for entry in folder.path.iterdir())
    resumed = run_script(tmp_path, -1)
    assert resumed.returncode == 0, resumed.stderr
    straight = network()
    train(straight, Source(), squared_error, config())
    assert torch.equal(torch.load(tmp_path / "result.pt"), parameters(straight))
    assert sorted(entry.name for entry in folder.path.iterdir()) == ["step-000015", "step-000020"]
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == [5, 10, 15, 20]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_with_a_checkpoint_of_it(tmp_path, number):
    def interrupted(model, batch, step):
        if step == 7:
            os.kill(os.getpid(), number)
        return squared_error(model, batch, step)

    before = signal.getsignal(number)
    with pytest.raises(TrainingInterrupted, match="after step 8") as stopped:
        train(network(), Source(), interrupted, config(), directory=tmp_path, stage="base")
    assert stopped.value.checkpoint.name == "step-000008" and CheckpointFolder(tmp_path).latest().step == 8
    assert signal.getsignal(number) is before
    straight, resumed = network(), network()
    train(straight, Source(), squared_error, config())
    train(resumed, Source(), squared_error, config(), directory=tmp_path, resume=True)
    assert torch.equal(parameters(resumed), parameters(straight))


def test_a_signal_in_the_last_step_still_stops(tmp_path):
    def interrupted(model, batch, step):
        if step == 19:
            os.kill(os.getpid(), signal.SIGINT)
        return squared_error(model, batch, step)

    with pytest.raises(TrainingInterrupted):
        train(network(), Source(), interrupted, config(), directory=tmp_path)
    assert CheckpointFolder(tmp_path).latest().step == 20


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def impatient(model, batch, step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    with pytest.raises(KeyboardInterrupt):
        train(network(), Source(), impatient, config(), directory=tmp_path)


def test_divergence_names_step_remedy_and_the_intact_checkpoint(tmp_path):
    model = network()
    with pytest.raises(TrainingDiverged, match=r"nan at step 8 of 'base'.*learning_rate.*step-000005"):
        train(model, Source(poison_at=7), squared_error, config(), directory=tmp_path, stage="base")
    assert torch.isfinite(parameters(model)).all()
    reference, restored = network(), network()
    train(reference, Source(), squared_error, config(steps=5))
    CheckpointFolder(tmp_path).latest().load_model(restored)
    assert torch.equal(parameters(restored), parameters(reference))


def test_an_infinite_gradient_behind_a_finite_loss_is_divergence_too():
    def spike(model, batch, step):
        scores = model(batch["x"])
        return torch.sqrt((scores - scores.detach()).abs()).sum() + 0.0 * scores.sum(), {}

    model = network()
    with pytest.raises(TrainingDiverged, match="gradient's norm is"):
        train(model, Source(), spike, config())
    assert torch.equal(parameters(model), parameters(network()))


def test_checkpoints_of_another_training_are_not_overwritten(tmp_path):
    train(network(), Source(), squared_error, config(), directory=tmp_path)
    with pytest.raises(FileExistsError, match="resume=True"):
        train(network(), Source(), squared_error, config(), directory=tmp_path)
    with pytest.raises(ValueError, match=r"learning_rate was 0.05, is 0.1"):
        train(network(), Source(), squared_error, config(learning_rate=0.1), directory=tmp_path, resume=True)
    # What is only written more or less often may change.
    done = train(network(), Source(), squared_error, config(log_every=1), directory=tmp_path, resume=True)
    assert done.steps == 20


def test_seconds_add_up_over_a_resume(tmp_path):
    first = train(network(), Source(), squared_error, config(), directory=tmp_path)
    again = train(network(), Source(), squared_error, config(), directory=tmp_path, resume=True)
    assert first.seconds > 0 and again.seconds >= CheckpointFolder(tmp_path).latest().state()["seconds"] > 0


def test_the_model_comes_back_in_the_mode_it_had_and_unwrapped():
    model = network().eval()
    train(model, Source(), squared_error, config(steps=1, mixed_precision="no"))
    assert not model.training and "forward" not in vars(model)


def test_nothing_of_a_finished_training_is_kept_alive_by_the_accelerator():
    accelerator = make_accelerator()
    model = network()
    train(model, Source(), squared_error, config(steps=1), accelerator=accelerator)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_frozen_parameters_stay_and_are_saved(tmp_path):
    model = network()
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    train(model, Source(), squared_error, config(), directory=tmp_path)
    other = network()
    nn.init.zeros_(other[0].weight)
    CheckpointFolder(tmp_path).latest().load_model(other)
    assert torch.equal(model[0].weight, frozen) and torch.equal(other[0].weight, frozen)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.5, 1, 1, 1, 1, 1]), ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
     ("cosine", [0.5, 1, 1, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0.5 - 0.5 * math.sqrt(0.5)])],
)  # fmt: skip
def test_schedules_warm_up_and_fall_to_zero_at_the_end(schedule, expected):
    settings = TrainingConfig(steps=6, warmup=2, schedule=schedule)
    assert [settings.rate_factor(step) for step in range(6)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"schedule": "step"}, "schedule is 'step' but must be one of"), ({"steps": -1}, "steps is -1"),
     ({"learning_rate": math.nan}, "learning_rate is nan"), ({"accumulation": 0}, "accumulation is 0"),
     ({"gradient_clip": 0.0}, "gradient_clip is 0.0"), ({"mixed_precision": "int8"}, "mixed_precision")],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**changes)


def test_batches_are_cuts_of_one_permutation_an_epoch():
    drawn = np.concatenate([shuffled_indices(7, 3, seed=5, step=step) for step in range(7)])
    epochs = drawn.reshape(3, 7)
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    assert not np.array_equal(drawn[:7], np.concatenate([shuffled_indices(7, 7, seed=6, step=0)]))
    assert sorted(shuffled_indices(2, 6, seed=0, step=1).tolist()) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(("batch_size", "parts"), [(8, 3), (5, 5), (1, 1), (13, 4)])
def test_parts_of_a_batch_cover_it_once_and_evenly(batch_size, parts):
    slices = [part_of_batch(batch_size, rank, parts) for rank in range(parts)]
    assert [i for s in slices for i in range(batch_size)[s]] == list(range(batch_size))
    sizes = {s.stop - s.start for s in slices}
    assert max(sizes) - min(sizes) <= 1


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    def fail(folder):
        (folder / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "final", fail)
    assert list(tmp_path.iterdir()) == []
    write_folder(tmp_path / "final", lambda folder: (folder / "a").write_text("1"))
    write_folder(tmp_path / "final", lambda folder: (folder / "b").write_text("2"))
    assert [entry.name for entry in (tmp_path / "final").iterdir()] == ["b"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["final"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody may write into")
@pytest.mark.parametrize("make", [lambda path: write_folder(path, lambda folder: None), lambda p: write_file(p, "")])
def test_a_place_that_cannot_be_written_is_called_by_the_name_that_was_asked_for(make):
    with pytest.raises(OSError, match=r"^/proc/self/run cannot be written: .*; name another place$"):
        make(Path("/proc/self/run"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    write_file(tmp_path / "a.txt", "old")
    with pytest.raises(OSError, match="disk full"):
        write_file(tmp_path / "a.txt", fail)
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_rewinding_drops_later_records_of_the_stage_and_a_torn_line(tmp_path):
    log = RunLog(tmp_path)
    for stage, step in (("base", 1), ("base", 2), ("tuned", 1), ("tuned", 2)):
        log.write({"stage": stage, "step": step})
    with log.path.open("a") as file:
        file.write('{"stage": "tuned", "st')
    log.rewind("tuned", 1)
    assert [(r["stage"], r["step"]) for r in read_log(log.path)] == [("base", 1), ("base", 2), ("tuned", 1)]


DISTRIBUTED = """
    import json, sys
    sys.path.insert(0, {tests!r})
    import torch
    from small_training import Source, config, network, parameters, squared_error
    from mopl.training import RunLog, make_accelerator, train

    accelerator = make_accelerator(cpu=True)
    assert accelerator.num_processes == 2, accelerator.num_processes
    model = network()
    if accelerator.process_index == 1:
        torch.nn.init.ones_(model[0].weight)  # the main process's parameters count
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = config(steps=3, gradient_clip=None, accumulation=2, checkpoint_every=1)
    log = RunLog(sys.argv[1], enabled=accelerator.is_main_process)
    train(model, Source(11), squared_error, settings, optimizer=sgd, accelerator=accelerator,
          directory=sys.argv[1] + "/checkpoints", log=log)
    torch.save(parameters(model), sys.argv[1] + f"/rank{{accelerator.process_index}}.pt")
"""


@pytest.mark.distributed
def test_two_processes_make_the_same_update_as_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(DISTRIBUTED.format(tests=TESTS)))
    done = launch(2, str(script), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    single = network()
    log = RunLog(tmp_path / "single")
    (tmp_path / "single").mkdir()
    settings = config(steps=3, gradient_clip=None)
    train(single, Source(11), squared_error, settings, optimizer=torch.optim.SGD(single.parameters(), lr=0.1), log=log)
    first, second = torch.load(tmp_path / "rank0.pt"), torch.load(tmp_path / "rank1.pt")
    assert torch.equal(first, second)
    torch.testing.assert_close(first, parameters(single), rtol=1e-5, atol=1e-6)
    ours, theirs = read_log(tmp_path / "single" / "log.jsonl"), read_log(tmp_path / "log.jsonl")
    for name in ("loss", "error", "gradient_norm"):
        assert theirs[-1][name] == pytest.approx(ours[-1][name], rel=1e-5)


def test_json_of_the_state_is_readable(tmp_path):
    train(network(), Source(), squared_error, config(), directory=tmp_path, stage="base")
    state = json.loads((tmp_path / "step-000020" / "state.json").read_text())
    assert state["step"] == 20 and state["stage"] == "base" and state["config"]["learning_rate"] == 0.05


def test_every_tensor_of_a_batch_goes_to_the_device():
    lists = ranking_data().batch([0, 1], order=True)
    batch = {"step": StepBatch(lists, torch.ones(2, 2), torch.ones(2, 2)), "rows": [torch.ones(3), 7], "none": None}
    moved = to_device(batch, "meta")
    step = moved["step"]
    assert moved["none"] is None and moved["rows"][1] == 7 and step.experts is None
    tensors = [moved["rows"][0], step.weights, step.beta, *vars(step.lists).values()]
    assert len(tensors) == 11 and all(tensor.device.type == "meta" for tensor in tensors)


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, "1/256"), (torch.float16, "1/2048")])
def test_what_rounds_away_updates_is_counted_among_what_is_trained(dtype, share):
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(2, 2).to(dtype), nn.Linear(5, 5).to(dtype).requires_grad_(False)])
    note = rounding_of(model)
    assert note is not None and note.startswith(f"6 of 14 trained parameters are {str(dtype)[6:]}") and share in note
    model[1].requires_grad_(False)
    assert rounding_of(model) is None
