"""Names, layouts and number formats of a model's tensors in GGUF."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mopl._extras import require
from mopl.language_models.gguf_files.families import REMEDY, Family
from mopl.language_models.gguf_files.files import Planned

FORMATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Layout:
    """Where the parameters of one model are in GGUF."""

    def __init__(self, config: Any, family: Family) -> None:
        require("gguf", what="GGUF", extra="demo-lm")
        from gguf import MODEL_ARCH, get_tensor_name_map

        self.config, self.family = config, family
        self.names = get_tensor_name_map(MODEL_ARCH[family.architecture.upper()], config.num_hidden_layers)

    def name(self, parameter: str) -> str:
        """Return the name in GGUF of a parameter, `model.layers.0.mlp.up_proj.weight` say."""
        found = self.names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"GGUF has no name for {parameter} in models of {self.family.architecture}; {REMEDY}")
        return found

    def rows(self, parameter: str, tensor: Tensor) -> Tensor:
        """Return a parameter, or the B of an adapter of it, with its rows as llama.cpp has them.

        Row i of the first half of a head and row i of the second turn together in transformers; where llama.cpp
        turns neighbours, they are put side by side.
        """
        module = parameter.rsplit(".", 2)[-2]
        if not self.family.interleaved or module not in ("q_proj", "k_proj"):
            return tensor
        heads = self.config.num_attention_heads if module == "q_proj" else self.config.num_key_value_heads
        return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def plan_tensors(model: nn.Module, layout: Layout, *, without_adapters: bool = False) -> list[Planned]:
    """Return the tensors of a model in the order in which they are written, none of them copied yet.

    `without_adapters` takes what PEFT has put into layers as if it were not there.
    """
    model_: Any = model
    head, embedding = model_.get_output_embeddings().weight, model_.get_input_embeddings().weight
    planned = []
    for name, parameter in model.state_dict(keep_vars=True).items():
        if without_adapters:
            if ".lora_" in name:
                continue
            name = name.replace(".base_layer.", ".")
        if name == "lm_head.weight" and head is embedding:
            continue  # llama.cpp takes the embeddings where there is no head
        if parameter.dtype not in FORMATS:
            raise ValueError(f"{name} is {parameter.dtype} but GGUF takes {', '.join(map(str, FORMATS))}; cast it")
        planned.append(plan(layout.name(name), parameter, lambda tensor, name=name: layout.rows(name, tensor)))
    return planned


def plan(name: str, tensor: Tensor, arrange: Any = lambda tensor: tensor) -> Planned:
    """Return how one tensor is written: in its own format, vectors in float32, as llama.cpp wants them."""
    dtype = torch.float32 if tensor.ndim == 1 else tensor.dtype

    def make() -> Any:
        made = arrange(tensor.detach()).to("cpu", dtype).contiguous()
        return (made.view(torch.int16) if dtype == torch.bfloat16 else made).numpy()

    return Planned(name, tuple(tensor.shape), FORMATS[dtype], tensor.numel() * dtype.itemsize, make)
