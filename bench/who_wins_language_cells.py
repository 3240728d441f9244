"""What `bench.who_wins_language` trains: a tiny causal language model on generated preferences of known truth.

The model answers eight prompts with two tokens of eight, so all 64 answers to a prompt can be listed: expected rewards,
the KL to the reference and the policies that are best at each trade-off are sums over them. An objective is a reward
r_j(x, y): a part of the tokens of y, whose sign is opposite for the two objectives, and a part that depends on the
prompt. `spread` is its standard deviation over the answers, the sharpness of the labels: of a list of answers, drawn
from the reference, an objective prefers one, drawn from p_j = softmax(r_j) over the list. `conflict` c is the share of
its own in the variance of r_j; the rest both objectives share. So two rewards have a correlation of about 1 - 1.64 c.

A list's expected loss under w is least where softmax(β (s - s0)) = sum_j w_j p_j. The KL-regularised reward
E[w·r] - β KL is greatest at π* ∝ π0 exp(w·r / β). At the ends of the simplex these are the same policy.

Every method of a cell has the same data, batches and **total** number of optimizer steps, cut evenly between its
models, as in `bench.who_wins_cells`. Models, losses, sampling and optimizer are those of `mopl align`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from bench.who_wins_cells import Cell, shared_out
from mopl import reference_policy as exact
from mopl import steering
from mopl.alignment import AlignConfig, tuned
from mopl.alignment.evaluate import REFERENCE_FACTOR
from mopl.alignment.methods import AlignSource, scored_for
from mopl.conditioning.hyper_prompt import PREFIX_STD
from mopl.conditioning.samplers import dirichlet_weights, fixed
from mopl.experiments.cos_dpo import Score, Scored, StepBatch, modpo_loss, scalarized_loss, vertices
from mopl.experiments.methods import Method
from mopl.experiments.response_loss import ResponseLoss
from mopl.language_models import models
from mopl.language_models.collate import ListCollator
from mopl.language_models.head import fuse
from mopl.language_models.scoring import ListScores, score_lists
from mopl.language_models.tokenization import TokenizedList
from mopl.pareto import hypervolume, weight_grid
from mopl.training import train
from mopl.training.optimizer import adamw

CONDITIONED = ("lora-mixture", "hyper-prompt")  # by their names in `mopl align --conditioning`
RIVALS = ("dpo-ls", "dpo-soup", "mo-dpo")
METHODS = (*CONDITIONED, *RIVALS)
INFLUENCE = "hyper-prompt, w counts at once"  # the variant of issue 18, in some cells alone
TOKENS, LENGTH = 8, 2
ANSWERS = torch.tensor(list(itertools.product(range(TOKENS), repeat=LENGTH)))  # (Y, 2)
NAMES = ("first", "second")
OPPOSED, OWN = 0.8, 0.6  # parts of a reward that oppose, and that are its own; their squares sum to 1


@dataclass(frozen=True)
class Sizes:
    """What all cells share."""

    points: int = 5
    prompts: int = 8
    train_lists: int = 600
    test_lists: int = 400
    answers: int = 4  # of a list
    hidden: int = 32
    layers: int = 1
    batch: int = 16
    base_steps: int = 300
    steps: int = 60  # the budget 1: of all models of a method together
    lora_rank: int = 4
    virtual_tokens: int = 2  # of the hyper prompt; as many as a prompt has tokens
    warmup: float = 0.1  # of the steps of each model


BETA = 0.5


@dataclass(frozen=True)
class Trial:
    """How a conditioned model is trained otherwise than in the map; see `bench.who_wins_language_tried`."""

    concentration: float | None = None  # of the weights; None: that of `mopl align`
    balanced: bool = False  # weights of a step are drawn in turns of each other
    alone: bool = False  # each list counts at each objective alone, too, in a pass for each of these


def also_alone(score: Score) -> Score:
    """Return what scores a batch at its weights, and in m more passes at each objective alone."""

    def scored(model: nn.Module, batch: StepBatch) -> Scored:
        count, m = batch.weights.shape
        ends = [row.expand(count, m) for row in torch.eye(m)]
        alone = torch.stack([score(model, dataclasses.replace(batch, weights=w)).scores for w in ends], 1)
        return dataclasses.replace(score(model, batch), alone=alone)

    return scored


@functools.lru_cache(maxsize=1)  # all spreads and conflicts of a seed have the same
def base_model(sizes: Sizes, seed: int, prompts: tuple[tuple[int, ...], ...]) -> Any:
    """Return a random model that says with meaningless tokens in front what it says without; it is frozen and fused.

    Language models overlook such tokens by and large. A random model attends to all positions alike: untrained virtual
    tokens take it 2 nats away from the reference, which only methods that have them would need to make good.
    """
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=TOKENS, hidden_size=sizes.hidden, intermediate_size=2 * sizes.hidden,
        num_hidden_layers=sizes.layers, num_attention_heads=2, initializer_range=0.2, pad_token_id=0, bos_token_id=1,
        eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    first = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    k, count, all_prompts = sizes.virtual_tokens, 64, torch.tensor(prompts)
    for _ in range(sizes.base_steps):
        asked, said = torch.randint(len(prompts), (count,)), torch.randint(len(ANSWERS), (count,))
        ids = torch.cat([all_prompts[asked], ANSWERS[said]], 1)
        wanted = first(input_ids=ids).logits.softmax(-1)
        noise = PREFIX_STD * torch.randn(count, k, sizes.hidden)
        behind = model(inputs_embeds=torch.cat([noise, model.model.embed_tokens(ids)], 1)).logits[:, k:]
        both = (model(input_ids=ids).logits, behind)
        loss = -sum((wanted * logits.log_softmax(-1))[:, 1:-1].sum(-1).mean() for logits in both)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return fuse(model.requires_grad_(False))


class Problem:
    """Rewards, lists, reference and optimum of one spread, conflict and seed; all budgets and methods share them."""

    def __init__(self, spread: float, conflict: float, seed: int, sizes: Sizes) -> None:
        self.sizes, self.seed, self.trial = sizes, seed, Trial()
        self.random = np.random.default_rng([seed, 1])
        self.rewards = spread * _rewards(np.random.default_rng([seed, 2]), sizes.prompts, conflict)  # (P, Y, m)
        self.grid = weight_grid(2, sizes.points)
        self.beta = torch.full((2,), BETA)
        pairs = np.array(list(itertools.product(range(TOKENS), repeat=2)))
        self.prompts = pairs[self.random.permutation(len(pairs))[: sizes.prompts]]
        self.every = [
            TokenizedList(prompt, tuple(ANSWERS.numpy()), np.zeros((2, len(ANSWERS)), np.float32), number)
            for number, prompt in enumerate(self.prompts)
        ]
        self.base = base_model(sizes, seed, tuple(map(tuple, self.prompts.tolist())))
        self.reference = self.policy_of(self.base)  # (P, Y) log-probabilities
        self.train, _, self.train_reference = self._lists(sizes.train_lists)
        _, self.test, _ = self._lists(sizes.test_lists)
        self.untouched = self._losses(self.reference)
        self.best_losses = torch.stack([self._least_losses(w) for w in self.grid])
        self.best_values = torch.stack([self._values(self._best_policy(w)) for w in self.grid])
        self.best_rewards = torch.stack([self._mean_rewards(self._best_policy(w)) for w in self.grid])
        start = self._mean_rewards(self.reference)
        self.corners = {}
        for name, best in (("values", self.best_values), ("rewards", self.best_rewards)):
            # Below the reference and every optimal policy: a corner at one of them would hide a part of the front.
            least, most = torch.cat([best, start[None]]).aminmax(dim=0)
            self.corners[name] = (least - 0.1 * (most - least)).tolist()

    def _lists(self, count: int) -> tuple[list[TokenizedList], tuple[Tensor, Tensor], ListScores]:
        """Return lists with drawn labels, what they consist of (prompts (Q,), answers (Q, K)), and their reference."""
        prompts = self.random.integers(0, self.sizes.prompts, count)
        answers = np.stack([
            self.random.choice(len(ANSWERS), self.sizes.answers, False, p=_shares(self.reference[x])) for x in prompts
        ])  # fmt: skip
        lists = []
        for number, (x, chosen) in enumerate(zip(prompts, answers, strict=True)):
            labels = np.zeros((2, self.sizes.answers), np.float32)
            for j in range(2):
                shares = _shares(self.rewards[x, chosen, j].log_softmax(0))
                labels[j, self.random.choice(self.sizes.answers, p=shares)] = 1.0
            lists.append(TokenizedList(self.prompts[x], tuple(ANSWERS[chosen].numpy()), labels, number))
        of = torch.from_numpy(prompts), torch.from_numpy(answers)
        return lists, of, ListScores(lists, self.reference[of[0][:, None], of[1]].flatten())

    @torch.no_grad()
    def policy_of(self, model: Any, weights: Tensor | None = None) -> Tensor:
        """Return log π (P, Y) of all answers to all prompts, of a plain model or of one at weights (m,)."""
        w = None if weights is None else weights.float()
        return score_lists(model, self.every, weights=w).view(len(self.every), -1)

    # ------------------------------------------------------------ the truth

    def _true_shares(self) -> Tensor:
        """Return p_j (Q, m, K) of the test lists."""
        prompts, answers = self.test
        return self.rewards[prompts[:, None], answers].movedim(-1, 1).log_softmax(-1).exp()

    def _losses(self, policy: Tensor) -> Tensor:
        """Return the expected loss (m,) of a policy (P, Y) on the test lists."""
        prompts, answers = self.test
        shift = (policy - self.reference)[prompts[:, None], answers].double()
        return -(self._true_shares() * (BETA * shift).log_softmax(-1)[:, None]).sum(-1).mean(0)

    def _least_losses(self, w: Tensor) -> Tensor:
        shares = self._true_shares()
        mixed = torch.einsum("j,qjk->qk", w.double(), shares)
        return -(shares * mixed.log()[:, None]).sum(-1).mean(0)

    def _best_policy(self, w: Tensor) -> Tensor:
        return (self.reference.double() + self.rewards @ w.double() / BETA).log_softmax(-1)

    def _mean_rewards(self, policy: Tensor) -> Tensor:
        """Return E[r_j] (m,), mean over prompts."""
        return torch.einsum("py,pyj->j", policy.double().exp(), self.rewards) / len(self.prompts)

    def _values(self, policy: Tensor) -> Tensor:
        """Return E[r_j] - β KL (m,), mean over prompts."""
        return self._mean_rewards(policy) - BETA * exact.kl(policy.double(), self.reference.double()).mean()

    # ------------------------------------------------------------ trainings

    def config(self, rate: float, conditioning: str) -> AlignConfig:
        """Return the settings of `mopl align` that a model is made with."""
        return AlignConfig(
            "model", "data", conditioning=conditioning, beta=(BETA,), learning_rate=rate, seed=self.seed,
            lora_rank=self.sizes.lora_rank, lora_alpha=2.0 * self.sizes.lora_rank, lists_per_batch=self.sizes.batch,
            virtual_tokens=self.sizes.virtual_tokens, prompt_rank=min(2, self.sizes.virtual_tokens),
        )  # type: ignore[arg-type]  # fmt: skip

    def fit(
        self,
        steps: int,
        rate: float,
        weights: Tensor | None = None,
        *,
        conditioning: str = "hyper-prompt",
        experts: list[ListScores] | None = None,
        start: Callable[[nn.Module], None] | None = None,
    ) -> Any:
        """Train one model: for weights (m,), by MO-DPO if scores of experts are given; or conditioned."""
        config, batch = self.config(rate, conditioning), self.sizes.batch
        torch.manual_seed(self.seed)  # every model of a kind starts from the same parameters
        if weights is None:
            model = tuned.new_model(self.base, config, NAMES, Method(conditioned=True))
        else:  # without the virtual tokens that baselines of `mopl align` have: that makes a stronger rival
            model = models.with_adapter(self.base, config)
        if start is not None:
            start(model)
        loss = ResponseLoss(labels=("l1", "l1"))
        if experts is None:
            score = scored_for(loss)
            if weights is None and self.trial.alone:
                score = also_alone(score)
            step_loss = scalarized_loss(score, loss, NAMES, common_beta=BETA)
        else:
            assert weights is not None
            anchor = int(weights.argmax())
            step_loss = modpo_loss(scored_for(loss), loss, anchor, NAMES[anchor])
        if weights is None:
            sampler = dirichlet_weights(
                2, batch, concentration=self.trial.concentration or config.concentration, per=config.weights_per,
                seed=self.seed, balanced=self.trial.balanced,
            )  # fmt: skip
        else:
            sampler = fixed(weights.float(), batch)
        source = AlignSource(
            self.train, batch, ListCollator(), seed=self.seed, weights=sampler, beta=fixed(self.beta, batch),
            reference=self.train_reference, experts=experts,
        )  # fmt: skip
        settings = config.training(
            steps, warmup=max(1, round(self.sizes.warmup * steps)), log_every=steps, checkpoint_every=0
        )
        rates = {"hyper_prompt.": 10 * rate}  # as `mopl align` does
        train(model, source, step_loss, settings, optimizer=adamw(model, settings, torch.device("cpu"), rates))
        return model.eval()

    def front(self, method: str, steps: int, rate: float) -> tuple[list[Tensor], list[int], int]:
        """Train a method with `steps` in all.

        Returns:
            Its policies (P, Y) at the grid, the steps of each of its models, and the trained parameters of one.
        """
        if method in (*CONDITIONED, INFLUENCE):
            start = influence if method == INFLUENCE else None
            model = self.fit(steps, rate, conditioning="hyper-prompt" if start else method, start=start)
            found, size = [self.policy_of(model, w) for w in self.grid], _trained(model)
            models.release(model)
            return found, [steps], size
        ends = vertices(2)
        asked = ends if method == "dpo-soup" else self.grid
        shares = shared_out(steps, len(asked))
        found, states, size = [None] * len(asked), [], 0  # type: ignore[var-annotated]
        experts = None
        order = list(range(len(asked)))
        if method == "mo-dpo":
            places = [int((self.grid - end).abs().sum(1).argmin()) for end in ends]
            order = [*places, *(place for place in order if place not in places)]
            experts = []
        for turn, place in enumerate(order):
            alone = method != "mo-dpo" or turn < len(ends)
            model = self.fit(shares[place], rate, asked[place], experts=None if alone else experts)
            found[place], size = self.policy_of(model, asked[place]), _trained(model)
            if method == "mo-dpo" and alone:
                experts.append(ListScores(self.train, score_lists(model, self.train, weights=asked[place].float())))
            if method == "dpo-soup":
                states.append({name: value.clone() for name, value in _state(model).items()})
                if turn == len(order) - 1:
                    found = [self._soup(model, states, w) for w in self.grid]
            models.release(model)
        return found, shares, size  # type: ignore[return-value]

    def _soup(self, model: Any, states: list[dict[str, Tensor]], w: Tensor) -> Tensor:
        own = _state(model)
        with torch.no_grad():
            for name, value in steering.soup(states, w).items():
                own[name].copy_(value)
        return self.policy_of(model, w)

    def measure(self, policies: list[Tensor]) -> dict[str, float]:
        """Return what policies at the grid reach, against the truth; hypervolumes are shares of the optimum's."""
        losses = torch.stack([self._losses(policy) for policy in policies])
        values = torch.stack([self._values(policy) for policy in policies])
        rewards = torch.stack([self._mean_rewards(policy) for policy in policies])
        w = self.grid.double()

        def share(name: str, found: Tensor, best: Tensor) -> float:
            corner = self.corners[name]
            return hypervolume(found, corner, maximise=True) / hypervolume(best, corner, maximise=True)

        corner = (REFERENCE_FACTOR * self.untouched).tolist()  # that of `mopl align`
        values_share = share("values", values, self.best_values)
        return {
            "hypervolume": values_share,  # of KL-regularised rewards: what rates are chosen by
            "of_the_optimum": values_share,
            "rewards": share("rewards", rewards, self.best_rewards),
            "losses": hypervolume(losses, corner, maximise=False)
            / hypervolume(self.best_losses, corner, maximise=False),
            "regret": float(((losses - self.best_losses) * w).sum(1).mean()),  # nats
            "value_regret": float(((self.best_values - values) * w).sum(1).mean()),
        }


