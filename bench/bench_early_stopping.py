"""Whether ranking stops in time: the default beside fixed numbers of steps, on small data, over seeds.

    python -m bench.bench_early_stopping --data small --json FILE
    python -m bench.bench_early_stopping --data ../shared/data/ltr_lightgbm --objectives a=91 b=69 c=12 --json FILE

`small` is generated: 80 lists to train on, 40 to validate, 880 to test, so that what overfitting costs is seen clearly.
Each seed draws data (or splits) and models anew. The base model is trained for 20 to 200 steps with the cosine schedule
over just these steps, and by default; then `weight-cos-dpo` on the base model that the default kept, likewise. Printed
are means over seeds of what the reports show of held-out lists: NDCG@10 of the main objective for the base model, the
hypervolume of the auxiliary objectives and the main NDCG for the tuned one, and how far below the best fixed number of
steps (in hindsight, of each seed) the default is, beside half the width of that one's bootstrap interval.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.measuring import about
from mopl.experiments import run_fronts
from mopl.pareto import Front
from mopl.ranking.config import RankConfig
from mopl.ranking.loading import load
from mopl.ranking.recipe import rank
from mopl.ranking.stages import Trained

FIXED = (20, 50, 100, 150, 200)


def write_small(folder: Path, seed: int) -> tuple[str, ...]:
    """Write generated lists as a folder of LETOR files, most of them to test on; return its objectives."""
    data = f"synthetic:queries=1000,items=10,features=16,objectives=3,seed={seed}"
    for name, part in zip(("train", "vali", "test"), load(data, fractions=(0.08, 0.04, 0.88), seed=seed), strict=True):
        columns = torch.cat([part.features, part.raw_auxiliary], 1).tolist()
        rows = zip(part.raw_main.tolist(), part.query_ids[part.owner].tolist(), columns, strict=True)
        lines = (f"{y:g} qid:{q} " + " ".join(f"{c}:{x:.6g}" for c, x in enumerate(row, 1)) for y, q, row in rows)
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ("aux1=17", "aux2=18", "aux3=19")


def figures(front: Front) -> dict[str, Any]:
    """Return what is compared of one front: figure and interval by name."""
    trained = [p for p in front.points if p.scale == 1.0]
    ends = [p.interval["main"] for p in trained]
    found = {"main": statistics.mean(p.main for p in trained),
             "main_interval": [statistics.mean(e[i] for e in ends) for i in range(2)]}  # fmt: skip
    if front.method != "base":
        found |= {"hypervolume": front.hypervolume, "hypervolume_interval": front.interval["hypervolume"]}
    return found


def one_seed(data: str, objectives: tuple[str, ...], seed: int, place: Path) -> dict[str, Any]:
    """Return the figures of every number of steps, and of the default, for one seed."""
    common: dict[str, Any] = {"seed": seed, "data_seed": seed, "scales": (), "bootstrap": 500, "checkpoint_every": 0,
                              "conditioning": "concat"}  # fmt: skip
    if data == "small":
        (place / "small").mkdir()
        data, objectives = str(place / "small"), write_small(place / "small", seed)
        common["normalize_features"] = "none"
    common |= {"data": data, "objectives": objectives}

    def run(name: str, **settings: Any) -> Path:
        return rank(RankConfig(**common, **settings), place / name, say=lambda text: None)

    found: dict[str, Any] = {"seed": seed, "base": {}, "weight-cos-dpo": {}}
    default = run("default")
    for front, folder in zip(run_fronts(default), (default / "base", default), strict=True):
        done = Trained.read(folder)
        found[front.method]["default"] = figures(front) | {"kept": done.kept, "done": done.steps, "of": done.limit}
    for steps in FIXED:
        path = run(f"base-{steps}", base_steps=steps, steps=1, points=3, patience=0)
        found["base"][str(steps)] = figures(run_fronts(path)[0])
        path = run(f"tuned-{steps}", steps=steps, base=str(default), patience=0)
        found["weight-cos-dpo"][str(steps)] = figures(run_fronts(path)[1])
    return found


def summary(seeds: list[dict[str, Any]]) -> str:
    """Return the means over seeds as a table."""
    lines = []
    for method, figure in (("base", "main"), ("weight-cos-dpo", "hypervolume"), ("weight-cos-dpo", "main")):
        rows = [seed[method] for seed in seeds]
        means = {name: statistics.mean(row[name][figure] for row in rows) for name in rows[0]}
        lines.append(f"{method}, {figure}: " + ", ".join(f"{name} {value:.4f}" for name, value in means.items()))
        short, half = [], []
        for row in rows:
            best = max((row[str(steps)] for steps in FIXED), key=lambda each: each[figure])
            low, high = best[f"{figure}_interval"]
            short.append(best[figure] - row["default"][figure])
            half.append((high - low) / 2)
        lines.append("  below the best of each seed: " + ", ".join(f"{s:.4f}" for s in short)
                     + "; half its interval: " + ", ".join(f"{h:.4f}" for h in half))  # fmt: skip
        if figure != "main" or method == "base":
            steps = ", ".join(f"{row['default']['kept']} of {row['default']['done']}" for row in rows)
            lines.append(f"  kept, of steps done: {steps}")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", default="small", help="small, or what mopl rank --data takes (default: small)")
    parser.add_argument("--objectives", nargs="*", default=(), metavar="SPEC", help="as in mopl rank")
    parser.add_argument("--seeds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--json", metavar="FILE", help="write every figure there")
    given = parser.parse_args()
    seeds = []
    for seed in range(given.seeds):
        with tempfile.TemporaryDirectory() as place:
            seeds.append(one_seed(given.data, tuple(given.objectives), seed, Path(place)))
        print(f"seed {seed} done", flush=True)
    print(summary(seeds))
    if given.json:
        record = {"about": about(), "seeds": seeds}
        Path(given.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
