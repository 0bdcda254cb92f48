"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const COLORS = ["#1f77b4", "#e8710a", "#2ca02c", "#c2185b", "#8e63ce", "#8c6d46", "#0f9ea8", "#8a8f1d", "#d6604d", "#5c6bc0"];
const color = (index) => COLORS[index % COLORS.length];
const byId = (id) => document.getElementById(id);
function element(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "text", "circle"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}
const number = (value, digits = 3) => value === null || value === undefined || Number.isNaN(value) ? "–"
  : Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3) ? value.toExponential(2)
  : value.toLocaleString("en", { maximumSignificantDigits: Math.abs(value) >= 1000 ? 6 : digits + 1 });
const fixed = (value) => value === null || value === undefined ? "–" : Math.abs(value) >= 100 ? number(value) : value.toFixed(3);
const table = (heads, rows) => element("div", { class: "scroll" }, element("table", {},
  element("thead", {}, element("tr", {}, ...heads.map(([text, numeric]) => element("th", { scope: "col", class: numeric ? "number" : null }, text)))),
  element("tbody", {}, ...rows)));
const cell = (content, numeric = false, word = false) => element("td", { class: numeric ? "number" : word ? "word" : null }, content);
const swatch = (index) => element("span", { class: "swatch", style: `background:${color(index)}`, "aria-hidden": "true" });

function results() {
  byId("verdict").textContent = data.verdict;
  const part = byId("results");
  for (const [index, run] of data.runs.entries()) {
    const choice = data.choices.find((each) => each.runs.includes(index));
    for (const remark of run.remarks) {
      const seed = run.seed === null ? "" : `seed ${run.seed} `;
      const name = data.runs.length > 1 ? `${data.choices.length > 1 && choice ? `${choice.label}, ` : ""}${seed}(${run.name}): ` : "";
      if (data.runs.length > 1 && remark.tone === "good") continue;
      part.append(element("p", { class: remark.tone }, { good: "✓ ", note: "• ", bad: "⚠ " }[remark.tone] + name + remark.text));
    }
  }
  if (data.runs.length < 2) return;
  const rows = data.choices.map((choice, index) => element("tr", { class: index === 0 && choice.mean !== null ? "best" : null },
    cell(element("span", {}, swatch(index), choice.label)), cell(String(choice.number), true), cell(fixed(choice.mean), true),
    cell(choice.spread === null ? "–" : `± ${fixed(choice.spread)}`, true), cell(fixed(choice.worst), true), cell(fixed(choice.best), true),
    cell(choice.behind === null ? "" : `${fixed(choice.behind.value)} [${fixed(choice.behind.low)}, ${fixed(choice.behind.high)}]`, true),
    cell(choice.behind === null ? "" : choice.behind.clear ? "behind" : "may be noise", false, true),
    cell(choice.seconds === null ? "–" : `${choice.seconds.toFixed(0)} s`, true)));
  part.append(element("h2", {}, `Result: ${data.measure}`), table([["choice"], ["seeds", true], ["mean", true], ["spread", true], ["worst run", true], ["best run", true],
    ["behind the best [95 %]", true], [""], ["time a run", true]], rows),
    element("p", { class: "soft" }, "spread: standard deviation over the seeds; [95 %]: where the difference lies with that confidence, may be noise if it includes 0"));
  const keys = data.differing.filter((key) => key !== "seed");
  if (keys.length) part.append(element("h2", {}, "What differs"), table([["setting"], ...data.choices.map((choice) => [choice.label])],
    keys.map((key) => element("tr", {}, element("th", { scope: "row" }, key), ...data.choices.map((choice) => cell(choice.differing[key]))))),
    element("p", { class: "soft" }, "-: this choice does not have the setting; null: it has it, and it is off"));
}

