"""Files of models that take weights: written, found by the name of their kind, read, and loaded in place."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mopl._extras import require
from mopl._files import write_files
from mopl._records import damaged, read_json
from mopl._sharded import gathered, is_sharded, resharded, set_copies, set_shards
from mopl._tensor_files import read_tensors
from mopl._threads import Turns, in_turn
from mopl.conditioning.adapted import adapter_state, held, shared_places
from mopl.conditioning.causal_lm import is_peft
from mopl.conditioning.saved_models import (
    CONFIG_FILE,
    KINDS,
    REMEDY,
    Record,
    SettingsRecord,
    TuningRecord,
    adapter_folder,
    adapters_of,
    base_with_adapters,
    fitting,
    read_adapters,
    read_kind,
    read_record,
    set_adapters,
)

if TYPE_CHECKING:
    from typing_extensions import Self


class SavedModel(nn.Module):
    """A model around another one, which knows its files by its `KIND`; what is not in `model` is trained and saved."""

    KIND: ClassVar[str]  # as `mopl.json` says
    SCHEMA: ClassVar[type[Record]] = SettingsRecord  # of what `mopl.json` says
    WEIGHTS_FILE: ClassVar[str | None] = "conditioning.safetensors"  # of what is trained and no adapter
    SAVES_ALL: ClassVar[bool] = False  # whether its files have all parameters of the model inside, adapters or not
    model: Any
    record: TuningRecord

    def __init__(self) -> None:
        super().__init__()
        self._turns = Turns()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register a kind of model by its `KIND`."""
        super().__init_subclass__(**kwargs)
        if "KIND" not in cls.__dict__:
            return
        known = KINDS.get(cls.KIND, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(
                f"{cls.__qualname__} has KIND {cls.KIND!r}, which is that of {known.__module__}.{known.__qualname__}; "
                "give it another"
            )
        KINDS[cls.KIND] = cls

    @in_turn
    def save_pretrained(self, directory: str | os.PathLike[str], **options: Any) -> None:
        """Write `mopl.json` and what was trained into a folder, without a base model that is frozen.

        A `ParameterMixture`, and a `TextPromptModel` of a model without adapters, write the whole model. Where FSDP2 or
        ZeRO-3 has sharded the model, every process must call this: the first one writes the whole tensors.

        Args:
            directory: The folder.
            **options: `tokenizer=False` of a `TextPromptModel` leaves its tokenizer out, for where the base model has
                the same; `is_main_process` says which processes write the files of a sharded model, if it is not
                the first one. What else trainers pass to models of transformers changes nothing.
        """
        if self.WEIGHTS_FILE is not None:
            require("safetensors")  # before a folder is made
        own = next(cls for cls in type(self).__mro__ if not cls.__module__.startswith("torch."))  # not FSDP's
        named = {} if "KIND" in own.__dict__ else {"subclass": f"{own.__module__}.{own.__qualname__}"}
        told = {"kind": self.KIND, **named, **self.record.to_dict(), **self._described()}
        writes = True
        if is_sharded(self):
            writes = bool(options.get("is_main_process", torch.distributed.get_rank() == 0))
        with self._whole(writes):
            if writes:
                self._save(directory, told, options)

    def _save(self, directory: str | os.PathLike[str], told: dict[str, Any], options: dict[str, Any]) -> None:
        described = json.dumps(told, indent=2) + "\n"

        def fill(folder: Path) -> None:
            (folder / CONFIG_FILE).write_text(described, encoding="utf-8")
            self._write(folder, **options)

        # Where the last one is, all are.
        write_files(directory, fill, last=self.WEIGHTS_FILE or CONFIG_FILE)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        model: nn.Module | None = None,
        *,
        trainable: bool = False,
        **options: Any,
    ) -> Self:
        """Load what `save_pretrained` wrote, in evaluation mode.

        Args:
            directory: The folder. `WeightedModel.from_pretrained` takes any kind, a subclass its own.
            model: The base model, plain or fused, without adapters, loaded by the name in `mopl.json` if None; of a
                `ParameterMixture` a model of the same architecture, whose values are replaced, made from the saved
                configuration (causal language models of transformers) if None.
            trainable: Whether what was trained is to be trained further.
            **options: `coefficients` of a mixture: the function of (w, α), if it was none that a file can hold;
                `tokenizer` of a `TextPromptModel`, if it is neither in the folder nor with the base model; and
                keywords of `AutoModelForCausalLM.from_pretrained`, or of `from_config`, such as `dtype`.

        Raises:
            FileNotFoundError: If the folder holds no such model.
            ValueError: If it holds another kind, or a model or coefficients are needed and missing, or do not fit.
        """
        folder = Path(directory)
        if hasattr(cls, "KIND"):
            kind: Any = cls
        else:
            kind = KINDS[registered_kind(folder)]
            if subclass := read_json(folder / CONFIG_FILE, remedy=REMEDY).get("subclass"):
                raise ValueError(
                    f"{folder} was saved by {str(subclass)[:200]}, which has no KIND of its own and so cannot be told "
                    f"from a {kind.KIND}; load it by its own from_pretrained, or give it a KIND before it is saved"
                )
        if not issubclass(kind, cls) or not hasattr(kind, "KIND"):
            raise ValueError(f"{folder / CONFIG_FILE} holds a {registered_kind(folder)}, which is no {cls.__name__}")
        config = read_record(folder, kind.KIND, kind.WEIGHTS_FILE or CONFIG_FILE)
        return kind._load(folder, config, model, trainable=trainable, **options).eval()  # type: ignore[return-value]

    def trained_state(self) -> dict[str, Tensor]:
        """Return what was trained by name, adapters as PEFT's files have it: the tensors are those of the model."""
        adapters = {name: adapter_state(self.model, name) for name in self._adapters}
        return self._state() | {f"{name}/{key}": value for name, own in adapters.items() for key, value in own.items()}

    @in_turn
    @torch.no_grad()
    def load_weights(self, directory: str | os.PathLike[str]) -> None:
        """Load what was trained, from a folder of `save_pretrained`, into this model, whose optimizer stays valid.

        Raises:
            FileNotFoundError: If the folder holds no such model.
            ValueError: If it is another kind of model, has other objectives or adapters, or does not fit.
        """
        folder = Path(directory)
        config = read_record(folder, self.KIND, self.WEIGHTS_FILE or CONFIG_FILE)
        if tuple(config["objectives"]) != self.record.objectives:
            raise ValueError(
                f"{folder} was trained on {tuple(config['objectives'])} but the model is for {self.record.objectives}"
            )
        if (found := adapters_of(config)) != self._adapters:
            words = [", ".join(names) or "none" for names in (found, self._adapters)]
            raise ValueError(f"{folder} has the adapters {words[0]} but the model has {words[1]}")
        mine = json.loads(json.dumps(self._described()))
        for key in ("coefficients", "positions", "prompt", "scope", "sets", "settings", "template", "whole"):
            if key in config and key in mine and not _same(config[key], mine[key]):
                raise ValueError(
                    f"{folder} has {key} {config[key]!r} but the model {mine[key]!r}, for which its weights were not "
                    "trained; load it by from_pretrained"
                )
        with self._whole(True, changed=True):
            states = read_adapters(self.model, {name: adapter_folder(folder, name) for name in found})
            self._read_state(folder)
            if not is_sharded(self):
                return set_adapters(self.model, states)
            for name, state in states.items():  # PEFT would load them by what FSDP2 watches
                own = {**self.model.state_dict(), **adapter_state(self.model, name)}
                for key, value in state.items():
                    own[key].copy_(value)

    @contextlib.contextmanager
    def _whole(self, present: bool, *, changed: bool = False) -> Iterator[None]:
        """Have the parameters that files hold whole inside a `with` block, if the model is sharded.

        Args:
            present: Whether this process has them; the others only do their part.
            changed: The block changes them, in all processes alike, and the shards are to follow.
        """
        if not is_sharded(self):
            yield
            own = dict(self.named_parameters()) if changed else {}
            return set_copies(own, own)
        with resharded(self):
            own = {name: p for name, p in self.named_parameters() if self._is_in_files(name, p)}
            whole = gathered(own, keep=present)
            with held(shared_places(self, {id(own[name]): value for name, value in whole.items()})):
                yield
            if changed:
                set_shards(own, whole)
                set_copies(own, whole)

    def _is_in_files(self, name: str, parameter: nn.Parameter) -> bool:
        if not name.startswith("model."):
            return True
        if self.SAVES_ALL or not is_peft(self.model):
            return self._saves_inside
        base = self.model.get_base_model()
        embeddings = (base.get_input_embeddings(), base.get_output_embeddings())  # PEFT writes those that were resized
        inside = any(parameter is own for part in embeddings if part is not None for own in part.parameters())
        return inside or parameter.requires_grad or not set(self._adapters).isdisjoint(name.split("."))

    @property
    def _saves_inside(self) -> bool:
        """Whether files hold the model inside where it has no adapters."""
        return self.SAVES_ALL

    @torch.no_grad()
    def _read_state(self, folder: Path) -> None:
        state = self._state()
        shapes = {name: value.shape for name, value in state.items()}
        if self.WEIGHTS_FILE is not None:
            for name, value in read_tensors(folder / self.WEIGHTS_FILE, shapes, remedy=REMEDY).items():
                state[name].copy_(value)

    @property
    def _adapters(self) -> list[str]:
        """Names of the adapters that are saved."""
        active = list(self.model.active_adapters) if is_peft(self.model) else []
        if len(active) > 1:
            raise ValueError(
                f"the model has the active adapters {', '.join(active)}, and a {type(self).__name__} has one; activate "
                "it with model.set_adapter, or merge the others first"
            )
        return active

    def _state(self) -> dict[str, Tensor]:
        """Return the tensors of `WEIGHTS_FILE`, which are those of the model: all that are not the model's inside."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("model.")}

    def settings(self) -> dict[str, Any]:
        """Return the keywords of `__init__`, besides `model` and `record`, that make this model again: plain values."""
        raise NotImplementedError(f"{type(self).__name__} has no settings(): return what __init__ takes, by name")

    def _described(self) -> dict[str, Any]:
        """Return what `mopl.json` says of this kind of model alone."""
        described = {"base_model": self._base_name, "adapter": next(iter(self._adapters), None)}
        return {**described, "settings": self.settings(), "module": type(self).__module__}

    def _write(self, folder: Path, **_: Any) -> None:
        """Write the other files."""
        if self._adapters:
            self.model.save_pretrained(str(folder), selected_adapters=self._adapters)
        if self.WEIGHTS_FILE is not None:
            from safetensors.torch import save_file

            state = {name: value.detach().cpu().contiguous() for name, value in self._state().items()}
            save_file(state, str(folder / self.WEIGHTS_FILE), metadata={"format": "pt"})

    @classmethod
    def _load(
        cls, folder: Path, config: dict[str, Any], model: nn.Module | None, *, trainable: bool, **options: Any
    ) -> SavedModel:
        """Return the model of a folder, whose `mopl.json` says `config`."""
        base = base_with_adapters(config, folder, model, options, trainable=trainable)
        with fitting(folder / CONFIG_FILE):
            try:
                made: Any = cls(base, record=TuningRecord.read(config), **config.get("settings", {}))  # type: ignore[call-arg]
            except TypeError as error:
                raise ValueError(f"settings do not fit: {error}") from None
        made._read_state(folder)
        for name, parameter in made.named_parameters():
            if not trainable and not name.startswith("model."):  # else as `__init__` left it
                parameter.requires_grad_(False)
        return made

    @property
    def _base_name(self) -> str | None:
        return getattr(self, "name_or_path", "") or None


def _same(saved: Any, own: Any) -> bool:
    """Say whether settings of a file are a model's; older files may lack some."""
    if isinstance(saved, dict) and isinstance(own, dict):
        return all(_same(saved[key], own[key]) for key in saved.keys() & own.keys())
    return saved == own


def registered_kind(folder: Path) -> str:
    """Return the registered kind that a folder holds."""
    if not (folder / CONFIG_FILE).exists():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_FILE}; name a folder of save_pretrained")
    kind = read_kind(folder)
    if kind is None:
        raise damaged(folder / CONFIG_FILE, "it names no kind of model", REMEDY)
    if kind not in KINDS:
        module = read_json(folder / CONFIG_FILE, remedy=REMEDY).get("module")
        where = "that defines it" if module in (None, "__main__") else str(module)[:100]
        raise ValueError(
            f"{folder / CONFIG_FILE} holds a {kind}, which no module here defines; import the module {where} first"
        )
    return kind
