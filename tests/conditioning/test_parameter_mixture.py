"""Parameter mixtures: θ_S(w) = Σ w_i θ_S^i by averaged copies of the model; the LoRA form by PEFT's own matrices."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from mopl.alignment import fuse, score_sequences
from mopl.conditioning import KLWeightCoefficients, LoraMixture, ParameterMixture
from mopl.steering import soup

COMMON = dict(
    vocab_size=53, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FAMILIES = {"llama": ("LlamaConfig", {"tie_word_embeddings": False}), "gpt2": ("GPT2Config", {"n_positions": 64})}
NAMES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
SCOPES = ("full", "attention", "logits", r"mlp\..*weight")
W = torch.tensor([0.3, 0.7])
ROWS = torch.tensor([[0.3, 0.7], [1.0, 0.0], [0.3, 0.7], [0.6, 0.4]])
IDS = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5], [0, 11, 12, 13, 14], [3, 4, 5, 9, 9]])
MASK = (IDS != 0).long()


def build(family: str = "llama") -> nn.Module:
    name, extra = FAMILIES[family]
    given = {NAMES.get(k, k) if family == "gpt2" else k: v for k, v in COMMON.items()}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**given, **extra}))
    return model.eval()


def spread(mixture: nn.Module) -> nn.Module:
    """Move every set away from the start, each its own way."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in mixture.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return mixture


def mixed(scope: str = "attention", family: str = "llama", **options) -> ParameterMixture:
    return spread(ParameterMixture(build(family), 2, scope=scope, **options)).eval()


def set_model(mixture: ParameterMixture, i: int) -> nn.Module:
    """A plain copy of the model with set i, by hand."""
    model = copy.deepcopy(mixture.model)
    with torch.no_grad():
        for name, value in zip(mixture.names, mixture.sets[i], strict=True):
            model.get_parameter(name).copy_(value)
    return model


def averaged(mixture: ParameterMixture, w: Tensor) -> nn.Module:
    """A plain model with the parameters of all sets averaged, by `soup`."""
    models = [set_model(mixture, i) for i in range(len(w))]
    models[0].load_state_dict(soup([m.state_dict() for m in models], w))
    return models[0]


def logits(model: nn.Module, ids: Tensor = IDS, mask: Tensor = MASK, **kwargs) -> Tensor:
    return model(input_ids=ids, attention_mask=mask, **kwargs).logits * mask[..., None]


# ---------------------------------------------------------------- the mixture is the mixture


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", SCOPES)
def test_mixture_is_the_model_with_averaged_parameters(scope: str, family: str) -> None:
    mixture = mixed(scope, family)
    torch.testing.assert_close(logits(mixture, weights=W), logits(averaged(mixture, W)), rtol=1e-4, atol=1e-5)
    for i, vertex in enumerate(torch.eye(2)):
        assert torch.equal(logits(mixture, weights=vertex), logits(set_model(mixture, i)))


