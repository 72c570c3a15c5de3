import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from solar_mega.data import tokenize as module
from solar_mega.data.command import tokenize as tokenize_verb
from solar_mega.data.command import tokenizer as tokenizer_verb
from solar_mega.data.documents import cut_into_pieces
from solar_mega.data.indexed import corpus_paths, open_corpus
from solar_mega.data.sources import ReadOptions, find_sources
from solar_mega.data.tokenize import tokenize
from solar_mega.data.tokenizer import load_tokenizer
from solar_mega.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def documents_of(prefix) -> list[list[int]]:
    """The corpus as stock Megatron reads it."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


def expected(tokenizer, texts) -> list[list[int]]:
    return [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]


def contents(prefix) -> list[bytes]:
    return [path.read_bytes() for path in corpus_paths(prefix)]


def test_stock_megatron_reads_every_document_with_one_eos(tokenizer, sources, write_jsonl, tmp_path):
    texts = sources[:40]
    report = tokenize([str(write_jsonl("a.jsonl", texts))], tokenizer, tmp_path / "out" / "c", workers=1)
    assert documents_of(tmp_path / "out" / "c") == expected(tokenizer, texts)
    assert report.documents == 40
    assert report.tokens == open_corpus(tmp_path / "out" / "c").tokens
    assert report.text_bytes == sum(len(text.encode()) for text in texts)
    description = json.loads((tmp_path / "out" / "c.json").read_text())
    assert description["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    assert (description["documents"], description["tokens"]) == (40, report.tokens)
    assert description["largest_id"] < tokenizer.vocab_size


@pytest.mark.slow
def test_the_corpus_does_not_depend_on_the_number_of_workers(
    tokenizer, hf_tokenizer, sources, write_jsonl, tmp_path
):
    path = write_jsonl("a.jsonl", sources)
    for name, workers, which in (("one", 1, tokenizer), ("three", 3, tokenizer), ("hf", 2, hf_tokenizer)):
        tokenize([str(path)], which, tmp_path / name, workers=workers)
    one, three, hf = (contents(tmp_path / name) for name in ("one", "three", "hf"))
    assert one == three
    assert (one[0], one[2]) == (hf[0], hf[2])


def test_formats_and_compressions_agree(tokenizer, sources, tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = [text for text in sources[:30] if text]
    lines = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines[:5000]) + gzip.compress(lines[5000:]))
    zst = [pyarrow.compress(part, "zstd", asbytes=True) for part in (lines[:5000], lines[5000:])]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(zst))
    table = pyarrow.table({"id": range(len(texts)), "text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    (tmp_path / "files").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "files" / f"{i:03}.txt").write_bytes(text.encode())
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "files"):
        tokenize([str(tmp_path / name)], tokenizer, tmp_path / "out" / name, workers=1)
        assert documents_of(tmp_path / "out" / name) == expected(tokenizer, texts), name
    (tmp_path / "lines.txt").write_text("first\n\n second \r\nlast", encoding="utf-8")
    options = ReadOptions(txt_document="line")
    report = tokenize(
        [str(tmp_path / "lines.txt")], tokenizer, tmp_path / "out" / "lines", options=options, workers=1
    )
    assert documents_of(tmp_path / "out" / "lines") == expected(tokenizer, ["first", " second ", "last"])
    assert report.empty == 1


@pytest.mark.parametrize("piece_bytes", [1, 7, 64, 1000, 1 << 20])
def test_pieces_of_any_size_hold_every_record_once_and_in_order(tmp_path, piece_bytes):
    import pyarrow
    import pyarrow.parquet

    texts = [f"document {i} " + "é" * (i * 37 % 91) for i in range(60)]
    lines = "\n".join(
        json.dumps({"text": text}, ensure_ascii=False) for text in texts
    )  # no newline at the end
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "c.parquet", row_group_size=17)
    sources = find_sources([str(tmp_path)])
    pieces = list(cut_into_pieces(sources, ReadOptions(), piece_bytes))
    assert [record for piece in pieces for record in piece.records(ReadOptions())] == 3 * texts
    assert sum(piece.nbytes for piece in pieces) == sum(source.nbytes for source in sources)


def test_large_row_groups_are_shared_out(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    from solar_mega.data import documents

    texts = [f"row {i}" for i in range(5000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "c.parquet", use_dictionary=False)
    monkeypatch.setattr(documents, "_ROW_PIECE_BYTES", 9000)
    pieces = list(cut_into_pieces(find_sources([str(tmp_path)]), ReadOptions()))
    assert len(pieces) > 3
    assert [record for piece in pieces for record in piece.records(ReadOptions())] == texts


BAD_LINES = [
    b'{"text": "good"}',
    b'{"text": "cut',
    b"",
    b'{"txt": "other key"}',
    b'{"text": null}',
    b"[1]",
    b'{"text": "\xff"}',
    b'{"text": "\\ud800"}',
    b'{"text": ""}',
    b'{"text": "\\ud83d\\ude42"}',
]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_bad_records_stop_with_file_and_line_or_are_counted(tokenizer, tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    data = b"\n".join(BAD_LINES)
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    with pytest.raises(UserError) as caught:
        tokenize([str(path)], tokenizer, tmp_path / "c", workers=1)
    message = str(caught.value)
    for line, reason in (
        (2, "not JSON"),
        (4, 'no "text" (it has "txt")'),
        (5, "null"),
        (6, "a JSON list"),
        (7, "UTF-8"),
    ):
        assert f"{path}:{line}: " in message and reason in message
    assert "--skip-bad" in message
    assert not list(tmp_path.glob("*c.*")) and not list(tmp_path.glob(".c.*"))
    report = tokenize([str(path)], tokenizer, tmp_path / "c", workers=1, skip_bad=True)
    assert (report.documents, report.bad, report.empty) == (2, 6, 1)
    assert documents_of(tmp_path / "c") == expected(tokenizer, ["good", "\U0001f642"])


def test_input_problems_are_reported_together_before_any_work(tokenizer, tmp_path):
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "b.txt").write_text("text")
    given = [str(tmp_path / name) for name in ("nothing.jsonl", "a.csv", "empty", "b.txt", "*.txt")]
    with pytest.raises(UserError) as caught:
        tokenize(given, tokenizer, tmp_path / "c")
    message = str(caught.value)
    assert "4 problems" in message
    for part in (
        "nothing.jsonl: no such file",
        "a.csv: unknown kind",
        "empty: no .jsonl",
        "b.txt is given twice",
    ):
        assert part in message
    (tmp_path / "a.jsonl").write_text('{"content": "x", "url": "y"}\n')
    (tmp_path / "b.json").write_text('[{"text": "x"}]')
    (tmp_path / "c.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "d.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(UserError) as caught:
        tokenize(
            [str(tmp_path / n) for n in ("a.jsonl", "b.json", "c.parquet", "d.jsonl.gz")],
            tokenizer,
            tmp_path / "c",
        )
    message = str(caught.value)
    for part in (
        'has "content", "url"; name the key with --key',
        "one JSON array",
        "not a readable parquet",
        "cannot be read",
    ):
        assert part in message
    assert not corpus_paths(tmp_path / "c")[2].exists()


def test_empty_corpora_and_occupied_outputs_are_refused(tokenizer, write_jsonl, tmp_path):
    with pytest.raises(UserError, match="no documents in .*: 2 empty, 0 unusable; nothing was written"):
        tokenize([str(write_jsonl("e.jsonl", ["", ""]))], tokenizer, tmp_path / "c", workers=1)
    assert not list(tmp_path.glob("*c.*"))
    path = str(write_jsonl("a.jsonl", ["some text"]))
    tokenize([path], tokenizer, tmp_path / "c.bin", workers=1)
    with pytest.raises(UserError, match=r"c\.bin, .*c\.json, .*c\.idx exists.*--overwrite"):
        tokenize([path], tokenizer, tmp_path / "c", workers=1)
    tokenize([str(write_jsonl("b.jsonl", ["other"]))], tokenizer, tmp_path / "c", workers=1, overwrite=True)
    assert documents_of(tmp_path / "c") == expected(tokenizer, ["other"])
    with pytest.raises(UserError, match="--output .* is a directory"):
        tokenize([path], tokenizer, tmp_path, workers=1)
    with pytest.raises(UserError, match="--workers = 0"):
        tokenize([path], tokenizer, tmp_path / "d", workers=0)


def test_a_full_disk_leaves_nothing(tokenizer, sources, write_jsonl, tmp_path):
    """The file size limit stands in for the disk: both refuse the write, one with EFBIG."""
    path = write_jsonl("a.jsonl", sources[:20])
    code = (
        "import resource, signal, sys; from solar_mega.__main__ import main;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        f"sys.exit(main(['tokenize', {str(path)!r}, '--tokenizer', {str(tokenizer.path)!r}, "
        f"'--output', {str(tmp_path / 'c')!r}, '--workers', '1']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert "failed" in done.stderr and "Traceback" not in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def command(path, tokenizer, output, workers):
    words = [sys.executable, "-m", "solar_mega", "tokenize", str(path), "--tokenizer", str(tokenizer.path)]
    return [*words, "--output", str(output), "--workers", str(workers)]


def test_a_killed_run_leaves_neither_corpus_nor_processes_and_can_be_repeated(
    tokenizer, sources, write_jsonl, tmp_path
):
    path = write_jsonl("a.jsonl", sources * 4)
    partial = tmp_path / ".c.bin.partial"
    run = subprocess.Popen(command(path, tokenizer, tmp_path / "c", 2), cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while (
        not (partial.exists() and partial.stat().st_size)
        and run.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    children = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, "ended before it could be killed"
    assert not list(tmp_path.glob("c.*"))
    with pytest.raises(UserError, match="not found"):
        open_corpus(tmp_path / "c")
    while any(alive(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children and not any(alive(pid) for pid in children)
    subset = write_jsonl("b.jsonl", sources[:3])
    tokenize([str(subset)], tokenizer, tmp_path / "c", workers=1)
    assert documents_of(tmp_path / "c") == expected(tokenizer, sources[:3])
    assert not list(tmp_path.glob(".c.*"))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _die(item):
    os.kill(os.getpid(), signal.SIGKILL)


def _nothing() -> None:
    pass


def test_a_worker_that_is_killed_is_an_error_not_a_hang():
    with pytest.raises(UserError, match="worker process was killed"):
        list(module.ordered_map(_die, iter(range(3)), 2, _nothing, ()))


def test_the_verbs(tokenizer, sources, write_jsonl, tmp_path, capsys):
    path = str(write_jsonl("a.jsonl", sources[:30]))
    tokenizer_verb([path, "--output", str(tmp_path / "tok"), "--vocab-size", "400"])
    made = load_tokenizer(tmp_path / "tok" / "tokenizer.model")
    words = ["--tokenizer", str(made.path), "--output", str(tmp_path / "c"), "--workers", "1"]
    tokenize_verb([path, *words])
    out = capsys.readouterr().out
    assert "400 tokens" in out and "30 documents" in out and "tokens/s" in out
    with pytest.raises(UserError, match="--tokenizer"):
        tokenize_verb([path, "--output", str(tmp_path / "d")])
    with pytest.raises(UserError, match="INPUTS"):
        tokenize_verb(words[:3] + [str(tmp_path / "d")])
    with pytest.raises(UserError, match="no such file"):  # before the tokenizer, which may take seconds
        tokenize_verb(["nowhere.jsonl", "--tokenizer", "nowhere", "--output", str(tmp_path / "d")])
