"""Responses for the demo: sampled many at once, and kept on disk chunk by chunk.

A chunk's random numbers come from (seed, number of the chunk), so a run that was stopped goes on with the chunk that is
missing and ends with the same files, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from mopl._extras import require
from mopl._files import remove, remove_leftovers, write_file
from mopl._records import DamagedFile, read_json
from mopl._words import sentence_ends, words_of
from mopl.language_models.prompt_rows import generating_by, prompt_rows
from mopl.language_models.tokenization import ListTokenizer
from mopl.language_models.turns import turn_ends

PLAN = "plan.json"


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled.

    Args:
        max_new_tokens: Most tokens of a response.
        temperature: Logits are divided by it.
        top_k: Tokens to choose from.
        rows: Responses of a chunk, which are sampled together.
        seed: Of the random numbers.
    """

    max_new_tokens: int = 40
    temperature: float = 0.7
    top_k: int = 20
    rows: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "temperature", "top_k", "rows"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)} but must be positive")


@dataclass(frozen=True)
class Response:
    """A sampled response: its text, and whether the model ended it itself."""

    text: str
    finished: bool


@torch.inference_mode()
def sample_rows(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Sequence[dict[str, str]]],
    sampling: Sampling,
    chunk: int,
    one_sentence: Sequence[bool] = (),
) -> list[Response]:
    """Sample one response for each conversation, all of which end with the user.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        conversations: B conversations.
        sampling: How.
        chunk: Number of the chunk, for the random numbers.
        one_sentence: Which responses end after their first sentence, whatever the model would add; none by default.
    """
    require("transformers")
    from transformers import GenerationConfig

    encoder = ListTokenizer(tokenizer, max_length=None, template="chat", append_eos=False)
    ends = turn_ends(encoder, model.generation_config)
    prompts = [encoder.prompt_tokens(tuple(conversation)).tolist() for conversation in conversations]
    config = GenerationConfig(
        do_sample=False, max_new_tokens=sampling.max_new_tokens, eos_token_id=list(ends.ids) or None,
        pad_token_id=encoder.pad_id,
    )  # fmt: skip
    # One uniform number for each token, whatever else is drawn.
    uniform = np.random.default_rng([sampling.seed, chunk]).random((len(prompts), sampling.max_new_tokens))
    tokens: list[list[int]] = []
    with generating_by(model, config):
        for part in prompt_rows(model, prompts, encoder.pad_id, ends, len(prompts)):
            numbers = torch.from_numpy(uniform[part.rows]).float().to(part.ids.device)
            new, _ = part.generate(logits_processor=[draw(numbers, sampling)])
            tokens += new.tolist()
    written, ended = zip(*(ends.cut(row) for row in tokens), strict=True)
    found = []
    for text, end, stop in zip(ends.texts(written), ended, one_sentence or [False] * len(ended), strict=True):
        whole = text.strip()
        shown = first_sentence(whole) if stop else whole
        found.append(Response(shown, end or shown != whole))
    return found


def first_sentence(text: str) -> str:
    """Return a text up to the end of its first sentence of three words or more; all of it if none ends."""
    for end in sentence_ends(text):
        # An apostrophe parts words here ("It's so."), which it does not where words are counted.
        if max(len(re.findall(r"\w+", text[:end])), len(words_of(text[:end]))) >= 3:
            return text[:end].rstrip()
    return text


def whole_sentences(text: str) -> str:
    """Return a text that was cut off without what follows its last complete sentence, if it has one."""
    end = max(sentence_ends(text), default=0)
    # "1." at the start of a line is the number of an item that never came.
    shorter = re.sub(r"\s*\n\s*\d+\.$", "", text[:end].rstrip())
    return shorter if re.search(r"\w", shorter) else text


def draw(uniform: Tensor, sampling: Sampling) -> Callable[[Tensor, Tensor], Tensor]:  # (B, steps)
    """Return a logits processor that leaves each row the one token that its number of the step chooses."""
    numbers = iter(uniform.T)

    def draw(input_ids: Tensor, logits: Tensor) -> Tensor:
        chosen = _choose(logits.float(), next(numbers), sampling)
        return torch.full_like(logits, -torch.inf).scatter(-1, chosen[:, None], 0.0)

    return draw