@pytest.mark.parametrize("scope", SCOPES)
def test_all_sets_start_at_the_model(scope: str) -> None:
    expected = logits(build())
    torch.testing.assert_close(logits(ParameterMixture(build(), 3, scope=scope), weights=torch.ones(3) / 3), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", SCOPES)
def test_memory_is_m_times_the_part_and_once_the_rest(scope: str, family: str) -> None:
    model = build(family)
    whole = sum(p.numel() for p in model.parameters())
    part = {
        "full": whole,
        "attention": sum(p.numel() for n, p in model.named_parameters() if "attn" in n and "ln" not in n),
        "logits": COMMON["vocab_size"] * COMMON["hidden_size"],
        SCOPES[3]: sum(p.numel() for n, p in model.named_parameters() if ".mlp." in n and n.endswith("weight")),
    }[scope]
    untied = part if family == "gpt2" and scope == "logits" else 0  # the embedding is then not the head
    mixture = ParameterMixture(model, 3, scope=scope)
    assert sum(p.numel() for p in mixture.parameters()) == 3 * part + (whole - part) + untied


def test_an_untied_head_of_a_composite_model_comes_back(tmp_path: Path) -> None:
    """Its text configuration ties the head as well."""
    text = dict(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    settings = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=60, tie_word_embeddings=True
    )
    model = transformers.Gemma3ForConditionalGeneration(settings).eval()
    mixture = ParameterMixture(model, 2, scope="logits")
    with torch.no_grad():
        for parameter in mixture.others.parameters():
            parameter.add_(torch.randn_like(parameter))
    mixture.save_pretrained(tmp_path)
    assert not model.config.tie_word_embeddings and not model.config.text_config.tie_word_embeddings
    (architecture,) = tmp_path.glob("*/config.json")
    written = json.loads(architecture.read_text())
    assert written["tie_word_embeddings"] and written["text_config"]["tie_word_embeddings"]
    again = ParameterMixture.from_pretrained(tmp_path)
    ids, weights = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0.3, 0.7]])
    with torch.no_grad():
        wanted = mixture(input_ids=ids, weights=weights).logits
        assert torch.equal(again.eval()(input_ids=ids, weights=weights).logits, wanted)
        assert not torch.equal(mixture(input_ids=ids, weights=weights.flip(-1)).logits, wanted)


@pytest.mark.parametrize("scope", SCOPES)
def test_gradient_of_set_i_is_w_i_times_that_of_the_mixture(scope: str) -> None:
    mixture = mixed(scope)
    plain = averaged(mixture, W)
    upstream = torch.randn(4, 5, COMMON["vocab_size"])
    (logits(mixture, weights=W) * upstream).sum().backward()
    (logits(plain) * upstream).sum().backward()
    for i, parameters in enumerate(mixture.sets):
        for name, parameter in zip(mixture.names, parameters, strict=True):
            expected = W[i] * plain.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    shared = [n for n, _ in plain.named_parameters() if n not in mixture.names]
    assert (not shared) == (scope == "full")
    for name in shared:
        expected = plain.get_parameter(name).grad
        actual = mixture.model.get_parameter(name).grad
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("scope", ["full", "logits"])
def test_frozen_shared_part_stays_frozen(scope: str) -> None:
    mixture = ParameterMixture(build().requires_grad_(False), 2, scope=scope)
    trained = {id(p) for p in mixture.parameters() if p.requires_grad}
    assert trained == {id(p) for each in mixture.sets for p in each}


# ---------------------------------------------------------------- a weight vector for each row


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["full", "logits"])
def test_rows_have_their_own_mixtures_and_gradients(scope: str, family: str) -> None:
    mixture = mixed(scope, family)
    upstream = torch.randn(4, 5, COMMON["vocab_size"])
    together = logits(mixture, weights=ROWS)
    (together * upstream).sum().backward()
    gradients = [p.grad.clone() for p in mixture.parameters()]
    mixture.zero_grad()
    for i in range(4):
        alone = logits(mixture, IDS[i : i + 1], MASK[i : i + 1], weights=ROWS[i])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
        (alone * upstream[i]).sum().backward()
    for a, p in zip(gradients, mixture.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-3, atol=1e-4 * float(p.grad.abs().max()))


def test_outputs_of_rows_keep_their_type_and_losses_are_refused() -> None:
    mixture = mixed()
    output = mixture(input_ids=IDS, weights=ROWS, output_hidden_states=True)
    assert isinstance(output, transformers.modeling_outputs.CausalLMOutputWithPast)
    assert output.past_key_values is None and len(output.hidden_states) == 3
    assert output.hidden_states[1].shape == (4, 5, 16)
    with pytest.raises(ValueError, match="no row for each input"):
        mixture(input_ids=IDS, labels=IDS, weights=ROWS)
    assert mixture(input_ids=IDS, labels=IDS, weights=W).loss.isfinite()
    with pytest.raises(ValueError, match="weights has 3 rows"):
        mixture(input_ids=IDS, weights=ROWS[:3])


