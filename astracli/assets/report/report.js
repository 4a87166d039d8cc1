"use strict";
// Fills the page from the JSON inside it, and shows the samples that pass the filters.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);
const PAGE = 25;

function setTheme(name) { document.documentElement.dataset.theme = name; }
setTheme(location.hash === "#dark" || (location.hash !== "#light" && matchMedia("(prefers-color-scheme: dark)").matches) ? "dark" : "light");
byId("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));

function bytes(count) { return figure(count) + (count >= 1e4 ? "B" : " B"); }

function drawHead() {
  const run = data.run;
  byId("state").textContent = [run.state, run.cause, run.recipe && "recipe " + run.recipe, run.started && "started " + run.started, run.from && "from the weights of " + run.from, ...(run.changes || []).map((line) => "changed " + line)].filter(Boolean).join(" · ");
  if (run.last_lines && run.last_lines.length) byId("state").after(element("pre", "note", run.last_lines.join("\n")));
  for (const tile of data.tiles) {
    const box = element("div", "tile", undefined, byId("tiles"));
    element("span", "", tile.label, box); element("b", "", tile.value, box); element("span", "", tile.note, box);
  }
}

function drawCharts() {
  for (const id of ["benchmarks", "curves", "time", "weights"]) byId(id).querySelector(".grid").textContent = "";
  const grid = id => byId(id).querySelector(".grid");
  for (const e of data.evals) chart({title: e.benchmark, unit: `${e.items} items${e.grader ? ", graded by " + e.grader : ""}${e.late ? "; steps " + e.late : ""}`, lines: [
    {name: `avg@${e.n}`, points: e.points.map(p => [p.step, p.avg, p.low, p.high])},
    {name: `pass@${e.k}`, points: e.points.map(p => [p.step, p.pass])}]}, grid("benchmarks"));
  for (const c of data.curves) chart(c, grid("curves"));
  const phases = data.phases;
  if (phases.names) chart({title: "Trainer, each step", unit: "seconds", bars: true, wide: true, lines: phases.names.map((name, i) =>
    ({name, points: phases.steps.map((step, k) => [step, phases.seconds[i][k]])}))}, grid("time"));
  const wall = Object.entries(data.wall);
  if (wall.length) {
    const card = element("div", "card wide", undefined, grid("time"));
    element("h3", "", "The whole run", card);
    const table = element("table", "", undefined, card), total = wall.reduce((sum, w) => sum + w[1], 0) || 1;
    for (const [name, seconds] of wall) row(table, [name, seconds.toFixed(1) + " s", (100 * seconds / total).toFixed(1) + " %"]);
  }
  const w = data.weights;
  if (w.lines.length) chart({title: "Engine pause of an update", unit: "ms", zero: true, lines: w.lines}, grid("weights"));
  byId("transfer").textContent = w.count ? `${w.count} updates (${Object.entries(w.kinds).map(k => k[1] + " " + k[0]).join(", ")}), ${bytes(w.bytes)} transferred, pause p50 ${figure(w.pause_ms_p50)} ms, longest ${figure(w.pause_ms_max)} ms` : "no update reported";
  for (const id of ["benchmarks", "curves", "time", "weights"]) if (!grid(id).children.length) element("p", "note", "nothing recorded", grid(id));
}

function row(table, cells) {
  const line = element("tr", "", undefined, table);
  for (const cell of cells) element("td", "", cell, line);
}

function flat(value, prefix, rows) {
  for (const key in value) {
    const inner = value[key], name = prefix + key;
    if (inner !== null && typeof inner === "object" && !Array.isArray(inner)) flat(inner, name + ".", rows);
    else rows.push([name, Array.isArray(inner) ? inner.join(", ") : String(inner)]);
  }
  return rows;
}

async function unpack() {
  const raw = atob(byId("packed").textContent), blob = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) blob[i] = raw.charCodeAt(i);
  const stream = new Blob([blob]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const view = {s: null, found: [], page: 0};
const text = (column, i) => view.s.texts[view.s[column][i]];

function completion(i) {
  const given = view.s.completion[i];
  return given !== null ? view.s.texts[given] : view.s.tokens[i].map(t => view.s.vocabulary[t]).join("");
}

function meanLogprob(i) {
  const values = view.s.logprobs[i].filter(value => value !== null);
  return values.length ? -values.reduce((a, b) => a + b, 0) / values.length / 100 : 0;
}

function options(select, values, first) {
  for (const [value, words] of [["", first], ...values.map(v => [v, v])]) {
    const option = element("option", "", words, select);
    option.value = value;
  }
}

function apply() {
  const f = byId("filters").elements, s = view.s, wanted = f.text.value.toLowerCase();
  const low = f.low.value === "" ? -Infinity : +f.low.value, high = f.high.value === "" ? Infinity : +f.high.value;
  view.found = [];
  for (let i = 0; i < s.step.length; i++) {
    if (f.verdict.value && text("verdict", i) !== f.verdict.value) continue;
    if (f.benchmark.value && (text("benchmark", i) || "rollout") !== f.benchmark.value) continue;
    if (f.finish.value && text("finish_reason", i) !== f.finish.value) continue;
    if (s.step[i] < low || s.step[i] > high) continue;
    if (wanted && !(text("problem", i) + "\n" + text("answer", i) + "\n" + completion(i)).toLowerCase().includes(wanted)) continue;
    view.found.push(i);
  }
  const keys = {long: i => -s.length[i], unlikely: meanLogprob, advantage: i => -Math.abs(s.advantage[i] || 0)};
  const key = keys[f.order.value];
  if (key) { const cache = new Map(view.found.map(i => [i, key(i)])); view.found.sort((a, b) => cache.get(a) - cache.get(b)); }
  view.page = 0;
  show();
}

function show() {
  const pages = Math.max(1, Math.ceil(view.found.length / PAGE)), s = view.s;
  const kept = s.step.length < s.total ? ` (the page holds ${s.step.length.toLocaleString("en")} of the run's ${s.total.toLocaleString("en")} samples, evenly spread)` : "";
  byId("count").textContent = `${view.found.length.toLocaleString("en")} of ${s.step.length.toLocaleString("en")} samples${kept}`;
  byId("page").textContent = `page ${view.page + 1} of ${pages}`;
  byId("before").disabled = view.page === 0;
  byId("after").disabled = view.page >= pages - 1;
  scale();
  const list = byId("list");
  list.textContent = "";
  for (const i of view.found.slice(view.page * PAGE, (view.page + 1) * PAGE)) list.appendChild(card(i));
}

function scale() {
  const box = byId("scale"), kind = byId("filters").elements.colour.value;
  box.textContent = "";
  if (kind === "none") return;
  box.appendChild(document.createTextNode(kind === "logprob" ? "log p 0" : "advantage -2"));
  element("i", "", undefined, box).style.background = kind === "logprob"
    ? "linear-gradient(90deg,rgba(var(--heat),0),rgba(var(--heat),.75))"
    : "linear-gradient(90deg,rgba(var(--heat),.6),rgba(var(--heat),0),rgba(var(--cool),.6))";
  box.appendChild(document.createTextNode(kind === "logprob" ? "-5" : "+2"));
}

function shade(kind, logprob, advantage) {
  if (kind === "logprob") { const a = Math.min(logprob / 500, 1) * 0.75; return a > 0.015 ? `rgba(var(--heat),${a.toFixed(2)})` : ""; }
  if (kind === "advantage" && advantage) return `rgba(var(${advantage > 0 ? "--cool" : "--heat"}),${(Math.min(Math.abs(advantage) / 2, 1) * 0.6).toFixed(2)})`;
  return "";
}

function card(i) {
  const s = view.s, box = element("article", "sample"), head = element("div", "head", undefined, box);
  const verdict = text("verdict", i);
  element("span", "verdict " + verdict, String(verdict).replace("_", " "), head);
  const facts = [text("benchmark", i) || "rollout", s.step[i] === null ? "" : "step " + s.step[i], "version " + s.version[i], text("problem_id", i) + " #" + s.sample[i], s.length[i] + " tokens", "ended by " + text("finish_reason", i), "reward " + s.reward[i]];
  if (s.advantage[i] !== null) facts.push("advantage " + s.advantage[i].toFixed(2));
  if (s.logprobs[i].length) facts.push("mean log p " + meanLogprob(i).toFixed(2));
  for (const fact of facts) if (fact) element("span", "", fact, head);
  element("pre", "prompt clip", text("problem", i), box);
  const body = element("pre", "clip completion", undefined, box), kind = byId("filters").elements.colour.value;
  if (s.completion[i] !== null) element("div", "", s.texts[s.completion[i]], body);
  const several = s.logprobs[i].includes(null);  // turns, and between them what the policy did not draw
  let block = body, told = null, turns = 0;
  s.tokens[i].forEach((token, k) => {
    if (several && (s.logprobs[i][k] === null) !== told) {
      told = s.logprobs[i][k] === null;
      block = element("div", told ? "between" : "turn turn" + turns++ % 4, undefined, body);
      block.title = told ? "not drawn by the policy" : "turn " + turns;
    }
    if (s.cut[i] && k === s.tokens[i].length - s.tail) element("em", "", ` … ${s.cut[i]} tokens … `, block);
    const span = element("span", "", s.vocabulary[token], block), color = shade(kind, s.logprobs[i][k] || 0, s.advantage[i]);
    if (s.logprobs[i][k] === null) { span.className = "told"; span.title = "not drawn by the policy"; return; }
    if (color) span.style.background = color;
    span.title = `${JSON.stringify(s.vocabulary[token])}  log p ${(-(s.logprobs[i][k] || 0) / 100).toFixed(2)}`;
  });
  const gold = element("pre", "", undefined, box);
  element("em", "", "answer ", gold);
  gold.appendChild(document.createTextNode(text("answer", i)));
  if (text("logged", i)) {
    const logged = element("pre", "", undefined, box);
    element("em", "", "logged ", logged);
    logged.appendChild(document.createTextNode(text("logged", i)));
  }
  return box;
}

async function drawSamples() {
  view.s = await unpack();
  const names = column => [...new Set(view.s[column].map(place => view.s.texts[place]))];
  const f = byId("filters").elements;
  options(f.verdict, names("verdict"), "any");
  options(f.benchmark, names("benchmark").map(name => name || "rollout"), "everywhere");
  options(f.finish, names("finish_reason"), "any");
  byId("filters").addEventListener("input", apply);
  byId("filters").addEventListener("submit", event => event.preventDefault());
  const turn = by => { view.page += by; show(); byId("filters").scrollIntoView(); };
  byId("before").addEventListener("click", () => turn(-1));
  byId("after").addEventListener("click", () => turn(1));
  apply();
  document.documentElement.dataset.ready = "yes";
}

drawHead();
drawCharts();
for (const cells of data.machine) row(byId("machine"), cells);
for (const cells of flat(data.recipe, "", [])) row(byId("recipe"), cells);
drawSamples();
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawCharts(); } });
