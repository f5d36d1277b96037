"""Data sharing: one copy per machine of what a LightningDataModule holds in memory.

Acts in `setup(stage)`: what it leaves in the attributes of the data module is taken apart, and each
process (ranks, DataLoader workers, with mmap also other runs) puts it together over the same
memory. Tensors, arrays, and long lists of arrays, texts, numbers or tuples of these are shared,
wherever in the attributes they are, also those made in `__init__`; other objects are copied. Use it
where data fill the memory several times over, or take long to set up.

| preset | where the memory is                                  | made by                       |
|--------|------------------------------------------------------|-------------------------------|
| shared | shared memory; gone with the last process of the run | the process that starts ranks |
| mmap   | files in `sharing.cache`, which all processes map    | whichever process is first    |

A run trains the same bit for bit as with `sharing=none`. Data are taken from another process only
where the configuration of the data, the source of their modules, the data module's attributes
before setup, the versions of Python and libraries, the random numbers drawn, the files read through
Python or named in the configuration, and what was read of the trainer are all equal. What setup
reads by compiled code from files that the configuration does not name, or leaves elsewhere than in
attributes, is not seen. Written elements are the writing process's own. Long lists become sequences
that make their items on access: pass `list(...)` of one where `isinstance` or `torch.stack` wants a
list, or type sharing.min_items=null.

Files of `mmap` are kept for later runs and never removed; the folder may be, when no run starts. As
checkpoints may, they run code when they are read: they are the user's alone.

Sources: torch.multiprocessing's shared memory; mmap(2), MAP_PRIVATE.
"""

from dataclasses import dataclass

from ..rules import count, folder


@dataclass(kw_only=True)
class Sharing:
    """What both ways have in common."""

    cache: str = folder(instead="type {key}=PATH")
    """Folder of the files; of `shared` where memory cannot be handed on, or does not fit."""
    min_bytes: int = count(at_most=2**62, instead="type {key}=1024")
    """Arrays and lists below this size are copied for each process, >= 1."""
    min_items: int | None = count(
        at_least=1000, at_most=2**62, instead="type {key}=1000, or null for no list"
    )
    """Length from which lists are shared, >= 1000; null: none is, but the arrays in them are."""


@dataclass(kw_only=True)
class Shared(Sharing):
    """Shared memory that the starting process fills."""

    _target_: str = "app.sharing.Shared"


@dataclass(kw_only=True)
class Mmap(Sharing):
    """Files that every process maps."""

    _target_: str = "app.sharing.Mmap"


PRESETS = {"shared": Shared, "mmap": Mmap}
