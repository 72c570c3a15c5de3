"""Files that are complete or absent: crashes, full disks, rivals, and bytes moved by every route."""

import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap

import pytest

from solar_mega.errors import UserError
from solar_mega.runtime import files
from solar_mega.runtime.files import (
    ReadAhead,
    atomic_directory,
    atomic_file,
    copy_range,
    free_bytes,
    require_empty,
    require_space,
)


def run_python(code, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, **kwargs
    )


def test_directory_appears_complete_and_alone(tmp_path):
    target = tmp_path / "deep" / "model"
    with atomic_directory(target) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "a").write_text("x")
        assert not target.exists() and partial.name.startswith(".model.partial-")
    assert (target / "sub" / "a").read_text() == "x"
    assert os.listdir(target.parent) == ["model"]


def test_directory_may_replace_only_an_empty_one(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    with atomic_directory(target) as partial:
        (partial / "a").write_text("new")
    assert (target / "a").read_text() == "new"
    with pytest.raises(UserError, match="appeared"), atomic_directory(target) as partial:
        (partial / "b").write_text("newer")
    assert os.listdir(target) == ["a"] and os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_failure(tmp_path, error):
    with pytest.raises(type(error)), atomic_directory(tmp_path / "model") as partial:
        (partial / "a").write_text("half")
        raise error
    with pytest.raises(type(error)), atomic_file(tmp_path / "file") as stream:
        stream.write("half")
        raise error
    assert os.listdir(tmp_path) == []


def test_one_writer_at_a_time(tmp_path):
    with (
        atomic_directory(tmp_path / "model") as partial,
        pytest.raises(UserError, match="written by another run"),
        atomic_directory(tmp_path / "model"),
    ):
        pass
    assert not partial.exists() and (tmp_path / "model").is_dir()


def test_a_killed_run_leaves_no_directory_and_the_next_one_cleans_up(tmp_path):
    code = f"""
        import os, signal
        from solar_mega.runtime.files import atomic_directory
        with atomic_directory({str(tmp_path / "model")!r}) as partial:
            (partial / "a").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run_python(code).returncode == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".model.partial-")
    other = tmp_path / ".model.partial-another_machine-77"  # may be alive: its lock is not visible from here
    other.mkdir()
    with atomic_directory(tmp_path / "model") as partial:
        (partial / "a").write_text("whole")
    assert sorted(os.listdir(tmp_path)) == [other.name, "model"]


def test_a_living_writer_is_left_alone(tmp_path):
    code = f"""
        import sys
        from solar_mega.runtime.files import atomic_directory
        with atomic_directory({str(tmp_path / "model")!r}) as partial:
            (partial / "a").write_text("theirs")
            print("ready", flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as rival:
        assert rival.stdout.readline() == "ready\n"
        with atomic_directory(tmp_path / "model") as partial:
            (partial / "a").write_text("ours")
        rival.stdin.close()
        assert rival.wait() != 0, "the second to finish must not replace the first"
    assert (tmp_path / "model" / "a").read_text() == "ours"
    assert os.listdir(tmp_path) == ["model"]


def test_full_disk_is_a_user_error_and_leaves_nothing(tmp_path):
    """A real limit of the kernel (RLIMIT_FSIZE answers EFBIG) in a process of its own."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    code = f"""
        from solar_mega.errors import UserError
        from solar_mega.runtime.files import atomic_directory, atomic_file
        for manager, name in ((atomic_directory, "model"), (atomic_file, "file")):
            try:
                with manager({str(tmp_path)!r} + "/" + name) as out:
                    stream = out if name == "file" else open(out / "a", "w")
                    stream.write("x" * (2 << 20))
                    stream.flush()
            except UserError as error:
                print(error)
    """
    result = run_python(code, preexec_fn=limit)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("larger than this process or file system allows") == 2
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_disk_errors_are_explained(tmp_path, code):
    with pytest.raises(UserError, match="model.*nothing unfinished"), atomic_directory(tmp_path / "model"):
        raise OSError(code, os.strerror(code))
    with pytest.raises(OSError), atomic_directory(tmp_path / "model"):
        raise OSError(errno.EIO, "a failing disk is not the user's doing")


def test_atomic_file_replaces_as_a_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_file(path) as stream:
        stream.write("new é")
        assert path.read_text() == "old"
    assert path.read_text("utf-8") == "new é"
    with atomic_file(path, "wb") as stream:
        stream.write(b"\0")
    assert path.read_bytes() == b"\0" and os.listdir(tmp_path) == ["file"]
    with pytest.raises(ValueError), atomic_file(path, "a"):
        pass


def test_require_empty(tmp_path):
    require_empty(tmp_path / "absent", "--out")
    require_empty(tmp_path, "--out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out: .*not empty .1 entries: file"):
        require_empty(tmp_path, "--out")
    with pytest.raises(UserError, match="not a directory"):
        require_empty(tmp_path / "file", "--out")


def test_space(tmp_path):
    absent = tmp_path / "a" / "b"
    stats = os.statvfs(tmp_path)
    assert abs(free_bytes(absent) - stats.f_bavail * stats.f_frsize) < 1 << 30
    require_space(absent, 1)
    with pytest.raises(UserError, match="not enough disk space"):
        require_space(absent, 1 << 62)


def test_reading_ahead_gives_the_files_content(tmp_path):
    contents = [os.urandom(size) for size in (0, 1, 4096, 10_000, 100_000)]
    with ReadAhead(4096, pieces=3) as ahead:
        for number, content in enumerate(contents):
            (tmp_path / str(number)).write_bytes(content)
            assert b"".join(map(bytes, ahead.read(tmp_path / str(number)))) == content
        for piece in ahead.read(tmp_path / "4"):
            assert bytes(piece) == contents[4][:4096]
            break  # the rest is not wanted
        assert b"".join(map(bytes, ahead.read(tmp_path / "3"))) == contents[3]
        with pytest.raises(FileNotFoundError):
            next(ahead.read(tmp_path / "absent"))


ROUTES = [files._by_copy_file_range, files._by_sendfile, files._by_read_write]


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
@pytest.mark.parametrize("places", ["same", "across"])
def test_every_route_moves_the_same_bytes(tmp_path, route, places):
    other = "/dev/shm" if places == "across" and os.path.isdir("/dev/shm") else tmp_path
    data = os.urandom(9_000_001)
    (tmp_path / "a").write_bytes(data)
    target = os.path.join(other, f"solar-mega-test-{os.getpid()}")
    with open(tmp_path / "a", "rb") as source, open(target, "wb+") as sink:
        os.unlink(target)
        done = 0
        try:
            while done < 8_500_000:
                done += route(source.fileno(), 17 + done, sink.fileno(), 5 + done, 8_500_000 - done)
        except OSError as error:
            assert error.errno in files._CANNOT, "a route may decline, and copy_range then takes the next"
        sink.truncate(0)
        steps = []
        copy_range(source.fileno(), 17, sink.fileno(), 5, 8_500_000, steps.append)
        assert sum(steps) == 8_500_000
        assert os.pread(sink.fileno(), 9_000_000, 0) == bytes(5) + data[17 : 17 + 8_500_000]


@pytest.mark.parametrize("answer", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, "nothing"])
def test_falls_back_when_the_kernel_declines(tmp_path, monkeypatch, answer):
    def declines(*_):
        if answer == "nothing":
            return 0
        raise OSError(answer, "declined")

    monkeypatch.setattr(os, "copy_file_range", declines)
    monkeypatch.setattr(os, "sendfile", declines)
    (tmp_path / "a").write_bytes(b"0123456789")
    with open(tmp_path / "a", "rb") as source, open(tmp_path / "b", "wb+") as sink:
        copy_range(source.fileno(), 2, sink.fileno(), 0, 5)
    assert (tmp_path / "b").read_bytes() == b"23456"


def test_real_errors_and_short_sources_are_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"0123")
    with open(tmp_path / "a", "rb") as source, open(tmp_path / "b", "wb+") as sink:
        with pytest.raises(EOFError, match="2 bytes early"):
            copy_range(source.fileno(), 0, sink.fileno(), 0, 6)

        def full(*_):
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(os, "copy_file_range", full)
        with pytest.raises(OSError, match="full"):
            copy_range(source.fileno(), 0, sink.fileno(), 0, 4)
