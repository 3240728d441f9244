"""`patch_trl(trainer)`: TRL's own trainers compute their log-probabilities by `mopl.linear_logprob`.

    trainer = trl.GRPOTrainer(...)
    mopl.patch_trl(trainer)
    trainer.train()
    mopl.unpatch_trl(trainer)

**The seam.** From TRL 1.15 on, `GRPOTrainer`, `RLOOTrainer`, `DPOTrainer`, `SFTTrainer` and `KTOTrainer` call
`add_fused_lm_head(model, temperature, cast_lm_head_to_fp32, outputs)`, which puts a forward in front of the model's own
that answers `model(..., labels=labels, fused_lm_head=True)` by log-probabilities and figures of each token. `patch_trl`
puts one more in front of that: such calls run the model's own forward as its authors wrote it, with `linear_logprob` in
the place of the product with the head (`mopl.language_models.head`), and get TRL's own output class, field for field.
All other calls go on to TRL's. So what TRL does with the numbers (losses, masks, metrics) is TRL's, and DDP, FSDP2,
DeepSpeed, PEFT's `modules_to_save` and the losses of routers see a forward of the model like any other.

What TRL's forward was made with is read from its closure. A release that has it under other names is refused; nothing
is guessed.

**TRL 1.10 to 1.14** have no such seam. `GRPOTrainer` and `RLOOTrainer` compute everything in one method,
`_get_per_token_logps_and_entropies`, which is replaced on the trainer; the others read `outputs.logits` inside their
losses and are refused.

What a call gives differs from TRL's by rounding alone: TRL rounds logits to the dtype of the model, while products here
are summed in float32.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mopl._extras import require, version_of

require("trl", "transformers", "accelerate", what="mopl.patch_trl", extra="trl")
import trl  # type: ignore[import-not-found]

from mopl.conditioning.weighted import causal_lm_of
from mopl.integrations._trl_head import IGNORED, HeadOutput, HeadSettings, TrlHead, head_of

OLDEST, WITH_SEAM = (1, 10), (1, 15)
METHOD = "_get_per_token_logps_and_entropies"
SETTINGS = ("temperature", "outputs", "cast_lm_head_to_fp32")


# ---------------------------------------------------------------- releases with the seam


def _closure_of(forward: Any) -> dict[str, Any] | None:
    """Return what TRL's forward was made with, also behind accelerate's mixed precision; None if there is none."""
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        code = getattr(function, "__code__", None)
        if code is not None and code.co_name == "_fused_forward":
            cells = [cell.cell_contents for cell in function.__closure__ or ()]
            return dict(zip(code.co_freevars, cells, strict=True))
        head = head_of(function)
        if head is not None:
            forward = head.found
        else:  # behind mixed precision, or behind `fuse`
            forward = getattr(function, "__wrapped__", getattr(function, "original", None))
    return None


def _settings_of(model: nn.Module, trainer: Any) -> HeadSettings:
    """Read from the installed TRL what it made a model's head with."""
    closure, trainer_name = _closure_of(model.forward), type(trainer).__name__
    if closure is None:
        raise TypeError(
            f"trainer is a {trainer_name}, in whose {type(model).__name__} TRL {trl.__version__} put no fused head "
            "(add_fused_lm_head). GRPOTrainer, RLOOTrainer, DPOTrainer, SFTTrainer and KTOTrainer have one; a trainer "
            "that computes its log-probabilities itself cannot be patched"
        )
    if missing := [name for name in SETTINGS if name not in closure]:
        raise RuntimeError(
            f"the fused head of TRL {trl.__version__} was made without {', '.join(missing)}, by which mopl would know "
            "what to compute; mopl knows TRL 1.10 to 1.16: install one of these, or a newer mopl"
        )
    from trl.trainer.utils import FusedCausalLMOutput  # type: ignore[import-not-found]

    outputs = tuple(closure["outputs"])
    fields = set(FusedCausalLMOutput.__dataclass_fields__)
    known = set(HeadOutput.__dataclass_fields__)
    if strange := sorted((set(outputs) | fields) - known | (known - fields)):
        raise RuntimeError(
            f"the fused head of TRL {trl.__version__} has other outputs than mopl knows: {', '.join(strange)}; "
            "mopl knows TRL 1.10 to 1.16: install one of these, or a newer mopl"
        )
    return HeadSettings(closure["temperature"], outputs, closure["cast_lm_head_to_fp32"], FusedCausalLMOutput)


