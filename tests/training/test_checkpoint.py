import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import fastgpt
from fastgpt.atomic import replacing, writable_folder

ROOT = Path(fastgpt.__file__).parents[1]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    return path


def test_replaces_when_the_block_ends(path):
    with replacing(path) as new:
        new.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["file"]


def test_makes_a_file_that_was_not_there(tmp_path):
    with replacing(tmp_path / "file") as new:
        new.write_text("new")
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_inside_leaves_the_old_file_alone(path, error):
    with pytest.raises(error), replacing(path) as new:
        new.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file"]


def test_an_error_inside_leaves_no_file_where_none_was(tmp_path):
    with pytest.raises(RuntimeError), replacing(tmp_path / "file") as new:
        new.write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file_alone(path, monkeypatch, call):
    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="no space left"), replacing(path) as new:
        new.write_text("new")
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file"]


def test_content_is_on_the_disk_before_it_takes_its_place(path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a)))
    with replacing(path) as new:
        new.write_text("new")
    assert calls[:2] == ["fsync", "replace"]


def test_a_killed_process_leaves_the_old_file_alone(path):
    script = """
import sys, time
from pathlib import Path
from fastgpt.atomic import replacing
with replacing(Path(sys.argv[1])) as new, new.open("w") as file:
    file.write("half")
    file.flush()
    print("writing", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script, path], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        process.kill()
    assert path.read_text() == "old"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_mode_follows_the_umask(path, umask, mode):
    before = os.umask(umask)
    try:
        with replacing(path) as new:
            new.write_text("new")
    finally:
        after = os.umask(before)
    assert path.stat().st_mode & 0o777 == mode
    assert after == umask


def test_writable_folder_makes_the_folder_and_leaves_it_empty(tmp_path):
    assert writable_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert os.listdir(tmp_path / "a" / "b") == []


@pytest.mark.parametrize("name", ["file", "file/out", "file/out/deeper"])
def test_writable_folder_at_or_under_a_file(path, name):
    with pytest.raises(OSError, match="file"):
        writable_folder(path.parent / name)
    assert path.read_text() == "old"


def test_writable_folder_tries_to_write(tmp_path, monkeypatch):
    @contextlib.contextmanager
    def refuse(dir):
        raise PermissionError(f"permission denied: {dir}")
        yield

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        writable_folder(tmp_path)
