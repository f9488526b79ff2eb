"""The page: what it says, that it asks for nothing, and that a browser draws its charts."""

import dataclasses
import functools
import html
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import embedport
from embedport.texts.samples import Pair, Sample
from embedport.validation.charts import POINTS, choose_points
from embedport.validation.details import Details
from embedport.validation.layers import LayerError
from embedport.validation.machine import Machine
from embedport.validation.mteb_scores import TaskReport, TaskRow
from embedport.validation.page import render
from embedport.validation.report import Comparison, Gate, Report, Worst
from embedport.validation.retrieval import RetrievalReport, RetrievalRow

EVIL = "<script>alert(1)</script><img src=https://example.org/x.png> \"'&{{ 7 * 7 }}"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
SERIES_0 = (0x00, 0x67, 0xA5)
MEASURE = """
<script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument;
    const box = each => {
      const {left, right, width, height} = each.getBoundingClientRect();
      return {left, right, width, height};
    };
    return {
      asked: frame.clientWidth,
      width: page.documentElement.scrollWidth,
      figures: [...page.querySelectorAll("svg")].map(box),
      marks: [...page.querySelectorAll("svg use")].filter(each => box(each).width > 0).length,
      text: [...page.querySelectorAll("svg text")].map(each => box(each).height),
      verdict: page.querySelector("strong").textContent,
      scripts: page.scripts.length,
    };
  });
  document.body.innerHTML = "";
  document.body.dataset.found = JSON.stringify(found);
});
</script>
"""


def a_report(task="embedding", retrieval=True, **changes):
    figures = {"mean score difference": 1e-7, "maximum score difference": 3e-7, "Kendall tau": 1.0}
    gates = [Gate("inputs with other token ids", 0, "≤", 0)]
    if task == "embedding":
        figures |= {"mean cosine": 0.9999, "minimum cosine": 0.9991}
        gates.append(Gate("minimum cosine", 0.9991, "≥", 0.999))
    gates.append(Gate("maximum score difference", 3e-7, "≤", 1e-4))
    gates.append(Gate("batch invariance", 0.99, "≥" if task == "embedding" else "≤", 0.99))
    values: dict[str, Any] = {
        "artifact": f"/models/{EVIL.replace('/', '')}",
        "precision": "fp16",
        "device": "cpu",
        "reference": "Qwen/Qwen3-Embedding-0.6B at abc",
        "library": "sentence-transformers 6.2.0",
        "task": task,
        "inputs": 40,
        "tokens": 1234,
        "longest": 456,
        "max_length": 8192,
        "gates": tuple(gates),
        "comparisons": (
            Comparison(
                "fp16, cuda", 0, 40, figures, {64: figures, 32: figures} if retrieval else {}
            ),
            Comparison("bf16, cuda", 1, 39, figures, {}),
        ),
        "invariance": {"equal-length batch": 1.0, "extra left padding": 0.99},
        "worst": tuple(Worst(f"text {i} ({EVIL})", 0.99, EVIL) for i in range(10)),
        "retrieval": a_retrieval(task) if retrieval else None,
        "versions": {"embedport": "0.1.0"},
        "date": "2026-01-02",
        "machine": Machine(
            EVIL,
            ("avx2", "fma"),
            "embedport's kernels for avx2",
            4,
            2**34,
            "Debian",
            "3.12",
            ("CPUExecutionProvider",),
        ),
        "exported": "another CPU (neon)",
        "next_steps": (),
    }
    return Report(**values | changes)


def a_retrieval(task):
    if task == "reranker":
        rows = [RetrievalRow("nDCG@10", None, 0.7, 0.69, 0.01, 0.002, 0.02)]
        return RetrievalReport(EVIL, 50, 500, "bf16, cuda", tuple(rows), before=0.61)
    rows = [
        RetrievalRow(measure, dim, 0.7 - 1 / dim, 0.7, -1 / dim, -1 / dim - 0.01, 0.01)
        for measure in ("nDCG@10", "R@100", "RR")
        for dim in (1024, 256, 32)
    ]
    return RetrievalReport(EVIL, 50, 500, "bf16, cuda", tuple(rows))


