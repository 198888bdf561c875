"""Likelihood, divergence and needle retrieval, by numbers that can be worked out by hand."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bsfa_compile.errors import InputError
from bsfa_compile.evaluate import (
    Comparison,
    build_needles,
    compare,
    pool,
    retrieved,
    tail_logits,
)

WORDS = [f"The {n}th sentence of a plain text about nothing in particular." for n in range(200)]


def encode(text: str) -> list[int]:
    """One token per character."""
    return [ord(c) for c in text]


def decode(ids: Tensor) -> str:
    return "".join(chr(i) for i in ids.tolist())


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    model: nn.Module = LlamaForCausalLM(config).eval()
    return model


def test_tail_logits_are_the_full_models_shifted_by_one(tiny: nn.Module) -> None:
    ids = torch.randint(0, 97, (1, 50))
    with torch.no_grad():
        full = tiny(input_ids=ids).logits[0]
    assert torch.allclose(tail_logits(tiny, ids, 20), full[29:49], atol=1e-5)


@pytest.mark.parametrize("last", [0, 50])
def test_tail_logits_refuses_what_cannot_be_scored(tiny: nn.Module, last: int) -> None:
    with pytest.raises(InputError, match="between 1 and 49"):
        tail_logits(tiny, torch.zeros(1, 50, dtype=torch.long), last)


def test_tail_logits_takes_one_document(tiny: nn.Module) -> None:
    with pytest.raises(InputError, match=r"\[2, 50\]"):
        tail_logits(tiny, torch.zeros(2, 50, dtype=torch.long), 5)


def test_model_against_itself_is_zero_and_against_a_perturbed_one_positive(
    tiny: nn.Module,
) -> None:
    ids = torch.randint(0, 97, (1, 120))
    dense = tail_logits(tiny, ids, 100)
    same = compare(dense, dense.clone(), ids[0, -100:])
    assert (same.delta_nll, same.delta_nll_se, same.kl, same.agreement) == (0.0, 0.0, 0.0, 1.0)
    assert same.dense_nll == pytest.approx(math.log(97), rel=0.05)  # untrained: near uniform

    kls = []
    for size in (0.01, 0.03):
        moved = copy.deepcopy(tiny)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.add_(torch.randn_like(parameter) * size)
        kls.append(compare(dense, tail_logits(moved, ids, 100), ids[0, -100:]).kl)
    assert 0 < kls[0] < kls[1]


def test_compare_by_hand() -> None:
    dense = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]).log() + 3.0
    sparse = torch.tensor([[0.25, 0.5, 0.25], [0.25, 0.5, 0.25]]).log()
    result = compare(dense, sparse, torch.tensor([0, 0]))
    assert result.tokens == 2
    assert result.dense_nll == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert result.delta_nll == pytest.approx(math.log(2) / 2)
    # Two differences, log 2 and 0: standard deviation log 2 / sqrt 2, over sqrt 2 tokens.
    assert result.delta_nll_se == pytest.approx(math.log(2) / 2)
    assert result.kl == pytest.approx((0.5 * math.log(2) - 0.25 * math.log(2)) / 2)
    assert result.agreement == 0.5


def test_compare_in_chunks_is_the_whole() -> None:
    torch.manual_seed(0)
    dense, sparse = torch.randn(2, 150, 11)
    expected = nn.functional.kl_div(
        sparse.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    result = compare(dense, sparse, torch.arange(150) % 11)
    assert result.kl == pytest.approx(float(expected), rel=1e-5)


def test_compare_refuses_other_shapes() -> None:
    with pytest.raises(InputError, match=r"\[3, 5\]"):
        compare(torch.zeros(3, 5), torch.zeros(4, 5), torch.zeros(3, dtype=torch.long))


def test_pool_weighs_by_tokens() -> None:
    def one(tokens: int, value: float, se: float) -> Comparison:
        return Comparison(
            tokens=tokens,
            dense_nll=value,
            delta_nll=value,
            delta_nll_se=se,
            kl=value,
            agreement=value,
        )

    pooled = pool([one(100, 0.0, 0.3), one(300, 1.0, 0.4)])
    assert pooled.tokens == 400
    assert pooled.kl == pooled.delta_nll == pooled.agreement == 0.75
    assert pooled.delta_nll_se == pytest.approx(math.hypot(100 * 0.3, 300 * 0.4) / 400)
    with pytest.raises(InputError, match="at least one"):
        pool([])


@pytest.mark.parametrize("seed", [0, 1])
def test_needles_stand_where_the_prompt_says(seed: int) -> None:
    prompt = build_needles(encode, WORDS, 4000, count=5, seed=seed, prefix=[1])
    ids = prompt.input_ids[0]
    assert prompt.input_ids.shape == (1, 4000)
    assert ids[0] == 1
    assert len({needle.code for needle in prompt.needles}) == 5
    for n, needle in enumerate(prompt.needles):
        fact = f"\nThe access code of the {needle.city} office is {needle.code}.\n"
        assert decode(ids[needle.position :])[: len(fact)] == fact
        assert decode(ids[needle.answer : needle.stop]) == f" {needle.code}"
        assert decode(ids[: needle.answer]).endswith(f"code of the {needle.city} office is")
        text = prompt.text_stop
        assert n / 5 * text < needle.position < (n + 1) / 5 * text + len(WORDS[0])
    assert decode(ids[prompt.text_stop :]).startswith("\nQuestion:")
    assert decode(ids[prompt.text_stop :]).count("Question:") == 5
    assert "Question:" not in decode(ids[: prompt.text_stop])
    # Asked in another order, so that the answers cannot be copied one after the other.
    answers = [needle.answer for needle in prompt.needles]
    assert answers != sorted(answers)


def test_needles_with_another_seed_differ() -> None:
    first, second = (build_needles(encode, WORDS, 3000, seed=seed) for seed in (0, 1))
    assert [n.code for n in first.needles] != [n.code for n in second.needles]


@pytest.mark.parametrize(
    ("length", "words", "match"),
    [(500, WORDS, "ask for fewer facts"), (4000, WORDS[:3], "give more text")],
)
def test_needles_that_do_not_fit_are_refused(length: int, words: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        build_needles(encode, words, length)


def test_count_of_needles_is_checked() -> None:
    with pytest.raises(InputError, match="1 to 16"):
        build_needles(encode, WORDS, 4000, count=17)


def test_retrieval_is_exact_match_of_every_token() -> None:
    prompt = build_needles(encode, WORDS, 3000, count=4)
    last = prompt.questions + 7
    perfect = nn.functional.one_hot(prompt.input_ids[0, -last:], 128).float()
    assert retrieved(perfect, prompt) == [True] * 4

    one_digit_wrong = perfect.clone()
    wrong = prompt.needles[2].stop - 1 - (3000 - last)
    one_digit_wrong[wrong] = one_digit_wrong[wrong].roll(1)
    assert retrieved(one_digit_wrong, prompt) == [True, True, False, True]

    with pytest.raises(InputError, match="only the last 10"):
        retrieved(perfect[-10:], prompt)


def test_a_model_that_answers_is_scored_through_tail_logits() -> None:
    prompt = build_needles(encode, WORDS, 3000, count=4)

    class Oracle(nn.Module):
        """Predicts the token that comes next, having read it."""

        def forward(self, input_ids: Tensor, use_cache: bool, logits_to_keep: int) -> object:
            following = nn.functional.one_hot(input_ids.roll(-1, dims=1), 128).float()
            return SimpleNamespace(logits=following[:, -logits_to_keep:])

    last = prompt.questions
    assert retrieved(tail_logits(Oracle(), prompt.input_ids, last), prompt) == [True] * 4
