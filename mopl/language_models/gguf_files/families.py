"""Which models can be written as GGUF, and what llama.cpp is told of their configurations.

Each family here was compared with llama.cpp in logits, every option at a value that is not its default
(tests/language_models/test_gguf.py). An option of a configuration that is not known here is refused unless it has its
default, at which the compared models had it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mopl._extras import require
from mopl.language_models.gguf_files.files import Entry

REMEDY = (
    "write a plain model (`mopl export RUN --weights W.. DIR`) or adapters (`mopl export RUN --adapters DIR`) and try "
    "llama.cpp's own convert_hf_to_gguf.py or convert_lora_to_gguf.py"
)


@dataclass(frozen=True)
class Family:
    """How llama.cpp has the models of one class of transformers."""

    architecture: str  # its name in GGUF, one of gguf.MODEL_ARCH
    interleaved: bool  # whether rotary positions turn neighbours (2i, 2i+1); in transformers (i, i + d/2) turn together


FAMILIES = {
    "LlamaForCausalLM": Family("llama", interleaved=True),
    "MistralForCausalLM": Family("llama", interleaved=True),
    "Qwen2ForCausalLM": Family("qwen2", interleaved=False),
    "Qwen3ForCausalLM": Family("qwen3", interleaved=False),
}

# What is written or checked below, or is seen by the tensors that are there (attention_bias, mlp_bias).
_HANDLED = frozenset((
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers",
    "layer_types",
))  # fmt: skip
# What changes no logit of a model in evaluation.
_WITHOUT_EFFECT = frozenset((
    "transformers_version", "architectures", "output_hidden_states", "output_attentions", "return_dict", "dtype",
    "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type", "initializer_range",
    "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "pretraining_tp", "attention_dropout",
    "_name_or_path", "model_type",
))  # fmt: skip
# Of config.rope_parameters, by rope_type.
_ROPE = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
# Options at which nothing need be said. llama.cpp does not take a model's own beta_fast and beta_slow.
_ROPE_NEUTRAL = {"partial_rotary_factor": 1, "beta_fast": 32, "beta_slow": 1, "truncate": True}


def family_of(model: nn.Module) -> Family:
    """Return the family of a model, after a check of its configuration.

    Raises:
        ValueError: If llama.cpp is not known to compute what this model does.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    if name not in FAMILIES or not type(model).__module__.startswith("transformers.models."):
        raise ValueError(f"a {name} cannot be written as GGUF: {', '.join(FAMILIES)} can; {REMEDY}")
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"this {name} is quantised in a way that GGUF has not; load it without quantisation, and quantise the GGUF "
            "file with llama-quantize"
        )
    family = FAMILIES[name]
    check_config(config, family)
    return family


def check_config(config: Any, family: Family) -> None:
    """Raise a ValueError for what llama.cpp would compute otherwise, or is not known to compute alike."""
    plain = type(config)().to_dict()
    for name in sorted(plain.keys() - _HANDLED - _WITHOUT_EFFECT):
        _refuse_unless(getattr(config, name, None) == plain[name], config, name, f"{plain[name]!r}")
    _refuse_unless(config.hidden_act == "silu", config, "hidden_act", "'silu'")
    if family.architecture == "qwen3":
        _refuse_unless(not config.attention_bias, config, "attention_bias", "False")
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        _refuse_unless(set(kinds) == {"full_attention"}, config, "layer_types", "'full_attention' everywhere")
    elif (window := getattr(config, "sliding_window", None)) is not None:
        fits = window >= config.max_position_embeddings  # then no position is beyond it
        wanted = f"None or at least max_position_embeddings ({config.max_position_embeddings})"
        _refuse_unless(fits, config, "sliding_window", wanted)
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    allowed = [name for name in _ROPE if name != "llama3" or family.architecture == "llama"]
    if "rope_theta" not in rope or kind not in allowed:
        raise ValueError(
            f"rope_parameters of the {type(config).__name__} are {rope} but rope_type must be one of "
            f"{', '.join(allowed)}, with rope_theta; {REMEDY}"
        )
    for name, value in rope.items():
        neutral = value is None or (name in _ROPE_NEUTRAL and value == _ROPE_NEUTRAL[name])
        if name not in ("rope_type", "rope_theta", *_ROPE[kind]) and not neutral:
            raise ValueError(f"rope_parameters have {name}={value!r}, with which {kind} is not known here; {REMEDY}")
    missing = [name for name in _ROPE[kind] if rope.get(name) is None]
    if missing:
        raise ValueError(f"rope_parameters of type {kind} lack {', '.join(missing)}; they are {rope}")


def _refuse_unless(right: bool, config: Any, name: str, wanted: str) -> None:
    if not right:
        raise ValueError(
            f"{name} of the {type(config).__name__} is {getattr(config, name, None)!r} but must be {wanted} for a GGUF "
            f"file that computes the same; {REMEDY}"
        )


def head_size(config: Any) -> int:
    """Return the size of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def entries_of(config: Any, family: Family) -> list[Entry]:
    """Return what the GGUF file says of a model besides its tensors."""
    require("gguf", what="GGUF", extra="demo-lm")
    from gguf import Keys, RopeScalingType

    def named(key: str, value: Any, kind: str) -> Entry:
        return Entry(key.format(arch=family.architecture), value, kind)

    size, rope = head_size(config), config.rope_parameters
    entries = [
        named(Keys.LLM.VOCAB_SIZE, config.vocab_size, "UINT32"),
        named(Keys.LLM.CONTEXT_LENGTH, config.max_position_embeddings, "UINT32"),
        named(Keys.LLM.EMBEDDING_LENGTH, config.hidden_size, "UINT32"),
        named(Keys.LLM.BLOCK_COUNT, config.num_hidden_layers, "UINT32"),
        named(Keys.LLM.FEED_FORWARD_LENGTH, config.intermediate_size, "UINT32"),
        named(Keys.Attention.HEAD_COUNT, config.num_attention_heads, "UINT32"),
        named(Keys.Attention.HEAD_COUNT_KV, config.num_key_value_heads, "UINT32"),
        named(Keys.Attention.KEY_LENGTH, size, "UINT32"),
        named(Keys.Attention.VALUE_LENGTH, size, "UINT32"),
        named(Keys.Attention.LAYERNORM_RMS_EPS, config.rms_norm_eps, "FLOAT32"),
        named(Keys.Rope.DIMENSION_COUNT, size, "UINT32"),
        named(Keys.Rope.FREQ_BASE, rope["rope_theta"], "FLOAT32"),
    ]
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        scaling = RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN
        entries.append(named(Keys.Rope.SCALING_TYPE, scaling.value, "STRING"))
        entries.append(named(Keys.Rope.SCALING_FACTOR, rope["factor"], "FLOAT32"))
    if kind == "yarn":
        entries.append(named(Keys.Rope.SCALING_ORIG_CTX_LEN, rope["original_max_position_embeddings"], "UINT32"))
    return entries


def frequency_factors(config: Any) -> Tensor | None:
    """Return what llama.cpp divides the rotary frequencies by, (head size / 2,), where it has no scaling of its own."""
    if config.rope_parameters.get("rope_type") != "llama3":
        return None
    require("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # Made anew: the buffers of a model that was cast to 16 bit are rounded.
    scaled, attention = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert attention == 1
    size = head_size(config)
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    return (1.0 / (config.rope_parameters["rope_theta"] ** exponents) / scaled).to(torch.float32)
