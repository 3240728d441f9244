"""What must hold for a family: each check asks mopl for a number and a plain forward pass for the same number.

A check is a function of a model (a copy that it may wrap and change) that returns an `Outcome`. It compares what mopl
gives with what the model's own forward gives for each row alone, without padding, masks, caches or packing. What mopl
refuses in its own words is "refused"; anything else that raises is an "error", and an error fails a run as a wrong
number does.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import mopl
from mopl.alignment import fuse, score_sequences
from mopl.alignment.methods import score_batch
from mopl.conditioning import HyperPrompt, HyperPromptModel
from mopl.language_models.collate import ListCollator, to_lists
from mopl.language_models.generate import generate
from mopl.language_models.tokenization import TokenizedList

RIGHT, REFUSED, WRONG, ERROR = "right", "refused", "wrong", "error"
# Of a difference in a sum of log-probabilities, in nats. Rounding gives 1e-5, a neighbour's token whole nats.
TOLERANCE = 2e-3
NEW_TOKENS = 6
FRONT = [11, 23, 42]  # whose embeddings are the virtual tokens
FIRST_TOKEN, LAST_TOKEN = 7, 90  # between special tokens, at the start, and image tokens and the like, at the end
_PACKAGE = str(Path(mopl.__file__).parent)


@dataclass(frozen=True)
class Outcome:
    """What became of a check: `kind` and, unless it is right, why or by how much."""

    kind: str
    detail: str = ""


def compared(value: Tensor, expected: Tensor) -> Outcome:
    """Compare log-probabilities in nats, or tokens."""
    if value.shape != expected.shape:
        return Outcome(WRONG, f"shape {tuple(value.shape)} in place of {tuple(expected.shape)}")
    difference = float((value.double() - expected.double()).abs().max())
    return Outcome(RIGHT) if difference <= TOLERANCE else Outcome(WRONG, f"by {difference:.3g}")


def run(check: Callable[[Any], Outcome], model: nn.Module) -> Outcome:
    """Run one check; exceptions become outcomes."""
    try:
        return check(model)
    except Exception as error:
        raised = traceback.extract_tb(error.__traceback__)[-1]
        words = " ".join(str(error).split())[:300]
        if raised.filename.startswith(_PACKAGE) and isinstance(error, (ValueError, RuntimeError, NotImplementedError)):
            return Outcome(REFUSED, words)
        return Outcome(ERROR, f"{type(error).__name__} in {Path(raised.filename).name}:{raised.lineno}: {words}")


# ---------------------------------------------------------------- the plain model


def lists(*, longest: int = 17) -> list[TokenizedList]:
    """Return lists of prompts with responses, whose rows have very different lengths."""
    draw = np.random.default_rng(0)
    lengths = [(5, (longest - 5, 2)), (2, (4, 9)), (7, (1, 3))]
    made = []
    for index, (prompt, responses) in enumerate(lengths):
        tokens = [draw.integers(FIRST_TOKEN, LAST_TOKEN, n).astype(np.int64) for n in (prompt, *responses)]
        made.append(_list(tokens[0], tokens[1:], index))
    return made


def _list(prompt: np.ndarray, responses: Sequence[np.ndarray], index: int) -> TokenizedList:
    labels = np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32)
    return TokenizedList(prompt=prompt, responses=tuple(responses), labels=labels, index=index)


@torch.no_grad()
def plain_score(model: Any, prompt: Sequence[int], response: Sequence[int]) -> float:
    """Return log p(response | prompt) from the logits of the model's own forward on this row alone."""
    row = torch.tensor([[*prompt, *response]])
    log_p = model(input_ids=row).logits[0].double().log_softmax(-1)
    place = torch.arange(len(prompt) - 1, row.shape[1] - 1)
    return float(log_p[place, row[0, len(prompt) :]].sum())


def plain_scores(model: Any, data: Sequence[TokenizedList], front: Sequence[int] = ()) -> Tensor:
    """Return the scores (B, K) of all responses, each row alone behind the tokens `front`."""
    return torch.tensor(
        [[plain_score(model, [*front, *item.prompt], response) for response in item.responses] for item in data]
    )


