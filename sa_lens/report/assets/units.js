// Units: a table of thousands, page by page, and the page of one unit.

const PAGE = 50;
const table = { model: 0, stream: null, query: "", site: "", layer: "", explained: false, sort: "unit", down: false, page: 0, parts: null, rows: [] };

// Columns of which there is something to show: not every stream has masks, and not every text labels.
const shownColumns = () => COLUMNS.filter((column) => column.key === table.sort || !column.by || table.filled.has(column.key));

const siteWords = { mlp: "Neuron", attn: "Attention unit" };
const byName = (a, b) => a.unit.layer - b.unit.layer || a.unit.site.localeCompare(b.unit.site) || a.unit.index - b.unit.index;

// A row is a unit and its figures in one stream.
const COLUMNS = [
  { key: "unit", head: "unit", by: null, cell: (row) => unitLink(table.model, row.unit.name) },
  { key: "mask_on", head: "kept at", title: "share of tokens at which the gate keeps it", by: (row) => row.stream.mask_on, cell: (row) => percent(row.stream.mask_on), number: true },
  { key: "firing_rate", head: "fires at", title: "share of tokens at which it fires", by: (row) => row.stream.firing_rate, cell: (row) => percent(row.stream.firing_rate), number: true },
  { key: "effective_tokens", head: "effective tokens", title: "effective number of different tokens that it fires on: few is selective", by: (row) => row.stream.effective_tokens, cell: (row) => figure3(row.stream.effective_tokens), number: true },
  { key: "label", head: "label", title: "label that its firing predicts best", by: (row) => row.stream.label || null, cell: (row) => row.stream.label },
  { key: "label_f1", head: "label F1", title: "F1 of the label on stories that it was not chosen on", by: (row) => row.stream.label_f1, cell: (row) => (row.stream.label_f1 === null ? "" : figure3(row.stream.label_f1)), number: true },
  { key: "explanation", head: "explanation", title: "what it fires on", by: (row) => row.stream.explanation || null, cell: (row) => row.stream.explanation, wide: true },
  { key: "explanation_f1", head: "explanation F1", title: "F1 of the explanation on text that it was not made from", by: (row) => row.stream.explanation_f1, cell: (row) => (row.stream.explanation_f1 === null ? "" : figure3(row.stream.explanation_f1)), number: true },
  { key: "promotes", head: "promotes", title: "tokens whose logits it raises most, directly", by: (row) => row.unit.promotes[0] ?? null, cell: (row) => chips(row.unit.promotes), tokens: true },
  { key: "values", head: "values", title: "how often values of each size occur, smallest left, on a log axis", cell: (row) => spark(row) },
];

// How to read an explanation, whose patterns `readable` of sa_lens.units spells.
const explanationLegend = () =>
  h("p", { class: "how explanation-legend" },
    "How to read an explanation: ", h("code", {}, " gave it[ to| back]"), " fires at “ to” or “ back” after “ gave it”; ",
    h("code", {}, "_"), " is any one token, ", h("code", {}, "…"), " more tokens than are listed, and a semicolon divides patterns.",
  );

function drawUnits(into) {
  const controls = h("div", { class: "bar-of-controls controls" });
  const state = h("p", { class: "note", role: "status" });
  const body = h("div", { class: "unit-table" });
  const pager = h("div", { class: "pager controls", role: "group", "aria-label": "Pages of the table" });
  const list = h("div", { class: "unit-list" }, controls, state, body, pager);
  const one = h("div", { class: "unit-page" });
  table.parts = { controls, state, body, pager, list, one };
  into.append(list, one);
  unitControls();
  showUnits();
}

