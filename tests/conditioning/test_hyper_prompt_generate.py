"""Models conditioned by a `HyperPrompt`: generation with a chosen weight vector, files, and errors."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tiny_language_models import VOCABULARY, K, build, lora
from tiny_language_models import prompt as trained_prompt

from mopl.alignment import fuse, score_sequences
from mopl.conditioning import HyperPromptModel, LoraMixture, TuningRecord

PAD, EOS = 0, 2
FAMILIES = ("llama", "gpt2", "gemma2", "opt")
WEIGHTS = torch.tensor([[0.2, 0.8], [0.7, 0.3], [1.0, 0.0]])


def conditioned(family: str = "llama", wrap=lambda model: model, **kwargs) -> HyperPromptModel:
    model = build(family)
    prompt = trained_prompt(model.get_input_embeddings().weight.shape[1])
    return HyperPromptModel(wrap(model), prompt, **kwargs).eval()


def prompts() -> dict[str, Tensor]:
    """Three rows of 12, 9 and 10 tokens, padded on the left."""
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, padded in ((1, 3), (2, 2)):
        ids[row, :padded], mask[row, :padded] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def step_by_step(model: HyperPromptModel, steps: int) -> Tensor:
    """Greedy decoding without a cache and without `generate`."""
    batch = prompts()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        for _ in range(steps):
            logits = model(ids, mask, WEIGHTS, use_cache=False).logits[:, -1]
            logits[:, EOS] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}


@pytest.mark.parametrize("positions", ["hf", "paper"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_is_step_by_step_argmax_without_a_cache(family: str, positions: str) -> None:
    model = conditioned(family, positions=positions)
    generated = model.generate(**prompts(), weights=WEIGHTS, **GREEDY)
    assert torch.equal(generated, step_by_step(model, 8))


@pytest.mark.parametrize("wrap", [lora, fuse, lambda model: lora(fuse(model))], ids=["lora", "fused", "both"])
def test_generation_with_adapters_and_fused(wrap) -> None:
    model = conditioned(wrap=wrap)
    assert torch.equal(model.generate(**prompts(), weights=WEIGHTS, **GREEDY), step_by_step(model, 8))


@pytest.mark.parametrize("positions", ["hf", "paper"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_beams_and_return_sequences_keep_each_row_with_its_w(family: str, positions: str) -> None:
    model, batch = conditioned(family, positions=positions), prompts()
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    together = model.generate(**batch, weights=WEIGHTS, **options).view(3, 2, -1)
    for i in range(3):
        kept = batch["attention_mask"][i].bool()
        alone = model.generate(batch["input_ids"][i][kept][None], weights=WEIGHTS[i], **options)
        assert torch.equal(together[i][:, 12:], alone[:, int(kept.sum()) :])
    swapped = model.generate(**batch, weights=WEIGHTS.flip(0), **options).view(3, 2, -1)
    assert not torch.equal(swapped[0], together[0])


def test_sampling_several_sequences_is_repeatable() -> None:
    model = conditioned()
    draws = []
    for _ in range(2):
        torch.manual_seed(9)
        options = {"do_sample": True, "max_new_tokens": 6, "num_return_sequences": 4}
        draws.append(model.generate(**prompts(), weights=WEIGHTS, **options))
    assert draws[0].shape[0] == 12 and torch.equal(draws[0], draws[1])


def test_the_prompt_enters_once() -> None:
    model, lengths = conditioned(), []
    model.generate(**prompts(), weights=WEIGHTS, **GREEDY)  # the first call measures how the model takes rows
    layer = model.causal_lm.model.layers[0]
    layer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model.generate(**prompts(), weights=WEIGHTS, **GREEDY)
    assert lengths == [K + 12] + [1] * 7


@pytest.mark.parametrize("positions", ["hf", "paper"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_cache_of_the_callers_gives_the_logits_of_the_whole(family: str, positions: str) -> None:
    model, batch = conditioned(family, positions=positions), prompts()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        whole = model(ids, mask, WEIGHTS).logits
        cache = transformers.DynamicCache(config=model.config)
        parts = [
            model(ids[:, a:b], mask[:, :b], WEIGHTS, past_key_values=cache, use_cache=True).logits
            for a, b in ((0, 7), (7, 8), (8, 12))
        ]
    kept = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[kept], whole[kept], atol=2e-5, rtol=1e-4)


def test_a_cache_that_ends_inside_padding_is_refused() -> None:
    model, batch = conditioned(), prompts()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    cache = transformers.DynamicCache(config=model.config)
    model(ids[:, :2], mask[:, :2], WEIGHTS, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="ends inside the padding"):
        model(ids[:, 2:], mask, WEIGHTS, past_key_values=cache, use_cache=True)


def test_lengths_count_text_and_not_virtual_tokens() -> None:
    model = conditioned()
    model.causal_lm.generation_config.eos_token_id = None
    options = {**prompts(), "weights": WEIGHTS, "do_sample": False}
    assert model.generate(**options, max_length=15).shape == (3, 15)
    config = transformers.GenerationConfig(max_length=16, pad_token_id=PAD)
    assert model.generate(**options, generation_config=config).shape == (3, 16)
    assert config.max_length == 16
    with pytest.raises(ValueError, match="12 tokens already"):
        model.generate(**options, max_length=12)
    model.causal_lm.generation_config.eos_token_id = list(range(VOCABULARY))
    assert model.generate(**options, min_length=14, max_new_tokens=9).shape[1] > 12


def test_processors_of_generate_see_the_tokens_of_the_prompt() -> None:
    model, batch = conditioned(), prompts()
    new = model.generate(**batch, weights=WEIGHTS, no_repeat_ngram_size=1, do_sample=False, max_new_tokens=6)[:, 12:]
    for row, text in zip(new, batch["input_ids"], strict=True):
        assert not set(row.tolist()) & (set(text.tolist()) - {EOS, PAD})


def test_betas_condition_generation() -> None:
    model = HyperPromptModel(build(), trained_prompt(takes_beta=True)).eval()
    one = model.generate(**prompts(), weights=WEIGHTS, beta=[0.7, 1.5], **GREEDY)
    same = model.generate(**prompts(), weights=WEIGHTS, beta=torch.tensor([[1.4, 3.0]]), **GREEDY)
    other = model.generate(**prompts(), weights=WEIGHTS, beta=[1.5, 0.7], **GREEDY)
    assert torch.equal(one, same) and not torch.equal(one, other)
    rows = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]])
    assert model(**prompts(), weights=WEIGHTS[0], beta=rows).logits.shape[0] == 3


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("adapter", [None, "default", "helpful"])
@pytest.mark.parametrize("positions", ["hf", "paper"])
def test_save_and_load(tmp_path: Path, adapter: str | None, positions: str) -> None:
    record = TuningRecord(("helpful", "harmless"), beta=[0.1, 0.2], concentration=1.0)
    base = build()
    plain = copy.deepcopy(base)
    model = HyperPromptModel(
        lora(base, adapter) if adapter else base, trained_prompt(), record=record, positions=positions
    ).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "mopl.json").read_text())
    assert config["objectives"] == ["helpful", "harmless"] and config["beta"] == [0.1, 0.2] and config["alpha"] == 1.0
    assert config["prompt"]["virtual_tokens"] == K and config["prompt"]["rank"] == 3 and config["reference"] == "self"
    assert (tmp_path / "hyper_prompt.safetensors").stat().st_size < 100_000  # no base model inside

    loaded = HyperPromptModel.from_pretrained(tmp_path, copy.deepcopy(plain))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert loaded.record == record and loaded.positions == positions
    with torch.no_grad():
        expected = model(**prompts(), weights=WEIGHTS).logits
        assert torch.equal(loaded(**prompts(), weights=WEIGHTS).logits, expected)
        with loaded.reference(), model.reference():
            assert torch.equal(loaded(**prompts()).logits, model(**prompts()).logits)

    again = HyperPromptModel.from_pretrained(tmp_path, fuse(plain), trainable=True)
    trained = {name for name, p in again.named_parameters() if p.requires_grad}
    assert {name for name, _ in model.named_parameters() if name.startswith("hyper_prompt")} <= trained
    assert any(".lora_" in name for name in trained) == (adapter is not None)
    labels = prompts()["input_ids"].masked_fill(prompts()["attention_mask"] == 0, -100)
    score_sequences(again, {**prompts(), "labels": labels, "weights": WEIGHTS}).scores.sum().backward()


def test_a_base_model_is_loaded_by_its_name(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = HyperPromptModel(lora(base), trained_prompt()).eval()
    model.save_pretrained(tmp_path / "tuned")
    loaded = HyperPromptModel.from_pretrained(tmp_path / "tuned")
    assert torch.equal(loaded(**prompts(), weights=WEIGHTS).logits, model(**prompts(), weights=WEIGHTS).logits)


def test_folders_that_hold_no_such_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"mopl\.json"):
        HyperPromptModel.from_pretrained(tmp_path, build())
    HyperPromptModel(build(), trained_prompt()).save_pretrained(tmp_path)
    # What the caller left out, or passed too much, is no damage of a file.
    with pytest.raises(ValueError, match=r"names no base model; pass it as model$"):
        HyperPromptModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^\['dtype'\] are for a model that is loaded here, but model was passed$"):
        HyperPromptModel.from_pretrained(tmp_path, build(), dtype="auto")
    with pytest.raises(ValueError, match="embeds tokens in 16"):
        HyperPromptModel.from_pretrained(tmp_path, build("opt"))
    config = json.loads((tmp_path / "mopl.json").read_text())
    (tmp_path / "mopl.json").write_text(json.dumps({**config, "kind": "RankingModel"}))
    with pytest.raises(ValueError, match="RankingModel"):
        HyperPromptModel.from_pretrained(tmp_path, build())


# ---------------------------------------------------------------- errors


def test_a_plain_model_rejects_weights() -> None:
    with pytest.raises(ValueError, match="weights"):
        build().generate(**prompts(), weights=WEIGHTS, **GREEDY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "weights are missing; pass one for each of objective_1, objective_2"),
        ({"weights": WEIGHTS[:2]}, "3 rows and 2 objectives"),
        ({"weights": torch.ones(3)}, "m = 2"),
        ({"weights": WEIGHTS, "beta": torch.ones(2)}, "not conditioned on it"),
        ({"weights": WEIGHTS, "attention_mask": torch.ones(3, 13)}, "attention_mask covers 13"),
        ({"weights": WEIGHTS, "attention_mask": torch.ones(3, 1, 12, 12)}, "attention_mask has shape"),
        ({"weights": WEIGHTS, "attention_mask": None, "position_ids": torch.arange(12)[None]}, r"one row \(1, N\)"),
        ({"weights": WEIGHTS, "position_ids": torch.arange(13)[None]}, "position_ids has shape"),
        ({"weights": WEIGHTS, "token_type_ids": torch.zeros(3, 12)}, "token_type_ids"),
        ({"weights": WEIGHTS, "return_dict": False}, "return_dict"),
        ({"weights": WEIGHTS, "inputs_embeds": torch.zeros(3, 12, 32)}, "either input_ids"),
    ],
)
def test_bad_calls_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conditioned()(**{**prompts(), **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "weights are missing"),
        ({"weights": [0.7, 0.7]}, "does not sum to 1"),
        ({"weights": [1.2, -0.2]}, "negative entry"),
        ({"weights": WEIGHTS[:2]}, "3 rows"),
        ({"weights": WEIGHTS, "attention_mask": None}, "attention_mask"),
        ({"weights": WEIGHTS, "attention_mask": prompts()["attention_mask"].flip(1)}, "padded on the right"),
        ({"weights": WEIGHTS, "prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"weights": WEIGHTS, "prefill_chunk_size": 3}, "prefill_chunk_size"),
        ({"weights": WEIGHTS, "unknown_option": 3}, "unknown_option"),
    ],
)
def test_bad_generation_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conditioned().generate(**{**prompts(), **GREEDY, **arguments})


def test_models_that_cannot_be_conditioned_are_named() -> None:
    tuned = peft.get_peft_model(build(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="a prompt of its own"):
        HyperPromptModel(tuned, trained_prompt())
    native = build()
    native.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="get_peft_model"):
        HyperPromptModel(native, trained_prompt())
    with pytest.raises(ValueError, match="embeds tokens in 32; pass that"):
        HyperPromptModel(build(), trained_prompt(16))
    with pytest.raises(ValueError, match="record names"):
        HyperPromptModel(build(), trained_prompt(), record=["one"])
    with pytest.raises(ValueError, match="positions is 'both'"):
        HyperPromptModel(build(), trained_prompt(), positions="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes no inputs_embeds"):
        HyperPromptModel(Bare(), trained_prompt())
    mixture = LoraMixture(build(), 2, config=peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"LoraMixture\.forward takes no inputs_embeds"):
        HyperPromptModel(mixture, trained_prompt())
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1))
    with pytest.raises(ValueError, match="absolute or rotary"):
        HyperPromptModel(bloom, trained_prompt(), positions="paper")


def test_paper_positions_refuse_attention_that_would_take_them_for_packing() -> None:
    model = conditioned(positions="paper")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="sdpa"):
        model(**prompts(), weights=WEIGHTS)


class Bare(nn.Module):
    """A language model that takes token ids only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embed(input_ids)
