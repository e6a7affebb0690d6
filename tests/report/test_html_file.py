"""The report's page, used as a person would: with mouse, keyboard, phone and printer, and full of hostile text."""

import dataclasses
import re
from dataclasses import replace
from urllib.parse import quote

import pytest
from synthetic import EVIL, report, single_report, story_tokens, unit_names

from sa_lens.report import save
from sa_lens.views.theme import contrast

PHONE = {"width": 390, "height": 844}
SECTIONS = ("overview", "stories", "circuits", "units", "comparison")
LIMIT = 1_000_000
"""Bytes of the page of a small report, most of them plotly's."""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save(report(), tmp_path_factory.mktemp("report") / "deep" / "report.html")


@pytest.fixture
def visit(browser, path):
    """Opens the page at an address after #, ready for use; at the end nothing may have gone wrong in it."""
    visited = []

    def open_at(address="", whole=False, file=path, **options):
        opened = browser.open(file, **options)
        visited.append(opened)
        opened.page.set_default_timeout(15_000)
        opened.page.wait_for_selector("html[data-ready]")
        if address:
            opened.page.evaluate("address => { location.hash = address }", address)
            opened.page.wait_for_selector(f"#section-{section_of(address)}[data-drawn]:not(.off)")
        if whole:
            opened.page.wait_for_selector("html[data-complete]")
        return opened.page

    yield open_at
    for opened in visited:
        opened.clean()
        opened.page.close()


def section_of(address):
    name = address.split("/")[0]
    return "units" if name == "unit" else name


def wait(locator):
    """What playwright waits for, from outside the page: its security policy lets nothing be evaluated inside."""
    from playwright.sync_api import expect

    return expect(locator)


def texts(page, selector):
    return page.locator(selector).all_inner_texts()


def test_the_same_report_gives_the_same_bytes_within_a_limit(path, tmp_path):
    again = save(report(), tmp_path / "again.html")
    assert again == tmp_path / "again.html"
    assert again.read_bytes() == path.read_bytes()
    assert len(again.read_bytes()) < LIMIT
    assert [file.name for file in tmp_path.iterdir()] == ["again.html"]


