"""The models of an alignment run: the frozen language model, what is trained on top of it, and files of both.

| model                 | what is trained                                                     | takes weights by |
|-----------------------|---------------------------------------------------------------------|------------------|
| COS-DPO, hyper-prompt | LoRA adapters, P and both networks of the `HyperPrompt`             | virtual tokens   |
| COS-DPO, lora-mixture | m sets of LoRA adapters                                             | their mixture    |
| COS-DPO, text         | LoRA adapters                                                       | words            |
| baselines             | LoRA adapters and P: ordinary prompt tuning, as in section 4.2      | nothing          |

The prompt of a baseline is a `HyperPrompt` at its start, where its mask is 1 for every w, with both networks frozen.
So all models of one kind have the same parameters, and a soup can average them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopl._extras import require
from mopl._files import write_files
from mopl._hub import loading
from mopl._tensor_files import read_tensors, shapes_of
from mopl._terminal import bars_wanted
from mopl.alignment.config import AlignConfig
from mopl.alignment.head import fuse, unfuse
from mopl.conditioning import HyperPrompt, HyperPromptModel, LoraMixture, TextPrompt, TuningRecord, WeightedModel
from mopl.conditioning._adapter_base import base_of_adapter, merge_adapter, naming_base
from mopl.conditioning._saved import ADAPTER_FILE, CONFIG_FILE, REMEDY, load_adapters, read_kind, read_record
from mopl.conditioning.hyper_prompt_model import WEIGHTS_FILE as PROMPT_FILE

TEXT_KIND, MIXTURE_KIND = "TextPromptModel", "LoraMixture"
TEXT_TEMPLATE = "[{weights}]\n"
TEXT_TEMPLATE_WITH_TEMPERATURES = "[{weights}; temperatures {temperatures}]\n"


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
        with _quiet():
            return fuse(merge_adapter(name, model).requires_grad_(False))
    with loading(name, "configuration") as how:
        config = AutoConfig.from_pretrained(name, **how)
    for setting, value in list(vars(config).items()):
        if ("dropout" in setting or setting.endswith("pdrop")) and isinstance(value, float):
            setattr(config, setting, 0.0)
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    with _quiet(), loading(name) as how:
        model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=kind, **options, **how)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return fuse(model.eval().requires_grad_(False))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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


def positions_of(model: Any) -> int | None:
    """Return how many tokens a causal language model can see, or None where it sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def new_model(
    base: nn.Module,
    config: AlignConfig,
    objectives: tuple[str, ...],
    *,
    conditioned: bool,
    temperature: bool = False,
    start: Sequence[int] = (),
) -> nn.Module:
    """Return an untrained model around `base`, which computes what `base` alone does but for the start of its prompt.

    Args:
        base: A fused causal language model; it is frozen, and gets LoRA layers until `release` takes them out.
        config: Settings of the run.
        objectives: Names of the m objectives.
        conditioned: Whether it is to learn every trade-off, or one.
        temperature: Whether it is conditioned on temperatures too.
        start: Tokens whose embeddings the virtual tokens start at; small random vectors without any.

    Returns:
        A `HyperPromptModel`; a `LoraMixture` for a conditioned model that mixes adapters; or a PEFT model where it
        takes its weights in words.
    """
    model = base.requires_grad_(False)
    record = tuning_record(config, objectives, conditioned=conditioned, temperature=temperature)
    if config.lora_rank:
        require("peft")
        from peft import LoraConfig, TaskType, get_peft_model

        targets = config.lora_targets
        settings = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
            target_modules=targets[0] if len(targets) == 1 and targets[0] == "all-linear" else list(targets),
            task_type=TaskType.CAUSAL_LM,
        )
        with _quiet():
            if conditioned and config.conditioning == "lora-mixture":
                return LoraMixture(base, len(objectives), config=settings, record=record)
            model = get_peft_model(base, settings)  # type: ignore[arg-type]
    if conditioned and config.conditioning == "text":
        return model
    hidden = base.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    prompt = HyperPrompt(
        len(objectives), config.virtual_tokens, config.prompt_rank, hidden, temperature=conditioned and temperature
    )
    if not conditioned:
        for network in (prompt.left, prompt.right):
            network.requires_grad_(False)
    wrapped = HyperPromptModel(model, prompt, record=record, positions=config.positions)
    if start:
        wrapped.set_prefix_from_tokens(start)
    return wrapped


