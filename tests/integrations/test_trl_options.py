"""Options of TRL's `DPOConfig` and of `TrainingArguments`: each trains as in TRL, or is refused with the remedy."""

import copy
import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")

import tiny_language_models as tiny

from mopl.conditioning import HyperPrompt, HyperPromptModel, ParameterMixture
from mopl.experiments.response_loss import PairLoss
from mopl.integrations import _options
from mopl.integrations._settings import ObjectiveArguments
from mopl.integrations.grpo import MultiObjectiveGRPOConfig
from mopl.integrations.transformers import MultiObjectiveConfig, MultiObjectiveTrainer
from mopl.integrations.trl import MultiObjectiveDPOConfig, MultiObjectiveDPOTrainer

CHARACTERS = ["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz .?!"]
ROWS = [
    {"prompt": "why is the sky blue? ", "chosen": "light scatters", "rejected": "no idea at all"},
    {"prompt": "how? ", "chosen": "like so", "rejected": "go away now"},
    {"prompt": "who are you? ", "chosen": "a model", "rejected": "me"},
    {"prompt": "when? ", "chosen": "at noon.", "rejected": "yes!"},
    {"prompt": "a b ", "chosen": "c", "rejected": "d e f g h"},
    {"prompt": "where to? ", "chosen": "over the hills", "rejected": "z"},
    {"prompt": "is it so? ", "chosen": "it is", "rejected": "it is not so"},
    {"prompt": "go ", "chosen": "gone by now", "rejected": "went."},
]
TYPES = [
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "nca_pair", "bco_pair", "sppo_hard",
    "apo_zero", "apo_down", "aot", "aot_unpaired", "sft",
]  # fmt: skip
OWN = ("ref_model", "loss", "peft_config", "eval_dataset", "template", "on_error")
METRICS = [
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character, so that TRL and mopl find the same boundary of prompt and response."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: n for n, c in enumerate(CHARACTERS)}, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    inner.add_special_tokens(["<pad>", "<eos>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def llama(seed: int = 0, scale: float = 0.2):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(CHARACTERS), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=scale, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def mixtral(seed: int = 0):
    torch.manual_seed(seed)
    config = transformers.MixtralConfig(
        vocab_size=len(CHARACTERS), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, router_aux_loss_coef=0.7,
        initializer_range=0.2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def arguments(kind, folder, **options):
    defaults = dict(
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", per_device_train_batch_size=2, beta=0.3,
        gradient_accumulation_steps=2, bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False,
        max_steps=3, logging_steps=1, learning_rate=2e-2, optim="sgd", lr_scheduler_type="constant",
    )  # fmt: skip
    if kind in (MultiObjectiveConfig, transformers.TrainingArguments):
        defaults.pop("beta")
    return kind(str(folder), **{**defaults, **options})


def make(kind, tokenizer, folder, model=None, rows=ROWS, **options):
    """A trainer of TRL (`kind` is `trl.DPOTrainer`) or mopl; the reference is another model unless one is named."""
    own = {name: options.pop(name) for name in OWN if name in options}
    if "ref_model" not in own:
        own["ref_model"] = llama(5)
    for name in ("eval_dataset",):
        if name in own:
            own[name] = datasets.Dataset.from_list(own[name])
    config = trl.DPOConfig if kind is trl.DPOTrainer else MultiObjectiveDPOConfig
    return kind(
        llama() if model is None else model, args=arguments(config, folder, **options),
        train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, **own,
    )  # fmt: skip


def logs_of(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def both(tokenizer, folder, model=llama, tolerance=1e-5, moves=1e-4, **options):
    """Train TRL's trainer and mopl's; they must log the same losses and end at the same weights."""
    trainers = []
    for kind in (trl.DPOTrainer, MultiObjectiveDPOTrainer):
        torch.manual_seed(1)
        made = {name: value() if name == "ref_model" and value else value for name, value in options.items()}
        trainers.append(make(kind, tokenizer, folder, model(), **made))
        trainers[-1].train()
    theirs, ours = trainers
    start, after = dict(model().named_parameters()), dict(ours.model.named_parameters())
    moved = 0.0
    for name, value in theirs.model.named_parameters():
        if ".ref." in name:
            continue
        assert float((after[name] - value).detach().abs().max()) <= tolerance, name
        if name in start:
            moved = max(moved, float((after[name] - start[name]).detach().abs().max()))
    assert moved > moves
    for name in ("loss", *METRICS):
        expected, found = logs_of(theirs, name), logs_of(ours, name)
        assert len(expected) == len(found) > 0
        for one, other in zip(expected, found, strict=True):
            assert abs(one - other) <= tolerance * 10 * max(1.0, abs(one)), name
    return theirs, ours


# ---------------------------------------------------------------- every option, once


def test_every_option_stands_in_one_table():
    names = {entry.name for entry in dataclasses.fields(trl.DPOConfig)}
    known = set(_options.OBEYED) | set(_options.REFUSED)
    assert not set(_options.OBEYED) & set(_options.REFUSED)
    assert not names - known, "say in mopl/integrations/_options.py whether these are obeyed"


def test_the_table_of_the_docs_is_that_of_the_code():
    path = Path(__file__).parents[2] / "docs" / "trl.md"
    assert _options.table() in path.read_text(), "python -m mopl.integrations._options writes it"


def test_the_example_of_the_page_trains_as_it_stands(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "trl.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    tiny.build().save_pretrained("MODEL")
    tiny.tokenizer().save_pretrained("MODEL")
    row = {"prompt": "w1 w2", "responses": ["w3 w4", "w5"], "labels": {"helpful": [1, 0], "harmless": [0, 1]}}
    Path("lists.jsonl").write_text("".join(json.dumps({**row, "prompt": f"w{i} w2"}) + "\n" for i in range(4)))
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)[1], names)
    (logged,) = logs_of(names["trainer"], "train_loss")
    assert logged == pytest.approx(math.log(2), abs=1e-2)  # of no preference, at any weights


# ---------------------------------------------------------------- trained beside TRL


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
def test_every_loss_type_trains_as_in_trl(tokenizer, tmp_path, name):
    options = {"label_smoothing": 0.1} if name in ("exo_pair", "robust", "aot", "aot_unpaired") else {}
    both(tokenizer, tmp_path, loss_type=[name], **options)


TRAININGS = {
    "several types": dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
    "divergence": dict(
        loss_type=["hinge", "ipo", "sigmoid_norm", "sft", "discopop"], loss_weights=[0.3, 0.5, 2.0, 0.2, 0.7],
        f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.7, discopop_tau=0.2,
    ),
    "forward KL": dict(loss_type=["ipo", "sigmoid_norm"], f_divergence_type="forward_kl", learning_rate=1e-3),
    "smoothing": dict(
        loss_type=["sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"], loss_weights=[0.3, 0.5, 0.7, 1.1, 0.4],
        label_smoothing=0.2,
    ),
    "the rest": dict(loss_type=["nca_pair", "sppo_hard", "apo_zero", "apo_down"], loss_weights=[1.0, 0.01, 0.5, 0.3]),
    "verbose tokens": dict(ld_alpha=0.3, loss_type=["sigmoid", "sft", "ipo"]),
    "weighting": dict(use_weighting=True, loss_type=["sigmoid", "nca_pair"], learning_rate=1.0),
    "moving reference": dict(sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.4),
    "reference before": dict(precompute_ref_log_probs=True, precompute_ref_batch_size=3, ld_alpha=0.5),
    "own reference before": dict(precompute_ref_log_probs=True, ref_model=None, loss_type=["ipo"]),
    "padding": dict(pad_token="?", pad_to_multiple_of=8, max_length=40),
    "optimizer": dict(
        optim="adamw_torch", lr_scheduler_type="cosine", warmup_steps=1, weight_decay=0.1, max_grad_norm=0.3,
        adam_beta1=0.5, adam_beta2=0.9, adam_epsilon=1e-4, max_steps=4,
    ),
    "checkpointing": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
    "sampling": dict(
        train_sampling_strategy="group_by_length", data_seed=3, full_determinism=False, dataloader_drop_last=True,
        gradient_accumulation_steps=1, per_device_train_batch_size=3, remove_unused_columns=False,
    ),
    "in order": dict(train_sampling_strategy="sequential", seed=5, num_train_epochs=2, max_steps=-1, label_names=["a"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAININGS)
def test_options_train_as_in_trl(tokenizer, tmp_path, name):
    rows = [{**row, "length": (7 * n) % 5} for n, row in enumerate(ROWS)]
    options = dict(TRAININGS[name])
    if "ref_model" in options:
        model = llama()
        model.save_pretrained(tmp_path / "model")  # TRL loads the reference by the model's name

        def named():
            return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")

        both(tokenizer, tmp_path, named, rows=rows, **options)
    else:
        both(tokenizer, tmp_path, rows=rows, **options)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "sft"])
def test_types_of_a_whole_batch_take_for_each_objective_the_pairs_that_it_orders(name):
    torch.manual_seed(0)
    scores, reference, lengths = torch.randn(5, 2), torch.randn(5, 2), torch.randint(1, 9, (5, 2)).float()
    labels = torch.tensor([[[1, 0], [0, 1]], [[0, 1], [1, 1]], [[1, 1], [1, 0]], [[2, 1], [0, 3]], [[0, 1], [1, 0]]])
    parts = dict(lengths=lengths, reference=reference, beta=torch.tensor([[0.4, 0.9]]))
    found = PairLoss([name])(scores.requires_grad_(), labels.float(), **parts)
    for objective, beta in enumerate((0.4, 0.9)):
        order = labels[:, objective]
        rows = [row for row in range(5) if order[row, 0] != order[row, 1]]
        assert all(float(found[row, objective]) == 0 for row in range(5) if row not in rows)
        best = [int(order[row].argmax()) for row in rows]
        pair = [(scores[row, k], scores[row, 1 - k]) for row, k in zip(rows, best, strict=True)]
        base = [(reference[row, k], reference[row, 1 - k]) for row, k in zip(rows, best, strict=True)]
        if name == "sft":
            tokens = sum(float(lengths[row, k]) for row, k in zip(rows, best, strict=True))
            expected = -sum(chosen for chosen, _ in pair) / tokens * len(rows)
        elif name == "aot":
            policy = torch.stack([a - b for a, b in pair]).sort().values
            known = torch.stack([a - b for a, b in base]).sort().values
            expected = -torch.nn.functional.logsigmoid(beta * (policy - known)).sum()
        else:
            ratios = [torch.stack([a[side] - b[side] for a, b in zip(pair, base, strict=True)]) for side in (0, 1)]
            chosen, rejected = (ratio.sort().values for ratio in ratios)
            expected = -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).sum()
        torch.testing.assert_close(found[:, objective].sum(), expected)
    with pytest.raises(ValueError, match="leave out beta_low"):
        PairLoss(["aot"])(scores, labels.float(), **{**parts, "beta": torch.ones(5, 2)})


def test_the_auxiliary_loss_of_a_mixture_of_experts_is_that_of_trl(tokenizer, tmp_path):
    """By default with the coefficient of the config, though the config does not ask for the loss."""
    measured = [
        make(kind, tokenizer, tmp_path, mixtral(), eval_dataset=ROWS[:2], ref_model=mixtral(5)).evaluate()
        for kind in (trl.DPOTrainer, MultiObjectiveDPOTrainer)
    ]
    assert abs(measured[0]["eval_aux_loss"] - measured[1]["eval_aux_loss"]) < 1e-5
    for number, options in enumerate(({}, {"router_aux_loss_coef": 3.0})):
        theirs, ours = both(tokenizer, tmp_path, mixtral, ref_model=lambda: mixtral(5), max_steps=2, **options)
        expected, found = logs_of(theirs, "aux_loss"), logs_of(ours, "aux_loss")
        assert len(found) == 2 and all(abs(a - b) < 1e-5 for a, b in zip(expected, found, strict=True)), number
    _, ours = both(tokenizer, tmp_path, mixtral, ref_model=lambda: mixtral(5), max_steps=2, router_aux_loss_coef=0.0)
    assert not logs_of(ours, "aux_loss")
    with pytest.raises(ValueError, match="LlamaForCausalLM is no mixture of experts"):
        make(MultiObjectiveDPOTrainer, tokenizer, tmp_path, router_aux_loss_coef=0.5)
    plain = arguments(MultiObjectiveConfig, tmp_path)
    asked, silent = mixtral(), mixtral()
    asked.config.output_router_logits = True
    parts = dict(train_dataset=ROWS, processing_class=tokenizer, ref_model=mixtral(5))
    assert MultiObjectiveTrainer(asked, plain, **parts).scoring.router == 0.7
    assert MultiObjectiveTrainer(silent, plain, **parts).scoring.router == 0.0


def test_a_model_given_by_name_trains_in_float32_as_in_trl(tokenizer, tmp_path):
    folder = tmp_path / "model"
    llama().to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    start = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainers = []
    for kind in (trl.DPOTrainer, MultiObjectiveDPOTrainer):
        trainers.append(
            make(kind, tokenizer, tmp_path, str(folder), ref_model=None, learning_rate=1e-6, optim="adamw_torch")
        )
        assert {p.dtype for p in trainers[-1].model.parameters()} == {torch.float32}
        trainers[-1].train()
    theirs, ours = (dict(trainer.model.named_parameters()) for trainer in trainers)
    for name, value in start.named_parameters():
        assert float((theirs[name] - ours[name]).detach().abs().max()) < 1e-6
        assert float((ours[name] != value).float().mean()) > 0.5, name
    plain = arguments(MultiObjectiveConfig, tmp_path)
    trainer = MultiObjectiveTrainer(str(folder), plain, train_dataset=ROWS, processing_class=tokenizer)
    assert trainer.model.dtype == torch.float32
    options = dict(ref_model=None, model_init_kwargs={"dtype": "bfloat16"})
    with pytest.warns(UserWarning, match="trained parameters are bfloat16"):
        trainer = make(MultiObjectiveDPOTrainer, tokenizer, tmp_path, str(folder), **options)
    assert trainer.model.dtype == torch.bfloat16


def test_metrics_of_an_evaluation_are_those_of_trl_and_choose_the_best_model(tokenizer, tmp_path):
    options = dict(
        eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_rewards/accuracies", learning_rate=0.3,
        prediction_loss_only=True, eval_on_start=True,
    )  # fmt: skip
    theirs, ours = both(tokenizer, tmp_path, eval_dataset=ROWS, tolerance=1e-4, **options)
    for name in ("eval_loss", *(f"eval_{name}" for name in METRICS)):
        expected, found = logs_of(theirs, name), logs_of(ours, name)
        assert len(found) == 4 and len(set(found)) > 1, name
        assert all(abs(one - other) < 1e-3 * max(1, abs(one)) for one, other in zip(expected, found, strict=True)), name
    assert ours.state.best_metric == theirs.state.best_metric == max(logs_of(ours, "eval_rewards/accuracies")[1:])
    assert ours.state.best_global_step == theirs.state.best_global_step


def test_metrics_of_lists_are_means_over_pairs_of_responses(tokenizer, tmp_path):
    rows = [
        {"prompt": "a ", "responses": ["b", "cd", "efg"], "labels": {"good": [2, 0, 1], "short": [1, 1, 0]}},
        {"prompt": "a b ", "responses": ["so", "no"], "labels": {"good": [0, 1], "short": [1, 1]}},
    ]
    config = arguments(MultiObjectiveDPOConfig, tmp_path, beta=0.5, objective_weights=[0.5, 0.5])
    trainer = MultiObjectiveDPOTrainer(
        llama(), llama(5), config, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )
    found = trainer.evaluate()
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(2)])
    _, outputs = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
    reward = 0.5 * (outputs["scores"] - outputs["reference"]).detach()
    pairs = [(0, 0, 1), (0, 0, 2), (0, 2, 1), (0, 0, 2), (0, 1, 2), (1, 1, 0)]  # of both objectives
    chosen = torch.tensor([float(reward[n, i]) for n, i, _ in pairs])
    rejected = torch.tensor([float(reward[n, j]) for n, _, j in pairs])
    assert abs(found["eval_rewards/chosen"] - float(chosen.mean())) < 1e-5
    assert abs(found["eval_rewards/rejected"] - float(rejected.mean())) < 1e-5
    assert abs(found["eval_rewards/margins"] - float((chosen - rejected).mean())) < 1e-5
    assert abs(found["eval_rewards/accuracies"] - float((chosen > rejected).float().mean())) < 1e-6