def test_refuses_before_writing(tmp_path):
    with pytest.raises(ValueError, match=r"report\.txt.*\.html"):
        save(report(), tmp_path / "report.txt")
    with pytest.raises(ValueError, match="no models"):
        save(replace(report(), models=()), tmp_path / "report.html")
    with pytest.raises(ValueError, match="all different"):
        save(replace(report(), models=report().models[:1] * 2), tmp_path / "report.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(IsADirectoryError, match="name the file"):
        save(report(), tmp_path / "folder.html")
    assert [file.name for file in tmp_path.iterdir()] == ["folder.html"]


def test_a_page_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(single_report(), path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_the_file_holds_no_address_of_a_server_and_no_other_script(path):
    # what is compressed is read by the browser in the other tests, which fail on any request
    text = path.read_text(encoding="utf-8")
    visible = re.sub(r'(<script type="text/plain"[^>]*>)[A-Za-z0-9+/=]*', r"\1", text)
    assert set(re.findall(r"https?://[^\"'\s)]+", visible)) <= {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in visible
    assert "<b>&amp;</b>" not in visible
    assert "innerHTML" not in visible
    assert "<noscript>" in visible


def test_every_section_has_drawn(visit):
    page = visit(whole=True)
    assert page.locator("nav a").count() == len(SECTIONS)
    assert page.locator(".section[data-drawn]").count() == len(SECTIONS)
    assert page.locator("#section-overview table").count() == 3
    assert page.locator("#section-overview .sample").count() == 6
    page.wait_for_selector("#section-overview .chart[data-drawn] .scatterlayer .trace")
    assert page.locator("#section-overview .scatterlayer .trace").count() == 3
    assert page.locator("#section-stories .story-list [role=option]").count() == 3
    assert page.locator("#section-stories [data-token]").count() == len(story_tokens()[0])
    assert page.locator("#section-circuits svg.graph").count() == 2
    assert page.locator("#section-circuits path.edge.positive").count() > 10
    assert page.locator("#section-units tbody tr").count() == 50
    assert page.locator("#section-units svg.spark").count() > 5
    assert page.locator("#section-comparison tbody tr").count() == 2


def test_one_model_without_comparison(visit, tmp_path):
    page = visit(whole=True, file=save(single_report(), tmp_path / "one.html"))
    assert texts(page, "nav a") == ["Overview", "Stories", "Circuits", "Units"]
    assert page.locator("[data-role=story-model]").count() == 0
    assert page.locator("#section-circuits svg.graph").count() == 1


def test_an_empty_model_still_opens(visit, tmp_path):
    model = report().models[1]
    bare = replace(model, overview=replace(model.overview, samples=()), stories=(), tasks=(), units=(), name="é/%")
    path = save(replace(report(), models=(bare,), training=None, comparison=()), tmp_path / "bare.html")
    page = visit(whole=True, file=path)
    assert texts(page, "nav a") == ["Overview"]


# ---------------------------------------------------------------------------------------------------------- stories


def test_clicking_a_token_shows_what_happens_there(visit):
    page = visit("stories")
    story = report().models[0].stories[0]
    for at in (4, 11):
        page.locator(f"[data-token='{at}']").click()
        assert page.locator(".story-details h3").inner_text().startswith(f"Token {at}:")
        streams = texts(page, ".predictions .stream")
        for text, one in zip(streams, story.predictions.streams, strict=True):
            assert f"{one.stream} stream" in text.lower()
            assert f"{100 * 2.718281828 ** one.top[at][0].log_probability:.0f}%" in text
        stays = {unit.name for unit in story.gates.units if at in unit.positions}
        counted = [int(re.search(r": (\d+) stay", text)[1]) for text in texts(page, ".layer-units h5")]
        assert sum(counted) == len(stays)
        shown = page.locator(".layer-units a").evaluate_all("links => links.map(a => a.hash.split('/')[2])")
        assert shown
        assert {name.replace("-", " ") for name in shown} <= stays
    assert page.evaluate("location.hash") == "#stories/gated%2Fone/1/11"


def test_what_is_missing_leaves_no_word_behind(visit):
    page = visit(f"stories/{quote(report().models[1].name, safe='')}/1/0")
    assert page.locator(".story-details h3").inner_text().startswith("Token 0:")
    assert page.locator(".numbers-of-token").count() == 0
    assert "null" not in page.locator(".story-details").inner_text().split()
    plain = [unit for unit in report().models[0].units if not any(one.explanation for one in unit.streams)]
    assert plain
    for unit in plain[:3]:
        page = visit(f"unit/gated%2Fone/{unit.name}")
        page.wait_for_selector(f".unit-name:has-text('{unit.name}')")
        assert "null" not in page.locator("#section-units").inner_text().split()


def test_a_story_says_that_only_some_units_are_shown(visit, tmp_path):
    model = single_report().models[0]
    story = model.stories[0]
    cut = replace(model, stories=(replace(story, gates=replace(story.gates, left_out=31_000)),))
    page = visit("stories", file=save(replace(single_report(), models=(cut,)), tmp_path / "cut.html"))
    page.locator("[data-token='4']").first.click()
    words = page.locator(".story-details").inner_text()
    assert f"Shown are the {len(story.gates.units)} units that add most to the story; 31,000 more stay" in words
    assert re.search(r"layer 0, neurons: \d+ of those shown stay", words)


def test_the_units_of_a_layer_unfold(visit):
    page = visit("stories/gated%2Fone/1/4")
    layer = page.locator(".layer-units", has_text="layer 0, neurons")
    total = int(re.search(r": (\d+) stay", layer.locator("h5").inner_text())[1])
    assert layer.locator("li").count() == 5 < total
    layer.get_by_role("button").press("Enter")
    assert layer.locator("li").count() == total
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"


def test_arrow_keys_move_along_and_between_lines(visit):
    page = visit("stories/gated%2Fone/1/3", viewport=PHONE)
    chosen = page.locator(".tokens [aria-selected=true]")
    for key, at in (("ArrowRight", 4), ("ArrowRight", 5), ("ArrowLeft", 4), ("Home", 0), ("ArrowLeft", 0), ("End", 26)):
        chosen.press(key)
        assert chosen.get_attribute("data-token") == str(min(at, len(story_tokens()[0]) - 1))
        assert page.evaluate("document.activeElement.dataset.token") == chosen.get_attribute("data-token")
    bottom = chosen.bounding_box()["y"]
    chosen.press("ArrowUp")
    assert chosen.bounding_box()["y"] < bottom
    chosen.press("ArrowDown")
    assert chosen.bounding_box()["y"] == bottom


def test_tracks_colour_tokens(visit):
    page = visit("stories")
    colour = "tokens => tokens.map(token => token.style.backgroundColor)"
    tokens = page.locator("[data-token]")
    before = tokens.evaluate_all(colour)
    assert before[0] == ""
    assert len(set(before)) > 10
    page.get_by_label("Colour by").select_option("loss, ablated")
    after = tokens.evaluate_all(colour)
    assert after != before
    page.get_by_role("button", name="Dark look").click()
    assert tokens.evaluate_all(colour) not in (before, after)
    page.get_by_label("Colour by").select_option("L1.mlp.3, clean")
    assert page.locator(".legend-name a").get_attribute("href") == "#unit/gated%2Fone/L1.mlp.3"


def test_a_story_opens_where_the_streams_disagree_most(visit):
    page = visit("stories")
    for i, story in enumerate(report().models[0].stories):
        page.locator(".story-list [role=option]").nth(i).click()
        [difference] = [track for track in story.tracks.tracks if track.name == "ablated minus clean loss"]
        largest = max(range(1, len(story.tokens)), key=lambda at: abs(difference.values[at]))
        assert page.get_by_label("Colour by").input_value() == difference.name
        assert page.locator(".story-details h3").inner_text().startswith(f"Token {largest - 1}:")
        assert page.locator(".token.next").get_attribute("data-token") == str(largest)
    page.locator("[data-role=story-model] select").select_option("1")
    page.wait_for_selector("text=This model has no gates")
    [loss] = report().models[1].stories[2].tracks.tracks
    assert page.get_by_label("Colour by").input_value() == loss.name == "loss, clean"
    page.locator(".story-list [role=option]").first.click()
    loss = report().models[1].stories[0].tracks.tracks[0].values
    largest = max(range(1, len(loss)), key=lambda at: loss[at])
    assert page.locator(".story-details h3").inner_text().startswith(f"Token {largest - 1}:")


def hexadecimal(colour):
    """`rgb(255, 0, 16)` as `#ff0010`."""
    return "#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", colour))


@pytest.mark.parametrize("look", ["light", "dark"])
def test_every_text_on_a_colour_can_be_read(visit, look):
    page = visit("stories", whole=True, color_scheme=look)
    painted = """() => [...document.querySelectorAll('.section:not(.off) .token')]
        .filter((token) => token.style.backgroundColor)
        .map((token) => [getComputedStyle(token).backgroundColor, getComputedStyle(token).color])"""
    seen = set()
    for address in ("stories/gated%2Fone/1", "stories/gated%2Fone/2", "unit/gated%2Fone/L1.mlp.4"):
        page.evaluate("address => { location.hash = address }", address)
        page.wait_for_selector(f"#section-{section_of(address)}:not(.off) .token")
        seen |= {tuple(map(hexadecimal, pair)) for pair in page.evaluate(painted)}
    assert len(seen) > 40
    assert min(contrast(*pair) for pair in seen) >= 4.5


def test_heads_light_what_they_attend_to(visit):
    page = visit("stories/gated%2Fone/1/9")
    page.locator("[data-head='1.2']").click()
    looks = {one.stream: one for one in report().models[0].stories[0].looks if (one.layer, one.head) == (1, 2)}
    lit = page.locator(".looked-at").evaluate_all("tokens => tokens.map(token => Number(token.dataset.token))")
    assert set(lit) == set(looks["clean"].positions[9]) | set(looks["ablated"].positions[9])
    assert page.locator(".looks .stream").count() == 2
    page.keyboard.press("Enter")
    assert page.locator(".looked-at").count() == 0


def test_stories_are_searched_and_models_picked(visit):
    page = visit("stories")
    page.get_by_label("Search stories").fill("ZEBRA")
    assert page.locator(".story-list [role=option]").count() == 1
    assert page.locator("#section-stories [role=status]").inner_text() == "1 of 3 stories match"
    page.locator(".story-list [role=option]").press("Enter")
    page.wait_for_selector(".tokens >> text=zebra")
    page.locator("[data-role=story-model] select").select_option("1")
    page.wait_for_selector("text=This model has no gates")
    assert page.locator(".predictions .stream").count() == 1


def test_hostile_text_is_text(visit):
    page = visit("stories/gated%2Fone/2/1", whole=True)
    shown = page.locator("[data-token]").evaluate_all("tokens => tokens.map(token => token.textContent)")
    signs = {"\n": "↵", " ": "␣", "\t": "⇥", "": "∅"}
    assert shown == [signs[token] if token in signs else token.removeprefix(" ") for token in EVIL]
    assert page.locator("[data-token] > *:not(.sign)").count() == 0
    page.evaluate("location.hash = '#unit/gated%2Fone/L0.attn.0'")
    page.wait_for_selector(".unit-name")
    assert page.locator("main img, main script, main em, main i:not(.ramp):not(.bar i), main b:has(*)").count() == 0
    assert page.title() == "Two models <b>&amp;</b> a script"
    assert page.locator("h1").inner_text() == "Two models <b>&amp;</b> a script"


# --------------------------------------------------------------------------------------------------------- circuits


def test_the_slider_changes_the_number_of_edges(visit):
    page = visit("circuits")
    panel = page.locator(".panel").first
    edges = panel.locator("g.edges path")
    assert edges.count() == report().models[0].tasks[0].rankings[0].chosen
    slider = panel.get_by_role("slider")
    slider.press("ArrowRight")
    wait(page.locator(".panel g.edges path")).to_have_count(50)
    assert slider.get_attribute("aria-valuetext") == "25 edges"
    slider.press("Home")
    wait(page.locator(".panel g.edges path")).to_have_count(0)
    assert panel.locator(".node.unused").count() == panel.locator(".node").count()
    page.get_by_label("Both sliders together").uncheck()
    panel.get_by_label("Number of edges, exactly").fill("7")
    panel.get_by_label("Number of edges, exactly").press("Enter")
    assert edges.count() == 7
    assert page.locator(".panel").nth(1).locator("g.edges path").count() == 0
    panel.get_by_role("button", name="As found").click()
    assert edges.count() == 24
    # the strongest edge is drawn last, above all others
    width = "paths => paths.map(path => Number(path.getAttribute('stroke-width')))"
    widths = edges.evaluate_all(width)
    assert widths == sorted(widths)


def test_the_curve_marks_the_size(visit):
    page = visit("circuits")
    edges = len(report().models[0].tasks[0].rankings[0].circuit.edges)
    panel = page.locator(".panel").first
    panel.locator(".chart").scroll_into_view_if_needed()
    page.wait_for_selector(".panel .chart[data-drawn] .shapelayer path", state="attached")
    mark = panel.locator(".chart .shapelayer path").last
    before = mark.get_attribute("d")
    panel.get_by_role("slider").press("End")
    wait(panel.locator("output")).to_contain_text(f"{edges} edges of 300")
    assert mark.get_attribute("d") != before
    assert f"measured at {edges} edges: 1" in panel.locator("output").inner_text()


def test_a_node_shows_its_edges_alone(visit):
    page = visit("circuits")
    panel = page.locator(".panel").first
    edges = [
        edge
        for edge in report().models[0].tasks[0].rankings[0].circuit.edges[:24]
        if "embed" in (edge.source, edge.destination)
    ]
    node = panel.locator("[data-node=embed]")
    node.press("Enter")
    assert panel.locator("g.edges path:not(.dim)").count() == len(edges)
    assert panel.locator("details[open] tbody tr").count() == len(edges)
    node.press("Enter")
    assert panel.locator("path.dim").count() == 0


def test_warnings_stand_above_the_circuit_and_the_curve(visit, tmp_path):
    made = single_report()
    task = made.models[0].tasks[0]
    first = task.rankings[0]
    warned = replace(first, circuit=replace(first.circuit, warnings=("<b>low</b> skill",)))
    warned = replace(warned, curve=replace(first.curve, warnings=("f is unstable",)))
    model = replace(made.models[0], tasks=(replace(task, rankings=(warned,)),))
    page = visit("circuits", file=save(replace(made, models=(model,)), tmp_path / "warned.html"))
    assert texts(page, "#section-circuits .warning") == ["Warning: <b>low</b> skill", "Warning: f is unstable"]


def test_tasks_methods_and_streams_are_picked(visit):
    page = visit("circuits")
    page.get_by_label("Method", exact=True).select_option("EAP-IG")
    page.locator("#section-circuits").get_by_label("Stream", exact=True).select_option("ablated")
    titles = texts(page, ".panel h3")
    assert "EAP-IG circuit, ablated stream" in titles
    assert texts(page, "#section-circuits .boxed") == ["plain has no ablated stream."]
    assert page.locator("svg.graph").count() == 1
    page.get_by_label("Task", exact=True).select_option("Pronoun gender")
    assert "cannot do this task" in page.locator(".panel").first.inner_text()
    assert page.locator("svg.graph").count() == 2


def test_a_task_that_no_model_can_do_takes_one_line_each(visit, tmp_path):
    note = "No circuit, as the clean stream cannot do this task: pair accuracy 51%."
    whole = report()
    models = tuple(replace(m, tasks=(replace(m.tasks[0], rankings=(), note=note), m.tasks[1])) for m in whole.models)
    page = visit("circuits", file=save(replace(whole, models=models), tmp_path / "unable.html"))
    assert page.get_by_label("Task", exact=True).input_value() == "Pronoun gender"
    page.get_by_label("Task", exact=True).select_option("IOI")
    lines = page.locator("#section-circuits .boxed")
    assert lines.all_inner_texts() == [f"gated/one: {note}", f"plain: {note}"]
    assert all(line["height"] < 40 for line in (line.bounding_box() for line in lines.all()))
    assert page.locator(".panel").count() == 0
    assert page.locator("#section-circuits").bounding_box()["height"] < 400


# ------------------------------------------------------------------------------------------------------------ units


def rates(page):
    column = texts(page, "#section-units thead th").index(
        next(head for head in texts(page, "#section-units thead th") if head.startswith("fires at"))
    )
    cells = page.locator(f"#section-units tbody tr > *:nth-child({column + 1})").all_inner_texts()
    return [float(cell.strip("<%")) for cell in cells]


def test_headings_sort_both_ways_with_mouse_and_keyboard(visit):
    page = visit("units")
    head = page.locator("th[aria-sort]", has_text="fires at")
    assert head.get_attribute("aria-sort") == "none"
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    first = rates(page)
    assert first == sorted(first, reverse=True)
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert rates(page) == sorted(rates(page)) != first
    assert page.locator("th[aria-sort=ascending], th[aria-sort=descending]").count() == 1
    names = page.locator("th[aria-sort]", has_text="unit").get_by_role("button")
    names.press(" ")
    shown = texts(page, "#section-units tbody th")
    names.press(" ")
    assert shown[0] == "L0.attn.0"
    assert texts(page, "#section-units tbody th")[0] == "L2.mlp.39"


def test_what_has_no_value_stands_last(visit):
    page = visit("units")
    head = page.locator("th[aria-sort]", has_text="effective tokens").get_by_role("button")
    page.locator("#section-units").get_by_label("Layer").select_option("0")
    for _ in range(2):
        head.click()
        assert "n/a" in page.locator("#section-units tbody tr").last.inner_text()
        assert "n/a" not in page.locator("#section-units tbody tr").first.inner_text()


def test_search_and_filters_narrow_the_table(visit):
    page = visit("units")
    rows = page.locator("#section-units tbody tr")
    state = page.locator("#section-units [role=status]")
    section = page.locator("#section-units")
    section.get_by_label("Stream", exact=True).select_option("clean")
    assert state.inner_text().startswith("168 of 168 units")
    section.get_by_label("Search units").fill("word 15")
    expected = [place for place in range(len(unit_names())) if place % 3 == 0 and str(place).startswith("15")]
    assert rows.count() == len(expected)
    section.get_by_label("Search units").fill("")
    section.get_by_label("Kind").select_option("attn")
    section.get_by_label("Layer").select_option("2")
    assert rows.count() == 16
    section.get_by_label("Explained only").check()
    places = [place for place, (_, layer, site, _) in enumerate(unit_names()) if layer == 2 and site == "attn"]
    assert rows.count() == sum(place % 3 == 0 for place in places)


def test_the_notation_of_explanations_is_explained(visit):
    page = visit("units")
    assert "any one token" in page.locator(".unit-table .explanation-legend").inner_text()
    page.evaluate("location.hash = '#unit/gated%2Fone/L0.attn.0'")
    assert "any one token" in page.locator(".unit-page .explanation-legend").inner_text()
    page.evaluate("location.hash = '#unit/gated%2Fone/L0.attn.1'")
    page.wait_for_selector(".unit-name:has-text('L0.attn.1')")
    assert page.locator(".unit-page .explanation-legend").count() == 0


def test_pages_of_the_table_turn(visit):
    page = visit("units")
    first = texts(page, "#section-units tbody th")
    page.get_by_role("button", name="Next").press("Enter")
    second = texts(page, "#section-units tbody th")
    assert not set(first) & set(second)
    assert page.evaluate("document.activeElement.textContent") == "Next"
    page.get_by_role("button", name="First").click()
    assert texts(page, "#section-units tbody th") == first


def test_a_unit_opens_from_a_mention_and_leads_back(visit):
    page = visit("stories/gated%2Fone/1/4")
    link = page.locator(".layer-units a").first
    address = link.get_attribute("href")
    link.press("Enter")
    page.wait_for_selector(".unit-name")
    assert page.locator(".unit-name").inner_text().startswith(address.split("/")[2])
    assert page.evaluate("document.activeElement.className") == "unit-name"
    page.locator(".unit-stories a").first.click()
    page.wait_for_selector("#section-stories:not(.off)")
    page.go_back()
    page.wait_for_selector("#section-units:not(.off) .unit-name")
    page.get_by_role("link", name="All units").click()
    page.wait_for_selector(".unit-list:not(.off)")
    for section, place in (("circuits", "#section-circuits .how a"), ("comparison", "#section-comparison td a")):
        page.evaluate("address => { location.hash = address }", section)
        page.wait_for_selector(f"#section-{section}[data-drawn]:not(.off)")
        assert page.locator(place).first.get_attribute("href") == "#unit/gated%2Fone/L1.mlp.3"


def test_a_deep_link_opens_a_unit(browser, path):
    opened = browser.open(path)
    opened.page.goto(path.as_uri() + "#unit/gated%2Fone/L2.mlp.4")
    opened.page.reload()
    opened.page.wait_for_selector(".unit-name")
    unit = report().models[0].units[[name for name, *_ in unit_names()].index("L2.mlp.4")]
    assert opened.page.locator(".unit-name").inner_text() == "L2.mlp.4 of gated/one"
    streams = opened.page.locator(".unit-stream")
    assert streams.count() == 2
    for i, stream in enumerate(unit.streams):
        assert streams.nth(i).locator(".snippets li").count() == len(stream.snippets) == 5
        assert streams.nth(i).locator(".snippets .focus").count() == 5
        streams.nth(i).locator(".chart").scroll_into_view_if_needed()
    wait(opened.page.locator(".unit-stream .chart[data-drawn] .bars .point")).to_have_count(40)
    link = opened.page.get_by_role("link", name="unit after")
    after = link.get_attribute("href").split("/")[2].replace("-", " ")
    link.click()
    wait(opened.page.locator(".unit-name")).to_have_text(f"{after} of gated/one")
    opened.page.evaluate("location.hash = '#unit/gated%2Fone/L9.mlp.9'")
    opened.page.wait_for_selector("text=This report holds no unit L9.mlp.9")
    assert opened.clean()
    opened.page.close()


# --------------------------------------------------------------------------------------------------- phone and paper


# texts smaller than 11 pixels on the screen, in a picture that is scaled too; boxes with something hidden at the right
SMALL_OR_CUT = """() => {
    const found = new Set();
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        const range = document.createRange();
        range.selectNodeContents(walker.currentNode);
        if (!walker.currentNode.data.trim() || !range.getBoundingClientRect().width) continue;
        const box = element.ownerSVGElement?.viewBox.baseVal;
        const scale = box?.width ? element.ownerSVGElement.getBoundingClientRect().width / box.width : 1;
        const size = scale * parseFloat(getComputedStyle(element).fontSize);
        if (size < 11) found.add(`${size.toFixed(1)}: ${element.textContent.slice(0, 30)}`);
    }
    for (const box of document.querySelectorAll('.scroll, nav, table, td, .tokens'))
        if (box.clientWidth && box.scrollWidth > box.clientWidth + 1) found.add(`cut: ${box.textContent.slice(0, 60)}`);
    return [...found];
}"""


@pytest.mark.parametrize("look", ["light", "dark"])
def test_a_phone_shows_all_of_it_and_scrolls_one_way_only(visit, look):
    page = visit(viewport=PHONE, whole=True, color_scheme=look)
    for address in (*SECTIONS, "unit/gated%2Fone/L0.attn.0", "stories/gated%2Fone/2/4"):
        page.evaluate("address => { location.hash = address }", address)
        page.wait_for_selector(f"#section-{section_of(address)}[data-drawn]:not(.off)")
        page.evaluate("scrollTo(0, 1e6)")
        for chart in page.locator(".section:not(.off) .chart").all():
            chart.scroll_into_view_if_needed()
            wait(chart).to_have_attribute("data-drawn", "")
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], address
        assert page.evaluate(SMALL_OR_CUT) == [], address
        # every section is in reach, also from the end of a long one
        for link in page.locator("nav a").all():
            place = link.bounding_box()
            assert 0 <= place["x"] < place["x"] + place["width"] <= PHONE["width"]
            assert 0 <= place["y"] < PHONE["height"] / 4


