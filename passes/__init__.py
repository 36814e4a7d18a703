"""torch.fx passes: ``GraphModule -> PassResult``, in place, exact about ``modified``."""

from fxmse.passes.fold_fake_quant import FoldFakeQuant
from fxmse.passes.functionalize_modules import FunctionalizeModules
from fxmse.passes.insert_observers import InsertObservers
from fxmse.passes.lower_to_qdq import LowerToQDQ

__all__ = ["FoldFakeQuant", "FunctionalizeModules", "InsertObservers", "LowerToQDQ"]
