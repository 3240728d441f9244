"""Hyper Prompt Tuning: the prompt by its definition, the conditioned model by PEFT's prompt tuning and by hand."""

import copy

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
import peft
from tiny_language_models import VOCABULARY, K, build, lora
from tiny_language_models import prompt as trained_prompt

from mopl.alignment import fuse, score_sequences
from mopl.conditioning import HyperPrompt, HyperPromptModel, sample_weights

FAMILIES = ("llama", "gpt2", "gemma2", "opt")
WEIGHTS = torch.tensor([[0.2, 0.8], [0.7, 0.3], [1.0, 0.0]])


def conditioned(family: str = "llama", **kwargs) -> HyperPromptModel:
    model = build(family)
    return HyperPromptModel(model, trained_prompt(model.get_input_embeddings().weight.shape[1]), **kwargs).eval()


def text(padding: str = "right") -> dict[str, Tensor]:
    """Three rows of 12, 9 and 10 tokens."""
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, padded in ((1, 3), (2, 2)):
        where = slice(0, padded) if padding == "left" else slice(12 - padded, 12)
        ids[row, where], mask[row, where] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


# ---------------------------------------------------------------- the prompt


@pytest.mark.parametrize("takes_beta", [False, True])
def test_the_mask_starts_at_exactly_one_for_every_w_and_the_prompt_at_p(takes_beta: bool) -> None:
    prompt = HyperPrompt(3, 8, 4, 32, takes_beta=takes_beta)
    w = sample_weights(3, 50, 0.3, seed=0, step=0)
    beta = torch.rand(50, 3) + 0.1 if takes_beta else None
    assert prompt.mask(w, beta).shape == (50, 8, 32) and bool((prompt.mask(w, beta) == 1).all())
    assert torch.equal(prompt(w, beta), prompt.prefix.expand(50, 8, 32))
    assert abs(float(prompt.prefix.detach().std()) - 0.02) < 0.005 and prompt.width == 32
    assert HyperPrompt(12, 8, 4, 32).width == 48


def test_the_mask_is_a_of_w_times_b_of_w_and_its_rank_is_at_most_r() -> None:
    prompt = trained_prompt().double()
    mask = prompt.mask(WEIGHTS)
    left, right = prompt.left(WEIGHTS.double()), prompt.right(WEIGHTS.double())
    torch.testing.assert_close(mask, left.view(3, K, 3) @ right.view(3, 3, 32))
    assert mask.dtype == torch.float64
    assert torch.linalg.matrix_rank(mask).tolist() == [3, 3, 3]
    torch.testing.assert_close(prompt(WEIGHTS), prompt.prefix * mask)


def test_training_leaves_the_mask_of_rank_r_and_not_of_rank_one() -> None:
    prompt = HyperPrompt(2, 8, 4, 32)
    optimizer = torch.optim.Adam(prompt.parameters(), lr=1e-2)
    torch.manual_seed(5)
    target = torch.randn(2, 8, 32)
    for _ in range(60):
        optimizer.zero_grad()
        (prompt.mask(WEIGHTS[:2]) - target).square().mean().backward()
        optimizer.step()
    values = torch.linalg.svdvals(prompt.mask(WEIGHTS[:2]))
    assert bool((values[:, 3] > 1e-2 * values[:, 0]).all()) and bool((values[:, 4:] < 1e-5 * values[:, :1]).all())


def test_only_the_direction_of_beta_enters() -> None:
    prompt = trained_prompt(takes_beta=True)
    beta = torch.tensor([0.7, 1.4])
    torch.testing.assert_close(prompt(WEIGHTS, beta), prompt(WEIGHTS, 7 * beta))
    assert not torch.allclose(prompt(WEIGHTS, beta), prompt(WEIGHTS, beta.flip(0)))


def test_the_prompt_keeps_float32_under_autocast_and_in_a_16_bit_model() -> None:
    prompt = trained_prompt()
    expected = prompt(WEIGHTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prompt(WEIGHTS), expected)
    half = prompt.to(torch.bfloat16)
    assert half(WEIGHTS.bfloat16()).dtype == torch.float32


