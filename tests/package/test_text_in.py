"""Text from files and arguments: where lines end, byte order marks, bytes that are no text, rows that are refused."""

import bz2
import gzip
import io
import json
import subprocess
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import tiny_language_models as tiny

from mopl._lines import (
    TextError,
    json_array,
    lone_surrogate,
    parse_json,
    read_lines,
    read_text,
    text_fault,
    texts_of_arguments,
)
from mopl.clp.prompts import placed_prompts
from mopl.language_models.data import DataError, PreferenceList, RowError
from mopl.language_models.readers import load_preferences
from mopl.training.logs import read_log

BOM = b"\xef\xbb\xbf"
# What str.splitlines takes for ends of lines, and no other reader of JSON, SVMlight or plain text does.
INSIDE = "a\u2028b\u2029c\u0085d\x0ce\x0bf\x1cg\rh"
PACKINGS = [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress)]


def row(prompt="q", **changes):
    return {"prompt": prompt, "responses": ["a", "b"], "labels": {"h": [1, 0]}, **changes}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


# ---------------------------------------------------------------- lines


@pytest.mark.parametrize(("ending", "pack"), PACKINGS)
@pytest.mark.parametrize("mark", [b"", BOM])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_at_line_feeds_alone_and_the_byte_order_mark_is_no_part_of_them(tmp_path, ending, pack, mark, end):
    lines = ["first", INSIDE, "", "last"]
    for tail in ("", end):
        path = write(tmp_path / f"t.txt{ending}", pack(mark + (end.join(lines) + tail).encode()))
        assert list(read_lines(path)) == list(enumerate(lines, 1))
    assert read_text(path) == "\n".join(lines)


def test_an_empty_file_has_no_line_and_a_short_one_keeps_its_bytes(tmp_path):
    for content, lines in ((b"", []), (BOM, []), (b"a", ["a"]), (b"\n", [""]), (BOM + b"\r\n\r\n", ["", ""])):
        assert [line for _, line in read_lines(write(tmp_path / "t.txt", content))] == lines


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "good\nGrüße\n".encode("latin-1"),
            r"t\.txt:2: its byte 3 \(0xfc\) is not UTF-8; save .* as UTF-8 \(iconv",
        ),
        (b"good\n\nx\0y\n", r"t\.txt:3: it holds a NUL byte"),
        ("hello\n".encode("utf-16"), r"t\.txt is no UTF-8 text but begins like UTF-16; save it as UTF-8"),
        ("hello\n".encode("utf-16-le"), r"t\.txt:1: it holds a NUL byte, as UTF-16"),
        (b"good\n\xed\xa0\xbd\n", r"t\.txt:2: its byte 1 \(0xed\)"),  # half of a surrogate pair, encoded
    ],
)
def test_what_is_no_text_is_named_with_file_line_and_remedy(tmp_path, content, message):
    with pytest.raises(TextError, match=message):
        list(read_lines(write(tmp_path / "t.txt", content)))


