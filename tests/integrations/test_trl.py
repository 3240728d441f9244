"""`MultiObjectiveDPOTrainer`: TRL's own loss and gradients on pairs, its arguments, and what it has no place for."""

import math

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")

from mopl.conditioning import HyperPrompt, HyperPromptModel
from mopl.experiments.response_loss import PairLoss
from mopl.integrations._data import batch_of
from mopl.integrations._pair_loss import pair_loss_of
from mopl.integrations.trl import MultiObjectiveDPOConfig, MultiObjectiveDPOTrainer
from mopl.language_models.head import is_fused
from mopl.losses import bradley_terry, listwise_dpo

CHARACTERS = ["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz .?!"]
ROWS = [
    {"prompt": "why is the sky blue? ", "chosen": "light scatters", "rejected": "no idea at all"},
    {"prompt": "how? ", "chosen": "like so", "rejected": "go away now"},
    {"prompt": "who are you? ", "chosen": "a model", "rejected": "me"},
    {"prompt": "when? ", "chosen": "at noon.", "rejected": "yes!"},
]
LABELLED = [{**row, "helpful": 1.0, "harmless": -1.0 if n % 2 else 0.5} for n, row in enumerate(ROWS)]
TYPES = [
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "nca_pair", "bco_pair", "sppo_hard",
    "apo_zero", "apo_down",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character, so that TRL and mopl find the same boundary of prompt and response."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: n for n, c in enumerate(CHARACTERS)}, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    inner.add_special_tokens(["<pad>", "<eos>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def tiny_llama(seed: int = 0, vocabulary: int = len(CHARACTERS)):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def with_adapter(model):
    torch.manual_seed(2)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def arguments(kind, folder, **options):
    defaults = dict(
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", per_device_train_batch_size=4, beta=0.3,
        bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False, max_steps=2, logging_steps=1,
    )  # fmt: skip
    return kind(str(folder), **{**defaults, **options})


@pytest.fixture(scope="module")
def theirs(tokenizer, tmp_path_factory):
    """TRL's trainer and its batch of all pairs."""
    trainer = trl.DPOTrainer(
        tiny_llama(), ref_model=tiny_llama(5), args=arguments(trl.DPOConfig, tmp_path_factory.mktemp("trl")),
        train_dataset=datasets.Dataset.from_list(ROWS), processing_class=tokenizer,
    )  # fmt: skip
    inputs = trainer.data_collator([trainer.train_dataset[number] for number in range(len(ROWS))])
    return trainer, inputs


def ours(tokenizer, folder, rows=ROWS, model=None, **options):
    own = {name: options.pop(name) for name in ("ref_model", "loss", "peft_config", "eval_dataset") if name in options}
    model = tiny_llama() if model is None else model
    trainer = MultiObjectiveDPOTrainer(
        model, args=arguments(MultiObjectiveDPOConfig, folder, **options),
        train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, **own,
    )  # fmt: skip
    inputs = trainer.data_collator([trainer.train_dataset[number] for number in range(len(rows))])
    return trainer, inputs


def step(trainer, inputs):
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def assert_equal_steps(found, expected, tolerance: float = 1e-5) -> None:
    assert abs(found[0] - expected[0]) <= tolerance * max(1.0, abs(expected[0]))
    assert found[1].keys() == expected[1].keys() and found[1]
    largest = max(float(value.abs().max()) for value in expected[1].values())
    assert largest > 1e-3
    for name, value in found[1].items():
        assert float((value - expected[1][name]).abs().max()) <= tolerance * max(1.0, largest), name


# ---------------------------------------------------------------- equal to TRL


def test_pairs_with_one_hot_labels_give_the_loss_and_gradients_of_trl(tokenizer, theirs, tmp_path):
    trainer, inputs = ours(tokenizer, tmp_path, ref_model=tiny_llama(5))
    assert trainer.objective.loss.function is listwise_dpo
    assert_equal_steps(step(trainer, inputs), step(*theirs), 1e-6)


def test_tokens_are_those_of_trl(tokenizer, theirs, tmp_path):
    _, inputs = ours(tokenizer, tmp_path, ref_model=tiny_llama(5))
    batch, _ = batch_of(inputs)
    expected = theirs[1]
    # TRL's batch is all chosen, then all rejected; here a list is followed by the next.
    rows = torch.cat([torch.arange(0, 8, 2), torch.arange(1, 8, 2)])
    assert torch.equal(batch.inputs["input_ids"][rows], expected["input_ids"])
    assert torch.equal((batch.inputs["labels"] != -100)[rows], expected["completion_mask"].bool())


@pytest.mark.parametrize("name", TYPES)
def test_every_loss_type_gives_the_loss_and_gradients_of_trl(tokenizer, theirs, tmp_path, name):
    options = {"label_smoothing": 0.1} if name in ("exo_pair", "robust") else {}
    trainer, inputs = ours(tokenizer, tmp_path, ref_model=tiny_llama(5), loss_type=[name], **options)
    reference = theirs[0]
    before = reference.loss_types, reference.label_smoothing
    reference.loss_types, reference.label_smoothing = [name], options.get("label_smoothing", 0.0)
    try:
        expected = step(*theirs)
    finally:
        reference.loss_types, reference.label_smoothing = before
    assert_equal_steps(step(trainer, inputs), expected)


def test_several_loss_types_with_weights_and_a_divergence_give_those_of_trl(tokenizer, theirs, tmp_path):
    options = {"loss_type": ["sigmoid", "hinge"], "loss_weights": [0.7, 0.2], "f_divergence_type": "js_divergence"}
    trainer, inputs = ours(tokenizer, tmp_path, ref_model=tiny_llama(5), **options)
    reference = theirs[0]
    before = reference.loss_types, reference.loss_weights, reference.f_divergence_type
    reference.loss_types, reference.loss_weights, reference.f_divergence_type = options.values()
    try:
        expected = step(*theirs)
    finally:
        reference.loss_types, reference.loss_weights, reference.f_divergence_type = before
    assert_equal_steps(step(trainer, inputs), expected)


@pytest.mark.parametrize("passed", [False, True])
def test_adapters_on_the_model_give_the_loss_and_gradients_of_trl(tokenizer, tmp_path, passed):
    """By default the reference of a PEFT model that was trained before is what it was, here as there."""
    options = {"ref_model": tiny_llama()} if passed else {}
    expected = trl.DPOTrainer(
        with_adapter(tiny_llama()), args=arguments(trl.DPOConfig, tmp_path),
        train_dataset=datasets.Dataset.from_list(ROWS), processing_class=tokenizer, **options,
    )  # fmt: skip
    inputs = expected.data_collator([expected.train_dataset[number] for number in range(len(ROWS))])
    trainer, own = ours(tokenizer, tmp_path, model=with_adapter(tiny_llama()), **options)
    assert (trainer.ref_model is None) != passed
    their = step(expected, inputs)
    assert (abs(their[0] - math.log(2)) < 1e-6) != passed
    assert_equal_steps(step(trainer, own), their)


def test_a_training_of_adapters_that_were_trained_before_ends_where_that_of_trl_ends(tokenizer, tmp_path):
    options = dict(max_steps=3, learning_rate=1e-2, optim="sgd", lr_scheduler_type="constant")
    expected = trl.DPOTrainer(
        with_adapter(tiny_llama()), args=arguments(trl.DPOConfig, tmp_path, **options),
        train_dataset=datasets.Dataset.from_list(ROWS), processing_class=tokenizer,
    )  # fmt: skip
    expected.train()
    trainer, _ = ours(tokenizer, tmp_path, model=with_adapter(tiny_llama()), **options)
    trainer.train()
    after = {name: p for name, p in trainer.model.named_parameters() if "lora" in name}
    start = dict(with_adapter(tiny_llama()).named_parameters())
    assert after and any(float((after[name] - start[name]).abs().max()) > 1e-4 for name in after)
    theirs = dict(expected.model.named_parameters())
    assert all(float((value - theirs[name]).abs().max()) < 1e-6 for name, value in after.items())


def test_a_training_of_three_steps_ends_where_that_of_trl_ends(tokenizer, tmp_path):
    options = dict(
        max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, optim="sgd",
        lr_scheduler_type="constant",
    )  # fmt: skip
    expected = trl.DPOTrainer(
        tiny_llama(), ref_model=tiny_llama(5), args=arguments(trl.DPOConfig, tmp_path, **options),
        train_dataset=datasets.Dataset.from_list(ROWS), processing_class=tokenizer,
    )  # fmt: skip
    expected.train()
    trainer, _ = ours(tokenizer, tmp_path, ref_model=tiny_llama(5), **options)
    trainer.train()
    start, after = dict(tiny_llama().named_parameters()), dict(trainer.model.named_parameters())
    for name, value in expected.model.named_parameters():
        assert float((after[name] - value).abs().max()) < 1e-6
    assert any(float((after[name] - start[name]).abs().max()) > 1e-4 for name in after)
    pairs = [[entry for entry in one.state.log_history if "loss" in entry] for one in (trainer, expected)]
    for mine, their in zip(*pairs, strict=True):
        assert abs(mine["loss"] - their["loss"]) < 1e-5
        assert abs(mine["accuracy/preference"] - their["rewards/accuracies"]) < 1e-6
        assert abs(mine["margin/preference"] - their["rewards/margins"]) < 1e-5


# ---------------------------------------------------------------- more than TRL


def test_two_objectives_with_weights_are_the_weighted_sum_of_two_dpo_losses(tokenizer, tmp_path):
    rows = [{**row, "objective_weights": [0.1 + 0.2 * n, 0.9 - 0.2 * n]} for n, row in enumerate(LABELLED)]
    trainer, inputs = ours(
        tokenizer,
        tmp_path,
        rows,
        ref_model=tiny_llama(5),
        objectives=["helpful", "harmless"],
        objective_beta=[0.3, 0.8],
    )
    _, outputs = trainer.compute_loss(trainer.model.eval(), inputs, return_outputs=True)
    difference = (outputs["scores"] - outputs["reference"]) @ torch.tensor([1.0, -1.0])
    sign = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [1.0, -1.0]])
    vector = -torch.nn.functional.logsigmoid(torch.tensor([[0.3, 0.8]]) * sign * difference[:, None])
    weights = torch.tensor([row["objective_weights"] for row in rows])
    torch.testing.assert_close(outputs["loss_vector"], vector)
    loss = trainer.compute_loss(trainer.model.eval(), inputs)
    torch.testing.assert_close(loss, (weights * vector).sum(1).mean())


