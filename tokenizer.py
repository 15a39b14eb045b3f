"""Text to ids and back for the Llama, Mistral and Qwen families, with the ids of the reference tokenizers, and chat rendering.

    tok = load_tokenizer("checkpoints/smollm2-135m-instruct")        # picks by the files that lie there
    ids = tok.encode("Hello", bos=tok.adds_bos); text = tok.decode(ids)
    ids, loss_mask = encode_chat(tok, [{"role": "user", "content": "Hi"}], generate=True)

Two cores: byte-level BPE through tiktoken (tokenizer.json, vocab.json + merges.txt, *.tiktoken, Llama 3's tokenizer.model) and
sentencepiece (tokenizer.model of Llama 2 and Mistral; a tokenizer.json of that kind is turned into a sentencepiece model in memory).
What cannot be reproduced exactly is refused when loading. Depends on tiktoken, sentencepiece and the standard library only.
"""

import base64
import binascii
import codecs
import itertools
import json
import re
import struct
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import tiktoken

# Pre-tokenisation patterns. GPT-2's: https://github.com/openai/gpt-2/blob/master/src/encoder.py; Llama 3's, also Qwen's with single digits:
# https://github.com/meta-llama/llama3/blob/main/llama/tokenizer.py
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_GPT2 = r"\p{N}%s|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"  # GPT-2's within what lies between digits
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = LLAMA3.replace("{1,3}", "")

# Special tokens of the two tiktoken files, in id order. Llama 3.1's names: https://github.com/meta-llama/llama-models (llama3/tokenizer.py)
LLAMA3_SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(2, 246)),
)
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>")  # a chat model's turn can end with any of these

MAX_SPACES = 400_000  # a longer run of whitespace overflows the stack of tiktoken's regex engine (one entry per character, 10^6 in all)

# Byte-level BPE writes each byte as one printable character: itself where it is printable Latin-1, else 256 and up.
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
CHAR_TO_BYTE = {chr(b): b for b in _PRINTABLE} | {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _PRINTABLE)}
SPACE = "\u2581"  # sentencepiece's way to write one


# --------------------------------------------------------------------------------------------------------- merge lists


def merge_order(vocab: dict[str, int], merges: list[tuple[str, str]], *, whole_words: bool) -> list[str]:
    """The tokens of length > 1 in the order of their ranks, such that merging by rank gives what merging by the list gives.

    Hugging Face joins neighbours that are a listed pair, first listed first; tiktoken and sentencepiece join any neighbours whose
    concatenation has a rank, lowest first. What happens inside a stretch that no merge crosses is what happens to that stretch alone. So a
    token can only ever be made by the pair that makes it when it is merged alone: the place of that pair is its rank, and a token that
    merging alone does not make has none. whole_words (ignore_merges): a word that is a token needs no merges, so each token needs a rank;
    ValueError if a token without a pair would then be joined inside of words too.
    """
    turn = {pair: i for i, pair in enumerate(merges)}  # of a pair listed twice the last place counts
    for (a, b), i in turn.items():
        if not (a in vocab and b in vocab and a + b in vocab):
            raise ValueError(f"merge {i + 1} ({a!r} {b!r}) uses a token that the vocabulary lacks")
    never, rank = len(merges), {}
    for token in vocab:
        parts, first = list(token), never
        turns = [turn.get(pair, never) for pair in itertools.pairwise(parts)]
        while turns and (first := min(turns)) < never:
            i = turns.index(first)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
            del turns[i]
            for k in range(max(i - 1, 0), min(i + 1, len(turns))):
                turns[k] = turn.get((parts[k], parts[k + 1]), never)
        if len(token) > 1 and (len(parts) == 1 or whole_words):
            if len(parts) == 2:
                raise ValueError(f"token {token!r} is for whole words only, but ranks would join {parts[0]!r} and {parts[1]!r} inside of words too")
            rank[token] = first
    return sorted(rank, key=rank.get)


# ---------------------------------------------------------------------------------------------------------- the two cores


