"""`fuse` and `score_sequences` against `log_softmax` of each model's own logits, for every family of models at hand."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from mopl.language_models.head import UnsupportedModelError, fuse, is_fused, score_sequences, unfuse

VOCABULARY = 67
COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma": ("GemmaConfig", {}),
    "gemma2": ("Gemma2Config", {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {"final_logit_softcapping": 0.7, "query_pre_attn_scalar": 8}),
    "phi": ("PhiConfig", {"num_key_value_heads": 4}),
    "phi3": ("Phi3Config", {}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "olmo2": ("Olmo2Config", {}),
    "cohere": ("CohereConfig", {"logit_scale": 0.0625}),
    "cohere2": ("Cohere2Config", {"logit_scale": 0.25, "layer_types": ["full_attention", "full_attention"]}),
    "granite": ("GraniteConfig", {"logits_scaling": 8.0}),
    "minicpm3": (
        "MiniCPM3Config",
        {
            "dim_model_base": 8,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "num_key_value_heads": 4,
            "head_dim": None,
        },
    ),
    "falcon": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None}),
    "falcon-h1": (
        "FalconH1Config",
        {"lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    ),
    "smollm3": ("SmolLM3Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "output_router_logits": True}),
    "qwen3-moe": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
}


def build(family: str) -> nn.Module:
    """Return a tiny random model with a peaked head, so that scale, cap and bias all show."""
    name, extra = FAMILIES[family]
    config_class = getattr(transformers, name, None)
    if config_class is None:
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    config = config_class(**{name: value for name, value in {**COMMON, **extra}.items() if value is not None})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight.mul_(8.0 / head.weight.std() / math.sqrt(head.weight.shape[1]))
        if head.bias is not None:
            head.bias.normal_()
    return model


def example(padding: str = "right") -> dict[str, Tensor]:
    """Three prompts with responses of different length, one of them empty."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=generator)
    attention = torch.ones_like(ids)
    labels = ids.clone()
    labels[:, :4] = -100  # prompts
    labels[2] = -100  # an empty response
    for row, padded in ((1, 3), (2, 2)):
        where = slice(0, padded) if padding == "left" else slice(12 - padded, 12)
        ids[row, where], attention[row, where], labels[row, where] = 0, 0, -100
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def own_scores(model: nn.Module, batch: dict[str, Tensor], prefix: int = 0, **kwargs) -> Tensor:
    """Scores from `log_softmax` of the model's own logits, in float64."""
    inputs = {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask", "position_ids")}
    logits = model(**inputs, **kwargs).logits[:, prefix:].double()
    labels = batch["labels"][:, 1:]
    picked = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (picked * (labels != -100)).sum(-1)


def alone(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row without its padding."""
    there = batch["attention_mask"][row].bool()
    return {name: value[row : row + 1, there] for name, value in batch.items()}


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_log_softmax_of_the_models_own_logits(family: str, padding: str) -> None:
    model = build(family)
    batch = example(padding)
    with torch.no_grad():
        # Of each row alone: with padding, not every model's own logits are those of the row.
        expected = torch.cat([own_scores(model, alone(batch, row)) for row in range(3)])
        result = score_sequences(fuse(model), batch)
    assert result.scores.dtype == torch.float32
    torch.testing.assert_close(result.scores.double(), expected, atol=2e-5, rtol=1e-5)
    assert result.scores[2] == 0
    assert result.lengths.tolist() == (batch["labels"][:, 1:] != -100).sum(-1).tolist()


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "cohere", "phi", "opt", "mixtral"])
def test_gradients_equal_those_through_the_logits(family: str) -> None:
    plain, fused = build(family), fuse(build(family))
    batch = example()
    upstream = torch.tensor([0.3, -1.7, 2.0])
    (own_scores(plain, batch).float() * upstream).sum().backward()
    (score_sequences(fused, batch).scores * upstream).sum().backward()
    expected = dict(plain.named_parameters())
    scale = max(float(p.grad.abs().max()) for p in expected.values() if p.grad is not None)
    for name, parameter in fused.named_parameters():
        if expected[name].grad is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            torch.testing.assert_close(parameter.grad, expected[name].grad, atol=2e-6 * scale, rtol=2e-4, msg=name)


def test_targets_that_are_not_aligned_with_the_rows_are_refused() -> None:
    model, ids = fuse(build("llama")), torch.randint(5, 20, (1, 6))
    with pytest.raises(ValueError, match=r"targets has shape \(1, 5\) but input_ids \(1, 6\).*ids\[:, :-1\]"):
        model(ids, targets=ids[:, 1:])  # each token would be scored one position late
    whole = model(ids[:, :-1], targets=ids[:, 1:]).log_probs
    assert whole.shape == (1, 5)
    last = model(ids[:, :-1], targets=ids[:, 3:], logits_to_keep=3).log_probs  # said to be the last three
    torch.testing.assert_close(last, whole[:, -3:])


def test_every_other_call_is_as_before_and_unfuse_restores_the_model() -> None:
    model = build("llama")
    batch = example()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    before = model(**inputs).logits
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with_labels = model(**inputs, labels=batch["labels"]).loss
    fuse(model)
    assert is_fused(model) and fuse(model) is model
    assert torch.equal(model(**inputs).logits, before)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), generated)
    assert torch.equal(model(**inputs, labels=batch["labels"]).loss, with_labels)
    score_sequences(model, batch)
    assert torch.equal(model(**inputs).logits, before)
    unfuse(model)
    assert not is_fused(model) and torch.equal(model(**inputs).logits, before)
    with pytest.raises((ValueError, TypeError)):
        score_sequences(model, batch)


def test_the_prompt_never_reaches_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    import mopl.language_models._head_scores as module

    seen = []
    original = module.linear_logprob
    monkeypatch.setattr(module, "linear_logprob", lambda *a, **k: seen.append(a[2]) or original(*a, **k))
    batch = example()
    score_sequences(fuse(build("llama")), batch)
    assert int((seen[0] != -100).sum()) == int((batch["labels"][:, 1:] != -100).sum()) < batch["input_ids"].numel() / 2


def test_temperature_entropy_and_logsumexp_come_from_the_same_pass() -> None:
    model = build("gemma2")
    batch = example()
    labels = torch.full_like(batch["labels"], -100)
    labels[:, :-1] = batch["labels"][:, 1:]
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double() / 0.7
        out = fuse(model)(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            targets=labels,
            temperature=0.7,
            return_logsumexp=True,
            return_entropy=True,
        )
    counted = labels != -100
    log_p = logits.log_softmax(-1)
    torch.testing.assert_close(out.logsumexp.double()[counted], logits.logsumexp(-1)[counted], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        out.entropy.double()[counted], -(log_p.exp() * log_p).sum(-1)[counted], atol=1e-5, rtol=1e-5
    )


def test_average_is_the_mean_over_response_tokens_and_an_empty_response_scores_zero() -> None:
    model, batch = fuse(build("llama")), example()
    total, mean = score_sequences(model, batch), score_sequences(model, batch, average=True)
    torch.testing.assert_close(mean.scores, total.scores / total.lengths.clamp(min=1))
    assert mean.scores[2] == 0


def test_inference_mode_changes_no_score_and_leaves_the_model_trainable() -> None:
    model, batch = fuse(build("gemma2")), example()
    with torch.inference_mode():
        scores = score_sequences(model, batch).scores
    again = score_sequences(model, batch).scores
    assert torch.equal(scores, again.detach())
    again.sum().backward()


def test_a_response_mask_says_the_same_as_labels() -> None:
    model, batch = fuse(build("llama")), example()
    labels = batch.pop("labels")
    with_mask = score_sequences(model, {**batch, "response_mask": labels != -100})
    assert torch.equal(with_mask.scores, score_sequences(model, {**batch, "labels": labels}).scores)


def test_packed_sequences_score_like_padded_ones() -> None:
    model = fuse(build("llama"))
    batch = example()
    padded = score_sequences(model, batch)
    kept = batch["attention_mask"].bool()
    segment = torch.arange(3)[:, None].expand_as(kept)[kept][None]
    lengths = kept.sum(-1).tolist()
    packed = {
        "input_ids": batch["input_ids"][kept][None],
        "labels": batch["labels"][kept][None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "segment": segment,
    }
    result = score_sequences(model, {**packed, "sequences": 3})
    torch.testing.assert_close(result.scores, padded.scores, atol=1e-4, rtol=1e-5)
    assert result.lengths.tolist() == padded.lengths.tolist()


def test_gradient_checkpointing_changes_nothing() -> None:
    plain, checkpointed = fuse(build("llama")).train(), fuse(build("llama")).train()
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        score_sequences(model, example()).scores.sum().backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_autocast_is_nearer_to_float32_than_the_models_own_autocast_logits() -> None:
    model, batch = build("llama"), example()
    with torch.no_grad():
        truth = own_scores(model, batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            theirs = own_scores(model, batch)
            ours = score_sequences(fuse(model), batch).scores.double()
    assert ours.dtype == torch.float64 and (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 1e-3


# ---------------------------------------------------------------- PEFT


def lora(model: nn.Module, **kwargs) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **kwargs)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_lora_on_the_body_with_and_without_a_trained_head(saved: list[str] | None) -> None:
    model = lora(fuse(build("llama")), target_modules=["q_proj", "v_proj"], modules_to_save=saved)
    batch = example()
    with torch.no_grad():
        if saved:
            model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.3)
        expected = own_scores(model, batch)
    result = score_sequences(model, batch)
    torch.testing.assert_close(result.scores.double(), expected, atol=2e-5, rtol=1e-5)
    result.scores.sum().backward()
    head_gradients = [p.grad for name, p in model.named_parameters() if "lm_head" in name and p.requires_grad]
    assert len(head_gradients) == (1 if saved else 0) and all(g is not None and g.any() for g in head_gradients)
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(
            score_sequences(model, batch).scores.double(), own_scores(model, batch), atol=2e-5, rtol=1e-5
        )


def test_an_adapter_on_the_head_raises_and_says_what_to_do() -> None:
    model = lora(fuse(build("llama")), target_modules=["q_proj", "lm_head"])
    with pytest.raises(UnsupportedModelError, match="modules_to_save"):
        score_sequences(model, example())


def test_prompt_learning_prefixes_are_not_scored() -> None:
    peft = pytest.importorskip("peft")
    model = fuse(build("llama"))
    torch.manual_seed(4)
    tuned = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    batch = example()
    with torch.no_grad():
        expected = own_scores(tuned, batch, prefix=5)
    torch.testing.assert_close(score_sequences(tuned, batch).scores.double(), expected, atol=2e-5, rtol=1e-5)


def test_the_name_of_a_model_is_no_model() -> None:
    with pytest.raises(TypeError, match="model is of type str but must be a model that transformers has loaded"):
        fuse("MODEL")


def test_fusing_a_peft_model_says_to_fuse_its_base_first() -> None:
    with pytest.raises(UnsupportedModelError, match="before wrapping"):
        fuse(lora(build("llama"), target_modules=["q_proj"]))


# ---------------------------------------------------------------- models that must be refused


class _Masked(transformers.LlamaForCausalLM):
    """Forbids one token, as some multimodal models do."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits[..., 5] = torch.finfo(output.logits.dtype).min
        return output


class _Shifted(transformers.LlamaForCausalLM):
    """Adds a constant that differs between entries after the head."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.linspace(0, 1, output.logits.shape[-1])
        return output


class _Bypassing(transformers.LlamaForCausalLM):
    """Never calls its head."""

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, **kwargs):
        hidden = self.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=hidden @ self.lm_head.weight.T)


@pytest.mark.parametrize("bad", [_Masked, _Shifted, _Bypassing])
def test_a_model_that_treats_its_logits_otherwise_is_refused(bad: type) -> None:
    model = bad(transformers.LlamaConfig(**COMMON))
    with pytest.raises(UnsupportedModelError):
        fuse(model)
    assert not is_fused(model)


@pytest.mark.parametrize("change", ["head_dtype", "no_head"])
def test_heads_that_cannot_be_fused_are_named(change: str) -> None:
    model = build("llama")
    if change == "head_dtype":
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().to(torch.int8), requires_grad=False)
    else:
        model = model.model
    with pytest.raises(UnsupportedModelError, match=r"head"):
        fuse(model)


@pytest.mark.parametrize(
    ("drop", "message"), [("input_ids", "input_ids"), ("labels", "labels"), ("shape", "labels has shape")]
)
def test_bad_batches_are_named(drop: str, message: str) -> None:
    model, batch = fuse(build("llama")), example()
    if drop == "shape":
        batch["labels"] = batch["labels"][:, :-1]
    else:
        del batch[drop]
    with pytest.raises(ValueError, match=message):
        score_sequences(model, batch)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_fused_model_comes_back_from_a_file_fused_and_scores(how: str, tmp_path) -> None:
    model = fuse(build("gemma2"))
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        before = score_sequences(model, example()).scores
        assert is_fused(twin) and torch.equal(score_sequences(twin, example()).scores, before)
        for parameter in twin.parameters():
            parameter.mul_(0.5)
        assert not torch.allclose(score_sequences(twin, example()).scores, before)
        assert torch.equal(score_sequences(model, example()).scores, before)
        inputs = {"input_ids": example()["input_ids"][:1], "do_sample": False, "max_new_tokens": 2}
        assert torch.equal(model.generate(**inputs), unfuse(copy.deepcopy(model)).generate(**inputs))
        assert not is_fused(unfuse(twin)) and twin(example()["input_ids"]).logits is not None
    with pytest.raises(ValueError, match="not used by the model"):
        model.generate(**inputs, nonsense=1)


def test_a_softcap_or_scale_that_changes_after_fuse_is_measured_again() -> None:
    def expected(model) -> torch.Tensor:
        plain = unfuse(copy.deepcopy(model))
        batch = example()
        labels = batch.pop("labels")[:, 1:]
        log_p = plain(**batch).logits[:, :-1].double().log_softmax(-1)
        kept = labels != -100
        return (log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * kept).sum(1)

    for family, change in (
        ("gemma2", lambda model: setattr(model.config, "final_logit_softcapping", 0.2)),
        ("gemma2", lambda model: setattr(model.config, "final_logit_softcapping", None)),
        ("cohere", lambda model: setattr(model, "logit_scale", 3.0)),
        ("granite", lambda model: setattr(model.config, "logits_scaling", 5.0)),
    ):
        model = fuse(build(family))
        with torch.no_grad():
            before = score_sequences(model, example()).scores
            torch.testing.assert_close(before.double(), expected(model), atol=1e-3, rtol=1e-4)
            change(model)
            after = score_sequences(model, example()).scores
            torch.testing.assert_close(after.double(), expected(model), atol=1e-3, rtol=1e-4)
        assert not torch.allclose(after, before, rtol=1e-3), family


def test_a_deep_copy_of_a_fused_model_scores_with_its_own_weights() -> None:
    model = fuse(build("llama"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = score_sequences(model, example()).scores
        assert torch.equal(score_sequences(twin, example()).scores, before)
        for parameter in twin.parameters():
            parameter.mul_(0.5)
        assert not torch.allclose(score_sequences(twin, example()).scores, before)
        assert torch.equal(score_sequences(model, example()).scores, before)


def test_a_model_whose_own_forward_fails_is_told_so(monkeypatch):
    model = build("llama")

    def broken(*_, **__):
        raise RuntimeError("0 active drivers")

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(UnsupportedModelError, match=r"fails by itself, .*0 active drivers"):
        fuse(model)
