"""The reference of a policy with adapters is what it was when its training began, as in TRL, for all adapters."""

import copy
import json

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

from tiny_language_models import VOCABULARY, build, tokenizer

from mopl.conditioning import HyperPrompt, HyperPromptModel, TextPrompt, TextPromptModel
from mopl.integrations.transformers import MultiObjectiveConfig, MultiObjectiveTrainer
from mopl.language_models.adapter_reference import FILE, OwnReference, checksum, starts_at_base
from mopl.language_models.tokenization import ReadReport, TokenizedData, TokenizedList

EMPTY = ("lora", "rank-stabilised", "biases", "embeddings", "whole head")  # do nothing before they are trained
OBJECTIVES = ("helpful", "harmless")
TARGETS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
KINDS = {
    "lora": lambda: peft.LoraConfig(r=2, **TARGETS),
    "rank-stabilised": lambda: peft.LoraConfig(r=2, use_rslora=True, **TARGETS),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, **TARGETS),
    "pissa": lambda: peft.LoraConfig(r=2, init_lora_weights="pissa", **TARGETS),
    "biases": lambda: peft.LoraConfig(r=2, lora_bias=True, **TARGETS),
    "embeddings": lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
    "whole head": lambda: peft.LoraConfig(r=2, modules_to_save=["lm_head"], **TARGETS),
    "tokens": lambda: peft.LoraConfig(r=2, trainable_token_indices=[3, 4], **TARGETS),
    "loha": lambda: peft.LoHaConfig(r=2, **TARGETS),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
                                  task_type="CAUSAL_LM"),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}  # fmt: skip


def pairs(count: int = 8, objectives: int = 1) -> TokenizedData:
    draw = np.random.default_rng(3)
    lists = []
    for number in range(count):
        labels = np.eye(2, dtype=np.float32)[draw.integers(0, 2, objectives)]
        responses = tuple(draw.integers(6, VOCABULARY, draw.integers(2, 6)) for _ in range(2))
        lists.append(TokenizedList(draw.integers(6, VOCABULARY, draw.integers(2, 5)), responses, labels, number))
    return TokenizedData(tuple(lists), OBJECTIVES[:objectives], "random", ReadReport("random"))


def make(folder, model, *, data=None, args=None, **own):
    options = dict(
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", per_device_train_batch_size=4,
        learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", max_grad_norm=1e6, max_steps=2, beta=0.5,
        dataloader_pin_memory=False,
    )  # fmt: skip
    options.update(args or {})
    arguments = MultiObjectiveConfig(str(folder), **options)
    return MultiObjectiveTrainer(model, arguments, train_dataset=pairs() if data is None else data, **own)


def inputs_of(trainer, numbers):
    return trainer.data_collator([trainer.train_dataset[number] for number in numbers])


def trainable(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def adapted(kind: str = "lora", *, trained: bool = True, seed: int = 2, **options):
    torch.manual_seed(seed)
    model = peft.get_peft_model(build(), KINDS[kind]())
    if trained:
        disturb(model, seed)
    return model


@torch.no_grad()
def disturb(model, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(0.3 * torch.randn(p.shape, generator=generator))


def scores_and_reference(trainer):
    with torch.no_grad():
        _, outputs = trainer.compute_loss(trainer.model.eval(), inputs_of(trainer, range(8)), return_outputs=True)
    return outputs["scores"], outputs["reference"]


def first_loss(trainer) -> float:
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model.eval(), inputs_of(trainer, range(8))))


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_at_log_2_and_the_reference_stays_where_it_started(tmp_path, kind, trained):
    model = adapted(kind, trained=trained)
    trainer = make(tmp_path, model)
    assert trainer.ref_model is None
    assert starts_at_base(model) == (
        not trained and kind in ("lora", "rank-stabilised", "biases", "embeddings", "whole head")
    )
    start, reference = scores_and_reference(trainer)
    torch.testing.assert_close(reference, start, rtol=1e-6, atol=1e-5)
    assert abs(first_loss(trainer) - torch.log(torch.tensor(2.0))) < 1e-5
    names, active = [name for name, _ in model.named_parameters()], model.active_adapter
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    trainer.train()
    after, later = scores_and_reference(trainer)
    assert torch.equal(later, reference) and not torch.allclose(after, start, atol=1e-3)
    assert [name for name, _ in model.named_parameters()] == names and model.active_adapter == active
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_the_start_of_a_mixed_batch_is_reached_again_after_an_error(tmp_path):
    model = adapted()
    trainer = make(tmp_path, model)
    start = trainable(model)
    disturb(model)
    now = trainable(model)
    with pytest.raises(RuntimeError, match="stop"), trainer.own.active(model):
        assert all(torch.equal(value, start[name]) for name, value in trainable(model).items())
        raise RuntimeError("stop")
    assert all(torch.equal(value, now[name]) for name, value in trainable(model).items())


