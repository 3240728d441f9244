"""What is served: a tuned model with its tokenizer, and the trade-offs at which it can be asked."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mopl._arguments import check_positive
from mopl._counted import counted, there_are
from mopl.conditioning import TextPrompt, WeightedModel, check_weights, weights_name
from mopl.conditioning.references import Reference
from mopl.conditioning.weighted import causal_lm_of, reads_left_padding
from mopl.language_models.generate import generate
from mopl.language_models.guiding import check_guided
from mopl.language_models.models import positions_of, vocabulary_of
from mopl.language_models.tokenization import ListTokenizer
from mopl.language_models.turns import TurnEnds, end_tokens, turn_ends
from mopl.serving.rows import Detokenizer, Row, TradeOff

MOST_SCALE = 1e6  # of c, 1/c and β: far beyond what has a meaning, far from where float32 ends
SAME = 1e-6  # weights that differ by less are the same: names have six digits

# What a model's generation_config does to scores is obeyed, row by row, as `generate` does. These do more, with the
# values that do nothing: they decode otherwise, end all rows at once, or hand back something else.
_REFUSED: dict[str, Any] = {
    "num_beams": 1, "num_beam_groups": 1, "penalty_alpha": 0, "guidance_scale": 1, "dola_layers": None, "use_mtp": None,
    "prompt_lookup_num_tokens": None, "assistant_early_exit": None, "constraints": None, "force_words_ids": None,
    "token_healing": None, "watermarking_config": None, "forced_eos_token_id": None, "stop_strings": None,
    "max_time": None, "return_dict_in_generate": None,
}  # fmt: skip
# These look at all tokens, those that a row is padded with too, so only rows of one length go together.
_READ_PADDING = ("min_length", "no_repeat_ngram_size", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size")


@dataclass(frozen=True)
class Form:
    """One way in which prompts are written, and where the answers to them end."""

    encoder: ListTokenizer
    ends: TurnEnds


class ServedModel:
    """A model that answers requests.

    Args:
        model: As `mopl.language_models.generate.generate` takes it, or a mixture that decodes one trade-off at a time.
        encoder: How conversations become tokens, as in training.
        objectives: Names of the m objectives.
        name: What requests call the model.
        weights: w (m,) of requests that name none; by default all equal.
        beta: β (m,) of requests that name none, of a model conditioned on it.
        text_prompt: Writes the weights in front of prompts, as of `generate`.
        reference: The model that is p0, where the model is not its own.
        guided_model: A larger model of the same tokenizer that answers in the model's place, guided by it.
        kl_weight: α at which a mixture is asked whose coefficients depend on it.
        takes_weights: Whether the model is to be called with weights.
        fixed: Whether it has one trade-off, `weights`, and no other.

    Raises:
        ValueError: If weights or beta do not fit, `guided_model` cannot be guided by the model, or the model's
            generation_config asks for what rows that are answered together cannot have.
    """

    def __init__(
        self,
        model: Any,
        encoder: ListTokenizer,
        objectives: Sequence[str],
        *,
        name: str,
        weights: Sequence[float] | None = None,
        beta: Sequence[float] | None = None,
        text_prompt: TextPrompt | None = None,
        reference: nn.Module | None = None,
        guided_model: nn.Module | None = None,
        kl_weight: float | None = None,
        takes_weights: bool = True,
        fixed: bool = False,
    ) -> None:
        weighted = isinstance(model, WeightedModel)
        takes_kl_weight = weighted and model.takes_kl_weight
        if takes_kl_weight and kl_weight is None:
            raise ValueError("kl_weight is missing: the model is conditioned on it; pass the one to answer at")
        self.model, self.name, self.objectives = model, name, tuple(objectives)
        self.text_prompt, self.kl_weight = text_prompt, kl_weight
        self.reference, self.guided_model = reference, guided_model
        self.takes_weights, self.fixed = takes_weights, fixed
        # Such a model is switched to one trade-off, for which it is a plain model then.
        self.one_at_a_time = weighted and (not model.decodes_rows or takes_kl_weight)
        teller = model if weighted else text_prompt  # who says what the model is told
        self.takes_beta = teller is not None and teller.takes_beta
        config = causal_lm_of(model).generation_config
        for option, idle in _REFUSED.items():
            if (value := getattr(config, option, None)) not in (None, False, idle):
                raise ValueError(
                    f"the model's generation_config has {option}={value!r:.80}, which does not go with answers that "
                    "run together; take it out of the generation_config.json beside the model"
                )
        self._by_length = any(getattr(config, option, None) for option in _READ_PADDING)
        tokenizer = encoder.tokenizer
        self.tokenizer, self.detokenizer = tokenizer, Detokenizer(tokenizer)
        raw = ListTokenizer(tokenizer, max_length=None, template="plain", append_eos=False)
        self.chat, self.plain = self._form(encoder), self._form(raw)
        models = [each for each in (model, reference, guided_model) if each is not None]
        limits = [positions_of(causal_lm_of(each)) for each in models]
        self.positions = min((limit for limit in limits if limit is not None), default=None)
        sizes = [len(tokenizer), *(vocabulary_of(causal_lm_of(each)) for each in models)]
        self.vocabulary = min(size for size in sizes if size is not None)  # tokens that all of them know
        self._pads = all(reads_left_padding(each) for each in models)
        self.virtual_tokens = model.virtual_tokens if weighted else 0
        self.can_scale = self._has_reference()
        if guided_model is not None:
            check_guided(guided_model, None, model, tokenizer)
            if not self.can_scale:
                raise ValueError("guided_model needs what training changed, but the model has no reference; pass one")
        if beta is not None and not self.takes_beta:
            raise ValueError("beta was passed but the model is not conditioned on it; leave it out")
        equal = [1 / len(self.objectives)] * len(self.objectives)
        self.beta = None if beta is None else self._each(beta, "beta")
        self.weights = self._weights(equal if weights is None else weights)

    def _form(self, encoder: ListTokenizer) -> Form:
        ends = turn_ends(encoder, causal_lm_of(self.model).generation_config)
        if self.guided_model is not None:  # an answer ends where either model ends one
            more = end_tokens(causal_lm_of(self.guided_model).generation_config)
            ends = replace(ends, ids=tuple(dict.fromkeys([*ends.ids, *more])))
        return Form(encoder, ends)

    def _has_reference(self) -> bool:
        if self.reference is None and self.one_at_a_time:  # what `at` gives is a plain model
            return False
        try:
            Reference(self.model, self.reference)
        except ValueError:
            return False
        return True

    # ---------------------------------------------------------------- trade-offs

    def trade_off(
        self, weights: Any = None, scale: float | None = None, beta: Any = None, kl_weight: float | None = None
    ) -> TradeOff:
        """Return the trade-off of a request, checked.

        Args:
            weights: (m,) in the order of the objectives, or numbers by name; None: those of the model.
            scale: c > 0; None: 1.
            beta: β, as weights; None: that of the model.
            kl_weight: α of a mixture conditioned on it; None: that of the model.

        Returns:
            A `TradeOff` with weights and β in the order of the objectives.

        Raises:
            ValueError: If the model cannot answer there; the message begins with what is wrong.
        """
        w = self.weights if weights is None else self._weights(weights)
        if self.fixed and max(abs(a - b) for a, b in zip(w, self.weights, strict=True)) > SAME:
            raise ValueError(
                f"weights are {weights_name(w, prefix='')} but this model has one trade-off, "
                f"{weights_name(self.weights, prefix='')}, at which it was started; leave weights out"
            )
        if beta is not None and not self.takes_beta:
            raise ValueError("beta was passed but the model is not conditioned on it; leave it out, or pass scale")
        betas = self.beta if beta is None else self._each(beta, "beta")
        if self.takes_beta and betas is None:
            raise ValueError(f"beta is missing; pass one number for each of {', '.join(self.objectives)}")
        c = 1.0 if scale is None else float(check_positive(scale, "scale", "above 1 is closer to the reference"))
        moved = c * (sum(betas) if betas else 1)
        if not 1 / MOST_SCALE <= moved <= MOST_SCALE:
            name, times = ("beta", "its sum") if c == 1 else ("scale", "it times the sum of beta" if betas else "it")
            raise ValueError(f"{name}: {times} is {moved:g} but must be from {1 / MOST_SCALE:g} to {MOST_SCALE:g}")
        if moved != 1 and not self.can_scale:
            raise ValueError(
                f"scale is {c:g} but the model has no reference here to move to; leave scale out"
                + (", and pass a beta that sums to 1" if betas else "")
            )
        if kl_weight is not None and self.kl_weight is None:
            raise ValueError("kl_weight was passed but the model is not conditioned on it; leave it out, or pass scale")
        return TradeOff(w, c, betas, self.kl_weight if kl_weight is None else self._alpha(kl_weight))

    def _alpha(self, kl_weight: float) -> float:
        """Return α if the model was trained for it, or for a smaller and a larger one."""
        alpha, trained = float(check_positive(kl_weight, "kl_weight")), self.model.record.beta
        several = isinstance(trained, (list, tuple))
        if several and not min(trained) * (1 - SAME) <= alpha <= max(trained) * (1 + SAME):  # it may come as float32
            raise ValueError(
                f"kl_weight is {alpha:g} but the model was trained for those from {min(trained):g} to {max(trained):g}"
            )
        return alpha

    def _weights(self, given: Any) -> tuple[float, ...]:
        weights = self._in_order(given, "weights")
        if len(weights) != len(self.objectives):
            names = ", ".join(self.objectives)
            raise ValueError(f"weights has {counted(len(weights), 'number')}; give one for each of {names}")
        return tuple(check_weights(weights, len(self.objectives)).tolist())

    def _each(self, given: Any, name: str) -> tuple[float, ...]:
        values = check_positive(torch.as_tensor(self._in_order(given, name), dtype=torch.float64), name)
        if values.shape != (len(self.objectives),):
            many = f"{counted(values.numel(), 'number')} but {there_are(len(self.objectives), 'objective')}"
            raise ValueError(f"{name} has {many}")
        if not bool(((values >= 1 / MOST_SCALE) & (values <= MOST_SCALE)).all()):
            shown = ", ".join(f"{value:g}" for value in values.tolist())
            raise ValueError(f"{name} is ({shown}) but each must be from {1 / MOST_SCALE:g} to {MOST_SCALE:g}")
        return tuple(values.tolist())

    def _in_order(self, given: Any, name: str) -> list[float]:
        if not isinstance(given, Mapping):
            return list(given)
        if wrong := sorted(set(given) ^ set(self.objectives)):
            what = "is missing" if wrong[0] in self.objectives else "is no objective"
            raise ValueError(f"{name}: {wrong[0]!r} {what}; give one number for each of {', '.join(self.objectives)}")
        return [given[objective] for objective in self.objectives]

    # ---------------------------------------------------------------- rows

    def length(self, prompt: Sequence[int], at: TradeOff) -> int:
        """Return how many positions a prompt takes, with what the model puts in front of it.

        Args:
            prompt: Its tokens.
            at: The trade-off, which some models write in front.
        """
        tokens, beta = list(prompt), None if at.beta is None else torch.tensor(at.beta)
        w = torch.tensor(at.weights, dtype=torch.float64)
        if self.text_prompt is not None:
            tokens = self.text_prompt.prepend_ids(tokens, w, self.tokenizer, beta)
        elif isinstance(self.model, WeightedModel):
            tokens = self.model.write_weights(tokens, w, beta)
        return len(tokens) + self.virtual_tokens

    def most_rows(self, wanted: int) -> int:
        """Return how many rows are answered together: one where prompts cannot be padded on the left.

        Args:
            wanted: The most otherwise.
        """
        return wanted if self._pads else 1

    def group(self, row: Row) -> Any:
        """Return what rows that are answered together have in common: a value to compare.

        Args:
            row: One of them.
        """
        # One scaled row has the reference run for all, and penalties of the model's own configuration left out.
        scaled = self.guided_model is None and row.at.scale * sum(row.at.beta or (1,)) != 1
        one = (row.at.weights, row.at.kl_weight) if self.one_at_a_time else None
        return row.form.encoder is self.chat.encoder, scaled, one, row.positions if self._by_length else None

    def generate(self, rows: Sequence[Row], choose: Any, watch: Any) -> None:
        """Answer rows of one group, in one call of `mopl.language_models.generate.generate`.

        Args:
            rows: The rows, for which `group` is the same.
            choose: A logits processor that gives each row its next token.
            watch: A stopping criterion that hands the tokens to the rows and says which have ended.
        """
        weights: Any = [row.at.weights for row in rows] if self.takes_weights else None
        beta: Any = [row.at.beta for row in rows] if self.takes_beta else None
        with contextlib.ExitStack() as stack:
            model = self.model
            if self.one_at_a_time:
                model, weights = stack.enter_context(model.at(rows[0].at.weights, rows[0].at.kl_weight)), None
            generate(
                model, rows[0].form.encoder, [row.prompt for row in rows], weights, beta=beta,
                scale=[row.at.scale for row in rows], reference=self.reference, guided_model=self.guided_model,
                text_prompt=self.text_prompt,
                max_new_tokens=max(row.max_tokens for row in rows), batch_size=len(rows), num_beams=1,
                do_sample=False, logits_processor=[choose], stopping_criteria=[watch],
            )  # fmt: skip
