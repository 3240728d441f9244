"""One model called from several threads at once: every call gives what it gives alone."""

import copy
import pickle
import sys
import threading

import pytest
import torch

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")

from tiny_language_models import build

from mopl.alignment import fuse, score_sequences
from mopl.conditioning import HyperPrompt, HyperPromptModel, LoraMixture, ParameterMixture
from mopl.training import make_accelerator
from mopl.training.parallel import prepare

THREADS, CALLS = 4, 25
IDS = torch.randint(3, 40, (THREADS, 3, 12), generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.tensor([[0.0, 1.0], [0.3, 0.7], [0.6, 0.4], [1.0, 0.0]])


def moved(model, modules):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in modules.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def parameter_mixture():
    mixture = ParameterMixture(build(initializer_range=0.3), 2)
    return moved(mixture, mixture.others)


def lora_mixture():
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return LoraMixture(fuse(build(initializer_range=0.3)), 2, config=config).eval()


def hyper_prompt():
    model = build(initializer_range=0.3)
    prompt = HyperPrompt(2, 3, 2, model.config.hidden_size)
    return moved(HyperPromptModel(model, prompt), prompt)


def scores(model, i, **options):
    labels = IDS[i].clone()
    labels[:, :4] = -100
    return score_sequences(model, {"input_ids": IDS[i], "labels": labels}, **options).scores


def logits(model, i, **options):
    return model(input_ids=IDS[i], **options).logits


def generated(model, i):
    torch.manual_seed(0)
    # With sampling the generator, which threads share, would decide.
    return model.generate(
        IDS[i], torch.ones_like(IDS[i]), weights=WEIGHTS[i], max_new_tokens=3, do_sample=False, pad_token_id=0
    )


def merged(mixture, i):
    mixture._checked = False  # as the first time
    return mixture.merge(WEIGHTS[i])(input_ids=IDS[i]).logits


def trained(model):
    """What a training in mixed precision gives back."""
    shared = accelerate.state.AcceleratorState._shared_state  # the precision of every accelerator of a process
    kept = dict(shared)
    shared.clear()
    try:
        accelerator = make_accelerator("bf16", cpu=True)
        prepare(accelerator, model, torch.optim.SGD(model.parameters(), 0.1)).finish(gather=True)
    finally:
        shared.clear()
        shared.update(kept)
    return model


CASES = {
    "scores": (lambda: fuse(build(initializer_range=0.3)), scores),
    "scores and logits": (lambda: fuse(build(initializer_range=0.3)), lambda m, i: (scores, logits)[i % 2](m, i)),
    "parameter mixture": (parameter_mixture, lambda m, i: logits(m, i, weights=WEIGHTS[i])),
    "parameter mixture, generation": (
        parameter_mixture, lambda m, i: generated(m, i) if i % 2 else logits(m, i, weights=WEIGHTS[i])
    ),
    "lora mixture": (lora_mixture, lambda m, i: logits(m, i, weights=WEIGHTS[i])),
    "lora mixture, scores": (lora_mixture, lambda m, i: scores(m, i, weights=WEIGHTS[i])),
    "lora mixture, generation": (
        lora_mixture, lambda m, i: generated(m, i) if i % 2 else logits(m, i, weights=WEIGHTS[i].expand(3, 2))
    ),
    "lora mixture, merged": (lora_mixture, lambda m, i: merged(m, i) if i % 2 else logits(m, i, weights=WEIGHTS[i])),
    "parameter mixture, merged": (
        parameter_mixture, lambda m, i: merged(m, i) if i % 2 else logits(m, i, weights=WEIGHTS[i])
    ),
    "parameter mixture, trained": (
        lambda: trained(parameter_mixture()), lambda m, i: logits(m, i, weights=WEIGHTS[i])
    ),
    "fused, trained": (lambda: trained(fuse(build(initializer_range=0.3))), scores),
    "hyper prompt": (hyper_prompt, lambda m, i: logits(m, i, weights=WEIGHTS[i].expand(3, 2))),
}  # fmt: skip


@pytest.fixture
def often():
    """Switch threads often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("case", CASES)
def test_calls_in_threads_give_what_they_give_alone(case, often):
    make, call = CASES[case]
    model = make()
    with torch.no_grad():
        expected = [call(model, i) for i in range(THREADS)]
    assert not any(torch.equal(expected[0], other) for other in expected[1:] if other.shape == expected[0].shape)
    start, failures = threading.Barrier(THREADS), []

    def work(i):
        start.wait()
        for _ in range(CALLS):
            try:
                with torch.no_grad():
                    torch.testing.assert_close(call(model, i), expected[i], rtol=1e-5, atol=1e-5)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "they wait for one another"
    assert not failures, f"{len(failures)} of {THREADS * CALLS} calls: {failures[0]}"


@pytest.mark.parametrize("make", [parameter_mixture, lora_mixture])
def test_a_mixture_in_place_is_in_place_for_all_threads(make):
    model = make()
    found = []
    with torch.no_grad(), model.at(WEIGHTS[1]) as plain:
        expected = logits(plain, 0)
        thread = threading.Thread(target=lambda: found.append(logits(plain, 0).detach()), daemon=True)
        thread.start()
        thread.join(60)
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize(
    ("make", "turns_of", "options"),
    [
        (parameter_mixture, lambda mixture: mixture._turns, {"weights": WEIGHTS[1]}),
        (lambda: fuse(build()), lambda model: model.forward._turns, {}),
    ],
    ids=["parameter mixture", "fused"],
)
def test_a_copy_does_not_wait_for_its_original(make, turns_of, options):
    model = make()
    twins, found = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))], []
    thread = threading.Thread(target=lambda: found.extend(logits(twin, 0, **options) for twin in twins), daemon=True)
    with turns_of(model).lock:
        thread.start()
        thread.join(60)
        assert len(found) == 2


def test_a_mixture_is_saved_as_it_is_while_another_thread_generates(tmp_path):
    mixture, done = parameter_mixture(), threading.Event()

    def work():
        while not done.is_set():
            generated(mixture, 1)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        for n in range(5):
            mixture.save_pretrained(tmp_path / str(n))
    finally:
        done.set()
        thread.join(60)
    for n in range(5):
        again = ParameterMixture.from_pretrained(tmp_path / str(n))
        for ours, theirs in zip(again.parameters(), mixture.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_what_a_backward_pass_computes_again_is_not_mixed_by_another_thread(often):
    model, done, failures = lora_mixture(), threading.Event(), []
    model.gradient_checkpointing_enable()
    model.causal_lm.train()  # without dropout; transformers recomputes in training only

    def gradient():
        model.zero_grad()
        logits(model, 0, weights=WEIGHTS[1]).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    with torch.no_grad():
        other = logits(model, 3, weights=WEIGHTS[3])
    expected = gradient()

    def work():
        while not done.is_set():
            with torch.no_grad():
                failures.extend([1] * (not torch.allclose(logits(model, 3, weights=WEIGHTS[3]), other, atol=1e-5)))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        for _ in range(15):
            torch.testing.assert_close(gradient(), expected, rtol=1e-4, atol=1e-5)
    finally:
        done.set()
        thread.join(60)
    assert not failures


def test_a_fused_model_is_compiled_as_a_whole():
    model = fuse(build())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=IDS[0]).logits, logits(model, 0))
