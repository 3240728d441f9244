"""Language models and LoRA adapters as GGUF, the files of llama.cpp: `write_gguf_model` and `write_gguf_adapter`.

families.py: which models, and what llama.cpp must be told of their configurations; tensors.py: names and layouts;
tokenizer.py: vocabularies; files.py: the one writer, which reads back what it wrote; model.py and adapter.py: these
put together.

A model that is not known here is refused, since llama.cpp computes with what it is told: an option that is left out
gives no error but other numbers.
"""

from typing import TYPE_CHECKING

from mopl._lazy import names_of

if TYPE_CHECKING:
    from mopl.language_models.gguf_files.adapter import write_gguf_adapter
    from mopl.language_models.gguf_files.model import write_gguf_model

__all__ = ["write_gguf_adapter", "write_gguf_model"]

__getattr__, __dir__ = names_of(__name__, {".adapter": ("write_gguf_adapter",), ".model": ("write_gguf_model",)})
