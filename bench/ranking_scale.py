"""Seconds and memory of ranking data in the shape of MSLR-WEB30K, from ten thousand rows to four million.

    python -m bench.ranking_scale --folder DIR                         # 4e6 rows: 5 GB of text, and the cache beside it
    python -m bench.ranking_scale --folder DIR --rows 1e4 1e5 --rounds 3

Files are generated: 136 columns, lists of 120 documents, blocks of lines repeated under new query ids, which are about
as long as MSLR's lines. Every figure is of a process of its own. `sklearn` is `load_svmlight_file` with float32 values
and without query ids, which it reads in a time quadratic in the rows, and its matrix stays sparse; `first` is
`read_letor` without a cache there, which reads the ids, makes the matrix dense, checks it and writes the cache, too;
`again` reads from it. They take turns in every round. Above `--sklearn-to` rows scikit-learn is left out: its matrix of
four million takes several times the memory.

`s` is processor time, which other work on the machine disturbs least, as the median of the rounds. `speed` is sklearn's
time over mopl's: 0.8 is 80 % of its speed. `load` is `mopl.ranking.load` from the cache: split by query and normalised.
`steps` are 100 steps of AdamW on batches of 16 lists after it, whose peak includes the load. `GB` is the peak of memory
of its own, the libraries (0.3 GB) included; pages of mapped files, which the system takes back when it needs them, are
not. It is looked at every 20 ms. `--json` has the peak with these pages, too.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS, LIST, BLOCK = 136, 120, 12_000
STEPS, LISTS = 100, 16
READERS = ("sklearn", "first", "again")
STAGES = (*READERS, "load", "steps")


def generate(file: Path, rows: int, seed: int = 0) -> None:
    """Write rows in MSLR's shape: counts and fractions, a label from 0 to 4."""
    random, block = np.random.default_rng(seed), min(BLOCK, rows)
    counts = random.poisson(3, (block, COLUMNS))
    fractions = random.random((block, COLUMNS))
    is_count = np.arange(COLUMNS) % 2 == 0
    labels = random.integers(0, 5, block)
    ends = [
        " ".join(f"{c + 1}:{counts[i, c] if is_count[c] else format(fractions[i, c], '.6f')}" for c in range(COLUMNS))
        for i in range(block)
    ]
    with open(file, "w", encoding="ascii") as out:
        for start in range(0, rows, block):
            n = min(block, rows - start)
            out.writelines(f"{labels[i]} qid:{(start + i) // LIST + 1} {ends[i]}\n" for i in range(n))


def _sklearn(file: Path, cache: Path) -> object:
    from sklearn.datasets import load_svmlight_file

    load: Any = load_svmlight_file  # its annotations are those of the defaults
    return load(str(file), dtype=np.float32, query_id=False)


def _read(file: Path, cache: Path) -> object:
    from mopl.ranking.svmlight import read_letor

    return read_letor(file, cache=cache)


def _load(file: Path, cache: Path) -> Any:
    from mopl.ranking import load

    return load(file, cache=cache)[0]


def train(data: Any) -> None:
    """Take steps on the main objective."""
    import torch

    from mopl.ranking.model import ListTransformer

    torch.manual_seed(0)
    model = ListTransformer(data.num_features, hidden=32, layers=1)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(STEPS):
        batch = data.batch(torch.randint(len(data), (LISTS,)))
        scores = model(batch.features, batch.mask).masked_fill(~batch.mask, -1e9)
        loss = -(batch.main_targets * scores.log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def stage(name: str, file: Path, cache: Path) -> dict[str, float]:
    """Measure one stage in this process."""
    from bench.measuring import resident

    work: dict[str, Callable[[Path, Path], Any]] = {"sklearn": _sklearn, "load": _load, "steps": _load}
    for module in (
        "sklearn.datasets",
        *(() if name == "sklearn" else ("mopl.ranking.loading", "mopl.ranking.svmlight")),
    ):
        importlib.import_module(module)  # not timed
    peak, ended = [resident("RssAnon")], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            peak[0] = max(peak[0], resident("RssAnon"))

    watching = threading.Thread(target=watch)
    watching.start()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        found = work.get(name, _read)(file, cache)
        if name == "steps":
            wall, cpu = time.perf_counter(), time.process_time()
            train(found)
    finally:
        ended.set()
        watching.join()
    took = {"s": time.process_time() - cpu, "wall s": time.perf_counter() - wall}
    return {**took, "GB": max(peak[0], resident("RssAnon")), "GB with mapped files": resident("VmHWM")}


def _apart(name: str, file: Path, cache: Path) -> dict[str, float]:
    """Measure a stage in a process of its own."""
    command = [sys.executable, "-m", "bench.ranking_scale", "--stage", name, "--file", str(file), "--cache", str(cache)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def measure(rows: int, folder: Path, rounds: int, sklearn: bool = True) -> dict[str, Any]:
    """Return the figures of one size; what it wrote is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="ranking-scale-", dir=folder) as place:
        file, cache = Path(place) / "all.txt", Path(place) / "cache"
        generate(file, rows)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in STAGES if sklearn or name != "sklearn"}
        for _ in range(rounds):
            shutil.rmtree(cache, ignore_errors=True)
            for name in READERS[not sklearn :]:
                found[name].append(_apart(name, file, cache))
        for name in ("load", "steps"):
            found[name].append(_apart(name, file, cache))
        row: dict[str, Any] = {"rows": rows, "MB": file.stat().st_size / 1e6}
    for name, each in found.items():
        row[name] = {key: statistics.median(one[key] for one in each) for key in each[0]}
    if sklearn:
        row["speed"] = statistics.median(a["s"] / b["s"] for a, b in zip(found["sklearn"], found["first"], strict=True))
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the figures."""
    names = ["rows", "MB", "speed", *(f"{name} {unit}" for name in STAGES for unit in ("s", "GB"))]
    lines = ["| " + " | ".join(names) + " |", "|" + "---:|" * len(names)]
    for row in rows:
        cells = [f"{row['rows']:,}", f"{row['MB']:.0f}", f"{row['speed']:.2f}" if "speed" in row else ""]
        cells += [f"{row[name][unit]:.2f}" if name in row else "" for name in STAGES for unit in ("s", "GB")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, nargs="+", default=[1e4, 1e5, 1e6, 4e6])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sklearn-to", type=float, default=1e6, help="most rows that scikit-learn reads")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where files are written")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.stage:
        print(json.dumps(stage(asked.stage, asked.file, asked.cache)))
        return
    for option, folder in (("--folder", asked.folder), ("--json", asked.json and asked.json.parent)):
        if folder and not folder.is_dir():
            parser.error(f"{option} needs the folder {folder}, which is not there; make it, or name another")
    from bench.measuring import about

    rows = []
    for count in asked.rows:
        rows.append(measure(int(count), asked.folder, asked.rounds, sklearn=count <= asked.sklearn_to))
        print(table(rows[-1:]), flush=True)
        if asked.json:
            asked.json.write_text(json.dumps({"about": about(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
