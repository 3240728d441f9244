"""Models that take weights of objectives: one base class for every way in which a trade-off enters a model.

A kind of conditioning is a subclass: it says by `KIND` what its files are called, and registers itself by that. What
callers need to know of a model stands here, so that none of them has to ask which kind it is.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mopl._arguments import check_beta_given, check_positive, shape_of
from mopl._extras import require
from mopl._files import write_files
from mopl._records import read_json
from mopl._restoring import requires_grad_kept
from mopl._tensor_files import read_tensors
from mopl._threads import Turns, in_turn
from mopl.conditioning.adapter_checks import check_initialisation
from mopl.conditioning.causal_lm import DELEGATED, is_peft
from mopl.conditioning.sampling import Weights, check_weights
from mopl.conditioning.saved_models import (
    CONFIG_FILE,
    REMEDY,
    SCHEMAS,
    Record,
    SettingsRecord,
    TuningRecord,
    adapters_of,
    base_with_adapter,
    check_adapter_files,
    fitting,
    load_adapter_values,
    read_kind,
    read_record,
)
from mopl.conditioning.text_prompt import TextPrompt

if TYPE_CHECKING:
    from typing_extensions import Self

KINDS: dict[str, type[WeightedModel]] = {}  # by the name that `mopl.json` has for them


class WeightedModel(nn.Module):
    """A model around another one that takes weights of objectives.

    Attributes:
        model: The model inside.
        record: Names of the objectives and how it was trained.
    """

    KIND: ClassVar[str]  # as `mopl.json` says
    SCHEMA: ClassVar[type[Record]] = SettingsRecord  # of what `mopl.json` says
    WEIGHTS_FILE: ClassVar[str | None] = "conditioning.safetensors"  # of what is trained and no adapter
    text_prompt: TextPrompt | None = None  # what writes the trade-off into prompts, where it is told in words
    model: Any
    record: TuningRecord

    def __init__(self) -> None:
        super().__init__()
        self._turns = Turns()
        self._is_reference = False
        self._held: dict[str, Any] | None = None  # what `at` holds

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
        KINDS[cls.KIND], SCHEMAS[cls.KIND] = cls, cls.SCHEMA

    def __getattr__(self, name: str) -> Any:
        """Read from the causal language model what trainers ask of a model."""
        return getattr(self.causal_lm, name) if name in DELEGATED else super().__getattr__(name)

    # ---------------------------------------------------------------- what callers ask

    @property
    def causal_lm(self) -> Any:
        """The causal language model itself, without PEFT's wrapper."""
        return self.model.get_base_model() if is_peft(self.model) else self.model

    @property
    def is_reference(self) -> bool:
        """Whether it is the model that it was tuned from now, which is so inside of `reference()`."""
        return self._is_reference

    @property
    def takes_beta(self) -> bool:
        """Whether it is conditioned on β of the objectives, too."""
        return False

    @property
    def takes_kl_weight(self) -> bool:
        """Whether it is conditioned on the KL weight α, too."""
        return False

    @property
    def virtual_tokens(self) -> int:
        """How many positions stand in front of each row that are no part of what comes back."""
        return 0

    @property
    def takes_embeddings(self) -> bool:
        """Whether the model inside is called with embeddings, as `takes_left_padding(..., embeds=)` wants to know."""
        return False

    @property
    def arranges_rows(self) -> bool:
        """Whether it takes rows by their mask alone: callers add no positions, and do not call `arranged`."""
        return False

    @property
    def decodes_rows(self) -> bool:
        """Whether rows with weights of their own are decoded together, with one cache; else one trade-off at a time."""
        return True

    @property
    def takes_packed_rows(self) -> bool:
        """Whether each sequence of a packed row (1, N) may have weights of its own, (S, m)."""
        return False

    @property
    def varies_with_weights(self) -> bool:
        """Whether what is trained are sets of parameters that differ: at its start, too, it is what the weights say."""
        return False

    def write_weights(self, input_ids: list[int], weights: Weights, beta: Any = None) -> list[int]:
        """Return the tokens of a prompt as the model inside reads them: with the trade-off, if it is told in words."""
        return input_ids

    def conditions(self, weights: Weights | None, beta: Any = None, kl_weight: Any = None) -> dict[str, Any]:
        """Return the keywords by which `forward` and `generate` take a trade-off, checked.

        Args:
            weights: w, (m,) or (B, m), on the simplex.
            beta: β, (m,), (1, m) or (B, m), positive: of a model that `takes_beta`.
            kl_weight: α, a number or (B,): of a model that `takes_kl_weight`.

        Returns:
            `weights`, and `beta` or `kl_weight` where they were passed.

        Raises:
            ValueError: If one of them is missing, unexpected, out of range or of another shape.
        """
        names = self.record.objectives
        if weights is None:
            raise ValueError(f"weights are missing; pass one for each of {', '.join(names)}")
        given: dict[str, Any] = {"weights": check_weights(weights, len(names))}
        rows = given["weights"].shape[:-1]
        if len(rows) > 1:
            raise ValueError(f"weights has shape {shape_of(given['weights'])}; pass (m,) = ({len(names)},) or (B, m)")
        check_beta_given(beta, self.takes_beta, f"to a {type(self).__name__} that is not conditioned on it")
        if beta is not None:
            given["beta"] = check_positive(torch.as_tensor(beta), "beta")
            if tuple(given["beta"].shape) not in ((len(names),), (1, len(names)), (*rows, len(names))):
                raise ValueError(
                    f"beta has shape {shape_of(given['beta'])} but weights {shape_of(given['weights'])}; pass "
                    f"({len(names)},) or one row for each of the weights"
                )
        if kl_weight is not None:
            given["kl_weight"] = self._checked_kl_weight(kl_weight)
        return given

    def _checked_kl_weight(self, kl_weight: Any) -> Any:
        if not self.takes_kl_weight:
            raise ValueError(f"kl_weight was passed to a {type(self).__name__} that is not conditioned on it")
        return kl_weight

    def _conditions_of_one(self, weights: Weights, beta: Any, kl_weight: Any) -> dict[str, Any]:
        given = self.conditions(weights, beta, kl_weight)
        if given["weights"].ndim != 1:
            raise ValueError(f"weights are {len(given['weights'])} vectors but one trade-off has one; pass (m,)")
        return given

    def _unless_fixed(self, **given: Any) -> dict[str, Any]:
        """Return the conditions of a call, or those that `at` holds."""
        given = {name: value for name, value in given.items() if value is not None}
        if self._held is None or self._is_reference:
            return given
        if given:
            raise ValueError(f"the trade-off is fixed inside `at`; leave {' and '.join(given)} out")
        return self._held

    # ---------------------------------------------------------------- one trade-off, and none

    @contextlib.contextmanager
    def at(self, weights: Weights, kl_weight: Any = None, *, beta: Any = None) -> Iterator[Any]:
        """Be the model of one trade-off inside a `with` block; it holds for all threads.

        Args:
            weights: w, (m,).
            kl_weight: α, a number, of a model that `takes_kl_weight`.
            beta: β, (m,), of a model that `takes_beta`.

        Yields:
            A model that is called without them.

        Raises:
            ValueError: If they do not fit.
        """
        given = self._conditions_of_one(weights, beta, kl_weight)
        before, self._held = self._held, given
        try:
            yield self
        finally:
            self._held = before

    def merge(self, weights: Weights, kl_weight: Any = None, *, beta: Any = None) -> nn.Module:
        """Return a copy of the model at one trade-off, with no trace of the others: save it, export it, serve it.

        Raises:
            ValueError: If weights do not fit, or if there is no such model.
        """
        self._conditions_of_one(weights, beta, kl_weight)
        raise ValueError(
            f"a {type(self).__name__} cannot be merged: its trade-off is not in the parameters; use `with "
            "model.at(weights) as one:`, or write a directory that needs no mopl with mopl.language_models.export"
        )

    @contextlib.contextmanager
    def reference(self, *, adapters: bool = False) -> Iterator[Any]:
        """Be the model that it was tuned from inside a `with` block.

        Calls may still pass weights; they change nothing. Gradients and dropout are as the caller sets them.

        Args:
            adapters: Whether adapters stay that are not what it is conditioned by.

        Raises:
            ValueError: If an adapter took a part of the base model's weights when it was made (PiSSA, OLoRA, ...).
        """
        before, self._is_reference = self._is_reference, True
        off = is_peft(self.model) and not adapters
        try:
            if off:
                for name, config in self.model.peft_config.items():
                    check_initialisation(name, config)
            with requires_grad_kept(self.model), self.model.disable_adapter() if off else contextlib.nullcontext():
                yield self
        finally:
            self._is_reference = before

    # ---------------------------------------------------------------- files

    @in_turn
    def save_pretrained(self, directory: str | os.PathLike[str], **options: Any) -> None:
        """Write `mopl.json` and what was trained into a folder; never a frozen base model.

        Args:
            directory: The folder.
            **options: `tokenizer=False` of a `TextPromptModel` leaves its tokenizer out, for where the base model has
                the same. What else trainers pass to models of transformers changes nothing.
        """
        if self.WEIGHTS_FILE is not None:
            require("safetensors")  # before a folder is made
        described = json.dumps({"kind": self.KIND, **self.record.to_dict(), **self._described()}, indent=2) + "\n"

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
        kind = cls if hasattr(cls, "KIND") else KINDS.get(_kind_of(folder), cls)
        if not issubclass(kind, cls) or not hasattr(kind, "KIND"):
            raise ValueError(f"{folder / CONFIG_FILE} holds a {_kind_of(folder)}, which is no {cls.__name__}")
        config = read_record(folder, kind.KIND, kind.WEIGHTS_FILE or CONFIG_FILE)
        return kind._load(folder, config, model, trainable=trainable, **options).eval()  # type: ignore[return-value]

    def trained_state(self) -> dict[str, Tensor]:
        """Return what was trained by name, adapters as PEFT's files have it: the tensors are those of the model."""
        state = dict(self._state())
        if self._adapters:
            require("peft")
            from peft import get_peft_model_state_dict
        for adapter in self._adapters:
            own = get_peft_model_state_dict(self.model, adapter_name=adapter, save_embedding_layers=False)
            state |= {f"{adapter}/{name}": value for name, value in own.items()}
        return state

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
        check_adapter_files(self.model, folder, found)
        self._read_state(folder)
        load_adapter_values(self.model, folder, found)

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
        return [self.model.active_adapter] if is_peft(self.model) else []

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
    ) -> WeightedModel:
        """Return the model of a folder, whose `mopl.json` says `config`."""
        base = base_with_adapter(config, folder, model, options, trainable=trainable)
        with fitting(folder / CONFIG_FILE):
            try:
                made: Any = cls(base, record=TuningRecord.read(config), **config["settings"])  # type: ignore[call-arg]
            except TypeError as error:
                raise ValueError(f"settings do not fit: {error}") from None
        made._read_state(folder)
        for name, parameter in made.named_parameters():
            if not name.startswith("model."):
                parameter.requires_grad_(trainable)
        return made

    @property
    def _base_name(self) -> str | None:
        return getattr(self, "name_or_path", "") or None


Conditioned = WeightedModel  # its name where a mixture of any module's parameters was meant, too


def _kind_of(folder: Path) -> str | None:
    """Return the registered kind that a folder holds."""
    if not (folder / CONFIG_FILE).exists():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_FILE}; name a folder of save_pretrained")
    kind = read_kind(folder)
    if kind is not None and kind not in KINDS:
        module = read_json(folder / CONFIG_FILE, remedy=REMEDY).get("module")
        where = "that defines it" if module in (None, "__main__") else str(module)[:100]
        raise ValueError(
            f"{folder / CONFIG_FILE} holds a {kind}, which no module here defines; import the module {where} first"
        )
    return kind


def causal_lm_of(model: Any) -> Any:
    """Return the causal language model inside a `WeightedModel` or a PEFT model, or the model itself."""
    if isinstance(model, WeightedModel):
        return model.causal_lm
    return model.get_base_model() if is_peft(model) else model
