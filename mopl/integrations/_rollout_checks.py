"""Which models and options `MultiObjectiveGRPOTrainer` refuses, and why: rows must be scored at their own weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from mopl._extras import version_of
from mopl.conditioning import HyperPromptModel, LoraMixture, ParameterMixture
from mopl.conditioning.weighted import WeightedModel
from mopl.integrations._rollouts import RolloutArguments
from mopl.integrations._setup import recomputes
from mopl.integrations._sharding import cuts_parameters
from mopl.training.parallel import distribution_of

OLDEST = (1, 15)
KINDS = (LoraMixture, HyperPromptModel, ParameterMixture)


def check_release(version: str) -> None:
    """Raise for a release of TRL whose `GRPOTrainer` computes log-probabilities beside the model's forward pass."""
    if version_of(version) < OLDEST:
        raise ImportError(
            f"MultiObjectiveGRPOTrainer needs trl >= {'.'.join(map(str, OLDEST))}, where a model's forward pass gives "
            f"the log-probabilities, but trl is {version}; pip install -U trl"
        )


def refuse_sharded_rollouts(accelerator: Any, model: Any) -> None:
    """Raise where completions of a model that takes weights would be sampled from shards."""
    if cuts_parameters(accelerator):
        kind = distribution_of(accelerator)
        raise NotImplementedError(
            f"a {type(model).__name__} samples completions by its own generate, and under {kind} the processes gather "
            "each layer together for each token, so that one whose completions end early would leave the others "
            f"waiting; train on one device{', under ZeRO-2' if kind == 'DEEPSPEED' else ''} or under DDP"
        )


def check_model(
    model: WeightedModel, args: Any, settings: RolloutArguments, processing_class: Any, options: dict[str, Any]
) -> None:
    """Raise for a model, or an option with it, by which rows would not be answered and scored at their weights."""
    kind = type(model).__name__
    if not isinstance(model, KINDS):
        raise ValueError(
            f"model is a {kind}, but TRL's head reads the last hidden states inside of the model, where what a {kind} "
            f"does is not known; pass a {', '.join(each.__name__ for each in KINDS[:-1])} or {KINDS[-1].__name__}"
        )
    if model.takes_beta or model.takes_kl_weight:
        raise ValueError(f"the {kind} is conditioned on {'β' if model.takes_beta else 'the KL weight'}, too, which is "
                         "not drawn here; make it without, or train it with `mopl clp`")  # fmt: skip
    head = model.causal_lm.get_output_embeddings()
    if not isinstance(model, ParameterMixture) and type(head) is not nn.Linear:
        raise ValueError(
            f"the head of the model is a {type(head).__name__}, of which TRL reads the weight alone, so that adapters "
            "on it would be neither used nor trained; leave the head out of target_modules and modules_to_save"
        )
    names = {id(module): name for name, module in model.causal_lm.named_modules()}
    place = names.get(id(head), "")
    around: Any = model.causal_lm.get_submodule(place.rpartition(".")[0])
    if not hasattr(around, "config"):  # a part of a model and no model of its own
        raise ValueError(
            f"the head of the model is {place}, inside of a {type(around).__name__}, of which TRL reads the weight "
            "alone and leaves out what comes before it; train it with mopl clp"
        )
    if isinstance(model, ParameterMixture):
        if settings.weights_per != "step" and settings.objective_weights is None:
            raise ValueError(
                "weights_per is 'prompt' but a ParameterMixture runs each of them by itself; pass weights_per='step', "
                "or take a LoraMixture"
            )
        if args.beta != 0.0:
            raise ValueError(
                f"beta is {args.beta} but a ParameterMixture trains the parameters of the model itself and cannot be "
                "what it was tuned from; pass beta=0.0, or take a LoraMixture"
            )
        if recomputes(args):
            raise ValueError("gradient_checkpointing is True, by which layers of a ParameterMixture would be computed "
                             "again without its mixture; pass gradient_checkpointing=False")  # fmt: skip
    one = settings.weights_per == "step" or settings.objective_weights is not None
    if args.use_vllm and (not one or isinstance(model, HyperPromptModel)):
        why = "no merged model is a HyperPromptModel at any weights" if one else "its parameters are those of one w"
        raise ValueError(
            f"use_vllm is True with a {kind} and weights_per is {settings.weights_per!r}, but vLLM answers a whole "
            f"batch with one plain model: {why}, and importance sampling cannot mend that; pass use_vllm=False, or "
            "weights_per='step' with a LoraMixture or a ParameterMixture"
        )
    if (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ValueError(
            f"gradient_checkpointing_kwargs is {args.gradient_checkpointing_kwargs!r} with a {kind}, whose weights "
            "reach activations that are computed again only without use_reentrant; pass {'use_reentrant': False}"
        )
    refused = {
        "use_transformers_continuous_batching": "its rows have no weights of their own",
        "cast_lm_head_to_fp32": "load the model in float32 instead",
        "use_liger_kernel": "Trainer would apply it to no model of this kind",
        "sync_ref_model": "the reference is the model itself with adapters off, and does not move",
    }
    for name, why in refused.items():
        if getattr(args, name, False):
            raise ValueError(f"{name} is {getattr(args, name)!r} with a {kind}: {why}; leave it out")
    for name in ("peft_config", "quantization_config", "tools", "rollout_func", "environment_factory"):
        if options.get(name) is not None:
            raise ValueError(
                f"{name} was passed with a {kind}, which "
                + ("has its adapters already" if name == "peft_config" else "TRL calls otherwise then than by rows")
                + "; leave it out"
            )
    if hasattr(processing_class, "tokenizer"):
        raise ValueError(f"processing_class is a {type(processing_class).__name__}, for images, which no {kind} takes "
                         "here; pass the tokenizer")  # fmt: skip
