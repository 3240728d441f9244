"""`mopl clp` from prompts to report: policies, fronts, table, picture and page in one directory.

config.json        settings, command line, seed, versions, what the prompts were
log.jsonl          one line of figures every `log_every` steps: rewards, KL, entropy, lengths
samples.jsonl      responses of rollouts as text, with their trade-off and rewards
rewards.json       mean and deviation of each reward over answers of the untrained model (with `normalize="running"` the
                   scale that trainings begin with; model/training.json has the one that they end with)
base/              the front of the untrained model: one point
front.json         mean rewards and KL on the grid (under clp-all in a folder for each method, with its model)
model/             what was trained, see `mopl.clp.policies`
evaluation.json    values, cost of decoding, steerability
samples.json       answers to held-out prompts at every point of the grid
table.txt, front.png, report.html
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch

from mopl import _terminal
from mopl._extras import require_for
from mopl._files import discard_folder, write_file
from mopl._records import Finite, damaged, read_json
from mopl._restoring import seeded
from mopl._rows import check_rows
from mopl._terminal import shell
from mopl.clp.config import ClpConfig
from mopl.clp.evaluate import Evaluation, Evaluator, make_front
from mopl.clp.policies import new_policy, release
from mopl.clp.prompts import Prompts, describe, placed_prompts, split_prompts
from mopl.clp.reward_modules import is_module, make_rewards, place_of
from mopl.clp.reward_scale import RewardScale, moments
from mopl.clp.rollout import Sampler
from mopl.clp.runs import (
    CONFIG_FILE,
    EVALUATION,
    FRONT,
    KIND,
    SAMPLES,
    config_of,
    list_tokenizer,
    method_folder,
    run_grid,
    write_reports,
)
from mopl.clp.stages import Stages
from mopl.conditioning import HyperPromptModel
from mopl.experiments.resume_settings import settings_to_resume
from mopl.experiments.run_directory import (
    RunInterrupted,
    command_line,
    create_run,
    environment,
    hold_run,
    resumable,
    version_changes,
)
from mopl.language_models import models
from mopl.language_models.adapter_reference import checksum
from mopl.pareto.volumes import check_affordable
from mopl.rewards import Rewards, prompt_key
from mopl.training import RunLog, make_accelerator
from mopl.training.parallel import exists_on_main, on_main

# Settings that a resumed run may have otherwise: they change what is written or where, not what is computed.
FREE_ON_RESUME = ("log_every", "checkpoint_every", "log_with", "device", "log_samples")
REWARDS = "rewards.json"


def train_policies(
    config: ClpConfig,
    run: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    rewards: Rewards | None = None,
    say: Callable[[str], None] = _terminal.say,
) -> Path:
    """Train, evaluate and report; everything lands in one run directory.

    Args:
        config: Settings.
        run: The run directory; `runs/<method>-<data>-<n>` with the next free n by default.
        resume: Continue the run that is there, bit for bit as if it had never stopped.
        overwrite: Replace the run that is there, once prompts, rewards and model are read and found sound.
        rewards: The rewards themselves, named as in `config.rewards`; None makes them from these names.
        say: Told, in a line, about each stage; on the main process only.

    Returns:
        The run directory.

    Raises:
        FileExistsError: If there is a run and neither `resume` nor `overwrite` is set.
        FileNotFoundError: If there is no run to resume, or no prompts.
        ImportError: If a package is missing; the message says how to install it.
        ValueError: If a setting is unsound, or a resumed run had other settings or prompts.
        PolicyCollapsed: If a guard stopped a training.
        TrainingDiverged: If a loss is no longer a number.
        RunInterrupted: After Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    adapters = ("peft",) * (config.scope in ("lora-mixture", "hyper-prompt"))
    require_for("align", *adapters, *config.log_with)
    # Rollouts generate with the policy itself, which a sharded one cannot do.
    accelerator = make_accelerator(cpu=config.device == "cpu", sharding=False)
    tell = say if accelerator.is_main_process else (lambda text: None)
    stem = f"{config.method}-{Path(config.data).name.split('.')[0]}"
    with hold_run(run, stem, accelerator, resume=resume, overwrite=overwrite) as (path, record):
        _run(config, path, record, rewards, accelerator, tell, overwrite=overwrite)
    return path


