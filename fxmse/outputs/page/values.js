// All values, worst first.
function addValues() {
  const meter = (site) => {
    if (!site.isMeasured || site.sqnr === null) return decibels(site);
    const bar = setStyle(
      h("b", { class: colourOf(site) }),
      "width",
      `${Math.max(4, Math.min(100, (100 * site.sqnr) / Math.max(1, colours.high)))}%`,
    );
    return h("span", { class: "meter" }, h("i", { "aria-hidden": "true" }, bar), site.sqnr.toFixed(1));
  };
  const columns = [
    {
      name: "Module",
      value: (site) => site.module,
      className: "module",
      cell: (site) =>
        h(
          "button",
          {
            type: "button",
            class: "link mono",
            onclick: (event) => {
              event.stopPropagation();
              select(site, { move: true });
            },
          },
          breakPath(site.module),
        ),
    },
    { name: "Value", value: (site) => site.role, cell: (site) => site.role },
    { name: "Format", value: (site) => site.format, cell: (site) => site.format, className: "format", hidden: "wide" },
    { name: "SQNR dB", value: rank, cell: meter, isNumber: true },
    {
      name: "Range/min–max",
      value: (site) => site.range_ratio ?? Infinity,
      cell: (site) => (site.range_ratio === null ? "–" : site.range_ratio.toFixed(3)),
      isNumber: true,
      hidden: "wide",
    },
    { name: "Order", value: (site) => site.place, cell: (site) => site.place + 1, isNumber: true, hidden: "wider" },
  ];
  const table = makeTable({
    caption: "Quantized values, worst first",
    columns,
    rows: worstFirst,
    order: 3,
    onRow: (site) => select(site),
    rowAttributes: (site) => ({ "data-place": site.place, "aria-current": site === selection.site ? "true" : null }),
  });
  onSelect((site) => {
    for (const row of table.body.children) {
      if (site && Number(row.dataset.place) === site.place) row.setAttribute("aria-current", "true");
      else row.removeAttribute("aria-current");
    }
  });
  const search = h("input", {
    type: "search",
    id: "search",
    placeholder: "Search modules, values, formats",
    "aria-label": "Search modules, values and formats",
    spellcheck: "false",
    autocomplete: "off",
  });
  const choose = (label, options) =>
    h(
      "select",
      { "aria-label": label },
      h("option", { value: "" }, label),
      options.map((option) => h("option", { value: option }, option)),
    );
  const role = choose("All values", roles()),
    kind = choose("All formats", [...new Set(sites.map((site) => site.format))].sort());
  const found = h("span", { class: "count", role: "status", "aria-live": "polite", id: "count" });
  const texts = new Map(sites.map((site) => [site, `${site.module} ${site.role} ${site.format}`.toLowerCase()]));
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = worstFirst.filter(
      (site) =>
        (!role.value || site.role === role.value) &&
        (!kind.value || site.format === kind.value) &&
        words.every((word) => texts.get(site).includes(word)),
    );
    table.setRows(rows);
    found.textContent =
      rows.length === sites.length
        ? `${count(sites.length)} values`
        : `${count(rows.length)} of ${count(sites.length)} values`;
  };
  for (const control of [search, role, kind]) control.addEventListener("input", filter);
  addSection(
    "values",
    "Worst values first",
    "SQNR is the signal over the noise that quantization adds, in dB: 6 dB more is half the error. Choose a value to see how it lies on its grid.",
    h("div", { class: "tools" }, search, role, kind, found),
    table.node,
  );
  filter();
}
