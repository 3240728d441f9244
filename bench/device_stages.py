"""What `python -m bench.device` runs, in which order, how long each part takes, and the plan that it prints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    """One process and those that it starts.

    Args:
        name: as on the command line and in the names of its files.
        what: what it does.
        seconds: how long it takes on an H200. Predicted, not measured, from processes of about 6 s, kernels of about
            1.3 s to compile and the times of work in the plan of each bench; a measured one takes its place.
        command: arguments of Python; `{out}` is the path of its JSON file, `{card}` the model's name of the GPU,
            `{workers}` how many tests run at a time.
        toy: arguments to add where there is no GPU.
        interpret: there, in Triton's interpreter.
    """

    name: str
    what: str
    seconds: int
    command: tuple[str, ...]
    toy: tuple[str, ...] = ()
    interpret: bool = True


# In parallel, because most of their time goes into compiling; `{workers}` is as many as the GPU's memory has room for.
WORKERS = ("-n", "{workers}", "--maxschedchunk=1")
WORKER_BYTES = 12 * 2**30  # of a test: 5.6 GiB of poison, and what it needs


def _tests(name: str, what: str, seconds: int, chosen: str, files: tuple[str, ...], workers: tuple[str, ...]) -> Stage:
    """Return a stage of tests; -v so that a log that is cut off tells how far it came."""
    how = ("-o", "addopts=--import-mode=importlib", "-v", "--tb=short", "--maxfail=20", "-p", "no:cacheprovider")
    how += ("--durations=10",)
    command = ("-m", "pytest", *how, *workers, "-m", chosen, *files)
    return Stage(f"tests-{name}", what, seconds, command, ("-n", "0", "--collect-only", "-qqq"))


def _logprob(name: str, what: str, seconds: int, *arguments: str) -> Stage:
    toy = () if "tune" in arguments or "--variants" in arguments else ("--variants", "mopl", "full logits")
    if "gathered" in arguments:
        toy = ("--variants", "mopl", "log_softmax, gather")
    return Stage(f"logprob-{name}", what, seconds, ("-m", "bench.logprob", *arguments, "--json", "{out}"), toy)


def _lists(name: str, what: str, seconds: int, *arguments: str) -> Stage:
    toy = ("--sizes", "4", "--objectives", "1", "3", "--variants", "its bytes alone", "mopl", "log_softmax")
    return Stage(f"lists{name}", what, seconds, ("-m", "bench.lists", *arguments, "--json", "{out}"), toy)


GPU_TESTS = ("graphs", "list_kernels", "logprob", "gathered", "compiled", "linear_kl", "repeats", "wrapped")
GRAPHS, LISTS, LOGPROB, GATHERED, *MORE = (f"tests/gpu/test_{name}.py" for name in GPU_TESTS)
FEW = ("2", "8", "32", "128", "1024", "4096")  # lengths of lists where every length would take minutes
FEWER = ("8", "128", "1024")
EAGER = ("logcumsumexp", "cumsum (unsafe)", "allRank listMLE", "sentence-transformers ListMLE", "log_softmax",
         "allRank listNet")  # fmt: skip
OURS = ("--variants", "its products alone", "mopl")
STAGES = (
    Stage("limits", "copy bandwidth and matrix-product rate", 15, ("-m", "bench.limits", "{out}")),
    # In one, so that a variant's process serves all three: most of its time goes into imports.
    _logprob("head", "the goal's size: scoring, a frozen head, a trained one", 200, "forward", "frozen", "trained"),
    _logprob("gathered", "the goal's size: from logits", 80, "gathered", "gathered-forward"),
    _tests("small", "all ops against float64; CUDA graphs, torch.compile, DDP, FSDP2; 100 runs alike", 150,
           "gpu and not huge", (LISTS, GRAPHS, LOGPROB, GATHERED, *MORE), WORKERS),
    _tests("huge", "the tests that need most of the memory", 70, "gpu and huge", (LISTS, LOGPROB, GATHERED), ()),
    # mopl with and without an order, every eager peer: ten processes; mopl's kernels compile beside those of the peers.
    _lists("", "list losses, one objective, K = 2 to 4096", 140, "--sizes", *FEW, "--variants", "its bytes alone",
           "mopl", "mopl, sorting", "mopl, again", *EAGER),
    Stage("model", "the performance model's table with a measured column", 60,
          ("-m", "bench.model", "--measure", "--card", "{card}", "--json", "{out}"), ("--toy",), interpret=False),
    _logprob("tune", "choice of tiles and rows, which is remembered", 60, "tune"),
    _logprob("tuned", "the goals once more with what was chosen", 40, "forward", "frozen", "trained", *OURS),
    Stage("step", "a training step of 1B and of 135M beside TRL's and Liger's DPO", 190,
          ("-m", "bench.step", "--json", "{out}"), ("--models", "135m"), interpret=False),
    _lists("-compiled-pl", "torch.compile of Plackett-Luce", 60, "--losses", "plackett-luce", "--sizes", *FEW,
           "--variants", "mopl", "torch.compile of logcumsumexp"),
    _lists("-compiled-listnet", "torch.compile of ListNet", 60, "--losses", "listnet", "--sizes", *FEW,
           "--variants", "mopl", "torch.compile of log_softmax"),
    _lists("-objectives", "list losses with 3 and 5 objectives", 60, "--objectives", "3", "5", "--sizes", *FEWER,
           "--variants", "its bytes alone", "mopl", "mopl, sorting", "logcumsumexp", "log_softmax"),
    _logprob("sizes", "other sizes, few rows and ragged vocabularies", 170, "forward", "frozen", "trained", "--more",
             *OURS, "full logits", "TRL chunked"),
    _logprob("gathered-sizes", "other sizes from logits", 60, "gathered", "--more"),
    _logprob("error", "errors beside the peers'", 110, "error"),
    Stage("sanitizer", "compute-sanitizer on small shapes, where it is installed", 120,
          ("-m", "bench.sanitizer", "--json", "{out}")),
    _logprob("heavy", "optional: peers that need CuTe", 70, "forward", "frozen", "trained", "gathered", "--heavy"),
)  # fmt: skip

MUST = {"msgspec": "0.22.0"}  # what mopl needs and a machine with torch alone may lack
PEERS = {
    "trl": "1.16.0", "liger-kernel": "0.8.5", "cut-cross-entropy": "25.1.1",
    "datasets": "5.2.0", "dill": "0.4.1", "multiprocess": "0.70.19",  # for TRL
}  # fmt: skip
HEAVY = ("quack-kernels==0.2.4", "nvidia-cutlass-dsl==4.3.5", "apache-tvm-ffi", "torch-c-dlpack-ext")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
CARRIED = ".wheels"
COMMAND_MINUTES = 9.5  # commands of a lease end after 10
PLANNED_MINUTES = 9.0  # of stages in a command, so that one that takes longer leaves no other out


def states(folder: Path) -> dict[str, dict]:
    """Return what became of each stage that has run."""
    path = folder / "stages.json"
    return json.loads(path.read_text()) if path.exists() else {}


def expected(stage: Stage, folder: Path | None) -> tuple[float, str]:
    """Return the seconds that a stage takes, and whether that was "measured" or "predicted"."""
    state = states(folder).get(stage.name, {}) if folder else {}
    return (state["seconds"], "measured") if state.get("verdict") == "done" else (stage.seconds, "predicted")


def commands(stages: tuple[Stage, ...], folder: Path | None, minutes: float = PLANNED_MINUTES) -> list[list[Stage]]:
    """Put stages, in their order, into commands that end within some minutes; a later short one may fill a gap."""
    left, found = list(stages), []
    while left:
        room, chosen = 60 * minutes, []
        for stage in left:
            seconds, _ = expected(stage, folder)
            if seconds <= room or not chosen:
                chosen.append(stage)
                room -= seconds
        left = [stage for stage in left if stage not in chosen]
        found.append(chosen)
    return found


def plan(stages: tuple[Stage, ...], folder: Path | None, options: str) -> str:
    """Return what to carry, the commands to paste, and the time of each stage."""
    wheels = " ".join(f"{name}=={version}" for name, version in (MUST | PEERS).items())
    fetch = (
        f"python3 -m pip download -d {CARRIED} --no-deps --only-binary=:all: --python-version 3.12 --implementation cp"
    )
    unpack = f"python3 -m pip install --no-index --no-deps --target /tmp/site {CARRIED}/*.whl"
    lines = [
        "Before, at the root of the checkout (a folder that git ignores travels only if it is named):",
        f"  echo /{CARRIED}/ >> \"$(git rev-parse --git-path info/exclude)\"",
        f"  {fetch} {' '.join(f'--platform {p}' for p in PLATFORMS)} \\\n    {wheels}",
        f"These are 3 MB. mopl needs {', '.join(MUST)}; the others are peers. The tests need pytest and pytest-xdist,",
        "which such a machine has, and a training step transformers, accelerate and peft. Optional, 63 MB, for",
        "logprob-heavy alone:",
        f"  {' '.join(HEAVY)}",
        "and then add /tmp/site/nvidia_cutlass_dsl/python_packages to PYTHONPATH.",
        "",
        "There, in every command first:",
        f"  {unpack} && export PYTHONPATH=/tmp/site",
        "",
    ]  # fmt: skip
    total = 0.0
    for number, chosen in enumerate(commands(stages, folder), 1):
        times = [expected(stage, folder) for stage in chosen]
        total += sum(seconds for seconds, _ in times)
        names = " ".join(stage.name for stage in chosen)
        lines.append(f"Command {number}, {sum(s for s, _ in times) / 60:.1f} minutes:")
        lines.append(f"  python3 -m bench.device{options} --minutes {COMMAND_MINUTES:g} {names}")
        for stage, (seconds, source) in zip(chosen, times, strict=True):
            lines.append(f"    {stage.name:22s} {seconds:4.0f} s {source:10s} {stage.what}")
    lines += [
        "",
        f"{total / 60:.0f} minutes in all, most important first. A stage that was cut off or not begun goes on when it",
        "is named again; without names everything runs that is not done. Results lie in the folder of --out: unpack",
        "the archive there to go on where another machine stopped. Read summary.md first.",
    ]
    return "\n".join(lines)
