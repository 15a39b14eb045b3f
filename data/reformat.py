"""Turn the raw instruction data sets, as their publishers give them, into `messages` files.

    python data/reformat.py [--raw=data/raw] [--out=data/reformatted] [--only=slim_orca,alpaca]

RAW/NAME holds the files of the source NAME (SOURCES below: names, homes, licences). Each becomes OUT/NAME.jsonl, rows
{"messages", "source", "domain", "id"}, and OUT/NAME.report.json, which counts what was kept and dropped, and why. Files
of any size are read row by row and written whole or not at all; a second run with the same inputs does nothing.
Then: python data/mix.py. What is dropped: data/README.md. Depends on data/stream.py and runtime.
"""

import difflib
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import runtime  # noqa: E402
from data import stream  # noqa: E402

ROLES = {"system": "system", "human": "user", "user": "user"}
ROLES |= dict.fromkeys(("gpt", "chatgpt", "bard", "assistant"), "assistant")
CONTEXT_FIELDS = ("system", "history", "tools", "input", "context")  # text without which an answer makes no sense
SHAREGPT_ID = re.compile(r"(\w{7})_\d+")  # QWJhYvA_0, QWJhYvA_12, ...: the pieces into which a conversation was cut
PROGRAM = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]  # other rules make another file


class Unusable(Exception):
    """Why a row is dropped: the reason under which it is counted, and what was found in it."""

    def __init__(self, reason: str, found: str):
        super().__init__(reason, found)
        self.reason, self.found = reason, found


# ---------------------------------------------------------------------------------- from a publisher's row to its turns


