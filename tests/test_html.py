"""The report as a page: it holds the figures, needs no network, and a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bsfa_compile as bsfa
from bsfa_compile.errors import InputError
from bsfa_compile.evaluate.intervals import bootstrap, wilson
from bsfa_compile.evaluate.outcome import Evaluation, Loss, Point, Score, TileMap

VOID = {"meta"}
TILES = [[2, 0, 0], [2, 1, 0], [2, 1, 2]]


class Attention(nn.Module):
    """Causal self-attention on [1, 2, L, 16]; with a bias it has to stay dense."""

    def __init__(self, biased: bool = False) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, 1, 1, 640)) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        causal = self.bias is None
        return nn.functional.scaled_dot_product_attention(
            3 * x, x, x, attn_mask=self.bias, is_causal=causal
        )


@pytest.fixture(scope="module")
def told() -> bsfa.Report:
    """A run model's report with everything that a report can hold."""
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), Attention(biased=True))
    x = torch.randn(1, 2, 640, 16) * 0.5 + torch.randn(1, 2, 640, 16).cumsum(2) * 0.1
    bsfa.optimize(model, x, bsfa.Budget(0.2), dense_if_faster=False, inner="eager", progress=False)
    with torch.no_grad():
        model(x)
    loss = Loss(
        genre="prose <&>",
        tokens=99,
        dense_nll=2.5,
        delta_nll=bootstrap([0.0125]),
        kl=bootstrap([0.01, 0.02]),
        agreement=0.875,
    )
    score = Score(
        task="needle", dense=wilson([1.0]), sparse=wilson([0.0]), change=bootstrap([-1.0])
    )
    point = Point(
        rule="Budget(eps=0.2)", gate="relative", precision="auto", sink_tiles=1, length=640,
        dropped=0.4321, dense_seconds=3.0, seconds=1.5, losses=(loss,), scores=(score,),
        layer_errors={"0": 0.0625},
    )  # fmt: skip
    evaluation = Evaluation(
        model="a <toy>", device="CPU", versions={"torch": "2"}, seed=0, scored=99, inner="eager",
        calibrated_on=(), documents={640: ("x",)}, samples=1, points=(point,),
    )  # fmt: skip
    maps = (TileMap(site="0", head=1, tiles=TILES),)
    return replace(bsfa.report(model), evaluation=evaluation, tile_maps=maps)


class Page(HTMLParser):
    """Every element opened is closed in order; what is in it is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.data = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.data += data
        else:
            self.text += f" {data}"


def test_the_page_holds_every_figure_and_nothing_from_elsewhere(
    told: bsfa.Report, tmp_path: Path
) -> None:
    told.save(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\(|src=|href=", text)
    page = Page()
    page.feed(text)
    assert page.open == []
    sparse, dense = told.sites
    assert sparse.skipped is not None
    assert 0.05 < sparse.skipped < 0.95
    assert len(sparse.heads) == 2
    assert sum(sparse.heads) / 2 == pytest.approx(sparse.skipped)
    assert dense.reason
    expected = ["1 of 2 block-sparse", "Budget(eps=0.2)", dense.reason, "43.2 %", "+0.0125",
                "0.062", "87.5 %", "prose <&> (2)", "a <toy>", "needle", "0.00 [0.00, 0.79]",
                "2.00", f"{100 * sparse.skipped:.1f} %"]  # fmt: skip
    expected += [f"0, head {n}: {100 * (1 - x):.1f} % kept" for n, x in enumerate(sparse.heads)]
    for words in expected:
        assert words in page.text
    opacities = [a["fill-opacity"] for t, a in page.tags if t == "rect" and "fill-opacity" in a]
    assert opacities == [f"{1 - x:.3f}" for x in sparse.heads]
    assert json.loads(page.data) == json.loads(told.to_json())


def test_tile_maps_are_drawn_tile_by_tile(told: bsfa.Report, tmp_path: Path) -> None:
    told.save(tmp_path / "report.html")
    page = Page()
    page.feed((tmp_path / "report.html").read_text())
    drawn: dict[str | None, int] = {}
    for tag, attributes in page.tags:
        if tag == "path":
            widths = re.findall(r"h(\d+)v2", attributes["d"] or "")
            drawn[attributes["class"]] = sum(map(int, widths))
    flat = [state for row in TILES for state in row]
    assert drawn == {"masked": flat.count(0), "dropped": flat.count(1), "kept": flat.count(2)}


def test_the_data_alone_are_valid_json(told: bsfa.Report, tmp_path: Path) -> None:
    told.save(tmp_path / "report.json")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    held = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert held["evaluation"]["points"][0]["losses"][0]["delta_nll"]["low"] is None
    with pytest.raises(InputError, match=r"\.html or \.json"):
        told.save(tmp_path / "report.pdf")


def test_a_report_before_any_run_says_so(tmp_path: Path) -> None:
    model = Attention()
    thresholds = bsfa.Thresholds(values={"(model)": torch.zeros(2, 1)})
    bsfa.report(bsfa.apply(model, thresholds, inner="eager")).save(tmp_path / "report.html")
    assert "No attention has run sparse yet" in (tmp_path / "report.html").read_text()


def test_a_browser_shows_it(told: bsfa.Report, tmp_path: Path) -> None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    told.save(tmp_path / "report.html")
    common = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
              f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
    address = (tmp_path / "report.html").as_uri()
    shown = subprocess.run(
        [*common, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert "Kept tiles by site and head" in shown
    assert "43.2 %" in shown
    assert len(re.findall("<rect", shown)) >= 4
    picture = tmp_path / "report.png"
    subprocess.run(
        [*common, f"--screenshot={picture}", "--window-size=1000,1400", address],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    assert picture.stat().st_size > 10_000
