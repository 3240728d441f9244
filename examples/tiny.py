"""What the examples train on, so that they run offline in seconds: a random model, a tokenizer, conflicting labels.

For real models take `AutoModelForCausalLM.from_pretrained(...)`, `AutoTokenizer.from_pretrained(...)` and a data set of
`mopl.language_models.readers.load_preferences(...)` in their places; nothing else in the examples changes.
"""

import os

# Processors that advertise AMX but trap its instructions (some virtual machines) need this; it harms nowhere.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
torch.set_num_threads(1)  # so small a model is slower with more
WORDS = "<pad> <eos> how do i cook rice tea eggs beans soup corn ? boil it please kindly gently and enjoy".split()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def model() -> LlamaForCausalLM:
    """A Llama of two layers with random weights."""
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.1, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def pairs() -> list[dict]:
    """TRL's columns, and one label column for each objective: positive where `chosen` is the better one."""
    return [
        {"prompt": f"how do i cook {food} ? ", "chosen": f"please kindly boil {food} gently and enjoy it",
         "rejected": f"boil {food}", "polite": 1.0, "brief": -1.0}
        for food in ("rice", "tea", "eggs", "beans", "soup", "corn")
    ]  # fmt: skip


def lists() -> list[dict]:
    """Lists of three responses with labels for each objective."""
    return [
        {"prompt": f"how do i cook {food} ? ",
         "responses": [f"please kindly boil {food} gently and enjoy it", f"please boil {food}", f"boil {food}"],
         "labels": {"polite": [2, 1, 0], "brief": [0, 1, 2]}}
        for food in ("rice", "tea", "eggs", "beans", "soup", "corn")
    ]  # fmt: skip
