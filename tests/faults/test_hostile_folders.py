"""A run folder from somewhere else runs no code, reads and writes nothing outside, and ends in no traceback."""

import http.client
import json
import shutil
import threading
from pathlib import Path

import pytest

import unbraid
from unbraid import formats
from unbraid.activations.random_model import random_model
from unbraid.cli import main
from unbraid.config import RunConfig
from unbraid.errors import ConfigError, FormatError, TrainingError, UnbraidError
from unbraid.evaluation.suites import run_suites
from unbraid.recipes import tiny
from unbraid.reporting.dashboard import serve, write_dashboard
from unbraid.training.run_folder import RunFolder, default_run_folder


def short() -> RunConfig:
    config = tiny()
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"sites": ["resid_post.0"]}),
            "training": config.training.model_copy(update={"tokens": 4 * 256, "held_out_tokens": 256}),
        }
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unbraid.train(short(), tmp_path_factory.mktemp("runs") / "run").path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def edit(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def trusting(run: Path) -> None:
    """The same run, said to be of a model in a folder whose code may be run."""
    folder = run.parent / "model"
    model, tokenizer = random_model("llama", "float32", 0)
    model.save_pretrained(folder)  # pyright: ignore
    tokenizer.save_pretrained(folder)
    edit(run / "config.json", lambda data: data["model"].update(name=str(folder), trust_remote_code=True))


@pytest.mark.parametrize("use", [unbraid.resume, run_suites, write_dashboard, lambda run: main(["resume", str(run)])])
def test_the_word_of_a_received_folder_is_not_enough_to_run_a_models_code(run: Path, use, capsys):
    trusting(run)
    (run / "summary.json").unlink()
    with pytest.raises((ConfigError, SystemExit)) as refused:
        use(run)
    said = str(refused.value) + capsys.readouterr().err
    assert "model.trust_remote_code" in said and "by hand" in said


@pytest.mark.parametrize("command", ["resume", "eval", "dashboard"])
def test_code_is_allowed_by_hand_in_that_very_command(run: Path, command: str, capsys):
    trusting(run)
    if command == "resume":
        (run / "summary.json").unlink()
        shutil.rmtree(run / "checkpoints")
    extra = {"eval": ["--suite", "geometry", "--no-controls"], "dashboard": ["--tokens", "200"]}.get(command, [])
    with pytest.raises(SystemExit):
        main([command, str(run), *extra])
    assert "by hand" in capsys.readouterr().err
    main([command, str(run), *extra, "--model.trust_remote_code"])


@pytest.mark.parametrize("command", ["train", "harvest"])
def test_a_settings_file_is_no_hand_either(run: Path, tmp_path: Path, capsys, command: str):
    trusting(run)
    to = ["--run", str(tmp_path / "new")] if command == "train" else ["--cache", str(tmp_path / "cache")]
    with pytest.raises(SystemExit):
        main([command, str(run / "config.json"), *to])
    assert "by hand" in capsys.readouterr().err
    main([command, str(run / "config.json"), *to, "--model.trust_remote_code"])


def test_results_of_a_run_that_was_allowed_to_run_code_are_read_without_a_word(run: Path, tmp_path: Path):
    trusting(run)
    assert unbraid.Run(run).config.model.trust_remote_code
    main(["figure", str(run)])
    main(["compare", str(run), "--out", str(tmp_path / "comparison")])
    main(["export", str(run), "--to", "sae_lens", "--out", str(tmp_path / "out")])


def contents(place: Path) -> dict[Path, bytes]:
    paths = place.rglob("*") if place.is_dir() else [place]
    return {path: path.read_bytes() for path in paths if path.is_file()}


LINKED = [".lock", "metrics.jsonl", "timing.jsonl", "figures", "checkpoints", "saes", "report", "summary.json"]
NESTED = ["figures/figure1.png", "saes/resid_post.0_twin", "saes/resid_post.0_twin/cfg.json", "checkpoints/step_4"]


@pytest.mark.parametrize("name", [*LINKED, "config.json", "evaluation.json", "tracking_id", "tensorboard", *NESTED])
def test_nothing_is_read_or_written_through_a_link(run: Path, tmp_path: Path, name: str):
    victim = tmp_path / "victim"
    place = run / name
    if (place.is_dir() and not place.is_symlink()) or place.exists():
        shutil.move(place, victim)
    else:
        victim.write_text("precious")
    before = {
        path: path.read_bytes() for path in (victim.rglob("*") if victim.is_dir() else [victim]) if path.is_file()
    }
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(victim)
    words = [
        ["resume"],
        ["figure"],
        ["eval", "--suite", "geometry"],
        ["dashboard"],
        ["compare", "--out", str(tmp_path / "c")],
    ]
    words.append(["export", "--to", "sae_lens", "--out", str(tmp_path / "e")])
    for command, *rest in words:
        with pytest.raises(SystemExit):
            main([command, str(run), *rest])
    with pytest.raises(TrainingError, match="symbolic link"):
        RunFolder(run)
    with pytest.raises(TrainingError, match="symbolic link"):
        RunFolder.create(run, short())
    assert contents(victim) == before


def test_an_sae_folder_is_not_read_through_a_link_out_but_through_the_cache_of_the_hub(run: Path, tmp_path: Path):
    sae = run / "saes" / "resid_post.0_twin"
    blobs, snapshot = tmp_path / "models--me--sae" / "blobs", tmp_path / "models--me--sae" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in sae.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    assert formats.load(snapshot).n_features == 128
    (sae / "cfg.json").rename(tmp_path / "private.json")
    (sae / "cfg.json").symlink_to(tmp_path / "private.json")
    with pytest.raises(FormatError, match="link out of its folder"):
        formats.load(sae)


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", "..", "", "a\0b", "x" * 300, "C:\\x"])
def test_a_recipes_name_leads_nowhere_else(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="give --run DIR"):
        default_run_folder(short().model_copy(update={"name": name}))
    with pytest.raises(ConfigError, match="give --run DIR"):
        unbraid.train(short().model_copy(update={"name": name}))
    assert list(tmp_path.iterdir()) == []


SUMMARIES = {
    "list": "[1]",
    "null": '{"saes": null}',
    "numbers": '{"saes": {"resid_post.0_twin": 1}}',
    "text": '{"saes": {"resid_post.0_twin": {"l0": "<script>", "r2": [1]}}}',
    "unknown": '{"saes": {"../../x": {"l0": 1, "r2": 1}}}',
    "huge": '{"saes": {"resid_post.0_twin": {"l0": 1e400, "r2": NaN}}}',
    "deep": "[" * 100_000,
    "binary": "\udcff\udcfe",
}
LINES = {
    "empty": "",
    "cut": '{"saes": {}',
    "lists": "[1]\n[2]\n",
    "numbers": "1\n",
    "null": '{"saes": null, "step": 1}\n',
    "text": '{"saes": "abc", "step": "x"}\n',
    "values": '{"saes": {"resid_post.0_twin": {"loss": "<b>", "tau": [1], "correlation_mean": {}}}, "step": 1}\n',
    "steps": '{"saes": {"resid_post.0_twin": {"loss": 1}}, "step": NaN}\n',
    "infinite": '{"saes": {"resid_post.0_twin": {"loss": Infinity, "tau": -Infinity, "updates": 1}}, "step": 1}\n',
    "tex": '{"saes": {"resid_post.0_$\\\\frac{": {"loss": 1, "updates": 1}}, "step": 1}\n',
    "surrogate": '{"saes": {"resid_post.0_\\ud800": {"loss": 1, "updates": 1}}, "step": 1}\n',
    "nul": '{"saes": {"resid_post.0_\\u0000": {"loss": 1, "updates": 1}}, "step": 1}\n',
    "no sae": '{"saes": {}, "step": 1}\n',
    "other saes": '{"saes": {"a": {"loss": 1}}, "step": 1}\n{"saes": {"b": 1}, "step": 2}\n',
    "steps that fall": '{"saes": {"a": {"loss": 1}}, "step": 1e308}\n{"saes": {"a": {"loss": 2}}, "step": -1e308}\n',
    "deep": "[" * 200_000 + "\n",
    "binary": "\udcff\udcfe\n",
}


def ends_in_a_message(words: list[str]) -> None:
    """Whatever happens, it is no traceback: only what `main` raises on purpose, or nothing."""
    try:
        main(words)
    except SystemExit as ended:
        assert ended.code == 1


@pytest.mark.parametrize("text", SUMMARIES.values(), ids=SUMMARIES)
def test_a_damaged_summary_ends_in_a_message(run: Path, tmp_path: Path, text: str):
    (run / "summary.json").write_text(text, errors="surrogateescape")
    ends_in_a_message(["compare", str(run), "--out", str(tmp_path / "comparison")])
    ends_in_a_message(["export", str(run), "--to", "sae_lens", "--out", str(tmp_path / "out")])
    ends_in_a_message(["resume", str(run)])


@pytest.mark.parametrize("text", LINES.values(), ids=LINES)
def test_a_damaged_log_ends_in_a_message(run: Path, text: str):
    (run / "metrics.jsonl").write_text(text, errors="surrogateescape")
    ends_in_a_message(["figure", str(run)])
    ends_in_a_message(["figure", str(run), "--paper"])


CONFIGS = {
    "list": lambda _data: [],
    "no object": lambda _data: 1,
    "null": lambda data: data | {"sae": None},
    "types": lambda data: data | {"text": [1], "model": "x"},
    "number": lambda data: data | {"seed": 10**400},
    "name": lambda data: data | {"name": "<img src=x onerror=alert(1)>\u202e\ud800"},
    "variants": lambda data: data | {"variants": {"../x": {}}},
    "extra": lambda data: data | {"__class__": "x"},
    "other site": lambda data: data | {"model": data["model"] | {"sites": ["resid_post.5"]}},
}


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS)
def test_damaged_settings_end_in_a_message(run: Path, tmp_path: Path, change):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(change(config)))
    ends_in_a_message(["compare", str(run), "--out", str(tmp_path / "comparison")])
    ends_in_a_message(["dashboard", str(run), "--tokens", "200"])


