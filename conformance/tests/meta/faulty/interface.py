"""Faults around the computation: rows of the weights, parameters, the start, compilation and errors."""
# ruff: noqa: ARG001 - many a fault is that an argument is ignored

import copy

import numpy as np
import torch
from textbook import Textbook

from faulty import fault
from nonlocal_core import NonLocalSpec
from nonlocal_core.spec.calls import check_op
from nonlocal_core.spec.parameters import check_params


@fault("attention", "attention")
def the_rows_of_the_weights_are_columns(self, *args, **options):
    """w_ji is given for w_ij."""
    return Textbook.attention(self, *args, **options).swapaxes(1, 2)


@fault("rows", "attention")
def the_rows_of_the_weights_are_those_of_the_transposed_matrix(self, block, x, positions, key_mask):
    """Where the matrix is square, w_ji is given for w_ij."""
    full = Textbook.rows(self, block, x, np.arange(x[0, 0].numel()), key_mask)
    return (full.mT if full.shape[1] == full.shape[2] else full)[:, positions]


@fault("attention", "attention")
def the_rows_of_the_weights_have_an_axis_for_heads(self, *args, **options):
    """Their shape is (B, 1, Q, M)."""
    return Textbook.attention(self, *args, **options)[:, None]


@fault("rows", "attention")
def positions_are_sorted(self, block, x, positions, key_mask):
    """The rows do not come in the order that was asked for."""
    return Textbook.rows(self, block, x, np.sort(positions), key_mask)


@fault("rows", "attention")
def positions_are_ignored(self, block, x, positions, key_mask):
    """The first rows are given."""
    return Textbook.rows(self, block, x, np.arange(len(positions)), key_mask)


@fault("rows", "attention")
def positions_are_counted_column_by_column(self, block, x, positions, key_mask):
    """The flat index of a query runs over the first axis first."""
    order = np.arange(x[0, 0].numel()).reshape(x.shape[2:]).ravel(order="F")
    return Textbook.rows(self, block, x, order[positions], key_mask)


@fault("rows", "attention")
def a_function_gets_the_chosen_queries_alone(self, block, x, positions, key_mask):
    """It takes the first of them for the first of their set."""
    apart = copy.copy(self)
    apart.sets = lambda *given: [(np.intersect1d(queries, positions), keys) for queries, keys in self.sets(*given)]
    return Textbook.rows(apart, block, x, positions, key_mask)


@fault("rows", "attention")
def the_mask_does_not_reach_the_rows_of_the_weights(self, block, x, positions, key_mask):
    """They show keys that take no part."""
    return Textbook.rows(self, block, x, positions, None)


