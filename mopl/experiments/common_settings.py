"""Settings that mean the same in several applications, and the names that these share."""

import math
from typing import TYPE_CHECKING, Any, Literal

from mopl._counted import counted, there_are
from mopl._extras import TRACKERS
from mopl.experiments.methods import METHODS
from mopl.experiments.resume_settings import located_if_there
from mopl.experiments.settings import (
    Settings,
    in_data,
    in_evaluation,
    in_method,
    in_model,
    in_training,
    setting,
    settings,
    settings_of,
)

if TYPE_CHECKING:
    from mopl.language_models.tokenization import ListTokenizer
    from mopl.training import TrainingConfig

ALL = "all"  # of the methods


@settings
class RunSettings(Settings):
    """What every run has."""

    @property
    def grid_density(self) -> Literal["dense", "medium"]:
        """The density of the evaluation grid where no number of points is given; see `mopl.pareto.weight_grid`."""
        return "medium"

    seed: int = setting(
        0, "random seed for initialisation, batches, trade-offs, sampling and the bootstrap", at_least=0
    )
    device: Literal["auto", "cpu"] = setting("auto", "where to compute; auto uses a GPU if there is one")
    log_every: int = setting(10, "steps between lines of the log", at_least=1, metavar="STEPS")
    checkpoint_every: int = setting(100, "steps between checkpoints", at_least=0, metavar="STEPS")
    log_with: tuple[str, ...] = setting(
        (),
        "experiment trackers that also receive the log",
        unset="none",
        choices=TRACKERS,
        old="tensorboard",
        metavar="TRACKER",
    )
    data_seed: int = in_data(
        0, "random seed for the data split, which does not depend on seed", at_least=0, metavar="SEED"
    )
    concentration: float = in_method(
        0.5,
        "concentration of the Dirichlet distribution of the weights; smaller values train the ends of the front more",
        positive=True,
        old="alpha",
    )
    accumulation: int = in_training(
        1,
        "number of micro-batches that a batch is split into; the result does not depend on it",
        at_least=1,
        metavar="PARTS",
    )
    learning_rate: float = in_training(1e-3, positive=True, metavar="RATE")
    weight_decay: float = in_training(0.0, "decoupled weight decay", at_least=0)
    warmup: int | None = in_training(0, "steps of linear warm-up", at_least=0, metavar="STEPS")
    schedule: Literal["constant", "linear", "cosine"] = in_training(
        "cosine", "schedule of the learning rate after the warm-up"
    )
    gradient_clip: float = in_training(
        1.0, "maximum norm of the gradient; 0 for no clipping", at_least=0, metavar="NORM"
    )
    points: int | None = in_evaluation(
        None,
        "number of weight vectors in the evaluation grid",
        unset="11, 10, 11 for 2, 3, 4 objectives, 12 or more above",
        at_least=1,
    )
    bootstrap: int = in_evaluation(
        1000, "bootstrap resamples for confidence intervals; 0 for none", at_least=0, metavar="SAMPLES"
    )

    def training(self, steps: int | None = None, **changes: Any) -> "TrainingConfig":
        """Return the settings of a training of `steps` updates, by default of its own number, with other changes."""
        from mopl.training import TrainingConfig

        names = TrainingConfig.__dataclass_fields__.keys() & settings_of(type(self)).keys()
        values = {name: getattr(self, name) for name in names} | {"gradient_clip": self.gradient_clip or None}
        return TrainingConfig(**{**values, **({} if steps is None else {"steps": steps}), **changes})

    def for_each(self, name: str, objectives: int) -> tuple[Any, ...]:
        """Return the entries of a setting, one for each of m objectives; none where it has none.

        Raises:
            ValueError: If there is neither one nor one for each objective.
        """
        values = getattr(self, name)
        if len(values) not in (0, 1, objectives):
            raise ValueError(
                f"{name} has {counted(len(values), 'entry')} but {there_are(objectives, 'objective')}; "
                "pass one for all objectives, or one per objective"
            )
        return values * objectives if len(values) == 1 else values


