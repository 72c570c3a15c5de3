"""Rows of every kind of file, and what is said of those that cannot be used."""

import gzip
import json

import pytest

from solar_mega.data.rows import DatasetSpec, Row, parse_spec, read_rows
from solar_mega.data.sources import BadRecord
from solar_mega.errors import UserError

RECORDS = [{"prompt": f"question {i}", "nested": [{"role": "user", "content": "é"}]} for i in range(5)]


def values(path, **options):
    return [row.values for row in read_rows(DatasetSpec("plain", str(path), **options))]


def write(path, records=RECORDS):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(json.dumps(records, indent=1) if path.name == "array.json" else lines)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "array.json", "a.jsonl.gz", "a.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    assert values(write(tmp_path / name)) == RECORDS
    assert values(tmp_path / name, rows=(1, 3)) == RECORDS[1:3]


def test_dataset_directories_and_their_splits(tmp_path):
    import datasets

    whole = datasets.Dataset.from_list(RECORDS)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "test": whole.select([4])}).save_to_disk(tmp_path / "two")
    assert values(tmp_path / "one") == values(tmp_path / "two") == RECORDS
    assert values(tmp_path / "two", split="test") == RECORDS[4:]
    with pytest.raises(UserError, match="no split 'valid'; write split=NAME, one of train, test"):
        values(tmp_path / "two", split="valid")


def test_a_directory_of_files_chosen_by_split(tmp_path):
    write(tmp_path / "train-0.parquet", RECORDS[:2])
    write(tmp_path / "train-1.parquet", RECORDS[2:])
    write(tmp_path / "test-0.parquet", RECORDS[:1])
    assert values(tmp_path, split="train") == RECORDS
    with pytest.raises(UserError, match="no .json, .jsonl or .parquet file whose name begins with 'dev'"):
        values(tmp_path, split="dev")


def test_unusable_records_say_where_they_are(tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": \n"text"\n{"a": "\xff"}\n{"a": 2}\n')
    rows = list(read_rows(DatasetSpec("plain", str(file))))
    assert [row.values for row in rows if isinstance(row, Row)] == [{"a": 1}, {"a": 2}]
    bad = [row.describe() for row in rows if isinstance(row, BadRecord)]
    assert [text.split(": ")[0] for text in bad] == [f"{file}:{line}" for line in (3, 4, 5)]
    assert "not JSON" in bad[0] and "but str" in bad[1] and "not UTF-8" in bad[2]
    assert rows[0].where() == f"{file}:1"


def test_specs():
    spec = parse_spec('plain "my files/a.jsonl" samples=12 rows=5: split=prefs', "data.train", ["plain"])
    assert spec == DatasetSpec("plain", "my files/a.jsonl", 12, (5, None), "prefs")
    for text in (
        "plain",
        "other a.jsonl",
        "plain a samples=0",
        "plain a rows=3:3",
        "plain a size=3",
        'plain "a',
    ):
        with pytest.raises(UserError, match="data.train: "):
            parse_spec(text, "data.train", ["plain"])


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        values(tmp_path / "gone.jsonl")
    (tmp_path / "broken.json").write_text("[1,")
    with pytest.raises(UserError, match="not a JSON array"):
        values(tmp_path / "broken.json")


def test_a_file_per_record(tmp_path):
    for number, record in enumerate(RECORDS):
        (tmp_path / f"{number}.json").write_text(json.dumps(record, indent=4))
    assert values(tmp_path) == RECORDS
