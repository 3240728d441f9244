"""Mixtures while decoding: by a loop without caches, by the models alone at the ends; padding, beams and samples."""

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from mopl import decoding
from mopl.decoding import MixedLogits, dera, logit_mixing

IDS = torch.tensor([[0, 0, 0, 6, 7], [9, 8, 7, 6, 5], [0, 0, 12, 13, 14]])
MASK = (IDS != 0).long()
NEW = 6


def build(seed: int, family: str = "llama") -> nn.Module:
    torch.manual_seed(seed)
    if family == "llama":
        config = transformers.LlamaConfig(
            vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            initializer_range=0.6, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
    else:
        config = transformers.GPT2Config(
            vocab_size=41, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.6, pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def experts() -> list[nn.Module]:
    return [build(i) for i in range(3)]


@torch.no_grad()
def by_hand(models: list[nn.Module], coefficients: Tensor, row: int, sample: bool = False) -> list[int]:
    """Decode one prompt without padding and without caches."""
    tokens = IDS[row : row + 1, MASK[row].bool()]
    for _ in range(NEW):
        mixed = sum(
            c * m(input_ids=tokens).logits[:, -1].log_softmax(-1) for c, m in zip(coefficients, models, strict=True)
        )
        token = torch.multinomial(mixed.softmax(-1), 1) if sample else mixed.argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, token], 1)
        if int(token) == 2:
            break
    return tokens[0, int(MASK[row].sum()) :].tolist()


def new_tokens(output: Tensor) -> list[list[int]]:
    rows = output[:, IDS.shape[1] :].tolist()
    return [row[: row.index(2) + 1] if 2 in row else row for row in rows]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_mixture_equals_a_loop_without_caches_row_by_row(family: str) -> None:
    models = [build(i, family) for i in range(2)]
    weights = torch.tensor([[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]])
    output = new_tokens(logit_mixing(models, weights, IDS, MASK, max_new_tokens=NEW, do_sample=False))
    for row in range(3):
        assert output[row] == by_hand(models, weights[row], row)


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0, 1.5])
def test_dera_equals_a_loop_without_caches(experts, strength: float) -> None:
    model, reference = experts[:2]
    output = new_tokens(dera(model, reference, strength, IDS, MASK, max_new_tokens=NEW, do_sample=False))
    for row in range(3):
        assert output[row] == by_hand([model, reference], torch.tensor([strength, 1 - strength]), row)


def test_three_experts_and_samples(experts) -> None:
    """With one prompt the random numbers are those of the loop."""
    weights = torch.tensor([0.2, 0.5, 0.3])
    for seed in range(5):
        torch.manual_seed(seed)
        expected = by_hand(experts, weights, 1, sample=True)
        torch.manual_seed(seed)
        options = dict(max_new_tokens=NEW, do_sample=True, top_k=0, top_p=1.0)
        assert new_tokens(logit_mixing(experts, weights, IDS[1:2], **options)) == [expected]


def test_at_the_ends_each_model_decodes_alone(experts) -> None:
    options = dict(max_new_tokens=NEW, do_sample=False)
    for i, vertex in enumerate(torch.eye(3)):
        alone = experts[i].generate(input_ids=IDS, attention_mask=MASK, **options)
        assert torch.equal(logit_mixing(experts, vertex, IDS, MASK, **options), alone)
    rows = torch.tensor([0.0, 1.0, 0.0])
    output = new_tokens(dera(experts[0], experts[1], rows, IDS, MASK, **options))
    expected = [new_tokens(m.generate(input_ids=IDS, attention_mask=MASK, **options)) for m in experts[:2]]
    assert output == [expected[1][0], expected[0][1], expected[1][2]]


