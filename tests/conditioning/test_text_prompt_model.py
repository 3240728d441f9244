"""Models that read weights in words: each row is what `TextPrompt.prepend_ids` makes of it alone."""

import copy
import json

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from tiny_language_models import build, lora, tokenizer

from mopl.conditioning import TextPrompt, TextPromptModel, TuningRecord, WeightedModel
from mopl.language_models.head import fuse

NAMES = ("helpful", "harmless")
PROMPT = TextPrompt(NAMES, "[{weights}]\n")
WITH_BETA = TextPrompt(NAMES, "{weights} {betas}\n")
# Words of tokens 7 to 40, with and without a token that begins the text.
ROWS = [[1, 7, 8, 9, 10, 11], [1, 20, 21], [30, 31, 32, 33]]
WEIGHTS = [[0.25, 0.75], [0.70, 0.30], [0.5, 0.5]]


class Counting:
    """A tokenizer whose words are as many as the first weight says: 0.25 are 2 tokens, 0.70 are 7."""

    bos_token_id, pad_token_id = 1, 0

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        digits = [int(c) for c in text if c.isdigit()]
        return {"input_ids": [40 + d for d in digits][: 2 + digits[1] % 5]}

    def save_pretrained(self, folder):
        pass


def made(*, adapters=True, of=None, prompt=PROMPT, family="llama", fused=False):
    model = build(family)
    model = fuse(model) if fused else model
    return TextPromptModel(lora(model) if adapters else model, prompt, of or Counting()).eval()


