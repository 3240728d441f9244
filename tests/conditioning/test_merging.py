"""Merged weights are the mixture: shared weights, fused layers, experts; right, or refused before a run is made."""

import copy
import re

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from mopl.conditioning import LoraMixture, ParameterMixture
from mopl.conditioning.merging import settle_ties

W = torch.tensor([0.3, 0.7])
ROWS = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 9], [9, 10, 11, 12, 13, 14, 15]])
COMMON = dict(
    vocab_size=53, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
HYBRID = dict(num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2, num_key_value_heads=2)
EXPERTS = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2)
FAMILIES = {
    "tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}),
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "jamba": ("JambaConfig", {
        **EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False,
    }),
    "zamba": ("ZambaConfig", {
        **HYBRID, "n_mamba_heads": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "attention_hidden_size": 32,
        "attention_head_dim": 16,
    }),
    "zamba2": ("Zamba2Config", {
        **HYBRID, "mamba_headdim": 8, "n_mamba_heads": 4, "mamba_d_state": 4, "mamba_ngroups": 1, "num_mem_blocks": 1,
        "attention_hidden_size": 32, "attention_head_dim": 16,
    }),
    "mixtral": ("MixtralConfig", {**EXPERTS}),
    "phimoe": ("PhimoeConfig", {**EXPERTS}),
    "llama4": ("Llama4TextConfig", {**EXPERTS, "intermediate_size_mlp": 24, "head_dim": 8}),
}  # fmt: skip


def build(family: str) -> nn.Module:
    name, extra = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**COMMON, **extra})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def spread(mixture: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in mixture.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return mixture.eval()


def adapted(model: nn.Module, targets) -> LoraMixture:
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM")
    return spread(LoraMixture(model, 2, config=config))


@torch.no_grad()
def logits(model: nn.Module, **kwargs) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False, **kwargs).logits


def saved(model, folder) -> nn.Module:
    model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def close(given: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


# ---------------------------------------------------------------- weights that several modules share


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("tied", ["lm_head"]), ("tied", ["q_proj", "lm_head"]), ("gemma2", ["lm_head"]), ("gpt2", ["lm_head"]),
        ("zamba", "all-linear"), ("zamba2", "all-linear"), ("zamba2", ["lm_head"]),
    ],
)  # fmt: skip
def test_adapters_on_shared_weights_are_merged_into_weights_of_their_own(family: str, targets, tmp_path) -> None:
    mixture = adapted(build(family), targets)
    wanted = logits(mixture, weights=W)
    merged = mixture.merge(W)
    assert not merged.config.tie_word_embeddings and mixture.causal_lm.config.tie_word_embeddings
    close(logits(merged), wanted)
    close(logits(saved(merged, tmp_path)), wanted)
    with mixture.at(W) as model:
        close(logits(model), wanted)
    close(logits(mixture, weights=ROWS)[1], wanted[1])


def test_a_tie_that_no_adapter_touches_stays_in_the_merged_model(tmp_path) -> None:
    merged = adapted(build("tied"), ["q_proj"]).merge(W)
    assert merged.config.tie_word_embeddings and merged.lm_head.weight is merged.model.embed_tokens.weight
    close(logits(saved(merged, tmp_path)), logits(merged))


@pytest.mark.parametrize("family", ["tied", "zamba2"])
@pytest.mark.parametrize("scope", ["full", "logits"])
def test_mixed_parameters_merged_and_their_files_are_the_mixture(family: str, scope: str, tmp_path) -> None:
    mixture = spread(ParameterMixture(build(family), 2, scope=scope))
    wanted = logits(mixture, weights=W)
    close(logits(saved(mixture.merge(W), tmp_path / "merged")), wanted)
    mixture.save_pretrained(tmp_path / "mixture")
    for model in (None, build(family)):
        loaded = ParameterMixture.from_pretrained(tmp_path / "mixture", model)
        assert torch.equal(logits(loaded, weights=W), wanted)


def test_a_model_that_ties_whatever_its_configuration_says_is_not_merged() -> None:
    model = build("tied")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight + 1)
    model.get_expanded_tied_weights_keys = lambda all_submodels: {"lm_head.weight": "model.embed_tokens.weight"}
    with pytest.raises(ValueError, match=r"always ties lm_head.weight to model.embed_tokens.weight, which differ"):
        settle_ties(model)


def test_a_model_that_does_more_to_a_tied_head_than_to_use_its_weight_is_refused(monkeypatch) -> None:
    kind = transformers.LlamaForCausalLM
    forward = kind.forward

    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * (0.25 if self.config.tie_word_embeddings else 1.0)
        return output

    monkeypatch.setattr(kind, "forward", scaled)
    with pytest.raises(ValueError, match="does not compute what the mixture does"):
        adapted(build("tied"), ["lm_head"]).merge(W)
    adapted(build("tied"), ["q_proj"]).merge(W)


# ---------------------------------------------------------------- what adapters cannot be on


