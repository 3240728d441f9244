"""How a prompt and a response are written for a sequence classifier: one copy for training it and for asking it.

* `"text"`: the response alone;
* `"pair"`: prompt and response as the tokenizer's two texts, as cross-encoders see them;
* `"chat"`: prompt and response as a conversation in the tokenizer's chat template.

A model that `mopl.integrations.scorers` trains has the way in its configuration, and how long sequences may be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mopl._arguments import check_choice
from mopl._restoring import evaluating, generators_kept
from mopl._rows import lengths_that_turn
from mopl._sharded import is_dtensor, is_partitioned

INPUTS = ("text", "pair", "chat")
# Families that let padding into the text, or read it, on either side.
_NEITHER_SIDE = ("convbert", "fnet", "nystromformer", "perceiver", "reformer", "t5gemma", "t5gemma2", "yoso")
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

    def rows(self, written: Sequence[tuple[str, ...]]) -> list[dict[str, list[int]]]:
        """Return the tokens of each text; one without any is the tokenizer's end-of-sequence token.

        Raises:
            ValueError: If a text has no token, and there is no such token.
        """
        if not written:
            return []
        made = self.tokens(written)
        rows = [{key: list(made[key][place]) for key in made} for place in range(len(written))]
        for place, row in enumerate(rows):
            if not row["input_ids"]:
                if (end := self.tokenizer.eos_token_id) is None:
                    raise ValueError(
                        f"text {place + 1} has no token, and the tokenizer no eos_token that would stand for it; set "
                        "one, or pass inputs='pair'"
                    )
                row.update({key: [end if key == "input_ids" else int(key == "attention_mask")] for key in row})
        return rows

    def padded(self, rows: Sequence[Mapping[str, list[int]]]) -> Any:
        """Return the batch of rows as tensors, padded on the tokenizer's side."""
        known = getattr(self.tokenizer, "deprecation_warnings", {})  # transformers prefers to pad as it writes
        known["Asking-to-pad-a-fast-tokenizer"] = True
        return self.tokenizer.pad([dict(row) for row in rows], padding=True, return_tensors="pt")


def turns_within(model: Any, length: int) -> bool:
    """Say whether some texts of at most `length` tokens change the rotary positions of shorter ones beside them.

    Raises:
        ValueError: If they do so of texts in later calls, too.
    """
    kinds = {kind: limit for kind, limit in lengths_that_turn(model) if length > limit}
    if "dynamic" in kinds:
        raise ValueError(
            f"max_length is {length} but {type(model).__name__} has rotary positions of the kind 'dynamic', whose "
            f"frequencies are others for all texts once one is longer than {kinds['dynamic']} tokens; pass "
            f"max_length={kinds['dynamic']} at most"
        )
    return bool(kinds)


def check_alike(model: Any, padded: bool, length: int, mini_batch_size: int | None) -> None:
    """Raise where a training would give texts other scores in a batch than they have alone.

    Args:
        model: The classifier.
        padded: What `settle_padding` said of it.
        length: Tokens that texts are cut to.
        mini_batch_size: Texts of one forward pass; one alone has no padding.

    Raises:
        ValueError: If it would.
    """
    turns, name = turns_within(model, length), type(model).__name__
    if mini_batch_size == 1:
        return
    if not padded:
        raise ValueError(
            f"{name} gives a text other scores beside a longer one than alone, for padding changes what it reads of "
            "the text, whichever side it is on (some families, and PEFT's prompts in front of decoders); pass "
            "mini_batch_size=1, or take a model of another family, or LoRA"
        )
    if turns:
        limit = dict(lengths_that_turn(model))["longrope"]
        raise ValueError(
            f"max_length is {length} but {name} has rotary positions of the kind 'longrope', whose frequencies are "
            f"others for all texts of a batch once one is longer than {limit} tokens; pass max_length={limit} at most, "
            "or mini_batch_size=1"
        )


