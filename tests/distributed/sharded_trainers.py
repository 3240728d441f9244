"""Run by tests/integrations/test_sharded_trainers.py on gloo processes: the trainers' models under accelerate's FSDP2.

What is done with them, and what must be so on one process as on several, deepspeed_trainers.py does under DeepSpeed.

accelerate shards on accelerators only and would train with DDP on CPUs without a word. All that stands in the way is
the name of the way of training, which `shard_on_cpus` gives it; everything else is accelerate's and transformers' own
path.
"""

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import multi_objective_trainer as small
import peft
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from ending import leave
from torch.distributed.fsdp import FSDPModule

from mopl._sharded import gathered
from mopl.conditioning import TextPrompt, TextPromptModel, WeightedModel
from mopl.language_models.head import FusedOutput

NAMES = ("helpful", "harmless")
ONE_GROUP = ", layers in one group"
KINDS = ("conditioned", "lora mixture", f"lora mixture{ONE_GROUP}", "adapters", "plain", "reference adapter", "words")
SAVED = ("conditioned", "lora mixture", "words")  # of which checkpoints are tried, too


def shard_on_cpus() -> None:
    """Let accelerate do on CPUs what it does on accelerators when it is asked for FSDP."""
    made = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
        if self.__dict__.get("fsdp_plugin") is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init


def build(kind: str):
    """Return a model, and further arguments of its trainer."""
    kind = kind.removesuffix(ONE_GROUP)
    if kind == "words":  # of which all is trained, and the head is the embedding
        from tiny_language_models import tokenizer

        inner = small.build("plain")
        inner.config.tie_word_embeddings = True
        inner.tie_weights()
        return TextPromptModel(inner, TextPrompt(NAMES), tokenizer(size=61)), {}
    if kind == "reference adapter":  # the head is in a group that stays whole behind its forward pass
        torch.manual_seed(1)
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(small.build("plain"), config, adapter_name="other")
        model.add_adapter("policy", config)
        model.set_adapter("policy")
        return model, {"reference_adapter": "other"}
    return small.build(kind), {}


def make(kind: str, folder: Path, processes: int, built, **options):
    """Return a trainer of what `build` returns: for two steps, as the second needs what the first has left behind."""
    model, more = built
    few = {"max_steps": 2, "logging_steps": 2}
    if isinstance(model, WeightedModel):
        few["eval_points"] = 3
    return small.make(kind, folder, processes, model=model, more=more, **few | options)


def is_one_process(found: dict, one: dict, what: str) -> None:
    assert found["parameters"].keys() == one["parameters"].keys()
    for name, expected in one["parameters"].items():
        error = float((found["parameters"][name] - expected).abs().max())
        # Steps of SGD, so an update of a wrong size would show.
        assert error <= 2e-6 * float(expected.abs().max()), f"{what}: {name} differs by {error:.1e}"
    for name, value in one["metrics"].items():
        assert found["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), (what, name)


def differ(model) -> None:
    """Let processes begin with different prompts: the first decides, as under DDP."""
    with torch.no_grad():
        for parameter in model.hyper_prompt.parameters():
            parameter.add_(float(os.environ["RANK"]))


def wrapping(kind: str) -> None:
    # In one group with the model around them, layers stay whole behind a forward pass of the reference.
    os.environ["FSDP_AUTO_WRAP_POLICY"] = "NO_WRAP" if kind.endswith(ONE_GROUP) else "TRANSFORMER_BASED_WRAP"


def trained(trainer) -> dict:
    own = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    return {name: value.detach().clone() for name, value in gathered(own, keep=True).items()}


ADAMW = {"optim": "adamw_torch", "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 1}


def checkpoints(place: Path, kind: str, build: Callable, main: bool, **options):
    """A training that goes on from a checkpoint has the bits of one that was never stopped; files are whole.

    Returns the trainers of both, and what is trained.
    """
    one = make(kind, place / kind, 2, build(kind), **ADAMW, **options)
    one.train()
    expected = trained(one)
    one.save_model(str(place / f"{kind}, saved"))
    again = build(kind)
    with torch.no_grad():  # as another start would be: all must come from the files
        for parameter in again[0].parameters():
            if parameter.requires_grad and kind == "conditioned":
                parameter.add_(1.0)
    torch.distributed.barrier()
    two = make(kind, place / kind, 2, again, **ADAMW, **options)
    two.train(resume_from_checkpoint=str(place / kind / "checkpoint-1"))
    for name, value in trained(two).items():
        assert torch.equal(value, expected[name]), f"{kind}: {name} of a resumed training differs"
    if main:
        torch.save(expected, place / f"{kind}, saved.pt")
    return one, two, expected


def precision(place: Path, kind: str, build: Callable, **options):
    """In 16 bit, weights and log-probabilities keep theirs: only layers compute in the training's.

    Returns the model that the trainer has.
    """
    built = model, _ = build(kind)
    seen = {"weights": [], "log_probs": [], "reference": []}
    filled, unless_fixed = FusedOutput.filled, WeightedModel._unless_fixed

    def spy(self, **given):
        seen["weights"] += [given["weights"]] if given.get("weights") is not None else []
        return unless_fixed(self, **given)

    def note(parts, output):
        seen["log_probs"].append(parts["log_probs"])
        return filled(parts, output)

    WeightedModel._unless_fixed, FusedOutput.filled = spy, staticmethod(note)
    try:
        trainer = make(kind, place / "bf16", 2, built, bf16=True, **options | {"max_steps": 1})
        reference = trainer._reference
        trainer._reference = lambda *given: seen["reference"].append(reference(*given)) or seen["reference"][-1]
        trainer.train()
    finally:
        WeightedModel._unless_fixed, FusedOutput.filled = unless_fixed, filled
    assert seen["log_probs"] and seen["reference"] and bool(seen["weights"]) == isinstance(model, WeightedModel)
    assert all(value.dtype == torch.float32 for values in seen.values() for value in values), kind
    for name in ("log_probs", "reference"):
        assert all((value != value.bfloat16()).any() for value in seen[name]), f"{kind}: {name} are rounded"
    assert all(torch.allclose(w.sum(-1), torch.ones(()), atol=1e-6) for w in seen["weights"])
    return trainer.model


def main(place: Path, kinds: list[str]) -> None:
    shard_on_cpus()
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is no garbage: accelerate collects at the end of every training
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for kind in kinds:
        wrapping(kind)
        built = build(kind)
        if kind == "conditioned":
            differ(built[0])
        trainer = make(kind, place / "runs" / kind, processes, built)
        found = {**small.measured(trainer, kind), "parameters": trained(trainer)}
        assert found["class"].startswith("FSDP"), f"{kind} was not sharded"
        assert found["reference"].startswith("FSDP") == (kind in ("plain", "words")), f"{kind}: {found['reference']}"
        if rank == 0:
            torch.save(found, place / f"{kind}-{processes}.pt")
    if processes == 2:
        for kind in SAVED:
            checkpoints(place, kind, build, rank == 0)
        for kind in ("conditioned", "plain"):
            model = precision(place, kind, build)
            assert isinstance(getattr(model, "causal_lm", model).model.layers[0], FSDPModule)
    if rank == 0:
        print("sharded trainers are done")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave()
