// What each model is, how well its streams predict, and what they write.

function drawOverview(into) {
  const models = report.models;
  into.append(factsBlock(models));
  into.append(
    h("div", { class: "columns" },
      models.map((model, i) =>
        tableBlock(model.overview.losses, "One row per stream. Lower loss, perplexity and bits are better; the clean stream runs without gates, the ablated one drops what they do not keep.", {
          model: i,
          title: several() ? `${model.overview.losses.title}, ${model.name}` : model.overview.losses.title,
        }),
      ),
    ),
  );
  const curves = joinedCurves(models);
  if (curves.length) into.append(h("div", { class: "columns" }, curves.map((record) => chartFigure(record, "Lower is better; solid is the clean stream, dashed the ablated one. Drag to look closer, double click to see all.").figure)));
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
    scroller("Facts", plainTable(["figure", ...heads, "meaning"], rows, { name: "facts" })),
  );
}

// Training curves of all models in one chart where their axes are the same.
function joinedCurves(models) {
  const joined = [];
  for (const model of models) {
    const record = model.overview.training;
    if (!record) continue;
    const distinct = new Set(record.lines.map((line) => line.name)).size > 1;
    const lines = record.lines.map((line) => ({ ...line, name: !several() ? (distinct ? line.name : "") : distinct ? `${model.name}: ${line.name}` : model.name }));
    const same = joined.find((one) => one.title === record.title && one.x_title === record.x_title && one.y_title === record.y_title && one.x_scale === record.x_scale);
    if (same) {
      same.lines.push(...lines);
      if (record.note && !same.note.includes(record.note)) same.note = [same.note, record.note].filter(Boolean).join("; ");
    } else joined.push({ ...record, lines });
  }
  return joined;
}

function samplesBlock(models) {
  const prompts = [...new Set(models.flatMap((model) => model.overview.samples.map((sample) => sample.prompt)))];
  return block(
    "What the streams write",
    "The same beginning, in bold, continued by each stream.",
    prompts.length ? null : h("p", { class: "note" }, "This report holds no samples."),
    prompts.map((prompt) =>
      h("div", { class: "samples" },
        models.flatMap((model) =>
          model.overview.samples
            .filter((sample) => sample.prompt === prompt)
            .map((sample) =>
              h("article", { class: "sample", style: { "border-color": streamVariable(sample.stream) } },
                h("h4", {}, several() ? `${model.name}, ${sample.stream}` : sample.stream),
                h("p", { dir: "auto" }, h("b", {}, sample.prompt), sample.text),
              ),
            ),
        ),
      ),
    ),
  );
}

function drawComparison(into) {
  for (const record of report.comparison) into.append(tableBlock(record, "A column for each model; rows are figures of the same text and tasks."));
}