@pytest.mark.parametrize("scope", ["full", "logits", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_model_gives_log_probabilities_of_rows(family: str, scope: str) -> None:
    if scope == "lora":
        targets = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
        fused = LoraMixture(fuse(build(family)), 2, config=peft.LoraConfig(r=2, target_modules=targets))
    else:
        fused = ParameterMixture(fuse(build(family)), 2, scope=scope)
    spread(fused).eval()
    targets = IDS.roll(-1, 1)
    output = fused(input_ids=IDS, attention_mask=MASK, targets=targets, weights=ROWS)
    for row, kept in enumerate(MASK.bool()):  # alone, for not every model's own logits are those of the row in padding
        alone = fused(input_ids=IDS[row, kept][None], weights=ROWS[row]).logits[0].log_softmax(-1)
        expected = alone.gather(-1, targets[row, kept][:, None])[:, 0]
        torch.testing.assert_close(output.log_probs[row, kept], expected, rtol=1e-4, atol=1e-5)
    scores = score_sequences(fused, {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}, weights=ROWS).scores
    torch.testing.assert_close(scores, (output.log_probs * MASK)[:, :-1].sum(-1), rtol=1e-4, atol=1e-5)


def test_any_module_with_buffers_can_be_mixed() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("scale", torch.tensor(2.0))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": self.linear(x) * self.scale}

    mixture = spread(ParameterMixture(Scaled(), 2, scope="full"))
    x, w = torch.randn(3, 3), torch.tensor([[0.5, 0.5], [0.1, 0.9], [0.5, 0.5]])
    (weight, bias), (other, other_bias) = mixture.sets
    expected = torch.stack(
        [2 * (x[i] @ (a * weight + b * other).T + a * bias + b * other_bias) for i, (a, b) in enumerate(w)]
    )
    torch.testing.assert_close(mixture(x, weights=w)["y"], expected)
    assert sum(b.numel() for b in mixture.buffers()) == 1


def test_training_moves_each_set_towards_its_objective() -> None:
    """Two rewards, each for one token: the sets part, and the mixture follows w."""
    mixture = ParameterMixture(build(), 2, scope="logits")
    optimizer = torch.optim.Adam(mixture.parameters(), lr=0.02)
    for step in range(60):
        share = torch.rand(2, 1, generator=torch.Generator().manual_seed(step))
        w = torch.cat([share, 1 - share], 1)
        logp = mixture(input_ids=IDS[:2], attention_mask=MASK[:2], weights=w).logits[:, -1].log_softmax(-1)
        loss = -(w * logp[:, [20, 30]]).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        grid = torch.linspace(0, 1, 5)
        weights = torch.stack([grid, 1 - grid], -1)
        p = mixture(input_ids=IDS[:1].expand(5, -1), weights=weights).logits[:, -1].softmax(-1)[:, 20]
    assert (p.diff() > 0).all() and p[-1] > 0.9 and p[0] < 0.1


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_is_refused() -> None:
    mixture = mixed().train()
    mixture.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="gradient checkpointing"):
        mixture(input_ids=IDS, weights=W)
    mixture.gradient_checkpointing_disable()
    mixture(input_ids=IDS, weights=W)


# ---------------------------------------------------------------- one mixture


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", SCOPES)
def test_inside_at_the_model_is_the_mixture(scope: str, family: str) -> None:
    mixture = mixed(scope, family)
    expected, before = logits(mixture, weights=W), logits(mixture.model)
    parameters = dict(mixture.named_parameters(remove_duplicate=False))
    with mixture.at(W) as model:
        assert model is mixture.model
        assert torch.equal(logits(model), expected) and torch.equal(logits(mixture), expected)
        with pytest.raises(ValueError, match="fixed inside"):
            mixture(input_ids=IDS, weights=W)
        with pytest.raises(RuntimeError, match="holds a mixture"):
            mixture.merge(W)
    assert torch.equal(logits(mixture.model), before)
    after = dict(mixture.named_parameters(remove_duplicate=False))
    assert all(after[name] is value for name, value in parameters.items())


def test_mixture_is_kept_until_the_sets_or_the_weights_change() -> None:
    mixture = mixed()
    name = mixture.names[0]

    def kept(w: Tensor) -> tuple[int, Tensor]:
        with mixture.at(w) as model:
            return model.get_parameter(name).data_ptr(), model.get_parameter(name).detach().clone()

    first = kept(W)
    assert kept(W)[0] == first[0]
    assert not torch.equal(kept(torch.tensor([0.5, 0.5]))[1], first[1])
    assert torch.equal(kept(W)[1], first[1])
    with torch.no_grad():
        mixture.others[0][0].add_(1.0)
    torch.testing.assert_close(kept(W)[1], first[1] + 0.7)


def test_an_error_inside_at_puts_the_sets_back() -> None:
    mixture = mixed()
    with pytest.raises(KeyError), mixture.at(W):
        raise KeyError
    assert all(p.requires_grad for each in mixture.sets for p in each)
    logits(mixture, weights=W)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", SCOPES)
def test_merged_model_is_plain_and_its_files_load_without_the_mixture(scope: str, family: str, tmp_path) -> None:
    mixture = mixed(scope, family)
    expected = logits(mixture, weights=W)
    merged = mixture.merge(W)
    assert type(merged) is type(mixture.model) and torch.equal(logits(merged), expected)
    tied = family == "gpt2" and scope != "logits"
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied
    merged.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), expected)
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    assert torch.equal(logits(mixture, weights=W), expected)


