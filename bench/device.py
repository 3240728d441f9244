"""Everything that needs a GPU, in one command: `python -m bench.device` at the root of a checkout.

Runs in stages, each in a process of its own, the most important first: the limits and the sizes that have goals, the
GPU tests in several workers, the list losses, then the rest. Writes to `bench/results/<device>/` what each measured
(`STAGE.json`, written anew with every figure), what it printed (`STAGE.txt`), and after every stage `summary.md`, the
goals beside what was measured. It can be cut off at any time and started again: finished stages are skipped (`--again`
runs them anew), one that was cut off goes on where it was. A stage that fails does not stop the next; the exit status
says whether one did.

    python -m bench.device --plan                            # what to carry and to paste for a lease of half an hour
    python -m bench.device                                   # all stages that are not done
    python -m bench.device --list                            # the stages, and which are done
    python -m bench.device limits logprob-head               # only these
    python -m bench.device --minutes 9.5 --archive all.zip   # end by then; all files in one
    python -m bench.device --toy                             # without a GPU: try every stage at toy sizes

Needs torch, triton, msgspec and pytest; a training step also transformers, accelerate, peft and TRL. Peers (TRL, Liger,
CCE, QuACK, flash-attention) are measured where they are installed and listed as absent where they are not. `--toy` runs
the kernels in Triton's interpreter, where that runs, and collects the tests without running them; its figures mean
nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from bench.cards import CARDS
from bench.device_stages import MUST, STAGES, WORKER_BYTES, Stage, expected, plan, states
from mopl._files import write_file

ROOT = Path(__file__).resolve().parent.parent
TOY = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
# A loop over a size, which Triton 3.6 interprets only with NumPy before 2.4.
TRIAL = "import torch, mopl.ops; mopl.ops.gathered_logprob(torch.zeros(1, 8), torch.zeros(1, dtype=torch.long))"
SLACK = 2.5  # a stage is cut off after so many times what it should take


def device_name() -> str:
    """Return the GPU's name as a folder's; exit where there is none."""
    import torch

    if not torch.cuda.is_available():
        sys.exit(
            "no GPU here: torch.cuda.is_available() is False. Everything in this command needs one; "
            "--toy tries its stages without, --plan says what it would do"
        )
    return re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name()).strip("-").lower()


def toy_environment() -> dict[str, str]:
    """Return what the toy stages are started with, and say in words where the interpreter does not run."""
    environment = {**TOY, "TRITON_INTERPRET": "1"}
    trial = subprocess.run(
        [sys.executable, "-c", TRIAL], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    if trial.returncode:
        reason = (trial.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(
            "Triton's interpreter does not run here, as Triton 3.6 does not with NumPy 2.4 or later: the stages run "
            f"the CPU's twins of the kernels, and logprob-tune has nothing to choose from ({reason})"
        )
        environment["TRITON_INTERPRET"] = "0"
    return environment


def start(arguments: list[str], environment: dict[str, str], log: Path, limit: float) -> str:
    """Run Python with arguments in a process group of its own and return what became of it."""
    with open(log, "a") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp,  # a group, not a session: whoever ends this one's session ends what it started
        )  # fmt: skip
        try:
            status = process.wait(limit)
            return "done" if status == 0 else f"failed with exit status {status}"
        except subprocess.TimeoutExpired:
            return f"cut off after {limit:.0f} s"
        finally:  # what it started must not go on beside the next stage
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run(stage: Stage, folder: Path, environment: dict[str, str], toy: bool, limit: float) -> bool:
    """Run a stage, keep what it printed, note what became of it, and say whether it succeeded."""
    out, log = folder / f"{stage.name}.json", folder / f"{stage.name}.txt"
    card = next((name for name in CARDS if name.lower() in folder.name), "H200")
    workers = min(os.cpu_count() or 1, CARDS[card].plan.memory // WORKER_BYTES)
    arguments = [
        part.replace("{out}", str(out)).replace("{card}", card).replace("{workers}", str(workers))
        for part in (*stage.command, *(stage.toy if toy else ()))
    ]
    quoted = (f'"{part}"' if " " in part else part for part in arguments)
    shown = " ".join(["python", *quoted]).replace(str(out), f"bench/results/{folder.name}/{out.name}")
    print(f"== {stage.name}: {stage.what}\n   {shown}", flush=True)
    log.write_text(f"{shown}\n")
    begin = time.monotonic()
    if toy and not stage.interpret:
        environment = environment | {"TRITON_INTERPRET": "0"}
    verdict = start(arguments, environment, log, limit)
    lines, seconds = log.read_text().splitlines(), time.monotonic() - begin
    print("   " + "\n   ".join(lines[1:][-40:]), flush=True)
    print(f"   {verdict} in {seconds:.0f} s", flush=True)
    state = {"verdict": verdict, "seconds": round(seconds, 1), "command": shown}
    if stage.name.startswith("tests"):
        from bench.measuring import about

        ends = [line.strip("= ") for line in lines if re.search(r"\d+ (passed|failed|error)", line)]
        bad = [line for line in lines if re.search(r"^(FAILED|ERROR) ", line)]
        state |= {"outcome": ends[-1] if ends else None, "failed": bad}
        write_file(out, json.dumps({**about(shown), **state}, indent=1) + "\n")
    write_file(folder / "stages.json", json.dumps(states(folder) | {stage.name: state}, indent=1) + "\n")
    return verdict == "done"


def finish(folder: Path, archive: Path | None) -> None:
    """Write the summary, and put all files into one."""
    from bench.summary import summary

    try:
        write_file(folder / "summary.md", summary(folder))
    except Exception:  # a page can be made again, a stage cannot
        traceback.print_exc()
    if archive:
        with tempfile.TemporaryDirectory() as scratch:
            shutil.copyfile(shutil.make_archive(str(Path(scratch) / "all"), "zip", folder), archive)


def run_all(chosen: list[Stage], folder: Path, arguments: argparse.Namespace) -> int:
    """Run stages in order; return an exit status."""
    # Unbuffered, so that what a stage printed before its limit is in the log.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(toy_environment() if arguments.toy else {})}
    environment.setdefault("MOPL_CACHE", str(folder / "cache"))  # what `tune` chose goes where the results go
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    end = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    missing = []
    for stage in chosen:
        state, (seconds, _) = states(folder).get(stage.name, {}), expected(stage, folder)
        left = end - time.monotonic()
        if state.get("verdict") == "done" and not arguments.again:
            print(f"== {stage.name}: done before ({state['seconds']} s)")
        elif left < seconds:
            print(f"== {stage.name}: not begun, it takes about {seconds:.0f} s and {left:.0f} s are left")
            missing.append(stage.name)
        else:
            if arguments.again:
                (folder / f"{stage.name}.json").unlink(missing_ok=True)
            limit = arguments.limit or (900 if arguments.toy else max(60, SLACK * seconds))
            if not run(stage, folder, environment, arguments.toy, min(limit, left)):
                missing.append(stage.name)
            finish(folder, arguments.archive)
    print(f"results in {folder}" + (f"; not done: {', '.join(missing)}" if missing else "; all done"))
    return 1 if missing else 0


def check_needs() -> None:
    """Exit where something is missing without which no stage runs."""
    needed = ("torch", "triton", "pytest", *MUST)
    if lacking := [name for name in needed if importlib.util.find_spec(name) is None]:
        sys.exit(f"not installed: {', '.join(lacking)}. --plan says what to carry to a machine without a network")


def main() -> int:
    """Run the stages that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(s.name for s in STAGES)}")
    parser.add_argument("--plan", action="store_true", help="print what to carry, what to paste and how long it takes")
    parser.add_argument("--list", action="store_true", help="list the stages")
    parser.add_argument("--again", action="store_true", help="also run stages that are done")
    parser.add_argument("--toy", action="store_true", help="try the stages at toy sizes, without a GPU")
    parser.add_argument("--limit", type=float, help=f"seconds after which a stage is cut off ({SLACK} times its own)")
    parser.add_argument("--minutes", type=float, help="begin no stage that would pass this time from now, cut one off")
    parser.add_argument("--archive", type=Path, metavar="FILE.zip", help="after each stage, put all files into one")
    parser.add_argument("--out", type=Path, help="where results go (bench/results; with --toy they are dropped)")
    arguments = parser.parse_args()
    if unknown := set(arguments.stages) - {s.name for s in STAGES}:
        parser.error(f"no stage {', '.join(sorted(unknown))}; see --list")
    chosen = [s for s in STAGES if not arguments.stages or s.name in arguments.stages]
    with contextlib.ExitStack() as stack:
        out = arguments.out or ROOT / "bench" / "results"
        folders = [path.parent for path in sorted(out.glob("*/stages.json")) if path.parent.name != "toy"]
        if arguments.plan:
            options = f" --out {arguments.out}" if arguments.out else ""
            options += f" --archive {arguments.archive}" if arguments.archive else ""
            print(plan(tuple(chosen), folders[-1] if folders else None, options))
            return 0
        if arguments.list:
            for stage in chosen:
                found = [f"{f.name}: {states(f)[stage.name]['verdict']}" for f in folders if stage.name in states(f)]
                print(f"{stage.name:22s} {stage.what}" + (f"  [{'; '.join(found)}]" if found else ""))
            return 0
        check_needs()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what a stage started is ended, too
        if arguments.toy and not arguments.out:
            out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = out.resolve() / ("toy" if arguments.toy else device_name())
        folder.mkdir(parents=True, exist_ok=True)
        return run_all(chosen, folder, arguments)


if __name__ == "__main__":
    sys.exit(main())
