"""The page of a run, read as HTML: what it says, what it must not hold, and where its numbers come from."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from made_run import HOSTILE, K, make_run

from megavar.cli import main
from megavar.data.store import read_part
from megavar.data.traces import TraceStore
from megavar.phases.sampling import answer_store
from megavar.report import charts, streamed, svg
from megavar.report.stored import StoredRun
from megavar.runs import Phase

VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    """Text by element, tags, and whether they nest."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())

    def count(self, tag: str, **attributes: str) -> int:
        return sum(t == tag and all(a.get(k) == v for k, v in attributes.items()) for t, a in self.tags)


def report(run: Path, *options: object) -> int:
    return main(["report", *map(str, (run, *options))])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made") / "run")


def test_page_of_a_run(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(whole, "--out", tmp_path / "r.html") == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == (f"{tmp_path / 'r.html'}\n", "")
    page = Page(tmp_path / "r.html")
    sections = {attributes["id"] for tag, attributes in page.tags if tag == "section"}
    assert sections == {"arms", "loss", "bound", "weights", "lengths", "gap", "time", "memory", "recipe"}
    titles = page.texts["figcaption"]
    assert titles[:3] == ["Loss of the arms", "Loss: initial/fit", "Loss: posterior/fit"]
    assert {"Bound L_k", "Implied question weight", "Weights: acc", "Effective sample size: gml"} < {*titles}
    assert {"Length: proposals/traces", "Trainer minus engine: proposals/posterior_scores"} < {*titles}
    # It needs nothing: no scripts, nothing to fetch, every picture has words.
    assert page.count("script") == 0
    assert not [a for _, a in page.tags if (a.get("src") or a.get("href") or "").startswith(("http", "//"))]
    assert all(a.get("aria-label") for tag, a in page.tags if tag == "svg")
    assert page.count("th", scope="row") >= 5
    assert any("acc: L_4 = -0.6 ± 0.05, finite for 90%" in text for text in page.texts["title"])
    # 2 GiB taken by a fit of a 4B model that was planned to take far more.
    assert page.texts["td"].count("2.00 GiB") == 4
    assert 'name = "made"' in page.texts["pre"][0]


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", name=HOSTILE, arms=("a",), warning=HOSTILE, reason=HOSTILE)
    assert report(run) == 0
    page = Page(run / "report.html")
    assert page.count("script") == page.count("img") == 0
    assert page.texts["h1"] == [HOSTILE]
    assert any(HOSTILE in text for text in page.texts["li"])


def test_unfinished_runs_say_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "early", until="initial/fit")
    assert report(run) == 0
    page = Page(run / "report.html")
    assert "1 of " in (status := " ".join(page.texts["span"])) and "in initial/fit" in status
    assert "No evaluation is finished yet." in page.texts["p"]
    assert "Nothing has been sampled yet." in page.texts["p"]
    assert page.texts["figcaption"][0] == "Loss: initial/fit", "its curve is there"

    run = make_run(tmp_path / "late", until="arms/gml/fit")
    assert report(run) == 0
    page = Page(run / "report.html")
    assert "So far" in page.texts["caption"][0]
    assert page.texts["th"][page.texts["th"].index("initial") :][:2] == ["initial", "acc"]
    assert any("arms/gml/fit" in text and "eval/gml/verdicts" in text for text in page.texts["p"])

    (run / "table.json").write_text("[]")
    assert report(run) == 2
    assert "table.json: not a table of arms" in capsys.readouterr().err


