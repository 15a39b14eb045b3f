"""Text to ids and back for the Llama, Mistral and Qwen families, with the ids of the reference tokenizers, and chat rendering.

    tok = load_tokenizer("checkpoints/smollm2-135m-instruct")  # picks by the files that lie there
    ids = tok.encode("Hello", bos=tok.adds_bos); text = tok.decode(ids)
    ids, loss_mask = encode_chat(tok, [{"role": "user", "content": "Hi"}], generate=True)

Two cores: byte-level BPE through tiktoken (tokenizer.json, vocab.json + merges.txt, *.tiktoken, Llama 3's tokenizer.model) and
sentencepiece (tokenizer.model of Llama 2 and Mistral; a tokenizer.json of that kind becomes a sentencepiece model in memory).
What cannot be reproduced exactly is refused when loading. Depends on tiktoken, sentencepiece and the standard library only.
"""

import base64
import codecs
import functools
import itertools
import json
import re
import struct
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import sentencepiece
import tiktoken

# How text is split before merging. GPT-2: https://github.com/openai/gpt-2/blob/master/src/encoder.py;
# Llama 3, and Qwen with single digits: https://github.com/meta-llama/llama3/blob/main/llama/tokenizer.py
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_THEN_GPT2 = r"\p{N}%s|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = LLAMA3.replace("{1,3}", "")

# Special tokens that follow the ranks of the two tiktoken files. Names of Llama 3.1: https://github.com/meta-llama/llama-models
LLAMA3_SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>"),
    *("<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(2, 246)),
)
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))

# Byte-level BPE writes each byte as one printable character: itself where it is printable Latin-1, else 256 and up.
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
CHAR_TO_BYTE = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)}
SPACE = "\u2581"  # how sentencepiece writes it
MAX_SPACES = 400_000  # tiktoken's regex engine overflows its stack of 10^6 entries at that many white characters in a row
COPY = "copy the file again from the model's source"


# ------------------------------------------------------------------------------------------------------------ merge lists


def merge_order(vocab: dict[str, int], merges: list[tuple[str, str]], *, whole_words: bool) -> list[str]:
    """The tokens that merging makes, by rank, such that merging by rank gives what merging by the list gives.

    Hugging Face joins neighbours that are a listed pair, first listed first; tiktoken and sentencepiece join any neighbours whose
    concatenation has a rank, lowest first. What happens inside a stretch that no merge crosses is what happens to that stretch alone. So a
    token can only ever be made by the pair that makes it when it is merged alone: the place of that pair is its rank, and a token that
    merging alone does not make has none. whole_words (ignore_merges): a word that is a token needs no merges, so every token needs a rank;
    ValueError if one would then be joined inside of words too.
    """
    turn = {pair: i for i, pair in enumerate(merges)}  # of a pair listed twice the last place counts
    for (a, b), i in turn.items():
        if not (a in vocab and b in vocab and a + b in vocab):
            raise ValueError(f"merge {i + 1} ({a!r} {b!r}) uses a token that the vocabulary lacks, expected only known ones: {COPY}")
    never, rank = len(merges), {}
    for token in vocab:
        parts, first = list(token), never
        turns = [turn.get(pair, never) for pair in zip(parts, parts[1:])]
        while turns and (first := min(turns)) < never:
            i = turns.index(first)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
            del turns[i]
            if i < len(turns):
                turns[i] = turn.get((parts[i], parts[i + 1]), never)
            if i > 0:
                turns[i - 1] = turn.get((parts[i - 1], parts[i]), never)
        if len(parts) == 2 and whole_words:
            raise ValueError(f"token {token!r} is for whole words only, but ranks make it of {parts[0]!r} {parts[1]!r} too: not supported")
        if len(token) > 1 and (len(parts) == 1 or whole_words):
            rank[token] = first
    return sorted(rank, key=rank.get)


# -------------------------------------------------------------------------------------------------------------- two cores


