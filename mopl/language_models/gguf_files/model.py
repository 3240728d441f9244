"""`write_gguf_model`: a causal language model of transformers as one GGUF file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mopl._extras import require
from mopl.language_models.gguf_files.families import entries_of, family_of, frequency_factors
from mopl.language_models.gguf_files.files import Entry, write_gguf
from mopl.language_models.gguf_files.tensors import FORMATS, Layout, plan, plan_tensors
from mopl.language_models.gguf_files.tokenizer import tokenizer_entries
from mopl.language_models.tokenization import ListTokenizer
from mopl.language_models.turns import TurnEnds, turn_ends


def write_gguf_model(
    model: nn.Module,
    tokenizer: Any,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    without_adapters: bool = False,
    front: Sequence[int] = (),
    show_progress: bool = False,
) -> Path:
    """Write a plain causal language model with its tokenizer as a GGUF file, whole or not at all.

    Every matrix keeps its number format (float32, float16 or bfloat16), vectors become float32. Nothing is quantised:
    `llama-quantize` makes smaller files of this one. One tensor at a time is copied.

    Args:
        model: A Llama, Mistral, Qwen2 or Qwen3 of transformers; not changed.
        tokenizer: Its tokenizer, a byte-level BPE of the tokenizers library. Its normalisation to NFC, which Qwen's
            have, is the caller's to do: llama.cpp has none.
        path: The file; one that is there is replaced.
        name: What the file says the model is called.
        without_adapters: Leave adapters that are in the model aside; a model that has some is refused otherwise.
        front: Tokens that hold the trade-off and that the tokenizer puts before every text, as those of a merged hyper
            prompt. llama.cpp leaves them out, so the chat template must write them, and a prompt that is given
            without the template must begin with them.
        show_progress: Show on standard error how far it is.

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
    tensors = plan_tensors(model, layout, without_adapters=without_adapters)
    embedding = model_.get_input_embeddings().weight  # type: ignore[operator]
    if embedding.shape[0] != config.vocab_size:
        raise ValueError(f"the model embeds {embedding.shape[0]} tokens but its config has {config.vocab_size}")
    if (factors := frequency_factors(config)) is not None:
        tensors.insert(0, plan("rope_freqs.weight", factors))
    file_types = {"F32": LlamaFileType.ALL_F32, "F16": LlamaFileType.MOSTLY_F16, "BF16": LlamaFileType.MOSTLY_BF16}
    entries = [
        Entry(Keys.General.TYPE, "model", "STRING"),
        Entry(Keys.General.NAME, name or family.architecture, "STRING"),
        Entry(Keys.General.FILE_TYPE, int(file_types[FORMATS[embedding.dtype]]), "UINT32"),
        *entries_of(config, family),
        *tokenizer_entries(tokenizer, embedding.shape[0], ends_of(model, tokenizer).ids, front),
    ]
    return write_gguf(path, family.architecture, entries, tensors, show_progress=show_progress)


def ends_of(model: Any, tokenizer: Any) -> TurnEnds:
    """Return what ends an answer of a model: its own tokens and the end of a turn of the chat template.

    Where that end is a text of several tokens, a GGUF file cannot name it: requests must ("stop").
    """
    return turn_ends(ListTokenizer(tokenizer, max_length=None, append_eos=False), model.generation_config)
