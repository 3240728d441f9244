"""The command `mopl`: train one model for every trade-off, turn its knobs afterwards, compare runs.

    mopl rank                      train weight-cos-dpo on the embedded data set, with table, picture and page
    mopl align --demo              fine-tune a small language model for every trade-off
    mopl generate RUN --weights .. answer prompts at any trade-off
    mopl export RUN --weights ..   one trade-off as a plain model for transformers and vLLM
    mopl steer RUN --weights ...   figures and scores for any trade-off of a finished run, without training
    mopl report RUN RUN ...        one table, picture and page of several runs

An error is one line on stderr and exit status 2 (`--debug` shows where it came from); a run that was stopped by Ctrl-C
exits with 130 and says how to continue it. A training goes on to its end though nobody reads what it prints, and exits
with 0; a command that only prints exits with 141 then, and with 2 if its output could not be written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from mopl import __version__
from mopl._extras import require_for
from mopl._renamed import renamed
from mopl._terminal import exit_status, is_terminal, one_line, print_traceback, printable, say, shell, terminal
from mopl.alignment.command import add_parser as add_align_parser
from mopl.alignment.commands_after import add_export_parser, add_generate_parser

METHODS = ("weight-cos-dpo", "temperature-cos-dpo", "dpo-ls", "dpo-soup", "mo-dpo")

RANK_EXAMPLES = """
examples:
  mopl rank                                          the embedded data set `travel`, about a minute on two cores
  mopl rank --method all                             COS-DPO beside its baselines, in one table
  mopl rank --data synthetic --seed 1                generated data with a known optimum
  mopl rank --data MSLR-WEB10K/Fold1                 LETOR files; the five auxiliary columns by name
  mopl rank --data train.txt --objectives clicks=134 price=7:min:softmax --run runs/shop
  mopl rank --run runs/shop --resume                 continue after Ctrl-C or a crash, bit for bit
  accelerate launch --num_processes 2 -m mopl.cli rank ...
"""

STEER_EXAMPLES = """
examples:
  mopl steer runs/rank-travel-weight-cos-dpo-1 --weights 0.6 0.3 0.1
  mopl steer RUN --weights 0.5 0.5 --scale 2         closer to the base model (equation 14), without training
  mopl steer RUN --weights 0.5 0.5 --temperature 1.1 0.9       a model of temperature-cos-dpo
  mopl steer RUN --weights 0.5 0.5 --output scores.tsv         the scores of every item of the test split