@pytest.mark.parametrize(("ending", "pack"), PACKINGS[1:])
def test_damaged_compressed_files_are_named(tmp_path, ending, pack):
    whole = pack(b"line\n" * 10_000)
    for content in (b"not compressed", whole[: len(whole) // 2]):
        with pytest.raises(TextError, match=rf"t\.txt{ending}: .* ends early or is .* no (gzip|bzip2)"):
            list(read_lines(write(tmp_path / f"t.txt{ending}", content)))
    with pytest.raises(FileNotFoundError):
        list(read_lines(tmp_path / f"absent{ending}"))


def test_logs_are_cut_at_line_feeds_and_not_inside_of_texts(tmp_path):
    path = write(tmp_path / "log.jsonl", '{"text": "a\u2028b\u0085c"}\n{"a": 1')
    assert read_log(path) == [{"text": "a\u2028b\u0085c"}]


# ---------------------------------------------------------------- JSON


def test_json_is_read_as_python_reads_it_but_for_what_is_ambiguous_or_without_end():
    for text in ('{"a": [1, 2.5, "\\u00e9", null, true]}', " [] ", "NaN", "-Infinity", '"\\ud83d\\ude00"'):
        assert repr(parse_json(text)) == repr(json.loads(text))
    for text, message in (
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands twice"),
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5000, "4300 digits"),
        ("{} {}", "more after its end, at character 4"),
        ("", "Expecting value"),
    ):
        with pytest.raises(TextError, match=message):
            parse_json(text)


@pytest.mark.parametrize("text", ["[]", " [ ] ", "[1]", '[1, {"a": [2]}\n, "]" ]\n'])
def test_arrays_give_their_elements(text):
    assert list(json_array(text)) == json.loads(text)


@pytest.mark.parametrize("text", ["", "[", "[1", "[1,", "[1,]", "[,1]", "[1 2]", "[1] 2", "[1]]"])
def test_what_is_no_array_is_an_error(text):
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
    with pytest.raises(TextError):
        list(json_array(text))


# ---------------------------------------------------------------- preference data


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("mark", [b"", BOM])
def test_separators_inside_of_texts_and_byte_order_marks_change_nothing(tmp_path, ending, mark):
    pack = gzip.compress if ending else bytes
    text = INSIDE.replace("\r", "\\r").replace("\x0c", "\\f").replace("\x0b", "\\u000b").replace("\x1c", "\\u001c")
    line = json.dumps(row("PLACE"), ensure_ascii=False).replace("PLACE", text)
    lines = write(tmp_path / f"d.jsonl{ending}", pack(mark + f"{line}\r\n\r\n{line}\n".encode()))
    array = write(tmp_path / f"d.json{ending}", pack(mark + f" [{line},\r\n{line}]".encode()))
    for path in (lines, array):
        assert [item.prompt for item in load_preferences(path)] == [INSIDE, INSIDE]
    assert [item.place for item in load_preferences(lines)] == ["line 1", "line 3"]
    assert [item.place for item in load_preferences([lines, array])][1:3] == [
        f"{lines.name} line 3",
        f"{array.name} row 1",
    ]


def test_a_first_line_that_is_an_array_by_itself_is_a_bad_row_and_not_the_file(tmp_path):
    path = write(tmp_path / "d.jsonl", "\n" + json.dumps([1]) + "\n" + json.dumps(row("one")))
    with pytest.raises(DataError, match=r"1 x wrong type \(line 2: it is a list"):
        load_preferences(path)
    assert load_preferences(path, on_error="skip")[0].prompt == "one"
    for text in (json.dumps([row("one")]), json.dumps([row("one")], indent=1)):
        assert load_preferences(write(path, text + "\n\n"))[0].place == "row 1"


def test_a_first_row_of_no_known_format_is_a_bad_row_like_any_other(tmp_path):
    path = write(tmp_path / "d.jsonl", "\n".join(map(json.dumps, [{"x": 1}, {}, row("one")])))
    with pytest.raises(DataError, match=r"2 x unknown columns \(line 1: no known format has x; line 2: .* none\)"):
        load_preferences(path)
    assert [item.prompt for item in load_preferences(path, on_error="skip")] == ["one"]
    with pytest.raises(DataError, match="no known format has the columns x"):
        load_preferences([{"x": 1}], on_error="skip")
    with pytest.raises(
        DataError, match=r"columns labels, prompt, respones; nearest is lists, which needs responses too"
    ):
        load_preferences([{"prompt": "", "respones": [], "labels": {}}], on_error="skip")


def test_a_table_of_csv_with_a_byte_order_mark_and_one_that_is_no_text(tmp_path):
    pytest.importorskip("datasets")
    table = "prompt,chosen,rejected\r\nq,a,b\r\n"
    data = load_preferences(write(tmp_path / "d.csv", BOM + table.encode()), cache_dir=tmp_path / "cache")
    assert (data[0].prompt, data[0].responses) == ("q", ("a", "b"))
    with pytest.raises(DataError, match=r"e\.csv:2: its byte 1 \(0xe9\) is not UTF-8"):
        load_preferences(
            write(tmp_path / "e.csv", table.replace("q", "é").encode("latin-1")), cache_dir=tmp_path / "cache"
        )


HALF, HALVED = "\\ud83d", '"\\ud83d"'  # the first half of an emoji, as JSON escapes it
DEEP = "[" * 300 + "]" * 300
BAD = [
    (json.dumps(row()).replace('"q"', f'"q {HALF}"'), "no Unicode text", "prompt holds U+D83D at character 3"),
    (json.dumps(row()).replace('"b"', f'"{HALF}"'), "no Unicode text", "response 1 holds U+D83D"),
    (json.dumps(row()).replace('"h"', f'"{HALF}"'), "no Unicode text", "the name of an objective holds U+D83D"),
    (
        json.dumps(row([{"role": "system", "content": "s"}, {"role": "user", "content": "q"}])).replace(
            '"s"', f'"{HALF}"'
        ),
        "no Unicode text",
        "prompt holds U+D83D",
    ),
    (
        json.dumps(row([{"role": "user", "content": "q", "tools": {"k": "X"}}])).replace('"k"', f'"{HALF}"'),
        "no Unicode text",
        "prompt holds U+D83D",
    ),
    (json.dumps(row([{"role": "user", "content": "q", "x": "X"}])).replace('"X"', DEEP), "no Unicode text", "100 deep"),
    (json.dumps(row()).replace('"q"', DEEP), "no Unicode text", "100 deep"),
    (json.dumps(row()).replace('"q"', "[" * 50_000), "not JSON", "nested too deeply"),
    (json.dumps(row()).replace("[1, 0]", f"[{'9' * 5000}, 0]"), "not JSON", "4300 digits"),
    (json.dumps(row()).replace("[1, 0]", f"[{'9' * 400}, 0]"), "label is too large", "beyond float32"),
    (json.dumps(row()).replace("[1, 0]", "[1e400, 0]"), "label is not finite", "is inf"),
    (json.dumps(row()).replace("[1, 0]", "[-Infinity, 0]"), "label is not finite", "is -inf"),
    (json.dumps(row()).replace("[1, 0]", "[NaN, NaN]"), "no labels", ""),
    (json.dumps(row()).replace("[1, 0]", '["1", "0"]'), "label is not a number", "'1'"),
    (json.dumps(row()).replace('"q"', '"q", "prompt": "r"'), "not JSON", "the key 'prompt' stands twice"),
    (json.dumps(row()).replace('"h": [1, 0]', '"h": [1, 0], "h": [0, 1]'), "not JSON", "the key 'h' stands twice"),
    (json.dumps(row()).replace('"q"', "NaN"), "wrong type", "prompt is a float"),
    (json.dumps(row()).replace('"q"', '"q\0"'), "no UTF-8 text", "NUL"),
    (json.dumps(row("é"), ensure_ascii=False).encode("latin-1"), "no UTF-8 text", "0xe9"),
    ('{"prompt": "a\tb"}', "not JSON", "Invalid control character"),
    (  # in quotes: an objective may be named as an option of the command is
        json.dumps(row(responses=["same", "same"])),
        "equal responses",
        "responses 0 and 1 are the same, but 'h' is 1 and 0",
    ),
]


@pytest.mark.parametrize(("line", "reason", "detail"), BAD, ids=range(len(BAD)))
def test_a_bad_row_is_named_by_its_line_and_refused_or_skipped(tmp_path, line, reason, detail):
    good = json.dumps(row()).encode()
    line = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "d.jsonl", b"\n".join([good, b"", line, good]))
    with pytest.raises(DataError) as error:
        load_preferences(path)
    text = str(error.value)
    assert f"1 x {reason} (line 3: " in text and detail in text and "d.jsonl: 2 lists from 3 rows" in text
    text.encode()  # can be printed
    data = load_preferences(path, on_error="skip")
    assert len(data) == 2 and data.report.counts == {reason: 1}
    assert len(data.fingerprint()) == 64


