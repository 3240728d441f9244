"""Optional packages: what is missing is named with the command that installs it, before anything is read or written."""

import ast
import re
import sys
from pathlib import Path

import pytest

from mopl._extras import COMMANDS, EXTRAS, NO_EXTRA, PACKAGES, install, require, require_for
from mopl.alignment import AlignConfig, align
from mopl.cli import main
from mopl.clp import ClpConfig, train_policies
from mopl.ranking import RankConfig, rank

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).resolve().parents[2]
# Packages that mopl or torch always bring, and Triton, which kernels ask for in a way of their own.
ALWAYS = {"torch", "numpy", "msgspec", "triton", "mopl", "jinja2", "filelock", "yaml"}
COMMAND_LINES = {
    "rank": ["rank", "--run", "new"],
    "steer": ["steer", "nowhere", "--weights", "1"],
    "report": ["report", "nowhere"],
    "align": ["align", "--model", "nowhere", "--data", "nowhere.jsonl", "--run", "new"],
    "clp": ["clp", "--model", "nowhere", "--data", "nowhere.txt", "--rewards", "brevity", "--run", "new"],
    "generate": ["generate", "nowhere", "--weights", "1", "hello"],
    "export": ["export", "nowhere", "--weights", "1", "new"],
    "serve": ["serve", "nowhere"],
}


def requirements(name):
    """Return the names of packages that an extra of pyproject.toml brings, with those of the extras in it."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    found = set()
    for text in listed[name]:
        package, extras = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", text).groups()
        found |= {package} if package != "mopl" else set().union(*map(requirements, extras.split(",")))
    return found


def test_the_table_of_extras_is_that_of_pyproject():
    for name, modules in EXTRAS.items():
        named = {PACKAGES.get(module, module) for module in modules}
        assert named - {"tokenizers", "huggingface-hub"} == requirements(name)  # they come with transformers
    assert COMMAND_LINES.keys() == COMMANDS.keys()
    for extra, modules in COMMANDS.values():
        assert set(modules) <= set(EXTRAS[extra])


def imports(tree):
    """Yield (module, line) of every import that runs, wherever it stands."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module, node.lineno
        yield from imports(node)


def asked_for(tree):
    """Return the modules that a file asks for."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (function := getattr(node.func, "id", "")) in ("require", "require_for"):
            for name in (each.value for each in ast.walk(node) if isinstance(each, ast.Constant)):
                found |= set(COMMANDS[name][1]) if function == "require_for" and name in COMMANDS else {name}
    return found


def test_a_file_with_an_optional_import_asks_for_the_extra():
    optional = {module for modules in EXTRAS.values() for module in modules} | set(NO_EXTRA)
    for path in sorted((ROOT / "mopl").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        asked = asked_for(tree)
        for name, line in imports(tree):
            module = name.split(".")[0]
            assert module in optional | ALWAYS | sys.stdlib_module_names, f"{path}:{line}: which extra brings {module}?"
            assert module not in optional or module in asked, f"{path}:{line}: ask for {module} with require"


@pytest.mark.parametrize(
    ("command", "module"), [(name, module) for name, (_, modules) in COMMANDS.items() for module in modules]
)
def test_a_command_names_the_extra_before_it_does_anything(command, module, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    assert main(COMMAND_LINES[command]) == 2
    package, extra = PACKAGES.get(module, module), COMMANDS[command][0]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"mopl {command}: this needs {package}, which is not installed; run: {install(extra)}"
    assert not list(tmp_path.iterdir())


def test_options_are_asked_for_as_early(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert main(["rank", "--log-with", "tensorboard", "--run", "new"]) == 2
    assert "accelerate and tensorboard, which are not installed; run: pip install" in (said := capsys.readouterr().err)
    assert said.endswith("[demo,tensorboard]'\n") or said.endswith("[demo,tensorboard]\n")
    monkeypatch.delitem(sys.modules, "accelerate")
    monkeypatch.setitem(sys.modules, "peft", None)
    demo = {"model": "nowhere", "data": "nowhere.jsonl"}
    for start in (
        lambda: rank(RankConfig(log_with="tensorboard"), "new"),
        lambda: align(AlignConfig(**demo), "new"),
        lambda: train_policies(ClpConfig(**demo, rewards=("brevity",), scope="lora-mixture"), "new"),
    ):
        with pytest.raises(ImportError, match=r"this needs (tensorboard|peft), which is not installed; run: pip"):
            start()
    assert main(["align", "--demo"]) == 2
    assert "this needs peft" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_is_that_of_the_readme_in_a_clone(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert install("demo") == "pip install -c constraints.txt -e '.[demo]'"
    assert f"{install('demo')} && mopl rank" in (ROOT / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert install("demo") == f"pip install -c {ROOT}/constraints.txt -e '{ROOT}[demo]'"
    monkeypatch.setattr("mopl._extras.__file__", str(tmp_path / "site-packages" / "mopl" / "_extras.py"))
    assert install("demo", "peft") == "pip install 'mopl[demo,peft]'"


def test_all_that_is_missing_is_named_at_once(monkeypatch):
    for module in ("sklearn", "statsmodels", "rich"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"^the page needs scikit-learn, statsmodels and rich, which are not in") as e:
        require("tqdm", "sklearn", "statsmodels", "rich", what="the page")
    assert e.value.name == "sklearn"
    require("tqdm", "torch")
    require_for("steer")


def test_what_no_extra_brings_is_installed_by_itself(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ImportError, match=r"needs deepspeed, which is not installed; run: pip install deepspeed$"):
        require("accelerate", "deepspeed")
