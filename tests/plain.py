"""A reference of a few lines: the eager model's layers quantized by hand, with nothing of fxmse."""

import copy
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)
ALL_LAYERS = (*LAYERS, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def quantize_weight(weight, num_bits=8):
    """Symmetric, a scale for each slice of the first dimension, from its largest magnitude."""
    largest = weight.abs().amax([*range(1, weight.dim())], keepdim=True).float()
    scale = (largest / ((2**num_bits - 1) / 2)).to(weight.dtype).clamp(min=torch.finfo(weight.dtype).eps)
    limit = 2 ** (num_bits - 1)
    return (weight / scale).round().clamp(-limit, limit - 1) * scale


def quantize_tensor(weight, num_bits=8):
    """Symmetric, one scale for all."""
    return quantize_weight(weight.reshape(1, -1), num_bits).reshape(weight.shape)


def quantize_groups(weight, size, num_bits=4):
    """Symmetric, a scale for ``size`` elements of a row."""
    return quantize_weight(weight.reshape(-1, size), num_bits).reshape(weight.shape)


def quantize_blocks(weight, height, width, num_bits=8):
    """Symmetric, a scale for each block of a matrix; those at its ends are what is left of it."""
    rows = weight.split(height, 0)
    blocks = [[quantize_tensor(block, num_bits) for block in row.split(width, 1)] for row in rows]
    return torch.cat([torch.cat(row, 1) for row in blocks])


def quantize_nvfp4(weight, size=16):
    """Scales in e4m3 of groups, which the largest magnitude of all brings into its range; values in fp4 (e2m1)."""
    groups = weight.reshape(-1, size)
    global_scale = 448 * 6 / groups.abs().max().float()
    scale = (groups.abs().amax(1, keepdim=True).float() / 6 * global_scale).to(torch.float8_e4m3fn).to(weight.dtype)
    scale = scale / global_scale.to(weight.dtype)
    steps = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=weight.dtype)
    nearest = ((groups / scale).abs()[..., None] - steps).abs().argmin(-1)  # of two that are as near, neither occurs
    return (steps[nearest] * scale * groups.sign()).reshape(weight.shape)


def quantize_input(x, low, high, num_bits=8):
    """Asymmetric, one scale for all, of a range that is made to hold 0."""
    low, high = torch.tensor([min(float(low), 0.0), max(float(high), 0.0)]).float()
    scale = (high - low) / (2**num_bits - 1)
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    limit = 2 ** (num_bits - 1)
    zero_point = torch.clamp(torch.round(-limit - low / scale), -limit, limit - 1)
    scale = scale.to(x.dtype)
    return ((x / scale + zero_point).round().clamp(-limit, limit - 1) - zero_point) * scale


def quantize_by_range(values):
    """A function that quantizes as by :func:`quantize_input`, by the range of all ``values``."""
    low, high = min(value.min().item() for value in values), max(value.max().item() for value in values)
    return lambda value: quantize_input(value, low, high)


@torch.no_grad()
def quantize_by_hand(model, batches, x, *, layers=LAYERS, inputs=True):
    """What ``model`` gives for ``x`` with its layers' weights, and inputs by their ranges in ``batches``, quantized."""
    model = copy.deepcopy(model).eval()
    found = {name: module for name, module in model.named_modules() if isinstance(module, layers)}
    ranges = {}

    def see(name, module, args):
        low, high = ranges.get(name, (0.0, 0.0))
        ranges[name] = min(low, args[0].min().item()), max(high, args[0].max().item())

    has_input = {name: m for name, m in found.items() if inputs and not isinstance(m, nn.Embedding)}
    hooks = [m.register_forward_pre_hook(lambda m, args, n=name: see(n, m, args)) for name, m in has_input.items()]
    for batch in batches:
        model(batch.clone())
    for hook in hooks:
        hook.remove()
    quantized = {id(m.weight): nn.Parameter(quantize_weight(m.weight)) for m in found.values()}
    for module in found.values():
        module.weight = quantized[id(module.weight)]
    for name, module in has_input.items():
        module.register_forward_pre_hook(lambda m, args, n=name: (quantize_input(args[0], *ranges[n]), *args[1:]))
    return model(x.clone())