def test_adapters_train_as_in_trl_on_a_policy_that_differs_from_its_reference(tokenizer, tmp_path):
    def adapted():
        torch.manual_seed(2)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        return peft.get_peft_model(llama(), config)

    options = dict(gradient_checkpointing=True, use_weighting=True, ld_alpha=0.5, learning_rate=0.5)
    both(tokenizer, tmp_path, adapted, ref_model=lambda: llama(5), **options)


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("name", sorted(_options.REFUSED))
def test_a_refused_option_is_named_with_its_value_and_the_remedy(tokenizer, tmp_path, name):
    value = {"eval_do_concat_batches": False, "include_for_metrics": ["loss"], "label_smoothing_factor": 0.1,
             "dataset_num_proc": 2, "truncation_mode": "keep_end"}.get(name, True)  # fmt: skip
    message = re.escape(f"{name} is {value!r} but has no meaning here; {_options.REFUSED[name]}")
    with pytest.raises(ValueError, match=message):
        make(MultiObjectiveDPOTrainer, tokenizer, tmp_path, **{name: value})


def test_options_of_trl_are_not_dropped_by_the_trainer_for_transformers(tokenizer, tmp_path):
    parts = dict(train_dataset=ROWS, processing_class=tokenizer)
    with pytest.raises(TypeError, match="args is a DPOConfig, whose loss_type"):
        MultiObjectiveTrainer(llama(), arguments(trl.DPOConfig, tmp_path), **parts)


