"""Models with PEFT's prompt tuning: rows as alone, or refused, for PEFT drops the positions of a call."""

import pytest
import torch

peft = pytest.importorskip("peft")
import tiny_language_models as tiny

from mopl._rows import UnsupportedModelError
from mopl.conditioning.weighted import check_packed, has_own_prompt
from mopl.decoding import logit_mixing
from mopl.language_models.generate import generate
from mopl.language_models.head import fuse, score_sequences

CONFIGS = [
    peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
]


def tuned(config: peft.PeftConfig):
    model = peft.get_peft_model(fuse(tiny.build("llama")), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("config", CONFIGS, ids=["prompt", "prefix"])
def test_packed_rows_are_refused_and_padded_ones_scored_as_alone(config) -> None:
    model = tuned(config)
    ids = torch.tensor([[7, 9, 11, 30, 8], [44, 12, 6, 0, 0]])
    mask = (ids > 0).long()
    labels = ids.masked_fill(mask == 0, -100)
    together = score_sequences(model, {"input_ids": ids, "attention_mask": mask, "labels": labels}).scores
    alone = [
        score_sequences(model, {"input_ids": row[None], "labels": row[None]}).scores for row in (ids[0], ids[1, :3])
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    packed = {
        "input_ids": ids[mask > 0][None], "labels": ids[mask > 0][None],
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]]), "segment": torch.tensor([[0] * 5 + [1] * 3]),
    }  # fmt: skip
    for wrapped in (model, torch.nn.DataParallel(model)):
        with pytest.raises(UnsupportedModelError, match="padding_free=False"):
            score_sequences(wrapped, packed)
    with model.disable_adapter():
        check_packed(model)  # the base model, a reference, packs


@pytest.mark.parametrize("config", CONFIGS, ids=["prompt", "prefix"])
def test_prompts_of_different_lengths_are_answered_as_alone(config) -> None:
    model, tokenizer = tuned(config), tiny.tokenizer()
    alone = [generate(model, tokenizer, prompt, max_new_tokens=5)[0].tokens for prompt in tiny.PROMPTS]
    assert [each.tokens for each in generate(model, tokenizer, tiny.PROMPTS, max_new_tokens=5)] == alone


def test_such_a_model_does_not_run_beside_another() -> None:
    model, ids = tuned(CONFIGS[0]), torch.tensor([[7, 9, 11]])
    assert has_own_prompt(model) and not has_own_prompt(tiny.lora(tiny.build()))
    with pytest.raises(ValueError, match="prompt of PEFT's"):
        logit_mixing([tiny.build("gpt2"), model], torch.tensor([0.5, 0.5]), ids, max_new_tokens=3, pad_token_id=0)
