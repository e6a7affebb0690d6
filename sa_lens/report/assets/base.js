// Packs and controls: what every part of the page is made with.

// ---------------------------------------------------------------------------------------------------------- packs

// A function that keeps what it returned for each argument.
function remembered(make) {
  const made = new Map();
  return (key) => (made.has(key) ? made : made.set(key, make(key))).get(key);
}

async function unpackText(name) {
  const packed = document.getElementById("pack-" + name);
  const letters = atob(packed.textContent);
  packed.remove();
  const bytes = Uint8Array.from(letters, (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

// A part of the report, unpacked when it is first wanted.
const pack = remembered((name) => unpackText(name).then(JSON.parse));

// The stories of a model, with one record for each unit that its gates keep.
const storiesOfModel = remembered(async (model) => {
  const { units, stories } = await pack(`stories-${model}`);
  for (const story of stories) if (story.gates) story.gates.units = unitsThatStay(story.gates, units);
  return stories;
});

function unitsThatStay({ units, counts, gaps, values }, known) {
  let next = 0;
  return units.map((place, i) => {
    const from = next;
    next += counts[i];
    let position = 0;
    return {
      ...{ name: known.name[place], layer: known.layer[place], site: known.site[place], promotes: known.promotes[place] },
      positions: gaps.slice(from, next).map((gap) => (position += gap)),
      values: values.slice(from, next),
    };
  });
}

// --------------------------------------------------------------------------------------------------------- controls

// Replaces what an element holds. Parts that are null are left out, where the browser would write "null".
const refill = (element, ...parts) => element.replaceChildren(...parts.filter((part) => part !== null));

// A control with its label.
function field(label, control, kind = "") {
  control.id = "control-" + labels++;
  return h("div", { class: `field controls ${kind}` }, h("label", { for: control.id }, label), control);
}

// A choice among few or many.
function picker(label, options, chosen, change) {
  const choices = options.map(([value, words]) => h("option", { value, selected: String(value) === String(chosen) }, words));
  const select = h("select", { onchange: () => change(select.value) }, choices);
  return field(label, select);
}

function searchBox(label, placeholder, change) {
  const box = h("input", { type: "search", placeholder, autocomplete: "off", spellcheck: "false", oninput: () => change(box.value) });
  return field(label, box, "search");
}

// A part of a section: heading, what it holds and how to read it, content.
function block(title, how, ...content) {
  const id = "block-" + labels++;
  return h("section", { class: "block", "aria-labelledby": id },
    h("h3", { id }, title),
    how ? h("p", { class: "how" }, how) : null,
    ...content,
  );
}

// Whether the page is as narrow as its style sheet has it for phones.
const phone = window.matchMedia("(max-width: 520px)");

// A choice among the models, if there are several.
const modelPicker = (label, chosen, change) =>
  report.models.length > 1 ? picker(label, report.models.map((model, i) => [i, model.name]), chosen, (value) => change(Number(value))) : null;

// A calm moment of the browser.
const idle = () => new Promise((done) => (window.requestIdleCallback ? requestIdleCallback(done, { timeout: 500 }) : setTimeout(done, 50)));

// The report: set once the front pack is open.
let report = null;
