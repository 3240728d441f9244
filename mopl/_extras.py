"""Optional packages: which extra of mopl brings which module, one error that says how to install it, and versions."""

from __future__ import annotations

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

_HF = ("transformers", "tokenizers", "huggingface_hub", "datasets", "accelerate", "safetensors", "httpx")
_EVAL = ("moocore", "matplotlib")
_REWARDS = ("vaderSentiment", "rouge_score", "pyphen", "glin_profanity", "regex")
# Modules by extra, as in pyproject.toml; the first extra that has a module is named unless a caller knows better.
EXTRAS: dict[str, tuple[str, ...]] = {
    "hf": _HF,
    "peft": (*_HF, "peft"),
    "trl": (*_HF, "trl"),
    "eval": _EVAL,
    "rewards": _REWARDS,
    "demo": (*_EVAL, "accelerate", "safetensors", "tqdm", "rich", "sklearn", "statsmodels"),
    "demo-lm": (*_HF, "peft", *_EVAL, *_REWARDS, "gguf", "tqdm", "rich"),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
    "pandas": ("pandas",),
    "vllm": ("vllm", "safetensors"),
    "sentence-transformers": (*_HF, "sentence_transformers"),
    "serve": (*_HF, "peft", "starlette", "uvicorn"),
}
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")  # of `log_with`; each is the extra and the module of its name
NO_EXTRA = ("deepspeed",)  # pip would install it before the torch that its installation needs
PACKAGES = {
    "yaml": "pyyaml",
    "huggingface_hub": "huggingface-hub",
    "sklearn": "scikit-learn",
    "rouge_score": "rouge-score",
    "sentence_transformers": "sentence-transformers",
    "glin_profanity": "glin-profanity",
}

_TRAINING = ("accelerate", "safetensors", "tqdm", "moocore", "matplotlib")
# What a command cannot do without, and the extra that brings all of it.
COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rank": ("demo", _TRAINING),
    "steer": ("demo", ("safetensors", "moocore")),
    "report": ("demo", ("moocore", "matplotlib")),
    "align": ("demo-lm", ("transformers", *_TRAINING)),
    "clp": ("demo-lm", ("transformers", *_TRAINING)),
    "generate": ("demo-lm", ("transformers", "safetensors")),
    "export": ("demo-lm", ("transformers", "safetensors")),
    "serve": ("serve", ("transformers", "safetensors", "starlette", "uvicorn")),
}


def require(*modules: str, what: str = "this", extra: str | None = None) -> None:
    """Check that optional modules, top-level names such as `"sklearn"`, are installed, without importing them.

    The ImportError says what needs them and how to install all that are missing: by `extra`, where it has them.
    """
    missing = [name for name in dict.fromkeys(modules) if not is_installed(name)]
    if not missing:
        return
    extras = dict.fromkeys(_extra_of(name, extra) for name in missing if name not in NO_EXTRA)
    alone = [name for name in missing if name in NO_EXTRA]
    commands = [install(*extras)] if extras else []
    commands += [f"pip install {' '.join(alone)}"] if alone else []
    names = [PACKAGES.get(name, name) for name in missing]
    listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    are = "is" if len(names) == 1 else "are"
    raise ImportError(
        f"{what} needs {listed}, which {are} not installed; run: {' && '.join(commands)}", name=missing[0]
    )


def require_for(command: str, *more: str) -> None:
    """Check what a command of `mopl`, and its options, need before it reads or writes anything; see `require`."""
    extra, modules = COMMANDS[command]
    require(*modules, *more, extra=extra)


def install(*extras: str) -> str:
    """Return the command that installs extras: into the clone that this is, or beside an installed package."""
    clone, chosen = Path(__file__).resolve().parent.parent, ",".join(extras)
    if not (clone / "constraints.txt").is_file() or not (clone / "pyproject.toml").is_file():
        return f"pip install 'mopl[{chosen}]'"
    if clone == Path.cwd():
        return f"pip install -c constraints.txt -e '.[{chosen}]'"
    return f"pip install -c {shlex.quote(str(clone / 'constraints.txt'))} -e {shlex.quote(f'{clone}[{chosen}]')}"


def version_of(text: str) -> tuple[int, int]:
    """Return the first two numbers of a version such as 2.8.0+cu128."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _extra_of(module: str, extra: str | None) -> str:
    if extra is not None and module in EXTRAS[extra]:
        return extra
    return next(name for name, modules in EXTRAS.items() if module in modules)


def is_installed(module: str) -> bool:
    """Return whether a module, a top-level name, could be imported; without importing it."""
    # A module that is loaded, perhaps a stand-in without a specification; None is how Python notes a forbidden one.
    if module in sys.modules:
        return sys.modules[module] is not None
    found = find_spec(module)
    # Any folder of the name is a module without an origin: Weights & Biases keeps its runs in `wandb`.
    return found is not None and found.origin is not None
