#!/usr/bin/env bash
# A verb on all GPUs of this machine (or on NPROC processes of its CPU):
#
#     bash launch/torchrun/one_node.sh pretrain --config configs/solar_10_7b/2_pretrain.toml --parallel.pp 4 --parallel.vpp 1
#     NPROC=2 bash launch/torchrun/one_node.sh pretrain --config configs/tiny/2_pretrain.toml
#
# kill -USR1 or -TERM saves and stops. Exit codes: 0 done, 2 a mistake to mend, 75 saved and stopped: start it again.
#
#     NPROC=8            processes; default: one for each GPU
#     LOGS=DIR           logs of every rank; default: logs/<time>-<verb>
#     SHOW_RANKS=0       ranks whose output is shown here too
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if (($# == 0)); then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
[[ -n "${VIRTUAL_ENV:-}" || -n "${SOLAR_MEGA_CONTAINER:-}" ]] || source launch/env.sh
source launch/torchrun/ranks.sh

if [[ -z "${NPROC:-}" ]]; then
    NPROC=$({ nvidia-smi -L 2> /dev/null || true; } | grep -c '^GPU ' || true)
    if ((NPROC == 0)); then
        echo "one_node.sh: no GPU here; say how many processes to start on the CPU: NPROC=2 bash $0 ..." >&2
        exit 2
    fi
fi
start_ranks --standalone --nproc-per-node "$NPROC" -- "$@"
