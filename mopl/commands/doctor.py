"""`mopl doctor`: what is installed and can be imported, what each command lacks, whether the numbers are right."""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mopl import __version__
from mopl._counted import counted
from mopl._extras import COMMANDS, EXTRAS, PACKAGES, install, is_installed
from mopl._terminal import say
from mopl.commands.parser import add_command

EXAMPLES = """
Every package that is installed is imported, and every kind of loss is computed, with its gradient, beside the formula
in float64. The exit status is 0 if all of this goes well, and 1 otherwise. Attach the output to a bug report.

examples:
  a table:
    mopl doctor
  the same for a program:
    mopl doctor --json
"""
BASE = ("torch", "triton", "numpy", "msgspec", "filelock", "yaml")
SECONDS_TO_IMPORT = 300
# Imports the modules of its arguments and writes what each raised; what packages print themselves goes to stderr.
IMPORTER = """
import json, os, sys
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
sys.path[:] = json.loads(sys.argv[1])
for name in sys.argv[2:]:
    try:
        __import__(name)
        error = None
    except BaseException as raised:
        error = f"{type(raised).__name__}: {' '.join(str(raised).split())}"
    print(json.dumps([name, error]), file=out, flush=True)
os._exit(0)
"""
# What a command needs with its default options, and for its other uses.
DEFAULTS = {"rank": ("statsmodels",), **dict.fromkeys(("align", "generate", "export", "serve"), ("peft",))}
USES: dict[str, tuple[str, tuple[str, ...]]] = {
    "rank on LETOR files": ("demo", ("sklearn",)),
    "clp with the built-in rewards": ("demo-lm", (*EXTRAS["rewards"], "peft")),
    "align --demo, clp --demo": ("demo-lm", EXTRAS["demo-lm"]),
    "tables and bars on a terminal": ("demo", ("rich", "tqdm")),
    "trainers for TRL": ("trl", EXTRAS["trl"]),
    "trainers for sentence-transformers": ("sentence-transformers", EXTRAS["sentence-transformers"]),
}


