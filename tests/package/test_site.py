"""The documentation site shows everything public, and what the project says of itself is the same everywhere."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import yaml

import mopl

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "reference"
WITHOUT_PAGE = {"cli", "commands", "kernels"}  # the command line has a page of its own; kernels are not called
SHOWN = {target for page in PAGES.glob("*.md") for target in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)}


def test_no_docstring_holds_markup_that_the_site_does_not_know():
    """The site is Markdown: TeX and roles of Sphinx would be shown as they stand, their underscores as italics."""
    known = re.compile(r"^\s*\.\. \w+::|:(math|func|class|meth|mod|attr|ref|py:\w+):`", re.MULTILINE)
    found = {str(file.relative_to(ROOT)) for file in (ROOT / "mopl").rglob("*.py") if known.search(file.read_text())}
    assert not found


def loaded(path):
    spec = importlib.util.spec_from_file_location(f"_{path.stem}_of_site", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exported(file):
    """Return the names in `__all__` of a file, read without importing what it needs; a starred part is a constant."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    values = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    names = []
    for part in values["__all__"].elts if "__all__" in values else ():
        names += ast.literal_eval(values[part.value.id]) if isinstance(part, ast.Starred) else [part.value]
    return names


def has_function_of_its_name(name):
    """Whether a name is that of a module, or package, with a function or class of the same name."""
    base = ROOT.joinpath(*name.split("."))
    files = [file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()]
    return any(re.search(rf"\b(?:def|class|import) .*\b{base.name}\b", file.read_text()) for file in files)


@pytest.mark.parametrize("name", sorted(set(mopl._SUBMODULES) - WITHOUT_PAGE))
def test_the_reference_shows_every_public_name(name):
    folder = ROOT / "mopl" / name
    if not folder.is_dir():
        assert f"mopl.{name}" in SHOWN
        return
    files = {folder / "__init__.py": f"mopl.{name}"}
    if name == "integrations":
        files |= {file: f"mopl.{name}.{file.stem}" for file in folder.glob("[!_]*.py")}
    wanted = {f"{module}.{each}" for file, module in files.items() for each in exported(file)} - set(files.values())
    for each in ("patch_trl", "unpatch_trl"):  # functions of `mopl.integrations` that one of its modules has
        if f"mopl.integrations.{each}" in wanted:
            wanted = wanted - {f"mopl.integrations.{each}"} | {f"mopl.integrations.trl_heads.{each}"}
    # Where a function is in a module of its name, static analysis finds the module under the short name.
    hidden = {each for each in wanted if has_function_of_its_name(each)}
    assert not {f"{each}.{each.rpartition('.')[2]}" if each in hidden else each for each in wanted} - SHOWN
    assert any(each.startswith(f"mopl.{name}.") for each in SHOWN)


def test_the_page_of_the_command_line_is_that_of_the_parser():
    maker = loaded(ROOT / "docs" / "make_command_line.py")
    assert maker.PAGE.read_text(encoding="utf-8") == maker.page(), "run python docs/make_command_line.py"


def test_addresses_and_versions_are_the_same_everywhere():
    setup = loaded(ROOT / "setup.py")
    source, site = (setup.value_in("pyproject.toml", name) for name in ("Source", "Documentation"))
    mkdocs = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert f"\nsite_url: {site} " in mkdocs and f"\nrepo_url: {source}\n" in mkdocs
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["repository-code"], citation["url"]) == (source, site)
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, date = re.findall(r"^## \[(\d.*?)\] - ([\d-]+)$", changes, re.MULTILINE)[0]
    assert mopl.__version__ == citation["version"] == version == setup.value_in("mopl/__init__.py", "__version__")
    assert citation["date-released"] == date
    assert f"\n[{version}]: {source}/" in changes


def test_the_description_on_a_package_index_has_absolute_links_alone():
    setup = loaded(ROOT / "setup.py")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = setup.described(readme, "https://host/mopl", "1.2")
    bare = setup.CODE.sub("", text)
    for target in re.findall(r"\]\(([^)\s]+)|(?:src|href|srcset)=\"([^\"]+)\"", bare):
        target = "".join(target)
        assert re.match(r"https?://|#|mailto:", target), target
        if target.startswith("https://host/mopl/"):
            kind, path = re.fullmatch(r"https://host/mopl/(blob|raw)/v1\.2/([^#]+).*", target).groups()
            assert (ROOT / path).exists(), path
            assert (kind == "raw") == path.endswith((".png", ".svg", ".jpg", ".gif")), target
    assert setup.CODE.findall(text) == setup.CODE.findall(readme)


@pytest.mark.parametrize(
    "given, wanted",
    [
        ("[a](docs/a.md#b)", "[a](S/blob/v1/docs/a.md#b)"),
        ("![a](docs/a.png)", "![a](S/raw/v1/docs/a.png)"),
        ("[![a](docs/a.png)](docs/a.md)", "[![a](S/raw/v1/docs/a.png)](S/blob/v1/docs/a.md)"),
        ('<img alt="" src="a.png"><a href="b">', '<img alt="" src="S/raw/v1/a.png"><a href="S/blob/v1/b">'),
        ('<source media="x" srcset="a.png">', '<source media="x" srcset="S/raw/v1/a.png">'),
        ("[`a[0](b)`](c.md)", "[`a[0](b)`](S/blob/v1/c.md)"),
        ("[a]: b.md", "[a]: S/blob/v1/b.md"),
        ("[a](https://b.c) [d](#e) `f[0](g)`", "[a](https://b.c) [d](#e) `f[0](g)`"),
        ("```python\nf[0](g)\n```\n[a](b)", "```python\nf[0](g)\n```\n[a](S/blob/v1/b)"),
    ],
)  # fmt: skip
def test_a_relative_link_becomes_an_address_of_this_version(given, wanted):
    assert loaded(ROOT / "setup.py").described(given, "https://S", "1") == wanted.replace("S/", "https://S/")


def test_links_out_of_the_site_lead_to_the_sources():
    hooks = loaded(ROOT / "docs" / "hooks.py")

    class Files(dict):
        get_file_from_path = dict.get

    class Page:
        class file:
            src_uri = "how_to/a.md"

    files = Files({"settings.md": 1, "contributing.md": 1})
    text = "[a](../../examples/) [b](../../setup.py#x) [c](../settings.md#y) [d](../../CONTRIBUTING.md) [e](../none.md)"
    turned = hooks.on_page_markdown(text, Page, {"repo_url": "S"}, files)
    assert turned == "[a](S/tree/main/examples) [b](S/blob/main/setup.py#x) [c](../settings.md#y) " \
        "[d](../contributing.md) [e](../none.md)"  # fmt: skip
    Page.file.src_uri = "contributing.md"
    assert hooks.on_page_markdown("[a](docs/settings.md) [b](setup.py)", Page, {"repo_url": "S"}, files) == (
        "[a](settings.md) [b](S/blob/main/setup.py)"
    )
