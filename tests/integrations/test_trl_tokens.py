"""`MultiObjectiveDPOTrainer` trains on the tokens of `trl.DPOTrainer`, to the id, whatever release is installed."""

import json
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("peft")
trl = pytest.importorskip("trl")

import tiny_language_models as tiny

from mopl.integrations._data import batch_of
from mopl.integrations.transformers import MultiObjectiveConfig, MultiObjectiveTrainer
from mopl.integrations.trl import MultiObjectiveDPOConfig, MultiObjectiveDPOTrainer
from mopl.language_models.data import DataError
from mopl.language_models.tokenization import ListTokenizer

SPECIAL = ["<pad>", "<bos>", "<eos>", "<user>", "<bot>", "<end>", "<think>", "</think>", "<sys>", "<tools>"]
TEXTS = [
    "why is the sky blue? light scatters in the air",
    "how? like so, and no idea at all",
    "who are you? a model of few words",
    "what is the time? the time is now",
]
# The end of a turn is not the end token, and a line break follows it.
CHATML = (
    "{% if tools %}<tools>{% for t in tools %}{{ t['function']['name'] }}{% endfor %}\n{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'system' %}<sys>{{ m['content'] }}<end>\n"
    "{% elif m['role'] == 'assistant' %}<bot>{% if thinking %}<think></think>{% endif %}{{ m['content'] }}<end>\n"
    "{% else %}<user>{{ m['content'] }}<end>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    # The end token and a beginning, which a tokenizer that adds one must not double.
    "bos": "<bos>" + CHATML.replace("<end>", "<eos>"),
    # Opens a thought where an answer is to be generated, and nowhere else.
    "thinks": CHATML.replace("{% if add_generation_prompt %}<bot>", "{% if add_generation_prompt %}<bot><think>\n"),
    # Trims what is said, and writes no line break at the end.
    "trims": CHATML.replace("['content'] }}", "['content'] | trim }}").replace("<end>\n", "<end>"),
}  # fmt: skip


def byte_level(front: str = "", back: str = "", **options):
    return wrapped(tiny.merging(TEXTS, SPECIAL, **options), front, back)


def word_level(front: str = "", back: str = ""):
    words = sorted({word for text in TEXTS for word in text.replace("?", " ?").replace(",", " ,").split()} | {"[UNK]"})
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *words])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(SPECIAL)
    return wrapped(inner, front, back)


def wrapped(inner, front: str, back: str):
    if front or back:
        ids = [(token, inner.token_to_id(token)) for token in ("<bos>", "<eos>")]
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{front} $A {back}".split(), special_tokens=ids
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token=None,
        additional_special_tokens=SPECIAL[3:],
    )  # fmt: skip


TOKENIZERS = {
    "bytes": byte_level,
    "bytes, bos": lambda: byte_level("<bos>"),
    "bytes, bos and eos": lambda: byte_level("<bos>", "<eos>"),
    "bytes across words": lambda: byte_level(use_regex=False),
    "words": word_level,
    "words, bos": lambda: word_level("<bos>"),
}


@pytest.fixture(scope="module")
def make():
    """Tokenizers by name, each made once."""
    made = {}

    def get(name: str, template: str | None = None):
        if name not in made:
            made[name] = TOKENIZERS[name]()
        made[name].chat_template = TEMPLATES.get(template)
        return made[name]

    return get


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


