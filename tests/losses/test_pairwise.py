"""Losses of pairs, beside TRL's own code, closed forms, and the properties that the documentation claims."""

import inspect
import math
import types
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import logsigmoid

from mopl import reference as oracle
from mopl.losses import DPOLoss, bradley_terry, pairwise_logistic
from mopl.losses.pair_formulas import LOSSES
from mopl.losses.pairwise import F_DIVERGENCES, LOSS_TYPES

F64 = torch.float64
# What each type is called with where a test does not choose: exo_pair has no loss without label smoothing.
DEFAULTS: dict[str, dict] = defaultdict(dict, exo_pair={"label_smoothing": 0.1}, dpop={"dpop_lambda": 3.0})
WITH_SMOOTHING = [t for t in LOSS_TYPES if "label_smoothing" in LOSSES[t].options]
WITH_DIVERGENCE = [t for t in LOSS_TYPES if "f_divergence" in LOSSES[t].options]
WITH_EACH_DIVERGENCE = [
    (t, f) for t in LOSS_TYPES for f in (F_DIVERGENCES if t in WITH_DIVERGENCE else F_DIVERGENCES[:1])
]
WHOLE_BATCH = ["aot", "aot_unpaired"]


def log_probabilities(pairs: int = 6, dtype: torch.dtype = F64, scale: float = 3.0, seed: int = 0) -> list[Tensor]:
    """Return four (B,) leaves: policy and reference, chosen and rejected."""
    generator = torch.Generator().manual_seed(seed)
    base = -20 - 5 * torch.rand(2, pairs, generator=generator, dtype=F64)
    policy = base + scale * torch.randn(2, pairs, generator=generator, dtype=F64)
    return [t.to(dtype).requires_grad_() for t in (*policy, *base)]


def pair_loss(four: list[Tensor], loss_type: str = "sigmoid", **options) -> Tensor:
    chosen, rejected, reference_chosen, reference_rejected = four
    return bradley_terry(
        chosen,
        rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
        loss_type=loss_type,
        **{**DEFAULTS[loss_type], **options},
    )


# ---------------------------------------------------------------- TRL's own code


def trl_dpo(four: list[Tensor], lengths: Tensor | None = None, **settings_of_trainer) -> Tensor:
    """Run TRL's `DPOTrainer._compute_loss` on given log-probabilities: a model that answers with them, and no trainer.

    `lengths` (2, B) are the numbers of tokens; each log-probability is spread over its tokens.
    """
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    policy, references = torch.cat(four[:2]), torch.cat(four[2:])
    tokens = torch.ones(len(policy), dtype=torch.long) if lengths is None else lengths.reshape(-1)
    longest = int(tokens.max())
    completion = torch.arange(longest)[None] < tokens[:, None]
    # Every sequence begins with one prompt token, which the trainer shifts away.
    mask = torch.cat([torch.zeros(len(policy), 1, dtype=torch.bool), completion], 1).long()
    outputs = types.SimpleNamespace(
        log_probs=(policy / tokens)[:, None] * completion,
        entropy=torch.zeros(completion.shape),
        mean_logits=torch.zeros(completion.shape),
        is_top1=torch.zeros(completion.shape, dtype=torch.bool),
    )
    accelerator = types.SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda value: value, gather=lambda value: value
    )
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=False),
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        use_weighting=False,
        loss_weights=[1.0],
        args=types.SimpleNamespace(discopop_tau=0.05),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
        f_divergence_type="reverse_kl",
        f_alpha_divergence_coef=0.5,
        label_smoothing=0.0,
    )
    vars(trainer).update(settings_of_trainer)
    inputs = {
        "input_ids": torch.zeros(mask.shape, dtype=torch.long),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": references[: len(policy) // 2],
        "ref_rejected_logps": references[len(policy) // 2 :],
    }
    return dpo_trainer.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)


