"""Rewards: values known from elsewhere, signs, remembering, and errors that cost one value and not the run."""

import functools
import logging
import math
import re
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mopl._words import sentence_ends
from mopl.rewards import (
    Brevity,
    ClassifierReward,
    FunctionReward,
    Length,
    Profanity,
    Readability,
    Rewards,
    Rouge,
    Sentiment,
    TextReward,
    available,
    make,
    make_all,
    prompt_key,
    register,
    registry,
)
from mopl.rewards.texts import count_sentences, words_of


class Counted(TextReward):
    """Length of the text, with a record of what it was asked."""

    name = "counted"

    def __init__(self, fails_on=(), maximise=True):
        self.asked, self.fails_on, self.maximise = [], fails_on, maximise

    def score(self, text, prompt=""):
        self.asked.append((prompt, text))
        if text in self.fails_on:
            raise RuntimeError(f"cannot judge {text}")
        return float(len(text))


# ---------------------------------------------------------------- ready ones


def test_brevity_is_minus_the_number_of_words():
    assert words_of("Don't worry: it's a well-known, 3-step plan!") == ["Don't", "worry", "it's", "a", "well-known",
                                                                        "3-step", "plan"]  # fmt: skip
    assert Brevity()(["one two three", "", "...", "naïve café"], [""] * 4).tolist() == [-3.0, 0.0, 0.0, -2.0]
    assert Brevity("characters").score("abcd") == -4.0
    assert Brevity(lambda text: text.count("e")).score("eel tree") == -4.0


def test_length_is_best_at_its_target_and_falls_on_both_sides():
    reward = Length(target=2)
    assert [reward.score("a " * n) for n in range(5)] == [-2.0, -1.0, 0.0, -1.0, -2.0]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [("One. Two! Three?", 3), ("It costs 3.50 dollars.", 1), ("No full stop", 1), ("Well... yes.", 2), ("", 0),
     ("A heading\n\nA paragraph.", 2), ("!!! ???", 0), ('"Stop!" she said.', 2)],
)  # fmt: skip
def test_sentences_are_counted(text, sentences):
    assert count_sentences(text) == sentences


def test_sentiment_is_the_example_of_vaders_authors():
    pytest.importorskip("vaderSentiment")
    # From the table of examples in VADER's README.
    texts = ["VADER is smart, handsome, and funny.", "VADER is not smart, handsome, nor funny.", "The book was good.",
             "Today SUX!", "The table has four legs."]  # fmt: skip
    assert Sentiment()(texts, [""] * 5).tolist() == pytest.approx([0.8316, -0.7424, 0.4404, -0.5461, 0.0])


def test_readability_is_flesch_reading_ease():
    pytest.importorskip("pyphen")
    reward = Readability()
    # 6 words, 1 sentence, 6 syllables: the "easiest" example of the literature, 116.145.
    assert reward.score("The cat sat on the mat.") == pytest.approx(206.835 - 1.015 * 6 - 84.6, abs=1e-9)
    assert [reward.syllables(word) for word in ("cat", "Computer", "readability")] == [1, 3, 4]
    hard = "Institutional considerations necessitate comprehensive interdisciplinary deliberation."
    assert reward.score(hard) < 0 < reward.score("We went home. It was fun.")
    with pytest.raises(ValueError, match="without words"):
        reward.score("?!")
    with pytest.raises(ValueError, match="xx_YY"):
        Readability("xx_YY")


def test_profanity_counts_words_and_is_minimised():
    pytest.importorskip("glin_profanity")
    reward = Profanity()
    assert reward(["Boil the eggs.", "What the fuck, you sh1t"], ["", ""]).tolist() == [0.0, 2.0]
    assert Rewards([reward])(["What the fuck, you sh1t"]).tolist() == [[-2.0]]
    assert Profanity(extra=["turnip"]).score("You turnip") == 1.0
    assert Profanity(ignore=["fuck"]).score("What the fuck") == 0.0


