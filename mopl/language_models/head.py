"""Log-probabilities of responses from any Hugging Face causal language model, without its logits.

`fuse(model)` teaches a model one more way to be called: with `targets`, its forward runs as its authors wrote it up to
the output head, and there, in place of the `[tokens, vocabulary]` product, `linear_logprob` runs. Every other call, and
`generate`, is untouched.

Nothing is assumed about a family of models. The head is the module that `get_output_embeddings` names; its *input* is
whatever the model's own forward hands to it (so final norms, projections and input scalings are right by construction),
and what the forward does to the head's *output* is measured once: a probe goes through in place of the logits and must
come back as

    softcap * tanh(logit_scale * t / softcap)        or        logit_scale * t

for one constant `logit_scale` and at most one `softcap`, for every vocabulary entry. A model that does anything else
raises `UnsupportedModelError`; it is never scored wrongly. So does one that gives a row other outputs padded or packed
than alone, where no way of telling it is known.

The op runs inside the head's own forward, inside the wrapped model's forward. That is what makes DDP arm its reducer,
FSDP gather and reduce the head in whichever group it lies, DeepSpeed gather it, and PEFT's `modules_to_save` copy be
the one that is trained.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mopl._arguments import shape_of
from mopl._restoring import evaluating
from mopl._rows import UnsupportedModelError, arranged
from mopl._sharded import is_dtensor, is_partitioned, whole_shape
from mopl._threads import Turns, in_turn, measuring
from mopl.conditioning.causal_lm import is_peft
from mopl.language_models._head_scores import IGNORE_INDEX as IGNORE_INDEX
from mopl.language_models._head_scores import (
    FusedOutput,
    HeadRequest,
    HeadStates,
    Transform,
    find_head,
    fit_transform,
    numbers_of,
    score_hidden,
)
from mopl.language_models._split_head import SplitHead
from mopl.language_models._target_rows import TargetRows


@dataclass
class SequenceScores:
    """Scores of responses.

    Attributes:
        scores: float32 (N,), the sum (or mean) over a response's tokens of their log-probabilities, in nats.
        lengths: int64 (N,), the number of tokens that were scored.
        output: the `FusedOutput` behind them.
    """

    scores: Tensor
    lengths: Tensor
    output: FusedOutput


# ---------------------------------------------------------------- the head


@contextlib.contextmanager
def _forward_replaced(head: nn.Module, forward: Any, around: nn.Module | None = None) -> Iterator[list[Any]]:
    """Give `head` another forward for a moment, with its hooks (FSDP, DeepSpeed) around it; yield what it returned.

    Where PEFT's wrapper is `around` the head, its hooks are, too, and it is what the wrapper returned.
    """
    missing = object()
    before = head.__dict__.get("forward", missing)
    head.forward = forward
    returned: list[Any] = []
    # The newest hook is the last to run: it sees the output as the others leave it.
    handle = (around or head).register_forward_hook(lambda module, inputs, output: returned.append(output))
    try:
        yield returned
    finally:
        handle.remove()
        if before is missing:
            del head.__dict__["forward"]
        else:
            head.__dict__["forward"] = before


def _measure_transform(model: Any, original_forward: Any) -> Transform:
    """Send a probe through in place of the logits and read off what the model does to them."""
    head = find_head(model)
    vocabulary = whole_shape(head.weight)[0]
    device = head.weight.device
    generator = torch.Generator().manual_seed(0)
    # Magnitudes from where tanh is linear to where it is flat (and below fp16's largest number), both signs, in random
    # order: every entry is different, so that a rule for single entries (a vocabulary mask, say) cannot hide.
    order = torch.randperm(vocabulary, generator=generator)
    probe = torch.logspace(-4, 4.4, vocabulary, dtype=torch.float64)[order]
    probe[torch.rand(vocabulary, generator=generator) < 0.5] *= -1.0
    seen: list[torch.Size] = []
    split: SplitHead | None = None

    def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        nonlocal split
        seen.append(hidden.shape)
        split = SplitHead.of(head)  # here: FSDP's hooks have gathered its own shards
        if split is not None and split.is_laid_out(hidden):
            part = split.part(probe).to(hidden.device).expand(*hidden.shape[:-1], -1).clone()
            return split.handed_on(part, vocabulary)
        return probe.to(hidden.device).expand(*hidden.shape[:-1], vocabulary).clone()

    inputs = torch.ones(1, 2, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    try:
        with evaluating(model), torch.no_grad(), measuring(), _forward_replaced(head, forward):
            output = original_forward(input_ids=inputs, use_cache=False)
    except UnsupportedModelError:
        raise
    except Exception as error:
        try:  # a kernel that this machine cannot run, say, has nothing to do with the probe
            with evaluating(model), torch.no_grad(), measuring():
                original_forward(input_ids=inputs, use_cache=False)
        except Exception as own:
            raise UnsupportedModelError(
                f"the forward of {type(model).__name__} fails by itself, on two tokens ({type(own).__name__}: {own}); "
                "mend that first"
            ) from own
        raise UnsupportedModelError(
            f"{type(model).__name__} fails when its logits are replaced by a probe ({type(error).__name__}: {error}); "
            "it treats single vocabulary entries apart, or its forward needs more than input_ids"
        ) from error
    if len(seen) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} called its output head {len(seen)} times in one forward, not once"
        )
    logits = getattr(output, "logits", None)
    if split is not None and logits is not None:
        logits = split.seen_behind(logits)
    if logits is None or logits.shape[-1] != vocabulary:
        raise UnsupportedModelError(f"{type(model).__name__} returns no logits of its head's vocabulary ({vocabulary})")
    answer = logits[0, -1].to("cpu", torch.float64)

    transform = fit_transform(probe, answer)
    error = (transform(probe) - answer).abs() / answer.abs().clamp(min=1e-6)
    # The model may compute in its own dtype (a cast after the head): allow its rounding, not more.
    tolerance = 8 * torch.finfo(logits.dtype if logits.is_floating_point() else torch.float32).eps + 1e-6
    if not bool((error <= tolerance).all()):
        worst = int(error.argmax())
        raise UnsupportedModelError(
            f"{type(model).__name__} does to its logits what fuse cannot reproduce: entry {worst} went from "
            f"{float(probe[worst]):.6g} to {float(answer[worst]):.6g}, and the best fit (logit_scale "
            f"{transform.logit_scale:.6g}, softcap {transform.softcap}) gives {float(transform(probe)[worst]):.6g} "
            f"on {device.type}"
        )
    return transform


# ---------------------------------------------------------------- fuse


def is_fused(model: nn.Module) -> bool:
    """Say whether `fuse` was applied to this very module, and not undone since.

    Args:
        model: Any module. Of a PEFT model ask `model.get_base_model()`.
    """
    return hasattr(model, "_mopl_fused_forward")


@contextlib.contextmanager
def _scoring() -> Iterator[None]:
    """Leave inference mode: its tensors count no versions, by which a change of the head's output is seen."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


