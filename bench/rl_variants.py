"""What `bench.rl_step` measures: a step of GRPO and of DPO, and the head alone, each as several programs do it.

DPO is a case of bench/training_step.py: pairs, reference log-probabilities computed before. GRPO is a step on rollouts
that are there: left-padded prompts, completions of unequal lengths, advantages, log-probabilities of the policy that
sampled and of the reference (PPO's clip, k3 times the ratio
with beta 0.04, the mean over each completion's tokens, no generation).

* TRL: the trainer's own `training_step`. GRPO computes an entropy for its log in every step.
* TRL with `mopl.patch_trl`: the same trainer, with log-probabilities and entropies of `linear_logprob`.
* Liger: its fused linear GRPO or DPO loss around the model's body, the least around it, no log.
* full logits: the loss in plain PyTorch from logits that are held whole, with the entropy for the log in GRPO, as TRL
  computed it before it had a fused head.

The head alone is log-probabilities and entropies of N tokens from hidden states, forward and backward, with gradients
of both for hidden states and head. TRL's function is `ChunkedLogProbFunction`, verl's `FusedLinearForPPO`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import training_step
from bench.measuring import DEVICE
from bench.training_step import MODELS, Problem, Variant, optimizer_of, selected_logprobs, trainer_arguments

TRL, PATCHED, LIGER, FULL = "TRL", "TRL, mopl.patch_trl", "Liger", "full logits"
EPSILON, KL = 0.2, 0.04  # TRL's clip, and a KL weight that trainers use


@dataclass(frozen=True)
class Size:
    """How large the cases are.

    Args:
        model: of `bench.training_step.MODELS`; random weights, tied head.
        dtype: of the model; bfloat16 is trained under autocast.
        prompts: in a step.
        completions: of each prompt in GRPO; DPO has two responses.
        prompt: most tokens of a prompt, at least half of which each has.
        completion: likewise of a completion.
        tokens: rows of the head alone.
    """

    model: str = "smollm2-135m"
    dtype: torch.dtype = torch.float32
    prompts: int = 2
    completions: int = 4
    prompt: int = 32
    completion: int = 48
    tokens: int = 512

    @property
    def pairs(self) -> Problem:
        """The case of DPO, of as many sequences as GRPO has."""
        lists = self.prompts * self.completions // 2
        return Problem(self.model, lists, 2, self.prompt, self.completion, dtype=self.dtype)

    @property
    def rollouts(self) -> Problem:
        """The texts and the model of GRPO."""
        return Problem(self.model, self.prompts, self.completions, self.prompt, self.completion, dtype=self.dtype)


def rollouts(size: Size) -> dict[str, Tensor]:
    """Return a batch as TRL's GRPOTrainer makes it from what was generated."""
    texts = size.rollouts.tokens()
    draw = torch.Generator().manual_seed(3)
    rows = size.prompts * size.completions
    batch = {
        "prompt_ids": torch.zeros(rows, size.prompt, dtype=torch.long),
        "prompt_mask": torch.zeros(rows, size.prompt, dtype=torch.long),
        "completion_ids": torch.zeros(rows, size.completion, dtype=torch.long),
        "completion_mask": torch.zeros(rows, size.completion, dtype=torch.long),
    }
    pairs = [(prompt, answer) for prompt, answers in texts for answer in answers]
    for row, (prompt, answer) in enumerate(pairs):
        batch["prompt_ids"][row, size.prompt - len(prompt) :] = torch.from_numpy(prompt)
        batch["prompt_mask"][row, size.prompt - len(prompt) :] = 1
        batch["completion_ids"][row, : len(answer)] = torch.from_numpy(answer)
        batch["completion_mask"][row, : len(answer)] = 1
    # Near the model's own, so that ratios are neither 0 nor infinite and some are clipped.
    likely = -float(torch.tensor(MODELS[size.model]["vocab_size"]).log()) - 0.1
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        batch[name] = likely + 0.3 * torch.randn(rows, size.completion, generator=draw)
    batch["advantages"] = torch.randn(rows, generator=draw)
    batch["num_items_in_batch"] = batch["completion_mask"].sum().float()
    return {name: value.to(DEVICE) for name, value in batch.items()}


