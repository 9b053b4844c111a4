// Elements, numbers and the tooltip. Text always goes in as text, so names from a run can hold anything.
const SVG = "http://www.w3.org/2000/svg";
function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}
function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}
function filled(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== null && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.flat().filter(child => child !== null && child !== undefined));
  return node;
}
const UNITS = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
function short(value, digits = 3) {
  const [size, unit] = UNITS.find(([size]) => Math.abs(value) >= size) || [1, ""];
  const number = Number((value / size).toPrecision(digits));
  return (Math.abs(number) >= 1e5 ? number.toExponential() : String(number)) + unit;
}
const isClose = (a, b) => Math.abs(a - b) <= 1e-9 * Math.max(Math.abs(a), Math.abs(b));  // but for rounding the same
// Four digits behind the point, or four significant ones where these would all be zeros or would not fit.
function scoreText(value) {
  const size = Math.abs(value);
  return size > 0 && (size < 1e-3 || size >= 1e5) ? Number(value.toPrecision(4)).toExponential() : size === 0 ? "0.0000" : value.toFixed(4);
}
const figures = value => Math.abs(value) >= 1e5 ? short(value, 4) : String(Number(value.toPrecision(4)));
const percent = (value, digits = 1) => (100 * value).toFixed(digits) + " %";
const LABELS = {
  score: "score (search split)", test: "score (test split)", macs: "MACs", params: "parameters",
  memory_bytes: "activations", size_bytes: "size", latency_ms: "latency", latency_low_ms: "latency from",
  latency_high_ms: "latency to", latency_predicted_ms: "latency, predicted", latency_ratio: "latency ratio",
  latency_ratio_high: "latency ratio to", guide: "value in the search",
};
const COSTS = ["macs", "latency_ms", "params", "size_bytes", "memory_bytes"];
const SCORES = ["score", "test", "guide"];
const label = key => LABELS[key] || key;
function shown(key, value) {
  if (value === undefined || value === null) return "–";
  if (key.endsWith("_ms")) return short(value) + " ms";
  if (key.endsWith("_bytes")) return short(value) + "B";
  if (key.includes("ratio")) return percent(value);
  if (SCORES.includes(key)) return scoreText(value);
  return short(value);
}
function against(key, value, dense) {
  if (value === undefined || !dense || key === "guide" || key.includes("ratio") || key.includes("predicted")) return "";
  if (SCORES.includes(key)) return (value - dense < 0 ? "−" : "+") + scoreText(isClose(value, dense) ? 0 : Math.abs(value - dense));
  return percent(value / dense);
}
const tip = {
  node: document.getElementById("tip"),
  show(text, x, y) {
    this.node.textContent = text;
    this.node.hidden = false;
    const box = this.node.getBoundingClientRect();
    this.node.style.left = Math.max(6, Math.min(x + 14, innerWidth - box.width - 8)) + "px";
    this.node.style.top = (y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18) + "px";
  },
  hide() { this.node.hidden = true; },
};
function command(text) {
  const copy = el("button", { onclick: async () => {
    try { await navigator.clipboard.writeText(text); }
    catch { getSelection().selectAllChildren(code); document.execCommand("copy"); }  // pages from disk may not
    copy.textContent = "copied";
    setTimeout(() => { copy.textContent = "copy"; }, 1500);
  } }, "copy");
  const code = el("code", {}, text);
  return el("div", { class: "command" }, code, copy);
}
const quoted = path => /^[\w@%+=:,./-]+$/.test(path) ? path : "'" + path.replaceAll("'", "'\\''") + "'";
function choice(title, options, value, change) {
  const select = el("select", { onchange: () => change(select.value) },
    options.map(key => el("option", { value: key, selected: key === value }, label(key))));
  return el("label", {}, title, select);
}
function section(title, ...children) { return el("section", {}, el("h2", {}, title), ...children); }
const note = text => el("p", { class: "note" }, text);
