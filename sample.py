"""Let a model speak, dense or routed: one prompt, a file of prompts, or a chat.

    python sample.py --model=DIR --routers=FILE --budget=0.6 --prompt="Name three rivers." --show_route --compare
    python sample.py --model=DIR --prompts=FILE.txt     a prompt on each line, or rows of any form; in batches
    python sample.py --model=DIR --routers=FILE         a chat: each turn is read, and routed, anew; Ctrl-C stops an
                                                        answer, and ends the chat where a question would stand
    echo "Name three rivers." | python sample.py ...    the same from a pipe, a turn on each line

Answers are greedy without --temperature. A line of figures follows each: tokens, tokens per second, share of the routed
units that were skipped, bytes of keys and values. --show_route colours each token of the answer by the share of routed
units that it ran (a decision for the whole sequence: all alike); where colours do not belong (a pipe, NO_COLOR, a dumb
terminal) these shares stand below. An answer's last token is never read again, so it has none.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

import runtime
from data.records import read_records, to_messages
from model import Sampling, Step, Transformer, load_routers, stream
from recipe.base import load_base
from recipe.hold import hold
from runtime import setting
from tokenizer import Tokenizer, encode_chat, load_tokenizer

COLOURS = (33, 37, 71, 136, 166, 160)  # of a 256-colour terminal, for shares from 0 to 1: blue, green, ochre, red


@dataclass
class SampleConfig:
    """Settings of sample.py."""

    model: str = field(metadata={"help": "checkpoint folder"})
    prompt: str | None = setting(None, "what is asked; none: --prompts, or a chat")
    prompts: str | None = setting(None, "file of prompts: .txt, one on each line, or rows in a form of train.py's")
    routers: str | None = setting(None, "router file; none: the dense model")
    budget: float | None = setting(None, "capacity from 0 to 1; none: the router file's own")
    hold_budget: bool = setting(False, "token routers hold --budget within each sequence, on any source")
    budget_per: Literal["workload", "sequence"] = setting(
        "workload", "workload: sequences run --budget on average; sequence: each of them as much of it as fits"
    )
    adapter: str | None = setting(None, "LoRA adapter folder, of train.py or peft, on which the model stands")
    compare: bool = setting(False, "let the dense model answer too")
    show_route: bool = setting(False, "show what share of the routed units each token ran")
    system: str | None = setting(None, "a system message")
    chat: str | None = setting(None, "chat form in place of the model's own")
    raw: bool = setting(False, "continue the text as it stands, without any chat form")
    max_new_tokens: int = setting(256, "tokens of an answer, at most")
    temperature: float = setting(0.0, "0: the likeliest token")
    top_k: int | None = setting(None, "draw from the k likeliest tokens")
    top_p: float | None = setting(None, "draw from the fewest tokens that hold this share of the probability")
    seed: int = setting(0, "of the draws")
    batch: int = setting(8, "prompts of a file that are answered together")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N")
    dtype: str = setting("auto", "auto, float32, bfloat16, float16")
    base_dtype: Literal["int8"] | None = setting(None, "int8: weights rounded to a byte each; none: in dtype")
    threads: int | None = setting(None, "on the CPU; none: all cores")

    def __post_init__(self):
        if self.prompt is not None and self.prompts is not None:
            raise ValueError("--prompt and --prompts were both given; expected one of them: leave one away")
        if self.raw and (self.system or self.chat):
            raise ValueError("--raw continues a text as it stands; expected neither --system nor --chat: leave it away")
        about = self.compare or self.show_route or self.budget is not None or self.hold_budget
        if self.routers is None and (about or self.budget_per == "sequence"):
            raise ValueError("--compare, --show_route, --budget, --budget_per and --hold_budget are about routers; "
                             "give --routers=FILE as well")
        for name in ("max_new_tokens", "batch", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; expected 1 or more")


# -----------------------------------------------------------------------------
# What one answer took


class Text:
    """The text of tokens as they come; bytes of a character that is not whole yet wait for the rest."""

    def __init__(self, tok: Tokenizer):
        self.tok, self.ids, self.shown = tok, [], ""

    def add(self, token: int | None) -> str:
        """What a token adds; None: the end, so that nothing waits any longer."""
        self.ids += [] if token is None else [token]
        text = self.tok.decode(self.ids, skip_special=True)
        if text.endswith("\ufffd") and token is not None:
            return ""
        new, self.shown = text[len(self.shown) :], text
        return new


class Answers:
    """Answers to prompts, and what they cost."""

    def __init__(self, model: Transformer, prompts: list[list[int]]):
        self.weights = None if model.routing is None else model.place_weights().float()
        self.prompts, self.tokens = prompts, [[] for _ in prompts]
        self.shares = [[] for _ in prompts]  # of routed units that ran, by token of the answer
        self.ran, self.units = [0.0] * len(prompts), [0] * len(prompts)  # weighted by what a place counts; decisions
        self.kv_bytes = [0] * len(prompts)
        self.begun, self.read, self.ended = time.perf_counter(), 0.0, 0.0

    def add(self, step: Step) -> None:
        """Count a step: gates (R,n) of sequences, decided once, or (R,n,T) of tokens; pads are 0."""
        first, self.ended = not self.read, time.perf_counter()
        self.read = self.read or self.ended
        for row, token, used in zip(step.rows, step.tokens, step.cache.row_bytes()):
            self.tokens[row].append(token)
            self.kv_bytes[row] = used
        if step.gates is None:
            return
        ran = torch.tensordot(self.weights.to(step.gates.device), step.gates.float(), 1).cpu()  # (n) or (n,T)
        for row, share in zip(step.rows, ran.tolist() if ran.dim() == 1 else ran.sum(1).tolist()):
            if first or ran.dim() == 2:
                self.ran[row] += share
                self.units[row] += 1 if ran.dim() == 1 or not first else len(self.prompts[row])
            self.shares[row] += [] if first else [share]

    def figures(self, row: int) -> str:
        """One row's figures in words. Speed is that of the whole batch."""
        n, made = len(self.tokens[row]), sum(map(len, self.tokens))
        seconds = self.ended - self.read
        speed = (made - len(self.tokens)) / seconds if made > len(self.tokens) else 0.0
        parts = [f"{len(self.prompts[row]):,} + {n:,} tokens", f"{speed:,.1f} tokens/s"]
        if self.units[row]:
            parts.append(f"{1 - self.ran[row] / self.units[row]:.1%} of routed units skipped")
        return " | ".join([*parts, f"KV {self.kv_bytes[row] / 1e6:.2f} MB"])