def test_rouge_is_the_longest_common_subsequence_and_the_best_of_several_references():
    pytest.importorskip("rouge_score")
    references = {"q": "the cat sat on the mat", "several": ["a dog", "the cat sat on the mat"]}
    text = "the cat lay on the mat"  # 5 of 6 words in common, in order
    reward = Rouge(references)
    assert reward.score(text, "q") == pytest.approx(5 / 6)
    assert reward.score(text, "several") == pytest.approx(5 / 6)
    assert Rouge(references, variant="rouge2", measure="recall").score(text, "q") == pytest.approx(3 / 5)
    messages = ({"role": "user", "content": "Describe it"},)
    chat = Rouge({prompt_key(messages): "a b c d"})
    assert Rewards([chat])(["a b x"], [messages]).item() == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    rewards = Rewards([reward])
    assert math.isnan(rewards([text], ["unknown prompt"]).item())
    assert rewards.report.failures == {"rouge": {"ValueError": 1}}


# ---------------------------------------------------------------- other languages

LANGUAGES = {  # text: its words
    "東京タワーは２０２５年に、iPhoneを買う。": 13,  # 東京タワーは, the year, 年に, iPhone, を買う
    "今天天气很好。": 6,
    "々ー〇": 3,
    "สวัสดีครับ น้ำ": 8,  # ส วั ส ดี ค รั บ, น้ำ: marks above and below belong to a consonant
    "नमस्ते दुनिया": 2,
    "مَرْحَبًا بالعالم": 2,  # the same word with and without its short vowels
    "مرحبا بالعالم": 2,
    "می‌روم": 1,
    "안녕하세요 여러분": 2,
    "Привет, мир": 2,
    "été": 1,
    "été": 1,
    "l’été, c’est bien-aimé": 3,
    "😀 😀": 0,
}


@pytest.mark.parametrize("text", LANGUAGES)
def test_words_are_counted_as_their_readers_do(text):
    pytest.importorskip("regex")
    assert len(words_of(text)) == LANGUAGES[text]
    assert Brevity().score(text) == -LANGUAGES[text] and Length(target=2).score(text) == -abs(LANGUAGES[text] - 2)


def test_no_mark_is_left_of_a_text_without_its_letter():
    pytest.importorskip("regex")
    assert words_of("ကျွန်တော်") == ["ကျွ", "န်", "တော်"]
    assert words_of("สวัสดี") == ["ส", "วั", "ส", "ดี"]
    assert words_of("ｶﾞ") == ["ｶﾞ"]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [("今日は晴れ。明日は雨！本当？", 3), ("「行く。」と言った。", 2), ("π は約３．１４である．次に", 2),
     ("真的吗？！好。", 2), ("كيف حالك؟ أنا بخير.", 2), ("यह अच्छा है। वह भी।", 2), ("ነው። ነው።", 2),
     ("Naïve… yes. No", 3)],
)  # fmt: skip
def test_sentences_of_other_languages_are_counted(text, sentences):
    pytest.importorskip("regex")
    assert count_sentences(text) == sentences


def test_a_long_run_of_marks_is_read_in_a_moment():
    """A policy that has come apart answers so; the square of its length would be a minute here."""
    pytest.importorskip("regex")
    start = time.process_time()
    assert count_sentences("!" * 30_000 + "a") == 1
    assert time.process_time() - start < 5.0


@given(st.text(st.characters(max_codepoint=127)) | st.text(" .!?…'’-–“”éÀñß_\n\"()[]ab1"))
def test_words_and_sentences_of_english_are_what_they_were(text):
    """The figures of plain ASCII, and of Latin text with its own quotation marks, must never change."""
    pytest.importorskip("regex")
    word = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
    end = re.compile(r"[.!?…]+(?=\s|$|[\"'”’)\]])|\n\s*\n")
    sentence = re.compile(r".*?[.!?…][\"'”’)\]]*(?=\s|$)", re.DOTALL)
    assert words_of(text) == word.findall(text)
    assert count_sentences(text) == sum(bool(word.search(part)) for part in end.split(text))
    assert list(sentence_ends(text)) == [match.end() for match in sentence.finditer(text)]


