"""The JSON of a program, of which torch makes graphs, and of graphs Python source: only names and arithmetic pass."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxmse.inputs.expressions import SYMBOL, check_expression
from fxmse.reading import quote

__all__ = ["ATTRIBUTE", "clean_program"]

ATTRIBUTE = re.compile(r"(?!__)[\w /:+-]*(@\d+)?(\.(?!__)[\w /:+-]*(@\d+)?)*")
"""A dotted path of attributes. Source has them in double quotes, and assigning to ``__class__`` changes torch."""

_NAME = re.compile(r"([^\W\d]\w*)?")
# Constants among the inputs, which guards have in single quotes.
_PLAIN = re.compile(r"[^'\"\\\x00-\x1f\x7f]*")
_TREE_STRING = re.compile(r"[\w ./-]*")
_CALL = re.compile(r"[\w.@'\[\] <>-]*,(?P<path>[^,;]*),[\w.<>\[\], -]*")
_TORCH_VERSION = re.compile(r"[\w.+-]*")
_FLOATS = ("Infinity", "-Infinity", "NaN")

# Under these, keys are names that the program has chosen; elsewhere they are fields of torch's schema.
_MAPPINGS = {
    *("tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values", "range_constraints"),
    *("opset_version", "treespec_namedtuple_fields", "as_string_to_argument"),
}
_METADATA = "nn_module_stack"
"""What nodes keep beside what they compute. All else that torch writes is for people, such as stack traces."""

_NAMESPACES = {"aten", "prims", "fxmse", "quantized_decomposed", "torchvision", "transformers"}
_HIGHER_ORDER = {
    *("cond", "while_loop", "scan", "map_impl", "associative_scan", "invoke_subgraph", "out_dtype", "flex_attention"),
    *("wrap_with_set_grad_enabled", "wrap_with_autocast", "tag_activation_checkpoint", "hints_wrapper", "strict_mode"),
    *("auto_functionalized", "auto_functionalized_v2"),
}
_SYMBOLIC = {
    "_operator": (
        *("eq", "ne", "le", "ge", "lt", "gt", "neg", "pos", "mul", "add", "sub", "floordiv", "mod", "pow", "truediv"),
        *("and_", "or_", "lshift", "rshift", "getitem"),
    ),
    "torch": ("sym_not", "sym_int", "sym_float", "sym_ite", "sym_max", "sym_min", "sym_sqrt", "_sym_sqrt"),
    "math": ("trunc", "floor", "ceil"),
}
_SYMBOLIC_OPERATORS = {f"{module}.{name}" for module, names in _SYMBOLIC.items() for name in names}
_OPERATOR = re.compile(r"torch\.ops\.(\w+)\.(\w+)(?:\.(\w+))?")
_OPERATOR_KEYS = ("target", "as_operator")
# Objects whose classes say how they are made.
_OBJECT_KEYS = ("as_custom_obj", "custom_obj", "custom_obj_values", "class_fqn")


def clean_program(content: bytes) -> bytes:
    """A program's JSON with nothing in it but what was checked.

    Rules:

    1. Operators are those of fixed lists; of a namespace, those that read and write no file.
    2. Sizes and guards are arithmetic (:func:`fxmse.inputs.expressions.check_expression`).
    3. Trees of inputs and outputs are of types that are registered, and import none.
    4. Names are Python's identifiers, and paths of attributes have no quotes in them: both stand in source.
    5. Of metadata only the modules that a node was traced from are kept; the rest is for people.
    6. Arguments of operators may be any string: source has them by ``repr``.
    7. What is not known here is refused if it is more than names and numbers.

    Raises:
        ValueError: what is against them, or no JSON object.
    """
    try:
        program = json.loads(content)
        if not isinstance(program, dict):
            raise ValueError(f"a {type(program).__name__} as a program: expected an object")
        return json.dumps(_clean_fields(program, False)).encode()
    except RecursionError:
        raise ValueError("values that are nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"no JSON: {error}") from None


def _clean_fields(fields: Mapping[str, Any], is_in_node: bool) -> dict[str, Any]:
    cleaned = {}
    for key, value in fields.items():
        _match(ATTRIBUTE, key, "field")
        if key in _OBJECT_KEYS and value:
            raise ValueError(f"an object of a class of its own ({key}: {quote(value)}): expected tensors alone")
        if key == "metadata" and isinstance(value, dict):
            cleaned[key] = _clean_metadata(value)  # Rule 5.
        elif key in _MAPPINGS and isinstance(value, dict):
            pattern = SYMBOL if key == "range_constraints" else ATTRIBUTE
            cleaned[key] = {_match(pattern, name, "name"): _clean(item, "", is_in_node) for name, item in value.items()}
        else:
            cleaned[key] = _clean(value, key, key == "nodes" or (is_in_node and key != "graph"))
    return cleaned


def _clean(value: Any, key: str, is_in_node: bool) -> Any:
    if isinstance(value, dict):
        return _clean_fields(value, is_in_node)
    if isinstance(value, list):
        return [_clean(item, key, is_in_node) for item in value]
    if isinstance(value, str):
        if is_in_node and key in ("as_string", "as_strings"):
            return value  # Rule 6.
        return _STRINGS.get(key, _check_name)(value)
    return value


def _clean_metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    stack = metadata.get(_METADATA)
    if not stack:
        return {}
    calls = stack.split(";") if isinstance(stack, str) else []
    for call in calls:
        found = _CALL.fullmatch(call)
        if not found or not ATTRIBUTE.fullmatch(found["path"]):
            raise ValueError(f"{quote(call)} as a call of a module")
    return {_METADATA: ";".join(calls)}


def _match(pattern: re.Pattern[str], text: str, what: str) -> str:
    if not pattern.fullmatch(text):
        raise ValueError(f"{quote(text)} as a {what}")
    return text


def _check_name(text: str) -> str:
    """Rules 4 and 7."""
    return _match(_NAME, text, "name")


def _check_float(text: str) -> str:
    if text not in _FLOATS:
        raise ValueError(f"{quote(text)} as a number")
    return text


def _check_operator(text: str) -> str:
    """Rule 1."""
    if text in _SYMBOLIC_OPERATORS:
        return text
    found = _OPERATOR.fullmatch(text)
    if found and found[1] == "higher_order" and found[2] in _HIGHER_ORDER and not found[3]:
        return text
    if not found or found[1] not in _NAMESPACES or not found[3]:
        raise ValueError(f"the operator {quote(text)}, which is none of torch's that compute")
    packet = getattr(getattr(torch.ops, found[1]), found[2], None)
    operator = getattr(packet, found[3], None)
    if not isinstance(operator, torch._ops.OpOverload):
        raise ValueError(f"the operator {quote(text)}, which is not known here: import what defines it")
    if any(argument.name == "filename" for argument in operator._schema.arguments):
        raise ValueError(f"the operator {quote(text)}, which reads or writes a file")
    return text


def _check_tree(text: str) -> str:
    """Rule 3."""
    try:
        _, tree = json.loads(text)
        _check_node(tree)
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{quote(text)} as a tree of inputs or outputs") from None
    return text


def _check_node(node: Mapping[str, Any]) -> None:
    kind, context = node["type"], node["context"]
    if kind == "collections.namedtuple":
        _match(ATTRIBUTE, context, "type")
    elif kind is not None:
        # A defaultdict's context names a function to import, an enumeration's a class.
        registered = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(kind)
        if registered is None or pytree.SUPPORTED_SERIALIZED_TYPES[registered].from_dumpable_context is not None:
            raise ValueError(
                f"inputs or outputs in a {quote(kind)}, which is not registered here: import what defines it"
            )
        _check_context(json.loads(context))
    elif context is not None:
        raise ValueError(f"{quote(context)} as the context of a leaf")
    for child in node["children_spec"]:
        _check_node(child)


def _check_context(context: Any) -> None:
    """Keys of inputs are parameters' names in source, and strings in guards."""
    if isinstance(context, list):
        for item in context:
            _check_context(item)
    elif isinstance(context, str):
        _match(_TREE_STRING, context, "key")
    elif not isinstance(context, int | float | None):
        raise ValueError(f"{quote(context)} as the context of a tree")


_STRINGS: dict[str, Callable[[str], str]] = {
    **dict.fromkeys(_OPERATOR_KEYS, _check_operator),
    "expr_str": check_expression,  # Rule 2.
    "guards_code": lambda text: check_expression(text, is_guard=True),
    **dict.fromkeys(("in_spec", "out_spec"), _check_tree),
    **dict.fromkeys(("as_float", "as_floats", "as_float_lists", "real", "imag"), _check_float),
    **dict.fromkeys(("as_string", "as_strings"), lambda text: _match(_PLAIN, text, "constant")),
    **dict.fromkeys(
        ("parameter_name", "buffer_name", "tensor_constant_name", "user_input_name", "fqn"),
        lambda text: _match(ATTRIBUTE, text, "path of an attribute"),
    ),
    "torch_version": lambda text: _match(_TORCH_VERSION, text, "version"),
}
"""What strings may be, by the fields they stand in; names elsewhere."""