def assert_same(ours: Tensor, theirs: Tensor, four: list[Tensor], rtol: float = 1e-11) -> None:
    """Compare values, and the gradients of both policy log-probabilities."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)
    got, expected = torch.autograd.grad(ours, four[:2]), torch.autograd.grad(theirs, four[:2])
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol)


TRL_TYPES = [t for t in LOSS_TYPES if t != "dpop"]


TRL_SMOOTHED = {"robust": (0.0, 0.1), "aot": (0.0, 0.1), "aot_unpaired": (0.0, 0.1), "exo_pair": (1e-3, 0.1)}


@pytest.mark.parametrize("pairs", [1, 7])
@pytest.mark.parametrize(("loss_type", "smoothing"), [(t, e) for t in TRL_TYPES for e in TRL_SMOOTHED.get(t, (0.0,))])
def test_every_type_is_trls_own_code(loss_type: str, smoothing: float, pairs: int) -> None:
    four = log_probabilities(pairs, scale=1.0)
    ours = pair_loss(four, loss_type, beta=0.3, label_smoothing=smoothing)
    theirs = trl_dpo(four, loss_types=[loss_type], beta=0.3, label_smoothing=smoothing)
    # TRL's exo_pair makes a float32 tensor of the smoothing, whatever the dtype of the log-probabilities.
    assert_same(ours, theirs, four, rtol=1e-6 if loss_type == "exo_pair" else 1e-11)


def test_trl_has_no_other_type_of_four_log_probabilities() -> None:
    """Its error lists what it knows; the only one that we leave out needs token counts."""
    with pytest.raises(ValueError, match="Unknown loss type") as error:
        trl_dpo(log_probabilities(), loss_types=["?"], beta=1.0)
    names = set(str(error.value).split("[")[1].strip("]").replace("'", "").split(", "))
    assert names - set(LOSS_TYPES) == {"sft"}


@pytest.mark.parametrize("divergence", [f for f in F_DIVERGENCES if f != "reverse_kl"])
@pytest.mark.parametrize("loss_type", WITH_DIVERGENCE)
def test_f_divergences_are_trls_own_code(loss_type: str, divergence: str) -> None:
    four = log_probabilities(dtype=torch.float32, scale=1.0)  # TRL's alpha divergence knows no float64
    for alpha in (0.5, 1.0, 1.7) if divergence == "alpha_divergence" else (0.5,):
        ours = pair_loss(four, loss_type, beta=0.3, f_divergence=divergence, f_alpha=alpha)
        theirs = trl_dpo(
            four,
            loss_types=[loss_type],
            beta=0.3,
            label_smoothing=0.1 if loss_type == "exo_pair" else 0.0,
            f_divergence_type=divergence,
            f_alpha_divergence_coef=alpha,
        )
        assert_same(ours, theirs, four, rtol=2e-5)


def test_the_types_with_an_f_divergence_are_trls() -> None:
    """The check itself sits in the trainer's constructor, so its set is read from the source."""
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    line = inspect.getsource(dpo_trainer.DPOTrainer.__init__).split("f_divergence_loss_types = {")[1].split("}")[0]
    assert {name.strip(' "\n') for name in line.split(",")} == {*WITH_DIVERGENCE, "sft"}


@pytest.mark.parametrize("loss_type", ["ipo", "sigmoid_norm"])
def test_averaged_log_probabilities_give_trls_length_normalised_types(loss_type: str) -> None:
    four = log_probabilities(5)
    lengths = torch.tensor([[3, 1, 7, 4, 2], [5, 2, 2, 8, 1]])
    averaged = [four[0] / lengths[0], four[1] / lengths[1], four[2] / lengths[0], four[3] / lengths[1]]
    # TRL divides by the length of completion_mask, which is the number of completion tokens.
    assert_same(
        pair_loss(averaged, loss_type, beta=0.3),
        trl_dpo(four, lengths, loss_types=[loss_type], beta=0.3),
        four,
    )