# ---------------------------------------------------------------- releases without the seam


def _per_token_logps(
    self: Any,
    model: nn.Module,
    input_ids: Tensor,  # (N, T)
    attention_mask: Tensor,  # (N, T)
    logits_to_keep: int,
    batch_size: int | None = None,
    compute_entropy: bool = False,
    compute_aux_loss: bool = False,
    token_type_ids: Tensor | None = None,
    **images: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return log-probabilities and entropies of the last `logits_to_keep` tokens, and the routers' loss."""
    if given := sorted(name for name, value in images.items() if value is not None):
        raise ValueError(f"mopl.patch_trl scores texts alone with TRL {trl.__version__}, but got {', '.join(given)}")
    found = []
    for rows in torch.arange(len(input_ids)).split(batch_size or max(1, len(input_ids))):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        inputs: dict[str, Any] = {"input_ids": input_ids[part], "attention_mask": attention_mask[part]}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids[part]
        if compute_aux_loss:
            inputs["output_router_logits"] = True
        labels = input_ids[part].masked_fill(attention_mask[part] == 0, IGNORED)
        labels[:, :-logits_to_keep] = IGNORED
        with self.accelerator.autocast():
            found.append(model(**inputs, labels=labels, fused_lm_head=True))
    # Virtual tokens of prompt learning stand in front.
    log_probs = torch.cat([one.log_probs[:, -logits_to_keep:] for one in found])
    entropy = torch.cat([one.entropy[:, -logits_to_keep:] for one in found]) if compute_entropy else None
    return log_probs, entropy, torch.stack([one.aux_loss for one in found]).mean() if compute_aux_loss else None


def _older_settings(trainer: Any) -> HeadSettings:
    """Check that a trainer of TRL 1.10 to 1.14 computes its log-probabilities in one method, and say how."""
    name, release = type(trainer).__name__, f"TRL {trl.__version__}"
    if not _kinds(trainer) & {"GRPOTrainer", "RLOOTrainer"}:
        raise RuntimeError(
            f"the {name} of {release} computes its log-probabilities from outputs.logits inside its loss, where "
            "nothing can take their place; install trl>=1.15, whose trainers have a fused head that is replaced"
        )
    if getattr(trainer, "use_liger_kernel", False) or getattr(trainer.args, "use_liger_kernel", False):
        raise RuntimeError(
            f"use_liger_kernel=True makes the {name} of {release} compute its loss by Liger; turn it off"
        )
    asked = set(inspect.signature(getattr(type(trainer), METHOD)).parameters)
    if strange := asked - set(inspect.signature(_per_token_logps).parameters) - IMAGES - {"args", "kwargs"}:
        raise RuntimeError(
            f"{METHOD} of {name} in {release} takes {', '.join(sorted(strange))}, which mopl does not know"
        )
    return HeadSettings(trainer.temperature, ("log_probs", "entropy"), False, HeadOutput)


IMAGES = {
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "mm_token_type_ids", "image_position_ids",
}  # fmt: skip


# ---------------------------------------------------------------- trainers


def _kinds(trainer: Any) -> set[str]:
    """Return the names of TRL's classes that a trainer is one of."""
    return {kind.__name__ for kind in type(trainer).__mro__ if kind.__module__.split(".")[0] == "trl"}


def _check_made(trainer: Any) -> None:
    """Raise for what is no trainer that has its model."""
    if isinstance(trainer, type):
        raise TypeError(f"trainer is the class {trainer.__name__} but must be a trainer that is made with its model")
    if not hasattr(trainer, "accelerator") or not hasattr(trainer, "model"):
        raise TypeError(f"trainer is a {type(trainer).__name__} but must be a trainer of TRL, made with its model")


def _check_trainer(trainer: Any) -> None:
    """Raise unless a trainer's loss is made of log-probabilities that TRL takes from a model's head."""
    name, kinds = type(trainer).__name__, _kinds(trainer)
    _check_made(trainer)
    if version_of(trl.__version__) < OLDEST:
        raise RuntimeError(f"mopl.patch_trl needs trl>=1.10, found {trl.__version__}")
    if "RewardTrainer" in kinds:
        raise TypeError(
            f"trainer is a {name}, which trains a sequence classifier: its loss is made of one score a sequence, and "
            "there are no log-probabilities of tokens to compute. For a reward model of several objectives, "
            "on lists of any length, there is mopl.integrations.scorers.RewardListTrainer"
        )
    own = [kind for kind in type(trainer).__mro__ if "compute_loss" in kind.__dict__ and kind.__name__ in kinds]
    if "SFTTrainer" in kinds and own and own[0].__name__ != "SFTTrainer":
        raise TypeError(
            f"trainer is a {name}, whose own loss reads the logits and does not ask for log-probabilities; there is "
            "nothing in it that mopl.patch_trl could replace. mopl.ops has divergences to a teacher without logits"
        )
    if getattr(trainer.args, "torch_compile", False):
        raise RuntimeError(
            "torch_compile=True compiles the model's forward, which mopl.patch_trl replaces; make the trainer with "
            "torch_compile=False"
        )


def _models_of(trainer: Any) -> Iterator[nn.Module]:
    """Yield the causal language models of a policy and its reference, inside the wrappers of PEFT and accelerate."""
    for wrapped in (trainer.model, getattr(trainer, "ref_model", None)):
        if isinstance(wrapped, nn.Module):  # not a reference that the policy is itself
            yield causal_lm_of(trainer.accelerator.unwrap_model(wrapped))


def is_patched(trainer: Any) -> bool:
    """Say whether `patch_trl` was applied to this very trainer, and not undone since.

    Args:
        trainer: Any trainer; one that cannot be patched is not.
    """
    return bool(getattr(trainer, "_mopl_trl_heads", None))


def patch_trl(trainer: Any) -> Any:
    """Let a trainer of TRL compute its log-probabilities and entropies by `mopl.linear_logprob`.

    Losses, metrics and everything else stay TRL's own, and are equal up to rounding. Call it after the trainer is made,
    best before `train()`; the models of both policy and reference are patched, and generation is untouched.

    Args:
        trainer: a `GRPOTrainer`, `RLOOTrainer`, `DPOTrainer`, `SFTTrainer` or `KTOTrainer` of TRL 1.15 or later, or a
            subclass; of TRL 1.10 to 1.14 a `GRPOTrainer` or `RLOOTrainer`. Patched already: nothing is done.

    Returns:
        The same trainer.

    Raises:
        TypeError: if it is no trainer of TRL, or one without log-probabilities of tokens.
        RuntimeError: if the installed release, or a setting of the trainer, leaves no place to compute them.
        UnsupportedModelError: if the head of a model cannot be reproduced exactly: see `mopl.alignment.fuse`.
    """
    if is_patched(trainer):
        return trainer
    _check_trainer(trainer)
    older = version_of(trl.__version__) < WITH_SEAM
    # All are made before the first is put in its place, so that an error leaves the trainer as it was.
    heads = [
        TrlHead(model, _older_settings(trainer) if older else _settings_of(model, trainer))
        for model in _models_of(trainer)
    ]
    for head in heads:
        head.install()
    if older:
        setattr(trainer, METHOD, types.MethodType(_per_token_logps, trainer))
    trainer._mopl_trl_heads = heads
    return trainer


def unpatch_trl(trainer: Any) -> Any:
    """Undo `patch_trl`: the forwards of the models are again the very ones that they were.

    Args:
        trainer: The trainer that was patched; one that was not is left as it is.

    Returns:
        The same trainer.

    Raises:
        TypeError: if it is no trainer.
    """
    _check_made(trainer)
    for head in trainer.__dict__.pop("_mopl_trl_heads", []):
        head.remove()
    if getattr(trainer.__dict__.get(METHOD), "__func__", None) is _per_token_logps:
        del trainer.__dict__[METHOD]
    return trainer