def some_details(task="embedding", **changes):
    generator = np.random.default_rng(0)
    distances = 10 ** generator.uniform(-9, -4, 40)
    scores = generator.uniform(0, 1, 400)
    values: dict[str, Any] = {
        "agreement": 1 - distances if task == "embedding" else distances,
        "reference_scores": scores,
        "artifact_scores": scores + 1e-3,
        "layers": tuple(LayerError(i, 90, 1e-4 * (i + 1), 2e-4 * (i + 1), 0.999) for i in range(5)),
        "artifact_files": {"onnx/model.onnx": "a" * 64},
        "reference_files": {"model.safetensors": "b" * 64},
        "command": f"embedport validate {EVIL}",
    }
    for name in ("agreement", "reference_scores", "artifact_scores"):
        values[name] = np.array(changes.pop(name, values[name]))
    return Details(**values | changes)


@functools.cache
def a_page(task="embedding", retrieval=True):
    return render(a_report(task, retrieval), some_details(task))


class Parsed(HTMLParser):
    """Elements and texts of a page."""

    def __init__(self, page):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.elements)


def test_tasks_of_mteb_are_on_the_page():
    row = TaskRow("STS17", "STS", "cosine_spearman", EVIL, "1", 250, 0.78, 0.79, -0.01, -0.02, 0.0)
    report = a_report(mteb=TaskReport("2.26", "bf16, cuda", (row,)))
    page = render(report, some_details())
    assert "<h2>MTEB</h2>" in page
    assert "MTEB 2.26, against the reference in bf16, cuda" in page
    cells = ("STS17: cosine_spearman", "250", "0.7800 (0.7900)", "-0.0100 (-0.0200 to +0.0000)")
    for cell in cells:
        assert f">{cell}</t" in page
        assert f"| {cell} |" in report.to_markdown()
    assert report.mteb is not None
    narrow = Console(width=80, file=io.StringIO(), record=True)
    narrow.print(report.tasks_table(report.mteb))
    assert {"cosine_spearman", "reference)", "(0.7900)"} <= {*narrow.export_text().split()}


def test_one_thing_is_in_the_singular():
    report = a_report(inputs=1)
    one_core = dataclasses.replace(report.machine, cores=1)
    words = dataclasses.replace(report, machine=one_core).to_markdown()
    assert "| 1 text, 1,234 tokens |" in words
    assert re.search(r", 1 core[, ]", words)
    assert "On 1 text the artifact" in render(report, some_details())


def test_an_artifact_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = a_report(artifact=".", retrieval=False)
    assert report.facts()["Artifact"] == f"{tmp_path.name}, fp16 on cpu"
    assert f"<title>{tmp_path.name}: holds</title>" in render(report, some_details())


def test_no_loss_is_zero():
    """-0.0 would stand in the manifest and on the hub."""
    same = [dataclasses.replace(row, difference=0.0) for row in a_retrieval("embedding").rows]
    report = dataclasses.replace(a_retrieval("embedding"), rows=tuple(same))
    assert str(report.ndcg_loss) == "0.0"


@pytest.mark.parametrize(
    ("task", "retrieval"),
    [
        ("embedding", True),
        ("reranker", False),
        pytest.param("embedding", False, marks=pytest.mark.slow),
        pytest.param("reranker", True, marks=pytest.mark.slow),
    ],
)
def test_the_page_in_order(task, retrieval):
    page = a_page(task, retrieval)
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    expected = ["Parity", "Each input", "Layer by layer"]
    expected += ["Retrieval"] if retrieval else []
    expected += ["Farthest from the reference", "Batch invariance", "How it was measured"]
    assert headings == expected
    assert page.index("verdict") < page.index("<h2>")
    parsed = Parsed(page)
    assert parsed.count("svg") == (5 if retrieval else 3)
    for tag, attributes in parsed.elements:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
    assert parsed.count("figcaption") == parsed.count("figure") == parsed.count("svg")
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert ("rings the reference (bf16, cuda)" in page) is retrieval
    for fact in ("Debian, Python 3.12", "16.0 GiB", "a" * 64, "b" * 64, "2026-01-02"):
        assert fact in page
    for fact in ("avx2, fma", "embedport's kernels for avx2", "another CPU (neon)"):
        assert fact in html.unescape(page)


