// What the page shows. Text of models and configs becomes text nodes and attributes, never markup.
const report = JSON.parse(document.getElementById("report").textContent);
const main = document.getElementById("main");
const detail = document.getElementById("detail");
const ROLES = ["weight", "input", "output", "q", "k", "v"];
const sites = report.sites.map((site, place) => ({ ...site, place, isMeasured: site.range_ratio !== null }));
const selection = { site: null, listeners: [] };
