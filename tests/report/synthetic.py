"""A report made by hand: two models, one with gates and one without, and a story full of markup."""

from __future__ import annotations

import math
import random

from sa_lens.report.contents import (
    Fact,
    Looks,
    ModelPage,
    Overview,
    Ranking,
    Report,
    Sample,
    Snippet,
    StoryPage,
    TaskPage,
    UnitPage,
    UnitStream,
)
from sa_lens.views.records import (
    CircuitEdge,
    CircuitMap,
    Curves,
    GateRaster,
    Guess,
    Histogram,
    Level,
    Line,
    LiveUnit,
    Predictions,
    Series,
    Story,
    StreamPredictions,
    Table,
    Track,
)

EVIL = (
    "<|end|>", "<script>", "document.title='owned'", "</script>", "<img src=x onerror=alert(1)>", '"', "'", "&lt;", "`",
    "\n", " ", "\t", "", "😀", " שלום", " עולם", " مرحبا", "\ud83d", "${x}", " --", "<b>", "\u202e", "<0xE2>", "end",
)  # fmt: skip
"""Tokens that a careless page would take for markup or break on."""
CALM = "<|end|> Once upon a time there was a cat . The cat saw Tom and Anna .\n Tom gave the ball to Anna ."
N_LAYERS, N_HEADS = 3, 4


def story_tokens() -> list[tuple[str, ...]]:
    words = CALM.replace("\n", " \n ").split(" ")
    calm = [word if i == 0 or word == "\n" else " " + word for i, word in enumerate(words)]
    return [tuple(calm), EVIL, (*calm[:12], " zebra", *calm[12:])]


def unit_names() -> list[tuple[str, int, str, int]]:
    found = []
    for layer in range(N_LAYERS):
        found += [(f"L{layer}.attn.{i}", layer, "attn", i) for i in range(16)]
        found += [(f"L{layer}.mlp.{i}", layer, "mlp", i) for i in range(40)]
    return found


def unit_streams(rng: random.Random, streams: tuple[str, ...], place: int) -> tuple[UnitStream, ...]:
    found = []
    for stream in streams:
        explained = place % 3 == 0
        looked = place % 2 == 0
        tokens = tuple(story_tokens()[0][:14]) if place else EVIL[:14]
        snippets = tuple(
            Snippet(
                tokens,
                tuple(round(rng.gauss(0, 1), 6) if rng.random() < 0.5 else 0.0 for _ in tokens),
                5,
                "top" if i < 3 else "sample",
            )
            for i in range(5)
        )
        counts = tuple(int(500 * math.exp(-abs(i - 6) / 2)) for i in range(20))
        found.append(
            UnitStream(
                stream=stream,
                mask_on=round(rng.random(), 4) if stream == "ablated" else None,
                firing_rate=round(rng.random() ** 3, 5),
                live=stream == "clean" or place % 7 != 3,
                effective_tokens=round(1 + 60 * rng.random(), 3) if place % 5 else None,
                label=("name", "verb", "<em>")[place % 3] if place % 4 == 0 else "",
                label_f1=round(rng.random(), 3) if place % 4 == 0 else None,
                explanation=("<img src=x onerror=alert(2)>" if place == 0 else f"fires on word {place}")
                if explained
                else "",
                explanation_f1=round(rng.random(), 3) if explained else None,
                histogram=Histogram(
                    "Values",
                    "2,000 tokens",
                    "value of the unit",
                    tuple(i / 10 for i in range(21)),
                    (Series(stream, counts),),
                )
                if looked
                else None,
                snippets=snippets if looked else (),
            )
        )
    return tuple(found)


def story_page(rng: random.Random, tokens: tuple[str, ...], streams: tuple[str, ...]) -> StoryPage:
    n = len(tokens)
    title = "".join(tokens[1:6]).strip()
    top = {}
    for stream in streams:
        rows = []
        for at in range(n):
            guesses = [tokens[(at + 1) % n], " the", " a", "<b>bold</b>", "\n"]
            rng.shuffle(guesses)
            rows.append(tuple(Guess(token, -0.4 - 0.9 * i - rng.random() / 4) for i, token in enumerate(guesses[:4])))
        top[stream] = tuple(rows)
    losses = {stream: (None, *(round(5 * rng.random(), 4) for _ in range(n - 1))) for stream in streams}
    tracks = [Track(f"loss, {stream}", "nats", losses[stream]) for stream in streams]
    gates = None
    if "ablated" in streams:
        difference = tuple(
            None if a is None else a - c for a, c in zip(losses["ablated"], losses["clean"], strict=True)
        )
        tracks.append(Track("ablated minus clean loss", "nats", difference, "diverging"))
        tracks.append(Track("L1.mlp.3, clean", "value", tuple(rng.gauss(0, 1) for _ in range(n)), "diverging"))
        live = []
        for name, layer, site, index in unit_names():
            positions = tuple(at for at in range(n) if (at * 7 + index * 3 + layer) % 4 == 0)
            values = tuple(round(rng.gauss(0, 1), 4) for _ in positions)
            if positions:
                live.append(LiveUnit(name, layer, site, (" the", "<i>"), positions, values))
        gates = GateRaster("Units that stay", "some of all", tokens, tuple(live), "value, ablated stream")
    looks = []
    for stream in streams:
        for layer in range(N_LAYERS):
            for head in range(N_HEADS):
                places = [sorted({rng.randrange(at + 1) for _ in range(3)}, reverse=True) for at in range(n)]
                shares = [tuple(0.6 / (i + 1) for i in range(len(row))) for row in places]
                looks.append(Looks(stream, layer, head, tuple(map(tuple, places)), tuple(shares)))
    return StoryPage(
        title=title,
        tokens=tokens,
        tracks=Story("A story", f"{n} tokens; the loss at a token is that of predicting it", tokens, tuple(tracks)),
        predictions=Predictions(
            "Predictions",
            "log-probabilities in nats",
            tokens,
            tuple(
                StreamPredictions(stream, top[stream], (*(-rng.random() for _ in range(n - 1)), None))
                for stream in streams
            ),
        ),
        gates=gates,
        looks=tuple(looks),
    )


