// Tables that sort, and of which a page is shown at a time.
const PAGE = 25;

// A table whose columns sort, of which a page is shown at a time. Columns: {name, value, cell, isNumber, hidden,
// className}: those without a value do not sort, and narrow screens leave out what is hidden ("wide", "wider").
function makeTable({ caption, columns, rows, order = null, onRow = null, rowAttributes = () => ({}) }) {
  const state = { rows, column: order, isDescending: false, shown: PAGE };
  const body = h("tbody");
  const heads = columns.map((column, place) => {
    const label = column.value
      ? h("button", { type: "button", onclick: () => sortBy(place) }, column.name)
      : column.name;
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
    const ordered =
      value === null ? state.rows : [...state.rows].sort((a, b) => compare(value(a), value(b), state.isDescending));
    body.replaceChildren(...ordered.slice(0, state.shown).map(makeRow));
    const left = ordered.length - state.shown;
    const show = (number) => () => {
      state.shown += number;
      draw();
    };
    more.replaceChildren(
      ...(left > 0
        ? [
            h("button", { type: "button", class: "quiet", onclick: show(PAGE) }, `Show ${Math.min(PAGE, left)} more`),
            h("button", { type: "button", class: "quiet", onclick: show(left) }, `Show all ${count(ordered.length)}`),
          ]
        : []),
    );
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
    setRows(next) {
      state.rows = next;
      state.shown = PAGE;
      draw();
    },
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