class Screen:
    """Where answers are written: a terminal in colours, or a plain file."""

    def __init__(self, show_route: bool):
        self.show_route = show_route
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self.colours = show_route and sys.stdout.isatty() and not plain

    def write(self, text: str, share: float | None = None) -> None:
        if self.colours and share is not None and text:
            colour = COLOURS[min(int(share * len(COLOURS)), len(COLOURS) - 1)]
            text = f"\x1b[38;5;{colour}m{text}\x1b[0m"
        sys.stdout.write(text)
        sys.stdout.flush()

    def legend(self) -> None:
        if self.colours:
            for number, colour in enumerate(COLOURS):
                self.write(f"\x1b[38;5;{colour}m{number / len(COLOURS):.2f}\x1b[0m ")
            self.write("and more of the routed units ran\n")

    def shares(self, tok: Tokenizer, answers: Answers, row: int) -> None:
        """Where there are no colours: the shares of one answer's tokens, in lines of eight."""
        tokens = zip(answers.tokens[row], answers.shares[row])
        pairs = [f"{tok.decode([token])!r} {share:.2f}" for token, share in tokens]
        for a in range(0, len(pairs), 8):
            self.write("  " + "  ".join(pairs[a : a + 8]) + "\n")


# -----------------------------------------------------------------------------
# Answering


