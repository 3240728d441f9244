"""Any Hugging Face causal language model, conditioned on a trade-off by the virtual tokens of a `HyperPrompt`.

    rows of text          [pad pad t0 t1 t2]       T positions, padded on either side
    what the model sees   [pad pad v0 .. v(k-1) t0 t1 t2]       k + T positions
    what comes back       the outputs of the T positions of the text

The virtual tokens stand right before the first token of each row, so a padded row is the row alone, sliding windows
included, and text keeps its place from the right: the outputs of the text are always the last T.

Two conventions of positions (`positions=`):

* `"hf"`: as Hugging Face models and PEFT count: virtual tokens at 0 .. k-1, text from k on.
* `"paper"`: as figure 4 of Ren et al. (UAI 2025) draws it: positions are added to the text before the virtual tokens
  come in front. Text is at 0 .. T-1 and virtual tokens have no position: no position embedding is added to them
  (GPT-2 and its like), or they are not rotated, which is position 0 (rotary models).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor, nn

from mopl._arguments import check_choice, check_positive, shape_of
from mopl._bounds import check_bounds
from mopl._renamed import renamed_keywords
from mopl._rows import arranged, check_from_zero, generation_keywords
from mopl._tensor_files import check_fits, load_state, read_tensors
from mopl.conditioning._prefix_layout import Layout, PackedLayout, silence_positions
from mopl.conditioning.causal_lm import check_model, check_prompts, check_text, count_new_tokens, is_peft
from mopl.conditioning.hyper_prompt import HyperPrompt
from mopl.conditioning.sampling import Weights, check_weights
from mopl.conditioning.saved_models import (
    CONFIG_FILE,
    REMEDY,
    Record,
    TuningRecord,
    base_with_adapters,
    fitting,
)
from mopl.conditioning.weighted import WeightedModel

Positions = Literal["hf", "paper"]
POSITIONS = ("hf", "paper")
WEIGHTS_FILE = "hyper_prompt.safetensors"


class _Prompt(msgspec.Struct, forbid_unknown_fields=True):
    objectives: int
    virtual_tokens: int
    rank: int
    hidden: int
    temperature: bool = False
    width: int | None = None


class _Record(Record):
    adapter: str | None
    positions: str
    prompt: _Prompt

    @staticmethod
    def check(record: Mapping[str, Any]) -> None:
        sizes, objectives = record["prompt"], len(record["objectives"])
        if sizes["objectives"] != objectives:
            raise ValueError(f"prompt.objectives is {sizes['objectives']} but there are {objectives} objectives")
        check_bounds(sizes)


class HyperPromptModel(WeightedModel):
    """A causal language model that takes weights of objectives.

    The base model is frozen. What is trained is the prompt, and the adapters if the model is a PEFT model (LoRA and its
    like). A fused model (`mopl.alignment.fuse`) keeps its way to log-probabilities; fuse before wrapping.

    Args:
        model: A causal language model of transformers, or a PEFT model around one.
        hyper_prompt: The prompt; its `hidden` is the width of the model's token embeddings.
        record: Names of the objectives and how the model was trained; `objective_1`, ... by default.
        positions: `"hf"` or `"paper"`, see above.

    Raises:
        ValueError: If widths or numbers of objectives differ, or the model takes no embeddings as inputs, carries a
            prompt of its own, or knows no positions that `"paper"` could set.
    """

    KIND, SCHEMA, WEIGHTS_FILE = "HyperPromptModel", _Record, WEIGHTS_FILE

    def __init__(
        self,
        model: nn.Module,
        hyper_prompt: HyperPrompt,
        *,
        record: TuningRecord | Sequence[str] | None = None,
        positions: Positions = "hf",
    ) -> None:
        super().__init__()
        check_choice(positions, POSITIONS, "positions")
        self.record = TuningRecord.of(record, hyper_prompt.objectives)
        self.model = model
        self.hyper_prompt = hyper_prompt
        self.positions: Positions = positions
        base = self.causal_lm
        check_model(model, base, hyper_prompt)
        self._takes_positions = "position_ids" in inspect.signature(type(base).forward).parameters
        self._absolute = positions == "paper" and silence_positions(base, self._takes_positions)
        if not is_peft(model):
            model.requires_grad_(False)
        # The prompt lives where the embeddings are; its precision is its own.
        hyper_prompt.to(base.get_input_embeddings().weight.device)

    @property
    def takes_beta(self) -> bool:
        """Whether the prompt also depends on β."""
        return self.hyper_prompt.takes_beta

    @property
    def virtual_tokens(self) -> int:
        """k, the positions in front of each row."""
        return self.hyper_prompt.virtual_tokens

    @property
    def takes_embeddings(self) -> bool:
        """The model inside is called with embeddings: those of the prompt are no tokens'."""
        return True

    @property
    def arranges_rows(self) -> bool:
        """Positions follow from the mask and the virtual tokens."""
        return True

    @property
    def takes_packed_rows(self) -> bool:
        """Each sequence has virtual tokens of its own."""
        return True

    @torch.no_grad()
    def prefix_of(self, weights: Weights, beta: Any = None) -> Tensor:
        """Return the virtual tokens (k, d) of one trade-off.

        Raises:
            ValueError: If they stand at no position of their own, which no plain model has.
        """
        if self.positions != "hf":
            raise ValueError(
                f"the model was trained with positions={self.positions!r}, which no plain model has: virtual tokens "
                "there stand at no position of their own. Generate with mopl, or train with positions='hf'"
            )
        return self.hyper_prompt(weights, beta)[0]

    @torch.no_grad()
    def set_prefix_from_tokens(self, token_ids: Tensor | Sequence[int]) -> None:
        """Start P at the model's own embeddings of tokens: cut to k of them, or repeated until there are k."""
        embedding = self.causal_lm.get_input_embeddings()
        ids = torch.as_tensor(token_ids, dtype=torch.long, device=embedding.weight.device)
        if ids.ndim != 1:
            raise ValueError(f"token_ids has shape {shape_of(ids)} but must be (n,)")
        self.hyper_prompt.set_prefix(embedding(ids))

    @renamed_keywords(objective_temperature="beta")
    def forward(
        self,
        input_ids: Tensor | None = None,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        weights: Tensor | None = None,  # (m,) or (B, m)
        beta: Tensor | None = None,  # (m,), (1, m) or (B, m)
        position_ids: Tensor | None = None,  # (B, T)
        labels: Tensor | None = None,  # (B, T)
        inputs_embeds: Tensor | None = None,  # (B, T, d)
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model on text behind the prompt of each row's weights.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 1 where a token exists; padding may be on either side. With a cache it covers the
                text of the cache too, as ever, and never the virtual tokens.
            weights: w, (m,) or (B, m), or (S, m) for S packed sequences. Required, but for the reference, where they
                change nothing.
            beta: β, for a prompt that takes it. (`temperature` is the fused head's: what logits are divided by.)
            position_ids: (B, T), positions of the text, counted from 0; from the mask by default. Without a mask they
                mean a packed row (1, N), as everywhere in transformers: positions start again at 0 with each sequence,
                and each sequence gets virtual tokens of its own.
            labels: (B, T); the model's own loss. The first token of a row is not predicted, as without a prompt.
            inputs_embeds: (B, T, d), in place of `input_ids`.
            past_key_values: A cache. An empty one takes the prompt in; later calls pass new tokens only.
            **kwargs: Keywords of the model's forward, `targets` and the like of a fused model included.

        Returns:
            What the model returns. `logits`, `hidden_states` and log-probabilities are those of the T positions of the
            text; `attentions` and the cache are over all k + T.

        Raises:
            ValueError: If weights are missing or a shape is wrong.
            UnsupportedModelError: If the model takes virtual tokens, or rows like this, otherwise than as tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids (B, T) or inputs_embeds (B, T, d)")
        content = input_ids if inputs_embeds is None else inputs_embeds
        assert content is not None
        if content.ndim != (2 if inputs_embeds is None else 3):
            raise ValueError(
                f"the text has shape {shape_of(content)}; pass input_ids (B, T) or inputs_embeds (B, T, d)"
            )
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        given = self._unless_fixed(weights=weights, beta=beta)
        layout = self._layout(content, attention_mask, position_ids, past, kwargs)
        text: dict[str, Any] = {"inputs_embeds" if input_ids is None else "input_ids": content}
        if layout.enters:
            text = {"inputs_embeds": self._embed_with_prompt(content, layout, **given)}
            labels = layout.shift_labels(labels)
        kwargs |= {"labels": labels, "past_key_values": past_key_values}
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        layout.adapt(kwargs)
        if self._takes_positions or isinstance(layout, PackedLayout):
            kwargs["position_ids"] = self._positions(layout, position_ids)
        kwargs |= {**text, "attention_mask": layout.mask(required=self.positions == "paper")}
        if "targets" not in kwargs:  # a fused model arranges by itself
            kwargs = arranged(self.causal_lm, kwargs)
        return layout.cut(self.model(**kwargs))

    @renamed_keywords(objective_temperature="beta")
    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        weights: Weights | None = None,  # (m,) or (B, m)
        beta: Tensor | Sequence[float] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate with one weight vector for each row.

        The prompt enters once and lives in the cache from then on (transformers always uses one here), so sampling,
        beams and `num_return_sequences` work as ever.

        Args:
            input_ids: (B, T), padded on the left.
            attention_mask: (B, T); may be left out where nothing is padded.
            weights: w, (m,) or (B, m), on the simplex.
            beta: β, for a prompt that takes it.
            **kwargs: Keywords of `generate` of transformers. `max_length` counts text, not virtual tokens.

        Returns:
            What `generate` of transformers returns: the prompts' tokens with the new ones.

        Raises:
            ValueError: If weights are missing or off the simplex, rows are padded on the right, or an option cannot
                work with a prompt (assisted decoding, chunked prefill).
        """
        attention_mask = check_prompts(input_ids, attention_mask, self.causal_lm.generation_config)
        if self._is_reference:
            kwargs |= generation_keywords(self.causal_lm, attention_mask)
            return self.model.generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        given = self._unless_fixed(weights=weights, beta=beta)
        if "weights" in given:
            given["weights"] = check_weights(given["weights"], self.hyper_prompt.objectives)
        if "beta" in given:
            given["beta"] = check_positive(torch.as_tensor(given["beta"]), "beta")
        options = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size", "past_key_values")
        config = kwargs.get("generation_config") or self.causal_lm.generation_config
        for name in options:
            if kwargs.get(name, getattr(config, name, None)) is not None:
                raise ValueError(f"{name} cannot be used with a prompt of virtual tokens; leave it out")

        layout = self._layout(input_ids, attention_mask, None, 0, kwargs)
        embeds = self._embed_with_prompt(input_ids, layout, **given)
        mask = layout.mask(required=True)
        assert mask is not None
        if self._takes_positions:
            kwargs["position_ids"] = self._positions(layout, None)
        first = generation_keywords(self.causal_lm, mask, embeds=True)
        if self.positions == "hf":
            kwargs |= first
        count_new_tokens(kwargs, config, layout.length)
        return self.model.generate(input_ids=input_ids, inputs_embeds=embeds, attention_mask=mask, **kwargs)

    # ---------------------------------------------------------------- parts of the two

    def _embed_with_prompt(
        self,
        content: Tensor,
        layout: Layout | PackedLayout,
        weights: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> Tensor:  # (B, k + T, d)
        """Return the embeddings of token ids (or embeddings) with the virtual tokens in place."""
        batch, m = layout.batch, self.hyper_prompt.objectives
        if weights is None:
            raise ValueError(f"weights are missing; pass one for each of {', '.join(self.record.objectives)}")
        if tuple(weights.shape[:-1]) not in ((), (1,), (batch,)):
            raise ValueError(
                f"weights has shape {shape_of(weights)} but there are {batch} rows and {m} objectives; "
                f"pass (m,) = ({m},) or (B, m) = ({batch}, {m})"
            )
        if beta is not None and tuple(beta.shape) == (batch, m):
            weights = weights.expand(batch, -1)
        prefix = self.hyper_prompt(weights, beta).expand(batch, -1, -1)
        if content.ndim == 2:
            # The embedding module's output and not its weight: scales and adapters of embeddings are inside.
            embedding = self.causal_lm.get_input_embeddings()
            content = embedding(content.to(embedding.weight.device))
        return layout.join(prefix.to(content), content)

    def _positions(self, layout: Layout | PackedLayout, position_ids: Tensor | None) -> Tensor | None:
        if self.positions == "hf" or self._is_reference:
            return layout.positions(position_ids, of_prefix="count")
        if isinstance(layout, PackedLayout):
            raise ValueError("packed sequences need positions that count up; use positions='hf' or pad")
        implementation = getattr(self.causal_lm.config, "_attn_implementation", None) or ""
        if "flash" in implementation:
            raise ValueError(
                f"positions='paper' cannot run with attn_implementation={implementation!r}, which takes positions that "
                "do not count up for packed sequences; load the model with 'sdpa', or use positions='hf'"
            )
        check_from_zero(self.causal_lm)
        return layout.positions(position_ids, of_prefix="none" if self._absolute else "zero")

    def _layout(
        self, text: Tensor, mask: Tensor | None, position_ids: Tensor | None, past: int, kwargs: dict[str, Any]
    ) -> Layout | PackedLayout:
        """Check what comes with a text (B, T) or (B, T, d), and return where its virtual tokens stand."""
        check_text(text, mask, position_ids, past)
        for name in ("token_type_ids", "cache_position"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} cannot be used with a prompt of virtual tokens; leave it out")
        if kwargs.get("return_dict") is False:
            raise ValueError("return_dict=False would return a tuple whose prompt outputs cannot be told; leave it out")
        virtual = 0 if self._is_reference else self.hyper_prompt.virtual_tokens
        if mask is None and position_ids is not None:
            return PackedLayout(position_ids.to(text.device), virtual)
        return Layout(text, virtual, mask, past)

    # ---------------------------------------------------------------- files

    def _state(self) -> dict[str, Tensor]:
        return self.hyper_prompt.state_dict()

    def _described(self) -> dict[str, Any]:
        prompt = self.hyper_prompt
        sizes = {name: getattr(prompt, name) for name in ("objectives", "virtual_tokens", "rank", "hidden")}
        return {
            "base_model": self._base_name, "adapter": next(iter(self._adapters), None), "positions": self.positions,
            "prompt": {**sizes, "temperature": prompt.takes_beta, "width": prompt.width},
        }  # fmt: skip

    @classmethod
    def _load(
        cls, folder: Path, config: dict[str, Any], model: nn.Module | None, *, trainable: bool, **options: Any
    ) -> HyperPromptModel:
        weights, sizes = folder / WEIGHTS_FILE, dict(config["prompt"])
        sizes["takes_beta"] = sizes.pop("temperature", False)  # its first name
        with fitting(folder / CONFIG_FILE):
            check_fits(weights, lambda: HyperPrompt(**sizes), remedy=REMEDY)
        base = base_with_adapters(config, folder, model, options, trainable=trainable)
        with fitting(folder / CONFIG_FILE):
            prompt = HyperPrompt(**sizes)
            prompt.to(read_tensors(weights, remedy=REMEDY)["prefix"].dtype)
            load_state(prompt, weights, remedy=REMEDY)
            prompt.requires_grad_(trainable)
            return cls(base, prompt, record=TuningRecord.read(config), positions=config["positions"])