# By hand: the longest common subsequence c of a candidate of n and a reference of r characters has precision c / n,
# recall c / r and F = 2 c / (n + r).
@pytest.mark.parametrize(
    ("reference", "text", "common", "n", "r"),
    [
        ("猫がマットの上に座った。", "猫がマットに座っている。", 8, 11, 11),  # 猫がマット and に座っ
        ("今天天气很好", "今天天气不好", 5, 6, 6),
        ("ฉันรักแมว", "ฉันรักหมา", 5, 7, 7),  # ฉั น รั ก แ ม ว and ฉั น รั ก ห ม า
        ("القطة على السجادة", "القطة تحت السجادة", 2, 3, 3),
        ("बिल्ली चटाई पर है", "बिल्ली पर है", 3, 3, 4),
        ("naïve café", "naive café", 1, 2, 2),
        ("été iPhoneを買う", "été iphoneを売る", 3, 5, 5),  # composed or not, capital or small
        ("the cats’ co­operation", "The cat's cooperation", 3, 4, 3),  # the, cat, (s,) cooper; stemmed as ever
    ],
)
def test_rouge_of_other_languages_is_worked_out_by_hand(reference, text, common, n, r):
    pytest.importorskip("rouge_score")
    f = Rouge({"q": reference}).score(text, "q")
    assert f == pytest.approx(2 * common / (n + r))
    assert Rouge({"q": reference}, measure="precision").score(text, "q") == pytest.approx(common / n)
    assert Rouge({"q": reference}, measure="recall").score(text, "q") == pytest.approx(common / r)
    assert Rouge({"q": text}).score(text, "q") == 1.0


@settings(max_examples=50)
@given(st.text("abcdefg's -_.!?\n1 ", max_size=60), st.text("abcdefg's -_.!?\n1 ", max_size=60))
def test_rouge_of_plain_ascii_is_rouge_scores_own(reference, text):
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    for variant in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        for stem in (True, False):
            wanted = rouge_scorer.RougeScorer([variant], use_stemmer=stem).score(reference, text)[variant].fmeasure
            if reference:
                assert Rouge({"q": reference}, variant=variant, stem=stem).score(text, "q") == wanted


def test_a_text_in_another_script_has_no_english_readability():
    pytest.importorskip("pyphen")
    for text in ("今日は晴れです。", "Привет, как дела?"):
        with pytest.raises(ValueError, match="another script than Latin"):
            Readability().score(text)
    assert Readability().score("I like 寿司 very much.") < 121.3  # two characters among four words
    assert math.isfinite(Readability("ru_RU").score("Привет, как дела?"))


def test_a_profane_word_inside_of_another_counts_once():
    pytest.importorskip("glin_profanity")
    assert Profanity(["chinese"]).score("你他妈的") == 1.0  # the list has 他妈, 妈的 and 他妈的
    assert Profanity(["korean"]).score("이 씨발 놈") == 1.0  # and this word twice
    assert Profanity(["chinese"]).score("他妈的，他妈的") == 2.0


def test_half_characters_are_a_failure_like_any_other():
    rewards = Rewards([Brevity(), Counted()])
    result = rewards(["one two", "\ud83d"])
    assert result[0].tolist() == [-2.0, 7.0] and result[1].isnan().all()
    assert rewards.report.failed() == 2 and "holds U+D83D at character 1" in str(rewards.report)
    str(rewards.report).encode()
    with pytest.raises(ValueError, match=r"text 1 holds U\+D83D"):
        Rewards([Brevity()], on_error="raise")(["a", "\ud83d"])


def test_the_demos_sentences_end_in_japanese_too():
    from mopl.alignment._demo_sampling import first_sentence, whole_sentences

    assert first_sentence("はい。今日は晴れです。明日は") == "はい。今日は晴れです。"  # はい is short of three
    assert first_sentence("「行きます。」と言う。") == "「行きます。」"
    assert whole_sentences("今日は晴れです。明日は") == "今日は晴れです。"


# ---------------------------------------------------------------- several at once


def test_rewards_gives_a_column_for_each_with_higher_better():
    longer, shorter = Counted(), FunctionReward(lambda texts, prompts: [len(p) for p in prompts], "p", maximise=False)
    result = Rewards([longer, shorter])(["a", "bbb"], ["xx", "y"])
    assert result.dtype == torch.float32
    assert torch.equal(result, torch.tensor([[1.0, -2.0], [3.0, -1.0]]))
    assert Rewards([longer])([]).shape == (0, 1)


def test_a_text_is_judged_once_for_each_prompt():
    reward = Counted()
    rewards = Rewards([reward])
    texts, prompts = ["a", "bb", "a", "a"], ["p", "p", "p", "q"]
    assert rewards(texts, prompts).flatten().tolist() == [1.0, 2.0, 1.0, 1.0]
    assert reward.asked == [("p", "a"), ("p", "bb"), ("q", "a")]
    assert rewards(texts, prompts).flatten().tolist() == [1.0, 2.0, 1.0, 1.0]
    assert len(reward.asked) == 3 and rewards.report.computed == {"counted": 3} and rewards.report.texts == 8


