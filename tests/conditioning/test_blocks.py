"""Blocks of `at` and `reference` of every kind of model: one in another, and those of several threads."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tiny_language_models import build, conditioned, lora, tokenizer

from mopl.conditioning import HookedModel, LoraMixture, ParameterMixture, TextPrompt, TextPromptModel, TuningRecord
from mopl.conditioning.causal_lm import adapters_off

NAMES, ONE, OTHER = ("helpful", "harmless"), [0.3, 0.7], [1.0, 0.0]
IDS = torch.tensor([[1, 7, 8, 9], [1, 20, 21, 22]])


class Shift(HookedModel):
    """Moves what the last layer gives."""

    def __init__(self):
        super().__init__()
        self.model, self.record = lora(build()), TuningRecord(NAMES)
        torch.manual_seed(1)
        self.shift = nn.Linear(2, 32)
        self.causal_lm.lm_head.register_forward_pre_hook(self.move)

    def move(self, head, inputs):
        given = self.conditions_for(inputs[0])
        return None if given is None else (inputs[0] + self.shift(given["weights"]),)


def lora_mixture():
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return LoraMixture(build(), 2, config=config, record=NAMES).eval()


def parameter_mixture():
    mixture = ParameterMixture(build(), 2, record=NAMES)
    with torch.no_grad():
        for parameter in mixture.others.parameters():
            parameter.add_(0.3)
    return mixture.eval()


MAKERS = {
    "virtual tokens": conditioned, "hooks": Shift, "adapters": lora_mixture, "parameters": parameter_mixture,
    "words": lambda: TextPromptModel(lora(build()), TextPrompt(NAMES), tokenizer()).eval(),
}  # fmt: skip


@torch.no_grad()
def logits(model, **given):
    return model(input_ids=IDS, **given).logits


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MAKERS)
def test_blocks_nest_and_the_innermost_one_holds(kind):
    model = MAKERS[kind]()
    one, other = (logits(model, weights=torch.tensor(w)) for w in (ONE, OTHER))
    blocks = [(lambda: model.at(ONE), one), (lambda: model.at(OTHER), other)]
    if model.has_reference:
        blocks.append((model.reference, logits(build())))
    requires_grad = [p.requires_grad for p in model.parameters()]
    for outer, wanted in blocks:
        for inner, wanted_inside in blocks:
            with outer() as around:
                with inner() as inside:
                    same(logits(inside), wanted_inside)
                    assert model.is_reference == (inner == model.reference)
                same(logits(around), wanted)
                with pytest.raises(MemoryError), inner():
                    raise MemoryError
                same(logits(around), wanted)
                assert model.is_reference == (outer == model.reference)
    assert torch.equal(logits(model, weights=torch.tensor(ONE)), one) and not model.is_reference
    assert [p.requires_grad for p in model.parameters()] == requires_grad


@pytest.mark.parametrize("kind", MAKERS)
def test_blocks_of_threads_end_with_the_last_of_them_and_want_the_same(kind):
    model = MAKERS[kind]()
    one = logits(model, weights=torch.tensor(ONE))
    blocks = [(lambda: model.at(ONE), one)]
    if model.has_reference:
        blocks.append((model.reference, logits(build())))
    with ThreadPoolExecutor(1) as thread:
        for block, wanted in blocks:
            here, there = contextlib.ExitStack(), contextlib.ExitStack()
            inside = here.enter_context(block())
            assert thread.submit(there.enter_context, block()).result() is inside
            for another in (lambda: model.at(OTHER), *(each for each, _ in blocks if each is not block)):
                with pytest.raises(RuntimeError, match="another thread"), another():
                    pass
            here.close()
            same(logits(inside), wanted)
            thread.submit(there.close).result()
            assert not model.is_reference
            assert torch.equal(logits(model, weights=torch.tensor(ONE)), one)
            with pytest.raises(ValueError, match="weights are missing"):
                logits(model)


@pytest.mark.parametrize("kind", ["flags", "disable_adapter"])
def test_adapters_are_off_until_the_last_block_of_several_ends(kind):
    model = lora(build())
    if kind != "flags":
        model.peft_config["default"].bias = "lora_only"
    own, (first, second) = logits(model), (adapters_off(model) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    same(logits(model), logits(build()))
    second.__exit__(None, None, None)
    assert torch.equal(logits(model), own)


def test_a_reference_with_adapters_and_one_without_nest():
    model = conditioned()
    with model.reference(adapters=True):
        with model.reference():
            same(logits(model), logits(build()))
            with model.reference(adapters=True):
                same(logits(model), logits(lora(build())))
        same(logits(model), logits(lora(build())))


def test_a_mixture_that_holds_is_not_changed_from_outside():
    model, weights = parameter_mixture(), torch.tensor(ONE, dtype=torch.float64)
    with model.at(weights) as one:
        before = logits(one)
        weights[:] = torch.tensor(OTHER)
        with model.at(OTHER):
            pass
        assert torch.equal(logits(one), before)


def test_a_mixture_that_is_kept_takes_gradients_whatever_made_it():
    model = parameter_mixture()
    with torch.inference_mode(), model.at(ONE) as one:
        wanted = one(input_ids=IDS).logits
    with model.at(ONE) as one:
        embedded = one.get_input_embeddings()(IDS).detach().requires_grad_()
        found = one(inputs_embeds=embedded).logits
        found.sum().backward()
    assert torch.equal(found, wanted) and embedded.grad.any()
