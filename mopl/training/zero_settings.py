"""What DeepSpeed is told in a training, made of what accelerate's launcher was told, and what of that is refused.

The settings are named by what they are, so that one that nobody has thought of is refused, not obeyed halfway.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mopl._extras import require

_ASKED, _FILE = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE"

# What accelerate reads settings in, each after what it is in; and what transformers reads besides.
_ZERO_BLOCKS = ("zero_optimization", "zero_optimization.offload_optimizer", "zero_optimization.offload_param")
_BLOCKS = (*_ZERO_BLOCKS, "fp16", "bf16", "optimizer", "optimizer.params", "scheduler", "scheduler.params")
_MAY_BE_NULL = ("zero_optimization.offload_optimizer", "zero_optimization.offload_param")
_EXAMPLES = {
    "": '{"zero_optimization": {"stage": 3}}', "zero_optimization": '{"stage": 3}',
    **dict.fromkeys(("zero_optimization.offload_optimizer", "zero_optimization.offload_param"), '{"device": "none"}'),
    "fp16": '{"enabled": false}', "bf16": '{"enabled": "auto"}',
}  # fmt: skip

# How ZeRO divides memory, messages and time; none of these changes what is computed.
_FREE_ZERO = (
    "allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "memory_efficient_linear", "overlap_comm",
    "reduce_bucket_size", "reduce_scatter", "round_robin_gradients", "stage3_gather_16bit_weights_on_model_save",
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_model_persistence_threshold",
    "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size", "sub_group_size",
)  # fmt: skip
# What is decided here, whatever a file says of it.
_OURS = ("steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")

_REMEDIES = {
    "optimizer": "leave it out: the optimizer is that of the training, AdamW with mopl's --learning-rate",
    "scheduler": "leave it out: the learning rate follows the schedule of the training",
    "train_batch_size": 'leave it out or set "auto": a batch is mopl\'s (--lists-per-batch, --prompts-per-step)',
    "train_micro_batch_size_per_gpu": 'leave it out or set "auto": mopl divides a batch by processes and its '
    "--accumulation",
    "gradient_accumulation_steps": 'leave it out or set "auto" or 1, and pass mopl\'s --accumulation',
    "gradient_clipping": 'leave it out or set "auto": gradients are clipped at gradient_clip of the training',
    "fp16": "leave it out or disable it, and pass mopl's --mixed-precision bf16",
    "bf16": 'leave it out or set "auto": parameters stay in float32, and mopl\'s --mixed-precision bf16 is autocast',
    "zero_optimization.stage": "set 2 or 3, or train with DDP (`--multi_gpu`), where each process has everything",
    "zero_optimization.offload_optimizer": 'leave it out or set its device to "none": an update on the CPU needs an '
    "optimizer of DeepSpeed's own",
    "zero_optimization.offload_param": 'leave it out or set its device to "none", and use more processes',
    "zero_optimization.zero_hpz_partition_size": "leave it out: hpZ keeps a second copy of the shares",
    "zero_optimization.zero_quantized_weights": "leave it out: ZeRO++ rounds what it sends",
    "zero_optimization.zero_quantized_nontrainable_weights": "leave it out: ZeRO++ rounds what it sends",
    "zero_optimization.zero_quantized_gradients": "leave it out: ZeRO++ rounds what it sends",
    "zero_optimization.mics_shard_size": "leave it out: MiCS shares parameters among some of the processes only",
}  # fmt: skip


def deepspeed_was_asked_for() -> bool:
    """Return whether accelerate's launcher was told to use DeepSpeed."""
    return os.environ.get(_ASKED, "false").lower() == "true"


