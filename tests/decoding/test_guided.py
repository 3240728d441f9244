"""A large model that a small one guides: each next token by the formula, from models run alone and without caches."""

import copy

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tiny_language_models import VOCABULARY, build, conditioned, lora, tokenizer

from mopl import decoding
from mopl.conditioning import LoraMixture, ParameterMixture, TextPrompt, TextPromptModel, TuningRecord
from mopl.conditioning.references import Reference
from mopl.decoding import GuidedLogits, guided
from mopl.decoding.guided import _conditions_of, _following

NAMES = ("helpful", "harmless")
ROWS = [[1, 9, 8, 7, 6], [1, 12], [1, 20, 21, 22]]
WEIGHTS = [[0.25, 0.75], [0.7, 0.3], [0.25, 0.75]]
STRENGTHS = [0.7, 2.0, 1.0]
BETA = torch.tensor([1.8, 0.6], dtype=torch.float64)
WIDTH = max(map(len, ROWS))
IDS = torch.tensor([[0] * (WIDTH - len(row)) + row for row in ROWS])
MASK = (IDS != 0).long()
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def spread(mixture):
    """Move the sets of a mixture apart."""
    torch.manual_seed(5)
    with torch.no_grad():
        for values in mixture.parameters():
            if values.requires_grad:
                values += 0.3 * torch.randn_like(values)
    return mixture.eval()


def of_kind(kind: str):
    """Return a small policy and the model that it was tuned from, if it does not hold that itself."""
    if kind == "prompt":
        return conditioned(), None
    if kind == "beta":
        return conditioned(takes_beta=True), None
    if kind == "adapters":
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return LoraMixture(build(), 2, config=config, record=NAMES).eval(), None
    if kind == "words":
        # Of learned positions: rotary angles are float32 in every precision, and words move a text.
        return TextPromptModel(lora(build("gpt2")), TextPrompt(NAMES, "[{weights}] "), tokenizer()).eval(), None
    if kind == "parameters":
        return spread(ParameterMixture(build(), 2, scope="full", record=TuningRecord(NAMES))), build()
    if kind == "peft":
        return lora(build()), None
    other = build()
    with torch.no_grad():
        for values in other.parameters():
            values += 0.05 * torch.randn_like(values)
    return other, build()


def larger(vocabulary: int = VOCABULARY, family: str = "llama") -> nn.Module:
    """A model of another size, away from that of `build`."""
    torch.manual_seed(8)
    model = build(family, vocabulary, **({} if family == "gpt2" else {"num_hidden_layers": 3, "hidden_size": 24}))
    with torch.no_grad():
        for values in model.parameters():
            values += 0.1 * torch.randn_like(values)
    return model


def told(policy, i: int) -> dict[str, Tensor]:
    """Return what the policy is told of row `i`."""
    found = {"weights": torch.tensor(WEIGHTS[i])} if hasattr(policy, "record") else {}
    return found | ({"beta": BETA} if getattr(policy, "takes_beta", False) else {})


@torch.no_grad()
def by_hand(large, policy, reference, i: int, strength: float, new=()) -> Tensor:
    """Return log p_L + λ (log p - log p0) of the next token, normalised, in float64: one row, no cache, no padding."""
    ids, told_now = torch.tensor([[*ROWS[i], *new]]), told(policy, i)
    if "beta" in told_now:
        strength /= float(told_now["beta"].sum())

    def log_p(model, **options) -> Tensor:
        return model(input_ids=ids, use_cache=False, **options).logits[0, -1].double().log_softmax(-1)

    tuned = log_p(policy, **told_now)
    if reference is not None:
        base = log_p(reference)
    else:
        with policy.reference() if hasattr(policy, "record") else policy.disable_adapter():
            base = log_p(policy)
    size = min(len(tuned), large.config.vocab_size)
    mixed = log_p(large)[:size] + strength * (tuned[:size] - base[:size])
    return mixed - mixed.logsumexp(-1)


def asked(policy) -> tuple:
    weights = torch.tensor(WEIGHTS) if hasattr(policy, "record") else None
    beta = BETA if getattr(policy, "takes_beta", False) else None
    return weights, beta


