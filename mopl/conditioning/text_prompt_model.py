"""Any Hugging Face causal language model, conditioned on a trade-off by words that a `TextPrompt` writes into each row.

    rows of text          [pad <s> t1 t2]
    what the model sees   [pad <s> w0 .. w(k-1) t1 t2]       `TextPrompt.prepend_ids`, row by row
    what comes back       the outputs of the T positions of the text

The model needs nothing that plain ones lack, so a server can serve it as it is: whoever writes the words chooses the
trade-off.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopl._arguments import shape_of
from mopl._extras import require
from mopl._hub import naming_own_code
from mopl._renamed import renamed_keywords
from mopl._rows import arranged, generation_keywords
from mopl._tensor_files import check_shapes
from mopl.conditioning._written_rows import WrittenRows, mask_behind_words
from mopl.conditioning.causal_lm import check_no_prompt, check_prompts, check_text, count_new_tokens, is_peft
from mopl.conditioning.sampling import Weights
from mopl.conditioning.saved_models import (
    CONFIG_FILE,
    REMEDY,
    Record,
    TuningRecord,
    base_of_adapter,
    base_with_adapters,
    fitting,
)
from mopl.conditioning.text_prompt import TextPrompt
from mopl.conditioning.weighted import WeightedModel

_FORM = ("item", "separator", "digits", "placement")  # of a `TextPrompt`: in files where they are not the default


class _Record(Record):
    template: str
    adapter: str | None = None
    whole: bool = False  # whether the folder holds the model itself
    item: str | None = None
    separator: str | None = None
    digits: int | None = None
    placement: str | None = None


class TextPromptModel(WeightedModel):
    """A causal language model that reads weights of objectives in words.

    Args:
        model: A causal language model of transformers, fused or not, or a PEFT model around one. Trained are its
            adapters, or all of a plain model that is not frozen.
        text_prompt: What writes the words.
        tokenizer: The model's tokenizer.
        record: Names of the objectives and how the model was trained; those of `text_prompt` by default.

    Raises:
        ValueError: If the record has other objectives than the prompt, or the model a prompt of its own.
    """

    KIND, SCHEMA, WEIGHTS_FILE = "TextPromptModel", _Record, None
    text_prompt: TextPrompt  # type: ignore[assignment]

    def __init__(
        self,
        model: nn.Module,
        text_prompt: TextPrompt,
        tokenizer: Any,
        *,
        record: TuningRecord | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        names = text_prompt.objectives
        self.record = TuningRecord.of(names if record is None else record, len(names))
        if self.record.objectives != names:
            raise ValueError(f"record names {self.record.objectives} but text_prompt writes {names}")
        check_no_prompt(model)
        self.model, self.text_prompt = model, text_prompt
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # that of a processor, too

    @property
    def takes_beta(self) -> bool:
        """Whether the words also tell β."""
        return self.text_prompt.takes_beta

    @property
    def virtual_tokens(self) -> int:
        """How many tokens the words are, at single objectives and at equal weights: others may be shorter or longer."""
        each = torch.eye(len(self.record.objectives), dtype=torch.float64)
        some = [*each.tolist(), (each.sum(0) / len(each)).tolist()]
        return max(len(self.write_weights([], w, [1.0] * len(w) if self.takes_beta else None)) for w in some)

    @property
    def arranges_rows(self) -> bool:
        """Rows are arranged once the words are in."""
        return True

    @property
    def takes_packed_rows(self) -> bool:
        """Words are written into each sequence."""
        return True

    def write_weights(self, input_ids: Sequence[int] | Tensor, weights: Weights, beta: Any = None) -> list[int]:
        """Return the tokens of a prompt with the trade-off written into them; see `TextPrompt.prepend_ids`."""
        return self.text_prompt.prepend_ids(input_ids, weights, self.tokenizer, beta)  # type: ignore[arg-type]

    @renamed_keywords(objective_temperature="beta")
    def forward(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        weights: Weights | None = None,  # (m,) or (B, m)
        beta: Tensor | Sequence[float] | None = None,  # (m,), (1, m) or (B, m)
        position_ids: Tensor | None = None,  # (B, T)
        labels: Tensor | None = None,  # (B, T)
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model on text with the words of each row's weights.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 1 where a token exists; padding may be on either side. With a cache it covers the
                text of the cache too, and never the words.
            weights: w, (m,) or (B, m), or (S, m) for S packed sequences, on the simplex. Required, but for the
                reference, where they change nothing.
            beta: β, for a template that has it.
            position_ids: (B, T), of the text, counted from 0; from the mask by default. Without a mask they mean a
                packed row (1, N), whose sequences get words of their own.
            labels: (B, T); the model's own loss. The first token of a row is not predicted, as without words.
            past_key_values: A cache. An empty one takes the words in; later calls pass new tokens only.
            **kwargs: Keywords of the model's forward, `targets` and the like of a fused model included.

        Returns:
            What the model returns. `logits`, `hidden_states` and log-probabilities are those of the T positions of the
            text, where a token that begins the text has those of the last word; `attentions` and the cache are over
            words and text.

        Raises:
            ValueError: If weights are missing or off the simplex, or a shape is wrong.
            UnsupportedModelError: If the model cannot take rows like this.
        """
        if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.shape[1] < 1:
            raise ValueError("input_ids must be a tensor (B, T): words are written between tokens")
        given = self._unless_fixed(weights=weights, beta=beta)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        rows: dict[str, Any] = {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, "labels": labels,
            "past_key_values": past_key_values,
        }  # fmt: skip
        if self._is_reference:
            return self._run(rows, kwargs)
        for name in ("inputs_embeds", "token_type_ids", "cache_position"):
            if name in kwargs:
                raise ValueError(f"{name} cannot be used with a trade-off in words; leave it out")
        if kwargs.get("return_dict") is False:
            raise ValueError(
                "return_dict=False would return a tuple whose outputs of words cannot be told; leave it out"
            )
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        self._check_rows(input_ids, attention_mask, position_ids, past)
        packed = attention_mask is None and position_ids is not None and not past
        count = int((position_ids == 0).sum()) if packed else len(input_ids)
        words = self._words(count, **given)
        if past:
            return self._run(self._behind_cache(rows, words, past), kwargs)
        written = WrittenRows(input_ids, words, attention_mask, position_ids, self._bos)
        rows |= {
            "input_ids": written.input_ids, "attention_mask": written.attention_mask,
            "position_ids": written.position_ids, "labels": written.labels(labels),
        }  # fmt: skip
        kept: Any = kwargs.pop("logits_to_keep", 0)
        if packed and (kwargs.get("use_cache") or isinstance(kept, Tensor) or kept):
            raise ValueError("a packed row can use neither use_cache nor logits_to_keep; pass attention_mask, or none")
        if packed:
            kwargs["use_cache"] = False  # with a cache, transformers would not look for packed sequences
        elif written.uniform and (isinstance(kept, Tensor) or kept):
            kwargs["logits_to_keep"] = kept + written.longest if isinstance(kept, Tensor) else kept
        written.adapt(kwargs)
        output = written.cut(self._run(rows, kwargs))
        if not written.uniform and (isinstance(kept, Tensor) or kept):
            output.logits = output.logits[:, kept if isinstance(kept, Tensor) else slice(-kept, None)]
        return output

    def _run(self, rows: dict[str, Any], kwargs: dict[str, Any]) -> Any:
        kwargs = {**kwargs, **{name: value for name, value in rows.items() if value is not None}}
        if "targets" not in kwargs:  # a fused model arranges by itself
            kwargs = arranged(self.causal_lm, kwargs)
        return self.model(**kwargs)

    def _check_rows(self, text: Tensor, mask: Tensor | None, position_ids: Tensor | None, past: int) -> None:
        check_text(text, mask, position_ids, past)
        if mask is not None and not past and mask.shape[1] != text.shape[1]:
            raise ValueError(
                f"attention_mask covers {mask.shape[1]} positions but the text is {tuple(text.shape)} and no cache is"
            )
        if position_ids is not None and mask is None and int(position_ids[0, 0]) != 0:
            raise ValueError("position_ids of a packed row must start at 0 with each sequence; pass attention_mask too")

    def _behind_cache(self, rows: dict[str, Any], words: list[list[int]], past: int) -> dict[str, Any]:
        """Return what is passed for new tokens behind a cache that has the words."""
        counts = torch.tensor([len(each) for each in words])
        before = past - int(counts.max())  # positions of text in the cache
        mask, positions, length = rows["attention_mask"], rows["position_ids"], rows["input_ids"].shape[1]
        if mask is None and not bool((counts == counts[0]).all()):
            mask = torch.ones(len(words), before + length, dtype=torch.long, device=rows["input_ids"].device)
        if mask is not None:
            if mask.shape[1] != before + length:
                raise ValueError(
                    f"attention_mask covers {mask.shape[1]} positions of text but there are {before} in the cache and "
                    f"{length} in the call; pass (B, {before + length})"
                )
            mask = mask_behind_words(mask, counts)
        if positions is not None:
            positions = positions + counts.to(positions.device)[:, None]
        return {**rows, "attention_mask": mask, "position_ids": positions}

    def _words(self, rows: int, weights: Any = None, beta: Any = None) -> list[list[int]]:
        """Return the words of each row, as tokens."""
        given = self.conditions(weights, beta)
        each = []
        for name in ("weights", "beta"):
            values = given.get(name)
            if values is not None and tuple(values.shape[:-1]) not in ((), (1,), (rows,)):
                m = len(self.record.objectives)
                raise ValueError(
                    f"{name} has shape {shape_of(values)} but there are {rows} rows and {m} objectives; pass (m,) = "
                    f"({m},) or (B, m) = ({rows}, {m})"
                )
            # Lists, since texts are made of them: equal ones once.
            each.append([None] * rows if values is None else values.expand(rows, values.shape[-1]).tolist())
        found: dict[str, list[int]] = {}
        for w, b in zip(*each, strict=True):
            if (key := repr((w, b))) not in found:
                found[key] = self.write_weights([], w, b)
        return [found[repr(pair)] for pair in zip(*each, strict=True)]

    @property
    def _bos(self) -> int | None:
        return getattr(self.tokenizer, "bos_token_id", None)

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

        Args:
            input_ids: (B, T), padded on the left.
            attention_mask: (B, T); may be left out where nothing is padded.
            weights: w, (m,) or (B, m), on the simplex.
            beta: β, for a template that has it.
            **kwargs: Keywords of `generate` of transformers. `max_length` counts text, not words.

        Returns:
            What `generate` of transformers returns: the prompts' tokens, without the words, with the new ones.

        Raises:
            ValueError: If weights are missing or off the simplex, or rows are padded on the right.
        """
        config = kwargs.get("generation_config") or self.causal_lm.generation_config
        given, mask = self._unless_fixed(weights=weights, beta=beta), check_prompts(input_ids, attention_mask, config)
        ids = input_ids
        if not self._is_reference:
            if kwargs.get("past_key_values") is not None:
                raise ValueError("past_key_values cannot be used with a trade-off in words; leave it out")
            written = WrittenRows(input_ids, self._words(len(input_ids), **given), mask, None, self._bos)
            assert written.attention_mask is not None
            ids, mask = written.input_ids, written.attention_mask
            count_new_tokens(kwargs, config, input_ids.shape[1])
        kwargs |= generation_keywords(self.causal_lm, mask)
        made = self.model.generate(input_ids=ids, attention_mask=mask, **kwargs)
        sequences = made if isinstance(made, Tensor) else made.sequences
        prompts = input_ids.to(sequences.device).repeat_interleave(len(sequences) // len(input_ids), 0)
        sequences = torch.cat([prompts, sequences[:, ids.shape[1] :]], 1)
        if isinstance(made, Tensor):
            return sequences
        made.sequences = sequences
        return made

    # ---------------------------------------------------------------- files

    def _described(self) -> dict[str, Any]:
        prompt, plain = self.text_prompt, TextPrompt(self.text_prompt.objectives)
        form = {name: getattr(prompt, name) for name in _FORM if getattr(prompt, name) != getattr(plain, name)}
        whole = {} if is_peft(self.model) else {"whole": True}
        return {
            "base_model": self._base_name, "adapter": next(iter(self._adapters), None), "template": prompt.template,
            **form, **whole,
        }  # fmt: skip

    def _write(self, folder: Path, *, tokenizer: bool = True, **options: Any) -> None:
        """Write the adapter, or a plain model whole, and the tokenizer unless it is to be that of the base model."""
        super()._write(folder)
        if not is_peft(self.model):
            self.model.save_pretrained(str(folder))
        if tokenizer:
            self.tokenizer.save_pretrained(str(folder))

    @torch.no_grad()
    def load_weights(self, directory: str | os.PathLike[str]) -> None:
        """Load what was trained into this model, in place; see `WeightedModel.load_weights`."""
        super().load_weights(directory)
        if is_peft(self.model):
            return
        own = self.model.state_dict()
        found = _whole_model(Path(directory), {"dtype": self.model.dtype}).state_dict()
        shapes = ({name: value.shape for name, value in each.items()} for each in (found, own))
        check_shapes(Path(directory), *shapes, remedy=f"{REMEDY}; or pass the base model it is for")
        for name, value in found.items():
            own[name].copy_(value)

    @classmethod
    def _load(
        cls,
        folder: Path,
        config: dict[str, Any],
        model: nn.Module | None,
        *,
        trainable: bool,
        tokenizer: Any = None,
        **options: Any,
    ) -> TextPromptModel:
        source = config["base_model"] or getattr(model, "name_or_path", None)
        if tokenizer is None:
            tokenizer = _load_tokenizer(folder, source, options)
        with fitting(folder / CONFIG_FILE):
            form = {name: config[name] for name in ("template", *_FORM) if config.get(name) is not None}
            prompt = TextPrompt(tuple(config["objectives"]), **form)
        whole = config.get("whole", False)
        if whole and model is None:
            base = _whole_model(folder, options)
        else:
            base = base_with_adapters(config, folder, model, options, trainable=trainable)
        made = cls(base, prompt, tokenizer, record=TuningRecord.read(config))
        if whole:
            if model is not None:
                made.load_weights(folder)
            made.requires_grad_(trainable)
        return made


def _whole_model(folder: Path, options: Mapping[str, Any]) -> Any:
    """Return the causal language model that a folder holds."""
    require("transformers")
    from transformers import AutoModelForCausalLM

    with naming_own_code(str(folder)):
        return AutoModelForCausalLM.from_pretrained(str(folder), **{"trust_remote_code": False, **options})


def _load_tokenizer(folder: Path, base: str | None, options: Mapping[str, Any]) -> Any:
    """Return the tokenizer of a folder, or else that of the base model."""
    source = str(folder) if (folder / "tokenizer_config.json").is_file() else base
    if not source:
        raise ValueError(f"{folder} holds no tokenizer and names no base model; pass tokenizer")
    if not (Path(source) / "tokenizer_config.json").is_file():
        source = base_of_adapter(source) or source
    require("transformers")
    from transformers import AutoTokenizer

    with naming_own_code(source):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=options.get("trust_remote_code", False))
