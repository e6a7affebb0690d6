// The picture of a circuit: nodes by layer upward, edges as wide as their scores are large, coloured by sign.

const ROW = 78;
const NODE = 13;
const LEFT = 62;

// A node has one place whatever the size of the circuit, and the same in every model of one shape.
// wide: for a whole page instead of a column of it. narrow: for a phone.
function nodePlaces(circuit, { wide, narrow }) {
  const inner = Math.max(wide ? 620 : narrow ? 170 : 300, circuit.n_heads * (wide ? 46 : 40));
  const width = LEFT + inner + (circuit.attn_only ? 20 : 110);
  const height = (circuit.n_layers + 1) * ROW + 40;
  const y = (layer) => height - 20 - (layer + 1) * ROW + 12;
  const places = new Map();
  places.set("embed", [LEFT + inner / 2, height - 22]);
  for (let layer = 0; layer < circuit.n_layers; layer++) {
    for (let head = 0; head < circuit.n_heads; head++) places.set(`a${layer}.h${head}`, [LEFT + ((head + 0.5) * inner) / circuit.n_heads, y(layer)]);
    if (!circuit.attn_only) places.set(`m${layer}`, [LEFT + inner + 42, y(layer) - 0.45 * ROW]);
  }
  places.set("logits", [LEFT + inner / 2, 22]);
  return { places, width, height, y };
}

const PORTS = { q: -8, k: 0, v: 8 };

// Leaves upward and arrives from below; queries at the left of a head, keys in the middle, values at the right.
function edgePath(places, edge) {
  const [x0, y0] = places.get(edge.source);
  let [x3, y3] = places.get(edge.destination);
  x3 += PORTS[edge.port] || 0;
  const rise = y3 - y0;
  let [x1, x2] = [x0, x3];
  if (edge.source.startsWith("m") && edge.destination.startsWith("m")) x1 = x2 = x0 + 16 - 0.1 * rise;
  else if (edge.source === "embed" && edge.destination === "logits") x1 = x2 = LEFT - 20;
  else if (Math.abs(rise) > 1.5 * ROW && edge.destination !== "logits" && edge.source !== "embed") {
    const bend = x0 + x3 >= 2 * places.get("embed")[0] ? 14 : -14;
    x1 += bend;
    x2 += bend;
  }
  return `M${x0.toFixed(1)},${y0.toFixed(1)}C${x1.toFixed(1)},${(y0 + 0.45 * rise).toFixed(1)} ${x2.toFixed(1)},${(y3 - 0.45 * rise).toFixed(1)} ${x3.toFixed(1)},${(y3 + NODE * 0.7).toFixed(1)}`;
}

const nodeLabel = (node) => (node.includes(".h") ? node.slice(1).replace(".h", ".") : node);
const nodeWords = (node) => (node.includes(".h") ? `head ${nodeLabel(node)}` : node.startsWith("m") ? `MLP of layer ${node.slice(1)}` : node);
const portWords = { q: "query", k: "key", v: "value" };
const edgeWords = (edge) => `${edge.source} → ${edge.destination}${edge.port ? "." + edge.port : ""}`;

class Graph {
  // picked: called when a node is pinned or let go. beside: circuits whose lines are measured alike.
  constructor(circuit, { picked = () => {}, beside = [circuit], wide = false, narrow = false } = {}) {
    Object.assign(this, { circuit, picked, n: 0, node: null, touched: null, layout: nodePlaces(circuit, { wide, narrow }) });
    this.scores = beside.flatMap(({ edges }) => edges.map((edge) => edge.score)).filter((score) => score !== null);
    const sizes = this.scores.map(Math.abs).filter(Boolean).sort((a, b) => a - b);
    // spread by asinh, so that a few large scores leave the others apart
    this.unit = sizes.length ? sizes[sizes.length >> 1] : 1;
    this.most = sizes.length ? Math.asinh(sizes[sizes.length - 1] / this.unit) : 1;
    this.lines = s("g", { class: "edges" });
    this.marks = s("g", { class: "nodes" });
    this.paths = [];
    this.nodes = new Map();
    const rows = Array.from({ length: circuit.n_layers }, (_, layer) => s("text", { x: 4, y: this.layout.y(layer) + 4, class: "row" }, `layer ${layer}`));
    this.element = s("svg", { viewBox: `0 0 ${this.layout.width} ${this.layout.height}`, class: "graph", role: "group", "aria-label": "The circuit as a graph", style: { "min-width": `${(beside.length > 1 ? 0.75 : 0.9) * this.layout.width}px` } }, rows, this.lines, this.marks);
    for (const [name, [x, y]] of this.layout.places) this.addNode(name, x, y);
  }

