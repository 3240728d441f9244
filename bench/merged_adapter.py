"""What the adapter of one trade-off costs that a server makes from a folder of adapters: time and bytes.

    OMP_NUM_THREADS=1 python -m bench.merged_adapter [--rank 16] [--rounds 3]

Two adapters of random numbers in bfloat16, on all linear layers of Llama 3 8B's shapes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from mopl.conditioning.adapter_files import AdapterFolder, write_merged_adapter

HIDDEN, INNER, KEYS, LAYERS = 4096, 14336, 1024, 32
SHAPES = {  # (in, out)
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, KEYS), "self_attn.v_proj": (HIDDEN, KEYS),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (HIDDEN, INNER), "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}  # fmt: skip


def write_folder(folder: Path, rank: int) -> None:
    """Write what `mopl export --adapters` does, but for the cards."""
    names = ["helpful", "harmless"]
    for name in names:
        tensors = {}
        for layer in range(LAYERS):
            for module, (inner, outer) in SHAPES.items():
                key = f"base_model.model.model.layers.{layer}.{module}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(rank, inner, dtype=torch.bfloat16)
                tensors[f"{key}.lora_B.weight"] = torch.randn(outer, rank, dtype=torch.bfloat16)
        (folder / name).mkdir()
        save_file(tensors, str(folder / name / "adapter_model.safetensors"), metadata={"format": "pt"})
        modules = sorted(module.rpartition(".")[2] for module in SHAPES)
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
    record = {"kind": "adapters", "objectives": names, "adapters": names, "base_model": None}
    (folder / "mopl.json").write_text(json.dumps(record))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place, clock, processor = Path(temporary), [], []
        write_folder(place, given.rank)
        for turn in range(given.rounds):
            start, busy = time.perf_counter(), time.process_time()
            write_merged_adapter(AdapterFolder(place), [0.7, 0.3], place / f"made-{turn}")
            clock.append(time.perf_counter() - start)
            processor.append(time.process_time() - busy)
        sizes = [(place / name / "adapter_model.safetensors").stat().st_size / 1e6 for name in ("helpful", "made-0")]
    print(f"rank {given.rank}: {sizes[0]:.0f} MB each, {sizes[1]:.0f} MB as one")
    print(f"made in {statistics.median(clock):.1f} s, {statistics.median(processor):.1f} of them the processor's")


if __name__ == "__main__":
    main()