class FusedForward:
    """What `fuse` puts in the place of a model's forward; copied and pickled with the model, whose weights it uses.

    What the model does to its logits is measured again when a number of its configuration, of itself, its parts or its
    head is another one than it was.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.original = model, model.forward
        self.replaces = "forward" in vars(model)  # a forward that somebody put there, and not the class's own
        self._turns = Turns()  # the head is another one for the time of a call
        self.transform: Transform | None = None
        self.numbers: list[Any] = []

    @property
    def __signature__(self) -> inspect.Signature:
        """`generate` validates its keywords against the signature: the model's own."""
        signature = inspect.signature(type(self.model).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def measure(self) -> Transform:
        """Return what the model does to its logits now."""
        numbers = [*numbers_of(self.model), is_dtensor(find_head(self.model).weight)]
        if self.transform is None or numbers != self.numbers:
            self.transform = _measure_transform(self.model, self.original)
            self.numbers = numbers
        return self.transform

    def measure_if_whole(self) -> None:
        """Measure now, unless weights are elsewhere or in parts: then the first call does, which brings them."""
        weight = find_head(self.model).weight
        # Of a model loaded in shards of ZeRO-3, the head that PEFT copied is whole.
        cut = hasattr(weight, "full_tensor") or any(map(is_partitioned, self.model.parameters()))
        if not weight.is_meta and not cut:
            self.measure()

    @in_turn
    def __call__(self, *args: Any, targets: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the model's own forward, or with `targets` (N, T) return a `FusedOutput`; see `fuse`."""
        if targets is None:
            return self.original(*args, **kwargs)
        request = HeadRequest.taken(kwargs)
        with _scoring():
            if is_dtensor(find_head(self.model).weight):
                self.measure()  # first: from parts of logits processes could conclude different things about rows
            return self._scored(targets, request, arranged(self.model, self._named(args, kwargs)))

    @in_turn
    def score(self, targets: Tensor, request: HeadRequest, *args: Any, **kwargs: Any) -> FusedOutput | HeadStates:
        """Score targets (N, T) by a forward whose rows are given to the model just as they come."""
        with _scoring():
            return self._scored(targets, request, self._named(args, kwargs))

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.__signature__.parameters, args, strict=False)), **kwargs}

    def _scored(self, targets: Tensor, request: HeadRequest, kwargs: dict[str, Any]) -> FusedOutput | HeadStates:
        ids = None if kwargs.get("logits_to_keep") is not None else kwargs.get("input_ids")
        if isinstance(ids, Tensor) and ids.ndim == targets.ndim == 2 and ids.shape[1] != targets.shape[1]:
            raise ValueError(
                f"targets has shape {shape_of(targets)} but input_ids {shape_of(ids)}; pass a target for each "
                "position: model(ids[:, :-1], targets=ids[:, 1:])"
            )
        transform, name = self.measure(), type(self.model).__name__
        current = find_head(self.model)
        names: list[str] = []
        split: SplitHead | None = None

        def head_forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            nonlocal split
            split = SplitHead.of(current)  # here: FSDP's hooks have gathered its own shards
            if split is not None:
                split.check_targets(targets)
                hidden = split.plain(hidden)
            if request.return_states:
                output = hidden.clone()  # what changes it behind the head is seen below
            else:
                parts = score_hidden(current, hidden, targets, transform, request)
                names[:] = parts
                output = torch.stack(list(parts.values()), -1)
            return output if split is None else split.handed_on(output)

        kwargs.setdefault("use_cache", False)
        kwargs.pop("labels", None)
        # What gathers the head for the backward hangs on its output (FSDP: a hook on this tensor; DeepSpeed: another
        # tensor behind it), so the results must be taken from what the head's hooks returned.
        with _forward_replaced(current, head_forward, self.model.get_output_embeddings()) as result:
            output = self.original(**kwargs)
        if len(result) != 1:
            raise UnsupportedModelError(f"{name} called its output head {len(result)} times")
        if result[0]._version != 0:
            raise UnsupportedModelError(
                f"{name} changes the output of its head in place, which would change the scores"
            )
        found = result[0] if split is None else split.taken_back(result[0])
        if request.return_states:
            return HeadStates.of(current, found, targets, transform)
        # Copies, not views: a view as the model's output would lose FSDP's hook at the first in-place operation on it.
        parts = {name: part.clone() for name, part in zip(names, found.unbind(-1), strict=True)}
        if hasattr(output, "logits"):
            output.logits = None
        return FusedOutput.filled(parts, output)


