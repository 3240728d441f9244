"""How tokens of an answer become text that can be sent, and how they are chosen."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tiny_language_models import tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mopl.language_models.turns import TurnEnds
from mopl.serving.model import Form
from mopl.serving.rows import Detokenizer, Row, Sampling, TradeOff
from mopl.serving.sampling import Chooser, Watcher, sampled

GREEDY = Sampling(0.0)


def row_of(words, send, *, ends=(2,), text_end=None, sampling=GREEDY, max_tokens=100, **options) -> Row:
    form = Form(None, TurnEnds(words, tuple(ends), text_end))
    return Row([1], TradeOff((0.5, 0.5)), form, sampling, max_tokens, Detokenizer(words), send, **options)


def pieces_of(words, tokens, **options):
    """Push tokens until the row has ended; return its pieces."""
    found = []
    row = row_of(words, lambda _, piece: found.append(piece), **options)
    for token in tokens:
        if row.push(token):
            break
    return found


def fallback():
    """A vocabulary of a few words, with bytes for everything else, as those of SentencePiece have."""
    names = ["<unk>", "<s>", "</s>", "▁a", "▁b", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True, unk_token="<unk>")
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def bytes_of(text: str, count: int | None = None) -> list[int]:
    return [5 + byte for byte in text.encode()[:count]]


@pytest.mark.parametrize(
    "tokens",
    [
        [3, *bytes_of("東京"), 4, 2],
        [3, *bytes_of("😀😀"), 2],
        [*bytes_of("\n😀"), 2],
        [*bytes_of("😀"), *bytes_of("😀", 2), 2],  # one wrong byte spoils all in front of it
        [*bytes_of("ä", 1), 3, 4],
        [*bytes_of("ä", 1), 0, *bytes_of("é")],  # a special token is skipped, and the bytes around it are one text
        [3, *bytes_of("😀"), 0, *bytes_of("😀", 1), 4],
    ],
)
def test_nothing_is_sent_that_a_later_token_changes(tokens):
    words = fallback()
    found = pieces_of(words, tokens, streams=True, max_tokens=len(tokens))
    assert [piece.text for piece in found[1:]].count("") <= 1 and found[-1].finish
    whole = words.decode([token for token in tokens if token != 2], skip_special_tokens=True)
    assert "".join(piece.text for piece in found) == whole
    assert not any(piece.error for piece in found)
    (alone,) = pieces_of(words, tokens, max_tokens=len(tokens))
    assert alone.text == whole


@pytest.mark.parametrize(
    ("stop", "wanted"),
    [("w3 w4", "w1 w2 "), ("w4", "w1 w2 w3 "), ("w2 w9", "w1 w2 w3 w4 w5"), ("1", "w"), (" w2 w3 w4 w5", "w1")],
)
def test_no_part_of_a_stop_string_is_sent(stop, wanted):
    words = tokenizer()
    tokens = words("w1 w2 w3 w4 w5", add_special_tokens=False)["input_ids"]
    found = pieces_of(words, [*tokens, 2], streams=True, stop=(stop,))
    assert "".join(piece.text for piece in found) == wanted and found[-1].finish == "stop"
    (alone,) = pieces_of(words, [*tokens, 2], stop=(stop,))
    assert alone.text == wanted
    sent = ""
    for piece in found[:-1]:
        sent += piece.text
        assert not any(sent.endswith(stop[:n]) for n in range(1, len(stop)))
    # What a chat template ends a turn with in words is such a string, too.
    (ended,) = pieces_of(words, tokens, text_end=stop, max_tokens=5)
    assert ended.text == wanted


def test_a_row_ends_at_its_own_length_and_when_it_is_given_up():
    words = tokenizer()
    ids = torch.tensor(words(["w1 w2", "w3 w4", "w5 w6"], add_special_tokens=False)["input_ids"])
    found: dict[int, list] = {0: [], 1: [], 2: []}
    rows = [
        row_of(words, lambda row, piece: found[row.index].append(piece), index=i, max_tokens=2 - (i == 1))
        for i in range(3)
    ]
    watch = Watcher(rows)
    assert watch(ids[:, :1], None).tolist() == [False, True, False]
    rows[2].cancelled = True
    assert watch(ids, None).tolist() == [True, True, True]
    assert [piece.text for piece in found[0]] == ["w1 w2"] and [piece.text for piece in found[1]] == ["w3"]
    assert found[2] == [] and rows[2].tokens == ids[2, :1].tolist()


# ---------------------------------------------------------------- choosing


def test_each_row_is_sampled_as_transformers_warps_it():
    """Drawn at a fine grid of uniform numbers, tokens come as often as their probabilities say."""
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0))
    grid = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for temperature, top_k, top_p in ((1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 4, 1.0), (1.3, 0, 0.7), (0.8, 5, 0.6)):
        warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        warpers += [TopKLogitsWarper(top_k)] if top_k else []
        warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        wanted = warpers(torch.zeros(1, 1, dtype=torch.long), scores[None]).softmax(-1)[0].double()
        how = [Sampling(temperature, top_p, top_k)] * len(grid)
        drawn = sampled(scores.expand(len(grid), -1), how, grid)
        found = torch.bincount(drawn, minlength=12) / len(grid)
        torch.testing.assert_close(found, wanted.float(), atol=2 / len(grid), rtol=0)


def test_draws_of_rows_with_other_settings_do_not_mix():
    scores = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    how = [Sampling(1.0), Sampling(0.3, 0.5), Sampling(2.0, 1.0, 3), Sampling(0.7), Sampling(1.0, 0.9, 6)]
    uniform = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    together = sampled(scores, how, uniform)
    alone = [sampled(scores[i : i + 1], how[i : i + 1], uniform[i : i + 1])[0] for i in range(5)]
    assert together.tolist() == alone
    hidden = scores.masked_fill(torch.arange(12) > 3, -torch.inf)
    for u in (0.0, 1 - 2**-53):  # the smallest and the largest number that is drawn
        ends = torch.full((5,), u, dtype=torch.float64)
        assert bool((sampled(hidden, [Sampling(1e-300), *how[1:]], ends) <= 3).all())


def test_penalties_and_bias_are_those_of_openai():
    """h - presence (count > 0) - frequency count + bias, and log-probabilities of h itself."""
    words, scores = tokenizer(), torch.linspace(0, 1, 62)[None]
    how = Sampling(0.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((7, 2.0),), top_log_probs=1)
    row = row_of(words, lambda *_: None, sampling=how)
    choose = Chooser([row])
    for token in (7, 7, 61):
        row.push(token)
    wanted = scores[0].clone()
    wanted[7] += 2.0 - 0.5 - 2 * 0.25
    wanted[61] -= 0.5 + 0.25
    left = choose(torch.zeros(1, 3, dtype=torch.long), scores)
    assert left.isfinite().sum() == 1 and int(left.argmax()) == int(wanted.argmax()) == 7
    log_probs = scores[0].double().log_softmax(-1)
    assert row.scored.token == 7 and row.scored.log_prob == pytest.approx(float(log_probs[7]))
    assert row.scored.top == ((61, pytest.approx(float(log_probs[61]))),)


def test_a_damaged_model_is_an_error_and_no_answer():
    row = row_of(tokenizer(), lambda *_: None)
    with pytest.raises(FloatingPointError, match="NaN"):
        Chooser([row])(torch.zeros(1, 1, dtype=torch.long), torch.full((1, 62), torch.nan))