def test_what_is_trained_later_than_the_reference_was_taken_is_refused(tmp_path):
    model = adapted()
    trainer = make(tmp_path, model)
    model.get_input_embeddings().requires_grad_(True)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is trained, which was not so when the reference"):
        first_loss(trainer)


def test_biases_of_the_base_model_that_are_trained_are_part_of_the_start(tmp_path):
    """PEFT trains them outside of the adapter, so turning adapters off would leave them as they are by now."""
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], bias="lora_only", fan_in_fan_out=True)
    model = peft.get_peft_model(build("gpt2"), config)
    trainer = make(tmp_path, model)
    start = scores_and_reference(trainer)[0]
    disturb(model)
    after, reference = scores_and_reference(trainer)
    assert torch.equal(reference, start) and not torch.allclose(after, start, atol=1e-3)


@torch.no_grad()
def test_biases_that_an_adapter_of_the_trainer_trains_are_part_of_the_start():
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], bias="all", fan_in_fan_out=True)
    model, ids = peft.get_peft_model(build("gpt2"), config).eval(), torch.arange(3, 12)[None]
    start, own = model(ids).logits, OwnReference(model, added=True)
    disturb(model)
    with own.active(model):
        assert torch.equal(model(ids).logits, start)


def test_a_frozen_adapter_below_a_new_one_stays_in_the_reference(tmp_path):
    model = adapted()
    model.add_adapter("new", peft.LoraConfig(r=2, **TARGETS))
    model.base_model.set_adapter(["default", "new"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("new" in name.split("."))
    trainer = make(tmp_path, model)
    assert abs(first_loss(trainer) - torch.log(torch.tensor(2.0))) < 1e-6
    start = scores_and_reference(trainer)[0]
    trainer.train()
    after, reference = scores_and_reference(trainer)
    assert torch.equal(reference, start) and not torch.allclose(after, start, atol=1e-4)
    assert model.base_model.active_adapters == ["default", "new"]
    assert all(("new" in name.split(".")) == p.requires_grad for name, p in model.named_parameters())
    with model.disable_adapter():
        assert not torch.allclose(scores_and_reference(trainer)[0], start, atol=1e-3)  # the base is another model


def test_several_active_adapters_are_active_again_after_a_reference_of_another_one(tmp_path):
    model = adapted()
    for name in ("new", "sft"):
        model.add_adapter(name, peft.LoraConfig(r=2, init_lora_weights=name == "new", **TARGETS))
    model.base_model.set_adapter(["default", "new"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("new" in name.split("."))
    trainer = make(tmp_path, model, reference_adapter="sft")
    own, reference = scores_and_reference(trainer)
    assert not torch.allclose(own, reference, atol=1e-3)
    assert model.base_model.active_adapters == ["default", "new"]
    assert all(("new" in name.split(".")) == p.requires_grad for name, p in model.named_parameters())
    assert torch.equal(scores_and_reference(trainer)[0], own)


@pytest.mark.parametrize("kind", ["lora", "dora", "prompt"])
def test_another_adapter_is_the_reference_and_is_neither_trained_nor_saved(tmp_path, kind):
    model = adapted(kind)
    model.add_adapter("sft", KINDS[kind]())
    model.set_adapter("sft")
    disturb(model, 7)
    with torch.no_grad():
        expected = scores_and_reference(make(tmp_path, model, args={"reference_free": True}))[0]
    model.set_adapter("default")
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if "sft" in name.split(".")}
    args = {"save_strategy": "steps", "save_steps": 1}
    trainer = make(tmp_path / "out", model, args=args, reference_adapter="sft")
    own, reference = scores_and_reference(trainer)
    torch.testing.assert_close(reference, expected)
    assert not torch.allclose(own, reference, atol=1e-3)
    trainer.train()
    assert torch.equal(scores_and_reference(trainer)[1], reference)
    assert model.active_adapter == "default"
    there = dict(model.named_parameters())
    assert all(torch.equal(there[name], value) and not there[name].requires_grad for name, value in frozen.items())
    checkpoint = tmp_path / "out" / "checkpoint-1"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "sft").exists()
    again = adapted(kind)
    again.add_adapter("sft", KINDS[kind]())
    again.set_adapter("sft")
    disturb(again, 7)
    again.set_adapter("default")
    resumed = make(tmp_path / "again", again, args=args, reference_adapter="sft")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(value, trainable(model)[name]) for name, value in trainable(again).items())
    with pytest.raises(ValueError, match="of a training whose reference was another"):
        make(tmp_path / "third", adapted(kind)).train(resume_from_checkpoint=str(checkpoint))


def test_what_cannot_be_the_reference_says_so(tmp_path):
    model = adapted()
    model.add_adapter("sft", KINDS["lora"]())
    with pytest.raises(ValueError, match="'other' but the model has the adapters 'default', 'sft'; name one of them"):
        make(tmp_path, model, reference_adapter="other")
    with pytest.raises(ValueError, match="'default', which is active and would be trained"):
        make(tmp_path, model, reference_adapter="default")
    with pytest.raises(ValueError, match="ref_model was passed, so there is another reference"):
        make(tmp_path, model, reference_adapter="sft", ref_model=build())
    with pytest.raises(ValueError, match="reference_free is set"):
        make(tmp_path, model, reference_adapter="sft", args={"reference_free": True})
    with pytest.raises(ValueError, match="a plain LlamaForCausalLM has no adapters"):
        make(tmp_path, build(), reference_adapter="sft")
    base = build()
    with pytest.raises(ValueError, match="ref_model holds parameters of the model that are trained"):
        make(tmp_path, peft.get_peft_model(base, KINDS["lora"]()), ref_model=base)


def test_a_passed_reference_is_obeyed_beside_trained_adapters(tmp_path):
    trainer = make(tmp_path, adapted(), ref_model=build())
    plain = make(tmp_path, build(), args={"reference_free": True})
    torch.testing.assert_close(scores_and_reference(trainer)[1], scores_and_reference(plain)[0])


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("kind", ["lora", "whole head", "plain"])
def test_a_resumed_training_has_the_reference_of_the_first_one(tmp_path, kind, precompute):
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "precompute_ref_log_probs": precompute}

    def start():
        return build() if kind == "plain" else adapted(kind)

    whole = make(tmp_path / "whole", start(), args=args)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed = make(tmp_path / "resumed", start(), args=args)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    expected, found = trainable(whole.model), trainable(resumed.model)
    assert expected and all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(scores_and_reference(resumed)[1], scores_and_reference(whole)[1])
    # The model as the checkpoint has it: its reference would be the half-trained one.
    if kind == "plain":
        late = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    else:
        late = peft.PeftModel.from_pretrained(build(), checkpoint, is_trainable=True)
    trainer = make(tmp_path / "late", late, args=args)
    with pytest.raises(ValueError, match="pass the model as it was then, not as the checkpoint has it"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / FILE).unlink()  # as older versions left it
    make(tmp_path / "old", start(), args=args).train(resume_from_checkpoint=str(checkpoint))