def test_set_prefix_cuts_or_repeats() -> None:
    prompt = HyperPrompt(2, K, 2, 4)
    rows = torch.arange(12.0).view(3, 4)
    prompt.set_prefix(rows)
    assert torch.equal(prompt.prefix, torch.cat([rows, rows[:2]]))
    with pytest.raises(ValueError, match="values has shape"):
        prompt.set_prefix(torch.ones(3, 5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HyperPrompt(2, 4, 5, 32), "rank is 5"),
        (lambda: HyperPrompt(0, 4, 2, 32), "objectives is 0"),
        (lambda: HyperPrompt(2, 4, 2, 32)(torch.ones(3)), r"m = 2"),
        (lambda: HyperPrompt(2, 4, 2, 32)(torch.ones(2), torch.ones(2)), "takes_beta=True"),
        (lambda: HyperPrompt(2, 4, 2, 32, takes_beta=True)(torch.ones(2)), "beta is missing"),
        (lambda: HyperPrompt(2, 4, 2, 32, takes_beta=True)(torch.ones(3, 2), torch.ones(2, 2)), "beta is"),
    ],
)
def test_bad_prompts_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- the conditioned model


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_start_it_is_pefts_prompt_tuning(family: str) -> None:
    model = build(family)
    width = model.get_input_embeddings().weight.shape[1]
    ours = HyperPromptModel(copy.deepcopy(model), HyperPrompt(2, K, 3, width)).eval()
    ours.set_prefix_from_tokens([7, 8, 9, 10, 11])
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=K, token_dim=width)
    theirs = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        theirs.prompt_encoder.default.embedding.weight.copy_(ours.hyper_prompt.prefix)
        batch = text("right")
        kept = batch["attention_mask"].bool()
        torch.testing.assert_close(ours(**batch, weights=WEIGHTS).logits[kept], theirs(**batch).logits[:, K:][kept])
        row = batch["input_ids"][:1]
        torch.testing.assert_close(ours(row, weights=WEIGHTS[:1]).logits, theirs(row).logits[:, K:])


