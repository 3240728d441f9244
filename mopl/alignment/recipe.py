"""`mopl align` from data to report: reference, methods, fronts, answers, table, picture and page in one directory.

    config.json        settings, command line, seed, versions, what the data was
    log.jsonl          one line of figures every `log_every` steps
    reference/         log-probabilities of the reference, with fingerprints of data, tokenizer and model
    base/              the front of the untrained model: one point
    front.json         the front (under `--method all` in a folder for each method, with that method's model)
    model/             adapters, prompt and `mopl.json`: `mopl.alignment.open_run(run).load()`
    evaluation.json    held-out losses, accuracies and deviations that `front.json` has no place for
    samples.json       answers to held-out prompts at every point of the grid
    table.txt, front.png, report.html

See `mopl.alignment.stages` for the models of the baselines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from mopl import _terminal
from mopl._extras import require_for
from mopl._files import write_file
from mopl._restoring import seeded
from mopl.alignment import tuned
from mopl.alignment.config import CONDITIONED, AlignConfig
from mopl.alignment.evaluate import Evaluation, HeldOut, evaluation_of, make_front, reference_point
from mopl.alignment.reference import score_lists
from mopl.alignment.runs import (
    EVALUATION,
    FRONT,
    KIND,
    SAMPLES,
    config_of,
    list_tokenizer,
    method_folder,
    write_reports,
)
from mopl.alignment.stages import Split, Stages, response_loss
from mopl.alignment.trained import load_trained, state_for
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
from mopl.language_models.data import PreferenceData, Text
from mopl.language_models.generate import generate
from mopl.language_models.readers import load_preferences
from mopl.language_models.tokenization import tokenize
from mopl.pareto import weight_grid
from mopl.pareto.volumes import check_affordable
from mopl.training import RunLog, make_accelerator
from mopl.training.parallel import exists_on_main, on_main

__all__ = ["FREE_ON_RESUME", "RunInterrupted", "align", "answers", "check_resume", "evaluate", "load_data"]

# Settings that a resumed run may have otherwise: they change what is written or where, not what is computed.
FREE_ON_RESUME = ("log_every", "checkpoint_every", "log_with", "device")


def align(
    config: AlignConfig,
    run: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = _terminal.say,
) -> Path:
    """Train, evaluate and report; everything lands in one run directory.

    Args:
        config: Settings.
        run: The run directory; `runs/align-<data>-<method>-<n>` with the next free n by default.
        resume: Continue the run that is there, bit for bit as if it had never stopped.
        overwrite: Replace the run that is there, once data and model are read and found sound.
        say: Told, in a line, about each stage; on the main process only.

    Returns:
        The run directory.

    Raises:
        FileExistsError: If there is a run and neither `resume` nor `overwrite` is set.
        FileNotFoundError: If there is no run to resume, or no data.
        ImportError: If a package is missing; the message says how to install it.
        ValueError: If a setting or the data is unsound, or a resumed run had other settings, data or another model.
        TrainingDiverged: If a loss is no longer a number.
        RunInterrupted: After Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    require_for("align", *("peft",) * (config.lora_rank > 0), *config.log_with)
    accelerator = make_accelerator(config.mixed_precision, cpu=config.device == "cpu")
    tell = say if accelerator.is_main_process else (lambda text: None)
    stem = f"align-{_data_word(config)}-{config.method}"
    with hold_run(run, stem, accelerator, resume=resume, overwrite=overwrite) as (path, record):
        _run(config, path, record, accelerator, tell, overwrite=overwrite)
    return path