@pytest.mark.parametrize("samples", [1, 3])
def test_caches_follow_beams(experts, samples: int, monkeypatch) -> None:
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.4, 0.3, 0.3]])
    options = dict(max_new_tokens=NEW, num_beams=3, num_return_sequences=samples, do_sample=False)
    moved, kept = [], decoding.Follower._reorder

    def spy(self, tokens: Tensor, prompts: int) -> int:
        moved.append(not torch.equal(tokens[:, : self.tokens.shape[1]], self.tokens))
        known = kept(self, tokens, prompts)
        assert known == self.tokens.shape[1]
        return known

    monkeypatch.setattr(decoding.Follower, "_reorder", spy)
    cached = logit_mixing(experts, weights, IDS, MASK, **options)
    assert any(moved)
    monkeypatch.setattr(decoding.Follower, "_reorder", lambda self, tokens, prompts: 0)
    assert torch.equal(cached, logit_mixing(experts, weights, IDS, MASK, **options))


def test_two_copies_of_a_model_are_that_model_with_beams(experts) -> None:
    options = dict(max_new_tokens=NEW, num_beams=3, num_return_sequences=2, do_sample=False)
    alone = experts[0].generate(input_ids=IDS, attention_mask=MASK, **options)
    assert torch.equal(logit_mixing([experts[0], build(0)], [0.4, 0.6], IDS, MASK, **options), alone)


def test_each_model_sees_each_token_once(experts) -> None:
    seen = []
    handle = experts[1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    output = logit_mixing(experts[:2], [0.5, 0.5], IDS, MASK, max_new_tokens=NEW, min_new_tokens=NEW)
    handle.remove()
    assert seen == [5] + [1] * (NEW - 1) and output.shape[1] == 5 + NEW


def test_forbidden_tokens_stay_forbidden_even_if_the_first_model_has_no_share(experts) -> None:
    free = logit_mixing(experts[:2], [0.0, 1.0], IDS, MASK, max_new_tokens=NEW, do_sample=False)
    token = int(free[0, 5])
    options = dict(max_new_tokens=NEW, do_sample=False, bad_words_ids=[[token]])
    assert token not in logit_mixing(experts[:2], [0.0, 1.0], IDS, MASK, **options)[:, 5:]


def test_a_step_returns_normalised_log_probabilities(experts) -> None:
    processor = MixedLogits([experts[1]], torch.tensor([0.3, 0.7]), MASK)
    scores = torch.randn(3, 41)
    mixed = processor(IDS, scores)
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(3))
    with torch.no_grad():
        other = experts[1](input_ids=IDS[1:2]).logits[:, -1].log_softmax(-1)
    expected = (0.3 * scores[1:2].log_softmax(-1) + 0.7 * other).log_softmax(-1)
    torch.testing.assert_close(mixed[1:2], expected, rtol=1e-4, atol=1e-5)


def test_errors_say_what_to_pass(experts) -> None:
    a, b = experts[:2]
    with pytest.raises(ValueError, match="padded on the left"):
        logit_mixing([a, b], [0.5, 0.5], IDS.flip(-1), MASK.flip(-1))
    with pytest.raises(ValueError, match="pass the tokenizer's attention_mask"):
        logit_mixing([a, b], [0.5, 0.5], IDS)
    with pytest.raises(ValueError, match="repetition_penalty acts on one model"):
        logit_mixing([a, b], [0.5, 0.5], IDS, MASK, repetition_penalty=1.2)
    with pytest.raises(ValueError, match="simplex"):
        logit_mixing([a, b], [0.5, 0.9], IDS, MASK)
    with pytest.raises(ValueError, match="there are 3 prompts and 2 models"):
        logit_mixing([a, b], [[0.5, 0.5]] * 2, IDS, MASK)
    with pytest.raises(ValueError, match=r"strength has shape \(2,\)"):
        dera(a, b, torch.ones(2), IDS, MASK)
    with pytest.raises(ValueError, match="there twice"):
        dera(a, a, 0.5, IDS, MASK)
    with pytest.raises(ValueError, match="training mode"):
        dera(a, build(1).train(), 0.5, IDS, MASK)
    small = transformers.LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
                                     num_attention_heads=2)  # fmt: skip
    with pytest.raises(ValueError, match="one tokenizer and vocabulary"):
        dera(a, transformers.LlamaForCausalLM(small).eval(), 0.5, IDS, MASK, max_new_tokens=2)
