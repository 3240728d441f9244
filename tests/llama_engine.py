"""llama.cpp's own server, which the package xllamacpp holds as compiled code, run in this process on the CPU.

What is asked goes through its HTTP interface on the loopback, as users ask it.
"""

import json
import math
import urllib.request
from pathlib import Path

import torch
from torch import Tensor


class Engine:
    """A GGUF model with LoRA adapters: keys, values and arithmetic in float32, no flash attention, one thread."""

    def __init__(self, model: Path, *adapters: Path, scales: tuple[float, ...] = (), length: int = 256):
        import xllamacpp

        options = xllamacpp.CommonParams()
        options.model.path = str(model)
        options.n_ctx = options.n_batch = options.n_ubatch = length
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
        options.n_parallel, options.n_threads_http = 1, 1
        options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.check_tensors = True
        options.warmup = options.fit_params = options.ui = False
        options.cache_ram_mib = 0
        options.verbosity = 0
        options.lora_adapters = [  # as --lora-scaled has them, or --lora
            xllamacpp.CommonAdapterLoraInfo(str(path), scale)
            for path, scale in zip(adapters, scales or [1.0] * len(adapters), strict=True)
        ]
        self.server = xllamacpp.Server(options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server = None  # which stops it

    def ask(self, path: str, **body) -> dict:
        """Send a request, a GET where nothing is sent along."""
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(
            f"{self.server.listening_address}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def tokens(self, text: str, *, add: bool = False) -> list[int]:
        """Split a text, with the tokens that go in front where `add`; texts of special tokens become these."""
        return self.ask("/tokenize", content=text, add_special=add, parse_special=True)["tokens"]

    def logprobs(self, ids: list[int], most: int, scales: tuple[float, ...] | None = ()) -> tuple[list[int], Tensor]:
        """Return the `most` likeliest next tokens and their log-probabilities (most,)."""
        # A whole character is made, whatever is likely: the server says nothing of the half of one, or of the end.
        made = [[self.tokens("a")[0], 1e4]]
        answer = self.complete(ids, 1, scales, n_probs=most, logit_bias=made)
        listed = answer["completion_probabilities"][0]["top_logprobs"]
        return [entry["id"] for entry in listed], torch.tensor([entry["logprob"] for entry in listed])

    def complete(self, ids: list[int] | str, most: int, scales: tuple[float, ...] | None = (), **options) -> dict:
        """Return the answer to a greedy request with the adapters at these scales; None: as the server began."""
        if scales is not None:
            options["lora"] = [{"id": i, "scale": scale} for i, scale in enumerate(scales)]
        return self.ask(
            "/completion", prompt=ids, n_predict=most, temperature=0.0, cache_prompt=False, **options,
        )  # fmt: skip

    def error(
        self, model, sequences: list[list[int]], scales: tuple[float, ...] | None = (), most: int | None = None
    ) -> float:
        """Return the largest difference in log-probability from `model(ids)`'s logits, as a part of their largest."""
        worst, total = 0.0, self.ask("/v1/models")["data"][0]["meta"]["n_vocab"]
        for ids in sequences:
            with torch.no_grad():
                wanted = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
            found, values = self.logprobs(ids, most or total, scales)
            kept = [i for i, token in enumerate(found) if token < len(wanted)]  # without tokens that it was given
            found, values = [found[i] for i in kept], values[kept].double()
            if len(wanted) < total:
                values = values.log_softmax(-1)
            seen = values > math.log(1e-30)  # the server has probabilities, in float32
            assert int(seen.sum()) > min(len(wanted), most or total) / 2
            difference = (values - wanted[found])[seen].abs().max()
            worst = max(worst, float(difference / wanted[found][seen].abs().max()))
        return worst
