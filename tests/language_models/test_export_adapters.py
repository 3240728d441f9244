"""The adapters of a mixture as plain LoRA, against the mixture, with all the arithmetic left to PEFT."""

import json
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from tiny_language_models import VOCABULARY, build, conditioned, tokenizer
from torch import nn

from mopl.conditioning import (
    KLWeightCoefficients,
    LoraMixture,
    ParameterMixture,
    TextPrompt,
    TextPromptModel,
    TuningRecord,
    weights_name,
)
from mopl.language_models.export_adapters import export_adapters, folder_names
from mopl.language_models.head import fuse

IDS = torch.arange(3, 27).view(4, 6) * 5 % (VOCABULARY - 3) + 3
ASKED = [[0.3, 0.7], [1.0, 0.0], [0.55, 0.45]]
NAMES = ("helpful", "not harmful/2")
PLACES = ["helpful", "not_harmful_2"]
PATTERNS = {"rank_pattern": {"q_proj": 6, "layers.0.mlp.down_proj": 1}, "alpha_pattern": {"v_proj": 3}}
KINDS = {
    "plain": ("llama", {}),
    "rslora-patterns": ("llama", {"use_rslora": True, **PATTERNS}),
    "lora-bias-transposed": ("gpt2", {"lora_bias": True, "use_rslora": True}),
    "some-layers": ("llama", {"layers_to_transform": [1]}),
    "expression": ("llama", {"target_modules": r".*\.(q_proj|up_proj)", "exclude_modules": ["layers.0.mlp.up_proj"]}),
}
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn"]}


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


def mixture(family: str = "llama", dtype: torch.dtype = torch.float64, names=NAMES, **changes) -> LoraMixture:
    options = changes.pop("options", {})
    base = fuse(build(family).to(dtype))
    record = TuningRecord(names, beta=[0.1, 0.2], concentration=0.5)
    mixed = LoraMixture(base, len(names), config=config(family, **changes), record=record, **options)
    return spread(mixed.to(dtype) if dtype == torch.float64 else mixed)


@torch.no_grad()
def logits(model: nn.Module, **kwargs) -> torch.Tensor:
    return model(input_ids=IDS, **kwargs).logits


def peft_model(folder: Path, places, family: str, dtype: torch.dtype):
    """A base model with the adapters of a folder, all of PEFT's making."""
    loaded = peft.PeftModel.from_pretrained(
        build(family).to(dtype), str(folder / places[0]), adapter_name="a0", autocast_adapter_dtype=False
    )
    for i, place in enumerate(places[1:], start=1):
        loaded.load_adapter(str(folder / place), adapter_name=f"a{i}", autocast_adapter_dtype=False)
    return loaded.eval()


def scaled(loaded, weights) -> torch.Tensor:
    """What a server computes that runs all adapters, each with a scale."""
    names = [f"a{i}" for i in range(len(weights))]
    loaded.base_model.set_adapter(names)
    for module in loaded.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            for name, weight in zip(names, weights, strict=True):
                module.set_scale(name, weight)
    return logits(loaded)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_scales_of_the_adapters_are_the_weights(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family, changes = KINDS[kind]
    mixed = mixture(family, dtype, **changes)
    folder = export_adapters(mixed, tmp_path / "out", grid=ASKED[:1])
    loaded = peft_model(folder, PLACES, family, dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for weights in ASKED:
        wanted = logits(mixed, weights=weights)
        torch.testing.assert_close(scaled(loaded, weights), wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))
    one = peft_model(folder, [weights_name(ASKED[0])], family, dtype)
    wanted = logits(mixed, weights=ASKED[0])
    torch.testing.assert_close(logits(one), wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))
    ranks = {
        tensor.shape[0] for place in PLACES for name, tensor in tensors(folder / place).items() if "lora_A" in name
    }
    for place in PLACES:
        written = json.loads((folder / place / "adapter_config.json").read_text())
        assert {written["r"]} == ranks and written["lora_alpha"] == written["r"] and not written["use_rslora"]
        assert not written["rank_pattern"] and not written["alpha_pattern"] and not written["layers_to_transform"]
        assert isinstance(written["target_modules"], list) and written["base_model_name_or_path"] is None
    record = json.loads((folder / "mopl.json").read_text())
    assert record["kind"] == "adapters" and record["objectives"] == list(NAMES) and record["adapters"] == PLACES
    assert record["beta"] == [0.1, 0.2] and record["kl_weight"] is None and record["base_model"] is None


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def test_peft_adds_them_up_by_itself_too(tmp_path: Path) -> None:
    mixed = mixture(use_rslora=True, **PATTERNS)
    loaded = peft_model(export_adapters(mixed, tmp_path / "out"), PLACES, "llama", torch.float64)
    for kind in ("cat", "linear"):
        loaded.add_weighted_adapter(["a0", "a1"], [0.3, 0.7], kind, combination_type=kind)
    loaded.set_adapter("cat")
    torch.testing.assert_close(logits(loaded), logits(mixed, weights=[0.3, 0.7]), rtol=0, atol=1e-8)