class ByteBPE:
    """Byte-level BPE on tiktoken. tokens: bytes, in merge order, to ids; unknown: the id of bytes that tokens lacks, None drops them."""

    def __init__(self, pattern: str, tokens: dict[bytes, int], *, unknown: int | None = None):
        order = {bytes([b]): unknown for b in range(256)} | tokens
        self.ids = list(order.values())  # rank -> id
        self.dropped = b"".join(token for token, id_ in order.items() if id_ is None)
        self.pattern, self.python = pattern, None
        # tiktoken forgets what its pattern does not match, Hugging Face keeps it as a piece of its own
        self.bpe = _encoding(rf"{pattern}|(?:(?!{pattern})[\s\S])+", {token: rank for rank, token in enumerate(order)})

    def encode(self, text: str, continued: bool) -> list[int]:
        data = text.encode() if self.dropped else b""
        spaces = max(map(len, re.findall(r"\s+", text)), default=0) if len(text) > MAX_SPACES else 0
        if spaces <= MAX_SPACES and len(data) == len(data.translate(None, self.dropped)):
            return list(map(self.ids.__getitem__, self.bpe.encode_ordinary(text)))
        self.python = self.python or python_pattern(self.pattern)
        pieces, end = [], 0
        for match in self.python.finditer(text):
            pieces += text[end : match.start()], match[0]
            end = match.end()
        pieces = (piece.encode().translate(None, self.dropped) for piece in (*pieces, text[end:]))
        return [self.ids[rank] for piece in pieces if piece for rank in self.bpe._encode_single_piece(piece)]


def _encoding(pattern: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


@functools.cache
def _ranges(name: str) -> str:
    """The characters of a class such as \\p{L}, as tiktoken's engine sees it, written as ranges for a set of Python's re."""
    every = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))
    found = bytes(_encoding(name, {bytes([b]): b for b in range(256)}).encode_ordinary(every)).decode()
    runs = (list(run) for _, run in itertools.groupby(enumerate(found), lambda pair: ord(pair[1]) - pair[0]))
    return "".join(rf"\U{ord(run[0][1]):08x}-\U{ord(run[-1][1]):08x}" for run in runs)


def python_pattern(pattern: str) -> re.Pattern:
    """The same pattern for Python's re, which has no \\p{..} and another \\s."""
    depth = 0

    def spell(match: re.Match) -> str:
        nonlocal depth
        depth += {"[": 1, "]": -1}.get(match[0], 0)
        if match[0][1:2] not in tuple("pPsSdDwW"):
            return match[0]
        return _ranges(match[0]) if depth else f"[{_ranges(match[0])}]"

    return re.compile(re.sub(r"\\[pP]\{.*?\}|\\.|\[|\]", spell, pattern))


class SentencePiece:
    """A sentencepiece model. Its space in front of a text: every: also after a special token; metaspace: not where there is one."""

    def __init__(self, proto: bytes, *, every: bool, metaspace: bool = False):
        self.model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        no_space = b"\x1a\x02\x18\x00"  # normalizer_spec { add_dummy_prefix: false }
        self.bare = sentencepiece.SentencePieceProcessor(model_proto=proto + no_space)
        self.every, self.metaspace = every, metaspace

    def encode(self, text: str, continued: bool) -> list[int]:
        bare = (continued and not self.every) or (self.metaspace and text.startswith((" ", SPACE)))
        return (self.bare if bare else self.model).encode(text)


def sentencepiece_proto(vocab: dict[str, int], order: list[str], unknown: str, *, prefix: bool) -> bytes:
    """A sentencepiece BPE model of these tokens, merged in this order, as a ModelProto (field numbers: sentencepiece_model.proto)."""

    def varint(n: int) -> bytes:
        return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])

    def field(number: int, value: bytes | int | float) -> bytes:
        if isinstance(value, float):
            return varint(number << 3 | 5) + struct.pack("<f", value)
        return varint(number << 3) + varint(value) if isinstance(value, int) else varint(number << 3 | 2) + varint(len(value)) + value

    normal, unk, control, byte = 1, 2, 3, 6
    rank = {token: i for i, token in enumerate(order)}
    kinds = {token: normal if token in rank or len(token) == 1 else control for token in sorted(vocab, key=vocab.get)}
    kinds |= {f"<0x{b:02X}>": byte for b in range(256)} | {unknown: unk}
    if sorted(vocab.values()) != list(range(len(kinds))):
        raise ValueError("the vocabulary has gaps or lacks bytes or the unknown token, expected all: add the model's tokenizer.model")
    pieces = b"".join(field(1, field(1, t.encode()) + field(2, -float(rank.get(t, 0))) + field(3, kind)) for t, kind in kinds.items())
    trainer = field(3, 2) + field(35, 1) + field(45, unknown.encode())  # model_type BPE, byte_fallback, unk_piece
    normalizer = field(1, b"identity") + field(3, int(prefix)) + field(4, 0) + field(5, 1)  # add_dummy_prefix, spaces kept, spaces escaped
    return pieces + field(2, trainer) + field(3, normalizer)