def add_parser(commands: Any) -> None:
    """Add `mopl doctor` to the commands."""
    parser = add_command(commands, "doctor", run, "check what is installed and what works on this machine", EXAMPLES)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Run `mopl doctor`; return 1 if something that is installed does not work."""
    if sys.stderr.isatty() and not arguments.quiet:
        say("mopl doctor: importing what is installed ...", file=sys.stderr)
    found = diagnose()
    if arguments.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        say(*_lines(found))
    return int(bool(found["broken"]) or any(not check["works"] for check in found["checks"]))


def diagnose() -> dict[str, Any]:
    """Return what `mopl doctor` says, as plain values for JSON."""
    packages = {name: _version(name) for name in dict.fromkeys([*BASE, *(m for e in EXTRAS.values() for m in e)])}
    broken = import_errors([name for name, version in packages.items() if version is not None])
    # Without these nothing runs; Triton has no builds for other systems.
    broken |= {name: "not installed, but mopl needs it" for name in BASE
               if packages[name] is None and (name != "triton" or platform.system() == "Linux")}  # fmt: skip
    commands = {}
    for name, (extra, needed) in {**COMMANDS, **USES}.items():
        modules = (*needed, *DEFAULTS.get(name, ()))
        missing = [PACKAGES.get(module, module) for module in modules if packages[module] is None]
        failing = [PACKAGES.get(module, module) for module in (*BASE, *modules) if module in broken]
        commands[name] = {"missing": missing, "broken": failing, "remedy": install(extra) if missing else None}
    checks: list[dict[str, Any]] = []
    gpu = "torch is not installed" if packages["torch"] is None else "torch cannot be imported"
    if packages["torch"] is not None and "torch" not in broken:
        from mopl.commands.doctor_checks import describe_gpu, run_checks

        checks, gpu = run_checks(), describe_gpu()
    return {
        "mopl": __version__,
        "python": platform.python_version(),
        "machine": _machine(),
        "gpu": gpu,
        "packages": packages,
        "broken": broken,
        "commands": commands,
        "checks": checks,
    }


def import_errors(modules: Sequence[str]) -> dict[str, str]:
    """Return what packages raise when they are imported, by module; in a process of its own, which may crash."""
    left, errors = list(modules), {}
    while left:
        command = [sys.executable, "-c", IMPORTER, json.dumps(sys.path), *left]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        try:
            done = subprocess.run(command, capture_output=True, timeout=SECONDS_TO_IMPORT, env=environment)
            said, why = done.stdout, f"the process ended with status {done.returncode}"
        except subprocess.TimeoutExpired as late:
            said, why = late.stdout or b"", f"not imported within {SECONDS_TO_IMPORT} seconds"
        found = dict(json.loads(line) for line in said.decode().splitlines())
        errors |= {name: error for name, error in found.items() if error is not None}
        left = left[len(found) :]
        if left:
            errors[left.pop(0)] = why
    return errors


def _version(module: str) -> str | None:
    """Return the version of a package, None if it is not installed."""
    if not is_installed(module):
        return None
    for name in (PACKAGES.get(module, module), module):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def _machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"system": f"{platform.system()} {platform.machine()}", "cores": cores}
    if (memory := Path("/proc/meminfo")).exists():
        sizes = dict(line.split(":", 1) for line in memory.read_text(encoding="ascii").splitlines())
        for name, key in (("memory_gib", "MemTotal"), ("available_memory_gib", "MemAvailable")):
            found[name] = round(int(sizes[key].split()[0]) / 2**20, 1)
    found["free_disk_gib"] = round(shutil.disk_usage(".").free / 2**30, 1)
    if (cpu := Path("/proc/cpuinfo")).exists():
        flags = set(next((line for line in cpu.read_text().splitlines() if line.startswith("flags")), "").split())
        known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
        found["cpu_features"] = [flag for flag in known if flag in flags]
    return found


def _lines(found: dict[str, Any]) -> list[str]:
    """Return the table, at most 80 columns wide but for commands to copy."""
    machine = found["machine"]
    memory = f", {machine['memory_gib']} GiB of memory" if "memory_gib" in machine else ""
    cores = counted(machine["cores"], "core")
    lines = [
        f"mopl {found['mopl']}, Python {found['python']}",
        f"{machine['system']}, {cores}{memory}, {machine['free_disk_gib']} GiB of disk free here",
        *([f"CPU features: {', '.join(machine['cpu_features'])}"] if machine.get("cpu_features") else []),
        f"GPU: {found['gpu']}",
        "",
        "packages",
    ]
    there = {name: version or "" for name, version in found["packages"].items() if version or name in found["broken"]}
    width = max(map(len, there))
    for name, version in there.items():
        why = f"  BROKEN  {found['broken'][name]}" if name in found["broken"] else ""
        lines.append(f"  {PACKAGES.get(name, name):<{width}}  {version}{why}")
    if absent := [PACKAGES.get(name, name) for name in found["packages"] if name not in there]:
        lines += _wrapped("  not installed (optional): ", absent)
    lines += ["", "commands"]
    width = max(map(len, found["commands"]))
    for name, state in found["commands"].items():
        if state["missing"]:
            lines += [*_wrapped(f"  {name:<{width}}  needs ", state["missing"]), f"    run: {state['remedy']}"]
        if state["broken"]:
            lines += _wrapped(f"  {name:<{width}}  cannot import ", state["broken"])
        if not state["missing"] and not state["broken"]:
            lines.append(f"  {name:<{width}}  ready")
    lines += ["", "checks"]
    if not found["checks"]:
        remedy = "; run: pip install 'torch>=2.8'" if found["packages"]["torch"] is None else ""
        lines.append(f"  none: {found['gpu']}{remedy}")
    width = max((len(check["name"]) for check in found["checks"]), default=0)
    for check in found["checks"]:
        lines.append(f"  {check['name']:<{width}}  {'ok' if check['works'] else 'WRONG'}  {check['detail']}")
    wrong = [check["name"] for check in found["checks"] if not check["works"]]
    failed = [f"{len(wrong)} of {len(found['checks'])} checks failed"] if wrong else []
    if found["broken"]:
        failed.append(f"{len(found['broken'])} of {len(there)} packages cannot be imported")
    imported = f"{len(there)} packages can be imported"
    right = f"{imported} and {len(found['checks'])} checks passed" if found["checks"] else imported
    return [*lines, "", "; ".join(failed) or right]


def _wrapped(start: str, names: Sequence[Any], columns: int = 80) -> list[str]:
    """Return names after a beginning, on lines of at most `columns`."""
    lines = [start]
    for place, name in enumerate(names):
        word = name + ("," if place + 1 < len(names) else "")
        if len(lines[-1]) + len(word) > columns and lines[-1].strip():
            lines.append(" " * min(len(start), 28))
        lines[-1] += word + " "
    return [line.rstrip() for line in lines]
