"""The settings of `mopl align --method clp` in one dataclass: checked before anything is read, loaded or written."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from mopl._arguments import check_choice
from mopl._bounds import check_bounds
from mopl._records import settings_from
from mopl.experiments.resume_settings import located_if_there, located_inside
from mopl.training import TrainingConfig

METHODS = ("clp", "rewarded-soups", "prompting", "logit-mixing", "dera")
TRAINED = ("clp", "rewarded-soups", "prompting")
ALL = "clp-all"
SCOPES = ("full", "attention", "logits", "lora", "prompt")
BASELINES = ("leave_one_out", "group", "value", "none")
NORMALIZE = ("base", "running", "none")
KL_ESTIMATORS = ("k1", "k2", "k3", "exact")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ClpConfig:
    """Settings of a run of CLP. Every default is ours: the full text of the paper was not at hand.

    Args:
        model: The language model to start from, which is also the reference: a directory, or a name on the hub.
        data: Prompts: a text file with one a line, JSON lines with `"prompt"`, or any preference data, whose prompts
            are taken.
        limit: Take no more than this many prompts; None for all.
        on_error: `"raise"` refuses prompts with unusable rows, `"skip"` leaves these out and says how many.
        held_out: Share of the prompts that is evaluated on and not trained on.
        data_seed: Seed of that split; `seed` leaves it alone.
        template: `"chat"`, `"plain"`, or `"auto"`: chat if the tokenizer has a chat template.
        max_prompt: Prompts of more tokens are left out.
        rewards: Names of `mopl.rewards` with their options (`"length:target=20"`), or `"module:function"` for a
            function of (texts, prompts), at least one. Their names are the objectives, in the order of the weights.
        normalize: `"base"`: the policy is trained on (R - mean) / deviation, both taken once from answers of the model
            that the run starts from; so rewards of different units weigh alike. `"running"`: both begin there and
            follow the rewards of the rollouts, each rollout in the scale of those before it. `"none"`: on R itself.
            Fronts are always in the rewards' own units.
        normalize_decay: What earlier rewards count after each further rollout, under `"running"`. 1: as much as later
            ones; 0.99: a mean over about the last 100 rollouts.
        normalize_prompts: Training prompts that the untrained model answers for that.
        method: One of `METHODS`, or `"clp-all"` for all that can be compared.
        scope: What is mixed: `"full"`, `"attention"`, `"logits"` (`mopl.conditioning.ParameterMixture`), `"lora"`
            (`LoraMixture`), `"prompt"` (LoRA and a `HyperPrompt` on the weights: no parameters are mixed), or a
            regular expression on names of parameters.
        train_shared: Also train what is outside of the scope, shared by all trade-offs; for full, lora and prompt there
            is nothing of that kind.
        lora_rank: Rank of the adapters of lora and prompt.
        lora_alpha: Their scale.
        lora_targets: Modules that get adapters, by PEFT's rules.
        virtual_tokens: k of the prompt scope.
        prompt_rank: r of the prompt scope.
        kl_weight: α. Several: the policy is conditioned on α as well (`mopl.conditioning.AlphaCoefficients`), which is
            drawn from them in training. The first is the one of the front's main points, and that of experts.
        kl_form: `"complement"` for (1 - α) w·R - α KL, `"penalty"` for w·R - α KL.
        kl_in: `"reward"` or `"loss"`, see `mopl.losses.policy_gradient`; so the next two.
        kl_estimator: `"k1"`, `"k2"` or `"k3"` of the sampled tokens; or `"exact"`, the KL of each position over the
            whole vocabulary (`mopl.ops.linear_kl`), for which a rollout keeps the reference's hidden states.
        kl_level: `"token"` or `"sequence"`.
        baseline: `"leave_one_out"` or `"group"` over the samples of a prompt, `"value"` for a learned head that knows
            (w, α), or `"none"`.
        standardize: Divide by the group's deviation, as GRPO does; with baseline `"group"`.
        to_go: Count for each token the KL from it on only.
        value_learning_rate: Of the value head.
        alpha: Concentration of the Dirichlet distribution of the weights.
        trade_offs: Different trade-offs in a step. None: one for each prompt where that costs nothing, 2 where
            parameters are mixed, since each one then is a model of its own to generate with.
        steps: Updates of each trained model.
        prompts_per_step: Prompts of a rollout.
        samples_per_prompt: Samples for each of them, at one trade-off.
        epochs: Updates on each rollout; more than one needs `clip`.
        clip: ε of the clipped importance ratio.
        ratio_level: `"token"`, `"sequence"` or `"sequence_mean"`.
        max_new_tokens: Most tokens of a response; the policy is that of responses that end there.
        temperature: Divides logits: of policy and reference, in sampling, in log-probabilities and in evaluation. What
            is trained and measured is the distribution at this temperature; top-k and top-p, under which samples would
            come from another one, are switched off.
        rows_at_once: Most responses that are generated at once.
        accumulation: Parts of a step's prompts, one after another. Samples depend on it.
        learning_rate: Of the policy.
        weight_decay: Decoupled weight decay.
        warmup: Steps of linear warm-up.
        schedule: `"constant"`, `"linear"` or `"cosine"`.
        gradient_clip: Largest norm of the gradient; 0 for none.
        dtype: Of the model; what is mixed is trained in it, and a note says if that is 16 bit.
        attention: `attn_implementation` of transformers; None for its own choice.
        kl_limit: Stop if the mean KL of a step's responses to the reference is above this, in nats; 0 for never.
        entropy_floor: Stop if the entropy of a token, in nats, stays below this for `patience` rollouts; 0 for never.
        patience: See there; so for rewards that are the same for all samples of a step.
        points: Size of the grid of weights; None: 11, 15, 20 for 2, 3, 4 objectives and 11 above.
        reference_point: Of the hypervolume of mean rewards, one number for each; empty: the mean of the untrained model
            minus twice the deviation of its answers.
        eval_prompts: Most held-out prompts that are answered for the front.
        eval_samples: Answers to each at every trade-off.
        bootstrap: Resamples of the held-out prompts for intervals; 0 for none.
        samples: Held-out prompts whose answers the report shows.
        log_samples: Responses of a rollout that `samples.jsonl` keeps, every `log_every` steps.
        seed: Seed of everything random in training and evaluation.
        log_every: Steps from one line of the log to the next.
        checkpoint_every: Steps from one checkpoint to the next.
        tensorboard: Also write TensorBoard files.
        device: `"auto"` or `"cpu"`.

    Raises:
        ValueError: If a setting is out of range or two do not go together; the message says what to change.
    """

    model: str
    data: str
    limit: int | None = None
    on_error: Literal["raise", "skip"] = "raise"
    held_out: float = 0.1
    data_seed: int = 0
    template: Literal["auto", "chat", "plain"] = "auto"
    max_prompt: int = 512
    rewards: tuple[str, ...] = ()
    normalize: Literal["base", "running", "none"] = "base"
    normalize_decay: float = 1.0
    normalize_prompts: int = 64
    method: str = "clp"
    scope: str = "attention"
    train_shared: bool = False
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = ("all-linear",)
    virtual_tokens: int = 8
    prompt_rank: int = 4
    kl_weight: tuple[float, ...] = (0.05,)
    kl_form: Literal["complement", "penalty"] = "complement"
    kl_in: Literal["reward", "loss"] = "reward"
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k1"
    kl_level: Literal["token", "sequence"] = "token"
    baseline: Literal["leave_one_out", "group", "value", "none"] = "leave_one_out"
    standardize: bool = False
    to_go: bool = False
    value_learning_rate: float = 1e-3
    alpha: float = 1.0
    trade_offs: int | None = None
    steps: int = 200
    prompts_per_step: int = 8
    samples_per_prompt: int = 4
    epochs: int = 1
    clip: float | None = None
    ratio_level: Literal["token", "sequence", "sequence_mean"] = "token"
    max_new_tokens: int = 64
    temperature: float = 1.0
    rows_at_once: int = 64
    accumulation: int = 1
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    warmup: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    gradient_clip: float = 1.0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    attention: str | None = None
    kl_limit: float = 100.0
    entropy_floor: float = 1e-3
    patience: int = 10
    points: int | None = None
    reference_point: tuple[float, ...] = ()
    eval_prompts: int = 64
    eval_samples: int = 1
    bootstrap: int = 1000
    samples: int = 3
    log_samples: int = 4
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 100
    tensorboard: bool = False
    device: Literal["auto", "cpu"] = "auto"

    def __post_init__(self) -> None:
        check_bounds(self)
        for name, what in (("model", "a language model"), ("data", "prompts")):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing; name {what}, a path or a name on the Hugging Face hub")
            # A run must find its model and prompts again from any directory.
            object.__setattr__(self, name, located_if_there(str(getattr(self, name))))
        for name in ("rewards", "kl_weight", "lora_targets", "reference_point"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, (str, int, float)) else tuple(value))
        object.__setattr__(self, "rewards", tuple(located_inside(spec) for spec in self.rewards))
        if not self.rewards:
            raise ValueError("rewards are missing; name at least one of mopl.rewards, or module:function")
        choices: dict[str, tuple[Any, ...]] = {
            "method": (*METHODS, ALL), "template": ("auto", "chat", "plain"), "normalize": NORMALIZE,
            "kl_form": ("complement", "penalty"), "kl_in": ("reward", "loss"), "kl_estimator": KL_ESTIMATORS,
            "kl_level": ("token", "sequence"), "baseline": BASELINES, "dtype": DTYPES, "device": ("auto", "cpu"),
            "ratio_level": ("token", "sequence", "sequence_mean"), "on_error": ("raise", "skip"),
        }  # fmt: skip
        for name, allowed in choices.items():
            check_choice(getattr(self, name), allowed, name)
        self._check_numbers()
        self._check_together()
        _ = self.training()

    def _check_numbers(self) -> None:
        positive = {
            "kl_weight": self.kl_weight, "alpha": (self.alpha,), "temperature": (self.temperature,),
            "lora_alpha": (self.lora_alpha,), "value_learning_rate": (self.value_learning_rate,),
            "clip": () if self.clip is None else (self.clip,),
        }  # fmt: skip
        for name, values in positive.items():
            if not all(math.isfinite(x) and x > 0 for x in values):
                raise ValueError(f"{name} is {' '.join(f'{x:g}' for x in values)} but must be positive and finite")
        at_least = {
            "normalize_prompts": 1, "lora_rank": 1, "virtual_tokens": 1, "prompt_rank": 1, "steps": 1, "max_prompt": 1,
            "prompts_per_step": 1, "samples_per_prompt": 1, "epochs": 1, "max_new_tokens": 1, "rows_at_once": 1,
            "kl_limit": 0, "entropy_floor": 0, "patience": 1, "eval_prompts": 1, "eval_samples": 1, "bootstrap": 0,
            "samples": 0, "log_samples": 0, "data_seed": 0, "gradient_clip": 0, "checkpoint_every": 1,
        }  # fmt: skip
        for name, lowest in {**at_least, "limit": 2, "trade_offs": 1, "points": 1}.items():
            value = getattr(self, name)
            if value is not None and not value >= lowest:
                raise ValueError(f"{name} is {value} but must be at least {lowest}")
        if not self.kl_weight or len(set(self.kl_weight)) != len(self.kl_weight):
            raise ValueError(f"kl_weight is {self.kl_weight} but must be one number or several different ones")
        if self.kl_form == "complement" and not max(self.kl_weight) < 1:
            raise ValueError(
                f"kl_weight is {max(self.kl_weight):g} but rewards count 1 - α in the complement form; stay below 1, "
                "or pass kl_form='penalty'"
            )
        if not 0.0 < self.normalize_decay <= 1.0:
            raise ValueError(f"normalize_decay is {self.normalize_decay} but must be above 0 and at most 1")
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"held_out is {self.held_out} but must lie between 0 and 1: a share of the prompts")

    def _check_together(self) -> None:
        if self.trade_offs is not None and self.trade_offs > self.prompts_per_step:
            raise ValueError(
                f"trade_offs is {self.trade_offs} but a step has {self.prompts_per_step} prompts, each at one "
                "trade-off; take fewer, or more prompts_per_step"
            )
        if self.baseline in ("leave_one_out", "group") and self.samples_per_prompt < 2:
            raise ValueError(
                f"baseline {self.baseline!r} averages over a prompt's samples, of which there is one; raise "
                "samples_per_prompt, or take baseline='value'"
            )
        if self.standardize and self.baseline != "group":
            raise ValueError("standardize divides by a group's deviation; it needs baseline='group'")
        if self.normalize_decay != 1 and self.normalize != "running":
            raise ValueError("normalize_decay is about a scale that follows the rewards; pass normalize='running'")
        if self.kl_estimator == "exact" and self.kl_level != "token":
            raise ValueError("kl_estimator 'exact' is of each position; kl_level='sequence' is for k1, k2 and k3")
        if self.epochs > 1 and self.clip is None:
            raise ValueError(f"epochs is {self.epochs}; updates on old samples need clip, such as clip=0.2")
        if self.epochs == 1 and (self.clip is not None or self.ratio_level != "token"):
            raise ValueError("clip and ratio_level are about several epochs on a rollout; raise epochs, or leave them")
        if self.ratio_level != "token" and self.to_go:
            raise ValueError("to_go gives tokens advantages of their own, which a sequence's ratio cannot weigh")
        if self.checkpoint_every % self.epochs:
            raise ValueError(
                f"checkpoint_every is {self.checkpoint_every} but a rollout serves {self.epochs} steps (epochs); "
                "take a multiple of that"
            )
        if self.steps % self.epochs:
            raise ValueError(f"steps is {self.steps} but a rollout serves {self.epochs} of them; take a multiple")
        if self.prompt_rank > self.virtual_tokens:
            raise ValueError(f"prompt_rank is {self.prompt_rank} but there are {self.virtual_tokens} virtual_tokens")
        if self.scope == "prompt" and self.conditions_on_kl and {"clp", "dera"} & set(self.methods):
            raise ValueError(
                "scope 'prompt' takes weights alone, so several kl_weight cannot be asked for; pass one, or "
                "another scope"
            )
        if self.method == "dera" and not self.conditions_on_kl:
            raise ValueError("dera answers for other KL weights than the first; pass several in kl_weight")

    @property
    def conditions_on_kl(self) -> bool:
        """Whether the policy is asked for several KL weights."""
        return len(self.kl_weight) > 1

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods whose fronts the run has."""
        if self.method != ALL:
            return (self.method,)
        return tuple(name for name in METHODS if name != "dera" or self.conditions_on_kl)

    @property
    def mixes_parameters(self) -> bool:
        """Whether a trade-off is a sum of whole parameters, so that each one needs a run of its own."""
        return self.scope not in ("lora", "prompt")

    @property
    def baseline_scope(self) -> str:
        """What experts and the prompting baseline train: the same parameters, but no virtual tokens."""
        return "lora" if self.scope == "prompt" else self.scope

    def training(self) -> TrainingConfig:
        """Return the settings of one training."""
        names = {f.name for f in dataclasses.fields(TrainingConfig)} & {f.name for f in dataclasses.fields(self)}
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        return TrainingConfig(**{**values, "gradient_clip": self.gradient_clip or None})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ClpConfig:
        """Read back what `to_dict` gave.

        Raises:
            ValueError: If a setting is unknown, has another type or is refused.
        """
        return settings_from(cls, values)
