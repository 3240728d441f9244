"""Generation at a trade-off: mixing with the reference by tokens, re-ranking by responses, files and errors."""

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from tiny_language_models import CHAT, PROMPTS, WEIGHTS, build, conditioned, lora, prompt, tokenizer

from mopl.alignment import fuse, is_fused
from mopl.conditioning import HyperPromptModel, ParameterMixture, TextPrompt, TuningRecord
from mopl.decoding import Follower
from mopl.language_models.generate import generate
from mopl.language_models.reference_mixture import Reference, ReferenceMixture
from mopl.language_models.tokenization import ListTokenizer

NEW, EOS = 5, 2
LONG = {"max_new_tokens": NEW, "min_new_tokens": NEW}
PAIR = TextPrompt(("helpful", "harmless"), template="[{weights}] ")


def ids_of(text: str) -> list[int]:
    return tokenizer()(text)["input_ids"]


def next_log_probs(model: nn.Module, ids: list[int], weights=None, beta=None) -> Tensor:
    """Log-probabilities (V,) of the token after `ids`: one row, no padding, no cache."""
    options = {} if weights is None else {"weights": torch.tensor(weights)}
    if beta is not None:
        options["beta"] = torch.tensor(beta)
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False, **options).logits[0, -1].double().log_softmax(-1)


def by_hand(model, base, ids: list[int], c: float, steps: int, *, base_ids=None, **condition) -> tuple[list[int], list]:
    """Greedy decoding of the normalised (1 - 1/c) log p0 + (1/c) log p; `base` gives log p0 of a list of tokens."""
    new: list[int] = []
    rows = []
    for _ in range(steps):
        h, h0 = next_log_probs(model, ids + new, **condition), base((base_ids or ids) + new)
        mixed = (1 - 1 / c) * h0 + h / c
        rows.append(mixed - mixed.logsumexp(-1))
        mixed = mixed.clone()
        mixed[EOS] = -torch.inf
        new.append(int(mixed.argmax()))
    return new, rows


def base_of(model: HyperPromptModel):
    def log_probs(ids: list[int]) -> Tensor:
        with model.reference():
            return next_log_probs(model, ids)

    return log_probs


@pytest.fixture(params=["llama", "gpt2", "gemma2"])
def model(request) -> HyperPromptModel:
    return conditioned(request.param)


# ---------------------------------------------------------------- by tokens


def test_scale_1_is_plain_generation_of_each_row_alone(model) -> None:
    answers = generate(model, tokenizer(), PROMPTS, WEIGHTS, **LONG)
    for text, w, answer in zip(PROMPTS, WEIGHTS, answers, strict=True):
        ids = torch.tensor([ids_of(text)])
        alone = model.generate(ids, weights=w, do_sample=False, **LONG)[0, ids.shape[1] :].tolist()
        assert list(answer.tokens) == alone and answer.prompt == text and not answer.finished
        assert answer.text == tokenizer().decode(alone, skip_special_tokens=True)
        assert answer.candidates == () and answer.effective_samples is None
    if model.config.model_type == "gemma2":
        return  # so small a one says the same whatever it is told
    assert len({answer.tokens for answer in generate(model, tokenizer(), [PROMPTS[0]] * 3, WEIGHTS, **LONG)}) > 1


def test_a_large_scale_is_the_references_greedy_answer(model) -> None:
    answers = generate(model, tokenizer(), PROMPTS, WEIGHTS, scale=1e7, **LONG)
    for text, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([ids_of(text)])
        with model.reference():
            expected = model.generate(ids, do_sample=False, **LONG)[0, ids.shape[1] :].tolist()
        assert list(answer.tokens) == expected
    plain = generate(model, tokenizer(), PROMPTS, WEIGHTS, **LONG)
    assert [a.tokens for a in plain] != [a.tokens for a in answers]


