"""Tokenizer: ids equal to the reference libraries on tiny tokenizers made here, merge lists, formats, errors.

Run: python -m pytest tests/test_tokenizer.py
"""

import base64
import io
import itertools
import json
import random
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokenizer import CHAR_TO_BYTE, LLAMA3, LLAMA3_SPECIAL, QWEN, QWEN_SPECIAL, Tokenizer, load_tokenizer, merge_order

hf = pytest.importorskip("tokenizers", reason="the reference for tokenizer.json is Hugging Face's library")

CORPUS = [
    "the quick brown fox doesn't jump over 1234 lazy dogs; they've said \"it's the end\" and the rest is history.\n",
    "def f(x, n=10):\n    return [x ** i for i in range(n)]  # powers\n\n\nclass A:\n\tpass\n",
    "naïve café Ångström déjà-vu 각난닫 日本語テスト Привет мир مرحبا नमस्ते 😀 👍🏽 🏴󠁧󠁢󠁥󠁮󠁧󠁿 — … 100% ½ Ⅷ ٣٤٥\r\n",
] * 3
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|eot|>", "<|eot|>x"]
PIECES = (
    lambda r: "".join(
        chr(r.choice((r.randrange(0xD800), r.randrange(0xE000, 0x110000)))) for _ in range(r.randrange(1, 9))
    ),
    lambda r: "".join(chr(r.randrange(0x80, 0x3000)) for _ in range(r.randrange(1, 9))),
    lambda r: "".join(chr(r.randrange(0xA1)) for _ in range(r.randrange(1, 20))),  # ASCII, control characters, C1
    lambda r: "".join(r.choice(" \t\n\r\x0b\x0c\x85\xa0\u2003\u3000\u200b") for _ in range(r.randrange(1, 20))),
    lambda r: r.choice(" \n\t") * r.randrange(1, 200),
    lambda r: str(r.randrange(10 ** r.randrange(1, 20))),
    lambda r: "".join(r.choice("٣४五½²Ⅷ0123456789") for _ in range(r.randrange(1, 9))),
    lambda r: r.choice(
        ("def f(x):\n    return x**2  # sq\n", "for(i=0;i<n;++i){a[i]+=b;}\n", "<a href='b'>&nbsp;</a>", "\\frac{1}{2}")
    ),
    lambda r: r.choice(("'s", "'S", "'ſ", "'LL", "don't", "I'VE", "we'Re", "'tis", " 'd")),
    lambda r: r.choice(
        ("😀", "👨‍👩‍👧", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "🇩🇪", "❤️", "👍🏽", "각난닫", "日本語テスト", " мир", "مرحبا", "नमस्ते", "ภาษาไทย")
    ),
    lambda r: "".join(
        r.choice("aeioucnAEIU") + "".join(chr(r.randrange(0x300, 0x36F)) for _ in range(r.randrange(4)))
        for _ in range(4)
    ),
    lambda r: unicodedata.normalize("NFD", r.choice(("éàü", "각난닫", "Ångström", "ệ"))),
    lambda r: "".join(r.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(r.randrange(1, 60))),
    lambda r: r.choice(
        ("the quick", " brown fox", " jumps", "Hello, world!", " internationalization", "__init__", "camelCaseName")
    ),
    lambda r: "".join(r.choice("!?.,;:-_=+*/\\|@#$%^&()[]{}<>~`\"'") for _ in range(r.randrange(1, 15))),
    lambda r: r.choice("\u2581\ufeff\ufffd\ufffe\uffff\u200d\u00ad\x00\x04\x1d\x7f\U00040000\U00100000"),
)


def texts(seed: int, count: int, special: list[str] = SPECIAL) -> list[str]:
    """Random texts: Unicode, code, digits, emoji, control and white characters, combining marks, special tokens."""
    r = random.Random(seed)
    pieces = (*PIECES, lambda r: r.choice(special))
    return ["".join(r.choice(pieces)(r) for _ in range(r.randrange(1, 9))) for _ in range(count)]


seeds = st.integers(0, 2**32)


