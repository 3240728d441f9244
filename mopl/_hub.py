"""Names on the Hugging Face hub: looked up once, before a library asks again and again; errors in a line."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mopl._extras import require

_SECONDS = 10.0  # to wait for an answer
_TRUSTED = contextvars.ContextVar("trust_remote_code", default=False)
# By kind of repository, what it is called and a file that it has.
_KINDS = {"model": ("model", "config.json"), "dataset": ("data set", "README.md")}


@contextlib.contextmanager
def trusting(code: bool) -> Iterator[None]:
    """Say for a `with` block, which a command is, whether Python code that comes with a model may be run."""
    token = _TRUSTED.set(code)
    try:
        yield
    finally:
        _TRUSTED.reset(token)


@contextlib.contextmanager
def naming_own_code(name: str) -> Iterator[None]:
    """Say by a `PermissionError` how a model's own Python code is allowed where `from_pretrained` refuses to run it."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise PermissionError(
            f"the model {name} comes with Python code of its own, which would be run to load it; read that code, and "
            "if you trust it pass trust_remote_code=True"
        ) from error


@contextlib.contextmanager
def loading(name: str, what: str = "model") -> Iterator[dict[str, Any]]:
    """Say by an `OSError` which model could not be read: transformers speaks of the network, or of a file inside.

    `name` is a directory, or a name on the hub, and `what` of it is read; what is yielded are options for
    `from_pretrained`.
    """
    require("safetensors")
    from safetensors import SafetensorError

    path = Path(name)
    if path.is_file():
        raise NotADirectoryError(f"the model {name} is a file; name the directory of a model, or one on the hub")
    # A model that takes weights may lie there without a configuration of its own, beside its tokenizer.
    files = ("config.json", "adapter_config.json", *(["tokenizer_config.json"] if what == "tokenizer" else []))
    if path.is_dir() and not any((path / file).is_file() for file in files):
        raise FileNotFoundError(
            f"the directory {name} holds no model: it has no config.json; name the directory that save_pretrained "
            "wrote, or a model on the Hugging Face hub"
        )
    if not path.exists() and (path.is_absolute() or name.startswith(".") or name.count("/") > 1 or " " in name):
        raise FileNotFoundError(f"there is no model {name}; name a directory, or a model on the Hugging Face hub")
    # transformers would ask on the terminal otherwise, and take a "y" from a pipe for an answer.
    options: dict[str, Any] = {"trust_remote_code": _TRUSTED.get()}
    if not path.is_dir() and not find(name):
        options["local_files_only"] = True
    try:
        with naming_own_code(name):
            yield options
    except PermissionError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        if path.is_dir():
            raise OSError(f"the {what} in {name} cannot be loaded ({reason}); is the directory complete?") from error
        raise OSError(_missing(name, "model", reason)) from error


def find(name: str, kind: str = "model", *, cached: Callable[[], bool] = lambda: False) -> bool:
    """Ask the hub for a "model" or "dataset", once; return whether it can be asked for more: not where a copy serves.

    A FileNotFoundError says that the hub has no such name, or cannot be reached while no copy is in its cache or in
    another one, as `cached` says; a PermissionError that it asks for a login.
    """
    if _find(name, kind):
        return True
    from huggingface_hub import constants, try_to_load_from_cache

    if cached() or isinstance(try_to_load_from_cache(name, _KINDS[kind][1], repo_type=kind), str):
        return False
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
    raise FileNotFoundError(_missing(name, kind, f"{reason}, and no copy is in the cache"))


@functools.lru_cache
def _find(name: str, kind: str) -> bool:
    require("huggingface_hub")
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        return False
    what, file = _KINDS[kind]
    try:
        get_hf_file_metadata(hf_hub_url(name, file, repo_type=kind), timeout=_SECONDS)
    except errors.GatedRepoError:
        place = f"https://huggingface.co/{'' if kind == 'model' else 'datasets/'}{name}"
        raise PermissionError(
            f"the {what} {name} on the Hugging Face hub is open only to those who asked for it; ask at {place} and log "
            "in with `hf auth login`, or name another"
        ) from None
    except errors.RepositoryNotFoundError:
        reason = "it has none; log in with `hf auth login` if it is private"
        raise FileNotFoundError(_missing(name, kind, reason)) from None
    except errors.HFValidationError as error:
        raise FileNotFoundError(_missing(name, kind, " ".join(str(error).split()))) from None
    except (errors.EntryNotFoundError, errors.HfHubHTTPError):
        return True  # it is there without this file, or the hub is busy and what reads it tries again
    except Exception:  # no connection: the class depends on the version of the library
        return False
    return True


def _missing(name: str, kind: str, reason: str) -> str:
    here = "directory" if kind == "model" else "file or directory"
    return (
        f"there is no {here} {name}, and no {_KINDS[kind][0]} of that name could be loaded from the Hugging Face hub "
        f"({reason}); correct the name, or name a {here}"
    )


def public_name(name: str | None) -> str | None:
    """Return a model's or data set's name where it can be one on the hub; None of a folder or a file, there or gone."""
    if not name or Path(name).exists() or Path(name).is_absolute():
        return None
    require("huggingface_hub")
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
