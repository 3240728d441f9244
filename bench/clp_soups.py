"""CLP beside rewarded soups with sampled rollouts, where the optimum is known exactly.

    python -m bench.clp_soups --json FILE [--seeds 5]

A tiny transformer answers four prompts with two tokens of eight, so its 64 responses can be listed: rollouts are drawn
from the exact distribution, and rewards, KL, value and the optimal policy of each trade-off are sums over all of them.
Each prompt has two tokens of its own that one reward each pays for, and a third that pays `compromise` to both. At 0
the two rewards only conflict; at 0.6 there is an answer that serves both better than a mixture of the ends.

A step is that of `mopl clp`: 8 prompts of 4 samples, the leave-one-out baseline, AdamW, clipped gradients; an expert
sees its own reward, CLP two trade-offs. "per model" is N steps for each model, so 2 N for the two experts of the soup
and N for CLP; "in all" is as many for CLP as the experts had together. A shared rollout counts at both trade-offs
(`mopl clp --share-rollouts`): as many samples, and twice the forward and backward passes.

Of each method: the hypervolume of mean rewards, that of KL-regularised rewards (1 - α) R_j - α KL, both over that of
the optimal policies at the same 11 trade-offs, and the regret V*(w) - V(w), mean over the trade-offs. Reference points
lie below every optimal policy by a tenth of the range, for a point at 0 hides what the KL costs. The soup has the
better of two learning rates, in each figure and setting. A file is continued where it ends; printed are means over
settings and seeds, and of differences to the soup with 95 % intervals of Student's t over seeds.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import scipy.stats
import torch
import transformers
from torch import Tensor, nn

from bench.measuring import about
from mopl import reference_policy as exact
from mopl._files import write_file
from mopl._terminal import progress
from mopl.conditioning import LoraMixture, ParameterMixture, sample_weights
from mopl.losses import balance_weights, policy_gradient
from mopl.pareto import hypervolume
from mopl.steering import soup

TOKENS, LENGTH, PROMPTS_PER_STEP, SAMPLES = 8, 2, 8, 4
RESPONSES = torch.tensor(list(itertools.product(range(TOKENS), repeat=LENGTH)))
GRID = torch.stack([torch.linspace(0, 1, 11), torch.linspace(1, 0, 11)], 1)
RATES = {"full": 5e-3, "attention": 1e-2, "logits": 3e-2, "lora": 1e-2}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


@dataclass(frozen=True)
class Setting:
    """What is learned, and for how long.

    Args:
        compromise: What a response of nothing but the third token earns in both rewards.
        kl_weight: α.
        steps: Of each expert.
    """

    compromise: float
    kl_weight: float
    steps: int


SETTINGS = [Setting(*values) for values in itertools.product((0.0, 0.6), (0.05, 0.2), (25, 50))]
PROMPTS = 4
SOUP = "soup of two experts"


@dataclass(frozen=True)
class Variant:
    """How CLP is trained.

    Args:
        scope: What is mixed.
        budget: `"per model"` or `"in all"`.
        shared: Whether each answer counts at both trade-offs of its step.
    """

    scope: str
    budget: str
    shared: bool

    def __str__(self) -> str:
        return f"CLP, {self.scope}{', shared rollouts' if self.shared else ''}; {self.budget}"


VARIANTS = [
    Variant(*values) for values in itertools.product(("attention", "lora"), ("per model", "in all"), (False, True))
]


class Problem:
    """A setting with a seed: model, prompts, rewards and optimum."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting, self.seed = setting, seed
        self.prompts = torch.tensor([[1, 2 + n] for n in range(PROMPTS)])
        wanted = [[(n + k) % 6 + 2 for k in (1, 3, 5)] for n in range(PROMPTS)]
        shares = torch.stack(
            [torch.stack([(RESPONSES == token).float().mean(-1) for token in tokens]) for tokens in wanted]
        )  # (P, 3, Y)
        self.rewards = (shares[:, :2] + setting.compromise * shares[:, 2:]).movedim(1, -1)  # (P, Y, 2)
        with torch.no_grad():
            self.reference = self.logprob(self.base(), 1)[0]  # (P, Y, T)
        log_reference = self.reference.sum(-1).double()
        self.optimum = self.figures([
            torch.stack([
                exact.optimal_log_policy(q, gains.T.double(), w, setting.kl_weight)
                for q, gains in zip(log_reference, self.rewards, strict=True)
            ])
            for w in GRID.double()
        ])  # fmt: skip
        corners = {}
        for name in ("rewards", "regularised"):
            least, most = self.optimum[name].amin(0), self.optimum[name].amax(0)
            corners[name] = (least - 0.1 * (most - least)).tolist()
        self.corners = corners
        self.volumes = {
            name: hypervolume(self.optimum[name], corner, maximise=True) for name, corner in corners.items()
        }

    def base(self) -> nn.Module:
        """Return the model that every training begins with."""
        torch.manual_seed(self.seed)
        config = transformers.LlamaConfig(
            vocab_size=TOKENS, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=None, tie_word_embeddings=False,
        )  # fmt: skip
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    def wrap(self, scope: str) -> nn.Module:
        """Return an untrained conditional policy."""
        if scope != "lora":
            return ParameterMixture(self.base(), 2, scope=scope)
        import peft

        return LoraMixture(self.base(), 2, config=peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)).eval()

    def logprob(self, model: nn.Module, count: int, weights: Tensor | None = None) -> Tensor:
        """Return log π of the tokens of all responses to all prompts, at trade-offs (count, m): (count, P, Y, T)."""
        shape = count, len(self.prompts), len(RESPONSES)
        y = RESPONSES.expand(*shape, -1).reshape(-1, LENGTH)
        prompts = self.prompts[None, :, None].expand(*shape, -1).reshape(-1, 2)
        given = {} if weights is None else {"weights": weights[:, None, None].expand(*shape, -1).reshape(-1, 2)}
        logits = model(input_ids=torch.cat([prompts, y], 1), **given).logits[:, 1:-1]
        return logits.log_softmax(-1).gather(-1, y[..., None]).view(*shape, LENGTH)

    def train(
        self, model: nn.Module, steps: int, rate: float, variant: Variant | None, w: Tensor | None = None
    ) -> nn.Module:
        """Train a policy: an expert at one `w`, or as a variant of CLP."""
        setting, generator = self.setting, torch.Generator().manual_seed(self.seed)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        count = 1 if variant is None else 2
        shared = variant is not None and variant.shared
        number = torch.arange(PROMPTS_PER_STEP).repeat_interleave(SAMPLES)  # of the prompt of each response
        for step in range(steps):
            weights = w[None] if w is not None else sample_weights(2, count, seed=self.seed, step=step, balanced=shared)
            logprob = self.logprob(model, count, None if variant is None else weights)
            asked = torch.randint(PROMPTS, (PROMPTS_PER_STEP,), generator=generator)[number]
            at = (
                torch.randint(count, asked.shape, generator=generator) if shared else number * count // PROMPTS_PER_STEP
            )
            probability = logprob.detach().sum(-1).exp()[at, asked]
            said = torch.multinomial(probability, 1, generator=generator)[:, 0]
            group, importance = number, None
            if shared:
                importance = balance_weights(logprob.detach()[:, asked, said].sum(-1)).flatten()
                at = torch.arange(count).repeat_interleave(len(asked))
                group, asked, said = (
                    at * PROMPTS_PER_STEP + number.repeat(count),
                    asked.repeat(count),
                    said.repeat(count),
                )
            loss = policy_gradient(
                logprob[at, asked, said], self.rewards[asked, said], weights[at], kl_weight=setting.kl_weight,
                reference=self.reference[asked, said], baseline="leave_one_out", group=group, importance=importance,
            ).loss  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        return model

    def figures(self, policies: list[Tensor]) -> dict[str, Tensor]:
        """Return mean rewards (K, 2), these minus the KL, and values (K,), of log-policies (P, Y) at the grid."""
        gains, alpha = self.rewards.double(), self.setting.kl_weight
        log_reference = self.reference.sum(-1).double()
        probability = torch.stack(policies).double().exp()
        mean = torch.einsum("kpy,pyj->kpj", probability, gains).mean(1)
        kl = torch.stack([exact.kl(p.double(), log_reference).mean() for p in policies])
        regularised = (1 - alpha) * mean - alpha * kl[:, None]
        return {"rewards": mean, "regularised": regularised, "value": (GRID.double() * regularised).sum(-1)}

    @torch.no_grad()
    def measure(self, models: list[nn.Module]) -> dict[str, float]:
        """Return hypervolumes as shares of the optimum's and the mean regret, of plain models at the grid."""
        found = self.figures([self.logprob(model, 1)[0].sum(-1) for model in models])
        shares = {n: hypervolume(found[n], c, maximise=True) / self.volumes[n] for n, c in self.corners.items()}
        return {**shares, "regret": float((self.optimum["value"] - found["value"]).mean())}

    def soup(self) -> dict[str, float]:
        """Return the figures of averages of two experts, at the better of two learning rates."""
        tried = []
        for factor in (1, 2):
            rate = factor * RATES["full"]
            experts = [self.train(self.base(), self.setting.steps, rate, None, e) for e in torch.eye(2)]
            states = [expert.state_dict() for expert in experts]
            models = []
            for w in GRID:
                models.append(copy.deepcopy(experts[0]))
                models[-1].load_state_dict(soup(states, w))
            tried.append(self.measure(models))
        return {name: (min if name == "regret" else max)(each[name] for each in tried) for name in tried[0]}

    def clp(self, variant: Variant) -> dict[str, float]:
        """Return the figures of a variant of CLP."""
        steps = self.setting.steps * (2 if variant.budget == "in all" else 1)
        policy: Any = self.train(self.wrap(variant.scope), steps, RATES[variant.scope], variant)
        return self.measure([policy.merge(w) for w in GRID])


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % interval of Student's t."""
    n = len(values)
    if n < 2:
        return values[0], math.inf
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    return mean, float(scipy.stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of means over the settings, and of differences to the soup over seeds."""
    seeds = sorted({row["seed"] for row in rows})

    def mean(seed: int, method: str, figure: str) -> float:
        return statistics.mean(row["methods"][method][figure] for row in rows if row["seed"] == seed)

    lines = [
        "| method | rewards | minus the soup's | KL-regularised | minus the soup's | regret | ahead in |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in rows[0]["methods"]:
        cells = [method]
        for figure in ("rewards", "regularised"):
            cells.append(f"{statistics.mean(mean(seed, method, figure) for seed in seeds):.3f}")
            middle, half = interval([mean(seed, method, figure) - mean(seed, SOUP, figure) for seed in seeds])
            cells.append("" if method == SOUP else f"{middle:+.3f} ± {half:.3f}")
        cells.append(f"{statistics.mean(mean(seed, method, 'regret') for seed in seeds):.4f}")
        ahead = [0, 0]
        for setting in SETTINGS:
            cell = [row["methods"] for row in rows if asdict(setting).items() <= {**row, "methods": 0}.items()]
            for place, figure in enumerate(("rewards", "regularised")):
                ahead[place] += statistics.mean(each[method][figure] - each[SOUP][figure] for each in cell) > 0
        cells.append("" if method == SOUP else f"{ahead[0]} and {ahead[1]} of {len(SETTINGS)}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what the file does not have, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="where figures are kept")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    report = json.loads(options.json.read_text()) if options.json.exists() else {"rows": []}
    done = {(row["seed"], *(row[name] for name in Setting.__dataclass_fields__)) for row in report["rows"]}
    work = [(seed, setting) for seed in range(options.seeds) for setting in SETTINGS]
    with progress("CLP and soups", len(work), "settings") as shown:
        for seed, setting in work:
            if (seed, *asdict(setting).values()) not in done:
                problem = Problem(setting, seed)
                methods = {SOUP: problem.soup(), **{str(variant): problem.clp(variant) for variant in VARIANTS}}
                report["rows"].append({"seed": seed, **asdict(setting), "methods": methods})
                content = json.dumps({**about(), **report}, indent=1) + "\n"
                write_file(options.json, content)
            shown.update(1)
    print(table(report["rows"]))


if __name__ == "__main__":
    main()