# -------------------------------------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """Encode and decode; made by load_tokenizer.

    bos_id, eos_id (None where there is none), stop_ids (each ends a generation), vocab_size (largest id + 1, added tokens included),
    adds_bos (whether the reference tokenizer puts BOS in front by default), chat_form (the default of encode_chat).
    """

    def __init__(self, core, pieces: dict[int, bytes], added: dict[int, dict], config: dict, normalize: str | None = None):
        self.core, self.normalize = core, normalize
        self.pieces = pieces | {i: t["content"].encode() for i, t in added.items()}
        self.vocab_size = max(self.pieces) + 1
        self.special = {i for i, t in added.items() if t.get("special")}
        self.added = {t["content"]: i for i, t in added.items()}
        self.strips = isinstance(core, SentencePiece) and core.model.normalize("a") != "a"  # decode takes off the space put in front
        # [special][0: what is looked for in the text as given, 1: in the normalised text]
        ordinary = {i: t for i, t in added.items() if not t.get("special")}
        self.matchers = [[_matcher(tokens, late, normalize) for late in (False, True)] for tokens in (ordinary, added)]
        self.bos_id, self.eos_id = (self.added.get(_content(config.get(name))) for name in ("bos_token", "eos_token"))
        self.adds_bos = bool(config.get("add_bos_token")) and self.bos_id is not None
        template = config.get("chat_template") or ""
        self.template = template if isinstance(template, str) else " ".join(t["template"] for t in template)
        marks = {"<<SYS>>": "plain", "<|im_start|>": "chatml", "<|start_header_id|>": "llama3", "[INST]": "mistral"}
        self.chat_form = next((form for mark, form in marks.items() if mark in self.template), "plain")
        end = self.added.get({"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(self.chat_form))
        stops = config.get("eos_token_id", [])
        stops = (self.eos_id, end, *(stops if isinstance(stops, list) else [stops]))
        self.stop_ids = tuple(dict.fromkeys(id_ for id_ in stops if id_ is not None))

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, special: bool = False, continued: bool = False) -> list[int]:
        """Ids of the text. special: special tokens in it become their ids, otherwise they are text like any other (added tokens that
        are not special always become theirs, as in the reference). continued: the text follows another, so sentencepiece puts no
        space in front."""
        ids = []
        if not text.isascii():  # JSON may hold halves of surrogate pairs: join or replace them
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        given, normalised = self.matchers[special]
        for part in _split(text, given):
            part = unicodedata.normalize(self.normalize, part) if self.normalize and isinstance(part, str) else part
            for piece in [part] if isinstance(part, int) else _split(part, normalised):
                ids += [piece] if isinstance(piece, int) else self.core.encode(piece, continued)
            continued = True
        if bos and self.bos_id is not None and not (special and ids[:1] == [self.bos_id]):  # never two of them
            ids = [self.bos_id, *ids]
        return ids + [self.eos_id] if eos and self.eos_id is not None else ids

    def decode(self, ids: list[int], *, skip_special: bool = False) -> str:
        """Text of the ids, the inverse of encode up to normalisation. Invalid UTF-8 gives U+FFFD, an id without token (padding) nothing."""
        kept = [id_ for id_ in ids if id_ not in self.special] if skip_special else ids
        text = b"".join([self.pieces.get(id_, b"") for id_ in kept]).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips else text

    def stream(self, *, skip_special: bool = False) -> Callable[[int | None], str]:
        """A function from the next id to the text that it completes, for printing while generating; None at the end gives what is left."""
        decoder, start = codecs.getincrementaldecoder("utf-8")("replace"), self.strips

        def push(id_: int | None) -> str:
            nonlocal start
            text = decoder.decode(b"" if skip_special and id_ in self.special else self.pieces.get(id_, b""), final=id_ is None)
            text, start = (text.removeprefix(" ") if start else text), start and not text
            return text

        return push


def _content(token: str | dict | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _matcher(added: dict[int, dict], late: bool, normalize: str | None) -> tuple[re.Pattern, dict[str, dict]] | None:
    """For _split: the longest token at the leftmost place, of those to be found before or late, that is after, normalisation."""
    tokens = {t["content"]: t | {"id": i} for i, t in added.items() if bool(t.get("normalized")) == late}
    tokens = {unicodedata.normalize(normalize, content): t for content, t in tokens.items()} if late and normalize else tokens
    return (re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))), tokens) if tokens else None


def _split(text: str, matcher: tuple[re.Pattern, dict[str, dict]] | None) -> Iterator[str | int]:
    """The text between the matcher's tokens and the ids of the tokens, in order."""
    end = 0
    for match in matcher[0].finditer(text) if matcher else ():
        token, (start, stop) = matcher[1][match[0]], match.span()
        if token.get("single_word") and re.search(r"\w", text[max(0, start - 1) : start] + text[stop : stop + 1]):
            continue
        if token.get("lstrip"):
            start = end + len(text[end:start].rstrip())
        if token.get("rstrip"):
            stop = re.compile(r"\s*").match(text, stop).end()
        if start > end:
            yield text[end:start]
        yield token["id"]
        end = stop
    if end < len(text):
        yield text[end:]


