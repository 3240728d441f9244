"""The goals of the log-probability ops on a GPU, at the sizes that come first in `bench.logprob`; modes as there."""

from __future__ import annotations

SHARE = {"forward": 0.88, "frozen": 0.92, "trained": 0.92, "gathered": 0.9}  # of the limit of products, or of bytes
H200_MS = {"frozen": 47.5, "trained": 71.0, "gathered": 3.85}