@dataclass
class Speaker:
    """A model with its settings, ready to answer."""

    cfg: SampleConfig
    model: Transformer
    tok: Tokenizer
    screen: Screen

    def encode(self, messages: list[dict] | str) -> list[int]:
        """Tokens of a conversation up to where the answer begins, or of a text."""
        if isinstance(messages, str):
            return self.tok.encode(messages, bos=self.tok.adds_bos)
        return encode_chat(self.tok, messages, form=self.cfg.chat, generate=True)[0]

    def asked(self, text: str) -> list[dict] | str:
        """One question as a conversation, or as the text that it is."""
        if self.cfg.raw:
            return text
        system = [{"role": "system", "content": self.cfg.system}] if self.cfg.system else []
        return [*system, {"role": "user", "content": text}]

    def steps(self, answers: Answers, route: str | None) -> Iterator[Step]:
        """Answer the prompts, counting each step."""
        cfg = self.cfg
        sampling = Sampling(cfg.temperature, cfg.top_k, cfg.top_p, cfg.seed)
        how = {"stop_tokens": self.tok.stop_ids, "sampling": sampling, "route": route}
        for step in stream(self.model, answers.prompts, cfg.max_new_tokens, **how):
            answers.add(step)
            yield step

    def say(self, messages: list[dict] | str, route: str | None = None) -> tuple[str, bool]:
        """Answer one conversation and print the answer as it comes. Returns it, and whether Ctrl-C cut it off."""
        answers, text, whole = Answers(self.model, [self.encode(messages)]), Text(self.tok), True
        waiting: list[int] = []  # a token whose route is not known yet
        try:
            for step in self.steps(answers, route):
                if waiting:
                    self.screen.write(text.add(waiting.pop()), answers.shares[0][-1] if answers.shares[0] else None)
                waiting += step.tokens
                if not self.screen.colours:
                    self.screen.write(text.add(waiting.pop()))
        except KeyboardInterrupt:
            whole = False
        self.screen.write("".join(map(text.add, [*waiting, None])) + "\n")
        self.close(answers, 0, route)
        return text.shown, not whole

    def close(self, answers: Answers, row: int, route: str | None) -> None:
        """What stands below an answer."""
        if self.screen.show_route and not self.screen.colours and route != "off":
            self.screen.shares(self.tok, answers, row)
        self.screen.write(f"[{'dense: ' if route == 'off' else ''}{answers.figures(row)}]\n")

    def answer(self, messages: list[dict] | str) -> str:
        """The streamed answer to one conversation, and the dense model's beside it where that is asked for."""
        text, interrupted = self.say(messages)
        if self.cfg.compare and not interrupted:
            interrupted = self.say(messages, "off")[1]
        if interrupted:
            raise Interrupted(text)
        return text

    def answer_all(self, conversations: list[list[dict] | str]) -> None:
        """Answers to many conversations, in batches, printed as batches end."""
        routes = [None, "off"] if self.cfg.compare else [None]
        for a in range(0, len(conversations), self.cfg.batch):
            prompts = [self.encode(messages) for messages in conversations[a : a + self.cfg.batch]]
            both = [Answers(self.model, prompts) for _ in routes]
            for answers, route in zip(both, routes):
                deque(self.steps(answers, route), maxlen=0)
            for row in range(len(prompts)):
                self.screen.write(f"# {a + row + 1} of {len(conversations)}\n")
                for answers, route in zip(both, routes):
                    self.print_answer(answers, row)
                    self.close(answers, row, route)

    def print_answer(self, answers: Answers, row: int) -> None:
        text, shares = Text(self.tok), answers.shares[row]
        for number, token in enumerate([*answers.tokens[row], None]):
            self.screen.write(text.add(token), shares[number] if number < len(shares) else None)
        self.screen.write("\n")

    def chat(self) -> None:
        """Turns from a terminal or a pipe, until it ends. A turn that does not fit is told and left out."""
        messages = self.asked("")[:-1]
        for line in lines():
            try:
                text = self.answer([*messages, {"role": "user", "content": line}])
            except Interrupted as cut:
                text = cut.text
            except ValueError as error:
                print(f"error: {error}; that turn is left out", file=sys.stderr, flush=True)
                continue
            messages += [{"role": "user", "content": line}, {"role": "assistant", "content": text}]


class Interrupted(Exception):
    """Ctrl-C cut an answer off."""

    def __init__(self, text: str):
        self.text = text


def lines() -> Iterator[str]:
    """What stands on standard input, a line at a time; a terminal is asked."""
    asks = sys.stdin.isatty()
    while True:
        try:
            line = input("> ") if asks else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line and not asks:
            return
        if line.strip():
            yield line.rstrip("\n")


def conversations_of(path: str, speaker: Speaker) -> list[list[dict] | str]:
    """Prompts of a file: the lines of a .txt, or rows without their last answer."""
    if Path(path).suffix.lower() == ".txt":
        found = [speaker.asked(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        found = [without_answer(to_messages(row, place)) for place, row in read_records(path)]
    if not found:
        raise ValueError(f"{path} holds no prompt; expected one on each line: write some")
    return found


def without_answer(row: tuple[list[dict], list | None] | str) -> list[dict] | str:
    if isinstance(row, str):
        return row
    turns = row[0]
    last = max(number for number, turn in enumerate(turns) if turn["role"] == "assistant")
    return turns[:last]


def main() -> None:
    cfg = runtime.cli(SampleConfig)
    rt = runtime.setup(cfg.device, cfg.dtype, cfg.seed)
    if rt.device.type == "cpu":
        torch.set_num_threads(cfg.threads or len(os.sched_getaffinity(0)))
    model = load_base(cfg.model, rt, base_dtype=cfg.base_dtype, adapter=cfg.adapter)
    if cfg.routers is not None:
        meta = load_routers(model, cfg.routers, cfg.budget, cfg.budget_per)
        if cfg.hold_budget:
            hold(model, meta, cfg.budget)
    speaker = Speaker(cfg, model, load_tokenizer(cfg.model), Screen(cfg.show_route))
    speaker.screen.legend()
    if cfg.prompts is not None:
        speaker.answer_all(conversations_of(cfg.prompts, speaker))
    elif cfg.prompt is None and not cfg.raw:
        speaker.chat()
    else:
        text = sys.stdin.read() if cfg.prompt is None else cfg.prompt
        try:
            speaker.answer(speaker.asked(text))
        except Interrupted:
            raise KeyboardInterrupt from None


if __name__ == "__main__":
    runtime.run_main(main)
