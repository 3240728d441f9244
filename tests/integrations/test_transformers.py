"""`MultiObjectiveTrainer`: what one step does, however it is split, interrupted, measured or stored."""

import copy
import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import DISTRIBUTED, launch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

from mopl import losses
from mopl.conditioning import HyperPrompt, HyperPromptModel, sample_weights
from mopl.experiments.cos_dpo import scalarized
from mopl.integrations._data import Example, batch_of, examples_of, labels_of_pair
from mopl.integrations._objective import Objective
from mopl.integrations._scores import Scored
from mopl.integrations._settings import ObjectiveArguments
from mopl.integrations.transformers import MultiObjectiveConfig, MultiObjectiveTrainer
from mopl.language_models.collate import ListCollator
from mopl.language_models.data import DataError, PreferenceData, PreferenceList
from mopl.language_models.head import fuse, score_sequences
from mopl.language_models.readers import load_preferences
from mopl.language_models.tokenization import ReadReport, TokenizedData, TokenizedList
from mopl.losses import listwise_dpo

OBJECTIVES = ("helpful", "harmless")
VOCABULARY = 61


def tiny_llama(seed: int = 0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def conditioned(*, lora: bool = False, dropout: float = 0.0, **prompt):
    """A model whose answers depend on w already, so that a wrong w shows."""
    model = tiny_llama()
    if lora:
        torch.manual_seed(2)
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=dropout,
            task_type="CAUSAL_LM",
        )  # fmt: skip
        model = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    hyper_prompt = HyperPrompt(2, 4, 2, 32, **prompt)
    with torch.no_grad():
        for parameter in hyper_prompt.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return HyperPromptModel(model, hyper_prompt)


def token_lists(count: int = 12, sizes=(4, 2, 3), objectives: int = 2, missing: bool = False) -> TokenizedData:
    """Ragged lists of random tokens with labels that are no permutation of one another."""
    draw = np.random.default_rng(3)
    lists = []
    for number in range(count):
        size = sizes[number % len(sizes)]
        labels = draw.integers(0, 4, (objectives, size)).astype(np.float32)
        labels[:, 0] += 1  # every list has label mass
        if missing and number % 2:
            labels[0, size - 1] = np.nan
        responses = tuple(draw.integers(3, VOCABULARY, draw.integers(2, 6)) for _ in range(size))
        lists.append(TokenizedList(draw.integers(3, VOCABULARY, draw.integers(2, 5)), responses, labels, number))
    return TokenizedData(tuple(lists), OBJECTIVES[:objectives], "random", ReadReport("random"))


def arguments(folder, **options):
    defaults = dict(
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", per_device_train_batch_size=4,
        per_device_eval_batch_size=5, learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", max_grad_norm=1e6,
        logging_steps=1, max_steps=3, beta=0.5, dataloader_pin_memory=False,
    )  # fmt: skip
    return MultiObjectiveConfig(str(folder), **{**defaults, **options})


def make(folder, model=None, data=None, **options):
    named = ("loss", "eval_dataset", "data_collator", "ref_model", "peft_config", "processing_class", "eval_weights")
    own = {name: options.pop(name) for name in (*named, "compute_metrics") if name in options}
    return MultiObjectiveTrainer(
        conditioned() if model is None else model,
        arguments(folder, **options),
        train_dataset=token_lists() if data is None else data,
        **own,
    )


def inputs_of(trainer, numbers):
    return trainer.data_collator([trainer.train_dataset[number] for number in numbers])


def trainable(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(actual, expected, tolerance: float) -> None:
    assert actual.keys() == expected.keys() and actual
    for name, value in actual.items():
        scale = max(float(expected[name].abs().max()), 1e-3)
        assert float((value - expected[name]).abs().max()) <= tolerance * scale, name


def assert_moved(after, before) -> None:
    assert all(not torch.equal(after[name], before[name]) for name in before)


# ---------------------------------------------------------------- one step


def test_the_loss_is_that_of_mopl_losses_on_scores_and_weights_of_the_step(tmp_path):
    trainer = make(tmp_path)
    trainer.model.train()
    inputs = inputs_of(trainer, range(6))
    loss, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
    batch, _ = batch_of(inputs)
    weights = sample_weights(2, 6, seed=trainer.args.seed, step=0)
    torch.testing.assert_close(outputs["weights"], weights)
    with torch.no_grad():
        scores = score_sequences(trainer.model, batch.inputs, weights=weights[batch.index[:, 0]]).scores
        with trainer.model.reference():
            reference = score_sequences(trainer.model, batch.inputs).scores
    total = 0.0
    for number in range(6):
        rows = batch.index[:, 0] == number
        labels = batch.labels[number, :, : int(rows.sum())]
        total += float(
            listwise_dpo(
                scores[rows][None], labels[None], reference=reference[rows][None], beta=0.5,
                weights=weights[number][None],
            )
        )  # fmt: skip
    assert abs(float(loss.detach()) - total / 6) < 1e-5
    assert not torch.allclose(scores, reference)


def test_a_batch_with_per_sample_w_equals_the_samples_one_by_one(tmp_path):
    trainer = make(tmp_path, conditioned(lora=True))
    trainer.model.train()
    together, outputs = trainer.compute_loss(trainer.model, inputs_of(trainer, range(5)), return_outputs=True)
    together.backward()
    expected, total = gradients(trainer.model), 0.0
    assert len({tuple(row.tolist()) for row in outputs["weights"]}) == 5
    trainer.model.zero_grad()
    for number in range(5):
        example = copy.copy(trainer.train_dataset[number])
        object.__setattr__(example, "weights", outputs["weights"][number].numpy())
        alone = trainer.compute_loss(trainer.model, trainer.data_collator([example])) / 5
        alone.backward()
        total += float(alone.detach())
    assert abs(total - float(together.detach())) < 1e-6 * max(1.0, abs(total))
    assert_close(gradients(trainer.model), expected, 1e-4)


def test_several_objectives_and_lists_of_four_take_one_forward_and_one_backward(tmp_path):
    trainer = make(tmp_path, data=token_lists(4, (4,)), reference_free=True)
    calls = {"forward": [], "backward": 0}
    inner = trainer.model.causal_lm.model

    def forward(module, args, kwargs, output):
        calls["forward"].append((torch.is_grad_enabled(), kwargs["inputs_embeds"].shape[0]))

    def backward(module, gradient_in, gradient_out):
        calls["backward"] += 1

    inner.register_forward_hook(forward, with_kwargs=True)
    inner.layers[0].register_full_backward_hook(backward)
    trainer.model.train()
    trainer.compute_loss(trainer.model, inputs_of(trainer, range(3))).backward()
    assert calls == {"forward": [(True, 12)], "backward": 1}


def test_the_reference_costs_one_forward_without_gradient_and_none_if_precomputed(tmp_path):
    seen = []

    def count(trainer):
        inner = trainer.model.causal_lm.model
        hook = inner.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
        seen.clear()
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, inputs_of(trainer, range(4)))
        loss.backward()
        hook.remove()
        return float(loss), gradients(trainer.model)

    loss, found = count(make(tmp_path))
    assert seen == [False, True]
    again, same = count(make(tmp_path, precompute_ref_log_probs=True, precompute_ref_batch_size=5))
    assert seen == [True]
    assert abs(loss - again) < 1e-6
    assert_close(same, found, 1e-5)


