"""What `save_pretrained` of conditioned models and of PEFT wrote, read back and checked: `mopl.json`, adapters, bases.

A base model is one that was passed, one that a record names, or a PEFT adapter that is merged into its own base.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor, nn

from mopl._counted import there_are
from mopl._extras import require
from mopl._hub import naming_own_code
from mopl._records import DamagedFile, Finite, Kind, damaged, read_json
from mopl._renamed import renamed_attribute, renamed_in_methods
from mopl._tensor_files import check_shapes, read_tensors, shapes_of
from mopl.conditioning.adapted import adapter_state
from mopl.conditioning.adapter_checks import check_no_adapters
from mopl.conditioning.merging import merged, set_name, settle_merged

CONFIG_FILE = "mopl.json"
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
REMEDY = "take it from a backup, or make the model again"

Names = Annotated[list[str], msgspec.Meta(min_length=1)]


@renamed_in_methods("__init__", alpha="concentration")
@dataclass(frozen=True)
class TuningRecord:
    """What the weights of a conditioned model mean; it is saved beside them.

    Args:
        objectives: Names of the m objectives, in the order of the weights.
        reference: What the model was regularised towards: `"self"` (the model with adapters and prefix off) or a name.
        beta: β of the training: a number, one for each objective, or for a model conditioned on β the box that it
            was drawn from, `(low, high)`.
        concentration: α of the Dirichlet distribution that weights were drawn from.
    """

    objectives: tuple[str, ...]
    reference: str = "self"
    beta: Any = None
    concentration: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.objectives, str):
            raise ValueError(f"objectives is {self.objectives!r} but must be a sequence of names")
        object.__setattr__(self, "objectives", tuple(self.objectives))
        for name in ("beta", "concentration"):  # files have plain numbers
            if hasattr(value := getattr(self, name), "tolist"):
                object.__setattr__(self, name, value.tolist())

    alpha = renamed_attribute("TuningRecord.alpha", "concentration")

    @classmethod
    def of(cls, given: TuningRecord | Sequence[str] | None, objectives: int) -> TuningRecord:
        """Return what a model with m objectives was given: a record, names, or None for `objective_1`, ...

        Raises:
            ValueError: If it is for another number of objectives, or two names are equal.
        """
        if given is None:
            given = [f"objective_{j + 1}" for j in range(objectives)]
        record = given if isinstance(given, TuningRecord) else cls(given)  # type: ignore[arg-type]
        if record is not given and len(set(record.objectives)) < len(record.objectives):
            raise ValueError(f"record names {record.objectives}; give each objective a name of its own")
        if len(record.objectives) != objectives:
            raise ValueError(f"record names {record.objectives} but {there_are(objectives, 'objective')}")
        return record

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> TuningRecord:
        """Return what a `mopl.json` says, where `concentration` has its first name, `alpha`."""
        return cls(tuple(config["objectives"]), config["reference"], config["beta"], config["alpha"])

    def to_dict(self) -> dict[str, Any]:
        """Return what `read` reads."""
        return {
            "objectives": self.objectives, "reference": self.reference, "beta": self.beta, "alpha": self.concentration,
        }  # fmt: skip


class Record(msgspec.Struct):
    """What `mopl.json` says of every conditioned model; kinds that say more have a schema of their own."""

    objectives: Names
    base_model: str | None
    reference: str
    beta: Any
    alpha: Any

    @staticmethod
    def check(record: Mapping[str, Any]) -> None:
        """Raise a ValueError where parts of a record that fits do not fit one another."""


class AdapterRecord(msgspec.Struct):
    """What is read of PEFT's `adapter_config.json` before PEFT reads it."""

    peft_type: str
    base_model_name_or_path: str | None = None
    r: int = 8
    lora_alpha: Finite = 8
    lora_dropout: Finite = 0.0
    target_modules: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, Finite] | None = None
    alora_invocation_tokens: list[int] | None = None
    bias: str = "none"
    exclude_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    lora_bias: bool = False
    megatron_config: None = None  # PEFT would import the module that another key names
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None
    task_type: str | None = None
    use_dora: bool = False
    use_qalora: bool = False
    use_rslora: bool = False