def write(folder: Path, **files: dict | str | bytes) -> Path:
    """Files in a folder; double underscores in the names stand for dots."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        content = json.dumps(content) if isinstance(content, dict) else content
        (folder / name.replace("__", ".")).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def fast_byte_level(pre: str, *, size: int = 500, normalizer=None, alphabet: bool = True) -> "hf.Tokenizer":
    """A tiny byte-level tokenizer trained on CORPUS by the reference library."""
    byte_level = hf.pre_tokenizers.ByteLevel
    steps = {
        "gpt2": byte_level(add_prefix_space=False),
        "digits": hf.pre_tokenizers.Sequence(
            [hf.pre_tokenizers.Digits(individual_digits=True), byte_level(add_prefix_space=False)]
        ),
        "numbers": hf.pre_tokenizers.Sequence(
            [hf.pre_tokenizers.Digits(individual_digits=False), byte_level(add_prefix_space=False)]
        ),
    }
    for name, pattern in (("llama3", LLAMA3), ("qwen", QWEN), ("partial", r"\p{L}+|\p{N}")):
        split = hf.pre_tokenizers.Split(hf.Regex(pattern), "isolated")
        steps[name] = hf.pre_tokenizers.Sequence([split, byte_level(add_prefix_space=False, use_regex=False)])
    reference = hf.Tokenizer(hf.models.BPE())
    reference.normalizer, reference.pre_tokenizer, reference.decoder = normalizer, steps[pre], hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=list(CHAR_TO_BYTE) if alphabet else [], show_progress=False
    )
    reference.train_from_iterator(CORPUS, trainer)
    reference.add_special_tokens([hf.AddedToken(t, normalized=False, special=True) for t in SPECIAL[:-1]])
    reference.add_tokens([hf.AddedToken("<think>", normalized=False), hf.AddedToken("Ångström", normalized=True)])
    return reference


def load_fast(reference: "hf.Tokenizer", folder: Path, **files) -> Tokenizer:
    return load_tokenizer(write(folder, tokenizer__json=reference.to_str(), **files))


def agree(tok: Tokenizer, reference: "hf.Tokenizer", text: str) -> None:
    for special in (False, True):
        reference.encode_special_tokens = not special
        assert tok.encode(text, special=special) == reference.encode(text, add_special_tokens=False).ids, (
            special,
            text,
        )


# ------------------------------------------------------------------------------------------------------- byte-level BPE


@pytest.mark.parametrize("pre", ["gpt2", "digits", "numbers", "llama3", "qwen", "partial"])
def test_byte_level_equals_reference(tmp_path, pre):
    reference = fast_byte_level(pre)
    tok = load_fast(reference, tmp_path)
    assert tok.vocab_size == reference.get_vocab_size()

    @settings(max_examples=15)
    @given(seeds)
    def check(seed):
        for text in texts(seed, 10):
            agree(tok, reference, text)
            assert tok.decode(tok.encode(text)) == text == tok.decode(tok.encode(text, special=True))

    check()


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Tokenizer:
    return load_fast(fast_byte_level("qwen"), tmp_path_factory.mktemp("byte_level"))


@settings(max_examples=100)
@given(text=st.text())
@example(text="\U00040000\x04 a\u0301")
@example(text="")
def test_any_text_comes_back(byte_level, text):
    assert byte_level.decode(byte_level.encode(text)) == text


@pytest.mark.parametrize("form", ["NFC", "NFKC", "NFD"])
def test_normal_forms(tmp_path, form):
    reference = fast_byte_level("qwen", normalizer=getattr(hf.normalizers, form)())
    tok = load_fast(reference, tmp_path)
    decomposed = unicodedata.normalize("NFD", "각난닫 Ångström")
    for text in ("Å\u030angstro\u0308m", "ﬁ½ éa\u0301\u0327", "Ångström", decomposed, "e\u0301<s>\u0301"):
        agree(tok, reference, text)


def test_bytes_that_the_vocabulary_lacks_are_dropped_before_merging(tmp_path):
    """SmolLM2's vocabulary lacks 21 bytes. Hugging Face drops them from a word: its neighbours merge across the gap."""
    reference = fast_byte_level("digits", alphabet=False)
    tok = load_fast(reference, tmp_path)
    assert tok.core.dropped and len(tok.encode("**")) == 1 and tok.encode("*\x04*") == tok.encode("**")
    assert (
        tok.encode("\x04's") == reference.encode("\x04's").ids != reference.encode("'s").ids
    )  # but text is split before dropping
    for text in (*texts(1, 60), "a\x04b \x04c !\x04! 1\x042", "\x04", " \x04 ", "🏴󠁧󠁢󠁥󠁮󠁧󠁿\U00040000é"):
        agree(tok, reference, text)


