"""The page at GET / in a real browser, with a real server of a tiny model: what it sends, shows and refuses."""

import contextlib
import re
import shlex
import threading
import time

import pytest
from browsing import browsing, needs_browser
from served_models import layer_of, running, served
from tiny_language_models import tokenizer

from mopl.language_models.generate import generate
from mopl.language_models.tokenization import ListTokenizer
from mopl.serving.model import ServedModel
from mopl.serving.page import HEADERS, PATHS, page_part

CHAT = "/v1/chat/completions"
NASTY = "<script>document.title = 'bad'</script><img src=x onerror=alert(1)>" + "w" * 3000 + " \u202ebidi & <b>bold</b>"
DONE = "document.querySelectorAll('.answer.done').length"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("browser")) as page:
        page.resize(1280, 900)
        yield page


@pytest.fixture(scope="module")
def server():
    with running(served(), max_queue=8) as server:
        yield server


def opened(page, server, fragment=""):
    page.open(f"{server.url}/{fragment}")
    page.until("!document.getElementById('talk').hidden")
    return page


def click(page, where):
    page.do(f"document.querySelector({where!r}).click()")


def ask(page, text, *, control=False):
    page.do("document.getElementById('message').focus()")
    page.write(text)
    page.key("Enter", control=control)


def move(page, slider, value):
    page.do(f"e = document.getElementById({slider!r}); e.value = {value}; e.dispatchEvent(new Event('input'))")


def texts(page, part=".answer .text"):
    return page.do(f"[...document.querySelectorAll({part!r})].map((each) => each.textContent)")


def told(server, messages, weights, scale=1.0):
    """What `mopl generate` says."""
    model = server.model
    (found,) = generate(model.model, model.chat.encoder, [messages], weights, scale=scale, max_new_tokens=32)
    return found.text


def user(text):
    return {"role": "user", "content": text}


@contextlib.contextmanager
def stepping(server, steps):
    """Let the model take so many steps, and no more before the end of this."""
    left = threading.Semaphore(steps)

    def wait(*_):
        assert left.acquire(timeout=20)

    hook = layer_of(server.model.model).register_forward_pre_hook(wait)
    try:
        yield
    finally:
        hook.remove()
        left.release(100)


# --- what is sent to the browser


