"""The settings of `mopl align` in one dataclass: what is checked before anything is read, loaded or written."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from mopl._lines import lone_surrogate
from mopl.experiments.common_settings import ALL, CosDpoSettings, LanguageModelSettings
from mopl.experiments.methods import CONDITIONED, LANGUAGE_METHODS, LIST_LOSSES, METHODS, PAIR_LOSSES, PER_TOKEN, TABLE
from mopl.experiments.resume_settings import located, located_if_there
from mopl.experiments.settings import in_data, in_evaluation, in_method, in_model, in_training, setting, settings

if TYPE_CHECKING:
    from typing_extensions import Self

    from mopl.language_models.tokenization import ListTokenizer
    from mopl.training import TrainingConfig

__all__ = ["ALL", "CONDITIONED", "LIST_LOSSES", "LOSSES", "METHODS", "PAIR_LOSSES", "PER_TOKEN", "AlignConfig"]

LOSSES = (*LIST_LOSSES, *PAIR_LOSSES)


def _located_reference(name: str) -> str:
    return name if name in ("auto", "self", "precomputed") else located_if_there(name)


@settings
class AlignConfig(CosDpoSettings, LanguageModelSettings):
    """Settings of an alignment run. Every default is ours unless a section of the paper (Ren et al.) is named."""

    data: str = setting(
        help="preference data: a file, a directory, or a name on the Hugging Face hub",
        missing="name preference data, a path or a name on the Hugging Face hub",
        kw_only=False,
    )
    format: str = in_data("auto", "format of the data; auto: recognised by its columns")
    split: str = in_data("train", "split of a directory or of a data set on the hub")
    objectives: tuple[str, ...] = in_data(
        (), "names of the objectives, in the order of the weights", unset="all", metavar="NAME"
    )
    max_length: int = in_data(
        1024, "maximum number of tokens of prompt and response together", at_least=2, metavar="TOKENS"
    )
    min_prompt: int | None = in_data(
        None,
        "number of tokens that a prompt is never truncated below",
        unset="a quarter of max_length",
        at_least=1,
        metavar="TOKENS",
    )
    conditioning: Literal["hyper-prompt", "lora-mixture", "text"] = in_model(
        "hyper-prompt",
        "how weights enter the model of COS-DPO: virtual tokens (section 4.2); a set of adapters for each objective, "
        "mixed by the weights; or words",
    )
    positions: Literal["hf", "paper"] = in_model(
        "hf", "positions of virtual tokens; see `mopl.conditioning.HyperPromptModel`"
    )
    prompt_text: str | None = in_model(
        None,
        "words whose embeddings initialise the virtual tokens, truncated or repeated to fit",
        unset="small random vectors",
        metavar="WORDS",
    )
    lora_rank: int = setting(4, "rank of the LoRA adapters (section 4.2); 0 for none", at_least=0)
    method: str = setting(
        "weight-cos-dpo",
        "method to train; all trains every one but distill and compares them",
        choices=(*LANGUAGE_METHODS, ALL),
    )
    loss: str = in_method(
        "listnet",
        "listnet (the paper's; DPO on pairs), plackett-luce, or for pairs a type of `mopl.losses.bradley_terry`",
        choices=LOSSES,
        metavar="LOSS",
    )
    labels: tuple[Literal["auto", "l1", "softmax"], ...] = in_method(
        ("auto",),
        "how ListNet turns labels into targets (section 2.2), for all objectives or per objective; auto: l1 where all "
        "are 0 or 1, else softmax",
        nonempty=True,
    )
    label_temperature: tuple[float, ...] = in_method(
        (1.0,),
        "divides labels before their softmax: one number for all objectives, or one per objective",
        positive=True,
        nonempty=True,
        metavar="T",
    )
    partial: Literal["drop", "keep"] = in_method(
        "drop",
        "a list that an objective labels only in part: drop the objective for it, or keep the labelled part",
    )
    label_smoothing: float = in_method(
        0.0,
        "assumed rate of flipped preferences, for the pair losses that support it",
        at_least=0,
        below=0.5,
        metavar="RATE",
    )
    reference: str = in_method(
        "auto",
        "log-probabilities of the reference: self, computed in every step; precomputed, once; or another model; auto: "
        "once if lists are seen more than once or there is a reference_store",
        convert=_located_reference,
        metavar="HOW",
    )
    reference_store: str | None = in_method(
        None,
        "folder in which runs, trainers and other programs share log-probabilities of references",
        unset="the run's own",
        convert=located,
        metavar="FOLDER",
    )
    teachers: tuple[str, ...] = in_method(
        (),
        "teachers of distill, one for each objective in their order: directories (of a model, of a PEFT adapter, of a "
        "model or an expert of mopl align), or names on the Hugging Face hub",
        unset="the experts of dpo-soup, which the run trains first",
        convert=located_if_there,
        metavar="MODEL",
    )
    distill_beta: float = in_method(
        0.5,
        "weight of the teacher in the generalised Jensen-Shannon divergence of distill; 0: KL from teacher to student "
        "(forward), 1: KL from student to teacher (reverse)",
        at_least=0,
        at_most=1,
        metavar="BETA",
    )
    distill_temperature: float = in_method(
        1.0, "divides the logits of teachers and student in the divergence of distill", positive=True, metavar="T"
    )
    distill_on_policy: float = in_method(
        0.0,
        "share of the steps of distill that learn from the student's own answers to the prompts, sampled at their "
        "weights, and not from the responses of the data (λ of GKD)",
        at_least=0,
        at_most=1,
        metavar="SHARE",
    )
    distill_tokens: int = in_method(
        64, "maximum number of tokens of the student's own answers in distill", at_least=1, metavar="TOKENS"
    )
    steps: int | None = setting(None, unset="3 epochs, at least 100", at_least=1)
    lists_per_batch: int = in_training(16, "lists per optimizer step", at_least=1, metavar="LISTS")
    learning_rate: float = setting(2e-4, "learning rate of the adapters")
    prompt_learning_rate: float | None = in_training(
        None,
        "learning rate of the virtual tokens",
        unset="10 times that of the adapters",
        positive=True,
        metavar="RATE",
    )
    warmup: int | None = setting(None, unset="a tenth of the steps")
    gradient_checkpointing: bool = in_training(
        False, "recompute activations in the backward pass: less memory, about a third more time"
    )
    packing: bool = in_training(
        False,
        "pack each batch into one row without padding; needs an attention implementation that keeps packed sequences "
        "apart",
    )
    reference_point: tuple[float, ...] = setting(
        (), unset="1.1 / ln 2 times the loss of the untrained model", positive=True, metavar="LOSS"
    )
    tokens_per_batch: int = in_evaluation(
        8192, "maximum number of tokens of a forward pass outside training", at_least=1, metavar="TOKENS"
    )
    samples: int = setting(3, "number of held-out prompts that are answered at every point of the grid")
    sample_tokens: int = in_evaluation(
        64, "maximum number of tokens of an answer to a held-out prompt", at_least=1, metavar="TOKENS"
    )

    def check_together(self) -> None:
        """Check the settings with one another, as making a configuration does.

        Raises:
            ValueError: If two settings do not go together; the message says which to change.
        """
        super().check_together()
        if self.prompt_text is not None and (fault := lone_surrogate(self.prompt_text)):
            raise ValueError(f"prompt_text {fault}; write it in UTF-8")
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
        if self.conditioning != "hyper-prompt" and self.lora_rank == 0:
            raise ValueError(f"conditioning={self.conditioning!r} trains adapters, so lora_rank must be at least 1")
        if self.lora_rank == 0 and self.adapter_options:
            raise ValueError(
                f"{self.adapter_options[0]} is about adapters, which lora_rank=0 leaves out; raise lora_rank"
            )
        if self.conditioning == "text" and self.reference == "self":
            raise ValueError(
                "reference='self' sees the tokens of the step, but with conditioning='text' these hold the weights, "
                "which a reference must not see; pass reference='precomputed'"
            )
        if self.conditioning == "lora-mixture" and "temperature-cos-dpo" in self.methods:
            raise ValueError(
                "temperature-cos-dpo is conditioned on β, which conditioning='lora-mixture' cannot "
                "take; pass conditioning='hyper-prompt', or method='weight-cos-dpo'"
            )
        own = ("teachers", "distill_beta", "distill_temperature", "distill_on_policy", "distill_tokens")
        for name in () if self.distils else own:
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"{name} has no part in method {self.method!r}; leave it out, or take method='distill'"
                )
        if self.distils and not self.distill_on_policy and self.distill_tokens != type(self).distill_tokens:
            raise ValueError(
                "distill_tokens is about the student's own answers, which distill_on_policy=0 leaves out; raise "
                "distill_on_policy"
            )
        if self.teachers and self.reference == "self":
            raise ValueError(
                "reference='self' is computed in the steps, but those of distill with teachers see the teachers alone; "
                "leave it out, or pass reference='precomputed'"
            )
        if self.packing and self.positions == "paper":
            raise ValueError("packed sequences need positions that count up; pass positions='hf' or packing=False")

    @property
    def distils(self) -> bool:
        """Whether a student learns from teachers."""
        return any(TABLE[name].distils for name in self.methods)

    def check_teachers(self, objectives: Sequence[str]) -> None:
        """Check that there are no teachers, or one for each objective.

        Args:
            objectives: Names of the m objectives.

        Raises:
            ValueError: If there are others.
        """
        if len(self.teachers) not in (0, len(objectives)):
            raise ValueError(
                f"--teachers names {len(self.teachers)} ({', '.join(self.teachers)}) but there are {len(objectives)} "
                f"objectives ({', '.join(objectives)}); pass one for each, in this order, or none for "
                "the run's own experts"
            )

    def label_modes(self, objectives: int) -> tuple[str, ...]:
        """Return how labels become targets, one entry for each objective; errors as `betas`.

        Args:
            objectives: m, how many objectives there are.
        """
        return self.for_each("labels", objectives)

    def label_temperatures(self, objectives: int) -> tuple[float, ...]:
        """Return what labels are divided by, one entry for each objective; errors as `betas`.

        Args:
            objectives: m, how many objectives there are.
        """
        return self.for_each("label_temperature", objectives)

    def training(self, steps: int | None = None, **changes: Any) -> "TrainingConfig":
        """Return the settings of a training.

        Args:
            steps: Updates; by default those of the configuration.
            **changes: Settings of `mopl.training.TrainingConfig` that are to be others.
        """
        count = self.steps if steps is None else steps
        return super().training(count, **{"warmup": self._warmup(count), **changes})

    def _warmup(self, steps: int | None) -> int | None:
        return max(1, steps // 10) if self.warmup is None and steps is not None else self.warmup

    def list_tokenizer(self, tokenizer: Any) -> "ListTokenizer":
        """Return how the run turns texts into tokens.

        Args:
            tokenizer: A tokenizer of transformers.
        """
        from mopl.language_models.tokenization import ListTokenizer

        return ListTokenizer(
            tokenizer, max_length=self.max_length, min_prompt=self.min_prompt, template=self.template
        )  # fmt: skip

    def resolved(self, lists: int) -> "Self":
        """Return the settings with what depends on the number of training lists, where it was not given.

        Args:
            lists: How many lists there are for training.
        """
        batch = min(self.lists_per_batch, lists)
        steps = max(100, 3 * math.ceil(lists / batch)) if self.steps is None else self.steps
        reference = self.reference
        if reference == "auto":
            own = self.method in CONDITIONED and not TABLE[self.method].distils
            once = own and steps * batch <= lists and self.conditioning != "text"
            reference = "self" if once and self.reference_store is None else "precomputed"
        return dataclasses.replace(
            self,
            steps=steps,
            reference=reference,
            warmup=self._warmup(steps),
            prompt_learning_rate=self.prompt_learning_rate or 10 * self.learning_rate,
        )