def ranking(rng: random.Random, method: str, stream: str) -> Ranking:
    nodes = ["embed"]
    for layer in range(N_LAYERS):
        nodes += [f"a{layer}.h{head}" for head in range(N_HEADS)] + [f"m{layer}"]
    nodes.append("logits")
    edges = []
    for i, source in enumerate(nodes):
        for destination in nodes[i + 1 :]:
            if ".h" in destination and destination[:2] == source[:2]:
                continue
            for port in ("q", "k", "v") if ".h" in destination else ("",):
                edges.append((rng.gauss(0, 1) ** 3, source, destination, port))
    edges.sort(key=lambda edge: -abs(edge[0]))
    ordered = tuple(CircuitEdge(source, destination, port, score) for score, source, destination, port in edges)
    sizes = [1, 2, 5, 10, 20, 50, 100, len(ordered)]
    y = tuple(1 - math.exp(-size / 30) for size in sizes)
    curve = Curves(
        "Faithfulness by size",
        "64 pairs",
        "edges in the circuit",
        "faithfulness f (1: as the full model)",
        (Line(method, stream, tuple(map(float, sizes)), y, tuple(v - 0.05 for v in y), tuple(v + 0.05 for v in y)),),
        "log",
        (Level(1.0, "full model"),),
    )
    note = "tau 0.01, 64 pairs; L1.mlp.3 matters"
    circuit = CircuitMap(method, note, N_LAYERS, N_HEADS, False, 300, ordered, "fall of KL, nats")
    return Ranking(method, stream, circuit, 24, curve)


def model_page(name: str, streams: tuple[str, ...], seed: int) -> ModelPage:
    rng = random.Random(seed)
    skill = Table(
        "Skill",
        "64 pairs",
        ("stream", "pair accuracy", "top-1 accuracy", "logit difference"),
        tuple((stream, "0.98 (0.95 to 1)", "0.91", "3.2") for stream in streams),
        (False, True, True, True),
    )
    methods = [("ACDC", stream) for stream in streams] + [("EAP-IG", stream) for stream in streams]
    return ModelPage(
        name=name,
        streams=streams,
        overview=Overview(
            facts=(Fact("layers", "3", "blocks of attention and MLP"), Fact("text", "<b>stories</b>", "")),
            losses=Table(
                "Losses",
                "on 20,000 tokens of validation text",
                ("stream", "loss, nats", "perplexity", "bits per byte"),
                tuple((stream, "2.31", "10.1", "0.91") for stream in streams),
                (False, True, True, True),
            ),
            samples=tuple(
                Sample(prompt, stream, " there was a cat <script>alert(3)</script> and it sat.")
                for prompt in ("Once upon a time", "Tom and Anna")
                for stream in streams
            ),
        ),
        stories=tuple(story_page(rng, tokens, streams) for tokens in story_tokens()),
        tasks=(
            TaskPage("IOI", "Tom and Anna ... gave to: Anna", skill,
                     tuple(ranking(rng, *one) for one in methods), ""),
            TaskPage("Pronoun gender", "Anna said that: she", skill,
                     (ranking(rng, "ACDC", "clean"),), "No circuit, as the ablated stream cannot do this task."),
        ),
        units=tuple(
            UnitPage(unit, layer, site, index, (" cat", "</td>"), unit_streams(rng, streams, place))
            for place, (unit, layer, site, index) in enumerate(unit_names())
        ),
        units_note="Read on 20,000 tokens; all 168 of 168 units are shown.",
    )  # fmt: skip


def training(models: dict[str, tuple[str, ...]]) -> Curves:
    steps = tuple(float(100 * i) for i in range(1, 21))
    losses = tuple(2 + 3 / (1 + step / 300) for step in steps)
    lines = tuple(Line(name, stream, steps, losses) for name, streams in models.items() for stream in streams)
    return Curves("Loss while training", "on the validation text", "optimizer steps", "loss, nats per token", lines)


def report() -> Report:
    return Report(
        title="Two models <b>&amp;</b> a script",
        version="0.0.test",
        models=(model_page("gated/one", ("clean", "ablated"), 1), model_page("plain", ("clean",), 2)),
        training=training({"gated/one": ("clean", "ablated"), "plain": ("clean",)}),
        comparison=(
            Table("Side by side", "on the same text", ("figure", "gated/one", "plain"),
                  (("loss, nats", "2.31", "2.25"), ("a unit", "L1.mlp.3", "none")), (False, True, True)),
        ),
    )  # fmt: skip


def single_report() -> Report:
    whole = report()
    return Report("One model", whole.version, whole.models[:1], training({"gated/one": ("clean",)}), ())
