"""A training step of a language model on preferences, as mopl, TRL and Liger do it: what both benches of it measure.

A step is a trainer's own `training_step` (loss, backward, whatever the trainer measures for its log) and a fused AdamW
update, of the same random model on the same tokens. Pairs are a batch of lists of two. Lists of K are one batch of
mopl's; the others need the K - 1 pairs of the best response with each other one, which repeat the prompt and the best
response K - 1 times. All of them pad rows on the right to the longest one, none packs, and attention is sdpa. Models in
bf16 are trained under autocast, the trainers' default, which computes LoRA's float32 adapters in bf16.

* TRL: `DPOTrainer` with its fused head, which has no switch since 1.15 (on a CPU it is that head's torch twin).
* Liger: no trainer brings its DPO loss (`use_liger_kernel` of TRL 1.16 replaces layers alone), so this is the least
  around it: the model's body, `LigerFusedLinearDPOLoss` as it comes (compiled, one pair at a time) on TRL's batch, no
  log. It takes no precomputed reference: its gradients are those without one, which are no less work, and the loss
  that is compared is that of its own log-probabilities with the reference.
* mopl: `MultiObjectiveDPOTrainer`; with LoRA its head is frozen. The hyper prompt trains on a frozen model.

Each import is where it is needed: a library that is missing takes its own rows alone with it.
"""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measuring import DEVICE, ON_GPU, extra_memory

MODELS = {
    "tiny": dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=2048,
    ),
    "smollm2-135m": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152,
    ),
    "llama-3.2-1b": dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256,
    ),
}  # fmt: skip
WORDS = ["<pad>", "<eos>", "a", "b", "c"]
BETA, RANK = 0.1, 16
TRL, LIGER = "TRL DPOTrainer", "Liger DPO loss"


