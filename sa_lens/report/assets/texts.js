// Tokens, tables, and links to units.

// Which unit of a model a name belongs to; filled when the report opens.
const unitPlaces = [];

const unitAddress = (model, name) => `#unit/${encodeURIComponent(report.models[model].name)}/${encodeURIComponent(name)}`;

// A unit's name, as a link to its page where it has one.
function unitLink(model, name, words = name) {
  return unitPlaces[model].has(name) ? h("a", { class: "unit-link", href: unitAddress(model, name) }, words) : h("span", {}, words);
}

const UNIT_NAME = /\bL\d+\.(?:attn|mlp)\.\d+\b/g;

// Text in which every name of a unit is a link to it.
function linked(model, text) {
  const parts = [];
  let from = 0;
  for (const match of text.matchAll(UNIT_NAME)) {
    parts.push(text.slice(from, match.index), unitLink(model, match[0]));
    from = match.index + match[0].length;
  }
  parts.push(text.slice(from));
  return parts;
}

// ---------------------------------------------------------------------------------------------------------- tokens

// A text without the bytes that stand for the first parts of a character; the character stands at its last token.
const wholeText = (tokens) => tokens.join("").replaceAll(/<0x[0-9A-F]{2}>/g, "");

// A token's text with signs for what cannot be seen: line breaks, tabs, spaces that stand alone, parts of characters.
function visibleToken(token) {
  if (token === "") return [h("span", { class: "sign" }, "∅")];
  const lonely = token.trim() === "";
  return [...token.matchAll(/\n|\t| |<0x[0-9A-F]{2}>|[^\n\t <]+|</g)].map(([piece]) => {
    if (/^<0x/.test(piece)) return h("span", { class: "sign" }, piece);
    if (piece === "\n") return h("span", { class: "sign" }, "↵");
    if (piece === "\t") return h("span", { class: "sign" }, "⇥");
    if (piece === " " && lonely) return h("span", { class: "sign" }, "␣");
    return piece;
  });
}

// A token alone, as a label: its first space shows as a sign.
function tokenLabel(token) {
  const spaced = token.length > 1 && token.startsWith(" ");
  return h("bdi", { class: "token-label" }, spaced ? [h("span", { class: "sign" }, "␣"), visibleToken(token.slice(1))] : visibleToken(token));
}

const chips = (tokens) => tokens.map((token) => [h("span", { class: "chip" }, tokenLabel(token)), " "]);

// A token within running text: its first space stands before it, out of its colour; a line break shows as a sign and
// breaks the line.
function runningToken(token, properties) {
  const spaced = token.startsWith(" ") && token.trim() !== "";
  const made = h("bdi", { class: "token", ...properties }, visibleToken(spaced ? token.slice(1) : token));
  return [spaced ? " " : "", made, token.includes("\n") ? "\n" : ""];
}

// Tokens in the colours of a unit's values, the one they were drawn for with a frame.
function snippetText(snippet, most) {
  const scale = { kind: "diverging", share: (value) => 0.5 + value / 2 };
  const run = h("span", { class: "run" });
  const painted = [];
  snippet.tokens.forEach((token, i) => {
    const value = (snippet.steps[i] / 100) * snippet.most;
    const made = runningToken(token, { title: `value ${figure3(i === snippet.focus ? snippet.value : value)}`, class: i === snippet.focus ? "token focus" : "token" });
    painted.push([made[1], most ? value / most : 0, snippet.steps[i] !== 0]);
    run.append(...(i ? made : made.slice(1)));
  });
  const colour = () => painted.forEach(([element, value, known]) => paint(element, scale, known ? value : null));
  colour();
  return { run, colour };
}

// A bar for a part of a whole.
const bar = (share, colour) => h("span", { class: "bar", "aria-hidden": "true" }, h("i", { style: { width: `${Math.max(0, Math.min(1, share)) * 100}%`, background: colour } }));

// ---------------------------------------------------------------------------------------------------------- tables

// A table of the report with its heading and how to read it.
function tableBlock(record, how, { model = 0, title = record.title } = {}) {
  return block(
    title,
    [linked(model, sentence(record.note)), how],
    scroller(title, plainTable(record.columns, record.rows, { numeric: record.numeric, cell: (text) => linked(model, text) })),
  );
}