def conversation_turns(row: dict) -> list[dict]:
    """Turns of {"conversations": [{"from": ..., "value": ...}, ...]}, the ShareGPT form."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise Unusable("no conversation", f"conversations is {repr(turns)[:40]}")
    return turns


def instruction_turns(row: dict) -> list[dict]:
    """Turns of {"instruction", "input", "output"}, the Alpaca form; the input stands below the instruction."""
    asked, more = row.get("instruction"), row.get("input") or ""
    if not isinstance(asked, str) or not isinstance(more, str):
        raise Unusable("a turn without text", f"instruction is {str(asked)[:40]!r}, input is {str(more)[:40]!r}")
    if more.strip():
        asked += f"\n\n{more}"
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": row.get("output")}]


def question_turns(row: dict) -> list[dict]:
    """Turns of {"query", "response"}, the MetaMathQA form."""
    return [{"from": "human", "value": row.get("query")}, {"from": "gpt", "value": row.get("response")}]


@dataclass(frozen=True)
class Source:
    """A data set: how its rows are read, what its cleaning drops, and where it comes from.

    fields: keys of a row that are read; drops: speakers whose conversations the official script drops; group: the field
    that rows of one origin share, so that mix.py holds them out together.
    """

    turns: Callable[[dict], list[dict]]
    fields: tuple[str, ...]
    drops: tuple[str, ...]
    home: str
    licence: str
    files: tuple[str, ...]
    rows: int  # as published
    group: str | None = None


HUB = "https://huggingface.co/datasets"
CONVERSATION, INSTRUCTION = ("id", "idx", "conversations"), ("instruction", "input", "output")
SOURCES = {
    "vicuna_sharegpt": Source(
        conversation_turns, CONVERSATION, ("bing",), f"{HUB}/anon8231489123/ShareGPT_Vicuna_unfiltered",
        "Apache-2.0 as stated; the texts under ShareGPT's terms",
        ("ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json",), 94_145, group="id",
    ),
    "evol_instruct": Source(
        conversation_turns, CONVERSATION, ("system", "bing"), f"{HUB}/WizardLMTeam/WizardLM_evol_instruct_V2_196k",
        "MIT", ("WizardLM_evol_instruct_V2_143k.json",), 143_000,
    ),
    "slim_orca": Source(
        conversation_turns, CONVERSATION, (), f"{HUB}/Open-Orca/SlimOrca", "MIT",
        ("oo-labeled_correct.gpt4.sharegpt.jsonl",), 517_982,
    ),
    "meta_math_qa": Source(
        question_turns, ("query", "response", "original_question"), (), f"{HUB}/meta-math/MetaMathQA", "MIT",
        ("MetaMathQA-395K.json",), 395_000, group="original_question",
    ),
    "evol_code_alpaca": Source(
        instruction_turns, INSTRUCTION, (), f"{HUB}/theblackcat102/evol-codealpaca-v1", "Apache-2.0",
        ("train.jsonl",), 111_272,
    ),
    "alpaca": Source(
        instruction_turns, INSTRUCTION, (), "https://github.com/tatsu-lab/stanford_alpaca", "CC BY-NC 4.0",
        ("alpaca_data.json",), 52_002,
    ),
}


# -------------------------------------------------------------------------------------------- from turns to a clean row


def clean(row: dict, source: Source) -> tuple[list[dict], bool]:
    """Messages of one row (an optional system turn, then user and assistant by turns), and whether turns were cut off.

    Assistant turns before the first user turn and user turns behind the last answer are cut off. Raises Unusable.
    """
    for key in CONTEXT_FIELDS:
        if key not in source.fields and row.get(key):
            raise Unusable("context in a field that this source does not have", f"{key} is {str(row[key])[:40]!r}")
    messages = [_message(turn, source) for turn in source.turns(row)]
    is_system = [message["role"] == "system" for message in messages]
    begin = messages[:1] if is_system[0] else []
    turns = messages[len(begin):]
    if any(is_system[1:]):
        raise Unusable("a system turn behind the first", f"turn {is_system.index(True, 1) + 1}")
    first = next((i for i, message in enumerate(turns) if message["role"] == "user"), len(turns))
    last = max((i for i, message in enumerate(turns) if message["role"] == "assistant"), default=-1)
    kept = turns[first:last + 1]
    _check_turns(kept, " ".join(message["role"] for message in turns))
    return begin + kept, len(kept) < len(turns)


def _message(turn, source: Source) -> dict:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise Unusable("a turn without text", repr(turn)[:60])
    speaker = turn.get("from")
    if speaker in source.drops:
        raise Unusable(f"a turn by {speaker}", "the official script drops these conversations")
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise Unusable("a turn by an unknown role", f"{str(speaker)[:40]!r}, expected one of {', '.join(ROLES)}")
    message = {"role": ROLES[speaker], "content": turn["value"]}
    if message["role"] == "assistant" and turn.get("weight") == 0:
        message["weight"] = 0  # no loss is taken on it
    return message


def _check_turns(turns: list[dict], found: str) -> None:
    """Raise Unusable unless user and assistant speak by turns, none is empty, and some answer carries loss."""
    if not turns:
        raise Unusable("no answer of the assistant to a user's turn", found or "no turn")
    for place, message in enumerate(turns):
        if message["role"] != ("user", "assistant")[place % 2]:
            raise Unusable("two turns of one role in a row", found)
        if not message["content"].strip():
            raise Unusable("an empty turn", f"{message['role']} in {found}")
    if all("weight" in message for message in turns[1::2]):
        raise Unusable("no answer that carries loss", "every weight is 0")


def group_of(row: dict, source: Source) -> str | None:
    """A short name of what this row shares with others: the conversation that was split, or the original question."""
    value = row.get(source.group)
    if not isinstance(value, str):
        return None
    piece = SHAREGPT_ID.fullmatch(value) if source.group == "id" else None
    if piece:
        value = piece[1]
    return hashlib.blake2b(value.encode("utf-8", "replace"), digest_size=8).hexdigest()


# ----------------------------------------------------------------------------------------------------- files and counts


def files_of(name: str, raw: Path) -> list[Path]:
    """The source's files in RAW/NAME: those that the publisher names, else every JSON file there."""
    source, folder = SOURCES[name], raw / name
    wanted = f"{' or '.join(source.files)} from {source.home}"
    if not folder.exists():
        raise FileNotFoundError(f"{folder} was not found, expected a folder with {wanted}: put it there, or name the "
                                "sources that you have with --only")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected a folder with {wanted}: move it into a folder of that name")
    present = sorted(path for path in folder.rglob("*") if not path.name.startswith("."))
    data = [path for path in present if path.name.endswith(stream.SUFFIXES) and path.parent == folder]
    named = [path for path in data if path.name.removesuffix(".gz") in source.files]
    found = named or data
    if not found:
        for path in present:
            if path.is_file() and path.suffix == ".parquet":
                stream.check_file(path)  # raises with the remedy
        raise FileNotFoundError(f"{folder} holds no {', '.join(stream.SUFFIXES)} file, expected {wanted}: put it there")
    stems = Counter(path.name.removesuffix(".gz") for path in found)
    if max(stems.values()) > 1:
        twice = stems.most_common(1)[0][0]
        raise ValueError(f"{folder} holds {twice} and {twice}.gz, expected one of them: move the other one away")
    for path in found:
        stream.check_file(path)
    unread = [path for path in present if path.suffix in (".json", ".jsonl", ".gz", ".parquet") and path not in found]
    if unread:
        print(f"{name}: not read: {', '.join(str(path.relative_to(folder)) for path in unread)}")
    return found


