"use strict";
// Line, bar and error-bar charts as SVG. A chart's size follows its card; colours come from the style sheet.
const SVG = "http://www.w3.org/2000/svg";
const tip = document.getElementById("tip");

function make(name, attributes, parent, text) {
  const node = document.createElementNS(SVG, name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.appendChild(node);
  return node;
}

function element(name, className, text, parent) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  if (parent) parent.appendChild(node);
  return node;
}

function figure(value) {
  if (value === null || value === undefined) return "-";
  const size = Math.abs(value);
  if (size >= 1e9) return (value / 1e9).toPrecision(3) + " G";
  if (size >= 1e6) return (value / 1e6).toPrecision(3) + " M";
  if (size >= 1e4) return (value / 1e3).toPrecision(3) + " k";
  if (size !== 0 && size < 1e-3) return value.toExponential(1);
  return String(+value.toPrecision(4));
}

function ticks(low, high, wanted) {
  const raw = (high - low) / wanted, base = Math.pow(10, Math.floor(Math.log10(raw)));
  const step = [1, 2, 2.5, 5, 10].map(m => m * base).find(s => s >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

// spec: {title, unit, lines: [{name, points: [[x, y, low, high]]}], bars: bool, zero: bool, wide: bool}
function chart(spec, parent) {
  const card = element("div", "card" + (spec.wide ? " wide" : ""), undefined, parent);
  const title = element("h3", "", spec.title + " ", card);
  if (spec.unit) element("small", "", spec.unit, title);
  const width = Math.max(260, card.clientWidth - 28), height = 190, left = 46, bottom = 22, top = 10, right = 8;
  const svg = make("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": spec.title}, card);
  const range = bounds(spec);
  const x = v => left + (v - range.x0) / (range.x1 - range.x0) * (width - left - right);
  const y = v => height - bottom - (v - range.y0) / (range.y1 - range.y0) * (height - bottom - top);
  for (const value of ticks(range.y0, range.y1, 4)) {
    make("line", {x1: left, x2: width - right, y1: y(value), y2: y(value), class: "gridline"}, svg);
    make("text", {x: left - 6, y: y(value) + 4, "text-anchor": "end"}, svg, figure(value));
  }
  for (const value of ticks(range.x0, range.x1, width > 500 ? 8 : 4))
    if (Number.isInteger(value) && value >= range.first && value <= range.last)
      make("text", {x: x(value), y: height - 6, "text-anchor": "middle"}, svg, String(value));
  make("line", {x1: left, x2: width - right, y1: height - bottom, y2: height - bottom, class: "axis"}, svg);
  if (spec.bars) drawBars(spec, svg, x, y, range, (width - left - right)); else drawLines(spec, svg, x, y);
  if (spec.lines.length > 1 || spec.bars) legend(spec, card);
  hover(spec, svg, x, range, width, height, top, bottom);
}

function bounds(spec) {
  let x0 = Infinity, x1 = -Infinity, y0 = Infinity, y1 = -Infinity;
  const sums = new Map();
  for (const line of spec.lines) for (const [px, py, low, high] of line.points) {
    x0 = Math.min(x0, px); x1 = Math.max(x1, px);
    if (spec.bars) { sums.set(px, (sums.get(px) || 0) + py); continue; }
    y0 = Math.min(y0, low === undefined ? py : low); y1 = Math.max(y1, high === undefined ? py : high);
  }
  if (spec.bars) { y0 = 0; for (const sum of sums.values()) y1 = Math.max(y1, sum); }
  if (spec.zero) y0 = Math.min(0, y0);
  const first = x0, last = x1;
  if (spec.bars) { x0 -= 0.5; x1 += 0.5; }
  if (x0 === x1) { x0 -= 0.5; x1 += 0.5; }
  if (y0 === y1) { const room = Math.abs(y0) * 0.1 || 1; y1 += room; if (y0 !== 0) y0 -= room; }
  if (!spec.bars && !(spec.zero && y0 === 0)) y0 -= (y1 - y0) * 0.05;
  return {x0, x1, y0, y1: y1 + (y1 - y0) * 0.05, first, last};
}

const colour = i => `var(--c${i % 8})`;

function drawLines(spec, svg, x, y) {
  spec.lines.forEach((line, i) => {
    const path = line.points.map(([px, py], k) => (k ? "L" : "M") + x(px).toFixed(1) + " " + y(py).toFixed(1)).join("");
    make("path", {d: path, fill: "none", "stroke-width": 1.6, style: `stroke:${colour(i)}`, "stroke-linejoin": "round"}, svg);
    for (const [px, py, low, high] of line.points) {
      if (low !== undefined) {
        const at = x(px).toFixed(1), up = y(high).toFixed(1), down = y(low).toFixed(1);
        make("path", {d: `M${at} ${up}V${down}M${at - 3.5} ${up}h7M${at - 3.5} ${down}h7`, class: "error", style: `stroke:${colour(i)}`}, svg);
      }
      if (low !== undefined || line.points.length < 40)
        make("circle", {cx: x(px).toFixed(1), cy: y(py).toFixed(1), r: 2.4, style: `fill:${colour(i)}`}, svg);
    }
  });
}

function drawBars(spec, svg, x, y, range, width) {
  const each = width / (range.x1 - range.x0), room = each > 3 ? each * 0.8 : each;
  const base = new Map();
  spec.lines.forEach((line, i) => {
    let path = "";
    for (const [px, py] of line.points) {
      const from = base.get(px) || 0;
      base.set(px, from + py);
      if (py > 0) path += `M${(x(px) - room / 2).toFixed(1)} ${y(from).toFixed(1)}h${room.toFixed(2)}V${y(from + py).toFixed(1)}h${(-room).toFixed(2)}z`;
    }
    make("path", {d: path, style: `fill:${colour(i)}`}, svg);
  });
}

function legend(spec, card) {
  const box = element("div", "legend", undefined, card);
  spec.lines.forEach((line, i) => {
    const item = element("span", "", undefined, box);
    element("i", "", undefined, item).style.background = colour(i);
    item.appendChild(document.createTextNode(line.name));
  });
}

function hover(spec, svg, x, range, width, height, top, bottom) {
  const steps = [...new Set(spec.lines.flatMap(line => line.points.map(p => p[0])))].sort((a, b) => a - b);
  const at = spec.lines.map(line => new Map(line.points.map(p => [p[0], p])));
  const mark = make("line", {y1: top, y2: height - bottom, class: "mark", visibility: "hidden"}, svg);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), wanted = (event.clientX - box.left) / box.width * width;
    let best = steps[0];
    for (const step of steps) if (Math.abs(x(step) - wanted) < Math.abs(x(best) - wanted)) best = step;
    mark.setAttribute("x1", x(best)); mark.setAttribute("x2", x(best)); mark.setAttribute("visibility", "visible");
    const words = spec.lines.map((line, i) => [line, at[i].get(best)]).filter(pair => pair[1]).map(([line, p]) =>
      `${line.name}: ${figure(p[1])}` + (p[2] === undefined ? "" : ` (${figure(p[2])} to ${figure(p[3])})`));
    tip.textContent = [`step ${best}`, ...words].join("\n");
    tip.hidden = false;
    tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)) + "px";
    tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; mark.setAttribute("visibility", "hidden"); });
}
