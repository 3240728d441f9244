"""Run by tests/integrations/test_transformers.py, on two gloo processes and on one: the same training.

Each process has its part of the batches; parameters after three steps of two parts each, the logged means and an
evaluation of five lists (which two processes cannot share evenly) must be those of one process.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import peft
import torch
import transformers

from mopl.conditioning import HyperPrompt, HyperPromptModel, LoraMixture, ParameterMixture
from mopl.integrations.transformers import MultiObjectiveConfig, MultiObjectiveTrainer
from mopl.language_models.head import fuse
from mopl.language_models.tokenization import ReadReport, TokenizedData, TokenizedList

ADAPTERS = ("adapters", "precomputed adapters")
MODELS = ("conditioned", "plain", "precomputed", *ADAPTERS, "lora mixture", "parameter mixture")


def data(count):
    draw = np.random.default_rng(3)
    lists = []
    for number in range(count):
        size = 2 + number % 3
        labels = draw.integers(0, 3, (2, size)).astype(np.float32)
        labels[:, 0] += 1
        responses = tuple(draw.integers(3, 61, draw.integers(2, 6)) for _ in range(size))
        lists.append(TokenizedList(draw.integers(3, 61, 3), responses, labels, number))
    return TokenizedData(tuple(lists), ("helpful", "harmless"), "random", ReadReport("random"))


def build(name):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    if name == "lora mixture":  # whose reference depends on w
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        return LoraMixture(fuse(model), 2, config=config)
    if name == "parameter mixture":
        return ParameterMixture(model, 2)
    if "adapters" in name:  # which are no copies of the base, so their reference is what they begin with
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config)
    if name != "conditioned":
        return model
    prompt = HyperPrompt(2, 4, 2, 32)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return HyperPromptModel(model, prompt)


def make(
    name, folder, processes, model=None, more=None, classes=(MultiObjectiveConfig, MultiObjectiveTrainer), **options
):
    """Return a trainer; `options` are those of its config, `more` further arguments of it."""
    settings = {
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "optim": "sgd",
        "per_device_train_batch_size": 4 // processes, "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 2, "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 1e6,
        "max_steps": 3, "logging_steps": 3, "beta": 0.5, "precompute_ref_log_probs": "precomputed" in name,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    args = classes[0](str(folder), **{**settings, **options})
    model = build(name) if model is None else model
    return classes[1](model, args=args, train_dataset=data(16), eval_dataset=data(5), **(more or {}))


def run(name, folder, processes, **options):
    return measured(make(name, folder, processes, **options), name)


def measured(trainer, name):
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = ("loss", "loss/helpful", "accuracy/harmless", "margin/helpful", "log_ratio", "grad_norm")
    metrics = {metric: float(log[metric]) for metric in names}
    if name != "conditioned":
        del metrics["accuracy/harmless"]  # a plain model starts at its reference: the sign of rounding decides there
    found = trainer.evaluate()
    metrics |= {k: v for k, v in found.items() if k.startswith(("eval_helpful", "eval_harmless", "eval_loss@"))}
    model = trainer.accelerator.unwrap_model(trainer.model)
    parameters = {key: value.detach().clone() for key, value in model.named_parameters() if value.requires_grad}
    classes = {"class": type(trainer.model).__name__, "reference": type(trainer.ref_model).__name__}
    return {"parameters": parameters, "metrics": metrics, **classes}


if __name__ == "__main__":
    from ending import leave  # beside the script, which a test imports as well

    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    for kind in MODELS:
        torch.save(run(kind, target / kind, processes=2), target / f"{kind}-{os.environ['RANK']}.pt")
    leave()
