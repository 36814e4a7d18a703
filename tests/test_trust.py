"""Whatever a file holds, reading it runs nothing, ends soon, and says what is wrong in one line with its name.

Every way in is in ``ENTRIES``, every attack (tests/attacks.py) is tried on each. The last tests hold that nothing else
reads files.
"""

import ast
import contextlib
import copy
import json
import os
import random
import resource
import shutil
import time
import warnings

import pytest
import torch
import transformers
from attacks import ATTACKS, make_program, rewrite
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_imports import MODULES
from torch import nn

import fxmse
from fxmse.calibration.ranks import Alone
from fxmse.cli import main
from fxmse.config import resolve_config
from fxmse.inputs.data import read_batches
from fxmse.inputs.expressions import check_expression
from fxmse.inputs.folders import list_weight_files
from fxmse.inputs.models import load_source
from fxmse.inputs.program_json import clean_program
from fxmse.inputs.programs import load_program
from fxmse.inputs.weights import load_skeleton
from fxmse.observers import Observer
from fxmse.ops import load_search
from fxmse.outputs.checkpoint import check_replaceable, copy_tokenizer
from fxmse.patterns import check_patterns
from fxmse.streaming.work import Work

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

NUM_EXAMPLES = int(os.environ.get("FXMSE_FUZZ_EXAMPLES", 25))
"""Of each fuzzer; some minutes of it are run by hand."""

FUZZ = settings(
    max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A model's folder, a processor's, and an observed graph."""
    folder = tmp_path_factory.mktemp("originals")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.LlamaConfig(**sizes, vocab_size=8, bos_token_id=1, eos_token_id=2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    transformers.ViTImageProcessor(size={"height": 4, "width": 4}).save_pretrained(folder / "images")
    (folder / "images" / "config.json").write_text('{"model_type": "vit"}')
    return folder


@pytest.fixture(scope="module")
def observed():
    return fxmse.prepare(nn.Sequential(nn.Linear(4, 4)).eval(), "W8A8", torch.ones(2, 4))


@pytest.fixture(autouse=True)
def no_questions(monkeypatch):
    """Nothing is asked on standard input."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))


def run(*arguments):
    """A command, whose error is raised."""
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *text, **_: lines.extend(text))
        if main([str(argument) for argument in arguments]):
            raise ValueError(lines[-1])


def find_error(call):
    """The ValueError that a call raises; None if it returns."""
    try:
        call()
    except ValueError as error:
        return error
    return None


