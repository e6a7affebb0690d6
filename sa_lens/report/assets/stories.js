// The story explorer: a story in colours, and what happens at one of its tokens.

const explorer = { model: 0, story: 0, token: null, track: null, head: null, query: "", all: new Set(), parts: null, data: null };

async function drawStories(into) {
  const list = h("div", { class: "story-list", role: "listbox", "aria-label": "Stories", tabindex: "-1" });
  const state = h("p", { class: "note", role: "status" });
  const text = h("div", { class: "story-text" });
  const details = h("div", { class: "story-details", role: "region", tabindex: "0", "aria-label": "The chosen token" });
  const chooser = modelPicker("Model", explorer.model, (model) => openStory({ model }));
  chooser?.setAttribute("data-role", "story-model");
  explorer.parts = { list, state, text, details, chooser: chooser?.querySelector("select") };
  into.append(
    h("p", { class: "how" }, "A story opens at the token after which the streams disagree most. Choose another: click it, or move with the arrow keys. What happens at that token is shown beside the story, or below it on a narrow screen."),
    h("div", { class: "bar-of-controls controls" },
      chooser,
      searchBox("Search stories", "a word of the story", (value) => {
        explorer.query = value;
        listStories();
      }),
    ),
    h("div", { class: "explorer" }, h("div", {}, h("div", { class: "controls" }, list, state), text), details),
  );
  list.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const options = [...list.children];
    const at = options.indexOf(event.target.closest("[role=option]"));
    if (!step || at < 0) return;
    event.preventDefault();
    options[Math.max(0, Math.min(options.length - 1, at + step))].focus();
  });
  themed.add(() => {
    if (explorer.data) colourStory();
  });
  await openStory({});
}

async function openStory(change) {
  const before = explorer.story;
  Object.assign(explorer, change);
  if (!explorer.parts) return;
  const stories = await storiesOfModel(explorer.model);
  const { chooser } = explorer.parts;
  if (chooser) chooser.value = String(explorer.model);
  if (!stories.length) {
    explorer.parts.text.replaceChildren(h("p", { class: "note" }, "This report holds no stories."));
    return;
  }
  explorer.story = Math.max(0, Math.min(stories.length - 1, explorer.story));
  explorer.data = stories[explorer.story];
  if (before !== explorer.story && !("token" in change)) explorer.token = null;
  const n = explorer.data.tokens.length;
  explorer.token = explorer.token === null ? tellingToken(explorer.data) : Math.max(0, Math.min(n - 1, explorer.token));
  if (explorer.head && !explorer.data.looks.some((looks) => headName(looks) === explorer.head)) explorer.head = null;
  listStories();
  showStory();
}

// The difference of the streams' losses; the loss of a model with one stream.
const lossTrack = ({ tracks }) => tracks.find((track) => track.scale === "nats" && track.colours === "diverging") ?? tracks.find((track) => track.scale === "nats");
const shownTrack = (data) => data.tracks.find((track) => track.name === explorer.track) ?? lossTrack(data) ?? data.tracks[0];

// The token after which the streams disagree most about what comes next; with one stream, the one before the largest loss.
function tellingToken(data) {
  const sizes = (lossTrack(data)?.values ?? []).map((value) => Math.abs(value ?? 0));
  return Math.max(0, sizes.indexOf(Math.max(...sizes)) - 1);
}

const storyAddress = (model, story, token) => `#stories/${encodeURIComponent(report.models[model].name)}/${story + 1}/${token}`;

function listStories() {
  const { list, state } = explorer.parts;
  const query = explorer.query.trim().toLowerCase();
  storiesOfModel(explorer.model).then((stories) => {
    const matching = stories.map((_, i) => i).filter((i) => !query || (stories[i].title + "\n" + wholeText(stories[i].tokens)).toLowerCase().includes(query));
    const focused = list.contains(document.activeElement);
    list.replaceChildren(
      ...matching.map((i) => {
        const chosen = i === explorer.story;
        const tabindex = chosen || (i === matching[0] && !matching.includes(explorer.story)) ? "0" : "-1";
        return h("div", { role: "option", tabindex, "aria-selected": String(chosen), ...pressable(() => openStory({ story: i })) },
          h("span", { class: "faint" }, `${i + 1} `),
          h("bdi", {}, stories[i].title),
        );
      }),
    );
    if (focused) list.querySelector("[aria-selected=true]")?.focus();
    state.textContent = query ? `${matching.length} of ${plural(stories.length, "story").replace("storys", "stories")} match` : "";
  });
}