def _shares(log_probs: Tensor) -> np.ndarray:
    shares = log_probs.double().exp().numpy()
    return shares / shares.sum()


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def _trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def influence(model: Any) -> None:
    """Let the mask of a hyper prompt depend on w from the start: rows of B that begin at 0 begin random."""
    right = model.hyper_prompt.right[-1]
    with torch.no_grad():
        rows = right.weight.view(model.hyper_prompt.rank, model.hyper_prompt.hidden, -1)
        rows[1:].normal_()


def _rewards(random: np.random.Generator, prompts: int, conflict: float) -> Tensor:
    """Return rewards (P, Y, m) of unit variance over the answers to a prompt, on average over prompts."""

    def unit(values: np.ndarray) -> np.ndarray:  # (P, Y)
        values = values - values.mean(1, keepdims=True)
        return values / np.sqrt((values**2).mean())

    def of_tokens(shape: tuple[int, ...]) -> np.ndarray:
        each = random.standard_normal((*shape, TOKENS))
        return each[..., ANSWERS.numpy()].sum(-1)

    opposed = unit(np.broadcast_to(of_tokens((1,)), (prompts, len(ANSWERS))))
    own = [unit(of_tokens((prompts,))) for _ in NAMES]
    shared = OPPOSED * unit(np.broadcast_to(of_tokens((1,)), opposed.shape)) + OWN * unit(of_tokens((prompts,)))
    found = [
        np.sqrt(conflict) * (sign * OPPOSED * opposed + OWN * each) + np.sqrt(1 - conflict) * shared
        for sign, each in zip((1, -1), own, strict=True)
    ]
    return torch.from_numpy(np.stack(found, -1))


def run(problem: Problem, cell: Cell, method: str, rate: float) -> dict[str, Any]:
    """Train and measure one method in one cell."""
    began = time.process_time()
    total = round(cell.budget * problem.sizes.steps)
    policies, steps, trained = problem.front(method, total, rate)
    seconds = time.process_time() - began
    return {
        "budget": cell.budget, "spread": cell.spread, "conflict": cell.conflict, "seed": cell.seed, "method": method,
        "rate": rate, **{name: round(value, 5) for name, value in problem.measure(policies).items()}, "steps": total,
        "models": len(steps), "trained": trained, "cpu_seconds": round(seconds, 2),
    }  # fmt: skip