def test_rows_generate_at_their_own_mixture() -> None:
    mixture = mixed("full")
    options = dict(max_new_tokens=6, do_sample=False)
    together = mixture.generate(IDS, MASK, weights=ROWS, **options)
    for i in range(4):
        alone = mixture.generate(IDS[i : i + 1], MASK[i : i + 1], weights=ROWS[i], **options)[0]
        assert together[i, : len(alone)].tolist() == alone.tolist()
        assert (together[i, len(alone) :] == 0).all()
        with mixture.at(ROWS[i]) as model:
            inside = model.generate(input_ids=IDS[i : i + 1], attention_mask=MASK[i : i + 1], **options)[0]
        assert inside.tolist() == alone.tolist()
    twice = mixture.generate(IDS, MASK, weights=ROWS, num_beams=2, num_return_sequences=2, max_new_tokens=3)
    assert twice.shape[0] == 8 and torch.equal(twice[::2, :5], IDS) and torch.equal(twice[1::2, :5], IDS)


# ---------------------------------------------------------------- KL weight


def test_coefficients_of_kl_weights_by_hand() -> None:
    rule = KLWeightCoefficients(0.1)  # κ = 9
    w = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).double()
    torch.testing.assert_close(rule(w, torch.tensor([0.1, 0.5]).double()), torch.tensor(
        [[0.25, 0.75, 0.0], [0.5 / 9, 0.5 / 9, 8 / 9]]).double())  # fmt: skip
    penalty = KLWeightCoefficients(0.5, "penalty", anchor=False)
    torch.testing.assert_close(penalty(w, torch.tensor([1.0, 2.0]).double()), w * torch.tensor([[0.5], [0.25]]))


def test_the_kl_weight_moves_the_mixture_between_the_anchor_and_the_sets() -> None:
    mixture = mixed("full", coefficients=KLWeightCoefficients(0.1))
    assert len(mixture.sets) == 3
    plain = averaged(mixture, torch.tensor([0.3 / 9, 0.7 / 9, 8 / 9]))
    torch.testing.assert_close(logits(mixture, weights=W, kl_weight=0.5), logits(plain), rtol=1e-4, atol=1e-5)
    rows = logits(mixture, weights=W, kl_weight=torch.tensor([0.5, 0.1, 0.5, 1.0]))
    torch.testing.assert_close(rows[3:], logits(set_model(mixture, 2))[3:], rtol=1e-4, atol=1e-5)
    with mixture.at(W, 0.5) as model:
        torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="kl_weight is missing"):
        mixture(input_ids=IDS, weights=W)
    with pytest.raises(ValueError, match="leave it out"):
        mixed()(input_ids=IDS, weights=W, kl_weight=0.5)


