"""After `import mopl` every public module is there, and the import itself costs nothing."""

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import python

import mopl

# On disk; the kernels' folder has no `__init__.py` and is a link, so pkgutil leaves it out.
FOUND = sorted({"kernels", *(each.name for each in pkgutil.iter_modules(mopl.__path__) if each.name[0] != "_")})


def test_the_public_modules_are_those_on_disk():
    assert sorted(mopl._SUBMODULES) == FOUND
    assert (Path(mopl.__path__[0]) / "kernels").is_dir()
    assert set(FOUND) <= set(mopl.__all__) and set(FOUND) <= set(dir(mopl))
    with pytest.raises(AttributeError, match="module 'mopl' has no attribute 'nothing'"):
        mopl.nothing  # noqa: B018


def test_each_is_there_after_import_mopl_which_loads_none_of_them():
    code = f"""
import sys
before = set(sys.modules)
import mopl
new = {{name for name in set(sys.modules) - before if name.startswith("mopl.") or name in ("torch", "numpy")}}
assert not new, new
for name in {FOUND}:
    assert getattr(mopl, name).__name__ == f"mopl.{{name}}"
unwanted = {{"triton", "transformers", "trl", "peft", "matplotlib", "moocore", "rich"}} & set(sys.modules)
assert not unwanted, unwanted
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_trainer_is_there_after_import_mopl_alone():
    done = python("-c", "import mopl; assert mopl.integrations.transformers.MultiObjectiveTrainer")
    assert done.returncode == 0, done.stderr


LAZY = ("alignment", "clp", "experiments", "language_models", "ranking")


@pytest.mark.parametrize("name", LAZY)
def test_names_that_are_imported_on_first_use_are_those_that_type_checkers_see(name):
    room = importlib.import_module(f"mopl.{name}")
    assert set(room.__all__) <= set(dir(room)) and all(hasattr(room, each) for each in room.__all__)
    with pytest.raises(AttributeError, match=rf"module 'mopl\.{name}' has no attribute 'nothing'"):
        room.nothing  # noqa: B018


def test_rooms_whose_names_are_imported_on_first_use_come_without_torch():
    code = f"import sys, {', '.join(f'mopl.{name}' for name in LAZY)}; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
