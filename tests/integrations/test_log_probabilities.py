"""Functions in the shapes of verl, OpenRLHF and NeMo-RL, beside plain formulas in float64 and, where installed, theirs.

The packages are read from their files, never imported: they need GPUs' libraries.
"""

import ast
import importlib.util
import itertools
import os
import types
from pathlib import Path
from typing import Optional, Union

import pytest
import torch
import torch.nn.functional as F
from launching import DISTRIBUTED, launch
from torch import Tensor, nn

from mopl.integrations import nemo_rl, openrlhf, verl

B, T, H, V = 3, 7, 16, 23
F64 = torch.float64


def source_of(package: str, file: str) -> str:
    """Return a file of an installed package, without importing it."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    path = Path(next(iter(found.submodule_search_locations)), file)
    if not path.is_file():
        pytest.skip(f"{package} has no {file}: another version than the one this was written for")
    return path.read_text(encoding="utf-8")


def functions_of(package: str, file: str, names: set[str]) -> types.SimpleNamespace:
    """Run some functions and classes of a file, and nothing else of it."""
    tree = ast.parse(source_of(package, file))
    wanted = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in names]
    for node in wanted:
        node.decorator_list = []  # of torch.compile
    space: dict = {"torch": torch, "F": F, "nn": nn, "os": os, "Optional": Optional, "Union": Union}
    space |= {"FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE": False, "NPU_CROSS_ENTROPY_LOSS_AVAILABLE": False}
    space |= {"_FLASH_ATTN_CROSS_ENTROPY_AVAILABLE": False, "_LIGER_FUSED_LINEAR_SCALED_CROSS_ENTROPY": None}
    exec(compile(ast.Module(wanted, []), file, "exec"), space)
    return types.SimpleNamespace(**{name: space[name] for name in names})


def problem(dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(B, T, H, dtype=F64).to(dtype).requires_grad_()
    return hidden, torch.randn(V, H, dtype=F64).to(dtype).requires_grad_(), torch.randint(V, (B, T))


def plain(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logp = logits.log_softmax(-1)
    return logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def agree(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], leaves: list[Tensor], close: float = 1e-11) -> None:
    """Compare values, and gradients for random upstream gradients."""
    upstream = [torch.randn(value.shape, dtype=F64) for value in expected]
    gradients = []
    for values in (found, expected):
        total = sum((value.to(F64) * up).sum() for value, up in zip(values, upstream, strict=True))
        gradients.append(torch.autograd.grad(total, leaves, retain_graph=True))
    for actual, wanted in zip((*found, *gradients[0]), (*expected, *gradients[1]), strict=True):
        torch.testing.assert_close(actual.to(F64), wanted.to(F64), rtol=close, atol=close)


# ---------------------------------------------------------------- verl


@pytest.mark.parametrize("temperature", [1.0, 0.7, "rows"])
def test_verls_fused_linear_gives_log_probabilities_and_entropies_with_gradients(temperature) -> None:
    hidden, weight, labels = problem()
    divisor = torch.rand(B, T, dtype=F64) + 0.5 if temperature == "rows" else temperature
    spread = divisor[..., None] if isinstance(divisor, Tensor) else divisor
    expected = plain(hidden @ weight.T / spread, labels)
    found = verl.FusedLinearForPPO(chunk_size=4).forward(
        hidden_states=hidden, vocab_weights=weight, input_ids=labels.int(), temperature=divisor
    )
    assert found[0].shape == found[1].shape == labels.shape
    agree(found, expected, [hidden, weight])
    flat = verl.linear_cross_entropy(hidden, weight, labels, divisor, "none", None)
    assert flat[0].shape == flat[1].shape == (B * T,)
    agree(flat, tuple(part.reshape(-1) for part in expected), [hidden, weight])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_verls_reduction_is_of_log_probabilities_alone(reduction) -> None:
    hidden, weight, labels = problem()
    logp, entropy = plain(hidden @ weight.T, labels)
    expected = (logp.sum() if reduction == "sum" else logp.mean()), entropy.reshape(-1)
    agree(verl.linear_cross_entropy(hidden, weight, labels, 1.0, reduction), expected, [hidden, weight])


def test_sixteen_bit_operands_give_results_in_float32() -> None:
    hidden, weight, labels = problem(torch.bfloat16)
    expected = plain(hidden.to(F64) @ weight.to(F64).T, labels)
    for found in (
        verl.FusedLinearForPPO()(hidden, weight, labels),
        verl.linear_cross_entropy(hidden, weight, labels),
    ):
        for actual, wanted in zip(found, expected, strict=True):
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual.view(B, T).to(F64), wanted, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(found[0].sum() + found[1].sum(), (hidden, weight))
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients)


def test_what_is_no_token_counts_for_nothing() -> None:
    hidden, weight, labels = problem()
    labels[1, 2:] = -100
    for logprob, entropy in (
        verl.FusedLinearForPPO()(hidden, weight, labels),
        [part.view(B, T) for part in verl.linear_cross_entropy(hidden, weight, labels)],
    ):
        assert logprob[1, 2:].eq(0).all() and entropy[1, 2:].eq(0).all() and logprob[1, :2].lt(0).all()
        (by,) = torch.autograd.grad(logprob.sum() + entropy.sum(), hidden)
        assert by[1, 2:].eq(0).all() and by[1, :2].abs().sum() > 0
    logits = torch.randn(B, T, V)
    for function in (verl.logprobs_from_logits, openrlhf.log_probs_from_logits):
        assert function(logits, labels)[1, 2:].eq(0).all()
        with pytest.raises(ValueError, match="vocabulary"):
            function(logits, torch.full_like(labels, V))


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_functions_of_logits(dtype) -> None:
    labels = torch.randint(V, (B, T))
    logits = (3 * torch.randn(B, T, V)).to(dtype).requires_grad_()
    kept = logits.detach().clone()
    close = {F64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]  # a bfloat16 gradient is rounded once
    expected = plain(logits.to(F64), labels)
    agree((verl.logprobs_from_logits(logits, labels, inplace_backward=False),), expected[:1], [logits], close)
    agree((verl.entropy_from_logits(logits),), expected[1:], [logits], close)
    agree((openrlhf.log_probs_from_logits(logits, labels),), expected[:1], [logits], close)
    agree((openrlhf.compute_entropy(logits),), expected[1:], [logits], close)
    warm = plain(logits.to(F64) / 0.6, labels)[:1]
    agree((openrlhf.log_probs_from_logits(logits, labels, 0.6),), warm, [logits], close)
    assert torch.equal(logits.detach(), kept), "nothing is divided in place"
    assert openrlhf.log_probs_from_logits(logits, labels).dtype == (F64 if dtype == F64 else torch.float32)


def test_verls_logits_may_be_overwritten_by_their_gradient() -> None:
    leaf = torch.randn(B, T, V, requires_grad=True)
    logits = leaf * 1
    verl.logprobs_from_logits(logits, torch.randint(V, (B, T))).sum().backward()
    assert torch.equal(logits.detach(), leaf.grad)


# ---------------------------------------------------------------- their own functions, where they are


def test_against_verls_own_functions() -> None:
    fused = {"_fused_linear_for_ppo_fwd", "_fused_linear_for_ppo_bwd", "FusedLinearForPPOFunction", "FusedLinearForPPO"}
    own = functions_of("verl", "utils/experimental/torch_functional.py", fused)
    hidden, weight, labels = problem(torch.float32)
    for temperature in (1.0, 0.7):
        expected = own.FusedLinearForPPO(chunk_size=5)(hidden, weight, labels, temperature)
        agree(verl.FusedLinearForPPO()(hidden, weight, labels, temperature), expected, [hidden, weight], 2e-4)
    plain_ones = {"logprobs_from_logits", "logprobs_from_logits_v2", "entropy_from_logits"}
    own = functions_of("verl", "utils/torch_functional.py", plain_ones)
    logits = torch.randn(B, T, V, requires_grad=True)
    expected = (own.logprobs_from_logits(logits, labels), own.entropy_from_logits(logits))
    found = (verl.logprobs_from_logits(logits, labels, inplace_backward=False), verl.entropy_from_logits(logits))
    agree(found, expected, [logits], 1e-4)


def test_against_openrlhfs_own_functions() -> None:
    names = {"log_probs_from_logits", "_logsumexp_by_chunk", "compute_entropy"}
    own = functions_of("openrlhf", "models/utils.py", names)
    logits, labels = torch.randn(B, T, V, requires_grad=True), torch.randint(V, (B, T))
    for temperature in (1.0, 0.7):
        expected = own.log_probs_from_logits(logits * 1, labels, temperature)
        agree((openrlhf.log_probs_from_logits(logits, labels, temperature),), (expected,), [logits], 1e-4)
    agree((openrlhf.compute_entropy(logits),), (own.compute_entropy(logits),), [logits], 1e-4)


# ---------------------------------------------------------------- OpenRLHF's Actor


@pytest.fixture(scope="module")
def actor():
    pytest.importorskip("transformers")
    from tiny_language_models import build

    from mopl.language_models import fuse

    class Actor(nn.Module):
        """What OpenRLHF's has of its own, without DeepSpeed."""

        forward = openrlhf.actor_forward

        def __init__(self) -> None:
            super().__init__()
            self.model, self.temperature, self.packing_samples = fuse(build("llama").eval()), 0.8, False

    return Actor()


