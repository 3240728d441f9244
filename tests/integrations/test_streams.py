"""Data sets that are streamed: the same training as on the same rows in a list, block by block."""

import importlib.util
import itertools

import datasets
import pytest
import tiny_language_models as tiny
import torch
from datasets.distributed import split_dataset_by_node
from launching import DISTRIBUTED, launch

from mopl.integrations import _streams
from mopl.integrations.transformers import MultiObjectiveTrainer
from mopl.integrations.trl import MultiObjectiveDPOTrainer
from mopl.language_models.collate import ListCollator
from mopl.language_models.data import DataError

SCRIPT = DISTRIBUTED / "stream_trainer.py"
_spec = importlib.util.spec_from_file_location("stream_trainer", SCRIPT)
assert _spec is not None and _spec.loader is not None
streams = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(streams)
make, pair_rows, stream, trained, trainable = (
    getattr(streams, name) for name in ("make", "pair_rows", "stream", "trained", "trainable")
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(_streams, "BLOCK", 5)


def list_rows(count=13):
    return [
        {
            "prompt": f"w{number}", "responses": [f"w{number + k} w{k}" for k in range(2 + number % 2)],
            "labels": {
                "helpful": [float(k) for k in range(2 + number % 2)], "harmless": [1.0, 0.5, 2.0][: 2 + number % 2],
            },
        }
        for number in range(count)
    ]  # fmt: skip


def assert_equal(found, expected):
    assert found[1] == expected[1] and len(found[1]) == 7
    assert all(torch.equal(found[0][name], value) for name, value in expected[0].items())


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("rows", "trainer"),
    [(pair_rows, MultiObjectiveTrainer), (pair_rows, MultiObjectiveDPOTrainer), (list_rows, MultiObjectiveTrainer),
     (list_rows, MultiObjectiveDPOTrainer)],
    ids=["pairs", "pairs of TRL", "lists", "lists in TRL's trainer"],
)  # fmt: skip
def test_a_training_on_a_stream_is_that_on_the_rows_bit_for_bit(rows, trainer, accumulation, tmp_path):
    """Read three times and more: 13 rows are no whole number of batches, nor of blocks."""
    options = dict(trainer=trainer, gradient_accumulation_steps=accumulation)
    whole = trained(tmp_path / "rows", rows() * 4, **options)
    assert_equal(trained(tmp_path / "stream", stream(rows()), **options), whole)


def test_one_process_may_read_ahead(tmp_path):
    whole = trained(tmp_path / "rows", pair_rows() * 2)
    assert_equal(trained(tmp_path / "stream", stream(pair_rows()), dataloader_num_workers=1), whole)


def test_a_resumed_training_on_a_stream_is_the_uninterrupted_one(tmp_path):
    options = dict(save_strategy="steps", save_steps=3, optim="adamw_torch")
    whole = trained(tmp_path / "whole", stream(pair_rows()), **options)
    resumed = make(tmp_path / "resumed", stream(pair_rows()), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(trainable(resumed.model)[name], value) for name, value in whole[0].items())


def test_columns_of_weights_beta_and_reference_are_read(tmp_path):
    columns = dict(
        objective_weights=lambda number: [0.1 * (number % 10), 1 - 0.1 * (number % 10)],
        objective_beta=lambda number: [0.2, 0.3 + 0.01 * number],
        ref_chosen_logps=lambda number: -3.0 - number, ref_rejected_logps=lambda number: -2.0 - number,
    )  # fmt: skip
    whole = trained(tmp_path / "rows", pair_rows(**columns) * 2)
    assert_equal(trained(tmp_path / "stream", stream(pair_rows(**columns))), whole)
    with pytest.raises(AssertionError):
        assert_equal(trained(tmp_path / "other", stream(pair_rows())), whole)


@pytest.mark.parametrize("rows", [pair_rows, list_rows])
@pytest.mark.parametrize("trainer", [MultiObjectiveTrainer, MultiObjectiveDPOTrainer])
def test_a_column_that_the_first_rows_lack_is_read(rows, trainer, tmp_path):
    """A row without a key is one whose value is None; the third batch begins within a block of a stream."""
    own = [[0.9, 0.1] if number >= 6 else None for number in range(26)]
    expected = [{**row, "objective_weights": w} for row, w in zip(rows(26), own, strict=True)]
    absent = [row if w is None else {**row, "objective_weights": w} for row, w in zip(rows(26), own, strict=True)]
    whole = trained(tmp_path / "none", expected, trainer=trainer)
    for data in (absent, stream(absent)):
        assert_equal(trained(tmp_path / "absent", data, trainer=trainer), whole)
    with pytest.raises(AssertionError):
        assert_equal(trained(tmp_path / "other", rows(26), trainer=trainer), whole)


def test_a_stream_is_read_no_further_than_the_training_goes(tmp_path):
    read = []

    def endless():
        for number in itertools.count():
            read.append(number)
            yield pair_rows()[number % 13]

    make(tmp_path, datasets.IterableDataset.from_generator(endless), max_steps=2).train()
    assert max(read) < 20


