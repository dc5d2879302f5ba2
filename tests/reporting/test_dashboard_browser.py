"""The dashboard in a real browser, from a file:// address: ten thousand features, keyboard, and text that bites."""

import csv
import http.client
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
    placed = {name: ((0,), sae) for name, sae in saes.items()}
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
    page.set_default_timeout(120_000)
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
    change = [abs(float(text.replace(MINUS, "-"))) for text in page.locator("tbody td:nth-child(2)").all_inner_texts()]
    match = [float(text) for text in page.locator("tbody td:nth-child(9)").all_inner_texts()]
    assert list(zip(change, match, strict=True)) == sorted(
        zip(change, match, strict=True), key=lambda row: (row[1] < 0.5, -row[0])
    ), "what changed most comes first"
    page.get_by_role("button", name="together").click()
    column = [int(text.replace(",", "")) for text in page.locator("tbody td:nth-child(6)").all_inner_texts()]
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
    page.set_default_timeout(120_000)
    page.goto((copy / "index.html").as_uri())
    page.wait_for_selector("body[data-ready='/']")
    for number, problem in ((0, "damaged"), (1, "missing")):
        go(page, f"/{number}/features")
        assert problem in page.get_by_role("alert").inner_text()
    context.close()


@pytest.fixture
def served(browser, site: Path, tmp_path: Path):
    """A page of the served dashboard, its server and its labels file; nothing may have complained or been bitten."""
    labels = tmp_path / "labels.json"
    running: list[str] = []
    with serve(site / "index.html", labels=labels, live=lambda: running[0] if running else None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        context = browser.new_context(viewport={"width": 1280, "height": 800})
        page = context.new_page()
        page.set_default_timeout(120_000)
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        try:
            page.goto(server.url)
            page.wait_for_selector("body[data-ready='/']")
            assert server.secret not in page.url, "the secret leaves the address bar"
            yield SimpleNamespace(page=page, server=server, labels=labels, running=running)
            assert page.evaluate("window.bitten") is None
            assert not complaints
        finally:
            context.close()
            server.shutdown()
            thread.join()


def test_labels_and_notes_are_kept_in_the_file_found_by_the_search_and_there_after_a_reload(served):
    page = served.page
    go(page, "/0/feature/1234")
    page.get_by_label("Label", exact=True).fill("<b>quokka</b>")
    page.get_by_label("Note").fill("seen\nnear the sea")
    page.get_by_role("button", name="Save", exact=True).click()
    page.get_by_text("saved", exact=True).wait_for()
    kept = json.loads(served.labels.read_text())
    address = f"{NAMES[0]}/1234"
    assert kept["features"] == {address: {"label": "<b>quokka</b>", "note": "seen\nnear the sea"}}
    page.reload()
    page.wait_for_selector("body[data-ready='/0/feature/1234']")
    assert page.get_by_label("Label", exact=True).input_value() == "<b>quokka</b>"
    for words in ("quokka", "near the sea"):
        go(page, "/0/features")
        page.get_by_label("only those that fire").uncheck()
        page.get_by_label("search features").fill(words)
        assert page.locator(".row").first.inner_text().startswith("1234")
        assert "<b>quokka</b>" in page.locator(".row").first.inner_text()
        go(page, "/")
    go(page, "/0/feature/1234")
    page.get_by_label("Label", exact=True).fill("")
    page.get_by_label("Note").fill("")
    page.get_by_role("button", name="Save", exact=True).click()
    page.get_by_text("saved", exact=True).wait_for()
    assert json.loads(served.labels.read_text())["features"] == {}


def test_a_search_that_ends_after_its_page_was_left_does_not_lead_back(served):
    page, held = served.page, []
    page.route("**/text-0.js*", lambda route: held.append(route))
    go(page, "/0/features")
    page.get_by_label("search features").fill("sea")
    while not held:
        page.wait_for_timeout(20)
    go(page, "/")
    with page.expect_response("**/text-0.js*"):
        held.pop().continue_()
    page.wait_for_timeout(500)
    assert page.url.endswith("#/")
    go(page, "/lists")


def test_lists_are_made_of_features_and_of_searches_and_deleted(served):
    page = served.page
    go(page, "/0/feature/7")
    page.get_by_label("name of a new list").fill("a/b <i>odd</i> %")
    page.get_by_role("button", name="Add to list").click()
    page.get_by_label("a/b <i>odd</i> %").wait_for()
    go(page, "/0/features")
    page.get_by_label("only those that fire").uncheck()
    page.get_by_label("search features").fill("123")
    page.get_by_label("name of a list").fill("numbers")
    page.get_by_role("button", name="Keep these features as a list").click()
    page.get_by_text("saved", exact=True).wait_for()
    lists = json.loads(served.labels.read_text())["lists"]
    assert lists["a/b <i>odd</i> %"] == [f"{NAMES[0]}/7"] and f"{NAMES[0]}/1234" in lists["numbers"]
    page.keyboard.press("Escape")
    page.get_by_role("link", name="Lists").click()
    page.get_by_role("link", name="a/b <i>odd</i> %").click()
    page.get_by_role("link", name=f"{NAMES[0]}/7").click()
    page.wait_for_selector("body[data-ready='/0/feature/7']")
    page.get_by_label("a/b <i>odd</i> %").uncheck()
    page.get_by_text("saved", exact=True).wait_for()
    assert json.loads(served.labels.read_text())["lists"]["a/b <i>odd</i> %"] == []
    go(page, "/list/numbers")
    page.get_by_role("button", name="Delete this list").click()
    page.wait_for_selector("body[data-ready='/lists']")
    assert [*json.loads(served.labels.read_text())["lists"]] == ["a/b <i>odd</i> %"]


def test_a_feature_links_to_the_live_page_while_that_runs_and_else_names_the_command(served):
    go(served.page, "/0/feature/7")
    assert "start unbraid live runs/x and choose" in served.page.locator("main").inner_text()
    served.running.append("http://127.0.0.1:4321/#k=" + "s" * 43)
    go(served.page, "/0/feature/8")
    link = served.page.get_by_role("link", name=f"steer {NAMES[0]}/8 there")
    assert link.get_attribute("href") == f"{served.running[0]}&feature={NAMES[0]}%2F8"
    served.running[0] = "javascript:window.bitten = true//#k="
    go(served.page, "/0/feature/9")
    served.page.wait_for_load_state("networkidle")
    assert "start unbraid live runs/x and choose" in served.page.locator("main").inner_text()


def test_a_dashboard_opened_as_a_file_shows_labels_and_says_how_to_write_them(page):
    go(page, "/0/feature/7")
    card = page.locator(".labels").inner_text()
    assert HOSTILE[0] in card and HOSTILE[1] in card and "unbraid dashboard runs/x --serve" in card
    assert page.locator(".labels input, .labels textarea").count() == 0
    assert f"start unbraid live runs/x and choose {NAMES[0]}/7 there" in page.locator("main").inner_text()
    page.keyboard.press("l")
    page.wait_for_selector("body[data-ready='/lists']")
    page.get_by_role("link", name="<b>odd</b>").click()
    page.get_by_role("link", name=f"{NAMES[0]}/7").wait_for()
    assert page.get_by_role("button", name="Delete this list").count() == 0


def test_a_list_and_a_selection_are_saved_as_csv_and_json(page):
    go(page, "/list/%3Cb%3Eodd%3C%2Fb%3E")
    with page.expect_download() as got:
        page.get_by_role("button", name="Save as CSV").click()
    (row,) = csv.DictReader(Path(got.value.path()).read_text(encoding="utf-8").splitlines())
    assert row["feature"] == f"{NAMES[0]}/7" and row["label"] == HOSTILE[0] and row["note"] == HOSTILE[1]
    go(page, "/0/features")
    page.get_by_label("search features").fill("1234")
    page.get_by_label("only those that fire").uncheck()
    with page.expect_download() as got:
        page.get_by_role("button", name="Save as JSON").click()
    saved = json.loads(Path(got.value.path()).read_text(encoding="utf-8"))
    addresses = [one["feature"] for one in saved["features"]]
    assert f"{NAMES[0]}/1234" in addresses and len(addresses) < 200
    assert all(one["fires"] / saved["rows"] == pytest.approx(one["density"]) for one in saved["features"])


def test_a_cell_that_a_spreadsheet_would_run_is_quoted(page):
    page.evaluate("unbraid.labels.all()['resid_post.0_decorrelated/7'].label = '=1+1,\"'")
    go(page, "/list/%3Cb%3Eodd%3C%2Fb%3E")
    with page.expect_download() as got:
        page.get_by_role("button", name="Save as CSV").click()
    (row,) = csv.DictReader(Path(got.value.path()).read_text(encoding="utf-8").splitlines())
    assert row["label"] == "'=1+1,\""


def test_the_search_finds_words_in_contexts_of_a_feature(page):
    go(page, "/0/features")
    page.get_by_label("search features").fill("plain\n")
    page.get_by_label("search features").fill("&lt;b&gt;מימין")
    page.wait_for_function("!document.querySelector('[role=status]').textContent.startsWith('0 of')")
    page.locator(".row").nth(2).click()
    page.wait_for_selector(".context")
    assert any("&lt;b&gt;מימין" in text for text in page.locator(".context").all_inner_texts())
    page.go_back()
    page.wait_for_selector("body[data-ready='/0/features']")
    assert not page.get_by_role("status").inner_text().startswith("0 of"), "the address remembers this search too"
    page.get_by_label("search features").fill("words that stand nowhere")
    assert page.get_by_role("status").inner_text().startswith("0 of")


def test_contexts_stand_under_quarters_and_widen_on_demand(page):
    page.evaluate("location.hash = '#/0/features?sort=fires'")
    page.wait_for_selector(".row")
    page.locator(".row").first.click()
    page.wait_for_selector(".context")
    headings = page.locator("h3").all_inner_texts()
    assert headings[0].startswith("The strongest 8 of ") and len(headings) == 5
    assert headings[1].startswith("Upper quarter of the other ") and "largest code" in headings[1]
    line = page.locator(".context", has=page.locator(".wider")).first
    before = line.locator(".token").count()
    line.get_by_role("button", name="more").click()
    assert line.locator(".token").count() == T > before
    line.get_by_role("button", name="less").click()
    assert line.locator(".token").count() == before


def test_a_feature_leads_to_its_counterpart_in_the_twin(page):
    go(page, "/0/feature/7")
    page.get_by_text("Counterpart in resid_post.0_twin").get_by_role("link").click()
    page.wait_for_selector("body[data-ready^='/1/feature/']")


def test_charts_name_their_axes_and_counts_are_not_drawn_on_a_logarithmic_one(page):
    texts = [card.text_content() for card in page.locator("figure.chart").all()]
    assert all("training step" in text for text in texts)
    (updates,) = [text for text in texts if text.startswith("Successful updates")]
    assert "log scale" not in updates and "200" in updates
    assert page.evaluate("[unbraid.number(-0), unbraid.number(-1e-9), unbraid.number(0)]") == ["0", "-1.00e-9", "0"]


def test_every_page_fits_a_narrow_screen(page):
    page.set_viewport_size({"width": 390, "height": 844})
    for path in ("/", "/0/features", "/0/feature/7", "/0/pairs", "/0/pair/0", "/lists", "/list"):
        go(page, path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
    go(page, "/0/features")
    assert page.locator(".head").first.bounding_box()["width"] <= 390
    shown = page.get_by_role("columnheader").all_inner_texts()
    assert [text.split()[0] for text in shown if text] == ["feature", "top", "label", "fires"]


REQUESTS = {
    "no secret": {"Authorization": None},
    "another secret": {"Authorization": "Bearer x"},
    "another origin": {"Origin": "http://example.com"},
    "another host": {"Host": "example.com"},
}


@pytest.mark.parametrize("method", ["GET", "POST", "LIVE"])
@pytest.mark.parametrize("wrong", REQUESTS.values(), ids=[*REQUESTS])
def test_labels_are_given_and_changed_only_for_requests_that_pass_every_check(site, tmp_path, method, wrong):
    file = tmp_path / "labels.json"
    status, _ = ask(site, file, method, wrong)
    assert status == 403 and not file.exists()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "the body "),
        (b"[]", "no JSON object"),
        (b"\xff", "not UTF-8"),
        (b'{"feature": "x/1"}', "not understood"),
        (b'{"feature": "x", "label": "", "note": "a"}', "expected NAME/index"),
        (b'{"feature": "x/1", "label": 3, "note": ""}', "is no text"),
        (b'{"list": " ", "members": []}', "has no name"),
        (b'{"list": "a", "members": ["x/1", "y"]}', "something other than features"),
        (b'{"list": "a", "members": 3}', "is no list"),
        (b'{"feature": "x/1", "label": "' + b"x" * 201 + b'", "note": ""}', "at most 200"),
    ],
)
def test_a_change_that_is_none_is_refused_and_writes_nothing(site: Path, tmp_path: Path, body: bytes, said: str):
    file = tmp_path / "labels.json"
    status, answer = ask(site, file, "POST", {}, body)
    assert status == 400 and said in answer["error"] and not file.exists()