def test_prompt_and_text_are_not_confused_by_where_one_ends():
    reward = Counted()
    Rewards([reward])(["bc", "c"], ["a", "ab"])
    assert len(reward.asked) == 2


def test_the_cache_is_bounded_and_can_be_switched_off():
    # With room for two, of three texts in turn only the newest two are known: the first is asked again each time,
    # which pushes out another one.
    for size, asked in ((0, 9), (2, 5), (100, 3)):
        reward = Counted()
        rewards = Rewards([reward], cache_size=size)
        for _ in range(3):
            assert rewards(["a", "bb", "ccc"]).flatten().tolist() == [1.0, 2.0, 3.0]
        assert len(reward.asked) == asked
        assert len(rewards._caches[0]) <= size


def test_a_reward_that_is_not_a_function_of_the_text_is_asked_every_time():
    values = iter(range(100))
    reward = FunctionReward(lambda texts, _: [next(values) for _ in texts], "random", cacheable=False)
    rewards = Rewards([reward])
    assert rewards(["a", "a"]).flatten().tolist() == [0.0, 1.0]
    assert rewards(["a"]).flatten().tolist() == [2.0]


def test_texts_are_judged_in_batches():
    sizes = []
    reward = FunctionReward(lambda texts, _: (sizes.append(len(texts)), [0.0] * len(texts))[1], "batched")
    Rewards([reward], batch_size=4)([str(n) for n in range(10)])
    assert sizes == [4, 4, 2]


def test_an_error_costs_one_value_and_is_counted(caplog):
    reward, other = Counted(fails_on=("bb", "dddd")), FunctionReward(lambda t, _: [7.0] * len(t), "other")
    rewards = Rewards([reward, other], batch_size=3)
    with caplog.at_level(logging.WARNING):
        result = rewards(["a", "bb", "ccc", "dddd"])
    assert result[:, 0].isnan().tolist() == [False, True, False, True]
    assert result[0, 0] == 1.0 and result[2, 0] == 3.0 and result[:, 1].tolist() == [7.0] * 4
    assert rewards.report.failures == {"counted": {"RuntimeError": 2}} and rewards.report.failed() == 2
    assert rewards.report.failed("other") == 0
    assert "2 x counted: RuntimeError (cannot judge bb on 'bb'; cannot judge dddd on 'dddd')" in str(rewards.report)
    assert len(caplog.records) == 1, "the first failure of a kind is said, the others are counted"


def test_a_failure_is_not_remembered():
    reward = Counted(fails_on=("bb",))
    rewards = Rewards([reward])
    assert rewards(["bb"]).isnan().all()
    reward.fails_on = ()
    assert rewards(["bb"]).tolist() == [[2.0]]


