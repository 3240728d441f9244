"""`mopl align`: the options and what is done with them. Nothing heavy is imported until a run begins.

The names of the options are the fields of `AlignConfig`, which also holds the defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mopl._terminal import say, shell
from mopl.clp import options as on_rewards

METHODS = ("weight-cos-dpo", "temperature-cos-dpo", "dpo-ls", "dpo-soup", "mo-dpo")
LOSSES = ("listnet", "plackett-luce", "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop",
          "dpop", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")  # fmt: skip
DEMO_FOLDER = "runs/align-demo-data"
DEMO_RUN = "runs/align-demo"
HELP = "fine-tune a language model for every trade-off, compare it with baselines, report"

EXAMPLES = """
data are JSON lines {"prompt": ..., "responses": [...], "labels": {"helpful": [...], "harmless": [...]}}, or a public
format: PKU-SafeRLHF, UltraFeedback, HelpSteer, Nectar, preference pairs of TRL, and others.

examples:
  mopl align --demo                                       a small model and conflicting rewards, on two cores
  mopl align --model MODEL --data pairs.jsonl             every objective that the data has
  mopl align --model MODEL --data PKU-Alignment/PKU-SafeRLHF --objectives helpful harmless
  mopl align --model MODEL --data lists.jsonl --method all --run runs/chat
  mopl align --model MODEL --data prompts.jsonl --method clp --rewards sentiment brevity    no labels, but rewards
  mopl align --run runs/chat --resume                     continue after Ctrl-C or a crash, bit for bit
  accelerate launch --num_processes 2 -m mopl.cli align --model MODEL --data lists.jsonl
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add `mopl align` to the commands and return its parser."""
    parser = commands.add_parser(
        "align", help=HELP, description=HELP, epilog=EXAMPLES, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for add in (_run_options, _data_options, _model_options, _method_options, _training_options, _evaluation_options):
        add(parser)
    on_rewards.add_options(parser)
    parser.set_defaults(act=run)
    return parser


def _run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--demo", action="store_true", help="make model and data of the demo; other options still "
                       "count, and the same command again goes on where it stopped")  # fmt: skip
    group.add_argument("--run", metavar="DIR", help="run directory (default: runs/align-DATA-METHOD-N; on rewards "
                       "runs/METHOD-DATA-N)")  # fmt: skip
    group.add_argument("--resume", action="store_true", help="continue the run in --run")
    group.add_argument("--overwrite", action="store_true", help="replace the run in --run")
    group.add_argument("--seed", type=int, help="seed of the training (default: 0)")
    group.add_argument("--device", choices=("auto", "cpu"), help="auto takes a GPU if there is one (default: auto)")
    group.add_argument("--log-every", type=int, metavar="STEPS", help="steps between log lines (default: 10)")
    group.add_argument("--checkpoint-every", type=int, metavar="STEPS", help="steps between checkpoints (default: 100)")
    group.add_argument("--tensorboard", action="store_true", help="also write TensorBoard files")


def _data_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="DATA", help="a file, a directory, or a name on the hub")
    group.add_argument("--format", help="of the data (default: auto, by its columns)")
    group.add_argument("--split", help="of a directory or of the hub (default: train)")
    group.add_argument("--limit", type=int, metavar="ROWS", help="read no more rows than this (default: all)")
    group.add_argument("--objectives", nargs="+", metavar="NAME", help="which labels, in the order of the weights "
                       "(default: all)")  # fmt: skip
    group.add_argument("--on-error", choices=("raise", "skip"), help="what to do with unusable rows (default: raise)")
    group.add_argument("--held-out", type=float, metavar="SHARE", help="of the prompts, to evaluate on (default: 0.1)")
    group.add_argument("--data-seed", type=int, metavar="SEED", help="of that split (default: 0)")
    group.add_argument("--template", choices=("auto", "chat", "plain"), help="how prompts become text (default: auto: "
                       "chat if the tokenizer has a template)")  # fmt: skip
    group.add_argument("--max-length", type=int, metavar="TOKENS", help="of prompt and response (default: 1024)")
    group.add_argument("--min-prompt", type=int, metavar="TOKENS", help="what a longer prompt is never cut below "
                       "(default: a quarter of --max-length)")  # fmt: skip


def _model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="MODEL", help="a causal language model: a directory (of a model, or of a "
                       "PEFT adapter, from whose model training starts), or a name on the hub")  # fmt: skip
    group.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with a model; it "
                       "is no setting of a run, so --resume needs it again")  # fmt: skip
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"),
                       help="of the frozen model (default: auto, as it is stored)")  # fmt: skip
    group.add_argument("--attention", metavar="NAME", help="attn_implementation of transformers (default: its choice)")
    group.add_argument("--conditioning", choices=("hyper-prompt", "lora-mixture", "text"), help="how weights enter: "
                       "virtual tokens, a mixture of adapters, or words (default: hyper-prompt)")  # fmt: skip
    group.add_argument("--positions", choices=("hf", "paper"), help="positions of virtual tokens (default: hf)")
    group.add_argument("--virtual-tokens", type=int, metavar="K", help="(default: 8)")
    group.add_argument("--prompt-rank", type=int, metavar="R", help="rank of the prompt's mask (default: 4)")
    group.add_argument("--prompt-text", metavar="WORDS", help="whose embeddings virtual tokens start at (default: "
                       "small random vectors)")  # fmt: skip
    group.add_argument("--lora-rank", type=int, metavar="R", help="0 for none (default: 4)")
    group.add_argument("--lora-alpha", type=float, help="(default: 8)")
    group.add_argument("--lora-targets", nargs="+", metavar="MODULE", help="(default: all-linear)")


def _method_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("method")
    group.add_argument("--method", choices=(*METHODS, "all", *on_rewards.METHODS), help="what to train; on "
                       f"preferences: {', '.join(METHODS)}, all; on rewards: {', '.join(on_rewards.METHODS)} "
                       "(default: weight-cos-dpo)", metavar="METHOD")  # fmt: skip
    group.add_argument("--loss", choices=LOSSES, metavar="LOSS", help="listnet (which is DPO on pairs), plackett-luce, "
                       f"or for pairs {', '.join(LOSSES[2:])} (default: listnet)")  # fmt: skip
    group.add_argument("--labels", nargs="+", choices=("auto", "l1", "softmax"), help="how ListNet turns labels "
                       "into targets, for all or each; auto: l1 where all are 0 or 1 (default: auto)")  # fmt: skip
    group.add_argument("--label-temperature", nargs="+", type=float, metavar="T", help="what labels are divided by "
                       "before their softmax, for all or for each (default: 1)")  # fmt: skip
    group.add_argument("--partial", choices=("drop", "keep"), help="objectives that label a part of a list: leave "
                       "them out of it, or use that part (default: drop)")  # fmt: skip
    group.add_argument("--ties", choices=("breslow", "efron", "exact", "random"),
                       help="equal labels under Plackett-Luce (default: breslow)")  # fmt: skip
    group.add_argument("--last-group", choices=("charged", "free"),
                       help="responses of the lowest label under Plackett-Luce; free: they are unranked, as zeros of "
                       "a sparse label are (default: charged)")  # fmt: skip
    group.add_argument("--top-k", type=_optional_int, metavar="K", help="ranks that Plackett-Luce sees (default: all)")
    group.add_argument("--label-smoothing", type=float, metavar="RATE", help="of pair losses that have it (default: 0)")
    group.add_argument("--beta", nargs="+", type=float, help="one for all objectives, or one for each (default: 0.1)")
    group.add_argument("--beta-range", nargs=2, type=float, metavar=("LOW", "HIGH"),
                       help="box of temperature-cos-dpo, as factors of --beta (default: 0.67 1.5)")  # fmt: skip
    group.add_argument("--alpha", type=float, help="concentration of the Dirichlet weights (default: 0.5)")
    group.add_argument("--weights-per", choices=("list", "step"), help="draw weights for each list, or one vector a "
                       "step as in the paper (default: list)")  # fmt: skip
    group.add_argument("--penalty", type=float, help="factor of the cosine penalty (default: 0)")
    group.add_argument("--penalty-sign", choices=("as_printed", "cosmos"),
                       help="the paper prints one sign and describes the other (default: as_printed)")  # fmt: skip
    group.add_argument("--reference", metavar="HOW", help="self: computed in every step; precomputed: once; or another "
                       "model (default: auto: once if lists are seen more than once)")  # fmt: skip


def _training_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, help="updates of each model (default: 3 epochs, at least 100)")
    group.add_argument("--lists-per-batch", type=int, metavar="LISTS", help="lists of an update (default: 16)")
    group.add_argument("--accumulation", type=int, metavar="PARTS", help="parts of a batch, one after another; the "
                       "result does not depend on it (default: 1)")  # fmt: skip
    group.add_argument("--learning-rate", type=float, metavar="RATE", help="of the adapters (default: 0.0002)")
    group.add_argument("--prompt-learning-rate", type=float, metavar="RATE",
                       help="of the prompt (default: 10 times that)")  # fmt: skip
    group.add_argument("--weight-decay", type=float, help="decoupled (default: 0)")
    group.add_argument("--warmup", type=int, metavar="STEPS", help="linear warm-up (default: a tenth of the steps)")
    group.add_argument("--schedule", choices=("constant", "linear", "cosine"), help="(default: cosine)")
    group.add_argument("--gradient-clip", type=float, metavar="NORM", help="0 for none (default: 1)")
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory, about a third more time")
    group.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), help="(default: no)")
    group.add_argument("--packing", action="store_true", help="one row without padding; needs an attention that keeps "
                       "packed sequences apart")  # fmt: skip


def _evaluation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument("--points", type=int, help="size of the grid of weights (default: 11, 15, 20 for 2, 3, 4 "
                       "objectives, 11 above)")  # fmt: skip
    group.add_argument("--scales", nargs="*", type=float, metavar="C", help="distances from the reference that the "
                       "report shows besides 1 (default: 0.5 2)")  # fmt: skip
    group.add_argument("--reference-point", nargs="+", type=float, metavar="LOSS", help="of the hypervolume, one for "
                       "each objective (default: 1.1 / ln 2 times the loss of the untrained model)")  # fmt: skip
    group.add_argument("--bootstrap", type=int, metavar="SAMPLES", help="for intervals over lists, 0 for none "
                       "(default: 1000)")  # fmt: skip
    group.add_argument("--tokens-per-batch", type=int, metavar="TOKENS", help="outside training (default: 8192)")
    group.add_argument(
        "--samples", type=int, metavar="PROMPTS", help="answered at every point of the grid (default: 3)"
    )
    group.add_argument("--sample-tokens", type=int, metavar="TOKENS", help="most of an answer (default: 64)")


def _optional_int(text: str) -> int | None:
    return None if text == "all" else int(text)


def run(arguments: argparse.Namespace) -> int:
    """Run `mopl align` and print the table and what to do next."""
    given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(arguments).items()}
    if on_rewards.is_wanted(given):
        return on_rewards.run(given)
    from mopl.alignment.config import AlignConfig
    from mopl.alignment.recipe import align, check_resume
    from mopl.alignment.runs import metric_of, open_run, run_fronts
    from mopl.experiments.run_directory import read_run
    from mopl.report import print_table

    on_rewards.refuse_strangers(given, AlignConfig.__dataclass_fields__)
    settings = {name: v for name, v in given.items() if name in AlignConfig.__dataclass_fields__}
    where, resume = given.get("run"), given.get("resume", False)

    def tell(text: str) -> None:
        if _process() == 0:
            say(text)

    baselines: tuple[dict[str, Any], ...] = ()
    if given.get("demo"):
        made, baselines = _demo(tell)
        baselines = () if "method" in settings else baselines
        settings = {**made, **settings}
        # The demo needs no name and no --resume: called again, it goes on where it stopped.
        where = where or DEMO_RUN
        resume = resume or (not given.get("overwrite", False) and (Path(where) / "config.json").is_file())
    if resume and where is not None:
        config = check_resume(read_run(where), settings, Path(where))
    else:
        for name in ("model", "data"):
            if name not in settings and not resume:
                raise ValueError(f"--{name} is missing; pass --model and --data, or --demo")
        config = AlignConfig(**settings) if settings.get("model") and settings.get("data") else None
        if config is None:
            raise ValueError("--resume needs the run to continue; name it with --run")
    path = align(config, where, resume=resume, overwrite=given.get("overwrite", False), say=tell)
    if _process() == 0:
        opened = open_run(path)
        say()
        print_table(run_fronts(path), metric=metric_of(opened.config))
        say("", f"{path}/report.html shows every trade-off; {path}/front.png and table.txt are the same in short")
        say(generate_hint(path, opened.objectives))
    if baselines:
        _baselines(path, AlignConfig(**settings), baselines, tell)
    return 0


def _baselines(path: Path, config: Any, baselines: tuple[dict[str, Any], ...], tell: Any) -> None:
    """Train the demo's baselines beside its run, each in a folder of its own, and compare them with it."""
    from mopl.alignment.recipe import align
    from mopl.alignment.runs import compare

    runs = [path]
    for changes in baselines:
        other = path.with_name(f"{path.name}-{changes['method']}")
        found = (other / "config.json").is_file()
        budget = ", ".join(f"{name} {value}" for name, value in changes.items() if name != "method")
        tell("")
        tell(f"baseline {changes['method']} on a smaller budget: {budget}")
        runs.append(align(dataclasses.replace(config, **changes), other, resume=found, say=tell))
    if _process() == 0:
        say()
        compare(runs, png=path / "comparison.png", html=path / "comparison.html")
        say("", f"{path}/comparison.html shows them together")


