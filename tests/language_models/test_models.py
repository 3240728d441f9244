"""Models are loaded and prepared so that nothing is drawn in a forward pass of a training."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tiny_language_models import COMMON, build
from transformers import AutoModelForCausalLM, PersimmonConfig

from mopl.language_models.models import disable_dropout

IDS = torch.arange(6, 18)[None]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.train()(input_ids=IDS).logits


def adapted(config) -> nn.Module:
    return peft.get_peft_model(build(), config)


DRAWING = {
    "modules, and a number in each layer": lambda: build("opt", dropout=0.3),
    "a number in the attention": lambda: build("llama", attention_dropout=0.3),
    "the configuration": lambda: AutoModelForCausalLM.from_config(
        PersimmonConfig(**{**COMMON, "num_hidden_layers": 1}, attention_dropout=0.3)
    ),
    "layers that are left out": lambda: build("opt", dropout=0.0, layerdrop=0.5),
    "adapters": lambda: adapted(
        peft.LoraConfig(r=2, lora_dropout=0.3, init_lora_weights=False, target_modules=["q_proj"])
    ),
    "ranks of adapters": lambda: adapted(
        peft.LoHaConfig(r=8, rank_dropout=0.3, init_weights=False, target_modules=["q_proj"])
    ),
}


@pytest.mark.parametrize("where", DRAWING)
def test_nothing_is_drawn_in_a_training_once_dropout_is_off_wherever_it_was(where: str) -> None:
    model = DRAWING[where]()
    assert len({tuple(logits(model).flatten().tolist()) for _ in range(4)}) > 1
    disable_dropout(model)
    assert torch.equal(logits(model), logits(model))
    assert torch.equal(logits(model), model.eval()(input_ids=IDS).logits)
