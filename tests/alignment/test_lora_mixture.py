"""COS-DPO with mixed adapters: trained like virtual tokens, exported as a plain model or as one adapter, exactly."""

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

from mopl.alignment import open_run
from mopl.alignment.methods import ListScores, ResponseLoss, score_batch
from mopl.alignment.reference import score_lists
from mopl.conditioning import HyperPromptModel, LoraMixture
from mopl.language_models import models
from mopl.language_models.collate import ListCollator
from mopl.language_models.generate import generate
from mopl.training import make_accelerator
from tests.alignment.test_training import (  # noqa: F401
    NAMES,
    conditioned,
    folder,
    scalarized_loss,
    settings,
    source,
    tokenized,
)
from tests.commands.test_generate_and_export import base, make_run, printed  # noqa: F401  # base is a fixture

MIXTURE = settings(conditioning="lora-mixture")
DENSE = ResponseLoss(labels=("softmax", "softmax"))


@pytest.fixture
def mixture(folder) -> LoraMixture:  # noqa: F811
    return conditioned(models.load_causal_lm(str(folder)), MIXTURE)


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    scalarized_loss(DENSE, NAMES)(model, batch, 0)[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("packed", [False, True])
def test_lists_at_weights_of_their_own_score_as_one_by_one(mixture, packed) -> None:
    lists, collate = tokenized(), ListCollator(packed=packed)
    w = torch.distributions.Dirichlet(torch.ones(2)).sample((len(lists),))
    together = score_batch(mixture, collate(lists), w)
    for row, item in enumerate(lists):
        alone = score_batch(mixture, collate([item]), w[row])
        torch.testing.assert_close(together[row, : len(item.responses)], alone[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together, score_batch(mixture, collate(lists), w.flip(1)), atol=1e-2)


def test_at_a_vertex_the_other_adapter_gets_no_gradient(mixture) -> None:
    given = source(weights=lambda step: torch.tensor([[1.0, 0.0]]).expand(6, 2))(0)
    for name, gradient in gradients(mixture, given).items():
        assert bool((gradient != 0).any()) == (".low." in name), name


def test_the_reference_of_the_step_is_the_one_computed_beforehand(mixture) -> None:
    lists = tokenized()
    with mixture.reference():
        known = score_lists(
            mixture,
            lists,
            collator=ListCollator(),
            tokens_per_batch=64,
            accelerator=make_accelerator("no", cpu=True),
            weights=torch.tensor([0.5, 0.5]),
        )
    before = gradients(mixture, source(lists)(0))
    after = gradients(mixture, source(lists, reference=ListScores(lists, known))(0))
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, atol=1e-6, rtol=1e-5)


def test_recomputed_activations_give_the_same_gradients(mixture) -> None:
    batch = source()(0)
    plain = gradients(mixture, batch)
    models.recompute_activations(mixture, True)
    mixture.train()
    for name, gradient in gradients(mixture, batch).items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-5)


