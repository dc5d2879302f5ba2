"""Make the pictures in docs/img from the dashboard of a run, in Chromium: every page, light, dark and 390 pixels wide.

python docs/screenshots.py RUN

The pages are served, with a copy of the run's labels, so that they show what a reader can write. It also times the
feature pages. Pictures have 128 colours: what is left is a third of the size and looks the same. Needs `chromium` on
the path.
"""

import io
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

from unbraid.reporting.dashboard import serve

IMAGES = Path(__file__).parent / "img"
WIDE: ViewportSize = {"width": 1280, "height": 860}
NARROW: ViewportSize = {"width": 390, "height": 844}
SAE_WITH_A_TWIN = "Math.max(0, unbraid.run().saes.findIndex((sae) => sae.twin !== null))"
LABELLED = "Object.keys(unbraid.labels.all())[0] || null"


def visit(page: Page, path: str) -> float:
    """Open a page of the site by its path; milliseconds until it is drawn."""
    began = time.perf_counter()
    page.evaluate("path => { location.hash = '#' + path }", path)
    page.wait_for_selector(f"body[data-ready='{path}']")
    return 1000 * (time.perf_counter() - began)


def picture(page: Page, name: str) -> None:
    """What the window shows, as docs/img/NAME.png."""
    page.wait_for_load_state("networkidle")
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(128)
    image.save(IMAGES / f"{name}.png", optimize=True)


def pictures(page: Page, ending: str) -> None:
    """Every page of the site; the feature shown is one with a label, if there is one."""
    picture(page, f"overview-{ending}")
    sae = page.evaluate(SAE_WITH_A_TWIN)
    labelled = page.evaluate(LABELLED)
    shown = f"/{sae}/feature/{labelled.rpartition('/')[2] if labelled else 0}"
    for name, path in {
        "features": f"/{sae}/features",
        "feature": shown,
        "pairs": f"/{sae}/pairs",
        "pair": f"/{sae}/pair/0",
        "lists": "/lists",
        "list": "/list",
    }.items():
        visit(page, path)
        picture(page, f"{name}-{ending}")


def opened(browser: Browser, url: str, size: ViewportSize, scheme: str) -> Page:
    """The first page in a window of its own."""
    page = browser.new_page(viewport=size, color_scheme="dark" if scheme == "dark" else "light")
    page.goto(url)
    page.wait_for_selector("body[data-ready='/']")
    return page


def main(run: Path) -> None:
    """All pictures of the dashboard in `run`/report."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        labels = Path(folder) / "labels.json"
        if (run / "labels.json").is_file():
            shutil.copyfile(run / "labels.json", labels)
        with serve(run / "report" / "index.html", labels=labels) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for ending, size in (("light", WIDE), ("dark", WIDE), ("narrow", NARROW)):
                page = opened(browser, server.url, size, ending)
                pictures(page, ending)
                n_features = page.evaluate("unbraid.run().saes[0].features")
                taken = sorted(visit(page, f"/0/feature/{at * n_features // 50}") for at in range(50))
                print(f"{ending}: feature pages open in {taken[25]:.0f} ms (median of 50, {taken[-1]:.0f} at most)")
            browser.close()
            server.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
