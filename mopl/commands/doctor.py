"""`mopl doctor`: what is installed, what each command lacks, and whether losses and kernels give the right numbers."""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mopl import __version__
from mopl._counted import counted
from mopl._extras import COMMANDS, EXTRAS, PACKAGES, install
from mopl._terminal import say
from mopl.commands.parser import add_command

EXAMPLES = """
The exit status is 0 if everything that is installed works, and 1 otherwise. Attach the output to a bug report.

examples:
  a table:
    mopl doctor
  the same for a program:
    mopl doctor --json
"""
BASE = ("torch", "triton", "numpy", "msgspec", "filelock")
UNKNOWN = "not installed"
# What a command needs beyond its basic packages for one of its uses.
USES: dict[str, tuple[str, tuple[str, ...]]] = {
    "align --demo": ("demo-lm", EXTRAS["demo-lm"]),
    "clp --demo": ("demo-lm", EXTRAS["demo-lm"]),
    "rank (MSLR, tables on a terminal)": ("demo", EXTRAS["demo"]),
    "trainers for TRL": ("trl", EXTRAS["trl"]),
    "trainers for sentence-transformers": ("sentence-transformers", EXTRAS["sentence-transformers"]),
}


def add_parser(commands: Any) -> None:
    """Add `mopl doctor` to the commands."""
    parser = add_command(commands, "doctor", run, "check what is installed and what works on this machine", EXAMPLES)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Run `mopl doctor`; return 1 if something that is installed does not work."""
    found = diagnose()
    if arguments.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        say(*_lines(found))
    return int(any(not check["works"] for check in found["checks"]))


def diagnose() -> dict[str, Any]:
    """Return what `mopl doctor` says, as plain values for JSON."""
    packages = {name: _version(name) for name in dict.fromkeys([*BASE, *(m for e in EXTRAS.values() for m in e)])}
    needs = {name: (extra, modules) for name, (extra, modules) in {**COMMANDS, **USES}.items()}
    commands = {}
    for name, (extra, modules) in needs.items():
        missing = [PACKAGES.get(module, module) for module in modules if packages[module] is None]
        commands[name] = {"missing": missing, "remedy": install(extra) if missing else None}
    checks: list[dict[str, Any]] = []
    gpu = "torch is not installed"
    if packages["torch"] is not None:
        from mopl.commands.doctor_checks import describe_gpu, run_checks

        checks, gpu = run_checks(), describe_gpu()
    return {
        "mopl": __version__,
        "python": platform.python_version(),
        "machine": _machine(),
        "gpu": gpu,
        "packages": packages,
        "commands": commands,
        "checks": checks,
    }


def _version(module: str) -> str | None:
    """Return the version of a package, None if it is not installed."""
    if find_spec(module) is None:
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
    there = {name: version for name, version in found["packages"].items() if version is not None}
    width = max(map(len, there))
    lines += [f"  {PACKAGES.get(name, name):<{width}}  {version}" for name, version in there.items()]
    if absent := [PACKAGES.get(name, name) for name, version in found["packages"].items() if version is None]:
        lines += _wrapped("  not installed (optional): ", absent)
    lines += ["", "commands"]
    width = max(map(len, found["commands"]))
    for name, state in found["commands"].items():
        if not state["missing"]:
            lines.append(f"  {name:<{width}}  ready")
        else:
            lines += [*_wrapped(f"  {name:<{width}}  needs ", state["missing"]), f"    run: {state['remedy']}"]
    lines += ["", "checks"]
    if not found["checks"]:
        lines.append(f"  none: {found['gpu']}; run: pip install 'torch>=2.8'")
    width = max((len(check["name"]) for check in found["checks"]), default=0)
    for check in found["checks"]:
        lines.append(f"  {check['name']:<{width}}  {'right' if check['works'] else 'WRONG'}  {check['detail']}")
    wrong = [check["name"] for check in found["checks"] if not check["works"]]
    verdict = f"{len(wrong)} of {len(found['checks'])} checks failed" if wrong else "everything that is installed works"
    return [*lines, "", verdict]


def _wrapped(start: str, names: Sequence[Any], columns: int = 80) -> list[str]:
    """Return names after a beginning, on lines of at most `columns`."""
    lines = [start]
    for place, name in enumerate(names):
        word = name + ("," if place + 1 < len(names) else "")
        if len(lines[-1]) + len(word) > columns and lines[-1].strip():
            lines.append(" " * min(len(start), 28))
        lines[-1] += word + " "
    return [line.rstrip() for line in lines]
