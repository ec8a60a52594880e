"""The report of a run: its page, its plots, odd and damaged runs."""

import html
import itertools
import json
import math
import re
from html.parser import HTMLParser

import pytest

from fusedlm.report import write_report
from fusedlm.report.assets import SCRIPT
from fusedlm.report.facts import header_facts
from fusedlm.report.svg import Inline
from fusedlm.report.text import clean, shortened

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def only_svg(monkeypatch):
    """Drawing takes most of the time."""
    monkeypatch.setattr("fusedlm.report.style.png", lambda figure: PNG)


@pytest.fixture
def not_drawn(monkeypatch):
    """For tests of text: captions come without drawing."""
    monkeypatch.setattr("fusedlm.report.style.inline", lambda *arguments: Inline(1, 1, "", [], [], []))


@pytest.fixture
def with_png(only_svg, monkeypatch):
    monkeypatch.undo()


class Checker(HTMLParser):
    """Collects the tags, sources and text of a page, and asserts that elements are closed in order."""

    VOID = {"meta", "img", "br", "link"}
    TEXTLESS = {"style", "script"}

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.tags, self.words, self.data, self.scripts = [], [], set(), [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        self.data += [(tag, dict(attributes))] if tag in ("figure", "svg") else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        if not self.open or self.open[-1] not in self.TEXTLESS:
            self.words.append(data)

    def svgs(self):
        """The drawings by class."""
        found = {}
        for tag, attributes in self.data:
            if tag == "svg":
                found.setdefault(attributes["class"], []).append(attributes)
        return found


def parse(path):
    checker = Checker()
    checker.feed(path.read_text(encoding="utf-8"))
    assert not checker.open
    checker.text = " ".join(checker.words)
    return checker


def curves(page) -> dict[str, list[dict[str, list]]]:
    """title of a plot -> of each of its axes, label -> [colour, x, y, texts] of what is shown under the pointer."""
    found = {}
    for (tag, figure), (_, svg) in itertools.pairwise(page.data):
        if tag == "figure" and "data-curves" in figure:
            axes = json.loads(figure["data-curves"])
            found[svg["aria-label"].partition(": ")[0]] = [{label: rest for label, *rest in one} for one in axes]
    return found


def colours(page) -> dict[str, list[dict[str, str]]]:
    """title of a plot -> of each of its axes, label -> colour."""
    return {
        title: [{label: rest[0] for label, rest in one.items()} for one in axes] for title, axes in curves(page).items()
    }


def drawings(source: str) -> dict[str, list[str]]:
    """title of a plot -> its drawings."""
    found = {}
    for svg in re.findall(r"<svg.*?</svg>", source, re.DOTALL):
        title = html.unescape(re.search(r'aria-label="(.*?)"', svg)[1]).partition(": ")[0]
        found.setdefault(title, []).append(svg)
    return found


def write_run(path, n=30, validate=True, **changes):
    """A run of n steps; `changes` maps a name to a function of the step."""
    path.mkdir(exist_ok=True)
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(1, n + 1):
            record = {
                "step": step,
                "loss": 3 + 4 / step,
                "lr": 1e-3,
                "grad_norm": 1 / step,
                "tokens": 100 * step,
                "tokens_per_second": 5000.0,
                "mfu": None,
                "peak_memory_bytes": 2**30,
                "loader_wait_seconds": 0.001,
                "step_seconds": 0.1,
            }
            record |= {name: value(step) for name, value in changes.items()}
            file.write(json.dumps(record) + "\n")
            if validate and step % 10 == 0:
                bpb = 2 + abs(step - 20) / 100
                record = {"step": step, "val_bpb": bpb, "val_nll_per_token": 3.0, "tokens": 100 * step}
                file.write(json.dumps(record) + "\n")
    return path


def test_a_full_run(tmp_path, with_png):
    stalls = {"checkpoint_seconds": lambda step: 0.5 if step % 10 == 1 else None}
    run = write_run(tmp_path / "run", mfu=lambda step: 0.456, **stalls)
    (run / "recipe.yaml").write_text("name: demo\ndescription: A small one.\n")
    split = {"normuon": ["blocks.0.mixer.out.weight", "blocks.0.ffn.down.weight"]}
    counts = {"total": 2500000, "active": 1200000}
    (run / "environment.json").write_text(json.dumps({"torch": "2.13.0", "parameters": counts, "optimizer": split}))
    (run / "sample.txt").write_text("My fellow citizens")
    path = write_report(run)
    assert path == run / "report.html"
    page = parse(path)
    for words in ("demo", "A small one.", "2.50 M", "1.20 M active", "2.0000", "2.1000", "5.00 k", "45.6%", "1.00%"):
        assert words in page.text
    for words in ("33.3%", "1.00 GiB", "3.00 k", "My fellow citizens", "2.13.0", "2 tensors"):
        assert words in page.text
    assert "blocks.0" not in page.text
    names = {"loss", "validation", "optimization", "throughput", "memory"}
    assert {plot.stem for plot in (run / "plots").iterdir()} == names
    pictures = [(run / f"plots/{name}.png").read_bytes() for name in names]
    assert all(picture.startswith(PNG) and len(picture) > 1000 for picture in pictures)
    assert {kind: len(found) for kind, found in page.svgs().items()} == {"full": 1, "narrow": 1, "half": 4}


def test_the_page_is_self_contained(tmp_path):
    """Nothing is loaded: no resource of the network, of the disk, or embedded."""
    run = write_run(tmp_path / "run")
    page = parse(write_report(run))
    assert all(source.startswith("#") for source in page.sources)
    assert not {"link", "img", "iframe", "object", "base"} & page.tags and len(page.scripts) == 1
    source = (run / "report.html").read_text()
    assert "http" not in source and "@import" not in source and not re.search(r"url\((?!#)", source)
    ids = re.findall(r' id="([^"]+)"', source)
    assert ids and len(set(ids)) == len(ids), "the ids of one drawing are not those of another"
    used = set(re.findall(r"url\(#([^)]+)\)", source)) | {link[1:] for link in page.sources}
    assert used == set(ids)


def test_reports_are_small(tmp_path):
    """A million steps take no more space than a few thousand."""
    few = write_report(write_run(tmp_path / "few", n=300)).stat().st_size
    many = write_report(write_run(tmp_path / "many", n=6000, loss=lambda s: 3 + math.sin(s))).stat().st_size
    assert few < 300_000 and many < 600_000


def test_colours_are_those_of_the_scheme(tmp_path):
    """Every colour of a plot is a variable, which has a value in both schemes."""
    source = write_report(write_run(tmp_path / "run", **ROUTED, loss_z=lambda step: 1 / step)).read_text()
    for svg in re.findall(r"<svg.*?</svg>", source, re.DOTALL):
        assert not re.search(r"#[0-9a-fA-F]{3,8}\b", re.sub(r"url\(#\w+\)|href=\"#\w+\"", "", svg))
        assert set(re.findall(r"var\(--([\w-]+)\)", svg)) >= {"ink", "line"}
    schemes = source.split("prefers-color-scheme: dark")
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w+);", scheme)) for scheme in schemes)
    assert set(re.findall(r"var\(--([\w-]+)\)", source)) <= light.keys() == dark.keys()
    assert all(light[name] != dark[name] for name in light)


