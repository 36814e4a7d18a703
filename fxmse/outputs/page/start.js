// The theme, and all parts in their order.

function startTheme() {
  const button = document.getElementById("theme"),
    query = matchMedia("(prefers-color-scheme: dark)");
  let isChosen = false;
  const apply = (isDark) => {
    document.documentElement.dataset.theme = isDark ? "dark" : "light";
    button.textContent = isDark ? "Light" : "Dark";
    button.setAttribute("aria-label", isDark ? "Use light colours" : "Use dark colours");
    button.setAttribute("aria-pressed", String(isDark));
  };
  apply(query.matches);
  query.addEventListener("change", () => {
    if (!isChosen) apply(query.matches);
  });
  button.addEventListener("click", () => {
    isChosen = true;
    apply(document.documentElement.dataset.theme !== "dark");
  });
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
  if (first) {
    selection.site = first;
    showDetail(first);
    for (const listener of selection.listeners) listener(first);
  }
}
document.documentElement.dataset.ready = "true";