def test_what_is_no_run_is_refused(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(tmp_path) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: not a run directory: it has no recipe.toml\n"
    assert report(whole, "--out", tmp_path / "no/where.html") == 2
    assert capsys.readouterr().err.endswith("No such file or directory; set --out\n")


def test_stores_without_a_row_have_no_chart(tmp_path: Path) -> None:
    """As of answers where every thought was cut."""
    run = make_run(tmp_path / "run", until="initial/fit")
    phase = Phase(name="a", path=run / "proposals/answers", hash="", inputs={}, writer=True)
    (run / "proposals/answers").mkdir(parents=True)
    started = (run / "initial/fit/phase.json").read_text()
    (run / "proposals/answers/phase.json").write_text(started)
    answer_store(phase).write_part(0, [])
    assert report(run) == 0
    assert "Nothing has been sampled yet." in Page(run / "report.html").texts["p"]


def test_a_large_run_makes_a_small_page(tmp_path: Path) -> None:
    arms = tuple(f"arm-{n}" for n in range(12))
    run = make_run(tmp_path / "run", arms=arms, steps=1000, questions=200, parts=16)
    assert report(run) == 0
    assert (run / "report.html").stat().st_size < 2 << 20
    page = Page(run / "report.html")
    assert page.count("circle", **{"class": "speck"}) <= streamed.MAX_SPECKS
    assert page.count("path", **{"class": "curve s0 dashed"}) > 0, "the ninth arm is told from the first"


def test_histograms_are_those_of_the_stores(whole: Path) -> None:
    traces = list(TraceStore(whole / "proposals/traces/traces").iter_traces())
    found = streamed.lengths([whole / "proposals/traces/traces"], ["thought_ids", "answer_ids"])
    for reason in ("stop", "length"):
        lengths = [len(t.thought_ids) for t in traces if t.finish_reason == reason]
        assert found[reason].tolist() == np.bincount(lengths).tolist()
    edges = streamed.length_edges(60)
    expected = np.histogram([len(t.thought_ids) for t in traces if t.finish_reason == "stop"], edges + 0.5)[0]
    assert streamed.binned(found["stop"], edges) == expected.tolist()

    store = whole / "arms/acc/data/weights"
    rows = [
        row
        for part in streamed.parts_of(store)
        for b in read_part(part, ["normalised"], 256)
        for row in b["normalised"]
    ]
    shares = np.array([row.as_py() for row in rows]).reshape(-1, K)
    edges, counts = streamed.values(store, "normalised")
    assert counts == np.histogram(shares, edges)[0].tolist() and sum(counts) == shares.size
    edges, counts = streamed.effective_sizes(store, K)
    assert counts == np.histogram(1 / (shares**2).sum(1), edges)[0].tolist()


def test_specks_are_tokens_of_both_sides(whole: Path) -> None:
    place = whole / "proposals/traces/traces", whole / "proposals/posterior_scores/scores"
    first, again = streamed.gaps(*place), streamed.gaps(*place)
    assert 500 < len(first.engine) <= streamed.MAX_SPECKS
    assert np.array_equal(first.engine, again.engine) and np.array_equal(first.trainer, again.trainer)
    known = np.concatenate([t.thought_logprobs for t in TraceStore(place[0]).iter_traces() if t.closed])
    assert np.isin(first.engine, known).all()
    assert np.abs(first.trainer - first.engine).max() < 1e-5, "tokens of two traces would lie far apart"


def test_thin_curves_keep_their_extremes() -> None:
    values = np.random.default_rng(1).normal(size=10_000)
    points = [svg.Point(x=x, y=y) for x, y in enumerate(values.tolist())]
    kept = svg.thin(points)
    assert len(kept) <= svg.MAX_POINTS and kept[0] == points[0] and kept[-1] == points[-1]
    assert {min(values), max(values)} <= {p.y for p in kept}
    assert [p.x for p in kept] == sorted(p.x for p in kept)


def test_curves_span_rounds(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", until="posterior/fit")
    stored = StoredRun.read(run)
    assert [x for x, _ in stored.curves["train/loss"]["initial/fit"]] == list(range(1, 61))
    (chart,) = charts.losses(stored)[:1]
    assert chart.title == "Loss: initial/fit" and chart.x_label == "optimizer step"
