"""What a run knows of a model that it exports: method, settings, data, front. Names and figures, no paths."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from mopl._extras import require
from mopl._hub import public_name
from mopl.experiments.run import BASE, LanguageModelRun
from mopl.language_models.model_card import ModelFacts
from mopl.pareto import Front
from mopl.report import Metric, plot_front
from mopl.report.markdown import front_as_markdown
from mopl.report.records import data_name

_VERSIONS = ("mopl", "torch", "transformers", "peft", "trl")


def model_facts(
    run: LanguageModelRun,
    method: str | None = None,
    *,
    weights: Sequence[float] | None = None,
    kl_weight: float | None = None,
) -> ModelFacts:
    """Return what the card of a model of a finished run says.

    Args:
        run: The run.
        method: One of its methods; by default the only one, or the main one.
        weights: Of one trade-off, (m,), where the model itself does not say them.
        kl_weight: α of one trade-off, of a run on rewards.

    Raises:
        FileNotFoundError: If the method has no front yet.
        ValueError: If the run has no such method.
    """
    method = run.check_method(method)
    fronts = {front.method: front for front in run.fronts()}
    front, base, metric = fronts[method], fronts.get(BASE), run.metric
    name = public_name(run.config.data)
    figures = f"{metric.describe()}. Measured on the held-out part of {data_name(front)}, seed {front.seed}."
    if run.conditions_on_kl:
        figures += f" At the KL weight {run.config.kl_weight[0]:g}."
    picture = functools.partial(_draw, [front] if base is None else [base, front], metric) if pictured() else None
    if picture and any(point.scale != 1 for point in front.points):
        figures += (
            " Faint points of the picture: the same model moved towards the one before training, or away from it."
        )
    return ModelFacts(
        method=method,
        training=_settings(run, front, method),
        data=data_name(front),
        dataset=name if name is not None and "/" in name else None,
        front=front_as_markdown(front, metric, base),
        figures=figures,
        picture=picture,
        objectives=run.objectives,
        weights=None if weights is None else tuple(weights),
        kl_weight=run.config.kl_weight[0] if kl_weight is None and run.conditions_on_kl else kl_weight,
    )


def pictured() -> bool:
    """Return whether a front can be drawn here; without matplotlib a card has its table alone."""
    try:
        require("matplotlib")
    except ImportError:
        return False
    return True


def _draw(fronts: Sequence[Front], metric: Metric, path: Path) -> None:
    plot_front(fronts, path, metric=metric, notes=tuple(note for front in fronts for note in front.notes))


def _settings(run: LanguageModelRun, front: Front, method: str) -> Mapping[str, str]:
    """Return what was set, in the words of a person, in the order of a card."""
    config = run.config
    found = {"objectives": ", ".join(run.objectives), **run.training_settings(method)}
    if front.steps:
        done, kept = (sorted(set(front.steps[key])) for key in ("done", "kept"))
        found["steps"] = _span(done) + ("" if kept == done else f", of which {_span(kept)} kept by validation")
    elif config.steps is not None:
        found["steps"] = str(config.steps)
    found["learning rate"] = f"{config.learning_rate:g}, {config.schedule}"
    if config.lora_rank:
        options = [name.removeprefix("lora_").replace("_", " ") for name in config.adapter_options]
        found["LoRA"] = ", ".join([f"rank {config.lora_rank}, alpha {config.lora_alpha:g}", *options])
    found["parameters trained"] = f"{front.parameters:,}"
    found["seed"] = str(config.seed)
    versions = run.record.get("versions", {})
    found["versions"] = ", ".join(f"{name} {versions[name]}" for name in _VERSIONS if name in versions)
    return found


def _span(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
