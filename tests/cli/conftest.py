"""What the tests of commands share: a text, and a checkpoint of a few steps."""

import pytest

from fastgpt import cli
from tests.cli.commands import TINY


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 50)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(text, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("trained"))
    assert cli.main(["train", "--data", text, "--out", folder, *TINY]) == 0
    return folder
