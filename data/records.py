"""Rows of instruction data: every form that people publish, read once, for train.py and eval.py alike.

    form            keys
    messages        messages: [{role, content}, ...], tools
    ShareGPT        conversations: [{from, value}, ...], system, tools
    Alpaca          instruction, input, output (or response), system, history: [[question, answer], ...]
    pairs           prompt, query or question with response, completion or answer; system, history
    text            text: no prompt; its first half is what a router may see, its second half is predicted

A turn may say that no loss is taken on it: "weight": 0, "train": false or "loss": false. What would change a prompt and
is not read here is refused by its name; other keys (id, source, domain, split, ...) say something about the row.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.stream import RowError, read_rows
from tokenizer import Tokenizer, encode_chat

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
PAIRS = [
    (question, answer)
    for question in ("instruction", "prompt", "query", "question")
    for answer in ("output", "response", "completion", "answer")
]
# Keys of a row that change what the model is asked; a row that has one which its form does not read is refused.
PROMPT_KEYS = ("system", "system_prompt", "history", "tools", "functions", "input", "context", "documents", "images")
LOSS_KEYS = ("weight", "train", "loss")
# Where the model's template reads them:
TEMPLATE_KEYS = ("reasoning_content", "thinking", "tool_calls", "tool_call_id", "name")
BARE = ("Question: {}\nAnswer:", "{}\n")  # a question without a chat form: as tasks ask it, or as plain text
SHOWN = 10  # bad rows that an error lists


@dataclass(frozen=True)
class Example:
    """One whole document in tokens.

    prompt: tokens before the first loss-carrying one; targets: positions whose token is predicted; domain: what the row
    says of itself; cut: whether tokens beyond the limit were cut off; bare: whether a conversation has no chat form.
    """

    tokens: Sequence[int]
    prompt: int
    targets: Sequence[int]
    domain: str | None = None
    cut: bool = False
    bare: bool = False


@dataclass(frozen=True)
class Form:
    """How rows become tokens.

    limit: longest example in tokens; chat: a chat form, None for the model's own; truncate: cut longer examples instead
    of refusing them; last_only: take the loss on a conversation's last answer alone; bare: share of conversations that
    stand without a chat form, by what they say and the seed.
    """

    tok: Tokenizer
    limit: int
    chat: str | None = None
    truncate: bool = False
    last_only: bool = False
    bare: float = 0.0
    seed: int = 0


# -----------------------------------------------------------------------------
# From files to rows


def read_records(path: str | Path, bad: list | None = None) -> list[tuple[str, dict]]:
    """All objects of a file of JSON lines or of one JSON list, perhaps gzipped, each with its place in words.

    What is wrong with a single row goes to `bad`; without `bad` it raises ValueError. Raises FileNotFoundError or
    ValueError for a file that is no such file (data/stream.py).
    """
    faults = []
    rows = list(read_rows(path, faults))
    if len(faults) > 1 and not rows:
        refuse_object(path)
    if faults and bad is None:
        raise faults[0]
    if faults:
        bad += faults
    return rows


def refuse_object(path: str | Path) -> None:
    """Say so where a file without one good line is a single object over many lines, which may hold the rows."""
    try:
        whole = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError):
        return
    raise ValueError(f"{path} holds one JSON object with the keys {sorted(whole)[:8]}, expected a list of rows or one "
                     "row a line: write the list that it holds as a file of its own")


# -----------------------------------------------------------------------------
# From rows to conversations


def to_messages(row: dict, place: str) -> tuple[list[dict], list | None] | str:
    """A row of any form as (messages, tools), or as plain text. Raises RowError naming the place and what is wrong."""
    question, answer = next((pair for pair in PAIRS if all(isinstance(row.get(key), str) for key in pair)), ("", ""))
    if "messages" in row:
        turns, read = _turns(row["messages"], place), ("tools",)
    elif "conversations" in row:
        turns, read = _with_system(row, _turns(row["conversations"], place), place), ("system", "tools")
    elif question:
        more = "input" if question == "instruction" else None
        turns, read = _with_system(row, _pair(row, question, answer, place), place), ("system", "history", more)
    elif isinstance(row.get("text"), str):
        turns, read = row["text"], ()
    else:
        raise RowError(f"{place} has the keys {sorted(row)[:12]}; expected messages, conversations, instruction + "
                       "output, prompt + response, query + response, or text: convert the row", "no known form")
    if unread := [key for key in PROMPT_KEYS if key not in read and row.get(key)]:
        raise RowError(f"{place}: {unread[0]!r} changes the prompt and is not read beside {_name(row, question)}; "
                       "expected it in the prompt itself: put it there, or delete the key", "a key that is not read")
    if isinstance(turns, str):
        return turns
    if not any(turn["role"] == "assistant" for turn in turns):
        raise RowError(f"{place}: no turn of the assistant, so there is nothing to predict: add the answer or delete "
                       "it", "no turn of the assistant")
    return turns, _tools(row, place)


def prompt_of(content: tuple[list[dict], list | None] | str) -> str:
    """What stands before the first answer of a row that to_messages read; of a plain text all of it."""
    if isinstance(content, str):
        return content
    before = itertools.takewhile(lambda turn: turn["role"] != "assistant", content[0])
    return "\n".join(turn["content"] for turn in before)


def _name(row: dict, question: str) -> str:
    return next((key for key in ("messages", "conversations", question, "text") if key in row), "text")


def _turns(turns, place: str) -> list[dict]:
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise RowError(f"{place}: messages is not a list of turns; expected "
                       '[{"role": ..., "content": ...}, ...]: mend the row', "no list of turns")
    return [_turn(turn, f"{place}, turn {number}") for number, turn in enumerate(turns, 1)]


def _turn(turn: dict, place: str) -> dict:
    said = turn.get("role", turn.get("from"))
    role, content = ROLES.get(str(said).lower()), turn.get("content", turn.get("value"))
    if role is None or not isinstance(content, str):
        raise RowError(f"{place} has role {said!r} and content of type {type(content).__name__}; expected a role of "
                       f"{', '.join(ROLES)} and a text: mend the row",
                       "an unknown role" if role is None else "a turn without text")
    message = {"role": role, "content": content}
    message |= {key: turn[key] for key in TEMPLATE_KEYS if turn.get(key)}
    if not _carries_loss(turn, place):
        message["loss"] = False
    elif role != "assistant" and any(key in turn for key in LOSS_KEYS):
        raise RowError(f"{place}: loss is asked for on a turn of the {role}; expected it on the assistant's: set it "
                       "to 0", "a loss flag of another kind")
    return message


def _carries_loss(turn: dict, place: str) -> bool:
    flags = {key: turn[key] for key in LOSS_KEYS if turn.get(key) is not None}
    for key, value in flags.items():
        if value not in (0, 1):  # True and False are 1 and 0
            raise RowError(f"{place}: {key!r} is {value!r}, expected 0 or 1: loss is taken on a turn or it is not",
                           "a loss flag of another kind")
    return all(flags.values())


def _pair(row: dict, question: str, answer: str, place: str) -> list[dict]:
    """Turns of a row that holds one question and its answer, after those of its history."""
    turns = []
    for earlier in row.get("history") or []:
        if not isinstance(earlier, (list, tuple)) or [type(text) for text in earlier] != [str, str]:
            raise RowError(f"{place}: history holds {str(earlier)[:60]!r}, expected pairs [question, answer]: mend "
                           "the row", "a field of another type")
        turns += [{"role": "user", "content": earlier[0]}, {"role": "assistant", "content": earlier[1]}]
    asked = row[question]
    if question == "instruction" and row.get("input"):
        if not isinstance(row["input"], str):
            raise RowError(f"{place}: input is a {type(row['input']).__name__}, expected a text: mend the row",
                           "a field of another type")
        asked += f"\n\n{row['input']}"
    return [*turns, {"role": "user", "content": asked}, {"role": "assistant", "content": row[answer]}]


def _with_system(row: dict, turns: list[dict], place: str) -> list[dict]:
    """The turns behind the row's own system message, where it has one."""
    system = row.get("system")
    if not system:
        return turns
    if not isinstance(system, str):
        raise RowError(f"{place}: system is a {type(system).__name__}, expected a text: mend the row",
                       "a field of another type")
    if turns[0]["role"] == "system":
        raise RowError(f"{place}: a system message stands in the row and in its first turn, expected one: delete one "
                       "of them", "two system messages")
    return [{"role": "system", "content": system}, *turns]


