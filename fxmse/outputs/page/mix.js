// What other formats would cost, and the error against the size.
function addMix() {
  const analysis = report.analysis,
    choice = analysis && analysis.choice;
  if (!analysis) return;
  const of = analysis.unit ? `, ${analysis.unit}` : "";
  const totals = Object.entries(analysis.totals).map(([name, error]) => ({ name, error }));
  const totalColumns = [
    { name: "Format", value: (row) => row.name, cell: (row) => row.name },
    {
      name: `Error of the model with all of it${of}`,
      value: (row) => row.error ?? Infinity,
      cell: (row) => format(row.error),
      isNumber: true,
    },
  ];
  const table =
    totals.length > 0 && makeTable({ caption: "Formats compared", columns: totalColumns, rows: totals, order: 1 }).node;
  if (!choice) {
    if (table)
      addSection("mix", "Formats compared", "What the analysis measured with every value in one format.", table);
    return;
  }
  const numbers = new Map();
  for (const name of Object.values(choice.chosen || {})) numbers.set(name, (numbers.get(name) || 0) + 1);
  const mix = [...numbers]
    .sort((a, b) => b[1] - a[1])
    .map(([name, number]) => `${count(number)} in ${name}`)
    .join(", ");
  const proof =
    choice.gap === null
      ? ""
      : choice.gap > 0
        ? ` It is at most ${(100 * choice.gap).toFixed(2)} % above the least.`
        : " It is proven to be the least.";
  addSection(
    "mix",
    "Error against size",
    `The least error that a mix of the candidates has at each size, as the analysis estimates it.${proof}`,
    ...drawMix(choice, of),
    mix && h("p", {}, `Modules: ${mix}.`),
    table,
  );
}

function drawMix(choice, of) {
  const points = choice.curve.map(([x, y]) => ({ x, y })).filter((point) => point.x !== null && point.y !== null);
  if (!points.length) return [];
  const chosen = { x: choice.size, y: choice.error };
  const all = [...points, chosen],
    isLogarithmic = all.every((point) => point.y > 0);
  const height_ = (point) => (isLogarithmic ? Math.log10(point.y) : point.y);
  const low = Math.min(...all.map(height_)),
    high = Math.max(...all.map(height_)),
    margin = (high - low || 1) * 0.1;
  const first = Math.min(...all.map((point) => point.x)),
    last = Math.max(...all.map((point) => point.x), choice.budget ?? first);
  const unit = { bits: "bits a weight", bytes: "bytes" }[choice.unit] || choice.unit;
  const size = (value) => (choice.unit === "bytes" ? bytes(value) : format(value));
  const draw = (width, height) => {
    const box = [56, 22, width - 14, height - 38];
    const x = scaleOf(first, last, box[0] + 10, box[2] - 10),
      y = scaleOf(low - margin, high + margin, box[3], box[1]);
    return [
      drawAxes(x, y, box, {
        xTicks: ticks(first, last, width / 100),
        yTicks: ticks(low - margin, high + margin, 4),
        xFormat: size,
        yFormat: (tick) => format(isLogarithmic ? 10 ** tick : tick, 2),
        xLabel: unit,
        yLabel: `error${of}`,
      }),
      choice.budget !== null && [
        s("line", { class: "minmax", x1: x(choice.budget), x2: x(choice.budget), y1: box[1], y2: box[3] }),
        text(x(choice.budget) - 5, box[1] + 9, "budget", { class: "text-minmax", "text-anchor": "end" }),
      ],
      s("path", {
        class: "curve",
        d: points
          .map((point, place) => `${place ? "L" : "M"}${x(point.x).toFixed(1)} ${y(height_(point)).toFixed(1)}`)
          .join(""),
      }),
      points.length <= 80 &&
        points.map((point) =>
          s(
            "circle",
            { cx: x(point.x), cy: y(height_(point)), r: 2.4, fill: "var(--text)" },
            s("title", {}, `${size(point.x)}, error ${format(point.y)}`),
          ),
        ),
      s("circle", { class: "dot-chosen", cx: x(chosen.x), cy: y(height_(chosen)), r: 6 }),
      text(x(chosen.x) - 9, y(height_(chosen)) + 16, "chosen", {
        class: "text-chosen",
        "text-anchor": x(chosen.x) > box[0] + 60 ? "end" : "start",
      }),
    ];
  };
  const ends = [points[0], points[points.length - 1]].map((point) => `${format(point.y)} at ${size(point.x)}`);
  const label = `Error against size, in ${unit}: from ${ends[0]} to ${ends[1]}. Chosen: ${format(chosen.y)} at ${size(chosen.x)}${choice.budget === null ? "" : `, of a budget of ${size(choice.budget)}`}.`;
  const columns = [
    { name: `Size, ${unit}`, value: (point) => point.x, cell: (point) => size(point.x), isNumber: true },
    { name: `Error${of}`, value: (point) => point.y, cell: (point) => format(point.y), isNumber: true },
  ];
  return [makeFigure({ label, height: 260, draw }).figure, makeData("Error against size", columns, () => points)];
}
