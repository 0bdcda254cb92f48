// Charts of toolkit.notebook.charts: lines over x with shaded ranges, and bars. One module, no build step.
const COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D46"];
const DASHES = ["", "7 3", "2 2", "9 3 2 3", "4 4", "12 3", "1 3"];
const SVG = "http://www.w3.org/2000/svg";
const STYLE = `
.tk-charts { color: var(--jp-ui-font-color1, inherit); font: 12px system-ui, sans-serif; --tk-line: color-mix(in srgb, currentColor 22%, transparent); }
.tk-grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 6px 14px; }
.tk-grid.tk-four { grid-template-columns: repeat(auto-fit, minmax(max(300px, calc(50% - 14px)), 1fr)); }
.tk-chart { outline-offset: 2px; min-width: 0; max-width: 440px; }
.tk-chart h4 { margin: 2px 0; font-size: 12px; font-weight: 600; }
.tk-chart svg { width: 100%; height: auto; display: block; overflow: visible; }
.tk-chart text { fill: currentColor; font-size: 10px; }
.tk-read { min-height: 2.8em; font-variant-numeric: tabular-nums; }
.tk-read i { font-style: normal; font-weight: 700; }
.tk-legend span { margin-right: 14px; white-space: nowrap; display: inline-block; }
.tk-legend svg { display: inline-block; width: 26px; height: 8px; vertical-align: middle; margin-right: 4px; }
.tk-text { display: flex; gap: 8px; align-items: baseline; margin: 3px 0; }
.tk-text code { flex: 1; white-space: pre-wrap; overflow-wrap: anywhere; padding: 2px 6px; border: 1px solid var(--tk-line); font: 12px ui-monospace, monospace; background: none; color: inherit; }
.tk-text button { font: inherit; color: inherit; background: transparent; border: 1px solid currentColor; border-radius: 3px; cursor: pointer; }
.tk-note { margin: 2px 0; }
.tk-bar { cursor: pointer; } .tk-bar:focus { outline: 2px solid currentColor; }`;
function make(tag, attributes = {}, ...children) {
  const isSvg = ["svg", "g", "path", "line", "text", "rect", "pattern", "defs", "title", "circle"].includes(tag);
  const node = isSvg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}
const shown = (value) => value === null || value === undefined ? "–" : value !== 0 && (Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3)
  ? value.toExponential(2) : String(Number(value.toPrecision(4)));
