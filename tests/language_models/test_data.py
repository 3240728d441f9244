"""Preference data: lists and labels, the public formats, what is refused and how it is reported."""

import csv
import gzip
import json
import logging
import math
import sys

import numpy as np
import pytest

from mopl.language_models.data import DataError, PreferenceData, PreferenceList, RowError, concatenate
from mopl.language_models.readers import FORMATS, detect_format, load_preferences

USER = {"role": "user", "content": "Why is the sky blue?"}
GOOD = {"role": "assistant", "content": "Rayleigh scattering."}
BAD = {"role": "assistant", "content": "No idea."}


def pair(**labels):
    return PreferenceList("q", ("a", "b"), labels or {"helpful": (1, 0)})


def only(rows, **options):
    """The single list that these rows make."""
    data = load_preferences(rows, **options)
    assert len(data) == 1
    return data[0]


# ---------------------------------------------------------------- lists


def test_labels_may_be_missing_one_by_one_or_for_a_whole_objective():
    data = PreferenceData([
        PreferenceList("q", ("a", "b", "c"), {"helpful": (1, None, math.nan), "brief": None}),
        PreferenceList("q", ("a", "b"), {"brief": (0.5, 2)}),
    ])  # fmt: skip
    assert data.objectives == ("helpful", "brief")
    np.testing.assert_array_equal(data.label_array(0), [[1, np.nan, np.nan], [np.nan] * 3])
    np.testing.assert_array_equal(data.label_array(1), [[np.nan] * 2, [0.5, 2]])
    assert data.describe()["objectives"] == {
        "helpful": {"complete": 0, "partial": 1, "missing": 1},
        "brief": {"complete": 1, "partial": 0, "missing": 1},
    }
    assert data.describe()["list_sizes"] == {2: 1, 3: 1}


@pytest.mark.parametrize(
    ("prompt", "responses", "labels", "reason"),
    [
        ("q", ("a",), {"h": (1,)}, "fewer than two responses"),
        ("q", ("a", "b"), {"h": (1, 2, 3)}, "label list of another length"),
        ("q", ("a", " \n"), {"h": (1, 0)}, "empty response"),
        ("q", ("a", None), {"h": (1, 0)}, "empty response"),
        ("q", ("a", [{"role": "assistant", "content": ""}]), {"h": (1, 0)}, "empty response"),
        ("q", ("a", []), {"h": (1, 0)}, "empty response"),
        ("", ("a", "b"), {"h": (1, 0)}, "empty prompt"),
        ("q", ("a", "b"), {"h": (1, math.inf)}, "label is not finite"),
        ("q", ("a", "b"), {"h": (1, "good")}, "label is not a number"),
        ("q", ("a", "b"), {"h": (None, math.nan)}, "no labels"),
        ("q", ("a", "b"), {}, "no labels"),
        ("q", ("a", "b"), {"h": 3}, "wrong type"),
        ("q", ("a", "b"), [1, 0], "wrong type"),
        ("q", "ab", {"h": (1, 0)}, "wrong type"),
        (7, ("a", "b"), {"h": (1, 0)}, "wrong type"),
        ([{"content": "q"}], ("a", "b"), {"h": (1, 0)}, "not a message"),
        ([{"role": "user", "content": 3}], ("a", "b"), {"h": (1, 0)}, "not a message"),
    ],
)
def test_a_list_that_cannot_be_used_says_why(prompt, responses, labels, reason):
    with pytest.raises(RowError) as error:
        PreferenceList(prompt, responses, labels)
    assert error.value.reason == reason and str(error.value).startswith(reason)


def test_messages_lose_the_empty_entries_that_tables_put_into_them():
    item = PreferenceList([{**USER, "tool_calls": None}], (GOOD, [BAD]), {"h": (1, 0)})
    assert item.prompt == (USER,) and item.responses == ((GOOD,), (BAD,))


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        (("brief",), "no list of data has labels for brief; it has helpful"),
        (("helpful", "helpful"), "different names"),
        ((), "at least one"),
    ],
)
def test_objectives_must_be_different_and_labelled(objectives, message):
    with pytest.raises(ValueError, match=message):
        PreferenceData([pair()], objectives)


def test_a_single_objective_given_as_text_and_empty_data_are_refused():
    with pytest.raises(TypeError, match=r"pass \('helpful',\)"):
        PreferenceData([pair()], "helpful")
    with pytest.raises(ValueError, match="has no list"):
        PreferenceData([])
    with pytest.raises(ValueError, match="list 1 of data has no label under helpful, only under brief"):
        PreferenceData([pair(), pair(brief=(1, 0))], ("helpful",))


