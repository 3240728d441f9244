"""Answers at a chosen trade-off, with two knobs: w between the objectives, c between them and the reference.

    generate(model, tokenizer, prompts, [0.7, 0.3])                              the model at w
    generate(model, tokenizer, prompts, [0.7, 0.3], scale=2.0)                   closer to the reference
    generate(model, tokenizer, prompts, [0.7, 0.3], scale=2.0, candidates=8)     8 samples each, re-ranked
    generate(model, tokenizer, prompts, [0.7, 0.3], guided_model=large)          a large model, guided by the small one

What `scale` c stands for is p_c(y|x) ∝ p_L(y|x) (p(y|x) / p0(y|x))^(1/c), where p_L is the `guided_model`, or p0 where
there is none: the optimum at temperature c β for the reference p_L, if p is the one at β for p0 (COS-DPO, Proposition
3.1, and `mopl.steering`; with p_L = p0 and λ = 1/c, decoding-time realignment, Liu et al., ICML 2024). That is about
whole responses, over which nobody can sum. Two ways lead there:

* By tokens (`candidates=1`): log-probabilities of each next token are mixed, hL + (h - h0)/c, and normalised. It costs
  a second model run, or a third, and is an approximation: each token is normalised by itself.
* By responses (`candidates=n`): n responses y are sampled by tokens and scored exactly as a whole,
  s_c(y) = log p_L(y) + (log p(y) - log p0(y)) / c.
  `rerank="best"` returns the one with the largest s_c: the most probable of them under p_c. Like every search for the
  most probable text it favours short ones. `rerank="resample"` draws one of them with probability proportional to
  p_c(y) / q(y), where q is what the samples were drawn from (self-normalised importance resampling): as n grows, its
  answers are distributed as p_c. The effective number of samples, 1 / Σ share², says how far n reached.

A model conditioned on temperatures is run at β/‖β‖₁ and rescaled by c ‖β‖₁ in place of c (equation 15, as
`mopl.steering.beta_conditioned`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mopl._arguments import check_choice
from mopl._renamed import renamed_keywords
from mopl._restoring import evaluating, seeded
from mopl.conditioning import TextPrompt, WeightedModel
from mopl.conditioning.references import Reference
from mopl.conditioning.weighted import causal_lm_of, reads_left_padding
from mopl.language_models._generation_arguments import (
    Asked,
    Numbers,
    Prompt,
    as_list,
    asked_of,
    generate_options,
)
from mopl.language_models.collate import padded
from mopl.language_models.guiding import check_guided
from mopl.language_models.head import fuse, is_fused, score_sequences, unfuse
from mopl.language_models.models import positions_of
from mopl.language_models.prompt_rows import PromptRows, pad_left, prompt_rows
from mopl.language_models.reference_mixture import ReferenceMixture
from mopl.language_models.tokenization import ListTokenizer
from mopl.language_models.turns import TurnEnds
from mopl.steering import guide, rescale

RERANK = ("best", "resample")
TOKENS_PER_PASS = 8192  # of one forward pass that scores candidates: no logits are made, so it takes little memory


@dataclass(frozen=True)
class Candidate:
    """One sampled response.

    Attributes:
        text: Without special tokens.
        tokens: Its tokens, with the one that ended it.
        log_prob: log p(y|x), the sum over its tokens in nats, of the model at w.
        reference_log_prob: log p0(y|x); None where c is 1 for every prompt and the reference was not needed.
        score: log p_L + (log p - log p0) / c, exact; not normalised. p_L is p0 where no model is guided.
        share: Its probability to be drawn under `rerank="resample"`; None for `"best"`.
        guided_log_prob: log p_L(y|x) of the `guided_model`; None without one.
    """

    text: str
    tokens: tuple[int, ...]
    log_prob: float
    reference_log_prob: float | None
    score: float
    share: float | None = None
    guided_log_prob: float | None = None


@dataclass(frozen=True)
class Generation:
    """The answer to one prompt.

    Attributes:
        prompt: As it was passed.
        text: Without special tokens, and without what ended it.
        tokens: Its tokens, with the one that ended it.
        finished: Whether it ended by itself: with a token or text of `mopl.language_models.turns`.
        candidates: All samples, the largest score first; empty if there was one.
        effective_samples: 1 / Σ share² under `rerank="resample"`, between 1 and the number of candidates; else None.
    """

    prompt: Prompt
    text: str
    tokens: tuple[int, ...]
    finished: bool
    candidates: tuple[Candidate, ...] = ()
    effective_samples: float | None = None


@renamed_keywords(objective_temperature="beta")
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Prompt | Sequence[Prompt],
    weights: Numbers | None = None,  # (m,) or (B, m)
    *,
    scale: float | Sequence[float] | Tensor = 1.0,  # number or (B,)
    beta: Numbers | None = None,  # (m,) or (B, m)
    reference: nn.Module | None = None,
    guided_model: nn.Module | None = None,
    guided_tokenizer: Any = None,
    max_new_tokens: int = 128,
    candidates: int = 1,
    rerank: Literal["best", "resample"] = "best",
    text_prompt: TextPrompt | None = None,
    template: Literal["auto", "chat", "plain"] = "auto",
    seed: int | None = None,
    batch_size: int = 16,
    **kwargs: Any,
) -> list[Generation]:
    """Answer prompts at a trade-off.

    Decoding is greedy unless `do_sample`, a sampling option (`temperature`, `top_p`, ...) or several candidates ask for
    samples. Where the caller says nothing, samples follow the model's generation_config, as in transformers; with
    `rerank="resample"` they follow the distribution itself.

    Args:
        model: A `HyperPromptModel` or `LoraMixture`; or with `text_prompt`, or with weights of its own fixed by
            training, a causal language model of transformers or a PEFT model.
        tokenizer: A tokenizer of transformers, or the `ListTokenizer` that the model was trained with.
        prompts: Texts, or conversations as lists of `{"role", "content"}`, or one of either. They become tokens as in
            training (`ListTokenizer.prompt_tokens`) and are never cut. Lists of integers are tokens already.
        weights: w on the simplex, one for all prompts (m,) or one each (B, m); None for a model with fixed weights.
        scale: c > 0, one for all prompts or one each: above 1 towards the reference, below 1 away from it.
        beta: β > 0 of a model conditioned on it, (m,) or (B, m).
        reference: The model that is p0; None: the model itself with adapters and prompt off.
        guided_model: A frozen model p_L of the same tokenizer, any causal language model of transformers or PEFT on any
            device and in any dtype, which then answers as the model has learned to at the weights. It reads the prompt
            as the reference does. Embeddings may differ in size: a token that a model has not is impossible.
        guided_tokenizer: Its tokenizer, to be compared with `tokenizer` (see `check_same_tokenizer`); without it only
            the sizes of the embeddings are compared, so that a stranger of the same size would not be noticed.
        max_new_tokens: Most tokens of a response. p and p0 are then those of responses that stop there.
        candidates: Samples for each prompt, n.
        rerank: What becomes of them: `"best"` answers with that of the largest score, `"resample"` draws one by its
            share, so that with many candidates answers are distributed as p_c.
        text_prompt: Writes the weights in front of the prompt's tokens (`TextPrompt.prepend_ids`). The reference reads
            the prompt without them.
        template: `"chat"`, `"plain"`, or `"auto"`: chat if the tokenizer has a template. Not with a `ListTokenizer`.
        seed: Of the samples; the global generators are left as they were. None draws from these.
        batch_size: Prompts that run at once; 1 where the model cannot read rows that are padded on the left.
        **kwargs: Keywords of `generate` of transformers: `temperature`, `top_p`, `num_beams`, `stop_strings`, ...
            With a `guided_model` or another scale than 1 no penalties, which would act on one model before the mixture;
            those of the model's own generation_config are left out then.

    Returns:
        One `Generation` for each prompt, in order.

    Raises:
        ValueError: If a shape is wrong, a number out of range, an option cannot go with another, scale or
            `guided_model` needs a reference that is not there, or the guided model has another tokenizer.
        UnsupportedModelError: If candidates are to be scored and the model's head cannot be (see `fuse`).
    """
    check_choice(rerank, RERANK, "rerank")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size} but must be at least 1")
    conversations = as_list(prompts)
    if isinstance(tokenizer, ListTokenizer):
        encoder = tokenizer
    else:
        encoder = ListTokenizer(tokenizer, max_length=None, template=template, append_eos=False)
    if guided_model is not None:
        check_guided(guided_model, guided_tokenizer, model, encoder.tokenizer)
    elif guided_tokenizer is not None:
        raise ValueError("guided_tokenizer was passed without guided_model; pass both, or neither")
    asked = asked_of(model, encoder, conversations, weights, beta, scale, text_prompt)
    mixed = guided_model is not None or bool((asked.c != 1).any())
    options, ends = generate_options(
        model, encoder, dict(kwargs), candidates, rerank, max_new_tokens, guided_model, mixed=mixed
    )
    base = Reference(model, reference) if mixed else None
    _check_room("model", model, asked.own, max_new_tokens)
    others = {"guided model": guided_model, "reference": None if base is None or base.own else base.model}
    for name, other in others.items():
        if other is not None:
            _check_room(name, other, asked.plain, max_new_tokens)
    if not all(reads_left_padding(other) for other in (base and base.model, guided_model) if other is not None):
        batch_size = 1  # with nothing to pad
    pad = options["generation_config"].pad_token_id
    answers: list[Generation] = []
    with evaluating(model, reference, guided_model), seeded(seed), torch.no_grad():
        for part in prompt_rows(model, asked.own, pad, ends, batch_size):
            answers += _answer(part, base, guided_model, asked.of(part.rows), options, rerank)
    return answers


# ---------------------------------------------------------------- a batch of prompts


def _check_room(name: str, model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise if a prompt and its response have more tokens than a model has positions."""
    positions = positions_of(causal_lm_of(model)) if prompts else None
    virtual = model.virtual_tokens if isinstance(model, WeightedModel) else 0
    longest = max(map(len, prompts), default=0) + virtual
    if positions is not None and longest + max_new_tokens > positions:
        remedy = f"pass max_new_tokens={positions - longest} or less" if longest < positions else "shorten the prompt"
        raise ValueError(
            f"the longest prompt has {longest} tokens and its response up to {max_new_tokens}, but the {name} knows "
            f"{positions} positions; {remedy}"
        )


