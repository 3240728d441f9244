"""`RewardListTrainer`: losses and gradients of heads on lists, both kinds of model, files, resuming, errors."""

import functools
import json

import pytest
import torch
from launching import DISTRIBUTED, launch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
import transformers
from tiny_language_models import TEMPLATE, VOCABULARY, tokenizer

from mopl import losses
from mopl.integrations._head_losses import HeadLoss, gains_of, order_of
from mopl.integrations.scorers import RewardListConfig, RewardListTrainer
from mopl.language_models.data import DataError
from mopl.rewards import classifier_rewards

OBJECTIVES = ("even", "high")
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def encoder(heads=2, dropout=0.0):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=32, pad_token_id=0, num_labels=heads, initializer_range=0.2,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **SIZES,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def decoder(heads=2):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        num_labels=heads,
        pad_token_id=None,
        initializer_range=0.2,
        num_key_value_heads=2,
        **SIZES,
    )
    return transformers.LlamaForSequenceClassification(config)


def rows(lists=12, size=3):
    """Lists of one to three words a response; objectives want even words, and high ones, some labels are missing."""
    made = []
    for i in range(lists):
        words = [(7 * i + 11 * k) % 40 for k in range(size + i % 2)]
        labels = {"even": [float(w % 2 == 0) for w in words], "high": [w / 10 for w in words]}
        if i % 5 == 4:
            labels["high"][0] = None
        made.append({"prompt": f"w{40 + i % 3}", "responses": [f"w{w}" for w in words], "labels": labels})
    return made


def arguments(folder, **options):
    given = {"per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 1e-2, "save_strategy": "no"}
    given |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "optim": "sgd", "max_grad_norm": 1e9}
    return RewardListConfig(str(folder), **{**given, **options})


def trained(folder, model=None, data=None, loss=None, **options):
    trainer = RewardListTrainer(
        encoder() if model is None else model, arguments(folder, **options), rows() if data is None else data, None,
        tokenizer(), loss=loss,
    )  # fmt: skip
    trainer.train()
    return trainer


