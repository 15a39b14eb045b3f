"""Text to ids and back for the Llama, Mistral and Qwen families, with the ids of the reference tokenizers, and chats.

    tok = load_tokenizer("checkpoints/smollm2-135m-instruct")  # picks by the files that lie there
    ids = tok.encode("Hello", bos=tok.adds_bos); text = tok.decode(ids)
    ids, loss_mask = encode_chat(tok, [{"role": "user", "content": "Hi"}], generate=True)

Two cores: byte-level BPE through tiktoken (tokenizer.json, vocab.json + merges.txt, *.tiktoken, Llama 3's
tokenizer.model) and sentencepiece (tokenizer.model of Llama 2 and Mistral; a tokenizer.json of that kind becomes a
sentencepiece model in memory). Chats are rendered by the checkpoint's own chat_template through jinja2, as
transformers' apply_chat_template does. What cannot be reproduced exactly is refused by name. Depends on tiktoken,
sentencepiece, jinja2 and the standard library only.
"""

import base64
import bisect
import codecs
import functools
import itertools
import json
import re
import struct
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import date, datetime, time
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.sandbox
import sentencepiece
import tiktoken

# How text is split before merging. GPT-2: https://github.com/openai/gpt-2/blob/master/src/encoder.py;
# Llama 3, and Qwen with single digits: https://github.com/meta-llama/llama3/blob/main/llama/tokenizer.py
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_THEN_GPT2 = r"\p{N}%s|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")

# Special tokens that follow the ranks of the two tiktoken files.
# Names of Llama 3.1: https://github.com/meta-llama/llama-models
LLAMA3_SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"),
    *("<|eot_id|>", "<|python_tag|>", "<|image|>", *(f"<|reserved_special_token_{i}|>" for i in range(2, 246))),
)
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))

# Byte-level BPE writes each byte as one printable character: itself where it is printable Latin-1, else 256 and up.
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
OTHERS = (b for b in range(256) if b not in PRINTABLE)
CHAR_TO_BYTE = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(OTHERS)}
SPACE = "\u2581"  # how sentencepiece writes it
MAX_SPACES = 400_000  # in a row: tiktoken's regex engine overflows its stack of 10^6 entries soon after
NEVER = 1 << 62  # the turn of a merge that is in no list
COPY = "copy the file again from the model's source"


# ---------------------------------------------------------------------------------------------------------- merge lists


def merge_order(vocab: dict[str, int], merges: list[tuple[str, str]], *, whole_words: bool) -> list[str]:
    """The tokens that merging makes, by rank, such that merging by rank gives what merging by the list gives.

    Hugging Face joins neighbours that are a listed pair, first listed first; tiktoken and sentencepiece join any
    neighbours whose concatenation has a rank, lowest first. What happens inside a stretch that no merge crosses is what
    happens to that stretch alone. So a token can only ever be made by the pair that makes it when it is merged alone:
    the place of that pair is its rank, and a token that merging alone does not make has none. whole_words
    (ignore_merges): a word that is a token needs no merges, so every token needs a rank; ValueError if one would then
    be joined inside of words too.
    """
    turn = {pair: i for i, pair in enumerate(merges)}  # of a pair listed twice the last place counts
    for (a, b), i in turn.items():
        if not (a in vocab and b in vocab and a + b in vocab):
            found = f"merge {i + 1} ({a!r} {b!r}) uses a token that the vocabulary lacks"
            raise ValueError(f"{found}, expected only known ones: {COPY}")
    rank = {}
    for token in vocab:
        parts, last = _merge_alone(token, turn)
        if len(parts) == 2 and whole_words:
            found = f"token {token!r} is for whole words only, but ranks make it of {parts[0]!r} {parts[1]!r} too"
            raise ValueError(f"{found}: not supported")
        if len(token) > 1 and (len(parts) == 1 or whole_words):
            rank[token] = last if len(parts) == 1 else NEVER
    return sorted(rank, key=rank.get)


def _merge_alone(token: str, turn: dict[tuple[str, str], int]) -> tuple[list[str], int]:
    """What merging leaves of a token's characters, and the turn of the last merge."""
    parts, last = list(token), NEVER
    turns = [turn.get(pair, NEVER) for pair in zip(parts, parts[1:])]
    while turns:
        first = min(turns)
        if first == NEVER:
            break
        last, i = first, turns.index(first)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del turns[i]
        if i < len(turns):
            turns[i] = turn.get((parts[i], parts[i + 1]), NEVER)
        if i > 0:
            turns[i - 1] = turn.get((parts[i - 1], parts[i]), NEVER)
    return parts, last


# ------------------------------------------------------------------------------------------------------------ two cores

Range = tuple[int, int]  # a stretch of a text: first character, character after the last
Ranges = list[Range]
Encoded = tuple[list[int], list[bool]]  # ids, and whether each carries loss


class ByteBPE:
    """Byte-level BPE on tiktoken. tokens: bytes, in merge order, to ids.

    unknown: the id of each byte that tokens lacks; None drops these bytes.
    """

    def __init__(self, pattern: str, tokens: dict[bytes, int], *, unknown: int | None = None):
        order = {bytes([b]): unknown for b in range(256)} | tokens
        self.ids = list(order.values())  # rank -> id
        self.sizes = list(map(len, order))  # rank -> number of bytes
        self.dropped = b"".join(token for token, id_ in order.items() if id_ is None)
        self.pattern = pattern
        # tiktoken forgets what its pattern does not match, Hugging Face keeps it as a piece of its own
        ranks = {token: rank for rank, token in enumerate(order)}
        self.bpe = _encoding(rf"{pattern}|(?:(?!{pattern})[\s\S])+", ranks)

    def encode(self, text: str, continued: bool = False) -> list[int]:
        return list(map(self.ids.__getitem__, self._ranks(text)))

    def encode_masked(self, text: str, ranges: Ranges, continued: bool = False) -> Encoded:
        """Ids, and whether each stands for a character in one of the ranges."""
        ranks = self._ranks(text)
        ends = list(itertools.accumulate(map(self.sizes.__getitem__, ranks)))
        mask = [False] * len(ranks)
        for start, stop in ranges:
            first = bisect.bisect_right(ends, len(self._bytes(text[:start])))
            last = bisect.bisect_left(ends, len(self._bytes(text[:stop])))
            mask[first : last + 1] = [True] * len(mask[first : last + 1])
        return [self.ids[rank] for rank in ranks], mask

    def _bytes(self, text: str) -> bytes:
        return text.encode().translate(None, self.dropped)

    def _ranks(self, text: str) -> list[int]:
        drops = self.dropped and len(self._bytes(text)) < len(text.encode())
        if not drops and not _has_long_run(text):
            return self.bpe.encode_ordinary(text)
        pieces = filter(None, map(self._bytes, self._words(text)))
        return [rank for piece in pieces for rank in self.bpe._encode_single_piece(piece)]

    def _words(self, text: str) -> Iterator[str]:
        """The text as the pattern splits it, and what the pattern does not match."""
        end = 0
        for match in python_pattern(self.pattern).finditer(text):
            yield text[end : match.start()]
            yield match[0]
            end = match.end()
        yield text[end:]


def _has_long_run(text: str) -> bool:
    return len(text) > MAX_SPACES and max(map(len, re.findall(r"\s+", text)), default=0) > MAX_SPACES


def _encoding(pattern: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


@functools.cache
def _ranges(name: str) -> str:
    """The characters of a class such as \\p{L}, as tiktoken's engine sees it, as ranges for a set of Python's re."""
    every = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))
    every_byte = {bytes([b]): b for b in range(256)}
    found = bytes(_encoding(name, every_byte).encode_ordinary(every)).decode()
    groups = itertools.groupby(enumerate(found), lambda pair: ord(pair[1]) - pair[0])
    runs = ([char for _, char in run] for _, run in groups)
    return "".join(rf"\U{ord(run[0]):08x}-\U{ord(run[-1]):08x}" for run in runs)


@functools.cache
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


NO_SPACE = b"\x1a\x02\x18\x00"  # behind a model: normalizer_spec { add_dummy_prefix: false }


