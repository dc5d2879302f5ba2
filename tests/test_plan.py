"""A run is refused before it begins, or it ends with SAEs; what it is going to do can be printed."""

import io
import json
import random
from pathlib import Path

import pytest
import torch
from rich.console import Console

import unbraid
from unbraid import plan as planning
from unbraid import recipes, run
from unbraid.activations.live import LiveActivations
from unbraid.cli import main
from unbraid.config import RunConfig, validated
from unbraid.errors import ActivationError, ConfigError, TextError, TrainingError
from unbraid.training.checkpoint import list_checkpoints
from unbraid.training.run_folder import RunFolder


def small(**groups) -> RunConfig:
    data = recipes.tiny().model_dump(mode="json")
    data["training"] |= {"tokens": 2_048, "batch_tokens": 128, "held_out_tokens": 256}
    data["model"]["sites"] = ["resid_post.0"]
    data["variants"] = {"": {}}
    for group, values in groups.items():
        data[group] |= values
    return validated(RunConfig, data, "test")


WORDS = ["tide", "came", "in", "and", "went", "out", "over", "long", "grey", "sand", "while", "gulls", "called"]


def short_documents(path: Path, count: int = 900) -> dict:
    chance = random.Random(1)
    lines = (json.dumps({"text": f"{' '.join(chance.choices(WORDS, k=4))} {i}"}) for i in range(count))
    path.write_text("\n".join(lines))
    return {"source": "files", "paths": [str(path)], "held_out_fraction": 0.1}


def refused(config: RunConfig, folder: Path, error: type[Exception], message: str) -> None:
    """Before the first step, and without leaving a folder."""
    with pytest.raises(error, match=message):
        unbraid.train(config, folder, callbacks=[lambda *_: pytest.fail("a step was made")])
    assert not folder.exists()


def test_no_held_out_share_is_refused(tmp_path):
    refused(small(text={"held_out_fraction": 0.0}), tmp_path / "run", ConfigError, "held_out_fraction = 0 leaves no")


def test_a_few_large_documents_without_a_held_out_one_are_refused(tmp_path):
    chance = random.Random(1)
    text = tmp_path / "corpus.txt"
    text.write_text("".join(" ".join(chance.choices(WORDS, k=14)) + ".\n" for _ in range(40_000)))
    config = small(text={"source": "files", "paths": [str(text)], "held_out_fraction": 0.002})
    refused(config, tmp_path / "run", TextError, r"no held-out text: text\.held_out_fraction = 0\.002 .* raise")


def test_held_out_rows_that_the_filter_leaves_out_are_noticed(tmp_path, monkeypatch):
    class Massive(LiveActivations):
        def chunks(self, position, held_out=False):
            for chunk in super().chunks(position, held_out):
                if not held_out:
                    yield chunk
                    continue
                chunk.activations[0].mul_(1e6)
                yield chunk
                return

    monkeypatch.setattr(run, "open_activations", lambda config, device, *_: Massive(config, device))
    refused(small(), tmp_path / "run", TextError, r"every row of the held-out text is left out .*norm_limit")


def test_text_that_is_a_little_short_is_refused_with_the_tokens_that_fit_and_these_do(tmp_path):
    text = short_documents(tmp_path / "short.jsonl")
    with pytest.raises(TextError, match=r"the text is too small.*lower training\.tokens to ([\d,]+)") as refusal:
        unbraid.train(small(text=text, training={"tokens": 128_000}), tmp_path / "run")
    fits = int(str(refusal.value).rsplit(" ", 1)[1].replace(",", ""))
    assert fits > 1_000
    finished = unbraid.train(small(text=text, training={"tokens": fits}), tmp_path / "run")
    assert finished.summary["steps"]["planned"] == fits // 128
    assert list(finished.saes) == ["resid_post.0"]


def test_text_that_ends_early_ends_the_run_with_saes_and_says_so(tmp_path, monkeypatch, capsys):
    """Rows beyond the norm limit cannot be counted beforehand; here the count is made to be wrong."""
    monkeypatch.setattr(LiveActivations, "count_rows", lambda self, limit: limit)
    text = short_documents(tmp_path / "short.jsonl", 300)
    from rich.console import Console

    config = small(text=text, training={"tokens": 128_000, "checkpoint_every": 1000})
    finished = unbraid.train(config, tmp_path / "run", console=Console())
    steps = finished.summary["steps"]
    assert 3 < steps["executed"] < steps["planned"] == 1000
    assert list(finished.saes) == ["resid_post.0"] and finished.summary["saes"]["resid_post.0"]["r2"] is not None
    assert list_checkpoints(finished.path / "checkpoints")[-1].name == f"step_{steps['executed']}"
    said = capsys.readouterr().out.replace("\n", " ")
    assert f"the text was used up after {steps['executed']} of 1,000 steps" in said
    assert unbraid.resume(finished.path).summary == finished.summary


def test_a_disk_without_room_is_refused_with_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "free_bytes", lambda _: 100_000)
    refused(small(), tmp_path / "run", TrainingError, r"needs [\d.]+ MiB of disk .* 0\.1 MiB free")


def test_the_disk_estimate_is_what_a_run_comes_to_need(tmp_path):
    config = small(training={"checkpoint_every": 4, "keep_checkpoints": 1})
    finished = unbraid.train(config, tmp_path / "run")
    used = sum(path.stat().st_size for path in finished.path.rglob("*") if path.is_file())
    assert used < planning.disk_bytes(config, [64]) < 6 * used + planning.ALLOWANCE_BYTES