// ---------------------------------------------------------------------------------------------------- the story

function showStory() {
  const { text } = explorer.parts;
  const { data } = explorer;
  const tokens = h("div", { class: "tokens", role: "listbox", "aria-label": "Tokens of the story", "aria-orientation": "horizontal" });
  data.tokens.forEach((token, i) => tokens.append(...runningToken(token, { role: "option", "data-token": i, tabindex: "-1", "aria-selected": "false" })));
  explorer.tokens = [...tokens.querySelectorAll("[data-token]")];
  tokens.addEventListener("click", (event) => {
    const token = event.target.closest("[data-token]");
    if (token) chooseToken(Number(token.dataset.token), true);
  });
  tokens.addEventListener("keydown", moveToken);
  explorer.legend = h("div", { class: "legends" });
  refill(
    text,
    h("h3", {}, h("bdi", {}, data.title)),
    data.tracks.length ? picker("Colour by", data.tracks.map((track) => [track.name, track.name]), shownTrack(data).name, colourBy) : null,
    explorer.legend,
    h("p", { class: "how" }, `Each token in the colour of ${data.tracks.length ? "the chosen number" : "nothing: this story has no numbers"}; tokens without a number have no colour. ${sentence(data.note)}`),
    tokens,
  );
  colourStory();
  chooseToken(explorer.token, false);
  revealToken();
}

function colourBy(track) {
  explorer.track = track;
  colourStory();
}

function colourStory() {
  const track = shownTrack(explorer.data);
  explorer.legend.replaceChildren();
  if (!track) return;
  const scale = scaleOf(track.values, track.colours);
  explorer.tokens.forEach((element, i) => paint(element, scale, track.values[i]));
  explorer.legend.append(h("p", { class: "legend-name" }, linked(explorer.model, track.name)), legend(scale, track.scale));
}

// Arrow keys: along the text, and to the nearest token of the line above or below.
function moveToken(event) {
  const { token, tokens } = explorer;
  const moves = {
    ...{ ArrowRight: () => token + 1, ArrowLeft: () => token - 1, Home: () => 0, End: () => tokens.length - 1 },
    ...{ ArrowDown: () => nextLine(1), ArrowUp: () => nextLine(-1) },
    ...{ Enter: () => tokens.indexOf(document.activeElement), " ": () => tokens.indexOf(document.activeElement) },
  };
  const to = moves[event.key]?.();
  if (to === undefined) return;
  event.preventDefault();
  if (to >= 0 && to < tokens.length) chooseToken(to, true);
}

function nextLine(way) {
  const places = explorer.tokens.map((token) => token.getClientRects()[0] || token.getBoundingClientRect());
  const here = places[explorer.token];
  const middle = (place) => place.left + place.width / 2;
  let best = null;
  places.forEach((place, i) => {
    const down = (place.top - here.top) * way;
    if (down < here.height / 2) return;
    const cost = [Math.round(down / 4), Math.abs(middle(place) - middle(here))];
    if (!best || cost[0] < best.cost[0] || (cost[0] === best.cost[0] && cost[1] < best.cost[1])) best = { i, cost };
  });
  return best ? best.i : explorer.token;
}

function chooseToken(i, byHand) {
  explorer.tokens[explorer.token]?.setAttribute("aria-selected", "false");
  explorer.tokens[explorer.token]?.setAttribute("tabindex", "-1");
  explorer.token = i;
  const element = explorer.tokens[i];
  element.setAttribute("aria-selected", "true");
  element.setAttribute("tabindex", "0");
  explorer.tokens.forEach((token, place) => token.classList.toggle("next", place === i + 1));
  if (byHand) {
    element.focus({ preventScroll: false });
    history.replaceState(null, "", storyAddress(explorer.model, explorer.story, i));
  }
  showToken();
}

// Scrolls the story to the chosen token where it has a window of its own, as on a phone.
function revealToken() {
  const token = explorer.tokens?.[explorer.token];
  const box = token?.parentElement;
  if (box) box.scrollTop += token.getBoundingClientRect().top - box.getBoundingClientRect().top - box.clientHeight / 2;
}

// ------------------------------------------------------------------------------------------------- one of its tokens

