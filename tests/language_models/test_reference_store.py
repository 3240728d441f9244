"""Log-probabilities of a reference are computed once, found again wherever they are right, and nowhere else."""

import copy
import dataclasses
import functools
import json
import os
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

from launching import launch_mopl
from safetensors.torch import load_file, save_file
from tiny_language_models import COMMON, VOCABULARY, build, tokenizer

from mopl._records import DamagedFile
from mopl.alignment import AlignConfig, align
from mopl.alignment.recipe import load_data
from mopl.conditioning import HyperPrompt, HyperPromptModel, LoraMixture, ParameterMixture, TextPrompt, TextPromptModel
from mopl.integrations.transformers import MultiObjectiveConfig, MultiObjectiveTrainer
from mopl.language_models import ReferenceStore, identity_of, reference_store, score_lists
from mopl.language_models.collate import ListCollator
from mopl.language_models.head import fuse
from mopl.language_models.model_identity import fingerprint
from mopl.language_models.models import disable_dropout
from mopl.language_models.scoring import OneProcess
from mopl.language_models.tokenization import ReadReport, TokenizedData, TokenizedList, tokenize

TARGETS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
ADAPTERS = {
    "lora": lambda: peft.LoraConfig(r=2, **TARGETS),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, **TARGETS),
    "embeddings": lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
    "whole head": lambda: peft.LoraConfig(r=2, modules_to_save=["lm_head"], **TARGETS),
    "tokens": lambda: peft.LoraConfig(r=2, trainable_token_indices=[3, 4], **TARGETS),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    "loha": lambda: peft.LoHaConfig(r=2, **TARGETS),
    "vera": lambda: peft.VeraConfig(r=2, **TARGETS),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def lists_of(count: int = 9, *, seed: int = 3, size: int = 0) -> tuple[TokenizedList, ...]:
    draw = np.random.default_rng(seed)
    found = []
    for number in range(count):
        responses = tuple(draw.integers(6, VOCABULARY, draw.integers(1, 6)) for _ in range(size or 2 + number % 3))
        labels = np.eye(len(responses), dtype=np.float32)[:2]
        found.append(TokenizedList(draw.integers(6, VOCABULARY, draw.integers(2, 5)), responses, labels, number))
    return tuple(found)


LISTS = lists_of()


