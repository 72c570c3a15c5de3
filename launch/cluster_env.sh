# shellcheck shell=bash
# What ranks on a cluster have in their environment; sourced by the launchers. All may be set beforehand.
#
#     LOGS    directory of this start's logs, flight recorder dumps and exit code

mkdir -p "$LOGS"

# Megatron overlaps tensor-parallel communication with compute only if kernels start in the order queued.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# Segments that grow instead of fragments that do not fit: activations of a pipeline differ in size.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # train.threads decides on CPUs
export PYTHONUNBUFFERED=1

# A collective that fails or hangs ends its rank, and the flight recorder writes down the last 2000 of every rank.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-$LOGS/nccl_trace_rank_}"
# The names before torch 2.9.
export TORCH_NCCL_TRACE_BUFFER_SIZE="${TORCH_NCCL_TRACE_BUFFER_SIZE:-$TORCH_FR_BUFFER_SIZE}"
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE="${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-$TORCH_FR_DUMP_TEMP_FILE}"

export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# Left to the cluster, as only its people know them: NCCL_SOCKET_IFNAME, NCCL_IB_HCA, NCCL_IB_TIMEOUT, GLOO_SOCKET_IFNAME.