def test_rows_that_make_one_list_stay_together():
    """OASST: a message a row, those of a tree one after another."""
    rows = [
        {"message_id": f"{tree}-{number}", "parent_id": None if number == 0 else f"{tree}-0", "text": f"w{number}",
         "role": "prompter" if number == 0 else "assistant", "message_tree_id": tree, "rank": number}
        for tree in "abc" for number in range(4)
    ]  # fmt: skip
    blocks = [[row["message_tree_id"] for row in block] for _, block in _streams.blocks_of(rows)]
    assert blocks == [["a"] * 4 + ["b"] * 4, ["c"] * 4]


def test_an_evaluation_reads_a_stream_to_its_end(tmp_path):
    found = [make(tmp_path, pair_rows(), eval_dataset=data).evaluate() for data in (pair_rows(), stream(pair_rows()))]
    assert found[0]["eval_loss"] == found[1]["eval_loss"]
    trainer = make(tmp_path, stream(pair_rows()))
    assert trainer.evaluate(stream(pair_rows(7)))["eval_loss"] == trainer.evaluate(pair_rows(7))["eval_loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs cannot go with; leave it out"),
        ({"train_sampling_strategy": "group_by_length"}, "group_by_length' cannot go with"),
        ({"dataloader_num_workers": 2}, "dataloader_num_workers=2 cannot go with; pass 1"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True cannot go with; leave it out"),
        ({"max_steps": -1}, "max_steps"),
    ],
)
def test_what_needs_all_rows_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, stream(pair_rows()), **options)


def test_a_reference_that_ends_within_a_stream_is_named(tmp_path):
    columns = dict(ref_chosen_logps=lambda number: -3.0, ref_rejected_logps=lambda number: -2.0)
    rows = [*pair_rows(6, **columns), *pair_rows(6)]
    with pytest.raises(ValueError, match="row 7 of the stream has no ref_chosen_logps and no ref_rejected_logps"):
        make(tmp_path, stream(rows), model=tiny.build()).train()


def test_mistakes_in_a_stream_name_the_row(tmp_path):
    with pytest.raises(TypeError, match="can be read only once"):
        make(tmp_path, iter(pair_rows()))
    with pytest.raises(ValueError, match="no rows"):
        make(tmp_path, stream([]))
    split = split_dataset_by_node(stream(pair_rows()), 0, 2)
    with pytest.raises(ValueError, match="split among processes already"):
        make(tmp_path, split)
    rows = pair_rows()
    rows[7] = {**rows[7], "helpful": "good"}
    with pytest.raises(DataError, match=r"number 6 of the stream on[\s\S]*row 3[\s\S]*label is not a number|row 3"):
        make(tmp_path, stream(rows)).train()
    make(tmp_path, stream(rows), on_error="skip").train()

    def relabelled(value):
        rows = list_rows()
        rows[9]["labels"]["helpful"][0] = value
        return stream(rows)

    with pytest.raises(ValueError, match=r"row 10\), but listwise_dpo takes none that are negative"):
        make(tmp_path, relabelled(-1.0)).train()
    with pytest.raises(ValueError, match="row 10 of the stream has labels for a part"):
        make(tmp_path, relabelled(None)).train()
    make(tmp_path, relabelled(None), data_collator=ListCollator(partial="keep", pad_id=0)).train()


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_share_a_stream(tmp_path):
    done = launch(2, str(SCRIPT), str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    expected = trained(tmp_path / "one", stream(pair_rows(24)), per_device_train_batch_size=4)[0]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in expected.items():
            assert float((found[name] - value).abs().max()) <= 1e-3 * float(value.abs().max()), name


def test_tool_calls_of_a_table_are_read_without_what_other_rows_have(tmp_path, monkeypatch):
    words = tiny.tokenizer(chat=True)
    words.chat_template = (
        "{% for m in messages %} {{ m.content or 'w' ~ (m.tool_calls[0].arguments | length) }}{% endfor %}"
    )
    monkeypatch.setattr(tiny, "tokenizer", lambda: words)
    asked, said = (
        {"role": "user", "content": "w20"},
        [{"role": "assistant", "content": text} for text in ("w30", "w31")],
    )
    calls = [{"role": "assistant", "tool_calls": [{"arguments": call}]} for call in ({"a": "x"}, {"b": "y", "c": "z"})]
    rows = [{"prompt": [asked, call], "chosen": [said[0]], "rejected": [said[1]]} for call in calls]
    for made in (
        rows,
        [{"prompt": row["prompt"], "responses": said, "labels": {"preference": [1, 0]}} for row in rows],
    ):
        table = datasets.Dataset.from_list(made)
        found = []
        for data in (made, table, table.to_iterable_dataset()):
            trainer = make(tmp_path, data, objectives=["preference"], model=tiny.build())
            lists = getattr(trainer.train_dataset, "head", trainer.train_dataset).lists
            found.append([each.tokens.prompt.tolist() for each in lists])
        assert found[0][0] != found[0][1] and found[0] == found[1] == found[2]