def test_concatenation_of_two_single_objective_sets_has_both_objectives_with_missing_labels():
    helpful, harmless = PreferenceData([pair()]), PreferenceData([pair(harmless=(0, 1))])
    data = concatenate([helpful, harmless])
    assert data.objectives == ("helpful", "harmless")
    np.testing.assert_array_equal(data.label_array(0), [[1, 0], [np.nan] * 2])
    np.testing.assert_array_equal(data.label_array(1), [[np.nan] * 2, [0, 1]])


def test_lists_of_one_prompt_stay_on_one_side_of_a_split():
    data = PreferenceData([PreferenceList(f"q{i // 3}", (f"a{i}", "b"), {"h": (1, 0)}) for i in range(60)])
    train, held = data.split(0.25, seed=3)
    assert len(train) + len(held) == 60 and len(held) == 15
    assert not {item.prompt for item in train} & {item.prompt for item in held}
    assert [item.to_json() for item in data.split(0.25, seed=3)[1]] == [item.to_json() for item in held]
    assert [i.prompt for i in data.split(0.25, seed=4)[1]] != [i.prompt for i in held]
    with pytest.raises(ValueError, match="between 0 and 1"):
        data.split(1.0)
    with pytest.raises(ValueError, match="one prompt only"):
        data[:2].split(0.5)


def test_the_fingerprint_changes_with_every_part_of_the_data():
    base = PreferenceData([pair()])
    others = [
        PreferenceData([PreferenceList("Q", ("a", "b"), {"helpful": (1, 0)})]),
        PreferenceData([PreferenceList("q", ("b", "a"), {"helpful": (1, 0)})]),
        PreferenceData([pair(helpful=(1, 0.5))]),
        PreferenceData([pair(brief=(1, 0))]),
        PreferenceData([pair(), pair()]),
    ]
    assert PreferenceData([pair()]).fingerprint() == base.fingerprint()
    assert len({data.fingerprint() for data in [base, *others]}) == 6


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz"])
def test_what_is_written_as_json_lines_is_read_back(tmp_path, name):
    data = PreferenceData([
        PreferenceList((USER,), ((GOOD,), (BAD,), "é☃"), {"helpful": (1, 0, None)}),
        PreferenceList("q", ("a", "b"), {"harmless": (0.25, -3), "helpful": (None, 1.0)}),
    ])  # fmt: skip
    data.write_jsonl(tmp_path / name)
    again = load_preferences(tmp_path / name)
    assert again.objectives == data.objectives and again.fingerprint() == data.fingerprint()


# ---------------------------------------------------------------- wrong rows


@pytest.fixture
def broken(tmp_path):
    """A file whose lines 2, 4, 5 and 6 are wrong; line 3 is blank."""
    good = {"prompt": "q", "responses": ["a", "b"], "labels": {"h": [1, 0]}}
    lines = [
        json.dumps(good), "{", "", json.dumps({**good, "responses": ["a", ""]}),
        json.dumps({"prompt": "q", "responses": ["a", "b"]}), json.dumps([1]), json.dumps(good),
    ]  # fmt: skip
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_wrong_rows_are_counted_by_reason_and_refused_with_their_lines(broken):
    with pytest.raises(DataError) as error:
        load_preferences(broken)
    text = str(error.value)
    assert "broken.jsonl: 2 lists from 6 rows; 4 could not be used" in text
    assert "1 x not JSON (line 2:" in text and "1 x empty response (line 4: response 1 has no text)" in text
    assert "1 x missing column (line 5: lists needs labels; it has prompt, responses)" in text
    assert "1 x wrong type (line 6: it is a list but must be a record)" in text and "on_error='skip'" in text


def test_wrong_rows_are_skipped_as_asked_and_logged(broken, caplog):
    with caplog.at_level(logging.WARNING, logger="mopl"):
        data = load_preferences(broken, on_error="skip")
    assert len(data) == 2 and "4 could not be used" in caplog.text
    assert data.report.counts == {"not JSON": 1, "empty response": 1, "missing column": 1, "wrong type": 1}