function unitControls() {
  const model = report.models[table.model];
  if (!model.streams.includes(table.stream)) table.stream = model.streams[model.streams.length - 1];
  const set = (name) => (value) => {
    table[name] = value;
    table.page = 0;
    showUnits();
  };
  // the units of which most is known come first
  if (model.units.some((unit) => unit.streams.some((one) => one.explanation_f1 !== null))) [table.sort, table.down] = ["explanation_f1", true];
  else [table.sort, table.down] = ["unit", false];
  const layers = [...new Set(model.units.map((unit) => unit.layer))].sort((a, b) => a - b);
  const search = searchBox("Search units", "name, token, label, explanation", set("query"));
  search.querySelector("input").value = table.query;
  table.parts.controls.replaceChildren(
    modelPicker("Model", table.model, (model) => {
      showModel(model);
      table.parts.controls.querySelector("select").focus();
    }) ?? "",
    search,
    picker("Stream", model.streams.map((stream) => [stream, stream]), table.stream, set("stream")),
    picker("Kind", [["", "all"], ["attn", "attention units"], ["mlp", "neurons"]], table.site, set("site")),
    picker("Layer", [["", "all"], ...layers.map((layer) => [layer, String(layer)])], table.layer, set("layer")),
    tick("Explained only", table.explained, set("explained")),
  );
}

// The text in which a unit is searched for.
const haystack = remembered((unit) => [unit.name, ...unit.promotes, ...unit.streams.flatMap((one) => [one.label, one.explanation])].join("\n").toLowerCase());

function matchingUnits() {
  const query = table.query.trim().toLowerCase();
  const matches = ({ unit, stream }) =>
    stream?.live && (!table.site || unit.site === table.site) && (table.layer === "" || unit.layer === Number(table.layer)) &&
    (!table.explained || stream.explanation) && (!query || haystack(unit).includes(query));
  const rows = report.models[table.model].units.map((unit) => ({ unit, stream: unit.streams.find((one) => one.stream === table.stream) })).filter(matches);
  const { by } = COLUMNS.find((column) => column.key === table.sort);
  const way = table.down ? -1 : 1;
  const compare = (a, b) => {
    if (!by) return way * byName(a, b);
    const [x, y] = [by(a), by(b)];
    // what has no value stands last, whichever way
    if (x === null || y === null) return (x === null) - (y === null) || byName(a, b);
    return way * (typeof x === "string" ? x.localeCompare(y) : x - y) || byName(a, b);
  };
  return rows.sort(compare);
}

function sortBy(column) {
  table.down = table.sort === column.key ? !table.down : Boolean(column.number);
  table.sort = column.key;
  table.page = 0;
  showUnits();
  table.parts.body.querySelector(`[data-sort="${column.key}"]`)?.focus();
}

function showUnits() {
  table.rows = matchingUnits();
  const streams = report.models[table.model].units.flatMap((unit) => unit.streams.filter((one) => one.stream === table.stream).map((stream) => ({ unit, stream })));
  table.filled = new Set(COLUMNS.filter((column) => column.by && streams.some((row) => column.by(row) !== null)).map((column) => column.key));
  drawRows();
}

function drawRows() {
  const { state, body, pager } = table.parts;
  const { units, units_note: note } = report.models[table.model];
  const pages = Math.max(1, Math.ceil(table.rows.length / PAGE));
  table.page = Math.max(0, Math.min(pages - 1, table.page));
  const shown = table.rows.slice(table.page * PAGE, (table.page + 1) * PAGE);
  state.textContent = `${count(table.rows.length)} of ${plural(units.length, "unit")}; figures of the ${table.stream} stream. ${note}`;
  const arrow = (column) => (column.key !== table.sort ? "" : table.down ? " ↓" : " ↑");
  const columns = shownColumns();
  const head = columns.map((column) => {
    const sorted = column.key === table.sort ? (table.down ? "descending" : "ascending") : "none";
    if (!("by" in column)) return h("th", { scope: "col", title: column.title }, column.head);
    return h("th", { scope: "col", "aria-sort": sorted, class: column.number ? "number" : null, title: column.title }, h("button", { type: "button", class: "sort", "data-sort": column.key, onclick: () => sortBy(column) }, column.head + arrow(column)));
  });
  const rows = shown.map((row) =>
    h("tr", { "data-unit": row.unit.name }, columns.map((column, i) => h(i ? "td" : "th", { scope: i ? null : "row", class: column.number ? "number" : column.wide ? "wide" : column.tokens ? "tokens-cell" : null, "data-head": column.head }, column.cell(row)))),
  );
  body.replaceChildren(table.filled.has("explanation") ? explanationLegend() : "", scroller("Table of units", h("table", { class: "units cards" }, h("caption", {}, "One row per unit, shares in per cent of tokens. Choose a heading to sort by it, a name to see the unit."), h("thead", {}, h("tr", {}, head)), h("tbody", {}, rows))));
  const turn = (words, page) => h("button", { type: "button", disabled: page < 0 || page >= pages || page === table.page, onclick: () => {
    table.page = page;
    drawRows();
    const same = [...pager.querySelectorAll("button")].find((button) => button.textContent === words && !button.disabled);
    (same || pager.querySelector("button:not(:disabled)"))?.focus();
  } }, words);
  pager.replaceChildren(turn("First", 0), turn("Back", table.page - 1), h("span", {}, `page ${table.page + 1} of ${pages}`), turn("Next", table.page + 1), turn("Last", pages - 1));
}

