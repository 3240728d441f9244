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

from mopl._arguments import check_choice, shape_of
from mopl._bounds import check_bounds
from mopl._counted import there_are
from mopl._rows import check_from_zero, generation_keywords
from mopl._tensor_files import check_fits, load_state, read_tensors
from mopl.conditioning._extended_rows import ExtendedRows
from mopl.conditioning._no_position import NO_POSITION, silence_positions
from mopl.conditioning._prompted import PromptedModel
from mopl.conditioning.causal_lm import check_model, is_peft
from mopl.conditioning.hyper_prompt import HyperPrompt
from mopl.conditioning.sampling import Weights
from mopl.conditioning.saved_models import (
    CONFIG_FILE,
    REMEDY,
    Record,
    TuningRecord,
    base_with_adapters,
    fitting,
)

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
            raise ValueError(f"prompt.objectives is {sizes['objectives']} but {there_are(objectives, 'objective')}")
        check_bounds(sizes)


class HyperPromptModel(PromptedModel):
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
    BY = "a prompt of virtual tokens"
    NOT_GENERATED_WITH = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size", "past_key_values")

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
        return self.hyper_prompt(**self._conditions_of_one(weights, beta, None))[0]

    @torch.no_grad()
    def set_prefix_from_tokens(self, token_ids: Tensor | Sequence[int]) -> None:
        """Start P at the model's own embeddings of tokens: cut to k of them, or repeated until there are k."""
        embedding = self.causal_lm.get_input_embeddings()
        ids = torch.as_tensor(token_ids, dtype=torch.long, device=embedding.weight.device)
        if ids.ndim != 1:
            raise ValueError(f"token_ids has shape {shape_of(ids)} but must be (n,)")
        self.hyper_prompt.set_prefix(embedding(ids))

    def _front(
        self, text: Tensor, count: int, past: int, *, weights: Tensor | None = None, beta: Tensor | None = None
    ) -> tuple[Sequence[int], Tensor | None]:
        counts = [self.virtual_tokens] * count
        if past:
            return counts, None
        if weights is None:
            raise ValueError(f"weights are missing; pass one for each of {', '.join(self.record.objectives)}")
        if beta is not None and beta.ndim == 2 and weights.ndim == 1:
            weights = weights.expand(len(beta), -1)
        return counts, self.hyper_prompt(weights, beta).expand(count, -1, -1)

    def _arrangement(self, rows: ExtendedRows, position_ids: Tensor | None) -> dict[str, Any]:
        paper = self.positions == "paper" and not self._is_reference
        if paper and rows.packed:
            raise ValueError("packed sequences need positions that count up; use positions='hf' or pad")
        # Without a mask, positions that do not count up would be taken for packed sequences.
        found = {"attention_mask": rows.mask()} if rows.padded or paper else {}
        if paper:
            implementation = getattr(self.causal_lm.config, "_attn_implementation", None) or ""
            if "flash" in implementation:
                raise ValueError(
                    f"positions='paper' cannot run with attn_implementation={implementation!r}, which takes positions "
                    "that do not count up for packed sequences; load the model with 'sdpa', or use positions='hf'"
                )
            check_from_zero(self.causal_lm)
            found["position_ids"] = rows.positions(position_ids, front=NO_POSITION if self._absolute else 0)
        elif rows.packed or (rows.padded and self._takes_positions):
            found["position_ids"] = rows.positions(position_ids)
        return found

    def _generation_arrangement(self, rows: ExtendedRows) -> dict[str, Any]:
        told = generation_keywords(self.causal_lm, rows.mask(), embeds=True)
        own = self._arrangement(rows, None)
        return own if self.positions == "paper" else {**own, **told}

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
