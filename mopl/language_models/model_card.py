"""README.md of an export: a model card as the Hugging Face hub reads it, that says only what files and runs record.

It names no place of a machine: a base model, or data, that is a folder has no name that a stranger could use. What is
not known is said not to be known.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mopl import __version__
from mopl._extras import require
from mopl._files import CARD
from mopl._hub import public_name
from mopl._markdown import escaped, table
from mopl.language_models._card_requests import (
    requests_of_adapter,
    requests_of_adapters,
    requests_of_gguf,
    requests_of_model,
)

PICTURE = "front.png"


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What a card says of how a model came to be: what a run knows and its files do not.

    Attributes:
        method: Name of the method that trained it.
        training: What was set, and what it is called, in the order of the card.
        data: Name of the data; no path.
        dataset: Name of the data on the hub, if it is there.
        front: The front as a table of Markdown.
        figures: What its figures are, in a sentence.
        picture: Writes the front as a PNG to the path that it is given.
        objectives: Their names, where the model itself does not say them, as one whose weights are fixed.
        weights: Of one trade-off, likewise.
        kl_weight: α, likewise.
    """

    method: str | None = None
    training: Mapping[str, str] = dataclasses.field(default_factory=dict)
    data: str | None = None
    dataset: str | None = None
    front: str | None = None
    figures: str | None = None
    picture: Callable[[Path], object] | None = None
    objectives: Sequence[str] = ()
    weights: Sequence[float] | None = None
    kl_weight: float | None = None


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was exported.

    Attributes:
        form: "adapters", or for one trade-off "model" or "adapter"; "gguf": either, with `places` or without.
        objectives: Their names, in the order of the weights.
        base: Name or place of the base model; None where nothing says it.
        weights: Of one trade-off; None of all, and of a model whose weights are fixed and not known.
        beta: β of one trade-off.
        kl_weight: α, where the model takes one.
        places: Of adapters: the folder of each objective's, in that order.
        grid: Of adapters: names of the trade-offs that are one adapter each.
        rank: Of adapters, and of those of the grid.
        grid_rank: As `rank`, of those of the grid.
        lora_bias: Whether adapters have biases.
        virtual_tokens: How many tokens of the tokenizer stand in front of each text.
        text: What the tokenizer writes in front of each text, in words.
        prompt: Whether an adapter is virtual tokens, of PEFT's prompt tuning.
        beta_trained: β of the training.
        base_file: Of "gguf": the file of the base model, or of the model at one trade-off.
        stop: Of "gguf": a text that ends an answer and that the file cannot name.
    """

    form: str
    objectives: Sequence[str]
    base: str | None = None
    weights: Sequence[float] | None = None
    beta: Sequence[float] | None = None
    kl_weight: float | None = None
    places: Sequence[str] = ()
    grid: Sequence[str] = ()
    rank: int = 0
    grid_rank: int = 0
    lora_bias: bool = False
    virtual_tokens: int = 0
    text: str | None = None
    prompt: bool = False
    beta_trained: Any = None
    base_file: str = ""
    stop: str | None = None

    @property
    def base_name(self) -> str | None:
        """Name of the base model on the hub."""
        return public_name(self.base)


def write_card(folder: Path, exported: Exported, facts: ModelFacts | None = None) -> None:
    """Write README.md, in the place of one that PEFT has written, and front.png if there is a front.

    Args:
        folder: Of the export.
        exported: What is in it.
        facts: What its run knows; None for a model without a run.
    """
    facts = facts or ModelFacts()
    if facts.picture is not None:
        facts.picture(folder / PICTURE)
    exported = dataclasses.replace(
        exported,
        objectives=exported.objectives or facts.objectives,
        weights=facts.weights if exported.weights is None else exported.weights,
        kl_weight=facts.kl_weight if exported.kl_weight is None else exported.kl_weight,
    )
    (folder / CARD).write_text(card(exported, facts), encoding="utf-8")


def card(exported: Exported, facts: ModelFacts) -> str:
    """Return a model card: a block of YAML, which `huggingface_hub.ModelCard` reads, and Markdown."""
    require("huggingface_hub")
    from huggingface_hub import ModelCard, ModelCardData

    licence, base = licence_of(exported.base), exported.base_name
    given: dict[str, Any] = dict(licence)
    gguf = exported.form == "gguf"
    adapter = bool(exported.places) or exported.form == "adapter"
    data = ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "adapter" if adapter else "finetune",
        library_name="gguf" if gguf else "peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["mopl", "multi-objective", *(["lora"] if adapter and not exported.prompt else [])],
        datasets=None if facts.dataset is None else [facts.dataset],
        **given,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        *_what(exported),
        *_requests(exported),
        *_front(exported, facts),
        *_training(exported, facts),
        *_sources(exported, facts, licence),
        *_limits(exported, facts),
    ]
    return ModelCard("\n\n".join(parts) + "\n").content


def licence_of(base: str | None) -> dict[str, str]:
    """Return what the card of a base model says of its licence, by the hub's keys; nothing is asked on the network.

    The card is that in its folder, or one of a model on the hub that was downloaded before.
    """
    if not base:
        return {}
    require("huggingface_hub")
    from huggingface_hub import ModelCard, try_to_load_from_cache

    file: Any = Path(base) / CARD
    if not file.is_file():
        file = None if (name := public_name(base)) is None else try_to_load_from_cache(name, CARD)
    if not isinstance(file, (str, Path)):
        return {}
    try:
        said = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # somebody else's file: YAML of any kind, or bytes that are no text
        return {}
    found = {key: said[key] for key in ("license", "license_name", "license_link") if isinstance(said.get(key), str)}
    if not found.get("license_link", "https:").startswith(("https:", "http:")):
        del found["license_link"]  # a file beside that card
    for key in ("license", "license_name"):
        if re.search(r"[/\\]", found.get(key, "")):
            del found[key]  # a place of somebody's machine
    return found if "license" in found else {}


# ---------------------------------------------------------------- the parts


def _what(exported: Exported) -> list[str]:
    names = [escaped(name) for name in exported.objectives]
    listed = ", ".join(names)
    if exported.places:
        at = "" if exported.kl_weight is None else f", at the KL weight {exported.kl_weight:g}"
        rows = [
            [f"w{i}", name, f"`{place}`"] for i, (name, place) in enumerate(zip(names, exported.places, strict=True), 1)
        ]
        said = [
            f"# {listed}: adapters for every trade-off",
            f"{len(names)} LoRA adapters of one base model, trained together{at}. Run all of them at once, each with a "
            "scale: the scales are the weights of the objectives, at least 0 and with the sum 1, and every such choice "
            "is a trade-off that the model was trained for. It can be another one in every request.",
            table(["weight", "objective", "adapter"], rows),
            _own_scale(exported),
        ]
        if exported.grid:
            said.append(
                f"Trade-offs as one adapter each, of rank {exported.grid_rank}, for servers that take one adapter in a "
                f"request: {', '.join(f'`{name}`' for name in exported.grid)}."
            )
        return said
    what = {"adapter": "an adapter", "gguf": "a GGUF file for llama.cpp"}.get(exported.form, "a plain model")
    if exported.weights is None:
        return [f"# {listed}" if listed else "# A tuned language model", f"It is {what}, for one trade-off."]
    at = ", ".join(f"{name} {w:g}" for name, w in zip(names, exported.weights, strict=True))
    said = [f"# {at}: one trade-off", f"It is {what}, for the weights {at}."]
    rows = [[name, f"{w:g}"] for name, w in zip(names, exported.weights, strict=True)]
    headers = ["objective", "weight"]
    if exported.beta is not None:
        headers.append("β, of the sum 1")
        rows = [[*row, f"{b:.4g}"] for row, b in zip(rows, exported.beta, strict=True)]
    said.append(table(headers, rows, numbers=True))
    if exported.kl_weight is not None:
        said.append(f"KL weight: {exported.kl_weight:g}.")
    return said


def _own_scale(exported: Exported) -> str:
    if exported.form == "gguf":
        return f"`{exported.base_file}` is the base model. All are GGUF, the files of llama.cpp."
    return (
        f"All have rank {exported.rank}, no patterns and the scale 1 of their own (`lora_alpha` = `r`), so what a "
        "server multiplies adapter i with is the weight of objective i."
    )


def _requests(exported: Exported) -> list[str]:
    if exported.form == "gguf":
        title = "## Ask for a trade-off" if exported.places else "## Use it"
        return [title, *requests_of_gguf(exported.base_file, exported.places, exported.text, exported.stop)]
    base = exported.base_name or "BASE_MODEL"
    note = [] if exported.base_name else ["`BASE_MODEL` is the folder of the base model, which has no public name."]
    if exported.form == "adapters":
        made = requests_of_adapters(exported.places, exported.grid, base, exported.grid_rank, exported.lora_bias)
        return ["## Ask for a trade-off", *note, *made]
    if exported.form == "adapter":
        return ["## Use it", *note, *requests_of_adapter(base, exported.rank, exported.prompt, exported.text)]
    return ["## Use it", *requests_of_model(exported.virtual_tokens, exported.text)]


def _front(exported: Exported, facts: ModelFacts) -> list[str]:
    if facts.front is None:
        return []
    one = "" if exported.weights is None else " This export is one of these trade-offs, or one between them."
    said = ["## Trade-offs", f"What was measured at each trade-off after training.{one}"]
    if facts.picture is not None:
        said.append(f"![The front: the figures of the objectives at each trade-off]({PICTURE})")
    return [*said, facts.front, *([escaped(facts.figures)] if facts.figures else [])]


def _training(exported: Exported, facts: ModelFacts) -> list[str]:
    rows = dict(facts.training)
    if exported.beta_trained is not None and "β" not in rows:
        rows["β"] = json.dumps(exported.beta_trained)
    rows |= {"exported by": f"mopl {__version__}"}
    method = "" if facts.method is None else f" Method: `{facts.method}`."
    known = "" if facts.training else " No run is at hand, so this is all that is known."
    said = f"Trained with mopl, multi-objective preference learning.{method}{known}"
    return ["## Training", said, table(["", ""], [[escaped(k), escaped(v)] for k, v in rows.items()])]


def _sources(exported: Exported, facts: ModelFacts, licence: Mapping[str, str]) -> list[str]:
    base = exported.base_name
    if base is not None:
        model = f"Base model: [{escaped(base)}](https://huggingface.co/{base})."
    elif exported.form in ("model", "gguf"):
        model = "Base model: a model in a folder, without a public name; this directory needs nothing of it."
    else:
        model = (
            "Base model: a model in a folder, without a public name, so `base_model_name_or_path` is empty where that "
            "folder would have to be published. The adapters fit that model and no other."
        )
    if licence:
        named = " ".join(escaped(licence[key]) for key in ("license", "license_name", "license_link") if key in licence)
        terms = f"Licence: that of the base model, which its files give as {named}."
    else:
        terms = (
            "Licence: not known. The files of the base model that were at hand name none; look it up before you use or "
            "share this."
        )
    if facts.dataset is not None:
        data = f"Data: [{escaped(facts.dataset)}](https://huggingface.co/datasets/{facts.dataset})."
    elif facts.data is not None:
        data = f"Data: “{escaped(facts.data)}”, which has no public name."
    else:
        data = "Data: not recorded with this model."
    return ["## Base model, licence, data", f"{model}\n\n{terms}\n\n{data}"]


def _limits(exported: Exported, facts: ModelFacts) -> list[str]:
    said = []
    if facts.front is not None:
        said.append("The figures are of the held-out part of the data named above. Other prompts were not measured.")
    else:
        said.append("This card has no figures: nothing was measured where it was exported.")
    if exported.places:
        said += [
            "Weights below 0, or of another sum than 1, are none that the adapters were trained for.",
            'Adding the factors of adapters apart (`combination_type="linear"` of PEFT, merged adapters of LoRAX) is '
            "another model than adding what they do.",
        ]
    else:
        said.append("Another trade-off is another export.")
    said.append(
        "What the base model does wrong, it may do still: the objectives are all that was trained, and no objective "
        "here is a proof of safety or of truth."
    )
    return ["## Limits", "\n".join(f"* {line}" for line in said)]
