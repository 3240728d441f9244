"""A conditioned model at one trade-off as a plain directory that transformers and vLLM load.

`kind="model"`: adapters are merged. The k virtual tokens of a `HyperPromptModel` become k new tokens of the vocabulary,
whose embeddings are the prompt at w, and the tokenizer puts them in front of every text by itself:

    conditioned model        v0 .. v(k-1)                     <s> text
    exported directory       <|mopl_0|> .. <|mopl_k-1|>       <s> text        written by tokenizer and chat template

What is guaranteed, for positions="hf":

* The logits of the original vocabulary are those of the conditioned model, in float32 up to rounding; with 16-bit
  parameters adapters are merged in float32 and rounded once.
* `generate` of transformers never gives a new token: `suppress_tokens` of generation_config.json has them all. vLLM
  does not read that entry. For it the output head is a matrix of its own, in which the row of each new token is the
  mean of all other rows. Its logit is then the mean of the others, so greedy decoding never takes it, and it is sampled
  with probability at most 1/V (Jensen), in a trained model less by many orders. `logit_bias` of a request rules it out:
  `{id: -100}` for the ids that `mopl.json` lists. An output head with a bias gets -10000 there, which is never.
* `keep_tied=True` leaves head and embeddings one matrix, for loaders that know nothing else (vLLM's Gemma, old versions
  of its GPT-2). The rows of the new tokens are then the prompt itself and their logits anything: suppress them.

A tokenizer with unused places at the end of the model's vocabulary takes those first; the logits there, of tokens that
do not exist, are the only ones that change. As with a beginning-of-sequence token, a text that the chat template has
written must be tokenised with `add_special_tokens=False`, or it gets the front twice; `apply_chat_template` and the
servers do so.

A model conditioned by words (`text_prompt`) becomes its merged self with a tokenizer that writes the words.

Adapters that are mixed (`LoraMixture`) are added to the weights at w, in float32 and rounded once.

`kind="adapter"`: the LoRA adapter of a model conditioned by words; mixed adapters as one, whose factors are theirs side
by side, so that servers that load adapters take a trade-off as one of theirs; or a prompt without adapters as PEFT's
prompt tuning (which counts positions from the padding on: pad on the right). PEFT has no adapter for a prompt with
adapters.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mopl import __version__
from mopl._arguments import check_choice
from mopl._extras import require
from mopl._files import write_folder
from mopl._records import read_json
from mopl._renamed import renamed_keywords
from mopl.conditioning import TextPrompt, TuningRecord, check_weights
from mopl.conditioning.causal_lm import is_peft
from mopl.conditioning.merging import merged, settle_merged, settle_ties
from mopl.conditioning.saved_models import ADAPTER_CONFIG, AdapterRecord, base_of_adapter
from mopl.conditioning.weighted import WeightedModel, causal_lm_of
from mopl.language_models._export_check import (
    TOLERANCE,
    check_adapters,
    check_files,
    compare,
    logits_of,
)
from mopl.language_models._export_tokenizer import Front, check_saved, prepare_tokenizer
from mopl.language_models._generation_arguments import objectives_of
from mopl.language_models.head import unfuse
from mopl.language_models.model_card import Exported, ModelFacts, write_card
from mopl.language_models.tokenization import ListTokenizer
from mopl.language_models.turns import write_turn_end

KINDS = ("model", "adapter")
CONFIG_FILE, KIND = "mopl.json", "export"
NEVER = -1e4  # a logit below any other, within float16


@renamed_keywords(objective_temperature="beta")
def export(
    model: nn.Module,
    tokenizer: Any,
    weights: Tensor | Sequence[float] | None,
    directory: str | os.PathLike[str],
    *,
    kind: Literal["model", "adapter"] = "model",
    beta: Tensor | Sequence[float] | None = None,
    text_prompt: TextPrompt | None = None,
    keep_tied: bool = False,
    origin: str | None = None,
    base_model: str | None = None,
    facts: ModelFacts | None = None,
) -> Path:
    """Write a conditioned model at one trade-off into a new directory, whole or not at all.

    The directory holds model or adapter, tokenizer, and `mopl.json` with weights, objectives and where it comes from.

    Args:
        model: A `HyperPromptModel` with positions="hf"; a `TextPromptModel`; a mixture, or another model that takes
            weights and that `merge` makes a plain one of; or a causal language model or PEFT model that is conditioned
            by `text_prompt`, or has weights of its own, fixed by training. It is not changed.
        tokenizer: Its tokenizer, one of the tokenizers library ("fast"), or a `ListTokenizer`.
        weights: w, (m,) on the simplex; None for a model with fixed weights.
        directory: A path where nothing is, or an empty directory.
        kind: `"model"`: a plain model, adapters merged, virtual tokens as tokens of its vocabulary. `"adapter"`: the
            LoRA adapter of a mixture or of a model conditioned by words, or a prompt without adapters as PEFT's.
        beta: β of a model conditioned on it, (m,), with Σ β = 1: other sums mix the model with its reference
            (equation 15), which is two models.
        text_prompt: What writes weights into prompts.
        keep_tied: Leave a head that is tied to the embeddings tied, for loaders that know nothing else; then requests
            must rule out the new tokens.
        origin: Where the model comes from, for `mopl.json`.
        base_model: Name of the model that it was tuned from, for `mopl.json`, where it has no name itself, as what
            `merge` returns has none.
        facts: What the model card says besides: method, data, front, picture.

    Returns:
        The directory.

    Raises:
        FileExistsError: If something is in the way.
        ValueError: If the model cannot be exported so; the message says what can.
    """
    check_choice(kind, KINDS, "kind")
    folder = check_free(directory)
    tokenizer = tokenizer.tokenizer if isinstance(tokenizer, ListTokenizer) else tokenizer
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(
            f"a {type(tokenizer).__name__} cannot be told to write tokens in front; load a tokenizer of the tokenizers "
            "library (use_fast=True)"
        )
    w, each_beta = _condition(model, weights, beta, text_prompt)
    tuning = model.record if isinstance(model, WeightedModel) else None
    if isinstance(model, WeightedModel) and model.text_prompt is not None:
        model, text_prompt = model.model, model.text_prompt  # the tokenizer will write the words
    weighted = model if isinstance(model, WeightedModel) else None
    prefix = None if weighted is None else weighted.prefix_of(w, each_beta)  # type: ignore[arg-type]
    inner: Any = model if weighted is None else weighted.model
    if kind == "adapter" and prefix is None and not is_peft(inner):
        raise ValueError(f"a plain {type(inner).__name__} has no adapter; pass kind='model'")
    base = causal_lm_of(inner)
    source = getattr(base, "name_or_path", "") or ""
    if kind == "adapter" and base_of_adapter(source) is not None:
        raise ValueError(
            f"the model started from {source}, itself a PEFT adapter, and the base of an adapter must be a plain "
            "model; pass kind='model'"
        )
    record = _record(tuning, kind, w, each_beta, text_prompt, {"base_model": source or base_model, "origin": origin})
    front = None
    if text_prompt is not None:
        assert w is not None
        front = prepare_tokenizer(tokenizer, text=text_prompt.render(w, each_beta))
    elif prefix is not None and kind == "model":
        front = prepare_tokenizer(tokenizer, prefix.shape[0])
        record["virtual_tokens"] = {"ids": front.ids, "tokens": front.tokens}
    virtual = front.ids if front is not None and not front.after_bos else []
    vocabulary = virtual[0] if virtual else base.get_input_embeddings().weight.shape[0]
    trade_off: dict[str, Any] = {} if weighted is None else {"weights": w}
    if trade_off and each_beta is not None:
        trade_off["beta"] = each_beta
    plain: list[Any] = []  # from which it is taken to be saved, so that it is freed before its files are loaded
    if kind == "adapter":
        logits = logits_of(model, vocabulary, **trade_off)
    else:
        own = weighted is not None and prefix is None  # a kind that says itself what it is at one trade-off
        made: Any = weighted.merge(w) if own else _plain_model(inner)  # type: ignore[union-attr, arg-type]
        plain.append(unfuse(made).eval())
        del made
        settle_merged(plain[0])
        if prefix is not None and front is not None:
            _add_virtual_tokens(plain[0], prefix, front, keep_tied)
        check_adapters(model)
        write_turn_end(plain[0], tokenizer)
        name = f"the plain {type(plain[0]).__name__}"
        remedy = (
            "this architecture does something to embeddings, positions or adapted weights that is not known here: "
            "generate with mopl"
        )
        try:
            logits = logits_of(plain[0], vocabulary, virtual)
        except IndexError as error:  # a second table of embeddings, say, which has not grown
            raise ValueError(f"{name} fails on a short text ({error}), so nothing was exported; {remedy}") from error
        compare(logits, logits_of(model, vocabulary, **trade_off), TOLERANCE[base.dtype], name, remedy)

    def fill(path: Path) -> None:
        if plain:
            plain.pop().save_pretrained(str(path))
        elif prefix is not None:
            _save_prompt(inner, prefix, path)
        elif weighted is not None:
            weighted.save_adapter(w, path)  # type: ignore[arg-type]
        else:
            inner.save_pretrained(str(path))
        check_files(path, inner, kind, logits, vocabulary, virtual)
        (tokenizer if front is None else front.tokenizer).save_pretrained(str(path))
        if front is not None:
            check_saved(path, tokenizer, front)
        (path / CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        write_card(path, _exported(path, record, kind, base_model or source, prefix), facts)

    write_folder(folder, fill, replace=False)
    return folder


# ---------------------------------------------------------------- what is asked for


def check_free(directory: str | os.PathLike[str]) -> Path:
    """Return the path of a directory that may be written to; raise a FileExistsError if something is there."""
    folder = Path(directory)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty directory; name another")
    return folder


def _condition(
    model: nn.Module, weights: Any, beta: Any, text_prompt: TextPrompt | None
) -> tuple[Tensor | None, Tensor | None]:
    """Check and return w (m,) and β (m,)."""
    names = objectives_of(model, weights, beta, text_prompt, "mixture", "leave it out")
    if weights is None:
        return None, None
    w = check_weights(weights, len(names))
    if w.ndim != 1:
        raise ValueError(f"weights has shape {tuple(w.shape)} but one export has one trade-off; pass ({len(names)},)")
    if beta is None:
        return w, None
    beta = torch.as_tensor(beta, dtype=torch.float64)
    if beta.shape != w.shape or not bool((beta.isfinite() & (beta > 0)).all()):
        raise ValueError(f"beta is {beta.tolist()} but must be {len(names)} positive numbers")
    total = float(beta.sum())
    if abs(total - 1) > 1e-4:
        raise ValueError(
            f"beta sums to {total:g}: at other sums than 1 answers are a mixture with the reference, "
            f"which one plain model is not. Export at {', '.join(f'{b / total:.4g}' for b in beta.tolist())}, or "
            "generate with mopl"
        )
    return w, beta


def _record(
    tuning: TuningRecord | None,
    kind: str,
    w: Tensor | None,
    beta: Tensor | None,
    text_prompt: TextPrompt | None,
    origin: dict[str, Any],
) -> dict[str, Any]:
    """Return what `mopl.json` says."""
    record: dict[str, Any] = {
        "kind": KIND,
        "form": kind,
        "mopl": __version__,
        "weights": None if w is None else w.tolist(),
        "objective_temperature": None if beta is None else beta.tolist(),
        **origin,
    }
    if tuning is not None:
        record |= {**tuning.to_dict(), "objectives": list(tuning.objectives)}
    if text_prompt is not None:
        assert w is not None
        record |= {"objectives": list(text_prompt.objectives), "text": text_prompt.render(w, beta)}
    return record


def _exported(path: Path, record: dict[str, Any], kind: str, base: str | None, prefix: Tensor | None) -> Exported:
    """Return what the card is told of an export."""
    adapter = kind == "adapter"
    return Exported(
        form=kind,
        objectives=record.get("objectives") or (),
        base=base or None,
        weights=record["weights"],
        beta=record["objective_temperature"],
        rank=read_json(path / ADAPTER_CONFIG, AdapterRecord).get("r", 0) if adapter else 0,
        virtual_tokens=len(record.get("virtual_tokens", {}).get("ids", ())),
        text=record.get("text"),
        prompt=adapter and prefix is not None,
        beta_trained=record.get("beta"),
    )


# ---------------------------------------------------------------- the model


def _plain_model(model: Any) -> Any:
    """Return a causal language model, with PEFT's adapters or without, as a plain one: a copy with no trace of PEFT.

    Raises:
        ValueError: If its parameters are quantised, or its adapters cannot be merged.
    """
    base = causal_lm_of(model)
    if getattr(base, "is_quantized", False) or getattr(base, "hf_quantizer", None) is not None:
        raise ValueError(
            "adapters cannot be merged into quantised parameters; load the base model without quantisation"
        )
    made = copy.deepcopy(model)
    if not is_peft(made):
        return made
    if not hasattr(made, "merge_and_unload"):
        kinds = ", ".join(type(config).__name__ for config in made.peft_config.values())
        raise ValueError(f"adapters of {kinds} cannot be merged; pass kind='adapter'")
    return merged(made, base.dtype)


@torch.no_grad()
def _add_virtual_tokens(model: Any, prefix: Tensor, front: Front, keep_tied: bool) -> None:
    """Give a plain model k more tokens, whose embeddings are `prefix` (k, d) and which it does not generate."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    name = type(model).__name__
    if head is None or head.weight.shape[0] != embedding.weight.shape[0]:
        raise ValueError(f"{name} has no output head of the size of its embeddings, so its vocabulary cannot grow")
    size, needed = embedding.weight.shape[0], front.ids[-1] + 1
    if front.ids[0] > size:
        raise ValueError(f"the tokenizer has {front.ids[0]} tokens but {name} embeds {size}; are they of one model?")
    tied = head.weight is embedding.weight
    if needed > size:
        model.resize_token_embeddings(needed, mean_resizing=False)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ids = torch.tensor(front.ids, device=embedding.weight.device)
    _set_embeddings(embedding, ids, prefix, name)
    if tied and not keep_tied:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        settle_ties(model)
    if not (tied and keep_tied):
        others = head.weight[: front.ids[0]]
        head.weight[ids] = others.mean(0, dtype=torch.promote_types(others.dtype, torch.float32)).to(others.dtype)
    bias = getattr(head, "bias", None)
    if bias is not None:
        bias[ids] = NEVER
    config = model.generation_config
    config.suppress_tokens = [*(config.suppress_tokens or []), *front.ids]
    config._from_model_config = False  # else versions of transformers may make it anew, without them