@pytest.mark.parametrize("alpha", [0.0, 0.3, -0.4])
@pytest.mark.parametrize(
    ("loss_type", "smoothing"),
    [("simpo", 0.0), ("simpo", 0.2), ("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0), ("ipo", 0.0)],
)
def test_simpo_alphapo_and_cpo_preference_terms_are_trls_own_code(
    loss_type: str, smoothing: float, alpha: float, monkeypatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    cpo_trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    chosen, rejected = (t.detach() / 10 for t in log_probabilities()[:2])
    four = [chosen.requires_grad_(), rejected.requires_grad_()]
    trainer = types.SimpleNamespace(
        alpha=alpha,
        beta=2.5,
        simpo_gamma=0.7,
        label_smoothing=smoothing,
        loss_type=loss_type,
        accelerator=types.SimpleNamespace(device=torch.device("cpu")),
    )
    theirs = cpo_trainer.CPOTrainer.cpo_loss(trainer, *four)[0]
    ours = bradley_terry(
        *four,
        beta=2.5,
        loss_type="sigmoid" if loss_type == "simpo" else loss_type,
        margin=0.7 if loss_type == "simpo" else 0.0,
        label_smoothing=smoothing,
        reduction="none",
        **({"f_divergence": "alpha_divergence", "f_alpha": 1 - alpha} if alpha else {}),
    )
    weights = torch.randn(len(theirs), dtype=F64)
    assert_same(weights @ ours[:, 0], weights @ theirs, four)


def test_orpos_odds_ratio_term_is_trls_own_code(monkeypatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    orpo_trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    chosen, rejected = (t.detach().float() / 10 for t in log_probabilities()[:2])
    trainer = types.SimpleNamespace(beta=0.4, accelerator=types.SimpleNamespace(device=torch.device("cpu")))
    theirs = -orpo_trainer.ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]
    log_odds = [t - torch.log(-torch.expm1(t)) for t in (chosen, rejected)]
    torch.testing.assert_close(bradley_terry(*log_odds, weights=0.4, reduction="none")[:, 0], theirs)


# ---------------------------------------------------------------- other formulas, from their papers


def test_cdpo_is_the_listwise_loss_of_two_items_with_smoothed_labels() -> None:
    four = log_probabilities()
    rate = torch.rand(6, 2, dtype=F64)  # per pair and objective
    beta = 0.1 + torch.rand(6, 2, dtype=F64)
    scores = torch.stack([four[0] - four[2], four[1] - four[3]], 1)
    labels = torch.stack([1 - rate, rate], 2)  # (B, m, 2)
    expected = oracle.listwise_cross_entropy(scores, labels, beta)
    ours = pair_loss(four, beta=beta, label_smoothing=rate, reduction="none")
    torch.testing.assert_close(ours, expected)
    upstream = torch.randn(6, 2, dtype=F64)
    torch.testing.assert_close(torch.autograd.grad(ours, four, upstream), torch.autograd.grad(expected, four, upstream))


def test_dpo_is_the_pairwise_loss_of_a_list_of_two() -> None:
    four = log_probabilities()
    beta, margin = 0.1 + torch.rand(6, 1, dtype=F64), torch.randn(6, 1, dtype=F64)
    ours = pair_loss(four, beta=beta, margin=margin, reduction="none")
    listwise = pairwise_logistic(
        torch.stack(four[:2], 1),
        torch.tensor([[3.0, -1.0]]).expand(6, 2),
        reference=torch.stack(four[2:], 1),
        beta=beta,
        margin=margin,
        reduction="none",
    )
    torch.testing.assert_close(ours, listwise)
    upstream = torch.randn(6, 1, dtype=F64)
    torch.testing.assert_close(torch.autograd.grad(ours, four, upstream), torch.autograd.grad(listwise, four, upstream))


def test_dpop_penalises_only_a_chosen_response_below_the_reference() -> None:
    """Pal et al. 2024 (Smaug), equation 3, term by term."""
    zero = torch.zeros(2, dtype=F64)
    chosen, rejected = torch.tensor([0.5, -0.5], dtype=F64), torch.tensor([-1.0, -1.0], dtype=F64)
    ours = pair_loss([chosen, rejected, zero, zero], "dpop", beta=0.2, dpop_lambda=5.0, reduction="none")
    expected = [-math.log(1 / (1 + math.exp(-0.2 * d))) for d in (1.5, 0.5 - 5.0 * 0.5)]
    torch.testing.assert_close(ours[:, 0], torch.tensor(expected, dtype=F64))


def test_odpo_modpo_and_bco_shifts_are_margins() -> None:
    four = log_probabilities()
    offset = torch.randn(6, 1, dtype=F64)
    d = (four[0] - four[2]) - (four[1] - four[3])
    torch.testing.assert_close(
        pair_loss(four, beta=0.5, margin=offset, reduction="none"), -logsigmoid(0.5 * d[:, None] - offset)
    )
    # MODPO, Zhou et al. 2023: r = (beta delta - w_other R_other) / w, -log s(r_w - r_l).
    weight, other = 0.3, torch.randn(2, 6, dtype=F64)
    r = (0.5 * torch.stack([four[0] - four[2], four[1] - four[3]]) - 0.7 * other) / weight
    torch.testing.assert_close(
        pair_loss(four, beta=0.5 / weight, margin=0.7 / weight * (other[0] - other[1])[:, None], reduction="none")[
            :, 0
        ],
        -logsigmoid(r[0] - r[1]),
    )
    # BCO, Jung et al. 2024: -log s(r_w - delta) - log s(-(r_l - delta)).
    rewards = [0.5 * (four[0] - four[2]), 0.5 * (four[1] - four[3])]
    torch.testing.assert_close(
        pair_loss(four, "bco_pair", beta=0.5, margin=0.4, reduction="none")[:, 0],
        -logsigmoid(rewards[0] - 0.4) - logsigmoid(0.4 - rewards[1]),
    )


# ---------------------------------------------------------------- closed forms


def minimiser(loss: Callable[[Tensor], Tensor], start: float = 0.1) -> float:
    """Return the minimiser of a smooth function of one number by Newton's method with float64 derivatives."""
    x = torch.tensor(start, dtype=F64)
    for _ in range(60):
        x = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
        (second,) = torch.autograd.grad(first, x)
        x = x - (first / second).clamp(-1, 1)
    return float(x.detach())


def one(x: Tensor) -> Tensor:
    return x.reshape(1)


ZERO = torch.zeros(1, dtype=F64)


def test_preference_rates_of_several_objectives_mix_arithmetically() -> None:
    """A common β: the optimum of the weighted cDPO losses is logit(sum_j w_j p_j) / beta."""
    rates, weights = torch.tensor([[0.9, 0.35]], dtype=F64), torch.tensor([[0.4, 0.6]], dtype=F64)
    best = minimiser(lambda x: bradley_terry(one(x), ZERO, beta=0.7, label_smoothing=1 - rates, weights=weights))
    mixed = float((weights * rates).sum())
    assert best == pytest.approx(math.log(mixed / (1 - mixed)) / 0.7, rel=1e-12)


def test_unequal_betas_meet_the_stationarity_condition_and_its_scaling() -> None:
    """sum_j w_j beta_j (s(beta_j x) - p_j) = 0, and betas c beta have the solution x / c."""
    rates, weights = torch.tensor([[0.9, 0.35]], dtype=F64), torch.tensor([[0.4, 0.6]], dtype=F64)
    beta = torch.tensor([[0.5, 2.0]], dtype=F64)

    def solve(beta: Tensor) -> float:
        return minimiser(lambda x: bradley_terry(one(x), ZERO, beta=beta, label_smoothing=1 - rates, weights=weights))

    best = solve(beta)
    assert abs(float((weights * beta * (torch.sigmoid(beta * best) - rates)).sum())) < 1e-14
    assert solve(3 * beta) == pytest.approx(best / 3, rel=1e-11)


def test_minimisers_of_the_one_pair_losses() -> None:
    beta = 0.4
    for loss_type, expected in {
        "ipo": 1 / (2 * beta),
        "exo_pair": math.log(0.9 / 0.1) / beta,
        "nca_pair": math.log(2) / beta,  # -log s(r) - log s(-r) / 2 is least at s(r) = 2/3
        "sppo_hard": 1 / (2 * beta),
    }.items():
        x = torch.tensor([expected], dtype=F64, requires_grad=True)
        loss = bradley_terry(x, ZERO, beta=beta, loss_type=loss_type, **DEFAULTS[loss_type])
        assert float(torch.autograd.grad(loss, x)[0]) == pytest.approx(0.0, abs=1e-12), loss_type
    assert float(bradley_terry(ZERO + math.log(9) / beta, ZERO, beta=beta, loss_type="exo_pair",
                               label_smoothing=0.1)) == pytest.approx(0.0, abs=1e-15)  # fmt: skip


def test_robust_dpo_is_unbiased_under_flipped_labels() -> None:
    """Chowdhury et al. 2024: its mean over labels that are flipped with rate ε is the loss of the clean labels."""
    x, rate = torch.linspace(-8, 8, 33, dtype=F64), 0.2
    zeros = torch.zeros_like(x)
    as_given = bradley_terry(x, zeros, loss_type="robust", label_smoothing=rate, reduction="none")
    flipped = bradley_terry(zeros, x, loss_type="robust", label_smoothing=rate, reduction="none")
    torch.testing.assert_close((1 - rate) * as_given + rate * flipped, bradley_terry(x, zeros, reduction="none"))


# ---------------------------------------------------------------- the linear transformation property


def transformed(four: list[Tensor], c: float) -> list[Tensor]:
    """Return (1 - 1/c) s0 + s/c in place of s, equation 13 of COS-DPO."""
    return [four[2] + (four[0] - four[2]) / c, four[3] + (four[1] - four[3]) / c, four[2], four[3]]


@pytest.mark.parametrize("c", [0.25, 0.5, 2.0, 7.0])
@pytest.mark.parametrize("loss_type", [t for t in LOSS_TYPES if t != "aot"])
def test_beta_c_on_transformed_scores_is_the_same_problem(loss_type: str, c: float) -> None:
    four, beta = log_probabilities(8), 0.2 + torch.rand(1, 2, dtype=F64)
    options = {"margin": 0.3} if "margin" in LOSSES[loss_type].options else {}
    factor = 1 / c**2 if loss_type in ("ipo", "sppo_hard") else 1.0
    at_beta = pair_loss(four, loss_type, beta=beta, reduction="none", **options)
    at_c_beta = pair_loss(transformed(four, c), loss_type, beta=c * beta, reduction="none", **options)
    torch.testing.assert_close(at_c_beta, factor * at_beta)


def test_the_property_fails_where_a_second_scale_enters() -> None:
    """An added likelihood, odds ratios, f-divergences, and sorting apart: the documentation excludes them."""
    four, c = log_probabilities(8), 2.0
    scaled = transformed(four, c)

    def differs(loss: Callable[[list[Tensor], float], Tensor]) -> bool:
        return not torch.allclose(loss(four, 0.4), loss(scaled, 0.4 * c), rtol=1e-3)

    assert not differs(lambda s, beta: pair_loss(s, beta=beta))  # the check can tell
    assert differs(lambda s, beta: pair_loss(s, beta=beta) - s[0].mean())
    assert differs(lambda s, beta: bradley_terry(*(t - torch.log(-torch.expm1(t)) for t in s[:2]), beta=beta))
    assert differs(lambda s, beta: pair_loss(s, "aot", beta=beta))
    for divergence in F_DIVERGENCES[1:]:
        assert differs(lambda s, beta, f=divergence: pair_loss(s, beta=beta, f_divergence=f)), divergence


# ---------------------------------------------------------------- derivatives


@pytest.mark.parametrize(("loss_type", "divergence"), WITH_EACH_DIVERGENCE)
def test_gradients_of_every_differentiable_argument(loss_type: str, divergence: str) -> None:
    whole = loss_type in WHOLE_BATCH
    rows = 1 if whole else 4
    arguments = {
        "beta": 0.3 + torch.rand(rows, 2, dtype=F64),
        "weights": torch.randn(rows, 2, dtype=F64),
        "label_smoothing": 0.05 + 0.3 * torch.rand(rows, 2, dtype=F64),
        "margin": torch.randn(rows, 2, dtype=F64),
    }
    names = [n for n in arguments if n in ("beta", "weights") or n in LOSSES[loss_type].options]
    leaves = [*log_probabilities(4, scale=0.7), *(arguments[n].requires_grad_() for n in names)]

    def loss(*values: Tensor) -> Tensor:
        options = dict(zip(names, values[4:], strict=True))
        return pair_loss(list(values[:4]), loss_type, f_divergence=divergence, reduction="none", **options)

    assert torch.autograd.gradcheck(loss, leaves)


def test_second_derivatives() -> None:
    assert torch.autograd.gradgradcheck(lambda *four: pair_loss(list(four), beta=0.5), log_probabilities(4))


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("gap", [1.0, 10.0, 15.9, 21.0, 50.0, 80.0])
def test_tiny_losses_and_gradients_keep_every_digit(gap: float) -> None:
    """softplus of torch is cut off at 20, and log(sigmoid) is 0 from 17 on."""
    x = torch.tensor([gap], requires_grad=True)
    loss = bradley_terry(x, torch.zeros(1))
    (gradient,) = torch.autograd.grad(loss, x)
    assert float(loss.detach()) == pytest.approx(math.log1p(math.exp(-gap)), rel=1e-6)
    assert float(gradient) == pytest.approx(-1 / (1 + math.exp(gap)), rel=1e-6)
    flipped = float(bradley_terry(torch.tensor([-gap]), torch.zeros(1), label_smoothing=1.0))
    assert flipped == pytest.approx(math.log1p(math.exp(-gap)), rel=1e-6)
    wrong = torch.tensor([-gap], dtype=F64)
    assert float(bradley_terry(wrong, torch.zeros(1))) == pytest.approx(math.log1p(math.exp(gap)), rel=1e-15)


@pytest.mark.parametrize(("loss_type", "divergence"), WITH_EACH_DIVERGENCE)
def test_no_nan_at_extreme_log_probabilities(loss_type: str, divergence: str) -> None:
    values = torch.tensor([-1e4, -100.0, -1.0, 0.0, 1.0, 100.0, 1e4])
    four = [
        t.reshape(-1).clone().requires_grad_() for t in torch.meshgrid(values, values, values, values, indexing="ij")
    ]
    options = {"label_smoothing": 0.1} if loss_type in WITH_SMOOTHING else {}
    loss = pair_loss(four, loss_type, f_divergence=divergence, reduction="none", **options)
    gradients = torch.autograd.grad(loss, four, torch.ones_like(loss))
    for tensor in (loss, *gradients):
        assert not tensor.isnan().any()
        assert divergence != "reverse_kl" or tensor.isfinite().all()


def test_an_impossible_rejected_response_costs_nothing_and_an_impossible_chosen_one_everything() -> None:
    chosen = torch.tensor([-3.0, -math.inf], requires_grad=True)
    rejected = torch.tensor([-math.inf, -3.0], requires_grad=True)
    loss = bradley_terry(chosen, rejected, reduction="none")
    gradients = torch.autograd.grad(loss, (chosen, rejected), torch.ones_like(loss))
    assert loss[:, 0].tolist() == [0.0, math.inf]
    assert [g.tolist() for g in gradients] == [[0.0, -1.0], [0.0, 1.0]]


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4),
    st.floats(0, 1),
    st.floats(1e-3, 10),
    st.floats(-100, 100),
)
@settings(max_examples=200, deadline=None)
def test_smoothed_loss_against_float64(four: list[float], rate: float, beta: float, margin: float) -> None:
    """Relative accuracy: neither term of (1-ε) softplus(-x) + ε softplus(x) loses digits to the other."""
    options = {"beta": beta, "label_smoothing": rate, "margin": margin}
    loss = float(pair_loss([torch.tensor([v], dtype=F64) for v in four], **options))
    x = beta * ((four[0] - four[2]) - (four[1] - four[3])) - margin
    common = math.log1p(math.exp(-abs(x)))
    assert loss == pytest.approx((1 - rate) * (max(-x, 0) + common) + rate * (max(x, 0) + common), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_sixteen_bit_inputs_are_computed_in_float32(loss_type: str) -> None:
    four = [t.detach().bfloat16().requires_grad_() for t in log_probabilities()]
    widened = [t.detach().float().requires_grad_() for t in four]
    loss, expected = (pair_loss(f, loss_type, beta=0.3, reduction="none") for f in (four, widened))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    upstream = torch.randn_like(loss)
    for got, wanted in zip(
        torch.autograd.grad(loss, four, upstream), torch.autograd.grad(expected, widened, upstream), strict=True
    ):
        assert torch.equal(got, wanted.bfloat16())


# ---------------------------------------------------------------- shapes, reductions, errors


def test_objectives_broadcast_like_a_loop_over_pairs_and_objectives() -> None:
    four, m = log_probabilities(5), 3
    beta, weights = 0.2 + torch.rand(5, m, dtype=F64), torch.rand(m, dtype=F64)
    rate, margin = 0.3 * torch.rand(5, 1, dtype=F64), torch.randn(5, m, dtype=F64)
    ours = pair_loss(four, beta=beta, weights=weights, label_smoothing=rate, margin=margin, reduction="none")
    for b in range(5):
        for j in range(m):
            single = pair_loss(
                [t[b : b + 1] for t in four],
                beta=float(beta[b, j]),
                label_smoothing=float(rate[b, 0]),
                margin=float(margin[b, j]),
            )
            torch.testing.assert_close(ours[b, j], weights[j] * single)


def test_pairs_of_each_objective_may_differ() -> None:
    """Objective 2 prefers the other response: chosen (B, 2), and a reference that is common to both."""
    a, b, a0, b0 = log_probabilities(4)
    chosen, rejected = torch.stack([a, b], 1), torch.stack([b, a], 1)
    ours = bradley_terry(chosen, rejected, reference_chosen=torch.stack([a0, b0], 1),
                         reference_rejected=torch.stack([b0, a0], 1), reduction="none")  # fmt: skip
    torch.testing.assert_close(ours[:, :1], pair_loss([a, b, a0, b0], reduction="none"))
    torch.testing.assert_close(ours[:, 1:], pair_loss([b, a, b0, a0], reduction="none"))


def test_reductions() -> None:
    four, weights = log_probabilities(5), torch.rand(5, 3, dtype=F64)
    vector = pair_loss(four, weights=weights, reduction="none")
    assert vector.shape == (5, 3)
    torch.testing.assert_close(pair_loss(four, weights=weights, reduction="sum"), vector.sum())
    torch.testing.assert_close(pair_loss(four, weights=weights), vector.sum(1).mean())
    assert float(bradley_terry(torch.zeros(0), torch.zeros(0))) == 0.0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_no_reference_is_a_reference_of_zero(loss_type: str) -> None:
    chosen, rejected, *_ = log_probabilities()
    zero = torch.zeros(6, dtype=F64)
    without = bradley_terry(chosen, rejected, loss_type=loss_type, reduction="none", **DEFAULTS[loss_type])
    torch.testing.assert_close(without, pair_loss([chosen, rejected, zero, zero], loss_type, reduction="none"))


def test_options_given_as_traced_numbers() -> None:
    chosen, rejected = torch.tensor([0.5, -1.0]), torch.tensor([0.2, 0.4])

    def loss(option: float) -> torch.Tensor:
        return bradley_terry(chosen, rejected, beta=option, label_smoothing=option, margin=option)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for option in (0.1, 0.2):
        torch.testing.assert_close(compiled(option), loss(option))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_whole_graph_compiles(loss_type: str) -> None:
    torch.compiler.reset()  # each type is a recompilation of one function, of which there may be only a few
    compiled = torch.compile(
        lambda *four: pair_loss(list(four), loss_type, beta=0.3), fullgraph=True, backend="aot_eager"
    )
    four = log_probabilities()
    assert_same(compiled(*four), pair_loss(four, loss_type, beta=0.3), four)


def test_a_traced_batch_may_have_any_size() -> None:
    """As in torch.export without dynamo: what is computed of the batch is a symbol, and no number of the example."""
    traced = make_fx(lambda *four: pair_loss(list(four), reduction="none"), tracing_mode="symbolic")(
        *log_probabilities(4)
    )
    four = log_probabilities(6)
    torch.testing.assert_close(traced(*four), pair_loss(four, reduction="none"))


def test_options_that_a_type_does_not_have_are_errors() -> None:
    options = {
        "label_smoothing": 0.1,
        "margin": torch.zeros(6, 1),
        "f_divergence": "forward_kl",
        "discopop_tau": 0.1,
        "dpop_lambda": 5.0,
    }
    refused = 0
    for loss_type in LOSS_TYPES:
        for name, value in options.items():
            if name not in LOSSES[loss_type].options:
                refused += 1
                with pytest.raises(ValueError, match=f"{name} has no part in loss_type '{loss_type}'"):
                    pair_loss(log_probabilities(), loss_type, **{name: value})
    assert refused == sum(len(options.keys() - LOSSES[t].options) for t in LOSS_TYPES) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "nope"}, "loss_type is 'nope' but must be one of 'sigmoid'"),
        ({"loss_type": "sft"}, "needs the number of tokens"),
        ({"loss_type": "simpo"}, "margin=gamma"),
        ({"loss_type": "kto"}, "not paired"),
        ({"f_divergence": "kl"}, "f_divergence is 'kl'"),
        ({"f_alpha": 0.7}, "f_alpha is the order of 'alpha_divergence'"),
        ({"f_divergence": "alpha_divergence", "f_alpha": math.nan}, "f_alpha is nan but must be finite"),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, "discopop_tau is 0 but must be positive and finite"),
        ({"loss_type": "discopop", "discopop_tau": -1.0}, "discopop_tau is -1 but must be positive and finite"),
        ({"loss_type": "dpop", "dpop_lambda": -1.0}, "dpop_lambda is -1 but must not be negative"),
        ({"loss_type": "dpop", "dpop_lambda": math.nan}, "dpop_lambda is nan but must not be negative"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, r"\[0, 0.5\)"),
        ({"loss_type": "exo_pair", "label_smoothing": 0.0}, r"\(0, 1\)"),
        ({"label_smoothing": 1.5}, r"\[0, 1\]"),
        ({"label_smoothing": math.nan}, r"\[0, 1\]"),
        ({"reference_rejected": None}, "both or neither"),
        ({"weights": torch.ones(6)}, r"weights\[:, None\]"),
        ({"rejected": torch.zeros(5)}, r"rejected has shape \(5,\) but there are 6 pairs and 1 objective;"),
        ({"rejected": torch.zeros(6, 2), "reference_chosen": torch.zeros(6, 3)}, "3 objectives"),
        ({"chosen": torch.zeros(6, 1, 2)}, r"chosen has shape \(6, 1, 2\)"),
        ({"loss_type": "aot", "weights": torch.ones(6, 1)}, "sorts the batch"),
        ({"loss_type": "aot_unpaired", "beta": torch.ones(6, 2)}, "sorts the batch"),
        ({"reduction": "batchmean"}, "reduction is 'batchmean'"),
    ],
)
def test_errors_name_the_argument_and_the_remedy(options: dict, message: str) -> None:
    names = ("chosen", "rejected", "reference_chosen", "reference_rejected")
    arguments = {**dict(zip(names, log_probabilities(), strict=True)), **options}
    with pytest.raises(ValueError, match=message):
        bradley_terry(**arguments)


