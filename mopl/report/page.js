"use strict";
// The sliders choose among the evaluated points of the embedded front.json. Of a method that answers at any weights,
// figures between these points are interpolated, and said to be so; answers never are.
(() => {
  const { make, picker, weight, linked, readWeights } = controls;
  const data = JSON.parse(document.getElementById("mopl-data").textContent);
  const byId = (id) => document.getElementById(id);
  const { MARKERS, STAR, draw, number, change, colour, range, label } = figures;

  const known = new Map(data.bases.map((b) => [JSON.stringify(b), b])); // one object for each base model
  data.fronts.forEach((f, i) => { f.base = known.get(JSON.stringify(data.bases[i])); f.isBase = data.is_base[i]; });
  for (const f of data.fronts) for (const p of f.points) if (!p.weights?.length) p.weights = null;
  const fronts = data.fronts.filter((f) => !f.isBase);
  if (!fronts.length) fronts.push(...data.fronts);
  const names = fronts[0].objectives;
  const m = names.length;
  const main = fronts[0].main;
  const methods = [...new Set(fronts.map((f) => f.method))];
  const bases = [...new Set(fronts.map((f) => f.base))].filter((b) => b);
  const titles = fronts.map((f, i) => {
    const twins = fronts.filter((g) => g.method === f.method);
    return twins.length > 1 ? `${f.method} (seed ${f.seed ?? twins.indexOf(f) + 1})` : f.method;
  });
  const scaleOf = (point) => point.scale ?? 1;
  const axisName = (k) => (k === m ? main : names[k]);
  const role = data.metric.higher_is_better ? "main" : "cost";
  const rising = fronts[0].maximise ?? true; // one flag, or one for each objective
  const arrow = (k) => ((k === m ? data.metric.higher_is_better : Array.isArray(rising) ? rising[k] : rising) ? "\u2191" : "\u2193");
  const value = (point, k) => (k === m ? point.main : point.auxiliary[k]) ?? null;
  const accuracy = (point, k) => data.accuracy?.[front().method]?.[front().points.indexOf(point)]?.[k] ?? null;
  const ends = (point, k) => {
    const all = point.interval;
    const pair = all ? (k === m ? all.main : all.auxiliary?.[k]) : null;
    return pair && pair[0] != null && pair[1] != null ? pair : null;
  };
  const state = { front: 0, point: 0, wanted: null, x: 0, y: m > 1 ? 1 : m, others: true, before: false, notice: "" };

  // --- helpers
  const weightsText = (w) => controls.weightsText(names, w);
  const slider = (...of) => controls.slider(byId("controls"), ...of);
  // --- the choice
  const front = () => fronts[state.front];
  const chosen = () => front().points[state.point];
  const scales = () => [...new Set(front().points.map(scaleOf))].sort((a, b) => b - a);
  const atScale = (f, scale) => f.points.map((point, i) => [point, i]).filter(([point]) => scaleOf(point) === scale);
  function nearest(wanted, scale) {
    let best = 0, least = Infinity;
    for (const [point, i] of atScale(front(), scale)) {
      const far = wanted && point.weights ? point.weights.reduce((sum, w, j) => sum + (w - wanted[j]) ** 2, 0) : 0;
      if (far < least - 1e-12) [best, least] = [i, far];
    }
    return best;
  }
  function closestScale(scale) {
    return scales().reduce((a, b) => (Math.abs(Math.log(b / scale)) < Math.abs(Math.log(a / scale)) ? b : a));
  }
  // The evaluated point, or one between the evaluated ones that lie around the weights that are asked for.
  function shown() {
    const point = chosen(), all = atScale(front(), scaleOf(point)), asked = state.wanted;
    if (m < 3 || !asked || !point.weights || !data.continuous.includes(front().method)) return point;
    if (asked.every((w, j) => Math.abs(w - point.weights[j]) < 5e-4)) return point;
    const parts = figures.around(asked, all.map(([p]) => p.weights));
    if (!parts) return point;
    const mean = (k) => {
      const found = parts.map(([i, share]) => [value(all[i][0], k), share]);
      return found.some(([x]) => x == null) ? null : found.reduce((sum, [x, share]) => sum + x * share, 0);
    };
    return { weights: asked, main: mean(m), auxiliary: names.map((_, k) => mean(k)), scale: scaleOf(point),
      between: parts.map(([i]) => all[i][1]) };
  }
  function choosePoint(index, keepWanted = false) {
    state.point = index;
    if (!keepWanted) state.wanted = chosen().weights?.slice() ?? null;
    show();
  }
  function chooseFront(index) {
    const scale = scaleOf(chosen()), wanted = state.wanted ?? chosen().weights;
    state.front = index;
    state.point = nearest(wanted, closestScale(scale));
    state.wanted = m > 2 ? wanted : chosen().weights;
    build();
    show();
  }
  function setWeight(j, target) {
    state.wanted = linked(state.wanted, j, target);
    choosePoint(nearest(state.wanted, scaleOf(chosen())), true);
  }

  // --- the address: #w=3 is the point's number in front.json, #w=0.3,0.7 the nearest evaluated weights
  function readAddress() {
    const asked = new URLSearchParams(location.hash.slice(1));
    state.notice = "";
    if (asked.has("method")) {
      const index = fronts.findIndex((f) =>
        f.method === asked.get("method") && (!asked.has("seed") || String(f.seed) === asked.get("seed")));
      if (index >= 0) state.front = index;
      else state.notice = `This page has no method "${asked.get("method")}". `;
    }
    for (const key of ["x", "y"]) {
      const k = Number(asked.get(key) || NaN);
      if (Number.isInteger(k) && k >= 0 && k <= m) state[key] = k;
    }
    const wish = Number(asked.get("scale"));
    const scale = closestScale(wish > 0 ? wish : 1);
    const text = asked.get("w");
    const list = m > 1 ? readWeights(text, m) : null;
    state.point = nearest(Array(m).fill(1 / m), scale);
    if (list) {
      state.wanted = list;
      state.point = nearest(state.wanted, scale);
      if (m === 2) state.wanted = chosen().weights?.slice() ?? null;
      return;
    }
    if (text != null && /^\d+$/.test(text) && front().points[Number(text)]) state.point = Number(text);
    else if (text != null) state.notice = `"w=${text}" names no point of this front. `;
    state.wanted = chosen().weights?.slice() ?? null;
  }
  function address() {
    // Weights where they lead back here, else the point's number: there may be none, one alone, or twins.
    const now = shown(), at = now.weights, exact = now.between || (m > 1 && at && nearest(at, scaleOf(now)) === state.point);
    const parts = [`w=${exact ? at.map((w) => +w.toFixed(6)).join(",") : state.point}`];
    if (fronts.length > 1) parts.push(`method=${encodeURIComponent(front().method)}`);
    if (titles[state.front] !== front().method && front().seed != null) parts.push(`seed=${encodeURIComponent(front().seed)}`);
    if (scales().length > 1) parts.push(`scale=${scaleOf(chosen())}`);
    if (state.x !== 0 || state.y !== (m > 1 ? 1 : m)) parts.push(`x=${state.x}`, `y=${state.y}`);
    return "#" + parts.join("&");
  }

  // --- the controls
  let update = [];
  function build() {
    const focused = document.activeElement?.id;
    byId("controls").replaceChildren();
    update = [];
    if (fronts.length > 1) {
      byId("controls").append(make("div", { class: "row" }, picker("method", "Method", titles, state.front, chooseFront)));
    }
    const line = () => atScale(front(), scaleOf(chosen())).sort(([a], [b]) => (a.weights?.[0] ?? 0) - (b.weights?.[0] ?? 0));
    if (m === 2 && line().length > 1) {
      const [input, output] = slider("weight", `Weight of ${names[0]}`, { min: 0, max: line().length - 1, step: 1 },
        (place) => choosePoint(line()[place][1]), `only ${names[1]}`, `only ${names[0]}`);
      update.push(() => {
        input.max = line().length - 1;
        input.value = line().findIndex(([, i]) => i === state.point);
        output.textContent = weight(chosen().weights?.[0]);
        input.setAttribute("aria-valuetext", `${chosen().weights ? weightsText(chosen().weights) : ""}; ${main} ${number(chosen().main)}`);
      });
    }
    if (m > 2 && state.wanted && line().length > 1) {
      names.forEach((name, j) => {
        const [input, output] = slider(`weight-${j}`, `Weight of ${name}`, { min: 0, max: 1, step: 0.01 }, (w) => setWeight(j, w));
        update.push(() => {
          if (document.activeElement !== input || Math.abs(input.value - state.wanted[j]) > 0.006) input.value = state.wanted[j];
          const near = chosen().weights?.[j];
          const same = Math.abs(state.wanted[j] - near) < 0.005;
          const between = shown().between;
          output.textContent = state.wanted[j].toFixed(2) + (same || between ? "" : ` \u2192 ${weight(near)}`);
          input.setAttribute("aria-valuetext", state.wanted[j].toFixed(2) + (between ? "" : `, nearest evaluated ${weight(near)}`));
        });
      });
    }
    const row = make("div", { class: "row" });
    if (m > 2 && state.wanted && line().length > 1) {
      const preset = (label, w) => make("button", { type: "button", title: label, onclick: () => {
        state.wanted = w;
        choosePoint(nearest(w, scaleOf(chosen())), true);
      } }, label);
      row.append(preset("equal", names.map(() => 1 / m)));
      names.forEach((name, j) => row.append(preset(`only ${name}`, names.map((_, k) => +(k === j)))));
    }
    if (m !== 2 && line().length > 1) {
      const step = (by) => () => {
        const all = line(), place = all.findIndex(([, i]) => i === state.point);
        choosePoint(all[(place + by + all.length) % all.length][1]);
      };
      row.append(make("button", { type: "button", onclick: step(-1) }, "previous point"));
      row.append(make("button", { type: "button", onclick: step(1) }, "next point"));
    }
    if (row.children.length) byId("controls").append(row);
    if (scales().length > 1) {
      const [input, output] = slider("scale", "Scale", { min: 0, max: scales().length - 1, step: 1 },
        (place) => choosePoint(nearest(state.wanted, scales()[place]), true), "closer to the base", "further away");
      update.push(() => {
        const scale = scaleOf(chosen());
        input.value = scales().indexOf(scale);
        output.textContent = controls.scaleText(scale);
        input.setAttribute("aria-valuetext", output.textContent);
      });
    }
    byId("axes").replaceChildren();
    if (m > 1) {
      const options = [...names, `${main} (${role})`];
      const axes = make("div", { class: "row" },
        picker("axis-x", "Across", options, state.x, (k) => { state.x = k; show(); }),
        picker("axis-y", "Up", options, state.y, (k) => { state.y = k; show(); }));
      if (fronts.length > 1) {
        const box = make("input", { type: "checkbox", id: "others", onchange: () => { state.others = box.checked; show(); } });
        box.checked = state.others;
        axes.append(make("label", { for: "others" }, box, "other methods"));
      }
      byId("axes").append(axes);
    }
    if (focused) byId(focused)?.focus();
  }

  // --- what is shown
  function show() {
    const count = front().points.length, point = chosen();
    const link = make("a", { href: address() }, "link to it");
    const now = shown(), text = (of) => (of.weights ? `weights ${weightsText(of.weights)}` : "no weights");
    const said = now.between ? `Interpolated between the evaluated points ${now.between.map((i) => `#${i}`).join(", ")}: ${text(now)}. Nearest evaluated point: #${state.point} of ${count} (`
      : `Evaluated point #${state.point} of ${count}: ${text(point)} (`;
    byId("status").replaceChildren(state.notice + said, link, ").");
    update.forEach((refresh) => refresh());
    bars(now);
    chart(now);
    parallel(now);
    samples();
    try {
      if (location.hash || state.touched) history.replaceState(null, "", address());
    } catch { /* a sandboxed frame has no history; the link above still works */ }
    state.touched = true;
  }

  function bars(point) {
    const rows = [m, ...names.keys()], base = front().base, peers = atScale(front(), scaleOf(point)).map(([p]) => p);
    const common = drawBars(byId("bars"), rows.map((k) => {
      const x = value(point, k), old = base ? value(base, k) : null, pair = ends(point, k), right = k === m ? null : accuracy(point, k);
      const detail = (pair ? ` [${number(pair[0])}, ${number(pair[1])}]` : "") + (right == null ? "" : `, accuracy ${(100 * right).toFixed(0)} %`)
        + (old != null && x != null ? `, base ${number(old)}${point.between ? "" : ` (${change(x, old)})`}` : "");
      return { k, main: k === m, title: `${axisName(k)}${k === m ? ` (${role})` : ""} ${arrow(k)}`, detail, x, old, pair, about: point.between != null,
        peers: peers.map((p) => value(p, k)).filter((y) => y != null) };
    }));
    byId("bars-key").textContent = `Bar: ${data.metric.name} at these weights${point.between ? ", interpolated: what the model itself does there is near it" : ""}. Pale band and small ticks: every evaluated weight of this method.`
      + (base ? ` Vertical line: base model${bases.length > 1 ? " of this run" : ""}.` : "")
      + (rows.some((k) => ends(point, k)) ? " Thin line: interval." : "")
      + (rows.some((k) => k < m && accuracy(point, k) != null) ? " Accuracy: share of held-out pairs that the model orders as their labels do." : "") + (common ? "" : " Each bar has its own scale.");
  }

  function chart(point) {
    const svg = byId("chart"), focused = svg.contains(document.activeElement);
    const width = Math.max(280, Math.round(svg.parentNode.clientWidth - 34)), height = Math.round(Math.min(460, Math.max(280, width * 0.72)));
    svg.replaceChildren();
    const { x, y } = state, scale = scaleOf(point);
    const own = front().base, mine = front().points, rest = state.others ? fronts.filter((f) => f !== front()) : [];
    const truth = data.truth && x < m && y < m ? data.truth : [];
    const seen = [...mine, ...rest.flatMap((f) => f.points), ...(state.others ? bases : bases.filter((b) => b === own))];
    const spans = [x, y].map((k) => range([...seen.map((p) => value(p, k)), ...truth.map((row) => row[k]), ...(ends(point, k) ?? [])]));
    const { left, right, top, bottom, px, py } = paperOf(svg, spans, width, height);
    const short = (k, room) => {
      const tail = ` ${k === m ? data.metric.main_name : data.metric.name} ${arrow(k)}`, most = Math.max(4, Math.floor(room / 6.6) - tail.length);
      return (axisName(k).length > most ? axisName(k).slice(0, most - 1) + "\u2026" : axisName(k)) + tail;
    };
    draw("text", { x: (left + right) / 2, y: height - 8, "text-anchor": "middle" }, svg, short(x, right - left));
    draw("text", { transform: `translate(12 ${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, svg, short(y, bottom - top));

    const mains = mine.map((p) => p.main).filter((v) => v != null);
    const shades = mains.length ? [Math.min(...mains), Math.max(...mains)] : [0, 1];
    const here = (p) => value(p, x) != null && value(p, y) != null;
    const spot = (p, path, size, attributes) =>
      draw("path", { d: path, transform: `translate(${px(value(p, x))} ${py(value(p, y))}) scale(${size})`, "vector-effect": "non-scaling-stroke", ...attributes }, svg);
    if (truth.length) {
      const path = truth.map((row) => [px(row[x]), py(row[y])]).sort((a, b) => a[0] - b[0]);
      if (m === 2) draw("polyline", { points: path.join(" "), fill: "none", stroke: "var(--soft)", "stroke-dasharray": "6 4" }, svg);
      else path.forEach(([cx, cy]) => draw("circle", { cx, cy, r: 1, fill: "var(--soft)" }, svg));
    }
    for (const f of rest) {
      const marker = MARKERS[methods.indexOf(f.method) % MARKERS.length];
      for (const p of f.points.filter((q) => here(q) && scaleOf(q) === 1)) spot(p, marker, m > 2 ? 2.6 : 3.6, { fill: "none", stroke: "var(--other)", opacity: 0.8 });
    }
    const kind = methods.indexOf(front().method);
    const current = atScale(front(), scale).map(([p]) => p).filter(here);
    if (m === 2 && x < m && y < m) {
      const path = current.slice().sort((a, b) => (a.weights?.[0] ?? 0) - (b.weights?.[0] ?? 0)).map((p) => [px(value(p, x)), py(value(p, y))]);
      draw("polyline", { points: path.join(" "), fill: "none", stroke: "var(--bar)", "stroke-width": 1.5, opacity: 0.7 }, svg);
    }
    const dot = (p, size) => [px(value(p, x)) - size, py(value(p, y)) - size, px(value(p, x)) + size, py(value(p, y)) + size];
    const taken = [...mine.map((p) => [p, 7]), ...rest.flatMap((f) => f.points.filter((p) => scaleOf(p) === 1).map((p) => [p, 4])),
      ...(own ? [[own, 10]] : [])].filter(([p]) => here(p)).map(([p, size]) => dot(p, size));
    const spots = mine.map((p, i) => [p, i]).filter(([p]) => here(p));
    // A tap anywhere takes the nearest point: points are small, and fingers are not.
    const paper = draw("rect", { x: left, y: top, width: right - left, height: bottom - top, class: "hit" }, svg);
    paper.addEventListener("click", (event) => {
      const box = svg.getBoundingClientRect(), unit = width / box.width;
      const [ex, ey] = [(event.clientX - box.left) * unit, (event.clientY - box.top) * unit];
      const far = ([p]) => (px(value(p, x)) - ex) ** 2 + (py(value(p, y)) - ey) ** 2;
      const best = spots.reduce((a, b) => (far(b) < far(a) ? b : a), spots[0]);
      if (best && far(best) < 44 ** 2) choosePoint(best[1]);
    });
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    mine.forEach((p, i) => {
      if (!here(p)) return;
      const far = scaleOf(p) !== scale;
      const mark = spot(p, MARKERS[kind % MARKERS.length], far ? 3 : 5.5, { fill: colour(p.main, shades), stroke: far ? "var(--other)" : "var(--bar)", "stroke-width": far ? 0.7 : 1.5, opacity: far ? 0.6 : 1 });
      const hit = draw("circle", { cx: px(value(p, x)), cy: py(value(p, y)), r: 12, class: "hit", "data-point": i,
        role: "radio", "aria-checked": i === state.point, tabindex: i === state.point ? 0 : -1, "aria-label": words(p, i) }, svg);
      draw("title", {}, hit, words(p, i));
      hit.addEventListener("click", () => choosePoint(i));
      hit.addEventListener("keydown", (event) => {
        const place = spots.findIndex(([, j]) => j === i), last = spots.length - 1;
        const next = event.key in steps ? (place + steps[event.key] + spots.length) % spots.length
          : event.key === "Home" ? 0 : event.key === "End" ? last : null;
        if (next === null) return;
        event.preventDefault();
        choosePoint(spots[next][1]);
      });
      if (mark && i === state.point) mark.setAttribute("data-chosen", "");
    });
    for (const b of state.others ? bases : []) {
      if (b !== own && here(b)) spot(b, STAR, 5, { fill: "none", stroke: "var(--other)" });
    }
    if (own && here(own)) {
      spot(own, STAR, 6, { fill: "var(--base)", stroke: "var(--card)" });
    }
    if (here(point)) {
      const cx = px(value(point, x)), cy = py(value(point, y));
      for (const [k, a, b] of [[x, px, (v) => [v, cy]], [y, py, (v) => [cx, v]]]) {
        const pair = ends(point, k);
        if (!pair) continue;
        const [[x1, y1], [x2, y2]] = pair.map((v) => b(a(v)));
        draw("line", { x1, y1, x2, y2, stroke: "var(--ring)", "stroke-width": 1.5, "pointer-events": "none" }, svg);
        taken.push([Math.min(x1, x2) - 2, Math.min(y1, y2) - 2, Math.max(x1, x2) + 2, Math.max(y1, y2) + 2]);
      }
      draw("circle", { cx, cy, r: 10, fill: "none", stroke: "var(--ring)", "stroke-width": 3, "pointer-events": "none",
        ...(point.between ? { "stroke-dasharray": "4 3" } : {}) }, svg);
      taken.push([cx - 12, cy - 12, cx + 12, cy + 12]);
      label(svg, point.weights && m <= 6 ? `w = (${point.weights.map((w) => String(+w.toFixed(2))).join(", ")})` : `point ${state.point}`,
        cx, cy, taken, [left, top, right, bottom], 14);
    }
    if (own && here(own)) label(svg, "base", px(value(own, x)), py(value(own, y)), taken, [left, top, right, bottom], 11);
    if (focused) svg.querySelector(`[data-point="${state.point}"]`)?.focus();
    svg.setAttribute("aria-label", `${titles[state.front]}: ${axisName(y)} against ${axisName(x)}, ${current.length} points; arrow keys choose one. `
      + `The chosen point has ${axisName(x)} ${number(value(point, x))} and ${axisName(y)} ${number(value(point, y))}.`);
    legend(shades, mains.length, truth.length);
  }

  const words = (p, i) => `${p.weights ? weightsText(p.weights) : `point ${i}`}: ` + [...names.keys(), m].map((k) => `${axisName(k)} ${number(value(p, k))}`).join(", ");

  function parallel(point) {
    byId("parallel-box").hidden = m < 3;
    if (m < 3) return;
    const rows = [...names.keys(), m], mine = atScale(front(), scaleOf(point)), of = (p) => rows.map((k) => value(p, k));
    parallelCoordinates(byId("parallel"), {
      axes: rows.map((k) => ({ name: axisName(k), rising: arrow(k) === "\u2191" })),
      lines: mine.map(([p, i]) => ({ values: of(p), main: p.main, index: i, title: words(p, i), choose: () => choosePoint(i) })),
      base: front().base ? of(front().base) : null,
      chosen: of(point),
    });
  }

  function legend(shades, coloured, truth) {
    byId("legend").replaceChildren();
    const entry = (...of) => byId("legend").append(legendEntry(...of));
    const big = { transform: "scale(5)", "vector-effect": "non-scaling-stroke", "stroke-width": 1.5 };
    methods.forEach((method, i) => {
      const current = method === front().method;
      if (!current && !state.others) return;
      entry(MARKERS[i % MARKERS.length], { ...big, fill: current ? "var(--band)" : "none", stroke: current ? "var(--bar)" : "var(--other)" }, method, current);
    });
    if (front().base) entry(STAR, { ...big, fill: "var(--base)" }, bases.length > 1 ? "base model of this run" : "base model");
    if (bases.length > 1 && state.others) entry(STAR, { ...big, fill: "none", stroke: "var(--other)" }, "bases of other runs");
    if (scales().length > 1) entry(MARKERS[methods.indexOf(front().method) % MARKERS.length], { transform: "scale(3)", "vector-effect": "non-scaling-stroke", fill: "var(--band)", stroke: "var(--other)", opacity: 0.6 }, "other scales");
    if (truth && m === 2) entry("M-9,0H9", { stroke: "var(--soft)", "stroke-dasharray": "6 4" }, "true front");
    else if (truth) entry("M-7,2h2v2h-2zM-2,-2h2v2h-2zM3,-5h2v2h-2z", { fill: "var(--soft)" }, "true front");
    if (!coloured) return;
    byId("legend").append(shades[0] === shades[1] ? make("span", {}, `${main} ${number(shades[0])} everywhere`) : colourBar(main, shades));
  }

  function samples() {
    const all = data.samples?.[data.fronts.indexOf(front())] ?? [], places = [...all.keys()].filter((i) => all[i].length);
    byId("samples").hidden = !places.length;
    byId("explorer").classList.toggle("with-samples", places.length > 0);
    if (!places.length) return;
    const points = front().points;
    const far = (i) => points[i].weights?.reduce((sum, w, j) => sum + (w - (chosen().weights?.[j] ?? w)) ** 2, 0) ?? 0;
    const away = (i) => Math.abs(Math.log(scaleOf(points[i]) / scaleOf(chosen())));
    const nearer = (a, b) => far(b) < far(a) - 1e-12 || (far(b) < far(a) + 1e-12 && away(b) < away(a) - 1e-12);
    const place = all[state.point].length ? state.point : places.reduce((a, b) => (nearer(a, b) ? b : a));
    const there = points[place], at = there.weights ? ` at ${weightsText(there.weights)}` : "";
    const between = shown().between, own = place === state.point;
    byId("samples-note").hidden = own && !between;
    byId("samples-note").textContent = (own ? "Answers are not interpolated: these are of the nearest evaluated point" : `Point #${state.point} has no samples of its own; these are of point`)
      + ` #${place}${at}, scale ${weight(scaleOf(there))}.`;
    const base = data.fronts.findIndex((f) => f.isBase && f.base === front().base);
    const before = front().isBase ? [] : data.samples[base]?.[0] ?? [];
    byId("sample-list").replaceChildren(...all[place].map((sample) => answerBox(sample, before, state)));
  }

  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", () => { readAddress(); build(); show(); });
  let waiting = 0;
  addEventListener("resize", () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(() => { chart(shown()); parallel(shown()); }); });
  const file = document.title.replace(/[^\w.-]+/g, "-").replace(/^-+|-+$/g, "").toLowerCase();
  byId("save-csv").addEventListener("click", () => downloads.save(new Blob([data.csv], { type: "text/csv" }), `${file}.csv`));
  byId("save-png").addEventListener("click", async () => downloads.save(await downloads.png(byId("chart")), `${file}.png`));
  byId("explorer").hidden = false;
  readAddress();
  build();
  show();
})();