def by_logits(actor, sequences: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies (B, T - 1) as `Actor.forward` of 0.11.2 computes them."""
    positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 1)
    logits = actor.model(sequences, attention_mask=mask, position_ids=positions).logits.double() / actor.temperature
    found = plain(logits, torch.roll(sequences, -1, 1))
    return found[0][:, :-1], found[1][:, :-1]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Return sequences (3, 9) padded on both sides as rollouts are, their mask, and the mask of the last 4 actions."""
    mask = torch.tensor([[1] * 9, [0, 0, 1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1, 0]])
    sequences = torch.randint(6, 50, (3, 9)).masked_fill(mask == 0, 0)
    return sequences, mask, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])


@pytest.mark.parametrize("packing", [False, True])
def test_the_actor_returns_what_openrlhfs_computes_from_logits(actor, batch, packing) -> None:
    sequences, mask, action_mask = batch
    expected, entropy = by_logits(actor, sequences, mask)
    expected = expected[:, -4:] * action_mask
    actor.packing_samples = packing
    found, output = actor(
        sequences, action_mask, attention_mask=mask, return_output=True, return_entropy=True, packed_seq_lens=None
    )
    assert found.shape == (3, 4) and output.entropy.shape == (3, 8) and output.logits is None
    kept = action_mask.bool()
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(output.entropy[:, -4:][kept].double(), entropy[:, -4:][kept], rtol=2e-5, atol=2e-5)
    assert output.entropy[:, -4:][~kept].eq(0).all() and output.entropy[:, :4].eq(0).all()
    up = torch.randn(3, 4)
    weights = [actor.model.get_output_embeddings().weight, actor.model.model.layers[0].mlp.up_proj.weight]
    mine = torch.autograd.grad((up * found).sum() - output.entropy.sum(), weights)
    theirs = torch.autograd.grad((up * expected).sum() - (entropy[:, -4:] * action_mask).sum(), weights)
    for actual, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("packing", [False, True])
