"""Peak memory of one step on a list of K = 200 documents, all at once and in mini-batches; prints a line.

python -m bench.scorer_memory [mini_batch_size]
"""

import resource
import sys
import time

import torch
from transformers import BertConfig, BertForSequenceClassification

from mopl.losses import listwise_dpo
from mopl.training.gradient_cache import score_in_parts


def main(size: int | None, documents: int = 200, tokens: int = 128) -> None:
    """Measure a step of a BERT of the size of MiniLM-L6 (22 million parameters)."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=1
    )
    model = BertForSequenceClassification(config).train()
    rows, labels = torch.randint(10, 30000, (documents, tokens)), torch.rand(1, documents)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    scores = score_in_parts(lambda part: model(part).logits, rows.split(size or documents), model)
    listwise_dpo(scores.T, labels).backward()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"K = {documents}, mini-batches of {size or documents}: {grown:.0f} MiB, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else None)
