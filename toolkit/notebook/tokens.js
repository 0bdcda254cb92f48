// The tokens of toolkit.notebook.token_model on one canvas: only what is on the screen is drawn. No build step.
const STYLE = `
.tk-tokens { color: var(--jp-ui-font-color1, inherit); font: 12px system-ui, sans-serif; position: relative; --tk-line: color-mix(in srgb, currentColor 22%, transparent); }
.tk-scroll { position: relative; overflow-y: scroll; border: 1px solid var(--tk-line); }
.tk-scroll:focus-visible { outline: 2px solid currentColor; }
.tk-scroll canvas { position: sticky; top: 0; left: 0; display: block; }
.tk-tip { position: absolute; pointer-events: none; background: var(--jp-layout-color1, Canvas); color: var(--jp-ui-font-color1, CanvasText); border: 1px solid currentColor; border-radius: 3px; padding: 4px 8px; font: 12px ui-monospace, monospace; white-space: pre; z-index: 10; visibility: hidden; box-shadow: 0 1px 4px rgba(0,0,0,.35); }
.tk-tools { display: flex; gap: 10px; align-items: center; flex-wrap: wrap; margin: 4px 0; }
.tk-tools button { font: inherit; color: inherit; background: transparent; border: 1px solid currentColor; border-radius: 3px; cursor: pointer; }
.tk-tools button:disabled { opacity: .4; cursor: default; }
.tk-ramp { width: 150px; height: 12px; display: inline-block; border: 1px solid var(--tk-line); vertical-align: middle; }
.tk-mark { padding: 0 5px; margin-right: 6px; border: 1px solid var(--tk-line); color: #000; }
.tk-said { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }`;
const UP = [0, 114, 178], DOWN = [213, 94, 0], ONE = [204, 121, 167], MARKS = [[230, 159, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66], [204, 121, 167], [213, 94, 0], [0, 114, 178]];
const FONT = 13, LINE = 19, HEAD = 18, GAP = 10, PAD = 8, TALLEST = 460;
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) { if (name.startsWith("on")) node.addEventListener(name.slice(2), value); else if (value !== null && value !== false) node.setAttribute(name, value); }
  node.append(...children);
  return node;
}
const shown = (value) => value === null || value === undefined || value === "" ? "–" : typeof value === "number" && !Number.isInteger(value)
  ? (Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)))) : String(value);
