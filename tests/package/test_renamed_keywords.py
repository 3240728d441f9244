"""Every old name of a keyword, an attribute or a function still works, gives the same bits and warns once."""

import inspect
import json
import pickle
import warnings

import pytest
import torch

from mopl import _renamed, conditioning, losses, ops, reference, reference_policy, steering
from mopl.alignment import tuned
from mopl.alignment.methods import score_batch
from mopl.alignment.reference import score_lists
from mopl.alignment.runs import AlignmentRun
from mopl.clp.runs import ClpRun
from mopl.losses.policy_gradient import reward_coefficient
from mopl.ranking import ListTransformer, RankingModel, RankingModelConfig
from mopl.ranking.evaluate import evaluate
from mopl.ranking.methods import BasePolicy, ConditionedPolicy, FixedPolicy
from mopl.ranking.steer import steer
from mopl.ranking.synthetic import distance_to_optimum, expected_losses, true_scores

SCORES, LABELS = torch.tensor([[0.3, -1.2, 0.8, 0.1]]), torch.tensor([[2.0, 0.0, 1.0, 1.0]])
LOGPROB = torch.tensor([[-0.5, -1.0], [-2.0, -0.1]])
BETA = torch.tensor([[0.7]])
LIST_LOSSES = ("listwise_dpo", "plackett_luce", "pairwise_logistic", "lambda_loss", "approx_ndcg")
POLICY = (torch.tensor([0.6, 0.4]).log(), torch.tensor([0.5, 0.5]).log(), torch.tensor([[1.0, 0.0]]), torch.ones(1))

PROMPT = conditioning.HyperPrompt(2, 2, 1, 3, takes_beta=True)
WORDS = conditioning.TextPrompt(("helpful", "short"), template="{weights} {betas}")
torch.manual_seed(0)
RANKER = RankingModel(RankingModelConfig(3, ("a", "b"), hidden=8, takes_beta=True), ListTransformer(3, 8)).eval()
LISTS, BETAS = torch.rand(1, 4, 3), torch.tensor([0.5, 2.0])
RECORD = conditioning.TuningRecord(("a", "b"), concentration=0.3)

