"""Adapters of several objectives with all that PEFT's LoRA can be, against the same adapters in PEFT one by one."""

from pathlib import Path

import peft
import pytest
import torch
import transformers
from tiny_language_models import VOCABULARY, build, prompt, tokenizer
from torch import nn

from mopl import steering
from mopl.conditioning import HyperPromptModel, KLWeightCoefficients, LoraMixture
from mopl.language_models.export import export
from mopl.language_models.head import fuse, score_sequences

IDS = torch.arange(3, 27).view(4, 6) * 5 % (VOCABULARY - 3) + 3
W = torch.tensor([0.3, 0.7])
ROWS = torch.tensor([[0.3, 0.7], [1.0, 0.0], [0.0, 1.0], [0.6, 0.4]])
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn"], "opt": ["q_proj", "fc1"],
    "phi": ["q_proj", "fc1"], "gemma2": ["q_proj", "down_proj"], "tied": ["q_proj"],
}  # fmt: skip
PATTERNS = {"rank_pattern": {"q_proj": 6, "layers.0.mlp.down_proj": 1}, "alpha_pattern": {"v_proj": 3}}
KINDS = {
    "rslora": ("llama", {"use_rslora": True}),
    "patterns": ("llama", PATTERNS),
    "rslora-patterns": ("llama", {"use_rslora": True, **PATTERNS}),
    "dora": ("llama", {"use_dora": True}),
    "dora-transposed": ("gpt2", {"use_dora": True, "use_rslora": True}),
    "dora-bias": ("phi", {"use_dora": True}),
    "lora-bias": ("opt", {"lora_bias": True}),
    "lora-bias-transposed": ("gpt2", {"lora_bias": True, "use_rslora": True}),
    "head": ("llama", {"modules_to_save": ["lm_head"]}),
    "head-bias": ("phi", {"modules_to_save": ["lm_head"]}),
    "head-tied": ("tied", {"modules_to_save": ["lm_head"]}),
    "head-softcap": ("gemma2", {"modules_to_save": ["lm_head", "norm"]}),
    "embeddings": ("llama", {"modules_to_save": ["embed_tokens", "norm"], "use_rslora": True}),
    "embeddings-scaled": ("gemma2", {"modules_to_save": ["embed_tokens"]}),
    "embeddings-tied": ("tied", {"modules_to_save": ["embed_tokens"]}),
    "some-layers": ("llama", {"layers_to_transform": [1]}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
}


def base(family: str, **options) -> nn.Module:
    if family == "tied":
        return build("llama", tie_word_embeddings=True, **options)
    return build(family, **{"dropout": 0.0} if family == "opt" else {}, **options)


def config(family: str = "llama", **changes) -> peft.LoraConfig:
    given = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS[family], "fan_in_fan_out": family == "gpt2"}
    return peft.LoraConfig(**{**given, "task_type": "CAUSAL_LM", **changes})


