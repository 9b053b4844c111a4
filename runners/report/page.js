// The page: a run is chosen when there are several; everything below is drawn from its data.
const RUNS = JSON.parse(document.getElementById("data").textContent);
const state = { x: null, y: null, model: null, ask: null };
const slots = {};

const trialName = number => "trial" + String(number).padStart(4, "0");
const modelOf = (run, name) => name === "dense" ? run.dense : run.models.find(entry => entry.name === name);
const isTuned = entry => entry.name.includes("+");
const best = entries => entries.reduce((top, entry) => !top || entry.score > top.score ? entry : top, null);
const knows = (run, key) => run.front.every(entry => entry[key] !== undefined);
const costsOf = run => COSTS.filter(key => knows(run, key) && run.dense[key] !== undefined);
const scoresOf = run => SCORES.filter(key => knows(run, key));
// A latency budget is judged by the upper end of the interval, as the search does.
const judged = (entry, cost) => cost === "latency_ms" ? entry.latency_high_ms ?? entry.latency_ms : entry[cost];

function prepare(run) {
  run.models = [...run.front, ...run.finetuned];
  const place = new Map(run.trials.number.map((number, i) => [trialName(number), i]));
  for (const entry of run.front) {
    const value = run.trials.value[place.get(entry.name)];
    if (run.guide !== "score" && value !== undefined && value !== null) entry.guide = value;
  }
  if (run.guide === "fidelity") run.dense.guide = 0;  // nothing differs from itself
}
function choose(name) {
  state.model = name;
  for (const part of ["answer", "front", "widths", "models"]) redraw(part);
}
function redraw(part) { slots[part].node.replaceChildren(...[slots[part].draw()].flat()); }
function slot(part, draw) {
  slots[part] = { node: el("div"), draw };
  redraw(part);
  return slots[part].node;
}
function openRun(index) {
  const run = RUNS[index];
  LABELS.guide = `${run.guide} in the search`;
  [LABELS.score, LABELS.test] = [`${run.score_name} (search split)`, `${run.score_name} (test split)`];
  Object.assign(state, { x: run.objective, y: "score", model: run.picked, ask: null });
  const sections = [
    heading(run), tiles(run), answerSection(run), frontSection(run), widthsSection(run),
    modelsSection(run), el("div", { class: "pair" }, historySection(run), sensitivitySection(run), importanceSection(run), predictionSection(run)),
    trialsSection(run), frozenSection(run), detailsSection(run),
  ];
  document.getElementById("run").replaceChildren(...sections.filter(Boolean));
}

// What was searched and on what.
function heading(run) {
  const { search } = run;
  const budget = Object.entries(search.budget).map(([key, value]) => `${key} at most ${value}`).join(", ");
  const what = search.mode === "front" ? `the front of score against ${label(run.objective)}` : `the best model with ${budget}`;
  const ended = run.trials.number.length;
  return el("header", {}, el(RUNS.length > 1 ? "h2" : "h1", {}, run.name),
    el("p", { class: "note" }, [`A search for ${what}${search.mode === "front" && budget ? " within " + budget : ""}: ${ended} trials, ` +
      `${run.groups.length} groups, criterion ${search.criterion}, compensation ${search.compensation}.`, hardware(run)].join(" ")));
}
function hardware(run) {
  const { machine, target } = run, said = [];
  if (machine.cpu) said.push(`It ran on ${machine.gpu ? machine.gpu + ", " : ""}${machine.cpu} with ${machine.cores} cores.`);
  if (target.target) said.push(`Latency was measured with ${[target.target, target.version].filter(Boolean).join(" ")}` +
    `${target.host ? " on " + target.host : ""}${target.device ? " on " + target.device : ""}${target.precision ? " in " + target.precision : ""}.`);
  return said.join(" ");
}
function tiles(run) {
  const picked = modelOf(run, run.picked), { dense } = run;
  const tile = (value, text) => el("div", { class: "tile" }, el("b", {}, value), el("span", {}, text));
  const found = [tile(picked.name, `the picked model${isTuned(picked) ? ", fine-tuned" : ""}: ${run.picked_by}`)];
  const score = picked.test !== undefined ? "test" : "score";
  found.push(tile(shown(score, picked[score]), `${label(score)}${dense[score] === undefined ? "" : `, dense ${shown(score, dense[score])}`}`));
  for (const key of costsOf(run).filter(key => key !== "memory_bytes" && key !== "size_bytes"))
    found.push(tile(percent(picked[key] / dense[key]), `of the dense model's ${label(key)}: ${shown(key, picked[key])}`));
  found.push(tile(duration(totalSeconds(run)), `for ${run.trials.number.length} trials`));
  return el("div", { class: "tiles" }, found);
}
const duration = seconds => seconds < 100 ? seconds.toFixed(0) + " s" : seconds < 6000 ? (seconds / 60).toFixed(1) + " min" : (seconds / 3600).toFixed(1) + " h";

