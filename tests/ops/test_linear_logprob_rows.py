"""Which rows and targets of linear_logprob are in play: exactly on the host, and as a GPU finds them, unasked."""

from itertools import product

import pytest
import torch
from torch import Tensor

from mopl.ops.linear_logprob.formulas import choose_pivots
from mopl.ops.linear_logprob.rows import select


@pytest.mark.parametrize("bound", [0, 1, 2, 5])
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("targets", [0, 1, 6, None])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_compaction_without_a_synchronisation(bound: int, rows: int, targets: int | None, ignored: str) -> None:
    if targets and not rows:
        pytest.skip("targets need rows")
    many = rows if targets is None else targets
    row = None if targets is None else torch.randint(rows, (many,)) if rows else torch.zeros(0, dtype=torch.int64)
    target = torch.randint(9, (many,))
    if ignored != "none":
        target[:: 1 if ignored == "all" else 2] = -1
    chosen = select(target, row, rows, min(bound, rows), on_host=False)
    where = torch.arange(many) if row is None else row
    counting = sorted(set(where[target >= 0].tolist()))
    index, blank = chosen.rows.index, chosen.rows.blank
    assert blank is not None
    # Where no row can be spared, all stay in their places.
    assert (index is None) == (row is None and bound >= rows)
    index = torch.arange(rows) if index is None else index
    valid = ~blank
    held = counting[:bound]
    assert len(held) == int(valid.sum())
    assert len(index) == len(valid) <= min(bound, rows, many)
    assert index[valid].tolist() == held

    # Each target in play points at its row, also those that do not count: at one that is there.
    position = torch.arange(len(index)) if chosen.position is None else chosen.position
    assert ((position >= 0) & (position < max(len(index), 1))).all() and len(position) == len(chosen.column)
    live = chosen.column >= 0
    entry = torch.arange(many) if chosen.entries.index is None else chosen.entries.index
    assert torch.equal(index[position[live]], where[entry[live]])
    assert torch.equal(chosen.column[live], target[entry[live]])
    assert sorted(entry[live].tolist()) == [k for k in range(many) if target[k] >= 0 and int(where[k]) in held]

    # What is scattered comes back to its place; NaN stands where a row that counts has none.
    values, entries = torch.arange(1.0, rows + 1), torch.arange(1.0, many + 1)
    lost = [n for n in counting if n not in held]
    back = chosen.rows.put(chosen.rows.take(values))
    expected = torch.zeros(rows)
    expected[held], expected[lost] = values[held], torch.nan
    torch.testing.assert_close(back, expected, equal_nan=True)
    expected = torch.tensor(
        [0.0 if target[k] < 0 else float(entries[k]) if int(where[k]) in held else torch.nan for k in range(many)]
    )
    found = chosen.entries.put(chosen.entries.take(entries))
    torch.testing.assert_close(found, expected, equal_nan=True)

    logits = torch.randn(len(chosen.column))
    pivot, logit = choose_pivots(logits, chosen, len(index))
    assert len(pivot) == len(logit) == len(index)
    assert (pivot[valid] >= 0).all() and (pivot[~valid] < 0).all()


def test_host_and_device_choose_the_same_rows() -> None:
    for shared, seed in product((False, True), range(5)):
        torch.manual_seed(seed)
        row: Tensor | None = torch.randint(7, (9,)) if shared else None
        target = torch.randint(-3, 9, (9 if shared else 7,)).clamp(min=-1)
        here, there = (select(target, row, 7, 7, on_host=on_host) for on_host in (True, False))
        held = torch.arange(7) if here.rows.index is None else here.rows.index
        assert there.rows.blank is not None and (there.rows.index is None) == (row is None)
        index = torch.arange(7) if there.rows.index is None else there.rows.index
        assert torch.equal(index[~there.rows.blank], held)
