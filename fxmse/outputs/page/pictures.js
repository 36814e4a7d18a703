// The pictures of a chosen value.
function levelsOf(picture) {
  const levels = report.levels[picture.grid] || [];
  return picture.scale === null ? levels : levels.map((level) => picture.scale * (level - picture.zero_point));
}

function drawHistogram(picture) {
  const [start, end] = picture.edges,
    step = (end - start) / picture.counts.length;
  const ends = [start, end, ...picture.chosen, ...(picture.minmax || [])];
  const low = Math.min(...ends),
    high = Math.max(...ends),
    margin = (high - low) * 0.02;
  const most = Math.max(...picture.counts),
    levels = levelsOf(picture);
  const unit = picture.scale === null ? "steps of each element's own scale" : "value";
  const draw = (width, height) => {
    const box = [46, 22, width - 6, height - 38];
    const x = scaleOf(low - margin, high + margin, box[0], box[2]);
    const y = scaleOf(0, Math.log10(most + 1) * 1.06, box[3] - 9, box[1]);
    const decades = ticks(0, Math.log10(most + 1), 4).filter(Number.isInteger);
    const [from, to] = picture.chosen.map(x);
    return [
      s("rect", { class: "range", x: from, y: box[1], width: to - from, height: box[3] - box[1] }),
      drawAxes(x, y, box, {
        xTicks: ticks(low, high, width / 85),
        yTicks: decades,
        yFormat: (tick) => (tick < 4 ? count(10 ** tick) : `1e${tick}`),
        xLabel: unit,
        yLabel: "elements, logarithmic",
      }),
      s(
        "g",
        { class: "bars" },
        picture.counts.map(
          (number, place) =>
            number > 0 &&
            s("rect", {
              x: x(start + place * step),
              y: y(Math.log10(number + 1)),
              width: Math.max(0.6, x(start + (place + 1) * step) - x(start + place * step) - 0.6),
              height: box[3] - 9 - y(Math.log10(number + 1)),
            }),
        ),
      ),
      s("path", {
        class: "levels",
        d: levels.map((level) => `M${x(level).toFixed(1)} ${box[3] - 7}V${box[3] - 1}`).join(""),
        opacity: levels.length > 64 ? 0.55 : 1,
      }),
      picture.chosen.map((edge) => s("line", { class: "chosen", x1: x(edge), x2: x(edge), y1: box[1], y2: box[3] })),
      picture.minmax &&
        picture.minmax.map((edge) => s("line", { class: "minmax", x1: x(edge), x2: x(edge), y1: box[1], y2: box[3] })),
    ];
  };
  const part =
    picture.num_shown < picture.num_elements
      ? `${count(picture.num_shown)} of ${count(picture.num_elements)} elements, those with the largest scales and some of the others.`
      : null;
  const several =
    picture.scale === null ? "There are several scales: each element is shown in steps of its own." : null;
  const minmax = picture.minmax
    ? ` Min-max would ${picture.scale === null ? "mostly " : ""}cover ${format(picture.minmax[0])} to ${format(picture.minmax[1])}.`
    : "";
  const label = `Histogram of ${count(picture.num_shown)} elements from ${format(start)} to ${format(end)}, in ${unit}. The grid, ${picture.grid}, covers ${format(picture.chosen[0])} to ${format(picture.chosen[1])}.${minmax}`;
  const legend = h(
    "ul",
    { class: "legend" },
    legendItem(line("chosen"), "chosen range"),
    picture.minmax && legendItem(line("minmax"), picture.scale === null ? "min–max, median" : "min–max"),
    levels.length > 0 &&
      legendItem(
        s("path", { class: "levels", d: "M4 2V10M9 2V10M14 2V10M19 2V10" }),
        `${levels.length} levels of ${picture.grid}`,
      ),
  );
  const columns = [
    { name: "From", value: (bar) => bar.from, cell: (bar) => format(bar.from), isNumber: true },
    { name: "To", value: (bar) => bar.to, cell: (bar) => format(bar.to), isNumber: true },
    { name: "Elements", value: (bar) => bar.number, cell: (bar) => count(bar.number), isNumber: true },
  ];
  const bars = () =>
    picture.counts.map((number, place) => ({ from: start + place * step, to: start + (place + 1) * step, number }));
  return [
    h("h3", {}, "Values on the grid"),
    makeFigure({ label, height: 220, draw, legend, caption: [several, part].filter(Boolean).join(" ") || null }).figure,
    makeData("Histogram", columns, bars),
  ];
}

