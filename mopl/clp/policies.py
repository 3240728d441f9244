"""The policies of a run: what is trained on top of the language model, how it takes (w, α), files of both.

| policy              | what is trained                                            | takes (w, α) by              |
|---------------------|------------------------------------------------------------|------------------------------|
| clp, parameters     | m sets of the scope (m + 1 with several α), mixed          | `ParameterMixture`           |
| clp, lora           | m adapters, mixed in each row                              | `LoraMixture`                |
| clp, prompt         | one adapter and a `HyperPrompt`                            | virtual tokens, w only       |
| expert of a soup    | one set, or one adapter, on one reward                     | nothing                      |
| prompting           | one set, or one adapter                                    | words in front of the prompt |

A rewarded soup (Ramé et al. 2023) is a mixture whose sets are the experts: Σ w_i θ_i. For adapters that is the average
of the updates B_i A_i, so of the experts' whole parameters, and not of the factors apart. Where `train_shared` lets
experts also differ outside of the scope, all their parameters are averaged.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopl._restoring import generators_kept
from mopl.clp.config import ClpConfig
from mopl.conditioning import (
    HyperPrompt,
    HyperPromptModel,
    KLWeightCoefficients,
    LoraMixture,
    ParameterMixture,
    TextPrompt,
    TuningRecord,
    ValueHead,
)
from mopl.conditioning.causal_lm import untie_head
from mopl.conditioning.saved_models import adapter_folder, read_adapters, set_adapters
from mopl.language_models import models
from mopl.rewards.scale import RunningScale

Conditioned = ParameterMixture | LoraMixture | HyperPromptModel


class _Outside:
    """A model that is no part of the module that knows it: neither trained, saved, moved nor copied with that."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> _Outside:
        return self  # what FSDP2 shards is a copy of the policy; one reference serves both


