// The sections below the front: the network, tables, history, sensitivity, importance, predictions and the rest.

const KIND_CLASS = { block: "block", head: "head", kv_group: "head", head_dim: "head", hidden: "hidden" };
// Widths from input to output: a box a group, filled by the share that a model keeps.
function widthsSection(run) {
  return section("Widths, from input to output", slot("widths", () => network(run)));
}
const keptShare = (group, width) => width / group.size;
function network(run, one) {
  const entry = one || modelOf(run, state.model) || modelOf(run, run.picked);
  const rest = one || run.front.length === 1 ? [] : run.front;
  const title = `${entry.name}: the height of a box is the dense width, its filling what is kept. Dashed: a block that is gone.`;
  return [note(title), el("div", { class: "picture" }, picture(run, entry, 130, true)),
    rest.length ? el("div", { class: "picture" }, rest.map(other => el("div", { class: "strip" + (other.name === entry.name ? " chosen" : ""), onclick: () => choose(other.name) },
      el("span", {}, other.name), picture(run, other, 26, false)))) : null].filter(Boolean);
}
function picture(run, entry, height, named) {
  const { groups } = run, step = Math.max(4, Math.min(44, 1040 / groups.length)), gap = step > 8 ? 2 : 1;
  const longest = named && step >= 11 ? Math.min(150, 16 + 5.6 * Math.max(...groups.map(group => group.name.length))) : 0;
  const width = step * groups.length + 2, node = svg("svg", { viewBox: `0 0 ${width} ${height + longest}`, width: named ? width : "100%", height: height + longest, role: "img",
    "aria-label": `widths of ${entry.name}`, preserveAspectRatio: named ? null : "none" });
  groups.forEach((group, i) => {
    const share = keptShare(group, entry.widths[i]), x = 1 + i * step, tall = share * height;
    node.append(svg("rect", { class: "cell", x, y: 0, width: step - gap, height }));
    if (entry.widths[i] === 0) node.append(svg("rect", { class: "gone", x: x + 0.5, y: 0.5, width: step - gap - 1, height: height - 1 }));
    else node.append(svg("rect", { class: `kept ${KIND_CLASS[group.kind] || ""}`, x, y: height - tall, width: step - gap, height: tall }));
    if (longest) node.append(svg("text", { class: "name", transform: `translate(${x + step / 2 + 3} ${height + 8}) rotate(-90)`, "text-anchor": "end" }, group.name.length > 25 ? "…" + group.name.slice(-24) : group.name));
  });
  if (named) {
    node.addEventListener("pointermove", event => {
      const box = node.getBoundingClientRect(), i = Math.floor((event.clientX - box.left - 1) / step), group = groups[i];
      if (!group) return tip.hide();
      tip.show(`${group.name}\n${group.kind}\n${entry.widths[i]} of ${group.size} kept (${percent(keptShare(group, entry.widths[i]), 0)})`, event.clientX, event.clientY);
    });
    node.addEventListener("pointerleave", () => tip.hide());
  }
  return node;
}
function showTrial(run, i) {
  const entry = { name: trialName(run.trials.number[i]), widths: run.trials.widths[i] };
  if (modelOf(run, entry.name)) return choose(entry.name);
  slots.widths.node.replaceChildren(...network(run, entry));
}

