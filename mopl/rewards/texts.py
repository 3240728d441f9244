"""Ready rewards on texts: sentiment, length, profanity, readability, ROUGE. All run offline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from mopl._arguments import check_choice
from mopl._extras import require
from mopl._words import count_sentences, is_foreign_to_latin, tokens_of, words_of
from mopl.rewards.reward import Prompt, TextReward, prompt_key


class Sentiment(TextReward):
    """VADER's compound sentiment, from -1 (all negative) to 1 (all positive); 0 without any word that has a sentiment.

    A sum over the words of a lexicon, with rules for negation and emphasis (Hutto and Gilbert 2014), so longer friendly
    texts score higher. English.

    Raises:
        ImportError: If vaderSentiment is not installed.
    """

    name = "sentiment"

    def __init__(self) -> None:
        require("vaderSentiment", what=f"the reward {self.name}")
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self._analyzer = SentimentIntensityAnalyzer()

    def score(self, text: str, prompt: Prompt = "") -> float:
        """Return the compound score."""
        return self._analyzer.polarity_scores(text)["compound"]


class Brevity(TextReward):
    """Minus the length of a text, in words by default.

    Args:
        unit: `"words"`, where languages without spaces are counted by characters; `"characters"`,
            code points of Unicode; or a function from a text to a number (of tokens, say).

    Raises:
        ImportError: If words are counted and regex is not installed.
    """

    name = "brevity"

    def __init__(self, unit: Literal["words", "characters"] | Callable[[str], float] = "words") -> None:
        self._count = _counter(unit, self.name)

    def score(self, text: str, prompt: Prompt = "") -> float:
        """Return minus the length."""
        return -float(self._count(text))


class Length(TextReward):
    """Minus the distance of a text's length from a target: -|length - target|, in words by default.

    Args:
        target: The length that is best.
        unit: As for `Brevity`.

    Raises:
        ImportError: If words are counted and regex is not installed.
        ValueError: If the target is negative.
    """

    name = "length"

    def __init__(
        self, target: float = 50.0, unit: Literal["words", "characters"] | Callable[[str], float] = "words"
    ) -> None:
        if isinstance(target, str) or not target >= 0:
            raise ValueError(f"target is {target!r} but must be a number, at least 0")
        self.target, self._count = float(target), _counter(unit, self.name)

    def score(self, text: str, prompt: Prompt = "") -> float:
        """Return minus the distance."""
        return -abs(self._count(text) - self.target)


def _counter(unit: str | Callable[[str], float], reward: str) -> Callable[[str], float]:
    if callable(unit):
        return unit
    check_choice(unit, ("words", "characters"), "unit")
    if unit == "characters":
        return len
    require("regex", what=f"the reward {reward}")
    return lambda text: len(words_of(text))


class Profanity(TextReward):
    """The number of profane words, to be minimised: found in a list of words, disguised spellings included.

    Args:
        languages: Whose lists are used, by their English names.
        extra: More words that count.
        ignore: Words that do not count.

    Raises:
        ImportError: If glin-profanity is not installed.
    """

    name = "profanity"
    maximise = False

    def __init__(
        self, languages: Sequence[str] = ("english",), *, extra: Sequence[str] = (), ignore: Sequence[str] = ()
    ) -> None:
        require("glin_profanity", what=f"the reward {self.name}")
        from glin_profanity import Filter

        config: Any = {"languages": list(languages), "custom_words": list(extra), "ignore_words": list(ignore)}
        self._filter = Filter(config)

    def score(self, text: str, prompt: Prompt = "") -> float:
        """Return the number of matches."""
        return float(_count_matches(self._filter.check_profanity(text).get("matches") or ()))


def _count_matches(matches: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of words found: outside of ASCII one that lies in another, or is listed twice, counts once.

    Lists of languages without spaces hold words, their parts and phrases with them, and all of them match.
    """
    count = sum(match["word"].isascii() for match in matches)
    spans = sorted((m["index"], m["index"] + len(m["word"])) for m in matches if not m["word"].isascii())
    end = -1
    for first, last in spans:
        count += first >= end
        end = max(end, last)
    return count


