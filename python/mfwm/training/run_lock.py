"""One process trains in a run directory at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

NAME = ".lock"
# Errors of file systems without locks, such as NFS without its lock daemon.
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lock the run in `out`. BlockingIOError names the process that holds it, if another one does.

    The kernel releases the lock when its process ends, however it ends, and NFS when its host is gone. The file stays,
    because a process that has opened a deleted file would lock nothing; its contents only say who locked it last.
    """
    descriptor = os.open(out / NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with open(descriptor, "r+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                warnings.warn(
                    f"{out} cannot be locked on this file system ({error.strerror}): "
                    "make sure that no other process trains in it",
                    stacklevel=2,
                )
            elif error.errno in (errno.EAGAIN, errno.EACCES):
                raise BlockingIOError(
                    f"{out} is in use: {holder(file.read())} trains in it; wait for it, stop it, or choose another out"
                ) from None
            else:
                raise
        content = file.read()
        if content and not is_lock(content):
            raise ValueError(f"out holds {NAME}, which no run wrote: choose another out than {out}")
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        file.seek(0)
        file.truncate()
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode())
        try:
            yield
        finally:
            file.truncate(0)


def is_lock(content: bytes) -> bool:
    """Whether these are the contents of a run's lock file."""
    try:
        named = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(named, dict) and set(named) == {"pid", "host", "since"}


def holder(content: bytes) -> str:
    """The process that a lock file names."""
    try:
        named = json.loads(content)
        return f"process {named['pid']} on {named['host']}, since {named['since']},"
    except (ValueError, TypeError, KeyError):
        return "another process"  # One that has locked the file but not written to it yet.