def test_every_series_has_a_colour_of_its_own_under_the_pointer_and_in_the_drawing(tmp_path):
    run = write_run(tmp_path / "run", **ROUTED, loss_a=lambda step: 1 / step, loss_b=lambda step: 2 / step)
    with (run / "metrics.jsonl").open("a") as file:
        averages = '"val_bpb_ema": 1.9, "val_bpb_swa": 1.8'
        file.write(f'{{"step": 30, "val_bpb": 2.1, {averages}, "val_nll_per_token": 3, "tokens": 3000}}\n')
    path = write_report(run)
    found = colours(parse(path))
    levels = {"light": "raw", "blend": "c1", "full": "c0"}
    share = {"computed, each step": "raw", "computed": "c0", "budget": "soft-ink"}
    averages = {"moving average (ema)": "c1", "mean near the end (swa)": "c2", "weights as trained": "c0"}
    assert {title: found[title] for title in found if title not in ("Throughput", "Memory")} == {
        "Training and validation loss": [{"training, each step": "raw", "training": "c0", "validation": "c1"}],
        "Validation bits per byte": [averages],
        "Learning rate and gradient norm": [
            {"learning rate": "c0"},
            {"gradient norm, each step": "raw", "gradient norm": "c0"},
        ],
        "Losses of layers": [{"a": "c0", "b": "c1"}],
        "Levels of the routed feed-forward": [levels, share],
    }
    for title, svgs in drawings(path.read_text()).items():
        expected = {colour for axes in found[title] for colour in axes.values()}
        named = {label for axes in found[title] if len(axes) > 1 for label in axes if not label.endswith(", each step")}
        for svg in svgs:
            assert expected <= set(re.findall(r"stroke: var\(--([\w-]+)\)", svg)), title
            if title != "Learning rate and gradient norm":  # an axis names each of them
                assert all(f">{label}</text>" in svg for label in named), title