def test_a_key_that_stands_twice_in_an_array_costs_its_row_alone(tmp_path):
    text = json.dumps([row("one"), row("two"), row("three")], indent=1).replace('"two"', '"two", "prompt": "2"')
    path = write(tmp_path / "d.json", text)
    with pytest.raises(DataError, match=r"1 x not JSON \(row 2: the key 'prompt' stands twice"):
        load_preferences(path)
    assert [item.prompt for item in load_preferences(path, on_error="skip")] == ["one", "three"]
    with pytest.raises(DataError, match=r"e\.json is no JSON: .*line 3"):
        load_preferences(write(tmp_path / "e.json", "[\n1,\n{]"), on_error="skip")


def test_nan_is_a_missing_label_and_an_escaped_nul_is_a_character(tmp_path):
    path = write(
        tmp_path / "d.jsonl", '{"prompt": "q\\u0000", "responses": ["a", "b", "c"], "labels": {"h": [1, NaN, 0]}}'
    )
    item = load_preferences(path)[0]
    assert item.prompt == "q\0" and item.labels == {"h": (1.0, None, 0.0)}


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"instruction": "q", "history": [["a", "b", "c"]], "chosen": "a", "rejected": "b"}], "wrong structure"),
        ([{"prompt": "q", "answers": [{"answer": "a", "rank": 10**400}, {"answer": "b", "rank": 1}]}],
         "wrong structure"),
        ([{"instruction": "q", "completions": [{"response": "a", "annotations": {"honesty": 10**400}}] * 2}],
         "label is not a number"),
    ],
)  # fmt: skip
def test_rows_of_other_formats_that_once_ended_the_reading(rows, reason):
    with pytest.raises(DataError, match=rf"1 x {reason} \(row 1: "):
        load_preferences(rows)