def _run(
    config: AlignConfig,
    path: Path,
    record: dict[str, Any] | None,
    accelerator: Any,
    tell: Callable[[str], None],
    *,
    overwrite: bool,
) -> None:
    """Check data and settings, begin the run unless there is a record of it, and work."""
    data = load_data(config)
    for line in _describe_data(data):
        tell(line)
    config = config.resolved(len(data["train"]))
    objectives = data["train"].objectives
    config.betas(len(objectives))
    response_loss(config, data["train"])
    grid = weight_grid(len(objectives), config.points, density="medium")
    check_affordable(*grid.shape)
    if len(config.reference_point) not in (0, 1, len(objectives)):
        raise ValueError(
            f"reference_point has {len(config.reference_point)} numbers but there are {len(objectives)} objectives; "
            f"pass {len(objectives)}"
        )
    tokenizer = list_tokenizer(config, models.load_tokenizer(config.model))
    splits = {}
    for name, part in data.items():
        splits[name] = Split(part, tokenize(part, tokenizer, on_error=config.on_error))
        tell(_describe_tokens(name, splits[name]))
    identity = _data_record(config, splits)
    if record is not None:
        _check_resume(record, config, identity, path)
        if changes := version_changes(record):
            tell(f"note: versions changed since the run began ({'; '.join(changes)}); bits may differ")
    # The model is loaded before anything is written: most mistakes in settings show here.
    log = RunLog(
        path,
        enabled=accelerator.is_main_process,
        log_with=config.log_with,
        settings=config.to_dict(),
    )
    stages = Stages(path, config, splits, tokenizer, accelerator, log, tell)
    stages.check()
    accelerator.wait_for_everyone()
    if record is None:
        content = {"command": command_line(), "kind": KIND, "config": config.to_dict(), **environment(KIND)}
        on_main(accelerator, lambda: create_run(path, {**content, "data": identity}, overwrite=overwrite))
    tell(f"run {path}")
    try:
        with resumable(path, "align"):
            _work(config, path, stages, grid, identity, tell)
    finally:
        log.close()


def load_data(config: AlignConfig) -> dict[str, PreferenceData]:
    """Return the training and the held-out lists of a run."""
    data = load_preferences(
        config.data, format=config.format, objectives=config.objectives or None, on_error=config.on_error,
        split=config.split, limit=config.limit,
    )  # fmt: skip
    train, test = data.split(config.held_out, seed=config.data_seed)
    return {"train": train, "test": test}


def _work(
    config: AlignConfig, path: Path, stages: Stages, grid: Tensor, identity: dict[str, Any], tell: Callable[[str], None]
) -> None:
    """Train, evaluate and report what is missing in a run directory."""
    accelerator, main = stages.accelerator, stages.accelerator.is_main_process
    stages.prepare_references()
    test = stages.splits["test"]
    reference = stages.references["test"]
    assert reference is not None
    held_out = HeldOut(
        test.tokens.lists, stages.collator, stages.loss, stages.beta, reference, stages.objectives
    )  # fmt: skip
    base = evaluation_of(None, [held_out.figures(reference.values)])
    corner = reference_point(base, config.reference_point)
    prompts = _sample_prompts(stages)

    def finish(method: str, folder: Path, evaluations: list[Evaluation], samples: list[Any], **cost: Any) -> None:
        scales = (1.0, *_other_scales(config))[: len(evaluations)]
        front = make_front(
            evaluations, method=method, objectives=stages.objectives, reference_point=corner, seed=config.seed,
            description={"name": _data_word(config), "split": "test", "lists": len(test.tokens), **identity},
            bootstrap=config.bootstrap, scales=scales, **cost,
        )  # fmt: skip
        if main:
            figures = {"loss": config.loss, "beta": stages.beta.tolist(), **evaluations[0].summary(stages.objectives)}
            write_file(folder / EVALUATION, json.dumps(figures, indent=2) + "\n")
            text = json.dumps([{**entry, "method": method} for entry in samples], indent=2, ensure_ascii=False)
            write_file(folder / SAMPLES, text + "\n")
            front.save(folder / FRONT)  # last: where it is, the method is finished
        accelerator.wait_for_everyone()

    def folder_of(method: str) -> Path:
        folder = path / "base" if method == "base" else method_folder(path, config, method)
        if main:
            folder.mkdir(parents=True, exist_ok=True)
        accelerator.wait_for_everyone()
        return folder

    if not exists_on_main(accelerator, path / "base" / FRONT):
        samples = answers(stages, "base", path, grid, prompts)
        finish("base", folder_of("base"), [base], samples, seconds=0.0, parameters=0)
    for method in config.methods:
        folder = folder_of(method)
        if exists_on_main(accelerator, folder / FRONT):
            continue
        seconds, parameters = stages.train_method(method, folder, grid)
        tell(f"{method}: evaluating {len(grid)} trade-offs on {len(test.tokens)} lists")
        evaluations = evaluate(stages, method, folder, grid, held_out)
        samples = answers(stages, method, folder, grid, prompts)
        finish(method, folder, evaluations, samples, seconds=seconds, parameters=parameters)
    if main:
        write_reports(path)
    accelerator.wait_for_everyone()


