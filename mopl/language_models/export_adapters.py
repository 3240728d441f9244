"""A mixture of adapters as plain LoRA adapters for servers: one for each objective, and the scale of adapter i is w_i.

    h = W x + Σ_i w_i B_i A_i x

is what a server computes that runs several adapters in a request, each with a scale, and what a `LoraMixture` computes:
so the trade-off is chosen by the request. Whatever gives an adapter another factor (lora_alpha, rsLoRA, patterns, the
KL weight) is in A_i here, ranks are filled up with zeros to the largest one, and the scale of each file is 1.

    DIR/README.md            what it is and how to ask for a trade-off; beside it front.png, if there is a front
    DIR/mopl.json            objectives, and the folders of their adapters in that order
    DIR/<objective>/         adapter_config.json, adapter_model.safetensors
    DIR/w=0.7,0.3/           trade-offs as one adapter each, for servers that take one adapter in a request

No file names a place of this machine: a base model that is a folder here has no name there.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopl import __version__
from mopl._files import write_folder
from mopl._hub import public_name
from mopl._terminal import Progress, progress
from mopl.conditioning import (
    HyperPromptModel,
    LoraMixture,
    ParameterMixture,
    TextPromptModel,
    check_weights,
    weights_name,
)
from mopl.conditioning.adapted import lora_layers
from mopl.conditioning.adapter_files import KIND
from mopl.conditioning.parameter_mixture import write_adapter
from mopl.conditioning.references import OWN_REFERENCE
from mopl.conditioning.saved_models import CONFIG_FILE, base_of_adapter, load_adapters
from mopl.language_models._export_check import TOLERANCE, compare, logits_of
from mopl.language_models.export import check_free
from mopl.language_models.head import unfuse
from mopl.language_models.model_card import Exported, ModelFacts, write_card

ONE = "write one trade-off, as a plain model: mopl export --weights"
ALL = "train with --conditioning lora-mixture, whose adapters are for every trade-off"
# Largest ‖difference‖ of logits, of their own spread: the same products in another order, whose rounding adds up over
# the layers, to 6e-6 in 30 layers of float32. What each layer adds is compared by itself, closer.
SAME = {torch.float64: 1e-6, torch.float32: 1e-4}
IN_A_LAYER = 1e-5  # of what the mixture's own adapters add; the factors are rounded once, in float32
_ASKED = 3  # trade-offs at which the sum of the adapters is compared
_LONGEST = 80  # bytes of a folder's name; file systems take 255
_TAKEN = ("readme.md", "front.png", "mopl.json")
# What names a device on Windows, whatever follows a dot: the digits of 1 to 9 are those of superscripts, too.
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789¹²³")}


def export_adapters(
    mixture: Any,
    directory: str | os.PathLike[str],
    *,
    kl_weight: float | None = None,
    grid: Tensor | Sequence[Sequence[float]] = (),
    base_model: str | None = None,
    facts: ModelFacts | None = None,
    show_progress: bool = False,
) -> Path:
    """Write the adapters of a mixture into a new directory, whole or not at all, and compare them with the mixture.

    Args:
        mixture: A `LoraMixture`. It is not changed.
        directory: A path where nothing is, or an empty directory.
        kl_weight: α, of a mixture whose coefficients depend on it; it is in the factors, and in `mopl.json`.
        grid: (n, m), trade-offs that are also written as one adapter each, under names such as `w=0.7,0.3`.
        base_model: Name of the base model, if it is not the one that the model inside has.
        facts: What the model card says besides: method, data, front, picture.
        show_progress: Show on standard error how far it is.

    Returns:
        The directory.

    Raises:
        FileExistsError: If something is in the way.
        ValueError: If the model is no mixture of LoRA adapters that is linear in the weights, or what was written is
            not the mixture; the message says what can be done instead.
    """
    folder = check_free(directory)
    check_mixture(mixture)
    names = mixture.record.objectives
    places = folder_names(names)
    source, trade_offs = base_model or getattr(mixture, "name_or_path", "") or None, _trade_offs(grid, len(names))
    base = public_name(source)
    if source is not None and base_of_adapter(source) is not None:
        raise ValueError(
            f"the model started from {source}, itself a PEFT adapter, and the base of adapters must be a plain model; "
            f"{ONE}"
        )
    record = {
        "kind": KIND,
        "mopl": __version__,
        **mixture.record.to_dict(),
        "adapters": places,
        "base_model": base,
        "kl_weight": None if kl_weight is None else float(kl_weight),
    }
    if record["reference"] not in OWN_REFERENCE:
        record["reference"] = public_name(record["reference"]) or "another model"
    made = mixture.adapters_by_objective(kl_weight)
    exported = Exported(
        form="adapters", objectives=names, base=source, kl_weight=record["kl_weight"], places=places,
        grid=[weights_name(row) for row in trade_offs], beta_trained=mixture.record.beta,
    )  # fmt: skip

    def fill(path: Path) -> None:
        configs = []
        with progress("writing adapters", len(places) + len(trade_offs), "adapters", show=show_progress) as shown:
            for name, make in zip(places, made, strict=True):
                configs.append(_write(path / name, make(), base))
                shown.update(1)
            for weights in trade_offs:
                configs.append(_write(path / weights_name(weights), mixture.adapter_at(weights, kl_weight), base))
                shown.update(1)
        steps = len(places) + _ASKED + len(trade_offs)
        with progress("comparing them with the mixture", steps, "comparisons", show=show_progress) as shown:
            _check_written(path, mixture, places, trade_offs, kl_weight, shown)
        (path / CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        ranks = {"rank": configs[0].r, "grid_rank": configs[-1].r, "lora_bias": any(c.lora_bias for c in configs)}
        write_card(path, dataclasses.replace(exported, **ranks), facts)

    write_folder(folder, fill, replace=False)
    return folder


def check_mixture(model: Any) -> None:
    """Raise a ValueError unless a model's weights are scales of LoRA adapters, with the form of export that it has."""
    if isinstance(model, LoraMixture):
        return
    if isinstance(model, HyperPromptModel):
        why = f"takes its weights by virtual tokens, so adapters alone cannot hold its trade-offs; {ONE}, or {ALL}"
    elif isinstance(model, TextPromptModel):
        why = (
            "has one adapter and reads its weights in words, so it needs no scales; write one trade-off, with a "
            "tokenizer that says it: mopl export --weights, with --kind adapter for its adapter alone"
        )
    elif isinstance(model, ParameterMixture):
        why = f"mixes whole parameters, of which there is no adapter of a rank; {ONE}, or {ALL}"
    else:
        why = f"has no adapter for each objective; {ONE}"
    raise ValueError(f"a {type(model).__name__} {why}")