@pytest.mark.parametrize("name", ["listwise_dpo", "plackett_luce", "pairwise_logistic", "lambda_loss", "approx_ndcg"])
def test_every_list_loss_takes_part_by_name_and_as_a_function(tmp_path, name):
    trainer = make(tmp_path, list_loss=name, cosine_penalty=0.1)
    function = functools.partial(getattr(losses, name))
    other = make(tmp_path, loss=function, cosine_penalty=0.1)
    inputs = inputs_of(trainer, range(5))
    loss, outputs = trainer.compute_loss(trainer.model.eval(), inputs, return_outputs=True)
    batch, _ = batch_of(inputs)
    vector = function(
        outputs["scores"], batch.labels, reference=outputs["reference"], beta=0.5, mask=batch.mask,
        reduction="none",
    )  # fmt: skip
    torch.testing.assert_close(outputs["loss_vector"], vector)
    value = losses.scalarize.linear(vector, outputs["weights"])
    value = value + 0.1 * losses.scalarize.cosine_penalty(vector, outputs["weights"])
    assert abs(float(loss) - float(value.mean())) < 1e-6
    assert float(other.compute_loss(other.model.eval(), inputs)) == float(loss)


def test_a_loss_that_gives_one_number_is_refused(tmp_path):
    trainer = make(tmp_path, loss=lambda scores, labels, **_: scores.mean())
    with pytest.raises(ValueError, match=r"loss gave a tensor of shape \(\) but must give \(2, 2\)"):
        trainer.compute_loss(trainer.model, inputs_of(trainer, range(2)))


def test_rewards_are_refused_for_shares_before_a_trainer_is_made(tmp_path):
    data = token_lists()
    data.lists[4].labels[1, 0] = -2.0
    with pytest.raises(ValueError, match=r"labels of \S+ hold -2 \(row 5\).*normalize='softmax'"):
        make(tmp_path, data=data)
    make(tmp_path, data=data, list_loss="plackett_luce")


def test_partly_labelled_lists_count_with_the_labelled_responses_alone(tmp_path):
    trainer = make(tmp_path, data=token_lists(6, (4,), missing=True), list_loss="plackett_luce")
    assert trainer.objective.loss.by_objective
    inputs = inputs_of(trainer, [1])
    _, outputs = trainer.compute_loss(trainer.model.eval(), inputs, return_outputs=True)
    batch, _ = batch_of(inputs)
    scores, reference = outputs["scores"], outputs["reference"]
    expected = [
        losses.plackett_luce(
            scores[:, :k], batch.labels[:, j, :k], reference=reference[:, :k], beta=0.5, reduction="none"
        )
        for j, k in ((0, 3), (1, 4))
    ]
    torch.testing.assert_close(outputs["loss_vector"], torch.cat(expected, 1))


def test_packed_and_padded_batches_give_the_same_loss_and_gradients(tmp_path):
    results = []
    for collator in (
        ListCollator(),
        ListCollator(padding_side="left", pad_to_multiple_of=8),
        ListCollator(packed=True),
    ):
        trainer = make(tmp_path, data_collator=collator)
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, inputs_of(trainer, range(5)))
        loss.backward()
        results.append((float(loss), gradients(trainer.model)))
    for loss, found in results[1:]:
        assert abs(loss - results[0][0]) < 1e-5
        assert_close(found, results[0][1], 1e-3)