# ------------------------------------------------------------------------------------------------------------------- chat


def encode_chat(tok: Tokenizer, messages: list[dict], *, form: str | None = None, generate: bool = False) -> tuple[list[int], list[bool]]:
    """Ids of a conversation and a mask of the loss: the assistant's answers with their end token.

    messages: {"role": "system" | "user" | "assistant", "content": str}, at most one system message, first. form: a key of FORMS, by default
    that of the tokenizer's chat template, "plain" without one. generate: the last message is the user's, the ids end where the answer
    begins, and they are a prefix of the ids with the answer appended. Content is never searched for special tokens.
    """
    form = form or tok.chat_form
    if form not in FORMS:
        raise ValueError(f"chat form {form!r} is unknown, expected one of {', '.join(FORMS)}: choose one of them")
    _check(messages, "user" if generate else "assistant")
    ids, mask = [], []
    for part, loss in FORMS[form](tok, messages, generate):
        # Mistral's tokenizer takes each part as a text of its own, the others the whole as one
        continued = form != "mistral" and any(id_ != tok.bos_id for id_ in ids)
        new = [part] if isinstance(part, int) else tok.encode(part, continued=continued)
        ids += new
        mask += [loss] * len(new)
    return ids, mask


def _check(messages: list[dict], last: str) -> None:
    roles = ("system", "user", "assistant")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages is {messages!r}, expected a list of {{'role': ..., 'content': ...}}: give at least a user message")
    for i, m in enumerate(messages):
        if not isinstance(m, dict) or m.get("role") not in roles or not isinstance(m.get("content"), str):
            raise ValueError(f"message {i} is {str(m)[:80]}, expected a role of {', '.join(roles)} and a text as content: mend it")
        if m["role"] == "system" and i > 0:
            raise ValueError(f"message {i} has the role system, expected it in the first message only: move or remove it")
        if m["role"] != "system" and not m["content"].strip():
            raise ValueError(f"message {i} of the role {m['role']} is empty, expected text: fill it in or drop the conversation")
    if messages[-1]["role"] != last:
        raise ValueError(f"the last message has the role {messages[-1]['role']}, expected {last}: mend the conversation")


def _ids(tok: Tokenizer, form: str, *names: str) -> list[int]:
    for name in names:
        if name not in tok.added:
            raise ValueError(f"this tokenizer has no {name}, which the chat form {form} needs: use form plain or a chat model's tokenizer")
    return [tok.added[name] for name in names]


