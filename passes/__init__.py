"""torch.fx passes: ``GraphModule -> PassResult``, in place, exact about ``modified``.

What they share, and what they put into a graph:

- ``base``: how a pass is run.
- ``weight_view``: parameters as rows of output channels, and back.
- ``probe``: an observer as a node.
- ``op_names``: the name that an op goes by.
- ``versions``: which version of a value a node reads, where graphs write in place.
- ``constants``: values that follow from parameters alone, as weights do.
- ``loading``: a state dict is checked before anything of it is loaded.
- ``finishing``: weights that wait for all data, and global scales that are shared.
- ``trimming``: what of an observed graph observers need.
- ``references``: what values would be if nothing before them was quantized.
- ``parts``: an observed graph in parts, each of which can run alone.

What they look for in a graph:

- ``inline_regions``: regions of no_grad, autocast and checkpointing come into the graph (a pass, too).
- ``open_regions``: branches and loops become graphs like others, whose weights are their own (a pass).
- ``close_regions``: and get them as operands again (a pass).
- ``movement``: parameters behind transposes and choices.
- ``operation``: what an op that can be quantized is made of.
- ``attention``: attention, as one call or written out.
- ``stand_ins``: the modules that nodes were traced from, for matching.
- ``quantizable_ops``: all ops that can be quantized.
- ``routers``: which of them choose experts.
- ``shortcuts``: what is added to the output of convolutions.
- ``joins``: ops that join several values.
- ``reads``: a config and a graph become sites.
- ``annotations``: a quantizer of PT2E's and a graph become sites.
- ``naming``: what these are called.
- ``arranging``: which rows of a weight meet which tokens.
- ``input_nodes``: nodes on the values that meet weights.
- ``all_experts``: observers see the tokens of all experts.
- ``bias_correction``: and those with which biases are corrected.

The passes:

- ``functionalize_modules``: calls of modules become functional, so that weights are visible.
- ``fold_batch_norm``: batch norms become part of the layers before them.
- ``decompose_attention``: fused attention becomes the products that it is made of.
- ``insert_observers``: probes on the values that a config wants quantized.
- ``fold_fake_quant``: probes become fake-quantize nodes.
- ``lowering``: what those that follow do alike.
- ``lower_to_linear``: they become linear quantize and dequantize nodes, as ONNX has them.
- ``move_to_device``: a graph computes on another device.
- ``int8_patterns``: Inductor's patterns for the next one.
- ``lower_to_qdq``: int8 fake-quantize nodes become pairs for Inductor's kernels.
"""

from fxmse.passes.close_regions import CloseRegions
from fxmse.passes.decompose_attention import DecomposeAttention
from fxmse.passes.fold_batch_norm import FoldBatchNorm
from fxmse.passes.fold_fake_quant import FoldFakeQuant
from fxmse.passes.functionalize_modules import FunctionalizeModules
from fxmse.passes.inline_regions import InlineRegions
from fxmse.passes.insert_observers import InsertObservers
from fxmse.passes.lower_to_linear import LowerToLinear
from fxmse.passes.lower_to_qdq import LowerToQDQ
from fxmse.passes.move_to_device import MoveToDevice
from fxmse.passes.open_regions import OpenRegions

__all__ = [
    "CloseRegions",
    "DecomposeAttention",
    "FoldBatchNorm",
    "FoldFakeQuant",
    "FunctionalizeModules",
    "InlineRegions",
    "InsertObservers",
    "LowerToLinear",
    "LowerToQDQ",
    "MoveToDevice",
    "OpenRegions",
]
