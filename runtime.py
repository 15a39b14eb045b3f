"""What every script needs once: device, dtype, ranks, seeds, command line, progress, user errors, files, peaks.

    @dataclass
    class Config:                                     # one flat dataclass is the whole interface of a script
        lr: float = field(default=1e-3, metadata={"help": "learning rate"})

    def main() -> None:
        config = runtime.cli(Config)                  # --lr=0.1 or --lr 0.1; --help lists all
        rt = runtime.setup(device="auto", dtype="auto", seed=1)

    if __name__ == "__main__":
        runtime.run_main(main)                        # a user's error: one line and status 2, no traceback

Depends on torch and the standard library only, and knows nothing of the model.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

PROJECT = Path(__file__).resolve().parent
BF16_CAPABILITIES = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")  # as torch.cpu.get_capabilities names them
RANK_TIMEOUT = 30.0  # minutes, longest wait for another rank; one rank may measure alone for minutes
SIGNAL_ECHO = 2.0  # seconds; torchrun repeats to its workers what the terminal sent to all
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# (pattern in the lower-case device name, dense 16-bit tensor FLOP/s, memory bytes/s); more specific patterns first.
# NVIDIA's pages give 16-bit FLOP/s with sparsity for some: half of that is dense.
PEAKS = (
    ("h200", 989e12, 4.8e12),  # https://www.nvidia.com/en-us/data-center/h200/ (1,979 TFLOPS with sparsity)
    # https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet
    ("h100 pcie", 756e12, 2.0e12),
    ("h100 nvl", 835e12, 3.9e12),  # https://www.nvidia.com/en-us/data-center/h100/ (1,671 with sparsity)
    ("h100", 989e12, 3.35e12),  # https://www.nvidia.com/en-us/data-center/h100/ (SXM; 1,979 with sparsity)
    ("a100-sxm4-40gb", 312e12, 1.555e12),  # https://www.nvidia.com/en-us/data-center/a100/
    ("a100-pcie-40gb", 312e12, 1.555e12),  # https://www.nvidia.com/en-us/data-center/a100/
    ("a100 80gb pcie", 312e12, 1.935e12),  # https://www.nvidia.com/en-us/data-center/a100/
    ("a100-sxm4-80gb", 312e12, 2.039e12),  # https://www.nvidia.com/en-us/data-center/a100/
    ("l40s", 362e12, 864e9),  # https://www.nvidia.com/en-us/data-center/l40s/ (733 with sparsity)
    ("nvidia l4", 121e12, 300e9),  # https://www.nvidia.com/en-us/data-center/l4/ (242 with sparsity)
    ("nvidia a10", 125e12, 600e9),  # https://www.nvidia.com/en-us/data-center/products/a10-gpu/
    # https://www.nvidia.com/en-us/design-visualization/rtx-a6000/ (309.7 with sparsity)
    ("rtx a6000", 154.8e12, 768e9),
    # https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
    ("rtx 4090", 165.2e12, 1008e9),
    # https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf
    ("rtx 3090", 71e12, 936e9),
    ("v100", 125e12, 900e9),  # https://www.nvidia.com/en-us/data-center/v100/ (SXM2, float16)
    ("tesla t4", 65e12, 320e9),  # https://www.nvidia.com/en-us/data-center/tesla-t4/ (float16)
    ("mi300x", 1307e12, 5.3e12),  # https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html
)


# -----------------------------------------------------------------------------
# Device and ranks


@dataclass(frozen=True)
class Runtime:
    """Where this process runs: its place among the ranks, its device and its floating-point type."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    dtype: torch.dtype
    is_master: bool


ALONE = Runtime(0, 1, 0, torch.device("cpu"), torch.float32, True)  # a process without others


