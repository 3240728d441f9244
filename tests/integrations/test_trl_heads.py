"""`patch_trl`: TRL's trainers beside themselves, with gradients by `linear_logprob` and by TRL's own head."""

import copy
import inspect
import re
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

from launching import DISTRIBUTED, launch
from tiny_language_models import VOCABULARY, build, tokenizer

import mopl
from mopl._extras import version_of
from mopl.integrations import trl_heads
from mopl.language_models.head import UnsupportedModelError
from mopl.ops.head_statistics import NAMES

SEAM = version_of(trl.__version__) >= trl_heads.WITH_SEAM
# The head of 1.15 is a Triton kernel alone, which 1.16 has in plain PyTorch as well.
RUNS = version_of(trl.__version__) >= (1, 16) or torch.cuda.is_available()
with_seam = pytest.mark.skipif(
    not (SEAM and RUNS), reason=f"TRL {trl.__version__} has no fused head for this machine; pip install 'trl>=1.16'"
)
WORDS = [f"w{number}" for number in range(50)]


def words(first: int, count: int) -> str:
    return " ".join(WORDS[(first + 7 * step) % 50] for step in range(count))


PAIRS = [
    {"prompt": words(n, 3 + n) + " ", "chosen": words(11 * n + 1, 5 - n), "rejected": words(3 * n + 2, 2 + n)}
    for n in range(4)
]
UNPAIRED = [{"prompt": row["prompt"], "completion": row["chosen"], "label": n % 2 == 0} for n, row in enumerate(PAIRS)]
SEQUENCES = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
PROMPTS = [{"prompt": row["prompt"]} for row in PAIRS]


def rewarded(completions, **_):
    return [float(len(set(text.split()))) for text in completions]


