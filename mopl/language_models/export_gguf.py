"""A model that takes weights as GGUF files for llama.cpp, whose server takes a scale for each adapter in a request.

    DIR/README.md            what it is and how to ask for a trade-off; beside it front.png, if there is a front
    DIR/mopl.json            objectives, and the files of their adapters in that order
    DIR/<base model>.gguf    the base model, in the number format in which it was loaded
    DIR/<objective>.gguf     the LoRA adapter of an objective, of which the scale is the weight

of a mixture of adapters; of any model, at one trade-off, a plain model in one GGUF file. Where tokens in front of each
text hold the trade-off (hyper prompts, weights in words), the chat template writes them: llama.cpp puts no tokens
before the texts of other requests but a beginning-of-sequence token.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mopl._extras import require
from mopl._files import TEMPORARY, write_folder
from mopl._hub import public_name
from mopl._records import read_json
from mopl.conditioning import TextPrompt
from mopl.conditioning.references import OWN_REFERENCE
from mopl.conditioning.saved_models import CONFIG_FILE
from mopl.language_models.export import check_free, export
from mopl.language_models.export_adapters import check_mixture, export_adapters, folder_names
from mopl.language_models.gguf_files import write_gguf_adapter, write_gguf_model
from mopl.language_models.gguf_files.families import family_of
from mopl.language_models.gguf_files.model import ends_of
from mopl.language_models.gguf_files.tokenizer import added_tokens
from mopl.language_models.model_card import Exported, ModelFacts, write_card
from mopl.language_models.tokenization import ListTokenizer

KIND = "gguf"


def export_gguf(
    mixture: Any,
    tokenizer: Any,
    directory: str | os.PathLike[str],
    *,
    kl_weight: float | None = None,
    base_model: str | None = None,
    facts: ModelFacts | None = None,
    show_progress: bool = False,
) -> Path:
    """Write the base model and the adapters of a mixture as GGUF into a new directory, whole or not at all.

    The adapters are those of `export_adapters`, with its comparisons; every file is read back and compared.

    Args:
        mixture: A `LoraMixture` of a family that `write_gguf_model` takes. It is not changed.
        tokenizer: Its tokenizer, or a `ListTokenizer`.
        directory: A path where nothing is, or an empty directory.
        kl_weight: α, of a mixture whose coefficients depend on it.
        base_model: Name of the base model, if it is not the one that the model inside has.
        facts: What the model card says besides: method, data, front, picture.
        show_progress: Show on standard error how far it is.

    Returns:
        The directory.

    Raises:
        ImportError: If gguf is not installed.
        FileExistsError: If something is in the way.
        ValueError: If the model is no mixture of LoRA adapters that is linear in the weights, or llama.cpp is not
            known to compute it or to split texts so; the message says what can be done instead.
    """
    require("gguf", "peft", "transformers", what="GGUF", extra="demo-lm")
    folder, tokenizer = check_free(directory), _plain(tokenizer)
    try:
        check_mixture(mixture)
    except ValueError as error:
        raise ValueError(f"{error}. As GGUF: mopl export RUN --weights W.. --gguf DIR") from None
    base = mixture.causal_lm
    family_of(base)  # before the adapters are compared
    source = base_model or getattr(mixture, "name_or_path", "") or None
    *places, base_name = folder_names([*mixture.record.objectives, _base_name(source)])
    files = [f"{place}.gguf" for place in places]

    def fill(path: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=path) as temporary:
            made = export_adapters(mixture, Path(temporary) / "a", kl_weight=kl_weight, base_model=source)
            record = read_json(made / CONFIG_FILE)
            for objective, place, file in zip(mixture.record.objectives, record["adapters"], files, strict=True):
                write_gguf_adapter(made / place, base.config, path / file, name=objective)
        write_gguf_model(base, tokenizer, path / f"{base_name}.gguf", name=_base_name(source), without_adapters=True,
                         show_progress=show_progress)  # fmt: skip
        record |= {"kind": KIND, "form": "adapters", "base": f"{base_name}.gguf", "adapters": files}
        _write_record(path, record)
        exported = Exported(
            form="gguf", objectives=mixture.record.objectives, base=source, kl_weight=record["kl_weight"],
            places=files, base_file=f"{base_name}.gguf", stop=ends_of(base, tokenizer).text,
            beta_trained=mixture.record.beta,
        )  # fmt: skip
        write_card(path, exported, facts)

    write_folder(folder, fill, replace=False)
    return folder


def export_gguf_model(
    model: nn.Module,
    tokenizer: Any,
    weights: Tensor | Sequence[float] | None,
    directory: str | os.PathLike[str],
    *,
    beta: Tensor | Sequence[float] | None = None,
    text_prompt: TextPrompt | None = None,
    base_model: str | None = None,
    facts: ModelFacts | None = None,
    show_progress: bool = False,
) -> Path:
    """Write a model at one trade-off as one GGUF file into a new directory, whole or not at all.

    It is what `export` makes, with its comparisons, in another format. Arguments are those of `export`.

    Returns:
        The directory.

    Raises:
        ImportError: If gguf is not installed.
        FileExistsError: If something is in the way.
        ValueError: If the model cannot be exported so, or llama.cpp is not known to compute it or to split texts so;
            or if tokens hold the trade-off and there is no chat template to write them.
    """
    require("gguf", "transformers", what="GGUF", extra="demo-lm")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, tokenizer = check_free(directory), _plain(tokenizer)

    def fill(path: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=path) as temporary:  # as large as the model
            made = export(
                model, tokenizer, weights, Path(temporary) / "m", beta=beta, text_prompt=text_prompt,
                base_model=base_model, facts=facts,
            )  # fmt: skip
            record: dict[str, Any] = read_json(made / CONFIG_FILE)
            plain = AutoModelForCausalLM.from_pretrained(str(made), dtype="auto", trust_remote_code=False).eval()
            written = AutoTokenizer.from_pretrained(str(made), trust_remote_code=False)
            front = _front(written)
            write_gguf_model(plain, written, path / "model.gguf", name="model", front=front,
                             show_progress=show_progress)  # fmt: skip
            stop = ends_of(plain, written).text
        source = base_model or record["base_model"]
        record |= {"kind": KIND, "form": "model", "base_model": public_name(source), "file": "model.gguf"}
        del record["origin"]
        if record.get("reference") not in (None, *OWN_REFERENCE):
            record["reference"] = public_name(record["reference"]) or "another model"
        if front:
            record["front"] = written.decode(front)
        _write_record(path, record)
        exported = Exported(
            form="gguf", objectives=record.get("objectives") or (), base=source, weights=record["weights"],
            beta=record["objective_temperature"], base_file="model.gguf", text=record.get("front"), stop=stop,
            beta_trained=record.get("beta"),
        )  # fmt: skip
        write_card(path, exported, facts)

    write_folder(folder, fill, replace=False)
    return folder


def _plain(tokenizer: Any) -> Any:
    return tokenizer.tokenizer if isinstance(tokenizer, ListTokenizer) else tokenizer


def _base_name(source: str | None) -> str:
    """Return the last part of a base model's name on the hub; "base" for one without."""
    name = public_name(source)
    return "base" if name is None else name.rsplit("/", 1)[-1]


def _front(tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer puts before a text, but for a beginning-of-sequence token."""
    (before, _), bos = added_tokens(tokenizer), tokenizer.bos_token_id
    if bos is not None and before[:1] == [bos]:
        return before[1:]
    return before[:-1] if bos is not None and before[-1:] == [bos] else before


def _write_record(path: Path, record: dict[str, Any]) -> None:
    (path / CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
