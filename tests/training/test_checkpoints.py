"""Folders of checkpoints: whole at every moment, verified, purged, locked."""

import contextlib
import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import fastgpt
from fastgpt import atomic
from fastgpt.training import checkpoint
from fastgpt.training.checkpoint import Checkpoint, Checkpoints, locked

ROOT = Path(fastgpt.__file__).parents[1]
FILES = ("model/weights", "state.json")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")


def writer(step):
    """Two files whose content tells the step."""

    def write(folder):
        (folder / "model").mkdir()
        for name in FILES:
            (folder / name).write_bytes(bytes([step % 256]) * 3000)

    return write


@pytest.fixture
def store(tmp_path):
    return Checkpoints(tmp_path / "checkpoints")


def save(store, *steps, **facts):
    for step in steps:
        store.save(step, writer(step), 1, **facts)


def steps(store):
    return [each.step for each in store.all()]


def newest(store):
    found, passed = store.newest()
    return found and found.step, [(each.step, reason) for each, reason in passed]


def test_a_checkpoint_is_what_was_written(store):
    save(store, 7, val_loss=1.5)
    (found,) = store.all()
    manifest = found.verify()
    assert (found.path.name, manifest["step"], manifest["val_loss"]) == ("step-00000007", 7, 1.5)
    assert sorted(manifest["files"]) == sorted(FILES)
    assert {said["bytes"] for said in manifest["files"].values()} == {3000}
    assert manifest["files"]["state.json"]["sha256"] == atomic.digest(found.path / "state.json")
    assert sorted(os.listdir(store.folder)) == ["step-00000007"]


def test_the_newest_two_and_the_best_are_kept(store):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, float("nan")), (6, 1.5)):
        save(store, step, val_loss=loss)
    assert steps(store) == [2, 5, 6]
    assert all(each.verify() for each in store.all())


def test_broken_ones_do_not_count_as_kept(store):
    """Two that are broken and newer must not push out the only one that is whole."""
    save(store, 100, 200, 300)
    for each in store.all()[-2:]:
        (each.path / "state.json").unlink()
    save(store, 150)
    save(store, 160)
    assert newest(store)[0] == 160
    assert {150, 160} <= set(steps(store))
    save(store, 300)
    assert newest(store) == (300, [])
    assert (store.folder / "broken-step-00000300").is_dir()


def test_a_disk_that_refuses_to_delete_keeps_the_run_going(store, monkeypatch):
    save(store, 1, 2)
    monkeypatch.setattr(shutil, "rmtree", lambda path, *a, **k: (_ for _ in ()).throw(OSError("busy")))
    with contextlib.suppress(OSError):  # only of its own leftovers, before it starts
        store._remove(store.all()[0].path)
    assert steps(store) == [2]
    monkeypatch.undo()
    store.tidy()
    assert sorted(os.listdir(store.folder)) == ["step-00000002"]


def corruptions():
    yield "truncated", lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 2999 bytes, not 3000"
    yield "extra byte", lambda path: path.write_bytes(path.read_bytes() + b"!"), "has 3001 bytes, not 3000"
    yield "empty", lambda path: path.write_bytes(b""), "has 0 bytes, not 3000"
    yield "text", lambda path: path.write_text("once upon a time"), "has 16 bytes, not 3000"
    yield "gone", lambda path: path.unlink(), "is not there"
    yield "flipped bit", lambda path: path.write_bytes(b"\x03" + path.read_bytes()[1:]), "its SHA-256 differs"
    yield "lost page", lambda path: path.write_bytes(bytes(3000)), "its SHA-256 differs"
    yield "link", lambda path: (path.rename(path.parent / "x"), path.symlink_to(path.parent / "x")), "is not there"


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(("how", "message"), [pytest.param(c, m, id=n) for n, c, m in corruptions()])
def test_a_broken_file_is_found_and_the_one_before_taken(store, file, how, message):
    save(store, 1, 2)
    how(store.all()[-1].path / file)
    found, passed = newest(store)
    assert found == 1
    ((step, reason),) = passed
    assert step == 2
    assert reason.startswith(file) and message in reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: None, "it has no manifest.json"),
        (lambda m: "{", "manifest.json is not JSON"),
        (lambda m: json.dumps([m]), "not the manifest of step 2"),
        (lambda m: json.dumps({**m, "step": 3}), "not the manifest of step 2"),
        (lambda m: json.dumps({**m, "files": {}}), "not the manifest of step 2"),
        (lambda m: json.dumps({**m, "files": {"state.json": {"bytes": 3000}}}), "size and SHA-256 of state.json"),
        (lambda m: json.dumps({**m, "files": {"../x": {"bytes": 1, "sha256": ""}}}), "'../x', which is not in the"),
        (lambda m: json.dumps({**m, "files": {"/etc/x": {"bytes": 1, "sha256": ""}}}), "'/etc/x', which is not in"),
    ],
)
def test_a_broken_manifest_is_found(store, change, message):
    save(store, 1, 2)
    path = store.all()[-1].path / "manifest.json"
    text = change(json.loads(path.read_text()))
    path.unlink() if text is None else path.write_text(text)
    found, ((step, reason),) = newest(store)
    assert (found, step) == (1, 2) and message in reason


def test_other_folders_are_no_checkpoints(store):
    save(store, 1)
    for name in (".step-00000009.tmp", "broken-step-00000008", "step-7", "notes"):
        (store.folder / name).mkdir()
    assert newest(store) == (1, [])


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_what_was_there(store, error):
    save(store, 1)

    def half(folder):
        (folder / "state.json").write_text("half")
        raise error

    with pytest.raises(type(error)):
        store.save(2, half, 1)
    assert newest(store) == (1, [])
    assert sorted(os.listdir(store.folder)) == ["step-00000001"]


