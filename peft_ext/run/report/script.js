// Shows the value of each curve at the step under the pointer, or at the curve's nearest step, which is then named.
"use strict";
function short(v) {
  if (v === null || v === undefined) return "–";
  const a = Math.abs(v);
  const text = a === 0 || (a >= 1e-3 && a < 1e6) ? String(a < 1e4 ? +a.toPrecision(4) : Math.round(a))
    : a.toExponential(3).replace(/\.?0*e/, "e").replace("+", "");
  return v < 0 ? "−" + text : text;
}
const count = n => n.toLocaleString("en");
function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) { const mid = (low + high) >> 1; if (xs[mid] <= x) low = mid; else high = mid; }
  return xs[high] - x < x - xs[low] ? high : low;
}
for (const plot of document.querySelectorAll(".plot")) {
  const chart = JSON.parse(plot.dataset.chart), figure = plot.closest("figure");
  const label = figure.querySelector(".legend b"), values = figure.querySelectorAll("output");
  const rest = [label.textContent, ...[...values].map(v => v.textContent)];
  const main = chart.s[0], marks = [];
  let index = main.x.length - 1;
  function mark(name) {
    const made = document.createElement("div");
    made.className = name;
    plot.append(made);
    marks.push(made);
    return made;
  }
  const part = (v, [a, b]) => (v - a) / (b - a);
  function clear() {
    marks.splice(0).forEach(m => m.remove());
    [label, ...values].forEach((place, i) => { place.textContent = rest[i]; });
  }
  function show(i) {
    clear();
    index = i;
    const step = main.x[i], last = Math.min(step + main.width - 1, main.last);
    const middle = s => (s.width - 1) / 2;
    label.textContent = last > step ? `steps ${count(step)}–${count(last)}` : `step ${count(step)}`;
    mark("at").style.left = 100 * part(step + middle(main), chart.x) + "%";
    chart.s.forEach((s, k) => {
      const j = nearest(s.x, step), v = s.y[j];
      let text = short(v);
      if (v !== null && s.low) text += ` (${short(s.low[j])} to ${short(s.high[j])})`;
      if (v !== null && s.x[j] !== step) text += ` at ${count(s.x[j])}`;
      values[k].textContent = text;
      if (v === null) return;
      const dot = mark("dot " + s.look);
      dot.style.left = 100 * part(s.x[j] + middle(s), chart.x) + "%";
      dot.style.top = 100 * (1 - part(v, chart.y)) + "%";
    });
  }
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect();
    const x = chart.x[0] + (event.clientX - box.left) / box.width * (chart.x[1] - chart.x[0]);
    show(nearest(main.x, x - (main.width - 1) / 2));
  });
  plot.addEventListener("pointerleave", clear);
  plot.addEventListener("blur", clear);
  plot.addEventListener("keydown", event => {
    const to = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: main.x.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(Math.min(Math.max(to, 0), main.x.length - 1));
  });
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(d => { d.open = true; }));
