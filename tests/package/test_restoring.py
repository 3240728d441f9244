"""What is switched for a moment comes back, also after an error: modes, generators, adapters in a language model."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mopl
from mopl._modules import modules_of, parameters_in
from mopl._restoring import evaluating, modes_kept, seeded

MOPL = Path(mopl.__file__).parent


def partly_frozen() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)))
    model[1].eval()
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def fail(*_, **__):
    raise MemoryError("of the test")


@pytest.mark.parametrize("kept", [modes_kept, evaluating])
def test_every_module_gets_its_own_mode_back_after_an_error(kept):
    model = partly_frozen()
    before = modes(model)
    assert before == [True, True, False, False, False]
    with pytest.raises(MemoryError), kept(model, None):
        model.eval() if kept is evaluating else model.train()
        fail()
    assert modes(model) == before


def test_evaluating_means_evaluation():
    model = partly_frozen()
    with evaluating(model):
        assert not any(modes(model))


def test_a_module_with_a_mode_of_its_own_is_asked_for_it():
    class Own(nn.Linear):
        def train(self, mode=True):
            asked.append(mode)
            return super().train(mode)

    asked, model = [], nn.Sequential(Own(2, 2), nn.Dropout())
    with evaluating(model):
        assert asked == [False] and not any(modes(model))
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].eval = lambda: asked.append("own")
    model.eval = lambda: asked.append("outer")
    with evaluating(model):
        assert asked == [False, "outer"]


def test_modules_are_those_of_torch_in_their_order():
    shared = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model = nn.ModuleDict(
        {"a": shared, "b": nn.Sequential(shared[1], nn.Linear(2, 2), shared), "c": nn.Bilinear(1, 1, 1)}
    )
    model["b"].register_module("nothing", None)
    model["c"].register_parameter("nothing", None)
    model["c"].weight = shared[0].weight
    assert modules_of(model) == list(model.modules())
    assert set(parameters_in(modules_of(model))) == set(model.parameters())


def test_a_seed_is_for_its_block_only():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    with pytest.raises(MemoryError), seeded(1):
        torch.rand(7)
        fail()
    assert torch.equal(torch.rand(3), wanted)
    with seeded(1):
        first = torch.rand(2)
    with seeded(1):
        assert torch.equal(torch.rand(2), first)
    torch.manual_seed(5)
    with seeded(None):
        assert torch.equal(torch.rand(3), wanted)


def test_scoring_lists_gives_the_mode_back_after_an_error(monkeypatch):
    pytest.importorskip("accelerate")
    import numpy as np

    from mopl.language_models import scoring
    from mopl.language_models.collate import ListCollator
    from mopl.language_models.tokenization import TokenizedList
    from mopl.training import make_accelerator

    lists = [TokenizedList(np.array([3]), (np.array([4]), np.array([5])), np.zeros((1, 2), np.float32), 0)]
    model, seen = partly_frozen(), []

    def score(model, *_):
        seen.append(modes(model))
        fail()

    monkeypatch.setattr(scoring, "score_batch", score)
    before = modes(model)
    with pytest.raises(MemoryError):
        scoring.score_lists(
            model, lists, collator=ListCollator(), tokens_per_batch=8, accelerator=make_accelerator(cpu=True)
        )
    assert seen == [[False] * 5] and modes(model) == before


def test_a_training_leaves_modes_and_generators_alone_even_if_it_fails():
    pytest.importorskip("accelerate")
    from mopl.training import TrainingConfig, make_accelerator, train

    class Source:
        batch_size = 1

        def __call__(self, step, part, parts):
            return torch.ones(1, 2)

    def loss(model, batch, step):
        assert model.training
        if step == 2:
            fail()
        return model(batch).square().mean(), {}

    for steps in (2, 3):
        model = partly_frozen()
        torch.manual_seed(5)
        wanted = torch.rand(3)
        torch.manual_seed(5)
        before = modes(model)
        try:
            train(model, Source(), loss, TrainingConfig(steps=steps), accelerator=make_accelerator(cpu=True))
        except MemoryError:
            assert steps == 3
        assert modes(model) == before
        assert torch.equal(torch.rand(3), wanted)


def test_a_failed_training_takes_its_adapters_out_of_the_language_model(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    from tiny_language_models import build

    from mopl.alignment import AlignConfig
    from mopl.alignment import stages as alignment
    from mopl.experiments import stages
    from mopl.experiments.cos_dpo import Part
    from mopl.experiments.methods import TABLE
    from mopl.language_models.head import fuse
    from mopl.training import make_accelerator

    base = fuse(build())
    plain = [name for name, _ in base.named_modules()]
    config = AlignConfig("m", "d", gradient_checkpointing=True, lora_targets=("q_proj",)).resolved(9)
    lists = SimpleNamespace(tokens=SimpleNamespace(lists=[]))
    run = object.__new__(alignment.Stages)
    vars(run).update(
        config=config, base=base, objectives=("a", "b"), accelerator=make_accelerator(cpu=True), log=None, say=print,
        splits={"train": lists}, references={"train": None}, collator=None,
    )  # fmt: skip
    monkeypatch.setattr(alignment, "AlignSource", lambda *_, **__: None)

    def train(model, *_, **__):
        assert any("lora_" in name for name, _ in base.named_modules())
        assert any(getattr(module, "gradient_checkpointing", False) for module in base.modules())
        fail()

    monkeypatch.setattr(stages, "train", train)
    draw, method = (lambda step: torch.ones(9, 2)), TABLE["weight-cos-dpo"]
    with pytest.raises(MemoryError):
        run.train_part(Part("weight-cos-dpo", tmp_path, method, torch.eye(2), draw, draw, None))
    assert [name for name, _ in base.named_modules()] == plain
    assert not any(getattr(module, "gradient_checkpointing", False) for module in base.modules())


def test_no_mode_or_seed_is_set_without_a_way_back():
    """`.train(...)` of a model, `manual_seed` and the like stand in `_restoring.py`, or in what restores by itself."""
    known = {
        "_restoring.py",
        "ranking/model.py",  # RankingModel.train keeps its base in evaluation mode
        "training/loop.py",  # inside modes_kept and generators_kept
        "training/accumulation.py",  # called by training/loop.py, inside the same
        "training/gradient_cache.py",  # inside torch.random.fork_rng
        "integrations/nemo_rl.py",  # of gradients, as a context
        "clp/policies.py",  # inside generators_kept
        "integrations/_checkpoints.py",  # Trainer.train, which trains
    }
    found = {}
    for file in MOPL.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value)
                setters = ("train", "manual_seed", "set_rng_state", "set_grad_enabled")
                trains = node.func.attr == "train" and len(node.args) > 1  # a method of a run and its folder, no mode
                if node.func.attr in setters and not trains and "Generator" not in owner:
                    found.setdefault(str(file.relative_to(MOPL)), []).append(ast.unparse(node))
    assert set(found) <= known, found