def generate_hint(path: Path, objectives: Sequence[str]) -> str:
    """Return a command that answers a prompt with the model of a run, and the names of its objectives."""
    command = shell("mopl", "generate", path, "--weights", *example_weights(len(objectives)).split(), "PROMPT")
    return f"{command}    ({', '.join(objectives)})"


def example_weights(objectives: int) -> str:
    """Return weights for a hint: a half for the first objective, the rest shared."""
    if objectives == 1:
        return "1"
    rest = [round(0.5 / (objectives - 1), 2) for _ in range(objectives - 2)]
    return " ".join(f"{w:g}" for w in (0.5, *rest, round(0.5 - sum(rest), 2)))


def _demo(tell: Any) -> tuple[dict[str, Any], tuple[dict[str, Any], ...]]:
    """Return the settings of the demo and of its baselines; its model and data are made where they are not there."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--demo makes its model and data with one process; run it once without the launcher")
    demo = importlib.import_module("mopl.alignment.demo")
    made = demo.prepare(Path(DEMO_FOLDER), tell)
    settings = {
        **made.settings, "model": str(made.model), "data": str(made.data), "objectives": tuple(made.objectives),
    }  # fmt: skip
    return settings, made.baselines


def _process() -> int:
    """Return this process's number under a launcher, 0 alone."""
    return int(os.environ.get("RANK", "0"))
