"""The live page in a real browser: hostile text stays text, the keyboard suffices, nothing leaves the origin."""

import shutil
import socket
import threading

import pytest
from feature_models import random_feature_model, random_sae

pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")
playwright = pytest.importorskip("playwright.sync_api")

from unbraid.feature_model.live.server import build_app  # noqa: E402
from unbraid.feature_model.live.session import Session  # noqa: E402

CHROMIUM = shutil.which("chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"]
HOSTILE = "<script>window.bitten = true</script><img src=x onerror='window.bitten = true'>\u202e</div>"
SITE = "resid_post.0"
WAIT = 60_000

pytestmark = [
    pytest.mark.browser,
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium; `make test` installs it where it may"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def address():
    text = ["kate bola mima", HOSTILE * 2, "zuka pali roda"]
    saes = {SITE: random_sae(0), f"{SITE}_twin": random_sae(3)}
    fm = random_feature_model(saes=saes, sites={f"{SITE}_twin": SITE}, twins={SITE: f"{SITE}_twin"}, text=text)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(build_app(Session(fm, "runs/tiny"), port, "s3cret"), log_level="error"))
    worker = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    worker.start()
    yield f"http://127.0.0.1:{port}/#k=s3cret"
    server.should_exit = True
    worker.join()
    listener.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    page = browser.new_page()
    page.set_default_timeout(120_000)
    page.set_default_timeout(WAIT)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("#tokens .token[aria-pressed=true]")
    yield page
    origin = address.partition("/#")[0]
    assert not said and all(url.startswith(origin + "/") and "s3cret" not in url for url in asked)
    assert page.evaluate("window.bitten") is None and "s3cret" not in page.evaluate("location.href")
    page.close()


def read(page, prompt: str) -> None:
    page.fill("#prompt", prompt)
    page.click("#read")
    page.wait_for_selector("#tokens:not(.asked)")


def finished(page) -> None:
    page.wait_for_selector("#state:text-is('done')")


def test_hostile_prompts_and_tokens_are_text(page):
    read(page, HOSTILE)
    assert page.text_content("#tokens").replace("⟨U+202E⟩", "\u202e").endswith(HOSTILE)
    page.click("#steer")
    finished(page)
    page.click("#attribute button")
    page.wait_for_selector("#contributions table")
    assert page.locator("main script, main img").count() == 0
    assert "fm.attribute" in page.text_content("#python")


def test_a_slider_at_0_gives_the_plain_text_and_moved_another(page):
    page.fill("#count", "12")
    page.click("#features button >> nth=0")
    page.wait_for_selector("#sliders input")
    page.click("#steer")
    finished(page)
    plain = page.text_content("#plain")
    assert plain and page.text_content("#steered") == plain
    page.fill("#sliders input[type=range]", "3")
    page.evaluate("document.querySelector('#sliders input').dispatchEvent(new Event('change'))")
    page.wait_for_selector("#python:has-text('3.0)')")
    finished(page)
    assert page.text_content("#plain") == plain != page.text_content("#steered")
    assert page.locator("#next tr").count() > 3 and page.locator("#partners input").count() > 0
    page.check("#partners input >> nth=0")
    page.wait_for_selector("#python:has-text('without=')")


def test_a_generation_is_cancelled_in_mid_stream(page):
    page.fill("#count", "256")
    # The page itself cancels at the first text: a click from outside may come when all of it is there.
    page.evaluate("""() => {
        const plain = document.querySelector("#plain");
        new MutationObserver((_, watcher) => {
            if (!plain.textContent) return;
            watcher.disconnect();
            document.querySelector("#cancel").click();
        }).observe(plain, {childList: true, subtree: true, characterData: true});
    }""")
    page.click("#steer")
    page.wait_for_selector("#state:text-is('cancelled')")
    page.fill("#count", "2")
    page.click("#steer")
    finished(page)


def test_the_keyboard_suffices(page):
    page.focus("#prompt")
    page.keyboard.press("Control+A")
    page.keyboard.type("zuka pali")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#tokens:has-text('zuka pali')")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    page.focus("#theme")
    before = page.evaluate("document.documentElement.dataset.theme")
    page.keyboard.press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") != before


def test_a_link_from_the_dashboard_leads_to_its_feature(browser, address):
    page = browser.new_page()
    page.set_default_timeout(120_000)
    page.set_default_timeout(WAIT)
    page.goto(f"{address}&feature={SITE}_twin%2F3")
    page.get_by_label(f"by how much to steer {SITE}_twin/3").wait_for()
    assert page.locator("#sae").input_value() == f"{SITE}_twin"
    assert "s3cret" not in page.evaluate("location.href")
    page.close()


def test_without_the_secret_the_page_says_so(browser, address):
    page = browser.new_page()
    page.set_default_timeout(120_000)
    page.goto(address.partition("#")[0])
    page.wait_for_selector("#problem:not([hidden])")
    assert "secret" in page.text_content("#problem")
    page.close()