def _choose(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Draw from the most likely tokens by inverting their cumulative distribution."""
    values, tokens = (logits / sampling.temperature).topk(min(sampling.top_k, logits.shape[-1]), -1)
    cumulative = values.softmax(-1).cumsum(-1)
    place = (cumulative < uniform[:, None] * cumulative[:, -1:]).sum(-1).clamp(max=values.shape[-1] - 1)
    return tokens.gather(-1, place[:, None]).squeeze(-1)


def sample_all(
    load: Callable[[], tuple[Any, Any]],
    conversations: Sequence[Sequence[dict[str, str]]],
    folder: Path,
    sampling: Sampling,
    say: Callable[[str], None],
    *,
    model_key: str,
    one_sentence: Sequence[bool] = (),
    preview: Callable[[list[Response]], Sequence[str]] = lambda responses: (),
) -> list[Response]:
    """Sample a response for every conversation, in chunks that are kept in a folder.

    Args:
        load: Returns model and tokenizer; called only if a chunk is missing.
        conversations: All of them.
        folder: For the chunks. Chunks of other conversations, settings or another model are deleted.
        sampling: How.
        say: Told about the progress.
        model_key: Names the model.
        one_sentence: As in `sample_rows`, for all conversations.
        preview: Called with the responses of chunk 0 as soon as it is sampled; returns lines to say of them.
    """
    stops = list(one_sentence) or [False] * len(conversations)
    plan = json.dumps(
        {"model": model_key, "sampling": vars(sampling), "conversations": list(conversations), "one_sentence": stops}
    )
    key = hashlib.sha256(plan.encode()).hexdigest()
    plan_file = folder / PLAN
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if _cached(plan_file, dict[str, str], say) != {"sha256": key}:
        old = list(folder.glob("chunk-[0-9][0-9][0-9][0-9].json"))
        if old and not plan_file.exists():
            raise FileExistsError(f"{folder} holds chunks but no {PLAN} that says of what; name another folder")
        for chunk in old:
            chunk.unlink()
        remove(plan_file)
        write_file(plan_file, json.dumps({"sha256": key}) + "\n")
    parts = [slice(start, start + sampling.rows) for start in range(0, len(conversations), sampling.rows)]
    files = [folder / f"chunk-{number:04d}.json" for number in range(len(parts))]
    found = [
        _cached(file, _responses(len(conversations[rows])), say) for file, rows in zip(files, parts, strict=True)
    ]  # fmt: skip
    missing = [number for number, responses in enumerate(found) if responses is None]
    if missing:
        say(
            f"sampling {len(conversations)} responses, {len(missing)} of {len(parts)} chunks to go; after Ctrl-C the "
            "same command goes on from here"
        )
        model, tokenizer = load()
        began = time.monotonic()
        for count, number in enumerate(missing, 1):
            rows = parts[number]
            responses = sample_rows(model, tokenizer, conversations[rows], sampling, number, stops[rows])
            found[number] = [vars(response) for response in responses]
            remove(files[number])
            write_file(files[number], json.dumps(found[number], ensure_ascii=False, indent=1) + "\n")
            spent = time.monotonic() - began
            left = spent / count * (len(missing) - count)
            say(f"  chunk {number + 1} of {len(parts)}, {spent:.0f} s, about {left:.0f} s left")
            for line in preview(responses) if number == 0 else ():
                say(line)
    return [Response(**entry) for responses in found for entry in responses]


def _responses(count: int) -> Any:
    """Return the schema of a chunk."""
    return Annotated[list[Response], msgspec.Meta(min_length=count, max_length=count)]


def _cached(file: Path, schema: Any, say: Callable[[str], None]) -> Any:
    """Return what a file of the cache holds, or None if it is not there, or damaged, which is said."""
    if not file.exists():
        return None
    try:
        return read_json(file, schema, remedy="it is made again")
    except DamagedFile as error:
        say(f"note: {error}")
        return None