function linearTicks(low, high, most) {
  const raw = (high - low) / most, power = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].find((each) => each * power >= raw * .999) * power;
  const values = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) values.push(Number((index * step).toPrecision(12)));
  return values;
}
function logTicks(low, high) {
  if (high / low < 4) return linearTicks(low, high, 6);
  const values = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const digit of [1, 2, 5]) { const value = digit * 10 ** power; if (value >= low * .999 && value <= high * 1.001) values.push(Number(value.toPrecision(6))); }
  return values;
}
let patterns = 0;
const WIDTH = 400, HEIGHT = 220, LEFT = 48, RIGHT = 8, TOP = 6, BOTTOM = 34;
const INNER = [WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM];
function frame(svg, chart, yTicks, y) {
  for (const value of yTicks) svg.append(make("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value), stroke: "var(--tk-line)", "stroke-width": value === 0 ? 1.6 : .7 }),
    make("text", { x: LEFT - 4, y: y(value) + 3, "text-anchor": "end" }, shown(value)));
  svg.append(make("text", { x: LEFT + INNER[0] / 2, y: HEIGHT - 4, "text-anchor": "middle" }, chart.x_label),
    make("text", { x: 9, y: TOP + INNER[1] / 2, "text-anchor": "middle", transform: `rotate(-90 9 ${TOP + INNER[1] / 2})` }, chart.y_label));
}
function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) if (value !== null && value !== undefined) { if (value < low) low = value; if (value > high) high = value; }
  if (low === Infinity) return [-1, 1];
  const room = (high - low) * .05 || Math.abs(high) * .1 || .5;
  return [low - room, high + room];
}
function lineChart(chart, hasLegend) {
  const several = chart.lines.length > 1, isWhole = chart.lines.every((line) => line.x.every(Number.isInteger));
  const xs = chart.lines.flatMap((line) => [line.x[0], line.x[line.x.length - 1]]).filter((value) => value !== undefined);
  let [x0, x1] = xs.length ? [Math.min(...xs), Math.max(...xs)] : [0, 1];
  if (x0 === x1) x1 = x0 + (chart.is_log ? x0 : 1);
  const [y0, y1] = extent(chart.lines.flatMap((line) => line.y));
  const scale = chart.is_log ? Math.log : (value) => value, back = chart.is_log ? Math.exp : (value) => value;
  const x = (value) => LEFT + (scale(value) - scale(x0)) / (scale(x1) - scale(x0)) * INNER[0], y = (value) => TOP + (y1 - value) / (y1 - y0) * INNER[1];
  const names = chart.lines.map((line) => line.label).join(", ");
  const spoken = `${chart.title}. ${chart.y_label} over ${chart.x_label}: ${names}. ${chart.bands.map((band) => `${band.label} from ${shown(band.low)} to ${shown(band.high)}`).join("; ")}`;
  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": spoken });
  const id = `tk-hatch-${patterns++}`;
  svg.append(make("defs", {}, make("pattern", { id, width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" }, make("line", { x1: 0, x2: 0, y1: 0, y2: 6, stroke: "currentColor", "stroke-width": 1.2, opacity: .3 }))));
  for (const band of chart.bands) { const left = x(Math.max(band.low, x0)), right = x(Math.min(band.high, x1));
    svg.append(make("rect", { class: "tk-band", x: left, y: TOP, width: Math.max(1, right - left), height: INNER[1], fill: band.is_strong ? "currentColor" : `url(#${id})`, opacity: band.is_strong ? .14 : 1 }, make("title", {}, band.label))); }
  frame(svg, chart, linearTicks(y0, y1, 5), y);
  for (const value of (chart.is_log ? logTicks(x0, x1) : linearTicks(x0, x1, 6)).filter((each) => !isWhole || Number.isInteger(each))) svg.append(make("text", { x: x(value), y: HEIGHT - BOTTOM + 14, "text-anchor": "middle" }, shown(value)));
  if (chart.marker !== null) svg.append(make("line", { x1: x(chart.marker), x2: x(chart.marker), y1: TOP, y2: HEIGHT - BOTTOM, stroke: "currentColor", opacity: .45, "stroke-width": .8 }));
  for (const line of chart.lines) {
    let path = "", pen = "M";
    line.y.forEach((value, index) => { if (value === null) pen = "M"; else { path += `${pen}${x(line.x[index]).toFixed(2)} ${y(value).toFixed(2)}`; pen = "L"; } });
    svg.append(make("path", { class: "tk-curve", d: path, fill: "none", stroke: COLORS[line.style % COLORS.length], "stroke-width": 2.2, "stroke-dasharray": DASHES[line.style % DASHES.length] }));
    if (line.y.length === 1 && line.y[0] !== null) svg.append(make("circle", { cx: x(line.x[0]), cy: y(line.y[0]), r: 3, fill: COLORS[line.style % COLORS.length] }));
  }
  const cross = make("line", { y1: TOP, y2: HEIGHT - BOTTOM, stroke: "currentColor", "stroke-width": .8, visibility: "hidden" });
  svg.append(cross);
  const read = make("div", { class: "tk-read", "aria-live": "polite" });
  let at = null;
  const nearest = (line, value) => { let low = 0, high = line.x.length - 1; while (high - low > 1) { const middle = (low + high) >> 1; if (line.x[middle] <= value) low = middle; else high = middle; }
    return Math.abs(scale(line.x[high]) - scale(value)) < Math.abs(scale(line.x[low]) - scale(value)) ? high : low; };
  function show(value) {
    at = Math.min(x1, Math.max(x0, value));
    cross.setAttribute("x1", x(at)); cross.setAttribute("x2", x(at)); cross.setAttribute("visibility", "visible");
    const band = chart.bands.filter((each) => at >= each.low && at <= each.high).map((each) => each.label);
    read.replaceChildren(`${chart.x_label.split(",")[0].split(" (")[0]} ${shown(at)}: `, ...chart.lines.filter((line) => line.x.length).flatMap((line) => [
      make("i", { style: `color:${COLORS[line.style % COLORS.length]}` }, several ? "■ " : ""), `${shown(line.y[nearest(line, at)])}  `]), band.length ? `[${band.join("; ")}]` : "");
  }
  const hide = () => { cross.setAttribute("visibility", "hidden"); read.textContent = ""; };
  svg.addEventListener("pointermove", (event) => { const box = svg.getBoundingClientRect();
    show(back(scale(x0) + ((event.clientX - box.left) / box.width * WIDTH - LEFT) / INNER[0] * (scale(x1) - scale(x0)))); });
  svg.addEventListener("pointerleave", hide);
  const move = (by) => back(Math.min(scale(x1), Math.max(scale(x0), scale(at === null ? chart.marker ?? x0 : at) + by * (scale(x1) - scale(x0)))));
  const keys = { ArrowLeft: () => move(-.01), ArrowRight: () => move(.01), PageUp: () => move(.1), PageDown: () => move(-.1), Home: () => x0, End: () => x1 };
  return make("div", { class: "tk-chart", tabindex: 0, role: "group", "aria-label": `${chart.title}; arrow keys read values`, onfocus: () => show(at ?? chart.marker ?? x0), onblur: hide,
    onkeydown: (event) => { if (keys[event.key]) { event.preventDefault(); event.stopPropagation(); show(keys[event.key]()); } } }, make("h4", {}, chart.title), hasLegend && several ? legend([chart]) : null, svg, read);
}
function barChart(chart, click) {
  const [, top] = extent([0, ...chart.bars.map((bar) => bar.value)]), bottom = Math.min(0, ...chart.bars.map((bar) => bar.value)) * 1.05;
  const y = (value) => TOP + (top - value) / (top - bottom) * INNER[1], step = INNER[0] / Math.max(1, chart.bars.length);
  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group", "aria-label": `${chart.title}. ${chart.y_label}: ${chart.bars.map((bar) => `${bar.label} ${shown(bar.value)}`).join(", ")}` });
  frame(svg, chart, linearTicks(bottom, top, 5), y);
  const every = Math.max(1, Math.ceil(chart.bars.length / (chart.bars.some((bar) => bar.label.length > 6) ? 4 : 10)));
  chart.bars.forEach((bar, index) => {
    const rect = make("rect", { class: bar.key ? "tk-bar" : null, x: LEFT + index * step + step * .1, width: step * .8, y: Math.min(y(0), y(bar.value)), height: Math.max(1, Math.abs(y(bar.value) - y(0))), fill: COLORS[bar.style % COLORS.length] },
      make("title", {}, `${bar.label}: ${shown(bar.value)}`));
    if (bar.key) { rect.setAttribute("tabindex", 0); rect.setAttribute("role", "button"); rect.setAttribute("aria-label", `${bar.label}: ${shown(bar.value)}`);
      rect.addEventListener("click", () => click(bar.key)); rect.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); event.stopPropagation(); click(bar.key); } }); }
    svg.append(rect);
    if (!bar.key) svg.append(make("text", { x: LEFT + (index + .5) * step, y: y(bar.value) - 3, "text-anchor": "middle" }, shown(bar.value)));
    if (index % every === 0) bar.label.split(", ").forEach((part, row) => svg.append(make("text", { x: LEFT + (index + .5) * step, y: HEIGHT - BOTTOM + 11 + 9 * row, "text-anchor": "middle", style: "font-size:9px" }, part)));
  });
  return make("div", { class: "tk-chart" }, make("h4", {}, chart.title), svg);
}
function legend(charts) {
  const lines = new Map();
  for (const chart of charts) for (const line of chart.lines) if (!lines.has(`${line.style} ${line.label}`)) lines.set(`${line.style} ${line.label}`, line);
  if (lines.size < 2) return null;
  return make("div", { class: "tk-legend" }, ...[...lines.values()].map((line) => make("span", {},
    make("svg", { viewBox: "0 0 26 8", "aria-hidden": "true" }, make("line", { x1: 0, x2: 26, y1: 4, y2: 4, stroke: COLORS[line.style % COLORS.length], "stroke-width": 2.4, "stroke-dasharray": DASHES[line.style % DASHES.length] })), line.label)));
}
async function copy(button, code) {
  try { await navigator.clipboard.writeText(code.textContent); button.textContent = "copied"; }
  catch { const range = document.createRange(); range.selectNodeContents(code); getSelection().removeAllRanges(); getSelection().addRange(range); button.textContent = "selected"; }
  setTimeout(() => { button.textContent = "copy"; }, 1500);
}
function copyText(text) {
  const code = make("code", {}, text.text), button = make("button", { type: "button", "aria-label": `copy: ${text.label}` }, "copy");
  button.addEventListener("click", () => copy(button, code));
  return make("div", { class: "tk-text" }, make("b", {}, text.label), code, button);
}
function render({ model, el }) {
  const root = make("div", { class: "tk-charts" });
  el.append(make("style", {}, STYLE), root);
  function draw() {
    const view = JSON.parse(model.get("view")), focused = [...root.querySelectorAll("[tabindex]")].indexOf(document.activeElement);
    const names = new Set(view.charts.map((chart) => chart.lines.map((line) => line.label).join("\n"))), isShared = names.size === 1;
    const click = (key) => { model.set("clicked", [key, (model.get("clicked")[1] || 0) + 1]); model.save_changes(); };
    root.replaceChildren(...[isShared ? legend(view.charts) : null, make("div", { class: view.charts.length === 4 ? "tk-grid tk-four" : "tk-grid" }, ...view.charts.map((chart) => chart.bars.length ? barChart(chart, click) : lineChart(chart, !isShared))),
      ...view.notes.map((note) => make("p", { class: "tk-note" }, note)), ...view.texts.map(copyText)].filter(Boolean));
    if (focused >= 0) root.querySelectorAll("[tabindex]")[focused]?.focus({ preventScroll: true });
  }
  model.on("change:view", draw);
  draw();
  return () => model.off("change:view", draw);
}
export default { render };