def test_coefficients_may_be_any_function() -> None:
    mixture = mixed("logits", coefficients=lambda w, alpha: w.square())
    square = W.square()
    expected = square[0] * logits(set_model(mixture, 0)) + square[1] * logits(set_model(mixture, 1))
    torch.testing.assert_close(logits(mixture, weights=W), expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", SCOPES)
def test_saved_mixture_comes_back_bit_for_bit(scope: str, family: str, tmp_path) -> None:
    rule = KLWeightCoefficients(0.2) if scope == "attention" else None
    given = {} if rule is None else {"kl_weight": 0.4}
    mixture = mixed(scope, family, coefficients=rule, record=["helpful", "short"])
    mixture.save_pretrained(tmp_path)
    for model in (None, build(family)):
        loaded = ParameterMixture.from_pretrained(tmp_path, model)
        assert loaded.record == mixture.record and loaded.scope == scope
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        assert torch.equal(logits(loaded, weights=ROWS, **given), logits(mixture, weights=ROWS, **given))
    trainable = ParameterMixture.from_pretrained(tmp_path, trainable=True)
    assert all(p.requires_grad for p in trainable.parameters())


def test_no_folder_is_made_where_nothing_could_be_written(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="safetensors"):
        ParameterMixture(nn.Linear(2, 2), 2, scope="full").save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_files_that_do_not_fit_are_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        ParameterMixture.from_pretrained(tmp_path)
    mixed("logits", coefficients=lambda w, alpha: w).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pass the function as coefficients"):
        ParameterMixture.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not fit"):
        ParameterMixture.from_pretrained(tmp_path, build("gpt2"), coefficients=lambda w, alpha: w)
    with pytest.raises(ValueError, match="a LoraMixture was asked for"):
        LoraMixture.from_pretrained(tmp_path)


@pytest.mark.parametrize("rule", [None, KLWeightCoefficients(0.2)])
def test_other_coefficients_than_those_of_the_training_are_refused(rule, tmp_path) -> None:
    mixed("logits", coefficients=rule).save_pretrained(tmp_path)
    assert ParameterMixture.from_pretrained(tmp_path, coefficients=rule).coefficients == rule
    for other in (KLWeightCoefficients(0.1), lambda w, alpha: w):
        with pytest.raises(ValueError, match=r"was trained with .*leave coefficients out"):
            ParameterMixture.from_pretrained(tmp_path, coefficients=other)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scope": "nowhere"}, "names no parameter"),
        ({"scope": "("}, "nor a pattern"),
        ({"sets": 3}, "pass coefficients"),
        ({"record": ["one"]}, "there are 2 objectives"),
        ({"objectives": 0}, "at least 1"),
    ],
)
def test_errors_say_what_to_pass(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParameterMixture(build(), **{"objectives": 2, **options})
    with pytest.raises(ValueError, match="no output head"):
        ParameterMixture(nn.Linear(2, 2), 2, scope="logits")


def test_names_for_the_number_of_objectives_and_a_model_that_is_not_loaded_are_refused() -> None:
    with pytest.raises(TypeError, match=r"pass objectives=2, record=\['a', 'b'\]"):
        ParameterMixture(build(), ["a", "b"])
    with pytest.raises(TypeError, match=r"model is 'tiny' but must be a loaded model"):
        LoraMixture("tiny", 2)
    with pytest.raises(TypeError, match=r"config is a dict but must be a peft\.LoraConfig"):
        LoraMixture(build(), 2, config={"r": 2})


def test_weights_off_the_simplex_are_refused() -> None:
    for mixture in (mixed(), lora()):
        with pytest.raises(ValueError, match="simplex"):
            mixture(input_ids=IDS, weights=torch.tensor([0.9, 0.9]))
        with pytest.raises(ValueError, match="weights are missing; pass one for each of objective_1, objective_2"):
            mixture(input_ids=IDS)
        mixture.check_merging = lambda: pytest.fail("a model was probed for weights that are none")
        with pytest.raises(ValueError, match="are 4 vectors but one mixture has one"):
            mixture.merge(ROWS)
        with pytest.raises(ValueError, match="are 4 vectors but one mixture has one"), mixture.at(ROWS):
            pass


# ---------------------------------------------------------------- LoRA


def lora(family: str = "llama", **options) -> LoraMixture:
    targets = ["c_attn", "c_proj"] if family == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, fan_in_fan_out=family == "gpt2")
    return spread(LoraMixture(build(family), 2, config=config, **options)).eval()


