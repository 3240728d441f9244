"""How the tokens of rows are chosen that are generated together, each in its own way.

`generate` of transformers knows one temperature, one seed and one length for a batch. Here it decodes greedily, and a
logits processor, the last in its list, has chosen before: it leaves one possible token for each row. A row draws from a
stream of numbers of its own (Philox, keyed by seed and place in the request), by the inverse of its cumulative
distribution, so its draws do not depend on what else is in the batch. (Scores do in their last digits, as matrices of
other sizes are multiplied in another order; a draw within that distance of the border between two tokens may differ.)
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopl._extras import require
from mopl.serving.rows import Row, Sampling, Scored

require("transformers", what="serving")
from transformers import LogitsProcessor, StoppingCriteria  # noqa: E402


class Chooser(LogitsProcessor):
    """Leaves each row one possible token, and notes its log-probability where that is asked for.

    Log-probabilities are those of the model, at the trade-off and scale of the row, after what its generation_config
    does to scores: before bias, penalties and temperature of the request, or where it asks so, of what it draws from.

    Args:
        rows: The B rows that are generated together.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows, self._step = rows, 0
        self._told = [list(row.tokens) for row in rows]  # of an attempt that failed: these stay what they are
        self._draws = [_stream(row.sampling.seed, row.index) for row in rows]
        for draws, told in zip(self._draws, self._told, strict=True):
            draws.random(len(told))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, L), (B, V) -> (B, V)
        """Return scores of which only the chosen token's is not -inf."""
        told = [i for i, tokens in enumerate(self._told) if self._step < len(tokens)]
        live = [i for i, row in enumerate(self._rows) if i not in told and not row.ended and not row.cancelled]
        if bool(scores[live].isnan().any()):
            raise FloatingPointError("the model gives NaN for the next token; its parameters are damaged")
        changed = self._changed(scores, live)
        chosen = changed.argmax(-1)
        drawn = [i for i in live if self._rows[i].sampling.temperature > 0]
        if drawn:
            uniform = torch.tensor([self._draws[i].random() for i in drawn], dtype=torch.float64, device=scores.device)
            chosen[drawn] = sampled(changed[drawn], [self._rows[i].sampling for i in drawn], uniform)
        for i in told:
            chosen[i] = self._told[i][self._step]
        self._step += 1
        for i in live:
            how = self._rows[i].sampling
            told = narrowed(changed[i : i + 1], [how])[0] if how.processed else scores[i]
            self._rows[i].scored = _scored(told, chosen[i], how.top_log_probs)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen[:, None], 0.0)

    def _changed(self, scores: Tensor, live: Sequence[int]) -> Tensor:
        """Return scores (B, V) with the bias and the penalties of each row."""
        changed = scores
        for i in live:
            how, counts = self._rows[i].sampling, self._rows[i].counts
            amounts = dict(how.logit_bias)
            if how.presence_penalty or how.frequency_penalty:
                for token, count in counts.items():
                    penalty = how.presence_penalty + how.frequency_penalty * count
                    amounts[token] = amounts.get(token, 0.0) - penalty
            if amounts:
                changed = scores.clone() if changed is scores else changed
                changed[i, list(amounts)] += torch.tensor(list(amounts.values())).to(changed)
        return changed


class Watcher(StoppingCriteria):
    """Hands each row its new token, and says which rows have ended; tokens that a row has it does not get again."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows, self._step = rows, 0
        self._had = [len(row.tokens) for row in rows]

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # (B, L) -> (B,) bool
        """Return whether each row has ended."""
        self._step += 1
        ended = [
            row.ended or row.cancelled or (self._step > had and row.push(token))
            for row, token, had in zip(self._rows, input_ids[:, -1].tolist(), self._had, strict=True)
        ]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


def sampled(scores: Tensor, how: Sequence[Sampling], uniform: Tensor) -> Tensor:  # (R, V), R, (R,) -> (R,)
    """Return tokens drawn from scores, each row by its temperature, top_k and top_p, with uniform numbers in [0, 1)."""
    cumulative = narrowed(scores, how).softmax(-1).cumsum(-1)
    # The first token at which the cumulative mass is above the number: never one without mass.
    return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]


def narrowed(scores: Tensor, how: Sequence[Sampling]) -> Tensor:  # (R, V), R -> (R, V)
    """Return scores in float64 over the temperature of each row, -inf where its top_k or top_p leaves a token out.

    The most probable tokens are cut to top_k first and then, of what is left, to the fewest whose mass is top_p.
    """

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=scores.device)[:, None]

    wide = scores.double()
    wide = (wide - wide.amax(-1, keepdim=True)) / column([each.temperature for each in how])
    if any(each.top_k or each.top_p < 1 for each in how):
        size = scores.shape[-1]
        ordered, places = wide.sort(stable=True, dim=-1, descending=True)
        rank = torch.arange(size, device=scores.device)
        ordered = ordered.masked_fill(rank >= column([each.top_k or size for each in how]), -torch.inf)
        mass = ordered.softmax(-1)
        # A token stays if those before it have less than top_p; the first always does.
        left = (mass.cumsum(-1) - mass < column([each.top_p for each in how])) | (rank == 0)
        wide = torch.full_like(wide, -torch.inf).scatter_(-1, places, ordered.masked_fill(~left, -torch.inf))
    return wide


def _scored(scores: Tensor, chosen: Tensor, top: int | None) -> Scored | None:  # (V,), ()
    if top is None:
        return None
    log_probs = scores.double().log_softmax(-1)
    values, tokens = log_probs.topk(min(top, len(log_probs)))
    return Scored(int(chosen), float(log_probs[chosen]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))


def _stream(seed: int | None, index: int) -> np.random.Generator:
    """Return the uniform numbers of one answer of a request."""
    number = secrets.randbits(64) if seed is None else seed % 2**64
    return np.random.Generator(np.random.Philox(key=np.array([number, index], dtype=np.uint64)))
