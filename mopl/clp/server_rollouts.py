"""Rollouts whose answers a server samples in the policy's place: written for it, loaded, asked, read and checked.

The server has the policy of the step before it is asked, so what is left between the two are kernels and number
formats; importance weights correct these (`mopl.losses.importance_weights`). A server of mopl gets the policy itself,
whatever its scope, and requests say their trade-offs; vLLM gets a LoRA adapter for each trade-off of the step. Every
name is used once: servers remember what they computed of a prompt by the name of the adapter.
"""

from __future__ import annotations

import itertools
import secrets
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopl._restoring import generators_kept
from mopl.clp.config import ClpConfig
from mopl.clp.policies import Policy
from mopl.clp.prompts import PromptBatch
from mopl.clp.rollout import Answers, Sampler
from mopl.clp.rollout_folder import policy_name, remove_leftovers, written
from mopl.clp.rollout_server import Completion, OpenAIServer, RolloutServerError
from mopl.conditioning.parameter_mixture import write_adapter
from mopl.training.parallel import on_main

_TOGETHER = 32  # requests that are under way at once
_CHOICES = 16  # answers to one request, the most that mopl serve gives
_FAREWELL = 2.0  # seconds that forgetting adapters may take after an error
_SURE = 100.0  # nats that are added to a token to have it: the most that OpenAI's API takes


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

    def check(self, policies: Iterable[Callable[[], AbstractContextManager[Policy]]], prompt: Sequence[int]) -> None:
        """Raise if the server cannot give the rollouts of this run: asked before anything is trained.

        It loads each policy, and answers a prompt with one token, at the limits of the run. Every process calls this;
        the main one does it. What killed trainers left in the folder is deleted first.

        Args:
            policies: Each gives an untrained policy inside a `with` block.
            prompt: Tokens of one of the prompts.

        Raises:
            RolloutServerError: If it does not answer as it must.
            ValueError: If it cannot load such policies.
        """

        def ask() -> tuple[str, str]:
            left = remove_leftovers(self.folder)
            self.server.begin()
            self.server.connect()
            self._check_kind()
            if self.server.kind == "vllm":
                self._unload(left)  # which it may still have
            self.server.check_temperature(prompt, self.config.temperature)
            for make in policies:
                with make() as policy:
                    self._check_policy(policy, prompt)
            return self.server.kind, self.server.model

        during, self.server.after = self.server.after, "nothing was changed by that"
        new = not self.folder.exists()
        try:
            with generators_kept():
                self.server.kind, self.server.model = on_main(self.accelerator, ask)
        except BaseException:
            with suppress(OSError):  # another process has taken it away, or something is in it
                if new:
                    self.folder.rmdir()
            raise
        finally:
            self.server.after = during

    def _check_kind(self) -> None:
        config = self.config
        scopes = {config.scope_of(kind) for kind in ("clp", "expert", "prompting") if _trains(config, kind)}
        wrong = [name for name in ("lora_dora", "lora_modules_to_save") if getattr(config, name)]
        if self.server.kind == "vllm" and (scopes != {"lora-mixture"} or wrong):
            what = f"{wrong[0]} changes more than that" if wrong else f"scope {config.scope!r} trains something else"
            raise ValueError(
                f"rollout_server {self.server.url} is vLLM, which takes LoRA adapters, but {what}; train "
                "scope='lora-mixture', or start `mopl serve MODEL --policies FOLDER`"
            )

    def _check_policy(self, policy: Policy, prompt: Sequence[int]) -> None:
        """Have a policy loaded, and a prompt answered by an end, which is as likely as can be, at the run's limits."""
        config, m = self.config, len(policy.objectives)
        weights, kl_weight = torch.full((1, m), 1 / m), torch.tensor(config.kl_weight[:1])
        tokens = policy.tokens(prompt, weights[0], config.kl_weight[0], self.sampler.tokenizer)
        many, bias = min(_CHOICES, config.samples_per_prompt), {str(self.sampler.ends.ids[0]): _SURE}
        asked: dict[str, Any]
        if self.server.kind == "mopl":
            asked = {"model": self._load(policy, self._name(0, 0)), **policy.asked(weights[0], config.kl_weight[0])}
            self._complete((tuple(tokens), asked | {"logit_bias": bias}, many), 0)
        else:
            with self._adapters(policy, weights, kl_weight, (0, 0)) as whom:
                self._complete((tuple(tokens), whom(0) | {"logit_bias": bias}, many), 0)

    def of(self, stage: str) -> ServerAnswers:
        """Return it for the training of this name."""
        self.stage = stage
        return self

    def answer(
        self, policy: Policy, prompts: Sequence[Sequence[int]], weights: Tensor, kl_weight: Tensor, batch: PromptBatch
    ) -> Answers:
        """Answer the prompts of a rollout; see `AnswerSource`.

        Raises:
            RolloutServerError: If an answer does not come, or is not as it must be.
        """
        self.server.begin()
        loaded = self._policy if self.server.kind == "mopl" else self._adapters
        with loaded(policy, weights, kl_weight, (batch.step, batch.part)) as asked:
            rows = [(tuple(prompt), asked(r)) for r, prompt in enumerate(prompts)]
            requests = [
                (prompt, whom, min(_CHOICES, len(group) - first))
                for (prompt, whom), group in ((key, list(same)) for key, same in itertools.groupby(rows))
                for first in range(0, len(group), _CHOICES)
            ]
            # The generators are seeded by step and part, so a step that is done again asks with the same seeds.
            seeds = torch.randint(2**31 - 1, (len(requests),)).tolist()
            found = self._answers(requests, seeds)
        every = [completion for some in found for completion in some]
        tokens = [completion.token_ids for completion in every]
        return Answers(
            tokens, self.sampler.ends.texts(tokens), token_log_probs=[completion.log_probs for completion in every]
        )

    def _answers(self, requests: Sequence[Any], seeds: Sequence[int]) -> list[list[Completion]]:
        """Send requests together; whatever goes wrong, also in waiting for them, ends all of them at once."""
        with ThreadPoolExecutor(min(_TOGETHER, len(requests))) as pool:
            try:
                tasks = [pool.submit(self._complete, *each) for each in zip(requests, seeds, strict=True)]
                for task in wait(tasks, return_when=FIRST_EXCEPTION).done:
                    task.result()  # raises what has failed, though others still run
                return [task.result() for task in tasks]
            except BaseException:  # Ctrl-C, too: the pool waits for its threads, and these for the server
                self.server.give_up()
                raise

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

    def _name(self, step: int, part: int) -> str:
        """Return a name that nothing has been called by on this server."""
        return policy_name(self.stage, step, part, next(self._number), self.mark)

    def _load(self, policy: Policy, name: str) -> str:
        """Have a server of mopl load a policy; return its name."""
        with written(self.folder / name, lambda path: policy.model.save_pretrained(path)):
            self.server.load_policy(name, name)
        return name  # what is loaded is in the server's memory

    @contextmanager
    def _policy(
        self, policy: Policy, weights: Tensor, kl_weight: Tensor, at: tuple[int, int]
    ) -> Iterator[Callable[[int], dict[str, Any]]]:
        """Have a server of mopl load the policy, once a step, by the main process; give what asks for a row."""
        if self._loaded is None or self._loaded[0]() is not policy or self._loaded[1] != at[0]:
            name = on_main(self.accelerator, lambda: self._load(policy, self._name(*at)))
            self._loaded = weakref.ref(policy), at[0], name
        name = self._loaded[2]
        yield lambda r: {"model": name, **policy.asked(weights[r], float(kl_weight[r]))}

    @contextmanager
    def _adapters(
        self, policy: Policy, weights: Tensor, kl_weight: Tensor, at: tuple[int, int]
    ) -> Iterator[Callable[[int], dict[str, Any]]]:
        """Have vLLM load an adapter for each trade-off of this part of a step; give what asks for a row."""
        keys = [(tuple(w), a) for w, a in zip(weights.tolist(), kl_weight.tolist(), strict=True)]
        if policy.single:
            keys = keys[:1] * len(keys)
        names: dict[Any, str] = {}
        with ExitStack() as files:
            try:
                for r, key in enumerate(keys):
                    if key in names:
                        continue
                    name, (config, tensors) = self._name(*at), policy.adapter_at(weights[r], key[1])
                    target = self.folder / name
                    files.enter_context(written(target, lambda path, c=config, t=tensors: write_adapter(path, c, t)))
                    names[key] = name  # from now on the server may have it, whatever becomes of its answer
                    self.server.load_adapter(name, str(target.absolute()))
                yield lambda r: {"model": names[keys[r]]}
                while names:
                    self.server.unload_adapter(next(iter(names.values())))
                    del names[next(iter(names))]
            except BaseException:
                self._unload(list(names.values()))
                raise

    def _unload(self, names: Sequence[str]) -> None:
        """Have vLLM forget adapters, if it still answers; what it says does not matter."""
        end = time.monotonic() + _FAREWELL
        for name in names:
            self.server.begin()  # it may not know this one
            with suppress(RolloutServerError):
                self.server.unload_adapter(name, max(end - time.monotonic(), 0.0))
        self.server.begin()


def _trains(config: ClpConfig, kind: str) -> bool:
    """Return whether a run trains a kind of policy."""
    of = {"clp": "clp", "dera": "clp", "prompting": "prompting"}
    return any(of.get(method, "expert") == kind for method in config.methods)
