"""Rows that eval.py scores: questions and texts in tokens.

Every question becomes rows (item, choice, context, target), and what is asked for is log P(target | context). How text
is parted into the two follows lm-evaluation-harness, to the token.
"""

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from data.records import Example
from tokenizer import Tokenizer, encode_chat

NEW_TOKENS = 256  # lm-eval's max_gen_toks for Hugging Face models


class Row(NamedTuple):
    """A choice of an item in tokens: what counts are the log-probabilities of target[p] for p in `at`."""

    item: int
    choice: int
    context: array  # one object for all rows that share it; what a sequence router reads
    target: array  # empty: an answer is generated
    at: Sequence[int]

    @property
    def width(self) -> int:
        return len(self.context) + (len(self.target) or NEW_TOKENS)


@dataclass
class Item:
    """A question in rows, or a text, or a window of one."""

    index: int
    rows: list[Row]
    gold: int | str | None = None  # the right choice, or the right answer's text
    sizes: Sequence[int] = ()  # the choices' lengths in characters
    truncated: bool = False
    spanning: bool = False  # a token spans context and choice
    domain: str | None = None  # what a file of texts says of the row
    counts: dict = field(default_factory=dict)  # of a text: words and bytes that its log-probability stands for


# -----------------------------------------------------------------------------
# Questions


def encode_prompt(tok: Tokenizer, text: str) -> list[int]:
    """Tokens of a prompt as in lm-eval: special tokens in it count as such, and one BOS is enough."""
    return tok.encode(text, bos=tok.adds_bos, special=True)


def prefix(tok: Tokenizer) -> list[int]:
    """The token before a text that has nothing before it: BOS, else EOS (lm-eval); [] where there is neither."""
    first = tok.eos_id if tok.bos_id is None else tok.bos_id
    return [] if first is None else [first]


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Length of the longest prefix that all rows share: that of the least and the greatest row."""
    low, high = min(rows), max(rows)
    return next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))


def encode_pairs(tok: Tokenizer, contexts: Sequence[str], choices: Sequence[str]) -> tuple[list[tuple], bool]:
    """Tokens of each context and of the choice after it, and whether a token spans both.

    As in lm-eval (api/model.py, _encode_pair) trailing spaces go to the choice, and the choice is what the whole text
    has beyond as many tokens as the context alone. Where a choice has no token so, each choice of its context is what
    follows the tokens that the context alone and all the whole texts have in common. A context that is left without a
    token becomes BOS or EOS.
    """
    alone = {context: encode_prompt(tok, context.rstrip()) for context in set(contexts)}
    wholes = [encode_prompt(tok, context + choice) for context, choice in zip(contexts, choices)]
    starts = {context: len(ids) for context, ids in alone.items()}
    short = {context for context, whole in zip(contexts, wholes) if len(whole) <= starts[context]}
    for context in short:
        starts[context] = common_prefix([alone[context], *(w for c, w in zip(contexts, wholes) if c == context)])
    before = {context: alone[context][:start] or prefix(tok) for context, start in starts.items()}
    pairs = [(before[context], whole[starts[context] :]) for context, whole in zip(contexts, wholes)]
    return pairs, bool(short)


def rows_of(item: int, pairs: Sequence[tuple[list[int], list[int]]], limit: int, share: bool) -> tuple[list[Row], bool]:
    """Rows of (context, choice) pairs, and whether one was cut from the left to `limit` + 1 tokens, as in lm-eval.

    Where contexts differ (partial scoring) and `share` allows it, their common beginning is the context of all, and the
    rest of each stands before its choice, unscored.
    """
    starts = [max(0, len(context) + len(target) - limit - 1) for context, target in pairs]
    kept = [context[start:] for start, (context, _) in zip(starts, pairs)]
    common = common_prefix(kept) if share else 0
    rows, known = [], {}
    for choice, (context, (_, target)) in enumerate(zip(kept, pairs)):
        at = common or len(context)
        head, before = array("i", context[:at]), context[at:]
        head = known.setdefault(head.tobytes(), head)
        scored = range(len(before), len(before) + len(target))
        rows.append(Row(item, choice, head, array("i", before + target), scored))
    return rows, any(starts)


def chat_context(tok: Tokenizer, messages: list[dict], form: str | None) -> str:
    """A conversation as the chat template writes it, up to where the answer begins."""
    ids = encode_chat(tok, messages, form=form, generate=True)[0]
    text = tok.decode(ids)
    if tok.encode(text, special=True) == ids:
        return text
    # some sentencepiece models put a space in front of what follows a special token
    parts, start = [], 0
    for place, id_ in enumerate([*ids, None]):
        if id_ is None or id_ in tok.special:
            parts += [tok.decode(ids[start:place]), "" if id_ is None else tok.decode([id_])]
            start = place + 1
    exact = "".join(parts)
    return exact if tok.encode(exact, special=True) == ids else text


# -----------------------------------------------------------------------------
# Texts: the answers of rows, or all of each text in windows


def windows(ids: list[int], begin: list[int], limit: int) -> list[tuple[list[int], list[int]]]:
    """(context, target) pairs that predict each token once: the first window after `begin`, each later one after a
    token or more of the one before, as many as fit (lm-eval utils.py, get_rolling_token_windows with context_len 1)."""
    pairs = []
    for start in range(0, len(ids), limit):
        end = min(start + limit, len(ids))
        pairs.append((ids[end - limit - 1 : start] if start else begin, ids[start:end]))
    return pairs


def name_of(domain) -> str | None:
    """What a row says of itself, as a name."""
    return None if domain is None else str(domain)


def window_items(text: str, tok: Tokenizer, limit: int, domain, first: int) -> list[Item]:
    """Windows of one text, numbered from `first`. Words and bytes, as lm-eval counts them, stand with the first one."""
    begin = prefix(tok)
    if not begin:
        raise ValueError("this tokenizer has neither BOS nor EOS to stand before a text: name one in its config")
    if not text.strip():
        raise ValueError("the text is empty: delete the row")
    items = []
    for number, (context, target) in enumerate(windows(encode_prompt(tok, text), begin, limit), first):
        row = Row(number, 0, array("i", context), array("i", target), range(len(target)))
        items.append(Item(number, [row], domain=name_of(domain), counts={"words": 0, "bytes": 0}))
    words = len(re.split(r"\s+", text))
    items[0].counts = {"words": words, "bytes": len(text.encode("utf-8", "surrogatepass"))}
    return items


def answer_item(index: int, example: Example) -> Item:
    """Answers of a row, after all that stands before the first of them."""
    first = example.prompt
    target = array("i", example.tokens[first : example.targets[-1] + 1])
    row = Row(index, 0, array("i", example.tokens[:first]), target, [at - first for at in example.targets])
    return Item(index, [row], domain=name_of(example.domain))