KINDS = ["prompt", "beta", "adapters", "words", "parameters", "peft", "plain"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_next_token_has_the_formulas_distribution_in_float64(kind: str) -> None:
    policy, reference = of_kind(kind)
    large = larger().double()
    policy = policy.double()
    reference = None if reference is None else reference.double()
    weights, beta = asked(policy)
    conditions = _conditions_of(policy, weights, beta, None, 3)
    share = torch.tensor(STRENGTHS, dtype=torch.float64) / (1.0 if beta is None else 2.4)
    step = GuidedLogits(_following(policy, conditions), Reference(policy, reference), share, MASK)
    tokens, mask = IDS, MASK
    for _ in range(3):
        with torch.no_grad():
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            scores = large(input_ids=tokens, attention_mask=mask, position_ids=positions).logits[:, -1]
            mixed = step(tokens, scores)
        for i, strength in enumerate(STRENGTHS):
            new = tokens[i, WIDTH:].tolist()
            expected = by_hand(large, policy, reference, i, strength, new)
            torch.testing.assert_close(mixed[i], expected, rtol=1e-9, atol=1e-9)
        tokens = torch.cat([tokens, mixed.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, mask.new_ones(3, 1)], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_of_a_loop_and_of_each_row_alone(kind: str) -> None:
    policy, reference = of_kind(kind)
    large, (weights, beta) = larger(), asked(policy)
    common = {"beta": beta, "reference": reference, **GREEDY}
    made = guided(large, policy, weights, IDS, MASK, strength=torch.tensor(STRENGTHS), **common)
    for i, strength in enumerate(STRENGTHS):
        new: list[int] = []
        for _ in range(GREEDY["max_new_tokens"]):
            scores = by_hand(large, policy, reference, i, strength, new)
            scores[2] = -torch.inf
            new.append(int(scores.argmax()))
        assert made[i, WIDTH:].tolist() == new
        w, ids = None if weights is None else WEIGHTS[i], torch.tensor([ROWS[i]])
        assert guided(large, policy, w, ids, strength=strength, **common)[0, len(ROWS[i]) :].tolist() == new
    alone = large.generate(input_ids=IDS, attention_mask=MASK, **GREEDY)
    assert not torch.equal(made, alone)
    assert torch.equal(guided(large, policy, weights, IDS, MASK, strength=0.0, **common), alone)


@pytest.mark.parametrize("kind", ["prompt", "words", "parameters"])
def test_the_caches_of_all_three_follow_beams(kind: str, monkeypatch) -> None:
    policy, reference = of_kind(kind)
    large, (weights, _) = larger(), asked(policy)
    options = {"reference": reference, "strength": 1.5, **GREEDY, "num_beams": 3, "num_return_sequences": 2}
    moved, kept = [], decoding.Follower._reorder

    def spy(self, tokens: Tensor, prompts: int) -> int:
        moved.append(not torch.equal(tokens[:, : self.tokens.shape[1]], self.tokens))
        known = kept(self, tokens, prompts)
        assert known == self.tokens.shape[1]
        return known

    monkeypatch.setattr(decoding.Follower, "_reorder", spy)
    cached = guided(large, policy, weights, IDS, MASK, **options)
    assert any(moved) and len(cached) == 6
    monkeypatch.setattr(decoding.Follower, "_reorder", lambda self, tokens, prompts: 0)
    assert torch.equal(cached, guided(large, policy, weights, IDS, MASK, **options))
    for i in range(3):
        alone = guided(large, policy, WEIGHTS[i], torch.tensor([ROWS[i]]), **options)
        assert torch.equal(alone[:, len(ROWS[i]) :], cached[2 * i : 2 * i + 2, WIDTH:])


@pytest.mark.parametrize("size", [VOCABULARY + 6, VOCABULARY - 6])
def test_embeddings_padded_to_another_size_are_mixed_on_the_tokens_that_both_have(size: int) -> None:
    policy, large, small = conditioned(), larger(size), min(size, VOCABULARY)
    options = {**GREEDY, "output_scores": True, "return_dict_in_generate": True}
    made = guided(large, policy, WEIGHTS, IDS, MASK, strength=torch.tensor(STRENGTHS), **options)
    for i, strength in enumerate(STRENGTHS):
        expected, found = by_hand(large, policy, None, i, strength), made.scores[0][i].double()
        expected[2] = -torch.inf  # an end is forbidden so early
        torch.testing.assert_close(found[:small], expected.log_softmax(-1), rtol=1e-4, atol=1e-4)
        assert bool((found[small:] == -torch.inf).all())
    with pytest.raises(ValueError, match=rf"token {VOCABULARY - 1} but LlamaForCausalLM has only {VOCABULARY - 6}"):
        guided(larger(VOCABULARY - 6), policy, WEIGHTS[0], torch.tensor([[1, VOCABULARY - 1]]))


def test_another_precision_and_another_family_are_mixed_in_float32() -> None:
    policy, large = conditioned(), larger(family="gpt2").to(torch.bfloat16)
    options = {**GREEDY, "output_scores": True, "return_dict_in_generate": True}
    first = guided(large, policy, WEIGHTS, IDS, MASK, **options).scores[0].double()
    for i in range(3):
        expected = by_hand(large, policy, None, i, 1.0)
        expected[2] = -torch.inf
        torch.testing.assert_close(first[i], expected.log_softmax(-1), rtol=0.02, atol=0.1)


def test_samples_of_one_prompt_are_those_of_the_loop() -> None:
    policy, large = conditioned(), larger()
    ids = torch.tensor([ROWS[0]])
    for seed in range(3):
        torch.manual_seed(seed)
        new: list[int] = []
        for _ in range(4):
            mixed = by_hand(large, policy, None, 0, 1.0, new)
            new.append(int(torch.multinomial(mixed.float().softmax(-1)[None], 1)))
        torch.manual_seed(seed)
        options = dict(max_new_tokens=4, do_sample=True, top_k=0, top_p=1.0, eos_token_id=None)
        assert guided(large, policy, WEIGHTS[0], ids, **options)[0, len(ROWS[0]) :].tolist() == new


def test_errors_say_what_to_pass() -> None:
    policy, large = conditioned(), larger()
    with pytest.raises(ValueError, match="does not sum to 1"):
        guided(large, policy, [0.5, 0.9], IDS, MASK)
    with pytest.raises(ValueError, match=r"weights has shape \(2, 2\) but there are 3 prompts"):
        guided(large, policy, WEIGHTS[:2], IDS, MASK)
    with pytest.raises(ValueError, match="weights are missing"):
        guided(large, policy, None, IDS, MASK)
    with pytest.raises(ValueError, match=r"strength has shape \(2,\)"):
        guided(large, policy, WEIGHTS, IDS, MASK, strength=torch.ones(2))
    with pytest.raises(ValueError, match="0 is the large model"):
        guided(large, policy, WEIGHTS, IDS, MASK, strength=float("inf"))
    with pytest.raises(ValueError, match="not conditioned on it"):
        guided(large, policy, WEIGHTS, IDS, MASK, beta=[1.0, 1.0])
    with pytest.raises(ValueError, match="repetition_penalty acts on one model"):
        guided(large, policy, WEIGHTS, IDS, MASK, repetition_penalty=1.2)
    with pytest.raises(ValueError, match="padded on the left"):
        guided(large, policy, WEIGHTS, IDS.flip(-1), MASK.flip(-1))
    with pytest.raises(ValueError, match="there twice"):
        guided(policy.causal_lm, policy, WEIGHTS, IDS, MASK)
    with pytest.raises(ValueError, match="training mode"):
        guided(copy.deepcopy(large).train(), policy, WEIGHTS, IDS, MASK)
    with pytest.raises(ValueError, match="takes none; pass weights=None"):
        guided(large, lora(build()), WEIGHTS, IDS, MASK)
    with pytest.raises(ValueError, match="plain LlamaForCausalLM holds no reference"):
        guided(large, build(), None, IDS, MASK)
    with pytest.raises(ValueError, match="ParameterMixture trains the parameters of the model itself"):
        guided(large, ParameterMixture(build(), 2), [0.5, 0.5], IDS, MASK)
