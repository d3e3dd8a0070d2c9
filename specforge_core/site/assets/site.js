// Draws the charts in the page's colours, filters and sorts tables, switches light and dark. No state but the reader's theme.
(function () {
  "use strict";
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // Charts

  function chartConfig() {
    const style = getComputedStyle(root);
    const color = (name) => style.getPropertyValue(`--${name}`).trim();
    const [ink, muted, line, accent] = ["ink", "muted", "line", "accent"].map(color);
    const text = { labelColor: muted, titleColor: muted, labelFontSize: 12, titleFontSize: 12, titleFontWeight: 400 };
    return {
      background: "transparent",
      font: style.getPropertyValue("--sans").trim(),
      view: { stroke: null },
      axis: { ...text, domainColor: line, tickColor: line, gridColor: line, gridOpacity: 0.7, labelPadding: 6, titlePadding: 10, ticks: false, domain: false },
      axisY: { grid: true, titleAnchor: "end", titleAngle: 0, titleAlign: "left", titleX: 0, titleY: -14 },
      axisX: { grid: false, domain: true },
      legend: { ...text, symbolSize: 90, symbolStrokeWidth: 2.5, columnPadding: 14, rowPadding: 4, offset: 14, labelLimit: 220 },
      mark: { color: accent },
      line: { strokeWidth: 2.25 },
      rule: { color: accent },
      text: { color: ink, fontSize: 13 },
      range: { category: [1, 2, 3, 4, 5, 6, 7].map((i) => color(`series-${i}`)) },
      style: {
        baseline: { color: muted, strokeWidth: 1.75, strokeDash: [5, 4] },
        "baseline-name": { color: muted, fontSize: 12, align: "right", dy: -9, dx: 4 },
        failed: { color: color("bad"), opacity: 1 },
        reference: { color: muted, strokeWidth: 1.25, strokeDash: [4, 4] },
        interval: { strokeWidth: 4, opacity: 0.35, strokeCap: "round" },
        anchor: { color: ink, strokeWidth: 1.75, opacity: 1 },
        best: { color: ink, strokeWidth: 1.5, opacity: 0.8 },
        edge: { color: muted, strokeWidth: 1.5, opacity: 0.7, interpolate: "bundle", tension: 0.92 },
        node: { color: color("surface"), stroke: line, strokeWidth: 1.25, cornerRadius: 9 },
        "node-name": { fontWeight: 600 },
        "node-digest": { fontSize: 11, color: muted, font: style.getPropertyValue("--mono").trim() },
      },
    };
  }

  // By figure: when its last drawing is done, as two at once would share its place.
  const drawings = new Map();

  function draw(figure) {
    const done = (drawings.get(figure) ?? Promise.resolve()).then((before) => drawNow(figure, before));
    drawings.set(figure, done);
    return done;
  }

  async function drawNow(figure, before) {
    const spec = JSON.parse(figure.querySelector("script").textContent);
    const table = figure.dataset.follows && document.getElementById(figure.dataset.follows);
    if (table) {
      const shown = new Set(all("tbody tr:not([hidden])", table).map((row) => row.dataset.entry));
      spec.data.values = spec.data.values.filter((value) => shown.has(value.entry));
      spec.height = spec.usermeta.rowHeight * Math.max(1, new Set(spec.data.values.map((value) => value.entry)).size);
    }
    const place = figure.querySelector(".plot");
    before?.finalize();
    const drawn = await vegaEmbed(place, spec, { mode: "vega-lite", renderer: "svg", actions: false, config: chartConfig() });
    figure.dataset.drawn = "true";
    return drawn;
  }

  const drawAll = () => Promise.all(all("figure.chart").map(draw));

  // Light and dark

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
  const button = document.querySelector(".theme");

  function showTheme() {
    button.setAttribute("aria-pressed", String(isDark()));
    drawAll();
  }

  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("theme", root.dataset.theme); } catch { /* Not kept, then. */ }
    showTheme();
  });
  dark.addEventListener("change", showTheme);

  // Filters: each control but the search names a data attribute of the rows.

  for (const form of all("form[data-filters]")) {
    const table = document.getElementById(form.dataset.filters);
    const rows = all("tbody tr", table);
    const count = document.querySelector(`[data-count="${table.id}"]`);
    const noun = count.textContent.split(" ").pop();
    form.addEventListener("submit", (event) => event.preventDefault());
    function filter() {
      const wanted = Object.fromEntries(new FormData(form));
      const words = wanted.text.toLowerCase().split(/\s+/);
      delete wanted.text;
      for (const row of rows) {
        const text = row.dataset.text.toLowerCase();
        row.hidden = !(words.every((word) => text.includes(word))
          && Object.entries(wanted).every(([name, value]) => !value || row.dataset[name] === value));
      }
      count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} ${noun}`;
      all(`figure[data-follows="${table.id}"]`).forEach(draw);
    }
    for (const name of ["input", "change"]) form.addEventListener(name, filter);
  }

  // Sorting: by `data-value` as a number where cells have one, else by what they say. Empty ones stay last.

  function key(row, column) {
    const cell = row.cells[column];
    const value = cell.dataset.value ?? cell.textContent.trim();
    return cell.dataset.value === undefined ? value : value === "" ? null : Number(value);
  }

  for (const table of all("table.sortable")) {
    const heads = all("thead th", table);
    heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "descending" ? 1 : head.getAttribute("aria-sort") === "ascending" ? -1
        : head.classList.contains("number") ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const sorted = all("tbody tr", table).map((row) => [key(row, column), row]).sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        return sign * (typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true }));
      });
      table.tBodies[0].append(...sorted.map(([, row]) => row));
    }));
  }

  // Launch lines

  for (const copy of all(".copy")) {
    copy.addEventListener("click", async () => {
      const code = copy.closest(".launch").querySelector("code");
      getSelection().selectAllChildren(code);
      try {
        await navigator.clipboard.writeText(code.textContent);
        copy.textContent = "Copied";
      } catch {
        copy.textContent = "Selected";
      }
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    });
  }

  showTheme();
})();
