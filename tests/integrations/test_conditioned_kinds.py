"""The trainers with every kind of model that takes weights: its reference, its checkpoints, evaluation, rows."""

import copy

import numpy as np
import peft
import pytest
import tiny_language_models as tiny
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

pytest.importorskip("accelerate")

from mopl.conditioning import (
    HyperPromptModel,
    LoraMixture,
    ParameterMixture,
    TextPrompt,
    TextPromptModel,
    WeightedModel,
    check_weights,
    sample_weights,
)
from mopl.conditioning.causal_lm import is_peft
from mopl.integrations._data import batch_of
from mopl.integrations.transformers import MultiObjectiveConfig, MultiObjectiveTrainer
from mopl.language_models.head import fuse, score_sequences
from mopl.language_models.tokenization import ReadReport, TokenizedData, TokenizedList

OBJECTIVES = ("helpful", "harmless")


class ShiftedEmbeddings(WeightedModel):
    """A fifth kind: w adds a vector to the embedding of every token."""

    KIND, WEIGHTS_FILE = "ShiftedEmbeddings", "shift.safetensors"

    def __init__(self, model, record=OBJECTIVES):
        super().__init__()
        self.model, self.record = model, tiny.TuningRecord.of(record, len(OBJECTIVES))
        model.requires_grad_(False)
        self.shift = nn.Parameter(0.3 * torch.randn(2, tiny.HIDDEN, generator=torch.Generator().manual_seed(4)))
        self.causal_lm.get_input_embeddings().register_forward_hook(self._add)
        self._added = None

    def _add(self, module, inputs, output):
        return output if self._added is None else output + self._added[:, None]

    def forward(self, *args, weights=None, **kwargs):
        if not self.is_reference:
            weights = check_weights(self._unless_fixed(weights=weights)["weights"], 2)
            self._added = weights.float().expand(len(kwargs["input_ids"]), 2) @ self.shift
        try:
            return self.model(*args, **kwargs)
        finally:
            self._added = None

    def _state(self):
        return {"shift": self.shift}

    def _described(self):
        return {"base_model": None}

    @classmethod
    def _load(cls, folder, config, model, *, trainable, **options):
        made = cls(model, tiny.TuningRecord.read(config))
        made.load_weights(folder)
        return made


