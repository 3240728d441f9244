"""Whoever computes log-probabilities of tokens: mopl, plain PyTorch, and other libraries where they are installed.

A peer is imported when it is asked for, because one that is installed for another machine may take its process with it.
One that is missing raises ImportError with the reason and never stands in as something else.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mopl.ops import gathered_logprob, linear_logprob

HEAD_MODES = ("forward", "frozen", "trained")
Run = Callable[..., Tensor]


@dataclass(frozen=True)
class Peer:
    """One implementation.

    Args:
        name: as tables print it.
        load: returns a function: for a head (hidden, weight, target) -> log p (N,), or their sum; from logits
            (logits, target) -> log p.
        per_token: false if it can only give a sum, so that its gradients cannot serve any other upstream.
        modes: the modes that it has.
        heavy: needs a compiler of its own (CuTe, 63 to 92 MB of wheels), so it comes last or not at all.
    """

    name: str
    load: Callable[[], Run]
    per_token: bool = True
    modes: tuple[str, ...] = HEAD_MODES
    heavy: bool = False


def _import(module: str, *names: str) -> list:
    """Return attributes of a module; raise ImportError if it, or one of them, is not there."""
    try:
        found = importlib.import_module(module)
        return [getattr(found, name) for name in names]
    except AttributeError as error:
        raise ImportError(f"this {module.partition('.')[0]} has no {error.name}") from error
    except ImportError:
        raise
    except Exception as error:  # a library that is installed for another machine fails in its own way
        raise ImportError(f"{type(error).__name__}: {error}") from error


def naive(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return -F.cross_entropy(hidden @ weight.T, target, reduction="none")


def naive_upcast(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return -F.cross_entropy((hidden @ weight.T).float(), target, reduction="none")


def float32_head(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return -F.cross_entropy(hidden.float() @ weight.float().T, target, reduction="none")


def _torch(reduction: str) -> Run:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy")

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        return -F.linear_cross_entropy(hidden, weight, target, reduction=reduction, options=options)

    return run


def _trl() -> Run:
    (function,) = _import("trl.kernels.chunked_logprob", "ChunkedLogProbFunction")
    return lambda hidden, weight, target: function.apply(hidden, weight, None, target, 1.0, 8192, None, 1.0, ())[0]


def _liger_scaled() -> Run:
    (function,) = _import(
        "liger_kernel.ops.fused_linear_scaled_cross_entropy", "LigerFusedLinearScaledCrossEntropyFunction"
    )
    return lambda hidden, weight, target: -function.apply(hidden, weight, target)


def _liger_fused() -> Run:
    (function,) = _import("liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    return lambda hidden, weight, target: -function.apply(
        hidden, weight, target, None, None, -100, 0.0, 0.0, "sum"
    )[0]  # fmt: skip


def _cce(exact: bool) -> Run:
    (function,) = _import("cut_cross_entropy", "linear_cross_entropy")
    options: dict[str, object] = {}
    if exact:
        named = "accum_e_fp32" in inspect.signature(function).parameters
        options = {"impl": "cce_exact"} if named else {"filter_eps": None}
    return lambda hidden, weight, target: -function(hidden, weight, target, reduction="none", **options)


def _quack() -> Run:
    (function,) = _import("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return lambda hidden, weight, target: -function(hidden, weight, target, reduction="sum")


# Products by chunk in CCE, TRL and torch's per-token form: 2 N V H forward, 6 with a frozen head, 8 with a trained one;
# in Liger's scaled form 8 with either. The limit that all are compared with is that of 2, 4 and 6.
HEADS = [
    Peer("mopl", lambda: linear_logprob),
    Peer("full logits", lambda: naive),
    Peer("full logits, upcast", lambda: naive_upcast),
    Peer("TRL chunked", _trl),
    Peer("CCE exact", lambda: _cce(True)),
    Peer("CCE (drops small gradients)", lambda: _cce(False)),
    Peer("Liger fused linear CE, sum", _liger_fused, per_token=False),
    Peer("torch linear_cross_entropy", lambda: _torch("none")),
    Peer("torch linear_cross_entropy, sum", lambda: _torch("sum"), per_token=False),
    Peer("Liger scaled CE", _liger_scaled, heavy=True),
    Peer("QuACK chunked, sum", _quack, per_token=False, heavy=True),
]


def _trl_logits() -> Run:
    (function,) = _import("trl.trainer.utils", "selective_log_softmax")
    return function  # its Triton kernel reads once forward, and reads and writes once backward, as ours does


def _liger_logits() -> Run:
    (function,) = _import("liger_kernel.ops.cross_entropy", "LigerCrossEntropyFunction")
    # It writes the gradient over the logits in the forward pass, so it gets a copy.
    return lambda logits, target: -function.apply(logits.clone(), target, None, -100, 0.0, 0.0, "none")[0]


def _flash_logits() -> Run:
    (function,) = _import("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss")
    return lambda logits, target: -function(logits, target)[0]


def _quack_logits() -> Run:
    (function,) = _import("quack.cross_entropy", "cross_entropy")
    return lambda logits, target: -function(logits, target, reduction="none")


def _in_place(logits: Tensor, target: Tensor) -> Tensor:
    return gathered_logprob(logits.view_as(logits), target, inplace_backward=True)


def _plain(logits: Tensor, target: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]


def _upcast(logits: Tensor, target: Tensor) -> Tensor:
    return -F.cross_entropy(logits.float(), target, reduction="none")


BOTH, BACKWARD = ("gathered-forward", "gathered"), ("gathered",)
LOGITS = [
    Peer("mopl", lambda: gathered_logprob, modes=BOTH),
    Peer("mopl, in place", lambda: _in_place, modes=BACKWARD),
    Peer("log_softmax, gather", lambda: _plain, modes=BOTH),
    Peer("F.cross_entropy, upcast", lambda: _upcast, modes=BOTH),
    Peer("TRL selective_log_softmax", _trl_logits, modes=BOTH),
    Peer("Liger CE, on a copy", _liger_logits, modes=BOTH),
    Peer("flash-attention CE", _flash_logits, modes=BOTH),
    Peer("QuACK CE", _quack_logits, modes=BOTH, heavy=True),
]


def peers(mode: str) -> list[Peer]:
    """Return who has a mode."""
    return [peer for peer in (*HEADS, *LOGITS) if mode in peer.modes]