"""

REPORT_EXAMPLES = """
examples:
  mopl report runs/a                                 print its table, write table, picture and page again
  mopl report runs/a runs/b runs/c --html compare.html --png compare.png
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        say(f"{self.prog}: error: {one_line(message)}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def _optional_int(text: str) -> int | None:
    return None if text == "all" else int(text)


def _empty(text: str) -> str | int:
    if text not in ("skip", "0", "1"):
        raise argparse.ArgumentTypeError(f"{text!r} is not skip, 0 or 1")
    return text if text == "skip" else int(text)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    parser = _Parser(prog="mopl", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"mopl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    _rank_parser(commands)
    _steer_parser(commands)
    add_align_parser(commands)
    add_generate_parser(commands)
    add_export_parser(commands)
    _report_parser(commands)
    return parser


def _add(commands: Any, name: str, help: str, examples: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=help, description=help, epilog=examples, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _rank_parser(commands: Any) -> None:
    """Add `mopl rank`; the names of its settings are the fields of `RankConfig`, which also holds the defaults."""
    parser = _add(
        commands, "rank", "train a ranker for every trade-off, compare it with baselines, report", RANK_EXAMPLES
    )
    group = parser.add_argument_group("run")
    group.add_argument("--run", metavar="DIR", help="run directory (default: runs/rank-DATA-METHOD-N)")
    group.add_argument("--resume", action="store_true", help="continue the run in --run")
    group.add_argument("--overwrite", action="store_true", help="replace the run in --run")
    group.add_argument("--seed", type=int, help="seed of the training (default: 0)")
    group.add_argument("--device", choices=("auto", "cpu"), help="auto takes a GPU if there is one (default: auto)")
    group.add_argument("--log-every", type=int, metavar="STEPS", help="steps between log lines (default: 50)")
    group.add_argument("--checkpoint-every", type=int, metavar="STEPS", help="steps between checkpoints (default: 200)")
    group.add_argument("--tensorboard", action="store_true", help="also write TensorBoard files")

    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="DATA", help="travel, synthetic[:OPTION=VALUE,...], or a LETOR file or folder "
                       "(default: travel)")  # fmt: skip
    group.add_argument("--objectives", nargs="+", metavar="SPEC", help="auxiliary objectives, e.g. clicks=134 "
                       "price=7:min:softmax dwell=@dwell.txt (default: those of the data)")  # fmt: skip
    group.add_argument("--data-seed", type=int, metavar="SEED", help="seed of drawn splits and of generated data "
                       "(default: 0)")  # fmt: skip
    group.add_argument("--normalize-features", metavar="HOW", help="none, global, query or query-minmax, alone or "
                       "after log1p+ (default: that of the data)")  # fmt: skip

    group = parser.add_argument_group("method")
    group.add_argument("--method", choices=(*METHODS, "all"), help="what to train (default: weight-cos-dpo)")
    group.add_argument("--base", metavar="DIR", help="a trained base model: a run, or a folder with a model")
    group.add_argument("--loss", choices=("listnet", "plackett-luce"), help="list loss (default: listnet)")
    group.add_argument("--ties", choices=("breslow", "efron", "exact", "random"),
                       help="equal labels under Plackett-Luce (default: breslow)")  # fmt: skip
    group.add_argument("--last-group", choices=("charged", "free"),
                       help="items of the lowest label under Plackett-Luce; free: they are unranked, as zeros of "
                       "a sparse label are (default: charged)")  # fmt: skip
    group.add_argument("--top-k", type=_optional_int, metavar="K", help="ranks that Plackett-Luce sees (default: all)")
    group.add_argument("--temperature", nargs="+", type=float, metavar="BETA",
                       help="one for all objectives, or one for each (default: 1)")  # fmt: skip
    group.add_argument("--temperature-range", nargs=2, type=float, metavar=("LOW", "HIGH"),
                       help="box of temperature-cos-dpo, as factors of --temperature (default: 0.67 1.5)")  # fmt: skip
    group.add_argument("--alpha", type=float, help="concentration of the Dirichlet weights (default: 0.5)")
    group.add_argument("--weights-per", choices=("list", "step"), help="draw weights for each list, or one vector a "
                       "step as in the paper (default: list)")  # fmt: skip
    group.add_argument("--parametrisation", choices=("scratch", "augment"), help="augment: the network's output is "
                       "added to the base model's scores; scratch: it is the scores (default: augment)")  # fmt: skip
    group.add_argument("--penalty", type=float, help="factor of the cosine penalty (default: 0)")
    group.add_argument("--penalty-sign", choices=("as_printed", "cosmos"),
                       help="the paper prints one sign and describes the other (default: as_printed)")  # fmt: skip

    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, help="updates of each tuned model (default: 10 epochs, at least 200)")
    group.add_argument("--base-steps", type=int, help="updates of the base model (default: 3 epochs, at least 100)")
    group.add_argument("--patience", type=int, metavar="N", help="stop after N validations without a better "
                       "figure; the best step is kept. 0: all steps, the last is kept (default: 6)")  # fmt: skip
    group.add_argument("--validate-every", type=int, metavar="STEPS", help="(default: a twentieth of the steps, at "
                       "least 5)")  # fmt: skip
    group.add_argument("--batch-size", type=int, metavar="LISTS", help="lists in a batch (default: 64)")
    group.add_argument("--learning-rate", type=float, help="(default: 0.003)")
    group.add_argument("--weight-decay", type=float, help="decoupled (default: 0)")
    group.add_argument("--warmup", type=int, metavar="STEPS", help="linear warm-up (default: 20)")
    group.add_argument("--schedule", choices=("constant", "linear", "cosine"), help="(default: cosine)")
    group.add_argument("--gradient-clip", type=float, metavar="NORM", help="0 for none (default: 1)")
    group.add_argument("--accumulation", type=int, metavar="PARTS", help="parts of a batch, one after another; the "
                       "result does not depend on it (default: 1)")  # fmt: skip
    group.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), help="(default: no)")
    group.add_argument("--hidden", type=int, help="width of the tuned models (default: 64)")
    group.add_argument("--layers", type=int, help="layers of the tuned models (default: 2)")
    group.add_argument("--heads", type=int, help="attention heads (default: 4)")
    group.add_argument("--dropout", type=float, help="(default: 0)")
    group.add_argument("--base-hidden", type=int, help="width of the base model (default: 128)")
    group.add_argument("--base-layers", type=int, help="layers of the base model (default: 2)")

    group = parser.add_argument_group("evaluation")
    group.add_argument("--points", type=int, help="size of the grid of weights (default: 11, 15, 20 for 2, 3, 4 "
                       "objectives, 11 above)")  # fmt: skip
    group.add_argument("--scales", nargs="*", type=float, metavar="C", help="distances from the base model that the "
                       "report shows besides 1 (default: 0.5 2 5)")  # fmt: skip
    group.add_argument("--k", type=int, help="cut of NDCG (default: 10)")
    group.add_argument("--gain", choices=("linear", "exponential"), type=lambda text: renamed("gain", text),
                       help="gain of NDCG: the label, or 2^label - 1 (default: linear)")  # fmt: skip
    group.add_argument("--empty", type=_empty, metavar="{skip,0,1}",
                       help="what a query without labels counts as (default: skip)")  # fmt: skip
    group.add_argument("--bootstrap", type=int, metavar="SAMPLES", help="for intervals over queries, 0 for none "
                       "(default: 1000)")  # fmt: skip
    parser.set_defaults(act=_rank)