# what is called, the old keyword, the new one, the value
KEYWORDS = {
    **{
        name: (lambda name=name, **beta: getattr(losses, name)(SCORES, LABELS, **beta), "temperature", "beta", 0.7)
        for name in LIST_LOSSES
    },
    "bradley_terry": (
        lambda **beta: losses.bradley_terry(SCORES, LABELS, reference_chosen=LABELS, reference_rejected=SCORES, **beta),
        "temperature", "beta", 0.7,
    ),
    "policy_gradient": (
        lambda **kl_weight: losses.policy_gradient(
            LOGPROB, LABELS.view(2, 2), torch.tensor([0.3, 0.7]), reference=LOGPROB - 0.1, **kl_weight
        ).loss,
        "alpha", "kl_weight", 0.2,
    ),
    "reward_coefficient": (reward_coefficient, "alpha", "kl_weight", 0.2),
    **{
        f"ops.{name}": (
            lambda name=name, **beta: getattr(ops, name)(SCORES, LABELS[:, None], **beta), "temperature", "beta", BETA
        )
        for name in ("listwise_cross_entropy", "plackett_luce_nll")
    },
    **{
        f"reference.{name}": (
            lambda name=name, **beta: getattr(reference, name)(SCORES, LABELS[:, None], **beta),
            "temperature", "beta", BETA,
        )
        for name in ("listwise_cross_entropy", "plackett_luce_nll", "pairwise_logistic", "lambda_loss", "approx_ndcg")
    },
    "reference_policy.value": (
        lambda **kl_weight: reference_policy.value(*POLICY, **kl_weight), "alpha", "kl_weight", 0.2
    ),
    "sample_weights": (
        lambda **concentration: conditioning.sample_weights(3, 4, seed=1, step=2, **concentration),
        "alpha", "concentration", 0.3,
    ),
    "ConcatCondition": (
        lambda **takes: conditioning.ConcatCondition(1, **takes).extra_features, "temperature", "takes_beta", True
    ),
    "ConcatCondition()": (
        lambda **beta: conditioning.ConcatCondition(1, takes_beta=True)(SCORES[:, :, None], torch.ones(1), **beta),
        "temperature", "beta", torch.ones(1),
    ),
    "HyperPrompt": (
        lambda **takes: conditioning.HyperPrompt(1, 2, 1, 3, **takes).takes_beta, "temperature", "takes_beta", True
    ),
    "HyperPrompt()": (
        lambda **beta: PROMPT(torch.tensor([0.2, 0.8]), **beta), "temperature", "beta", torch.tensor([1.0, 3.0])
    ),
    "TextPrompt": (lambda **beta: WORDS.render((0.5, 0.5), **beta), "temperature", "beta", (1.0, 3.0)),
    "ValueHead": (
        lambda **takes: conditioning.ValueHead(2, 1, **takes).takes_kl_weight, "alpha", "takes_kl_weight", False
    ),
    "ValueHead()": (
        lambda **kl_weight: conditioning.ValueHead(2, 1)(torch.ones(1, 2), torch.ones(1), **kl_weight),
        "alpha", "kl_weight", 0.2,
    ),
    "KLWeightCoefficients": (
        conditioning.KLWeightCoefficients, "smallest_alpha", "smallest_kl_weight", 0.1
    ),
    "KLWeightCoefficients()": (
        lambda **kl_weight: conditioning.KLWeightCoefficients(0.1)(torch.tensor([0.3, 0.7]), **kl_weight),
        "alpha", "kl_weight", torch.tensor(0.2),
    ),
    "ParameterMixture": (
        lambda **kl_weight: conditioning.ParameterMixture(
            torch.nn.Linear(2, 2), 2, scope="full", coefficients=conditioning.KLWeightCoefficients(0.1)
        ).coefficients_of((0.5, 0.5), **kl_weight),
        "alpha", "kl_weight", 0.2,
    ),
    "TuningRecord": (lambda **of: conditioning.TuningRecord(("a", "b"), **of), "alpha", "concentration", 0.3),
    "RankingModelConfig": (lambda **of: RankingModelConfig(3, ("a", "b"), **of), "temperature", "takes_beta", True),
    "RankingModel()": (lambda **beta: RANKER(LISTS, BETAS / 2.5, **beta), "temperature", "beta", BETAS),
    "RankingModel.score": (lambda **beta: RANKER.score(LISTS, BETAS / 2.5, **beta), "temperature", "beta", BETAS),
    "ConditionedPolicy.at": (
        lambda **beta: ConditionedPolicy(RANKER).at([0.2, 0.8], **beta)(LISTS, torch.ones(1, 4).bool(), SCORES),
        "temperature", "beta", (0.5, 2.0),
    ),
    "text_prompt": (lambda **takes: tuned.text_prompt(("a", "b"), **takes), "temperature", "takes_beta", True),
}  # fmt: skip
NAMES = {
    "AlphaCoefficients": (conditioning, "KLWeightCoefficients"),
    "sample_temperatures": (conditioning, "sample_betas"),
    "Temperatures": (conditioning, "Betas"),
    "temperature_conditioned": (steering, "beta_conditioned"),
}


@pytest.fixture(autouse=True)
def nobody_was_warned(monkeypatch):
    monkeypatch.setattr(_renamed, "_warned", set())


def same(first, second) -> bool:
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


@pytest.mark.parametrize("name", KEYWORDS)
def test_an_old_keyword_gives_the_same_bits_and_warns_once(name):
    call, old, new, value = KEYWORDS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = call(**{new: value})
    with pytest.warns(DeprecationWarning, match=f"{old} of .* is deprecated; pass {new}, its name now") as seen:
        assert same(call(**{old: value}), expected)
        assert same(call(**{old: value}), expected)
    assert len(seen) == 1
    with pytest.raises(TypeError, match=f"got {new} and {old}, which is its old name; pass {new} only"):
        call(**{old: value, new: value})


@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        *((function, "temperature", "beta") for function in (
            evaluate, steer, BasePolicy.at, FixedPolicy.at, true_scores, expected_losses, distance_to_optimum,
            score_batch, score_lists,
        )),
        (evaluate, "conditioned_on_temperature", "conditioned_on_beta"),
    ],
)  # fmt: skip
def test_what_needs_a_run_or_data_takes_its_old_keyword_as_the_new_one(function, old, new):
    assert new in inspect.signature(function).parameters and old not in inspect.signature(function).parameters
    with pytest.raises(TypeError, match=f"got {new} and {old}, which is its old name; pass {new} only"):
        function(**{old: 1, new: 1})


@pytest.mark.parametrize("method", ["coefficients_of", "forward", "generate", "at", "merge"])
@pytest.mark.parametrize("kind", [conditioning.ParameterMixture, conditioning.LoraMixture])
def test_an_inherited_method_is_named_with_the_class_that_users_know(kind, method):
    with pytest.raises(TypeError, match=rf"^{kind.__name__}\.{method}\(\) got kl_weight and alpha"):
        getattr(kind, method)(None, alpha=1, kl_weight=1)