function showToken() {
  const { data, token, parts } = explorer;
  const numbers = data.tracks.filter((track) => track.values[token] !== null);
  refill(
    parts.details,
    h("h3", {}, `Token ${token}: `, tokenLabel(data.tokens[token])),
    numbers.length ? h("p", { class: "numbers-of-token" }, numbers.map((track) => h("span", {}, `${track.name} `, h("b", {}, figure3(track.values[token])), h("span", { class: "faint" }, ` ${track.scale}`)))) : null,
    predictionsBlock(data, token),
    data.looks.length ? looksBlock(data, token) : null,
    staysBlock(data, token),
  );
  lightLooks();
}

// Tokens with bars for their shares: of a stream's probability, or of a head's attention.
const shareList = (title, stream, rows) =>
  h("div", { class: "stream" },
    h("h5", {}, title),
    h("ol", { class: "guesses" }, rows.map(({ token, share, tip, right }) => h("li", { class: right ? "right" : null }, tokenLabel(token), bar(share, streamVariable(stream)), h("span", { class: "number", title: tip }, percent(share))))),
  );

function predictionsBlock(data, at) {
  const next = data.tokens[at + 1];
  const streams = data.predictions.map(({ stream, top, actual }) => {
    const guesses = [...top[at]];
    if (next !== undefined && actual[at] !== null && !guesses.some((guess) => guess.token === next)) guesses.push({ token: next, log_probability: actual[at] });
    const loss = actual[at] === null ? "" : `, loss ${figure3(-actual[at])} nats`;
    return shareList(`${stream} stream${loss}`, stream, guesses.map(({ token, log_probability: log }) => ({ token, share: Math.exp(log), tip: `log-probability ${figure3(log)} nats`, right: token === next })));
  });
  return part("What comes next", "Probability of the likeliest next tokens in each stream, per cent; the frame marks the token that actually comes next, which is underlined in the story.", h("div", { class: "streams predictions" }, streams));
}

const part = (title, how, ...content) => h("section", { class: "part" }, h("h4", {}, title), h("p", { class: "how" }, how), ...content);

// ------------------------------------------------------------------------------------------------------------- heads

const headName = (looks) => `${looks.layer}.${looks.head}`;

function looksBlock(data, at) {
  const streams = [...new Set(data.looks.map((looks) => looks.stream))];
  const heads = data.looks.filter((looks) => looks.stream === streams[0]);
  const rows = [...new Set(heads.map((looks) => looks.layer))].map((layer) =>
    h("div", { class: "heads" },
      h("span", { class: "faint" }, `layer ${layer}`),
      heads.filter((looks) => looks.layer === layer).map(({ head }) => {
        const name = `${layer}.${head}`;
        const most = (looks) => attended(looks, at).slice(0, 3).map(({ place, share }) => `${JSON.stringify(data.tokens[place])} ${percent(share)}`).join(", ");
        const tip = streams.map((stream) => `${stream}: ${most(looksOf(data, stream, name))}`).join("\n");
        return h("button", { type: "button", class: "head", "data-head": name, "aria-pressed": String(explorer.head === name), "aria-label": `layer ${layer} head ${head}`, title: tip, onclick: () => chooseHead(name) }, String(head));
      }),
    ),
  );
  return part(
    "Where a head looks",
    "Choose a head: the tokens that it attends to from this token are marked in the story, for the clean stream below them and for the ablated stream above; the bars are shares of its attention.",
    h("div", { class: "controls head-grid", role: "group", "aria-label": "Heads" }, rows),
    h("div", { class: "looks" }, looksLists(data, at, streams)),
  );
}

// The tokens that a head attends to from a token, with its shares of attention, most first.
const attended = (looks, at) =>
  looks.back.map((column, i) => [column[at], looks.percent[i][at]]).filter(([back]) => back !== null).map(([back, percent]) => ({ place: at - back, share: percent / 100 }));

const looksOf = (data, stream, name) => data.looks.find((looks) => looks.stream === stream && headName(looks) === name);

function looksLists(data, at, streams) {
  if (!explorer.head) return h("p", { class: "note" }, "No head is chosen.");
  const rows = (stream) => attended(looksOf(data, stream, explorer.head), at).map(({ place, share }) => ({ token: data.tokens[place], share, tip: `token ${place}` }));
  return h("div", { class: "streams" }, streams.map((stream) => shareList(`head ${explorer.head}, ${stream} stream`, stream, rows(stream))));
}

