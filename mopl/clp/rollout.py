"""Responses sampled from a policy, with what a loss needs: rewards, log-probabilities, at which trade-off.

Samples come from softmax(logits / temperature) and nothing else, and every log-probability, of the policy and of the
reference, is of that distribution: importance ratios and KL are those of what was sampled. The model's own
generation_config, which may ask for top-p or penalties, is out of force meanwhile.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
from torch import Tensor

from mopl._extras import require
from mopl._files import write_file
from mopl._records import check, damaged
from mopl._restoring import evaluating
from mopl._tensor_files import load_pickled
from mopl.clp.config import ClpConfig
from mopl.clp.policies import Policy
from mopl.clp.prompts import PromptBatch
from mopl.language_models.collate import padded
from mopl.language_models.head import IGNORE_INDEX
from mopl.language_models.models import vocabulary_of
from mopl.language_models.prompt_rows import generating_by, prompt_rows
from mopl.language_models.turns import turn_ends
from mopl.rewards import Rewards
from mopl.training.checkpoint import CheckpointFolder


@dataclass(frozen=True)
class Answers:
    """Sampled responses to R prompts, one each."""

    tokens: list[list[int]]  # tokens of each response, with the one that ended it
    texts: list[str]  # without special tokens, and without what ended them
    log_prob: Tensor | None = None  # (R,) log-probability of each, where the generation recorded it
    seconds: float = 0.0  # of the generation
    # Log-probability of each token under what sampled it, where that is not the policy that is trained.
    token_log_probs: list[list[float]] | None = None


class AnswerSource(Protocol):
    """Where the answers of a rollout come from: the policy itself (`Sampler`), or a server that has it."""

    def answer(
        self, policy: Policy, prompts: Sequence[Sequence[int]], weights: Tensor, kl_weight: Tensor, batch: PromptBatch
    ) -> Answers:
        """Answer R prompts, as the policy reads them, once each, drawing from the global generators.

        Args:
            policy: The policy as it is now; every process calls this for its part of a step.
            prompts: Tokens of each.
            weights: (R, m), the trade-off of each.
            kl_weight: (R,).
            batch: The part of the step that they belong to.
        """
        ...


class Sampler:
    """Samples from language models at a run's temperature.

    Args:
        base: The model that the run starts from: its `generation_config` says what ends a response.
        tokenizer: Its tokenizer.
        config: Settings.

    Attributes:
        vocabulary: How many tokens the model knows.

    Raises:
        ValueError: If nothing ends a response; see `mopl.language_models.turns.turn_ends`.
    """

    def __init__(self, base: Any, tokenizer: Any, config: ClpConfig) -> None:
        require("transformers")
        from transformers import GenerationConfig

        self.tokenizer, self.config = tokenizer, config
        encoder = config.list_tokenizer(tokenizer)
        self.ends, self.pad = turn_ends(encoder, base.generation_config), encoder.pad_id
        if not self.ends.ids:
            raise ValueError("neither model nor tokenizer has an end-of-sequence token, so responses cannot end")
        # Padded embeddings have more tokens than the tokenizer, which can be sampled all the same.
        self.vocabulary = vocabulary_of(base) or len(tokenizer)
        self._plain = GenerationConfig(
            do_sample=True, temperature=config.temperature, top_k=0, top_p=1.0, max_new_tokens=config.max_new_tokens,
            eos_token_id=list(self.ends.ids), pad_token_id=self.pad, use_cache=True,
        )  # fmt: skip

    @torch.no_grad()
    def sample(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        arguments: Callable[[slice], dict[str, Any]] = lambda rows: {},
        processor: Callable[[Tensor], Any] | None = None,
    ) -> Answers:
        """Answer each prompt once, drawing from the global generators.

        Args:
            model: What generates.
            prompts: Tokens of R prompts.
            arguments: Gives the keywords of `generate` for some of the rows.
            processor: Makes a logits processor from an attention mask; log-probabilities are then recorded.
        """
        began = time.perf_counter()
        found: list[list[int]] = []
        recorded: list[Tensor] = []
        with generating_by(model, self._plain):
            for part in prompt_rows(model, prompts, self.pad, self.ends, self.config.rows_at_once):
                options = arguments(part.rows)
                if processor is not None:
                    options = {
                        **options, "logits_processor": [processor(part.mask)], "output_scores": True,
                        "return_dict_in_generate": True,
                    }  # fmt: skip
                new, output = part.generate(**options)
                tokens = [self.ends.cut(row)[0] for row in new.tolist()]
                if processor is not None:
                    chosen = [
                        scores.float().log_softmax(-1).gather(-1, new[:, t : t + 1])[:, 0]
                        for t, scores in enumerate(output.scores)
                    ]
                    lengths = torch.tensor([len(row) for row in tokens], device=new.device)
                    counted = torch.arange(new.shape[1], device=new.device) < lengths[:, None]
                    recorded.append(torch.stack(chosen, 1).double().masked_fill(~counted, 0.0).sum(1).cpu())
                found += tokens
        return Answers(
            found, self.ends.texts(found), torch.cat(recorded) if recorded else None, time.perf_counter() - began
        )

    def answer(
        self, policy: Policy, prompts: Sequence[Sequence[int]], weights: Tensor, kl_weight: Tensor, batch: PromptBatch
    ) -> Answers:
        """Answer the prompts of a rollout with the policy itself; see `AnswerSource`."""
        return self.sample(policy.model, prompts, lambda part: policy.arguments(weights[part], kl_weight[part]))

    # ------------------------------------------------------------ log-probabilities

    def inputs(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: Any
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return prompts with responses as a fused model takes them, and where the responses are.

        Returns:
            `input_ids`, `attention_mask`, `targets` (R, T), padded on the right; the place (R, n) in T of what predicts
            each token of a response; which of these (R, n) exist.
        """
        inputs = padded(list(zip(prompts, responses, strict=True)), self.pad)
        inputs["targets"] = torch.nn.functional.pad(inputs.pop("labels")[:, 1:], (0, 1), value=IGNORE_INDEX)
        first = torch.tensor([len(prompt) - 1 for prompt in prompts])[:, None]  # predicts the first token
        lengths = torch.tensor([len(response) for response in responses])[:, None]
        step = torch.arange(int(lengths.max()))
        exists = step < lengths
        place = torch.where(exists, first + step, 0)
        return {name: value.to(device) for name, value in inputs.items()}, place.to(device), exists.to(device)

    @torch.no_grad()
    def score(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        arguments: dict[str, Any] | None = None,
        head: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return log-probabilities (R, n) of responses under a fused model, 0 behind their ends.

        Args:
            model: The model.
            prompts: R prompts as it reads them.
            responses: R responses, the longest of n tokens.
            arguments: Keywords of its forward.
            head: Its output head, to also return what it got at the positions of the responses.

        Returns:
            (R, n) float32; and (R, n, H), where the first is at the end of the prompt, or None.
        """
        n, device = max(map(len, responses)), next(model.parameters()).device
        columns, states = [], []
        seen: list[Tensor] = []
        hook = contextlib.nullcontext()
        if head is not None:
            hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
        with hook:
            for first in range(0, len(prompts), self.config.rows_at_once):
                rows = slice(first, first + self.config.rows_at_once)
                inputs, place, exists = self.inputs(prompts[rows], responses[rows], device)
                output = model(**inputs, temperature=self.config.temperature, **(arguments or {}))
                values = output.log_probs.gather(1, place).masked_fill(~exists, 0.0)
                columns.append(torch.nn.functional.pad(values, (0, n - values.shape[1])))
                if head is not None:
                    # The last, for a model that is measured at its first pass gets other rows before.
                    found = seen[-1][torch.arange(len(place), device=place.device)[:, None], place]
                    states.append(torch.nn.functional.pad(found, (0, 0, 0, n - found.shape[1])))
                    seen.clear()
        return torch.cat(columns), torch.cat(states) if states else None


# ---------------------------------------------------------------- a rollout


class Rollout(msgspec.Struct, forbid_unknown_fields=True):
    """R responses, S for each of P prompts, in the order of the prompts.

    Where K trade-offs share them, K times as many rows: all of them at the first trade-off, at the second, ...; the
    responses then in the order of the trade-offs that they were sampled at.
    """

    step: int  # the step they were sampled at
    prompts: list[list[int]]  # tokens of the prompts as the policy reads them, R
    responses: list[list[int]]  # tokens of the responses, R
    texts: list[str]  # the responses
    asked: list[Any]  # the prompts
    rewards: Tensor  # (R, m) in the rewards' own units, NaN where one failed
    weights: Tensor  # (R, m)
    kl_weight: Tensor = msgspec.field(name="alpha")  # (R,); in files under its first name
    reference: Tensor  # (R, n) log-probabilities of the tokens under the reference
    features: Tensor | None = None  # (R, H) the reference's hidden states at the ends of the prompts, if asked for
    # (R, n, H) its hidden states where it predicts each token of the responses, for the exact KL.
    hidden: Tensor | None = None
    scaled: Tensor | None = None  # (R, m) the rewards in the scale of the objective, once it is known
    behaviour: Tensor | None = None  # (R, n) log-probabilities under the policy as it sampled, once they are known
    sampled: Tensor | None = None  # (R, n) the same by the server that sampled in its place
    # Where K trade-offs share the responses: K; for each row, which of the prompts it answers, and at which trade-off
    # its response was sampled.
    trade_offs: int = 1
    prompt: Tensor | None = None
    source: Tensor | None = None

    @property
    def own(self) -> Tensor:
        """The rows of the responses, in their order, at the trade-offs at which they were sampled."""
        rows = torch.arange(len(self.responses))
        return rows if self.source is None else rows[self.source.cpu() == rows // (len(rows) // self.trade_offs)]

    def to(self, device: torch.device | str) -> Rollout:
        """Return the rollout with its tensors on a device."""
        values = msgspec.structs.asdict(self)
        moved = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return msgspec.structs.replace(self, **moved)


def roll(
    policy: Policy,
    batch: PromptBatch,
    sampler: Sampler,
    rewards: Rewards,
    config: ClpConfig,
    source: AnswerSource | None = None,
) -> Rollout:
    """Sample responses to prompts, each at its trade-off, from `source` or else from the policy, and score them."""
    samples = config.samples_per_prompt
    if batch.sources is None:
        at = prompt = torch.arange(len(batch)).repeat_interleave(samples)
    else:  # those of one trade-off side by side, so that they are generated together
        at, order = batch.sources.flatten().sort(stable=True)
        prompt = order // samples
    w, kl_weight = batch.weights[at], batch.kl_weight[at]
    asked = batch.prompts.at(prompt.tolist())
    own = [policy.tokens(tokens, w[r], float(kl_weight[r]), sampler.tokenizer) for r, tokens in enumerate(asked.tokens)]
    with evaluating(policy):
        answers = (source or sampler).answer(policy, own, w, kl_weight, batch)
        exact = config.kl_estimator == "exact"
        with policy.reference() as reference:
            head = policy.reference_head or policy.model.get_output_embeddings()
            base, states = sampler.score(
                reference, asked.tokens, answers.tokens, head=head if exact or policy.value is not None else None
            )
    values = rewards(answers.texts, asked.texts)
    rollout = Rollout(
        batch.step, own, answers.tokens, answers.texts, list(asked.texts), values, w, kl_weight, base,
        features=states[:, 0].clone() if states is not None and policy.value is not None else None,
        hidden=states if exact else None,
        sampled=None if answers.token_log_probs is None else _rows(answers.token_log_probs),
    )  # fmt: skip
    if batch.sources is None:
        return rollout
    rollout.prompt, rollout.source = prompt, at
    return _at_every_trade_off(rollout, policy, batch, asked.tokens, sampler.tokenizer)


def _at_every_trade_off(
    rollout: Rollout, policy: Policy, batch: PromptBatch, prompts: Sequence[Sequence[int]], tokenizer: Any
) -> Rollout:
    """Return the rows of a rollout once for each trade-off of the step."""
    count, rows = len(batch.weights), len(prompts)
    w, kl_weight = batch.weights.repeat_interleave(rows, 0), batch.kl_weight.repeat_interleave(rows)
    values = msgspec.structs.asdict(rollout)
    every: dict[str, Any] = {
        name: value.repeat(count, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value * count
        for name, value in values.items()
        if isinstance(value, Tensor | list)
    }
    every |= {"trade_offs": count, "weights": w, "kl_weight": kl_weight}
    if policy.words:  # the trade-off stands in front of the prompt
        every["prompts"] = [
            policy.tokens(tokens, w[r], float(kl_weight[r]), tokenizer) for r, tokens in enumerate([*prompts] * count)
        ]
    return msgspec.structs.replace(rollout, **every)


def _rows(values: Sequence[Sequence[float]]) -> Tensor:
    """Return rows of different lengths as (R, n) float32, 0 behind their ends."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.float32) for row in values], batch_first=True)


class RolloutStore:
    """Keeps the rollout of several steps, on disk as well, so that a training stopped between them goes on exactly.

    A file stays as long as a checkpoint could need it: checkpoints at the ends of rollouts need none.

    Args:
        folder: For the files; also that of the checkpoints is known.
        epochs: Steps that a rollout serves.
        checkpoints: Folder of the training's checkpoints.
    """

    def __init__(self, folder: Path, epochs: int, checkpoints: Path) -> None:
        self.folder, self.epochs, self.checkpoints = folder, epochs, CheckpointFolder(checkpoints)
        self._kept: dict[tuple[int, int], Rollout] = {}

    def _file(self, batch: PromptBatch) -> Path:
        return self.folder / f"step-{batch.step:06d}-part-{batch.part}-of-{batch.parts}.pt"

    def find(self, batch: PromptBatch, step: int) -> Rollout | None:
        """Return the rollout of a batch if it was made before `step`.

        Raises:
            FileNotFoundError: If the training is between two rollouts and the file is gone.
        """
        if step == batch.step:
            return None
        kept = self._kept.get((batch.step, batch.part))
        if kept is None:
            file = self._file(batch)
            if not file.exists():
                raise FileNotFoundError(
                    f"{file} is missing: step {step + 1} goes on with the samples of step {batch.step + 1}, as many "
                    "parts and processes as before; delete the newest checkpoint to go back to an older one"
                )
            kept = self._kept[batch.step, batch.part] = self._read(file)
        return kept

    @staticmethod
    def _read(file: Path) -> Rollout:
        """Return a rollout from its file.

        Raises:
            DamagedFile: If it is damaged.
        """
        remedy = "delete it and the newest checkpoint: --resume then goes on from an older one"
        content = load_pickled(file, remedy=remedy)
        check(content, Rollout, file, remedy=remedy)
        rows = len(content["responses"])
        for name, value in content.items():
            if isinstance(value, Tensor) and value.shape[:1] != (rows,):
                raise damaged(file, f"{name} must be a tensor of {rows} rows", remedy)
        return msgspec.convert(content, Rollout)

    def keep(self, batch: PromptBatch, rollout: Rollout) -> None:
        """Remember a rollout whose `behaviour` is known for the steps to come."""
        if self.epochs == 1:
            return
        self._kept = {key: kept for key, kept in self._kept.items() if key[0] == batch.step}
        self._kept[batch.step, batch.part] = rollout
        self.folder.mkdir(parents=True, exist_ok=True)
        content = msgspec.structs.asdict(rollout.to("cpu"))
        content["alpha"] = content.pop("kl_weight")
        write_file(self._file(batch), lambda path: torch.save(content, path))
        oldest = min((c.step for c in self.checkpoints.all()), default=0) // self.epochs * self.epochs
        for file in self.folder.glob(f"step-*-part-{batch.part}-of-{batch.parts}.pt"):
            if int(file.name.split("-")[1]) < min(oldest, batch.step):
                file.unlink()
