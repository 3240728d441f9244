r"""Words and sentences of a text in any language, as its readers count them.

A *word* is a run of letters and digits, with apostrophes and hyphens inside ("well-known" is one). Marks stay with the
letter that they belong to: accents, vowel signs of Hindi and Arabic, joiners of Persian.

Scripts that put no spaces between words are counted by *characters*, each with its marks: Chinese and Japanese, whose
readers count so, and Thai, Lao, Khmer and Burmese, whose words only a dictionary finds. Which these are is a property
of Unicode and no list of ours: Han, Hiragana, Katakana and Bopomofo, and what UAX #14 (line breaking) calls complex
context. What UAX #29 (text segmentation) says of words agrees: it breaks Han and Hiragana at each character and leaves
complex context to dictionaries. Multilingual ROUGE (Hasan et al., XL-Sum, 2021) counts Chinese by characters, too; for
Japanese and Thai it asks a segmenter, so its figures there are others. Korean has spaces and is counted by them.

A *sentence* ends at `.`, `!`, `?` or `…` before white space or a quotation mark, and at every other mark that Unicode
calls a sentence terminal (`。`, `؟`, `।`, ...), which needs no space behind it.

In plain ASCII these are the words and sentences of `[A-Za-z0-9]` and `.!?` alone. Imports nothing but the standard
library until a text is read.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator
from typing import Any

from mopl._extras import require

_SPACELESS = (
    r"[[\p{L}\p{N}]&&[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{scx=Bopomofo}\p{Line_Break=Complex_Context}]]"
)
# An extended grapheme cluster (UAX #29), and marks that one does not reach, as some of Burmese.
_CHARACTER = rf"(?={_SPACELESS})\X\p{{M}}*"
_LETTERS = rf"(?:[[\p{{L}}\p{{N}}]--{_SPACELESS}][\p{{M}}\u200c\u200d\u00ad]*)+"
_CLOSED = r"[\"'”’)\]」』】）》]"
_OTHER_END = r"(?:[\p{Sentence_Terminal}--[.!?．]]|．(?!\d))+"
# Begun at the first of a run and never given back: a model that answers "!!!!..." would take a time quadratic in it.
_ENDS = rf"(?<![.!?…])[.!?…]++(?=\s|$|[\"'”’)\]])|{_OTHER_END}"


@functools.cache
def _pattern(text: str) -> Any:
    require("regex", what="counting words")
    import regex

    return regex.compile(rf"(?V1)(?s){text}")


def words_of(text: str) -> list[str]:
    """Return the words of a text; see the module's text."""
    return _pattern(rf"{_CHARACTER}|{_LETTERS}(?:['’\-׳״·]{_LETTERS})*").findall(text)


def tokens_of(text: str) -> list[str]:
    """Return the words of a text to compare with another's: lower case, composed (NFC), cut at apostrophes and hyphens.

    In plain ASCII they are those of the ROUGE of Lin (2004), before stemming.
    """
    plain = unicodedata.normalize("NFC", text.lower()).replace("\u00ad", "")  # soft hyphens show at ends of lines only
    return _pattern(rf"{_CHARACTER}|{_LETTERS}").findall(plain)


def count_sentences(text: str) -> int:
    """Return the number of sentences: stretches with words between full stops, question marks and the like."""
    word = _pattern(r"[\p{L}\p{N}]")
    return sum(bool(word.search(part)) for part in _pattern(rf"{_ENDS}|\n\s*\n").split(text))


def sentence_ends(text: str) -> Iterator[int]:
    """Yield where the sentences of a text end, with their closing quotation marks and brackets."""
    end = rf"[.!?…][\"'”’)\]]*(?=\s|$)|{_OTHER_END}{_CLOSED}*"
    return (match.end() for match in _pattern(rf".*?(?:{end})").finditer(text))


def last_boundary(text: str, following: tuple[str, ...]) -> int:
    """Return the last place in a text of a script without spaces where a word ends, whatever follows; 0 if none does.

    What comes `following` in each of its continuations may begin with a mark, which belongs to the last character.
    """
    marked = any(unicodedata.category(after[0]).startswith("M") for after in following if after)
    ends = [match.end() for match in _pattern(_CHARACTER).finditer(text)]
    return max((end for end in ends if end < len(text) or not marked), default=0)


def is_foreign_to_latin(words: list[str]) -> bool:
    """Return whether most words have a letter of another script than Latin."""
    other = _pattern(r"[\p{L}--\p{Latin}]")
    return 2 * sum(bool(other.search(word)) for word in words) > len(words)