class ByteBPE:
    """Byte-level BPE on tiktoken. tokens: bytes in merge order -> id; unknown: id for bytes that the vocabulary lacks (None drops them)."""

    def __init__(self, pattern: str, tokens: dict[bytes, int], *, unknown: int | None = None):
        single = {bytes([b]): tokens.get(bytes([b]), unknown) for b in range(256)}
        self.pattern, self.python = pattern, None
        self.ids = [*single.values(), *(id_ for token, id_ in tokens.items() if len(token) > 1)]  # rank -> id
        self.dropped = b"".join(token for token, id_ in single.items() if id_ is None)
        ranks = {token: rank for rank, token in enumerate((*single, *(token for token in tokens if len(token) > 1)))}
        # tiktoken forgets what its pattern does not match, Hugging Face keeps it as a piece of its own
        self.bpe = tiktoken.Encoding("bpe", pat_str=rf"{pattern}|(?:(?!{pattern})[\s\S])+", mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str, continued: bool) -> list[int]:
        data = text.encode() if self.dropped else b""
        if len(data) > len(data.translate(None, self.dropped)) or len(text) > MAX_SPACES and max(map(len, re.findall(r"\s+", text)), default=0) > MAX_SPACES:
            self.python = self.python or python_pattern(self.pattern)
            pieces = (piece.encode().translate(None, self.dropped) for piece in self._pieces(text))
            ranks = itertools.chain.from_iterable(self.bpe._encode_single_piece(piece) for piece in pieces if piece)
        else:
            ranks = self.bpe.encode_ordinary(text)
        return list(map(self.ids.__getitem__, ranks))

    def _pieces(self, text: str) -> Iterator[str]:
        end = 0
        for match in self.python.finditer(text):
            yield from (text[end : match.start()], match[0])
            end = match.end()
        yield text[end:]


def python_pattern(pattern: str) -> re.Pattern:
    """The same pattern for Python's re, which has no \\p{..} and another \\s: each class spelled out as tiktoken's engine sees it."""
    every = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))
    depth = 0

    def spell(match: re.Match) -> str:
        nonlocal depth
        if match[0][0] != "\\":
            depth += 1 if match[0][0] == "[" else -1
            return match[0]
        if match[0][1] not in "pPsSdDwW":
            return match[0]
        probe = tiktoken.Encoding("probe", pat_str=match[0], mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={})
        points = enumerate(map(ord, bytes(probe.encode_ordinary(every)).decode()))
        runs = [[p for _, p in run] for _, run in itertools.groupby(points, lambda pair: pair[1] - pair[0])]
        ranges = "".join(rf"\U{run[0]:08x}-\U{run[-1]:08x}" for run in runs)
        return ranges if depth else f"[{ranges}]"

    return re.compile(re.sub(r"\\[pP]\{.*?\}|\\.|\[|\]", spell, pattern))


class SentencePiece:
    """A sentencepiece model. If it puts a space in front of a text: every: also of a text that goes on after a special token; metaspace: only
    of a text that does not begin with one, as Hugging Face's pre-tokenizer of that name does."""

    def __init__(self, proto: bytes, *, every: bool, metaspace: bool = False):
        self.model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self.bare = sentencepiece.SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")  # normalizer_spec { add_dummy_prefix: false }
        self.every, self.metaspace = every, metaspace

    def encode(self, text: str, continued: bool) -> list[int]:
        bare = (continued and not self.every) or (self.metaspace and text.startswith((" ", SPACE)))
        return (self.bare if bare else self.model).encode(text)


