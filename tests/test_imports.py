"""Rooms import one way only, a room's files in the order its docstring lists them, and importing changes nothing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fxmse

PACKAGE = Path(fxmse.__file__).parent
# Each room, a folder or a file of the package, may import those on the floors above it in this list.
FLOORS = (
    ("formats", "reading", "patterns"),
    ("search", "config"),
    ("observers",),
    ("ops",),
    ("capture",),
    ("passes",),
    ("calibration",),
    ("pipeline",),
    ("analysis",),
    ("inputs", "outputs"),
    ("streaming", "llmcompressor", "pt2e"),
    ("",),  # fxmse itself, which is the public surface
    ("cli",),
)
ROOMS = [room for floor in FLOORS for room in floor]
FOLDERS = [room for room in ROOMS if (PACKAGE / room).is_dir() and room]


def find_modules():
    """Each module of the package: its dotted name and its source."""
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE / "passes").glob("*.py")]:
        parts = ("fxmse", *path.relative_to(PACKAGE).with_suffix("").parts)
        yield ".".join(part for part in parts if part != "__init__"), path.read_text()


MODULES = dict(find_modules())


def find_room(module):
    return module.split(".")[1] if "." in module else ""


def find_floor(module):
    return next(number for number, floor in enumerate(FLOORS) if find_room(module) in floor)


def list_imports(source):
    """The modules of fxmse that a source imports; those of type checking and of functions, too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "fxmse")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fxmse":
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else node.module


def test_every_module_is_in_a_room():
    assert {find_room(module) for module in MODULES} == set(ROOMS)


def test_rooms_import_the_floors_above():
    for module, source in MODULES.items():
        for imported in list_imports(source):
            is_same_room = find_room(imported) == find_room(module)
            assert is_same_room or find_floor(imported) < find_floor(module), f"{module} imports {imported}"


@pytest.mark.parametrize("room", FOLDERS)
def test_a_room_lists_its_files_in_the_order_of_their_imports(room):
    listed = re.findall(r"^- ``(\w+)``: ", ast.get_docstring(ast.parse(MODULES[f"fxmse.{room}"])), re.MULTILINE)
    files = [module.rpartition(".")[2] for module in MODULES if module.startswith(f"fxmse.{room}.")]
    assert sorted(listed) == sorted(files)
    for place, name in enumerate(listed):
        for imported in list_imports(MODULES[f"fxmse.{room}.{name}"]):
            if find_room(imported) == room:
                assert imported.rpartition(".")[2] in listed[:place], f"{room}/{name} imports {imported}"


def test_passes_know_no_arithmetic_and_search_no_graph():
    for module, source in MODULES.items():
        imported = set(list_imports(source))
        if find_room(module) == "passes":
            assert not {name for name in imported if find_room(name) == "search"}, module
            assert not imported & {"fxmse.formats.grids", "fxmse.formats.scales"}, module
        if find_floor(module) <= find_floor("fxmse.observers"):
            # One flag of symbolic shapes lives there.
            assert "torch.fx" not in source.replace("torch.fx.experimental._config", ""), module
            assert "torch.export" not in source, module


def test_importing_leaves_torch_as_it_was():
    # The reference's compiled version sets a process-wide Dynamo flag.
    code = (
        "import torch, torch._dynamo; before = torch._dynamo.config.save_config();"
        "import fxmse; assert torch._dynamo.config.save_config() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
