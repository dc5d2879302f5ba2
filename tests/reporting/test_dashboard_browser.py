"""The dashboard in a real browser, from a file:// address: ten thousand features, keyboard, and text that bites."""

import json
import re
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from rich.console import Console
from sae_samples import make_sae

from unbraid.activations.rows import Chunk
from unbraid.config import BufferConfig, ModelConfig, RunConfig, TextConfig
from unbraid.errors import UnbraidError
from unbraid.progress import Stages
from unbraid.recipes import WITH_TWIN
from unbraid.reporting.dashboard.build import fill_site
from unbraid.reporting.dashboard.labels import Labels
from unbraid.reporting.dashboard.opening import Shown
from unbraid.reporting.dashboard.serve import serve
from unbraid.reporting.training_log import TrainingLog

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
MINUS = "\N{MINUS SIGN}"
FEATURES, D, T = 10_000, 12, 24
NAMES = ("resid_post.0_decorrelated", "resid_post.0_twin")
HOSTILE = [
    "<script>window.bitten = true</script>",
    "<img src=x onerror='window.bitten = true'>",
    "</span></div></body>",
    "&lt;b&gt;",
    "מימין לשמאל",
    "\u202ereversed\u202c",
    "👩‍🔬🧬",
    "\x00\x07\u2028",
    "'\"`${window.bitten = true}",
    "x" * 100_000,
    " plain",
    "\n",
]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium; `make test` installs it where it may"),
]


class HostileTokenizer:
    def decode(self, ids: list[int], clean_up_tokenization_spaces: bool = False) -> str:
        return "".join(HOSTILE[token % len(HOSTILE)] for token in ids)