@pytest.mark.parametrize("name", [".DS_Store", "README.md", ".ipynb_checkpoints/x.json", "Thumbs.db"])
def test_what_others_leave_among_the_saes_is_no_sae(run: Path, tmp_path: Path, name: str):
    (run / "saes" / name).parent.mkdir(exist_ok=True)
    (run / "saes" / name).write_text("x")
    assert sorted(unbraid.Run(run).saes) == ["resid_post.0_decorrelated", "resid_post.0_twin"]
    main(["export", str(run), "--to", "sae_lens", "--out", str(tmp_path / "out")])


def test_an_unfinished_run_has_no_saes_yet(tmp_path: Path):
    RunFolder.create(tmp_path / "run", short())
    with pytest.raises(TrainingError, match=r"is not complete .*unbraid resume"):
        _ = unbraid.Run(tmp_path / "run").saes


def test_a_start_that_failed_does_not_block_the_corrected_command(tmp_path: Path):
    folder = RunFolder.create(tmp_path / "run", short())
    folder.metrics.write_text("{}\n")
    folder.checkpoints.mkdir()
    (folder.path / ".DS_Store").write_text("")
    corrected = short().model_copy(update={"seed": 5})
    assert RunFolder.create(tmp_path / "run", corrected).config == corrected
    assert not folder.metrics.exists(), "nothing of the failed start is left"


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("mine", ["notes.txt", "saes/x/cfg.json", "checkpoints/step_5/state.json", "summary.json"])
def test_a_folder_with_anything_to_lose_is_not_begun_anew(tmp_path: Path, mine: str, marked: bool):
    folder = RunFolder.create(tmp_path / "run", short())
    if not marked:
        (folder.path / ".unbraid.json").unlink()
    (folder.path / mine).parent.mkdir(parents=True, exist_ok=True)
    (folder.path / mine).write_text("mine")
    with pytest.raises(TrainingError, match="exists already"):
        RunFolder.create(tmp_path / "run", short())
    assert (folder.path / mine).read_text() == "mine"


