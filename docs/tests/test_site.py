"""The built site in a browser: nothing fails, nothing comes from elsewhere, and what readers use works."""

import re
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

SITE = Path(__file__).parents[2] / "build" / "site"
FOUND = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
PAGES = [name for name in FOUND if not name.startswith(("_static/", "benchmarks/report/"))]
WRITTEN = [name for name in PAGES if not name.startswith("_modules/")]
"""All but the listings of code."""
REPORT = "benchmarks/report/index.html"
DRAWN = (
    "((window.jQuery && jQuery('#main-graph').data('plot')?.getData()) || [])"
    ".flatMap(line => line.data).filter(point => point[1] != null).length"
)
"""The number of points in a plot of the report."""

CONTENT = "main"
RAW = re.compile(r"\$\$|\\begin\{|\\frac|\{eq\}|:::|^```", re.MULTILINE)
"""What a page shows where its source was not understood."""
TEXT = (
    "it => { const copy = it.cloneNode(true);"
    " copy.querySelectorAll('pre, code, .katex').forEach(one => one.remove()); return copy.innerText }"
)
"""The text of a page without code, in which source is shown as it is on purpose."""
NAMELESS = "pictures => pictures.filter(one => !(one.alt || '').trim()).map(one => one.outerHTML)"
"""The pictures without an alternative text."""


@pytest.fixture
def page(desktop):
    """Return a page on a desk whose troubles are kept in `troubles` and whose requests in `addresses`."""
    yield from opened(desktop)


@pytest.fixture
def small_page(phone):
    """Return such a page on a phone."""
    yield from opened(phone)


def opened(context):
    """Yield a new page that keeps what goes wrong."""
    one = context.new_page()
    one.troubles, one.addresses = [], []
    one.on("console", lambda message: one.troubles.append(message.text) if message.type == "error" else None)
    one.on("pageerror", lambda error: one.troubles.append(str(error)))
    one.on("requestfailed", lambda request: one.troubles.append(f"failed: {request.url}"))
    one.on("response", lambda answer: one.troubles.append(f"{answer.status}: {answer.url}") if not answer.ok else None)
    one.on("request", lambda request: one.addresses.append(request.url))
    yield one
    one.close()


def elsewhere(page, address):
    """Return the requests to other hosts."""
    return [url for url in page.addresses if not url.startswith((address, "data:", "blob:"))]


def search(page, address, words):
    """Return the links that a search finds."""
    page.goto(f"{address}search.html?q={words}", wait_until="networkidle")
    page.wait_for_selector("#search-results li a", timeout=10_000)
    return page.eval_on_selector_all("#search-results li a", "links => links.map(link => link.href)")


class Visit(NamedTuple):
    """What was seen of a page, opened once on a desk and, if somebody wrote it, at the same time on a phone."""

    troubles: list[str]
    elsewhere: list[str]
    nameless: list[str]
    text: str
    width: int | None


@pytest.fixture(scope="module")
def visit(request, windows, address, shot):
    """Open the page of the parameter and return what was seen."""
    name = request.param
    with contextmanager(opened)(windows[0]) as page, contextmanager(opened)(windows[1]) as small_page:
        page.goto(address + name, wait_until="commit")
        if name in WRITTEN:
            small_page.goto(address + name, wait_until="networkidle")
            shot(small_page, "phone", name)
        page.wait_for_load_state("networkidle")
        shot(page, "desktop", name)
        return Visit(
            page.troubles,
            elsewhere(page, address),
            page.eval_on_selector_all("img", NAMELESS),
            page.eval_on_selector(CONTENT, TEXT),
            small_page.evaluate("document.documentElement.scrollWidth") if name in WRITTEN else None,
        )


@pytest.mark.parametrize("visit", PAGES, indirect=True)
def test_a_page_loads_without_an_error_and_from_here_alone(visit):
    assert visit.troubles == []
    assert visit.elsewhere == []


@pytest.mark.parametrize("visit", WRITTEN, indirect=True)
def test_a_page_does_not_scroll_sideways_on_a_phone(visit):
    assert visit.width == 390


