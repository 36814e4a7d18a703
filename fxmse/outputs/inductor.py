"""Quantization as a pass of Inductor's, for those who own the pipeline."""

import functools
import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, GraphModule

from fxmse.capture.lifted import bind_parameters, find_lifted
from fxmse.config import Config, NothingMatchedError, resolve_config
from fxmse.observers.base import QPARAMS
from fxmse.passes import FoldFakeQuant, InlineRegions, InsertObservers
from fxmse.passes.probe import find_probes

__all__ = ["FakeQuantizePass"]

_WHOLE_KEY = "dynamo_flat_name_to_original_fqn"  # what Dynamo notes of whole graphs alone


class FakeQuantizePass(CustomGraphPass):
    """Puts fake-quantize nodes with known qparams into the graphs that Inductor compiles.

    ::

        fake_quantize = FakeQuantizePass(config, calibration.qparams)
        with torch._inductor.config.patch(pre_grad_custom_pass=fake_quantize):
            quantized = torch.compile(model)
            quantized(batch)

    A graph that the config matches nothing of stays as it is.

    Args:
        config: as :func:`fxmse.prepare` takes it.
        qparams: scales, zero points and global scales by compressed-tensors' names, ``fc.weight_scale``: those of a
            :class:`fxmse.Calibration`, or of a folded graph's state dict. A value that several modules read has them
            under the first one's name.

    Raises:
        ValueError: while a graph is compiled, values of it that have no qparams (all are named).
    """

    def __init__(self, config: Config, qparams: Mapping[str, Tensor]) -> None:
        self._config = resolve_config(config)
        self._qparams = {name: tensor.detach() for name, tensor in qparams.items()}

    @torch.no_grad()
    def __call__(self, graph: Graph) -> None:
        """Changes a graph as Dynamo made it, in place: what ``torch._inductor.config.pre_grad_custom_pass`` is for."""
        with unset_fake_temporarily():  # qparams are no part of what is traced
            self._rewrite(graph)

    def _rewrite(self, graph: Graph) -> None:
        graph_module = graph.owning_module
        assert graph_module is not None
        if _WHOLE_KEY not in graph_module.meta:
            return  # a branch or loop, which Inductor shows on its own and again with the graph around it
        InlineRegions()(graph_module)
        lifted = find_lifted(graph_module)
        stand_ins = {entry: (entry.name, _make_stand_in(entry.node.meta["example_value"])) for entry in lifted}
        bind_parameters(graph_module, stand_ins)
        try:
            InsertObservers(self._config)(graph_module)
            self._give_qparams(graph_module)
            FoldFakeQuant()(graph_module)
            _make_constants(graph_module)
        except NothingMatchedError:
            pass
        for entry in lifted:
            for node in graph.find_nodes(op="get_attr", target=entry.name):
                node.replace_all_uses_with(entry.node)
                graph.erase_node(node)
            path, _, leaf = entry.name.rpartition(".")
            delattr(graph_module.get_submodule(path), leaf)

    def _give_qparams(self, graph_module: GraphModule) -> None:
        missing = []
        for probe in dict.fromkeys(probe for _, probe in find_probes(graph_module)):
            name = probe.sites[0].name
            probe.given = {kind: self._qparams.get(f"{name}_{kind}") for kind in QPARAMS}
            if not probe.sites[0].is_dynamic and not any(tensor is not None for tensor in probe.given.values()):
                missing.append(name)
        if missing:
            raise ValueError(f"there are no qparams of {', '.join(missing)}: calibrate this model with this config")

    def uuid(self) -> str:
        """What Inductor's caches know the pass by: the config, every qparam and fxmse's own source."""
        return self._uuid

    @functools.cached_property
    def _uuid(self) -> str:
        hashed = hashlib.sha256(json.dumps(self._config.model_dump(mode="json"), sort_keys=True).encode())
        for name, tensor in sorted(self._qparams.items()):
            hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.cpu().double().tolist()}".encode())
        # The passes may be a link, which a search through the package's folder would not follow.
        folders = [Path(__file__).parents[1], Path(inspect.getfile(FoldFakeQuant)).parent]
        sources = {str(path) for folder in folders for path in folder.rglob("*.py")}
        hashed.update(get_hash_for_files(tuple(sorted(sources))))
        return hashed.hexdigest()


def _make_stand_in(parameter: Tensor) -> nn.Parameter:
    """A parameter of the same shape and dtype, which are all that inserting observers looks at."""
    stand_in = torch.empty(tuple(parameter.shape), dtype=parameter.dtype, device="meta")
    return nn.Parameter(stand_in, requires_grad=False)


def _make_constants(graph_module: GraphModule) -> None:
    """Has qparams be read as constants: which buffers a graph has was settled before its passes run."""
    graph = graph_module.graph
    buffers = dict(graph_module.named_buffers())
    for node in [node for node in graph.find_nodes(op="get_attr") if node.target in buffers]:
        path, _, leaf = str(node.target).rpartition(".")
        module = graph_module.get_submodule(path)
        if leaf in module._buffers:
            delattr(module, leaf)
            setattr(module, leaf, buffers[str(node.target)])  # an attribute
        with graph.inserting_after(node):
            constant = graph.call_function(torch.ops.aten.lift_fresh_copy.default, (node,))
        node.replace_all_uses_with(constant, delete_user_cb=lambda user, constant=constant: user is not constant)
