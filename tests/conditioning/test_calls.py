"""Calls of every kind of model that takes weights: some positions, packed rows, the reference, threads."""

import contextlib
import copy
import functools
import sys
import threading

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tiny_language_models import build, conditioned, lora, tokenizer

from mopl.conditioning import HookedModel, HyperPromptModel, LoraMixture, TextPrompt, TextPromptModel, TuningRecord
from mopl.language_models.head import fuse

NAMES, ONE = ("helpful", "harmless"), torch.tensor([0.3, 0.7])
ROWS = [[1, 7, 8, 9, 10], [1, 20, 21], [30, 31, 32, 33]]
W = torch.tensor([[0.25, 0.75], [0.70, 0.30], [0.5, 0.5]])
IDS = torch.tensor([[1, 7, 8, 9], [1, 20, 21, 22], [1, 30, 31, 32]])
PACKED = {
    "input_ids": torch.tensor([[token for row in ROWS for token in row]]),
    "position_ids": torch.tensor([[i for row in ROWS for i in range(len(row))]]),
}


def words(base=None, **options):
    return TextPromptModel(lora(build()) if base is None else base, TextPrompt(NAMES, **options), tokenizer()).eval()


def mixture():
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return LoraMixture(build(), 2, config=config, record=NAMES).eval()


class Shift(HookedModel):
    """Moves what the last layer gives."""

    def __init__(self, base=None):
        super().__init__()
        self.model, self.record = build() if base is None else base, TuningRecord(NAMES)
        torch.manual_seed(1)
        self.shift = nn.Linear(2, 32)
        self.causal_lm.lm_head.register_forward_pre_hook(self.move)

    def move(self, head, inputs):
        given = self.conditions_for(inputs[0])
        return None if given is None else (inputs[0] + self.shift(given["weights"]),)


MAKERS = {"virtual tokens": conditioned, "words": words, "mixture": mixture, "hooks": Shift}


@pytest.fixture(params=MAKERS)
def model(request):
    return MAKERS[request.param]()


def left_padded():
    length = max(map(len, ROWS))
    rows = [[0] * (length - len(row)) + row for row in ROWS]
    return torch.tensor(rows), torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ROWS])


@torch.no_grad()
def test_sequences_of_a_packed_row_see_nothing_of_one_another_in_the_reference_neither(model):
    for block in (contextlib.nullcontext(), model.reference()):
        with block:
            alone = [model(torch.tensor([row]), weights=w).logits[0] for row, w in zip(ROWS, W, strict=True)]
            torch.testing.assert_close(model(**PACKED, weights=W).logits[0], torch.cat(alone), rtol=1e-4, atol=1e-4)
            with pytest.raises(ValueError, match="a packed row can"):
                model(**PACKED, weights=W, use_cache=True)