def test_a_full_disk_is_told_before_anything_is_written(store):
    save(store, 1)
    size = shutil.disk_usage(store.folder).free + (1 << 40)
    with pytest.raises(OSError, match=rf"no space left: {size:,} bytes to write"):
        store.save(2, writer(2), size)
    assert os.listdir(store.folder) == ["step-00000001"]


def test_a_valid_checkpoint_of_the_same_step_stays(store):
    save(store, 1)
    store.save(1, writer(9), 1)
    assert store.all()[0].path.joinpath("state.json").read_bytes()[:1] == b"\x01"


CALLS = ("fsync", "rename", "replace", "open", "mkdir", "unlink", "rmdir")


def test_all_is_on_the_disk_before_the_rename_and_the_rename_after(store, monkeypatch):
    """Every file and folder of the checkpoint is flushed, the manifest after the other files; then the rename; then
    the folder that holds it."""
    calls, names = [], {}
    real_open, real_fsync, real_rename = os.open, os.fsync, os.rename
    monkeypatch.setattr(os, "open", lambda path, *a, **k: names.setdefault(fd := real_open(path, *a, **k), path) and fd)
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(Path(names.pop(fd))), real_fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append("rename"), real_rename(a, b))[1])
    save(store, 1)
    new = store.folder / ".step-00000001.tmp"
    inside = [new / "model" / "weights", new / "state.json", new / "manifest.json", new / "model", new]
    assert calls == [*inside, "rename", store.folder]


def die_at(n):
    """From here on, in this process."""
    count = itertools.count(1)
    for name in CALLS:
        real = getattr(os, name)
        setattr(os, name, lambda *a, r=real, **k: os._exit(9) if next(count) == n else r(*a, **k))


@needs_fork
def test_a_death_between_any_two_calls_to_the_system_leaves_a_valid_checkpoint(store, monkeypatch):
    """Each child process dies at its n-th call while it saves; the newest valid one is then the old or the new one."""
    save(store, 1, 2)
    before = shutil.copytree(store.folder, store.folder.with_name("before"))
    for n in itertools.count(1):
        shutil.rmtree(store.folder)
        shutil.copytree(before, store.folder)
        child = os.fork()
        if child == 0:
            die_at(n)
            save(store, 3)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found, passed = newest(store)
        assert found in (2, 3) and not passed, f"died at call {n}"
        if os.waitstatus_to_exitcode(status) == 0:
            break
    assert n > 20 and found == 3
    store.tidy()
    assert sorted(os.listdir(store.folder)) == ["step-00000002", "step-00000003"]


def kill_while_saving(store, draw):
    """Kill a process at a random moment of a series of saves; what it told, and what is then the newest valid one."""
    first = newest(store)[0] or 0
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(told)
        for step in itertools.count(first + 1):
            os.write(tell, b".")  # begun
            save(store, step)
            os.write(tell, b"!")  # done
    os.close(tell)
    os.read(told, 1)
    time.sleep(draw.random() * 0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    said = "." + os.read(told, 1 << 16).decode()
    os.close(told)
    return first + said.count("!"), first + said.count("."), newest(store)


@needs_fork
@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_at_random_moments_leave_the_newest_or_the_one_before(store, kills):
    draw = random.Random(1)
    save(store, 1)
    for _ in range(kills):
        done, begun, (found, passed) = kill_while_saving(store, draw)
        assert found in (done, begun) and not passed
        store.tidy()


def test_a_folder_has_one_trainer(tmp_path):
    script = "import sys; from pathlib import Path; from fastgpt.training.checkpoint import locked\n"
    script += "with locked(Path(sys.argv[1])): print('mine', flush=True); sys.stdin.read()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", script, tmp_path], cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "mine\n"
        with (
            pytest.raises(BlockingIOError, match=f"{tmp_path} is in use by process {process.pid} on "),
            locked(tmp_path),
        ):
            pass
        process.kill()
        process.wait()
    with locked(tmp_path), pytest.raises(BlockingIOError, match=f"process {os.getpid()} on "), locked(tmp_path):
        pass  # nothing of a killed one holds it, and this process has it once
    with locked(tmp_path):
        pass


def test_a_checkpoint_by_hand(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"it has no manifest.json"):
        Checkpoint(tmp_path, 1).verify()


def test_windows_has_its_own_lock_and_opens_no_folders(tmp_path, monkeypatch):
    """With Windows' names of things, and none of its calls."""
    asked, file = [], tmp_path / "file"
    file.touch()
    windows = types.SimpleNamespace(LK_NBLCK=2, locking=lambda *call: asked.append(call))
    with file.open() as opened, monkeypatch.context() as there:
        there.setitem(sys.modules, "msvcrt", windows)
        there.setattr(os, "open", lambda path, flags: pytest.fail(f"{path} is opened"))
        there.setattr(os, "name", "nt")
        atomic.sync(tmp_path)
        checkpoint._lock(opened)
        assert asked == [(opened.fileno(), 2, 1)]


def test_windows_locks_one_byte_for_all(tmp_path, monkeypatch):
    """With a stand-in for msvcrt, which locks bytes from where the file's descriptor stands; untried on Windows."""
    taken = set()

    def locking(descriptor, mode, count):
        place = os.lseek(descriptor, 0, os.SEEK_CUR)
        if place in taken:
            raise PermissionError(errno.EACCES, "Permission denied")
        taken.add(place)

    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setattr(checkpoint, "_lock", checkpoint._lock_on_windows)
    with locked(tmp_path):
        written = (tmp_path / checkpoint.LOCK).stat().st_size
        assert 0 < written < min(taken), "who holds it can be read"
        with pytest.raises(BlockingIOError, match=f"in use by process {os.getpid()} on"), locked(tmp_path):
            pass
