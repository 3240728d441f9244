"""Conditioning by words: the trade-off written into the prompt.

The plainest way to condition a language model, and the one that needs nothing of the software that serves it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, Literal

from torch import Tensor

from mopl._arguments import check_beta_given, check_choice, check_positive
from mopl._counted import counted
from mopl._renamed import renamed_attribute, renamed_in_methods
from mopl.conditioning.sampling import check_weights

Message = Mapping[str, Any]
Numbers = Tensor | Sequence[float]
PLACEMENTS = ("system", "user")
_BETAS = ("betas", "temperatures")  # fields of a template; the second is what files of older releases say


@renamed_in_methods("render", "apply", "prepend_ids", temperature="beta")
@dataclass(frozen=True)
class TextPrompt:
    """Writes weights of objectives, and on request normalised betas, into a prompt.

    With the defaults, weights (0.7, 0.3) of helpful and harmless become the line `[helpful: 0.70, harmless: 0.30]`.

    Args:
        objectives: Names of the m objectives, in the order of the weights.
        template: What is put in front; `{weights}` stands for the list of names and numbers, `{betas}` for the same of
            β / ‖β‖₁, which makes `beta` a required argument (`{temperatures}`, its old name, is taken too).
        item: One entry of the list, with `{value}` and, if it is to be named, `{name}`.
        separator: What stands between entries.
        digits: Digits after the point. Vectors that agree to so many digits give the same prompt.
        placement: Where chat messages take it: in front of the system message, which is made if there is none, or in
            front of the first message of the user (for templates of models that know no system message).

    Raises:
        ValueError: If the template lacks `{weights}` or names an unknown field, or a setting is out of range.
    """

    objectives: tuple[str, ...]
    template: str = "[{weights}]\n"
    item: str = "{name}: {value}"
    separator: str = ", "
    digits: int = 2
    placement: Literal["system", "user"] = "system"

    def __post_init__(self) -> None:
        object.__setattr__(self, "objectives", tuple(self.objectives))
        if not self.objectives or len(set(self.objectives)) != len(self.objectives):
            raise ValueError(f"objectives are {self.objectives} but must be one or more different names")
        if self.digits < 0:
            raise ValueError(f"digits is {self.digits} but must be at least 0")
        check_choice(self.placement, PLACEMENTS, "placement")
        _check_fields(self.template, "template", required={"weights"}, optional=set(_BETAS))
        _check_fields(self.item, "item", required={"value"}, optional={"name"})

    @property
    def takes_beta(self) -> bool:
        """Whether the prompt also depends on β."""
        return not _fields(self.template).isdisjoint(_BETAS)

    temperature = renamed_attribute("TextPrompt.temperature", "takes_beta")

    def render(self, weights: Numbers, beta: Numbers | None = None) -> str:
        """Return the text of one trade-off.

        Args:
            weights: w, (m,) on the simplex.
            beta: β, (m,), positive; required if and only if the template has `{betas}`.

        Returns:
            The text that goes in front of a prompt.

        Raises:
            ValueError: If weights lie off the simplex, or shapes are wrong, or `beta` is missing or unexpected.
        """
        w = check_weights(weights, len(self.objectives))
        if w.ndim != 1:
            raise ValueError(f"weights has shape {tuple(w.shape)} but one prompt takes one vector (m,); loop over rows")
        check_beta_given(beta, self.takes_beta, "but the template has no {betas}")
        values = {"weights": self._list(w)}
        if beta is not None:
            each = check_positive(beta, "beta", "positive numbers, one for each objective").double()
            if each.shape != (len(self.objectives),):
                wanted = counted(len(self.objectives), "positive number")
                raise ValueError(f"beta is {each.tolist()} but must be {wanted}")
            values |= dict.fromkeys(_BETAS, self._list(each / each.sum()))
        return self.template.format(**values)

    def _list(self, numbers: Tensor) -> str:
        entries = zip(self.objectives, numbers.tolist(), strict=True)
        return self.separator.join(self.item.format(name=n, value=f"{x:.{self.digits}f}") for n, x in entries)

    def apply(
        self,
        prompt: str | Sequence[Message],
        weights: Numbers,
        beta: Numbers | None = None,
    ) -> Any:
        """Return a prompt with the trade-off written in front.

        Args:
            prompt: A text, or chat messages `{"role", "content"}`; content is a text or a list of parts of which the
                first of type "text" is taken.
            weights: As in `render`.
            beta: As in `render`.

        Returns:
            A text, or a new list of messages; the one that was passed is not changed.

        Raises:
            ValueError: As `render`; or if no message takes the text.
        """
        text = self.render(weights, beta)
        if isinstance(prompt, str):
            return text + prompt
        messages: list[dict[str, Any]] = [dict(message) for message in prompt]
        place = next((i for i, message in enumerate(messages) if message.get("role") == self.placement), None)
        if place is None:
            if self.placement == "user":
                raise ValueError("the messages have no message of role 'user' to write the weights into")
            # A message of its own needs no line that parts it from what follows.
            return [{"role": "system", "content": text.rstrip("\n")}, *messages]
        messages[place]["content"] = _prepend(text, messages[place].get("content"))
        return messages

    def prepend_ids(
        self,
        input_ids: Sequence[int] | Tensor,
        weights: Numbers,
        tokenizer: Any,
        beta: Numbers | None = None,
    ) -> list[int]:
        """Return the tokens of a prompt with those of the trade-off in front, after a token that begins the text.

        The two are tokenised apart, so no token reaches over the border and the prompt's own tokens stay as they are.

        Args:
            input_ids: (T,) tokens of one prompt.
            weights: As in `render`.
            tokenizer: A tokenizer of transformers.
            beta: As in `render`.

        Returns:
            The tokens, as a list.

        Raises:
            ValueError: As `render`, or if `input_ids` is not one row.
        """
        if isinstance(input_ids, Tensor) and input_ids.ndim != 1:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)} but must be (T,), one prompt; loop over rows"
            )
        ids = input_ids.tolist() if isinstance(input_ids, Tensor) else list(input_ids)
        extra = tokenizer(self.render(weights, beta), add_special_tokens=False)["input_ids"]
        bos = getattr(tokenizer, "bos_token_id", None)
        start = 1 if ids and bos is not None and ids[0] == bos else 0
        return [*ids[:start], *extra, *ids[start:]]


def _prepend(text: str, content: Any) -> Any:
    if isinstance(content, str):
        return text + content
    parts = [dict(part) for part in content or ()]
    for part in parts:
        if part.get("type") == "text":
            part["text"] = text + part["text"]
            return parts
    return [{"type": "text", "text": text}, *parts]


def _fields(template: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(template) if name is not None}


def _check_fields(template: str, name: str, *, required: set[str], optional: set[str]) -> None:
    fields = _fields(template)
    if not required <= fields <= required | optional:
        allowed = ", ".join(f"{{{field}}}" for field in sorted(required | optional))
        raise ValueError(
            f"{name} is {template!r} but must contain {', '.join(f'{{{f}}}' for f in sorted(required))} and no other "
            f"field than {allowed}; write {{{{ and }}}} for braces"
        )