def test_the_page_brings_everything_along_and_forbids_the_rest():
    parts = {path: page_part(path)[0] for path in PATHS}
    assert set(re.findall(r'(?:src|href)="([^"]*)"', parts["/"])) == {"data:,", "page.css", "page.js"}
    for text in parts.values():
        assert not re.search(r"https?:(?!//chromedevtools)|@import|url\(", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", parts["/page.js"])
    assert not re.search(r"<script>|<style| style=| on\w+=", parts["/"])  # the policy forbids what is written inline
    policy = dict(part.strip().split(" ", 1) for part in HEADERS["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"


def test_the_server_sends_the_page_with_its_policy(server):
    for path in PATHS:
        text, kind = page_part(path)
        found = server.http.get(path)
        assert found.status_code == 200 and found.text == text and found.headers["content-type"].startswith(kind)
        assert all(found.headers[name] == value for name, value in HEADERS.items())


# --- in a browser


@needs_browser
def test_the_sliders_say_at_what_weights_and_scale_the_answer_is_made(page, server):
    opened(page, server)
    assert page.do("document.title") == "Talk to tiny" and page.bodies(CHAT) == []
    move(page, "weight", 0.7)
    move(page, "scale", -1)  # two to the power of one
    ask(page, "w1 w2 w3")
    page.until(f"{DONE} === 1")
    (body,) = page.bodies(CHAT)
    assert (body["weights"], body["scale"], body["temperature"]) == ([0.7, 0.3], 2, 0)
    assert (
        texts(page)
        == [told(server, [user("w1 w2 w3")], [0.7, 0.3], 2.0)]
        != [told(server, [user("w1 w2 w3")], [0.7, 0.3])]
    )
    assert texts(page, ".at") == ["helpful 0.7 harmless 0.3 scale 2, closer to the base"]
    assert page.do("location.hash") == "#w=0.7,0.3&scale=2"
    assert page.complaints() == []


@needs_browser
def test_a_conversation_goes_on_by_keyboard_alone_and_its_answers_are_part_of_it(page, server):
    opened(page, server, "#w=0.2,0.8&prompt=w9")  # a prompt in the address is sent by nobody
    page.do("document.getElementById('weight').focus()")
    for _ in range(3):
        page.key("ArrowRight")
    assert page.do("document.getElementById('message').value") == "" and page.bodies(CHAT) == []
    click(page, "#choose summary")
    page.do("e = document.getElementById('system'); e.value = 'w30'; e = document.getElementById('most'); e.value = 5")
    ask(page, "w1")
    page.until(f"{DONE} === 1")
    page.until("document.activeElement.id === 'message'")
    ask(page, "w2")
    page.until(f"{DONE} === 2")
    first, second = page.bodies(CHAT)
    system = {"role": "system", "content": "w30"}
    assert first["messages"] == [system, user("w1")] and first["weights"] == [0.23, 0.77]
    answer = {"role": "assistant", "content": texts(page)[0]}
    assert second["messages"] == [system, user("w1"), answer, user("w2")] and second["max_tokens"] == 5
    click(page, "#clear")
    assert texts(page, ".bubble") == []
    ask(page, "w3")
    page.until(f"{DONE} === 1")
    assert page.bodies(CHAT)[2]["messages"] == [system, user("w3")]


@needs_browser
def test_compare_asks_at_several_trade_offs_at_once_and_goes_on_from_one(page, server):
    opened(page, server, "#w=0.9,0.1")
    ask(page, "w4 w5", control=True)
    page.until(f"{DONE} === 3")
    grid = [[0, 1], [0.5, 0.5], [1, 0]]
    assert sorted(body["weights"] for body in page.bodies(CHAT)) == grid
    answers = [told(server, [user("w4 w5")], w) for w in grid]
    assert texts(page) == answers and len(set(answers)) == 3
    assert texts(page, "[aria-pressed=true]") == ["Continue from this one"]
    assert texts(page, ".chosen .at") == ["helpful 1 harmless 0 "]  # next to the slider's
    page.do("document.querySelectorAll('[aria-pressed]')[1].click()")
    page.do("document.querySelectorAll('.answer')[0].querySelectorAll('button')[1].click()")  # move the sliders here
    assert page.do("document.getElementById('weight').value") == "0"
    click(page, ".again")
    page.until(f"{DONE} === 4")
    assert page.bodies(CHAT)[3]["messages"] == [user("w4 w5")] and texts(page)[3] == answers[0]
    page.do("document.querySelectorAll('[aria-pressed]')[1].click()")
    ask(page, "w6")
    page.until(f"{DONE} === 5")
    assert page.bodies(CHAT)[4]["messages"][1] == {"role": "assistant", "content": answers[1]}
    assert page.do("document.querySelectorAll('[aria-pressed]').length") == 0  # what is past stays as it was


@needs_browser
def test_an_answer_streams_and_can_be_stopped(page, server):
    opened(page, server)
    with stepping(server, 5):
        ask(page, "w1 w2 w3")
        page.until("document.querySelector('.answer .text').textContent.split(' ').length >= 3")
        buttons = "[...document.querySelectorAll('#compose > .row button')].map((each) => each.disabled)"
        assert page.do(DONE) == 0 and page.do(buttons) == [True, True, False, False]
        (row,) = server.engine._running
        page.key("Escape")
        page.until("document.querySelector('.answer.stopped')")
        deadline = time.monotonic() + 10
        while not row.cancelled:  # until the server has been told
            assert time.monotonic() < deadline
            time.sleep(0.01)
    whole = told(server, [user("w1 w2 w3")], [0.5, 0.5])
    (part,) = texts(page)
    assert whole.startswith(part) and 0 < len(part) < len(whole)
    assert "Stopped" in texts(page, ".answer .said")[0]
    click(page, ".again")
    page.until(f"{DONE} === 1")
    assert texts(page) == [part, whole]


@needs_browser
def test_errors_stand_where_the_answer_would_and_can_be_tried_again(page, server, monkeypatch):
    opened(page, server)
    ask(page, "w1 " * 80)  # the model has 64 positions
    page.until("document.querySelector('.answer.failed')")
    assert re.search(r"positions; (shorten|ask)", texts(page, "[role=alert]")[0], re.IGNORECASE)
    assert "no part of the conversation" in texts(page, ".turn > .key")[0]
    monkeypatch.setattr(server.engine, "max_queue", 0)
    ask(page, "w2")
    page.until("document.querySelectorAll('.answer.failed').length === 2")
    assert texts(page, "[role=alert]")[1].startswith("The server is busy")
    assert page.bodies(CHAT)[1]["messages"] == [user("w2")]
    monkeypatch.setattr(server.engine, "max_queue", 8)
    click(page, ".turn:last-child .answer button")  # try again
    page.until(f"{DONE} === 1")
    assert texts(page)[1] == told(server, [user("w2")], [0.5, 0.5])
    monkeypatch.setattr(server.model, "generate", fails)
    ask(page, "w3")
    page.until("document.querySelectorAll('.answer.failed').length === 2")
    assert "The model failed" in texts(page, "[role=alert]")[1] and "out of sorts" in texts(page, "[role=alert]")[1]
    monkeypatch.undo()
    monkeypatch.setattr(server.api, "seconds", 0.3)
    with stepping(server, 2):
        click(page, ".turn:last-child .answer button")
        page.until("document.querySelector('.turn:last-child [role=alert]')?.textContent.includes('took too long')")
    assert page.complaints() == []


def fails(*_):
    raise RuntimeError("out of sorts")


@needs_browser
def test_what_the_model_writes_is_text_whatever_it_is(page, server, monkeypatch):
    monkeypatch.setattr(server.model.detokenizer, "text", lambda tokens: NASTY[: 400 * len(tokens)])
    for width in (1280, 380):
        page.resize(width, 800)
        opened(page, server)
        ask(page, NASTY)
        page.until(f"{DONE} === 1")
        assert texts(page) == [NASTY] and texts(page, ".asked") == [NASTY]
        assert page.do("document.querySelectorAll('#log script, #log img, #log b').length") == 0
        assert page.do("document.title") == "Talk to tiny"
        assert page.do("document.documentElement.scrollWidth") <= width
        assert page.complaints() == []
    page.resize(1280, 900)
    # What a slip in the script would do is refused by the browser.
    refused = "try { document.body.innerHTML = '<b>bad</b>'; 'done' } catch (error) { error.name }"
    assert page.do(refused) == "TypeError"


@needs_browser
def test_the_snippets_make_this_very_request(page, server):
    opened(page, server, "#w=0.25,0.75&scale=0.5")
    ask(page, 'it\'s "w1" $HOME `w2` \\ ')
    page.until(f"{DONE} === 1")
    (answer,) = texts(page)
    page.do("document.getElementById('clear').click()")
    page.write('it\'s "w1" $HOME `w2` \\ ')
    name, curl, python = texts(page, ".code pre")
    assert name == "tiny@0.25,0.75"
    printed = []
    exec(python, {"print": printed.append})
    assert printed == [answer]
    words = shlex.split(curl.replace("\\\n", " "))
    assert words[:4] == ["curl", f"{server.url}{CHAT}", "-H", "Content-Type: application/json"]
    found = server.http.post(CHAT, content=words[5], headers={"content-type": "application/json"})
    assert found.json()["choices"][0]["message"]["content"] == answer


@needs_browser
def test_several_objectives_with_nasty_names_have_linked_sliders(page):
    names = ("<b>price</b>", "__proto__", "</script><script>alert(1)</script>")
    model = conditioned_on_three()
    encoder = ListTokenizer(tokenizer(), max_length=None, append_eos=False)  # no chat template
    served = ServedModel(model, encoder, names, name="<i>run's</i>")
    with running(served) as server:
        opened(page, server, "#w=0.5,0.25,0.25")
        move(page, "weight-0", 0.6)
        assert page.do("[...document.querySelectorAll('[id^=weight-]')].map((e) => e.value)") == ["0.6", "0.2", "0.2"]
        move(page, "weight-1", 0.0)
        ask(page, "w1 w2")
        page.until(f"{DONE} === 1")
        (body,) = page.bodies("/v1/completions")
        assert body["weights"] == [0.75, 0, 0.25] and body["prompt"] == "w1 w2"
        (found,) = generate(model, encoder, ["w1 w2"], [0.75, 0, 0.25], max_new_tokens=32)
        assert texts(page) == [found.text]
        assert page.do("document.title") == "Talk to <i>run's</i>"
        ask(page, "w1 w2", control=True)
        page.until(f"{DONE} === 5")
        assert page.do("document.querySelectorAll('main b, main i').length") == 0 and page.complaints() == []


def conditioned_on_three():
    import torch
    from tiny_language_models import HIDDEN, K, build

    from mopl.conditioning import HyperPrompt, HyperPromptModel, TuningRecord

    torch.manual_seed(1)
    prompt = HyperPrompt(3, K, 3, HIDDEN)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    names = ("a", "b", "c")
    return HyperPromptModel(build(), prompt, record=TuningRecord(names, beta=[0.1] * 3, concentration=0.5)).eval()


@needs_browser
def test_the_page_of_a_guided_model_says_who_answers_and_lays_out_betas(page):
    from tiny_language_models import build, conditioned

    large = build(num_hidden_layers=3, hidden_size=48)
    with running(served(conditioned(takes_beta=True), guided_model=large, beta=[0.6, 0.4])) as server:
        opened(page, server)
        assert "A large model answers, guided by this one." in texts(page, "#subtitle")[0]
        controls = texts(page, "#controls")[0]
        assert "Scale" in controls and "closer to the large model" in controls
        assert "scale 1, guided in full" in controls and "base" not in controls
        move(page, "scale", -1)
        assert "scale 2, closer to the large model" in texts(page, "#controls")[0]
        top, left = (
            page.do(f"['beta-0', 'beta-1'].map((id) => document.getElementById(id).getBoundingClientRect().{side})")
            for side in ("top", "left")
        )
        assert top[0] < top[1] and left[0] == left[1]  # one under the other
        assert page.complaints() == []


@needs_browser
def test_a_key_is_asked_for_and_kept_in_memory_only(page):
    with running(served(fixed=True, weights=[0.3, 0.7]), key="sesame") as server:
        page.open(server.url)
        page.until("document.activeElement.id === 'key'")
        assert page.do("document.getElementById('talk').hidden")
        page.write("wrong")
        page.key("Enter")
        page.until("document.getElementById('key').value === ''")
        page.until("document.activeElement.id === 'key'")
        page.write("sesame")
        page.key("Enter")
        page.until("!document.getElementById('talk').hidden")
        assert page.do("document.getElementById('weight').disabled")
        ask(page, "w1 w2")
        page.until(f"{DONE} === 1")
        (body,) = page.bodies(CHAT)
        assert "weights" not in body and texts(page) == [told(server, [user("w1 w2")], [0.3, 0.7])]
        assert "sesame" not in page.do("document.documentElement.outerHTML + location.href + document.cookie")
        assert page.do("localStorage.length + sessionStorage.length") == 0
        assert "$MOPL_API_KEY" in texts(page, ".code pre")[1]
    ask(page, "w1 w2")  # the server is gone
    page.until("document.querySelector('.answer.failed')")
    assert texts(page, "[role=alert]")[0].startswith("The connection to the server was lost")