@fault("rows", "attention")
def the_rows_of_the_weights_hold_the_keys_of_one_set(self, block, x, positions, key_mask):
    """With axes or groups, M is the number of keys of one set."""
    sets = len(self.sets(block.spec, x.shape[2:]))
    full = Textbook.rows(self, block, x, positions, key_mask)
    return full[..., : full.shape[2] // sets]


@fault("rows", "attention")
def the_keys_of_the_rows_come_set_by_set(self, block, x, positions, key_mask):
    """They are not in the order of the grid."""
    first = np.concatenate([windows[:, 0] for _, windows in self.sets(block.spec, x.shape[2:])])
    return Textbook.rows(self, block, x, positions, key_mask)[..., np.argsort(np.argsort(first))]


@fault("rows", "attention")
def the_rows_of_the_weights_are_normalised_once_more(self, block, x, positions, key_mask):
    """Those of the dot product sum to 1 too."""
    rows = Textbook.rows(self, block, x, positions, key_mask)
    total = rows.sum(dim=-1, keepdim=True)
    return rows / torch.where(total == 0, 1, total)


@fault("attention", "attention")
def the_rows_of_the_weights_are_float64(self, *args, **options):
    """Their dtype is not that of the input."""
    return Textbook.attention(self, *args, **options).astype(np.float64)


@fault("op", "operation")
def the_operation_ignores_its_scale(self, theta, phi, g, **options):
    """A float given to it has no effect."""
    return Textbook.op(self, theta, phi, g, **{**options, "scale": None})


@fault("operation", "operation")
def the_operation_wants_values_as_wide_as_keys(self, tensors, options):
    """The result has the width of theta."""
    y = Textbook.operation(self, tensors, options)
    return torch.nn.functional.pad(y, (0, tensors["theta"].shape[2] - y.shape[2]))


@fault("export", "export")
def parameters_are_exported_transposed(self, spec, params):
    """Weights are (in, out)."""
    return {name: a.T.copy() for name, a in Textbook.export(self, spec, params).items()}


@fault("export", "export")
def parameters_are_exported_as_kernels_of_convolutions(self, spec, params):
    """Weights have the shape (out, in, 1, 1)."""
    exported = Textbook.export(self, spec, params)
    return {name: a[..., None, None] if a.ndim == 2 else a for name, a in exported.items()}


@fault("export", "export")
def parameters_are_exported_in_float32(self, spec, params):
    """Those of a wide block lose their last digits."""
    return {name: a.astype(np.float32) for name, a in Textbook.export(self, spec, params).items()}


@fault("export", "export")
def parameters_are_exported_under_names_of_the_framework(self, spec, params):
    """The statistics are `running_mean` and `running_var`."""
    names = {"norm.mean": "norm.running_mean", "norm.variance": "norm.running_var"}
    return {names.get(name, name): a for name, a in Textbook.export(self, spec, params).items()}


@fault("export", "export")
def parameters_are_exported_twice(self, spec, params):
    """A second name stands for the same layer. Seen in a public model zoo."""
    exported = Textbook.export(self, spec, params)
    return {**exported, "sub_phi.weight": exported["g.weight"]}


@fault("export", "export")
def theta_and_phi_are_exported_under_each_others_names(self, spec, params):
    """The order of the layers decides, not their names. Seen in a public Keras implementation."""
    exported = Textbook.export(self, spec, params)
    names = {"theta": "phi", "phi": "theta"}
    parts = {name: name.partition(".") for name in exported}
    return {f"{names.get(layer, layer)}.{kind}": exported[name] for name, (layer, _, kind) in parts.items()}


@fault("export", "export")
def the_exported_arrays_are_those_that_were_imported(_, spec, params):
    """Whoever writes into them changes the block."""
    check_params(params, spec)
    return dict(params)


@fault("start", "identity_at_start", "start")
def a_new_norm_has_a_gamma_of_one(self, spec, name, shape):
    """A new block with a norm is not the identity. Seen in several public implementations."""
    return torch.ones(shape) if name == "norm.weight" else Textbook.start(self, spec, name, shape)


@fault("start", "identity_at_start", "start")
def a_new_block_without_a_norm_is_not_zero(self, spec, name, shape):
    """The weight of `out` starts like the others. Seen in several public implementations."""
    return Textbook.start(self, spec.replace(zero_init=spec.norm is not None), name, shape)


@fault("start", "start")
def a_new_block_is_always_zero(self, spec, name, shape):
    """The option `zero_init` is ignored."""
    return Textbook.start(self, spec.replace(zero_init=True), name, shape)


@fault("start", "start")
def new_weights_follow_the_default_of_the_framework(self, spec, name, shape):
    """Their deviation depends on the width."""
    started = Textbook.start(self, spec, name, shape)
    return started * 100 / shape[-1] ** 0.5 if name.endswith(".weight") and name != "norm.weight" else started


@fault("start", "start")
def new_weights_are_uniform_in_the_interval_of_the_deviation(self, spec, name, shape):
    """Between -0.01 and 0.01 the deviation is less."""
    started = Textbook.start(self, spec, name, shape)
    return started.uniform_(-0.01, 0.01) if len(shape) == 2 and started.any() else started


@fault("start", "start")
def new_biases_are_random(self, spec, name, shape):
    """They start like weights."""
    if name.endswith(".bias") and name != "norm.bias":
        return 0.01 * torch.randn(shape)
    return Textbook.start(self, spec, name, shape)


@fault("start", "start")
def new_weights_of_one_shape_are_equal(self, spec, name, shape):
    """Each starts from the same seed. Seen where layers share an initializer."""
    torch.manual_seed(len(shape))
    return Textbook.start(self, spec, name, shape)


@fault("initial", "start")
def the_seed_of_the_caller_is_overwritten(self, spec, seed=0):
    """The block sets a seed of its own, and leaves it behind for all that is drawn later."""
    return Textbook.initial(self, spec, 7)


@fault("rebuilt", "rebuilt")
def an_option_is_no_part_of_the_config(self, spec):
    """A block that was loaded has the default epsilon."""
    return spec.replace(norm_epsilon=1e-5)


@fault("rebuilt", "rebuilt")
def the_inner_width_is_no_part_of_the_config(self, spec):
    """A block that was loaded has half of the channels inside."""
    return spec.replace(inner_channels=None)


@fault("start", "start")
def a_new_running_variance_is_zero(self, spec, name, shape):
    """Evaluation before training divides by the root of epsilon."""
    return torch.zeros(shape) if name == "norm.variance" else Textbook.start(self, spec, name, shape)


@fault("initial", "start")
def the_inner_width_is_always_half_of_the_channels(self, spec, seed=0):
    """The option `inner_channels` is ignored."""
    return Textbook.initial(self, spec.replace(inner_channels=None), seed)


@fault("initial", "start")
def a_new_block_has_no_parameters_before_its_first_call(*_):
    """An optimizer that is made then finds none. Seen in a public PyTorch package."""
    return {}


@fault("compiled", "compiled")
def the_compiled_block_loses_the_mask(self, spec, params, x, key_mask=None, *, training=False, method="auto"):
    """The graph has one argument."""
    return Textbook.compiled(self, spec, params, x, training=training)


@fault("compiled", "compiled")
def the_compiled_block_is_always_in_evaluation(self, spec, params, x, key_mask=None, *, training=False, method="auto"):
    """The mode is that of the time of compilation."""
    return Textbook.compiled(self, spec, params, x, key_mask)


@fault("compiled", "compiled")
def the_compiled_block_remembers_the_input_it_was_traced_with(self, spec, params, x, *arguments, **options):
    """A value that depends on the input became a constant."""
    return Textbook.compiled(self, spec, params, x * 0 + x.mean(), *arguments, **options)


@fault("check", "errors")
def a_method_that_does_not_exist_is_accepted(self, spec, params, x, key_mask=None, training=False, method="auto"):
    """Any word is taken."""
    Textbook.check(self, spec, params, x, key_mask, training)


@fault("check", "errors")
def one_value_per_channel_is_normalised(self, spec, params, x, key_mask=None, training=False, method="auto"):
    """In training the variance of one value is 0."""
    Textbook.check(self, spec, params, x, key_mask, training=False, method=method)


@fault("check", "errors")
def a_mask_of_numbers_is_accepted(self, spec, params, x, key_mask=None, *args, **options):
    """Whatever is not 0 is True."""
    Textbook.check(self, spec, params, x, None if key_mask is None else key_mask != 0, *args, **options)


@fault("block", "errors")
def a_mask_for_one_sample_is_broadcast(self, spec, params, x, key_mask=None, **options):
    """The batch axis of the mask may be 1."""
    if key_mask is not None:
        key_mask = np.broadcast_to(key_mask, (len(x), *key_mask.shape[1:]))
    return Textbook.block(self, spec, params, x, key_mask, **options)


@fault("block", "errors")
def a_window_larger_than_its_axis_is_cut(self, spec, params, x, *args, **options):
    """The window is as long as the axis."""
    if isinstance(spec.subsample, int):
        spec = spec.replace(subsample=tuple(min(size, spec.subsample) for size in x.shape[1:-1]))
    return Textbook.block(self, spec, params, x, *args, **options)


@fault("check", "errors")
def integers_are_converted(self, spec, params, x, *args, **options):
    """An input of integers is computed in floating point."""
    Textbook.check(self, spec, params, x.astype(params["g.weight"].dtype), *args, **options)


@fault("check", "errors")
def errors_have_other_words(self, *args, **options):
    """The message does not name the argument."""
    try:
        Textbook.check(self, *args, **options)
    except ValueError as error:
        message = "bad input"
        raise ValueError(message) from error


@fault("check", "errors")
def errors_are_of_another_type(self, *args, **options):
    """A wrong value is a RuntimeError, with the right words."""
    try:
        Textbook.check(self, *args, **options)
    except ValueError as error:
        raise RuntimeError(*error.args) from error


@fault("attention", "errors")
def negative_positions_count_from_the_end(self, spec, params, x, positions=None, key_mask=None):
    """-1 is the last query."""
    queries = int(np.prod(x.shape[1:-1]))
    if positions is not None and np.asarray(positions).dtype.kind == "i":
        positions = [p + queries if np.ndim(p) == 0 and -queries <= p < 0 else p for p in positions]
    return Textbook.attention(self, spec, params, x, positions, key_mask)


@fault("export", "errors")
def unknown_parameters_are_ignored(self, spec, params):
    """A misspelt name vanishes. Seen in a public model library."""
    known = {name: a for name, a in params.items() if name != "g.scale"}
    return Textbook.export(self, spec, known)


@fault("export", "errors")
def missing_parameters_are_zero(self, spec, params):
    """A forgotten bias has no effect."""
    return Textbook.export(self, spec, {"g.bias": np.zeros(spec.inner_channels, np.float32), **params})


@fault("op", "errors")
def the_operation_accepts_a_weight_that_it_does_not_use(self, theta, phi, g, **options):
    """w_f is ignored by the other forms."""
    if options.get("pairwise", "embedded_gaussian") != "concatenation":
        options = {name: a for name, a in options.items() if name != "concat_weight"}
    return Textbook.op(self, theta, phi, g, **options)


@fault("op", "errors")
def the_operation_resolves_named_scales(self, theta, phi, g, **options):
    """The scale "inner" is accepted where no spec says what it is."""
    check_op(theta, phi, g, **{**options, "scale": None})
    return theta


@fault("op", "errors")
def the_operation_converts_its_weight(self, theta, phi, g, **options):
    """w_f of integers is taken for floats."""
    if isinstance(weight := options.get("concat_weight"), np.ndarray) and weight.dtype.kind == "i":
        options["concat_weight"] = weight.astype(np.float32)
    return Textbook.op(self, theta, phi, g, **options)


@fault("scores", "errors")
def scores_are_broadcast(self, form, theta, phi):
    """What a function gives for a query alone counts for all keys."""
    if not callable(form.pairwise):
        return Textbook.scores(self, form, theta, phi)
    return torch.as_tensor(form.pairwise(theta.T[None], phi.T[None])).expand(1, theta.shape[1], phi.shape[1])[0]


@fault("create", "wrong_options")
def unknown_options_vanish(self, **options):
    """A misspelt option has no effect. Seen in a public model library."""
    return NonLocalSpec(**{name: a for name, a in options.items() if name in NonLocalSpec.__dataclass_fields__})


@fault("create", "wrong_options")
def a_fraction_of_channels_is_cut(self, **options):
    """A size may be a float."""
    return NonLocalSpec(
        **{name: int(a) if name == "channels" and isinstance(a, float) else a for name, a in options.items()}
    )


@fault("initial", "wrong_options")
def a_block_of_anything_is_begun(self, spec, seed=0):
    """What is no spec is asked for what a spec has."""
    return {"out.bias": np.zeros(spec.channels)}


@fault("start", "start")
def new_weights_are_uniform(self, spec, name, shape):
    """They have the mean and the deviation of normal ones."""
    start = Textbook.start(self, spec, name, shape)
    return (torch.rand(shape) - 0.5) * 12**0.5 * 0.01 if start.any() and "norm" not in name else start


@fault("start", "start")
def new_weights_are_normal_within_two_deviations(self, spec, name, shape):
    """Their tails are cut off, and the deviation is mended. The initializers of Keras and Flax do so by default."""
    start = Textbook.start(self, spec, name, shape)
    return (
        torch.nn.init.trunc_normal_(start, std=1, a=-2, b=2) * (0.01 / 0.8796)
        if start.any() and "norm" not in name
        else start
    )


@fault("attention", "attention")
def no_position_means_all(self, spec, params, x, positions=None, key_mask=None):
    """An empty list is taken for None."""
    return Textbook.attention(self, spec, params, x, positions or None, key_mask)


@fault("block", "errors")
def a_flat_mask_is_accepted(self, spec, params, x, key_mask=None, **options):
    """A mask (B, N) is laid on the grid."""
    if key_mask is not None and key_mask.size == x[..., 0].size:
        key_mask = key_mask.reshape(x.shape[:-1])
    return Textbook.block(self, spec, params, x, key_mask, **options)


@fault("block", "errors")
def a_mask_of_one_row_is_broadcast(self, spec, params, x, key_mask=None, **options):
    """A spatial axis of the mask may be 1."""
    if key_mask is not None and key_mask.ndim == x.ndim - 1 and len(key_mask) == len(x):
        key_mask = np.broadcast_to(key_mask, x.shape[:-1]) if key_mask.shape[1] == 1 else key_mask
    return Textbook.block(self, spec, params, x, key_mask, **options)


@fault("block", "errors")
def a_window_of_another_rank_is_cut(self, spec, params, x, *args, **options):
    """Of three lengths an image takes two."""
    if isinstance(spec.subsample, tuple):
        spec = spec.replace(subsample=spec.subsample[: x.ndim - 2])
    return Textbook.block(self, spec, params, x, *args, **options)


@fault("block", "errors")
def parameters_of_integers_are_converted(self, spec, params, x, *args, **options):
    """They are computed with in the dtype of the input."""
    wide = {name: a.astype(x.dtype) if a.dtype.kind in "ib" else a for name, a in params.items()}
    return Textbook.block(self, spec, wide, x, *args, **options)


@fault("vjp", "wrong_gradients")
def the_gradient_of_one_sample_is_broadcast(self, spec, params, x, dz, *args, **options):
    """It counts for the whole batch."""
    return Textbook.vjp(self, spec, params, x, np.broadcast_to(dz, x.shape).copy(), *args, **options)
