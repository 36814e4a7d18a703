"""Modules import one way only, and importing fxmse changes nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import fxmse

PACKAGE = Path(fxmse.__file__).parent
# Each module may import those before it.
ORDER = (
    "fxmse.numerics",
    "fxmse.layout",
    "fxmse.power",
    "fxmse.compiling",
    "fxmse.counting",
    "fxmse.errors",
    "fxmse.search",
    "fxmse.optimum",
    "fxmse.global_scale",
    "fxmse.states",
    "fxmse.observers",
    "fxmse.importance",
    "fxmse.exact",
    "fxmse.ops",
    "fxmse.config",
    "fxmse.passes.base",
    "fxmse.passes.weight_view",
    "fxmse.passes.probe",
    "fxmse.passes.movement",
    "fxmse.passes.operation",
    "fxmse.passes.attention",
    "fxmse.passes.stand_ins",
    "fxmse.passes.quantizable_ops",
    "fxmse.passes.joins",
    "fxmse.passes.reads",
    "fxmse.passes.functionalize_modules",
    "fxmse.passes.insert_observers",
    "fxmse.passes.fold_fake_quant",
    "fxmse.passes.lower_to_qdq",
    "fxmse.passes",
    "fxmse.ranks",
    "fxmse.distributed",
    "fxmse.capture",
    "fxmse.pipeline",
    "fxmse.lifted",
    "fxmse.calibration",
    "fxmse.inductor",
    "fxmse.reporting",
    "fxmse.files",
    "fxmse.checkpoint",
    "fxmse.exporting",
    "fxmse.data",
    "fxmse",
    "fxmse.cli",
)


def find_modules():
    for path in [*PACKAGE.glob("*.py"), *(PACKAGE / "passes").glob("*.py")]:
        parts = ("fxmse", *path.relative_to(PACKAGE).with_suffix("").parts)
        yield ".".join(part for part in parts if part != "__init__"), path


def test_imports_run_one_way():
    modules = dict(find_modules())
    assert sorted(modules) == sorted(ORDER)
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fxmse"):
                assert ORDER.index(node.module) < ORDER.index(name), f"{name} imports {node.module}"
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("fxmse") for alias in node.names), name


def test_passes_know_no_arithmetic_and_search_no_graph():
    sources = {name: path.read_text() for name, path in find_modules()}
    for name, source in sources.items():
        if name.startswith("fxmse.passes"):
            assert "fxmse.numerics" not in source
            assert "fxmse.errors" not in source
            assert "fxmse.search" not in source
    for name in ORDER[: ORDER.index("fxmse.observers") + 1]:
        # One flag of symbolic shapes lives there.
        assert "torch.fx" not in sources[name].replace("torch.fx.experimental._config", "")
        assert "torch.export" not in sources[name]


def test_importing_leaves_torch_as_it_was():
    # The reference's compiled version sets a process-wide Dynamo flag.
    code = (
        "import torch, torch._dynamo; before = torch._dynamo.config.save_config();"
        "import fxmse; assert torch._dynamo.config.save_config() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