def test_a_tree_without_end_is_a_row_like_any_other():
    node = {"role": "assistant", "text": "x", "replies": []}
    for k in range(3000):
        node = {"role": "prompter" if k % 2 else "assistant", "text": "x", "replies": [node]}
    with pytest.raises(DataError, match=r"1 x wrong structure \(row 1: .*RecursionError"):
        load_preferences([{"message_tree_id": "t", "prompt": {**node, "role": "prompter"}}])


# ---------------------------------------------------------------- equal responses

EQUAL = {
    "pku-safe-rlhf": {
        "prompt": "q",
        "response_0": "a",
        "response_1": "a",
        "better_response_id": 0,
        "safer_response_id": None,
    },
    "pairs": {"prompt": "q", "chosen": "a", "rejected": "a"},
    "lists": row(responses=["a", "b", "a"], labels={"h": [1, 0, 2]}),
    "helpsteer2-preference": {"prompt": "q", "response_1": "a", "response_2": "a", "preference_strength": 2},
    "distilabel": {"instruction": "q", "generations": ["a", "a"], "ratings": [1, 2]},
    "llamafactory-alpaca": {"instruction": "q", "chosen": "a", "rejected": "a"},
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_responses_with_different_labels_are_refused_in_every_format(name):
    with pytest.raises(DataError, match=r"1 x equal responses \(row 2: "):
        load_preferences([good_of(name), EQUAL[name]], format=name)
    assert len(load_preferences([good_of(name), EQUAL[name]], format=name, on_error="skip")) == 1


def good_of(name):
    """The same row with different responses."""
    good = dict(EQUAL[name])
    for column in ("response_1", "rejected", "response_2"):
        if column in good:
            good[column] = "b"
    for column in ("responses", "generations"):
        if column in good:
            good[column] = ["a", "b", "c"][: len(good[column])]
    if name.startswith("helpsteer2"):
        good["response_1"] = "c"
    return good


def test_equal_responses_with_equal_or_missing_labels_are_a_tie_and_stay():
    item = PreferenceList("q", ("a", "b", "a"), {"h": (1, 0, 1), "s": (None, 1, 0)})
    assert item.labels["h"] == (1.0, 0.0, 1.0)
    tie = {"prompt": "q", "response_1": "a", "response_2": "a", "preference_strength": 0}
    assert load_preferences([tie])[0].labels == {"preference": (1.0, 1.0)}


def test_pairs_without_a_prompt_part_after_a_whole_character_where_there_are_no_spaces():
    item = load_preferences([{"chosen": "東京は晴れです", "rejected": "東京は雨です"}])[0]
    assert (item.prompt, item.responses) == ("東京は", ("晴れです", "雨です"))
    item = load_preferences([{"chosen": "ไปก้า", "rejected": "ไปกา"}])[0]  # the mark belongs to the consonant before
    assert (item.prompt, item.responses) == ("ไป", ("ก้า", "กา"))
    item = load_preferences([{"chosen": "東京 は晴れ", "rejected": "東京 は雨"}])[0]  # a space goes first, as ever
    assert (item.prompt, item.responses) == ("東京", (" は晴れ", " は雨"))
    with pytest.raises(DataError, match=r"no common prompt \(row 1"):
        load_preferences([{"chosen": "also", "rejected": "alas"}])


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("mark", [b"", BOM])
def test_prompts_in_text_and_json_lines_are_whole(tmp_path, mark):
    text = INSIDE.replace("\r", "")
    path = write(tmp_path / "p.txt", mark + f"{text}\r\n\r\ntwo\r\n".encode())
    assert placed_prompts(str(path)) == [("line 1", text), ("line 3", "two")]
    path = write(tmp_path / "p.jsonl", mark + '{"prompt": "one\u2028\u0085"}\r\n{"prompt": "two"}\r\n'.encode())
    assert placed_prompts(str(path)) == [("line 1", "one\u2028\u0085"), ("line 2", "two")]


@pytest.mark.parametrize(
    ("name", "lines", "reason"),
    [
        ("p.txt", [b"one", b"gr\xfc\xdfe", b"two"], "no UTF-8 text"),
        ("p.jsonl", [b'{"prompt": "one"}', b'{"prompt": "\\ud83d"}', b'{"prompt": "two"}'], "no prompt"),
        ("p.jsonl", [b'{"prompt": "one"}', b'{"prompt": [{"role": "a", "content": "\\udc80"}]}', b'{"prompt": "two"}'],
         "no prompt"),
        ("p.jsonl", [b'{"prompt": "one"}', b"{", b'{"prompt": "two"}'], "not JSON"),
        ("p.jsonl", [b'{"prompt": "one"}', b'{"prompt": "1", "prompt": "2"}', b'{"prompt": "two"}'], "not JSON"),
        ("p.jsonl", [b'{"prompt": "one"}', b'{"prompt": "gr\xfc\xdfe"}', b'{"prompt": "two"}'], "no UTF-8 text"),
    ],
)  # fmt: skip
def test_bad_prompts_are_named_by_their_line_and_refused_or_skipped(tmp_path, name, lines, reason):
    path = write(tmp_path / name, b"\n".join(lines))
    with pytest.raises(
        ValueError, match=rf"{name}: 2 prompts from 3 rows; 1 could not be used\n  1 x {reason} \(line 2: "
    ):
        placed_prompts(str(path))
    assert placed_prompts(str(path), on_error="skip") == [("line 1", "one"), ("line 3", "two")]


def test_arguments_and_the_standard_input_are_texts(monkeypatch):
    class Pipe:
        buffer = io.BytesIO(BOM + "größer?\u2028 \r\n".encode())

    monkeypatch.setattr(sys, "stdin", Pipe)
    assert texts_of_arguments(["hello", "-"]) == ["hello", "größer?"]
    Pipe.buffer = io.BytesIO(b"gr\xfc")
    with pytest.raises(TextError, match=r"the standard input is no UTF-8 text: its byte 3 \(0xfc\)"):
        texts_of_arguments(["-"])
    Pipe.buffer = io.BytesIO(BOM + b" \n")  # a closed one looks like this in a command, which opens the null device
    with pytest.raises(TextError, match="standard input, which is closed or empty"):
        texts_of_arguments(["-"])
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(TextError, match="standard input, which is closed"):
        texts_of_arguments(["-"])
    with pytest.raises(TextError, match=r"prompt 1 holds U\+DCFC at character 3: the byte 0xfc, which is not UTF-8"):
        texts_of_arguments(["a", "gr\udcfc"])


def test_a_prompt_of_bytes_that_are_no_text_is_refused_before_anything_is_loaded(tmp_path):
    command = [sys.executable, "-m", "mopl.cli", "generate", str(tmp_path), "--weights", "1", b"gr\xfc"]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode != 0 and b"prompt 0 holds U+DCFC at character 3: the byte 0xfc" in done.stderr
    assert b"Traceback" not in done.stderr


def test_names_and_texts_among_settings_are_texts_and_numbers_are_decimal():
    from mopl.alignment.config import AlignConfig
    from mopl.ranking.loading import load
    from mopl.ranking.objectives import parse_objectives

    with pytest.raises(ValueError, match=r"prompt_text holds U\+DCFC at character 1: the byte 0xfc.*write it in UTF-8"):
        AlignConfig(model="m", data="d", prompt_text="\udcfc")
    with pytest.raises(ValueError, match=r"the name of an objective holds U\+DCFC at character 3"):
        parse_objectives("gr\udcfc=3")
    with pytest.raises(ValueError, match=r"has the source '²', not a column number"):
        parse_objectives("price=²")
    with pytest.raises(ValueError, match="option queries of data 'synthetic' is '²' but must be of type int"):
        load("synthetic:queries=²")


def test_text_faults_are_found_wherever_they_stand():
    assert lone_surrogate("größer 😀") is None and "U+D83D at character 2: half" in lone_surrogate("a\ud83d")
    assert text_fault([{"a": ("b", {"c": "\udfff"})}]).startswith("holds U+DFFF")
    assert text_fault({"\ud800": 1}) and text_fault([{"a": 1, "b": None, "c": [1.5, "é"]}]) is None


# ---------------------------------------------------------------- templates

# Like many: the roles must take turns, and there is no role for a system prompt.
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "[{{ m['role'] }}] {{ m['content'] + '' }}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
SYSTEM = [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}]


