// Sizes by format, what stays in float, and what the run was.
function addSizes() {
  const total = sizes();
  if (!total.bytes) return;
  const rows = report.sizes.map((size, place) => ({ ...size, name: size.format, className: `c${place % 6}` }));
  if (total.inFloat) {
    rows.push({
      name: "stays in float",
      weights: report.float.length,
      elements: report.float.reduce((sum, entry) => sum + entry.shape.reduce((a, b) => a * b, 1), 0),
      bytes: total.inFloat,
      float_bytes: total.inFloat,
      className: "cf",
    });
  }
  const stack = h(
    "div",
    {
      class: "stack",
      role: "img",
      "aria-label": `Size by format: ${rows.map((row) => `${row.name} ${percent(row.bytes, total.bytes)}`).join(", ")}`,
    },
    rows.map((row) =>
      setStyle(
        h("span", { class: row.className, title: `${row.name}: ${bytes(row.bytes)}` }),
        "flex",
        `${row.bytes} 0 0`,
      ),
    ),
  );
  const columns = [
    {
      name: "Format",
      value: (row) => row.name,
      cell: (row) => [h("span", { class: `swatch ${row.className}`, "aria-hidden": "true" }), row.name],
    },
    { name: "Tensors", value: (row) => row.weights, cell: (row) => count(row.weights), isNumber: true },
    {
      name: "Elements",
      value: (row) => row.elements,
      cell: (row) => count(row.elements),
      isNumber: true,
      hidden: "wide",
    },
    { name: "Size", value: (row) => row.bytes, cell: (row) => bytes(row.bytes), isNumber: true },
    { name: "Share", value: (row) => row.bytes, cell: (row) => percent(row.bytes, total.bytes), isNumber: true },
    { name: "In float", value: (row) => row.float_bytes, cell: (row) => bytes(row.float_bytes), isNumber: true },
    {
      name: "Bits each",
      value: (row) => row.bytes / row.elements,
      cell: (row) => ((8 * row.bytes) / row.elements).toFixed(2),
      isNumber: true,
      hidden: "wide",
    },
  ];
  addSection(
    "size",
    "Size by format",
    "What a checkpoint needs: a weight's bits, with its scales and zero points.",
    stack,
    makeTable({ caption: "Size by format", columns, rows }).node,
  );
}

function addFloat() {
  const vectors = report.float.filter((entry) => entry.shape.length < 2),
    matrices = report.float.filter((entry) => entry.shape.length > 1);
  const columns = [
    {
      name: "Parameter",
      value: (entry) => entry.name,
      cell: (entry) => h("span", { class: "mono" }, breakPath(entry.name)),
      className: "module",
    },
    { name: "Shape", cell: (entry) => h("span", { class: "num" }, entry.shape.join(" × ")) },
    { name: "Size", value: (entry) => entry.bytes, cell: (entry) => bytes(entry.bytes), isNumber: true },
    { name: "Why", value: (entry) => entry.reason, cell: (entry) => entry.reason },
  ];
  const left = report.left_in_float;
  const rest = vectors.reduce((sum, entry) => sum + entry.bytes, 0);
  const nothing = !report.float.length && !left.length;
  addSection(
    "float",
    "What stays in float",
    nothing ? "Nothing: every parameter is quantized." : null,
    left.length > 0 &&
      h(
        "div",
        { class: "warn" },
        h("strong", {}, "Targeted, but left in float"),
        h(
          "ul",
          {},
          left.map(([name, reason]) => h("li", {}, h("span", { class: "mono" }, name), ` – ${reason}`)),
        ),
      ),
    matrices.length > 0 && makeTable({ caption: "Parameters in float", columns, rows: matrices }).node,
    vectors.length > 0 &&
      h(
        "p",
        { class: "note" },
        `${matrices.length ? "Besides, " : ""}${count(vectors.length)} biases, norms and other vectors of ${bytes(rest)} in all: formats are for matrices.`,
      ),
  );
}

function addRun() {
  const facts = [
    ["model", report.model],
    ["written to", report.out],
    ["scheme", report.scheme],
    ["batches", report.batches],
    ["seconds", report.seconds],
    ...Object.entries(report.versions),
  ];
  const list = h(
    "dl",
    { class: "facts" },
    facts
      .filter(([, value]) => value !== null && value !== undefined)
      .map(([name, value]) => [h("dt", {}, name), h("dd", {}, String(value))]),
  );
  addSection(
    "run",
    "Config and versions",
    null,
    h(
      "div",
      { class: "two" },
      list,
      report.config
        ? h(
            "div",
            {},
            h("pre", { tabindex: 0, "aria-label": "The config" }, JSON.stringify(trim(report.config), null, 2)),
          )
        : h("p", { class: "muted" }, "The graph does not know its config."),
    ),
  );
}

// A config without what it leaves open.
function trim(value) {
  if (Array.isArray(value)) return value.map(trim);
  if (value === null || typeof value !== "object") return value;
  const isEmpty = (item) => item === null || (typeof item === "object" && !Object.keys(item).length);
  return Object.fromEntries(
    Object.entries(value)
      .filter(([, item]) => !isEmpty(item))
      .map(([name, item]) => [name, trim(item)]),
  );
}
