"""Every Python block of README and documentation runs; the site builds strictly and asks no server for anything."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import json
import linecache
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import CodeType
from urllib.parse import unquote, urlsplit

import pytest
import torch

import sa_lens as sa
import sa_lens.circuits
import sa_lens.units
from sa_lens.config import PRESETS
from sa_lens.core.base import TRANSFORMER_LENS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(first line, text) of each fenced block of a language."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start(2)) + 1, m[2]) for m in BLOCK.finditer(text) if m[1] == language]


CODE_WIDTH = 88
"""Characters of a line of code that fit beside both margins of the site at 1,280 pixels."""


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# ------------------------------------------------------------------------------------------------------ Python blocks


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The empty folder in which somebody tries a page out who has only installed the package."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        yield tmp_path


PRINT_AND_RESULT = re.compile(r"^ *print\(.*\)  # (.+)$", re.MULTILINE)
"""A call that says beside it what it prints; after a colon it may say what that means."""
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def agrees(printed: str, expected: str) -> bool:
    """Whether words are equal and numbers too, which may differ by one in the last digit on another processor."""
    words = [" ".join(NUMBER.sub("0", text).split()) for text in (printed, expected)]
    numbers = list(zip(NUMBER.findall(printed), NUMBER.findall(expected), strict=False))
    return words[0] == words[1] and all(
        abs(float(given) - float(wanted)) < 1.5 * 10.0 ** -len(wanted.partition(".")[2]) for given, wanted in numbers
    )


def cannot_run(source: str) -> bool:
    """Whether the code needs SAELens, which is not to be had with TransformerLens 4, or a package beside it."""
    dashboard = importlib.util.find_spec("sae_dashboard") is None
    return (TRANSFORMER_LENS >= 4 and "sae" in source) or (dashboard and "sae_dashboard" in source)


def compiled(page: Path, line: int, source: str) -> CodeType:
    """The code of a block, whose text nnsight can read."""
    place, text = f"{page}:{line}", "\n" * (line - 1) + source
    linecache.cache[place] = len(text), None, text.splitlines(keepends=True), place
    return compile(text, place, "exec")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_python_blocks_run_in_order(page, reader, capsys):
    """The blocks of a page, one after the other as in a notebook; what they say that they print is printed."""
    if page.name == "use-nnsight.md":
        pytest.importorskip("nnsight", reason="nnsight is not installed (extra nnsight)")
    names: dict[str, object] = {"__name__": "__main__"}
    for line, source in blocks(page, "python"):
        if cannot_run(source):
            continue
        capsys.readouterr()
        exec(compiled(page, line, source), names)
        printed = iter(capsys.readouterr().out.splitlines())
        for comment in PRINT_AND_RESULT.findall(source):
            expected = comment.split(": ")[0]
            assert any(agrees(text, expected) for text in printed), f"{expected!r} is not what is printed"


def test_printed_numbers_agree_to_the_digits_that_are_shown():
    assert agrees(" Lily  7.4", "Lily 7.3")
    assert not agrees("Lily 7.4", "Lily 7.2")
    assert not agrees("Lily 7.4", "Tom 7.4")
    assert not agrees("-1.4", "1.4")
    assert not agrees("32 33", "32")


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "index.md", ROOT / "docs" / "getting-started.md"])
def test_first_pages_say_what_their_calls_print(page):
    assert any(PRINT_AND_RESULT.search(source) for _, source in blocks(page, "python"))


def test_no_page_needs_a_training_first():
    """What a page loads is shipped, or made on the page."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert "runs/demo/" not in text.replace("runs/demo/report.html", ""), name(page)


def test_the_readme_shows_ten_lines():
    """The example of the first screen: ten statements, those inside `with` counted; then a picture, in fewer."""
    import ast

    first, second = blocks(ROOT / "README.md", "python")
    for (_, source), most in ((first, 11), (second, 8)):
        assert len([node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]) <= most
    assert first[0] < 40


def test_lines_of_code_fit():
    for page in PAGES:
        for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
            if block[1] != "math":
                assert not [line for line in block[2].splitlines() if len(line) > CODE_WIDTH], name(page)


