"""Language models that read the trade-off in front of each text: what kinds of these have in common.

    rows of text          [pad pad t0 t1 t2]       T positions, padded on either side
    what the model sees   [pad pad v0 .. v(k-1) t0 t1 t2]       k + T positions
    what comes back       the outputs of the T positions of the text

A subclass says what stands in front, tokens or embeddings; where it stands `ExtendedRows` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mopl._arguments import check_positive, readable, shape_of
from mopl._counted import counted, there_are
from mopl._renamed import renamed_keywords
from mopl._rows import arranged, generation_keywords
from mopl.conditioning._extended_rows import ExtendedRows
from mopl.conditioning.causal_lm import check_prompts, check_text, count_new_tokens, generate_option
from mopl.conditioning.sampling import Weights, check_weights
from mopl.conditioning.weighted import WeightedModel


class PromptedModel(WeightedModel):
    """A causal language model with the trade-off of each row in front of its text."""

    BY: ClassVar[str]  # how it is told, in errors
    NOT_GENERATED_WITH: ClassVar[tuple[str, ...]] = ("past_key_values",)  # options of `generate`
    SCORES_LAST: ClassVar[bool] = True  # whether a fused head is spared what is in front, where all rows have as much
    _bos: int | None = None  # the token that begins a text, if the trade-off stands behind it

    @property
    def arranges_rows(self) -> bool:
        """Positions and mask follow from those of the text and what is in front of it."""
        return True

    @property
    def takes_packed_rows(self) -> bool:
        """Each sequence has a trade-off of its own in front."""
        return True

    @renamed_keywords(objective_temperature="beta")
    def forward(
        self,
        input_ids: Tensor | None = None,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        weights: Weights | None = None,  # (m,) or (B, m)
        beta: Tensor | Sequence[float] | None = None,  # (m,), (1, m) or (B, m)
        position_ids: Tensor | None = None,  # (B, T)
        labels: Tensor | None = None,  # (B, T)
        inputs_embeds: Tensor | None = None,  # (B, T, d)
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model on text behind the trade-off of each row.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 1 where a token exists; padding may be on either side. With a cache it covers the
                text of the cache too, as ever, and never what is in front of the text.
            weights: w, (m,) or (B, m), or (S, m) for S packed sequences; on the simplex. Required, but for the
                reference, where they change nothing. Their values are looked at where that makes nothing wait: on
                a CPU, and not in compiled code.
            beta: β, of a model that `takes_beta`. (`temperature` is the fused head's: what logits are divided by.)
            position_ids: (B, T), positions of the text, counted from 0; from the mask by default. Without a mask they
                mean a packed row (1, N), as everywhere in transformers: positions start again at 0 with each sequence,
                and each sequence gets a trade-off of its own.
            labels: (B, T); the model's own loss. The first token of a row is not predicted, as without a trade-off.
            inputs_embeds: (B, T, d), in place of `input_ids`; not of a model that reads words.
            past_key_values: A cache. An empty one takes the trade-off in; later calls pass new tokens only.
            **kwargs: Keywords of the model's forward, `targets` and the like of a fused model included.

        Returns:
            What the model returns. `logits`, `hidden_states` and log-probabilities are those of the T positions of the
            text, where a token with words behind it, which begins the text, has those of the last word; `attentions`
            and the cache are over all k + T.

        Raises:
            ValueError: If weights are missing or off the simplex, a β is not positive, or a shape is wrong.
            UnsupportedModelError: If the model takes virtual tokens, or rows like this, otherwise than as tokens.
        """
        text = input_ids if inputs_embeds is None else inputs_embeds
        if text is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("pass either input_ids (B, T) or inputs_embeds (B, T, d)")
        if not isinstance(text, Tensor) or text.ndim != (2 if inputs_embeds is None else 3):
            got = shape_of(text) if isinstance(text, Tensor) else type(text).__name__
            raise ValueError(f"the text has shape {got}; pass input_ids (B, T) or inputs_embeds (B, T, d)")
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        given = self._unless_fixed(weights=weights, beta=beta)
        rows, text = self._extended(text, attention_mask, position_ids, past, given, kwargs)
        kwargs |= {"labels": labels, "past_key_values": past_key_values}
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        rows.adapt(kwargs, last=self.SCORES_LAST)
        kwargs["input_ids" if text.ndim == 2 else "inputs_embeds"] = text
        kwargs |= self._arrangement(rows, position_ids)
        if "targets" not in kwargs:  # a fused model arranges by itself
            kwargs = arranged(self.causal_lm, kwargs)
        return rows.cut(self.model(**kwargs))

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

        The trade-off enters once and lives in the cache from then on (transformers always uses one here), so sampling,
        beams and `num_return_sequences` work as ever.

        Args:
            input_ids: (B, T), padded on the left.
            attention_mask: (B, T); may be left out where nothing is padded.
            weights: w, (m,) or (B, m), on the simplex.
            beta: β, of a model that `takes_beta`.
            **kwargs: Keywords of `generate` of transformers. `max_length` counts text, not what is in front of it.

        Returns:
            What `generate` of transformers returns: the prompts' tokens, without words in front, with the new ones.

        Raises:
            ValueError: If weights are missing or off the simplex, rows are padded on the right, or an option cannot
                work with what is in front (assisted decoding and chunked prefill with virtual tokens).
        """
        own = self.causal_lm.generation_config
        config = kwargs.get("generation_config") or own
        mask = check_prompts(input_ids, attention_mask, own if config.pad_token_id is None else config)
        if self._is_reference:
            kwargs |= generation_keywords(self.causal_lm, mask)
            return self.model.generate(input_ids=input_ids, attention_mask=mask, **kwargs)
        given = self._unless_fixed(weights=weights, beta=beta)
        if "weights" in given:
            given["weights"] = check_weights(given["weights"], len(self.record.objectives))
        if "beta" in given:
            given["beta"] = check_positive(torch.as_tensor(given["beta"]), "beta")
        for name in self.NOT_GENERATED_WITH:
            if generate_option(name, kwargs, own) is not None:
                raise ValueError(f"{name} cannot be used with {self.BY}; leave it out")
        rows, text = self._extended(input_ids, mask, None, 0, given, kwargs)
        kwargs |= self._generation_arrangement(rows)
        count_new_tokens(kwargs, config, input_ids.shape[1])
        if text.ndim == 3:  # the tokens, too: processors see them, and they come back
            return self.model.generate(input_ids=input_ids, inputs_embeds=text, **kwargs)
        made = self.model.generate(input_ids=text, **kwargs)
        sequences = made if isinstance(made, Tensor) else made.sequences
        prompts = input_ids.to(sequences.device).repeat_interleave(len(sequences) // len(input_ids), 0)
        sequences = torch.cat([prompts, sequences[:, text.shape[1] :]], 1)
        if isinstance(made, Tensor):
            return sequences
        made.sequences = sequences
        return made

    def _extended(
        self,
        text: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        past: int,
        given: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> tuple[ExtendedRows, Tensor]:
        """Check what comes with a text (B, T) or (B, T, d); return its rows with what is in front, tokens or not."""
        check_text(text, mask, position_ids, past)
        for name in ("token_type_ids", "cache_position", "kl_weight"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} cannot be used with {self.BY}; leave it out")
        if kwargs.get("return_dict") is False:
            raise ValueError(
                "return_dict=False would return a tuple whose outputs in front of the text cannot be told; leave it out"
            )
        count = len(text)
        if mask is None and position_ids is not None:
            if not bool((position_ids[0, :1] == 0).all()):
                raise ValueError(
                    "position_ids of a packed row must start at 0 with each sequence; pass attention_mask too"
                )
            position_ids = position_ids.to(text.device)
            count = int((position_ids == 0).sum())
        if self._is_reference:
            return ExtendedRows(text, [0] * count, mask, position_ids, past), text
        m, given = len(self.record.objectives), dict(given)
        for name, value in given.items():
            given[name] = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
            if tuple(given[name].shape[:-1]) not in ((), (1,), (count,)):
                raise ValueError(
                    f"{name} has shape {shape_of(given[name])} but {there_are(count, 'row')} and "
                    f"{counted(m, 'objective')}; pass (m,) = ({m},) or (B, m) = ({count}, {m})"
                )
            if given[name].shape[-1:] == (m,) and readable(given[name]):  # other shapes are said by who takes them
                check = check_weights if name == "weights" else check_positive
                check(given[name], name=name)
        counts, front = self._front(text, count, past, **given)
        rows = ExtendedRows(text, counts, mask, position_ids, past, self._bos)
        if front is None:
            return rows, text
        if front.ndim > text.ndim:
            # The embedding module's output and not its weight: scales and adapters of embeddings are inside.
            embedding = self.causal_lm.get_input_embeddings()
            text = embedding(text.to(embedding.weight.device))
        return rows, rows.join(front, text)

    # ---------------------------------------------------------------- what a subclass says

    def _front(
        self, text: Tensor, count: int, past: int, *, weights: Tensor | None = None, beta: Tensor | None = None
    ) -> tuple[Sequence[int], Tensor | None]:
        """Return k of each of `count` rows, and what stands in front: tokens (B, k) or embeddings (B, k, d).

        Rows that get fewer are filled up; behind a cache, which has it already, the second is None.
        """
        raise NotImplementedError

    def _arrangement(self, rows: ExtendedRows, position_ids: Tensor | None) -> dict[str, Any]:
        """Return the mask and the positions of a forward pass, where there are any."""
        found = {"attention_mask": rows.mask()} if rows.padded else {}
        return found if position_ids is None else {**found, "position_ids": rows.positions(position_ids)}

    def _generation_arrangement(self, rows: ExtendedRows) -> dict[str, Any]:
        """Return the mask and the positions that `generate` of transformers is told."""
        mask = rows.mask()
        return {"attention_mask": mask, **generation_keywords(self.causal_lm, mask)}
