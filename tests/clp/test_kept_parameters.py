"""How many parameters a method of CLP keeps to answer every trade-off."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tiny_language_models import build

from mopl.clp import ClpConfig
from mopl.clp.evaluate import kept_parameters
from mopl.conditioning import ParameterMixture
from mopl.language_models.head import fuse

NAMES = ("first", "second", "third")
RANK = 2


def kept(base, method, **options):
    config = ClpConfig(
        "model", "prompts", rewards=NAMES, method="clp" if method == "base" else method, lora_rank=RANK, **options
    )
    return kept_parameters(base, config, NAMES, method)


@pytest.mark.parametrize("tied", [False, True])
def test_a_base_counts_once_and_every_set_that_differs_as_often_as_it_is_there(tied):
    base = fuse(build(tie_word_embeddings=tied).requires_grad_(False))
    size = sum(p.numel() for p in base.parameters())
    head = base.get_output_embeddings().weight.numel()
    assert kept(base, "base") == size
    assert kept(base, "clp", scope="full") == 3 * size
    # A head that shares the embedding's weight gets weights of its own, and the embedding stays.
    rest = size if tied else size - head
    assert kept(base, "clp", scope="logits") == rest + 3 * head
    # DeRa mixes the policy of several KL weights, with one set more, with the base, which has a head of its own.
    several = {"kl_weight": (0.1, 0.2)}
    assert kept(base, "clp", scope="logits", **several) == rest + 4 * head
    assert kept(base, "dera", scope="logits", **several) == rest + 4 * head + (0 if tied else head)
    assert kept(base, "dera", scope="full", **several) == 5 * size
    for scope in ("full", "logits"):
        sets = 3 * size if scope == "full" else rest + 3 * head
        for method in ("rewarded-soups", "logit-mixing"):
            assert kept(base, method, scope=scope) == sets
    assert sum(p.numel() for p in base.parameters()) == size  # nothing is left in the model


def test_adapters_are_added_to_the_base_and_a_value_head_is_not():
    base = fuse(build().requires_grad_(False))
    size = sum(p.numel() for p in base.parameters())
    for method in ("clp", "rewarded-soups", "logit-mixing"):
        added = kept(base, method, scope="lora-mixture") - size
        assert (
            added > 0 and added % 3 == 0 and added == kept(base, method, scope="lora-mixture", baseline="value") - size
        )
        assert added == 3 * (kept(base, "prompting", scope="lora-mixture") - size)
    several = {"scope": "lora-mixture", "kl_weight": (0.1, 0.2)}
    assert kept(base, "dera", **several) == kept(base, "clp", **several)  # the base is in the policy already
    assert not any("lora" in name for name, _ in base.named_parameters())


def test_a_mixture_holds_what_is_counted():
    base = fuse(build().requires_grad_(False))
    mixture = ParameterMixture(build(), 3, scope="attention")
    assert kept(base, "clp", scope="attention") == sum(p.numel() for p in mixture.parameters())