def padded(rows, side):
    length = max(map(len, rows))
    fill = [[0] * (length - len(row)) for row in rows]
    ids = [f + r if side == "left" else r + f for f, r in zip(fill, rows, strict=True)]
    ones = [[1] * len(row) for row in rows]
    mask = [f + o if side == "left" else o + f for f, o in zip(fill, ones, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def alone(model, row, weights, beta=None):
    """The logits of a row's own tokens: behind the words where a token begins the text."""
    written = model.text_prompt.prepend_ids(row, weights, model.tokenizer, beta)
    words = len(written) - len(row)
    return model.model(input_ids=torch.tensor([written])).logits[0, words:]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_those_that_are_written_one_by_one(family, side):
    model = made(family=family)
    ids, mask = padded(ROWS, side)
    found = model(ids, mask, weights=torch.tensor(WEIGHTS)).logits
    assert found.shape[:2] == ids.shape
    for row, weights, logits, own in zip(ROWS, WEIGHTS, found, mask, strict=True):
        torch.testing.assert_close(logits[own > 0], alone(model, row, weights), rtol=2e-4, atol=2e-4)


def test_rows_of_one_length_need_no_mask_and_one_vector_is_for_all():
    model, ids = made(), torch.tensor([[1, 7, 8], [1, 9, 10]])
    for weights in (WEIGHTS[0], WEIGHTS[:2]):
        found = model(ids, weights=torch.tensor(weights)).logits
        each = [weights, weights] if weights is WEIGHTS[0] else weights
        for row, w, logits in zip(ids.tolist(), each, found, strict=True):
            torch.testing.assert_close(logits, alone(model, row, w), rtol=2e-4, atol=2e-4)


def test_packed_sequences_have_words_of_their_own():
    model = made()
    packed = torch.tensor([[token for row in ROWS for token in row]])
    positions = torch.tensor([[i for row in ROWS for i in range(len(row))]])
    found = model(packed, position_ids=positions, weights=torch.tensor(WEIGHTS)).logits[0]
    wanted = torch.cat([alone(model, row, w) for row, w in zip(ROWS, WEIGHTS, strict=True)])
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)
    with pytest.raises(ValueError, match="there are 3 rows"):
        model(packed, position_ids=positions, weights=torch.tensor(WEIGHTS[:2]))


def shifted(rows, ignore=-100):
    return [[*row[1:], ignore] for row in rows]


@pytest.mark.parametrize("how", ["left", "right", "packed"])
def test_log_probabilities_of_a_fused_model_and_their_gradients(how):
    model = made(fused=True)
    generator = torch.Generator().manual_seed(0)
    factors = [torch.rand(len(row), generator=generator) + 0.5 for row in ROWS]

    def gradients(total):
        model.zero_grad()
        total.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    wanted, total = [], 0.0
    for row, weights, factor in zip(ROWS, WEIGHTS, factors, strict=True):
        logprob = alone(model, row, weights).log_softmax(-1)
        targets = torch.tensor(row[1:])
        wanted.append(logprob[:-1].gather(-1, targets[:, None])[:, 0] / 1.0)
        total = total + (wanted[-1] * factor[:-1]).sum()
    wanted_gradients = gradients(total)
    if how == "packed":
        ids, targets = (torch.tensor([[t for row in rows for t in row]]) for rows in (ROWS, shifted(ROWS)))
        rows = {"position_ids": torch.tensor([[i for row in ROWS for i in range(len(row))]])}
        share, kept = torch.cat(factors)[None], targets != -100
    else:
        ids, mask = padded(ROWS, how)
        targets, rows = padded(shifted(ROWS), how)[0].masked_fill(mask == 0, 5), {"attention_mask": mask}
        share, kept = torch.zeros(ids.shape), (targets != -100) & (mask > 0)
        share[mask > 0] = torch.cat(factors)
    output = model(ids, **rows, weights=torch.tensor(WEIGHTS), targets=targets, return_entropy=True)
    assert output.log_probs.shape == output.entropy.shape == ids.shape
    torch.testing.assert_close(output.log_probs[kept], torch.cat(wanted), rtol=1e-4, atol=1e-4)
    assert not output.log_probs[~kept].any()  # padding is no target, whatever stands there
    found = gradients((output.log_probs * share).sum())
    for one, other in zip(found, wanted_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)


def test_a_temperature_for_each_position_goes_with_its_position():
    model = made(fused=True)
    ids, mask = padded(ROWS, "right")
    targets = padded(shifted(ROWS), "right")[0].masked_fill(mask == 0, -100)
    temperature = torch.linspace(0.5, 2.0, ids.numel()).view(ids.shape)
    found = model(ids, mask, weights=torch.tensor(WEIGHTS), targets=targets, temperature=temperature).log_probs
    logits = model(ids, mask, weights=torch.tensor(WEIGHTS)).logits / temperature[..., None]
    wanted = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(found, wanted.masked_fill(targets == -100, 0.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_models_own_loss_is_over_the_text_behind_its_first_token(side):
    model = made()
    ids, mask = padded(ROWS, side)
    labels = ids.masked_fill(mask == 0, -100)
    found = model(ids, mask, weights=torch.tensor(WEIGHTS), labels=labels).loss
    each = [
        -alone(model, row, w).log_softmax(-1)[:-1].gather(-1, torch.tensor(row[1:])[:, None])
        for row, w in zip(ROWS, WEIGHTS, strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(each).mean(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_some_logits_only(side):
    model = made()
    ids, mask = padded(ROWS, side)
    every = model(ids, mask, weights=torch.tensor(WEIGHTS)).logits
    for kept in (2, torch.tensor([1, 3])):
        found = model(ids, mask, weights=torch.tensor(WEIGHTS), logits_to_keep=kept).logits
        torch.testing.assert_close(
            found, every[:, -2:] if kept is not None and isinstance(kept, int) else every[:, kept]
        )


def test_a_cache_takes_the_words_in_once():
    model = made()
    ids, mask = padded(ROWS, "left")
    weights = torch.tensor(WEIGHTS)
    whole = model(ids, mask, weights=weights).logits
    first = model(ids[:, :4], mask[:, :4], weights=weights, use_cache=True)
    rest = model(ids[:, 4:], mask, weights=weights, past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, whole[:, 4:], rtol=2e-4, atol=2e-4)
    with pytest.raises(ValueError, match="attention_mask covers"):
        model(ids[:, 4:], mask[:, 1:], weights=weights, past_key_values=rest.past_key_values)


def test_generating_is_continuing_what_is_written_row_by_row():
    model = made()
    ids, mask = padded(ROWS, "left")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, mask, weights=WEIGHTS, **options)
    assert torch.equal(found[:, : ids.shape[1]], ids)
    for row, weights, tokens in zip(ROWS, WEIGHTS, found, strict=True):
        written = torch.tensor([PROMPT.prepend_ids(row, weights, model.tokenizer)])
        wanted = model.model.generate(input_ids=written, attention_mask=torch.ones_like(written), **options)
        assert torch.equal(tokens[ids.shape[1] :], wanted[0, written.shape[1] :])
    by_length = model.generate(
        ids, mask, weights=WEIGHTS, max_length=10, min_length=10, do_sample=False, pad_token_id=0
    )
    assert torch.equal(by_length, found)
    several = model.generate(
        ids, mask, weights=WEIGHTS, num_beams=2, num_return_sequences=2, return_dict_in_generate=True, **options
    )
    assert torch.equal(several.sequences[:, : ids.shape[1]], ids.repeat_interleave(2, 0))
    with pytest.raises(ValueError, match="padded on the right"):
        model.generate(*padded(ROWS, "right"), weights=WEIGHTS)


def test_beta_in_words_is_taken_row_by_row():
    model = made(prompt=WITH_BETA, of=tokenizer())
    assert model.takes_beta
    ids, mask = padded(ROWS, "left")
    betas = [[0.1, 0.1], [0.3, 0.1], [0.1, 0.9]]
    found = model(ids, mask, weights=torch.tensor(WEIGHTS), beta=torch.tensor(betas)).logits
    for row, weights, beta, logits, own in zip(ROWS, WEIGHTS, betas, found, mask, strict=True):
        torch.testing.assert_close(logits[own > 0], alone(model, row, weights, beta), rtol=2e-4, atol=2e-4)
    with pytest.raises(ValueError, match="beta is missing"):
        model(ids, mask, weights=torch.tensor(WEIGHTS))
    with pytest.raises(ValueError, match="beta was passed to a TextPromptModel"):
        made()(ids, mask, weights=torch.tensor(WEIGHTS), beta=[1.0, 1.0])


def test_what_cannot_be_written_is_an_error():
    model, (ids, mask) = made(), padded(ROWS, "left")
    for keywords, said in (
        ({}, "weights are missing; pass one for each of helpful, harmless"), ({"weights": [0.5, 0.6]}, "sum"),
        ({"weights": WEIGHTS[:2]}, "there are 3 rows"), ({"weights": WEIGHTS, "token_type_ids": ids}, "token_type_ids"),
        ({"weights": WEIGHTS, "return_dict": False}, "return_dict"),
        ({"weights": WEIGHTS, "inputs_embeds": torch.zeros(3, 6, 32)}, "inputs_embeds"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            model(ids, mask, **keywords)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge(WEIGHTS[0])
    with pytest.raises(ValueError, match="record names"):
        TextPromptModel(build(), PROMPT, Counting(), record=("a", "b"))


def test_at_one_trade_off_and_as_the_reference():
    model, (ids, mask) = made(), padded(ROWS, "left")
    with model.at(WEIGHTS[0]) as one:
        found = one(ids, mask).logits
    assert torch.equal(found, model(ids, mask, weights=WEIGHTS[0]).logits)
    base, own = build(), mask > 0
    with model.reference() as reference:
        torch.testing.assert_close(reference(ids, mask, weights=WEIGHTS).logits[own], base(ids, mask).logits[own])
    with model.reference(adapters=True) as reference:
        torch.testing.assert_close(reference(ids, mask).logits[own], model.model(ids, mask).logits[own])


def test_saved_as_runs_save_it_and_loaded(tmp_path):
    plain, words = build(), tokenizer()
    record = TuningRecord(NAMES, beta=[0.1, 0.1], concentration=1.0)
    model = TextPromptModel(lora(copy.deepcopy(plain)), PROMPT, words, record=record).eval()
    model.save_pretrained(tmp_path / "as_runs", tokenizer=False)
    assert json.loads((tmp_path / "as_runs" / "mopl.json").read_text()) == {
        "kind": "TextPromptModel", "objectives": list(NAMES), "reference": "self", "beta": [0.1, 0.1], "alpha": 1.0,
        "base_model": None, "adapter": "default", "template": "[{weights}]\n",
    }  # fmt: skip
    assert {"mopl.json", "adapter_config.json", "adapter_model.safetensors"} >= {
        file.name for file in (tmp_path / "as_runs").iterdir() if file.name != "README.md"
    }
    ids, mask = padded(ROWS, "left")
    wanted = model(ids, mask, weights=WEIGHTS).logits
    loaded = WeightedModel.from_pretrained(tmp_path / "as_runs", copy.deepcopy(plain), tokenizer=words)
    assert type(loaded) is TextPromptModel and loaded.record.beta == [0.1, 0.1] and loaded.text_prompt == PROMPT
    assert torch.equal(loaded(ids, mask, weights=WEIGHTS).logits, wanted)
    with pytest.raises(ValueError, match="pass tokenizer"):
        TextPromptModel.from_pretrained(tmp_path / "as_runs", copy.deepcopy(plain))
    model.save_pretrained(tmp_path / "alone")
    again = TextPromptModel.from_pretrained(tmp_path / "alone", copy.deepcopy(plain), trainable=True)
    assert torch.equal(again(ids, mask, weights=WEIGHTS).logits, wanted)
    assert any(parameter.requires_grad for parameter in again.parameters())


def test_how_the_words_look_is_kept(tmp_path):
    prompt = TextPrompt(NAMES, "{weights} ", item="{value}", separator="/", digits=3)
    model = TextPromptModel(lora(build()), prompt, tokenizer())
    model.save_pretrained(tmp_path)
    assert TextPromptModel.from_pretrained(tmp_path, build()).text_prompt == prompt


def test_a_plain_model_is_saved_whole_and_loaded_by_itself_or_in_place(tmp_path):
    words, (ids, mask) = tokenizer(), padded(ROWS, "left")
    model = TextPromptModel(build(), PROMPT, words).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    wanted = model(ids, mask, weights=WEIGHTS).logits
    other = TextPromptModel(build(), PROMPT, words).eval()
    other.load_weights(tmp_path)
    for loaded in (
        TextPromptModel.from_pretrained(tmp_path),
        TextPromptModel.from_pretrained(tmp_path, build()),
        other,
    ):
        assert torch.equal(loaded(ids, mask, weights=WEIGHTS).logits, wanted)
    with pytest.raises(ValueError, match="it does not fit"):
        TextPromptModel.from_pretrained(tmp_path, build("gpt2"))


def test_words_count_as_positions():
    model = made(of=Counting())
    assert model.virtual_tokens == max(len(model.write_weights([], w)) for w in ([1, 0], [0, 1], [0.5, 0.5]))
    assert model.write_weights([1, 7], [0.5, 0.5]) == PROMPT.prepend_ids([1, 7], [0.5, 0.5], Counting())
    assert model.arranges_rows and not model.takes_embeddings