class SentencePiece:
    """A sentencepiece model.

    every: its space in front of a text also after a special token; metaspace: not where a space is there; ids: the
    id of each piece where it is not the piece's number.
    """

    def __init__(self, proto: bytes, *, every: bool, metaspace: bool = False, ids: list[int] | None = None):
        self.model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self.bare = sentencepiece.SentencePieceProcessor(model_proto=proto + NO_SPACE)
        self.every, self.metaspace, self.ids = every, metaspace, ids

    def encode(self, text: str, continued: bool = False) -> list[int]:
        numbers = self._model(text, continued).encode(text)
        return numbers if self.ids is None else [self.ids[number] for number in numbers]

    def encode_masked(self, text: str, ranges: Ranges, continued: bool = False) -> Encoded:
        """Ids, and whether each stands for a character in one of the ranges."""
        offsets = self._model(text, continued).encode(text, return_type="offset_mapping")["offsets"]
        # the space in front and all but the last byte of a character that is no piece have no width
        mask = [any(a < max(stop, start + 1) and start < b for a, b in ranges) for start, stop in offsets]
        return self.encode(text, continued), mask

    def _model(self, text: str, continued: bool) -> sentencepiece.SentencePieceProcessor:
        if continued and not self.every:
            return self.bare
        if self.metaspace and text.startswith((" ", SPACE)):
            return self.bare
        return self.model


# Types of pieces and numbers of fields: sentencepiece_model.proto of https://github.com/google/sentencepiece
NORMAL, UNKNOWN, BYTE = 1, 2, 6
BYTE_PIECES = frozenset(f"<0x{b:02X}>" for b in range(256))


def sentencepiece_bpe(vocab: dict[str, int], order: list[str], *, prefix: bool) -> tuple[bytes, list[int]]:
    """A sentencepiece BPE model (a ModelProto) of these tokens, merged in this order, and the id of each piece.

    Tokens that no merge makes are left out. The unknown piece, of id -1, is one more: text never needs it, since every
    byte is a piece.
    """
    lacking = sorted(BYTE_PIECES - vocab.keys())
    if lacking:
        found = f"the vocabulary lacks the byte {lacking[0]}"
        raise ValueError(f"{found}, expected all 256: add the model's tokenizer.model")
    unknown = "unknown"
    while unknown in vocab:
        unknown += "_"
    rank = {token: i for i, token in enumerate(order)}
    pieces = {token: NORMAL for token in vocab if token in rank or len(token) == 1}
    pieces = {unknown: UNKNOWN} | pieces | dict.fromkeys(BYTE_PIECES, BYTE)
    proto = b""
    for token, kind in pieces.items():
        score = -float(rank.get(token, 0))
        piece = _field(1, token.encode()) + _field(2, score) + _field(3, kind)
        proto += _field(1, piece)
    trainer = _field(3, 2) + _field(35, 1) + _field(45, unknown.encode())  # model_type BPE, byte_fallback, unk_piece
    # add_dummy_prefix, then spaces are kept as they are, and escaped
    normalizer = _field(1, b"identity") + _field(3, int(prefix)) + _field(4, 0) + _field(5, 1)
    return proto + _field(2, trainer) + _field(3, normalizer), [vocab.get(token, -1) for token in pieces]


def _varint(n: int) -> bytes:
    return bytes([n & 127 | 128]) + _varint(n >> 7) if n > 127 else bytes([n])


