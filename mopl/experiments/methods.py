"""The methods of COS-DPO: which models each of them trains, and for which trade-offs these answer.

| method                | models trained              | loss of a list                        | answers for       |
|-----------------------|-----------------------------|---------------------------------------|-------------------|
| `weight-cos-dpo`      | one, conditioned on w       | sum_j w_j L_j, w ~ Dirichlet          | every w           |
| `temperature-cos-dpo` | one, conditioned on w and β | the same at β / ‖β‖₁, β from a box    | every w and β     |
| `dpo-ls`              | one for each w of the grid  | sum_j w_j L_j                         | the grid          |
| `dpo-soup`            | m experts                   | L_j                                   | every w, averaged |
| `mo-dpo`              | m experts, one for each w   | L_i of equation (17), w_i the largest | the grid          |
| `distill`             | one, conditioned on w       | sum_j w_j D_j, D_j to teacher j       | every w           |

`distill` is ours and for language models alone: teachers are the experts, or models that the run is given. `all` leaves
it out: `all` compares what learns from the labels at one budget, in runs of every version.

Source: Ren et al., COS-DPO, UAI 2025: sections 3.1, 3.3 and 4.2, appendices A.1 and A.2. Every model is trained for the
same number of steps, from the same initialisation, on the same batches. The first three weight losses (an arithmetic
mixture of the label distributions), `mo-dpo` and a soup weight scores (a geometric one): see `mopl.losses.scalarize`.

The command line lists the methods and the losses, so nothing here needs torch; what they compute is in
`mopl.experiments.cos_dpo` and `response_loss`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """What a method trains."""

    conditioned: bool = False  # one model that takes w
    takes_beta: bool = False  # that model takes β too
    experts: bool = False  # a model for each objective alone: those at the vertices of the simplex
    grid: bool = False  # a model for each w of the run's grid; where there are experts, by MO-DPO
    distils: bool = False  # its one model learns from a teacher for each objective, not from labels

    def trainings(self, objectives: int, points: int) -> int:
        """How many models it trains for m objectives and a grid of n points, none of them shared with other methods."""
        return self.conditioned + self.experts * objectives + self.grid * points

    @property
    def averages(self) -> bool:
        """Whether it answers with the average of its experts."""
        return self.experts and not self.grid

    @property
    def kind(self) -> str:
        """What the folders of the models that answer for a fixed w begin with."""
        return "modpo" if self.experts and self.grid else "w"


TABLE: dict[str, Method] = {
    "weight-cos-dpo": Method(conditioned=True),
    "temperature-cos-dpo": Method(conditioned=True, takes_beta=True),
    "dpo-ls": Method(grid=True),
    "dpo-soup": Method(experts=True),
    "mo-dpo": Method(experts=True, grid=True),
    "distill": Method(conditioned=True, distils=True),
}
METHODS = tuple(name for name, method in TABLE.items() if not method.distils)  # those of COS-DPO, on any scores
LANGUAGE_METHODS = tuple(TABLE)  # those of language models
CONDITIONED = tuple(name for name, method in TABLE.items() if method.conditioned)

# The types of `mopl.losses.bradley_terry` but aot, which sorts over the whole batch: it has no loss of one list that
# could be weighed by that list's trade-off.
PAIR_LOSSES = (
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "dpop", "nca_pair", "bco_pair",
    "sppo_hard", "apo_zero", "apo_down",
)  # fmt: skip
LIST_LOSSES = ("listnet", "plackett-luce")
PER_TOKEN = ("sigmoid_norm", "ipo")  # losses of log-probabilities averaged over tokens
