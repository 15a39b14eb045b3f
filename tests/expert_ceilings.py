"""Ceilings of skipped pairs on published mixtures of experts, from their sizes alone: nothing is measured.

    python tests/expert_ceilings.py

Each line: a share of all pairs of a token and one of its experts that run, then dense work / that work: FLOPs of a
prompt of 2,048 tokens, and bytes of a decode step at that context in bfloat16. At batch 1 a step reads the experts of
one token; the larger the batch, the more experts somebody needs, and the less a skipped pair spares.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import MIXTURES  # noqa: E402
from model import ModelConfig  # noqa: E402
from recipe.cost import Executed, ItemSize, decode_bytes, mlp_elements, prefill_flops  # noqa: E402

CONTEXT, BATCHES, SHARES = 2048, (1, 16, 64), (0.75, 0.5)


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
    for name, config in MIXTURES.items():
        for share in SHARES:
            numbers = " | ".join(f"{x:.2f}" for x in ceilings(config, share))
            print(f"| {name} | {weights(config) / 1e9:.1f} B | {share:.0%} | {numbers} |")


if __name__ == "__main__":
    main()
