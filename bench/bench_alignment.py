"""One training step of a language model on preferences beside TRL's DPOTrainer: time and memory, pairs and lists.

    pytest bench/bench_alignment.py                                   # the pytest-benchmark suite, tiny model
    python bench/bench_alignment.py --json FILE                       # one interleaved run and a table, tiny model
    python bench/bench_alignment.py --model smollm2-135m --threads 2  # the shape of SmolLM2-135M, random weights

A step is a trainer's own `training_step` (loss, backward, whatever the trainer measures for its log) and an AdamW
update, of the same random model on the same tokens. TRL's fused head has no switch since 1.15: it is on, as its CPU
code where there is no GPU. Pairs are a batch of lists of two. Lists of K are one batch of mopl's; DPOTrainer needs the
K - 1 pairs of the best response with each other one, which repeat the prompt and the best response K - 1 times.
`reference` says where reference log-probabilities come from: a second model in every step, or computed before.

Variants take turns, round by round; figures are medians, and ratios of one run are what may be quoted. `extra` is the
peak of memory during loss and backward beyond what was there before, from the allocator: it holds gradients,
activations and logits, not parameters, optimizer states or the reference model. The losses of equal problems must
agree, and the run stops if they do not.
"""

from __future__ import annotations

import os

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")  # some virtual machines trap on AMX
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures memory announces each start and stop

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from mopl._files import write_file
from mopl.conditioning import HyperPrompt, HyperPromptModel
from mopl.integrations._data import Examples, examples_of
from mopl.integrations.trl import MultiObjectiveDPOConfig, MultiObjectiveDPOTrainer
from mopl.language_models.tokenization import ReadReport, TokenizedData, TokenizedList

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS = {
    "tiny": dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=2048,
    ),
    "smollm2-135m": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152,
    ),
}  # fmt: skip
WORDS = ["<pad>", "<eos>", "a", "b", "c"]