def setup(device: str = "auto", dtype: str = "auto", seed: int = 1337, timeout: float = RANK_TIMEOUT) -> Runtime:
    """Choose device and dtype, seed torch, and join the process group (nccl on CUDA, else gloo) under torchrun.

    auto: CUDA where there is one, else CPU; bfloat16 where the device has instructions for its matrix products (a GPU,
    or a CPU with AMX, AVX-512 BF16 or Arm BF16, by capability, never by a timing), else float32. TF32 stays off:
    float32 means float32. A rank that hears nothing from another for `timeout` minutes gives up.
    Raises ValueError for a device that is not there and for an unknown dtype.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = _device(device, local_rank)
    if dtype == "auto":
        kind = torch.bfloat16 if _multiplies_bf16(chosen) else torch.float32
    elif dtype in DTYPES:
        kind = DTYPES[dtype]
    else:
        raise ValueError(f"dtype is {dtype!r}, expected auto or one of {', '.join(DTYPES)}: pass one with --dtype")
    torch.manual_seed(seed)
    on_gpu = chosen.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(chosen)
        # it builds a plan for each new shape (some 35 ms on an H200), and with every route, or token, shapes change
        torch.backends.cuda.enable_cudnn_sdp(False)
    if "RANK" in os.environ and not dist.is_initialized():
        with together():
            wait = timedelta(minutes=timeout)
            dist.init_process_group("nccl" if on_gpu else "gloo", device_id=chosen if on_gpu else None, timeout=wait,
                                    **_meeting(wait))
    return Runtime(rank, world_size, local_rank, chosen, kind, rank == 0)


def _meeting(wait: timedelta) -> dict:
    """Where the ranks meet: after a restart by torchrun under a name of its own, since the store of one machine's
    launcher still holds the addresses of those that died."""
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return {}
    store, rank, world_size = next(dist.rendezvous("env://", timeout=wait))
    return {"store": dist.PrefixStore(f"restart {restarts}", store), "rank": rank, "world_size": world_size}


def _multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for matrix products in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(capabilities.get(name) for name in BF16_CAPABILITIES)


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}, expected auto, cpu, cuda or cuda:N: pass one with --device") from None
    if device.type != "cuda":
        return device
    index, count = local_rank if device.index is None else device.index, torch.cuda.device_count()
    if index >= count:
        raise ValueError(f"device cuda:{index} was asked for, but torch sees {count} CUDA devices: pass --device=cpu")
    return torch.device("cuda", index)


def cleanup() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def print0(*args) -> None:
    """Print on the master rank only, at once."""
    if _is_master():
        Progress.wipe()
        print(*args, flush=True)


def _is_master() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has done what was asked of it (a CPU always has): before and after every timing."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device | str) -> int:
    """Most bytes in use so far: of torch's allocator on CUDA, of the whole process on CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts KiB, on macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name(device: torch.device | str) -> str:
    """The device in words: the GPU's product name, or `cpu`."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else torch.device(device).type


def peak_flops(name: str) -> float | None:
    """Dense 16-bit FLOP/s of a device by its name; None when unknown, shown as n/a and never guessed."""
    return next((flops for pattern, flops, _ in PEAKS if pattern in name.lower()), None)


def peak_bandwidth(name: str) -> float | None:
    """Memory bytes/s of a device by its name; None when unknown."""
    return next((bandwidth for pattern, _, bandwidth in PEAKS if pattern in name.lower()), None)


# -----------------------------------------------------------------------------
# Seeds and the work of several ranks


def generator(*key) -> torch.Generator:
    """A random generator that depends on the key alone: no state to save, the same on every rank."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def permutation(n: int, *key) -> list[int]:
    """The numbers 0 to n - 1 in an order that depends on the key alone."""
    return torch.randperm(n, generator=generator(*key)).tolist()


def mine(groups: list, rt: Runtime) -> list[tuple[int, object]]:
    """This rank's share of the groups, numbered. No group depends on the number of ranks, only who works on it."""
    return list(enumerate(groups))[rt.rank::rt.world_size]


def sum_over_ranks(values: torch.Tensor, rt: Runtime) -> torch.Tensor:
    """The sum of every rank's tensor, on every rank; in place."""
    if rt.world_size > 1:
        with together():
            dist.all_reduce(values)
    return values


def collect(parts: list[tuple[int, object]], rt: Runtime) -> list:
    """Numbered parts of all ranks, in order of their numbers, on every rank."""
    if rt.world_size > 1:
        everyone = [None] * rt.world_size
        with together():
            dist.all_gather_object(everyone, parts)
        parts = [part for rank_parts in everyone for part in rank_parts]
    return [part for _, part in sorted(parts, key=lambda numbered: numbered[0])]


def wait_for_all(rt: Runtime) -> None:
    """Return when every rank has come here."""
    if rt.world_size > 1:
        with together():
            dist.barrier()