_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
# Where a product has its two factors.
_NAMES = {"input": 0, "weight": 1, "other": 1}
# What leaves a parameter a matrix that a product reads; everything else makes a value like others of it.
_MOVES = frozenset(
    {"t", "T", "mT", "transpose", "reshape", "view", "flatten", "squeeze", "unsqueeze", "permute", "chunk", "expand"}
    | {"__getitem__", "repeat", "cat", "clone", "unbind", "index_select", "flip", "narrow"}
)
_PRODUCTS = {
    **dict.fromkeys(
        (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), (0, 1)
    ),
    **dict.fromkeys((torch.addmm, torch.baddbmm), (1, 2)),
}


def quantize_rows(rows, num_bits=8):
    """Symmetric, a scale for each row."""
    return quantize_weight(rows.reshape(-1, rows.shape[-1]), num_bits).reshape(rows.shape)


class QuantizeOps(TorchFunctionMode):
    """Runs a model's layers and products, however they are written, with what they read quantized by hand.

    A weight is what is computed of parameters alone, in rows of output channels as its op reads them. A layer has one
    range of inputs for all its calls: a layer is a module, and where an op is called without one the matrix that it
    reads. Each product of two activations has two ranges. What reads a weight that depends on data stays as it is.

    Args:
        model: the model.
        outputs: whether outputs of layers are quantized, too.
        quantize_rows: how a weight, (..., out, in), is.
        make_quantizer: of an activation's values, of all batches, the function that quantizes it. A value that several
            calls of a layer read is one.
    """

    def __init__(
        self, model: nn.Module, *, outputs=False, quantize_rows=quantize_rows, make_quantizer=quantize_by_range
    ) -> None:
        super().__init__()
        self._model = model
        self._outputs = outputs
        self._quantize_rows = quantize_rows
        self._make_quantizer = make_quantizer
        self._seen: defaultdict[object, dict] = defaultdict(dict)  # by the value and its version
        self._quantizers: dict[object, Callable[[Tensor], Tensor]] = {}
        self._is_calibrated = False
        self._constants: dict[int, tuple[Tensor, bool]] = {}  # and whether it is a moved parameter
        self._calls: list[str] = []
        self._written: set[str] = set()  # names of buffers
        self._num_products = 0

    def calibrate(self, batches) -> None:
        """Finds the ranges."""
        model = copy.deepcopy(self._model)
        versions = {name: buffer._version for name, buffer in model.named_buffers()}
        model(*(tensor.clone() for tensor in batches[0]))
        self._written = {name for name, buffer in model.named_buffers() if buffer._version != versions[name]}
        model = copy.deepcopy(self._model)
        for batch in batches:
            self._run(model, batch)
        for key, values in self._seen.items():
            self._quantizers[key] = self._make_quantizer([value for _, value in values.values()])
        self._is_calibrated = True

    def run(self, batch):
        """What the quantized model gives."""
        return self._run(copy.deepcopy(self._model), batch)

    @torch.no_grad()
    def _run(self, model, batch):
        self._num_products = 0
        self._constants = {id(parameter): (parameter, True) for parameter in model.parameters()}
        tensors = dict(model.named_buffers()) | {n: t for n, t in vars(model).items() if isinstance(t, Tensor)}
        self._constants |= {id(t): (t, False) for name, t in tensors.items() if name not in self._written}
        layers = {path: module for path, module in model.named_modules() if isinstance(module, ALL_LAYERS)}
        self._owners = {}
        hooks = []
        for path, module in layers.items():
            self._owners.setdefault(_identify(module.weight, _get_kind(module), getattr(module, "groups", 1)), path)
            hooks.append(module.register_forward_pre_hook(lambda module, args, path=path: self._calls.append(path)))
            hooks.append(module.register_forward_hook(lambda module, args, output: self._calls.pop() and None))
        with self:
            outputs = model(*(tensor.clone() for tensor in batch))
        for hook in hooks:
            hook.remove()
        return outputs

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, args = dict(kwargs or {}), list(args)
        sources = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_constant = all(map(self._is_constant, sources))
        layer = None if is_constant else self._quantize(func, args, kwargs)
        output = func(*args, **kwargs)
        if layer and self._outputs:
            output = self._quantize_activation(output, ("output", *layer))
        if is_constant:
            name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
            is_moved = name in _MOVES and any(map(self._is_matrix, sources))
            leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            self._constants |= {id(leaf): (leaf, is_moved) for leaf in leaves}
        return output

    def _is_constant(self, value) -> bool:
        return id(value) in self._constants

    def _is_matrix(self, value) -> bool:
        return self._is_constant(value) and self._constants[id(value)][1]

    def _quantize(self, func, args, kwargs) -> tuple | None:
        """Replaces what an op reads; returns its layer."""
        if func is F.linear or func in _PRODUCTS:
            for name in sorted(_NAMES.keys() & kwargs.keys(), key=_NAMES.__getitem__):
                args.insert(_NAMES[name], kwargs.pop(name))
        if func is F.linear:
            return self._quantize_layer(args, 0, 1, "rows")
        if func in _CONVOLUTIONS:
            return self._quantize_layer(args, 0, 1, "convolution")
        if func in _TRANSPOSED:
            return self._quantize_layer(args, 0, 1, "transposed", args[6] if len(args) > 6 else kwargs.get("groups", 1))
        if func is F.embedding and self._is_calibrated:
            args[1] = self._quantize_rows(args[1])
        if func in _PRODUCTS:
            return self._quantize_product(args, *_PRODUCTS[func])
        return None

    def _quantize_product(self, args, left, right) -> tuple | None:
        if self._is_matrix(args[right]) and args[right].dim() > 1:
            return self._quantize_layer(args, left, right, "columns")
        if self._is_matrix(args[left]) and args[left].dim() > 1:
            return self._quantize_layer(args, right, left, "rows")
        self._num_products += 1
        for place in (left, right):
            args[place] = self._quantize_activation(args[place], (self._num_products, place))
        return None

    def _quantize_layer(self, args, place, weight_place, kind, groups=1) -> tuple | None:
        weight = args[weight_place]
        if not self._is_constant(weight):
            return None
        matrix = _identify(weight, kind, groups)
        layer = self._calls[-1] if self._calls else self._owners.get(matrix, ""), matrix
        args[place] = self._quantize_activation(args[place], layer)
        if self._is_calibrated:
            rows = self._quantize_rows(_as_rows(weight, kind, groups))
            args[weight_place] = _from_rows(rows, weight, kind, groups)
        return layer

    def _quantize_activation(self, value, key):
        if self._is_calibrated:
            return self._quantizers[key](value)
        self._seen[key].setdefault((id(value), value._version), (value, value.clone()))
        return value


def _get_kind(module):
    if isinstance(module, nn.Linear | nn.Embedding):
        return "rows"
    return "transposed" if module.transposed else "convolution"


def _as_rows(weight, kind, groups):
    """A weight as (..., out, in)."""
    if kind == "columns":
        return weight.mT
    if kind == "transposed":
        weight = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1) if kind in ("convolution", "transposed") else weight


def _from_rows(rows, weight, kind, groups):
    if kind == "columns":
        return rows.mT
    if kind == "transposed":
        inputs, outputs, *kernel = weight.shape
        return rows.reshape(groups, outputs, inputs // groups, *kernel).transpose(1, 2).reshape(weight.shape)
    return rows.reshape(weight.shape)


def _identify(weight, kind, groups):
    """What is equal for ops that read equal matrices; one that is expanded is one."""
    rows = _as_rows(weight, kind, groups)
    while rows.dim() > 2 and rows.stride(0) == 0:
        rows = rows[0]
    return "rows" if kind == "columns" else kind, tuple(rows.shape), rows.contiguous().numpy().tobytes()
