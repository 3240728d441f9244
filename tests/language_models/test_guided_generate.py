"""A small model that guides a large one in `generate`: closed forms over all responses, scale as the special case."""

import json
from typing import Any

import pytest
import torch
from tiny_language_models import PROMPTS, VOCABULARY, WEIGHTS, build, conditioned, lora, merging, tokenizer
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from bench.families import models as families
from mopl.conditioning import LoraMixture, ParameterMixture, TextPrompt
from mopl.decoding import dera
from mopl.language_models.generate import generate
from mopl.language_models.guiding import check_same_tokenizer
from mopl.language_models.reference_mixture import ReferenceMixture

EOS = 2
LONG = {"max_new_tokens": 5, "min_new_tokens": 5}
SCALES = [0.5, 3.0, 1.0]
PAIR = TextPrompt(("helpful", "harmless"), template="[{weights}] ")


def ids_of(text: str) -> list[int]:
    return tokenizer()(text)["input_ids"]


def larger(vocabulary: int = VOCABULARY, **options) -> nn.Module:
    """A model of another size, away from that of `build`."""
    model = build(vocabulary=vocabulary, num_hidden_layers=3, hidden_size=24, **options)
    torch.manual_seed(8)
    with torch.no_grad():
        for values in model.parameters():
            values += 0.1 * torch.randn_like(values)
    return model


def mixture() -> LoraMixture:
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return LoraMixture(build(), 2, config=config, record=("helpful", "harmless")).eval()


@torch.no_grad()
def next_log_probs(model: nn.Module, ids: list[int], weights=None) -> Tensor:
    options = {} if weights is None else {"weights": torch.tensor(weights)}
    return model(torch.tensor([ids]), use_cache=False, **options).logits[0, -1].double().log_softmax(-1)


def without(model: nn.Module, ids: list[int]) -> Tensor:
    with model.disable_adapter() if hasattr(model, "disable_adapter") else model.reference():
        return next_log_probs(model, ids)


def greedy(large, model, ids, c, *, weights=None, own=None, steps=5) -> list[int]:
    """Greedy decoding of log p_L + (log p - log p0) / c without caches or padding; `own` is what the model reads."""
    new: list[int] = []
    for _ in range(steps):
        tuned, base = next_log_probs(model, (own or ids) + new, weights), without(model, ids + new)
        mixed = next_log_probs(large, ids + new)[: len(tuned)] + (tuned - base) / c
        mixed[EOS] = -torch.inf
        new.append(int(mixed.argmax()))
    return new


@pytest.mark.parametrize("made", [conditioned, mixture], ids=["prompt", "adapters"])
def test_answers_are_the_formulas_for_each_padded_row_at_its_weights_and_scale(made) -> None:
    model, large = made(), larger()
    answers = generate(model, tokenizer(), PROMPTS, WEIGHTS, scale=SCALES, guided_model=large, **LONG)
    for text, w, c, answer in zip(PROMPTS, WEIGHTS, SCALES, answers, strict=True):
        assert list(answer.tokens) == greedy(large, model, ids_of(text), c, weights=w)
    assert answers == generate(
        model, tokenizer(), PROMPTS, WEIGHTS, scale=SCALES, guided_model=large, batch_size=2, **LONG
    )
    far = generate(model, tokenizer(), PROMPTS, WEIGHTS, scale=1e9, guided_model=large, **LONG)
    alone = generate(large, tokenizer(), PROMPTS, **LONG)
    assert [answer.tokens for answer in far] == [answer.tokens for answer in alone]
    assert [answer.tokens for answer in answers] != [answer.tokens for answer in alone]


def test_beams_are_those_of_each_row_alone() -> None:
    model, large = conditioned(), larger()
    options = {"guided_model": large, "scale": 0.6, "num_beams": 3, **LONG}
    together = generate(model, tokenizer(), PROMPTS, WEIGHTS, **options)
    for text, w, answer in zip(PROMPTS, WEIGHTS, together, strict=True):
        assert generate(model, tokenizer(), text, w, **options)[0].tokens == answer.tokens


def test_weights_in_words_are_read_by_the_small_model_alone() -> None:
    model, large = lora(build()), larger()
    answers = generate(
        model, tokenizer(), PROMPTS, [0.25, 0.75], text_prompt=PAIR, scale=0.7, guided_model=large, **LONG
    )
    for text, answer in zip(PROMPTS, answers, strict=True):
        plain = ids_of(text)
        own = [plain[0], *ids_of("[helpful: 0.25, harmless: 0.75]")[1:], *plain[1:]]
        assert list(answer.tokens) == greedy(large, model, plain, 0.7, own=own)
    sampled = generate(
        model, tokenizer(), PROMPTS[0], [0.25, 0.75], text_prompt=PAIR, guided_model=large, candidates=2, seed=0,
        max_new_tokens=3,
    )[0].candidates[0]  # fmt: skip
    before = [[*ids_of(PROMPTS[0]), *sampled.tokens[:t]] for t in range(len(sampled.tokens))]
    steps = [float(next_log_probs(large, ids)[token]) for ids, token in zip(before, sampled.tokens, strict=True)]
    assert sampled.guided_log_prob == pytest.approx(sum(steps), abs=1e-3)


