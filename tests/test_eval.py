"""`bsfa eval`, `recheck` and `report`: the whole commands on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

import bsfa_compile as bsfa
from bsfa_compile.cli import NOT_HELD, app
from bsfa_compile.errors import InputError
from bsfa_compile.evaluate import corpora, layers
from bsfa_compile.evaluate.judge import Judge
from bsfa_compile.evaluate.likelihood import float32_head
from bsfa_compile.evaluate.models import load
from bsfa_compile.evaluate.targets import from_files, parse_targets
from bsfa_compile.evaluate.tasks import build_task
from bsfa_compile.evaluate.texts import Document
from tests.tiny import save_tiny
from tests.toy import EAGER

PARAGRAPHS = [f"The {n}th sentence of a plain text about nothing in particular." for n in range(50)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `save_tiny`."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def test_targets_are_parsed() -> None:
    assert parse_targets("budget=0.1, topk=4,sparsity=0.5,nll=0.01,kl=0.1") == [
        bsfa.Budget(0.1),
        bsfa.TopK(4),
        bsfa.Sparsity(0.5),
        bsfa.Quality(nll=0.01),
        bsfa.Quality(kl=0.1),
    ]
    for wrong in ("budget", "budget=x", "lambda=2", "nll=0"):
        with pytest.raises(InputError, match="--targets"):
            parse_targets(wrong)


def test_the_head_is_float32_inside_only(tiny: Path) -> None:
    model: nn.Module = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    ids = torch.randint(0, 256, (1, 20))
    with torch.no_grad():
        rounded = model(input_ids=ids).logits
        with float32_head(model):
            exact = model(input_ids=ids).logits
        assert model(input_ids=ids).logits.dtype == torch.bfloat16
    assert (rounded.dtype, exact.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(exact.bfloat16(), rounded) or torch.allclose(
        exact, rounded.float(), rtol=2**-7, atol=1e-2
    )
    assert not torch.equal(exact, rounded.float())


def test_the_whole_command_on_a_tiny_model(tiny: Path, tmp_path: Path) -> None:
    options = "--targets budget=0.2,topk=2 --lengths 640 --documents 2 --samples 1"
    result = CliRunner().invoke(
        app,
        ["eval", str(tiny), *options.split(), "--tasks", "needle,variable_tracking",
         "--scored", "200", "--device", "cpu", "--out", str(tmp_path)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "evaluation.md").read_text()
    for words in (
        "| Budget(eps=0.2) | all (4) |",
        "## 640 tokens",
        "| variable_tracking |",
        "| largest | layer |",
    ):
        assert words in table

    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert [(p["rule"], p["length"]) for p in found["points"]] == [
        (rule, length) for length in (640,) for rule in ("Budget(eps=0.2)", "TopK(k=2)")
    ]
    assert [p["gate"] for p in found["points"][:2]] == ["relative", "absolute"]
    for point in found["points"]:
        assert 0.05 < point["dropped"] < 0.95
        assert [loss["genre"] for loss in point["losses"]] == ["all", "prose", "code"]
        every = point["losses"][0]
        assert every["tokens"] == 4 * 200
        assert every["kl"]["n"] == 4
        assert 0 < every["kl"]["low"] <= every["kl"]["mean"] <= every["kl"]["high"]
        assert [score["task"] for score in point["scores"]] == [
            "all",
            "needle",
            "variable_tracking",
        ]
        assert point["scores"][0]["dense"]["n"] == 2
        sites = [f"model.layers.{n}.self_attn" for n in range(2)]
        assert list(point["layer_errors"]) == sites
        assert all(1e-4 < error < 1 for error in point["layer_errors"].values())
        assert point["scores"][1]["change"]["low"] is None  # of a single prompt
    assert len(found["calibrated_on"]) == 4
    assert not set(found["calibrated_on"]) & {d for ds in found["documents"].values() for d in ds}


def test_answers_in_batches_are_each_prompts_own(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(str(tiny), tiny, torch.device("cpu"))
    prompts = [
        build_task(task, length, encode=loaded.encode, paragraphs=PARAGRAPHS, seed=seed)
        for task, length, seeds in (("needle", 900, 3), ("needle_multikey", 1500, 2))
        for seed in range(seeds)
    ]
    right = {tuple(p.input_ids[0].tolist()): f" {p.answers[0]}." for p in prompts}
    asked = []

    def generate(ids: torch.Tensor, **_: object) -> torch.Tensor:
        asked.append(tuple(ids.shape))
        made = [loaded.encode(right[tuple(row.tolist())]) for row in ids]
        made = [row + [0] * (20 - len(row)) for row in made]
        return torch.cat([ids, torch.tensor(made)], dim=1)

    monkeypatch.setattr(loaded.model, "generate", generate)
    document = corpora.pieces(
        "prose", [Document(name="", paragraphs=tuple(PARAGRAPHS))], encode=loaded.encode,
        length=300, count=1,
    )  # fmt: skip
    judge = Judge(loaded, document, prompts, 100, batch=2)
    assert asked == [(2, 900), (1, 900), (2, 1500)]
    scores = judge.scores()
    assert [(s.task, s.sparse.n, s.sparse.mean) for s in scores] == [
        ("all", 5, 1.0),
        ("needle", 3, 1.0),
        ("needle_multikey", 2, 1.0),
    ]
    assert scores[0].change.mean == 0.0


def test_layer_errors_are_of_the_modules_outputs() -> None:
    linear = nn.Linear(3, 3, bias=False)
    model = nn.Sequential(linear, nn.Identity())
    x = torch.eye(3)
    dense = layers.outputs(model, ["0", "1"], lambda: model(x))
    with torch.no_grad():
        linear.weight.mul_(1.25)
    found = layers.errors(model, dense, lambda: model(x))
    assert found == pytest.approx({"0": 0.25, "1": 0.25})
    assert not linear._forward_hooks


def test_a_quality_is_searched_for_on_documents_of_its_own(tiny: Path, tmp_path: Path) -> None:
    options = "--targets nll=0.02 --lengths 640 --documents 1 --tasks none --scored 200"
    result = CliRunner().invoke(
        app, ["eval", str(tiny), *options.split(), "--device", "cpu", "--out", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert [point["rule"] for point in found["points"]] == ["Quality(nll=0.02)"]
    assert found["points"][0]["dropped"] > 0.05
    assert "within 0.02" in found["proofs"]["Quality(nll=0.02)"]
    assert len(found["calibrated_on"]) == 8  # half of them searched on
    assert "Searched for Quality(nll=0.02)" in (tmp_path / "evaluation.md").read_text()
    alone = tmp_path / "alone.txt"
    alone.write_text("\n".join(PARAGRAPHS[:15]))  # of one document
    refused = CliRunner().invoke(
        app,
        ["eval", str(tiny), *options.split(), "--calibration-text", str(alone), "--device", "cpu"],
    )
    assert refused.exit_code == 1 and "--calibration-text" in refused.output


def test_thresholds_are_rechecked_on_a_fine_tune(tiny: Path, tmp_path: Path) -> None:
    model: Any = LlamaForCausalLM.from_pretrained(tiny)
    text = tmp_path / "mine.txt"
    text.write_text("\n".join(PARAGRAPHS))
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    data = {"input_ids": torch.tensor([tokenizer(text.read_text()).input_ids[:640]])}
    bsfa.apply(
        model, bsfa.calibrate(model, data, progress=False).thresholds(bsfa.Budget(0.2)), **EAGER
    )
    model.save_pretrained(tmp_path)  # thresholds beside the weights
    options = ["--text", str(text), "--documents", "1", "--device", "cpu"]
    tokenizer.save_pretrained(tmp_path)
    same = CliRunner().invoke(app, ["recheck", str(tmp_path), *options])
    assert "of tiles skipped" in same.output and same.exit_code == 0

    tuned: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        for layer in tuned.model.layers:  # scores further apart: twice as much is lost
            layer.self_attn.q_proj.weight.mul_(1.2)
            layer.self_attn.q_proj.bias.mul_(1.2)
    tuned.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    given = ["recheck", str(tmp_path / "tuned"), "--thresholds", str(tmp_path), *options]
    with pytest.warns(UserWarning, match="recheck"):
        worse = CliRunner().invoke(app, given)
    assert worse.exit_code == NOT_HELD and "calibrate again" in worse.output
    none = CliRunner().invoke(app, ["recheck", str(tmp_path / "tuned"), *options])
    assert none.exit_code == 1 and "pass --thresholds" in none.output


def test_thresholds_from_a_file_are_evaluated_on_the_users_text(tiny: Path, tmp_path: Path) -> None:
    model: nn.Module = LlamaForCausalLM.from_pretrained(tiny)
    text = tmp_path / "mine.txt"
    text.write_text("\n".join(PARAGRAPHS))
    data = {"input_ids": torch.tensor([[ord(c) for c in " ".join(PARAGRAPHS)[:1024]]])}
    calibration = bsfa.calibrate(model, data, progress=False)
    calibration.thresholds(bsfa.Budget(0.2)).save(tmp_path / "mine.safetensors")
    result = CliRunner().invoke(
        app,
        ["eval", str(tiny), "--thresholds", str(tmp_path / "mine.safetensors"), "--text", str(text),
         "--lengths", "1024,768", "--tasks", "none", "--scored", "100", "--device", "cpu",
         "--out", str(tmp_path / "out")],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [(p["rule"], p["length"]) for p in found["points"]] == [("mine", 1024), ("mine", 768)]
    assert all(0.05 < point["dropped"] < 0.95 for point in found["points"])
    assert found["documents"]["1024"] == ["prose: mine 0", "prose: mine 1"]


def test_what_does_not_fit_is_said_before_calibrating(tiny: Path, tmp_path: Path) -> None:
    """Texts too short, thresholds of another model; two files of one name are two rules."""
    short = tmp_path / "short.txt"
    short.write_text("A few words only.\n")
    foreign = bsfa.Thresholds(values={"no.such.site": torch.zeros(1, 1)})
    paths = [tmp_path / name / "t.safetensors" for name in "ab"]
    for path in paths:
        path.parent.mkdir()
        foreign.save(path)
    for options, words in (
        (["--text", str(short)], "shorter than 200 tokens"),
        (["--targets", "budget=0.1", "--thresholds", str(paths[0])], "no site no.such.site"),
    ):
        result = CliRunner().invoke(
            app,
            ["eval", str(tiny), "--lengths", "200", "--scored", "50", "--tasks", "none", *options],
        )
        assert result.exit_code == 1 and words in result.output
        assert "calibrating" not in result.output
    assert len(from_files(paths)) == 2


def test_a_report_is_one_page_with_tile_maps(tiny: Path, tmp_path: Path) -> None:
    options = "--target budget=0.2 --length 640 --documents 1 --scored 100 --device cpu"
    page = tmp_path / "tiny.html"
    result = CliRunner().invoke(app, ["report", str(tiny), *options.split(), "--out", str(page)])
    assert result.exit_code == 0, result.output
    text = page.read_text()
    assert text.count("<figcaption>") == 2  # of one site, its least and most dropping head
    assert text.count('class="kept" fill-opacity') == 8
    assert "Quality on held-out data" in text
    assert "http" not in text
    refused = CliRunner().invoke(app, ["report", str(tiny), "--out", "report.pdf"])
    assert refused.exit_code == 1
    assert "ending in .html or .json" in refused.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--lengths 4k", "--lengths"),
        ("--lengths 64 --scored 64", "less than every length"),
        ("--tasks riddle", "no task 'riddle'"),
        ("--lengths 9999", "the model takes 2048 tokens"),
        ("--lengths 64 --scored 8", "ask for a longer prompt"),
    ],
)
def test_wrong_options_are_one_line(tiny: Path, options: str, words: str) -> None:
    result = CliRunner().invoke(app, ["eval", str(tiny), "--device", "cpu", *options.split()])
    assert result.exit_code == 1
    assert words in result.output
    assert "Traceback" not in result.output and "calibrating" not in result.output