def test_more_memory_than_there_is_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "_memory_of", lambda _: 100_000)
    refused(small(), tmp_path / "run", TrainingError, r"need [\d.]+ MiB of memory and cpu has 0\.1 MiB")


def test_activations_that_do_not_vary_are_refused_with_the_site(tmp_path, monkeypatch):
    class Zeros(LiveActivations):
        def chunks(self, position, held_out=False):
            for chunk in super().chunks(position, held_out):
                chunk.activations[0].zero_()
                yield chunk

    monkeypatch.setattr(run, "open_activations", lambda config, device, *_: Zeros(config, device))
    refused(small(), tmp_path / "run", ActivationError, r"resid_post\.0: all [\d,]+ rows .* are the same")


def test_a_plan_prints_itself_and_writes_nothing(tmp_path, capsys):
    words = ["train", "tiny", "--run", str(tmp_path / "run"), "--dry-run", "--training.threads", "1"]
    main(words)
    told = capsys.readouterr().out
    for part in (
        "100 steps of 256 tokens (25,600 tokens)",
        "4 SAEs",
        "random:llama on cpu, 64 wide",
        "rows found",
        "held-out text: found",
        "MiB",
        "free",
        "time: about ",
    ):
        assert part in told
    assert not (tmp_path / "run").exists()


def test_a_dry_run_beside_its_own_folder_says_that_it_is_taken(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "kept").touch()
    main(["train", "tiny", "--dry-run", "--training.threads", "1"])
    told = capsys.readouterr().out
    assert "plan: 100 steps" in told
    assert "'runs/tiny' exists already" in told


def test_a_run_killed_before_its_first_checkpoint_says_that_it_starts_again(tmp_path):
    RunFolder.create(tmp_path / "run", small())
    console = Console(file=io.StringIO(), width=200)
    unbraid.resume(tmp_path / "run", console=console)
    assert "stopped before its first checkpoint: starting again" in console.file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["demo", "transcoder-demo", "smollm2"])
def test_the_packaged_text_is_enough_for_a_recipe(tmp_path, capsys, recipe):
    main(["train", recipe, "--run", str(tmp_path / "run"), "--dry-run"])
    assert "rows found, enough" in capsys.readouterr().out


def test_values_that_were_dropped_are_listed():
    plan = run.plan(small(), "runs/never", dropped=["sae.k = 64: the architecture is relu"])
    assert "left out, because it does not apply: sae.k = 64: the architecture is relu" in str(plan)
    assert not Path("runs/never").exists()


def test_a_failed_start_does_not_block_the_corrected_command(tmp_path):
    def fail(*_):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError):
        unbraid.train(small(), tmp_path / "run", callbacks=[fail])
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step_1"
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    finished = unbraid.train(small(sae={"n_features": 64}), tmp_path / "run")
    assert finished.summary["steps"]["executed"] == 16


@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_of_one_row_has_no_r2_and_the_run_ends(tmp_path, batch):
    config = small(training={"tokens": 6 * batch, "batch_tokens": batch, "log_every": 1})
    finished = unbraid.train(config, tmp_path / "run")
    lines = [json.loads(line) for line in (finished.path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert all((line["saes"]["resid_post.0"]["r2"] is None) == (batch == 1) for line in lines)
    assert (finished.path / "figures" / "figure1.png").exists()


def test_the_caller_finds_threads_and_random_states_as_they_were(tmp_path):
    import signal

    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    torch.manual_seed(5)
    expected = torch.rand(2).tolist()
    torch.manual_seed(5)
    unbraid.train(small(training={"threads": threads + 1}), tmp_path / "run")
    assert torch.rand(2).tolist() == expected
    assert torch.get_num_threads() == threads and signal.getsignal(signal.SIGINT) is handler


def test_saes_of_an_unfinished_run_are_said_to_be_missing(tmp_path):
    with pytest.raises(RuntimeError):
        unbraid.train(small(), tmp_path / "run", callbacks=[_fail])
    with pytest.raises(TrainingError, match=r"is not complete .*unbraid resume"):
        _ = unbraid.Run(tmp_path / "run").saes
    finished = unbraid.resume(tmp_path / "run")
    (finished.path / "saes" / ".DS_Store").write_bytes(b"\0")
    assert list(finished.saes) == ["resid_post.0"]


def _fail(*_):
    raise RuntimeError("broken")


def test_a_learning_rate_that_is_too_high_is_what_the_warning_names():
    config = small()
    sae = {"l0": 0.0, "r2": -40.0, "dead_fraction": 0.9}
    (warning,) = run.warnings_of({"documents": {"seen": 1, "skipped": {}}, "saes": {"resid_post.0": sae}}, config)
    assert "training diverged; lower optimiser.lr (now 0.003)" in warning


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"tf32": True}, r"training\.tf32 is read on CUDA devices only, and the run is on cpu"),
        ({"feature_shards": 2}, r"feature_shards = 2 is read only among several processes.*unbraid launch"),
    ],
)
def test_what_this_machine_would_not_do_is_refused(tmp_path, monkeypatch, setting, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = small(training=setting)
    refused(config, tmp_path / "run", ConfigError, message)
    with pytest.raises(ConfigError, match=message):
        run.plan(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
