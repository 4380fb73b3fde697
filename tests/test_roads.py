"""The interpreter road, as a process of its own: Triton reads TRITON_INTERPRET when a kernel is defined."""

import pytest


def test_the_kernels_pass_their_tests_in_tritons_interpreter(interpreter_road):
    """conftest.py starts the process before the first test of this one, so that the two run side by side."""
    pytest.importorskip("triton", reason="Triton is not to be had on this platform")
    code = interpreter_road.process.wait()
    print(interpreter_road.report.read_text(encoding="utf-8", errors="replace")[-25000:])
    assert code == 0, "the interpreter's own report is above"