@torch.no_grad()
def plain_greedy(model: Any, prompt: Sequence[int]) -> list[int]:
    """Return the most probable next tokens, one by one, without a cache."""
    tokens = list(prompt)
    for _ in range(NEW_TOKENS):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


# ---------------------------------------------------------------- scores


def scores(model: Any) -> Outcome:
    """Rows of one batch, padded on the right."""
    data = lists()
    expected = plain_scores(model, data)
    return compared(score_batch(fuse(model), ListCollator()(data)), expected)


def left_padding(model: Any) -> Outcome:
    """The same, padded on the left, with and without position_ids."""
    data = lists()
    expected = plain_scores(model, data)
    batch = ListCollator(padding_side="left")(data)
    without = {name: value for name, value in batch.inputs.items() if name != "position_ids"}
    fuse(model)
    found = compared(to_lists(score_sequences(model, without).scores, batch), expected)
    return found if found.kind != RIGHT else compared(score_batch(model, batch), expected)


def packing(model: Any) -> Outcome:
    """The same, in one row without padding."""
    data = lists()
    expected = plain_scores(model, data)
    return compared(score_batch(fuse(model), ListCollator(packed=True)(data)), expected)


# ---------------------------------------------------------------- virtual tokens


def with_prompt(model: Any) -> HyperPromptModel:
    """Return a model behind virtual tokens that are the embeddings of `FRONT`."""
    hidden = model.get_input_embeddings().weight.shape[1]
    prompted = HyperPromptModel(fuse(model), HyperPrompt(2, len(FRONT), 2, hidden)).eval()
    prompted.set_prefix_from_tokens(FRONT)
    return prompted


def _prompted_scores(model: Any, collator: ListCollator) -> Outcome:
    data = lists()
    expected = plain_scores(model, data, FRONT)
    return compared(score_batch(with_prompt(model), collator(data), torch.tensor([0.3, 0.7])).detach(), expected)


def prompts(model: Any) -> Outcome:
    """Virtual tokens in front of rows that are padded on the right."""
    return _prompted_scores(model, ListCollator())


def prompts_left(model: Any) -> Outcome:
    """Virtual tokens in front of rows that are padded on the left."""
    return _prompted_scores(model, ListCollator(padding_side="left"))


def prompts_packed(model: Any) -> Outcome:
    """Virtual tokens in front of each sequence of a packed row."""
    return _prompted_scores(model, ListCollator(packed=True))


# ---------------------------------------------------------------- generation


def tokenizer() -> Any:
    """Return a tokenizer whose words name the tokens' numbers."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    from bench.families.models import VOCABULARY

    words = {_word(i): i for i in range(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token=_word(3)))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": _word(0), "eos_token": _word(2), "unk_token": _word(3)}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def _word(token: int) -> str:
    return f"w{token:02}"


_PROMPTS = [[31, 8, 55, 61, 12, 77, 19], [40, 9], [64, 64, 17, 30]]


def _answers(model: Any, weights: Any, front: Sequence[int], plain: Any) -> Outcome:
    expected = [plain_greedy(plain, [*front, *prompt]) for prompt in _PROMPTS]
    texts = [" ".join(map(_word, prompt)) for prompt in _PROMPTS]
    found = generate(model, tokenizer(), texts, weights, max_new_tokens=NEW_TOKENS, template="plain")
    for answer, tokens in zip(found, expected, strict=True):
        if list(answer.tokens) != tokens[: len(answer.tokens)] or (
            len(answer.tokens) < NEW_TOKENS and not answer.finished
        ):
            return Outcome(WRONG, f"{list(answer.tokens)} in place of {tokens}")
    return Outcome(RIGHT)


def generation(model: Any) -> Outcome:
    """Greedy answers of the plain model to prompts of several lengths at once."""
    return _answers(model, None, (), model)


def prompts_generation(model: Any) -> Outcome:
    """Greedy answers behind virtual tokens."""
    return _answers(with_prompt(model), [0.3, 0.7], FRONT, model)


CHECKS: dict[str, Callable[[Any], Outcome]] = {
    "scores": scores,
    "left": left_padding,
    "packing": packing,
    "prompts": prompts,
    "prompts-left": prompts_left,
    "prompts-packed": prompts_packed,
    "generation": generation,
    "prompts-generation": prompts_generation,
}