def parameters(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("name", ["listwise_dpo", "plackett_luce", "pairwise_logistic", "lambda_loss", "approx_ndcg"])
def test_each_head_has_the_loss_of_the_items_that_its_objective_labels(name):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.rand(3, 2, 4, generator=generator).double()
    mask = torch.ones(3, 2, 4, dtype=torch.bool)
    mask[0, 1, 2] = mask[1, :, 3] = False
    mask[2, 0, 1:] = False  # one label alone prefers nothing
    beta = torch.tensor([[0.5, 2.0]])
    vector = HeadLoss(name, 2)(scores, labels.masked_fill(~mask, torch.nan), mask, beta)
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for row in range(3):
        for head in range(2):
            some = mask[row, head]
            if some.sum() > 1:
                one, label = scores[row, head][some][None], labels[row, head][some][None]
                expected[row, head] = getattr(losses, name)(one, label, beta=float(beta[0, head]), reduction="sum")
    torch.testing.assert_close(vector, expected)
    factors = torch.randn(3, 2, generator=generator).double()
    found, wanted = (
        torch.autograd.grad((factors * each).sum(), scores, retain_graph=True)[0] for each in (vector, expected)
    )
    torch.testing.assert_close(found, wanted)


def test_objectives_have_losses_of_their_own_and_margins():
    scores = torch.tensor([[[0.3, 1.0], [2.0, -1.0]]], requires_grad=True)
    labels = torch.tensor([[[1.0, 0.0], [1.0, 2.0]]])
    mask, one = torch.ones(1, 2, 2, dtype=torch.bool), torch.ones(1, 1)
    vector = HeadLoss(["bradley_terry", "listwise_dpo"], 2)(scores, labels, mask, one)
    # -log sigmoid(0.3 - 1), and the cross-entropy of (1/3, 2/3) with softmax(2, -1)
    expected = [-torch.tensor(-0.7).sigmoid().log(), torch.tensor(3.0).exp().add(1).log() - 1 / 3 * 3]
    torch.testing.assert_close(vector[0], torch.stack(expected))
    margin = HeadLoss("bradley_terry", 2)(scores, labels, mask, one, torch.tensor([0.5]))
    torch.testing.assert_close(margin[0, 0], -torch.tensor(-1.2).sigmoid().log())


def test_figures_of_a_list_in_order_and_of_one_that_is_not():
    scores = torch.tensor([[[3.0, 2.0, 1.0]], [[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]]])
    labels = torch.tensor([[[2.0, 1.0, 0.0]], [[2.0, 1.0, 0.0]], [[1.0, -1.0, 0.0]]])
    mask = torch.ones(3, 1, 3, dtype=torch.bool)
    right, pairs = order_of(scores, labels, mask)
    assert right[:, 0].tolist() == [3, 0, 1] and pairs[:, 0].tolist() == [3, 3, 3]
    worst = (1 / torch.log2(torch.tensor(3.0)) + 2 / 2) / (2 + 1 / torch.log2(torch.tensor(3.0)))
    torch.testing.assert_close(
        gains_of(scores, labels, mask, 10)[:, 0], torch.stack([torch.tensor(1.0), worst, torch.tensor(-1.0)])
    )


def test_loss_and_gradient_of_pairs_are_those_of_trl(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    pairs = [
        {
            "prompt": [{"role": "user", "content": f"w{i}"}],
            "chosen": [{"role": "assistant", "content": f"w{i + 9} w3"}],
            "rejected": [{"role": "assistant", "content": f"w{i + 20}"}],
            "margin": 0.1 * i,
        }
        for i in range(4)
    ]
    theirs = trl.RewardTrainer(
        decoder(1),
        trl.RewardConfig(
            str(tmp_path), use_cpu=True, report_to="none", center_rewards_coefficient=0.3, bf16=False, max_length=None,
            per_device_train_batch_size=4,
        ),
        train_dataset=Dataset.from_list(pairs), processing_class=tokenizer(chat=True),
    )  # fmt: skip
    (batch,) = theirs.get_train_dataloader()
    if "margin" not in batch:
        pytest.skip("this TRL drops the column margin")
    expected = theirs.compute_loss(theirs.model, batch)
    expected.backward()
    args = arguments(tmp_path, list_loss="bradley_terry", center_rewards_coefficient=0.3, mini_batch_size=3)
    ours = RewardListTrainer(decoder(1), args, pairs, None, tokenizer(chat=True))
    assert ours.writer.inputs == "chat"
    (batch,) = ours.get_train_dataloader()
    found = ours.compute_loss(ours.model, batch)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    grads = {name: value.grad for name, value in theirs.model.named_parameters()}
    for name, value in ours.model.named_parameters():
        torch.testing.assert_close(value.grad, grads[name], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- steps

WEIGHTS = {"objectives": ["even", "high"], "objective_weights": [0.3, 0.7]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One step on four lists, all sequences at once."""
    return parameters(trained(tmp_path_factory.mktemp("whole"), **WEIGHTS))


@pytest.mark.parametrize(
    "options",
    [
        {"mini_batch_size": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "mini_batch_size": 3},
        {"mini_batch_size": 4, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_a_step_is_the_same_however_it_is_cut(options, whole, tmp_path):
    found = parameters(trained(tmp_path, **WEIGHTS, **options))
    start = dict(encoder().named_parameters())
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert any((whole[name] - start[name]).abs().max() > 1e-4 for name in whole)


def test_a_step_of_two_processes_is_that_of_one(whole, tmp_path):
    done = launch(2, str(DISTRIBUTED / "reward_list_trainer.py"), str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    for name, value in torch.load(tmp_path / "trained.pt").items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6)


def test_memory_of_long_lists_is_that_of_a_mini_batch(tmp_path):
    """What autograd keeps at a time, of K = 200 in mini-batches of 8, is a small part of that of all at once."""
    texts, labels = [f"w{k % 50} w{k // 50}" for k in range(200)], [float(k % 2) for k in range(200)]
    data = [{"prompt": "w1", "responses": texts, "labels": {"even": labels}}]

    def most(size):
        trainer = RewardListTrainer(encoder(1), arguments(tmp_path, mini_batch_size=size), data, None, tokenizer())
        trainer.model.train()
        (batch,) = trainer.get_train_dataloader()
        alive, largest = 0, 0

        class Kept:
            def __init__(self, tensor):
                nonlocal alive, largest
                self.tensor, self.bytes = tensor, tensor.nbytes
                alive += self.bytes
                largest = max(largest, alive)

            def __del__(self):
                nonlocal alive
                alive -= self.bytes

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            trainer.compute_loss(trainer.model, batch).backward()
        return largest

    assert most(8) < most(None) / 8


# ---------------------------------------------------------------- whole trainings


@pytest.mark.parametrize("make", [encoder, decoder])
def test_both_heads_learn_and_are_the_rewards_of_the_saved_model(make, tmp_path):
    trainer = RewardListTrainer(
        make(), arguments(tmp_path, max_steps=50, optim="adamw_torch", mini_batch_size=8, logging_steps=25),
        rows(20), rows(20), tokenizer(),
    )  # fmt: skip
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_even_accuracy"] > 0.9 and found["eval_high_accuracy"] > 0.9
    assert found["eval_high_ndcg@10"] > 0.9
    assert {"loss/even", "accuracy/high", "reward/high"} <= set(trainer.state.log_history[0])
    trainer.save_reward_model(tmp_path / "saved")
    rewards = classifier_rewards(tmp_path / "saved")
    assert [reward.name for reward in rewards] == list(OBJECTIVES)
    texts = [response for row in rows(4) for response in row["responses"]]
    prompts = [row["prompt"] for row in rows(4) for _ in row["responses"]]
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(4)])
    trainer.model.eval()
    with torch.no_grad():
        scores = trainer.scores(trainer.model, batch).transpose(1, 2)[batch["list_exists"]]  # (N, m)
    for column, reward in enumerate(rewards):
        torch.testing.assert_close(reward(texts, prompts), scores[:, column], rtol=1e-4, atol=1e-5)


def test_adapters_train_the_heads_and_are_merged_when_saved(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    args = arguments(
        tmp_path, max_steps=2, mini_batch_size=4, gradient_checkpointing=True, save_strategy="steps", save_steps=2
    )
    trainer = RewardListTrainer(decoder(), args, rows(), None, tokenizer(), peft_config=config)
    before = parameters(trainer)
    trainer.train()
    changed = {name for name, value in parameters(trainer).items() if not torch.equal(value, before[name])}
    assert any("lora_B" in name for name in changed) and any("score.modules_to_save" in name for name in changed)
    assert all("lora" in name or "score" in name for name in changed)
    trainer.save_reward_model(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["id2label"] == {"0": "even", "1": "high"}
    (reward, _) = classifier_rewards(tmp_path / "merged")
    trainer.model.eval()
    tokens = tokenizer()("w40", "w2", return_tensors="pt")
    with torch.no_grad():
        expected = trainer.model(**tokens).logits[0, 0]
    torch.testing.assert_close(reward(["w2"], ["w40"])[0], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="task_type of peft_config is None"):
        RewardListTrainer(
            decoder(), args, rows(), None, tokenizer(), peft_config=peft.LoraConfig(target_modules=["q_proj"])
        )


def test_a_resumed_training_ends_as_one_that_was_not_interrupted(tmp_path):
    options = {
        "max_steps": 4,
        "disable_dropout": False,
        "mini_batch_size": 3,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    first = trained(tmp_path, encoder(dropout=0.3), optim="adamw_torch", **options)
    again = RewardListTrainer(
        encoder(dropout=0.3), arguments(tmp_path, optim="adamw_torch", **options), rows(), None, tokenizer()
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in parameters(first).items():
        assert torch.equal(parameters(again)[name], value), name


# ---------------------------------------------------------------- errors


def test_what_does_not_fit_is_refused(tmp_path):
    def fails(match, data=None, model=None, kind=ValueError, text=None, loss=None, **options):
        with pytest.raises(kind, match=match):
            RewardListTrainer(
                encoder() if model is None else model, arguments(tmp_path, **options), data or rows(), None,
                text or tokenizer(), loss=loss,
            )  # fmt: skip

    pair = {"prompt": "w1", "chosen": "w2", "rejected": "w3"}
    fails("the model has 3 outputs but there are 2 objectives, even, high; load it with num_labels=2", model=encoder(3))
    fails("bradley_terry' but there is a list of 4 responses", list_loss="bradley_terry")
    fails("list_loss is 'other'", list_loss="other")
    named = {"objectives": ["even", "high"]}
    fails("there are 3 losses but 2 objectives", list_loss=["listwise_dpo"] * 3, **named)
    fails("objective_beta has 1 number but there are 2", objective_beta=[1.0], **named)
    for option in (
        {"objective_weights": [1.0, 0.0]},
        {"objective_beta": [1.0, 2.0]},
        {"list_loss": ["listwise_dpo"] * 2},
    ):
        fails("is in the order of the objectives, which the data alone would say \\(even, high", **option)
    fails("mini_batch_size is 0", mini_batch_size=0)
    fails("inputs is 'chat' but the tokenizer has no chat template", inputs="chat")
    fails("max_length is 99 but the model has 32 positions", max_length=99)
    fails("which has little to save here", train_sampling_strategy="group_by_length")
    fails("column margin, of which listwise_dpo", [{**pair, "margin": 1.0}], encoder(1))
    fails(
        "log-probabilities of a reference", [{**pair, "ref_chosen_logps": 1.0, "ref_rejected_logps": 1.0}], encoder(1)
    )
    fails("a stream, which this trainer does not read", iter(rows()), kind=TypeError)
    negative = [{**row, "labels": {**row["labels"], "even": [-1.0] * len(row["responses"])}} for row in rows()]
    fails("labels of even hold -1 .*takes none that are negative", negative)
    swapped = encoder()
    swapped.config.id2label = {0: "high", 1: "even"}
    fails(r"the model's outputs are high, even but the objectives are even, high", model=swapped)
    small = encoder()
    small.resize_token_embeddings(10)
    fails("but the model has embeddings of 10 tokens", model=small)
    softmax = functools.partial(losses.listwise_dpo, normalize="softmax")
    RewardListTrainer(encoder(), arguments(tmp_path), negative, None, tokenizer(), loss=softmax)


def test_a_list_that_the_chat_template_refuses_is_named_or_left_out(tmp_path):
    encoder = tokenizer(chat=True)
    encoder.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + TEMPLATE
    )
    bad = {**rows()[0], "prompt": [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}]}
    given = [*rows()[:3], bad, rows()[3]]

    def made(data, **options):
        return RewardListTrainer(model, arguments(tmp_path), data, None, encoder, **options).train_dataset

    model = decoder()
    with pytest.raises(DataError, match=r"4 lists from 5 rows(.|\n)*refused by the chat template \(row 4: no system"):
        made(given)
    kept = made(given, on_error="skip")
    assert [one.sequences for one in kept] == [one.sequences for one in made(rows()[:4])]