@contextlib.contextmanager
def bounded_files():
    """No file may grow beyond a gigabyte: a copy of what was attacked would fill the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def read_with(path, model_folder=None):
    return read_batches(path, batch_size=2, max_length=8, model_folder=model_folder)


def write_texts(folder):
    (folder / "texts.txt").write_text("one\ntwo\n")
    return folder / "texts.txt"


# The file that is attacked, and what reads it; with the originals and the observed graph.
def resume_run(out):
    with Work(out, Alone()) as work:
        work.resume({})


ENTRIES = {
    "config, YAML": ("config.yaml", lambda path, *_: resolve_config(path)),
    "config, JSON": ("config.json", lambda path, *_: resolve_config(str(path))),
    "program": ("model.pt2", lambda path, *_: load_program(path)),
    "fxmse inspect, program": ("model.pt2", lambda path, *_: run("inspect", path)),
    "fxmse quantize": (
        "model.pt2",
        lambda path, *_: run("quantize", path, "--scheme=FP8_DYNAMIC", "--out", f"{path}.pt2"),
    ),
    "fxmse inspect, folder": ("model/fxmse_report.json", lambda path, *_: run("inspect", path.parent)),
    "fxmse inspect, report": ("report.json", lambda path, *_: run("inspect", path)),
    "fxmse inspect, page": ("report.html", lambda path, *_: run("inspect", path)),
    "fxmse inspect, ONNX": ("model.onnx", lambda path, *_: run("inspect", path)),
    "data, .pt": ("data.pt", lambda path, *_: read_with(path)),
    "data, .safetensors": ("data.safetensors", lambda path, *_: read_with(path)),
    "data, .txt": ("data.txt", lambda path, *_: read_with(path, path.parent)),
    "data, .jsonl": ("data.jsonl", lambda path, *_: read_with(path, path.parent)),
    "data, images": ("images/a.png", lambda path, originals, _: read_with(path.parent, originals / "images")),
    "model, config": ("model/config.json", lambda path, *_: load_source(path.parent)),
    "model, weights": ("model/model.safetensors", lambda path, *_: load_source(path.parent)),
    "model, index": ("model/model.safetensors.index.json", lambda path, *_: load_source(path.parent)),
    "model, generation": ("model/generation_config.json", lambda path, *_: load_source(path.parent)),
    "streamed, config": ("model/config.json", lambda path, *_: load_skeleton(path.parent)),
    "streamed, weights": ("model/model.safetensors", lambda path, *_: load_skeleton(path.parent)),
    "streamed, index": ("model/model.safetensors.index.json", lambda path, *_: load_skeleton(path.parent)),
    "unfinished run": (".out.fxmse/run.json", lambda path, *_: resume_run(path.parents[1] / "out")),
    "tokenizer": ("model/tokenizer_config.json", lambda path, *_: read_with(write_texts(path.parent), path.parent)),
    "processor": ("model/preprocessor_config.json", lambda path, *_: read_with(path.parent, path.parent)),
    "qparams": ("model/model.safetensors", lambda path, _, observed: fxmse.load_qparams(observed, path.parent)),
    "qparams, index": (
        "model/model.safetensors.index.json",
        lambda path, _, observed: fxmse.load_qparams(observed, path.parent),
    ),
    "folder to replace": ("out/config.json", lambda path, *_: check_replaceable(path.parent, "")),
    "tokenizer to copy": ("model/tokenizer.json", lambda path, *_: copy_tokenizer(path.parent, path.parents[1])),
}
# What takes any text or any file, and says no more of it than what a text or a file is.
TAKE_ANYTHING = ("folder to replace", "tokenizer to copy", "model, generation")


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_file_runs_nothing_and_is_named(originals, observed, tmp_path, entry, attack):
    name, read = ENTRIES[entry]
    path, ran = tmp_path / name, tmp_path / "ran"
    if name.startswith("model/"):
        shutil.copytree(originals / "model", path.parent)
        path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    ATTACKS[attack](path, ran)
    start = time.process_time()
    with bounded_files():
        error = find_error(lambda: read(path, originals, observed))
    if error is None:
        assert entry in TAKE_ANYTHING or attack == "two directories", "read as if it were right"
    else:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 1000
        assert path.name in message or str(path.parent) in message
    assert time.process_time() - start < 20
    assert not ran.exists(), "ran"


def mutate(path, change):
    """A program whose JSON ``change`` has changed."""
    source = make_program(path.with_name("source.pt2"))

    def change_member(name, content):
        if name != "models/model.json":
            return content
        program = json.loads(content)
        return json.dumps(change(program) or program).encode()

    return rewrite(source, path, change_member)


CODE = "__import__('os').system('touch {ran}')"


def set_expression(program, code):
    values = program["graph_module"]["graph"]["tensor_values"]
    values["x"]["sizes"][0]["as_expr"]["expr_str"] = code


def set_constant(program, code):
    inputs = program["graph_module"]["graph"]["inputs"]
    specs = program["graph_module"]["signature"]["input_specs"]
    inputs[-1]["as_string"] = specs[-1]["constant_input"]["value"]["as_string"] = f"' or {code} or '"


def set_input(program, code):
    text = json.dumps(program).replace('"name": "x"', json.dumps({"name": f"x={code}"})[1:-1])
    return json.loads(text)


def first_node(program):
    return program["graph_module"]["graph"]["nodes"][0]


def set_tree(program, kind, context):
    signature = program["graph_module"]["module_call_graph"][0]["signature"]
    tree = {"type": kind, "context": context, "children_spec": []}
    signature["out_spec"] = json.dumps([1, tree])


def set_names(program, code):
    program["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = ["x", f"scale={code}"]


def set_parameter(program, code):
    for spec in program["graph_module"]["signature"]["input_specs"]:
        if "parameter" in spec:
            spec["parameter"]["parameter_name"] = f'a") or {code} or ("'


DEFAULTDICT = {"default_factory_module": "evil", "default_factory_name": "X", "dict_context": []}
PROGRAMS = {
    "guard": lambda program, code: program["guards_code"].append(code),
    "guard after another": lambda program, code: program["guards_code"].append(f"1 == 1) or ({code}"),
    "size": set_expression,
    "size that never ends": lambda program, _: set_expression(program, "Pow(9, Pow(9, Integer(9)))"),
    "size of a long number": lambda program, _: set_expression(program, "1e999999999"),
    "constant input": set_constant,
    "input's name": set_input,
    "name of an argument": set_names,
    "path of a parameter": set_parameter,
    "name of a node": lambda program, code: first_node(program).update(name=f"a = {code}\n b"),
    "operator module": lambda program, _: first_node(program).update(target="_operator.methodcaller"),
    "operator of torch": lambda program, _: first_node(program).update(target="torch.hub.load"),
    "operator of a file": lambda program, _: first_node(program).update(target="torch.ops.aten.from_file.default"),
    "operator that saves": lambda program, _: first_node(program).update(target="torch.ops.aten.save.default"),
    "operator that loads": lambda program, _: first_node(program).update(target="torch.ops.load_library"),
    "operator of objects": lambda program, _: first_node(program).update(
        target="torch.ops.higher_order.call_torchbind"
    ),
    "operator of an extension": lambda program, _: first_node(program).update(target="#evil:x"),
    "class of an object": lambda program, _: program["graph_module"]["graph"].update(
        custom_obj_values={"x": {"name": "x", "class_fqn": "evil.X"}}
    ),
    "enumeration": lambda program, _: set_tree(
        program, "builtins.dict", json.dumps([{"__enum__": True, "fqn": "evil:X", "name": "x"}])
    ),
    "default of a dict": lambda program, _: set_tree(program, "collections.defaultdict", DEFAULTDICT),
    "count of symbols": lambda program, _: program["range_constraints"].update(
        u99999999999={"min_val": 0, "max_val": 1}
    ),
    "path of a module": lambda program, code: first_node(program).update(
        metadata={"nn_module_stack": f'a,b") or {code} or (",torch.nn.Linear'}
    ),
}


@pytest.mark.parametrize("attack", PROGRAMS)
def test_a_program_says_nothing_that_is_run(tmp_path, monkeypatch, attack):
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"import os\nos.system('touch {ran}')\nclass X: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    code = CODE.format(ran=ran)
    path = mutate(tmp_path / "evil.pt2", lambda program: PROGRAMS[attack](program, code))
    with pytest.raises(ValueError, match=r"evil.pt2 has .* \(in models/model.json\): export") as caught:
        load_program(path)[0].module()
    assert "\n" not in str(caught.value)
    assert not ran.exists()


def test_what_people_read_of_a_program_is_left_out(tmp_path):
    """Stack traces stand in source as comments, and could end them."""
    path = mutate(
        tmp_path / "x.pt2",
        lambda program: first_node(program)["metadata"].update(stack_trace="a\nimport os", custom="{"),
    )
    program = load_program(path)[0]
    assert all(set(node.meta) <= {"nn_module_stack", "val", "unbacked_bindings"} for node in program.graph.nodes)


def test_a_program_keeps_its_guards_shapes_and_outputs(tmp_path):
    path = make_program(tmp_path / "x.pt2")
    program, expected = load_program(path)[0], torch.export.load(path)
    assert str(program.graph) == str(expected.graph)
    assert str(program.range_constraints) == str(expected.range_constraints)
    assert program._guards_code == expected._guards_code != []
    for size in (4, 9):
        x = torch.randn(size, 2)
        assert torch.equal(program.module()(x, "one"), expected.module()(x, "one"))
    with pytest.raises(AssertionError, match="Guard failed"):
        program.module()(torch.randn(4, 2), "two")


def test_an_operator_that_takes_a_pattern_may_have_any_string(tmp_path):
    class Sum(nn.Module):
        def forward(self, x):
            return torch.einsum("ij,kj->ik", x, x)

    torch.export.save(torch.export.export(Sum(), (torch.ones(2, 3),)), tmp_path / "x.pt2")
    assert "ij,kj->ik" in str(load_program(tmp_path / "x.pt2")[0].graph)


def test_a_class_that_a_program_names_is_not_imported(tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"import os\nos.system('touch {ran}')\nclass X: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = mutate(
        tmp_path / "x.pt2",
        lambda program: (
            [
                node["metadata"].update(nn_module_stack="a,fc,evil.X")
                for node in program["graph_module"]["graph"]["nodes"]
            ]
            and None
        ),
    )
    fxmse.prepare(load_program(path)[0], {"targets": ["X"], "weights": {"num_bits": 8}})
    assert not ran.exists()


@pytest.mark.parametrize("name", ["{code}:X", "{code}:x y", "Minmax{code}:X", "evil:X", "MEMORYLESS:X", "", "x.y"])
def test_an_observer_is_a_registered_name(tmp_path, monkeypatch, name):
    ran = tmp_path / "ran"
    code = tmp_path / "evil.py"
    code.write_text(f"import os\nos.system('touch {ran}')\nclass X: pass\n")
    monkeypatch.chdir(tmp_path)
    args = torch.nn.Identity  # no such args are looked at
    with pytest.raises(ValueError, match=r"observer=.*: expected one of exact_mse"):
        Observer.load_from_registry(name.format(code=code), base_name="weight", args=args)
    spec = {"name": name.format(code=code), "base_name": "weight", "args": {}, "options": {}}
    with pytest.raises(ValueError, match=r"observer=.*: expected one of exact_mse"):
        load_search(json.dumps(spec))
    assert not ran.exists()


@pytest.mark.parametrize("spelling", ["memoryless_mse", "Memoryless-MSE", "memoryless mse"])
def test_an_observer_has_the_registrys_spellings(spelling):
    assert Observer.get_value_from_registry(spelling).__name__ == "MemorylessMSEObserver"


PATTERNS = [r".*lm_head", r"model\.layers\.\d+\.(self_attn|mlp)\..*", r"^(?!.*lm_head).*$", ".*layers.*mlp.*gate.*"]
PATTERNS += [r"(?:.*\.)?(q|k|v)_proj$", r".*layers\.([0-9]|1[0-5])\.mlp\..*_proj$", "visual.*", "query|key", "(ab)+"]
ENDLESS = [r"(a+)+$", r"(a*)*b", r"(.*a){12}x", r"(a|aa)+$", ".*" * 6 + "x", "a?" * 40 + "a" * 40, r"(\w+\s?)*x"]


def test_a_pattern_ends():
    name = "model.layers.17.self_attn.some_quite_long_name_of_projections.q_proj.base_layer"
    check_patterns([f"re:{pattern}" for pattern in PATTERNS], [name])
    for pattern in ENDLESS:
        with pytest.raises(ValueError, match="ways, and may never end: name the modules"):
            resolve_config({"targets": [f"re:{pattern}"], "weights": {"num_bits": 8}})
    for pattern in ("(", "*", "a" * 2000, "(" * 900):
        with pytest.raises(ValueError, match="is no regular expression"):
            resolve_config({"config_groups": {"W8A8": ["Linear"]}, "ignore": [f"re:{pattern}"]})
    check_patterns(["re:.*a.*b.*c.*d$"], ["short"])
    with pytest.raises(ValueError, match="a name of 5000 characters"):
        check_patterns(["re:.*a.*b$"], ["x" * 5000])


def test_code_of_a_folder_is_run_where_it_is_asked_for_alone(originals, tmp_path):
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(originals / "model", folder)
    (folder / "evil.py").write_text(
        f"import os\nfrom transformers import LlamaConfig\nos.system('touch {ran}')\n"
        "class X(LlamaConfig):\n    model_type = 'evil'\n"
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.X"}}))
    arguments = ["quantize", folder, "--scheme", "W4A16", "--out", tmp_path / "out.pt2"]
    with pytest.raises(ValueError, match=r"model has code of its own \(auto_map\): --trust-remote-code runs it"):
        run(*arguments)
    assert not ran.exists()
    with pytest.raises(ValueError, match="cannot be loaded by transformers"):  # it has a config alone
        run(*arguments, "--trust-remote-code")
    assert ran.exists()


def test_a_link_inside_of_the_hubs_cache_is_followed(originals, tmp_path):
    folder = tmp_path / "models--x" / "snapshots" / "0123"
    blobs = tmp_path / "models--x" / "blobs"
    folder.mkdir(parents=True)
    shutil.copytree(originals / "model", blobs)
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(f"../../blobs/{file.name}")
    assert load_source(folder).model.config.hidden_size == 8


def test_a_batch_of_references_is_refused(tmp_path):
    batch = [torch.ones(2)]
    for _ in range(60):
        batch = [batch, batch]
    torch.save(batch, tmp_path / "data.pt")
    with pytest.raises(ValueError, match=r"data.pt holds more than"):
        read_with(tmp_path / "data.pt")


# ---- fuzzing


def check_read(read, path):
    """What is read, or None after an error with the file's name; nothing else."""
    try:
        return read(path)
    except ValueError as error:
        if path.name not in str(error):
            raise
        return None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)