@pytest.mark.parametrize(
    "name", ["per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"]
)
def test_a_batch_of_nothing_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} is 0 but must be at least 1"):
        _options.check_options(arguments(trl.DPOConfig, tmp_path, **{name: 0}), trl.DPOConfig)
    with pytest.raises(ValueError, match=f"{name} is 0 but must be at least 1"):
        arguments(MultiObjectiveGRPOConfig, tmp_path, **{name: 0})


def test_an_option_that_a_newer_release_adds_is_refused_where_it_is_set(tmp_path):
    @dataclasses.dataclass
    class Newer(trl.DPOConfig):
        brand_new: int = 3

    _options.check_options(arguments(Newer, tmp_path), Newer)
    with pytest.raises(ValueError, match="brand_new is 4 but this release of mopl does not know what it does"):
        _options.check_options(arguments(Newer, tmp_path, brand_new=4), Newer)


def test_options_that_exclude_one_another_or_the_data_are_refused(tokenizer, tmp_path):
    lists = [{"prompt": "a", "responses": ["b", "c", "d"], "labels": {"good": [1, 2, 3]}}]

    def refused(message, model=None, **options):
        rows = options.pop("rows", ROWS)
        with pytest.raises(ValueError, match=message):
            make(MultiObjectiveDPOTrainer, tokenizer, tmp_path, model, rows, ref_model=None, **options)

    refused("ld_alpha is for pairs but there are lists", rows=lists, ld_alpha=0.5)
    refused("use_weighting is for pairs but there are lists", rows=lists, use_weighting=True)
    refused("loss_type sft is for pairs but there are lists", rows=lists, loss_type=["sft"])
    conditioned = HyperPromptModel(llama(), HyperPrompt(1, 2, 2, 16))
    refused("a model with adapters or a prompt is its own reference", conditioned, sync_ref_model=True)
    refused("loss_type aot sorts the pairs", conditioned, loss_type=["aot"])
    refused("loss_type aot sorts the pairs", rows=[{**row, "objective_beta": [0.1]} for row in ROWS], loss_type=["aot"])
    refused("a reference that moves is needed", sync_ref_model=True, reference_free=True)
    known = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in ROWS]
    refused("there is no model that could move", rows=known, sync_ref_model=True)
    refused("ld_alpha is 0.5.* ref_rejected_logps are plain sums", rows=known, ld_alpha=0.5)
    mixture = ParameterMixture(llama(), 1)
    refused("pass gradient_checkpointing=False", mixture, gradient_checkpointing=True)
    with pytest.warns(UserWarning, match="ref_model was passed but all data has the columns"):
        make(MultiObjectiveDPOTrainer, tokenizer, tmp_path, None, known)
    store = dict(precompute_ref_log_probs=True, reference_store="store")
    refused("reference_store is 'store' but all data has the columns ref_chosen_logps", rows=known, **store)
    refused("truncation_mode is 'middle'", max_length=None, truncation_mode="middle")
    refused("concentration is 0.5 but the model takes no weights", concentration=0.5)
    refused("weights_per is 'step' but the model takes no weights", weights_per="step")
    refused(
        "concentration is 0.5 but objective_weights are fixed", conditioned, concentration=0.5, objective_weights=[1.0]
    )
    refused("cosine_sign is 'cosmos' but cosine_penalty is 0", cosine_sign="cosmos")
    refused("objectives is empty", objectives=[])
    refused("^beta is 0.0 but must be positive", beta=0.0)
    refused("objective_weights has 2 numbers but there is 1 objective", objective_weights=[0.5, 0.6])
    for columns in ({"objective_weights": [1.0]}, {"objective_beta": [0.2]}, dict.fromkeys(known[0], -1.0)):
        some = [row | (columns if n != 2 else {}) | row for n, row in enumerate(ROWS)]
        refused("row 3 has no .* and others of its batch have; give them to all rows or to none", rows=some)
    pushes = dict(push_to_hub=True, hub_model_id="a/b", hub_token="c")
    refused("hub_strategy is 'every_save'.* pass hub_strategy='end'", conditioned, **pushes)
    refused("hub_strategy is 'checkpoint'", conditioned, hub_strategy="checkpoint", **pushes)
    fused = {"fused_linear_cross_entropy": True}
    refused("asks for fused_linear_cross_entropy", use_liger_kernel=True, liger_kernel_config=fused)