def added(mixture: LoraMixture, coefficients: Tensor, family: str = "llama") -> nn.Module:
    """The base model with Σ c_i (alpha/r) B_i A_i added, by hand."""
    model = build(family)
    with torch.no_grad():
        for name, module in mixture.model.named_modules():
            if hasattr(module, "lora_A"):
                inside = name.removeprefix("base_model.model.")
                for c, adapter in zip(coefficients, mixture.adapters, strict=True):
                    delta = 2.0 * module.lora_B[adapter].weight @ module.lora_A[adapter].weight
                    model.get_submodule(inside).weight.add_(c * (delta.T if family == "gpt2" else delta))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_rows_have_their_own_mixtures(family: str) -> None:
    mixture = lora(family)
    together = logits(mixture, weights=ROWS)
    for i in range(4):
        expected = logits(added(mixture, ROWS[i], family), IDS[i : i + 1], MASK[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], expected, rtol=1e-3, atol=1e-4)
        alone = logits(mixture, IDS[i : i + 1], MASK[i : i + 1], weights=ROWS[i])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_lora_gradient_of_adapter_i_is_w_i_times_that_of_one_adapter() -> None:
    mixture = lora()
    with torch.no_grad():  # equal adapters: a mixture is the adapter, and the gradients are shares of its gradient
        for adapted in mixture._parts.values():
            for part in (adapted.layer.lora_A, adapted.layer.lora_B):
                part[mixture.adapters[1]].weight.copy_(part[mixture.adapters[0]].weight)
    upstream = torch.randn(4, 5, COMMON["vocab_size"])
    (logits(mixture, weights=W) * upstream).sum().backward()
    shares = {n: p.grad.clone() for n, p in mixture.named_parameters() if p.requires_grad}
    mixture.zero_grad()
    (logits(mixture, weights=torch.tensor([1.0, 0.0])) * upstream).sum().backward()
    one, two = mixture.adapters
    whole = {n: p.grad for n, p in mixture.named_parameters() if p.requires_grad and one in n}
    assert len(whole) == 2 * 6
    for name, gradient in whole.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(shares[name], 0.3 * gradient, rtol=1e-3, atol=1e-5 * scale)
        torch.testing.assert_close(shares[name.replace(one, two)], 0.7 * gradient, rtol=1e-3, atol=1e-5 * scale)
    assert {n for n, p in mixture.named_parameters() if p.requires_grad} == {n for n in shares if "lora_" in n}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lora_gradient_checkpointing_remembers_the_coefficients_of_each_forward() -> None:
    """Two forward passes at different weights before one backward pass, as in policy gradients with several groups."""
    upstream = torch.randn(2, 4, 5, COMMON["vocab_size"])
    gradients = []
    for checkpointing in (False, True):
        mixture = lora().train()  # no dropout in this model
        calls = []
        layer = mixture.causal_lm.model.layers[1].mlp
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            mixture.gradient_checkpointing_enable()
        first, second = logits(mixture, weights=ROWS), logits(mixture, weights=ROWS.flip(0))
        ((first * upstream[0]).sum() + (second * upstream[1]).sum()).backward()
        assert len(calls) == (4 if checkpointing else 2)
        gradients.append({n: p.grad for n, p in mixture.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        lora().gradient_checkpointing_enable({"use_reentrant": True})


def test_lora_starts_at_the_base_model_and_reference_is_it() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    torch.testing.assert_close(logits(LoraMixture(build(), 2, config=config).eval(), weights=W), logits(build()))
    mixture = lora()
    with mixture.reference():
        assert torch.equal(logits(mixture), logits(build()))
        assert torch.equal(logits(mixture, weights=ROWS), logits(build()))
    assert not torch.allclose(logits(mixture, weights=W), logits(build()))


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_merged_at_and_saved(family: str, tmp_path) -> None:
    mixture = lora(family, record=["helpful", "short"])
    expected = logits(mixture, weights=W)
    before = {n: p.detach().clone() for n, p in mixture.named_parameters()}
    merged = mixture.merge(W)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-4)
    assert not any("lora" in name for name, _ in merged.named_modules())
    with mixture.at(W) as model:
        assert torch.equal(logits(model), logits(merged))
    assert all(torch.equal(p, before[n]) for n, p in mixture.named_parameters())
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(again), logits(merged))

    mixture.save_pretrained(tmp_path / "mixture")
    with pytest.raises(ValueError, match=r"^\['dtype'\] are for a model that is loaded here, but model was passed$"):
        LoraMixture.from_pretrained(tmp_path / "mixture", build(family), dtype="auto")
    loaded = LoraMixture.from_pretrained(tmp_path / "mixture", build(family))
    assert loaded.adapters == ["helpful", "short"] and loaded.record == mixture.record
    assert torch.equal(logits(loaded, weights=ROWS), logits(mixture, weights=ROWS))
    assert not any(p.requires_grad for p in loaded.parameters())
    trainable = LoraMixture.from_pretrained(tmp_path / "mixture", build(family), trainable=True)
    assert {n.split(".")[-2] for n, p in trainable.named_parameters() if p.requires_grad} == {"helpful", "short"}