def test_adapters_of_different_targets_and_ranks(tmp_path: Path) -> None:
    inner = peft.get_peft_model(build().double(), config(r=2), "left")
    inner.add_adapter("right", config(r=3, target_modules=["v_proj", "o_proj"], lora_alpha=1, use_rslora=True))
    mixed = spread(LoraMixture(inner, 2, record=["left", "right"], adapters=["left", "right"]).double())
    folder = export_adapters(mixed, tmp_path / "out")
    loaded = peft_model(folder, ["left", "right"], "llama", torch.float64)
    for weights in ASKED:
        torch.testing.assert_close(scaled(loaded, weights), logits(mixed, weights=weights), rtol=0, atol=1e-9)
    assert not any("v_proj" not in name and "o_proj" not in name for name in tensors(folder / "right"))
    assert {value.shape[0] for name, value in tensors(folder / "left").items() if "lora_A" in name} == {3}


@pytest.mark.parametrize("anchor", [False, True])
def test_the_kl_weight_is_in_the_factors(anchor: bool, tmp_path: Path) -> None:
    mixed = mixture(options={"coefficients": KLWeightCoefficients(0.05, anchor=anchor)})
    folder = export_adapters(mixed, tmp_path / "out", kl_weight=0.2)
    loaded = peft_model(folder, PLACES, "llama", torch.float64)
    for weights in ASKED:
        wanted = logits(mixed, weights=weights, kl_weight=0.2)
        torch.testing.assert_close(scaled(loaded, weights), wanted, rtol=0, atol=1e-9)
    assert json.loads((folder / "mopl.json").read_text())["kl_weight"] == 0.2
    with pytest.raises(ValueError, match="kl_weight is missing"):
        export_adapters(mixed, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_sixteen_bits_are_not_rounded_by_scales(tmp_path: Path) -> None:
    """A scale of 4 rounds nothing in bfloat16; one of 3 would."""
    for alpha, kept in ((8, torch.bfloat16), (6, torch.float32)):
        mixed = mixture(dtype=torch.bfloat16, lora_alpha=alpha).to(torch.bfloat16)
        folder = export_adapters(mixed, tmp_path / str(alpha))
        own = mixed.model.base_model.model.model.layers[0].self_attn.q_proj
        made = tensors(folder / "helpful")
        (a,) = (value for name, value in made.items() if "layers.0.self_attn.q_proj.lora_A" in name)
        assert a.dtype == kept
        assert torch.equal(a.double(), own.lora_A["helpful"].weight.double() * alpha / 2)


def test_three_objectives_and_the_names_of_folders(tmp_path: Path) -> None:
    names = ("a b", "a/b", "README.md")
    mixed = mixture(names=names)
    folder = export_adapters(mixed, tmp_path / "out")
    places = json.loads((folder / "mopl.json").read_text())["adapters"]
    assert places == ["a_b", "a_b_2", "_README.md"]
    loaded, weights = peft_model(folder, places, "llama", torch.float64), [0.2, 0.3, 0.5]
    torch.testing.assert_close(scaled(loaded, weights), logits(mixed, weights=weights), rtol=0, atol=1e-9)
    made = folder_names(["..", "w=1,0", "Ärger", "ärger", "x" * 300, "-rf", "CON"])
    assert made == ["objective", "w_1_0", "Ärger", "ärger_2", "x" * 80, "_-rf", "_CON"]
    long = folder_names(["長" * 100, "長" * 100, "𝐀" * 90, "e\u0301"])  # a file system counts bytes, and takes 255
    assert long == ["長" * 26, "長" * 26 + "_2", "𝐀" * 20, "é"]
    devices = ["nul.txt", "COM1", "lpt9.a.b", "com¹", "con.", "communal", "nul_1"]
    assert folder_names(devices) == ["_nul.txt", "_COM1", "_lpt9.a.b", "_com¹", "_con", "communal", "nul_1"]


def test_what_takes_long_says_how_far_it_is(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("mopl._terminal._SECONDS_BETWEEN_LINES", 0)
    export_adapters(mixture(), tmp_path / "quiet")
    assert not capsys.readouterr().err
    export_adapters(mixture(), tmp_path / "out", grid=[[0.3, 0.7]], show_progress=True)
    said = capsys.readouterr().err
    assert "writing adapters: 3 of 3 adapters" in said
    assert "comparing them with the mixture: 6 of 6 comparisons" in said


REFUSED = {
    "DoRA": ({"use_dora": True}, "'helpful' is of DoRA.*write one trade-off instead: mopl export --weights"),
    "copies": (
        {"modules_to_save": ["lm_head"]},
        r"whole copies of lm_head \(modules_to_save\), which no server scales",
    ),
    "function": ({"options": {"coefficients": lambda w, _: w**2, "sets": 2}}, "need not be linear in the weights"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_no_adapter_of_a_scale_is_refused(why: str, tmp_path: Path) -> None:
    changes, message = REFUSED[why]
    names = ("helpful", "harmless")
    with pytest.raises(ValueError, match=message):
        export_adapters(mixture(names=names, dtype=torch.float32, **changes), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_other_kinds_are_refused_with_the_form_that_they_have(tmp_path: Path) -> None:
    words = TextPromptModel(build(), TextPrompt(NAMES, "[{weights}]\n"), tokenizer())
    for model, message in (
        (
            conditioned(),
            "HyperPromptModel takes its weights by virtual tokens.*, or train with --conditioning lora-mixture",
        ),
        (words, "TextPromptModel has one adapter and reads its weights in words.*--kind adapter"),
        (
            ParameterMixture(build(), 2),
            "ParameterMixture mixes whole parameters.*--weights, or train with --conditioning lora-mixture",
        ),
        (build(), "LlamaForCausalLM has no adapter for each objective"),
    ):
        with pytest.raises(ValueError, match=message):
            export_adapters(model, tmp_path / "out")


def test_a_model_that_started_from_an_adapter_is_no_base_for_servers(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "base")
    made = peft.get_peft_model(build(), config())
    made.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    made.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="itself a PEFT adapter, and the base of adapters must be a plain model"):
        export_adapters(mixture(), tmp_path / "out", base_model=str(tmp_path / "adapter"))
    assert not (tmp_path / "out").exists()


def test_files_that_hold_something_else_are_found_and_leave_nothing(tmp_path: Path, monkeypatch) -> None:
    from mopl.language_models import export_adapters as module

    whole = module.write_adapter

    def damaged(folder, made, tensors) -> None:
        key = next(name for name in tensors if "layers.1.self_attn.v_proj.lora_B" in name)
        whole(folder, made, {**tensors, key: tensors[key] * 1.001})

    monkeypatch.setattr(module, "write_adapter", damaged)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match=r"adapter helpful .* adds to .*v_proj what differs by 0.001"):
            export_adapters(mixture(dtype=dtype), tmp_path / "out")
    assert not list(tmp_path.iterdir())
