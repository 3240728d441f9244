"""What a step of each conditioning of `mopl align` costs: time, memory, trained parameters.

    python -m bench.who_wins_language_costs [--json FILE] [--model smollm2-135m]

Random weights in the shape of a real model, one batch of lists each of which has its own weights, forward and backward
pass of the training loss. Variants take turns; seconds are medians of processor time, memory is the peak of the
allocator during loss and backward beyond what was there before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.measuring import about
from bench.training_step import MODELS, Problem, Variant, optimizer_of, peak_memory
from mopl._files import write_file
from mopl.alignment import AlignConfig, tuned
from mopl.alignment.methods import AlignSource, scored_for
from mopl.conditioning.samplers import dirichlet_weights, fixed
from mopl.experiments.cos_dpo import scalarized_loss
from mopl.experiments.methods import Method
from mopl.experiments.response_loss import ResponseLoss
from mopl.language_models import models
from mopl.language_models.collate import ListCollator
from mopl.language_models.head import fuse
from mopl.language_models.scoring import ListScores
from mopl.language_models.tokenization import TokenizedList

NAMES = ("first", "second")
KINDS = ("lora-mixture", "hyper-prompt", "adapters")  # the last: one model of a rival, without weights


def measure(model: str, lists: int, items: int, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return seconds, MiB and trained parameters of each kind."""
    problem = Problem(model, lists, items, tokens, tokens)
    labels = np.eye(2, items, dtype=np.float32)
    data = [
        TokenizedList(prompt, tuple(responses), labels, number)
        for number, (prompt, responses) in enumerate(problem.tokens())
    ]
    reference = ListScores(data, torch.from_numpy(problem.reference_scores()).flatten().float())
    variants, found = {}, {}
    for kind in KINDS:
        made = _model(problem, kind)
        count = sum(p.numel() for p in made.parameters() if p.requires_grad)
        variants[kind] = _step(made, data, reference)
        found[kind] = {"trained": count, "mib": round(peak_memory(variants[kind]), 1)}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(rounds + 1):  # the first warms up
        for kind, variant in variants.items():
            began = time.process_time()
            variant()
            if turn:
                seconds[kind].append(time.process_time() - began)
    for kind, each in seconds.items():
        found[kind]["seconds"] = round(statistics.median(each), 3)
    return found


def _model(problem: Problem, kind: str) -> Any:
    base = fuse(problem.build_model().eval().requires_grad_(False))
    config = AlignConfig("model", "data", conditioning="hyper-prompt" if kind == "adapters" else kind)  # type: ignore[arg-type]
    torch.manual_seed(0)
    if kind == "adapters":
        return models.with_adapter(base, config)
    return tuned.new_model(base, config, NAMES, Method(conditioned=True))


def _step(model: Any, data: list[TokenizedList], reference: ListScores) -> Variant:
    loss, count = ResponseLoss(labels=("l1", "l1")), len(data)
    source = AlignSource(
        data, count, ListCollator(), seed=0, weights=dirichlet_weights(2, count, concentration=0.5, per="list", seed=0),
        beta=fixed(torch.full((2,), 0.1), count), reference=reference,
    )  # fmt: skip
    step_loss, batch = scalarized_loss(scored_for(loss), loss, NAMES, common_beta=0.1), source(0)

    def loss_and_backward() -> torch.Tensor:
        value, _ = step_loss(model, batch, 0)
        value.backward()
        return value.detach()

    return Variant(loss_and_backward, optimizer_of(model), sum(len(item.responses) for item in data))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--model", choices=list(MODELS), default="smollm2-135m")
    parser.add_argument("--lists", type=int, default=4)
    parser.add_argument("--items", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32, help="most tokens of a prompt, and of a response")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(given.model, given.lists, given.items, given.tokens, given.rounds)
    print(table(found))
    if given.json:
        problem = {name: getattr(given, name) for name in ("model", "lists", "items", "tokens", "rounds")}
        write_file(given.json, json.dumps({**about(), "problem": problem, "results": found}, indent=1) + "\n")


def table(found: dict[str, dict[str, float]]) -> str:
    """Return the figures as a Markdown table."""
    lines = ["| | milliseconds of a step | MiB beyond the model | trained parameters |", "|---|---|---|---|"]
    for kind, each in found.items():
        lines.append(f"| {kind} | {1e3 * each['seconds']:.0f} | {each['mib']:.1f} | {each['trained']:,} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
