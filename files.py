"""Writing files so that a crash, a full disk or a kill at any instant loses nothing. Knows nothing about models.

One file: `write_atomic`. Several that belong together, all or nothing, with a marker that lists them: `commit`.

    1. every file is written beside its place as `.NAME.nanoforge-new`, flushed and fsynced;
    2. the marker is written as PENDING: from this instant the new state is the state;
    3. the new files are renamed into place, PENDING becomes the marker.

A stop before 2 leaves the old state and some litter; a stop after 2 leaves the new one, half of it still under its
temporary name. Readers go through `open_verified`, `read` or, for several files, `of_one_save`, which find each file
under either name and write nothing; the next `commit` or `recover` finishes the renames. A reader that knows none of
this sees whole files of either state.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MARKER = "export_meta.json"
PENDING = ".export_meta.pending.json"
NEW = ".nanoforge-new"  # nobody else's files end in this, so that sweeping can only take our own
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SaveError(OSError):
    """Something could not be written. The message says what and why, and that nothing was lost."""


class HashedFile:
    """A binary file opened for writing that knows the size and the sha256 of what went through it."""

    def __init__(self, file: BinaryIO):
        self.file, self.size, self.digest, self.error = file, 0, hashlib.sha256(), None

    def write(self, data) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error  # torch.save reports a failed write as something else; keep the cause
            raise
        self.size += memoryview(data).nbytes
        self.digest.update(data)
        return memoryview(data).nbytes

    def flush(self) -> None:
        self.file.flush()

    def entry(self) -> dict[str, Any]:
        return {"size": self.size, "sha256": self.digest.hexdigest()}


def staged_name(path: Path) -> Path:
    return path.with_name(f".{path.name}{NEW}")


Content = bytes | Callable[[HashedFile], Any]  # of a file: itself, or what fills an open one


def stage(path: Path, content: Content) -> dict[str, Any]:
    """Write what will become `path` beside it, durably, and return its size and sha256. Leaves nothing when it fails.

    Opening with "wb" creates the file as the umask says, unlike `tempfile` or safetensors' own writer (mode 0600).
    """
    hashed = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(staged_name(path), "wb") as file:
            hashed = HashedFile(file)
            hashed.write(content) if isinstance(content, bytes) else content(hashed)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        with contextlib.suppress(OSError):  # what was wrong with writing may be wrong with this too
            staged_name(path).unlink()
        cause = hashed.error if hashed and hashed.error else error
        if isinstance(cause, OSError):
            raise save_error(path, cause) from error
        raise
    return hashed.entry()


def save_error(path: Path, error: OSError) -> SaveError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno is None or error.errno in DISK_FULL:  # numpy says in words alone how much it could not write
        with contextlib.suppress(OSError):
            reason += f" ({shutil.disk_usage(path.parent).free / 1e6:,.0f} MB free)"
    return SaveError(f"cannot write {path}: {reason}; what was saved before is intact")


def check_room(folder: Path, needed: int) -> None:
    """Raise OSError if the disk of a folder, which need not be there yet, has less than so many bytes free."""
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OSError(f"{there} has {free / 1e6:,.0f} MB free, and saving needs {needed / 1e6:,.0f} MB")


def sync_directory(path: Path) -> None:
    """Make renames in `path` durable, where the system can (Windows cannot open a folder)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def expanded(path: str | os.PathLike) -> Path:
    """A path as somebody typed it, with a leading ~ replaced by the home folder. `~$notes.txt` names no user and stays.

    Raises ValueError where the home folder is not known.
    """
    found = os.path.expanduser(path)
    if found == "~" or found.startswith("~/"):
        raise ValueError(f"{path}: the home folder is not known (neither HOME nor the system's list of users says)")
    return Path(found)


