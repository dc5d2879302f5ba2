"""export, compare and dashboard as a user types them, on a real (very short) run."""

import json
import re
import shutil
from itertools import chain
from pathlib import Path

import pytest

from unbraid import formats
from unbraid.cli import main
from unbraid.errors import ConfigError
from unbraid.evaluation.said import text_settings
from unbraid.recipes import tiny
from unbraid.run import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny()
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"sites": ["resid_post.0"]}),
            "training": config.training.model_copy(update={"tokens": 8 * 256, "held_out_tokens": 512}),
        }
    )
    return train(config, tmp_path_factory.mktemp("runs") / "tiny").path


def test_export_names_what_it_wrote_and_it_loads(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["export", str(run), "--to", "dictionary-learning", "--out", str(tmp_path / "out")])
    written = capsys.readouterr().out.split()
    assert [Path(path).name for path in written] == ["resid_post.0_decorrelated", "resid_post.0_twin"]
    assert formats.open_folder(written[0]).layout == "dictionary_learning"
    with pytest.raises(SystemExit):
        main(["export", str(run), "--to", "sparsify", "--out", str(tmp_path / "none")])
    assert "architecture is 'relu'" in capsys.readouterr().err


def test_compare_prints_a_row_a_point_and_where_the_figure_is(run: Path, tmp_path: Path, capsys):
    main(["compare", str(run), "--out", str(tmp_path / "comparison")])
    printed = capsys.readouterr().out
    assert len(re.findall(r"resid_post\.0 .*lambda2 0\.[01]", printed)) == 2
    assert (tmp_path / "comparison" / "frontier.png").is_file()


def test_dashboard_writes_every_feature_and_pair_of_every_sae_and_replaces_only_its_own(run, tmp_path, capsys):
    main(["dashboard", str(run), "--tokens", "600"])
    report = run / "report"
    assert str(report / "index.html") in capsys.readouterr().out.replace("\n", "")
    first = json.loads(read(report / "data" / "run.js"))
    assert [sae["name"] for sae in first["saes"]] == ["resid_post.0_decorrelated", "resid_post.0_twin"]
    assert [sae["twin"] for sae in first["saes"]] == [1, None]
    assert first["steps"] == {"planned": 8, "executed": 8} and first["rows"] >= 600
    for index in (0, 1):
        table = json.loads(read(report / "data" / str(index) / "features.js"))
        chunks = [json.loads(read(report / "data" / str(index) / f"feature-{number}.js")) for number in range(4)]
        assert len(table["fires"]) == sum(map(len, chunks)) == 128
        for count, page in zip(table["fires"], chain.from_iterable(chunks), strict=True):
            assert sum(page["histogram"]) == count
            assert len(page["raised"]) == 8
        assert len(json.loads(read(report / "data" / str(index) / "pairs.js"))) == first["saes"][index]["pairs"] > 0
    main(["dashboard", str(run), "--tokens", "600"])
    assert not list(run.glob(".report*"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(SystemExit):
        main(["dashboard", str(run), "--out", str(tmp_path / "mine")])
    assert "holds thesis.txt, which unbraid did not write" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").exists()
    site = tmp_path / "site"
    main(["dashboard", str(run), "--tokens", "600", "--out", str(site)])
    with pytest.raises(SystemExit):
        main(["dashboard", str(run), "--tokens", "600", "--out", str(site)])
    assert "add --overwrite" in capsys.readouterr().err
    main(["dashboard", str(run), "--tokens", "600", "--out", str(site), "--overwrite"])


def test_dashboard_of_an_sae_from_elsewhere_takes_its_model_site_and_text(
    run: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (sae,) = (run / "saes").glob("*_decorrelated")
    shutil.copytree(sae, tmp_path / "mine")
    config = json.loads((tmp_path / "mine" / "cfg.json").read_text())
    model = config["metadata"].pop("model_name")
    config["metadata"].pop("hook_name")
    (tmp_path / "mine" / "cfg.json").write_text(json.dumps(config))
    (tmp_path / "texts").mkdir()
    for number in range(60):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"A quokka sat on wall {number} and looked at the sea. " * 20)
    words = ["dashboard", "mine", "--tokens", "300", "--text", "texts"]
    with pytest.raises(SystemExit):
        main(words)
    assert "does not say which model" in capsys.readouterr().err
    main([*words, "--model", model, "--site", "resid_post.0"])
    report = tmp_path / "dashboards" / "mine"
    first = json.loads(read(report / "data" / "run.js"))
    assert first["name"] == "SAE mine" and first["text"] == "files texts" and first["steps"] is first["figure"] is None
    assert [(sae["name"], sae["site"], sae["twin"]) for sae in first["saes"]] == [("mine", "resid_post.0", None)]
    assert first["commands"] == {"serve": "unbraid dashboard mine --serve", "live": ""}
    assert "quokka" in "".join(json.loads(read(report / "data" / "text-0.js"))[0])
    with pytest.raises(SystemExit):
        main([*words, "--model", model, "--site", "resid_post.0"])
    assert "add --overwrite" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "--serve"])
    assert "--text would do nothing" in capsys.readouterr().err


def test_what_a_run_says_itself_is_not_taken_from_the_command_line(run: Path, capsys):
    for given in (["--site", "resid_post.0"], ["--text", "packaged"], ["--model", "gpt2"]):
        with pytest.raises(SystemExit):
            main(["dashboard", str(run), *given])
        assert f"{given[0][2:]} was given for" in capsys.readouterr().err


@pytest.mark.parametrize("text", [[], ["packaged", "a.txt"], ["hub:a", "hub:b"], [""]])
def test_texts_of_several_kinds_are_refused(text: list[str]):
    with pytest.raises(ConfigError, match="expected packaged, hub:NAME, or files"):
        text_settings(text)


@pytest.mark.parametrize("command", ["export", "compare"])
def test_a_second_export_or_comparison_replaces_the_first_only_when_told_to(run: Path, tmp_path: Path, capsys, command):
    to = ["--to", "sae_lens"] if command == "export" else []
    words = [command, str(run), *to, "--out", str(tmp_path / "out")]
    main(words)
    with pytest.raises(SystemExit):
        main(words)
    assert "add --overwrite" in capsys.readouterr().err
    main([*words, "--overwrite"])
    mine = next(path.parent for path in (tmp_path / "out").rglob("cfg.json")) if to else tmp_path / "out"
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        main([*words, "--overwrite"])
    assert "holds notes.txt, which unbraid did not write" in capsys.readouterr().err
    assert (mine / "notes.txt").read_text() == "mine"


def read(script: Path) -> str:
    """The JSON value a data script hands over."""
    text = script.read_text(encoding="ascii")
    return text[text.index(",") + 1 : text.rindex(")")]
