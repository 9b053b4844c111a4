// One chart: axes, marks, the nearest mark under the pointer. It is drawn anew when its width changes.
const MOST_TICKS = 50;
function ticks(low, high, count) {
  const raw = (high - low) / Math.max(count, 1), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map(factor => factor * power).find(size => size >= raw * 0.999);
  const found = [];
  const first = Math.ceil(low / step - 1e-9);
  for (let i = 0; i <= MOST_TICKS && (first + i) * step <= high + step * 1e-9; i++) found.push(Number(((first + i) * step).toPrecision(12)));
  return found;
}
function domain(values, { pad = 0.06, floor } = {}) {
  let low = Infinity, high = -Infinity;
  for (const value of values) if (Number.isFinite(value)) { low = Math.min(low, value); high = Math.max(high, value); }
  if (low > high) return [0, 1];
  if (isClose(low, high)) { low -= Math.abs(low) * 0.05 || 0.5; high += Math.abs(high) * 0.05 || 0.5; }
  const room = (high - low) * pad;
  return [floor !== undefined ? Math.max(floor, low - room) : low - room, high + room];
}
// marks: {points, shape, size, class, line, tip, click}, points of {x, y, low?, high?}; rules: {x | y, class, text}.
function chart({ x, y, marks, rules = [], height = 360, second }) {
  const holder = el("div"), node = svg("svg", { class: "chart", role: "img", "aria-label": `${y.title} against ${x.title}` });
  holder.append(node);
  let drawn = 0;
  function draw(width) {
    if (Math.abs(width - drawn) < 1) return;
    drawn = width;
    const left = 66, right = second ? 52 : 16, top = 14, bottom = 44;
    node.setAttribute("viewBox", `0 0 ${width} ${height}`);
    node.setAttribute("height", height);
    const place = (scale, from, to) => value => from + (value - scale.domain[0]) / (scale.domain[1] - scale.domain[0]) * (to - from);
    const px = place(x, left, width - right), py = place(y, height - bottom, top);
    node.replaceChildren();
    const step = svg("g");
    for (const value of ticks(...x.domain, Math.max(2, (width - left - right) / 85))) step.append(
      svg("line", { class: "grid", x1: px(value), x2: px(value), y1: top, y2: height - bottom }),
      svg("text", { x: px(value), y: height - bottom + 16, "text-anchor": "middle" }, x.format(value)));
    for (const value of ticks(...y.domain, (height - top - bottom) / 48)) step.append(
      svg("line", { class: "grid", x1: left, x2: width - right, y1: py(value), y2: py(value) }),
      svg("text", { x: left - 7, y: py(value) + 4, "text-anchor": "end" }, y.format(value)));
    step.append(
      svg("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }),
      svg("text", { class: "title", x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, x.title),
      svg("text", { class: "title", transform: `translate(13 ${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, y.title));
    node.append(step);
    const inside = (value, scale) => value >= scale.domain[0] && value <= scale.domain[1];
    for (const rule of rules) {
      if (rule.x !== undefined && inside(rule.x, x)) {
        const atEnd = px(rule.x) > width - right - 90;
        node.append(svg("line", { class: rule.class, x1: px(rule.x), x2: px(rule.x), y1: top, y2: height - bottom }),
          svg("text", { x: px(rule.x) + (atEnd ? -5 : 5), y: top + 10, "text-anchor": atEnd ? "end" : "start" }, rule.text));
      } else if (rule.y !== undefined && inside(rule.y, y)) {
        node.append(svg("line", { class: rule.class, x1: left, x2: width - right, y1: py(rule.y), y2: py(rule.y) }),
          svg("text", { x: left + 5, y: py(rule.y) - 5 }, rule.text));
      }
    }
    if (second) node.append(...secondAxis(second, px, width - right, top, height - bottom));
    const targets = [];
    for (const mark of marks) node.append(drawMark(mark, px, py, [top, height - bottom], targets));
    listen(node, targets);
  }
  const observer = new ResizeObserver(entries => { const width = entries[0].contentRect.width; if (width) draw(width); });
  observer.observe(holder);
  return holder;
}
function secondAxis({ points, format, title }, px, right, top, bottom) {
  const [low, high] = [0, Math.max(...points.map(point => point.y)) || 1];
  const py = value => bottom - (value - low) / (high - low) * (bottom - top);
  return [
    ...ticks(low, high, 5).map(value => svg("text", { x: right + 6, y: py(value) + 4 }, format(value))),
    svg("text", { x: right, y: top - 3, "text-anchor": "end" }, title),
    svg("path", { class: "line second", d: stairs(points, px, py) }),
  ];
}
function stairs(points, px, py) {
  return points.map((point, i) => i ? `H${px(point.x).toFixed(1)}V${py(point.y).toFixed(1)}` : `M${px(point.x).toFixed(1)} ${py(point.y).toFixed(1)}`).join("");
}
function polyline(points, px, py) {
  return points.map((point, i) => `${i ? "L" : "M"}${px(point.x).toFixed(1)} ${py(point.y).toFixed(1)}`).join("");
}
const SHAPES = {
  circle: r => `m${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`,
  diamond: r => `m0 ${-r}l${r} ${r}l${-r} ${r}l${-r} ${-r}z`,
  square: r => `m${-r} ${-r}h${2 * r}v${2 * r}h${-2 * r}z`,
  star: r => "m0 " + -r + [...Array(10).keys()].slice(1).map(i => {
    const [a, b, ra, rb] = [i * Math.PI / 5, (i - 1) * Math.PI / 5, i % 2 ? r * 0.45 : r, i % 2 ? r : r * 0.45];
    return `l${(ra * Math.sin(a) - rb * Math.sin(b)).toFixed(2)} ${(rb * Math.cos(b) - ra * Math.cos(a)).toFixed(2)}`;
  }).join("") + "z",
};
function drawMark(mark, px, py, [top, bottom], targets) {
  const points = mark.points.filter(point => Number.isFinite(point.x) && Number.isFinite(point.y));
  const group = svg("g", {});
  if (mark.line) group.append(svg("path", { class: "line " + mark.class, style: mark.color ? `stroke:${mark.color}` : null,
    d: (mark.line === "stairs" ? stairs : polyline)(points, px, value => Math.max(top, Math.min(bottom, py(value)))) }));
  for (const point of points) if (point.low !== undefined) group.append(
    svg("line", { class: "interval", x1: px(point.low), x2: px(point.high), y1: py(point.y), y2: py(point.y) }));
  if (mark.shape) group.append(svg("path", { class: mark.class, style: mark.color ? `fill:${mark.color}` : null,
    d: points.map(point => `M${px(point.x).toFixed(1)} ${py(point.y).toFixed(1)}${SHAPES[mark.shape](mark.size || 4)}`).join("") }));
  if (mark.tip) for (const point of points) targets.push({ x: px(point.x), y: py(point.y), point, mark });
  return group;
}
function listen(node, targets) {
  function nearest(event) {
    const box = node.getBoundingClientRect(), at = { x: event.clientX - box.left, y: event.clientY - box.top };
    let best = null, distance = 24 ** 2;
    for (const target of targets) {
      const away = (target.x - at.x) ** 2 + (target.y - at.y) ** 2;
      if (away <= distance) { best = target; distance = away; }  // of equals the last: drawn on top
    }
    return best;
  }
  node.onpointermove = node.onpointerdown = event => {
    const target = nearest(event);
    node.style.cursor = target && target.mark.click ? "pointer" : "";
    if (target) tip.show(target.mark.tip(target.point), event.clientX, event.clientY); else tip.hide();
  };
  node.onpointerleave = () => tip.hide();
  node.onclick = event => { const target = nearest(event); if (target && target.mark.click) target.mark.click(target.point); };
}
