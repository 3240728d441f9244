"""The package as pip installs it, editable and not: what it holds, and that a clone's own folder does not hide it.

A folder `mopl` without an `__init__.py`, such as a clone seen from the folder above, is a namespace package to Python.
A package on a later entry of the path goes before it; one that only a finder behind the path knows does not.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import mopl

ROOT = Path(__file__).resolve().parents[2]


def run(executable, *arguments, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module", params=["editable", "wheel"])
def installed(request, tmp_path_factory):
    """Return (kind, clone, Python, its site-packages): what pip does without a network, in a second."""
    folder = tmp_path_factory.mktemp("above")
    clone = folder / "mopl"
    clone.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    for name in ("mopl", "kernels"):
        shutil.copytree(ROOT / name, clone / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from setuptools import build_meta; build_meta.build_{request.param}({str(folder)!r})"
    run(sys.executable, "-c", build, cwd=clone)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    # torch and the rest come from this environment, whose own editable packages stay out: their .pth are not read.
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n{folder / 'others'}\n")
    (folder / "others").mkdir()
    return request.param, clone, folder / "venv" / "bin" / "python", packages


def test_a_clone_does_not_hide_the_package_from_the_folder_above(installed):
    kind, clone, python, packages = installed
    show = "import mopl, importlib.util as u; mopl.losses; print(u.find_spec('mopl.kernels.listnet').origin)"
    found = Path(run(python, "-c", show, cwd=clone.parent))
    assert found == (clone if kind == "editable" else packages) / "mopl" / "kernels" / "listnet.py"
    assert run(python, "-m", "mopl.cli", "--version", cwd=clone.parent) == f"mopl {mopl.__version__}"
    command = "from importlib.metadata import entry_points as e; e(group='console_scripts')['mopl'].load()(['--help'])"
    assert "usage: mopl" in run(python, "-c", command, cwd=clone.parent)


def test_no_folder_of_a_clone_takes_the_place_of_another_package(installed):
    """Hugging Face's `kernels` is a package of its own; so are, for many, `tests`, `docs` and `bench`."""
    _, clone, python, _ = installed
    names = [path.name for path in ROOT.iterdir() if path.is_dir() and path.name.isidentifier() and path.name != "mopl"]
    assert "kernels" in names
    for name in names:
        (clone / name).mkdir(exist_ok=True)
        (clone.parent / "others" / name).mkdir()
        (clone.parent / "others" / name / "__init__.py").touch()
    show = f"import sys, {', '.join(names)}; print(*(sys.modules[name].__file__ for name in {names}), sep='\\n')"
    for folder in (clone.parent, clone):
        found = run(python, "-c", show, cwd=folder).splitlines()
        assert found == [str(clone.parent / "others" / name / "__init__.py") for name in names]


def test_the_wheel_holds_every_file_of_the_package_once(installed):
    kind, _, _, packages = installed
    held = {str(path.relative_to(packages)) for path in packages.rglob("*.*") if "__pycache__" not in path.parts}
    held = {name for name in held if name.startswith(("mopl/", "kernels/"))}
    if kind == "editable":
        assert not held
        return
    sources = [path for path in (ROOT / "mopl").rglob("*.*") if "__pycache__" not in path.parts]
    expected = {str(path.relative_to(ROOT)) for path in sources if "kernels" not in path.parts}
    expected |= {f"mopl/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert held == expected
