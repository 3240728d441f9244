"""`mopl report`: one table, picture and page of finished runs."""

import argparse
from typing import Any

from mopl.commands.parser import add_command

EXAMPLES = """
examples:
  print the table of a run; write its table, picture and page again:
    mopl report runs/a
  compare runs:
    mopl report runs/a runs/b --html compare.html --png compare.png
  a row for each point of each front:
    mopl report runs/a runs/b --csv fronts.csv
"""


def add_parser(commands: Any) -> None:
    """Add `mopl report` to the commands."""
    parser = add_command(commands, "report", run, "compare finished runs: table, picture and page", EXAMPLES)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="directories of finished runs")
    parser.add_argument("--html", metavar="FILE", help="write the page to FILE")
    parser.add_argument("--png", metavar="FILE", help="write the picture to FILE")
    parser.add_argument("--table", metavar="FILE", help="write the table to FILE")
    parser.add_argument("--csv", metavar="FILE", help="write the points of all fronts to FILE")


def run(arguments: argparse.Namespace) -> None:
    """Run `mopl report`."""
    from mopl.experiments import compare
    from mopl.report.plot import check_picture

    if arguments.png is not None:
        check_picture(arguments.png)  # before anything is read, printed or written
    compare(arguments.runs, html=arguments.html, png=arguments.png, table=arguments.table, csv=arguments.csv)