def test_adapters_put_on_by_the_trainer_resume_with_the_base_as_reference(tmp_path):
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make(tmp_path / "whole", build(), args=args, peft_config=KINDS["lora"]())
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert json.loads((checkpoint / FILE).read_text()) == {"reference": "base"}
    resumed = make(tmp_path / "resumed", build(), args=args, peft_config=KINDS["lora"]())
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(value, trainable(whole.model)[name]) for name, value in trainable(resumed.model).items())


def test_a_prompt_around_trained_adapters_has_them_in_its_reference_without_the_prompt(tmp_path):
    model = HyperPromptModel(adapted(), HyperPrompt(2, 4, 2, 32))
    disturb(model.hyper_prompt)
    alone = make(tmp_path, adapted(), data=pairs(objectives=2), args={"reference_free": True})
    expected = scores_and_reference(alone)[0]
    trainer = make(tmp_path, model, data=pairs(objectives=2))
    torch.testing.assert_close(scores_and_reference(trainer)[1], expected)
    trainer.train()
    torch.testing.assert_close(scores_and_reference(trainer)[1], expected)
    assert model.record.reference == "the adapters as training began"
    fresh = HyperPromptModel(adapted(trained=False), HyperPrompt(2, 4, 2, 32))
    assert make(tmp_path, fresh, data=pairs(objectives=2)).own.kind == "base"
    assert fresh.record.reference == "self"
    passed = HyperPromptModel(adapted(trained=False), HyperPrompt(2, 4, 2, 32))
    make(tmp_path, passed, data=pairs(objectives=2), ref_model=build())
    assert passed.record.reference == "the LlamaForCausalLM that was passed as ref_model"


def test_a_base_that_is_trained_under_a_prompt_is_part_of_the_start(tmp_path):
    model = HyperPromptModel(build(), HyperPrompt(2, 4, 2, 32))
    model.causal_lm.get_input_embeddings().requires_grad_(True)
    own = OwnReference(model)
    assert own.kind == "start"


def test_checksums_tell_a_change_of_one_bit():
    tensors = {"a": torch.randn(5, 3).to(torch.bfloat16), "b": torch.arange(4), "c": torch.tensor([True, False])}
    before = checksum(tensors.items())
    assert before == checksum(reversed(list(copy.deepcopy(tensors).items())))
    tensors["a"].view(torch.int16)[2, 1] ^= 1
    assert checksum(tensors.items()) != before


def test_words_around_a_model_that_is_trained_itself_have_the_reference_that_was_kept() -> None:
    model, ids = TextPromptModel(build(), TextPrompt(OBJECTIVES), tokenizer()), torch.tensor([[1, 7, 8, 9]])
    own = OwnReference(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
        with own.active(model):
            assert torch.equal(model(ids, weights=[0.3, 0.7]).logits, build()(ids).logits)
    with pytest.raises(ValueError, match="keep a copy"), model.reference():
        pass
