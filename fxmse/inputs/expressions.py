"""Sizes and guards of a program: arithmetic, which torch evaluates as Python code."""

import ast
import functools
import re
import warnings

__all__ = ["SYMBOL", "check_expression"]

_MAX_LENGTH = 2**14
_MAX_DEPTH = 128
_MAX_POWER = 64
"""Of all powers around a value together, so that no number is of more than 2 ** 13 bits."""
_MAX_PRECISION = 64

SYMBOL = re.compile(r"[a-z]{1,4}[0-9]{1,5}")
"""s77, u0, zuf1; torch counts up to the number."""

_KEY = re.compile(r"[\w .-]{0,99}")
# Of few digits: sympy reads them itself, and takes 10 to the power that stands there.
_NUMBER = re.compile(r"-?[0-9]{1,20}(\.[0-9]{0,40})?([eE][+-]?[0-9]{1,3})?")
# sympy's own, as srepr writes them, and those of torch.utils._sympy.functions that torch.export can load.
_FUNCTIONS = {
    *("Add", "Mul", "Max", "Min", "Abs", "floor", "ceiling", "Integer", "Rational", "And", "Or", "Not", "Identity"),
    *("Eq", "Ne", "Le", "Lt", "Ge", "Gt", "Equality", "Unequality", "LessThan", "StrictLessThan", "GreaterThan"),
    *("StrictGreaterThan", "FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv", "CeilDiv"),
    *("CeilToInt", "FloorToInt", "TruncToInt", "RoundToInt", "ToFloat", "TruncToFloat", "FloatTrueDiv", "IntTrueDiv"),
    "IsNonOverlappingAndDenseIndicator",
}
# torch.utils._sympy.printers.PythonPrinter's, which guards are written by.
_GUARD_FUNCTIONS = {
    *(*_FUNCTIONS, "max", "min", "abs", "int", "float", "round", "torch.sym_float", "torch.sym_ite", "torch.sym_int"),
    *("torch.sym_max", "torch.sym_min", "torch.sym_not", "torch._sym_sqrt"),
    *(f"math.{name}" for name in ("trunc", "floor", "ceil", "sqrt", "fabs", "isnan")),
}
_KEYWORDS = {"integer", "positive", "nonnegative", "nonzero", "negative", "real", "precision"}
_NAMES = {"true", "false", "oo", "inf", "int_oo"}
_OPERATORS = (
    *(ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.UAdd, ast.USub),
    *(ast.Not, ast.And, ast.Or, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE),
)