def sentencepiece_proto(vocab: dict[str, int], merges: list[tuple[str, str]], unknown: str, *, prefix: bool) -> bytes:
    """A sentencepiece BPE model with these tokens, as serialised ModelProto (sentencepiece_model.proto): a token's score is minus its rank."""

    def field(number: int, value: bytes | int) -> bytes:
        if isinstance(value, int):
            return varint(number << 3) + varint(value)
        return varint(number << 3 | 2) + varint(len(value)) + value

    def varint(n: int) -> bytes:
        return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])

    normal, unk, control, byte = 1, 2, 3, 6
    rank = {token: i for i, token in enumerate(merge_order(vocab, merges, whole_words=False))}
    proto = b""
    for i, token in enumerate(sorted(vocab, key=vocab.get)):
        if vocab[token] != i:
            raise ValueError(f"no token has the id {i}")
        kind = unk if token == unknown else byte if re.fullmatch("<0x[0-9A-F]{2}>", token) else normal if token in rank or len(token) == 1 else control
        proto += field(1, field(1, token.encode()) + b"\x15" + struct.pack("<f", -rank.get(token, 0)) + field(3, kind))
    proto += field(2, field(3, 2) + field(35, 1) + field(45, unknown.encode()))  # trainer_spec: model_type BPE, byte_fallback, unk_piece
    return proto + field(3, field(1, b"identity") + field(3, int(prefix)) + field(4, 0) + field(5, 1))  # normalizer_spec: spaces kept and escaped


# --------------------------------------------------------------------------------------------------------------- tokenizer


@dataclass(frozen=True)
class Added:
    """A token that is looked for in the text before anything else, with Hugging Face's flags."""

    id: int
    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    single_word: bool = False


class Tokenizer:
    """Encode and decode; made by load_tokenizer.

    bos_id, eos_id (None where there is none), stop_ids (any of them ends a generation), vocab_size (ids run from 0 to it, added ones
    included), adds_bos (the reference tokenizer puts BOS in front by default), chat_form (encode_chat's default).
    """

    def __init__(self, core: ByteBPE | SentencePiece, pieces: dict[int, bytes], added: dict[int, Added], config: dict, *, normalize: str | None = None):
        self.core, self.normalize = core, normalize
        self.pieces = pieces | {t.id: t.content.encode() for t in added.values()}
        self.vocab_size = max(self.pieces) + 1
        self.named = {t.content: t.id for t in added.values()}
        self.special = {t.id for t in added.values() if t.special}
        self.strips = isinstance(core, SentencePiece) and core.model.normalize("a") != "a"  # the core puts a space in front: decode takes it off
        # [special=False, special=True] -> matchers of the text as given and of the normalised text
        self.matchers = [[_matcher(t for t in added.values() if t.normalized == late and (every or not t.special)) for late in (False, True)] for every in (False, True)]
        self._read(config)

    def _read(self, config: dict) -> None:
        """What the files beside the vocabulary say: BOS, EOS, stop ids, chat template."""
        self.bos_id, self.eos_id = (self.token_id(_text(config.get(f"{name}_token"))) for name in ("bos", "eos"))
        self.adds_bos = bool(config.get("add_bos_token")) and self.bos_id is not None
        template = config.get("chat_template") or ""
        template = template if isinstance(template, str) else " ".join(t["template"] for t in template)  # several, by name
        marks = {"<|im_start|>": "chatml", "<|start_header_id|>": "llama3", "[INST]": "mistral"}
        self.chat_form = next((form for mark, form in marks.items() if mark in template and "<<SYS>>" not in template), "plain")
        # a system message that the template puts in when none is given (SmolLM2, Qwen2, Qwen2.5); Qwen3's empty thoughts; Llama 3.1's date
        default = re.search(r"<\|im_start\|>system(?:\n|\\n)([^'\"{}]+?)<\|im_end\|>", template)
        self.default_system = default[1].replace("\\n", "\n") if default else None
        self.thoughts = "<think>\n\n</think>\n\n" if "enable_thinking" in template else ""
        date = re.search(r"\d\d [A-Z][a-z]{2} \d{4}", template) if "Cutting Knowledge Date" in template else None
        self.preamble = f"Cutting Knowledge Date: December 2023\nToday Date: {date[0]}\n\n" if date else ""
        stops = config.get("eos_token_id", [])
        ends = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(self.chat_form)
        stops = [self.eos_id, self.token_id(ends), *(stops if isinstance(stops, list) else [stops])]
        self.stop_ids = tuple(dict.fromkeys(id_ for id_ in stops if id_ is not None))

    def token_id(self, content: str | None) -> int | None:
        """Id of a special or added token, None if there is none of that name."""
        return self.named.get(content)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, special: bool = False, continued: bool = False) -> list[int]:
        """Ids of the text. special: special tokens in the text become their ids, otherwise they are text like any other (added tokens that
        are not special are always found). continued: the text goes on after other text, so sentencepiece puts no space in front."""
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        if not text.isascii():  # halves of surrogate pairs, which JSON may hold, are joined or replaced
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        given, normalised = self.matchers[special]
        for part in _split(text, given):
            for piece in [part] if isinstance(part, int) else _split(unicodedata.normalize(self.normalize, part) if self.normalize else part, normalised):
                ids += [piece] if isinstance(piece, int) else self.core.encode(piece, continued)
            continued = True
        return ids + [self.eos_id] if eos and self.eos_id is not None else ids

    def decode(self, ids: list[int], *, skip_special: bool = False) -> str:
        """Text of the ids: the inverse of encode up to normalisation. Invalid UTF-8 gives U+FFFD; ids that are no token (padding rows) nothing."""
        text = b"".join([self.pieces.get(id_, b"") for id_ in ids if not (skip_special and id_ in self.special)]).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips else text

    def stream(self, *, skip_special: bool = False) -> Callable[[int | None], str]:
        """A function from the next id to the text that it completes, for printing while generating; None at the end gives what is left."""
        decoder, start = codecs.getincrementaldecoder("utf-8")("replace"), self.strips

        def push(id_: int | None) -> str:
            nonlocal start
            data = b"" if id_ is None or (skip_special and id_ in self.special) else self.pieces.get(id_, b"")
            text = decoder.decode(data, final=id_ is None)
            text, start = (text.removeprefix(" "), False) if start and text else (text, start)
            return text

        return push


