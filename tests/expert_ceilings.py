"""Ceilings of skipped pairs on published mixtures of experts, from their sizes alone: nothing is measured.

    python tests/expert_ceilings.py

Each line: a share of all pairs of a token and one of its experts that run, then dense work / that work: FLOPs of a
prompt of 2,048 tokens, and bytes of a decode step at that context in bfloat16. At batch 1 a step reads the experts of
one token; the larger the batch, the more experts somebody needs, and the less a skipped pair spares.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import ModelConfig  # noqa: E402
from recipe.cost import Executed, ItemSize, decode_bytes, mlp_elements, prefill_flops  # noqa: E402

CONTEXT, BATCHES, SHARES = 2048, (1, 16, 64), (0.75, 0.5)
COMMON = dict(max_seq_len=4096, norm_eps=1e-5, rope_theta=1e6, head_dim=128)
# Sizes from huggingface.co/{allenai/OLMoE-1B-7B-0924, mistralai/Mixtral-8x7B-v0.1, Qwen/Qwen1.5-MoE-A2.7B,
# Qwen/Qwen3-30B-A3B}/config.json
PUBLISHED = {
    "OLMoE-1B-7B": ModelConfig(
        family="olmoe", dim=2048, n_layers=16, n_heads=16, n_kv_heads=16, hidden_dim=1024, vocab_size=50304,
        n_experts=64, experts_per_token=8, expert_dim=1024, qk_norm_whole=True, **COMMON),
    "Mixtral-8x7B": ModelConfig(
        family="mixtral", dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, hidden_dim=14336, vocab_size=32000,
        n_experts=8, experts_per_token=2, expert_dim=14336, norm_topk=True, **COMMON),
    "Qwen1.5-MoE-A2.7B": ModelConfig(
        family="qwen2_moe", dim=2048, n_layers=24, n_heads=16, n_kv_heads=16, hidden_dim=5632, vocab_size=151936,
        n_experts=60, experts_per_token=4, expert_dim=1408, shared_dim=5632, qkv_bias=True, **COMMON),
    "Qwen3-30B-A3B": ModelConfig(
        family="qwen3_moe", dim=2048, n_layers=48, n_heads=32, n_kv_heads=4, hidden_dim=6144, vocab_size=151936,
        n_experts=128, experts_per_token=8, expert_dim=768, qk_norm=True, norm_topk=True, **COMMON),
}


def weights(c: ModelConfig) -> float:
    """Elements of all matrices: a check of the sizes against the published number of parameters."""
    attention = 2 * c.dim * c.head_dim * (c.n_heads + c.n_kv_heads)
    layers = sum(attention + mlp_elements(c, layer, c.n_experts) for layer in range(c.n_layers))
    return layers + 2 * c.dim * c.vocab_size


def ceilings(c: ModelConfig, share: float) -> list[float]:
    """Of a prompt, then of a decode step at each batch size."""
    size, executed = ItemSize(2, 2), Executed(pairs=[share] * c.n_layers)
    found = [prefill_flops(c, CONTEXT) / prefill_flops(c, CONTEXT, executed)]
    for batch in BATCHES:
        found.append(decode_bytes(c, batch, CONTEXT, size) / decode_bytes(c, batch, CONTEXT, size, executed))
    return found


def main() -> None:
    steps = " | ".join(f"decode, batch {batch}" for batch in BATCHES)
    print(f"| model | parameters | pairs that run | prefill | {steps} |")
    print("| --- " * (4 + len(BATCHES)) + "|")
    for name, config in PUBLISHED.items():
        for share in SHARES:
            numbers = " | ".join(f"{x:.2f}" for x in ceilings(config, share))
            print(f"| {name} | {weights(config) / 1e9:.1f} B | {share:.0%} | {numbers} |")


if __name__ == "__main__":
    main()
