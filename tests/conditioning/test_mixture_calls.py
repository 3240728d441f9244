"""Calls of mixtures: what is cut into rows, what is refused; adapters that are there already, switched or misnamed."""

import copy
import json
import pickle

import numpy as np
import peft
import pytest
import torch
import transformers
from tiny_language_models import VOCABULARY, build, conditioned, lora, prompt, tokenizer
from torch import nn

from mopl._threads import CallOfThread, measuring
from mopl.conditioning import (
    HyperPromptModel,
    KLWeightCoefficients,
    LoraMixture,
    ParameterMixture,
    TextPrompt,
    TextPromptModel,
    TuningRecord,
    WeightedModel,
)

IDS = torch.arange(3, 24).view(3, 7) * 5 % (VOCABULARY - 6) + 6
ROWS = torch.tensor([[0.2, 0.8], [0.7, 0.3], [1.0, 0.0]])
W = torch.tensor([0.3, 0.7])


def spread(mixture):
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in mixture.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return mixture.eval()


def adapters(**options):
    given = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    return peft.LoraConfig(**given)


def lora_mixture(**options):
    return spread(LoraMixture(build(), 2, config=adapters(), **options))


def parameter_mixture(**options):
    return spread(ParameterMixture(build(), 2, **options))


MIXTURES = {"lora": lora_mixture, "parameters": parameter_mixture}
both = pytest.mark.parametrize("make", MIXTURES.values(), ids=MIXTURES)


@torch.no_grad()
def logits(model, ids=IDS, **kwargs):
    return model(ids, **kwargs).logits


@both
def test_positions_to_keep_are_those_of_all_rows_whatever_their_number(make):
    mixture = make()
    for keep in ([0, 3, 5], [2, 4], [0, 1, 2, 3]):
        kept = logits(mixture, weights=ROWS, logits_to_keep=torch.tensor(keep))
        torch.testing.assert_close(kept, logits(mixture, weights=ROWS)[:, keep])


def test_every_row_knows_all_end_tokens_whatever_their_number():
    mixture = parameter_mixture()
    ends = torch.tensor([2, *logits(mixture, weights=ROWS)[:2, -1].argmax(-1).tolist()])
    mask = torch.ones_like(IDS)
    given = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": ends, "pad_token_id": 0}
    together = mixture.generate(IDS, mask, weights=ROWS, **given)
    for row, weights, ids in zip(together, ROWS, IDS, strict=True):
        alone = mixture.generate(ids[None], mask[:1], weights=weights, **given)[0]
        assert row[: len(alone)].tolist() == alone.tolist() and not row[len(alone) :].any()


def test_a_tied_parameter_is_one_in_the_mixture_that_at_gives():
    mixture = spread(ParameterMixture(build(tie_word_embeddings=True), 2, scope="full"))
    with mixture.at(W) as one:
        assert one.get_input_embeddings().weight is one.get_output_embeddings().weight


@both
def test_weights_of_one_row_are_those_of_all(make):
    mixture, mask = make(), torch.ones_like(IDS)
    torch.testing.assert_close(logits(mixture, weights=W[None]), logits(mixture, weights=W))
    given = {"max_new_tokens": 3, "do_sample": False}
    one, row = (mixture.generate(IDS, mask, weights=w, **given) for w in (W, W[None]))
    assert torch.equal(one, row)


@both
def test_beta_is_refused_wherever_it_is_passed(make):
    mixture = make()
    calls = (
        lambda: mixture(IDS, weights=W, beta=[0.1, 0.1]), lambda: mixture.conditions(W, beta=[0.1, 0.1]),
        lambda: mixture.generate(IDS, torch.ones_like(IDS), weights=W, beta=[0.1, 0.1]),
        lambda: mixture.merge(W, beta=[0.1, 0.1]),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match=r"beta was passed to a .*Mixture.* not conditioned on it; leave it out"):
            call()


@pytest.mark.parametrize("kl_weight", [0.0, -0.5, float("nan"), 1.5])
def test_a_kl_weight_outside_of_its_range_is_refused(kl_weight):
    mixture = lora_mixture(coefficients=KLWeightCoefficients(0.1, anchor=False))
    for ask in (mixture.coefficients_of, mixture.conditions):
        with pytest.raises(ValueError, match=r"kl_weight is .* but must be above 0"):
            ask(W, kl_weight=kl_weight)
    penalty = KLWeightCoefficients(0.1, "penalty", anchor=False)
    if kl_weight > 1:
        assert penalty(W, torch.tensor(kl_weight)).isfinite().all()