def _run(
    config: ClpConfig,
    path: Path,
    record: dict[str, Any] | None,
    rewards: Rewards | None,
    accelerator: Any,
    tell: Callable[[str], None],
    *,
    overwrite: bool,
) -> None:
    """Check prompts and settings, begin the run unless there is a record of it, and work."""
    judge = make_rewards(config.rewards) if rewards is None else rewards
    if len(judge) != len(config.rewards):
        raise ValueError(f"rewards names {len(config.rewards)} rewards but {len(judge)} were passed; name each")
    m = len(judge)
    if len(config.reference_point) not in (0, 1, m):
        raise ValueError(f"reference_point has {len(config.reference_point)} numbers for {m} rewards; pass {m}")
    check_affordable(*run_grid(config, m).shape)
    tokenizer = models.load_tokenizer(config.model)
    placed = placed_prompts(config.data, limit=config.limit, on_error=config.on_error)
    texts, places = [text for _, text in placed], [place for place, _ in placed]
    prompts, long = split_prompts(texts, list_tokenizer(config, tokenizer), config, places)
    tell(f"{len(prompts['train'])} prompts to train on, {len(prompts['test'])} to evaluate on"
         + (f"; {long} of more than {config.max_prompt} tokens left out" if long else ""))  # fmt: skip
    identity = {
        "objectives": list(judge.names), "fingerprint": "-".join(p.fingerprint()[:32] for p in prompts.values()),
        "splits": describe(prompts),
    }  # fmt: skip
    if record is not None:
        check_resume(record, config.to_dict(), path)
        if record["data"]["fingerprint"] != identity["fingerprint"]:
            raise ValueError(
                f"the prompts of {path} are not what they were when the run began (their fingerprint differs); put the "
                "old files back, or start another run"
            )
        if changes := version_changes(record):
            tell(f"note: versions changed since the run began ({'; '.join(changes)}); bits may differ")
    base = models.load_causal_lm(config.model, dtype=config.dtype, attention=config.attention)
    model = checksum(base.state_dict().items())
    if record is not None and record["data"].get("model", model) != model:  # older runs do not say
        raise ValueError(
            f"{config.model} is another model than when {path} began (its parameters differ), and the policies there "
            "were trained from that one; put it back, or start another run"
        )
    _check_length(base, config, prompts)
    _check_scope(base, config, judge.names)
    sampler = Sampler.of(base, tokenizer, config)
    accelerator.wait_for_everyone()
    if record is None:
        content = {"command": command_line(), "kind": KIND, "config": config.to_dict(), **environment(KIND)}
        on_main(
            accelerator,
            lambda: create_run(path, {**content, "data": {**identity, "model": model}}, overwrite=overwrite),
        )
    log = RunLog(
        path,
        enabled=accelerator.is_main_process,
        log_with=config.log_with,
        settings=config.to_dict(),
    )
    stages = Stages(path, config, prompts, base.to(accelerator.device), sampler, judge, accelerator, log, tell)
    tell(f"run {path}")
    try:
        # Only who names a module of rewards has it imported; see `check_resume`.
        again = ("--rewards", *config.rewards) if rewards is None and any(map(is_module, config.rewards)) else ()
        with resumable(path, "align", *again):
            _work(stages, identity)
    except RunInterrupted:
        raise
    except Exception:
        # A reward that never worked leaves nothing to continue, and nothing in the way of the next try.
        if record is None and accelerator.is_main_process and not (path / REWARDS).is_file():
            discard_folder(path)
        raise
    finally:
        log.close()


