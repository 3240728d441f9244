"""`patch_trl`: TRL's trainers beside themselves, their losses and gradients by `linear_logprob` and by TRL's own head."""

import inspect
import re

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

from packaging.version import Version
from tiny_language_models import VOCABULARY, build, lora, tokenizer

import mopl
from mopl.integrations import trl_heads
from mopl.language_models.head import UnsupportedModelError

SEAM = Version(trl.__version__) >= trl_heads.WITH_SEAM
with_seam = pytest.mark.skipif(not SEAM, reason=f"TRL {trl.__version__} has no fused head; pip install 'trl>=1.15'")
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
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", per_device_train_batch_size=4, bf16=False,
        gradient_checkpointing=False, dataloader_pin_memory=False, max_steps=2, logging_steps=1, seed=3,
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
            assert_equal_steps(grpo, inputs)


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