def test_values_under_the_pointer_are_those_of_the_run(tmp_path):
    run = write_run(tmp_path / "run", loss=lambda step: 3 + 4 / step)
    page = parse(write_report(run))
    figure = next(attributes for tag, attributes in page.data if tag == "figure")
    (curves,), (name,) = json.loads(figure["data-curves"]), json.loads(figure["data-labels"])
    by_name = {label: (xs, ys) for label, _, xs, ys, _ in curves}
    assert list(by_name) == ["training, each step", "training", "validation"] and name == "Tokens (thousands)"
    xs, ys = by_name["training, each step"]
    assert xs == pytest.approx([step / 10 for step in range(1, 31)])
    assert ys == pytest.approx([3 + 4 / step for step in range(1, 31)], abs=1e-4)
    assert by_name["validation"] == ([1.0, 2.0, 3.0], [3.0, 3.0, 3.0])
    drawn = page.svgs()
    for svg in (drawn["full"][0], drawn["narrow"][0]):
        (axes,) = json.loads(svg["data-axes"])
        left, top, width, height = axes["box"]
        _, _, right, bottom = map(float, svg["viewbox"].split())
        assert 0 < left < left + width <= right and 0 <= top < top + height < bottom
        assert axes["x"] == [0, 3, False] and axes["y"][0] < 3 < 7 <= axes["y"][1]


def test_training_and_validation_loss_are_in_one_plot_of_one_unit(tmp_path):
    """The axis holds both, also where they are far apart."""
    run = write_run(tmp_path / "run", loss=lambda step: 3.0)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "val_bpb": 2.1, "val_nll_per_token": 9.0, "tokens": 3000}\n')
    page = parse(write_report(run))
    assert "Training and validation loss" in page.text and "Loss (nats per token)" in page.text
    (axes,) = json.loads(page.svgs()["full"][0]["data-axes"])
    assert axes["y"][0] < 3.0 and axes["y"][1] > 9.0


