"""Training of language models: what a step sees, what it costs, what an interruption costs, and what comes out."""

import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

from mopl import steering
from mopl._rows import check_rows
from mopl.alignment import AlignConfig, align, tuned
from mopl.alignment.evaluate import HeldOut, evaluation_of, reference_point
from mopl.alignment.methods import (
    AlignSource,
    ListScores,
    ResponseLoss,
    score_batch,
    scored_for,
)
from mopl.alignment.reference import score_lists
from mopl.alignment.stages import response_loss, text_conditioner
from mopl.conditioning import HyperPromptModel
from mopl.conditioning.samplers import box_betas, dirichlet_weights, fixed
from mopl.experiments import cos_dpo
from mopl.experiments.cos_dpo import modpo_loss
from mopl.experiments.methods import Method
from mopl.language_models import models
from mopl.language_models.collate import ListCollator
from mopl.language_models.data import PreferenceData, PreferenceList
from mopl.language_models.scoring import ordered_pairs, response_lengths
from mopl.language_models.tokenization import TokenizedList
from mopl.losses import DPOLoss, listwise_dpo
from mopl.training import TrainingInterrupted, make_accelerator, train
from mopl.training.optimizer import adamw

NAMES = ("low", "middle")
VOCABULARY = 32


def word_level():
    """A tokenizer of 28 words."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 4))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_level():
    """The same words as tokens of a byte-level tokenizer, which can say everything else too, digits for one."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    pieces, merges = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())], []
    for word in (f"Ġw{i}" for i in range(VOCABULARY - 4)):
        for end in range(2, len(word) + 1):  # a merge for each prefix makes the whole word one token
            if word[:end] not in pieces:
                pieces.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def write_model(
    folder: Path, *, seed: int = 0, std: float = 0.1, hidden: int = 32, name: str = "model", tokenizer=None
) -> Path:
    """Write a random Llama of two layers with a tokenizer, of 28 words by default; return its folder."""
    tokenizer = word_level() if tokenizer is None else tokenizer
    tokenizer.save_pretrained(folder / name)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, initializer_range=std,
        attention_dropout=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return folder / name


def preferences(count: int, *, seed: int = 0, sizes=(2, 3, 4), words: int = 4) -> PreferenceData:
    """Lists of random words; one objective counts words below w9, the other those from w9 to w17."""
    random = np.random.default_rng(seed)
    lists = []
    for number in range(count):
        drawn = random.integers(0, VOCABULARY - 4, (sizes[number % len(sizes)], words))
        labels = {"low": (drawn < 9).sum(1), "middle": ((drawn >= 9) & (drawn < 18)).sum(1)}
        prompt = " ".join(f"w{w}" for w in random.integers(0, VOCABULARY - 4, 3))
        texts = [
            " " + " ".join(f"w{w}" for w in row[: 1 + (number + place) % words]) for place, row in enumerate(drawn)
        ]
        lists.append(PreferenceList(prompt, tuple(texts), {name: tuple(map(float, x)) for name, x in labels.items()}))
    return PreferenceData(lists, NAMES)


def tokenized(count: int = 9, *, seed: int = 0, sizes=(2, 3, 4), labels=None) -> tuple[TokenizedList, ...]:
    """Lists of random tokens with random labels (or one-hot ones)."""
    random = np.random.default_rng(seed)
    lists = []
    for number in range(count):
        size = sizes[number % len(sizes)]
        made = random.normal(size=(2, size)) if labels is None else labels(random, size)
        responses = tuple(random.integers(3, VOCABULARY, random.integers(1, 6)) for _ in range(size))
        prompt = random.integers(3, VOCABULARY, random.integers(2, 5))
        lists.append(TokenizedList(prompt, responses, made.astype(np.float32), number))
    return tuple(lists)