def test_only_a_few_examples_of_a_reason_are_shown():
    rows = [{"prompt": "q", "responses": ["a"], "labels": {"h": [1]}}] * 9
    with pytest.raises(DataError) as error:
        load_preferences(rows)
    assert "9 x fewer than two responses (row 1" in str(error.value) and "row 3" in str(error.value)
    assert "row 4" not in str(error.value) and "; ...)" in str(error.value)


def test_nothing_left_is_an_error_even_when_skipping():
    with pytest.raises(DataError, match="nothing is left"):
        load_preferences([{"prompt": "q", "responses": ["a"], "labels": {"h": [1]}}], on_error="skip")
    with pytest.raises(DataError, match="nothing is left"):
        load_preferences([])


def test_rows_without_a_label_under_the_chosen_objectives_are_counted():
    rows = [{"prompt": "q", "responses": ["a", "b"], "labels": labels} for labels in ({"h": [1, 0]}, {"s": [1, 0]})]
    with pytest.raises(DataError, match="1 x no labels \\(row 2: none under h, only s\\)"):
        load_preferences(rows, objectives=("h",))
    assert load_preferences(rows, objectives=("h",), on_error="skip").objectives == ("h",)


def test_names_that_no_row_has_are_refused_before_rows_are_counted():
    rows = [{"prompt": "q", "responses": ["a", "b"], "labels": {"help": [1, 0], "brief": [0, 1]}}] * 60
    for wrong, message in (
        (("help,brief",), "for help,brief; it has help, brief; give each name as a word of its own: help brief"),
        (("help; brief",), "as a word of its own: help brief"),
        (("breif",), "for breif; it has help, brief"),
        (("help", "breif"), "for breif; it has help, brief"),
    ):
        for on_error in ("raise", "skip"):
            with pytest.raises(ValueError, match=f"^no list of .* has labels .*{message}$"):
                load_preferences(rows, objectives=wrong, on_error=on_error)
    with pytest.raises(TypeError, match=r"objectives is 'help' but must be a sequence of names; pass \('help',\)"):
        load_preferences(rows, objectives="help")
    rows.append({"prompt": "q", "responses": ["a"], "labels": {"other": [1, 0]}})
    with pytest.raises(DataError, match="fewer than two responses"):  # the row may have the name that is missing
        load_preferences(rows, objectives=("help", "other"))


def test_a_source_that_is_not_there_or_of_no_known_kind_is_an_error(tmp_path):
    for missing in (tmp_path / "no.jsonl", "no.jsonl", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            load_preferences(missing)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ValueError, match=r"x.txt ends in '.txt' but must be .json.*, .gz; prompts alone: mopl clp"):
        load_preferences(tmp_path / "x.txt")
    (tmp_path / "x.json").write_text("[1, ")
    with pytest.raises(DataError, match=r"x.json is no JSON"):
        load_preferences(tmp_path / "x.json")
    with pytest.raises(TypeError, match="mapping with train"):
        load_preferences({"train": []})
    with pytest.raises(FileNotFoundError, match="several sources must all be files"):
        load_preferences([tmp_path / "x.json", tmp_path / "no.json"])


def test_unknown_formats_options_and_columns_are_named_together_with_the_known_ones():
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(ValueError, match="format is 'dpo' but must be 'auto' or one of\n  lists"):
        load_preferences([row], format="dpo")
    with pytest.raises(ValueError, match="format pairs has no option aspect; it has objective"):
        load_preferences([row], aspect="x")
    with pytest.raises(ValueError, match="format lists has no option objective; it has none"):
        load_preferences([{"prompt": "q", "responses": ["a", "b"], "labels": {"h": [1, 0]}}], objective="x")
    with pytest.raises(DataError, match=r"columns better, prompt, worse\.(.|\n)*pairs \(.*\): chosen, rejected"):
        load_preferences([{"prompt": "q", "better": "a", "worse": "b"}])
    with pytest.raises(ValueError, match="on_error is 'ignore'"):
        load_preferences([row], on_error="ignore")


# ---------------------------------------------------------------- formats

SAFE = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 0, "safer_response_id": 1}


def test_safe_rlhf_gives_one_hot_labels_of_both_preferences():
    item = only([{**SAFE, "is_response_0_safe": False}])
    assert (item.prompt, item.responses) == ("q", ("a", "b"))
    assert item.labels == {"helpful": (1.0, 0.0), "harmless": (0.0, 1.0)}