def tokenizer():
    """One that knows letters and digits, so that words of other weights are other tokens."""
    letters = sorted(set(f"[{', '.join(OBJECTIVES)}]:.0123456789"))
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*tiny.SPECIAL, *letters])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens(tiny.SPECIAL)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def shaken(model):
    """The model with what it trains away from its start, each parameter its own way."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def adapters(**options):
    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


def make_model(kind: str, dropout: float = 0.0):
    model = tiny.build()
    torch.manual_seed(5)
    if kind.startswith("lora mixture"):
        mixture = LoraMixture(fuse(model), 2, config=adapters(lora_dropout=dropout), record=OBJECTIVES)
        return shaken(mixture) if "trained" in kind else mixture
    if kind.startswith("parameter mixture"):
        mixture = ParameterMixture(model, 2, scope="attention", record=OBJECTIVES)
        return shaken(mixture) if "trained" in kind else mixture
    if kind.startswith("text"):
        inside = peft.get_peft_model(model, adapters(lora_dropout=dropout)) if "adapters" in kind else model
        return TextPromptModel(inside, TextPrompt(OBJECTIVES, "[{weights}] "), tokenizer())
    if kind == "prompt":
        return HyperPromptModel(model, tiny.prompt(), record=OBJECTIVES)
    return ShiftedEmbeddings(model)


VARYING = ("lora mixture, trained", "parameter mixture, trained")
KINDS = ["lora mixture", "parameter mixture", *VARYING, "text", "text, adapters", "own"]


def data(count: int = 10) -> TokenizedData:
    draw = np.random.default_rng(3)
    lists = []
    for number in range(count):
        size = 2 + number % 3
        labels = draw.integers(0, 4, (2, size)).astype(np.float32)
        labels[:, 0] += 1
        responses = tuple(draw.integers(6, tiny.VOCABULARY, draw.integers(2, 6)) for _ in range(size))
        prompt = np.concatenate([[1], draw.integers(6, tiny.VOCABULARY, draw.integers(1, 4))])
        lists.append(TokenizedList(prompt, responses, labels, number))
    return TokenizedData(tuple(lists), OBJECTIVES, "random", ReadReport("random"))


def make(folder, model, **options):
    own = {name: options.pop(name) for name in ("ref_model", "eval_dataset", "peft_config") if name in options}
    defaults = dict(
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", per_device_train_batch_size=4,
        per_device_eval_batch_size=5, learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", max_grad_norm=1e6,
        logging_steps=1, max_steps=3, beta=0.5, dataloader_pin_memory=False,
    )  # fmt: skip
    args = MultiObjectiveConfig(str(folder), **{**defaults, **options})
    return MultiObjectiveTrainer(model, args, train_dataset=data(), processing_class=tokenizer(), **own)


def trainable(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def scores_of(model, batch, **options):
    """Scores of each sequence alone, padding cut off."""
    found = []
    for row, (list_, place) in enumerate(batch.index.tolist()):
        kept = batch.inputs["attention_mask"][row].bool()
        inputs = {name: value[row : row + 1, kept] for name, value in batch.inputs.items()}
        own = {name: value[list_] for name, value in options.items()}
        found.append((list_, place, score_sequences(model, inputs, **own).scores[0]))
    table = torch.zeros(batch.mask.shape)
    for list_, place, score in found:
        table[list_, place] = score
    return table


@pytest.mark.parametrize("kind", KINDS)
def test_policy_and_reference_are_those_of_single_rows_and_the_reference_stays(kind, tmp_path):
    """The reference is what the model was when training began: not conditioned, or the sets at the w of the row."""
    policy = make_model(kind)
    start = copy.deepcopy(policy).requires_grad_(False)  # what is trained whole has no reference()
    fuse(start.causal_lm)
    trainer = make(tmp_path, policy)
    before = trainable(policy)
    for _ in range(2):  # at the start, and when it was trained
        policy.eval()
        inputs = trainer.data_collator([trainer.train_dataset[number] for number in range(5)])
        with torch.no_grad():
            _, outputs = trainer.compute_loss(policy, inputs, return_outputs=True)
            batch, _ = batch_of(inputs)
            weights = outputs["weights"]
            torch.testing.assert_close(outputs["scores"], scores_of(policy, batch, weights=weights))
            if kind in VARYING:
                expected = scores_of(start, batch, weights=weights)
            elif kind == "parameter mixture":
                expected = scores_of(fuse(tiny.build()), batch)
            else:
                with start.reference():
                    expected = scores_of(start, batch)
                torch.testing.assert_close(expected, scores_of(fuse(tiny.build()), batch))
            torch.testing.assert_close(outputs["reference"], expected)
        if trainer.state.global_step == 0:
            expected_w = sample_weights(2, 5, seed=trainer.args.seed, step=0)
            torch.testing.assert_close(weights, expected_w)
            trainer.train()
    after = trainable(policy)
    assert before.keys() == after.keys() and all(not torch.equal(after[name], before[name]) for name in after)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(kind, tmp_path):
    options = dict(
        max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=1e-2,
        gradient_accumulation_steps=2, per_device_train_batch_size=2, disable_dropout=False,
    )  # fmt: skip
    whole = make(tmp_path / "whole", make_model(kind, dropout=0.2), **options)
    whole.train()
    resumed = make(tmp_path / "resumed", make_model(kind, dropout=0.2), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    expected, found = trainable(whole.model), trainable(resumed.model)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_model_is_loaded_and_its_folder_answers_the_same(kind, tmp_path):
    trainer = make(
        tmp_path, make_model(kind), eval_dataset=data(4), max_steps=2, save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, learning_rate=3.0, eval_points=3,
    )  # fmt: skip
    trainer.train()
    measured = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_metric == min(entry["eval_loss"] for entry in measured)
    at = [measured[0][f"eval_helpful_loss@{w}"] for w in ("1.00,0.00", "0.50,0.50", "0.00,1.00")]
    assert len(set(at)) == 3, at
    folder = trainer.state.best_model_checkpoint
    loaded = WeightedModel.from_pretrained(folder, fuse(tiny.build()))
    assert type(loaded) is type(trainer.model) and loaded.record.objectives == OBJECTIVES
    assert loaded.record.beta == 0.5 and loaded.record.concentration == 1.0
    ids, w = torch.randint(6, tiny.VOCABULARY, (2, 6)), torch.tensor([[0.2, 0.8], [1.0, 0.0]])
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=ids, weights=w).logits, trainer.model.eval()(input_ids=ids, weights=w).logits
        )


@pytest.mark.parametrize("kind", ["lora mixture", "parameter mixture, trained", "text, adapters"])
def test_an_update_does_not_depend_on_how_the_batch_is_split(kind, tmp_path):
    results = []
    for size, parts in ((8, 1), (2, 4)):
        trainer = make(
            tmp_path, make_model(kind), per_device_train_batch_size=size, gradient_accumulation_steps=parts, max_steps=2
        )
        trainer.train()
        results.append(trainable(trainer.model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora mixture", "text, adapters"])
def test_recomputed_activations_have_the_weights_of_their_rows(kind, tmp_path):
    results = []
    for recompute in (False, True):
        trainer = make(tmp_path, make_model(kind), gradient_checkpointing=recompute, max_steps=2)
        trainer.train()
        results.append(trainable(trainer.model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["text, adapters", "lora mixture, trained"])
def test_packed_rows_have_words_and_mixtures_of_their_own(kind, tmp_path):
    results = []
    for packed in (False, True):
        trainer = make(tmp_path, make_model(kind), padding_free=packed, max_steps=2)
        trainer.train()
        results.append(trainable(trainer.model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-5)


def test_mixtures_of_parameters_refuse_packed_rows(tmp_path):
    with pytest.raises(ValueError, match=r"one trade-off for each row.*padding_free=False"):
        make(tmp_path, make_model("parameter mixture"), padding_free=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_that_does_not_depend_on_w_is_computed_once(kind, tmp_path):
    if kind in VARYING:
        with pytest.raises(ValueError, match="depend on the weights w; leave precompute_ref_log_probs out"):
            make(tmp_path, make_model(kind), precompute_ref_log_probs=True)
        return
    results = []
    for once in (False, True):
        trainer = make(tmp_path, make_model(kind), precompute_ref_log_probs=once)
        assert (trainer.train_dataset.lists[0].reference is not None) == once
        trainer.train()
        results.append(trainable(trainer.model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-6)


def test_a_reference_that_was_passed_takes_the_weights_of_the_rows(tmp_path):
    policy, reference = make_model("prompt"), make_model("lora mixture, trained")
    alone = copy.deepcopy(reference)
    fuse(alone.causal_lm)
    trainer = make(tmp_path, policy, ref_model=reference)
    inputs = trainer.data_collator([trainer.train_dataset[number] for number in range(4)])
    with torch.no_grad():
        _, outputs = trainer.compute_loss(trainer.model.eval(), inputs, return_outputs=True)
        batch, _ = batch_of(inputs)
        torch.testing.assert_close(outputs["reference"], scores_of(alone.eval(), batch, weights=outputs["weights"]))


def test_what_a_kind_cannot_do_is_said(tmp_path):
    from mopl.conditioning import KLWeightCoefficients

    rule = KLWeightCoefficients(0.1)
    with pytest.raises(ValueError, match=r"conditioned on the KL weight.*mopl clp"):
        make(tmp_path, ParameterMixture(tiny.build(), 2, coefficients=rule, record=OBJECTIVES))
    with pytest.raises(ValueError, match="wrap the causal language model"):
        make(tmp_path, make_model("lora mixture"), peft_config=adapters())
    with pytest.raises(ValueError, match="name the same objectives"):
        other = TextPrompt(("objective_1", "objective_2"), "[{weights}] ")
        make(tmp_path, TextPromptModel(tiny.build(), other, tokenizer()))
    with pytest.raises(ValueError, match=r"pass gradient_checkpointing=False, or take a LoraMixture"):
        make(tmp_path, make_model("parameter mixture"), gradient_checkpointing=True)
    assert is_peft(make_model("lora mixture").model)


@pytest.mark.parametrize(("kind", "name"), [
    ("lora mixture", "self"), ("lora mixture, trained", "the adapters as training began"),
    ("parameter mixture", "the model as training began"), ("text", "the model as training began"),
    ("text, adapters", "self"), ("own", "self"),
])  # fmt: skip
def test_the_record_names_the_reference(kind, name, tmp_path):
    assert make(tmp_path, make_model(kind)).model.record.reference == name


@pytest.mark.parametrize("kind", [*KINDS, "prompt"])
def test_the_optimizer_has_what_is_trained_once_and_nothing_that_is_frozen(kind, tmp_path):
    trainer = make(tmp_path, make_model(kind), weight_decay=0.1, optim="adamw_torch")
    groups = trainer.create_optimizer().param_groups
    found = [id(parameter) for group in groups for parameter in group["params"]]
    expected = {id(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad}
    assert len(found) == len(set(found)) and set(found) == expected
    assert {group["weight_decay"] for group in groups} == {0.1, 0.0}


def test_a_mixture_around_a_model_whose_head_is_not_fused_yet_trains_alike(tmp_path):
    results = []
    for base in (tiny.build(), fuse(tiny.build())):
        torch.manual_seed(5)
        trainer = make(tmp_path, LoraMixture(base, 2, config=adapters(), record=OBJECTIVES), max_steps=2)
        trainer.train()
        results.append(trainable(trainer.model))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[1][name], value) for name, value in results[0].items())


def test_a_reference_for_other_objectives_or_without_packed_rows_is_refused(tmp_path):
    reference = make_model("lora mixture, trained")
    with pytest.raises(ValueError, match="a ParameterMixture has one trade-off for each row"):
        make(tmp_path, make_model("prompt"), ref_model=make_model("parameter mixture"), padding_free=True)
    with pytest.raises(ValueError, match="depend on the weights w; leave precompute_ref_log_probs out"):
        make(tmp_path, make_model("prompt"), ref_model=reference, precompute_ref_log_probs=True)
    reference.record = tiny.TuningRecord.of(OBJECTIVES[::-1], 2)
    with pytest.raises(ValueError, match="the ref_model is for harmless, helpful but the data has helpful, harmless"):
        make(tmp_path, make_model("prompt"), ref_model=reference)


# ---------------------------------------------------------------- the trainer for TRL

PAIRS = [
    {"prompt": "help: ", "chosen": "n ples", "rejected": "afe.", "helpful": 1.0, "harmless": -1.0},
    {"prompt": "mas", "chosen": "rm ha", "rejected": "0.25", "helpful": 0.5, "harmless": 1.0},
    {"prompt": "full ", "chosen": "1, 2", "rejected": "help les", "helpful": 1.0, "harmless": 0.3},
    {"prompt": "shame", "chosen": "harm", "rejected": "ful ", "helpful": -0.5, "harmless": 1.0},
]


def make_dpo(folder, model, rows=PAIRS, **options):
    pytest.importorskip("trl")
    from mopl.integrations.trl import MultiObjectiveDPOConfig, MultiObjectiveDPOTrainer

    own = {name: options.pop(name) for name in ("ref_model", "eval_dataset") if name in options}
    defaults = dict(
        report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, beta=0.3,
        save_strategy="no", per_device_train_batch_size=2, per_device_eval_batch_size=4, learning_rate=1e-2,
        logging_steps=1, max_steps=4, dataloader_pin_memory=False, eval_points=3, objectives=list(OBJECTIVES),
    )  # fmt: skip
    args = MultiObjectiveDPOConfig(str(folder), **{**defaults, **options})
    return MultiObjectiveDPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer(), **own)


def outputs_on(trainer, examples):
    with torch.no_grad():
        inputs = trainer.data_collator([examples[number] for number in range(len(examples))])
        return trainer.compute_loss(trainer.model.eval(), inputs, return_outputs=True)[1]


@pytest.mark.parametrize("kind", [*KINDS, "prompt"])
def test_pairs_train_in_the_trainer_for_trl_are_resumed_saved_and_measured(kind, tmp_path):
    options = dict(save_strategy="steps", save_steps=2, eval_dataset=PAIRS)
    whole = make_dpo(tmp_path / "whole", make_model(kind), **options)
    if kind in ("lora mixture", "parameter mixture", *VARYING):  # each is its own reference at the w of the row
        start = outputs_on(whole, whole.train_dataset)
        torch.testing.assert_close(start["reference"], start["scores"])
        assert abs(whole.evaluate()["eval_rewards/margins"]) < 1e-5  # at each point of the grid
    whole.train()
    measured = whole.evaluate()
    assert len({measured[f"eval_harmless_loss@{w}"] for w in ("1.00,0.00", "0.50,0.50", "0.00,1.00")}) == 3
    assert 0 <= measured["eval_rewards/accuracies"] <= 1
    resumed = make_dpo(tmp_path / "resumed", make_model(kind), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected, found = trainable(whole.model), trainable(resumed.model)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    whole.save_model(str(tmp_path / "saved"))
    loaded = WeightedModel.from_pretrained(tmp_path / "saved", fuse(tiny.build()))
    ids, w = torch.randint(6, tiny.VOCABULARY, (2, 6)), torch.tensor([[0.2, 0.8], [1.0, 0.0]])
    with torch.no_grad():
        answers = [model.eval()(input_ids=ids, weights=w).logits for model in (loaded, whole.model)]
    torch.testing.assert_close(*answers)


@pytest.mark.parametrize("kind", [*KINDS, "prompt"])
def test_what_transformers_cannot_push_between_is_refused(kind, tmp_path):
    with pytest.raises(ValueError, match=r"hub_strategy is 'every_save'.* pass hub_strategy='end'"):
        make_dpo(tmp_path, make_model(kind), push_to_hub=True, hub_model_id="a/b", hub_token="c")


@pytest.mark.parametrize("kind", VARYING)
def test_data_without_columns_of_the_reference_have_it_at_their_weights(kind, tmp_path):
    known = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in PAIRS]
    trainer = make_dpo(tmp_path, make_model(kind), known)
    found = outputs_on(trainer, trainer._prepared(PAIRS))
    torch.testing.assert_close(found["reference"], found["scores"])
    assert torch.equal(outputs_on(trainer, trainer.train_dataset)["reference"], torch.tensor([[-1.0, -2.0]] * 4))
    trainer = make_dpo(tmp_path, make_model(kind), known, precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="depend on the weights w; leave precompute_ref_log_probs out"):
        trainer.evaluate(PAIRS)