def test_unknown_token_for_missing_bytes(tmp_path):
    fast = json.loads(fast_byte_level("gpt2", alphabet=False).to_str())
    fast["model"]["unk_token"] = "<unk>"
    fast["model"]["vocab"]["<unk>"] = 1000
    reference = hf.Tokenizer.from_str(json.dumps(fast))
    tok = load_fast(reference, tmp_path)
    for text in ("th\x04\x04e", "\U00040000", *texts(2, 30)):
        agree(tok, reference, text)
    fast["model"]["fuse_unk"] = True
    with pytest.raises(ValueError, match="fuse_unk"):
        load_tokenizer(write(tmp_path, tokenizer__json=fast))


def test_very_long_words_and_runs(tmp_path):
    """tiktoken's regex engine fails on a million white characters in a row; from 400,000 on they take another way."""
    r = random.Random(0)
    reference = fast_byte_level("llama3")
    tok = load_fast(reference, tmp_path)
    for text in (
        "".join(r.choice("etaoin") for _ in range(100_000)),
        "the" * 40_000,
        " " * 100_000 + "x",
        "\n" * 100_000,
        "7" * 50_000,
        "é\u0301" * 50_000,
        "a " + " " * 450_000 + "b 12 \n\n c's",
    ):
        agree(tok, reference, text)


@st.composite
def merge_lists(draw):
    """A vocabulary over few letters and a merge list, in any order, with repeats and tokens that no merge makes."""
    letters = "abc"[: draw(st.integers(1, 3))]
    words = draw(st.lists(st.text(letters, min_size=2, max_size=5), max_size=14, unique=True))
    vocab = draw(st.permutations([*letters, *words]))
    pairs = [(w[:k], w[k:]) for w in words for k in range(1, len(w)) if w[:k] in vocab and w[k:] in vocab]
    merges = draw(st.lists(st.sampled_from(pairs), max_size=20)) if pairs else []
    return letters, {token: i for i, token in enumerate(vocab)}, merges


@settings(max_examples=250)
@given(merge_lists(), st.booleans(), st.randoms(use_true_random=False))
def test_any_merge_list_is_reproduced_or_refused(case, whole_words, r):
    """By rank as by the list, whatever the list: inconsistent orders, several ways to a token, tokens out of reach."""
    letters, vocab, merges = case
    reference = hf.Tokenizer(hf.models.BPE(vocab=vocab, merges=merges, ignore_merges=whole_words))
    try:
        order = merge_order(vocab, merges, whole_words=whole_words)
    except ValueError as e:
        assert whole_words and "whole words" in str(e)
        return
    ranks = {bytes([b]): b for b in range(256)} | {token.encode(): 256 + i for i, token in enumerate(order)}
    bpe = tiktoken.Encoding("bpe", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={})
    for text in ("".join(r.choice(letters) for _ in range(r.randrange(1, 24))) for _ in range(20)):
        got = [vocab[bpe.decode_single_token_bytes(rank).decode()] for rank in bpe.encode_ordinary(text)]
        assert got == reference.encode(text).ids, text


def test_whole_words_that_ranks_would_also_merge_are_refused(tmp_path):
    """ignore_merges takes a word that is a token; one with no merge of its own is not to be joined in longer words."""
    fast = json.loads(fast_byte_level("llama3").to_str())
    fast["model"]["ignore_merges"] = True
    vocab = fast["model"]["vocab"]
    vocab["qzq"] = 1000  # merges leave three tokens: no rank can join three
    reference = hf.Tokenizer.from_str(json.dumps(fast))
    tok = load_tokenizer(write(tmp_path / "a", tokenizer__json=fast))
    assert tok.encode("qzq") == [1000]
    for text in ("qzq qzqq aqzq", CORPUS[0]):
        agree(tok, reference, text)
    vocab["qz"] = 1001
    with pytest.raises(ValueError, match="'qz' is for whole words only"):
        load_tokenizer(write(tmp_path / "b", tokenizer__json=fast))


