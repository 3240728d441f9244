"""A row has the scores that it has alone, padded on either side, packed or behind virtual tokens; or it is refused."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
from bench.families import checks, models
from mopl._restoring import generators_kept
from mopl._rows import UnsupportedModelError, check_rows, finding, generation_keywords
from mopl._rows.styles import Style
from mopl.alignment import AlignConfig, align, fuse, score_sequences
from mopl.alignment.methods import score_batch
from mopl.language_models.collate import ListCollator
from mopl.language_models.generate import generate
from mopl.language_models.reference_mixture import Reference


def forwards(model: nn.Module) -> list:
    seen: list = []
    model.get_input_embeddings().register_forward_hook(lambda *_: seen.append(1))
    return seen


def left_padded(model: nn.Module, **more: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of two rows alone, and of both in one batch padded on the left, without positions."""
    long, short = torch.tensor([31, 8, 55, 61, 12, 77, 19]), torch.tensor([40, 9, 64])
    alone = torch.cat(
        [score_sequences(model, {"input_ids": row[None], "labels": row[None]}).scores for row in (long, short)]
    )
    ids = torch.stack([long, torch.cat([torch.full((4,), 88), short])])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids, **more}
    return alone, score_sequences(model, batch).scores


@pytest.mark.parametrize("family", ["gpt2", "opt", "biogpt", "roberta", "llama", "mamba", "jamba"])
def test_left_padding_without_positions_changes_no_score(family: str) -> None:
    alone, together = left_padded(fuse(models.build(family)))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["bart", "recurrent_gemma"])
def test_left_padding_is_refused_where_no_positions_can_be_told(family: str) -> None:
    model = fuse(models.build(family))
    with pytest.raises(UnsupportedModelError, match=r"padded on the left.*padding_side='right'"):
        left_padded(model)
    assert checks.scores(models.build(family)).kind == checks.RIGHT  # on the right they are as ever


@pytest.mark.parametrize(
    ("family", "way"),
    [("llama", "positions"), ("llama4_text", "positions"), ("gpt_oss", "masks"), ("falcon", "block"), ("opt", "block")],
)
def test_packed_rows_are_told_in_the_way_that_the_family_understands(family: str, way: str) -> None:
    model = fuse(models.build(family))
    assert checks.packing(copy.deepcopy(model)) == checks.Outcome(checks.RIGHT)
    assert finding(model, "packed").style.packed == way


@pytest.mark.parametrize("family", ["mamba", "jamba", "qwen3_next", "bloom", "bart"])
def test_packing_that_mixes_sequences_is_refused_with_the_remedy(family: str) -> None:
    model, data = fuse(models.build(family)), checks.lists()
    with pytest.raises(UnsupportedModelError, match=r"packed rows.*packing=False"):
        score_batch(model, ListCollator(packed=True)(data))
    with pytest.raises(UnsupportedModelError, match="packing=False"):
        check_rows(model, packed=True)
    check_rows(model)
    one = ListCollator(packed=True)(
        [dataclasses.replace(data[0], responses=data[0].responses[:1], labels=data[0].labels[:, :1])]
    )
    expected = checks.plain_score(model, data[0].prompt, data[0].responses[0])
    assert abs(float(score_batch(model, one)[0, 0]) - expected) < 1e-3  # one sequence is no packed row


def packed_rows(rows: int) -> dict[str, Tensor]:
    """Four sequences in two packed rows of equal length, or in one."""
    sequences = [torch.tensor(row) for row in ([31, 8, 55, 61, 12], [40, 9, 64], [7, 19, 33], [71, 22, 5, 14, 60])]
    parts = {
        "input_ids": sequences,
        "position_ids": [torch.arange(len(row)) for row in sequences],
        "segment": [torch.full_like(row, number) for number, row in enumerate(sequences)],
    }
    batch = {name: torch.cat(part).view(rows, -1) for name, part in parts.items()}
    return {**batch, "labels": batch["input_ids"]}


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "jamba", "bloom"])
def test_several_packed_rows_are_scored_as_their_sequences_alone_or_refused(family: str) -> None:
    model, batch = fuse(models.build(family)), packed_rows(2)
    if family in ("llama", "gemma2"):
        ids, segment = batch["input_ids"].view(-1), batch["segment"].view(-1)
        rows = [ids[segment == number][None] for number in range(4)]
        alone = torch.cat([score_sequences(model, {"input_ids": row, "labels": row}).scores for row in rows])
        torch.testing.assert_close(score_sequences(model, batch).scores, alone, rtol=1e-4, atol=1e-4)
        return
    with pytest.raises(UnsupportedModelError, match="pass one packed row at a time"):
        score_sequences(model, batch)


