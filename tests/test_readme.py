"""README and the pages of docs: their code runs as it stands there, their commands and links lead somewhere."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from compressed_tensors.registry import registry
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import fxmse
from fxmse.cli import main
from fxmse.config import resolve_config
from fxmse.observers import Observer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import quantize_minilm as example

ROOT = Path(__file__).parents[1]
BENCHMARKS = "benchmarks/README.md"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / BENCHMARKS)
}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def list_blocks(page, language):
    return [block for found, block in BLOCK.findall(PAGES[page]) if found == language]


def find_pages(language):
    return [page for page in PAGES if list_blocks(page, language)]


def list_shell_commands(page):
    lines = "\n".join(list_blocks(page, "sh")).splitlines()
    commands = [shlex.split(command, comments=True) for line in lines for command in line.split(" && ")]
    return [command for command in commands if command]


def list_fxmse_commands(page):
    return [command for command in list_shell_commands(page) if command[0] == "fxmse"]


def list_commands(page):
    """Those of shell blocks, those that are indented, and those in the text."""
    text = BLOCK.sub("", PAGES[page])
    others = re.findall(r"^ {4}((?:python|pip) .*)$|`((?:python|pip|torchrun|pytest) [^`]+)`", text, re.MULTILINE)
    return [*list_shell_commands(page), *(shlex.split("".join(found)) for found in others)]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to run a page in; what the page registers is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    for registered in (registry._REGISTRY, registry._ALIAS_REGISTRY):
        monkeypatch.setitem(registered, Observer, dict(registered[Observer]))
    with fxmse.compilation("auto"):  # as users have it
        yield tmp_path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What pages read: models of each kind, data of each kind, a config."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    tokenizer = example.AutoTokenizer.from_pretrained(example.find_model_folder())
    config = transformers.LlamaConfig(**{**ARCHITECTURES["Llama"].options, "vocab_size": len(tokenizer)})
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    ARCHITECTURES["ViT"].make_model().save_pretrained(folder / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    (folder / "images").mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "images" / "red.png")
    (folder / "texts.jsonl").write_text('"some words"\n{"text": "more of them"}\n')
    mlp = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    shapes = {"input": {0: torch.export.Dim.AUTO}}
    torch.export.save(
        torch.export.export(mlp, (), {"input": torch.randn(4, 32)}, dynamic_shapes=shapes), folder / "model.pt2"
    )
    save_file({"input": torch.randn(16, 32)}, folder / "batches.safetensors")
    (folder / "config.yaml").write_text("targets: [Linear]\nweights: {num_bits: 8, strategy: channel}\n")
    return folder


@torch.no_grad()
def check_readme(found, folder, printed):
    assert "0.weight: int8 symmetric channel" in printed
    assert (folder / "quantized.pt2").exists()
    check_outputs(found["model"], found["quantized"], found["batches"][0])


@torch.no_grad()
def check_quantizing(found, folder, printed):
    for quantized in (found["quantized"], found["graph_module"]):
        check_outputs(found["model"], quantized, found["batches"][0])
    assert resolve_config(found["mixed"]).config_groups["FP8_DYNAMIC"].input_activations.dynamic is True


def check_outputs(model, quantized, x):
    assert (quantized(x) - model(x)).norm() < 0.05 * model(x).norm()


CHECKS = {"README.md": check_readme, "docs/quantizing.md": check_quantizing}


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # torch's own, of freezing
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")  # llm-compressor's
@pytest.mark.parametrize("page", find_pages("python"))
def test_the_code_of_a_page_runs_in_order(page, workplace, files, capsys):
    (workplace / "llama").symlink_to(files / "llama")
    namespace = {}
    for number, block in enumerate(list_blocks(page, "python"), 1):
        exec(compile(block, f"{page}, block {number}", "exec"), namespace)
    if page in CHECKS:
        CHECKS[page](namespace, workplace, capsys.readouterr().out)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("page", [page for page in find_pages("sh") if list_fxmse_commands(page)])
def test_the_command_lines_of_a_page_run_in_order(page, workplace, files):
    shutil.copytree(files, workplace, dirs_exist_ok=True)
    for command in list_fxmse_commands(page):
        assert main(command[1:]) == 0, command


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_files_and_options_that_exist(page):
    for command in list_commands(page):
        scripts = [word for word in command if word.endswith(".py")]
        for script in scripts:
            assert (ROOT / script).is_file(), command
        if command[0] == "python" and scripts:
            source = read_with_its_imports(ROOT / scripts[0])
            options = [word for word in command if word.startswith("--")]
            assert all(f'"{option}"' in source for option in options), command


def read_with_its_imports(script):
    """The text of a script and of the modules beside it that it imports from: one of them may parse the options."""
    text = script.read_text()
    beside = [script.parent / f"{name}.py" for name in re.findall(r"^from (\w+) import", text, re.MULTILINE)]
    return "".join([text, *(path.read_text() for path in beside if path.is_file())])


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_resolve(page):
    text = BLOCK.sub("", PAGES[page])
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        if anchor:
            linked = str(file.relative_to(ROOT))
            assert anchor in list_anchors(BLOCK.sub("", PAGES[linked])), f"{page} links to {target}"


def list_anchors(text):
    """What GitHub makes of headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_every_page_of_docs_is_linked_from_the_readme():
    for page in PAGES:
        assert page == "README.md" or f"({page})" in PAGES["README.md"], page


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 180


def test_the_table_of_architectures_is_what_is_tested():
    rows = re.findall(r"^\| (.*) \| (\w+) \| (yes|fails: .*) \|$", PAGES["docs/quantizing.md"], re.MULTILINE)
    reasons = {name: a.reason and f"fails: {a.reason.replace('.*', ' ... ')}" for name, a in ARCHITECTURES.items()}
    assert rows == [(name, a.model, reasons[name] or "yes") for name, a in ARCHITECTURES.items()]


def test_the_table_of_observers_names_them_all():
    for name in Observer.registered_names():
        assert f"`{name.replace('-', '_')}`" in PAGES["docs/observers.md"]


def test_the_version_is_that_of_a_source_tree_and_of_the_package():
    changes = re.findall(r"^## \[([\d.]+)\]", PAGES["CHANGELOG.md"], re.MULTILINE)
    assert fxmse.__version__ == changes[0]
    assert (Path(fxmse.__file__).parent / "py.typed").exists()
