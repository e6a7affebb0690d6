// Charts, drawn by plotly, which is unpacked when the first of them comes into view.

let library = null;

function plotly() {
  if (!library) {
    library = unpackText("plotly").then(
      (source) =>
        new Promise((done, failed) => {
          const address = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
          const script = h("script", { src: address, onload: () => done(window.saLens.libraries.plotly), onerror: () => failed(new Error("its script was refused")) });
          document.head.append(script);
        }),
    );
    library.then((loaded) => (library.loaded = loaded), () => {});
  }
  return library;
}

const charts = new Map();
const PRINTED = 640;

const watcher = new IntersectionObserver(
  (seen) => {
    for (const one of seen) if (one.isIntersecting) charts.get(one.target)?.want();
  },
  { rootMargin: "300px" },
);

// Text that plotly shows as it is, where it would read markup.
const inert = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

class Chart {
  constructor(label, height, make) {
    this.make = make;
    this.height = height;
    this.shapes = [];
    this.box = h("div", { class: "chart", role: "img", "aria-label": label, style: { "min-height": height + "px" } });
    charts.set(this.box, this);
    watcher.observe(this.box);
  }

  async want() {
    watcher.unobserve(this.box);
    try {
      await plotly();
      this.draw();
    } catch (error) {
      this.box.textContent = `This chart could not be drawn (${error.message}); its numbers are below.`;
    }
  }

  // width: fixed, for paper; otherwise that of the page.
  draw(width) {
    if (!library?.loaded || !this.box.isConnected) return;
    const { data, layout } = this.make();
    const c = colours();
    const axis = { gridcolor: c.grid, linecolor: c.grid, zerolinecolor: c.grid, automargin: true, tickfont: { size: 11 }, fixedrange: coarse };
    const font = { family: palettes.font, size: 12, color: c.text };
    const title = (text) => ({ text: inert(text), font: { size: 12, color: c.faint }, standoff: 6 });
    const merged = {
      font,
      height: this.height,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 50, r: 12, t: 8, b: 40 },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12 } },
      hoverlabel: { font: { ...font, color: c.text }, bgcolor: c.background, bordercolor: c.faint },
      hovermode: "closest",
      dragmode: coarse ? false : "zoom",
      ...layout,
      xaxis: { ...axis, ...layout.xaxis, title: title(layout.xaxis.title) },
      yaxis: { ...axis, ...layout.yaxis, title: title(layout.yaxis.title) },
      shapes: [...(layout.shapes || []), ...this.shapes],
    };
    this.fixed = layout.shapes || [];
    if (width) merged.width = width;
    library.loaded.react(this.box, data, merged, { responsive: !width, displayModeBar: false, doubleClick: "reset" });
    this.box.dataset.drawn = "";
  }

  // Marks places on the chart, over what belongs to it.
  mark(shapes) {
    this.shapes = shapes;
    if ("drawn" in this.box.dataset && this.box.isConnected) library.loaded.relayout(this.box, { shapes: [...this.fixed, ...shapes] });
  }
}

const coarse = window.matchMedia("(pointer: coarse)").matches;

// Draws again the charts that are drawn, or all, and forgets those that have left the page.
function redrawCharts(all, width) {
  for (const [box, chart] of charts) {
    if (!box.isConnected && "drawn" in box.dataset) {
      library.loaded.purge(box);
      charts.delete(box);
    } else if (all || "drawn" in box.dataset) chart.draw(width);
  }
}

themed.add(() => redrawCharts(false));

// ----------------------------------------------------------------------------------------------------------- kinds

const lineLabel = (line) => [line.name, line.stream].filter(Boolean).join(", ");

