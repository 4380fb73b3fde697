"""Threads, forks, fresh processes and a shared cache folder: the first call may come from anywhere."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

WORK = """
import torch
import fastgpt
from fastgpt import ops

def work(seed=0):
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(shape, generator=generator).requires_grad_()
    q, k, v, x, w = rand(1, 2, 9, 8), rand(1, 2, 9, 8), rand(1, 2, 9, 8), rand(4, 16), rand(16)
    a, b, table = rand(32, 16), rand(16, 32), rand(50, 16)
    y = ops.gelu_mlp(ops.layer_norm(x, w), a, torch.zeros(32), b)
    loss = ops.linear_cross_entropy(y, table, torch.arange(4))
    loss = loss + ops.causal_attention(q, k, v, dropout_p=0.3, seed=seed).sum()
    loss.backward()
    return [loss.detach(), *(t.grad for t in (q, k, v, x, w, a, b, table))]

def equal(a, b):
    return len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b))
"""


def in_a_process(script, **environment):
    command = [sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[1])\n" + WORK + script, str(ROOT)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def assert_ends_well(process):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-3000:]
    return output


def test_eight_threads_whose_first_calls_meet():
    script = """
import threading
from concurrent.futures import ThreadPoolExecutor
start = threading.Barrier(8)
def first(_):
    start.wait()
    return work()
with ThreadPoolExecutor(8) as pool:
    found = list(pool.map(first, range(8)))
assert all(equal(each, work()) for each in found)
"""
    assert_ends_well(in_a_process(script))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows can't fork")
def test_a_fork_after_the_import_works():
    """As a data loader's or a server's workers do; the import has started no thread and no device."""
    script = """
import os, threading
assert threading.active_count() == 1 and not torch.cuda.is_initialized()
read, write = os.pipe()
child = os.fork()
if child == 0:
    import pickle
    os.write(write, pickle.dumps([t.tolist() for t in work()[:2]]))
    os._exit(0)
_, status = os.waitpid(child, 0)
import pickle
assert status == 0 and pickle.loads(os.read(read, 1 << 20)) == [t.tolist() for t in work()[:2]]
"""
    assert_ends_well(in_a_process(script))


def test_an_accelerated_model_goes_to_a_fresh_process(tmp_path):
    import torch

    from tests.models import hugging_face
    from tests.swap.swapped import accelerate

    model = hugging_face().eval()
    accelerate(model)
    idx = torch.arange(1, 9)[None]
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, idx, model(idx).logits.detach())))
    script = f"""
import pickle
model, idx, expected = pickle.load(open({str(tmp_path / "model.pickle")!r}, "rb"))
assert "fastgpt_swap" in model.transformer.h[0].__dict__
torch.testing.assert_close(model(idx).logits, expected)
"""
    assert_ends_well(in_a_process(script))


def test_two_processes_compile_into_one_cache_folder(tmp_path):
    """Two ranks of one machine meet there at their first step. They compile the same kernel, at the same time."""
    pytest.importorskip("triton", reason="Triton is not to be had on this platform")
    script = """
from bench.gates import compile as gate
rows = list(gate.rows(gate.work([90], False, "layer_norm C 1600 bfloat16")))
assert rows and all(row.passes for row in rows)
print(sorted((row.kernel, row.registers) for row in rows))
"""
    processes = [in_a_process(script, TRITON_CACHE_DIR=str(tmp_path / "cache")) for _ in range(2)]
    outputs = {assert_ends_well(process) for process in processes}
    assert len(outputs) == 1 and "layer_norm_fwd_kernel" in outputs.pop()
    assert any((tmp_path / "cache").rglob("*.cubin"))