def folder_names(objectives: Sequence[str]) -> list[str]:
    """Return a name for the folder of each objective: letters, digits, _ - and . of any language, no two alike.

    They are different in lower case, too, since some file systems know no other; and none is a device of Windows.
    """
    found: list[str] = []
    for name in objectives:
        safe = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", name))
        safe = safe.encode()[:_LONGEST].decode(errors="ignore").strip(".") or "objective"
        if safe.startswith("-") or safe.lower() in _TAKEN or safe.lower().partition(".")[0] in _DEVICES:
            safe = f"_{safe}"
        taken, number, one = {each.lower() for each in found}, 1, safe
        while one.lower() in taken:
            number += 1
            one = f"{safe}_{number}"
        found.append(one)
    return found


def _trade_offs(grid: Any, objectives: int) -> list[Tensor]:
    """Return the vectors (m,) of a grid, each of which has a name of its own."""
    if len(grid) == 0:
        return []
    rows = check_weights(grid, objectives, name="grid")
    if rows.ndim != 2:
        raise ValueError(f"grid has shape {tuple(rows.shape)} but must be (n, {objectives}), a row for each trade-off")
    return list({weights_name(row): row for row in rows}.values())


def _write(folder: Path, adapter: tuple[Any, dict[str, Tensor]], base: str | None) -> Any:
    """Write an adapter, and return its configuration."""
    config, tensors = adapter
    config.base_model_name_or_path = base
    folder.mkdir()
    write_adapter(folder, config, tensors)
    return config


# ---------------------------------------------------------------- what was written, beside the mixture


