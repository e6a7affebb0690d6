"""Makes the pictures of README and docs that show the shipped models of the generated stories.

    python docs/pictures.py                 # all of them, two minutes of one core
    python docs/pictures.py views patching  # only these groups

Needs Chromium. Prompts are drawn with seed 0. Each picture is 1,280 pixels wide and light.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")

import sa_lens as sa  # noqa: E402
from sa_lens import circuits, report, views  # noqa: E402
from sa_lens.config import Masks, Stream  # noqa: E402

IMAGES = Path(__file__).parent / "images"
WIDTH = 1280
DENSE, LOCAL = "stories-dense", "stories-local"
STREAMS: tuple[Stream, ...] = ("clean", "ablated")
PROMPT = "One day, Lily and Tom went to the park. {} gave the ball to"
STORY = (
    "It was a cool day. Lily and Tom went to the park. Tom gave a ball to Lily. "
    "Lily was happy because she had the ball."
)
PAIRS = 128
"""Prompt pairs that circuits are found with, and as many others that they are judged on."""
TAU = 0.01
"""ACDC's threshold, nats."""


class Camera:
    """A browser that photographs pages."""

    def __init__(self, chromium: Any, folder: Path) -> None:
        self.chromium, self.folder = chromium, folder

    @contextmanager
    def page(self, file: Path, height: int, ready: str) -> Iterator[Any]:
        """A file in a window of the pictures' width, once the element `ready` is there."""
        page = self.chromium.new_page(viewport={"width": WIDTH, "height": height})
        page.goto(file.resolve().as_uri())
        page.wait_for_selector(ready)
        yield page
        page.close()

    def text(self, name: str, record: Any, *, click: str = "") -> None:
        """Photographs the page of a text or table, after a click on a word of it."""
        with self.page(views.save(record, self.folder / f"{name}.html"), 100, "body") as page:
            if click:
                page.get_by_text(click, exact=True).click()
            box = page.locator(".sa-lens").bounding_box()
            shown = {"x": 0, "y": 0, "width": WIDTH, "height": box["y"] + box["height"] + 20}
            page.screenshot(path=IMAGES / f"{name}.png", full_page=True, clip=shown)

    def figure(self, name: str, shown: Any, *, height: int, cut: bool = False) -> None:
        """Photographs a plotly figure, drawn at that height in pixels or cut there."""
        figure = views.draw(shown)
        figure.update_layout(width=WIDTH - 20, height=figure.layout.height if cut else height)
        with self.page(views.save(figure, self.folder / f"{name}.html"), height, ".main-svg") as page:
            page.screenshot(path=IMAGES / f"{name}.png")


def patching(camera: Camera, dense: Any, local: Any) -> None:
    """Residual streams patched from one prompt into another, in both streams."""
    pair = circuits.PromptPairs.from_texts(
        [(PROMPT.format("Tom"), PROMPT.format("Lily"), " Lily", " Tom")], local.tokenizer
    )
    tables = [circuits.patch(local, pair, "resid_pre", stream=stream, progress=False) for stream in STREAMS]
    records = [views.patch_map(table, "value") for table in tables]
    figure = views.side_by_side(records, "Which residual stream says who gets the ball?", names=STREAMS)
    camera.figure("patching", figure, height=420)


def text_views(camera: Camera, dense: Any, local: Any) -> None:
    """One text in the first views of the page about them."""
    raster = views.gate_raster(local, STORY)
    neurons = [unit for unit in raster.units if unit.site == "mlp"]
    strongest = max(neurons, key=lambda unit: max(map(abs, unit.values)))
    camera.text("view-story", views.story(local, STORY, [strongest.name]), click="ablated minus clean loss")
    camera.text("view-predictions", views.predictions(local, STORY[: STORY.index(" went")], top=4))
    camera.figure("view-lens", views.logit_lens(local, STORY[: STORY.index(" park")]), height=600)
    camera.text("view-attention", views.attention(local, PROMPT.format("Tom")))
    camera.figure("view-raster", raster, height=900, cut=True)


def task_circuits(camera: Camera, dense: Any, local: Any) -> None:
    """Circuits of indirect objects in three streams, and how much of the effect circuits of each size carry."""
    prompts = circuits.tasks.ioi(local.tokenizer, 2 * PAIRS, seed=0, words="stories", name_pairs="held-out")
    find, judge = prompts.split(seed=0)
    drawn, curves = {}, {}
    for name, model, stream in (
        ("dense", dense, "clean"),
        ("self-ablating", local, "clean"),
        ("self-ablating", local, "ablated"),
    ):
        masks: Masks | None = "live" if stream == "ablated" else None
        exp = circuits.Experiment(model, find, stream=stream, masks=masks)
        drawn[f"{name}, {stream} stream"] = circuits.acdc(exp, TAU, progress=False).circuit
        curve = circuits.faithfulness(exp.on(judge), circuits.eap_ig(exp, progress=False), progress=False)
        curves[f"{name}, {stream}"] = curve.table().query("order == 'absolute'").drop(columns=["order", "stream"])
    page = views.side_by_side(list(drawn.values()), f"ACDC at tau {TAU}: IOI", names=list(drawn))
    camera.text("circuits-stories", page)
    chart = views.faithfulness_chart(curves, title="Edges needed: IOI, ranked by EAP-IG")
    camera.figure("faithfulness-stories", chart, height=620)


def report_pages(camera: Camera, dense: Any, local: Any) -> None:
    """Three sections of the report that `sa-lens demo` writes."""
    made = report.make_report(
        [LOCAL, DENSE], title="The shipped models of the generated stories", n_units=48, progress=False
    )
    photograph_report(camera, report.save(made, camera.folder / "report.html"))


def photograph_report(camera: Camera, file: Path) -> None:
    """Photographs a story at a token before a receiver, the circuits, and the units of the ablated stream."""
    with camera.page(file, 900, "html[data-complete]") as page:

        def show(section: str, height: int) -> Any:
            page.set_viewport_size({"width": WIDTH, "height": height})
            page.evaluate("address => { location.hash = address }", section)
            shown = page.locator(f"#section-{section}[data-drawn]:not(.off)")
            shown.wait_for()
            return shown

        def take(section: str) -> None:
            page.mouse.move(0, 0)
            page.evaluate("scrollTo(0, 0)")
            page.screenshot(path=IMAGES / f"report-{section}.png")

        stories = show("stories", 900)
        stories.get_by_label("Search stories").fill("gave it to")
        stories.locator(".story-list [role=option]").first.click()
        tokens = stories.locator("[data-token]")
        words = [word.strip() for word in tokens.all_text_contents()]
        tokens.nth(next(i for i in range(len(words)) if words[i - 2 : i + 1] == ["gave", "it", "to"])).click()
        take("stories")
        show("circuits", 1330)
        take("circuits")
        show("units", 900).get_by_label("Stream").select_option("ablated")
        take("units")


GROUPS = {"patching": patching, "views": text_views, "circuits": task_circuits, "report": report_pages}


def main() -> None:
    """Makes the groups of pictures that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], default=list(GROUPS), metavar="|".join(GROUPS))
    chosen = parser.parse_args().groups
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        parser.error("the pictures are photographs of pages: install Chromium")
    from playwright.sync_api import sync_playwright

    torch.set_num_threads(1)
    dense, local = (sa.SelfAblatingTransformer.from_pretrained(name).requires_grad_(False) for name in (DENSE, LOCAL))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for name in chosen:
            GROUPS[name](Camera(chromium, Path(folder)), dense, local)
            print("made:", name)
        chromium.close()


if __name__ == "__main__":
    main()