# ---------------------------------------------------------------- GRPO


def grpo_trl(size: Size, patched: bool = False) -> Variant:
    """TRL's GRPOTrainer on rollouts."""
    import datasets
    import trl

    datasets.disable_progress_bars()
    rows = size.prompts * size.completions
    trainer = trl.GRPOTrainer(
        size.rollouts.build_model(), reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trainer_arguments(
            trl.GRPOConfig, size.dtype, beta=0.0, loss_type="grpo", epsilon=EPSILON,
            use_bias_correction_kl=True, num_generations=size.completions,
            per_device_train_batch_size=rows, max_completion_length=size.completion, temperature=1.0,
        ),
        processing_class=training_step.word_tokenizer(),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a"}] * rows),
    )  # fmt: skip
    trainer.beta = KL  # a weight at the beginning makes it load a reference, whose log-probabilities are there already
    trainer._prepare_inputs = lambda batch: batch  # which generates
    if patched:
        import mopl

        mopl.patch_trl(trainer)
    trainer.current_gradient_accumulation_steps = 1
    model, batch = trainer.accelerator.prepare_model(trainer.model), rollouts(size)
    return Variant(lambda: trainer.training_step(model, dict(batch), None), optimizer_of(model), rows)


def _grpo_loss(logprob: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Return GRPO's loss from log-probabilities (B, T)."""
    ratio, advantage = (logprob - batch["old_per_token_logps"]).exp(), batch["advantages"][:, None]
    gap = batch["ref_per_token_logps"] - logprob
    each = -torch.minimum(ratio * advantage, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantage)
    each = each + KL * ratio * (gap.exp() - gap - 1)
    mask = batch["completion_mask"]
    return ((each * mask).sum(-1) / mask.sum(-1)).mean()


def grpo_full_logits(size: Size) -> Variant:
    """The loss from logits that are held whole, with the entropy for the log."""
    model, batch = size.rollouts.build_model(), rollouts(size)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)

    def loss_and_backward() -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=size.dtype == torch.bfloat16):
            kept = size.completion + 1  # as `logits_to_keep` of transformers: no more than the completion needs
            logits = model(ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits[:, :-1]
        loss = _grpo_loss(selected_logprobs(logits, batch["completion_ids"]), batch)
        with torch.no_grad():
            for row in logits:
                logp = row.float().log_softmax(-1)
                (logp.exp() * logp).sum(-1)
        loss.backward()
        return loss.detach()

    model.train()
    return Variant(loss_and_backward, optimizer_of(model), len(ids))


def grpo_liger(size: Size) -> Variant:
    """Liger's fused head and GRPO loss around the model's body."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    model, batch = size.rollouts.build_model(), rollouts(size)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    function = LigerFusedLinearGRPOLoss(
        beta=KL, compiled=DEVICE.type == "cuda", use_ref_model=True, loss_type="grpo", epsilon_low=EPSILON,
        epsilon_high=EPSILON, use_bias_correction_kl=True,
    )  # fmt: skip

    def loss_and_backward() -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=size.dtype == torch.bfloat16):
            hidden = model.base_model(ids, attention_mask=mask, use_cache=False).last_hidden_state
            loss, _ = function(
                hidden[:, -size.completion - 1 : -1], model.get_output_embeddings().weight, batch["completion_ids"],
                batch["completion_mask"], batch["advantages"], ref_per_token_logps=batch["ref_per_token_logps"],
                old_per_token_logps=batch["old_per_token_logps"],
            )  # fmt: skip
        loss.backward()
        return loss.detach()

    model.train()
    return Variant(loss_and_backward, optimizer_of(model), len(ids))


# ---------------------------------------------------------------- the head alone


class Head:
    """Log-probabilities and entropies of N tokens, forward and backward: called as a step is."""

    def __init__(self, size: Size, function: Callable[..., tuple[Tensor, Tensor | None]], ids: int = 1) -> None:
        shape, draw = MODELS[size.model], torch.Generator().manual_seed(0)
        width, vocabulary = shape["hidden_size"], shape["vocab_size"]
        hidden, weight = torch.randn(size.tokens, width, generator=draw), torch.randn(vocabulary, width, generator=draw)
        self.hidden = hidden.to(DEVICE, size.dtype).requires_grad_()
        self.weight = (weight * 3 / width**0.5).to(DEVICE, size.dtype).requires_grad_()
        several = (size.tokens,) if ids == 1 else (size.tokens, ids)
        self.target = torch.randint(vocabulary, several, generator=draw).to(DEVICE)
        self.upstream = torch.randn(several, generator=draw).to(DEVICE)
        self.by_entropy = torch.randn(size.tokens, generator=draw).to(DEVICE)
        self.function, self.optimizer = function, torch.optim.SGD([self.hidden, self.weight])

    def loss_and_backward(self) -> Tensor:
        """Return the sum of results times upstream gradients, and leave the gradients."""
        logprob, entropy = self.function(self.hidden, self.weight, self.target)
        total = (self.upstream * logprob).sum()
        if entropy is not None:
            total = total + (self.by_entropy * entropy).sum()
        total.backward()
        return total.detach()

    def __call__(self) -> Tensor:
        self.hidden.grad = self.weight.grad = None
        return self.loss_and_backward()

    def loss(self) -> float:
        """Return the sum, to be compared."""
        return float(self())


def _by_mopl(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    from mopl.ops import linear_logprob

    row = torch.arange(len(target), device=target.device)[:, None].expand_as(target) if target.ndim == 2 else None
    logprob, entropy = linear_logprob(hidden, weight, target, row=row, return_entropy=True)
    return logprob, entropy


def _by_trl(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    found = ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, 8192, None, 1.0, ("entropy",))
    return found[0], found[1]


def _by_verl(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    return FusedLinearForPPO()(hidden, weight, target)


def _by_logits(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logp = (hidden @ weight.T).float().log_softmax(-1)
    return logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


# ---------------------------------------------------------------- all of them

Build = Callable[[Size], Any]
CASES: dict[str, dict[str, Build]] = {
    "grpo": {
        TRL: grpo_trl,
        PATCHED: lambda size: grpo_trl(size, patched=True),
        LIGER: grpo_liger,
        FULL: grpo_full_logits,
    },
    "dpo": {
        TRL: lambda size: training_step.trl_variant(size.pairs),
        PATCHED: lambda size: training_step.trl_variant(size.pairs, patched=True),
        LIGER: lambda size: training_step.liger_variant(size.pairs),
        FULL: lambda size: training_step.full_logits_variant(size.pairs),
    },
    "head": {
        TRL: lambda size: Head(size, _by_trl),
        "mopl": lambda size: Head(size, _by_mopl),
        FULL: lambda size: Head(size, _by_logits),
        "verl": lambda size: Head(size, _by_verl),
        "mopl, 8 ids a row": lambda size: Head(size, _by_mopl, ids=8),
        "mopl, 64 ids a row": lambda size: Head(size, _by_mopl, ids=64),
    },
}
COMPARED = (TRL, PATCHED, LIGER, FULL, "mopl", "verl")  # whose losses are those of one problem


def tolerance(case: str, size: Size) -> float:
    """Return by how much, in parts of 1 or of the loss, two losses of one problem may differ.

    The head's is a sum of so many terms of either sign, in which roundings of 16 bit do not average out.
    """
    if size.dtype == torch.float32:
        return 1e-4 if case != "head" else 1e-3
    return 0.05 if case != "head" else 0.5
