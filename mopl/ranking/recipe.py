"""`mopl rank` from data to report: base model, methods, fronts, table, picture and page in one run directory.

    config.json        settings, command line, seed, versions, what the data was
    log.jsonl          one line of figures every `log_every` steps
    base/              the base model and its figures
    front.json         the front (under `--method all` in a folder for each method, with that method's model)
    model.safetensors  the conditioned model, `model.json` beside it: `RankingModel.from_pretrained(run)`
    evaluation.json    held-out losses and other figures that `front.json` has no place for
    table.txt, front.png, report.html

See `mopl.ranking.stages` for the models of the baselines.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from mopl import _terminal
from mopl._extras import require_for
from mopl._files import write_file
from mopl._restoring import seeded
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
from mopl.pareto import weight_grid
from mopl.pareto.volumes import check_affordable
from mopl.ranking.config import RankConfig
from mopl.ranking.data import RankingData
from mopl.ranking.evaluate import (
    Evaluation,
    check_measurable,
    distances_to_truth,
    evaluate,
    make_front,
    true_front,
)
from mopl.ranking.methods import BasePolicy, Policy
from mopl.ranking.runs import (
    EVALUATION,
    FRONT,
    check_data,
    config_of,
    fingerprint,
    load_splits,
    method_folder,
    save_normalizer,
    write_reports,
)
from mopl.ranking.stages import Stages, Trained, check_base, load_policy
from mopl.ranking.validation import Validation
from mopl.training import RunLog, make_accelerator
from mopl.training.parallel import exists_on_main, on_main

__all__ = ["FREE_ON_RESUME", "RunInterrupted", "check_resume", "rank"]

# Settings that a resumed run may have otherwise: they change what is written or where, not what is computed.
FREE_ON_RESUME = ("log_every", "checkpoint_every", "log_with", "device")


def rank(
    config: RankConfig,
    run: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = _terminal.say,
) -> Path:
    """Train, evaluate and report; everything lands in one run directory.

    Args:
        config: Settings.
        run: The run directory; `runs/rank-<data>-<method>-<n>` with the next free n by default.
        resume: Continue the run that is there, bit for bit as if it had never stopped.
        overwrite: Replace the run that is there, once the data is read and found sound.
        say: Told, in a line, about each stage; on the main process only.

    Returns:
        The run directory.

    Raises:
        FileExistsError: If there is a run and neither `resume` nor `overwrite` is set.
        FileNotFoundError: If there is no run to resume, or no data.
        ImportError: If a package is missing; the message says how to install it.
        ValueError: If a setting or the data is unsound, or a resumed run had other settings or data.
        TrainingDiverged: If a loss is no longer a number.
        RunInterrupted: After Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    require_for("rank", *config.log_with)
    accelerator = make_accelerator(config.mixed_precision, cpu=config.device == "cpu")
    tell = say if accelerator.is_main_process else (lambda text: None)
    stem = f"rank-{_data_word(config)}-{config.method}"
    with hold_run(run, stem, accelerator, resume=resume, overwrite=overwrite) as (path, record):
        _run(config, path, record, accelerator, tell, overwrite=overwrite)
    return path


def _run(
    config: RankConfig,
    path: Path,
    record: dict[str, Any] | None,
    accelerator: Any,
    tell: Callable[[str], None],
    *,
    overwrite: bool,
) -> None:
    """Check data and settings, begin the run unless there is a record of it, and work."""
    if record is not None and "patience" not in record["config"] and config.patience == RankConfig.patience:
        config = dataclasses.replace(config, patience=0)  # begun by a version that trained all steps
    splits = load_splits(config)
    for name, split in splits.items():
        whole = f"{split.name}: {len(split)} queries, {split.num_items} items"
        for line in split.describe().split("\n") if name == "train" else [whole]:
            tell(line)
    config = config.resolved(len(splits["train"]))
    config.betas(len(splits["train"].objectives))
    check_measurable(splits["train"], config.measure)
    empty = check_measurable(splits["test"], config.measure)
    grid = weight_grid(len(splits["train"].objectives), config.points, density="medium")
    check_affordable(*grid.shape)
    if config.base is not None:
        check_base(config.base, splits["train"])
    if record is not None:
        _check_resume(record, config, splits, path)
        if changes := version_changes(record):
            tell(f"note: versions changed since the run began ({'; '.join(changes)}); bits may differ")
    accelerator.wait_for_everyone()
    if record is None:
        on_main(accelerator, lambda: create_run(path, _record(config, splits), overwrite=overwrite))
    tell(f"run {path}")
    with resumable(path, "rank"):
        _work(config, path, splits, grid, empty, accelerator, tell)


