"""What lists or refuses imports nothing heavy; the library's names are there when they are asked for."""

import importlib
import re
import subprocess
import sys

import pytest

import unbraid
from unbraid import cli, feature_model, recipes
from unbraid.cli import main

ASK = """
import sys
from unbraid.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stopped:
    print("stopped", stopped.code)
print(sorted({"torch", "numpy", "transformers", "pydantic", "tyro", "rich"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--help"], "unbraid train RECIPE"),
        (["help"], "unbraid train RECIPE"),
        (["presets"], "paper"),
        (["--version"], f"unbraid {unbraid.__version__}\n"),
        (["trian", "tiny"], "did you mean 'train'?"),
        (["--versoin"], "unknown flag '--versoin'; expected --help, --version or a command first"),
    ],
)
def test_what_needs_nothing_heavy_does_not_wait_for_it(words, said):
    done = subprocess.run([sys.executable, "-c", ASK, *words], capture_output=True, text=True)
    assert said in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "[]", done.stdout
    assert ("stopped 1" in done.stdout) == (words[0] in ("trian", "--versoin"))


def test_the_list_of_recipes_is_the_recipes():
    assert list(cli.RECIPES) == list(recipes.RECIPES)
    assert all(f"  {name:15} {what}" in cli.usage() for name, what in cli.RECIPES.items())


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS])
def test_every_command_has_a_function_and_a_line(name):
    command = cli.COMMANDS[name]
    assert isinstance(command, cli.Command)
    module, _, function = command.function.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert command.what in cli.usage() and not command.what.endswith(".")


def test_importing_the_library_imports_no_torch():
    code = "import sys, unbraid, unbraid.feature_model; print('torch' in sys.modules, 'train' in dir(unbraid))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr


@pytest.mark.parametrize("package", [unbraid, feature_model], ids=lambda package: package.__name__)
def test_every_public_name_is_there_when_asked_for(package):
    for name in package.__all__:
        found = getattr(package, name)
        assert found is importlib.import_module(package.__name__).__dict__[name]
        assert getattr(found, "__name__", "").rpartition(".")[2] == name
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = package.trian


def test_help_of_a_command_is_its_own_help(capsys):
    for words in (["help", "train"], ["help", "train", "tiny"], ["train", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 0
        assert "--training.tokens" in capsys.readouterr().out


def test_common_settings_come_first_each_group_once_and_every_setting_is_described(capsys):
    for flag, rare in (("--help", False), ("--help-all", True)):
        with pytest.raises(SystemExit):
            main(["train", "tiny", flag])
        said = capsys.readouterr().out
        headings = [line for line in said.splitlines() if line.endswith(":") and not line.startswith(" ")]
        assert len(headings) == len(set(headings)) and "sae:" in headings
        assert ("--training.keep-checkpoints" in said) is rare and "--sae.n-features" in said
        assert ("--help-all lists every setting" in said) is not rare
        assert not re.findall(r"^  --.*\n      \(", said, re.MULTILINE), "a setting without a description"


def test_help_of_resume_lists_what_may_change(capsys):
    with pytest.raises(SystemExit):
        main(["help", "resume"])
    assert "--training.tokens" in capsys.readouterr().out