@dataclass(frozen=True)
class Problem:
    """The lists of one batch: `lists` prompts with `items` responses each, the first of which is the best."""

    model: str
    lists: int
    items: int
    prompt: int
    response: int
    reference: str = "precomputed"
    dtype: torch.dtype = torch.float32

    def build_model(self) -> torch.nn.Module:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            **MODELS[self.model], max_position_embeddings=2048, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1
        )
        return transformers.LlamaForCausalLM(config).to(DEVICE, self.dtype)

    def tokens(self) -> list[tuple[np.ndarray, list[np.ndarray]]]:
        draw = np.random.default_rng(0)
        vocabulary = MODELS[self.model]["vocab_size"]

        def text(longest: int) -> np.ndarray:
            return draw.integers(5, vocabulary, draw.integers(max(longest // 2, 1), longest + 1))

        return [(text(self.prompt), [text(self.response) for _ in range(self.items)]) for _ in range(self.lists)]

    def reference_scores(self) -> np.ndarray:
        """Made-up log-probabilities: what they are costs nothing."""
        return -np.random.default_rng(1).uniform(10, 20, (self.lists, self.items)).astype(np.float32)


@dataclass
class Variant:
    """A trainer's step on its batch."""

    trainer: transformers.Trainer
    inputs: dict
    optimizer: torch.optim.Optimizer
    sequences: int

    @classmethod
    def of(cls, trainer: transformers.Trainer, inputs: dict, sequences: int) -> Variant:
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        trainer.current_gradient_accumulation_steps = 1
        inputs = trainer._prepare_inputs(inputs)
        return cls(trainer, inputs, torch.optim.AdamW(trained, lr=1e-6, fused=True), sequences)

    def loss_and_backward(self) -> float:
        """Return the loss of the trainer's own step."""
        return self.trainer.training_step(self.trainer.model, dict(self.inputs))

    def __call__(self) -> torch.Tensor:
        loss = self.loss_and_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def _arguments(kind: type, **options) -> object:
    return kind(
        tempfile.mkdtemp(), report_to="none", use_cpu=DEVICE == "cpu", bf16=False, gradient_checkpointing=False,
        beta=0.1, disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no", max_grad_norm=0.0, **options,
    )  # fmt: skip


def trl_variant(problem: Problem) -> Variant:
    """TRL's DPOTrainer on the K - 1 pairs of each list."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    trainer = trl.DPOTrainer(
        problem.build_model(), ref_model=problem.build_model(), args=_arguments(trl.DPOConfig),
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list([{"prompt": "a ", "chosen": "b", "rejected": "c"}]),
    )  # fmt: skip
    examples = [
        {"prompt_ids": prompt.tolist(), "chosen_ids": responses[0].tolist(), "rejected_ids": other.tolist()}
        for prompt, responses in problem.tokens()
        for other in responses[1:]
    ]
    inputs = trainer.data_collator(examples)
    if problem.reference == "precomputed":
        scores = torch.from_numpy(problem.reference_scores())
        inputs["ref_chosen_logps"] = scores[:, :1].expand(-1, problem.items - 1).reshape(-1)
        inputs["ref_rejected_logps"] = scores[:, 1:].reshape(-1)
        trainer.precompute_ref_logps, trainer.ref_model = True, None
    return Variant.of(trainer, inputs, 2 * len(examples))


def mopl_variant(problem: Problem, objectives: int = 1, conditioned: bool = False) -> Variant:
    """MultiObjectiveDPOTrainer on the lists themselves."""
    labels = np.zeros((objectives, problem.items), dtype=np.float32)
    for objective in range(objectives):
        labels[objective, objective % problem.items] = 1.0  # the first objective prefers the first response
    lists = [
        TokenizedList(prompt, tuple(responses), labels, number)
        for number, (prompt, responses) in enumerate(problem.tokens())
    ]
    names = tuple(f"objective_{number + 1}" for number in range(objectives))
    data: Examples = examples_of(
        TokenizedData(tuple(lists), names, "random", ReadReport("random")), processing_class=None
    )
    model = problem.build_model()
    if problem.reference == "precomputed":
        data = data.with_reference(torch.from_numpy(problem.reference_scores()))
    if conditioned:
        width = MODELS[problem.model]["hidden_size"]
        model = HyperPromptModel(model, HyperPrompt(objectives, virtual_tokens=8, rank=4, hidden=width))
    trainer = MultiObjectiveDPOTrainer(model, args=_arguments(MultiObjectiveDPOConfig), train_dataset=data)
    return Variant.of(trainer, trainer.data_collator(list(data.lists)), problem.lists * problem.items)


VARIANTS: dict[str, Callable[[Problem], Variant]] = {
    "TRL DPOTrainer": trl_variant,
    "mopl": mopl_variant,
    "mopl, 3 objectives": lambda problem: mopl_variant(problem, 3),
    "mopl, HyperPrompt, 2 objectives": lambda problem: mopl_variant(problem, 2, conditioned=True),
}


def peak_memory(variant: Variant) -> float:
    """Return the peak of allocated megabytes during loss and backward beyond what was there before."""
    variant.optimizer.zero_grad()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        variant.loss_and_backward()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            variant.loss_and_backward()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        if not sizes:
            raise RuntimeError("the profiler of this torch reports no memory events")
        peak = max(int(np.cumsum(sizes).max()), 0)
    variant.optimizer.zero_grad()
    return peak / 2**20


def interleaved(variants: dict[str, Variant], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round of each variant, measured in turn after one round that warms up."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, variant in variants.items():
            start = time.perf_counter()
            variant()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


# ---------------------------------------------------------------- pytest-benchmark


@pytest.fixture(scope="module")
def built() -> dict:
    return {}


@pytest.mark.parametrize("items", [2, 8])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_step(benchmark, built: dict, name: str, items: int) -> None:
    """Time one step of the tiny model."""
    problem = Problem("tiny", lists=4, items=items, prompt=32, response=32)
    variant = built.setdefault((name, items), VARIANTS[name](problem))
    benchmark.group = f"tiny model, {problem.lists} lists of {items}"
    benchmark.extra_info["sequences"] = variant.sequences

    def run() -> None:
        variant()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(run)


# ---------------------------------------------------------------- table


def main() -> None:
    """Measure and print a table for pairs and for lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="tiny")
    parser.add_argument("--lists", type=int, default=4, help="prompts in a batch (default 4)")
    parser.add_argument("--items", type=int, nargs="+", default=[2, 8], help="responses of a list (default 2 8)")
    parser.add_argument("--prompt", type=int, default=64, help="most tokens of a prompt")
    parser.add_argument("--response", type=int, default=64, help="most tokens of a response")
    parser.add_argument("--reference", choices=["precomputed", "model"], nargs="+", default=["precomputed", "model"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1: figures repeat best)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    results = []
    for reference in arguments.reference:
        for items in arguments.items:
            problem = Problem(
                arguments.model, arguments.lists, items, arguments.prompt, arguments.response, reference,
                getattr(torch, arguments.dtype),
            )  # fmt: skip
            variants = {name: build(problem) for name, build in VARIANTS.items()}
            _check_losses(problem, variants)
            memory = {name: peak_memory(variant) for name, variant in variants.items()}
            times = interleaved(variants, arguments.rounds)
            print(
                f"\n{problem.model} model, {problem.lists} lists of {items}, up to {problem.prompt} + "
                f"{problem.response} tokens, reference {reference}, {arguments.dtype}, {DEVICE}"
            )
            base = "TRL DPOTrainer"
            for name, variant in variants.items():
                milliseconds = statistics.median(times[name]) * 1e3
                # A ratio a round, then their median: what slows the machine down for a moment slows both.
                ratio = statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))
                print(
                    f"  {name:32s} {variant.sequences:5d} sequences {milliseconds:10.1f} ms   {ratio:5.2f} x TRL   "
                    f"{memory[name]:9.1f} MiB extra  {memory[name] / memory[base]:5.2f} x TRL",
                    flush=True,
                )
                results.append(
                    {"K": items, "reference": reference, "variant": name, "sequences": variant.sequences,
                     "ms": milliseconds, "time_over_trl": ratio, "extra_mib": memory[name],
                     "memory_over_trl": memory[name] / memory[base]}
                )  # fmt: skip
            del variants
            gc.collect()
    if arguments.json:
        about = {
            "device": torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine(),
            "threads": arguments.threads,
            "date": time.strftime("%Y-%m-%d"),
            **{module.__name__: module.__version__ for module in (torch, transformers, trl)},
            "command": " ".join(["python", "bench/bench_alignment.py", *sys.argv[1:]]),
            "problem": {
                name: str(getattr(arguments, name)) for name in ("model", "lists", "prompt", "response", "dtype")
            },
        }
        write_file(arguments.json, json.dumps({"about": about, "results": results}, indent=1) + "\n")


def _check_losses(problem: Problem, variants: dict[str, Variant]) -> None:
    """Stop if two trainers do not compute the same on pairs, where they should."""
    losses = {name: float(variants[name].loss_and_backward()) for name in ("TRL DPOTrainer", "mopl")}
    for variant in variants.values():
        variant.optimizer.zero_grad()
    tolerance = 1e-4 if problem.dtype == torch.float32 else 0.1
    first, second = losses.values()
    if problem.items == 2 and abs(first - second) > tolerance * max(1.0, abs(first)):
        raise SystemExit(f"the trainers do not solve the same problem: {losses}")


if __name__ == "__main__":
    main()