def _matcher(tokens: Iterable[Added]) -> tuple[re.Pattern, dict[str, Added]] | None:
    """What _split looks for: the longest of the tokens at the leftmost place."""
    by_content = {t.content: t for t in tokens}
    longest_first = sorted(by_content, key=len, reverse=True)
    return (re.compile("|".join(map(re.escape, longest_first))), by_content) if by_content else None


def _split(text: str, matcher: tuple[re.Pattern, dict[str, Added]] | None) -> Iterator[str | int]:
    """The text between the matcher's tokens and the tokens' ids, in order."""
    end = 0
    for match in matcher[0].finditer(text) if matcher else ():
        token, (start, stop) = matcher[1][match[0]], match.span()
        if token.single_word and re.search(r"\w", text[max(0, start - 1) : start] + text[stop : stop + 1]):
            continue
        if token.lstrip:
            start = end + len(text[end:start].rstrip())
        if token.rstrip:
            stop = re.compile(r"\s*").match(text, stop).end()
        if start > end:
            yield text[end:start]
        yield token.id
        end = stop
    if end < len(text):
        yield text[end:]


# -------------------------------------------------------------------------------------------------------------------- chat


def encode_chat(tok: Tokenizer, messages: list[dict], *, form: str | None = None, generate: bool = False) -> tuple[list[int], list[bool]]:
    """Ids of a conversation and a mask of the loss: the assistant's answers with their end token.

    messages: {"role": "system" | "user" | "assistant", "content": str}, the system message first if any. form: one of FORMS, by default the
    one of the tokenizer's own chat template, "plain" without one. generate: the last message is the user's and the ids end where the answer
    begins; they are a prefix of the ids with the answer appended. Content is never searched for special tokens.
    """
    form = form or tok.chat_form
    if form not in FORMS:
        raise ValueError(f"chat form {form!r} is unknown: choose one of {', '.join(FORMS)}")
    _check_messages(messages, generate)
    ids, mask = [], []
    for part, loss in FORMS[form](tok, messages, generate):
        if isinstance(part, str):  # Mistral's tokenizer encodes each part as a text of its own
            part = tok.encode(part, continued=form != "mistral" and any(id_ != tok.bos_id for id_ in ids))
        new = [part] if isinstance(part, int) else part
        ids += new
        mask += [loss] * len(new)
    return ids, mask