@torch.no_grad()
def spread(model: nn.Module) -> nn.Module:
    """Move what is trained away from its start."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def mixture(kind: str, **options) -> LoraMixture:
    family, changes = KINDS[kind]
    return spread(LoraMixture(fuse(base(family)), 2, config=config(family, **changes), **options))


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor = IDS, **kwargs) -> torch.Tensor:
    return model(input_ids=ids, **kwargs).logits


def close(given: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def of_peft(folder: Path, family: str) -> list[dict[str, torch.Tensor]]:
    """The parameters of the base model with each adapter alone, loaded and merged by PEFT."""
    states = []
    for name in ("objective_1", "objective_2"):
        model = peft.PeftModel.from_pretrained(untied(base(family)), str(folder / name)).merge_and_unload()
        states.append(model.state_dict())
    return states


def untied(model: nn.Module) -> nn.Module:
    """The same model with a head of its own, as a mixture of one of two tied weights is."""
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_is_the_average_of_what_peft_makes_of_each_adapter(kind: str, tmp_path: Path) -> None:
    mixed, family = mixture(kind), KINDS[kind][0]
    mixed.save_pretrained(tmp_path / "mixture")
    states = of_peft(tmp_path / "mixture", family)
    together = logits(mixed, weights=ROWS)
    for i, row in enumerate(ROWS):
        wanted = untied(base(family))
        wanted.load_state_dict(steering.soup(states, row))
        close(together[i : i + 1], logits(wanted, IDS[i : i + 1]))
        close(logits(mixed, IDS[i : i + 1], weights=row), logits(wanted, IDS[i : i + 1]))
    merged = mixed.merge(W)
    close(logits(merged), logits(mixed, weights=W))
    with mixed.at(W) as model:
        torch.testing.assert_close(logits(model), logits(merged))
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(again), logits(merged))
    loaded = LoraMixture.from_pretrained(tmp_path / "mixture", base(family))
    assert torch.equal(logits(loaded, weights=ROWS), together)
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_base_model_and_what_is_trained_stays_so(kind: str, tmp_path: Path) -> None:
    mixed, plain = mixture(kind), base(KINDS[kind][0])
    trained = {name for name, p in mixed.named_parameters() if p.requires_grad}
    assert all(".objective_" in name for name in trained)
    with mixed.reference():
        assert torch.equal(logits(mixed), logits(plain))
        assert torch.equal(logits(mixed, weights=ROWS), logits(plain))
    mixed.check_merging()
    with mixed.at(W):
        pass
    assert {name for name, p in mixed.named_parameters() if p.requires_grad} == trained
    mixed.save_pretrained(tmp_path / "mixture")
    frozen = LoraMixture.from_pretrained(tmp_path / "mixture", plain)
    with frozen.reference():
        pass
    with frozen.at(W):
        pass
    assert not any(p.requires_grad for p in frozen.parameters())
    again = LoraMixture.from_pretrained(tmp_path / "mixture", base(KINDS[kind][0]), trainable=True)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained
    other = LoraMixture(base(KINDS[kind][0]), 2, config=config(KINDS[kind][0], **KINDS[kind][1])).eval()
    before = [id(p) for p in other.parameters()]
    other.load_weights(tmp_path / "mixture")
    assert torch.equal(logits(other, weights=ROWS), logits(mixed, weights=ROWS))
    assert [id(p) for p in other.parameters()] == before
    assert {name for name, p in other.named_parameters() if p.requires_grad} == trained


def test_inside_at_nothing_else_is_asked_for() -> None:
    """The weights of the base model are those of the mixture there: with other weights they would count twice."""
    mixed = mixture("rslora")
    with mixed.at(W) as model:
        assert torch.equal(logits(mixed), logits(model))
        with pytest.raises(ValueError, match="fixed inside `at`"):
            mixed(input_ids=IDS, weights=ROWS)
        with pytest.raises(ValueError, match="fixed inside `at`"):
            mixed.generate(IDS, weights=ROWS)
        with pytest.raises(RuntimeError, match=r"leave the `with mixture\.at"):
            mixed.merge(W)
    close(logits(mixed.merge(W)), logits(mixed, weights=W))


@pytest.mark.parametrize("kind", ["rslora-patterns", "dora", "lora-bias", "head-bias", "embeddings"])
def test_gradients_are_shares_of_those_of_one_adapter_also_with_checkpoints(kind: str) -> None:
    upstream = torch.randn(4, 6, VOCABULARY, generator=torch.Generator().manual_seed(1))
    found = []
    for checkpointing in (False, True):
        mixed = mixture(kind).train()
        state = dict(mixed.named_parameters())
        with torch.no_grad():  # equal adapters: a mixture is the adapter, and the gradients are shares of its gradient
            for name, parameter in state.items():
                if ".objective_1" in name:
                    state[name.replace(".objective_1", ".objective_2")].copy_(parameter)
        if checkpointing:
            mixed.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        outputs = [mixed(input_ids=IDS, weights=weights).logits for weights in (W, ROWS)]
        sum((output * upstream).sum() for output in outputs[:1]).backward()
        found.append({name: p.grad for name, p in state.items() if p.requires_grad})
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)
        if ".objective_1" in name:
            other = found[0][name.replace(".objective_1", ".objective_2")]
            scale = float(gradient.abs().max())
            torch.testing.assert_close(other, gradient * (0.7 / 0.3), rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("kind", ["head", "head-bias", "head-softcap", "head-tied", "embeddings", "dora"])
def test_a_fused_head_scores_rows_at_their_own_mixtures(kind: str) -> None:
    mixed = mixture(kind)
    wanted = logits(mixed, weights=ROWS).log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0].sum(-1)
    batch = {"input_ids": IDS, "labels": IDS}
    close(score_sequences(mixed, batch, weights=ROWS).scores, wanted)
    with mixed.reference():
        alone = score_sequences(fuse(base(KINDS[kind][0])), batch).scores
        assert torch.equal(score_sequences(mixed, batch).scores, alone)
    score_sequences(mixed, batch, weights=ROWS).scores.sum().backward()
    of_head = {name: p.grad for name, p in mixed.named_parameters() if "lm_head" in name and p.requires_grad}
    mixed.zero_grad()
    logprobs = mixed(input_ids=IDS, weights=ROWS).logits.log_softmax(-1)[:, :-1]
    logprobs.gather(-1, IDS[:, 1:, None]).sum().backward()
    for name, gradient in of_head.items():
        close(gradient, mixed.get_parameter(name).grad)
    assert bool(of_head) == kind.startswith("head")


def test_the_exact_kl_to_the_reference_takes_the_head_of_the_base_model() -> None:
    mixed, plain = mixture("head-bias"), base("phi")
    with torch.no_grad():
        hidden = plain.model(input_ids=IDS).last_hidden_state
        given = {"weights": ROWS, "targets": IDS, "reference_hidden": hidden}
        found = mixed(input_ids=IDS, **given, reference_head=plain.lm_head).kl
        p, q = logits(mixed, weights=ROWS).log_softmax(-1), logits(plain).log_softmax(-1)
    close(found, (p.exp() * (p - q)).sum(-1))
    with pytest.raises(ValueError, match="pass reference_head"):
        mixed(input_ids=IDS, **given)


@pytest.mark.parametrize("kind", ["head", "embeddings", "dora"])
def test_rows_generate_at_their_own_mixtures(kind: str) -> None:
    mixed = mixture(kind)
    for options in ({"do_sample": False}, {"num_beams": 2, "num_return_sequences": 2}):
        together = mixed.generate(IDS, torch.ones_like(IDS), weights=ROWS, max_new_tokens=4, **options)
        copies = len(together) // 4
        for i, row in enumerate(ROWS):
            alone = mixed.merge(row).generate(input_ids=IDS[i : i + 1], max_new_tokens=4, **options)
            assert together[i * copies : (i + 1) * copies, : alone.shape[1]].tolist() == alone.tolist()


def test_coefficients_that_do_not_sum_to_1_leave_the_rest_to_the_base_model() -> None:
    mixed = mixture("head", coefficients=KLWeightCoefficients(0.1, anchor=False))
    close(logits(mixed, weights=ROWS, kl_weight=1.0), logits(base("llama")))
    half = mixed.merge(W, kl_weight=0.3)
    close(logits(half), logits(mixed, weights=W, kl_weight=0.3))
    scores = score_sequences(mixed, {"input_ids": IDS, "labels": IDS}, weights=ROWS, kl_weight=0.3).scores
    wanted = logits(mixed, weights=ROWS, kl_weight=0.3).log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None])
    close(scores, wanted.sum((1, 2)))


def test_adapters_may_differ_in_ranks_targets_and_kinds(tmp_path: Path) -> None:
    plain = base("llama")
    model = peft.get_peft_model(plain, config(r=4, modules_to_save=["lm_head"]), "objective_1")
    model.add_adapter("objective_2", config(r=1, use_rslora=True, target_modules=["k_proj", "q_proj"]))
    mixed = spread(LoraMixture(model, 2))
    mixed.save_pretrained(tmp_path / "mixture")
    states = of_peft(tmp_path / "mixture", "llama")
    together = logits(mixed, weights=ROWS)
    for i, row in enumerate(ROWS):
        wanted = base("llama")
        wanted.load_state_dict(steering.soup(states, row))
        close(together[i : i + 1], logits(wanted, IDS[i : i + 1]))
    close(logits(mixed.merge(W)), logits(mixed, weights=W))
    assert torch.equal(logits(LoraMixture.from_pretrained(tmp_path / "mixture", base("llama")), weights=ROWS), together)
    base("llama").save_pretrained(tmp_path / "base")
    mixed.causal_lm.name_or_path = str(tmp_path / "base")
    with pytest.raises(ValueError, match="beta was passed"):
        mixed.save_adapter(W, tmp_path / "one", beta=[0.5, 0.5])
    mixed.save_adapter(W, tmp_path / "one", beta=None)
    one = peft.PeftModel.from_pretrained(base("llama"), str(tmp_path / "one"))
    close(logits(one), logits(mixed, weights=W))


@pytest.mark.parametrize("kind", KINDS)
def test_a_trade_off_is_exported_as_one_adapter_of_scale_1(kind: str, tmp_path: Path) -> None:
    family, changes = KINDS[kind]
    base(family).save_pretrained(tmp_path / "base")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    mixed = spread(LoraMixture(plain, 2, config=config(family, **changes)))
    if "dora" in kind:
        with pytest.raises(ValueError, match="so it is no adapter; write it whole: merge"):
            export(mixed, tokenizer(), W, tmp_path / "adapter", kind="adapter")
        assert not (tmp_path / "adapter").exists()
        return
    export(mixed, tokenizer(), W, tmp_path / "adapter", kind="adapter")
    one = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    close(logits(one), logits(mixed, weights=W))
    written = one.peft_config["default"]
    assert written.lora_alpha == written.r and not written.use_rslora
    assert not written.rank_pattern and not written.alpha_pattern
    assert (written.r == 12) == ("patterns" in kind)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"init_lora_weights": "pissa"}, r"'pissa', which moves a part .* pass True, 'gaussian'"),
        ("llama", {"init_lora_weights": "olora"}, "'olora', which moves a part of the base weights"),
        ("llama", {"layer_replication": [(0, 2), (1, 2)]}, "layer_replication, which repeats layers"),
        ("opt", {"bias": "all"}, "bias='all', which trains the base model's own biases.*lora_bias=True"),
        ("llama", {"lora_bias": True}, "q_proj has no bias that its own could be added to; pass lora_bias=False"),
        ("llama", {"trainable_token_indices": [3]}, "name the embeddings in modules_to_save"),
        ("llama", {"alora_invocation_tokens": [3]}, "uses alora_invocation_tokens, which cannot be mixed"),
        ("llama", {"init_lora_weights": "mica"}, "is of PEFT's MiCALinearVariant"),
        ("llama", {"modules_to_save": ["mlp"]}, r"mlp, a LlamaMLP of several modules.*'gate_proj', 'up_proj'"),
        ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, "leave it out"),
        (
            "llama",
            {"rank_pattern": {"q_prj": 4}},
            "rank_pattern names 'q_prj', but no .* these are down_proj, q_proj",
        ),
        ("llama", {"alpha_pattern": {"k_proj": 4}}, "alpha_pattern names 'k_proj'"),
        ("llama", {"modules_to_save": ["norm", "heads"]}, "modules_to_save names 'heads', but no module"),
        ("llama", {"target_modules": ["embed_tokens"]}, "Embedding is no LoRA .* name it in modules_to_save"),
    ],
)
def test_what_cannot_be_mixed_says_why_and_what_to_do(family: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraMixture(base(family), 2, config=config(family, **changes))


def test_a_base_model_that_is_refused_is_as_it_was() -> None:
    plain = base("llama")
    with pytest.raises(ValueError, match="pissa"):
        LoraMixture(plain, 2, config=config(init_lora_weights="pissa"))
    assert torch.equal(logits(plain), logits(base("llama")))
    model = peft.get_peft_model(plain, config(init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="is not the base model"), HyperPromptModel(model, prompt()).reference():
        pass
    with HyperPromptModel(model, prompt()).reference(adapters=True):
        pass


def test_a_module_that_is_not_linear_in_its_parameters_is_not_merged() -> None:
    class Squared(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + nn.functional.linear(x, self.weight**2)

    model = base("llama")
    model.model.norm = nn.Sequential(model.model.norm, Squared(32, 32, bias=False))
    mixed = LoraMixture(model, 2, config=config(modules_to_save=["norm.1"]))
    with pytest.raises(ValueError, match="adapters on norm of LlamaForCausalLM do not compute"):
        mixed.merge(W)


# ---------------------------------------------------------------- one adapter under a prompt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens", "norm"]}])
def test_a_prompt_around_copied_modules_is_saved_and_exported(changes: dict, dtype, tmp_path: Path) -> None:
    base("llama").to(dtype).save_pretrained(tmp_path / "base")

    def plain() -> nn.Module:
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()

    torch.manual_seed(2)
    model = peft.get_peft_model(fuse(plain()), config(use_rslora=True, **changes))
    mixed = spread(HyperPromptModel(model, prompt()))
    found = logits(mixed, weights=ROWS)
    with mixed.reference():
        assert torch.equal(logits(mixed), logits(plain()))
    assert not torch.equal(found, logits(plain()))
    wanted = found.float().log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0].sum(-1)
    scores = score_sequences(mixed, {"input_ids": IDS, "labels": IDS}, weights=ROWS).scores
    torch.testing.assert_close(scores, wanted, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-3)
    mixed.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(HyperPromptModel.from_pretrained(tmp_path / "model", plain()), weights=ROWS), found)
    export(mixed, tokenizer(), W, tmp_path / "export")
