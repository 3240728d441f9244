"""What `patch_trl` puts in front of a forward: TRL's calls for log-probabilities, answered by `linear_logprob`."""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mopl._extras import require

require("transformers", what="mopl.patch_trl", extra="trl")
from transformers.utils.generic import ModelOutput

from mopl._rows import UnsupportedModelError
from mopl.language_models.head import FusedForward, HeadRequest
from mopl.ops.head_statistics import NAMES

IGNORED = -100  # the label of a position that TRL does not score
MISSING = object()


@dataclass
class HeadOutput(ModelOutput):
    """The output class of releases of TRL that have none of their own; the fields are those of `FusedCausalLMOutput`.

    Attributes:
        loss: the mean of -log_probs over the labels that count, with the routers' loss where there is one.
        log_probs: float32 (N, T - 1), or (N, T) with `shift_labels`; 0 where labels are -100, as all that follow.
        entropy: of the same shape, in nats.
        log_sum_sq_probs: log Σ p².
        mean_logits: the mean logit over the vocabulary.
        is_top1: bool, whether the label is the likeliest token.
        label_mask: bool, whether a label is not -100.
        aux_loss: the loss of a mixture of experts' routers.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


@dataclass(frozen=True)
class HeadSettings:
    """What TRL made a model's head with.

    Attributes:
        temperature: by which logits are divided.
        outputs: which fields of the output are filled.
        cast_lm_head_to_fp32: whether the head multiplies in float32, outside of autocast.
        output: the class of the output.
    """

    temperature: float
    outputs: tuple[str, ...]
    cast_lm_head_to_fp32: bool
    output: Any


def head_of(forward: Any) -> TrlHead | None:
    """Return the `TrlHead` that a forward belongs to, if it does."""
    return getattr(getattr(forward, "__func__", forward), "trl_head", None)


class TrlHead:
    """What `patch_trl` puts in front of the forward of a causal language model."""

    def __init__(self, model: nn.Module, settings: HeadSettings) -> None:
        self.model, self.settings = model, settings
        self.before = model.__dict__.get("forward", MISSING)
        self.found = model.forward
        self.fused = FusedForward(model)
        self.fused.measure_if_whole()
        self.active = True

        # `generate` and trainers read the names of a forward's arguments, torch.compile its code, and pickle its name,
        # by which a pickled model has its own forward again.
        @functools.wraps(type(model).forward)
        def forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self(model, *args, **kwargs)

        vars(forward)["trl_head"] = self
        self.bound = types.MethodType(forward, model)  # accelerate wraps what is behind it, and binds it again

    def install(self) -> None:
        """Put this in front of the model's forward."""
        self.model.forward = self.bound

    def remove(self) -> None:
        """Put back what was found; where something was wrapped around it since, go on as if this were not there."""
        self.active = False
        top: TrlHead | None = self
        # Another one that was removed while this one was in front of it goes, too.
        while top is not None and not top.active and self.model.__dict__.get("forward") is top.bound:
            if top.before is MISSING:
                del self.model.__dict__["forward"]
            else:
                self.model.__dict__["forward"] = top.before
            top = head_of(top.before)

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Answer a call with `fused_lm_head=True`; hand on any other as it is."""
        if model is not self.model:
            raise RuntimeError(
                "this model is a copy of one that mopl.patch_trl patched, and its forward would use the weights of "
                "that one; call mopl.unpatch_trl(trainer) before copying"
            )
        if not self.active or not kwargs.get("fused_lm_head"):
            return self.found(*args, **kwargs)
        return self._scored(*args, **kwargs)

    def _scored(
        self,
        *args: Any,
        fused_lm_head: bool,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        outputs, name = self.settings.outputs, type(self.model).__name__
        if shift_labels is not None:
            targets = shift_labels
        elif labels is not None:
            targets = torch.full_like(labels, IGNORED)
            targets[:, :-1] = labels[:, 1:]
        else:
            raise ValueError("fused_lm_head=True needs labels (N, T), or shift_labels (N, T) that are shifted already")
        request = HeadRequest(
            temperature=self.settings.temperature,
            return_entropy="entropy" in outputs,
            statistics=tuple(one for one in NAMES if one in outputs),
            autocast=not self.settings.cast_lm_head_to_fp32,
        )
        kwargs["use_cache"] = False
        config = self.model.config.get_text_config()  # type: ignore[operator, union-attr]
        if getattr(config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        scores: Any = self.fused.score(targets, request, *args, **kwargs)

        # Every position but a row's last one predicts a label.
        length = targets.shape[1] - (shift_labels is None)
        fields = {"log_probs": scores.log_probs, "entropy": scores.entropy, **scores.statistics}
        # Copies, since FSDP's hook on a view would be lost at the first in-place operation on it.
        fields = {one: value[:, :length].clone() for one, value in fields.items() if value is not None}
        if "is_top1" in fields:
            fields["is_top1"] = fields["is_top1"].bool()
        mask = (targets[:, :length] != IGNORED).to(scores.log_probs.device)
        loss = -fields["log_probs"].sum()
        loss = loss / (mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        aux_loss = None
        if kwargs.get("output_router_logits"):
            aux_loss = getattr(scores.model_output, "aux_loss", None)
            if aux_loss is None:
                raise UnsupportedModelError(
                    f"{name} gives no aux_loss when it is called with output_router_logits=True"
                )
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
        return self.settings.output(**fields, loss=loss, label_mask=mask, aux_loss=aux_loss)