def test_rows_of_a_mixture_of_an_adapters_parameters():
    mixture = spread(ParameterMixture(lora(build()), 2, scope="lora_"))
    alone = torch.cat([logits(mixture, IDS[i : i + 1], weights=ROWS[i]) for i in range(3)])
    torch.testing.assert_close(logits(mixture, weights=ROWS), alone)


def test_a_mixture_in_place_is_no_reference_and_what_needs_adapters_is_refused_in_the_reference():
    mixture = lora_mixture()
    with mixture.at(W):
        assert not mixture.is_reference
    with mixture.reference():
        assert mixture.is_reference
        for probe in (lambda: mixture.merge(W), mixture.check_merging):
            with pytest.raises(RuntimeError, match="is its reference; leave the"):
                probe()
        with mixture.at(W):
            assert not mixture.is_reference
    assert not mixture.is_reference


@pytest.fixture(scope="module")
def saved_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    build().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", MIXTURES)
def test_what_is_merged_does_not_have_the_name_of_the_base_model(kind, saved_base, tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(saved_base)
    of = {"lora": lambda: LoraMixture(base, 2, config=adapters()), "parameters": lambda: ParameterMixture(base, 2)}
    mixture = spread(of[kind]())
    merged = mixture.merge(W)
    assert (mixture.causal_lm.name_or_path, merged.name_or_path) == (saved_base, "")
    HyperPromptModel(merged, prompt()).save_pretrained(tmp_path / "on_top")
    with pytest.raises(ValueError, match="names no base model; pass it as model"):
        WeightedModel.from_pretrained(tmp_path / "on_top")
    mixture.save_pretrained(tmp_path / "again")
    for _ in range(2):
        WeightedModel.from_pretrained(tmp_path / "again").save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "mopl.json").read_text())["base_model"] == saved_base


# ---------------------------------------------------------------- adapters that are there already


def test_adapters_that_are_called_like_objectives_are_mixed_in_their_order(tmp_path):
    first = spread(LoraMixture(build(), 2, config=adapters(), record=["a.b", "c"]))
    first.save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(build(), tmp_path / "c", adapter_name="c")
    model.load_adapter(tmp_path / "a_b", "a_b")
    with pytest.raises(ValueError, match=r"not in their order .*; pass adapters=\['a_b', 'c'\]"):
        LoraMixture(model, 2, record=["a.b", "c"])
    with pytest.raises(ValueError, match=r"adapters is \['c'\] but the model has \['c', 'a_b'\]"):
        LoraMixture(model, 2, record=["a.b", "c"], adapters=["c"])
    mixture = LoraMixture(model, 2, record=["a.b", "c"], adapters=["a_b", "c"]).eval()
    assert mixture.adapters == ["a_b", "c"]
    torch.testing.assert_close(logits(mixture, weights=ROWS), logits(first, weights=ROWS))
    torch.testing.assert_close(logits(mixture.merge(W)), logits(first, weights=W), rtol=1e-4, atol=1e-4)


def test_a_folder_of_adapters_in_another_order_is_what_it_was_trained_for(tmp_path):
    record = tmp_path / "mopl.json"
    first = spread(LoraMixture(build(), 2, config=adapters(), record=["a", "c"]))
    first.save_pretrained(tmp_path)
    record.write_text(json.dumps({**json.loads(record.read_text()), "adapters": ["c", "a"]}))
    loaded = WeightedModel.from_pretrained(tmp_path, build())
    assert loaded.adapters == ["c", "a"]
    torch.testing.assert_close(logits(loaded, weights=ROWS), logits(first, weights=ROWS.flip(-1)))


REMEDY = "has adapters inside already; pass the base model without them"


def two():
    model = lora(build(), "a")
    model.add_adapter("b", adapters(init_lora_weights=False))
    return model


@pytest.mark.parametrize("switch", [lambda model: model.merge_adapter(["a", "b"]), peft.PeftModel.disable_adapter])
def test_adapters_that_are_merged_or_off_are_no_mixture(switch):
    model = two()
    entered = switch(model)
    if entered is not None:
        entered.__enter__()
    with pytest.raises(ValueError, match=r"are merged or off"):
        LoraMixture(model, 2)


