"""Run by tests/language_models/test_split_heads.py on two and four processes: fused models under tensor parallelism.

Every process has the whole batch and a part of the vocabulary; scores, figures, divergences and the gradients of all
parameters must be those of one process with the whole model, in float64, where norms still round to float32.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
import transformers
from ending import leave
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers.distributed import DistributedConfig

from mopl.language_models.divergences import Distillation, states_of
from mopl.language_models.head import UnsupportedModelError, fuse, score_sequences

VOCABULARY = 61  # which neither two nor four divide
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 32, "initializer_range": 0.3,
    "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip


def build(family: str, tied: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    if family == "gemma2":  # a softcap behind the head
        config = transformers.Gemma2Config(**COMMON, final_logit_softcapping=5.0, tie_word_embeddings=tied)
        return transformers.Gemma2ForCausalLM(config).double()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON, tie_word_embeddings=tied)).double()


def batch_of() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1, 6:] = -100
    return {"input_ids": ids, "labels": labels}


def figures(model, rows: slice = slice(None), likeliest=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return a loss of everything that passes a gradient, and all that a fused model gives."""
    batch = batch_of()
    if likeliest is not None:
        batch["labels"][2:, 4:] = likeliest[2:, 3:-1]
    batch = {name: value[rows] for name, value in batch.items()}
    upstream = torch.tensor([0.7, -1.3, 2.0, 0.2])[rows, None]
    with torch.no_grad():  # another trade-off, say: the same model at other activations
        teacher = states_of(model, {**batch, "input_ids": batch["input_ids"].roll(1, -1)})
    names = ("log_sum_sq_probs", "mean_logits", "is_top1")
    out = score_sequences(
        model, batch, temperature=0.8, return_logsumexp=True, return_entropy=True, statistics=names,
        teachers=[teacher], distillation=Distillation(0.3, 1.5),
    ).output  # fmt: skip
    found = {"log_probs": out.log_probs, "logsumexp": out.logsumexp, "entropy": out.entropy}
    found |= {"divergence": out.divergences[0], **out.statistics}
    loss = (upstream * (out.log_probs + 0.3 * out.entropy + 0.1 * out.logsumexp + out.divergences[0])).sum(-1).mean()
    return loss, found


def gradients(model) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
    return found


def compare(what: str, model, alone, rows: slice = slice(None)) -> None:
    with torch.no_grad():
        likeliest = alone(batch_of()["input_ids"]).logits.argmax(-1)
    loss, found = figures(alone, likeliest=likeliest)
    loss.backward()
    assert 0 < found["is_top1"].sum() < found["is_top1"].numel()
    expected, wanted = found, gradients(alone)
    for _ in range(2):  # the second one finds the transform measured
        model.zero_grad()
        loss, found = figures(model, rows, likeliest)
        loss.backward()
    for name, value in found.items():
        close(value, expected[name][rows], f"{what}, {name}")
    for name, value in gradients(model).items():
        close(value, wanted[name], f"{what}, gradient of {name}")


def close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    error = float((actual.detach() - expected.detach()).abs().max() / expected.detach().abs().max().clamp(min=1e-9))
    assert error <= 1e-6, f"{what}: relative error {error:.2e}"


def raises(kind, part: str, act) -> None:
    try:
        act()
    except kind as error:
        assert part in str(error), error
    else:
        raise AssertionError(f"nothing was raised for {part}")


def by_transformers(place: Path, family: str, tied: bool) -> None:
    folder = place / f"{family}-{tied}"
    if dist.get_rank() == 0:
        build(family, tied).save_pretrained(folder)
    dist.barrier()
    plan = {"distributed_config": DistributedConfig(tp_plan="auto")}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **plan)
    assert isinstance(model.lm_head.weight, DTensor)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    compare(f"tp_plan of {family}, tied={tied}", fuse(model).eval(), fuse(build(family, tied)).eval())


def by_torch(family: str, layout, local: bool, mesh) -> None:
    model = build(family)
    plan = {"lm_head": ColwiseParallel(output_layouts=layout, use_local_output=local)}
    fused = fuse(parallelize_module(model, mesh, plan))
    compare(f"ColwiseParallel of {family} to {layout}, local={local}", fused.eval(), fuse(build(family)).eval())


def with_fsdp() -> None:
    """Two groups of two: the vocabulary is split in each, and each has its own rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = build("llama")
    parallelize_module(model, mesh["tp"], {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    mine = slice(2 * mesh["dp"].get_local_rank(), 2 * mesh["dp"].get_local_rank() + 2)
    compare("with FSDP2", fuse(model).eval(), fuse(build("llama")).eval(), mine)


def errors(mesh) -> None:
    """What is no split vocabulary, or not one batch, is refused."""
    model = fuse(parallelize_module(build("llama"), mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())}))
    other = batch_of()
    other["labels"][0, 4] += dist.get_rank()
    raises(ValueError, "give all processes of a tensor-parallel group the same batch",
           lambda: score_sequences(model, other))  # fmt: skip
    for first in (fuse, lambda model: model):  # before the head is split, or behind
        parts = fuse(parallelize_module(first(build("llama")), mesh, {"lm_head": ColwiseParallel()}))
        raises(UnsupportedModelError, "gives each process its part of the logits", lambda parts=parts: figures(parts))
    grid = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    for placements, on in (([Shard(1)], mesh), ([Replicate()], mesh), ([Replicate(), Shard(0)], grid)):
        cut = fuse(build("llama"))
        cut.lm_head.weight = torch.nn.Parameter(distribute_tensor(cut.lm_head.weight.detach(), on, placements))
        raises(UnsupportedModelError, "no vocabulary split over one group", lambda cut=cut: figures(cut))


def main(place: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    by_transformers(place, "llama", True)
    by_torch("gemma2", Replicate(), True, mesh)
    if size == 4:
        with_fsdp()
    else:
        by_transformers(place, "gemma2", False)
        by_torch("llama", Replicate(), False, mesh)
        by_torch("llama", Shard(-1), False, mesh)
        errors(mesh)
    if dist.get_rank() == 0:
        print("all split heads equal")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
