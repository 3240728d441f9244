"""Any sequence-classification model of transformers as a reward: reward models, toxicity or sentiment classifiers.

A model with several outputs, such as a reward model with a head for each objective, is several rewards that share one
forward pass: `classifier_rewards`, or `classifier:directory=DIR` where rewards are named.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mopl._arguments import check_choice
from mopl._extras import require
from mopl._hub import loading
from mopl.rewards.reward import Prompt, content_key
from mopl.rewards.writing import INPUTS, LENGTH, RECORD, SequenceWriter, longest_input, settle_padding, turns_within

REMEMBERED = 20_000  # texts whose outputs are kept for the other rewards of a model: more than a rollout has

Activation = Literal["none", "sigmoid", "softmax"]


class _Classifier:
    """A model with its tokenizer: all outputs of a text in one forward pass. Arguments as in `ClassifierReward`."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        name: str,
        inputs: str | None,
        max_length: int | None,
        batch_size: int,
        device: str | torch.device | None,
        dtype: torch.dtype | None,
    ) -> None:
        if inputs is not None:
            check_choice(inputs, INPUTS, "inputs")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size} but must be at least 1")
        if os.path.isfile(os.path.join(directory, "adapter_config.json")):
            raise ValueError(
                f"{directory} holds a PEFT adapter, whose base model does not know its outputs; save the whole model: "
                "RewardListTrainer.save_reward_model(directory), or model.merge_and_unload().save_pretrained(directory)"
            )
        require("transformers", what=f"the reward {name}")
        import transformers

        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype is None:
            dtype = torch.float32 if self.device.type == "cpu" else None
        with loading(str(directory), "classifier") as how:
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(directory), **how)
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                str(directory), dtype=dtype or "auto", **how
            )
        self.model: Any = model.to(self.device).eval().requires_grad_(False)
        config = self.model.config
        self.writer = SequenceWriter(tokenizer, inputs or getattr(config, RECORD, None) or "text", 0)
        self.padded = settle_padding(self.model, tokenizer)
        self.writer.max_length = max_length or getattr(config, LENGTH, None) or longest_input(config, tokenizer)
        self.padded &= not turns_within(self.model, self.writer.max_length)
        self.batch_size = batch_size
        self.names = {int(number): text for number, text in config.id2label.items()}
        self.shared = False  # whether several rewards ask for the same texts
        self._known: dict[bytes, Tensor] = {}

    def __call__(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> Tensor:
        """Return the outputs of B texts, float32 (B, outputs) on the CPU; what another reward asked for is there."""
        if not self.shared:
            return self._run(texts, prompts)
        keys = [content_key(prompt, text) for text, prompt in zip(texts, prompts, strict=True)]
        todo = list({key: place for place, key in enumerate(keys) if key not in self._known}.values())
        found = dict(self._known)
        if todo:
            rows = self._run([texts[place] for place in todo], [prompts[place] for place in todo])
            found |= {keys[place]: row for place, row in zip(todo, rows, strict=True)}
        self._known = dict(list(found.items())[-REMEMBERED:])
        return torch.stack([found[key] for key in keys]) if keys else torch.empty(0, len(self.names))

    @torch.inference_mode()
    def _run(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> Tensor:
        rows = self.writer.rows([self.writer.text(text, prompt) for text, prompt in zip(texts, prompts, strict=True)])
        lengths = [len(row["input_ids"]) for row in rows]
        values = torch.empty(len(rows), len(self.names))
        order = sorted(range(len(rows)), key=lengths.__getitem__)
        # Where padding would change a row's outputs, the rows of a batch are of one length.
        for _, group in itertools.groupby(order, lambda place: 0 if self.padded else lengths[place]):
            alike = list(group)
            for start in range(0, len(alike), self.batch_size):
                places = alike[start : start + self.batch_size]
                batch = self.writer.padded([rows[place] for place in places])
                values[places] = self.model(**batch.to(self.device)).logits.float().cpu()
        return values


class ClassifierReward:
    """One output of a sequence-classification model.

    A text has the output that it has alone. Of the few models that padding changes, whichever side it is on, the texts
    of a forward pass are of one length. A text without a token is seen as the tokenizer's end-of-sequence token.

    Args:
        directory: Of the model and its tokenizer (`save_pretrained`), or a name on the Hugging Face hub.
        name: Of the reward; default `"classifier"`.
        label: Which output: its number or its name in the model's `id2label`; needed if there are several.
        activation: `"none"` for the raw output, `"sigmoid"`, or `"softmax"` over the outputs.
        inputs: What the model sees: `"text"`, the response alone; `"pair"`, prompt and response as the tokenizer's two
            texts; `"chat"`, prompt and response as a conversation in the tokenizer's chat template. Default what the
            model was trained on, where `mopl.integrations.scorers` has trained it, else `"text"`.
        maximise: Whether higher values are better.
        max_length: Tokens that a text is cut to, from the left for `"chat"` and otherwise as the tokenizer is set;
            default as in its training, likewise, else what the model takes, at most 2048.
        batch_size: Texts of one forward pass; they are sorted by length, so padding is little.
        device: Where the model runs; default a GPU if there is one.
        dtype: Of the model; default as it is stored, float32 on the CPU.

    Raises:
        ImportError: If transformers is not installed.
        OSError: If there is no such model.
        ValueError: If a choice is unknown, the label does not exist or is not named, the tokenizer lacks what `inputs`
            needs, or `max_length` is beyond what "dynamic" rotary positions are trained for.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        name: str = "classifier",
        label: int | str | None = None,
        activation: Activation = "none",
        inputs: Literal["text", "pair", "chat"] | None = None,
        maximise: bool = True,
        max_length: int | None = None,
        batch_size: int = 16,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice(activation, ("none", "sigmoid", "softmax"), "activation")
        classifier = _Classifier(directory, name, inputs, max_length, batch_size, device, dtype)
        self._settle(classifier, name, label, activation, maximise)

    def _settle(
        self, classifier: _Classifier, name: str, label: int | str | None, activation: str, maximise: bool
    ) -> None:
        self.classifier, self.name, self.activation, self.maximise = classifier, name, activation, maximise
        self.label = self._find_label(label)
        if activation == "softmax" and len(classifier.names) == 1:
            raise ValueError("the softmax of one output is always 1; pass activation='sigmoid' or 'none'")

    @classmethod
    def _of(
        cls, classifier: _Classifier, name: str, label: int | str | None, activation: str, maximise: bool
    ) -> ClassifierReward:
        reward = cls.__new__(cls)
        reward._settle(classifier, name, label, activation, maximise)
        return reward

    @property
    def model(self) -> Any:
        """The model of transformers."""
        return self.classifier.model

    @property
    def max_length(self) -> int:
        """Tokens that a text is cut to."""
        return self.classifier.writer.max_length

    def _find_label(self, label: int | str | None) -> int:
        names = self.classifier.names
        if label is None:
            if len(names) > 1:
                raise ValueError(
                    f"the model has {len(names)} outputs; say which as label, one of {names}, or take all of them as "
                    "rewards with classifier_rewards"
                )
            return 0
        found = [n for n, text in names.items() if text == label] if isinstance(label, str) else [label]
        if not found or found[0] not in names:
            raise ValueError(f"label is {label!r} but the model's outputs are {names}")
        return found[0]

    def __call__(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> Tensor:
        """Return the model's output for B texts, float32 (B,) on the CPU.

        Args:
            texts: B responses.
            prompts: B prompts that they answer; the model sees them unless `inputs` is "text".
        """
        outputs = self.classifier(texts, prompts)
        if self.activation == "softmax":
            outputs = outputs.softmax(-1)
        elif self.activation == "sigmoid":
            outputs = outputs.sigmoid()
        return outputs[:, self.label].clone()


def classifier_rewards(
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    label: int | str | None = None,
    activation: Activation = "none",
    maximise: bool = True,
    inputs: Literal["text", "pair", "chat"] | None = None,
    max_length: int | None = None,
    batch_size: int = 16,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[ClassifierReward, ...]:
    """Return all outputs of a sequence-classification model as rewards, which share one forward pass.

    What is computed for a text is kept for the other outputs (of the last 20,000 texts), so m rewards cost what one
    does, in `Rewards`, in `mopl clp` and in other trainers alike.

    Args:
        directory: Of the model and its tokenizer; this and what is not described here is as in `ClassifierReward`.
        name: Of the reward, where there is one output or `label` names one; several have the names that the model
            gives them in `id2label`.
        label: Only this output.
        activation: Of the outputs.
        maximise: Whether higher values are better, of all of them.
        inputs: What the model sees.
        max_length: Tokens that a text is cut to.
        batch_size: Texts of one forward pass.
        device: Where the model runs.
        dtype: Of the model.

    Returns:
        A reward for each output, in their order; one if `label` names it.

    Raises:
        ValueError: As `ClassifierReward`, and if a name is given for several rewards.
    """
    check_choice(activation, ("none", "sigmoid", "softmax"), "activation")
    classifier = _Classifier(directory, name or "classifier", inputs, max_length, batch_size, device, dtype)
    names = classifier.names
    if label is not None or len(names) == 1:
        return (ClassifierReward._of(classifier, name or "classifier", label, activation, maximise),)
    if name is not None:
        raise ValueError(
            f"name is {name!r} but the model has {len(names)} outputs, {', '.join(names.values())}; leave name out, or "
            "pass label for one of them"
        )
    classifier.shared = True
    return tuple(ClassifierReward._of(classifier, names[each], each, activation, maximise) for each in names)