def test_packed_rows_that_a_model_would_read_as_one_text_are_refused() -> None:
    model = fuse(models.build("llama"))
    for rows in (1, 2):
        batch = packed_rows(rows)
        with pytest.raises(ValueError, match="leave attention_mask out of packed rows"):
            score_sequences(model, {**batch, "attention_mask": torch.ones_like(batch["input_ids"])})
    del batch["position_ids"]
    with pytest.raises(ValueError, match="segment but no position_ids"):
        score_sequences(model, batch)


def packed_of(lengths: list[int], rows: int = 1) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Sequences of random tokens, and a batch that has them in so many packed rows."""
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(7, 90, (length,), generator=generator) for length in lengths]
    parts = {
        "input_ids": sequences,
        "position_ids": [torch.arange(length) for length in lengths],
        "segment": [torch.full((length,), number) for number, length in enumerate(lengths)],
    }
    batch = {name: torch.cat(part).view(rows, -1) for name, part in parts.items()}
    return sequences, {**batch, "labels": batch["input_ids"]}


def scores_alone(model: nn.Module, sequences: list[Tensor]) -> Tensor:
    return torch.cat([score_sequences(model, {"input_ids": s[None], "labels": s[None]}).scores for s in sequences])


@pytest.mark.parametrize("rows", [1, 2])
def test_a_packed_row_may_begin_with_a_sequence_of_one_token(rows: int) -> None:
    sequences, batch = packed_of([1, 5, 1, 5], rows)
    model = fuse(models.build("llama"))
    expected = scores_alone(model, sequences)
    torch.testing.assert_close(score_sequences(model, batch).scores, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="leave attention_mask out of packed rows"):
        score_sequences(model, {**batch, "attention_mask": torch.ones_like(batch["input_ids"])})
    if rows == 2:  # a family that is not told by positions alone
        with pytest.raises(UnsupportedModelError, match="pass one packed row at a time"):
            score_sequences(fuse(models.build("opt")), batch)


def test_packed_rows_without_segment_have_no_score_across_two_sequences() -> None:
    model = fuse(models.build("gpt2"))
    sequences, batch = packed_of([4, 1, 6])
    del batch["segment"]
    found = score_sequences(model, batch)
    torch.testing.assert_close(found.scores, scores_alone(model, sequences).sum(0, keepdim=True), rtol=1e-4, atol=1e-4)
    assert found.lengths.tolist() == [3 + 0 + 5]


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position_ids", [[0, 1, 2, 3, 4, 5]]),  # no second sequence
        ("position_ids", [[1, 2, 3, 1, 2, 3]]),  # counted from 1
        ("position_ids", [[0, 1, 2, 0, 1, 3]]),
        ("position_ids", [[0, 1, 2, 0, 1, 0]]),  # a third
        ("segment", [[0, 0, 0, 0, 0, 0]]),
        ("segment", [[0, 0, 1, 1, 1, 1]]),
    ],
)
def test_packed_rows_that_segment_and_positions_part_differently_are_refused(family, name, value) -> None:
    batch = {**packed_of([3, 3])[1], name: torch.tensor(value)}
    with pytest.raises(ValueError, match="position_ids and segment do not part a packed row in the same places"):
        score_sequences(fuse(models.build(family)), batch)


def test_a_number_of_segment_stands_for_one_sequence() -> None:
    model = fuse(models.build("llama"))
    sequences, batch = packed_of([3, 3, 2, 4], 2)
    for numbers in ([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]], [[0, 0, 0, 1, 1, 1], [0, 0, 2, 2, 2, 2]]):
        with pytest.raises(ValueError, match="segment has one number for several sequences"):
            score_sequences(model, {**batch, "segment": torch.tensor(numbers)})
    batch["segment"] = torch.tensor([[2, 2, 2, 1, 1, 1], [-1, -1, 0, 0, 0, 0]])  # any order, and padding
    found = score_sequences(model, batch).scores
    torch.testing.assert_close(found, scores_alone(model, [sequences[n] for n in (3, 1, 0)]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mpt", "bloom"])
def test_rows_without_a_mask_whose_positions_jump_are_refused(family: str) -> None:
    """Some families take a jump for another sequence, some for a gap, some see none."""
    model, ids = fuse(models.build(family)), torch.tensor([[31, 8, 55, 61, 12]])
    for positions in ([[1, 2, 1, 2, 3]], [[0, 1, 4, 5, 6]]):
        with pytest.raises(ValueError, match="neither go on by 1 nor start again at 0"):
            score_sequences(model, {"input_ids": ids, "labels": ids, "position_ids": torch.tensor(positions)})
    shifted = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(3, 8)[None]}
    if family in ("mpt", "bloom"):
        with pytest.raises(UnsupportedModelError, match="does not heed position_ids"):
            score_sequences(model, shifted)
    else:
        expected = model(input_ids=ids, position_ids=torch.arange(3, 8)[None]).logits.log_softmax(-1)
        expected = expected[:, :-1].gather(2, ids[:, 1:, None]).sum((1, 2))
        torch.testing.assert_close(score_sequences(model, shifted).scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", [[2, 2, 1, 1, 1], [1, 1, 2, 2, 2], [0.0, 0.0, 0.5, 0.5, 0.5]])
def test_a_mask_of_other_numbers_than_0_and_1_is_refused(mask: list[float]) -> None:
    """Some collators number sequences in it, which models read as one text."""
    ids = torch.tensor([[31, 8, 55, 61, 12]])
    with pytest.raises(ValueError, match=r"values other than 0 and 1|holes"):
        score_sequences(
            fuse(models.build("llama")), {"input_ids": ids, "labels": ids, "attention_mask": torch.tensor([mask])}
        )


def rotary(kind: str) -> nn.Module:
    """A model whose rotary positions are others beyond 16 tokens."""
    rope, positions = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}, 16
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 16}
        positions = 64
    return fuse(models.build("llama", rope_parameters=rope, max_position_embeddings=positions))


def padded_of(sequences: list[Tensor]) -> dict[str, Tensor]:
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    mask = (ids > 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("lengths", [[9, 16], [20, 30]])
def test_rows_on_one_side_of_a_length_at_which_positions_change_are_scored_as_alone(lengths: list[int]) -> None:
    model, (sequences, packed) = rotary("longrope"), packed_of(lengths)
    expected = scores_alone(model, sequences)
    for batch in (packed, padded_of(sequences)):
        torch.testing.assert_close(score_sequences(model, batch).scores, expected, rtol=1e-4, atol=1e-4)
    if lengths[-1] == 16:
        model = rotary("dynamic")
        expected = scores_alone(model, sequences)
        for batch in (packed, padded_of(sequences)):
            torch.testing.assert_close(score_sequences(model, batch).scores, expected, rtol=1e-4, atol=1e-4)


def test_rows_on_both_sides_of_a_length_at_which_positions_change_are_refused() -> None:
    sequences, packed = packed_of([9, 20])
    for batch in (packed, padded_of(sequences)):
        with pytest.raises(ValueError, match=r"'longrope'.*longer than 16 tokens; pass longer texts one at a time"):
            score_sequences(rotary("longrope"), batch)
        with pytest.raises(ValueError, match=r"'dynamic'.*cut all to 16 tokens"):
            score_sequences(rotary("dynamic"), batch)
    with pytest.raises(ValueError, match=r"'dynamic'.*cut all to 16 tokens"):  # what follows would have its positions
        scores_alone(rotary("dynamic"), sequences)
    model, mask = rotary("longrope"), torch.ones(2, 20, dtype=torch.long)
    generation_keywords(model, mask)
    mask[1, :11] = 0
    with pytest.raises(ValueError, match="pass longer texts one at a time"):
        generation_keywords(model, mask)


def test_positions_of_rows_without_a_mask_count_from_zero_in_every_family() -> None:
    model, ids = fuse(models.build("roberta")), packed_rows(2)["input_ids"]
    expected = score_sequences(model, {"input_ids": ids, "labels": ids}).scores
    for shape in ((1, -1), (2, -1)):
        batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(8)[None].expand(*shape)}
        torch.testing.assert_close(score_sequences(model, batch).scores, expected)


def test_a_router_loss_does_not_stand_in_the_way_of_packed_rows() -> None:
    model, batch = fuse(models.build("gpt_oss")), packed_rows(1)
    expected = score_sequences(model, batch).scores
    with pytest.raises(UnsupportedModelError, match=r"router_aux_loss_coef=0\.0"):
        score_sequences(model, batch, output_router_logits=True)
    model = fuse(models.build("gpt_oss"))
    model.config.output_router_logits = True
    torch.testing.assert_close(score_sequences(model, batch).scores, expected)
    assert finding(model, "packed").style.packed == "masks" and model.config.output_router_logits


def test_windows_of_any_length_are_seen_by_short_rows() -> None:
    """They are shorter while it looks, and as they were afterwards."""
    from transformers import AutoModelForCausalLM

    config = models.small_config("deepseek_v32")
    config.index_topk, config.index_n_heads = 4096, 1
    model = AutoModelForCausalLM.from_config(config).eval()
    finding(model, "packed")
    assert config.index_topk == 4096
    assert all(m.index_topk == 4096 for m in model.modules() if hasattr(m, "index_topk"))


def test_a_model_that_reads_ahead_is_refused() -> None:
    model = models.build("bert", is_decoder=False)
    batch = {"input_ids": torch.tensor([[31, 8, 55]]), "labels": torch.tensor([[-100, 8, 55]])}
    with pytest.raises(UnsupportedModelError, match=r"reads ahead.*is_decoder = True"):
        score_sequences(fuse(model), batch)


def test_holes_in_a_mask_are_refused() -> None:
    ids = torch.tensor([[31, 8, 55, 61, 12]])
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.tensor([[1, 1, 0, 1, 1]])}
    with pytest.raises(ValueError, match="holes"):
        score_sequences(fuse(models.build("llama")), batch)


def test_the_first_token_behind_padding_has_no_score() -> None:
    """As in a row alone, where nothing stands before it."""
    model, row = fuse(models.build("llama")), torch.tensor([[31, 8, 55]])
    alone = score_sequences(model, {"input_ids": row, "labels": row})
    padded = {"input_ids": torch.tensor([[9, 9, 31, 8, 55]]), "labels": torch.tensor([[-100, -100, 31, 8, 55]])}
    found = score_sequences(model, {**padded, "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])})
    assert found.lengths.tolist() == alone.lengths.tolist() == [2]
    torch.testing.assert_close(found.scores, alone.scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bart", "rwkv"])
def test_prompts_go_one_by_one_where_they_cannot_be_padded(family: str) -> None:
    assert checks.generation(models.build(family)) == checks.Outcome(checks.RIGHT)
    assert checks.prompts_generation(models.build(family)) == checks.Outcome(checks.RIGHT)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with pytest.raises(UnsupportedModelError, match="batch_size=1"):
        generation_keywords(models.build(family), mask)


def test_a_reference_beside_the_model_reads_padded_prompts_as_alone() -> None:
    """Equal models mix to themselves, so every prompt is answered as by the plain one; RoBERTa starts at position 2."""
    for family in ("gpt2", "roberta", "bart"):
        model, reference = models.build(family), models.build(family)
        texts = [" ".join(map(checks._word, prompt)) for prompt in checks._PROMPTS]
        options = {"max_new_tokens": 5, "template": "plain"}
        mixed = generate(model, checks.tokenizer(), texts, reference=reference, scale=2.0, **options)
        for prompt, answer in zip(checks._PROMPTS, mixed, strict=True):
            assert list(answer.tokens) == checks.plain_greedy(model, prompt)[: len(answer.tokens)]
        assert Reference(model, reference) is not None


# ---------------------------------------------------------------- the probe itself


def test_a_model_is_asked_once_and_is_left_as_it_was() -> None:
    model = fuse(models.build("gpt2")).train()
    model.transformer.h[0].eval()  # a frozen part
    modes = [module.training for module in model.modules()]
    config, generation = model.config.to_dict(), model.generation_config
    torch.manual_seed(5)
    with generators_kept():
        expected = torch.rand(3)
    check_rows(model, packed=True, virtual=True, generates=True)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    assert model.config.to_dict() == config and model.generation_config is generation
    assert all(parameter.grad is None for parameter in model.parameters())
    seen = forwards(model)
    check_rows(model, packed=True, virtual=True, generates=True)
    check_rows(copy.deepcopy(model), packed=True, virtual=True, generates=True)
    assert not seen
    assert pickle.loads(pickle.dumps(model.__dict__["_mopl_rows"])) == model.__dict__["_mopl_rows"]
    model.set_attn_implementation("eager")
    check_rows(model, packed=True)
    assert seen  # another implementation is another model


@pytest.mark.parametrize("packed", [False, True])
def test_measuring_inside_of_a_forward_that_one_autocast_is_around_leaves_autocast_off(packed: bool) -> None:
    """accelerate makes a prepared model's forward such a one."""
    model = fuse(models.build("llama"))
    plain = model.forward
    decorated = model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(plain)
    ids = torch.tensor([[31, 8, 55, 61, 12]])
    rows = {"position_ids": torch.tensor([[0, 1, 0, 1, 2]])} if packed else {"attention_mask": torch.ones_like(ids)}
    found = score_sequences(model, {"input_ids": ids, "labels": ids, **rows}).scores
    assert not torch.is_autocast_enabled("cpu") and model.forward is decorated
    model.forward = plain
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(score_sequences(model, {"input_ids": ids, "labels": ids, **rows}).scores, found)


