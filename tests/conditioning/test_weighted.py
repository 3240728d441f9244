"""What every kind of model that takes weights has: arguments, one trade-off, the reference, files."""

import copy
import json

import pytest
import torch

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tiny_language_models import build, conditioned

from mopl.conditioning import HyperPromptModel, KLWeightCoefficients, LoraMixture, ParameterMixture, WeightedModel
from mopl.conditioning.weighted import KINDS, Conditioned

IDS = torch.tensor([[1, 7, 8, 9], [1, 20, 21, 22], [1, 30, 31, 32]])
ONE, ROWS = torch.tensor([0.3, 0.7]), torch.tensor([[0.2, 0.8], [0.7, 0.3], [1.0, 0.0]])


def moved(model, seed=0):
    """Give what is trained random values, so that every trade-off is another model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def hyper_prompt(**options):
    return moved(conditioned(**options))


def lora_mixture(**options):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return moved(LoraMixture(build(), 2, config=config, record=("helpful", "harmless"), **options))


def parameter_mixture(**options):
    model = moved(ParameterMixture(build().requires_grad_(False), 2, record=("helpful", "harmless"), **options))
    for i, parameter in enumerate(model.others.parameters()):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return model


MAKERS = {"hyper prompt": hyper_prompt, "lora mixture": lora_mixture, "parameter mixture": parameter_mixture}


@pytest.fixture(params=MAKERS)
def model(request):
    return MAKERS[request.param]()


def logits(model, **keywords):
    with torch.no_grad():
        return model(input_ids=IDS, **keywords).logits


def test_the_base_class_and_its_first_name_are_one():
    assert Conditioned is WeightedModel
    assert {KINDS[name] for name in ("HyperPromptModel", "LoraMixture", "ParameterMixture")} == {
        HyperPromptModel, LoraMixture, ParameterMixture,
    }  # fmt: skip


def test_conditions_are_the_keywords_of_a_call(model):
    assert torch.equal(logits(model, **model.conditions(ROWS.tolist())), logits(model, weights=ROWS.double()))
    for weights, said in (
        (None, "weights are missing; pass one for each of helpful, harmless"), ([0.5, 0.6], "weights"),
        ([0.2, 0.3, 0.5], "has shape"), ([[[0.5, 0.5]]], "has shape"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            model.conditions(weights)
    with pytest.raises(ValueError, match="beta was passed"):
        model.conditions(ONE, beta=[1.0, 2.0])
    with pytest.raises(ValueError, match="kl_weight"):
        model.conditions(ONE, kl_weight=0.5)


def test_conditions_with_beta_and_kl_weight():
    prompt = hyper_prompt(takes_beta=True)
    assert prompt.takes_beta and not prompt.takes_kl_weight
    given = prompt.conditions(ROWS, beta=[0.5, 0.5])
    assert torch.equal(logits(prompt, **given), logits(prompt, weights=ROWS, beta=torch.tensor([0.5, 0.5])))
    for beta, said in ((None, "beta is missing"), ([1.0, -1.0], "beta is"), ([[1.0, 1.0]] * 2, "beta has shape")):
        with pytest.raises(ValueError, match=said):
            prompt.conditions(ROWS, beta=beta)
    with prompt.at(ONE, beta=[0.2, 0.8]) as one:
        found = logits(one)
    assert torch.equal(found, logits(prompt, weights=ONE, beta=torch.tensor([0.2, 0.8])))
    mixture = lora_mixture(coefficients=KLWeightCoefficients(0.1, anchor=False))
    assert mixture.takes_kl_weight and not mixture.takes_beta
    assert set(mixture.conditions(ONE, kl_weight=0.3)) == {"weights", "kl_weight"}
    with pytest.raises(ValueError, match="kl_weight is missing"):
        mixture.conditions(ONE)


def test_at_one_trade_off_it_is_called_without_weights(model):
    wanted, before = logits(model, weights=ONE), logits(model, weights=ROWS)
    with model.at(ONE) as one:
        torch.testing.assert_close(logits(one), wanted, rtol=1e-4, atol=1e-4)
        made = one.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False)
    asked = model.generate(IDS, torch.ones_like(IDS), weights=ONE, max_new_tokens=3, do_sample=False)
    assert torch.equal(made, asked)
    assert torch.equal(logits(model, weights=ROWS), before)
    with pytest.raises(ValueError, match="weights are 3 vectors"), model.at(ROWS):
        pass


def test_inside_at_a_prompt_takes_no_other_weights():
    model = hyper_prompt()
    with model.at(ONE):
        with pytest.raises(ValueError, match="fixed inside `at`; leave weights out"):
            logits(model, weights=ONE)
        with model.reference():
            plain = logits(model, weights=ROWS)
        with model.at(ROWS[0]):
            inner = logits(model)
    with model.reference():
        assert torch.equal(logits(model), plain)
    torch.testing.assert_close(inner, logits(model, weights=ROWS[0]))
    with pytest.raises(ValueError, match="weights are missing"):
        logits(model)


def test_a_prompt_is_not_merged_and_the_error_says_what_to_do():
    with pytest.raises(ValueError, match=r"cannot be merged.*mopl.language_models.export"):
        hyper_prompt().merge(ONE)


def test_the_reference_is_the_base_model_and_may_keep_adapters():
    prompt = hyper_prompt()
    with prompt.reference(adapters=True) as reference:
        assert torch.equal(logits(reference), logits(prompt.model))
    mixture = lora_mixture()
    for adapters in (False, True):
        with mixture.reference(adapters=adapters) as reference:
            assert torch.equal(logits(reference), logits(build()))
    with pytest.raises(ValueError, match="keep a copy"), parameter_mixture().reference():
        pass


def test_any_kind_is_loaded_by_the_base_class_and_no_other_by_a_kind(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = WeightedModel.from_pretrained(tmp_path, build())
    assert type(loaded) is type(model) and not loaded.training
    torch.testing.assert_close(logits(loaded, weights=ROWS), logits(model, weights=ROWS))
    other = HyperPromptModel if not isinstance(model, HyperPromptModel) else LoraMixture
    with pytest.raises(ValueError, match=f"holds a {type(model).__name__} but a {other.__name__} was asked for"):
        other.from_pretrained(tmp_path, build())


def test_weights_are_loaded_into_a_model_in_place(model, tmp_path):
    trained = moved(copy.deepcopy(model), seed=3)
    trained.save_pretrained(tmp_path)
    before = {name: parameter for name, parameter in model.named_parameters()}
    wanted = logits(trained, weights=ROWS)
    assert not torch.allclose(logits(model, weights=ROWS), wanted)
    model.load_weights(tmp_path)
    assert torch.equal(logits(model, weights=ROWS), wanted)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_weights_of_another_model_are_refused_before_any_is_loaded(model, tmp_path):
    trained = moved(copy.deepcopy(model), seed=3)
    trained.save_pretrained(tmp_path)
    file, before = tmp_path / "mopl.json", logits(model, weights=ROWS)
    content = json.loads(file.read_text())
    for change, said in (({"objectives": ["a", "b"]}, "was trained on"), ({"kind": "TextPromptModel"}, "holds a Text")):
        file.write_text(json.dumps({**content, **change}))
        with pytest.raises(ValueError, match=said):
            model.load_weights(tmp_path)
    if isinstance(model, HyperPromptModel):
        file.write_text(json.dumps({**content, "adapter": None}))
        with pytest.raises(ValueError, match="has the adapters none but the model has default"):
            model.load_weights(tmp_path)
    assert torch.equal(logits(model, weights=ROWS), before)


def test_a_kind_registers_itself_and_keeps_its_name_to_itself(tmp_path):
    with pytest.raises(TypeError, match=r"KIND 'LoraMixture', which is that of mopl.conditioning"):
        type("Mine", (WeightedModel,), {"KIND": "LoraMixture", "__module__": "mine"})
    (tmp_path / "mopl.json").write_text('{"kind": "Nobody"}')
    with pytest.raises(ValueError, match=r"holds a Nobody.*import the module"):
        WeightedModel.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no mopl.json"):
        WeightedModel.from_pretrained(tmp_path / "nothing")


def test_what_tells_kinds_apart_for_callers():
    prompt, mixture, parameters = hyper_prompt(), lora_mixture(), parameter_mixture()
    assert (prompt.virtual_tokens, mixture.virtual_tokens) == (prompt.hyper_prompt.virtual_tokens, 0)
    assert prompt.takes_embeddings and prompt.arranges_rows
    assert not mixture.takes_embeddings and not mixture.arranges_rows
    assert prompt.decodes_rows and mixture.decodes_rows and not parameters.decodes_rows
    assert mixture.write_weights([1, 2], ONE) == [1, 2]
