"""Which options of `transformers.TrainingArguments` and `trl.DPOConfig` the trainers obey and which they refuse.

Every option of either stands in exactly one of two tables, `OBEYED` and `REFUSED`. One that stands in neither, because
a release of TRL or transformers is newer than this file, is refused where it is not at its default: none is dropped
without a word. The table of `docs/trl.md` is written by `python -m mopl.integrations._options`.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any

# Obeyed by `transformers.Trainer` itself, which the trainers are: nothing is added, nothing is taken away.
_BY_TRAINER = """
    output_dir per_device_train_batch_size per_device_eval_batch_size num_train_epochs max_steps
    gradient_accumulation_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio optim
    optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm bf16 fp16
    bf16_full_eval fp16_full_eval tf32 gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing
    activation_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
    auto_find_batch_size use_cpu use_cache logging_strategy logging_steps logging_first_step logging_dir
    log_on_each_node logging_nan_inf_filter log_level log_level_replica disable_tqdm report_to run_name project
    trackio_space_id trackio_bucket_id trackio_static_space_id include_num_input_tokens_seen skip_memory_metrics
    debug do_train do_eval do_predict eval_strategy eval_steps eval_delay eval_on_start eval_accumulation_steps
    eval_use_gather_object save_strategy save_steps save_total_limit save_only_model save_on_each_node
    enable_jit_checkpoint load_best_model_at_end metric_for_best_model greater_is_better resume_from_checkpoint
    ignore_data_skip restore_callback_states_from_checkpoint push_to_hub hub_token hub_private_repo hub_model_id
    hub_always_push hub_revision seed data_seed full_determinism dataloader_drop_last dataloader_num_workers
    dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order accelerator_config ddp_find_unused_parameters
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout local_rank fsdp fsdp_config
    deepspeed
