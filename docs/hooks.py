"""What MkDocs does with files outside docs/: two are pages of the site, and links to the others lead to the sources."""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}  # in the repository, on the site
PICTURE = re.compile(  # for light and for dark, as GitHub reads them
    r'<picture><source media="\(prefers-color-scheme: dark\)" srcset="(?P<dark>[^"]+)">'
    r'<img alt="(?P<alt>[^"]*)" src="(?P<light>[^"]+)" width="(?P<width>\d+)"></picture>'
)
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?(?=[)\s])")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that stand at the root of the repository."""
    from mkdocs.structure.files import File  # only here: a test reads links without MkDocs

    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links to files of the repository that are no files of the site into links to the sources.

    A picture with a dark twin follows the site's own switch between light and dark, which the system's may differ from.
    """
    markdown = PICTURE.sub(
        r"![\g<alt>](\g<light>#only-light){ width=\g<width> }"
        r"![\g<alt>](\g<dark>#only-dark){ width=\g<width> }",
        markdown,
    )
    at = page.file.src_uri
    folder = "" if at in PAGES.values() else posixpath.join("docs", posixpath.dirname(at))

    def turned(match: re.Match[str]) -> str:
        path, anchor = posixpath.normpath(posixpath.join(folder, match["path"])), match["anchor"] or ""
        if path.startswith("docs/") and path != "docs":
            inside = path.removeprefix("docs/")
        else:
            inside = PAGES.get(path, "")
        if inside and files.get_file_from_path(inside):
            return posixpath.relpath(inside, posixpath.dirname(at) or ".") + anchor
        if path.startswith("..") or not (ROOT / path).exists():
            return match[0]  # MkDocs says that nothing is there
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{config['repo_url']}/{kind}/main/{path}{anchor}"

    return LINK.sub(turned, markdown)