def test_safe_rlhf_takes_a_missing_id_as_a_missing_label_and_refuses_an_unknown_one():
    assert only([{**SAFE, "safer_response_id": None}]).labels == {"helpful": (1.0, 0.0)}
    with pytest.raises(DataError, match=r"1 x unknown response id .row 1: safer_response_id is 2"):
        load_preferences([{**SAFE, "safer_response_id": 2}])


def completion(text, **ratings):
    return {"response": text, "annotations": {aspect: {"Rating": rating} for aspect, rating in ratings.items()}}


def test_ultrafeedback_gives_one_objective_for_each_aspect():
    row = {
        "instruction": "q",
        "completions": [
            completion("a", helpfulness="5", honesty="N/A", instruction_following="3", truthfulness="4"),
            completion("b", helpfulness="2", honesty="4", instruction_following="3"),
            completion("c", helpfulness=1, honesty="3", instruction_following="2", truthfulness="1"),
        ],
    }
    assert only([row]).labels == {
        "helpfulness": (5, 2, 1),
        "honesty": (None, 4, 3),
        "instruction_following": (3, 3, 2),
        "truthfulness": (4, None, 1),
    }
    assert tuple(only([row], aspects=("honesty",)).labels) == ("honesty",)
    row["completions"][0]["annotations"]["honesty"]["Rating"] = "good"
    with pytest.raises(DataError, match=r"label is not a number .row 1: the rating of honesty is 'good'"):
        load_preferences([row])


def test_distilabel_lists_have_one_rating_each():
    item = only([{"instruction": "q", "generations": ["a", "b", "c"], "ratings": [5, None, 2]}])
    assert item.labels == {"rating": (5, None, 2)}


def helpsteer(prompt, response, helpfulness):
    rest = {"correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 2}
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, **rest}


def test_helpsteer_rows_of_one_prompt_are_a_list():
    rows = [helpsteer("p", "a", 4), helpsteer("p", "b", 1), helpsteer("q", "c", 0), helpsteer("q", "d", 2)]
    data = load_preferences([*rows, helpsteer("q", "e", 3)])
    assert [item.responses for item in data] == [("a", "b"), ("c", "d", "e")]
    assert data.objectives == ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    assert data[1].labels["helpfulness"] == (0, 2, 3) and data[1].labels["verbosity"] == (2, 2, 2)
    with pytest.raises(DataError, match=r"fewer than two responses .row 5"):
        load_preferences([*rows, helpsteer("r", "e", 3)])


def test_helpsteer_turns_inside_the_prompt_become_messages():
    prompt = "hi\n<extra_id_1>Assistant\nhello\n<extra_id_1>User\nhow are you?"
    item = only([helpsteer(prompt, "a", 4), helpsteer(prompt, "b", 1)])
    assert [(m["role"], m["content"]) for m in item.prompt] == [
        ("user", "hi"), ("assistant", "hello"), ("user", "how are you?"),
    ]  # fmt: skip


@pytest.mark.parametrize(("strength", "labels"), [(-3, (3, 0)), (-1, (1, 0)), (0, (1, 1)), (2, (0, 2)), (3.0, (0, 3))])
def test_helpsteer_preferences_keep_their_strength(strength, labels):
    three = {"context": [USER], "response1": "a", "response2": "b", "overall_preference": strength}
    two = {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": strength}
    assert only([three]).prompt == (USER,)
    assert only([three]).labels == only([two]).labels == {"preference": labels}
    for wrong, reason in ((4, "unknown preference"), (None, "no labels"), ("1", "unknown preference")):
        with pytest.raises(DataError, match=reason):
            load_preferences([{**two, "preference_strength": wrong}])


def test_nectar_ranks_become_labels_with_the_last_answer_at_one():
    answers = [{"answer": text, "model": "m", "rank": rank} for text, rank in (("a", 2.0), ("b", 1.0), ("c", 3.0))]
    item = only([{"prompt": "\n\nHuman: hi\n\nAssistant: ", "answers": answers}])
    assert item.prompt == ({"role": "user", "content": "hi"},)
    assert item.labels == {"preference": (2, 3, 1)}
    answers[0]["rank"] = -1
    with pytest.raises(DataError, match="unknown rank"):
        load_preferences([{"prompt": "q", "answers": answers}])


def test_tool_calls_of_a_table_have_the_arguments_of_their_own_row(tmp_path):
    """A table has one structure for all rows: None stands where another row's call has an argument."""
    datasets = pytest.importorskip("datasets")
    rows = []
    for arguments in ({"city": "Rome"}, {"days": 2}):
        call = {
            "role": "assistant",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
        }
        rows.append({"prompt": [USER, call, {"role": "tool", "content": "r"}], "chosen": [GOOD], "rejected": [BAD]})
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "a.parquet")
    expected = load_preferences(rows)
    assert load_preferences(table).fingerprint() == expected.fingerprint()
    assert load_preferences(tmp_path / "a.parquet", cache_dir=tmp_path / "c").fingerprint() == expected.fingerprint()
    said = json.loads(json.dumps(rows).replace('"city": "Rome"', '"city": null'))  # of no table: it is meant
    assert load_preferences(said)[0].prompt[1]["tool_calls"][0]["function"]["arguments"] == {"city": None}


