"""The applications that make runs, by the "kind" in a run's `config.json`, without importing any of them."""

from __future__ import annotations

from dataclasses import dataclass

from mopl.experiments.methods import LANGUAGE_METHODS, METHODS

_LANGUAGE = ("transformers", "tokenizers", "peft", "trl", "datasets", "flash-attn")


@dataclass(frozen=True)
class Application:
    """What makes runs of one kind."""

    made_by: str  # the command that makes them
    used_with: str  # the command that a finished one is for
    command: str  # the command of `mopl` that resumes one
    run: tuple[str, str]  # module and class of its finished runs, a `mopl.experiments.run.FinishedRun`
    methods: tuple[str, ...]  # names of its methods
    packages: tuple[str, ...]  # packages of its own whose version may change what a run computes


# Runs of rankers were there before there were kinds, so their records have none.
APPLICATIONS: dict[str | None, Application] = {
    None: Application(
        "mopl rank", "mopl steer", "rank", ("mopl.ranking.runs", "RankingRun"), METHODS,
        ("scikit-learn", "statsmodels"),
    ),
    "align": Application(
        "mopl align", "mopl generate", "align", ("mopl.alignment.runs", "AlignmentRun"), LANGUAGE_METHODS,
        _LANGUAGE,
    ),
    "clp": Application(
        "mopl clp", "mopl generate", "clp", ("mopl.clp.runs", "ClpRun"),
        ("clp", "rewarded-soups", "prompting", "logit-mixing", "dera"),
        (*_LANGUAGE, "vaderSentiment", "rouge-score", "pyphen", "glin-profanity"),
    ),
}  # fmt: skip
