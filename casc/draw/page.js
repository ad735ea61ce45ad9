"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

// Light and dark: as the system says, until the button is used.
const theme = document.getElementById("theme");
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";
function remember(value) {
  try { // a page opened from a file may have no storage
    if (value) localStorage.setItem("casc-theme", value);
    return localStorage.getItem("casc-theme");
  } catch { return null; }
}
function showTheme() { theme.setAttribute("aria-pressed", String(isDark())); }
const chosen = remember();
if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  remember(document.documentElement.dataset.theme);
  showTheme();
});
prefersDark.addEventListener("change", showTheme);
showTheme();

// Tables: a header sorts, numbers from the top first; what has no value comes last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    const down = head.classList.contains("number") ? "descending" : "ascending";
    const up = down === "descending" ? "ascending" : "descending";
    head.firstElementChild.addEventListener("click", () => {
      const order = head.getAttribute("aria-sort") === down ? up : down;
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const value = (row) => row.cells[column].dataset.value;
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
        return sign * (head.classList.contains("number") ? x - y : x.localeCompare(y, "en"));
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}
for (const field of document.querySelectorAll(".filter input")) {
  const rows = [...field.closest(".table").querySelectorAll("tbody tr")];
  field.addEventListener("input", () => {
    const wanted = field.value.trim().toLowerCase();
    for (const row of rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
    const left = rows.filter((row) => !row.hidden).length;
    field.parentElement.querySelector(".count").textContent = wanted ? `${left} of ${rows.length}` : "";
  });
}

// Charts are drawn anew when their width changes.
const specs = new Map();
const watcher = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const figure = target.closest("figure");
    const svg = target.querySelector("svg");
    if (svg && Number(svg.getAttribute("width")) === target.clientWidth) continue;
    if (target.clientWidth) drawChart(figure, specs.get(figure));
  }
});
function setChart(figure, spec) {
  specs.set(figure, spec);
  legend(figure.querySelector(".legend"), spec);
  drawChart(figure, spec);
}
for (const figure of document.querySelectorAll("figure.chart")) {
  const spec = data[figure.dataset.chart];
  if (!spec) continue;
  if (spec.choices) {
    const series = (choice) => ({ ...spec, series: spec.series.map((name, i) => ({
      name, points: (spec.choices[choice][i] ?? []).map((value, k) => [k / 100, value / 1000]) })) });
    const choice = document.getElementById(spec.choice);
    choice.addEventListener("change", () => setChart(figure, series(Number(choice.value))));
    setChart(figure, series(0));
  } else setChart(figure, spec);
  watcher.observe(figure.querySelector(".plot"));
}
