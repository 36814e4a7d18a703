"""Builds fxmse's sdist and wheels, looks into them, and runs the wheel in a fresh environment.

The fresh environment sees the dependencies of the one that this is run in, but not its fxmse.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What builds and tools leave in a checkout: setuptools would take old modules from its own folder.
LEFT_BEHIND = (".*", "build", "dist", "*.egg-info", "__pycache__")
IMPORT = """
import importlib.metadata, sys
import fxmse, fxmse.cli, fxmse.passes
for module in (fxmse, fxmse.passes):
    assert module.__file__.startswith(sys.prefix), f"{module.__file__} is not the wheel's"
from fxmse.outputs.report_html import render_page
assert "<style>:root" in render_page({})
assert fxmse.__version__ == importlib.metadata.version("fxmse")
"""


def run(*command: str | Path, **options: object) -> None:
    """Runs a command; shows what it printed only where it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}")


def make_environment(folder: Path) -> Path:
    """A fresh environment; returns its folder of programs."""
    venv.create(folder, with_pip=True)
    return folder / "bin"


def build(folder: Path) -> tuple[Path, Path, Path]:
    """The sdist, the wheel that is built from it, and the one that is built from the checkout."""
    programs = make_environment(folder / "build")
    run(programs / "pip", "install", "build")
    checkout = folder / "checkout"
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
    run(programs / "python", "-m", "build", "--outdir", folder / "of_sdist", checkout)
    run(programs / "pip", "wheel", "--no-deps", "--wheel-dir", folder / "of_checkout", checkout)
    sdist, wheel = next(folder.glob("of_sdist/*.tar.gz")), next(folder.glob("of_sdist/*.whl"))
    return sdist, wheel, next(folder.glob("of_checkout/*.whl"))


def check_contents(sdist: Path, wheel: Path, wheel_of_checkout: Path) -> None:
    """Both wheels have every module; the sdist has the link's files and its folder, and what README links to."""
    names = _list_files(wheel)
    assert names == _list_files(wheel_of_checkout)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fxmse").rglob("*.py")}
    modules |= {"fxmse_command.py"} | {f"fxmse/passes/{path.name}" for path in (ROOT / "passes").glob("*.py")}
    found = {name for name in names if ".dist-info/" not in name}
    data = {"fxmse/py.typed"} | {f"fxmse/outputs/page/{path.name}" for path in (ROOT / "fxmse/outputs/page").iterdir()}
    assert found == modules | data, f"in the wheel or the checkout alone: {found ^ modules ^ data}"
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "passes/base.py", "tests/conftest.py"}
    wanted |= modules | {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert wanted <= in_sdist, f"not in the sdist: {wanted - in_sdist}"


def _list_files(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(archive.namelist())


def check_wheel(wheel: Path, folder: Path) -> None:
    """The wheel installs, imports and lists its presets, away from the checkout."""
    programs = make_environment(folder / "fresh")
    here = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    paths = sysconfig.get_paths(vars={"base": str(folder / "fresh"), "platbase": str(folder / "fresh")})
    Path(paths["purelib"], "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # pip would take an fxmse that it sees behind the .pth for this one.
    run(programs / "pip", "install", "--no-deps", "--ignore-installed", wheel)
    run(programs / "python", "-c", IMPORT, cwd=folder, env=here)
    run(programs / "fxmse", "schemes", cwd=folder, env=here)


def main() -> None:
    """Checks all of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdist, wheel, wheel_of_checkout = build(folder)
        check_contents(sdist, wheel, wheel_of_checkout)
        check_wheel(wheel, folder)
    print("the sdist and the wheels are whole, and the wheel works in a fresh environment")


if __name__ == "__main__":
    main()
