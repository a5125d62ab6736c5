"""The non-local block once more, from the formulas alone: a second opinion on the reference, and what faults break.

Plain on purpose: one sample, one set of positions and one chunk of queries at a time, on PyTorch tensors with
channels first, with autograd for every gradient. Each step is a method of its own, so that a faulty
implementation is this one with one step replaced.
"""

import dataclasses
import itertools
import math

import numpy as np
import torch
from cut import Cut
from ml_dtypes import bfloat16
from network import Networks
from torch.fx.experimental.proxy_tensor import make_fx

from nonlocal_conformance.capabilities import CAPABILITIES
from nonlocal_conformance.memory import peak_resident
from nonlocal_core import NonLocalSpec, param_shapes
from nonlocal_core.arguments import check_positions
from nonlocal_core.planning import METHODS, check_method
from nonlocal_core.spec.calls import check_op, check_scores
from nonlocal_core.spec.parameters import STATISTICS, check_params

QUERIES = 64
"""How many queries are computed at once."""

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclasses.dataclass
class Block:
    """A block: its options, its parameters as tensors, and the dtype of its operands, that of the input if None.

    Those of float32 may have fewer significant bits.
    """

    spec: object
    params: dict
    compute: torch.dtype | None
    bits: int | None = None
    notes: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Form:
    """What turns theta and phi into weights."""

    pairwise: object
    softmax: bool
    scale: float
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None


class Recomputed(torch.autograd.Function):
    """A function of tensors that keeps nothing inside it for its gradients: it is computed once more."""

    @staticmethod
    def forward(ctx, function, *given):
        """Return what the function returns."""
        ctx.function = function
        ctx.save_for_backward(*given)
        return function(*given)

    @staticmethod
    def backward(ctx, d):
        """Return the gradients of what needs one."""
        with torch.enable_grad():
            given = [a.view_as(a) for a in ctx.saved_tensors]  # none of which depends on another
            result = ctx.function(*given)
        needed = [a for a in given if a.requires_grad]
        options = {"create_graph": torch.is_grad_enabled(), "allow_unused": True, "materialize_grads": True}
        found = iter(torch.autograd.grad(result, needed, d, **options))
        return None, *(next(found) if a.requires_grad else None for a in given)


class Session:
    """A live block: the textbook's steps on one and the same block."""

    def __init__(self, driver, block):
        self.driver, self.block, self.frozen = driver, block, frozenset()

    def call(self, x, key_mask=None, *, training=False):
        """Return z and the running statistics."""
        z = self.driver.call(self.block, self.driver.input(x), key_mask, training)
        return self.driver.output(z), self.driver.statistics(self.block)

    def gradients(self, x, dz, key_mask=None, *, training=False):
        """Return z, the running statistics, and the gradients of the input and of what is not frozen."""
        driver, given = self.driver, self.driver.input(x).requires_grad_()
        leaves = driver.leaves(self.block, self.frozen)
        z = driver.call(self.block, given, key_mask, training)
        z.backward(driver.input(dz))
        gradients = {name: driver.gradient(leaf) for name, leaf in leaves.items()}
        return driver.output(z), driver.statistics(self.block), driver.output(given.grad), gradients

    def load(self, params):
        """Take parameters in."""
        check_params(params, self.block.spec)
        self.block.params = self.driver.build(self.block.spec, params).params

    def params(self):
        """Return copies of the parameters."""
        return {name: a.detach().numpy().copy() for name, a in self.block.params.items()}

    def freeze(self, names):
        """Ask for no gradient of these parameters."""
        self.frozen = frozenset(names)

    def copies(self):
        """Return a copy."""
        block = self.block
        return {
            "build": Session(
                self.driver, Block(block.spec, self.driver.build(block.spec, self.params()).params, block.compute)
            )
        }


