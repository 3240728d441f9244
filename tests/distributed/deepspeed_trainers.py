"""Run by tests/integrations/test_deepspeed_trainers.py on gloo processes: the trainers' models under ZeRO."""

import os
import sys
from pathlib import Path

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import multi_objective_trainer as small
import sharded_trainers
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from deepspeed_site import without_compiled_ops
from ending import leave

without_compiled_ops()
# accelerate knows no group of CPUs under DeepSpeed; all that is missing is its backend.
PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)


def config(stage: int, **more) -> dict:
    return {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}, **more,
    }  # fmt: skip


def whole(parameters):
    from mopl._sharded import gathered
    return gathered(parameters, keep=True)

import traceback
def main(place, stage, kinds):
    processes, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    import time
    for kind in kinds:
        t = time.time()
        try:
            model, more = sharded_trainers.build(kind)
            if kind == "conditioned" and processes > 1:  # the first process decides, as under DDP
                with torch.no_grad():
                    for parameter in model.hyper_prompt.parameters():
                        parameter.add_(float(os.environ["RANK"]))
            trainer = small.make(kind, place / "runs" / f"{kind}-{stage}", processes, model=model, more=more, deepspeed=config(stage), use_cpu=False)
            made, small.make = small.make, lambda *a, **k: trainer
            found = small.run(kind, place, processes)
            small.make = made
            found["parameters"] = whole({n: p for n, p in model.named_parameters() if p.requires_grad})
        except Exception:
            if rank == 0: print("FAILED", kind); traceback.print_exc(file=sys.stdout)
            leave()
        if rank == 0:
            one = sharded_trainers.run(kind, place / "one", processes=1) if 0 else torch.load(place / f"{kind}-one.pt")
            worst = max(float((found["parameters"][n] - e).abs().max() / e.abs().max()) for n, e in one["parameters"].items())
            m = max(abs(found["metrics"][n] - v) for n, v in one["metrics"].items())
            print("RESULT", kind, stage, type(trainer.model_wrapped).__name__, found["reference"], f"{worst:.1e} {m:.1e}", time.time() - t, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    leave()