def message(id, text, role, rank=None, parent=None, **more):
    return {"message_id": id, "parent_id": parent, "text": text, "role": role, "rank": rank, **more}


TREE = [
    message("1", "q", "prompter", message_tree_id="1"),
    message("2", "a", "assistant", 1, "1", message_tree_id="1"),
    message("3", "b", "assistant", 0, "1", message_tree_id="1"),
    message("4", "more?", "prompter", None, "3", message_tree_id="1"),
    message("5", "c", "assistant", 0, "4", message_tree_id="1"),
    message("6", "d", "assistant", 2, "4", message_tree_id="1"),
    message("7", "e", "assistant", 1, "4", message_tree_id="1"),
    message("8", "gone", "assistant", 3, "4", message_tree_id="1", deleted=True),
    message("9", "unranked", "assistant", None, "4", message_tree_id="1"),
]


def test_open_assistant_siblings_are_lists_whether_nested_or_flat():
    nodes = {row["message_id"]: {**row, "replies": []} for row in TREE}
    for row in TREE[1:]:
        nodes[row["parent_id"]]["replies"].append(nodes[row["message_id"]])
    nested = load_preferences([{"message_tree_id": "1", "prompt": nodes["1"]}])
    flat = load_preferences(TREE)
    assert nested.fingerprint() == flat.fingerprint()
    assert [(item.responses, item.labels["preference"]) for item in flat] == [
        (("a", "b"), (1, 2)), (("c", "d", "e"), (3, 1, 2)),
    ]  # fmt: skip
    assert [m["content"] for m in flat[1].prompt] == ["q", "b", "more?"]
    with pytest.raises(DataError, match="message 2 answers 9"):
        load_preferences([TREE[0], {**TREE[1], "parent_id": "9"}])