def test_each_step_is_the_mixture_computed_by_hand_with_a_scale_for_each_padded_row(model) -> None:
    scales = [0.5, 3.0, 1.0]
    answers = generate(model, tokenizer(), PROMPTS, WEIGHTS, scale=scales, **LONG)
    rows = [ids_of(text) for text in PROMPTS]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    mixture = ReferenceMixture(Reference(model), ids, mask, torch.tensor(scales), width)
    made = model.generate(
        ids, mask, weights=torch.tensor(WEIGHTS), do_sample=False, max_new_tokens=NEW, eos_token_id=None,
        logits_processor=[mixture], output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    for i, (c, w) in enumerate(zip(scales, WEIGHTS, strict=True)):
        new, _ = by_hand(model, base_of(model), rows[i], c, NEW, weights=w)
        assert list(answers[i].tokens) == new
        for step in range(NEW):
            before = rows[i] + made.sequences[i, width : width + step].tolist()
            h, h0 = next_log_probs(model, before, w), base_of(model)(before)
            mixed = ((1 - 1 / c) * h0 + h / c).log_softmax(-1)
            torch.testing.assert_close(made.scores[step][i].double(), mixed, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("cached", [True, False])
def test_beams_that_change_places_keep_their_reference(model, cached: bool, monkeypatch) -> None:
    options = {"scale": 0.4, "num_beams": 4, **LONG}
    together = generate(model, tokenizer(), PROMPTS, WEIGHTS, **options)
    moved, reorder = [], Follower._reorder

    def spy(self, tokens: Tensor, prompts: int) -> int:
        if not torch.equal(tokens[:, : self.tokens.shape[1]], self.tokens):
            moved.append(1)
        # Without a cache the reference reads everything again at every step.
        return reorder(self, tokens, prompts) if cached else 0

    monkeypatch.setattr(Follower, "_reorder", spy)
    for i in range(3):
        alone = generate(model, tokenizer(), PROMPTS[i], WEIGHTS[i], **options)
        assert alone[0].tokens == together[i].tokens
    assert moved


def test_an_adapted_model_is_mixed_with_itself_without_adapters() -> None:
    model = lora(build())
    trainable = [p.requires_grad for p in model.parameters()]

    def base(ids: list[int]) -> Tensor:
        with model.disable_adapter():
            return next_log_probs(model, ids)

    answers = generate(model, tokenizer(), PROMPTS, scale=0.3, **LONG)
    for text, answer in zip(PROMPTS, answers, strict=True):
        assert list(answer.tokens) == by_hand(model, base, ids_of(text), 0.3, NEW)[0]
    assert [p.requires_grad for p in model.parameters()] == trainable


def test_weights_in_words_are_read_by_the_model_and_not_by_the_reference() -> None:
    model = lora(build())

    def base(ids: list[int]) -> Tensor:
        with model.disable_adapter():
            return next_log_probs(model, ids)

    for scale in (1.0, 1.7):
        answers = generate(model, tokenizer(), PROMPTS, [0.25, 0.75], text_prompt=PAIR, scale=scale, **LONG)
        for text, answer in zip(PROMPTS, answers, strict=True):
            plain = ids_of(text)
            ids = [plain[0], *ids_of("[helpful: 0.25, harmless: 0.75]")[1:], *plain[1:]]
            assert list(answer.tokens) == by_hand(model, base, ids, scale, NEW, base_ids=plain)[0]


def test_another_model_can_be_the_reference() -> None:
    model, other = lora(build()), build("gpt2")
    answer = generate(model, tokenizer(), PROMPTS[0], scale=2.0, reference=other, **LONG)[0]
    expected, _ = by_hand(model, lambda ids: next_log_probs(other, ids), ids_of(PROMPTS[0]), 2.0, NEW)
    assert list(answer.tokens) == expected


def test_temperatures_enter_by_their_direction_and_rescale_by_their_sum() -> None:
    model = conditioned(takes_beta=True)
    beta, c = [1.8, 0.6], 1.5
    answer = generate(model, tokenizer(), PROMPTS[0], WEIGHTS[0], beta=beta, scale=c, **LONG)[0]
    condition = {"weights": WEIGHTS[0], "beta": [0.75, 0.25]}
    expected, _ = by_hand(model, base_of(model), ids_of(PROMPTS[0]), c * 2.4, NEW, **condition)
    assert list(answer.tokens) == expected
    one = generate(model, tokenizer(), PROMPTS[0], WEIGHTS[0], beta=[0.75, 0.25], **LONG)[0]
    assert list(one.tokens) == by_hand(model, base_of(model), ids_of(PROMPTS[0]), 1.0, NEW, **condition)[0]


def test_processors_and_stopping_of_transformers_still_work() -> None:
    model = conditioned()
    free = generate(model, tokenizer(), PROMPTS, WEIGHTS, scale=0.5, **LONG)
    banned = free[0].tokens[0]
    other = generate(model, tokenizer(), PROMPTS, WEIGHTS, scale=0.5, suppress_tokens=[banned], **LONG)
    assert all(banned not in answer.tokens for answer in other)
    stop = [lambda ids, scores: torch.tensor([True, False, False]) & (ids.shape[1] >= 9)]  # prompts of 6 tokens
    first, *rest = generate(model, tokenizer(), PROMPTS, WEIGHTS, scale=0.5, stopping_criteria=stop, **LONG)
    assert first.tokens == free[0].tokens[:3] and not first.finished and rest == free[1:]
    ended = generate(model, tokenizer(), PROMPTS[0], WEIGHTS[0], eos_token_id=free[0].tokens[1], max_new_tokens=NEW)[0]
    assert ended.finished == (free[0].tokens[1] in ended.tokens)


# ---------------------------------------------------------------- prompts


def test_prompts_have_the_tokens_of_training(monkeypatch) -> None:
    model, chat = conditioned(), tokenizer(chat=True)
    seen = []
    original = HyperPromptModel.generate
    monkeypatch.setattr(
        HyperPromptModel,
        "generate",
        lambda self, input_ids, *a, **k: (seen.append(input_ids[0].tolist()), original(self, input_ids, *a, **k))[1],
    )
    for given, tokens, template in (
        (CHAT, chat, "auto"),
        ([CHAT], chat, "chat"),
        ("w11 w12", chat, "auto"),
        ("w11 w12", chat, "plain"),
        (["w11 w12"], tokenizer(), "auto"),
        ("w11 w12", tokenizer(bos=False), "auto"),
    ):
        generate(model, tokens, given, WEIGHTS[0], max_new_tokens=1, template=template)
    names = [tokenizer().convert_ids_to_tokens(ids) for ids in seen]
    opened = ["<s>", "<user>", "w11", "w12", "<assistant>"]
    assert names == [opened, opened, opened, ["<s>", "w11", "w12"], ["<s>", "w11", "w12"], ["w11", "w12"]]
    trained = ListTokenizer(tokenizer(), separator=" w3", append_eos=False)
    generate(model, trained, "w11", WEIGHTS[0], max_new_tokens=1)
    assert tokenizer().convert_ids_to_tokens(seen[-1]) == ["<s>", "w11", "w3"]


def test_batches_do_not_change_greedy_answers() -> None:
    model = conditioned()
    whole = generate(model, tokenizer(), PROMPTS, WEIGHTS, scale=[2.0, 1.0, 0.5], **LONG)
    parts = generate(model, tokenizer(), PROMPTS, WEIGHTS, scale=[2.0, 1.0, 0.5], batch_size=2, **LONG)
    assert whole == parts
    assert generate(model, tokenizer(), [], WEIGHTS[0]) == []


def test_a_seed_repeats_samples_and_leaves_the_global_generator_alone() -> None:
    model = conditioned()
    before = torch.get_rng_state()
    draws = [
        generate(model, tokenizer(), PROMPTS, WEIGHTS, scale=0.8, temperature=1.3, top_p=0.9, seed=s, **LONG)
        for s in (3, 3, 4)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_model_is_left_as_it_was() -> None:
    model = conditioned()
    model.train()
    model.hyper_prompt.eval()
    modes = [module.training for module in model.modules()]
    generate(model, tokenizer(), PROMPTS, WEIGHTS, scale=2.0, candidates=2, max_new_tokens=3, seed=0)
    assert [module.training for module in model.modules()] == modes
    assert not is_fused(model.causal_lm) and not model._is_reference


# ---------------------------------------------------------------- by responses


def log_prob(model, ids: list[int], response, **condition) -> float:
    """log p(response | ids), token by token."""
    steps = range(len(response))
    return sum(float(next_log_probs(model, [*ids, *response[:t]], **condition)[response[t]]) for t in steps)


@pytest.mark.parametrize("fused", [False, True])
def test_candidates_of_weights_in_words_and_of_another_reference(fused: bool) -> None:
    model, other, c = lora(build()), build("gpt2"), 1.6
    if fused:
        fuse(model.get_base_model())
    answer = generate(
        model, tokenizer(), PROMPTS[:2], [0.25, 0.75], text_prompt=PAIR, scale=c, reference=other, candidates=3,
        rerank="resample", seed=2, max_new_tokens=4,
    )[1]  # fmt: skip
    plain = ids_of(PROMPTS[1])
    told = [plain[0], *ids_of("[helpful: 0.25, harmless: 0.75]")[1:], *plain[1:]]
    for candidate in answer.candidates:
        log_p, log_p0 = log_prob(model, told, candidate.tokens), log_prob(other, plain, candidate.tokens)
        assert candidate.log_prob == pytest.approx(log_p, abs=1e-3)
        assert candidate.reference_log_prob == pytest.approx(log_p0, abs=1e-3)
        assert candidate.score == pytest.approx((1 - 1 / c) * log_p0 + log_p / c, abs=1e-3)
    assert is_fused(model.get_base_model()) == fused and not is_fused(other)


def test_beams_of_weights_in_words() -> None:
    model, options = lora(build()), {"text_prompt": PAIR, "scale": 0.5, "num_beams": 3, **LONG}
    together = generate(model, tokenizer(), PROMPTS, [[0.25, 0.75], [0.7, 0.3], [0.25, 0.75]], **options)
    for text, w, answer in zip(PROMPTS, [[0.25, 0.75], [0.7, 0.3], [0.25, 0.75]], together, strict=True):
        assert generate(model, tokenizer(), text, w, **options)[0].tokens == answer.tokens


@pytest.mark.parametrize("scale", [2.5, 1.0])
@pytest.mark.parametrize("rerank", ["best", "resample"])
def test_candidates_are_scored_by_the_exact_form_as_a_whole(rerank: str, scale: float) -> None:
    model = conditioned()
    answers = generate(
        model, tokenizer(), PROMPTS, WEIGHTS, scale=scale, candidates=4, rerank=rerank, seed=5, max_new_tokens=5
    )
    for text, w, answer in zip(PROMPTS, WEIGHTS, answers, strict=True):
        ids, log_weights = ids_of(text), []
        for candidate in answer.candidates:
            log_p = log_prob(model, ids, candidate.tokens, weights=w)
            with model.reference():
                log_p0 = log_prob(model, ids, candidate.tokens)
            expected = (1 - 1 / scale) * log_p0 + log_p / scale
            assert candidate.log_prob == pytest.approx(log_p, abs=1e-3)
            if scale == 1.0:
                assert candidate.reference_log_prob is None
            else:
                assert candidate.reference_log_prob == pytest.approx(log_p0, abs=1e-3)
            assert candidate.score == pytest.approx(expected, abs=1e-3)
            log_q = 0.0
            for t, token in enumerate(candidate.tokens):
                before = [*ids, *candidate.tokens[:t]]
                h, h0 = next_log_probs(model, before, w), base_of(model)(before)
                log_q += float(((1 - 1 / scale) * h0 + h / scale).log_softmax(-1)[token])
            log_weights.append(expected - log_q)
        scores = [candidate.score for candidate in answer.candidates]
        assert scores == sorted(scores, reverse=True)
        chosen = [candidate for candidate in answer.candidates if candidate.tokens == answer.tokens]
        assert chosen and chosen[0].text == answer.text
        if rerank == "best":
            assert answer.tokens == answer.candidates[0].tokens and answer.candidates[0].share is None
        else:
            shares = torch.tensor([candidate.share for candidate in answer.candidates])
            torch.testing.assert_close(shares, torch.tensor(log_weights).softmax(-1), atol=1e-3, rtol=1e-3)
            assert answer.effective_samples == pytest.approx(1 / float(shares.square().sum()), rel=1e-3)


def test_resampling_reaches_the_distribution_of_whole_responses_where_token_mixing_does_not() -> None:
    """Responses of two tokens out of twelve can be counted: p_c is known."""
    size, scale, n = 12, 0.35, 8000
    model, words = conditioned(vocabulary=size), tokenizer(size=size)
    ids = words("w1 w2")["input_ids"]
    w = WEIGHTS[0]
    log_p, log_p0, log_q = {}, {}, {}

    def mixed(h, h0):
        return ((1 - 1 / scale) * h0 + h / scale).log_softmax(-1)

    h, h0 = next_log_probs(model, ids, w), base_of(model)(ids)
    first = mixed(h, h0)
    for a in range(size):
        if a == EOS:
            log_p[a,], log_p0[a,], log_q[a,] = h[a], h0[a], first[a]
            continue
        after, after0 = next_log_probs(model, [*ids, a], w), base_of(model)([*ids, a])
        for b in range(size):
            log_p[a, b], log_p0[a, b] = h[a] + after[b], h0[a] + after0[b]
            log_q[a, b] = first[a] + mixed(after, after0)[b]
    keys = list(log_p)
    exact = torch.stack([(1 - 1 / scale) * log_p0[key] + log_p[key] / scale for key in keys]).softmax(-1)
    by_tokens = torch.stack([log_q[key] for key in keys]).exp()
    assert float(by_tokens.sum()) == pytest.approx(1.0)

    answer = generate(model, words, "w1 w2", w, scale=scale, candidates=n, rerank="resample", seed=0, max_new_tokens=2)[
        0
    ]
    found, plain = dict.fromkeys(keys, 0.0), dict.fromkeys(keys, 0.0)
    for candidate in answer.candidates:
        found[candidate.tokens] += candidate.share
        plain[candidate.tokens] += 1 / n
    reached = torch.tensor([found[key] for key in keys])
    drawn = torch.tensor([plain[key] for key in keys])

    def distance(one: Tensor, other: Tensor) -> float:
        return 0.5 * float((one - other).abs().sum())

    assert distance(by_tokens, exact) > 0.1
    assert distance(reached, exact) < 0.04 < 0.1 < distance(drawn, exact)
    assert distance(drawn, by_tokens) < 0.05
    assert 1 < answer.effective_samples < n


def test_the_best_candidate_depends_on_the_scale() -> None:
    model = conditioned()
    chosen = {
        scale: generate(model, tokenizer(), PROMPTS[0], WEIGHTS[0], scale=scale, candidates=16, seed=1, **LONG)[0]
        for scale in (1.0, 1e7)
    }
    assert chosen[1e7].candidates[0].score == pytest.approx(chosen[1e7].candidates[0].reference_log_prob, rel=1e-4)
    assert chosen[1.0].candidates[0].score == chosen[1.0].candidates[0].log_prob


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": None}, "weights are missing; pass one for each of helpful, harmless"),
        ({"weights": [0.7, 0.7]}, "does not sum to 1"),
        ({"weights": [[0.5, 0.5]] * 2}, "3 prompts and 2 objectives"),
        ({"scale": 0.0}, "must be positive"),
        ({"scale": [1.0, 2.0]}, "3 prompts; pass a number or one each"),
        ({"candidates": 0}, "at least 1"),
        ({"candidates": 2, "num_beams": 2}, "candidates are samples"),
        ({"candidates": 2, "do_sample": False}, "candidates are samples"),
        ({"candidates": 2, "stop_strings": ["w1"]}, "whole responses"),
        ({"candidates": 2, "rerank": "worst"}, "rerank is 'worst'"),
        ({"candidates": 2, "rerank": "resample", "temperature": 0.7}, "temperature would change"),
        ({"candidates": 2, "rerank": "resample", "top_k": 5}, "top_k would change"),
        ({"num_return_sequences": 2}, "use candidates=n"),
        ({"max_length": 20}, "use max_new_tokens"),
        ({"beta": [1.0, 1.0]}, "not conditioned on it; to move closer to the reference pass scale"),
        ({"text_prompt": PAIR}, "takes weights by itself"),
        ({"template": "chat"}, "no chat template"),
        ({"unknown_option": 1}, "unknown_option"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": -1}, "batch_size is -1"),  # it was answered by no answer at all
    ],
)
def test_bad_calls_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(conditioned(), tokenizer(), PROMPTS, **{"weights": WEIGHTS, "max_new_tokens": 2, **arguments})


def test_models_without_a_reference_or_without_weights_are_named() -> None:
    with pytest.raises(ValueError, match="plain LlamaForCausalLM holds no reference"):
        generate(build(), tokenizer(), PROMPTS, scale=2.0)
    for model in (build(), ParameterMixture(build(), 2)):
        with pytest.raises(ValueError, match="has none: pass a HyperPromptModel or a LoraMixture, or text_prompt"):
            generate(model, tokenizer(), PROMPTS, [0.5, 0.5])
    record = TuningRecord(("a", "b"), reference="some/model")
    foreign = HyperPromptModel(build(), prompt(), record=record).eval()
    with pytest.raises(ValueError, match="regularised towards 'some/model'"):
        generate(foreign, tokenizer(), PROMPTS, WEIGHTS, scale=2.0)
    with pytest.raises(ValueError, match="share one vocabulary"):
        generate(lora(build()), tokenizer(), PROMPTS, scale=2.0, reference=build(vocabulary=70), **LONG)
    with pytest.raises(ValueError, match="beta is missing"):
        generate(conditioned(takes_beta=True), tokenizer(), PROMPTS, WEIGHTS)
    with pytest.raises(ValueError, match="one token to the same rows"):
        generate(lora(build()), tokenizer(), PROMPTS[0], scale=2.0, prompt_lookup_num_tokens=2, max_new_tokens=9)
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        generate(conditioned(), tokenizer(bos=False), ["w1", ""], WEIGHTS[0])


def test_a_prompt_may_be_its_tokens() -> None:
    model = conditioned()
    wanted = [answer.tokens for answer in generate(model, tokenizer(), PROMPTS, WEIGHTS, **LONG)]
    ids = [ids_of(text) for text in PROMPTS]
    assert [answer.tokens for answer in generate(model, tokenizer(), ids, WEIGHTS, **LONG)] == wanted
    (alone,) = generate(model, tokenizer(), ids[0], WEIGHTS[0], **LONG)
    assert alone.tokens == wanted[0] and alone.prompt == ids[0]
    for wrong, token in (([1, 99], 99), ([1, -1], -1), ([1, "w1"], "'w1'"), ([1, True], True)):
        with pytest.raises(ValueError, match=rf"prompt 0 has the token {token} but the tokenizer has those from 0 to"):
            generate(model, tokenizer(), [wrong], WEIGHTS[0])
    with pytest.raises(ValueError, match="prompt 1 is 5 but must be a text, messages or tokens"):
        generate(model, tokenizer(), ["w1", 5], WEIGHTS[0])