def test_a_large_model_that_reads_no_left_padding_answers_prompt_by_prompt() -> None:
    model, large = conditioned(), families.build("bart")
    large.generation_config.eos_token_id = EOS
    answers = generate(model, tokenizer(), PROMPTS, WEIGHTS, scale=0.7, guided_model=large, **LONG)
    for text, w, answer in zip(PROMPTS, WEIGHTS, answers, strict=True):
        assert list(answer.tokens) == greedy(large, model, ids_of(text), 0.7, weights=w)


def test_beta_divides_the_difference_by_its_sum() -> None:
    model, large, beta = conditioned(takes_beta=True), larger(), [1.8, 0.6]
    options = {"scale": 1.5, "guided_model": large, **LONG}
    whole = generate(model, tokenizer(), PROMPTS, WEIGHTS, beta=beta, **options)
    same = {**options, "scale": 1.5 * 2.4}
    parts = generate(model, tokenizer(), PROMPTS, WEIGHTS, beta=[0.75, 0.25], **same)
    assert [answer.tokens for answer in whole] == [answer.tokens for answer in parts]


# ---------------------------------------------------------------- scale is the special case


@pytest.mark.parametrize("rerank", ["best", "resample"])
def test_with_the_reference_in_the_place_of_the_large_model_it_is_scale_to_the_bit(rerank: str) -> None:
    model, base = conditioned(), build()  # one module for both: another one may round its products otherwise
    always = {"reference": base, "scale": [0.5, 3.0, 0.9]}
    common = {**always, "candidates": 3, "rerank": rerank, "seed": 4, "max_new_tokens": 5}
    plain = generate(model, tokenizer(), PROMPTS, WEIGHTS, **common)
    guided = generate(model, tokenizer(), PROMPTS, WEIGHTS, guided_model=base, **common)
    for one, other in zip(plain, guided, strict=True):
        assert (one.text, one.tokens, one.effective_samples) == (other.text, other.tokens, other.effective_samples)
        for a, b in zip(one.candidates, other.candidates, strict=True):
            assert b.guided_log_prob == b.reference_log_prob == a.reference_log_prob and a.guided_log_prob is None
            assert (a.tokens, a.log_prob, a.score, a.share) == (b.tokens, b.log_prob, b.score, b.share)
    for options in ({}, {"temperature": 1.3, "seed": 1}, {"num_beams": 3}):
        common = {**always, "scale": SCALES, **LONG, **options}
        assert generate(model, tokenizer(), PROMPTS, WEIGHTS, **common) == generate(
            model, tokenizer(), PROMPTS, WEIGHTS, guided_model=base, **common
        )
    greedy_at_1 = generate(model, tokenizer(), PROMPTS, WEIGHTS, **LONG)
    assert greedy_at_1 == generate(model, tokenizer(), PROMPTS, WEIGHTS, reference=base, guided_model=base, **LONG)


# ---------------------------------------------------------------- whole responses


@pytest.mark.parametrize(("weights", "scale"), [(WEIGHTS[0], 0.7), (WEIGHTS[1], 2.0)])
def test_resampling_reaches_the_distribution_of_whole_responses(weights: list[float], scale: float) -> None:
    """Responses of two tokens out of twelve can be counted; the embeddings of the large model hold four more."""
    size, n = 12, 6000
    model, large, words = conditioned(vocabulary=size), larger(size + 4), tokenizer(size=size)
    ids = words("w1 w2")["input_ids"]

    def parts(before: list[int]) -> tuple[Tensor, Tensor]:
        """log p_L (p/p0)^(1/c) of the next token, as it is and normalised over the tokens that both have."""
        tuned, base = next_log_probs(model, before, weights), without(model, before)
        both = next_log_probs(large, before)[:size] + (tuned - base) / scale
        return both, both.log_softmax(-1)

    exact, drawn = {}, {}
    whole, mixed = parts(ids)
    for a in range(size):
        if a == EOS:
            exact[a,], drawn[a,] = whole[a], mixed[a]
            continue
        after, after_mixed = parts([*ids, a])
        for b in range(size):
            exact[a, b], drawn[a, b] = whole[a] + after[b], mixed[a] + after_mixed[b]
    target = torch.stack(list(exact.values())).softmax(-1)
    by_tokens = torch.stack(list(drawn.values())).exp()
    assert float(by_tokens.sum()) == pytest.approx(1.0)

    answer = generate(
        model, words, "w1 w2", weights, scale=scale, guided_model=large, candidates=n, rerank="resample", seed=0,
        max_new_tokens=2,
    )[0]  # fmt: skip
    reached, plain = dict.fromkeys(exact, 0.0), dict.fromkeys(exact, 0.0)
    for candidate in answer.candidates:
        reached[candidate.tokens] += candidate.share
        plain[candidate.tokens] += 1 / n
        assert candidate.score == pytest.approx(float(exact[candidate.tokens]), abs=1e-3)

    def distance(one, other) -> float:
        return 0.5 * float((torch.as_tensor(list(one)) - torch.as_tensor(list(other))).abs().sum())

    assert distance(by_tokens, target) > 0.1
    assert distance(reached.values(), target) < 0.05 < 0.1 < distance(plain.values(), target)
    assert distance(plain.values(), by_tokens) < 0.05
    assert answer.candidates[0].score == max(candidate.score for candidate in answer.candidates)