def _check_messages(messages: list[dict], generate: bool) -> None:
    roles = ("system", "user", "assistant")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages is {messages!r}, expected a list of {{'role': ..., 'content': ...}}: give at least one user message")
    for i, m in enumerate(messages):
        if not isinstance(m, dict) or m.get("role") not in roles or not isinstance(m.get("content"), str):
            raise ValueError(f"message {i} is {str(m)[:80]}, expected a role of {', '.join(roles)} and a text as content: mend it")
        if m["role"] == "system" and i:
            raise ValueError(f"message {i} has the role system, which only the first message can have: move or remove it")
        if m["role"] != "system" and not m["content"].strip():
            raise ValueError(f"message {i} ({m['role']}) is empty, expected text: fill it in or remove the conversation")
    last, expected = messages[-1]["role"], "user" if generate else "assistant"
    if last != expected:
        raise ValueError(f"the last message has the role {last}, expected {expected} {'to generate an answer' if generate else 'to train on'}: mend the conversation")


def _need(tok: Tokenizer, form: str, *names: str) -> list[int]:
    missing = [name for name in names if tok.token_id(name) is None]
    if missing:
        raise ValueError(f"chat form {form} needs the token {missing[0]}, which this tokenizer lacks: use --form=plain, or the tokenizer of a chat model")
    return [tok.token_id(name) for name in names]


def _plain(tok: Tokenizer, messages: list[dict], generate: bool) -> Iterator[tuple[str | int, bool]]:
    """The form of the Router-Tuning paper's data: <|user|> and its like are plain text, each on a line."""
    if tok.eos_id is None:
        raise ValueError("chat form plain ends answers with EOS, which this tokenizer has not: name eos_token in tokenizer_config.json")
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
    """SmolLM2 and Qwen. The answer is encoded apart from its header, as generation meets it; all else as one text between special tokens.

    Qwen3 puts empty thoughts before an answer that has none of its own, in the last turn only.
    """
    start, end = _need(tok, "chatml", "<|im_start|>", "<|im_end|>")
    if tok.default_system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": tok.default_system}, *messages]
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    for i, m in enumerate(messages):
        yield start, False
        if m["role"] == "assistant":
            yield "assistant\n" + (tok.thoughts if i > last and not m["content"].startswith("<think>") else ""), False
            yield m["content"], True
        else:
            yield f"{m['role']}\n{m['content']}", False
        yield end, m["role"] == "assistant"
        yield "\n", False
    if generate:
        yield start, False
        yield "assistant\n" + tok.thoughts, False


