// What pictures have in common: their frame, axes and marks.

/** A picture that is drawn anew whenever its width changes. */
function makeFigure({ label, height, draw, caption, legend = null, isInteractive = false }) {
  const svg = s("svg", { role: "img", "aria-label": label, height, tabindex: isInteractive ? 0 : null });
  const figure = h("figure", {}, legend, h("div", { class: "chart" }, svg), caption && h("figcaption", {}, caption));
  let width = 0;
  const redraw = () => {
    if (width < 40) return;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren(...[draw(width, height)].flat(Infinity).filter(Boolean));
  };
  new ResizeObserver(([entry]) => {
    const found = Math.floor(entry.contentRect.width);
    if (found !== width) {
      width = found;
      redraw();
    }
  }).observe(svg.parentNode);
  return { figure, svg, redraw };
}

function scaleOf(low, high, start, end) {
  const span = high - low || 1;
  return (value) => start + ((value - low) / span) * (end - start);
}

function ticks(low, high, wanted) {
  const rough = (high - low) / Math.max(1, wanted);
  const power = 10 ** Math.floor(Math.log10(rough || 1));
  const step = power * ([1, 2, 5, 10].find((factor) => factor * power >= rough) || 10);
  const found = [];
  for (let place = Math.ceil(low / step); place * step <= high + step * 1e-9; place++) found.push(place * step);
  return found;
}

const text = (x, y, content, attributes = {}) => s("text", { x, y, ...attributes }, content);

function drawAxes(x, y, box, { xTicks, yTicks, xLabel, yLabel, xFormat = format, yFormat = format }) {
  const [left, top, right, bottom] = box;
  return s(
    "g",
    { class: "axis" },
    yTicks.map((tick) => [
      s("line", { class: "gridline", x1: left, x2: right, y1: y(tick), y2: y(tick) }),
      text(left - 6, y(tick) + 4, yFormat(tick), { "text-anchor": "end" }),
    ]),
    s("line", { x1: left, x2: right, y1: bottom, y2: bottom }),
    xTicks.map((tick) => text(x(tick), bottom + 15, xFormat(tick), { "text-anchor": "middle" })),
    text((left + right) / 2, bottom + 31, xLabel, { "text-anchor": "middle" }),
    text(left - 40, top - 7, yLabel, { "text-anchor": "start" }),
  );
}

function makeMark(role, x, y, size = 3.4) {
  const shapes = {
    weight: () => s("circle", { cx: x, cy: y, r: size }),
    input: () =>
      s("path", {
        d: `M${x} ${y - size * 1.25}L${x + size * 1.25} ${y}L${x} ${y + size * 1.25}L${x - size * 1.25} ${y}Z`,
      }),
    output: () => s("rect", { x: x - size, y: y - size, width: 2 * size, height: 2 * size }),
  };
  const mark = (
    shapes[role] ||
    (() => s("path", { d: `M${x} ${y - size * 1.2}L${x + size * 1.2} ${y + size}L${x - size * 1.2} ${y + size}Z` }))
  )();
  mark.setAttribute("class", `r-${role}`);
  return mark;
}

const legendItem = (mark, label) =>
  h("li", {}, s("svg", { width: 22, height: 12, "aria-hidden": "true" }, mark), label);
const line = (className) => s("line", { class: className, x1: 1, x2: 21, y1: 6, y2: 6 });
