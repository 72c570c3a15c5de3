#!/usr/bin/env bash
# One rank, started by srun in run.sbatch: SLURM's environment in torch's names.
set -euo pipefail
# Until the run listens; by default USR1 would end a rank that is still starting.
trap '' USR1
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[!0-9]*} # 8(x4) is 8 on each of 4
# SLURM signals the task: it must be Python itself, not a shell waiting for it.
exec python -m solar_mega "$@"
