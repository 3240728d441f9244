"""`mopl rank`: a ranker for every trade-off."""

from typing import Any

from mopl.commands.experiment import Experiment, add_experiment, try_with
from mopl.ranking.config import RankConfig

EXAMPLES = """
examples:
  mopl rank                                          the embedded data set `travel`, about a minute on two cores
  mopl rank --method all                             COS-DPO beside its baselines, in one table
  mopl rank --data synthetic --seed 1                generated data with a known optimum
  mopl rank --data MSLR-WEB10K/Fold1                 LETOR files; the five auxiliary columns by name
  mopl rank --data train.txt --objectives clicks=134 price=7:min:softmax --run runs/shop
  mopl rank --config shop.yaml --steps 500           settings from a file; options override it
  mopl rank --run runs/shop --resume                 continue after Ctrl-C or a crash, bit for bit
  accelerate launch --num_processes 2 -m mopl.cli rank ...
"""


RANK = Experiment(
    name="rank", help="train a ranker for every trade-off, compare it with baselines, report", examples=EXAMPLES,
    settings=RankConfig, recipe="mopl.ranking.recipe", train="rank", folder="runs/rank-DATA-METHOD-N",
    hint=lambda run: (try_with("steer", run),),
)  # fmt: skip


def add_parser(commands: Any) -> None:
    """Add `mopl rank` to the commands."""
    add_experiment(commands, RANK)