class RankError(RuntimeError):
    """Another rank stopped, or did not answer in time: the reason stands in its own output."""


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around every wait for other ranks: what gloo and nccl say of a lost or silent one becomes a RankError."""
    started = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        if "connection" in str(error).lower():
            happened = "lost the connection to another rank"
        elif "timed out" in str(error).lower() or "timeout" in str(error).lower():
            happened = f"has waited {time.monotonic() - started:,.0f} s for another rank"
        else:
            raise
        raise RankError(f"rank {os.environ['RANK']} {happened}: read what the other ranks printed, then run the same "
                        "command again") from error


# -----------------------------------------------------------------------------
# Signals that end a run


class Interrupted(BaseException):
    """A signal asked for the end, and what had to be saved is saved."""

    def __init__(self, number: int):
        super().__init__("interrupted, and saved: the same command goes on")
        self.number = number


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Note SIGINT and SIGTERM in the list instead of ending at once, and raise `Interrupted` behind the block.

    Each acts as ever when it comes again after SIGNAL_ECHO seconds; until then it is the same one, from the launcher.
    """
    came, before = [], {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    until = math.inf

    def note(number: int, frame) -> None:
        nonlocal until
        if time.monotonic() >= until:
            signal.signal(number, before[number])
            os.kill(os.getpid(), number)
        elif not came:
            came.append(number)
            until = time.monotonic() + SIGNAL_ECHO

    for number in before:
        signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise Interrupted(came[0])


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made, so that no second process works in it. Raises ValueError where one does."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{folder} is in use by another process; expected one at a time: wait for it, end it, "
                                 "or give another --out") from None
        yield
    finally:
        os.close(descriptor)  # and with it goes the lock


def spread_signal(came: list[int], rt: Runtime) -> bool:
    """Whether a signal came to any rank; it is then noted on every one, so that all end behind the same step."""
    asked = sum_over_ranks(torch.tensor(float(bool(came)), device=rt.device), rt).item() > 0
    if asked and not came:
        came.append(signal.SIGTERM)
    return asked


# -----------------------------------------------------------------------------
# Command line


class _Parser(argparse.ArgumentParser):
    """argparse with our --help and with a ValueError for every error."""

    def __init__(self, cls: type, about: str | None):
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS)
        self.cls, self.about = cls, about

    def format_help(self) -> str:
        return usage(self.cls, self.about) + "\n"

    def error(self, message: str):
        raise ValueError(f"{message.removeprefix('argument ')}; --help lists all settings")


def setting(default, text: str):
    """A field of a settings dataclass: its default, and what --help says of it."""
    return dataclasses.field(default=default, metadata={"help": text})


