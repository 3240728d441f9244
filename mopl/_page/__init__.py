"""What the pages with sliders have in common: `look.css` and `controls.js`, in front of each page's own parts.

The report embeds them in its one file, and `mopl serve` sends them. A page's own parts are `page.html`, `page.css` and
`page.js` in the package that makes the page.
"""

from importlib import resources


def page_html(package: str) -> str:
    """Return the page of a package as it is written, with its placeholders."""
    return _text(package, "page.html")


def page_style(package: str) -> str:
    """Return the style sheet of a package's page: the common look, then what is the page's own."""
    return _text(__name__, "look.css") + _text(package, "page.css")


def page_script(package: str, *parts: str) -> str:
    """Return the script of a package's page behind the common controls, `controls`, and files of parts of its own."""
    return _text(__name__, "controls.js") + "".join(_text(package, name) for name in (*parts, "page.js"))


def _text(package: str, name: str) -> str:
    return (resources.files(package) / name).read_text(encoding="utf-8")