def made(kind: str, folder, model=None, *, ref_model=None, peft_config=None, **options):
    rows, own = {
        "SFT": (SEQUENCES, {}), "DPO": (PAIRS, {"beta": 0.3}), "KTO": (UNPAIRED, {"beta": 0.3}),
        "GRPO": (PROMPTS, {"num_generations": 2, "max_completion_length": 6, "beta": 0.0}),
        "RLOO": (PROMPTS, {"num_generations": 2, "max_completion_length": 6, "beta": 0.0}),
    }[kind]  # fmt: skip
    defaults = dict(
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", per_device_train_batch_size=4,
        bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False, max_steps=2, logging_steps=1, seed=3,
        learning_rate=1e-2,
    )  # fmt: skip
    config = getattr(trl, f"{kind}Config")(str(folder), **{**defaults, **own, **options})
    references = {} if ref_model is None else {"ref_model": ref_model}
    rewards = {"reward_funcs": rewarded} if kind in ("GRPO", "RLOO") else {}
    trainer = getattr(trl, f"{kind}Trainer")(
        build() if model is None else model, args=config, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(), peft_config=peft_config, **references, **rewards,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1  # set by train()
    return trainer


def batch_of(trainer) -> dict[str, torch.Tensor]:
    return trainer.data_collator([trainer.train_dataset[number] for number in range(4)])


def rollouts(trainer) -> dict[str, torch.Tensor]:
    """Answers of unequal lengths, with left-padded prompts, and log-probabilities of another policy."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(6, VOCABULARY, (4, 11), generator=generator)
    prompt_mask, completion_mask = torch.ones(4, 5, dtype=torch.long), torch.ones(4, 6, dtype=torch.long)
    prompt_mask[1, :3] = prompt_mask[2, :1] = 0
    completion_mask[0, 4:] = completion_mask[3, 1:] = 0
    other = -4 + 0.1 * torch.randn(2, 4, 6, generator=generator)
    with torch.no_grad():
        own = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, torch.cat([prompt_mask, completion_mask], 1), 6
        )[0]
    old = own + 0.3 * torch.randn(4, 6, generator=generator)
    return {
        "prompt_ids": ids[:, :5], "prompt_mask": prompt_mask, "completion_ids": ids[:, 5:],
        "completion_mask": completion_mask, "advantages": torch.tensor([0.9, -0.4, 0.3, -1.1]),
        "old_per_token_logps": old, "ref_per_token_logps": other[0], "num_items_in_batch": torch.tensor(17.0),
        "old_logps": (old * completion_mask).sum(-1),
    }  # fmt: skip


def step(trainer, inputs, **options):
    """The loss, the gradients and the metrics of one batch."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    loss = trainer.compute_loss(trainer.model, dict(inputs), **options)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items() if values}
    return loss.detach(), gradients, metrics


def assert_equal_steps(trainer, inputs, tolerance: float = 1e-5, **options) -> None:
    """A step of the trainer as it is, patched, and as it is again."""
    expected = step(trainer, inputs, **options)
    assert mopl.patch_trl(trainer) is trainer
    calls = [count_calls(head) for head in trainer._mopl_trl_heads]
    found = step(trainer, inputs, **options)
    mopl.unpatch_trl(trainer)
    assert calls[0]
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    assert found[1].keys() == expected[1].keys() and found[1]
    largest = max(float(value.abs().max()) for value in expected[1].values())
    assert largest > 1e-4
    for name, value in found[1].items():
        assert float((value - expected[1][name]).abs().max()) <= tolerance * max(1.0, largest), name
    assert found[2].keys() == expected[2].keys()
    for name, value in found[2].items():
        assert value == pytest.approx(expected[2][name], rel=1e-4, abs=1e-5, nan_ok=True), name
    again = step(trainer, inputs, **options)
    assert torch.equal(again[0], expected[0])


def count_calls(head) -> list[int]:
    calls, scored = [], head.fused.score
    head.fused.score = lambda *args, **kwargs: calls.append(1) or scored(*args, **kwargs)
    return calls


def loss_types(trainer) -> list[str]:
    """The loss types that the installed trainer knows, from its source."""
    source = inspect.getsource(type(trainer)._compute_loss)
    found = re.findall(r'loss_type == "(\w+)"', source)
    for several in re.findall(r"loss_type in \[([^\]]*)\]", source):
        found += re.findall(r'"(\w+)"', several)
    assert len(set(found)) >= 2
    return sorted(set(found))


# ---------------------------------------------------------------- every loss


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    return made("GRPO", tmp_path_factory.mktemp("grpo"), temperature=0.7)


@pytest.fixture(scope="module")
def dpo(tmp_path_factory):
    reference = build(initializer_range=0.25)
    return made("DPO", tmp_path_factory.mktemp("dpo"), ref_model=reference)


def test_grpo_has_the_losses_gradients_and_metrics_of_trl(grpo, monkeypatch) -> None:
    """For every loss type, GSPO among them (importance sampling of sequences), and an entropy bonus."""
    inputs = rollouts(grpo)
    monkeypatch.setattr(grpo, "beta", 0.1)
    for loss_type in loss_types(grpo):
        for level in ("token", "sequence"):
            monkeypatch.setattr(grpo, "loss_type", loss_type)
            monkeypatch.setattr(grpo, "importance_sampling_level", level)
            # Rounding of the model's own float32 passes, by kernels for other sizes: up to 4e-5 on an AMD EPYC.
            assert_equal_steps(grpo, inputs, tolerance=1e-4)


@with_seam
def test_an_entropy_bonus_has_its_gradient(grpo, monkeypatch) -> None:
    inputs = rollouts(grpo)
    plain = step(grpo, inputs)[1]
    monkeypatch.setattr(grpo, "entropy_coef", 0.5)
    monkeypatch.setattr(grpo, "_entropy_bonus_enabled", True)
    assert_equal_steps(grpo, inputs)
    assert any(float((value - plain[name]).abs().max()) > 1e-3 for name, value in step(grpo, inputs)[1].items())


def test_rloo_has_the_loss_gradients_and_metrics_of_trl(tmp_path) -> None:
    trainer = made("RLOO", tmp_path, temperature=1.3)
    assert_equal_steps(trainer, rollouts(trainer))


@with_seam
def test_dpo_has_the_losses_gradients_and_metrics_of_trl(dpo, monkeypatch) -> None:
    """For every loss type, divergence and weighting."""
    inputs = batch_of(dpo)
    monkeypatch.setattr(dpo, "label_smoothing", 0.1)
    for loss_type in loss_types(dpo):
        monkeypatch.setattr(dpo, "loss_types", [loss_type])
        assert_equal_steps(dpo, inputs)
    monkeypatch.setattr(dpo, "loss_types", ["sigmoid"])
    for divergence in ("forward_kl", "js_divergence", "alpha_divergence"):
        monkeypatch.setattr(dpo, "f_divergence_type", divergence)
        assert_equal_steps(dpo, inputs)
    monkeypatch.setattr(dpo, "ld_alpha", 0.3)
    assert_equal_steps(dpo, inputs)


@with_seam
def test_wpo_has_its_weights(tmp_path) -> None:
    """They are made of log Σ p²."""
    trainer = made("DPO", tmp_path, ref_model=build(initializer_range=0.25), use_weighting=True)
    assert_equal_steps(trainer, batch_of(trainer))


@with_seam
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_sft_has_the_losses_gradients_and_metrics_of_trl(loss_type, tmp_path) -> None:
    trainer = made("SFT", tmp_path, loss_type=loss_type)
    assert_equal_steps(trainer, batch_of(trainer))
    assert_equal_steps(trainer, batch_of(trainer), num_items_in_batch=torch.tensor(40))


@with_seam
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_has_the_losses_gradients_and_metrics_of_trl(loss_type, tmp_path) -> None:
    trainer = made("KTO", tmp_path, ref_model=build(initializer_range=0.25), loss_type=loss_type)
    assert_equal_steps(trainer, batch_of(trainer))


# ---------------------------------------------------------------- every field


def with_heads(model, outputs=NAMES, **settings):
    """A stand-in of a trainer: a model with TRL's fused head."""
    trl.trainer.utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", *outputs), **settings)
    accelerator = SimpleNamespace(unwrap_model=lambda wrapped: wrapped)
    return SimpleNamespace(model=model, accelerator=accelerator, args=SimpleNamespace())


def tiny(family: str, **options):
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


MODELS = {
    "llama": lambda: build(tie_word_embeddings=True),
    "gemma2-softcap": lambda: build("gemma2"),
    "phi-bias": lambda: build("phi"),
    "granite-scaled": lambda: tiny("Granite", logits_scaling=6.0),
    "cohere-scaled": lambda: tiny("Cohere", logit_scale=0.25),
    "mixtral-routed": lambda: tiny("Mixtral", num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.3),
}


def called(model, upstream=None, labels=None, **options):
    """All fields of a call, and the gradients of a random combination of those that pass some."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(6, VOCABULARY, (3, 9), generator=generator)
    attention_mask = torch.ones_like(ids)
    attention_mask[1, 6:] = 0
    if labels is None:
        labels = ids.masked_fill(attention_mask == 0, -100)
        labels[0, :4] = -100
        labels[2, 3] = -100
    options.setdefault("labels", labels)
    model.zero_grad()
    output = model(input_ids=ids, attention_mask=attention_mask, fused_lm_head=True, **options)
    total = output.loss + sum(
        (value * torch.randn(value.shape, generator=generator)).sum() for value in (output.log_probs, output.entropy)
    )
    total.backward()
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_calls(trainer, tolerance=1e-5, **options) -> None:
    expected, gradients = called(trainer.model, **options)
    mopl.patch_trl(trainer)
    found, of_found = called(trainer.model, **options)
    mopl.unpatch_trl(trainer)
    assert type(found) is type(expected) and list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].requires_grad == value.requires_grad, name
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)
    assert of_found.keys() == gradients.keys()
    largest = max(float(value.abs().max()) for value in gradients.values())
    for name, value in gradients.items():
        assert float((of_found[name] - value).abs().max()) <= tolerance * max(1.0, largest), name


@with_seam
@pytest.mark.parametrize("family", MODELS)
def test_every_field_and_gradient_is_that_of_trl(family) -> None:
    assert_equal_calls(with_heads(MODELS[family](), temperature=0.7))


@with_seam
def test_shifted_labels_and_the_number_of_items_are_obeyed() -> None:
    trainer = with_heads(build(), temperature=1.5)
    shifted = torch.randint(6, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(2))
    shifted[:, ::4] = -100
    assert_equal_calls(trainer, labels=None, shift_labels=shifted, num_items_in_batch=torch.tensor(31))


@with_seam
def test_a_batch_without_labels_has_a_loss_of_zero_with_gradients_of_zero() -> None:
    trainer = with_heads(build())
    nothing = torch.full((3, 9), -100)
    assert_equal_calls(trainer, labels=nothing)
    mopl.patch_trl(trainer)
    output, gradients = called(trainer.model, labels=nothing)
    assert float(output.loss.detach()) == 0 and len(gradients) > 10
    assert all(float(value.abs().max()) == 0 for value in gradients.values())


@with_seam
@pytest.mark.parametrize("cast", [False, True])
def test_of_16_bit_hidden_states_log_probabilities_are_right_to_float32(cast) -> None:
    """Under autocast, with the head in bf16 and in float32; TRL rounds logits to bf16 where the head is."""
    model = build().bfloat16()
    if cast:
        model.lm_head.float().weight.data.mul_(1.001)  # which bf16 cannot hold
    trainer = with_heads(model, cast_lm_head_to_fp32=cast)
    hidden = []
    handle = model.lm_head.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0].detach()))
    errors = []
    for patch in (lambda trainer: None, mopl.patch_trl):
        patch(trainer)
        with torch.autocast("cpu", torch.bfloat16):
            output, gradients = called(trainer.model)
        assert output.log_probs.dtype == torch.float32 and all(bool(g.isfinite().all()) for g in gradients.values())
        errors.append(output.log_probs.detach())
    handle.remove()
    logits = hidden[-1].double() @ model.lm_head.weight.detach().double().T
    ids = torch.randint(6, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(7))
    exact = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    theirs, ours = ((found - exact)[output.label_mask].abs().max() for found in errors)
    assert float(ours) < 1e-5 and (cast or float(theirs) > 1e-3)


@with_seam
def test_all_other_calls_are_those_of_trl() -> None:
    trainer = with_heads(build())
    ids = torch.arange(6, 14)[None]
    forward = trainer.model.forward
    expected = trainer.model(input_ids=ids, labels=ids)
    mopl.patch_trl(trainer)
    found = trainer.model(input_ids=ids, labels=ids)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    assert inspect.signature(trainer.model.forward) == inspect.signature(forward)
    options = dict(max_new_tokens=3, do_sample=False)
    answer = trainer.model.generate(ids, **options)
    mopl.unpatch_trl(trainer)
    assert trainer.model.forward is forward
    assert torch.equal(answer, trainer.model.generate(ids, **options))


# ---------------------------------------------------------------- wrappers and trainings


def adapter(**options):
    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


KINDS = {
    "adapter": lambda: (build(), adapter()),
    "whole-head": lambda: (build(), adapter(modules_to_save=["lm_head"])),
    "virtual-tokens": lambda: (build(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prefix": lambda: (build(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
}


@with_seam
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_have_the_steps_of_trl(kind, tmp_path) -> None:
    model, config = KINDS[kind]()
    trainer = made("DPO", tmp_path, model, peft_config=config)
    torch.manual_seed(4)
    with torch.no_grad():  # away from the start, where a policy is its reference
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    assert_equal_steps(trainer, batch_of(trainer))


@pytest.mark.parametrize("kind", ["GRPO", pytest.param("DPO", marks=with_seam)])
def test_a_training_with_adapters_and_gradient_checkpointing_ends_at_the_same_weights(kind, tmp_path) -> None:
    ends = []
    for patch in (lambda trainer: trainer, mopl.patch_trl):
        torch.manual_seed(11)
        options = {"beta": 0.1, "temperature": 0.8} if kind == "GRPO" else {}
        trainer = patch(made(kind, tmp_path, peft_config=adapter(), gradient_checkpointing=True, **options))
        begun = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        calls = [count_calls(head) for head in getattr(trainer, "_mopl_trl_heads", [])]
        trainer.train()
        assert all(calls)
        ends.append({n: p.detach() for n, p in trainer.model.named_parameters()})
    assert any(float((value - begun[name]).abs().max()) > 1e-3 for name, value in ends[0].items())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=2e-5, msg=name)


@with_seam
def test_a_training_in_mixed_precision_is_patched_and_unpatched(tmp_path) -> None:
    """accelerate wraps the forward in autocast when training starts: it is then around what is patched."""
    trainer = made("SFT", tmp_path, bf16=True, max_steps=1)
    forward = trainer.model.forward
    mopl.patch_trl(trainer)
    head = trainer._mopl_trl_heads[0]
    calls = count_calls(head)
    trainer.train()
    assert len(calls) == 1 and trainer.model.forward is not head.bound
    inputs = batch_of(trainer)
    mopl.unpatch_trl(trainer)
    expected = step(trainer, inputs)
    assert len(calls) == 1 and head.found == forward
    mopl.patch_trl(trainer)  # around accelerate's wrapper now
    found = step(trainer, inputs)
    assert abs(float(found[0] - expected[0])) < 1e-2 and expected[2].keys() == found[2].keys()
    wrapped = trainer._mopl_trl_heads[0].found
    mopl.unpatch_trl(trainer)
    assert trainer.model.forward == wrapped


@with_seam
@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_have_the_gradients_of_trl_in_ddp_and_fsdp2(tmp_path) -> None:
    done = launch(2, str(DISTRIBUTED / "trl_heads.py"), str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all equal") >= 1


# ---------------------------------------------------------------- undone, and refused


@with_seam
def test_unpatching_gives_back_the_very_forwards(dpo) -> None:
    forwards = dpo.model.forward, dpo.ref_model.forward
    mopl.patch_trl(dpo)
    heads = dpo._mopl_trl_heads
    assert mopl.patch_trl(dpo)._mopl_trl_heads is heads and len(heads) == 2
    assert trl_heads.is_patched(dpo)
    mopl.unpatch_trl(dpo)
    assert not trl_heads.is_patched(dpo) and mopl.unpatch_trl(dpo) is dpo
    assert (dpo.model.forward, dpo.ref_model.forward) == forwards
    assert dpo.model.__dict__["forward"] is forwards[0]


@with_seam
def test_a_copy_of_a_patched_model_is_refused() -> None:
    trainer = mopl.patch_trl(with_heads(build()))
    ids = torch.arange(6, 14)[None]
    with pytest.raises(RuntimeError, match="before copying"):
        copy.deepcopy(trainer.model)(input_ids=ids, labels=ids, fused_lm_head=True)


@with_seam
def test_an_error_leaves_the_trainer_as_it_was(tmp_path) -> None:
    trainer = made("DPO", tmp_path, ref_model=build(initializer_range=0.25))
    forward = trainer.model.forward
    quantised = torch.zeros_like(trainer.ref_model.lm_head.weight, dtype=torch.int8)
    trainer.ref_model.lm_head.weight = torch.nn.Parameter(quantised, requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="quantised"):
        mopl.patch_trl(trainer)
    assert trainer.model.forward is forward and not trl_heads.is_patched(trainer)


@with_seam
def test_an_adapter_on_the_head_is_refused() -> None:
    trainer = with_heads(build())
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    trainer.model = peft.get_peft_model(trainer.model, config)
    with pytest.raises(UnsupportedModelError, match="target_modules"):
        mopl.patch_trl(trainer)


def test_trainers_without_log_probabilities_are_refused(tmp_path) -> None:
    with pytest.raises(TypeError, match="must be a trainer"):
        mopl.patch_trl(build())
    config = transformers.LlamaConfig(**{**build().config.to_dict(), "num_labels": 1})
    model = transformers.LlamaForSequenceClassification(config)
    arguments = trl.RewardConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    rewarded = trl.RewardTrainer(
        model, args=arguments, train_dataset=datasets.Dataset.from_list(PAIRS), processing_class=tokenizer()
    )
    with pytest.raises(TypeError, match="sequence classifier"):
        mopl.patch_trl(rewarded)
    arguments = transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises((TypeError, RuntimeError), match=r"add_fused_lm_head|outputs\.logits"):
        mopl.patch_trl(transformers.Trainer(build(), arguments))


@with_seam
def test_losses_that_read_logits_are_refused(grpo, monkeypatch) -> None:
    class Distilled(trl.SFTTrainer):
        __module__ = "trl.experimental.gkd.gkd_trainer"

        def compute_loss(self, *args, **kwargs):
            raise AssertionError

    trainer = with_heads(build())
    stand_in = object.__new__(Distilled)
    stand_in.__dict__.update(trainer.__dict__)
    with pytest.raises(TypeError, match="own loss reads the logits"):
        mopl.patch_trl(stand_in)
    monkeypatch.setattr(grpo.args, "torch_compile", True)
    with pytest.raises(RuntimeError, match="torch_compile"):
        mopl.patch_trl(grpo)


@with_seam
def test_a_release_that_is_not_known_is_refused(monkeypatch) -> None:
    """One whose head is made in another way, and one whose head gives more."""
    trainer = with_heads(build())
    monkeypatch.setattr(trl_heads, "SETTINGS", (*trl_heads.SETTINGS, "top_k"))
    with pytest.raises(RuntimeError, match=r"top_k.*1\.16"):
        mopl.patch_trl(trainer)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="median"):
        mopl.patch_trl(with_heads(build(), outputs=("median",)))
    plain = SimpleNamespace(model=build(), accelerator=trainer.accelerator, args=SimpleNamespace())
    with pytest.raises(TypeError, match="add_fused_lm_head"):
        mopl.patch_trl(plain)


@pytest.mark.skipif(SEAM, reason="the installed TRL has a fused head")
@pytest.mark.parametrize("kind", ["DPO", "SFT", "KTO"])
def test_releases_without_a_fused_head_are_named_in_the_error(kind, tmp_path) -> None:
    options = {} if kind == "SFT" else {"ref_model": build()}
    trainer = made(kind, tmp_path, **options)
    with pytest.raises(RuntimeError, match=r"outputs\.logits.*trl>=1\.15"):
        mopl.patch_trl(trainer)
