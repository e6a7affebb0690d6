// Circuits next to one another, each with its slider; a single one takes the whole width.

function circuitPanels({ panels }) {
  const beside = panels.map(({ content }) => content);
  let together = true;
  const views = beside.map((circuit) => {
    const moved = (n) => {
      for (const other of together ? views : [view]) other.show(n);
    };
    const view = new CircuitView(circuit, { chosen: circuit.edges.length, beside, wide: panels.length === 1 && window.innerWidth > 700, moved });
    view.show(view.chosen);
    return view;
  });
  return h("div", { class: "circuits" },
    h("p", { class: "note" }, HOW_TO_READ),
    panels.length > 1 ? tick("All sliders together", true, (on) => (together = on)) : null,
    h("div", { class: "circuits-columns" },
      panels.map(({ name, note, warnings }, i) => h("section", {},
        name ? h("h4", {}, name) : null,
        warningsOf({ warnings }),
        note ? h("p", { class: "note" }, note) : null,
        views[i].element,
      )),
    ),
  );
}
