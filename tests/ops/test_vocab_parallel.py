"""A head whose vocabulary is sharded over two processes."""

import pytest
from launching import DISTRIBUTED, launch


@pytest.mark.distributed
def test_sharded_vocabulary_equals_the_whole_in_every_output_and_gradient() -> None:
    done = launch(2, str(DISTRIBUTED / "vocab_parallel.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all cases equal" in done.stdout
