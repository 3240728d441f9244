"""An export is loaded from its files and asked for logits, beside the model that it was made from.

Short rows, each alone, go through the source, through the plain model in memory, and through what is loaded from the
files. The first two differ by the rounding of merged weights, the last two not at all. Memory: the source and one plain
model at a time, as for merging itself; the one in memory is freed before the files are loaded.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopl._extras import require
from mopl._restoring import evaluating, generators_kept
from mopl.conditioning.adapted import lora_layers
from mopl.conditioning.causal_lm import is_peft
from mopl.conditioning.merging import check_lora
from mopl.conditioning.weighted import WeightedModel, causal_lm_of
from mopl.language_models.head import unfuse

LENGTHS = (12, 5)
# Largest ‖difference‖ of logits, of their own spread. In 16 bits weights with adapters merged in are rounded anew, and
# activations with them, 2⁻⁹ in each of many products; a model that is another one differs by about 1.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
SAME = 16  # of the dtype's spacing: the same weights twice


@torch.no_grad()
def logits_of(model: Any, vocabulary: int, front: Sequence[int] = (), **trade_off: Any) -> list[Tensor]:
    """Return the logits (T, vocabulary) of texts of some lengths, with tokens in front, in float32 on the CPU."""
    found = []
    device = model.get_input_embeddings().weight.device
    with evaluating(model), generators_kept():
        for length in LENGTHS:
            text = torch.arange(7, 7 + length * 5, 5, device=device)[None] % vocabulary
            whole = torch.cat([torch.tensor([list(front)], dtype=text.dtype, device=device), text], 1)
            output = model(input_ids=whole, attention_mask=torch.ones_like(whole), **trade_off)
            # PEFT's prompt tuning puts virtual tokens in front by itself.
            found.append(output.logits[0, -length:, :vocabulary].float().cpu())
    return found


def compare(given: list[Tensor], wanted: list[Tensor], tolerance: float, what: str, remedy: str) -> None:
    """Raise where logits differ by more than a share of their spread."""
    a, b = torch.cat(given), torch.cat(wanted)
    error, spread = (a - b).norm(), (b - b.mean(-1, keepdim=True)).norm()
    if not bool(error <= tolerance * spread):
        raise ValueError(
            f"{what} differs by up to {float((a - b).abs().max()):.3g} in logits of up to {float(b.abs().max()):.3g}, "
            f"so nothing was exported; {remedy}"
        )


def check_adapters(model: Any) -> None:
    """Raise unless plain LoRA adapters of a PEFT model in 16 bits compute what merged weights do, whatever their size.

    The effect of trained adapters may be as small as rounding is there; in float32 the logits themselves are compared.
    """
    inner: Any = model.model if isinstance(model, WeightedModel) and not model.varies_with_weights else model
    if not is_peft(inner) or inner.get_base_model().dtype not in (torch.bfloat16, torch.float16):
        return
    names = inner.active_adapters
    layers = lora_layers(inner)
    plain = all(
        hasattr(layer, "lora_B") and set(names) & set(layer.lora_B) and not layer.merged and not layer.lora_variant
        for layer in layers.values()
    )
    kinds = {str(getattr(inner.peft_config[name].peft_type, "value", "")) for name in names}
    if plain and layers and kinds == {"LORA"} and len(names) == 1:
        check_lora(inner, names)


def check_files(path: Path, inner: Any, kind: str, given: list[Tensor], vocabulary: int, front: list[int]) -> None:
    """Raise unless what is loaded from a folder has the logits that it had in memory.

    Class, device, dtype and attention are those of `inner`, the source without what gives it weights; an adapter goes
    on a copy of its base model.
    """
    base = causal_lm_of(inner)
    gc.collect()  # what was merged holds itself
    remedy = "the files of this architecture do not hold what the model in memory does: generate with mopl"
    try:
        loaded = _load_model(path, base) if kind == "model" else _load_adapter(path, inner)
    except (AttributeError, IndexError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the {kind} does not load from its files ({said}), so nothing was exported; {remedy}"
        ) from error
    tolerance = SAME * torch.finfo(base.dtype).eps if kind == "model" else TOLERANCE[base.dtype]
    found = logits_of(loaded, vocabulary, front)
    compare(found, given, tolerance, f"the {kind} that is loaded from its files", remedy)


def _load_adapter(path: Path, inner: Any) -> Any:
    require("peft")
    from peft import PeftModel

    with_adapters = copy.deepcopy(inner)
    plain: nn.Module = with_adapters.unload() if hasattr(with_adapters, "unload") else with_adapters
    return PeftModel.from_pretrained(unfuse(plain), str(path)).eval()


def _load_model(path: Path, base: Any) -> Any:
    require("transformers")
    from transformers import AutoModelForCausalLM

    # A class of somebody's own code is not found by its configuration.
    loader: Any = AutoModelForCausalLM if type(base).__module__.startswith("transformers.") else type(base)
    options: dict[str, Any] = {}
    if getattr(base.config, "_attn_implementation", None) is not None:
        options["attn_implementation"] = base.config._attn_implementation
    places = getattr(base, "hf_device_map", None)
    if places is not None and len(set(places.values())) > 1:
        return loader.from_pretrained(str(path), dtype=base.dtype, device_map=places, **options).eval()
    loaded = loader.from_pretrained(str(path), dtype=base.dtype, **options)
    return loaded.to(base.get_input_embeddings().weight.device).eval()
