"""Mixtures, merged models and exports of a family, against weights that are merged by hand.

The oracle adds scale · B A to the weight of each adapted module, which is its own from then on, in a plain copy of the
model, and knows nothing of mopl or PEFT but their matrices.
"""

from __future__ import annotations

import contextlib
import copy
import io
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.families.checks import FRONT, NEW_TOKENS, RIGHT, WRONG, Outcome, compared, tokenizer, with_prompt
from mopl.conditioning import LoraMixture, ParameterMixture
from mopl.language_models.export import export

WEIGHTS = torch.tensor([0.3, 0.7])
ROWS = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
_IDS = torch.tensor([[31, 8, 55, 61, 12, 77, 19], [40, 9, 64, 64, 17, 30, 22]])


@torch.no_grad()
def _log_p(model: Any, rows: Tensor = _IDS, **kwargs: Any) -> Tensor:
    """Return the log-probabilities of every token, (2, T, V), each row alone unless rows have weights of their own."""
    if kwargs:
        return model(input_ids=rows, **kwargs).logits.double().log_softmax(-1)
    return torch.cat([model(input_ids=row[None]).logits.double().log_softmax(-1) for row in rows])


def _mixture(model: Any, targets: Any) -> LoraMixture:
    import peft

    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM")
    mixture = LoraMixture(model, 2, config=config).eval()
    with torch.no_grad():
        for name, parameter in mixture.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    mixture.check_merging()
    return mixture


@torch.no_grad()
def _merged_by_hand(plain: nn.Module, mixture: LoraMixture, weights: Tensor) -> nn.Module:
    model = copy.deepcopy(plain)
    for name, layer in mixture.model.get_base_model().named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        total = model.get_submodule(name).weight.clone()
        for share, adapter in zip(weights.tolist(), mixture.adapters, strict=True):
            delta = layer.scaling[adapter] * layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
            total += share * (delta.T if layer.fan_in_fan_out else delta)
        model.get_submodule(name)._parameters["weight"] = nn.Parameter(total)
    return model


def _reloaded(model: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder).eval()


def _all(*outcomes: Callable[[], Outcome]) -> Outcome:
    found = Outcome(RIGHT)
    for number, one in enumerate(outcomes):
        found = one()
        if found.kind != RIGHT:
            return Outcome(found.kind, f"step {number}: {found.detail}")
    return found


def _adapters(model: Any, targets: Any) -> Outcome:
    """Rows with weights of their own, one mixture in place, the merged model, and that from its files."""
    plain = copy.deepcopy(model)
    mixture = _mixture(model, targets)
    expected = [_log_p(_merged_by_hand(plain, mixture, w)) for w in ROWS]
    rows = torch.stack([expected[0][0], expected[1][1]])
    merged = mixture.merge(ROWS[1])

    def in_place() -> Outcome:
        with mixture.at(ROWS[1]) as one:
            return compared(_log_p(one), expected[1])

    return _all(
        lambda: compared(_log_p(mixture, weights=ROWS), rows),
        in_place,
        lambda: compared(_log_p(merged), expected[1]),
        lambda: compared(_log_p(_reloaded(merged)), expected[1]),
    )


def mixtures(model: Any) -> Outcome:
    """Adapters on every linear layer."""
    return _adapters(model, "all-linear")


def _advised(model: Any) -> Any:
    """Return the targets that mopl advises where it refuses every linear layer, or all of them."""
    targets: Any = "all-linear"
    for _ in range(3):
        try:
            _mixture(copy.deepcopy(model), targets)
        except ValueError as error:
            found = re.search(r"target_modules=\[(.*?)\]", str(error))
            targets = re.findall(r"'(\w+)'", found[1]) if found else targets
        else:
            break
    return targets


def mixtures_advised(model: Any) -> Outcome:
    """Adapters on the layers that mopl names where it refuses all of them."""
    return _adapters(model, _advised(model))


def _name_of_head(model: Any) -> str:
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def mixtures_head(model: Any) -> Outcome:
    """Adapters on the output head, which may be tied to the embeddings."""
    return _adapters(model, [_name_of_head(model)])


def parameters(model: Any) -> Outcome:
    """Mixtures of all parameters, and of the head."""
    return _all(*(lambda scope=scope: _parameters(copy.deepcopy(model), scope) for scope in ("full", "logits")))


