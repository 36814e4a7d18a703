"""Models that hypothesis writes: small programs over a pool of values, that print as the code they are."""

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

BATCH, TOKENS, WIDTH, VOCABULARY = 4, 6, 8, 12
MAX_ELEMENTS = 2048  # of a value


@dataclass(frozen=True)
class Program:
    """A model as code.

    Attributes:
        init: the statements that make its modules, parameters and buffers.
        lines: those of ``forward(self, x, ids)``.
        outputs: the names that it returns.
    """

    init: tuple[str, ...]
    lines: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def source(self) -> str:
        lines = [*self.lines, f"return {', '.join(f'{name} + 0' for name in self.outputs)},"]
        return (
            "class Model(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            f"{textwrap.indent(chr(10).join(self.init), ' ' * 8)}\n\n"
            "    def forward(self, x, ids):\n"
            f"{textwrap.indent(chr(10).join(lines), ' ' * 8)}\n"
        )

    def __repr__(self) -> str:
        return f"\n{self.source}"

    def make_model(self) -> nn.Module:
        """The model in evaluation mode, always the same: rows and columns of its weights are of different magnitudes.

        It is in float64, where what adds up in another order rounds to the same quantized value.
        """
        torch.manual_seed(0)
        namespace = {"torch": torch, "nn": nn, "F": F}
        exec(self.source, namespace)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            model = namespace["Model"]().eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(default)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                for dim in (0, -1):
                    parameter.transpose(dim, -1).mul_(torch.logspace(-0.5, 0.3, parameter.shape[dim]))
        return model