@dataclass(frozen=True)
class Problem:
    """One batch, and what of the model is trained.

    Args:
        model: its shape, of `MODELS`; random weights, tied head.
        lists: prompts.
        items: responses of each, the first of which is the best.
        prompt: most tokens of a prompt, at least half of which each has.
        response: likewise of a response.
        reference: where its log-probabilities come from: "precomputed", or the "model" in every step, which is a
            second one where all is trained, and with LoRA the same one without adapters.
        dtype: of the model.
        lora: train adapters of rank 16 on all linear layers but the head, in place of everything.
    """

    model: str
    lists: int
    items: int
    prompt: int
    response: int
    reference: str = "precomputed"
    dtype: torch.dtype = torch.float32
    lora: bool = False

    def build_model(self) -> Any:
        """Return the model, the same one in every process of a machine."""
        import transformers

        config = transformers.LlamaConfig(
            **MODELS[self.model], max_position_embeddings=2048, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1
        )
        torch.manual_seed(0)
        with DEVICE:  # drawing a billion numbers takes a CPU many seconds
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=self.dtype, attn_implementation="sdpa")
        return model.to(DEVICE)

    def adapters(self) -> Any:
        """Return the configuration of LoRA; None where everything is trained."""
        if not self.lora:
            return None
        from peft import LoraConfig

        return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")

    def tokens(self) -> list[tuple[np.ndarray, list[np.ndarray]]]:
        """Return prompts, each with its responses."""
        draw = np.random.default_rng(0)
        vocabulary = MODELS[self.model]["vocab_size"]

        def text(longest: int) -> np.ndarray:
            return draw.integers(5, vocabulary, draw.integers(max(longest // 2, 1), longest + 1))

        return [(text(self.prompt), [text(self.response) for _ in range(self.items)]) for _ in range(self.lists)]

    def token_count(self) -> int:
        """Return the tokens of the lists, each response behind its prompt: no padding, and not what pairs repeat."""
        return sum(len(prompt) + len(response) for prompt, responses in self.tokens() for response in responses)

    def reference_scores(self) -> np.ndarray:
        """Made-up log-probabilities (lists, items), near those of the model, so that no gradient vanishes."""
        shape = MODELS[self.model]
        each = math.log(shape["vocab_size"]) + shape["hidden_size"] * 0.02**2 / 2  # logits are normal in a random model
        lengths = np.array([[len(response) for response in responses] for _, responses in self.tokens()])
        noise = np.random.default_rng(1).uniform(-5, 5, lengths.shape)
        return (noise - each * lengths).astype(np.float32)

    @property
    def tolerance(self) -> float:
        """By how much, in parts of 1 or of the loss, the losses of equal problems may differ."""
        return 1e-4 if self.dtype == torch.float32 else 0.05


@dataclass
class Variant:
    """A step on its batch.

    Args:
        loss_and_backward: returns the loss and leaves gradients.
        optimizer: of what is trained.
        sequences: rows that the model reads.
        shown: the loss to compare, where it is not the one that is trained on.
    """

    loss_and_backward: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer
    sequences: int
    shown: Callable[[], float] | None = None

    @classmethod
    def of(cls, trainer: Any, inputs: dict, sequences: int) -> Variant:
        """Return the step of a trainer."""
        trainer.current_gradient_accumulation_steps = 1
        inputs = trainer._prepare_inputs(inputs)
        model = trainer.accelerator.prepare_model(trainer.model)  # puts it under autocast, as `train` does
        return cls(lambda: trainer.training_step(model, dict(inputs)), optimizer_of(model), sequences)

    def __call__(self) -> Tensor:
        loss = self.loss_and_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def loss(self) -> float:
        """Return the loss as it is, without a step."""
        value = float(self.loss_and_backward())
        self.optimizer.zero_grad()
        return value if self.shown is None else self.shown()


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return AdamW of what is trained.

    Adapters first get values, the same ones whoever made them: they begin at 0, where the policy is the reference and
    every loss ln 2.
    """
    draw = torch.Generator().manual_seed(2)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        if ".lora_" in name:
            scale = 0.01 if ".lora_B." in name else parameter.shape[1] ** -0.5
            with torch.no_grad():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=draw))
    return torch.optim.AdamW(trained.values(), lr=1e-6, fused=True)


def trainer_arguments(kind: type, dtype: torch.dtype, **options: Any) -> Any:
    """Return arguments of a trainer of which a step is measured."""
    return kind(
        tempfile.mkdtemp(), report_to="none", use_cpu=not ON_GPU, bf16=dtype == torch.bfloat16,
        gradient_checkpointing=False, disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no",
        max_grad_norm=0.0, **options,
    )  # fmt: skip


def word_tokenizer() -> Any:
    """Return a tokenizer of some words, for trainers that want one."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def _pairs(problem: Problem) -> list[dict[str, list[int]]]:
    """Return the K - 1 pairs of each list as TRL's collator takes them."""
    return [
        {"prompt_ids": prompt.tolist(), "chosen_ids": responses[0].tolist(), "rejected_ids": other.tolist()}
        for prompt, responses in problem.tokens()
        for other in responses[1:]
    ]


def _pair_references(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the reference of each pair's best and other response."""
    scores = torch.from_numpy(problem.reference_scores())
    return scores[:, :1].expand(-1, problem.items - 1).reshape(-1), scores[:, 1:].reshape(-1)


def trl_variant(problem: Problem, patched: bool = False) -> Variant:
    """TRL's DPOTrainer on the K - 1 pairs of each list; `patched`: by `mopl.patch_trl`."""
    import datasets
    import trl

    datasets.disable_progress_bars()
    own = problem.reference == "model"
    # Where all is trained it would look for a reference by the model's name: one in its place is dropped again.
    second = None if problem.lora else (problem if own else replace(problem, model="tiny")).build_model()
    trainer = trl.DPOTrainer(
        problem.build_model(), ref_model=second, args=trainer_arguments(trl.DPOConfig, problem.dtype, beta=BETA),
        processing_class=word_tokenizer(),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a ", "chosen": "b", "rejected": "c"}]),
        peft_config=problem.adapters(),
    )  # fmt: skip
    examples = _pairs(problem)
    inputs = trainer.data_collator(examples)
    if not own:
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = _pair_references(problem)
        trainer.precompute_ref_logps, trainer.ref_model = True, None
    if patched:
        import mopl

        mopl.patch_trl(trainer)
    return Variant.of(trainer, inputs, 2 * len(examples))


def liger_variant(problem: Problem) -> Variant:
    """Liger's fused head and DPO loss around the model's body, on the K - 1 pairs of each list."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    model = problem.build_model()
    if problem.lora:
        from peft import get_peft_model

        model = get_peft_model(model, problem.adapters())
    elif problem.reference == "model":
        raise ImportError("no second model here: Liger's loss is compared with precomputed references and with LoRA")
    examples = _pairs(problem)
    inputs = {key: value.to(DEVICE) for key, value in DataCollatorForPreference(pad_token_id=0)(examples).items()}
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)[:, 1:].contiguous()
    inner = model.get_base_model() if problem.lora else model
    own, weight = problem.reference == "model", inner.get_output_embeddings().weight
    function = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=own, compiled=ON_GPU)
    seen: list[Tensor] = []

    def hidden() -> Tensor:
        rows = inner.base_model(inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        return rows.last_hidden_state[:, :-1]

    def loss_and_backward() -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=problem.dtype == torch.bfloat16):
            reference = {}
            if own:
                with torch.no_grad(), model.disable_adapter():
                    reference = {"ref_input": hidden(), "ref_weight": weight}
            loss, (chosen, rejected, *_) = function(weight, hidden(), labels, **reference)
        loss.backward()
        seen[:] = [loss.detach(), chosen.detach(), rejected.detach()]
        return loss.detach()

    def shown() -> float:
        if own:
            return float(seen[0])
        best, other = (part.to(DEVICE) for part in _pair_references(problem))
        return float(-F.logsigmoid(BETA * (seen[1] - best - seen[2] + other)).mean())

    model.train()
    return Variant(loss_and_backward, optimizer_of(model), 2 * len(examples), shown)


def full_logits_variant(problem: Problem) -> Variant:
    """DPO from logits that are held whole, as trainers computed it before they had fused heads."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    model, examples = problem.build_model(), _pairs(problem)
    inputs = {key: value.to(DEVICE) for key, value in DataCollatorForPreference(pad_token_id=0)(examples).items()}
    counts = inputs["completion_mask"][:, 1:]
    best, other = (part.to(DEVICE) for part in _pair_references(problem))

    def loss_and_backward() -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=problem.dtype == torch.bfloat16):
            logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
        scores = (selected_logprobs(logits[:, :-1], inputs["input_ids"][:, 1:]) * counts).sum(-1)
        chosen, rejected = scores.chunk(2)
        loss = -F.logsigmoid(BETA * (chosen - best - rejected + other)).mean()
        loss.backward()
        return loss.detach()

    model.train()
    return Variant(loss_and_backward, optimizer_of(model), 2 * len(examples))


def selected_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Return log p of targets from logits in float32, a row at a time for the normaliser, as trainers do."""
    logits = logits.float()
    normaliser = torch.stack([row.logsumexp(-1) for row in logits])
    return logits.gather(-1, targets[..., None])[..., 0] - normaliser


def mopl_variant(problem: Problem, objectives: int = 1, conditioned: bool = False) -> Variant:
    """MultiObjectiveDPOTrainer on the lists themselves."""
    from mopl.conditioning import HyperPrompt, HyperPromptModel
    from mopl.integrations._data import examples_of
    from mopl.integrations.trl import MultiObjectiveDPOConfig, MultiObjectiveDPOTrainer
    from mopl.language_models.tokenization import ReadReport, TokenizedData, TokenizedList

    labels = np.zeros((objectives, problem.items), dtype=np.float32)
    for objective in range(objectives):
        labels[objective, objective % problem.items] = 1.0  # the first objective prefers the first response
    lists = [
        TokenizedList(prompt, tuple(responses), labels, number)
        for number, (prompt, responses) in enumerate(problem.tokens())
    ]
    names = tuple(f"objective_{number + 1}" for number in range(objectives))
    data = examples_of(TokenizedData(tuple(lists), names, "random", ReadReport("random")), processing_class=None)
    model: Any = problem.build_model()
    if problem.reference == "precomputed":
        data = data.with_reference(torch.from_numpy(problem.reference_scores()))
    if conditioned:
        width = MODELS[problem.model]["hidden_size"]
        model = HyperPromptModel(model, HyperPrompt(objectives, virtual_tokens=8, rank=4, hidden=width))
    trainer = MultiObjectiveDPOTrainer(
        model, args=trainer_arguments(MultiObjectiveDPOConfig, problem.dtype, beta=BETA), train_dataset=data,
        peft_config=None if conditioned else problem.adapters(),
    )  # fmt: skip
    return Variant.of(trainer, trainer.data_collator(list(data.lists)), problem.lists * problem.items)


VARIANTS: dict[str, Callable[[Problem], Variant]] = {
    TRL: trl_variant,
    LIGER: liger_variant,
    "mopl": mopl_variant,
    "mopl, 3 objectives": lambda problem: mopl_variant(problem, 3),
    "mopl, HyperPrompt, 2 objectives": lambda problem: mopl_variant(problem, 2, conditioned=True),
}
ON_LISTS = ("mopl", "mopl, again")


def disagreeing(problem: Problem, losses: dict[str, float]) -> list[tuple[str, str]]:
    """Return the variants, two by two, whose losses differ though their problems are one.

    On pairs that is every one with a single objective; on longer lists those that make pairs of them, and those that
    take them as they are.

    Args:
        problem: what they solve.
        losses: of each variant; others are left out.
    """
    single = [name for name in (TRL, LIGER, *ON_LISTS) if name in losses]
    kinds = [single] if problem.items == 2 else [[n for n in single if (n in ON_LISTS) == own] for own in (False, True)]
    return [
        (kind[0], name)
        for kind in kinds
        for name in kind[1:]
        if not abs(losses[kind[0]] - losses[name]) <= problem.tolerance * max(1.0, abs(losses[kind[0]]))  # NaN differs
    ]


def peak_memory(variant: Variant) -> float:
    """Return the peak of allocated MiB during loss and backward beyond what was there before: the allocator's count.

    It holds gradients, activations and logits, not parameters, optimizer states or the reference model.
    """
    variant.optimizer.zero_grad()
    if ON_GPU:
        gigabytes = extra_memory(variant.loss_and_backward)
        assert gigabytes is not None
        peak = gigabytes * 2**30
    else:
        gc.collect()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            variant.loss_and_backward()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        if not sizes:
            raise RuntimeError("the profiler of this torch reports no memory events")
        peak = max(int(np.cumsum(sizes).max()), 0)
    variant.optimizer.zero_grad()
    return peak / 2**20
