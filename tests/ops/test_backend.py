"""Where kernels cannot run, because torch or Triton is old or missing, the first op on a GPU says so."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

from mopl.ops import _backend as backend

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).resolve().parents[2]
REMEDY = re.escape("pip install --upgrade 'torch>=2.8'")


class OnGpu:
    """All that the choice looks at."""

    is_cuda = True


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch):
    """Return a function that pretends other versions; None: no Triton."""

    def pretend(torch_version: str, triton_version: str | None) -> None:
        backend._require_kernels.cache_clear()
        triton = None if triton_version is None else types.SimpleNamespace(__version__=triton_version)
        monkeypatch.setitem(sys.modules, "triton", triton)  # None is how Python notes a module that is not there
        monkeypatch.setattr(torch, "__version__", torch_version)

    yield pretend
    backend._require_kernels.cache_clear()


@pytest.mark.parametrize(
    ("torch_version", "triton_version", "said"),
    [
        ("2.7.1+cu126", "3.3.1", r"need torch 2\.8 or later, but found 2\.7\.1\+cu126"),
        ("2.8.0+cu128", "3.3.1", r"need Triton 3\.4 or later, but found 3\.3\.1 beside torch 2\.8\.0"),
        ("2.13.0+cpu", None, r"need Triton 3\.4 or later, but found none beside torch 2\.13\.0\+cpu"),
    ],
)
def test_what_is_too_old_is_named_with_what_is_needed_and_a_remedy(versions, torch_version, triton_version, said):
    versions(torch_version, triton_version)
    for _ in range(2):
        with pytest.raises(ImportError, match=said + ".*" + REMEDY):
            backend.use_triton(OnGpu())
    if not backend.INTERPRETED:
        assert not backend.use_triton(torch.zeros(1)), "a CPU needs no kernels"


@pytest.mark.parametrize(
    ("torch_version", "triton_version"),
    [("2.8.0+cu128", "3.4.0"), ("2.10.0a0+git1234", "3.10.0+git5678"), ("3.0.0", "4.0")],
)
def test_what_is_new_enough_runs_kernels(versions, torch_version, triton_version) -> None:
    versions(torch_version, triton_version)
    assert backend.use_triton(OnGpu())


def test_pyproject_and_readme_say_the_same() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    of_torch, of_triton = (".".join(map(str, v)) for v in (backend.OLDEST_TORCH, backend.OLDEST_TRITON))
    assert f"torch>={of_torch}" in project["dependencies"]
    assert f"triton>={of_triton}; platform_system == 'Linux'" in project["dependencies"]
    assert f"torch {of_torch} or later" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"triton=={of_triton}.0" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