def test_a_phone_shows_the_chosen_token_in_its_story(visit):
    page = visit("stories/gated%2Fone/3/26", viewport={"width": 390, "height": 300})
    window, token = (page.locator(place).bounding_box() for place in (".tokens", ".tokens [aria-selected=true]"))
    assert window["y"] <= token["y"] < token["y"] + token["height"] <= window["y"] + window["height"]


def test_paper_shows_all_sections_and_no_controls(visit):
    page = visit(whole=True)
    page.emulate_media(media="print")
    for name in SECTIONS:
        assert page.locator(f"#section-{name}").is_visible(), name
    for selector in ("nav", ".tools", ".pager", ".bar-of-controls", ".slider-row", "summary", "button", "select"):
        for control in page.locator(selector).all():
            assert not control.is_visible() or "sort" in (control.get_attribute("class") or ""), selector
    page.emulate_media(media="screen")


def test_printing_draws_every_chart_in_the_light_look(visit):
    page = visit(whole=True, color_scheme="dark")
    page.wait_for_selector("#section-overview .chart[data-drawn]")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".chart").count() == page.locator(".chart[data-drawn] .main-svg >> nth=0").count() + 2
    assert page.locator("#section-circuits .chart[data-drawn]").count() == 2
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(background) == "rgb(20, 23, 28)"