OPTIONS = {
    "lora_rslora": True, "lora_rank_pattern": ["q_proj=1"], "lora_alpha_pattern": ["v_proj=3.5"],
    "lora_modules_to_save": ["lm_head", "norm"],
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {**OPTIONS, "packing": True}])
def test_a_run_is_loaded_asked_and_exported_both_ways(base: Path, capsys, tmp_path: Path, options) -> None:  # noqa: F811
    run = make_run(base, tmp_path, conditioning="lora-mixture", learning_rate=0.1, **options)
    opened = open_run(run)
    model = opened.load()
    assert isinstance(model, LoraMixture) and model.record.objectives == ("short", "low")
    assert json.loads((run / "model" / "mopl.json").read_text())["kind"] == "LoraMixture"
    tokens = opened.tokenizer
    ids = torch.tensor([tokens("w1 w2 w3")["input_ids"]])
    with torch.no_grad():
        wanted = model(ids, weights=torch.tensor([0.7, 0.3])).logits
        with model.reference():
            assert not torch.allclose(model(ids).logits, wanted, atol=1e-3)

    weights = ["--weights", "0.7", "0.3"]
    few = ["--max-new-tokens", "4", "--device", "cpu"]
    options = {"scale": 2.0, "candidates": 2, "seed": 1, "max_new_tokens": 4}
    answer = generate(model, opened.list_tokenizer, "w1 w2", [0.7, 0.3], **options)[0]
    sampled = ["--scale", "2", "--candidates", "2", "--seed", "1"]
    assert printed(capsys, "generate", str(run), *weights, *few, *sampled, "w1 w2") == answer.text + "\n"
    assert printed(capsys, "generate", str(run / "model"), *weights, *few, "w1 w2", "--raw")

    printed(capsys, "export", str(run), *weights, str(tmp_path / "plain"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    printed(capsys, "export", str(run), *weights, "--kind", "adapter", str(tmp_path / "adapter"))
    adapted = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter")
    )
    assert adapted.peft_config["default"].r == 4  # two adapters of rank 2 side by side
    with torch.no_grad():
        for other in (plain, adapted):
            torch.testing.assert_close(other(ids).logits, wanted, atol=1e-5, rtol=1e-5)
    record = json.loads((tmp_path / "adapter" / "mopl.json").read_text())
    assert record["form"] == "adapter" and record["weights"] == pytest.approx([0.7, 0.3])
    assert not (tmp_path / "adapter" / "mopl_mixture").exists()


def test_a_soup_averages_adapters_of_any_kind_and_what_is_trained_whole(base: Path, tmp_path: Path) -> None:  # noqa: F811
    options = {**OPTIONS, "lora_dora": True, "lora_rank_pattern": []}
    run = open_run(make_run(base, tmp_path, method="dpo-soup", learning_rate=0.1, **options))
    ids = torch.tensor([[7, 8, 9, 10]])
    states = []
    for weights in ([1.0, 0.0], [0.0, 1.0], [0.25, 0.75]):
        model = run.load(weights=weights)
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
        with torch.no_grad(), model.reference():
            plain = transformers.AutoModelForCausalLM.from_pretrained(base)
            assert torch.equal(model(ids).logits, plain(ids).logits)
    first, second, mixed = states
    moved = [name for name in first if not torch.equal(first[name], second[name])]
    assert any("magnitude" in n for n in moved) and any("lm_head" in n for n in moved), moved
    for name in first:
        torch.testing.assert_close(mixed[name], 0.25 * first[name] + 0.75 * second[name])


def test_what_is_trained_whole_in_16_bit_is_said(base: Path, tmp_path: Path) -> None:  # noqa: F811
    said: list[str] = []
    options = {"conditioning": "lora-mixture", "dtype": "bfloat16", "say": said.append}
    make_run(base, tmp_path, lora_modules_to_save=["norm"], **options)
    assert any("trained parameters are bfloat16" in line and "--dtype float32" in line for line in said), said
    said.clear()
    (tmp_path / "plain").mkdir()
    make_run(base, tmp_path / "plain", **options)
    assert not any("bfloat16" in line for line in said), said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 0}, "lora_rank must be at least 1"),
        ({"lora_rank_pattern": ["q_proj"]}, "an entry is MODULE=NUMBER, with a rank"),
        ({"lora_rank_pattern": ["q_proj=1.5"]}, "'q_proj=1.5' but an entry is MODULE=NUMBER"),
        ({"lora_alpha_pattern": ["q_proj=-1"]}, "'q_proj=-1' but an entry is MODULE=NUMBER, with a positive number"),
        ({"method": "temperature-cos-dpo"}, "conditioning='hyper-prompt'"),
        ({"method": "all"}, "conditioning='hyper-prompt'"),
    ],
)
def test_what_cannot_be_mixed_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(conditioning="lora-mixture", **changes)


def test_virtual_tokens_start_at_the_embeddings_of_words(base: Path, tmp_path: Path) -> None:  # noqa: F811
    run = make_run(base, tmp_path, prompt_text="w3 w5", learning_rate=1e-9)
    model = open_run(run).load()
    assert isinstance(model, HyperPromptModel)
    tokens = open_run(run).tokenizer("w3 w5", add_special_tokens=False)["input_ids"]
    embeddings = model.causal_lm.get_input_embeddings().weight[torch.tensor(tokens)]
    torch.testing.assert_close(model.hyper_prompt.prefix, embeddings.detach(), atol=1e-4, rtol=0)
