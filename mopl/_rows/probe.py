"""The measurement: two short rows alone, and what becomes of their outputs in other ways of passing them.

Two questions, for each row of an arrangement:

* Do its outputs change with what is not part of it: other tokens in the padding, in its neighbours, behind it? They
  must not, to the bit, whatever the dtype and however small the weights are; but for what rows of one batch change in
  one another anyway (mixtures of experts, quantised activations), which is measured beside it.
* Are they those of the row alone, within rounding? Differences count as shares of how much outputs vary from token to
  token. Rounding is allowed as the dtype has it, or as batches of other shapes show it (where a router's rounding
  changes, a token goes elsewhere).

Windows of the configuration are made shorter than the rows for the moment, for a fault at the edge of a window of 4,096
tokens is one at the edge of 4 tokens too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from mopl._extras import require
from mopl._restoring import evaluating, generators_kept
from mopl._rows.styles import Finding, Style, compute_dtype, embedding_of, packed_keywords, positions_of, styles
from mopl._sharded import is_dtensor
from mopl._threads import measuring

# The second row is the beginning of the first, 17 tokens, which shows whether a model reads ahead. Lengths are odd, or
# a fault of chunks could hide behind their multiples.
_LONG, _STEPS = 25, 3
_WINDOW = 4
_WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size", "index_topk")
_LEAK = 1e-6


@_disable_dynamo  # torch.compiler.disable would import the compiler, and Triton with it, along with this module
def measured(model: Any, kind: str, embeds: bool) -> Finding:
    """Return what becomes of an arrangement; see `mopl._rows.finding`."""
    changes = _short_windows(model) + _adapters_off(model) + _undecorated(model) + _routers_off(model)
    with evaluating(model), generators_kept(), torch.no_grad(), measuring(), _changed(changes):
        probe = _Probe(model, embeds)
        if fault := probe.ahead():
            return Finding(
                None,
                reason=f"reads ahead: its outputs for a text {fault}, so they are no probabilities of the next token; "
                "load it as a decoder (config.is_decoder = True)",
            )
        if kind == "alone":
            return Finding(Style())
        measure = {"packed": probe.packed, "packed rows": probe.packed_rows, "generate": probe.generated}.get(
            kind, probe.padded
        )
        tried: list[tuple[Style, _Faults]] = []
        for style in styles(model, kind):
            try:
                faults = measure(style)
            except Exception as error:  # whatever a family raises where it is told what it does not know
                faults = _Faults(_failure(error), _failure(error))
            if not faults.right and not faults.left:
                return Finding(style)
            tried.append((style, faults))
    return _refusal(kind, embeds, tried)


def _failure(error: Exception) -> str:
    return f"fail ({type(error).__name__}: {' '.join(str(error).split())[:200]})"


def _refusal(kind: str, embeds: bool, tried: list[tuple[Style, _Faults]]) -> Finding:
    """Return how rows on the right alone can be said, or that nothing can, with the reason and the remedy."""
    rows = "rows behind virtual tokens" if embeds else "rows"
    for style, faults in tried:
        if not faults.right:
            what, remedy = f"cannot take {rows}", "pad on the right (padding_side='right')"
            if kind == "generate":
                what, remedy = f"cannot generate from {rows}", "pass one prompt at a time (batch_size=1)"
            return Finding(style, False, f"{what} padded on the left: outputs {faults.left}; {remedy}")
    fault = tried[0][1].right if tried else "cannot be compared, for there is no way to say it"
    if kind == "packed":
        if own := next((f.right for style, f in tried if style.packed == "varlen" and f.right.startswith("fail")), ""):
            fault += f", and with its own varlen keywords they {own}"
        return Finding(
            None, False, f"cannot take packed {rows}: outputs {fault}; leave packing off (no --packing, packing=False, "
            "padding_free=False), so that rows are padded"
        )  # fmt: skip
    if kind == "packed rows":
        return Finding(
            None, False, f"cannot take several packed {rows} at once: outputs {fault}; pass one packed row at a time, "
            "(1, N), or padded rows and their attention_mask"
        )  # fmt: skip
    if kind == "generate":
        remedy = "take a model of another family"
        if embeds:
            remedy += ", or condition it by adapters (conditioning='lora-mixture')"
        where = "behind virtual tokens" if embeds else "with transformers' generate"
        return Finding(None, False, f"cannot generate {where}: outputs {fault}; {remedy}")
    return Finding(None, False, f"cannot take padded {rows}: outputs {fault}; pass one row at a time, without a mask")


@dataclass(frozen=True)
class _Faults:
    """What is wrong with outputs, empty if nothing is: of rows padded on the right or not at all, and on the left."""

    right: str
    left: str


class _Probe:
    """Two short rows, what a model gives for each alone, and how far other ways of passing them are off."""

    def __init__(self, model: Any, embeds: bool) -> None:
        self.model, self.embeds = model, embeds
        self.device, self.dtypes = embedding_of(model).weight.device, {compute_dtype(model)}
        known = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
        self.long = min(_LONG, known // 2) if known > 4 else _LONG
        self.short = self.long * 2 // 3 + 1
        self.tokens = _plain_tokens(model)[: self.long]
        # What stands around a row, in two versions.
        self.around = self.tokens.flip(0), self.tokens.roll(3).flip(0)
        self.alone = {n: self.logits({"input_ids": self.tokens[None, :n]})[0] for n in (self.long, self.short)}

    def logits(self, keywords: dict[str, Any]) -> Tensor:
        inputs = {
            name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in keywords.items()
        }
        logits = self.model.forward(**inputs, use_cache=False).logits
        if is_dtensor(logits):  # whole, so that all processes of a split head come to one conclusion
            logits = logits.full_tensor()
        self.dtypes.add(logits.dtype)
        return logits.detach().double().cpu()

    def text(self, ids: Tensor) -> dict[str, Tensor]:
        """Return rows (B, T) as the text of a call."""
        return {"inputs_embeds": embedding_of(self.model)(ids.to(self.device))} if self.embeds else {"input_ids": ids}

    def padding(self, mask: Tensor, style: Style) -> dict[str, Tensor]:
        """Return the padding of rows (B, T) as a call says it."""
        positions = {} if style.first is None else {"position_ids": positions_of(mask) + style.first}
        return {"attention_mask": mask, **positions}

    # ---------------------------------------------------------------- the two questions

    def difference(self, found: Tensor, expected: Tensor) -> float:
        """Return how far logits (T, V) are off, as a share of how much they vary from token to token."""
        kept = expected.abs().amax(0) < 1e4  # entries that a model puts out of reach say nothing
        off, spread = (found - expected)[:, kept], (expected - expected.mean(0))[:, kept]
        share = float(off.norm() / spread.norm()) if bool(off.any()) else 0.0
        return share if share == share else float("inf")

    def fault(self, found: Tensor, otherwise: Tensor, alone: Tensor) -> str:
        """Say what is wrong with a row's logits (T, V), given those among other surroundings, and of the row alone."""
        leak = self.difference(otherwise, found)
        if leak > _LEAK and leak > 8 * self.leak_of_batches:
            return f"change by {leak:.2g} of their spread with what is not part of the row"
        if (off := self.difference(found, alone)) > self.rounding(off, len(found)):
            return f"differ by {off:.2g} of their spread from those of the row alone"
        return ""

    @cached_property
    def leak_of_batches(self) -> float:
        """How far rows of one batch change one another where nothing is padded."""
        one, other = (self.logits({"input_ids": torch.stack([self.tokens, row])})[0] for row in self.around)
        return self.difference(other, one)

    def rounding(self, off: float, tokens: int) -> float:
        """Return how far outputs may be off by rounding: by the dtype, or by what batches of other shapes show."""
        # Between the rounding of one operation and the whole: 1.6 % in float16, 5 % in bfloat16. Models that run the
        # same layers again and again, or step where they scan otherwise, make 6e-4 of what is 1e-7 in others.
        eps = max(torch.finfo(dtype).eps for dtype in self.dtypes if dtype.is_floating_point)
        allowed = max(eps**0.6, 2e-3)
        if off <= allowed or off > 0.25:
            return allowed
        windows = [slice(first, first + tokens) for first in range(self.long - tokens + 1)]
        alone = self.alone[self.long]
        return max(
            allowed, 4 * max(self.difference(row[w], alone[w]) for row in self.rounded_otherwise for w in windows)
        )

    @cached_property
    def rounded_otherwise(self) -> Tensor:
        """The long row's logits (8, T, V) in a batch, each time with its embeddings a rounding off.

        Whether a router's rounding sends a token elsewhere is chance, which one other shape of batch may not show.
        """
        generator = torch.Generator().manual_seed(0)

        def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
            share = torch.randint(-1, 2, output.shape, generator=generator).to(output)
            return output * (1 + torch.finfo(output.dtype).eps * share)

        handle = embedding_of(self.model).register_forward_hook(hook)
        try:
            return self.logits({"input_ids": self.tokens.expand(8, -1)})
        finally:
            handle.remove()

    # ---------------------------------------------------------------- arrangements

    def ahead(self) -> str:
        """Look whether a text's outputs change with what follows it."""
        n = self.short
        one, other = (
            self.logits({"input_ids": torch.cat([self.tokens[:n], row[n:]])[None]})[0, :n] for row in self.around
        )
        return self.fault(one, other, self.alone[n])

    def padded(self, style: Style) -> _Faults:
        """Pass the long row, and the short one padded on either side, in one batch."""
        found = []
        for filler in self.around:
            ids, mask = self._rows(filler)
            found.append(self.logits({**self.text(ids), **self.padding(mask, style)}))
        n, (one, other) = self.short, found
        right = self.fault(one[0], other[0], self.alone[self.long]) or self.fault(
            one[1, :n], other[1, :n], self.alone[n]
        )
        return _Faults(right, self.fault(one[2, -n:], other[2, -n:], self.alone[n]))

    def _rows(self, filler: Tensor) -> tuple[Tensor, Tensor]:
        n = self.short
        ids, mask = filler.repeat(3, 1), torch.ones(3, self.long, dtype=torch.long)
        ids[0], ids[1, :n], ids[2, -n:] = self.tokens, self.tokens[:n], self.tokens[:n]
        mask[1, n:], mask[2, :-n] = 0, 0
        return ids, mask

    def packed(self, style: Style) -> _Faults:
        """Pass the long row between two short ones."""
        lengths = (self.short, self.long, self.short)
        positions = torch.cat([torch.arange(n) for n in lengths])[None].to(self.device)
        keywords, found = packed_keywords(self.model, style, positions), []
        for around in (self.tokens, *self.around):
            ids = torch.cat([around[: self.short], self.tokens, around[: self.short]])[None]
            found.append(self.logits({**self.text(ids), **keywords})[0].split(lengths))
        same, one, other = found
        fault = self.fault(one[1], other[1], self.alone[self.long])
        for part in (same[0], same[2]):
            fault = fault or self.fault(part, part, self.alone[self.short])
        return _Faults(fault, fault)

    def packed_rows(self, style: Style) -> _Faults:
        """Pass two packed rows, whose sequences part in different places."""
        n, short, long = self.short, self.tokens[: self.short], self.tokens
        positions = [torch.arange(length) for length in (n, self.long)]
        told = torch.stack([torch.cat(positions), torch.cat(positions[::-1])]).to(self.device)
        found = []
        for around in self.around:
            ids = torch.stack([torch.cat([around[:n], long]), torch.cat([around, short])])
            found.append(self.logits({**self.text(ids), **packed_keywords(self.model, style, told)}))
        one, other = found
        fault = self.fault(one[0, n:], other[0, n:], self.alone[self.long])
        fault = fault or self.fault(one[1, -n:], other[1, -n:], self.alone[n])
        return _Faults(fault, fault)

    def generated(self, style: Style) -> _Faults:
        """Generate behind the long row, then behind both, the short one padded on the left."""
        require("transformers")
        from transformers import GenerationConfig

        ids, mask = self._rows(self.around[0])
        with _changed([(self.model, "generation_config", GenerationConfig(pad_token_id=0))]):
            right = self._continued(ids[:1], mask[:1], style)
            if right:
                return _Faults(right, right)
            try:
                return _Faults("", self._continued(ids[[0, 2]], mask[[0, 2]], style))
            except Exception as error:  # a cache that knows no padding
                return _Faults("", _failure(error))

    def _continued(self, ids: Tensor, mask: Tensor, style: Style) -> str:
        keywords = {"input_ids": ids, **self.text(ids), **self.padding(mask, style)}
        made = self.model.generate(
            **{name: value.to(self.device) for name, value in keywords.items()},
            max_new_tokens=_STEPS, min_new_tokens=_STEPS, do_sample=False, num_beams=1, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        for row in range(len(ids)):
            text = torch.cat([ids[row, mask[row] > 0], made.sequences[row, -_STEPS:].cpu()])
            found = torch.stack([step[row].double().cpu() for step in made.logits])
            alone = self.logits({"input_ids": text[None]})[0, -_STEPS - 1 : -1]
            if fault := self.fault(found, found, alone):
                return fault
        return ""


def _plain_tokens(model: Any) -> Tensor:
    """Return tokens (T,) of text: random ones that no setting names (padding, images, ends, ...)."""
    named: set[int] = set()

    def collect(settings: dict[str, Any]) -> None:
        for name, value in settings.items():
            if isinstance(value, dict):
                collect(value)
            elif isinstance(value, int) and name.endswith(("_id", "_index")):
                named.add(value)

    collect(model.config.to_dict())
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 0) or embedding_of(model).num_embeddings)
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0)).tolist()
    plain = [token for token in order if token not in named] or order
    return torch.tensor((plain * _LONG)[:_LONG])


