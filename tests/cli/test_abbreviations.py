"""An option is written out: a shortened one would change its meaning with the next option that begins so."""

import pytest

from fastgpt.cli import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_takes_a_shortened_option(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--hel"])
    assert ended.value.code == 2 and "--help" not in capsys.readouterr().out
