"""`bench merge` on models of a few kilobytes: what it reports, and that it cleans up."""

import json

import pytest

from solar_mega.bench import merge
from solar_mega.errors import UserError
from tests.families import make_family


def test_report(tmp_path, capsys):
    first, second = (make_family("llama_mha", tmp_path / name) for name in "ab")
    options = merge.MergeBench(
        work=tmp_path / "work",
        models=(first, second),
        contestants=("cp", "solar_mega"),
        methods=("linear",),
        out=tmp_path / "merge.json",
    )
    merge.run(options)
    report = json.loads((tmp_path / "merge.json").read_text())
    assert [r["contestant"] for r in report["results"]] == ["cp", "solar_mega"]
    ours = report["results"][1]
    assert ours["method"] == "linear" and ours["cpu_seconds"] > 0 and 10e6 < ours["peak_resident_bytes"] < 1e9
    assert report["settings"]["layers"] == 4
    assert not options.work.exists()
    assert "peak resident" in capsys.readouterr().out


def test_bad_input(tmp_path):
    options = merge.MergeBench(work=tmp_path, models=(tmp_path,), methods=("ties",), contestants=("rsync",))
    with pytest.raises(UserError) as error:
        merge.run(options)
    for said in ("two are merged, got 1", "--methods ties", "--contestants rsync"):
        assert said in str(error.value)
