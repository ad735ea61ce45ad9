"use strict";
// Line charts: drawn at the window's size, read by pointer or by keyboard.

const NAMESPACE = "http://www.w3.org/2000/svg";

function element(name, attributes, parent, text) {
  const made = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

// Round steps of 1, 2 or 5 times a power of ten: about `count` of them.
function ticks(low, high, count, whole = false) {
  const rough = Math.max((high - low) / count || 1, whole ? 1 : 0);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step || 0);
  return found;
}

function format(value, axis) {
  if (value === null) return "no value";
  if (axis.percent) return `${+(100 * value).toFixed(1)}\u00a0%`;
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace(/\.?0+e/, "e");
  return value.toLocaleString("en", { maximumSignificantDigits: size >= 1000 ? 7 : 4 });
}

function range(values, axis) {
  let low = axis.min ?? Math.min(...values);
  let high = axis.max ?? Math.max(...values);
  if (!(high > low)) [low, high] = low > 0 ? [0, 2 * low] : [low - 1, low + 1];
  return [low, high];
}

function legend(list, spec) {
  list.replaceChildren();
  if (spec.series.length < 2 && !spec.named) return;
  spec.series.forEach((series, i) => {
    const item = document.createElement("li");
    const key = element("svg", { viewBox: "0 0 32 12", "aria-hidden": "true" }, item);
    element("line", { x1: 0, x2: 32, y1: 6, y2: 6, class: `line s${i}` }, key);
    item.append(series.name);
    list.append(item);
  });
}

