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

from mopl._extras import require
from mopl._hub import naming_own_code
from mopl._restoring import freeze, frozen_parameters
from mopl._sharded import gathered
from mopl._tensor_files import check_shapes
from mopl.conditioning._prompted import PromptedModel
from mopl.conditioning.causal_lm import check_no_prompt, is_peft
from mopl.conditioning.merging import set_name
from mopl.conditioning.sampling import Weights
from mopl.conditioning.saved_models import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    CONFIG_FILE,
    REMEDY,
    Record,
    TuningRecord,
    base_of_adapter,
    base_with_adapters,
    fitting,
)
from mopl.conditioning.text_prompt import TextPrompt

_FORM = ("item", "separator", "digits", "placement")  # of a `TextPrompt`: in files where they are not the default


class _Record(Record):
    template: str
    adapter: str | None = None
    whole: bool = False  # whether the folder holds the model itself
    frozen: list[str] | None = None  # of a whole model; older files do not say
    item: str | None = None
    separator: str | None = None
    digits: int | None = None
    placement: str | None = None


class TextPromptModel(PromptedModel):
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
    BY = "a trade-off in words"
    SCORES_LAST = False  # as in older releases: sums over other rows are rounded otherwise
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
        self._was_trained = False
        self._frozen = frozen_parameters(model)
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
    def has_reference(self) -> bool:
        """Not where a plain model is trained itself, or was: what it was before is no longer here."""
        return is_peft(self.model) or not (self._was_trained or any(p.requires_grad for p in self.model.parameters()))

    @property
    def _saves_inside(self) -> bool:
        return True

    def write_weights(self, input_ids: Sequence[int] | Tensor, weights: Weights, beta: Any = None) -> list[int]:
        """Return the tokens of a prompt with the trade-off written into them; see `TextPrompt.prepend_ids`."""
        return self.text_prompt.prepend_ids(input_ids, weights, self.tokenizer, beta)  # type: ignore[arg-type]

    def _front(
        self, text: Tensor, count: int, past: int, *, weights: Tensor | None = None, beta: Tensor | None = None
    ) -> tuple[Sequence[int], Tensor | None]:
        if text.ndim != 2 or text.shape[1] < 1:
            raise ValueError("input_ids must be a tensor (B, T), not inputs_embeds: words are written between tokens")
        given = self.conditions(weights, beta)
        for name, value in given.items():
            if torch.finfo(value.dtype).bits == 16:  # these sum to 1 within their rounding, which is coarse
                value = value.double() / (value.double().sum(-1, keepdim=True) if name == "weights" else 1)
            # Lists, since texts are made of them: equal ones once.
            given[name] = value.expand(count, value.shape[-1]).tolist()
        rows = list(zip(given["weights"], given.get("beta", [None] * count), strict=True))
        written = {key: self.write_weights([], *row) for key, row in {repr(row): row for row in rows}.items()}
        words = [written[repr(row)] for row in rows]
        counts = [len(each) for each in words]
        filled = [[*each, *[0] * (max(counts) - len(each))] for each in words]
        return counts, None if past else torch.tensor(filled, device=text.device)

    @property
    def _bos(self) -> int | None:
        return getattr(self.tokenizer, "bos_token_id", None)

    # ---------------------------------------------------------------- files

    def _described(self) -> dict[str, Any]:
        prompt, plain = self.text_prompt, TextPrompt(self.text_prompt.objectives)
        form = {name: getattr(prompt, name) for name in _FORM if getattr(prompt, name) != getattr(plain, name)}
        whole = {} if is_peft(self.model) else {"whole": True, "frozen": self._frozen}
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
        with self._whole(True, changed=True):
            self._load_inside(directory)

    def _load_inside(self, directory: str | os.PathLike[str]) -> None:
        own = self.model.state_dict()
        loaded = _whole_model(Path(directory), {"dtype": self.model.dtype})
        found = gathered(loaded.state_dict(keep_vars=True), keep=True)  # where ZeRO-3 is asked for, it comes in shards
        shapes = ({name: value.shape for name, value in each.items()} for each in (found, own))
        check_shapes(Path(directory), *shapes, remedy=f"{REMEDY}; or pass the base model it is for")
        for name, value in found.items():
            own[name].copy_(value)
        self._was_trained = True

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
            set_name(base, config["base_model"] or base.name_or_path)  # which says where it came from first
        else:
            base = base_with_adapters(config, folder, model, options, trainable=trainable)
        if whole and model is None:
            freeze(base, config.get("frozen") or ())
        made = cls(base, prompt, tokenizer, record=TuningRecord.read(config))
        if whole:
            if model is not None:
                made.load_weights(folder)
            made._was_trained = True
            if not trainable:
                made.requires_grad_(False)
        return made


def _whole_model(folder: Path, options: Mapping[str, Any]) -> Any:
    """Return the causal language model that a folder holds."""
    if (folder / ADAPTER_CONFIG).exists():
        raise ValueError(
            f"{folder} holds a whole model and, from before, an adapter, which would be put onto it; remove "
            f"{ADAPTER_CONFIG} and {ADAPTER_FILE}"
        )
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
