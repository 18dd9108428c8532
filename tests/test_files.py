"""files.py: a commit is all or nothing, whatever stops it, and readers see whole states only."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import files

NAMES = ("a.bin", "sub/b.bin", "c.json")


def save(directory: Path, value: int, size=50_000) -> None:
    """Commit state `value`: every file holds nothing but that number."""
    writers = {name: lambda file: file.write(bytes([value]) * size) for name in NAMES}
    files.commit(directory, writers, {"value": value})


def load(directory: Path) -> int:
    """The one state the directory holds. Raises where it holds none or parts of two."""
    values = {files.read_marker(directory)["value"]}
    for name in NAMES:
        with files.open_verified(directory, name) as file:
            values |= set(file.read())
    assert len(values) == 1, f"parts of several states: {values}"
    return values.pop()


def forked(action) -> int:
    """Run `action` in a forked child and return its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except files.SaveError:
            os._exit(3)
        except BaseException:
            os._exit(4)
    return os.waitpid(pid, 0)[1]


def test_a_commit_holds_what_was_written_and_leaves_nothing_else(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert load(tmp_path) == 2
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(
        (*NAMES, files.MARKER)
    )


def test_files_that_a_later_commit_does_not_name_stay_in_force(tmp_path):
    save(tmp_path, 1)
    files.commit(tmp_path, {"d.txt": lambda file: file.write(b"new")}, {"value": 1})
    assert load(tmp_path) == 1
    assert set(files.read_marker(tmp_path)["files"]) == {*NAMES, "d.txt"}


def interrupt_at(n: int, act) -> None:
    """Count the calls that touch the disk, and let the n-th do `act` instead."""
    count = 0

    def wrap(function):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count == n:
                act()
            return function(*arguments, **options)

        return call

    os.fsync, os.replace = wrap(os.fsync), wrap(os.replace)
    files.HashedFile.write = wrap(files.HashedFile.write)
    files.sync_directory = wrap(files.sync_directory)


def test_a_kill_at_every_single_step_leaves_the_old_or_the_new_state(tmp_path):
    save(tmp_path, 0)
    seen = set()
    for n in range(1, 60):
        value = n % 200 + 1
        old = load(tmp_path)

        def child(n=n, value=value):
            interrupt_at(n, lambda: os.kill(os.getpid(), signal.SIGKILL))
            save(tmp_path, value)

        status = forked(child)
        now = load(tmp_path)
        assert now in (old, value)
        seen.add(now == value)
        if status == 0:
            break
    else:
        pytest.fail("a commit has more steps than this test tries")
    assert n > 15, "the kill never came while a commit was running"
    assert seen == {True, False}


def test_a_kill_at_two_hundred_random_moments_leaves_the_old_or_the_new_state(tmp_path):
    save(tmp_path, 0)
    start = time.perf_counter()
    forked(lambda: save(tmp_path, 0))
    duration = time.perf_counter() - start
    draw, outcomes = random.Random(0), {"old": 0, "new": 0}
    for n in range(200):
        value, old = n % 250 + 1, load(tmp_path)
        pid = os.fork()
        if pid == 0:
            save(tmp_path, value)
            os._exit(0)
        time.sleep(draw.uniform(0, 2 * duration))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        now = load(tmp_path)
        assert now in (old, value)
        outcomes["new" if now == value else "old"] += 1
    assert min(outcomes.values()) > 0, outcomes
    save(tmp_path, 3)
    assert not list(tmp_path.rglob(".*.nanoforge-new"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_an_error_at_every_single_step_loses_nothing_and_leaves_no_litter(tmp_path, code):
    save(tmp_path, 0)

    def fail():
        raise OSError(code, os.strerror(code))

    for n in range(1, 60):
        value, old = n + 1, load(tmp_path)

        def child(n=n, value=value):
            interrupt_at(n, fail)
            save(tmp_path, value)

        status = forked(child)
        assert load(tmp_path) in (old, value)
        if os.waitstatus_to_exitcode(status) == 3:  # a SaveError: the commit never came to its renames
            assert not list(tmp_path.rglob(f".*{files.NEW}"))
        if status == 0:
            break
    save(tmp_path, 99)
    assert load(tmp_path) == 99
    assert not list(tmp_path.rglob(".*.nanoforge-new"))


def test_a_full_disk_is_one_sentence_and_the_old_state_stays(tmp_path):
    save(tmp_path, 1)
    script = (
        "import resource, sys; from pathlib import Path\n"
        "sys.path[:0] = sys.argv[3:]\n"
        "import test_files\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)\n"
        "test_files.save(Path(sys.argv[1]), 2)\n"
    )
    here = Path(__file__).parent
    for limit in (0, 1, 4096, 49_999):
        command = [sys.executable, "-c", script, str(tmp_path), str(limit), str(here), str(here.parent)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1
        assert "SaveError: cannot write" in done.stderr and "MB free" in done.stderr and "intact" in done.stderr
        assert load(tmp_path) == 1
        assert not list(tmp_path.rglob(".*.nanoforge-new"))


def verified(directory: Path) -> bytes:
    with files.open_verified(directory, "a.bin") as file:
        return file.read()


def unverified(directory: Path) -> bytes:
    assert files.exists(directory / "a.bin")
    return files.read(directory / "a.bin")


@pytest.mark.parametrize("content", [verified, unverified])
def test_a_reader_beside_a_writer_never_meets_an_error(tmp_path, content):
    save(tmp_path, 0)
    pid = os.fork()
    if pid == 0:
        for value in range(1, 250):
            save(tmp_path, value)
        os._exit(0)
    reads = 0
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        assert len(set(content(tmp_path))) == 1
        reads += 1
    assert reads > 20
    assert load(tmp_path) == 249


@pytest.mark.parametrize("content", [verified, unverified])
def test_a_file_renamed_between_looking_and_opening_is_read(tmp_path, monkeypatch, content):
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(files, "recover", lambda directory: None)  # as a kill before the renames leaves it
        save(tmp_path, 2)
    find, recover = files.find, iter([files.recover])

    def then_renamed(directory, name):
        found = find(directory, name)
        next(recover, lambda directory: None)(directory)
        return found

    monkeypatch.setattr(files, "find", then_renamed)
    assert set(content(tmp_path)) == {2}
    assert next(recover, None) is None


def test_what_is_not_there_is_not_read(tmp_path):
    assert not files.exists(tmp_path / "a.bin")
    with pytest.raises(FileNotFoundError):
        files.read(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "49,999 bytes where export_meta.json says 50,000"),
        (lambda path: path.write_bytes(b"\x01" + path.read_bytes()[1:]), "its sha256 is"),
        (lambda path: path.unlink(), "it is missing"),
    ],
)
def test_a_damaged_file_is_refused_with_what_is_wrong(tmp_path, damage, words):
    save(tmp_path, 5)
    damage(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"a\.bin is damaged") as error, files.open_verified(tmp_path, "a.bin"):
        pass
    assert words in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"files": 3}'])
def test_a_damaged_marker_is_refused(tmp_path, text):
    save(tmp_path, 5)
    (tmp_path / files.MARKER).write_text(text)
    with pytest.raises(ValueError, match="is damaged"):
        files.read_marker(tmp_path)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_file_modes_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.rglob("*") if p.is_file()} == {mode}