// A table sorted by a click on a column's head, the first rows of it until more are asked for.
const FIRST_ROWS = 200;
function table(columns, rows, { click, marked, order } = {}) {
  const body = el("tbody"), more = el("p"), sorted = order || { column: -1, down: true };
  let all = false;
  function draw() {
    const column = columns[sorted.column], sign = sorted.down ? -1 : 1;
    const ordered = column ? [...rows].sort((a, b) => compared(column.value(a), column.value(b), sign)) : rows;
    const seen = all ? ordered : ordered.slice(0, FIRST_ROWS);
    body.replaceChildren(...seen.map(row => el("tr", { class: marked && marked(row) ? "chosen" : null, onclick: click ? () => click(row) : undefined, "data-name": click ? "" : null },
      columns.map(column => el("td", { class: column.wide ? "text" : null }, column.text(row), column.small && column.small(row) ? el("small", {}, column.small(row)) : null)))));
    more.replaceChildren(...(seen.length < rows.length ? [el("button", { onclick: () => { all = true; draw(); } }, `show all ${rows.length}`)] : []));
  }
  const heads = columns.map((column, i) => el("th", { scope: "col", class: column.wide ? "text" : null }, el("button", { onclick: () => {
    Object.assign(sorted, sorted.column === i ? { down: !sorted.down } : { column: i, down: true });
    heads.forEach((head, j) => j === i ? head.setAttribute("aria-sort", sorted.down ? "descending" : "ascending") : head.removeAttribute("aria-sort"));
    draw();
  } }, column.title)));
  draw();
  return el("div", {}, el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, heads)), body)), more);
}
function compared(a, b, sign) {
  const missing = value => value === undefined || value === null;
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  return sign * (typeof a === "string" ? a.localeCompare(b) : a - b);
}
const metricColumn = (key, metrics, dense) => ({
  title: label(key), value: row => metrics(row)[key], text: row => shown(key, metrics(row)[key]), small: row => against(key, metrics(row)[key], dense(row)[key]),
});
function modelsSection(run) {
  const rows = [{ ...run.dense, name: "dense" }, ...run.models], order = { column: -1, down: true };
  const keys = ["score", "test", "guide", ...COSTS, "latency_low_ms", "latency_high_ms", "latency_predicted_ms"].filter(key => run.models.some(entry => entry[key] !== undefined));
  const columns = [{ title: "model", value: row => row.name, text: row => row.name + (row.name === run.picked ? " ●" : "") },
    ...keys.map(key => metricColumn(key, row => row, row => row === rows[0] ? {} : run.dense))];
  return section("Models", note(`● is the picked model (${run.picked_by}); what was fine-tuned is named after it and the recipe (trial0012+sgd). Shares are of the dense model. The test split was used for these models only, after the search.`),
    slot("models", () => table(columns, rows, { order, marked: row => row.name === state.model, click: row => { if (row.name !== "dense") choose(row.name); } })),
    download(`${run.name}-models.csv`, () => csv(["model", ...keys, ...run.groups.map(group => group.name)],
      rows.map(row => [row.name, ...keys.map(key => row[key]), ...(row.widths || run.groups.map(group => group.size))]))));
}
function trialsSection(run) {
  const { trials } = run, costs = COSTS.filter(key => trials[key]);
  const rows = trials.number.map((_, i) => i);
  const columns = [
    { title: "trial", value: i => trials.number[i], text: i => String(trials.number[i]) },
    { title: run.guide, value: i => trials.value[i], text: i => shown("guide", trials.value[i]) },
    ...costs.map(key => ({ title: label(key), value: i => trials[key][i], text: i => shown(key, trials[key][i]), small: i => against(key, trials[key][i] ?? undefined, run.dense[key]) })),
    { title: "state", value: i => trials.state[i], text: i => trials.state[i], wide: true },
  ];
  return section("All trials", note("A click shows the trial's widths above. An estimate is a trial that was given up before it was scored in full."),
    table(columns, rows, { click: i => { showTrial(run, i); slots.widths.node.scrollIntoView({ behavior: "smooth", block: "center" }); } }),
    download(`${run.name}-trials.csv`, () => csv(["trial", run.guide, ...costs, "state", ...run.groups.map(group => group.name)],
      rows.map(i => [trials.number[i], trials.value[i], ...costs.map(key => trials[key][i]), trials.state[i], ...trials.widths[i]]))));
}
function csv(head, rows) {
  const cell = value => value === undefined || value === null ? "" : /[",\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value);
  return [head, ...rows].map(row => row.map(cell).join(",")).join("\n") + "\n";
}
function download(name, make) {
  return el("p", {}, el("button", { onclick: () => {
    const link = el("a", { href: URL.createObjectURL(new Blob([make()], { type: "text/csv" })), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  } }, "download CSV"));
}

function historySection(run) {
  const { number, best, hypervolume } = run.history;
  if (!number.length) return null;
  const { trials } = run;
  const dots = withoutWorst(trials.number.map((n, i) => ({ x: n, y: trials.value[i], i })).filter(point => point.y !== null));
  const stairsOf = values => number.map((n, i) => ({ x: n, y: values[i] }));
  const dense = run.guide === "score" ? run.dense.score : undefined;
  return section("History", chart({
    height: 300, second: hypervolume ? { points: stairsOf(hypervolume), format: value => percent(value, 0), title: "hypervolume" } : undefined,
    x: { title: "trial", domain: [0, Math.max(...number, 1)], format: value => String(value) },
    y: { title: run.guide === "score" ? "score" : `${run.guide} in the search`, domain: domain([...dots.map(point => point.y), dense]), format: figures },
    marks: [
      { points: dots, shape: "circle", size: 2.5, class: "trials", tip: point => trialText(run, point.i), click: point => showTrial(run, point.i) },
      { points: stairsOf(best), line: "stairs", class: "front" },
    ],
    rules: dense === undefined ? [] : [{ y: dense, class: "reference", text: "dense" }],
  }), legend([["trials", "--grey"], ["best so far", "--blue"], hypervolume ? ["hypervolume of the front so far (right)", "--orange"] : null]));
}
function sensitivitySection(run) {
  const curves = Object.entries(run.sensitivity).map(([name, points]) => ({ name, points: points.map(([width, loss]) => ({ x: 100 * width / points[points.length - 1][0], y: loss, width, name })) }));
  if (!curves.length) return null;
  return section("Sensitivity", note("Of what each group feeds: the share of its outputs that no least-squares fit gives back, against the width kept. The widths of a block are one curve."),
    chart({
      height: 300,
      x: { title: "width kept, %", domain: [0, 100], format: value => String(value) },
      y: { title: "share of the outputs lost", domain: [0, Math.max(...curves.flatMap(curve => curve.points.map(point => point.y)), 0.01)], format: value => percent(value, 0) },
      marks: curves.flatMap(curve => [{ points: curve.points, line: "straight", class: "curve" },
        { points: curve.points, shape: "circle", size: 2, class: "bar", tip: point => `${point.name}\n${point.width} kept: ${percent(point.y)} lost` }]),
    }));
}
function importanceSection(run) {
  const most = run.importance.slice(0, 20);
  if (!most.length) return null;
  const whole = Math.max(...most.map(([, value]) => value), 1e-9);
  return section("Importance", note("How much each dimension decides whether a trial is among the best tenth (PED-ANOVA, Watanabe et al. 2023)."),
    el("div", { class: "bars" }, most.map(([name, value]) => el("div", {}, el("span", {}, name), el("i", { style: `width:${(58 * value / whole).toFixed(1)}%` }), el("b", {}, percent(value))))));
}
function predictionSection(run) {
  const points = run.front.filter(entry => entry.latency_predicted_ms !== undefined && entry.latency_ms !== undefined).map(entry => ({ x: entry.latency_predicted_ms, y: entry.latency_ms, entry }));
  if (!points.length) return null;
  const errors = points.map(point => Math.abs(point.x / point.y - 1)), range = domain(points.flatMap(point => [point.x, point.y]), { pad: 0.1, floor: 0 });
  return section("Latency, predicted and measured", note(`Off by ${percent(errors.reduce((sum, value) => sum + value, 0) / errors.length)} on average over ${points.length} models.`), chart({
    height: 300, x: { title: "predicted, ms", domain: range, format: figures }, y: { title: "measured, ms", domain: range, format: figures },
    marks: [{ points: [{ x: range[0], y: range[0] }, { x: range[1], y: range[1] }], line: "straight", class: "diagonal" },
      { points, shape: "circle", size: 5, class: "front", tip: point => modelText(run, point.entry), click: point => choose(point.entry.name) }],
  }));
}
function frozenSection(run) {
  if (!run.frozen.length) return null;
  return section("What cannot be pruned", table([
    { title: "part", value: row => row.name, text: row => row.name }, { title: "reason", value: row => row.reason, text: row => row.reason, wide: true }], run.frozen));
}
function detailsSection(run) {
  const total = totalSeconds(run) || 1, pairs = Object.entries(run.seconds);
  const facts = object => table([{ title: "", value: row => row[0], text: row => row[0] }, { title: "", value: row => String(row[1]), text: row => typeof row[1] === "object" ? JSON.stringify(row[1]) : String(row[1]), wide: true }], Object.entries(object));
  return el("section", {}, el("details", {}, el("summary", {}, "Time, configuration and versions"),
    table([{ title: "part", value: row => row[0], text: row => row[0] }, { title: "time", value: row => row[1], text: row => duration(row[1]) },
      { title: "share", value: row => row[1], text: row => percent(row[1] / total) }], pairs),
    facts({ ...run.search, ...(run.finished ? { finished: run.finished } : {}), ...run.machine }), Object.keys(run.target).length ? facts(run.target) : null,
    run.config ? el("pre", {}, run.config) : null));
}
start();