def evaluate(stages: Stages, method: str, folder: Path, grid: Tensor, held_out: HeldOut) -> list[Evaluation]:
    """Return the held-out figures of a trained method at each trade-off of the grid, one evaluation for each scale."""
    config, scales = stages.config, (1.0, *_other_scales(stages.config))
    columns: list[list[tuple[Tensor, ...]]] = [[] for _ in scales]
    for w, model in _models(stages, method, folder, grid):
        flat = score_lists(
            model, held_out.lists, collator=stages.collator, tokens_per_batch=config.tokens_per_batch,
            accelerator=stages.accelerator, weights=w, temperature=stages.beta, conditioner=stages.conditioner(method),
        )  # fmt: skip
        if method == "temperature-cos-dpo":
            # Equation (15): the network answers for β / ‖β‖₁.
            base = held_out.reference.values
            flat = base + (flat - base) / stages.beta.sum()
        for column, scale in zip(columns, scales, strict=True):
            with seeded(config.seed):  # ties="random" draws in the held-out losses too
                column.append(held_out.figures(flat, scale))
    return [evaluation_of(grid, column) for column in columns]


def _models(stages: Stages, method: str, folder: Path, grid: Tensor) -> Iterator[tuple[Tensor, Any]]:
    """Yield each trade-off of the grid with the model that answers for it, on the accelerator's device."""
    model: Any = load_trained(stages.path, folder, method, stages.objectives, grid, stages.base)
    try:
        model.to(stages.accelerator.device).eval()
        for w in grid:
            if method not in CONDITIONED:
                assert isinstance(model, HyperPromptModel)
                models.set_state(model, state_for(stages.path, method, stages.objectives, grid, w))
            yield w, model
    finally:
        models.release(model)


def answers(stages: Stages, method: str, folder: Path, grid: Tensor, prompts: list[Text]) -> list[dict[str, Any]]:
    """Return greedy answers to prompts: `{"prompt", "responses": [a text for each trade-off]}`; one for the base."""
    config = stages.config
    responses: list[list[str]] = [[] for _ in prompts]
    if prompts and stages.accelerator.is_main_process:
        options: dict[str, Any] = {"max_new_tokens": config.sample_tokens, "batch_size": 8}
        tokenizer = stages.tokenizer
        if method == "base":
            found = [generate(stages.base, tokenizer, prompts, **options)]
        else:
            if method == "temperature-cos-dpo":
                options["objective_temperature"] = stages.beta.tolist()
            if method in CONDITIONED and config.conditioning == "text":
                temperature = method == "temperature-cos-dpo"
                options["text_prompt"] = tuned.text_prompt(stages.objectives, temperature=temperature)
            found = [
                generate(model, tokenizer, prompts, w.tolist(), **options)
                for w, model in _models(stages, method, folder, grid)
            ]
        for texts in found:
            for kept, answer in zip(responses, texts, strict=True):
                kept.append(answer.text)
    stages.accelerator.wait_for_everyone()
    return [
        {"prompt": _as_text(prompt), "responses": texts} for prompt, texts in zip(prompts, responses, strict=True)
    ]  # fmt: skip


def _as_text(prompt: Text) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message.get('content', '')}" for message in prompt)


