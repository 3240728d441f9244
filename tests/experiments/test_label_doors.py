"""Labels where data enters a run: what a loss cannot use is refused before anything is made, with the row's place."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from mopl.alignment.config import AlignConfig
from mopl.alignment.methods import ResponseLoss
from mopl.alignment.stages import response_loss
from mopl.cli import build_parser
from mopl.clp.config import ClpConfig
from mopl.clp.recipe import ClpRecipe
from mopl.language_models.collate import ListCollator
from mopl.language_models.data import PreferenceData, PreferenceList
from mopl.language_models.tokenized import TokenizedList
from mopl.losses import approx_ndcg, lambda_loss, listwise_dpo, normalize_labels, plackett_luce

NAMES = ("sparse", "reward")
REWARDS = (-3.0, 2.0, -0.5)


def data() -> PreferenceData:
    fine = {"sparse": (1.0, 0.0, 0.0), "reward": (1.0, 0.5, 2.0)}
    lists = [
        PreferenceList("q", ("a", "b", "c"), fine, "line 1"),
        PreferenceList("q", ("a", "b", "c"), {**fine, "reward": REWARDS}, "line 2"),
    ]
    return PreferenceData(lists, NAMES, name="answers.jsonl")


def settings(**changes) -> AlignConfig:
    return AlignConfig("model", "data", **changes)


def test_negative_labels_under_l1_are_refused_with_the_line_and_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"labels of reward go down to -3 \(line 2 of answers.jsonl\).*'softmax'"):
        response_loss(settings(labels=("l1",)), data())
    assert response_loss(settings(loss="plackett-luce", labels=("l1",)), data()).loss == "plackett-luce"


def test_each_objective_has_targets_by_its_own_rule_and_label_temperature() -> None:
    loss = response_loss(settings(labels=("l1", "softmax"), label_temperature=(1.0, 4.0)), data())
    assert (loss.labels, loss.label_temperature) == (("l1", "softmax"), (1.0, 4.0))
    token = np.array([1])
    labels = np.array([[1.0, 0.0, 3.0], REWARDS], dtype=np.float32)
    batch = ListCollator(width=4)([TokenizedList(token, (token,) * 3, labels)])
    targets = loss.targets(batch)
    assert torch.equal(targets[0, 0], torch.tensor([0.25, 0.0, 0.75, 0.0]))
    torch.testing.assert_close(targets[0, 1, :3], (torch.tensor(REWARDS) / 4).softmax(0))
    assert targets[0, 1, 3] == 0
    both = ResponseLoss(labels=("softmax",)).targets(batch)
    assert torch.equal(both, normalize_labels(batch.labels, "softmax", batch.mask))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label_temperature": 0.0}, "label_temperature is 0 but must be positive and finite"),
        ({"label_temperature": (1.0, -2.0)}, "label_temperature is 1 -2 but must be positive"),
        ({"label_temperature": ()}, "label_temperature needs an entry"),
        ({"label_temperature": 2.0, "loss": "plackett-luce"}, "label_temperature has no part in loss 'plackett-luce'"),
    ],
)
def test_a_label_temperature_is_checked_with_the_settings(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settings(**changes)


def test_a_label_temperature_belongs_to_softmax_and_to_each_objective() -> None:
    with pytest.raises(ValueError, match=r"label_temperature is 2 for sparse, .*labels='l1'"):
        response_loss(settings(label_temperature=2.0), data())  # auto takes l1 for sparse
    assert response_loss(settings(label_temperature=(1.0, 2.0)), data()).label_temperature == (1.0, 2.0)
    with pytest.raises(ValueError, match="label_temperature has 3 entries but there are 2 objectives"):
        response_loss(settings(label_temperature=(1.0, 2.0, 3.0)), data())


@pytest.mark.parametrize("given", [(1.0, 2.0), (1.0,) * 4])
def test_a_reference_point_has_one_entry_for_all_objectives_or_one_for_each(given: tuple[float, ...]) -> None:
    config = ClpConfig("model", "data", rewards=("a", "b", "c"), reference_point=given)
    words = f"reference_point has {len(given)} entries but there are 3 objectives; pass one for all objectives, or one "
    rewards: Any = (len,) * 3
    with pytest.raises(ValueError, match=words):
        ClpRecipe(config, rewards).read()  # before anything is loaded
    assert settings(reference_point=(2.0,)).for_each("reference_point", 3) == (2.0,) * 3
    assert settings(reference_point=given).for_each("reference_point", len(given)) == given
    assert settings().for_each("reference_point", 3) == ()  # the run sets its own
    with pytest.raises(ValueError, match=words):
        settings(reference_point=given).for_each("reference_point", 3)


def test_the_command_takes_it_and_a_run_without_it_divides_by_one() -> None:
    options = ["align", "--model", "m", "--data", "d", "--label-temperature", "1", "2.5"]
    assert build_parser().parse_args(options).label_temperature == [1.0, 2.5]
    older = settings().to_dict()
    del older["label_temperature"]
    assert AlignConfig.from_dict(older) == settings()
    assert AlignConfig.from_dict(dataclasses.replace(settings(), label_temperature=(2.0,)).to_dict()) != settings()


@pytest.mark.parametrize(
    ("loss", "refused"),
    [
        (listwise_dpo, True),
        (partial(listwise_dpo, normalize="softmax", label_temperature=2.0), False),
        (partial(listwise_dpo, normalize=None), False),
        (plackett_luce, False),
        (approx_ndcg, True),
        (partial(approx_ndcg, gain="linear"), True),
        (lambda_loss, False),
        (partial(lambda_loss, normalize=True), True),
        (lambda *_, **__: torch.zeros(()), False),
    ],
)
def test_the_trainers_refuse_rewards_for_losses_of_shares_and_gains(loss, refused: bool) -> None:
    pytest.importorskip("transformers")
    from mopl.integrations._data import Example, Examples
    from mopl.integrations._setup import ListChecks

    token = np.array([1])
    labels = np.array([[1.0, 0.0], [np.nan, 0.5]], dtype=np.float32), np.array([[0.0, 1.0], [0.5, -0.25]], np.float32)
    lists = [Example(TokenizedList(token, (token, token), each, row)) for row, each in enumerate(labels)]
    check = ListChecks(loss, pairs_only=None, sorts=False, vocabulary=None)
    check(Examples(lists[:1], NAMES))
    if not refused:
        return check(Examples(lists, NAMES))
    with pytest.raises(ValueError, match=r"labels of reward hold -0\.25 \(row 2\).*normalize='softmax'.*plackett_luce"):
        check(Examples(lists, NAMES))
