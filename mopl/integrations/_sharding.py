"""How the trainers' models stand under FSDP2 as accelerate applies it, and what is refused there, and why.

accelerate's `prepare` calls `fully_shard` on each layer, on embeddings, on the last norm with the head, on all of it.
A model around another one is all of it then: its own parameters (a prompt, say) are in the last group, which is whole
from the beginning of its forward pass to the end of the backward pass.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from mopl._extras import require
from mopl.conditioning.weighted import WeightedModel
from mopl.training.parallel import distribution_of
from mopl.training.sharded import broadcast_parameters

require("transformers", "accelerate", what="mopl.integrations")

SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")  # no process has the whole model


def refuse_sharded_moving(accelerator: Any) -> None:
    """Raise where TRL would move a reference that is cut into shards."""
    if (kind := distribution_of(accelerator)) in SHARDED:
        raise NotImplementedError(
            f"sync_ref_model is True, and under {kind} the parameters that TRL moves are shards, or copies "
            "that are thrown away; train on one device or under DDP, or leave it out"
        )


def check_sharding(accelerator: Any, model: Any) -> None:
    """Raise where a model would have to be sharded in a way that is not its own.

    Args:
        accelerator: accelerate's.
        model: The policy, or a reference beside it.
    """
    if (kind := distribution_of(accelerator)) not in SHARDED:
        return
    name = type(model).__name__
    if isinstance(model, WeightedModel) and not model.SHARDS:
        raise NotImplementedError(
            f"a {name} mixes its parameters before its layers run, and under {kind} no process has them whole then; "
            "train it on one device or under DDP, or take a LoraMixture"
        )
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


def prepare_sharding(accelerator: Any, *, model: Any = None) -> None:
    """Let FSDP2 as accelerate applies it, if it does, train what one process would.

    It casts what modules are given, and what they give, to the training's precision. Weights of objectives would be
    rounded to 16 bit, and no longer sum to 1; and log-probabilities, which the head gives here in the place of logits.

    Args:
        accelerator: accelerate's, before it has sharded the policy.
        model: The policy, if all processes are to have the first one's values, as under DDP; FSDP2 leaves each the
            shard of its own.
    """
    if distribution_of(accelerator) != "FSDP":
        return
    if model is not None:
        broadcast_parameters(model, accelerator.device)
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
        # Layers compute in the precision of their parameters and of autocast, as under DDP.
        exact = {"cast_forward_inputs": False, "output_dtype": None}
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, **exact)


def prepare_reference(accelerator: Any, model: Any) -> Any:
    """Return a reference beside the policy as the processes of a training use it: sharded where the policy is."""
    if distribution_of(accelerator) != "FSDP" or accelerator.state.fsdp_plugin.fsdp_version != 2:
        return accelerator.prepare_model(model, evaluation_mode=True)
    from accelerate.utils import fsdp2_prepare_model

    broadcast_parameters(model, accelerator.device)
    before = accelerator.state.fsdp_plugin
    try:
        # It notes the classes of the layers of the first model that it is asked about.
        accelerator.state.fsdp_plugin = copy.copy(before)
        return fsdp2_prepare_model(accelerator, model)
    finally:
        accelerator.state.fsdp_plugin = before