@pytest.mark.parametrize("run", [AlignmentRun, ClpRun])
def test_a_finished_run_answers_under_the_old_name(run):
    opened = object.__new__(run)
    opened.check_method = lambda method: method
    with pytest.warns(DeprecationWarning, match=f"{run.__name__}.takes_temperature is deprecated; read takes_beta"):
        assert opened.takes_temperature("temperature-cos-dpo") is opened.takes_beta("temperature-cos-dpo")


def test_files_keep_the_first_names_of_what_is_called_otherwise_now(tmp_path):
    RANKER.save_pretrained(tmp_path)
    network = json.loads((tmp_path / "model.json").read_text())["network"]
    assert network["temperature"] is True and "takes_beta" not in network
    assert RankingModel.from_pretrained(tmp_path).config == RANKER.config
    assert RECORD.to_dict()["alpha"] == 0.3 and "concentration" not in RECORD.to_dict()
    assert conditioning.TuningRecord.read(RECORD.to_dict()) == RECORD


@pytest.mark.parametrize("name", NAMES)
def test_an_old_name_of_a_module_is_the_new_one_and_warns_once(name):
    module, new = NAMES[name]
    with pytest.warns(DeprecationWarning, match=f"{name} is deprecated; use {module.__name__}.{new}") as seen:
        assert getattr(module, name) is getattr(module, new)
        assert getattr(module, name) is getattr(module, new)
    assert len(seen) == 1 and seen[0].filename == __file__
    with pytest.raises(AttributeError, match=r"has no attribute 'nothing'"):
        module.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("value", "old", "new"),
    [
        (conditioning.sample_betas(2, 3, 0.5, 2.0, seed=0, step=0), "temperature", "beta"),
        (PROMPT, "temperature", "takes_beta"),
        (conditioning.ConcatCondition(2), "temperature", "takes_beta"),
        (WORDS, "temperature", "takes_beta"),
        (conditioning.ValueHead(2, 1), "alpha", "takes_kl_weight"),
        (RECORD, "alpha", "concentration"),
        (RANKER.config, "temperature", "takes_beta"),
        (conditioning.KLWeightCoefficients(0.1), "smallest_alpha", "smallest_kl_weight"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_old_attribute_is_the_new_one(value, old, new):
    with pytest.warns(DeprecationWarning, match=rf"{type(value).__name__}.{old} is deprecated; read {new}"):
        assert same(getattr(value, old), getattr(value, new))


def test_a_template_of_an_older_release_is_read():
    older = conditioning.TextPrompt(WORDS.objectives, template="{weights} {temperatures}")
    assert older.render((0.5, 0.5), (1.0, 3.0)) == WORDS.render((0.5, 0.5), (1.0, 3.0))


def test_a_warning_names_the_line_that_uses_the_old_name():
    with pytest.warns(DeprecationWarning) as seen:
        losses.listwise_dpo(SCORES, LABELS, temperature=0.7)
    assert seen[0].filename == __file__


def test_help_shows_the_new_name_and_pickle_finds_the_function():
    assert "beta" in inspect.signature(losses.listwise_dpo).parameters
    assert "temperature" not in inspect.signature(losses.listwise_dpo).parameters
    assert pickle.loads(pickle.dumps(losses.listwise_dpo)) is losses.listwise_dpo


@pytest.mark.parametrize("name", ["beta", "temperature"])
def test_an_old_keyword_compiles_to_one_graph_and_transforms(name):
    def loss(scores):
        return losses.listwise_dpo(scores, LABELS, **{name: 0.7})

    expected = losses.listwise_dpo(SCORES, LABELS, beta=0.7)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert torch.equal(compiled(SCORES), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(torch.func.vmap(lambda s: loss(s[None]))(SCORES)[0], loss(SCORES))
        assert torch.func.grad(loss)(SCORES).shape == SCORES.shape


def test_a_function_of_someone_else_is_called_as_it_is_written():
    with pytest.warns(DeprecationWarning, match=r"the parameter temperature of .*old\(\) is deprecated"):
        assert _renamed.renamed_parameter(old, "temperature", "beta") == "temperature"
    assert _renamed.renamed_parameter(losses.listwise_dpo, "temperature", "beta") == "beta"
    assert _renamed.renamed_parameter(max, "temperature", "beta") == "beta"


def old(scores, labels, *, temperature):
    return scores