@torch.no_grad()
def _check_written(
    path: Path,
    mixture: LoraMixture,
    places: Sequence[str],
    trade_offs: Sequence[Tensor],
    kl_weight: float | None,
    shown: Progress,
) -> None:
    """Raise unless adapters that PEFT loads from their files, with scales w, have the logits of the mixture at w."""
    m, base = len(places), mixture.causal_lm
    rising = torch.arange(1, m + 1, dtype=torch.float64)
    asked = [torch.full((m,), 1 / m, dtype=torch.float64), rising / rising.sum(), rising.flip(0) / rising.sum()]
    vocabulary = base.get_input_embeddings().weight.shape[0]
    tolerance = SAME.get(base.dtype, TOLERANCE[base.dtype])
    remedy = "the adapters of this architecture do not do in their files what they do in memory: generate with mopl"

    def wanted(w: Tensor) -> list[Tensor]:
        return logits_of(mixture, vocabulary, weights=w, kl_weight=kl_weight)

    def check(loaded: Any, w: Tensor, what: str) -> None:
        compare(logits_of(loaded, vocabulary), wanted(w), tolerance, f"{what}, at {weights_name(w)},", remedy)
        shown.update(1)

    loaded = _load(path, mixture, places)
    loaded.base_model.set_adapter([f"_{i}" for i in range(m)])
    for i, weights in enumerate(torch.eye(m, dtype=torch.float64)):
        _check_layers(mixture, loaded, f"_{i}", weights, kl_weight, places[i])
        shown.update(1)
    for w in asked:
        for layer in lora_layers(loaded).values():
            for i in range(m):
                layer.set_scale(f"_{i}", float(w[i]))
        check(loaded, w, "the sum of the adapters that are loaded from their files")
    loaded = loaded.unload()
    for w in trade_offs:
        name = weights_name(w)
        one = load_adapters(loaded, {"default": path / name}).eval()
        _check_layers(mixture, one, "default", w, kl_weight, name)
        check(one, w, f"the adapter {name}")
        loaded = one.unload()


def _load(path: Path, mixture: LoraMixture, places: Sequence[str]) -> Any:
    """Return PEFT's model of the adapters in their files, called _0, _1, ..., on a copy of the base model."""
    gc.collect()
    with_adapters: Any = copy.deepcopy(mixture.model)
    return load_adapters(unfuse(with_adapters.unload()), {f"_{i}": path / name for i, name in enumerate(places)}).eval()


def _check_layers(
    mixture: LoraMixture, loaded: Any, adapter: str, weights: Tensor, kl_weight: float | None, what: str
) -> None:
    """Raise unless an adapter adds in each layer what the mixture's own ones do: random inputs show it.

    In 16 bits the logits alone would not: what an adapter does may be as small as their rounding.
    """
    shares = mixture.coefficients_of(weights, kl_weight).tolist()
    generator = torch.Generator().manual_seed(0)
    own, found = lora_layers(mixture.model), lora_layers(loaded)
    for name, layer in own.items():
        there = found.get(name)
        inputs = torch.randn(4, layer.in_features, generator=generator, dtype=torch.float64)
        total = torch.zeros(4, layer.out_features, dtype=torch.float64)
        for share, each in zip(shares, mixture.adapters, strict=True):
            if each in layer.lora_B:
                total += share * layer.scaling[each] * _through(layer, each, inputs)
        given = torch.zeros_like(total)
        if there is not None and adapter in there.lora_B:
            given = there.scaling[adapter] * _through(there, adapter, inputs)
        if not bool((given - total).norm() <= IN_A_LAYER * total.norm()):
            raise ValueError(
                f"the adapter {what} that is loaded from its files adds to {name} what differs by "
                f"{float((given - total).norm() / total.norm()):.2g} of what the mixture's adds, so nothing was "
                "exported; generate with mopl"
            )


def _through(layer: Any, adapter: str, inputs: Tensor) -> Tensor:
    """Return B A x + b in float64, without the scale."""
    a, b = layer.lora_A[adapter].weight.double().cpu(), layer.lora_B[adapter]
    made = inputs @ a.T @ b.weight.double().cpu().T
    return made if b.bias is None else made + b.bias.double().cpu()
