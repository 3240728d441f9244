"""Settings of `RewardListTrainer`, and what it checks and chooses before it begins: model, outputs, tokenizer."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mopl._arguments import check_choice
from mopl._counted import counted, there_are
from mopl._extras import require

require("transformers", "accelerate", what="mopl.integrations.scorers")
from transformers import TrainingArguments

from mopl._hub import naming_own_code
from mopl.conditioning.causal_lm import is_peft
from mopl.conditioning.saved_models import base_of_adapter
from mopl.integrations._head_losses import HEAD_LOSSES
from mopl.integrations._settings import with_help
from mopl.rewards.writing import LENGTH, RECORD, SequenceWriter, check_alike, longest_input, settle_padding
from mopl.training.zero_settings import check_config


@with_help
@dataclass
class RewardListConfig(TrainingArguments):
    """Arguments of `RewardListTrainer`: those of `transformers.TrainingArguments`, and

    Args:
        objectives: Names and order of the m objectives, needed where an option below is a list of m. By default those
            of the data; of rows of pairs only `"preference"`, which prefers chosen, so label columns beside pairs must
            be named here.
        list_loss: A loss of `mopl.losses` for all objectives, or a list of m: "listwise_dpo" (on scores, ListNet),
            "plackett_luce", "pairwise_logistic", "lambda_loss", "approx_ndcg", or "bradley_terry" for pairs. Labels
            must not be negative for "listwise_dpo" and "approx_ndcg".
        beta: β, the factor on scores in the loss: 1 / temperature.
        objective_beta: β of each objective, in place of one β for all.
        objective_weights: Weights of the objectives' losses, on the simplex; by default all the same. A column
            `objective_weights` of the data, m numbers a row, replaces them.
        center_rewards_coefficient: Factor of (2/K Σ_k s_k)², which keeps scores near 0; of pairs that is TRL's option
            of this name. None for none.
        inputs: What the model sees: "text", the response alone; "pair", prompt and response as the tokenizer's two
            texts; "chat", the conversation in the tokenizer's chat template; "auto": "chat" if there is a template,
            else "pair". It is noted in the model's configuration, where `mopl.rewards.ClassifierReward` finds it.
        max_length: Tokens that a sequence is cut to, from the left for "chat"; by default what the model takes, at most
            2048. Noted likewise.
        mini_batch_size: Sequences of one forward pass, whose activations are all that is held at a time: scores are
            computed without a graph first, and again in the backward pass. By default all sequences of a batch's lists
            are one forward pass.
        disable_dropout: Set every dropout to 0, in the model and in its configuration.
        pad_to_multiple_of: Pad rows to a multiple of this many tokens.
        ndcg_at: Cut of the NDCG that evaluations report.
    """

    objectives: list[str] | None = None
    list_loss: str | list[str] = "listwise_dpo"
    beta: float = 1.0
    objective_beta: list[float] | None = None
    objective_weights: list[float] | None = None
    center_rewards_coefficient: float | None = None
    inputs: str = "auto"
    max_length: int | None = None
    mini_batch_size: int | None = None
    disable_dropout: bool = True
    pad_to_multiple_of: int | None = None
    ndcg_at: int = 10

    def __post_init__(self) -> None:
        if isinstance(self.objectives, str):
            raise TypeError(f"objectives is {self.objectives!r} but must be a list of names: [{self.objectives!r}]")
        for name in [self.list_loss] if isinstance(self.list_loss, str) else self.list_loss:
            check_choice(name, HEAD_LOSSES, "list_loss")
        check_choice(self.inputs, ("auto", "text", "pair", "chat"), "inputs")
        for name in ("mini_batch_size", "pad_to_multiple_of", "ndcg_at"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value} but must be at least 1")
        coefficient = self.center_rewards_coefficient
        if coefficient is not None and not coefficient >= 0:
            raise ValueError(f"center_rewards_coefficient is {coefficient} but must not be negative")
        check_config(self.deepspeed)
        super().__post_init__()


def load_scorer(
    model: Any, objectives: tuple[str, ...], peft_config: Any, model_init_kwargs: dict[str, Any] | None
) -> Any:
    """Return a sequence classifier with an output for each objective: given, or loaded by name; with adapters."""
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if not isinstance(model, (str, nn.Module)):
        raise TypeError(
            f"model is a {type(model).__name__} but must be a sequence-classification model, or the name of a model"
        )
    names = dict(enumerate(objectives))
    if isinstance(model, str):
        from transformers import AutoModelForSequenceClassification

        if base_of_adapter(model) is not None:
            raise ValueError(
                f"model is {model!r}, which holds a PEFT adapter; load it with "
                "peft.AutoPeftModelForSequenceClassification.from_pretrained(model, is_trainable=True, "
                f"num_labels={len(objectives)}) and pass the result"
            )
        options = {"dtype": torch.float32, "trust_remote_code": False, **(model_init_kwargs or {})}
        options |= {"num_labels": len(objectives), "id2label": names}
        options["label2id"] = {name: number for number, name in names.items()}
        with naming_own_code(model):
            model = AutoModelForSequenceClassification.from_pretrained(model, **options)
    elif model_init_kwargs:
        raise ValueError("model_init_kwargs are for a model that is loaded here by name, but model is loaded already")
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "id2label"):
        raise TypeError(
            f"model is a {type(model).__name__} without a config of transformers; pass one of "
            "AutoModelForSequenceClassification"
        )
    own = [config.id2label[number] for number in sorted(config.id2label)]
    if len(own) != len(objectives):
        raise ValueError(
            f"the model has {counted(len(own), 'output')} but {there_are(len(objectives), 'objective')}, "
            f"{', '.join(objectives)}; load it with num_labels={len(objectives)}"
        )
    if set(own) == set(objectives) and tuple(own) != objectives:
        raise ValueError(
            f"the model's outputs are {', '.join(own)} but the objectives are {', '.join(objectives)}; name them in "
            f"the order of the model: objectives={own}"
        )
    config.id2label, config.label2id = names, {name: number for number, name in names.items()}
    if getattr(config, "use_cache", False):
        config.use_cache = False  # nothing is generated
    return model if peft_config is None else _with_adapters(model, peft_config)


def _with_adapters(model: Any, peft_config: Any) -> Any:
    require("peft")
    from peft import PeftConfig, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config is a {type(peft_config).__name__} but must be a peft.PeftConfig")
    if is_peft(model):
        raise ValueError("peft_config was passed with a model that has adapters already; leave it out")
    task = str(getattr(peft_config.task_type, "value", peft_config.task_type))
    if task != "SEQ_CLS":  # PEFT then trains the head, and saves it
        raise ValueError(
            f"task_type of peft_config is {peft_config.task_type!r}, by which the head would stay as it is, at random; "
            "pass task_type='SEQ_CLS'"
        )
    return get_peft_model(model, peft_config)


def prepare_writer(
    model: Any, tokenizer: Any, inputs: str, max_length: int | None, mini_batch_size: int | None
) -> SequenceWriter:
    """Return what writes lists for the model, and note it in the model's configuration for `ClassifierReward`."""
    if tokenizer is None:
        raise ValueError("processing_class is missing; pass the tokenizer")
    if inputs == "auto":
        inputs = "chat" if getattr(tokenizer, "chat_template", None) else "pair"
    config = model.config
    writer = SequenceWriter(tokenizer, inputs, 0)
    padded = settle_padding(model, tokenizer)
    longest = longest_input(config, tokenizer)
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length is {max_length} but must be at least 1")
    positions = getattr(config, "max_position_embeddings", None)
    if max_length is not None and positions is not None and max_length > positions:
        raise ValueError(f"max_length is {max_length} but the model has {positions} positions; pass {longest} at most")
    writer.max_length = max_length or longest
    check_alike(model, padded, writer.max_length, mini_batch_size)
    setattr(config, RECORD, inputs)
    setattr(config, LENGTH, writer.max_length)
    return writer


def check_tokens(model: Any, largest: int) -> None:
    """Raise where a token has no embedding, which a GPU reports in no readable way."""
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if size is not None and largest >= size:
        raise ValueError(
            f"the data has the token {largest} but the model has embeddings of {size} tokens; pass the model's own "
            "tokenizer, or call model.resize_token_embeddings(len(tokenizer))"
        )


def warn_of_frozen_head(model: Any) -> None:
    """Warn where no parameter of the head of a model with adapters is trained: a new one would stay random."""
    if not is_peft(model):
        return
    heads = [p for name, p in model.named_parameters() if {"score", "classifier"} & set(name.split("."))]
    if heads and not any(parameter.requires_grad for parameter in heads):
        warnings.warn(
            "no parameter of the model's head is trained; unless it was trained before, pass task_type='SEQ_CLS' to "
            "the PeftConfig, or modules_to_save=['score'] (['classifier'])",
            stacklevel=3,
        )
