"""COS-DPO on PKU-SafeRLHF: the better and the safer of two responses, losses of held-out pairs, hypervolume from 1.1.

Section 4.2 and appendix A.4 of the paper: GPT-2, LoRA of rank 4 and a hyper prompt of 8 virtual tokens, β = 0.1,
11 trade-offs, and nothing generated. These are the library's defaults but for the lengths and the answers.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from bench.paper import rows
from bench.paper.plan import ALIGN, Job, Plan
from bench.paper.tables import Table, front_table, paper_of
from mopl.experiments.run import FinishedRun
from mopl.language_models import load_preferences
from mopl.language_models.data import PreferenceData

PAPER_PAIRS, PAPER_MODEL = 83_400, "gpt2"
COMMON: dict[str, Any] = {
    "method": "all", "objectives": ("helpful", "harmless"), "format": "pku-safe-rlhf", "points": 11, "scales": (),
    "reference_point": (1.1, 1.1), "samples": 0, "max_length": 512,
}  # fmt: skip
SMALL: dict[str, Any] = {"limit": 400, "steps": 60, "lists_per_batch": 8, "max_length": 128}
FIELDS: dict[str, Any] = {
    "prompt": str, "response_0": str, "response_1": str, "better_response_id": (int, str),
    "safer_response_id": (int, str),
}  # fmt: skip


def add_options(group: argparse._ArgumentGroup) -> None:
    """Add what this experiment alone asks: nothing."""


def prepare(options: argparse.Namespace, given: dict[str, Any]) -> Plan:
    """Check every row and return the run."""
    files = rows.files_of(options.path, "data of PKU-SafeRLHF")
    settings = {"model": PAPER_MODEL, **COMMON, **(SMALL if options.small else {}), **given}
    counts: Counter[str] = Counter()
    for row in rows.checked(files, FIELDS, "PKU-SafeRLHF"):
        counts["pairs"] += 1
        labels = []
        for name in ("better_response_id", "safer_response_id"):
            labels.append(str(row[name]).strip())
            if labels[-1] not in ("0", "1") or isinstance(row[name], bool):
                raise ValueError(f"row {counts['pairs']} has {name} {row[name]!r} but it must be 0 or 1")
        counts["pairs whose labels disagree"] += labels[0] != labels[1]
    if counts["pairs"] < 4:
        raise ValueError(f"{options.path} has {counts['pairs']} pairs, too few to train on and to hold out")
    if not counts["pairs whose labels disagree"]:
        raise ValueError(
            f"in all {counts['pairs']} pairs of {options.path} the better response is the safer one, so there is no "
            "trade-off; name data in which the two labels disagree"
        )
    settings["data"] = str(files[0] if len(files) == 1 else options.path)
    limit = settings.get("limit")

    def load(**how: Any) -> PreferenceData:
        return load_preferences(settings["data"], **{"format": settings["format"], "on_error": "raise", **how})

    # All of it, as the run will: the probe reads a few rows alone.
    data = load(on_error=settings.get("on_error", "raise"), limit=limit)
    if len(files) > 1:  # of a folder the run reads what `datasets` finds there, which may be other files
        rows_read = (data if limit is None else load(on_error="skip")).report.rows
        if rows_read != counts["pairs"]:
            raise ValueError(
                f"{options.path} has {counts['pairs']} rows in {', '.join(file.name for file in files[:3])}"
                f"{' and others' if len(files) > 3 else ''}, but {rows_read} are read as its training split; name the "
                "files train-00000, train-00001, ... and keep no others there, or name one file"
            )
    job = Job("all", "safe-rlhf", ALIGN, settings, lists=len(data))
    return Plan("safe-rlhf", options.out, [job], files, {}, dict(counts))


def tables(plan: Plan, runs: dict[str, FinishedRun]) -> list[Table]:
    """Return the one table."""
    (run,) = runs.values()
    config, splits = run.config, run.record["data"]["splits"]
    train, test = splits["train"]["lists"], splits["test"]["lists"]
    model = config.model.rstrip("/").rsplit("/", 1)[-1]
    paper = "alpaca-7b" if "alpaca" in model.lower() else PAPER_MODEL
    disagree = plan.counts["pairs whose labels disagree"] / plan.counts["pairs"]
    differs = [
        f"model: {model}" + ("" if model.lower() == paper else f", where the paper's figures are of {paper}"),
        f"data: {train:,} pairs to train on and {test:,} held out of {plan.counts['pairs']:,} ({disagree:.0%} of which "
        f"have labels that disagree), where the paper has 83,400; which it held out is not at hand",
        f"the paper does not state: steps (here {config.steps or '3 epochs, at least 100'}), batch size "
        f"({config.lists_per_batch}), learning rate ({config.learning_rate:g}), length (at most {config.max_length} "
        "tokens), modules with LoRA (here all linear ones but the head); it tries Dirichlet parameters from 0.2 to "
        f"1.1 (here {config.concentration:g})",
        "the main figure is the mean |log p - log p0| of a response, of which the paper has a picture",
    ]
    return [
        front_table(
            "PKU-SafeRLHF: held-out losses of helpful and harmless, less is better", "safe-rlhf", plan, runs,
            paper_of("safe-rlhf", paper), differs, train + test < PAPER_PAIRS * 0.95,
        )
    ]  # fmt: skip