@pytest.mark.parametrize(
    "switch",
    [
        lambda model: model.set_adapter("objective_1"),
        lambda model: model.merge_adapter(["objective_1"]),
        lambda model: model.delete_adapter("objective_1"),
    ],
    ids=["set", "merged", "deleted"],
)
def test_a_mixture_whose_adapters_somebody_switched_says_so(switch):
    mixture = lora_mixture()
    switch(mixture.model)
    calls = (
        lambda: mixture(IDS, weights=ROWS), lambda: mixture.merge(W),
        lambda: mixture.generate(IDS, torch.ones_like(IDS), weights=W, max_new_tokens=2),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(RuntimeError, match=r"merged adapters, or others active than objective_1, objective_2"):
            call()


@pytest.mark.parametrize("make", [lora_mixture, parameter_mixture])
def test_prompts_padded_on_the_right_are_not_continued(make):
    with pytest.raises(ValueError, match="padded on the right"):
        make().generate(IDS, torch.tensor([[1] * 6 + [0]] * 3), weights=ROWS)


def test_what_peft_switches_back_is_the_mixture_again():
    mixture = lora_mixture()
    before = logits(mixture, weights=ROWS)
    with mixture.model.disable_adapter():
        pass
    assert torch.equal(logits(mixture, weights=ROWS), before)


@pytest.mark.parametrize("names", [["0", "1"], ["q_proj", "v_proj"], ["lora_A", "lora_B"], ["base_layer", "weight"]])
def test_names_that_peft_would_not_save_under_are_refused(names):
    with pytest.raises(ValueError, match=r"PEFT would save .* give the objective, or the adapter, another name"):
        LoraMixture(build(), 2, config=adapters(), record=names)


@pytest.mark.parametrize("names", [["keys", "items"], ["", "a"]])
def test_names_that_no_module_can_have_are_refused(names):
    with pytest.raises(ValueError, match=r"cannot be called .*give the objective another name"):
        LoraMixture(build(), 2, config=adapters(), record=names)


@pytest.mark.parametrize("kind", ["dora", "copies", "tied names"])
def test_names_that_are_parts_of_one_another_are_saved_whole(kind, tmp_path):
    options = {"dora": {"use_dora": True}, "copies": {"modules_to_save": ["lm_head"]}}.get(kind, {})
    mixture = spread(LoraMixture(build(), 2, config=adapters(**options), record=["help", "helpful"]))
    mixture.save_pretrained(tmp_path)
    loaded = WeightedModel.from_pretrained(tmp_path, build())
    assert torch.equal(logits(loaded, weights=ROWS), logits(mixture, weights=ROWS))


def test_two_folders_on_one_base_model_are_refused_and_the_first_stays(tmp_path):
    made = {"prompt": conditioned(), "mixture": lora_mixture()}
    for name, model in made.items():
        model.save_pretrained(tmp_path / name)
    for first in made:
        base = build()
        one = WeightedModel.from_pretrained(tmp_path / first, base)
        before = logits(one, weights=ROWS)
        for second in made:
            with pytest.raises(ValueError, match=f"^the LlamaForCausalLM {REMEDY}"):  # it is no damaged file
                WeightedModel.from_pretrained(tmp_path / second, base)
        with pytest.raises(ValueError, match=REMEDY):
            LoraMixture(base, 2, config=adapters())
        assert torch.equal(logits(one, weights=ROWS), before)


def test_a_merged_copy_holds_nothing_of_the_mixture_it_was_trained_with():
    mixture = lora_mixture()
    mixture.gradient_checkpointing_enable()
    merged = mixture.merge(W)
    assert not merged.is_gradient_checkpointing and mixture.causal_lm.is_gradient_checkpointing
    held = [getattr(module, "_gradient_checkpointing_func", None) for module in merged.modules()]
    assert not any(isinstance(getattr(each, "keywords", {}).get("context_fn"), type(mixture.merge)) for each in held)
    torch.testing.assert_close(logits(copy.deepcopy(merged)), logits(mixture, weights=W), rtol=1e-3, atol=1e-3)


def test_a_mixture_of_parameters_takes_a_model_with_adapters():
    mixture = ParameterMixture(two(), 2, scope="lora_")
    assert logits(mixture, weights=ROWS).isfinite().all()


# ---------------------------------------------------------------- what was trained, and what is loaded into it


@pytest.mark.parametrize("options", [{"lora_alpha": 32}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 32}}])
def test_weights_of_an_adapter_with_another_scale_are_not_loaded(options, tmp_path):
    saved = lora_mixture()
    saved.save_pretrained(tmp_path)
    other = spread(LoraMixture(build(), 2, config=adapters(**options)))
    with pytest.raises(ValueError, match=f"has {next(iter(options))}=.* load it by from_pretrained"):
        other.load_weights(tmp_path)
    again = lora_mixture()
    again.load_weights(tmp_path)
    assert torch.equal(logits(again, weights=ROWS), logits(saved, weights=ROWS))