def test_the_loss_is_computed_in_float32_outside_autocast_under_mixed_precision(tmp_path):
    seen = []

    def spy(scores, labels, *, reference, **options):
        seen.append((scores.dtype, reference.dtype, torch.is_autocast_enabled(scores.device.type)))
        return listwise_dpo(scores, labels, reference=reference, **options)

    trainer = make(tmp_path, bf16=True, loss=spy, max_steps=1)
    embedded = []
    trainer.model.causal_lm.model.layers[0].mlp.register_forward_hook(lambda m, i, o: embedded.append(o.dtype))
    trainer.train()
    assert seen == [(torch.float32, torch.float32, False)]
    assert torch.bfloat16 in embedded  # the forward itself was in mixed precision
    trainer.model.eval()
    with torch.autocast("cpu", torch.bfloat16):  # as callers do who bring a loop of their own
        loss = trainer.compute_loss(trainer.model, inputs_of(trainer, range(3)))
    assert seen[-1] == (torch.float32, torch.float32, False) and loss.dtype == torch.float32


@pytest.mark.parametrize("lora", [False, True])
def test_a_compiled_model_is_its_own_reference(tmp_path, lora):
    """Adapters that were trained before, and a prompt around a model that is frozen."""
    model = conditioned(lora=True).model if lora else conditioned()
    if not lora:
        model.causal_lm.requires_grad_(False)
    trainer = make(tmp_path, model)
    inputs = inputs_of(trainer, range(4))
    expected = trainer.compute_loss(trainer.model.eval(), inputs)
    with torch.compiler.set_stance("force_eager"):
        found = trainer.compute_loss(torch.compile(trainer.model), inputs)
    assert torch.equal(found, expected)


def test_autocast_is_off_after_a_training_in_bf16_whose_reference_is_a_copy(tmp_path):
    make(tmp_path, tiny_llama(), bf16=True, max_steps=1).train()
    assert not torch.is_autocast_enabled("cpu")


def test_policy_and_reference_round_alike_in_an_evaluation_before_training(tmp_path):
    trainer = make(tmp_path, tiny_llama(), bf16=True, eval_dataset=token_lists())
    for step in range(2):
        inputs = inputs_of(trainer, range(5))
        found = trainer.evaluate()
        trainer.model.eval()
        with torch.no_grad():
            _, outputs = trainer.compute_loss(trainer.model, trainer._prepare_inputs(inputs), return_outputs=True)
        assert torch.equal(outputs["scores"], outputs["reference"]) and found["eval_loss"] > 0, step


@pytest.mark.parametrize("name", ["linear", "chebyshev", "smooth_chebyshev"])
def test_scalarizers_turn_the_loss_vector_and_w_into_one_number(tmp_path, name):
    trainer = make(tmp_path, scalarization=name, cosine_penalty=0.3, cosine_sign="cosmos")
    inputs = inputs_of(trainer, range(4))
    loss, outputs = trainer.compute_loss(trainer.model.eval(), inputs, return_outputs=True)
    vector, weights = outputs["loss_vector"], outputs["weights"]
    value = getattr(losses.scalarize, name)(vector, weights)
    value = value + 0.3 * losses.scalarize.cosine_penalty(vector, weights, "cosmos")
    torch.testing.assert_close(loss, value.mean())


@pytest.mark.parametrize("name", ["linear", "chebyshev", "smooth_chebyshev"])
def test_an_objective_without_labels_in_a_list_has_no_part_in_its_scalarised_loss(name):
    vector = torch.tensor([[0.02, 0.0], [-0.3, 0.0], [0.0, 0.0], [0.3, 0.2]], requires_grad=True)
    mask = torch.tensor([[1, 0], [1, 0], [0, 0], [1, 1]]).bool()
    found = scalarized(vector, torch.full((4, 2), 0.5), mask=mask, how=name)
    both = getattr(losses.scalarize, name)(torch.tensor([[0.3, 0.2]]), 0.5)
    torch.testing.assert_close(found, torch.tensor([0.01, -0.15, 0.0, float(both)]))
    (gradient,) = torch.autograd.grad(found.sum(), vector)
    assert gradient[:3].tolist() == [[0.5, 0.0], [0.5, 0.0], [0.0, 0.0]] and gradient[3].sum() > 0
    token = np.array([1])
    labels = np.array([[1, 0], [np.nan, np.nan]], dtype=np.float32)
    batch = ListCollator()([TokenizedList(token, (token, token), labels)])
    objective = Objective(ObjectiveArguments(scalarization=name), lambda *_, **__: torch.tensor([[-0.3, -0.3]]))
    ones = torch.ones(1, 2)
    measured = objective(Scored(ones, ones, ones), batch, weights=ones / 2, beta=ones, reference=None)
    assert measured.vector.tolist() == [[pytest.approx(-0.3), 0.0]] and float(measured.value) == pytest.approx(-0.15)


# ---------------------------------------------------------------- the step's batch


@pytest.mark.parametrize("model", ["conditioned", "plain"])
def test_an_update_does_not_depend_on_how_the_batch_is_split(tmp_path, model):
    """12 lists in steps of 8: the second step of the epoch has 4 only, in parts of other sizes."""
    results, logs = [], []
    for size, parts in ((8, 1), (4, 2), (2, 4), (3, 3)):
        trainer = make(
            tmp_path, conditioned() if model == "conditioned" else tiny_llama(), per_device_train_batch_size=size,
            gradient_accumulation_steps=parts, max_steps=2, disable_dropout=True,
        )  # fmt: skip
        before = trainable(trainer.model)
        trainer.train()
        results.append(trainable(trainer.model))
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
        assert_moved(results[-1], before)
    for found in results[1:3]:
        assert_close(found, results[0], 1e-4)
    for entries in logs[1:3]:
        for entry, expected in zip(entries, logs[0], strict=True):
            for name in ("loss", "loss/helpful", "accuracy/harmless", "margin/helpful", "log_ratio"):
                assert abs(entry[name] - expected[name]) < 1e-4, name
    with pytest.raises(AssertionError):  # nine lists in a step are another batch
        assert_close(results[3], results[0], 1e-4)