def test_the_look_follows_the_reader_and_the_button(visit):
    background = "getComputedStyle(document.body).backgroundColor"
    page = visit(color_scheme="dark")
    assert page.evaluate(background) == "rgb(20, 23, 28)"
    page.get_by_role("button", name="Light look").press("Enter")
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    assert page.get_by_role("button", name="Dark look").count() == 1


def test_everything_can_be_reached_and_has_a_name(visit):
    page = visit("units", whole=True)
    nameless = """() => [...document.querySelectorAll('button, select, input, [role=listbox], [role=region], .chart')]
        .filter((one) => !(one.textContent.trim() || one.labels?.length || one.getAttribute('aria-label')))
        .map((one) => one.outerHTML.slice(0, 200))"""
    assert page.evaluate(nameless) == []
    page.evaluate("window.scrollTo(0, 0)")
    page.locator("h2", has_text="Units").focus()
    seen = []
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate("[document.activeElement.tagName, getComputedStyle(document.activeElement).outlineStyle]")
        )
    assert {"SELECT", "INPUT", "BUTTON"} <= {tag for tag, _ in seen}
    assert {style for _, style in seen} <= {"solid", "auto"}


def test_a_damaged_file_says_so(browser, path, tmp_path):
    text = path.read_text(encoding="utf-8")
    start = text.index(">", text.index('id="pack-front"')) + 1
    broken = tmp_path / "broken.html"
    broken.write_text(text[:start] + text[start + 400 :], encoding="utf-8")
    opened = browser.open(broken)
    opened.page.wait_for_selector("text=The report could not be opened")
    assert opened.errors
    opened.page.close()


