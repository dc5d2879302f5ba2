"""The share of SAELens' registry whose layout has a passing fixture: `python tests/support/registry_share.py`.

Runs the fixtures of every layout and counts the ids of the registry that stand behind those that pass. Needs an
installed sae-lens or `UNBRAID_REGISTRY`.
"""

import subprocess
import sys
from collections import Counter
from pathlib import Path

from unbraid.formats.registry import registry

TESTS = {
    "gemma_scope": ("test_published.py", "test_layout and gemma_scope and not gemma_scope_2"),
    "gemma_scope_2": ("test_published.py", "test_layout and gemma_scope_2"),
    "qwen_scope": ("test_published.py", "test_layout and qwen_scope"),
    "transcoder_set": ("test_published.py", "test_layout and (mwhanna or transcoder_set)"),
    "llama_scope": ("test_published.py", "test_layout and llama_scope and not r1"),
    "llama_scope_r1": ("test_published.py", "test_layout and llama_scope_r1"),
    "connor_rob": ("test_published.py", "test_layout and connor_rob"),
    "linear_layers": ("test_published.py", "test_layout and (goodfire or deepseek)"),
    "sae_lens": ("test_inference_forms.py", "few_bits or norm_per_token or constant_scale"),
    "dictionary_learning": ("test_other_layouts.py", "every_class_of_dictionary_learning"),
}
"""Layout -> the file in tests/formats and the expression that select its fixtures."""


def share(passing: dict[str, bool]) -> tuple[int, int]:
    """(ids whose layout passes, all ids)."""
    entries = list(registry().values())
    return sum(entry.layout is not None and passing.get(entry.layout, False) for entry in entries), len(entries)


def run_fixtures() -> dict[str, bool]:
    """Layout -> whether its fixtures pass; a selection that selects nothing does not."""
    folder, passing = Path(__file__).parents[1] / "formats", {}
    for layout, (file, expression) in TESTS.items():
        command = [sys.executable, "-m", "pytest", "-q", str(folder / file), "-k", expression]
        passing[layout] = subprocess.run(command, capture_output=True, check=False).returncode == 0
    return passing


def main() -> None:
    passing = run_fixtures()
    counts = Counter((entry.loader, entry.layout) for entry in registry().values())
    for (loader, layout), count in counts.most_common():
        state = "not read" if layout is None else "passing" if passing.get(layout) else "FAILING"
        print(f"{loader:28} {layout or '-':20} {count:6,} {state}")
    missing = Counter(
        entry.name.partition("/")[0] for entry in registry().values() if not passing.get(entry.layout or "")
    )
    for release, count in missing.most_common():
        print(f"missing: {release:60} {count:6,}")
    readable, total = share(passing)
    print(f"{readable:,} of {total:,} ids: {readable / total:.2%}")
    sys.exit(readable < 0.95 * total)


if __name__ == "__main__":
    main()
