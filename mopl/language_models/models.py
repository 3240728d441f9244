"""Causal language models: loaded and fused, with what was trained around them, and files of both."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mopl._extras import require
from mopl._hub import loading
from mopl._records import Kind, read_json
from mopl._terminal import bars_wanted
from mopl.conditioning import TextPromptModel, WeightedModel
from mopl.conditioning.adapter_checks import with_adapters
from mopl.conditioning.saved_models import (
    ADAPTER_FILE,
    CONFIG_FILE,
    base_of_adapter,
    load_adapters,
    merge_adapter,
    naming_base,
    read_kind,
    read_record,
)
from mopl.language_models.head import fuse, unfuse
from mopl.language_models.model_identity import fingerprint as fingerprint


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a model, given by directory or hub name; of an adapter's base where it has none.

    Raises:
        OSError: If there is no such model, or it has no tokenizer.
    """
    require("transformers")
    from transformers import AutoTokenizer

    base = base_of_adapter(name)
    if base is not None and not (Path(name) / "tokenizer_config.json").is_file():
        with naming_base(name, base):
            return load_tokenizer(base)
    with loading(name, "tokenizer") as how:
        return AutoTokenizer.from_pretrained(name, **how)


def load_causal_lm(name: str, *, dtype: str = "auto", attention: str | None = None) -> Any:
    """Return a fused causal language model without dropout, on the CPU, in evaluation mode.

    Dropout is off because the loss compares log-probabilities with those of a reference: noise in one of the two is
    noise in the loss.

    Args:
        name: Directory or hub name; or the directory of a PEFT adapter, which is merged into its base model.
        dtype: `"auto"`, `"float32"`, `"bfloat16"` or `"float16"`.
        attention: `attn_implementation` of transformers; None for its own choice.

    Raises:
        OSError: If there is no such model.
        UnsupportedModelError: If its head cannot be fused.
    """
    require("transformers")
    from transformers import AutoConfig, AutoModelForCausalLM

    if (base := base_of_adapter(name)) is not None:
        with naming_base(name, base):
            model = unfuse(load_causal_lm(base, dtype=dtype, attention=attention))
        with quiet():
            return fuse(merge_adapter(name, model).requires_grad_(False))
    with loading(name, "configuration") as how:
        config = AutoConfig.from_pretrained(name, **how)
    _zero_dropout(config)
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    with quiet(), loading(name) as how:
        model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=kind, **options, **how)
    disable_dropout(model)
    return fuse(model.eval().requires_grad_(False))


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0: modules, rates that parts keep as numbers, and those in its configuration.

    Families pass their rates to functions as often as to modules, and some read them from the configuration each time.
    """
    for module in model.modules():
        _zero_dropout(module)


def _zero_dropout(owner: Any) -> None:
    """Set the rates of dropout among the attributes of a module or a configuration, and of those in it, to 0."""
    of_dropout = "drop" in type(owner).__name__.lower()
    for name, value in list(vars(owner).items()):
        if hasattr(value, "to_diff_dict"):  # a configuration, or that of a part
            _zero_dropout(value)
        elif not ("drop" in name or (of_dropout and name == "p")):
            continue
        elif isinstance(value, dict):  # of adapters, by name
            value.update({key: 0.0 for key, rate in value.items() if isinstance(rate, float)})
        elif isinstance(value, float) or (name == "p" and value):
            setattr(owner, name, 0.0)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep out of a log what says nothing about a run: warnings of PEFT's insides, progress bars without a terminal."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    if not bars_wanted():
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")  # PEFT sets it right for Conv1D by itself
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            yield
    finally:
        if bars:
            logging.enable_progress_bar()


def lora_config(settings: Any) -> Any:
    """Return the `peft.LoraConfig` that the settings of a run ask for: those that begin with `lora_`."""
    require("peft")
    from peft import LoraConfig, TaskType

    targets = settings.lora_targets
    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules=targets[0] if tuple(targets) == ("all-linear",) else list(targets),
        use_rslora=settings.lora_rslora,
        use_dora=settings.lora_dora,
        rank_pattern=settings.pattern("lora_rank_pattern"),
        alpha_pattern=settings.pattern("lora_alpha_pattern"),
        modules_to_save=list(settings.lora_modules_to_save) or None,
        task_type=TaskType.CAUSAL_LM,
    )


def with_adapter(base: Any, settings: Any) -> Any:
    """Return the base with the new adapter of `lora_config`, as a PEFT model."""
    with quiet():
        return with_adapters(base, lora_config(settings))


def positions_of(model: Any) -> int | None:
    """Return how many tokens a causal language model can see, or None where it sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def vocabulary_of(model: Any) -> int | None:
    """Return for how many tokens a causal language model has embeddings, or None where it does not say."""
    try:
        return model.get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError):
        return None


def sharing(base: Any) -> Any:
    """Return another causal language model whose parameters share the memory of a frozen one.

    It is modules of its own, so that adapters go into one of the two and both stay in use without switching; what
    training would change must be in the adapters. Take it once the model is on its device.
    """
    memo: dict[int, Any] = {}
    for parameter in base.parameters():
        plain = type(parameter) is nn.Parameter  # a quantised one has what it means in its class
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False) if plain else parameter
    memo |= {id(buffer): buffer for buffer in base.buffers()}
    return copy.deepcopy(base, memo)


def check_same_tokens(name: str, model: str, tokenizer: Any, what: str) -> None:
    """Raise unless another model, a `what`, reads texts as the same tokens as `model`, whose tokenizer is given.

    Raises:
        OSError: If there is no such model, or it has no tokenizer.
        ValueError: If its vocabulary is another one, or its tokenizer writes weights in words in front of a text.
    """
    theirs = load_tokenizer(name)
    own = tokenizer.get_vocab()
    if theirs.get_vocab() != own:
        raise ValueError(
            f"the {what} {name} has another vocabulary ({len(theirs.get_vocab())} tokens) than {model} ({len(own)}), "
            f"so their log-probabilities cannot be compared; take a {what} of the same family"
        )
    file = Path(name) / CONFIG_FILE
    if file.is_file() and read_json(file, Kind).get("text"):
        raise ValueError(
            f"the {what} {name} is an export that reads its weights in words, which its own tokenizer writes and that "
            f"of {model} does not; take a {what} that reads texts alone"
        )


def recompute_activations(model: Any, on: bool) -> None:
    """Switch gradient checkpointing of a model, under the newer of its two names where it is known."""
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{prefix}_checkpointing_disable")()


def release(model: nn.Module) -> Any:
    """Take the adapters out again and return the plain causal language model."""
    inner: Any = model.model if isinstance(model, WeightedModel) else model
    return inner.unload() if hasattr(inner, "unload") else inner


# ---------------------------------------------------------------- files


def load_model(folder: Path, base: nn.Module) -> nn.Module:
    """Return the model of a folder around a fused base model, in evaluation mode; without the words, if it reads some.

    Raises:
        FileNotFoundError: If the folder holds no model.
    """
    if not (folder / CONFIG_FILE).exists():
        raise FileNotFoundError(f"{folder} holds no trained model: it has no {CONFIG_FILE}")
    if read_kind(folder) != TextPromptModel.KIND:
        with quiet():
            return WeightedModel.from_pretrained(folder, base)
    read_record(folder, TextPromptModel.KIND, ADAPTER_FILE)
    with quiet():
        return load_adapters(base, {"default": folder}).eval()
