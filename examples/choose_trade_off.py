# %% [markdown]
# Choose a trade-off after training, from a finished run: the best point that keeps a limit.
#
# Shows `mopl.ranking.steer.steer` on generated data with two objectives. About 15 seconds on a CPU.
# Prints what 11 weights and three scales give, and the choice: the most of the first objective that a limit on the main
# one allows.

# %% A run to choose from; name a folder of `mopl rank` in its place.
import tempfile
from pathlib import Path

import torch

from mopl.ranking import RankConfig, rank
from mopl.ranking.steer import steer

torch.set_num_threads(1)  # so small a model is slower with more
run = Path(tempfile.mkdtemp()) / "run"
rank(RankConfig(data="synthetic:queries=120,items=8,features=8,objectives=2", bootstrap=0), run)

# %% Figures of the validation split at weights and scales, without training.
found = []
for first in [step / 10 for step in range(11)]:
    for scale in (1.0, 2.0, 5.0):
        result = steer(run, [first, 1 - first], scale=scale, split="valid")
        base, point = result["rows"]["base model"], list(result["rows"].values())[-1]
        found.append({"weights": [first, 1 - first], "scale": scale, **point})
        figures = ", ".join(f"{figure:.3f}" for figure in point["auxiliary"])
        print(f"weights {first:.1f},{1 - first:.1f} scale {scale:g}: main {point['main']:.3f}, objectives {figures}")

# %% The limit: NDCG of the main label may be 0.05 below the base model's. Choose on validation, report on test.
kept = [point for point in found if point["main"] >= base["main"] - 0.05]
best = max(kept, key=lambda point: point["auxiliary"][0])
result = steer(run, best["weights"], scale=best["scale"], split="test")
base, chosen = result["rows"]["base model"], list(result["rows"].values())[-1]
print(f"chosen: weights {best['weights'][0]:.1f},{best['weights'][1]:.1f} scale {best['scale']:g}")
before, after = (f"main {row['main']:.3f}, first objective {row['auxiliary'][0]:.3f}" for row in (base, chosen))
print(f"test: {before} -> {after}")