function chooseHead(name) {
  explorer.head = explorer.head === name ? null : name;
  showToken();
  document.querySelector(`[data-head="${name}"]`)?.focus();
}

// Marks the tokens that the chosen head attends to: clean below, ablated above.
function lightLooks() {
  const { data, token, head, tokens } = explorer;
  const marks = tokens.map(() => []);
  if (head) {
    for (const looks of data.looks) {
      if (headName(looks) !== head) continue;
      const edge = looks.stream === "ablated" ? "0 -3px 0 0" : "0 3px 0 0";
      attended(looks, token).forEach(({ place, share }) => {
        const strength = Math.round(100 * Math.sqrt(share));
        if (strength >= 10) marks[place].push(`${edge} color-mix(in srgb, ${streamVariable(looks.stream)} ${strength}%, transparent)`);
      });
    }
  }
  tokens.forEach((element, i) => {
    element.classList.toggle("looked-at", marks[i].length > 0);
    if (marks[i].length) element.style.setProperty("box-shadow", marks[i].join(", "));
    else element.style.removeProperty("box-shadow");
  });
}

// ------------------------------------------------------------------------------------------------------------- units

const FEW = 5;

// For each token of a story the units that stay there, found once a story.
function staysAt(data, at) {
  if (!data.stays) {
    data.stays = data.tokens.map(() => []);
    for (const unit of data.gates.units) unit.positions.forEach((place, i) => data.stays[place].push({ unit, value: unit.values[i] }));
  }
  return data.stays[at];
}

function staysBlock(data, at) {
  if (!data.gates) return part("Units that stay", "This model has no gates: every unit takes part at every token.");
  const groups = new Map();
  for (const one of staysAt(data, at)) {
    const key = `layer ${one.unit.layer}, ${one.unit.site === "mlp" ? "neurons" : "attention units"}`;
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(one);
  }
  const blocks = [...groups].map(([key, members]) => {
    members.sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
    const whole = explorer.all.has(key);
    const most = Math.abs(members[0].value) || 1;
    const rest = members.length - FEW;
    return h("div", { class: "layer-units" },
      h("h5", {}, `${key}: ${members.length} ${data.gates.left_out ? "of those shown " : ""}stay`),
      h("ul", {}, (whole ? members : members.slice(0, FEW)).map((one) => unitRow(one, most))),
      rest > 0
        ? h("button", { type: "button", class: "plain controls", "aria-expanded": String(whole), onclick: () => {
            if (whole) explorer.all.delete(key);
            else explorer.all.add(key);
            showToken();
            [...document.querySelectorAll(".layer-units")].find((block) => block.firstChild.textContent.startsWith(key))?.querySelector("button")?.focus();
          } }, whole ? `Only the largest ${FEW}` : `${rest} more`)
        : null,
    );
  });
  const some = data.gates.left_out ? ` Shown are the ${count(data.gates.units.length)} units that add most to the story; ${count(data.gates.left_out)} more stay at one token or another.` : "";
  return part("Units that stay", `Units that the gates keep at this token, the largest values first (${data.gates.scale}).${some} What a unit fires on follows the tokens that it promotes, and its name leads to its page.`, h("div", { class: "stays" }, blocks.length ? blocks : h("p", { class: "note" }, "No unit stays at this token.")));
}

function unitRow({ unit, value }, most) {
  const words = unit.name.replace(/^L\d+\./, "");
  const known = unitPlaces[explorer.model].get(unit.name);
  const explanation = known === undefined ? "" : explanationOf(report.models[explorer.model].units[known]);
  return h("li", {},
    unitLink(explorer.model, unit.name, words),
    h("span", { class: "bar", "aria-hidden": "true" }, h("i", { style: { width: `${(100 * Math.abs(value)) / most}%`, background: value < 0 ? "var(--negative)" : "var(--positive)" } })),
    h("span", { class: "number" }, figure3(value)),
    h("span", { class: "about" }, unit.promotes.length ? ["promotes ", chips(unit.promotes)] : null, explanation ? [" · ", explanation] : null),
  );
}

// What a unit stands for, in the stream of which most is known.
function explanationOf(unit) {
  const streams = [...unit.streams].reverse();
  const explained = streams.find((one) => one.explanation) || streams.find((one) => one.label);
  return explained ? explained.explanation || explained.label : "";
}