// "I have this much": the best model of the front that holds a limit.
function questions(run) {
  return costsOf(run).flatMap(key => {
    const absolute = { key, absolute: true, scale: run.dense[key], text: key === "latency_ms" ? "ms of latency" : `${label(key)}, absolute` };
    const share = { key, absolute: false, scale: 100, text: `% of the dense model's ${label(key)}` };
    return key === "latency_ms" ? [absolute, share] : [share, absolute];
  });
}
function firstQuestion(run) {
  const all = questions(run), index = all.findIndex(question => question.key === run.objective);
  const limit = run.limits[run.objective] ?? judged(modelOf(run, run.picked), run.objective) * 1.001;
  return { index, share: limit / run.dense[run.objective] };
}
function answerSection(run) {
  state.ask = firstQuestion(run);
  const all = questions(run);
  const asked = () => all[state.ask.index];
  const written = () => Number((state.ask.share * asked().scale).toPrecision(4));
  const number = el("input", { type: "number", min: 0, step: "any", "aria-label": "limit", value: written() });
  const slider = el("input", { type: "range", min: 0, max: 1.05, step: 0.001, "aria-label": "limit as a share of the dense model", value: state.ask.share });
  const kind = el("select", { "aria-label": "what is limited", onchange: () => { state.ask.index = Number(kind.value); number.value = written(); answerAgain(); } },
    all.map((question, i) => el("option", { value: i, selected: i === state.ask.index }, question.text)));
  function answerAgain() {
    const found = within(run, asked().key, state.ask.share);
    choose(found && found.name);
  }
  number.addEventListener("input", () => {
    const value = parseFloat(number.value);
    if (!(value >= 0)) return;
    state.ask.share = value / asked().scale;
    slider.value = state.ask.share;
    answerAgain();
  });
  slider.addEventListener("input", () => { state.ask.share = Number(slider.value); number.value = written(); answerAgain(); });
  return section("Which model should I take?",
    el("div", { class: "controls" }, el("label", {}, "I have", number, kind), slider), slot("answer", () => answer(run, asked())));
}
function within(run, cost, share) {
  return best(run.models.filter(entry => judged(entry, cost) <= share * run.dense[cost] * (1 + 1e-9)));
}
function answer(run, { key }) {
  const { share } = state.ask, limit = share * run.dense[key];
  const flag = { memory_bytes: "memory", size_bytes: "size", latency_ms: "latency" }[key] || key;
  if (state.model === null) {
    const least = Math.min(...run.models.map(entry => judged(entry, key)));
    const bound = key === "latency_ms" ? `${Number(limit.toPrecision(3))}ms` : `${Number((100 * share).toPrecision(3))}%`;
    return el("div", { class: "answer none" }, el("strong", {}, `No model of this run is within ${shown(key, limit)}.`),
      note(`The least ${label(key)} on its front is ${shown(key, least)} (${percent(least / run.dense[key])} of the dense model). Search with that budget:`),
      command(`prunefront search task=... budget.${flag}=${bound}`));
  }
  const entry = modelOf(run, state.model);
  const told = [...scoresOf(run), ...costsOf(run)].map(name => `${label(name)} ${shown(name, entry[name])}${bracketed(against(name, entry[name], run.dense[name]))}`);
  return el("div", { class: "answer" }, el("strong", {}, entry.name + (entry.name === run.picked ? ", the picked model" : "") + (isTuned(entry) ? ", fine-tuned" : "")),
    note(told.join(" · ")),
    entry.warnings.map(text => note("Latency: " + text)),
    command(entry.load),
    isTuned(entry) || run.again === null ? null : command(`prunefront finetune ${quoted(run.path)} pick=${entry.name} ${run.again}`.trim()),
    command(`prunefront export ${quoted(run.path)} pick=${entry.name} format=onnx${entry.modules}`));
}
const bracketed = text => text ? ` (${text})` : "";