def _steer_parser(commands: Any) -> None:
    parser = _add(
        commands, "steer", "figures and scores of a finished run for any trade-off, without training", STEER_EXAMPLES
    )
    parser.add_argument("run", metavar="RUN", help="directory of a finished run")
    parser.add_argument("--weights", nargs="+", type=float, required=True, metavar="W",
                        help="one for each objective, in the run's order; they must sum to 1")  # fmt: skip
    parser.add_argument("--scale", type=float, metavar="C", default=1.0,
                        help="above 1 closer to the base model, below 1 further away (default: 1)")  # fmt: skip
    parser.add_argument("--temperature", nargs="+", type=float, metavar="BETA", default=None,
                        help="for temperature-cos-dpo, one for each objective (default: the run's)")  # fmt: skip
    parser.add_argument("--method", choices=METHODS, default=None, help="which method of an `all` run")
    parser.add_argument("--split", choices=("train", "valid", "test"), default="test", help="(default: test)")
    parser.add_argument(
        "--output", metavar="FILE", default=None, help="write query, item and score of every item there"
    )
    parser.add_argument("--json", action="store_true", default=False, help="print JSON instead of a table")
    parser.set_defaults(act=_steer)


def _report_parser(commands: Any) -> None:
    parser = _add(commands, "report", "one table, picture and page of one or several runs", REPORT_EXAMPLES)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="directories of finished runs")
    parser.add_argument("--html", metavar="FILE", default=None, help="write the page there")
    parser.add_argument("--png", metavar="FILE", default=None, help="write the picture there")
    parser.add_argument("--table", metavar="FILE", default=None, help="write the table there")
    parser.set_defaults(act=_report)


def _rank(arguments: argparse.Namespace) -> int:
    from mopl.experiments.run_directory import read_run
    from mopl.ranking.config import RankConfig
    from mopl.ranking.recipe import check_resume, rank
    from mopl.ranking.runs import run_fronts
    from mopl.report import print_table

    given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(arguments).items()}
    settings = {name: v for name, v in given.items() if name in RankConfig.__dataclass_fields__}
    run, resume = given.get("run"), given.get("resume", False)
    if resume and run is not None:
        config = check_resume(read_run(run), settings, Path(run))
    else:
        config = RankConfig(**settings)
    path = rank(config, run, resume=resume, overwrite=given.get("overwrite", False))
    if _process() == 0:
        say()
        print_table(run_fronts(path), metric=config.measure.metric(read_run(path)["data"]["empty_share"]))
        say("", f"{path}/report.html shows every trade-off; {path}/front.png and table.txt are the same in short")
        names = [objective["name"] for objective in read_run(path)["data"]["objectives"][1:]]
        rest = [round(0.5 / (len(names) - 1), 2) for _ in names[2:]] if len(names) > 1 else []
        example = [0.5, *rest, round(0.5 - sum(rest), 2)] if len(names) > 1 else [1.0]
        command = shell("mopl", "steer", path, "--weights", *(f"{w:g}" for w in example))
        say(f"{command}    ({', '.join(names)})")
    return 0


