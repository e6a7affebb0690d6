// Attention of heads: small pictures of each, one row for each stream and one for their difference, and the chosen head
// at large with its tokens.

// shares: for each head and stream, rows of whole thousandths, each up to its own token.
function attentionHeads({ tokens, heads, streams, shares, scales }) {
  const n = tokens.length;
  const rows = streams.length === 2 ? [...streams, "difference"] : streams;
  const share = (head, row, query, key) =>
    (row < streams.length ? shares[head][row][query][key] : shares[head][1][query][key] - shares[head][0][query][key]) / 1000;
  const each = (visit) => {
    for (let query = 0; query < n; query++) for (let key = 0; key <= query; key++) visit(query, key);
  };
  // half the sum of absolute differences: the share of attention that goes elsewhere, mean over tokens
  const moved = heads.map((_, head) => {
    let sum = 0;
    if (rows.length === 3) each((query, key) => (sum += Math.abs(share(head, 2, query, key)) / 2));
    return sum / n;
  });
  let most = 0;
  if (rows.length === 3) heads.forEach((_, head) => each((query, key) => (most = Math.max(most, Math.abs(share(head, 2, query, key))))));
  most = most || 1;
  const colour = (row, value) => {
    const steps = row < streams.length ? scales.sequential : scales.diverging;
    const place = row < streams.length ? value : 0.5 + value / most / 2;
    return steps[Math.round(Math.min(1, Math.max(0, place)) * (steps.length - 1))];
  };

  // A pattern as a picture of one pixel for each pair of tokens.
  function picture(head, row) {
    const canvas = h("canvas", { width: n, height: n });
    const paper = canvas.getContext("2d");
    each((query, key) => {
      paper.fillStyle = colour(row, share(head, row, query, key));
      paper.fillRect(key, query, 1, 1);
    });
    return canvas;
  }

  const pictures = heads.map((_, head) => rows.map((_, row) => picture(head, row)));
  const readout = h("p", { class: "readout", role: "status" });
  const name = h("h4", {});
  let chosen = moved.indexOf(Math.max(...moved));
  const large = rows.map((title, row) => new LargePattern(title, tokens, (cell) => say(chosen, cell)));

  function say(head, cell) {
    large.forEach((pattern) => pattern.mark(head === chosen ? cell : null));
    if (!cell) {
      readout.textContent = "Point at a picture to read its values; click a head to see it at large.";
      return;
    }
    const values = rows.map((title, row) => `${title} ${share(head, row, cell.query, cell.key).toFixed(3)}`);
    readout.textContent = `Head ${heads[head]}, “${tokens[cell.query]}” (${cell.query}) looks at “${tokens[cell.key]}” (${cell.key}): ${values.join(", ")}`;
  }

  function cellOf(event, canvas) {
    const box = canvas.getBoundingClientRect();
    const key = Math.floor(((event.clientX - box.left) / box.width) * n);
    const query = Math.floor(((event.clientY - box.top) / box.height) * n);
    return key >= 0 && key <= query && query < n ? { query, key } : null;
  }

  const cards = heads.map((title, head) => {
    const canvases = pictures[head].map((canvas) => {
      for (const name of ["pointermove", "pointerdown"]) canvas.addEventListener(name, (event) => say(head, cellOf(event, canvas)));
      canvas.addEventListener("pointerleave", () => say(head, null));
      return canvas;
    });
    const about = rows.length === 3 ? `, ${percent(moved[head])} moved` : "";
    const caption = h("span", { class: "head-name" }, h("b", {}, title), h("small", {}, about.slice(2)));
    return h("button", { type: "button", class: "head-card", "data-head": title, "aria-pressed": "false", "aria-label": `Head ${title}${about}`, onclick: () => choose(head) },
      caption,
      rows.map((row, i) => h("span", { class: "head-row" }, h("small", {}, row), canvases[i])),
    );
  });

  function choose(head) {
    chosen = head;
    cards.forEach((card, i) => card.setAttribute("aria-pressed", String(i === head)));
    name.textContent = `Head ${heads[head]}`;
    large.forEach((pattern, row) => pattern.show(pictures[head][row]));
    say(head, null);
  }

  const bar = (kind, low, high, about) =>
    h("span", { class: "legend" }, low, h("i", { style: { background: `linear-gradient(to right, ${scales[kind].join(", ")})` } }), high, h("small", {}, about));
  const element = h("div", { class: "attention" },
    h("div", { class: "legends" },
      bar("sequential", "0", "1", "share of attention"),
      rows.length === 3 ? bar("diverging", (-most).toFixed(2), `+${most.toFixed(2)}`, "difference, ablated minus clean") : null,
    ),
    readout,
    name,
    h("div", { class: "large" }, large.map((pattern) => pattern.element)),
    heads.length > 1 ? [h("h4", {}, `${heads.length} heads`), h("div", { class: heads.length > 8 ? "head-cards many" : "head-cards" }, cards)] : null,
  );
  choose(chosen);
  return element;
}

