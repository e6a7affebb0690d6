"""Makes the pictures of README and docs that show the shipped models of the generated stories.

    python docs/pictures.py                   # all of them, four minutes of one core
    python docs/pictures.py gallery patching  # only these groups

Needs Chromium, and SAELens for the recipes. Prompts are drawn with seed 0. Pictures are light. Those of the gallery and
of the recipes show what the code of these pages saves, the others are 1,280 pixels wide.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import torch

warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")

import sa_lens as sa  # noqa: E402
from sa_lens import circuits, report, views  # noqa: E402
from sa_lens.config import Masks, Stream  # noqa: E402

DOCS = Path(__file__).parent
IMAGES = DOCS / "images"
WIDTH = 1280
PAGE_WIDTH = 900
"""Pixels of the window in which pages of texts and tables are saved by the code of a page."""
EDGE, TALLEST = 10, 760
"""Pixels around such a picture, and its largest height: a longer one is cut."""
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^```bash\n(sa-lens patch .*?)^```$", re.MULTILINE | re.DOTALL)
PICTURE = re.compile(r"^!\[[^\]]*\]\((?:\.\./)?images/(\w+/[\w-]+)\.png\)$", re.MULTILINE)
DENSE, LOCAL = "stories-dense", "stories-local"
STREAMS: tuple[Stream, ...] = ("clean", "ablated")
PROMPT = "One day, Lily and Tom went to the park. {} gave the ball to"
PAIRS = 128
"""Prompt pairs that circuits are found with, and as many others that they are judged on."""
TAU = 0.01
"""ACDC's threshold, nats."""


class Camera:
    """A browser that photographs pages."""

    def __init__(self, chromium: Any, folder: Path) -> None:
        self.chromium, self.folder = chromium, folder

    @contextmanager
    def page(self, file: Path, height: int, ready: str, width: int = WIDTH) -> Iterator[Any]:
        """A file in a window, once the element `ready` is there."""
        page = self.chromium.new_page(viewport={"width": width, "height": height})
        page.goto(file.resolve().as_uri())
        page.wait_for_selector(ready)
        yield page
        page.close()

    def saved(self, name: str, file: Path, width: int = PAGE_WIDTH) -> None:
        """Photographs a view as the code of a page saved it."""
        with self.page(file, 100, ".main-svg, .sa-lens", width) as page:
            page.wait_for_timeout(500)  # the scripts of a view have drawn it
            box = page.locator(".main-svg, .sa-lens").first.bounding_box()
            left, top = max(0, box["x"] - EDGE), max(0, box["y"] - EDGE)
            size = {"width": box["width"] + 2 * EDGE, "height": min(TALLEST, box["height"] + 2 * EDGE)}
            page.set_viewport_size({"width": max(width, round(left + size["width"])), "height": TALLEST})
            (IMAGES / name).parent.mkdir(exist_ok=True)
            page.screenshot(path=IMAGES / f"{name}.png", full_page=True, clip={"x": left, "y": top, **size})

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


def command(camera: Camera, dense: Any, local: Any) -> None:
    """The page that the first command of the page about tasks of one's own writes."""
    block = COMMAND.search((DOCS / "own-task.md").read_text(encoding="utf-8"))
    assert block is not None
    words, out = shlex.split(block[1].replace("\\\n", " ")), camera.folder / "command"
    subprocess.run([sys.executable, "-m", "sa_lens", *words[1:], "--out", out], check=True)
    with camera.page(out / "patching.html", 100, ".main-svg") as page:
        page.screenshot(path=IMAGES / "own-prompt.png", full_page=True)


def page_pictures(camera: Camera, pages: Iterable[Path]) -> None:
    """The pictures of pages: a block of code saves NAME.html, and NAME.png on the page shows it."""
    for page in pages:
        text, folder = page.read_text(encoding="utf-8"), camera.folder / page.stem
        folder.mkdir()
        names: dict[str, Any] = {}
        with chdir(folder):
            for block in CODE.finditer(text):
                if "sae_dashboard" not in block[1]:  # cannot be installed beside sa_lens, and draws no picture
                    exec(compile(block[1], page.name, "exec"), names)
        for name in PICTURE.findall(text):
            camera.saved(name, folder / f"{Path(name).name}.html")


def gallery(camera: Camera, dense: Any, local: Any) -> None:
    """Every view."""
    page_pictures(camera, [DOCS / "gallery.md"])


def recipes(camera: Camera, dense: Any, local: Any) -> None:
    """The figures of the recipes."""
    page_pictures(camera, sorted((DOCS / "recipes").glob("*.md")))


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
    camera.saved("circuits-stories", views.save(page, camera.folder / "circuits-stories.html"), WIDTH)
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


GROUPS = {
    "patching": patching,
    "command": command,
    "circuits": task_circuits,
    "report": report_pages,
    "gallery": gallery,
    "recipes": recipes,
}


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