def _sample_prompts(stages: Stages) -> list[Text]:
    """Return the first different prompts of held-out data, a random choice already, that leave room for an answer."""
    config, positions = stages.config, models.positions_of(stages.base)
    # What stands in front: virtual tokens, or words, of which no weights have more than these.
    words = tuned.text_prompt(stages.objectives, temperature=True)
    ones = [1 / len(stages.objectives)] * len(stages.objectives)
    prompts: dict[str, Text] = {}
    test = stages.splits["test"]
    for item in (test.data[row.index] for row in test.tokens):  # lists that could not be tokenised are not there
        if len(prompts) == config.samples:
            break
        tokens = stages.tokenizer.prompt_tokens(item.prompt).tolist()
        front = config.virtual_tokens
        if config.conditioning == "text":
            tokenizer = stages.tokenizer.tokenizer
            front = max(front, len(words.prepend_ids(tokens, ones, tokenizer, stages.beta.tolist())) - len(tokens))
        if positions is None or front + len(tokens) + config.sample_tokens <= positions:
            prompts.setdefault(_as_text(item.prompt), item.prompt)
    if config.samples and not prompts:
        stages.say(f"no held-out prompt leaves room for {config.sample_tokens} tokens: there are no samples")
    return list(prompts.values())


def _other_scales(config: AlignConfig) -> tuple[float, ...]:
    return tuple(c for c in config.scales if c != 1.0)


# ---------------------------------------------------------------- what a run remembers


def check_resume(record: dict[str, Any], changes: dict[str, Any], path: Path) -> AlignConfig:
    """Return the settings of a run to resume, with the free ones among `changes` applied.

    Args:
        record: The run's `config.json`.
        changes: Settings that were given again.
        path: The run, for the message.

    Raises:
        ValueError: If a setting that matters differs, or it is a run of another command.
    """
    return settings_to_resume(
        config_of(record, path), record["config"], changes, path, free=FREE_ON_RESUME, resolved={"reference": "auto"}
    )  # fmt: skip


def _check_resume(record: dict[str, Any], config: AlignConfig, identity: dict[str, Any], path: Path) -> None:
    check_resume(record, config.to_dict(), path)
    for name, what in (("fingerprint", "data"), ("tokens", "tokenizer")):
        if record["data"][name] != identity[name]:
            raise ValueError(
                f"the {what} of {path} is not what it was when the run began (its fingerprint differs); put the old "
                "files back, or start another run"
            )


def _data_record(config: AlignConfig, splits: dict[str, Split]) -> dict[str, Any]:
    """Return what a run remembers of its data."""
    return {
        "objectives": list(splits["train"].data.objectives),
        "fingerprint": "-".join(split.data.fingerprint()[:32] for split in splits.values()),
        "tokens": "-".join(split.tokens.fingerprint()[:32] for split in splits.values()),
        "splits": {name: {**split.data.describe(), **split.tokens.describe()} for name, split in splits.items()},
    }


def _describe_data(data: dict[str, PreferenceData]) -> Iterator[str]:
    for name, part in data.items():
        counts = part.describe()
        sizes = ", ".join(f"{count} of {size}" for size, count in counts["list_sizes"].items())
        labelled = ", ".join(
            objective + (f" ({n['missing']} without labels)" if n["missing"] else "")
            + (f" ({n['partial']} partly labelled)" if n["partial"] else "")
            for objective, n in counts["objectives"].items()
        )  # fmt: skip
        yield f"{name}: {counts['lists']} lists ({sizes} responses); objectives {labelled}"


def _describe_tokens(name: str, split: Split) -> str:
    counts = split.tokens.describe()
    cut = f"; {counts['prompts_cut']} prompts and {counts['responses_cut']} responses cut to max_length"
    return (
        f"{name}: {counts['tokens']:,} tokens, longest sequence {counts['longest_sequence']}"
        + (cut if counts["prompts_cut"] + counts["responses_cut"] else "")
    )  # fmt: skip


def _data_word(config: AlignConfig) -> str:
    """Return a short name of the data for the name of the run."""
    word = Path(config.data).name.split(".")[0] if Path(config.data).exists() else config.data.split("/")[-1]
    return "".join(c if c.isalnum() or c in "._" else "-" for c in word).strip("-") or "data"
