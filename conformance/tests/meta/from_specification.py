"""A block in PyTorch, written from docs/specification.md and nothing else, and its driver.

Where positions lie is a matter of their numbers here: a set is a row of numbers, a window of the pooling another.
"""

import copy
import itertools
import math
import pickle

import ml_dtypes
import torch
from torch import nn
from torch.nn import functional

from nonlocal_core import NonLocalSpec, param_shapes

STATISTICS = ("norm.mean", "norm.variance")


def places(spec, spatial):
    """Return the numbers of the positions in each set `(sets, N)`, and in each window of each set `(sets, M, K)`."""
    numbers = torch.arange(math.prod(spatial)).reshape(*spatial)
    named = {"all": tuple(range(len(spatial))), "space": (1, 2), "time": (0,)}
    inner = named.get(spec.axes) or tuple(sorted(spec.axes))
    window = spec.subsample or 1
    sizes = [window if isinstance(window, int) else window[axis] for axis in inner]
    if spec.group_size is not None:
        numbers, inner = numbers.unflatten(0, (-1, spec.group_size)), (1, 2, 3)
    outer = [axis for axis in range(numbers.ndim) if axis not in inner]
    numbers = numbers.permute(*outer, *inner).flatten(0, len(outer) - 1) if outer else numbers[None]
    queries = numbers.flatten(1)
    for axis, size in enumerate(sizes):
        left = numbers.shape[1 + 2 * axis] // size
        numbers = numbers.narrow(1 + 2 * axis, 0, left * size).unflatten(1 + 2 * axis, (left, size))
    windows = numbers.permute(0, *range(1, numbers.ndim, 2), *range(2, numbers.ndim, 2))
    return queries, windows.flatten(1 + len(sizes)).flatten(1, len(sizes))


def wide(a):
    """Return a tensor in at least float32."""
    return a.to(torch.promote_types(a.dtype, torch.float32))


def weights_of(theta, phi, valid, pairwise, scale, concat_weight=None, concat_bias=None, normalize=None):
    """Return the weights `(B, N, M)` and by what they are still to be divided; `valid (B, M)` says which keys count."""
    width = theta.shape[2]
    phi = torch.where(valid[..., None], phi, 0)
    if callable(pairwise):
        scores = scale * pairwise(theta, phi)
    elif pairwise == "concatenation":
        pair = (theta @ concat_weight[:width])[:, :, None] + (phi @ concat_weight[width:])[:, None, :]
        scores = scale * torch.relu(pair if concat_bias is None else pair + concat_bias)
    else:
        scores = scale * theta @ phi.mT
    if "gaussian" in str(pairwise) or normalize == "softmax":
        some = valid.any(1)[:, None, None]
        scores = torch.where(some, scores.masked_fill(~valid[:, None], -torch.inf), 0)
        return torch.where(some, scores.softmax(2), 0), 1
    return torch.where(valid[:, None], scores, 0), valid.sum(1).clamp(min=1)[:, None, None]