def _work(stages: Stages, identity: dict[str, Any]) -> None:
    """Train, evaluate and report what is missing in a run directory."""
    path, config, main = stages.path, stages.config, stages.accelerator.is_main_process
    grid = run_grid(config, len(stages.objectives))
    measured = measure_rewards(stages)
    if config.normalize != "none":
        stages.scale = measured
    test = stages.prompts["test"].first(config.eval_prompts)
    evaluator, base, word = Evaluator(stages, test), None, Path(config.data).name.split(".")[0]
    given = config.reference_point or tuple((measured.mean - 2 * measured.deviation).tolist())
    corner = [float(x) for x in (given * len(stages.objectives) if len(given) == 1 else given)]

    def finish(method: str, folder: Path, found: list[Evaluation], **cost: Any) -> None:
        front = make_front(
            found, method=method, config=config, objectives=stages.objectives, reference_point=corner,
            description={"name": word, "split": "test", "answered": len(test), **identity}, **cost,
        )  # fmt: skip
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            figures: list[dict[str, Any]] = [
                each.summary(stages.scale, config, stages.objectives, corner, base) for each in found
            ]
            write_file(folder / EVALUATION, json.dumps(figures, indent=2) + "\n")
            entries = [
                {"prompt": prompt_key(test.texts[q]), "responses": [texts[q] for texts in found[0].texts]}
                for q in range(min(config.samples, len(test)))
            ]
            write_file(folder / SAMPLES, json.dumps(entries, indent=2, ensure_ascii=False) + "\n")
            if found[0].weights is not None:
                stages.say(_in_words(method, figures[0]))
            front.save(folder / FRONT)  # last: where it is, the method is finished
        stages.accelerator.wait_for_everyone()

    todo = [(method, method_folder(path, config, method)) for method in config.methods]
    todo = [(method, folder) for method, folder in todo if not exists_on_main(stages.accelerator, folder / FRONT)]
    if todo or not exists_on_main(stages.accelerator, path / "base" / FRONT):
        base = evaluator.base()  # again in a resumed run: the cost of decoding is relative to it
        finish("base", path / "base", [base], seconds=0.0, parameters=0)
    for method, folder in todo:
        seconds, parameters = stages.train_method(method, folder)
        stages.say(f"{method}: answering {len(test)} held-out prompts at {len(grid)} trade-offs")
        finish(method, folder, evaluator.method(method, folder, grid), seconds=seconds, parameters=parameters)
    for line in str(stages.rewards.report).splitlines() if stages.rewards.report.failed() else ():
        stages.say(line)
    if main:
        write_reports(path)
    stages.accelerator.wait_for_everyone()


def _in_words(method: str, figures: dict[str, Any]) -> str:
    """Return what the table has no column for: the mean value, steerability, cost of decoding."""
    value = sum(figures["value"]) / len(figures["value"])
    # No hypervolume: that of the values has another reference point than that of the rewards, which the table shows.
    line = f"{method}: value {value:.4g} (mean over the grid)"
    if "spearman" in figures:
        line += f"; Spearman of rewards and weights {' '.join(f'{x:.2f}' for x in figures['spearman'])}"
    line += f"; {figures['model_runs_per_token']} model(s) run for a token"
    relative = figures.get("seconds_relative_to_base")
    return line if relative is None else f"{line}, {relative:.2f} times the seconds of the untrained model"


def measure_rewards(stages: Stages) -> RewardScale:
    """Return mean and deviation of the rewards over answers of the untrained model, computed once in a run."""
    file, config = stages.path / REWARDS, stages.config
    if not exists_on_main(stages.accelerator, file):
        chosen = stages.prompts["train"].first(config.normalize_prompts)
        rows = [i for i in range(len(chosen)) for _ in range(max(2, config.samples_per_prompt))]
        with seeded(config.seed), torch.no_grad():
            answers = stages.sampler.sample(stages.base, stages.base, [chosen.tokens[i] for i in rows])
        values = stages.rewards(answers.texts, [chosen.texts[i] for i in rows])
        names = stages.objectives
        if config.normalize == "none":
            counts, mean, squares = moments(values)
            scale = RewardScale(mean, (squares / counts.clamp(min=1)).sqrt(), counts)
        else:
            scale = RewardScale.of(values, names, constant=config.normalize == "running")
        assert scale.counts is not None
        if stages.accelerator.is_main_process:
            content = {
                "objectives": list(names), "mean": scale.mean.tolist(), "deviation": scale.deviation.tolist(),
                "counts": scale.counts.tolist(), "answers": len(rows), "used": config.normalize != "none",
            }  # fmt: skip
            write_file(file, json.dumps(content, indent=2) + "\n")
        stages.accelerator.wait_for_everyone()
    found = read_rewards(file, stages.objectives)
    each = zip(found["objectives"], found["mean"], found["deviation"], strict=True)
    stages.say("untrained model: " + ", ".join(f"{name} {mean:.4g} ± {spread:.4g}" for name, mean, spread in each))
    counts = found.get("counts")  # older runs do not have them, and do not need them
    return RewardScale(
        torch.tensor(found["mean"]), torch.tensor(found["deviation"]), None if counts is None else torch.tensor(counts)
    )  # fmt: skip


