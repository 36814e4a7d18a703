"""compressed-tensors applying qparams by itself, for comparison."""

import copy
import warnings

import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from torch import nn
from torch.fx import GraphModule

from fxmse.passes.fold_fake_quant import SITES_KEY


def apply_qparams(model: nn.Module, config: QuantizationConfig, quantized: GraphModule) -> nn.Module:
    """A copy of ``model`` that compressed-tensors quantizes by ``config``, with the qparams of a folded graph.

    Sites that share one set of qparams in the graph (a value that several modules read) have copies of them in each
    module, where compressed-tensors looks for them.
    """
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        apply_quantization_config(model, config, show_progress=False)
    state = quantized.state_dict()
    owners = find_owners(quantized)
    for name, parameter in model.named_parameters():
        if not name.endswith(("_scale", "_zero_point", "_global_scale")):
            continue
        value = state.get(owners.get(name, name))
        if value is None:
            assert name.endswith("_zero_point"), f"{name} is not in the folded graph"
            value = torch.zeros_like(parameter)
        assert value.shape == parameter.shape, name
        parameter.data = value.clone()
    return model


def find_owners(quantized: GraphModule) -> dict[str, str]:
    """The buffer that each module's qparam is, by the name that compressed-tensors gives it."""
    sites = [node.meta[SITES_KEY] for node in quantized.graph.nodes if SITES_KEY in node.meta]
    kinds = ("scale", "zero_point", "global_scale")
    return {f"{name}_{kind}": f"{names[0]}_{kind}" for names in sites for name in names for kind in kinds}
