"""The name by which `sa_lens.shipped` imports what `whole_files` has."""

from sa_lens.data.whole_files import atomic_write, staged_folder

__all__ = ["atomic_write", "staged_folder"]
