"""What tests do on the ranks of a world: layouts one after the other, logits through the pipeline."""

from contextlib import contextmanager

import torch

from solar_mega.config.schema import ParallelConfig
from tests.families import SEQUENCE, tokens


@contextmanager
def layout(tp: int = 1, pp: int = 1, vpp: int = 1, seed: int = 1234, **options):
    """Megatron's groups for one layout; the world stays, so that one launch can try several."""
    from megatron.core import parallel_state

    from solar_mega.runtime import parallel

    config = ParallelConfig(tp=tp, pp=pp, vpp=vpp, **options)
    parallel.start(config, seed, threads=1)
    try:
        yield config
    finally:
        parallel_state.destroy_model_parallel()


def pipeline_logits(chunks, parallel: ParallelConfig) -> torch.Tensor | None:
    """fp32 logits [rows, SEQUENCE, vocabulary] of `families.tokens()` on ranks of the last stage; None
    elsewhere.
    """
    from megatron.core import tensor_parallel
    from megatron.core.pipeline_parallel import get_forward_backward_func

    rows = tokens()

    def batches():
        while True:
            for row in rows:
                yield row[None]

    def step(iterator, chunk):
        batch = next(iterator)
        output = chunk(batch, torch.arange(SEQUENCE)[None], None)
        return output, lambda logits, non_loss_data=False: logits.detach().clone()

    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        parts = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[batches() for _ in chunks] if len(chunks) > 1 else batches(),
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=len(rows),
            seq_length=SEQUENCE,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if not parts:
        return None
    shard = torch.cat(parts)
    return tensor_parallel.gather_from_tensor_model_parallel_region(shard)
