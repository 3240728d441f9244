"""Whoever computes log-probabilities of tokens: mopl, plain PyTorch, and other libraries where they are installed.

A peer that is missing, or that is there but not for this machine, is listed with its reason and never stands in as
something else. FLOP are counted in products of N V H multiply-adds, two FLOP each, so "6" is logits, dX and dW once.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mopl.ops import gathered_logprob, linear_logprob
from mopl.ops._device import default_workspace

HEAD_FLOP = {"forward": 2, "frozen": 4, "trained": 6}


@dataclass(frozen=True)
class Peer:
    """One implementation.

    Args:
        name: as tables print it.
        run: for a head (hidden, weight, target) -> log p (N,), or their sum; from logits (logits, target) -> log p.
        per_token: false if it can only give a sum, so that its gradients cannot serve any other upstream.
        flop: products by mode (see the module's docstring); from logits: bytes a logit forward and backward.
        modes: the modes that it has.
    """

    name: str
    run: Callable[..., Tensor]
    per_token: bool = True
    flop: dict[str, float] = field(default_factory=lambda: dict(HEAD_FLOP))
    modes: tuple[str, ...] = ("forward", "frozen", "trained")


Found = tuple[list[Peer], dict[str, str]]  # the peers, and the reason for each absent one


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


def mopl_flop(rows: int, vocabulary: int, itemsize: int, workspace: int | None, on_gpu: bool) -> dict[str, float]:
    """Return mopl's own products: rows beyond the workspace are multiplied again in the backward pass."""
    row = vocabulary * (itemsize if on_gpu else 4)
    if workspace is None:
        workspace = default_workspace(torch.device("cuda" if on_gpu else "cpu"), rows * row)
    fit = workspace // row
    kept = min(rows if on_gpu else (rows + 1) // 2, fit)
    return {**HEAD_FLOP, "trained": 6 + 2 * (1 - kept / rows)}


def _torch() -> list[Peer]:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy")

    def options(**chosen: object):
        return torch.nn.LinearCrossEntropyOptions(**chosen)  # type: ignore[arg-type]

    def per_token(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -F.linear_cross_entropy(hidden, weight, target, reduction="none", options=options())

    def total(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -F.linear_cross_entropy(hidden, weight, target, reduction="sum", options=options())

    recompute = {"forward": 2, "frozen": 6, "trained": 8}
    return [
        Peer("torch linear_cross_entropy", per_token, flop=recompute),
        Peer("torch linear_cross_entropy, sum", total, per_token=False),
    ]


def _trl() -> list[Peer]:
    (function,) = _import("trl.kernels.chunked_logprob", "ChunkedLogProbFunction")

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return function.apply(hidden, weight, None, target, 1.0, 8192, None, 1.0, ())[0]

    return [Peer("TRL chunked", run, flop={"forward": 2, "frozen": 6, "trained": 8})]


def _liger_scaled() -> list[Peer]:
    (function,) = _import(
        "liger_kernel.ops.fused_linear_scaled_cross_entropy", "LigerFusedLinearScaledCrossEntropyFunction"
    )

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -function.apply(hidden, weight, target)

    return [Peer("Liger scaled CE", run, flop={"forward": 2, "frozen": 8, "trained": 8})]


def _liger_fused() -> list[Peer]:
    (function,) = _import("liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -function.apply(hidden, weight, target, None, None, -100, 0.0, 0.0, "sum")[0]

    return [Peer("Liger fused linear CE, sum", run, per_token=False)]


def _cce() -> list[Peer]:
    (function,) = _import("cut_cross_entropy", "linear_cross_entropy")
    exact = {"impl": "cce_exact"} if "accum_e_fp32" in inspect.signature(function).parameters else {"filter_eps": None}

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -function(hidden, weight, target, reduction="none")

    def run_exact(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -function(hidden, weight, target, reduction="none", **exact)

    flop = {"forward": 2, "frozen": 6, "trained": 8}
    return [Peer("CCE (drops small gradients)", run, flop=flop), Peer("CCE exact", run_exact, flop=flop)]


def _quack() -> list[Peer]:
    (function,) = _import("quack.linear_cross_entropy", "chunked_linear_cross_entropy")

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -function(hidden, weight, target, reduction="sum")

    return [Peer("QuACK chunked, sum", run, per_token=False)]


def head_peers(rows: int, vocabulary: int, itemsize: int, on_gpu: bool, workspace: int | None = None) -> Found:
    """Return who turns hidden states into log-probabilities."""

    def ours(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return linear_logprob(hidden, weight, target, workspace=workspace)

    flop = mopl_flop(rows, vocabulary, itemsize, workspace, on_gpu)
    peers = [Peer("mopl", ours, flop=flop), Peer("full logits", naive), Peer("full logits, upcast", naive_upcast)]
    absent = {}
    for name, find in {
        "torch linear_cross_entropy": _torch,
        "TRL": _trl,
        "Liger scaled CE": _liger_scaled,
        "Liger fused linear CE": _liger_fused,
        "CCE": _cce,
        "QuACK": _quack,
    }.items():
        try:
            peers += find()
        except ImportError as error:
            absent[name] = str(error)
    return peers, absent


def _trl_logits() -> list[Peer]:
    (function,) = _import("trl.trainer.utils", "selective_log_softmax")
    # Its Triton kernel reads once forward, and reads and writes once backward, as ours does.
    return [Peer("TRL selective_log_softmax", function)]


def _liger_logits() -> list[Peer]:
    (function,) = _import("liger_kernel.ops.cross_entropy", "LigerCrossEntropyFunction")

    def run(logits: Tensor, target: Tensor) -> Tensor:
        # It writes the gradient over the logits in the forward pass, so it gets a copy.
        return -function.apply(logits.clone(), target, None, -100, 0.0, 0.0, "none")[0]

    return [Peer("Liger CE, on a copy", run)]


def _flash_logits() -> list[Peer]:
    (function,) = _import("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss")

    def run(logits: Tensor, target: Tensor) -> Tensor:
        return -function(logits, target)[0]

    return [Peer("flash-attention CE", run)]


def _quack_logits() -> list[Peer]:
    (function,) = _import("quack.cross_entropy", "cross_entropy")

    def run(logits: Tensor, target: Tensor) -> Tensor:
        return -function(logits, target, reduction="none")

    return [Peer("QuACK CE", run)]


def logit_peers() -> Found:
    """Return who turns logits into log-probabilities."""

    def in_place(logits: Tensor, target: Tensor) -> Tensor:
        return gathered_logprob(logits.view_as(logits), target, inplace_backward=True)

    def plain(logits: Tensor, target: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]

    def upcast(logits: Tensor, target: Tensor) -> Tensor:
        return -F.cross_entropy(logits.float(), target, reduction="none")

    peers = [
        Peer("mopl", gathered_logprob),
        Peer("mopl, in place", in_place),
        Peer("log_softmax, gather", plain),
        Peer("F.cross_entropy, upcast", upcast),
    ]
    absent = {}
    for name, find in {
        "TRL": _trl_logits,
        "Liger CE": _liger_logits,
        "flash-attention": _flash_logits,
        "QuACK CE": _quack_logits,
    }.items():
        try:
            peers += find()
        except ImportError as error:
            absent[name] = str(error)
    return peers, absent