// Curves: a colour for each name, the ablated stream dashed, intervals as pale bands.
function curveData(record) {
  const c = colours();
  const names = [...new Set(record.lines.map((line) => line.name))];
  const data = [];
  for (const line of record.lines) {
    const colour = c.lines[names.indexOf(line.name) % c.lines.length];
    const label = inert(lineLabel(line));
    const whole = line.low.map((low, i) => low !== null && line.high[i] !== null);
    const places = line.x.map((_, i) => i).filter((i) => whole[i]);
    if (places.length) {
      const back = [...places].reverse();
      data.push({
        x: [...places.map((i) => line.x[i]), ...back.map((i) => line.x[i])],
        y: [...places.map((i) => line.high[i]), ...back.map((i) => line.low[i])],
        ...{ mode: "lines", fill: "toself", fillcolor: colour + "26", line: { width: 0 } },
        ...{ hoverinfo: "skip", showlegend: false, legendgroup: label },
      });
    }
    data.push({
      ...{ x: line.x, y: line.y, name: label, legendgroup: label },
      mode: line.x.length <= 60 ? "lines+markers" : "lines",
      line: { color: colour, width: 2, dash: line.stream === "ablated" ? "dash" : "solid" },
      marker: { size: 4.5 },
      text: line.y.map((y, i) => `${label}<br>${figure3(line.x[i])} ${inert(record.x_title)}<br><b>${figure3(y)}</b>`),
      hoverinfo: "text",
    });
  }
  const dotted = { color: c.faint, width: 1, dash: "dot" };
  const shapes = record.levels.map(({ value }) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: value, y1: value, line: dotted }));
  // the label of the highest level stands above its line, those of others below
  const highest = Math.max(...record.levels.map(({ value }) => value));
  const annotations = record.levels.map(({ value, label }) => ({
    ...{ xref: "paper", x: 1, xanchor: "right", y: value, yanchor: value === highest ? "bottom" : "top" },
    ...{ text: inert(label), showarrow: false, font: { size: 11, color: c.faint } },
  }));
  // plotly's own labels between the powers of ten are tiny
  const tickvals = [...Array(10).keys()].flatMap((power) => [1, 2, 5].map((first) => first * 10 ** power));
  const log = { type: "log", ...(decades(record) < 3 ? { tickvals, ticktext: tickvals.map((value) => figure3(value)) } : { dtick: 1 }) };
  const xaxis = { title: record.x_title, ...(record.x_scale === "log" ? log : { rangemode: "tozero" }) };
  return { data, layout: { shapes, annotations, showlegend: record.lines.length > 1, xaxis, yaxis: { title: record.y_title } } };
}

// Powers of ten that the x axis spans.
function decades(record) {
  const xs = record.lines.flatMap((line) => line.x).filter((x) => x > 0);
  return xs.length ? Math.log10(Math.max(...xs) / Math.min(...xs)) : 0;
}

function curveNumbers(record) {
  const xs = [...new Set(record.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  return {
    columns: [record.x_title, ...record.lines.map((line) => lineLabel(line) || record.y_title)],
    rows: xs.map((x) => [
      figure3(x),
      ...record.lines.map((line) => {
        const at = line.x.indexOf(x);
        if (at < 0) return "";
        const interval = line.low.length && line.low[at] !== null ? ` (${figure3(line.low[at])} to ${figure3(line.high[at])})` : "";
        return figure3(line.y[at]) + interval;
      }),
    ]),
  };
}

function histogramData(record) {
  const c = colours();
  const middles = record.edges.slice(1).map((edge, i) => (edge + record.edges[i]) / 2);
  const widths = record.edges.slice(1).map((edge, i) => edge - record.edges[i]);
  const data = record.series.map((one, i) => {
    const colour = one.name.startsWith("ablated") ? c.lines[1] : c.lines[i % c.lines.length];
    return {
      type: "bar",
      x: middles,
      y: one.counts,
      width: widths,
      name: inert(one.name),
      marker: { color: colour + "66", line: { color: colour, width: 1 } },
      text: one.counts.map((n, j) => `${inert(one.name)}<br>${figure3(record.edges[j])} to ${figure3(record.edges[j + 1])}<br><b>${count(n)}</b>`),
      textposition: "none",
      hoverinfo: "text",
    };
  });
  const axes = { xaxis: { title: record.x_title }, yaxis: { title: "tokens (log scale)", type: "log", dtick: 1 } };
  return { data, layout: { barmode: "overlay", bargap: 0, showlegend: record.series.length > 1, ...axes } };
}

const histogramNumbers = (record) => ({
  columns: [record.x_title, ...record.series.map((one) => one.name)],
  rows: record.edges.slice(1).map((edge, i) => [`${figure3(record.edges[i])} to ${figure3(edge)}`, ...record.series.map((one) => count(one.counts[i]))]),
});

// A chart with its heading, a sentence on how to read it, and its numbers for those who want them.
function chartFigure(record, how, { histogram = false, height = 300, title = record.title, level = "h3" } = {}) {
  const chart = new Chart(`${title}. ${record.note}`, height, () => (histogram ? histogramData : curveData)(record));
  const numbers = h("details", { class: "numbers controls" }, h("summary", {}, "Numbers of this chart"));
  numbers.addEventListener(
    "toggle",
    () => {
      const { columns, rows } = (histogram ? histogramNumbers : curveNumbers)(record);
      numbers.append(scroller("Numbers: " + title, plainTable(columns, rows, { numeric: columns.map(() => true) })));
    },
    { once: true },
  );
  const figure = h("figure", { class: "block" },
    h("figcaption", {}, h(level, {}, title), h("p", { class: "how" }, sentence(record.note), how)),
    warningsOf(record),
    chart.box,
    numbers,
  );
  return { figure, chart };
}