def test_the_actor_returns_all_positions_for_other_trainers(actor, batch, packing) -> None:
    sequences, mask, _ = batch
    actor.packing_samples = packing
    found = actor(sequences, attention_mask=mask, return_logprobs=True)
    inside = (mask[:, :-1] * mask[:, 1:]).bool()
    expected = by_logits(actor, sequences, mask)[0]
    torch.testing.assert_close(found[inside].double(), expected[inside], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "asks for logits"),
        ({"return_logprobs": True, "allgather_logits": True}, "allgather_logits"),
        ({"return_logprobs": True, "pixel_values": torch.ones(1)}, "images"),
        ({"return_logprobs": True, "return_entropy": True}, "return_output=True"),
        ({"action_mask": torch.ones(3, 9)}, r"action_mask has shape \(3, 9\)"),
        ({"return_logprobs": True, "attention_mask": torch.ones(3, 8)}, r"attention_mask has shape \(3, 8\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_needs_logits_is_refused_by_the_actor(actor, batch, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        actor(batch[0], **options)


def test_an_actor_whose_model_is_not_fused_is_told(actor, batch) -> None:
    other = type(actor)()
    other.model.forward = lambda *_, **__: None
    with pytest.raises(TypeError, match="fuse"):
        other(batch[0], batch[2])


# ---------------------------------------------------------------- NeMo-RL


def test_nemo_rl_shifts_targets_itself() -> None:
    hidden, weight, target = problem()
    logits = hidden @ weight.T
    expected = plain(logits[:, :-1], target[:, 1:])
    agree((nemo_rl.from_parallel_logits_to_logprobs(logits, target, 0, V, None),), expected[:1], [hidden, weight])
    found = nemo_rl.from_parallel_hidden_states_to_logprobs(
        hidden.transpose(0, 1), weight, None, target, 0, V, None, chunk_size=3, return_entropy=True
    )
    agree(found, expected, [hidden, weight])
    warm = nemo_rl.from_parallel_hidden_states_to_logprobs(
        hidden.transpose(0, 1), weight, None, target, 0, V, None, temperature=0.7
    )
    agree((warm,), plain(logits[:, :-1] / 0.7, target[:, 1:])[:1], [hidden, weight])
    unshifted = nemo_rl.from_parallel_logits_to_logprobs(logits, target, 0, V, None, shift_targets=False)
    agree((unshifted,), plain(logits, target)[:1], [hidden, weight])
    longer = torch.cat([logits, torch.full((B, 2, V), torch.nan)], 1)  # padded for context parallelism
    found = nemo_rl.from_parallel_logits_to_logprobs(longer, target, 0, V, None)
    torch.testing.assert_close(found, expected[0])
    without = nemo_rl.from_parallel_logits_to_logprobs(logits, target, 0, V, None, inference_only=True)
    assert not without.requires_grad


def test_nemo_rl_unpacks_sequences_and_shifts_each() -> None:
    bounds = [0, 4, 4, 5, 12]  # sequences of 4, 0, 1 and 7 tokens
    logits, target = torch.randn(1, 12, V, dtype=F64, requires_grad=True), torch.randint(V, (1, 12))
    function = nemo_rl.from_parallel_logits_to_logprobs_packed_sequences
    found = function(logits, target, torch.tensor(bounds), 6, 0, V, None)
    expected = torch.zeros(4, 5, dtype=F64)
    for row, (start, end) in enumerate(itertools.pairwise(bounds)):
        count = min(max(end - start - 1, 0), 5)
        logp = logits[0, start : start + count].log_softmax(-1)
        expected[row, :count] = logp.gather(-1, target[0, start + 1 : start + 1 + count, None])[:, 0]
    agree((found,), (expected,), [logits])
    rolled = torch.cat([target[0, a:b].roll(-1) for a, b in itertools.pairwise(bounds)])[None]
    again = function(logits, rolled, torch.tensor(bounds), 6, 0, V, None, target_is_pre_rolled=True)
    assert torch.equal(again, found)


@pytest.mark.parametrize("bounds", [[0, 7, 4, 9], [-3, 4, 9], [0, 4, 12]])
def test_nemo_rl_bounds_that_are_none_of_the_row_are_refused(bounds) -> None:
    function = nemo_rl.from_parallel_logits_to_logprobs_packed_sequences
    given = torch.randn(1, 9, V), torch.randint(V, (1, 9))
    with pytest.raises(ValueError, match=r"must rise from 0 or more to at most 9"):
        function(*given, torch.tensor(bounds), 5, 0, V, None)
    with pytest.raises(ValueError, match="unpacked_seqlen is 0"):
        function(*given, torch.tensor([0, 9]), 0, 0, V, None)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"vocab_end_index": V - 1}, "vocab_start_index and vocab_end_index are 0 and 22"),
        ({"sampling_params": types.SimpleNamespace(top_k=5, top_p=1.0)}, "top_k=5"),
        ({"sampling_params": types.SimpleNamespace(top_k=None, top_p=0.9)}, "top_p=0.9"),
    ],
    ids=["shard", "top_k", "top_p"],
)
def test_what_nemo_rl_has_and_this_has_not_is_refused(options, message) -> None:
    given = {"vocab_start_index": 0, "vocab_end_index": V, "tp_group": None} | options
    with pytest.raises(ValueError, match=message):
        nemo_rl.from_parallel_logits_to_logprobs(torch.randn(B, T, V), torch.randint(V, (B, T)), **given)


@pytest.mark.distributed
def test_a_sharded_vocabulary_gives_what_the_whole_one_gives() -> None:
    done = launch(2, str(DISTRIBUTED / "parallel_logprobs.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all shapes equal" in done.stdout
