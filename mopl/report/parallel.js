"use strict";
// A line for each point across an axis for each figure: how all of them go together, which pairs cannot show.
// `view` has `axes` ({ name, rising }), `lines` ({ values, main, index, title, choose }), and the values of the `base`
// model, or null, and of the `chosen` trade-off. The better end of each axis is on top.
function parallelCoordinates(svg, { axes, lines, base, chosen }) {
  const { draw, colour, range, endsInWords } = figures;
  const width = Math.max(280, Math.round(svg.parentNode.clientWidth)), height = 250, top = 34, bottom = height - 26;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  const spans = axes.map((_, row) => range([...lines.map((line) => line.values[row]), base?.[row]], 0));
  const px = (row) => 44 + (row * (width - 88)) / (axes.length - 1);
  const py = (row, v) => {
    const share = (v - spans[row][0]) / (spans[row][1] - spans[row][0]);
    return axes[row].rising ? bottom - share * (bottom - top) : top + share * (bottom - top);
  };
  // A figure that is missing breaks the line; one between two missing ones is a dot.
  const path = (values) => values.map((v, row) => (v == null ? "" : `${values[row - 1] == null ? "M" : "L"}${px(row)},${py(row, v)}h0`)).join("");
  const mains = lines.map((line) => line.main).filter((v) => v != null);
  const shades = mains.length ? [Math.min(...mains), Math.max(...mains)] : [0, 1];
  const along = (values, attributes) => draw("path", { d: path(values), fill: "none", "stroke-linecap": "round", ...attributes }, svg);
  for (const line of lines) {
    const shade = line.main == null ? "var(--other)" : colour(line.main, shades);
    along(line.values, { stroke: shade, "stroke-width": 1.2, opacity: 0.75 });
  }
  for (const line of lines) {
    const hit = along(line.values, { stroke: "transparent", "stroke-width": 12, "pointer-events": "stroke", class: "line", "data-line": line.index });
    draw("title", {}, hit, line.title);
    hit.addEventListener("click", line.choose);
  }
  if (base) along(base, { stroke: "var(--base)", "stroke-width": 2, "stroke-dasharray": "6 4", "pointer-events": "none" });
  along(chosen, { stroke: "var(--ring)", "stroke-width": 3, "pointer-events": "none" });
  const most = Math.max(5, Math.floor((width - 88) / (axes.length - 1) / 7) - 2);
  axes.forEach(({ name, rising }, row) => {
    const last = row === axes.length - 1, end = row === 0 ? "start" : last ? "end" : "middle", x = row === 0 ? 4 : last ? width - 4 : px(row);
    draw("line", { x1: px(row), x2: px(row), y1: top, y2: bottom, stroke: "var(--soft)" }, svg);
    draw("text", { x, y: 13, "text-anchor": end }, svg, `${name.length > most ? `${name.slice(0, most - 1)}\u2026` : name} ${rising ? "\u2191" : "\u2193"}`);
    const [low, high] = rising ? endsInWords(spans[row]) : endsInWords(spans[row]).reverse();
    draw("text", { x, y: top - 6, "text-anchor": end, class: "tick" }, svg, high);
    draw("text", { x, y: bottom + 15, "text-anchor": end, class: "tick" }, svg, low);
  });
  svg.setAttribute("aria-label", `Every evaluated point as a line across ${axes.map(({ name }) => name).join(", ")}; the better end of each axis is on top.`);
}
