"""Checks the command lines of the pages without running them: programs, options, files, addresses."""

import re
from pathlib import Path

from doc_pages import ROOT, Command

from mopl.cli import build_parser

# Programs that the pages name and this project does not know further; of modules of Python those after -m.
PROGRAMS = {
    "vllm", "llama-server", "text-generation-launcher", "mkdocs", "ruff", "pyright", "twine", "git", "xargs", "export",
    ".", "cd", "torchrun",
}  # fmt: skip
MODULES = {"venv", "build", "sglang.launch_server"}
# What the pages ask of servers: mopl serve and vLLM on port 8000, LoRAX, llama.cpp, SGLang, TGI.
ADDRESSES = {
    "8000": ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health"),
    "8080": ("/generate", "/v1/chat/completions"),
    "30000": ("/generate", "/load_lora_adapter"),
    "3000": ("/generate",),
}


class Failed(AssertionError):
    """A command line that does not do what its page promises."""


def parse(words: list[str]) -> None:
    """Check that the parser takes a command."""
    from mopl.cli import _parse

    try:
        _parse(words)
    except SystemExit as ended:
        if ended.code:
            raise


def check_command(command: Command, written: str = "") -> None:
    """Check a command of a page; `written` are the names of the files that the page writes."""
    program, words = command.words[0], list(command.words[1:])
    try:
        if program == "mopl":
            parse(words)
        elif program == "accelerate":
            at = words.index("-m") if "-m" in words else len(words)
            if words[0] != "launch" or words[at + 1 : at + 2] != ["mopl"]:
                raise Failed("pages launch mopl alone: accelerate launch ... -m mopl ...")
            parse(words[at + 2 :])
        elif program == "torchrun":
            check_torchrun(words)
        elif program in ("python", "python3"):
            check_python(words, written)
        elif program == "pip":
            check_install(words)
        elif program == "pytest":
            check_pytest(words)
        elif program == "bash":
            if not (ROOT / words[0]).is_file():
                raise Failed(f"there is no {words[0]}")
        elif program == "curl":
            address_of(words)
        elif program not in PROGRAMS:
            raise Failed(f"there is no program {program} in PROGRAMS of tests/doc_checks.py")
    except SystemExit:
        raise Failed(f"mopl does not take {' '.join(words)}") from None


def check_torchrun(words: list[str]) -> None:
    """Check that torchrun starts mopl, with all options that are meant for it."""
    from torch.distributed.run import parse_args

    try:
        found = parse_args(words)
    except SystemExit:
        raise Failed(f"torchrun does not take {' '.join(words)}") from None
    if not found.module or found.training_script != "mopl":
        raise Failed("pages launch mopl alone: torchrun ... -m -- mopl ...")
    parse(found.training_script_args)


def address_of(words: list[str]) -> tuple[str, str, str]:
    """Return the address that curl asks, its port and its path."""
    for word in words:
        if match := re.fullmatch(r"http://127\.0\.0\.1:(\d+)(/\S*)", word):
            if match[2] in ADDRESSES.get(match[1], ()):
                return word, match[1], match[2]
    raise Failed("curl asks no server of ADDRESSES of tests/doc_checks.py")


def check_python(words: list[str], written: str) -> None:
    """Check that a module or a script is there, and knows its options if it is one of the project."""
    if words[:2] == ["-m", "mopl"]:
        parse(words[2:])
    elif words[:2] == ["-m", "bench.paper"]:
        from bench.paper.__main__ import build_parser as parser_of_papers

        parser_of_papers().parse_args(words[2:])
    elif words[0] == "-m" and words[1].startswith("bench."):
        check_script(ROOT / f"{words[1].replace('.', '/')}.py", words[2:])
    elif words[0] == "-m":
        if words[1] not in MODULES:
            raise Failed(f"there is no module {words[1]} in MODULES of tests/doc_checks.py")
    elif words[0] != "-c" and words[0] not in written.split():
        check_script(ROOT / words[0], words[1:])


def check_install(words: list[str]) -> None:
    """Check that an installation names extras and files that are there."""
    if words[:1] != ["install"]:
        raise Failed(f"pages install with pip, they do not {' '.join(words[:1])}")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for word in words:
        if match := re.match(r"(?:\.|mopl)(?:\[([\w,-]+)\])?$|.*mopl.*\.git", word):
            for extra in (match[1] or "").split(","):
                if extra and not re.search(rf"^{re.escape(extra)} = \[", project, re.MULTILINE):
                    raise Failed(f"pip install {' '.join(words)}: there is no extra {extra}")
    if "-c" in words and not (ROOT / words[words.index("-c") + 1]).is_file():
        raise Failed(f"pip install {' '.join(words)}: there is no such file of constraints")


def check_pytest(words: list[str]) -> None:
    for word in words:
        if word.endswith(".py") or word.startswith(("tests", "bench")):
            if not (ROOT / word.partition("::")[0]).exists():
                raise Failed(f"pytest {' '.join(words)}: there is no {word}")
    if "-m" in words:
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        for mark in re.findall(r"[a-z]+", words[words.index("-m") + 1]):
            if mark not in ("and", "or", "not") and f'    "{mark}: ' not in project:
                raise Failed(f"pytest {' '.join(words)}: there is no mark {mark}")


def check_script(file: Path, options: list[str]) -> None:
    """Check that a script of the project is there and knows the options; those of benches are in files beside it."""
    if not file.exists():
        raise Failed(f"there is no {file.relative_to(ROOT)}")
    beside = "".join(each.read_text(encoding="utf-8") for each in file.parent.glob("*.py"))
    for option in options:
        name = option.partition("=")[0]
        if option.startswith("--") and f'"{name}"' not in beside and name not in ("--help",):
            raise Failed(f"{file.relative_to(ROOT)} has no option {name}")


def options_of_mopl() -> dict[str, set[str]]:
    """Return the options of each command, and of mopl itself under ''."""
    parser = build_parser()
    (commands,) = (each for each in parser._actions if hasattr(each, "choices") and each.choices)
    found = {"": {name for action in parser._actions for name in action.option_strings}}
    for name, each in commands.choices.items():  # type: ignore[union-attr]
        found[name] = set(each._option_string_actions)
    return found


def defaults_of_mopl() -> dict[str, dict[str, str]]:
    """Return the default of each option of each command as its help states it."""
    parser = build_parser()
    (commands,) = (each for each in parser._actions if hasattr(each, "choices") and each.choices)
    return {
        name: {
            option: match[1]
            for option, action in each._option_string_actions.items()
            if (match := re.search(r"\(default: (.+?)\)", action.help or ""))
        }
        for name, each in commands.choices.items()  # type: ignore[union-attr]
    }