# ---------------------------------------------------------------- what goes together


def test_a_response_ends_where_either_model_ends_one() -> None:
    model, large = conditioned(), larger()
    free = generate(model, tokenizer(), PROMPTS[0], WEIGHTS[0], guided_model=large, **LONG)[0]
    large.generation_config.eos_token_id = [EOS, free.tokens[2]]
    ended = generate(model, tokenizer(), PROMPTS[0], WEIGHTS[0], guided_model=large, max_new_tokens=5)[0]
    assert ended.finished and ended.tokens == free.tokens[: free.tokens.index(free.tokens[2]) + 1]


def test_penalties_of_the_models_own_configuration_are_left_out() -> None:
    model, large = conditioned(), larger()
    free = generate(model, tokenizer(), PROMPTS, WEIGHTS, guided_model=large, scale=0.5, **LONG)
    model.causal_lm.generation_config.repetition_penalty = 5.0
    assert generate(model, tokenizer(), PROMPTS, WEIGHTS, guided_model=large, scale=0.5, **LONG) == free
    assert model.causal_lm.generation_config.repetition_penalty == 5.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("exponential_decay_length_penalty", (1, 50.0)),
        ("sequence_bias", [[[12], -100.0], [[41], -100.0]]),
        ("watermarking_config", {"bias": 50.0}),
    ],
)
def test_options_that_have_no_idle_value_are_left_out_too(name: str, value: Any) -> None:
    """What a configuration leaves at None, transformers fills in from the model's own."""
    model, large = conditioned(), larger()
    options = {"max_new_tokens": 5, "guided_model": large}
    free = generate(model, tokenizer(), PROMPTS, WEIGHTS, **options)
    plain = generate(model, tokenizer(), PROMPTS, WEIGHTS, max_new_tokens=5)
    config = model.causal_lm.generation_config
    config.update(**{name: value})
    assert generate(model, tokenizer(), PROMPTS, WEIGHTS, **options) == free
    assert generate(model, tokenizer(), PROMPTS, WEIGHTS, max_new_tokens=5) != plain
    with pytest.raises(ValueError, match=f"{name} acts on one model before"):
        dera(model.causal_lm, large, 0.5, torch.tensor([[12, 41]]), generation_config=transformers.GenerationConfig())


def test_no_penalty_acts_on_one_model_before_scale_mixes_it_with_its_reference() -> None:
    model = conditioned()
    free = generate(model, tokenizer(), PROMPTS, WEIGHTS, scale=0.5, **LONG)
    config = model.causal_lm.generation_config
    for name, value in {"repetition_penalty": 5.0, "exponential_decay_length_penalty": (1, 5.0)}.items():
        with pytest.raises(ValueError, match=f"{name} acts on one model before"):
            generate(model, tokenizer(), PROMPTS, WEIGHTS, scale=[1.0, 0.5, 1.0], **LONG, **{name: value})
        plain = generate(model, tokenizer(), PROMPTS, WEIGHTS, **LONG)
        setattr(config, name, value)
        assert generate(model, tokenizer(), PROMPTS, WEIGHTS, scale=0.5, **LONG) == free
        if name == "repetition_penalty":  # LONG forbids what the other acts on
            assert generate(model, tokenizer(), PROMPTS, WEIGHTS, **LONG) != plain  # obeyed without a mixture
        setattr(config, name, None)