class SettingsRecord(Record):
    """What `mopl.json` says of a kind that has no schema of its own."""

    settings: dict[str, Any] = {}  # a kind may write what it needs otherwise
    adapter: str | None = None


KINDS: dict[str, Any] = {}  # classes of models by the name that `mopl.json` has for them; each registers itself


@contextlib.contextmanager
def fitting(file: Path) -> Iterator[None]:
    """Say of a file what does not fit while a model is made from it inside a `with` block."""
    try:
        yield
    except DamagedFile:
        raise
    except ValueError as error:
        raise damaged(file, str(error), f"{REMEDY}; or pass the base model it is for") from None


def read_kind(folder: Path) -> str | None:
    """Return the "kind" in a folder's `mopl.json`."""
    return read_json(folder / CONFIG_FILE, Kind, remedy=REMEDY).get("kind")


class _Export(msgspec.Struct):
    weights: list[Finite] | None = None


def exported_at(folder: Path) -> list[float]:
    """Return the weights that an export was made at, from its `mopl.json`; none where it has none."""
    return read_json(folder / CONFIG_FILE, _Export, remedy=REMEDY).get("weights") or []


def read_record(directory: str | os.PathLike[str], kind: str, *files: str) -> dict[str, Any]:
    """Return what the `mopl.json` of a folder says of a model of this kind, which `files` must lie beside.

    Raises:
        FileNotFoundError: If the folder holds no such model.
        ValueError: If it holds another kind; `DamagedFile` if a key is missing or something else than it was.
    """
    folder = Path(directory)
    # The kind comes first: another kind has other files.
    if (folder / CONFIG_FILE).exists() and (found := read_kind(folder)) != kind:
        raise ValueError(f"{folder / CONFIG_FILE} holds a {found} but a {kind} was asked for")
    missing = [name for name in dict.fromkeys((CONFIG_FILE, *files)) if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(f"{folder} holds no {' and no '.join(missing)}; name a folder of save_pretrained")
    file = folder / CONFIG_FILE
    schema = KINDS[kind].SCHEMA
    record = read_json(file, schema, remedy=REMEDY)
    for name in adapters_of(record):
        if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise damaged(file, f"the adapter {name!r} is not inside of the folder", REMEDY)
    try:
        schema.check(record)
    except ValueError as error:
        raise damaged(file, str(error), REMEDY) from None
    return record


def adapters_of(record: Mapping[str, Any]) -> list[str]:
    """Return the names of the adapters that a record speaks of."""
    one = record.get("adapter")
    return [*record.get("adapters", ()), *([] if one is None else [one])]


def check_options(model: nn.Module | None, options: Mapping[str, Any]) -> None:
    """Raise where options for loading were passed beside a model."""
    if model is not None and options:
        raise ValueError(f"{sorted(options)} are for a model that is loaded here, but model was passed")


def adapter_folder(folder: Path, name: str) -> Path:
    """Return where PEFT puts an adapter: one that is called "default" into the folder itself."""
    return folder if name == "default" else folder / name


def load_adapters(model: Any, paths: Mapping[str, Path], *, trainable: bool = False) -> Any:
    """Return a base model with adapters, each from a folder that PEFT wrote.

    PEFT leaves out what it misses in a file, and what it does not know, with a warning, and asks the hub for a missing
    file; here all of these are errors.
    """
    require("peft")
    from peft import PeftModel

    wrapped: Any = None
    check_no_adapters(model)
    for name, path in paths.items():
        _check_adapter(path)
        try:
            if wrapped is None:
                wrapped = PeftModel.from_pretrained(model, str(path), adapter_name=name, is_trainable=trainable)
            else:
                wrapped.load_adapter(str(path), adapter_name=name, is_trainable=trainable)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            # torch says by a RuntimeError that matrices have other sizes.
            file = path / (ADAPTER_FILE if isinstance(error, RuntimeError) else ADAPTER_CONFIG)
            text = f"the adapter does not fit the model ({' '.join(str(error).split())[:200]!r})"
            raise damaged(file, text, f"{REMEDY}; or pass the base model it is for") from None
        _check_state(wrapped, name, path / ADAPTER_FILE)
    return wrapped


def read_adapters(model: Any, paths: Mapping[str, Path]) -> dict[str, dict[str, Tensor]]:
    """Return what folders of PEFT hold for adapters of a PEFT model, by adapter; raise where it does not fit."""
    states = {}
    for name, path in paths.items():
        require("peft")
        from peft import load_peft_weights

        _check_adapter(path)
        _check_scale(path / ADAPTER_CONFIG, model.peft_config[name])
        _check_state(model, name, path / ADAPTER_FILE)
        states[name] = load_peft_weights(str(path), device=str(next(model.parameters()).device))
    return states


def set_adapters(model: Any, states: Mapping[str, dict[str, Tensor]]) -> None:
    """Give adapters of a PEFT model, in place, what `read_adapters` returned."""
    for name, state in states.items():
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, state, adapter_name=name)


