"""Does this decoder fit this parallel layout? Every mismatch at once, before a process group exists."""

from solar_mega.config.schema import ParallelConfig
from solar_mega.errors import Problems
from solar_mega.model.architecture import Architecture


def check_layout(arch: Architecture, parallel: ParallelConfig, seq_length: int | None = None) -> Problems:
    """Problems of `arch` on `parallel`, empty when it fits. Callers add their own and raise them together."""
    problems = Problems()
    splits = {
        "attention heads": arch.num_attention_heads,
        "key/value heads": arch.num_query_groups,
        "feed-forward size": arch.ffn_hidden_size,
    }
    for what, size in splits.items():
        if size % parallel.tp:
            problems.add(
                f"parallel.tp = {parallel.tp} does not divide the model's {size} {what}; {_divisors(size)}"
            )
    if arch.vocab_size % parallel.tp:
        problems.add(
            f"parallel.tp = {parallel.tp} does not divide the vocabulary of {arch.vocab_size} tokens; use "
            "a tp that does, or enlarge the source's embeddings to a multiple of it (transformers' "
            "resize_token_embeddings)"
        )
    chunks = parallel.pp * parallel.vpp
    if arch.num_layers % chunks:
        problems.add(
            f"parallel.pp * parallel.vpp = {parallel.pp} * {parallel.vpp} = {chunks} does not divide the "
            f"grown model's {arch.num_layers} layers; {_divisors(arch.num_layers)}"
        )
    if seq_length is not None and seq_length > arch.max_position_embeddings:
        problems.add(
            f"train.seq_length = {seq_length} exceeds the model's max_position_embeddings = "
            f"{arch.max_position_embeddings}"
        )
    return problems


def layers_of_chunk(num_layers: int, parallel: ParallelConfig, pp_rank: int, chunk: int) -> range:
    """Global layer numbers (from 0) that chunk `chunk` of pipeline rank `pp_rank` holds, in Megatron's order.

    pp = 2, vpp = 2, 8 layers:      rank 0: [0 1] [4 5]      rank 1: [2 3] [6 7]
    """
    per_chunk = num_layers // (parallel.pp * parallel.vpp)
    start = (chunk * parallel.pp + pp_rank) * per_chunk
    return range(start, start + per_chunk)


def _divisors(size: int) -> str:
    fits = [str(d) for d in range(1, min(size, 64) + 1) if size % d == 0]
    return f"choose from {', '.join(fits)}"