class Block(nn.Module):
    """The block, from `(B, S1..Sk, C)` to the same; `operand` is a dtype for the operands of its products."""

    def __init__(self, *, operand=None, **options):
        super().__init__()
        self.spec, self.operand = NonLocalSpec(**options), operand
        starts_at_0 = self.spec.zero_init and ("norm.weight" if self.spec.norm else "out.weight")
        for name, shape in param_shapes(self.spec).items():
            layer, kind = name.split(".")
            if layer not in self._modules:
                self.add_module(layer, nn.Module())
            if kind == "weight" and name != starts_at_0 and layer != "norm":
                value = torch.empty(shape).normal_(std=0.01)
            else:
                value = torch.full(shape, float(name in {"norm.weight", "norm.variance"} - {starts_at_0}))
            if name in STATISTICS:
                self.get_submodule(layer).register_buffer(kind, value)
            else:
                self.get_submodule(layer).register_parameter(kind, nn.Parameter(value))

    def named(self):
        """Return the parameters and statistics under their canonical names, which they have here."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def project(self, layer, a):
        """Return W a + b."""
        home = self.get_submodule(layer)
        return functional.linear(a, home.weight.to(a), home.bias.to(a) if self.spec.bias[layer] else None)

    def embedded(self, x, seen, spatial):
        """Return theta, phi, g and which keys are valid, set by set, and the numbers of the queries and of the windows.

        What `x (B, N, C)` is where `seen (B, N)` is False matters to theta alone.
        """
        spec = self.spec
        queries, windows = places(spec, spatial)
        valid = seen[:, windows].any(3)

        def pooled(a):
            largest = a[:, windows].masked_fill(~seen[:, windows, None], -torch.inf).max(3).values
            return torch.where(valid[..., None], largest, 0)

        def key(layer):
            at_input = spec.subsample_at == "input"
            return self.project(layer, pooled(x)) if at_input else pooled(self.project(layer, x))

        embeds = spec.pairwise != "gaussian"
        theta = (self.project("theta", x) if embeds else x)[:, queries]
        found = wide(theta), wide(key("phi") if embeds else pooled(x)), wide(key("g")), valid
        return *(a.flatten(0, 1) for a in found), queries, windows

    def weighed(self, theta, phi, valid):
        """Return what `weights_of` does, with the options of this block."""
        spec = self.spec
        factors = {None: 1.0, "inner": spec.inner_channels**-0.5, "input": spec.channels**-0.5}
        factor = spec.scale if isinstance(spec.scale, float) else factors[spec.scale]
        concat = self._modules.get("concat")
        weight = None if concat is None else concat.weight.to(theta)
        bias = concat.bias.to(theta) if concat is not None and spec.bias["concat"] else None
        return weights_of(theta, phi, valid, spec.pairwise, factor, weight, bias, spec.normalize)

    def prepared(self, x, key_mask):
        """Return `x (B, N, C)` without what is hidden, and which positions are seen and which hidden, `(B, N)`."""
        given = {} if key_mask is None else {"mask_shape": key_mask.shape}
        self.spec.check_input(x.shape, training=self.training, **given)
        x = x.flatten(1, -2)
        seen = torch.ones(x.shape[:2], dtype=torch.bool) if key_mask is None else key_mask.flatten(1)
        hidden = ~seen & ~x.isfinite().all(2)
        return torch.where(hidden[..., None], 0, x), seen, hidden

    def forward(self, x, key_mask=None):
        """Return z."""
        flat, seen, hidden = self.prepared(x, key_mask)
        operand = self.operand or x.dtype
        theta, phi, g, valid, queries, _ = self.embedded(flat.to(operand), seen, x.shape[1:-1])
        weights, divisor = self.weighed(theta, phi, valid)
        y = weights @ torch.where(valid[..., None], g, 0) / divisor
        y = y.unflatten(0, (len(x), -1)).flatten(1, 2)[:, queries.flatten().argsort()]
        z = self.normed(wide(self.project("out", y.to(operand))), seen) + (flat if self.spec.residual else 0)
        return torch.where(hidden[..., None], torch.nan, z).to(x).reshape(x.shape)

    def normed(self, r, seen):
        """Return the norm of r, and take part of its statistics over in training."""
        if self.spec.norm is None:
            return r
        norm = self.norm
        if self.spec.norm == "batch":
            mean, variance = norm.mean.to(r), norm.variance.to(r)
            if self.training and seen.any():
                values = r[seen]
                mean, variance = values.mean(0), values.var(0, correction=0)
                unbiased = variance * (len(values) / max(len(values) - 1, 1))
                with torch.no_grad():
                    norm.mean.lerp_(mean.to(norm.mean), self.spec.norm_momentum)
                    norm.variance.lerp_(unbiased.to(norm.variance), self.spec.norm_momentum)
            r = (r - mean) / (variance + self.spec.norm_epsilon).sqrt()
        return r * norm.weight.to(r) + norm.bias.to(r)

    def attention(self, x, positions=None, key_mask=None):
        """Return rows of the weights, `(B, Q, M)`, over all keys of the pooled grid."""
        flat, seen, hidden = self.prepared(x, key_mask)
        operand = self.operand or x.dtype
        theta, phi, _, valid, queries, windows = self.embedded(flat.to(operand), seen, x.shape[1:-1])
        weights, divisor = self.weighed(theta, phi, valid)
        weights = (weights / divisor).unflatten(0, (len(x), -1))
        columns = windows[..., 0].flatten().argsort().argsort().reshape(windows.shape[:2])
        rows = weights.new_zeros(len(x), queries.numel(), columns.numel())
        rows[:, queries[:, :, None], columns[:, None, :]] = weights
        rows = torch.where(hidden[..., None], torch.nan, rows).to(x)
        return rows if positions is None else rows[:, torch.as_tensor(positions, dtype=torch.long)]


def tensor(a):
    """Return a copy of an array."""
    return torch.tensor(a.astype("float32")).bfloat16() if a.dtype.name == "bfloat16" else torch.tensor(a)


def array(a):
    """Return a copy of a tensor."""
    if a.dtype == torch.bfloat16:
        return a.detach().float().numpy().astype(ml_dtypes.bfloat16)
    return a.detach().clone().numpy()


class Session:
    """One live block."""

    def __init__(self, block):
        self.block = block

    def call(self, x, key_mask=None, *, training=False):
        """Return z and the running statistics."""
        with torch.no_grad():
            z = self.run(tensor(x), key_mask, training)
        return array(z), self.statistics()

    def run(self, x, key_mask, training):
        """Return z of a tensor."""
        return self.block.train(training)(x, None if key_mask is None else tensor(key_mask))

    def gradients(self, x, dz, key_mask=None, *, training=False):
        """Return z, the running statistics, and the gradients."""
        inputs, names = self.inputs(x)
        z = self.run(inputs[0], key_mask, training)
        dx, *found = torch.autograd.grad(z, inputs, tensor(dz))
        return array(z), self.statistics(), array(dx), self.canonical(names, found)

    def inputs(self, x):
        """Return the input and the parameters of which there are gradients, and the names of the latter."""
        trained = {name: a for name, a in self.block.named().items() if a.requires_grad}
        return [tensor(x).requires_grad_(), *trained.values()], list(trained)

    def canonical(self, names, arrays):
        """Return arrays of the parameters in their canonical shapes."""
        shapes = param_shapes(self.block.spec)
        return {name: array(a).reshape(shapes[name]) for name, a in zip(names, arrays, strict=True)}

    def statistics(self):
        """Return the running statistics."""
        return {name: a for name, a in self.params().items() if name in STATISTICS}

    def load(self, params):
        """Take parameters in."""
        shapes = {name: a.shape for name, a in params.items()}
        if shapes != param_shapes(self.block.spec):
            message = f"`params` must fit the block. Got {shapes}."
            raise ValueError(message)
        with torch.no_grad():
            for name, own in self.block.named().items():
                own.copy_(tensor(params[name]).reshape(own.shape))

    def params(self):
        """Return the parameters and statistics."""
        return self.canonical(*zip(*self.block.named().items(), strict=True))

    def freeze(self, names):
        """Ask for no gradient of these parameters from now on."""
        for name in names:
            self.block.named()[name].requires_grad_(requires_grad=False)

    def copies(self):
        """Return a copy by each way that PyTorch has."""
        copies = copy.deepcopy(self.block), pickle.loads(pickle.dumps(self.block))  # noqa: S301
        return dict(zip(("deepcopy", "pickle"), map(type(self), copies), strict=True))


class Driver:
    """What the suite asks of the block."""

    name = "from_specification"
    version = "1"
    device = "cpu"
    dtypes = ("float64", "float32")
    mixed_dtypes = ("bfloat16", "float16")
    methods = ("auto",)
    unbiased = True
    capabilities = frozenset(
        {
            *("vjp", "hvp", "op", "op_vjp", "attention", "export", "create", "rebuilt", "initial", "train", "steps"),
            *("session", "mixed", "mixed_vjp", "mixed_attention", "casts", "functions"),
        }
    )

    def __init__(self, device="cpu"):
        if device != self.device:
            message = f"`device` must be 'cpu'. Got {device!r}."
            raise ValueError(message)

    def made(self, spec, **options):
        """Return a new block."""
        return Block(channels=spec.channels, **spec.changed_options(), **options)

    def session(self, spec, params, *, method="auto", **options):  # noqa: ARG002 - there is one
        """Return a block that has taken the parameters in."""
        dtype = {a.dtype.name for a in params.values()}.pop()
        session = Session(self.made(spec, **options).to(getattr(torch, dtype)))
        session.load(params)
        return session

    def block(self, spec, params, x, key_mask=None, *, training=False, **_):
        """Return z and the running statistics."""
        return self.session(spec, params).call(x, key_mask, training=training)

    def vjp(self, spec, params, x, dz, key_mask=None, *, training=False, **_):
        """Return the gradients."""
        return self.session(spec, params).gradients(x, dz, key_mask, training=training)[2:]

    def hvp(self, spec, params, x, dz, vx, vparams, key_mask=None, *, training=False, **_):
        """Return the gradients of the inner product of the gradients with `vx` and `vparams`."""
        session = self.session(spec, params)
        inputs, names = session.inputs(x)
        z = session.run(inputs[0], key_mask, training)
        first = torch.autograd.grad(z, inputs, tensor(dz), create_graph=True)
        others = [tensor(a).reshape(b.shape) for a, b in zip([vx, *(vparams[n] for n in names)], inputs, strict=True)]
        product = torch.stack([(a * b).sum() for a, b in zip(first, others, strict=True)]).sum()
        dx, *found = torch.autograd.grad(product, inputs, materialize_grads=True)
        return array(dx), session.canonical(names, found)

    def mixed_vjp(self, spec, params, x, dz, dtype, key_mask=None, *, training=False, **_):
        """Return z, the running statistics and the gradients, with operands in `dtype`."""
        session = self.session(spec, params, operand=getattr(torch, dtype))
        return session.gradients(x, dz, key_mask, training=training)

    def mixed(self, spec, params, x, dtype, key_mask=None, **_):
        """Return z with operands in `dtype`."""
        return self.session(spec, params, operand=getattr(torch, dtype)).call(x, key_mask)[0]

    def mixed_attention(self, spec, params, x, dtype, key_mask=None):
        """Return all rows of the weights with operands in `dtype`."""
        return self.attention(spec, params, x, key_mask=key_mask, operand=getattr(torch, dtype))

    def attention(self, spec, params, x, positions=None, key_mask=None, **options):
        """Return rows of the weights."""
        block = self.session(spec, params, **options).block.eval()
        return array(block.attention(tensor(x), positions, None if key_mask is None else tensor(key_mask)))

    def op(self, theta, phi, g, **options):
        """Return y."""
        return array(self.operation(self.tensors(theta, phi, g, options), options))

    def op_vjp(self, theta, phi, g, dy, **options):
        """Return the gradients of the arrays."""
        arrays = self.tensors(theta, phi, g, options)
        y = self.operation(arrays, options)
        found = torch.autograd.grad(y, list(arrays.values()), tensor(dy))
        return {name: array(a) for name, a in zip(arrays, found, strict=True)}

    def tensors(self, theta, phi, g, options):
        """Return what an operation can be differentiated by."""
        given = {"theta": theta, "phi": phi, "g": g, **options}
        names = ("theta", "phi", "g", "concat_weight", "concat_bias")
        return {name: tensor(given[name]).requires_grad_() for name in names if given.get(name) is not None}

    def operation(self, arrays, options):
        """Return y of tensors."""
        mask = options.get("key_mask")
        valid = torch.ones(arrays["phi"].shape[:2], dtype=torch.bool) if mask is None else tensor(mask)
        form = {"pairwise": options.get("pairwise", "embedded_gaussian"), "normalize": options.get("normalize")}
        given = {name: wide(a) for name, a in arrays.items()}
        g = torch.where(valid[..., None], given.pop("g"), 0)
        weights, divisor = weights_of(valid=valid, scale=options.get("scale") or 1.0, **form, **given)
        return (weights @ g / divisor).to(arrays["theta"].dtype)

    def export(self, spec, params):
        """Return parameters after a block has taken them in."""
        return self.session(spec, params).params()

    def create(self, **options):
        """Return the spec of a new block."""
        return Block(**options).spec

    def rebuilt(self, spec):
        """Return the spec of a copy."""
        return pickle.loads(pickle.dumps(self.made(spec))).spec  # noqa: S301

    def initial(self, spec, seed=0):
        """Return the parameters of a new block."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Session(self.made(spec)).params()

    def train(self, spec, params, x, target, key_mask=None, *, steps, rate):
        """Return the losses and the parameters of plain SGD."""
        session, losses = self.session(spec, params), []
        optimizer = torch.optim.SGD(session.block.parameters(), lr=rate)
        for _ in itertools.repeat(None, steps):
            optimizer.zero_grad()
            loss = functional.mse_loss(session.run(tensor(x), key_mask, training=True), tensor(target))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, session.params()

    def steps(self, spec, params, inputs, *, training=False):
        """Return what one block gives for each input in turn."""
        session = self.session(spec, params)
        return [session.call(x, training=training) for x in inputs]
