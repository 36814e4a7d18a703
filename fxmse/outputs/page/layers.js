// Layers and values, coloured by SQNR.
// Layers are what stands before the first number of a path, and it: "model.layers.3". What comes behind is a column.
function splitPath(module) {
  const parts = module.split(".");
  const place = parts.findIndex((part) => /^\d+$/.test(part));
  if (place < 0) return [parts.slice(0, -1).join(".") || "(root)", parts[parts.length - 1]];
  return [
    parts.slice(0, place + 1).join("."),
    parts
      .slice(place + 1)
      .map((part) => (/^\d+$/.test(part) ? "*" : part))
      .join("."),
  ];
}

function addLayers() {
  const layers = new Map(),
    columns = new Map();
  for (const site of sites) {
    const [layer, rest] = splitPath(site.module);
    const column = `${rest}\u0000${site.role}`;
    if (!columns.has(column)) columns.set(column, [rest, site.role]);
    if (!layers.has(layer)) layers.set(layer, new Map());
    const cells = layers.get(layer);
    if (!cells.has(column)) cells.set(column, []);
    cells.get(column).push(site);
  }
  const keys = [...columns.keys()];
  const buttons = [];
  const rows = [...layers].map(([layer, cells]) =>
    h(
      "tr",
      {},
      h("th", { scope: "row", class: "mono", title: layer }, layer),
      keys.map((key) => {
        const found = cells.get(key);
        if (!found) return h("td", {});
        const worst = found.reduce((a, b) => (rank(b) < rank(a) ? b : a));
        const more = found.length > 1 ? `, the worst of ${found.length}` : "";
        const button = h(
          "button",
          {
            type: "button",
            class: colourOf(worst),
            tabindex: -1,
            title: `${nameOf(worst)}: ${decibels(worst)}${more}`,
            "aria-label": `${nameOf(worst)}, ${decibels(worst)}${more}`,
            onclick: () => select(worst, { move: true }),
          },
          worst.sqnr === null ? (worst.isMeasured ? "∞" : "·") : worst.sqnr.toFixed(1),
        );
        buttons.push([worst, button]);
        return h("td", {}, button);
      }),
    ),
  );
  if (buttons.length) buttons[0][1].tabIndex = 0;
  const head = h(
    "tr",
    {},
    h("th", { scope: "col" }, "Layer"),
    keys.map((key) => {
      const [rest, role] = columns.get(key);
      return h(
        "th",
        { scope: "col", title: `${rest} ${role}` },
        h("span", { class: "turn" }, rest ? `${rest} ` : "", h("span", { class: "role" }, role)),
      );
    }),
  );
  const table = h(
    "table",
    { onkeydown: moveInGrid },
    h("caption", { class: "sr" }, "SQNR in dB by layer and by value; arrow keys move between values"),
    h("thead", {}, head),
    h("tbody", {}, rows),
  );
  onSelect((site) => {
    for (const [own, button] of buttons) {
      if (own === site) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
  });
  const ramp = h(
    "span",
    { class: "ramp", "aria-hidden": "true" },
    [...Array(8).keys()].map((place) => h("span", { class: `q${place}` })),
  );
  addSection(
    "layers",
    "Layers and values",
    "Each cell is a value's SQNR in dB; of several values that share a cell, the worst one's.",
    h("p", { class: "legend" }, `${colours.low} dB or less`, ramp, `${colours.high} dB or more`),
    h("div", { class: "scroll heat" }, table),
  );
}

function moveInGrid(event) {
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const cell = event.target.closest("td");
  if (!steps[event.key] || !cell) return;
  event.preventDefault();
  const [down, right] = steps[event.key];
  let row = cell.parentNode,
    place = cell.cellIndex;
  for (;;) {
    row = down ? (down > 0 ? row.nextElementSibling : row.previousElementSibling) : row;
    place += right;
    const next = row && row.cells[place];
    if (!next || next.tagName !== "TD") return;
    const button = next.querySelector("button");
    if (button) {
      event.target.tabIndex = -1;
      button.tabIndex = 0;
      button.focus();
      return;
    }
  }
}
