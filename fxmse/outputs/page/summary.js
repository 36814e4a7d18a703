// The line of numbers at the top.
function addSummary() {
  const cards = [];
  const add = (name, value, hint) =>
    cards.push(h("div", {}, h("dt", {}, name), h("dd", {}, value, hint && h("small", {}, hint))));
  add(
    "Values",
    count(sites.length),
    roles()
      .map((role) => `${count(sites.filter((site) => site.role === role).length)} ${role}`)
      .join(", "),
  );
  if (measured.length) {
    add("Worst value", decibels(worstFirst[0]), [breakPath(worstFirst[0].module), ` ${worstFirst[0].role}`]);
    add("Median", `${quantile(sorted, 0.5).toFixed(1)} dB`, "signal over quantization noise");
  }
  const reached = report.depth.filter((point) => point.sqnr !== null);
  if (reached.length) {
    const last = reached[reached.length - 1];
    add("At the last layer", `${last.sqnr.toFixed(1)} dB`, [
      "output of ",
      breakPath(last.module),
      " against the float model's",
    ]);
  }
  const total = sizes();
  if (total.bytes) {
    add("Size", bytes(total.bytes), `${bytes(total.before)} in float, ${percent(total.bytes, total.before)} of it`);
    if (total.elements)
      add(
        "Quantized weights",
        `${((8 * total.quantized) / total.elements).toFixed(2)} bits`,
        "a weight, with its scales",
      );
  }
  document.getElementById("cards").append(...cards);
  const words = [report.model, report.out && `→ ${report.out}`, report.scheme].filter(Boolean);
  document.getElementById("subtitle").textContent = words.join(" · ");
  document.getElementById("subtitle").title = words.join(" · ");
  document.title = `${report.model || "model"} – quantization report`;
}

const roles = () => [...new Set(sites.map((site) => site.role))].sort((a, b) => ROLES.indexOf(a) - ROLES.indexOf(b));

function sizes() {
  const sum = (rows, field) => rows.reduce((total, row) => total + row[field], 0);
  const quantized = sum(report.sizes, "bytes"),
    inFloat = sum(report.float, "bytes");
  return {
    quantized,
    inFloat,
    bytes: quantized + inFloat,
    before: sum(report.sizes, "float_bytes") + inFloat,
    elements: sum(report.sizes, "elements"),
  };
}
