"""Faults of a live block: what it keeps from a call, a load or a copy, and what it shares with its caller."""
# ruff: noqa: ARG001 - many a fault is that an argument is ignored

import dataclasses

import numpy as np
import torch
from textbook import Session, Textbook

from faulty import fault
from nonlocal_core.spec.parameters import STATISTICS


@fault("call", "calls_in_turn")
def the_mask_of_a_call_stays_for_those_without_one(self, block, x, key_mask=None, training=False):
    """A block called with a mask and then without heeds the first."""
    kept = block.notes.setdefault(x.shape, key_mask)
    return Textbook.call(self, block, x, kept if key_mask is None else key_mask, training)


@fault("call", "calls_in_turn")
def a_block_that_was_trained_stays_in_training(self, block, x, key_mask=None, training=False):
    """An evaluation after it takes the statistics of its input."""
    block.notes["training"] = training or block.notes.get("training", False)
    return Textbook.call(self, block, x, key_mask, block.notes["training"])


@fault("serving", "calls_in_turn")
def statistics_of_the_first_evaluation_serve_all_others(self, block, r, counted):
    """The factor of the norm is folded once, and training in between does not change it."""
    found = Textbook.serving(self, block, r, counted)
    return found if counted is not None else block.notes.setdefault("folded", [a.detach().clone() for a in found])


@fault("project", "loaded_between_calls")
def a_layer_keeps_the_weight_of_its_first_call(self, block, layer, a):
    """Parameters taken in after a call change nothing."""
    name = f"{layer}.weight"
    now = block.params[name]
    stale = now - now.detach() + block.notes.setdefault(name, now.detach().clone())
    return Textbook.project(self, dataclasses.replace(block, params=block.params | {name: stale}), layer, a)


@fault("session", "loaded_between_calls", "arrays_of_the_caller")
def a_load_leaves_the_running_statistics(self, spec, params, *, method="auto"):
    """Weights and biases alone are taken in."""

    class Partial(Session):
        def load(self, params):
            super().load(params | {name: a for name, a in self.params().items() if name in STATISTICS})

    return Partial(self, self.build(spec, params))


@fault("session", "loaded_between_calls")
def parameters_are_taken_in_one_by_one(self, spec, params, *, method="auto"):
    """Those before the one of a wrong shape have changed when it is refused."""

    class Eager(Session):
        def load(self, params):
            for name, a in params.items():
                self.block.params[name] = torch.from_numpy(a.copy()).reshape(self.block.params[name].shape)

    return Eager(self, self.build(spec, params))


@fault("session", "copied_blocks")
def a_copy_shares_its_tensors_with_the_block(self, spec, params, *, method="auto"):
    """The statistics of one move with those of the other."""

    class Shared(Session):
        def copies(self):
            block = dataclasses.replace(self.block, params=dict(self.block.params))
            return {"copy": type(self)(self.driver, block)}

    return Shared(self, self.build(spec, params))


@fault("session", "copied_blocks")
def a_copy_starts_with_the_statistics_of_a_new_block(self, spec, params, *, method="auto"):
    """What training has moved is lost. Seen where statistics are no parameters."""
    begun = {name: a for name, a in params.items() if name in STATISTICS}

    class Fresh(Session):
        def copies(self):
            return {"copy": type(self)(self.driver, self.driver.build(spec, self.params() | begun))}

    return Fresh(self, self.build(spec, params))


@fault("build", "arrays_of_the_caller")
def parameters_share_the_memory_of_the_arrays_given(self, spec, params, dtype=None):
    """What the caller does to them later changes the block."""
    built = Textbook.build(self, spec, params, dtype)
    built.params = {name: self.tensor(a) for name, a in params.items()}
    return built


@fault("session", "arrays_of_the_caller")
def parameters_are_given_out_as_they_are(self, spec, params, *, method="auto"):
    """Who writes to them writes into the block."""

    class Open(Session):
        def params(self):
            return {name: a.detach().numpy() for name, a in self.block.params.items()}

    return Open(self, self.build(spec, params))


@fault("statistics", "arrays_of_the_caller")
def running_statistics_are_given_out_as_they_are(_, block):
    """Who writes to them writes into the block."""
    return {name: block.params[name].numpy() for name in STATISTICS if name in block.params}


@fault("mask", "arrays_of_the_caller")
def a_mask_is_known_by_its_object(self, key_mask, x):
    """One that was changed in place is taken for what it was."""
    known = vars(self).setdefault("known", {})
    made = known.setdefault(id(key_mask), (key_mask, np.array(Textbook.mask(self, key_mask, x))))[1]
    return made if len(made) == len(x) and made.shape[1] == x[0, 0].numel() else Textbook.mask(self, key_mask, x)


@fault("session", "repeated_gradients")
def gradients_add_up_over_calls(self, spec, params, *, method="auto"):
    """What a call leaves is added to by the next, and nothing sets it to 0."""

    class Adding(Session):
        def gradients(self, *arguments, **options):
            *others, found = super().gradients(*arguments, **options)
            before = self.block.notes.get("sum", dict.fromkeys(found, 0))
            self.block.notes["sum"] = {name: before[name] + d for name, d in found.items()}
            return *others, self.block.notes["sum"]

    return Adding(self, self.build(spec, params))


@fault("session", "frozen_parameters")
def a_frozen_block_gives_its_input_the_residual_alone(self, spec, params, *, method="auto"):
    """Where no parameter has a gradient, the branch is computed without any."""

    class Cut(Session):
        def gradients(self, x, dz, key_mask=None, *, training=False):
            *others, dx, found = super().gradients(x, dz, key_mask, training=training)
            return *others, (dx if found else dz), found

    return Cut(self, self.build(spec, params))


@fault("leaves", "frozen_parameters")
def a_layer_is_frozen_with_its_weight(self, block, frozen=()):
    """The bias of a layer whose weight is frozen has no gradient."""
    layers = {name.partition(".")[0] for name in frozen if name.endswith(".weight")}
    return Textbook.leaves(
        self, block, {name for name in block.params if name.partition(".")[0] in layers} | set(frozen)
    )


@fault("project", "frozen_parameters")
def a_layer_with_a_frozen_weight_is_a_constant(self, block, layer, a):
    """No gradient passes through it to what stands before."""
    if any(p.requires_grad for p in block.params.values()) and not block.params[f"{layer}.weight"].requires_grad:
        a = a.detach()
    return Textbook.project(self, block, layer, a)
