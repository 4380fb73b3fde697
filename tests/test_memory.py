"""The switch that a trainer turns."""

import ctypes
import subprocess
import sys
import types

from fastgpt import memory


def test_it_is_turned_on_glibc_and_left_elsewhere(monkeypatch):
    turned = []
    library = types.SimpleNamespace(mallopt=lambda *pair: turned.append(pair) or 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert memory.keep_freed() and turned == [(-4, 0), (-1, -1)]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace())
    assert not memory.keep_freed()


def test_freed_memory_stays():
    """On Linux with glibc: once a loop has turned some times, its large blocks need no new pages. (Now and then one
    may: where a small block came to lie behind a freed one, that is too short by an alignment for the next.)"""
    code = (
        "import resource, torch\n"
        "from fastgpt import memory\n"
        "kept = memory.keep_freed()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for turn in range(40):\n"
        "    if turn == 30: before = faults()\n"
        "    torch.zeros(2**24)\n"
        "a_turn = 2**24 * 4 / 4096\n"
        "assert not kept or faults() - before < 2.5 * a_turn, faults() - before\n"  # of ten
    )
    if sys.platform != "win32":
        subprocess.run([sys.executable, "-c", code], check=True)