def free_name(path: Path, ending: str) -> Path:
    """`path` with `ending`, and with a number behind that where there is such a file or folder already."""
    names = (path.with_name(f"{path.name}{ending}{number or ''}") for number in itertools.count())
    return next(name for name in names if not name.exists())


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the content of `path`: afterwards it is the old or the new one, whatever happens. One process at a time:
    others would write to the same temporary name."""
    stage(path, data)
    os.replace(staged_name(path), path)
    sync_directory(path.parent)


def commit(
    directory: Path,
    contents: dict[str, Content],
    meta: dict[str, Any],
    staged: dict[str, dict[str, Any]] | None = None,
    without: Collection[str] = (),
) -> None:
    """Write several files and the marker as one: all of them are in force afterwards, or none.

    `contents` are by relative name, and `staged` names what other processes have staged since the last `recover`, with
    what `stage` gave for it. Files the marker lists already are kept, but not those of `without`. `meta` is stored in
    the marker beside the list.
    """
    if not staged:
        recover(directory)
    entries = {**(read_marker(directory) or {}).get("files", {}), **(staged or {})}
    entries = {name: entry for name, entry in entries.items() if name not in without}
    try:
        for name, content in contents.items():
            entries[name] = stage(directory / name, content)
        marker = json.dumps({**meta, "files": entries}, indent=2, allow_nan=False).encode()
        stage(directory / PENDING, marker)
    except BaseException:
        for name in (*contents, *(staged or ())):
            with contextlib.suppress(OSError):  # as in `stage`
                staged_name(directory / name).unlink()
        raise
    os.replace(staged_name(directory / PENDING), directory / PENDING)
    sync_directory(directory)
    recover(directory)
    for name in without:
        (directory / name).unlink(missing_ok=True)


def recover(directory: Path) -> None:
    """Finish the commit that PENDING describes, or sweep what one that never got so far has left. Only for writers."""
    if (directory / PENDING).exists():
        names = json.loads((directory / PENDING).read_bytes())["files"]
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.replace(staged_name(directory / name), directory / name)
        for folder in {(directory / name).parent for name in names}:
            sync_directory(folder)
        os.replace(directory / PENDING, directory / MARKER)
        sync_directory(directory)
    for litter in (*directory.glob(f".*{NEW}"), *directory.glob(f"*/.*{NEW}")):
        litter.unlink(missing_ok=True)


def read_marker(directory: Path) -> dict[str, Any] | None:
    """The marker in force, or None where there is none. Raises ValueError when it is not readable as one."""
    for name in (PENDING, MARKER):
        try:
            marker = json.loads((directory / name).read_bytes())
            listing = marker.get("files") if isinstance(marker, dict) else None
            if isinstance(listing, dict) and all(map(_is_entry, listing.values())):
                return marker
        except (FileNotFoundError, NotADirectoryError):
            continue
        except ValueError:
            pass
        raise ValueError(f"{directory / name} is damaged: it is not the JSON that a save writes")
    return None


def _is_entry(value: Any) -> bool:
    entry = value if isinstance(value, dict) else {}
    return isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)


def listed(marker: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The size and sha256 of each file by its name; none where there is no marker."""
    return marker["files"] if marker else {}


def find(directory: Path, name: str) -> Path:
    """Where a file of the state in force lies: under its temporary name if its commit was cut short before renaming."""
    staged = staged_name(directory / name)
    return staged if (directory / PENDING).exists() and staged.exists() else directory / name


def read(path: Path) -> bytes:
    """The content in force of a file, also while a commit renames it. FileNotFoundError where there is none."""
    while True:
        found = find(path.parent, path.name)
        try:
            return found.read_bytes()
        except FileNotFoundError:
            if find(path.parent, path.name) == found:
                raise


def exists(path: Path) -> bool:
    """Whether there is something for `read`."""
    return find(path.parent, path.name).exists() or path.exists()  # it may have been renamed between the two


@contextlib.contextmanager
def open_verified(directory: Path, name: str) -> Iterator[BinaryIO]:
    """Open a file that the marker lists, after comparing its size and sha256.

    A writer may publish a new state meanwhile, so a problem counts only if nothing has moved since.
    Raises ValueError for a file that is missing, cut short or altered.
    """
    while True:
        marker, path = read_marker(directory), find(directory, name)
        expected = listed(marker).get(name)
        if expected is None:
            raise ValueError(f"{directory / MARKER} lists no {name}")
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(open(path, "rb"))
                problem = _difference(file, expected)
            except FileNotFoundError:
                problem = "it is missing"
            if problem is None:
                file.seek(0)
                yield file
                return
        if (read_marker(directory), find(directory, name)) == (marker, path):
            raise ValueError(f"{directory / name} is damaged: {problem}")


def read_verified(directory: Path, name: str) -> bytes:
    with open_verified(directory, name) as file:
        return file.read()


def _difference(file: BinaryIO, expected: dict[str, Any]) -> str | None:
    size = os.fstat(file.fileno()).st_size
    if size != expected["size"]:
        return f"{size:,} bytes where {MARKER} says {expected['size']:,}"
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    return None if digest == expected["sha256"] else f"its sha256 is {digest[:12]}..., not {expected['sha256'][:12]}..."


def of_one_save(directory: Path, read: Callable[[dict[str, Any] | None], Any]) -> tuple[Any, dict[str, Any] | None]:
    """(what `read` makes of the directory, the marker in force that it was given): what was read of two states, or not
    found because it was just renamed, is read again."""
    while True:
        before = in_force(directory)
        try:
            found = read(before[0])
            if in_force(directory) == before:
                return found, before[0]
        except (ValueError, OSError):
            if in_force(directory) == before:
                raise


def in_force(directory: Path) -> tuple[dict[str, Any] | None, list[Path]]:
    """The marker, and where each of its files lies."""
    marker = read_marker(directory)
    return marker, [find(directory, name) for name in listed(marker)]


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Keep a second process from writing to the same directory. Raises ValueError when one does already.

    The lock is on the directory itself, and the system drops it when the process ends, however it ends. Without `fcntl`
    (Windows) nothing is locked.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise save_error(directory, error) from error
    if fcntl is None:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{directory} is being written by another process") from None
        except OSError:
            pass  # NFS locks no folders; a run there goes on unlocked
        yield
    finally:
        os.close(descriptor)