def _check_adapter(path: Path) -> None:
    """Raise unless a folder holds an adapter whose files can be read and agree on its size."""
    if (path / "adapter_model.bin").is_file() and not (path / ADAPTER_FILE).exists():
        return  # a pickle of an old version of PEFT, which reads it without code
    if not (path / ADAPTER_FILE).exists():
        raise FileNotFoundError(f"{path} holds no {ADAPTER_FILE}; {REMEDY}")
    config = read_json(path / ADAPTER_CONFIG, AdapterRecord, remedy=REMEDY)
    tensors = read_tensors(path / ADAPTER_FILE, remedy=REMEDY)
    # Before anything is loaded PEFT makes matrices of this rank.
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    for key, rank in (("r", config.get("r", 8)), *(config.get("rank_pattern") or {}).items()):
        if config["peft_type"] == "LORA" and not 1 <= rank <= largest:
            text = f"{key} is {rank} but must be that of the matrices in {ADAPTER_FILE}"
            raise damaged(path / ADAPTER_CONFIG, text, REMEDY)


def _check_scale(file: Path, own: Any) -> None:
    """Raise where an adapter multiplies its matrices with another factor than the one that it is loaded into."""
    saved = read_json(file, AdapterRecord, remedy=REMEDY)
    for key in ("lora_alpha", "use_rslora", "alpha_pattern"):
        if key in saved and hasattr(own, key) and (saved[key] or None) != (getattr(own, key) or None):
            raise ValueError(
                f"{file} has {key}={saved[key]!r} but the model's adapter {getattr(own, key)!r}, with which the same "
                "matrices are another adapter; load it by from_pretrained"
            )


def _plain(key: str) -> str:
    """Return the name that a base model's tensor has without an adapter around it."""
    return key.replace(".base_layer.", ".")


def _check_state(model: Any, name: str, file: Path) -> None:
    """Raise a `DamagedFile` unless a file of an adapter has all that a PEFT model has under this name, and no more."""
    if not file.exists():
        return
    wanted = {key: tuple(tensor.shape) for key, tensor in adapter_state(model, name).items()}
    # Embeddings that were resized, or an adapter lies on, are saved beside it, as PEFT or the model names them.
    own = {_plain(key) for key in model.state_dict()}
    shapes = shapes_of(file, remedy=REMEDY)
    found = {key: shape for key, shape in shapes.items() if key in wanted or _plain(key) not in own}
    remedy = f"{REMEDY}; so with {file.parent / ADAPTER_CONFIG}, if that is what was changed"
    check_shapes(file, found, wanted, remedy=remedy)