def _field(number: int, value: bytes | int | float) -> bytes:
    """A field of a protobuf message: its number with the wire type, and the value."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


# ------------------------------------------------------------------------------------------------------------ tokenizer


@dataclass
class Settings:
    """What the files beside the vocabulary say.

    added: added tokens by id. front: the id that tokenizer.json puts in front of a text. fast: whether there is a
    tokenizer.json; only without one add_bos_token of tokenizer_config.json counts, as in transformers 5.
    templates: chat templates by name. stops: the ids that end a generation.
    """

    config: dict = field(default_factory=dict)
    added: dict[int, dict] = field(default_factory=dict)
    fast: bool = False
    front: int | None = None
    templates: dict[str, str] = field(default_factory=dict)
    stops: list[int] = field(default_factory=list)

    @property
    def roles(self) -> dict[str, str]:
        """The special tokens that have a role: bos_token, pad_token, ..."""
        given = {key: value for key, value in self.config.items() if key.endswith("_token")}
        extra = self.config.get("extra_special_tokens")
        if isinstance(extra, dict):
            given |= extra
        return {key: _content(value) for key, value in given.items() if isinstance(value, (str, dict))}

    @property
    def special(self) -> set[str]:
        """All special tokens that the settings name."""
        found = set(self.roles.values())
        extra = self.config.get("extra_special_tokens") or self.config.get("additional_special_tokens")
        if isinstance(extra, list):
            found.update(map(_content, extra))
        return found


class Tokenizer:
    """Encode and decode; made by load_tokenizer.

    bos_id, eos_id (None where there is none), stop_ids (each ends a generation), vocab_size (largest id + 1, added
    tokens included), adds_bos (whether the reference tokenizer puts BOS in front by default), templates (the
    checkpoint's chat templates by name).
    """

    def __init__(self, core, pieces: dict[int, bytes], settings: Settings, prepare: Callable[[str], str] | None = None):
        added = settings.added
        self.core, self.prepare = core, prepare
        self.pieces = pieces | {i: t["content"].encode() for i, t in added.items()}
        self.vocab_size = max(self.pieces) + 1
        self.special = {i for i, t in added.items() if t.get("special")}
        self.added = {t["content"]: i for i, t in added.items()}
        self.strips = prepare is _prepend  # decode takes off the space put in front
        if isinstance(core, SentencePiece):
            self.strips = self.strips or core.model.normalize("a") != "a"
        # [special][0: what is looked for in the text as given, 1: in the prepared text]
        ordinary = {i: t for i, t in added.items() if not t.get("special")}
        self.matchers = [[_matcher(t, late, prepare) for late in (False, True)] for t in (ordinary, added)]
        self.roles, self.templates = settings.roles, settings.templates
        self.bos_id = self.added.get(self.roles.get("bos_token"))
        self.eos_id = self.added.get(self.roles.get("eos_token"))
        self.adds_bos = bool(settings.config.get("add_bos_token")) and self.bos_id is not None
        if settings.fast:
            self.adds_bos = settings.front is not None
            self.bos_id = settings.front if self.adds_bos else self.bos_id
        self.stop_ids = tuple(settings.stops)
        if self.eos_id is not None and self.eos_id not in self.stop_ids:
            self.stop_ids = self.eos_id, *self.stop_ids
        end = _turn_end(self)
        if end is not None and end not in self.stop_ids:
            self.stop_ids = *self.stop_ids, end

    @property
    def chat_form(self) -> str:
        """What encode_chat uses where no form is named, in words."""
        return "template" if self.templates else "plain (no chat_template)"

    def encode(
        self, text: str, *, bos: bool = False, eos: bool = False, special: bool = False, continued: bool = False
    ) -> list[int]:
        """Ids of the text.

        bos, eos: put the token in front or behind, BOS only where the ids do not begin with it already. special:
        special tokens in the text become their ids, otherwise they are text like any other (added tokens that are not
        special always become theirs, as in the reference). continued: the text follows another, so sentencepiece puts
        no space in front.
        """
        ids = []
        early, late = self.matchers[special]
        text = _whole(text)
        for start, stop, id_ in _split(text, early):
            if id_ is not None:
                ids.append(id_)
                continue
            ready = self.prepare(text[start:stop]) if self.prepare else text[start:stop]
            for a, b, id_ in _split(ready, late):
                if id_ is not None:
                    ids.append(id_)
                else:
                    ids += self.core.encode(ready[a:b], continued or start + a > 0)
        if bos and self.bos_id is not None and not (special and ids[:1] == [self.bos_id]):
            ids = [self.bos_id, *ids]
        return ids + [self.eos_id] if eos and self.eos_id is not None else ids

    def encode_masked(self, text: str, ranges: Ranges, hidden: Ranges) -> Encoded:
        """The ids of encode(text, special=True), and whether each stands for a character in one of the ranges.

        hidden: where no special token is found.
        """
        ids, mask = [], []

        def add(new: list[int], loss: list[bool]) -> None:
            ids.extend(new)
            mask.extend(loss)

        early, late = self.matchers[True]
        for start, stop, id_ in _split(text, early, hidden):
            within = _within(ranges, start, stop)
            if id_ is not None:
                add([id_], [bool(within)])
                continue
            part = text[start:stop]
            ready, unseen = part, _within(hidden, start, stop)
            if self.prepare:
                ready, (within, unseen) = self.prepare(part), self._prepared(part, within, unseen)
            for a, b, id_ in _split(ready, late, unseen):
                inner = _within(within, a, b)
                if id_ is not None:
                    add([id_], [bool(inner)])
                else:
                    add(*self.core.encode_masked(ready[a:b], inner, start + a > 0))
        return ids, mask

    def _prepared(self, part: str, *ranges: Ranges) -> list[Ranges]:
        """Where ranges of a text stand in the prepared text."""
        return [[tuple(len(self.prepare(part[:at])) for at in pair) for pair in many] for many in ranges]

    def decode(self, ids: list[int], *, skip_special: bool = False) -> str:
        """Text of the ids, the inverse of encode up to normalisation.

        Invalid UTF-8 gives U+FFFD, an id without token (padding) nothing.
        """
        kept = [id_ for id_ in ids if id_ not in self.special] if skip_special else ids
        text = b"".join([self.pieces.get(id_, b"") for id_ in kept]).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips else text

    def stream(self, *, skip_special: bool = False) -> Callable[[int | None], str]:
        """A function from the next id to the text that it completes, for printing while generating.

        None at the end gives what is left.
        """
        decoder, start = codecs.getincrementaldecoder("utf-8")("replace"), self.strips

        def push(id_: int | None) -> str:
            nonlocal start
            data = b"" if skip_special and id_ in self.special else self.pieces.get(id_, b"")
            text = decoder.decode(data, final=id_ is None)
            shown = text.removeprefix(" ") if start else text
            start = start and not text
            return shown

        return push


def _whole(text: str) -> str:
    """JSON may hold halves of surrogate pairs: join or replace them."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _content(token: str | dict | None) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _prepend(text: str) -> str:
    return _escape(SPACE + text if text else text)


def _escape(text: str) -> str:
    return text.replace(" ", SPACE)


def _within(ranges: Ranges, start: int, stop: int) -> Ranges:
    """The parts of ranges that lie in a stretch of the text, counted from its start."""
    return [(max(a, start) - start, min(b, stop) - start) for a, b in ranges if a < stop and start < b]


def _either(texts: Iterable[str]) -> str:
    """A pattern for any of the texts, the longest first; one that never matches without any."""
    return "|".join(map(re.escape, sorted(set(texts), key=len, reverse=True))) or "(?!)"


Matcher = tuple[re.Pattern, dict[str, dict]] | None


def _matcher(added: dict[int, dict], late: bool, prepare: Callable[[str], str] | None) -> Matcher:
    """For _split: the longest token at the leftmost place, of those to be found before or late, that is, prepared."""
    tokens = {}
    for i, token in added.items():
        content = token["content"]
        if late and prepare:
            content = prepare(content)
        if content and bool(token.get("normalized")) == late:
            tokens[content] = token | {"id": i}
    return (re.compile(_either(tokens)), tokens) if tokens else None


def _split(text: str, matcher: Matcher, hidden: Ranges = ()) -> Iterator[tuple[int, int, int | None]]:
    """Start, stop and id of the matcher's tokens, in order, and of the text between them (id None)."""
    end = 0
    for match in matcher[0].finditer(text) if matcher else ():
        token, (start, stop) = matcher[1][match[0]], match.span()
        if any(a < stop and start < b for a, b in hidden):
            continue
        beside = text[max(0, start - 1) : start] + text[stop : stop + 1]
        if token.get("single_word") and re.search(r"\w", beside):
            continue
        if token.get("lstrip"):
            start = end + len(text[end:start].rstrip())
        if token.get("rstrip"):
            stop = re.compile(r"\s*").match(text, stop).end()
        if start > end:
            yield end, start, None
        yield start, stop, token["id"]
        end = stop
    if end < len(text):
        yield end, len(text), None


# --------------------------------------------------------------------------------------------------- chats, by any form

REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which the thoughts of an answer are given
Messages = list[dict]


def encode_chat(
    tok: Tokenizer,
    messages: Messages,
    *,
    form: str | None = None,
    generate: bool = False,
    tools: list[dict] | None = None,
    last_only: bool = False,
) -> Encoded:
    """Ids of a conversation and a mask of the loss: the assistant's answers, each with the stop id behind it.

    messages: {"role": str, "content": str}, and what the template reads beside these (reasoning_content, tool_calls);
    a message with "loss": False carries no loss. form: the name of a chat template of the checkpoint, or a key of
    FORMS for a checkpoint without one; None takes the template (`tool_use` where there are tools and such a template,
    else `default`), and FORMS' plain without any. generate: the last message is not the assistant's, and the ids end
    where the answer begins. last_only: loss on the last answer only.

    A template is rendered as transformers' apply_chat_template does and gives the same ids, with one exception:
    special tokens that stand in the content of a message are text there, so that content cannot end a turn.
    ValueError: a conversation that the form has no place for, or a template that changes answers so that the loss
    cannot follow them.
    """
    template = _template(tok, form, tools)
    _check(messages, generate, template is None)
    answers = [m["role"] == "assistant" and m.get("loss") is not False and not generate for m in messages]
    if last_only:
        answers = [loss and i == len(answers) - 1 for i, loss in enumerate(answers)]
    messages = _each_text(_without_loss(messages), lambda text, place: _whole(text))
    if template is not None:
        _refuse_unused(messages, tools, template, "the chat template")
        return _encode_template(tok, Render(template, tok.roles, tools, generate, datetime.now()), messages, answers)
    _refuse_unused(messages, tools, "", f"the form {form or 'plain'}")
    return _encode_form(tok, form or "plain", messages, answers, generate)


def _template(tok: Tokenizer, form: str | None, tools: list[dict] | None) -> str | None:
    """The template of this name; None where a form of FORMS is meant."""
    named = tok.templates
    if form is None and not named:
        return None
    if form is None:
        form = "tool_use" if tools is not None and "tool_use" in named else "default"
        if form not in named:
            found = f"the chat templates are {', '.join(named)}"
            raise ValueError(f"{found}, expected one called default: name one (--chat)")
    if form in named:
        return named[form]
    if form not in FORMS:
        expected = ", ".join([*named, *FORMS])
        raise ValueError(f"chat form {form!r} is unknown, expected one of {expected}: choose one of them")
    return None


def _check(messages: Messages, generate: bool, strict: bool) -> None:
    """Refuse what is no conversation. strict: for FORMS, which know three roles; a template has its own rules."""
    roles = ("system", "user", "assistant")
    if not isinstance(messages, list) or not messages:
        expected = "expected a list of {'role': ..., 'content': ...}: give at least a user message"
        raise ValueError(f"messages is {messages!r}, {expected}")
    for i, m in enumerate(messages):
        role = m.get("role") if isinstance(m, dict) else None
        if not isinstance(role, str) or (strict and role not in roles):
            raise ValueError(f"message {i} is {str(m)[:80]}, expected a role of {', '.join(roles)}: mend it")
        called = role == "assistant" and m.get("tool_calls")
        if called and m.get("content") is None:
            continue
        if not isinstance(m.get("content"), str):
            raise ValueError(f"message {i} is {str(m)[:80]}, expected a text as content: mend it")
        if strict and role == "system" and i > 0:
            found = f"message {i} has the role system, expected it in the first message only"
            raise ValueError(f"{found}: move or remove it")
        if role in roles[1:] and not m["content"].strip() and not called:
            found = f"message {i} of the role {role} is empty, expected text"
            raise ValueError(f"{found}: fill it in or drop the conversation")
    _check_last(messages[-1]["role"], generate)


def _check_last(role: str, generate: bool) -> None:
    if generate and role in ("assistant", "system"):
        raise ValueError(f"the last message has the role {role}, expected user: mend the conversation")
    if not generate and role != "assistant":
        raise ValueError(f"the last message has the role {role}, expected assistant: mend the conversation")


def _refuse_unused(messages: Messages, tools: list[dict] | None, source: str, name: str) -> None:
    """Refuse what changes a conversation but has no place in this form or template, which would lose it."""
    if tools is not None and "tools" not in source:
        raise ValueError(f"tools are given, but {name} has no place for them: leave them out or name another (--chat)")
    for i, m in enumerate(messages):
        for key in ("tool_calls", *REASONING):
            names = REASONING if key in REASONING else (key,)
            if m.get(key) and not any(other in source for other in names):
                raise ValueError(
                    f"message {i} has the key {key}, but {name} has no place for it: remove it or name another (--chat)"
                )


def _without_loss(messages: Messages) -> Messages:
    kept = []
    for message in messages:
        kept.append({key: value for key, value in message.items() if key != "loss" and value is not None})
    return kept


Place = tuple[int | str, ...]  # the way to a text in a conversation: (3, "content")


def _each_text(value, change: Callable[[str, Place], str], place: Place = ()):
    """A copy of messages or tools with each text changed, but for keys."""
    if isinstance(value, str):
        return change(value, place)
    if isinstance(value, dict):
        return {k: _each_text(v, change, (*place, k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_each_text(v, change, (*place, i)) for i, v in enumerate(value)]
    return value


def _texts(value) -> list[str]:
    found = []
    _each_text(value, lambda text, place: found.append(text))
    return found


# ------------------------------------------------------------------------------------------------- rendering a template

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # stand around {% generation %}: noncharacters, which no text holds
WRITTEN_BLOCK = re.compile(r"\{%[-+]?\s*generation\b")


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: what the template says the model writes."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller):
        return caller()


class _MarkedGeneration(_Generation):
    def _written(self, caller):
        return OPEN + caller() + CLOSE


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message):
    raise jinja2.TemplateError(message)


@functools.lru_cache(maxsize=64)
def _compile(source: str, blocks: bool) -> jinja2.Template:
    """The template in an environment as transformers sets it up."""
    extensions = [_MarkedGeneration if blocks else _Generation, jinja2.ext.loopcontrols]
    settings = {"trim_blocks": True, "lstrip_blocks": True, "extensions": extensions}
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(**settings)
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(source)


@functools.lru_cache(maxsize=64)
def _constants(source: str) -> tuple[str, ...]:
    """The texts that a template may compare content with or split it at."""
    tree = _compile(source, False).environment.parse(source)
    values = (node.value for node in tree.find_all(jinja2.nodes.Const))
    return tuple({value for value in values if isinstance(value, str) and value.strip()})


@dataclass(frozen=True)
class Render:
    """A chat template with all that it is rendered with but for the messages."""

    source: str
    roles: dict[str, str]
    tools: list[dict] | None
    generate: bool
    now: datetime  # one moment for all renders of a conversation

    def text(self, messages: Messages, tools=None, blocks: bool = False) -> str:
        values = self.roles | {
            "messages": [_with_thoughts(m) for m in messages],
            "tools": tools or self.tools,
            "documents": None,
            "add_generation_prompt": self.generate,
            "strftime_now": lambda form: self.now.strftime(form),
        }
        try:
            return _compile(self.source, blocks).render(values)
        except Exception as e:  # a template is a program of somebody else: any error may come out of it
            found = f"the chat template refuses the conversation: {e or type(e).__name__}"
            raise ValueError(f"{found}: mend the conversation, or {OTHER_FORM}") from None


def _with_thoughts(message: dict) -> dict:
    """Thoughts under the name that templates read, whatever name they were given under."""
    given = [message[key] for key in REASONING if message.get(key) is not None]
    return {"thinking": given[0]} | message | {"reasoning_content": given[0]} if given else message


def _turn_end(tok: Tokenizer) -> int | None:
    """The added token that the template writes behind an answer: it ends a turn, whatever the files call EOS."""
    source = tok.templates.get("default")
    if source is None:
        return None
    answer = "Qz7"
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
    try:
        text = Render(source, tok.roles, None, False, datetime.now()).text(talk)
    except ValueError:
        return None  # said when a conversation is encoded
    behind = text.rpartition(answer)[2].lstrip()
    found = [token for token in tok.added if token.strip() and behind.startswith(token)]
    return tok.added[max(found, key=len)] if found else None


# ------------------------------------------------------------------------------------------------ following the answers
# The first and the last character of each word of an answer is replaced by a private one that names its place; what the
# template does with the answer (trim, split, move) it does with these, and where they come out the answer stands. White
# space is left as it is, since it may be trimmed, and what stands in the template as a constant, since answers may be
# compared with it or split at it. If putting the characters back does not give what the template makes of the
# conversation itself, then it looked at the answers otherwise, and the next way to mark is tried.

PRIVATE = tuple(map(chr, (*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))))
ANY_PRIVATE = re.compile(f"[{PRIVATE[0]}-{PRIVATE[-1]}]")


@dataclass
class Marked:
    """Texts of a conversation with private characters in place of their own."""

    free: Iterator[str]  # private characters that the conversation does not hold
    stride: int  # of the words of a long answer one in so many is marked
    texts: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)  # the texts with their marks
    places: list[Place] = field(default_factory=list)  # of each text in the conversation
    owner: dict[str, tuple[int, int]] = field(default_factory=dict)  # private character -> text, character in it
    answers: set[int] = field(default_factory=set)  # texts that carry loss
    starts: dict[str, str] = field(default_factory=dict)  # mark at the end of a word -> mark at its start
    constants: list[tuple[int, int, int]] = field(default_factory=list)  # text, start and stop of what was kept
    hidden: set[str] = field(default_factory=set)  # the marks on special tokens, which are text in a message

    def mark(self, text: str, place: Place, hide: re.Pattern, answer: tuple[re.Pattern, re.Pattern] | None) -> str:
        """The text with marks on all that is to be hidden, and on the words of an answer.

        answer: patterns of what stays as it is and of words; None for another text.
        """
        self.texts.append(text)
        self.places.append(place)
        chars, end = list(text), 0
        for match in itertools.chain(hide.finditer(text), [None]):
            start, stop = match.span() if match else (len(text), len(text))
            if answer:
                self._mark_words(chars, text[:start], end, *answer)
            self._replace(chars, range(start, stop))
            self.hidden.update(chars[start:stop])
            end = stop
        self.changed.append("".join(chars))
        if answer:
            self.answers.add(len(self.texts) - 1)
        return self.changed[-1]

    def _mark_words(self, chars: list[str], text: str, start: int, keep: re.Pattern, words: re.Pattern) -> None:
        found = []
        for match in itertools.chain(keep.finditer(text, start), [None]):
            found += words.finditer(text, start, match.start() if match else len(text))
            if match:
                start = match.end()
                self.constants.append((len(self.texts) - 1, *match.span()))
        for word in found[:: self.stride] + found[-1:]:
            self._replace(chars, (word.start(), word.end() - 1))
            self.starts[chars[word.end() - 1]] = chars[word.start()]

    def _replace(self, chars: list[str], places: Iterable[int]) -> None:
        for i in places:
            if chars[i] in self.owner:
                continue
            chars[i] = next(self.free, None)
            if chars[i] is None:
                raise ValueError(f"the conversation needs more than {len(PRIVATE):,} marks: split it")
            self.owner[chars[i]] = len(self.texts) - 1, i

    def plain(self, shown: str) -> str:
        """The private characters put back."""
        own = {ord(char): self.texts[number][i] for char, (number, i) in self.owner.items()}
        return shown.translate(own)