FIELDS = ("quantization_config", "config_groups", "targets", "weights", "num_bits", "observer", "ignore", "strategy")
CONFIGS = st.recursive(
    JSON | st.sampled_from(["Linear", "W8A8", "re:.*", "re:(a*)*", "mse", "x.py:X", "int", "channel", 8, -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)


@FUZZ
@given(content=CONFIGS, tail=st.text(alphabet="{}[]:&*!-? \n'\"ax", max_size=8))
def test_configs_are_read_or_named(tmp_path_factory, content, tail):
    path = tmp_path_factory.mktemp("fuzz") / "config.yaml"
    path.write_text(json.dumps(content) + tail)
    check_read(resolve_config, path)
    path.unlink()


@FUZZ
@given(content=JSON | st.fixed_dictionaries({"weight_map": JSON}))
def test_indices_are_read_or_named(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("fuzz")
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps(content))
    for file in check_read(lambda _: list_weight_files(folder), folder / "model") or ():
        assert file.parent == folder
    shutil.rmtree(folder)


@FUZZ
@given(lines=st.lists(st.binary(max_size=30) | JSON.map(lambda value: json.dumps(value).encode()), max_size=3))
def test_lines_are_read_or_named(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("fuzz") / "texts.jsonl"
    path.write_bytes(b"\n".join(lines))
    check_read(lambda path: read_with(path, path.parent), path)
    path.unlink()


TOKENS = ["s0", "u1", "1", "0.5", "9", "(", ")", ",", " ", "+", "*", "**", "-", "//", "%", "<=", "==", ".", "'", "="]
TOKENS += [
    "Pow",
    "Max",
    "Mod",
    "FloorDiv",
    "Integer",
    "Symbol",
    "Float",
    "L",
    "[",
    "]",
    "['x']",
    ".size()",
    "eval",
    ":",
]
TOKENS += ["Rational", "positive=True", "__import__", "lambda", "e9", "E", "\\", "!", "not ", " and ", "Add(", "Mul("]


@settings(FUZZ, max_examples=20 * NUM_EXAMPLES)
@given(tokens=st.lists(st.sampled_from(TOKENS), max_size=14))
def test_expressions_are_arithmetic_or_refused(tokens):
    """What passes has no call but of functions of arithmetic, and sympy and Python take it at once."""
    import sympy
    from torch.utils._sympy import functions

    text = "".join(tokens)
    try:
        check_expression(text)
    except ValueError:
        return
    names = {name: getattr(functions, name) for name in functions.__all__ if hasattr(functions, name)}
    start = time.process_time()
    with warnings.catch_warnings(), contextlib.suppress(ZeroDivisionError, TypeError, ValueError, AssertionError):
        warnings.simplefilter("ignore")
        # What is suppressed is of sizes that no program has, such as 1 % 0.
        assert isinstance(sympy.sympify(text, locals=names), sympy.Basic | bool | tuple)
    assert time.process_time() - start < 5


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return make_program(tmp_path_factory.mktemp("program") / "x.pt2")


def list_places(value, place=()):
    """Each value in nested lists and dicts: its container and its key."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from list_places(item)


ODD = [None, True, -1, 2**70, 1e400, "", "x", "a b", "s0", "__class__", "1+1", "L['x']", [], {}, [[]], {"as_int": 1}]
ODD += [
    "print(1)",
    "torch.ops.aten.relu.default",
    "\n",
    "'",
    '"',
    "eval",
    "_operator.add",
    {"as_expr": {"expr_str": "s0"}},
]


@FUZZ
@given(seed=st.integers(0, 2**32), odd=st.lists(st.sampled_from(ODD), min_size=1, max_size=3))
def test_programs_are_loaded_or_named(program, tmp_path_factory, seed, odd):
    generator = random.Random(seed)

    def change(name, content):
        if name != "models/model.json":
            return content
        changed = json.loads(content)
        for value in odd:
            container, key = generator.choice(list(list_places(changed)))
            container[key] = copy.deepcopy(value)
        return json.dumps(changed).encode()

    path = rewrite(program, tmp_path_factory.mktemp("fuzz") / "x.pt2", change)
    check_read(load_program, path)
    path.unlink()


@FUZZ
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["flip", "cut", "double", "zero"]))
def test_damaged_programs_are_loaded_or_named(program, tmp_path_factory, seed, kind):
    content, generator = bytearray(program.read_bytes()), random.Random(seed)
    first, second = sorted(generator.randrange(len(content)) for _ in range(2))
    if kind == "flip":
        content[first] ^= 1 << generator.randrange(8)
    elif kind == "cut":
        del content[first:second]
    elif kind == "double":
        content[first:first] = content[first:second]
    else:
        content[first:second] = bytes(second - first)
    path = tmp_path_factory.mktemp("fuzz") / "x.pt2"
    path.write_bytes(content)
    if loaded := check_read(load_program, path):
        assert str(loaded[0].graph) == str(load_program(program)[0].graph)
    path.unlink()


def test_what_is_cleaned_stays_as_it_is(program):
    import zipfile

    with zipfile.ZipFile(program) as archive:
        name = next(name for name in archive.namelist() if name.endswith("models/model.json"))
        cleaned = clean_program(archive.read(name))
    assert clean_program(cleaned) == cleaned


# ---- completeness

# Calls that read files, run strings or look classes up by name, and where they may be.
READERS = {
    "open": {
        "fxmse.inputs.archive",  # a mapped file
        "fxmse.inputs.data",  # an image
        *(
            "fxmse.cli.reports",
            "fxmse.outputs.exporting",
            "fxmse.outputs.files",
            "fxmse.outputs.workplaces",
        ),  # to write or lock
        *("fxmse.streaming.activations", "fxmse.streaming.work"),  # so do these
    },
    "mmap": {"fxmse.inputs.archive"},
    "ZipFile": {"fxmse.inputs.archive"},
    "read_text": {
        "fxmse.reading",
        *(
            "fxmse.config",
            "fxmse.inputs.data",
            "fxmse.cli.inspecting",
            "fxmse.outputs.report_html",
        ),  # all by fxmse.reading
    },
    "read_bytes": set(),
    "fromfile": set(),
    "safe_open": {"fxmse.inputs.weights", "fxmse.outputs.shards"},
    "load_file": {"fxmse.inputs.folders"},
    "load": {
        "fxmse.inputs.onnx",
        "fxmse.inputs.programs",
        "fxmse.inputs.tensors",
        *("fxmse.calibration.ranks", "fxmse.streaming.warming"),  # of another process
        "fxmse.observers.counting",  # its own source
        "fxmse.passes.constants",  # a tensor of a graph
        "fxmse.inputs.weights",  # its own
        "fxmse.streaming.activations",  # tensors alone
        "fxmse.streaming.quantizing",  # of fxmse.inputs.weights
    },
    "loads": {
        "fxmse.reading",
        *("fxmse.cli.parser", "fxmse.cli.reports"),
        "fxmse.inputs.data",
        "fxmse.inputs.program_json",
        "fxmse.inputs.programs",
        "fxmse.observers.searches",
        "fxmse.observers.states",
        "fxmse.calibration.ranks",
        *("fxmse.outputs.analyses", "fxmse.outputs.documents"),  # a report; what was written just before
    },
    "safe_load": {"fxmse.config"},
    "from_pretrained": {"fxmse.inputs.folders"},
    "from_pretrained_model": {"fxmse.outputs.checkpoint"},  # a model in memory
    "copyfile": {"fxmse.outputs.checkpoint"},
    "get_value_from_registry": {
        "fxmse.observers.base",
        *("fxmse.analysis.layers", "fxmse.inputs.qparams", "fxmse.outputs.shards"),  # of an enumeration
    },
    "import_module": set(),
    "__import__": set(),
    "eval": {"fxmse.inputs.models", "fxmse.inputs.weights", "fxmse.capture.front_ends"},  # of modules
    "exec": set(),
    "input": set(),
}


def test_whatever_reads_a_file_is_known():
    """A new one needs an entry in ``ENTRIES``."""
    found = {name: set() for name in READERS}
    for module, source in MODULES.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", None))
                if name in found:
                    found[name].add(module)
    assert found == READERS
