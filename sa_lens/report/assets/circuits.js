// Circuits: what a model does at a task, and the edges through which it does it, at any size.

const circuits = { task: null, method: null, stream: null, models: [0, 1], together: true, parts: null, panels: [] };

function drawCircuits(into) {
  const tasks = taskNames();
  if (!tasks.length) {
    into.append(h("p", { class: "note" }, "This report holds no tasks."));
    return;
  }
  circuits.task = tasks.find((name) => report.models.some((model) => model.tasks.some((task) => task.task === name && task.rankings.length))) || tasks[0];
  const controls = h("div", { class: "bar-of-controls controls" });
  const about = h("div", {});
  const panels = h("div", { class: "columns panels" });
  circuits.parts = { controls, about, panels };
  into.append(h("p", { class: "how" }, "A circuit is a set of edges between the parts of a transformer. Move the slider to change its size: the most important edges come first."), controls, about, panels);
  showCircuits();
}

const taskNames = () => [...new Set(report.models.flatMap((model) => model.tasks.map((task) => task.task)))];
const shownModels = () => (several() ? circuits.models : [0]);
const taskOf = (model) => report.models[model].tasks.find((task) => task.task === circuits.task);

function showCircuits() {
  const rankings = shownModels().flatMap((model) => taskOf(model)?.rankings ?? []);
  const methods = [...new Set(rankings.map((ranking) => ranking.method))];
  if (!methods.includes(circuits.method)) circuits.method = methods[0] ?? null;
  const streams = [...new Set(rankings.filter((ranking) => ranking.method === circuits.method).map((ranking) => ranking.stream))];
  if (!streams.includes(circuits.stream)) circuits.stream = streams[0] ?? null;
  const choice = (name, label, values) => {
    if (!values.length) return "";
    const field = picker(label, values.map((value) => [value, value]), circuits[name], (value) => {
      circuits[name] = value;
      showCircuits();
      circuits.parts.controls.querySelector(`[data-role="${name}"] select`)?.focus();
    });
    field.setAttribute("data-role", name);
    return field;
  };
  const sides = report.models.length > 2 ? circuits.models.map((model, side) => modelPicker(side ? "Right" : "Left", model, (value) => {
    circuits.models[side] = value;
    showCircuits();
  })) : [];
  circuits.parts.controls.replaceChildren(
    choice("task", "Task", taskNames()),
    choice("method", "Method", methods),
    choice("stream", "Stream", streams),
    ...sides,
    several() ? tick("Both sliders together", circuits.together, (on) => (circuits.together = on)) : "",
  );
  const abouts = [...new Set(shownModels().map((model) => taskOf(model)?.about).filter(Boolean))];
  circuits.parts.about.replaceChildren(block(circuits.task, null, abouts.map((about) => h("p", { class: "about-task" }, about))));
  circuits.panels = shownModels().map((model) => circuitPanel(model));
  circuits.parts.panels.replaceChildren(...circuits.panels.map((panel) => panel.element));
  for (const panel of circuits.panels) panel.start?.();
}

// Sizes that the slider stops at: every one while they are few, then steps of about 4 per cent.
function stops(n, chosen) {
  const found = new Set([0, n, chosen]);
  for (let size = 1; size < n; size = Math.max(size + 1, Math.round(size * 1.04))) found.add(size);
  return [...found].filter((size) => size <= n).sort((a, b) => a - b);
}

function circuitPanel(model) {
  const task = taskOf(model);
  const heading = several() ? h("h3", { class: "panel-name" }, report.models[model].name) : h("div", {});
  const panel = (...content) => ({ element: h("div", { class: "panel" }, heading, ...content) });
  if (!task) return panel(h("p", { class: "note" }, `No task ${circuits.task} for this model.`));
  const how = "How often, and by how much, each stream prefers the right answer; a circuit means something only if the model can do the task.";
  const skill = [tableBlock(task.skill, how, { model }), task.note ? h("p", { class: "note boxed" }, task.note) : h("div", {})];
  const ranking = task.rankings.find((one) => one.method === circuits.method && one.stream === circuits.stream);
  if (ranking) return rankingPanel(model, ranking, panel(skill).element);
  const missing = circuits.method ? `No circuit by ${circuits.method} in the ${circuits.stream} stream of this model.` : "No circuit was looked for.";
  return panel(skill, circuits.method || !task.note ? h("p", { class: "note boxed" }, missing) : null);
}