def fuse(model: nn.Module) -> nn.Module:
    """Teach a Hugging Face causal language model to return log-probabilities without its logits.

    Afterwards `model(..., targets=targets)` returns a `FusedOutput`; `targets` (N, T) are aligned with the positions of
    the *inputs* that predict them (already shifted), and -100 marks positions that never reach the head. More
    keywords of such a call: `temperature` (a number or (N, T)), `return_logsumexp`, `return_entropy`; and
    `reference_hidden` (N, T, H'), what the head of a reference got at the same positions, with `reference_head`, that
    head (None: the model's own), for the KL to the reference by `linear_kl`; and `teachers`, what the heads of teachers
    got at the targets, with `distillation`, for a divergence to each by `linear_jsd`: see `HeadRequest`, which has them
    all, and `mopl.language_models.divergences`. Where a wrapper puts virtual tokens in front (prompt learning), the
    last T positions are scored.
    Every call without `targets` is as before; calls in several threads take turns. Fuse before wrapping in PEFT, DDP or
    FSDP. A copy or a pickle of a fused model is fused; a scale or softcap of the logits may change later.

    Args:
        model: a causal language model of transformers, on its device and with its weights.

    Returns:
        The same model.

    Raises:
        TypeError: if it is no module, such as the name of a model.
        UnsupportedModelError: if its head, or what it does to the logits, cannot be reproduced exactly.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__} but must be a model that transformers has loaded")
    if is_fused(model):
        return model
    if is_peft(model):
        raise UnsupportedModelError(
            "this is a PEFT model: fuse the causal language model before wrapping it, "
            "or call fuse(model.get_base_model())"
        )
    fused = FusedForward(model)
    fused.measure_if_whole()
    model._mopl_fused_forward = fused  # type: ignore[assignment]
    model.forward = fused  # type: ignore[assignment]
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo `fuse`: the model's forward is again the one that it was.

    Args:
        model: The causal language model that was fused; one that was not is left as it is.

    Returns:
        The same model.
    """
    if is_fused(model):
        fused: Any = model._mopl_fused_forward
        if fused.replaces:
            model.forward = fused.original
        else:
            del model.__dict__["forward"]
        del model._mopl_fused_forward
    return model