def test_packing_keeps_every_record():
    from sa_lens.report.packing import pack

    whole = report()
    parts = pack(whole)
    unit = whole.models[0].units[0]
    row, details = parts["front"]["models"][0]["units"][0], parts["units-0"][0]
    kept = {field.name for field in dataclasses.fields(type(unit.streams[0]))}
    assert set(row["streams"][0]) | set(details[0]) == kept
    for snippet, packed_snippet in zip(unit.streams[0].snippets, details[0]["snippets"], strict=True):
        most = max(map(abs, snippet.values))
        values = [step * most / 100 for step in packed_snippet["steps"]]
        assert values == pytest.approx(snippet.values, abs=most / 199)
        assert packed_snippet["value"] == pytest.approx(snippet.values[snippet.focus], rel=1e-3)
    looks, packed_looks = whole.models[0].stories[0].looks[0], parts["stories-0"]["stories"][0]["looks"][0]
    for at, (positions, shares) in enumerate(zip(looks.positions, looks.shares, strict=True)):
        back = [column[at] for column in packed_looks["back"] if column[at] is not None]
        assert tuple(at - distance for distance in back) == positions
        percent = [column[at] for column in packed_looks["percent"] if column[at] is not None]
        assert percent == pytest.approx([100 * share for share in shares], abs=0.5)
    known = parts["stories-0"]["units"]
    for story, packed_story in zip(whole.models[0].stories, parts["stories-0"]["stories"], strict=True):
        gates, start = packed_story["gates"], 0
        for unit, place, n in zip(story.gates.units, gates["units"], gates["counts"], strict=True):
            assert [known[name][place] for name in ("name", "layer", "site")] == [unit.name, unit.layer, unit.site]
            assert tuple(known["promotes"][place]) == unit.promotes
            gaps, values = (gates[name][start : start + n] for name in ("gaps", "values"))
            assert tuple(sum(gaps[: i + 1]) for i in range(n)) == unit.positions
            assert values == pytest.approx(unit.values, rel=5e-3)
            start += n
        assert len(gates["gaps"]) == len(gates["values"]) == start
