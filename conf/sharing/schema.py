"""Data sharing: one copy per machine of what a LightningDataModule holds in memory.

Acts in `setup(stage)`: what it leaves in the attributes of the data module is pickled by protocol
5, its memory beside the pickle, and each process (ranks, forked DataLoader workers, with mmap also
other runs) puts it together over the same memory. Tensors, arrays, and long lists of arrays, texts,
numbers or tuples of these are shared, wherever in the attributes they are, also those made in
`__init__`; other objects are copied. Use it where data fill the memory several times over, or take
long to set up.

| preset | where the memory is                                  | made by                       |
|--------|------------------------------------------------------|-------------------------------|
| shared | shared memory; gone with the last process of the run | the process that starts ranks |
| mmap   | files in `sharing.cache`, which all processes map    | whichever process is first    |

A run trains the same bit for bit as with `sharing=none`. Data are taken from another process only
where their key is equal. It holds what is visible: the configuration of the data, the source of
their modules and the versions of libraries, the data module's attributes before setup, the number
of processes, the random state where setup draws; with mmap also size and time of the files, and of
all files in the folders, that the configuration or the attributes name, and of the files that the
source names in full. Name what it does not hold, as the version of files that only code knows of,
by `sharing.key`. What cannot be compared or pickled (lambdas, open files), or reads more of the
trainer than `world_size`, stays private to each process, with a warning. What setup leaves
elsewhere than in attributes is not shared.

Written elements are the writing process's own. Long lists become sequences that make their items on
access: pass `list(...)` of one where `isinstance` or `torch.stack` wants a list, or type
sharing.min_items=null. While data are shared, the process that has set them up holds them twice.

Files of `mmap` are kept for later runs and never removed; the folder may be, when no run starts. As
checkpoints may, they run code when they are read: they are the user's alone.

Sources: pickle protocol 5, PEP 574; mmap(2), MAP_PRIVATE; memfd_create(2).
"""

from dataclasses import dataclass

from ..rules import count, folder, text


@dataclass(kw_only=True)
class Sharing:
    """What both ways have in common."""

    cache: str = folder(instead="type {key}=PATH")
    """Folder of the files; of `shared` where memory cannot be handed on, or does not fit."""
    key: str | None = text(instead="type {key}=1, or null for nothing")
    """What decides the data besides what is seen, as their version; null: nothing does."""
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
