"""CLP on a tiny transformer whose 64 responses can be listed: every scope follows w, beside rewarded soups.

Two tokens of eight; each reward pays for one token, both pay less for a third. Values and gradients are sums over all
responses, so that nothing here is an estimate and the only chance is in the weights that are drawn.
"""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("moocore")

from mopl import reference_policy as exact
from mopl.conditioning import LoraMixture, ParameterMixture
from mopl.losses import policy_gradient
from mopl.pareto import hypervolume
from mopl.pareto.steerability import spearman
from mopl.steering import soup

ALPHA, TOKENS, LENGTH = 0.05, 8, 2
RESPONSES = torch.tensor(list(itertools.product(range(TOKENS), repeat=LENGTH)))
PROMPTS = torch.tensor([[1, 6]])
GRID = torch.stack([torch.linspace(0, 1, 11), torch.linspace(1, 0, 11)], 1)
SCOPES = {"full": 5e-3, "attention": 1e-2, "logits": 3e-2, "lora": 3e-2}  # and their learning rates


def base(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=TOKENS, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def rewards(y: Tensor) -> Tensor:
    """(B, 2): the shares of tokens 3 and 4, and 0.6 of the share of token 5 for both."""
    share = [(y == token).float().mean(-1) for token in (3, 4, 5)]
    return torch.stack([share[0] + 0.6 * share[2], share[1] + 0.6 * share[2]], -1)


def logprob(model: nn.Module, prompts: Tensor, y: Tensor, **weights) -> Tensor:
    """log π of the tokens of responses, (B, LENGTH)."""
    logits = model(input_ids=torch.cat([prompts, y], 1), **weights).logits[:, 1:-1]
    return logits.log_softmax(-1).gather(-1, y[..., None])[..., 0]


def everything(contexts: int) -> tuple[Tensor, Tensor]:
    """Prompts and responses, every response of each of `contexts` prompts in turn."""
    return PROMPTS.expand(contexts, -1).repeat_interleave(len(RESPONSES), 0), RESPONSES.repeat(contexts, 1)


def wrap(scope: str, seed: int) -> nn.Module:
    if scope != "lora":
        return ParameterMixture(base(seed), 2, scope=scope)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    return LoraMixture(base(seed), 2, config=peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)).eval()


def train(model: nn.Module, seed: int, steps: int, rate: float, fixed: Tensor | None = None) -> nn.Module:
    """Ascend V by its exact gradient: at one w for an expert, at two drawn ones a step for a conditional model."""
    reference, generator = base(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    contexts = 1 if fixed is not None else 2
    prompts, y = everything(contexts)
    with torch.no_grad():
        base_logprob = logprob(reference, prompts, y)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        if fixed is None:
            share = torch.rand(2, 1, generator=generator)
            w = torch.cat([share, 1 - share], 1).repeat_interleave(len(RESPONSES), 0)
            logp = logprob(model, prompts, y, weights=w)
        else:
            w = fixed
            logp = logprob(model, prompts, y)
        loss = policy_gradient(logp, rewards(y), w, kl_weight=ALPHA, reference=base_logprob, reduction="none").loss
        optimizer.zero_grad()
        (logp.detach().sum(-1).exp() * loss).sum().div(contexts).backward()
        optimizer.step()
    return model


@torch.no_grad()
def measure(at: list[nn.Module], seed: int) -> dict[str, Tensor]:
    """Mean rewards (11, 2), KL (11,) and regret (11,) of the plain models at the grid's weights."""
    prompts, y = everything(1)
    log_reference = logprob(base(seed), prompts, y).sum(-1).view(1, -1).double()
    gains = rewards(RESPONSES).T.double()
    result: dict[str, list[Tensor]] = {"rewards": [], "kl": [], "regret": [], "best": []}
    for model, w in zip(at, GRID.double(), strict=True):
        logp = logprob(model, prompts, y).sum(-1).view(1, -1).double()
        optimal = torch.stack([exact.optimal_log_policy(q, gains, w, ALPHA) for q in log_reference])
        result["rewards"].append((logp.exp() @ gains.T).mean(0))
        result["kl"].append(exact.kl(logp, log_reference).mean())
        result["regret"].append(ALPHA * exact.kl(logp, optimal).mean())
        result["best"].append((optimal.exp() @ gains.T).mean(0))
    return {name: torch.stack(each) for name, each in result.items()}


def regularised(figures: dict[str, Tensor]) -> Tensor:
    """(1 - α) R_j - α KL of each objective (11, 2): the vector whose weighted sum is V."""
    return (1 - ALPHA) * figures["rewards"] - ALPHA * figures["kl"][:, None]


def volume(points: Tensor) -> float:
    return hypervolume(points, [0.0, 0.0], maximise=True)


def soups(seed: int, steps: int) -> list[nn.Module]:
    experts = [train(base(seed), seed, steps, SCOPES["full"], fixed=e) for e in torch.eye(2)]
    states = [expert.state_dict() for expert in experts]
    models = []
    for w in GRID:
        model = copy.deepcopy(experts[0])
        model.load_state_dict(soup(states, w))
        models.append(model)
    return models


def compare(seed: int, steps: int) -> dict[str, dict[str, Tensor]]:
    """Figures of soups of two experts with `steps` updates each, and of every scope with as many in all."""
    figures = {"soup": measure(soups(seed, steps), seed)}
    for scope, rate in SCOPES.items():
        mixture = train(wrap(scope, seed), seed, 2 * steps, rate)
        figures[scope] = measure([mixture.merge(w) for w in GRID], seed)
    return figures


def follows(figures: dict[str, Tensor]) -> float:
    """The smaller Spearman correlation of a reward with its weight."""
    return min(spearman(figures["rewards"][:, j], GRID[:, j]) for j in range(2))


def row(figures: dict[str, Tensor]) -> list[float]:
    """Hypervolume of the rewards and of the regularised rewards, mean regret, Spearman."""
    volumes = [volume(figures["rewards"]), volume(regularised(figures))]
    return [*volumes, float(figures["regret"].mean()), follows(figures)]


@pytest.mark.slow
def test_every_scope_follows_the_weights_and_the_best_is_at_least_as_good_as_soups() -> None:
    figures = compare(seed=0, steps=25)
    report = {name: [round(x, 4) for x in row(each)] for name, each in figures.items()}
    of_soups = figures.pop("soup")
    assert all(follows(each) > 0.9 for each in figures.values()), report
    assert max(volume(regularised(f)) for f in figures.values()) >= volume(regularised(of_soups)), report
    assert min(f["regret"].mean() for f in figures.values()) < of_soups["regret"].mean(), report


if __name__ == "__main__":
    print("hypervolume of rewards and of regularised rewards, mean regret, Spearman; seeds 0, 1, 2")
    rows = [{name: row(each) for name, each in compare(seed, steps=25).items()} for seed in range(3)]
    for name in rows[0]:
        print(f"{name:10}", "   ".join(" ".join(f"{x:6.4f}" for x in each[name]) for each in rows), flush=True)