def _parameters(model: Any, scope: str) -> Outcome:
    mixture = ParameterMixture(model, 2, scope=scope).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in mixture.others.parameters():
            parameter.add_(0.1 * parameter.abs().mean() * torch.randn_like(parameter))
    first, second = mixture.sets
    averaged = copy.deepcopy(mixture.model)
    with torch.no_grad():
        for name, a, b in zip(mixture.names, first, second, strict=True):
            averaged.get_parameter(name).copy_(WEIGHTS[0] * a + WEIGHTS[1] * b)
    expected, merged = _log_p(averaged), mixture.merge(WEIGHTS)

    def in_place() -> Outcome:
        with mixture.at(WEIGHTS) as one:
            return compared(_log_p(one), expected)

    return _all(
        lambda: compared(_log_p(mixture, weights=WEIGHTS), expected),
        in_place,
        lambda: compared(_log_p(merged), expected),
        lambda: compared(_log_p(_reloaded(merged)), expected),
    )


# ---------------------------------------------------------------- exports


def _exported(model: Any, base: Any = None) -> Any:
    """Return what transformers loads of an export: a model, or an adapter on a base model."""
    import peft
    import transformers

    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stderr(io.StringIO()):
        folder = export(
            model, tokenizer(), WEIGHTS, Path(place) / "export", kind="model" if base is None else "adapter"
        )
        if base is None:
            return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def exports(model: Any) -> Outcome:
    """Virtual tokens as a model: the logits of rows that begin with the new tokens."""
    plain = copy.deepcopy(model)
    prompted = with_prompt(model)
    expected = _log_p(plain, torch.cat([torch.tensor([FRONT]).expand(2, -1), _IDS], 1))[:, len(FRONT) :]
    loaded, size = _exported(prompted), len(tokenizer())
    new = torch.arange(size, size + len(FRONT))[None].expand(2, -1)
    with torch.no_grad():
        rows = torch.cat([new, _IDS], 1)
        given = torch.cat([loaded(input_ids=row[None]).logits for row in rows])[:, len(FRONT) :, : expected.shape[-1]]
    return compared(given.double()[..., :size].log_softmax(-1), expected[..., :size].log_softmax(-1))


def exports_mixture(model: Any) -> Outcome:
    """Mixed adapters as a model, and as one adapter."""
    plain = copy.deepcopy(model)
    mixture = _mixture(model, _advised(model))
    expected = _log_p(_merged_by_hand(plain, mixture, WEIGHTS))

    return _all(
        lambda: compared(_log_p(_exported(mixture)), expected),
        lambda: compared(_log_p(_exported(mixture, plain)), expected),
    )


def exports_generation(model: Any) -> Outcome:
    """Greedy answers of an exported prompt and of an exported mixture, those of the oracle, both by transformers."""
    plain = copy.deepcopy(model)
    prompted = with_prompt(copy.deepcopy(model))
    size = len(tokenizer())
    new = list(range(size, size + len(FRONT)))

    def greedy(one: Any, start: Sequence[int], prompt: Sequence[int]) -> list[int]:
        row = torch.tensor([[*start, *prompt]])
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "attention_mask": torch.ones_like(row)}
        return one.generate(row, **options)[0, row.shape[1] :].tolist()

    def answers(source: Any, exported: Any, own: Sequence[int], theirs: Sequence[int]) -> Outcome:
        for prompt in _IDS.tolist():
            given, wanted = greedy(exported, theirs, prompt), greedy(source, own, prompt)
            if given != wanted:
                return Outcome(WRONG, f"{given} in place of {wanted}")
        return Outcome(RIGHT)

    def of_mixture() -> Outcome:
        mixture = _mixture(copy.deepcopy(model), _advised(model))
        return answers(_merged_by_hand(plain, mixture, WEIGHTS), _exported(mixture), [], [])

    return _all(lambda: answers(plain, _exported(prompted), FRONT, new), of_mixture)


CHECKS: dict[str, Callable[[Any], Outcome]] = {
    "mixtures": mixtures,
    "mixtures-advised": mixtures_advised,
    "mixtures-head": mixtures_head,
    "parameters": parameters,
    "exports": exports,
    "exports-mixture": exports_mixture,
    "exports-generation": exports_generation,
}
