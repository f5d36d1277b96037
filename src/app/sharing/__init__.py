"""One copy per machine of the data that a LightningDataModule holds in memory.

What `setup` makes is pickled by protocol 5, its memory beside the pickle; every process puts it
together over the same memory. It is reused only where the key of the data is the same.
"""

from app.sharing.modes import Mmap, Packs, Shared, Sharing
from app.sharing.packed_list import PackedList

__all__ = ["Mmap", "PackedList", "Packs", "Shared", "Sharing"]