class _Scale(msgspec.Struct):
    """What is read of `rewards.json`; older runs have no counts, and do not need them."""

    objectives: list[str]
    mean: list[Finite]
    deviation: list[Annotated[float, msgspec.Meta(ge=0)]]
    counts: list[Annotated[float, msgspec.Meta(ge=0)]] | None = None


def read_rewards(file: Path, objectives: Sequence[str]) -> dict[str, Any]:
    """Return what the `rewards.json` of a run says of these rewards.

    Raises:
        DamagedFile: If it is damaged, or of other rewards.
    """
    remedy = "take it from a backup, or start another run: trained policies depend on it"
    found = read_json(file, _Scale, remedy=remedy)
    if found["objectives"] != list(objectives):
        raise damaged(file, f"objectives is {found['objectives']} but the rewards are {list(objectives)}", remedy)
    for name in ("mean", "deviation", "counts"):
        if found.get(name) is not None and len(found[name]) != len(objectives):
            raise damaged(file, f"{name} has {len(found[name])} numbers for {len(objectives)} rewards", remedy)
    return found


def _check_length(base: Any, config: ClpConfig, prompts: dict[str, Prompts]) -> None:
    """Raise if the model has fewer positions than the longest prompt, what is put in front, and a response."""
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(tokens) for part in prompts.values() for tokens in part.tokens) + config.max_new_tokens
    longest += config.virtual_tokens if config.scope == "hyper-prompt" else 0
    if positions is not None and longest > positions:
        raise ValueError(
            f"prompts and responses have up to {longest} tokens but {config.model} knows {positions} positions; lower "
            "max_prompt or max_new_tokens"
        )


def _check_scope(base: Any, config: ClpConfig, objectives: tuple[str, ...]) -> None:
    """Raise before anything is written if a scope names no parameter, takes no adapters or cannot be merged.

    Also if the model cannot take the rows of a run.
    """
    check_rows(base, virtual=config.scope == "hyper-prompt", generates=True)
    # Experts of scope hyper-prompt are adapters, which are merged for soups and logit mixing.
    for kind in ("clp", "expert") if config.scope == "hyper-prompt" else ("clp",):
        policy = new_policy(base, config, objectives, kind, objectives[0])
        try:
            if not isinstance(policy.model, HyperPromptModel):
                policy.model.check_merging()
        finally:
            release(policy)


def check_resume(
    record: dict[str, Any], changes: dict[str, Any], path: Path, *, trust_rewards: bool = False
) -> ClpConfig:
    """Return the settings of a run to resume, with the free ones among `changes` applied.

    Args:
        record: The run's `config.json`.
        changes: Settings that were given again.
        path: The run, for the message.
        trust_rewards: Modules of rewards may be imported though `changes` does not name them again.

    Raises:
        ValueError: If a setting that matters differs, or it is a run of another command.
        PermissionError: If code would be imported that only the run folder asks for.
    """
    config = settings_to_resume(
        config_of(record, path), record["config"], changes, path, free=FREE_ON_RESUME
    )  # fmt: skip
    named = tuple(changes.get("rewards") or ())
    foreign = [spec for spec in config.rewards if is_module(spec) and spec not in named]
    if foreign and not trust_rewards:
        raise PermissionError(
            f"{path / CONFIG_FILE} asks for the reward {foreign[0]!r}, for which {place_of(foreign[0])} would be "
            "imported, and so run; a run folder is data and may come from anyone. Name the rewards again ("
            f"{shell('--rewards', *config.rewards)}), or pass trust_rewards=True"
        )
    return config
