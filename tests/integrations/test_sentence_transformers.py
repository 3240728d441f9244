"""`ListLoss` of cross-encoders: sentence-transformers' own losses where formulas agree, several heads, mini-batches."""

import functools

import pytest
import torch

pytest.importorskip("sentence_transformers")
import transformers
from datasets import Dataset
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments, losses
from tiny_language_models import VOCABULARY, tokenizer

from mopl.integrations.sentence_transformers import ListLoss
from mopl.losses import lambda_loss, listwise_dpo
from mopl.rewards import classifier_rewards

QUERIES = ["w1 w2", "w3"]
DOCUMENTS = [["w4 w5 w6", "w7", "w8 w9"], ["w10", "w11 w12 w13 w14"]]
ONE = [torch.tensor([2.0, 0.0, 1.0]), torch.tensor([0.0, 3.0])]  # no two alike
TWO = [torch.stack([labels, labels.flip(0)]) for labels in ONE]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random BERTs with one output and with two, saved."""
    made = []
    for heads in (1, 2):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=32, pad_token_id=0, num_labels=heads, initializer_range=0.2,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        made.append(tmp_path_factory.mktemp("bert"))
        transformers.BertForSequenceClassification(config).save_pretrained(made[-1])
        tokenizer().save_pretrained(made[-1])
    return [str(folder) for folder in made]


def encoder(folder):
    return CrossEncoder(folder, device="cpu")


def measured(loss, labels):
    loss.model.zero_grad()
    value = loss([QUERIES, DOCUMENTS], labels)
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in loss.model.named_parameters() if p.grad is not None}


def agree(ours, theirs, factor=1.0):
    (value, grads), (expected, wanted) = ours, theirs
    torch.testing.assert_close(value * factor, expected, rtol=1e-5, atol=1e-6)
    assert grads.keys() == wanted.keys() and len(grads) > 10
    for name, grad in grads.items():
        torch.testing.assert_close(grad * factor, wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("name", ["listnet", "listmle", "lambda", "ranknet"])
def test_values_and_gradients_are_those_of_sentence_transformers(name, size, folders):
    model, pairs, lists = encoder(folders[0]), 4, 2  # 3 + 1 pairs with different labels
    ours, theirs, factor = {
        "listnet": (functools.partial(listwise_dpo, normalize="softmax"), losses.ListNetLoss(model), 1.0),
        "listmle": ("plackett_luce", losses.ListMLELoss(model, respect_input_order=False), 1.0),
        # They average over all pairs of the batch and not over lists.
        "lambda": (
            functools.partial(lambda_loss, normalize=True),
            losses.LambdaLoss(model, weighting_scheme=losses.LambdaRankScheme(), reduction_log="natural"),
            lists / pairs,
        ),
        "ranknet": ("pairwise_logistic", losses.RankNetLoss(model, reduction_log="natural"), lists / pairs),
    }[name]
    agree(measured(ListLoss(model, ours, mini_batch_size=size), ONE), measured(theirs, ONE), factor)


def test_several_heads_are_weighted_and_each_may_have_a_loss_and_a_beta_of_its_own(folders):
    model = encoder(folders[1])
    both = ListLoss(model, ["plackett_luce", "listwise_dpo"], objective_weights=[0.2, 0.8], beta=[1.0, 2.0])
    found = measured(both, TWO)
    with torch.no_grad():
        rows = [[(q, d) for d in documents] for q, documents in zip(QUERIES, DOCUMENTS, strict=True)]
        scores = [model(model.preprocess(each))["scores"] for each in rows]
    expected = 0.0
    for each, labels in zip(scores, TWO, strict=True):
        best_first = labels[0].argsort(descending=True)
        chosen = each[best_first, 0]
        first = sum(chosen[k:].logsumexp(0) - chosen[k] for k in range(len(chosen)))
        second = -(labels[1] / labels[1].sum() * (2 * each[:, 1]).log_softmax(0)).sum()
        expected += (0.2 * first + 0.8 * second) / 2
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)
    # Labels may be written document by document, and mini-batches change nothing.
    turned = ListLoss(
        model, ["plackett_luce", "listwise_dpo"], objective_weights=[0.2, 0.8], beta=[1.0, 2.0], labels="documents",
        mini_batch_size=2,
    )  # fmt: skip
    agree(measured(turned, [labels.T for labels in TWO]), found)


def test_a_missing_label_is_not_read(folders):
    model = encoder(folders[0])
    missing = [torch.tensor([2.0, torch.nan, 1.0]), ONE[1]]
    value, _ = measured(ListLoss(model, "plackett_luce"), missing)
    loss = ListLoss(model, "plackett_luce")
    shorter = loss([QUERIES, [[DOCUMENTS[0][0], DOCUMENTS[0][2]], DOCUMENTS[1]]], [torch.tensor([2.0, 1.0]), ONE[1]])
    torch.testing.assert_close(value, shorter.detach())


def test_their_trainer_teaches_both_heads_which_are_rewards(folders, tmp_path):
    words = [[(5 * i + 7 * k) % 40 for k in range(3 + i % 2)] for i in range(16)]
    data = Dataset.from_dict({
        "query": [f"w{i % 3}" for i in range(16)],
        "docs": [[f"w{w}" for w in each] for each in words],
        "labels": [[[float(w % 2 == 0) for w in each], [float(w) for w in each]] for each in words],
    })  # fmt: skip
    model = encoder(folders[1])
    loss = ListLoss(model, ["listwise_dpo", "plackett_luce"], objectives=["even", "high"], mini_batch_size=4)
    args = CrossEncoderTrainingArguments(
        str(tmp_path), max_steps=40, per_device_train_batch_size=8, learning_rate=1e-2, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no", gradient_accumulation_steps=2, logging_steps=20,
    )  # fmt: skip
    trainer = CrossEncoderTrainer(model=model, args=args, train_dataset=data, eval_dataset=data, loss=loss)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < trainer.state.log_history[0]["loss"]
    model.save_pretrained(str(tmp_path / "saved"))
    even, high = classifier_rewards(tmp_path / "saved")
    assert (even.name, high.name) == ("even", "high")
    prompts, texts = ["w0"] * 40, [f"w{w}" for w in range(40)]
    scores = torch.stack([even(texts, prompts), high(texts, prompts)], 1)
    expected = model.predict(list(zip(prompts, texts, strict=True)), activation_fn=torch.nn.Identity())
    torch.testing.assert_close(scores, torch.from_numpy(expected), rtol=1e-4, atol=1e-4)
    pairs = [(a, b) for each in words for a in each for b in each if a > b]
    right = sum(bool(scores[a, 1] > scores[b, 1]) for a, b in pairs)
    assert right > 0.9 * len(pairs) and scores[::2, 0].mean() > scores[1::2, 0].mean() + 1
    assert loss.get_config_dict()["loss"] == ["listwise_dpo", "plackett_luce"]


def test_a_step_is_the_same_in_accumulated_parts(folders, tmp_path):
    def step(size, turns):
        model = encoder(folders[0])
        data = Dataset.from_dict({"query": QUERIES, "docs": DOCUMENTS, "labels": [each.tolist() for each in ONE]})
        args = CrossEncoderTrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=turns,
            learning_rate=0.1, optim="sgd", report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
            max_grad_norm=1e9,
        )  # fmt: skip
        loss = ListLoss(model, "plackett_luce", mini_batch_size=2)
        CrossEncoderTrainer(model=model, args=args, train_dataset=data, loss=loss).train()
        return dict(model.named_parameters())

    once, parts = step(2, 1), step(1, 2)
    for name, value in once.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused(folders):
    one, two = encoder(folders[0]), encoder(folders[1])
    with pytest.raises(ValueError, match="objectives has 3 entries but the model has 2 outputs"):
        ListLoss(two, objectives=["a", "b", "c"])
    with pytest.raises(ValueError, match="mini_batch_size is -1"):
        ListLoss(one, mini_batch_size=-1)
    with pytest.raises(ValueError, match="beta is 0"):
        ListLoss(one, beta=0)
    with pytest.raises(ValueError, match=r"shape \(3, 2\) but must be \(2, 3\).*pass labels='documents'"):
        ListLoss(two)([QUERIES, DOCUMENTS], [labels.T for labels in TWO])
    with pytest.raises(ValueError, match="must be a list for each query"):
        ListLoss(one)([QUERIES, DOCUMENTS], torch.ones(2))
    with pytest.raises(ValueError, match=r"takes none that are negative; .* to ListLoss as the loss"):
        ListLoss(one)([QUERIES, DOCUMENTS], [-labels for labels in ONE])
    with pytest.raises(ValueError, match="there are 3 columns but must be two"):
        ListLoss(one)([QUERIES, DOCUMENTS, DOCUMENTS], ONE)