def test_hh_transcripts_become_messages_and_the_last_turns_are_the_responses():
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: what?\n\nAssistant:"
    item = only([{"chosen": start + " A b.", "rejected": start + " A c."}], objective="harmless")
    assert [(m["role"], m["content"]) for m in item.prompt] == [
        ("user", "hi"), ("assistant", "hello"), ("user", "what?"),
    ]  # fmt: skip
    assert item.responses == ("A b.", "A c.") and item.labels == {"harmless": (1, 0)}
    with pytest.raises(DataError, match=r"empty response .row 1: response 1 has no text"):
        load_preferences([{"chosen": start + " A b.", "rejected": start + " "}])


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("written", ["", "\n\nHuman: hi\n\nAssistant:"])
def test_hh_transcripts_with_a_prompt_of_their_own_have_the_responses_of_those_without(written, newline):
    """Those of a prompt column begin with the space of the notation, which no model writes."""
    row = {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": f"{written} A b.", "rejected": f"{written} A c."}
    item = only([{name: text.replace("\n", newline) for name, text in row.items()}])
    assert item.prompt == ({"role": "user", "content": "hi"},) and item.responses == ("A b.", "A c.")


@pytest.mark.parametrize(
    "prompt",
    ["hi", "more", "Human:  hi ", "\n\nHuman: hi\n\nAssistant: a", "\n\nHuman: hi\n\nAssistant: a\n\nHuman: more"],
)
def test_hh_transcripts_are_not_responses_where_they_hold_the_prompt(prompt):
    start = "\n\nHuman: hi\n\nAssistant: a\n\nHuman: more\n\nAssistant:"
    item = only([{"prompt": prompt, "chosen": f"{start} b", "rejected": f"{start} c"}])
    assert [message["content"] for message in item.prompt] == ["hi", "a", "more"] and item.responses == ("b", "c")


def test_hh_responses_that_go_on_with_the_answer_that_the_prompt_begins_are_whole_answers():
    start = "\n\nHuman: hi\n\nAssistant: Well,"
    item = only([{"prompt": start, "chosen": f"{start} b", "rejected": f"{start} c"}])
    assert item.prompt == ({"role": "user", "content": "hi"},) and item.responses == ("Well, b", "Well, c")


def test_a_prompt_in_the_notation_of_hh_is_written_in_messages_whatever_the_responses_are():
    item = only([{"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": [GOOD], "rejected": [BAD]}])
    assert item.prompt == ({"role": "user", "content": "hi"},) and item.responses == ((GOOD,), (BAD,))


HUMAN = "\n\nHuman: hi\n\nAssistant:"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": HUMAN, "chosen": f"{HUMAN} a", "rejected": " b"},
        {"prompt": HUMAN, "chosen": " a", "rejected": f"{HUMAN} b"},
        {"prompt": HUMAN, "chosen": f"{HUMAN} a", "rejected": "\n\nHuman: bye\n\nAssistant: b"},
        {"prompt": "\n\nHuman: bye\n\nAssistant:", "chosen": f"{HUMAN} a", "rejected": f"{HUMAN} b"},
        {"prompt": "\n\nHuman: h", "chosen": f"{HUMAN} a", "rejected": f"{HUMAN} b"},
        {"prompt": "\n\nHuman: h", "chosen": f"{HUMAN} a", "rejected": "\n\nHuman: bye\n\nAssistant: b"},
        {"prompt": "\n\nHuman: bye\n\nAssistant:", "chosen": f"{HUMAN} a", "rejected": f"{HUMAN}"},
        {"prompt": "hi", "chosen": f"{HUMAN} a", "rejected": "b"},
    ],
)
def test_hh_transcripts_of_another_prompt_are_refused(row):
    with pytest.raises(DataError, match=r"prompt beside conversations .row 1: chosen and rejected hold"):
        load_preferences([row])


def test_a_response_that_writes_a_dialogue_is_a_response():
    row = {"prompt": "Write a dialogue.", "chosen": f"{HUMAN} a", "rejected": "\n\nHuman: bye\n\nAssistant: b"}
    assert only([row]).responses == (row["chosen"], row["rejected"])
    row["rejected"] = f"{HUMAN} b"
    assert only([row]).responses == (row["chosen"], row["rejected"])


def test_hh_conversations_that_part_earlier_answer_with_the_rest_of_the_conversation():
    row = {
        "chosen": "\n\nHuman: hi\n\nAssistant: a\n\nHuman: thanks\n\nAssistant: b",
        "rejected": "\n\nHuman: hi\n\nAssistant: c",
    }
    item = only([row])
    assert item.prompt == ({"role": "user", "content": "hi"},)
    assert [len(response) for response in item.responses] == [3, 1]


@pytest.mark.parametrize(
    ("row", "prompt", "responses"),
    [
        ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, "The sky is", (" blue.", " green.")),
        ({"chosen": "The sky is blue.", "rejected": "The sky is black."}, "The sky is", (" blue.", " black.")),
        # One is the beginning of the other: the last common space stands before "sky".
        ({"chosen": "The sky is blue.", "rejected": "The sky"}, "The", (" sky is blue.", " sky")),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, (USER,), ((GOOD,), (BAD,))),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, (USER,), ((GOOD,), (BAD,))),
        ({"prompt": "Hi", "chosen": "Hi you", "rejected": "Hi!"}, "Hi", ("Hi you", "Hi!")),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, (USER,), ((GOOD,), (BAD,))),
        ({"prompt": "as text too", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, (USER,), ((GOOD,), (BAD,))),
        ({"prompt": USER, "chosen": [USER, GOOD], "rejected": [USER, BAD]}, (USER,), ((GOOD,), (BAD,))),
    ],
)
def test_every_preference_format_of_trl_is_read(row, prompt, responses):
    item = only([row])
    assert item.labels == {"preference": (1, 0)}
    assert (item.prompt, item.responses) == (prompt, responses)


