"""The non-local block: its specification, the NumPy reference that defines it, and what backends share."""

from nonlocal_core import plots, recipes
from nonlocal_core.attention_map import AttentionMap
from nonlocal_core.checkpoints import AssumedOptionsWarning, find_peer_blocks, from_peer, read_caffe2, to_peer
from nonlocal_core.cost_model import cost
from nonlocal_core.folding import fold_norm
from nonlocal_core.gradients import nonlocal_block_vjp, nonlocal_op_vjp
from nonlocal_core.insertion import Insertion
from nonlocal_core.parameters import init_params, param_shapes
from nonlocal_core.reference import attention, nonlocal_block, nonlocal_op, updated_statistics
from nonlocal_core.spec import SPECIFICATION_VERSION, NonLocalSpec
from nonlocal_core.weights import load_params, save_params

__version__ = "0.1.0"

__all__ = [
    "SPECIFICATION_VERSION",
    "AssumedOptionsWarning",
    "AttentionMap",
    "Insertion",
    "NonLocalSpec",
    "attention",
    "cost",
    "find_peer_blocks",
    "fold_norm",
    "from_peer",
    "init_params",
    "load_params",
    "nonlocal_block",
    "nonlocal_block_vjp",
    "nonlocal_op",
    "nonlocal_op_vjp",
    "param_shapes",
    "plots",
    "read_caffe2",
    "recipes",
    "save_params",
    "to_peer",
    "updated_statistics",
]
