"""The documentation, opened from disk in a browser: everything drawn, no error, no request."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def open_page(browser, site):
    """Opens a page of the site."""
    opened: list[Any] = []

    def open_page(name: str, **options: Any) -> Any:
        opened.append(browser.open(site / name, folder=site, **options))
        return opened[-1]

    yield open_page
    for one in opened:
        one.page.close()


def pictures(page: Any) -> list[bool]:
    """Whether each picture of a page was found and drawn."""
    return page.evaluate("Array.from(document.images, image => image.complete && image.naturalWidth > 0)")


CODE_THAT_SCROLLS = """Array.from(document.querySelectorAll("article pre > code"))
    .filter(code => code.scrollWidth > code.clientWidth + 1).map(code => code.innerText)"""


class TestSite:
    def test_home_leads_on(self, open_page):
        home = open_page("index.html")
        assert pictures(home.page)
        assert all(pictures(home.page))
        home.page.locator("article a", has_text="Getting started").first.click()
        assert "Getting started" in home.page.title()
        assert home.clean()

    @pytest.mark.parametrize(
        ("name", "drawn"),
        [("method.html", "math"), ("circuits.html", "img"), ("units.html", "code"), ("api/model.html", ".doc-heading")],
    )
    def test_pages_are_drawn(self, open_page, name, drawn):
        opened = open_page(name)
        assert opened.page.locator(f"article {drawn}").first.is_visible()
        assert all(pictures(opened.page))
        assert opened.clean()

    @pytest.mark.slow
    def test_every_page_opens_without_an_error_and_no_code_scrolls(self, open_page, site):
        opened = open_page("index.html", viewport={"width": 1280, "height": 900})
        for path in sorted(site.rglob("*.html")):
            if path.name != "404.html":
                opened.page.goto(path.as_uri())
                assert opened.page.locator("article h1").count() == 1, path.name
                assert opened.page.evaluate(CODE_THAT_SCROLLS) == [], path.name
                assert opened.clean(), path.name

    def test_search_finds_from_disk(self, open_page):
        opened = open_page("index.html", viewport={"width": 1280, "height": 900})
        opened.page.locator("input.md-search__input").click()
        opened.page.keyboard.type("ablated stream")
        found = opened.page.locator(".md-search-result__item a")
        found.first.wait_for(timeout=20_000)
        found.first.click()
        opened.page.wait_for_url(lambda url: not url.endswith("index.html"))
        assert "ablated" in opened.page.locator("article").inner_text().lower()
        assert opened.clean()

    def test_fits_a_phone(self, open_page):
        for name in ("index.html", "faq.html", "getting-started.html"):
            opened = open_page(name, viewport={"width": 390, "height": 844})
            assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390, name
