"""Random language models of two layers, with a tokenizer of words: most of those that tests make are made here."""

import peft
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

from mopl.conditioning import HyperPrompt, HyperPromptModel, TuningRecord

K, HIDDEN = 5, 32
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>"]
WORDS = [f"w{i}" for i in range(50)] + ["[helpful:", "harmless:", "0.25,", "0.75]", "0.70,", "0.30]"]
VOCABULARY = len(SPECIAL) + len(WORDS)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %} </s>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "initializer_range": 0.3,  # so that attention is peaked and positions matter
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "gpt2": ("GPT2Config", {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 8, "sliding_window": 8, "final_logit_softcapping": 20.0}),
    "gemma3": ("Gemma3TextConfig", {"query_pre_attn_scalar": 8, "sliding_window": 8}),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 16}),
}
WEIGHTS = [[0.2, 0.8], [0.7, 0.3], [1.0, 0.0]]
PROMPTS = ["w1 w2 w3 w4 w5", "w9 w8", "w7 w7 w20 w21"]
CHAT = [{"role": "user", "content": "w11 w12"}]


def tokenizer(*, chat: bool = False, bos: bool = True, size: int = VOCABULARY):
    """Words split at spaces; a beginning-of-sequence token in front by itself."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *WORDS][:size])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    made.chat_template = TEMPLATE if chat else None
    return made


def merging(texts, special, **options) -> Tokenizer:
    """A byte-level BPE trained on texts, in which a space belongs to the word that follows it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **options)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(texts * 3, trainer)
    return backend


def build(family: str = "llama", vocabulary: int = VOCABULARY, **options) -> nn.Module:
    name, extra = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**COMMON, "vocab_size": vocabulary, **extra, **options})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def lora(model: nn.Module, name: str = "default") -> nn.Module:
    torch.manual_seed(2)
    gpt2 = type(model).__name__.startswith("GPT2")
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn"] if gpt2 else ["q_proj", "v_proj"], fan_in_fan_out=gpt2, lora_alpha=8,
        init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    return peft.get_peft_model(model, config, name).eval()


def prompt(hidden: int = HIDDEN, **options) -> HyperPrompt:
    """A prompt away from its start: every part of it depends on w."""
    torch.manual_seed(1)
    made = HyperPrompt(2, K, 3, hidden, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return made


def conditioned(
    family: str = "llama", *, adapters: bool = True, takes_beta: bool = False, positions="hf", **options
) -> HyperPromptModel:
    model = build(family, **options)
    record = TuningRecord(("helpful", "harmless"), beta=[0.1, 0.1], concentration=0.5)
    made = lora(model) if adapters else model
    return HyperPromptModel(made, prompt(takes_beta=takes_beta), record=record, positions=positions).eval()