def _plain(tok: Tokenizer, messages: list[dict], generate: bool) -> Iterator[tuple[str | int, bool]]:
    """The form of the paper's data: <|user|> and its like are plain text on a line of their own, EOS ends an answer."""
    if tok.eos_id is None:
        raise ValueError("this tokenizer has no EOS, expected one for the chat form plain: name eos_token in tokenizer_config.json")
    if tok.adds_bos:
        yield tok.bos_id, False
    text = ""
    for m in messages:
        text += f"<|{m['role']}|>\n"
        if m["role"] == "assistant":
            yield text, False
            yield m["content"].strip(), True
            yield tok.eos_id, True
            text = "\n"
        else:
            text += m["content"].strip() + "\n"
    if generate:
        yield text + "<|assistant|>\n", False


def _chatml(tok: Tokenizer, messages: list[dict], generate: bool) -> Iterator[tuple[str | int, bool]]:
    """SmolLM2 and Qwen. The templates of SmolLM2, Qwen2 and Qwen2.5 hold a system message for when none is given; Qwen3 puts empty thoughts
    before an answer to the last question that has none of its own. An answer is encoded apart from its header, as when it is generated."""
    start, end = _ids(tok, "chatml", "<|im_start|>", "<|im_end|>")
    default = re.search(r"<\|im_start\|>system(?:\n|\\n)([^'\"{}]+?)<\|im_end\|>", tok.template)
    if default and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": default[1].replace("\\n", "\n")}, *messages]
    thoughts = "<think>\n\n</think>\n\n" if "enable_thinking" in tok.template else ""
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    for i, m in enumerate(messages):
        yield start, False
        if m["role"] == "assistant":
            yield "assistant\n" + (thoughts if i > last and not m["content"].startswith("<think>") else ""), False
            yield m["content"], True
        else:
            yield f"{m['role']}\n{m['content']}", False
        yield end, m["role"] == "assistant"
        yield "\n", False
    if generate:
        yield start, False
        yield "assistant\n" + thoughts, False


