// A circuit at any size: a slider for its number of edges, the graph, and the edges as a table.

const HOW_TO_READ = "Layers go upward; circles are heads, squares are MLPs. A wider line is a larger score; orange is positive, blue is negative. Click a node to see only its edges.";

// Sizes that the slider stops at: every one while they are few, then steps of about 4 per cent.
function stops(n, chosen) {
  const sizes = new Set([0, n, chosen]);
  for (let size = 1; size < n; size = Math.max(size + 1, Math.round(size * 1.04))) sizes.add(size);
  return [...sizes].filter((size) => size <= n).sort((a, b) => a - b);
}

class CircuitView {
  // circuit: a record whose edges are in the order in which they join.
  // chosen: edges at first, and of the button that leads back there.
  // words: what follows the number of edges in words. moved: asked for a size. shown: called when it is shown.
  // Others are those of Graph.
  constructor(circuit, { chosen, words = () => "", moved = (n) => this.show(n), shown = () => {}, ...look }) {
    const total = circuit.edges.length;
    Object.assign(this, { circuit, words, shown, n: 0, chosen: Math.min(chosen, total), sizes: stops(total, Math.min(chosen, total)) });
    const id = "size-" + labels++;
    this.slider = h("input", { id, type: "range", min: 0, max: this.sizes.length - 1, step: 1, class: "size" });
    this.exact = h("input", { type: "number", min: 0, max: total, step: 1, "aria-label": "Number of edges, exactly" });
    const back = h("button", { type: "button", class: "plain" }, chosen > total ? `All shown: ${count(total)}` : `As found: ${count(chosen)}`);
    this.output = h("output", { "aria-live": "polite" });
    this.edges = h("div", {});
    this.graph = new Graph(circuit, { ...look, picked: () => this.listEdges() });
    let waiting = null;
    this.slider.addEventListener("input", () => {
      if (waiting === null) requestAnimationFrame(() => {
        moved(waiting);
        waiting = null;
      });
      waiting = this.sizes[Number(this.slider.value)];
    });
    this.exact.addEventListener("change", () => moved(Math.round(Number(this.exact.value)) || 0));
    back.addEventListener("click", () => this.show(this.chosen));
    this.element = h("div", { class: "circuit" },
      h("div", { class: "slider-row controls" }, h("label", { for: id }, "Edges"), this.slider, this.exact, back),
      h("p", { class: "size-words" }, this.output),
      scroller("The circuit as a graph", this.graph.element),
      this.graph.legend(),
      this.edges,
    );
  }

  show(n) {
    this.n = Math.max(0, Math.min(this.circuit.edges.length, n));
    this.slider.value = String(this.sizes.findLastIndex((size) => size <= this.n));
    this.slider.setAttribute("aria-valuetext", plural(this.n, "edge"));
    this.exact.value = String(this.n);
    this.graph.show(this.n);
    this.output.textContent = `${plural(this.n, "edge")} of ${count(this.circuit.n_edges)} (${percent(this.n / this.circuit.n_edges)})${this.words(this.n)}`;
    this.shown(this.n);
    this.listEdges();
  }

  listEdges() {
    const { node } = this.graph;
    const listed = this.circuit.edges.slice(0, this.n).map((edge, i) => [i, edge]).filter(([, edge]) => !node || edge.source === node || edge.destination === node);
    const first = listed.slice(0, 40);
    const open = this.edges.querySelector("details")?.open || node !== null;
    const of = node ? ` of ${nodeWords(node)}` : "";
    const { scale } = this.circuit;
    const named = scale.startsWith("score") ? scale : `score: ${scale}`;
    this.edges.replaceChildren(
      h("details", { open },
        h("summary", {}, `Edges${of} as a table`),
        h("p", { class: "how" }, `Edges${of} in the order in which they join; ${named}.${first.length < listed.length ? ` The first ${first.length} of ${count(listed.length)}.` : ""}`),
        scroller("Edges", plainTable(["place", "from", "to", "arrives as", named], first.map(([i, edge]) => [String(i + 1), edge.source, edge.destination, portWords[edge.port] || "input", figure3(edge.score)]), { numeric: [true, false, false, false, true] })),
      ),
    );
  }
}