def strict_tokenizer(template=STRICT):
    made = tiny.tokenizer(chat=True)
    made.chat_template = template
    return made


def test_a_row_that_the_chat_template_refuses_is_named_by_its_line(tmp_path):
    from mopl.language_models.tokenization import ListTokenizer, tokenize

    lines = [row("w1"), row(SYSTEM), row([{"role": "user", "tool_calls": [{"a": 1}]}]), row("w3")]
    path = write(tmp_path / "d.jsonl", "\n\n".join(map(json.dumps, lines)))
    data, tokenizer = load_preferences(path), ListTokenizer(strict_tokenizer())
    with pytest.raises(DataError) as error:
        tokenize(data, tokenizer)
    text = str(error.value)
    assert "d.jsonl (tokens): 2 lists from 4 rows; 2 could not be used" in text
    assert (
        "2 x refused by the chat template (line 3: Roles must alternate user/assistant (roles: system, user); line 5: "
        in text
    )
    assert [item.index for item in tokenize(data, tokenizer, on_error="skip")] == [0, 3]
    assert [item.index for item in tokenize(data[1:], tokenizer, on_error="skip")] == [2]
    assert sorted(item.place for part in data.split(0.5) for item in part) == ["line 1", "line 3", "line 5", "line 7"]
    with pytest.raises(transformers_error(), match="Expected"):  # of the template, not of a row
        tokenize(data, ListTokenizer(strict_tokenizer("{% if %}")), on_error="skip")