function drawCurve(picture) {
  const [first, last] = picture.factors.map(Math.log),
    number = picture.errors.length;
  const points = picture.errors
    .map((error, place) => ({ factor: Math.exp(first + ((last - first) * place) / (number - 1)), error }))
    .filter((point) => point.error !== null);
  if (points.length < 2 || picture.error === null) return [];
  // The curve goes through the chosen scale, which lies between two of its factors.
  const curve = [...points, { factor: 1, error: picture.error }].sort((a, b) => a.factor - b.factor);
  const all = [...curve.map((point) => point.error), ...(picture.minmax_error === null ? [] : [picture.minmax_error])];
  const low = Math.min(...all),
    high = Math.max(...all),
    margin = Math.max(0.3, (high - low) * 0.08);
  const below = 3 * margin; // room for a label
  const minmax =
    picture.minmax_error !== null && picture.minmax_factor !== null
      ? { factor: picture.minmax_factor, error: picture.minmax_error }
      : null;
  const draw = (width, height) => {
    const box = [46, 22, width - 10, height - 38];
    const x = scaleOf(Math.log(curve[0].factor), Math.log(curve[curve.length - 1].factor), box[0] + 4, box[2] - 4),
      y = scaleOf(low - below, high + margin, box[3], box[1]);
    const at = (point) => [
      x(Math.log(Math.min(Math.max(point.factor, curve[0].factor), curve[curve.length - 1].factor))),
      y(point.error),
    ];
    const xTicks = [0.5, 0.7, 1, 1.4, 2, 3, 5, 8, 12, 16].filter(
      (factor) => factor >= curve[0].factor * 0.999 && factor <= curve[curve.length - 1].factor * 1.001,
    );
    const [chosenX, chosenY] = at({ factor: 1, error: picture.error }),
      [otherX, otherY] = minmax ? at(minmax) : [0, 0];
    const isLeft = minmax && otherX < chosenX,
      isNear = minmax && Math.abs(otherX - chosenX) < 70;
    return [
      drawAxes(x, y, box, {
        xTicks: xTicks.map(Math.log),
        yTicks: ticks(low - below, high + margin, 4),
        xFormat: (tick) => `${format(Math.exp(tick), 2)}×`,
        xLabel: "scale over the chosen scale",
        yLabel: "noise / signal, dB",
      }),
      s("line", { class: "chosen", x1: chosenX, x2: chosenX, y1: box[1], y2: box[3], opacity: 0.35 }),
      s("path", {
        class: "curve",
        d: curve
          .map(
            (point, place) =>
              `${place ? "L" : "M"}${at(point)
                .map((value) => value.toFixed(1))
                .join(" ")}`,
          )
          .join(""),
      }),
      minmax && [
        s("circle", { class: "dot-minmax", cx: otherX, cy: otherY, r: 4.5 }),
        text(otherX + (isLeft ? -8 : 8), otherY - 8, "min–max", {
          class: "text-minmax",
          "text-anchor": isLeft ? "end" : otherX > box[2] - 60 ? "end" : "start",
        }),
      ],
      s("circle", { class: "dot-chosen", cx: chosenX, cy: chosenY, r: 5 }),
      text(chosenX + (isNear && !isLeft ? -8 : isNear ? 8 : 0), Math.min(box[3] - 4, chosenY + 18), "chosen", {
        class: "text-chosen",
        "text-anchor": isNear ? (isLeft ? "start" : "end") : "middle",
      }),
    ];
  };
  const gain = minmax ? minmax.error - picture.error : null;
  const words =
    gain === null
      ? null
      : Math.abs(gain) < 0.05
        ? "Min-max would be as good here."
        : `Min-max would have ${Math.abs(gain).toFixed(1)} dB ${gain > 0 ? "more" : "less"} noise in this value.`;
  const label = `Error against the scale: ${picture.error.toFixed(1)} dB at the chosen scale, ${curve[0].error.toFixed(1)} dB at ${format(curve[0].factor)} times and ${curve[curve.length - 1].error.toFixed(1)} dB at ${format(curve[curve.length - 1].factor)} times of it. ${words || ""}`;
  const columns = [
    { name: "Scale ×", value: (point) => point.factor, cell: (point) => format(point.factor), isNumber: true },
    {
      name: "Noise / signal dB",
      value: (point) => point.error,
      cell: (point) => point.error.toFixed(2),
      isNumber: true,
    },
  ];
  return [
    h("h3", {}, "Error against the scale"),
    makeFigure({ label, height: 200, draw, caption: words }).figure,
    makeData("Error against the scale", columns, () => curve),
  ];
}