# ---------------------------------------------------------------- sequences


def score_sequences(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    temperature: float | Tensor = 1.0,
    average: bool = False,
    **model_kwargs: Any,
) -> SequenceScores:
    """Score the responses of a batch: the sum of log p(token | what stands before it) over each response's tokens.

    Args:
        model: a fused model, or anything that wraps one (PEFT, DDP, FSDP, DeepSpeed).
        batch: `input_ids` (N, T); `labels` (N, T), the same ids with -100 on prompt and padding (or `response_mask`
            (N, T), true on response tokens); optionally `attention_mask` (padding on either side, no holes) and
            `position_ids`, counted from 0; without these, positions are those of the mask. For padding-free packing
            N = 1, `segment` (1, T) holds the number 0, 1, ... of each token's sequence and `position_ids` restart with
            each, in the same places; `sequences` says how many there are (without it the largest number is read, which
            makes a GPU wait). Other entries go to the model.
        temperature: a number, or (N, T), by which logits are divided.
        average: give the mean over a response's tokens in place of the sum; an empty response scores 0.
        **model_kwargs: keywords of the model's forward.

    Returns:
        `SequenceScores`.

    Raises:
        ValueError: if the batch lacks `input_ids` or both `labels` and `response_mask`, shapes differ, a mask has holes
            or other values than 0 and 1, or `segment` and `position_ids` part a row in different places.
        UnsupportedModelError: if the model gives rows that are padded or packed like this other scores than alone.
    """
    rows = TargetRows.of(batch)
    rows.check(model)
    output = model(**rows.inputs, targets=rows.targets, temperature=temperature, **model_kwargs)
    if not isinstance(output, FusedOutput):
        raise ValueError("the model is not fused: call mopl.alignment.fuse(model) on the causal language model first")
    scores, lengths = rows.total(output.log_probs, average=average)
    return SequenceScores(scores, lengths, output)