def transformers_error():
    from jinja2 import TemplateSyntaxError

    return TemplateSyntaxError


def test_prompts_that_the_chat_template_refuses_are_named_in_every_use(tmp_path):
    from mopl.clp.config import ClpConfig
    from mopl.clp.prompts import split_prompts
    from mopl.integrations._data import examples_of
    from mopl.language_models.generate import generate
    from mopl.language_models.tokenization import ListTokenizer

    tokenizer = strict_tokenizer()
    model = tiny.build()
    with pytest.raises(
        ValueError, match=r"prompt 1 cannot be answered: refused by the chat template: Roles must alternate"
    ):
        generate(model, tokenizer, ["w1", SYSTEM], max_new_tokens=2)
    with pytest.raises(ValueError, match=r"prompt 0 cannot be answered: no Unicode text: the text holds U\+D83D"):
        generate(model, tokenizer, "\ud83d", max_new_tokens=2)
    with pytest.raises(DataError, match=r"refused by the chat template \(row 2: Roles must alternate"):
        examples_of([row("w1"), row(SYSTEM)], processing_class=tokenizer)
    with pytest.raises(DataError, match=r"no Unicode text \(row 2: response 0 holds U\+D83D"):
        examples_of(
            [
                {"prompt": "w1", "chosen": "w2", "rejected": "w3"},
                {"prompt": "w1", "chosen": "w\ud83d", "rejected": "w3"},
            ],
            processing_class=tokenizer,
        )
    lines = [{"prompt": "w1"}, {"prompt": SYSTEM}, {"prompt": "w2"}, {"prompt": "w3"}]
    path = write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, lines)))
    placed = placed_prompts(str(path))
    settings = {"model": "m", "data": str(path), "rewards": ("brevity",)}
    encoder = ListTokenizer(tokenizer, max_length=None, append_eos=False)
    with pytest.raises(
        DataError, match=r"p\.jsonl \(tokens\): 3 prompts from 4 rows.*\n.*refused by the chat template \(line 2: "
    ):
        split_prompts(placed, encoder, ClpConfig(**settings))
    kept, long = split_prompts(placed, encoder, ClpConfig(**settings, on_error="skip"))
    assert sorted((*kept["train"].texts, *kept["test"].texts)) == ["w1", "w2", "w3"] and long == 0


