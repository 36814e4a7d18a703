"""compressed-tensors applying qparams by itself, for comparison."""

import copy
import warnings

import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.utils import is_match
from torch import nn
from torch.fx import GraphModule
from transformers.pytorch_utils import Conv1D

from fxmse.passes.fold_fake_quant import SITES_KEY

# How the weights of modules that compressed-tensors does not know become (..., out, in), and back.
_VIEWS = {
    Conv1D: (lambda w: w.t(), lambda rows, shape: rows.t()),
    nn.Conv2d: (lambda w: w.flatten(1), lambda rows, shape: rows.reshape(shape)),
}
_AS_IT_IS = (lambda w: w, lambda rows, shape: rows)


def apply_qparams(model: nn.Module, config: QuantizationConfig, quantized: GraphModule) -> nn.Module:
    """A copy of ``model`` that compressed-tensors quantizes by ``config``, with the qparams of a folded graph.

    Sites that share one set of qparams in the graph (a value that several modules read) have copies of them in each
    module, where compressed-tensors looks for them. Modules that compressed-tensors does not know (convolutions,
    experts) get its fake quantization by hand.
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
    qparams = {name: state[owner] for name, owner in owners.items() if owner in state}
    for path in {site.rpartition(".")[0] for site in list_sites(quantized)}:
        module = model.get_submodule(path)
        if not hasattr(module, "quantization_scheme"):
            schemes = config.config_groups.values()
            # What is no module of a class that is targeted is one that calls F.linear, which answers to Linear.
            by_name = [scheme for scheme in schemes if is_match(path, module, scheme.targets)]
            linear = [scheme for scheme in schemes if "Linear" in scheme.targets]
            _quantize_by_hand(module, (by_name + linear)[0], qparams, f"{path}.")
    return model


def _quantize_by_hand(module, scheme, qparams, prefix):
    module.quantization_status = QuantizationStatus.FROZEN
    module.quantization_scheme = scheme
    own = {name.removeprefix(prefix): value for name, value in qparams.items() if name.startswith(prefix)}
    to_rows, from_rows = _VIEWS.get(type(module), _AS_IT_IS)
    for name, parameter in list(module.named_parameters(recurse=False)):
        base_name = "weight" if name == "weight" else f"{name}_weight"
        if f"{base_name}_scale" in own:
            qparams = {kind: own.get(f"{base_name}_{kind}") for kind in ("scale", "zero_point", "global_scale")}
            rows = _quantize_matrices(module, to_rows(parameter.detach()), qparams, scheme.weights)
            parameter.data = from_rows(rows, parameter.shape)
    if scheme.input_activations:
        for kind in ("scale", "zero_point", "global_scale"):
            setattr(module, f"input_{kind}", own.get(f"input_{kind}"))
        module.register_forward_pre_hook(
            lambda module, args: (forward_quantize(module, args[0], "input", scheme.input_activations), *args[1:])
        )


def _quantize_matrices(module, rows, qparams, args):
    """Rows (out, in), or each expert's (experts, out, in) for itself, as the linear that a checkpoint has of it."""
    if rows.dim() > 2:
        parts = [{kind: None if q is None else q[n] for kind, q in qparams.items()} for n in range(len(rows))]
        return torch.stack([_quantize_matrices(module, *part, args) for part in zip(rows, parts, strict=True)])
    for kind, value in qparams.items():
        setattr(module, f"weight_{kind}", value.flatten() if value is not None and value.numel() == 1 else value)
    return forward_quantize(module, rows, "weight", args)


def list_sites(quantized: GraphModule) -> list[str]:
    """The names of all sites."""
    return [name for node in quantized.graph.nodes for name in node.meta.get(SITES_KEY, ())]


def find_owners(quantized: GraphModule) -> dict[str, str]:
    """The buffer that each module's qparam is, by the name that compressed-tensors gives it."""
    sites = [node.meta[SITES_KEY] for node in quantized.graph.nodes if SITES_KEY in node.meta]
    kinds = ("scale", "zero_point", "global_scale")
    return {f"{name}_{kind}": f"{names[0]}_{kind}" for names in sites for name in names for kind in kinds}