function rgb(text) { const numbers = text.match(/[\d.]+/g); return numbers ? numbers.slice(0, 3).map(Number) : [0, 0, 0]; }
// How much of which colour lies over the background: [colour, share].
function tint(value, scale) {
  if (scale.kind === "status") { const index = value ? scale.names.indexOf(String(value)) : -1; return index < 0 ? null : [MARKS[index % MARKS.length], .85]; }
  if (typeof value !== "number") return null;
  if (scale.kind === "two ways") { const share = Math.max(-1, Math.min(1, (value - scale.center) / scale.reach)); return [share > 0 ? UP : DOWN, Math.abs(share)]; }
  if (scale.kind === "one way") { let share = Math.max(0, Math.min(1, (value - scale.low) / (scale.high - scale.low || 1))); if (scale.is_reversed) share = 1 - share; return [ONE, share]; }
  return null;
}
const mixed = (color, share, back) => color.map((channel, index) => Math.round(channel * share * .85 + back[index] * (1 - share * .85)));
const isLight = ([red, green, blue]) => (.299 * red + .587 * green + .114 * blue) > 120;
function render({ model, el }) {
  const records = JSON.parse(model.get("data"));
  const canvas = make("canvas"), space = make("div"), scroll = make("div", { class: "tk-scroll", tabindex: 0, role: "application", "aria-label": "Tokens of completions. Arrow keys move over tokens, n and p go to the worst ones." });
  const tip = make("div", { class: "tk-tip", role: "tooltip" }), said = make("div", { class: "tk-said", "aria-live": "polite" });
  const legend = make("span"), state = make("span", { role: "status" });
  const next = make("button", { type: "button", title: "the next of the worst tokens (n)", onclick: () => jump(1) }, "next worst token"), previous = make("button", { type: "button", title: "the one before (p)", onclick: () => jump(-1) }, "previous");
  const root = make("div", { class: "tk-tokens" }, make("div", { class: "tk-tools" }, legend, previous, next, state), scroll, tip, said);
  scroll.append(canvas, space);
  el.append(make("style", {}, STYLE), root);
  const context = canvas.getContext("2d");
  let view = JSON.parse(model.get("view")), blocks = [], boxes = [], height = 0, cursor = null, rank = -1, back = [255, 255, 255], front = [0, 0, 0], frameWanted = 0;
  const widths = new Map();
  const widthOf = (text) => { let width = widths.get(text); if (width === undefined) { width = context.measureText(text).width; widths.set(text, width); } return width; };
  function fitted(text, width) {
    if (context.measureText(text).width <= width) return text;
    let end = text.length;
    while (end > 1 && context.measureText(text.slice(0, end) + "…").width > width) end--;
    return text.slice(0, end) + "…";
  }
  const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥");
  // Boxes of one completion: [x, y, width, position], in rows from y on; returns the height.
  function layout(index, left, top, width) {
    const record = records[index], at = { index, left, top, width, first: boxes.length };
    let x = left, y = top + HEAD;
    record.tokens.text.forEach((text, position) => {
      for (const piece of text ? text.split(/(?<=\n)/) : [text]) {
        const seen = visible(piece), size = Math.min(width, Math.max(4, widthOf(seen)));
        if (x + size > left + width && x > left) { x = left; y += LINE; }
        boxes.push([x, y, size, position, index, seen]);
        x += size;
        if (piece.endsWith("\n")) { x = left; y += LINE; }
      }
    });
    at.last = boxes.length; at.height = y + LINE - top;
    blocks.push(at);
    return at.height;
  }
  function arrange() {
    context.font = `${FONT}px ui-monospace, monospace`;
    blocks = []; boxes = [];
    const full = Math.max(200, scroll.clientWidth - 2 * PAD - 14);
    let y = PAD;
    if (view.is_grouped) {
      const groups = new Map();
      for (const index of view.chosen) { const key = records[index].group; if (!groups.has(key)) groups.set(key, []); groups.get(key).push(index); }
      for (const members of groups.values()) {
        const columns = Math.max(1, Math.min(members.length, Math.floor(full / 240))), width = (full - GAP * (columns - 1)) / columns;
        for (let start = 0; start < members.length; start += columns) {
          const tallest = Math.max(...members.slice(start, start + columns).map((index, column) => layout(index, PAD + column * (width + GAP), y, width)));
          y += tallest + GAP;
        }
        y += GAP;
      }
    } else for (const index of view.chosen) y += layout(index, PAD, y, full) + GAP;
    height = y;
    scroll.style.height = `${Math.max(60, Math.min(TALLEST, height + 4))}px`;
    space.style.height = `${Math.max(0, height - scroll.clientHeight)}px`;
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(scroll.clientWidth * ratio); canvas.height = Math.round(scroll.clientHeight * ratio);
    canvas.style.width = `${scroll.clientWidth}px`; canvas.style.height = `${scroll.clientHeight}px`;
  }
  function colors() {
    let node = scroll, found = "rgba(0, 0, 0, 0)";
    while (node && /rgba\(.*, 0\)|transparent/.test(found)) { found = getComputedStyle(node).backgroundColor; node = node.parentElement || (node.getRootNode().host ?? null); }
    back = /rgba\(.*, 0\)|transparent/.test(found) ? [255, 255, 255] : rgb(found);
    front = rgb(getComputedStyle(root).color);
    if (isLight(front) === isLight(back)) front = isLight(back) ? [0, 0, 0] : [255, 255, 255];
  }
  function draw() {
    frameWanted = 0;
    const ratio = window.devicePixelRatio || 1, top = scroll.scrollTop, bottom = top + scroll.clientHeight;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, scroll.clientWidth, scroll.clientHeight);
    context.textBaseline = "middle";
    const wanted = view.text.toLowerCase();
    for (const block of blocks) {
      if (block.top > bottom || block.top + block.height < top) continue;
      const record = records[block.index], values = record.tokens[view.signal] || [];
      context.font = "11px system-ui, sans-serif";
      context.fillStyle = `rgba(${front}, .72)`;
      context.fillText(fitted(record.title, block.width), block.left, block.top + HEAD / 2 - top);
      context.font = `${FONT}px ui-monospace, monospace`;
      for (let at = block.first; at < block.last; at++) {
        const [x, y, width, position, , seen] = boxes[at];
        if (y > bottom || y + LINE < top) continue;
        const colored = tint(values[position], view.scale), mark = (record.tokens.status || [])[position];
        let ground = back;
        if (colored) { ground = mixed(colored[0], colored[1], back); context.fillStyle = `rgb(${ground})`; context.fillRect(x, y + 1 - top, width, LINE - 3); }
        context.fillStyle = isLight(ground) ? "#000" : "#fff";
        context.fillText(seen, x, y + LINE / 2 - top, width);
        context.fillStyle = `rgb(${front})`;
        if (mark) for (let dot = x; dot < x + width - 1; dot += 4) context.fillRect(dot, y + LINE - 2 - top, 2, 1.5);
        if (wanted && record.tokens.text[position].toLowerCase().includes(wanted)) context.fillRect(x, y + LINE - 2 - top, width, 1.5);
        if (cursor === at) { context.strokeStyle = `rgb(${front})`; context.lineWidth = 2; context.strokeRect(x - .5, y - top, width + 1, LINE - 1); }
      }
    }
  }
  const later = () => { if (!frameWanted) frameWanted = requestAnimationFrame(draw); };
  function fields(at) {
    const [, , , position, index] = boxes[at], tokens = records[index].tokens;
    const names = [view.signal, ...Object.keys(tokens).filter((name) => name !== view.signal && name !== "text")].filter((name) => tokens[name]);
    return [`${JSON.stringify(tokens.text[position])}  position ${position}`, ...names.map((name) => `${name.padEnd(12)}${shown(tokens[name][position])}`)].join("\n");
  }
  function point(at, speak) {
    cursor = at;
    if (at === null) { tip.style.visibility = "hidden"; later(); return; }
    const [x, y, , ] = boxes[at];
    tip.textContent = fields(at);
    if (speak) said.textContent = tip.textContent;
    const left = Math.max(0, Math.min(scroll.clientWidth - tip.offsetWidth - 4, x)), line = y - scroll.scrollTop;
    const above = line + LINE + 4 + tip.offsetHeight > scroll.clientHeight && line > tip.offsetHeight;
    tip.style.left = `${left}px`; tip.style.top = `${scroll.offsetTop + (above ? line - tip.offsetHeight - 2 : line + LINE + 2)}px`;
    tip.style.visibility = "visible";
    later();
  }
  function atPoint(event) {
    const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top + scroll.scrollTop;
    for (const block of blocks) if (y >= block.top && y <= block.top + block.height && x >= block.left && x <= block.left + block.width)
      for (let at = block.first; at < block.last; at++) { const one = boxes[at]; if (x >= one[0] && x < one[0] + one[2] && y >= one[1] && y < one[1] + LINE) return at; }
    return null;
  }
  function reveal(at, speak = true) {
    const y = boxes[at][1];
    if (y < scroll.scrollTop + HEAD || y + LINE > scroll.scrollTop + scroll.clientHeight) scroll.scrollTop = Math.max(0, y - scroll.clientHeight / 3);
    point(at, speak);
  }
  function jump(by) {
    if (!view.worst.length) return;
    rank = (rank + by + view.worst.length) % view.worst.length;
    const [index, position] = view.worst[rank], block = blocks.find((each) => each.index === index);
    for (let at = block ? block.first : 0; block && at < block.last; at++) if (boxes[at][3] === position) { reveal(at); break; }
    state.textContent = `${rank + 1} of the ${view.worst.length} worst`;
  }
  function drawLegend() {
    const scale = view.scale, css = (color, share) => `rgb(${mixed(color, share, back)})`;
    let parts = [];
    if (scale.kind === "two ways") parts = [shown(scale.center - scale.reach), " ", make("span", { class: "tk-ramp", style: `background:linear-gradient(to right, ${css(DOWN, 1)}, ${css(back, 0)}, ${css(UP, 1)})` }), " ", shown(scale.center + scale.reach)];
    else if (scale.kind === "one way") parts = [shown(scale.low), " ", make("span", { class: "tk-ramp", style: `background:linear-gradient(to right, ${scale.is_reversed ? css(ONE, 1) : css(back, 0)}, ${scale.is_reversed ? css(back, 0) : css(ONE, 1)})` }), " ", shown(scale.high)];
    else if (scale.kind === "status") parts = scale.names.map((name, index) => make("span", { class: "tk-mark", style: `background:rgb(${MARKS[index % MARKS.length]})` }, name));
    legend.replaceChildren(make("b", {}, view.label || "no values for tokens"), "  ", ...parts);
    next.disabled = previous.disabled = !view.worst.length;
  }
  function update() { view = JSON.parse(model.get("view")); rank = -1; state.textContent = ""; point(null); colors(); arrange(); scroll.scrollTop = Math.min(scroll.scrollTop, Math.max(0, height)); drawLegend(); draw(); }
  scroll.addEventListener("scroll", () => { if (cursor !== null) tip.style.visibility = "hidden"; later(); });
  scroll.addEventListener("pointermove", (event) => { const at = atPoint(event); if (at !== cursor) point(at); });
  scroll.addEventListener("pointerleave", () => point(null));
  scroll.addEventListener("blur", () => point(null));
  const rowMove = (by) => { const [x, y] = boxes[cursor ?? 0]; let best = null; for (let at = 0; at < boxes.length; at++) { const one = boxes[at], away = (one[1] - y) * by;
    if (away > 0 && (best === null || away < (boxes[best][1] - y) * by || (one[1] === boxes[best][1] && Math.abs(one[0] - x) < Math.abs(boxes[best][0] - x)))) best = at; } return best ?? cursor ?? 0; };
  const keys = { ArrowRight: () => reveal(Math.min(boxes.length - 1, cursor === null ? 0 : cursor + 1)), ArrowLeft: () => reveal(Math.max(0, (cursor ?? 1) - 1)), ArrowDown: () => reveal(rowMove(1)), ArrowUp: () => reveal(rowMove(-1)),
    Home: () => reveal(0), End: () => reveal(boxes.length - 1), n: () => jump(1), p: () => jump(-1), Escape: () => point(null) };
  scroll.addEventListener("keydown", (event) => { if (keys[event.key] && boxes.length && !event.ctrlKey && !event.metaKey) { event.preventDefault(); event.stopPropagation(); keys[event.key](); } });
  const watcher = new ResizeObserver(() => { arrange(); later(); });
  watcher.observe(scroll);
  model.on("change:view", update);
  requestAnimationFrame(update);
  return () => { watcher.disconnect(); model.off("change:view", update); };
}
export default { render };