@contextlib.contextmanager
def hidden_from_accelerate() -> Iterator[None]:
    """Let accelerate make an accelerator of DDP inside a `with` block, also where DeepSpeed was asked for.

    Under DeepSpeed it would neither run under autocast nor clip, step or reduce as elsewhere, and on CPUs it would
    leave DeepSpeed out without a word. Models load whole, too: transformers cuts them only where accelerate has asked.
    """
    before = os.environ.pop(_ASKED, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[_ASKED] = before


def check_config(given: Any = None, *, trainer: bool = True) -> None:
    """Raise where DeepSpeed's config has another form than accelerate and transformers take for granted.

    Args:
        given: A dictionary, its JSON or the path of a file; by default the file that accelerate's launcher was told.
            What is none of these is left to accelerate.
        trainer: Whether transformers will read it, too.

    Raises:
        ValueError: If the file is no JSON, or a setting is not what it must be.
    """
    if given is None and deepspeed_was_asked_for():
        given = os.environ.get(_FILE, "none")
    if isinstance(given, str | os.PathLike):
        file = os.path.isfile(given)  # not of `Path`, for which a long JSON would be an OSError
        try:
            given = json.loads(Path(given).read_text(encoding="utf-8") if file else os.fspath(given))
        except ValueError as error:
            if not file:
                return
            raise ValueError(f"DeepSpeed's settings in {given} are no JSON: {error}") from error
    elif not isinstance(given, dict):
        return
    for name in ("", *(_BLOCKS if trainer else _ZERO_BLOCKS)):
        block = given
        for part in name.split(".") if name else ():
            block = block.get(part, {})
        if not isinstance(block, dict) and not (block is None and name in _MAY_BE_NULL):
            example = f", such as {_EXAMPLES[name]}" if name in _EXAMPLES else ""
            what = f"{name} in DeepSpeed's settings is" if name else "the whole of DeepSpeed's settings is"
            raise ValueError(f"{what} {block!r} but must be an object of settings{example}")
    if "zero_optimization" not in given:
        raise ValueError(
            "zero_optimization is missing in DeepSpeed's settings, and its stage says what the processes share out; "
            'add "zero_optimization": {"stage": 3}'
        )


def zero_settings(accelerator: Any) -> dict[str, Any] | None:
    """Return DeepSpeed's config for a training, or None where it was not asked for or there is one process.

    Raises:
        ImportError: If DeepSpeed is not installed.
        ValueError: If the settings have another form than DeepSpeed's.
        NotImplementedError: If a setting does not work here; the message names it and what does.
    """
    if not deepspeed_was_asked_for() or accelerator.num_processes == 1:
        return None
    require("accelerate", "deepspeed", what="`accelerate launch --use_deepspeed`")
    from accelerate import DeepSpeedPlugin

    check_config(trainer=False)
    with _launcher_default():
        plugin = DeepSpeedPlugin()
    given = copy.deepcopy(plugin.deepspeed_config)
    _check_around(accelerator, plugin)
    zero = given.get("zero_optimization", {})
    _check(given, zero)
    kept = {name: value for name, value in zero.items() if name in (*_FREE_ZERO, "stage") and value != "auto"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # it is for their timers alone
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "zero_optimization": kept,
    }


@contextlib.contextmanager
def _launcher_default() -> Iterator[None]:
    """Hide the one accumulation step that accelerate's launcher passes on by itself, and a file must not name then."""
    name = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    before = os.environ.get(name)
    if before == "1":
        del os.environ[name]
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


def _check(given: dict[str, Any], zero: dict[str, Any]) -> None:
    allowed: dict[str, tuple[Any, ...]] = {
        "train_batch_size": (None, "auto"), "train_micro_batch_size_per_gpu": (None, "auto"),
        "gradient_accumulation_steps": (None, "auto", 1), "gradient_clipping": (None, "auto", 0, 0.0),
    }  # fmt: skip
    for name, value in given.items():
        if name in ("fp16", "bf16"):
            fine = isinstance(value, dict) and value.get("enabled", False) in (False, "auto")
        else:
            fine = value in allowed[name] if name in allowed else name in (*_OURS, "zero_optimization")
        if not fine:
            _refuse(name, value)
    for name, value in zero.items():
        if name == "stage":
            fine = type(value) is int and value in (2, 3)
        elif name in ("offload_optimizer", "offload_param"):
            fine = value is None or (isinstance(value, dict) and value.get("device", "none") in (None, "none", "auto"))
        else:
            fine = name in _FREE_ZERO
        if not fine:
            _refuse(f"zero_optimization.{name}", value)
    if "stage" not in zero:
        _refuse("zero_optimization.stage", None)


def _check_around(accelerator: Any, plugin: Any) -> None:
    compiled = getattr(getattr(accelerator.state, "dynamo_plugin", None), "backend", None)
    present = {
        "mixed_precision": (accelerator.mixed_precision not in ("no", "bf16"), "pass bf16"),
        "parallelism_config": (getattr(accelerator, "parallelism_config", None) is not None, "leave it out"),
        "dynamo_backend": (getattr(compiled, "value", "NO") not in (None, "NO"), "pass `--dynamo_backend no`"),
        "deepspeed_moe_layer_cls_names": (
            bool(plugin.transformer_moe_cls_names or os.environ.get("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES")),
            "leave it out",
        ),
        "enable_msamp": (bool(plugin.enable_msamp), "leave it out"),
    }
    for name, (found, remedy) in present.items():
        if found:
            raise NotImplementedError(
                f"{name} does not work with DeepSpeed here; {remedy}, or train with FSDP2 "
                "(`--use_fsdp --fsdp_version 2`)"
            )


def _refuse(name: str, value: Any) -> None:
    remedy = _REMEDIES.get(name, "leave it out")
    raise NotImplementedError(f"{name} = {value!r} in DeepSpeed's settings does not work here; {remedy}")