def test_a_folder_with_settings_written_by_hand_is_not_begun_anew(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"seed": 3}')
    with pytest.raises(TrainingError, match="exists already"):
        RunFolder.create(tmp_path / "run", short())


def test_a_start_that_still_goes_on_is_not_begun_anew(tmp_path: Path):
    folder = RunFolder.create(tmp_path / "run", short())
    with folder.lock(), pytest.raises(TrainingError, match="another process"):
        RunFolder.create(tmp_path / "run", short())


@pytest.mark.parametrize("path", ["\0", "x" * 300, "file/run"])
def test_a_place_no_file_can_have_is_a_message(tmp_path: Path, path: str):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="choose another --run"):
        RunFolder.create(f"{tmp_path}/{path}", short())
    with pytest.raises(TrainingError, match="holds no run"):
        RunFolder(f"{tmp_path}/{path}")


@pytest.fixture
def server(tmp_path: Path):
    site = tmp_path / "site"
    (site / "data").mkdir(parents=True)
    (site / "index.html").write_text("<title>unbraid</title>")
    (tmp_path / "secret.txt").write_text("not for you")
    (site / "out.txt").symlink_to(tmp_path / "secret.txt")
    (site / "up").symlink_to(tmp_path)
    with serve(site / "index.html") as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def answer(server, path: str, hosts: list[str], method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1])
    connection.putrequest(method, path, skip_host=True)
    for host in hosts:
        connection.putheader("Host", host.format(port=server.server_address[1]))
    connection.endheaders()
    found = connection.getresponse()
    body = found.read()
    connection.close()
    return found.status, body


@pytest.mark.parametrize("path", ["/out.txt", "/up/secret.txt", "/up/", "/%2e%2e/secret.txt", "/data/"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_server_follows_no_link_out(server, path: str, method: str):
    status, body = answer(server, path, ["127.0.0.1:{port}"], method)
    assert status == 404 and b"not for you" not in body


@pytest.mark.parametrize(
    "hosts", [[], ["evil.example"], ["evil.example:{port}"], ["127.0.0.1"], ["127.0.0.1:{port}", "evil.example"]]
)
def test_the_server_answers_only_who_names_it(server, hosts: list[str]):
    assert answer(server, "/", hosts)[0] == 403
    for name in ("127.0.0.1", "localhost"):
        assert answer(server, "/index.html", [f"{name}:{{port}}"])[0] == 200


@pytest.mark.parametrize("port", [99_999, -1, 65_536])
def test_a_port_that_cannot_be_is_a_message(run: Path, port: int):
    (run / "report").mkdir()
    (run / "report" / "index.html").write_text("")
    with pytest.raises(UnbraidError, match="expected 0 to 65535"):
        serve(run / "report" / "index.html", port)


@pytest.mark.parametrize("project", ["../../x", "/tmp/x", "a/b", ".."])
def test_a_project_of_a_logger_leads_nowhere_else(run: Path, project: str):
    edit(run / "config.json", lambda data: data["training"].update(log_project=project))
    with pytest.raises(ConfigError, match="cannot name a project"):
        unbraid.Run(run).config  # noqa: B018
