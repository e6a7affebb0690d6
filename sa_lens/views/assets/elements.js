// Elements, figures and tables: what pages are made with, those of the report and single views alike.
// Texts become text nodes and attribute values, never markup.

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

// ------------------------------------------------------------------------------------------------------- elements

// How many labels there are, to give each an id of its own.
let labels = 0;

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

function tick(label, checked, change) {
  const box = h("input", { type: "checkbox", checked, onchange: () => change(box.checked) });
  return h("label", { class: "tick controls" }, box, label);
}

// What speaks against trusting a record's numbers.
const warningsOf = ({ warnings = [] }) => warnings.map((warning) => h("p", { class: "warning" }, `Warning: ${warning}`));

// A table: the first column names the rows, unless it holds numbers.
function plainTable(columns, rows, { numeric = [], cell = (text) => text, name = null } = {}) {
  const side = (i) => (numeric[i] ? "number" : null);
  const data = (content, i) => (i === 0 && !numeric[0] ? h("th", { scope: "row" }, cell(content)) : h("td", { class: side(i), "data-head": columns[i] }, cell(content)));
  return h("table", { class: name },
    h("thead", {}, h("tr", {}, columns.map((head, i) => h("th", { scope: "col", class: side(i) }, head)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map(data)))),
  );
}
