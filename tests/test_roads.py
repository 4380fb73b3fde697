"""The interpreter road, in processes of its own: Triton reads TRITON_INTERPRET when a kernel is defined."""

import pytest


def test_the_kernels_pass_their_tests_in_tritons_interpreter(interpreter_roads):
    """conftest.py starts the processes before the first test of this one, so that all run side by side."""
    pytest.importorskip("triton", reason="Triton is not to be had on this platform")
    codes = [road.process.wait() for road in interpreter_roads]
    for road in interpreter_roads:
        print(road.report.read_text(encoding="utf-8", errors="replace")[-15000:])
    assert codes == [0] * len(codes), "the interpreter's own reports are above"