class HostileSource:
    """Contexts whose every token tries something, with random activations."""

    widths, context_length, batch_contexts = [D], T, 24
    identity: ClassVar[dict[str, str]] = {"model": "hostile"}
    special_ids = frozenset[int]()

    def __init__(self, config: RunConfig):
        self.sites = config.sites
        self.model = SimpleNamespace(tokenizer=HostileTokenizer(), model=None)

    def chunks(self, position, held_out=False) -> Iterator[Chunk]:
        generator = torch.Generator().manual_seed(0)
        while True:
            tokens = torch.randint(1000, (self.batch_contexts, T), generator=generator)
            yield Chunk(tokens, [torch.randn(self.batch_contexts, T, D, generator=generator)], {})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    config = RunConfig(
        name="<i>run</i>",
        text=TextConfig(context_length=T),
        model=ModelConfig(sites=["resid_post.0"]),
        buffer=BufferConfig(contexts=2),
        variants=WITH_TWIN,
    )
    values = {"tau": 0.3, "correlation_mean": 0.1, "correlation_std": 0.05, "loss": 0.5}
    lines = [{"step": s, "saes": {name: values | {"updates": s} for name in NAMES}} for s in range(1, 400)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = TrainingLog.read(folder / "metrics.jsonl")
    widths = dict(zip(NAMES, (FEATURES, 300), strict=True))
    saes = {name: make_sae("topk", seed=at, n_features=widths[name]) for at, name in enumerate(NAMES)}
    metrics = {name: {"r2": 0.9, "l0": 5.0, "correlation_reduction": None, "steps": {}} for name in NAMES}
    summary = {"steps": {"planned": 399, "executed": 399}, "saes": metrics}
    placed = {name: (0, sae) for name, sae in saes.items()}
    labels = Labels({f"{NAMES[0]}/7": {"label": HOSTILE[0], "note": HOSTILE[1]}}, {"<b>odd</b>": [f"{NAMES[0]}/7"]})
    commands = {"serve": "unbraid dashboard runs/x --serve", "live": "unbraid live runs/x"}
    shown = Shown(config, placed, {NAMES[0]: NAMES[1]}, f"Run {config.name}", summary, log, commands, labels=labels)
    with Stages(Console(quiet=True)) as stages:
        fill_site(folder, shown, HostileSource(config), 3000, torch.device("cpu"), stages)
    return folder


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, site: Path):
    """The first page; after the test, nothing may have complained, reached out, or been bitten."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light")
    page = context.new_page()
    complaints: list[str] = []
    requested: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requested.append(request.url))
    page.goto((site / "index.html").as_uri())
    page.wait_for_selector("body[data-ready='/']")
    yield page
    assert page.evaluate("window.bitten") is None
    assert not complaints
    assert all(url.startswith(("file://", "data:,")) for url in requested)
    context.close()


def go(page, path: str) -> None:
    page.evaluate("path => { location.hash = '#' + path }", path)
    page.wait_for_selector(f"body[data-ready='{path}']")


def test_the_first_page_is_small_and_shows_the_run_with_its_figure(page, site: Path):
    names = re.findall(r'(?:src|href)="([\w./]+)"', (site / "index.html").read_text())
    assert {"app.css", "core.js", "data/run.js"} <= {*names}
    first = [site / name for name in ("index.html", *names)]
    assert sum(path.stat().st_size for path in first) < 300_000
    assert page.locator("h1").inner_text() == "Run <i>run</i>"
    assert page.locator("figure.chart path").count() >= 8
    before = page.locator("figure.chart path").count()
    page.get_by_role("button", name="resid_post.0_twin").click()
    assert page.locator("figure.chart path").count() < before, "an SAE is switched off in every panel"
    page.locator("figure.chart svg").first.focus()
    page.keyboard.press("ArrowLeft")
    assert "resid_post.0_decorrelated 0.3" in page.locator(".readout").first.inner_text()


def test_ten_thousand_features_are_sorted_searched_and_walked_by_keyboard(page):
    page.keyboard.press("f")
    page.wait_for_selector("body[data-ready='/0/features']")
    assert page.locator(".row").count() < 60, "only the rows in view exist"
    page.get_by_label("only those that fire").uncheck()
    assert page.get_by_role("status").inner_text() == "10,000 of 10,000 features"
    page.get_by_role("columnheader", name="density").click()
    column = [float(text) for text in page.locator(".row > span:nth-child(2)").all_inner_texts()[:20]]
    assert column == sorted(column, reverse=True)
    page.get_by_role("columnheader", name="feature").click()
    page.get_by_role("columnheader", name="feature").click()
    assert page.locator(".row").first.inner_text().startswith("0")
    page.keyboard.press("/")
    page.keyboard.type("1234")
    assert page.locator(".row").first.inner_text().startswith("1234")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    page.wait_for_selector("body[data-ready='/0/feature/1234']")
    assert page.locator("h1").inner_text() == "Feature 1234 of resid_post.0_decorrelated"
    page.go_back()
    page.wait_for_selector("body[data-ready='/0/features']")
    assert page.get_by_label("search features").input_value() == "1234", "the address remembers the search"


def test_the_next_feature_is_the_next_one_of_the_table(page):
    go(page, "/0/features")
    second = page.locator(".row").nth(1).get_attribute("href")
    page.locator(".row").first.click()
    page.keyboard.press("j")
    page.wait_for_selector(f"body[data-ready='{second.removeprefix('#')}']")
    page.keyboard.press("k")
    page.wait_for_selector("body:not([data-ready='" + second.removeprefix("#") + "'])")


def test_hostile_text_is_shown_as_text(page):
    page.evaluate("location.hash = '#/0/features?sort=fires'")
    page.wait_for_selector(".row")
    page.locator(".row").first.click()
    page.wait_for_selector(".context")
    assert page.locator("main script, main img").count() == 0
    shown = page.locator("main").inner_text()
    assert "<script>window.bitten = true</script>" in shown
    assert "(100,000 characters)" in shown and "x" * 200 not in shown
    assert "⟨U+202E⟩" in shown and "\u202e" not in shown
    assert "מימין לשמאל" in shown and "👩‍🔬🧬" in shown
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing is pushed off the page"


def test_a_pair_shows_its_twin_and_its_contexts_side_by_side(page):
    page.keyboard.press("p")
    page.wait_for_selector("body[data-ready='/0/pairs']")
    assert "in the twin, resid_post.0_twin" in page.locator("main").inner_text()
    change = [abs(float(text.replace(MINUS, "-"))) for text in page.locator("tbody td:nth-child(7)").all_inner_texts()]
    match = [float(text) for text in page.locator("tbody td:nth-child(9)").all_inner_texts()]
    assert list(zip(change, match, strict=True)) == sorted(
        zip(change, match, strict=True), key=lambda row: (row[1] < 0.5, -row[0])
    ), "what changed most comes first"
    page.get_by_role("button", name="together").click()
    column = [int(text.replace(",", "")) for text in page.locator("tbody td:nth-child(3)").all_inner_texts()]
    assert column == sorted(column, reverse=True) and len(column) > 10
    page.locator("tbody a").first.click()
    page.wait_for_selector("body[data-ready^='/0/pair/']")
    titles = page.locator(".columns h2").all_inner_texts()
    assert titles[1] == "Both, on one token" and titles[0].startswith("Only feature")
    assert page.locator(".columns .context").count() > 0
    assert "correlation in resid_post.0_twin" in page.locator("main").inner_text()
    page.locator("h1 a").first.click()
    page.wait_for_selector("body[data-ready^='/0/feature/']")


def test_an_sae_without_a_twin_says_so(page):
    page.locator("#sae").select_option("1")
    page.wait_for_selector("body[data-ready='/1/features']")
    go(page, "/1/pairs")
    assert "no twin" in page.locator("main").inner_text()


def test_light_and_dark_are_switched_and_remembered(page):
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.keyboard.press("t")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert light != dark
    page.reload()
    page.wait_for_selector("body[data-ready='/']")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark


@pytest.mark.parametrize("path", ["/0/feature/99999", "/9/features", "/0/pair/100000", "/nowhere"])
def test_an_address_that_leads_nowhere_is_said(page, path: str):
    go(page, path)
    assert "cannot be shown" in page.get_by_role("alert").inner_text()


def test_a_damaged_data_file_is_said(browser, site: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(site, copy)
    (copy / "data" / "0" / "features.js").write_text("unbraid.provide(")
    (copy / "data" / "1" / "features.js").unlink()
    context = browser.new_context()
    page = context.new_page()
    page.goto((copy / "index.html").as_uri())
    page.wait_for_selector("body[data-ready='/']")
    for number, problem in ((0, "damaged"), (1, "missing")):
        go(page, f"/{number}/features")
        assert problem in page.get_by_role("alert").inner_text()
    context.close()


def test_the_server_answers_on_loopback_only_and_lists_nothing(site: Path, tmp_path: Path):
    (site.parent / "outside.txt").write_text("not for you")
    with serve(site / "index.html") as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            host, port = server.server_address[:2]
            assert host == "127.0.0.1"
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
                assert b"<title>unbraid</title>" in answer.read()
            for path in ("data/", "../../../../../../etc/passwd", "%2e%2e/%2e%2e/outside.txt"):
                with pytest.raises(urllib.error.HTTPError) as refused:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}")
                refused.value.close()
        finally:
            server.shutdown()
            thread.join()
    with pytest.raises(UnbraidError, match="expected a dashboard"):
        serve(tmp_path / "index.html")