def test_the_verdict_names_what_failed():
    gates = (
        Gate("minimum cosine", 0.98, "≥", 0.999, f"text 3 {EVIL}"),
        Gate("maximum score difference", math.nan, "≤", 0.01),
        Gate("batch invariance", 1.0, "≥", 0.999),
    )
    steps = (f"The error grows most in layer 3 {EVIL}.", "Next: `--precision int8-weight`.")
    report = a_report(gates=gates, invariance={"batches of 2": 1.0}, next_steps=steps)
    page = render(report, some_details())
    texts = " ".join("".join(Parsed(page).texts).split())
    assert (
        "Does not hold 2 of 3 gates fail on 40 texts against sentence-transformers 6.2.0." in texts
    )
    assert f"minimum cosine: 0.9800000, should be ≥ 0.9990000 (text 3 {EVIL})" in texts
    assert "maximum score difference: NaN, should be ≤ 0.0100000" in texts
    assert page.count('<tr class="failed">') == 2
    assert steps[0] in texts
    assert "<code>--precision int8-weight</code>" in page
    good = " ".join("".join(Parsed(a_page()).texts).split())
    held = "all 4 gates hold against sentence-transformers 6.2.0."
    assert f"✓ Holds On 40 texts the artifact stays within every limit: {held}" in good


def test_other_token_ids_leave_no_figures():
    report = a_report(
        gates=(Gate("inputs with other token ids", 2, "≤", 0, "text 5"),),
        comparisons=(),
        invariance={},
        retrieval=None,
    )
    nothing = {"agreement": (), "reference_scores": (), "artifact_scores": (), "layers": None}
    page = render(report, some_details(**nothing))
    assert "different tokens" in page
    assert "<svg" not in page
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Parity", "How it was measured"]


@pytest.mark.parametrize("task", ["embedding", "reranker"])
def test_a_page_asks_for_nothing_and_runs_nothing(task):
    page = a_page(task)
    parsed = Parsed(page)
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "link", "img", "image", "iframe", "object", "embed", "base", "a"}
    for _, attributes in parsed.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert (attributes.get(name) or "#").startswith("#")
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    assert "@import" not in page
    # What a text holds is shown as it is.
    assert EVIL in "".join(parsed.texts)
    assert "://" not in page.replace("https://example.org/x.png", "")
    assert "default-src 'none'" in page


def test_the_same_facts_give_the_same_bytes():
    first = render(a_report(), some_details())
    render(a_report("reranker", retrieval=False), some_details("reranker"))
    assert render(a_report(), some_details()) == first


def test_numbers_that_are_none_still_render():
    agreement = (math.nan, *[0.9999] * 39)
    lost = [LayerError(0, 90, 0.0, 0.0, 1.0), LayerError(1, 90, 1e-3, 2e-3, 0.99)]
    lost += [LayerError(i, 90, math.nan, math.nan, math.nan) for i in (2, 3)]
    report = a_report(worst=(Worst("text 0", math.nan, "a text"),))
    page = render(report, some_details(agreement=agreement, layers=tuple(lost)))
    assert "1 without a finite result are left out" in page
    assert "not finite from layer 2 on" in page
    first_row = page[page.index("Farthest from the reference</h2>") :]
    assert re.findall(r"<td>(.*?)</td>", first_row)[0] == "NaN"
    assert Parsed(page).count("svg") == 5


def test_a_figure_that_one_run_has():
    """Where it gave NaN, fewer inputs are compared, or none."""
    first, second = a_report().comparisons
    second = dataclasses.replace(second, figures={"Kendall tau": 1.0})
    table = a_report(comparisons=(first, second)).to_markdown()
    assert "| minimum cosine | 0.9991000 | not measured |" in table


def test_growth_is_of_layers_that_compare_as_many_tokens():
    """A graph that pools has last tokens only behind its last layer."""
    layers = [LayerError(i, 90, error, error, 0.9) for i, error in enumerate((0, 0.1, 0.11))]
    layers.append(LayerError(3, 8, 0.9, 0.9, 0.9))
    page = render(a_report(), some_details(layers=tuple(layers)))
    assert "only each text's last token is left (8)" in html.unescape(page)
    assert "It grows most, of those before it, in layer 1." in page


def test_nothing_but_nan_and_infinity():
    nothing = {
        "agreement": (math.nan, math.inf) * 20,
        "reference_scores": (),
        "artifact_scores": (),
        "layers": (LayerError(0, 90, math.nan, math.inf, math.nan),),
    }
    page = render(a_report("reranker", retrieval=False), some_details("reranker", **nothing))
    assert "There is no finite result to show" in page
    assert "<svg" not in page


def test_identical_results():
    """No distance has a logarithm, and all scores are one."""
    same = {
        "agreement": (1.0000000000000002,) * 40,
        "reference_scores": (0.5, 0.5),
        "artifact_scores": (0.5, 0.5),
        "layers": (LayerError(0, 90, 0.0, 0.0, 1.0), LayerError(1, 90, 0.0, 0.0, 1.0)),
    }
    page = render(a_report(retrieval=False), some_details(**same))
    assert Parsed(page).count("svg") == 2
    assert "median 0, worst 0" in page