def _tools(row: dict, place: str) -> list | None:
    tools = row.get("tools") or None
    if isinstance(tools, str):  # often a JSON text
        try:
            tools = json.loads(tools) or None
        except ValueError as error:
            raise RowError(f"{place}: tools is not JSON ({error}), expected a list: mend the row",
                           "a field of another type") from None
    if tools is not None and not isinstance(tools, list):
        raise RowError(f"{place}: tools is a {type(tools).__name__}, expected a list: mend the row",
                       "a field of another type")
    return tools


# -----------------------------------------------------------------------------
# From conversations to tokens


def encode(row: dict, place: str, form: Form) -> Example | None:
    """Tokens and targets of one row; None where truncation leaves nothing to predict. Raises RowError naming the place.
    """
    content = to_messages(row, place)
    bare = bare_question(content, form)
    try:
        if isinstance(content, str):
            ids, targets = _encode_text(content, form)
        else:
            ids, targets = _encode_bare(content[0], form, bare) if bare else _encode_turns(*content, form)
    except ValueError as error:
        raise RowError(f"{place}: {error}", "no place in the chat form") from None
    if not targets:
        raise RowError(f"{place}: no loss-carrying token among {len(ids)}; expected an answer that is not empty and "
                       "on which loss is taken: mend or delete the row", "no token carries loss")
    is_long = len(ids) > form.limit
    if is_long and not form.truncate:
        raise RowError(f"{place}: {len(ids):,} tokens, expected at most {form.limit:,}: raise --max_length (up "
                       "to the model's context), cut examples with --truncate, or delete the row", "too long")
    if is_long:
        ids, targets = ids[: form.limit], [position for position in targets if position < form.limit]
        if not targets:
            return None
    return Example(ids, targets[0], targets, row.get("domain"), is_long, bare is not None)