QUESTIONS = [
    ("why is the sky blue?", "light scatters in the air", "no idea"),
    ("how?", "like so", "no idea at all, no"),
    ("who are you? a", "model of few words", "model"),
]
TOOLS = [{"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}]


def rows_of(form: str) -> list[dict]:
    """Rows in one form of TRL's preference format."""
    rows = []
    for number, (question, chosen, rejected) in enumerate(QUESTIONS):
        pair = {"chosen": [bot(chosen)], "rejected": [bot(rejected)]}
        match form:
            case "text":
                row = {"prompt": question, "chosen": " " + chosen, "rejected": " " + rejected}
            case "text, space before the seam":
                row = {"prompt": question + " ", "chosen": chosen, "rejected": rejected}
            case "text that ends":
                row = {"prompt": question + "\n", "chosen": chosen + "<eos>", "rejected": rejected}
            case "text, implicit":
                row = {"chosen": f"{question} {chosen}", "rejected": f"{question} {rejected}"}
            case "text, nothing in common":
                row = {"chosen": chosen, "rejected": rejected}
            case "messages":
                row = {"prompt": [user(question)], **pair}
            case "messages, implicit":
                turns = [system("few words"), user(question)]
                row = {side: turns + answer for side, answer in pair.items()}
            case "messages, system":
                row = {"prompt": [system("few words"), user("how?"), bot("like so"), user(question)], **pair}
            case "messages, several":
                row = {"prompt": [user(question)], **{s: [*a, user("how?"), bot("so")] for s, a in pair.items()}}
            case "messages, answer begun":
                row = {"prompt": [user("how?"), bot("like so")], **pair}
            case "tools":
                row = {"prompt": [user(question)], **pair, "tools": json.dumps(TOOLS) if number % 2 else json.dumps([])}
            case "template options":
                row = {"prompt": [user(question)], **pair, "chat_template_kwargs": {"thinking": number % 2 == 1}}
        rows.append({**row, "extra": number})
    return rows


TEXT_FORMS = [
    "text", "text, space before the seam", "text that ends", "text, implicit", "text, nothing in common",
]  # fmt: skip
MESSAGE_FORMS = [
    "messages", "messages, implicit", "messages, system", "messages, several", "messages, answer begun", "tools",
    "template options",
]  # fmt: skip
# A length that cuts some rows of a form and leaves others out.
SHORT = {"messages, implicit": 17, "messages, system": 28, "messages, answer begun": 15} | dict.fromkeys(TEXT_FORMS, 6)


def cuts(form: str) -> list[dict]:
    short = SHORT.get(form, 13)
    return [
        {"max_length": short},
        {"max_length": short, "truncation_mode": "keep_end"},
        {"max_length": 3, "truncation_mode": "keep_end"},  # inside the responses
    ]


WHOLE = {"max_length": None}
CASES = [
    *[(form, name, None, WHOLE) for form in TEXT_FORMS for name in TOKENIZERS],
    *[(form, "bytes, bos", template, WHOLE) for form in MESSAGE_FORMS for template in TEMPLATES],
    *[(form, "bytes", None, cut) for form in TEXT_FORMS for cut in cuts(form)],
    *[(form, "bytes", "bos", cut) for form in MESSAGE_FORMS for cut in cuts(form)],
    ("messages", "bytes across words", "thinks", cuts("")[1]), ("tools", "words", "chatml", cuts("")[0]),
]  # fmt: skip


def tiny_llama(seed: int = 0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=340, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def arguments(kind, folder, **options):
    defaults = dict(
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", per_device_train_batch_size=4, beta=0.3,
        bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False, max_steps=2,
    )  # fmt: skip
    return kind(str(folder), **{**defaults, **options})


@pytest.fixture(scope="module")
def models():
    return tiny_llama(), tiny_llama(5)


def trainer_of(kind, config, tokenizer, rows, folder, models=None, **options):
    data = rows if not isinstance(rows, list) or kind is MultiObjectiveTrainer else datasets.Dataset.from_list(rows)
    model, reference = models or (tiny_llama(), tiny_llama(5))
    more = {"ref_model": reference, "train_dataset": data, "processing_class": tokenizer}
    return kind(model, args=arguments(config, folder, **options), **more)


def theirs(*args, **options):
    trainer = trainer_of(trl.DPOTrainer, trl.DPOConfig, *args, **options)
    return trainer, trainer.data_collator(list(trainer.train_dataset))


def ours(*args, **options):
    trainer = trainer_of(MultiObjectiveDPOTrainer, MultiObjectiveDPOConfig, *args, **options)
    return trainer, trainer.data_collator(list(trainer.train_dataset.lists))


def sequences(inputs) -> list[tuple[list[int], list[bool]]]:
    """The tokens of each sequence without padding, and which of them are a response's; chosen before rejected."""
    if "completion_mask" in inputs:
        ids, mask, attended = (inputs[name] for name in ("input_ids", "completion_mask", "attention_mask"))
        order = range(len(ids))
    else:
        batch, _ = batch_of(inputs)
        ids, attended = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        mask = batch.inputs["labels"] != -100
        order = [*range(0, len(ids), 2), *range(1, len(ids), 2)]
    kept = [attended[row].bool() for row in order]
    return [(ids[row][keep].tolist(), mask[row][keep].bool().tolist()) for row, keep in zip(order, kept, strict=True)]


def step(trainer, inputs):
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- to the id


@pytest.mark.parametrize(("form", "name", "template", "cut"), CASES)
def test_tokens_are_those_of_trl_to_the_id(make, models, tmp_path, form, name, template, cut):
    tokenizer, rows = make(name, template), rows_of(form)
    _, expected = theirs(tokenizer, rows, tmp_path, models, **cut)
    _, inputs = ours(tokenizer, rows, tmp_path, models, **cut)
    assert sequences(inputs) == sequences(expected)


def test_the_cases_hold_what_they_are_there_for(make, models, tmp_path):
    """Merges across the seam, rows that are left out, prompts cut at their start, and responses cut at either end."""
    tokenizer = make("bytes")
    first, *_ = rows_of("text, space before the seam")
    alone, whole = tokenizer(first["prompt"])["input_ids"], tokenizer(first["prompt"] + first["chosen"])["input_ids"]
    assert whole[: len(alone)] != alone

    def lengths(**cut):
        found = sequences(ours(tokenizer, rows_of("text"), tmp_path, models, **cut)[1])
        return [len(ids) for ids, _ in found], [sum(mask) for _, mask in found]

    start, end, inside = (lengths(**cut) for cut in cuts("text"))
    uncut, scored = lengths(**WHOLE)
    assert 0 < len(start[0]) < 6 and max(start[0]) == 6 and max(start[1]) < max(scored)
    assert len(end[0]) == 6 and max(end[0]) == 6 < max(uncut) and end[1] == [*scored[:4], 6, 2]
    assert set(inside[0]) == {3} == set(inside[1][:4])


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize(
    ("form", "name", "template", "cut"),
    [
        ("text, space before the seam", "bytes", None, WHOLE),
        ("text, nothing in common", "bytes across words", None, WHOLE),
        ("text, implicit", "words, bos", None, WHOLE),
        ("text", "bytes", None, cuts("text")[1]),
        ("text", "bytes", None, cuts("text")[2]),
        ("messages, system", "bytes, bos", "thinks", WHOLE),
        ("template options", "bytes", "chatml", cuts("")[0]),
    ],
)
def test_loss_and_gradients_of_these_tokens_are_those_of_trl(
    make, models, tmp_path, form, name, template, cut, padding_free
):
    tokenizer, rows = make(name, template), rows_of(form)
    trainer, inputs = theirs(tokenizer, rows, tmp_path, **cut)
    expected, gradients = step(trainer, inputs)
    mine, own = ours(tokenizer, rows, tmp_path, padding_free=padding_free, **cut)
    assert ("attention_mask" in own) is not padding_free
    found, got = step(mine, own)
    assert abs(found - expected) < 1e-5
    assert got.keys() == gradients.keys()
    largest = max(float(value.abs().max()) for value in gradients.values())
    assert largest > 1e-3
    for key, value in got.items():
        assert float((value - gradients[key]).abs().max()) <= 1e-5 * max(1.0, largest), key


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm", "sft"])
def test_averages_over_responses_that_nothing_stands_before_are_those_of_trl(make, tmp_path, name, padding_free):
    """Their first token has no score; TRL counts it in some types and not in others."""
    tokenizer, rows = make("bytes"), rows_of("text, nothing in common")
    expected, _ = step(*theirs(tokenizer, rows, tmp_path, loss_type=[name]))
    found, _ = step(*ours(tokenizer, rows, tmp_path, loss_type=[name], padding_free=padding_free))
    assert abs(found - expected) < 1e-5


# ---------------------------------------------------------------- rows


def tokens_of(
    rows, tokenizer, folder, models, kind=MultiObjectiveDPOTrainer, config=MultiObjectiveDPOConfig, **options
):
    trainer = trainer_of(kind, config, tokenizer, rows, folder, models, **options)
    return [
        (item.tokens.prompt.tolist(), [r.tolist() for r in item.tokens.responses]) for item in trainer.train_dataset
    ]


@pytest.mark.parametrize("form", ["text, implicit", "tools", "template options"])
def test_rows_in_memory_have_the_tokens_of_a_data_set(make, models, tmp_path, form):
    tokenizer, rows = make("bytes, bos", "chatml"), rows_of(form)
    expected = tokens_of(rows, tokenizer, tmp_path, models)
    assert tokens_of(tuple(rows), tokenizer, tmp_path, models) == expected
    assert tokens_of(datasets.Dataset.from_list(rows), tokenizer, tmp_path, models, dataset_num_proc=2) == expected


def test_a_row_that_has_options_of_its_own_leaves_others_as_they_are(make, models, tmp_path):
    tokenizer, rows = make("bytes", "chatml"), rows_of("messages")
    plain = tokens_of(rows, tokenizer, tmp_path, models)
    rows[1] = {**rows[1], "tools": TOOLS, "chat_template_kwargs": {"thinking": True}}
    mixed = tokens_of(tuple(rows), tokenizer, tmp_path, models)
    assert mixed[::2] == plain[::2] and mixed[1] != plain[1]
    assert tokenizer.decode(mixed[1][0]).startswith("<tools>time") and "<think>" in tokenizer.decode(mixed[1][1][0])


def test_labels_and_weights_stay_with_their_rows_when_others_are_left_out(make, models, tmp_path, caplog):
    rows = [
        {
            **row, "good": [number, number / 2], "objective_weights": [1.0],
            "ref_chosen_logps": -number, "ref_rejected_logps": 0,
        }
        for number, row in enumerate(rows_of("text"), 1)
    ]  # fmt: skip
    with caplog.at_level("WARNING", logger="mopl.integrations._trl_tokens"):
        trainer, inputs = ours(make("bytes"), rows, tmp_path, models, max_length=6, objectives=["good"])
    kept = [example.tokens.index for example in trainer.train_dataset]
    assert 0 < len(kept) < 3 and f"{3 - len(kept)} of 3 rows are left out as in TRL: their prompt" in caplog.text
    batch, extras = batch_of(inputs)
    assert batch.labels[:, 0].tolist() == [[n + 1.0, (n + 1) / 2] for n in kept]
    assert extras.reference[:, 0].tolist() == [-n - 1.0 for n in kept] and set(extras.weights[:, 0].tolist()) == {1}
    with pytest.raises(DataError, match=r"3 of 3 rows are left out .* fills max_length = 1; raise max_length"):
        ours(make("bytes"), rows_of("text"), tmp_path, models, max_length=1)


def test_a_column_of_lengths_stays_with_its_rows_when_others_are_left_out(make, models, tmp_path):
    rows = [{**row, "length": [90, 10, 50][number]} for number, row in enumerate(rows_of("text"))]
    options = {"max_length": 6, "train_sampling_strategy": "group_by_length"}
    trainer, _ = ours(make("bytes"), rows, tmp_path, models, **options)
    kept = [example.tokens.index for example in trainer.train_dataset]
    assert 0 < len(kept) < 3
    assert trainer._get_train_sampler().lengths == [rows[number]["length"] for number in kept]


def test_a_prompt_in_text_beside_whole_conversations_is_left_out(make, models, tmp_path):
    """As in HuggingFaceH4/ultrafeedback_binarized, where TRL's trainer fails."""
    tokenizer, rows = make("bytes", "chatml"), rows_of("messages, implicit")
    expected = tokens_of(rows, tokenizer, tmp_path, models)
    assert tokens_of([{**row, "prompt": "how?"} for row in rows], tokenizer, tmp_path, models) == expected


def test_equal_responses_are_trained_on_as_in_trl(make, models, tmp_path):
    rows = [*rows_of("text"), {"prompt": "how?", "chosen": "so", "rejected": "so", "extra": 0}]
    assert sequences(ours(make("bytes"), rows, tmp_path, models)[1]) == sequences(
        theirs(make("bytes"), rows, tmp_path, models)[1]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [b"png"]}, r"1 x column that is not read \(row 2: images is part of what a model sees"),
        ({"image": "a.png"}, "image is part of what a model sees .* only text can be trained"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "prompt holds a part of type 'image'"),
        ({"rejected": None}, "row 2: rejected is a NoneType but must be a list of messages, as in the first row"),
        ({"prompt": "how?", "chosen": "so", "rejected": "no"}, "row 2: prompt is a str but must be a list of messages"),
        ({s: [user("how?"), bot(s)] for s in ("chosen", "rejected")} | {"prompt": [user("how?")]}, "1 x prompt twice"),
        ({"chosen": []}, r"no messages \(row 2: chosen holds no message"),
        ({"chosen": [bot("\ud83d")]}, "row 2: chosen holds U.D83D at character 1"),
        ({"chat_template_kwargs": None}, "row 2: chat_template_kwargs is no dictionary"),
        ({"preference": "yes"}, "row 2: preference is 'yes'; pass objectives=.'preference'. if it is a label"),
        ({"preference": 0}, "row 2: preference is 0; pass objectives=.'preference'. if it is a label"),
    ],
)
def test_rows_that_would_be_wrong_without_a_word_are_refused(make, models, tmp_path, change, message):
    rows = rows_of("messages")
    rows[1] = {**rows[1], **change}
    with pytest.raises(DataError, match=message):
        ours(make("bytes", "chatml"), tuple(rows), tmp_path, models)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokenization", ["trl", "mopl"])
