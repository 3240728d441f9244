"""Trade-offs by name in vLLM: a request for the model `w=0.7,0.3` gets the adapter of that trade-off, made on demand.

A LoRA resolver is what vLLM asks for adapters that it does not know. This one makes them from a folder of
`mopl export RUN --adapters DIR`, in `mopl.conditioning.adapter_cache`. vLLM finds it by the entry point
`mopl_lora_resolver` of the group `vllm.general_plugins`; it does nothing unless `MOPL_VLLM_ADAPTERS` names a folder.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING   1, or vLLM asks no resolver
    VLLM_PLUGINS                       where it is set, mopl_lora_resolver must be among its names
    MOPL_VLLM_ADAPTERS                 the folder of adapters
    MOPL_VLLM_BASE_MODEL               what `vllm serve` is told as its model, where that is another name of the base
                                       model than the folder's, or the folder has none
    MOPL_VLLM_MAX_ADAPTERS             the most trade-offs on the disk, which are the most in one life of the server
    MOPL_VLLM_DECIMALS                 the most decimals of a weight, so that there are few trade-offs; else any
    MOPL_VLLM_CACHE                    where the adapters lie: $MOPL_CACHE/vllm-adapters, by default in ~/.cache/mopl

Written against vLLM's source and documentation, main as of 2026-11 (`vllm/lora/resolver.py`,
`vllm/entrypoints/openai/models/serving.py`); it has not run inside vLLM. What that source says of a resolver:

* It is asked with the model that the server was started with and the name in the request, once until it gives an
  adapter; vLLM then keeps the name as long as it lives, and loads the folder again whenever the adapter has left its
  memory. So what was handed out stays on the disk while the server lives.
* None means that there is no such adapter (404). An exception goes through to the handler of the request, where a
  ValueError is a 400 with its text (in older versions a 500).
* `lora_int_id` is replaced by a number of the server's own.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mopl._extras import require

require("vllm", what="the LoRA resolver", extra="vllm")

import vllm.envs as envs
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from mopl.conditioning.adapter_cache import MAX_CACHED, AdapterCache
from mopl.conditioning.adapter_files import VLLM_RANKS, AdapterFolder
from mopl.conditioning.sampling import NAME_PREFIX, weights_name, weights_of_name

__all__ = ["TradeOffResolver", "register"]

ADAPTERS, BASE_MODEL, CACHE = "MOPL_VLLM_ADAPTERS", "MOPL_VLLM_BASE_MODEL", "MOPL_VLLM_CACHE"
MAX_ADAPTERS, DECIMALS = "MOPL_VLLM_MAX_ADAPTERS", "MOPL_VLLM_DECIMALS"
_FIRST_ID = 1 << 30  # far from those that vLLM counts from 1, and within 32 bits
_log = logging.getLogger("vllm.mopl")  # below vLLM's own logger, whose level and format it has


class TradeOffResolver(LoRAResolver):
    """Gives the adapter of the trade-off that a model's name says, such as `w=0.7,0.3`; vLLM asks it on demand.

    Args:
        cache: The adapters, and where those of trade-offs are kept: a `mopl.conditioning.adapter_cache.AdapterCache`.
        base_model: What the server's model must be called; the name in the folder by default.
        decimals: The most decimals of a weight, or None for any number up to the six digits of names.

    Raises:
        ValueError: If nothing says which base model the adapters are for, or their ranks together are beyond vLLM's.
    """

    def __init__(self, cache: AdapterCache, *, base_model: str | None = None, decimals: int | None = None) -> None:
        self.cache, self.decimals = cache, decimals
        self.base_model = base_model or cache.adapters.base_model
        if self.base_model is None:
            raise ValueError(
                f"{cache.adapters.folder} is for a base model that has no name, since it was a local folder; set "
                f"{BASE_MODEL} to what `vllm serve` is told as its model, once you know that it is that one"
            )
        count = len(cache.adapters.objectives)
        self.rank = cache.adapters.rank_of([1 / count] * count)
        if self.rank > VLLM_RANKS[-1]:
            raise ValueError(
                f"an adapter of all {count} objectives in {cache.adapters.folder} has rank {self.rank} but vLLM's "
                f"--max-lora-rank ends at {VLLM_RANKS[-1]}; train adapters of a smaller rank, or use `mopl serve`"
            )
        self._ids: dict[str, int] = {}
        # One at a time, and not in the event loop's own threads, of which vLLM has need.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="mopl-adapters")

    @property
    def max_lora_rank(self) -> int:
        """The least `--max-lora-rank` with which vLLM loads all trade-offs."""
        return next(rank for rank in VLLM_RANKS if rank >= self.rank)

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Return the adapter of a trade-off; None for names that do not begin with "w=", which are others'.

        Args:
            base_model_name: The model that vLLM was started with.
            lora_name: What the request calls its model, such as `"w=0.7,0.3"`.

        Raises:
            ValueError: If the server has another base model, the name is none of a trade-off on the simplex, is not
                written as `weights_name` writes it, has more decimals than are allowed, or the cache is full.
            OSError: If the adapter cannot be read or written.
        """
        if not lora_name.startswith(NAME_PREFIX):
            return None
        if base_model_name != self.base_model:
            raise ValueError(
                f"the adapters in {self.cache.adapters.folder.name} are for {self.base_model!r} but this server has "
                f"{base_model_name!r}; start it with that model, or set {BASE_MODEL} where both are the same"
            )
        weights = weights_of_name(lora_name, len(self.cache.adapters.objectives), name="model")
        # Each spelling would be an adapter of its own to vLLM, with a place in its memory and a name that stays.
        if (name := weights_name(weights)) != lora_name:
            raise ValueError(f"model is {lora_name[:80]!r}, which is the trade-off {name!r}; write it so")
        if self.decimals is not None and any(round(w, self.decimals) != w for w in weights.tolist()):
            near = weights_name(_rounded(weights.tolist(), self.decimals))
            raise ValueError(f"model is {name!r} but this server takes {self.decimals} decimals; ask for {near!r}")
        path = await asyncio.get_running_loop().run_in_executor(self._worker, self.cache.get, weights)
        number = self._ids.setdefault(name, _FIRST_ID + len(self._ids))
        return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=str(path))