def test_a_rotated_stream_is_explained():
    assert "stream of this graph is rotated" in render(a_report(), some_details(layers=()))
    assert "It was not measured." in render(a_report(), some_details(layers=None))


def test_of_many_points_the_farthest_are_drawn():
    x = np.linspace(0, 1, 50_000)
    y = x.copy()
    y[[17, 40_000]] += 0.3
    chosen = choose_points(x, y)
    assert len(chosen) == len(set(chosen.tolist())) == POINTS
    assert {17, 40_000} <= set(chosen.tolist())
    assert x[chosen].min() < 0.01
    assert x[chosen].max() > 0.99
    assert choose_points(x[:9], y[:9]).tolist() == list(range(9))


@pytest.mark.parametrize("task", ["embedding", pytest.param("reranker", marks=pytest.mark.slow)])
def test_validate_writes_a_page(folders, tmp_path, task):
    texts = [Sample("What is gravity?", "query")]
    texts += [Sample(f"{EVIL} {i} masses attract each other") for i in range(5)]
    pairs = [Pair("What is gravity?", sample.text) for sample in texts]
    inputs: dict[str, Any] = {"texts": texts} if task == "embedding" else {"pairs": pairs}
    made = folders(task)
    path = tmp_path / "report.html"
    report = embedport.validate(
        made.artifact,
        made.checkpoint,
        device="cpu",
        record=False,
        page=path,
        command=["embedport", "validate", "a folder"],
        **inputs,
    )
    page = path.read_text(encoding="utf-8")
    parsed = Parsed(page)
    assert report.passed
    assert parsed.count("svg") == 3
    assert parsed.count("script") == 0
    assert "embedport validate &#39;a folder&#39;" in page
    assert "after layer 2" in page
    scores = "5 similarities" if task == "embedding" else "6 probabilities"
    assert scores in page
    assert len(re.findall(r">[0-9a-f]{64}<", page)) == 3


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """A function (page, *flags) -> what the browser prints; its window is 1280 pixels wide."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)}")
    folder = tmp_path_factory.mktemp("browser")

    def run(page, *flags):
        path = folder / "page.html"
        path.write_text(page, encoding="utf-8")
        profile = f"--user-data-dir={folder / 'profile'}"
        window = "--window-size=1280,4000"
        return subprocess.run(
            [browser, *FLAGS, profile, window, *flags, path.as_uri()],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout

    return run


def measured(browse, page):
    """The page in frames as wide as a phone and as a screen, as the browser laid them out."""
    frames = (
        f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(page)}">'
        "</iframe>"
        for width in (360, 1280)
    )
    dom = browse(f"<!DOCTYPE html><body>{''.join(frames)}{MEASURE}", "--dump-dom")
    found = re.search(r'data-found="([^"]*)"', dom)
    assert found is not None, dom
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("task", ["embedding", pytest.param("reranker", marks=pytest.mark.slow)])
def test_a_browser_draws_the_charts(browse, task):
    phone, screen = measured(browse, a_page(task))
    assert (phone["asked"], screen["asked"]) == (360, 1280)
    for found in (phone, screen):
        assert found["width"] == found["asked"], "the page scrolls sideways"
        assert found["verdict"] == "✓ Holds"
        assert found["scripts"] == 0
        assert len(found["figures"]) == 5
        assert found["marks"] > 400  # the scatter's points
        for figure in found["figures"]:
            assert 0 <= figure["left"] < figure["right"] <= found["asked"]
            assert figure["height"] > figure["width"] / 2 > 150
        assert min(found["text"]) > 9, "too small to read"
    assert len({figure["left"] for figure in phone["figures"]}) == 1
    assert len({figure["left"] for figure in screen["figures"]}) == 2


def test_the_colors_of_the_charts_are_the_pages(browse, tmp_path):
    from matplotlib.image import imread

    path = tmp_path / "page.png"
    details = dataclasses.replace(some_details(), layers=None)
    browse(render(a_report(retrieval=False), details), f"--screenshot={path}")
    pixels = (imread(path)[..., :3] * 255).round()
    series = (np.abs(pixels - SERIES_0) <= 2).all(axis=2)
    rows, columns = np.nonzero(series)
    assert series.sum() > 2000
    assert columns.min() < 500
    assert columns.max() > 700
    assert rows.max() - rows.min() > 100