@pytest.mark.parametrize("visit", WRITTEN, indirect=True)
def test_every_picture_has_an_alternative_text(visit):
    assert visit.nameless == []


@pytest.mark.parametrize("visit", WRITTEN, indirect=True)
def test_no_source_of_a_formula_or_of_a_directive_is_shown(visit):
    assert RAW.findall(visit.text) == []


@pytest.mark.parametrize("name", ["specification.html", "methods.html"])
def test_formulas_are_drawn_in_their_own_fonts(page, address, name):
    page.goto(address + name, wait_until="networkidle")
    assert page.locator(".katex").count() > 10
    assert page.locator(".katex-error").count() == 0
    assert page.evaluate("document.fonts.check('16px KaTeX_Main')")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("key_mask", r"api/operation\.html"),
        ("sorted", r"methods\.html"),
        ("insert_nonlocal", r"api/torch\.html"),
        ("softmax", r"specification\.html"),
    ],
)
def test_the_search_finds_the_page_on_a_word(page, address, words, found):
    links = search(page, address, words)
    assert any(re.search(found, link) for link in links), links
    assert page.troubles == []
    assert elsewhere(page, address) == []


def test_a_choice_of_framework_is_that_of_every_set_of_tabs_and_of_every_page(page, address):
    page.goto(f"{address}index.html", wait_until="networkidle")
    page.locator("label.sd-tab-label", has_text="JAX").first.click()
    chosen = "input:checked + label.sd-tab-label[data-sync-id='jax']"
    assert page.locator(chosen).count() == page.locator(".sd-tab-set").count()
    page.goto(f"{address}install.html", wait_until="networkidle")
    assert page.locator(chosen).count() == page.locator(".sd-tab-set").count() > 0


def test_the_theme_can_be_chosen_and_is_kept(page, address):
    page.goto(f"{address}index.html", wait_until="networkidle")
    theme, paper = "document.documentElement.dataset.theme", "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(theme) == "light"
    light = page.evaluate(paper)
    page.locator(".theme-switch-button:visible").click()
    page.locator(".theme-change-button[data-mode='dark']:visible").click()
    page.goto(f"{address}install.html")
    assert page.evaluate(theme) == "dark"
    assert page.evaluate(paper) != light


def test_the_parts_of_the_site_stand_in_the_top_bar(page, address):
    page.goto(f"{address}index.html")
    names = page.locator(".bd-header .navbar-nav .nav-link:visible").all_text_contents()
    parts = ["Start", "Guides", "Specification", "Methods", "Conformance", "Benchmarks", "API", "Contributing"]
    assert [name.strip() for name in names] == parts


def test_the_menu_of_a_phone_leads_to_the_parts(small_page, address):
    small_page.goto(f"{address}index.html", wait_until="networkidle")
    small_page.locator(".primary-toggle").click()
    small_page.locator("#pst-primary-sidebar-modal").get_by_role("link", name="Methods", exact=True).click()
    small_page.wait_for_url(f"{address}methods.html")


def test_the_report_of_the_benchmarks_opens_from_its_page(page, address, shot):
    page.goto(f"{address}benchmarks.html")
    page.locator(f"a[href='{REPORT}']").first.click()
    page.wait_for_selector("#summarygrid-display a", timeout=20_000)
    page.wait_for_load_state("networkidle")
    shot(page, "desktop", REPORT)
    assert page.troubles == []
    assert elsewhere(page, address) == []


def test_every_view_of_the_report_draws_something(page, address):
    page.goto(f"{address}benchmarks.html")
    views = page.eval_on_selector_all(f"a[href^='{REPORT}#']", "links => links.map(link => link.href)")
    assert views
    for view in views:
        page.goto("about:blank")
        page.goto(view)
        page.wait_for_function(f"{DRAWN} > 1", timeout=20_000)
    assert page.troubles == []


def test_a_fault_of_a_page_is_seen(page, address):
    page.goto(f"{address}index.html")
    page.evaluate("console.error('broken'); document.head.append(Object.assign(new Image(), {src: 'none.png'}))")
    page.wait_for_load_state("networkidle")
    assert "broken" in page.troubles
    assert any(trouble.endswith("none.png") for trouble in page.troubles)
