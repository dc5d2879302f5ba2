"""A checkpoint knows its run: what may change while resuming, and what is refused."""

import json
import random
import shutil
from pathlib import Path

import pytest
from stopped_runs import Stop, stop_at

import unbraid
from unbraid import recipes
from unbraid.cli import main
from unbraid.config import RunConfig, validated
from unbraid.errors import CheckpointError, ConfigError, TrainingError
from unbraid.files import checksum
from unbraid.training.changes import words_of_resume
from unbraid.training.checkpoint import list_checkpoints


def small(**groups) -> RunConfig:
    data = recipes.tiny().model_dump(mode="json")
    data["training"] |= {"tokens": 2_048, "batch_tokens": 128, "checkpoint_every": 4, "held_out_tokens": 256}
    data["model"]["sites"] = ["resid_post.0"]
    data["variants"] = {"": {}}
    for group, values in groups.items():
        data[group] |= values
    return validated(RunConfig, data, "test")


@pytest.fixture(scope="module")
def cut(tmp_path_factory) -> Path:
    """A run that an error ended after nine of sixteen steps."""
    path = tmp_path_factory.mktemp("cut") / "run"
    with pytest.raises(Stop):
        unbraid.train(small(), path, callbacks=[stop_at(9)])
    return path


@pytest.fixture
def run(cut, tmp_path) -> Path:
    return Path(shutil.copytree(cut, tmp_path / "run"))


def edit(path: Path, setting: str, value) -> None:
    data = json.loads((path / "config.json").read_text())
    *groups, last = setting.split(".")
    inner = data
    for group in groups:
        inner = inner[group]
    inner[last] = value
    (path / "config.json").write_text(json.dumps(data))


def test_any_error_after_the_first_step_leaves_a_checkpoint_of_the_steps_before(run):
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step_4", "step_8", "step_9"]
    assert not (run / "saes").exists()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("sae.n_features", 64),
        ("sae.lambda1", 0.5),
        ("model.name", "random:gpt2"),
        ("training.tokens", 10_240),
        ("training.batch_tokens", 64),
        ("optimiser.lr", 1e-4),
        ("seed", 9),
        ("model.sites", ["resid_post.1"]),
        ("text.context_length", 64),
        ("variants", {"a": {}}),
    ],
)
def test_an_edited_config_is_refused_and_the_setting_named(run, setting, value):
    edit(run, setting, value)
    name = setting if setting != "variants" else r"variants\."
    with pytest.raises(CheckpointError, match=rf"config\.json differs from the run .*{name}.* was .*, is "):
        unbraid.resume(run)
    assert not (run / "saes").exists()


def test_a_checkpoint_from_before_a_setting_came_is_resumed(run):
    """The same commit may not have written both: settings are added, at defaults that change nothing."""
    newest = list_checkpoints(run / "checkpoints")[-1]
    state, manifest = (json.loads((newest / name).read_text()) for name in ("state.json", "manifest.json"))
    del state["run"]["settings"]["training"]["epochs"], state["run"]["settings"]["sae"]["frozen"]
    (newest / "state.json").write_text(json.dumps(state))
    manifest["checksums"]["state.json"] = checksum(newest / "state.json")
    (newest / "manifest.json").write_text(json.dumps(manifest))
    assert unbraid.resume(run).summary["steps"]["executed"] == 16


def test_another_architecture_in_config_is_refused(run):
    data = small().model_dump(mode="json")
    data["sae"] |= {"architecture": "topk", "k": 4}
    (run / "config.json").write_text(json.dumps(data))
    with pytest.raises((CheckpointError, ConfigError), match=r"architecture|lambda1"):
        unbraid.resume(run)


def test_what_may_change_changes_and_is_recorded(run):
    resumed = unbraid.resume(run, changes={"training.tokens": 4_096, "optimiser.lr": 1e-4, "training.threads": 1})
    assert resumed.summary["steps"] == {"planned": 32, "executed": 32}
    assert resumed.config.training.tokens == 4_096 and resumed.config.optimiser.lr == 1e-4
    lines = [json.loads(line) for line in (run / "changes.jsonl").read_text().splitlines()]
    assert [line["after_step"] for line in lines] == [9] and lines[0]["changes"]["training.tokens"] == 4_096
    logged = (run / "metrics.jsonl").read_text().splitlines()
    lrs = {line["step"]: line["saes"]["resid_post.0"]["lr"] for line in map(json.loads, logged)}
    assert lrs[5] > 1e-3 and 0 < lrs[15] <= 1e-4


