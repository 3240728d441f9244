"""Which packages and files there are, and README.md as a package index shows it; all else is in pyproject.toml.

`mopl/kernels` is a link to `kernels/`, which must not hold an `__init__.py`: with one, Python at the root of a clone
would find it in place of Hugging Face's package `kernels`. One root for all packages lets setuptools put that root on
the path of an editable install; its other way, a finder behind all paths, loses to a folder named `mopl` (a clone, seen
from the folder above). See tests/package/test_install.py.
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).resolve().parent
CODE = re.compile(r"(^```.*?^```[^\n]*$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
TARGET = r"(?!\w+:|#|/)(?P<path>[^)\"'\s]+)"  # a relative one
PICTURE = re.compile(rf"(?P<before>!\[[^\]]*\]\(|<img\b[^>]*?\bsrc=[\"']|<source\b[^>]*?\bsrcset=[\"']){TARGET}")
LINK = re.compile(rf"(?P<before>\]\(|<a\b[^>]*?\bhref=[\"']|^\[[^\]]+\]: +){TARGET}", re.MULTILINE)


def value_in(file: str, name: str) -> str:
    """Return the string that a line `name = "..."` of a file gives."""
    (value,) = re.findall(rf'^{name} = "(.*?)"', (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    return value


def described(readme: str, source: str, version: str) -> str:
    """Return README.md with its relative links and pictures as addresses of this version of the sources."""

    def absolute(text: str) -> str:
        text = PICTURE.sub(rf"\g<before>{source}/raw/v{version}/\g<path>", text)
        return LINK.sub(rf"\g<before>{source}/blob/v{version}/\g<path>", text)

    # A bracket before a parenthesis is a link in text, and a call in code. A link's text may hold code, so code is put
    # back only after links were looked for.
    code = CODE.findall(readme)
    parts = iter(code)
    return re.sub("\0", lambda _: next(parts), absolute(CODE.sub("\0", readme)))


if __name__ == "__main__":
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    setup(
        packages=find_namespace_packages(include=["mopl", "mopl.*"], exclude=["*.__pycache__"]),
        package_dir={"": "."},
        package_data={
            "mopl": ["py.typed"],
            "mopl._page": ["look.css", "controls.js"],
            "mopl.language_models": ["demo_prompts.json"],
            "mopl.report": ["page.html", "page.css", "*.js"],
            "mopl.serving": ["page.html", "page.css", "page.js"],
        },
        long_description=described(
            readme, value_in("pyproject.toml", "Source"), value_in("mopl/__init__.py", "__version__")
        ),
        long_description_content_type="text/markdown",
    )
