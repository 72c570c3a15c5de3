"""What a command is said to cost, and from which state it starts."""

import ctypes
import mmap
import os

import pytest

from solar_mega.bench.commands import cold_start, measured
from solar_mega.errors import UserError


def test_counts_of_a_command(tmp_path):
    script = f"head -c 3000000 /dev/zero > {tmp_path / 'file'}"
    figures = measured(["bash", "-c", script])
    assert 3_000_000 <= figures["written_bytes"] < 3_200_000 and figures["read_bytes"] >= 3_000_000
    assert figures["resident_bytes"] > 1 << 20 and figures["wall_s"] > 0
    with pytest.raises(UserError, match="exit code 3:\nwhat went wrong"):
        measured(["bash", "-c", "echo what went wrong; exit 3"])


def test_a_cold_start_drops_the_inputs_from_the_page_cache_and_keeps_them(tmp_path):
    content = os.urandom(1 << 20)
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / "data"
    file.write_bytes(content)
    os.sync()
    assert _cached(file) == 1
    cold_start([tmp_path / "in"], 1 << 20, tmp_path)
    if _cached(file) == 1:
        pytest.skip("this file system keeps what it is asked to drop (tmpfs)")
    assert _cached(file) == 0
    assert file.read_bytes() == content
    filler = tmp_path / "filler"
    assert filler.stat().st_size == 4 << 20 and filler.stat().st_blocks == 0, "sparse: pages, but no disk"
    assert _cached(filler) == 1


def _cached(file) -> float:
    """Share of a file's pages in memory, as mincore(2) tells."""
    size = file.stat().st_size
    with open(file, "r+b") as stream, mmap.mmap(stream.fileno(), size) as mapped:
        pages = (ctypes.c_ubyte * (size // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        done = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), pages)
        del start
        assert done == 0, os.strerror(ctypes.get_errno())
        return sum(page & 1 for page in pages) / len(pages)