def test_rows_with_a_format_are_read_as_those_without(make, models, tmp_path, stream, tokenization):
    rows = [{**row, "a": [1.0, 2.0], "objective_beta": [0.3]} for row in rows_of("messages")]
    plain = datasets.Dataset.from_list(rows)
    plain = plain.to_iterable_dataset() if stream else plain
    found = []
    for data in (plain, *map(plain.with_format, ("numpy", "torch", "pandas"))):
        trainer = trainer_of(
            MultiObjectiveDPOTrainer, MultiObjectiveDPOConfig, make("bytes", "chatml"), data, tmp_path, models,
            tokenization=tokenization, objectives=["a"],
        )  # fmt: skip
        read = trainer.train_dataset.head if stream else trainer.train_dataset
        inputs = trainer.data_collator(list(read.lists))
        found.append((sequences(inputs), inputs["list_labels"].tolist(), inputs["list_beta"].tolist()))
    assert found[1:] == found[:1] * 3


def test_a_tokenizer_without_an_end_token_is_refused(make, models, tmp_path):
    tokenizer = word_level()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no eos_token"):
        ours(tokenizer, rows_of("text"), tmp_path, models)


# ---------------------------------------------------------------- mopl's own tokens


def test_mopls_own_tokens_are_an_option_and_those_of_the_trainer_for_transformers(make, models, tmp_path):
    tokenizer, rows = make("bytes", "chatml"), rows_of("text")
    expected = tokens_of(rows, tokenizer, tmp_path, models, MultiObjectiveTrainer, MultiObjectiveConfig)
    assert tokens_of(rows, tokenizer, tmp_path, models, tokenization="mopl") == expected
    assert expected != tokens_of(rows, tokenizer, tmp_path, models)
    assert tokenizer.decode(expected[0][0]) == "<user>why is the sky blue?<end>\n<bot>"
    with pytest.raises(ValueError, match="tokenization is 'other'"):
        MultiObjectiveDPOConfig(str(tmp_path), tokenization="other")


