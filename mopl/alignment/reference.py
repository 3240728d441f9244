"""Log-probabilities of whole data sets: of the reference, of experts, of a model under evaluation.

Those of the reference are computed once and kept in the run as safetensors, in the order of the data. The file says
which data, which tokens and which model they belong to; a file that belongs to others is refused, never used. They are
computed and written chunk by chunk, so that an interruption costs a chunk at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopl._extras import require
from mopl._files import discard_folder, write_file
from mopl._renamed import renamed_keywords
from mopl._restoring import evaluating
from mopl._tensor_files import opened, read_tensors
from mopl._terminal import Progress, progress
from mopl.alignment.methods import Conditioner, ListScores, score_batch
from mopl.language_models.collate import ListCollator, token_batches
from mopl.language_models.tokenization import TokenizedList

CHUNK = 512  # lists of a chunk: seconds to minutes of work, whatever the model


@renamed_keywords(temperature="beta")
@torch.no_grad()
def score_lists(
    model: nn.Module,
    lists: Sequence[TokenizedList],
    *,
    collator: ListCollator,
    tokens_per_batch: int,
    accelerator: Any,
    weights: Tensor | None = None,
    beta: Tensor | None = None,
    conditioner: Conditioner | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Return the summed log-probability of every response, in the order of the lists, on the CPU.

    Processes share the batches; each gets all results. Lists of like length go together.

    Args:
        model: As in `mopl.alignment.methods.score_batch`, on the accelerator's device.
        lists: Tokenised lists.
        collator: Makes the batches.
        tokens_per_batch: Most tokens of a batch, padding included; a longer list is a batch of its own.
        accelerator: accelerate's `Accelerator`.
        weights: (m,), for a model that takes them.
        beta: (m,), for a model that takes it.
        conditioner: Writes both into a list's prompt.
        progress: Told how many lists are done.

    Returns:
        (S,) float32, in nats.
    """
    if conditioner is not None:
        assert weights is not None
        lists = [conditioner(item, weights, weights if beta is None else beta) for item in lists]
    counts = torch.tensor([len(item.responses) for item in lists])
    start = counts.cumsum(0) - counts
    flat = torch.zeros(int(counts.sum()))
    batches = token_batches(lists, tokens_per_batch, padded=not collator.packed)
    device = accelerator.device
    there = [None if value is None else value.float().to(device) for value in (weights, beta)]
    with evaluating(model):
        for number, places in enumerate(batches):
            if number % accelerator.num_processes == accelerator.process_index:
                batch = collator([lists[int(place)] for place in places]).to(device)
                with accelerator.autocast():
                    scores = score_batch(model, batch, *there)
                of_lists = start[torch.from_numpy(places)]
                flat[of_lists[batch.index[:, 0].cpu()] + batch.index[:, 1].cpu()] = scores[batch.mask].float().cpu()
            if progress is not None:
                progress.update(len(places))
    if accelerator.num_processes > 1:
        flat = accelerator.reduce(flat.to(device), "sum").cpu()
    return flat


class ReferenceStore:
    """Log-probabilities of the reference on disk.

    Args:
        folder: Where the files are: `<name>.safetensors`, and while they are made `<name>.parts/`.
        identity: What the numbers depend on besides the data: fingerprints by name.
        accelerator: accelerate's `Accelerator`.
    """

    def __init__(self, folder: Path, identity: dict[str, str], accelerator: Any) -> None:
        self.folder, self.identity, self.accelerator = folder, identity, accelerator

    def load_or_compute(
        self, name: str, lists: Sequence[TokenizedList], identity: dict[str, str], model: nn.Module, **options: Any
    ) -> ListScores:
        """Return what is stored for these lists, computing what is missing with `score_lists(model, ..., **options)`.

        Args:
            name: Of the part of the data.
            lists: The lists.
            identity: Fingerprints of the lists, by name.
            model: The reference.
            options: Of `score_lists`.

        Raises:
            ValueError: If what is stored belongs to other data, other tokens or another model; `DamagedFile` if it
                cannot be read.
        """
        identity = self.identity | identity
        whole = self.folder / f"{name}.safetensors"
        found = self._read(whole, lists, identity)
        if found is not None:
            return ListScores(lists, found)
        of_chunk = identity | {"chunk": str(CHUNK)}
        parts = self.folder / f"{name}.parts"
        values = []
        show = self.accelerator.is_main_process
        with progress(f"reference, {name}", len(lists), "lists", show=show) as bar:
            for number, first in enumerate(range(0, len(lists), CHUNK)):
                chunk, file = lists[first : first + CHUNK], parts / f"{number:05d}.safetensors"
                scores = self._read(file, chunk, of_chunk)
                if scores is None:
                    scores = score_lists(model, chunk, accelerator=self.accelerator, progress=bar, **options)
                    self._write(file, scores, of_chunk)
                else:
                    bar.update(len(chunk))
                values.append(scores)
        self._write(whole, torch.cat(values), identity)
        if self.accelerator.is_main_process and parts.exists():
            discard_folder(parts)
        self.accelerator.wait_for_everyone()
        return ListScores(lists, torch.cat(values))

    def _read(self, file: Path, lists: Sequence[TokenizedList], identity: dict[str, str]) -> Tensor | None:
        if not file.exists():
            return None
        remedy = "take it from a backup, or delete it to compute it again"
        with opened(file, remedy=remedy) as tensors:
            stored = tensors.metadata() or {}
            differ = [key for key, value in identity.items() if stored.get(key) != value]
            if differ:
                there = ", ".join(f"{key} {str(stored.get(key))[:12]}, not {identity[key][:12]}" for key in differ)
                raise ValueError(
                    f"{file} holds log-probabilities of another {' and another '.join(differ)} ({there}); "
                    "delete the file to compute them again, or put back what they were computed with"
                )
        return read_tensors(file, {"scores": (sum(len(item.responses) for item in lists),)}, remedy=remedy)["scores"]

    def _write(self, file: Path, scores: Tensor, identity: dict[str, str]) -> None:
        require("safetensors")
        from safetensors.torch import save_file

        if self.accelerator.is_main_process:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, lambda path: save_file({"scores": scores}, str(path), metadata=identity))
        self.accelerator.wait_for_everyone()
