"""Replaces probes by fake-quantize nodes."""

from dataclasses import dataclass

from compressed_tensors.quantization import QuantizationStrategy, QuantizationType
from torch import Tensor
from torch.fx import GraphModule, Node

from fxmse.config import Site
from fxmse.ops import FAKE_QUANTIZE
from fxmse.passes.base import GraphPass, make_container
from fxmse.passes.probe import find_probes

__all__ = ["FoldFakeQuant"]


@dataclass(frozen=True)
class FoldFakeQuant(GraphPass):
    """Replaces each probe by a fake-quantize node with what its observer found.

    Rules:

    1. Scale, zero point (where the format is asymmetric) and global scale (where there is one) become buffers of
       the module that the value belongs to, under compressed-tensors' names: ``fc.weight_scale``,
       ``fc.input_zero_point``, ``fc.weight_global_scale``. A value that several modules read has one set of them,
       under the first module's name.
    2. The probes are removed, and nothing of them is left in the state dict.
    3. A graph without probes is left alone.

    Raises:
        ValueError: an observer has seen nothing, or NaN or Inf; all such sites are named and nothing is changed.
    """

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Applies the rules."""
        probes = list(find_probes(graph_module))
        unseen = [probe.name for _, probe in probes if not probe.observer.has_statistics]
        if unseen:
            raise ValueError(
                f"nothing was seen by {'; '.join(dict.fromkeys(unseen))}: run calibration data through the observed "
                "graph first (fxmse.calibrate)"
            )
        qparams = {}
        for node, probe in probes:
            try:
                qparams[node] = probe.observer.get_qparams()
            except ValueError as error:
                raise ValueError(f"{probe.name}: {error}") from None
        for node, probe in probes:
            _replace(graph_module, node, probe.sites[0], qparams[node])
        for target in dict.fromkeys(str(node.target) for node, _ in probes):
            graph_module.delete_submodule(target)
        return bool(probes)


def _replace(graph_module: GraphModule, node: Node, site: Site, qparams: dict[str, Tensor | None]) -> None:
    graph, args = graph_module.graph, site.args
    kept = dict(qparams)
    if args.symmetric:
        kept["zero_point"] = None
    container = make_container(graph_module, site.module)
    parameters: dict[str, Node | None] = {}
    with graph.inserting_before(node):
        for name, tensor in kept.items():
            buffer = f"{site.prefix}{site.role}_{name}"
            if tensor is not None:
                container.register_buffer(buffer, tensor.clone())
            target = f"{site.module}.{buffer}".lstrip(".")
            parameters[name] = None if tensor is None else graph.get_attr(target)
        arguments: tuple = (
            node.args[0],
            parameters["scale"],
            parameters["zero_point"],
            parameters["global_scale"],
            args.num_bits,
            QuantizationType(args.type).value,
            QuantizationStrategy(args.strategy).value,
        )
        if args.block_structure:
            arguments += (None, args.block_structure)
        elif args.strategy in ("group", "tensor_group"):
            arguments += (args.group_size,)
        name = f"{site.name}_fake_quant".replace(".", "_")
        folded = graph.create_node("call_function", FAKE_QUANTIZE, arguments, name=name)
    folded.meta = dict(node.meta)
    node.replace_all_uses_with(folded)
    graph.erase_node(node)
