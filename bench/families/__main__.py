"""Every family of causal language models that transformers knows, tiny and random, against its own forward pass.

    python -m bench.families                             # all of them, one line each, and a table at the end
    python -m bench.families --families gpt2,mamba       # these
    python -m bench.families --tenth 3                   # those whose number ends in 3
    python -m bench.families --checks packing,prompts    # these columns
    python -m bench.families --json results.json

Each cell is right, refused (in mopl's own words, before a number is given), wrong, or an error (raised elsewhere). The
exit status is 1 if a cell is wrong or an error. `--verbose` says why of every cell that is not right.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from bench.families import merging, models
from bench.families.checks import CHECKS as OWN
from bench.families.checks import ERROR, REFUSED, RIGHT, WRONG, Outcome, run

CHECKS = OWN | merging.CHECKS
_MARKS = {RIGHT: "·", REFUSED: "r", WRONG: "W", ERROR: "E"}


def examine(family: str, checks: list[str]) -> dict[str, Outcome] | str:
    """Return the outcome of each check, or why the family has no model."""
    try:
        model = models.build(family)
    except models.NotBuilt as error:
        return str(error)
    found = {}
    for name in checks:
        found[name] = run(CHECKS[name], copy.deepcopy(model))
    del model
    gc.collect()
    return found


def chosen(tenth: int | None, names: list[str] | None = None) -> list[str]:
    """Return the families asked for: all, every tenth from one on, or those named."""
    known = models.families()
    if names is not None:
        if unknown := [name for name in names if name not in known]:
            raise SystemExit(f"transformers has no causal language model of {', '.join(unknown)}")
        return names
    return known if tenth is None else known[tenth % 10 :: 10]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", help="names, separated by commas")
    parser.add_argument("--tenth", type=int, help="0 to 9")
    parser.add_argument("--checks", default=",".join(CHECKS), help="columns, separated by commas")
    parser.add_argument("--json", type=Path, help="write all outcomes here")
    parser.add_argument("--verbose", action="store_true", help="say why of what is not right")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    checks = args.checks.split(",")
    if unknown := [name for name in checks if name not in CHECKS]:
        raise SystemExit(f"there is no check {', '.join(unknown)}; there are {', '.join(CHECKS)}")
    names = chosen(args.tenth, args.families.split(",") if args.families else None)

    began, counts, results = time.perf_counter(), {name: Counter() for name in checks}, {}
    not_built = 0
    print(f"{'':28}" + "  ".join(checks))
    for family in names:
        started = time.perf_counter()
        found = examine(family, checks)
        seconds = time.perf_counter() - started
        if isinstance(found, str):
            not_built += 1
            results[family] = {"not built": found}
            print(f"{family:28}not built: {found}", flush=True)
            continue
        cells = [f"{_MARKS[found[name].kind]:{len(name)}}" for name in checks]
        print(f"{family:28}{'  '.join(cells)}  {seconds:.1f} s", flush=True)
        results[family] = {name: [outcome.kind, outcome.detail] for name, outcome in found.items()}
        for name, outcome in found.items():
            counts[name][outcome.kind] += 1
            if outcome.kind in (WRONG, ERROR) or (args.verbose and outcome.kind != RIGHT):
                print(f"    {name}: {outcome.kind}: {outcome.detail}", flush=True)
    _summary(counts, len(names), not_built, time.perf_counter() - began)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(any(count[WRONG] or count[ERROR] for count in counts.values()))


def _summary(counts: dict[str, Counter[Any]], families: int, not_built: int, seconds: float) -> None:
    print(f"\n{families} families, {not_built} not built, {seconds:.0f} s")
    print(f"{'':20}" + "".join(f"{kind:>9}" for kind in _MARKS))
    for name, count in counts.items():
        print(f"{name:20}" + "".join(f"{count[kind]:9}" for kind in _MARKS))


if __name__ == "__main__":
    sys.exit(main())