@pytest.mark.parametrize("positions", ["hf", "paper"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_with_one_w_a_row_equals_the_rows_one_by_one(family: str, padding: str, positions: str) -> None:
    model, batch = conditioned(family, positions=positions), text(padding)
    with torch.no_grad():
        together = model(**batch, weights=WEIGHTS).logits
        assert together.shape == (3, 12, VOCABULARY)
        for i in range(3):
            kept = batch["attention_mask"][i].bool()
            alone = model(batch["input_ids"][i][kept][None], weights=WEIGHTS[i]).logits[0]
            torch.testing.assert_close(together[i][kept], alone, atol=2e-5, rtol=1e-4)


def test_w_changes_the_output_and_the_same_w_repeats_it() -> None:
    model, batch = conditioned(), text()
    one, two = model(**batch, weights=WEIGHTS[0]).logits, model(**batch, weights=WEIGHTS[1]).logits
    assert (one - two).abs().max() > 0.1
    assert torch.equal(one, model(**batch, weights=WEIGHTS[0]).logits)
    torch.testing.assert_close(one, model(**batch, weights=WEIGHTS[0].expand(3, 2)).logits)


def test_paper_positions_of_gpt2_are_figure_4_step_by_step() -> None:
    model, ids = conditioned("gpt2", positions="paper"), text()["input_ids"][:1]
    gpt2 = model.causal_lm.transformer
    with torch.no_grad():
        embedded = gpt2.wte(ids) + gpt2.wpe(torch.arange(12))
        x = torch.cat([model.hyper_prompt(WEIGHTS[:1]), embedded], 1)
        for block in gpt2.h:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        expected = model.causal_lm.lm_head(gpt2.ln_f(x))[:, K:]
        torch.testing.assert_close(model(ids, weights=WEIGHTS[:1]).logits, expected, atol=1e-5, rtol=1e-5)
        hf = HyperPromptModel(model.causal_lm, model.hyper_prompt)
        assert (hf(ids, weights=WEIGHTS[:1]).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize(("positions", "of_prefix"), [("hf", range(-K, 0)), ("paper", [0] * K)])
def test_positions_of_a_rotary_model(positions: str, of_prefix: list[int]) -> None:
    """Rotary attention sees differences only, so "hf" is text from 0 with virtual tokens from -k."""
    model, ids = conditioned("llama", positions=positions), text()["input_ids"][:1]
    with torch.no_grad():
        embeds = torch.cat([model.hyper_prompt(WEIGHTS[:1]), model.get_input_embeddings()(ids)], 1)
        at = torch.tensor([[*of_prefix, *range(12)]])
        mask = torch.ones_like(at)
        expected = model.causal_lm(inputs_embeds=embeds, attention_mask=mask, position_ids=at).logits[:, K:]
        torch.testing.assert_close(model(ids, weights=WEIGHTS[:1]).logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", ["hf", "paper"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_explicit_positions_count_the_text_from_0(family: str, positions: str) -> None:
    model, batch = conditioned(family, positions=positions), text("left")
    at = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    a, b = model(**batch, weights=WEIGHTS).logits, model(**batch, weights=WEIGHTS, position_ids=at).logits
    assert torch.equal(a, b)


def test_gradients_reach_p_and_both_networks_and_nothing_of_the_base() -> None:
    model = HyperPromptModel(build(), HyperPrompt(2, K, 3, 32))
    batch = text()
    optimizer = torch.optim.SGD(model.hyper_prompt.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        (model(**batch, weights=WEIGHTS).logits * torch.randn(3, 12, VOCABULARY)).mean().backward()
        gradients = {name: bool(p.grad.any()) for name, p in model.hyper_prompt.named_parameters()}
        assert gradients["prefix"] and gradients["left.2.weight"] and gradients["right.2.weight"]
        optimizer.step()
    assert all(gradients.values()), gradients
    assert all(p.grad is None and not p.requires_grad for p in model.model.parameters())


def test_gradients_of_a_batch_are_the_sums_of_the_rows() -> None:
    model, batch = conditioned("gemma2"), text("left")
    upstream = torch.randn(3, 12, VOCABULARY) * batch["attention_mask"][..., None]
    (model(**batch, weights=WEIGHTS).logits * upstream).sum().backward()
    together = [p.grad.clone() for p in model.hyper_prompt.parameters()]
    model.zero_grad()
    for i in range(3):
        kept = batch["attention_mask"][i].bool()
        alone = model(batch["input_ids"][i][kept][None], weights=WEIGHTS[i]).logits[0]
        (alone * upstream[i][kept]).sum().backward()
    for a, p in zip(together, model.hyper_prompt.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, atol=1e-4 * float(a.abs().max()), rtol=1e-3)


def test_labels_give_the_loss_of_the_text_without_its_first_token() -> None:
    for padding in ("left", "right"):
        model, batch = conditioned(), text(padding)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        out = model(**batch, weights=WEIGHTS, labels=labels)
        target = labels[:, 1:].masked_fill(batch["attention_mask"][:, :-1] == 0, -100)
        expected = nn.functional.cross_entropy(out.logits[:, :-1].transpose(1, 2), target, ignore_index=-100)
        torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("keep", [1, 4, torch.tensor([0, 5, 11])])
def test_logits_to_keep_counts_the_text(keep) -> None:
    model, batch = conditioned(), text("left")
    everything = model(**batch, weights=WEIGHTS).logits
    kept = model(**batch, weights=WEIGHTS, logits_to_keep=keep).logits
    torch.testing.assert_close(kept, everything[:, keep] if isinstance(keep, Tensor) else everything[:, -keep:])


def test_hidden_states_are_those_of_the_text() -> None:
    out = conditioned()(**text(), weights=WEIGHTS, output_hidden_states=True)
    assert {tuple(h.shape) for h in out.hidden_states} == {(3, 12, 32)}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    gradients = []
    for checkpoint in (False, True):
        model = conditioned().train()
        if checkpoint:
            model.causal_lm.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**text(), weights=WEIGHTS, use_cache=False).logits.square().mean().backward()
        gradients.append([p.grad for p in model.hyper_prompt.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------- fused, with adapters, as the reference


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_fused_scores_equal_log_softmax_of_its_own_logits(family: str, padding: str) -> None:
    plain, batch = conditioned(family), text(padding)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :2] = -100  # on the left, rows 1 and 2 begin later: their first token is not predicted
    target = labels[:, 1:].masked_fill(batch["attention_mask"][:, :-1] == 0, -100)
    logp = plain(**batch, weights=WEIGHTS).logits[:, :-1].log_softmax(-1)
    picked = logp.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    expected = (picked * (target != -100)).sum(-1)
    fused = HyperPromptModel(lora(fuse(build(family))) if family == "llama" else fuse(build(family)), trained_prompt())
    with fused.model.disable_adapter() if family == "llama" else torch.enable_grad():
        scores = score_sequences(fused.eval(), {**batch, "labels": labels, "weights": WEIGHTS}).scores
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)
    upstream = torch.tensor([0.3, -2.0, 1.1])
    (scores * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for a, b in zip(fused.hyper_prompt.parameters(), plain.hyper_prompt.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4 * float(b.grad.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_packed_sequences_each_with_its_w_equal_padded_rows(family: str) -> None:
    width = build(family).get_input_embeddings().weight.shape[1]
    model = HyperPromptModel(fuse(build(family)), trained_prompt(width)).eval()
    batch = text()
    kept = batch["attention_mask"].bool()
    labels = batch["input_ids"].masked_fill(~kept, -100)
    labels[:, :4] = -100
    lengths = kept.sum(-1).tolist()
    packed = {
        "input_ids": batch["input_ids"][kept][None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }
    segment = torch.arange(3)[:, None].expand_as(kept)[kept][None]
    with torch.no_grad():
        logits = model(**packed, weights=WEIGHTS).logits[0]
        torch.testing.assert_close(logits, model(**batch, weights=WEIGHTS).logits[kept], atol=2e-5, rtol=1e-4)
    upstream, gradients = torch.tensor([0.3, -2.0, 1.1]), []
    scores = []
    temperatures = 0.5 + torch.rand(3, 12)
    for inputs, temperature in (
        ({**batch, "labels": labels}, temperatures),
        ({**packed, "labels": labels[kept][None], "segment": segment, "sequences": 3}, temperatures[kept][None]),
    ):
        model.zero_grad()
        scores.append(score_sequences(model, {**inputs, "weights": WEIGHTS}, temperature=temperature).scores)
        (scores[-1] * upstream).sum().backward()
        gradients.append([p.grad.clone() for p in model.hyper_prompt.parameters()])
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-5)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * float(a.abs().max()), rtol=1e-3)

    own = model(**packed, weights=WEIGHTS, labels=packed["input_ids"])
    target = packed["input_ids"][:, 1:].masked_fill(packed["position_ids"][:, 1:] == 0, -100)
    expected = nn.functional.cross_entropy(own.logits[:, :-1].transpose(1, 2), target, ignore_index=-100)
    torch.testing.assert_close(own.loss, expected)
    with model.reference(), torch.no_grad():
        torch.testing.assert_close(model(**packed).logits[0], model(**batch).logits[kept], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": WEIGHTS}, "there are 2 rows"),
        ({"use_cache": True}, "use_cache"),
        ({"position_ids": torch.arange(1, 13)[None]}, "start at 0"),
        ({"position_ids": torch.arange(11)[None]}, "position_ids has shape"),
    ],
)
def test_bad_packed_rows_are_named(change: dict, message: str) -> None:
    packed = {"input_ids": text()["input_ids"][:1], "position_ids": torch.tensor([[*range(7), *range(5)]])}
    with pytest.raises(ValueError, match=message):
        conditioned()(**{**packed, "weights": WEIGHTS[:2], **change})
    with pytest.raises(ValueError, match="positions='hf'"):
        conditioned(positions="paper")(**packed, weights=WEIGHTS[:2])


def test_with_lora_only_the_adapter_and_the_prompt_are_trained() -> None:
    model = HyperPromptModel(lora(build()), trained_prompt())
    model(**text(), weights=WEIGHTS).logits.square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("hyper_prompt.") or ".lora_" in name for name in trained)
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if name in trained)


@pytest.mark.parametrize("adapters", [False, True])
def test_the_reference_is_the_plain_model(adapters: bool) -> None:
    base, batch = build(), text()
    plain = copy.deepcopy(base)
    model = HyperPromptModel(lora(base) if adapters else base, trained_prompt()).eval()
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = plain(**batch).logits
        before = model(**batch, weights=WEIGHTS).logits
        with model.reference():
            torch.testing.assert_close(model(**batch, weights=WEIGHTS).logits[kept], expected[kept])
            torch.testing.assert_close(model(**batch).logits[kept], expected[kept])
            new = model.generate(batch["input_ids"][:1], max_new_tokens=5, do_sample=False)
        assert torch.equal(new, plain.generate(batch["input_ids"][:1], max_new_tokens=5, do_sample=False))
        assert torch.equal(model(**batch, weights=WEIGHTS).logits, before)
        assert (before - expected)[kept].abs().max() > 0.1


def test_the_reference_ends_with_its_block_even_after_an_error() -> None:
    model = HyperPromptModel(lora(build()), trained_prompt()).eval()
    before = model(**text(), weights=WEIGHTS).logits
    with pytest.raises(RuntimeError, match="inside"), model.reference(), model.reference():
        raise RuntimeError("inside")
    assert torch.equal(model(**text(), weights=WEIGHTS).logits, before)