class Count:
    """What became of a source's rows."""

    def __init__(self):
        self.rows, self.kept, self.shortened = 0, 0, 0
        self.dropped: dict[str, dict] = {}
        self.unused_fields: Counter = Counter()

    def drop(self, place: str, error: Unusable) -> None:
        entry = self.dropped.setdefault(error.reason, {"rows": 0, "first": f"{place}: {error.found}"})
        entry["rows"] += 1

    def report(self) -> dict:
        dropped = dict(sorted(self.dropped.items(), key=lambda item: -item[1]["rows"]))
        return {"rows": self.rows, "kept": self.kept, "shortened": self.shortened, "dropped": dropped,
                "unused_fields": dict(self.unused_fields.most_common(20))}


def convert(name: str, files: list[Path], output: Path) -> dict:
    """Write the usable rows of the files as `messages` lines; the counts."""
    source, count, known = SOURCES[name], Count(), set(SOURCES[name].fields)
    with open(output, "wb") as file:
        for path in files:
            for place, row in runtime.track(stream.read_rows(path), f"{name}: {path.name}"):
                count.unused_fields.update(row.keys() - known)
                count.rows += 1
                try:
                    messages, is_shorter = clean(row, source)
                    line = encode_row(messages, f"{name}_{count.rows - 1}", name, group_of(row, source))
                except Unusable as error:
                    count.drop(place, error)
                    continue
                file.write(line)
                count.kept += 1
                count.shortened += is_shorter
    if not count.kept:
        reasons = "; ".join(f"{reason} ({entry['first']})" for reason, entry in count.dropped.items())
        raise ValueError(f"{name}: none of {count.rows:,} rows can be used: {reasons}; expected rows with the fields "
                         f"{', '.join(source.fields)}: check that the files are those of {source.home}")
    return count.report()


def encode_row(messages: list[dict], identity: str, name: str, group: str | None) -> bytes:
    row = {"messages": messages, "source": name, "domain": name, "id": identity}
    if group:
        row["group"] = group
    try:
        return json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
    except UnicodeEncodeError as error:
        found = f"U+{ord(error.object[error.start]):X}"
        raise Unusable("half of a surrogate pair, which is no character", found) from None


def show(name: str, output: Path, report: dict) -> None:
    cut = f" ({report['shortened']:,} without turns at an end)" if report["shortened"] else ""
    lost = sum(entry["rows"] for entry in report["dropped"].values())
    print(f"{name}: {report['rows']:,} rows, {report['kept']:,} kept{cut}, {lost:,} dropped -> {output}", flush=True)
    for reason, entry in report["dropped"].items():
        print(f"  dropped {entry['rows']:,}: {reason}; first: {entry['first']}")
    if report["unused_fields"]:
        print("  not used: " + ", ".join(f"{key} ({n:,} rows)" for key, n in report["unused_fields"].items()))


# ----------------------------------------------------------------------------------------------------------------- main


@dataclass
class Settings:
    raw: str = field(default="data/raw", metadata={"help": "folder with a folder of files for each source"})
    out: str = field(default="data/reformatted", metadata={"help": "folder to write"})
    only: tuple[str, ...] = field(default=tuple(SOURCES), metadata={"help": "sources to reformat"})


def check_names(names: tuple[str, ...]) -> None:
    for name in names:
        if name not in SOURCES:
            near = difflib.get_close_matches(name, SOURCES, n=1, cutoff=0)[0]
            raise ValueError(f"--only has {name!r}, expected some of {', '.join(SOURCES)}: the nearest one is {near}")
    if not names:
        raise ValueError(f"--only is empty, expected some of {', '.join(SOURCES)}: name a source")


def main() -> None:
    settings = runtime.cli(Settings)
    check_names(settings.only)
    raw = Path(settings.raw)
    inputs = {name: files_of(name, raw) for name in settings.only}  # all are checked before one is written
    for name, files in inputs.items():
        output = Path(settings.out) / f"{name}.jsonl"
        made_from = {"source": name, "program": PROGRAM, "inputs": [stream.stamp(path) for path in files]}
        if stream.is_built(output, made_from):
            print(f"{name}: {output} is there already, made from the same files: nothing to do")
            continue
        print(f"{name}: {SOURCES[name].home}; licence: {SOURCES[name].licence}", flush=True)
        report = stream.build(output, made_from, lambda path, name=name, files=files: convert(name, files, path))
        show(name, output, report)


if __name__ == "__main__":
    runtime.run_main(main)