def test_a_forward_under_autocast_generates_behind_padding_as_before_it() -> None:
    model = fuse(models.build("llama"))
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    check_rows(model, generates=True)
    assert finding(model, "generate").left and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("out_of_reach", [-math.inf, torch.finfo(torch.float32).min, -1e5])
def test_tokens_that_a_model_puts_out_of_reach_say_nothing_of_its_rows(out_of_reach: float) -> None:
    model = models.build("llama")
    reach = torch.zeros(model.config.vocab_size).index_fill_(0, torch.tensor([3, 7]), out_of_reach)
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + reach)
    check_rows(model, packed=True)
    mixing = models.build("mamba")
    mixing.lm_head.register_forward_hook(lambda module, args, logits: logits + reach[: logits.shape[-1]])
    with pytest.raises(UnsupportedModelError, match="packing=False"):
        check_rows(mixing, packed=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_probe_sees_through_small_weights_and_rounding(dtype: torch.dtype) -> None:
    """As a model comes from its initialisation, and in 16 bits."""
    from transformers import AutoModelForCausalLM

    found = {}
    for family in ("gpt2", "llama", "mixtral", "falcon", "jamba"):
        config = models.small_config(family)
        config.initializer_range = 0.02
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
        found[family] = finding(model, "padded").style, finding(model, "packed").style
    plain = Style(), Style(0, "positions")
    assert found["llama"] == found["mixtral"] == plain
    assert found["gpt2"] == (Style(0), Style(0, "positions"))
    assert found["falcon"] == (Style(), Style(0, "block"))
    assert found["jamba"] == (Style(), None)


@pytest.mark.parametrize("seed", [3, 5])
def test_a_router_that_rounding_sends_elsewhere_is_no_fault(seed: int) -> None:
    """Of bfloat16: whether one batch shows it is chance."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=200, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, max_position_embeddings=256, num_local_experts=8,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    for kind, embeds in (("padded", False), ("positioned", True), ("packed", False)):
        found = finding(model, kind, embeds=embeds)
        assert found.style is not None and found.left, found.reason


def test_weights_that_are_elsewhere_are_measured_when_they_come() -> None:
    with torch.device("meta"):
        model = models.small_model("gpt2")
    check_rows(model, packed=True)
    assert not model.__dict__.get("_mopl_rows")


# ---------------------------------------------------------------- before a run is made


def inputs_of_a_run(family: str, tmp_path) -> dict[str, str]:
    folder = tmp_path / "model"
    models.build(family).save_pretrained(folder)
    checks.tokenizer().save_pretrained(folder)
    rows = tmp_path / "lists.jsonl"
    line = '{{"prompt": "w11 w{}", "responses": ["w20 w21", "w22"], "labels": {{"a": [1, 0], "b": [0, 1]}}}}\n'
    rows.write_text("".join(line.format(12 + number) for number in range(8)))
    return {"model": str(folder), "data": str(rows)}


def test_a_run_that_would_pack_wrongly_is_refused_before_it_is_made(tmp_path) -> None:
    pytest.importorskip("moocore")
    config = AlignConfig(**inputs_of_a_run("mamba", tmp_path), packing=True, lora_targets=("in_proj",))
    with pytest.raises(UnsupportedModelError, match="packing=False"):
        align(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_whose_mixture_could_not_be_merged_is_refused_before_it_is_made(tmp_path) -> None:
    pytest.importorskip("moocore")
    targets = {"conditioning": "lora-mixture", "lora_rank": 2, "lora_targets": ("q_proj", "dt_proj")}
    config = AlignConfig(**inputs_of_a_run("jamba", tmp_path), **targets)
    with pytest.raises(ValueError, match=r"adapters on dt_proj of .*target_modules=\['q_proj'\]"):
        align(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_generate_behind_virtual_tokens_is_refused_before_training() -> None:
    with pytest.raises(UnsupportedModelError, match=r"inputs_embeds.*lora-mixture"):
        check_rows(models.build("gemma3"), virtual=True, generates=True)
    check_rows(models.build("gemma3"), generates=True)