class Textbook(Networks, Cut):
    """The driver, and the steps that it is made of."""

    name = "textbook"
    version = torch.__version__
    dtypes = ("float64", "float32")
    methods = METHODS
    mixed_dtypes = ("bfloat16", "float16", "tensorfloat32")
    capabilities = frozenset(CAPABILITIES) - {"large", "peak_memory", "sharded_memory", "traffic"}
    unbiased = True

    def __init__(self, device="cpu"):
        if device != "cpu":
            message = f"`device` must be 'cpu'. Got {device!r}."
            raise ValueError(message)
        self.device = device

    # Which positions interact, and which make up one key

    def interacting(self, spec, rank):
        """Return the spatial axes along which positions interact."""
        return {"all": tuple(range(rank)), "space": (1, 2), "time": (0,)}.get(spec.axes, spec.axes)

    def window(self, spec, rank):
        """Return the length of the pooling window on each interacting axis."""
        axes = self.interacting(spec, rank)
        if spec.subsample is None:
            return (1,) * len(axes)
        if isinstance(spec.subsample, int):
            return (spec.subsample,) * len(axes)
        return tuple(spec.subsample[axis] for axis in axes)

    def grids(self, spec, spatial):
        """Return the flat numbers of the positions of each set, as a grid over the interacting axes."""
        numbers = np.arange(math.prod(spatial)).reshape(spatial)
        if spec.group_size is not None:
            starts = range(0, spatial[0], spec.group_size)
            return [numbers[start : start + spec.group_size] for start in starts]
        axes = self.interacting(spec, len(spatial))
        choices = [[slice(None)] if axis in axes else range(size) for axis, size in enumerate(spatial)]
        return [numbers[choice] for choice in itertools.product(*choices)]

    def windows(self, grid, lengths):
        """Return the positions of each window of a grid (M, K), in row-major order; a remainder is dropped."""
        starts = [range(0, size - length + 1, length) for size, length in zip(grid.shape, lengths, strict=True)]
        corners = itertools.product(*starts)
        boxes = [tuple(slice(a, a + b) for a, b in zip(corner, lengths, strict=True)) for corner in corners]
        return np.stack([grid[box].ravel() for box in boxes])

    def sets(self, spec, spatial):
        """Return the queries (n,) and the windows of the keys (m, K) of each set, as flat numbers."""
        lengths = self.window(spec, len(spatial))
        return [(grid.ravel(), self.windows(grid, lengths)) for grid in self.grids(spec, spatial)]

    # The formulas, for one sample and one set

    def operand(self, block, a):
        """Return `a` as it is stored between two products."""
        return a.to(block.compute) if block.bits is None else self.rounded(a.to(block.compute), block.bits)

    def rounded(self, a, bits):
        """Return `a` with so many significant bits."""
        mantissa, exponent = torch.frexp(a.detach())
        return a + (torch.ldexp(torch.round(mantissa * 2**bits), exponent - bits) - a.detach())

    def wide(self, a):
        """Return `a` in the dtype in which products are summed."""
        return a.to(torch.promote_types(a.dtype, torch.float32))

    def bias(self, block, layer):
        """Return the bias of a layer, or None."""
        return block.params.get(f"{layer}.bias")

    def project(self, block, layer, a):
        """Return W a + b along the first axis."""
        weight = self.operand(block, block.params[f"{layer}.weight"])
        result = torch.tensordot(self.wide(weight), self.wide(self.operand(block, a)), 1)
        bias = self.bias(block, layer)
        if bias is not None:
            result = result + self.wide(self.operand(block, bias)).reshape(-1, *[1] * (a.ndim - 1))
        return self.put(block, layer, self.operand(block, result))

    def put(self, block, layer, result):
        """Return the result of a layer, twice that where another was put in its place."""
        return 2 * result if layer == block.notes.get("replaced") else result

    def embed(self, block, layer, a):
        """Return theta or phi: a projection, or the input itself in the Gaussian form."""
        return self.operand(block, a) if block.spec.pairwise == "gaussian" else self.project(block, layer, a)

    def pool(self, values, inside):
        """Return the largest valid value of each window, (C, m, K) to (C, m), and 0 where none is valid."""
        valid = torch.from_numpy(inside)
        largest = values.masked_fill(~valid, -math.inf).max(dim=-1).values
        return largest.masked_fill(~valid.any(dim=-1), 0)

    def valid_keys(self, inside):
        """Return which keys are valid (m,), from which positions of their windows are (m, K)."""
        return inside.any(axis=1)

    def hide(self, values, inside):
        """Return the positions of the windows (C, m, K) with 0 where they are masked."""
        return values.masked_fill(~torch.from_numpy(inside), 0)

    def keys(self, block, x, mask, windows):
        """Return phi (C', m), g (C', m) and which keys are valid (m,), from one sample (C, N)."""
        inside = mask[windows]
        values = self.hide(x[:, windows], inside)
        if block.spec.subsample_at == "input":
            pooled = self.pool(values, inside)
            phi, g = self.embed(block, "phi", pooled), self.project(block, "g", pooled)
        else:
            phi = self.pool(self.embed(block, "phi", values), inside)
            g = self.pool(self.project(block, "g", values), inside)
        return phi, g, self.valid_keys(inside)

    def factor(self, spec):
        """Return the number that multiplies the scores."""
        named = {None: 1.0, "inner": spec.inner_channels**-0.5, "input": spec.channels**-0.5}
        return named.get(spec.scale, spec.scale)

    def form(self, block):
        """Return how a block turns theta and phi into weights."""
        spec = block.spec
        softmax = spec.normalize == "softmax" or spec.pairwise in {"gaussian", "embedded_gaussian"}
        weight, bias = block.params.get("concat.weight"), self.bias(block, "concat")
        concat = [None if a is None else self.operand(block, a) for a in (weight, bias)]
        return Form(spec.pairwise, softmax, self.factor(spec), *concat)

    def relu(self, a):
        """Return the positive part."""
        return torch.relu(a)

    def scores(self, form, theta, phi):
        """Return the scaled scores (n, m) of theta (C', n) and phi (C', m)."""
        theta, phi = self.wide(theta), self.wide(phi)
        if callable(form.pairwise):
            given = (theta.T[None], phi.T[None])
            return form.scale * check_scores(form.pairwise(*given), *given)[0]
        if form.pairwise != "concatenation":
            return (form.scale * theta).T @ phi
        size = (-1, theta.shape[1], phi.shape[1])
        pairs = torch.cat([theta[:, :, None].expand(size), phi[:, None, :].expand(size)])
        total = torch.tensordot(self.wide(form.weight), pairs, 1)
        return form.scale * self.relu(total if form.bias is None else total + self.wide(form.bias))

    def softmax(self, scores):
        """Return the softmax over the keys."""
        powers = torch.exp(scores - scores.max(dim=1, keepdim=True).values.detach())
        return powers / powers.sum(dim=1, keepdim=True)

    def divide(self, scores):
        """Return the scores divided by the number of keys."""
        return scores / scores.shape[1]

    def weights(self, form, theta, phi, valid):
        """Return the weights (n, m), 0 where a key is not valid."""
        weights = self.wide(theta).new_zeros(theta.shape[1], phi.shape[1])
        if not valid.any():
            return weights
        chosen = torch.from_numpy(np.flatnonzero(valid))
        scores = self.scores(form, theta, phi[:, chosen])
        return weights.index_copy(1, chosen, self.softmax(scores) if form.softmax else self.divide(scores))

    def combine(self, weights, g):
        """Return sum_j w_ij g_j, (n, m) and (C', m) to (C', n)."""
        return self.wide(g) @ weights.T

    def aggregate(self, form, theta, phi, g, valid):
        """Return y (C', n), a chunk of queries at a time; a function of the user's gets them whole."""
        g = g.masked_fill(~torch.from_numpy(valid), 0)

        def sums(rows, phi, g, *concat):
            return self.combine(
                self.weights(Form(form.pairwise, form.softmax, form.scale, *concat), rows, phi, valid), g
            )

        concat = [a for a in (form.weight, form.bias) if a is not None]
        if callable(form.pairwise) or theta.shape[1] <= QUERIES:
            return sums(theta, phi, g, *concat)
        return torch.cat([Recomputed.apply(sums, a, phi, g, *concat) for a in theta.split(QUERIES, dim=1)], dim=1)

    def gather(self, block, x, mask, sets):
        """Return y (C', N) of one sample (C, N)."""
        form, theta = self.form(block), self.embed(block, "theta", x)
        parts = [part for one in sets for part in self.of_set(block, form, theta, x, mask, *one)]
        queries, y = zip(*parts, strict=True)
        return torch.cat(y, dim=1)[:, np.argsort(np.concatenate(queries))]

    def of_set(self, block, form, theta, x, mask, queries, windows):
        """Give queries of one set with their y (C', n): all, or those of each device."""
        if "cut" in block.notes:
            yield from self.of_devices(block, form, theta, x, mask, queries, windows)
        else:
            yield queries, self.aggregate(form, theta[:, queries], *self.keys(block, x, mask, windows))

    # The whole block

    def flatten(self, x):
        """Return (B, C, *S) as (B, C, N)."""
        return x.flatten(2)

    def unflatten(self, flat, x):
        """Return (B, C, N) in the shape of `x`."""
        return flat.reshape(x.shape)

    def mask(self, key_mask, x):
        """Return which positions are keys (B, N)."""
        if key_mask is None:
            return np.ones((x.shape[0], math.prod(x.shape[2:])), bool)
        return key_mask.astype(bool).reshape(x.shape[0], -1)

    def admit(self, flat, mask):
        """Return (B, C, N) with 0 at the masked positions that are not finite, and which those are (B, 1, N)."""
        lost = ~torch.from_numpy(mask)[:, None] & ~flat.isfinite().all(dim=1, keepdim=True)
        return flat if mask.all() else flat.masked_fill(lost, 0), lost

    def release(self, z, lost):
        """Return z (B, C, N) with NaN at the positions that were taken for 0."""
        return z.masked_fill(lost, math.nan)

    def counted(self, mask, training):
        """Return which positions (B, N) give the statistics, or None where the running ones serve."""
        return mask if training and mask.any() else None

    def moments(self, r):
        """Return the mean and the biased variance of each channel of (C, n)."""
        mean = r.mean(dim=1)
        return mean, ((r - mean[:, None]) ** 2).mean(dim=1)

    def pick(self, r, counted):
        """Return the chosen positions (C, n) of (B, C, N)."""
        return r.movedim(1, 0).flatten(1)[:, torch.from_numpy(np.flatnonzero(counted))]

    def serving(self, block, r, counted):
        """Return the mean and the variance that normalise: those of the positions that count, or the running ones."""
        running = [block.params[name] for name in STATISTICS]
        return running if counted is None else self.moments(self.pick(r, counted))

    def standardize(self, block, r, counted):
        """Return r less the mean, in units of the standard deviation."""
        if "cut" in block.notes and counted is not None:
            return self.standardize_devices(block, r, counted)
        mean, variance = self.serving(block, r, counted)
        return (r - mean[:, None]) / (variance + block.spec.norm_epsilon).sqrt()[:, None]

    def update(self, block, r):
        """Return the running statistics after a step in training on the positions (C, n)."""
        mean, variance = self.moments(r)
        new = {"norm.mean": mean, "norm.variance": variance * (r.shape[1] / max(r.shape[1] - 1, 1))}
        share = block.spec.norm_momentum
        return {name: (1 - share) * block.params[name] + share * value.detach() for name, value in new.items()}

    def norm(self, block, r, counted):
        """Return the normalised branch (B, C, N)."""
        r = self.wide(r)
        if block.spec.norm is None:
            return r
        if block.spec.norm == "batch":
            r = self.standardize(block, r, counted)
        return r * block.params["norm.weight"][:, None] + block.params["norm.bias"][:, None]

    def residual(self, block, x, r):
        """Return z (B, C, N)."""
        return x + r.to(x.dtype) if block.spec.residual else r.to(x.dtype)

    def layout(self, z, x):
        """Return z in the memory layout of `x`."""
        last = LAST.get(x.dim(), torch.contiguous_format)
        is_last = x.is_contiguous(memory_format=last) and not x.is_contiguous()
        return z.contiguous(memory_format=last if is_last else torch.contiguous_format)

    def on(self, block, x):
        """Return the block with the dtype of its operands in a call on `x`."""
        return dataclasses.replace(block, compute=block.compute or x.dtype)

    def call(self, block, x, key_mask=None, training=False):
        """Return z for `x` (B, C, *S) and `key_mask` (B, *S); in training the statistics move."""
        block = self.on(block, x)
        mask, sets = self.mask(key_mask, x), self.sets(block.spec, x.shape[2:])
        flat, lost = self.admit(self.flatten(x), mask)
        counted = self.counted(mask, training)
        y = torch.stack([self.gather(block, *sample, sets) for sample in zip(flat, mask, strict=True)])
        r = self.project(block, "out", y.movedim(0, 1)).movedim(1, 0)
        z = self.release(self.residual(block, flat, self.norm(block, r, counted)), lost)
        if counted is not None and block.spec.norm == "batch":
            for name, value in self.update(block, self.pick(self.wide(r), counted)).items():
                block.params[name].copy_(value)
        return self.layout(self.unflatten(z, x), x)

    def rows(self, block, x, positions, key_mask):
        """Return the rows of the weights at some positions (B, Q, M)."""
        block = self.on(block, x)
        mask, sets = self.mask(key_mask, x), self.sets(block.spec, x.shape[2:])
        flat, lost = self.admit(self.flatten(x), mask)
        first = np.concatenate([windows[:, 0] for _, windows in sets])
        number = {position: key for key, position in enumerate(np.sort(first))}
        full = torch.zeros(len(flat), flat.shape[2], len(first), dtype=x.dtype)
        for sample, (a, valid) in enumerate(zip(flat, mask, strict=True)):
            theta = self.embed(block, "theta", a)
            for queries, windows in sets:
                phi, _, keys = self.keys(block, a, valid, windows)
                columns = [number[position] for position in windows[:, 0]]
                weights = self.weights(self.form(block), theta[:, queries], phi, keys)
                full[sample, queries[:, None], columns] = weights.to(x.dtype)
        return self.release(full.mT, lost).mT[:, positions]

    # The protocol of a driver

    def check(self, spec, params, x, key_mask=None, training=False, method="auto"):
        """Check the arguments of a block."""
        check_method(method, spec.pairwise)
        check_params(params, spec)
        shape, dtype = (None, "bool") if key_mask is None else (key_mask.shape, key_mask.dtype.name)
        spec.check_input(x.shape, dtype=x.dtype.name, mask_shape=shape, mask_dtype=dtype, training=training)

    def tensor(self, a):
        """Return a tensor that shares the memory of an array."""
        a = np.asarray(a)
        return torch.as_tensor(a.view(np.int16)).view(torch.bfloat16) if a.dtype == bfloat16 else torch.as_tensor(a)

    def array(self, a):
        """Return an array that shares the memory of a tensor."""
        a = a.detach()
        return a.view(torch.int16).numpy().view(bfloat16) if a.dtype == torch.bfloat16 else a.numpy()

    def input(self, a):
        """Return an array with channels last as a tensor with channels first."""
        return self.tensor(a).movedim(-1, 1)

    def output(self, z):
        """Return a tensor with channels first as an array with channels last."""
        return self.array(z.movedim(1, -1))

    def build(self, spec, params, dtype=None):
        """Return a block with a copy of these parameters."""
        tensors = {name: self.tensor(a).clone() for name, a in params.items()}
        return Block(spec, tensors, dtype)

    def leaves(self, block, frozen=()):
        """Return the parameters that have gradients, by name; those that are frozen are constants."""
        block.params.update({name: a.detach() for name, a in block.params.items()})
        names = [name for name in block.params if name not in STATISTICS and name not in frozen]
        return {name: block.params[name].requires_grad_() for name in names}

    def gradient(self, leaf):
        """Return the gradient of a parameter as an array; what nothing depends on has the gradient 0."""
        return (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).numpy()

    def statistics(self, block):
        """Return the running statistics of a block as arrays."""
        return {name: block.params[name].numpy().copy() for name in STATISTICS if name in block.params}

    def block(self, spec, params, x, key_mask=None, *, training=False, method="auto"):
        """Return z and the running statistics."""
        self.check(spec, params, x, key_mask, training, method)
        return self.session(spec, params, method=method).call(x, key_mask, training=training)

    def steps(self, spec, params, inputs, *, training=False):
        """Call one block on each input in turn."""
        session = self.session(spec, params)
        return [session.call(x, training=training) for x in inputs]

    def vjp(self, spec, params, x, dz, key_mask=None, *, training=False, method="auto"):
        """Return the gradients of the input and of the parameters."""
        self.check(spec, params, x, key_mask, training, method)
        return self.session(spec, params, method=method).gradients(x, dz, key_mask, training=training)[2:]

    def session(self, spec, params, *, method="auto"):  # noqa: ARG002 - it has one
        """Return a live block."""
        return Session(self, self.build(spec, params))

    def hvp(self, spec, params, x, dz, vx, vparams, key_mask=None, *, training=False, method="auto"):
        """Return the gradients of <gradients, v>."""
        self.check(spec, params, x, key_mask, training, method)
        return self.second(self.build(spec, params), x, dz, vx, vparams, key_mask, training)

    def second(self, block, x, dz, vx, vparams, key_mask, training):
        """Return the gradients of <gradients, v>."""
        leaves, given = self.leaves(block), self.input(x).requires_grad_()
        every = [given, *leaves.values()]
        z = self.call(block, given, key_mask, training)
        first = torch.autograd.grad(z, every, self.input(dz), create_graph=True, materialize_grads=True)
        along = [self.input(vx), *(self.tensor(vparams[name]) for name in leaves)]
        product = sum((d * v).sum() for d, v in zip(first, along, strict=True))
        second = torch.autograd.grad(product, every, materialize_grads=True)
        return self.output(second[0]), dict(zip(leaves, (d.detach().numpy() for d in second[1:]), strict=True))

    def train(self, spec, params, x, target, key_mask=None, *, steps, rate):
        """Return the losses and the parameters of plain SGD in training mode."""
        block, losses = self.build(spec, params), []
        for _ in range(steps):
            leaves = self.leaves(block)
            loss = ((self.call(block, self.input(x), key_mask, training=True) - self.input(target)) ** 2).mean()
            loss.backward()
            losses.append(loss.item())
            block.params.update(
                {name: leaf.detach() - rate * self.tensor(self.gradient(leaf)) for name, leaf in leaves.items()}
            )
        return losses, {name: tensor.numpy() for name, tensor in block.params.items()}

    def operation(self, tensors, options):
        """Return the operation on tensors (B, N, C'), (B, M, C'), (B, M, D) as (B, N, D)."""
        pairwise, scale = options.get("pairwise", "embedded_gaussian"), options.get("scale")
        softmax = options.get("normalize") == "softmax" or pairwise in {"gaussian", "embedded_gaussian"}
        concat = (tensors.get("concat_weight"), tensors.get("concat_bias"))
        form = Form(pairwise, softmax, 1.0 if scale is None else scale, *concat)
        theta, phi, g = (tensors[name].mT for name in ("theta", "phi", "g"))
        mask = options.get("key_mask")
        mask = np.ones((phi.shape[0], phi.shape[2]), bool) if mask is None else mask
        y = [self.aggregate(form, *sample) for sample in zip(theta, phi, g, mask, strict=True)]
        return torch.stack(y).mT.to(theta.dtype)

    def op(self, theta, phi, g, **options):
        """Return the operation alone."""
        check_op(theta, phi, g, **options)
        arrays = {"theta": theta, "phi": phi, "g": g}
        arrays |= {name: options[name] for name in ("concat_weight", "concat_bias") if name in options}
        return self.operation({name: self.tensor(a) for name, a in arrays.items()}, options).numpy()

    def op_vjp(self, theta, phi, g, dy, **options):
        """Return the gradients of the operation alone."""
        arrays = {"theta": theta, "phi": phi, "g": g}
        arrays |= {name: options.pop(name) for name in ("concat_weight", "concat_bias") if name in options}
        leaves = {name: self.tensor(a).requires_grad_() for name, a in arrays.items()}
        self.operation(leaves, options).backward(self.tensor(dy))
        return {name: self.gradient(leaf) for name, leaf in leaves.items()}

    def attention(self, spec, params, x, positions=None, key_mask=None):
        """Return rows of the weights."""
        self.check(spec, params, x, key_mask)
        queries = math.prod(x.shape[1:-1])
        chosen = np.arange(queries) if positions is None else check_positions(positions, queries)
        return self.array(self.rows(self.build(spec, params), self.input(x), chosen, key_mask))

    def export(self, spec, params):
        """Take parameters in and give them out again."""
        check_params(params, spec)
        return {name: tensor.numpy().copy() for name, tensor in self.build(spec, params).params.items()}

    def start(self, spec, name, shape):
        """Return one parameter of a new block."""
        last = "norm.weight" if spec.norm else "out.weight"
        if name == last and spec.zero_init:
            return torch.zeros(shape)
        if name in {"norm.weight", "norm.variance"}:
            return torch.ones(shape)
        return torch.randn(shape) * 0.01 if name.endswith(".weight") else torch.zeros(shape)

    def create(self, **options):
        """Return the spec of a block with these options."""
        return NonLocalSpec(**options)

    def rebuilt(self, spec):
        """Return the spec as it comes back from a file."""
        return NonLocalSpec.from_json(spec.to_json())

    def initial(self, spec, seed=0):
        """Return the parameters of a new block."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return {name: self.start(spec, name, shape).numpy() for name, shape in param_shapes(spec).items()}

    def compiled(self, spec, params, x, key_mask=None, *, training=False, method="auto"):
        """Return the output of a block that was traced to a graph on another input."""
        self.check(spec, params, x, key_mask, training, method)
        given = self.input(x)
        graph = make_fx(lambda a: self.call(self.build(spec, params), a, key_mask, training))(given + 1)
        return self.output(graph(given))

    def compiled_vjp(self, spec, params, x, dz, key_mask=None, *, training=False, method="auto"):
        """Return z, the statistics and the gradients by a graph that was traced on another input."""
        self.check(spec, params, x, key_mask, training, method)
        kept = self.build(spec, params).params

        def run(x, dz, *tensors):
            block = Block(spec, dict(zip(kept, (a.clone() for a in tensors), strict=True)), None)
            leaves, given = self.leaves(block), x.detach().requires_grad_()
            z = self.call(block, given, key_mask, training)
            found = torch.autograd.grad(z, [given, *leaves.values()], dz, materialize_grads=True)
            return (
                z.detach(),
                {name: a.detach() for name, a in block.params.items()},
                dict(zip(["x", *leaves], found, strict=True)),
            )

        arguments = self.input(x), self.input(dz), *kept.values()
        z, moved, found = make_fx(run)(arguments[0] + 1, *arguments[1:])(*arguments)
        dx, statistics = self.output(found.pop("x")), self.statistics(Block(spec, moved, None))
        return self.output(z), statistics, dx, {name: self.array(d) for name, d in found.items()}

    def narrow(self, spec, params, dtype):
        """Return a block with operands of half precision, or with those of TF32."""
        if dtype == "tensorfloat32":
            return dataclasses.replace(self.build(spec, params, torch.float32), bits=11)
        return self.build(spec, params, getattr(torch, dtype))

    def mixed_vjp(self, spec, params, x, dz, dtype, key_mask=None, *, training=False, method="auto"):
        """Return z, the statistics and the gradients with operands of half precision."""
        self.check(spec, params, x, key_mask, training, method)
        return Session(self, self.narrow(spec, params, dtype)).gradients(x, dz, key_mask, training=training)

    def mixed_attention(self, spec, params, x, dtype, key_mask=None):
        """Return the rows of the weights with operands of half precision."""
        self.check(spec, params, x, key_mask)
        return self.array(self.rows(self.narrow(spec, params, dtype), self.input(x), slice(None), key_mask))

    def mixed(self, spec, params, x, dtype, key_mask=None, *, method="auto"):
        """Return the output with operands of half precision."""
        self.check(spec, params, x, key_mask, method=method)
        return self.output(self.call(self.narrow(spec, params, dtype), self.input(x), key_mask))

    def layouts(self, spec, params, x, dz, key_mask=None):
        """Return z and dx for each memory layout of the input or the mask, and whether z has that of x."""
        block, plain = self.build(spec, params), self.input(x).contiguous()
        last = LAST.get(x.ndim, torch.contiguous_format)
        inputs = {
            "contiguous input": (plain, key_mask, torch.contiguous_format),
            "channels last input": (self.input(x), key_mask, last),
            "transposed input": (plain.mT.contiguous().mT, key_mask, torch.contiguous_format),
        }
        if key_mask is not None:
            turned = np.ascontiguousarray(key_mask.T).T
            inputs["input with a transposed mask"] = plain, turned, torch.contiguous_format
        results = {}
        for name, (a, mask, layout) in inputs.items():
            given = a.detach().requires_grad_()
            z = self.call(block, given, mask)
            (dx,) = torch.autograd.grad(z, given, self.input(dz))
            results[name] = self.output(z), self.output(dx), z.is_contiguous(memory_format=layout)
        return results

    def exported(self, block):
        """Return the parameters that a block computes with."""
        own = f"{block.notes.get('replaced')}."
        tensors = {name: 2 * a if name.startswith(own) else a for name, a in block.params.items()}
        return {name: a.detach().numpy() for name, a in tensors.items()}

    def replaced(self, spec, params, x, dz, layer, key_mask=None):
        """Return what a block with a doubled layer gives."""
        self.check(spec, params, x, key_mask)
        block = self.build(spec, params)
        block.notes["replaced"] = layer
        z, _, *gradients = Session(self, block).gradients(x, dz, key_mask)
        rows = self.array(self.rows(block, self.input(x), slice(None), key_mask))
        return z, tuple(gradients), rows, lambda: self.exported(block)

    def peak_memory(self, call):
        """Return the result of a call and its peak extra memory in bytes."""
        return peak_resident(call)