def _answer(
    part: PromptRows, base: Reference | None, guided: Any, asked: Asked, options: dict[str, Any], rerank: str
) -> list[Generation]:
    config = options["generation_config"]
    candidates, pad = config.num_return_sequences, config.pad_token_id
    mixture = None
    if base is not None and (guided is not None or bool((asked.c != 1).any())):
        plain, plain_mask = pad_left(asked.plain, pad, part.ids.device)
        record = candidates > 1 and rerank == "resample"
        mixture = ReferenceMixture(base, plain, plain_mask, asked.c, part.ids.shape[1], record=record, guided=guided)
        options = {**options, "logits_processor": [mixture, *(options.get("logits_processor") or [])]}
    new, _ = part.generate(**asked.arguments, **options)
    responses, finished = _responses(new, options, part.ends)
    texts = part.ends.texts(responses)
    if candidates == 1:
        return [
            Generation(prompt, text, tuple(tokens), end)
            for prompt, text, tokens, end in zip(asked.prompts, texts, responses, finished, strict=True)
        ]
    lengths = torch.tensor([len(tokens) for tokens in responses], device=new.device)
    proposal = None
    if mixture is not None and mixture.record:
        counted = torch.arange(new.shape[1], device=new.device) < lengths[:, None]
        proposal = mixture.log_proposal(new, counted).cpu().view(-1, candidates)
    grouped = [responses[i : i + candidates] for i in range(0, len(responses), candidates)]
    log_p, log_p0, log_large, score = _scores(part.model, base, guided, asked, grouped, pad)
    answers = []
    for i, prompt in enumerate(asked.prompts):
        share = None
        if rerank == "resample":
            # Without a mixture samples come from p itself, which then is p_c: all weigh the same.
            share = (score[i] - (log_p[i] if proposal is None else proposal[i])).softmax(-1)
            best = int(torch.multinomial(share, 1))
        else:
            best = int(score[i].argmax())
        made = [
            Candidate(
                texts[i * candidates + j], tuple(grouped[i][j]), float(log_p[i, j]),
                None if log_p0 is None else float(log_p0[i, j]), float(score[i, j]),
                None if share is None else float(share[j]), None if log_large is None else float(log_large[i, j]),
            )
            for j in range(candidates)
        ]  # fmt: skip
        ranked = sorted(made, key=lambda candidate: -candidate.score)
        effective = None if share is None else float(1 / share.square().sum())
        chosen = made[best]
        end = finished[i * candidates + best]
        answers.append(Generation(prompt, chosen.text, chosen.tokens, end, tuple(ranked), effective))
    return answers