@pytest.mark.parametrize("style", ["explicit", "implicit"])
def test_conversational_pairs_agree_with_trl(style):
    trl = pytest.importorskip("trl")
    row = {"chosen": [USER, BAD, USER, GOOD], "rejected": [USER, BAD, USER, BAD]}
    expected = trl.extract_prompt(row)
    item = only([expected if style == "explicit" else row])
    assert list(item.prompt) == expected["prompt"]
    assert [list(response) for response in item.responses] == [expected["chosen"], expected["rejected"]]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "a", "rejected": "a", "prompt": "q"}, "equal responses"),
        ({"chosen": "one", "rejected": "two"}, "no common prompt"),
        ({"chosen": [USER, GOOD], "rejected": [GOOD, BAD]}, "no common prompt"),
        ({"chosen": [USER, GOOD], "rejected": [USER, USER]}, "no common prompt"),
        ({"chosen": [USER, GOOD], "rejected": "text"}, "wrong type"),
        ({"chosen": "", "rejected": "text", "prompt": "q"}, "empty response"),
        ({"chosen": None, "rejected": "text", "prompt": "q"}, "empty response"),
        (
            {"prompt": [{"role": "system", "content": "s"}], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "prompt beside conversations",
        ),
        ({"prompt": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "prompt beside conversations"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [USER, BAD]}, "no common prompt"),
        ({"prompt": "hi", "chosen": [GOOD], "rejected": [USER, BAD]}, "no common prompt"),
        ({"chosen": ["a"], "rejected": ["b"], "prompt": "q"}, r"wrong structure \(row 1: not a row of pairs"),
    ],
)
def test_pairs_that_say_nothing_are_refused(row, reason):
    with pytest.raises(DataError, match=reason):
        load_preferences([row])