const smoothed = (points, radius) => radius ? points.map(([x], index) => {
  const near = points.slice(Math.max(0, index - radius), index + radius + 1);
  return [x, near.reduce((sum, point) => sum + point[1], 0) / near.length];
}) : points;
function meanOf(series) {
  const sums = new Map();
  for (const points of series) for (const [x, y] of points) { const sum = sums.get(x) || [0, 0]; sums.set(x, [sum[0] + y, sum[1] + 1]); }
  return [...sums].filter(([, sum]) => sum[1] === series.length).map(([x, sum]) => [x, sum[0] / sum[1]]).sort((a, b) => a[0] - b[0]);
}
function ticks(low, high, most) {
  const raw = (high - low) / most, size = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].find((each) => each * size >= raw) * size;
  const values = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) values.push(Math.abs(value) < step * 1e-9 ? 0 : value);
  return values;
}
function chart(metric, phase, radius, wide) {
  const lines = [];
  data.choices.forEach((choice, index) => {
    const series = choice.runs.map((run) => smoothed((data.runs[run].curves[phase] || {})[metric.name] || [], radius)).filter((points) => points.length);
    if (!series.length) return;
    if (series.length > 1) series.forEach((points) => lines.push({ index, points, thin: true }));
    lines.push({ index, label: choice.label, points: series.length > 1 ? meanOf(series) : series[0], thin: false });
  });
  const points = lines.flatMap((line) => line.points);
  if (!points.length) return null;
  const width = wide ? 900 : 320, height = wide ? 240 : 170, left = 46, right = 14, top = 6, bottom = 20;
  let [x0, x1] = [Math.min(...points.map((p) => p[0])), Math.max(...points.map((p) => p[0]))];
  let [y0, y1] = [points.reduce((m, p) => Math.min(m, p[1]), Infinity), points.reduce((m, p) => Math.max(m, p[1]), -Infinity)];
  if (x0 === x1) x1 = x0 + 1;
  if (y1 - y0 < 1e-12 * Math.max(1, Math.abs(y1))) { y0 -= Math.abs(y0) * .1 || .5; y1 += Math.abs(y1) * .1 || .5; }
  const x = (value) => left + (value - x0) / (x1 - x0) * (width - left - right), y = (value) => height - bottom - (value - y0) / (y1 - y0) * (height - top - bottom);
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${metric.label} over steps` });
  for (const value of ticks(y0, y1, wide ? 8 : 6)) svg.append(element("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
    element("text", { x: left - 4, y: y(value) + 3, "text-anchor": "end" }, number(value, 2)));
  for (const value of ticks(x0, x1, wide ? 14 : 7).filter(Number.isInteger)) svg.append(element("text", { x: x(value), y: height - 5, "text-anchor": "middle" }, String(value)));
  for (const line of lines) svg.append(element("path", { d: line.points.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join(""),
    fill: "none", stroke: color(line.index), "stroke-width": line.thin ? .8 : 2, opacity: line.thin ? .45 : 1 }));
  for (const line of lines) if (line.points.length === 1) svg.append(element("circle", { cx: x(line.points[0][0]), cy: y(line.points[0][1]), r: 3, fill: color(line.index) }));
  const cross = element("line", { class: "cross", y1: top, y2: height - bottom, visibility: "hidden" });
  svg.append(cross);
  const steps = [...new Set(points.map((p) => p[0]))].sort((a, b) => a - b), read = element("div", { class: "read", "aria-live": "polite" });
  let at = steps.length - 1;
  function show(index) {
    at = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[at];
    cross.setAttribute("x1", x(step)); cross.setAttribute("x2", x(step)); cross.setAttribute("visibility", "visible");
    const values = lines.filter((line) => !line.thin).map((line) => [line, line.points.find((p) => p[0] === step)]).filter(([, p]) => p);
    read.replaceChildren(`step ${step}: `, ...values.flatMap(([line, p]) => [data.choices.length > 1 ? swatch(line.index) : "", `${number(p[1])}  `]));
  }
  const hide = () => { cross.setAttribute("visibility", "hidden"); read.textContent = ""; };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), wanted = x0 + ((event.clientX - box.left) / box.width * width - left) / (width - left - right) * (x1 - x0);
    show(steps.reduce((best, step, index) => Math.abs(step - wanted) < Math.abs(steps[best] - wanted) ? index : best, 0));
  });
  svg.addEventListener("pointerleave", hide);
  const keys = { ArrowLeft: () => at - 1, ArrowRight: () => at + 1, Home: () => 0, End: () => steps.length - 1 };
  return element("div", { class: wide ? "chart wide" : "chart", tabindex: 0, onfocus: () => show(at), onblur: hide,
    onkeydown: (event) => { if (keys[event.key]) { event.preventDefault(); show(keys[event.key]()); } } },
    element("h3", { title: metric.name }, metric.label), svg, read);
}
function curves() {
  const choose = byId("phase"), smooth = byId("smooth");
  window.addEventListener("resize", () => draw());
  for (const phase of data.phases) choose.append(element("option", { value: phase.name }, phase.label));
  choose.value = data.phases.length ? data.phases[0].name : "";
  function draw() {
    const phase = data.phases.find((each) => each.name === choose.value), charts = byId("charts");
    charts.replaceChildren();
    if (!phase) return charts.append("No step has measured anything.");
    if (data.choices.length > 1) charts.append(element("div", { style: "grid-column:1/-1" }, ...data.choices.map((choice, index) => element("span", { style: "margin-right:1rem" }, swatch(index), choice.label))));
    const isWide = byId("charts").clientWidth > 640, made = (metrics, wide) => metrics.map((metric, index) => chart(metric, phase.name, Number(smooth.value), wide && isWide && index === 0)).filter(Boolean);
    charts.append(...made(phase.metrics.filter((metric) => metric.main), true));
    const others = made(phase.metrics.filter((metric) => !metric.main), false);
    if (others.length) charts.append(element("details", { style: "grid-column:1/-1" }, element("summary", {}, `${others.length} more metrics`), element("div", { class: "charts" }, ...others)));
  }
  choose.addEventListener("change", draw); smooth.addEventListener("input", draw); draw();
}

const middleOf = (signal) => signal === "ratio" ? 1 : 0, largestOf = {};
function largest(signal) { // over all samples, so that colours can be compared
  if (!(signal in largestOf)) {
    let most = 0;
    for (const sample of data.samples) for (const value of (sample.tokens && sample.tokens[signal]) || []) if (typeof value === "number") most = Math.max(most, Math.abs(value - middleOf(signal)));
    largestOf[signal] = most || 1;
  }
  return largestOf[signal];
}
function tokens(record, signal) {
  const values = record[signal] || [], middle = middleOf(signal), most = largest(signal);
  return element("pre", {}, ...record.text.map((text, index) => {
    const value = values[index], status = (record.status || [])[index], share = typeof value === "number" ? (value - middle) / most : 0;
    const said = Object.keys(record).filter((key) => Array.isArray(record[key]) && key !== "text").map((key) => `${key} ${typeof record[key][index] === "number" ? number(record[key][index]) : record[key][index] ?? "–"}`);
    const kept = !status || status === "learns" ? "" : status.startsWith("clipped") || status === "rejected" || status === "flat" ? " clipped" : " masked";
    return element("span", { class: `token${value === null ? " masked" : ""}${kept}`, title: said.join("\n"),
      style: share ? `background:rgba(var(--${share > 0 ? "up" : "down"}), ${(.1 + .5 * Math.min(1, Math.abs(share))).toFixed(2)})` : null }, text);
  }));
}
function histogram(chosen, choose) {
  const rewards = chosen.map((s) => s.reward).filter((value) => typeof value === "number");
  if (rewards.length < 2) return "";
  const low = rewards.reduce((m, v) => Math.min(m, v), Infinity), high = rewards.reduce((m, v) => Math.max(m, v), -Infinity), values = [...new Set(rewards)].sort((a, b) => a - b);
  const edges = values.length <= 12 ? values.map((v) => [v, v]) : Array.from({ length: 12 }, (_, i) => [low + (high - low) * i / 12, low + (high - low) * (i + 1) / 12]);
  const counts = edges.map(([from, to], i) => rewards.filter((v) => v >= from && (from === to || i === edges.length - 1 ? v <= to : v < to)).length), most = Math.max(...counts);
  return element("div", { class: "bars", role: "group", "aria-label": "how many samples have which reward" }, ...edges.map(([from, to], i) => element("button", { type: "button", class: "bar",
    title: `reward ${from === to ? number(from) : `${number(from)} to ${number(to)}`}: ${counts[i].toLocaleString("en")} samples`, onclick: () => choose(from, to) },
    element("span", { style: `height:${Math.round(60 * counts[i] / most) + 1}px` }), element("small", {}, number(from, 2)))));
}
function samples() {
  const part = byId("sampling");
  if (!data.samples.length) return part.append(element("p", { class: "soft" }, "No samples were kept: tracker.samples=some keeps a few of every step."));
  const text = element("input", { type: "search", placeholder: "text", "aria-label": "text in prompt or completion" });
  const least = element("input", { type: "number", step: "any", style: "width:6rem", "aria-label": "least reward" }), most = element("input", { type: "number", step: "any", style: "width:6rem", "aria-label": "largest reward" });
  const step = element("select", { "aria-label": "step" }, element("option", { value: "" }, "all steps"), ...[...new Set(data.samples.map((s) => s.step))].sort((a, b) => a - b).map((s) => element("option", { value: s }, `step ${s + 1}`)));
  const run = element("select", { "aria-label": "run" }, element("option", { value: "" }, "all runs"), ...data.runs.map((r, index) => element("option", { value: index }, r.name)));
  const signals = ["advantage", "coefficient", "ratio", "weight", "entropy", "old", "current", "rollout", "ref"].filter((name) => data.samples.some((s) => s.tokens && s.tokens[name]));
  const signal = element("select", { "aria-label": "colour tokens by" }, ...signals.map((name) => element("option", {}, name)));
  const bars = element("div"), list = element("div"), state = element("span", { class: "soft", role: "status" }), size = 20;
  let start = 0;
  const later = element("button", { type: "button", onclick: () => { start += size; draw(); } }, "next"), earlier = element("button", { type: "button", onclick: () => { start -= size; draw(); } }, "previous");
  function draw() {
    const wanted = text.value.toLowerCase();
    const kept = data.samples.filter((s) => (!wanted || `${s.prompt}\n${s.completion}`.toLowerCase().includes(wanted)) && (least.value === "" || s.reward >= Number(least.value))
      && (most.value === "" || s.reward <= Number(most.value)) && (step.value === "" || s.step === Number(step.value)) && (run.value === "" || s.run === Number(run.value)));
    start = Math.max(0, Math.min(start, kept.length - 1)); start -= start % size;
    earlier.disabled = start === 0; later.disabled = start + size >= kept.length;
    state.textContent = kept.length ? `${start + 1} to ${Math.min(start + size, kept.length)} of ${kept.length.toLocaleString("en")} samples` : "no sample fits";
    bars.replaceChildren(histogram(kept, (from, to) => { least.value = from; most.value = to; start = 0; draw(); }));
    list.replaceChildren(...kept.slice(start, start + size).map((s) => element("div", { class: "sample" },
      element("div", { class: "soft" }, `${data.runs.length > 1 ? data.runs[s.run].name + " · " : ""}${s.phase === "evaluation" ? "held out, after step" : "step"} ${s.step + 1} · prompt ${s.prompt_index} sample ${s.sample} · `,
        element("b", {}, `reward ${number(s.reward)}`), ...Object.entries(s.parts || {}).map(([name, value]) => ` · ${name} ${number(value)}`),
        s.advantage === null || s.advantage === undefined ? "" : ` · advantage ${number(s.advantage)}`, ` · ${s.num_tokens} tokens${s.stop === "length" ? ", cut off" : ""}`),
      element("pre", { class: "prompt" }, s.prompt), s.tokens && signals.length ? tokens(s.tokens, signal.value) : element("pre", {}, s.completion))));
  }
  for (const control of [text, least, most, step, run, signal]) control.addEventListener("input", () => { start = 0; draw(); });
  const legend = signals.length ? " Tokens: blue is above 0 (a ratio: above 1), orange below; a wavy line marks what the loss clipped or rejected; nothing is learnt from pale ones. Point at a token for its numbers." : "";
  part.append(element("p", { class: "soft" }, data.sampled + legend), element("div", { class: "controls" }, text, element("span", {}, "reward ", least, " to ", most), step, data.runs.length > 1 ? run : null,
    signals.length ? element("label", {}, "colour by ", signal) : null, earlier, later, state), bars, list);
  draw();
}
function settings() {
  for (const choice of data.choices) {
    if (choice.explanation) byId("explained").append(element("details", { open: data.choices.length === 1 }, element("summary", {}, choice.label), element("pre", { class: "block" }, choice.explanation)));
    const run = data.runs[choice.runs[0]];
    byId("configured").append(element("details", {}, element("summary", {}, `${choice.label}: ${run.folder}`), element("pre", { class: "block" }, run.config)));
  }
  if (!data.choices.some((choice) => choice.explanation)) byId("explained").append(element("p", { class: "soft" }, "The loss of these runs cannot be explained from their files."));
  byId("configured").append(element("p", { class: "soft" }, data.versions));
}
results(); curves(); samples(); settings();