def test_vocab_and_merges_files(tmp_path):
    """The old pair of files says nothing of pre-tokenisation: the tokenizer's class does, or they are refused."""
    reference = fast_byte_level("qwen", normalizer=hf.normalizers.NFC())
    model = json.loads(reference.to_str())["model"]
    merges = "#version: 0.2\r\n" + "".join(" ".join(m) + "\r\n" for m in model["merges"])
    added = reference.get_added_tokens_decoder().items()
    decoder = {str(i): {"content": t.content, "special": t.special, "normalized": t.normalized} for i, t in added}
    config = {"tokenizer_class": "Qwen2TokenizerFast", "added_tokens_decoder": decoder, "eos_token": "<|endoftext|>"}
    tok = load_tokenizer(write(tmp_path, vocab__json=model["vocab"], merges__txt=merges, tokenizer_config__json=config))
    for text in texts(3, 40):
        agree(tok, reference, text)
    assert tok.eos_id == reference.token_to_id("<|endoftext|>") and tok.vocab_size == reference.get_vocab_size()
    names = {"<|endoftext|>": reference.token_to_id("<|endoftext|>")}
    gpt2 = write(tmp_path / "gpt2", vocab__json=model["vocab"], merges__txt=merges, added_tokens__json=names)
    with pytest.raises(ValueError, match="add tokenizer.json"):
        load_tokenizer(gpt2)
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": {"content": "<|endoftext|>"}}
    tok = load_tokenizer(write(gpt2, tokenizer_config__json=config))
    reference.normalizer, reference.pre_tokenizer = None, hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in ("it's 12  34\n\n x", CORPUS[0], CORPUS[1]):
        assert tok.encode(text) == reference.encode(text).ids
    assert tok.encode("<|endoftext|>", special=True) == [tok.eos_id] == list(tok.stop_ids)


def test_added_tokens_flags(tmp_path):
    reference = fast_byte_level("gpt2")
    flags = itertools.product((False, True), repeat=3)
    tokens = [
        hf.AddedToken(f"<{i}>", lstrip=a, rstrip=b, single_word=c, normalized=bool(i % 2))
        for i, (a, b, c) in enumerate(flags)
    ]
    reference.add_tokens(tokens)
    tok = load_fast(reference, tmp_path)
    r = random.Random(5)
    parts = [f"<{i}>" for i in range(8)] + [" ", "  ", "\n", "a", "b c", "_", "é", "<s>", "<", "0>"]
    for _ in range(300):
        agree(tok, reference, "".join(r.choice(parts) for _ in range(r.randrange(1, 12))))


# ------------------------------------------------------------------------------------------------------- tiktoken files


def tiktoken_file(size: int) -> bytes:
    """Ranks in tiktoken's format: all bytes, not in order, then words over twenty letters."""
    r = random.Random(size)
    words = itertools.chain.from_iterable(itertools.product(b" etaoinsrhdlu\n0123'.", repeat=n) for n in (2, 3, 4))
    tokens = [bytes([b]) for b in r.sample(range(256), 256)] + [bytes(w) for w in itertools.islice(words, size - 256)]
    return b"".join(base64.b64encode(t) + f" {i}\n".encode() for i, t in enumerate(tokens))


@pytest.mark.parametrize(
    ("name", "size", "pattern", "special"),
    [
        ("tokenizer.model", 128_000, LLAMA3, LLAMA3_SPECIAL),
        ("qwen.tiktoken", 151_643, QWEN, QWEN_SPECIAL),
    ],
)
def test_tiktoken_files(tmp_path, name, size, pattern, special):
    data = tiktoken_file(size)
    tok = load_tokenizer(write(tmp_path, **{name: data}))
    ranks = {base64.b64decode(t): int(i) for t, i in (line.split() for line in data.splitlines())}
    names = {t: size + i for i, t in enumerate(special)}
    reference = tiktoken.Encoding("reference", pat_str=pattern, mergeable_ranks=ranks, special_tokens=names)
    for text in texts(4, 100, list(special[:12])):
        normal = unicodedata.normalize("NFC", text) if name.startswith("qwen") else text
        assert tok.encode(text) == reference.encode_ordinary(normal)
        assert tok.encode(text, special=True) == reference.encode(normal, allowed_special="all")
        assert tok.decode(tok.encode(text)) == normal
    assert tok.vocab_size == size + len(special) == (128_256 if size == 128_000 else 151_851)
    if size == 128_000:
        assert (tok.bos_id, tok.eos_id, tok.adds_bos) == (128_000, 128_001, True)
        assert tok.encode("<|eot_id|><|reserved_special_token_245|>", special=True) == [128_009, 128_255]
    else:
        assert (tok.bos_id, tok.eos_id, tok.adds_bos) == (None, 151_643, False)