def test_another_precision_and_a_fused_large_model(monkeypatch) -> None:
    model, large = conditioned(), larger().to(torch.bfloat16)
    seen, kept = [], ReferenceMixture.__call__

    def spy(self, input_ids, scores):
        seen.append((input_ids, kept(self, input_ids, scores)))
        return seen[-1][1]

    monkeypatch.setattr(ReferenceMixture, "__call__", spy)
    answer = generate(
        model, tokenizer(), PROMPTS[0], WEIGHTS[0], guided_model=large, candidates=2, seed=0, max_new_tokens=3
    )[0]
    assert seen[0][1].dtype == torch.float32
    ids = ids_of(PROMPTS[0])
    tuned, base = next_log_probs(model, ids, WEIGHTS[0]), without(model, ids)
    expected = (next_log_probs(large, ids) + tuned - base).log_softmax(-1)
    torch.testing.assert_close(seen[0][1][0].double(), expected, rtol=0.02, atol=0.1)
    for candidate in answer.candidates:
        assert candidate.score == candidate.guided_log_prob + candidate.log_prob - candidate.reference_log_prob


def test_the_models_are_left_as_they_were() -> None:
    model, large = conditioned(), larger(attention_dropout=0.9)
    options = {"guided_model": large, "candidates": 2, "max_new_tokens": 4, "seed": 0}
    without_dropout = generate(model, tokenizer(), PROMPTS, WEIGHTS, **options)
    large.train()
    assert generate(model, tokenizer(), PROMPTS, WEIGHTS, **options) == without_dropout
    assert large.training and not hasattr(large, "_mopl_fused_forward") and not model.is_reference


def test_what_does_not_go_together_is_refused() -> None:
    model, large = conditioned(), larger()

    def error(match: str, policy=model, guided_model=large, words=None, weights=WEIGHTS, **options) -> None:
        with pytest.raises(ValueError, match=match):
            generate(policy, words or tokenizer(), PROMPTS, weights, guided_model=guided_model,
                     **{"max_new_tokens": 2, **options})  # fmt: skip

    error("guided_model is a HyperPromptModel, which would need weights", guided_model=conditioned())
    error("guided_model is a ParameterMixture", guided_model=ParameterMixture(build(), 2))
    error("the model that guides it", guided_model=model.causal_lm)
    error("without guided_model; pass both", guided_model=None, guided_tokenizer=tokenizer())
    error("has another vocabulary", guided_tokenizer=tokenizer(size=30))
    error("embeddings of 50 tokens and the model of 62, but the tokenizer has 62", guided_model=larger(50))
    error("repetition_penalty acts on one model", repetition_penalty=1.3)
    config = transformers.GenerationConfig(repetition_penalty=1.3, pad_token_id=0)
    error("repetition_penalty acts on one model", generation_config=config)
    options = {"prompt_lookup_num_tokens": 2, "batch_size": 1, "max_new_tokens": 9}
    error("scale and guided_model need .* one token to the same rows", policy=lora(build()), weights=None, **options)
    error("plain LlamaForCausalLM holds no reference.*leave scale at 1 and guided_model out", policy=build(),
          weights=None)  # fmt: skip
    short = larger(max_position_embeddings=8)
    error("up to 5, but the guided model knows 8 positions; pass max_new_tokens=2 or less", guided_model=short, **LONG)
    error("the reference knows 8 positions", policy=lora(build()), weights=None, reference=short, **LONG)


def other_tokens(change: str):
    made = tokenizer()
    if change == "added":
        made.add_tokens(["w0 w1"])
    elif change == "swapped":
        state = json.loads(made.backend_tokenizer.to_str())
        state["model"]["vocab"] |= {"w1": 8, "w2": 7}
        backend = type(made.backend_tokenizer).from_str(json.dumps(state))
        made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    return made


def test_tokenizers_are_compared_by_tokens_by_added_tokens_and_by_how_they_split() -> None:
    check_same_tokenizer(tokenizer(), tokenizer(chat=True, bos=False))  # what stands around a text may differ
    for change, message in (("added", "another vocabulary"), ("swapped", r"another vocabulary.*'w1' is 7 and 8")):
        with pytest.raises(ValueError, match=message):
            check_same_tokenizer(tokenizer(), other_tokens(change))
    texts = ["low lower lowest new newer", "wider wide low new"]
    first, second = merging(texts, ["<s>"]), merging(texts, ["<s>"])
    assert first.get_vocab() == second.get_vocab()

    def wrapped(backend):
        return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")

    check_same_tokenizer(wrapped(first), wrapped(second))
    state = json.loads(second.to_str())
    state["model"]["merges"] = state["model"]["merges"][::-1]  # the same tokens, other texts
    with pytest.raises(ValueError, match=r"the tokenizer of X splits texts otherwise .* its merges"):
        check_same_tokenizer(wrapped(first), wrapped(type(second).from_str(json.dumps(state))), "the tokenizer of X")
    for option in ("lstrip", "normalized"):
        state = json.loads(second.to_str())
        state["added_tokens"][0][option] = True
        with pytest.raises(ValueError, match="other added tokens"):
            check_same_tokenizer(wrapped(first), wrapped(type(second).from_str(json.dumps(state))))
