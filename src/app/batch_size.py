"""The arithmetic of batch sizes. Imports nothing, so a configuration is checked without torch."""


def accumulation_factor(*, batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches per optimizer step that make the effective batch exactly `batch_size`.

    Raises ValueError naming the nearest sizes that work where the division leaves a remainder.
    """
    samples = micro_batch_size * world_size
    factor, rest = divmod(batch_size, samples)
    if factor >= 1 and rest == 0:
        return factor
    nearest = [size for size in (factor * samples, (factor + 1) * samples) if size > 0]
    raise ValueError(
        f"accumulate.batch_size must be a multiple of {samples} "
        f"(micro-batch {micro_batch_size} x world size {world_size}), got {batch_size}; "
        f"the nearest that work: {' or '.join(f'accumulate.batch_size={n}' for n in nearest)}"
    )
