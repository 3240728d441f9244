"""Everything that needs a GPU, in one command: `python -m bench.device` at the root of a checkout.

Runs in stages of under two minutes, each in a process of its own, and writes to `bench/results/<device>/` what each
measured (`STAGE.json`, written anew with every figure) and printed (`STAGE.txt`). It can be cut off at any time and
started again: finished stages are skipped (`--again` runs them anew). A stage that fails does not stop the next.

    python -m bench.device                                   # all stages that are not done
    python -m bench.device --list                            # the stages, and which are done
    python -m bench.device limits logprob-frozen             # only these
    python -m bench.device --minutes 9 --archive all.zip     # begin no stage that may not end; all files in one
    python -m bench.device --toy                             # without a GPU: try every stage at toy sizes

Needs torch, triton and pytest. Peers (TRL, Liger, CCE, QuACK, flash-attention) are measured where they are installed
and listed as absent where they are not. `--toy` runs the kernels in Triton's interpreter and collects the tests without
running them; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from mopl._files import write_file

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 115
TOY = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Stage:
    """One process.

    Args:
        name: as on the command line and in the names of its files.
        what: what it does.
        command: arguments of Python; `{out}` is the path of its JSON file.
        toy: arguments to add where there is no GPU.
    """

    name: str
    what: str
    command: tuple[str, ...]
    toy: tuple[str, ...] = ()


def _tests(name: str, what: str, file: str, *functions: str) -> Stage:
    """Return a stage of the tests whose names contain one of `functions`; -v so that a log that is cut off tells."""
    chosen = ("-k", " or ".join(functions)) if functions else ()
    # One process for one GPU, where pytest-xdist need not be installed either.
    one = ("-o", "addopts=--import-mode=importlib")
    how = ("-m", "gpu", "-v", "--tb=short", "--maxfail=20", "-p", "no:cacheprovider")
    command = ("-m", "pytest", *one, *how, file, *chosen)
    return Stage(f"tests-{name}", what, command, ("--collect-only", "-qqq"))


def _lists(name: str, what: str, *arguments: str) -> Stage:
    command = ("bench/bench_listwise.py", "--rounds", "20", "--json", "{out}", *arguments)
    return Stage(name, what, command, ("--items", "8", "--sizes", "4", "--rounds", "1", "--no-compile"))


def _logprob(command: str, what: str) -> Stage:
    return Stage(f"logprob-{command}", what, ("-m", "bench.logprob", command, "{out}"))


_LISTS, _LOGPROB = "tests/test_gpu_list_kernels.py", "tests/test_gpu_logprob.py"
EXTREMES = (
    "gradients_of_confident", "below_e_to", "infinite_logits_are", "second_dimension", "cache_with_offsets", "all_rows",
)  # fmt: skip
USES = ("linear_repeats", "linear_nothing", "max_rows", "share_rows", "autocast", "compiles_once", "never_held")
DTYPES = ("bfloat16", "float16", "float32")
STAGES = (
    Stage("limits", "copy bandwidth and matrix-product rate of this GPU", ("-m", "bench.limits", "{out}")),
    _tests("listnet", "kernels of ListNet against float64", _LISTS, "test_listnet"),
    _tests("plackett-luce", "kernels of Plackett–Luce against float64", _LISTS, "test_plackett_luce"),
    _tests("lists", "what both have in common", _LISTS, "partial", "extreme", "confident", "repeats", "nothing",
           "offsets", "compiled", "apart"),
    _tests("gathered", "gathered log-probabilities against float64", _LOGPROB, "test_gathered"),
    # By dtype, because most of their time goes into compiling.
    *(_tests(f"errors-{d}", "errors of linear_logprob", _LOGPROB, f"linear_errors and torch.{d}") for d in DTYPES),
    *(_tests(f"fused-{d}", "its fused kernel, every tile", _LOGPROB, f"linear_fused and torch.{d}") for d in DTYPES),
    _tests("linear-extremes", "sure and impossible tokens, huge sizes", _LOGPROB, *EXTREMES),
    _tests("linear-uses", "repeats, shared rows, autocast, compiler, memory", _LOGPROB, *USES),
    _lists("lists-short", "list losses beside the peers", "--objectives", "1", "--sizes", "2", "8", "32"),
    _lists("lists-long", "the same for 120 and 1000 items", "--objectives", "1", "--sizes", "120", "1000"),
    _lists("lists-objectives", "the same with 3 and 5 objectives", "--objectives", "3", "5"),
    _logprob("tune", "choice of the algorithm that scores, which is remembered"),
    _logprob("gathered", "log-probabilities from logits beside the peers"),
    _logprob("forward", "scoring without gradient beside the peers"),
    _logprob("frozen", "frozen head beside the peers"),
    _logprob("trained", "trained head beside the peers"),
    _logprob("error", "errors beside the peers'"),
)  # fmt: skip


def device_name() -> str:
    """Return the GPU's name as a folder's; exit where there is none."""
    import torch

    if not torch.cuda.is_available():
        sys.exit(
            "no GPU here: torch.cuda.is_available() is False. Everything in this command needs one; "
            "--toy tries its stages without"
        )
    return re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name()).strip("-").lower()


def states(folder: Path) -> dict[str, dict]:
    """Return what became of each stage that has run."""
    path = folder / "stages.json"
    return json.loads(path.read_text()) if path.exists() else {}


def run(stage: Stage, folder: Path, toy: bool, limit: float) -> bool:
    """Run a stage, keep what it printed, note what became of it, and say whether it succeeded."""
    out = folder / f"{stage.name}.json"
    arguments = [part.replace("{out}", str(out)) for part in (*stage.command, *(stage.toy if toy else ()))]
    shown = " ".join(["python", *arguments]).replace(str(out), f"bench/results/{folder.name}/{out.name}")
    print(f"== {stage.name}: {stage.what}\n   {shown}", flush=True)
    # Unbuffered, so that what a stage printed before its limit is in the log.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if toy:
        environment |= {**TOY, "MOPL_CACHE": str(folder / "cache")}
    log, start = folder / f"{stage.name}.txt", time.monotonic()
    with open(log, "w") as file:
        file.write(f"{shown}\n")
        file.flush()
        try:
            done = subprocess.run(
                [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                timeout=limit,
            )  # fmt: skip
            verdict = "done" if done.returncode == 0 else f"failed with exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            verdict = f"cut off after {limit:.0f} s"
    lines = log.read_text().splitlines()
    print("   " + "\n   ".join(lines[1:][-40:]), flush=True)
    print(f"   {verdict} in {time.monotonic() - start:.0f} s", flush=True)
    state = {"verdict": verdict, "seconds": round(time.monotonic() - start, 1), "command": shown}
    if stage.name.startswith("tests"):
        from bench.measuring import about

        counts = next((line.strip("= ") for line in reversed(lines) if re.search(r"\d+ (passed|failed)", line)), None)
        write_file(out, json.dumps({**about(shown), "outcome": counts, **state}, indent=1) + "\n")
        state["outcome"] = counts
    write_file(folder / "stages.json", json.dumps(states(folder) | {stage.name: state}, indent=1) + "\n")
    return verdict == "done"


def archive(folder: Path, path: Path) -> None:
    """Put all files into one."""
    with tempfile.TemporaryDirectory() as scratch:
        made = shutil.make_archive(str(Path(scratch) / "all"), "zip", folder)
        shutil.copyfile(made, path)


def run_all(chosen: list[Stage], folder: Path, arguments: argparse.Namespace) -> int:
    """Run stages in order; return an exit status."""
    end = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    missing = []
    for stage in chosen:
        state = states(folder).get(stage.name, {})
        if state.get("verdict") == "done" and not arguments.again:
            print(f"== {stage.name}: done before ({state['seconds']} s)")
        elif time.monotonic() + arguments.limit > end:
            print(f"== {stage.name}: not begun, less than {arguments.limit:.0f} s are left")
            missing.append(stage.name)
        else:
            if not run(stage, folder, arguments.toy, arguments.limit):
                missing.append(stage.name)
            if arguments.archive:
                archive(folder, arguments.archive)
    print(f"results in {folder}" + (f"; not done: {', '.join(missing)}" if missing else "; all done"))
    return 1 if missing else 0


def main() -> int:
    """Run the stages that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(s.name for s in STAGES)}")
    parser.add_argument("--list", action="store_true", help="list the stages")
    parser.add_argument("--again", action="store_true", help="also run stages that are done")
    parser.add_argument("--toy", action="store_true", help="try the stages at toy sizes, without a GPU")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds after which a stage is cut off")
    parser.add_argument("--minutes", type=float, help="begin no stage whose limit would pass this time from now")
    parser.add_argument("--archive", type=Path, metavar="FILE.zip", help="after each stage, put all files into one")
    parser.add_argument("--out", type=Path, help="where results go (bench/results; with --toy they are dropped)")
    arguments = parser.parse_args()
    if unknown := set(arguments.stages) - {s.name for s in STAGES}:
        parser.error(f"no stage {', '.join(sorted(unknown))}; see --list")
    chosen = [s for s in STAGES if not arguments.stages or s.name in arguments.stages]
    with contextlib.ExitStack() as stack:
        out = arguments.out or ROOT / "bench" / "results"
        if arguments.toy and not arguments.out:
            out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if arguments.list:
            folders = [path.parent for path in out.glob("*/stages.json")]
            for stage in chosen:
                found = [f"{f.name}: {states(f)[stage.name]['verdict']}" for f in folders if stage.name in states(f)]
                print(f"{stage.name:22s} {stage.what}" + (f"  [{'; '.join(found)}]" if found else ""))
            return 0
        folder = out.resolve() / ("toy" if arguments.toy else device_name())
        folder.mkdir(parents=True, exist_ok=True)
        return run_all(chosen, folder, arguments)


if __name__ == "__main__":
    sys.exit(main())
