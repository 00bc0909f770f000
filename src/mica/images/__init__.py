"""Images on this host: built from Debian's packages, imported from disk images, kept by content."""

from mica.images.directory import DirectoryImages
from mica.images.sources import Mirror

__all__ = ["DirectoryImages", "Mirror"]