@pytest.mark.parametrize(("conditioned", "strategy"), [(True, "end"), (False, "every_save")])
def test_what_can_be_pushed_is_not_refused(tokenizer, tmp_path, monkeypatch, conditioned, strategy):
    asked = []
    monkeypatch.setattr(transformers.Trainer, "init_hf_repo", lambda self, *_, **__: asked.append(self))
    model = HyperPromptModel(llama(), HyperPrompt(1, 2, 2, 16)) if conditioned else llama()
    options = dict(push_to_hub=True, hub_model_id="a/b", hub_token="c", hub_strategy=strategy, ref_model=None)
    trainer = make(MultiObjectiveDPOTrainer, tokenizer, tmp_path, model, **options)
    assert asked == [trainer]


def test_a_training_with_a_moving_reference_is_not_resumed_after_the_first_move(tokenizer, tmp_path):
    options = dict(sync_ref_model=True, ref_model_sync_steps=2, save_strategy="steps", save_steps=1, max_steps=2)
    make(MultiObjectiveDPOTrainer, tokenizer, tmp_path, **options).train()
    trainer = make(MultiObjectiveDPOTrainer, tokenizer, tmp_path, **options)
    with pytest.raises(ValueError, match="resumed at step 2, after the reference was moved"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.state.global_step == 2


def test_the_padding_token_reaches_tokenizer_batches_and_model_as_in_trl(tokenizer, tmp_path):
    for kind in (trl.DPOTrainer, MultiObjectiveDPOTrainer):
        own = copy.deepcopy(tokenizer)
        own.pad_token = "<pad>"
        trainer = make(kind, own, tmp_path, pad_token="!")
        padding = own.convert_tokens_to_ids("!")
        batch = trainer.data_collator([trainer.train_dataset[number] for number in range(2)])
        assert own.pad_token_id == padding and trainer.model.config.pad_token_id == padding
        assert trainer.model.generation_config.pad_token_id == padding
        assert bool((batch["input_ids"][batch["attention_mask"] == 0] == padding).all())
        assert bool((batch["attention_mask"] == 0).any())


def test_layer_kernels_of_liger_are_left_as_in_trl(tmp_path):
    from mopl.integrations._setup import prepare_arguments

    args = arguments(MultiObjectiveDPOConfig, tmp_path, use_liger_kernel=True, liger_kernel_config={"rms_norm": False})
    prepare_arguments(args, trl.DPOConfig)
    assert args.liger_kernel_config == {"rms_norm": False, "fused_linear_cross_entropy": False}


# ---------------------------------------------------------------- data


def test_rows_that_cannot_be_used_are_left_out_where_that_is_asked_for(tokenizer, tmp_path):
    rows = [
        {**row, "good": "?" if n == 1 else 1.0, "objective_weights": [1.0], "length": n} for n, row in enumerate(ROWS)
    ]
    rows = [row | {"good": [0.2, 0.1 * n]} if n != 1 else row for n, row in enumerate(rows)]
    for tokenization in ("trl", "mopl"):
        config = arguments(MultiObjectiveDPOConfig, tmp_path, objectives=["good"], tokenization=tokenization)
        parts = dict(train_dataset=rows, processing_class=tokenizer)
        with pytest.raises(ValueError, match=r"row 2(?s:.)*pass on_error='skip'"):
            MultiObjectiveDPOTrainer(llama(), llama(5), config, **parts)
        data = MultiObjectiveDPOTrainer(llama(), llama(5), config, **parts, on_error="skip").train_dataset
        assert len(data) == len(ROWS) - 1
        kept = [row for n, row in enumerate(ROWS) if n != 1]
        for example, row in zip(data.lists, kept, strict=True):
            found = tokenizer.decode(example.tokens.responses[0], skip_special_tokens=True).replace(" ", "")
            assert found == row["chosen"].replace(" ", "")
        second = [float(example.tokens.labels[0, 1]) for example in data.lists]
        assert second == pytest.approx([0.1 * n for n in range(len(ROWS)) if n != 1])


def test_a_template_is_for_mopls_tokens(tokenizer, tmp_path):
    chat = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>",
                                                eos_token="<eos>")  # fmt: skip
    chat.chat_template = "{% for m in messages %}a{{ m.content }}{{ eos_token }}{% endfor %}" + (
        "{% if add_generation_prompt %}a{% endif %}"
    )
    config = arguments(MultiObjectiveDPOConfig, tmp_path, tokenization="mopl")
    parts = dict(train_dataset=ROWS[:2], processing_class=chat)
    found = [
        MultiObjectiveDPOTrainer(llama(), llama(5), config, **parts, template=template).train_dataset[0].tokens.prompt
        for template in ("auto", "chat", "plain")
    ]
    assert list(found[0]) == list(found[1]) != list(found[2])
    with pytest.raises(ValueError, match="template is 'plain' but pairs are written as TRL does it"):
        make(MultiObjectiveDPOTrainer, chat, tmp_path, template="plain")


def test_on_a_stream_both_trainers_end_at_the_same_weights(tokenizer, tmp_path):
    found = []
    for kind, config in ((trl.DPOTrainer, trl.DPOConfig), (MultiObjectiveDPOTrainer, trl.DPOConfig)):
        args = arguments(config, tmp_path, max_steps=2)
        stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
        trainer = kind(llama(), llama(5), args=args, train_dataset=stream, processing_class=tokenizer)
        trainer.train()
        found.append(dict(trainer.model.named_parameters()))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6)


def test_a_command_line_of_the_arguments_has_the_texts_of_the_docstrings():
    shown = " ".join(trl.TrlParser(MultiObjectiveDPOConfig).format_help().split())
    assert "Of the Dirichlet distribution that w is drawn from." in shown
    assert "of `precompute_ref_log_probs` are read and to which those that it lacks are written" in shown
    for kind in (MultiObjectiveConfig, MultiObjectiveDPOConfig):
        own = {*kind.__annotations__, *ObjectiveArguments.__annotations__}
        assert all(entry.metadata.get("help") for entry in dataclasses.fields(kind) if entry.name in own)