def _set_embeddings(embedding: Any, ids: Tensor, prefix: Tensor, name: str) -> None:
    """Make the embedding module, which may scale its rows, give `prefix` for `ids`."""
    wanted = prefix.to(embedding.weight)
    embedding.weight[ids] = wanted
    given = embedding(ids)
    if torch.equal(given, wanted):
        return
    scale = (given.double() * wanted.double()).sum() / wanted.double().square().sum()
    embedding.weight[ids] = (prefix.double().to(scale.device) / scale).to(embedding.weight)
    tolerance = 4 * torch.finfo(wanted.dtype).eps
    if not torch.allclose(embedding(ids), wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max())):
        raise ValueError(f"{name} does more to embeddings than to scale them, so virtual tokens cannot become tokens")


# ---------------------------------------------------------------- adapters


def _save_prompt(model: Any, prefix: Tensor, path: Path) -> None:
    """Write a prompt as PEFT's prompt tuning."""
    require("peft", "safetensors")
    from peft import PromptTuningConfig, TaskType
    from safetensors.torch import save_file

    if is_peft(model):
        raise ValueError(
            "the model has a prompt and adapters, and a PEFT adapter is one or the other; pass kind='model', which "
            "merges the adapters and writes the prompt into the vocabulary"
        )
    config: Any = model.config.get_text_config()
    adapter = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=getattr(model, "name_or_path", "") or None,
        num_virtual_tokens=prefix.shape[0],
        token_dim=prefix.shape[1],
        num_transformer_submodules=1,
        num_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        inference_mode=True,
    )
    adapter.save_pretrained(str(path))
    tensors = {"prompt_embeddings": prefix.cpu().contiguous()}
    save_file(tensors, str(path / "adapter_model.safetensors"), metadata={"format": "pt"})
