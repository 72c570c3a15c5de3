"""The evaluation benchmark at toy size, in a process of its own: transformers must load before Megatron's CPU
adapter is there."""

import json
import subprocess
import sys

from tests.distributed import ROOT


def test_both_models_score_the_same(tmp_path):
    out = tmp_path / "evaluate.json"
    words = """bench evaluate --tasks winogrande --limit 2 --rounds 1 --layers 1 --hidden 64 --vocab 512
        --max-length 512 --threads 1 --out"""
    command = [sys.executable, "-m", "solar_mega", *words.split(), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(out.read_text())
    assert report["tasks"]["Winogrande"]["questions"] == 2
    assert report["all_tasks_ours_is_x_times_as_fast"] > 0