// A unit's histogram in a word's space; shown once its pack is open.
function spark(row) {
  const details = table.details?.[table.model];
  if (!details) return "";
  const place = unitPlaces[table.model].get(row.unit.name);
  const at = row.unit.streams.indexOf(row.stream);
  const histogram = details[place]?.[at]?.histogram;
  if (!histogram) return "";
  const counts = (histogram.series.find((one) => one.name.startsWith(table.stream)) || histogram.series[0]).counts;
  const most = Math.log1p(Math.max(...counts)) || 1;
  const width = 72 / counts.length;
  return s("svg", { class: "spark", width: 72, height: 18, viewBox: "0 0 72 18", "aria-hidden": "true" },
    s("path", { d: counts.map((n, i) => `M${(i * width).toFixed(1)},18V${(18 - (17 * Math.log1p(n)) / most).toFixed(1)}h${width.toFixed(2)}V18Z`).join(""), style: { fill: streamVariable(table.stream) } }),
  );
}

async function unitDetails(model) {
  const details = await pack(`units-${model}`);
  table.details = table.details || {};
  if (!table.details[model]) {
    table.details[model] = details;
    if (model === table.model && table.parts) drawRows();
  }
  return details;
}

// ------------------------------------------------------------------------------------------------------- one unit

async function openUnit(model, id) {
  const { list, one } = table.parts;
  const place = report.models[model]?.units.findIndex((unit) => unit.name === id) ?? -1;
  list.classList.add("off");
  one.classList.remove("off");
  if (place < 0) {
    one.replaceChildren(backToAll(), h("p", { class: "message" }, `This report holds no unit ${id}: it is of another model, or was not live on the text that was read.`));
    return;
  }
  const unit = report.models[model].units[place];
  const details = (await unitDetails(model))[place];
  showModel(model);
  const at = table.rows.findIndex((row) => row.unit === unit);
  const step = (words, to) => (at >= 0 && table.rows[to] ? h("a", { href: unitAddress(model, table.rows[to].unit.name), rel: to < at ? "prev" : "next" }, words) : h("span", { class: "faint" }, words));
  refill(
    one,
    h("p", { class: "unit-nav controls" }, backToAll(), step("← unit before", at - 1), step("unit after →", at + 1), at >= 0 ? h("span", { class: "faint" }, `${count(at + 1)} of ${count(table.rows.length)} in the table`) : null),
    h("h3", { tabindex: "-1", class: "unit-name" }, unit.name, several() ? h("span", { class: "faint" }, ` of ${report.models[model].name}`) : null),
    h("p", {}, `${siteWords[unit.site]} ${unit.index} of layer ${unit.layer}${unit.place ? ` (${unit.place})` : ""}. `, unit.promotes.length ? ["It raises the logits of ", chips(unit.promotes), "most, directly."] : "No tokens that it promotes are known."),
    unit.streams.some((stream) => stream.explanation) ? explanationLegend() : null,
    h("div", { class: "columns unit-streams" }, unit.streams.map((stream, i) => unitStream(stream, details[i]))),
    h("div", { class: "unit-stories" }),
  );
  storiesOf(model, unit).then((list) => one.querySelector(".unit-stories")?.replaceChildren(list));
}

