"""What every pass shares: how it is run."""

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassBase, PassResult

__all__ = ["GraphPass"]


class GraphPass(PassBase):
    """A pass that rewrites a GraphModule in place and says whether it changed anything.

    Subclasses are frozen dataclasses, whose fields are their options, and implement ``rewrite``. Calling a pass runs
    it, removes the nodes it left without users, lints and recompiles (only where something changed), and adds the
    pass to the notes of an error. Unlike torch.fx's own PassManager it leaves an error's type alone.
    """

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """Rewrites ``graph_module`` in place; a second call on the result changes nothing."""
        try:
            modified = self.rewrite(graph_module)
            if modified:
                graph_module.graph.eliminate_dead_code(is_impure_node=lambda node: node.op != "get_attr")
                graph_module.graph.lint()
                graph_module.recompile()
        except Exception as error:
            error.add_note(f"while running the pass {type(self).__name__}")
            raise
        return PassResult(graph_module, modified)

    def call(self, graph_module: GraphModule) -> PassResult:
        """Torch.fx's name for running a pass."""
        return self(graph_module)

    def rewrite(self, graph_module: GraphModule) -> bool:
        """Changes the graph; returns whether it did. Raises before the first change where it cannot."""
        raise NotImplementedError
