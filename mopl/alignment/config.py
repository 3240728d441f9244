"""The settings of `mopl align` in one dataclass: what is checked before anything is read, loaded or written."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from mopl._arguments import check_choice
from mopl._bounds import check_bounds
from mopl._lines import lone_surrogate
from mopl._records import settings_from
from mopl.experiments.resume_settings import located_if_there
from mopl.losses.pairwise import LOSS_TYPES
from mopl.training import TrainingConfig

METHODS = ("weight-cos-dpo", "temperature-cos-dpo", "dpo-ls", "dpo-soup", "mo-dpo")
ALL = "all"
CONDITIONED = ("weight-cos-dpo", "temperature-cos-dpo")
CONDITIONINGS = ("hyper-prompt", "lora-mixture", "text")
LIST_LOSSES = ("listnet", "plackett-luce")
# aot sorts over the whole batch, so it has no loss of one list that could be weighed by that list's trade-off.
PAIR_LOSSES = tuple(name for name in LOSS_TYPES if not name.startswith("aot"))
LOSSES = (*LIST_LOSSES, *PAIR_LOSSES)
PER_TOKEN = ("sigmoid_norm", "ipo")  # losses of log-probabilities averaged over tokens
DTYPES = ("auto", "float32", "bfloat16", "float16")
LABELS = ("auto", "l1", "softmax")


@dataclass(frozen=True)
class AlignConfig:
    """Settings of an alignment run. Every default is ours unless a section of the paper (Ren et al.) is named.

    Args:
        model: The language model to start from: a directory, or a name on the Hugging Face hub. A directory of a PEFT
            adapter is its base model with the adapter merged in, and that is the reference too.
        data: Preference data: a file, a directory or a name on the hub; see `mopl.language_models.readers`.
        format: Format of the data, or `"auto"`.
        split: Split of a directory or of the hub.
        limit: Read no more than this many rows; None for all.
        objectives: Names of the objectives, in the order of the weights; empty takes all that the data has.
        on_error: `"raise"` refuses data with unusable rows, `"skip"` leaves them out and says how many.
        held_out: Share of the prompts that is evaluated on and not trained on.
        data_seed: Seed of that split; `seed` leaves it alone.
        template: `"chat"`, `"plain"`, or `"auto"`: chat if the tokenizer has a chat template.
        max_length: Most tokens of prompt and response together; see `mopl.language_models.tokenization`.
        min_prompt: What a longer prompt is never cut below; None: a quarter of `max_length`.
        method: One of `METHODS`, or `"all"` to train and compare every one.
        conditioning: How weights enter the model of COS-DPO: `"hyper-prompt"` (section 4.2); `"lora-mixture"`, a set of
            adapters for each objective, mixed by w in every row (`mopl.conditioning.LoraMixture`); `"text"`, in words.
        positions: Positions of virtual tokens, `"hf"` or `"paper"`; see `mopl.conditioning.HyperPromptModel`.
        virtual_tokens: k, virtual tokens of the prompt (section 4.2).
        prompt_rank: r, rank of the prompt's mask (section 4.2).
        prompt_text: Words whose embeddings the virtual tokens start at, cut or repeated to k; None: small random
            vectors.
        lora_rank: Rank of the LoRA adapters (section 4.2); 0 for none.
        lora_alpha: Their scale (section 4.2).
        lora_targets: Modules that get adapters, by PEFT's rules; `("all-linear",)` takes all but the output head.
        loss: `"listnet"` (the paper's; DPO on pairs), `"plackett-luce"`, or for pairs a type of
            `mopl.losses.bradley_terry`.
        labels: How ListNet turns labels into targets (section 2.2): `"l1"` for sparse labels such as 0 and 1,
            `"softmax"` for dense ones such as ratings, one for all objectives or one for each. `"auto"` takes l1 where
            all labels of an objective are 0 or 1. Negative ones, such as rewards, need `"softmax"`.
        label_temperature: What labels are divided by before their softmax, one for all objectives or one for each;
            smaller makes sharper targets.
        partial: Objectives that label only a part of a list: `"drop"` leaves them out of it, `"keep"` uses that part.
        ties: How Plackett-Luce treats equal labels.
        last_group: Whether Plackett-Luce charges the responses of the lowest label.
        top_k: How many ranks Plackett-Luce sees; None for all.
        label_smoothing: Rate of flipped labels, for the pair losses that have it.
        beta: β: one number for all objectives (0.1 in the paper), or one for each.
        beta_range: Box from which `temperature-cos-dpo` draws β, as factors of `beta` (section 4.1).
        alpha: Concentration of the Dirichlet distribution of the weights; smaller trains the ends of the front more.
        weights_per: Draw weights for each `"list"`, or one vector for each `"step"` as in the paper's algorithm 1.
        penalty: Factor λ of the cosine penalty (appendix A.2).
        penalty_sign: `"as_printed"` or `"cosmos"`; see `mopl.losses.scalarize.cosine_penalty`.
        reference: Where the log-probabilities of the reference come from: `"self"`, the model with adapters and prompt
            off, in every step; `"precomputed"`, the same computed once for all data and kept in the run; another
            model's directory or name, computed once; `"auto"`: once if lists are seen more than once.
        steps: Updates of each trained model; None: three epochs, at least 100.
        lists_per_batch: Lists of an update.
        accumulation: Parts of a batch, one after another; the update does not depend on it.
        learning_rate: Learning rate of the adapters.
        prompt_learning_rate: Learning rate of the prompt; None: ten times that of the adapters.
        weight_decay: Decoupled weight decay.
        warmup: Steps of linear warm-up; None: a tenth of the steps.
        schedule: `"constant"`, `"linear"` or `"cosine"`.
        gradient_clip: Largest norm of the gradient; 0 for none.
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping them.
        mixed_precision: `"no"`, `"bf16"` or `"fp16"`: autocast of the forward pass.
        dtype: Of the frozen model: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`: as it is stored. What is
            trained stays in float32.
        attention: `attn_implementation` of transformers; None for its own choice.
        packing: Batches as one row without padding.
        points: Size of the grid of weights; None: 11, 15, 20 for 2, 3, 4 objectives and 11 above.
        scales: Distances from the reference, c of equation (14), at which the front is evaluated besides 1.
        reference_point: Of the hypervolume, one number for each objective; empty: 1.1 (the paper's for two objectives)
            times the loss of the untrained model over ln 2, which is its loss on pairs.
        bootstrap: Resamples of the held-out lists for intervals; 0 for none.
        tokens_per_batch: Most tokens of one forward pass that is not training.
        samples: Held-out prompts that are answered at every point of the grid.
        sample_tokens: Most tokens of such an answer.
        seed: Seed of initialisation, batches, weights, temperatures and bootstrap.
        log_every: Steps from one line of the log to the next.
        checkpoint_every: Steps from one checkpoint to the next.
        tensorboard: Also write TensorBoard files.
        device: `"auto"` or `"cpu"`.

    Raises:
        ValueError: If a setting is out of range or two do not go together; the message says what to change.
    """

    model: str
    data: str
    format: str = "auto"
    split: str = "train"
    limit: int | None = None
    objectives: tuple[str, ...] = ()
    on_error: Literal["raise", "skip"] = "raise"
    held_out: float = 0.1
    data_seed: int = 0
    template: Literal["auto", "chat", "plain"] = "auto"
    max_length: int = 1024
    min_prompt: int | None = None
    method: str = "weight-cos-dpo"
    conditioning: Literal["hyper-prompt", "lora-mixture", "text"] = "hyper-prompt"
    positions: Literal["hf", "paper"] = "hf"
    virtual_tokens: int = 8
    prompt_rank: int = 4
    prompt_text: str | None = None
    lora_rank: int = 4
    lora_alpha: float = 8.0
    lora_targets: tuple[str, ...] = ("all-linear",)
    loss: str = "listnet"
    labels: tuple[str, ...] = ("auto",)
    label_temperature: tuple[float, ...] = (1.0,)
    partial: Literal["drop", "keep"] = "drop"
    ties: Literal["breslow", "efron", "exact", "random"] = "breslow"
    last_group: Literal["charged", "free"] = "charged"
    top_k: int | None = None
    label_smoothing: float = 0.0
    beta: tuple[float, ...] = (0.1,)
    beta_range: tuple[float, float] = (0.67, 1.5)
    alpha: float = 0.5
    weights_per: Literal["list", "step"] = "list"
    penalty: float = 0.0
    penalty_sign: Literal["as_printed", "cosmos"] = "as_printed"
    reference: str = "auto"
    steps: int | None = None
    lists_per_batch: int = 16
    accumulation: int = 1
    learning_rate: float = 2e-4
    prompt_learning_rate: float | None = None
    weight_decay: float = 0.0
    warmup: int | None = None
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    gradient_clip: float = 1.0
    gradient_checkpointing: bool = False
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: str | None = None
    packing: bool = False
    points: int | None = None
    scales: tuple[float, ...] = (0.5, 2.0)
    reference_point: tuple[float, ...] = ()
    bootstrap: int = 1000
    tokens_per_batch: int = 8192
    samples: int = 3
    sample_tokens: int = 64
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 100
    tensorboard: bool = False
    device: Literal["auto", "cpu"] = "auto"

    def __post_init__(self) -> None:
        check_bounds(self)
        for name, what in (("model", "a language model"), ("data", "preference data")):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing; name {what}, a path or a name on the Hugging Face hub")
        if self.prompt_text is not None and (fault := lone_surrogate(self.prompt_text)):
            raise ValueError(f"prompt_text {fault}; write it in UTF-8")
        # A run must find its model and data again from any directory: what exists as a path becomes absolute.
        for name in ("model", "data", "reference"):
            value = str(getattr(self, name))
            is_path = name != "reference" or value not in ("auto", "self", "precomputed")
            object.__setattr__(self, name, located_if_there(value) if is_path else value)
        for name in ("labels", "label_temperature", "beta", "lora_targets", "objectives", "reference_point", "scales"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, (str, int, float)) else tuple(value))
        self._check_choices()
        self._check_numbers()
        self._check_together()
        _ = self.training(self.steps or 1)  # its own checks come before anything is read or written

    def _check_choices(self) -> None:
        choices: dict[str, tuple[Any, ...]] = {
            "method": (*METHODS, ALL), "conditioning": CONDITIONINGS, "positions": ("hf", "paper"), "loss": LOSSES,
            "partial": ("drop", "keep"), "ties": ("breslow", "efron", "exact", "random"),
            "last_group": ("charged", "free"), "weights_per": ("list", "step"), "dtype": DTYPES,
            "penalty_sign": ("as_printed", "cosmos"), "on_error": ("raise", "skip"), "device": ("auto", "cpu"),
            "template": ("auto", "chat", "plain"),
        }  # fmt: skip
        for name, allowed in choices.items():
            check_choice(getattr(self, name), allowed, name)
        for entry in self.labels:
            check_choice(entry, LABELS, "labels")

    def _check_numbers(self) -> None:
        positive = {
            "alpha": (self.alpha,), "beta": self.beta, "beta_range": self.beta_range, "scales": self.scales,
            "label_temperature": self.label_temperature,
            "lora_alpha": (self.lora_alpha,), "reference_point": self.reference_point,
            "prompt_learning_rate": () if self.prompt_learning_rate is None else (self.prompt_learning_rate,),
        }  # fmt: skip
        for name, values in positive.items():
            if not all(math.isfinite(x) and x > 0 for x in values):
                raise ValueError(f"{name} is {' '.join(f'{x:g}' for x in values)} but must be positive and finite")
        at_least = {
            "virtual_tokens": 1, "prompt_rank": 1, "lora_rank": 0, "lists_per_batch": 1, "tokens_per_batch": 1,
            "samples": 0, "sample_tokens": 1, "bootstrap": 0, "gradient_clip": 0, "data_seed": 0, "max_length": 2,
        }  # fmt: skip
        optional = {"top_k": 1, "steps": 1, "limit": 1, "warmup": 0, "points": 1, "min_prompt": 1}
        for name, lowest in {**at_least, **optional}.items():
            value = getattr(self, name)
            if value is not None and not value >= lowest:
                raise ValueError(f"{name} is {value} but must be at least {lowest}")
        if self.prompt_rank > self.virtual_tokens:
            raise ValueError(
                f"prompt_rank is {self.prompt_rank} but the mask has {self.virtual_tokens} rows (virtual_tokens); "
                "take a smaller rank"
            )
        if len(self.beta_range) != 2 or self.beta_range[0] > self.beta_range[1]:
            raise ValueError("beta_range needs a lower and then an upper end")
        if not (self.beta and self.labels and self.label_temperature):
            raise ValueError("beta, labels and label_temperature need an entry")
        if not math.isfinite(self.penalty):
            raise ValueError(f"penalty is {self.penalty} but must be a finite number")
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"held_out is {self.held_out} but must lie between 0 and 1: a share of the prompts")
        if not 0.0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing is {self.label_smoothing} but must be at least 0 and below 0.5")

    def _check_together(self) -> None:
        if self.min_prompt is not None and self.min_prompt >= self.max_length:
            raise ValueError(f"min_prompt is {self.min_prompt} but must be less than max_length = {self.max_length}")
        if self.label_smoothing and self.loss not in ("sigmoid", "sigmoid_norm", "exo_pair", "robust", "dpop"):
            raise ValueError(
                f"label_smoothing has no part in loss {self.loss!r}; leave it out, or take loss='sigmoid' (cDPO)"
            )
        if self.loss != "listnet" and any(rate != 1 for rate in self.label_temperature):
            raise ValueError(
                f"label_temperature has no part in loss {self.loss!r}; leave it out, or take loss='listnet'"
            )
        if self.conditioning == "text":
            if self.lora_rank == 0:
                raise ValueError("conditioning='text' trains the adapters alone, so lora_rank must be at least 1")
            if self.reference == "self":
                raise ValueError(
                    "reference='self' sees the tokens of the step, but with conditioning='text' these hold the "
                    "weights, which a reference must not see; pass reference='precomputed'"
                )
        if self.conditioning == "lora-mixture":
            if self.lora_rank == 0:
                raise ValueError("conditioning='lora-mixture' mixes adapters, so lora_rank must be at least 1")
            if "temperature-cos-dpo" in self.methods:
                raise ValueError(
                    "temperature-cos-dpo is conditioned on temperatures, which conditioning='lora-mixture' cannot "
                    "take; pass conditioning='hyper-prompt', or method='weight-cos-dpo'"
                )
            if self.packing:
                raise ValueError(
                    "conditioning='lora-mixture' mixes adapters row by row, and a packed row holds many lists; pass "
                    "packing=False"
                )
        if self.packing and self.positions == "paper":
            raise ValueError("packed sequences need positions that count up; pass positions='hf' or packing=False")

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that are trained."""
        return METHODS if self.method == ALL else (self.method,)

    def training(self, steps: int) -> TrainingConfig:
        """Return the settings of a training of `steps` updates."""
        names = {f.name for f in dataclasses.fields(TrainingConfig)} & {f.name for f in dataclasses.fields(self)}
        values: dict[str, Any] = {name: getattr(self, name) for name in names - {"steps", "warmup"}}
        values["gradient_clip"] = self.gradient_clip or None
        warmup = max(1, steps // 10) if self.warmup is None else self.warmup
        return TrainingConfig(**values, steps=steps, warmup=warmup)

    def betas(self, objectives: int) -> tuple[float, ...]:
        """Return β, one for each of m objectives.

        Raises:
            ValueError: If there is neither one nor one for each objective.
        """
        return self._for_each("beta", self.beta, objectives)

    def label_modes(self, objectives: int) -> tuple[str, ...]:
        """Return how labels become targets, one entry for each of m objectives; errors as `betas`."""
        return self._for_each("labels", self.labels, objectives)

    def label_temperatures(self, objectives: int) -> tuple[float, ...]:
        """Return what labels are divided by, one entry for each of m objectives; errors as `betas`."""
        return self._for_each("label_temperature", self.label_temperature, objectives)

    def _for_each(self, name: str, values: tuple[Any, ...], objectives: int) -> tuple[Any, ...]:
        if len(values) not in (1, objectives):
            raise ValueError(
                f"{name} has {len(values)} entries but there are {objectives} objectives; "
                "pass one for all, or one for each"
            )
        return values * objectives if len(values) == 1 else values

    def resolved(self, lists: int) -> AlignConfig:
        """Return the settings with what depends on the number of training lists, where it was not given."""
        batch = min(self.lists_per_batch, lists)
        steps = max(100, 3 * math.ceil(lists / batch)) if self.steps is None else self.steps
        reference = self.reference
        if reference == "auto":
            once = self.method in CONDITIONED and steps * batch <= lists and self.conditioning != "text"
            reference = "self" if once else "precomputed"
        warmup = max(1, steps // 10) if self.warmup is None else self.warmup
        prompt_rate = self.prompt_learning_rate or 10 * self.learning_rate
        return dataclasses.replace(
            self, steps=steps, reference=reference, warmup=warmup, prompt_learning_rate=prompt_rate
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AlignConfig:
        """Read back what `to_dict` gave.

        Raises:
            ValueError: If a setting is unknown, has another type or is refused.
        """
        return settings_from(cls, values)