def test_lists_train_with_the_defaults_of_dpo_config(tokenizer, tmp_path):
    """TRL's defaults are bf16 and gradient checkpointing."""
    rows = [
        {"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"], "hm", "ok then"][: 2 + n],
         "labels": {"helpful": [2, 0, 1, 3][: 2 + n], "harmless": [0, 1, 1, 0][: 2 + n]}}
        for n, row in enumerate(ROWS[:3])
    ]  # fmt: skip
    model = HyperPromptModel(tiny_llama(), HyperPrompt(2, 4, 2, 32))
    config = MultiObjectiveDPOConfig(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=2, learning_rate=1e-2,
        eval_strategy="steps", eval_steps=1, eval_points=3, save_strategy="no",
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = MultiObjectiveDPOTrainer(
        model, args=config, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )
    assert config.bf16 and is_fused(model.causal_lm)
    trainer.train()
    moved = [name for name, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[name])]
    assert "hyper_prompt.prefix" in moved and len(moved) >= len(before) - 1
    (first, *_) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert {"eval_helpful_loss@0.50,0.50", "eval_harmless_accuracy@1.00,0.00"} <= set(first)


def test_a_plain_dpo_config_and_peft_config_serve(tokenizer, tmp_path):
    trainer = MultiObjectiveDPOTrainer(
        tiny_llama(), args=arguments(trl.DPOConfig, tmp_path, gradient_checkpointing=True, learning_rate=1e-2),
        train_dataset=datasets.Dataset.from_list(ROWS), processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    assert trainer.objectives == ("preference",)
    trainer.train()
    trained = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert trained and all(float(p.detach().abs().max()) > 0 for p in trained)


def test_a_precomputed_reference_is_that_of_the_model_before_training(tokenizer, tmp_path):
    model = tiny_llama()
    trainer, inputs = ours(tokenizer, tmp_path, model=model, precompute_ref_log_probs=True, eval_dataset=ROWS)
    assert trainer.ref_model is None and trainer.eval_dataset.has_reference
    _, outputs = trainer.compute_loss(trainer.model.eval(), inputs, return_outputs=True)
    torch.testing.assert_close(outputs["reference"], outputs["scores"].detach())
    trainer.train()
    _, later = trainer.compute_loss(trainer.model.eval(), inputs, return_outputs=True)
    assert torch.equal(later["reference"], outputs["reference"])


def test_both_trainers_can_have_one_model(tokenizer, theirs, tmp_path):
    """TRL patches the model's forward too; each head answers its own keywords, whoever came first."""
    expected = step(*theirs)
    trainer, inputs = ours(tokenizer, tmp_path, model=theirs[0].model, ref_model=tiny_llama(5))
    assert_equal_steps(step(trainer, inputs), expected)
    assert_equal_steps(step(*theirs), expected)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ld_alpha": 1.5}, r"ld_alpha is 1.5 but must lie in \[0, 1\]"),
        ({"use_weighting": True, "loss_type": ["sft"]}, "no value for each pair that it could weigh"),
        ({"use_weighting": True, "disable_dropout": False, "neftune_noise_alpha": 5.0}, "pass disable_dropout=True"),
        ({"use_weighting": True, "neftune_noise_alpha": 5.0}, "leave neftune_noise_alpha out"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "a reference that moves is needed"),
        ({"activation_offloading": True}, "use gradient_checkpointing"),
        ({"router_aux_loss_coef": 0.5}, "router_aux_loss_coef is 0.5"),
        ({"loss_type": ["dpo"]}, r"loss_type \['dpo'\] is unknown"),
        ({"loss_type": ["hinge"], "label_smoothing": 0.1}, "label_smoothing is 0.1 but loss_type hinge has no use"),
        ({"label_smoothing": 0.1}, "labels 1 - ε and ε in place of 1 and 0 smooth 'sigmoid'"),
        ({"discopop_tau": 0.1}, "discopop_tau is 0.1 but loss_type"),
        (
            {"loss_type": ["sigmoid", "nca_pair"], "f_divergence_type": "js_divergence"},
            "nca_pair has only",
        ),
        ({"f_alpha_divergence_coef": 0.7}, "pass f_divergence_type='alpha_divergence'"),
        ({"loss_type": ["ipo"], "length_normalized": True}, "averages over tokens by itself"),
        ({"ld_alpha": 0.5, "padding_free": True}, "padding_free is True; leave one of them out"),
        ({"pad_token": "<none>"}, "not in the tokenizer's vocabulary"),
        ({"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy is 'batch_rebalance'"),
        ({"loss_type": ["ipo"], "list_loss": "plackett_luce"}, "pass one"),
        ({"model_init_kwargs": {"dtype": "float32"}}, "model is loaded already"),
    ],
)
def test_no_option_of_dpo_config_is_dropped(tokenizer, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ours(tokenizer, tmp_path, **options)


def test_a_loss_of_pairs_refuses_lists_and_skips_ties(tokenizer, tmp_path):
    rows = [{"prompt": "a", "responses": ["b", "c", "d"], "labels": {"helpful": [1, 2, 3]}}]
    with pytest.raises(ValueError, match="lists with more than two responses"):
        ours(tokenizer, tmp_path, rows, loss_type=["ipo"])
    scores, labels = torch.tensor([[0.2, -0.4]], requires_grad=True), torch.tensor([[[1.0, 1.0], [0.0, 2.0]]])
    vector = PairLoss(["hinge"])(scores, labels, lengths=torch.ones(1, 2), reference=None, beta=torch.tensor(0.5))
    expected = bradley_terry(scores[:, 1], scores[:, 0], beta=0.5, loss_type="hinge", reduction="none")
    assert vector[0, 0] == 0 and vector[0, 1] == expected[0, 0]
    vector[0, 0].backward()
    assert scores.grad is not None and not scores.grad.any()


def test_a_factor_on_the_loss_does_not_change_what_labels_mean(tokenizer, tmp_path):
    rows = [{**row, "good": labels} for row, labels in zip(ROWS, ([0.8, 0.2], [3, 1], [1, 1], [1, 0]), strict=True)]
    steps = [
        step(*ours(tokenizer, tmp_path, rows, ref_model=tiny_llama(5), objectives=["good"], loss_weights=weights))
        for weights in (None, [2.0])
    ]
    assert steps[1][0] == pytest.approx(2 * steps[0][0], rel=1e-6)
    for name, gradient in steps[0][1].items():
        torch.testing.assert_close(steps[1][1][name], 2 * gradient)


def test_options_reach_the_types_that_have_them(tmp_path):
    args = arguments(
        trl.DPOConfig, tmp_path, loss_type=["robust", "ipo"], label_smoothing=0.2, f_divergence_type="alpha_divergence",
        f_alpha_divergence_coef=0.7, loss_weights=[1.0, 0.5],
    )  # fmt: skip
    loss = pair_loss_of(args)
    assert loss is not None and list(loss.types) == ["robust", "ipo"] and list(loss.weights) == [1.0, 0.5]
    shared = {"f_divergence": "alpha_divergence", "f_alpha": 0.7}
    assert loss.options == {"robust": {"label_smoothing": 0.2, **shared}, "ipo": shared}
    smooth = pair_loss_of(arguments(trl.DPOConfig, tmp_path, label_smoothing=0.1, loss_type=["sigmoid", "exo_pair"]))
    assert smooth is not None and smooth.options == {"sigmoid": {}, "exo_pair": {"label_smoothing": 0.1}}
    assert pair_loss_of(arguments(trl.DPOConfig, tmp_path)) is None


def test_a_model_and_a_tokenizer_are_loaded_by_name(tokenizer, tmp_path):
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trainer = MultiObjectiveDPOTrainer(
        str(folder), ref_model=str(folder),
        args=arguments(MultiObjectiveDPOConfig, tmp_path, model_init_kwargs={"dtype": "float64"}),
        train_dataset=datasets.Dataset.from_list(ROWS),
    )  # fmt: skip
    assert trainer.model.dtype == torch.float64 and trainer.ref_model.dtype == torch.float64
    with pytest.raises(ValueError, match="processing_class is missing"):
        MultiObjectiveDPOTrainer(tiny_llama(), args=arguments(trl.DPOConfig, tmp_path), train_dataset=ROWS)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda: {"model": 3}, TypeError, "model is a int but must be a causal language model, or the name of one"),
        (lambda: {"model": None}, TypeError, "model is a NoneType but must be"),
        (lambda: {"model": tiny_llama().requires_grad_(False)}, ValueError, "no parameter .* is_trainable=True"),
        (lambda: {"model": tiny_llama(vocabulary=8)}, ValueError, r"row 1 has the token \d+ but .* embeddings of 8"),
        (lambda: {"peft_config": {"r": 4}}, TypeError, "peft_config is a dict but must be a peft.PeftConfig"),
        (lambda: {"processing_class": "gpt2"}, TypeError, "processing_class is a str but must be a tokenizer"),
        (lambda: {"loss": "sigmoid"}, TypeError, "loss is 'sigmoid' but must be a function .* list_loss takes names"),
        (lambda: {"args": {"beta": 0.1}}, TypeError, "args is a dict but must be a DPOConfig"),
        (lambda: {"args": transformers.TrainingArguments("out")}, TypeError, "must be a DPOConfig, such as mopl's"),
        (lambda: {"args": MultiObjectiveDPOConfig("out", objectives="a")}, TypeError, r"list of names: \['a'\]"),
    ],
)
def test_what_is_of_another_kind_is_named(tokenizer, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        given = {"model": tiny_llama(), "processing_class": tokenizer, **change()}
        given.setdefault("args", arguments(MultiObjectiveDPOConfig, tmp_path, max_steps=1))
        MultiObjectiveDPOTrainer(train_dataset=datasets.Dataset.from_list(ROWS), **given).train()


def test_log_probabilities_of_the_reference_that_are_not_finite_are_refused(tokenizer, tmp_path):
    rows = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": math.nan} for row in ROWS]
    with pytest.raises(ValueError, match=r"ref_rejected_logps of row 1 are \[-1.0, nan\] but must be finite"):
        ours(tokenizer, tmp_path, rows)


def test_a_path_is_a_name_and_a_processor_has_a_tokenizer(tokenizer, tmp_path):
    class Processor(transformers.ProcessorMixin):
        def __init__(self):
            self.tokenizer = tokenizer

        def __call__(self, text):  # always a batch, as processors of text and images have it
            return {"input_ids": [tokenizer(text)["input_ids"]]}

    tiny_llama().save_pretrained(tmp_path / "model")
    trainer, inputs = ours(Processor(), tmp_path, model=tmp_path / "model")
    assert trainer.data_collator.collator.pad_id == trainer.model.config.pad_token_id == tokenizer.pad_token_id
    assert_equal_steps(step(trainer, inputs), step(*ours(tokenizer, tmp_path)), 1e-7)
