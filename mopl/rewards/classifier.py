"""Any sequence-classification model of transformers as a reward: reward models, toxicity or sentiment classifiers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mopl._arguments import check_choice
from mopl._extras import require
from mopl._hub import loading
from mopl.rewards.reward import Prompt


class ClassifierReward:
    """One output of a sequence-classification model.

    Args:
        directory: Of the model and its tokenizer (`save_pretrained`), or a name on the Hugging Face hub.
        name: Of the reward; default `"classifier"`.
        label: Which output: its number or its name in the model's `id2label`; needed if there are several.
        activation: `"none"` for the raw output, `"sigmoid"`, or `"softmax"` over the outputs.
        inputs: What the model sees: `"text"`, the response alone; `"pair"`, prompt and response as the tokenizer's two
            texts; `"chat"`, prompt and response as a conversation in the tokenizer's chat template.
        maximise: Whether higher values are better.
        max_length: Tokens that a text is cut to, from the left for `"chat"` and otherwise as the tokenizer is set;
            default what the model takes, at most 2048.
        batch_size: Texts of one forward pass; they are sorted by length, so padding is little.
        device: Where the model runs; default a GPU if there is one.
        dtype: Of the model; default as it is stored, float32 on the CPU.

    Raises:
        ImportError: If transformers is not installed.
        OSError: If there is no such model.
        ValueError: If a choice is unknown, the label does not exist or is not named, or the tokenizer lacks what
            `inputs` needs.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        name: str = "classifier",
        label: int | str | None = None,
        activation: Literal["none", "sigmoid", "softmax"] = "none",
        inputs: Literal["text", "pair", "chat"] = "text",
        maximise: bool = True,
        max_length: int | None = None,
        batch_size: int = 16,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice(activation, ("none", "sigmoid", "softmax"), "activation")
        check_choice(inputs, ("text", "pair", "chat"), "inputs")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size} but must be at least 1")
        require("transformers", what=f"the reward {name}")
        import transformers

        self.name, self.maximise, self.activation, self.inputs = name, maximise, activation, inputs
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype is None:
            dtype = torch.float32 if self.device.type == "cpu" else None
        with loading(str(directory), "classifier") as how:
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(directory), **how)
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                str(directory), dtype=dtype or "auto", **how
            )
        self.model: Any = model.to(self.device).eval().requires_grad_(False)
        self.label = self._find_label(label)
        if activation == "softmax" and self.model.config.num_labels == 1:
            raise ValueError("the softmax of one output is always 1; pass activation='sigmoid' or 'none'")
        if inputs == "chat" and not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("inputs is 'chat' but the tokenizer has no chat template; pass inputs='pair' or 'text'")
        if self.tokenizer.pad_token_id is None:
            if self.tokenizer.eos_token_id is None:
                raise ValueError("the tokenizer has neither pad_token nor eos_token to pad with; set one and save it")
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # Decoder models find the last token of a row by their config's pad token.
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        if inputs == "chat":
            self.tokenizer.truncation_side = "left"  # the response comes last and must stay
        self.max_length, self.batch_size = max_length or self._longest(), batch_size

    def _find_label(self, label: int | str | None) -> int:
        names = {int(number): text for number, text in self.model.config.id2label.items()}
        if label is None:
            if len(names) > 1:
                raise ValueError(f"the model has {len(names)} outputs; say which as label, one of {names}")
            return 0
        found = [n for n, text in names.items() if text == label] if isinstance(label, str) else [label]
        if not found or found[0] not in names:
            raise ValueError(f"label is {label!r} but the model's outputs are {names}")
        return found[0]

    def _longest(self) -> int:
        config = self.model.config
        positions = getattr(config, "max_position_embeddings", None) or 2048
        # RoBERTa and its kin number positions from the padding token's id + 1, so fewer are left for text.
        if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert", "longformer"):
            positions -= config.pad_token_id + 1
        return int(min(positions, self.tokenizer.model_max_length, 2048))

    def _write(self, text: str, prompt: Prompt) -> tuple[str, ...]:
        if self.inputs == "text":
            return (text,)
        if self.inputs == "pair":
            if isinstance(prompt, str):
                return (prompt, text)
            return ("\n".join(str(message.get("content", "")) for message in prompt), text)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        conversation = [*messages, {"role": "assistant", "content": text}]
        return (self.tokenizer.apply_chat_template(conversation, tokenize=False),)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> Tensor:
        """Return the model's output for B texts, float32 (B,) on the CPU."""
        written = [self._write(text, prompt) for text, prompt in zip(texts, prompts, strict=True)]
        order = sorted(range(len(written)), key=lambda place: sum(map(len, written[place])))
        values = torch.empty(len(written))
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            columns = [[written[place][side] for place in places] for side in range(len(written[places[0]]))]
            batch = self.tokenizer(
                *columns,
                padding=True,
                truncation=True,
                max_length=self.max_length,
                add_special_tokens=self.inputs != "chat",  # the chat template has written them
                return_tensors="pt",
            ).to(self.device)
            logits = self.model(**batch).logits.float()
            if self.activation == "softmax":
                logits = logits.softmax(-1)
            elif self.activation == "sigmoid":
                logits = logits.sigmoid()
            values[places] = logits[:, self.label].cpu()
        return values
