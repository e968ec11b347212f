# SPDX-License-Identifier: Apache-2.0
import pytest

from sfa_peft.cli.commands import COMMANDS
from sfa_peft.cli.parser import Parser, did_you_mean, overview


def test_the_help_of_all_commands_fits_a_screen_and_names_each_once():
    text = overview(COMMANDS)
    assert len(text.splitlines()) <= 24
    assert max(map(len, text.splitlines())) <= 80
    for name in COMMANDS:
        assert sum(line.startswith(f"  {name} ") for line in text.splitlines()) == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_json(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        Parser(name, COMMANDS[name]).parse(["--help"], passes=False)
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: sfa-peft {name} ")
    assert "--json" in text


def test_something_close_is_suggested_and_nothing_else():
    assert did_you_mean("--bugdet=0.1", ["--budget", "--rho"]) == ": did you mean --budget?"
    assert did_you_mean("--xyz", ["--budget"]) == ""
