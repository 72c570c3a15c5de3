#!/usr/bin/env bash
# A verb on the GPUs of several machines, without a scheduler. Start it on every machine, with its own NODE_RANK:
#
#     NNODES=8 NODE_RANK=0 MASTER_ADDR=node0 bash launch/torchrun/many_nodes.sh pretrain --config ...
#     NNODES=8 NODE_RANK=1 MASTER_ADDR=node0 bash launch/torchrun/many_nodes.sh pretrain --config ...
#
# output.dir must lie on a file system that all machines share. A signal to any one of the launchers stops all. The
# exit code of the launcher with NODE_RANK=0 says how the run ended: 0, 2, or 75 (saved: start all of them again).
#
#     NNODES=8           machines
#     NODE_RANK=0        this machine, from 0
#     MASTER_ADDR=HOST   the machine with NODE_RANK=0, as the others reach it
#     MASTER_PORT=29500  a free port on it
#     NPROC, LOGS, SHOW_RANKS: as one_node.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if (($# == 0)); then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
for name in NNODES NODE_RANK MASTER_ADDR; do
    if [[ -z "${!name:-}" ]]; then
        echo "many_nodes.sh: $name is not set; needed are NNODES, NODE_RANK and MASTER_ADDR" >&2
        exit 2
    fi
done
[[ -n "${VIRTUAL_ENV:-}" || -n "${SOLAR_MEGA_CONTAINER:-}" ]] || source launch/env.sh
source launch/torchrun/ranks.sh

NPROC="${NPROC:-$({ nvidia-smi -L 2> /dev/null || true; } | grep -c '^GPU ' || true)}"
if ((NPROC == 0)); then
    echo "many_nodes.sh: no GPU here; say how many processes to start on the CPU: NPROC=2" >&2
    exit 2
fi
LOGS="${LOGS:-logs/$(date -u +%Y%m%d)-$1}/node-$NODE_RANK"
start_ranks --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$NPROC" \
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" -- "$@"
