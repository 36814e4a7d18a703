// The error along the depth.
function addDepth() {
  // Points of the line stand where their weight does.
  const places = new Map();
  for (const site of sites) if (site.role === "weight" && !places.has(site.module)) places.set(site.module, site.place);
  const line_ = report.depth
    .filter((point) => point.sqnr !== null && places.has(point.module))
    .map((point) => ({ ...point, place: places.get(point.module) }))
    .sort((a, b) => a.place - b.place);
  const values = [...sorted, ...line_.map((point) => point.sqnr)];
  if (!values.length) return;
  const low = Math.min(...values),
    high = Math.max(...values),
    margin = Math.max(1, (high - low) * 0.06);
  const readout = h("p", { class: "readout muted", "aria-live": "polite" }, "Point at a value, or use the arrow keys.");
  const positions = [];
  let at = null;
  const draw = (width, height) => {
    const box = [46, 22, width - 8, height - 38];
    const x = scaleOf(0, Math.max(1, sites.length - 1), box[0] + 8, box[2] - 8),
      y = scaleOf(low - margin, high + margin, box[3], box[1]);
    const xTicks = ticks(1, sites.length, width / 110)
      .filter((tick) => Number.isInteger(tick) && tick > 0)
      .map((tick) => tick - 1);
    positions.length = 0;
    for (const site of measured) positions.push([x(site.place), y(site.sqnr), site]);
    const path = line_
      .map((point, place) => `${place ? "L" : "M"}${x(point.place).toFixed(1)} ${y(point.sqnr).toFixed(1)}`)
      .join("");
    const size = measured.length > 400 ? 2.2 : 3.2;
    return [
      drawAxes(x, y, box, {
        xTicks,
        yTicks: ticks(low - margin, high + margin, 5),
        xLabel: "place in the graph",
        yLabel: "dB, more is better",
        xFormat: (tick) => count(tick + 1),
      }),
      positions.map(([cx, cy, site]) => makeMark(site.role, cx, cy, size)),
      s("path", { class: "depthline", d: path }),
      line_.length <= 120 &&
        line_.map((point) => s("circle", { cx: x(point.place), cy: y(point.sqnr), r: 1.8, fill: "var(--depth)" })),
      at && s("circle", { class: "here", cx: x(at.place), cy: y(at.sqnr), r: 7 }),
    ];
  };
  const legend = h(
    "ul",
    { class: "legend" },
    roles().map((role) => legendItem(makeMark(role, 11, 6), `${role}s, each by itself`)),
    line_.length > 0 && legendItem(line("depthline"), "outputs of layers, all errors before them included"),
  );
  const worst = worstFirst[0];
  const label =
    `Error along the depth: ${measured.length} values in the graph's order, from ${low.toFixed(1)} to ${high.toFixed(1)} dB; the worst is ${nameOf(worst)}.` +
    (line_.length
      ? ` The quantized model's outputs are ${line_[0].sqnr.toFixed(1)} dB at the first layer and ${line_[line_.length - 1].sqnr.toFixed(1)} dB at the last.`
      : "");
  const chart = makeFigure({ label, height: 300, draw, legend, isInteractive: true });
  const point = (site) => {
    at = site;
    const output = line_.find((found) => found.module === site.module);
    readout.textContent = `${nameOf(site)}: ${decibels(site)}${output ? `; output of this layer ${output.sqnr.toFixed(1)} dB` : ""}`;
    chart.redraw();
  };
  const nearest = (event) => {
    const bounds = chart.svg.getBoundingClientRect();
    let best = null,
      least = Infinity;
    for (const [cx, cy, site] of positions) {
      const distance = (cx - event.clientX + bounds.left) ** 2 + (cy - event.clientY + bounds.top) ** 2;
      if (distance < least) [least, best] = [distance, site];
    }
    return best;
  };
  chart.svg.addEventListener("mousemove", (event) => {
    const site = nearest(event);
    if (site && site !== at) point(site);
  });
  chart.svg.addEventListener("click", (event) => {
    const site = nearest(event);
    if (site) select(site);
  });
  chart.svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -measured.length, End: measured.length }[event.key];
    if (step) {
      event.preventDefault();
      const place = at ? measured.indexOf(at) + step : 0;
      point(measured[Math.max(0, Math.min(measured.length - 1, place))]);
    } else if (event.key === "Enter" && at) select(at, { move: true });
  });
  onSelect((site) => {
    if (site && site.isMeasured && site.sqnr !== null) point(site);
  });
  const columns = [
    {
      name: "Module",
      value: (point_) => point_.module,
      cell: (point_) => h("span", { class: "mono" }, point_.module || "(root)"),
    },
    { name: "Output dB", value: (point_) => point_.sqnr, cell: (point_) => point_.sqnr.toFixed(1), isNumber: true },
  ];
  addSection(
    "depth",
    "Error along the depth",
    report.depth.length
      ? "Points are values, each with its own error alone. The line is what each layer gives in the quantized model against the float one, on one batch: errors from all layers before it have come together there."
      : "Points are values, each with its own error alone.",
    chart.figure,
    readout,
    line_.length > 0 && makeData("Output of each layer against the float model's", columns, () => line_),
  );
}
