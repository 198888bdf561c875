"""`bsfa eval`: intervals, documents, tasks, and the whole command on a tiny model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

import bsfa_compile as bsfa
from bsfa_compile.cli import NOT_HELD, app
from bsfa_compile.errors import InputError
from bsfa_compile.evaluate import corpora, layers
from bsfa_compile.evaluate.intervals import bootstrap, wilson
from bsfa_compile.evaluate.judge import Judge
from bsfa_compile.evaluate.likelihood import float32_head
from bsfa_compile.evaluate.models import load
from bsfa_compile.evaluate.targets import parse_targets
from bsfa_compile.evaluate.tasks import TASKS, build_task
from bsfa_compile.evaluate.texts import Document
from tests.tiny import save_tiny
from tests.toy import EAGER

unit = st.floats(0, 1)
PARAGRAPHS = [f"The {n}th sentence of a plain text about nothing in particular." for n in range(50)]


def encode(text: str) -> list[int]:
    """One token per character."""
    return [ord(c) for c in text]


def decode(ids: torch.Tensor) -> str:
    return "".join(map(chr, ids[0].tolist()))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `save_tiny`."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def test_wilson_by_hand() -> None:
    # 8 of 10: the textbook's interval.
    found = wilson([1.0] * 8 + [0.0] * 2)
    assert (found.mean, found.n) == (0.8, 10)
    assert found.low == pytest.approx(0.4902, abs=1e-4)
    assert found.high == pytest.approx(0.9433, abs=1e-4)
    assert wilson([1.0] * 4).low == pytest.approx(4 / (4 + 1.96**2), abs=1e-4)
    with pytest.raises(InputError, match="between 0 and 1"):
        wilson([1.5])


@given(scores=st.lists(unit, min_size=1, max_size=30))
def test_wilson_holds_the_mean_and_shrinks_with_samples(scores: list[float]) -> None:
    once, often = wilson(scores), wilson(scores * 4)
    assert 0 <= once.low <= once.mean <= once.high <= 1
    assert often.high - often.low < once.high - once.low


@given(values=st.lists(st.floats(-10, 10), min_size=2, max_size=12), shift=st.floats(-5, 5))
def test_bootstrap_lies_within_the_values_and_moves_with_them(
    values: list[float], shift: float
) -> None:
    found = bootstrap(values)
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    moved = bootstrap([value + shift for value in values])
    assert moved.low == pytest.approx(found.low + shift, abs=1e-6)


def test_bootstrap_is_about_two_standard_errors_and_one_value_tells_nothing() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    found = bootstrap(values)
    assert found.high - found.low == pytest.approx(4 * 1 / 20, rel=0.1)
    assert bootstrap([3.0]).low == -math.inf
    with pytest.raises(InputError, match="at least one"):
        bootstrap([])


def test_no_document_shares_text_with_another() -> None:
    calibration = corpora.genre_texts(corpora.CODE, corpora.CALIBRATION)
    evaluation = corpora.genre_texts(corpora.CODE, corpora.EVALUATION)
    assert len(evaluation) > 8
    assert not {t.name for t in calibration} & {t.name for t in evaluation}
    found = corpora.pieces(
        "prose",
        corpora.genre_texts(corpora.PROSE, corpora.EVALUATION),
        encode=encode,
        length=20_000,
        count=99,
        prefix=[1],
    )
    assert len(found) >= 8
    assert all(piece.input_ids.shape == (1, 20_000) for piece in found)
    assert all(int(piece.input_ids[0, 0]) == 1 for piece in found)
    paragraphs = [p for piece in found for p in decode(piece.input_ids).split("\n") if len(p) > 99]
    assert len(paragraphs) == len(set(paragraphs)) > 100
    assert [piece.name.split(" ")[0] for piece in found[:2]] == ["northanger", "persuasion"]


def test_code_keeps_its_blank_lines_and_facts_can_be_hidden_in_it() -> None:
    texts = corpora.genre_texts(corpora.CODE, corpora.EVALUATION)
    (piece,) = corpora.pieces("code", texts, encode=encode, length=9000, count=1, facts=2)
    text = decode(piece.input_ids)
    assert len(text) == 9000
    assert "\n\n" in text
    assert text.count("The access code of the") == 2 + 2  # told, answered
    assert len(piece.prompt.needles) == 2


def test_short_texts_are_joined_and_too_short_ones_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name * 600}\n" * 1)
    (tmp_path / "c.py").write_text("x = 1\n\n\ny = 2\n")
    given = corpora.user_texts([tmp_path / name for name in ("a.txt", "b.txt", "c.py")])
    assert list(given) == ["prose", "code"]
    (joined,) = corpora.pieces("prose", given["prose"], encode=encode, length=1000, count=4)
    assert joined.name == "a+b 0"
    with pytest.raises(InputError, match="shorter than 2000 tokens"):
        corpora.pieces("prose", given["prose"], encode=encode, length=2000, count=1)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_fits_and_its_text_tells_the_answer(task: str) -> None:
    prompt = build_task(task, 5000, encode=encode, paragraphs=PARAGRAPHS, seed=3, prefix=[1])
    text = decode(prompt.input_ids)
    assert len(text) == 5000
    assert text[0] == "\x01"
    body, question = text.rsplit("Question:", maxsplit=1)
    assert prompt.score(" and ".join(prompt.answers).upper()) == 1.0
    assert prompt.score(f"it is {prompt.answers[0]}.") == pytest.approx(1 / len(prompt.answers))
    assert prompt.score(f"{prompt.answers[0]}9 x{prompt.answers[0]}") == 0.0
    assert prompt.new_tokens > len(" ".join(prompt.answers))
    assert not any(answer in question for answer in prompt.answers)
    assert all(answer in body for answer in prompt.answers)
    if task.startswith("needle"):
        facts = re.findall(r"\nThe access code of the (\w+) office is (\d+)\.\n", body)
        asked = [code for city, code in facts if city in question]
        assert sorted(asked) == sorted(prompt.answers)
        assert len(facts) == {"needle": 1, "needle_multivalue": 4}.get(task, 8)
    elif task == "variable_tracking":
        held: dict[str, str] = {}
        lines = re.findall(r"\nVAR (\w+) = (?:VAR )?(\w+)\n", body)
        assert len(lines) == 10
        for name, value in lines:
            held[name] = held.get(value, value)
        value = re.findall(r"value (\d+)", question)[0]
        assert sorted(n for n, v in held.items() if v == value) == sorted(prompt.answers)
    else:
        words = re.findall(r"\b[a-z]{4,8}\b", body.split("\n\n", maxsplit=1)[1])
        ranked = sorted(set(words), key=words.count, reverse=True)
        top = len(prompt.answers)
        assert set(ranked[:top]) == set(prompt.answers)
        assert words.count(ranked[top - 1]) > words.count(ranked[top])


def test_tasks_repeat_with_the_seed_alone() -> None:
    def ids(seed: int) -> list[int]:
        made = build_task("needle", 3000, encode=encode, paragraphs=PARAGRAPHS, seed=seed)
        found: list[int] = made.input_ids[0].tolist()
        return found

    assert ids(0) == ids(0)
    assert ids(0) != ids(1)


def test_tasks_that_do_not_fit_are_refused() -> None:
    for task in ("needle_multikey", "common_words"):
        with pytest.raises(InputError, match="ask for a longer prompt"):
            build_task(task, 400, encode=encode, paragraphs=PARAGRAPHS)
    with pytest.raises(InputError, match="must be one of needle"):
        build_task("riddle", 4000, encode=encode, paragraphs=PARAGRAPHS)


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
    data = {"input_ids": torch.tensor([encode(" ".join(PARAGRAPHS))[:1024]])}
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
    ],
)
def test_wrong_options_are_one_line(tiny: Path, options: str, words: str) -> None:
    result = CliRunner().invoke(app, ["eval", str(tiny), "--device", "cpu", *options.split()])
    assert result.exit_code == 1
    assert words in result.output
    assert "Traceback" not in result.output