@functools.lru_cache(2**12)
def check_expression(text: str, *, is_guard: bool = False) -> str:
    """``text``, if it is arithmetic: of symbols, or of the sizes of inputs.

    The grammar: integers, floats, ``+ - * / // % **``, comparisons, ``and or not``, functions of a fixed list, and
    symbols (``s77``, or ``Symbol('s77', positive=True)``); in a guard, ``L['x'].size()[0]`` in place of symbols. Powers
    are of literal exponents, and small, so that no number takes long.

    Raises:
        ValueError: anything else.
    """
    try:
        if len(text) > _MAX_LENGTH or not text.isprintable():
            raise _NotArithmeticError
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Python would find odd in it
            tree = ast.parse(text, mode="eval")
        _Checker(text, is_guard).check(tree.body)
    except (_NotArithmeticError, SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{text[:100]!r} is no arithmetic of sizes") from None
    return text


class _NotArithmeticError(Exception):
    pass


class _Checker:
    """Walks an expression; ``power`` is the product of the exponents around a part."""

    def __init__(self, text: str, is_guard: bool) -> None:
        self._source = text.encode()
        self._is_guard = is_guard
        self._functions = _GUARD_FUNCTIONS if is_guard else _FUNCTIONS

    def check(self, node: ast.expr, power: int = 1, depth: int = 0) -> None:
        """Raises _NotArithmeticError for what is not in the grammar."""
        if power > _MAX_POWER or depth > _MAX_DEPTH:
            raise _NotArithmeticError
        if self._is_number(node) or (_is_input(node) if self._is_guard else _is_symbol(node)):
            return
        parts, exponent = self._take_apart(node)
        for part in parts:
            self.check(part, power * exponent, depth + 1)

    def _is_number(self, node: ast.expr) -> bool:
        match node:
            case ast.Constant(value=bool()):
                return True
            case ast.Constant(value=int() | float()):
                return bool(_NUMBER.fullmatch(self._source[node.col_offset : node.end_col_offset].decode()))
            case ast.Name(id=name):
                return name in _NAMES
        return False

    def _take_apart(self, node: ast.expr) -> tuple[list[ast.expr], int]:
        """What an operator or a function is of, and the exponent if it is a power."""
        match node:
            case ast.BinOp(op=ast.Pow(), left=base, right=exponent):
                return [base], _read_exponent(exponent)
            case ast.BinOp(op=op, left=left, right=right) if isinstance(op, _OPERATORS):
                return [left, right], 1
            case ast.UnaryOp(op=op, operand=operand) if isinstance(op, _OPERATORS):
                return [operand], 1
            case ast.BoolOp(values=values):
                return values, 1
            case ast.Compare(left=left, ops=ops, comparators=others) if all(isinstance(op, _OPERATORS) for op in ops):
                return [left, *others], 1
            case ast.Call(func=ast.Name(id="Pow" | "PowByNatural" | "FloatPow"), args=[base, exponent], keywords=[]):
                return [base], _read_exponent(exponent)
            case ast.Call(func=ast.Name() | ast.Attribute(value=ast.Name()) as name, args=args, keywords=[]):
                if ast.unparse(name) in self._functions:
                    return args, 1
        raise _NotArithmeticError


def _is_symbol(node: ast.expr) -> bool:
    """``s77``, ``Symbol('s77', positive=True)`` and ``Float('0.5', precision=53)``, which srepr writes alike."""
    match node:
        case ast.Name(id=name):
            return bool(SYMBOL.fullmatch(name))
        case ast.Call(
            func=ast.Name(id="Symbol" | "Float" as kind), args=[ast.Constant(value=str(text))], keywords=more
        ):
            return bool((SYMBOL if kind == "Symbol" else _NUMBER).fullmatch(text)) and all(map(_is_assumption, more))
    return False


def _is_assumption(keyword: ast.keyword) -> bool:
    value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
    return keyword.arg in _KEYWORDS and isinstance(value, int) and 0 <= value <= _MAX_PRECISION


def _read_exponent(node: ast.expr) -> int:
    """An exponent's magnitude, at least 1: a literal, or a literal integer or rational of sympy's."""
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _read_exponent(operand)
        case ast.Call(func=ast.Name(id="Integer" | "Rational"), args=[first, *rest], keywords=[]):
            return max(_read_exponent(part) for part in [first, *rest])
        case ast.Call(func=ast.Name(id="Float"), args=[ast.Constant(value=str(text))]) if _NUMBER.fullmatch(text):
            return _bound(float(text))
        case ast.Constant(value=int() | float() as value):
            return _bound(value)
    raise _NotArithmeticError


def _bound(exponent: float) -> int:
    if not -_MAX_POWER <= exponent <= _MAX_POWER:
        raise _NotArithmeticError
    return max(1, int(abs(exponent)))


def _is_input(node: ast.expr) -> bool:
    """``L['x']``, what is in it, and their sizes: ``L['x']['y'][0].size()[1]``."""
    match node:
        case ast.Name(id=name):
            return name == "L"
        case ast.Subscript(value=value, slice=ast.Constant(value=key)):
            return bool(isinstance(key, int) or _KEY.fullmatch(str(key))) and _is_input(value)
        case ast.Call(func=ast.Attribute(attr="size" | "stride" | "storage_offset", value=value), args=[], keywords=[]):
            return _is_input(value)
    return False