def test_text_epochs_and_device_are_in_the_header(tmp_path, not_drawn):
    run = write_run(tmp_path / "run")
    (run / "recipe.yaml").write_text("name: a\ndata: {source: {type: text, path: some/where/corpus.txt}}\n")
    counts = {"documents": 1234, "bytes": 9_000_000, "tokens": 2500, "training_tokens": 2000, "held_out_bytes": 900_000}
    environment = {"device_name": "NVIDIA H100", "dtype": "bfloat16", "date": "2026-01-02T03:04:05", "data": counts}
    (run / "environment.json").write_text(json.dumps(environment))
    header = write_report(run).read_text().split("<header>")[1].split("</header>")[0]
    for words in (
        "corpus.txt, 1,234 documents, 9 MB, 2.50 k tokens, 10.0% of the bytes held out",
        "1.5: 3.00 k tokens read of 2.00 k for training",
        "NVIDIA H100, bfloat16",
        "2026-01-02",
    ):
        assert f"<dd>{words}</dd>" in header, words


ODD_COUNTS = [None, [], {"bytes": "x", "training_tokens": -1}, {"documents": True}, {"tokens": math.inf}]


@pytest.mark.parametrize("data", ODD_COUNTS)
def test_a_header_of_odd_counts(data):
    assert header_facts({}, {"device_name": "CPU", "data": data}, 100.0) == [("Device", "CPU")]


def test_tables_scroll_in_their_box(tmp_path, not_drawn):
    run = write_run(tmp_path / "run")
    (run / "environment.json").write_text('{"a": "b"}')
    source = write_report(run).read_text()
    assert source.count("<table") == source.count('<div class="scroll" tabindex="0"><table') == 2


def test_everything_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>&\"<img src=http://example.com> $\\frac{1}{$ \U0001f600"
    run = write_run(tmp_path / "run", **{f"loss_{evil}": lambda step: 1 / step})
    (run / "recipe.yaml").write_text(json.dumps({"name": evil, "description": evil}))
    (run / "environment.json").write_text(json.dumps({evil: evil, "nested": {evil: [evil]}}))
    (run / "sample.txt").write_text(evil)
    page = parse(write_report(run))
    assert page.scripts == [SCRIPT] and not any("example.com" in source for source in page.sources)
    assert not {"img", "b"} & page.tags
    assert page.text.count(evil) >= 6
    assert shortened(evil, 40) in page.text  # the legend
    assert html.escape(evil) in (run / "report.html").read_text()


@pytest.mark.parametrize("n", [1, 2, 19, 20])
def test_short_runs_without_validation(tmp_path, n):
    page = parse(write_report(write_run(tmp_path / "run", n=n, validate=False)))
    assert "No validation is recorded." in page.text
    assert f"in {n} steps" in page.text or n == 1
    assert len(page.svgs()["half"]) == 3 and "Training loss" in page.text


ROUTED = {
    "routed_light": lambda step: 0.5,
    "routed_blend": lambda step: 0.2,
    "routed_full": lambda step: 0.3,
    "routed_flops_share": lambda step: 0.4 + 1 / step,
    "routed_budget": lambda step: 0.45,
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [1, 30])
def test_levels_of_routing_are_shown_if_a_run_has_them(tmp_path, n):
    run = write_run(tmp_path / "run", n=n, **ROUTED)
    with (run / "metrics.jsonl").open("a") as file:
        record = {"step": n, "val_bpb": 2.1, "tokens": 100 * n, "val_routed_flops_share": 0.4567}
        file.write(json.dumps(record) + "\n")
    page = parse(write_report(run))
    assert "50.0% light, 20.0% blended, 30.0% full" in page.text and "45.7%" in page.text
    assert (run / "plots/routing.png").is_file()
    write_run(run, n=n)
    assert "Feed-forward FLOPs" not in parse(write_report(run)).text


MOE = {
    "moe_entropy": lambda step: 0.987,
    "moe_max_load": lambda step: 1 + 2 / step,
    "moe_dead": lambda step: 3,
    "moe_layers": lambda step: [[0.99, 1.0, 0], [0.9, 1 + 2 / step, 3]],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [1, 30, 200])
