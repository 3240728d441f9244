"""From texts to batches: where responses begin, truncation, padding and packing, labels and masks, token budgets."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from mopl import reference
from mopl.language_models.collate import ListCollator, by_objective, to_lists, token_batches
from mopl.language_models.data import DataError, PreferenceData, PreferenceList, RowError
from mopl.language_models.head import fuse, score_sequences
from mopl.language_models.readers import load_preferences
from mopl.language_models.tokenization import ListTokenizer, TokenizedList, tokenize, truncate
from mopl.losses import pairwise_logistic

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The opening of the turn holds what an answered conversation does not: the boundary cannot be found.
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")


def byte_tokenizer(*, bos=True, adds_bos=False, chat_template=None, eos="<|im_end|>"):
    """One token a byte, so that lengths are known without running it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(special)
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", **({"bos_token": "<s>"} if bos else {}), **({"eos_token": eos} if eos else {})}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    tokenizer.chat_template = chat_template
    return tokenizer


def metaspace_tokenizer():
    """A tokenizer in the manner of SentencePiece: a space before every text, one token a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    characters = ["<unk>", "</s>", "\n", "▁", *"abcdefghijklmnopqrstuvwxyz.?"]
    inner = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(characters)}, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")


PLAIN = byte_tokenizer()
CHAT = byte_tokenizer(chat_template=CHATML)
EOS = PLAIN.eos_token_id
USER = {"role": "user", "content": "Why?"}


def run(tokenizer, prompt, *responses, **options):
    item = PreferenceList(prompt, responses, {"h": (1.0,) + (0.0,) * (len(responses) - 1)})
    return ListTokenizer(tokenizer, **options)(item, np.zeros((1, len(responses)), dtype=np.float32))


def texts(tokenizer, item):
    return tokenizer.decode(item.prompt.tolist()), [tokenizer.decode(r.tolist()) for r in item.responses]


# ---------------------------------------------------------------- boundary


def test_plain_text_is_the_prompt_the_separator_and_the_response_with_its_end():
    item = run(PLAIN, "Why?", "So.", "Because it is.")
    assert texts(PLAIN, item) == ("Why?", ["So.<|im_end|>", "Because it is.<|im_end|>"])
    item = run(PLAIN, "Why?", "So.", "Because it is.", separator="\n", append_eos=False)
    assert texts(PLAIN, item) == ("Why?\n", ["So.", "Because it is."])
    assert texts(PLAIN, run(PLAIN, "Why?", "a<|im_end|>", "b"))[1] == ["a<|im_end|>", "b<|im_end|>"]  # not twice


def test_a_beginning_token_comes_first_exactly_if_the_tokenizer_adds_one():
    with_bos = byte_tokenizer(adds_bos=True)
    assert texts(with_bos, run(with_bos, "Why?", "a", "b"))[0] == "<s>Why?"
    assert texts(PLAIN, run(PLAIN, "Why?", "a", "b"))[0] == "Why?"


def test_messages_without_a_template_are_written_as_transcripts():
    system, answer = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Hi."}
    item = run(PLAIN, [system, USER, answer, USER], [answer], "Yes.")
    prompt, responses = texts(PLAIN, item)
    assert prompt == "Be brief.\n\nHuman: Why?\n\nAssistant: Hi.\n\nHuman: Why?\n\nAssistant:"
    assert responses == [" Hi.<|im_end|>", " Yes.<|im_end|>"]
    longer = run(PLAIN, [USER], [answer, USER, answer], "b")
    assert texts(PLAIN, longer)[1][0] == " Hi.\n\nHuman: Why?\n\nAssistant: Hi.<|im_end|>"
    with pytest.raises(RowError, match="needs a chat template: a message of tool"):
        run(PLAIN, [{"role": "tool", "content": "3"}], "a", "b")


def test_a_chat_template_opens_the_turn_in_the_prompt_and_the_response_ends_with_the_turn():
    expected = ("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", ["So.<|im_end|>", "B\n.<|im_end|>"])
    assert texts(CHAT, run(CHAT, "Why?", "So.", "B\n.")) == expected  # text is one turn of the user
    answers = [[{"role": "assistant", "content": text}] for text in ("So.", "B\n.")]
    assert texts(CHAT, run(CHAT, [USER], *answers)) == expected
    assert texts(PLAIN, run(PLAIN, [USER], *answers, chat_template=CHATML)) == expected
    assert texts(CHAT, run(CHAT, "Why?", "So.", "B", template="plain"))[0] == "Why?"


def test_prompt_and_response_tokens_are_those_of_the_whole_conversation():
    answer = {"role": "assistant", "content": "So."}
    item = run(CHAT, [USER], [answer], "other")
    whole = CHAT.apply_chat_template([USER, answer], tokenize=True, return_dict=True)["input_ids"]
    joined = [*item.prompt.tolist(), *item.responses[0].tolist()]
    assert joined == whole[: len(joined)] and CHAT.decode(whole[len(joined) :]) == "\n"
    assert (
        item.prompt.tolist()
        == CHAT.apply_chat_template([USER], tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"]
    )


def test_a_template_that_ends_turns_with_another_token_ends_the_response_there():
    other = byte_tokenizer(chat_template=CHATML, eos="<pad>")
    assert texts(other, run(other, "Why?", "a", "b"))[1] == ["a<|im_end|>", "b<|im_end|>"]


def test_a_template_without_a_clear_boundary_is_an_error_that_shows_where():
    with pytest.raises(ValueError, match=r"(?s)continuation of its prompt.*<think>.*template_options"):
        run(byte_tokenizer(chat_template=THINKING), "Why?", "a", "b")


def test_no_space_comes_before_a_response_from_a_tokenizer_that_begins_texts_with_one():
    tokenizer = metaspace_tokenizer()
    item = run(tokenizer, "why?", "so.", "no.")
    assert tokenizer.convert_ids_to_tokens(item.prompt.tolist()) == list("▁why?")
    assert tokenizer.convert_ids_to_tokens(item.responses[0].tolist()) == [*"so.", "</s>"]
    spaced = run(tokenizer, "why?", " so.", "no.")
    assert tokenizer.convert_ids_to_tokens(spaced.responses[0].tolist()) == [*"▁so.", "</s>"]


class Counting:
    """A tokenizer that counts how often it is given each text."""

    def __init__(self, inner):
        self.inner, self.seen = inner, []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, text, **options):
        self.seen.append(text)
        return self.inner(text, **options)


def test_the_shared_prompt_is_tokenised_once():
    tokenizer = Counting(PLAIN)
    run(tokenizer, "the prompt", "a", "b", "c", "d")
    assert tokenizer.seen.count("the prompt") == 1 and not any("prompta" in text for text in tokenizer.seen)


@pytest.mark.parametrize(
    ("tokenizer", "options", "message"),
    [
        (PLAIN, {"template": "chat"}, "has no chat template; pass chat_template"),
        (PLAIN, {"template": "jinja"}, "template is 'jinja'"),
        (byte_tokenizer(eos=None), {}, "has no eos_token.*append_eos=False"),
        (PLAIN, {"max_length": 1}, "max_length is 1 but must be at least 2"),
        (PLAIN, {"max_length": 8, "min_prompt": 8}, "min_prompt is 8 but must be at least 1 and less than"),
        (PLAIN, {"min_prompt": 0}, "min_prompt is 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        ListTokenizer(tokenizer, **options)


def test_lists_without_tokens_are_counted_and_refused_or_skipped():
    class Forgetful(Counting):
        def __call__(self, text, **options):
            return {"input_ids": [token for token in self.inner(text, **options)["input_ids"] if text != "☃"]}

    data = PreferenceData([
        PreferenceList("q", ("a", "☃"), {"h": (1, 0)}),
        PreferenceList("☃", ("a", "b"), {"h": (1, 0)}),
        PreferenceList("q", ("a", "b"), {"h": (1, 0)}),
    ])  # fmt: skip
    tokenizer = ListTokenizer(Forgetful(PLAIN))
    with pytest.raises(DataError, match=r"1 x empty response \(list 0: response 1 has no tokens\)(.|\n)*list 1"):
        tokenize(data, tokenizer)
    kept = tokenize(data, tokenizer, on_error="skip")
    assert [item.index for item in kept] == [2] and kept.report.counts == {"empty response": 1, "empty prompt": 1}


# ---------------------------------------------------------------- truncation


@settings(max_examples=300, deadline=None)
@given(
    prompt=st.integers(1, 40),
    responses=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    max_length=st.integers(2, 50),
    data=st.data(),
)
def test_truncation_takes_the_prompt_first_and_never_cuts_a_response_to_nothing(prompt, responses, max_length, data):
    min_prompt = data.draw(st.integers(1, max_length - 1))
    bos = data.draw(st.sampled_from([None, 100, 7]))  # 7: the prompt does not begin with it
    before = np.arange(100, 100 + prompt)
    bodies = [np.arange(1000 * (k + 1), 1000 * (k + 1) + size) for k, size in enumerate(responses)]
    after, cut = truncate(before, bodies, max_length=max_length, min_prompt=min_prompt, bos=bos)
    assert max(len(after) + len(c) for c in cut) <= max_length
    assert len(after) >= min(prompt, min_prompt) >= 1
    for body, c in zip(bodies, cut, strict=True):
        assert len(c) >= min(len(body), max_length - min_prompt) >= 1
        np.testing.assert_array_equal(c, body[: len(c)])  # from the right
    # From the left, but not the token at the beginning.
    kept = after[1:] if bos == 100 else after
    np.testing.assert_array_equal(kept, before[prompt - len(kept) :])
    assert bos != 100 or after[0] == bos
    # Nothing is cut without need, and no response before the prompt is as short as it may be.
    if any(len(c) < len(b) for b, c in zip(bodies, cut, strict=True)):
        assert len(after) == min(prompt, min_prompt)
    if len(after) < prompt:
        assert len(after) + max(map(len, cut)) == max_length


def test_a_long_list_is_cut_and_says_by_how_much():
    item = run(PLAIN, "p" * 30, "a" * 5, "b" * 20, max_length=24, min_prompt=8)
    assert (len(item.prompt), item.prompt_cut) == (8, 22)
    assert ([len(r) for r in item.responses], item.response_cut) == ([6, 16], (0, 5))
    assert item.responses[0][-1] == EOS != item.responses[1][-1]
    whole = run(PLAIN, "p" * 30, "a" * 5, "b" * 20, max_length=None)
    assert (whole.prompt_cut, whole.response_cut) == (0, (0, 0)) and whole.lengths.tolist() == [36, 51]


def test_the_beginning_token_survives_the_cut_of_the_prompt():
    with_bos = byte_tokenizer(adds_bos=True)
    item = run(with_bos, "abcdefgh", "x" * 9, "y", max_length=14)
    assert texts(with_bos, item)[0] == "<s>fgh"


# ---------------------------------------------------------------- collation


def lists(*, count=5, objectives=2, missing=0.0, seed=0, longest=12):
    """Random ragged lists of tokens from 10 on."""
    rng = np.random.default_rng(seed)
    result = []
    for index in range(count):
        width = int(rng.integers(2, 5))
        labels = rng.normal(size=(objectives, width)).astype(np.float32)
        labels[rng.random(labels.shape) < missing] = np.nan
        result.append(
            TokenizedList(
                rng.integers(10, 90, rng.integers(1, longest)),
                tuple(rng.integers(10, 90, rng.integers(1, longest)) for _ in range(width)),
                labels,
                index + 100,
            )
        )
    return result


def contents(batch):
    """What each sequence of a batch holds: tokens, the tokens that count, positions if given."""
    inputs, result = batch.inputs, []
    for number in range(len(batch.index)):
        if "segment" in inputs:
            where = inputs["segment"][0] == number
            row = {key: inputs[key][0][where] for key in ("input_ids", "labels", "position_ids")}
        else:
            where = inputs["attention_mask"][number].bool()
            row = {key: inputs[key][number][where] for key in ("input_ids", "labels")}
            row["position_ids"] = inputs.get("position_ids", inputs["attention_mask"].cumsum(-1) - 1)[number][where]
        result.append({key: value.tolist() for key, value in row.items()})
    return result


@pytest.mark.parametrize("options", [{"packed": True}, {"padding_side": "left"}, {"pad_to_multiple_of": 16}])
def test_every_arrangement_holds_the_same_sequences(options):
    items = lists()
    padded, other = ListCollator()(items), ListCollator(**options)(items)
    assert contents(padded) == contents(other)
    expected = [(item, response) for item in items for response in item.responses]
    for held, (item, response) in zip(contents(other), expected, strict=True):
        assert held["input_ids"] == [*item.prompt, *response]
        assert held["labels"] == [-100] * len(item.prompt) + response.tolist()
        assert held["position_ids"] == list(range(len(item.prompt) + len(response)))
    assert torch.equal(padded.labels, other.labels) and torch.equal(padded.index, other.index)


def test_padding_is_masked_on_the_side_that_was_asked_for():
    items = lists()
    for side in ("left", "right"):
        inputs = ListCollator(padding_side=side, pad_id=7)(items).inputs
        padding = inputs["attention_mask"] == 0
        assert bool((inputs["labels"][padding] == -100).all()) and bool((inputs["input_ids"][padding] == 7).all())
        assert not bool(padding[:, -1 if side == "left" else 0].any()) and bool(padding.any())
    assert ListCollator(pad_to_multiple_of=16)(items).inputs["input_ids"].shape[1] % 16 == 0


def test_packed_batches_have_no_padding():
    items = lists()
    inputs = ListCollator(packed=True)(items).inputs
    assert inputs["input_ids"].shape == (1, sum(int(item.lengths.sum()) for item in items))
    assert inputs["sequences"] == sum(len(item.responses) for item in items)
    assert "attention_mask" not in inputs


def test_scores_become_lists_and_their_gradient_goes_back_to_each_sequence():
    items = lists()
    batch = ListCollator(width=6)(items)
    assert batch.mask.shape == (5, 6) and batch.mask.sum(-1).tolist() == [len(item.responses) for item in items]
    assert batch.lists.tolist() == [100, 101, 102, 103, 104]
    count = len(batch.index)
    scores = torch.randn(count, dtype=torch.float64, requires_grad=True)
    arranged = to_lists(scores, batch)
    assert torch.equal(arranged[batch.mask], scores) and bool((arranged[~batch.mask] == 0).all())
    upstream = torch.randn(5, 6, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(arranged, scores, upstream)
    assert torch.equal(gradient, upstream[batch.mask])
    with pytest.raises(ValueError, match=rf"\(2,\) but the batch has {count} sequences"):
        to_lists(torch.zeros(2), batch)


def test_labels_keep_their_places_and_padding_is_zero():
    items = lists()
    batch = ListCollator()(items)
    for number, item in enumerate(items):
        width = len(item.responses)
        torch.testing.assert_close(batch.labels[number, :, :width], torch.from_numpy(item.labels), rtol=0, atol=0)
        assert not batch.labels[number, :, width:].any()
    assert bool(batch.objective_mask.all()) and torch.equal(batch.label_mask, batch.mask[:, None].expand(-1, 2, -1))


def with_labels(*rows):
    """One list with these labels."""
    labels = np.array(rows, dtype=np.float32)
    return TokenizedList(np.arange(3), tuple(np.arange(2) for _ in range(labels.shape[1])), labels)


nan = float("nan")


def test_an_objective_with_missing_labels_is_dropped_or_kept_as_asked():
    items = [with_labels([1, 2, 3], [nan, 5, 4], [nan, nan, 1]), with_labels([nan, nan], [1, 0], [0, 1])]
    dropped, kept = ListCollator()(items), ListCollator(partial="keep")(items)
    assert dropped.objective_mask.tolist() == [[True, False, False], [False, True, True]]
    assert kept.objective_mask.tolist() == [[True, True, False], [False, True, True]]
    assert dropped.labels[0].tolist() == [[1, 2, 3], [0, 0, 0], [0, 0, 0]]
    assert kept.labels[0].tolist() == [[1, 2, 3], [0, 5, 4], [0, 0, 0]]
    assert kept.label_mask[0].tolist() == [[True] * 3, [False, True, True], [False] * 3]
    for batch in (dropped, kept):
        assert bool(batch.labels.isfinite().all()) and torch.equal(batch.label_mask.any(-1), batch.objective_mask)


def test_a_list_of_one_response_prefers_nothing():
    for partial in ("drop", "keep"):
        batch = ListCollator(partial=partial)([with_labels([1.0]), with_labels([1.0, 0.0])])
        assert batch.objective_mask.tolist() == [[False], [True]] and not batch.label_mask[0].any()


def plackett_luce(scores, labels, mask):
    """The likelihood of the whole ranking, which is not 0 for equal labels."""
    ones = scores.new_ones(labels.shape[:2])
    return reference.plackett_luce_nll(scores, labels, ones, mask)


def listnet(scores, labels, mask):
    return reference.listwise_cross_entropy(scores, labels, scores.new_ones(labels.shape[:2]), mask)


@pytest.mark.parametrize("loss", [plackett_luce, listnet])
def test_a_missing_objective_has_loss_and_gradient_zero(loss):
    items = lists(missing=0.2, count=12, objectives=3)
    for item in items:
        np.abs(item.labels, out=item.labels)
    batch = ListCollator()(items)
    assert bool((~batch.objective_mask).any()) and bool(batch.objective_mask.any())
    scores = torch.randn(batch.mask.shape, dtype=torch.float64, requires_grad=True)
    vector = loss(scores, batch.labels, batch.mask)
    weighted = vector * batch.objective_mask
    assert torch.equal(weighted == 0, ~batch.objective_mask)
    if loss is listnet:  # normalised labels need no weights for it
        assert torch.equal(vector, weighted)
    else:
        assert not torch.equal(vector, weighted)
    upstream = torch.randn_like(vector)
    (gradient,) = torch.autograd.grad(weighted, scores, upstream * ~batch.objective_mask)
    assert not gradient.any()


@pytest.mark.parametrize("loss", [plackett_luce, listnet])
def test_every_objective_over_its_own_responses_is_the_loss_of_the_shortened_list(loss):
    items = [with_labels([1, nan, 0.5], [3, 2, 1]), with_labels([nan, 1, 3], [nan, nan, nan])]
    kept = ListCollator(partial="keep")(items)
    scores = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    flat, labels, mask = by_objective(scores, kept)
    assert flat.shape == (4, 3) and labels.shape == (4, 1, 3) and mask.shape == (4, 3)
    vector = loss(flat, labels, mask).view(2, 2)
    assert vector[1, 1] == 0 and not bool(kept.objective_mask[1, 1])
    upstream = torch.randn(2, 2, dtype=torch.float64)
    total = scores.new_zeros(())
    for b, j, chosen, z in ((0, 0, [0, 2], [1, 0.5]), (0, 1, [0, 1, 2], [3, 2, 1]), (1, 0, [1, 2], [1, 3])):
        short = loss(scores[b : b + 1, chosen], torch.tensor(z, dtype=torch.float64)[None, None], None)[0, 0]
        torch.testing.assert_close(vector[b, j], short)
        total = total + upstream[b, j] * short
    (gradient,) = torch.autograd.grad(vector, scores, upstream)
    torch.testing.assert_close(gradient, torch.autograd.grad(total, scores)[0])
    with pytest.raises(ValueError, match=r"must be \(2, 3\)"):
        by_objective(scores[:, :2], kept)


def test_presorted_order_puts_missing_labels_after_labelled_ones_and_padding_last():
    items = [with_labels([-2, nan, 5], [1, 1, 1]), with_labels([0, 1, 2, 1], [3, 2, 1, 0])]
    order = ListCollator(order=True, partial="keep")(items).order
    assert order is not None
    assert order.tolist() == [[[2, 0, 1, 3], [0, 1, 2, 3]], [[2, 1, 3, 0], [0, 1, 2, 3]]]
    assert ListCollator()(items).order is None


def test_a_batch_moves_whole():
    batch = ListCollator(packed=True, order=True)(lists())
    moved = batch.to("meta")
    assert len(moved) == 5 and moved.inputs["sequences"] == batch.inputs["sequences"]
    held = [moved.labels, moved.mask, moved.label_mask, moved.objective_mask, moved.index, moved.lists, moved.order]
    held += [value for value in moved.inputs.values() if isinstance(value, torch.Tensor)]
    assert len(held) == 11 and all(tensor is not None and tensor.device.type == "meta" for tensor in held)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packed": True, "padding_side": "left"}, "packed batches have no padding"),
        ({"packed": True, "pad_to_multiple_of": 8}, "packed batches have no padding"),
        ({"padding_side": "middle"}, "padding_side is 'middle'"),
        ({"partial": "guess"}, "partial is 'guess'"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0"),
    ],
)
def test_collator_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ListCollator(**options)


def test_lists_that_make_no_batch_are_refused():
    with pytest.raises(ValueError, match="there is no list"):
        ListCollator()([])
    with pytest.raises(ValueError, match=r"have \[1, 2\] objectives"):
        ListCollator()([*lists(objectives=1), *lists(objectives=2)])
    with pytest.raises(ValueError, match="a list has 4 responses but width is 2"):
        ListCollator(width=2)(lists(count=20))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_gives_packed_and_padded_sequences_the_same_scores(family):
    if family == "llama":
        config = transformers.LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    else:
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        )
    model = model.double().eval()
    items = lists(seed=3)
    expected = []
    for item in items:  # one by one, without any batch
        for response in item.responses:
            ids = torch.tensor([[*item.prompt, *response]])
            log_probs = model(ids).logits[0, len(item.prompt) - 1 : -1].log_softmax(-1)
            expected.append(log_probs.gather(1, torch.from_numpy(response)[:, None]).sum())
    expected = torch.stack(expected)
    fuse(model)
    for options in ({}, {"padding_side": "left"}, {"packed": True}):
        batch = ListCollator(**options)(items)
        scores = score_sequences(model, batch.inputs).scores
        torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-4)
        assert to_lists(scores, batch).shape == batch.mask.shape


# ---------------------------------------------------------------- token budgets


def cost(items, chosen, padded):
    lengths = np.concatenate([items[i].lengths for i in chosen])
    return len(lengths) * lengths.max() if padded else lengths.sum()


@pytest.mark.parametrize("padded", [True, False])
def test_batches_use_every_list_once_and_none_exceeds_the_budget(padded):
    items = lists(count=101, seed=1)
    batches = token_batches(items, 200, padded=padded)
    assert sorted(np.concatenate(batches)) == list(range(101))
    assert all(0 < cost(items, batch, padded) <= 200 for batch in batches)
    for batch, following in itertools.pairwise(batches):  # greedy: the next list would not have fitted
        assert cost(items, [*batch, following[0]], padded) > 200


def test_lists_of_like_length_go_together_which_saves_padding():
    items = lists(count=400, seed=4, longest=40)
    batches = token_batches(items, 1000, padded=True)
    longest = [int(items[place].lengths.max()) for place in np.concatenate(batches)]
    assert longest == sorted(longest)
    in_order = np.array_split(np.arange(400), len(batches))
    waste = [sum(cost(items, batch, True) for batch in each) for each in (in_order, batches)]
    assert waste[1] < waste[0]


def test_a_list_longer_than_the_budget_is_a_batch_of_its_own():
    items = [with_labels([1, 0]), with_labels(list(range(9))), with_labels([0, 1])]
    assert [batch.tolist() for batch in token_batches(items, 20, padded=True)] == [[0], [1], [2]]
    with pytest.raises(ValueError, match="budget is 0"):
        token_batches(items, 0, padded=True)


# ---------------------------------------------------------------- real data from file to batch


@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize(
    "name",
    ["hh_rlhf/harmless-base_test.jsonl.gz", "oasst/en_100_tree.jsonl.gz", "llamafactory/dpo_en_demo.json.gz",
     "unieval/topical_chat.json.gz"],
)  # fmt: skip
def test_real_data_go_from_file_to_batches_within_the_budget(shared_data, name, template):
    data = load_preferences(shared_data / name, on_error="skip", limit=60)
    tokenizer = ListTokenizer(byte_tokenizer(chat_template=template), max_length=256)
    tokens = tokenize(data, tokenizer)
    assert tokens.describe()["longest_sequence"] <= 256 and tokens.describe()["prompts_cut"] > 0
    collator = ListCollator(packed=True)
    seen = []
    for chosen in token_batches(tokens, 4096, padded=False):
        batch = collator([tokens[int(i)] for i in chosen])
        assert batch.inputs["input_ids"].shape[1] <= 4096
        counted = torch.zeros(len(batch.index)).index_add_(
            0, batch.inputs["segment"][0], (batch.inputs["labels"][0] != -100).float()
        )
        assert bool((counted > 0).all())
        for number, index in enumerate(batch.lists.tolist()):
            expected = torch.from_numpy(data.label_array(index))
            assert torch.equal(batch.labels[number][:, : expected.shape[1]], expected)
        seen += batch.lists.tolist()
    assert sorted(seen) == list(range(len(data)))


def test_the_fingerprint_of_tokens_changes_with_where_prompts_begin():
    tokens = tokenize(PreferenceData([PreferenceList("Why?", ("a", "b"), {"x": (1, 0)})]), ListTokenizer(PLAIN))
    later = dataclasses.replace(tokens.lists[0], prompt_starts=(0, 1))
    assert dataclasses.replace(tokens, lists=(later,)).fingerprint() != tokens.fingerprint()


def test_the_fingerprint_of_tokens_changes_with_tokenizer_template_and_length(shared_data):
    data = load_preferences(shared_data / "unieval/topical_chat.json.gz", limit=12)
    options = [(PLAIN, {}), (CHAT, {}), (PLAIN, {"max_length": 64}), (PLAIN, {"separator": " "})]
    prints = {tokenize(data, ListTokenizer(tokenizer, **more)).fingerprint() for tokenizer, more in options}
    assert len(prints) == 4 and tokenize(data, ListTokenizer(PLAIN)).fingerprint() in prints


def test_a_data_loader_collates_lists():
    loader = torch.utils.data.DataLoader(lists(count=6), batch_size=4, collate_fn=ListCollator())
    assert [len(batch) for batch in loader] == [4, 2]


def test_losses_take_a_batch_of_ragged_lists_as_it_is():
    items = lists(count=8, missing=0.2, objectives=3)
    batch = ListCollator(width=6)(items)
    scores = torch.randn(len(batch.index), requires_grad=True)
    arranged = to_lists(scores, batch)
    loss = pairwise_logistic(
        arranged, batch.labels, mask=batch.mask, weights=batch.objective_mask.float(), reduction="none"
    )
    assert loss.shape == (8, 3) and torch.equal(loss == 0, ~batch.objective_mask)
    loss.sum().backward()
    assert scores.grad is not None and bool(scores.grad.isfinite().all())
