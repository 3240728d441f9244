"use strict";
// What the pages with sliders have in common: elements, sliders, weights on the simplex. Texts become text, never HTML.
const controls = (() => {
  function make(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [key, item] of Object.entries(attributes)) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), item);
      else node.setAttribute(key, item);
    }
    node.append(...children);
    return node;
  }
  function slider(parent, id, label, attributes, onInput, low, high) {
    const input = make("input", { type: "range", id, ...attributes, oninput: () => onInput(Number(input.value)) });
    const output = make("output", { for: id });
    const box = make("div", { class: "control" }, make("label", { for: id }, label), output, input);
    if (low) box.append(make("div", { class: "ends", "aria-hidden": "true" }, make("span", {}, low), make("span", {}, high)));
    parent.append(box);
    return [input, output];
  }
  function picker(id, label, options, current, onPick) {
    const select = make("select", { id, onchange: () => onPick(Number(select.value)) });
    options.forEach((text, i) => select.append(make("option", { value: i, ...(i === current ? { selected: "" } : {}) }, text)));
    return make("label", { for: id }, label, select);
  }

  const weight = (w) => (w == null ? "n/a" : String(+w.toFixed(3)));
  const weightsText = (names, w) => names.map((name, j) => `${name} ${weight(w[j])}`).join(", ");
  // What a scale other than 1 does: c multiplies the distance from the base model, or from one that is guided, by 1 / c.
  const scaleText = (scale, guided = false) => {
    const at = guided ? ["guided in full", "closer to the large model", "guided beyond what was trained"]
      : ["as trained", "closer to the base", "beyond the trained model"];
    return `scale ${weight(scale)}, ${scale === 1 ? at[0] : scale > 1 ? at[1] : at[2]}`;
  };
  // The weights once one of them is moved to a target: the others share what is left as they shared it before.
  function linked(weights, j, target) {
    const rest = weights.reduce((sum, w, k) => (k === j ? sum : sum + w), 0);
    return weights.map((w, k) => (k === j ? target : rest > 1e-9 ? (w * (1 - target)) / rest : (1 - target) / (weights.length - 1)));
  }
  // "0.3,0.7" as weights that sum to 1, or null if these are not m of them.
  function readWeights(text, m) {
    const list = text?.split(",").map(Number) ?? [];
    if (list.length !== m || !list.every((w) => w >= 0 && w < Infinity) || !list.some((w) => w > 0)) return null;
    const sum = list.reduce((a, b) => a + b);
    return list.map((w) => w / sum);
  }
  return { make, slider, picker, weight, weightsText, scaleText, linked, readWeights };
})();
