"""An option has one name, one list of values and one default, in command and function; old values are still taken."""

import inspect
import warnings
from typing import get_args

import pytest
import torch

from mopl import losses
from mopl._renamed import VALUES
from mopl.alignment.config import AlignConfig
from mopl.alignment.methods import ResponseLoss
from mopl.cli import build_parser
from mopl.experiments.cos_dpo import ListLoss
from mopl.ranking.config import RankConfig
from mopl.ranking.evaluate import Measure
from mopl.ranking.metrics import ndcg

SCORES, LABELS = torch.tensor([[0.1, 0.9, 0.3]]), torch.tensor([[2.0, 0.0, 1.0]])


def default(function, name):
    return inspect.signature(function).parameters[name].default


def test_the_gain_has_the_names_that_the_losses_have():
    for loss in (losses.approx_ndcg, losses.lambda_loss):
        assert default(loss, "gain") in VALUES["gain"].values()
    wanted = ndcg(SCORES, LABELS, gain="exponential").values
    with pytest.warns(FutureWarning, match="gain='exp' is called 'exponential' now"):
        assert torch.equal(ndcg(SCORES, LABELS, gain="exp").values, wanted)
    with pytest.warns(FutureWarning, match="'exponential' now"):
        assert Measure(gain="exp") == Measure(gain="exponential")
    with pytest.warns(FutureWarning, match="'exponential' now"):
        assert RankConfig(gain="exp") == RankConfig(gain="exponential")
    with pytest.raises(ValueError, match=r"gain is 'cubic' but must be one of 'linear', 'exponential'"):
        RankConfig(gain="cubic")


def test_an_old_flag_is_taken_and_not_shown(capsys):
    parser = build_parser()
    with pytest.warns(FutureWarning, match="'exponential' now"):
        assert parser.parse_args(["rank", "--gain", "exp"]).gain == "exponential"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parser.parse_args(["rank", "--gain", "exponential"]).gain == "exponential"
    with pytest.raises(SystemExit):
        parser.parse_args(["rank", "--help-all"])
    assert "{linear,exponential}" in capsys.readouterr().out


def test_an_old_run_opens_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RankConfig.from_dict({**RankConfig().to_dict(), "gain": "exp"}).gain == "exponential"


def test_a_warning_comes_once_for_a_place():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            ndcg(SCORES, LABELS, gain="exp")
    assert len(seen) == 1 and seen[0].filename == __file__


@pytest.mark.parametrize("name", ["ties", "last_group", "top_k"])
def test_options_of_plackett_luce_have_one_default(name):
    defaults = {
        getattr(default(function, name), "value", default(function, name))
        for function in (losses.plackett_luce, RankConfig, AlignConfig, ListLoss, ResponseLoss)
    }
    assert len(defaults) == 1


def test_options_of_ndcg_have_one_default():
    for name in ("gain", "empty", "k"):
        assert default(ndcg, name) == default(Measure, name)
    assert all(default(ndcg, name) == default(RankConfig, name) for name in ("gain", "empty", "k"))
    assert set(get_args(Measure.__annotations__["gain"]) or ("linear", "exponential")) == {"linear", "exponential"}