def test_weights_of_a_model_with_other_settings_are_not_loaded(tmp_path):
    conditioned(positions="paper").save_pretrained(tmp_path / "paper")
    with pytest.raises(ValueError, match="has positions 'paper' but the model 'hf'"):
        conditioned().load_weights(tmp_path / "paper")
    parameter_mixture(coefficients=KLWeightCoefficients(0.1), sets=3).save_pretrained(tmp_path / "kl")
    with pytest.raises(ValueError, match="has coefficients"):
        parameter_mixture(coefficients=KLWeightCoefficients(0.2), sets=3).load_weights(tmp_path / "kl")


def test_a_model_of_several_active_adapters_is_not_saved_as_one_of_them(tmp_path):
    base = two()
    base.base_model.set_adapter(["a", "b"])
    model = HyperPromptModel(base, prompt())
    with pytest.raises(ValueError, match="has the active adapters a, b, and a HyperPromptModel has one"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "mopl.json").exists()


def test_a_record_takes_sequences_and_numbers_of_any_library(tmp_path):
    record = TuningRecord(["a", "b"], beta=torch.tensor([0.25, 0.5]), concentration=np.float64(0.5))
    assert record == TuningRecord(("a", "b"), beta=[0.25, 0.5], concentration=0.5)
    mixture = spread(LoraMixture(build(), 2, config=adapters(), record=record))
    mixture.save_pretrained(tmp_path)
    mixture.load_weights(tmp_path)
    with pytest.raises(ValueError, match="give each objective a name of its own"):
        TuningRecord.of(["a", "a"], 2)
    for given in ("ab", TuningRecord):
        with pytest.raises(ValueError, match="must be a sequence of names"):
            given("ab") if given is TuningRecord else TuningRecord.of(given, 2)


@pytest.mark.parametrize("fused", [False, True])
def test_the_mixture_that_at_keeps_is_new_after_a_step_of_any_optimizer(fused):
    mixture = parameter_mixture().train()
    optimizer = torch.optim.AdamW(mixture.parameters(), lr=0.1, fused=fused)
    mixture(IDS, weights=W, labels=IDS).loss.backward()
    with mixture.at(W) as one:
        logits(one)
    optimizer.step()
    mixture.eval()
    with mixture.at(W) as one:
        found = logits(one)
    torch.testing.assert_close(found, logits(mixture, weights=W))