@pytest.mark.parametrize(("form", "template", "how"), [("text", None, "plain"), ("messages, system", "bos", "chat")])
@pytest.mark.parametrize("name", ["bytes", "bytes, bos", "words, bos"])
def test_generation_reads_the_prompts_that_were_trained(make, models, tmp_path, form, template, how, name):
    tokenizer, rows = make(name, template), rows_of(form)
    encoder = ListTokenizer(tokenizer, max_length=None, template=how, append_eos=False)
    trained = [prompt for prompt, _ in tokens_of(rows, tokenizer, tmp_path, models)]
    assert trained == [encoder.prompt_tokens(row["prompt"]).tolist() for row in rows]


def test_other_data_keep_mopls_tokens_and_have_no_options_of_pairs(make, models, tmp_path):
    tokenizer = make("bytes", "chatml")
    lists = ({"prompt": "how?", "responses": ["so", "like so", "no"], "labels": {"a": [1, 2, 0]}},)
    alpaca = ({"instruction": "how?", "chosen": "like so", "rejected": "no"},)
    for rows in (lists, alpaca):
        (prompt, responses), *_ = tokens_of(rows, tokenizer, tmp_path, models)
        assert tokenizer.decode(prompt) == "<user>how?<end>\n<bot>"
        assert tokenizer.decode(responses[-1]).startswith("no")
        for option in ({"truncation_mode": "keep_end"}, {"dataset_num_proc": 2}):
            with pytest.raises(ValueError, match=f"{next(iter(option))} is .* but only rows of pairs are"):
                tokens_of(rows, tokenizer, tmp_path, models, **option)
    with pytest.raises(ValueError, match="dataset_num_proc is 2 but the rows are a tuple"):
        tokens_of(tuple(rows_of("text")), tokenizer, tmp_path, models, dataset_num_proc=2)


