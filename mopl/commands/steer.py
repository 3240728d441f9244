"""`mopl steer`: figures and scores of a finished ranker for any trade-off."""

import argparse
import json
from typing import Any

from mopl._terminal import printable, say
from mopl.commands.parser import add_command
from mopl.commands.trade_off import add_trade_off, check_trade_off

EXAMPLES = """
examples:
  figures at weights for the objectives in the run's order:
    mopl steer RUN --weights 0.6 0.3 0.1
  closer to the base model (equation 14), without training:
    mopl steer RUN --weights 0.6 0.3 0.1 --scale 2
  the scores of every item of the test split:
    mopl steer RUN --weights 0.6 0.3 0.1 --output scores.tsv
"""


def add_parser(commands: Any) -> None:
    """Add `mopl steer` to the commands."""
    help = "evaluate a trained ranker at any trade-off, without training"
    parser = add_command(commands, "steer", run, help, EXAMPLES, options_anywhere=True)
    parser.add_argument("run", metavar="RUN", help="directory of a finished run of mopl rank")
    add_trade_off(parser, old="--temperature")
    parser.add_argument("--scale", type=float, metavar="C", default=1.0,
                        help="above 1 closer to the base model, below 1 further away (default: 1)")  # fmt: skip
    parser.add_argument("--method", help="method of a run that has several (default: weight-cos-dpo)")
    parser.add_argument(
        "--split", choices=("train", "valid", "test"), default="test", help="split to evaluate (default: test)"
    )
    parser.add_argument("--output", metavar="FILE", help="write query, item and score of every item to FILE")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> None:
    """Run `mopl steer`."""
    from mopl.ranking.runs import RankingRun
    from mopl.ranking.steer import steer

    check_trade_off(arguments.weights, RankingRun.read(arguments.run).objectives)
    figures = steer(
        arguments.run, arguments.weights, scale=arguments.scale, beta=arguments.beta,
        method=arguments.method, split=arguments.split, output=arguments.output,
    )  # fmt: skip
    print(json.dumps(figures, indent=2) if arguments.json else _table(figures))
    if arguments.output and not arguments.json:
        say(f"scores of the {figures['split']} split: {arguments.output}")


def _table(figures: dict[str, Any]) -> str:
    """Return the figures of `steer` as aligned text."""
    header = ["", *(printable(name, keep="") for name in (f"{figures['main']} (main)", *figures["objectives"]))]
    rows = [[name, *(f"{x:.4f}" for x in (row["main"], *row["auxiliary"]))] for name, row in figures["rows"].items()]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in (header, *rows)
    ]
    title = f"{figures['method']} of {figures['run']}, {figures['split']} split, {figures['metric']}"
    return "\n".join([printable(title, keep=""), *lines])
