"""What a crash can't break: files that are replaced whole or not at all, and folders of checkpoints.

A checkpoint is a folder step-00000200 whose manifest.json names each file with its size and SHA-256. It is written
beside its place, flushed to the disk, and renamed; so a folder of that name is whole, or a disk has changed it since,
which its manifest shows. This file knows nothing of what is inside: state.py does.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

from fastgpt.atomic import digest, sync

MANIFEST, LOCK = "manifest.json", ".lock"
_LOCKED_BYTE = 1 << 20
KEPT = 2  # of the newest checkpoints; the best one is kept beside them
_NAME = re.compile(r"step-(\d{8,})")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep `folder` for this process; BlockingIOError that names the other one if it has it.

    The system holds the lock, and lets go of it however the process ends: a kill leaves nothing to clean up.
    """
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        try:
            _lock(file)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                raise OSError(
                    error.errno, f"this file system can't lock a file: {error.strerror}", str(folder)
                ) from error
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise BlockingIOError(f"{folder} is in use by {owner}: two trainers would mix their files") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
        file.truncate(0)


def _lock(file: IO) -> None:
    if os.name == "nt":
        _lock_on_windows(file)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lock_on_windows(file: IO) -> None:
    """One byte, the same for all, far past what is written: others may not even read a byte that is locked there."""
    import msvcrt

    os.lseek(file.fileno(), _LOCKED_BYTE, os.SEEK_SET)
    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]


class Checkpoint(NamedTuple):
    path: Path
    step: int

    def manifest(self) -> dict:
        """What manifest.json says, held to its own form; ValueError or FileNotFoundError says what is wrong."""
        try:
            found = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(f"it has no {MANIFEST}") from None
        except ValueError as error:
            raise ValueError(f"{MANIFEST} is not JSON: {error}") from error
        files = found.get("files") if isinstance(found, dict) else None
        if not isinstance(files, dict) or not files or found.get("step") != self.step:
            raise ValueError(f"{MANIFEST} is not the manifest of step {self.step}")
        for name, said in files.items():
            if not isinstance(said, dict) or not isinstance(said.get("bytes"), int) or "sha256" not in said:
                raise ValueError(f"{MANIFEST} does not say the size and SHA-256 of {name}")
            if Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
                raise ValueError(f"{MANIFEST} names {name!r}, which is not in the checkpoint")
        return found

    def verify(self, contents: bool = True) -> dict:
        """The manifest, once every file agrees with it; without `contents` by size alone, which reads no file."""
        manifest = self.manifest()
        for name, said in manifest["files"].items():
            file = self.path / name
            if file.is_symlink() or not file.is_file():
                raise ValueError(f"{name} is not there")
            if file.stat().st_size != said["bytes"]:
                raise ValueError(f"{name} has {file.stat().st_size} bytes, not {said['bytes']}")
            if contents and digest(file) != said["sha256"]:
                raise ValueError(f"{name} is not what was written: its SHA-256 differs")
        return manifest