// The front of score against cost, with all trials behind it where both are known of them.
function frontSection(run) {
  const pick = (key, title, options) => choice(title, options, state[key], value => { state[key] = value; redraw("front"); });
  return section("Front",
    el("div", { class: "controls" }, pick("y", "up", scoresOf(run)), pick("x", "across", costsOf(run))), slot("front", () => frontChart(run)));
}
function modelText(run, entry) {
  const keys = [...scoresOf(run), ...costsOf(run), "latency_predicted_ms"].filter(key => entry[key] !== undefined);
  const lines = keys.map(key => `${label(key)}  ${shown(key, entry[key])}${bracketed(against(key, entry[key], run.dense[key]))}`);
  if (entry.latency_low_ms !== undefined) lines.push(`latency, 95 % interval  ${shown("_ms", entry.latency_low_ms)} to ${shown("_ms", entry.latency_high_ms)}`);
  return [entry.name || "dense", ...lines].join("\n");
}
function trialText(run, i) {
  const costs = COSTS.filter(key => run.trials[key]).map(key => `${label(key)}  ${shown(key, run.trials[key][i])}${bracketed(against(key, run.trials[key][i] ?? undefined, run.dense[key]))}`);
  const { state: said, value } = run.trials;
  return [trialName(run.trials.number[i]) + (said[i] === "estimate" ? " (given up early: an estimate)" : ""), `${run.guide}  ${shown("guide", value[i])}`, ...costs].join("\n");
}
// A few failed candidates far below would leave no room for what matters.
function withoutWorst(points) {
  const values = points.map(point => point.y).sort((a, b) => a - b);
  return points.filter(point => point.y >= values[Math.floor(values.length * 0.1)]);
}
function frontChart(run) {
  const { x, y } = state, { trials } = run;
  const guided = y === "guide" || (y === "score" && run.guide === "score");
  const dots = guided && trials[x] ? trials.number.map((_, i) => ({ x: trials[x][i], y: trials.value[i], i })).filter(p => p.y !== null) : [];
  const models = run.front.map(entry => ({ x: entry[x], y: entry[y], entry, ...(x === "latency_ms" && entry.latency_low_ms !== undefined ? { low: entry.latency_low_ms, high: entry.latency_high_ms } : {}) }));
  const sorted = [...models].sort((a, b) => a.x - b.x);
  const tuned = run.finetuned.map(entry => ({ x: entry[x], y: entry[y], entry })).filter(point => point.y !== undefined);
  const dense = { x: run.dense[x], y: run.dense[y] };
  const uniform = dots.filter(point => trials.number[point.i] === run.uniform);
  const [ring, chosen] = [run.picked, state.model].map(name => [...models, ...tuned].filter(point => point.entry.name === name));
  const rules = run.limits[x] === undefined ? [] : [{ x: run.limits[x], class: "limit", text: "budget" }];
  const asked = questions(run)[state.ask.index];
  const away = run.limits[x] === undefined ? 1 : Math.abs(state.ask.share * run.dense[x] / run.limits[x] - 1);
  if (asked.key === x && away > 0.02) rules.push({ x: state.ask.share * run.dense[x], class: "reference", text: "asked" });
  const tested = y === "score" && knows(run, "test") ? models.map(point => ({ ...point, y: point.entry.test, low: undefined })) : [];
  const text = point => modelText(run, point.entry);
  const known = [...models, ...tuned, ...tested, ...uniform, dense];
  const shownDots = withoutWorst(dots);
  const marks = [
    { points: shownDots, shape: "circle", size: 2.5, class: "trials", tip: point => trialText(run, point.i), click: point => showTrial(run, point.i) },
    { points: sorted, line: "straight", class: "front" },
    { points: tested, shape: "square", size: 3.5, class: "tested", tip: text, click: point => choose(point.entry.name) },
    ...tuned.map(point => ({ points: [...models.filter(({ entry }) => point.entry.name.startsWith(entry.name + "+")), point], line: "straight", class: "tuned" })),
    { points: tuned, shape: "diamond", size: 6, class: "tuned", tip: text, click: point => choose(point.entry.name) },
    { points: [dense], shape: "star", size: 8, class: "dense", tip: () => modelText(run, run.dense) },
    { points: models, shape: "circle", size: 5, class: "front", tip: text, click: point => choose(point.entry.name) },
    { points: uniform, shape: "diamond", size: 5, class: "uniform", tip: point => "all layers alike\n" + trialText(run, point.i) },
    { points: ring, shape: "circle", size: 9, class: "picked" },
    { points: chosen, shape: "circle", size: 12, class: "chosen" },
  ];
  const xs = [...shownDots, ...known].map(point => point.x), ys = [...shownDots, ...known].map(point => point.y);
  return [chart({
    x: { title: label(x), domain: domain([...xs, ...rules.slice(0, 1).map(rule => rule.x)], { floor: 0 }), format: value => short(value, 4) + (x === "latency_ms" ? " ms" : "") },
    y: { title: tested.length ? run.score_name : label(y), domain: domain(ys), format: figures }, marks, rules,
  }), legend([
    ["front", "--blue"], tuned.length ? ["diamonds: fine-tuned", "--run2"] : null, tested.length ? ["squares: the same models on the test split", "--blue"] : null, dots.length ? [`trials${shownDots.length < dots.length ? ` (${dots.length - shownDots.length} of the worst left out)` : ""}`, "--grey"] : null,
    uniform.length ? ["all layers alike", "--orange"] : null, dense.y === undefined ? null : ["dense", "--ink"], ["picked", "--red"]])];
}
function legend(entries) {
  return el("div", { class: "legend" }, entries.filter(Boolean).map(([text, color]) => el("span", {}, el("i", { style: `background:${color.startsWith("--") ? `var(${color})` : color}` }), text)));
}

