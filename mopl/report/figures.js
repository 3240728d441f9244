"use strict";
// Numbers in words, scales, marks and the places of labels: what the parts of the page draw with, without the data.
const figures = (() => {
  const SVG = document.getElementById("chart").namespaceURI;
  const VIRIDIS = ["#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#e0e32f"];
  const MARKERS = [
    "M-1,0A1,1 0 1 0 1,0A1,1 0 1 0 -1,0Z", "M-.9,-.9H.9V.9H-.9Z", "M0,-1.1L1.05,.8H-1.05Z", "M0,-1.25L1.1,0L0,1.25L-1.1,0Z",
    "M0,1.1L1.05,-.8H-1.05Z", "M-.4,-1.1H.4V-.4H1.1V.4H.4V1.1H-.4V.4H-1.1V-.4H-.4Z",
  ];
  const STAR = "M0,-1.6L.42,-.5L1.55,-.45L.66,.25L.98,1.35L0,.7L-.98,1.35L-.66,.25L-1.55,-.45L-.42,-.5Z";

  function draw(tag, attributes, parent, text) {
    const node = document.createElementNS(SVG, tag);
    for (const [key, item] of Object.entries(attributes)) node.setAttribute(key, item);
    if (text !== undefined) node.textContent = text;
    parent?.append(node);
    return node;
  }
  function number(x, digits = 4) {
    if (x == null) return "n/a";
    const size = Math.abs(x);
    return size !== 0 && (size < 1e-3 || size >= 1e5) ? x.toExponential(2).replace("e+", "e") : x.toFixed(digits);
  }
  function change(now, before) {
    const x = now - before, size = Math.max(Math.abs(now), Math.abs(before));
    const text = size >= 1e-3 && size < 1e5 ? Math.abs(x).toFixed(4) : number(Math.abs(x));
    return (x > 0 ? "+" : x < 0 ? "\u2212" : "\u00b1") + text;
  }
  function colour(x, [low, high]) {
    if (x == null) return "none";
    const place = (high > low ? (x - low) / (high - low) : 0.5) * (VIRIDIS.length - 1);
    const left = Math.max(0, Math.min(VIRIDIS.length - 2, Math.floor(place)));
    const channel = (hex, i) => parseInt(hex.slice(1 + 2 * i, 3 + 2 * i), 16);
    const mix = [0, 1, 2].map((i) => {
      const a = channel(VIRIDIS[left], i);
      return Math.round(a + (channel(VIRIDIS[left + 1], i) - a) * Math.max(0, Math.min(1, place - left)));
    });
    return `rgb(${mix.join(",")})`;
  }
  function range(values, share = 0.06) {
    const known = values.filter((x) => x != null);
    if (!known.length) return [0, 1];
    const low = Math.min(...known), high = Math.max(...known), size = Math.max(Math.abs(low), Math.abs(high));
    const pad = high - low > 1e-9 * size ? share * (high - low) : 0.05 * size || 0.01;
    return [low - pad, high + pad];
  }
  // Both ends of an axis with as many digits as tell them apart, and one more.
  function endsInWords([low, high]) {
    const size = Math.max(Math.abs(low), Math.abs(high)), digits = (unit) => Math.min(15, Math.max(0, 1 - Math.floor(Math.log10((high - low) / unit))));
    if (size >= 1e5 || size < 1e-3) return [low, high].map((x) => x === 0 ? "0" : x.toExponential(digits(size)).replace("e+", "e"));
    return [low, high].map((x) => String(+x.toFixed(digits(1))));
  }
  function ticks([low, high], count) {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((k) => k * power).find((k) => k >= rough) ?? 10 * power;
    const marks = [];
    for (let k = Math.ceil(low / step); k * step <= high; k++) marks.push(k * step);
    const size = Math.max(-low, high), large = size >= 1e5 || size < 1e-3;
    const write = (x) => large ? x.toExponential(digits).replace("e+", "e") : x.toFixed(digits);
    let digits = +large;
    while (digits < 15 && marks.some((x) => Math.abs(write(x) - x) > step / 1e3)) digits++; // 102,500 is not 1.03e5
    return marks.map((x) => [x, Math.abs(x) > step / 1e6 ? write(x) : large ? "0" : write(0)]);
  }

  const clash = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
  // Write a text beside (x, y), where it covers none of `taken`, boxes [left, top, right, bottom], and stays inside
  // `frame`; with a line to the place where it had to go far. Its own box joins `taken`.
  function label(svg, text, x, y, taken, frame, gap = 12) {
    const node = draw("text", { class: "halo", "pointer-events": "none" }, svg, text);
    const width = node.getComputedTextLength(), height = 13;
    let best = null;
    for (const far of [gap, 1.6 * gap, 2.5 * gap, 4 * gap, 6 * gap, 9 * gap]) {
      for (let turn = 0; turn < 16; turn++) {
        const angle = (-1 + 2 * turn) * Math.PI / 16, dx = Math.cos(angle), dy = -Math.sin(angle);
        const left = x + far * dx - (dx < -0.3 ? width : dx > 0.3 ? 0 : width / 2);
        const top = y + far * dy - (dy < -0.3 ? height : dy > 0.3 ? 0 : height / 2);
        const box = [left - 1, top - 1, left + width + 1, top + height + 1];
        const outside = box[0] < frame[0] || box[1] < frame[1] || box[2] > frame[2] || box[3] > frame[3];
        const hits = taken.reduce((sum, other) => sum + clash(box, other), 0) + 1000 * outside;
        if (!best || hits < best.hits) best = { hits, box, left, top, far, dx, dy };
      }
      if (best.hits === 0) break;
    }
    if (best.hits) return node.remove(); // no place is free; the text stands elsewhere on the page
    node.setAttribute("x", best.left);
    node.setAttribute("y", best.top + height - 3);
    if (best.far > 2 * gap) {
      draw("line", { x1: x + gap * best.dx, y1: y + gap * best.dy, x2: x + (best.far - 2) * best.dx, y2: y + (best.far - 2) * best.dy,
        stroke: "var(--soft)", "pointer-events": "none" }, svg);
    }
    taken.push(best.box);
    return node;
  }

  // Points around weights w, as [index, share] with shares that sum to 1, where the points are a lattice (multiples of
  // 1/p), or one and equal weights besides; null elsewhere. A lattice that is all edge gets the centre as a corner of
  // every simplex: w is then a mixture of equal weights and a place on a face.
  function around(w, points) {
    const m = w.length, even = points.findIndex((point) => point.every((x) => Math.abs(x - 1 / m) < 1e-9));
    const smallest = Math.min(...points.flatMap((point, i) => (i === even ? [] : point.filter((x) => x > 1e-9))));
    const p = Math.round(1 / smallest);
    if (even < 0 || p >= m) return corners(w, points, p);
    const share = m * Math.min(...w);
    if (share > 1 - 1e-9) return [[even, 1]];
    const face = corners(w.map((x) => Math.max(0, x - share / m) / (1 - share)), points, p)?.map(([i, part]) => [i, part * (1 - share)]);
    return face && share > 1e-9 ? [...face, [even, share]] : face;
  }
  // The corners of the simplex of Kuhn's triangulation that w lies in, in sums of the first weights, as `around`.
  function corners(w, points, p) {
    const m = w.length, key = (counts) => counts.join();
    const places = new Map();
    for (const [i, point] of points.entries()) {
      const counts = point.map((x) => x * p);
      if (counts.every((x) => Math.abs(x - Math.round(x)) < 1e-6)) places.set(key(counts.map(Math.round)), i);
    }
    const sums = [];
    w.slice(0, -1).reduce((sum, x) => { sums.push((sum + x) * p); return sum + x; }, 0);
    const floor = sums.map((x) => Math.floor(x + 1e-9)), rest = sums.map((x, j) => Math.max(0, x - floor[j]));
    const order = [...rest.keys()].sort((a, b) => rest[b] - rest[a] || b - a);
    const found = [];
    const corner = floor.slice();
    for (let k = 0; k <= order.length; k++) {
      const share = (k === 0 ? 1 : rest[order[k - 1]]) - (k === order.length ? 0 : rest[order[k]]);
      if (k > 0) corner[order[k - 1]] += 1;
      if (share < 1e-9) continue;
      const counts = Array.from({ length: m }, (_, j) => (j === m - 1 ? p : corner[j]) - (j === 0 ? 0 : corner[j - 1]));
      const index = places.get(key(counts));
      if (index === undefined) return null;
      found.push([index, share]);
    }
    return found;
  }
  return { MARKERS, STAR, SVG, draw, number, change, colour, range, ticks, endsInWords, label, around };
})();