def test_a_run_goes_on_without_the_rows_that_the_template_refuses(tmp_path):
    """The answers of the report are to prompts that can be asked."""
    from mopl.alignment.config import AlignConfig
    from mopl.alignment.recipe import align

    tiny.build().save_pretrained(tmp_path / "model")
    strict_tokenizer().save_pretrained(tmp_path / "model")
    lines = [row(f"w{i}") if i % 3 else row([SYSTEM[0], {"role": "user", "content": f"w{i}"}]) for i in range(30)]
    lines = [{**line, "responses": ["w1 w2", "w3"]} for line in lines]
    path = write(tmp_path / "d.jsonl", "\n".join(map(json.dumps, lines)))
    options = {
        "model": str(tmp_path / "model"), "data": str(path), "steps": 1, "points": 1, "scales": (), "samples": 9,
        "sample_tokens": 1, "bootstrap": 0, "held_out": 0.5, "device": "cpu",
    }  # fmt: skip
    with pytest.raises(DataError, match="refused by the chat template"):
        align(AlignConfig(**options), tmp_path / "run", say=lambda text: None)
    align(AlignConfig(**options, on_error="skip"), tmp_path / "run", say=lambda text: None)
    samples = json.loads((tmp_path / "run" / "samples.json").read_text())
    assert samples and all(entry["prompt"].startswith("w") for entry in samples)


def test_a_list_by_itself_refuses_half_characters():
    with pytest.raises(RowError, match=r"no Unicode text: response 1 holds U\+D83D"):
        PreferenceList("q", ("a", "\ud83d"), {"h": (1, 0)})
