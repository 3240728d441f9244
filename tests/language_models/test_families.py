"""Families of causal language models: right or refused, never wrong. `python -m bench.families` runs all of them.

Those whose rows were once scored wrongly run always; besides, a tenth of all families, another one each day.
"""

import datetime
import os

import pytest

pytest.importorskip("transformers")
from bench.families.__main__ import chosen, examine
from bench.families.checks import CHECKS, ERROR, WRONG

KNOWN = "gpt2 opt bloom falcon roberta bart mamba gpt_oss qwen3_next jamba lfm2_moe recurrent_gemma deepseek_v4".split()


def faults(family: str) -> list[str]:
    found = examine(family, list(CHECKS))
    if isinstance(found, str):  # no small model of it
        return []
    return [f"{family}, {name}: {o.kind}: {o.detail}" for name, o in found.items() if o.kind in (WRONG, ERROR)]


@pytest.mark.parametrize("family", KNOWN)
def test_a_family_that_was_once_wrong_is_right_or_refused(family: str) -> None:
    assert not faults(family)


@pytest.mark.slow
def test_a_tenth_of_all_families_is_right_or_refused() -> None:
    tenth = int(os.environ.get("MOPL_FAMILIES_TENTH", datetime.date.today().timetuple().tm_yday % 10))
    found = [fault for family in chosen(tenth) if family not in KNOWN for fault in faults(family)]
    assert not found, f"python -m bench.families --tenth {tenth}, or MOPL_FAMILIES_TENTH={tenth}: " + "; ".join(found)
