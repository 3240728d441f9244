"""Policies that a trainer writes into a folder and asks the server to load: `mopl serve MODEL --policies FOLDER`.

One policy is served at a time, around a base model that stays. Only folders inside of FOLDER are read, by no link. They
hold JSON and safetensors and no code, but whoever may ask the server may then choose what it answers with: hence the
option. A policy that cannot be loaded, for whatever reason, changes nothing: the one before it is served on.
"""

from __future__ import annotations

import copy
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from mopl._extras import require
from mopl._records import parse_json, read_json
from mopl.conditioning import HyperPromptModel, LoraMixture, ParameterMixture, WeightedModel
from mopl.conditioning.saved_models import ADAPTER_CONFIG, CONFIG_FILE, AdapterRecord, read_kind
from mopl.language_models import models
from mopl.language_models.tokenization import ListTokenizer
from mopl.serving.errors import ApiError
from mopl.serving.model import ServedModel

_KINDS = (ParameterMixture.KIND, LoraMixture.KIND, HyperPromptModel.KIND)  # what trainings write
_READ = (".json", ".safetensors", ".md", ".txt")  # what their files are called; pickles are none of them


class LoadBody(msgspec.Struct, forbid_unknown_fields=True):
    """A body of /v1/load_policy."""

    name: str
    path: str


def load_body(raw: bytes) -> LoadBody:
    """Read the body of a request to load a policy.

    Raises:
        ApiError: If it is not as it should be.
    """
    try:
        return msgspec.convert(parse_json(raw.decode("utf-8")), LoadBody)
    except (UnicodeDecodeError, ValueError, msgspec.ValidationError) as error:
        raise ApiError(f"the body must be {{'name': ..., 'path': ...}}: {error}") from None


class PolicyFolder:
    """Makes what is served of the folders that a trainer writes.

    Args:
        folder: Where the trainer writes them; it is made if it is not there.
        base: The fused base model, on its device; its generation_config is replaced by a plain one.
        encoder: How conversations become tokens.
        name: What requests call the base model, until a policy is loaded.

    Attributes:
        plain: The base model as it is served.

    Raises:
        OSError: If the folder cannot be made.
    """

    def __init__(self, folder: str | Path, base: Any, encoder: ListTokenizer, *, name: str) -> None:
        require("transformers", what="serving")
        from transformers import GenerationConfig

        self.folder = Path(folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        known = base.generation_config
        # What is sampled is softmax(logits / temperature), as the trainer computes it: no penalties, no cut.
        base.generation_config = GenerationConfig(
            bos_token_id=known.bos_token_id, eos_token_id=known.eos_token_id, pad_token_id=known.pad_token_id
        )
        self._base, self._encoder = base, encoder
        self.plain = ServedModel(base, encoder, ("base",), name=name, takes_weights=False, fixed=True)

    def find(self, path: str) -> Path:
        """Return the folder of a policy by its path inside of the one that is served.

        Raises:
            ApiError: 403 if it is outside, 404 if it holds no policy.
        """
        try:
            found = (self.folder / path).resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a character that no name has
            raise ApiError(f"path is {path!r:.200}, which names no folder ({error!s:.200})", "path") from None
        if ".." in Path(path).parts or not found.is_relative_to(self.folder):
            raise ApiError(f"path is {path!r:.200}, which is outside of the folder of policies", "path", status=403)
        if not os.path.isfile(found / CONFIG_FILE):  # which is no error where the name is too long
            raise ApiError(
                f"path is {path!r:.200} but there is no {CONFIG_FILE} in that folder inside of {self.folder}; write "
                "the policy there first, and check that trainer and server see one folder",
                "path", status=404, code="policy_not_found",
            )  # fmt: skip
        return found

    def maker(self, name: str, path: str) -> Callable[[], ServedModel]:
        """Return what loads a policy when nothing is being answered.

        Args:
            name: What requests call it.
            path: Its folder, inside of the one that is served.

        Raises:
            ApiError: If the name cannot be one, or as `find`.
        """
        if not name or len(name) > 200 or "@" in name or not name.isprintable():
            raise ApiError(f"name is {name!r:.200} but must be 1 to 200 printable characters without @", "name")
        folder = self.find(path)

        def make() -> ServedModel:
            try:
                return load()
            except BaseException as error:  # panics of the readers' Rust are no Exception
                why = " ".join((str(error) or type(error).__name__).split())
            raise ApiError(f"{path:.200} cannot be loaded: {why:.1000}", "path", code="policy_not_loaded")

        def load() -> ServedModel:
            _check_files(folder)
            # A policy gets modules of its own, so that adapters never lie in the base: a load may fail half-way, when
            # some of them are in already.
            base = copy.deepcopy(self._base) if _writes(folder) else models.sharing(self._base)
            with models.quiet():
                policy: Any = WeightedModel.from_pretrained(folder, base)
            policy.to(next(self._base.parameters()).device).eval()
            trained = policy.record.beta
            alpha = (trained[0] if isinstance(trained, (list, tuple)) else trained) if policy.takes_kl_weight else None
            if alpha is not None and not (isinstance(alpha, (int, float)) and math.isfinite(alpha)):
                raise ValueError(f"its {CONFIG_FILE} has no KL weight of the training but {alpha!r:.80}")
            return ServedModel(policy, self._encoder, policy.record.objectives, name=name, kl_weight=alpha)

        return make


def _check_files(folder: Path) -> None:
    """Raise unless a folder holds what a training writes: a policy of a kind that it has, in files of its own.

    Raises:
        OSError: If it cannot be read.
        ValueError: If something else is there, or a link, which may lead anywhere.
    """

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        for name in (*folders, *files):
            path = Path(parent, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                what = "a link" if stat.S_ISLNK(mode) else "no file"
                raise ValueError(f"{path.relative_to(folder)} is {what}; a policy lies in files of its own")
            if stat.S_ISREG(mode) and not name.startswith(".") and path.suffix not in _READ:
                raise ValueError(f"{path.relative_to(folder)} is neither JSON nor safetensors; nothing else is read")
    if (kind := read_kind(folder)) not in _KINDS:
        raise ValueError(f"its {CONFIG_FILE} says it is a {kind!s:.80}; a policy is one of {', '.join(_KINDS)}")


def _writes(folder: Path) -> bool:
    """Return whether loading a policy may write values into its base model, which then needs memory of its own."""
    if read_kind(folder) == ParameterMixture.KIND:
        return True
    for file in sorted(folder.rglob(ADAPTER_CONFIG)):
        adapter = read_json(file, AdapterRecord)
        # PiSSA, OLoRA and others take out of the base what they start from; biases are those of the base.
        quiet = adapter.get("init_lora_weights", True) in (True, False, None, "gaussian", "orthogonal")
        if adapter["peft_type"] != "LORA" or adapter.get("bias", "none") != "none" or not quiet:
            return True
    return False
