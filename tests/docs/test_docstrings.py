"""Every public name has an example that runs; the first one trains the run that the others look at."""

import doctest
import os
from pathlib import Path

import pytest
import torch

import unbraid

NAMES = ["train", *(name for name in unbraid.__all__ if name not in ("train", "resume", "recipes")), "resume"]
"""In this order: `resume` changes the run."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("examples"))
    yield
    os.chdir(before)


def examples_of(name: str) -> list[doctest.Example]:
    documented = getattr(unbraid, name)
    return doctest.DocTestParser().get_examples(documented.__doc__ or "", name)


def test_every_public_name_has_an_example():
    assert not [name for name in NAMES if not examples_of(name)]


@pytest.mark.xdist_group("docstrings")
@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_public_name_gives_what_it_says(name: str):
    documented = getattr(unbraid, name)
    module = __import__(documented.__module__, fromlist=["_"])
    known = {"unbraid": unbraid, "torch": torch} | vars(module)
    test = doctest.DocTestParser().get_doctest(documented.__doc__ or "", known, name, None, None)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    said: list[str] = []
    doctest.DocTestRunner(optionflags=flags).run(test, out=said.append)
    assert not said, "".join(said)
