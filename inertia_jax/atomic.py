"""Writes files and directories that appear whole or not at all."""

import contextlib
import errno
import hashlib
import os
import pathlib
import re
import shlex
import shutil
import socket
import time
from collections.abc import Iterator

# The longest name whose partial fits into the 255 bytes that file systems allow.
_LONGEST_NAME = 160


@contextlib.contextmanager
def appearing(
    path: pathlib.Path,
    *,
    writer: str | None = None,
    commits: bool = True,
    through_links: bool = True,
) -> Iterator[pathlib.Path]:
    """Yields a path beside `path` whose content appears at `path` in one rename.

    The block writes a file or makes a directory at the path it is given. The rename
    follows when the block ends; if the block or the rename fails, nothing is left.
    Missing parents are made. Remains of killed writers are removed.

    Args:
        path: The file or directory that shall appear. A file replaces another file; a
            directory does not replace one that has content.
        writer: A name that no other writer has at the same time. None: the name of this
            machine and process, since machines may share a disk.
        through_links: Whether what a symbolic link at `path` points to is replaced, not
            the link.
        commits: Whether this process makes, renames and removes. One of several
            processes that write together does; the others are given the same path.

    Raises:
        ValueError: `path` is a URL.
        OSError: The block or the rename failed; the error names `path`.
    """
    path = local_path(path)
    if through_links and path.is_symlink():
        path = pathlib.Path(os.path.realpath(path))
    machine = this_machine()
    name = path.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    partial = path.with_name(f".{name}.partial-{writer or f'{machine}-{os.getpid()}'}")
    if not commits:
        yield partial
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if writer is None:
            _remove_rests(path.parent, machine)
        remove(partial)
        try:
            yield partial
            if path.is_file() and partial.is_file():
                shutil.copymode(path, partial)
            partial.replace(path)
        finally:
            remove(partial)
    except OSError as error:
        # The errors of writing name no file, others the one that is not seen.
        number = error.errno
        # NumPy's error of a full disk has no number.
        if re.fullmatch(r"\d+ requested and \d+ written", str(error)):
            number = errno.ENOSPC
        if number and str(partial) in str(error.filename or partial):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def local_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns a path of this machine's file system.

    Raises:
        ValueError: It is a URL, which `pathlib` would take for a local directory.
    """
    # `pathlib` makes one slash of two. A drive of Windows has one letter.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(path)):
        url = os.fspath(path)
        is_web = url.startswith(("http:", "https:", "ftp:"))
        download = f" `curl -LO {shlex.quote(url)}` downloads it." if is_web else ""
        raise ValueError(
            f"{url} is a URL; files are read and written by paths of this "
            f"machine alone: mount that storage, or copy from and to it.{download}"
        )
    return pathlib.Path(path)


def remove(path: pathlib.Path) -> None:
    """Removes a file, or a directory with all that it holds, if there is one."""
    if path.is_dir() and not path.is_symlink():
        # Threads of a writer that has failed may still be adding files.
        for pause in (0.0, 0.1, 0.4):
            time.sleep(pause)
            shutil.rmtree(path, ignore_errors=True)
            if not path.exists():
                return
    else:
        path.unlink(missing_ok=True)


def this_machine() -> str:
    """Returns the name of this machine, or of this container on it."""
    try:
        # Containers may share a host's name, but not the numbers of their processes.
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return f"{socket.gethostname()}-{namespace}"


def _remove_rests(directory: pathlib.Path, machine: str) -> None:
    """Removes what writers of this machine left that were killed."""
    for rest in directory.glob(".*.partial-*"):
        match = re.search(rf"\.partial-{re.escape(machine)}-(\d+)$", rest.name)
        if match and not _is_alive(int(match[1])):
            remove(rest)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True