def bare_question(content: tuple[list[dict], list | None] | str, form: Form) -> str | None:
    """How questions stand in a row that takes no chat form; None for a row that does, as all with tools do."""
    if isinstance(content, str) or content[1] or any({*turn} - {"role", "content", "loss"} for turn in content[0]):
        return None
    text = repr((form.seed, content)).encode("utf-8", "surrogatepass")
    drawn = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())
    return BARE[drawn % len(BARE)] if drawn < form.bare * 2**64 else None


def _encode_text(text: str, form: Form) -> tuple[list[int], list[int]]:
    ids = form.tok.encode(text, bos=form.tok.adds_bos)
    return ids, list(range(max(1, len(ids) // 2), len(ids)))


def _encode_bare(messages: list[dict], form: Form, question: str) -> tuple[list[int], list[int]]:
    """Turns one after another, each answer behind its question; a token belongs to what its last character stands in.
    """
    text, ids, targets = "", [], []
    for turn in messages:
        answer, before = turn["role"] == "assistant", len(ids)
        text += f" {turn['content']}\n" if answer else question.format(turn["content"])
        ids = form.tok.encode(text, bos=form.tok.adds_bos)
        if answer and turn.get("loss", True) and (turn is messages[-1] or not form.last_only):
            targets += range(max(1, before), len(ids))
    return ids, [position for position in targets if position < len(ids)]


def _encode_turns(messages: list[dict], tools: list | None, form: Form) -> tuple[list[int], list[int]]:
    ids, mask = encode_chat(form.tok, messages, form=form.chat, tools=tools, last_only=form.last_only)
    return ids, [position for position, carries in enumerate(mask) if carries and position > 0]


# -----------------------------------------------------------------------------
# Many rows, some of them bad


class Tally(list):
    """Faults of rows: the first SHOWN of them, and how many there are by reason."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def append(self, fault: RowError) -> None:
        self.counts[fault.reason] += 1
        if len(self) < SHOWN:
            super().append(fault)


def settle_bad(bad: list, skip: bool, say=print) -> None:
    """Raise one ValueError that lists the bad rows, or say how many are left out where that was asked for."""
    if not bad:
        return
    total = bad.counts.total() if isinstance(bad, Tally) else len(bad)
    more = f"\n  and {total - SHOWN:,} more" if total > SHOWN else ""
    listed = "".join(f"\n  {reason}" for reason in bad[:SHOWN]) + more
    if not skip:
        if total == 1:
            raise ValueError(f"{bad[0]} (--skip_bad leaves such rows out)")
        raise ValueError(f"{total:,} rows cannot be used; mend them, or leave them out with --skip_bad:{listed}")
    say(f"{total:,} bad rows are left out (--skip_bad):{listed}")
