"use strict";
// A client of the server that this page comes from. What it sends is what it shows, and the weights beside an answer are
// those that the server says it answered at. Nothing is sent before a person asks for it, whatever the address says.
(() => {
  const { make, slider, picker, weight, weightsText, scaleText, linked, readWeights } = controls;
  const byId = (id) => document.getElementById(id);
  const MOST_COMPARED = 6; // a browser opens six connections to a server: more answers would not run at the same time
  const FARTHEST = 2; // of the slider for the scale, in powers of two
  const STATUS = {
    0: "The connection to the server was lost, or it was stopped.",
    413: "The conversation is too long for this server.",
    429: "The server is busy; try again in a moment.",
    500: "The model failed.",
    503: "The server is being stopped, or takes no more connections.",
    504: "The answer took too long.",
  };
  const STATUS_OF_CODE = { timeout: 504, stopping: 503, queue_full: 429, model_failed: 500 }; // within a stream
  const state = { models: [], model: 0, w: [], scale: 1, beta: null, compared: [], turns: [], running: new Set(), key: "" };
  const model = () => state.models[state.model];
  const about = () => model().mopl;
  const names = () => about().objectives;
  const m = () => names().length;

  // --- the trade-off: weights have four decimals and sum to 1, so that those shown, sent and in a name are the same
  function rounded(w) {
    const cut = w.map((x) => Math.round(x * 1e4));
    cut[cut.indexOf(Math.max(...cut))] += 1e4 - cut.reduce((a, b) => a + b);
    return cut.map((x) => x / 1e4);
  }
  const equal = () => rounded(Array(m()).fill(1 / m()));
  const end = (j) => Array.from({ length: m() }, (_, k) => +(k === j));
  const same = (a, b) => a.every((x, j) => Math.abs(x - b[j]) < 5e-5);
  function endsAndMiddle() {
    if (about().fixed) return [state.w];
    if (m() === 2) return [end(1), equal(), end(0)]; // from left to right as on the slider
    const ends = Array.from({ length: Math.min(m(), MOST_COMPARED - 1) }, (_, j) => end(j));
    return m() === 1 ? ends : [equal(), ...ends];
  }
  const chosen = (w = state.w) => ({ w, scale: state.scale, beta: state.beta });
  const more = (at) => [...(at.scale === 1 ? [] : [scaleText(at.scale, about().guided)]), ...(at.beta ? [`\u03b2 ${at.beta.map(weight).join(" : ")}`] : [])].join(", ");
  const text = (at) => [weightsText(names(), at.w), more(at)].filter(Boolean).join(", ");
  const placeOf = ({ weights, scale, beta }) => ( // what the server says of an answer
    { w: names().map((name) => weights[name]), scale, beta: beta ? names().map((name) => beta[name]) : null });
  function setWeights(w) { state.w = rounded(w); show(); }

  // --- the address: #w=0.3,0.7&scale=2
  function readAddress() {
    const asked = new URLSearchParams(location.hash.slice(1));
    const w = readWeights(asked.get("w"), m()), scale = Number(asked.get("scale"));
    if (w && !about().fixed) state.w = rounded(w);
    if (about().scale && scale >= 2 ** -FARTHEST && scale <= 2 ** FARTHEST) state.scale = scale;
  }
  const address = () => `#w=${state.w.join(",")}${state.scale === 1 ? "" : `&scale=${state.scale}`}`;

  // --- requests
  class Failure extends Error {
    constructor(status, said = "") {
      const why = STATUS[status] ?? "";
      super([why, said && said[0].toUpperCase() + said.slice(1) + (/[.!?]$/.test(said) ? "" : ".")].filter(Boolean).join(" "));
      this.status = status;
    }
  }
  const path = () => (about().chat_template ? "/v1/chat/completions" : "/v1/completions");
  function bodyOf(messages, at) {
    const body = { model: model().id };
    if (about().chat_template) body.messages = messages;
    else body.prompt = messages.at(-1).content;
    if (!about().fixed) body.weights = at.w;
    if (at.scale !== 1) body.scale = at.scale;
    if (at.beta) body.beta = at.beta;
    body.temperature = Number(byId("temperature").value);
    if (byId("most").value) body.max_tokens = Number(byId("most").value);
    return body;
  }
  async function ask(path, body, signal) {
    const headers = body ? { "content-type": "application/json" } : {};
    if (state.key) headers.authorization = `Bearer ${state.key}`;
    const options = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store" };
    const response = await fetch(path, options);
    if (response.ok) return response;
    let said = "";
    try { said = String((await response.json()).error.message); } catch { /* no words of the server's own */ }
    if (response.status === 401) said = state.key ? "The server does not take this key" : "The server asks for a key";
    throw new Failure(response.status, said || `The server answered ${response.status} ${response.statusText}`);
  }
  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ;) {
      const { done, value } = await reader.read();
      if (done) throw new Failure(0); // a whole stream ends with a word, at which nobody reads on
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
    }
  }
  async function answer(turn, one) {
    one.abort = new AbortController();
    Object.assign(one, { state: "running", text: "", error: "", finish: "", tokens: null });
    state.running.add(one);
    draw(turn);
    const written = one.box.querySelector(".text").appendChild(document.createTextNode(""));
    try {
      const body = { ...one.body, stream: true, stream_options: { include_usage: true } };
      for await (const data of events(await ask(path(), body, one.abort.signal))) {
        if (data === "[DONE]") break;
        const event = JSON.parse(data);
        if (event.error) throw new Failure(STATUS_OF_CODE[event.error.code] ?? 500, String(event.error.message));
        if (event.mopl) one.at = placeOf(event.mopl);
        if (event.usage) one.tokens = event.usage.completion_tokens;
        for (const choice of event.choices) {
          const piece = choice.delta ? choice.delta.content ?? "" : choice.text;
          one.text += piece;
          one.finish = choice.finish_reason ?? one.finish;
          following(() => written.appendData(piece));
        }
      }
      one.state = "done";
    } catch (error) {
      one.state = one.abort.signal.aborted ? "stopped" : "failed";
      const failure = error instanceof Failure ? error : new Failure(0);
      Object.assign(one, { error: failure.message, wrong: [400, 404, 413, 415].includes(failure.status) });
      if (one.state === "failed" && failure.status === 401) askForKey(failure.message);
    }
    state.running.delete(one);
    following(() => {
      if (state.turns.includes(turn)) draw(turn);
      show();
    });
  }

  // Who looks at the end of the conversation goes on seeing it, and who has scrolled away stays where he is.
  function following(change, always = false) {
    const log = byId("log"), own = getComputedStyle(log).overflowY === "auto", box = own ? log : document.scrollingElement;
    const below = always || box.scrollHeight - box.scrollTop - box.clientHeight < 80;
    change();
    if (below) box.scrollTop = box.scrollHeight;
  }

  // --- the conversation: turns, each with answers at one or several trade-offs, one of which it goes on from
  const usable = (one) => one.text.trim() && one.state !== "running";
  const kept = (turn) => (usable(turn.answers[turn.chosen]) ? turn.answers[turn.chosen] : turn.answers.find(usable));
  function messagesBefore(turn) {
    const system = byId("system").value.trim(), place = state.turns.indexOf(turn);
    const before = place < 0 ? state.turns : state.turns.slice(0, place);
    return [
      ...(system ? [{ role: "system", content: system }] : []),
      ...before.filter(kept).flatMap((t) => [{ role: "user", content: t.asked }, { role: "assistant", content: kept(t).text }]),
    ];
  }
  const answersAt = (turn, places) => places.map((at) => (
    { at, body: bodyOf([...messagesBefore(turn), { role: "user", content: turn.asked }], at), text: "", state: "running" }));
  function send(places) {
    const asked = byId("message").value;
    if (!asked.trim() || state.running.size) return;
    const last = state.turns.at(-1), turn = { asked, answers: [], chosen: 0 };
    turn.answers = answersAt(turn, places);
    const far = places.map((at) => at.w.reduce((sum, x, j) => sum + (x - state.w[j]) ** 2, 0));
    turn.chosen = far.indexOf(Math.min(...far));
    state.turns.push(turn);
    turn.box = byId("log").appendChild(make("div", { class: "turn" }));
    byId("message").value = "";
    following(() => {
      if (last) draw(last);
      turn.answers.forEach((one) => answer(turn, one));
      byId("message").focus({ preventScroll: true });
      show();
    }, true);
  }
  function addTo(turn) {
    if (state.running.size) return;
    const [one] = answersAt(turn, [chosen()]);
    turn.chosen = turn.answers.push(one) - 1;
    following(() => {
      answer(turn, one);
      show();
    }, true);
  }
  function stop() { state.running.forEach((one) => one.abort.abort()); }
  function clear() {
    stop();
    state.turns = [];
    byId("log").replaceChildren();
    byId("message").focus();
    show();
  }
  function said(one) {
    if (one.state === "failed") return one.error + (one.text.trim() ? " What had come of the answer is kept." : "");
    if (one.state === "stopped") return "Stopped; what had come is kept.";
    if (one.state === "running") return "";
    const count = one.tokens == null ? "" : `${one.tokens} ${one.tokens === 1 ? "token" : "tokens"}`;
    return [one.text.trim() ? "" : "The answer is empty.", count, one.finish === "length" ? "cut off at the limit" : ""].filter(Boolean).join(", ");
  }
  function draw(turn) {
    const last = turn === state.turns.at(-1), idle = !state.running.size, button = (label, onclick, more = {}) => make("button", { type: "button", onclick, ...more }, label);
    const boxes = turn.answers.map((one, i) => {
      const isKept = kept(turn) === one, several = turn.answers.length > 1;
      const mix = make("div", { class: "mix", "aria-hidden": "true" }, ...one.at.w.map(() => make("span")));
      one.at.w.forEach((w, j) => { mix.children[j].style.flexGrow = w; });
      const row = make("div", { class: "row" });
      if (one.state === "failed" && last && !one.wrong) row.append(button("Try again", () => { if (!state.running.size) answer(turn, one); }));
      if (several && last && usable(one)) {
        row.append(button("Continue from this one", () => { turn.chosen = i; draw(turn); show(); }, { "aria-pressed": isKept }));
      }
      if (one.state !== "running" && !about().fixed) {
        row.append(button("Move the sliders here", () => { state.scale = about().scale ? one.at.scale : 1; setWeights(one.at.w); }));
      }
      const words = make("div", { class: "text", dir: "auto" });
      const note = make("p", one.state === "failed" ? { class: "said failed", role: "alert" } : { class: "said" }, said(one));
      const at = make("p", { class: "at" }, ...names().flatMap((name, j) => [make("span", {}, `${name} ${weight(one.at.w[j])}`), " "]), make("small", {}, more(one.at)));
      if (one.state === "running" && one.box?.classList.contains("running")) return one.box; // it is being written
      words.textContent = one.text;
      one.box = make("article", { class: `bubble answer ${one.state}${isKept && several ? " chosen" : ""}`, "aria-label": `Answer at ${text(one.at)}`, "aria-busy": one.state === "running" }, at, mix, words, note);
      if (row.children.length) one.box.append(row);
      return one.box;
    });
    const focused = document.activeElement?.closest?.(".turn") === turn.box ? document.activeElement.textContent : null;
    turn.box.replaceChildren(make("div", { class: "bubble asked text", dir: "auto" }, turn.asked), make("div", { class: "answers" }, ...boxes));
    if (last && idle && !about().fixed) turn.box.append(button("Answer again at the sliders' weights", () => addTo(turn), { class: "again" }));
    if (idle && !kept(turn)) turn.box.append(make("p", { class: "key" }, "Without an answer this message is no part of the conversation."));
    if (focused) [...turn.box.querySelectorAll("button")].find((each) => each.textContent === focused)?.focus();
  }

  // --- the controls
  let update = [];
  function build() {
    const form = byId("controls");
    form.replaceChildren();
    update = [];
    if (state.models.length > 1) {
      form.append(make("div", { class: "row" }, picker("model", "Model", state.models.map((each) => each.id), state.model, (i) => { clear(); choose(i); })));
    }
    if (m() === 2) {
      const [input, output] = slider(form, "weight", `Weight of ${names()[0]}`, { min: 0, max: 1, step: 0.01 },
        (w) => setWeights([w, 1 - w]), `only ${names()[1]}`, `only ${names()[0]}`);
      update.push(() => {
        input.value = state.w[0];
        output.textContent = state.w.map(weight).join(" : ");
        input.setAttribute("aria-valuetext", weightsText(names(), state.w));
      });
    } else if (m() > 2) {
      names().forEach((name, j) => {
        const [input, output] = slider(form, `weight-${j}`, `Weight of ${name}`, { min: 0, max: 1, step: 0.01 }, (w) => setWeights(linked(state.w, j, w)));
        update.push(() => {
          if (document.activeElement !== input || Math.abs(input.value - state.w[j]) > 0.006) input.value = state.w[j];
          output.textContent = weight(state.w[j]);
          input.setAttribute("aria-valuetext", output.textContent);
        });
      });
      const preset = (label, w) => make("button", { type: "button", title: label, onclick: () => setWeights(w) }, label);
      form.append(make("div", { class: "row" }, preset("equal", equal()), ...names().map((name, j) => preset(`only ${name}`, end(j)))));
    }
    if (about().fixed) {
      form.querySelectorAll("input[type=range], button").forEach((each) => { each.disabled = true; });
      form.append(make("p", { class: "key" }, "This model was loaded at one trade-off and answers at no other."));
    }
    if (about().scale) {
      const from = about().guided ? "the large model" : "the base";
      const [input, output] = slider(form, "scale", "Scale", { min: -FARTHEST, max: FARTHEST, step: 0.25 },
        (power) => { state.scale = +(2 ** -power).toPrecision(3); show(); }, `closer to ${from}`, "further away");
      update.push(() => {
        input.value = -Math.log2(state.scale);
        output.textContent = scaleText(state.scale, about().guided);
        input.setAttribute("aria-valuetext", output.textContent);
      });
    }
    if (about().takes_beta) {
      const inputs = names().map((_, j) => make("input", { type: "number", id: `beta-${j}`, min: 0, step: "any", value: state.beta?.[j] ?? "", oninput: () => {
        const beta = inputs.map((each) => Number(each.value));
        if (beta.every((b) => b > 0)) state.beta = beta; // or it is still being typed
        show();
      } }));
      form.append(make("div", { class: "fields" }, ...names().flatMap((name, j) => [make("label", { for: `beta-${j}` }, `\u03b2 of ${name}`), inputs[j]])));
    }
  }
  function show() {
    byId("status").replaceChildren(`Answers come at ${text(chosen())} (`, make("a", { href: address() }, "link to it"), ").");
    update.forEach((refresh) => refresh());
    const busy = state.running.size > 0;
    byId("send").disabled = byId("compare").disabled = busy;
    byId("stop").disabled = !busy;
    byId("clear").disabled = !state.turns.length;
    byId("log").setAttribute("aria-busy", busy);
    byId("empty").hidden = state.turns.length > 0;
    byId("compare").textContent = `Compare ${state.compared.length}`;
    byId("compare").hidden = about().fixed;
    byId("compare").disabled ||= !state.compared.length;
    byId("add").disabled = state.compared.length >= MOST_COMPARED || state.compared.some((w) => same(w, state.w));
    byId("compared").replaceChildren(...state.compared.map((w) => make("li", {}, weightsText(names(), w),
      make("button", { type: "button", "aria-label": `Leave out ${weightsText(names(), w)}`, onclick: () => { state.compared = state.compared.filter((each) => each !== w); show(); } }, "Leave out"))));
    snippets();
    if (location.hash !== address() && (location.hash || state.touched)) history.replaceState(null, "", address());
    state.touched = true;
  }
  function snippets() {
    const at = chosen(), body = bodyOf([...messagesBefore(), { role: "user", content: byId("message").value.trim() ? byId("message").value : "Hello" }], at);
    const name = about().fixed ? model().id : `${model().id}@${at.w.join(",")}`;
    const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
    byId("name").textContent = name;
    byId("curl").textContent = [`curl ${location.origin}${path()}`, "-H 'Content-Type: application/json'",
      ...(state.key ? ['-H "Authorization: Bearer $MOPL_API_KEY"'] : []), `-d ${quoted(JSON.stringify(body))}`].join(" \\\n  ");
    const extra = Object.fromEntries(["scale", "beta"].filter((key) => key in body).map((key) => [key, body[key]]));
    const literal = (value) => JSON.stringify(value).replaceAll("\u2028", "\\u2028").replaceAll("\u2029", "\\u2029"); // JSON is Python here
    const call = about().chat_template ? "chat.completions" : "completions";
    byId("python").textContent = [
      ...(state.key ? ["import os", ""] : []), "from openai import OpenAI", "",
      `client = OpenAI(base_url=${literal(`${location.origin}/v1`)}, api_key=${state.key ? 'os.environ["MOPL_API_KEY"]' : '"none"'})`,
      `answer = client.${call}.create(`, `    model=${literal(name)},`,
      ...["messages", "prompt", "temperature", "max_tokens"].filter((key) => key in body).map((key) => `    ${key}=${literal(body[key])},`),
      ...(Object.keys(extra).length ? [`    extra_body=${literal(extra)},`] : []), ")",
      `print(answer.choices[0].${about().chat_template ? "message.content" : "text"})`,
    ].join("\n");
  }

  // --- the beginning
  function askForKey(why) {
    byId("loading").hidden = byId("key-form").hidden = false;
    byId("loading-text").textContent = why;
    byId("key").focus();
  }
  function choose(i) {
    state.model = i;
    const plain = !about().chat_template;
    Object.assign(state, { w: rounded(about().weights), scale: 1, beta: about().beta });
    readAddress();
    state.compared = endsAndMiddle().map(rounded);
    document.title = byId("title").textContent = `Talk to ${model().id}`;
    byId("subtitle").textContent = `${m() === 1 ? "Objective" : "Objectives"}: ${names().join(", ")}.${about().guided ? " A large model answers, guided by this one." : ""}`;
    byId("most").max = about().max_tokens;
    byId("most").placeholder = `up to ${about().max_tokens}`;
    byId("most").value = plain ? Math.min(64, about().max_tokens) : ""; // without it a completion has 16
    byId("system").hidden = byId("system").labels[0].hidden = plain;
    byId("message-label").textContent = plain ? "Text to continue" : "Message";
    byId("empty").textContent = plain ? "The model has no chat template: it continues each text on its own, and does not see those before."
      : "Ask something, move the slider, and ask again; Compare asks at several trade-offs at once.";
    build();
    show();
  }
  async function load() {
    byId("load").hidden = true;
    try {
      state.models = (await (await ask("/v1/models")).json()).data;
    } catch (error) {
      const failure = error instanceof Failure ? error : new Failure(0);
      byId("loading").hidden = false;
      byId("load").hidden = failure.status === 401;
      byId("loading-text").textContent = failure.message;
      if (failure.status === 401) askForKey(failure.message);
      return;
    }
    byId("loading").hidden = byId("key-form").hidden = true;
    if (byId("talk").hidden) {
      byId("talk").hidden = false;
      choose(0);
      byId("message").focus({ preventScroll: true });
    } else show();
  }
  const on = (id, event, act) => byId(id).addEventListener(event, act);
  on("key-form", "submit", (event) => {
    event.preventDefault();
    const key = byId("key").value.trim();
    if (!/^[!-~]+$/.test(key)) return askForKey("A key is made of visible ASCII characters.");
    state.key = key;
    byId("key").value = "";
    load();
  });
  on("load", "click", load);
  ["controls", "sampling"].forEach((id) => on(id, "submit", (event) => event.preventDefault()));
  on("compose", "submit", (event) => { event.preventDefault(); send([chosen()]); });
  const compare = () => { if (!about().fixed && state.compared.length) send(state.compared.map(chosen)); };
  on("compare", "click", compare);
  on("stop", "click", stop);
  on("clear", "click", clear);
  on("add", "click", () => { state.compared.push(state.w); show(); });
  on("reset", "click", () => { state.compared = endsAndMiddle().map(rounded); show(); });
  on("message", "keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (event.ctrlKey || event.metaKey) compare();
    else send([chosen()]);
  });
  addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
  ["message", "temperature", "most", "system"].forEach((id) => on(id, "input", snippets));
  document.querySelectorAll("[data-copies]").forEach((button) => button.addEventListener("click", async () => {
    const node = byId(button.dataset.copies);
    try {
      await navigator.clipboard.writeText(node.textContent);
      button.textContent = "Copied";
    } catch { // no leave to write, or no secure context: the text is selected for the person to copy
      getSelection().selectAllChildren(node);
      button.textContent = "Press Ctrl+C";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }));
  addEventListener("hashchange", () => { if (state.models.length) { readAddress(); show(); } });
  load();
})();