def test_a_conversation_that_goes_on_answers_with_more_messages_than_one_that_stops():
    item = only([{"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}])
    assert item.prompt == (USER,) and item.responses == ((GOOD,), (GOOD, USER, BAD))


def test_llamafactory_preferences_are_read_in_both_styles():
    sharegpt = {
        "conversations": [{"from": "human", "value": "hi"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
        "system": "Be brief.",
    }
    item = only([sharegpt])
    assert [(m["role"], m["content"]) for m in item.prompt] == [("system", "Be brief."), ("user", "hi")]
    assert item.responses[1] == ({"role": "assistant", "content": "b"},)
    alpaca = {"instruction": "Add.", "input": "1 2", "chosen": "3", "rejected": "4", "history": [["x", "y"]]}
    item = only([alpaca])
    assert [m["content"] for m in item.prompt] == ["x", "y", "Add.\n1 2"] and item.responses == ("3", "4")
    with pytest.raises(DataError, match="not a message"):
        load_preferences([{**sharegpt, "chosen": {"from": "robot", "value": "a"}}])
    with pytest.raises(DataError, match="equal responses"):
        load_preferences([{**alpaca, "rejected": "3"}])


def test_unieval_rows_of_one_context_are_a_list_of_all_attributes():
    row = {"source": "s", "context": "c"}
    rows = [{**row, "system_output": text, "scores": {"nat": i, "coh": 1}} for i, text in enumerate("ab")]
    assert only(rows).labels == {"nat": (0, 1), "coh": (1, 1)}


def test_every_format_is_detected_from_exactly_its_own_columns():
    for name, entry in FORMATS.items():
        assert detect_format(entry.columns) == name
        assert detect_format([*entry.columns, "some_other_column"]) == name


# ---------------------------------------------------------------- files, directories, datasets

ROWS = [
    {"prompt": f"q{i}", "responses": ["a", "b", f"c{i}"], "labels": {"h": [1.0, None, 0.5], "s": [0.0, 1.0, float(i)]}}
    for i in range(3)
]


def test_json_parquet_csv_rows_and_datasets_give_the_same_data(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(str(tmp_path / "d.parquet"))
    (tmp_path / "d.json").write_text(json.dumps(ROWS))
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    with (tmp_path / "d.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "responses", "labels"])
        writer.writeheader()
        for row in ROWS:
            writer.writerow({key: value if key == "prompt" else json.dumps(value) for key, value in row.items()})
    expected = load_preferences(ROWS).fingerprint()
    assert load_preferences(table).fingerprint() == expected
    for name in ("d.parquet", "d.json", "d.jsonl.gz", "d.csv"):
        data = load_preferences(tmp_path / name, cache_dir=tmp_path / "cache")
        assert data.fingerprint() == expected, name
        assert len(load_preferences(tmp_path / name, cache_dir=tmp_path / "cache", limit=2)) == 2
    twice = load_preferences([tmp_path / "d.json", tmp_path / "d.jsonl.gz"])
    assert len(twice) == 6 and twice.name == "2 files"


def test_a_directory_in_the_layout_of_the_hub_is_read_by_split_and_folder(tmp_path):
    pytest.importorskip("datasets")
    root = tmp_path / "hh"
    for folder in ("helpful-base", "harmless-base"):
        (root / folder).mkdir(parents=True)
        for split, count in (("train", 3), ("test", 2)):
            start = "\n\nHuman: hi\n\nAssistant:"
            rows = [{"chosen": f"{start} {folder}{i}", "rejected": f"{start} no"} for i in range(count)]
            with gzip.open(root / folder / f"{split}.jsonl.gz", "wt") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    options = {"cache_dir": tmp_path / "cache", "data_dir": "harmless-base"}
    data = load_preferences(str(root), split="test", objective="harmless", **options)
    assert len(data) == 2 and data.objectives == ("harmless",)
    assert data[0].responses == ("harmless-base0", "no")
    assert len(load_preferences(root, **options)) == 3


def test_a_name_that_is_no_path_is_loaded_from_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        return datasets.Dataset.from_list([SAFE])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("mopl.language_models.readers.find", lambda name, kind, cached: True)  # the hub has it
    data = load_preferences("PKU-Alignment/PKU-SafeRLHF", split="test", config="alpaca-7b", revision="abc")
    assert data.objectives == ("helpful", "harmless") and data.name == "PKU-Alignment/PKU-SafeRLHF"
    assert asked == [("PKU-Alignment/PKU-SafeRLHF", {"name": "alpaca-7b", "split": "test", "revision": "abc"})]


def test_without_the_library_datasets_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs datasets, .* run: pip install .*\[hf\]'"):
        load_preferences("owner/name")


def test_nested_formats_survive_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    answers = [{"answer": text, "model": "m", "rank": rank} for text, rank in (("a", 2.0), ("b", 1.0))]
    feedback = [completion("a", helpfulness="5"), completion("b", helpfulness="N/A", honesty="2")]
    sources = {
        "nectar": [{"prompt": "q", "answers": answers}],
        "ultrafeedback": [{"instruction": "q", "completions": feedback}],
        "pairs": [{"chosen": [USER, GOOD], "rejected": [USER, BAD]}],
        "oasst-messages": [{**row, "deleted": row.get("deleted", False)} for row in TREE],
        "pku-safe-rlhf": [SAFE, {**SAFE, "better_response_id": None}],
    }
    for name, rows in sources.items():
        datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / f"{name}.parquet"))
        data = load_preferences(tmp_path / f"{name}.parquet", cache_dir=tmp_path / "cache")
        assert data.fingerprint() == load_preferences(rows, format=name).fingerprint(), name


# ---------------------------------------------------------------- real files


def test_the_real_hh_file_has_2308_pairs_and_four_empty_responses(shared_data):
    data = load_preferences(shared_data / "hh_rlhf/harmless-base_test.jsonl.gz", on_error="skip")
    assert len(data) == 2308 and data.report.rows == 2312 and data.report.counts == {"empty response": 4}
    assert all(item.prompt[0]["role"] == item.prompt[-1]["role"] == "user" for item in data)
    with pytest.raises(DataError, match=r"4 x empty response .line 87"):
        load_preferences(shared_data / "hh_rlhf/harmless-base_test.jsonl.gz")


def test_the_real_open_assistant_file_has_212_ranked_groups_of_641_replies(shared_data):
    data = load_preferences(shared_data / "oasst/en_100_tree.jsonl.gz")
    assert data.describe()["lists"] == 212 and data.describe()["responses"] == 641
    for item in data:
        assert sorted(item.labels["preference"]) == list(range(1, len(item) + 1))


def test_the_real_llamafactory_file_has_300_pairs(shared_data):
    data = load_preferences(shared_data / "llamafactory/dpo_en_demo.json.gz")
    assert len(data) == 300 and {m["role"] for item in data for m in item.prompt} == {"system", "user", "assistant"}


def test_the_real_unieval_file_has_60_lists_of_six_replies_and_six_objectives(shared_data):
    data = load_preferences(shared_data / "unieval/topical_chat.json.gz")
    assert data.describe()["list_sizes"] == {6: 60} and len(data.objectives) == 6
    assert all(counts["complete"] == 60 for counts in data.describe()["objectives"].values())
    assert data[0].labels["naturalness"][0] == 3.0
