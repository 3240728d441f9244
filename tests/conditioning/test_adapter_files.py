"""One adapter of any trade-off, from files alone: PEFT's own concatenation, the mixture, and plain arithmetic."""

import copy
import json
import shutil

import peft
import pytest
import torch
from adapter_folders import BASE, NAMES, with_adapters, write
from safetensors.torch import load_file, save_file
from tiny_language_models import build, lora

from mopl.conditioning import LoraMixture
from mopl.conditioning.adapter_files import AdapterFolder, name_and_weights, write_merged_adapter, write_spread_adapters

IDS = torch.tensor([[1, 9, 10, 11, 12, 13, 14], [1, 20, 21, 22, 23, 24, 25]])
THREE = dict(ranks=(2, 3, 4), targets=(("q_proj", "v_proj"), ("v_proj", "down_proj"), ("o_proj",)))


@torch.no_grad()
def logits(model, **options):
    return model(input_ids=IDS, use_cache=False, **options).logits.float()


def loaded(folder, model=None):
    return peft.PeftModel.from_pretrained(build("llama") if model is None else model, str(folder)).eval()


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Return (PEFT model, folder) of three adapters whose ranks and targets differ."""
    model = with_adapters(**THREE)
    return model, write(tmp_path_factory.mktemp("three"), model)


@pytest.mark.parametrize("weights", [[0.7, 0.2, 0.1], [0.05, 0.95, 0.0], [0.0, 0.0, 1.0], [1 / 3, 1 / 3, 1 / 3]])
def test_it_is_what_peft_concatenates_and_what_the_mixture_computes(three, weights, tmp_path):
    model, folder = three
    write_merged_adapter(AdapterFolder(folder), weights, tmp_path / "merged")
    found = logits(loaded(tmp_path / "merged"))
    theirs = copy.deepcopy(model)
    used = [(name, weight) for name, weight in zip(NAMES, weights, strict=True) if weight]
    theirs.add_weighted_adapter([name for name, _ in used], [w for _, w in used], "cat", combination_type="cat")
    theirs.set_adapter("cat")
    torch.testing.assert_close(found, logits(theirs), rtol=0, atol=1e-5)
    mixture = LoraMixture(copy.deepcopy(model), 3, record=NAMES, adapters=NAMES)
    wanted = logits(mixture, weights=torch.tensor(weights))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    others = logits(mixture, weights=torch.tensor([0.5, 0.1, 0.4]))
    assert (found - others).abs().max() > 0.1  # the weights matter


def test_adapters_that_are_spread_can_be_added_factor_by_factor(three, tmp_path):
    """As LoRAX merges "linear": A to A, B to B, and the scale that its weights are. PEFT takes their roots itself."""
    model, folder = three
    weights = [0.7, 0.2, 0.1]
    write_spread_adapters(AdapterFolder(folder), tmp_path / "spread")
    files = [load_file(tmp_path / "spread" / name / "adapter_model.safetensors") for name in NAMES]
    roots = torch.tensor(weights).sqrt()
    added = {key: sum(c * file[key] for c, file in zip(roots, files, strict=True)) for key in files[0]}
    shutil.copytree(tmp_path / "spread" / "brief", tmp_path / "added")
    save_file(added, str(tmp_path / "added" / "adapter_model.safetensors"))
    mixture = LoraMixture(copy.deepcopy(model), 3, record=NAMES, adapters=NAMES)
    wanted = logits(mixture, weights=torch.tensor(weights))
    torch.testing.assert_close(logits(loaded(tmp_path / "added")), wanted, rtol=0, atol=1e-5)

    theirs = loaded(tmp_path / "spread" / NAMES[0])
    theirs.load_adapter(str(tmp_path / "spread" / NAMES[0]), NAMES[0])
    for name in NAMES[1:]:
        theirs.load_adapter(str(tmp_path / "spread" / name), name)
    theirs.add_weighted_adapter(list(NAMES), weights, "linear", combination_type="linear")
    theirs.set_adapter("linear")
    torch.testing.assert_close(logits(theirs), wanted, rtol=0, atol=1e-5)
    for i, name in enumerate(NAMES):  # each alone is the adapter that it was
        theirs.set_adapter(name)
        alone = logits(mixture, weights=torch.eye(3)[i])
        torch.testing.assert_close(logits(theirs), alone, rtol=0, atol=1e-5)


def test_adding_the_factors_of_plain_adapters_is_no_mixture(tmp_path):
    """What the spread adapters are for: of equal ranks and targets, so that nothing else is in the way."""
    same = dict(ranks=(2, 2), targets=(("q_proj", "v_proj"),) * 2)
    model = with_adapters(**same)
    folder = write(tmp_path / "two", model)
    files = [load_file(folder / name / "adapter_model.safetensors") for name in NAMES[:2]]
    wanted = logits(LoraMixture(model, 2, record=NAMES[:2], adapters=NAMES[:2]), weights=torch.tensor([0.7, 0.3]))
    for coefficients in ([0.7, 0.3], [0.7**0.5, 0.3**0.5]):
        added = {key: sum(c * file[key] for c, file in zip(coefficients, files, strict=True)) for key in files[0]}
        shutil.copytree(folder / "helpful", tmp_path / "added", dirs_exist_ok=True)
        save_file(added, str(tmp_path / "added" / "adapter_model.safetensors"))
        assert (logits(loaded(tmp_path / "added")) - wanted).abs().max() > 0.1


def test_each_factor_is_one_product_rounded_once_and_nothing_else_is_rounded(three, tmp_path):
    _, folder = three
    weights = [0.7, 0.2, 0.1]
    adapters = AdapterFolder(folder)
    config, made = adapters.merged(weights)
    files = [load_file(folder / name / "adapter_model.safetensors") for name in NAMES]
    for key, tensor in made.items():
        is_a = ".lora_A." in key
        parts = []
        for weight, rank, file in zip(weights, (2, 3, 4), files, strict=True):
            shape = (rank, tensor.shape[1]) if is_a else (tensor.shape[0], rank)
            part = file.get(key, torch.zeros(shape))
            parts.append((weight * part.double()).float() if is_a else part)
        assert torch.equal(tensor, torch.cat(parts, 0 if is_a else 1)), key
    assert set(made) == set().union(*files)
    assert config["r"] == config["lora_alpha"] == 9 == adapters.rank_of(weights)
    assert adapters.rank_of([0.5, 0.5, 0]) == 5
    assert config["base_model_name_or_path"] == BASE and config["task_type"] == "CAUSAL_LM"
    assert config["target_modules"] == ["down_proj", "o_proj", "q_proj", "v_proj"]
    assert adapters.merged([0, 0, 1])[0]["target_modules"] == ["o_proj"]


def test_modules_that_no_short_names_mean_are_named_in_full(tmp_path):
    """Adapters on some layers: by short names PEFT would put the merged one on all of them."""
    model = with_adapters(layers_to_transform=[1])
    write_merged_adapter(AdapterFolder(write(tmp_path / "some", model)), [0.7, 0.3], tmp_path / "merged")
    names = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())["target_modules"]
    parts = ("mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj")
    assert names == [f"model.layers.1.{part}" for part in parts]
    mixture = LoraMixture(model, 2, record=NAMES[:2], adapters=NAMES[:2])
    found = logits(loaded(tmp_path / "merged"))
    torch.testing.assert_close(found, logits(mixture, weights=torch.tensor([0.7, 0.3])), rtol=0, atol=1e-5)


def test_factors_in_16_bits_lose_nothing(tmp_path):
    model = with_adapters(dtype=torch.bfloat16)
    folder = write(tmp_path / "half", model)
    _, made = AdapterFolder(folder).merged([0.7, 0.3])
    a = {key: tensor for key, tensor in made.items() if ".lora_A." in key}
    assert {tensor.dtype for tensor in a.values()} == {torch.float32}
    assert {tensor.dtype for key, tensor in made.items() if key not in a} == {torch.bfloat16}
    write_merged_adapter(AdapterFolder(folder), [0.7, 0.3], tmp_path / "merged")
    mixture = LoraMixture(with_adapters(dtype=torch.bfloat16).float(), 2, record=NAMES[:2], adapters=NAMES[:2])
    base = build("llama").to(torch.bfloat16).float()
    wanted = logits(mixture, weights=torch.tensor([0.7, 0.3]))
    torch.testing.assert_close(logits(loaded(tmp_path / "merged", base)), wanted, rtol=0, atol=1e-5)


def test_embeddings_and_transposed_layers(tmp_path):
    """GPT-2's layers are transposed, and PEFT calls an embedding's factors otherwise."""
    model = lora(build("gpt2"), "helpful")
    config = copy.deepcopy(model.peft_config["helpful"])
    model.add_adapter("harmless", config)
    torch.manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    for config in model.peft_config.values():
        config.lora_alpha = config.r
    for layer in model.modules():
        if isinstance(getattr(layer, "scaling", None), dict):
            layer.scaling.update(dict.fromkeys(layer.scaling, 1.0))
    write(tmp_path / "gpt2", model)
    write_merged_adapter(AdapterFolder(tmp_path / "gpt2"), [0.25, 0.75], tmp_path / "merged")
    mixture = LoraMixture(model, 2, record=NAMES[:2])
    found = logits(loaded(tmp_path / "merged", build("gpt2")))
    torch.testing.assert_close(found, logits(mixture, weights=torch.tensor([0.25, 0.75])), rtol=0, atol=1e-5)

    for name, value in (("helpful", 1.0), ("harmless", 2.0)):
        factors = {"A": torch.full((2, 7), value), "B": torch.full((5, 2), value)}
        stem = "base_model.model.transformer.wte.lora_embedding_"
        file = tmp_path / "gpt2" / name / "adapter_model.safetensors"
        save_file({f"{stem}{factor}": tensor for factor, tensor in factors.items()}, str(file))
    _, made = AdapterFolder(tmp_path / "gpt2").merged([0.25, 0.75])
    assert torch.equal(made[f"{stem}B"] @ made[f"{stem}A"], torch.full((5, 7), 2 * (0.25 * 1 + 0.75 * 4)))


def test_the_name_of_a_folder_means_its_weights():
    name, exact = name_and_weights([1 / 3, 2 / 3])
    assert name == "w=0.333333,0.666667" and exact.tolist() == [0.333333, 0.666667]
    name, exact = name_and_weights([1 / 40] * 40)
    assert len(name) < 255 and exact.shape == (40,) and name != name_and_weights([1 / 41] * 41)[0]


@pytest.fixture
def two(tmp_path_factory, request):
    model = with_adapters()
    return write(tmp_path_factory.mktemp("two"), model)


def edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("harmless/adapter_config.json", {"lora_alpha": 16}, "r is 3 and lora_alpha 16 but they must be equal"),
        ("harmless/adapter_config.json", {"use_rslora": True}, "use_rslora is True, which is no plain LoRA"),
        ("harmless/adapter_config.json", {"use_dora": True}, "use_dora is True"),
        ("harmless/adapter_config.json", {"lora_bias": True}, "no server adds the biases of adapters: train without"),
        ("harmless/adapter_config.json", {"rank_pattern": {"q_proj": 1}}, "rank_pattern is"),
        ("harmless/adapter_config.json", {"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ("harmless/adapter_config.json", {"of_tomorrow": 1}, "of_tomorrow is 1, which is no plain LoRA"),
        ("harmless/adapter_config.json", {"scale_of_tomorrow": 0}, "scale_of_tomorrow is 0, which is no plain LoRA"),
        ("harmless/adapter_config.json", {"peft_type": "LOHA"}, "peft_type is 'LOHA' but must be 'LORA'"),
        ("harmless/adapter_config.json", {"r": 4, "lora_alpha": 4}, r"must be \(4, ...\) and \(..., 4\), as r says"),
        ("harmless/adapter_config.json", {"task_type": None}, "task_type is None but 'CAUSAL_LM' in helpful"),
        ("harmless/adapter_config.json", {"init_lora_weights": "pissa"}, "moves a part of the base weights"),
        ("harmless/adapter_config.json", {"base_model_name_or_path": "x/y"}, "is 'x/y' but 'some-one/tiny-llama'"),
        ("mopl.json", {"kind": "LoraMixture"}, "holds 'LoraMixture' but must hold 'adapters'; make the folder again"),
        ("mopl.json", {"adapters": ["helpful"]}, "it names 1 adapter for 2 objectives"),
        ("mopl.json", {"adapters": ["helpful", "../x"]}, "the adapter '../x' is not inside of the folder"),
        ("mopl.json", {"adapters": ["hel\0pful", "harmless"]}, "ful' is not inside of the folder; make the"),
        ("mopl.json", {"adapters": ["helpful", "helpful"]}, "it names the adapter 'helpful' for two objectives"),
        ("mopl.json", {"adapters": ["helpful", "x"]}, "x/adapter_config.json is missing"),
        ("mopl.json", {"objectives": []}, "objectives is a list of 0 but must"),
    ],
)  # fmt: skip
def test_what_is_no_plain_lora_is_refused(two, name, values, said):
    edit(two / name, **values)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        AdapterFolder(two).merged([0.5, 0.5])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, key: t.update({"base_model.model.lm_head.weight": torch.ones(2)}), "is no factor of a plain LoRA"),
        (lambda t, key: t.update({key.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(2)}), "no factor"),
        (lambda t, key: t.pop(key), "has the factor B alone"),
        (lambda t, key: t.update({key: torch.full_like(t[key], torch.nan)}), "NaN or infinite"),
        (lambda t, key: t.update({key: t[key][:, :3].contiguous()}), "but .* in helpful"),
        (lambda t, key: t.clear(), "has no factors"),
        (lambda t, key: t.update({key: t[key].int()}), "int32 and .* must be of floating-point numbers of 16 bits"),
        (lambda t, key: t.update({key: t[key].to(torch.float8_e4m3fn)}), "numbers of 16 bits or more; make the folder"),
    ],
)
def test_tensors_that_are_not_understood_are_refused(two, change, said):
    file = two / "harmless" / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors, next(key for key in tensors if "v_proj.lora_A" in key))
    save_file(tensors, str(file))
    with pytest.raises(ValueError, match=said):
        AdapterFolder(two).merged([0.5, 0.5])


def test_weights_are_checked_and_nothing_is_left_of_a_failure(two, tmp_path):
    adapters = AdapterFolder(two)
    for weights, said in (([0.5, 0.6], "sum to 1"), ([1.0], r"shape \(1,\)"), ([[0.5, 0.5]], r"must be \(2,\)")):
        with pytest.raises(ValueError, match=said):
            write_merged_adapter(adapters, weights, tmp_path / "merged")
    write_merged_adapter(adapters, [1, 0], tmp_path / "merged")
    with pytest.raises(FileExistsError):
        write_merged_adapter(adapters, [0, 1], tmp_path / "merged")
    write_merged_adapter(adapters, [0, 1], tmp_path / "merged", replace=True)
    assert json.loads((tmp_path / "merged" / "adapter_config.json").read_text())["r"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_the_digest_tells_adapters_apart(two, tmp_path):
    adapters = AdapterFolder(two)
    first = adapters.digest()
    shutil.copytree(two, tmp_path / "copy")
    assert AdapterFolder(tmp_path / "copy").digest() == first == adapters.digest()
    file = two / "helpful" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(iter(tensors))] += 1
    save_file(tensors, str(file))
    assert adapters.digest() != first


def test_files_that_are_replaced_while_they_are_read_are_not_mixed(two, tmp_path, monkeypatch):
    adapters = AdapterFolder(two)

    def merged(weights, old=adapters.merged):
        made = old(weights)
        edit(two / "helpful" / "adapter_config.json", revision="new")
        return made

    monkeypatch.setattr(adapters, "merged", merged)
    with pytest.raises(ValueError, match="was written anew while it was read; ask again"):
        write_merged_adapter(adapters, [0.5, 0.5], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
