"""Small models and tokenizers of the kinds that llama.cpp has, with what is hard about them."""

import json
import unicodedata

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = [
    "Hello there, world! It's 12345 o'clock. WE'LL see: they're (normal) ''''quoted'''' and I'M not.",
    "  two spaces\n\n\n \t\ttabs \r\nand   ends  \n ", "x = {'a': [1, 2.50, 3333], \"b\": None};  // 100%",
    "naïve café – 東京タワー 🙂🚀👩‍👩‍👧 нещо на Български កាន់តែពិសេសអាច Ωμέγα ٣٤٥ ½ ²",
    "<|end|> in text<|end|>\n<tool>a</tool> <s>",
    "\u00a0no-break\u2003em\u3000ideographic\ufeffmark", "don’t 'Twas ‘quotes’ ... ------======= !!!!????",
    "1 12 123 1234 12345 123456789", "aÀ́b", "", " ", "\n", "'s", "A'S 'Ll",
]  # fmt: skip
TEXTS = [unicodedata.normalize("NFC", text) for text in TEXTS]
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TOLERANCE = 1e-5  # of log-probabilities, as a part of the largest; 1.4e-6 was the worst seen
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 1e3, "factor": 4.0}
THETA = {"rope_type": "default", "rope_theta": 5e5}
MODELS = {
    "llama": ("LlamaConfig", {"head_dim": 16, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-2}),
    "llama-3": ("LlamaConfig", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-linear": ("LlamaConfig", {"rope_parameters": LINEAR, "num_key_value_heads": 4}),
    "llama-yarn": ("LlamaConfig", {"rope_parameters": YARN, "num_key_value_heads": 1}),
    "mistral": ("MistralConfig", {"rope_parameters": THETA, "sliding_window": 256}),
    "qwen2": ("Qwen2Config", {"rope_parameters": THETA, "rms_norm_eps": 1e-2}),
    "qwen2-tied": ("Qwen2Config", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"rope_parameters": THETA, "head_dim": 16, "rms_norm_eps": 1e-2}),
    "qwen3-tied": ("Qwen3Config", {"rope_parameters": LINEAR, "tie_word_embeddings": True}),
}  # fmt: skip


def byte_level(found=(("ByteLevel", True),), ignore_merges=False, normalizer=None):
    """A tokenizer that splits texts in one of the known ways.

    Its merges are learnt without splitting, so that each place where a text must be split shows; and some tokens have
    no merge, so that it shows whether a piece that is a token is left whole.
    """
    parts = []
    for kind, option in found:
        if kind == "ByteLevel":
            parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=option))
        elif kind == "Digits":
            parts.append(pre_tokenizers.Digits(individual_digits=option))
        else:
            parts.append(pre_tokenizers.Split(Regex(option), "isolated"))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1200, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<s>", "<|end|>", "<pad>"],
    )  # fmt: skip
    pieces = [text[i : i + 6] for text in TEXTS for i in range(len(text))]
    backend.train_from_iterator(pieces, trainer)
    learnt = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for i, merge in enumerate(learnt["merges"]) if i < 40 or i % 3]
    backend.model = models.BPE(learnt["vocab"], merges, ignore_merges=ignore_merges)
    backend.pre_tokenizer = parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)
    backend.decoder = decoders.ByteLevel()
    backend.normalizer = normalizer
    backend.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("</tool>", normalized=False)])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|end|>", pad_token="<pad>"
    )
    made.chat_template = TEMPLATE
    return made


def build(tokenizer, name="llama", **options):
    """A random model, its biases and norms away from their start, with more embeddings than tokens."""
    kind, extra = MODELS[name]
    settings = {**SIZES, "vocab_size": len(tokenizer) + 3, "eos_token_id": tokenizer.eos_token_id, **extra, **options}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def sequences(model, lengths=(1, 7, 33, 100)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
