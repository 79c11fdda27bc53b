"""An exclusive lock of a folder, which is released when its process ends, in any way."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmm_distill.errors import UserError
from fmm_distill.io.files import writing

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["LockedError", "is_lock_file", "locked"]

logger = logging.getLogger(__name__)

_LOCK, _CLAIM = ".fmm_distill.lock", ".fmm_distill.claim"

_POLL = 0.2
# A folder or a lock file that another process removes as it ends is made again; nobody does that many times in a row.
_TRIES = 20
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)

_held: set[int] = set()


class LockedError(UserError):
    """Another process holds the lock of a folder.

    Attributes:
        holder: the folder and the process.
    """

    def __init__(self, holder: str, advice: str) -> None:
        super().__init__(f"{holder}; {advice}")
        self.holder = holder


def is_lock_file(name: str) -> bool:
    """Tell a lock's file by its name. A process that was killed leaves it behind; it makes no folder anybody's."""
    return name == _LOCK or name.startswith(_CLAIM)


@contextmanager
def locked(folder: Path, purpose: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is missing and removed again if nothing is in it at the end.

    Of processes that a launcher started together the first holds the lock for all; in the others this does nothing.
    The kernel's lock (flock) disappears with its process. On a file system without it a file is the lock, which is
    taken over if its process is gone on the same machine.

    Args:
        purpose: a noun for messages of other processes, such as "a run".
        wait: wait for the other process instead of refusing.

    Raises:
        LockedError: if another process holds it, with the process and what to do.
        UserError: if the folder can't be written to.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    missing = _missing(folder)
    try:
        handle = _acquire(folder, purpose, wait=wait)
        try:
            yield
        finally:
            _release(folder, handle)
    finally:
        for made in missing:
            try:
                made.rmdir()
            except OSError:
                # It holds something, or was never made.
                break


def _missing(folder: Path) -> list[Path]:
    """The folders that have to be made for this one, the deepest first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _acquire(folder: Path, purpose: str, *, wait: bool) -> int | None:
    """The handle of the kernel's lock; None: a file is the lock."""
    waits, tries = False, 0
    with writing(folder):
        while True:
            try:
                return _try(folder, purpose)
            except FileNotFoundError:
                tries += 1
                if tries == _TRIES:
                    raise
            except LockedError as error:
                if not wait:
                    raise
                if not waits:
                    logger.warning(f"{error.holder}; waiting for it to end")
                waits = True
                time.sleep(_POLL)


def _try(folder: Path, purpose: str) -> int | None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / _LOCK
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise LockedError(*_refusal(folder, _read(file))) from error
    except OSError as error:
        os.close(handle)
        if error.errno not in _NO_LOCKS:
            raise
        file.unlink(missing_ok=True)
        _claim(folder, purpose)
        return None
    try:
        # The holder before removes the file as it ends: a lock on a removed file excludes nobody.
        if not os.path.samestat(os.fstat(handle), file.stat()):
            raise FileNotFoundError(errno.ENOENT, "it was removed", str(file))
        _write(handle, purpose)
    except BaseException:
        os.close(handle)
        raise
    _held.add(handle)
    return handle


def _write(handle: int, purpose: str) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, _about(purpose).encode(), 0)


def _release(folder: Path, handle: int | None) -> None:
    # Removed while it is held, or another process's would be removed.
    (folder / (_CLAIM if handle is None else _LOCK)).unlink(missing_ok=True)
    if handle is not None:
        _held.discard(handle)
        os.close(handle)


def _forget() -> None:
    """A forked child has the open files of its parent, and with them would hold the lock after the parent's end."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def _claim(folder: Path, purpose: str) -> None:
    """Take the lock where the kernel has none: a file that is created only if it is not there."""
    claim = folder / _CLAIM
    there = _read(claim)
    if there and _is_gone(there):
        # Of two processes that find it one renames it.
        grave = folder / f"{_CLAIM}.{os.getpid()}"
        claim.rename(grave)
        if _read(grave) != there:
            grave.rename(claim)
        grave.unlink(missing_ok=True)
    try:
        with claim.open("x", encoding="utf-8") as file:
            file.write(_about(purpose))
    except FileExistsError as error:
        holder, advice = _refusal(folder, _read(claim))
        raise LockedError(holder, f"{advice}; if that process is gone, remove {claim}") from error
    logger.warning(f"the file system of {folder} has no locks: {claim.name} takes their place")


def _about(purpose: str) -> str:
    """The holder of a lock, as JSON."""
    holder = {"purpose": purpose, "pid": os.getpid(), "host": socket.gethostname(), "started": time.time()}
    return json.dumps(holder | {"process": _start_of(os.getpid())}) + "\n"


def _read(file: Path) -> dict[str, Any]:
    """The holder that a lock names; empty: not written yet, or not readable."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _refusal(folder: Path, holder: dict[str, Any]) -> tuple[str, str]:
    """The holder of a lock, and what to do."""
    pid, host, started = holder.get("pid"), holder.get("host"), holder.get("started")
    if pid is None:
        return f"{folder} is in use by another process", "wait for it to end, or choose another folder"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started)) if isinstance(started, int | float) else "?"
    where = "" if host == socket.gethostname() else f" on {host}"
    return (
        f"{folder} is in use by {holder.get('purpose')}: process {pid} on {host}, since {since}",
        f"wait for it to end, stop it (kill {pid}{where}), or choose another folder",
    )


def _is_gone(holder: dict[str, Any]) -> bool:
    """Tell if a process of this machine has ended; one of the same number that started later is another."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    if not _is_alive(pid):
        return True
    start = _start_of(pid)
    return start is not None and holder.get("process") is not None and start != holder["process"]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        # It is another user's.
        return True
    return True


def _start_of(pid: int) -> str | None:
    """The boot of the machine and the clock tick in it at which a process started; None: the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        # The name, in parentheses, may hold spaces and parentheses itself.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return f"{boot} {fields[19]}"
