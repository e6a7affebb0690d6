// Colours of the two looks, and the scales from numbers to colours.

let palettes = null;
const themed = new Set();

const preferred = window.matchMedia("(prefers-color-scheme: dark)");

function dark() {
  const set = document.documentElement.dataset.theme;
  return set ? set === "dark" : preferred.matches;
}

const colours = () => (dark() ? palettes.dark : palettes.light);

function setTheme(name) {
  if (name) document.documentElement.dataset.theme = name;
  else delete document.documentElement.dataset.theme;
  for (const redraw of themed) redraw();
}

// Asked where a file's pages may keep nothing, storage throws.
function kept(value) {
  try {
    if (value !== undefined) localStorage.setItem("sa-lens-theme", value);
    return localStorage.getItem("sa-lens-theme");
  } catch {
    return null;
  }
}

function themeButton() {
  const change = () => {
    const name = dark() ? "light" : "dark";
    kept(name);
    setTheme(name);
  };
  const button = h("button", { type: "button", class: "plain", onclick: change });
  const say = () => button.replaceChildren(dark() ? "Light look" : "Dark look");
  themed.add(say);
  preferred.addEventListener("change", () => setTheme(document.documentElement.dataset.theme || ""));
  say();
  return button;
}

// ---------------------------------------------------------------------------------------------------------- scales

const parts = (colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));

// The colour at a place from 0 to 1 of a row of colours.
function colourAt(row, at) {
  const place = Math.min(Math.max(at, 0), 1) * (row.length - 1);
  const i = Math.min(Math.floor(place), row.length - 2);
  const [low, high] = [parts(row[i]), parts(row[i + 1])];
  return "#" + low.map((part, j) => Math.round(part + (high[j] - part) * (place - i)).toString(16).padStart(2, "0")).join("");
}

// Black or white, whichever reads better: their contrasts with a colour of this luminance are equal, more than 4.5.
function inkOn(colour) {
  const [red, green, blue] = parts(colour).map((part) => (part <= 10 ? part / 3294.6 : ((part / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.17913 ? "#000000" : "#ffffff";
}

// From the numbers of a track to colours: diverging ones centred at 0.
function scaleOf(values, kind) {
  const known = values.filter((value) => value !== null);
  let low = known.length ? Math.min(...known) : 0;
  let high = known.length ? Math.max(...known) : 1;
  if (kind === "diverging") {
    high = Math.max(Math.abs(low), Math.abs(high));
    low = -high;
  }
  return { kind, low, high, share: (value) => (high > low ? (value - low) / (high - low) : kind === "diverging" ? 0.5 : 0) };
}

// Gives an element the colour of a number; none where there is no number.
function paint(element, scale, value) {
  const colour = value === null || value === undefined ? "" : colourAt(colours()[scale.kind], scale.share(value));
  element.style.backgroundColor = colour;
  element.style.color = colour && inkOn(colour);
}

function legend(scale, words) {
  const bar = h("i", { class: "ramp" });
  const row = colours()[scale.kind];
  bar.style.setProperty("background", `linear-gradient(to right, ${row.join(", ")})`);
  return h("div", { class: "legend" }, h("span", {}, figure3(scale.low)), bar, h("span", {}, figure3(scale.high)), h("span", { class: "faint" }, words));
}

// The colour of a stream, the same everywhere: clean blue, ablated orange.
const streamVariable = (stream) => (stream === "ablated" ? "var(--line-1)" : "var(--line-0)");
