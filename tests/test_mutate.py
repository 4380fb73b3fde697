"""The mutation suite itself: that it can tell a kill from a crash, and a few of its mutants in every run."""

import pytest

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from tests import mutate


def test_every_mutant_still_applies_and_has_its_own_name():
    for mutant in mutate.MUTANTS:
        assert mutant.old in (mutate.ROOT / mutant.file).read_text(encoding="utf-8"), mutant.name
        assert mutant.old != mutant.new
    assert len({mutant.name for mutant in mutate.MUTANTS}) == len(mutate.MUTANTS)


def test_the_table_tells_of_every_mutant():
    lines = (mutate.ROOT / "tests" / "mutants.txt").read_text(encoding="utf-8").splitlines()
    for mutant in mutate.MUTANTS:
        assert any(line.startswith(f"killed   {mutant.name:40} {mutant.test}") for line in lines), mutant.name


@pytest.mark.slow
def test_a_few_mutants_are_killed(capsys):
    assert mutate.main(["no correction of the mean", "partials shared", "one-hot missing"]) == 0
    assert "3 of 3 killed" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [("rstd = 1.0", "rstd = 1.00"), ("rstd = 1.0", "rstd = undefined"), ("import torch\n", "import torch, nowhere\n")],
    ids=["no change", "a crash", "an import error"],
)
def test_what_is_no_kill(old, new):
    mutant = mutate.Mutant("none", mutate.NORM, old, new, "test_layernorm.py::test_s_is_what_torch_adds")
    killed, _ = mutate.run(mutant, [mutant.test])
    assert not killed


def test_a_stale_mutant_is_an_error():
    with pytest.raises(ValueError, match="no longer holds"):
        mutate.run(mutate.MUTANTS[0]._replace(old="never written"), [])
