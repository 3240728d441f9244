"""Compares what a block of Python prints with the block of text below it."""

import re
from itertools import zip_longest

NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d*)?(?:[eE][-+]?\d+)?")
DIGITS = 6  # beyond these, the last digits are those of the machine


def is_same_number(shown: str, printed: str) -> bool:
    """Say whether a number of the page is the one that was printed, to one unit of its last digit."""
    if shown == printed:
        return True
    decimals = [len(each.partition(".")[2].lower().partition("e")[0]) for each in (shown, printed)]
    if "." not in shown or (decimals[0] != decimals[1] and min(decimals) < DIGITS):
        return False
    wanted, found = (float(each.replace(",", "")) for each in (shown, printed))
    unit = 10.0 ** (int(shown.lower().partition("e")[2] or 0) - decimals[0])
    return abs(wanted - found) <= max(1.01 * unit, 10.0**-DIGITS * abs(wanted))


def is_same_line(shown: str, printed: str) -> bool:
    """Say whether a line of the page is the one that was printed, but for blanks and the last digits of numbers."""
    texts = [[re.sub(r"\s+", " ", part).strip() for part in NUMBER.split(line.strip())] for line in (shown, printed)]
    numbers = zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=False)  # as many, where the texts are the same
    return texts[0] == texts[1] and all(is_same_number(*pair) for pair in numbers)


def differences(shown: str, printed: str) -> str:
    """Return the first line of the page that was not printed so, or nothing."""
    for one, other in zip_longest(shown.strip().splitlines(), printed.strip().splitlines()):
        if one is None or other is None or not is_same_line(one, other):
            return f"the page shows {one!r}\nbut it prints   {other!r}"
    return ""