def make_batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Floats and tokens, ``x`` and ``ids``."""
    generator = torch.Generator().manual_seed(seed)
    x = (1 + seed) * torch.randn(BATCH, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, VOCABULARY, (BATCH, TOKENS), generator=generator)


@dataclass(frozen=True)
class Value:
    name: str
    shape: tuple[int, ...]
    is_writable: bool = True


@dataclass
class Writer:
    """Writes a program: what is there so far, and choices that hypothesis makes."""

    draw: Callable
    front_end: str
    init: list[str] = field(
        default_factory=lambda: ["self.inplace, self.identity = nn.ReLU(inplace=True), nn.Identity()"]
    )
    lines: list[str] = field(default_factory=list)
    pool: list[Value] = field(default_factory=lambda: [Value("x", (BATCH, TOKENS, WIDTH))])
    layers: dict[str, tuple] = field(default_factory=dict)  # by expression: what it is and its sizes
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)  # parameters by expression
    buffers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    num_names: int = 0

    def choose(self, options):
        return self.draw(st.sampled_from(list(options)))

    def name(self, prefix: str) -> str:
        self.num_names += 1
        return f"{prefix}{self.num_names}"

    def pick(self, fits: Callable[[Value], bool] = lambda value: True) -> Value | None:
        """A value; the latest is the first choice."""
        found = [value for value in reversed(self.pool) if fits(value)]
        return self.choose(found) if found else None

    def put(self, expression: str, shape, is_writable: bool = True) -> Value:
        """Assigns a new value."""
        value = Value(self.name("v"), tuple(shape), is_writable)
        self.lines.append(f"{value.name} = {expression}")
        self.pool.append(value)
        return value

    def parameter(self, shape) -> str:
        expression = f"self.{self.name('p')}"
        self.init.append(f"{expression} = nn.Parameter(torch.randn{tuple(shape)})")
        self.weights[expression] = tuple(shape)
        return expression

    def find_parameter(self, shape) -> str:
        """One of this shape, new or not."""
        known = [name for name, other in self.weights.items() if other == tuple(shape)]
        return self.choose([None, *known]) or self.parameter(shape)

    def layer(self, kind: str, sizes: tuple, code: str) -> str:
        """One of this kind, new or not, or a new one with the weight of another."""
        known = [name for name, other in self.layers.items() if other == (kind, sizes)]
        if found := self.choose([None, *known]):
            return found
        expression = f"self.{self.name(kind)}"
        self.init.append(f"{expression} = {code}")
        if known and self.draw(st.booleans()):
            self.init.append(f"{expression}.weight = {known[0]}.weight")
        self.layers[expression] = (kind, sizes)
        return expression


STEPS: list[Callable[[Writer], object]] = []


def step(function):
    STEPS.append(function)
    return function


def is_matrix(value: Value) -> bool:
    return len(value.shape) >= 2 and value.shape[-1] > 1


# Layers.


@step
def call_linear(w: Writer):
    if value := w.pick(is_matrix):
        size, out = value.shape[-1], w.choose((WIDTH, 6))
        layer = w.layer("fc", (size, out), f"nn.Linear({size}, {out}, bias={w.draw(st.booleans())})")
        w.weights.setdefault(f"{layer}.weight", (out, size))
        w.put(f"{layer}({value.name})", (*value.shape[:-1], out))


@step
def call_block(w: Writer):
    if value := w.pick(lambda v: is_matrix(v)):
        size = value.shape[-1]
        layer = (
            w.layer(
                "block",
                (size,),
                f"nn.Sequential(nn.Linear({size}, {size}), nn.ReLU(inplace=True), nn.Linear({size}, {size}))",
            )
            if not any(kind == "block" for kind, _ in w.layers.values())
            else None
        )
        known = [name for name, other in w.layers.items() if other == ("block", (size,))]
        if layer or known:
            w.put(f"{layer or known[0]}({value.name})", value.shape)


@step
def call_conv1d(w: Writer):
    if value := w.pick(lambda v: len(v.shape) == 3 and v.shape[1] % 2 == 0):
        channels, length = value.shape[1:]
        groups, is_transposed = w.choose((1, 2)), w.draw(st.booleans())
        kind = "ConvTranspose1d" if is_transposed else "Conv1d"
        out = w.choose((4, channels))
        layer = w.layer(
            kind.lower(), (channels, out, groups), f"nn.{kind}({channels}, {out}, 3, padding=1, groups={groups})"
        )
        w.put(f"{layer}({value.name})", (value.shape[0], out, length))


@step
def call_conv2d(w: Writer):
    if value := w.pick(lambda v: len(v.shape) == 4 and v.shape[1] % 2 == 0):
        channels = value.shape[1]
        groups, is_transposed = w.choose((1, 2)), w.draw(st.booleans())
        kind = "ConvTranspose2d" if is_transposed else "Conv2d"
        out = w.choose((4, channels))
        layer = w.layer(
            kind.lower(), (channels, out, groups), f"nn.{kind}({channels}, {out}, 3, padding=1, groups={groups})"
        )
        w.put(f"{layer}({value.name})", (value.shape[0], out, *value.shape[2:]))


@step
def call_conv_functional(w: Writer):
    if value := w.pick(lambda v: len(v.shape) == 3):
        channels = value.shape[1]
        read, shape = w.choose(
            (
                (lambda p: p, (4, channels, 1)),
                (lambda p: f"{p}.unsqueeze(-1)", (4, channels)),
                (lambda p: f"{p}.view(4, {channels}, 3)[:, :, 1:2]", (4, channels * 3)),
                (lambda p: f"{p}.transpose(0, 1)", (channels, 4, 1)),
            )
        )
        function = w.choose(("F.conv1d", "F.conv_transpose1d"))
        if function == "F.conv_transpose1d":
            read, shape = w.choose(
                ((lambda p: p, (channels, 4, 1)), (lambda p: f"{p}.transpose(0, 1)", (4, channels, 1)))
            )
        w.put(f"{function}({value.name}, {read(w.find_parameter(shape))})", (value.shape[0], 4, value.shape[2]))


@step
def call_embedding(w: Writer):
    layer = w.layer("emb", (), f"nn.Embedding({VOCABULARY}, {WIDTH})")
    w.weights.setdefault(f"{layer}.weight", (VOCABULARY, WIDTH))
    w.put(f"{layer}(ids)", (BATCH, TOKENS, WIDTH))


# Products with parameters.

ROWS = (  # expressions of an (o, i) matrix, and the parameter's shape
    (lambda p, o, i: p, lambda o, i: (o, i)),
    (lambda p, o, i: f"{p}.t()", lambda o, i: (i, o)),
    (lambda p, o, i: f"{p}.T", lambda o, i: (i, o)),
    (lambda p, o, i: f"{p}.transpose(0, 1)", lambda o, i: (i, o)),
    (lambda p, o, i: f"{p}.reshape({o}, {i})", lambda o, i: (o, i)),
    (lambda p, o, i: f"{p}.view({o}, -1)", lambda o, i: (o, i, 1)),
    (lambda p, o, i: f"{p}.flatten(1)", lambda o, i: (o, 2, i // 2)),
    (lambda p, o, i: f"{p}.reshape({o}, {i})", lambda o, i: (o * i,)),
    (lambda p, o, i: f"{p}[{o * i}:].view({o}, {i})", lambda o, i: (2 * o * i,)),
    (lambda p, o, i: f"{p}[:{o * i}].view({o}, {i})", lambda o, i: (2 * o * i,)),
    (lambda p, o, i: f"{p}.squeeze(-1)", lambda o, i: (o, i, 1)),
    (lambda p, o, i: f"{p}[:, :, -1]", lambda o, i: (o, i, 3)),
    (lambda p, o, i: f"{p}[1:{o + 1}]", lambda o, i: (o + 2, i)),
    (lambda p, o, i: f"{p}[:, 1:{i + 1}]", lambda o, i: (o, i + 2)),
    (lambda p, o, i: f"{p}.permute(1, 0, 2).reshape({o}, {i})", lambda o, i: (2, o, i // 2)),
    (lambda p, o, i: f"{p}.chunk(2, 0)[1]", lambda o, i: (2 * o, i)),
    (lambda p, o, i: f"{p}.expand({o}, {i})", lambda o, i: (1, i)),
    (lambda p, o, i: f"{p}.repeat(2, 1)", lambda o, i: (o // 2, i)),
    (lambda p, o, i: f"torch.cat([{p}, {p}.flip(0)])", lambda o, i: (o // 2, i)),
    (lambda p, o, i: f"{p}.clone()", lambda o, i: (o, i)),
    (lambda p, o, i: f"{p}.unbind(0)[0]", lambda o, i: (1, o, i)),
    (lambda p, o, i: f"{p}[0]", lambda o, i: (1, o, i)),
    (lambda p, o, i: f"{p}.index_select(0, torch.arange({o}))", lambda o, i: (o + 1, i)),
    (lambda p, o, i: f"torch.flip({p}, (0,))", lambda o, i: (o, i)),
    (lambda p, o, i: f"{p}.narrow(0, 1, {o})", lambda o, i: (o + 1, i)),
)
COMPUTED = (  # those that are not moved alone
    (lambda p, o, i: f"({p} * 2)", lambda o, i: (o, i)),
    (lambda p, o, i: f"F.normalize({p}, dim=1)", lambda o, i: (o, i)),
    (lambda p, o, i: f"({p} - {p}.mean(1, keepdim=True))", lambda o, i: (o, i)),
)


def read_matrix(w: Writer, out: int, size: int, reads=ROWS) -> str:
    expression, shape = w.choose(reads)
    return expression(w.find_parameter(shape(out, size)), out, size)


def is_even(value: Value) -> bool:
    return is_matrix(value) and value.shape[-1] % 2 == 0


@step
def call_linear_functional(w: Writer):
    if value := w.pick(is_even):
        out = w.choose((WIDTH, VOCABULARY))
        matrix = read_matrix(w, out, value.shape[-1], (*ROWS, *COMPUTED))
        form = w.choose(("F.linear({x}, {m})", "F.linear(weight={m}, input={x})", "F.linear({x}, {m}, bias=None)"))
        w.put(form.format(x=value.name, m=matrix), (*value.shape[:-1], out))


@step
def call_linear_of_a_tensor(w: Writer):
    if value := w.pick(is_even):
        size = value.shape[-1]
        if w.front_end == "calibration":  # which takes all tensors but parameters for data
            return
        name = f"self.{w.name('t')}"
        w.init.append(f"{name} = torch.randn(6, {size})")
        if w.draw(st.booleans()):
            w.init[-1] = f"self.register_buffer({name[5:]!r}, torch.randn(6, {size}))"
        form = w.choose(("F.linear({x}, {m})", "{x} @ {m}.t()", "F.linear({x}, {m} * 2)"))
        w.put(form.format(x=value.name, m=name), (*value.shape[:-1], 6))


@step
def call_einsum(w: Writer):
    if value := w.pick(is_even):
        matrix = w.find_parameter((WIDTH, value.shape[-1]))
        w.put(f"torch.einsum('...i,oi->...o', {value.name}, {matrix})", (*value.shape[:-1], WIDTH))


@step
def multiply_by_vector(w: Writer):
    if value := w.pick(is_even):
        vector = w.find_parameter(value.shape[-1:])
        w.put(f"({value.name} @ {vector})[..., None].expand(*{value.shape[:-1]}, 2)", (*value.shape[:-1], 2), False)


@step
def multiply_a_column(w: Writer):
    if value := w.pick(is_even):
        matrix = read_matrix(w, WIDTH, value.shape[-1])
        w.put(f"torch.matmul({matrix}, {value.name}.unsqueeze(-1)).squeeze(-1)", (*value.shape[:-1], WIDTH))


@step
def attend(w: Writer):
    if value := w.pick(lambda v: len(v.shape) == 3):
        form = w.choose(
            (
                "F.scaled_dot_product_attention({x}, {x}, {x})",
                "torch.softmax({x} @ {x}.transpose(1, 2) / 2, -1) @ {x}",
                "torch.bmm(({x} @ {x}.transpose(-2, -1)).softmax(-1), {x})",
            )
        )
        w.put(form.format(x=value.name), value.shape)


@step
def multiply_by_parameter(w: Writer):
    if value := w.pick(is_even):
        out, size = WIDTH, value.shape[-1]
        forms = ("{x} @ {m}.t()", "torch.matmul({x}, {m}.t())", "{x}.matmul({m}.mT)")
        form = w.choose((*forms, "torch.matmul(other={m}.t(), input={x})"))
        matrix = read_matrix(w, out, size, (*ROWS, *COMPUTED))
        w.put(form.format(x=value.name, m=matrix), (*value.shape[:-1], out))


@step
def multiply_flat(w: Writer):
    if value := w.pick(lambda v: len(v.shape) == 2 and v.shape[1] % 2 == 0):
        size = value.shape[-1]
        form = w.choose(("torch.mm({x}, {m}.t())", "torch.addmm({b}, {x}, {m}.t())", "{x}.mm({m}.t())"))
        bias = w.find_parameter((WIDTH,)) if "{b}" in form else ""
        w.put(form.format(x=value.name, m=read_matrix(w, WIDTH, size), b=bias), (value.shape[0], WIDTH))


@step
def multiply_batches(w: Writer):
    if value := w.pick(lambda v: len(v.shape) == 3 and v.shape[-1] > 1):
        batch, _, size = value.shape
        expression, shape = w.choose(
            (
                ("{p}", (batch, size, WIDTH)),
                ("{p}.mT", (batch, WIDTH, size)),
                ("{p}.transpose(1, 2)", (batch, WIDTH, size)),
                ("{p}.permute(0, 2, 1)", (batch, WIDTH, size)),
                ("{p}.permute(1, 2, 0)", (WIDTH, batch, size)),
                (f"{{p}}.expand({batch}, {size}, {WIDTH})", (size, WIDTH)),
                (f"{{p}}.unsqueeze(0).expand({batch}, -1, -1)", (size, WIDTH)),
                (f"{{p}}.t().expand({batch}, {size}, {WIDTH})", (WIDTH, size)),
                (f"{{p}}.repeat({batch}, 1, 1)", (size, WIDTH)),
                (f"{{p}}.view({batch}, {size}, {WIDTH})", (batch * size, WIDTH)),
                (f"{{p}}.reshape({batch}, {WIDTH}, {size}).mT", (batch * WIDTH * size,)),
            )
        )
        form = w.choose(("torch.bmm({x}, {m})", "{x} @ {m}", "torch.baddbmm({b}, {x}, {m})"))
        bias = w.find_parameter((WIDTH,)) if "{b}" in form else ""
        matrix = expression.format(p=w.find_parameter(shape))
        w.put(form.format(x=value.name, m=matrix, b=bias), (*value.shape[:-1], WIDTH))


@step
def multiply_from_the_left(w: Writer):
    if value := w.pick(lambda v: len(v.shape) >= 3 and v.shape[-2] % 2 == 0):
        out = w.choose((6, 4))
        matrix = read_matrix(w, out, value.shape[-2])
        form = w.choose(("{m} @ {x}", "torch.matmul({m}, {x})"))
        w.put(form.format(x=value.name, m=matrix), (*value.shape[:-2], out, value.shape[-1]))


# Products of activations.


@step
def multiply_values(w: Writer):
    if left := w.pick(lambda v: len(v.shape) == 3):

        def fits(value):
            return len(value.shape) == 3 and value.shape[0] == left.shape[0] and value.shape[-1] == left.shape[-1]

        right = w.pick(fits)
        form = w.choose(
            ("{x} @ {y}.transpose(1, 2)", "torch.bmm({x}, {y}.mT)", "torch.matmul({x}, {y}.transpose(-1, -2))")
        )
        w.put(f"({form.format(x=left.name, y=right.name)}).tanh()", (left.shape[0], left.shape[1], right.shape[1]))


@step
def call_linear_of_data(w: Writer):
    if left := w.pick(is_matrix):
        right = w.pick(lambda v: len(v.shape) == 3 and v.shape[-1] == left.shape[-1])
        if right:
            w.put(f"F.linear({left.name}, {right.name}[0]).tanh()", (*left.shape[:-1], right.shape[1]))


# Element by element.


@step
def apply(w: Writer):
    value = w.pick()
    forms = [
        "F.relu({x})",
        "torch.tanh({x})",
        "F.gelu({x})",
        "{x} * 1.5",
        "{x} - 0.5",
        "{x}.clone()",
        "F.dropout({x}, 0.5, False)",
    ]
    forms += ["{x}.softmax(-1)", "F.layer_norm({x}, {s})", "{x}.contiguous()", "{x}.to(torch.float64)"]
    form = w.choose(forms)
    # What may pass on a value that is not writable is not, either.
    is_writable = value.is_writable or form not in (
        "F.dropout({x}, 0.5, False)",
        "{x}.contiguous()",
        "{x}.to(torch.float64)",
    )
    w.put(form.format(x=value.name, s=value.shape[-1:]), value.shape, is_writable)


@step
def call_norm(w: Writer):
    if value := w.pick(is_matrix):
        layer = w.layer("norm", value.shape[-1:], f"nn.LayerNorm({value.shape[-1]})")
        w.put(f"{layer}({value.name})", value.shape)


@step
def combine(w: Writer):
    left = w.pick()
    right = w.pick(lambda v: v.shape == left.shape)
    form = w.choose(
        ("{x} + {y}", "torch.add({x}, {y})", "{x} * {y}.tanh()", "{x}.sub({y})", "torch.where({x} > 0, {x}, {y})")
    )
    w.put(form.format(x=left.name, y=right.name), left.shape)


@step
def join(w: Writer):
    left = w.pick(lambda v: math.prod(v.shape) <= MAX_ELEMENTS // 2)
    if left and left.shape[-1] <= 2 * WIDTH:
        right = w.pick(lambda v: v.shape == left.shape)
        w.put(f"torch.cat([{left.name}, {right.name}], -1)", (*left.shape[:-1], 2 * left.shape[-1]))


# Views.


@step
def view(w: Writer):
    value = w.pick()
    x, s = value.name, value.shape
    last = s[-1]
    forms = [(f"{x}.view({s[0]}, -1)", (s[0], math.prod(s[1:])))] if value.is_writable else []
    forms = [(f"{x}.reshape({s[0]}, -1)", (s[0], math.prod(s[1:])))]
    forms += [(f"{x}.flatten(0, 1)", (s[0] * s[1], *s[2:]))] if len(s) > 2 else []
    forms += [(f"{x}.transpose(-1, -2)", (*s[:-2], last, s[-2]))]
    forms += [(f"{x}[:, 0]", (s[0], *s[2:]))] if len(s) > 2 else []
    forms += [(f"{x}[..., :{last // 2}]", (*s[:-1], last // 2))] if last > 3 else []
    forms += [(f"{x}.chunk(2, -1)[1]", (*s[:-1], last // 2))] if last > 3 and last % 2 == 0 else []
    forms += [(f"torch.split({x}, {last // 2}, -1)[0]", (*s[:-1], last // 2))] if last > 3 and last % 2 == 0 else []
    forms += [(f"{x}.unbind(1)[0]", (s[0], *s[2:]))] if len(s) > 2 else []
    forms += (
        [(f"{x}.reshape({s[0]}, 2, {s[1] // 2}, {last})", (s[0], 2, s[1] // 2, last))]
        if len(s) == 3 and s[1] % 2 == 0
        else []
    )
    forms += [(f"{x}.permute(0, 2, 1)", (s[0], s[2], s[1]))] if len(s) == 3 else []
    forms += [(f"{x}.unsqueeze(1)", (s[0], 1, *s[1:])), (f"{x}[:, None]", (s[0], 1, *s[1:]))] if len(s) < 4 else []
    forms += [(f"{x}.narrow(0, 0, 2)", (2, *s[1:]))] if s[0] > 2 else []
    forms += [(f"{x}.mean(1)", (s[0], *s[2:]))] if len(s) > 2 else []
    forms += [(f"{x}.detach()", s), (f"{x}.view_as({x})", s), (f"self.identity({x})", s)]
    expression, shape = w.choose(forms)
    w.put(expression, shape, value.is_writable)


@step
def expand(w: Writer):
    if value := w.pick(lambda v: v.shape[1] == 1 or (len(v.shape) == 3 and math.prod(v.shape) <= MAX_ELEMENTS // 2)):
        if value.shape[1] == 1:
            w.put(f"{value.name}.expand(-1, 2, *{value.shape[2:]})", (value.shape[0], 2, *value.shape[2:]), False)
        else:
            w.put(f"{value.name}[:, None].expand(-1, 2, -1, -1)", (value.shape[0], 2, *value.shape[1:]), False)


# Writes.

WRITES = (
    "{x}.relu_()",
    "{x}.add_(1)",
    "{x}.mul_(3)",
    "{x}[:, 0].add_(5)",
    "{x}[..., 0].mul_(2)",
    "{x}.transpose(0, 1)[0].fill_(-3.0)",
    "{x}.chunk(2, -1)[0].relu_()",
    "{x}.detach().mul_(2)",
    "F.relu({x}, inplace=True)",
    "F.relu_({x})",
    "torch.add({x}, 3, out={x})",
    "{x}.clamp_(-1, 1)",
    "{x}.masked_fill_({x} > 1, -3.0)",
    "self.inplace({x})",
    "F.hardtanh({x}, -2, 2, True)",
    "{x}.zero_()",
    "{x}.unbind(1)[0].copy_({x}.unbind(1)[0] * 4)",
    "torch.relu_({x})",
    "{x}.index_fill_(1, torch.tensor([0]), 2.0)",
)
STATEMENTS = (
    "{x}[:, 0] = 7.0",
    "{x}[..., 0] += 2",
    "{x} += 1.5",
    "{x}[{x} > 1] = -2.0",
    "{x}[0] = {x}[1] * 2",
    "{x} *= 2",
)


@step
def write(w: Writer):
    if value := w.pick(lambda v: v.is_writable and len(v.shape) > 1):
        form = w.choose(WRITES if w.front_end == "symbolic_trace" else (*WRITES, *STATEMENTS))
        line = form.format(x=value.name)
        if form in WRITES and w.draw(st.booleans()) and "[" not in form and "chunk" not in form and "out=" not in form:
            w.put(line, value.shape)
        else:
            w.lines.append(line)


@step
def write_of_another(w: Writer):
    if value := w.pick(lambda v: v.is_writable):
        other = w.pick(lambda v: v.shape == value.shape)
        forms = ("{x}.add_({y})", "{x}.copy_({y})", "torch.add({x}, {y}, out={x})")
        form = w.choose(
            forms if w.front_end == "symbolic_trace" else (*forms, "{x} += {y}", "{x}[:, 0] = {y}[:, 0] * 2")
        )
        w.lines.append(form.format(x=value.name, y=f"{other.name}.tanh()"))


@step
def write_buffer(w: Writer):
    if value := w.pick():
        known = [name for name, shape in w.buffers.items() if shape == value.shape]
        name = w.choose([*known, None])
        if name is None:
            name = f"self.{w.name('b')}"
            w.init.append(f"self.register_buffer({name[5:]!r}, torch.zeros{value.shape})")
            w.buffers[name] = value.shape
        forms = ("{b}.copy_({x})", "{b}.add_({x})")
        form = w.choose(forms if w.front_end == "symbolic_trace" else (*forms, "{b}[:] = {x}", "{b}[:, 0] = {x}[:, 0]"))
        if (
            w.front_end == "symbolic_trace"
        ):  # what symbolic_trace reads of a buffer by itself is what it holds while it traces
            w.put(form.format(b=name, x=value.name), value.shape)
            return
        w.lines.append(form.format(b=name, x=value.name))
        if w.draw(st.booleans()):
            w.put(name, value.shape)


@st.composite
def programs(draw, front_end: str, max_steps: int = 9) -> Program:
    """Programs of a few steps, without what a front end is known not to see."""
    writer = Writer(draw, front_end)
    for _ in range(draw(st.integers(1, max_steps))):
        writer.choose(STEPS)(writer)
        if math.prod(writer.pool[-1].shape) > MAX_ELEMENTS:
            writer.pool.pop()
    if not any(key in line for line in writer.lines for key in ("fc", "conv", "linear", "@", "matmul")):
        call_linear(writer)
    lines = list(writer.lines)
    if lines and draw(st.integers(0, 3)) == 3:
        start = draw(st.integers(0, len(lines) - 1))
        end = draw(st.integers(start + 1, len(lines)))
        region = ["with torch.no_grad():", *(f"    {line}" for line in lines[start:end])]
        lines = [*lines[:start], *region, *lines[end:]]
    outputs = [value.name for value in writer.pool[-3:]]
    return Program(tuple(writer.init), tuple(lines), tuple(outputs))