function drawChart(figure, spec) {
  const plot = figure.querySelector(".plot");
  const width = plot.clientWidth;
  const height = Math.round(Math.min(300, Math.max(190, width * 0.5)));
  const points = spec.series.flatMap((series) => series.points);
  const xs = [...new Set(points.map((point) => point[0]))].sort((a, b) => a - b);
  const [x0, x1] = range(xs, spec.x);
  const known = points.map((point) => point[1]).filter((value) => value !== null);
  if (!known.length) { plot.textContent = "There is no finite value to draw."; return; }
  let [y0, y1] = range(known, spec.y);
  const rows = ticks(y0, y1, 5);
  const step = rows.length > 1 ? rows[1] - rows[0] : 0;
  // The top line is labelled, so that the highest value can be read off.
  if (spec.y.max === undefined && step && y1 > rows.at(-1) + step * 1e-6) {
    rows.push(rows.at(-1) + step);
    y1 = rows.at(-1);
  }
  const labels = rows.map((value) => format(value, spec.y));
  const left = 26 + 7 * Math.max(...labels.map((label) => label.length));
  const [right, top, bottom] = [24, 10, 42];
  const toX = (value) => left + ((value - x0) / (x1 - x0)) * (width - left - right);
  const toY = (value) => height - bottom - ((value - y0) / (y1 - y0)) * (height - top - bottom);

  plot.replaceChildren();
  const svg = element("svg", { width, height, viewBox: `0 0 ${width} ${height}` }, plot);
  rows.forEach((value, i) => {
    element("line", { class: "grid", x1: left, x2: width - right, y1: toY(value), y2: toY(value) }, svg);
    element("text", { x: left - 6, y: toY(value) + 4, "text-anchor": "end" }, svg, labels[i]);
  });
  for (const value of ticks(x0, x1, Math.max(2, Math.floor(width / 90)), spec.x.whole)) {
    element("line", { class: "axis", x1: toX(value), x2: toX(value), y1: height - bottom, y2: height - bottom + 4 }, svg);
    element("text", { x: toX(value), y: height - bottom + 17, "text-anchor": "middle" }, svg, format(value, spec.x));
  }
  element("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }, svg);
  element("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, svg, spec.x.label);
  const middle = (top + height - bottom) / 2;
  element("text", { x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})` }, svg, spec.y.label);
  for (const mark of spec.marks ?? []) {
    const x = toX(mark.x);
    const shape = mark.alert
      ? element("path", { class: "alert", d: `M${x - 5} ${height - bottom}h10l-5 -9z` }, svg)
      : element("line", { class: "mark", x1: x, x2: x, y1: top, y2: height - bottom }, svg);
    element("title", {}, shape, mark.label);
  }
  spec.series.forEach((series, i) => {
    // A value that is missing leaves a gap: the line isn't drawn across it.
    let path = "", open = false;
    const alone = [];
    series.points.forEach(([x, y], k) => {
      if (y === null) { open = false; return; }
      path += `${open ? "L" : "M"}${toX(x).toFixed(1)} ${toY(y).toFixed(1)}`;
      const next = series.points[k + 1];
      if (series.points.length <= 25 || (!open && !(next && next[1] !== null))) alone.push([x, y]);
      open = true;
    });
    element("path", { class: `line s${i}`, d: path }, svg);
    if (spec.dots !== false)
      for (const [x, y] of alone) element("circle", { class: `dot s${i}`, cx: toX(x), cy: toY(y), r: 4 }, svg);
  });
  cursor(figure, spec, svg, { xs, toX, toY, width, top, foot: height - bottom });
}

// A vertical line that follows the pointer and the arrow keys, with the values there.
function cursor(figure, spec, svg, { xs, toX, toY, width, top, foot }) {
  const plot = figure.querySelector(".plot");
  const title = figure.querySelector("h3").textContent;
  const tip = document.createElement("div");
  tip.className = "readout";
  tip.hidden = true;
  plot.append(tip);
  const lookup = spec.series.map((series) => new Map(series.points));
  const line = element("line", { class: "axis", y1: top, y2: foot, visibility: "hidden" }, svg);
  const dots = spec.series.map((_, i) => element("circle", { class: `dot s${i}`, r: 5, visibility: "hidden" }, svg));
  let place = xs.length - 1;

  function rows(x) {
    const found = spec.series.flatMap((series, i) =>
      lookup[i].has(x) ? [`${series.name} ${format(lookup[i].get(x), spec.y)}`] : []);
    const marks = (spec.marks ?? []).filter((mark) => mark.x === x).map((mark) => mark.label);
    return [`${spec.x.label} ${format(x, spec.x)}`, ...found, ...marks];
  }
  function show() {
    const x = xs[place];
    svg.setAttribute("aria-valuenow", place);
    svg.setAttribute("aria-valuetext", rows(x).join(", "));
    line.setAttribute("x1", toX(x));
    line.setAttribute("x2", toX(x));
    line.setAttribute("visibility", "visible");
    dots.forEach((dot, i) => {
      const y = lookup[i].get(x) ?? null;
      dot.setAttribute("visibility", y === null ? "hidden" : "visible");
      if (y !== null) { dot.setAttribute("cx", toX(x)); dot.setAttribute("cy", toY(y)); }
    });
    tip.textContent = rows(x).join("\n");
    tip.hidden = false;
    const beside = toX(x) + 12;
    tip.style.left = `${Math.max(0, beside + tip.offsetWidth > width ? toX(x) - 12 - tip.offsetWidth : beside)}px`;
  }
  function hide() {
    tip.hidden = true;
    for (const shape of [line, ...dots]) shape.setAttribute("visibility", "hidden");
  }
  // A slider over the points: what assistive technology knows how to step through and read.
  const role = { role: "slider", tabindex: 0, "aria-label": `${title}, values by ${spec.x.label}`,
    "aria-valuemin": 0, "aria-valuemax": xs.length - 1, "aria-valuenow": place, "aria-valuetext": rows(xs[place]).join(", ") };
  for (const [key, value] of Object.entries(role)) svg.setAttribute(key, value);
  svg.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.round(xs.length / 10));
    const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -page, PageUp: page, Home: -xs.length, End: xs.length };
    if (event.key === "Escape") hide();
    if (!(event.key in steps) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    if (!tip.hidden || Math.abs(steps[event.key]) > 1) place += steps[event.key];
    place = Math.min(xs.length - 1, Math.max(0, place));
    show();
  });
  svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) show(); });
  svg.addEventListener("blur", hide);
  svg.addEventListener("pointermove", (event) => {
    const at = event.clientX - svg.getBoundingClientRect().left;
    place = xs.reduce((best, x, i) => (Math.abs(toX(x) - at) < Math.abs(toX(xs[best]) - at) ? i : best), 0);
    show();
  });
  svg.addEventListener("pointerleave", () => { if (document.activeElement !== svg) hide(); });
}