const backToAll = () => h("a", { href: `#units/${encodeURIComponent(report.models[table.model].name)}` }, "All units");

function unitStream(stream, { histogram, snippets }) {
  const facts = [
    ["kept at", stream.mask_on === null ? "every token: no gate" : `${percent(stream.mask_on)} of tokens`],
    ["fires at", `${percent(stream.firing_rate)} of tokens`],
    ["effective tokens", stream.effective_tokens === null ? null : figure3(stream.effective_tokens)],
    ["label", stream.label ? `${stream.label}${stream.label_f1 === null ? "" : ` (F1 ${figure3(stream.label_f1)})`}` : null],
    ["explanation", stream.explanation ? `${stream.explanation}${stream.explanation_f1 === null ? "" : ` (F1 ${figure3(stream.explanation_f1)})`}` : "none"],
  ].filter(([, value]) => value !== null);
  return h("section", { class: "unit-stream", style: { "border-color": streamVariable(stream.stream) }, "aria-label": `${stream.stream} stream` },
    h("h4", {}, `${stream.stream} stream`),
    stream.live ? null : h("p", { class: "note" }, "It fires too rarely in this stream to be described."),
    h("dl", {}, facts.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
    histogram ? chartFigure(histogram, "How often the unit has a value of each size; the axis of counts is logarithmic.", { histogram: true, height: 200, level: "h5", title: "Its values" }).figure : null,
    snippetsBlock("Where its value is largest", "Each line a piece of text with the value at the framed token; orange is positive, blue negative.", snippets.filter((one) => one.kind === "top")),
    snippetsBlock("A sample of all its values", "Pieces of text from each part of its range, so that the largest values do not mislead.", snippets.filter((one) => one.kind !== "top")),
    snippets.length || histogram ? null : h("p", { class: "note" }, "This unit has no details: they are made for a sample of units."),
  );
}

function snippetsBlock(title, how, snippets) {
  if (!snippets.length) return null;
  const most = Math.max(...snippets.map((one) => one.most));
  const colouring = [];
  const items = snippets.map((snippet) => {
    const { run, colour } = snippetText(snippet, most);
    colouring.push(colour);
    return h("li", {}, h("span", { class: "number" }, figure3(snippet.value)), run);
  });
  const list = h("ol", { class: "snippets" }, items);
  const recolour = () => (list.isConnected ? colouring.forEach((colour) => colour()) : themed.delete(recolour));
  requestAnimationFrame(() => themed.add(recolour));
  return h("section", {}, h("h5", {}, title), h("p", { class: "how" }, how), list);
}

// Where in the stories of this report a gate keeps the unit.
async function storiesOf(model, unit) {
  const stories = await storiesOfModel(model);
  const mentions = [];
  stories.forEach((story, i) => {
    const one = story.gates?.units.find((live) => live.name === unit.name);
    if (!one) return;
    const best = one.values.reduce((best, value, j) => (Math.abs(value) > Math.abs(one.values[best]) ? j : best), 0);
    mentions.push({ i, title: story.title, n: one.positions.length, at: one.positions[best], token: story.tokens[one.positions[best]], value: one.values[best] });
  });
  if (!mentions.length) return h("span", {});
  mentions.sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
  const rows = mentions.slice(0, 12).map(({ i, at, title, n, token, value }) => [h("a", { href: storyAddress(model, i, at) }, h("bdi", {}, title)), count(n), tokenLabel(token), figure3(value)]);
  return block(
    "In the stories of this report",
    "Stories in which the gate keeps this unit, at how many tokens, and where its value is largest; the link opens the story at that token.",
    scroller("Stories with this unit", plainTable(["story", "tokens", "largest at", "value"], rows, { numeric: [false, true, false, true] })),
  );
}

// Shows the table of a model's units.
function showModel(model) {
  if (model === table.model) return;
  table.model = model;
  table.page = 0;
  unitControls();
  showUnits();
}

function showAllUnits(model) {
  showModel(model);
  unitDetails(model);
  table.parts.one.replaceChildren();
  table.parts.one.classList.add("off");
  table.parts.list.classList.remove("off");
}