def test_loads_of_experts_are_shown_if_a_run_has_them(tmp_path, n):
    run = write_run(tmp_path / "run", n=n, **MOE)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": n, "val_bpb": 2.1, "tokens": 100 * n, "val_moe_max_load": 1.234}) + "\n")
    page = parse(write_report(run))
    assert f"At the end {1 + 2 / n:.2f} in the worst layer" in page.text and "Highest expert load 1.23" in page.text
    assert "98.7% of its maximum, 3 experts without a token" in page.text
    assert (run / "plots/expert_loads.png").is_file()
    for svg in drawings((run / "report.html").read_text())["Loads of experts"]:
        assert not re.search(r"#[0-9a-fA-F]{6}\b", re.sub(r"url\(#\w+\)|href=\"#\w+\"", "", svg))
        assert len(re.findall(r"fill: var\(--c1\); opacity: 0.07", svg)) == 2, "the even layer, and the legend"
    write_run(run, n=n)
    assert "Loads of experts" not in parse(write_report(run)).text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [1, 30])
def test_losses_of_layers_are_shown_if_a_run_has_them(tmp_path, n):
    late = {"loss_other": lambda step: None if step < 5 else -2.0}
    run = write_run(tmp_path / "run", n=n, loss_routed_budget=lambda step: 0.1 / step, **late)
    assert "Losses of layers" in parse(write_report(run)).text
    assert (run / "plots/layer_losses.png").is_file()
    plain = write_run(tmp_path / "plain", n=n, loss_other=lambda step: None)
    assert "Losses of layers" not in parse(write_report(plain)).text
    assert not (plain / "plots/layer_losses.png").exists()


def test_window_and_stride_of_validations_are_shown(tmp_path, not_drawn):
    run = write_run(tmp_path / "run")
    assert "Stride" not in parse(write_report(run)).text

    def validate(step: int, stride: int) -> str:
        with (run / "metrics.jsonl").open("a") as file:
            record = {"step": step, "val_bpb": 2.5, "tokens": 100 * step, "val_window": 1024, "val_stride": stride}
            file.write(json.dumps(record) + "\n")
        return " ".join(parse(write_report(run)).text.split())

    for step in (10, 20, 30):
        text = validate(step, 512)
    assert "Held-out text (window 1024, stride 512); the best, 2.5000 at step 10" in text
    assert "Nats per token Window Stride 10 1,000 2.5000 – 1,024 512" in text
    text = validate(30, 256)
    assert "Held-out text; the best" in text, "strides differ"
    assert "30 3,000 2.5000 – 1,024 256" in text


ODD = {
    "shares without a budget": ROUTED | {"routed_budget": lambda step: None},
    "a share alone": {"routed_flops_share": lambda step: 1.3},
    "loads of layers alone": {"moe_layers": MOE["moe_layers"]},
    "loads without layers": MOE | {"moe_layers": lambda step: []},
    "loads of some steps": MOE | {name: lambda step: None if step < 9 else 2.0 for name in list(MOE)[:3]},
    "nothing but the loss": {
        name: lambda step: None
        for name in ("lr", "grad_norm", "tokens_per_second", "peak_memory_bytes", "loader_wait_seconds", "step_seconds")
    },
    "no finite loss": {"loss": lambda step: None, "skipped": lambda step: True},
    "constant loss": {"loss": lambda step: 2.0},
    "loss zero": {"loss": lambda step: 0.0},
    "a huge spike": {"loss": lambda step: 1e300 if step == 15 else 3.0 + 1 / step},
    "gradient norm zero": {"grad_norm": lambda step: 0.0},
    "gradient norms far apart": {"grad_norm": lambda step: 10.0 ** (step - 15)},
    "no tokens yet": {"tokens": lambda step: 0},
    "trillions of tokens": {"tokens": lambda step: step * 10**12},
    "learning rate zero": {"lr": lambda step: 0.0},
    "no memory": {"peak_memory_bytes": lambda step: 0},
    "every other step skipped": {
        "loss": lambda step: None if step % 2 else 3.0,
        "skipped": lambda step: bool(step % 2),
    },
}


