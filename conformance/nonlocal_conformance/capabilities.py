"""What each backend can do, declared once: checks, tables and benchmarks read it here."""

from __future__ import annotations

__all__ = ["BACKENDS", "CAPABILITIES", "DEVICES"]

CAPABILITIES = {
    "vjp": "gradients of the input and of every parameter",
    "hvp": "second derivatives, reverse over reverse",
    "op": "the operation alone",
    "op_vjp": "gradients of the operation alone",
    "attention": "rows of the weights",
    "export": "parameters out and in under their canonical names",
    "create": "a block made by the constructor that users call, with options",
    "rebuilt": "a block made anew from its own description",
    "initial": "the parameters of a new block",
    "train": "plain SGD in the framework's own way",
    "steps": "one block called several times, on several sizes",
    "session": "one live block, called, loaded, copied and frozen in any order",
    "compiled": "compilation by the framework",
    "compiled_vjp": "compilation of a call with its gradients",
    "mixed": "mixed precision: bfloat16 and float16 operands, float32 parameters",
    "mixed_vjp": "gradients, and training, under mixed precision",
    "mixed_attention": "rows of the weights under mixed precision",
    "casts": "inputs whose dtype is not that of the parameters, and those of `mixed_dtypes`",
    "layouts": "memory layouts of the input and of the mask",
    "network": "blocks put into a network, looked at there, and taken out",
    "peak_memory": "measured peak memory, and the named forms without that of the matrix of weights",
    "large": "methods without the matrix of weights that take 65,536 queries and keys within a minute",
    "sharded": "an input whose positions or samples are cut over 2 or 4 devices",
    "sharded_hvp": "second derivatives of a cut input",
    "sharded_memory": "the memory that one device needs for a cut input",
    "uneven": "a cut into pieces that are not equally large",
    "traffic": "how much one device receives for a cut input",
    "replaced": "a layer of a block that is another layer of the framework",
    "functions": "a pairwise function of the user's own",
    "errors": "the same errors in the same words",
}
"""Every capability and what it means; those named like a method of the driver need that method."""

_FRAMEWORK = ("compiled", "compiled_vjp", "mixed", "mixed_vjp", "mixed_attention")
"""What takes a framework that compiles and has a mixed precision."""

DEVICES = frozenset({"sharded", "sharded_hvp", "sharded_memory", "traffic", "uneven"})
"""What takes a framework that runs on several devices."""

BACKENDS = {
    "numpy": frozenset(CAPABILITIES) - {"hvp", *_FRAMEWORK, *DEVICES, "layouts", "network", "large", "replaced"},
    "tensorflow": frozenset(CAPABILITIES) - {"layouts", "sharded_memory", "traffic"},
    "torch": frozenset(CAPABILITIES),
    "jax": frozenset(CAPABILITIES) - {"layouts", "uneven"},
}
"""The capabilities of each backend of this project."""
