"""Pages that a script writes from what they describe: the script rewrites its page, or with --check looks at it."""

import sys
from pathlib import Path


def write_or_check(name: str, wanted: str) -> None:
    """Write the page docs/NAME; with --check on the command line, end in an error instead when it is out of date."""
    page = Path(__file__).with_name(name)
    if "--check" not in sys.argv:
        page.write_text(wanted, encoding="utf-8")
    elif not page.is_file() or page.read_text(encoding="utf-8") != wanted:
        sys.exit(f"docs/{name} is out of date; run python {sys.argv[0]}")
