"""The arithmetic of batch sizes. Imports nothing, so a configuration is checked without torch."""


def data_parallel_size(
    *, devices: int | str, num_nodes: int, tensor_parallel_size: int | None
) -> int | None:
    """Ranks that serve different samples; None while `devices` is auto."""
    if devices == "auto":
        return None
    return int(devices) * num_nodes // (tensor_parallel_size or 1)


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
