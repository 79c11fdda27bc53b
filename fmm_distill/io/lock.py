"""An exclusive lock of a folder, which is released when its process ends, however it ends."""

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

# Seconds between two attempts while another process holds the lock.
_POLL = 0.2
# The lock file, or its folder, may be removed between two calls by a process that ends. More than a few times in a row
# means that the folder can't be created at all.
_TRIES = 20
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)

_held: set[int] = set()


class LockedError(UserError):
    """Another process holds the lock of a folder.

    Attributes:
        holder: a sentence that names the folder and the process.
    """

    def __init__(self, holder: str, advice: str) -> None:
        super().__init__(f"{holder}; {advice}")
        self.holder = holder


def is_lock_file(name: str) -> bool:
    """Tell a lock file by its name. A killed process leaves it behind, in a folder that is otherwise free."""
    return name == _LOCK or name.startswith(_CLAIM)


@contextmanager
def locked(folder: Path, purpose: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder, which is created if it is missing and removed again if it is empty at the end.

    Among processes of one launcher the first holds the lock for all; in the others this does nothing. The kernel
    releases its lock (flock) when the process ends. File systems without flock get a lock file instead, which another
    process takes over once its owner has ended on the same machine.

    Args:
        purpose: a noun for the messages of other processes, such as "a run".
        wait: wait for the other process instead of raising.

    Raises:
        LockedError: if another process holds the lock; the message names it and says what to do.
        UserError: if the folder is not writable.
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
                # It has content, or was never created.
                break


def _missing(folder: Path) -> list[Path]:
    """Return the missing folders on the path to this one, the deepest first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _acquire(folder: Path, purpose: str, *, wait: bool) -> int | None:
    """Return the handle of the kernel's lock; None: the lock is a file."""
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
                    logger.warning(f"{error.holder}; waiting for that process to end")
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
        # The previous holder removes the file when it ends, and a lock on a removed file excludes nobody.
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
    # The file is removed while the lock is held; later it may be the one of another process.
    (folder / (_CLAIM if handle is None else _LOCK)).unlink(missing_ok=True)
    if handle is not None:
        _held.discard(handle)
        os.close(handle)


def _forget() -> None:
    """Close the lock files in a forked child, which would otherwise hold the locks after its parent has ended."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def _claim(folder: Path, purpose: str) -> None:
    """Take the lock on a file system without flock, by creating a file exclusively."""
    claim = folder / _CLAIM
    there = _read(claim)
    if there and _is_gone(there):
        # Two processes may find the stale file; renaming decides which of them removes it.
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
    logger.warning(f"the file system of {folder} has no locks (flock); using the lock file {claim.name}")


def _about(purpose: str) -> str:
    """Return a description of this process as a lock holder, in JSON."""
    holder = {"purpose": purpose, "pid": os.getpid(), "host": socket.gethostname(), "started": time.time()}
    return json.dumps(holder | {"process": _start_of(os.getpid())}) + "\n"


def _read(file: Path) -> dict[str, Any]:
    """Return the holder that a lock file names; empty: it is not written yet, or not readable."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _refusal(folder: Path, holder: dict[str, Any]) -> tuple[str, str]:
    """Return a sentence on the holder of a lock, and advice."""
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
    """Tell if a process of this machine has ended. A process with the same number that started later is another one."""
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
        # The process exists and belongs to another user.
        return True
    return True


def _start_of(pid: int) -> str | None:
    """Return the boot of the machine and the clock tick at which a process started; None: the system has no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        # The name in parentheses may contain spaces and parentheses, so fields are counted from the last one.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return f"{boot} {fields[19]}"
