"use strict";
// Parts of the page: the paper of its chart, the box of an answer, entries of the legend.

// Draw the lines and numbers of both axes; return the frame, and what turns a figure into a place.
function paperOf(svg, [across, up], width, height) {
  const { draw, ticks } = figures;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const marks = [ticks(across, Math.max(4, width / 95)), ticks(up, Math.max(4, height / 60))];
  // How wide numbers are depends on the reader's font: once written they get room, or not every one below stays.
  const [along, beside] = marks.map((axis) => axis.map(([v, text]) => [v, draw("text", { class: "tick" }, svg, text)]));
  const widest = (axis) => Math.max(0, ...axis.map(([, node]) => node.getComputedTextLength()));
  const half = widest(along) / 2 + 2;
  const left = Math.max(26 + widest(beside), half), right = width - Math.max(10, half), top = 8, bottom = height - 42;
  const px = (v) => left + ((v - across[0]) / (across[1] - across[0])) * (right - left);
  const py = (v) => bottom - ((v - up[0]) / (up[1] - up[0])) * (bottom - top);
  const every = Math.ceil(2 * half / (px(along[1]?.[0]) - px(along[0]?.[0])));
  const place = (node, at) => Object.entries(at).forEach(([name, x]) => node.setAttribute(name, x));
  along.forEach(([v, node], k) => {
    draw("line", { x1: px(v), x2: px(v), y1: top, y2: bottom, stroke: "var(--line)" }, svg);
    if (k % every) node.remove();
    place(node, { x: px(v), y: bottom + 15, "text-anchor": "middle" });
  });
  for (const [v, node] of beside) {
    draw("line", { x1: left, x2: right, y1: py(v), y2: py(v), stroke: "var(--line)" }, svg);
    place(node, { x: left - 6, y: py(v) + 4, "text-anchor": "end" });
  }
  return { left, right, top, bottom, px, py };
}

// An answer with its prompt and, folded unless `state.before`, what the base model answered.
function answerBox(sample, before, state) {
  const { make } = controls;
  const box = make("div", { class: "sample" });
  if (sample.prompt != null) box.append(make("span", { class: "prompt" }, sample.prompt));
  box.append(sample.text.trim() ? sample.text : make("span", { class: "prompt" }, "(empty)"));
  const old = sample.prompt == null ? null : before.find((other) => other.prompt === sample.prompt);
  if (old) {
    const fold = make("details", {}, make("summary", {}, "before training"), old.text.trim() ? old.text : "(empty)");
    fold.open = state.before;
    fold.addEventListener("toggle", () => { state.before = fold.open; });
    box.append(fold);
  }
  return box;
}

// A mark of the chart with its meaning.
function legendEntry(path, attributes, text, current) {
  const svg = figures.draw("svg", { width: 18, height: 16, viewBox: "-9 -8 18 16", "aria-hidden": "true" });
  figures.draw("path", { d: path, ...attributes }, svg);
  return controls.make("span", current ? { class: "current" } : {}, svg, text);
}

// The colours of a figure from its least to its largest value.
function colourBar(name, [low, high]) {
  const { draw, colour, number } = figures, { make } = controls;
  const svg = draw("svg", { width: 96, height: 12, "aria-hidden": "true" });
  for (let i = 0; i < 24; i++) draw("rect", { x: 4 * i, width: 4.5, height: 12, fill: colour(i, [0, 23]) }, svg);
  return make("span", {}, name, make("span", { class: "number" }, number(low)), svg, make("span", { class: "number" }, number(high)));
}
