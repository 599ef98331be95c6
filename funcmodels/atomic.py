"""Replacing a folder at once: whoever is killed half-way leaves the old folder or the new one.

The new folder is written beside the old one under a temporary name, flushed to disk, and put in
its place by one rename. Over an existing folder that is an exchange of the two names
(renameat2 with RENAME_EXCHANGE), which has no moment in between. Where the system or the file
system has no exchange, the old folder is renamed away first; killed between the two renames, it
lies beside under a fixed name, and `recover`, which loading and saving call first, renames it back.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from funcmodels.errors import CheckpointError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2

_count = itertools.count()


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A fresh folder to write into, which takes the place of `folder` when the block ends.

    Raises:
        CheckpointError: `folder` cannot be replaced: it holds the working directory, it is a mount
            point, or a file.
    """
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(
            f"{folder} is a file",
            need="a folder, or a name not yet taken",
            fix=f"save into {folder.with_name(folder.name + '-model')}",
        )
    if Path.cwd().is_relative_to(folder) or os.path.ismount(folder):
        raise CheckpointError(
            f"{folder} cannot be replaced at once",
            got="a mount point" if os.path.ismount(folder) else "the working directory is inside",
            need="a folder that can be renamed",
            fix=f"save into a folder inside it, e.g. {folder / 'model'}",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder)
    _drop_stale(folder)
    new = folder.with_name(f"{_prefix(folder)}{os.getpid()}-{next(_count)}")
    new.mkdir()
    if folder.exists():
        shutil.copymode(folder, new)
    try:
        yield new
        for path in [*new.rglob("*"), new]:
            sync(path)
        _swap(new, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        recover(folder)


def recover(folder: Path) -> None:
    """Put the old folder back if a replacement was stopped between its two renames."""
    folder = folder.resolve()
    away = _away(folder)
    if away.is_dir() and not folder.exists():
        away.rename(folder)
    elif away.is_dir():
        shutil.rmtree(away, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _swap(new: Path, folder: Path) -> None:
    """Put `new` at `folder`; what was there ends under a temporary name."""
    if not folder.exists():
        new.rename(folder)
    elif not exchange(new, folder):
        folder.rename(_away(folder))
        new.rename(folder)


def exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:  # musl before 1.2.6 and glibc before 2.28
        return False
    return renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def _prefix(folder: Path) -> str:
    """Start of the temporary names of this machine, so that another's are left alone."""
    return f".{folder.name}.saving-{socket.gethostname()}-"


def _away(folder: Path) -> Path:
    """Where the old folder lies between the two renames."""
    return folder.with_name(f".{folder.name}.replaced")


def _drop_stale(folder: Path) -> None:
    """Delete what processes of this machine that no longer run have left half-written."""
    prefix = _prefix(folder)
    for path in folder.parent.iterdir():
        if path.name.startswith(prefix):
            pid = path.name.removeprefix(prefix).partition("-")[0]
            if pid.isdigit() and not _runs(int(pid)):
                shutil.rmtree(path, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_file(path: Path, data: bytes) -> None:
    """Write a file at once: readers see the old one or the new one, never a part."""
    new = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}-{next(_count)}")
    try:
        new.write_bytes(data)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
