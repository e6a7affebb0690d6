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
  const none = h("div", {});
  const panels = h("div", { class: "columns panels" });
  circuits.parts = { controls, about, none, panels };
  into.append(h("p", { class: "how" }, "A circuit is a set of edges between the parts of a transformer. Move the slider to change its size: the most important edges come first."), controls, about, none, panels);
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
    shownModels().filter(rankingOf).length > 1 ? tick("Both sliders together", circuits.together, (on) => (circuits.together = on)) : "",
  );
  const abouts = [...new Set(shownModels().map((model) => taskOf(model)?.about).filter(Boolean))];
  circuits.parts.about.replaceChildren(block(circuits.task, null, abouts.map((about) => h("p", { class: "about-task" }, about))));
  const [able, unable] = [true, false].map((has) => shownModels().filter((model) => Boolean(rankingOf(model)) === has));
  circuits.parts.none.replaceChildren(...unable.map((model) => h("p", { class: "note boxed" }, whyNone(model))));
  circuits.panels = able.map((model) => rankingPanel(model, able.length === 1));
  circuits.parts.panels.replaceChildren(...circuits.panels.map((panel) => panel.element));
  for (const panel of circuits.panels) panel.start?.();
}

const rankingOf = (model) => taskOf(model)?.rankings.find((one) => one.method === circuits.method && one.stream === circuits.stream);

// Why a model has no circuit to show.
function whyNone(model) {
  const { name, streams } = report.models[model];
  const task = taskOf(model);
  if (!task) return `No task ${circuits.task} for ${name}.`;
  if (circuits.stream && !streams.includes(circuits.stream)) return `${name} has no ${circuits.stream} stream.`;
  if (task.note) return several() ? `${name}: ${task.note}` : task.note;
  return circuits.method ? `No circuit by ${circuits.method} in the ${circuits.stream} stream of ${name}.` : `No circuit was looked for in ${name}.`;
}

// alone: with the whole page to itself.
function rankingPanel(model, alone) {
  const task = taskOf(model);
  const ranking = rankingOf(model);
  const { circuit, curve } = ranking;
  const chart = curve ? chartFigure(curve, "How much of the model's effect the circuit keeps, by its number of edges; the vertical line is the size on the slider.", { height: 250, level: "h4" }) : null;
  const view = new CircuitView(circuit, {
    chosen: ranking.chosen,
    wide: alone && !phone.matches,
    narrow: phone.matches,
    words: (n) => faithfulnessWords(curve, n),
    moved: (n) => {
      for (const panel of circuits.together ? circuits.panels : [view]) panel.show?.(n);
    },
    shown: (n) => chart?.chart.mark(markAt(curve, n)),
  });
  const how = "How often, and by how much, each stream prefers the right answer; a circuit means something only if the model can do the task.";
  const element = h("div", { class: "panel" },
    several() ? h("h3", { class: "panel-name" }, report.models[model].name) : h("div", {}),
    tableBlock(task.skill, how, { model }),
    task.note ? h("p", { class: "note boxed" }, task.note) : h("div", {}),
    block(`${ranking.method} circuit, ${ranking.stream} stream`, [linked(model, sentence(circuit.note)), HOW_TO_READ], warningsOf(circuit), view.element),
    chart?.figure,
  );
  return { element, show: (n) => view.show(n), start: () => view.show(view.chosen) };
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