def test_a_finished_run_goes_on_for_more_tokens_and_ends_as_a_longer_one_would_begin(run):
    first = unbraid.resume(run)
    assert first.summary["steps"]["executed"] == 16
    weights = (run / "saes" / "resid_post.0" / "sae_weights.safetensors").read_bytes()
    assert unbraid.resume(run).summary == first.summary
    more = unbraid.resume(run, changes={"training.tokens": 2_560})
    assert more.summary["steps"] == {"planned": 20, "executed": 20}
    assert (run / "saes" / "resid_post.0" / "sae_weights.safetensors").read_bytes() != weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sae.n_features": 64}, r"sae\.n_features cannot change .* training\.tokens"),
        ({"training.tokens": 512}, "gives 4 steps and the run has made 9"),
        ({"training.tokens": 0}, "gives 0 steps"),
        ({"training.log_every": 0}, "log_every"),
        ({"optimiser.lr": "much"}, "lr"),
    ],
)
def test_what_may_not_change_is_refused_and_nothing_is_recorded(run, changes, message):
    with pytest.raises((ConfigError, TrainingError), match=message):
        unbraid.resume(run, changes=changes)
    assert not (run / "changes.jsonl").exists()


@pytest.mark.parametrize("text", ["[", '{"changes": 3}', '{"changes": {"sae.n_features": 4}}'])
def test_a_damaged_record_of_changes_is_refused(run, text):
    (run / "changes.jsonl").write_text(text + "\n")
    with pytest.raises((TrainingError, ConfigError), match=r"changes\.jsonl.*expected"):
        unbraid.resume(run)


def write_text(path: Path, seed: int) -> None:
    chance = random.Random(seed)
    words = ["".join(chance.choice("abcdefghij") for _ in range(5)) for _ in range(300)]
    lines = (json.dumps({"text": " ".join(chance.choice(words) for _ in range(120))}) for _ in range(300))
    path.write_text("\n".join(lines))


def test_changed_text_is_refused_even_of_the_same_size(tmp_path):
    text = tmp_path / "text.jsonl"
    write_text(text, 1)
    config = small(text={"source": "files", "paths": [str(text)], "held_out_fraction": 0.1})
    with pytest.raises(Stop):
        unbraid.train(config, tmp_path / "run", callbacks=[stop_at(9)])
    size = text.stat().st_size
    write_text(text, 2)
    assert text.stat().st_size == size
    with pytest.raises(CheckpointError, match=r"model or text is not the one .*text\.files was"):
        unbraid.resume(tmp_path / "run")
    write_text(text, 1)
    assert unbraid.resume(tmp_path / "run").summary["steps"]["executed"] == 16


def test_a_checkpoint_of_version_0_1_is_refused_with_what_to_do(run):
    manifest = list_checkpoints(run / "checkpoints")[-1] / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": 1}))
    with pytest.raises(CheckpointError, match=r"written by unbraid 0\.1.*unbraid<0\.2.*train again"):
        unbraid.resume(run)


def test_the_command_line_takes_changes(run, capsys):
    main(["resume", str(run), "--training.tokens", "2560", "--optimiser.lr=1e-4", "--training.log-every", "4"])
    assert unbraid.Run(run).config.training.log_every == 4
    assert unbraid.Run(run).summary["steps"]["executed"] == 20
    with pytest.raises(SystemExit):
        main(["resume", str(run), "--sae.k", "3"])
    assert "sae.k cannot change in a run that goes on" in capsys.readouterr().err


def test_words_of_a_resume_are_split_into_settings_and_the_rest():
    rest, changes = words_of_resume(["run", "--training.loggers", "wandb,trackio", "--help", "--training.threads=None"])
    assert rest == ["run", "--help"]
    assert changes == {"training.loggers": ["wandb", "trackio"], "training.threads": None}
    with pytest.raises(ConfigError, match="has no value"):
        words_of_resume(["run", "--training.tokens"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", 3),
        ("step", -1),
        ("step", "x"),
        ("metrics_offset", -5),
        ("metrics_offset", "x"),
        ("run", {}),
        ("run", None),
        ("buffer", {}),
        ("buffer", {"position": 3}),
        ("buffer", None),
        ("seconds", None),
        ("seconds", {"buffer": "x", "training": 0}),
    ],
)
def test_a_state_that_no_run_wrote_is_named_as_damage(run, name, value):
    checkpoint = list_checkpoints(run / "checkpoints")[-1]
    state = json.loads((checkpoint / "state.json").read_text()) | {name: value}
    (checkpoint / "state.json").write_text(json.dumps(state))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["checksums"]["state.json"] = checksum(checkpoint / "state.json")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"is damaged .* delete that folder"):
        unbraid.resume(run)


def test_settings_edited_while_a_run_goes_on_do_not_get_into_its_checkpoints(tmp_path):
    def edit_and_stop(step, record):
        if step == 2:
            edit(tmp_path / "run", "seed", 9)
        stop_at(9)(step, record)

    with pytest.raises(Stop):
        unbraid.train(small(), tmp_path / "run", callbacks=[edit_and_stop])
    with pytest.raises(CheckpointError, match=r"seed was 0, is 9"):
        unbraid.resume(tmp_path / "run")
