"""The best step by validation data: which one is kept, when a training ends, and that resuming changes nothing."""

import math
import os
import signal
import textwrap
from pathlib import Path

import pytest
import torch
from launching import launch, launch_by_accelerate
from small_training import Source, config, network, parameters, squared_error

from mopl.training import CheckpointFolder, RunLog, Selection, TrainingInterrupted, read_log, train

# Better until step 6, worse after; every second step is validated.
FIGURES = {2: 0.3, 4: 0.5, 6: 0.7, 8: 0.6, 10: 0.7, 12: 0.1, 14: 0.9, 16: 0.2, 18: 0.2, 20: 0.2}


class Known:
    """A validation whose figure at each step is given; it draws numbers, as random ties would."""

    def __init__(self, figures=FIGURES):
        self.figures, self.seen = figures, []

    def of(self, model):
        assert not model.training and not torch.is_grad_enabled()
        self.seen.append((parameters(model), torch.rand(3)))
        return self.figures[2 * len(self.seen)]


def selection(figures=FIGURES, **changes):
    return Selection(Known(figures).of, **{"every": 2, "maximise": True, **changes})


def trained(steps, dropout=0.3):
    model = network(dropout)
    train(model, Source(), squared_error, config(steps=steps))
    return parameters(model)


@pytest.mark.parametrize(
    ("patience", "kept", "done"), [(None, 14, 20), (1, 6, 8), (3, 6, 12), (4, 14, 20), (2, 6, 10), (99, 14, 20)]
)
def test_the_best_step_is_kept_and_patience_ends_the_training(tmp_path, patience, kept, done):
    model, log = network(0.3), RunLog(tmp_path)
    chosen = selection(patience=patience)
    result = train(model, Source(), squared_error, config(), selection=chosen, log=log)
    assert (result.steps, result.kept, result.last["step"]) == (done, kept, done)
    assert chosen.best == pytest.approx(FIGURES[kept])
    # The schedule is constant, so the step that was kept is a training of so many steps: validation draws apart.
    assert torch.equal(parameters(model), trained(kept))
    records = {r["step"]: r.get("validation") for r in read_log(tmp_path / "log.jsonl")}
    assert {s: v for s, v in records.items() if v is not None} == pytest.approx(
        {s: v for s, v in FIGURES.items() if s <= done}
    )
    assert list(records)[-1] == done


def test_smaller_is_better_unless_asked_and_no_number_is_never_the_best():
    figures = {2: math.nan, 4: 0.5, 6: math.nan, 8: 0.4, 10: 0.45, 12: 0.6}
    result = train(network(), Source(), squared_error, config(steps=12), selection=selection(figures, maximise=False))
    assert result.kept == 8
    figures = dict.fromkeys(range(2, 9, 2), math.nan)
    chosen = selection(figures, patience=1)
    assert train(network(), Source(), squared_error, config(steps=8), selection=chosen).kept == 8


def test_validation_sees_the_same_random_numbers_at_each_step_and_leaves_those_outside_alone():
    known, model = Known(), network()
    chosen = Selection(known.of, every=2, maximise=True)
    for seed, figure in ((5, FIGURES[2]), (6, FIGURES[4])):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        assert chosen._figure(model) == figure
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(known.seen[0][1], known.seen[1][1])


class Killed(Exception):
    pass


def by_weights(model):
    """A figure that is a function of the model alone, so that a resumed training sees what it saw before."""
    return float(torch.sin(40 * parameters(model)[0]))


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("killed_at", range(1, 20))
def test_a_training_killed_at_any_step_keeps_and_stops_at_the_same_step(tmp_path, killed_at, every):
    settings, options = config(checkpoint_every=every, keep_checkpoints=1), {"every": 2, "patience": 3}
    straight, first = network(0.3), Selection(by_weights, **options)
    wanted = train(straight, Source(), squared_error, settings, selection=first)
    assert 1 < wanted.kept < wanted.steps < 20, wanted  # otherwise nothing is tested

    def until(model, batch, step):
        if step == killed_at:
            raise Killed
        return squared_error(model, batch, step)

    try:
        train(network(0.3), Source(), until, settings, directory=tmp_path, selection=Selection(by_weights, **options))
    except Killed:
        pass
    assert len(CheckpointFolder(tmp_path).all()) <= 1
    again, chosen = network(0.3), Selection(by_weights, **options)
    torch.manual_seed(99)
    found = train(again, Source(), squared_error, settings, directory=tmp_path, resume=True, selection=chosen)
    assert (found.steps, found.kept) == (wanted.steps, wanted.kept)
    assert (chosen.best, chosen.waited) == (first.best, first.waited)
    assert torch.equal(parameters(again), parameters(straight))