def adapted(kind: str = "lora", *, seed: int = 2, **changes):
    torch.manual_seed(seed)
    config = ADAPTERS[kind]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = peft.get_peft_model(build(), config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return model


class Passes:
    """Counts forward passes of models that a test runs inside of it."""

    def __init__(self, monkeypatch):
        self.count = 0
        forward = transformers.LlamaModel.forward

        def counting(*args, **kwargs):
            self.count += 1
            return forward(*args, **kwargs)

        monkeypatch.setattr(transformers.LlamaModel, "forward", counting)

    def of(self, act):
        before = self.count
        act()
        return self.count - before


@pytest.fixture
def passes(monkeypatch):
    return Passes(monkeypatch)


def assert_right(found: torch.Tensor, model, lists=LISTS) -> None:
    """As one sequence after the other has it, by the model's own logits."""
    expected = []
    for item in lists:
        for place, response in enumerate(item.responses):
            prompt = item.prompt_of(place)
            ids = torch.tensor(np.concatenate([prompt, response]))[None]
            with torch.no_grad():
                logits = model(input_ids=ids).logits[:, -len(ids[0]) :].log_softmax(-1)
            expected.append(logits[0, len(prompt) - 1 : -1].gather(-1, ids[0, len(prompt) :, None]).sum())
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- computed once


def test_log_probabilities_are_those_of_the_model_and_are_computed_once(tmp_path, passes):
    model, store = fuse(build()), ReferenceStore(tmp_path / "new" / "folder")
    found = store.load_or_compute(LISTS, model)
    assert_right(found, model)
    again: list[torch.Tensor] = []
    assert passes.of(lambda: again.extend([store.load_or_compute(LISTS, model), store.load(LISTS, model)])) == 0
    assert passes.of(lambda: again.append(ReferenceStore(store.folder).load(LISTS))) == 0 and torch.equal(
        again[-1], found
    )


def test_rows_are_found_in_any_order_part_and_grouping(tmp_path, passes):
    model, store = fuse(build()), ReferenceStore(tmp_path)
    found = store.load_or_compute(LISTS, model).split([len(item.responses) for item in LISTS])
    assert passes.of(lambda: store.load_or_compute(LISTS[5:2:-1], model)) == 0
    assert torch.equal(store.load(LISTS[5:2:-1], model), torch.cat(found[5:2:-1]))
    turned = dataclasses.replace(LISTS[2], responses=LISTS[2].responses[::-1], index=7)
    assert torch.equal(store.load([turned], model), found[2].flip(0))
    # The prompt of TRL's keep_end, whose beginning is cut off, is another one.
    cut = dataclasses.replace(LISTS[0], prompt_starts=(1, 0))
    with pytest.raises(ValueError, match="lacks 1 of 2"):
        store.load([cut], model)
    assert_right(store.load_or_compute([cut], model), model, [cut])
    # Only what is missing is computed.
    more = (*LISTS, *lists_of(2, seed=8))
    assert passes.of(lambda: store.load_or_compute(more, model)) == 1
    assert_right(store.load(more, model), model, more)


def test_a_boundary_between_prompt_and_response_is_part_of_the_tokens(tmp_path):
    model, store = fuse(build()), ReferenceStore(tmp_path)
    tokens, labels = np.array([7, 8, 9, 10]), np.zeros((1, 1), np.float32)
    one, other = (TokenizedList(tokens[:n], (tokens[n:],), labels, 0) for n in (1, 2))
    first = store.load_or_compute([one], model)
    assert not torch.allclose(first, store.load_or_compute([other], model))
    assert_right(store.load([one, other], model), model, [one, other])


# ---------------------------------------------------------------- never those of others


def changed(model, what: str):
    """The same model with one thing that changes its log-probabilities."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        if what == "model":
            model.lm_head.weight.view(torch.int32)[3, 4] ^= 1
        elif what == "two values":  # which a sum over values would not see
            model.lm_head.weight[[3, 4]] = model.lm_head.weight[[4, 3]]
        elif what == "dtype":
            model.to(torch.bfloat16)
        elif what == "config":
            model.config.rms_norm_eps *= 2
        elif what == "attention":
            model.set_attn_implementation("eager")
        elif what == "buffer":
            model.model.rotary_emb.inv_freq.mul_(0.1)
        elif what == "number":
            model.model.layers[1].self_attn.scaling *= 3
    return model


@pytest.mark.parametrize(
    ("what", "named"),
    [("model", "model"), ("two values", "model"), ("dtype", "model"), ("config", "config"), ("attention", "attention"),
     ("buffer", "constants"), ("number", "constants")],
)  # fmt: skip
def test_a_changed_model_is_not_taken_for_the_stored_one(tmp_path, what, named):
    model, store = fuse(build()), ReferenceStore(tmp_path)
    store.load_or_compute(LISTS, model)
    other = changed(model, what)
    with pytest.raises(ValueError, match=rf"lacks 27 of 27 .*which differs in {named} .*load_or_compute"):
        store.load(LISTS, other)
    store.load_or_compute(LISTS, other)
    assert len(store.identities()) == 2 and torch.equal(store.load(LISTS, model), store.load_or_compute(LISTS, model))
    with pytest.raises(ValueError, match=r"log-probabilities of 2 models \(model .*; pass the one"):
        store.load(LISTS)


def test_a_scale_of_the_logits_that_changes_later_is_another_model(tmp_path):
    torch.manual_seed(0)
    config = transformers.CohereConfig(**COMMON, logit_scale=1.0)
    model, store = fuse(transformers.AutoModelForCausalLM.from_config(config).eval()), ReferenceStore(tmp_path)
    store.load_or_compute(LISTS, model)
    model.logit_scale = 0.25
    assert_right(store.load_or_compute(LISTS, model), model)


def test_the_dtype_that_a_model_is_loaded_in_is_another_than_one_it_is_cast_to(tmp_path):
    build().save_pretrained(tmp_path)
    load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, tmp_path)
    loaded, cast = load(dtype=torch.bfloat16).float(), load(dtype=torch.float32).bfloat16().float()
    assert fingerprint(loaded) == fingerprint(cast) and identity_of(loaded) != identity_of(cast)
    assert identity_of(loaded) == identity_of(load(dtype=torch.bfloat16).float())


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_passes_dropout_and_fusing_leave_an_identity_as_it_was(kind):
    torch.manual_seed(0)
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    options = {**COMMON, "max_position_embeddings": 16, "attention_dropout": 0.1, "rope_parameters": rope}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**options)).eval()
    before, frequencies = identity_of(model), model.model.rotary_emb.inv_freq.clone()
    with torch.no_grad():
        model(input_ids=torch.arange(40)[None])
    assert not torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    disable_dropout(fuse(model))
    assert identity_of(model.train()) == before


@pytest.mark.parametrize(
    "change", [{"seed": 5}, {"lora_alpha": 16}, {"use_rslora": True}, {"kind": "dora"}, {"target_modules": ["q_proj"]}]
)
def test_a_changed_adapter_is_not_taken_for_the_stored_one(tmp_path, change):
    store, one, other = ReferenceStore(tmp_path), adapted(), adapted(**change)
    found = store.load_or_compute(LISTS, one)
    assert_right(found, one)
    with pytest.raises(ValueError, match="differs in adapter"):
        store.load(LISTS, other)
    assert_right(store.load_or_compute(LISTS, other), other)
    assert torch.equal(store.load(LISTS, one), found)


def test_a_changed_row_is_not_taken_for_the_stored_one(tmp_path):
    model, store = fuse(build()), ReferenceStore(tmp_path)
    store.load_or_compute(LISTS, model)
    for part in ("prompt", "responses"):
        item = copy.deepcopy(LISTS[4])
        tokens = item.prompt if part == "prompt" else item.responses[1]
        tokens[0] = 6 if tokens[0] != 6 else 7
        lists = (*LISTS[:4], item, *LISTS[5:])
        missing = 3 if part == "prompt" else 1
        with pytest.raises(ValueError, match=rf"lacks {missing} of 27 .*other tokens; pass the same rows, tokenizer"):
            store.load(lists, model)
        assert_right(store.load_or_compute(lists, model), model, lists)


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_computed(tmp_path, passes):
    (tmp_path / "file").touch()
    model = fuse(build())
    before = passes.count
    for folder, name in ((tmp_path / "file", None), (tmp_path / "file" / "inside", "train")):
        with pytest.raises(OSError, match=r"file is no folder, so log-probabilities cannot be kept in .*pass another"):
            ReferenceStore(folder).load_or_compute(LISTS, model, name=name)
    assert passes.count == before


def test_the_precision_of_autocast_is_part_of_the_identity(tmp_path):
    model, store = fuse(build()), ReferenceStore(tmp_path)
    plain = store.load_or_compute(LISTS, model)
    with torch.autocast("cpu", torch.bfloat16):
        lower = store.load_or_compute(LISTS, model)
    assert not torch.equal(plain, lower)
    assert torch.equal(store.load(LISTS, model, precision="bf16"), lower) and torch.equal(
        store.load(LISTS, model), plain
    )


def test_autocast_around_an_accelerator_without_any_is_seen(tmp_path):
    class Plain(OneProcess):
        mixed_precision = "no"

    model, store = fuse(build()), ReferenceStore(tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        lower = store.load_or_compute(LISTS, model, accelerator=Plain(model))
    assert torch.equal(store.load(LISTS, model, precision="bf16"), lower)
    assert_right(store.load_or_compute(LISTS, model, accelerator=Plain(model)), model)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_model_whose_adapters_are_off_is_its_base_model(tmp_path, kind, passes):
    base, model, store = build(), adapted(kind), ReferenceStore(tmp_path)
    assert fingerprint(model.get_base_model()) == fingerprint(base)
    assert identity_of(model)["adapter"] != "none" and identity_of(model)["model"] == identity_of(base)["model"]
    fuse(model.get_base_model())  # PEFT puts this forward in the place of a prompt's while that is off
    with model.disable_adapter():
        assert identity_of(model) == identity_of(base)
        found = store.load_or_compute(LISTS, model)
    assert passes.of(lambda: store.load_or_compute(LISTS, base)) == 0
    assert_right(found, base)
    if hasattr(model.base_model, "disable_adapter_layers"):
        model.base_model.disable_adapter_layers()
        assert identity_of(model) == identity_of(base)


@pytest.mark.parametrize(
    ("config", "part"),
    [(peft.VeraConfig(r=2, **TARGETS), "vera_A"), (peft.BOFTConfig(boft_block_size=4, **TARGETS), "boft_P")],
)
def test_tensors_that_an_adapter_draws_and_does_not_save_are_part_of_it(config, part):
    model = peft.get_peft_model(build(), config)
    before = identity_of(model)
    buffer = next(tensor for name, tensor in model.named_buffers() if part in name)
    buffer.add_(0.1)
    assert {key for key, value in identity_of(model).items() if value != before[key]} == {"adapter"}
    with model.disable_adapter():
        assert identity_of(model) == identity_of(build())


def injected(way: str):
    model, config = build(), ADAPTERS["lora"]()
    torch.manual_seed(2)
    if way == "transformers":
        model.add_adapter(config)
    elif way == "injected":
        peft.inject_adapter_in_model(config, model)
    else:
        return adapted().get_base_model()
    return spread(model)


def spread(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    return model.eval()


@pytest.mark.parametrize("way", ["transformers", "injected", "inside of a PEFT model"])
def test_adapters_in_a_model_without_a_wrapper_are_part_of_it(tmp_path, way):
    base, model, store = build(), injected(way), ReferenceStore(tmp_path)
    expected = store.load_or_compute(LISTS, base)
    found = store.load_or_compute(LISTS, model)
    assert (found - expected).abs().max() > 0.1
    assert_right(found, model)
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.enable_adapters(False)
    assert identity_of(model) == identity_of(base)


def lora_layers(model):
    return [layer for layer in model.modules() if hasattr(layer, "lora_A")]


def scaled(model):
    lora_layers(model)[0].scaling["default"] *= 3


def one_off(model):
    lora_layers(model)[0].enable_adapters(False)


def merged_and_off(model):
    model.merge_adapter()
    model.base_model.disable_adapter_layers()  # PEFT takes them out of the weights in the next forward pass


@pytest.mark.parametrize("change", [scaled, one_off, merged_and_off])
def test_a_layer_that_uses_its_adapter_in_another_way_is_another_model(tmp_path, change):
    store, models = ReferenceStore(tmp_path), [build(), adapted(), adapted().merge_and_unload()]
    changed = adapted()
    change(changed)
    stored = identity_of(changed)
    assert all(identity_of(model) != stored for model in models)
    assert_right(store.load_or_compute(LISTS, changed), changed)
    for model in models:
        assert_right(store.load_or_compute(LISTS, model), model)


def test_the_name_of_an_adapter_is_no_part_of_it_and_files_keep_its_identity(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(), str(tmp_path), adapter_name="another")
    assert identity_of(loaded) == identity_of(model)
    build().save_pretrained(tmp_path / "base")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    read.config.pad_token_id, read.config.use_cache = 5, False
    assert identity_of(read) == identity_of(build())


def test_a_model_that_depends_on_w_is_refused_and_its_reference_is_stored(tmp_path, passes):
    base, store = build(), ReferenceStore(tmp_path)
    expected = store.load_or_compute(LISTS, base)
    prompted = HyperPromptModel(build(), HyperPrompt(2, 4, 2, 32))
    mixture = LoraMixture(build(), 2, config=ADAPTERS["lora"]())
    for model in (prompted, mixture, ParameterMixture(build(), 2)):
        with pytest.raises(ValueError, match=rf"{type(model).__name__} depend on the weights w.*model.reference\(\)"):
            store.load_or_compute(LISTS, model)
    for model in (prompted, mixture):
        with model.reference():
            assert passes.of(lambda model=model: store.load_or_compute(LISTS, model)) == 0
            torch.testing.assert_close(score_lists(fuse_inside(model), LISTS), expected)


def fuse_inside(model):
    fuse(model.causal_lm)
    return model


def test_a_model_that_is_not_here_and_numbers_that_are_none_are_refused(tmp_path):
    store = ReferenceStore(tmp_path)
    with torch.device("meta"):
        nowhere = build()
    with pytest.raises(NotImplementedError, match="sharded or on no device"):
        store.load(LISTS, nowhere)
    broken = fuse(build())
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="list 0 of the data a log-probability that is no finite number; load it in"):
        store.load_or_compute(LISTS, broken)
    assert not list(tmp_path.glob("*.safetensors"))


def test_what_a_store_cannot_tell_apart_is_refused_and_no_lists_are_none(tmp_path):
    store, model, w = ReferenceStore(tmp_path), build(), torch.tensor([0.5, 0.5])
    zeros = {"score": lambda model, batch: torch.zeros(batch.mask.shape)}
    for options in ({"weights": w}, {"temperature": w}, {"conditioner": lambda item, w, beta: item}, zeros):
        with pytest.raises(ValueError, match="is no part of what a stored log-probability is found by"):
            store.load_or_compute(LISTS, model, **options)
    with pytest.raises(TypeError, match="foo is no option; pass collator, tokens_per_batch or lists_per_batch"):
        store.load_or_compute([], model, foo=1)
    for call in (store.load, store.load_or_compute):
        with pytest.raises(TypeError, match=r"lists is a TokenizedList but must be a sequence .*pass \[item\]"):
            call(LISTS[0], model)
        with pytest.raises(TypeError, match="model is a str but must be a loaded"):
            call(LISTS, "gpt2")
    packed = torch.ao.quantization.quantize_dynamic(build(), {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(NotImplementedError, match="no tensor, so the model cannot be told"):
        identity_of(packed)
    for call in (store.load, lambda lists, kept: store.load_or_compute(lists, model, identity=kept)):
        with pytest.raises(ValueError, match="identity lacks config, constants, adapter, attention; pass all"):
            call(LISTS, {"model": "of another"})
    for name in (None, "train"):
        for _ in range(2):
            assert store.load_or_compute([], model, name=name).shape == (0,)


# ---------------------------------------------------------------- files


def test_computing_continues_after_the_last_whole_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_store, "CHUNK", 4)
    model, store, calls = fuse(build()), ReferenceStore(tmp_path), []

    def counting(model, chunk, **options):
        calls.append(len(chunk))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score_lists(model, chunk, **options)

    monkeypatch.setattr(reference_store, "score_lists", counting)
    for name in (None, "train"):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            store.load_or_compute(LISTS, model, name=name)
        assert_right(store.load_or_compute(LISTS, model, name=name), model)
        assert calls == [4, 4, 1, 1]
    calls.clear()
    batches = []

    class Collator(ListCollator):
        def __call__(self, lists):
            batches.append([item.index for item in lists])
            return super().__call__(lists)

    store.load_or_compute(lists_of(5, seed=5), model, lists_per_batch=3, collator=Collator())
    assert calls == [3, 2] and batches == [[0, 1, 2], [3, 4]]  # no batch lies in two chunks
    assert {path.name for path in tmp_path.iterdir() if "-" not in path.name} == {"train.safetensors"}


def test_a_named_file_is_refused_for_other_data_or_another_model(tmp_path):
    model, store = fuse(build()), ReferenceStore(tmp_path)
    found = store.load_or_compute(LISTS, model, name="train")
    assert [path.name for path in tmp_path.iterdir()] == ["train.safetensors"]
    assert torch.equal(store.load(LISTS, model), found)  # a run's own file is a store, too
    with pytest.raises(ValueError, match=r"train.safetensors holds .* other data \(other tokens\); delete the file"):
        store.load_or_compute(lists_of(9, seed=4), model, name="train")
    with pytest.raises(ValueError, match=r"another model \(.*delete the file to compute them again, or put back"):
        store.load_or_compute(LISTS, changed(model, "model"), name="train")


def test_files_of_earlier_versions_are_read(tmp_path, passes):
    model, store = fuse(build()), ReferenceStore(tmp_path)
    scores = score_lists(model, LISTS)
    tokens = TokenizedData(LISTS, ("a",), "x", ReadReport("x")).fingerprint()
    identity = {"data": "of the texts", "tokenizer": tokens, "model": fingerprint(model), "precision": "auto no"}
    save_file({"scores": scores}, str(tmp_path / "train.safetensors"), metadata=identity)
    assert passes.of(lambda: store.load_or_compute(LISTS, model, name="train")) == 0
    assert torch.equal(store.load_or_compute(LISTS, model, name="train"), scores)
    for key, message in (("tokenizer", "other data"), ("model", "another model"), ("precision", "another precision")):
        save_file({"scores": scores}, str(tmp_path / "train.safetensors"), metadata={**identity, key: "other"})
        with pytest.raises(ValueError, match=message):
            store.load_or_compute(LISTS, model, name="train")


def test_files_that_say_nothing_of_constants_are_those_of_their_run_and_no_store(tmp_path, passes):
    model, store = fuse(build()), ReferenceStore(tmp_path)
    found = store.load_or_compute(LISTS, model, name="train")
    earlier = {key: value for key, value in identity_of(model).items() if key != "constants"} | {"precision": "no"}
    save_file(load_file(tmp_path / "train.safetensors"), str(tmp_path / "train.safetensors"), metadata=earlier)
    assert passes.of(lambda: store.load_or_compute(LISTS, model, name="train")) == 0
    assert not store.identities() and passes.of(lambda: store.load_or_compute(LISTS, model)) > 0
    assert torch.equal(store.load(LISTS, model), found)
    with pytest.raises(ValueError, match="identity lacks constants; pass all"):
        store.load(LISTS, earlier)


def test_damaged_files_are_named_and_others_are_left_alone(tmp_path):
    model, store = fuse(build()), ReferenceStore(tmp_path)
    save_file({"a": torch.zeros(2)}, str(tmp_path / "adapter_model.safetensors"))
    (tmp_path / ".writing-0123456789abcdef-a.safetensors").mkdir()  # of another process, or one that was killed
    store.load_or_compute(LISTS, model)
    (file,) = (path for path in tmp_path.iterdir() if "-" in path.name and path.is_file())
    whole, tensors = file.read_bytes(), load_file(file)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DamagedFile, match=re.escape(str(file)) + ".*delete it to compute it again"):
        store.load_or_compute(LISTS, model)
    metadata = {**identity_of(model), "precision": "no"}
    save_file({**tensors, "sequences": tensors["sequences"][1:].clone()}, str(file), metadata=metadata)
    with pytest.raises(DamagedFile, match=re.escape(str(file))):
        store.load_or_compute(LISTS, model)


def test_processes_share_a_folder_at_the_same_time(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_store, "CHUNK", 2)
    lists, models = lists_of(16), [fuse(build()) for _ in range(3)]
    found: dict[int, torch.Tensor] = {}

    def compute(number: int) -> None:
        order = lists if number else lists[::-1]
        found[number] = ReferenceStore(tmp_path).load_or_compute(order, models[number])

    threads = [threading.Thread(target=compute, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_right(found[0], models[0], lists[::-1])
    assert_right(found[1], models[0], lists)
    assert_right(ReferenceStore(tmp_path).load(lists, models[2]), models[0], lists)


# ---------------------------------------------------------------- one store for all


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a tokenizer, lists in a file, and a run of `mopl align` that has filled a store."""
    folder = tmp_path_factory.mktemp("shared")
    build(tie_word_embeddings=False).save_pretrained(folder / "MODEL")
    tokenizer().save_pretrained(folder / "MODEL")
    draw = np.random.default_rng(5)
    with (folder / "lists.jsonl").open("w") as lines:
        for _ in range(20):
            words = [" ".join(f"w{n}" for n in draw.integers(0, 50, draw.integers(2, 5))) for _ in range(3)]
            labels = {"helpful": [1.0, 0.0], "harmless": [0.0, 1.0]}
            lines.write(json.dumps({"prompt": words[0], "responses": words[1:], "labels": labels}) + "\n")
    align(settings(folder, reference_store=str(folder / "store")), folder / "run", say=lambda line: None)
    return folder


def settings(place: Path, **changes) -> AlignConfig:
    options = dict(
        steps=1, lists_per_batch=4, points=2, bootstrap=0, samples=0, device="cpu", held_out=0.2, lora_rank=2,
        reference="precomputed", max_length=64,
    )  # fmt: skip
    return AlignConfig(str(place / "MODEL"), str(place / "lists.jsonl"), **{**options, **changes})


def trainer_of(place: Path, folder: Path, model, store: Path, *, data=None, **options):
    args = MultiObjectiveConfig(
        str(folder), report_to="none", use_cpu=True, disable_tqdm=True, precompute_ref_log_probs=True, max_length=64,
        reference_store=str(store), max_steps=1, **options,
    )  # fmt: skip
    split = data or load_data(settings(place))
    return MultiObjectiveTrainer(
        model, args, train_dataset=split["train"], eval_dataset=split["test"],
        processing_class=transformers.AutoTokenizer.from_pretrained(place / "MODEL"),
    )  # fmt: skip


def loaded(place: Path):
    return fuse(transformers.AutoModelForCausalLM.from_pretrained(place / "MODEL", dtype=torch.float32))


def references(trainer) -> torch.Tensor:
    return torch.cat([torch.from_numpy(each.reference) for each in trainer.train_dataset.lists])


POLICIES = {
    "plain": lambda model: model,
    "adapters that do nothing yet": lambda model: peft.get_peft_model(model, ADAPTERS["lora"]()),
    "prompt": lambda model: HyperPromptModel(model, HyperPrompt(2, 4, 2, 32)),
    "mixture of adapters": lambda model: LoraMixture(model, 2, config=ADAPTERS["lora"]()),
    "mixture of parameters": lambda model: ParameterMixture(model, 2),
    "words": lambda model: TextPromptModel(
        peft.get_peft_model(model, ADAPTERS["lora"]()), TextPrompt(("helpful", "harmless")), tokenizer()
    ),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_trainer_reads_what_a_run_has_stored(place, tmp_path, passes, policy):
    model, made = POLICIES[policy](loaded(place)), []
    # The check of a model's rows runs it a few times, store or not.
    free = passes.of(lambda: trainer_of(place, tmp_path, model, tmp_path / "other"))
    count = passes.of(lambda: made.append(trainer_of(place, tmp_path, model, place / "store")))
    own = trainer_of(place, tmp_path, model, tmp_path / "other")
    assert count < free and passes.of(lambda: trainer_of(place, tmp_path, model, tmp_path / "other")) == count
    torch.testing.assert_close(references(made[0]), references(own))
    assert not torch.equal(references(made[0]), torch.zeros(()))
    made[0].train()


def test_a_run_reads_what_a_trainer_has_stored_and_its_own_folder_is_a_store(place, tmp_path, passes):
    trainer = trainer_of(place, tmp_path, loaded(place), tmp_path / "store")
    files = sorted((tmp_path / "store").iterdir())
    align(settings(place, reference_store=str(tmp_path / "store")), tmp_path / "run", say=lambda line: None)
    assert sorted((tmp_path / "store").iterdir()) == files and not (tmp_path / "run" / "reference").exists()
    align(settings(place), tmp_path / "own", say=lambda line: None)
    names = [path.name for path in sorted((tmp_path / "own" / "reference").iterdir())]
    assert names == ["test.safetensors", "train.safetensors"]
    again = trainer_of(place, tmp_path, loaded(place), tmp_path / "own" / "reference")
    assert [path.name for path in sorted((tmp_path / "own" / "reference").iterdir())] == names
    torch.testing.assert_close(references(again), references(trainer))


def test_a_trainer_with_trained_adapters_stores_them_as_they_were(place, tmp_path):
    model = peft.get_peft_model(loaded(place), ADAPTERS["lora"]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    store = tmp_path / "store"
    shutil.copytree(place / "store", store)
    before = copy.deepcopy(model)
    trainer = trainer_of(place, tmp_path, model, store, learning_rate=0.1)
    assert len(ReferenceStore(store).identities()) == 2
    lists = [example.tokens for example in trainer.train_dataset.lists]
    assert_right(references(trainer), before, lists)
    trainer.train()
    data = load_data(settings(place, held_out=0.4))["test"]
    trainer.evaluate(data)  # after training: the reference is what it was
    lists = [example.tokens for example in trainer._examples(data, trainer.objectives).lists]
    assert_right(ReferenceStore(store).load(lists, before), before, lists)
    assert len(ReferenceStore(store).identities()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precompute_ref_log_probs": False}, "but the reference is computed in each step; pass precompute_ref"),
        (
            {"precompute_ref_log_probs": True, "reference_free": True},
            "reference_free is True, so there is no reference",
        ),
    ],
)
def test_a_store_that_would_not_be_used_is_refused(tmp_path, options, message):
    args = MultiObjectiveConfig(str(tmp_path), report_to="none", use_cpu=True, reference_store="store", **options)
    with pytest.raises(ValueError, match=f"reference_store is 'store' .*{message}"):
        MultiObjectiveTrainer(build(), args, train_dataset=TokenizedData(LISTS, ("a", "b"), "x", ReadReport("x")))


def test_weighted_sums_of_tokens_are_not_stored(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from mopl.integrations.trl import MultiObjectiveDPOConfig, MultiObjectiveDPOTrainer, with_reference_logps

    rows = datasets.Dataset.from_list([{"prompt": "w1", "chosen": " w2", "rejected": " w3"}])
    options = dict(report_to="none", use_cpu=True, bf16=False, ld_alpha=0.5)
    args = MultiObjectiveDPOConfig(str(tmp_path), precompute_ref_log_probs=True, reference_store="store", **options)
    with pytest.raises(ValueError, match=r"reference_store is 'store' but ld_alpha is 0\.5.*leave one of them out"):
        MultiObjectiveDPOTrainer(build(), args=args, train_dataset=rows, processing_class=tokenizer())
    with pytest.raises(ValueError, match=r"ld_alpha is 0\.5.*plain sums; leave it out"):
        args = trl.DPOConfig(str(tmp_path), **options)
        with_reference_logps(rows, build(), args, processing_class=tokenizer(), reference_store=tmp_path / "store")


def test_rows_that_trl_leaves_out_are_left_out_and_lists_of_rows_stay_lists(tmp_path):
    trl = pytest.importorskip("trl")
    from mopl.integrations.trl import with_reference_logps

    rows = [{"prompt": "w1 w2 " * n, "chosen": " w2", "rejected": " w3"} for n in (1, 9, 2)]
    args = trl.DPOConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_length=12)
    store = {"processing_class": tokenizer(), "reference_store": tmp_path / "store"}
    found = with_reference_logps(rows, build(), args, **store)
    assert [row["prompt"] for row in found] == [rows[0]["prompt"], rows[2]["prompt"]]
    again = with_reference_logps(found[1:], build(), args, **store)
    assert again == found[1:] and again[0]["ref_chosen_logps"] != again[0]["ref_rejected_logps"]


def test_a_reference_of_rows_of_pairs_needs_nothing_but_their_texts(tmp_path):
    pytest.importorskip("trl")
    from mopl.integrations.trl import with_reference_logps

    rows = [{"prompt": "w1 w2", "chosen": " w2", "rejected": " w3"}]
    beside = {"preference": "A", "helpful": None, "objective_weights": [0.3, 0.7], "ref_chosen_logps": float("nan")}
    store = {"processing_class": tokenizer(), "reference_store": tmp_path / "store"}
    expected = with_reference_logps(rows, build(), **store)
    assert with_reference_logps([rows[0] | beside], build(), **store) == [rows[0] | beside | expected[0]]


def test_a_run_with_a_store_computes_its_reference_once():
    options = dict(method="weight-cos-dpo", steps=1, lists_per_batch=4)
    assert AlignConfig("m", "d", **options).resolved(20).reference == "self"
    assert AlignConfig("m", "d", reference_store="store", **options).resolved(20).reference == "precomputed"
    assert AlignConfig("m", "d", reference_store="store", reference="self", **options).resolved(20).reference == "self"


@pytest.mark.slow
def test_two_processes_of_a_run_fill_a_store_together(place, tmp_path):
    config = settings(place)
    options = ["--reference-store", str(tmp_path / "store"), "--reference", "precomputed"]
    for name in ("steps", "lists_per_batch", "points", "bootstrap", "samples", "device", "held_out", "max_length"):
        options += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    done = launch_mopl(
        "align", "--model", config.model, "--data", config.data, "--run", str(tmp_path / "run"), *options
    )
    assert done.returncode == 0, done.stderr
    model = loaded(place)
    for part in load_data(config).values():
        lists = tokenize(part, config.list_tokenizer(config.load_tokenizer()))
        found, expected = (
            ReferenceStore(folder).load(lists, model) for folder in (tmp_path / "store", place / "store")
        )
        torch.testing.assert_close(found, expected)


def test_the_page_of_the_store_runs_as_it_stands(place, tmp_path, monkeypatch, passes):
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    page = (Path(__file__).parents[2] / "docs" / "reference_store.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    os.symlink(place / "MODEL", "MODEL")
    shutil.copy(place / "lists.jsonl", tmp_path)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert len(names["by_list"]) == 20 and torch.equal(names["logps"], torch.cat(names["by_list"]))
    assert_right(names["logps"], names["model"], names["lists"])
    trainer, rows = names["trainer"], names["rows"]
    inputs = trainer.data_collator([trainer.train_dataset[0]])
    assert float(inputs["ref_chosen_logps"]) == pytest.approx(rows[0]["ref_chosen_logps"])
    assert passes.of(lambda: trainer.compute_loss(trainer.model, inputs)) == 1  # of the policy
    # The policy is its own reference still, so the loss of DPO is that of no preference.
    assert float(trainer.compute_loss(trainer.model, inputs)) == pytest.approx(np.log(2), abs=1e-5)