def _llama3(tok: Tokenizer, messages: list[dict], generate: bool) -> Iterator[tuple[str | int, bool]]:
    """Llama 3 headers; 3.1 and later state dates in front of the system message (the template's fixed date, so that renders never change)."""
    bos, start, end, eot = _need(tok, "llama3", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    if tok.preamble:
        system = messages[0]["content"].strip() if messages[0]["role"] == "system" else ""
        messages = [{"role": "system", "content": tok.preamble + system}, *messages[messages[0]["role"] == "system" :]]
    yield bos, False
    for m in [*messages, {"role": "assistant", "content": ""}] if generate else messages:
        yield start, False
        yield m["role"], False
        yield end, False
        if m["role"] != "assistant":
            yield "\n\n" + (m["content"] if tok.preamble and m["role"] == "system" else m["content"].strip()), False
        else:
            yield "\n\n", False
            if not m["content"]:
                return
            yield m["content"].strip(), True
        yield eot, m["role"] == "assistant"


def _mistral(tok: Tokenizer, messages: list[dict], generate: bool) -> Iterator[tuple[str | int, bool]]:
    """Mistral Instruct: v0.1 writes [INST] as text, spaces inside, system before the first question; later ones as tokens, before the last."""
    bos, eos = tok.bos_id, tok.eos_id
    control = tok.token_id("[INST]") is not None
    system, turns = (messages[0]["content"], messages[1:]) if messages[0]["role"] == "system" else ("", messages)
    if any(m["role"] != ("user", "assistant")[i % 2] for i, m in enumerate(turns)):
        raise ValueError(f"chat form mistral got the roles {', '.join(m['role'] for m in turns)}, expected user and assistant by turns: mend the conversation")
    with_system = (len(turns) - 1) // 2 * 2 if control else 0
    yield bos, False
    for i, m in enumerate(turns):
        text = f"{system}\n\n{m['content']}" if system and i == with_system else m["content"]
        if m["role"] == "assistant":
            yield text, True
            yield eos, True
        elif control:
            yield tok.token_id("[INST]"), False
            yield text, False
            yield tok.token_id("[/INST]"), False
        else:
            yield f"[INST] {text} [/INST]", False


FORMS = {"plain": _plain, "chatml": _chatml, "llama3": _llama3, "mistral": _mistral}


# ----------------------------------------------------------------------------------------------------------------- loading


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer whose files lie in the folder. FileNotFoundError if there are none, ValueError if they are damaged or not exactly supported."""
    folder = Path(folder)
    models = [folder / "tokenizer.model"] if (folder / "tokenizer.model").exists() else sorted(folder.glob("*.model.v*"))
    if models:
        path, load = models[-1], _load_model
    elif (folder / "tokenizer.json").exists():
        path, load = folder / "tokenizer.json", _load_json
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        path, load = folder / "vocab.json", _load_vocab
    elif tiktokens := sorted(folder.glob("*.tiktoken")):
        path, load = tiktokens[0], _load_model
    else:
        found = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "no such folder"
        expected = "tokenizer.model (or *.model.v3), tokenizer.json, vocab.json with merges.txt, or *.tiktoken"
        raise FileNotFoundError(f"no tokenizer in {folder} (found: {found or 'nothing'}): expected {expected}; copy it from the model's source folder")
    config = {}
    for name in ("special_tokens_map.json", "generation_config.json", "tokenizer_config.json"):
        config |= {k: v for k, v in _json(folder / name).items() if v is not None} if (folder / name).exists() else {}
    if (folder / "chat_template.jinja").exists():
        config["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    names = {_text(v) for k, v in config.items() if k.endswith("_token")}
    added = {}
    if (folder / "added_tokens.json").exists():
        added |= {i: Added(i, content, special=content in names) for content, i in _json(folder / "added_tokens.json").items()}
    added |= {int(i): _added(int(i), t) for i, t in config.get("added_tokens_decoder", {}).items()}
    try:
        return load(path, config, added)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def _read_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    if not data or data.startswith(b"version https://git-lfs"):
        raise ValueError(f"the file is {'a Git LFS pointer' if data else 'empty'}, expected its content: copy it again from the model's source (with LFS: git lfs pull)")
    return data


def _json(path: Path) -> dict:
    try:
        value = json.loads(_read_bytes(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"not JSON ({e}), expected a whole JSON file: it may be cut off, copy it again from the model's source") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, expected an object: copy the file again from the model's source")
    return value


def _text(token: str | dict | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _added(id_: int, token: dict) -> Added:
    return Added(id_, token["content"], **{k: bool(token.get(k)) for k in ("special", "lstrip", "rstrip", "normalized", "single_word")})


def _load_model(path: Path, config: dict, added: dict[int, Added]) -> Tokenizer:
    """sentencepiece's binary format (its first field has the tag 0x0a) or tiktoken's lines of base64 and rank."""
    data = _read_bytes(path)
    if data[0] != 0x0A:
        return _load_tiktoken(data, config, added)
    try:
        core = SentencePiece(data, every=config.get("legacy", False))
    except RuntimeError as e:
        raise ValueError(f"not a sentencepiece model ({e}): it may be cut off, copy it again from the model's source") from None
    return _sentencepiece_tokenizer(core, config, added)


def _sentencepiece_tokenizer(core: SentencePiece, config: dict, added: dict[int, Added]) -> Tokenizer:
    model = core.model
    names = model.id_to_piece(list(range(model.get_piece_size())))
    pieces = {i: bytes([int(name[3:5], 16)]) if model.is_byte(i) else name.replace(SPACE, " ").encode() for i, name in enumerate(names)}
    added = {i: Added(i, name) for i, name in enumerate(names) if model.is_control(i) or model.is_unknown(i)} | added
    ends = {f"{end}_token": names[id_] for end, id_ in (("bos", model.bos_id()), ("eos", model.eos_id())) if id_ >= 0}
    return Tokenizer(core, pieces, added, {"add_bos_token": True} | ends | config)


def _load_tiktoken(data: bytes, config: dict, added: dict[int, Added]) -> Tokenizer:
    tokens = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            tokens[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"line {number} is {line[:40]!r}, expected a base64 token and its rank: the file is damaged, copy it again from the model's source") from None
    families = {
        128_000: (LLAMA3, None, LLAMA3_SPECIAL, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "add_bos_token": True}),
        151_643: (QWEN, "NFC", QWEN_SPECIAL, {"eos_token": "<|endoftext|>"}),
    }
    size = len(tokens)
    if size not in families or list(tokens.values()) != list(range(size)) or not all(bytes([b]) in tokens for b in range(256)):
        raise ValueError(f"{size:,} tokens, expected 128,000 (Llama 3) or 151,643 (Qwen) in rank order: copy the file again from the model's source")
    pattern, normalize, special, defaults = families[size]
    added = {size + i: Added(size + i, content) for i, content in enumerate(special)} | added
    return Tokenizer(ByteBPE(pattern, tokens), {i: token for token, i in tokens.items()}, added, defaults | config, normalize=normalize)


def _load_vocab(path: Path, config: dict, added: dict[int, Added]) -> Tokenizer:
    """vocab.json + merges.txt. How text is split before merging stands in no file, so the tokenizer's class decides."""
    kind = config.get("tokenizer_class", "none").removesuffix("Fast")
    if kind not in ("Qwen2Tokenizer", "GPT2Tokenizer"):
        raise ValueError(f"tokenizer_class in tokenizer_config.json is {kind}, expected Qwen2Tokenizer or GPT2Tokenizer: add the model's tokenizer.json")
    pattern, normalize = (QWEN, "NFC") if kind == "Qwen2Tokenizer" else (GPT2, None)
    lines = _read_bytes(path.with_name("merges.txt")).decode("utf-8", "replace").split("\n")
    merges = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
    return _bpe_tokenizer(pattern, _json(path), merges, {}, config, added, normalize)


def _load_json(path: Path, config: dict, added: dict[int, Added]) -> Tokenizer:
    """Hugging Face's tokenizer.json with a BPE model, byte-level or of sentencepiece's kind."""
    fast = _json(path)
    model = fast.get("model") or {}
    if model.get("type", "BPE" if "merges" in model else None) != "BPE" or "vocab" not in model:
        raise ValueError(f"the model's type is {model.get('type')}, expected BPE: this tokenizer is not supported")
    odd = [k for k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(k)]
    if odd:
        raise ValueError(f"the BPE model sets {odd[0]}={model[odd[0]]!r}, expected none: this tokenizer is not supported")
    added = {t["id"]: _added(t["id"], t) for t in fast.get("added_tokens") or []} | added
    for step in _steps(fast.get("post_processor"), "processors"):
        first = (step.get("single") or [{}])[0] if step["type"] == "TemplateProcessing" else {}
        if "SpecialToken" in first:
            config = {"bos_token": first["SpecialToken"]["id"], "add_bos_token": True} | config
    before = _steps(fast.get("normalizer"), "normalizers")
    steps = _steps(fast.get("pre_tokenizer"), "pretokenizers")
    if model.get("byte_fallback"):
        prefix, every, metaspace = _spaces(before, steps)
        proto = sentencepiece_proto(model["vocab"], [_pair(m) for m in model["merges"]], model.get("unk_token"), prefix=prefix)
        return _sentencepiece_tokenizer(SentencePiece(proto, every=every, metaspace=metaspace), {"add_bos_token": False} | config, added)
    if any(step["type"] not in ("NFC", "NFD", "NFKC", "NFKD") for step in before) or len(before) > 1:
        raise ValueError(f"the normalizer is {_named(before)}, expected none or one of NFC, NFD, NFKC, NFKD: this tokenizer is not supported")
    return _bpe_tokenizer(_pattern(steps), model["vocab"], model["merges"], model, config, added, before[0]["type"] if before else None)


def _steps(step: dict | None, key: str) -> list[dict]:
    """The steps of a normalizer, pre-tokenizer or post-processor, sequences laid flat."""
    if not step:
        return []
    return [inner for s in step[key] for inner in _steps(s, key)] if step["type"] == "Sequence" else [step]


def _named(steps: list[dict]) -> str:
    return " + ".join(step["type"] for step in steps) or "none"


def _pair(merge: str | list[str]) -> tuple[str, str]:
    pair = tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
    if len(pair) != 2:
        raise ValueError(f"a merge is {merge!r}, expected two tokens: the file is damaged, copy it again from the model's source")
    return pair


def _pattern(steps: list[dict]) -> str:
    """The regex that splits text as these pre-tokenizers do one after the other."""
    *splits, last = steps or [{"type": "none"}]
    if last["type"] == "ByteLevel" and not last.get("add_prefix_space") and len(splits) < 2:
        if not splits and last.get("use_regex", True):
            return GPT2
        if splits and splits[0]["type"] == "Digits" and last.get("use_regex", True):
            return DIGITS_GPT2 % ("" if splits[0]["individual_digits"] else "+")
        if splits and splits[0]["type"] == "Split" and not last.get("use_regex", True) and splits[0]["behavior"] == "Isolated" and not splits[0]["invert"]:
            if "Regex" in splits[0]["pattern"]:
                return splits[0]["pattern"]["Regex"]
    raise ValueError(f"the pre-tokenizer is {_named(steps)}, expected ByteLevel, Digits + ByteLevel or Split (a regex, isolated) + ByteLevel, no prefix space: this tokenizer is not supported")


def _spaces(before: list[dict], steps: list[dict]) -> tuple[bool, bool, bool]:
    """Whether a space goes in front of a text, of every text between special tokens, only of a text without one. ValueError for other steps."""
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if not steps and before in ([{"type": "Prepend", "prepend": SPACE}, escape], [escape]):
        return len(before) == 2, True, False
    if not before and len(steps) == 1 and steps[0]["type"] == "Metaspace" and not steps[0].get("split", True) and steps[0]["replacement"] == SPACE:
        return steps[0]["prepend_scheme"] != "never", steps[0]["prepend_scheme"] == "always", True
    raise ValueError(f"normalizer {_named(before)} and pre-tokenizer {_named(steps)} are not those of Llama 2 or Mistral: add the model's tokenizer.model")


def _bpe_tokenizer(pattern: str, vocab: dict[str, int], merges: list, model: dict, config: dict, added: dict[int, Added], normalize: str | None) -> Tokenizer:
    if len(set(vocab.values())) < len(vocab):
        raise ValueError("two tokens of the vocabulary have the same id: the file is damaged, copy it again from the model's source")
    try:
        order = merge_order(vocab, [_pair(m) for m in merges], whole_words=bool(model.get("ignore_merges")))
    except ValueError as e:
        raise ValueError(f"the merge list cannot be reproduced exactly: {e}. Use the model's original tokenizer files") from None
    unknown = vocab.get(model.get("unk_token"))
    if unknown is not None and model.get("fuse_unk"):
        raise ValueError("the BPE model sets fuse_unk")
    tokens = {bytes(map(CHAR_TO_BYTE.get, token)): vocab[token] for token in (*filter(vocab.__contains__, CHAR_TO_BYTE), *order)}
    pieces = {i: bytes(map(CHAR_TO_BYTE.get, token)) if all(map(CHAR_TO_BYTE.__contains__, token)) else token.encode() for token, i in vocab.items()}
    return Tokenizer(ByteBPE(pattern, tokens, unknown=unknown), pieces, added, config, normalize=normalize)
