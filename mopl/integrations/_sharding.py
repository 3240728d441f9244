"""How the trainers' models stand under FSDP2 and DeepSpeed as accelerate applies them; what is refused there, and why.

Under FSDP2 accelerate's `prepare` calls `fully_shard` on each layer, on embeddings, on the last norm with the head, on
all of it. A model around another one is all of it then: its own parameters (a prompt, say) are in the last group, which
is whole from the beginning of its forward pass to the end of the backward pass. Under DeepSpeed an engine is around the
model, which stays the trainer's `model`: ZeRO-1 and -2 leave it whole, and ZeRO-3 hooks itself to each of its modules.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from typing import Any

from mopl._extras import require
from mopl._sharded import is_sharded
from mopl.conditioning.weighted import WeightedModel, causal_lm_of
from mopl.training.parallel import distribution_of
from mopl.training.sharded import broadcast_parameters
from mopl.training.zero_settings import check_config

require("transformers", "accelerate", what="mopl.integrations")

SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")  # no process has the whole model


def refuse_sharded_moving(accelerator: Any) -> None:
    """Raise where TRL would move a reference that is cut into shards."""
    if (kind := distribution_of(accelerator)) in SHARDED:
        raise NotImplementedError(
            f"sync_ref_model is True, and under {kind} the parameters that TRL moves are shards, or copies "
            "that are thrown away; train on one device or under DDP, or leave it out"
        )


def zero_stage(accelerator: Any) -> int:
    """Return the stage of ZeRO that a training has, 0 without DeepSpeed."""
    return int(accelerator.state.deepspeed_plugin.zero_stage) if distribution_of(accelerator) == "DEEPSPEED" else 0


def cuts_parameters(accelerator: Any) -> bool:
    """Say whether no process of a training has the whole model."""
    kind = distribution_of(accelerator)
    return kind in SHARDED and (kind != "DEEPSPEED" or zero_stage(accelerator) == 3)


def check_sharding(accelerator: Any, model: Any) -> None:
    """Raise where a model would have to be sharded in a way that is not its own.

    Args:
        accelerator: accelerate's.
        model: The policy, or a reference beside it.
    """
    if (kind := distribution_of(accelerator)) not in SHARDED:
        return
    name = type(model).__name__
    if cuts_parameters(accelerator) and isinstance(model, WeightedModel) and not model.SHARDS:
        other = ", under ZeRO-2" if kind == "DEEPSPEED" else ""
        raise NotImplementedError(
            f"a {name} mixes its parameters before its layers run, and under {kind} no process has them whole then; "
            f"train it on one device{other} or under DDP, or take a LoraMixture"
        )
    if kind == "DEEPSPEED":
        return _check_zero(accelerator, model)
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if kind != "FSDP" or plugin.fsdp_version != 2:
        found = f"version {plugin.fsdp_version} of FSDP" if kind == "FSDP" else kind
        raise NotImplementedError(
            f"training under {found} works for a plain model, or one with PEFT adapters, that is its own reference "
            f"with adapters off or has precompute_ref_log_probs, and this is a {name}; train it under FSDP2 "
            "(`accelerate launch --use_fsdp --fsdp_version 2`), under DDP or on one device"
        )
    if plugin.activation_checkpointing:
        raise NotImplementedError(
            f"fsdp_activation_checkpointing is set, which wraps the layers of a {name}: parameters get other names, "
            "and layers are computed again without what they are conditioned on; leave it out and pass "
            "gradient_checkpointing=True to the trainer"
        )


def refuse_loaded_in_shards(model: Any) -> None:
    """Raise where a copy of a model, or a forward pass before training, would need parameters that are shards now."""
    if is_sharded(model):
        raise NotImplementedError(
            f"the {type(model).__name__} was loaded in shards, because ZeRO-3 was asked for before, and its reference "
            "would be a copy of it, or be computed before the training; load the model before the trainer's config is "
            "made, pass ref_model, or fill the columns ref_chosen_logps and ref_rejected_logps with "
            "mopl.integrations.trl.with_reference_logps in one process"
        )


def prepare_sharding(accelerator: Any, *, model: Any = None) -> None:
    """Let FSDP2 as accelerate applies it, if it does, train what one process would.

    It casts what modules are given, and what they give, to the training's precision. Weights of objectives would be
    rounded to 16 bit, and no longer sum to 1; and log-probabilities, which the head gives here in the place of logits.

    Args:
        accelerator: accelerate's, before it has sharded the policy.
        model: The policy, if all processes are to have the first one's values, as under DDP; FSDP2 leaves each the
            shard of its own.
    """
    kind = distribution_of(accelerator)
    if kind not in ("FSDP", "DEEPSPEED"):
        return
    if model is not None and not is_sharded(model):
        broadcast_parameters(model, accelerator.device)
    if kind == "DEEPSPEED":
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
        # Layers compute in the precision of their parameters and of autocast, as under DDP.
        exact = {"cast_forward_inputs": False, "output_dtype": None}
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, **exact)


def prepare_reference(accelerator: Any, model: Any) -> Any:
    """Return a reference beside the policy as the processes of a training use it: sharded where the policy is."""
    if distribution_of(accelerator) == "DEEPSPEED":
        return _zero_reference(accelerator, model)
    if distribution_of(accelerator) != "FSDP" or accelerator.state.fsdp_plugin.fsdp_version != 2:
        before = len(accelerator._models)
        prepared = accelerator.prepare_model(model, evaluation_mode=True)
        # Before training, an evaluation prepares the policy only where no model is prepared yet: the reference would
        # run under autocast and the policy not.
        del accelerator._models[before:]
        return prepared
    from accelerate.utils import fsdp2_prepare_model

    broadcast_parameters(model, accelerator.device)
    before = accelerator.state.fsdp_plugin
    try:
        # It notes the classes of the layers of the first model that it is asked about.
        accelerator.state.fsdp_plugin = copy.copy(before)
        return fsdp2_prepare_model(accelerator, model)
    finally:
        accelerator.state.fsdp_plugin = before


# ---------------------------------------------------------------- DeepSpeed


def complete_zero_settings(accelerator: Any, args: Any) -> None:
    """Check what DeepSpeed is told in a training, and tell it what it was not told of the trainer's arguments.

    transformers fills in "auto" alone. Without a number to clip at DeepSpeed would not clip, which the trainer leaves
    to it; without the size of a batch it ends in an AssertionError.
    """
    if distribution_of(accelerator) != "DEEPSPEED":
        return
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    check_config(settings)
    stage = settings.get("zero_optimization", {}).get("stage")
    if type(stage) is not int or stage not in (1, 2, 3):
        raise ValueError(
            f"zero_optimization.stage in DeepSpeed's settings is {stage!r} but must be 1, 2 or 3; leave DeepSpeed out "
            "for DDP, where each process has everything"
        )
    if settings.get("gradient_clipping") is None:
        settings["gradient_clipping"] = float(args.max_grad_norm or 0.0)
    if settings.get("train_batch_size") is None and settings.get("train_micro_batch_size_per_gpu") is None:
        settings["train_micro_batch_size_per_gpu"] = args.per_device_train_batch_size


def _check_zero(accelerator: Any, model: Any) -> None:
    """Raise for settings of ZeRO by which a process does not have the shares that other values could be put into."""
    name, plugin = type(model).__name__, accelerator.state.deepspeed_plugin
    settings = plugin.deepspeed_config.get("zero_optimization", {})
    offloaded = (settings.get("offload_param") or {}).get("device", "none")
    refused = {
        "offload_param to nvme": offloaded == "nvme",
        "zero_hpz_partition_size": settings.get("zero_hpz_partition_size", 1) != 1,
        "mics_shard_size": settings.get("mics_shard_size", -1) != -1,
        "zero_quantized_weights": settings.get("zero_quantized_weights", False),
        "zero_quantized_nontrainable_weights": settings.get("zero_quantized_nontrainable_weights", False),
    }
    for setting, present in refused.items():
        if present:
            raise NotImplementedError(
                f"{setting} is set in the configuration of DeepSpeed, under which the shares of the parameters of a "
                f"{name} stand elsewhere or are rounded; leave it out"
            )


def _zero_reference(accelerator: Any, model: Any) -> Any:
    """Return a reference behind an engine of its own: cut under ZeRO-3, else whole, in the precision of the policy."""
    package: Any = sys.modules["deepspeed"]  # accelerate has imported it
    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    settings = config["zero_optimization"]
    if zero_stage(accelerator) != 3:
        settings["stage"] = 0
    for name in ("optimizer", "scheduler"):  # an engine without an optimizer would fail over them
        config.pop(name, None)
    settings.pop("offload_optimizer", None)
    # transformers fills these in when it knows the number of steps.
    width = causal_lm_of(model).get_input_embeddings().embedding_dim
    sizes = {
        "reduce_bucket_size": width * width,
        "stage3_prefetch_bucket_size": int(0.9 * width * width),
        "stage3_param_persistence_threshold": 10 * width,
    }
    settings.update({name: size for name, size in sizes.items() if settings.get(name) == "auto"})
    engine, *_ = package.initialize(model=model, config=config)
    engine.eval()  # which gives nothing back
    return engine