def settings(**changes) -> AlignConfig:
    return AlignConfig(**{"model": "m", "data": "d", "steps": 4, "lists_per_batch": 6, **changes}).resolved(9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("model")
    write_model(made)
    return made / "model"


@pytest.fixture
def base(folder):
    return models.load_causal_lm(str(folder))


def conditioned(base, config=None, *, takes_beta=False, stirred=True) -> HyperPromptModel:
    torch.manual_seed(3)
    made = tuned.new_model(base, config or settings(), NAMES, Method(conditioned=True, takes_beta=takes_beta))
    if stirred:  # away from the start, where half of the gradients are zero
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def source(lists=None, batch_size=6, **changes) -> AlignSource:
    parts = {
        "seed": 1,
        "weights": dirichlet_weights(2, batch_size, concentration=0.7, per="list", seed=1),
        "beta": box_betas(2, batch_size, low=[0.05, 0.1], high=[0.2, 0.3], per="list", seed=1),
    }  # fmt: skip
    return AlignSource(lists or tokenized(), batch_size, ListCollator(), **{**parts, **changes})


DENSE = ResponseLoss(labels=("softmax", "softmax"))


def in_sentences(model, item: TokenizedList, **conditions) -> Tensor:
    """The log-probabilities of a list's responses, one by one, from the model's logits."""
    found = []
    for response in item.responses:
        ids = torch.tensor(np.concatenate([item.prompt, response]))[None]
        logits = model(ids, torch.ones_like(ids), **conditions).logits.log_softmax(-1)
        first = len(item.prompt)
        found.append(logits[0, first - 1 : -1].gather(-1, ids[0, first:, None]).sum())
    return torch.stack(found)


# ---------------------------------------------------------------- what a step sees


@pytest.mark.parametrize("parts", [1, 2, 4, 6])
def test_parts_of_a_batch_are_cuts_of_the_same_lists_weights_and_beta(parts):
    lists = tokenized()
    scores = ListScores(lists, torch.arange(27.0))
    made = source(lists, reference=scores, experts=[scores, scores])
    whole, cut = made(5, 0, 1), [made(5, part, parts) for part in range(parts)]
    assert torch.equal(torch.cat([c.lists.lists for c in cut]), whole.lists.lists)
    assert torch.equal(torch.cat([c.weights for c in cut]), whole.weights)
    assert torch.equal(torch.cat([c.beta for c in cut]), whole.beta)
    assert not torch.equal(whole.weights[0], whole.weights[1])
    for row, index in enumerate(whole.lists.lists.tolist()):
        first, size = sum(len(lists[i].responses) for i in range(index)), len(lists[index].responses)
        assert whole.reference[row, :size].tolist() == list(range(first, first + size))
        assert (whole.reference[row, size:] == 0).all() and torch.equal(whole.experts[row, 1], whole.reference[row])
        lengths = response_lengths(whole.lists)[row].tolist()
        assert lengths[:size] == [len(response) for response in lists[index].responses] and not any(lengths[size:])


def test_the_training_loss_is_equation_12_with_each_lists_own_weights_and_the_models_own_logits(base):
    model, batch = conditioned(base), source(beta=fixed(torch.tensor([0.1, 0.3]), 6))(0)
    lists = {item.index: item for item in tokenized()}
    value, logs = scalarized_loss(DENSE, NAMES)(model, batch, 0)
    expected = torch.zeros(6, 2)
    for row, index in enumerate(batch.lists.lists.tolist()):
        item = lists[index]
        own = in_sentences(model, item, weights=batch.weights[row])
        with torch.no_grad(), model.reference():
            reference = in_sentences(model, item)
        for j, beta in enumerate((0.1, 0.3)):
            target = torch.tensor(item.labels[j]).softmax(0)
            expected[row, j] = -(target * (beta * (own - reference)).log_softmax(0)).sum()
    torch.testing.assert_close(value, (batch.weights * expected).sum(1).mean(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.stack([logs[f"loss/{n}"] for n in NAMES]), expected.mean(0), rtol=1e-5, atol=1e-5)


def test_temperature_cos_dpo_trains_on_normalised_beta_and_the_raw_output(base):
    model, batch = conditioned(base, takes_beta=True), source()(0)
    torch.testing.assert_close(batch.beta.sum(1), torch.ones(6))
    value = scalarized_loss(DENSE, NAMES)(model, batch, 0)[0]
    for length in (1.0, 0.17):  # the loss of equation (16) at full β and the scores of equation (15)
        beta = length * batch.beta
        with torch.no_grad(), model.reference():
            reference = score_batch(model, batch.lists, batch.weights, beta)
        net = score_batch(model, batch.lists, batch.weights, beta)
        scores = steering.beta_conditioned(net, reference, beta)
        full = listwise_dpo(scores, batch.lists.labels, reference=reference, beta=beta, weights=batch.weights,
                            mask=batch.lists.mask, normalize="softmax")  # fmt: skip
        torch.testing.assert_close(full, value, rtol=1e-4, atol=1e-4)
    moved = dataclasses.replace(batch, beta=batch.beta.flip(1))
    assert not torch.allclose(scalarized_loss(DENSE, NAMES)(model, moved, 0)[0], value)


def one_hot(random, size):
    return np.stack([random.permutation(np.eye(size)[0]) for _ in range(2)])


def test_two_items_with_one_hot_labels_are_dpo_in_loss_and_gradient(base):
    batch = source(tokenized(sizes=(2,), labels=one_hot), beta=fixed(torch.tensor([0.1, 0.1]), 6))(0)
    gradients = []
    for method in ("listnet", "sigmoid", "dpo"):
        models.release(base)
        model = conditioned(base)
        if method == "dpo":
            scores = score_batch(model, batch.lists, batch.weights)
            with torch.no_grad(), model.reference():
                s0 = score_batch(model, batch.lists, batch.weights)
            value = torch.zeros(())
            for j in range(2):
                won = batch.lists.labels[:, j].argmax(1, keepdim=True)
                pair = [x.gather(1, i)[:, 0] for x in (scores, s0) for i in (won, 1 - won)]
                losses, _, _ = DPOLoss(0.1)(*pair)
                value = value + (batch.weights[:, j] * losses).mean()
        else:
            value = scalarized_loss(ResponseLoss(method, labels=("l1", "l1")), NAMES)(model, batch, 0)[0]
        value.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        gradients.append((value.detach(), grads))
        models.release(model)
    for value, grads in gradients[:2]:
        torch.testing.assert_close(value, gradients[2][0], rtol=1e-6, atol=1e-6)
        assert grads.keys() == gradients[2][1].keys() and len(grads) > 10
        for name, grad in grads.items():
            torch.testing.assert_close(grad, gradients[2][1][name], rtol=1e-4, atol=1e-6)


def test_m_objectives_cost_one_forward_and_one_backward(base):
    model, counts = conditioned(base), {"forward": 0, "backward": 0}
    check_rows(base, virtual=True)  # once for a model; a run does it before it begins
    head = base.model.layers[0]
    head.register_forward_pre_hook(lambda *_: counts.__setitem__("forward", counts["forward"] + 1))
    head.register_full_backward_hook(lambda *_: counts.__setitem__("backward", counts["backward"] + 1))
    lists = tokenized()
    scores = ListScores(lists, torch.randn(27))
    scalarized_loss(DENSE, NAMES)(model, source(lists, reference=scores)(0), 0)[0].backward()
    assert counts == {"forward": 1, "backward": 1}
    scalarized_loss(DENSE, NAMES)(model, source(lists)(0), 0)[0].backward()  # the reference without gradient
    assert counts == {"forward": 3, "backward": 2}


def test_a_batch_with_weights_of_its_own_for_each_list_equals_the_lists_one_by_one(base):
    model, batch = conditioned(base), source()(0)
    together = score_batch(model, batch.lists, batch.weights)
    by_index = {item.index: item for item in tokenized()}
    for row, index in enumerate(batch.lists.lists.tolist()):
        alone = score_batch(model, ListCollator()([by_index[index]]), batch.weights[row])
        torch.testing.assert_close(together[row, : alone.shape[1]], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", [ResponseLoss("plackett-luce"), DENSE], ids=["pl", "listnet"])
def test_packed_batches_give_the_padded_loss(base, loss):
    model = conditioned(base)
    padded, packed = source(), source()
    packed.collator = ListCollator(packed=True)
    a, b = (scalarized_loss(loss, NAMES)(model, each(0), 0)[0] for each in (padded, packed))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("conditioning", ["hyper-prompt", "lora-mixture", "text"])
@pytest.mark.parametrize("conditioned", [True, False])
def test_what_is_trained_is_float32_whatever_dtype_the_model_is_stored_in(folder, conditioning, conditioned):
    base = models.load_causal_lm(str(folder), dtype="bfloat16")
    model = tuned.new_model(base, settings(conditioning=conditioning), NAMES, Method(conditioned=conditioned))
    trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert trained == {torch.float32} and base.get_input_embeddings().weight.dtype == torch.bfloat16


def test_mo_dpo_trains_the_anchor_on_the_reward_of_equation_17(base):
    lists, w = tokenized(), torch.tensor([0.6, 0.4])
    parts = [ListScores(lists, torch.randn(27)) for _ in range(3)]
    batch = source(lists, weights=fixed(w, 6), beta=fixed(torch.tensor([0.2, 0.1]), 6), reference=parts[0],
                   experts=parts[1:])(0)  # fmt: skip
    model = tuned.new_model(base, settings(), NAMES, Method())
    value, _ = modpo_loss(scored_for(DENSE), DENSE, 0, "low")(model, batch, 0)
    s = score_batch(model, batch.lists, batch.weights)
    r = (s - batch.reference - 0.4 * (batch.experts[:, 1] - batch.reference)) / 0.6
    mask = batch.lists.mask
    log_p = (0.2 * r).masked_fill(~mask, -math.inf).log_softmax(1).masked_fill(~mask, 0)
    target = batch.lists.labels[:, 0].masked_fill(~mask, -math.inf).softmax(1)
    torch.testing.assert_close(value, -(target * log_p).sum(1).mean(), rtol=1e-4, atol=1e-4)


def test_an_objective_without_labels_in_a_list_has_no_loss_and_no_gradient_there(base):
    def missing(random, size):
        labels = random.normal(size=(2, size))
        labels[random.integers(0, 2)] = np.nan
        return labels

    batch = source(tokenized(labels=missing))(0)
    scores = torch.randn(batch.lists.mask.shape, requires_grad=True)
    for loss in (DENSE, ResponseLoss("plackett-luce"), ResponseLoss(labels=("softmax", "softmax"), by_objective=True)):
        vector = loss(scores, batch.lists, batch.beta)
        assert (vector[~batch.lists.objective_mask] == 0).all() and (vector[batch.lists.objective_mask] > 0).all()
        (gradient,) = torch.autograd.grad((vector * ~batch.lists.objective_mask).sum(), scores)
        assert (gradient == 0).all()


@pytest.mark.parametrize("name", ["listnet", "plackett-luce"])
def test_objectives_that_label_a_part_of_a_list_are_lists_of_that_part(name):
    def partly(random, size):
        labels = random.normal(size=(2, size))
        labels[0, 0] = np.nan
        return labels

    lists = tokenized(sizes=(4,), labels=partly)
    batch = ListCollator(partial="keep", order=name == "plackett-luce")(lists[:5])
    loss = ResponseLoss(name, labels=("softmax", "softmax"), by_objective=True)
    scores, s0, beta = torch.randn(5, 4), torch.randn(5, 4), torch.rand(5, 2) + 0.5
    vector = loss(scores, batch, beta, s0)
    cut = [TokenizedList(x.prompt, x.responses[1:], x.labels[:, 1:], x.index) for x in lists[:5]]
    whole = ListCollator(order=name == "plackett-luce")(cut)
    without = ResponseLoss(name, labels=("softmax", "softmax"))
    torch.testing.assert_close(vector[:, 0], without(scores[:, 1:], whole, beta, s0[:, 1:])[:, 0])
    second = loss(scores, batch, beta, s0, objective=1)
    torch.testing.assert_close(second[:, 0], vector[:, 1])


def test_losses_of_one_objective_are_columns_of_the_loss_vector():
    batch = source(tokenized(sizes=(2,), labels=one_hot))(0)
    scores, s0 = torch.randn(6, 2), torch.randn(6, 2)
    for loss in (
        DENSE,
        ResponseLoss("plackett-luce"),
        ResponseLoss("ipo"),
        ResponseLoss("robust", label_smoothing=0.1),
    ):
        vector = loss(scores, batch.lists, batch.beta, s0)
        for j in range(2):
            torch.testing.assert_close(loss(scores, batch.lists, batch.beta, s0, objective=j)[:, 0], vector[:, j])
            torch.testing.assert_close(loss(scores, batch.lists, batch.beta[0], s0, objective=j)[0, 0], vector[0, j])


def test_equal_labels_of_a_pair_prefer_nothing():
    batch = source(tokenized(sizes=(2,), labels=lambda random, size: np.array([[1.0, 1.0], [0.0, 1.0]])))(0)
    vector = ResponseLoss("sigmoid")(torch.randn(6, 2), batch.lists, 0.5)
    assert (vector[:, 0] == 0).all() and (vector[:, 1] > 0).all()
    with pytest.raises(ValueError, match="compares two responses but a list has 4"):
        ResponseLoss("sigmoid")(torch.randn(6, 4), source()(0).lists, 0.5)


def test_weights_in_words_stand_before_the_prompt_and_leave_the_responses_alone(folder):
    tokenizer = models.load_tokenizer(str(folder))
    prompt = tuned.text_prompt(NAMES)
    item = tokenized()[0]
    made = text_conditioner(tokenizer, prompt)(item, torch.tensor([0.25, 0.75]), torch.ones(2))
    added = tokenizer(prompt.render([0.25, 0.75]), add_special_tokens=False)["input_ids"]
    assert made.prompt.tolist() == [*added, *item.prompt] and made.responses is item.responses


# ---------------------------------------------------------------- updates


def scalarized_loss(loss, names, **options):
    return cos_dpo.scalarized_loss(scored_for(loss), loss, names, **options)


def trained(model: HyperPromptModel) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def fit(base, *, steps=4, directory=None, accumulation=1, stop=None, made=None, resume=False) -> Tensor:
    config = settings(accumulation=accumulation, steps=steps, checkpoint_every=2, learning_rate=1e-2)
    model = conditioned(base, config, stirred=False)
    inner = scalarized_loss(DENSE, NAMES)

    def loss(module, batch, step):
        if stop is not None and step == stop:
            os.kill(os.getpid(), 15)
        return inner(module, batch, step)

    training = config.training(steps, schedule="constant", warmup=0)
    try:
        optimizer = adamw(model, training, torch.device("cpu"), {"hyper_prompt.": config.prompt_learning_rate})
        train(model, made or source(), loss, training, accelerator=make_accelerator(cpu=True), directory=directory,
              optimizer=optimizer, save_frozen=False, resume=resume)  # fmt: skip
        return trained(model)
    finally:
        models.release(model)


@pytest.mark.parametrize("accumulation", [2, 3, 6])
def test_the_update_does_not_depend_on_accumulation(base, accumulation):
    torch.testing.assert_close(fit(base, accumulation=accumulation), fit(base), rtol=2e-4, atol=2e-5)


def test_a_resumed_training_has_the_same_bits_and_checkpoints_hold_only_what_is_trained(base, tmp_path):
    whole = fit(base, steps=5)
    with pytest.raises(TrainingInterrupted):
        fit(base, steps=5, directory=tmp_path, stop=2)
    (checkpoint, *_) = sorted(tmp_path.iterdir())[::-1]
    assert checkpoint.name == "step-000003"
    assert (checkpoint / "model.safetensors").stat().st_size < 2 * 4 * whole.numel()
    assert torch.equal(fit(base, steps=5, directory=tmp_path, resume=True), whole)


def test_the_frozen_model_is_untouched_and_free_of_dropout(base, folder):
    before = {name: value.clone() for name, value in base.state_dict().items()}
    fit(base)
    after = base.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert base.config.attention_dropout == 0.0


def test_gradient_checkpointing_changes_nothing(base):
    plain = conditioned(base)
    value = scalarized_loss(DENSE, NAMES)(plain, source()(0), 0)[0]
    value.backward()
    expected = [p.grad.clone() for p in plain.parameters() if p.grad is not None]
    plain.zero_grad()
    models.recompute_activations(base, True)
    plain.train()
    again = scalarized_loss(DENSE, NAMES)(plain, source()(0), 0)[0]
    again.backward()
    torch.testing.assert_close(again, value)
    for grad, p in zip(expected, (p for p in plain.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)


def test_baselines_are_prompt_tuning_with_the_same_adapters(base):
    model = tuned.new_model(base, settings(), NAMES, Method())
    names = {
        name.split(".")[-1] if "hyper" in name else "lora" for name, p in model.named_parameters() if p.requires_grad
    }
    assert names == {"prefix", "lora"}
    batch = source()(0)
    torch.testing.assert_close(
        score_batch(model, batch.lists, batch.weights), score_batch(model, batch.lists, batch.weights.flip(1)),
        rtol=0, atol=0,
    )  # fmt: skip


# ---------------------------------------------------------------- reference


def scored(base, lists, accelerator=None, **options):
    return score_lists(base, lists, collator=ListCollator(**options), tokens_per_batch=40,
                       accelerator=accelerator or make_accelerator(cpu=True))  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_precomputed_log_probabilities_are_those_of_the_step(base, packed):
    lists = tokenized()
    precomputed = ListScores(lists, scored(base, lists, packed=packed))
    model = conditioned(base)
    batch = source(lists)(3)
    with torch.no_grad(), model.reference():
        in_step = score_batch(model, batch.lists, batch.weights)
    torch.testing.assert_close(precomputed.pad(batch.lists), in_step, rtol=1e-5, atol=1e-4)
    with_both = [scalarized_loss(DENSE, NAMES)(model, source(lists, reference=r)(3), 3)[0] for r in (None, precomputed)]
    torch.testing.assert_close(with_both[0], with_both[1], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- evaluation


def test_accuracy_counts_pairs_with_different_labels_and_halves_ties():
    labels = np.array([[3, 1, 1], [0, 0, 0]], dtype=np.float32)
    batch = ListCollator()([TokenizedList(np.array([3]), (np.array([4]),) * 3, labels, 0)])
    right, pairs = ordered_pairs(torch.tensor([[1.0, 1.0, 2.0]]), batch)
    assert pairs.tolist() == [[2.0, 0.0]] and right.tolist() == [[0.5, 0.0]]


def test_figures_of_the_untrained_model_are_the_entropy_bound_half_the_pairs_and_no_deviation(base):
    lists = tokenized(sizes=(2,), labels=one_hot)
    reference = ListScores(lists, scored(base, lists))
    held_out = HeldOut(lists, ListCollator(), ResponseLoss(), torch.tensor([0.1, 0.1]), reference, NAMES)
    found = evaluation_of(None, [held_out.figures(reference.values)])
    torch.testing.assert_close(found.mean_losses, torch.full((1, 2), math.log(2), dtype=torch.float64))
    assert (found.accuracy == 0.5).all() and (found.log_ratio == 0).all()
    assert reference_point(found) == pytest.approx([1.1, 1.1])  # the paper's, on pairs


def test_figures_are_those_of_each_list_and_scales_move_them_towards_the_reference(base):
    lists = tokenized()
    reference = ListScores(lists, scored(base, lists))
    beta = torch.tensor([0.1, 0.4])
    held_out = HeldOut(lists, ListCollator(), DENSE, beta, reference, NAMES)
    flat = reference.values + torch.randn(27)
    losses, deviation, right, pairs, ratio = held_out.figures(flat)
    torch.testing.assert_close(ratio, (flat - reference.values).double(), rtol=1e-4, atol=1e-4)
    start = 0
    for row, item in enumerate(lists):
        change = (flat - reference.values)[start : start + len(item.responses)]
        start += len(item.responses)
        labels = torch.tensor(item.labels)
        for j in range(2):
            expected = -(labels[j].softmax(0) * (beta[j] * change).log_softmax(0)).sum()
            torch.testing.assert_close(losses[row, j].float(), expected, rtol=1e-4, atol=1e-4)
            a, b = torch.meshgrid(labels[j], labels[j], indexing="ij")
            x, y = torch.meshgrid(change, change, indexing="ij")
            assert pairs[row, j] == (a > b).sum() and right[row, j] == ((a > b) & (x > y)).sum()
        torch.testing.assert_close(deviation[row].float(), change.abs().mean(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(held_out.figures(flat, 4.0)[1], deviation / 4, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "model is missing"),
        ({"method": "ppo"}, "method is 'ppo'"),
        ({"loss": "aot"}, "loss is 'aot'"),
        ({"beta": (0.1, -1.0)}, "beta is 0.1 -1 but must be positive"),
        ({"prompt_rank": 9}, "prompt_rank is 9"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"conditioning": "text", "reference": "self"}, "pass reference='precomputed'"),
        ({"conditioning": "text", "lora_rank": 0}, "lora_rank must be at least 1"),
        ({"lora_rank": 0, "lora_rslora": True}, "lora_rslora is about adapters, which lora_rank=0 leaves out"),
        ({"packing": True, "positions": "paper"}, "positions='hf' or packing=False"),
        ({"label_smoothing": 0.1}, "label_smoothing has no part in loss 'listnet'"),
        ({"labels": ("l2",)}, "labels is 'l2'"),
        ({"steps": 0}, "steps is 0 but must be at least 1"),
        ({"schedule": "step"}, "schedule is 'step'"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_say_what_to_change(changes, message):
    with pytest.raises(ValueError, match=message):
        AlignConfig(**{"model": "m", "data": "d", **changes})


def test_settings_survive_json_and_unknown_ones_are_refused():
    config = AlignConfig("m", "d", beta=0.3, objectives=("a", "b"), scales=())
    assert AlignConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.betas(3) == (0.3, 0.3, 0.3)
    with pytest.raises(ValueError, match="unknown settings colour"):
        AlignConfig.from_dict({**config.to_dict(), "colour": 1})
    with pytest.raises(ValueError, match="beta has 2 entries but there are 3"):
        dataclasses.replace(config, beta=(0.1, 0.2)).betas(3)


def test_the_reference_is_precomputed_where_lists_are_seen_more_than_once():
    config = AlignConfig("m", "d", lists_per_batch=10, steps=5)
    assert config.resolved(50).reference == "self" and config.resolved(49).reference == "precomputed"
    assert dataclasses.replace(config, method="all").resolved(50).reference == "precomputed"
    assert dataclasses.replace(config, conditioning="text").resolved(50).reference == "precomputed"
    again = config.resolved(50)
    assert again.resolved(50) == again


def test_a_tenth_of_the_steps_warms_up_where_nothing_else_is_asked_for():
    config = AlignConfig("m", "d")
    assert config.training(70).warmup == 7 and config.training(70, warmup=3).warmup == 3
    assert dataclasses.replace(config, warmup=0).training(70).warmup == 0
    assert config.label_modes(2) == ("auto", "auto") and config.label_temperatures(2) == (1.0, 1.0)


def test_labels_become_targets_by_what_they_are():
    lists = [PreferenceList("q", ("a", "b"), {"low": (1, 0), "middle": (-0.5, 2)})] * 2
    data = PreferenceData(lists, NAMES)
    assert response_loss(settings(), data).labels == ("l1", "softmax")
    with pytest.raises(ValueError, match=r"labels of middle go down to -0.5"):
        response_loss(settings(labels=("l1",)), data)
    three = PreferenceData([PreferenceList("q", ("a", "b", "c"), {"low": (1, 0, 2)})])
    with pytest.raises(ValueError, match="'hinge' compares two responses but data has lists of 3"):
        response_loss(settings(loss="hinge"), three)


# ---------------------------------------------------------------- what comes out


def conflicting(count: int, seed: int) -> PreferenceData:
    """Lists of four answers of two words; the objectives want words of different thirds of the vocabulary."""
    random = np.random.default_rng(seed)
    lists = []
    for _ in range(count):
        drawn = random.integers(0, VOCABULARY - 4, (4, 2))
        labels = {"low": 3.0 * (drawn < 9).sum(1), "middle": 3.0 * ((drawn >= 9) & (drawn < 18)).sum(1)}
        texts = tuple(" " + " ".join(f"w{w}" for w in row) for row in drawn)
        lists.append(
            PreferenceList(f"w{random.integers(28)}", texts, {k: tuple(v.tolist()) for k, v in labels.items()})
        )
    return PreferenceData(lists, NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.claim) for seed in (1, 2))])
def test_one_conditioned_model_follows_its_weights_and_has_more_hypervolume_than_a_soup(tmp_path, seed):
    write_model(tmp_path, seed=seed)
    conflicting(640, seed).write_jsonl(tmp_path / "data.jsonl")
    found = {}
    # Adapters that are mixed learn faster than virtual tokens: large rates carry them past the ends of the front.
    slower = {"learning_rate": 3e-3, "lora_rank": 4, "lora_alpha": 8.0, "weight_decay": 0.1, "concentration": 1.0}
    for conditioning in ("hyper-prompt", "lora-mixture", "dpo-soup"):  # all with the same steps: soup trains two
        soup = conditioning == "dpo-soup"
        changes = slower if conditioning == "lora-mixture" else {}
        common = {
            "steps": 120, "lists_per_batch": 16, "beta": 0.5, "concentration": 0.3, "learning_rate": 5e-3,
            "prompt_learning_rate": 1e-2, "lora_rank": 8, "lora_alpha": 16.0, "held_out": 0.2, "points": 5,
            "bootstrap": 0, "samples": 0, "scales": (), "seed": seed, "device": "cpu", "max_length": 16,
            "method": "dpo-soup" if soup else "weight-cos-dpo",
            "conditioning": "hyper-prompt" if soup else conditioning,
        }  # fmt: skip
        config = AlignConfig(str(tmp_path / "model"), str(tmp_path / "data.jsonl"), **{**common, **changes})
        found[conditioning] = figures_of(align(config, tmp_path / conditioning, say=lambda text: None))
    print(seed, {name: round(each["hypervolume"], 3) for name, each in found.items()})  # seen with pytest -n0 -s
    of_soup = found.pop("dpo-soup")
    for figures in found.values():
        assert min(figures["spearman"]["loss"] + figures["spearman"]["accuracy"]) > 0.9
        assert figures["accuracy"][-1][0] > 0.8 and figures["accuracy"][0][1] > 0.8
        assert figures["hypervolume"] > of_soup["hypervolume"]


def figures_of(run: Path) -> dict:
    front = json.loads((run / "front.json").read_text())
    return json.loads((run / "evaluation.json").read_text()) | {"hypervolume": front["hypervolume"]}


@pytest.mark.slow
def test_a_model_follows_weights_that_it_reads_as_words(tmp_path):
    """With a tokenizer that knows digits, and a model that has to learn first what they say."""
    words = write_model(tmp_path, tokenizer=byte_level(), seed=2)
    conflicting(640, 2).write_jsonl(tmp_path / "data.jsonl")
    config = AlignConfig(
        str(words), str(tmp_path / "data.jsonl"), conditioning="text", steps=160, lists_per_batch=16, beta=0.5,
        concentration=0.3, learning_rate=5e-3, lora_rank=8, lora_alpha=16.0, held_out=0.2, points=5, bootstrap=0,
        samples=0, scales=(), seed=2, device="cpu", max_length=64,
    )  # fmt: skip
    figures = figures_of(align(config, tmp_path / "run", say=lambda text: None))
    print(figures["spearman"], figures["accuracy"])
    assert min(figures["spearman"]["loss"] + figures["spearman"]["accuracy"]) > 0.9
    assert figures["accuracy"][-1][0] > 0.8 and figures["accuracy"][0][1] > 0.8
