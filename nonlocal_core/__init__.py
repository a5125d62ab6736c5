"""The non-local block: its specification, the NumPy reference that defines it, and what backends share."""

import sys

from nonlocal_core import plots
from nonlocal_core.costs import cost
from nonlocal_core.files.parameters import load_params, save_params
from nonlocal_core.files.peers import AssumedOptionsWarning, find_peer_blocks, from_peer, read_caffe2, to_peer
from nonlocal_core.networks import attention_map, insertion, recipes
from nonlocal_core.networks.attention_map import AttentionMap
from nonlocal_core.networks.folding import fold_norm
from nonlocal_core.networks.insertion import Insertion
from nonlocal_core.reference.block import attention, nonlocal_block, updated_statistics
from nonlocal_core.reference.gradients import nonlocal_block_vjp, nonlocal_op_vjp
from nonlocal_core.reference.operation import nonlocal_op
from nonlocal_core.spec import SPECIFICATION_VERSION, NonLocalSpec, options, presets
from nonlocal_core.spec.parameters import init_params, param_shapes

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

# Where 0.1.0 had these modules, and its pickles look for their classes.
for _module in (attention_map, insertion, options, presets, recipes):
    sys.modules[f"{__name__}.{_module.__name__.rpartition('.')[2]}"] = _module
