"""One copy per machine of the data that a LightningDataModule holds in memory.

What `setup` makes is taken apart into a pickle and flat memory; every process puts it together over
the same memory. Its result is reused only where all that it read is the same.
"""

from app.sharing.modes import Mmap, Packs, Shared, Sharing
from app.sharing.packed_list import PackedList
from app.sharing.packing import Packed, pack, unpack
from app.sharing.regions import fits_in_shared_memory

__all__ = [
    "Mmap",
    "Packed",
    "PackedList",
    "Packs",
    "Shared",
    "Sharing",
    "fits_in_shared_memory",
    "pack",
    "unpack",
]