class Checkpoints:
    """The checkpoints in one folder, for the one process that writes there."""

    def __init__(self, folder: Path):
        self.folder = folder

    def all(self) -> list[Checkpoint]:
        """By step, the oldest first; whole or not."""
        if not self.folder.is_dir():
            return []
        found = ((path, _NAME.fullmatch(path.name)) for path in self.folder.iterdir())
        return sorted((Checkpoint(path, int(name[1])) for path, name in found if name), key=lambda each: each.step)

    def newest(self) -> tuple[Checkpoint | None, list[tuple[Checkpoint, str]]]:
        """The newest checkpoint that is whole, and those passed over with the reason."""
        passed = []
        for checkpoint in reversed(self.all()):
            try:
                checkpoint.verify()
            except (ValueError, OSError) as error:
                passed.append((checkpoint, str(error)))
            else:
                return checkpoint, passed
        return None, passed

    def save(self, step: int, write: Callable[[Path], None], size: int, **facts) -> Checkpoint:
        """A checkpoint of the files that `write` makes in a folder it is given, about `size` bytes of them.

        `facts` (JSON values, val_loss among them) go into the manifest. A valid checkpoint of this step is left as it
        is. OSError for a disk that is full or fails; what was there before is then there still.
        """
        new = self.begin(step, size)
        if new is not None:
            try:
                write(new)
                self.commit(step, new, facts)
            except BaseException:
                shutil.rmtree(new, ignore_errors=True)
                raise
        return self.of(step)

    def of(self, step: int) -> Checkpoint:
        """Where the checkpoint of a step has its place, whether it is there or not."""
        return Checkpoint(self.folder / f"step-{step:08d}", step)

    def begin(self, step: int, size: int, token: str = "") -> Path | None:
        """A new folder beside the place of that step's checkpoint, for about `size` bytes; None where a valid one has
        the place. token: of this one attempt, where others that died slowly may still write to theirs."""
        checkpoint = self.of(step)
        if checkpoint.path.exists():
            try:
                checkpoint.verify()
                return None
            except (ValueError, OSError):
                self.set_aside(checkpoint)
        self.folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(self.folder).free) < size:
            raise OSError(errno.ENOSPC, f"no space left: {size:,} bytes to write, {free:,} free", str(self.folder))
        new = self.folder / f".{checkpoint.path.name}.{token}tmp"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        return new

    def commit(self, step: int, new: Path, facts: dict, flushed: Mapping[str, str] | None = None) -> None:
        """Seal what was written in `new` and give it the place. flushed: the SHA-256 of files that other processes
        wrote, and flushed themselves."""
        self._seal(new, {"step": step, **facts}, flushed or {})
        os.rename(new, self.of(step).path)
        sync(self.folder)
        self.purge()

    def _seal(self, new: Path, facts: dict, flushed: Mapping[str, str]) -> None:
        """Flush every file and folder of `new` to the disk, its manifest last."""
        files = {path.relative_to(new).as_posix(): path for path in sorted(new.rglob("*")) if path.is_file()}
        if missing := sorted(flushed.keys() - files.keys()):
            raise FileNotFoundError(errno.ENOENT, "another process wrote it, and it is not there", missing[0])
        sizes = {}
        for name, file in files.items():
            if name not in flushed:
                sync(file)
            sizes[name] = {"bytes": file.stat().st_size, "sha256": flushed.get(name) or digest(file)}
        manifest = new / MANIFEST
        manifest.write_text(json.dumps({**facts, "files": sizes}, indent=2) + "\n", encoding="utf-8")
        sync(manifest)
        for folder in (*(path for path in new.rglob("*") if path.is_dir()), new):
            sync(folder)

    def purge(self) -> None:
        """Remove all but the newest two whole checkpoints and the one of lowest val_loss; not those that are broken,
        which are not ours to judge twice."""
        whole, losses = [], {}
        for checkpoint in self.all():
            with contextlib.suppress(ValueError, OSError):
                loss = checkpoint.verify(contents=False).get("val_loss")
                whole.append(checkpoint)
                if isinstance(loss, float) and loss == loss:
                    losses[checkpoint] = loss
        kept = {*whole[-KEPT:], *sorted(losses, key=lambda each: losses[each])[:1]}
        for checkpoint in whole:
            if checkpoint not in kept:
                self._remove(checkpoint.path)

    def clear(self) -> None:
        """Remove them all, for a run that starts anew."""
        for checkpoint in self.all():
            self._remove(checkpoint.path)

    def tidy(self) -> None:
        """Remove what a killed save or purge left behind."""
        if self.folder.is_dir():
            for path in self.folder.glob(".step-*"):
                shutil.rmtree(path, ignore_errors=True)

    def set_aside(self, checkpoint: Checkpoint) -> None:
        """Give a broken checkpoint a name under which nothing looks for it."""
        aside = self.folder / f"broken-{checkpoint.path.name}"
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(checkpoint.path, aside)

    def _remove(self, path: Path) -> None:
        """First out of its name, for half a checkpoint must not bear it; a disk that refuses keeps it."""
        with contextlib.suppress(OSError):
            gone = path.with_name(f".{path.name}.gone")
            os.rename(path, gone)
            shutil.rmtree(gone)