NOTHING = re.compile("(?!)")


@functools.lru_cache(maxsize=16)
def _patterns(tok: Tokenizer, source: str, way: int) -> tuple[re.Pattern, ...]:
    """What is hidden in all texts and in answers, what stays as it is in answers, and their words.

    way 0: all but constants is marked; 1: special tokens that are constants count as such, but for those that end a
    turn; 2: of the words only letters and digits.
    """
    special = {tok.pieces[i].decode() for i in tok.special} - {""}
    constants = _constants(source)
    ends = {tok.pieces[i].decode() for i in tok.stop_ids}
    hide = special if way == 0 else special - (set(constants) - ends)
    words = r"[^\W_]+" if way == 2 else r"\S+"
    return tuple(map(re.compile, (_either(special), _either(hide), _either(constants), words)))


def _mark(
    render: Render, messages: Messages, answers: list[bool], patterns: tuple, blocks: bool
) -> tuple[Marked, str]:
    """The conversation with marks, and what the template makes of it. blocks: mark {% generation %} too."""
    others, hide, keep, words = patterns
    texts = _texts([messages, render.tools])
    taken = set(render.source).union(*texts)
    stride = 1 + sum(map(len, texts)) // 200_000
    marked = Marked((char for char in PRIVATE if char not in taken), stride)

    def change(text: str, place: Place) -> str:
        answer = place[0] != "tools" and answers[place[0]] and place[1] in ("content", "tool_calls", *REASONING)
        if not answer:
            return marked.mark(text, place, others, None)
        only_constants = not words.search(keep.sub(" ", hide.sub(" ", text)))
        return marked.mark(text, place, hide, (NOTHING if only_constants else keep, words))

    shown = render.text(_each_text(messages, change), _each_text(render.tools, change, ("tools",)), blocks)
    return marked, shown


