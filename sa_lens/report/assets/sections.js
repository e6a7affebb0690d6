// The sections of the page, in order; their addresses; paper; and the beginning.

const SECTIONS = [
  { name: "overview", title: "Overview", draw: drawOverview, wanted: () => true },
  { name: "stories", title: "Stories", draw: drawStories, wanted: () => report.models.some((model) => model.titles.length), shown: revealToken },
  { name: "circuits", title: "Circuits", draw: drawCircuits, wanted: () => report.models.some((model) => model.tasks.length) },
  { name: "units", title: "Units", draw: drawUnits, wanted: () => report.models.some((model) => model.units.length) },
  { name: "comparison", title: "Comparison", draw: drawComparison, wanted: () => report.comparison.length > 0 },
];
const sections = new Map();

// Draws a section when it is first wanted.
function drawn(name) {
  const section = sections.get(name);
  section.drawn ??= Promise.resolve(section.draw(section.body)).then(() => section.element.setAttribute("data-drawn", ""));
  return section.drawn;
}

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

// What an address after # asks for.
function wanted() {
  const [name, ...rest] = location.hash.slice(1).split("/").map(decoded);
  const model = Math.max(0, report.models.findIndex((one) => one.name === rest[0]));
  if (name === "unit" && sections.has("units")) return { name: "units", open: () => openUnit(model, rest.slice(1).join("/")), focus: ".unit-name" };
  if (name === "units" && sections.has("units")) return { name, open: () => showAllUnits(rest[0] === undefined ? table.model : model) };
  if (name === "stories" && sections.has(name)) {
    const [story, token] = rest.slice(1).map((part) => parseInt(part, 10));
    const change = {};
    if (rest.length) change.model = model;
    if (story >= 1) change.story = story - 1;
    if (token >= 0) change.token = token;
    return { name, open: () => (Object.keys(change).length ? openStory(change) : null), focus: token >= 0 ? ".tokens [tabindex='0']" : null };
  }
  return { name: sections.has(name) ? name : SECTIONS[0].name };
}

let asked = 0;

async function go(first) {
  const mine = ++asked;
  const { name, open, focus } = wanted();
  for (const [other, section] of sections) {
    section.element.classList.toggle("off", other !== name);
    if (other === name) section.link.setAttribute("aria-current", "page");
    else section.link.removeAttribute("aria-current");
  }
  await drawn(name);
  if (open) await open();
  const section = sections.get(name);
  section.shown?.();
  if (mine !== asked || first) return;
  const target = (focus && section.element.querySelector(focus)) || section.heading;
  target.focus({ preventScroll: Boolean(target === section.heading) });
  if (target === section.heading || focus === ".unit-name") window.scrollTo(0, 0);
}

// ----------------------------------------------------------------------------------------------------------- paper

async function drawEverything(pause) {
  for (const name of sections.keys()) {
    await pause?.();
    await drawn(name);
  }
  if (sections.has("units")) await unitDetails(table.model);
}

let lookBefore;

function onPaper() {
  if (document.documentElement.classList.contains("paper")) return;
  lookBefore = document.documentElement.dataset.theme || "";
  document.documentElement.classList.add("paper");
  setTheme("light");
  redrawCharts(true, PRINTED);
}

function offPaper() {
  document.documentElement.classList.remove("paper");
  setTheme(lookBefore);
}

async function print() {
  await drawEverything();
  await plotly();
  window.print();
}

// ------------------------------------------------------------------------------------------------------- beginning

async function start() {
  palettes = await pack("palettes");
  const look = kept();
  if (look === "dark" || look === "light") document.documentElement.dataset.theme = look;
  report = await pack("front");
  report.models.forEach((model, i) => (unitPlaces[i] = new Map(model.units.map((unit, place) => [unit.name, place]))));
  circuits.models = [0, Math.min(1, report.models.length - 1)];
  table.model = explorer.model = 0;
  const main = document.getElementById("content");
  const nav = document.querySelector("nav");
  for (const { name, title, draw, shown, wanted: has } of SECTIONS) {
    if (!has()) continue;
    const heading = h("h2", { id: `heading-${name}`, tabindex: "-1" }, title);
    const body = h("div", {});
    const element = h("section", { id: `section-${name}`, class: "section off", "aria-labelledby": `heading-${name}` }, heading, body);
    const link = h("a", { href: `#${name}` }, title);
    sections.set(name, { element, heading, body, link, draw, shown });
    main.append(element);
    nav.append(link);
  }
  document.querySelector(".tools").append(themeButton(), h("button", { type: "button", class: "plain", onclick: print }, "Print"));
  document.getElementById("state").remove();
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault();
    main.focus();
  });
  window.addEventListener("hashchange", () => go(false));
  window.addEventListener("beforeprint", onPaper);
  window.addEventListener("afterprint", offPaper);
  await go(true);
  document.documentElement.dataset.ready = Math.round(performance.now());
  await drawEverything(idle);
  document.documentElement.dataset.complete = "";
}

start().catch((error) => {
  const state = document.getElementById("state") || document.getElementById("content");
  state.textContent =
    typeof DecompressionStream === "undefined"
      ? "This browser is too old for this report: it needs one from 2023 or later (Chrome 80, Firefox 113, Safari 16.4)."
      : `The report could not be opened: ${error.message}. The file may be incomplete; make or copy it again.`;
  console.error(error);
});
