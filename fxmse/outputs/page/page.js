"use strict";
// Draws the report that #report holds. Text of models and configs becomes text nodes and attributes, never markup.
(() => {
  const report = JSON.parse(document.getElementById("report").textContent);
  const main = document.getElementById("main");
  const detail = document.getElementById("detail");
  const SVG = "http://www.w3.org/2000/svg";
  const PAGE = 25;
  const ROLES = ["weight", "input", "output", "q", "k", "v"];
  const sites = report.sites.map((site, place) => ({ ...site, place, isMeasured: site.range_ratio !== null }));
  const selection = { site: null, listeners: [] };

  // -------------------------------------------------------------------------------------------------- elements

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else node.setAttribute(name, value === true ? "" : String(value));
    }
    for (const child of children.flat(Infinity)) {
      if (child !== null && child !== undefined && child !== false) node.append(child);
    }
    return node;
  }
  const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

  function setStyle(node, name, value) {
    node.style.setProperty(name, value);
    return node;
  }

  // --------------------------------------------------------------------------------------------------- numbers

  function format(value, digits = 3) {
    if (value === null || value === undefined) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-3) return value.toExponential(2).replace("e+", "e").replace("-", "−").replace("e-", "e−");
    return String(Number(value.toPrecision(size >= 1000 ? 4 : digits))).replace("-", "−");
  }
  const count = (value) => value.toLocaleString("en-US");
  const percent = (part, whole) => (whole ? `${(100 * part / whole).toFixed(part / whole < 0.1 ? 1 : 0)} %` : "–");

  function bytes(value) {
    for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
      if (value >= size) return `${(value / size).toFixed(value >= 100 * size ? 0 : value >= 10 * size ? 1 : 2)} ${unit}`;
    }
    return `${value} B`;
  }

  function decibels(site) {
    if (!site.isMeasured) return "not measured";
    return site.sqnr === null ? "exact" : `${site.sqnr.toFixed(1)} dB`;
  }
  // What sorts last: a value without any error, then one that was not measured.
  const rank = (site) => (!site.isMeasured ? Infinity : site.sqnr === null ? 1e9 : site.sqnr);
  // A path breaks behind its dots.
  const breakPath = (module) => (module ? module.split(/(?<=\.)/).flatMap((part, place) => (place ? [h("wbr"), part] : [part])) : "(root)");
  const nameOf = (site) => `${site.module || "(root)"} ${site.role}`;

  function quantile(sorted, part) {
    return sorted[Math.min(sorted.length - 1, Math.max(0, Math.round(part * (sorted.length - 1))))];
  }
  const measured = sites.filter((site) => site.isMeasured && site.sqnr !== null);
  const sorted = measured.map((site) => site.sqnr).sort((a, b) => a - b);
  const worstFirst = [...sites].sort((a, b) => rank(a) - rank(b) || a.place - b.place);

  // Eight colours from the worst to the best, between round numbers around most of the values.
  const colours = (() => {
    let low = Math.floor(quantile(sorted, 0.02) ?? 0), high = Math.ceil(quantile(sorted, 0.98) ?? 8);
    if (high - low < 4) [low, high] = [low - 2, high + 2];
    return { low, high, of: (sqnr) => Math.max(0, Math.min(7, Math.floor((8 * (sqnr - low)) / (high - low)))) };
  })();
  const colourOf = (site) => (!site.isMeasured ? "none" : site.sqnr === null ? "q7" : `q${colours.of(site.sqnr)}`);

  // -------------------------------------------------------------------------------------------------- selection

  function select(site, { move = false } = {}) {
    selection.site = site;
    showDetail(site);
    for (const listener of selection.listeners) listener(site);
    document.getElementById("status").textContent = site ? `${nameOf(site)}, ${decibels(site)}` : "";
    const hash = site ? `#value-${site.place}` : " ";
    try { history.replaceState(null, "", hash); } catch { /* a page without an address */ }
    if (move && site) detail.focus({ preventScroll: true });
  }
  const onSelect = (listener) => selection.listeners.push(listener);

  // ----------------------------------------------------------------------------------------------------- tables

  // A table whose columns sort, of which a page is shown at a time. Columns: {name, value, cell, isNumber, hidden,
  // className}: those without a value do not sort, and narrow screens leave out what is hidden ("wide", "wider").
  function makeTable({ caption, columns, rows, order = null, onRow = null, rowAttributes = () => ({}) }) {
    const state = { rows, column: order, isDescending: false, shown: PAGE };
    const body = h("tbody");
    const heads = columns.map((column, place) => {
      const label = column.value ? h("button", { type: "button", onclick: () => sortBy(place) }, column.name) : column.name;
      const names = [column.isNumber && "num", column.hidden].filter(Boolean).join(" ");
      return h("th", { scope: "col", class: names || null }, label);
    });
    const more = h("div", { class: "more" });
    const table = h("table", {}, h("caption", { class: "sr" }, caption), h("thead", {}, h("tr", {}, heads)), body);

    function sortBy(place) {
      state.isDescending = state.column === place && !state.isDescending;
      state.column = place;
      draw();
    }

    function draw() {
      heads.forEach((head, place) => {
        if (columns[place].value) {
          const isOwn = place === state.column;
          head.setAttribute("aria-sort", isOwn ? (state.isDescending ? "descending" : "ascending") : "none");
        }
      });
      const value = state.column === null ? null : columns[state.column].value;
      const ordered = value === null ? state.rows : [...state.rows].sort((a, b) => compare(value(a), value(b), state.isDescending));
      body.replaceChildren(...ordered.slice(0, state.shown).map(makeRow));
      const left = ordered.length - state.shown;
      const show = (number) => () => { state.shown += number; draw(); };
      more.replaceChildren(...(left > 0 ? [
        h("button", { type: "button", class: "quiet", onclick: show(PAGE) }, `Show ${Math.min(PAGE, left)} more`),
        h("button", { type: "button", class: "quiet", onclick: show(left) }, `Show all ${count(ordered.length)}`),
      ] : []));
    }

    function makeRow(row) {
      const cells = columns.map((column) => {
        const names = [column.isNumber && "num", column.hidden, column.className].filter(Boolean).join(" ");
        return h("td", { class: names || null }, column.cell(row));
      });
      return h("tr", { ...rowAttributes(row), onclick: onRow && (() => onRow(row)) }, cells);
    }

    draw();
    return {
      node: h("div", {}, h("div", { class: "scroll" }, table), more),
      body,
      setRows(next) { state.rows = next; state.shown = PAGE; draw(); },
    };
  }

  function compare(a, b, isDescending) {
    const [first, second] = isDescending ? [b, a] : [a, b];
    if (typeof first === "string") return first.localeCompare(second, "en", { numeric: true });
    return first < second ? -1 : first > second ? 1 : 0;
  }

  /** The numbers behind a picture, in a table that is made when it is opened. */
  function makeData(caption, columns, makeRows) {
    const data = h("details", {}, h("summary", {}, "Numbers"));
    data.addEventListener("toggle", () => {
      if (data.open && data.childElementCount === 1) data.append(makeTable({ caption, columns, rows: makeRows() }).node);
    });
    return data;
  }

  // ----------------------------------------------------------------------------------------------------- charts

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
      if (found !== width) { width = found; redraw(); }
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
    return s("g", { class: "axis" },
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
      input: () => s("path", { d: `M${x} ${y - size * 1.25}L${x + size * 1.25} ${y}L${x} ${y + size * 1.25}L${x - size * 1.25} ${y}Z` }),
      output: () => s("rect", { x: x - size, y: y - size, width: 2 * size, height: 2 * size }),
    };
    const mark = (shapes[role] || (() => s("path", { d: `M${x} ${y - size * 1.2}L${x + size * 1.2} ${y + size}L${x - size * 1.2} ${y + size}Z` })))();
    mark.setAttribute("class", `r-${role}`);
    return mark;
  }

  const legendItem = (mark, label) => h("li", {}, s("svg", { width: 22, height: 12, "aria-hidden": "true" }, mark), label);
  const line = (className) => s("line", { class: className, x1: 1, x2: 21, y1: 6, y2: 6 });

  // ---------------------------------------------------------------------------------------------------- sections

  const navigation = [];
  function addSection(id, title, note, ...children) {
    navigation.push([id, title]);
    main.append(h("section", { id, "aria-labelledby": `${id}-title` },
      h("h2", { id: `${id}-title` }, title), note && h("p", { class: "note" }, note), children));
  }

  function addSummary() {
    const cards = [];
    const add = (name, value, hint) => cards.push(h("div", {}, h("dt", {}, name), h("dd", {}, value, hint && h("small", {}, hint))));
    add("Values", count(sites.length), roles().map((role) => `${count(sites.filter((site) => site.role === role).length)} ${role}`).join(", "));
    if (measured.length) {
      add("Worst value", decibels(worstFirst[0]), [breakPath(worstFirst[0].module), ` ${worstFirst[0].role}`]);
      add("Median", `${quantile(sorted, 0.5).toFixed(1)} dB`, "signal over quantization noise");
    }
    const reached = report.depth.filter((point) => point.sqnr !== null);
    if (reached.length) {
      const last = reached[reached.length - 1];
      add("At the last layer", `${last.sqnr.toFixed(1)} dB`, ["output of ", breakPath(last.module), " against the float model's"]);
    }
    const total = sizes();
    if (total.bytes) {
      add("Size", bytes(total.bytes), `${bytes(total.before)} in float, ${percent(total.bytes, total.before)} of it`);
      if (total.elements) add("Quantized weights", `${(8 * total.quantized / total.elements).toFixed(2)} bits`, "a weight, with its scales");
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
    const quantized = sum(report.sizes, "bytes"), inFloat = sum(report.float, "bytes");
    return {
      quantized, inFloat, bytes: quantized + inFloat, before: sum(report.sizes, "float_bytes") + inFloat,
      elements: sum(report.sizes, "elements"),
    };
  }

  function addValues() {
    const meter = (site) => {
      if (!site.isMeasured || site.sqnr === null) return decibels(site);
      const bar = setStyle(h("b", { class: colourOf(site) }), "width", `${Math.max(4, Math.min(100, 100 * site.sqnr / Math.max(1, colours.high)))}%`);
      return h("span", { class: "meter" }, h("i", { "aria-hidden": "true" }, bar), site.sqnr.toFixed(1));
    };
    const columns = [
      { name: "Module", value: (site) => site.module, className: "module",
        cell: (site) => h("button", { type: "button", class: "link mono", onclick: (event) => { event.stopPropagation(); select(site, { move: true }); } }, breakPath(site.module)) },
      { name: "Value", value: (site) => site.role, cell: (site) => site.role },
      { name: "Format", value: (site) => site.format, cell: (site) => site.format, className: "format", hidden: "wide" },
      { name: "SQNR dB", value: rank, cell: meter, isNumber: true },
      { name: "Range/min–max", value: (site) => site.range_ratio ?? Infinity, cell: (site) => (site.range_ratio === null ? "–" : site.range_ratio.toFixed(3)), isNumber: true, hidden: "wide" },
      { name: "Order", value: (site) => site.place, cell: (site) => site.place + 1, isNumber: true, hidden: "wider" },
    ];
    const table = makeTable({
      caption: "Quantized values, worst first", columns, rows: worstFirst, order: 3, onRow: (site) => select(site),
      rowAttributes: (site) => ({ "data-place": site.place, "aria-current": site === selection.site ? "true" : null }),
    });
    onSelect((site) => {
      for (const row of table.body.children) {
        if (site && Number(row.dataset.place) === site.place) row.setAttribute("aria-current", "true");
        else row.removeAttribute("aria-current");
      }
    });
    const search = h("input", { type: "search", id: "search", placeholder: "Search modules, values, formats", "aria-label": "Search modules, values and formats", spellcheck: "false", autocomplete: "off" });
    const choose = (label, options) => h("select", { "aria-label": label }, h("option", { value: "" }, label), options.map((option) => h("option", { value: option }, option)));
    const role = choose("All values", roles()), kind = choose("All formats", [...new Set(sites.map((site) => site.format))].sort());
    const found = h("span", { class: "count", role: "status", "aria-live": "polite", id: "count" });
    const texts = new Map(sites.map((site) => [site, `${site.module} ${site.role} ${site.format}`.toLowerCase()]));
    const filter = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const rows = worstFirst.filter((site) => (!role.value || site.role === role.value) && (!kind.value || site.format === kind.value)
        && words.every((word) => texts.get(site).includes(word)));
      table.setRows(rows);
      found.textContent = rows.length === sites.length ? `${count(sites.length)} values` : `${count(rows.length)} of ${count(sites.length)} values`;
    };
    for (const control of [search, role, kind]) control.addEventListener("input", filter);
    addSection("values", "Worst values first",
      "SQNR is the signal over the noise that quantization adds, in dB: 6 dB more is half the error. Choose a value to see how it lies on its grid.",
      h("div", { class: "tools" }, search, role, kind, found), table.node);
    filter();
  }

  // Layers are what stands before the first number of a path, and it: "model.layers.3". What comes behind is a column.
  function splitPath(module) {
    const parts = module.split(".");
    const place = parts.findIndex((part) => /^\d+$/.test(part));
    if (place < 0) return [parts.slice(0, -1).join(".") || "(root)", parts[parts.length - 1]];
    return [parts.slice(0, place + 1).join("."), parts.slice(place + 1).map((part) => (/^\d+$/.test(part) ? "*" : part)).join(".")];
  }

  function addLayers() {
    const layers = new Map(), columns = new Map();
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
    const rows = [...layers].map(([layer, cells]) => h("tr", {}, h("th", { scope: "row", class: "mono", title: layer }, layer),
      keys.map((key) => {
        const found = cells.get(key);
        if (!found) return h("td", {});
        const worst = found.reduce((a, b) => (rank(b) < rank(a) ? b : a));
        const more = found.length > 1 ? `, the worst of ${found.length}` : "";
        const button = h("button", { type: "button", class: colourOf(worst), tabindex: -1, title: `${nameOf(worst)}: ${decibels(worst)}${more}`, "aria-label": `${nameOf(worst)}, ${decibels(worst)}${more}`,
          onclick: () => select(worst, { move: true }) }, worst.sqnr === null ? (worst.isMeasured ? "∞" : "·") : worst.sqnr.toFixed(1));
        buttons.push([worst, button]);
        return h("td", {}, button);
      })));
    if (buttons.length) buttons[0][1].tabIndex = 0;
    const head = h("tr", {}, h("th", { scope: "col" }, "Layer"), keys.map((key) => {
      const [rest, role] = columns.get(key);
      return h("th", { scope: "col", title: `${rest} ${role}` }, h("span", { class: "turn" }, rest ? `${rest} ` : "", h("span", { class: "role" }, role)));
    }));
    const table = h("table", { onkeydown: moveInGrid }, h("caption", { class: "sr" }, "SQNR in dB by layer and by value; arrow keys move between values"), h("thead", {}, head), h("tbody", {}, rows));
    onSelect((site) => {
      for (const [own, button] of buttons) {
        if (own === site) button.setAttribute("aria-current", "true");
        else button.removeAttribute("aria-current");
      }
    });
    const ramp = h("span", { class: "ramp", "aria-hidden": "true" }, [...Array(8).keys()].map((place) => h("span", { class: `q${place}` })));
    addSection("layers", "Layers and values", "Each cell is a value's SQNR in dB; of several values that share a cell, the worst one's.",
      h("p", { class: "legend" }, `${colours.low} dB or less`, ramp, `${colours.high} dB or more`),
      h("div", { class: "scroll heat" }, table));
  }

  function moveInGrid(event) {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const cell = event.target.closest("td");
    if (!steps[event.key] || !cell) return;
    event.preventDefault();
    const [down, right] = steps[event.key];
    let row = cell.parentNode, place = cell.cellIndex;
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

  function addDepth() {
    // Points of the line stand where their weight does.
    const places = new Map();
    for (const site of sites) if (site.role === "weight" && !places.has(site.module)) places.set(site.module, site.place);
    const line_ = report.depth.filter((point) => point.sqnr !== null && places.has(point.module))
      .map((point) => ({ ...point, place: places.get(point.module) })).sort((a, b) => a.place - b.place);
    const values = [...sorted, ...line_.map((point) => point.sqnr)];
    if (!values.length) return;
    const low = Math.min(...values), high = Math.max(...values), margin = Math.max(1, (high - low) * 0.06);
    const readout = h("p", { class: "readout muted", "aria-live": "polite" }, "Point at a value, or use the arrow keys.");
    const positions = [];
    let at = null;
    const draw = (width, height) => {
      const box = [46, 22, width - 8, height - 38];
      const x = scaleOf(0, Math.max(1, sites.length - 1), box[0] + 8, box[2] - 8), y = scaleOf(low - margin, high + margin, box[3], box[1]);
      const xTicks = ticks(1, sites.length, width / 110).filter((tick) => Number.isInteger(tick) && tick > 0).map((tick) => tick - 1);
      positions.length = 0;
      for (const site of measured) positions.push([x(site.place), y(site.sqnr), site]);
      const path = line_.map((point, place) => `${place ? "L" : "M"}${x(point.place).toFixed(1)} ${y(point.sqnr).toFixed(1)}`).join("");
      const size = measured.length > 400 ? 2.2 : 3.2;
      return [
        drawAxes(x, y, box, { xTicks, yTicks: ticks(low - margin, high + margin, 5), xLabel: "place in the graph", yLabel: "dB, more is better", xFormat: (tick) => count(tick + 1) }),
        positions.map(([cx, cy, site]) => makeMark(site.role, cx, cy, size)),
        s("path", { class: "depthline", d: path }),
        line_.length <= 120 && line_.map((point) => s("circle", { cx: x(point.place), cy: y(point.sqnr), r: 1.8, fill: "var(--depth)" })),
        at && s("circle", { class: "here", cx: x(at.place), cy: y(at.sqnr), r: 7 }),
      ];
    };
    const legend = h("ul", { class: "legend" }, roles().map((role) => legendItem(makeMark(role, 11, 6), `${role}s, each by itself`)),
      line_.length > 0 && legendItem(line("depthline"), "outputs of layers, all errors before them included"));
    const worst = worstFirst[0];
    const label = `Error along the depth: ${measured.length} values in the graph's order, from ${low.toFixed(1)} to ${high.toFixed(1)} dB; the worst is ${nameOf(worst)}.`
      + (line_.length ? ` The quantized model's outputs are ${line_[0].sqnr.toFixed(1)} dB at the first layer and ${line_[line_.length - 1].sqnr.toFixed(1)} dB at the last.` : "");
    const chart = makeFigure({ label, height: 300, draw, legend, isInteractive: true });
    const point = (site) => {
      at = site;
      const output = line_.find((found) => found.module === site.module);
      readout.textContent = `${nameOf(site)}: ${decibels(site)}${output ? `; output of this layer ${output.sqnr.toFixed(1)} dB` : ""}`;
      chart.redraw();
    };
    const nearest = (event) => {
      const bounds = chart.svg.getBoundingClientRect();
      let best = null, least = Infinity;
      for (const [cx, cy, site] of positions) {
        const distance = (cx - event.clientX + bounds.left) ** 2 + (cy - event.clientY + bounds.top) ** 2;
        if (distance < least) [least, best] = [distance, site];
      }
      return best;
    };
    chart.svg.addEventListener("mousemove", (event) => { const site = nearest(event); if (site && site !== at) point(site); });
    chart.svg.addEventListener("click", (event) => { const site = nearest(event); if (site) select(site); });
    chart.svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, Home: -measured.length, End: measured.length }[event.key];
      if (step) {
        event.preventDefault();
        const place = at ? measured.indexOf(at) + step : 0;
        point(measured[Math.max(0, Math.min(measured.length - 1, place))]);
      } else if (event.key === "Enter" && at) select(at, { move: true });
    });
    onSelect((site) => { if (site && site.isMeasured && site.sqnr !== null) point(site); });
    const columns = [
      { name: "Module", value: (point_) => point_.module, cell: (point_) => h("span", { class: "mono" }, point_.module || "(root)") },
      { name: "Output dB", value: (point_) => point_.sqnr, cell: (point_) => point_.sqnr.toFixed(1), isNumber: true },
    ];
    addSection("depth", "Error along the depth",
      report.depth.length ? "Points are values, each with its own error alone. The line is what each layer gives in the quantized model against the float one, on one batch: errors from all layers before it have come together there." : "Points are values, each with its own error alone.",
      chart.figure, readout, line_.length > 0 && makeData("Output of each layer against the float model's", columns, () => line_));
  }

  function addSizes() {
    const total = sizes();
    if (!total.bytes) return;
    const rows = report.sizes.map((size, place) => ({ ...size, name: size.format, className: `c${place % 6}` }));
    if (total.inFloat) {
      rows.push({ name: "stays in float", weights: report.float.length, elements: report.float.reduce((sum, entry) => sum + entry.shape.reduce((a, b) => a * b, 1), 0), bytes: total.inFloat, float_bytes: total.inFloat, className: "cf" });
    }
    const stack = h("div", { class: "stack", role: "img", "aria-label": `Size by format: ${rows.map((row) => `${row.name} ${percent(row.bytes, total.bytes)}`).join(", ")}` },
      rows.map((row) => setStyle(h("span", { class: row.className, title: `${row.name}: ${bytes(row.bytes)}` }), "flex", `${row.bytes} 0 0`)));
    const columns = [
      { name: "Format", value: (row) => row.name, cell: (row) => [h("span", { class: `swatch ${row.className}`, "aria-hidden": "true" }), row.name] },
      { name: "Tensors", value: (row) => row.weights, cell: (row) => count(row.weights), isNumber: true },
      { name: "Elements", value: (row) => row.elements, cell: (row) => count(row.elements), isNumber: true, hidden: "wide" },
      { name: "Size", value: (row) => row.bytes, cell: (row) => bytes(row.bytes), isNumber: true },
      { name: "Share", value: (row) => row.bytes, cell: (row) => percent(row.bytes, total.bytes), isNumber: true },
      { name: "In float", value: (row) => row.float_bytes, cell: (row) => bytes(row.float_bytes), isNumber: true },
      { name: "Bits each", value: (row) => row.bytes / row.elements, cell: (row) => (8 * row.bytes / row.elements).toFixed(2), isNumber: true, hidden: "wide" },
    ];
    addSection("size", "Size by format", "What a checkpoint needs: a weight's bits, with its scales and zero points.", stack, makeTable({ caption: "Size by format", columns, rows }).node);
  }

  function addMix() {
    const analysis = report.analysis, choice = analysis && analysis.choice;
    if (!analysis) return;
    const of = analysis.unit ? `, ${analysis.unit}` : "";
    const totals = Object.entries(analysis.totals).map(([name, error]) => ({ name, error }));
    const totalColumns = [
      { name: "Format", value: (row) => row.name, cell: (row) => row.name },
      { name: `Error of the model with all of it${of}`, value: (row) => row.error ?? Infinity, cell: (row) => format(row.error), isNumber: true },
    ];
    const table = totals.length > 0 && makeTable({ caption: "Formats compared", columns: totalColumns, rows: totals, order: 1 }).node;
    if (!choice) {
      if (table) addSection("mix", "Formats compared", "What the analysis measured with every value in one format.", table);
      return;
    }
    const numbers = new Map();
    for (const name of Object.values(choice.chosen || {})) numbers.set(name, (numbers.get(name) || 0) + 1);
    const mix = [...numbers].sort((a, b) => b[1] - a[1]).map(([name, number]) => `${count(number)} in ${name}`).join(", ");
    const proof = choice.gap === null ? "" : choice.gap > 0 ? ` It is at most ${(100 * choice.gap).toFixed(2)} % above the least.` : " It is proven to be the least.";
    addSection("mix", "Error against size", `The least error that a mix of the candidates has at each size, as the analysis estimates it.${proof}`,
      ...drawMix(choice, of), mix && h("p", {}, `Modules: ${mix}.`), table);
  }

  function drawMix(choice, of) {
    const points = choice.curve.map(([x, y]) => ({ x, y })).filter((point) => point.x !== null && point.y !== null);
    if (!points.length) return [];
    const chosen = { x: choice.size, y: choice.error };
    const all = [...points, chosen], isLogarithmic = all.every((point) => point.y > 0);
    const height_ = (point) => (isLogarithmic ? Math.log10(point.y) : point.y);
    const low = Math.min(...all.map(height_)), high = Math.max(...all.map(height_)), margin = (high - low || 1) * 0.1;
    const first = Math.min(...all.map((point) => point.x)), last = Math.max(...all.map((point) => point.x), choice.budget ?? first);
    const unit = { bits: "bits a weight", bytes: "bytes" }[choice.unit] || choice.unit;
    const size = (value) => (choice.unit === "bytes" ? bytes(value) : format(value));
    const draw = (width, height) => {
      const box = [56, 22, width - 14, height - 38];
      const x = scaleOf(first, last, box[0] + 10, box[2] - 10), y = scaleOf(low - margin, high + margin, box[3], box[1]);
      return [
        drawAxes(x, y, box, { xTicks: ticks(first, last, width / 100), yTicks: ticks(low - margin, high + margin, 4), xFormat: size, yFormat: (tick) => format(isLogarithmic ? 10 ** tick : tick, 2), xLabel: unit, yLabel: `error${of}` }),
        choice.budget !== null && [s("line", { class: "minmax", x1: x(choice.budget), x2: x(choice.budget), y1: box[1], y2: box[3] }), text(x(choice.budget) - 5, box[1] + 9, "budget", { class: "text-minmax", "text-anchor": "end" })],
        s("path", { class: "curve", d: points.map((point, place) => `${place ? "L" : "M"}${x(point.x).toFixed(1)} ${y(height_(point)).toFixed(1)}`).join("") }),
        points.length <= 80 && points.map((point) => s("circle", { cx: x(point.x), cy: y(height_(point)), r: 2.4, fill: "var(--text)" }, s("title", {}, `${size(point.x)}, error ${format(point.y)}`))),
        s("circle", { class: "dot-chosen", cx: x(chosen.x), cy: y(height_(chosen)), r: 6 }),
        text(x(chosen.x) - 9, y(height_(chosen)) + 16, "chosen", { class: "text-chosen", "text-anchor": x(chosen.x) > box[0] + 60 ? "end" : "start" }),
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

  function addFloat() {
    const vectors = report.float.filter((entry) => entry.shape.length < 2), matrices = report.float.filter((entry) => entry.shape.length > 1);
    const columns = [
      { name: "Parameter", value: (entry) => entry.name, cell: (entry) => h("span", { class: "mono" }, breakPath(entry.name)), className: "module" },
      { name: "Shape", cell: (entry) => h("span", { class: "num" }, entry.shape.join(" × ")) },
      { name: "Size", value: (entry) => entry.bytes, cell: (entry) => bytes(entry.bytes), isNumber: true },
      { name: "Why", value: (entry) => entry.reason, cell: (entry) => entry.reason },
    ];
    const left = report.left_in_float;
    const rest = vectors.reduce((sum, entry) => sum + entry.bytes, 0);
    const nothing = !report.float.length && !left.length;
    addSection("float", "What stays in float",
      nothing ? "Nothing: every parameter is quantized." : null,
      left.length > 0 && h("div", { class: "warn" }, h("strong", {}, "Targeted, but left in float"), h("ul", {}, left.map(([name, reason]) => h("li", {}, h("span", { class: "mono" }, name), ` – ${reason}`)))),
      matrices.length > 0 && makeTable({ caption: "Parameters in float", columns, rows: matrices }).node,
      vectors.length > 0 && h("p", { class: "note" }, `${matrices.length ? "Besides, " : ""}${count(vectors.length)} biases, norms and other vectors of ${bytes(rest)} in all: formats are for matrices.`));
  }

  function addRun() {
    const facts = [["model", report.model], ["written to", report.out], ["scheme", report.scheme], ["batches", report.batches], ["seconds", report.seconds], ...Object.entries(report.versions)];
    const list = h("dl", { class: "facts" }, facts.filter(([, value]) => value !== null && value !== undefined).map(([name, value]) => [h("dt", {}, name), h("dd", {}, String(value))]));
    addSection("run", "Config and versions", null, h("div", { class: "two" }, list,
      report.config ? h("div", {}, h("pre", { tabindex: 0, "aria-label": "The config" }, JSON.stringify(trim(report.config), null, 2))) : h("p", { class: "muted" }, "The graph does not know its config.")));
  }

  // A config without what it leaves open.
  function trim(value) {
    if (Array.isArray(value)) return value.map(trim);
    if (value === null || typeof value !== "object") return value;
    const isEmpty = (item) => item === null || (typeof item === "object" && !Object.keys(item).length);
    return Object.fromEntries(Object.entries(value).filter(([, item]) => !isEmpty(item)).map(([name, item]) => [name, trim(item)]));
  }

  // ------------------------------------------------------------------------------------------------------ detail

  function showDetail(site) {
    detail.classList.toggle("empty", !site);
    if (!site) {
      detail.replaceChildren(h("h2", {}, "No value is chosen"), h("p", { class: "muted" }, "Choose one in a table or a picture to see its histogram, its grid, and what other scales would cost."));
      return;
    }
    const picture = site.picture;
    const facts = [
      ["SQNR", decibels(site)],
      ["format", site.format],
      ["scales", site.num_scales ? (site.num_scales > 1 ? `${count(site.num_scales)}, ${format(site.scale_min)} to ${format(site.scale_max)}` : format(site.scale_max)) : "each value brings its own"],
      ["range / min–max", site.range_ratio === null ? null : format(site.range_ratio)],
      ["elements", picture ? count(picture.num_elements) : null],
      ["size", site.num_bytes ? `${bytes(site.num_bytes)}, ${bytes(site.num_float_bytes)} in float` : null],
    ];
    const close = h("button", { type: "button", class: "quiet close", onclick: () => select(null) }, "Close");
    detail.replaceChildren(
      h("div", { class: "head" }, h("h2", { class: "mono" }, breakPath(site.module)), close),
      h("p", {}, h("span", { class: "badge" }, site.role), " ", h("span", { class: "badge" }, `${site.place + 1} of ${sites.length}`)),
      h("dl", { class: "facts" }, facts.filter(([, value]) => value !== null).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
      ...(picture ? [drawHistogram(picture), drawCurve(picture)] : [h("p", { class: "muted" }, site.isMeasured ? "There is no picture of this value." : "No batch reached this value: give the report batches.")]).flat(),
      ...drawExperts(site), ...drawCandidates(site));
    detail.scrollTop = 0;
  }

  function levelsOf(picture) {
    const levels = report.levels[picture.grid] || [];
    return picture.scale === null ? levels : levels.map((level) => picture.scale * (level - picture.zero_point));
  }

  function drawHistogram(picture) {
    const [start, end] = picture.edges, step = (end - start) / picture.counts.length;
    const ends = [start, end, ...picture.chosen, ...(picture.minmax || [])];
    const low = Math.min(...ends), high = Math.max(...ends), margin = (high - low) * 0.02;
    const most = Math.max(...picture.counts), levels = levelsOf(picture);
    const unit = picture.scale === null ? "steps of each element's own scale" : "value";
    const draw = (width, height) => {
      const box = [46, 22, width - 6, height - 38];
      const x = scaleOf(low - margin, high + margin, box[0], box[2]);
      const y = scaleOf(0, Math.log10(most + 1) * 1.06, box[3] - 9, box[1]);
      const decades = ticks(0, Math.log10(most + 1), 4).filter(Number.isInteger);
      const [from, to] = picture.chosen.map(x);
      return [
        s("rect", { class: "range", x: from, y: box[1], width: to - from, height: box[3] - box[1] }),
        drawAxes(x, y, box, { xTicks: ticks(low, high, width / 85), yTicks: decades, yFormat: (tick) => (tick < 4 ? count(10 ** tick) : `1e${tick}`), xLabel: unit, yLabel: "elements, logarithmic" }),
        s("g", { class: "bars" }, picture.counts.map((number, place) => number > 0 && s("rect", { x: x(start + place * step), y: y(Math.log10(number + 1)), width: Math.max(0.6, x(start + (place + 1) * step) - x(start + place * step) - 0.6), height: box[3] - 9 - y(Math.log10(number + 1)) }))),
        s("path", { class: "levels", d: levels.map((level) => `M${x(level).toFixed(1)} ${box[3] - 7}V${box[3] - 1}`).join(""), opacity: levels.length > 64 ? 0.55 : 1 }),
        picture.chosen.map((edge) => s("line", { class: "chosen", x1: x(edge), x2: x(edge), y1: box[1], y2: box[3] })),
        picture.minmax && picture.minmax.map((edge) => s("line", { class: "minmax", x1: x(edge), x2: x(edge), y1: box[1], y2: box[3] })),
      ];
    };
    const part = picture.num_shown < picture.num_elements ? `${count(picture.num_shown)} of ${count(picture.num_elements)} elements, evenly spread.` : null;
    const several = picture.scale === null ? "There are several scales: each element is shown in steps of its own." : null;
    const minmax = picture.minmax ? ` Min-max would ${picture.scale === null ? "mostly " : ""}cover ${format(picture.minmax[0])} to ${format(picture.minmax[1])}.` : "";
    const label = `Histogram of ${count(picture.num_shown)} elements from ${format(start)} to ${format(end)}, in ${unit}. The grid, ${picture.grid}, covers ${format(picture.chosen[0])} to ${format(picture.chosen[1])}.${minmax}`;
    const legend = h("ul", { class: "legend" }, legendItem(line("chosen"), "chosen range"), picture.minmax && legendItem(line("minmax"), picture.scale === null ? "min–max, median" : "min–max"),
      levels.length > 0 && legendItem(s("path", { class: "levels", d: "M4 2V10M9 2V10M14 2V10M19 2V10" }), `${levels.length} levels of ${picture.grid}`));
    const columns = [
      { name: "From", value: (bar) => bar.from, cell: (bar) => format(bar.from), isNumber: true },
      { name: "To", value: (bar) => bar.to, cell: (bar) => format(bar.to), isNumber: true },
      { name: "Elements", value: (bar) => bar.number, cell: (bar) => count(bar.number), isNumber: true },
    ];
    const bars = () => picture.counts.map((number, place) => ({ from: start + place * step, to: start + (place + 1) * step, number }));
    return [h("h3", {}, "Values on the grid"), makeFigure({ label, height: 220, draw, legend, caption: [several, part].filter(Boolean).join(" ") || null }).figure, makeData("Histogram", columns, bars)];
  }

  function drawCurve(picture) {
    const [first, last] = picture.factors.map(Math.log), number = picture.errors.length;
    const points = picture.errors.map((error, place) => ({ factor: Math.exp(first + ((last - first) * place) / (number - 1)), error })).filter((point) => point.error !== null);
    if (points.length < 2 || picture.error === null) return [];
    // The curve goes through the chosen scale, which lies between two of its factors.
    const curve = [...points, { factor: 1, error: picture.error }].sort((a, b) => a.factor - b.factor);
    const all = [...curve.map((point) => point.error), ...(picture.minmax_error === null ? [] : [picture.minmax_error])];
    const low = Math.min(...all), high = Math.max(...all), margin = Math.max(0.3, (high - low) * 0.08);
    const below = 3 * margin; // room for a label
    const minmax = picture.minmax_error !== null && picture.minmax_factor !== null ? { factor: picture.minmax_factor, error: picture.minmax_error } : null;
    const draw = (width, height) => {
      const box = [46, 22, width - 10, height - 38];
      const x = scaleOf(Math.log(curve[0].factor), Math.log(curve[curve.length - 1].factor), box[0] + 4, box[2] - 4), y = scaleOf(low - below, high + margin, box[3], box[1]);
      const at = (point) => [x(Math.log(Math.min(Math.max(point.factor, curve[0].factor), curve[curve.length - 1].factor))), y(point.error)];
      const xTicks = [0.5, 0.7, 1, 1.4, 2, 3, 5, 8, 12, 16].filter((factor) => factor >= curve[0].factor * 0.999 && factor <= curve[curve.length - 1].factor * 1.001);
      const [chosenX, chosenY] = at({ factor: 1, error: picture.error }), [otherX, otherY] = minmax ? at(minmax) : [0, 0];
      const isLeft = minmax && otherX < chosenX, isNear = minmax && Math.abs(otherX - chosenX) < 70;
      return [
        drawAxes(x, y, box, { xTicks: xTicks.map(Math.log), yTicks: ticks(low - below, high + margin, 4), xFormat: (tick) => `${format(Math.exp(tick), 2)}×`, xLabel: "scale over the chosen scale", yLabel: "noise / signal, dB" }),
        s("line", { class: "chosen", x1: chosenX, x2: chosenX, y1: box[1], y2: box[3], opacity: 0.35 }),
        s("path", { class: "curve", d: curve.map((point, place) => `${place ? "L" : "M"}${at(point).map((value) => value.toFixed(1)).join(" ")}`).join("") }),
        minmax && [s("circle", { class: "dot-minmax", cx: otherX, cy: otherY, r: 4.5 }), text(otherX + (isLeft ? -8 : 8), otherY - 8, "min–max", { class: "text-minmax", "text-anchor": isLeft ? "end" : otherX > box[2] - 60 ? "end" : "start" })],
        s("circle", { class: "dot-chosen", cx: chosenX, cy: chosenY, r: 5 }),
        text(chosenX + (isNear && !isLeft ? -8 : isNear ? 8 : 0), Math.min(box[3] - 4, chosenY + 18), "chosen", { class: "text-chosen", "text-anchor": isNear ? (isLeft ? "start" : "end") : "middle" }),
      ];
    };
    const gain = minmax ? minmax.error - picture.error : null;
    const words = gain === null ? null : Math.abs(gain) < 0.05 ? "Min-max would be as good here." : `Min-max would have ${Math.abs(gain).toFixed(1)} dB ${gain > 0 ? "more" : "less"} noise in this value.`;
    const label = `Error against the scale: ${picture.error.toFixed(1)} dB at the chosen scale, ${curve[0].error.toFixed(1)} dB at ${format(curve[0].factor)} times and ${curve[curve.length - 1].error.toFixed(1)} dB at ${format(curve[curve.length - 1].factor)} times of it. ${words || ""}`;
    const columns = [
      { name: "Scale ×", value: (point) => point.factor, cell: (point) => format(point.factor), isNumber: true },
      { name: "Noise / signal dB", value: (point) => point.error, cell: (point) => point.error.toFixed(2), isNumber: true },
    ];
    return [h("h3", {}, "Error against the scale"), makeFigure({ label, height: 200, draw, caption: words }).figure, makeData("Error against the scale", columns, () => curve)];
  }

  function drawExperts(site) {
    const tokens = site.tokens_per_expert;
    if (!tokens || !tokens.length) return [];
    const most = Math.max(1, ...tokens), total = tokens.reduce((a, b) => a + b, 0), idle = tokens.filter((number) => !number).length;
    const draw = (width, height) => {
      const box = [46, 22, width - 6, height - 38];
      const x = scaleOf(0, tokens.length, box[0], box[2]), y = scaleOf(0, most * 1.08, box[3], box[1]);
      return [
        drawAxes((tick) => x(tick + 0.5), y, box, { xTicks: ticks(0, tokens.length - 1, width / 60).filter(Number.isInteger), yTicks: ticks(0, most, 3), xLabel: "expert", yLabel: "tokens" }),
        s("g", { class: "bars" }, tokens.map((number, place) => s("rect", { x: x(place) + 0.5, y: y(number), width: Math.max(0.6, x(place + 1) - x(place) - 1), height: box[3] - y(number) }, s("title", {}, `expert ${place}: ${count(number)} tokens`)))),
      ];
    };
    const words = `${count(total)} tokens went to ${tokens.length} experts, ${count(Math.min(...tokens))} to ${count(most)} each${idle ? `; ${idle} had none` : ""}.`;
    const rows = () => tokens.map((number, place) => ({ number, place }));
    const columns = [
      { name: "Expert", value: (row) => row.place, cell: (row) => row.place, isNumber: true },
      { name: "Tokens", value: (row) => row.number, cell: (row) => count(row.number), isNumber: true },
    ];
    return [h("h3", {}, "Tokens an expert"), makeFigure({ label: `Tokens an expert: ${words}`, height: 170, draw, caption: words }).figure, makeData("Tokens an expert", columns, rows)];
  }

  function drawCandidates(site) {
    const analysis = report.analysis;
    const errors = analysis && analysis.sites[`${site.module}|${site.role}`];
    if (!errors) return [];
    const chosen = analysis.choice && analysis.choice.chosen && analysis.choice.chosen[site.module];
    const rows = Object.entries(errors).map(([name, error]) => ({ name, error }));
    const columns = [
      { name: "Format", value: (row) => row.name, cell: (row) => [row.name, row.name === chosen && [" ", h("span", { class: "badge" }, "chosen")]] },
      { name: `Error of the model${analysis.unit ? `, ${analysis.unit}` : ""}`, value: (row) => row.error ?? Infinity, cell: (row) => format(row.error), isNumber: true },
    ];
    return [h("h3", {}, "Other formats"), makeTable({ caption: "Other formats", columns, rows, order: 1 }).node];
  }

  // ------------------------------------------------------------------------------------------------------- theme

  function startTheme() {
    const button = document.getElementById("theme"), query = matchMedia("(prefers-color-scheme: dark)");
    let isChosen = false;
    const apply = (isDark) => {
      document.documentElement.dataset.theme = isDark ? "dark" : "light";
      button.textContent = isDark ? "Light" : "Dark";
      button.setAttribute("aria-label", isDark ? "Use light colours" : "Use dark colours");
      button.setAttribute("aria-pressed", String(isDark));
    };
    apply(query.matches);
    query.addEventListener("change", () => { if (!isChosen) apply(query.matches); });
    button.addEventListener("click", () => { isChosen = true; apply(document.documentElement.dataset.theme !== "dark"); });
  }

  startTheme();
  addSummary();
  addValues();
  addLayers();
  addDepth();
  addSizes();
  addMix();
  addFloat();
  addRun();
  document.getElementById("nav").append(...navigation.map(([id, title]) => h("a", { href: `#${id}` }, title)));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && selection.site) select(null);
    if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) {
      event.preventDefault();
      document.getElementById("search").focus();
    }
  });
  const named = /^#value-(\d+)$/.exec(location.hash);
  // On a narrow screen the panel would cover the page.
  const first = named ? sites[Number(named[1])] : matchMedia("(min-width: 1180px)").matches ? worstFirst[0] : null;
  if (named && first) select(first);
  else {
    showDetail(null);
    if (first) { selection.site = first; showDetail(first); for (const listener of selection.listeners) listener(first); }
  }
  document.documentElement.dataset.ready = "true";
})();