def test_a_ragged_last_part_weighs_as_many_lists_as_it_has(tmp_path):
    """5 lists in parts of 4 and 1: a mean over parts would weigh the last list four times."""
    results = []
    for size, parts in ((5, 1), (4, 2), (1, 5)):
        trainer = make(
            tmp_path, data=token_lists(5), per_device_train_batch_size=size, gradient_accumulation_steps=parts,
            max_steps=1,
        )  # fmt: skip
        trainer.train()
        results.append(trainable(trainer.model))
    for found in results[1:]:
        assert_close(found, results[0], 1e-4)


def test_evaluation_between_steps_changes_nothing(tmp_path):
    results = []
    for strategy in ("no", "steps"):
        trainer = make(
            tmp_path, eval_strategy=strategy, eval_steps=1, eval_dataset=token_lists(4), gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
        )  # fmt: skip
        trainer.train()
        results.append(trainable(trainer.model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(tmp_path, lora):
    options = dict(
        max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=1e-2,
        gradient_accumulation_steps=2, per_device_train_batch_size=2, disable_dropout=False,
    )  # fmt: skip
    whole = make(tmp_path / "whole", conditioned(lora=lora, dropout=0.2), **options)
    whole.train()
    resumed = make(tmp_path / "resumed", conditioned(lora=lora, dropout=0.2), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    expected, found = trainable(whole.model), trainable(resumed.model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [e["loss"] for e in resumed.state.log_history if "loss" in e] == [
        e["loss"] for e in whole.state.log_history if "loss" in e
    ]


def test_weights_come_from_seed_step_and_place_and_not_from_the_global_generator(tmp_path):
    trainer = make(tmp_path)
    first = trainer.trade_offs.draw(3, 2, 4)[0]
    torch.manual_seed(999)
    whole = trainer.trade_offs.draw(3, 0, 8)[0]
    assert torch.equal(first, whole[2:6])
    assert not torch.equal(whole, trainer.trade_offs.draw(4, 0, 8)[0])
    step = make(tmp_path, weights_per="step").trade_offs.draw(3, 2, 4)[0]
    assert torch.equal(step, step[:1].expand(4, -1)) and torch.equal(step[0], whole[0])


def test_an_unconditioned_model_has_uniform_weights_unless_others_are_given(tmp_path):
    assert make(tmp_path, tiny_llama()).trade_offs.draw(0, 0, 2)[0].tolist() == [[0.5, 0.5]] * 2
    fixed = make(tmp_path, tiny_llama(), objective_weights=[0.25, 0.75]).trade_offs.draw(7, 3, 1)[0]
    assert fixed.tolist() == [[0.25, 0.75]]


# ---------------------------------------------------------------- betas


def test_a_model_conditioned_on_beta_sees_it_and_its_loss_the_normalised_one(tmp_path):
    trainer = make(tmp_path, conditioned(takes_beta=True), beta_low=0.5, beta_high=2.0)
    _, beta, seen = trainer.trade_offs.draw(0, 0, 5)
    assert bool(((seen >= 0.5) & (seen <= 2.0)).all()) and seen.unique().numel() == 10
    torch.testing.assert_close(beta, seen / seen.sum(-1, keepdim=True))
    before = trainable(trainer.model)
    trainer.train()
    assert_moved(trainable(trainer.model), before)
    assert trainer.model.record.beta == (0.5, 2.0)
    assert trainer.evaluate(token_lists(3))["eval_loss"] > 0


def test_betas_of_objectives_and_of_rows_enter_the_loss(tmp_path):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c", "objective_beta": [0.3, 2.0], "objective_weights": [0.9, 0.1]},
        {"prompt": "d", "chosen": "ef", "rejected": "g", "objective_beta": [1.0, 0.1], "objective_weights": [0.2, 0.8]},
    ]
    for row in rows:
        row |= {"helpful": 1.0, "harmless": [0.0, 2.0]}
    trainer = make(
        tmp_path, tiny_llama(), data=rows, objectives=list(OBJECTIVES), processing_class=byte_tokenizer(),
        ref_model=tiny_llama(5),
    )  # fmt: skip
    _, outputs = trainer.compute_loss(trainer.model.eval(), inputs_of(trainer, range(2)), return_outputs=True)
    ratio = outputs["scores"] - outputs["reference"]
    assert float(ratio.abs().min()) > 1e-3
    difference = ratio[:, 0] - ratio[:, 1]
    beta = torch.tensor([[0.3, 2.0], [1.0, 0.1]])
    sign = torch.tensor([1.0, -1.0])
    expected = -torch.nn.functional.logsigmoid(beta * sign * difference[:, None])
    torch.testing.assert_close(outputs["loss_vector"], expected)
    torch.testing.assert_close(outputs["weights"], torch.tensor([[0.9, 0.1], [0.2, 0.8]]))
    each = make(tmp_path, tiny_llama(), objective_beta=[0.3, 2.0]).trade_offs.draw(0, 0, 3)[1]
    torch.testing.assert_close(each, torch.tensor([[0.3, 2.0]]))


# ---------------------------------------------------------------- evaluation


def test_evaluation_measures_every_point_of_the_grid_and_leaves_out_dropout(tmp_path):
    trainer = make(
        tmp_path, conditioned(lora=True, dropout=0.5), eval_dataset=token_lists(7), disable_dropout=False,
        eval_weights=[[1.0, 0.0], [0.3, 0.7]], label_names=["labels"], per_device_eval_batch_size=3,
    )  # fmt: skip
    trainer.model.train()
    found = trainer.evaluate()
    again = trainer.evaluate()
    assert all(again[name] == value for name, value in found.items() if "@" in name)
    model = trainer.model.eval()
    inputs = inputs_of_data(trainer, trainer.eval_dataset)
    batch, _ = batch_of(inputs)
    values = []
    for point in ([1.0, 0.0], [0.3, 0.7]):
        weights = torch.tensor([point]).expand(7, -1)
        with torch.no_grad():
            scores, _ = lists_of(model, batch, weights)
            with model.reference(adapters=True):
                reference, _ = lists_of(model, batch, None)
        vector = listwise_dpo(scores, batch.labels, reference=reference, beta=0.5, mask=batch.mask, reduction="none")
        at = ",".join(f"{x:.2f}" for x in point)
        assert abs(found[f"eval_helpful_loss@{at}"] - float(vector[:, 0].mean())) < 1e-5
        ratio, correct, pairs = scores - reference, 0, 0
        for b in range(7):
            for i in range(4):
                for k in range(4):
                    if batch.labels[b, 1, i] > batch.labels[b, 1, k] and bool(batch.mask[b, i] & batch.mask[b, k]):
                        pairs += 1
                        correct += int(ratio[b, i] > ratio[b, k])
        assert abs(found[f"eval_harmless_accuracy@{at}"] - correct / pairs) < 1e-6
        values.append(float((vector * weights).sum(1).mean()))
        assert abs(found[f"eval_loss@{at}"] - values[-1]) < 1e-5
    assert values[0] != values[1]
    assert abs(found["eval_loss"] - sum(values) / 2) < 1e-5


def inputs_of_data(trainer, data):
    return trainer.data_collator([data[number] for number in range(len(data))])


def lists_of(model, batch, weights):
    from mopl.integrations._scores import Conditions, Scoring

    found = Scoring()(model, batch, None if weights is None else Conditions(True, None), weights)
    return found.scores, found.lengths


def test_accuracy_is_one_half_where_the_model_is_its_reference_but_not_in_the_count_of_trl(tmp_path):
    model = tiny_llama()
    trainer = make(tmp_path, model, eval_dataset=token_lists(5), disable_dropout=True)
    with torch.no_grad():
        found = trainer.evaluate()
    assert found["eval_helpful_accuracy"] == found["eval_harmless_accuracy"] == 0.5
    assert found["eval_rewards/accuracies"] == 0.0
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["accuracy/helpful"] == log["accuracy/harmless"] == 0.5 and log["rewards/accuracies"] == 0.0


def test_user_metrics_get_losses_and_accuracies_of_all_points(tmp_path):
    shapes = []

    def metrics(prediction):
        shapes.extend([part.shape for part in prediction.predictions] + [prediction.label_ids.shape])
        return {"mine": 1.5}

    data = {"a": token_lists(4), "b": token_lists(3)}
    trainer = make(tmp_path, conditioned(), eval_dataset=data, compute_metrics=metrics)
    found = trainer.evaluate()
    assert found["eval_a_mine"] == found["eval_b_mine"] == 1.5
    assert shapes == [(4, 5, 2), (4, 5, 2), (4, 2), (3, 5, 2), (3, 5, 2), (3, 2)]
    assert {"eval_a_helpful_loss@0.25,0.75", "eval_b_harmless_accuracy"} <= set(found)


def test_points_of_a_grid_have_names_of_their_own_and_tied_lists_no_accuracy(tmp_path):
    def metrics(prediction):
        accuracies = prediction.predictions[1]
        assert np.isnan(accuracies[0]).all() and not np.isnan(accuracies[1]).any()
        return {"mine": float(np.nanmean(accuracies))}

    tied, other = token_lists(2).lists
    tied = TokenizedList(tied.prompt, tied.responses, np.ones_like(tied.labels), tied.index)
    ranks = np.tile(np.arange(len(other.responses), dtype=np.float32), (2, 1))
    other = TokenizedList(other.prompt, other.responses, ranks, other.index)
    data = TokenizedData((tied, other), OBJECTIVES, "random", ReadReport("random"))
    points = [[0.501, 0.499], [0.504, 0.496], [0.6, 0.4]]
    found = make(
        tmp_path, conditioned(), eval_dataset=data, eval_weights=points, compute_metrics=metrics,
    ).evaluate()  # fmt: skip
    names = {name.partition("@")[2] for name in found if name.startswith("eval_loss@")}
    assert names == {"0.501,0.499", "0.504,0.496", "0.600,0.400"}
    each = [found[f"eval_{name}_accuracy"] for name in OBJECTIVES]
    assert found["eval_mine"] == pytest.approx(sum(each) / 2)


def test_sets_that_are_measured_without_a_training_are_read_with_the_objectives_of_the_first(tmp_path):
    first = PreferenceList("a", ("b", "c"), {"helpful": (1, 0), "harmless": (0, 3)})
    second = PreferenceList("a", ("b", "c"), {"harmless": (0, 2), "brief": (5, 4), "helpful": (1, 0)})

    def measuring(**sets):
        return MultiObjectiveTrainer(
            tiny_llama(), arguments(tmp_path), eval_dataset=sets, processing_class=byte_tokenizer()
        )

    trainer = measuring(one=PreferenceData([first]), other=PreferenceData([second]))
    assert trainer.objectives == OBJECTIVES
    np.testing.assert_array_equal(trainer.eval_dataset["other"].lists[0].tokens.labels, [[1, 0], [0, 2]])
    with pytest.raises(ValueError, match="no list of data has labels for brief"):
        measuring(one=PreferenceData([second]), other=PreferenceData([first]))
    with pytest.raises(ValueError, match="there is no data set to read the objectives from"):
        measuring()


@pytest.mark.parametrize("adapters", [False, True])
def test_a_model_without_weights_is_measured_at_those_it_trains_for_and_shows_no_grid(adapters: bool, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    options = {"peft_config": config} if adapters else {}
    data = {"eval_dataset": token_lists(4)}
    found = make(tmp_path, tiny_llama(), **data, **options).evaluate()
    assert {name.partition("@")[2] for name in found if "@" in name} == {"0.50,0.50"}
    trainer = make(tmp_path, tiny_llama(), objective_weights=[0.2, 0.8], **data, **options)
    found = trainer.evaluate()
    assert {name.partition("@")[2] for name in found if "@" in name} == {"0.20,0.80"}
    assert abs(found["eval_loss"] - 0.2 * found["eval_helpful_loss"] - 0.8 * found["eval_harmless_loss"]) < 1e-5
    for several in ({"eval_points": 3}, {"eval_weights": [[1.0, 0.0], [0.0, 1.0]]}):
        with pytest.raises(ValueError, match=f"{next(iter(several))} asks for . trade-offs, but the model takes no"):
            make(tmp_path, tiny_llama(), **data, **several)
    at = make(tmp_path, tiny_llama(), eval_weights=[[1.0, 0.0]], **data).evaluate()
    assert abs(at["eval_loss"] - at["eval_helpful_loss@1.00,0.00"]) < 1e-5


def test_the_best_model_is_loaded_at_the_end_and_a_saved_one_answers_the_same(tmp_path):
    trainer = make(
        tmp_path, conditioned(lora=True), eval_dataset=token_lists(4), max_steps=3, save_strategy="steps",
        save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, learning_rate=30.0,
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    losses_seen = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_metric == min(losses_seen)
    base = fuse(tiny_llama())
    loaded = HyperPromptModel.from_pretrained(best, base)
    assert loaded.record.objectives == OBJECTIVES and loaded.record.beta == 0.5 and loaded.record.concentration == 1.0
    ids = torch.randint(3, VOCABULARY, (2, 6))
    w = torch.tensor([[0.2, 0.8], [1.0, 0.0]])
    with torch.no_grad():
        expected = trainer.model.eval()(ids, weights=w).logits
        torch.testing.assert_close(loaded(ids, weights=w).logits, expected)
    assert json.loads((best / "mopl.json").read_text())["objectives"] == list(OBJECTIVES)


# ---------------------------------------------------------------- models and references


def test_the_reference_of_a_plain_model_is_a_frozen_copy(tmp_path):
    trainer = make(tmp_path, tiny_llama())
    expected = trainable(tiny_llama())
    trainer.train()
    assert_close(dict(trainer.ref_model.named_parameters()), expected, 0.0)
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())
    assert_moved(trainable(trainer.model), expected)


def test_adapters_are_added_and_their_reference_is_the_model_without_them(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    trainer = make(tmp_path, tiny_llama(), peft_config=config, gradient_checkpointing=True)
    assert trainer.ref_model is None
    _, outputs = trainer.compute_loss(trainer.model.eval(), inputs_of(trainer, range(3)), return_outputs=True)
    plain = make(tmp_path, tiny_llama())
    _, base = plain.compute_loss(plain.model.eval(), inputs_of(plain, range(3)), return_outputs=True)
    torch.testing.assert_close(outputs["reference"], base["scores"])
    assert not torch.allclose(outputs["scores"], base["scores"])
    before = trainable(trainer.model)
    trainer.train()
    assert_moved(trainable(trainer.model), before)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    results = []
    for checkpointing in (False, True):
        trainer = make(tmp_path, conditioned(lora=True), gradient_checkpointing=checkpointing, max_steps=2)
        trainer.train()
        results.append(trainable(trainer.model))
    assert_close(results[1], results[0], 1e-5)


def test_a_reference_free_loss_has_none(tmp_path):
    trainer = make(tmp_path, tiny_llama(), reference_free=True, length_normalized=True)
    assert trainer.ref_model is None
    inputs = inputs_of(trainer, range(3))
    _, outputs = trainer.compute_loss(trainer.model.eval(), inputs, return_outputs=True)
    batch, _ = batch_of(inputs)
    assert outputs["reference"] is None
    lengths = (batch.inputs["labels"] != -100).sum(-1)
    average = outputs["scores"].clone()
    average[batch.index[:, 0], batch.index[:, 1]] /= lengths
    vector = listwise_dpo(average, batch.labels, beta=0.5, mask=batch.mask, reduction="none")
    torch.testing.assert_close(outputs["loss_vector"], vector)


# ---------------------------------------------------------------- data


def byte_tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    characters = ["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz .?!"]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: n for n, c in enumerate(characters)}, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    inner.add_special_tokens(["<pad>", "<eos>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


ROWS = [
    {"prompt": "why ", "chosen": "so it is", "rejected": "no", "helpful": 2.0, "harmless": -1.0, "note": "x"},
    {"prompt": "how ", "chosen": "like this", "rejected": "go", "helpful": None, "harmless": 0.0, "note": "y"},
    {"prompt": "who ", "chosen": "me", "rejected": "you", "helpful": -0.5, "harmless": None, "note": "z"},
]


def test_label_columns_of_a_trl_data_set_survive_remove_unused_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    trainer = make(
        tmp_path, tiny_llama(), data=datasets.Dataset.from_list(ROWS), objectives=list(OBJECTIVES),
        processing_class=byte_tokenizer(), remove_unused_columns=True,
    )  # fmt: skip
    batch, _ = batch_of(next(iter(trainer.get_eval_dataloader(trainer.train_dataset))))
    assert batch.labels.tolist() == [[[2, 0], [0, 1]], [[0, 0], [1, 1]], [[0, 0.5], [0, 0]]]
    assert batch.objective_mask.tolist() == [[True, True], [False, True], [True, False]]
    trainer.train()


def test_labels_of_a_pair_come_from_two_columns_from_two_numbers_or_from_a_signed_one():
    row = {"score_chosen": 7.0, "score_rejected": 8, "both": [1, 0], "signed": -3, "gone": float("nan"), "bad": "x"}
    assert labels_of_pair(row, "score") == (7.0, 8)
    assert labels_of_pair(row, "both") == (1, 0)
    assert labels_of_pair(row, "signed") == (0.0, 3.0)
    assert labels_of_pair(row, "gone") == (None, None)
    assert labels_of_pair(row, "preference") == (1.0, 0.0)
    for kind in (np.array, torch.tensor):  # as rows of a data set with a format, and rows of one's own, have them
        arrays = {name: kind(value) for name, value in row.items() if name != "bad"}
        for name in ("score", "both", "signed", "gone"):
            assert labels_of_pair(arrays, name) == labels_of_pair(row, name)
    row |= {"safer": False, "safest": np.False_}  # as a number it would be a tie, though rejected is meant
    refused = (
        ("bad", "bad is 'x'"),
        ("other", "needs a column other, or other_chosen"),
        ("safer", "-1 where rejected"),
        ("safest", "-1 where rejected"),
    )
    for name, message in refused:
        with pytest.raises(ValueError, match=message):
            labels_of_pair(row, name)


def test_an_objective_without_a_label_in_all_of_the_training_data_is_refused(tmp_path):
    rows = [row | {"helpful": value} for row, value in zip(ROWS[:2], (None, float("nan")), strict=True)]
    with pytest.raises(ValueError, match=r"objective 'helpful' has no label in any of the 2 training lists"):
        make(tmp_path, tiny_llama(), data=rows, objectives=list(OBJECTIVES), processing_class=byte_tokenizer())
    with pytest.raises(TypeError, match=r"objective_weights is '0\.7,0\.3' but must be a list; pass 2 numbers"):
        make(tmp_path, tiny_llama(), objective_weights="0.7,0.3")


def test_a_column_preference_is_a_label_only_where_it_is_named():
    row = {"prompt": "why ", "chosen": "a", "rejected": "b"}

    def labels(objectives=None, **columns):
        found = examples_of([row | columns], processing_class=byte_tokenizer(), objectives=objectives)
        return found.lists[0].tokens.labels.tolist()

    assert labels() == [[1, 0]] and labels(["preference"], preference=-2) == [[0, 2]]
    assert labels(preference_chosen=0.8, preference_rejected=0.2) == pytest.approx(np.float32([[0.8, 0.2]]))
    with pytest.raises(ValueError, match=r"preference is 0; pass objectives=\['preference'\] if it is a label"):
        labels(preference=0)


def test_every_form_of_data_gives_the_same_lists():
    tokenizer = byte_tokenizer()
    lists = [
        PreferenceList("why ", ("a", "bc", "d"), {"helpful": (0, 1, 2), "harmless": (2, None, 0)}),
        PreferenceList("how ", ("e", "f"), {"helpful": (1, 0), "harmless": (0, 1)}),
    ]
    rows = [item.to_json() for item in lists]
    expected = examples_of(PreferenceData(lists), processing_class=tokenizer)
    for data in (lists, rows, load_preferences(rows)):
        found = examples_of(data, processing_class=tokenizer)
        assert found.objectives == expected.objectives and len(found) == 2 and found.width == 3
        for left, right in zip(found.lists, expected.lists, strict=True):
            assert np.array_equal(left.tokens.labels, right.tokens.labels, equal_nan=True)
            assert all(np.array_equal(a, b) for a, b in zip(left.tokens.responses, right.tokens.responses, strict=True))
    swapped = examples_of(lists, processing_class=tokenizer, objectives=("harmless", "helpful"))
    assert swapped[1].tokens.labels.tolist() == [[0, 1], [1, 0]]


def test_reference_columns_replace_the_reference(tmp_path):
    rows = [{**row, "ref_chosen_logps": -3.0 - n, "ref_rejected_logps": -1.0} for n, row in enumerate(ROWS)]
    trainer = make(tmp_path, tiny_llama(), data=rows, objectives=list(OBJECTIVES), processing_class=byte_tokenizer())
    assert trainer.ref_model is None
    _, outputs = trainer.compute_loss(trainer.model, inputs_of(trainer, range(3)), return_outputs=True)
    assert outputs["reference"].tolist() == [[-3, -1], [-4, -1], [-5, -1]]


def test_columns_beside_rows_belong_to_the_lists_that_the_row_made():
    def message(text, role="prompter", replies=(), rank=None):
        return {"role": role, "text": text, "rank": rank, "replies": list(replies)}

    def ranked(text, deeper=()):
        return message(text, replies=[message("x", "assistant", deeper, 0), message("y", "assistant", rank=1)])

    trees = [message("a"), ranked("b", [ranked("c")]), ranked("d")]
    rows = [{"message_tree_id": n, "prompt": tree, "objective_beta": [n + 1.0]} for n, tree in enumerate(trees)]
    found = examples_of(rows, processing_class=byte_tokenizer()).lists
    assert [float(example.beta[0]) for example in found] == [2.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "responses": ["b", "c", "d"], "labels": {"good": [1, 2, 3]}},
        {"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": 1, "safer_response_id": 0},
    ],
)
def test_log_probabilities_of_chosen_and_rejected_are_for_pairs(row):
    known = [{**row, "ref_chosen_logps": -5.0, "ref_rejected_logps": -6.0}]
    with pytest.raises(ValueError, match="row 1 has ref_chosen_logps, ref_rejected_logps but no columns chosen and"):
        examples_of(known, processing_class=byte_tokenizer())
    assert examples_of([row], processing_class=byte_tokenizer()).lists[0].reference is None
    item = examples_of([row], processing_class=byte_tokenizer()).lists[0].tokens
    with pytest.raises(ValueError, match=r"row 1 has 1 log-probabilities of the reference but \d responses"):
        Example(item, reference=np.zeros(1, dtype=np.float32))


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches is False"),
        ({"include_for_metrics": ["inputs"]}, "include_for_metrics"),
        ({"list_loss": "dpo"}, "list_loss is 'dpo'"),
        ({"beta_low": 0.5}, "beta_high is None"),
        ({"beta_low": 0.5, "beta_high": 1.0}, "for a model conditioned on β"),
        ({"objective_beta": [0.1]}, "objective_beta has 1 number but there are 2"),
        ({"objective_weights": [0.4, 0.4]}, "does not sum to 1"),
        ({"beta": 0.0}, "beta is .* must be positive"),
        ({"objectives": ["helpful", "brief"]}, "objectives are"),
        ({"eval_weights": [[1.0, 1.0]]}, "does not sum to 1"),
        ({"data": ["text"]}, "rows of the data set are str"),
        ({"data": {"train": 3}}, "the data set is a dict"),
        ({"data": ROWS}, "processing_class is missing"),
        ({"data": iter(ROWS)}, "can be read only once"),
        ({"data": 3}, "must be PreferenceData, TokenizedData"),
        ({"data_collator": dict}, "must be a mopl ListCollator"),
    ],
)
def test_mistakes_are_told_before_training(tmp_path, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(tmp_path, **options)


def test_other_mistakes_say_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="there is no data set to read the objectives from"):
        MultiObjectiveTrainer(conditioned(), arguments(tmp_path))
    with pytest.raises(ValueError, match="name the same objectives"):
        make(tmp_path, data=token_lists(objectives=1))
    with pytest.raises(ValueError, match="pass the box beta_low and beta_high"):
        make(tmp_path, conditioned(takes_beta=True))
    model = tiny_llama()
    with pytest.raises(ValueError, match="one object"):
        make(tmp_path, model, ref_model=model)
    with pytest.raises(ValueError, match="wrap the causal language model"):
        make(tmp_path, peft_config=peft.LoraConfig(r=2))
    trainer = make(tmp_path, tiny_llama(), precompute_ref_log_probs=True, max_steps=1)
    trainer.train()
    with pytest.raises(ValueError, match="after training has begun"):
        trainer.evaluate(token_lists(3))
    with pytest.raises(ValueError, match="no checkpoint of a HyperPromptModel"):
        make(tmp_path / "none").train(resume_from_checkpoint=str(tmp_path))
    with pytest.raises(DataError, match="no label column"):
        examples_of(ROWS, processing_class=byte_tokenizer(), objectives=("brief",))
    with pytest.raises(DataError, match=r"wrong structure \(row 2: not a row of pairs"):
        examples_of([ROWS[0], {**ROWS[0], "chosen": 5}], processing_class=byte_tokenizer())


def test_arguments_come_from_a_command_line(tmp_path):
    parser = transformers.HfArgumentParser(MultiObjectiveConfig)
    words = ["--output_dir", str(tmp_path), "--objectives", "a", "b", "--beta", "0.3", "--list_loss", "plackett_luce"]
    (config,) = parser.parse_args_into_dataclasses([*words, "--objective_beta", "0.1", "0.2", "--use_cpu", "True"])
    assert config.objectives == ["a", "b"] and config.beta == 0.3 and config.objective_beta == [0.1, 0.2]


def test_the_package_of_integrations_imports_no_trainer():
    code = "import sys, mopl.integrations; assert not {'transformers', 'trl', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ---------------------------------------------------------------- two processes


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    script = DISTRIBUTED / "multi_objective_trainer.py"
    spec = importlib.util.spec_from_file_location("multi_objective_trainer", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    done = launch(2, str(script), str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    for name in module.MODELS:
        expected = module.run(name, tmp_path / "one", processes=1)
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
        for found in ranks:
            assert_close(found["parameters"], expected["parameters"], 1e-4)
            assert found["metrics"].keys() == expected["metrics"].keys()
            for metric, value in expected["metrics"].items():
                assert abs(found["metrics"][metric] - value) < 1e-4, metric
        for parameter, value in ranks[0]["parameters"].items():
            assert torch.equal(value, ranks[1]["parameters"][parameter])
