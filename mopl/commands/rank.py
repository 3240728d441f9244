"""`mopl rank`: a ranker for every trade-off."""

from typing import Any

from mopl.commands.experiment import Experiment, add_experiment, try_with
from mopl.ranking.config import RankConfig

EXAMPLES = """
examples:
  the built-in data set travel, about ten seconds on two cores:
    mopl rank
  COS-DPO beside its baselines, in one table:
    mopl rank --method all
  generated data with a known optimum:
    mopl rank --data synthetic --seed 1
  LETOR files; the five auxiliary columns of MSLR have names:
    mopl rank --data MSLR-WEB10K/Fold1
  auxiliary objectives from columns of a file:
    mopl rank --data train.txt --objectives clicks=134 price=7:min:softmax
  settings from a file, which options override:
    mopl rank --config shop.yaml --steps 500
  continue after Ctrl-C or a crash, bit for bit:
    mopl rank --run runs/shop --resume
  on two GPUs:
    accelerate launch --num_processes 2 -m mopl rank --data train.txt
"""


RANK = Experiment(
    name="rank", help="train a ranker for every trade-off", examples=EXAMPLES,
    settings=RankConfig, recipe="mopl.ranking.recipe", train="rank", folder="runs/rank-DATA-METHOD-N",
    basic=("data", "objectives", "method", "conditioning", "loss", "beta", "steps", "batch_size", "learning_rate",
           "points", "seed", "device"),
    hint=lambda run: (try_with("steer", run),),
)  # fmt: skip


def add_parser(commands: Any) -> None:
    """Add `mopl rank` to the commands."""
    add_experiment(commands, RANK)
