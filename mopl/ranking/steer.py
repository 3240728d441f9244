"""Control after training: the figures and scores of a finished run for any trade-off and any distance from the base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mopl._counted import counted, there_are
from mopl._files import write_file
from mopl._renamed import renamed_keywords
from mopl.conditioning import check_weights
from mopl.experiments.methods import TABLE
from mopl.ranking.data import RankingData
from mopl.ranking.evaluate import evaluate
from mopl.ranking.methods import BasePolicy
from mopl.ranking.runs import RankingRun, open_run


@renamed_keywords(temperature="beta")
def steer(
    run: str | Path,
    weights: Sequence[float],
    *,
    scale: float = 1.0,
    beta: Sequence[float] | None = None,
    method: str | None = None,
    split: str = "test",
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Evaluate a finished run at one trade-off, without training.

    Args:
        run: The run directory.
        weights: w, one for each objective, on the simplex.
        scale: c of equation (14): above 1 closer to the base model, below 1 further away.
        beta: β for a model of temperature-cos-dpo; the run's by default.
        method: Which method of an `all` run.
        split: `"train"`, `"valid"` or `"test"`.
        output: A file for the scores, one line an item in the order of the data: query id, item from 1, score.

    Returns:
        `rows`: the main and auxiliary figures of the base model, of the trade-off as trained, and at `scale`; with
        the names they belong to.

    Raises:
        FileNotFoundError: If there is no finished run.
        ValueError: If weights, scale or β do not fit the run.
    """
    record = RankingRun.read(run)  # what is wrong is said before any data are read
    objectives = record.objectives
    if len(weights) != len(objectives):
        raise ValueError(
            f"{there_are(len(weights), 'weight')} but {counted(len(objectives), 'objective')}; pass one for each of "
            f"{', '.join(objectives)}, in this order"
        )
    w = check_weights(weights)
    if not scale > 0:
        raise ValueError(f"scale is {scale:g} but must be positive: above 1 is closer to the base model")
    method = record.check_method(method)
    of_lists = record.config.betas(len(objectives)) if beta is None else tuple(beta)
    if len(of_lists) != len(objectives) or any(not b > 0 for b in of_lists):
        raise ValueError(
            f"beta is {' '.join(f'{b:g}' for b in of_lists)} but must be one positive number for each of "
            f"{', '.join(objectives)}"
        )
    opened = open_run(run)
    device = torch.device("cuda" if torch.cuda.is_available() and opened.config.device == "auto" else "cpu")
    policy = opened.policy(method, device)
    data, reference = opened.splits[split], opened.reference[split]
    options: dict[str, Any] = {
        "measure": opened.config.measure, "list_loss": opened.config.list_loss, "beta": of_lists, "device": device,
    }  # fmt: skip
    (base,) = evaluate(BasePolicy(), data, reference, None, **options)
    scales = (1.0,) if scale == 1.0 else (1.0, scale)
    asked = TABLE[method].takes_beta or beta is not None  # a policy that does not take β says so
    found = evaluate(policy, data, reference, w[None], conditioned_on_beta=asked, scales=scales, **options)
    shown = " ".join(f"{x:.4g}" for x in w.tolist())
    rows = {"base model": base} | {f"w = {shown}, c = {c:g}": each for c, each in zip(scales, found, strict=True)}
    if output is not None:
        write_file(output, _scores_text(data, found[-1].scores[0]))
    points = {
        name: {"main": float(each.main.nanmean()), "auxiliary": each.auxiliary.nanmean(0)[0].tolist()}
        for name, each in rows.items()
    }
    return {
        "run": str(run), "method": method, "split": split,
        "metric": opened.config.measure.metric().name,
        "main": data.main.name, "objectives": list(objectives), "weights": w.tolist(), "scale": scale,
        "beta": list(of_lists), "temperature": list(of_lists),  # its first name, for who reads it
        "rows": points,
    }  # fmt: skip


def _scores_text(data: RankingData, scores: torch.Tensor) -> str:
    """Return scores (N,) as lines `query item score`, with every digit of float32."""
    owner, first = data.owner, data.offsets[:-1][data.owner]
    place = torch.arange(data.num_items) - first + 1
    ids = data.query_ids[owner].tolist()
    lines = zip(ids, place.tolist(), scores.tolist(), strict=True)
    return "query\titem\tscore\n" + "".join(f"{query}\t{item}\t{score:.9g}\n" for query, item, score in lines)
