// Numbers in words, names, and colours.

function format(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3)
    return value.toExponential(2).replace("e+", "e").replace("-", "−").replace("e-", "e−");
  return String(Number(value.toPrecision(size >= 1000 ? 4 : digits))).replace("-", "−");
}
const count = (value) => value.toLocaleString("en-US");
const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(part / whole < 0.1 ? 1 : 0)} %` : "–");

function bytes(value) {
  for (const [unit, size] of [
    ["GB", 1e9],
    ["MB", 1e6],
    ["kB", 1e3],
  ]) {
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
const breakPath = (module) =>
  module ? module.split(/(?<=\.)/).flatMap((part, place) => (place ? [h("wbr"), part] : [part])) : "(root)";
const nameOf = (site) => `${site.module || "(root)"} ${site.role}`;

function quantile(sorted, part) {
  return sorted[Math.min(sorted.length - 1, Math.max(0, Math.round(part * (sorted.length - 1))))];
}
const measured = sites.filter((site) => site.isMeasured && site.sqnr !== null);
const sorted = measured.map((site) => site.sqnr).sort((a, b) => a - b);
const worstFirst = [...sites].sort((a, b) => rank(a) - rank(b) || a.place - b.place);

// Eight colours from the worst to the best, between round numbers around most of the values.
const colours = (() => {
  let low = Math.floor(quantile(sorted, 0.02) ?? 0),
    high = Math.ceil(quantile(sorted, 0.98) ?? 8);
  if (high - low < 4) [low, high] = [low - 2, high + 2];
  return { low, high, of: (sqnr) => Math.max(0, Math.min(7, Math.floor((8 * (sqnr - low)) / (high - low)))) };
})();
const colourOf = (site) => (!site.isMeasured ? "none" : site.sqnr === null ? "q7" : `q${colours.of(site.sqnr)}`);
