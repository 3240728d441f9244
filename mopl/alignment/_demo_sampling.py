"""Responses for the demo: sampled with a key-value cache, many rows at once, and kept on disk chunk by chunk.

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

from mopl._files import remove, remove_leftovers, write_file
from mopl._records import DamagedFile, read_json
from mopl._words import sentence_ends, words_of
from mopl.language_models.turns import end_tokens

PLAN = "plan.json"
COMPACT_AT = 0.75  # finished rows are dropped from the batch once no more than this share is left


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
    """Sample one response for each conversation.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        conversations: B conversations that end with the user.
        sampling: How.
        chunk: Number of the chunk, for the random numbers.
        one_sentence: Which responses end after their first sentence, whatever the model would add.

    Returns:
        B responses.
    """
    device = model.get_input_embeddings().weight.device
    rows = [_ids(tokenizer, conversation) for conversation in conversations]
    longest, batch = max(map(len, rows)), len(rows)
    ids = torch.zeros(batch, longest, dtype=torch.long)
    mask = torch.zeros(batch, longest, dtype=torch.long)
    for place, row in enumerate(rows):  # on the left, so that all rows go on at the same position of the batch
        ids[place, longest - len(row) :] = torch.tensor(row)
        mask[place, longest - len(row) :] = 1
    # One uniform number for each token, whatever rows are still in the batch.
    uniform = np.random.default_rng([sampling.seed, chunk]).random((batch, sampling.max_new_tokens))
    uniform = torch.from_numpy(uniform).float().to(device)
    ids, mask = ids.to(device), mask.to(device)
    ends = torch.tensor(_end_tokens(model, tokenizer), device=device)
    written: list[list[int]] = [[] for _ in rows]
    finished = [False] * batch
    stops = list(one_sentence) or [False] * batch
    active = torch.arange(batch, device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache: Any = None
    for step in range(sampling.max_new_tokens):
        output = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                       use_cache=True, logits_to_keep=1)  # fmt: skip
        cache = output.past_key_values
        tokens = _choose(output.logits[:, -1].float(), uniform[active, step], sampling)
        going = torch.ones(len(active), dtype=torch.bool, device=device)
        ended = torch.isin(tokens, ends).tolist()
        for place, (row, token) in enumerate(zip(active.tolist(), tokens.tolist(), strict=True)):
            if finished[row]:
                going[place] = False
            elif ended[place]:
                finished[row], going[place] = True, False
            else:
                written[row].append(token)
                # What follows a sentence shows that it is one: "3.5" has a full stop inside.
                text = tokenizer.decode(written[row], skip_special_tokens=True).strip() if stops[row] else ""
                if len(first_sentence(text)) < len(text):
                    finished[row], going[place] = True, False
        left = int(going.sum())
        if left == 0:
            break
        if left <= COMPACT_AT * len(active):
            keep = going.nonzero().squeeze(-1)
            cache.batch_select_indices(keep)
            active, tokens, mask, positions = active[keep], tokens[keep], mask[keep], positions[keep]
        ids = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(active), 1)], -1)
        positions = positions[:, -1:] + 1
    texts = (text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True))
    return [
        Response(first_sentence(text) if stop else text, done)
        for text, done, stop in zip(texts, finished, stops, strict=True)
    ]


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


def _ids(tokenizer: Any, conversation: Sequence[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    return sorted(
        {*end_tokens(model.generation_config), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
    )


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

    Returns:
        The responses, in order.
    """
    stops = list(one_sentence) or [False] * len(conversations)
    plan = json.dumps(
        {"model": model_key, "sampling": vars(sampling), "conversations": list(conversations), "one_sentence": stops}
    )
    key = hashlib.sha256(plan.encode()).hexdigest()
    plan_file = folder / PLAN
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if _cached(plan_file, _Plan, say) != {"sha256": key}:
        old = list(folder.glob("chunk-[0-9][0-9][0-9][0-9].json"))
        if old and not plan_file.exists():
            raise FileExistsError(f"{folder} holds chunks but no {PLAN} that says of what; name another folder")
        for chunk in old:
            chunk.unlink()
        remove(plan_file)
        write_file(plan_file, json.dumps({"sha256": key}) + "\n")
    starts = range(0, len(conversations), sampling.rows)

    def size(chunk: int) -> int:
        return len(conversations[starts[chunk] : starts[chunk] + sampling.rows])

    missing = [chunk for chunk in range(len(starts)) if _read(folder, chunk, size(chunk), say) is None]
    if missing:
        say(
            f"sampling {len(conversations)} responses, {len(missing)} of {len(starts)} chunks to go; after Ctrl-C the "
            "same command goes on from here"
        )
        model, tokenizer = load()
        began = time.monotonic()
        for count, chunk in enumerate(missing, 1):
            start = starts[chunk]
            rows = slice(start, start + sampling.rows)
            found = sample_rows(model, tokenizer, conversations[rows], sampling, chunk, stops[rows])
            content = json.dumps([vars(response) for response in found], ensure_ascii=False, indent=1)
            remove(_file(folder, chunk))
            write_file(_file(folder, chunk), content + "\n")
            spent = time.monotonic() - began
            left = spent / count * (len(missing) - count)
            say(f"  chunk {chunk + 1} of {len(starts)}, {spent:.0f} s, about {left:.0f} s left")
    return [response for chunk in range(len(starts)) for response in _read(folder, chunk, size(chunk), say) or []]


def _file(folder: Path, chunk: int) -> Path:
    return folder / f"chunk-{chunk:04d}.json"


class _Plan(msgspec.Struct):
    sha256: str


def _cached(file: Path, schema: Any, say: Callable[[str], None]) -> Any:
    """Return what a file of the cache holds, or None if it is not there, or damaged, which is said."""
    if not file.exists():
        return None
    try:
        return read_json(file, schema, remedy="it is made again")
    except DamagedFile as error:
        say(f"note: {error}")
        return None


def _read(folder: Path, chunk: int, size: int, say: Callable[[str], None]) -> list[Response] | None:
    """Return a chunk, or None if it is not there."""
    schema = Annotated[list[Response], msgspec.Meta(min_length=size, max_length=size)]
    entries = _cached(_file(folder, chunk), schema, say)
    return None if entries is None else [Response(**entry) for entry in entries]