# -------------------------------------------------------------------------------------------------------- sentencepiece


@pytest.fixture(scope="module")
def spm() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        control_symbols=["[INST]", "[/INST]"],
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        allow_whitespace_only_pieces=True,
    )
    return model.getvalue()


def test_sentencepiece_equals_reference(tmp_path, spm):
    tok = load_tokenizer(write(tmp_path, tokenizer__model=spm))
    reference = sentencepiece.SentencePieceProcessor(model_proto=spm)
    assert (tok.vocab_size, tok.bos_id, tok.eos_id, tok.adds_bos) == (
        len(reference),
        reference.bos_id(),
        reference.eos_id(),
        True,
    )

    @settings(max_examples=20)
    @given(seeds)
    def check(seed):
        for text in texts(seed, 10):
            assert tok.encode(text) == reference.encode(text)
            if "\u2581" not in text:  # which sentencepiece takes for a space
                assert tok.decode(tok.encode(text)) == text
                assert tok.decode(tok.encode(text, bos=True), skip_special=True) == text

    check()
    for text in ("", "x", " ", "a" * 100_000, " " * 100_000):
        assert tok.encode(text) == reference.encode(text)
        assert tok.decode(tok.encode(text)) == text


def test_sentencepiece_space_in_front(tmp_path, spm):
    """A space goes in front of a text; with legacy=true also in front of each text after a special token."""
    reference = sentencepiece.SentencePieceProcessor(model_proto=spm)
    tok = load_tokenizer(write(tmp_path / "new", tokenizer__model=spm, tokenizer_config__json={"legacy": False}))
    old = load_tokenizer(write(tmp_path / "old", tokenizer__model=spm, tokenizer_config__json={"legacy": True}))
    first, second = reference.encode("the end"), reference.encode("of the fox")
    assert tok.encode("the end</s>of the fox", special=True) == [
        *first,
        tok.eos_id,
        *tok.encode("of the fox", continued=True),
    ]
    assert old.encode("the end</s>of the fox", special=True) == [*first, tok.eos_id, *second]
    assert tok.encode("of the fox", continued=True) != second and tok.encode(" of the fox", continued=True) == second
    assert tok.decode(tok.encode("the end</s>of the fox", special=True)) == "the end</s>of the fox"
    assert tok.encode("the end") + tok.encode(" of", continued=True) == tok.encode("the end of")
    assert tok.encode("</s>") == reference.encode("</s>") and tok.eos_id not in tok.encode("</s>")


