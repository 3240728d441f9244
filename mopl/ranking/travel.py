"""The data set `travel`: which of four modes 210 travellers chose between Sydney, Canberra and Melbourne.

Data: Greene, *Econometric Analysis*, table F18-2 ("modechoice", public domain), as statsmodels ships it. A list is a
traveller, an item a mode (air, train, bus, car). The main objective is what was chosen. The auxiliary objectives pull
against each other, and in all of them less is better:

| objective | column | meaning                                             |
|-----------|--------|-----------------------------------------------------|
| `cheap`   | invc   | money paid for all stages (dollars)                 |
| `fast`    | invt   | time in the vehicle (minutes)                       |
| `waiting` | ttme   | time at the terminal (minutes; 0 for the car)       |

`cheap` is invc and not gc, the generalised cost, because gc is invc plus the value of invt: it would say `fast` again.
Their labels are dense, so they are normalised by a softmax after division by their standard deviation within lists
(training split): the targets are strictly positive and every trade-off has a finite optimum.

A ranker that is given an objective's column as an input has nothing to learn: it sorts by it. So the default features
hold none of invc, invt and ttme; how cheap, fast and immediate a mode is for this traveller must be learnt from the
mode, gc, income and the size of the party. The feature set `conditional_logit` is that of Greene's table
instead and contains ttme, so there `waiting` is a function of an input; it is for comparison with his estimates.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from mopl._arguments import check_choice
from mopl._extras import require
from mopl.ranking.data import RankingData
from mopl.ranking.objectives import Objective

FEATURE_SETS = ("situation", "conditional_logit")
MODES = ("air", "train", "bus", "car")

OBJECTIVES = (
    Objective("cheap", maximise=False, normalize="softmax", scale="std"),
    Objective("fast", maximise=False, normalize="softmax", scale="std"),
    Objective("waiting", maximise=False, normalize="softmax", scale="std"),
)


def travel(features: Literal["situation", "conditional_logit"] = "situation") -> RankingData:
    """Return the whole data set, 210 lists of 4 items, not split.

    Args:
        features: `"situation"` (default): constants of air, train and bus, gc, and income and party size times each of
            these constants, 10 features. `"conditional_logit"`: constants of air, train and bus, gc, ttme and
            income times air, the 6 of Greene's conditional logit, in this order.

    Returns:
        The data; objectives `cheap`, `fast` and `waiting`, with scales that `resolve_scales` measures.

    Raises:
        ImportError: if statsmodels is not installed.
        ValueError: if there is no such feature set.
    """
    check_choice(features, FEATURE_SETS, "features")
    require("statsmodels", what="the data set travel")
    from statsmodels.datasets import modechoice

    table: Any = modechoice.load_pandas().data
    column = {name: table[name].to_numpy(dtype=np.float64) for name in table.columns}
    constants = {f"asc_{mode}": (column["mode"] == i + 1).astype(np.float64) for i, mode in enumerate(MODES[:3])}
    income, party = column["hinc"], column["psize"]
    if features == "conditional_logit":
        extra = {"gc": column["gc"], "ttme": column["ttme"], "hinc_x_air": income * constants["asc_air"]}
    else:
        extra = {"gc": column["gc"]}
        extra |= {name.replace("asc", "hinc_x"): income * constant for name, constant in constants.items()}
        extra |= {name.replace("asc", "psize_x"): party * constant for name, constant in constants.items()}
    inputs = constants | extra
    travellers = column["individual"][:: len(MODES)]
    return RankingData(
        features=torch.from_numpy(np.stack(list(inputs.values()), axis=1)).float(),
        raw_main=torch.tensor(column["choice"], dtype=torch.float32),
        raw_auxiliary=torch.from_numpy(np.stack([column[c] for c in ("invc", "invt", "ttme")], axis=1)).float(),
        offsets=torch.arange(0, len(table) + 1, len(MODES)),
        query_ids=torch.from_numpy(travellers.astype(np.int64)),
        main=Objective("choice"),
        objectives=OBJECTIVES,
        name="travel",
        feature_names=tuple(inputs),
    )
