"""Ready rewards on texts: sentiment, length, profanity, readability, ROUGE. All run offline."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from mopl._arguments import check_choice
from mopl.rewards.reward import Prompt, TextReward, prompt_key, require

ROUGE_VARIANTS = ("rouge1", "rouge2", "rouge3", "rougeL", "rougeLsum")
ROUGE_MEASURES = ("fmeasure", "precision", "recall")

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?…]+(?=\s|$|[\"'”’)\]])|\n\s*\n")


def words_of(text: str) -> list[str]:
    """Return the words of a text: letters and digits, with apostrophes and hyphens inside."""
    return _WORD.findall(text)


def count_sentences(text: str) -> int:
    """Return the number of sentences: stretches with words between full stops, question marks and the like."""
    return sum(bool(_WORD.search(part)) for part in _SENTENCE_END.split(text))


class Sentiment(TextReward):
    """VADER's compound sentiment, from -1 (all negative) to 1 (all positive); 0 without any word that has a sentiment.

    A sum over the words of a lexicon, with rules for negation and emphasis (Hutto and Gilbert 2014), so longer friendly
    texts score higher. English.

    Raises:
        ImportError: If vaderSentiment is not installed.
    """

    name = "sentiment"

    def __init__(self) -> None:
        vader = require("vaderSentiment.vaderSentiment", "vaderSentiment", self.name)
        self._analyzer = vader.SentimentIntensityAnalyzer()

    def score(self, text: str, prompt: Prompt = "") -> float:
        """Return the compound score."""
        return self._analyzer.polarity_scores(text)["compound"]


class Brevity(TextReward):
    """Minus the length of a text, in words by default.

    Args:
        unit: `"words"`, `"characters"`, or a function from a text to a number (of tokens, say).
    """

    name = "brevity"

    def __init__(self, unit: Literal["words", "characters"] | Callable[[str], float] = "words") -> None:
        self._count = _counter(unit)

    def score(self, text: str, prompt: Prompt = "") -> float:
        """Return minus the length."""
        return -float(self._count(text))


class Length(TextReward):
    """Minus the distance of a text's length from a target: -|length - target|, in words by default.

    Args:
        target: The length that is best.
        unit: As for `Brevity`.

    Raises:
        ValueError: If the target is negative.
    """

    name = "length"

    def __init__(
        self, target: float = 50.0, unit: Literal["words", "characters"] | Callable[[str], float] = "words"
    ) -> None:
        if isinstance(target, str) or not target >= 0:
            raise ValueError(f"target is {target!r} but must be a number, at least 0")
        self.target, self._count = float(target), _counter(unit)

    def score(self, text: str, prompt: Prompt = "") -> float:
        """Return minus the distance."""
        return -abs(self._count(text) - self.target)


def _counter(unit: str | Callable[[str], float]) -> Callable[[str], float]:
    if callable(unit):
        return unit
    check_choice(unit, ("words", "characters"), "unit")
    return len if unit == "characters" else lambda text: len(words_of(text))


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
        glin = require("glin_profanity", "glin-profanity", self.name)
        self._filter = glin.Filter(
            {"languages": list(languages), "custom_words": list(extra), "ignore_words": list(ignore)}
        )

    def score(self, text: str, prompt: Prompt = "") -> float:
        """Return the number of matches."""
        return float(len(self._filter.check_profanity(text).get("matches") or ()))


class Readability(TextReward):
    """Flesch's reading ease: about 100 for very easy texts, 30 and below for very hard ones.

        206.835 - 1.015 words / sentences - 84.6 syllables / words        (Flesch 1948)

    Syllables are counted by hyphenation points (Pyphen's dictionaries), which needs no download; a word has at least
    one. A hyphenation pattern knows fewer breaks than a dictionary of sounds, so values are a little above those of
    tools that have one. English; the constants differ for other languages.

    Args:
        language: Of the hyphenation dictionary.

    Raises:
        ImportError: If pyphen is not installed.
        ValueError: If there is no such dictionary; from `score`, if a text has no words.
    """

    name = "readability"

    def __init__(self, language: str = "en_US") -> None:
        pyphen = require("pyphen", "pyphen", self.name)
        if pyphen.language_fallback(language) is None:
            raise ValueError(f"language is {language!r} but pyphen has {', '.join(sorted(pyphen.LANGUAGES))}")
        self._hyphenator = pyphen.Pyphen(lang=language)

    def syllables(self, word: str) -> int:
        """Return the number of syllables of a word."""
        return len(self._hyphenator.positions(word.lower())) + 1

    def score(self, text: str, prompt: Prompt = "") -> float:
        """Return the reading ease."""
        words = words_of(text)
        if not words:
            raise ValueError("a text without words has no readability")
        sentences = max(count_sentences(text), 1)
        syllables = sum(self.syllables(word) for word in words)
        return 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words)


class Rouge(TextReward):
    """ROUGE of a text against the reference of its prompt, from 0 to 1; the best of several references.

    Args:
        references: For each prompt its reference, or several. Prompts of chat messages go in as `prompt_key(messages)`.
        variant: `"rouge1"`, `"rouge2"`, `"rouge3"`, `"rougeL"` or `"rougeLsum"` (Lin 2004).
        measure: `"fmeasure"`, `"precision"` or `"recall"`.
        stem: Whether Porter's stemmer makes forms of a word equal.

    Raises:
        ImportError: If rouge-score is not installed.
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
        check_choice(variant, ROUGE_VARIANTS, "variant")
        check_choice(measure, ROUGE_MEASURES, "measure")
        rouge = require("rouge_score.rouge_scorer", "rouge-score", self.name)
        self._scorer = rouge.RougeScorer([variant], use_stemmer=stem)
        self.references, self.variant, self.measure = references, variant, measure

    def score(self, text: str, prompt: Prompt = "") -> float:
        """Return the measure against the prompt's reference."""
        reference = self.references.get(prompt_key(prompt))
        if not reference:
            raise ValueError(f"there is no reference for the prompt {prompt_key(prompt)[:60]!r}")
        references = [reference] if isinstance(reference, str) else reference
        return max(getattr(self._scorer.score(r, text)[self.variant], self.measure) for r in references)