@torch.no_grad()
def test_logits_are_kept_at_places_that_count_from_either_end(model):
    every = model(IDS, weights=W).logits
    for keep in (torch.tensor([-1]), torch.tensor([-2, 0]), torch.tensor([1, -1])):
        kept = model(input_ids=IDS, weights=W, logits_to_keep=keep).logits
        torch.testing.assert_close(kept, every[:, keep], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("make", [conditioned, words])
def test_the_reference_predicts_the_tokens_that_the_model_predicts(make):
    model, (ids, mask) = make(), left_padded()
    plain = build()
    of_rows = [float(plain(torch.tensor([row]), labels=torch.tensor([row])).loss) * (len(row) - 1) for row in ROWS]
    wanted = torch.tensor(sum(of_rows) / sum(len(row) - 1 for row in ROWS))
    with model.reference():
        found = model(ids, mask, labels=ids.masked_fill(mask == 0, -100)).loss
        packed = model(**PACKED, labels=PACKED["input_ids"]).loss
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("make", [conditioned, words])
def test_a_cache_that_ends_before_a_text_begins_is_an_error_where_something_is_in_front(make):
    model, (ids, mask) = make(), left_padded()
    ids, mask = (torch.nn.functional.pad(each, (1, 0)) for each in (ids, mask))
    ids[0, 0], mask[0, 0] = 1, 1
    first = model(ids[:, :2], mask[:, :2], weights=W, use_cache=True)
    with pytest.raises(ValueError, match="ends inside the padding of a row"):
        model(ids[:, 2:], mask, weights=W, past_key_values=first.past_key_values)


@torch.no_grad()
def test_the_kl_of_a_packed_row_is_that_of_its_sequences():
    model = HyperPromptModel(fuse(build()), conditioned().hyper_prompt).eval()
    hidden = torch.randn(1, PACKED["input_ids"].shape[1], 32, generator=torch.Generator().manual_seed(0))
    targets = torch.cat([torch.tensor([*row[1:], -100]) for row in ROWS])[None]
    found = model(**PACKED, weights=W, targets=targets, reference_hidden=hidden).kl
    start, wanted = 0, []
    for row, w in zip(ROWS, W, strict=True):
        end = start + len(row)
        given = {"targets": targets[:, start:end], "reference_hidden": hidden[:, start:end]}
        wanted.append(model(torch.tensor([row]), weights=w, **given).kl)
        start = end
    torch.testing.assert_close(found, torch.cat(wanted, 1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_weights_may_be_numbers_or_in_16_bit_and_beta_of_each_row_goes_with_one_vector(model):
    assert torch.equal(model(IDS, weights=[0.25, 0.75]).logits, model(IDS, weights=W[0]).logits)
    assert model(IDS, weights=torch.tensor([[0.2, 0.8], [0.7, 0.3], [1, 0]]).bfloat16()).logits.isfinite().all()
    betas = torch.tensor([[0.1, 0.1], [0.3, 0.1], [0.1, 0.9]])
    for made in (conditioned(takes_beta=True), words(template="{weights} {betas}\n")):
        assert torch.equal(
            made(IDS, weights=ONE, beta=betas).logits, made(IDS, weights=ONE.expand(3, 2), beta=betas).logits
        )
        assert set(made.conditions(ONE, betas)) == {"weights", "beta"}
        with pytest.raises(ValueError, match="one trade-off has one vector"), made.at(ONE, beta=betas):
            pass
    if isinstance(model, HyperPromptModel):
        assert torch.equal(model.prefix_of([0.25, 0.75]), model.hyper_prompt(W[0])[0])
    if isinstance(model, (HyperPromptModel, TextPromptModel)):
        with pytest.raises(ValueError, match="kl_weight cannot be used"):
            model(IDS, weights=ONE, kl_weight=0.1)


@torch.no_grad()
def test_a_trade_off_that_holds_is_not_changed_from_outside(model):
    weights = ONE.clone()
    with model.at(weights) as one:
        before = one(IDS).logits
        weights[:] = torch.tensor([1.0, 0.0])
        assert torch.equal(one(IDS).logits, before)


def test_an_empty_text_has_no_outputs():
    assert conditioned()(IDS[:, :0], weights=W).logits.shape[:2] == (3, 0)


@torch.no_grad()
def test_threads_whose_virtual_tokens_have_no_position_do_not_meet(monkeypatch):
    model, wrong = conditioned("gpt2", positions="paper"), []
    texts = [torch.randint(6, 50, (1, 8), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    masks = [torch.tensor([[0] * i + [1] * (8 - i)]) for i in range(4)]
    wanted = [model(ids, mask, weights=ONE).logits[:, -1] for ids, mask in zip(texts, masks, strict=True)]

    def ask(i):
        try:
            for _ in range(80):
                with torch.no_grad():
                    found = model(texts[i], masks[i], weights=ONE).logits[:, -1]
                if not torch.allclose(found, wanted[i], atol=1e-3):
                    wrong.append(i)
        except Exception as error:
            wrong.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    finally:
        sys.setswitchinterval(before)
    assert not wrong


def test_gradients_of_several_objectives_come_from_one_checkpointed_forward_pass():
    model = mixture().train()
    own = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(model(IDS, weights=W, labels=IDS).loss, own)
    model.gradient_checkpointing_enable()
    loss = model(IDS, weights=W, labels=IDS).loss
    for keep in (True, False):
        for a, b in zip(torch.autograd.grad(loss, own, retain_graph=keep), wanted, strict=True):
            torch.testing.assert_close(a, b)
    layer = copy.deepcopy(model.causal_lm).model.layers[0]
    assert not any(
        isinstance(part, HookedModel) for part in layer._gradient_checkpointing_func.keywords["context_fn"].args
    )


def test_hooks_take_the_rows_of_the_text_and_refuse_padding_behind_prompts():
    model = Shift().eval()
    keep = torch.tensor([3])
    kept, every = model(logits_to_keep=keep, input_ids=IDS, weights=W).logits, model(IDS, weights=W).logits
    torch.testing.assert_close(kept, every[:, 3:])
    with pytest.raises(ValueError, match="padded on the right"):
        model.generate(IDS, torch.tensor([[1, 1, 1, 0]] * 3), weights=W)


def test_a_model_that_is_trained_whole_has_no_reference(tmp_path):
    model = words(build())
    model.save_pretrained(tmp_path)
    loaded, frozen = TextPromptModel.from_pretrained(tmp_path), words(build().requires_grad_(False))
    assert not model.has_reference and not loaded.has_reference and frozen.has_reference and words().has_reference
    for each in (model, loaded):
        with pytest.raises(ValueError, match="keep a copy of the model from before"), each.reference():
            pass
    with frozen.reference():
        assert torch.equal(frozen(IDS).logits, build()(IDS).logits)


def test_a_whole_model_is_not_loaded_with_an_adapter_that_was_in_its_folder(tmp_path):
    words().save_pretrained(tmp_path)
    words(build()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"remove adapter_config.json and adapter_model.safetensors"):
        TextPromptModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("wrap", [lora, lambda base: base.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))])
def test_adapters_that_nothing_switches_off_or_saves_are_refused(wrap):
    prompt, config = conditioned().hyper_prompt, peft.LoraConfig(r=2, target_modules=["v_proj"])
    base = build()
    wrap(base)
    mixture = functools.partial(LoraMixture, objectives=2, config=config)
    for make in (words, Shift, lambda base: HyperPromptModel(base, prompt)):
        with pytest.raises(ValueError, match=r"adapters without PEFT's wrapper; .*get_peft_model"):
            make(base)
    with pytest.raises(ValueError, match=r"adapters inside already; .*unload"):
        mixture(base)


@torch.no_grad()
def test_beta_of_single_rows_is_checked_like_the_weights():
    with pytest.raises(ValueError, match=r"beta has shape .* but there are 3 rows"):
        conditioned(takes_beta=True)(IDS, weights=W, beta=torch.ones(2, 2))


class Experts(nn.Module):
    """Linear layers that see the tokens that are routed to them."""

    def __init__(self, count):
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(count))
        self.gate = nn.Linear(32, count, bias=False)

    def forward(self, hidden):
        flat = hidden.reshape(-1, 32)
        chosen, out = self.gate(flat).argmax(-1), torch.zeros_like(flat)
        for i, expert in enumerate(self.up):
            if len(own := (chosen == i).nonzero()[:, 0]):
                out = out.index_add(0, own, expert(flat[own]))
        return out.view(hidden.shape)


def with_experts(count):
    base = build()
    torch.manual_seed(7)
    for layer in base.model.layers:
        layer.mlp = Experts(count)
    config = peft.LoraConfig(r=2, target_modules=[f"up.{i}" for i in range(count)], init_lora_weights=False)
    return LoraMixture(base, 2, config=config, record=NAMES).eval()


@torch.no_grad()
def test_some_tokens_of_a_batch_are_no_rows():
    model, weights = with_experts(2), W[:2]
    found = []
    for seed in range(12):  # where experts see 2 or 4 of 6 tokens, these could be taken for those of 2 rows
        ids = torch.randint(6, 56, (2, 3), generator=torch.Generator().manual_seed(seed))
        try:
            both = model(ids, weights=weights).logits
        except ValueError as error:
            assert "weights has 2 rows but a layer sees" in str(error)
            found.append(seed)
        else:
            alone = [model(row[None], weights=w).logits for row, w in zip(ids, weights, strict=True)]
            torch.testing.assert_close(both, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert found
    with pytest.raises(ValueError, match="weights has 2 rows but a layer sees"):
        model.generate(ids, weights=weights, max_new_tokens=3)
    model.generate(ids, weights=weights[0], max_new_tokens=3)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_all_tokens_of_all_rows_are_rows_also_of_beams(options):
    model, options = with_experts(1), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **options}
    both = model.generate(IDS, weights=W, **options)
    alone = [model.generate(row[None], weights=w, **options) for row, w in zip(IDS, W, strict=True)]
    assert torch.equal(both, torch.cat(alone))
    assert not model.causal_lm._forward_pre_hooks


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.7, 0.7], "does not sum to 1"), ([1.2, -0.2], "negative entry"), ([float("nan"), 1.0], "not finite"),
        ([[0.5, 0.5], [0.5, 0.5], [0.5, 0.6]], "does not sum to 1"),
    ],
    ids=["sum", "negative", "nan", "one row"],
)  # fmt: skip
def test_weights_off_the_simplex_are_refused_by_each_kind(model, weights, message) -> None:
    with pytest.raises(ValueError, match=message):
        model(IDS, weights=torch.tensor(weights))
    with model.reference():  # where they change nothing
        model(IDS, weights=torch.tensor(weights))


@pytest.mark.parametrize("beta", [[-1.0, 1.0], [0.0, 1.0], [float("nan"), 1.0]])
def test_a_beta_that_is_not_positive_is_refused(beta) -> None:
    with pytest.raises(ValueError, match=r"beta is .* but must be positive"):
        conditioned(takes_beta=True)(IDS, weights=ONE, beta=torch.tensor(beta))


def test_compiled_calls_look_at_no_value() -> None:
    """With virtual tokens a step is one graph: nothing breaks it to read the weights."""
    model = conditioned(adapters=False)
    expected = model(IDS, weights=W).logits
    found = torch.compile(model, backend="eager", fullgraph=True)(IDS, weights=W).logits
    torch.testing.assert_close(found, expected)