def cli(cls: type, argv: list[str] | None = None, about: str | None = None):
    """Build the flat dataclass `cls` from --name=value, --name value and, for a bool, --name; the last one counts.

    Values follow the annotations: bool, int, float, str, Literal, X | None ("none"), tuple[X, ...] and list[X] by
    comma. A field whose metadata says {"positional": True} also takes a bare argument, in the order of the fields; one
    without default must be given. A field that would be a Python keyword ends in an underscore, which its setting does
    not show: lambda_ is --lambda. --help prints `about` (None: the docstring of cls's module) and every setting with
    its default and metadata["help"].
    Raises ValueError for what it does not understand.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name.rstrip("_"): f for f in dataclasses.fields(cls) if f.init}
    kinds = {name: hints[f.name] for name, f in fields.items()}
    parser = _Parser(cls, about)
    for name, f in fields.items():
        parser.add_argument(f"--{name}", dest=f.name, type=_converter(kinds[name]))
    given, rest = parser.parse_known_args(_words(sys.argv[1:] if argv is None else argv, kinds))
    for word in rest:
        if word.startswith("--"):
            key = word[2:].partition("=")[0]
            near = difflib.get_close_matches(key.replace("-", "_"), fields, n=1, cutoff=0)
            raise ValueError(f"--{key} is not a setting: the nearest one is --{near[0]}; --help lists all")
    places = [name for name, f in fields.items() if f.metadata.get("positional") and f.name not in given]
    if len(rest) > len(places):
        raise ValueError(f"{rest[len(places)]!r} was found where a setting was expected: write it as --name=value; "
                         "--help lists all names")
    parser.parse_args([f"--{name}={word}" for name, word in zip(places, rest)], given)
    for name, f in fields.items():
        if f.name not in given and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            meaning = f.metadata.get("help", "give it")
            raise ValueError(f"--{name} is missing, and it has no default: {meaning}; --help lists all settings")
    return cls(**vars(given))


def _words(argv: list[str], kinds: dict[str, object]) -> list[str]:
    """Every setting as one word: alone, argparse takes -1e-2 for a setting, and in `--flag b` the b for a value."""
    words, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.partition("=")
        name = key[2:].replace("-", "_")
        if not word.startswith("--") or name not in kinds:
            words.append(word)
            continue
        if not equals and kinds[name] is bool:
            value = rest.pop(0) if rest[:1] in (["true"], ["false"]) else "true"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"{word} has no value, expected {_type_name(kinds[name])}: write {word}=value")
            value = rest.pop(0)
        words.append(f"--{name}={value}")
    return words


def usage(cls: type, about: str | None = None) -> str:
    """The text of --help: what a script is about, then one line per setting with type, default and meaning."""
    about = about or sys.modules[cls.__module__].__doc__ or cls.__doc__ or ""
    lines = [about.strip(), "", "Settings, as --name=value:"]
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        shown = "required" if default is dataclasses.MISSING else f"default {_show(default)}"
        name, meaning = f.name.rstrip("_"), f.metadata.get("help", "")
        lines.append(f"  --{name:<20} {meaning} ({_type_name(hints[f.name])}; {shown})")
    return "\n".join(lines)


def _show(value) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)


def _type_name(kind) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (tuple, list):
        return f"{_type_name(typing.get_args(kind)[0])} by comma"
    if _is_union(kind):
        return "|".join(_type_name(k) for k in typing.get_args(kind))
    return {type(None): "none", bool: "true|false"}.get(kind, kind.__name__)


def _is_union(kind) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _converter(kind) -> Callable[[str], object]:
    def convert(text: str):
        try:
            return _convert(text, kind)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} was found, expected {_type_name(kind)}") from None

    return convert


def _convert(text: str, kind):
    """Text to a value of the annotated type, or ValueError. A union takes the first member that fits, None first."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if _is_union(kind):
        if type(None) in arguments and text.lower() == "none":
            return None
        for member in arguments:
            with contextlib.suppress(ValueError):
                return _convert(text, member)
        raise ValueError
    if origin in (tuple, list):
        return origin(_convert(part.strip(), arguments[0]) for part in text.split(",") if part.strip())
    if kind is bool or origin is typing.Literal:
        known = {"true": True, "false": False} if kind is bool else {str(value): value for value in arguments}
        if text not in known:
            raise ValueError
        return known[text]
    if kind is type(None):
        raise ValueError
    return kind(text)


# -----------------------------------------------------------------------------
# Progress: one line on standard error about work that takes long


