"""Rollouts whose answers a server samples in the policy's place: written for it, loaded, asked, read and checked.

The server has the policy of the step before it is asked, so what is left between the two are kernels and number
formats; importance weights correct these (`mopl.losses.importance_weights`). A server of mopl gets the policy itself,
whatever its scope, and requests say their trade-offs; vLLM gets a LoRA adapter for each trade-off of the step. Every
name is used once: servers remember what they computed of a prompt by the name of the adapter.
"""

from __future__ import annotations

import itertools
import secrets
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopl._files import discard_folder, write_folder
from mopl.clp.config import ClpConfig
from mopl.clp.policies import Policy
from mopl.clp.prompts import PromptBatch
from mopl.clp.rollout import Answers, Sampler
from mopl.clp.rollout_server import Completion, OpenAIServer
from mopl.conditioning.parameter_mixture import write_adapter
from mopl.training.parallel import on_main

_TOGETHER = 32  # requests that are under way at once
_CHOICES = 16  # answers to one request, the most that mopl serve gives


class ServerAnswers:
    """Answers from a server, as an `AnswerSource`.

    Args:
        config: Settings, with `rollout_server` and `rollout_folder`.
        sampler: What the local samples are: where answers end.
        accelerator: All processes of the run make one of these.
    """

    def __init__(self, config: ClpConfig, sampler: Sampler, accelerator: Any) -> None:
        assert config.rollout_server is not None and config.rollout_folder is not None
        self.config, self.sampler, self.accelerator = config, sampler, accelerator
        self.folder, self.vocabulary = Path(config.rollout_folder), sampler.vocabulary
        self.server = OpenAIServer(config.rollout_server, config.rollout_timeout)
        # In all names: another run, or this one before it was stopped, may have used the server.
        self.mark = on_main(accelerator, lambda: secrets.token_hex(4))
        self._number = itertools.count()
        self._loaded: tuple[Any, int, str] | None = None  # which policy a server of mopl has, of which step, its name
        self.stage = "clp"

    def check(self, prompt: Sequence[int]) -> None:
        """Raise if the server cannot give the rollouts of this run: asked before anything is trained.

        Args:
            prompt: Tokens of one of the prompts.

        Raises:
            RolloutServerError: If it does not answer as it must.
            ValueError: If it cannot load such policies.
        """
        self.server.connect()
        config = self.config
        scopes = {config.scope_of(kind) for kind in ("clp", "expert", "prompting") if _trains(config, kind)}
        wrong = [name for name in ("lora_dora", "lora_modules_to_save") if getattr(config, name)]
        if self.server.kind == "vllm" and (scopes != {"lora-mixture"} or wrong):
            what = f"{wrong[0]} changes more than that" if wrong else f"scope {config.scope!r} trains something else"
            raise ValueError(
                f"rollout_server {self.server.url} is vLLM, which takes LoRA adapters, but {what}; train "
                "scope='lora-mixture', or start `mopl serve MODEL --policies FOLDER`"
            )
        self.server.check_temperature(prompt, config.temperature)

    def of(self, stage: str) -> ServerAnswers:
        """Return it for the training of this name."""
        self.stage = "".join(c if c.isalnum() or c in "._" else "-" for c in stage)
        return self

    def answer(
        self, policy: Policy, prompts: Sequence[Sequence[int]], weights: Tensor, kl_weight: Tensor, batch: PromptBatch
    ) -> Answers:
        """Answer the prompts of a rollout; see `AnswerSource`.

        Raises:
            RolloutServerError: If an answer does not come, or is not as it must be.
        """
        self.server.begin()
        loaded = self._loaded_policy if self.server.kind == "mopl" else self._loaded_adapters
        with loaded(policy, weights, kl_weight, batch) as asked:
            rows = [(tuple(prompt), asked(r)) for r, prompt in enumerate(prompts)]
            requests = [
                (prompt, whom, min(_CHOICES, len(group) - first))
                for (prompt, whom), group in ((key, list(same)) for key, same in itertools.groupby(rows))
                for first in range(0, len(group), _CHOICES)
            ]
            # The generators are seeded by step and part, so a step that is done again asks with the same seeds.
            seeds = torch.randint(2**31 - 1, (len(requests),)).tolist()
            with ThreadPoolExecutor(min(_TOGETHER, len(requests))) as pool:
                found = list(pool.map(self._complete, requests, seeds))
        every = [completion for some in found for completion in some]
        tokens = [completion.token_ids for completion in every]
        return Answers(
            tokens, self.sampler.ends.texts(tokens), token_log_probs=[completion.log_probs for completion in every]
        )

    def _complete(self, request: tuple[tuple[int, ...], dict[str, Any], int], seed: int) -> list[Completion]:
        (prompt, whom, answers), config, ends = request, self.config, self.sampler.ends
        found = self.server.complete(
            prompt, whom, answers=answers, tokens=config.max_new_tokens, temperature=config.temperature, seed=seed,
            ends=ends.ids, stop=ends.text,
        )  # fmt: skip
        for each in found:
            if len(each.token_ids) > config.max_new_tokens:
                raise self.server.error(
                    f"an answer has {len(each.token_ids)} tokens, above max_new_tokens = {config.max_new_tokens}",
                    "look at its log",
                )
            if (largest := max(each.token_ids)) >= self.vocabulary:
                raise self.server.error(
                    f"an answer has the token {largest}, but the run's model has {self.vocabulary} tokens",
                    "use the model of the run there",
                )
            kept, ended = ends.cut(each.token_ids)
            if len(kept) != len(each.token_ids) or not (ended or len(kept) == config.max_new_tokens):
                raise self.server.error(
                    f"an answer of {len(each.token_ids)} tokens ends neither with an end of the run's model nor at "
                    f"max_new_tokens = {config.max_new_tokens}",
                    "use the model and the tokenizer of the run there, without stops of its own",
                )
        return found

    # ---------------------------------------------------------------- the policy of the step

    def _name(self, batch: PromptBatch) -> str:
        """Return a name that nothing has been called by on this server."""
        return f"{self.stage}-{batch.step}-{batch.part}-{next(self._number)}-{self.mark}"

    @contextmanager
    def _loaded_policy(
        self, policy: Policy, weights: Tensor, kl_weight: Tensor, batch: PromptBatch
    ) -> Iterator[Callable[[int], dict[str, Any]]]:
        """Have a server of mopl load the policy, once a step, by the main process; give what asks for a row."""
        if self._loaded is None or self._loaded[0]() is not policy or self._loaded[1] != batch.step:

            def load() -> str:
                name = self._name(batch)
                target = self.folder / name
                write_folder(target, lambda path: policy.model.save_pretrained(path))
                try:
                    self.server.load_policy(name, name)
                finally:
                    discard_folder(target)  # what is loaded is in the server's memory
                return name

            self._loaded = weakref.ref(policy), batch.step, on_main(self.accelerator, load)
        name = self._loaded[2]
        yield lambda r: {"model": name, **policy.asked(weights[r], float(kl_weight[r]))}

    @contextmanager
    def _loaded_adapters(
        self, policy: Policy, weights: Tensor, kl_weight: Tensor, batch: PromptBatch
    ) -> Iterator[Callable[[int], dict[str, Any]]]:
        """Have vLLM load an adapter for each trade-off of this part of a step; give what asks for a row."""
        keys = [(tuple(w), a) for w, a in zip(weights.tolist(), kl_weight.tolist(), strict=True)]
        if policy.single:
            keys = keys[:1] * len(keys)
        names: dict[Any, str] = {}
        try:
            for r, key in enumerate(keys):
                if key in names:
                    continue
                name = self._name(batch)
                target = self.folder / name
                config, tensors = policy.adapter_at(weights[r], key[1])
                write_folder(target, lambda path, c=config, t=tensors: write_adapter(path, c, t))
                names[key] = name
                self.server.load_adapter(name, str(target.absolute()))
            yield lambda r: {"model": names[keys[r]]}
            for name in names.values():
                self.server.unload_adapter(name)
        finally:
            for name in names.values():
                discard_folder(self.folder / name)


def _trains(config: ClpConfig, kind: str) -> bool:
    """Return whether a run trains a kind of policy."""
    of = {"clp": "clp", "dera": "clp", "prompting": "prompting"}
    return any(of.get(method, "expert") == kind for method in config.methods)
