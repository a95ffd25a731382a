"""`python -m bench report`: the page says what the results say, and needs nothing but itself; tables fill their documents."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from result_files import PLAN, broken, noisy, result, row, written

from bench import drawing, figures, tables
from bench.__main__ import main
from bench.providers import PROVIDERS
from bench.report import claims, headline, page, plan_text

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))
NASTY = '<script>alert("x")</script> & $x_1$'
RATES = {"tflops": 700.0, "gb_per_s": 3000.0}


def times(ms: float) -> list[float]:
    return noisy(ms, ms=ms, spread=0.002)


def compared():
    """Two cases, on which blas is 2 and 4 times faster than eager, in a half and in a tenth of its memory."""
    return result(
        *(
            row(case, provider, times(ms), peak_memory_mb=memory)
            for case, provider, ms, memory in (
                ("x", "eager", 8.0, 100.0), ("x", "blas", 4.0, 50.0), ("y", "eager", 12.0, 100.0), ("y", "blas", 3.0, 10.0),
            )
        )
    )  # fmt: skip


def swept(axis: str, values, **changes):
    rows = [
        row(f"t{n}", provider, times(0.1 * n), **{axis: n}, **changes) for n in values for provider in ("eager", "blas")
    ]  # fmt: skip
    return result(*rows)


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects what a browser would ask for, the texts and the ids."""

    VOID = {"meta", "br"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.urls, self.texts, self.ids, self.tags = [], [], [], [], set()
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.urls += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


def test_the_page_needs_nothing_but_itself(tmp_path, capsys):
    path = tmp_path / "page.html"
    assert main(["report", *map(str, RESULTS), "--html", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    html = path.read_text(encoding="utf-8")
    found = Page(html)
    assert found.urls
    assert all(url.startswith("#") for url in found.urls)
    assert {"script", "link", "img"}.isdisjoint(found.tags)
    assert not re.findall(r"@import|url\((?!#)", html)
    assert len(found.ids) == len(set(found.ids))
    assert {url[1:] for url in found.urls} <= set(found.ids)
    for name in re.findall(r"url\(#([^)]+)\)", html):
        assert name in found.ids


def test_the_page_is_the_same_for_the_same_results():
    made = compared()
    assert page([made]) == page([made])
    assert str(ROOT) not in page([made])


def test_the_headline_is_best_median_and_worst():
    made = compared()
    (speed,), (memory,) = claims(made, "speed"), claims(made, "memory")
    assert (speed.ours, speed.peer, speed.mode) == ("blas", "eager", "forward")
    assert [x.case for x in (speed.best, speed.worst)] == ["y", "x"]
    assert (speed.worst.value, speed.best.value) == (pytest.approx(2, rel=0.02), pytest.approx(4, rel=0.02))
    assert speed.median == pytest.approx(3, rel=0.02)
    assert (memory.worst.value, memory.median, memory.best.value) == (2, 6, 10)
    html = page([made])
    assert re.search(r'<div class="card"><b>3\.0\d&times;</b>\s*the speed of eager, forward', html)
    assert re.search(r'<div class="card"><b>6\.00&times;</b>\s*peak memory of eager over ours, forward', html)


def test_what_is_slower_says_so_in_another_colour():
    made = result(row("x", "eager", times(4.0)), row("x", "blas", times(8.0)))
    assert re.search(r'<b class="below">0\.50&times;</b>', page([made]))
    assert 'class="below"' not in page([compared()])


def test_modes_are_not_mixed():
    made = result(
        *compared().rows, row("x", "eager", times(9.0), mode="training"), row("x", samples=times(3.0), mode="training")
    )
    assert [(claim.mode, len(claim.figures)) for claim in claims(made, "speed")] == [("forward", 2), ("training", 1)]


def test_kernels_that_ran_come_first():
    """Of a GPU that nobody has verified them on, `auto` says what blas does."""
    ours = ("blas", "auto", "triton", "cuda")
    made = result(*(row("x", name, times(4.0), ours=ours) for name in ("eager", *ours)))
    assert [claim.ours for claim in claims(made, "speed")] == ["triton", "cuda", "auto", "blas"]
    assert {claim.ours for claim in headline(made)} == {"triton"}
    wrong = [row("x", name, times(4.0), ours=ours) for name in ("eager", "auto", "blas")]
    made = result(*wrong, {**broken("wrong", case="x", provider="triton"), "plan": PLAN})
    assert made.ours == ["auto", "blas", "triton"]


def test_the_stack_is_called_what_it_is():
    made = result(*(row("x", name, times(4.0)) for name in ("eager", "stack", "blas")))
    called = "stack (what SCORE replaces)"
    assert Page(page([made])).texts.count(called) >= 3  # figures and rows
    assert f"the speed of {called}, forward" in page([made])
    assert f"<dt>stack</dt><dd>{PROVIDERS['stack'].about}</dd>" in page([made])
    head, *_ = tables.markdown(made).splitlines()
    assert f"| {called}, ms |" in head
    assert f"| {called} / blas |" in head


def test_the_error_is_shown_in_shares_of_what_the_row_says_it_may_be():
    (plot,) = (plot for plot in figures.plots(compared()) if plot.title == "How exact")
    (strict,) = (
        plot
        for plot in figures.plots(result(*({**r, "tolerance": 1e-9} for r in compared().rows)))
        if plot.title == "How exact"
    )
    assert "1000" in drawn(strict)[0]
    assert "1000" not in drawn(plot)[0]
    old = result(*({key: value for key, value in r.items() if key != "tolerance"} for r in compared().rows))
    assert "How exact" not in titles(old)


def test_rows_that_are_not_ok_are_listed_with_their_reason():
    made = result(
        row("x", "eager"), row("x"), broken("absent", "it needs a GPU", case="x", provider="triton"),
        broken("absent", "it needs a GPU", case="y", provider="triton"), broken("wrong", "off by a lot", case="y"),
        broken("failed", "it raised", case="z"),
    )  # fmt: skip
    html = page([made])
    listed = html[html.index("Not measured") : html.index("</table>", html.index("Not measured"))]
    assert re.findall(
        r'<tr class="new (.*?)"><td class="name">(.*?)</td><td>.*?</td><td>(.*?)</td><td>(.*?)</td></tr>', listed
    ) == [
        ("wrong", "blas", "off by a lot", "y forward"),
        ("failed", "blas", "it raised", "z forward"),
        ("absent", "triton", "it needs a GPU", "x forward, y forward"),
    ]
    assert "Not measured" not in page([compared()])


def test_a_result_in_which_nothing_was_measured_has_a_page():
    html = page([result(broken("absent", "it needs a GPU")), result(row("x", "eager"))])
    assert "Nothing of ours was measured next to a peer here." in html
    assert "it needs a GPU" in html


def test_text_from_a_file_is_text():
    made = result(
        row(NASTY, "eager", plan=None), row(NASTY), broken("failed", NASTY, case=NASTY, provider="late"), cpu=NASTY, name=NASTY
    )
    html = page([made, made])
    found = Page(html)
    assert "script" not in found.tags
    assert found.texts.count(NASTY) >= 6
    assert all(NASTY in drawn(plot)[0] for plot in (figures.speedups(made), figures.errors(made)))
    assert "<script" not in html


def test_plans_are_told_in_one_line():
    assert plan_text(None) == ""
    assert plan_text({"op": "mlp", "backend": "blas", "backward": "blas", "rows": 512, "chunk_rows": 0, "skipped": []}) == (
        "blas; rows 512"
    )
    plan = {"backend": "triton", "backward": "blas", "scratch_bytes": 3 << 20, "forward_tile": {"rows": 64, "shared": 0}}
    assert plan_text({**plan, "skipped": [["cuda", "not yet"]]}) == (
        "triton, backward blas; scratch 3.0 MiB; forward tile rows=64; not cuda: not yet"
    )
    halves = [["attention", plan], ["mlp", plan]]
    assert plan_text({"backend": "triton", "halves": halves, "skipped": []}) == "triton; halves attention and mlp"


def titles(made) -> list[str]:
    return [plot.title for plot in figures.plots(made)]


def test_figures_are_those_there_is_something_for():
    assert titles(compared()) == ["How many times faster than eager", "Rate against intensity", "How exact"]
    assert titles(result(broken("absent", "no GPU"))) == []
    made = swept("iterations", (1, 4, 16), mode="training", peak_memory_mb=8.0)
    assert titles(made)[3:] == ["Against T: mlp training float32, features 64, hidden 64, rows 1024"]
    assert titles(swept("rows", (64, 1024, 4096)))[3:] == [
        "Against rows: mlp forward float32, features 64, hidden 64, iterations 8"
    ]
    assert titles(swept("rows", (64, 1024)))[3:] == []
    mixed = result(*swept("rows", (64, 1024)).rows, *swept("rows", (4096,), features=128).rows)
    assert titles(mixed)[3:] == []


def test_a_provider_that_stands_in_is_in_the_sweep():
    """It computes a function of its own, with options of its own."""
    rows = swept("iterations", (1, 4, 16)).rows
    stack = [row(f"t{n}", "stack", times(0.2 * n), iterations=n, params={"L": n}) for n in (1, 4, 16)]
    made = result(*rows, *stack)
    (found,) = figures.sweeps(made, "iterations").values()
    assert sorted(r["provider"] for r in found) == 3 * ["blas"] + 3 * ["eager"] + 3 * ["stack"]


def drawn(plot) -> tuple[list[str], int]:
    """The texts of a figure, and how many marks it has in the colours of providers."""
    element = ElementTree.fromstring(plot.svg)
    marks = [
        use for use in element.iter("{http://www.w3.org/2000/svg}use") if any(c.lower() in str(use.attrib) for c in _hex())
    ]
    return ["".join(text.itertext()) for text in element.iter("{http://www.w3.org/2000/svg}text")], len(marks)


def _hex() -> list[str]:
    return list(drawing.COLOURS)


def test_a_figure_has_a_mark_for_every_row():
    made = compared()
    for plot, rows in zip(figures.plots(made), (2, 4, 4), strict=True):
        texts, marks = drawn(plot)
        providers = {"blas"} if rows == 2 else {"blas", "eager"}
        assert providers <= set(texts)
        assert marks == rows + len(providers)  # with those of the legend
    (_, _, _, sweep) = figures.plots(swept("iterations", (1, 4, 16), peak_memory_mb=8.0))
    texts, marks = drawn(sweep)
    assert {"time of a call, ms", "peak memory, MB", "16", "T"} <= set(texts)
    assert marks == 12 + 2


def test_a_provider_has_one_mark_on_a_page(monkeypatch):
    """A second result has fewer providers, and blas looks there as in the first."""
    on_page = []
    monkeypatch.setattr(figures, "plots", lambda made: on_page.append(made) or ())
    page([compared(), result(row("a", "blas", times(1.0)))])
    marks = [drawing.mark(made, "blas") for made in on_page]
    assert marks == 2 * [(drawing.COLOURS[1], drawing.MARKERS[1])]


def test_the_roof_is_what_was_measured():
    roofless, roofed = (figures.rooflines(made, made.rows) for made in (compared(), result(*compared().rows, rates=RATES)))
    assert "700 TFLOP/s in bfloat16 products, 3000 GB/s in copies" in roofed.caption
    assert "no roof" in roofless.caption
    assert ("roof" in drawn(roofed)[0], "roof" in drawn(roofless)[0]) == (True, False)
    assert 'id="roof"' not in roofless.svg
    # Three points: up along the memory's rate to the ridge, then level along that of the products.
    (line,) = re.findall(
        r'<g id="roof">\s*<path d="M ([\d.]+) ([\d.]+) \s*L ([\d.]+) ([\d.]+) \s*L ([\d.]+) ([\d.]+)', roofed.svg
    )
    x0, y0, x1, y1, x2, y2 = map(float, line)
    assert x0 < x1 < x2
    assert y0 > y1 == y2


def test_a_module_without_products_has_no_rate():
    module = {"op": "module", "hidden": None, "iterations": None, "params": {}, "flops": 0, "tflops": 0.0}
    made = result(*(row("m", name, times(4.0), **module) for name in ("eager", "blas")))
    assert titles(made) == ["How many times faster than eager", "How exact"]
    assert "m" in Page(page([made])).texts


def test_the_environment_is_told_as_far_as_it_is_known():
    clocks = {"before": {"sm_mhz": 1980, "throttling": "0x0"}, "after": None}
    found = Page(page([result(row(), gpu="a GPU", clocks=clocks, rates={"tflops": 712.3456, "gb_per_s": 3000.0})])).texts
    told = dict(pairwise(text for text in found if text))
    assert told["clocks"] == "before sm_mhz 1980, throttling 0x0"
    assert told["rates"] == "tflops 712.3, gb_per_s 3000"
    assert told["gpu"] == "a GPU"
    assert "driver" not in told


def test_colours_of_the_page_are_in_the_figures():
    for plot in figures.plots(compared()):
        assert not any(colour in plot.svg for colour in drawing.OF_THE_PAGE)
        assert "currentColor" in plot.svg


FILE = "bench/results/made.json"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "bench" / "results").mkdir(parents=True)
    written(tmp_path / FILE, compared())
    return tmp_path


def table(root: Path, options: str = "") -> list[str]:
    text = f"before\n<!-- table: {FILE}{options} -->\nold\n<!-- end -->\nafter\n"
    lines = tables.filled(text, root).splitlines()
    assert lines[:2] + lines[-2:] == ["before", f"<!-- table: {FILE}{options} -->", "<!-- end -->", "after"]
    return lines[2:-2]


def test_a_table_has_times_ratios_and_memory_by_default(root):
    head, _, x, y = table(root)
    assert head == "| case | eager, ms | blas, ms | eager / blas | eager, peak MB | blas, peak MB |"
    assert re.fullmatch(r"\| x, forward \| 8\.0 \| 4\.0 \| \*\*[12]\.\d\d\*\* \(.* to .*\) \| 100 \| 50\.0 \|", x)
    assert y.endswith("| 100 | 10.0 |")


def test_a_table_has_what_its_comment_asks_for(root):
    head, _, x, _ = table(root, " ours=eager peers=blas columns=ratio,error")
    assert head == "| case | blas / eager | eager, relative error | blas, relative error |"
    assert re.fullmatch(r"\| x, forward \| \*\*0\.(49|50)\*\* \(.*\) \| 1\.0e-06 \| 1\.0e-06 \|", x)
    assert table(root, " peers=eager columns=rate")[0] == "| case | eager, TFLOP/s | blas, TFLOP/s |"


def test_cells_of_what_was_not_measured_are_empty(root):
    rows = [*compared().rows, row("z", "eager"), broken("failed", "it raised", case="z"), row("w", "eager"), row("x", "other")]
    written(root / FILE, result(*rows))
    lines = table(root, " peers=eager columns=time,ratio,roofline")
    assert "| z, forward | 10.0 | - | - | - | - |" in lines
    assert "| w, forward | 10.0 | - | - | - | - |" in lines


def test_a_comment_that_makes_no_sense_is_said(root):
    for options, said in (
        (" ours=fast", "made: expected providers out of eager, blas, got fast"),
        (" peers=eager,slow", "expected providers out of eager, blas, got slow"),
        (" columns=speed", "expected columns out of time, memory, error, rate, roofline, ratio, got speed"),
        (" colums=time", f"{FILE}: expected options out of ours, peers, columns, got colums"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            table(root, options)


def test_markdown_fills_the_documents(root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    document = root / "doc.md"
    document.write_text(f"<!-- table: {FILE} -->\n<!-- end -->\n")
    assert main(["report", "--markdown", "doc.md"]) == 0
    assert "| x, forward | 8.0 |" in document.read_text()
    assert main(["report", "--markdown", "doc.md"]) == 0
    assert capsys.readouterr().out == "doc.md: written anew\ndoc.md: as it was\n"
    for arguments, said in (
        (["--markdown", "none.md"], "none.md: expected a Markdown document, got FileNotFoundError"),
        (["--html", "page.html", "doc.md"], "doc.md: expected a file written by `python -m bench run --json`"),
        ([FILE], "one of the arguments --html --markdown is required"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["report", *arguments])
        assert said in capsys.readouterr().err


def test_a_page_asks_for_what_it_needs(root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    monkeypatch.setattr("bench.report.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        main(["report", FILE, "--html", "page.html"])
    assert "--html: jinja2 and matplotlib not installed: pip install jinja2 matplotlib" in capsys.readouterr().err