@pytest.mark.parametrize("maximise", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_missing(bad, maximise):
    reward = FunctionReward(lambda texts, _: [bad if t == "bad" else 1.0 for t in texts], "r", maximise=maximise)
    rewards = Rewards([reward])
    result = rewards(["good", "bad"]).flatten()
    assert result[0] == (1.0 if maximise else -1.0) and result[1].isnan()
    assert rewards.report.failures == {"r": {"not finite": 1}}
    with pytest.raises(ValueError, match="the reward r is"):
        Rewards([reward], on_error="raise")(["good", "bad"])


def test_errors_can_be_raised():
    with pytest.raises(RuntimeError, match="cannot judge bb"):
        Rewards([Counted(fails_on=("bb",))], on_error="raise")(["a", "bb"])


def test_a_reward_of_another_shape_is_a_fault_and_never_isolated():
    class Wide:
        name, maximise = "wide", True

        def __call__(self, texts, prompts):
            return torch.zeros(len(texts), 2)

    with pytest.raises(ValueError, match=r"wide returned \(3, 2\) for 3 texts"):
        Rewards([Wide()])(["a", "b", "c"])


def test_a_missing_package_is_said_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    with pytest.raises(ImportError, match=r"sentiment needs vaderSentiment, .* run: pip install .*\[rewards\]'"):
        Sentiment()


def test_bad_arguments_say_what_to_do():
    with pytest.raises(ValueError, match="different names"):
        Rewards([Counted(), Counted()])
    with pytest.raises(ValueError, match="at least one"):
        Rewards([])
    with pytest.raises(TypeError, match="FunctionReward"):
        Rewards([len])
    with pytest.raises(ValueError, match="2 texts but 1 prompt;"):
        Rewards([Counted()])(["a", "b"], ["p"])
    with pytest.raises(TypeError, match=r"pass \[text\]"):
        Rewards([Counted()])("abc")
    with pytest.raises(ValueError, match="batch_size is 0"):
        Rewards([Counted()], batch_size=0)


# ---------------------------------------------------------------- by name


def test_rewards_are_made_by_name_with_options():
    assert {"sentiment", "brevity", "length", "readability", "profanity", "rouge", "classifier"} <= set(available())
    brevity, length = make_all(["brevity:unit=characters", "length:target=3"])
    assert brevity.score("abc") == -3.0 and length.score("a b") == -1.0
    with pytest.raises(ValueError, match="no reward 'kindness'; choose from sentiment, brevity"):
        make("kindness")
    with pytest.raises(ValueError, match="'target' in 'length:target' is no option"):
        make("length:target")
    with pytest.raises(ValueError, match="the reward length has no option goal; its options are target"):
        make("length:goal=3")


def test_a_reward_of_ones_own_can_be_registered(monkeypatch):
    monkeypatch.setattr(registry, "_MAKERS", dict(registry._MAKERS))
    register("counted", Counted)
    assert isinstance(make("counted"), Counted)
    with pytest.raises(ValueError, match="there is a reward brevity already"):
        register("brevity", Counted)
    with pytest.raises(ValueError, match="without ':'"):
        register("a:b", Counted)


# ---------------------------------------------------------------- a classifier


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A tiny random BERT with three outputs and a tokenizer of words, saved to a directory."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("classifier")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=12, initializer_range=1.0, id2label={0: "bad", 1: "fair", 2: "good"},
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_classifier_is_the_models_output_whatever_the_batch(classifier):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    texts = ["a b", "c", "d e f g h a b c d", "h"]
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    assert logits[:, 2].std() > 0.01
    for activation, expected in (
        ("none", logits[:, 2]),
        ("sigmoid", logits[:, 2].sigmoid()),
        ("softmax", logits.softmax(-1)[:, 2]),
    ):
        reward = ClassifierReward(classifier, label="good", activation=activation, batch_size=3)
        torch.testing.assert_close(reward(texts, [""] * 4), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        ClassifierReward(classifier, label=0)(texts, [""] * 4), logits[:, 0], atol=1e-5, rtol=1e-5
    )


def test_classifier_sees_prompt_and_response_as_a_pair(classifier):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    with torch.no_grad():
        expected = model(**tokenizer("a b", "c d", return_tensors="pt")).logits[0, 1]
    reward = ClassifierReward(classifier, label=1, inputs="pair")
    torch.testing.assert_close(reward(["c d"], ["a b"])[0], expected, atol=1e-5, rtol=1e-5)
    messages = [{"role": "user", "content": "a b"}]
    torch.testing.assert_close(reward(["c d"], [messages])[0], expected, atol=1e-5, rtol=1e-5)


def test_classifier_cuts_texts_that_are_too_long_for_the_model(classifier):
    reward = ClassifierReward(classifier, label=0)
    assert reward.max_length == 12
    long = "a b c d e f g h a b"
    assert reward([long + " a a a", long + " h h h h"], ["", ""]).unique().numel() == 1, "cut to the same 10 words"


def test_classifier_sees_a_conversation_in_the_chat_template_and_keeps_its_end(classifier, tmp_path):
    import shutil

    from transformers import AutoTokenizer

    shutil.copytree(classifier, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    reward = ClassifierReward(tmp_path / "chat", label=0, inputs="chat")
    values = reward(["c", "d", "c"], ["a", "a", "b " * 5 + "a " * 20])
    assert values[0] != values[1]
    endings = reward(["c", "d"], ["a " * 20] * 2)
    assert endings[0] != endings[1], "a long prompt leaves the response in sight"
    with pytest.raises(ValueError, match="no chat template"):
        ClassifierReward(classifier, label=0, inputs="chat")


def test_classifier_asks_which_output(classifier):
    with pytest.raises(ValueError, match="3 outputs; say which as label"):
        ClassifierReward(classifier)
    with pytest.raises(ValueError, match="label is 'great' but the model's outputs are"):
        ClassifierReward(classifier, label="great")
    with pytest.raises(ValueError, match="label is 3"):
        ClassifierReward(classifier, label=3)
    made = make(f"classifier:directory={classifier},label=good,name=goodness")
    assert made.name == "goodness"


def test_functions_in_the_form_of_trl_get_prompts_and_completions_by_name():
    def long(prompts, completions, **_):
        if "bad" in completions:
            raise ValueError("no")
        return [10.0 * len(p) + len(c) if c != "none" else None for p, c in zip(prompts, completions, strict=True)]

    def of_texts(texts, prompts):
        return [10.0 * len(p) + len(t) for t, p in zip(texts, prompts, strict=True)]

    def of_messages(completions, **_):
        return [float(len(c[0]["content"])) if isinstance(c, list) else -1.0 for c in completions]

    given = (["a", "bbb", "bad", "none"], ["p", "qq", "r", "s"])
    rewards = Rewards([FunctionReward(long, "long"), FunctionReward(of_texts, "texts")])
    assert torch.equal(
        rewards(*given).T.nan_to_num(-9), torch.tensor([[11.0, 23.0, -9.0, -9.0], [11.0, 23.0, 13.0, 14.0]])
    )
    chats = [[{"role": "user", "content": "x"}], "x"]
    assert Rewards([FunctionReward(of_messages, "said")])(["four", "text"], chats)[:, 0].tolist() == [4.0, -1.0]

    def of_lists(prompts, completions, **_):  # as TRL has messages, while mopl reads them into tuples
        return [float(isinstance(p, list) and isinstance(c, list)) for p, c in zip(prompts, completions, strict=True)]

    chats = [({"role": "user", "content": "x"},), "x"]
    assert Rewards([FunctionReward(of_lists, "lists")])(["four", "text"], chats)[:, 0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    "function",
    [
        lambda texts, prompts, completions=None: [len(t) if completions is None else -1 for t in texts],
        lambda texts, prompts=None, *, completions=None: [len(t) if completions is None else -1 for t in texts],
        functools.partial(lambda texts, prompts, completions: [len(t) for t in texts], completions=None),
        lambda prompts, completions=None: [len(c) for c in completions],
        lambda completions=None, prompts=None, **_: [len(c) for c in completions],
    ],
)
def test_the_form_of_a_function_is_what_it_needs(function):
    assert Rewards([FunctionReward(function, "length")])(["a", "bcd"], ["prompt", "prompt"]).tolist() == [[1.0], [3.0]]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_module_and_what_a_decorator_keeps_are_called_in_their_own_form(wrapped):
    class Length(torch.nn.Module):
        def forward(self, prompts, completions, **_):
            return [len(completion) for completion in completions]

    class Own(torch.nn.Module):
        def forward(self, texts, prompts):
            return [len(text) for text in texts]

    for module in (Length(), Own()):
        function = torch.no_grad()(module.forward) if wrapped else module
        assert Rewards([FunctionReward(function, "length")])(["a", "bc"], ["prompt", "p"]).tolist() == [[1.0], [2.0]]


def test_a_function_that_takes_anything_is_not_guessed_at():
    def decorated(function):
        return lambda *args, **kwargs: function(*args, **kwargs)

    with pytest.raises(ValueError, match=r"the reward own takes \(\*args, \*\*kwargs\), from which .* functools.wraps"):
        FunctionReward(decorated(lambda prompts, completions: [1.0]), "own")


@pytest.mark.parametrize(
    "function",
    [
        lambda texts: [1.0],
        lambda prompts, texts: [1.0],
        lambda query, response: [1.0],
        lambda prompts, answers: [1.0],
        lambda messages, texts: [1.0],
        lambda completions, answer, **_: [1.0],
    ],
)
def test_functions_of_other_forms_are_refused_and_never_given_one_for_the_other(function):
    with pytest.raises(ValueError, match=r"the reward own takes \(.*must be a function of \(texts, prompts\), in this"):
        FunctionReward(function, "own")


def test_an_async_function_is_refused():
    async def own(texts, prompts):
        return [1.0]

    with pytest.raises(ValueError, match="the reward own is an async function"):
        FunctionReward(own, "own")