def test_python_blocks_are_formatted(tmp_path):
    """A file for each block, named for its place, so that the formatter starts once and names those it would change."""
    pytest.importorskip("ruff")
    for page in PAGES:
        for line, source in blocks(page, "python"):
            place = f"{name(page).replace('/', '-')}-line-{line}.py"
            (tmp_path / place).write_text(source, encoding="utf-8")
    ruff = [sys.executable, "-m", "ruff", "format", "--check", "--config", str(ROOT / "pyproject.toml")]
    ruff += ["--line-length", str(CODE_WIDTH)]
    done = subprocess.run([*ruff, "--no-cache", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(list(tmp_path.iterdir()))} files already formatted" in done.stdout


# -------------------------------------------------------------------------------------------------------- the errors


@pytest.fixture(scope="module")
def own_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the reader's own, barely trained."""
    from sa_lens.training import train

    folder = tmp_path_factory.mktemp("own")
    run = sa.RunConfig(
        model=sa.ModelConfig(n_layers=2, d_model=32, n_heads=4, n_ctx=64, init="gpt2", attn_scale=True),
        data=sa.DataConfig(source="stories", n_stories=300, vocab_size=1024, cache_dir=str(folder / "cache")),
        train=sa.TrainConfig(steps=3, batch_size=2, eval_tokens=128, sample_tokens=0),
    )
    train(run, folder / "run", device="cpu", progress=False)
    return folder / "run"


@pytest.fixture
def faq(reader: Path, own_run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page, with a run in the reader's folder; what its blocks fake is undone."""
    import huggingface_hub.constants

    shutil.copytree(own_run, reader / "runs" / "mine")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", huggingface_hub.constants.HF_HUB_OFFLINE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = dict(sys.modules)
    yield ROOT / "docs" / "faq.md"
    for name in [name for name, module in sys.modules.items() if module is None]:
        del sys.modules[name]
        sys.modules |= {name: before[name]} if name in before else {}


def test_errors_are_quoted_as_they_are_raised(faq):
    """Word for word; only line breaks are free, and dots stand for what depends on versions or chance."""
    text = "\n".join(source for _, source in blocks(faq, "pycon"))
    test = doctest.DocTestParser().get_doctest(text, {}, "faq", str(faq), 0)
    test.examples = [example for example in test.examples if not cannot_run(example.source)]
    assert sum(example.exc_msg is not None for example in test.examples) >= 35
    said: list[str] = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.DocTestRunner(optionflags=flags).run(test, out=said.append, clear_globs=False)
    assert result.failed == 0, "".join(said)


def test_complaints_of_commands_are_quoted_as_they_are_printed(faq, capsys):
    from sa_lens import cli

    quoted = [source.split("\n", 1) for _, source in blocks(faq, "console")]
    assert quoted
    for command, expected in quoted:
        try:
            code = cli.main(shlex.split(command.removeprefix("$ sa-lens ")))
        except SystemExit as stop:
            code = stop.code
        assert code == 2, command
        # the boxes that tyro draws depend on the terminal
        printed, expected = (re.sub("[│╭╮╰╯─]|-{3,}", " ", text) for text in (capsys.readouterr().err, expected))
        assert printed.split() == expected.split(), command


def test_the_message_of_missing_pictures_is_quoted(faq):
    from sa_lens.views.html_page import MISSING

    assert [source.split() for _, source in blocks(faq, "text")] == [MISSING.split()]


# ---------------------------------------------------------------------------------------------------- command lines


def command_lines() -> Iterator[tuple[str, str]]:
    """(page, command) of every line of every shell block, continued lines joined, comments removed."""
    for page in PAGES:
        for _, source in blocks(page, "bash"):
            for line in re.sub(r"\\\n\s*", " ", source).splitlines():
                if command := line.split(" #")[0].strip():
                    yield name(page), command


def test_the_table_of_presets_is_made_from_the_presets():
    spec = importlib.util.spec_from_file_location("preset_table", ROOT / "docs" / "preset_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.preset_table() in (ROOT / "docs" / "method.md").read_text(encoding="utf-8")


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {word for _, command in command_lines() if command.startswith("make ") for word in command.split()[1:]}
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        named |= set(re.findall(r"`make ([\w-]+)", page.read_text(encoding="utf-8")))
    assert named
    assert named <= targets


def test_commands_and_their_flags_exist():
    """Each `sa-lens COMMAND` of the documentation is a command, and takes the flags that stand there."""
    from sa_lens import cli

    found = [
        (page, command.split("sa_lens " if "-m sa_lens" in command else "sa-lens ", 1)[1].split())
        for page, command in command_lines()
        if "sa-lens " in command.replace("pip install sa-lens", "") or "-m sa_lens " in command
    ]
    assert found
    for page, words in found:
        assert words[0] in cli.COMMANDS, f"{page}: {words}"
        helps = help_of(words[0])
        for flag in (word for word in words if word.startswith("--")):
            assert f"{flag} " in helps or f"{flag}\n" in helps, f"{page}: {words[0]} has no flag {flag}"
        if "--preset" in words:
            assert words[words.index("--preset") + 1] in PRESETS


def help_of(command: str) -> str:
    """The help of a command, of `train` with all settings."""
    from sa_lens import cli

    texts = []
    for flag in ["--help", "--help-all"] if command == "train" else ["--help"]:
        text = run_for_help(cli, [command, flag])
        texts.append(text.replace("│", " "))
    return "\n".join(texts)


def run_for_help(cli, arguments: list[str]) -> str:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main(arguments)
    return out.getvalue()


# -------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=name)
def test_links_of_the_repository_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    assert links
    for link in links:
        if not urlsplit(link).scheme:
            assert (ROOT / urlsplit(link).path).exists(), f"{name(page)}: {link}"


def test_the_map_of_the_readme_names_what_exists():
    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert rows
    for row in rows:
        first, *others = re.findall(r"`([^`]+)`", row)
        folder = (ROOT / first).parent
        assert (ROOT / first).exists(), first
        for other in others:
            assert (folder / other).exists(), other


# --------------------------------------------------------------------------------------------------------------- site


class Page(HTMLParser):
    """What a page of the site refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        """What a browser fetches to show the page."""
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.formulas = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if values.get("id"):
            self.ids.add(str(values["id"]))
        if values.get("src"):
            self.loads.append(str(values["src"]))
        if values.get("href"):
            (self.loads if tag == "link" else self.links).append(str(values["href"]))
        self.formulas += tag == "math"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    parsed = {}
    for file in site.rglob("*.html"):
        page = Page()
        page.feed(file.read_text(encoding="utf-8"))
        parsed[file.relative_to(site).as_posix()] = page
    return parsed


@pytest.mark.slow
def test_the_site_has_every_page(pages):
    expected = {page.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for page in PAGES[1:]}
    assert expected | {"404.html"} == set(pages)


def test_the_site_loads_nothing_from_a_server(site, pages):
    for where, page in pages.items():
        for url in page.loads:
            assert not urlsplit(url).netloc, f"{where} loads {url}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", sheet.read_text(encoding="utf-8")), sheet


def test_links_of_the_site_lead_to_a_page_and_a_place(pages):
    for where, page in pages.items():
        if where == "404.html":
            continue
        for link in page.links + page.loads:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (Path("/") / where).parent.joinpath(unquote(url.path)) if url.path else Path("/") / where
            path = str(Path(*_collapsed(target))) if url.path else where
            if path in pages and url.fragment:
                assert unquote(url.fragment) in pages[path].ids, f"{where}: {link}"
            elif path.endswith(".html"):
                assert path in pages, f"{where}: {link}"


def _collapsed(path: Path) -> list[str]:
    parts: list[str] = []
    for part in path.parts[1:]:
        if part == "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    return parts


@pytest.mark.parametrize("word", ["steering", "nnsight", "attribution", "neuronpedia", "logit lens", "ablate heads"])
def test_search_has_a_page_or_a_heading_about(site, word):
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert any(word in entry["title"].lower() for entry in index["docs"])


def test_equations_are_drawn(pages):
    lines = sum(len(source.splitlines()) for _, source in blocks(ROOT / "docs" / "method.md", "math"))
    assert lines >= 10
    assert pages["method.html"].formulas == lines


def test_the_api_has_every_public_name(site):
    raw = (site / "objects.inv").read_bytes()
    header = b"".join(raw.splitlines(keepends=True)[:4])
    documented = {line.split(" ")[0] for line in zlib.decompress(raw[len(header) :]).decode().splitlines()}
    # no text of ours: a number, two classes of TransformerLens 3; modules whose names are documented
    elsewhere = {"__version__", "HookedTransformer", "HookedTransformerConfig", "tasks", "stories"}
    for module in (
        "sa_lens",
        "sa_lens.data",
        "sa_lens.data.stories",
        "sa_lens.training",
        "sa_lens.circuits",
        "sa_lens.circuits.tasks",
        "sa_lens.sae",
        "sa_lens.compare",
        "sa_lens.units",
        "sa_lens.views",
        "sa_lens.report",
    ):
        for public in importlib.import_module(module).__all__:
            homes = (module, "sa_lens.config", "sa_lens.training", "sa_lens.circuits")
            known = {f"{home}.{public}" for home in homes}
            assert known & documented or public in elsewhere, f"{module}.{public} is not in docs/api"


def test_no_page_names_a_path_of_somebodys_machine():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        assert not re.search(r"(?<![\w.])/(home|root|Users|tmp)/", page.read_text(encoding="utf-8")), name(page)