def _llama3(tok: Tokenizer, messages: list[dict], generate: bool) -> Iterator[tuple[str | int, bool]]:
    """Llama 3's headers. 3.1 and later begin the system message with dates: the template's own, so that ids never change."""
    bos, start, end, eot = _ids(tok, "llama3", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    messages = [m | {"content": m["content"].strip()} for m in messages]
    if "Cutting Knowledge Date" in tok.template:
        date = re.search(r"\d\d [A-Z][a-z]{2} \d{4}", tok.template)
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
        dates = f"Cutting Knowledge Date: December 2023\nToday Date: {date[0] if date else '26 Jul 2024'}\n\n"
        messages.insert(0, {"role": "system", "content": dates + system})
    yield bos, False
    for m in [*messages, {"role": "assistant", "content": None}] if generate else messages:
        answer = m["role"] == "assistant"
        yield from ((start, False), (m["role"], False), (end, False), ("\n\n" if answer else "\n\n" + m["content"], False))
        if answer and m["content"]:
            yield m["content"], True
        if m["content"] is not None:
            yield eot, answer


def _mistral(tok: Tokenizer, messages: list[dict], generate: bool) -> Iterator[tuple[str | int, bool]]:
    """Mistral Instruct. v0.1 has no token [INST]: it is text, with spaces inside, and the system message goes before the first question;
    later versions have one, without spaces, the system message goes before the last question, and answers lose spaces at their end."""
    system, turns = (messages[0]["content"], messages[1:]) if messages[0]["role"] == "system" else ("", messages)
    if any(m["role"] != ("user", "assistant")[i % 2] for i, m in enumerate(turns)):
        found = ", ".join(m["role"] for m in turns)
        raise ValueError(f"the roles are {found}, expected user and assistant by turns for the form mistral: mend the conversation")
    inst = _ids(tok, "mistral", "[INST]", "[/INST]") if "[INST]" in tok.added else None
    last = (len(turns) - 1) // 2 * 2
    bos, eos = _ids(tok, "mistral", "<s>", "</s>")
    yield bos, False
    for i, m in enumerate(turns):
        text = f"{system}\n\n{m['content']}" if system and i == (last if inst else 0) else m["content"]
        if m["role"] == "assistant":
            yield from ((text.rstrip(" ") if inst else text, True), (eos, True))
        elif inst:
            yield from ((inst[0], False), (text, False), (inst[1], False))
        else:
            yield f"[INST] {text} [/INST]", False


FORMS = {"plain": _plain, "chatml": _chatml, "llama3": _llama3, "mistral": _mistral}


# ---------------------------------------------------------------------------------------------------------------- loading


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer whose files lie in the folder. FileNotFoundError without any; ValueError if damaged or not exactly supported."""
    folder = Path(folder)
    models = [p for p in (folder / "tokenizer.model", *sorted(folder.glob("*.model.v*"))) if p.exists()]
    if models:
        path, load = models[0], _load_model
    elif (folder / "tokenizer.json").exists():
        path, load = folder / "tokenizer.json", _load_json
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        path, load = folder / "vocab.json", _load_vocab
    elif tiktokens := sorted(folder.glob("*.tiktoken")):
        path, load = tiktokens[0], _load_model
    else:
        found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing" if folder.is_dir() else "no such folder"
        expected = "tokenizer.model (or *.model.v3), tokenizer.json, vocab.json with merges.txt, or *.tiktoken"
        raise FileNotFoundError(f"no tokenizer in {folder} (found: {found}), expected {expected}: copy it from the model's source")
    try:
        config, added = _settings(folder)
        return load(path, config, added)
    except ValueError as e:
        raise ValueError(f"tokenizer in {folder} ({path.name}): {e}") from None


def _settings(folder: Path) -> tuple[dict, dict[int, dict]]:
    """The small files beside the vocabulary as one dict, and the added tokens that they name."""
    config = {}
    for name in ("special_tokens_map.json", "generation_config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            config |= {k: v for k, v in _json(folder / name).items() if v is not None}
    if (folder / "chat_template.jinja").exists():
        config["chat_template"] = _bytes(folder / "chat_template.jinja").decode("utf-8", "replace")
    added = _json(folder / "added_tokens.json") if (folder / "added_tokens.json").exists() else {}
    added = {i: {"content": content, "special": content in _names(config)} for content, i in added.items()}
    return config, added | {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}


def _names(config: dict) -> set[str]:
    """The special tokens that have a role: bos_token, pad_token, ..."""
    return {_content(v) for k, v in config.items() if k.endswith("_token") and isinstance(v, (str, dict))}


def _bytes(path: Path) -> bytes:
    data = path.read_bytes()
    if not data or data.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path.name} is {'a Git LFS pointer (run git lfs pull)' if data else 'empty'}, expected the content: {COPY}")
    return data


def _json(path: Path) -> dict:
    try:
        value = json.loads(_bytes(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path.name} is not JSON ({e}), expected a whole JSON file: {COPY}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds a JSON {type(value).__name__}, expected an object: {COPY}")
    return value


def _load_model(path: Path, config: dict, added: dict[int, dict]) -> Tokenizer:
    """sentencepiece's binary format, which begins with the tag of its first field, or tiktoken's lines of base64 and rank."""
    data = _bytes(path)
    if data[0] == 0x0A:
        try:
            core = SentencePiece(data, every=config.get("legacy", False)) if _is_whole(data) else None
        except RuntimeError:
            core = None
        if core is None:
            raise ValueError(f"not a whole sentencepiece model of pieces, trainer_spec and normalizer_spec, as expected: {COPY}")
        return _sentencepiece_tokenizer(core, {"add_bos_token": True} | config, added)
    tokens = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            tokens[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"line {number} is {line[:40]!r}, expected a token in base64 and its rank: {COPY}") from None
    size = len(tokens)
    if size not in (128_000, 151_643) or list(tokens.values()) != list(range(size)) or not all(bytes([b]) in tokens for b in range(256)):
        raise ValueError(f"{size:,} tokens, expected 128,000 (Llama 3) or 151,643 (Qwen) in the order of their ranks: {COPY}")
    llama = size == 128_000
    names = LLAMA3_SPECIAL if llama else QWEN_SPECIAL
    defaults = {"bos_token": names[0], "eos_token": names[1], "add_bos_token": True} if llama else {"eos_token": names[0]}
    special = {size + i: {"content": content, "special": True} for i, content in enumerate(names)}
    core, pieces = ByteBPE(LLAMA3 if llama else QWEN, tokens), {i: token for token, i in tokens.items()}
    return Tokenizer(core, pieces, special | added, defaults | config, None if llama else "NFC")


def _is_whole(proto: bytes) -> bool:
    """Whether the fields of a ModelProto fit the file and the settings after the pieces are there: a cut between two pieces would parse."""
    at, tags = 0, set()
    while at < len(proto):
        tags.add(proto[at])
        size = shift = 0
        while (at := at + 1) < len(proto):
            size, shift = size | (proto[at] & 127) << shift, shift + 7
            if proto[at] < 128:
                break
        at += 1 + size
    return at == len(proto) and {0x12, 0x1A} <= tags


def _sentencepiece_tokenizer(core: SentencePiece, config: dict, added: dict[int, dict]) -> Tokenizer:
    model = core.model
    names = model.id_to_piece(list(range(model.get_piece_size())))
    pieces = {i: bytes([int(name[3:5], 16)]) if model.is_byte(i) else name.replace(SPACE, " ").encode() for i, name in enumerate(names)}
    special = {i: {"content": name, "special": True} for i, name in enumerate(names) if model.is_control(i) or model.is_unknown(i)}
    ends = {key: names[id_] for key, id_ in (("bos_token", model.bos_id()), ("eos_token", model.eos_id())) if id_ >= 0}
    return Tokenizer(core, pieces, special | added, ends | config)


def _load_vocab(path: Path, config: dict, added: dict[int, dict]) -> Tokenizer:
    """vocab.json and merges.txt. No file says how text is split before merging, so the tokenizer's class has to."""
    kind = config.get("tokenizer_class", "missing").removesuffix("Fast")
    if kind not in ("Qwen2Tokenizer", "GPT2Tokenizer"):
        raise ValueError(f"tokenizer_config.json has tokenizer_class {kind}, expected Qwen2Tokenizer or GPT2Tokenizer: add tokenizer.json")
    lines = _bytes(path.with_name("merges.txt")).decode("utf-8", "replace").replace("\r\n", "\n").split("\n")
    model = {"vocab": _json(path), "merges": [line for line in lines if line.strip() and not line.startswith("#version")]}
    pattern, normalize = (QWEN, "NFC") if kind == "Qwen2Tokenizer" else (GPT2, None)
    return _byte_tokenizer(model, pattern, config, added, normalize)


def _load_json(path: Path, config: dict, added: dict[int, dict]) -> Tokenizer:
    """Hugging Face's tokenizer.json with a BPE model, byte-level or of sentencepiece's kind."""
    fast = _json(path)
    model = fast.get("model") or {}
    odd = {k: v for k, v in model.items() if v and k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")}
    if model.get("type", "BPE") != "BPE" or not {"vocab", "merges"} <= model.keys() or odd:
        raise ValueError(f"the model is {model.get('type')} {odd or ''}, expected plain BPE with vocab and merges: not supported")
    added = {t["id"]: t for t in fast.get("added_tokens") or []} | added
    for step in _steps(fast.get("post_processor"), "processors"):
        first = step["single"][0] if step["type"] == "TemplateProcessing" else {}
        if "SpecialToken" in first:
            config = {"bos_token": first["SpecialToken"]["id"], "add_bos_token": True} | config
    normalizers, splits = _steps(fast.get("normalizer"), "normalizers"), _steps(fast.get("pre_tokenizer"), "pretokenizers")
    if model.get("byte_fallback"):
        prefix, every, metaspace = _spaces(normalizers, splits)
        order = merge_order(model["vocab"], _pairs(model), whole_words=False)
        proto = sentencepiece_proto(model["vocab"], order, model.get("unk_token") or "", prefix=prefix)
        return _sentencepiece_tokenizer(SentencePiece(proto, every=every, metaspace=metaspace), config, added)
    forms = [step["type"] for step in normalizers]
    if forms not in ([], ["NFC"], ["NFD"], ["NFKC"], ["NFKD"]):
        raise ValueError(f"the normalizer is {' + '.join(forms)}, expected none or a Unicode normal form: this tokenizer is not supported")
    return _byte_tokenizer(model, _pattern(splits), config, added, forms[0] if forms else None)


def _steps(step: dict | None, key: str) -> list[dict]:
    """The steps of a normalizer, pre-tokenizer or post-processor, with sequences laid flat."""
    if step and step["type"] == "Sequence":
        return [inner for s in step[key] for inner in _steps(s, key)]
    return [step] if step else []


def _pairs(model: dict) -> list[tuple[str, str]]:
    pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    for i, pair in enumerate(pairs):
        if len(pair) != 2:
            raise ValueError(f"merge {i + 1} is {model['merges'][i]!r}, expected two tokens: {COPY}")
    return pairs


def _pattern(splits: list[dict]) -> str:
    """The regex that splits text as these pre-tokenizers do one after the other."""
    *before, last = splits or [{"type": "none"}]
    types = [s["type"] for s in before]
    if last["type"] == "ByteLevel" and not last.get("add_prefix_space"):
        if last.get("use_regex", True) and types in ([], ["Digits"]):
            return DIGITS_THEN_GPT2 % ("" if before[0]["individual_digits"] else "+") if before else GPT2
        if not last.get("use_regex", True) and types == ["Split"] and before[0]["behavior"] == "Isolated" and not before[0]["invert"]:
            if "Regex" in before[0]["pattern"]:
                return before[0]["pattern"]["Regex"]
    found, expected = " + ".join([*types, last["type"]]), "ByteLevel, Digits + ByteLevel, or Split (regex, isolated) + ByteLevel"
    raise ValueError(f"the pre-tokenizer is {found}, expected {expected}, without a space in front: this tokenizer is not supported")


def _spaces(normalizers: list[dict], splits: list[dict]) -> tuple[bool, bool, bool]:
    """Whether a space goes in front of a text; of every text between special tokens, not only the first; only where there is none yet."""
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if not splits and normalizers in ([{"type": "Prepend", "prepend": SPACE}, escape], [escape]):
        return len(normalizers) == 2, True, False
    meta = {"type": "Metaspace", "replacement": SPACE, "split": False}
    if not normalizers and len(splits) == 1 and meta.items() <= splits[0].items():
        return splits[0]["prepend_scheme"] != "never", splits[0]["prepend_scheme"] == "always", True
    found = " + ".join(step["type"] for step in (*normalizers, *splits))
    raise ValueError(f"text is prepared by {found or 'nothing'}, expected what Llama 2 or Mistral do: add the model's tokenizer.model")


def _byte_tokenizer(model: dict, pattern: str, config: dict, added: dict[int, dict], normalize: str | None) -> Tokenizer:
    vocab = model["vocab"]
    if len(set(vocab.values())) < len(vocab):
        raise ValueError(f"two tokens of the vocabulary have one id, expected an id for each: {COPY}")
    order = merge_order(vocab, _pairs(model), whole_words=bool(model.get("ignore_merges")))
    singles, unknown = [c for c in CHAR_TO_BYTE if c in vocab], vocab.get(model.get("unk_token"))
    if len(singles) < 256 and unknown is not None and model.get("fuse_unk"):
        raise ValueError("the vocabulary lacks bytes and fuse_unk is set, expected one or the other: this tokenizer is not supported")
    spelled = {t: bytes(map(CHAR_TO_BYTE.get, t)) if CHAR_TO_BYTE.keys() >= set(t) else t.encode() for t in vocab}
    core = ByteBPE(pattern, {spelled[token]: vocab[token] for token in (*singles, *order)}, unknown=unknown)
    special = {vocab[name]: {"content": name, "special": True} for name in _names(config) if name in vocab}
    return Tokenizer(core, {i: spelled[token] for token, i in vocab.items()}, special | added, config, normalize)
