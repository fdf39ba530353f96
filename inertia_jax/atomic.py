"""Writes files and directories that appear whole or not at all."""

import contextlib
import os
import pathlib
import shutil
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def appearing(
    path: pathlib.Path, *, writer: str | None = None, commits: bool = True
) -> Iterator[pathlib.Path]:
    """Yields a path beside `path` whose content appears at `path` in one rename.

    The block writes a file or makes a directory at the path it is given. The rename
    follows when the block ends; if the block or the rename fails, nothing is left.
    Missing parents are made. Remains of a killed writer of the same name are removed.

    Args:
        path: The file or directory that shall appear. A file replaces another file; a
            directory does not replace one that has content.
        writer: A name that no other writer has at the same time. None: the name of this
            machine and process, since machines may share a disk.
        commits: Whether this process makes, renames and removes. One of several
            processes that write together does; the others are given the same path.
    """
    writer = writer or f"{socket.gethostname()}-{os.getpid()}"
    partial = path.with_name(f".{path.name}.partial-{writer}")
    if not commits:
        yield partial
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    try:
        yield partial
        partial.replace(path)
    finally:
        _remove(partial)


def _remove(partial: pathlib.Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.unlink(missing_ok=True)
