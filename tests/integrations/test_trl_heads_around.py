"""Around `patch_trl`: copies, pickles, compilation, `fuse`, a second trainer, wrong arguments."""

import copy
import pickle

import pytest

pytest.importorskip("trl", reason="needs the package trl")
import torch
import trl
from tiny_language_models import build
from torch import nn

import mopl
from mopl._extras import version_of
from mopl.alignment import fuse
from mopl.language_models.head import unfuse

if version_of(trl.__version__) < (1, 15):
    pytest.skip(f"the heads of trl {trl.__version__} are not in the model's forward", allow_module_level=True)
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

IDS = torch.tensor([[3, 4, 5, 6]])


class Accelerator:
    def unwrap_model(self, model: nn.Module) -> nn.Module:
        return model


class SFTTrainer:  # as much of TRL's as the patch looks at
    __module__ = "trl.trainer"
    accelerator, args = Accelerator(), None

    def __init__(self, model: nn.Module) -> None:
        self.model = model


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    made = build("llama").eval()
    add_fused_lm_head(made, outputs=("log_probs", "entropy"))
    return made


def test_a_copy_answers_nothing_with_the_weights_of_the_original(model: nn.Module) -> None:
    mopl.patch_trl(SFTTrainer(model))
    other = copy.deepcopy(model)
    for call in ({}, {"labels": IDS, "fused_lm_head": True}):
        with pytest.raises(RuntimeError, match=r"copy of one that mopl\.patch_trl patched"):
            other(input_ids=IDS, **call)


def test_a_pickle_is_the_plain_model(model: nn.Module) -> None:
    expected = model(input_ids=IDS).logits
    mopl.patch_trl(SFTTrainer(model))
    other = pickle.loads(pickle.dumps(model))
    nn.init.zeros_(other.get_output_embeddings().weight)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=0)
    assert other(input_ids=IDS).logits.abs().max() == 0


def test_plain_calls_compile(model: nn.Module) -> None:
    expected = model(input_ids=IDS).logits
    mopl.patch_trl(SFTTrainer(model))
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(input_ids=IDS).logits, expected)


def test_two_trainers_of_one_model_are_undone_in_any_order(model: nn.Module) -> None:
    found, (first, second) = model.forward, (SFTTrainer(model), SFTTrainer(model))
    for order in ((first, second), (second, first)):
        mopl.patch_trl(first)
        mopl.patch_trl(second)
        for trainer in order:
            assert isinstance(model(input_ids=IDS, labels=IDS, fused_lm_head=True), FusedCausalLMOutput)
            mopl.unpatch_trl(trainer)
        assert model.forward is found


def test_fuse_puts_back_the_forward_that_it_found(model: nn.Module) -> None:
    found, expected = model.forward, model(input_ids=IDS, labels=IDS, fused_lm_head=True).log_probs
    fuse(model)
    trainer = mopl.patch_trl(SFTTrainer(model))  # whose settings stand behind what `fuse` put there
    torch.testing.assert_close(model(input_ids=IDS, labels=IDS, fused_lm_head=True).log_probs, expected)
    mopl.unpatch_trl(trainer)
    unfuse(model)
    assert model.forward is found


@pytest.mark.parametrize("function", [mopl.patch_trl, mopl.unpatch_trl])
def test_what_is_no_trainer_is_refused(function) -> None:
    with pytest.raises(TypeError, match="trainer is the class SFTTrainer but must be"):
        function(SFTTrainer)
    with pytest.raises(TypeError, match="trainer is a int but must be"):
        function(3)
