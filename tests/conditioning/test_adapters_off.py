"""With its adapters off a PEFT model is the model inside, whichever way they are switched, and comes back as it was."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tiny_language_models import build

from mopl.conditioning.causal_lm import adapters_off

TARGETS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
KINDS = {
    "lora": lambda: peft.LoraConfig(r=2, **TARGETS),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, **TARGETS),
    "embeddings": lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
    "whole head": lambda: peft.LoraConfig(r=2, modules_to_save=["lm_head"], **TARGETS),
    "tokens": lambda: peft.LoraConfig(r=2, trainable_token_indices=[3, 4], **TARGETS),
    "biases": lambda: peft.LoraConfig(r=2, bias="lora_only", **TARGETS),
    "loha": lambda: peft.LoHaConfig(r=2, **TARGETS),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}
BY_FLAG = ("lora", "dora", "embeddings", "whole head")
TOKENS = torch.tensor([[6, 7, 8, 9]])


def adapted(kind: str):
    torch.manual_seed(2)
    model = peft.get_peft_model(build(), KINDS[kind]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def state(model):
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    off = {name: m.disable_adapters for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return flags, off, model.active_adapter


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_computes_what_it_does_under_disable_adapter_and_comes_back(kind):
    model = adapted(kind)
    before, own = state(model), logits(model)
    with adapters_off(model):
        found = logits(model)
    assert state(model) == before and torch.equal(logits(model), own)
    with pytest.raises(MemoryError), adapters_off(model):
        raise MemoryError
    assert state(model) == before and torch.equal(logits(model), own)
    with model.disable_adapter():
        wanted = logits(model)
    assert torch.equal(found, wanted)
    assert own.shape != found.shape or not torch.allclose(found, own, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_is_switched_by_its_flags_and_all_else_by_peft(monkeypatch, kind):
    model, asked = adapted(kind), []
    plain = model.disable_adapter
    monkeypatch.setattr(model, "disable_adapter", lambda: asked.append(kind) or plain())
    with adapters_off(model):
        pass
    assert asked == [] if kind in BY_FLAG else asked == [kind]


def test_a_layer_that_was_off_stays_off():
    model = adapted("lora")
    first = next(m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer))
    first.enable_adapters(False)
    before, own = state(model), logits(model)
    with adapters_off(model), adapters_off(model):
        inside = logits(model)
    assert state(model) == before and torch.equal(logits(model), own)
    with model.disable_adapter():
        assert torch.equal(logits(model), inside)


def test_merged_adapters_are_taken_out_as_peft_does_it():
    model = adapted("lora")
    model.merge_adapter()
    with adapters_off(model):
        found = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), found)
    assert not next(m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)).merged


def test_a_layer_with_a_switch_of_its_own_is_switched_by_it(monkeypatch):
    model, asked = adapted("lora"), []
    plain = peft.tuners.lora.Linear.enable_adapters

    def own(self, enabled: bool) -> None:
        asked.append(enabled)
        plain(self, enabled)

    monkeypatch.setattr(peft.tuners.lora.Linear, "enable_adapters", own)
    with adapters_off(model):
        assert set(asked) == {False}
    assert set(asked) == {False, True}
