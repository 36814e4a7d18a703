"""State dicts are checked before anything of them is loaded."""

from collections.abc import Mapping
from typing import Any

from torch.fx import GraphModule

from fxmse.capture.attributes import find_owner, get_attribute
from fxmse.observers.states import Described, refuse_differences
from fxmse.passes.constants import evaluate, list_attributes
from fxmse.passes.probe import find_probes

__all__ = ["check_state_dict", "register_check"]


def register_check(graph_module: GraphModule) -> None:
    """Has an observed graph check what is loaded."""
    hooks = graph_module._load_state_dict_pre_hooks.values()
    if not any(getattr(wrapped, "hook", None) is check_state_dict for wrapped in hooks):
        graph_module.register_load_state_dict_pre_hook(check_state_dict)


def check_state_dict(graph_module: GraphModule, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Raises ValueError where a state dict is not of this observed graph; all sites are named, nothing was loaded.

    Each site's format, observer and options are compared, and of a weight its shape and dtype. What it holds is
    compared, too, where the state dict does not bring the model's weights along.
    """
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    found = [
        m.find_difference(state_dict, f"{prefix}{path}.") for path, m in modules.items() if isinstance(m, Described)
    ]
    paths = {module: path for path, module in modules.items()}
    tensors = {**dict(graph_module.named_parameters(remove_duplicate=False)), **dict(graph_module.named_buffers())}
    loaded = {id(tensor) for name, tensor in tensors.items() if f"{prefix}{name}" in state_dict}
    for node, probe in find_probes(graph_module):
        path = f"{prefix}{paths[probe]}."
        if not probe.is_weight or not probe.read_facts(state_dict, path):
            continue
        owner = find_owner(node)
        sources = [get_attribute(owner, str(source.target)) for source in list_attributes(node)]
        is_loaded = all(id(source) in loaded for source in sources)
        rows = evaluate(owner, node.all_input_nodes[0])
        found.append(probe.compare_weight(state_dict, path, rows, is_loaded=is_loaded))
    refuse_differences(dict.fromkeys(found))
