"""Run by tests/clp/test_training.py on two gloo processes: both have a part of each rollout and train one policy."""

import os
import sys
from pathlib import Path

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from clp_problems import language_model, make_loss, parts, settings
from ending import leave

from mopl.clp.policies import new_policy
from mopl.clp.prompts import PromptSource
from mopl.language_models.models import fingerprint
from mopl.rewards.scale import RewardScale, RunningScale
from mopl.training import make_accelerator, train

if __name__ == "__main__":
    accelerator = make_accelerator(cpu=True)
    assert accelerator.num_processes == 2
    for scope in ("attention", "lora-mixture", "hyper-prompt"):
        base = language_model()
        config = settings(scope=scope, baseline="value", epochs=2, clip=0.2, steps=4, accumulation=2)
        policy = new_policy(base, config, ("first", "second"), "clp")
        policy.running = RunningScale(RewardScale(torch.zeros(2), torch.ones(2), torch.full((2,), 4.0)))
        before = fingerprint(policy)
        loss = make_loss(base, config, Path(sys.argv[1]) / scope)
        seen = []
        roll = loss.sampler.sample
        loss.sampler.sample = lambda *a, roll=roll, seen=seen: (seen.append(len(a[1])), roll(*a))[1]
        source = PromptSource(parts(config)["train"], config, 2, trade_offs=2)
        result = train(policy, source, loss, config.training(), accelerator=accelerator)
        # 4 prompts, 2 samples of each, over 2 processes and 2 parts; 2 rollouts for 4 steps.
        assert seen == [2] * 4, seen
        digest = torch.tensor(list(bytes.fromhex(fingerprint(policy))))
        both = accelerator.gather(digest[None])
        assert torch.equal(both[0], both[1]) and fingerprint(policy) != before
        # Both know the rewards of both: 4 of the beginning and 2 rollouts of 8.
        assert policy.running.counts.tolist() == [20.0, 20.0]
        scales = accelerator.gather(torch.stack([policy.running.mean, policy.running.squares])[None])
        assert torch.equal(scales[0], scales[1]) and scales[0][0].abs().min() > 0
        assert {"reward/first", "kl", "value_loss"} <= set(result.last)
    if accelerator.is_main_process:
        print("both processes have one policy")
    leave()
