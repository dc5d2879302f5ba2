"""The completion script, in a real bash: what Tab offers is what the command line takes."""

import re
import shutil
import subprocess

import pytest

from unbraid.cli import COMMANDS, main
from unbraid.completion import SHELLS, command_words

ASK = """
source /dev/stdin
COMP_WORDS=("$@")
COMP_CWORD=$(( $# - 1 ))
_unbraid
printf '%s\\n' "${COMPREPLY[@]}"
"""


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    main(["completion", shell])
    return capsys.readouterr().out


@pytest.fixture
def tab(capsys):
    """What bash offers after these words, the last of which is being typed."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash on this machine")
    source = script("bash", capsys)

    def offered(*words: str) -> set[str]:
        done = subprocess.run([bash, "-c", ASK, "bash", *words], input=source, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return set(done.stdout.split())

    return offered


def test_commands_are_completed(tab):
    assert tab("unbraid", "") >= {*COMMANDS, "help", "--help", "--version"}
    assert tab("unbraid", "da") == {"dashboard"}
    assert tab("unbraid", "help", "tr") == {"train"}


def test_recipes_flags_and_values_are_completed(tab):
    assert tab("unbraid", "train", "sm") == {"smollm2"}
    assert tab("unbraid", "train", "tiny", "--pre") == {"--preset"}
    assert tab("unbraid", "train", "tiny", "--preset", "") == {"paper", "apart", "best"}
    assert tab("unbraid", "train", "tiny", "--preset", "=", "b") == {"best"}, "readline splits --preset=b"
    assert tab("unbraid", "train", "tiny", "--sae.architecture", "top") == {"topk"}
    assert "--sae.n-features" in tab("unbraid", "train", "tiny", "--sae.")
    assert "geometry" in tab("unbraid", "eval", "runs/tiny", "--suite", "")
    assert tab("unbraid", "export", "runs/tiny", "--to", "s") == {"sae_lens", "sparsify"}
    assert tab("unbraid", "completion", "") == set(SHELLS)


def test_what_launch_starts_is_completed_like_the_command_itself(tab):
    assert tab("unbraid", "launch", "--ra") == {"--ranks"}
    assert tab("unbraid", "launch", "--ranks", "2", "train", "tiny", "--pre") == {"--preset"}


def test_a_file_name_is_left_to_the_shell(tab):
    assert tab("unbraid", "resume", "ru") == set()
    assert tab("unbraid", "train", "tiny", "--run", "") == set()


def test_every_command_is_completed_with_flags_it_takes(capsys):
    table = command_words()
    assert table.keys() == {*COMMANDS, "help"}
    for name in COMMANDS.keys() - {"presets", "completion", "doctor"}:
        with pytest.raises(SystemExit) if name not in ("eval", "synth") else _nothing():
            main([name, "--help-all" if name in ("train", "harvest", "eval", "synth") else "--help"])
        said = set(re.findall(r"--[a-z0-9][\w.-]*", capsys.readouterr().out.replace("_", "-")))
        offered = {flag.name for flag in table[name].flags} - {"--help", "--help-all", "--debug", "--plugin"}
        if name in ("train", "harvest", "eval", "synth", "resume"):
            assert said & offered, name  # flags of other kinds are offered and listed once that kind is chosen
        else:
            assert offered <= said, name


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_a_script(shell, capsys):
    text = script(shell, capsys)
    assert "unbraid" in text and "sae.architecture" in text and text.endswith("\n")


def test_another_shell_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["completion", "tcsh"])
    assert "found 'tcsh'; expected one of bash, zsh, fish" in capsys.readouterr().err


def _nothing():
    import contextlib

    return contextlib.nullcontext()
