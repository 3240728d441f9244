"""The folder in which the code and the command lines of the pages run: a small model, lists, rewards, runs.

Each thing is made once in a process, when the first page names it, and copied for each page.
"""

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
import transformers
from tiny_language_models import COMMON, merging

from mopl.cli import main

CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
THINGS = ["tea", "soup", "rice", "a kite", "a fire", "bread", "paper", "a knot", "a song", "a bed", "glass", "a mask"]
ANSWERS = ["I would like to help. First, take {} and wait a little, please.", "No.", "Ask someone who knows {}.",
           "Of course! You need patience, {} and some time. Begin slowly and take care."]  # fmt: skip
REWARDS = '''"""Rewards of the folder: one number for each text."""


def helpful(texts, prompts):
    return [min(len(text.split()), 20) / 20 for text in texts]


def harmless(texts, prompts):
    return [float("no" in text.lower()) for text in texts]
'''
# Small sizes of everything that a training does, for the runs of this folder and for those of the pages.
SMALL_ALIGN = (
    "--steps 2 --lists-per-batch 4 --points 3 --bootstrap 0 --samples 1 --sample-tokens 2 --held-out 0.25 "
    "--log-every 1 --checkpoint-every 0 --warmup 0 --max-length 96 --scales --device cpu"
).split()
SMALL_RANK = (
    "--steps 3 --base-steps 2 --batch-size 8 --bootstrap 10 --points 6 --checkpoint-every 0 --warmup 1 --device cpu"
).split()
SMALL_REWARDS = (
    "--steps 1 --prompts-per-step 2 --samples-per-prompt 2 --max-new-tokens 3 --points 3 --normalize-prompts 4 "
    "--bootstrap 0 --held-out 0.25 --samples 1 --eval-prompts 2 --log-every 1 --checkpoint-every 1000 --device cpu"
).split()


def prompts() -> list[str]:
    return [f"{question} {thing}?" for thing in THINGS for question in ("How do I make", "Should I sell")]


def write_model(folder: Path, seed: int = 0, **sizes: int) -> None:
    """Write a language model of two layers that speaks bytes, with a chat template."""
    backend = merging([*prompts(), *ANSWERS], SPECIAL)
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>", bos_token="<|end|>", model_max_length=512
    )
    words.chat_template = CHAT
    words.save_pretrained(folder)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**{
        **COMMON, "vocab_size": len(words), "max_position_embeddings": 512, "initializer_range": 0.1,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, **sizes,
    })  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def write_lists(file: Path) -> None:
    """Write lists of two to four responses, labelled for helpful and harmless."""
    random = np.random.default_rng(0)
    with file.open("w", encoding="utf-8") as lines:
        for number, prompt in enumerate(prompts()):
            responses = [text.format(prompt.split()[-1][:-1]) for text in ANSWERS[: 2 + number % 3]]
            labels = {name: random.integers(0, 5, len(responses)).tolist() for name in ("helpful", "harmless")}
            lines.write(json.dumps({"prompt": prompt, "responses": responses, "labels": labels}) + "\n")


def write_letor(file: Path, *, queries: int = 12, items: int = 5, features: int = 136, dwell: bool = False) -> None:
    """Write lines of LETOR with as many features as MSLR-WEB10K has; with dwell also dwell.txt, a label an item."""
    random = np.random.default_rng(len(file.name))
    lines = []
    for query in range(queries):
        for _ in range(items):
            values = " ".join(f"{number}:{x:.3f}" for number, x in enumerate(random.random(features), 1))
            lines.append(f"{random.integers(0, 5)} qid:{query} {values}\n")
    file.write_text("".join(lines))
    if dwell:
        (file.parent / "dwell.txt").write_text("".join(f"{random.integers(0, 60)}\n" for _ in lines))


def write_fold(folder: Path) -> None:
    folder.mkdir(parents=True)
    for part in ("train", "vali", "test"):
        write_letor(folder / f"{part}.txt", queries=8)


def write_reward_model(folder: Path) -> None:
    """Write a classifier with an output for each objective."""
    config = transformers.AutoConfig.from_pretrained(made("MODEL"))
    config.id2label, config.label2id = {0: "helpful", 1: "harmless"}, {"helpful": 0, "harmless": 1}
    torch.manual_seed(0)
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(made("MODEL")).save_pretrained(folder)


def write_run(folder: Path) -> None:
    """Train two steps of a mixture of adapters; the run names its model and data relative to the folder it ran in."""
    given = ["align", "--model", "MODEL", "--data", "lists.jsonl", "--objectives", "helpful", "harmless"]
    given += ["--conditioning", "lora-mixture", "--lora-rank", "2", "--run", str(folder), *SMALL_ALIGN]
    made("MODEL"), made("lists.jsonl")
    assert main(given) == 0


def write_ranking_run(folder: Path) -> None:
    data = "synthetic:queries=40,items=6,features=8,objectives=2"
    assert main(["rank", "--data", data, "--run", str(folder), *SMALL_RANK]) == 0


MAKERS: dict[str, Callable[[Path], None]] = {
    "MODEL": write_model,
    "LARGE": lambda folder: write_model(folder, 1, num_hidden_layers=3),
    "HELPFUL": lambda folder: write_model(folder, 2),
    "HARMLESS": lambda folder: write_model(folder, 3),
    "REWARD_MODEL": write_reward_model,
    "RUN": write_run,
    "RANKING_RUN": write_ranking_run,
    "lists.jsonl": write_lists,
    "prompts.txt": lambda file: (
        file.write_text("".join(f"{prompt}\n" for prompt in prompts()), encoding="utf-8") and None
    ),
    "mine.py": lambda file: file.write_text(REWARDS, encoding="utf-8") and None,
    "my.txt": lambda file: write_letor(file, dwell=True),
    "MSLR-WEB10K": lambda folder: write_fold(folder / "Fold1"),
}
SOURCE: list[Path] = []  # where the things of this process are made; the first page that needs one sets it


@cache
def made(name: str) -> Path:
    path = SOURCE[0] / name
    MAKERS[name](path)
    return path


def fill(folder: Path, text: str, source: Path) -> None:
    """Put into a folder what a text names; `source` is the folder of this process, in which things are made."""
    if not SOURCE:
        SOURCE.append(source)
    words = set(re.findall(r"[\w.-]+", text)) | set(re.findall(r"\w+", text))
    needed = [name for name in MAKERS if name in words or (name.split(".")[0] in words and name.endswith(".py"))]
    if "dwell.txt" in words and "my.txt" not in needed:
        needed.append("my.txt")
    if words & {"steer"} or re.search(r"rank --run RUN\b", text):
        needed.append("RANKING_RUN")
    if "classifier:directory=" in text:
        needed.append("REWARD_MODEL")
    if "RUN" in needed:
        needed += ["MODEL", "lists.jsonl"]
    for name in dict.fromkeys(needed):
        path = made(name)
        if path.is_dir():
            shutil.copytree(path, folder / name)
        else:
            shutil.copy(path, folder / name)
            if name == "my.txt":
                shutil.copy(path.parent / "dwell.txt", folder)