def test_labels_of_somebody_else_are_not_replaced(site: Path, tmp_path: Path):
    file = tmp_path / "labels.json"
    file.write_text('{"features": {}, "lists": {}}')
    status, answer = ask(site, file, "POST", {})
    assert status == 400 and "was not written by unbraid" in answer["error"]
    assert file.read_text() == '{"features": {}, "lists": {}}'
    file.write_text('{"features": 3}')
    with pytest.raises(UnbraidError, match="features is no object"):
        serve(site / "index.html", labels=file)
    file.rename(tmp_path / "elsewhere.json")
    file.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UnbraidError, match="symbolic link"):
        serve(site / "index.html", labels=file)
    file.unlink()
    status, answer = ask(site, file, "POST", {})
    assert status == 200 and answer["features"] == {"x/1": {"label": "a", "note": "b"}}
    assert Labels.read(file).to_dict() == answer


def ask(
    site: Path, file: Path, method: str, wrong: dict, body: bytes = b'{"feature": "x/1", "label": "a", "note": "b"}'
):
    """Status and answer of one request for labels, right but for `wrong` headers."""
    with serve(site / "index.html", labels=file) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        host, port = server.server_address[:2]
        headers = {"Authorization": f"Bearer {server.secret}", "Content-Type": "application/json"}
        headers |= {"Host": f"{host}:{port}", "Origin": f"http://{host}:{port}"} | wrong
        connection = http.client.HTTPConnection(host, port, timeout=30)
        named = {name: value for name, value in headers.items() if value is not None}
        path = "/api/live" if method == "LIVE" else "/api/labels"
        connection.request("POST" if method == "POST" else "GET", path, body if method == "POST" else None, named)
        answer = connection.getresponse()
        found = answer.status, json.loads(answer.read())
        connection.close()
        thread.join()
    return found


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
