"""Tiny random models of every family in transformers' causal-LM mapping.

A configuration is its family's own default with every size made small by the name of the setting, and with one layer of
each kind that the default has (sliding and full attention, dense and sparse, convolution and attention, ...). Windows,
chunks and kernels are shorter than the rows of the checks, or padding and packing could not be seen in them. The few
families that need more than names stand in `EXCEPTIONS`.

Weights are drawn anew, large enough that every position, mask and kernel moves the scores by far more than rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCABULARY, HIDDEN, POSITIONS = 96, 32, 128

# By the name of the setting, wherever the default is a whole number above it.
_SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(
        "hidden_size d_model n_embd word_embed_proj_dim dim_model emb_dim embedding_dim lru_width "
        "attention_hidden_size embedding_size input_embedding_size output_embedding_size "
        "backbone_hidden_size ple_embed_dim".split(),
        HIDDEN,
    ),
    **dict.fromkeys(
        "intermediate_size ffn_dim n_inner dim_ff dff d_inner d_ff ffn_hidden_size encoder_ffn_dim decoder_ffn_dim "
        "feed_forward_size moe_intermediate_size shared_expert_intermediate_size intermediate_size_mlp "
        "shared_intermediate_size dense_intermediate_size expert_ffn_hidden_size shared_experts_intermediate_size "
        "moe_shared_expert_intermediate_size moe_ffn_hidden_size".split(),
        48,
    ),
    **dict.fromkeys(
        "num_hidden_layers n_layer n_layers num_layers num_decoder_layers num_encoder_layers encoder_layers "
        "decoder_layers num_blocks depth".split(),
        2,
    ),
    **dict.fromkeys(
        "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads "
        "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_value_heads "
        "linear_num_heads mamba_num_heads mamba_n_heads n_mamba_heads".split(),
        4,
    ),
    **dict.fromkeys(
        "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads "
        "num_global_key_value_heads".split(),
        2,
    ),
    **dict.fromkeys(
        "head_dim d_head dim_head d_kv attention_head_size attention_head_dim kv_channels swa_head_dim linear_head_dim "
        "linear_key_head_dim linear_value_head_dim global_head_dim v_head_dim qk_nope_head_dim index_head_dim "
        "mamba_d_head mamba_head_dim mamba_headdim".split(),
        8,
    ),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys("q_lora_rank kv_lora_rank o_lora_rank adapter_rank laurel_rank d_rel hc_lowrank".split(), 8),
    **dict.fromkeys(
        "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num num_routed_experts".split(), 4
    ),
    **dict.fromkeys(
        "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts index_topk n_shared_experts "
        "num_shared_experts moe_num_shared_experts".split(),
        2,
    ),
    **dict.fromkeys(
        "max_position_embeddings n_positions max_seq_len max_target_positions n_ctx context_length "
        "max_sequence_length model_max_length original_max_position_embeddings".split(),
        POSITIONS,
    ),
    # Shorter than the rows of the checks.
    **dict.fromkeys(
        "sliding_window sliding_window_size attention_window_size attention_chunk_size local_attention "
        "mamba_chunk_size chunk_size window_size".split(),
        4,
    ),
    **dict.fromkeys(
        "mamba_d_state ssm_state_size state_size n_groups mamba_n_groups mamba_dt_rank time_step_rank".split(), 2
    ),
    "index_n_heads": 16,  # with few, rectified scores of tokens tie at 0, and where a row stands would draw among them
    "hidden_size_per_layer_input": 8,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_nextn_predict_layers": 0,
}
_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")
_INITIAL = ("initializer_range", "init_std", "initializer_factor")


class NotBuilt(Exception):
    """A family that has no small model with a forward pass of its own."""


def families() -> list[str]:
    """Return the names of all families, in order."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

    return sorted(names)


