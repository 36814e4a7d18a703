"""A report as a page and as JSON: its numbers against plain arithmetic, and the page in a real browser."""

import base64
import copy
import hashlib
import html.parser
import json
import math
import os
import re
import shutil

import pytest
import torch
from cases import ACTIVATION_ARGS, DYNAMIC_ARGS, WEIGHT_ARGS
from models import make_config
from torch import nn

import fxmse
from fxmse.outputs.depth import measure_depth
from fxmse.outputs.documents import make_document
from fxmse.outputs.pictures import NUM_BINS, NUM_FACTORS, PictureRecorder, list_levels
from fxmse.outputs.report_html import read_document, render_page
from fxmse.outputs.reporting import watch

IMAGE = "<img src=x onerror=hacked=1>"
SCRIPT = "</script><script>hacked=1</script>"


class Hostile(nn.Module):
    """Layers, some of which have names that would run if a page took them for markup."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 16)
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3)))
        self.add_module(IMAGE, nn.Linear(16, 16))
        self.add_module(SCRIPT, nn.Linear(16, 16))
        self.head = nn.Linear(16, 10)

    def forward(self, tokens):
        x = self.layers(self.embedding(tokens))
        return self.head(getattr(self, SCRIPT)(getattr(self, IMAGE)(x)))


class Analysis:
    """What ``write_report`` takes of a choice of schemes, and of the analysis in it."""

    def __init__(self, modules):
        self.modules = modules

    def to_dict(self):
        sites = [
            {"module": name, "role": "weight", "candidate": candidate, "model_error": error, "exact_error": None}
            for name in self.modules
            for candidate, error in (("W4A16", 0.02), (IMAGE, 0.001))
        ]
        analysis = {"unit": "nats", "sites": sites, "totals": {"W4A16": 0.5, IMAGE: 0.04}}
        return {
            "unit": "bits",
            "budget": 4.9,
            "size": 4.75,
            "error": 0.025,
            "gap": 0.0,
            "curve": [[4 + n / 4, 0.1 / (n + 1)] for n in range(9)],
            "chosen": dict.fromkeys(self.modules, IMAGE),
            "analysis": analysis,
        }


def quantize(model, config, batches):
    return fxmse.quantize(torch.fx.symbolic_trace(model.eval()), config, batches, progress=False)


@pytest.fixture(scope="module")
def hostile():
    batches = [torch.randint(0, 10, (4, 7)) for _ in range(3)]
    config = make_config(inputs={"num_bits": 8, "symmetric": False}, ignore=["head"])
    return quantize(Hostile(), config, batches), batches


@pytest.fixture(scope="module")
def page(hostile, tmp_path_factory):
    path = tmp_path_factory.mktemp("pages") / "report.html"
    quantized, batches = hostile
    code = quantized.code
    fxmse.write_report(quantized, batches, path, analysis=Analysis([IMAGE, "layers.0.0"]))
    assert quantized.code == code
    return path


# ------------------------------------------------------------------------------------------------------ its numbers


def picture_of(model, config, batches, role="weight"):
    sites = watch(quantize(model, config, batches), batches or None, PictureRecorder)
    return next(site for site in sites if site.role == role)


def test_levels_are_all_values_of_a_format():
    patterns = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    assert list_levels("float8") == patterns[patterns.isfinite()].unique().tolist()
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert list_levels("float4") == [-level for level in positive[:0:-1]] + positive
    assert list_levels("float6") == sorted(
        {sign * (m / 8 + (e > 0)) * 2 ** max(e - 1, 0) for sign in (-1, 1) for e in range(4) for m in range(8)}
    )
    assert list_levels("int3") == list(range(-4, 4))
    assert list_levels("int16") == []


def round_to_nearest(value, levels):
    return min(levels, key=lambda level: abs(level - value))


def measure_by_hand(values, scales, zero_points, levels):
    """Noise over signal in dB, element by element."""
    noise = signal = 0.0
    for value, scale, zero_point in zip(values, scales, zero_points, strict=True):
        grid = round_to_nearest(value / scale + zero_point, levels)
        noise += ((grid - zero_point) * scale - value) ** 2
        signal += value**2
    return 10 * math.log10(noise / signal)


def test_a_picture_of_one_scale_is_what_its_elements_say():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(20, 16), torch.full((1, 16), 9.0)])
    inputs = {"num_bits": 4, "symmetric": False, "observer": "mse"}
    model = nn.Sequential(nn.Linear(16, 8))
    quantized = quantize(model, make_config(inputs=inputs), [x])
    site = next(site for site in watch(quantized, [x, x[:3]], PictureRecorder) if site.role == "input")
    picture, state = site.picture, quantized.state_dict()
    scale, zero_point = state["0.input_scale"].item(), state["0.input_zero_point"].item()
    values = torch.cat([x, x[:3]]).double().flatten().tolist()
    assert (picture.num_elements, picture.num_shown, len(picture.counts)) == (24 * 16, 24 * 16, NUM_BINS)
    assert (picture.scale, picture.zero_point) == (scale, zero_point)
    assert picture.edges == pytest.approx((min(values), 9.0), rel=2**-10)
    step = (picture.edges[1] - picture.edges[0]) / NUM_BINS
    places = [min(NUM_BINS - 1, max(0, int((value - picture.edges[0]) / step))) for value in values]
    # Of float32 values 9 bits of the mantissa are counted: one at a bar's edge may count for its neighbour.
    assert sum(picture.counts) == len(values)
    assert sum(abs(picture.counts[bar] - places.count(bar)) for bar in range(NUM_BINS)) <= 0.05 * len(values)
    assert picture.chosen == pytest.approx((scale * (-8 - zero_point), scale * (7 - zero_point)))
    low, high = min(values), 9.0
    assert picture.minmax == pytest.approx((low, high), abs=(high - low) / 15)
    assert picture.minmax_factor == pytest.approx((high - low) / 15 / scale, rel=1e-5)
    levels = list(range(-8, 8))
    for place in (0, 7, NUM_FACTORS - 1):
        factor = picture.factors[0] * (picture.factors[1] / picture.factors[0]) ** (place / (NUM_FACTORS - 1))
        expected = measure_by_hand(values, [scale * factor] * len(values), [zero_point] * len(values), levels)
        assert picture.errors[place] == pytest.approx(expected, abs=0.05)
    minmax_scale = (high - low) / 15
    minmax_zero = round(-8 - low / minmax_scale)
    expected = measure_by_hand(values, [minmax_scale] * len(values), [minmax_zero] * len(values), levels)
    assert picture.minmax_error == pytest.approx(expected, abs=0.05)
    assert picture.error == pytest.approx(-site.sqnr, abs=0.05)


def test_a_picture_of_several_scales_is_in_steps_of_each():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    weights = {"num_bits": 4, "strategy": "group", "group_size": 8}
    quantized = quantize(model, make_config(weights=weights), [])
    (site,) = watch(quantized, None, PictureRecorder)
    weight, scale = model[0].weight.detach().double(), quantized.state_dict()["0.weight_scale"].double()
    each = scale.repeat_interleave(8, 1).flatten().tolist()
    steps = (weight / scale.repeat_interleave(8, 1)).flatten()
    picture = site.picture
    assert picture.scale is None
    assert picture.chosen == (-8, 7)
    assert picture.edges == pytest.approx((steps.min().item(), steps.max().item()), rel=1e-5)
    step = (picture.edges[1] - picture.edges[0]) / NUM_BINS
    places = [min(NUM_BINS - 1, int((value - picture.edges[0]) / step)) for value in steps.tolist()]
    assert sum(abs(picture.counts[bar] - places.count(bar)) for bar in range(NUM_BINS)) <= 2  # float32's rounding
    minmax = (weight.unflatten(1, (2, 8)).abs().amax(-1) / 7.5).repeat_interleave(8, 1).flatten()
    levels, zeros = list(range(-8, 8)), [0] * weight.numel()
    values = weight.flatten().tolist()
    assert picture.minmax_error == pytest.approx(measure_by_hand(values, minmax.tolist(), zeros, levels), abs=1e-3)
    assert picture.minmax_factor == pytest.approx(
        (minmax / scale.abs().repeat_interleave(8, 1).flatten()).mean().item(), rel=1e-4
    )
    assert picture.error == pytest.approx(measure_by_hand(values, each, zeros, levels), abs=1e-3)
    halved = [scale * picture.factors[0] for scale in each]
    assert picture.errors[0] == pytest.approx(measure_by_hand(values, halved, zeros, levels), abs=1e-3)
    # 4 bits an element, and 16 scales of float32.
    assert (site.num_elements, site.num_bytes, site.num_float_bytes) == (128, 64 + 16 * 4, 512)


def test_a_picture_of_a_dynamic_value_counts_every_token():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(40, 16), 1000 * torch.randn(1, 16)])  # one token has all of the error
    inputs = {"num_bits": 4, "strategy": "token", "dynamic": True}
    quantized = quantize(nn.Sequential(nn.Linear(16, 8)), make_config(inputs=inputs), [x])
    site = next(site for site in watch(quantized, [x[:7], x[7:]], PictureRecorder) if site.role == "input")
    picture, scale = site.picture, x.double().abs().amax(1, keepdim=True) / 7.5
    steps = (x / scale).flatten()
    assert (picture.num_elements, picture.num_shown, picture.scale) == (41 * 16, 41 * 16, None)
    assert picture.edges == pytest.approx((steps.min().item(), steps.max().item()), rel=2**-9)
    assert (picture.minmax, picture.minmax_error, picture.chosen) == (None, None, (-8, 7))
    levels, values = list(range(-8, 8)), x.flatten().tolist()
    for place in (0, NUM_FACTORS - 1):
        scales = (scale * picture.factors[0 if place == 0 else 1]).expand_as(x).flatten().tolist()
        expected = measure_by_hand(values, scales, [0] * len(values), levels)
        assert picture.errors[place] == pytest.approx(expected, abs=0.05)


def test_some_rows_tell_the_error_of_all():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 2048))
    model[0].weight.data *= torch.logspace(0, 1, 2048)[torch.randperm(2048)][:, None]
    model[0].weight.data[1999] *= 100
    for weights in ({"num_bits": 8, "strategy": "channel"}, {"num_bits": 4, "strategy": "group", "group_size": 32}):
        site = picture_of(model, make_config(weights={**weights, "observer": "static_minmax"}), [])
        assert site.picture.num_shown < site.picture.num_elements
        assert site.picture.error == pytest.approx(-site.sqnr, abs=0.1)
        assert sum(site.picture.counts) == pytest.approx(site.picture.num_elements, rel=1e-3)
        assert site.picture.minmax_error == site.picture.error


FORMATS = {
    **{f"weight {name}": ("weight", args) for name, args in WEIGHT_ARGS.items()},
    **{f"input {name}": ("input", args) for name, args in {**ACTIVATION_ARGS, **DYNAMIC_ARGS}.items()},
}


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_the_error_of_the_chosen_scale_is_the_reports(name):
    role, args = FORMATS[name]
    torch.manual_seed(0)
    x = torch.randn(4, 6, 128) * torch.logspace(-1, 1, 24).view(4, 6, 1)
    model = nn.Sequential(nn.Linear(128, 96))
    own = {"weights": {**args.model_dump()}} if role == "weight" else {"inputs": {**args.model_dump()}}
    site = picture_of(model, make_config(**own), [x, x * 1.1], role)
    picture = site.picture
    assert picture.error == pytest.approx(-site.sqnr, abs=0.05)
    if picture.minmax_factor is None:
        assert args.dynamic
    else:
        # Ratios are averaged over elements here, over scales there; the last block of rows may be cut off.
        assert 1 / picture.minmax_factor == pytest.approx(site.range_ratio, rel=0.25)


def test_min_max_of_an_mx_format_is_a_power_of_two():
    weights = {**WEIGHT_ARGS["mxfp4"].model_dump(), "observer": "static_minmax"}
    picture = picture_of(nn.Sequential(nn.Linear(64, 32)), make_config(weights=weights), []).picture
    assert picture.minmax_factor == 1
    assert picture.minmax_error == picture.error


class Depth(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return x


@pytest.mark.parametrize("bias_correction", [False, True])
@torch.no_grad()
def test_the_error_along_the_depth_is_that_of_the_two_models(bias_correction):
    model, x = Depth().eval(), torch.randn(64, 32) + 0.5
    config = make_config(weights={"num_bits": 3, "strategy": "channel"})
    observed = fxmse.calibrate(fxmse.prepare(model, config, x, bias_correction=bias_correction), [x], progress=False)
    quantized = fxmse.convert(observed, progress=False)
    state = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    points = measure_depth(quantized, x)
    assert all(torch.equal(tensor, state[name]) for name, tensor in quantized.state_dict().items())
    rounded = copy.deepcopy(model)
    for number, layer in enumerate(rounded.layers):
        scale = state[f"layers.{number}.weight_scale"]
        layer.weight.data = (layer.weight / scale).round().clamp(-4, 3) * scale
        layer.bias.data = state[f"layers.{number}.bias"]
    outputs, expected = [x, x], []
    for own, other in zip(model.layers, rounded.layers, strict=True):
        a, b = own(outputs[0]), other(outputs[1])
        expected.append(10 * math.log10(a.double().square().sum() / (b - a).double().square().sum()))
        outputs = [a.relu(), b.relu()]
    assert [point.module for point in points] == [f"layers.{number}" for number in range(4)]
    assert [point.sqnr for point in points] == pytest.approx(expected, abs=1e-3)


def test_what_stays_in_float_is_listed_with_its_reason():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.first, self.head = nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8)
            self.choice = nn.Linear(4, 4)

        def forward(self, x):
            x = self.first(self.embedding(x))
            x = nn.functional.linear(x, self.choice.weight * x.mean(), self.choice.bias)
            return self.head(x)

    with pytest.warns(UserWarning, match=r"left in float: choice \(no op of the graph that can be quantized reads"):
        quantized = fxmse.quantize(
            Model().eval(), make_config(ignore=["head"]), [torch.tensor([[1, 2]])], progress=False
        )
    document = make_document(quantized, None, {})
    reasons = {entry["name"]: entry["reason"] for entry in document["float"] if len(entry["shape"]) > 1}
    assert reasons == {
        "embedding.weight": "no target of the config names it",
        "choice.weight": "no op of the graph that can be quantized reads its weight",
        "head.weight": "on the config's ignore list",
    }
    assert document["left_in_float"][0] == ["choice", reasons["choice.weight"]]
    assert document["left_in_float"][1][1] == "its weight depends on the data, or the graph writes it"
    assert sum(entry["bytes"] for entry in document["float"]) == 4 * (32 + 16 + 32 + 4 + 4 + 8)
    assert document["sizes"] == [
        {"format": "int8 symmetric channel", "weights": 1, "elements": 16, "bytes": 16 + 4 * 4, "float_bytes": 64}
    ]
    assert (document["depth"], document["batches"]) == ([], 0)


# ------------------------------------------------------------------------------------------------------- its files


class Elements(html.parser.HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.contents, self.open = [], {}, None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open = len(self.tags) - 1 if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self.open = None

    def handle_data(self, data):
        if self.open is not None:
            self.contents[self.open] = self.contents.get(self.open, "") + data


def test_a_page_allows_its_own_script_and_nothing_else(page):
    text = page.read_text(encoding="utf-8")
    elements = Elements(text)
    names = [tag for tag, _ in elements.tags]
    assert names.count("script") == 2
    assert "img" not in names
    policy = next(attrs["content"] for _, attrs in elements.tags if "Content-Security" in attrs.get("http-equiv", ""))
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert len(elements.contents) == 3
    for place, content in elements.contents.items():
        tag, attrs = elements.tags[place]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert attrs.get("type") == "application/json" or f"{tag}-src 'sha256-{digest}'" in policy
    # The one address is a namespace.
    assert set(re.findall(r"(?:https?:)?//[\w.]+[^\s\"]*", text.partition('id="report"')[0])) == set()
    assert set(re.findall(r"https?://[^\s\"]*", text)) == {"http://www.w3.org/2000/svg"}


def test_the_page_and_the_json_say_the_same(hostile, page, tmp_path):
    quantized, batches = hostile
    fxmse.write_report(quantized, iter(batches), tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    shown = json.loads(read_document(page.read_text(encoding="utf-8"), page))
    own = ("seconds", "out", "analysis")
    assert {**data, **dict.fromkeys(own)} == {**shown, **dict.fromkeys(own)}
    assert data["batches"] == 3
    assert [site["sqnr"] for site in data["sites"]] == pytest.approx(
        [site.sqnr for site in fxmse.report(quantized, batches)], rel=1e-4
    )
    assert {IMAGE, SCRIPT} < {site["module"] for site in data["sites"]}
    assert data["config"]["ignore"] == ["head"]


def test_only_reports_are_replaced(hostile, tmp_path):
    quantized, _ = hostile
    with pytest.raises(ValueError, match=r"ends in \.html or \.json"):
        fxmse.write_report(quantized, None, tmp_path / "report.txt")
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    with pytest.raises(ValueError, match="a page that fxmse did not write"):
        fxmse.write_report(quantized, None, tmp_path / "mine.html")
    for _ in range(2):
        fxmse.write_report(quantized, None, tmp_path / "report.html")
    with pytest.raises(ValueError, match="has no report"):
        read_document("<p>mine</p>", tmp_path / "mine.html")


# -------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; only where none is installed, and not in CI, is nothing of it tested."""
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if "CI" not in os.environ:
        pytest.importorskip("selenium")
        if not (driver and chromium):
            pytest.skip("chromium and chromedriver are not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--force-prefers-reduced-motion",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    opened.set_script_timeout(20)
    yield opened
    opened.quit()


def show(browser, path, width=1440, height=900, hash=""):
    """Opens a page afresh and waits until its script is done."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
    )
    browser.get("about:blank")
    browser.get(f"{path.as_uri()}{hash}")
    browser.execute_async_script("const done = arguments[0]; requestAnimationFrame(() => setTimeout(done));")
    assert browser.execute_script("return document.documentElement.dataset.ready") == "true"


def check_console(browser):
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.hacked === undefined")


def find(browser, selector):
    """A selector's elements, once there are any: what follows a click may be drawn after the click is done."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20).until(lambda page: page.find_elements("css selector", selector))


def list_rows(browser):
    return browser.execute_script("""
        const rows = [...document.querySelectorAll('#values tbody tr')];
        return rows.map((row) => [...row.cells].map((cell) => cell.textContent));
    """)


def test_a_page_opens_with_the_worst_values_first(browser, page):
    show(browser, page)
    check_console(browser)
    data = json.loads(read_document(page.read_text(encoding="utf-8"), page))
    expected = sorted(data["sites"], key=lambda site: site["sqnr"])
    assert [(row[0], row[1]) for row in list_rows(browser)] == [(site["module"], site["role"]) for site in expected]
    assert browser.find_elements("css selector", "img") == []
    sections = [element.get_attribute("id") for element in find(browser, "main > section")]
    assert sections == ["summary", "values", "layers", "depth", "size", "mix", "float", "run"]
    assert IMAGE in browser.find_element("id", "layers").text
    mix = browser.find_element("id", "mix").text
    assert f"Modules: 2 in {IMAGE}." in mix
    assert "It is proven to be the least." in mix
    # The worst one is shown from the start, as there is room.
    assert expected[0]["module"] in browser.find_element("id", "detail").text


def test_values_sort_and_filter(browser, page):
    show(browser, page)
    module = find(browser, "#values thead button")[0]
    module.click()
    names = [row[0] for row in list_rows(browser)]
    assert names[0] != names[-1]
    assert find(browser, "#values th[aria-sort='ascending']")[0].text.startswith("Module")
    module.click()
    assert [row[0] for row in list_rows(browser)] == names[::-1]
    search = browser.find_element("id", "search")
    search.send_keys("LAYERS input")
    assert [row[:2] for row in list_rows(browser)] == [[f"layers.{n}.0", "input"] for n in (2, 1, 0)]
    assert browser.find_element("id", "count").text == "3 of 10 values"
    search.clear()
    search.send_keys("<img")
    assert {row[0] for row in list_rows(browser)} == {IMAGE}
    check_console(browser)


def test_a_value_is_shown_with_its_pictures(browser, page):
    show(browser, page)
    search = browser.find_element("id", "search")
    search.send_keys("onerror weight")
    find(browser, "#values tbody button")[0].click()
    detail = browser.find_element("id", "detail")
    assert IMAGE in detail.text
    assert browser.switch_to.active_element == detail
    labels = [picture.get_attribute("aria-label") for picture in find(browser, "#detail svg[role=img]")]
    assert [label.split(" of ")[0].split(":")[0] for label in labels] == ["Histogram", "Error against the scale"]
    for part in (".bars rect", "line.chosen", "line.minmax", "path.levels", "path.curve", ".dot-chosen", ".dot-minmax"):
        assert find(browser, f"#detail {part}"), part
    numbers = find(browser, "#detail details summary")[0]
    numbers.click()
    assert len(find(browser, "#detail details[open] tbody tr")) == 25  # of 64, the rest on request
    assert [row.text.endswith("chosen 0.001") for row in find(browser, "#detail > div:last-of-type tbody tr")] == [
        True,
        False,
    ]
    assert browser.execute_script("return location.hash").startswith("#value-")
    check_console(browser)


def test_keys_are_enough(browser, page):
    show(browser, page)
    press = browser.execute_script
    press("document.querySelector('.heat button[tabindex=\"0\"]').focus()")
    before = browser.switch_to.active_element.get_attribute("aria-label")
    browser.switch_to.active_element.send_keys("\ue014")  # right
    browser.switch_to.active_element.send_keys("\ue015")  # down
    assert browser.switch_to.active_element.get_attribute("aria-label") != before
    browser.switch_to.active_element.send_keys("\ue007")  # enter
    assert browser.switch_to.active_element.get_attribute("id") == "detail"
    press("document.querySelector('#depth svg[tabindex]').focus()")
    chart = browser.switch_to.active_element
    chart.send_keys("\ue014")
    chart.send_keys("\ue014")
    assert re.search(r"\d dB", find(browser, "#depth .readout")[0].text)
    chart.send_keys("\ue00c")  # escape
    assert "No value is chosen" in browser.find_element("id", "detail").text
    browser.find_element("tag name", "body").send_keys("/")
    assert browser.switch_to.active_element.get_attribute("id") == "search"


def test_every_picture_and_control_has_a_name(browser, page):
    show(browser, page)
    nameless = browser.execute_script("""
        const named = (node) => ['aria-label', 'aria-labelledby'].some((name) => node.getAttribute(name))
          || node.textContent.trim();
        return [...document.querySelectorAll('button, a, select, input, [role=img], th, section, table')]
          .filter((node) => !named(node)).map((node) => node.outerHTML);
    """)
    assert nameless == []
    hidden = "svg:not([role=img]):not([aria-hidden=true])"
    assert browser.find_elements("css selector", hidden) == []


@pytest.mark.parametrize("width", [390, 820, 1440])
def test_a_page_fits_every_width(browser, page, width):
    show(browser, page, width, hash="#value-1")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.find_element("id", "detail").is_displayed()
    bottom = browser.execute_script("return document.getElementById('detail').getBoundingClientRect().bottom")
    assert bottom <= 900
    if width < 1180:
        find(browser, "#detail .close")[0].click()
        assert not browser.find_element("id", "detail").is_displayed()
    check_console(browser)


def measure_contrasts(browser):
    """The least contrast of text that is shown, by the WCAG's formula, and where it is."""
    return browser.execute_script("""
        const parse = (colour) => (colour.match(/[\\d.]+/g) || []).map(Number);
        const linear = (c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
        const behind = (node) => {
          for (; node; node = node.parentElement) {
            const [r, g, b, a = 1] = parse(getComputedStyle(node).backgroundColor);
            if (a > 0.5) return [r, g, b];
          }
          return [255, 255, 255];
        };
        let worst = [99, ''];
        for (const node of document.querySelectorAll('body *')) {
          const isText = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
          if (!isText || !node.getClientRects().length || node.closest('svg')) continue;
          const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
          const contrast = (a + 0.05) / (b + 0.05);
          if (contrast < worst[0]) worst = [contrast, node.className + ' ' + node.textContent.slice(0, 40)];
        }
        return worst;
    """)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(browser, page, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    show(browser, page)
    assert browser.execute_script("return document.documentElement.dataset.theme") == scheme
    contrast, where = measure_contrasts(browser)
    assert contrast >= 4.5, where
    browser.find_element("id", "theme").click()
    assert browser.execute_script("return document.documentElement.dataset.theme") != scheme
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_thousand_values_are_small_and_open(browser, page, tmp_path):
    data = json.loads(read_document(page.read_text(encoding="utf-8"), page))
    sites = []
    for number in range(1000):
        site = copy.deepcopy(data["sites"][number % 10])
        letter = "abcdefghij"[number % 20 // 2]
        site["module"] = f"model.layers.{number // 40}.experts.{number % 40 // 20}.{letter}_projection"
        site["sqnr"] += number % 97 / 10
        site["picture"]["counts"] = [count * 1234 for count in site["picture"]["counts"]]
        sites.append(site)
    points = [{"module": site["module"], "sqnr": site["sqnr"]} for site in sites if site["role"] == "weight"]
    large = tmp_path / "large.html"
    large.write_text(render_page({**data, "sites": sites, "depth": points}), encoding="utf-8")
    assert large.stat().st_size < 2e6
    show(browser, large)
    assert len(list_rows(browser)) == 25
    find(browser, "#values .more button")[1].click()
    assert len(list_rows(browser)) == 1000
    browser.find_element("id", "search").send_keys("layers.7. weight")
    assert len(list_rows(browser)) == 20
    # Experts share a cell, which has the worst one's colour.
    cells = find(browser, "#layers tbody tr:first-child td button")
    shared = [site["sqnr"] for site in sites if site["module"].startswith("model.layers.0.experts")]
    worst = [min(pair) for pair in zip(shared[:20], shared[20:], strict=True)]
    assert [float(cell.text) for cell in cells] == pytest.approx(worst, abs=0.051)
    assert cells[0].get_attribute("aria-label").endswith("the worst of 2")
    check_console(browser)
