// Elements, packs and figures: what every part of the page is made with.
// Texts of the report become text nodes and attribute values, never markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(made, properties, children) {
  for (const [name, value] of Object.entries(properties || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, part] of Object.entries(value)) made.style.setProperty(key, part);
    else made.setAttribute(name, value === true ? "" : String(value));
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

const h = (tag, properties, ...children) => fill(document.createElement(tag), properties, children);
const s = (tag, properties, ...children) => fill(document.createElementNS(SVG, tag), properties, children);

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

// -------------------------------------------------------------------------------------------------------- figures

const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;
const count = (n) => n.toLocaleString("en");

// A note as a sentence, to stand before another.
const sentence = (note) => (note ? note[0].toUpperCase() + note.slice(1) + (/[.!?]$/.test(note) ? " " : ". ") : "");

// A number as it is read: three significant digits.
function figure3(value) {
  if (value === null || value === undefined) return "n/a";
  if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(3)));
}

// A share as per cent.
function percent(share) {
  if (share === null || share === undefined) return "n/a";
  if (share > 0 && share < 0.0001) return "<0.01%";
  return (share >= 0.0995 ? (100 * share).toFixed(0) : Number((100 * share).toPrecision(2))) + "%";
}

// --------------------------------------------------------------------------------------------------------- controls

let labels = 0;

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

function tick(label, checked, change) {
  const box = h("input", { type: "checkbox", checked, onchange: () => change(box.checked) });
  return h("label", { class: "tick controls" }, box, label);
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

// Something wide that scrolls within the page, also by keyboard.
const scroller = (label, ...content) => h("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": label }, ...content);

// What makes an element answer a click, Enter and the space bar.
const pressable = (press) => ({
  onclick: press,
  onkeydown: (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    press();
  },
});

// A choice among the models, if there are several.
const modelPicker = (label, chosen, change) =>
  report.models.length > 1 ? picker(label, report.models.map((model, i) => [i, model.name]), chosen, (value) => change(Number(value))) : null;

// A calm moment of the browser.
const idle = () => new Promise((done) => (window.requestIdleCallback ? requestIdleCallback(done, { timeout: 500 }) : setTimeout(done, 50)));

// The report: set once the front pack is open.
let report = null;