def small_model(family: str, **settings: Any) -> nn.Module:
    """Return a tiny model of a family, with settings of its configuration in place of the usual ones."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(small_config(family, **settings)).float().eval()


def build(family: str, **settings: Any) -> nn.Module:
    """Return a tiny random model of a family, in evaluation mode, with weights of its own.

    Raises:
        NotBuilt: If there is none, with the reason.
    """
    from transformers import GenerationConfig

    try:
        model = small_model(family, **settings)
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {_line(error)}") from error
    _draw(model)
    # The families' own settings force tokens here and there (the last one of BART, say).
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    try:
        with torch.no_grad():
            logits = model(input_ids=torch.arange(7, 21)[None]).logits
    except Exception as error:
        raise NotBuilt(f"no forward of text alone: {type(error).__name__}: {_line(error)}") from error
    if not bool(logits.isfinite().all()):
        raise NotBuilt("logits of random weights are not finite")
    return model


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def small_config(family: str, **more: Any) -> Any:
    """Return a family's configuration at tiny sizes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    try:
        default = kind()
    except Exception:
        default = None  # some families have no valid default
    settings = {} if default is None else _small(default.to_dict())
    return kind(**_merged(settings, EXCEPTIONS.get(family, {}) | more))


def _merged(settings: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for name, value in more.items():
        inside = isinstance(value, dict) and isinstance(merged.get(name), dict) and name.endswith("config")
        merged[name] = _merged(merged[name], value) if inside else value
    return merged


def _small(default: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that make a configuration small, and those of the configurations in it."""
    small: dict[str, Any] = {}
    layers = 2
    for name in _KINDS:
        if isinstance(kinds := default.get(name), list) and kinds:
            layers = max(layers, len(set(kinds)))
    for name, value in default.items():
        if isinstance(value, dict) and (name.endswith("config") or name in ("decoder", "encoder", "text_encoder")):
            small[name] = _small(value) | ({"model_type": value["model_type"]} if "model_type" in value else {})
        elif name in _KINDS and isinstance(value, list) and value:
            distinct = list(dict.fromkeys(value))
            small[name] = [distinct[i % len(distinct)] for i in range(layers)]
        elif name in _INITIAL:
            small[name] = 0.3
        elif isinstance(value, float) and "dropout" in name:
            small[name] = 0.0
        elif isinstance(value, int) and not isinstance(value, bool):
            if name in _SIZES and value > _SIZES[name]:
                small[name] = _SIZES[name]
            elif name in ("pad_token_id", "bos_token_id", "eos_token_id") and value >= VOCABULARY:
                small[name] = ("pad_token_id", "bos_token_id", "eos_token_id").index(name)
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if name in default:
            small[name] = layers
    heads, shared = default.get("num_attention_heads"), default.get("num_key_value_heads")
    if shared is not None and shared == heads:
        small["num_key_value_heads"] = _SIZES["num_attention_heads"]
    for name in ("head_dim", "num_key_value_heads"):
        if name in default and default[name] is None:
            small[name] = _SIZES[name]
    if "qk_rope_head_dim" in default and "head_dim" in default:  # multi-head latent attention rotates this part only
        small["head_dim"] = _SIZES["qk_rope_head_dim"]
    if "is_decoder" in default:
        small["is_decoder"] = True  # or the family reads its text in both directions
    return small


def _draw(model: nn.Module) -> None:
    """Draw weights: matrices far from 0, norms and biases near what they are; what is padding stays 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter)
            if parameter.ndim < 2:
                parameter.add_(0.1 * noise)
            elif parameter.numel() and not 0.1 < float(parameter.std()) < 1:
                parameter.copy_(0.25 * noise)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0.0


_TWO_KINDS = ["conv", "full_attention"]
_INDEXED = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}  # fmt: skip
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        },
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "activation_sparsity_pattern": None,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": _TWO_KINDS},
    "lfm2": {"layer_types": _TWO_KINDS},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": _INDEXED,
    "qwen4_exp": {"text_config": _INDEXED},
    "reformer": {"axial_pos_embds": False, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "attention_head_dim": 16,
        "attention_hidden_size": 64, "n_mamba_heads": 8, "mamba_headdim": 8,
    },
}  # fmt: skip
