"""Whether Triton's interpreter works with the NumPy at hand."""

from importlib.metadata import PackageNotFoundError, version


def numbers(package: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in version(package).split(".")[:2])
    except PackageNotFoundError:  # an import says so
        return (9999,)


# Before Triton 3.7 the interpreter makes a number of an array of one entry, as NumPy 2.4 no longer does.
BROKEN = numbers("triton") < (3, 7) and numbers("numpy") >= (2, 4)
REASON = "Triton's interpreter before 3.7 does not run loops with NumPy 2.4 or later"
