// Which value is chosen: what shows it listens.

function select(site, { move = false } = {}) {
  selection.site = site;
  showDetail(site);
  for (const listener of selection.listeners) listener(site);
  document.getElementById("status").textContent = site ? `${nameOf(site)}, ${decibels(site)}` : "";
  const hash = site ? `#value-${site.place}` : " ";
  try {
    history.replaceState(null, "", hash);
  } catch {
    /* a page without an address */
  }
  if (move && site) detail.focus({ preventScroll: true });
}
const onSelect = (listener) => selection.listeners.push(listener);