function rankingPanel(model, ranking, element) {
  const { edges: all, scale, n_edges: whole } = ranking.circuit;
  const total = all.length;
  const sizes = stops(total, Math.min(ranking.chosen, total));
  const output = h("output", { "aria-live": "polite" });
  const id = "size-" + labels++;
  const slider = h("input", { id, type: "range", min: 0, max: sizes.length - 1, step: 1, class: "size" });
  const exact = h("input", { type: "number", min: 0, max: total, step: 1, "aria-label": "Number of edges, exactly" });
  const back = h("button", { type: "button", class: "plain" }, `As found: ${count(ranking.chosen)}`);
  const edges = h("div", {});
  const shown = { n: 0 };
  const graph = new Graph(ranking.circuit, () => listEdges());
  const curve = ranking.curve ? chartFigure(ranking.curve, "How much of the model's effect the circuit keeps, by its number of edges; the vertical line is the size on the slider.", { height: 250, level: "h4" }) : null;

  function show(n) {
    shown.n = Math.max(0, Math.min(total, n));
    slider.value = String(sizes.findLastIndex((size) => size <= shown.n));
    slider.setAttribute("aria-valuetext", plural(shown.n, "edge"));
    exact.value = String(shown.n);
    graph.show(shown.n);
    output.textContent = `${plural(shown.n, "edge")} of ${count(whole)} (${percent(shown.n / whole)})${faithfulnessWords(ranking.curve, shown.n)}`;
    if (curve) curve.chart.mark(markAt(ranking.curve, shown.n));
    listEdges();
  }

  function listEdges() {
    const mine = all.slice(0, shown.n).map((edge, i) => [i, edge]).filter(([, edge]) => !graph.node || edge.source === graph.node || edge.destination === graph.node);
    const some = mine.slice(0, 40);
    const open = edges.querySelector("details")?.open || graph.node !== null;
    const of = graph.node ? ` of ${nodeWords(graph.node)}` : "";
    edges.replaceChildren(
      h("details", { open },
        h("summary", {}, `Edges${of} as a table`),
        h("p", { class: "how" }, `Edges${of} in the order in which they join; score: ${scale}.${some.length < mine.length ? ` The first ${some.length} of ${count(mine.length)}.` : ""}`),
        scroller("Edges", plainTable(["place", "from", "to", "arrives as", `score (${scale})`], some.map(([i, edge]) => [String(i + 1), edge.source, edge.destination, portWords[edge.port] || "input", figure3(edge.score)]), { numeric: [true, false, false, false, true] })),
      ),
    );
  }

  const move = (n) => {
    for (const panel of circuits.together ? circuits.panels : [{ show }]) panel.show?.(n);
  };
  let waiting = null;
  slider.addEventListener("input", () => {
    const n = sizes[Number(slider.value)];
    if (waiting === null) requestAnimationFrame(() => {
      move(waiting);
      waiting = null;
    });
    waiting = n;
  });
  exact.addEventListener("change", () => move(Math.round(Number(exact.value)) || 0));
  back.addEventListener("click", () => show(Math.min(ranking.chosen, total)));

  element.append(
    block(
      `${ranking.method} circuit, ${ranking.stream} stream`,
      [linked(model, sentence(ranking.circuit.note)), "Layers go upward; circles are heads, squares are MLPs. A wider line is a larger score; orange is positive, blue is negative. Click a node to see only its edges."],
      h("div", { class: "slider-row controls" }, h("label", { for: id }, "Edges"), slider, exact, back),
      h("p", { class: "size-words" }, output),
      scroller("The circuit as a graph", graph.element),
      graphLegend(ranking.circuit),
      edges,
    ),
  );
  if (curve) element.append(curve.figure);
  return { element, show, start: () => show(Math.min(ranking.chosen, total)) };
}

function graphLegend({ edges, scale }) {
  const sample = (kind, width) => s("svg", { width: 34, height: 10, "aria-hidden": "true" }, s("path", { d: "M2,5H32", class: `edge ${kind}`, "stroke-width": width }));
  const scores = edges.map((edge) => edge.score).filter((score) => score !== null);
  const largest = scores.length ? Math.max(...scores.map(Math.abs)) : null;
  return h("p", { class: "graph-legend" },
    h("span", {}, sample("positive", 3), " positive"),
    scores.some((score) => score < 0) ? h("span", {}, sample("negative", 3), " negative") : null,
    h("span", {}, sample("positive", 4.8), largest === null ? " no scores" : ` ${figure3(largest)}`),
    h("span", {}, sample("positive", 0.8), " 0"),
    h("span", { class: "faint" }, scale),
  );
}

// What was measured at the size nearest to that of the circuit shown, by ratio.
function faithfulnessWords(curve, n) {
  if (!curve || !curve.lines.length) return "";
  const line = curve.lines[0];
  const ratio = (x) => Math.abs(Math.log((x + 1) / (n + 1)));
  const near = line.x.map((_, i) => i).filter((i) => line.y[i] !== null).sort((i, j) => ratio(line.x[i]) - ratio(line.x[j]))[0];
  return near === undefined ? "" : `; ${curve.y_title} measured at ${plural(line.x[near], "edge")}: ${figure3(line.y[near])}`;
}

function markAt(curve, n) {
  const first = Math.min(...curve.lines.flatMap((line) => line.x).filter((x) => curve.x_scale !== "log" || x > 0));
  const x = curve.x_scale === "log" ? Math.max(n, Number.isFinite(first) ? first : 1) : n;
  return [{ type: "line", yref: "paper", x0: x, x1: x, y0: 0, y1: 1, line: { color: colours().text, width: 1.5 } }];
}