@pytest.mark.parametrize("prepare", ["prepend", "bare", "first", "always", "never"])
def test_tokenizer_json_of_sentencepiece_kind(tmp_path, spm, prepare):
    """Without tokenizer.model, tokenizer.json with byte fallback becomes a sentencepiece model of the same ids."""
    reference = sentencepiece.SentencePieceProcessor(model_proto=spm)
    pieces = reference.id_to_piece(list(range(len(reference))))
    vocab = {piece: i for i, piece in enumerate(pieces)}
    markers = [
        p for i, p in enumerate(pieces) if reference.is_byte(i) or reference.is_control(i) or reference.is_unknown(i)
    ]
    ranked = [p for p in pieces if len(p) > 1 and p not in markers]
    merges = [(p[:k], p[k:]) for p in ranked for k in range(1, len(p)) if p[:k] in vocab and p[k:] in vocab]
    fast = hf.Tokenizer(hf.models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    escape = hf.normalizers.Replace(" ", "\u2581")
    if prepare in ("prepend", "bare"):
        fast.normalizer = (
            hf.normalizers.Sequence([hf.normalizers.Prepend("\u2581"), escape]) if prepare == "prepend" else escape
        )
    else:
        fast.pre_tokenizer = hf.pre_tokenizers.Metaspace(prepend_scheme=prepare, split=False)
    fast.add_special_tokens(
        [hf.AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")]
    )
    fast.post_processor = hf.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tok = load_fast(fast, tmp_path)
    assert tok.adds_bos and tok.bos_id == 1 and tok.vocab_size == len(pieces)
    for text in (*texts(6, 150), " x", "  x", "\u2581x", "a</s> b</s>c"):
        agree(tok, fast, text)
        if prepare == "prepend":
            assert tok.encode(text) == reference.encode(text)


# -------------------------------------------------------------------------------------------- decoding, BOS, EOS, stops


def test_stream_prints_what_decode_says(tmp_path, spm):
    byte = load_fast(fast_byte_level("gpt2"), tmp_path / "b")
    for tok in (byte, load_tokenizer(write(tmp_path / "s", tokenizer__model=spm))):
        r = random.Random(7)
        for n in range(60):
            ids = (
                [r.randrange(tok.vocab_size + 3) for _ in range(n)]
                if n % 2
                else tok.encode("héllo 😀 the end", bos=True)
            )
            for skip in (False, True):
                push = tok.stream(skip_special=skip)
                parts = [push(id_) for id_ in ids] + [push(None)]
                assert "".join(parts) == tok.decode(ids, skip_special=skip)
    push, ids = byte.stream(), byte.encode("a😀")
    assert "".join(push(id_) for id_ in ids[:-1]) == "a" and push(ids[-1]) == "😀"  # never half a character


def test_bos_eos_and_stops_come_from_the_files(tmp_path):
    reference = fast_byte_level("gpt2")
    id_ = reference.token_to_id
    plain = load_fast(reference, tmp_path / "plain")
    assert (plain.bos_id, plain.eos_id, plain.stop_ids, plain.adds_bos) == (None, None, (), False)
    assert plain.encode("a", bos=True, eos=True) == plain.encode("a")
    reference.post_processor = hf.processors.Sequence(
        [
            hf.processors.ByteLevel(),
            hf.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", id_("<s>"))]),
        ]
    )
    generation = {"eos_token_id": [id_("</s>"), id_("<|eot|>")]}
    config = {"eos_token": {"content": "</s>"}}
    tok = load_fast(reference, tmp_path / "a", tokenizer_config__json=config, generation_config__json=generation)
    assert (tok.bos_id, tok.eos_id, tok.adds_bos) == (id_("<s>"), id_("</s>"), True)
    assert tok.stop_ids == (id_("</s>"), id_("<|eot|>"))
    assert tok.encode("a", bos=True, eos=True) == [tok.bos_id, *plain.encode("a"), tok.eos_id]
    assert reference.encode("a").ids == tok.encode("a", bos=tok.adds_bos)
    names, generation = {"eos_token": "<|endoftext|>"}, {"eos_token_id": id_("<|eot|>")}
    files = {"special_tokens_map__json": names, "generation_config__json": generation}
    tok = load_fast(reference, tmp_path / "b", tokenizer_config__json={"add_bos_token": False}, **files)
    assert tok.adds_bos and reference.encode("a").ids == tok.encode("a", bos=tok.adds_bos)  # the post-processor decides
    assert tok.bos_id == id_("<s>") and tok.stop_ids == (id_("<|endoftext|>"), id_("<|eot|>"))


def test_halves_of_surrogate_pairs(tmp_path):
    tok = load_fast(fast_byte_level("qwen"), tmp_path)
    assert tok.encode(json.loads('"\\ud83d\\ude00"')) == tok.encode("\ud83d\ude00") == tok.encode("😀")
    assert tok.decode(tok.encode("a\ud83db")) == "a\ufffdb"


# --------------------------------------------------------------------------------------------------------------- errors


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder.*tokenizer\.json.*copy it"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="found: config.json, vocab.json"):
        load_tokenizer(write(tmp_path, config__json={}, vocab__json={}))


def test_damaged_files(tmp_path, spm):
    fast, ranks = fast_byte_level("gpt2").to_str(), tiktoken_file(2000)
    whole = tiktoken_file(128_000)
    cases = {
        "tokenizer.json": [
            b"",
            fast[: len(fast) // 2],
            "[1]",
            "{}",
            b"\xff\xfe",
            "version https://git-lfs.github.com/spec/v1\n",
        ],
        "tokenizer.model": [
            b"",
            b"\n\xffgarbage",
            b"\n\x03abc\x12\x02de\x1a\x02fg",
            ranks,
            whole[: len(whole) // 2],
            whole[:-20],
            b"IQ== x\n",
            b"<html>",
        ],
        "qwen.tiktoken": [b"", ranks, whole.replace(b" 5\n", b" 6\n", 1)],
    }
    for name, contents in cases.items():
        for i, content in enumerate(contents):
            with pytest.raises(ValueError, match=r"expected|not supported") as e:
                load_tokenizer(write(tmp_path / f"{name}{i}", **{name: content}))
            assert str(tmp_path / f"{name}{i}") in str(e.value) and name in str(e.value)
    folder = write(tmp_path / "config", tokenizer__json=fast, tokenizer_config__json='{"eos_token": ')
    with pytest.raises(ValueError, match="tokenizer_config.json is not JSON"):
        load_tokenizer(folder)


def other_shapes(value, r: random.Random):
    """A copy with one value somewhere in it replaced by one of another type."""
    other = r.choice((None, 3, -1, "x", [], {}, [3], {"a": None}, True, 1e300, ["x", "y"], "\ud800"))
    if not isinstance(value, (dict, list)) or not value or r.random() < 0.1:
        return other
    key = r.choice(list(value)) if isinstance(value, dict) else r.randrange(len(value))
    copy = value.copy()
    copy[key] = other_shapes(value[key], r)
    return copy


def test_json_of_another_shape_is_one_sentence(tmp_path):
    """Whatever value of a tokenizer's files is of another type: it loads, or a ValueError names the folder."""
    template = [{"name": "default", "template": "x"}]
    config = {"eos_token": "</s>", "chat_template": template, "bos_token": {"content": "<s>"}}
    files = {
        "tokenizer": json.loads(fast_byte_level("digits", size=300).to_str()),
        "tokenizer_config": config | {"added_tokens_decoder": {"1": {"content": "x", "special": True}}},
        "special_tokens_map": {"pad_token": {"content": "<s>"}},
        "added_tokens": {"<a>": 900},
        "generation_config": {"eos_token_id": [1, 2]},
        "config": {"eos_token_id": 3},
    }
    r, refused = random.Random(0), 0
    for _ in range(200):
        name = r.choice(list(files))
        changed = files | {name: other_shapes(files[name], r)}
        for file, content in changed.items():
            (tmp_path / f"{file}.json").write_text(json.dumps(content))
        try:
            load_tokenizer(tmp_path).encode("the <s> x", special=True)
        except ValueError as e:
            refused += 1
            assert str(tmp_path) in str(e)
    assert 20 < refused < 180


def test_a_sentencepiece_model_cut_off_anywhere_is_refused(tmp_path, spm):
    """Protobuf accepts a cut between two pieces; the settings that follow the pieces are missed then."""
    for size in (*range(1, 200), *range(len(spm) - 200, len(spm))):
        with pytest.raises(ValueError, match="not a whole sentencepiece model.*copy the file again"):
            load_tokenizer(write(tmp_path, tokenizer__model=spm[:size]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: f["model"].update(type="WordPiece"), "the model is WordPiece"),
        (lambda f: f["model"].update(dropout=0.1), "dropout"),
        (lambda f: f["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (lambda f: f["model"]["merges"].append(["q", "zz"]), "uses a token that the vocabulary lacks"),
        (lambda f: f["model"]["merges"].append("a b c"), "expected two tokens"),
        (lambda f: f["model"]["vocab"].update({"q": 1, "z": 1}), "have one id"),
        (lambda f: f.update(normalizer={"type": "Lowercase"}), "the normalizer is Lowercase"),
        (lambda f: f.update(pre_tokenizer=None), "the pre-tokenizer is none"),
        (lambda f: f["pre_tokenizer"].update(add_prefix_space=True), "without a space in front"),
        (
            lambda f: f.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}] * 2}),
            r"Whitespace \+ Whitespace",
        ),
        (lambda f: f["model"].update(byte_fallback=True), "add the model's tokenizer.model"),
    ],
)
def test_what_cannot_be_reproduced_is_refused(tmp_path, change, reason):
    fast = json.loads(fast_byte_level("gpt2").to_str())
    change(fast)
    with pytest.raises(ValueError, match=reason):
        load_tokenizer(write(tmp_path, tokenizer__json=fast))