@dataclass
class Followed:
    """A rendered conversation in which answers can be followed."""

    plain: str
    shown: str  # with private characters where answers stand
    blocks: Ranges  # start and stop of what stood in {% generation %}
    marked: Marked


@dataclass
class Piece:
    """A stretch of a rendered conversation that comes from an answer, and where in the answer's text it stands."""

    text: int
    start: int
    stop: int
    first: int
    last: int  # the character after it, as stop


def _follow(tok: Tokenizer, render: Render, messages: Messages, answers: list[bool], plain: str) -> Followed:
    """The first way of marking that the template does not notice. ValueError if it notices all."""
    for way, blocks in itertools.product(range(3), (True, False)):
        try:
            marked, shown = _mark(render, messages, answers, _patterns(tok, render.source, way), blocks)
        except ValueError:
            continue  # the template refuses the marks
        shown, blocks = _blocks(shown)
        if marked.plain(shown) == plain:
            return Followed(plain, shown, blocks, marked)
    expected = "expected one that only places, trims or splits them, so that the loss can follow the answers"
    raise ValueError(f"the chat template changes the letters of the messages, {expected}: {OTHER_FORM}")


def _blocks(shown: str) -> tuple[str, Ranges]:
    """The text without OPEN and CLOSE, and where the outermost of them stood."""
    blocks, kept, depth, start = [], "", 0, 0
    for part in re.split(f"([{OPEN}{CLOSE}])", shown):
        if part == OPEN:
            start = start if depth else len(kept)
            depth += 1
        elif part == CLOSE:
            depth -= 1
            if depth == 0:
                blocks.append((start, len(kept)))
        else:
            kept += part
    return kept, blocks


def _pieces(seen: Followed) -> list[Piece]:
    marked, pieces = seen.marked, []
    for found in ANY_PRIVATE.finditer(seen.shown):
        at, char = found.start(), found[0]
        number, i = marked.owner.get(char, (None, 0))
        if number not in marked.answers:
            continue
        last = pieces[-1] if pieces else None
        if last and last.text == number and last.last <= i:
            if _same(marked.texts[number][last.last : i], seen.plain[last.stop : at]):
                last.stop, last.last = at + 1, i + 1
                continue
        start = marked.starts.get(char, char)
        if start != char and start in seen.shown:
            raise ValueError(f"the chat template moves the letters of an answer: {OTHER_FORM}")
        pieces.append(Piece(number, at, at + 1, i, i + 1))
    return pieces


def _same(written: str, printed: str) -> bool:
    """Whether a template that leaves out of a text, spaces it anew, or writes it as JSON or HTML prints it so."""
    if written == printed or not printed.strip():
        return True
    escaped = jinja2.filters.FILTERS["escape"](written)
    ways = (written, str(escaped), json.dumps(written, ensure_ascii=False)[1:-1])
    return "".join(printed.split()) in ["".join(way.split()) for way in ways]


def _grow(piece: Piece, seen: Followed, without: Callable[[int, str], int]) -> Range:
    """Start and stop of a piece with the characters at its ends that carry no mark.

    A constant counts as a whole or not at all. White space counts if it is the answer's: the conversation becomes
    shorter without it. without: how much shorter, with another text in place of a numbered one.
    """
    text, changed = seen.marked.texts[piece.text], seen.marked.changed[piece.text]
    constants = [(a, b) for number, a, b in seen.marked.constants if number == piece.text]

    behind = _common(text[piece.last :], changed[piece.last :], seen.plain[piece.stop :])
    end = piece.last + behind
    end = min([end, *(a for a, b in constants if a < end < b)])
    solid = piece.last + len(text[piece.last : end].rstrip())
    if solid < end:
        end = min(end, solid + without(piece.text, text[:solid] + text[solid:].lstrip()))

    printed = seen.plain[max(0, piece.start - piece.first) : piece.start]
    before = _common(text[: piece.first][::-1], changed[: piece.first][::-1], printed[::-1])
    begin = piece.first - before
    begin = max([begin, *(b for a, b in constants if a < begin < b)])
    solid = piece.first - len(text[begin : piece.first].lstrip())
    if begin < solid:
        begin = max(begin, solid - without(piece.text, text[:solid].rstrip() + text[solid:]))
    return piece.start - (piece.first - begin), piece.stop + (end - piece.last)


def _common(written: str, changed: str, printed: str) -> int:
    """With how many characters that carry no mark two texts begin alike."""
    alike = (a == b == c for a, b, c in zip(written, changed, printed))
    return sum(1 for _ in itertools.takewhile(bool, alike))


def _loss_ranges(tok: Tokenizer, render: Render, messages: Messages, seen: Followed) -> Ranges:
    """The stretches of the rendered conversation that carry loss: answers, and the stop token behind each."""

    def without(number: int, text: str) -> int:
        other = _each_text(messages, lambda old, place: text if place == seen.marked.places[number] else old)
        try:
            return max(0, len(seen.plain) - len(render.text(other)))
        except ValueError:
            return 0

    stop, ranges = _stop(tok), []
    pieces = itertools.groupby(_pieces(seen), lambda piece: seen.marked.places[piece.text][0])
    for i, group in pieces:
        grown = [_grow(piece, seen, without) for piece in group]
        if messages[i].get("tool_calls"):
            grown = [_calls(render, messages[:i], seen, grown, stop)]
        ranges += grown
    if seen.blocks:
        return [at for block in seen.blocks for at in _written(block, ranges, seen, stop)]
    return [at for start_stop in ranges for at in _with_stop(start_stop, seen, stop)]


@functools.lru_cache(maxsize=16)
def _stop(tok: Tokenizer) -> re.Pattern:
    """The stop token behind an answer."""
    return re.compile(rf"\s*({_either(tok.pieces[i].decode() for i in tok.stop_ids)})")


def _with_stop(at: Range, seen: Followed, stop: re.Pattern) -> Ranges:
    match = stop.match(seen.shown, at[1])
    return [at, match.span(1)] if match else [at]


def _written(block, ranges: Ranges, seen: Followed, stop: re.Pattern) -> Ranges:
    """What stood in {% generation %}, if an answer is in it, without white space around or behind the stop token."""
    inside = [at for at in ranges if block[0] <= at[0] < block[1]]
    if not inside:
        return []
    start = inside[0][0] - len(seen.plain[block[0] : inside[0][0]].lstrip())
    end = max(at[1] for at in inside)
    rest = seen.shown[end : block[1]]
    stops = list(stop.finditer(rest))
    if stops:
        return [(start, end + stops[-1].end())]
    return _with_stop((start, end + len(rest.rstrip())), seen, stop)


