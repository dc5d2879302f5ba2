"""Make the pictures in docs/img from the dashboard of a run, in Chromium, light and dark, and time its pages.

python docs/screenshots.py RUN

Pictures have 128 colours: what is left is a third of the size and looks the same. Needs `chromium` on the path.
"""

import io
import shutil
import sys
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, ViewportSize, sync_playwright

IMAGES = Path(__file__).parent / "img"
SIZE: ViewportSize = {"width": 1280, "height": 860}
MOST_REDUCED = """() => {
  const reduction = (sae) => sae.metrics.correlation_reduction ?? -1;
  const saes = unbraid.run().saes;
  return saes.indexOf(saes.reduce((a, b) => (reduction(b) > reduction(a) ? b : a)));
}"""


def visit(page: Page, path: str) -> float:
    """Open a page of the site by its path; milliseconds until it is drawn."""
    began = time.perf_counter()
    page.evaluate("path => { location.hash = '#' + path }", path)
    page.wait_for_selector(f"body[data-ready='{path}']")
    return 1000 * (time.perf_counter() - began)


def picture(page: Page, name: str) -> None:
    """What the window shows, as docs/img/NAME.png."""
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(128)
    image.save(IMAGES / f"{name}.png", optimize=True)


def main(run: Path) -> None:
    """All pictures of the dashboard in `run`/report."""
    index = (run / "report" / "index.html").resolve()
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport=SIZE, color_scheme=scheme)
            page.goto(index.as_uri())
            page.wait_for_selector("body[data-ready='/']")
            picture(page, f"overview-{scheme}")
            sae = page.evaluate(MOST_REDUCED)
            visit(page, f"/{sae}/pairs")
            page.get_by_role("button", name="change").click()
            page.get_by_role("button", name="change").click()
            picture(page, f"pairs-{scheme}")
            page.locator("tbody a").first.click()
            page.wait_for_selector(f"body[data-ready^='/{sae}/pair/']")
            picture(page, f"pair-{scheme}")
            page.locator("h1 a").first.click()
            page.wait_for_selector(f"body[data-ready^='/{sae}/feature/']")
            picture(page, f"feature-{scheme}")
            n_features = page.evaluate(f"unbraid.run().saes[{sae}].features")
            taken = sorted(visit(page, f"/{sae}/feature/{at * n_features // 50}") for at in range(50))
            middle, worst = taken[len(taken) // 2], taken[-1]
            print(f"{scheme}: feature pages open in {middle:.0f} ms (median of {len(taken)}, {worst:.0f} at most)")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
