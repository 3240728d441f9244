"""The kind of conditioning that docs/conditioning.md writes in one file: it trains, and is saved, loaded and asked."""

import copy
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

from tiny_language_models import build, lora, tokenizer

from mopl.conditioning import LoraMixture, WeightedModel
from mopl.conditioning.weighted import KINDS
from mopl.language_models.head import fuse

PAGE = Path(__file__).parents[2] / "docs" / "conditioning.md"
IDS, MASK = torch.tensor([[0, 1, 7, 8], [1, 20, 21, 22]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
ONE, ROWS = torch.tensor([0.3, 0.7]), torch.tensor([[0.2, 0.8], [0.9, 0.1]])


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def kind(tmp_path, monkeypatch):
    """The class of the page, in a file of its own."""
    (tmp_path / "head_shift.py").write_text(next(block for block in blocks() if block.startswith("# head_shift.py")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("head_shift").HeadShift
    for known in (sys.modules, KINDS):
        known.pop("head_shift", None), known.pop("HeadShift", None)


def made(kind, *, base=None, **options):
    model = kind(build() if base is None else base, 2, record=["helpful", "harmless"], **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.shift.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_the_example_of_the_page_trains_saves_loads_and_answers(kind, tmp_path, capsys):
    build().save_pretrained(tmp_path / "MODEL")
    tokenizer().save_pretrained(tmp_path / "MODEL")
    rows = [
        {"prompt": f"w{i}", "responses": [" w11 w12", " w13", " w14 w15"],
         "labels": {"helpful": [2, 1, 0], "harmless": [0, 1, 2]}}
        for i in range(4)
    ]  # fmt: skip
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names: dict = {}
    exec(next(block for block in blocks() if "trainer.train()" in block), names)
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("[0.")]) == 2
    model = names["model"]
    ids = torch.tensor([[1, 6, 17, 18], [1, 6, 20, 21]])  # w0 w11 w12, which is helpful, and w0 w14 w15, which is not
    assert names["tokenizer"]("w0 w11 w12 w14 w15")["input_ids"] == [1, 6, 17, 18, 20, 21]
    targets = torch.tensor([[-100, 17, 18, -100], [-100, 20, 21, -100]])
    fuse(model.causal_lm)

    def margin(**weights):
        with torch.no_grad():
            helpful, harmless = model(ids, **weights, targets=targets).log_probs.sum(-1)
        return float(helpful - harmless)

    with model.reference():
        before = margin()
    assert margin(weights=torch.tensor([1.0, 0.0])) > before + 0.5
    assert margin(weights=torch.tensor([0.0, 1.0])) < before - 0.5
    content = json.loads((tmp_path / "head-shift" / "mopl.json").read_text())
    assert content["settings"] == {"objectives": 2, "width": 32} and content["module"] == "head_shift"


def test_rows_are_conditioned_however_the_model_is_called(kind):
    model = made(kind)

    def wanted(row, w):
        with model.reference():
            hidden = model(row[None], output_hidden_states=True).hidden_states[-1]
        return model.causal_lm.lm_head.weight @ (hidden + model.shift(w)).transpose(1, 2)

    rows = [IDS[0, 1:], IDS[1]]
    each = [wanted(row, w)[0].T for row, w in zip(rows, ROWS, strict=True)]
    found = model(IDS, attention_mask=MASK, weights=ROWS).logits
    for logits, own, mask in zip(found, each, MASK, strict=True):
        torch.testing.assert_close(logits[mask > 0], own, rtol=1e-4, atol=1e-4)
    packed = torch.cat(rows)[None]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    logits = model(packed, position_ids=positions, weights=ROWS, use_cache=False).logits[0]
    torch.testing.assert_close(logits, torch.cat(each), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="weights has 2 rows but there are 1"):
        model(packed, position_ids=torch.arange(7)[None], weights=ROWS)
    with pytest.raises(ValueError, match="weights has 2 rows but there are 3"):
        model(IDS.repeat(2, 1)[:3], weights=ROWS)
    with model.at(ONE) as one:
        found = one(IDS, attention_mask=MASK).logits
    assert torch.equal(found, model(IDS, attention_mask=MASK, weights=ONE).logits)
    with pytest.raises(RuntimeError, match="call the model that takes weights"):
        model.model(IDS)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge(ONE)


def test_log_probabilities_are_those_of_the_logits_and_beams_keep_their_rows(kind):
    model = made(kind, base=fuse(build()))
    targets = torch.tensor([[-100, 7, 8, 9], [20, 21, 22, 23]])
    given = {"attention_mask": MASK, "weights": ROWS}
    found = model(IDS, **given, targets=targets).log_probs
    logprob = model(IDS, **given).logits.log_softmax(-1)
    wanted = logprob.gather(-1, targets.clamp(min=0)[..., None])[..., 0].masked_fill(targets == -100, 0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "num_beams": 3, "do_sample": False}
    both = model.generate(IDS, MASK, weights=ROWS, **options)
    for row, w, mask, tokens in zip(IDS, ROWS, MASK, both, strict=True):
        alone = model.generate(row[mask > 0][None], weights=w, **options)
        assert torch.equal(alone[0, -3:], tokens[-3:])
    with pytest.raises(ValueError, match="weights has 2 rows but there are 1"):
        model.generate(IDS[:1], weights=ROWS)


def test_a_second_forward_pass_has_the_weights_of_the_first(kind):
    model = made(kind).train()
    model.causal_lm.model.layers[0].mlp.register_forward_pre_hook(model._move)  # inside of what is computed again

    def gradients():
        model.zero_grad()
        model(IDS, attention_mask=MASK, weights=ROWS).logits.square().sum().backward()
        return [p.grad.clone() for p in model.shift.parameters()]

    wanted = gradients()
    model.gradient_checkpointing_enable()
    for one, other in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_it_is_saved_with_its_adapter_and_loaded_in_place(kind, tmp_path):
    model = made(kind, base=lora(build()), width=8)
    model.save_pretrained(tmp_path / "saved")
    wanted = model(IDS, attention_mask=MASK, weights=ROWS).logits
    loaded = WeightedModel.from_pretrained(tmp_path / "saved", build(), trainable=True)
    assert type(loaded) is kind and loaded.settings() == {"objectives": 2, "width": 8}
    assert torch.equal(loaded(IDS, attention_mask=MASK, weights=ROWS).logits, wanted)
    assert all(parameter.requires_grad for parameter in loaded.shift.parameters())
    other = kind(lora(build()), 2, width=8, record=["helpful", "harmless"]).eval()
    other.load_weights(tmp_path / "saved")
    assert torch.equal(other(IDS, attention_mask=MASK, weights=ROWS).logits, wanted)
    assert torch.equal(copy.deepcopy(other)(IDS, attention_mask=MASK, weights=ROWS).logits, wanted)
    file = tmp_path / "saved" / "mopl.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "settings": {"depth": 3}}))
    with pytest.raises(ValueError, match=r"mopl.json: settings do not fit: .*depth"):
        kind.from_pretrained(tmp_path / "saved", build())


def test_what_a_kind_does_not_train_is_not_trained_further(kind, tmp_path):
    class HalfShift(kind):
        KIND = "HalfShift"

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.shift[0].requires_grad_(False)

    try:
        made(HalfShift).save_pretrained(tmp_path / "half")
        for trainable, count in ((True, 2), (False, 0)):
            loaded = WeightedModel.from_pretrained(tmp_path / "half", build(), trainable=trainable)
            assert sum(p.requires_grad for p in loaded.shift.parameters()) == count
    finally:
        KINDS.pop("HalfShift")


def test_a_subclass_without_a_kind_is_not_loaded_as_its_parent(kind, tmp_path):
    class MyShift(kind):
        pass

    model = made(MyShift)
    model.save_pretrained(tmp_path / "mine")
    with pytest.raises(
        ValueError, match=r"MyShift, which has no KIND of its own .* load it by its own from_pretrained"
    ):
        WeightedModel.from_pretrained(tmp_path / "mine", build())
    loaded = MyShift.from_pretrained(tmp_path / "mine", build())
    assert type(loaded) is MyShift and torch.equal(loaded(IDS, weights=ONE).logits, model(IDS, weights=ONE).logits)


def test_a_kind_that_is_not_imported_is_named_and_not_imported(kind, tmp_path):
    made(kind).save_pretrained(tmp_path / "saved")
    del KINDS["HeadShift"], sys.modules["head_shift"]
    with pytest.raises(ValueError, match=r"holds a HeadShift.*import the module head_shift first"):
        WeightedModel.from_pretrained(tmp_path / "saved", build())
    assert "head_shift" not in sys.modules


def test_packed_sequences_have_mixtures_of_their_own():
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = LoraMixture(build(), 2, config=config).eval()
    rows = [IDS[0, 1:], IDS[1]]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    found = model(input_ids=torch.cat(rows)[None], position_ids=positions, weights=ROWS, use_cache=False).logits[0]
    each = [model(input_ids=row[None], weights=w).logits[0] for row, w in zip(rows, ROWS, strict=True)]
    torch.testing.assert_close(found, torch.cat(each), rtol=1e-4, atol=1e-4)
