"""A few kills wherever a run may be; `python tests/kill_runs.py --kills 200` is the whole of it."""

from pathlib import Path

import pytest
from launching import python

pytest.importorskip("accelerate")
pytest.importorskip("moocore")
SCRIPT = str(Path(__file__).parents[1] / "kill_runs.py")


@pytest.mark.slow
def test_killed_rankers_become_what_they_would_have_become():
    done = python(SCRIPT, "--kills", "4", "--cases", "rank-all", "rank-letor")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_killed_language_models_become_what_they_would_have_become():
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    done = python(SCRIPT, "--kills", "4", "--cases", "align-mixture", "clp-epochs")
    assert done.returncode == 0, done.stdout + done.stderr