""".split()

# Obeyed, and something is to be said about how.
_WITH_A_NOTE = {
    "average_tokens_across_devices": "no effect, as in TRL: a step's loss is a mean over its lists, not its tokens",
    "hub_strategy": "a model that takes weights needs `end`: `Trainer` copies only files of plain models and adapters "
    "between",
    "label_names": "no effect, as in TRL: no loss is computed from labels of a batch",
    "length_column_name": "this column, or else the number of tokens of a list's longest sequence",
    "neftune_noise_alpha": "noise in the policy only; TRL adds it to the reference of a PEFT model too",
    "parallelism_config": "replicas and shards of data; tensor, context and sequence parallelism are refused",
    "prediction_loss_only": "no effect, as in TRL: no logits are kept anyway",
    "remove_unused_columns": "no effect on the training, as in TRL: rows are read before batches are made",
    "train_sampling_strategy": "`random`, `sequential`, `group_by_length`; `batch_rebalance` is refused",
    "use_liger_kernel": "the kernels of layers, as in TRL 1.16; `fused_linear_cross_entropy` is refused",
    "liger_kernel_config": "see `use_liger_kernel`",
    # ---- trl.DPOConfig
    "model_init_kwargs": "for a model given by name, whose dtype is float32 unless `dtype` says another; refused with "
    "a loaded model, where TRL ignores it",
    "trust_remote_code": "for the model and the tokenizer that are loaded here",
    "router_aux_loss_coef": "the auxiliary loss of a mixture of experts, by default with the config's own coefficient",
    "disable_dropout": "the reference never has dropout",
    "max_length": "most tokens of prompt and response. Pairs are cut as in TRL, which leaves out rows whose prompt "
    "alone fills it; lists as `ListTokenizer` does it",
    "truncation_mode": "for pairs",
    "dataset_num_proc": "for pairs in a `datasets.Dataset`",
    "padding_free": "packs; TRL 1.16 warns and pads. Not with `ld_alpha`",
    "pad_to_multiple_of": "as in TRL",
    "precompute_ref_log_probs": "as in TRL",
    "precompute_ref_batch_size": "as in TRL",
    "loss_type": "every type of TRL, for pairs. `aot` and `aot_unpaired` sort and `sft` averages over what is in one "
    "forward pass, as in TRL",
    "loss_weights": "as in TRL",
    "ld_alpha": "for pairs",
    "f_divergence_type": "refused with the types that TRL refuses it with",
    "f_alpha_divergence_coef": "refused without `alpha_divergence`, where TRL ignores it",
    "label_smoothing": "in `robust`, `exo_pair`, `aot`, `aot_unpaired`; refused without one of them, where TRL "
    "ignores it: smooth labels (columns `preference_chosen` = 1 - ε, `preference_rejected` = ε) give cDPO",
    "beta": "positive",
    "use_weighting": "WPO, for pairs; costs one more forward pass, and needs `disable_dropout`",
    "discopop_tau": "refused without `discopop`, where TRL ignores it",
    "sync_ref_model": "TR-DPO, for a model with a reference of its own, as in TRL; a training that is resumed after "
    "the first update is refused, because checkpoints do not hold the reference",
    "ref_model_mixup_alpha": "see `sync_ref_model`",
    "ref_model_sync_steps": "see `sync_ref_model`",
    "pad_token": "as in TRL",
}

OBEYED: dict[str, str] = dict.fromkeys(_BY_TRAINER, "") | _WITH_A_NOTE

# Refused where they are not at their default, and the remedy.
REFUSED: dict[str, str] = {
    "activation_offloading": "leave it at False and use gradient_checkpointing, which saves more",
    "batch_eval_metrics": "leave it at False; compute_metrics is called once, with all lists",
    "eval_do_concat_batches": "leave it at True; metrics are means over all lists",
    "include_for_metrics": "leave it empty; compute_metrics gets losses and accuracies",
    "label_smoothing_factor": "smooth the labels of the data, or pass loss=functools.partial(...) of a loss that has "
    "label smoothing",
}


def check_options(args: Any, kind: type) -> None:
    """Raise for an option of `kind`, `TrainingArguments` or `DPOConfig`, that is set and that no trainer obeys."""
    if not isinstance(args, kind):
        own = "MultiObjectiveConfig" if kind.__name__ == "TrainingArguments" else "MultiObjectiveDPOConfig"
        raise TypeError(f"args is a {type(args).__name__} but must be a {kind.__name__}, such as mopl's {own}")
    for entry in fields(kind):
        if entry.name in OBEYED or not hasattr(args, entry.name):
            continue
        value = getattr(args, entry.name)
        if value != default_of(entry):
            unknown = "this release of mopl does not know what it does; leave it at its default, or update mopl"
            remedy = REFUSED.get(entry.name)
            why = unknown if remedy is None else f"has no meaning here; {remedy}"
            raise ValueError(f"{entry.name} is {value!r} but {why}")
    _check_values(args)


def _check_values(args: Any) -> None:
    """Raise for a value of an obeyed option that is not obeyed."""
    check_sizes(args)
    if getattr(args, "train_sampling_strategy", "random") == "batch_rebalance":
        raise ValueError(
            "train_sampling_strategy is 'batch_rebalance' but must be 'random', 'sequential' or 'group_by_length' "
            "here; take the last one to save padding, or padding_free to have none"
        )
    layout = getattr(args, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        size = getattr(layout, name, None) or 1
        if size > 1:
            raise ValueError(
                f"{name} of parallelism_config is {size}, which would split a sequence or a head over processes; leave "
                "it at 1 and use DDP, FSDP or DeepSpeed"
            )
    fused = (getattr(args, "liger_kernel_config", None) or {}).get("fused_linear_cross_entropy", False)
    if getattr(args, "use_liger_kernel", False) and fused:
        raise ValueError(
            "liger_kernel_config asks for fused_linear_cross_entropy, which replaces the model's forward, and the head "
            "is fused here; leave it out: the kernels of layers remain"
        )


def check_sizes(args: Any) -> None:
    """Raise for a batch of nothing, at which transformers and TRL stop with an error that names no option."""
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if (size := getattr(args, name, 1)) < 1:
            raise ValueError(f"{name} is {size} but must be at least 1")


def default_of(entry: Field[Any]) -> Any:
    """Return the default of a dataclass's field."""
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def table() -> str:
    """Return the tables as Markdown: what `docs/trl.md` says."""

    def row(names: list[str], text: str) -> str:
        return f"| {', '.join(f'`{name}`' for name in names)} | {text} |"

    lines = ["| obeyed | how |", "|---|---|"]
    lines += [row([name], note) for name, note in sorted(_WITH_A_NOTE.items())]
    lines += [row(sorted(_BY_TRAINER), "by `transformers.Trainer` itself"), ""]
    lines += ["| refused | instead |", "|---|---|"]
    lines += [row([name], remedy) for name, remedy in sorted(REFUSED.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
