r"""What a chat template ends a turn of the assistant with.

A template's own end (`<end_of_turn>`, `<|im_end|>`, `<|eot_id|>`, ...) is often not the tokenizer's `eos_token`. It is
found by writing a conversation and reading what follows the answer, as it stands in training data:

    ... <|assistant|>\nANSWER<|end|>\n<|endoftext|>      the first token after the answer that is no text: <|end|>
    ... [/INST] ANSWER ###END                            no such token: the text itself, "###END"
    ... Assistant: ANSWER                                nothing: only the end-of-sequence token ends a response
"""

from __future__ import annotations

from typing import Any

from mopl.language_models.data import RowError

QUESTION, ANSWER, NEXT = "Qk7question", "Qk7answer", "Qk7next"  # words that templates neither cut nor look for


def template_end(encoder: Any) -> int | str | None:
    """Return the token, or the text, that the chat template writes at the end of an answer; None if there is none.

    Args:
        encoder: a `ListTokenizer` with a chat template.
    """
    question, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
    try:
        tail = encoder._write([question, answer]).rpartition(ANSWER)[2]
        found = _first_mark(encoder, tail)
        if found is not None or tail.strip():
            return _text_end(encoder, tail.strip()) if found is None else found
        # Some templates write the end only where another turn follows, and then its opening.
        following = encoder._write([question, answer, {"role": "user", "content": NEXT}])
        between = following.rpartition(ANSWER)[2].partition(NEXT)[0]
        opening = encoder._write([question]).partition(QUESTION)[0]
    except RowError:  # a template that writes no answers has no end of one
        return None
    return None if opening.endswith(between) else _first_mark(encoder, between)


def _first_mark(encoder: Any, text: str) -> int | None:
    """Return the first token of a text that is no text: a special or an added one, but white space."""
    tokenizer = encoder.tokenizer
    marks = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())} - {tokenizer.unk_token_id}
    return next((int(t) for t in encoder._encode(text) if int(t) in marks and tokenizer.decode([int(t)]).strip()), None)


def _text_end(encoder: Any, text: str) -> int | str | None:
    tokens = encoder._encode(text).tolist()
    if encoder.tokenizer.unk_token_id in tokens:
        return None  # no model can write it
    return tokens[0] if len(tokens) == 1 else text