def test_lora_rows_generate_in_one_batch() -> None:
    mixture = lora()
    options = dict(max_new_tokens=5, do_sample=False)
    together = mixture.generate(IDS, MASK, weights=ROWS, **options)
    for i in range(4):
        alone = added(mixture, ROWS[i]).generate(input_ids=IDS[i : i + 1], attention_mask=MASK[i : i + 1], **options)[0]
        assert together[i, : len(alone)].tolist() == alone.tolist()
    beams = dict(max_new_tokens=4, num_beams=2, num_return_sequences=2)
    together = mixture.generate(IDS, MASK, weights=ROWS, **beams)
    for i in range(4):
        alone = added(mixture, ROWS[i]).generate(input_ids=IDS[i : i + 1], attention_mask=MASK[i : i + 1], **beams)
        assert together[2 * i : 2 * i + 2, : alone.shape[1]].tolist() == alone.tolist()


def test_lora_alpha_scales_the_adapters() -> None:
    mixture = lora(coefficients=KLWeightCoefficients(0.1, anchor=False))
    actual = logits(mixture, weights=W, kl_weight=torch.tensor([0.1, 0.5, 1.0, 0.5]))
    expected = logits(added(mixture, W / 9))
    torch.testing.assert_close(actual[1::2], expected[1::2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(actual[2], logits(build())[2], rtol=1e-4, atol=1e-5)


def test_lora_refuses_what_cannot_be_mixed() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    for changes, message in (
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"target_modules": ["embed_tokens"]}, "Embedding"),
    ):
        with pytest.raises(ValueError, match=message):
            LoraMixture(build(), 2, config=peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **changes}))
    with pytest.raises(ValueError, match="config is missing"):
        LoraMixture(build(), 2)
    with pytest.raises(ValueError, match="are mixed"):
        LoraMixture(peft.get_peft_model(build(), config), 2)
    mixture = LoraMixture(build(), 2, config=config)
    with pytest.raises(RuntimeError, match="have no coefficients"):
        mixture.model(input_ids=IDS)
    with pytest.raises(ValueError, match="weights has 3 rows but there are 4"):
        mixture(input_ids=IDS, weights=ROWS[:3])