def test_a_signal_in_the_validation_that_ends_the_training_still_stops_and_the_best_step_is_not_lost(tmp_path):
    known = Known()

    def interrupted(model):
        if len(known.seen) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return known.of(model)

    options = {"every": 2, "patience": 3, "maximise": True}
    with pytest.raises(TrainingInterrupted, match="after step 12"):
        train(network(), Source(), squared_error, config(), directory=tmp_path,
              selection=Selection(interrupted, **options))  # fmt: skip
    model, nothing = network(), Selection(Known({}).of, **options)
    result = train(model, Source(), squared_error, config(), directory=tmp_path, resume=True, selection=nothing)
    assert (result.steps, result.kept) == (12, 6) and torch.equal(parameters(model), trained(6, 0.0))


def test_parameters_that_are_not_trained_stay_out_of_it(tmp_path):
    model = network()
    model[0].requires_grad_(False)
    chosen = selection(patience=1)
    train(model, Source(), squared_error, config(), directory=tmp_path, save_frozen=False, selection=chosen)
    assert set(chosen.state_dict()["kept"]) == {"3.weight", "3.bias"}


def test_a_checkpoint_is_resumed_with_the_selection_it_was_made_with(tmp_path):
    train(network(), Source(), squared_error, config(steps=4), directory=tmp_path / "with", selection=selection())
    train(network(), Source(), squared_error, config(steps=4), directory=tmp_path / "without")
    for folder, chosen, message in (
        ("with", None, "written with a selection"),
        ("without", selection(), "written without a selection"),
        ("with", selection(patience=2), r"patience was None, is 2"),
        ("with", selection(every=1), r"every was 2, is 1"),
    ):
        with pytest.raises(ValueError, match=message):
            train(network(), Source(), squared_error, config(steps=4), directory=tmp_path / folder, resume=True,
                  selection=chosen)  # fmt: skip
    for settings in ({"every": 0}, {"every": 1, "patience": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            Selection(by_weights, **settings)


DISTRIBUTED = """
    import sys
    sys.path[:0] = {folders!r}
    import torch
    from test_selection import Known, FIGURES
    from small_training import Source, config, network, parameters, squared_error
    from mopl.training import Selection, make_accelerator, train

    accelerator = make_accelerator(cpu=True)
    assert accelerator.num_processes == 2, accelerator.num_processes
    model, known = network(), Known()
    def validate(model):
        assert accelerator.is_main_process
        return known.of(model)
    result = train(model, Source(), squared_error, config(), accelerator=accelerator, directory=sys.argv[1],
                   selection=Selection(validate, every=2, patience=3, maximise=True))
    torch.save((result.steps, result.kept, parameters(model)), sys.argv[1] + f"/rank{{accelerator.process_index}}.pt")
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("sharded", [False, True])
def test_all_processes_stop_at_and_keep_the_step_that_the_main_one_chose(tmp_path, sharded):
    script = tmp_path / "script.py"
    folders = [str(folder) for folder in Path(__file__).parents[:2]]  # this room, and the helpers beside the rooms
    script.write_text(textwrap.dedent(DISTRIBUTED.format(folders=folders)))
    if sharded:  # as a person would: the other sharded test tells its processes what this launcher tells them
        options = ("--use_fsdp", "--fsdp_version", "2")
        done = launch_by_accelerate(2, str(script), str(tmp_path), options=options)
    else:
        done = launch(2, str(script), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        steps, kept, found = torch.load(tmp_path / f"rank{rank}.pt")
        assert (steps, kept) == (12, 6)
        torch.testing.assert_close(found, trained(6, 0.0), rtol=1e-4, atol=1e-5)