def _responses(new: Tensor, options: dict[str, Any], ends: TurnEnds) -> tuple[list[list[int]], list[bool]]:
    """Return the tokens of each response up to the one that ended it, and whether one did."""
    config = options["generation_config"]
    stopped = bool(config.stop_strings or options.get("stopping_criteria") or ends.text)
    responses, finished = [], []
    for tokens in new.tolist():
        response, end = ends.cut(tokens)
        while stopped and not end and len(response) > 1 and response[-1] == config.pad_token_id:
            response.pop()
        responses.append(response)
        finished.append(end)
    return responses, finished


# ---------------------------------------------------------------- scores of whole responses


def _scores(
    model: Any, base: Reference | None, guided: Any, asked: Asked, grouped: Sequence[Sequence[Sequence[int]]], pad: int
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Return log p, log p0, log p_L and s_c of the candidates, each (B, n) float64 on the CPU."""
    with _scoring(model):
        log_p = _log_probs(model, asked.own, grouped, pad, asked.arguments)
    if base is None:
        return log_p, None, None, log_p
    with base.active() as model_of_base, _scoring(model_of_base):
        # A reference that is the model itself, switched off, still wants to be told nothing of the trade-off.
        log_p0 = _log_probs(model_of_base, asked.plain, grouped, pad, {})
    if guided is None:
        return log_p, log_p0, None, rescale(log_p, log_p0, asked.c)
    with _scoring(guided):
        log_large = _log_probs(guided, asked.plain, grouped, pad, {})
    return log_p, log_p0, log_large, guide(log_p, log_p0, log_large, 1 / asked.c, normalize=False)


@contextlib.contextmanager
def _scoring(model: Any) -> Iterator[None]:
    """Let a model score responses without its logits, for a moment if it could not before."""
    inner = causal_lm_of(model)
    before = is_fused(inner)
    fuse(inner)
    try:
        yield
    finally:
        if not before:
            unfuse(inner)


def _log_probs(
    model: Any,
    prompts: Sequence[Sequence[int]],
    grouped: Sequence[Sequence[Sequence[int]]],
    pad: int,
    arguments: Mapping[str, Tensor],
) -> Tensor:
    """Return log p(response | prompt), (B, n)."""
    device, n = next(model.parameters()).device, len(grouped[0])
    pairs = [(prompt, tokens) for prompt, group in zip(prompts, grouped, strict=True) for tokens in group]
    of_row = {name: value.repeat_interleave(n, 0) for name, value in arguments.items()}
    width = max(len(prompt) + len(tokens) for prompt, tokens in pairs)
    rows = max(TOKENS_PER_PASS // width, 1)
    scores = []
    for part in (slice(first, first + rows) for first in range(0, len(pairs), rows)):
        batch = {name: value.to(device) for name, value in padded(pairs[part], pad, length=width).items()}
        batch |= {name: value[part] for name, value in of_row.items()}
        scores.append(score_sequences(model, batch).scores.double().cpu())
    return torch.cat(scores).view(-1, n)