class Policy(nn.Module):
    """A trainable policy with its reference and, if there is one, its value head.

    Args:
        model: What is trained.
        base: The language model that it started from. It is the reference of a `ParameterMixture`; any other model is
            its own, with what was trained switched off.
        config: Settings of the run.
        objectives: Names of the m rewards of the run.
        kind: `"clp"`, `"expert"`, `"prompting"` or `"rewarded-soups"`.
        value: Value head on the reference's hidden state at the end of the prompt.

    Attributes:
        single: The model is one for all trade-offs, or for one: it takes neither w nor α.
        words: It reads w (and α) in front of the prompt.
        takes_kl_weight: It is conditioned on α.
        running: The scale of the rewards where the training follows it: a part of the policy, so of its checkpoints.
    """

    running: RunningScale | None

    def __init__(
        self,
        model: Conditioned,
        base: Any,
        config: ClpConfig,
        objectives: Sequence[str],
        kind: str,
        value: ValueHead | None = None,
    ) -> None:
        super().__init__()
        self.model, self.value, self.running = model, value, None
        self._base = _Outside(None if model.has_reference else base)
        self.objectives = tuple(objectives)
        self.single, self.words = kind not in ("clp", "rewarded-soups"), kind == "prompting"
        self.takes_kl_weight = len(config.kl_weights(kind)) > 1

    @property
    def reference_head(self) -> Any:
        """The output head of the reference where it is another module than the policy's; else None."""
        if self._base.model is not None:
            return self._base.model.get_output_embeddings()
        # Adapters may have copies of it.
        return getattr(self.model.get_output_embeddings(), "original_module", None)

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return next(self.model.parameters()).device

    def arguments(self, weights: Tensor, kl_weight: Tensor) -> dict[str, Any]:  # (B, m), (B,)
        """Return the keywords that tell the model its trade-offs."""
        if self.single:
            return {"weights": torch.ones(1, device=self.device)}
        given: dict[str, Any] = {"weights": weights.to(self.device)}
        if self.takes_kl_weight and not self.words:
            given["kl_weight"] = kl_weight.to(self.device)
        return given

    def tokens(self, prompt: Sequence[int], weights: Tensor, kl_weight: float, tokenizer: Any) -> list[int]:
        """Return a prompt as this policy reads it."""
        if not self.words:
            return list(prompt)
        writer = text_prompt(self.objectives, kl_weight if self.takes_kl_weight else None)
        return writer.prepend_ids(prompt, weights, tokenizer)

    def reference(self) -> contextlib.AbstractContextManager[Any]:
        """Give the reference inside a `with` block; it takes tokens alone."""
        base = self._base.model
        return self.model.reference() if base is None else contextlib.nullcontext(base)

    def at(self, weights: Tensor, kl_weight: float) -> contextlib.AbstractContextManager[Any]:
        """Give the model of one trade-off, made once, inside a `with` block."""
        return self.model.at(*self._one(weights, kl_weight))

    def merge(self, weights: Tensor | None, kl_weight: float) -> Any:
        """Return the plain model of one trade-off, not for virtual tokens; weights (m,) are needed unless `single`."""
        model: Any = self.model
        return model.merge(*self._one(weights, kl_weight)).eval()

    def asked(self, weights: Tensor, kl_weight: float) -> dict[str, Any]:
        """Return the fields by which `mopl serve` is asked for one trade-off; weights (m,)."""
        w, alpha = self._one(weights, kl_weight)
        return {"weights": w.tolist(), **({} if alpha is None else {"kl_weight": alpha})}

    def adapter_at(self, weights: Tensor, kl_weight: float) -> tuple[Any, dict[str, Tensor]]:
        """Return one trade-off as a LoRA adapter, configuration and tensors as PEFT's files have them."""
        model: Any = self.model
        return model.adapter_at(*self._one(weights, kl_weight))

    def _one(self, weights: Any, kl_weight: float) -> tuple[Any, float | None]:
        """Return what a mixture takes of one trade-off."""
        if self.single:
            return torch.ones(1), None
        return weights, kl_weight if self.takes_kl_weight else None

    def forward(
        self,
        inputs: dict[str, Tensor],
        weights: Tensor,
        kl_weight: Tensor,
        temperature: float,
        features: Tensor | None = None,
        reference_hidden: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return log π of the targets, (B, T); the values (B,) if there is a head; the exact KL (B, T) if asked for.

        Args:
            inputs: `input_ids`, `attention_mask` and `targets`, each (B, T).
            weights: (B, m).
            kl_weight: (B,).
            temperature: divides the logits.
            features: (B, H) hidden states of the reference at the ends of the prompts, for the value head.
            reference_hidden: (B, T, H) what the reference's head gets where the targets are predicted: the KL of each
                of these positions to the reference is then taken over the whole vocabulary, without the logits.
        """
        given = self.arguments(weights, kl_weight)
        if reference_hidden is not None:
            given |= {"reference_hidden": reference_hidden, "reference_head": self.reference_head}
        output = self.model(**inputs, temperature=temperature, **given)
        value = None
        if self.value is not None:
            assert features is not None
            value = self.value(features, weights, kl_weight)
        return output.log_probs, value, output.kl


def text_prompt(objectives: Sequence[str], kl_weight: float | None = None) -> TextPrompt:
    """Return how a trade-off is written in front of a prompt."""
    more = "" if kl_weight is None else f"; KL weight {kl_weight:g}"
    return TextPrompt(tuple(objectives), f"[{{weights}}{more}]\n")


def _copy(base: Any, scope: str) -> Any:
    """Return a copy of the language model whose parameters are mixed."""
    trained = copy.deepcopy(base)
    if scope == "logits":
        untie_head(trained)
    return trained


@generators_kept()
def new_policy(base: Any, config: ClpConfig, objectives: Sequence[str], kind: str, expert: str | None = None) -> Policy:
    """Return an untrained policy around a fused, frozen language model; it computes what that does.

    Args, besides those of `Policy`:
        base: The language model. Adapters are put into it (until `release`); mixtures of parameters take a copy.
        expert: Name of an expert's reward.
    """
    scope, kl_weights = config.scope_of(kind), config.kl_weights(kind)
    names = tuple(objectives) if kind == "clp" else (expert or kind,)
    record = TuningRecord(names, beta=list(kl_weights) if len(kl_weights) > 1 else config.kl_weight[0])
    rule = None
    if kind == "clp" and len(kl_weights) > 1:
        rule = KLWeightCoefficients(min(kl_weights), config.kl_form, anchor=scope != "lora-mixture")
    torch.manual_seed(config.seed)  # every model of a kind starts from the same parameters
    hidden = base.get_input_embeddings().weight.shape[1]
    model: Conditioned
    if scope == "lora-mixture":
        with models.quiet():
            model = LoraMixture(base, len(names), config=models.lora_config(config), coefficients=rule, record=record)
    elif scope == "hyper-prompt":
        wrapped = models.with_adapter(base, config)
        prompt = HyperPrompt(len(names), config.virtual_tokens, config.prompt_rank, hidden)
        model = HyperPromptModel(wrapped, prompt, record=record)
    else:
        trained = copy.deepcopy(base).requires_grad_(config.train_shared)
        model = ParameterMixture(trained, len(names), scope=scope, coefficients=rule, record=record)
    value = ValueHead(hidden, len(objectives)) if config.baseline == "value" else None
    return Policy(model, base, config, objectives, kind, value)


def release(policy: Policy) -> None:
    """Take adapters out of the language model again."""
    models.release(policy.model)


def load_policy(folder: Path, base: Any, config: ClpConfig, objectives: Sequence[str], kind: str) -> Policy:
    """Return a policy that was trained, or the soup of `save_soup`, in evaluation mode; arguments as in `Policy`.

    Raises:
        FileNotFoundError: If the folder holds no model.
    """
    scope = config.scope_of(kind)
    around: dict[str, type[Conditioned]] = {"lora-mixture": LoraMixture, "hyper-prompt": HyperPromptModel}
    own = around.get(scope)
    with models.quiet():
        model = (own or ParameterMixture).from_pretrained(folder, base if own else _copy(base, scope))
    return Policy(model, base, config, objectives, kind).eval()


@torch.no_grad()
def save_soup(folders: Sequence[Path], target: Path, base: Any, config: ClpConfig, objectives: Sequence[str]) -> None:
    """Write the mixture whose sets are the experts of these folders, one for each objective."""
    record = TuningRecord(tuple(objectives), beta=config.kl_weight[0])
    scope = config.scope_of("rewarded-soups")
    if scope == "lora-mixture":
        with models.quiet():
            soup = LoraMixture(base, len(objectives), config=models.lora_config(config), record=record)
            paths = {name: adapter_folder(path, name) for name, path in zip(soup.adapters, folders, strict=True)}
            try:
                set_adapters(soup.model, read_adapters(soup.model, paths))
                soup.save_pretrained(target)
            finally:
                models.release(soup)
        return
    whole = "full" if config.train_shared else scope
    mixture = ParameterMixture(_copy(base, scope), len(objectives), scope=whole, record=record)
    for own, folder in zip(mixture.sets, folders, strict=True):
        expert = ParameterMixture.from_pretrained(folder, _copy(base, scope)).model
        for name, parameter in zip(mixture.names, own, strict=True):
            parameter.copy_(expert.get_parameter(name))
    mixture.save_pretrained(target)
