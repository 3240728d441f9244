"""What an alignment run trains on top of a frozen language model, and its files.

| model                 | what is trained                                                     | takes weights by |
|-----------------------|---------------------------------------------------------------------|------------------|
| COS-DPO, hyper-prompt | LoRA adapters, P and both networks of the `HyperPrompt`             | virtual tokens   |
| COS-DPO, lora-mixture | m sets of LoRA adapters                                             | their mixture    |
| COS-DPO, text         | LoRA adapters                                                       | words            |
| baselines             | LoRA adapters and P: ordinary prompt tuning, as in section 4.2      | nothing          |

The prompt of a baseline is a `HyperPrompt` at its start, where its mask is 1 for every w, with both networks frozen.
So all models of one kind have the same parameters, and a soup can average them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mopl._files import write_files
from mopl._renamed import renamed_keywords
from mopl.alignment.config import AlignConfig
from mopl.conditioning import (
    HyperPrompt,
    HyperPromptModel,
    LoraMixture,
    TextPrompt,
    TextPromptModel,
    TuningRecord,
    WeightedModel,
)
from mopl.conditioning.saved_models import CONFIG_FILE
from mopl.experiments.methods import Method
from mopl.language_models.models import lora_config, quiet, with_adapter

TEXT_TEMPLATE = "[{weights}]\n"
TEXT_TEMPLATE_WITH_BETA = "[{weights}; temperatures {temperatures}]\n"


def new_model(
    base: nn.Module, config: AlignConfig, objectives: tuple[str, ...], method: Method, start: Sequence[int] = ()
) -> nn.Module:
    """Return an untrained model around `base`, which computes what `base` alone does but for the start of its prompt.

    Args:
        base: A fused causal language model; it is frozen, and gets LoRA layers until `release` takes them out.
        config: Settings of the run.
        objectives: Names of the m objectives.
        method: What it is to learn: every trade-off, for every β or one, or a single trade-off.
        start: Tokens whose embeddings the virtual tokens start at; small random vectors without any.

    Returns:
        A `HyperPromptModel`; a `LoraMixture` for a conditioned model that mixes adapters; or a PEFT model where it
        takes its weights in words.
    """
    model = base.requires_grad_(False)
    record = tuning_record(config, objectives, method)
    if config.lora_rank:
        if method.conditioned and config.conditioning == "lora-mixture":
            with quiet():
                return LoraMixture(base, len(objectives), config=lora_config(config), record=record)
        model = with_adapter(base, config)
    if method.conditioned and config.conditioning == "text":
        return model
    hidden = base.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    prompt = HyperPrompt(
        len(objectives), config.virtual_tokens, config.prompt_rank, hidden, takes_beta=method.takes_beta
    )
    if not method.conditioned:
        for network in (prompt.left, prompt.right):
            network.requires_grad_(False)
    wrapped = HyperPromptModel(model, prompt, record=record, positions=config.positions)
    if start:
        wrapped.set_prefix_from_tokens(start)
    return wrapped


def tuning_record(config: AlignConfig, objectives: tuple[str, ...], method: Method) -> TuningRecord:
    """Return what `mopl.json` says about a model of a run: objectives, reference, β, concentration."""
    beta: Any = None if config.teachers else config.betas(len(objectives))  # labels have no part in what teachers teach
    if method.takes_beta:
        beta = tuple(tuple(factor * b for b in beta) for factor in config.beta_range)
    reference = "self" if config.reference in ("auto", "self", "precomputed") else config.reference
    return TuningRecord(objectives, reference, beta, config.concentration if method.conditioned else None)


@renamed_keywords(temperature="takes_beta")
def text_prompt(objectives: tuple[str, ...], *, takes_beta: bool = False) -> TextPrompt:
    """Return how weights are written into a prompt under `conditioning="text"`."""
    return TextPrompt(objectives, TEXT_TEMPLATE_WITH_BETA if takes_beta else TEXT_TEMPLATE)


def prompt_of(config: AlignConfig, method: Method, objectives: tuple[str, ...]) -> TextPrompt | None:
    """Return how a method's model reads its weights in words, or None where it takes them otherwise, or none."""
    if not method.conditioned or config.conditioning != "text":
        return None
    return text_prompt(objectives, takes_beta=method.takes_beta)


def save_model(model: Any, folder: Path, config: AlignConfig, objectives: tuple[str, ...], method: Method) -> None:
    """Write what was trained into a folder, never the frozen model."""
    if isinstance(model, WeightedModel):
        model.save_pretrained(folder)
        return
    content = {
        "kind": TextPromptModel.KIND, **tuning_record(config, objectives, method).to_dict(), "base_model": config.model,
        "adapter": "default", "template": text_prompt(objectives, takes_beta=method.takes_beta).template,
    }  # fmt: skip

    def fill(place: Path) -> None:
        model.save_pretrained(str(place))
        (place / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    write_files(folder, fill, last=CONFIG_FILE)
