"""Settings of tokenizers and pieces of templates, drawn at random: ids, BOS and loss as transformers has them.

Run: python -m pytest tests/test_tokenizer_settings.py
More examples, by hand: RT_EXAMPLES=10000 RT_SEED=1 python -m pytest tests/test_tokenizer_settings.py -k generated
"""

import collections
import functools
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from test_chat import chat_tokenizer, expected_mask, reference_of, talk
from test_tokenizer import agree, fast_byte_level, load_fast, spm, texts, write  # noqa: F401  a fixture
from tokenizer import encode_chat, load_tokenizer

hf = pytest.importorskip("tokenizers", reason="the reference for tokenizer.json is Hugging Face's library")
transformers = pytest.importorskip("transformers", reason="the reference for folders")
transformers.logging.set_verbosity_error()

EXAMPLES = int(os.environ.get("RT_EXAMPLES", 500))
TALKS = 5  # conversations with each tokenizer
SEED = os.environ.get("RT_SEED")


# -------------------------------------------------------------------------------------------------- cases by themselves

FRONTS = {"none": None, "bytes": "ByteLevel", "<s> $A": ["<s>"], "$A </s>": ["</s>"], "<s> $A </s>": ["<s>", "</s>"]}
CLASSES = ("PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer")


@pytest.mark.parametrize("single", FRONTS)
@pytest.mark.parametrize("bos", ["absent", None, "<s>", "<|eot|>", {"content": "<s>", "__type": "AddedToken"}])
def test_bos_as_transformers_adds_it(tmp_path, single, bos):
    """With a tokenizer.json its post-processor decides alone, whatever tokenizer_config.json and its class say."""
    fast = json.loads(fast_byte_level("qwen").to_str())
    ids = {t["content"]: t["id"] for t in fast["added_tokens"]}
    names = FRONTS[single]
    if isinstance(names, list):
        processor = hf.processors.TemplateProcessing(single=single, special_tokens=[(t, ids[t]) for t in names])
        fast["post_processor"] = json.loads(processor.__getstate__())
    else:
        fast["post_processor"] = names and {"type": names, "add_prefix_space": False, "trim_offsets": True}
    for add, kind in (("absent", None), (True, None), (False, None), *zip((True, False, "absent", True), CLASSES)):
        config = {"add_bos_token": add, "bos_token": bos, "tokenizer_class": kind, "eos_token": "</s>"}
        config = {k: v for k, v in config.items() if v != "absent" and (k, v) != ("tokenizer_class", None)}
        files = {"tokenizer_config__json": config, "config__json": {"model_type": "llama"}}
        folder = write(tmp_path / f"{add}{kind}", tokenizer__json=fast, **files)
        reference, tok = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
        wanted = reference.encode("the end")
        assert tok.encode("the end", bos=tok.adds_bos) == wanted[: len(wanted) - single.endswith("</s>")]
        names = (reference.bos_token, reference.eos_token)
        assert (tok.roles.get("bos_token"), tok.roles.get("eos_token")) == names or kind == "LlamaTokenizerFast"


@pytest.mark.parametrize("kind", ["RobertaProcessing", "BertProcessing"])
def test_other_processors_that_put_a_token_in_front(tmp_path, kind):
    reference = fast_byte_level("qwen")
    ends = [(t, reference.token_to_id(t)) for t in ("</s>", "<s>")]
    reference.post_processor = getattr(hf.processors, kind)(*ends)
    tok = load_fast(reference, tmp_path)
    assert [*tok.encode("the", bos=tok.adds_bos), ends[0][1]] == reference.encode("the").ids
    two = hf.processors.TemplateProcessing(single="<s> </s> $A", special_tokens=ends)
    reference.post_processor = two
    with pytest.raises(ValueError, match="2 tokens go in front of a text, expected BOS alone"):
        load_fast(reference, tmp_path / "two")


