"""Run by tests/ranking/test_storage.py: `mopl rank` on splits of many files, which one of the processes parses.

Its model is the average of two trainings. Their folders are gone once the main process has read them, so no other may
need them: one that would comes late.
"""

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ending import leave

from mopl.ranking import storage, svmlight
from mopl.ranking.config import RankConfig
from mopl.ranking.model import RankingModel
from mopl.ranking.recipe import rank

if __name__ == "__main__":
    data, run = map(Path, sys.argv[1:])
    storage.LIMIT = 100  # everything is mapped
    parse = svmlight._parse

    def noted(path, names):
        (run.parent / f"parsed-{path.name}-by-{os.environ.get('RANK', '0')}").touch()
        return parse(path, names)

    svmlight._parse = noted
    if os.environ.get("RANK", "0") != "0":
        load = RankingModel.from_pretrained

        def late(folder):
            time.sleep(0.5)
            return load(folder)

        RankingModel.from_pretrained = late
    config = RankConfig(
        str(data), objectives=("a=1", "b=2:softmax"), hidden=8, base_hidden=8, heads=2, steps=4, base_steps=3,
        batch_size=8, bootstrap=0, points=3, device="cpu",
        conditioning="mixture", average=2,
    )  # fmt: skip
    rank(config, run)
    leave()