def settle_padding(model: Any, tokenizer: Any) -> bool:
    """Let a tokenizer pad on the side on which a classifier gives a row what it gives it alone.

    Many classifiers read the first token of a row, or count positions from the left edge, whatever the mask says; a few
    read the last, or let padding into the text on either side (ConvBERT, FNet, Nystromformer, Yoso, Reformer, T5Gemma).
    The tokenizer's own side stays unless two short rows show that it is wrong and the other is right.

    Args:
        model: A sequence-classification model of transformers, wrapped by PEFT or not. Its configuration, and that of
            its text part, is told the tokenizer's padding token, by which decoders find the last token of a row.
        tokenizer: Its tokenizer; `padding_side` may change.

    Returns:
        Whether rows of different lengths may stand in one batch: neither side is known to be wrong.
    """
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id
    sides = [tokenizer.padding_side, "left" if tokenizer.padding_side == "right" else "right"]
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    kind = getattr(model.config, "model_type", "")
    if weight is None:
        return kind not in _NEITHER_SIDE
    found: dict[str, float] = {}
    if not weight.is_meta and not any(is_dtensor(p) or is_partitioned(p) for p in model.parameters()):
        with evaluating(model), generators_kept(), torch.no_grad():
            with contextlib.suppress(Exception):  # it needs more than tokens and a mask; its first batch says what
                found = _off_by(model, tokenizer, sides, embedding)
    if not found:  # by what is known of the families
        tokenizer.padding_side = "left" if kind == "xlnet" else "right"
        return kind not in _NEITHER_SIDE
    own, other = (found[side] for side in sides)
    if own > 0.04 and other < own / 4:  # where it is rounding after all, the other side is as right
        tokenizer.padding_side = sides[1]
    return min(own, other) <= 1 and kind not in _NEITHER_SIDE


def _off_by(model: Any, tokenizer: Any, sides: list[str], embedding: Any) -> dict[str, float]:
    """Return how far the outputs of a row that is padded are from those alone, in units of what rounding explains.

    Nothing where all rows have the same outputs, such as those of a head that begins at 0.
    """
    device, eps = embedding.weight.device, torch.finfo(embedding.weight.dtype).eps
    special = set(tokenizer.all_special_ids)
    plain = [token for token in range(min(len(embedding.weight), len(tokenizer))) if token not in special]
    order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(0)).tolist()
    tokens = [plain[place] for place in order[:64]]
    # Much padding, for what a few positions change may be little: as much as the model has positions for.
    length = min(len(tokens), longest_input(model.config, tokenizer) // 2)
    end = model.config.eos_token_id if getattr(model.config, "is_encoder_decoder", False) else tokenizer.eos_token_id
    ends = [] if end is None else [end[0] if isinstance(end, list) else end]
    rows = [[*tokens[:length], *ends], [*tokens[::-1][: max(length // 4, 1)], *ends]]
    space = len(rows[0]) - len(rows[1])
    pad, none, kept = [tokenizer.pad_token_id] * space, [0] * space, [1] * len(rows[1])

    def outputs(ids: list[list[int]], mask: list[list[int]] | None = None) -> Tensor:
        mask = [[1] * len(row) for row in ids] if mask is None else mask
        given = {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}
        logits = model(**given).logits
        if logits.ndim != 2:
            raise ValueError("outputs of tokens and not of rows")
        return logits.double().cpu()

    def rounded(module: Any, inputs: Any, output: Tensor) -> Tensor:
        share = torch.randint(-1, 2, output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        return output * (1 + eps * share)

    alone = torch.cat([outputs([row]) for row in rows])
    if not (scale := float((alone[0] - alone[1]).abs().max())) > 0:
        return {}
    handle = embedding.register_forward_hook(rounded)
    try:
        noise = max(float((outputs([row] * 4) - one).abs().max()) for row, one in zip(rows, alone, strict=True))
    finally:
        handle.remove()
    allowed = max(scale * max(eps**0.6, 2e-3), 8 * noise)
    found = {}
    for side in sides:
        ids = [rows[0], pad + rows[1] if side == "left" else rows[1] + pad]
        mask = [[1] * len(rows[0]), none + kept if side == "left" else kept + none]
        found[side] = float((outputs(ids, mask) - alone).abs().max()) / allowed
    return found


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