def _calls(render: Render, before: Messages, seen: Followed, grown: list, stop: re.Pattern) -> Range:
    """All that an answer with tool calls writes: from where a prompt for it ends to its stop token."""
    start, end = grown[0][0], grown[-1][1]
    try:
        prompt = replace(render, generate=True).text(before)
    except ValueError:
        prompt = ""
    if prompt and seen.plain.startswith(prompt) and len(prompt) <= start:
        start = len(prompt)
    match = stop.search(seen.shown, end)
    return start, match.start() if match else end


# Most templates print most contents as they stand, or without white space around them, between texts that depend on
# the roles alone. Where that is so of a conversation, to the letter, its answers need no marks to be found.


@functools.lru_cache(maxsize=256)
def _frame(source: str, special: tuple[tuple[str, str], ...], day: date, roles: tuple[str, ...]) -> list[str] | None:
    """What a template prints before, between and behind contents of these roles; None where it does not print each
    once and in order."""
    contents = [f"Qz{number}zQ" for number in range(len(roles))]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    try:
        text = Render(source, dict(special), None, False, datetime.combine(day, time())).text(messages)
    except ValueError:
        return None
    parts = re.split(r"(Qz\d+zQ)", text)
    return parts[::2] if parts[1::2] == contents else None


def _framed_ranges(
    tok: Tokenizer, render: Render, messages: Messages, answers: list[bool], plain: str
) -> Ranges | None:
    """The stretches that carry loss of a conversation that its frame and its contents make up; None of any other."""
    special, roles = tuple(render.roles.items()), tuple(message["role"] for message in messages)
    bare = all(message.keys() == {"role", "content"} for message in messages)
    if not bare or render.tools is not None or render.generate or WRITTEN_BLOCK.search(render.source):
        return None
    frame = _frame(render.source, special, render.now.date(), roles)
    for contents in ([m["content"] for m in messages], [m["content"].strip() for m in messages]) if frame else ():
        parts = [part for pair in zip(frame, [*contents, ""]) for part in pair]
        if "".join(parts) == plain:
            break
    else:
        return None
    ends, ranges = list(itertools.accumulate(map(len, parts))), []
    for number in itertools.compress(range(len(messages)), answers):
        end = ends[2 * number + 1]
        ranges.append((end - len(contents[number]), end))
        if match := _stop(tok).match(frame[number + 1]):
            ranges.append((end + match.start(1), end + match.end(1)))
    return ranges


def _encode_template(
    tok: Tokenizer, render: Render, messages: Messages, answers: list[bool]
) -> Encoded:
    """Ids and loss of a conversation that a template renders."""
    plain = render.text(messages)
    if OPEN in plain or CLOSE in plain:
        raise ValueError("the conversation holds U+FDD0 or U+FDD1, which are no characters of any text: remove them")
    others = _patterns(tok, render.source, 0)[0]
    if not any(map(others.search, _texts([messages, render.tools]))):
        if not any(answers):
            ids = tok.encode(plain, special=True)
            return ids, [False] * len(ids)
        ranges = _framed_ranges(tok, render, messages, answers, plain)
        if ranges is not None:
            return tok.encode_masked(plain, ranges, [])
    seen = _follow(tok, render, messages, answers, plain)
    ranges = _loss_ranges(tok, render, messages, seen)
    if any(answers) and not ranges:
        raise ValueError(f"the chat template prints none of the answers: {OTHER_FORM}")
    hidden = []
    for found in ANY_PRIVATE.finditer(seen.shown) if seen.marked.hidden else ():
        i = found.start()
        if found[0] in seen.marked.hidden:
            start = hidden.pop()[0] if hidden and hidden[-1][1] == i else i
            hidden.append((start, i + 1))
    return tok.encode_masked(plain, ranges, hidden)


# ------------------------------------------------------------------------------------- forms for bases without template

Parts = Iterator[tuple[str | int, int | None]]  # a text or an id, and the message whose answer it is


def _encode_form(
    tok: Tokenizer, form: str, messages: Messages, answers: list[bool], generate: bool
) -> Encoded:
    ids, mask = [], []
    for part, answer in FORMS[form](tok, messages, generate):
        # Mistral's tokenizer takes each part as a text of its own, the others the whole as one
        continued = form != "mistral" and any(id_ != tok.bos_id for id_ in ids)
        new = [part] if isinstance(part, int) else tok.encode(part, continued=continued)
        ids += new
        mask += [answer is not None and answers[answer]] * len(new)
    return ids, mask


def _ids(tok: Tokenizer, form: str, *names: str) -> list[int]:
    for name in names:
        if name not in tok.added:
            found = f"this tokenizer has no {name}, which the chat form {form} needs"
            raise ValueError(f"{found}: use form plain or a chat model's tokenizer")
    return [tok.added[name] for name in names]


def _plain(tok: Tokenizer, messages: Messages, generate: bool) -> Parts:
    """The form of the paper's data: <|user|> and its like are plain text on a line of their own, EOS ends an answer."""
    if tok.eos_id is None:
        found = "this tokenizer has no EOS, expected one for the chat form plain"
        raise ValueError(f"{found}: name eos_token in tokenizer_config.json")
    if tok.adds_bos:
        yield tok.bos_id, None
    text = ""
    for i, m in enumerate(messages):
        text += f"<|{m['role']}|>\n"
        if m["role"] == "assistant":
            yield text, None
            yield m["content"].strip(), i
            yield tok.eos_id, i
            text = "\n"
        else:
            text += m["content"].strip() + "\n"
    if generate:
        yield text + "<|assistant|>\n", None


def _chatml(tok: Tokenizer, messages: Messages, generate: bool) -> Parts:
    """SmolLM2 and Qwen. An answer is encoded apart from its header, as when it is generated."""
    start, end = _ids(tok, "chatml", "<|im_start|>", "<|im_end|>")
    for i, m in enumerate(messages):
        answer = i if m["role"] == "assistant" else None
        yield start, None
        yield f"{m['role']}\n", None
        yield m["content"], answer
        yield end, answer
        yield "\n", None
    if generate:
        yield start, None
        yield "assistant\n", None


def _llama3(tok: Tokenizer, messages: Messages, generate: bool) -> Parts:
    """Llama 3's headers, without the dates that later versions begin with."""
    bos, start, end, eot = _ids(
        tok, "llama3", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
    )
    yield bos, None
    for i, m in enumerate(messages):
        answer = i if m["role"] == "assistant" else None
        yield from ((start, None), (m["role"], None), (end, None))
        if answer is None:
            yield "\n\n" + m["content"].strip(), None
        else:
            yield "\n\n", None
            yield m["content"].strip(), i
        yield eot, answer
    if generate:
        yield from ((start, None), ("assistant", None), (end, None), ("\n\n", None))


def _mistral(tok: Tokenizer, messages: Messages, generate: bool) -> Parts:
    """Mistral Instruct.

    v0.1 has no token [INST]: it is text, with spaces inside, and the system message goes before the first question;
    later versions have one, without spaces, the system message goes before the last question, and answers lose spaces
    at their end.
    """
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    skipped = 1 if messages[0]["role"] == "system" else 0
    turns = messages[skipped:]
    if any(m["role"] != ("user", "assistant")[i % 2] for i, m in enumerate(turns)):
        found = f"the roles are {', '.join(m['role'] for m in turns)}"
        raise ValueError(f"{found}, expected user and assistant by turns for the form mistral: mend the conversation")
    inst = _ids(tok, "mistral", "[INST]", "[/INST]") if "[INST]" in tok.added else None
    last = (len(turns) - 1) // 2 * 2
    bos, eos = _ids(tok, "mistral", "<s>", "</s>")
    yield bos, None
    for i, m in enumerate(turns):
        text = f"{system}\n\n{m['content']}" if system and i == (last if inst else 0) else m["content"]
        if m["role"] == "assistant":
            yield text.rstrip(" ") if inst else text, i + skipped
            yield eos, i + skipped
        elif inst:
            yield from ((inst[0], None), (text, None), (inst[1], None))
        else:
            yield f"[INST] {text} [/INST]", None


FORMS = {"plain": _plain, "chatml": _chatml, "llama3": _llama3, "mistral": _mistral}
OTHER_FORM = f"choose --chat={'|'.join(FORMS)}"