def test_bos_that_the_text_has_is_not_doubled(tmp_path):
    """A context that begins with the text of BOS, as a chat that was rendered before, gets one BOS, as in lm_eval."""
    tok = chat_tokenizer(tmp_path, None, bos=True)
    once = tok.encode("the end", bos=True)
    assert tok.encode("<s>the end", bos=True, special=True) == once == tok.encode("<s>the end", special=True)
    assert tok.encode("<s>the end", bos=True).count(tok.bos_id) == 1  # text, and the one in front
    assert tok.encode("<s><s>a", bos=True, special=True) == reference_of(tmp_path).encode("<s>a")


def test_stop_ids_of_every_file(tmp_path):
    """generation_config.json, else what a converted folder keeps of the model's config, else config.json."""
    eos = chat_tokenizer(tmp_path, None).eos_id
    for name, ids, stops in (
        ("config", [eos - 1, eos], (eos - 1, eos)),
        ("hf_config", 5, (eos, 5)),
        ("generation_config", [7, 9], (eos, 7, 9)),
    ):
        write(tmp_path, **{f"{name}__json": {"eos_token_id": ids}})
        assert load_tokenizer(tmp_path).stop_ids == stops
    write(tmp_path, generation_config__json={"eos_token_id": None})
    assert load_tokenizer(tmp_path).stop_ids == (eos, 5)
    for bad in ("7", [None], [True], 1.5):
        with pytest.raises(ValueError, match="eos_token_id in generation_config.json is .* expected ids"):
            load_tokenizer(write(tmp_path, generation_config__json={"eos_token_id": bad}))


def test_special_tokens_map_goes_before_the_config_of_old_folders(tmp_path):
    chat_tokenizer(tmp_path, None, bos_token="<|eot|>")
    write(tmp_path, special_tokens_map__json={"bos_token": "<s>"})
    assert load_tokenizer(tmp_path).roles["bos_token"] == reference_of(tmp_path).bos_token == "<s>"
    decoder = {"0": {"content": "!", "special": False}}
    chat_tokenizer(tmp_path, None, bos_token="<|eot|>", added_tokens_decoder=decoder)
    assert load_tokenizer(tmp_path).roles["bos_token"] == reference_of(tmp_path).bos_token == "<|eot|>"


# ---------------------------------------------------------------------------------------------- of sentencepiece's kind


def pieces_of(proto: bytes) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary of a sentencepiece model and the merges that Hugging Face makes of it."""
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    pieces = model.id_to_piece(list(range(len(model))))
    vocab = {piece: i for i, piece in enumerate(pieces)}
    odd = [i for i in range(len(pieces)) if model.is_byte(i) or model.is_control(i) or model.is_unknown(i)]
    ranked = [p for i, p in enumerate(pieces) if len(p) > 1 and i not in odd]
    return vocab, [(p[:k], p[k:]) for p in ranked for k in range(1, len(p)) if p[:k] in vocab and p[k:] in vocab]


def fast_sentencepiece(proto: bytes, prepare: str, unknown: str | None = "<unk>") -> "hf.Tokenizer":
    """tokenizer.json of Llama 2's kind, whose text is prepared in one of five ways."""
    vocab, merges = pieces_of(proto)
    fast = hf.Tokenizer(hf.models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token=unknown))
    escape = hf.normalizers.Replace(" ", "\u2581")
    if prepare == "prepend":
        fast.normalizer = hf.normalizers.Sequence([hf.normalizers.Prepend("\u2581"), escape])
    elif prepare == "bare":
        fast.normalizer = escape
    else:
        fast.pre_tokenizer = hf.pre_tokenizers.Metaspace(prepend_scheme=prepare, split=False)
    fast.add_special_tokens([hf.AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    return fast


PREPARES = ("prepend", "bare", "first", "always", "never")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_folder_saved_by_transformers_5(tmp_path, spm, legacy):  # noqa: F811
    """LlamaTokenizer saved again: no tokenizer.model, "unk_token": null (transformers #45488)."""
    vocab, merges = pieces_of(spm)
    source = transformers.LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy)
    source.save_pretrained(tmp_path / "x")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "x").save_pretrained(tmp_path / "y")
    assert json.loads((tmp_path / "y/tokenizer.json").read_text())["model"]["unk_token"] is None
    reference, tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "y"), load_tokenizer(tmp_path / "y")
    for text in (*texts(8, 150), " x", "  x", "\u2581x", "a</s> b</s>c", "<s>a", "<unk>"):
        assert tok.encode(text, special=True) == reference.encode(text, add_special_tokens=False), text
        assert tok.encode(text, bos=tok.adds_bos, special=True) == reference.encode(text) or text.startswith("<s>")
    assert (tok.bos_id, tok.eos_id, tok.vocab_size) == (1, 2, len(reference))


