"""The mutation suite itself: that it can tell a kill from a crash, and a few of its mutants in every run."""

import pytest

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from tests import mutate
from tests.mutants import Mutant


def test_every_mutant_still_applies_and_has_its_own_name():
    for mutant in mutate.MUTANTS:
        assert mutate.mutated(mutant) != (mutate.ROOT / mutant.file).read_text(encoding="utf-8"), mutant.name
        file, _, name = mutant.test.partition("::")
        text = next((mutate.ROOT / "tests").rglob(file)).read_text(encoding="utf-8")
        assert f"def {name.partition('[')[0]}(" in text, mutant.test
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
    ("function", "old", "new"),
    [
        ("_layer_norm_fwd_kernel", "rstd = 1.0", "rstd = 1.00"),
        ("_layer_norm_fwd_kernel", "rstd = 1.0", "rstd = undefined"),
        ("", "import torch", "import torch, nowhere"),
    ],
    ids=["no change", "a crash", "an import error"],
)
def test_what_is_no_kill(function, old, new):
    mutant = Mutant("none", "kernels/layernorm.py", function, old, new, "test_layernorm.py::test_s_is_what_torch_adds")
    killed, _ = mutate.run(mutant, [mutant.test])
    assert not killed


def test_a_place_is_found_however_it_is_laid_out(tmp_path, monkeypatch):
    method = "class Kind:\n    def method(self):\n        return (a\n            + b)  # a + b\n"
    (tmp_path / "file.py").write_text("def other():\n    return a + b\n\n\n" + method)
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    mutant = Mutant("a sum", "file.py", "Kind.method", "(a + b)", "(a - b)", "")
    there = mutate.mutated(mutant)
    assert there.endswith("        return (a - b)  # a + b\n") and "def other():\n    return a + b\n" in there


@pytest.mark.parametrize("change", [{"old": "never written"}, {"function": "gone"}, {"function": "_tiles"}])
def test_a_stale_mutant_is_an_error(change):
    with pytest.raises(ValueError, match="no longer holds"):
        mutate.run(mutate.MUTANTS[0]._replace(**change), [])
