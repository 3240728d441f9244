"""How a prompt and a response are written for a sequence classifier: one copy for training it and for asking it.

* `"text"`: the response alone;
* `"pair"`: prompt and response as the tokenizer's two texts, as cross-encoders see them;
* `"chat"`: prompt and response as a conversation in the tokenizer's chat template.

A model that `mopl.integrations.scorers` trains has the way in its configuration, and how long sequences may be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mopl._arguments import check_choice
from mopl._restoring import evaluating, generators_kept
from mopl._sharded import is_dtensor, is_partitioned

INPUTS = ("text", "pair", "chat")
RECORD, LENGTH = "mopl_inputs", "mopl_max_length"  # names in a model's configuration


class SequenceWriter:
    """Writes prompts and responses as tokens.

    Args:
        tokenizer: A tokenizer of transformers. One without a padding token pads with its end-of-sequence token from
            here on.
        inputs: `"text"`, `"pair"` or `"chat"`.
        max_length: Tokens that a sequence is cut to: from the left for `"chat"`, so that the response stays, otherwise
            as the tokenizer is set.

    Raises:
        ValueError: If `inputs` is unknown or needs a chat template that is not there, or there is no token to pad with.
    """

    def __init__(self, tokenizer: Any, inputs: str, max_length: int) -> None:
        check_choice(inputs, INPUTS, "inputs")
        if inputs == "chat" and not getattr(tokenizer, "chat_template", None):
            raise ValueError("inputs is 'chat' but the tokenizer has no chat template; pass inputs='pair' or 'text'")
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise ValueError("the tokenizer has neither pad_token nor eos_token to pad with; set one and save it")
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer, self.inputs, self.max_length = tokenizer, inputs, max_length

    def text(self, response: Any, prompt: Any) -> tuple[str, ...]:
        """Return a prompt and a response, texts or chat messages, as the one or two texts that the tokenizer takes."""
        if self.inputs == "text":
            return (flat(response),)
        if self.inputs == "pair":
            return (flat(prompt), flat(response))
        conversation = [*_messages(prompt, "user"), *_messages(response, "assistant")]
        return (self.tokenizer.apply_chat_template(conversation, tokenize=False),)

    def tokens(self, written: Sequence[tuple[str, ...]], **options: Any) -> Any:
        """Return what the tokenizer makes of such texts; `options` are its own, such as `padding`."""
        columns = [list(column) for column in zip(*written, strict=True)]
        side = self.tokenizer.truncation_side
        if self.inputs == "chat":
            self.tokenizer.truncation_side = "left"
        try:
            return self.tokenizer(
                *columns,
                truncation=True,
                max_length=self.max_length,
                add_special_tokens=self.inputs != "chat",  # the chat template has written them
                **options,
            )
        finally:
            self.tokenizer.truncation_side = side


def settle_padding(model: Any, tokenizer: Any) -> None:
    """Let a tokenizer pad on the side on which a classifier gives a row what it gives it alone.

    Many classifiers read the first token of a row, or count positions from the left edge, whatever the mask says; a few
    read the last. The tokenizer's own side stays unless two short rows show that it is wrong and the other is right.

    Args:
        model: A sequence-classification model of transformers, whose config knows the padding token.
        tokenizer: Its tokenizer; `padding_side` may change.
    """
    sides = [tokenizer.padding_side, "left" if tokenizer.padding_side == "right" else "right"]
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    if weight is None:
        return
    if weight.is_meta or any(is_dtensor(p) or is_partitioned(p) for p in model.parameters()):
        if getattr(model.config, "model_type", "") != "xlnet":  # which alone reads the last token
            tokenizer.padding_side = "right"
        return
    with evaluating(model), generators_kept(), torch.no_grad():
        try:
            own, other = (_off_by(model, tokenizer, side, len(weight)) for side in sides)
        except Exception:  # it needs more than tokens and a mask; its first batch says what
            return
    if own > 0.05 and other < own / 4:
        tokenizer.padding_side = sides[1]


def _off_by(model: Any, tokenizer: Any, side: str, vocabulary: int) -> float:
    """Return how far the outputs of a row that is padded are from those alone, as a share of those of two rows."""
    special = set(tokenizer.all_special_ids)
    tokens = [token for token in range(vocabulary) if token not in special][-9:]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    long, short = [*tokens, *end], [*tokens[::-1][:4], *end]
    space, none = [tokenizer.pad_token_id] * (len(long) - len(short)), [0] * (len(long) - len(short))
    kept = [1] * len(short)
    rows = [long, space + short if side == "left" else short + space]
    mask = [[1] * len(long), none + kept if side == "left" else kept + none]

    def outputs(ids: list[list[int]], mask: list[list[int]]) -> Tensor:
        device = model.get_input_embeddings().weight.device
        given = {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}
        found = model(**given).logits
        if found.ndim != 2:
            raise ValueError("outputs of tokens and not of rows")
        return found.double().cpu()

    alone = torch.cat([outputs([row], [[1] * len(row)]) for row in (long, short)])
    scale = (alone[0] - alone[1]).abs().max().clamp(min=1e-6)
    return float((outputs(rows, mask) - alone).abs().max() / scale)


def longest_input(config: Any, tokenizer: Any) -> int:
    """Return how many tokens a model takes, at most 2048."""
    positions = getattr(config, "max_position_embeddings", None) or 2048
    # RoBERTa and its kin number positions from the padding token's id + 1, so fewer are left for text.
    if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert", "longformer"):
        positions -= config.pad_token_id + 1
    return int(min(positions, tokenizer.model_max_length, 2048))


def flat(text: Any) -> str:
    """Return a text as it is, and of chat messages what they say, a message a line."""
    if isinstance(text, str):
        return text
    return "\n".join(str(message.get("content") or "") for message in text)


def _messages(text: str | Sequence[Mapping[str, Any]], role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": text}] if isinstance(text, str) else [dict(message) for message in text]
