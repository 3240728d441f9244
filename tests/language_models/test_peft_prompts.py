"""Models with PEFT's prompt tuning: rows as alone, or refused, for PEFT drops the positions of a call."""

import pytest
import torch

peft = pytest.importorskip("peft")
import tiny_language_models as tiny

from mopl._rows import UnsupportedModelError
from mopl.conditioning import ParameterMixture
from mopl.conditioning.weighted import check_packed, has_own_prompt
from mopl.decoding import logit_mixing
from mopl.language_models.divergences import states_of
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
    del packed["segment"]
    with pytest.raises(UnsupportedModelError, match="padding_free=False"):
        score_sequences(model, packed)
    with model.disable_adapter():
        check_packed(model)  # the base model, a reference, packs
    mixture = ParameterMixture(model, 2)
    with pytest.raises(UnsupportedModelError, match="padding_free=False"):
        score_sequences(mixture, packed, weights=torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("config", CONFIGS, ids=["prompt", "prefix"])
def test_rows_padded_on_the_left_are_refused_for_what_they_are(config) -> None:
    ids = torch.tensor([[7, 9, 11, 30, 8], [0, 0, 44, 12, 6]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}
    for score in (score_sequences, states_of):
        with pytest.raises(UnsupportedModelError, match=r"row's padding on the left.*padding_side='right'"):
            score(tuned(config), batch)


def test_packed_rows_of_adapters_that_begin_at_tokens_are_refused() -> None:
    """PEFT looks for the tokens once in a row."""
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, alora_invocation_tokens=[50, 51],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = tuned(config)
    rows = [torch.tensor(row) for row in ([7, 50, 51, 30, 8, 9], [44, 12, 50, 51, 6])]
    alone = torch.cat([score_sequences(model, {"input_ids": row[None], "labels": row[None]}).scores for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}
    torch.testing.assert_close(score_sequences(model, batch).scores, alone, rtol=1e-4, atol=1e-4)
    packed = {
        "input_ids": torch.cat(rows)[None], "labels": torch.cat(rows)[None],
        "position_ids": torch.tensor([[*range(6), *range(5)]]), "segment": torch.tensor([[0] * 6 + [1] * 5]),
    }  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"alora_invocation_tokens.*padding_free=False"):
        score_sequences(model, packed)


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
