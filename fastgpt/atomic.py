"""Files that a crash can't break: replaced whole or not at all, flushed to the disk; their digests; and JSON read with
a clear error."""

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside `path` to write to, which takes its place once the block ends without an error.

    Whatever happens before, a kill and a full disk included, `path` holds what it held.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    new = Path(name)
    try:
        yield new
        new.chmod(0o666 & ~_umask())  # mkstemp's is for the owner alone
        sync(new)
        os.replace(new, path)
        sync(path.parent)
    finally:
        new.unlink(missing_ok=True)


def remove_unfinished(*paths: Path) -> None:
    """What a process that was killed inside `replacing` left beside these files. Nobody else may be writing to them."""
    for path in paths:
        for left in path.parent.glob(f".{path.name}.????????.tmp"):  # tempfile's names
            with contextlib.suppress(OSError):
                left.unlink()


def writable_folder(path: Path) -> Path:
    """`path`, made if need be; OSError unless a file can be written in it, as a trial file shows."""
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path):
        return path


@contextlib.contextmanager
def writable_or_gone(path: Path) -> Iterator[Path]:
    """writable_folder(path); where the block fails, the folders that had to be made for it go, unless they hold
    something by then."""
    made = [each for each in (path, *path.parents) if not each.exists()]
    try:
        yield writable_folder(path)
    except BaseException:
        for each in made:
            with contextlib.suppress(OSError):
                each.rmdir()
        raise


def digest(path: Path) -> str:
    """SHA-256, in hexadecimal."""
    whole = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            whole.update(piece)
    return whole.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # as some networks' do
            raise
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not an object")
    return found