@settings
class CosDpoSettings(RunSettings):
    """What COS-DPO and its baselines have, on items or on responses."""

    method: str = in_method(
        "weight-cos-dpo",
        "method to train; all trains every one and compares them",
        choices=(*METHODS, ALL),
        metavar="METHOD",
    )
    ties: Literal["breslow", "efron", "exact", "random"] = in_method("breslow", "how Plackett-Luce treats equal labels")
    last_group: Literal["charged", "free"] = in_method(
        "charged",
        "how Plackett-Luce treats the items with the lowest label; charged: as one more tied group; free: as unranked, "
        "which suits sparse labels",
    )
    top_k: int | None = in_method(
        None, "number of top ranks that Plackett-Luce counts", unset="all", at_least=1, metavar="K"
    )
    beta: tuple[float, ...] = in_method(
        (0.1,),
        "β, the factor of scores or log-ratios in the loss: one number for all objectives, or one per objective",
        positive=True,
        nonempty=True,
    )
    beta_range: tuple[float, float] = in_method(
        (0.67, 1.5),
        "range that temperature-cos-dpo draws β from, as factors of beta (section 4.1)",
        positive=True,
        metavar=("LOW", "HIGH"),
    )
    weights_per: Literal["list", "step"] = in_method(
        "list", "draw weights for each list, or one vector per step as in the paper's algorithm 1"
    )
    penalty: float = in_method(0.0, "factor λ of the cosine penalty (appendix A.2)")
    penalty_sign: Literal["as_printed", "cosmos"] = in_method(
        "as_printed", "sign of the cosine penalty: the paper prints one and describes the other"
    )
    steps: int | None = in_training(
        None, "optimizer steps of each trained model", unset="three epochs, at least 100", at_least=0
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = in_training("no", "autocast precision of the forward pass")
    scales: tuple[float, ...] = in_evaluation(
        (0.5, 2.0),
        "distances from the base model, c of equation (14), at which the front is evaluated in addition to 1",
        positive=True,
        metavar="C",
    )

    def check_together(self) -> None:
        """Raise if two settings do not go together."""
        super().check_together()
        if self.beta_range[0] > self.beta_range[1]:
            raise ValueError("beta_range needs a lower and then an upper end")

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that are trained."""
        return METHODS if self.method == ALL else (self.method,)

    @property
    def all_scales(self) -> tuple[float, ...]:
        """The distances from the base model at which a front is evaluated: 1, as trained, and the other `scales`."""
        return (1.0, *(c for c in self.scales if c != 1.0))

    def betas(self, objectives: int) -> tuple[float, ...]:
        """Return β, one for each of m objectives; errors as `for_each`."""
        return self.for_each("beta", objectives)


@settings
class LanguageModelSettings(RunSettings):
    """What every run on a language model has."""

    model: str = setting(
        help="a causal language model: a directory (of a model, or of a PEFT adapter, which is merged into its base "
        "model), or a name on the Hugging Face hub",
        missing="name a language model, a path or a name on the Hugging Face hub",
        convert=located_if_there,
        group="model",
        metavar="MODEL",
        kw_only=False,
    )
    data: str = setting(
        help="a file, a directory, or a name on the Hugging Face hub",
        convert=located_if_there,
        group="data",
        metavar="DATA",
        kw_only=False,
    )
    limit: int | None = in_data(None, "maximum number of rows to read", unset="all", at_least=1)
    on_error: Literal["raise", "skip"] = in_data(
        "raise", "how to handle unusable rows: raise an error, or skip them and report how many"
    )
    held_out: float = in_data(0.1, "share of the prompts held out for evaluation", above=0, below=1, metavar="SHARE")
    template: Literal["auto", "chat", "plain"] = in_data(
        "auto", "how prompts become text; auto: chat if the tokenizer has a chat template"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = in_model(
        "auto", "data type of the frozen model; auto: as it is stored"
    )
    attention: str | None = in_model(
        None,
        "attention implementation (attn_implementation in transformers)",
        unset="that of transformers",
        metavar="NAME",
    )
    virtual_tokens: int = in_model(8, "number of virtual tokens of the prompt (section 4.2)", at_least=1, metavar="K")
    prompt_rank: int = in_model(4, "rank of the prompt's mask (section 4.2)", at_least=1, metavar="R")
    lora_rank: int = in_model(4, "rank of the LoRA adapters", at_least=1, metavar="R")
    lora_alpha: float = in_model(8.0, "alpha of the LoRA adapters, which are scaled by alpha / rank", positive=True)
    lora_rslora: bool = in_model(False, "scale the LoRA adapters by alpha / sqrt(rank) (rsLoRA), not alpha / rank")
    lora_dora: bool = in_model(False, "also train the norm of each row of the adapted weights (DoRA)")
    lora_rank_pattern: tuple[str, ...] = in_model(
        (),
        "ranks of some modules, as PEFT's rank_pattern: the end of a module's name, or a regular expression for it",
        unset="none",
        metavar="MODULE=RANK",
    )
    lora_alpha_pattern: tuple[str, ...] = in_model(
        (), "alpha of some modules, as PEFT's alpha_pattern", unset="none", metavar="MODULE=ALPHA"
    )
    lora_targets: tuple[str, ...] = in_model(
        ("all-linear",),
        "modules that get adapters, as PEFT's target_modules; all-linear: all linear layers but the output head",
        nonempty=True,
        metavar="MODULE",
    )
    lora_modules_to_save: tuple[str, ...] = in_model(
        (),
        "modules that are trained whole beside the adapters, such as lm_head, as PEFT's modules_to_save; where "
        "adapters are mixed, a copy for each objective",
        unset="none",
        metavar="MODULE",
    )
    reference_point: tuple[float, ...] = in_evaluation(
        (), "reference point of the hypervolume, one number for each objective"
    )
    samples: int = in_evaluation(3, at_least=0, metavar="PROMPTS")

    def check_together(self) -> None:
        """Raise if two settings do not go together."""
        super().check_together()
        if self.prompt_rank > self.virtual_tokens:
            raise ValueError(
                f"prompt_rank is {self.prompt_rank} but the mask has {self.virtual_tokens} rows (virtual_tokens); "
                "take a smaller rank"
            )
        for name in ("lora_rank_pattern", "lora_alpha_pattern"):
            self.pattern(name)

    @property
    def adapter_options(self) -> tuple[str, ...]:
        """Names of the settings of adapters, besides ranks and targets, that have another value than their default."""
        names = (
            "lora_rslora", "lora_dora", "lora_rank_pattern", "lora_alpha_pattern", "lora_modules_to_save",
        )  # fmt: skip
        return tuple(name for name in names if getattr(self, name))

    def pattern(self, name: str) -> dict[str, int | float]:
        """Return the numbers of a setting of `MODULE=NUMBER` entries, by module.

        Raises:
            ValueError: If an entry is not such a text, or its number not positive, or no integer where it is a rank.
        """
        kind, found = int if "rank" in name else float, {}
        for entry in getattr(self, name):
            module, _, number = entry.rpartition("=")
            try:
                found[module] = kind(number)
            except ValueError:
                module = ""
            if not module or not 0 < found[module] < math.inf:
                what = "a rank, a positive integer" if kind is int else "a positive number"
                raise ValueError(f"{name} has {entry!r} but an entry is MODULE=NUMBER, with {what}, such as q_proj=16")
        return found

    def load_tokenizer(self) -> Any:
        """Return the tokenizer of the language model."""
        from mopl.language_models.models import load_tokenizer

        return load_tokenizer(self.model)

    def list_tokenizer(self, tokenizer: Any) -> "ListTokenizer":
        """Return how the run turns texts into tokens."""
        raise NotImplementedError

    def load_model(self) -> Any:
        """Return the language model, fused, without dropout."""
        from mopl.language_models.models import load_causal_lm

        return load_causal_lm(self.model, dtype=self.dtype, attention=self.attention)
