#!/usr/bin/env bash
# Everything that only a GPU can show, in under nine minutes: build with CUDA, the GPU tests, compute-sanitizer on
# every kernel, and the benchmarks.
#
#     bash launch/gpu_check.sh [FOLDER]        default: docs/benchmarks/<device>-<date>
#
# Results, logs and summary.json land in FOLDER. A part that fails does not stop the others; only without compiled
# CUDA ops is there nothing to test or measure, and the rest is skipped.
# Exit code: 0 all parts passed, 1 some failed or were skipped, 2 there is no GPU here (nothing is done).
#
#     GPU_CHECK_PYTHON=/path/to/python    use this Python as it is, installing nothing: it needs torch with CUDA,
#                                         megatron-core, tyro, setuptools, ninja, pytest and hypothesis
#     GPU_CHECK_SECONDS=530               when to stop starting parts, and to cut the running one short
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if (($# > 1)) || [[ "${1:-}" == -* ]]; then
    echo "usage: bash launch/gpu_check.sh [FOLDER]" >&2
    exit 2
fi
if ! command -v nvidia-smi > /dev/null || [[ "$(nvidia-smi -L 2> /dev/null)" != *"GPU "* ]]; then
    echo "gpu_check: no GPU here (nvidia-smi is missing or lists none); nothing was checked." >&2
    exit 2
fi

limit=${GPU_CHECK_SECONDS:-530}
# One GPU, and the one that is described: CUDA by itself numbers them by speed, nvidia-smi by bus.
export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES%%,*}
query() { nvidia-smi --id="$CUDA_VISIBLE_DEVICES" --query-gpu="$1" --format=csv,noheader; }
if ! device=$(query name) || ! driver=$(query driver_version) || ! capability=$(query compute_cap); then
    echo "gpu_check: nvidia-smi knows no GPU $CUDA_VISIBLE_DEVICES (CUDA_VISIBLE_DEVICES): $device" >&2
    exit 2
fi
slug=$(tr -cs 'A-Za-z0-9\n' '-' <<< "$device" | tr '[:upper:]' '[:lower:]' | sed 's/^-*//; s/-*$//')
folder=${1:-docs/benchmarks/$slug-$(date -u +%Y-%m-%d)}
mkdir -p "$folder/logs"
parts=$folder/logs/parts.tsv
: > "$parts"
# For the GPU at hand only: half the compile time.
export SOLAR_MEGA_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$capability}"
echo "gpu_check: $device, driver $driver, results in $folder"

# skip NAME REASON
skip() {
    printf '%-16s skipped: %s\n' "$1" "$2"
    printf '%s\tskipped\t0\t-\n' "$1" >> "$parts"
}

# part NAME SECONDS COMMAND...: runs it with its own time limit, logs it, notes how it ended.
compiled=yes
part() {
    local name=$1 own=$2 began=$SECONDS code=0 left=$((limit - SECONDS)) verdict
    shift 2
    if ((left < 10)); then
        skip "$name" "no time left"
        return
    elif [[ $compiled == no ]]; then
        # The fallback to PyTorch's ops would be measured, and stand in the results under our name.
        skip "$name" "no compiled CUDA ops"
        return
    fi
    timeout --kill-after=5 "$((own < left ? own : left))" "$@" > "$folder/logs/$name.log" 2>&1 || code=$?
    case $code in
        0) verdict=passed ;;
        124 | 137) verdict="timed out" ;;
        *) verdict=failed ;;
    esac
    printf '%-16s %s in %s s\n' "$name" "$verdict" "$((SECONDS - began))"
    printf '%s\t%s\t%s\t%s\n' "$name" "$verdict" "$((SECONDS - began))" "$code" >> "$parts"
    if [[ $verdict == passed ]]; then return; fi
    tail -n 5 "$folder/logs/$name.log" | sed 's/^/    | /'
    if [[ $name == gpu-is-used ]]; then compiled=no; fi
}

if [[ -n "${GPU_CHECK_PYTHON:-}" ]]; then
    python=$GPU_CHECK_PYTHON
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
    # --force: a library of CPU ops built earlier is newer than the CUDA sources it lacks.
    part build 240 "$python" setup.py build_ext --inplace --force
else
    python=$PWD/.venv/bin/python
    part build 300 bash launch/env.sh
fi

part gpu-is-used 60 "$python" -c '
import sys
from solar_mega import ops
print(ops.build_info())
sys.exit(not ops.available("cuda"))'

part tests 150 "$python" -m pytest -q -m cuda -p no:cacheprovider tests/ops

sanitizer=$(PATH="${CUDA_HOME:-/usr/local/cuda}/bin:$PATH:/usr/local/cuda/bin" command -v compute-sanitizer || true)
for tool in memcheck racecheck; do
    if [[ -z "$sanitizer" ]]; then
        skip "$tool" "no compute-sanitizer in CUDA_HOME, /usr/local/cuda or on PATH"
        continue
    fi
    # Without torch's caching allocator: inside its blocks nobody would see a write past the end of a tensor.
    part "$tool" 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        "$sanitizer" --tool "$tool" --error-exitcode 9 "$python" -m solar_mega.bench.exercise
done

part bench-dpo 60 "$python" -m solar_mega bench dpo --out "$folder/dpo.json"
part bench-kernels 200 "$python" -m solar_mega bench kernels --limit 2 \
    --out "$folder/kernels.json" --plot "$folder/kernels.png"
part bench-step 90 "$python" -m solar_mega bench step --layers 8 --hidden 2048 --ffn 5632 --heads 16 --kv-heads 4 \
    --vocab 32000 --seq-length 2048 --precision bf16 --out "$folder/step.json"

DEVICE=$device DRIVER=$driver CAPABILITY=$capability "$python" - "$folder" << 'END' || true
import datetime, json, os, sys
from pathlib import Path

from solar_mega.ops import build_info

folder = Path(sys.argv[1])
rows = [line.split("\t") for line in (folder / "logs" / "parts.tsv").read_text().splitlines()]
summary = {
    "device": os.environ["DEVICE"],
    "driver": os.environ["DRIVER"],
    "compute_capability": os.environ["CAPABILITY"],
    "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    "build": build_info(),
    "parts": [
        {"name": name, "verdict": verdict, "seconds": int(seconds), "exit_code": None if code == "-" else int(code)}
        for name, verdict, seconds, code in rows
    ],
}
(folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
END

bad=$(awk -F'\t' '$2 != "passed" { print $1 " (" $2 ")" }' "$parts" | paste -sd, - | sed 's/,/, /g')
if [[ -n "$bad" ]]; then
    echo "gpu_check: NOT all passed after $SECONDS s: $bad. Logs: $folder/logs"
    exit 1
fi
echo "gpu_check: all parts passed in $SECONDS s. Results: $folder"