  addNode(name, x, y) {
    const wide = name === "embed" || name === "logits";
    const shape = name.includes(".h")
      ? s("circle", { cx: x, cy: y, r: NODE })
      : s("rect", { x: x - (wide ? 26 : NODE), y: y - (wide ? 11 : NODE), width: wide ? 52 : 2 * NODE, height: wide ? 22 : 2 * NODE, rx: wide ? 11 : 3 });
    const tip = s("title", {});
    const pick = () => {
      this.node = this.node === name ? null : name;
      this.light();
      this.picked();
    };
    const touch = (node) => () => {
      this.touched = node;
      this.light();
    };
    const group = s("g", { class: "node", role: "button", tabindex: "-1", "data-node": name, "aria-pressed": "false", ...pressable(pick), onpointerenter: touch(name), onpointerleave: touch(null) },
      shape,
      s("text", { x, y: y + 4, class: name.includes(".h") && nodeLabel(name).length > 3 ? "long" : null }, nodeLabel(name)),
      tip,
    );
    this.marks.append(group);
    this.nodes.set(name, { group, tip });
  }

  // Draws the first n edges: only those that come or go are touched.
  show(n) {
    const { edges, scale } = this.circuit;
    for (let i = this.paths.length; i < n; i++) {
      const edge = edges[i];
      const weight = Math.asinh(Math.abs(edge.score ?? 0) / this.unit) / this.most || 0;
      const sign = edge.score === null ? "none" : edge.score < 0 ? "negative" : "positive";
      this.paths.push(
        s("path", { d: edgePath(this.layout.places, edge), class: `edge ${sign}`, "stroke-width": (0.8 + 4 * weight).toFixed(2), "stroke-opacity": (0.4 + 0.6 * weight).toFixed(2) },
          s("title", {}, `${edgeWords(edge)}\n${edge.score === null ? "no score" : `${figure3(edge.score)} ${scale}`}`),
        ),
      );
    }
    // weaker edges lie below stronger ones
    for (let i = this.n; i < n; i++) this.lines.prepend(this.paths[i]);
    for (let i = n; i < this.n; i++) this.paths[i].remove();
    this.n = n;
    const ends = new Map();
    for (const edge of edges.slice(0, n)) {
      ends.set(edge.source, [ends.get(edge.source)?.[0] || 0, (ends.get(edge.source)?.[1] || 0) + 1]);
      ends.set(edge.destination, [(ends.get(edge.destination)?.[0] || 0) + 1, ends.get(edge.destination)?.[1] || 0]);
    }
    if (this.node && !ends.has(this.node)) this.node = null;
    for (const [name, { group, tip }] of this.nodes) {
      const [into, out] = ends.get(name) || [0, 0];
      const used = ends.has(name);
      group.classList.toggle("unused", !used);
      group.setAttribute("tabindex", used ? "0" : "-1");
      tip.textContent = `${nodeWords(name)}: ${into} in, ${out} out`;
      group.setAttribute("aria-label", tip.textContent);
    }
    this.light();
  }

  // Leaves only the edges of the node below the mouse strong, or else of the pinned one.
  light() {
    const node = this.touched ?? this.node;
    this.paths.slice(0, this.n).forEach((path, i) => {
      const edge = this.circuit.edges[i];
      path.classList.toggle("dim", node !== null && edge.source !== node && edge.destination !== node);
    });
    for (const [name, { group }] of this.nodes) group.setAttribute("aria-pressed", String(name === this.node));
  }

  legend() {
    const sample = (kind, width) => s("svg", { width: 34, height: 10, "aria-hidden": "true" }, s("path", { d: "M2,5H32", class: `edge ${kind}`, "stroke-width": width }));
    const largest = this.scores.length ? Math.max(...this.scores.map(Math.abs)) : null;
    return h("p", { class: "graph-legend" },
      h("span", {}, sample("positive", 3), " positive"),
      this.scores.some((score) => score < 0) ? h("span", {}, sample("negative", 3), " negative") : null,
      h("span", {}, sample("positive", 4.8), largest === null ? " no scores" : ` ${figure3(largest)}`),
      h("span", {}, sample("positive", 0.8), " 0"),
      h("span", { class: "faint" }, this.circuit.scale),
    );
  }
}