@pytest.mark.parametrize("changes", ODD.values(), ids=ODD)
@pytest.mark.filterwarnings("error")
def test_odd_runs_make_a_page(tmp_path, changes):
    page = parse(write_report(write_run(tmp_path / "run", **changes)))
    assert "nan" not in re.findall(r"[a-z]+", page.text)


def test_skipped_steps_are_named(tmp_path, not_drawn):
    run = write_run(tmp_path / "run", loss=lambda s: None if s in (4, 7) else 3.0, skipped=lambda s: s in (4, 7))
    page = parse(write_report(run))
    assert "2 steps were skipped because loss or gradient was not finite: 4, 7." in page.text


def test_a_spike_is_cut_off_and_mentioned(tmp_path, not_drawn):
    run = write_run(tmp_path / "run", n=100, loss=lambda step: 5000.0 if step == 50 else 3.0 + math.sin(step))
    assert "1 value lies above the plot, up to 5e+03" in parse(write_report(run)).text


def test_averaged_weights_are_shown_if_a_run_has_them(tmp_path, not_drawn):
    run = write_run(tmp_path / "run")
    assert "of ema weights" not in parse(write_report(run)).text
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "val_bpb": 2.1, "val_bpb_ema": 1.9123, "val_nll_per_token": 3, "tokens": 3000}\n')
    page = parse(write_report(run))
    assert "of ema weights" in page.text and "of swa weights" not in page.text and "1.9123" in page.text


def test_many_validations_are_folded(tmp_path, not_drawn):
    assert "details" in parse(write_report(write_run(tmp_path / "run", n=130))).tags


def test_an_incomplete_last_line_is_skipped(tmp_path, not_drawn):
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "loss": 2.')
    assert "in 30 steps" in parse(write_report(run)).text


def test_the_title_without_a_recipe_is_the_name_of_the_folder(tmp_path, not_drawn):
    assert "<h1>my-run</h1>" in write_report(write_run(tmp_path / "my-run")).read_text()


@pytest.mark.parametrize("recipe", [b"\xff\xfe", b"a: [", b"- 1", b"name: {a: b}", b"[" * 5000])
def test_a_damaged_recipe_does_not_prevent_the_report(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr("fusedlm.report.write.draw_plots", lambda history: [])
    run = write_run(tmp_path / "run")
    (run / "recipe.yaml").write_bytes(recipe)
    parse(write_report(run))


@pytest.mark.parametrize("environment", ['{"a": ', "[1]", "\0", "[" * 100_000])
def test_a_damaged_environment_is_named(tmp_path, environment):
    run = write_run(tmp_path / "run")
    (run / "environment.json").write_text(environment)
    with pytest.raises(ValueError, match=r"environment.json line 1.*remove the file") as caught:
        write_report(run)
    assert "\n" not in str(caught.value)


def test_names_that_are_not_valid_text_make_a_page(tmp_path):
    """YAML keeps the two halves of an escaped emoji apart, and control characters cannot be in a page."""
    run = write_run(tmp_path / "run", **{"loss_\ud800\x00": lambda step: 1 / step})
    (run / "recipe.yaml").write_text(json.dumps({"name": "\U0001f600 \ud800 \x1b[31m"}))
    assert "<h1>\U0001f600 \ufffd \ufffd[31m</h1>" in write_report(run).read_text(encoding="utf-8")
    assert clean("a\n\tb é") == "a\n\tb é"
    assert shortened("abcdefghij", 5) == "ab…ij" and shortened("abc", 3) == "abc"


def test_a_folder_without_a_run_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="not the folder of a run"):
            write_report(path)
    assert list(tmp_path.iterdir()) == []


def test_the_same_run_gives_the_same_bytes_and_replaces_the_old_page(tmp_path):
    run = write_run(tmp_path / "run")
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert sorted(p.name for p in run.iterdir()) == ["metrics.jsonl", "plots", "report.html"]
