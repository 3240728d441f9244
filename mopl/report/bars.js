"use strict";
// A bar for each figure, from 0; return whether all have one scale. A row has `k`, the figure's number, `main`, its
// `title` and `detail`; `x`, which is `about` where it is interpolated, the `old` figure of the base model and an interval `pair`, any of them null; and the figures
// of its `peers`, every evaluated point.
function drawBars(box, rows) {
  const { make } = controls, { draw, number } = figures;
  const reach = rows.map(({ peers, old, pair }) => {
    const known = [...peers, ...(old == null ? [] : [old]), ...(pair ?? [])];
    return known.length ? [Math.min(0, ...known), Math.max(0, ...known)] : [0, 1];
  });
  const sizes = reach.map(([low, high]) => Math.max(high, -low)).filter((x) => x > 0);
  const common = !sizes.length || Math.max(...sizes) <= 20 * Math.min(...sizes);
  const all = [Math.min(...reach.map((r) => r[0])), Math.max(...reach.map((r) => r[1]))];
  box.replaceChildren(...rows.map(({ k, main, title, detail, x, about, old, pair, peers }, row) => {
    const [low, high] = common ? all : reach[row];
    const at = (v) => `${(100 * (v - low)) / (high - low || 1)}%`;
    const wide = (a, b) => `${(100 * Math.abs(b - a)) / (high - low || 1)}%`;
    const svg = draw("svg", { height: 22, "aria-hidden": "true" });
    draw("line", { x1: "0%", x2: "100%", y1: 11, y2: 11, stroke: "var(--line)" }, svg);
    if (peers.length) {
      const [a, b] = [Math.min(...peers), Math.max(...peers)];
      draw("rect", { x: at(a), width: wide(a, b), y: 1, height: 20, fill: "var(--band)" }, svg);
    }
    if (x != null) draw("rect", { x: at(Math.min(0, x)), width: wide(0, x), y: 6, height: 10, rx: 1, fill: "var(--bar)" }, svg);
    for (const y of peers) draw("line", { x1: at(y), x2: at(y), y1: 18, y2: 21, stroke: "var(--rug)" }, svg);
    if (pair) draw("line", { x1: at(pair[0]), x2: at(pair[1]), y1: 11, y2: 11, stroke: "var(--whisker)", "stroke-width": 2 }, svg);
    if (old != null) draw("line", { x1: at(old), x2: at(old), y1: -1, y2: 23, stroke: "var(--base)", "stroke-width": 3 }, svg);
    return make("div", { class: main ? "bar main" : "bar" },
      make("div", { class: "text" }, make("span", { class: "name" }, title),
        make("span", { class: "value", "data-axis": k }, make("b", {}, about && x != null ? `\u2248 ${number(x, 3)}` : number(x)), make("small", {}, detail))), svg);
  }));
  return common;
}
