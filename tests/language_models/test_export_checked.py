"""Every export is loaded again and has the logits of its source, or nothing is written."""

from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tiny_language_models import HIDDEN, VOCABULARY, WEIGHTS, K, build, conditioned, lora, prompt, tokenizer

from mopl.conditioning import HyperPrompt, HyperPromptModel, LoraMixture, ParameterMixture
from mopl.language_models.export import export
from tests.conditioning.test_merging import build as of_family
from tests.conditioning.test_merging import close, spread

W = [0.7, 0.3]
IDS = torch.tensor([[7, 8, 9, 10, 11], [20, 21, 22, 23, 24]])


@torch.no_grad()
def logits(model, **kwargs) -> torch.Tensor:
    return model(input_ids=IDS, **kwargs).logits[..., :VOCABULARY]


def load(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def adapted(model, targets, *, rank: int = 2, **options) -> peft.PeftModel:
    torch.manual_seed(2)
    config = peft.LoraConfig(
        r=rank, lora_alpha=8, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **options
    )
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("family", ["zamba", "zamba2"])
def test_blocks_that_come_back_are_exported_whole(family: str, tmp_path: Path) -> None:
    model, words = of_family(family), tokenizer(size=40)
    torch.manual_seed(1)
    model = HyperPromptModel(model, spread(HyperPrompt(2, K, 3, 16))).eval()
    folder = export(model, words, W, tmp_path / "plain")
    plain = load(folder)
    assert not plain.config.tie_word_embeddings
    front = torch.arange(40, 40 + K)[None].expand(len(IDS), -1)
    with torch.no_grad():
        given = plain(input_ids=torch.cat([front, IDS], 1), use_cache=False).logits[:, K:, :40]
    close(given, logits(model, weights=torch.tensor(W), attention_mask=torch.ones_like(IDS), use_cache=False)[..., :40])


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (["lm_head"], {}), (["embed_tokens"], {}), (["q_proj", "lm_head", "embed_tokens"], {}),
        (["q_proj"], {"modules_to_save": ["lm_head"]}), (["q_proj"], {"modules_to_save": ["embed_tokens"]}),
    ],
    ids=lambda value: ",".join(map(str, value)),
)  # fmt: skip
@pytest.mark.parametrize("prompted", [False, True])
def test_adapters_of_a_tied_head_or_its_embeddings_change_only_what_they_are_on(
    targets, options: dict, prompted: bool, tmp_path: Path
) -> None:
    model = adapted(build(tie_word_embeddings=True), targets, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    if not prompted:
        plain = load(export(model, tokenizer(), None, tmp_path / "plain"))
        close(logits(plain), logits(model))
        return
    whole = HyperPromptModel(model, prompt()).eval()
    folder = export(whole, tokenizer(), W, tmp_path / "plain")
    plain = load(folder)
    front = torch.arange(VOCABULARY, VOCABULARY + K)[None].expand(len(IDS), -1)
    with torch.no_grad():
        given = plain(input_ids=torch.cat([front, IDS], 1)).logits[:, K:, :VOCABULARY]
    close(given, logits(whole, weights=torch.tensor(W), attention_mask=torch.ones_like(IDS)))


@pytest.mark.parametrize("kind", ["model", "adapter"])
@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"]], ids=",".join)
def test_a_mixture_of_adapters_on_a_tied_head_is_exported_as_either(kind: str, targets, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM")
    mixture = spread(LoraMixture(build(tie_word_embeddings=True), 2, config=config))
    wanted = logits(mixture, weights=torch.tensor(W))
    folder = export(mixture, tokenizer(), W, tmp_path / kind, kind=kind)
    if kind == "model":
        close(logits(load(folder)), wanted)
    else:
        close(logits(peft.PeftModel.from_pretrained(build(tie_word_embeddings=True), folder)), wanted)


@pytest.mark.parametrize("scope", ["full", "logits"])
def test_a_mixture_of_parameters_is_exported_as_one_model(scope: str, tmp_path: Path) -> None:
    mixture = spread(ParameterMixture(build(tie_word_embeddings=True), 2, scope=scope))
    close(logits(load(export(mixture, tokenizer(), W, tmp_path / "x"))), logits(mixture, weights=torch.tensor(W)))
    with pytest.raises(ValueError, match="has no adapter; pass kind='model'"):
        export(mixture, tokenizer(), W, tmp_path / "y", kind="adapter")


# ---------------------------------------------------------------- what is not what it should be


def forget(monkeypatch, cls) -> None:
    """Let a class write other values than it has."""
    save = cls.save_pretrained

    def other(self, *args, **kwargs):
        with torch.no_grad():
            named = dict(self.named_parameters())
            chosen = [p for n, p in named.items() if "lora_B" in n] or [p for n, p in named.items() if "q_proj" in n]
            before = [p.clone() for p in chosen]
            for parameter in chosen:
                parameter.mul_(3)
            save(self, *args, **kwargs)
            for parameter, value in zip(chosen, before, strict=True):
                parameter.copy_(value)

    monkeypatch.setattr(cls, "save_pretrained", other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["model", "adapter"])
@pytest.mark.parametrize("source", ["prompt", "mixture", "adapter"])
def test_files_that_load_as_another_model_are_refused_and_taken_away(
    source: str, kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch
) -> None:
    if source == "prompt":
        model, w = conditioned(adapters=kind == "model").to(dtype), W
    elif source == "mixture":
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model, w = spread(LoraMixture(build().to(dtype), 2, config=config)), W
    else:
        model, w = lora(build()).to(dtype), None
    if kind == "model":
        forget(monkeypatch, transformers.PreTrainedModel)
    elif source == "prompt":
        save = peft.PromptTuningConfig.save_pretrained
        monkeypatch.setattr(
            peft.PromptTuningConfig,
            "save_pretrained",
            lambda self, path: (setattr(self, "num_virtual_tokens", K - 1), save(self, path)),
        )
    elif source == "mixture":
        save = peft.LoraConfig.save_pretrained
        monkeypatch.setattr(
            peft.LoraConfig,
            "save_pretrained",
            lambda self, path: (setattr(self, "lora_alpha", 3 * self.r), save(self, path)),
        )
    else:
        forget(monkeypatch, peft.PeftModel)
    with pytest.raises(ValueError, match=r"that is loaded from its files differs by|does not load from its files"):
        export(model, tokenizer(), w, tmp_path / "x", kind=kind)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prompted", [False, True])
def test_adapters_that_the_model_passes_by_are_refused_however_small(
    prompted: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = adapted(of_family("jamba").to(dtype), ["q_proj", "dt_proj"], rank=4)
    if dtype == torch.bfloat16:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(1e-3)
    wrapped = HyperPromptModel(model, spread(HyperPrompt(2, K, 3, 16))).eval() if prompted else model
    message = "adapters on dt_proj of JambaForCausalLM" if dtype == torch.bfloat16 else "the plain JambaForCausalLM"
    with pytest.raises(ValueError, match=message):
        export(wrapped, tokenizer(size=40), W if prompted else None, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_half_precision_is_checked_and_right_ones_pass(tmp_path: Path) -> None:
    for number, dtype in enumerate((torch.bfloat16, torch.float16)):
        model = conditioned().to(dtype)
        assert export(model, tokenizer(), WEIGHTS[0], tmp_path / str(number)).is_dir()
    assert HIDDEN == model.causal_lm.config.hidden_size