# -------------------------------------------------------------------------------------------------------------- loading


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer whose files lie in the folder.

    FileNotFoundError without any; ValueError if damaged or not exactly supported. A tokenizer.model goes before a
    tokenizer.json, whose added tokens and BOS count all the same. Stop ids: eos_token_id of generation_config.json,
    else of hf_config.json or config.json, beside the tokenizer's EOS and the token that ends a turn of the template.
    """
    folder = Path(folder)
    path, load = _find(folder)
    try:
        fast = _json(folder / "tokenizer.json") if (folder / "tokenizer.json").exists() else {}
        return load(path, _settings(folder, fast), fast)
    except ValueError as e:
        raise ValueError(f"tokenizer in {folder} ({path.name}): {e}") from None
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError) as e:  # JSON of another shape
        found = f"the files are not built as expected ({type(e).__name__}: {e})"
        raise ValueError(f"tokenizer in {folder} ({path.name}): {found}: {COPY}") from None


def _find(folder: Path) -> tuple[Path, Callable]:
    """The file that holds the vocabulary, and the function that reads it."""
    models = [p for p in (folder / "tokenizer.model", *sorted(folder.glob("*.model.v*"))) if p.exists()]
    if models:
        return models[0], _load_model
    if (folder / "tokenizer.json").exists():
        return folder / "tokenizer.json", _load_json
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return folder / "vocab.json", _load_vocab
    tiktokens = sorted(folder.glob("*.tiktoken"))
    if tiktokens:
        return tiktokens[0], _load_model
    found = "no such folder"
    if folder.is_dir():
        found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
    expected = "tokenizer.model (or *.model.v3), tokenizer.json, vocab.json with merges.txt, or *.tiktoken"
    raise FileNotFoundError(
        f"no tokenizer in {folder} (found: {found}), expected {expected}: copy it from the model's source"
    )


def _settings(folder: Path, fast: dict) -> Settings:
    """The small files beside the vocabulary, and what tokenizer.json says of added tokens and BOS."""
    config = _json_if_there(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # an old folder, whose map goes before the config
        config = config | _json_if_there(folder / "special_tokens_map.json")
    kind = str(config.get("tokenizer_class")).removesuffix("Fast")
    settings = Settings(CLASS_ROLES.get(kind, {}) | config, fast=bool(fast))
    settings.added = {t["id"]: t for t in fast.get("added_tokens") or []}
    special = settings.special
    for content, i in _json_if_there(folder / "added_tokens.json").items():
        settings.added[i] = {"content": content, "special": content in special}
    settings.added |= {int(i): token for i, token in (config.get("added_tokens_decoder") or {}).items()}
    settings.front = _front(fast)
    settings.templates = _templates(folder, config)
    settings.stops = _stops(folder)
    return settings


# Special tokens that transformers' classes have where tokenizer_config.json does not name them
END_OF_TEXT = "<|endoftext|>"
CLASS_ROLES = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Qwen2Tokenizer": {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT, "unk_token": END_OF_TEXT},
    "GPT2Tokenizer": {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT},
}


def _front(fast: dict) -> int | None:
    """The id that the post-processor puts in front of a text."""
    front = []
    for step in _steps(fast.get("post_processor"), "processors"):
        if step["type"] in ("RobertaProcessing", "BertProcessing"):
            front = [step["cls"][1], *front]
        if step["type"] == "TemplateProcessing":
            before = itertools.takewhile(lambda part: "SpecialToken" in part, step["single"])
            names = [part["SpecialToken"]["id"] for part in before]
            front = [i for name in names for i in step["special_tokens"][name]["ids"]] + front
    if len(front) > 1:
        found = f"{len(front)} tokens go in front of a text"
        raise ValueError(f"{found}, expected BOS alone: this tokenizer is not supported")
    return front[0] if front else None


def _templates(folder: Path, config: dict) -> dict[str, str]:
    """Chat templates by name: of the .jinja files if there are any, else of tokenizer_config.json."""
    files = [folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))]
    found = {path.name.removesuffix(".jinja"): _text(path) for path in files if path.exists()}
    if found:
        return {"default" if name == "chat_template" else name: source for name, source in found.items()}
    given = config.get("chat_template") or _json_if_there(folder / "chat_template.json").get("chat_template")
    if isinstance(given, list):
        given = {t.get("name"): t.get("template") for t in given if isinstance(t, dict)}
    if isinstance(given, str):
        given = {"default": given}
    given = given or {}
    if not isinstance(given, dict) or not all(isinstance(text, str) for text in (*given, *given.values())):
        found = f"chat_template is {str(given)[:60]}"
        raise ValueError(f"{found}, expected a text or a list of names and templates: {COPY}")
    return given


def _stops(folder: Path) -> list[int]:
    """The ids that end a generation, by the model's own files."""
    for name in ("generation_config.json", "hf_config.json", "config.json"):
        ids = _json_if_there(folder / name).get("eos_token_id")
        if ids is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        if not all(type(i) is int for i in ids):
            raise ValueError(f"eos_token_id in {name} is {ids}, expected ids: mend the file")
        return ids
    return []


def _bytes(path: Path) -> bytes:
    data = path.read_bytes()
    if not data or data.startswith(b"version https://git-lfs"):
        found = "a Git LFS pointer (run git lfs pull)" if data else "empty"
        raise ValueError(f"{path.name} is {found}, expected the content: {COPY}")
    return data


def _text(path: Path) -> str:
    try:
        return _bytes(path).decode()
    except UnicodeDecodeError as e:
        raise ValueError(f"{path.name} is not UTF-8 ({e}), expected a text: {COPY}") from None


def _json(path: Path) -> dict:
    try:
        value = json.loads(_bytes(path))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ValueError(f"{path.name} is not JSON ({e}), expected a whole JSON file: {COPY}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds a JSON {type(value).__name__}, expected an object: {COPY}")
    return value


def _json_if_there(path: Path) -> dict:
    return _json(path) if path.exists() else {}


def _load_model(path: Path, settings: Settings, fast: dict) -> Tokenizer:
    """sentencepiece's binary format, which begins with the tag of its first field, or tiktoken's lines."""
    data = _bytes(path)
    if data[0] != 0x0A:
        return _load_tiktoken(data, settings)
    try:
        if not _is_whole(data):
            raise RuntimeError
        space = b"" if settings.config.get("add_prefix_space") is not False else NO_SPACE
        core = SentencePiece(data + space, every=settings.config.get("legacy", False))
    except RuntimeError:
        expected = "pieces, trainer_spec and normalizer_spec, as expected"
        raise ValueError(f"not a whole sentencepiece model of {expected}: {COPY}") from None
    model = core.model
    names = model.id_to_piece(list(range(model.get_piece_size())))
    pieces = {i: _spelled(name) for i, name in enumerate(names)}
    special = {
        i: {"content": name, "special": True}
        for i, name in enumerate(names)
        if model.is_control(i) or model.is_unknown(i)
    }
    ends = (("bos_token", model.bos_id()), ("eos_token", model.eos_id()))
    defaults = {"add_bos_token": True} | {role: names[i] for role, i in ends if i >= 0}
    return _tokenizer(core, pieces, special, replace(settings, config=defaults | settings.config))


def _is_whole(proto: bytes) -> bool:
    """Whether the fields of a ModelProto fit the file and the settings after the pieces are there.

    A file that is cut off between two pieces would parse.
    """
    at, tags = 0, set()
    while at < len(proto):
        tags.add(proto[at])
        size = shift = 0
        for at in range(at + 1, len(proto)):
            size |= (proto[at] & 127) << shift
            shift += 7
            if proto[at] < 128:
                break
        at += 1 + size
    return at == len(proto) and {0x12, 0x1A} <= tags


def _spelled(piece: str) -> bytes:
    """The bytes that a piece of sentencepiece's kind stands for."""
    return bytes([int(piece[3:5], 16)]) if piece in BYTE_PIECES else piece.replace(SPACE, " ").encode()


