# %% [markdown]
# A ranker on a LETOR file of your own: write the file, train for every trade-off, score at three of them.
#
# Shows `mopl.ranking.rank` and `open_run`, with a file whose columns are objectives. About 10 seconds on a CPU.
# Prints, for three weights of price and distance, the mean price and distance of the three hotels ranked first.

# %% Write a file: 60 searches of 10 hotels; near hotels are dear. Columns 5 and 6 are the labels, 1 to 4 the inputs.
import random
import tempfile
from pathlib import Path

import torch

from mopl.ranking import RankConfig, open_run, rank

torch.set_num_threads(1)  # so small a model is slower with more
folder = Path(tempfile.mkdtemp())
rng = random.Random(0)
lines = []
for search in range(60):
    for _ in range(10):
        stars, reviews, distance = rng.randint(1, 5), rng.randint(0, 500), rng.uniform(0.1, 12)
        price = 90 + 25 * stars - 7 * distance + rng.uniform(0, 40)
        liked = 0.8 * stars + 0.004 * reviews - 0.1 * distance + rng.gauss(0, 0.7)
        known = f"1:{stars} 2:{reviews} 3:{price:.0f} 4:{distance:.1f}"
        lines.append(f"{min(4, max(0, round(liked - 1)))} qid:{search} {known} 5:{price:.0f} 6:{distance:.1f}\n")
(folder / "hotels.txt").write_text("".join(lines), encoding="utf-8")

# %% Train. Less is better for both objectives; their labels are dense, so a softmax makes the targets.
config = RankConfig(
    data=str(folder / "hotels.txt"),
    objectives=("price=5:min:softmax:scale=std", "distance=6:min:softmax:scale=std"),
)
rank(config, folder / "run")

# %% Score the test searches at three trade-offs, with one model.
run = open_run(folder / "run")
test, model = run.splits["test"], run.policy().model.eval()
batch = test.batch(list(range(len(test))))
raw = test.pad(test.raw_auxiliary, list(range(len(test))))  # (searches, hotels, objectives)
for first in (1.0, 0.5, 0.0):
    scores = model.score(batch.features, torch.tensor([first, 1 - first]), mask=batch.mask)
    top = scores.topk(3, dim=1).indices
    price, distance = raw.gather(1, top[..., None].expand(-1, -1, 2)).mean((0, 1)).tolist()
    print(f"weights {first:.1f},{1 - first:.1f}: mean price {price:.0f}, mean distance {distance:.1f}")
