"""The page in headless Chromium: narrow, wide, on paper, light and dark. Skipped where there is no browser.

CHROMIUM=/path/to/chromium pytest tests/test_report_browser.py --screenshots FOLDER     to look at the pictures
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import HOSTILE, make_run
from test_report import AUDIT, SHE

from ciphertune.report.page import write_page

WIDTHS = {"phone": 390, "desktop": 1280}
LONG = "a-lab-with-a-name-of-exactly-sixty-four-characters-which-is-most"

# the contrast of two colours, as WCAG 2.2 defines it
CONTRAST = """
() => {
  const light = c => {
    const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$/.test(c)) return c;
    }
    return 'rgb(255, 255, 255)';
  };
  const found = {};
  for (const e of document.querySelectorAll('h1, h2, h3, p, b, td, th, li, code, figcaption, .pill, svg text')) {
    if (!e.textContent.trim()) continue;
    const style = getComputedStyle(e), colour = e.closest('svg') ? style.fill : style.color;
    const [a, b] = [light(colour), light(behind(e))].sort((x, y) => y - x);
    const key = `${e.closest('svg') ? 'svg text' : e.tagName} ${colour}`;
    found[key] = Math.min(found[key] ?? 99, (a + .05) / (b + .05));
  }
  return found;
}
"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as p:
        names = ("chromium", "chromium-browser", "google-chrome", "chrome")
        path = os.environ.get("CHROMIUM") or next((f for n in names if (f := shutil.which(n))), None)
        path = path or p.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("no Chromium: install it, name it in CHROMIUM, or run `playwright install chromium`")
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> dict[str, Path]:
    """Pages of a run that encrypts some columns, of one with names that are meant to break it, of a failed one."""
    from federations import Lab

    folder = tmp_path_factory.mktemp("runs")
    some = Lab(tmp_path_factory.mktemp("lab"), llama)(f"{SHE} federation.compare_local=true")
    hostile = make_run(folder / "hostile", names=(HOSTILE, LONG, *(f"lab-{k}" for k in range(30))), audit=AUDIT)
    failed = make_run(
        folder / "failed", rounds=None, plan=None, summary={"status": "failed", "reason": f"no {LONG * 5} came"}
    )
    return {name: write_page(run) for name, run in (("some", some), ("hostile", hostile), ("failed", failed))}


@pytest.fixture
def opened(chromium: Any, runs: dict[str, Path]) -> Iterator[Callable[..., Any]]:
    """Open a page; fails the test when it asks for anything, or complains."""
    contexts = []

    def open_(name: str, *, width: int = 1280, scheme: str = "light") -> Any:
        context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        contexts.append(context)
        page, asked, said = context.new_page(), [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.goto(runs[name].as_uri())
        page.wait_for_timeout(50)
        assert [url for url in asked if not url.startswith("data:")] == [runs[name].as_uri()] and said == []
        return page

    yield open_
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["some", "hostile", "failed"])
def test_the_page_fits_its_window_and_everything_can_be_read(
    opened: Callable[..., Any], name: str, width: str, scheme: str, request: pytest.FixtureRequest
) -> None:
    page = opened(name, width=WIDTHS[width], scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width]
    for panel in page.locator("figure, .first > .panel, pre").all():  # squeezed would fit as well
        assert panel.bounding_box()["width"] > min(300, 0.8 * WIDTHS[width])
    ratios = page.evaluate(CONTRAST)
    assert len(ratios) > 5 and {k: v for k, v in ratios.items() if v < 4.5} == {}
    folder = request.config.getoption("--screenshots")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{name}-{width}-{scheme}.png"), full_page=True)


def test_the_first_screen_says_what_was_tuned_what_it_cost_and_what_the_server_saw(opened: Callable[..., Any]) -> None:
    page = opened("some")
    for text in ("Result", "Cost", "Encrypted", "Audit", "Held-out loss against round", "client-3", "all"):
        box = page.get_by_text(text, exact=True).first.bounding_box()
        assert box and box["y"] + box["height"] < 800
    assert page.locator("svg").first.bounding_box()["y"] < 400
    phone = opened("some", width=390)
    box = phone.get_by_text("Held-out loss against round", exact=True).first.bounding_box()
    assert box and box["y"] < 800


def test_on_paper_the_page_is_light_and_nothing_is_cut_off(opened: Callable[..., Any], tmp_path: Path) -> None:
    page = opened("hostile", width=718, scheme="dark")  # A4 without margins
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("document.documentElement.scrollWidth") <= 718
    hidden = "[...document.querySelectorAll('.long')].filter(e => e.scrollHeight > e.clientHeight + 1).length"
    assert page.evaluate(hidden) == 0
    assert {k: v for k, v in page.evaluate(CONTRAST).items() if v < 4.5} == {}
    page.pdf(path=str(tmp_path / "page.pdf"), format="A4")
    assert (tmp_path / "page.pdf").read_bytes()[:5] == b"%PDF-"


def test_the_page_would_not_be_let_out_if_it_asked(opened: Callable[..., Any]) -> None:
    """What Chromium makes of the page's policy: a script and an image that somebody got into it do nothing."""
    page = opened("failed")
    refused = page.evaluate("""async () => {
      const seen = [];
      document.addEventListener('securitypolicyviolation', e => seen.push(e.effectiveDirective));
      const add = (tag, key, value) => {
        const e = document.createElement(tag);
        e[key] = value;
        document.body.append(e);
      };
      add('img', 'src', 'http://127.0.0.1:9/x.png');
      add('script', 'textContent', 'window.ran = 1');
      await new Promise(done => setTimeout(done, 300));
      return [seen.sort(), window.ran];
    }""")
    assert refused[0] == ["img-src", "script-src-elem"] and refused[1] is None