def _load_tiktoken(data: bytes, settings: Settings) -> Tokenizer:
    """tiktoken's lines of a token in base64 and its rank, as Llama 3 and Qwen have them."""
    tokens = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            tokens[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            found = f"line {number} is {line[:40]!r}"
            raise ValueError(f"{found}, expected a token in base64 and its rank: {COPY}") from None
    size = len(tokens)
    in_order = list(tokens.values()) == list(range(size))
    has_bytes = all(bytes([b]) in tokens for b in range(256))
    if size not in (128_000, 151_643) or not in_order or not has_bytes:
        expected = "128,000 (Llama 3) or 151,643 (Qwen) in the order of their ranks"
        raise ValueError(f"{size:,} tokens, expected {expected}: {COPY}")
    llama = size == 128_000
    names, pattern = (LLAMA3_SPECIAL, LLAMA3) if llama else (QWEN_SPECIAL, QWEN)
    defaults = {"eos_token": END_OF_TEXT}
    if llama:
        defaults = {"bos_token": names[0], "eos_token": names[1], "add_bos_token": True}
    special = {size + i: {"content": content, "special": True} for i, content in enumerate(names)}
    core, pieces = ByteBPE(pattern, tokens), {i: token for token, i in tokens.items()}
    prepare = None if llama else NORMAL_FORMS["NFC"]
    return _tokenizer(core, pieces, special, replace(settings, config=defaults | settings.config), prepare)


def _tokenizer(core, pieces: dict, special: dict, settings: Settings, prepare: Callable | None = None) -> Tokenizer:
    """special: special tokens of the vocabulary itself, where the settings do not say otherwise."""
    return Tokenizer(core, pieces, replace(settings, added=special | settings.added), prepare)


def _load_vocab(path: Path, settings: Settings, fast: dict) -> Tokenizer:
    """vocab.json and merges.txt. No file says how text is split before merging, so the tokenizer's class has to."""
    kind = str(settings.config.get("tokenizer_class", "missing")).removesuffix("Fast")
    if kind not in ("Qwen2Tokenizer", "GPT2Tokenizer"):
        found = f"tokenizer_config.json has tokenizer_class {kind}"
        raise ValueError(f"{found}, expected Qwen2Tokenizer or GPT2Tokenizer: add tokenizer.json")
    text = _bytes(path.with_name("merges.txt")).decode("utf-8", "replace")
    lines = text.replace("\r\n", "\n").split("\n")
    merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    model = {"vocab": _json(path), "merges": merges}
    if kind == "Qwen2Tokenizer":
        return _byte_tokenizer(model, QWEN, settings, NORMAL_FORMS["NFC"])
    return _byte_tokenizer(model, GPT2, settings, None)


def _load_json(path: Path, settings: Settings, fast: dict) -> Tokenizer:
    """Hugging Face's tokenizer.json with a BPE model, byte-level or of sentencepiece's kind."""
    model = fast.get("model") or {}
    affixes = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    odd = {k: v for k, v in model.items() if v and k in affixes}
    if model.get("type", "BPE") != "BPE" or not {"vocab", "merges"} <= model.keys() or odd:
        found = f"the model is {model.get('type')} {odd or ''}"
        raise ValueError(f"{found}, expected plain BPE with vocab and merges: not supported")
    if len(set(model["vocab"].values())) < len(model["vocab"]):
        raise ValueError(f"two tokens of the vocabulary have one id, expected an id for each: {COPY}")
    normalizers = _steps(fast.get("normalizer"), "normalizers")
    splits = _steps(fast.get("pre_tokenizer"), "pretokenizers")
    if model.get("byte_fallback"):
        return _sentencepiece_tokenizer(model, normalizers, splits, settings)
    forms = [step["type"] for step in normalizers]
    if len(forms) > 1 or not NORMAL_FORMS.keys() >= set(forms):
        found = f"the normalizer is {' + '.join(forms)}"
        raise ValueError(f"{found}, expected none or a Unicode normal form: this tokenizer is not supported")
    return _byte_tokenizer(model, _pattern(splits), settings, NORMAL_FORMS[forms[0]] if forms else None)


def _steps(step: dict | None, key: str) -> Messages:
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
        cuts = last.get("use_regex", True)
        if cuts and not before:
            return GPT2
        if cuts and types == ["Digits"]:
            return DIGITS_THEN_GPT2 % ("" if before[0]["individual_digits"] else "+")
        isolated = types == ["Split"] and before[0]["behavior"] == "Isolated" and not before[0]["invert"]
        if not cuts and isolated and "Regex" in before[0]["pattern"]:
            return before[0]["pattern"]["Regex"]
    found = " + ".join([*types, last["type"]])
    expected = "ByteLevel, Digits + ByteLevel, or Split (regex, isolated) + ByteLevel, without a space in front"
    raise ValueError(f"the pre-tokenizer is {found}, expected {expected}: this tokenizer is not supported")


def _byte_tokenizer(model: dict, pattern: str, settings: Settings, prepare: Callable | None) -> Tokenizer:
    vocab = model["vocab"]
    order = merge_order(vocab, _pairs(model), whole_words=bool(model.get("ignore_merges")))
    singles, unknown = [c for c in CHAR_TO_BYTE if c in vocab], vocab.get(model.get("unk_token"))
    if len(singles) < 256 and unknown is not None and model.get("fuse_unk"):
        found = "the vocabulary lacks bytes and fuse_unk is set, expected one or the other"
        raise ValueError(f"{found}: this tokenizer is not supported")
    spelled = {token: _bytes_of(token) for token in vocab}
    core = ByteBPE(pattern, {spelled[token]: vocab[token] for token in (*singles, *order)}, unknown=unknown)
    pieces = {i: spelled[token] for token, i in vocab.items()}
    return _tokenizer(core, pieces, _named(vocab, settings), settings, prepare)


def _bytes_of(token: str) -> bytes:
    """The bytes that a token of byte-level BPE stands for; those of its letters where it is not written so."""
    if CHAR_TO_BYTE.keys() >= set(token):
        return bytes(map(CHAR_TO_BYTE.get, token))
    return token.encode()


def _named(vocab: dict[str, int], settings: Settings) -> dict[int, dict]:
    """The special tokens of the settings that the vocabulary holds."""
    return {vocab[name]: {"content": name, "special": True} for name in settings.special if name in vocab}


def _sentencepiece_tokenizer(model: dict, normalizers: list, splits: list, settings: Settings) -> Tokenizer:
    """What text becomes before merging: Llama 2 and Mistral prepend a space and write spaces as SPACE, in one of two
    ways. As normalizers they do so to each text between special tokens; as Metaspace to the first text or to every
    one, and only where there is no space yet."""
    vocab = model["vocab"]
    if model.get("ignore_merges"):
        raise ValueError("ignore_merges is set, expected merges that make all tokens: this tokenizer is not supported")
    order = merge_order(vocab, _pairs(model), whole_words=False)
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    meta = {"type": "Metaspace", "replacement": SPACE, "split": False}
    if not splits and normalizers == [{"type": "Prepend", "prepend": SPACE}, escape]:
        prepare, scheme = _prepend, "never"
    elif not splits and normalizers == [escape]:
        prepare, scheme = _escape, "never"
    elif not normalizers and len(splits) == 1 and meta.items() <= splits[0].items():
        prepare, scheme = None, splits[0]["prepend_scheme"]
    else:
        found = " + ".join(step["type"] for step in (*normalizers, *splits)) or "nothing"
        expected = "expected what Llama 2 or Mistral do"
        raise ValueError(f"text is prepared by {found}, {expected}: add the model's tokenizer.model")
    proto, ids = sentencepiece_bpe(vocab, order, prefix=scheme != "never")
    try:
        core = SentencePiece(proto, every=scheme == "always", metaspace=prepare is None, ids=ids)
    except RuntimeError as e:
        raise ValueError(f"sentencepiece cannot hold the vocabulary ({e}): this tokenizer is not supported") from None
    pieces = {i: _spelled(token) for token, i in vocab.items()}
    return _tokenizer(core, pieces, _named(vocab, settings), settings, prepare)


NORMAL_FORMS = {name: functools.partial(unicodedata.normalize, name) for name in ("NFC", "NFD", "NFKC", "NFKD")}
