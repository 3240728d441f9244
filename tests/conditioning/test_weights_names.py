"""Names of trade-offs, in requests and of folders: written in one way, read as people write them, or refused."""

import math

import pytest
import torch

from mopl.conditioning import check_weights, sample_weights, weights_name, weights_of_name


def test_what_names_look_like():
    assert weights_name([0.7, 0.3]) == "w=0.7,0.3"
    assert weights_name(torch.tensor([0.7, 0.3])) == "w=0.7,0.3"  # float32, too
    assert weights_name([1.0, -0.0]) == weights_name([1, 0]) == "w=1,0"
    assert weights_name([0.7, 0.3], prefix="") == "0.7,0.3"
    assert weights_name([1 / 3] * 3) == "w=0.333333,0.333333,0.333333"
    assert weights_name([1 - 1e-7, 1e-7]) == "w=1,1e-07"
    assert weights_name([1.0]) == "w=1"


@pytest.mark.parametrize("objectives", [1, 2, 3, 7, 100])
def test_a_name_means_the_trade_off_that_it_was_made_of(objectives):
    for weights in sample_weights(objectives, 200, 0.3, seed=1, step=0, dtype=torch.float64):
        name = weights_name(weights)
        read = weights_of_name(name, objectives)
        assert read.dtype == torch.float64 and (read - weights).abs().max() <= 5e-7
        assert weights_name(read) == name
        check_weights(read)


def test_trade_offs_further_apart_than_the_precision_have_different_names():
    steps = torch.arange(1000, dtype=torch.float64) * 1.01e-6 + 0.25
    assert len({weights_name([w, 1 - w]) for w in steps.tolist()}) == 1000


@pytest.mark.parametrize(
    "text",
    ["w=0.7,0.3", "0.7,0.3", " w=0.7,0.3", "w=0.70,0.300", "0.7, 0.3", "w= 0.7 ,0.3 ", ".7,.3", "7e-1,+0.3"],
)
def test_names_as_people_write_them(text):
    assert torch.equal(weights_of_name(text, 2), torch.tensor([0.7, 0.3], dtype=torch.float64))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"is '': it has 0 weights but must have 2, such as 'w=0.5,0.5'"),
        ("w=", "it has 0 weights but must have 2"),
        ("w=1", "it has 1 weight but must have 2"),
        ("w=0.5,0.3,0.2", "it has 3 weights but must have 2"),
        ("w=0.7,", "where '' is no decimal number; write it such as 'w=0.5,0.5'"),
        (",", "where '' is no decimal number"),
        ("w=w=0.7,0.3", "where 'w=0.7' is no"),
        ("v=0.7,0.3", "where 'v=0.7' is no"),
        ("w=nan,0.3", "where 'nan' is no"),
        ("w=0.7,inf", "where 'inf' is no"),
        ("w=0x1,0", "where '0x1' is no"),
        ("w=1_0,0", "where '1_0' is no"),
        ("w=٠.٧,0.3", "where '٠.٧' is no"),  # digits to Python's float, and to a server in another language not
        ("w=0.7,０.３", "where '０.３' is no"),
        ("w=0.7,0.3\n", r"where '0.3\\n' is no"),
        ("w=0.7\u00a0,0.3", r"where '0.7\\xa0' is no"),
        ("w=0.7;0.3,0", "where '0.7;0.3' is no"),
        ("w=../../etc,0", r"where '../../etc' is no"),
        (
            "w=0.7,0.4",
            r"'w=0.7,0.4': weights = \(0.7, 0.4\) must lie on the simplex but does not sum to 1; divide",
        ),
        ("w=1.3,-0.3", "has a negative entry"),
        ("w=1e999,0", "has an entry that is not finite"),
        (f"w={'0' * 40}1,0", "where a text of 41 characters is no decimal number"),
        (f"w=0.{'7' * 10**6},0.3", "where a text of 1000002 characters is no decimal number"),
        ("9" * 10**6, "it has 1 weight"),
        ("," * 10**6, "it has 1000001 weights"),
    ],
)
def test_other_names_are_refused_in_short_words(text, said):
    with pytest.raises(ValueError, match=said) as caught:
        weights_of_name(text, 2, name="model")
    assert str(caught.value).startswith("model") and len(str(caught.value)) < 400


def test_a_name_is_that_of_one_trade_off_on_the_simplex():
    with pytest.raises(ValueError, match=r"shape \(2, 2\) but must be \(m,\): a name is that of one trade-off"):
        weights_name([[0.7, 0.3], [0.5, 0.5]])
    for weights in ([0.7, 0.4], [1.2, -0.2], [math.nan, 1]):
        with pytest.raises(ValueError, match="simplex"):
            weights_name(weights)
