"""Run by test_log_probabilities.py on two processes: verl's and NeMo-RL's shapes with a sharded vocabulary."""

import torch
import torch.distributed as dist
from ending import leave

from mopl.integrations import nemo_rl, verl

B, S, H, V = 3, 6, 8, 10
F64 = torch.float64


def same(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11, msg=lambda m: f"{what}: {m}")


def summed(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.clone()
    dist.all_reduce(gradient)
    return gradient


def plain(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logp = (hidden @ weight.T).log_softmax(-1)
    return logp.gather(-1, target[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def main() -> None:
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    torch.manual_seed(0)
    own = slice(rank * V // 2, (rank + 1) * V // 2)
    hidden, weight, target = torch.randn(B, S, H, dtype=F64), torch.randn(V, H, dtype=F64), torch.randint(V, (B, S))
    up, up_entropy = torch.randn(2, B, S, dtype=F64)
    whole = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]

    # verl: labels as they are predicted; what the ranks get for the hidden states adds up to the gradient.
    logp, entropy = plain(*whole, target)
    expected = torch.autograd.grad((up * logp).sum() + (up_entropy * entropy).sum(), whole)
    mine = [hidden.clone().requires_grad_(), weight[own].clone().requires_grad_()]
    found = verl.linear_cross_entropy(*mine, target, 1.0, "none", group)
    same(found[0].view(B, S), logp.detach(), "verl's log-probabilities")
    same(found[1].view(B, S), entropy.detach(), "verl's entropies")
    by = torch.autograd.grad((up.view(-1) * found[0]).sum() + (up_entropy.view(-1) * found[1]).sum(), mine)
    same(summed(by[0]), expected[0], "verl's gradient of the hidden states")
    same(by[1], expected[1][own], "verl's gradient of the head")

    # NeMo-RL shifts: (B, S - 1).
    logp, entropy = plain(whole[0][:, :-1], whole[1], target[:, 1:])
    value = (up[:, 1:] * logp).sum() + (up_entropy[:, 1:] * entropy).sum()
    expected = torch.autograd.grad(value, whole)
    positions = slice(rank * S // 2, (rank + 1) * S // 2)
    parts = [hidden.transpose(0, 1)[positions].clone().requires_grad_(), weight[own].clone().requires_grad_()]
    found = nemo_rl.from_parallel_hidden_states_to_logprobs(
        *parts, None, target, own.start, own.stop, group, chunk_size=2, return_entropy=True
    )
    same(found[0], logp.detach(), "log-probabilities from parallel hidden states")
    by = torch.autograd.grad((up[:, 1:] * found[0]).sum() + (up_entropy[:, 1:] * found[1]).sum(), parts)
    same(by[0], expected[0].transpose(0, 1)[positions], "gradient of this rank's hidden states")
    same(by[1], expected[1][own], "gradient of this rank's head")

    # From logits, at which a confident row keeps its digits; -100 is no token.
    scale = torch.tensor([1.0, 8.0, 30.0], dtype=F64)[:, None, None]
    logits = (scale * torch.randn(B, S, V, dtype=F64)).requires_grad_()
    target[0, 3] = -100
    keep = target[:, 1:] != -100
    logp = logits[:, :-1].log_softmax(-1).gather(-1, target[:, 1:, None].clamp(min=0))[..., 0]
    (expected_by,) = torch.autograd.grad((up[:, 1:] * logp)[keep].sum(), logits)
    shard = logits[..., own].detach().clone().requires_grad_()
    found = nemo_rl.from_parallel_logits_to_logprobs(shard, target, own.start, own.stop, group)
    same(found, torch.where(keep, logp, 0).detach(), "log-probabilities from parallel logits")
    ids = target[2, 1:, None]
    others = logits[2, :-1].detach().scatter(-1, ids, -torch.inf).logsumexp(-1)
    exact = -torch.logaddexp(others - logits[2, :-1].detach().gather(-1, ids)[:, 0], torch.zeros(S - 1, dtype=F64))
    torch.testing.assert_close(found[2], exact, rtol=1e-12, atol=0)
    (by_logits,) = torch.autograd.grad((up[:, 1:] * found).sum(), shard)
    same(by_logits, expected_by[..., own], "gradient of this rank's logits")
    silent = nemo_rl.from_parallel_logits_to_logprobs(shard, target, own.start, own.stop, group, inference_only=True)
    assert not silent.requires_grad
    same(silent, found.detach(), "without a graph")

    packed, ids = logits.detach()[:2].reshape(1, 2 * S, V), target[:2].reshape(1, -1)
    rows = nemo_rl.from_parallel_logits_to_logprobs_packed_sequences(
        packed[..., own], ids, torch.tensor([0, S, 2 * S]), S + 2, own.start, own.stop, group
    )
    same(rows[:, : S - 1], found[:2].detach(), "packed sequences")
    assert rows.shape == (2, S + 1) and rows[:, S - 1 :].eq(0).all()

    for bad, message in ((V, "outside the vocabulary"), (-1, "outside the vocabulary")):
        wrong = target.clone()
        wrong[1, 2] = bad
        try:
            nemo_rl.from_parallel_logits_to_logprobs(shard, wrong, own.start, own.stop, group)
        except ValueError as error:
            assert message in str(error)
        else:
            raise AssertionError(f"{bad} was taken for a token")
    try:
        nemo_rl.from_parallel_logits_to_logprobs(shard, target, 0, V // 2 + 1, group)
    except ValueError as error:
        assert "shards must be of one size" in str(error)
    else:
        raise AssertionError("another rank's shard was taken for this one's")
    if rank == 0:
        print("all shapes equal", flush=True)
    leave()


if __name__ == "__main__":
    main()
