"""A model with a fused head on one GPU: against its logits, and inside DDP and FSDP2 against the model alone.

`tests/interpreter/test_gpu_wrapped_small.py` runs the same tests on a CPU, so that no mistake in this file waits for a
GPU; several processes are a matter of `tests/language_models/test_fuse_distributed.py`.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_problems import DEVICE, GPU

transformers = pytest.importorskip("transformers")

from mopl.alignment import fuse, score_sequences

pytestmark = pytest.mark.gpu

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("recompute", [False, True], ids=["", "activations computed again"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_scores_and_gradients_of_a_fused_head_are_those_of_the_logits(tied: bool, recompute: bool) -> None:
    large = GPU
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=5003 if large else 61, hidden_size=128 if large else 32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = fuse(transformers.LlamaForCausalLM(config).to(DEVICE))
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids = torch.randint(3, config.vocab_size, (4, 40 if large else 9), device=DEVICE)
    labels = ids.clone()
    labels[:, :3], labels[1, 6:] = -100, -100
    upstream = torch.randn(4, device=DEVICE)

    scores = score_sequences(model, {"input_ids": ids, "labels": labels}).scores
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad((scores * upstream).sum(), list(parameters.values()))
    log_p = model(input_ids=ids).logits.float().log_softmax(-1)[:, :-1]
    target = labels[:, 1:]
    own = log_p.gather(2, target.clamp(min=0)[..., None])[..., 0]
    expected = own.where(target >= 0, 0).sum(1)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad((expected * upstream).sum(), list(parameters.values()))
    for name, a, b in zip(parameters, found, wanted, strict=True):
        assert float((a - b).norm()) <= 1e-5 * float(b.norm()), name


@pytest.mark.skipif(not GPU, reason="two processes do the same in tests/language_models/test_fuse_distributed.py")
def test_gradients_under_ddp_and_fsdp2_equal_those_of_the_model_alone() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    paths = {"PYTHONPATH": os.pathsep.join(str(path) for path in (TESTS.parent, TESTS, *sys.path) if str(path))}
    dtypes = ["float32", "bfloat16", "float16"]
    settings = {"NCCL_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(TESTS / "distributed" / "fuse_gradients.py"), *dtypes],
        env={**os.environ, **group, **paths, **settings},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all gradients equal" in done.stdout