// Several runs on one page: their fronts in one chart, and a table of their picks.
function comparison() {
  const shared = costs => costs.filter(key => RUNS.every(run => costsOf(run).includes(key)));
  const costs = shared(COSTS), scores = ["score", "test"].filter(key => RUNS.every(run => knows(run, key)));
  const looked = { x: costs[0], y: scores[scores.length - 1] || "score", share: true };
  const holder = el("div");
  function draw() {
    const value = (run, entry) => looked.share ? 100 * entry[looked.x] / run.dense[looked.x] : entry[looked.x];
    const marks = RUNS.flatMap((run, i) => {
      const color = `var(--run${i % 8})`, points = run.front.map(entry => ({ x: value(run, entry), y: entry[looked.y], entry, run })).sort((a, b) => a.x - b.x);
      return [
        { points, line: "straight", class: "compared", color },
        { points, shape: "circle", size: 5, class: "compared", color, tip: point => `${run.name}\n${modelText(run, point.entry)}`, click: point => { openTab(i); choose(point.entry.name); } },
        { points: [{ x: value(run, run.dense), y: run.dense[looked.y] }], shape: "star", size: 7, class: "compared", color, tip: () => `${run.name}\n${modelText(run, run.dense)}` },
      ];
    });
    const points = marks.flatMap(mark => mark.points);
    holder.replaceChildren(chart({
      x: { title: label(looked.x) + (looked.share ? ", % of the dense model" : ""), domain: domain(points.map(p => p.x), { floor: 0 }), format: number => short(number, 4) },
      y: { title: label(looked.y), domain: domain(points.map(p => p.y)), format: figures }, marks,
    }), legend(RUNS.map((run, i) => [run.name, `--run${i % 8}`])));
  }
  const absolute = el("select", { onchange: () => { looked.share = absolute.value === "share"; draw(); } },
    el("option", { value: "share" }, "% of each dense model"), el("option", { value: "absolute" }, "absolute"));
  draw();
  const rows = RUNS.map((run, i) => ({ run, i, picked: modelOf(run, run.picked) }));
  const columns = [
    { title: "run", value: row => row.run.name, text: row => row.run.name },
    ...(RUNS.some(run => run.differs !== "-") ? [{ title: "differs in", value: row => row.run.differs, text: row => row.run.differs, wide: true }] : []),
    { title: "pick", value: row => row.run.picked, text: row => row.run.picked },
    ...["score", "test", ...COSTS].filter(key => rows.some(row => row.picked[key] !== undefined)).map(key => metricColumn(key, row => row.picked, row => row.run.dense)),
    { title: "trials", value: row => row.run.trials.number.length, text: row => String(row.run.trials.number.length) },
    { title: "time", value: row => totalSeconds(row.run), text: row => duration(totalSeconds(row.run)) },
  ];
  return section("Runs", el("div", { class: "controls" },
    choice("up", scores, looked.y, key => { looked.y = key; draw(); }), choice("across", costs, looked.x, key => { looked.x = key; draw(); }), el("label", {}, "as", absolute)),
    holder, table(columns, rows, { click: row => openTab(row.i) }));
}
const totalSeconds = run => Object.values(run.seconds).reduce((sum, value) => sum + value, 0);
function openTab(index) {
  document.querySelectorAll("#tabs button").forEach((button, i) => button.setAttribute("aria-pressed", i === index));
  openRun(index);
}
function start() {
  RUNS.forEach(prepare);
  const page = document.getElementById("page"), body = el("div", { id: "run" });
  if (RUNS.length > 1) {
    const tabs = el("div", { id: "tabs", class: "controls" }, RUNS.map((run, i) => el("button", { onclick: () => openTab(i) }, run.name)));
    page.replaceChildren(el("header", {}, el("h1", {}, `${RUNS.length} runs`)), comparison(), tabs, body);
    openTab(0);
  } else {
    page.replaceChildren(body);
    openRun(0);
  }
  document.documentElement.dataset.drawn = performance.now().toFixed(0);  // ms after the page was asked for
}
