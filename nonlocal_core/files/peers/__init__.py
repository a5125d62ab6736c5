"""Parameters of non-local blocks in the files of other implementations: find, read and write them."""

from nonlocal_core.files.peers.caffe2 import read_caffe2
from nonlocal_core.files.peers.finding import find_peer_blocks
from nonlocal_core.files.peers.reading import AssumedOptionsWarning, from_peer
from nonlocal_core.files.peers.writing import to_peer

__all__ = ["AssumedOptionsWarning", "find_peer_blocks", "from_peer", "read_caffe2", "to_peer"]
