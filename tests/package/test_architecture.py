"""The drawing in docs/architecture.md is the house as it is: its arrows are the imports, and none runs up."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "mopl").rglob("*.py"))
    if "kernels" not in path.parts
} | {f"mopl.kernels.{path.stem}": path for path in sorted((ROOT / "kernels").glob("*.py"))}  # a link inside mopl


def imported(path):
    """Yield the line and the full name of everything that a file imports from mopl, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{each.name}" for each in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.startswith("mopl."))


def room(name):
    """Return the package or module directly inside mopl that a full name is in."""
    return name.split(".")[1] if "." in name else ""


def arrows_of_imports():
    """Return for each room those that it imports; what begins with an underscore is everybody's."""
    found = {}
    for module, path in MODULES.items():
        if (own := room(module)) and not own.startswith("_"):
            others = {room(name) for _, name in imported(path)} - {own}
            found.setdefault(own, set()).update(other for other in others if not other.startswith("_"))
    return found


def drawn_arrows():
    """Return the arrows of the drawing, from its first line to its last."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (drawing,) = re.findall(r"^## Arrows\n.*?^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    rows = (line.partition("→") for line in drawing.splitlines())
    return {name.strip(): set(others.split()) for name, _, others in rows}


def test_the_arrows_of_the_drawing_are_the_imports():
    drawn, found = drawn_arrows(), arrows_of_imports()
    assert drawn.keys() == found.keys()
    assert drawn == found


def test_no_arrow_runs_up():
    names = list(drawn_arrows())
    up = [f"{name} → {other}" for name, others in drawn_arrows().items() for other in others
          if names.index(other) <= names.index(name)]  # fmt: skip
    assert not up


def files_of(node):
    """Yield the modules that a file needs, inside functions too, but not what only type checkers read."""
    for part in ast.iter_child_nodes(node):
        if isinstance(part, ast.If) and "TYPE_CHECKING" in ast.unparse(part.test):
            continue
        names = []
        if isinstance(part, ast.Import):
            names = [each.name for each in part.names]
        elif isinstance(part, ast.ImportFrom) and part.module:
            full = [f"{part.module}.{each.name}" for each in part.names]
            names = [name if name in MODULES else part.module for name in full]
        yield from (name for name in names if name in MODULES)
        yield from files_of(part)


def test_no_files_import_in_a_circle():
    needs = {name: set(files_of(ast.parse(path.read_text(encoding="utf-8")))) for name, path in MODULES.items()}
    # What needs no other file, or is needed by none, is in no circle; and so on without these.
    while free := [
        name for name in needs if not needs[name] & needs.keys() or not any(name in n for n in needs.values())
    ]:
        for name in free:
            del needs[name]
    assert not needs, f"these files import in a circle: {', '.join(sorted(needs))}"


def test_the_foundations_import_nothing_of_the_house():
    for module, path in MODULES.items():
        if room(module).startswith("_") and module != "mopl.__main__":
            above = [name for _, name in imported(path) if not room(name).startswith("_")]
            assert not above, f"{module} imports {above}"


def test_no_private_name_crosses_a_wall():
    for module, path in MODULES.items():
        for line, name in imported(path):
            private = any(part.startswith("_") and part[:2] != "__" for part in name.split(".")[2:])
            assert room(name) == room(module) or not private, f"{path}:{line} imports {name}"


def test_no_public_text_sends_its_reader_to_a_private_name():
    public = {name: path for name, path in MODULES.items() if "._" not in name}
    named = re.compile(r"`mopl(?:\.\w+)*\._\w+")
    assert {name: found for name, path in public.items() if (found := named.findall(path.read_text("utf-8")))} == {}


def test_no_file_is_longer_than_can_be_read_in_one_sitting():
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES.values()}
    assert not {str(path): lines for path, lines in lengths.items() if lines > 400}
