"""A name that is not on the hub, or a hub that cannot be reached, is said in a line and at once."""

import pytest

huggingface_hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("transformers")

from huggingface_hub import constants, errors

from mopl import _hub
from mopl.cli import main
from mopl.language_models.models import load_causal_lm, load_tokenizer
from mopl.language_models.readers import load_preferences
from mopl.rewards.classifier import ClassifierReward

NAME = "nosuch/thing"


@pytest.fixture
def asked(monkeypatch):
    """A hub that answers as a test says; gives what it was asked for."""
    questions = []

    def answer_with(error):
        def answer(url, *, timeout):
            assert timeout <= 10
            questions.append(url)
            if error is not None:
                raise error if isinstance(error, Exception) else error.__new__(error)

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answer)
        return questions

    _hub._find.cache_clear()
    yield answer_with
    _hub._find.cache_clear()


def readers():
    return {
        "tokenizer": lambda: load_tokenizer(NAME),
        "model": lambda: load_causal_lm(NAME),
        "classifier": lambda: ClassifierReward(NAME),
        "data": lambda: load_preferences(NAME),
    }


@pytest.mark.parametrize("reader", readers())
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            errors.RepositoryNotFoundError,
            "it has none; log in with `hf auth login` if it is private.*; correct",
        ),
        (errors.GatedRepoError, r"open only to those who asked for it; ask at https://huggingface.co/\S*nosuch/thing"),
        (ConnectionError("no route"), "the hub cannot be reached, and no copy is in the cache.*; correct the name"),
        (TimeoutError("no answer"), "the hub cannot be reached, and no copy is in the cache.*; correct the name"),
    ],
)
def test_a_name_is_asked_for_once_and_the_answer_is_a_line(asked, reader, error, message):
    if reader == "data":
        pytest.importorskip("datasets")
    questions = asked(error)
    with pytest.raises(OSError, match=message) as raised:
        readers()[reader]()
    assert NAME in str(raised.value) and "\n" not in str(raised.value) and len(questions) == 1


def test_offline_is_named_as_the_reason(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    _hub._find.cache_clear()
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set, and no copy is in the cache"):
        load_tokenizer(NAME)


def test_a_copy_in_the_cache_is_read_without_asking_again(asked, monkeypatch, tmp_path):
    asked(ConnectionError("no route"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(tmp_path / "config.json"))
    with _hub.loading(NAME) as how:
        assert how == {"local_files_only": True, "trust_remote_code": False}
    _hub._find.cache_clear()
    asked(None)
    with _hub.loading(NAME) as how:
        assert how == {"trust_remote_code": False}


def test_a_hub_that_is_busy_is_left_to_the_library_that_tries_again(asked):
    for error in (errors.HfHubHTTPError, errors.EntryNotFoundError):
        _hub._find.cache_clear()
        asked(error)
        assert _hub.find(NAME, "dataset")


def test_the_command_says_it_in_a_line(asked, capsys, tmp_path):
    asked(errors.RepositoryNotFoundError)
    row = '{"prompt": "%s", "responses": ["b", "c"], "labels": {"x": [0, 1]}}\n'
    (tmp_path / "data.jsonl").write_text("".join(row % prompt for prompt in "pqrs"))
    run = str(tmp_path / "run")
    assert main(["align", "--model", NAME, "--data", str(tmp_path / "data.jsonl"), "--run", run]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"mopl align: there is no directory {NAME}") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_words_are_no_name_of_a_model():
    with pytest.raises(FileNotFoundError, match="there is no model the adapters as training began; name a directory"):
        load_tokenizer("the adapters as training began")
