"""Run by tests/clp/test_served_training.py on two gloo processes: each asks the server for its part of a rollout."""

import contextlib
import os
import sys
from pathlib import Path

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from clp_problems import language_model, make_loss, parts, settings
from ending import leave
from tiny_language_models import tokenizer

from mopl.clp.policies import new_policy
from mopl.clp.prompts import PromptSource
from mopl.clp.rollout import Sampler
from mopl.clp.server_rollouts import ServerAnswers
from mopl.training import make_accelerator, train


def trained(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters() if p.requires_grad])


if __name__ == "__main__":
    url, folder, out = sys.argv[1:]
    accelerator = make_accelerator(cpu=True)
    assert accelerator.num_processes == 2
    base = language_model()
    config = settings(
        scope="lora-mixture", steps=3, accumulation=2, rollout_server=url, rollout_folder=folder, rollout_timeout=60.0
    )
    policy = new_policy(base, config, ("first", "second"), "clp")
    before = trained(policy)
    answers = ServerAnswers(config, Sampler(base, tokenizer(), config), accelerator)
    untrained = new_policy(language_model(), config, ("first", "second"), "clp")
    answers.check([lambda: contextlib.nullcontext(untrained)], [1, 7])  # by the main process alone
    assert answers.server.kind == "mopl"
    loss = make_loss(base, config, Path(out))
    loss.source = answers.of("clp")
    seen = []

    def followed(model, batch, step):
        value, logs = loss(model, batch, step)
        seen.append((float(logs["importance"]), float(logs["engine_kl"])))
        return value, logs

    train(policy, PromptSource(parts(config)["train"], config, 2, trade_offs=2), followed, config.training(),
          accelerator=accelerator)  # fmt: skip
    assert len(seen) == 6 and all(abs(ratio - 1) < 1e-4 and kl < 1e-7 for ratio, kl in seen), seen
    both = accelerator.gather(trained(policy)[None])
    assert torch.equal(both[0], both[1]) and not torch.equal(both[0], before)
    if accelerator.is_main_process:
        print("both processes have one policy")
    leave()