class Readability(TextReward):
    """Flesch's reading ease: about 100 for very easy texts, 30 and below for very hard ones.

        206.835 - 1.015 words / sentences - 84.6 syllables / words        (Flesch 1948)

    Syllables are counted by hyphenation points (Pyphen's dictionaries), which needs no download; a word has at least
    one. A hyphenation pattern knows fewer breaks than a dictionary of sounds, so values are a little above those of
    tools that have one. English; the constants differ for other languages, and other scripts have no reading ease.

    Args:
        language: Of the hyphenation dictionary.

    Raises:
        ImportError: If pyphen or regex is not installed.
        ValueError: If there is no such dictionary; from `score`, if a text has no words, or under English most of them
            are in another script than Latin.
    """

    name = "readability"

    def __init__(self, language: str = "en_US") -> None:
        require("pyphen", "regex", what=f"the reward {self.name}")
        import pyphen

        if pyphen.language_fallback(language) is None:
            raise ValueError(f"language is {language!r} but pyphen has {', '.join(sorted(pyphen.LANGUAGES))}")
        self._hyphenator, self._english = pyphen.Pyphen(lang=language), language.lower().startswith("en")

    def syllables(self, word: str) -> int:
        """Return the number of syllables of a word."""
        return len(self._hyphenator.positions(word.lower())) + 1

    def score(self, text: str, prompt: Prompt = "") -> float:
        """Return the reading ease."""
        words = words_of(text)
        if not words:
            raise ValueError("a text without words has no readability")
        if self._english and is_foreign_to_latin(words):
            # Its words would all have one syllable, and so it would seem very easy.
            raise ValueError("a text in another script than Latin has no readability in English")
        sentences = max(count_sentences(text), 1)
        syllables = sum(self.syllables(word) for word in words)
        return 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words)


class Rouge(TextReward):
    """ROUGE of a text against the reference of its prompt, from 0 to 1; the best of several references.

    Plain ASCII is cut into words, and stemmed, by rouge-score itself. Its tokenizer drops every other letter, so that
    other texts are cut as Unicode says: whole words with their accents, and characters where a script has no
    spaces. Only what is plain ASCII of them is stemmed: the stemmer is English.

    Args:
        references: For each prompt its reference, or several. Prompts of chat messages go in as `prompt_key(messages)`.
        variant: `"rouge1"`, `"rouge2"`, `"rouge3"`, `"rougeL"` or `"rougeLsum"` (Lin 2004).
        measure: `"fmeasure"`, `"precision"` or `"recall"`.
        stem: Whether Porter's stemmer makes forms of a word equal.

    Raises:
        ImportError: If rouge-score or regex is not installed.
        ValueError: If a choice is unknown; from `score`, if a prompt has no reference.
    """

    name = "rouge"

    def __init__(
        self,
        references: Mapping[str, str | Sequence[str]],
        *,
        variant: str = "rougeL",
        measure: Literal["fmeasure", "precision", "recall"] = "fmeasure",
        stem: bool = True,
    ) -> None:
        check_choice(variant, ("rouge1", "rouge2", "rouge3", "rougeL", "rougeLsum"), "variant")
        check_choice(measure, ("fmeasure", "precision", "recall"), "measure")
        require("rouge_score", "regex", what=f"the reward {self.name}")
        from rouge_score.rouge_scorer import RougeScorer

        self._scorer = RougeScorer([variant], tokenizer=_Tokenizer(stem))
        self.references, self.variant, self.measure = references, variant, measure

    def score(self, text: str, prompt: Prompt = "") -> float:
        """Return the measure against the prompt's reference."""
        reference = self.references.get(prompt_key(prompt))
        if not reference:
            raise ValueError(f"there is no reference for the prompt {prompt_key(prompt)[:60]!r}")
        references = [reference] if isinstance(reference, str) else reference
        return max(getattr(self._scorer.score(r, text)[self.variant], self.measure) for r in references)


class _Tokenizer:
    """Cuts texts for rouge-score, which asks for nothing but `tokenize`."""

    def __init__(self, stem: bool) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._of_ascii = DefaultTokenizer(use_stemmer=stem)

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of a text."""
        if text.isascii():
            return self._of_ascii.tokenize(text)
        return [part for token in tokens_of(text) for part in self._stemmed(token)]

    def _stemmed(self, token: str) -> list[str]:
        return self._of_ascii.tokenize(token) if token.isascii() else [token]