def test_layers_whose_weights_are_used_past_the_adapter_are_named_with_the_remedy() -> None:
    mixture = adapted(build("jamba"), "all-linear")
    with pytest.raises(ValueError, match="adapters on dt_proj of JambaForCausalLM do not compute") as error:
        mixture.merge(W)
    targets = re.findall(r"'(\w+)'", str(error.value))
    again = adapted(build("jamba"), targets)
    close(logits(again.merge(W)), logits(again, weights=W))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("mixtral", "is on parameters of experts"),
        ("phimoe", "an adapter on a PhimoeTopKRouter"),
        ("llama4", "an adapter on a Llama4Router"),
    ],
)
def test_experts_and_routers_are_refused_with_targets_that_can_be_mixed(family: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        adapted(build(family), "all-linear")
    targets = re.findall(r"'(\w+)'", str(error.value).rpartition("target_modules=")[2])
    assert "q_proj" in targets
    again = adapted(build(family), targets)
    close(logits(again.merge(W)), logits(again, weights=W))


def test_what_peft_refuses_comes_with_targets_that_can_be_mixed() -> None:
    config = transformers.Mamba2Config(
        vocab_size=53, hidden_size=16, num_hidden_layers=2, num_heads=4, head_dim=8, state_size=4, n_groups=1, expand=2
    )
    with pytest.raises(ValueError, match=r"PEFT puts no such adapters on .*target_modules=\['in_proj'\]"):
        adapted(transformers.Mamba2ForCausalLM(config).eval(), "all-linear")
    again = adapted(transformers.Mamba2ForCausalLM(config).eval(), ["in_proj"])
    close(logits(again.merge(W)), logits(again, weights=W))


def test_rows_that_a_layer_sees_in_another_place_are_refused() -> None:
    config = transformers.XLNetConfig(vocab_size=53, d_model=16, n_layer=2, n_head=2, d_inner=24)
    mixture = adapted(transformers.XLNetLMHeadModel(config), ["layer_1"])
    ids = torch.arange(3, 11)[None].expand(2, -1)  # 8 positions, 2 rows: one is a multiple of the other
    with pytest.raises(ValueError, match=r"weights has 2 rows but a layer sees \(8, 2, \.\.\.\)"):
        mixture(input_ids=ids, weights=ROWS)


# ---------------------------------------------------------------- the probe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lora", "parameters"])
def test_the_probe_leaves_a_model_and_the_generators_as_they_were(kind: str, dtype: torch.dtype) -> None:
    model = build("tied").to(dtype)
    mixture = adapted(model, "all-linear") if kind == "lora" else spread(ParameterMixture(model, 2, scope="full"))
    mixture.train()
    mixture.model.model.layers[0].eval() if kind == "parameters" else None
    modes = [module.training for module in mixture.modules()]
    before = {name: value for name, value in mixture.named_parameters()}
    values = {name: value.clone() for name, value in before.items()}
    state = torch.get_rng_state()
    mixture.check_merging()
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in mixture.modules()]
    for name, value in mixture.named_parameters():
        assert value is before[name] and torch.equal(value, values[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_probe_finds_an_ignored_module_in_every_dtype_before_training(dtype: torch.dtype) -> None:
    model = build("jamba").to(dtype)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "dt_proj", "x_proj"], task_type="CAUSAL_LM")
    mixture = LoraMixture(model, 2, config=config).eval()  # every B is 0 still
    with pytest.raises(ValueError, match=r"adapters on dt_proj of .*target_modules=\['q_proj', 'x_proj'\]"):
        mixture.check_merging()
    fine = peft.LoraConfig(r=2, target_modules=["q_proj", "x_proj"], task_type="CAUSAL_LM")
    LoraMixture(build("jamba").to(dtype), 2, config=fine).eval().check_merging()


def test_in_bfloat16_what_is_no_larger_than_rounding_is_no_difference() -> None:
    options = {**COMMON, "hidden_size": 64, "initializer_range": 0.02}
    even = transformers.LlamaConfig(**{**options, "num_hidden_layers": 8})  # attention does not depend on q yet
    tied = transformers.LlamaConfig(**{**options, "tie_word_embeddings": True})
    for config, targets in ((even, ["q_proj", "v_proj"]), (tied, ["lm_head", "v_proj"])):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        mixture = LoraMixture(model, 2, config=peft.LoraConfig(r=2, target_modules=targets))
        before = {name: (p, p.data_ptr(), p.dtype, p.requires_grad) for name, p in mixture.named_parameters()}
        with torch.no_grad():
            for p, *_, trained in before.values():
                p.add_(1e-4 * torch.randn_like(p)) if trained else None
        mixture.merge(W)
        for name, p in mixture.named_parameters():
            assert p is before[name][0] and (p.data_ptr(), p.dtype, p.requires_grad) == before[name][1:]


def test_the_probe_runs_once(monkeypatch) -> None:
    mixture = adapted(build("tied"), ["q_proj"])
    calls = []
    mixture.causal_lm.register_forward_pre_hook(lambda *_: calls.append(1))
    mixture.merge(W)
    assert 0 < len(calls) <= 4
    twin = copy.deepcopy(mixture)
    calls.clear()
    twin.merge(W)
    mixture.merge(W)
    assert not calls
