"""The ranker conditioned on a trade-off: a transformer over a list, beside the base model that it stays close to.

Shapes: `B` lists of `K` items with `F` features, `m` objectives.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor, nn

from mopl import steering
from mopl._arguments import check_choice, check_positive, readable
from mopl._bounds import check_bounds
from mopl._counted import counted
from mopl._records import settings_from
from mopl._renamed import renamed_attribute, renamed_in_methods
from mopl.conditioning import ConcatCondition, check_weights
from mopl.ranking.mixture import mix_objectives
from mopl.ranking.transformer import ListTransformer, NetworkRecord, load_model_folder, save_model_folder

Parametrisation = Literal["scratch", "augment"]
PARAMETRISATIONS = ("scratch", "augment")
Conditioning = Literal["concat", "heads", "mixture"]
CONDITIONINGS = ("concat", "heads", "mixture")


@renamed_in_methods("__init__", temperature="takes_beta")
@dataclass(frozen=True)
class RankingModelConfig:
    """Settings of a `RankingModel`.

    Args:
        features: F.
        objectives: Names of the m auxiliary objectives.
        hidden: Width of the network.
        layers: Number of its blocks.
        heads: Its attention heads.
        feedforward: Width of its feed-forward layers; `hidden` by default.
        dropout: Probability of dropout.
        parametrisation: `"scratch"`: the network gives the scores; `"augment"`: it gives what is added to the base
            model's scores, and starts at 0 (COS-DPO, appendix A.6.3).
        conditioned: Whether the model takes weights; false for a model of one fixed trade-off.
        takes_beta: Whether β / ‖β‖₁ is appended to the features too.
        conditioning: `"concat"`: weights are appended to the features (COS-DPO, section 4.1); `"heads"`: the network
            also has an output for each objective, and an item's score is their sum with the weights. Then weights have
            their influence from the first step on, which saves steps; `"mixture"`: the network does not see the
            weights. It has an output for each objective, and the scores are the mixture of what these want that is
            best for weighted losses, see `mopl.ranking.mixture`.
        mixture_beta: β of the training, one for each objective, by which `"mixture"` mixes; 1 each by default. A model
            that takes β mixes by the β / ‖β‖₁ that it is given.
    """

    features: int
    objectives: tuple[str, ...]
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    feedforward: int | None = None
    dropout: float = 0.0
    parametrisation: Parametrisation = "scratch"
    conditioned: bool = True
    takes_beta: bool = False
    conditioning: Conditioning = "concat"
    mixture_beta: tuple[float, ...] = ()

    temperature = renamed_attribute("RankingModelConfig.temperature", "takes_beta")

    def __post_init__(self) -> None:
        check_bounds(self)
        check_choice(self.parametrisation, PARAMETRISATIONS, "parametrisation")
        check_choice(self.conditioning, CONDITIONINGS, "conditioning")
        if self.takes_beta and not self.conditioned:
            raise ValueError("takes_beta=True needs conditioned=True: β is appended beside the weights")
        if self.mixture_beta and (
            len(self.mixture_beta) != len(self.objectives) or not all(0 < b < math.inf for b in self.mixture_beta)
        ):
            raise ValueError(
                f"mixture_beta is {' '.join(f'{b:g}' for b in self.mixture_beta)} but must be β of the training, a "
                f"positive number for each of {', '.join(self.objectives)}; leave it out for 1 each"
            )


@renamed_in_methods("forward", "score", temperature="beta")
class RankingModel(nn.Module):
    """A ranker that takes the trade-off as an input, together with the frozen base model that it stays close to.

    The weights (and β / ‖β‖₁) are appended to the features of every item, so the network has exactly
    m × hidden (2 m × hidden) parameters more than one without them (COS-DPO, section 4.1); with
    `conditioning="heads"` another (m - 1) × hidden. With `"mixture"` it has (m - 1) × hidden more, and m × hidden for
    β.

    Args:
        config: Settings.
        base: The base model, frozen here; its scores are the reference s0.
    """

    def __init__(self, config: RankingModelConfig, base: ListTransformer) -> None:
        super().__init__()
        if base.settings["features"] != config.features:
            raise ValueError(
                f"the base model was trained on {counted(base.settings['features'], 'feature')} but the data has "
                f"{config.features}; train a base model on this data"
            )
        self.config = config
        m = len(config.objectives)
        self.mixes = config.conditioned and config.conditioning == "mixture" and m > 1
        self.condition = None
        if config.conditioned:
            appended = config.conditioning != "mixture"
            self.condition = ConcatCondition(m, takes_beta=config.takes_beta, takes_weights=appended)
        extra = 0 if self.condition is None else self.condition.extra_features
        self.outputs = m if config.conditioned and config.conditioning != "concat" else 1
        self.network = ListTransformer(
            config.features + extra, config.hidden, config.layers, config.heads, config.feedforward, config.dropout,
            outputs=self.outputs,
        )  # fmt: skip
        if self.outputs > 1:
            # The weights choose among the outputs. Features that differed at random from one trade-off to the next
            # would only hide from each other what the lists of a step have to say about the same items.
            nn.init.zeros_(self.network.input.weight[:, config.features :])
        elif extra:
            # Weights on a simplex are small beside normalised features; with the usual initialisation a change of the
            # trade-off would hardly move the first layer, and training would learn the average trade-off first.
            nn.init.normal_(self.network.input.weight[:, config.features :])
        if config.parametrisation == "augment":
            nn.init.zeros_(self.network.output.weight)  # training starts at the base model
        self.base = base.requires_grad_(False)

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters: the network without the frozen base model."""
        return sum(p.numel() for p in self.network.parameters())

    def train(self, mode: bool = True) -> RankingModel:
        """Set the mode of the network; the frozen base model stays in evaluation mode."""
        super().train(mode)
        self.base.eval()
        return self

    def reference(self, features: Tensor, mask: Tensor | None = None) -> Tensor:  # (B, K, F) -> (B, K)
        """Return the base model's scores s0, (B, K), without a gradient."""
        with torch.no_grad():
            return self.base(features, mask)

    def forward(
        self,
        features: Tensor,  # (B, K, F)
        weights: Tensor | None = None,  # (m,) or (B, m)
        *,
        beta: Tensor | None = None,  # (m,) or (B, m)
        mask: Tensor | None = None,  # (B, K) bool
        reference: Tensor | None = None,  # (B, K)
        alone: bool = False,
    ) -> Tensor:  # (B, K), or (B, 1 + m, K) with alone
        """Return the scores that the training loss sees.

        Args:
            features: (B, K, F).
            weights: w on the simplex; required if and only if the model is conditioned.
            beta: β; only β / ‖β‖₁ reaches the network. Required if and only if it is conditioned on it.
            mask: (B, K), true where an item exists.
            reference: s0, if it is known already; it is computed where it is needed otherwise.
            alone: Also return the scores of each objective, those for its weight of 1, after the scores for the
                weights: (B, 1 + m, K). Only a model that mixes its outputs has them without another pass.

        Returns:
            Scores (B, K), 0 in masked places. A model conditioned on β gives the raw output of equation (15), the
            scores at a β that sums to 1; `score` gives those at β itself.

        Raises:
            ValueError: If weights or β are missing, not expected or of a wrong shape.
        """
        if self.condition is not None:
            if weights is None:
                raise ValueError(f"weights are missing; pass one for each of {', '.join(self.config.objectives)}")
            inputs = self.condition(features, weights, beta)
        elif beta is not None:
            raise ValueError("beta was passed to a model that is not conditioned on it")
        else:
            inputs = features
        if alone and not self.mixes:
            raise ValueError("alone=True was passed to a model that does not mix; it needs conditioning='mixture'")
        found = self.network(inputs, mask)
        augment = self.config.parametrisation == "augment"
        base = reference
        if base is None and (augment or self.mixes):
            base = self.reference(features, mask)
        if not self.mixes:
            if self.outputs > 1 and weights is not None:
                found = (found * weights.to(found)[..., None, :]).sum(-1)
            return found + base if augment else found
        assert base is not None and weights is not None
        moved = found if augment else found - base[..., None]  # h_j - s0
        mixed = mix_objectives(moved, weights, self._mixing(beta).to(found.device), mask)
        if alone:
            mixed, base = torch.cat([mixed[:, None], moved.movedim(-1, 1)], 1), base[:, None]
        return mixed + base

    def _mixing(self, beta: Tensor | None) -> Tensor:
        """Return the β that outputs are mixed by, (m,) or (B, m)."""
        if beta is not None:
            return beta / beta.sum(-1, keepdim=True)
        return torch.tensor(self.config.mixture_beta or [1.0] * len(self.config.objectives))

    @torch.no_grad()
    def score(
        self,
        features: Tensor,  # (B, K, F)
        weights: Tensor | Sequence[float] | None = None,  # (m,) or (B, m)
        *,
        scale: float = 1.0,
        beta: Tensor | None = None,  # (m,) or (B, m)
        mask: Tensor | None = None,  # (B, K) bool
        reference: Tensor | None = None,  # (B, K)
    ) -> Tensor:  # (B, K)
        """Return the scores to rank by, with both knobs of post-training control.

        Pass all items of a list in one call: each is scored in view of the others, and a model that mixes
        (`conditioning="mixture"`) gives a list of one item the base model's score at every trade-off.

        Args:
            features: (B, K, F).
            weights: w on the simplex, a tensor or numbers.
            scale: c of equation (14): above 1 closer to the base model, below 1 further away.
            beta: β, for a model conditioned on it (equation 15).
            mask: (B, K), true where an item exists.
            reference: s0, if it is known already.

        Returns:
            Scores (B, K); -inf in masked places.
        """
        kind = self.network.input.weight.dtype
        if features.dtype != kind and not torch.is_autocast_enabled(features.device.type):
            raise ValueError(f"features is {features.dtype} but must be {kind}, as the model; pass features.to({kind})")
        check_positive(scale, "scale", "above 1 is closer to the base model")
        if weights is not None and self.condition is not None:
            if not isinstance(weights, Tensor) or readable(weights):
                weights = check_weights(weights, len(self.config.objectives))
            weights = weights.to(features)
        reference = self.reference(features, mask) if reference is None else reference
        scores = self(features, weights, beta=beta, mask=mask, reference=reference)
        if beta is not None:
            scores = steering.beta_conditioned(scores, reference, beta)
        return steering.rescale(scores, reference, scale, mask=mask)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `model.safetensors` (network and base model) and `model.json` into a folder."""
        network = dataclasses.asdict(self.config)
        network["temperature"] = network.pop("takes_beta")  # its first name, which the file keeps
        save_model_folder(self, {"kind": "RankingModel", "network": network, "base": self.base.settings}, directory)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> RankingModel:
        """Load a model from a run directory or any folder that `save_pretrained` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: If the folder holds no model.
            ValueError: If it holds a model of another kind, or is damaged.
        """

        def make(record: dict[str, Any], file: Path) -> RankingModel:
            network = dict(record["network"])
            if "temperature" in network:
                network["takes_beta"] = network.pop("temperature")
            settings = settings_from(RankingModelConfig, network, file, "network")
            return cls(settings, ListTransformer(**record["base"]))

        return load_model_folder(directory, "RankingModel", _RankingModelRecord, make)


class _RankingModelRecord(msgspec.Struct):
    network: dict[str, Any]
    base: NetworkRecord