def _short_windows(model: Any) -> list[tuple[Any, str, Any]]:
    """Return what makes the windows of a model shorter than the probe's rows."""
    return [
        (owner, name, _WINDOW)
        for owner in (model.config.get_text_config(), *model.modules())
        for name in _WINDOWS
        if type(value := owner.__dict__.get(name)) is int and value > _WINDOW
    ]


def _routers_off(model: Any) -> list[tuple[Any, str, Any]]:
    """Return what leaves the loss of a router out, which fails by masks of other shapes and is not looked at."""
    owners = {id(config): config for config in (model.config, model.config.get_text_config())}
    name = "output_router_logits"
    return [(config, name, False) for config in owners.values() if getattr(config, name, False)]


def _adapters_off(model: Any) -> list[tuple[Any, str, Any]]:
    """Return what switches the adapters of PEFT off: mixed ones belong to the rows of another batch."""
    return [
        (module, "_disable_adapters", True)
        for module in model.modules()
        if getattr(module, "_disable_adapters", None) is False and not getattr(module, "merged", False)
    ]


def _undecorated(model: Any) -> list[tuple[Any, str, Any]]:
    """Return what takes away whatever was put around the forward of a fused model, inside of which this may run.

    accelerate puts one `torch.autocast` around it, which, entered again inside of itself, forgets what was before: it
    would leave autocast switched on.
    """
    fused = model.__dict__.get("_mopl_fused_forward")
    return [] if fused is None else [(model, "forward", fused)]


@contextlib.contextmanager
def _changed(attributes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Give objects other attributes inside a `with` block."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in attributes]
    try:
        for owner, name, value in attributes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