def _work(
    config: RankConfig,
    path: Path,
    splits: dict[str, RankingData],
    grid: Tensor,
    empty: dict[str, float],
    accelerator: Any,
    tell: Callable[[str], None],
) -> None:
    """Train, evaluate and report what is missing in a run directory."""
    train, test, device = splits["train"], splits["test"], accelerator.device
    main = accelerator.is_main_process
    with_log = RunLog(path, enabled=main, log_with=config.log_with, settings=config.to_dict())
    validation = Validation(splits["valid"], config)
    for note in validation.notes:
        tell(note)
    stages = Stages(path, config, train, validation, accelerator, with_log, tell)
    base = stages.base_model()
    references = stages.references(base, splits)
    stages.reference = references["train"]
    validation.take_reference(references["valid"])
    temperature = config.betas(len(stages.objectives))
    truth = true_front(test, references["test"], grid, temperature, config.measure)
    if main:
        save_normalizer(path, train)

    def finish(method: str, folder: Path, policy: Policy, trained: dict[str, Trained], parameters: int) -> None:
        asked = None if method == "base" else grid
        scales = (1.0,) if method == "base" else (1.0, *(c for c in config.scales if c != 1.0))
        with seeded(config.seed):  # ties="random" draws in the held-out losses too
            evaluations = evaluate(
                policy, test, references["test"], asked,
                measure=config.measure, list_loss=config.list_loss,
                temperature=temperature, conditioned_on_temperature=method == "temperature-cos-dpo", scales=scales,
                device=device,
            )  # fmt: skip
        front = make_front(
            evaluations, method=method, data=test, description=_describe(config, splits, test), measure=config.measure,
            seconds=sum(done.seconds for done in trained.values()), parameters=parameters, seed=config.seed,
            scales=scales, steps=_steps(trained),
            reference_front=None if method == "base" or truth is None else truth.auxiliary,
        )  # fmt: skip
        figures = _evaluation(evaluations[0], config, empty)
        figures["trainings"] = {name: dataclasses.asdict(done) for name, done in trained.items()}
        if truth is not None:
            figures["true_losses"] = truth.losses.tolist()
            figures["true_auxiliary"] = truth.auxiliary.tolist()
            if method != "base":
                distances = distances_to_truth(evaluations[0], test, references["test"], temperature)
                figures["nats_above_the_optimum"] = distances
                tell(f"{method}: {sum(distances) / len(distances):.4f} nats above the optimum, mean over the grid; "
                     f"IGD+ to the true front {front.steerability['igd_plus']:.4f}")  # fmt: skip
        if main:
            write_file(folder / EVALUATION, json.dumps(figures, indent=2) + "\n")
            front.save(folder / FRONT)  # last: where it is, the method is finished
        accelerator.wait_for_everyone()

    if not exists_on_main(accelerator, path / "base" / FRONT):
        trained = {"base": Trained.read(path / "base")}
        finish("base", path / "base", BasePolicy(stages.objectives), trained, sum(p.numel() for p in base.parameters()))
    for method in config.methods:
        folder = method_folder(path, config, method)
        if exists_on_main(accelerator, folder / FRONT):
            continue
        if main:
            folder.mkdir(exist_ok=True)
        accelerator.wait_for_everyone()
        trained, parameters = stages.train_method(method, folder, base, grid)
        policy = load_policy(path, folder, method, config, stages.objectives, grid, device)
        finish(method, folder, policy, trained, parameters)
    with_log.close()
    if main:
        write_reports(path)
    accelerator.wait_for_everyone()


def check_resume(record: dict[str, Any], changes: dict[str, Any], path: Path) -> RankConfig:
    """Return the settings of a run to resume, with the free ones among `changes` applied.

    Args:
        record: The run's `config.json`.
        changes: Settings that were given again.
        path: The run, for the message.

    Raises:
        ValueError: If a setting that matters differs.
    """
    return settings_to_resume(
        config_of(record, path), record["config"], changes, path, free=FREE_ON_RESUME
    )  # fmt: skip


def _check_resume(record: dict[str, Any], config: RankConfig, splits: dict[str, RankingData], path: Path) -> None:
    check_resume(record, {name: value for name, value in vars(config).items()}, path)
    check_data(record, splits, path)


def _record(config: RankConfig, splits: dict[str, RankingData]) -> dict[str, Any]:
    """Return what `config.json` holds."""
    return {
        "command": command_line(),
        "config": config.to_dict(),
        **environment(),
        "data": {
            **_describe(config, splits, splits["test"]),
            "empty_share": check_measurable(splits["test"], config.measure),
            "splits": {name: split.statistics() for name, split in splits.items()},
            "objectives": [o.to_dict() for o in (splits["train"].main, *splits["train"].objectives)],
        },
    }


def _describe(config: RankConfig, splits: dict[str, RankingData], test: RankingData) -> dict[str, Any]:
    """Return what `front.json` says about the data."""
    return {
        "name": config.data, "split": "test", "queries": len(test), "items": test.num_items,
        "fingerprint": fingerprint(splits),
    }  # fmt: skip


def _evaluation(evaluation: Evaluation, config: RankConfig, empty: dict[str, float]) -> dict[str, Any]:
    """Return what `evaluation.json` holds: figures that `front.json` has no place for."""
    return {
        "weights": None if evaluation.weights is None else evaluation.weights.tolist(),
        "loss": config.loss,
        "losses": evaluation.losses.tolist(),
        "metric": config.measure.metric().describe(),
        "empty_share": empty,
    }


def _steps(trained: dict[str, Trained]) -> dict[str, Any]:
    """Return what `front.json` says of the steps of each model."""
    done = list(trained.values())
    return {"limit": max(d.limit for d in done), "done": [d.steps for d in done], "kept": [d.kept for d in done]}


def _data_word(config: RankConfig) -> str:
    """Return a short name of the data for the name of the run."""
    word = Path(config.data).name if Path(config.data).exists() else config.data.split(":")[0]
    return "".join(c if c.isalnum() or c in "._" else "-" for c in word).strip("-") or "data"
