"""Processes of Python that the tests start: alone, or several in a group as a launcher would start them.

A fresh process computes for ten seconds to import torch, transformers and PEFT before it does anything. Those that are
started here are forks of a server that has imported them, but nothing of mopl; they read their environment, arguments
and working directory as a fresh process does. What an import costs or which packages it brings is a matter for
processes of `subprocess`, and so is how a process ends: these leave as `ending.py` does.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, forkserver
from pathlib import Path

DISTRIBUTED = Path(__file__).parent / "distributed"
LIMIT = 300.0  # seconds; a hang is a failure
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([
    "torch.distributed.tensor", "torch._inductor.compile_fx", "transformers.modeling_utils", "accelerate", "peft",
])  # fmt: skip


def _become(arguments: Sequence[str], environment: dict[str, str], out: str, err: str) -> None:
    """Do in this fork what `python ARGUMENTS` does: a script, `-m MODULE` or `-c CODE`, with arguments of its own."""
    gc.freeze()  # what the server has imported is no garbage
    for number, name in ((1, out), (2, err)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    tempfile.tempdir = None  # a folder that the environment names
    os.environ.clear()
    os.environ.update(environment)
    paths = environment.get("PYTHONPATH", "")
    sys.path[:0] = paths.split(os.pathsep) if paths else []
    kind, *rest = arguments
    status = 0
    try:
        if kind == "-m":
            sys.path.insert(0, os.getcwd())
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.path.insert(0, "")
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
            sys.argv = [kind, *rest]
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _serve() -> None:
    """Start the server if there is none, with one thread of OpenMP: more do not survive a fork."""
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        forkserver.ensure_running()
    finally:
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads


def _run(commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]]) -> subprocess.CompletedProcess[str]:
    """Run commands at the same time; where one fails the others are ended, as a launcher does.

    What the first to fail wrote comes last, where a test that shows the end of an error shows it.
    """
    _serve()
    with tempfile.TemporaryDirectory() as folder:
        files = [(str(Path(folder, f"out-{rank}")), str(Path(folder, f"err-{rank}"))) for rank in range(len(commands))]
        processes = [
            CONTEXT.Process(target=_become, args=(list(command), {**os.environ, **environment}, *file))
            for command, environment, file in zip(commands, environments, files, strict=True)
        ]
        deadline = time.monotonic() + LIMIT
        try:
            for process in processes:
                process.start()
            while (alive := [p.sentinel for p in processes if p.is_alive()]) and not any(p.exitcode for p in processes):
                connection.wait(alive, timeout=1.0)
                if time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired(list(commands[0]), LIMIT)
            failed = [p.exitcode or 0 for p in processes]
            for process in processes:
                process.terminate()
                process.join(30.0)
        finally:
            for process in processes:
                process.kill()
                process.join()
        status = next((code for code in (*failed, *(p.exitcode for p in processes)) if code), 0)
        in_order = sorted(range(len(files)), key=lambda rank: failed[rank] != 0)
        out, err = ("".join(Path(files[rank][n]).read_text() for rank in in_order) for n in range(2))
        return subprocess.CompletedProcess(list(commands[0]), status, out, err)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` in the working directory, with more in its environment."""
    return _run([arguments], [environment])


@contextlib.contextmanager
def started(*arguments: str, **environment: str) -> Iterator[tuple[int, Path, Path, Callable[[float], int | None]]]:
    """Start `python ARGUMENTS`, with more in its environment; it is killed at the end of the block.

    Yields its number, the files of its standard output and error, and what waits for its end and returns its status.
    """
    _serve()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        given = {**os.environ, **environment}
        process = CONTEXT.Process(target=_become, args=(list(arguments), given, str(out), str(err)))
        process.start()

        def wait(seconds: float) -> int | None:
            process.join(seconds)
            return process.exitcode

        try:
            assert process.pid is not None
            yield process.pid, out, err, wait
        finally:
            process.kill()
            process.join()


def launch(processes: int, *script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script with its arguments on several processes on the CPU, which meet at a store of this one."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment,
    }  # fmt: skip
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **common} for rank in range(processes)]
    return _run([script] * processes, ranks)


def launch_by_accelerate(
    processes: int, *script: str, options: Sequence[str] = ("--multi_gpu",), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Do what `launch` does as a person would, with accelerate's launcher, which starts new processes by torchrun."""
    # `--multi_gpu` is how the launcher is told to start processes by torchrun; `--cpu` would start a single one.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options, "--num_processes", str(processes)]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment}
    command = [*launcher, str(DISTRIBUTED / "ending.py"), *script]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.terminate()  # and not kill: the launcher then ends the processes that hang
        process.communicate(timeout=60)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def launch_mopl(*command: str, start=launch, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of mopl on two processes, one of which comes late to every question about a file."""
    return start(2, str(DISTRIBUTED / "late_process.py"), "1", *command, **environment)