def _steer(arguments: argparse.Namespace) -> int:
    from mopl.ranking.steer import steer

    figures = steer(
        arguments.run, arguments.weights, scale=arguments.scale, temperature=arguments.temperature,
        method=arguments.method, split=arguments.split, output=arguments.output,
    )  # fmt: skip
    print(json.dumps(figures, indent=2) if arguments.json else _steer_table(figures))
    if arguments.output and not arguments.json:
        say(f"scores of the {figures['split']} split: {arguments.output}")
    return 0


def _steer_table(figures: dict[str, Any]) -> str:
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


def _report(arguments: argparse.Namespace) -> int:
    from mopl.experiments.run_directory import read_run
    from mopl.report.plot import check_picture

    if arguments.png is not None:
        check_picture(arguments.png)  # before anything is read, printed or written
    kind = read_run(arguments.runs[0]).get("kind")
    if kind == "align":
        from mopl.alignment.runs import compare
    elif kind == "clp":
        from mopl.clp.runs import compare
    else:
        from mopl.ranking.runs import compare
    compare(arguments.runs, html=arguments.html, png=arguments.png, table=arguments.table)
    return 0


def _process() -> int:
    """Return this process's number under a launcher, 0 alone."""
    return int(os.environ.get("RANK", "0"))


def _parser_of(command: str, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    (subparsers,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return subparsers.choices[command]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what a command does not know is its error, and names the option that is nearest."""
    parser = build_parser()
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser = _parser_of(parsed.command, parser)
        near = get_close_matches(unknown[0].partition("=")[0], parser._option_string_actions, 1)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}" + "".join(f" (did you mean {o}?)" for o in near))
    return parsed


def as_flags(text: str, command: str) -> str:
    """Return a message with settings written as options of the command: the library says `max_length=56`.

    Args:
        text: A message of the library.
        command: The command whose options are meant.
    """
    flags = {
        action.dest: flag
        for action in _parser_of(command, build_parser())._actions
        for flag in action.option_strings
        if flag == f"--{action.dest.replace('_', '-')}"
    }

    def flag_of(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        if name not in flags or (value is None and "_" not in name):
            return match[0]
        if value == "False":
            return f"no {flags[name]}"
        return flags[name] + ("" if value is None or value == "True" else " " + value.strip("'"))

    # A bare word is taken for an option only if it has an underscore, and never inside a path or quotes.
    pattern = r"(?<![\w./'\"-])(?P<name>[a-z_]+)(?:=(?P<value>'[\w.-]+'|\d[\w.-]*\w|\d|True|False))?(?![\w/'\"=(-])"
    return re.sub(pattern, flag_of, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    with terminal() as out:
        parsed = _parse(arguments)
        status = _act(parsed)
    return exit_status(status, out, output_is_the_result=parsed.command in ("steer", "generate", "report"))


def _act(parsed: argparse.Namespace) -> int:
    """Do what was asked for; an error is said in a line."""
    try:
        # A table is drawn by rich on a terminal, at the end of a run.
        drawn = parsed.command in ("rank", "align", "report") and is_terminal(sys.stdout)
        tables = ("rich",) * drawn
        require_for(parsed.command, *tables, *("tensorboard",) * getattr(parsed, "tensorboard", False))
        from mopl._hub import trusting

        with trusting(getattr(parsed, "trust_remote_code", False)):
            return parsed.act(parsed)
    except KeyboardInterrupt:
        say("mopl: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__name__ == "RunInterrupted":
            say(f"mopl: {error}", file=sys.stderr)
            return 130
        if getattr(parsed, "debug", False):
            sys.excepthook = print_traceback
            raise
        where = f" (process {_process()})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        text = as_flags(one_line(str(error)) or type(error).__name__, parsed.command)
        # A fault of ours, not of the input, should not look like advice.
        expected = isinstance(error, (ValueError, OSError, ImportError, ArithmeticError, NotImplementedError))
        say(f"mopl {parsed.command}{where}: {'' if expected else f'{type(error).__name__}: '}{text}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
