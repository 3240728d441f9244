"""What `generate`, or `export`, was called with: checks of arguments, and the keywords that transformers gets."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mopl._arguments import check_positive
from mopl._counted import counted, there_are
from mopl.conditioning import TextPrompt, WeightedModel, check_weights
from mopl.conditioning.causal_lm import generate_option
from mopl.conditioning.weighted import causal_lm_of
from mopl.decoding import ACT_BEFORE
from mopl.language_models.data import RowError
from mopl.language_models.tokenization import ListTokenizer
from mopl.language_models.turns import TurnEnds, end_tokens, turn_ends

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]
Numbers = Tensor | Sequence[float] | Sequence[Sequence[float]]

# What would make samples come from another distribution than the mixture, with the values that do nothing.
_NO_WARPING = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}  # fmt: skip
_REFUSED = {
    "num_return_sequences": "use candidates=n, which also scores them",
    "max_length": "use max_new_tokens",
    "return_dict_in_generate": "call the model's own generate",
    "input_ids": "pass prompts",
    "attention_mask": "pass prompts",
    "inputs_embeds": "pass prompts",
}


@dataclass(frozen=True)
class Asked:
    """B prompts as tokens, as the model and as the reference read them, with what they are answered at."""

    prompts: Sequence[Prompt]
    plain: Sequence[list[int]]  # what the reference reads
    own: Sequence[list[int]]  # what the model reads: where weights are part of the text, with these in front
    arguments: Mapping[str, Tensor]  # what the model takes as keywords: w (B, m), β (B, m), or nothing
    c: Tensor  # (B,) float64, with ‖β‖₁ inside

    def of(self, rows: slice) -> Asked:
        """Return some of the prompts."""
        arguments = {name: value[rows] for name, value in self.arguments.items()}
        return Asked(self.prompts[rows], self.plain[rows], self.own[rows], arguments, self.c[rows])


def as_list(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    prompts = list(prompts)
    return [prompts] if prompts and isinstance(prompts[0], (Mapping, int)) else prompts


def prompt_tokens(encoder: ListTokenizer, prompt: Prompt, number: int) -> list[int]:
    """Return the tokens of a prompt; errors of the tokenizer, and its having no token, name it by number.

    A prompt of numbers is its tokens already.
    """
    if not isinstance(prompt, Iterable):
        raise ValueError(f"prompt {number} is {prompt!r} but must be a text, messages or tokens")
    if not isinstance(prompt, str) and any(isinstance(part, int) for part in prompt):
        tokens: list[Any] = list(prompt)
        size = len(encoder.tokenizer)
        if wrong := [token for token in tokens if type(token) is not int or not 0 <= token < size]:
            raise ValueError(
                f"prompt {number} has the token {wrong[0]!r} but the tokenizer has those from 0 to {size - 1}; pass "
                "the tokens of this model, or text"
            )
        return tokens
    try:
        tokens = encoder.prompt_tokens(prompt).tolist()  # type: ignore[arg-type]
    except RowError as error:
        raise ValueError(f"prompt {number} cannot be answered: {error}") from error
    if not tokens:
        raise ValueError(f"prompt {number} has no tokens, and the tokenizer adds none at the beginning")
    return tokens


def objectives_of(
    model: Any,
    weights: Any,
    beta: Any,
    text_prompt: TextPrompt | None,
    mixture: str = "LoraMixture",
    without_beta: str = "to move closer to the reference pass scale",
) -> tuple[str, ...]:
    """Return the objectives of a model, or of its text; raise unless it gets just what it takes.

    Errors name the `mixture` that the caller takes, and what to do `without_beta`.
    """
    names: Sequence[str] = ()
    wants_beta = False
    if isinstance(model, WeightedModel) and (model.decodes_rows or mixture == "mixture"):
        names, wants_beta = model.record.objectives, model.takes_beta
        if text_prompt is not None:
            raise ValueError(
                f"text_prompt was passed but the model is a {type(model).__name__}, which takes weights by itself"
            )
    elif text_prompt is not None:
        names, wants_beta = text_prompt.objectives, text_prompt.takes_beta
    if (weights is not None) != bool(names):
        raise ValueError(
            f"weights are missing; pass one for each of {', '.join(names)}"
            if names
            else f"weights were passed but the model has none: pass a HyperPromptModel or a {mixture}, or "
            "text_prompt with a model that was trained with it; of a ParameterMixture pass model.merge(weights)"
        )
    if (beta is not None) != wants_beta:
        raise ValueError(
            "beta is missing: the model is conditioned on it; pass one number for each objective"
            if wants_beta
            else f"beta was passed but the model is not conditioned on it; {without_beta}"
        )
    return tuple(names)


def asked_of(
    model: nn.Module,
    encoder: ListTokenizer,
    prompts: Sequence[Prompt],
    weights: Any,
    beta: Any,
    scale: Any,
    text_prompt: TextPrompt | None,
) -> Asked:
    """Check what prompts are answered at, and give each its tokens and its own."""
    count = len(prompts)
    names = objectives_of(model, weights, beta, text_prompt)
    c = check_positive(scale, "scale", "above 1 is closer to the reference").double().cpu()
    if c.ndim > 1 or (c.ndim == 1 and len(c) != count):
        many = there_are(count, "prompt")
        raise ValueError(f"scale has shape {tuple(c.shape)} but {many}; pass a number or one each")
    given: dict[str, Tensor] = {}
    if weights is not None:
        given["weights"] = _each(check_weights(weights, len(names)), "weights", len(names), count)
    if beta is not None:
        given["beta"] = _each(check_positive(beta, "beta").double(), "beta", len(names), count)
        c = c * given["beta"].sum(-1).cpu()
    plain = [prompt_tokens(encoder, prompt, number) for number, prompt in enumerate(prompts)]
    if text_prompt is None:
        return Asked(prompts, plain, plain, given, c.expand(count))
    betas = given.get("beta", [None] * count)
    own = [
        text_prompt.prepend_ids(ids, w, encoder.tokenizer, b)
        for ids, w, b in zip(plain, given["weights"], betas, strict=True)
    ]
    return Asked(prompts, plain, own, {}, c.expand(count))


def _each(values: Tensor, name: str, objectives: int, count: int) -> Tensor:
    if tuple(values.shape) not in ((objectives,), (count, objectives)):
        raise ValueError(
            f"{name} has shape {tuple(values.shape)} but {there_are(count, 'prompt')} and "
            f"{counted(objectives, 'objective')}; pass ({objectives},) or ({count}, {objectives})"
        )
    return values.expand(count, objectives)


def generate_options(
    model: nn.Module,
    encoder: ListTokenizer,
    kwargs: dict[str, Any],
    candidates: int,
    rerank: str,
    max_new_tokens: int,
    guided_model: nn.Module | None = None,
    *,
    mixed: bool = False,
) -> tuple[dict[str, Any], TurnEnds]:
    """Return the keywords of `generate` of transformers, and what ends a response: what either model names.

    Where the model's scores are `mixed` with others', what would change them before is refused, and left out where
    the model's own generation_config has it.
    """
    tokenizer = encoder.tokenizer
    for name, remedy in _REFUSED.items():
        if name in kwargs:
            raise ValueError(f"{name} cannot be passed here; {remedy}")
    if candidates < 1 or max_new_tokens < 1:
        raise ValueError(f"candidates is {candidates} and max_new_tokens {max_new_tokens} but both must be at least 1")
    for name, (low, high) in {"temperature": (0.0, math.inf), "top_p": (0.0, 1.0)}.items():
        value = kwargs.get(name)
        if value is not None and not (low < value <= high and math.isfinite(value)):
            limit = "positive" if high == math.inf else f"above {low:g} and at most {high:g}"
            raise ValueError(
                f"{name} is {value:g} but must be {limit}; leave out temperature and top_p to take the most probable "
                "token each time"
            )
    given = kwargs.pop("generation_config", None)
    own = causal_lm_of(model).generation_config
    config = copy.deepcopy(given or own)
    config.max_length = None
    for name, idle in ACT_BEFORE.items() if mixed else ():
        if kwargs.get(name, getattr(given, name, None)) not in (None, idle):
            raise ValueError(
                f"{name} acts on one model before it is mixed with another, as scale and guided_model do; leave it out"
            )
        if hasattr(config, name):
            setattr(config, name, idle)
    several = candidates > 1
    if several and ((kwargs.get("num_beams") or config.num_beams or 1) > 1 or kwargs.get("do_sample") is False):
        raise ValueError("candidates are samples; leave out num_beams and do_sample=False, or pass candidates=1")
    if several and any(kwargs.get(name) for name in ("stop_strings", "stopping_criteria")):
        raise ValueError("candidates are scored as whole responses; leave out stop_strings and stopping_criteria")
    sampling = [name for name in _NO_WARPING if kwargs.get(name) is not None]
    if several and rerank == "resample":
        found = [*sampling, *(name for name in ("logits_processor",) if kwargs.get(name))]
        found += ["top_h"] if generate_option("top_h", {**kwargs, "generation_config": config}, own) else []
        if found:
            raise ValueError(
                f"rerank='resample' weighs samples by the distribution they come from, which {', '.join(found)} would "
                "change; leave that out, or pass rerank='best'"
            )
        kwargs.update(_NO_WARPING)
    kwargs.setdefault("do_sample", several or bool(sampling))
    if not kwargs["do_sample"]:
        # The values that mean nothing: those of the model's generation_config would be warned about.
        config.temperature, config.top_p, config.top_k = 1.0, 1.0, 50
    if "eos_token_id" in kwargs:
        end = kwargs["eos_token_id"]
        ends = TurnEnds(tokenizer, (end,) if isinstance(end, int) else tuple(end or ()))
    else:
        ends = turn_ends(encoder, config)
        if guided_model is not None:
            more = end_tokens(getattr(causal_lm_of(guided_model), "generation_config", None))
            ends = dataclasses.replace(ends, ids=tuple(dict.fromkeys([*ends.ids, *more])))
        kwargs["eos_token_id"] = list(ends.ids) or None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else config.pad_token_id
    if pad is None:
        pad = ends.ids[0] if ends.ids else 0
    kwargs.setdefault("pad_token_id", pad)
    if kwargs.get("stop_strings"):
        kwargs.setdefault("tokenizer", tokenizer)
    # What is a setting goes into the configuration; the rest are objects, or names that transformers will refuse.
    others = config.update(**kwargs, max_new_tokens=max_new_tokens, num_return_sequences=candidates)
    # What a configuration leaves at None, transformers takes from the model's own, unless the call says None as well.
    unset = [
        name for name in ACT_BEFORE if getattr(config, name, None) is None and getattr(own, name, None) is not None
    ]
    return {**others, **dict.fromkeys(unset if mixed else ()), "generation_config": config}, ends
