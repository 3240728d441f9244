"""The page at GET /: a person talks to the model and moves the trade-off.

It is a client of the paths below /v1 like any other, from `page.html`, `page.css` and `page.js` beside this file and
what all pages share (`mopl/_page`). What the model writes, what objectives are called and what the address says become
text, never HTML: the policy below has the browser refuse everything else, also from a mistake in the script.
"""

from __future__ import annotations

from mopl._page import page_html, page_script, page_style

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}
_PARTS = {
    "/": (page_html, "text/html"),
    "/page.css": (page_style, "text/css"),
    "/page.js": (page_script, "text/javascript"),
}
PATHS = tuple(_PARTS)


def page_part(path: str) -> tuple[str, str]:
    """Return what stands at one of `PATHS`, and its media type."""
    read, kind = _PARTS[path]
    return read("mopl.serving"), kind
