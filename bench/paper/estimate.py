"""How long the runs of an experiment will take: one of each kind is done for a few steps, and multiplied."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from bench.paper.plan import ALIGN, CLP, ESTIMATE, RANK, Job, Plan, by_group
from mopl._files import discard_folder, write_file
from mopl._terminal import duration
from mopl.experiments.methods import TABLE
from mopl.experiments.run import read_any
from mopl.experiments.run_directory import DONE
from mopl.experiments.stages import Trained
from mopl.training.logs import read_log

STAGES = ("weight-cos-dpo", "clp")  # the one training of a probe beside that of a base model
STEPS, LISTS, PROMPTS, POINTS = 5, 160, 4, 2  # of a probe


def probe_settings(job: Job) -> dict[str, Any]:
    """Return the settings that make a run short: the one conditioned model, for a few steps, on few rows."""
    config = job.config()
    common = {"bootstrap": 0, "samples": 0, "checkpoint_every": 0, "log_every": 1}
    if job.door is RANK:
        steps = min(4 * STEPS, config.steps or 4 * STEPS, config.base_steps or 4 * STEPS)
        common.pop("samples")
        return {
            **common, "method": "weight-cos-dpo", "steps": steps, "base_steps": steps,
            "validate_every": max(1, steps // 2), "scales": (),
        }  # fmt: skip
    if job.door is ALIGN:
        return {
            **common, "method": "weight-cos-dpo", "steps": min(STEPS, config.steps or STEPS), "points": POINTS,
            "limit": min(job.lists, LISTS),
        }  # fmt: skip
    grid = {"points": POINTS} if len(config.rewards) > 1 else {}
    steps = min(3 * config.epochs, config.steps)
    return {
        **common, **grid, "method": "clp", "steps": steps, "checkpoint_every": steps,
        "normalize_prompts": PROMPTS, "eval_prompts": PROMPTS, "eval_samples": 1, "log_samples": 0,
        "limit": min(job.lists, LISTS), "held_out": min(0.5, max(config.held_out, (PROMPTS + 0.5) / LISTS)),
        "kl_weight": config.kl_weight[:2], "normalize": "running" if config.normalize == "running" else "none",
    }  # fmt: skip


def measure(job: Job, plan: Plan, say: Callable[[str], None]) -> float:
    """Do the probe of a job and return the seconds that the job itself will take, at most."""
    folder, began, marks = plan.out / "probe", time.monotonic(), {}

    def listen(line: str) -> None:
        marks["run" if line.startswith("run ") else "line"] = time.monotonic() - began

    say(f"{job.name}: a few steps, to see how long it will take")
    short = job.config(**probe_settings(job))
    if folder.exists():  # of a probe that was interrupted
        discard_folder(folder)
    job.train(folder, short, listen)
    whole = time.monotonic() - began
    run = read_any(folder)
    found = {file.parent.name: Trained.read(file.parent) for file in sorted(folder.rglob(DONE))}
    seconds = sum(done.seconds for done in found.values())
    base = found.pop("base", None)
    (tuned,) = found.values()
    started = time.monotonic()
    run.write_reports()  # once more: of a short run it is a good part
    report = time.monotonic() - started
    # What is neither reading, training nor reporting: scores of the reference, answers, evaluation.
    rest = max(0.0, whole - marks.get("run", 0.0) - seconds - report)
    total = report + _total(job, run, _of_a_step(run, tuned), marks.get("run", 0.0), rest)
    if base is not None:
        total += base.seconds / base.steps * _config(job, run).base_steps
    discard_folder(folder)
    return total


def _of_a_step(run: Any, done: Trained) -> float:
    """Return the seconds of a step after the first, which warms up; of CLP after the first rollout."""
    warm = getattr(run.config, "epochs", 1)
    told = [record for record in read_log(run.path / "log.jsonl") if record.get("stage") in STAGES]
    at = {record["step"]: record["seconds"] for record in told if "seconds" in record}
    if done.steps > warm and warm in at and done.steps in at:
        return (at[done.steps] - at[warm]) / (done.steps - warm)
    return done.seconds / done.steps


def _config(job: Job, run: Any) -> Any:
    """Return the settings of the whole run, with the numbers of steps that its data asks for."""
    config, record = job.config(), run.record["data"]["splits"]["train"]
    if job.door is RANK:
        return config.resolved(record["queries"])
    return config.resolved(max(1, round(job.lists * (1 - config.held_out)))) if job.door is ALIGN else config


def trainings(job: Job, run: Any) -> int:
    """Return how many models a run trains; where it has all methods, these share experts."""
    config, m = _config(job, run), len(run.objectives)
    if job.door is CLP:
        shared = {"clp": 1, "dera": 1, "prompting": 1, "rewarded-soups": m, "logit-mixing": m}
        names = set(config.methods) - ({"dera"} if "clp" in config.methods else set())
        names -= {"logit-mixing"} if "rewarded-soups" in names else set()
        return sum(shared[name] for name in names)
    points = config.points or len(run.grid)
    kinds = [TABLE[name] for name in config.methods]
    fixed = any(kind.grid and not kind.experts for kind in kinds)  # the experts are at its vertices
    return (
        sum(kind.conditioned for kind in kinds) + any(kind.grid and kind.experts for kind in kinds) * points
        + (points if fixed else m if any(kind.experts for kind in kinds) else 0)
    )  # fmt: skip


def _total(job: Job, run: Any, step: float, reading: float, rest: float) -> float:
    config, short = _config(job, run), run.config
    total = step * config.steps * trainings(job, run)
    evaluations = len(config.methods)
    if job.door is RANK:
        return total + reading + rest * evaluations
    if job.door is ALIGN:
        rows = job.lists / short.limit
        # The reference scores every list, each method the held-out ones at each point: one method in the probe.
        asked = 1 + evaluations * config.held_out * (config.points or 11)
        return total + reading * max(1.0, rows / 2) + rest * rows * asked / (1 + config.held_out * POINTS)
    points = (config.points or 11) if len(config.rewards) > 1 else 1
    grids = points * config.eval_samples * sum(len(config.kl_weights(method)) for method in config.methods) + 1
    own = (POINTS if len(config.rewards) > 1 else 1) * len(short.kl_weight) + 1
    held = min(config.eval_prompts, max(1, round(job.lists * config.held_out)))
    asked = config.normalize_prompts * max(2, config.samples_per_prompt) + grids * held
    return total + reading + rest * asked / (PROMPTS * max(2, config.samples_per_prompt) + own * PROMPTS)


def estimate(plan: Plan, say: Callable[[str], None]) -> float:
    """Say how long the runs that are not finished will take, and return it in seconds.

    One run of each kind is measured once; the figures are kept beside the runs.
    """
    file, known = plan.out / ESTIMATE, {}
    with suppress(OSError, ValueError):
        known = json.loads(file.read_text(encoding="utf-8"))
    total, left = 0.0, 0
    for jobs in by_group(plan.jobs).values():
        for job in jobs:
            if plan.finished(job) is not None:
                continue
            kind = kind_of(job)
            if kind not in known:
                known[kind] = measure(job, plan, say)
                write_file(file, json.dumps(known, indent=2) + "\n")
            total += known[kind]
            left += 1
    if left:
        say(
            f"{left} of {len(plan.jobs)} runs to do: about {duration(total)} on this machine, less where training "
            "stops early or a run is half done"
        )
    return total


def kind_of(job: Job) -> str:
    """Return what the time of a job depends on: jobs that differ in their data alone take as long."""
    return json.dumps({name: value for name, value in job.settings.items() if name != "data"}, default=str)
