"""What a model with adapters, or with a prompt, was when its training began: the reference that it carries in itself.

| the policy                                   | its reference                                    | what it takes    |
|----------------------------------------------|--------------------------------------------------|------------------|
| adapters that do nothing yet (LoRA's B is 0) | the model with adapters off                      | nothing          |
| adapters that the trainer puts on            | the model that was passed: adapters off          | nothing          |
| any other: adapters that were trained before | the model with what is trained as it was; TRL    | a copy of what   |
|                                              | does so with a second adapter, "ref"             | is trained       |
| any, with `adapter=`                         | the model with that adapter in place of its own  | nothing          |

What conditions a `WeightedModel` is off in all of them, but for sets of adapters that were trained before: their start
is another model for each w, which is asked with the weights of each row. The copy is of parameters and not of an
adapter, so it is right for every kind: DoRA's magnitudes, `modules_to_save`, several active adapters, biases, prefixes.
And it is no part of the model, so no optimizer, checkpoint or `save_pretrained` sees it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from mopl._extras import require
from mopl._files import write_file
from mopl._records import read_json
from mopl._restoring import evaluating, requires_grad_kept
from mopl._sharded import gathered, is_partitioned, is_sharded, resharded, shard_of, shards_replaced
from mopl.conditioning import WeightedModel
from mopl.conditioning.adapted import adapter_state, held, shared_places
from mopl.conditioning.causal_lm import adapters_off, is_peft
from mopl.language_models.model_identity import checksum

FILE = "reference.json"


class OwnReference:
    """The reference inside a PEFT model or a `WeightedModel`, fixed when this object is made.

    Args:
        model: The policy, before its first step.
        adapter: Name of another adapter that is the reference.
        added: The adapters were put on a model that was passed without them, which is the reference.

    Attributes:
        kind: `"base"`, `"start"` or `"adapter"`.
        varies_with_weights: Whether it is another one for each w: the start of sets of adapters that differ.

    Raises:
        ValueError: If there is no such adapter, or it is the one to be trained.
    """

    def __init__(self, model: Any, *, adapter: str | None = None, added: bool = False) -> None:
        self.adapter = adapter
        self._start: dict[str, Tensor] = {}
        inner = _inner(model)
        if adapter is not None:
            _check_adapter_name(inner, adapter)
            self.kind = "adapter"
            for name, parameter in inner.named_parameters():
                if adapter in name.split("."):
                    parameter.requires_grad_(False)
        elif (added and not _moves_base(inner)) or starts_at_base(inner):
            self.kind = "base"
        else:
            self.kind = "start"
            trained = {n: p for n, p in inner.named_parameters() if p.requires_grad}
            # Those that transformers has loaded in shards of ZeRO-3 are empty where they stand.
            self._start = {n: p.detach().clone() for n, p in gathered(trained, keep=True).items()}
        weighted = model if isinstance(model, WeightedModel) else None
        self.varies_with_weights = self.kind == "start" and weighted is not None and weighted.varies_with_weights

    @contextlib.contextmanager
    def active(self, model: Any) -> Iterator[None]:
        """Let the policy be its reference inside a `with` block, without dropout; for forward passes without gradient.

        Args:
            model: The model that this was made of, unwrapped.

        Raises:
            ValueError: If something is trained that was not when this was made.
        """
        inner = _inner(model)
        switched: Any = contextlib.nullcontext()
        if self.kind == "start":
            switched = self._restored(inner)
        elif self.adapter is not None:
            switched = _adapter_active(inner, self.adapter)
        elif is_peft(inner) and inner is model:
            switched = adapters_off(inner)
        unconditioned: Any = contextlib.nullcontext()
        if inner is not model and not self.varies_with_weights:
            unconditioned = model.unconditioned(adapters=self.kind != "base")
        # Which parameters are trained a group of layers of FSDP2 reads when it is gathered, and PEFT's switches set it.
        with resharded(model), evaluating(model), unconditioned, switched:
            yield

    @contextlib.contextmanager
    def _restored(self, model: nn.Module) -> Iterator[None]:
        now: dict[str, Any] = dict(model.named_parameters())
        late = [name for name, p in now.items() if p.requires_grad and name not in self._start]
        missing = [name for name in self._start if name not in now]
        if late or missing:
            raise ValueError(
                f"{(late or missing)[0]} {'is trained' if late else 'is gone'}, which was not so when the reference "
                "was taken from the model; choose what is trained before the trainer is made, or pass ref_model"
            )
        if is_sharded(model):  # from now on each process has its share
            self._start = {name: shard_of(value, now[name]) for name, value in self._start.items()}
            with shards_replaced(model, self._start):
                yield
            return
        self._start = {name: value.to(now[name].device, now[name].dtype) for name, value in self._start.items()}
        with held(shared_places(model, {id(now[name]): value for name, value in self._start.items()})):
            yield

    def spread(self, accelerator: Any) -> None:
        """Give every process the copy of the first one, as DDP does with the parameters themselves."""
        if self._start and accelerator.num_processes > 1:
            require("accelerate")
            from accelerate.utils import broadcast

            there = {name: value.to(accelerator.device) for name, value in self._start.items()}
            found: Any = broadcast(there)
            self._start = found

    def fingerprint(self, model: Any) -> str:
        """Return what tells this reference from others that another start of the same training could have."""
        if self.kind == "base":
            return "base"
        if self.kind == "start":
            return f"start {checksum(self._start.items())}"
        assert self.adapter is not None
        state = gathered(adapter_state(_inner(model), self.adapter), keep=True)
        return f"adapter {self.adapter} {checksum(state.items())}"


def _inner(model: Any) -> Any:
    return model.model if isinstance(model, WeightedModel) else model


def _check_adapter_name(model: Any, adapter: str) -> None:
    if not is_peft(model):
        raise ValueError(
            f"reference_adapter is {adapter!r} but a plain {type(model).__name__} has no adapters; pass a PEFT model "
            "that holds it, or pass ref_model"
        )
    if adapter not in model.peft_config:
        there = ", ".join(map(repr, model.peft_config))
        raise ValueError(f"reference_adapter is {adapter!r} but the model has the adapters {there}; name one of them")
    if adapter in model.active_adapters:
        raise ValueError(
            f"reference_adapter is {adapter!r}, which is active and would be trained; activate another with "
            "model.set_adapter, or leave reference_adapter out: the reference is then the adapter as it is now"
        )


# ---------------------------------------------------------------- whether adapters do nothing yet


def starts_at_base(model: nn.Module) -> bool:
    """Say whether a model provably computes what it does with its adapters off, and trains nothing but these."""
    inside: set[int] = set()
    if any(is_partitioned(p) for p in model.parameters() if p.requires_grad):
        return False  # without a look at what other processes have
    if is_peft(model):
        require("peft")
        from peft.tuners.lora import LoraLayer
        from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

        peft_model: Any = model
        active = peft_model.active_adapters
        kinds = [str(getattr(peft_model.peft_config[name].peft_type, "value", "")) for name in active]
        if any(kind != "LORA" for kind in kinds):
            return False
        for module in model.modules():
            if isinstance(module, LoraLayer):
                if module.merged or not all(_is_empty(module, name) for name in active):
                    return False
                parts = (module.lora_A, module.lora_B, module.lora_embedding_A, module.lora_embedding_B)
                inside |= {id(p) for part in parts for p in part.parameters()}
            elif isinstance(module, AuxiliaryTrainingWrapper):
                if not isinstance(module, ModulesToSaveWrapper) or not _is_copy(module, active):
                    return False
                inside |= {id(p) for name, p in module.named_parameters() if "modules_to_save" in name.split(".")}
    return all(id(p) in inside for p in model.parameters() if p.requires_grad)


def _is_empty(layer: Any, adapter: str) -> bool:
    """Say whether the adapter of a LoRA layer is plain and adds nothing."""
    if adapter in getattr(layer, "lora_variant", {}):
        return False
    for down, up in ((layer.lora_A, layer.lora_B), (layer.lora_embedding_A, layer.lora_embedding_B)):
        first, second = (
            [p for name, p in part.named_parameters() if name.split(".")[0] == adapter] for part in (down, up)
        )
        # A bias of the second matrix is added whatever the first one gives.
        if any(p.any() for p in second) and (any(p.any() for p in first) or len(second) > 1):
            return False
    return True


def _is_copy(wrapper: Any, active: list[str]) -> bool:
    """Say whether the copies of a module that is trained whole are equal to the module."""
    original = dict(wrapper.original_module.named_parameters())
    copies = [dict(copy.named_parameters()) for name, copy in wrapper.modules_to_save.items() if name in active]
    return all(
        copy.keys() == original.keys() and all(torch.equal(copy[key], original[key]) for key in copy) for copy in copies
    )


def _moves_base(model: Any) -> bool:
    """Say whether the model without its adapters may be another one than it was: by PiSSA and others, by its biases."""
    return any(
        isinstance(getattr(config, "init_lora_weights", None), str) or getattr(config, "bias", "none") != "none"
        for config in model.peft_config.values()
    )


# ---------------------------------------------------------------- switches


@contextlib.contextmanager
def _adapter_active(model: Any, name: str) -> Iterator[None]:
    before, several = model.active_adapter, model.active_adapters
    with requires_grad_kept(model):
        model.set_adapter(name)
    try:
        yield
    finally:
        with requires_grad_kept(model):
            model.set_adapter(before)
            if len(several) > 1:
                model.base_model.set_adapter(several)


# ---------------------------------------------------------------- the same reference in a resumed training


class _Record(msgspec.Struct):
    reference: str


def write_reference(folder: Path, fingerprint: str | None) -> None:
    """Note in a checkpoint which reference its training has."""
    if fingerprint is not None and folder.is_dir():
        write_file(folder / FILE, f'{{"reference": "{fingerprint}"}}\n')


def check_same_reference(folder: Path, fingerprint: str | None) -> None:
    """Raise if a checkpoint is of a training with another reference; older ones do not say.

    Raises:
        ValueError: If it is another one; `DamagedFile` if that cannot be read.
    """
    if fingerprint is None or not (folder / FILE).is_file():
        return
    remedy = "delete it, and see to it yourself that the model is given as it was when training began"
    found = read_json(folder / FILE, _Record, remedy=remedy)["reference"]
    if found != fingerprint:
        raise ValueError(
            f"{folder} is of a training whose reference was another ({found!r}, now {fingerprint!r}): the reference is "
            "the model as it was when training began, so pass the model as it was then, not as the checkpoint has it "
            "(its parameters are read from there anyway), or pass that model as ref_model"
        )