class Progress:
    """Tell on standard error how far a phase is and when it ends: `what | 120/1,000 | eta 0.4m | note`.

        with runtime.Progress("score", len(items)) as progress:   # or: for item in runtime.track(items, "score"):
            for item in items:
                progress.step(note=f"loss {loss:.3f}")

    Nothing shows before two seconds have passed. A terminal's line is redrawn in place, at most five times a second; a
    log gets a line at most every 20 seconds, and a last one. Of nested ones only the outermost shows; ranks above 0 are
    silent. total None: unknown. clock: seconds, for tests.
    """

    active: "Progress | None" = None  # the outermost one

    def __init__(self, what: str, total: int | None, note: str = "", clock: Callable[[], float] = time.monotonic):
        self.what, self.total, self.note, self.clock = what, total, note, clock
        self.begin, self.done = clock(), 0
        self.terminal, self.drawn = sys.stderr.isatty(), False  # drawn: a terminal shows our line
        self.last: float | None = None  # when a line was written

    def __enter__(self) -> "Progress":
        if Progress.active is None:
            Progress.active = self
        return self

    def step(self, n: int = 1, note: str = "") -> None:
        """Count n more as done. A note stays until the next one."""
        self.done += n
        self.note = note or self.note
        now = self.clock()
        if Progress.active is not self or not _is_master() or now - self.begin < 2.0 or self.done == self.total:
            return
        if self.last is None or now - self.last >= (0.2 if self.terminal else 20.0):
            self.last, self.drawn = now, self.terminal
            self._write(self._line(now - self.begin), end="" if self.terminal else "\n")

    def _line(self, seconds: float, ended: bool = False) -> str:
        parts = [self.what, f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"]
        if ended:
            parts.append(f"{seconds / 60:.1f}m")
        elif self.total and self.done:
            share = min(1.0, self.done / self.total)
            parts.append(f"eta {seconds * (1 - share) / share / 60:.1f}m")
            if Phases.active is not None:
                parts.append(Phases.active.eta(share))
        return " | ".join([*parts, self.note] if self.note else parts)

    def _write(self, text: str, end: str) -> None:
        if self.terminal:
            width = shutil.get_terminal_size().columns
            text = "\r\x1b[K" + text[:width - 1]  # a line that wraps could not be redrawn
        print(text, end=end, file=sys.stderr, flush=True)

    @classmethod
    def wipe(cls) -> None:
        """Take the line off the terminal before something else is printed there; a later step draws it again."""
        if cls.active is not None and cls.active.drawn:
            cls.active._write("", end="")
            cls.active.drawn = False

    def __exit__(self, kind, error, trace) -> None:
        if Progress.active is not self:
            return
        self.wipe()
        seconds = self.clock() - self.begin
        if kind is None and seconds >= 2.0 and _is_master():
            self._write(self._line(seconds, ended=True), end="\n")
        Progress.active = None


def track(items: Iterable, what: str, total: int | None = None,
          clock: Callable[[], float] = time.monotonic) -> Iterator:
    """The items one by one, with a `Progress` line. total: their number where they have no len()."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    with Progress(what, total, clock=clock) as progress:
        for item in items:
            yield item
            progress.step()


class Phases:
    """The phases of a run, and when it ends.

        phases = runtime.Phases({"orders": 3.0, "fit": 1.0})  # expected work, in any one unit
        with phases("orders"):                                # phase 1/2: orders
        with phases("fit"):                                   # phase 2/2: fit (run eta 0.5m)

    The rate is work done over the time since the start; the running phase counts in part, by its `Progress`. A resumed
    run may leave phases out, and begin one where it stopped: phases("fit", begun=0.4).
    """

    active: "Phases | None" = None

    def __init__(self, work: dict[str, float], clock: Callable[[], float] = time.monotonic):
        self.work, self.clock = dict(work), clock
        self.begin, self.done = clock(), 0.0
        self.name, self.begun = "", 0.0  # of the running phase; begun: share done by an earlier run

    @contextlib.contextmanager
    def __call__(self, name: str, begun: float = 0.0) -> Iterator[None]:
        self.name, self.begun, Phases.active = name, begun, self
        number = list(self.work).index(name) + 1
        if _is_master():
            Progress.wipe()
            eta = f" ({self.eta(begun)})" if self.done > 0 else ""
            print(f"phase {number}/{len(self.work)}: {name}{eta}", file=sys.stderr, flush=True)
        try:
            yield
            self.done += (1 - begun) * self.work[name]
        finally:
            Phases.active = None

    def eta(self, share: float = 0.0) -> str:
        """When the run ends, with this share of the running phase done; n/a before anything is."""
        names = list(self.work)
        current, later = self.work[self.name], names[names.index(self.name) + 1:]
        done = self.done + (share - self.begun) * current
        if done <= 0:
            return "run eta n/a"
        left = (1 - share) * current + sum(self.work[name] for name in later)
        return f"run eta {(self.clock() - self.begin) * left / done / 60:.1f}m"


# -----------------------------------------------------------------------------
# Errors


REMEDIES = {  # what the system says of a path, in words and with what to do
    errno.ENOENT: "was not found: check the path",
    errno.EACCES: "may not be read or written: change its permissions, or give another path",
    errno.EPERM: "may not be read or written: change its permissions, or give another path",
    errno.EISDIR: "is a folder, expected a file: give the path of a file",
    errno.ENOTDIR: "lies below a file, expected below a folder: check the path",
    errno.EEXIST: "is a file, expected a folder: remove it, or give another path",
    errno.EROFS: "lies on a file system that cannot be written: give another path",
    errno.ENAMETOOLONG: "is too long for a path: check it",
}
REQUIREMENTS = ("jinja2", "numpy", "safetensors", "sentencepiece", "tiktoken", "torch")
PATH_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def run_main(fn: Callable[[], object]) -> None:
    """Run a script's main and exit: 0 done, 2 the user's input is wrong (one line on standard error), 1 anything else.

    The user's errors: ValueError and FileNotFoundError raised by a file of this project, what the system says of a path
    or a full disk, text that is not UTF-8, a package that is not installed. Another rank's failure is one line and 1.
    Anything else, a library's ValueError too, is our bug and keeps its traceback. A closed pipe (| head) ends quietly.
    """
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be text
        fn()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes at exit
        sys.exit(141)  # as a shell shows SIGPIPE
    except (KeyboardInterrupt, Interrupted) as error:
        Progress.wipe()
        print(str(error) or "interrupted", file=sys.stderr, flush=True)
        sys.exit(128 + getattr(error, "number", signal.SIGINT))  # as a shell shows an end by a signal
    except Exception as error:
        Progress.wipe()
        sentence = _sentence(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        sys.exit(1 if isinstance(error, RankError) else 2)


def _sentence(error: Exception) -> str | None:
    """One line for an error that somebody other than us must mend; None for our bug."""
    if isinstance(error, RankError):
        return str(error)
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] in REQUIREMENTS:
        return f"{error.name} cannot be imported ({error}): pip install -r requirements.txt"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        place = f"{error.filename} was not written, " if error.filename else ""
        return f"{place}disk full ({error.strerror}): free space and run the same command again"
    if isinstance(error, OSError) and error.filename is not None and error.errno is not None:
        path = error.filename2 or error.filename
        return f"{path} {REMEDIES.get(error.errno, f'cannot be used ({error.strerror}): check the path')}"
    if isinstance(error, PATH_ERRORS):
        return str(error)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    last = Path(frames[-1].f_code.co_filename)
    if isinstance(error, UnicodeDecodeError) and "codecs" in last.name:  # out of reading a text file
        return f"{_file_read(frames)} is not UTF-8 text ({error.reason} at byte {error.start}): convert or replace it"
    ours = PROJECT in last.resolve().parents and "site-packages" not in last.parts
    return str(error) if ours and isinstance(error, ValueError) else None


def _file_read(frames: list[types.FrameType]) -> str:
    """The text file that these frames were reading: the error itself does not know it."""
    for frame in reversed(frames):
        for value in frame.f_locals.values():
            if isinstance(value, io.TextIOWrapper):
                return str(value.name)
            if isinstance(value, Path):
                return str(value)
    return "a file"


# -----------------------------------------------------------------------------
# Files


def free_bytes(folder: str | Path) -> int:
    """Of the disk on which a folder lies, or will lie."""
    folder = Path(folder)
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def write_atomic(path: str | Path, writer: Callable[[Path], None]) -> None:
    """Let `writer` fill a temporary file beside `path`, force it to disk, rename it: a reader sees the old or the new.

    Errors of the system name `path`, not the temporary file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        writer(temporary)
        _fsync(temporary)
        os.replace(temporary, path)
    except Exception as error:
        number = getattr(error, "errno", None)
        hidden = re.search(r"\(os error (\d+)\)", str(error))  # safetensors tells the number in its text alone
        if hidden is not None:
            number = int(hidden[1])
        if number is None or getattr(error, "filename", None) not in (None, str(temporary)):
            raise  # no error of the system, or one about another file that the writer used
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    _fsync(path.parent)  # the rename itself lives in the directory


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, obj) -> None:
    """Write one JSON document atomically."""
    write_atomic(path, lambda p: p.write_text(json.dumps(obj, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"))


def read_json(path: str | Path):
    """Read one JSON document; a byte order mark is skipped.

    Raises FileNotFoundError when it is missing, ValueError with line and column when it is not JSON.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a JSON file: give the path of a file")
    if not path.is_file():
        raise FileNotFoundError(f"{path} was not found, expected a JSON file: check the path")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        reason = f"line {error.lineno}, column {error.colno}: {error.msg}"
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is not UTF-8"
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:  # an integer of more than 4,300 digits
        reason = str(error)
    raise ValueError(f"{path} is not JSON ({reason}): mend or replace the file")
