"""Make a language model's attention block-sparse: calibrate, optimize, retarget, revert.

A tiny Llama with random weights stands in for a trained model, so that this runs anywhere in
seconds. Attention of random weights is flat, and there would be nothing to drop, so all queries
and keys are made alike: then the rotation by position lets each token attend to what is near.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import bsfa_compile as bsfa


def tiny_llama() -> LlamaForCausalLM:
    """Two layers, four query heads over two key heads, a vocabulary of 256."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias.fill_(1.1)
            layer.self_attn.k_proj.bias.fill_(1.1)
    return model


def main() -> bsfa.Report:
    """Run the whole path; the report of what was skipped."""
    model = tiny_llama()
    prompt = torch.randint(0, 256, (1, 1024))
    calibration_data = [{"input_ids": torch.randint(0, 256, (1, 1024))} for _ in range(2)]
    with torch.no_grad():
        dense = model(prompt, use_cache=False).logits

        # On a CPU dense attention may win, and then runs: dense_if_faster=False insists.
        model = bsfa.optimize(model, calibration_data, bsfa.Budget(0.1), dense_if_faster=False)
        sparse = model(prompt, use_cache=False).logits
        report = bsfa.report(model)
        print(report)
        print(f"largest change of a logit: {(sparse - dense).abs().max():.4f}")

        bsfa.retarget(model, bsfa.Budget(0.01))  # writes new thresholds, compiles nothing
        stricter = model(prompt, use_cache=False).logits
        print(f"at a tenth of the budget:  {(stricter - dense).abs().max():.4f}")

        model = bsfa.revert(model)
        print("reverted:", torch.equal(model(prompt, use_cache=False).logits, dense))
    return report


if __name__ == "__main__":
    main()