def test_tokenizer_model_beside_tokenizer_json(tmp_path, spm):  # noqa: F811
    """Tokens that stand only in tokenizer.json, and its BOS, count; the model still splits text."""
    fast = fast_sentencepiece(spm, "first")
    size = fast.get_vocab_size()
    fast.add_special_tokens([hf.AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    tok = load_tokenizer(write(tmp_path, tokenizer__model=spm, tokenizer__json=fast.to_str()))
    assert tok.vocab_size == size + 2 == fast.get_vocab_size() and not tok.adds_bos
    text = "the end<|im_end|>of the fox <|im_start|>"
    assert tok.encode(text, special=True) == fast.encode(text).ids
    assert tok.decode(fast.encode(text).ids) == text


def test_no_space_in_front_where_the_config_says_so(tmp_path, spm):  # noqa: F811
    config = {"add_prefix_space": False}
    tok = load_tokenizer(write(tmp_path, tokenizer__model=spm, tokenizer_config__json=config))
    never = fast_sentencepiece(spm, "never")  # what LlamaTokenizer makes of this setting
    never.encode_special_tokens = True
    for text in (*texts(9, 30), "the end", " x", ""):
        assert tok.encode(text) == tok.encode(text, continued=True) == never.encode(text).ids or "\u2581" in text
        assert tok.decode(tok.encode(text)) == text or "\u2581" in text


def test_tokens_that_no_merge_makes_are_ordinary(tmp_path, spm):  # noqa: F811
    """They are never found in a text, but they are no special tokens: decode shows them."""
    fast = json.loads(fast_sentencepiece(spm, "first").to_str())
    fast["model"]["vocab"] |= {"\u2581qqq": 3000, "zzz": 5000}  # with a gap
    reference = hf.Tokenizer.from_str(json.dumps(fast))
    tok = load_tokenizer(write(tmp_path, tokenizer__json=fast))
    for text in ("a qqq zzz", "zzz", "qqq"):
        agree(tok, reference, text)
    assert tok.decode([3000, 5000, 2], skip_special=True) == "qqqzzz" and tok.vocab_size == 5001
    assert not {3000, 5000} & tok.special


def test_vocabularies_that_cannot_be_held_are_refused(tmp_path, spm):  # noqa: F811
    fast = json.loads(fast_sentencepiece(spm, "first").to_str())
    lacking = json.loads(json.dumps(fast))
    del lacking["model"]["vocab"]["<0x41>"]
    whole = json.loads(json.dumps(fast))
    whole["model"]["ignore_merges"] = True
    for model, reason in ((lacking, "lacks the byte <0x41>"), (whole, "ignore_merges is set")):
        with pytest.raises(ValueError, match=reason):
            load_tokenizer(write(tmp_path, tokenizer__json=model))


# ------------------------------------------------------------------------------------------------------ drawn at random

BYTE_LEVEL = list(itertools.product(("gpt2", "digits", "llama3", "qwen"), (None, "NFC", "NFD", "NFKC")))
NAMES = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<think>", "</think>", "[INST]", "[/INST]", "<x y>", "<|x|>"]
HEADS = ("<|im_start|>ROLE\n", "[INST] ", "### ROLE: ", "<|ROLE|>\n", "ROLE>", "<|im_start|>ROLE\n<think>\n", "\n", "")
FEET = ("</s>", "<|im_end|>\n", " </s>", "\n", "</s>\n", "\n\n", "<|im_end|>", "[/INST]", "<|x|>\n", "")
WAYS = {  # what a template makes of content: expression, and the same in Python
    "C": lambda c: c,
    "C | trim": str.strip,
    "C.strip()": str.strip,
    "C.rstrip()": str.rstrip,
    "C.lstrip('\\n')": lambda c: c.lstrip("\n"),
    "C.split('</think>')[-1]": lambda c: c.split("</think>")[-1],
    "C.split('</think>')[-1].lstrip('\\n')": lambda c: c.split("</think>")[-1].lstrip("\n"),
    "('%s' | format(C))": lambda c: c,
    "(C ~ ' ' | string).strip()": lambda c: (c + " ").strip(),
    "C.replace('<x y>', '')": lambda c: c.replace("<x y>", ""),
    "C[:]": lambda c: c,
    "(C if '<think>' in C or C.startswith('the') else C | trim)": (
        lambda c: c if "<think>" in c or c.startswith("the") else c.strip()
    ),
    "C.split('\\n') | join('\\n')": lambda c: c,
    "[C, ''] | join": lambda c: c,
}


@functools.cache
def trained(pre: str, form: str | None) -> dict:
    normalizer = form and getattr(hf.normalizers, form)()
    fast = json.loads(fast_byte_level(pre, normalizer=normalizer).to_str())
    return fast | {"added_tokens": []}


@functools.cache
def trained_sentencepiece(proto: bytes, prepare: str, unknown: str | None) -> dict:
    return json.loads(fast_sentencepiece(proto, prepare, unknown).to_str()) | {"added_tokens": []}


def draw_folder(draw, folder: Path, proto: bytes) -> None:
    """A tokenizer.json with added tokens of any flags, and a tokenizer_config.json that says this or that."""
    if draw(st.booleans()):
        fast = json.loads(json.dumps(trained(*draw(st.sampled_from(BYTE_LEVEL)))))
    else:
        fast = trained_sentencepiece(proto, draw(st.sampled_from(PREPARES)), draw(st.sampled_from(("<unk>", None))))
        fast = json.loads(json.dumps(fast))
    vocab = fast["model"]["vocab"]
    size = 1 + max(vocab.values())
    ids = {}
    for name in NAMES:
        ids[name] = vocab.get(name, size)
        size += name not in vocab
        flags = {flag: draw(st.booleans()) for flag in ("lstrip", "rstrip")} if draw(st.booleans()) else {}
        token = {"id": ids[name], "content": name, "single_word": False, "lstrip": False, "rstrip": False} | flags
        token["special"] = name in ("<s>", "</s>") or draw(st.sampled_from((False, False, False, True)))
        token["normalized"] = draw(st.booleans())
        fast["added_tokens"].append(token)
    fast["added_tokens"].sort(key=lambda token: token["id"])
    single = draw(st.sampled_from(("", "<s> $A", "$A </s>", "<s> $A </s>")))
    names = [name for name in ("<s>", "</s>") if name in single]
    fast["post_processor"] = None
    if single:
        processor = hf.processors.TemplateProcessing(single=single, special_tokens=[(t, ids[t]) for t in names])
        fast["post_processor"] = json.loads(processor.__getstate__())
    spelled = {"content": "<s>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    config = {"eos_token": draw(st.sampled_from(("</s>", "<|im_end|>")))}
    for key, values in (
        ("bos_token", ("<s>", None, spelled | {"__type": "AddedToken"})),
        ("add_bos_token", (True, False)),
    ):
        value = draw(st.sampled_from((*values, "absent")))
        config |= {} if value == "absent" else {key: value}
    write(folder, tokenizer__json=fast, tokenizer_config__json=config)


def draw_template(draw) -> tuple[str, dict[str, tuple]]:
    """A template, and for each role the pieces that it prints: head, what is made of the content, foot."""
    parts, source = {}, ""
    for role in ("system", "user", "assistant"):
        head, foot = draw(st.sampled_from(HEADS)), draw(st.sampled_from(FEET))
        way = draw(st.sampled_from(list(WAYS)))
        parts[role] = head, WAYS[way], foot
        printed = [json.dumps(head), way.replace("C", "m['content']"), json.dumps(foot)]
        shape = draw(
            st.sampled_from(
                ("{{ A ~ (B) ~ C }}", "{{ A }}{{ B }}{{ C }}", "{% set x %}{{ B }}{% endset %}{{ A ~ x ~ C }}")
            )
        )
        for name, text in zip("ABC", printed):
            shape = shape.replace(f"{name} ", f"{text} ").replace(f"({name})", f"({text})")
        source += (
            "{% " + ("if" if role == "system" else "elif") + f" m.role == '{role}' %}}{shape.replace('ROLE', role)}"
        )
    source = "{% for m in messages %}" + source + "{% endif %}{% endfor %}"
    return source, parts


ANSWERS = st.sampled_from(
    (
        "the cat",
        "a1",
        " the quick fox. ",
        "two\nlines\n",
        "<think>\nhmm\n</think>\n\nfirst",
        "user",
        "the end</think>x",
        "x",
        "\n\nnaïve café 日本語",
        "Ångström e\u0301",
        "1234",
        "a <x y> b",
        "assistant: hello",
        "😀 👍🏽",
        "def f(x):\n    return x\t",
    )
)


@st.composite
def conversations(draw, reference) -> list[dict]:
    """One to five turns without special tokens in them, which are text in content (tests/test_chat.py)."""
    special = [token.content for token in reference.added_tokens_decoder.values() if token.special]
    answers = ANSWERS.filter(lambda answer: not any(token in answer for token in special))
    contents = [draw(answers) for _ in range(2 * draw(st.integers(1, 5)))]
    return talk(*contents, system=draw(st.sampled_from((None, "Be kind.", " x "))))


def test_generated_settings_and_templates(tmp_path, spm):  # noqa: F811
    """Every tokenizer, text and conversation that can be drawn: the same ids, BOS and loss, or a refusal by name."""
    count = collections.Counter()
    phases = [Phase.explicit, Phase.generate]  # a failing example is small enough
    options = {"suppress_health_check": list(HealthCheck), "derandomize": SEED is None, "database": None}

    @settings(max_examples=-(-EXAMPLES // TALKS), phases=phases, **options)
    @given(st.data())
    def check(data):
        shutil.rmtree(tmp_path / "t", ignore_errors=True)
        draw_folder(data.draw, tmp_path / "t", spm)
        source, parts = draw_template(data.draw)
        write(tmp_path / "t", chat_template__jinja=source)
        reference, tok = reference_of(tmp_path / "t"), load_tokenizer(tmp_path / "t")
        text = "".join(data.draw(st.lists(st.one_of(st.sampled_from([*NAMES, " ", "a", "_"]), ANSWERS), max_size=6)))
        assert tok.encode(text, special=True) == reference.encode(text, add_special_tokens=False), text
        wanted = reference.encode("the fox")
        got = tok.encode("the fox", bos=tok.adds_bos)
        assert got == wanted[: len(got)] and len(wanted) - len(got) in (0, 1)
        for _ in range(TALKS):
            count[compare(tok, reference, data.draw(conversations(reference)), parts)] += 1
            source, parts = draw_template(data.draw)
            tok.templates["default"] = reference.chat_template = source

    (seed(int(SEED))(check) if SEED else check)()
    print(dict(count))
    assert count["refused"] <= 0.02 * EXAMPLES and count["same"] >= 0.9 * EXAMPLES


def compare(tok, reference, messages: list[dict], parts: dict) -> str:
    """Whether the conversation was the same or refused by name; an AssertionError if neither."""
    text, answers = "", []
    for m in messages:
        head, way, foot = parts[m["role"]]
        made = way(m["content"])
        start = len(text) + len(head.replace("ROLE", m["role"]))
        text += head.replace("ROLE", m["role"]) + made + foot
        if m["role"] == "assistant":
            answers.append((start, start + len(made)))
    assert text == reference.apply_chat_template(messages, tokenize=False)
    try:
        ids, mask = encode_chat(tok, messages)
    except ValueError as e:
        assert "--chat=" in str(e)
        return "refused"
    assert ids == reference.apply_chat_template(messages, return_dict=False)
    expected = expected_mask(tok, reference, text, answers)
    wrong = [(i, tok.pieces[i], loss) for i, loss, right in zip(ids, mask, expected) if loss != right]
    assert not wrong and len(mask) == len(expected), (wrong, text, answers)
    return "same"