def tuning_record(
    config: AlignConfig, objectives: tuple[str, ...], *, conditioned: bool, temperature: bool
) -> TuningRecord:
    """Return what `mopl.json` says about a model of a run: objectives, reference, β and α."""
    beta: Any = config.betas(len(objectives))
    if temperature:
        beta = tuple(tuple(factor * b for b in beta) for factor in config.beta_range)
    reference = "self" if config.reference in ("auto", "self", "precomputed") else config.reference
    return TuningRecord(objectives, reference, beta, config.alpha if conditioned else None)


def recompute_activations(model: Any, on: bool) -> None:
    """Switch gradient checkpointing of a causal language model, under the newer of its two names where it is known.

    A `LoraMixture` has its own, which carries the weights of the batch into the second forward pass.
    """
    if isinstance(model, LoraMixture) and on:
        model.gradient_checkpointing_enable()
        return
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{prefix}_checkpointing_disable")()


def release(model: nn.Module) -> Any:
    """Take the adapters out again and return the plain causal language model."""
    inner: Any = model.model if isinstance(model, WeightedModel) else model
    return inner.unload() if hasattr(inner, "unload") else inner


def text_prompt(objectives: tuple[str, ...], *, temperature: bool = False) -> TextPrompt:
    """Return how weights are written into a prompt under `conditioning="text"`."""
    return TextPrompt(objectives, TEXT_TEMPLATE_WITH_TEMPERATURES if temperature else TEXT_TEMPLATE)


# ---------------------------------------------------------------- files


def save_model(
    model: Any, folder: Path, config: AlignConfig, objectives: tuple[str, ...], *, temperature: bool = False
) -> None:
    """Write what was trained into a folder, never the frozen model."""
    if isinstance(model, WeightedModel):
        model.save_pretrained(folder)
        return
    record = dataclasses.asdict(tuning_record(config, objectives, conditioned=True, temperature=temperature))
    content = {
        "kind": TEXT_KIND, **record, "base_model": config.model, "adapter": "default",
        "template": text_prompt(objectives, temperature=temperature).template,
    }  # fmt: skip

    def fill(place: Path) -> None:
        model.save_pretrained(str(place))
        (place / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    write_files(folder, fill, last=CONFIG_FILE)


def load_model(folder: Path, base: nn.Module) -> nn.Module:
    """Return the model of a folder around a fused base model, in evaluation mode.

    Raises:
        FileNotFoundError: If the folder holds no model.
    """
    if not (folder / CONFIG_FILE).exists():
        raise FileNotFoundError(f"{folder} holds no trained model: it has no {CONFIG_FILE}")
    kind = read_kind(folder)
    if kind != TEXT_KIND:
        with _quiet():
            return (LoraMixture if kind == MIXTURE_KIND else HyperPromptModel).from_pretrained(folder, base)
    read_record(folder, TEXT_KIND, ADAPTER_FILE)
    with _quiet():
        return load_adapters(base, {"default": folder}).eval()


def read_state(folder: Path, like: Path | None = None) -> dict[str, Tensor]:
    """Return what was trained as tensors by name: `adapter/...` and `prompt/...`.

    Args:
        folder: Where it was saved.
        like: Another folder, whose files have the same names and shapes.

    Raises:
        DamagedFile: If a file is damaged, or has other names or shapes than the other folder's.
    """
    state: dict[str, Tensor] = {}
    for kind, name in (("adapter", ADAPTER_FILE), ("prompt", PROMPT_FILE)):
        if (folder / name).exists() or (like is not None and (like / name).exists()):
            wanted = None if like is None else shapes_of(like / name, remedy=REMEDY)
            tensors = read_tensors(folder / name, wanted, remedy=REMEDY)
            state |= {f"{kind}/{key}": value for key, value in tensors.items()}
    return state


def set_state(model: HyperPromptModel, state: Mapping[str, Tensor]) -> None:
    """Put what `read_state` gave, or an average of several, into a model of the same kind.

    Raises:
        ValueError: If the names do not fit.
    """
    parts: dict[str, dict[str, Tensor]] = {"adapter": {}, "prompt": {}}
    for name, value in state.items():
        kind, _, key = name.partition("/")
        parts[kind][key] = value
    model.hyper_prompt.load_state_dict(parts["prompt"], strict=True)
    if parts["adapter"]:
        from peft import set_peft_model_state_dict

        result = set_peft_model_state_dict(model.model, parts["adapter"])  # type: ignore[arg-type]
        if result.unexpected_keys:
            raise ValueError(f"the adapter has no {', '.join(result.unexpected_keys[:3])}; was it made for this model?")


def fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 of the names, types and values of all parameters and buffers."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def trained_parameters(model: nn.Module) -> int:
    """Return how many parameters are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