def register() -> None:
    """Register the resolver with vLLM, once for each process, if `MOPL_VLLM_ADAPTERS` names a folder.

    Raises:
        ValueError: If a variable of the module's list does not fit, which ends the server's start.
        FileNotFoundError: If there is no such folder.
    """
    if not (folder := os.environ.get(ADAPTERS, "").strip()):
        return
    if not envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        raise ValueError(
            f"{ADAPTERS} is set but VLLM_ALLOW_RUNTIME_LORA_UPDATING is not, so vLLM would never ask for a trade-off; "
            f"set it to 1, or unset {ADAPTERS}"
        )
    most = _number(MAX_ADAPTERS, 1, 1_000_000)
    cache = AdapterCache(AdapterFolder(folder), _cache_folder(), max_cached=MAX_CACHED if most is None else most)
    base = os.environ.get(BASE_MODEL, "").strip() or None
    resolver = TradeOffResolver(cache, base_model=base, decimals=_number(DECIMALS, 0, 6))
    LoRAResolverRegistry.register_resolver("mopl trade-offs", resolver)
    _log.info(
        "Trade-offs of %s on %s by names such as %r; their adapters need --enable-lora --max-lora-rank %d",
        ", ".join(cache.adapters.objectives),
        resolver.base_model,
        weights_name([1 / len(cache.adapters.objectives)] * len(cache.adapters.objectives)),
        resolver.max_lora_rank,
    )


def _rounded(weights: list[float], decimals: int) -> list[float]:
    """Return weights of so many decimals, whose sum is 1 again: the largest remainders are rounded up."""
    parts = [weight / sum(weights) * 10**decimals for weight in weights]  # they may be off 1 by a rounding
    whole = [math.floor(part) for part in parts]
    order = sorted(range(len(parts)), key=lambda i: whole[i] - parts[i])
    for i in order[: 10**decimals - sum(whole)]:
        whole[i] += 1
    return [part / 10**decimals for part in whole]


def _cache_folder() -> Path:
    if own := os.environ.get(CACHE, "").strip():
        return Path(own)
    cache = os.environ.get("MOPL_CACHE")  # a container may have no home
    return (Path(cache) if cache else Path.home() / ".cache" / "mopl") / "vllm-adapters"


def _number(variable: str, low: int, high: int) -> int | None:
    """Return the whole number that a variable says; None where it is not set."""
    if not (text := os.environ.get(variable, "").strip()):
        return None
    if not (text.isascii() and text.isdigit()) or not low <= int(text[:20]) <= high:
        raise ValueError(f"{variable} is {text[:40]!r} but must be a whole number from {low} to {high}")
    return int(text)
