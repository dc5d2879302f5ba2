"""Exporting a run: all of its SAEs or none, and nothing of anybody else's replaced."""

from pathlib import Path

import pytest
import torch
from sae_samples import N, make_sae

from unbraid import formats
from unbraid.errors import FormatError, TrainingError
from unbraid.formats.export import export


def make_run(folder: Path, **architectures: str) -> Path:
    for seed, (name, architecture) in enumerate(architectures.items()):
        formats.save(
            make_sae(architecture, seed=seed),
            folder / "saes" / f"resid_post.{name[1:]}",
            metadata={"hook_name": f"blocks.{name[1:]}.hook_resid_post"},
            frequency_N=torch.full((N,), 0.25),
        )
    (folder / "config.json").write_text("{}")
    (folder / "summary.json").write_text("{}")
    return folder


@pytest.mark.parametrize("layout", ["sae_lens", "dictionary_learning", "sparsify"])
def test_every_sae_of_a_run_is_exported_under_its_name(layout: str, tmp_path: Path, x):
    run = make_run(tmp_path / "run", _1="topk", _2="topk")
    written = export(run, layout, tmp_path / "out")
    assert [path.name for path in written] == ["resid_post.1", "resid_post.2"]
    for path in written:
        found = formats.open_folder(path)
        assert found.layout == layout
        assert torch.equal(found.sae.encode(x), formats.load(run / "saes" / path.name).encode(x))


def test_frequencies_survive_an_export_to_the_layout_that_stores_them(tmp_path: Path):
    (written,) = export(make_run(tmp_path / "run", _1="relu"), "sae_lens", tmp_path / "out")
    torch.testing.assert_close(formats.open_folder(written).log10_frequency_N, torch.full((N,), 0.25).log10())


def test_one_sae_folder_can_be_exported_too(tmp_path: Path):
    run = make_run(tmp_path / "run", _1="relu")
    (written,) = export(run / "saes" / "resid_post.1", "dictionary-learning", tmp_path / "out")
    assert formats.open_folder(written).layout == "dictionary_learning"


def test_one_sae_the_layout_cannot_hold_stops_the_export_before_anything_is_written(tmp_path: Path):
    run = make_run(tmp_path / "run", _1="topk", _2="relu")
    with pytest.raises(FormatError, match=r"resid_post\.2: architecture is 'relu'"):
        export(run, "sparsify", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_without_finished_saes_is_refused(tmp_path: Path):
    (tmp_path / "saes").mkdir()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TrainingError, match=r"is not complete .*`unbraid resume"):
        export(tmp_path, "sae_lens", tmp_path / "out")


def test_a_run_killed_before_its_last_sae_was_written_is_not_exported_in_part(tmp_path: Path):
    run = make_run(tmp_path / "run", _1="relu")
    (run / "summary.json").unlink()
    with pytest.raises(TrainingError, match=r"is not complete \(no summary\.json\)"):
        export(run, "sae_lens", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_things_in_it_is_never_replaced(tmp_path: Path):
    home = tmp_path / "home"
    (home / "thesis").mkdir(parents=True)
    (home / "cfg.json").write_text("{}")
    with pytest.raises(FormatError, match="thesis"):
        formats.save(make_sae("relu"), home)
    assert (home / "thesis").is_dir()
