"""Replaces probes by fake-quantize nodes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from torch import Tensor
from torch.fx import GraphModule, Node

from fxmse.capture.attributes import find_owner, make_container
from fxmse.observers.base import QPARAMS
from fxmse.observers.inputs import Mean
from fxmse.observers.states import hold
from fxmse.ops import DYNAMIC_FAKE_QUANTIZE, FAKE_QUANTIZE
from fxmse.passes.all_experts import remove_all_experts
from fxmse.passes.base import GraphPass
from fxmse.passes.bias_correction import correct_biases
from fxmse.passes.close_regions import CloseRegions
from fxmse.passes.finishing import finish_weights
from fxmse.passes.probe import Probe, find_inputs, find_probes

__all__ = ["SITES_KEY", "FoldFakeQuant", "Qparams", "make_call", "replace_probes"]

SITES_KEY = "fxmse_sites"
"""Where a fake-quantize node's ``meta`` has the names of its sites; the first is what its buffers are called after."""


Qparams: TypeAlias = Mapping[str, Tensor | None]
"""Scale, zero point and global scale by these names, None where there is none."""


@dataclass(frozen=True)
class FoldFakeQuant(GraphPass):
    """Replaces each probe by a fake-quantize node with what its observer found.

    Rules:

    1. Weights are observed first: those that never were, those whose observer waited for their
       inputs, and those that share a global scale with others.
    2. Scale, zero point (where the format is asymmetric) and global scale (where there is one) become buffers of
       the module that the value belongs to, under compressed-tensors' names: ``fc.weight_scale``,
       ``fc.input_zero_point``, ``fc.weight_global_scale``. A value that several modules read has one set of them,
       under the first module's name.
    3. A dynamic value's node finds its scales itself, and has no buffer but a global scale.
    4. The probes are removed, and nothing of them is left in the state dict.
    5. A graph without probes is left alone.
    6. In branches and loops it is the same. They get qparams and quantized weights as operands (:class:`CloseRegions`).
    7. A bias for which the mean of its layer's inputs was kept is corrected
       (:func:`fxmse.passes.bias_correction.correct_biases`): a new parameter of the graph, under the old name.

    Raises:
        ValueError: an observer has seen nothing, or NaN or Inf; all such sites are named and nothing is changed.
    """

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Applies the rules."""
        modified = replace_probes(graph_module, _replace)  # rule 5
        CloseRegions()(graph_module)  # rule 6
        return modified


def replace_probes(graph_module: GraphModule, replace: Callable[[GraphModule, Node, Probe, Qparams], Node]) -> bool:
    """Puts something else in the place of each probe, and takes out all that looks at values.

    Args:
        graph_module: a calibrated graph.
        replace: called with the graph that a probe is in, its node, the probe, and what it has found; takes the node
            out and gives the one that is in its place.

    Returns:
        Whether there were probes.

    Raises:
        ValueError: as :class:`FoldFakeQuant`.
    """
    probes = list(find_probes(graph_module))
    all_inputs = list(find_inputs(graph_module))
    means = [(node, inputs) for node, inputs in all_inputs if isinstance(inputs, Mean)]
    unseen = [probe.name for _, probe in probes if not probe.has_statistics and not probe.is_weight]
    unseen += [str(node.target) for node, mean in means if not mean.has_seen]
    if unseen:
        raise ValueError(
            f"nothing was seen by {'; '.join(dict.fromkeys(unseen))}: run calibration data through the observed "
            "graph first (fxmse.calibrate)"
        )
    with hold([*(probe.lock for _, probe in probes), *(inputs.lock for _, inputs in all_inputs)]):
        finish_weights(graph_module)  # rule 1
        qparams = {
            probe: {name: None if tensor is None else tensor.clone() for name, tensor in _get_qparams(probe).items()}
            for _, probe in probes
        }
    observers = dict.fromkeys((find_owner(node), str(node.target)) for node, _ in (*probes, *all_inputs))
    for node, _ in all_inputs:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        node.graph.erase_node(node)
    replaced = {str(node.target): replace(find_owner(node), node, probe, qparams[probe]) for node, probe in probes}
    correct_biases(means, replaced)  # rule 7
    for owner, target in observers:  # rule 4
        owner.delete_submodule(target)
    remove_all_experts(graph_module)
    return bool(probes)


def _get_qparams(probe: Probe) -> dict[str, Tensor | None]:
    if probe.given is not None:
        return probe.given
    if probe.observer is None:
        return dict.fromkeys(QPARAMS)
    try:
        qparams = probe.observer.get_qparams()
    except ValueError as error:
        raise ValueError(f"{probe.name}: {error}") from None
    if probe.observer.args.symmetric:
        qparams["zero_point"] = None
    return qparams


def _replace(graph_module: GraphModule, node: Node, probe: Probe, qparams: Qparams) -> Node:
    """Rules 2 and 3; the fake-quantize node."""
    graph, site = graph_module.graph, probe.sites[0]
    container = make_container(graph_module, site.module)
    parameters: dict[str, Node | None] = {}
    with graph.inserting_before(node):
        for name, tensor in qparams.items():
            buffer = f"{site.prefix}{site.role}_{name}"
            if tensor is not None:
                container.register_buffer(buffer, tensor)
            target = f"{site.module}.{buffer}".lstrip(".")
            parameters[name] = None if tensor is None else graph.get_attr(target)
        op, arguments = make_call(site.args, parameters)
        name = f"{site.name}_fake_quant".replace(".", "_")
        folded = graph.create_node("call_function", op, (node.args[0], *arguments), name=name)
    folded.meta = {**node.meta, SITES_KEY: tuple(site.name for site in probe.sites)}
    node.replace_all_uses_with(folded)
    graph.erase_node(node)
    return folded


def make_call(args: QuantizationArgs, qparams: Mapping[str, Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The op that quantizes a value of a format, and what it is called with behind the value.

    Args:
        args: the format.
        qparams: by the names of :data:`Qparams`, tensors or nodes that give them.
    """
    grid = (args.num_bits, QuantizationType(args.type).value)
    arguments: tuple[Any, ...]
    if args.dynamic:
        arguments = (qparams["global_scale"], *grid, args.symmetric, args.strategy)
        if args.group_size:
            arguments += (args.group_size,) if args.scale_dtype is None else (args.group_size, args.scale_dtype)
        return DYNAMIC_FAKE_QUANTIZE, arguments
    arguments = (*(qparams[name] for name in QPARAMS), *grid, args.strategy)
    if args.block_structure:
        arguments += (None, args.block_structure)
    elif args.strategy in ("group", "tensor_group"):
        arguments += (args.group_size,)
    return FAKE_QUANTIZE, arguments