@pytest.mark.parametrize("column", ["tools", "chat_template_kwargs", "images"])
def test_the_trainer_for_transformers_refuses_columns_that_it_does_not_read(make, models, tmp_path, column):
    rows = [{**row, column: None} for row in rows_of("messages")]
    options = (make("bytes", "chatml"), tmp_path, models, MultiObjectiveTrainer, MultiObjectiveConfig)
    assert len(tokens_of(tuple(rows), *options)) == 3
    for value in ([TOOLS[0]], {"thinking": True}, "[1]"):
        rows[2][column] = value
        with pytest.raises(DataError, match=f"row 3: {column} is part of what a model sees and is not read here"):
            tokens_of(tuple(rows), *options)


@pytest.mark.parametrize(
    ("evaluated", "options", "warned"),
    [
        ("text", {}, False),
        ("lists", {}, True),
        ("messages", {}, True),
        ("lists", {"tokenization": "mopl"}, False),
        ("lists", {"template": None}, False),
    ],
)
def test_data_sets_of_one_trainer_that_are_written_in_two_forms_are_named(
    make, models, tmp_path, evaluated, options, warned
):
    options = {"template": "chatml", **options}
    tokenizer, rows = make("bytes", options.pop("template")), rows_of("text")
    lists = [
        {"prompt": r["prompt"], "responses": [r["chosen"], r["rejected"]], "labels": {"preference": [1, 0]}}
        for r in rows
    ]
    data = lists if evaluated == "lists" else rows_of(evaluated)
    trainer = trainer_of(
        MultiObjectiveDPOTrainer, MultiObjectiveDPOConfig, tokenizer, rows, tmp_path, models, **options
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer._prepared(data)
    messages = [str(warning.message) for warning in caught]
    assert (
        any("holds texts as they are, and another one texts written by the chat template" in m for m in messages)
        == warned
    )


@pytest.mark.parametrize("kind", ["rows", "dataset"])
def test_a_row_that_the_chat_template_refuses_is_named_or_left_out_and_the_others_stay_as_they_are(tmp_path, kind):
    def row(text, *before):
        said = {side: [{"role": "assistant", "content": f"w{n}"}] for n, side in enumerate(("chosen", "rejected"))}
        return {"prompt": [*before, {"role": "user", "content": text}], **said}

    def examples(rows, on_error="raise"):
        given = rows if kind == "rows" else datasets.Dataset.from_list(rows)
        encoder = tiny.tokenizer(chat=True)
        encoder.chat_template = (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + tiny.TEMPLATE
        )
        args = MultiObjectiveDPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
        trainer = MultiObjectiveDPOTrainer(
            tiny.build(), args=args, train_dataset=given, processing_class=encoder, on_error=on_error
        )
        return [(e.tokens.prompt.tolist(), [r.tolist() for r in e.tokens.responses]) for e in trainer.train_dataset]

    fine = [row("w5"), row("w6 w7")]
    rows = [fine[0], row("w1", {"role": "system", "content": "w2"}), fine[1]]
    with pytest.raises(DataError, match=r"2 lists from 3 rows(.|\n)*refused by the chat template \(row 2: no system"):
        examples(rows)
    assert examples(rows, "skip") == examples(fine)
