"""Numbers of things in messages: "1 entry", "2 entries", "there is 1 list"."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 entry", "3 entries", "0 held-out prompts".

    Args:
        number: How many there are.
        noun: One of them, a regular noun; words in front of it stay as they are.
    """
    if number == 1:
        return f"1 {noun}"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{number} {noun[:-1]}ies"
    return f"{number} {noun}{'es' if noun.endswith(('s', 'x', 'ch', 'sh')) else 's'}"


def there_are(number: int, noun: str) -> str:
    """Return "there is 1 list", "there are 2 lists"; arguments as in `counted`."""
    return f"there {'is' if number == 1 else 'are'} {counted(number, noun)}"