@both
def test_a_mixture_in_place_is_not_copied_saved_loaded_into_or_moved(make):
    mixture = make()
    before = copy.deepcopy(mixture).state_dict()
    with mixture.at(W):
        for call in (
            lambda: copy.deepcopy(mixture), lambda: pickle.dumps(mixture), mixture.state_dict, mixture.half,
            lambda: mixture.load_state_dict(before), nn.ModuleList([mixture]).state_dict,
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match=r"leave the `with mixture.at\(...\)` block first"):
                call()
    after = pickle.loads(pickle.dumps(mixture)).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_mixture_made_in_inference_mode_is_made_again_for_gradients():
    mixture = parameter_mixture()
    with torch.inference_mode(), mixture.at(W) as one:
        one(IDS)
    with mixture.at(W) as one:
        embeddings = one.get_input_embeddings()(IDS).detach().requires_grad_(True)
        one(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad is not None


def test_what_is_trained_further_is_what_was_trained(tmp_path):
    mixture = spread(ParameterMixture(build().requires_grad_(False), 2))
    mixture.save_pretrained(tmp_path)
    again = WeightedModel.from_pretrained(tmp_path, build().requires_grad_(False), trainable=True)
    trained = [{name for name, p in each.named_parameters() if p.requires_grad} for each in (mixture, again)]
    assert trained[0] == trained[1]
    own = WeightedModel.from_pretrained(tmp_path)
    assert not any(p.requires_grad for p in own.parameters())
    own.save_pretrained(tmp_path)
    own = WeightedModel.from_pretrained(tmp_path, trainable=True)
    assert {name for name, p in own.named_parameters() if p.requires_grad} == trained[0]
    half = build()
    half.model.requires_grad_(False)
    words = TextPromptModel(half, TextPrompt(("a", "b"), template="[{weights}] "), tokenizer(chat=True))
    words.save_pretrained(tmp_path / "words")
    again = WeightedModel.from_pretrained(tmp_path / "words", trainable=True)
    assert [name for name, p in again.named_parameters() if p.requires_grad] == ["model.lm_head.weight"]


def test_a_model_whose_biases_an_adapter_trains_is_no_reference():
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, bias="all")
    model = HyperPromptModel(peft.get_peft_model(build("gpt2"), config), prompt())
    with pytest.raises(ValueError, match="has bias='all'"), model.reference():
        pass
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], bias="all")  # of a model without any
    model = HyperPromptModel(peft.get_peft_model(build(), config), prompt())
    with model.reference():
        assert torch.equal(logits(model), logits(build()))


@pytest.mark.parametrize("weights", [W, ROWS], ids=["of all rows", "of each row"])
def test_coefficients_are_made_once_a_call_for_all_layers(weights, monkeypatch):
    model, made = lora_mixture(), []
    wanted = logits(model, weights=weights)
    for_rows = CallOfThread.for_rows
    monkeypatch.setattr(CallOfThread, "for_rows", lambda self, hidden: made.append(1) or for_rows(self, hidden))
    assert torch.equal(logits(model, weights=weights), wanted)
    assert len(made) == len(model.adapters)
    other = logits(model, weights=weights.flip(-1))
    assert len(made) == 2 * len(model.adapters) and not torch.equal(other, wanted)
    answers = model.generate(IDS, weights=weights, max_new_tokens=5, min_new_tokens=5)
    assert len(made) == 4 * len(model.adapters)  # of the prompts, and of all that follows
    assert torch.equal(answers, model.generate(IDS, weights=weights, max_new_tokens=5, min_new_tokens=5))
    with measuring():
        assert torch.equal(logits(model, weights=weights), logits(model, weights=weights.flip(-1)))


@pytest.mark.parametrize("kl_weight", [None, torch.tensor([0.3, 0.5, 0.9])], ids=["weights", "kl_weight"])
def test_gradients_of_what_coefficients_come_from_are_alike_with_checkpoints(kl_weight):
    rule = None if kl_weight is None else KLWeightCoefficients(0.1, anchor=False)
    model, found = lora_mixture(coefficients=rule).train(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        given = ROWS.clone() if kl_weight is None else kl_weight.clone()
        given.requires_grad_()
        keywords = {"weights": given} if kl_weight is None else {"weights": ROWS, "kl_weight": given}
        found += torch.autograd.grad(model(IDS, labels=IDS, **keywords).loss, given)
    assert found[0].abs().min() > 0
    torch.testing.assert_close(*found)


def test_what_is_kept_of_a_call_is_not_taken_where_a_model_is_measured():
    call, hidden = CallOfThread(), torch.zeros(3, 7, 2)
    call.held = {"coefficients": ROWS}, 3, 21, None

    def kept():
        return call.once("coefficients", hidden, lambda: call.for_rows(hidden))

    found = kept()
    with measuring():
        assert kept() is None
    assert kept() is found is not None
    call.held = {"coefficients": ROWS.flip(0)}, 3, 21, None
    assert torch.equal(kept()["coefficients"][:, 0], ROWS.flip(0))


def test_weights_of_packed_sequences_have_their_gradients_with_checkpoints():
    model, found = lora_mixture().train(), []
    packed = {"input_ids": IDS.reshape(1, -1), "position_ids": torch.arange(7).repeat(3)[None], "use_cache": False}
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        weights = ROWS.clone().requires_grad_()
        found += torch.autograd.grad(model(**packed, weights=weights).logits.logsumexp(-1).sum(), weights)
    assert found[0].abs().min() > 0
    torch.testing.assert_close(*found)
