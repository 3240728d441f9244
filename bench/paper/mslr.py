"""COS-DPO on MSLR-WEB10K or 30K: five folds as given, five auxiliary objectives or two, 11 trade-offs.

Section 4.1 and appendix A.4 of the paper: 131 of the 136 columns are inputs, the base model (two layers, width 128)
learns the relevance, tuned models have two layers of width 64 and trade off the last five columns. With two objectives,
the two qualities, tuned models have five layers and add to the base model's scores, as where the paper conditions on β.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.paper.plan import RANK, Job, Plan
from bench.paper.tables import Table, front_table, paper_of
from mopl._files import write_file
from mopl._lines import read_lines
from mopl.experiments.run import FinishedRun
from mopl.ranking.letor import find_files
from mopl.ranking.objectives import MSLR_COLUMNS

FOLDS = (1, 2, 3, 4, 5)
PAPER_QUERIES = 10_000
GROUPS: dict[str, dict[str, Any]] = {
    "five": {"parametrisation": "scratch"},
    "pair": {"objectives": ("quality", "quality2"), "parametrisation": "augment", "layers": 5},
}
COMMON: dict[str, Any] = {"method": "all", "conditioning": "concat", "points": 11, "scales": ()}
SMALL: dict[str, Any] = {"steps": 200, "base_steps": 100}
SMALL_QUERIES = 200
TITLES = {"five": "five auxiliary objectives", "pair": "two auxiliary objectives, quality and quality2"}


def add_options(group: argparse._ArgumentGroup) -> None:
    """Add what this experiment alone asks."""
    group.add_argument("--folds", type=int, nargs="+", choices=FOLDS, default=FOLDS, metavar="N", help="folds, 1 to 5")
    group.add_argument("--groups", nargs="+", choices=tuple(GROUPS), default=tuple(GROUPS), help="five objectives, two")
    group.add_argument("--queries", type=int, default=None, metavar="N",
                       help=f"the first queries of each file (default: all; with --small {SMALL_QUERIES})")  # fmt: skip


def prepare(options: argparse.Namespace, given: dict[str, Any]) -> Plan:
    """Check the folds and return the runs."""
    queries = options.queries if options.queries or not options.small else SMALL_QUERIES
    if queries is not None and queries < 2:
        raise ValueError(f"--queries is {queries} but each file needs at least 2")
    files = check_folds(options.path, options.folds)
    small = SMALL if options.small else {}
    jobs = []
    for group in options.groups:
        for fold in options.folds:
            data = options.path / f"Fold{fold}" if queries is None else options.out / "data" / f"Fold{fold}"
            settings = {"data": str(data), **COMMON, **GROUPS[group], **small, **given}
            jobs.append(Job(f"{group}-fold{fold}", group, RANK, settings))
    counts = {"queries of each file": queries, "folds": len(options.folds)}
    parts = [part for splits in files.values() for each in splits.values() for part in each]
    return Plan("mslr", options.out, jobs, parts, {}, counts)


def write_data(plan: Plan, options: argparse.Namespace) -> None:
    """Write the first queries of each split, where not all are asked for."""
    queries = plan.counts["queries of each file"]
    for fold, files in check_folds(options.path, options.folds).items() if queries else ():
        for split, parts in files.items():
            target = plan.out / "data" / f"Fold{fold}" / f"{'vali' if split == 'valid' else split}.txt"
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                write_file(target, "".join(first_queries(parts, queries)))


def check_folds(path: Path, folds: tuple[int, ...] | list[int]) -> dict[int, dict[str, list[Path]]]:
    """Return the files of each fold by split, of which each may be in numbered parts.

    Raises:
        FileNotFoundError: If folds or files are missing: all of them are named.
        ValueError: If a file does not begin as those of MSLR do.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such folder; name that of Fold1 to Fold5")
    found, missing = {}, []
    for fold in folds:
        folder = path / f"Fold{fold}"
        if not folder.is_dir():
            missing.append(folder.name)
            continue
        try:
            files = find_files(folder)
        except ValueError as error:
            if "has no file for" not in str(error):
                raise
            files = {}
        words = {"train": "train.txt", "valid": "vali.txt", "test": "test.txt"}
        missing += [f"{folder.name}/{word}" for split, word in words.items() if split not in files]
        found[fold] = files
    if missing:
        raise FileNotFoundError(
            f"{path} lacks {', '.join(missing)}; MSLR has train.txt, vali.txt and test.txt in each of Fold1 to Fold5 "
            "(--folds takes some of them)"
        )
    for files in found.values():
        for file in itertools.chain(*files.values()):
            check_line(file)
    return found


def check_line(file: Path) -> None:
    """Check the first line; the library checks all of them, which takes minutes, before it trains."""
    line = next((line for _, line in read_lines(file) if line.strip() and not line.startswith("#")), "")
    words = line.partition("#")[0].split()
    columns = [int(match[1]) for word in words[2:] if (match := re.match(r"(\d+):\S", word))]
    place = f"{file.parent.name}/{file.name}"
    if len(words) < 3 or not words[1].startswith("qid:") or len(columns) != len(words) - 2:
        raise ValueError(f"{place} begins with {line[:50]!r} but a line of MSLR is LABEL qid:QUERY 1:x ... 136:x")
    if max(columns) != MSLR_COLUMNS:
        raise ValueError(f"{place} has {max(columns)} columns in its first line but MSLR has {MSLR_COLUMNS}")


def first_queries(files: Sequence[Path], queries: int) -> Iterator[str]:
    """Yield the lines of the first queries of a split."""
    last, seen = None, 0
    for _, line in itertools.chain(*map(read_lines, files)):
        words = line.split(maxsplit=2)
        if len(words) > 1 and words[1] != last:
            last, seen = words[1], seen + 1
        if seen > queries:
            return
        yield f"{line}\n"


def tables(plan: Plan, runs: dict[str, FinishedRun]) -> list[Table]:
    """Return a table for each number of objectives."""
    found = []
    for group in dict.fromkeys(job.group for job in plan.jobs):
        jobs = [job for job in plan.jobs if job.group == group]
        own = [runs[job.name] for job in jobs]
        sizes = [sum(split["queries"] for split in run.record["data"]["splits"].values()) for run in own]
        config, first = own[0].config, min(sizes)
        differs = [
            f"data: {first:,} queries in a fold, {len(own)} of its folds"
            + ("" if first == PAPER_QUERIES else f", where the paper has the {PAPER_QUERIES:,} of MSLR-WEB10K")
            + "; ± of hypervolumes: standard deviation over folds",
            f"the paper does not state: steps (here {config.steps or 'those of the data'}, stopped early by "
            f"validation), batch size ({config.batch_size}), learning rate ({config.learning_rate:g}), Dirichlet "
            f"parameter ({config.concentration:g}), β ({', '.join(f'{b:g}' for b in config.beta)}), which 11 weights "
            "of five objectives, normalisation of features, and the NDCG of queries without labels (here left out)",
            "parameters: the paper's network has 50,112 and 320 more for five weights; the width of its feed-forward "
            "layers is not stated",
            "quality2 measures badness: here less is better, the paper does not say",
        ]
        sample = first < PAPER_QUERIES
        table = front_table(f"MSLR: {TITLES[group]}", group, plan, runs, paper_of("mslr", group), differs, sample)
        found.append(table)
    return found
