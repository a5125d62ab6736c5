"""The built site on a server of this machine, in a browser."""

import functools
import os
import shutil
import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

SITE = Path(__file__).parents[2] / "build" / "site"
SHOTS = Path(__file__).parents[2] / "build" / "screenshots"


PATIENCE = 20_000
"""The milliseconds that a page may take."""

DESKTOP = {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"}
PHONE = {
    "viewport": {"width": 390, "height": 844},
    "is_mobile": True,
    "has_touch": True,
    "device_scale_factor": 1,
    "color_scheme": "dark",
}


class Quiet(SimpleHTTPRequestHandler):
    """A server that reports nothing and lets the browser keep nothing."""

    def log_message(self, *_):
        """Say nothing."""

    def end_headers(self):
        """Forbid the browser to keep the file."""
        self.send_header("Cache-Control", "no-store")
        super().end_headers()


@pytest.fixture(scope="session")
def address():
    """Serve the site and return its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def browser():
    """Start Chromium."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("there is no browser: `apt-get install chromium`, or name one in CHROMIUM", pytrace=False)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


@contextmanager
def window(browser, options):
    """Open a browser window."""
    with browser.new_context(**options) as context:
        context.set_default_timeout(PATIENCE)
        yield context


@pytest.fixture
def desktop(browser):
    """Return a browser window as on a desk, in the light theme."""
    with window(browser, DESKTOP) as context:
        yield context


@pytest.fixture
def phone(browser):
    """Return a browser window as on a phone, in the dark theme."""
    with window(browser, PHONE) as context:
        yield context


@pytest.fixture(scope="session")
def windows(browser):
    """Return such windows, a desk's and a phone's, for pages that are only looked at."""
    with window(browser, DESKTOP) as desktop, window(browser, PHONE) as phone:
        yield desktop, phone


@pytest.fixture(scope="session")
def shot():
    """Return a function that keeps a picture of a page, if SCREENSHOTS is set."""

    def take(page, folder, name):
        if not os.environ.get("SCREENSHOTS"):
            return
        path = SHOTS / folder / f"{name.replace('/', '-').removesuffix('.html')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=path, full_page=True)

    return take
