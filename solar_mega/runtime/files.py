"""Files that are either complete or absent, and bytes moved without passing through Python.

A reader never sees half of what is written here: a directory or file is built under a temporary name beside
its place (`.NAME.partial-HOST-PID`), flushed to the disk, and renamed. A crash leaves only the temporary
name, which the next writer of the same place on the same machine removes.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import socket
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from solar_mega.errors import UserError
from solar_mega.runtime.console import human_bytes

DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than this process or file system allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
}
# What copy_file_range and sendfile answer when these two files cannot be joined that way (another file
# system, an old kernel, a file system without the call); everything else is a real error.
_CANNOT = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}
_CHUNK = 64 << 20


def free_bytes(path: Path) -> int:
    """Bytes a normal user may still write at `path`, which need not exist yet."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    stats = os.statvfs(place)
    return stats.f_bavail * stats.f_frsize


def require_space(path: Path, needed: int) -> None:
    """Raises UserError when fewer than `needed` bytes are free at `path`."""
    free = free_bytes(path)
    if free < needed:
        raise UserError(
            f"not enough disk space for {path}: {human_bytes(needed)} needed, {human_bytes(free)} free; free "
            "some or write to another disk"
        )


def require_writable(directory: Path, nbytes: int) -> None:
    """Proves that `directory` takes `nbytes`, by writing them: a quota, limit or read-only mount shows only
    then. Raises UserError saying which."""
    probe = directory / ".probe"
    with disk_errors(directory):
        try:
            with open(probe, "wb") as stream:
                stream.write(bytes(nbytes))
                stream.flush()
                os.fsync(stream.fileno())
        finally:
            probe.unlink(missing_ok=True)


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file's content, streamed."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(4 << 20))
    with open(file, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


class ReadAhead:
    """Reads files from begin to end on a thread of its own, a few pieces ahead, so that who works on a piece
    does not also wait for the disk."""

    def __init__(self, piece_bytes: int, pieces: int = 8) -> None:
        """Memory: `pieces` of `piece_bytes`."""
        self._buffers = [memoryview(bytearray(piece_bytes)) for _ in range(pieces)]

    def __enter__(self) -> "ReadAhead":
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read(self, path: Path) -> Iterator[memoryview]:
        """The file's content in pieces; each is valid until the next one is asked for."""
        with open(path, "rb", buffering=0) as stream:
            coming = deque((buffer, self._pool.submit(stream.readinto, buffer)) for buffer in self._buffers)
            try:
                while coming:
                    buffer, filled = coming.popleft()
                    count = filled.result()
                    if not count:
                        break
                    yield buffer[:count]
                    coming.append((buffer, self._pool.submit(stream.readinto, buffer)))
            finally:
                for _, future in coming:
                    future.cancel() or future.exception()


def require_empty(path: Path, flag: str) -> None:
    """Raises UserError when `path` (given by `flag`) is a file, or a directory with something in it."""
    path = Path(path)
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir():
        raise UserError(f"{flag}: {path} is in the way and not a directory; name a new or empty directory")
    names = sorted(os.listdir(path))
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise UserError(
            f"{flag}: {path} is not empty ({len(names)} entries: {shown}); name a new or empty directory, or "
            "remove it first"
        )


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A full disk, a used-up quota or a missing permission in the block becomes a UserError about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        about = f" ({error.filename})" if error.filename else ""
        raise UserError(
            f"writing {path} failed: {DISK_ERRORS[error.errno]}{about}; {human_bytes(free_bytes(path))} are "
            "free there, and nothing unfinished was left behind"
        ) from error


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields an empty temporary directory beside `path`; it becomes `path` when the block ends well.

    All files are fsynced before the rename, and the rename itself after it. When the block raises, the
    temporary directory is removed and `path` is untouched. `path` may exist only as an empty directory.
    Raises UserError when another process is writing `path`, something appeared there meanwhile, or the disk
    is full.
    """
    path = Path(path).absolute()
    partial = partial_name(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        try:
            partial.mkdir()
        except FileExistsError:
            raise UserError(f"{path} is being written by another run ({partial.name}); wait for it") from None
        lock = os.open(partial, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # file systems without locks: stale directories stay
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield partial
            sync_tree(partial)
            rename_into_place(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            os.close(lock)


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Yields a temporary file beside `path` ("w" as UTF-8, or "wb") that replaces `path` after the block."""
    if mode not in ("w", "wb"):
        raise ValueError(f"mode {mode!r}: atomic_file writes whole files, so 'w' or 'wb'")
    path = Path(path).absolute()
    partial = partial_name(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, mode, encoding=None if "b" in mode else "utf-8") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def sync_file(path: Path | str) -> None:
    """Puts a file's bytes on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Makes renames and new names inside `path` survive a power cut."""
    sync_file(path)


def copy_range(
    source: int,
    source_offset: int,
    target: int,
    target_offset: int,
    count: int,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Moves `count` bytes between two open files inside the kernel; file positions of `source` are not used.

    copy_file_range where both files allow it (on XFS and btrfs it shares blocks), sendfile across file
    systems, plain reads and writes where neither works. `advance` is called with the bytes of each step.
    Raises EOFError when the source ends early, OSError from the disk.
    """
    ways = [_by_copy_file_range, _by_sendfile, _by_read_write]
    done = 0
    while done < count:
        try:
            step = ways[0](
                source, source_offset + done, target, target_offset + done, min(count - done, _CHUNK)
            )
        except OSError as error:
            if len(ways) == 1 or error.errno not in _CANNOT:
                raise
            ways.pop(0)
            continue
        if step == 0:
            if len(ways) == 1:
                raise EOFError(f"the source ended {count - done} bytes early")
            ways.pop(0)  # some file systems answer 0 to a call they cannot do
            continue
        done += step
        if advance:
            advance(step)


def _by_copy_file_range(source: int, source_offset: int, target: int, target_offset: int, count: int) -> int:
    if not hasattr(os, "copy_file_range"):
        raise OSError(errno.ENOSYS, "copy_file_range")
    return os.copy_file_range(source, target, count, source_offset, target_offset)


def _by_sendfile(source: int, source_offset: int, target: int, target_offset: int, count: int) -> int:
    os.lseek(target, target_offset, os.SEEK_SET)
    return os.sendfile(target, source, source_offset, count)


def _by_read_write(source: int, source_offset: int, target: int, target_offset: int, count: int) -> int:
    return write_all(target, os.pread(source, min(count, 4 << 20), source_offset), target_offset)


def read_into(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Fills `buffer` (writable bytes) from `offset`. Raises EOFError when the file is shorter."""
    done = 0
    while done < len(buffer):
        step = os.preadv(descriptor, [buffer[done:]], offset + done)  # at most 2 GiB a call
        if step == 0:
            raise EOFError(f"the file ended {len(buffer) - done} bytes early")
        done += step


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> int:
    """Writes all of `data` at `offset`; returns its length."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
    return done


def partial_name(path: Path) -> Path:
    """The temporary name under which this process builds `path`."""
    return path.parent / f".{path.name}.partial-{_host()}-{os.getpid()}"


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_.]", "_", socket.gethostname())


def _remove_stale(path: Path) -> None:
    """Removes temporary directories that a killed run on this machine left for the same place."""
    for place in abandoned(path):
        shutil.rmtree(place, ignore_errors=True)


def abandoned(path: Path) -> Iterator[Path]:
    """Temporary directories that killed runs on this machine left for `path`, each locked while it is
    looked at.

    The owner holds a lock as long as it lives. Other machines' directories are left alone: their locks may
    not be visible from here.
    """
    prefix = f".{path.name}.partial-{_host()}-"
    for name in sorted(os.listdir(path.parent)):
        place = path.parent / name
        if not name.startswith(prefix) or not name[len(prefix) :].isdigit() or not place.is_dir():
            continue
        descriptor = os.open(place, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            yield place
        finally:
            os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Puts all files of `directory` and their names on the disk."""
    for place, _, files in os.walk(directory):
        for name in files:
            sync_file(os.path.join(place, name))
        sync_directory(Path(place))


def rename_into_place(partial: Path, path: Path) -> None:
    """Makes `partial` appear as `path`, which may be an empty directory. Raises UserError when it is not."""
    try:
        os.rename(partial, path)  # replaces an empty directory, refuses any other
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise UserError(
                f"{path} appeared while it was being written; nothing there was touched"
            ) from error
        raise
    sync_directory(path.parent)
