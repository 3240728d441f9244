"""`write_gguf_model`: a causal language model of transformers as one GGUF file."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mopl._extras import require
from mopl.language_models.gguf_files.families import entries_of, family_of, frequency_factors
from mopl.language_models.gguf_files.files import Entry, write_gguf
from mopl.language_models.gguf_files.tensors import FORMATS, Layout, plan, plan_tensors
from mopl.language_models.gguf_files.tokenizer import tokenizer_entries


def write_gguf_model(
    model: nn.Module,
    tokenizer: Any,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    front: Sequence[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a plain causal language model with its tokenizer as a GGUF file, whole or not at all.

    Every matrix keeps its number format (float32, float16 or bfloat16), vectors become float32. Nothing is quantised:
    `llama-quantize` makes smaller files of this one. One tensor at a time is copied.

    Args:
        model: A Llama, Mistral, Qwen2 or Qwen3 of transformers, without adapters; not changed.
        tokenizer: Its tokenizer, a byte-level BPE of the tokenizers library. Its normalisation to NFC, which Qwen's
            have, is the caller's to do: llama.cpp has none.
        path: The file; one that is there is replaced.
        name: What the file says the model is called.
        front: Virtual tokens of a merged hyper prompt, ids in the vocabulary: the chat template must write them, and
            a prompt without the template is given without them.
        progress: Told the bytes of tensors that are written and those of all.

    Returns:
        The file.

    Raises:
        ImportError: If gguf is not installed.
        OSError: If it cannot be written.
        ValueError: If llama.cpp is not known to compute what this model does, or to split texts so.
    """
    require("gguf", "transformers", what="GGUF", extra="demo-lm")
    from gguf import Keys, LlamaFileType

    family, model_ = family_of(model), model
    config: Any = model_.config
    layout = Layout(config, family)
    tensors = plan_tensors(model, layout)
    embedding = model_.get_input_embeddings().weight  # type: ignore[operator]
    if embedding.shape[0] != config.vocab_size:
        raise ValueError(f"the model embeds {embedding.shape[0]} tokens but its config has {config.vocab_size}")
    if (factors := frequency_factors(config)) is not None:
        tensors.insert(0, plan("rope_freqs.weight", factors))
    if front and not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer puts virtual tokens before every text, which llama.cpp can do in a chat template alone, and "
            "there is none; give the tokenizer a chat template, or serve the model with transformers or vLLM"
        )
    file_types = {"F32": LlamaFileType.ALL_F32, "F16": LlamaFileType.MOSTLY_F16, "BF16": LlamaFileType.MOSTLY_BF16}
    entries = [
        Entry(Keys.General.TYPE, "model", "STRING"),
        Entry(Keys.General.NAME, name or family.architecture, "STRING"),
        Entry(Keys.General.FILE_TYPE, int(file_types[FORMATS[embedding.dtype]]), "UINT32"),
        *entries_of(config, family),
        *tokenizer_entries(tokenizer, embedding.shape[0], _ends(model_), front),
    ]
    return write_gguf(path, family.architecture, entries, tensors, progress=progress)


def _ends(model: Any) -> list[int]:
    """Return the tokens at which transformers ends a generation of the model."""
    settings = getattr(model, "generation_config", None) or model.config
    ends = settings.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