// Room for half a letter above the first row.
const TOP = 6;

// A pattern with its tokens: queries downward, keys to the right.
class LargePattern {
  constructor(title, tokens, over) {
    Object.assign(this, { tokens, cell: null });
    this.canvas = h("canvas", { role: "img", "aria-label": title });
    this.element = h("figure", {}, h("figcaption", {}, title), this.canvas);
    for (const name of ["pointermove", "pointerdown"]) this.canvas.addEventListener(name, (event) => over(this.cellAt(event)));
    this.canvas.addEventListener("pointerleave", () => over(null));
    new ResizeObserver(() => this.draw()).observe(this.element);
  }

  show(picture) {
    this.picture = picture;
    this.draw();
  }

  mark(cell) {
    this.cell = cell;
    this.draw();
  }

  cellAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const [key, query] = [event.clientX - box.left - this.left, event.clientY - box.top - TOP].map((x) => Math.floor(x / this.size));
    return key >= 0 && key <= query && query < this.tokens.length ? { query, key } : null;
  }

  draw() {
    const width = this.element.clientWidth;
    if (!width) return;
    const n = this.tokens.length;
    const style = getComputedStyle(this.element);
    const paper = this.canvas.getContext("2d");
    const font = `11px ${style.fontFamily}`;
    paper.font = font;
    const widest = Math.min(80, Math.max(...this.tokens.map((token) => paper.measureText(token).width)));
    this.left = widest + 6;
    this.size = (width - this.left - 2) / n;
    const side = this.size * n;
    const ratio = window.devicePixelRatio || 1;
    Object.assign(this.canvas, { width: Math.round(width * ratio), height: Math.round((TOP + side + widest + 8) * ratio) });
    Object.assign(this.canvas.style, { width: `${width}px`, height: `${TOP + side + widest + 8}px` });
    paper.scale(ratio, ratio);
    paper.translate(0, TOP);
    paper.imageSmoothingEnabled = false;
    paper.drawImage(this.picture, this.left, 0, side, side);
    paper.strokeStyle = style.getPropertyValue("--grid");
    paper.strokeRect(this.left, 0.5, side, side - 1);
    // as many labels as have room, the marked ones always
    const step = Math.ceil(12 / this.size);
    paper.font = font;
    paper.textBaseline = "middle";
    paper.textAlign = "right";
    this.tokens.forEach((token, i) => {
      const middle = (i + 0.5) * this.size;
      const near = (place) => place !== undefined && place !== i && Math.abs(place - i) < step;
      const label = (marked, place, draw) => {
        if (i % step && !marked || near(place)) return;
        paper.fillStyle = style.getPropertyValue(marked ? "--positive" : "--text");
        paper.save();
        draw();
        paper.fillText(token, 0, 0, widest);
        paper.restore();
      };
      label(this.cell?.query === i, this.cell?.query, () => paper.translate(this.left - 4, middle));
      label(this.cell?.key === i, this.cell?.key, () => {
        paper.translate(this.left + middle, side + 4);
        paper.rotate(-Math.PI / 2);
      });
    });
    if (this.cell) {
      paper.lineWidth = 2;
      paper.strokeStyle = style.getPropertyValue("--text");
      paper.strokeRect(this.left + this.cell.key * this.size, this.cell.query * this.size, this.size, this.size);
    }
  }
}
