// The panel of the chosen value.

function showDetail(site) {
  detail.classList.toggle("empty", !site);
  if (!site) {
    detail.replaceChildren(
      h("h2", {}, "No value is chosen"),
      h(
        "p",
        { class: "muted" },
        "Choose one in a table or a picture to see its histogram, its grid, and what other scales would cost.",
      ),
    );
    return;
  }
  const picture = site.picture;
  const facts = [
    ["SQNR", decibels(site)],
    ["format", site.format],
    [
      "scales",
      site.num_scales
        ? site.num_scales > 1
          ? `${count(site.num_scales)}, ${format(site.scale_min)} to ${format(site.scale_max)}`
          : format(site.scale_max)
        : "each value brings its own",
    ],
    ["range / min–max", site.range_ratio === null ? null : format(site.range_ratio)],
    ["elements", picture ? count(picture.num_elements) : null],
    ["size", site.num_bytes ? `${bytes(site.num_bytes)}, ${bytes(site.num_float_bytes)} in float` : null],
  ];
  const close = h("button", { type: "button", class: "quiet close", onclick: () => select(null) }, "Close");
  detail.replaceChildren(
    h("div", { class: "head" }, h("h2", { class: "mono" }, breakPath(site.module)), close),
    h(
      "p",
      {},
      h("span", { class: "badge" }, site.role),
      " ",
      h("span", { class: "badge" }, `${site.place + 1} of ${sites.length}`),
    ),
    h(
      "dl",
      { class: "facts" },
      facts.filter(([, value]) => value !== null).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]),
    ),
    ...(picture
      ? [drawHistogram(picture), drawCurve(picture)]
      : [
          h(
            "p",
            { class: "muted" },
            site.isMeasured
              ? "There is no picture of this value."
              : "No batch reached this value: give the report batches.",
          ),
        ]
    ).flat(),
    ...drawExperts(site),
    ...drawCandidates(site),
  );
  detail.scrollTop = 0;
}

function drawExperts(site) {
  const tokens = site.tokens_per_expert;
  if (!tokens || !tokens.length) return [];
  const most = Math.max(1, ...tokens),
    total = tokens.reduce((a, b) => a + b, 0),
    idle = tokens.filter((number) => !number).length;
  const draw = (width, height) => {
    const box = [46, 22, width - 6, height - 38];
    const x = scaleOf(0, tokens.length, box[0], box[2]),
      y = scaleOf(0, most * 1.08, box[3], box[1]);
    return [
      drawAxes((tick) => x(tick + 0.5), y, box, {
        xTicks: ticks(0, tokens.length - 1, width / 60).filter(Number.isInteger),
        yTicks: ticks(0, most, 3),
        xLabel: "expert",
        yLabel: "tokens",
      }),
      s(
        "g",
        { class: "bars" },
        tokens.map((number, place) =>
          s(
            "rect",
            {
              x: x(place) + 0.5,
              y: y(number),
              width: Math.max(0.6, x(place + 1) - x(place) - 1),
              height: box[3] - y(number),
            },
            s("title", {}, `expert ${place}: ${count(number)} tokens`),
          ),
        ),
      ),
    ];
  };
  const words = `${count(total)} tokens went to ${tokens.length} experts, ${count(Math.min(...tokens))} to ${count(most)} each${idle ? `; ${idle} had none` : ""}.`;
  const rows = () => tokens.map((number, place) => ({ number, place }));
  const columns = [
    { name: "Expert", value: (row) => row.place, cell: (row) => row.place, isNumber: true },
    { name: "Tokens", value: (row) => row.number, cell: (row) => count(row.number), isNumber: true },
  ];
  return [
    h("h3", {}, "Tokens an expert"),
    makeFigure({ label: `Tokens an expert: ${words}`, height: 170, draw, caption: words }).figure,
    makeData("Tokens an expert", columns, rows),
  ];
}

function drawCandidates(site) {
  const analysis = report.analysis;
  const errors = analysis && analysis.sites[`${site.module}|${site.role}`];
  if (!errors) return [];
  const chosen = analysis.choice && analysis.choice.chosen && analysis.choice.chosen[site.module];
  const rows = Object.entries(errors).map(([name, error]) => ({ name, error }));
  const columns = [
    {
      name: "Format",
      value: (row) => row.name,
      cell: (row) => [row.name, row.name === chosen && [" ", h("span", { class: "badge" }, "chosen")]],
    },
    {
      name: `Error of the model${analysis.unit ? `, ${analysis.unit}` : ""}`,
      value: (row) => row.error ?? Infinity,
      cell: (row) => format(row.error),
      isNumber: true,
    },
  ];
  return [h("h3", {}, "Other formats"), makeTable({ caption: "Other formats", columns, rows, order: 1 }).node];
}
