"""Programs of quantized graphs: saved, loaded where torch is all there is, packaged, and safe to load."""

import resource
import signal
import subprocess
import sys
import zipfile
from contextlib import contextmanager

import pytest
import torch
from cases import MXFP4, NVFP4, copies_pytree_specs, make_args
from models import W8A8, Attention, make_config
from torch import nn

import fxmse
from fxmse.inputs.programs import load_program
from fxmse.ops import is_fake_quantize
from fxmse.outputs.exporting import save_program

LOAD = """
import sys, torch
if sys.argv[1] == "op":
    import fxmse.ops
program = torch.export.load(sys.argv[2]).module()
torch.save([program(x) for x in torch.load(sys.argv[3])], sys.argv[4])
assert ("fxmse" in sys.modules) == (sys.argv[1] == "op")
"""
RUN_PACKAGE = """
import sys, torch
package = torch._inductor.aoti_load_package(sys.argv[1])
torch.save([package(x) for x in torch.load(sys.argv[2])], sys.argv[3])
assert "fxmse" not in sys.modules
"""
CONFIGS = {
    "int8": W8A8,
    "int4 groups": make_config(weights={"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
    "fp8 blocks, dynamic": make_config(
        weights=make_args(8, "float", "block", block_structure=[32, 32]).model_dump(),
        inputs=make_args(8, "float", "token", dynamic=True).model_dump(),
    ),
    "nvfp4": make_config(weights=NVFP4.model_dump(), inputs={**NVFP4.model_dump(), "dynamic": "local"}),
    "mxfp4": make_config(weights=MXFP4.model_dump(), inputs={**MXFP4.model_dump(), "dynamic": True}),
}


def make_inputs(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 64, generator=generator) for size in sizes]


@pytest.fixture(scope="module")
def quantized():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).eval()
    return {name: fxmse.quantize(model, config, make_inputs(5), progress=False) for name, config in CONFIGS.items()}


def run_in_new_process(code, *arguments, tmp_path):
    inputs, outputs = tmp_path / "inputs.pt", tmp_path / "outputs.pt"
    torch.save(make_inputs(5, 3, 17), inputs)
    subprocess.run([sys.executable, "-c", code, *map(str, arguments), str(inputs), str(outputs)], check=True)
    return torch.load(outputs)


@pytest.mark.parametrize("form", ["op", "decomposed"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_saved_program_gives_equal_outputs_at_every_size(quantized, name, form, tmp_path):
    program = fxmse.export(quantized[name], make_inputs(5)[0], decompose=form == "decomposed")
    assert any(is_fake_quantize(node) for node in program.graph.nodes) == (form == "op")
    save_program(program, tmp_path / "model.pt2")
    found = run_in_new_process(LOAD, form, tmp_path / "model.pt2", tmp_path=tmp_path)
    for output, x in zip(found, make_inputs(5, 3, 17), strict=True):
        assert torch.equal(output, quantized[name](x))


@torch.no_grad()
def test_an_exported_program_keeps_its_dynamic_shapes(tmp_path):
    tokens = Attention.make_inputs(4)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Attention().eval(), (tokens,), dynamic_shapes=({0: batch},))
    graph = fxmse.quantize(program, W8A8, [tokens], progress=False)
    save_program(fxmse.export(graph, tokens), tmp_path / "model.pt2")
    loaded = load_program(tmp_path / "model.pt2")[0].module()
    for size in (2, 7, 64):
        more = Attention.make_inputs(size)
        assert torch.equal(loaded(more), graph(more))


@torch.no_grad()
@copies_pytree_specs
def test_aot_inductor_packages_it(quantized, tmp_path):
    program = fxmse.export(quantized["int8"], make_inputs(5)[0], decompose=True)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    found = run_in_new_process(RUN_PACKAGE, package, tmp_path=tmp_path)
    compiled = torch.compile(program.module(), dynamic=True)
    for output, x in zip(found, make_inputs(5, 3, 17), strict=True):
        # Inductor's kernels round other intermediate results than eager ones do, in a package as in memory.
        assert torch.equal(output, compiled(x))
        torch.testing.assert_close(output, quantized["int8"](x), rtol=1e-5, atol=1e-5)


def save_small(path):
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.randn(3, 2),)), path)
    return path


def test_a_file_that_is_cut_off_or_foreign_is_named(tmp_path):
    whole = save_small(tmp_path / "whole.pt2").read_bytes()
    cut = tmp_path / "cut.pt2"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut.pt2 cannot be read as a .pt2: File is not a zip file"):
        load_program(cut)
    flipped = bytearray(whole)
    place = whole.index(b"nn_module_stack") + 3
    flipped[place] ^= 1
    cut.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"cut.pt2 is damaged: whole/models/model.json does not have its checksum"):
        load_program(cut)
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pt2")
    with pytest.raises(ValueError, match=r"other.pt2 is no .pt2 of torch.export: it holds data.pkl"):
        load_program(tmp_path / "other.pt2")
    with pytest.raises(ValueError, match=r"missing.pt2 cannot be read"):
        load_program(tmp_path / "missing.pt2")


class _Payload:
    """Runs code where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def rewrite(source, target, change):
    """A copy of an archive with members that ``change`` has changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


@pytest.mark.parametrize("place", ["sample inputs", "weights", "constants"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, place):
    source = save_small(tmp_path / "whole.pt2")
    payload = tmp_path / "payload.pt"
    torch.save(((_Payload(tmp_path / "ran"),), {}), payload)

    def change(name, content):
        if place == "sample inputs" and "sample_inputs" in name:
            return payload.read_bytes()
        if place == "weights" and name.endswith("weights_config.json"):
            return content.replace(b'"use_pickle": false', b'"use_pickle": true')
        if place == "weights" and "weights/weight_" in name:
            return payload.read_bytes()
        if place == "constants" and name.endswith("constants_config.json"):
            entry = b'{"x": {"path_name": "opaque_obj_0", "is_param": false, "use_pickle": true, "tensor_meta": null}}'
            return content.replace(b"{}", entry)
        return content

    with pytest.raises(ValueError, match=r"evil.pt2.* has pickled objects .*, which may run code.*: (export|save)"):
        load_program(rewrite(source, tmp_path / "evil.pt2", change))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["whole/data/aotinductor/model/a.so", "version", "other/data/sample_inputs/model.pt"])
def test_what_export_does_not_write_is_refused(tmp_path, name):
    path = save_small(tmp_path / "whole.pt2")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"")
    with pytest.raises(ValueError, match=r"whole.pt2 has .*, which torch(.export.save)? does not write"):
        load_program(path)


@contextmanager
def full_disk(size):
    """No file may grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 100, 10_000])
def test_a_program_replaces_another_only_once_it_is_whole(quantized, tmp_path, size):
    path = save_small(tmp_path / "model.pt2")
    before = path.read_bytes()
    program = fxmse.export(quantized["int8"], make_inputs(5)[0])
    with full_disk(size), pytest.raises(OSError, match="File too large"):
        save_program(program, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_while_a_program_is_written_waits_for_torch(quantized, tmp_path, monkeypatch):
    path = save_small(tmp_path / "model.pt2")
    before = path.read_bytes()

    def interrupt(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        save(*arguments, **options)
        done.append(True)

    save, done = torch.export.save, []
    monkeypatch.setattr(torch.export, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_program(fxmse.export(quantized["int8"], make_inputs(5)[0]), path)
    assert done
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