def test_inputs_must_be_floating_point_tensors() -> None:
    with pytest.raises(TypeError, match="chosen must be a floating-point tensor"):
        bradley_terry(torch.zeros(3, dtype=torch.long), torch.zeros(3))
    with pytest.raises(TypeError, match="rejected must be a floating-point tensor"):
        bradley_terry(torch.zeros(3), 0.0)


# ---------------------------------------------------------------- DPOLoss


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_loss_has_the_shape_that_trainers_call(smoothing: float) -> None:
    """torchtune, OpenRLHF and LLaMA-Factory share these formulas: Rafailov et al. 2023, and Mitchell's note on cDPO."""
    four, beta = log_probabilities(), 0.3
    losses, chosen_rewards, rejected_rewards = DPOLoss(beta, smoothing)(*four)
    logits = (four[0] - four[1]) - (four[2] - four[3])
    expected = -logsigmoid(beta * logits) * (1 - smoothing) - logsigmoid(-beta * logits) * smoothing
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(chosen_rewards, beta * (four[0] - four[2]).detach())
    torch.testing.assert_close(rejected_rewards, beta * (four[1] - four[3]).detach())
    assert losses.shape == (6,)
    assert not chosen_rewards.requires_grad
    assert not rejected_rewards.requires_grad
    upstream = torch.randn(6, dtype=F64)
    torch.testing.assert_close(
        torch.autograd.grad(losses, four, upstream), torch.autograd.grad(expected, four, upstream)
    )


def test_dpo_loss_refuses_what_it_cannot_mean() -> None:
    with pytest.raises(ValueError, match=r"must be \(B,\)"):
        DPOLoss(0.1)(*(torch.zeros(3, 2) for _ in range(4)))
    with pytest.raises(ValueError, match="label_smoothing"):
        DPOLoss(0.1, 2.0)
    assert "beta=0.1" in repr(DPOLoss(0.1))


def test_a_pair_on_two_devices_is_refused() -> None:
    chosen = torch.zeros(3)
    with pytest.raises(ValueError, match=r"rejected is on meta but chosen on cpu; pass rejected.to\(chosen.device\)"):
        bradley_terry(chosen, chosen.to("meta"))
