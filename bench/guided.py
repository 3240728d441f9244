"""What a small model that guides a large one costs: processor time of a token beside each of the two alone.

    OMP_NUM_THREADS=1 python -m bench.guided [--small 135m] [--large 360m] [--rows 1] [--json FILE]

Random weights in the shapes of SmolLM2, float32; the small one with virtual tokens and an adapter (`HyperPromptModel`),
at weights of its own for each row. Variants take turns, round by round; figures are medians of processor time of this
process, which a machine that others use changes less than the clock, and ratios of one run are what may be quoted. A
token of the large model and two of the small one are what the formula needs; the rest is the mixture over the
vocabulary and what is around it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")  # some virtual machines trap on AMX
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
import transformers

from bench.measuring import about
from mopl._files import write_file
from mopl.conditioning import HyperPrompt, HyperPromptModel
from mopl.decoding import guided

SHAPES = {  # width, inner width, layers, heads, heads of keys and values
    "tiny": (64, 128, 2, 4, 2),
    "135m": (576, 1536, 30, 9, 3),
    "360m": (960, 2560, 32, 15, 5),
}


def build(shape: str) -> Any:
    """Return a Llama of random weights in one of the shapes."""
    hidden, inner, layers, heads, kv = SHAPES[shape]
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=True, max_position_embeddings=2048,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def seconds_of_a_token(variant: Callable[[int], object], tokens: int) -> float:
    """Return processor seconds of one more token: of an answer of 1 + tokens without those of an answer of one."""
    found = []
    for count in (1, 1 + tokens):
        start = time.process_time()
        variant(count)
        found.append(time.process_time() - start)
    return (found[1] - found[0]) / tokens


def main() -> None:
    """Measure, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", choices=SHAPES, default="135m")
    parser.add_argument("--large", choices=SHAPES, default="360m")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=24, help="tokens that are generated after the first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()

    large, small = build(given.large), build(given.small)
    adapter = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    policy = HyperPromptModel(
        peft.get_peft_model(small, adapter), HyperPrompt(2, 8, 8, SHAPES[given.small][0]), record=["a", "b"]
    ).eval()
    ids = torch.randint(3, 49152, (given.rows, given.prompt), generator=torch.Generator().manual_seed(1))
    share = torch.linspace(0.1, 0.9, given.rows)
    weights = torch.stack([share, 1 - share], -1)

    def options(count: int) -> dict[str, Any]:
        return {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}

    variants: dict[str, Callable[[int], object]] = {
        "large alone": lambda n: large.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options(n)),
        "small alone, at w": lambda n: policy.generate(ids, weights=weights, **options(n)),
        "large, guided": lambda n: guided(large, policy, weights, ids, **options(n)),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(given.rounds + 1):
        for name, variant in variants.items():
            found = seconds_of_a_token(variant, given.tokens)
            if turn:  # the first round warms up
                times[name].append(found)
    medians = {name: statistics.median(values) for name, values in times.items()}
    alone, one, both = medians.values()
    print(
        f"{given.small} guides {given.large}, {given.rows} rows, prompts of {given.prompt} tokens, {given.tokens} more"
    )
    for name, value in medians.items():
        print(f"  {name:20} {1000 * value:8.1f} ms of a processor a token   {value / alone:.2f} of the large one's")
    print(
        f"  large + 2 small      {1000 * (alone + 2 * one):8.1f}   so the rest is {both / (alone + 2 * one) - 1:+.0%}"
    )
    if given.json is not None:
        settings = {name: value for name, value in vars(given).items() if name != "json"}
        write_file(given.json, json.dumps({"about": about(), "settings": settings, "seconds": times}, indent=1) + "\n")


if __name__ == "__main__":
    main()
