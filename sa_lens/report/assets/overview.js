// What each model is, how well its streams predict, and what they write.

function drawOverview(into) {
  const models = report.models;
  const how = "One row per stream. Lower loss, perplexity and bits are better; the clean stream runs without gates, the ablated one drops what they do not keep.";
  const title = (model) => (several() ? `${model.overview.losses.title}, ${model.name}` : model.overview.losses.title);
  into.append(factsBlock(models), h("div", { class: "columns" }, models.map((model, i) => tableBlock(model.overview.losses, how, { model: i, title: title(model) }))));
  if (report.training) into.append(chartFigure(report.training, "Lower is better; solid is the clean stream, dashed the ablated one. Drag to look closer, double click to see all.").figure);
  into.append(samplesBlock(models));
}

const several = () => report.models.length > 1;

function factsBlock(models) {
  const names = [...new Set(models.flatMap((model) => model.overview.facts.map((fact) => fact.name)))];
  const rows = names.map((name) => {
    const facts = models.map((model) => model.overview.facts.find((fact) => fact.name === name));
    return [name, ...facts.map((fact) => fact?.value ?? "n/a"), facts.map((fact) => fact?.meaning).find(Boolean) || ""];
  });
  const heads = several() ? models.map((model) => model.name) : ["value"];
  return block(
    several() ? "The models" : "The model",
    several() ? "One column per model; the last column says what a figure means." : "Each figure of the model with its meaning.",
    scroller("Facts", plainTable(["figure", ...heads, "meaning"], rows, { name: "facts cards" })),
  );
}

function samplesBlock(models) {
  const samples = models.flatMap((model) => model.overview.samples.map((sample) => ({ ...sample, model: model.name })));
  const box = ({ model, stream, prompt, text }) =>
    h("article", { class: "sample", style: { "border-color": streamVariable(stream) } },
      h("h4", {}, several() ? `${model}, ${stream}` : stream),
      h("p", { dir: "auto" }, h("b", {}, prompt), text),
    );
  return block(
    "What the streams write",
    "The same beginning, in bold, continued by each stream.",
    samples.length ? null : h("p", { class: "note" }, "This report holds no samples."),
    [...new Set(samples.map((sample) => sample.prompt))].map((prompt) => h("div", { class: "samples" }, samples.filter((sample) => sample.prompt === prompt).map(box))),
  );
}

function drawComparison(into) {
  for (const record of report.comparison) into.append(tableBlock(record, "A column for each model; rows are figures of the same text and tasks."));
}
