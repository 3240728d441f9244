"""Log-probabilities of references on disk: computed once, then read by any training, process or tool.

    store = ReferenceStore("reference")
    logps = store.load_or_compute(lists, model)          # (S,), one a response; no forward pass the second time

A number is found again by the tokens of its prompt and response and by the identity of the model
(`mopl.language_models.model_identity`), so a folder may hold any number of data sets and models; parts of a data set,
or its rows in another order, find what the whole has computed. Files are safetensors:

    scores      (S,) float32, nats
    sequences   (S, 16) uint8, a digest of the tokens of prompt and response
    metadata    the identity: model, config, constants, adapter, attention, precision

They are written chunk by chunk, so that an interruption costs a chunk at most, whole or not at all, and never changed:
any number of processes may share a folder.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mopl._files import discard_folder
from mopl._tensor_files import opened, read_tensors, shapes_of, write_tensors
from mopl._terminal import progress
from mopl.conditioning.weighted import causal_lm_of
from mopl.language_models.head import fuse
from mopl.language_models.model_identity import identity_of
from mopl.language_models.scoring import OneProcess, score_lists
from mopl.language_models.tokenized import TokenizedList, fingerprint_of
from mopl.training.parallel import on_main

CHUNK = 512  # lists of a chunk: seconds to minutes of work, whatever the model
REMEDY = "take it from a backup, or delete it to compute it again"
IDENTITY = ("model", "config", "constants", "adapter", "attention", "precision")


class ReferenceStore:
    """Log-probabilities of references in a folder.

    Args:
        folder: The folder; made when something is written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def load_or_compute(
        self,
        lists: Sequence[TokenizedList],
        model: nn.Module,
        *,
        name: str | None = None,
        identity: Mapping[str, str] | None = None,
        accelerator: Any = None,
        **options: Any,
    ) -> Tensor:
        """Return the log-probability of every response under a reference, computing and storing what is missing.

        Args:
            lists: Tokenised lists, from `mopl.language_models.tokenization.tokenize` for instance.
            model: The reference: a causal language model, plain or with PEFT's adapters, or a `WeightedModel` inside of
                `with model.reference():`. Its head is fused in place; dropout is off meanwhile.
            name: Keep all numbers in one file, `<name>.safetensors`, that is refused if it belongs to another model or
                to other lists; as a run of `mopl align` does.
            identity: What `identity_of` says of the model, where that is known.
            accelerator: accelerate's `Accelerator`, whose processes share the work; by default this process works
                alone, where the model is.
            **options: Of `mopl.language_models.scoring.score_lists`: `collator`, `tokens_per_batch`, `lists_per_batch`.

        Returns:
            (S,) float32, in nats, in the order of the lists and of their responses.

        Raises:
            ValueError: If the model's log-probabilities depend on weights of objectives or are no numbers, an option
                changes them, or the file of that name belongs to others; `DamagedFile` if a file cannot be read.
            TypeError: If there is no such option, or lists or the model are something else.
            OSError: If something is to be computed and the folder cannot be written to.
        """
        _check_options(options)
        _check_lists(lists)
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model is a {type(model).__name__} but must be a loaded causal language model; pass what "
                "AutoModelForCausalLM.from_pretrained returns"
            )
        alone = OneProcess(model)
        accelerator = accelerator or alone
        precision = str(accelerator.mixed_precision)
        if precision == "no":  # the accelerator leaves autocast as it is, which may be on around this call
            precision = alone.mixed_precision
        identity = {**_whole(identity or identity_of(model)), "precision": precision}
        if name is None:
            return self._complete(lists, model, identity, accelerator, "reference", options)
        whole, parts = self.folder / f"{name}.safetensors", ReferenceStore(self.folder / f"{name}.parts")
        found = on_main(accelerator, lambda: _read_whole(whole, lists, identity))
        if found is None:
            found = parts._complete(lists, model, identity, accelerator, f"reference, {name}", options)
            on_main(accelerator, functools.partial(_write, whole, lists, found, identity))
            if lists:
                on_main(accelerator, functools.partial(discard_folder, parts.folder))
        return found

    def load(
        self,
        lists: Sequence[TokenizedList],
        model: nn.Module | Mapping[str, str] | None = None,
        *,
        precision: str = "no",
    ) -> Tensor:
        """Return what is stored for lists, without a forward pass.

        Args:
            lists: Tokenised lists.
            model: The reference, or what `identity_of` said of it; None where the folder has only one, which need not
                be loaded then.
            precision: That of autocast when they were computed: `"no"`, `"bf16"` or `"fp16"`.

        Returns:
            As `load_or_compute`.

        Raises:
            ValueError: If the folder has not all of them; the message says what differs. `DamagedFile` if a file cannot
                be read.
        """
        _check_lists(lists)
        if not (model is None or isinstance(model, (nn.Module, Mapping))):
            raise TypeError(
                f"model is a {type(model).__name__} but must be a loaded model, what identity_of said of it, or None"
            )
        known = self.identities()
        if model is None:
            if len(known) != 1:
                raise ValueError(
                    f"{self.folder} has log-probabilities of {len(known)} models{_listed(known)}; pass the one that is "
                    "wanted, or another folder"
                )
            identity = known[0]
        else:
            found = model if isinstance(model, Mapping) else identity_of(model)
            identity = {"precision": precision, **_whole(found)}
        flat = self._read(lists, identity)
        if missing := int(flat.isnan().sum()):
            others = "" if identity in known else _differences(identity, known)
            raise ValueError(
                f"{self.folder} lacks {missing} of {len(flat)} log-probabilities: "
                + (
                    others
                    or "of this model it has other tokens; pass the same rows, tokenizer, template and max_length"
                )
                + "; or call load_or_compute to compute them"
            )
        return flat

    def identities(self) -> list[dict[str, str]]:
        """Return what `identity_of` said of each model that the folder has log-probabilities of, and the precision."""
        found = {tuple(identity.items()): identity for _, identity in self._files()}
        return list(found.values())

    def _files(self) -> Iterator[tuple[Path, dict[str, str]]]:
        """Yield the files of the folder with their identities; others, and those of earlier versions, are left out."""
        for file in sorted(file for file in self.folder.glob("*.safetensors") if file.is_file()):
            with opened(file, remedy=REMEDY) as tensors:
                metadata = tensors.metadata() or {}
            if all(key in metadata for key in IDENTITY):
                yield file, {key: metadata[key] for key in IDENTITY}

    def _read(self, lists: Sequence[TokenizedList], identity: Mapping[str, str]) -> Tensor:
        """Return what is stored, NaN where nothing is."""
        keys = _keys(lists)
        wanted, found = set(keys), {}
        for file, own in self._files():
            if own == identity:
                found.update((key, score) for key, score in _read_file(file) if key in wanted)
        return torch.tensor([found.get(key, math.nan) for key in keys], dtype=torch.float32)

    def _complete(
        self,
        lists: Sequence[TokenizedList],
        model: nn.Module,
        identity: Mapping[str, str],
        accelerator: Any,
        title: str,
        options: dict[str, Any],
    ) -> Tensor:
        """Return the log-probabilities of the lists; compute and write what is missing, chunk by chunk."""
        flat = on_main(accelerator, lambda: self._read(lists, identity))
        parts = flat.split([len(item.responses) for item in lists])  # views
        missing = [place for place, part in enumerate(parts) if part.isnan().any()]
        batch = options.get("lists_per_batch") or 1
        step = max(batch, CHUNK // batch * batch)  # no batch lies in two chunks
        if not missing:
            return flat
        on_main(accelerator, functools.partial(_check_writable, self.folder))
        fuse(causal_lm_of(model))
        show, done = accelerator.is_main_process, len(lists) - len(missing)
        with progress(title, len(lists), "lists", start=done, show=show) as bar:
            for first in range(0, len(missing), step):
                places = missing[first : first + step]
                chunk = [lists[place] for place in places]
                scores = score_lists(model, chunk, accelerator=accelerator, progress=bar, **options)
                file = self.folder / f"{_name_of(chunk, identity)}.safetensors"
                on_main(accelerator, functools.partial(_write, file, chunk, scores, identity))
                for place, own in zip(places, scores.split([len(item.responses) for item in chunk]), strict=True):
                    parts[place].copy_(own)
        return flat


def _check_lists(lists: Any) -> None:
    if not (hasattr(lists, "__len__") and hasattr(lists, "__getitem__")):
        raise TypeError(
            f"lists is a {type(lists).__name__} but must be a sequence of TokenizedList; pass [item] for one of them, "
            "or what mopl.language_models.tokenization.tokenize returns"
        )


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise where an option of `score_lists` changes the numbers, which are not found by it, or is unknown."""
    for name in options.keys() - {"collator", "tokens_per_batch", "lists_per_batch"}:
        if name not in ("weights", "beta", "temperature", "conditioner", "score"):
            raise TypeError(f"{name} is no option; pass collator, tokens_per_batch or lists_per_batch")
        raise ValueError(
            f"{name} is no part of what a stored log-probability is found by, so those of all trade-offs and scores "
            "would be one; leave it out, or call score_lists, which stores nothing"
        )


# ---------------------------------------------------------------- files


def _check_writable(folder: Path) -> None:
    """Raise before something is computed that could not be kept."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "cannot be written to" if there.is_dir() else "is no folder"
        raise OSError(f"{there} {what}, so log-probabilities cannot be kept in {folder}; pass another folder")


def _keys(lists: Sequence[TokenizedList]) -> list[bytes]:
    """Return a digest of the tokens of each sequence."""
    keys = []
    for item in lists:
        for place, response in enumerate(item.responses):
            prompt = item.prompt_of(place)
            tokens = np.concatenate([[len(prompt)], prompt, response]).astype("<i8")
            keys.append(hashlib.blake2b(tokens.tobytes(), digest_size=16).digest())
    return keys


def _whole(identity: Mapping[str, str]) -> dict[str, str]:
    """Return what tells models apart of an identity that a caller has kept."""
    if lacking := [key for key in IDENTITY if key not in identity and key != "precision"]:
        raise ValueError(f"identity lacks {', '.join(lacking)}; pass all that identity_of(model) returns")
    return {key: identity[key] for key in IDENTITY if key in identity}


def _name_of(lists: Sequence[TokenizedList], identity: Mapping[str, str]) -> str:
    model = hashlib.sha256(repr([identity[key] for key in IDENTITY]).encode()).hexdigest()
    return f"{model[:12]}-{hashlib.sha256(b''.join(_keys(lists))).hexdigest()[:20]}"


def _write(file: Path, lists: Sequence[TokenizedList], scores: Tensor, identity: Mapping[str, str]) -> None:
    if not bool(scores.isfinite().all()):
        rows = [item.index for item in lists for _ in item.responses]
        place = rows[int((~scores.isfinite()).nonzero()[0])]
        raise ValueError(
            f"the reference gives a response of list {place} of the data a log-probability that is no finite number; "
            "load it in bfloat16 or float32, or see whether its files are whole"
        )
    sequences = torch.from_numpy(np.frombuffer(b"".join(_keys(lists)), dtype=np.uint8).reshape(-1, 16).copy())
    write_tensors(file, {"scores": scores, "sequences": sequences}, {key: identity[key] for key in IDENTITY})


def _read_file(file: Path) -> Iterator[tuple[bytes, float]]:
    count = math.prod(shapes_of(file, remedy=REMEDY).get("scores", ()))
    tensors = read_tensors(file, {"scores": (count,), "sequences": (count, 16)}, remedy=REMEDY)
    return zip(map(bytes, tensors["sequences"].numpy()), tensors["scores"].tolist(), strict=True)


def _read_whole(file: Path, lists: Sequence[TokenizedList], identity: Mapping[str, str]) -> Tensor | None:
    """Return what a file holds that must be of these lists and this model; None where there is none."""
    if not file.exists():
        return None
    with opened(file, remedy=REMEDY) as tensors:
        stored = tensors.metadata() or {}
    size = sum(len(item.responses) for item in lists)
    if "tokenizer" in stored:  # as earlier versions wrote it: one fingerprint of all tokens, in their order
        stored = {**stored, "data": stored["tokenizer"], "precision": stored.get("precision", "").split(" ")[-1]}
        wanted = {"data": fingerprint_of(lists), "model": identity["model"], "precision": identity["precision"]}
    else:  # files of earlier versions say nothing of constants; that of a run still belongs to it
        wanted = {key: value for key, value in identity.items() if key in stored or key != "constants"}
    differ = [
        f"{_another(key)} ({str(stored.get(key))[:12]}, not {wanted[key][:12]})"
        for key in wanted
        if stored.get(key) != wanted[key]
    ]
    if not differ and "tokenizer" in stored:
        return read_tensors(file, {"scores": (size,)}, remedy=REMEDY)["scores"]
    if not differ:
        found, keys = dict(_read_file(file)), _keys(lists)
        if all(key in found for key in keys):
            return torch.tensor([found[key] for key in keys], dtype=torch.float32)
        differ = ["other data (other tokens)"]
    raise ValueError(
        f"{file} holds log-probabilities of {' and '.join(differ)}; delete the file to compute them "
        "again, or put back what they were computed with"
    )


def _another(key: str) -> str:
    return f"{'other' if key in ('data', 'constants') else 'another'} {key}"


def _differences(identity: Mapping[str, str], known: Sequence[Mapping[str, str]]) -> str:
    """Say in what a model differs from those that a folder has."""
    if not known:
        return "it has none"
    nearest = min(known, key=lambda other: sum(other[key] != value for key, value in identity.items()))
    each = [f"{key} {nearest[key][:12]}, not {identity[key][:12]}" for key in IDENTITY if nearest[key] != identity[key]]
    return f"it has those of another model, which differs in {'; '.join(each)}"


def _listed(known: Sequence[Mapping[str, str]]) -> str:
    each = [", ".join(f"{key} {identity[key][:12]}" for key in IDENTITY) for identity in known]
    return f" ({'; '.join(each)})" if each else ""
