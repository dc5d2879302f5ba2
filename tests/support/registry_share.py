"""The share of SAELens' registry whose layout has a passing fixture: `python tests/support/registry_share.py`.

Runs the fixtures, then asks of every id of the registry whether all fixtures of its kind passed, in float32, bfloat16
and float16. Needs an installed sae-lens or `UNBRAID_REGISTRY`.
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from unbraid.formats.registry import Entry, registry

FILES = ("test_published.py", "test_inference_forms.py", "test_other_layouts.py")
DTYPES = ("float32", "bfloat16", "float16")


class Kind(NamedTuple):
    """Some ids of a loader.

    Attributes:
        loader: the registry's name of the layout.
        path: what their repository and path match.
        fixtures: what the names of their tests match; each test that matches must pass, and one for each dtype.
    """

    loader: str
    path: str
    fixtures: str


def published(*names: str) -> str:
    return rf"test_layout\[({'|'.join(names)})-"


KINDS = (
    Kind("gemma_3", r"/transcoder.*_affine", published("gemma_scope_2_affine")),
    Kind("gemma_3", r"/transcoder", published("gemma_scope_2_transcoder")),
    Kind("gemma_3", r"/mlp_out", published("gemma_scope_2_mlp")),
    Kind("gemma_3", r"/attn_out", published("gemma_scope_2")),
    Kind("gemma_3", r"/resid_post", published("gemma_scope_2_by_path")),
    Kind("gemma_2", r"/embedding/", published("gemma_scope_embedding")),
    Kind("gemma_2", r"-res/", published("gemma_scope")),
    Kind("gemma_2", r"-att/", published("gemma_scope_attention")),
    Kind("gemma_2", r"-mlp/", published("gemma_scope_mlp")),
    Kind("gemma_2_transcoder", "", published("gemma_scope_transcoder")),
    Kind("qwen_scope", "", published("qwen_scope")),
    Kind("mwhanna_transcoder", "", published("mwhanna")),
    Kind("llama_scope", "", published("llama_scope")),
    Kind("llama_scope_r1_distill", "", published("llama_scope_r1")),
    Kind("connor_rob_hook_z", "", published("connor_rob")),
    Kind("goodfire", "", published("goodfire")),
    Kind("deepseek_r1", "", published("deepseek_r1")),
    # Which architecture or class an id has stands in its own files only, so each must pass.
    Kind("sae_lens", "", r"test_(what_was_stored|a_norm_per_token|transcoders_predict|a_constant_scale)"),
    Kind("dictionary_learning_1", "", rf"test_every_class_of|{published('dictionary_learning_fork')}"),
)


def kind_of(entry: Entry) -> Kind | None:
    """The first kind that an id is one of."""
    place = f"{entry.repository}/{entry.path}"
    kinds = (kind for kind in KINDS if kind.loader == entry.loader and re.search(kind.path, place))
    return next(kinds, None) if entry.layout is not None else None


def passing(outcomes: dict[str, bool]) -> set[Kind]:
    """Kinds whose fixtures all passed, in every dtype."""
    found = set()
    for kind in KINDS:
        tests = {name: passed for name, passed in outcomes.items() if re.match(kind.fixtures, name)}
        if all(tests.values()) and all(any(re.search(rf"\b{dtype}\b", name) for name in tests) for dtype in DTYPES):
            found.add(kind)
    return found


def share(kinds: set[Kind]) -> tuple[int, int]:
    """(ids of these kinds, all ids)."""
    entries = list(registry().values())
    return sum(kind_of(entry) in kinds for entry in entries), len(entries)


def run_fixtures() -> dict[str, bool]:
    """Name of each test of the layouts -> whether it passed; a skipped one did not."""
    folder = Path(__file__).parents[1] / "formats"
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.xml"
        files = [str(folder / file) for file in FILES]
        subprocess.run([sys.executable, "-m", "pytest", "-q", f"--junit-xml={report}", *files], check=False)
        cases = ElementTree.parse(report).iter("testcase")
        return {case.get("name", ""): not list(case.iterfind("*")) for case in cases}


def main() -> None:
    """Print the count, by kind and what is missing; fail below 95 %."""
    kinds = passing(run_fixtures())
    counts = Counter((entry.loader, kind_of(entry)) for entry in registry().values())
    for (loader, kind), count in counts.most_common():
        state = "not read" if kind is None else "passing" if kind in kinds else "FAILING"
        print(f"{loader:28} {'' if kind is None else kind.path:24} {count:6,} {state}")
    releases = Counter(entry.name.partition("/")[0] for entry in registry().values() if kind_of(entry) not in kinds)
    for release, count in releases.most_common():
        print(f"missing: {release:60} {count:6,}")
    readable, total = share(kinds)
    print(f"{readable:,} of {total:,} ids: {readable / total:.2%}")
    sys.exit(readable < 0.95 * total)


if __name__ == "__main__":
    main()
