"""CLP on XSum: two rewards at one KL weight, and one reward at many of them.

The paper trains T5 with rewards for entailment (NLI) and ROUGE-LSum. The library has causal language models alone, so
the model is the user's to name; the entailment reward is a classifier of his, too. The full text of the paper was not
at hand: KL weights but the 0.01 of two rewards are ours.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Sequence
from typing import Any

from bench.paper import rows
from bench.paper.plan import CLP, Job, Plan
from bench.paper.tables import Table, front_table, kl_table, paper_of
from mopl._files import write_file
from mopl._lines import read_lines
from mopl.experiments.resume_settings import located_if_there
from mopl.experiments.run import FinishedRun
from mopl.rewards import ClassifierReward, FunctionReward, Rewards, Rouge, available, make

BLANK = "rows without a text, left out"
PAPER_KL, PAPER_ROWS = 0.01, 204_045  # rows of XSum's training split
KL_WEIGHTS = (0.01, 0.03, 0.1, 0.3)
SCOPES = ("full", "attention", "logits")
ROWS = {"full": "full-CLP", "attention": "attn-CLP", "logits": "logit-CLP"}
FIELDS: dict[str, Any] = {"document": str, "summary": str, "id": (str, int)}
COMMON: dict[str, Any] = {"steps": 10_000, "points": 11, "eval_prompts": 256, "samples": 3, "max_new_tokens": 64}
SMALL: dict[str, Any] = {
    "limit": 200, "steps": 20, "prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 24, "points": 5,
    "eval_prompts": 16, "normalize_prompts": 16,
}  # fmt: skip
SMALL_WORDS, WORDS = 60, 250
PROMPT = "{document}\n\nSummary in one sentence:"


def add_options(group: argparse._ArgumentGroup) -> None:
    """Add what this experiment alone asks."""
    group.add_argument(
        "--two", nargs=2, default=("nli", "rouge"), metavar="REWARD",
        help="the two rewards: nli, rouge (against the summary) or others of mopl.rewards (default: nli rouge)",
    )  # fmt: skip
    group.add_argument("--one", default="rouge", metavar="REWARD", help="the one reward (default: rouge)")
    group.add_argument(
        "--nli",
        default=None,
        metavar="MODEL",
        help="a classifier of pairs for the reward nli: a folder, or a name on the hub",
    )
    group.add_argument("--nli-label", default="entailment", metavar="LABEL", help="its output (default: entailment)")
    group.add_argument(
        "--kl-weights", type=float, nargs="+", default=KL_WEIGHTS, metavar="WEIGHT", help="KL weights of the one reward"
    )
    group.add_argument("--scopes", nargs="+", choices=SCOPES, default=SCOPES[:2], help="which CLP: full, attention, "
                       "logits (default: full attention)")  # fmt: skip
    group.add_argument(
        "--words", type=int, default=None, metavar="N", help=f"cut documents to N words (default: {WORDS})"
    )
    group.add_argument("--groups", nargs="+", choices=("two-rewards", "one-reward"),
                       default=("two-rewards", "one-reward"), help="which of the two experiments")  # fmt: skip


def prepare(options: argparse.Namespace, given: dict[str, Any]) -> Plan:
    """Check every row and the rewards, and return the runs."""
    if "model" not in given:
        raise ValueError(
            "--model is missing: the paper's T5 is an encoder with a decoder, and this library trains causal language "
            "models; name one, a folder or a name on the hub"
        )
    if len(set(options.kl_weights)) < 2:
        raise ValueError(f"--kl-weights has {len(set(options.kl_weights))} weight but one reward needs several")
    options.nli = options.nli and located_if_there(options.nli)
    asked = [*(options.two if "two-rewards" in options.groups else ()),
             *((options.one,) if "one-reward" in options.groups else ())]  # fmt: skip
    check_rewards(asked, options)
    options.words = options.words or (SMALL_WORDS if options.small else WORDS)
    if options.words < 1:
        raise ValueError(f"--words is {options.words} but a document needs at least 1")
    files = rows.files_of(options.path, "data of XSum")
    prompts: set[str] = set()
    blank = 0
    for row in rows.checked(files, FIELDS, "XSum"):
        if is_blank(row):
            blank += 1
        else:
            prompts.add(prompt_of(row["document"], options.words))
    if len(prompts) < 4:
        raise ValueError(f"{options.path} has {len(prompts)} different documents, too few to train on and to hold out")
    common = {**COMMON, **(SMALL if options.small else {}), **given}
    common["data"] = str(options.out / "data" / "prompts.jsonl")
    lists = min(len(prompts), common.get("limit") or len(prompts))

    def job(group: str, scope: str, method: str, names: Sequence[str], kl: Sequence[float], own: dict[str, str]) -> Job:
        settings = {**common, "method": method, "scope": scope, "rewards": tuple(names), "kl_weight": tuple(kl)}
        make_them = functools.partial(rewards, tuple(names), options)
        return Job(f"{group}-{scope}", group, CLP, settings, own, make_them, lists)

    jobs = []
    for group in options.groups:
        for place, scope in enumerate(options.scopes):
            own = {"clp": ROWS[scope]}
            if group == "two-rewards":  # baselines once, with all that the first scope trains
                if place == 0:
                    own |= {name: name for name in ("rewarded-soups", "prompting", "logit-mixing")}
                jobs.append(job(group, scope, "clp" if place else "clp-all", options.two, (PAPER_KL,), own))
            else:
                if place == 0:
                    own |= {"dera": "dera", "prompting": "prompting", "rewarded-soups": "one expert"}
                jobs.append(job(group, scope, "clp" if place else "clp-all", (options.one,), options.kl_weights, own))
    return Plan("clp-summary", options.out, jobs, files, {}, {"documents": len(prompts), BLANK: blank or None})


def is_blank(row: dict[str, Any]) -> bool:
    """Whether a row has no document or no summary: some of XSum have none."""
    return not (row["document"].strip() and row["summary"].strip())


def prompt_of(document: str, words: int) -> str:
    """Return the prompt of a document, of which the first words are kept."""
    return PROMPT.format(document=" ".join(document.split()[:words]))


def check_rewards(names: Sequence[str], options: argparse.Namespace) -> None:
    """Raise if a reward is unknown, or lacks its classifier."""
    for name in names:
        if name == "nli" and options.nli is None:
            raise ValueError(
                "the reward nli needs a classifier of pairs; name one with --nli MODEL, or take other rewards, such as "
                "--two rouge brevity"
            )
        if name not in ("nli", "rouge"):
            if name.partition(":")[0] not in available():
                raise ValueError(f"there is no reward {name!r}; choose from nli, {', '.join(available())}")
            make(name)
    if "two-rewards" in options.groups and len(set(options.two)) < 2:
        raise ValueError(f"--two names {options.two[0]} twice; name two rewards")


def write_data(plan: Plan, options: argparse.Namespace) -> None:
    """Write the prompts, with what the rewards compare answers with."""
    target = plan.out / "data" / "prompts.jsonl"
    if target.exists():
        return
    found: dict[str, dict[str, Any]] = {}
    for row in rows.checked(plan.files, FIELDS, "XSum"):
        if is_blank(row):
            continue
        prompt = prompt_of(row["document"], options.words)
        entry = found.setdefault(prompt, {"prompt": prompt, "document": row["document"], "summaries": []})
        entry["summaries"].append(row["summary"])
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in found.values()))


def rewards(names: Sequence[str], options: argparse.Namespace) -> Rewards:
    """Return the rewards of these names, on the prompts that `write_data` has written."""
    lines = options.out / "data" / "prompts.jsonl"
    entries = [json.loads(text) for _, text in read_lines(lines)]  # U+2028 and its like end no line of JSON
    made: list[Any] = []
    for name in names:
        if name == "rouge":
            made.append(Rouge({entry["prompt"]: entry["summaries"] for entry in entries}, variant="rougeLsum"))
        elif name == "nli":
            judge = ClassifierReward(
                options.nli, name="nli", label=options.nli_label, activation="softmax", inputs="pair"
            )
            documents = {entry["prompt"]: entry["document"] for entry in entries}

            def entailed(texts: Any, prompts: Any, judge: Any = judge, documents: Any = documents) -> Any:
                return judge(texts, [documents[prompt] for prompt in prompts])

            made.append(FunctionReward(entailed, "nli"))
        else:
            made.append(make(name))
    return Rewards(made)


def tables(plan: Plan, runs: dict[str, FinishedRun]) -> list[Table]:
    """Return a table of two rewards and one of KL weights."""
    found = []
    for group in dict.fromkeys(job.group for job in plan.jobs):
        run = runs[next(job.name for job in plan.jobs if job.group == group)]
        config, splits = run.config, run.record["data"]["splits"]
        model, names = config.model.rstrip("/").rsplit("/", 1)[-1], ", ".join(config.rewards)
        train, test = splits["train"]["prompts"], splits["test"]["prompts"]
        documents = train + test
        differs = [
            f"model: {model}, where the paper has T5, an encoder with a decoder",
            f"data: {train:,} documents to train on and {test:,} held out, cut to {plan.options['words']} words, where "
            f"XSum has {PAPER_ROWS:,} to train on; {plan.counts[BLANK] or 0} rows without a text are left out",
            f"rewards: {names}; the paper has entailment (NLI), ROUGE-LSum and a preference reward",
            f"steps: {config.steps}, of {config.prompts_per_step} prompts and {config.samples_per_prompt} samples of "
            "each; the paper shows 10,000, 60,000 and 90,000",
        ]
        if group == "two-rewards":
            differs.append(f"soups and logit mixing: of experts of the first scope ({config.scope})")
            table = front_table(f"CLP on XSum: {names} at a KL weight of {PAPER_KL}", group, plan, runs,
                                paper_of("clp-summary", group), differs, documents < PAPER_ROWS * 0.9)  # fmt: skip
        else:
            differs += [
                f"KL weights: {', '.join(f'{x:g}' for x in config.kl_weight)}, ours; the paper's are not at hand",
                "DeRa moves the policy of the smallest KL weight; the paper's moves a policy of its own",
            ]
            table = kl_table(f"CLP on XSum: {names} at several KL weights", group, plan, runs,
                             paper_of("clp-summary", group), differs, documents < PAPER_ROWS * 0.9)  # fmt: skip
        found.append(table)
    return found
