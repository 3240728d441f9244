"""Folders of `mopl export --adapters`: one adapter for each objective, and any trade-off of them as one adapter.

    Σ_i w_i B_i A_i x  =  [B_1 ... B_m] [w_1 A_1; ...; w_m A_m] x

A mixture of adapters is an adapter whose factors stand side by side. It is made from the files alone, without a base
model, PEFT or a GPU, so a server can make the one that a request asks for. Only A is multiplied, and A is written in
float32 or float64 whatever the files have: B is copied bit by bit, and each entry of A is one product in float64,
rounded once to float32. What a server then rounds to its own 16-bit format is its own affair.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import torch
from torch import Tensor

from mopl._counted import counted
from mopl._files import write_folder
from mopl._records import DamagedFile, check_file, damaged, read_json
from mopl._tensor_files import read_tensors, write_tensors
from mopl.conditioning.adapter_checks import check_initialisation
from mopl.conditioning.sampling import Weights, check_weights, weights_name, weights_of_name
from mopl.conditioning.saved_models import ADAPTER_CONFIG, ADAPTER_FILE, CONFIG_FILE, AdapterRecord, Names

KIND = "adapters"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes: MaxLoRARanks, vllm/config/lora.py
REMEDY = "make the folder again by `mopl export RUN --adapters DIR`"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?:\.weight)?")
# Keys of adapter_config.json that do not change what an adapter adds, or are compared below. Any other key must say
# nothing (null, false, an empty list or object): PEFT goes on inventing variants of LoRA, each with a key of its own.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
    "r", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_SAME = ("task_type", "fan_in_fan_out", "revision")  # what the adapters of a folder have in common
_FORMAT = b"mopl merged adapters 1"  # another number where other files are made of the same adapters
_CHOOSING = ("exclude_modules", "layers_to_transform", "layers_pattern")  # which modules of the targets have none
_TYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_LONGEST_NAME = 200  # bytes of a folder's name; file systems take 255


class _Record(msgspec.Struct):
    kind: str
    objectives: Names
    adapters: Names
    base_model: str | None = None


@dataclass(frozen=True)
class _Adapter:
    """One adapter: the factors (A (r, ...), B (..., r, ...)) of each module by its name in the base model."""

    folder: Path
    config: Mapping[str, Any]
    factors: Mapping[str, tuple[str, str]]  # names of A and B in the file
    tensors: Mapping[str, Tensor]

    @property
    def rank(self) -> int:
        return self.config["r"]


class AdapterFolder:
    """A folder of `mopl export --adapters`, read when it is asked for a trade-off.

    Args:
        folder: The folder: `mopl.json` and a folder for each adapter.

    Attributes:
        folder: The folder.
        objectives: Names of the m objectives, in the order of weights.
        adapters: Names of the folders of their adapters, in this order.
        base_model: The name of the base model on the hub, or None where it is a local one.

    Raises:
        FileNotFoundError: If the folder or a file in it is missing.
        ValueError: If it is a folder of another kind; `DamagedFile` if a file is not what `mopl export` wrote.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} is no folder; {REMEDY}")
        file = self.folder / CONFIG_FILE
        kind = read_json(file, dict[str, Any], remedy=REMEDY).get("kind")
        if kind != KIND:
            raise ValueError(f"{file} holds {kind!r} but must hold {KIND!r}; {REMEDY}")
        record = read_json(file, _Record, remedy=REMEDY)
        self.objectives: tuple[str, ...] = tuple(record["objectives"])
        self.adapters: tuple[str, ...] = tuple(record["adapters"])
        self.base_model: str | None = record.get("base_model")
        if len(self.adapters) != len(self.objectives):
            many = f"it names {counted(len(self.adapters), 'adapter')} for {counted(len(self.objectives), 'objective')}"
            raise damaged(file, many, REMEDY)
        for name in self.adapters:
            if "\0" in name or Path(name).is_absolute() or len(Path(name).parts) != 1 or name in ("..", "."):
                raise damaged(file, f"the adapter {name!r} is not inside of the folder", REMEDY)
            if self.adapters.count(name) > 1:
                raise damaged(file, f"it names the adapter {name!r} for two objectives", REMEDY)
        for path in self._files():
            check_file(path, remedy=REMEDY)
        self._digest: tuple[Any, str] | None = None

    def _files(self) -> list[Path]:
        inside = [self.folder / name / file for name in self.adapters for file in (ADAPTER_CONFIG, ADAPTER_FILE)]
        return [self.folder / CONFIG_FILE, *inside]

    def digest(self) -> str:
        """Return 16 hexadecimal digits that tell these adapters from any others: of SHA-256 of all their files.

        The files are read again only where size, time or place on the disk of one of them has changed.
        """
        status = [path.stat() for path in self._files()]
        seen = [(one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns) for one in status]
        if self._digest is None or self._digest[0] != seen:
            whole = hashlib.sha256(_FORMAT)
            for path in self._files():
                part = hashlib.sha256()
                with path.open("rb") as stream:
                    while block := stream.read(1 << 22):
                        part.update(block)
                whole.update(part.digest())
            self._digest = seen, whole.hexdigest()[:16]
        return self._digest[1]

    def rank_of(self, weights: Weights) -> int:
        """Return the rank of a trade-off's adapter: the sum of those of the adapters whose weight is not 0."""
        vector = self._checked(weights)
        configs = (
            read_json(self.folder / name / ADAPTER_CONFIG, AdapterRecord, remedy=REMEDY) for name in self.adapters
        )
        return sum(config.get("r", 8) for config, weight in zip(configs, vector, strict=True) if weight)

    def merged(self, weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the configuration and the tensors of one trade-off's adapter, as files of PEFT have them.

        A module that one adapter has and another has not gets zeros for the other, so that all modules are of one rank,
        r = Σ r_i over the adapters whose weight is not 0; the scale is 1 (`lora_alpha` = r).

        Args:
            weights: (m,) on the simplex.

        Returns:
            What `adapter_config.json` says, and A (r, ...) in float32 (float64 where a file has it) and B (..., r, ...)
            in the data type of the files, by name.

        Raises:
            ValueError: As `check_weights`; or if an adapter is no plain LoRA of scale 1, or two do not fit.
        """
        vector = self._checked(weights)
        used = [(self.folder / name, weight) for name, weight in zip(self.adapters, vector, strict=True) if weight]
        adapters = _read_all([folder for folder, _ in used], self.base_model)
        return self._side_by_side(adapters, [weight for _, weight in used])

    def spread(self) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
        """Return each adapter at the rank of all of them, in rows and columns of its own, for servers that add factors.

        Servers that merge adapters "linearly" add A to A and B to B, (Σ c_i A_i) and (Σ c_i B_i), whose product has
        terms B_i A_j that no mixture has. Where adapter i has its own rows of A and columns of B, and zeros in those of
        others, these vanish, and the product is Σ c_i² B_i A_i: the mixture, exactly, for c_i = √w_i.

        Returns:
            What `adapter_config.json` says, and the factors in the data type of the files, by name of the adapter.

        Raises:
            ValueError: As `merged`.
        """
        adapters = _read_all([self.folder / name for name in self.adapters], self.base_model)
        return {
            one.folder.name: self._side_by_side(adapters, [float(other is one) for other in adapters], widen=False)
            for one in adapters
        }

    def _side_by_side(
        self, adapters: Sequence[_Adapter], weights: Sequence[float], *, widen: bool = True
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        modules = sorted({module for adapter in adapters for module in adapter.factors})
        tensors: dict[str, Tensor] = {}
        for module in modules:
            tensors |= _side_by_side(module, adapters, weights, widen=widen)
        rank = sum(adapter.rank for adapter in adapters)
        config = {
            "peft_type": "LORA", "base_model_name_or_path": self.base_model, "r": rank, "lora_alpha": rank,
            "target_modules": _targets(adapters) or modules, "lora_dropout": 0.0, "bias": "none",
            "inference_mode": True, "use_rslora": False, "use_dora": False, "modules_to_save": None,
            **{key: adapters[0].config.get(key) for key in _SAME},
        }  # fmt: skip
        return config | {"fan_in_fan_out": bool(config["fan_in_fan_out"])}, tensors

    def _checked(self, weights: Weights) -> list[float]:
        vector = check_weights(weights, len(self.objectives)).detach().double()
        if vector.ndim != 1:
            raise ValueError(f"weights has shape {tuple(vector.shape)} but must be ({len(self.objectives)},)")
        return vector.tolist()


def write_merged_adapter(
    adapters: AdapterFolder, weights: Weights, folder: str | os.PathLike[str], *, replace: bool = False
) -> None:
    """Write one trade-off of a folder of adapters as one PEFT adapter, whole or not at all; see `AdapterFolder.merged`.

    Args:
        adapters: The folder of adapters.
        weights: (m,) on the simplex.
        folder: The folder to make: `adapter_config.json` and `adapter_model.safetensors`.
        replace: Replace a folder that is there.

    Raises:
        FileExistsError: If something is there that is not to be replaced.
        ValueError: As `AdapterFolder.merged`; or if the files of the adapters were replaced meanwhile.
        OSError: If the folder cannot be made.
    """
    before = adapters.digest()
    config, tensors = adapters.merged(weights)
    if adapters.digest() != before:
        raise ValueError(f"{adapters.folder} was written anew while it was read; ask again")
    write_folder(folder, lambda path: _write(path, config, tensors), replace=replace)


def write_spread_adapters(adapters: AdapterFolder, folder: str | os.PathLike[str], *, replace: bool = False) -> None:
    """Write the adapters for servers that add factors, each a folder in `folder`; see `AdapterFolder.spread`.

    Args:
        adapters: The folder of adapters.
        folder: The folder to make.
        replace: Replace a folder that is there.

    Raises:
        FileExistsError: If something is there that is not to be replaced.
        ValueError: As `AdapterFolder.merged`.
        OSError: If the folder cannot be made.
    """
    made = adapters.spread()

    def fill(path: Path) -> None:
        for name, (config, tensors) in made.items():
            (path / name).mkdir()
            _write(path / name, config, tensors)

    write_folder(folder, fill, replace=replace)


def _write(path: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    write_tensors(path / ADAPTER_FILE, tensors, {"format": "pt"})
    (path / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def name_and_weights(weights: Weights) -> tuple[str, Tensor]:
    """Return the name of a trade-off's folder, and the weights (m,) that the name means: those with its digits."""
    name = weights_name(weights)
    exact = weights_of_name(name, name.count(",") + 1)
    if len(name) > _LONGEST_NAME:
        name = f"w={hashlib.sha256(name.encode()).hexdigest()}"
    return name, exact


def _read_all(folders: Sequence[Path], base_model: str | None) -> list[_Adapter]:
    """Read adapters; raise unless they are plain, for this base model, and agree on what a merged one has once."""
    adapters = [_read(folder) for folder in folders]
    for adapter in adapters:
        file = adapter.folder / ADAPTER_CONFIG
        for key in _SAME:
            here, there = adapter.config.get(key), adapters[0].config.get(key)
            if (here or None) != (there or None):
                text = f"{key} is {here!r} but {there!r} in {adapters[0].folder.name}, with which it is mixed"
                raise damaged(file, text, REMEDY)
        if (name := adapter.config.get("base_model_name_or_path")) != base_model:
            raise damaged(file, f"base_model_name_or_path is {name!r} but {base_model!r} in {CONFIG_FILE}", REMEDY)
    return adapters


def _read(folder: Path) -> _Adapter:
    """Read an adapter; raise unless it is a plain LoRA of scale 1, all of whose tensors are understood."""
    file = folder / ADAPTER_CONFIG
    config = read_json(file, AdapterRecord, remedy=REMEDY)
    if config["peft_type"] != "LORA":
        raise damaged(file, f"peft_type is {config['peft_type']!r} but must be 'LORA'", REMEDY)
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if alpha != rank or rank < 1:
        raise damaged(file, f"r is {rank} and lora_alpha {alpha} but they must be equal, for a scale of 1", REMEDY)
    if said := sorted(
        key
        for key in config.keys() - _HARMLESS
        if config[key] not in (None, "none", [], {}, ()) and config[key] is not False
    ):
        text = f"{said[0]} is {config[said[0]]!r}, which is no plain LoRA"
        if said == ["lora_bias"]:
            remedy = "no server adds the biases of adapters: train without lora_bias, or ask PEFT or mopl"
        else:
            remedy = f"{REMEDY}, which writes what is mixed as plain LoRA, or says why that cannot be"
        raise damaged(file, text, remedy)
    check_initialisation(folder.name, SimpleNamespace(**config))
    path = folder / ADAPTER_FILE
    tensors = read_tensors(path, remedy=REMEDY)
    found: dict[str, dict[str, str]] = {}
    for key in tensors:
        if (match := _KEY.fullmatch(key)) is None or key.endswith(".weight") == bool(match["embedding"]):
            raise damaged(path, f"{key!r} is no factor of a plain LoRA", REMEDY)
        if match["factor"] in found.setdefault(match["module"], {}):
            raise damaged(path, f"{match['module']!r} has two factors {match['factor']}", REMEDY)
        found[match["module"]][match["factor"]] = key
    if not found:
        raise damaged(path, "it has no factors", REMEDY)
    for module, pair in found.items():
        if pair.keys() != {"A", "B"}:
            raise damaged(path, f"{module!r} has the factor {next(iter(pair))} alone", REMEDY)
        a, b = tensors[pair["A"]], tensors[pair["B"]]
        if a.ndim < 2 or b.ndim != a.ndim or (a.shape[0], b.shape[1]) != (rank, rank):
            shapes = f"the factors of {module!r} are {tuple(a.shape)} and {tuple(b.shape)}"
            raise damaged(path, f"{shapes} but must be ({rank}, ...) and (..., {rank}), as r says", REMEDY)
        if not {a.dtype, b.dtype} <= _TYPES:
            raise damaged(path, f"the factors of {module!r} are {a.dtype} and {b.dtype} but must be of "
                          "floating-point numbers of 16 bits or more", REMEDY)  # fmt: skip
    return _Adapter(folder, config, {module: (pair["A"], pair["B"]) for module, pair in found.items()}, tensors)


def _targets(adapters: Sequence[_Adapter]) -> list[str] | None:
    """Return the short names of the modules that adapters are on, None where other keys leave some of these out.

    A name means all modules that end in it, so those of several adapters mean together what each of them means.
    Servers that make room by these names, as SGLang does, need not know full ones then.
    """
    names: set[str] = set()
    for adapter in adapters:
        given = adapter.config.get("target_modules")
        if not isinstance(given, list) or any(adapter.config.get(key) not in (None, []) for key in _CHOOSING):
            return None
        names.update(given)
    return sorted(names)


def _side_by_side(
    module: str, adapters: Sequence[_Adapter], weights: Sequence[float], *, widen: bool = True
) -> dict[str, Tensor]:
    """Return both factors of a module, by name: [w_1 A_1; ...] and [B_1 ...], zeros where an adapter has none.

    Without `widen` weights are 0 or 1, both factors of an adapter of weight 0 are zeros, and A keeps its data type.
    """
    having = [adapter for adapter in adapters if module in adapter.factors]
    names = having[0].factors[module]
    pairs = {adapter.folder: [adapter.tensors[key] for key in adapter.factors[module]] for adapter in having}
    like_a, like_b = pairs[having[0].folder]
    for adapter in having:
        a, b = pairs[adapter.folder]
        same = (a.shape[1:], b.shape[:1], b.shape[2:]) == (like_a.shape[1:], like_b.shape[:1], like_b.shape[2:])
        if adapter.factors[module] != names or not same:
            there = f"{tuple(like_a.shape)} and {tuple(like_b.shape)} in {having[0].folder.name}"
            text = f"the factors of {module!r} are {tuple(a.shape)} and {tuple(b.shape)} but {there}"
            raise damaged(adapter.folder / ADAPTER_FILE, text, REMEDY)
    a_type = torch.float32 if widen else like_a.dtype
    b_type = like_b.dtype
    for a, b in pairs.values():
        a_type, b_type = torch.promote_types(a_type, a.dtype), torch.promote_types(b_type, b.dtype)
    rows, columns = [], []
    for adapter, weight in zip(adapters, weights, strict=True):
        if adapter.folder in pairs and (widen or weight):
            a, b = pairs[adapter.folder]
            rows.append((weight * a.double()).to(a_type))
            columns.append(b.to(b_type))
        else:
            rows.append(torch.zeros(adapter.rank, *like_a.shape[1:], dtype=a_type))
            columns.append(torch.zeros(like_b.shape[0], adapter.rank, *like_b.shape[2:], dtype=b_type))
    made = torch.cat(rows), torch.cat(columns, 1).contiguous()
    for tensor, name in zip(made, names, strict=True):
        if not bool(tensor.isfinite().all()):
            raise DamagedFile(f"{name!r} of the trade-off is beyond what {tensor.dtype} holds; {REMEDY}")
    return dict(zip(names, made, strict=True))