# ---------------------------------------------------------------- base models


def base_of_adapter(name: str) -> str | None:
    """Return the base model that the PEFT adapter in a folder names; None for anything else than such a folder."""
    folder = Path(name)
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    if (folder / CONFIG_FILE).is_file() and (kind := read_kind(folder)) not in (None, "export"):
        raise ValueError(
            f"{name} holds a {kind}, whose adapter is a part of what it does; write its model of one trade-off with "
            "mopl export and name that"
        )
    base = read_json(folder / ADAPTER_CONFIG, AdapterRecord, remedy=REMEDY).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{name} holds a PEFT adapter, but its {ADAPTER_CONFIG} names no base model; write its directory or name "
            "on the hub there, as base_model_name_or_path"
        )
    if (Path(base) / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{name} holds a PEFT adapter whose base model {base} is a PEFT adapter too; merge that one first, and "
            "write the merged model's directory as base_model_name_or_path"
        )
    return base


@contextlib.contextmanager
def naming_base(name: str, base: str) -> Iterator[None]:
    """Say of a base model that cannot be loaded inside the `with` block whose base it is."""
    try:
        yield
    except PermissionError:
        raise
    except OSError as error:
        raise OSError(
            f"{name} holds a PEFT adapter of the base model {base}, which cannot be loaded ({error}); put it there, or "
            f"write its place into {Path(name) / ADAPTER_CONFIG}, as base_model_name_or_path"
        ) from error


@torch.no_grad()
def merge_adapter(name: str, model: Any) -> Any:
    """Return a base model, not fused, with the adapter of a folder merged in; it is changed.

    In its own dtype: summed in float32, rounded once. What is quantised, or a kind that cannot be merged, is an error.
    """
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"the adapter of {name} cannot be merged into quantised parameters; write another base model")
    dtype, wrapped = model.dtype, load_adapters(model, {"default": Path(name)})
    kind = type(wrapped.peft_config["default"]).__name__.removesuffix("Config")
    remedy = "start from its base model, or in Python pass the PEFT model to a trainer of mopl.integrations"
    if wrapped.peft_config["default"].is_prompt_learning or not hasattr(wrapped, "merge_and_unload"):
        raise ValueError(f"{name} holds a PEFT adapter of kind {kind}, which cannot be merged; {remedy}")
    try:
        plain = merged(wrapped, dtype)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"the adapter of {name} ({kind}) cannot be merged: {error}; {remedy}") from error
    settle_merged(plain)
    set_name(plain, name)
    return plain.eval()


def base_with_adapters(
    record: Mapping[str, Any], folder: Path, model: Any, options: Mapping[str, Any], *, trainable: bool
) -> Any:
    """Return the base model that was passed, or the one that a record names, with the adapters that it speaks of.

    Raises:
        ValueError: If there is neither, or an adapter does not fit it.
    """
    check_options(model, options)
    if model is None:
        if record["base_model"] is None:
            raise ValueError(f"{folder / CONFIG_FILE} names no base model; pass it as model")
        model = _load_base(record["base_model"], {"trust_remote_code": False, **options})
    if not (adapters := adapters_of(record)):
        return model
    check_no_adapters(model)
    with fitting(folder / CONFIG_FILE):
        return load_adapters(model, {name: adapter_folder(folder, name) for name in adapters}, trainable=trainable)


def _load_base(name: str, options: Mapping[str, Any]) -> Any:
    require("transformers")
    from transformers import AutoModelForCausalLM

    if (base := base_of_adapter(name)) is not None:
        with naming_base(name, base), naming_own_code(base):
            return merge_adapter(name, AutoModelForCausalLM.from_pretrained(base, **options))
    with naming_own_code(name):
        return AutoModelForCausalLM.from_pretrained(name, **options)