def test_a_mapped_file_is_never_written_over(tmp_path):
    import mmap

    save(tmp_path, 1)
    with open(tmp_path / "a.bin", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        save(tmp_path, 2, size=10)
        assert view[:] == b"\x01" * 50_000
    assert load(tmp_path) == 2


def test_a_directory_is_locked_for_other_processes_and_free_after_a_kill(tmp_path):
    ready = tmp_path / "ready"
    pid = os.fork()
    if pid == 0:
        with files.lock(tmp_path / "run"):
            ready.touch()
            time.sleep(60)
    while not ready.exists():
        time.sleep(0.01)
    with pytest.raises(ValueError, match="is being written by another process"), files.lock(tmp_path / "run"):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with files.lock(tmp_path / "run"):
        pass


def test_a_home_that_nobody_knows_is_no_folder_called_tilde(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", os.fspath)  # as where neither HOME nor the system says
    for path in ("~", Path("~/x")):
        with pytest.raises(ValueError, match=rf"{path}: the home folder is not known"):
            files.expanded(path)
    assert files.expanded("~$x") == Path("~$x")


def test_a_tilde_is_somebodys_home_or_stays(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert [str(files.expanded(path)) for path in ("~/x", Path("~"), "~$x.txt", "~no-such-user/x", "a/~", "")] == [
        *("/home/me/x", "/home/me", "~$x.txt", "~no-such-user/x", "a/~", ".")
    ]


def test_writing_atomically_keeps_the_old_content_when_it_fails(tmp_path):
    path = tmp_path / "x.json"
    files.write_atomic(path, json.dumps({"a": 1}).encode())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3, before[1]))
    try:
        with pytest.raises(files.SaveError, match="cannot write"):
            files.write_atomic(path, b"much too long")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_disk_that_nobody_may_write_to_any_more_is_told_as_every_failed_save(tmp_path, monkeypatch):
    def refuse(*_, **__):  # such a disk refuses to remove even what is not there
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    save(tmp_path, 1)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(files.SaveError, match=r"cannot write .*a\.bin: Read-only file system.* intact"):
        files.commit(tmp_path, {"a.bin": refuse}, {"value": 2})
    assert load(tmp_path) == 1
