"""What every script needs once: device, dtype, ranks, command line, user errors, atomic files, hardware peaks.

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

import dataclasses
import difflib
import json
import os
import resource
import sys
import traceback
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

PROJECT = Path(__file__).resolve().parent
BF16_CAPABILITIES = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")  # as torch.cpu.get_capabilities names them
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# (pattern in the lower-case device name, dense 16-bit tensor FLOP/s, memory bytes/s); more specific patterns first.
PEAKS = (
    ("h200", 989e12, 4.8e12),  # https://www.nvidia.com/en-us/data-center/h200/ (1,979 TFLOPS with sparsity)
    ("h100 pcie", 756e12, 2.0e12),  # https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet
    ("h100 nvl", 835e12, 3.9e12),  # https://www.nvidia.com/en-us/data-center/h100/ (1,671 with sparsity)
    ("h100", 989e12, 3.35e12),  # https://www.nvidia.com/en-us/data-center/h100/ (SXM; 1,979 with sparsity)
    ("a100-sxm4-40gb", 312e12, 1.555e12),  # https://www.nvidia.com/en-us/data-center/a100/
    ("a100-pcie-40gb", 312e12, 1.555e12),  # https://www.nvidia.com/en-us/data-center/a100/
    ("a100 80gb pcie", 312e12, 1.935e12),  # https://www.nvidia.com/en-us/data-center/a100/
    ("a100-sxm4-80gb", 312e12, 2.039e12),  # https://www.nvidia.com/en-us/data-center/a100/
    ("l40s", 362e12, 864e9),  # https://www.nvidia.com/en-us/data-center/l40s/ (733 with sparsity)
    ("nvidia l4", 121e12, 300e9),  # https://www.nvidia.com/en-us/data-center/l4/ (242 with sparsity)
    ("nvidia a10", 125e12, 600e9),  # https://www.nvidia.com/en-us/data-center/products/a10-gpu/
    ("rtx a6000", 154.8e12, 768e9),  # https://www.nvidia.com/en-us/design-visualization/rtx-a6000/ (309.7 with sparsity)
    ("rtx 4090", 165.2e12, 1008e9),  # https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
    ("rtx 3090", 71e12, 936e9),  # https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf
    ("v100", 125e12, 900e9),  # https://www.nvidia.com/en-us/data-center/v100/ (SXM2, float16)
    ("tesla t4", 65e12, 320e9),  # https://www.nvidia.com/en-us/data-center/tesla-t4/ (float16)
    ("mi300x", 1307e12, 5.3e12),  # https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html
)


# ---------------------------------------------------------------------------------------------------- device and ranks


@dataclass(frozen=True)
class Runtime:
    """Where this process runs: its place among the ranks, its device and its floating-point type."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    dtype: torch.dtype
    is_master: bool


def setup(device: str = "auto", dtype: str = "auto", seed: int = 1337) -> Runtime:
    """Choose device and dtype, seed torch, and join the process group when started by torchrun (nccl on CUDA, gloo else).

    auto: CUDA where there is one, else CPU; bfloat16 where the device has instructions for its matrix products (a GPU, or a
    CPU with AMX, AVX-512 BF16 or Arm BF16, by capability, never by a timing), else float32. TF32 stays off: float32 means float32.
    Raises ValueError for a device that is not there and for an unknown dtype.
    """
    rank, world_size, local_rank = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    chosen = _device(device, local_rank)
    if dtype == "auto":
        if chosen.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            capabilities = torch.cpu.get_capabilities() if chosen.type == "cpu" else {}
            native = any(capabilities.get(name) for name in BF16_CAPABILITIES)
        kind = torch.bfloat16 if native else torch.float32
    elif dtype in DTYPES:
        kind = DTYPES[dtype]
    else:
        raise ValueError(f"dtype is {dtype!r}, expected auto or one of {', '.join(DTYPES)}: pass one of these with --dtype")
    torch.manual_seed(seed)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if "RANK" in os.environ and not dist.is_initialized():
        on_gpu = chosen.type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=chosen if on_gpu else None)
    return Runtime(rank, world_size, local_rank, chosen, kind, rank == 0)


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}, expected auto, cpu, cuda or cuda:N: pass one of these with --device") from None
    if device.type == "cuda":
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ValueError(f"device cuda:{index} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices: pass --device=cpu")
        return torch.device("cuda", index)
    return device


def cleanup() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def print0(*args) -> None:
    """Print on the master rank only, at once."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*args, flush=True)


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has done what was asked of it (a CPU always has): before and after every timing."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device | str) -> int:
    """Most bytes in use so far: of torch's allocator on CUDA, of the whole process on CPU (getrusage: KiB, on macOS bytes)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_name(device: torch.device | str) -> str:
    """The device in words: the GPU's product name, or `cpu`."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else torch.device(device).type


def peak_flops(name: str) -> float | None:
    """Dense 16-bit FLOP/s of a device by its name; None when unknown, shown as n/a and never guessed."""
    return next((flops for pattern, flops, _ in PEAKS if pattern in name.lower()), None)


def peak_bandwidth(name: str) -> float | None:
    """Memory bytes/s of a device by its name; None when unknown."""
    return next((bandwidth for pattern, _, bandwidth in PEAKS if pattern in name.lower()), None)


# --------------------------------------------------------------------------------------------------------- command line


def cli(cls: type, argv: list[str] | None = None):
    """Build the flat dataclass `cls` from `--name=value`, `--name value` and, for a bool, `--name`; the last one given counts.

    Values follow the annotations: bool, int, float, str, Literal, X | None ("none"), tuple[X, ...] and list[X] by comma. A field
    whose metadata says {"positional": True} also takes a bare argument, in the order of the fields; one without default must be given.
    A field that would be a Python keyword ends in an underscore, which its setting does not show: lambda_ is --lambda.
    --help prints every setting with its default and metadata["help"]. Raises ValueError for what it does not understand.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    names = {name.rstrip("_"): name for name in fields}
    positional = [f.name for f in fields.values() if f.metadata.get("positional")]
    given = {}
    while argv:
        word = argv.pop(0)
        if word in ("--help", "-h"):
            print(usage(cls))
            raise SystemExit(0)
        if not word.startswith("--"):
            open_places = [n for n in positional if n not in given]
            if not open_places:
                raise ValueError(f"{word!r} was found where a setting was expected: write it as --name=value; --help lists all names")
            given[open_places[0]] = _parse(open_places[0], word, hints[open_places[0]])
            continue
        key, has_value, text = word[2:].partition("=")
        if key.replace("-", "_") not in names:
            near = difflib.get_close_matches(key.replace("-", "_"), names, n=1, cutoff=0)
            raise ValueError(f"--{key} is not a setting: the nearest one is --{near[0]}; --help lists all")
        name = names[key.replace("-", "_")]
        if not has_value:
            if hints[name] is bool and not (argv and argv[0] in ("true", "false")):
                text = "true"
            elif not argv or argv[0].startswith("--"):
                raise ValueError(f"--{key} has no value, expected {_type_name(hints[name])}: write --{key}=value")
            else:
                text = argv.pop(0)
        given[name] = _parse(name, text, hints[name])
    for f in fields.values():
        if f.name not in given and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"--{f.name} is missing, and it has no default: {f.metadata.get('help', 'give it')}; --help lists all settings")
    return cls(**given)


def usage(cls: type) -> str:
    """The text of --help: the script's docstring, then one line per setting with type, default and meaning."""
    lines = [(sys.modules[cls.__module__].__doc__ or cls.__doc__ or "").strip(), "", "Settings, as --name=value:"]
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        shown = "required" if default is dataclasses.MISSING else f"default {_show(default)}"
        lines.append(f"  --{f.name.rstrip('_'):<20} {f.metadata.get('help', '')} ({_type_name(hints[f.name])}; {shown})")
    return "\n".join(lines)


def _show(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else "none" if value is None else str(value)


def _type_name(kind) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (tuple, list):
        return f"{_type_name(typing.get_args(kind)[0])} by comma"
    if _is_union(kind):
        return "|".join(_type_name(k) for k in typing.get_args(kind))
    return "none" if kind is type(None) else "true|false" if kind is bool else kind.__name__


def _is_union(kind) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _parse(name: str, text: str, kind):
    try:
        return _convert(text, kind)
    except ValueError:
        raise ValueError(f"--{name} is {text!r}, expected {_type_name(kind)}: write --{name}=value; --help lists all settings") from None


def _convert(text: str, kind):
    """Text to a value of the annotated type; ValueError when it does not fit. A union takes the first member that fits, None first."""
    if _is_union(kind):
        members = typing.get_args(kind)
        if type(None) in members and text.lower() == "none":
            return None
        for member in members:
            if member is not type(None):
                try:
                    return _convert(text, member)
                except ValueError:
                    continue
        raise ValueError
    origin = typing.get_origin(kind)
    if origin in (tuple, list):
        return origin(_convert(part.strip(), typing.get_args(kind)[0]) for part in text.split(",") if part.strip())
    if origin is typing.Literal or kind is bool:
        known = {"true": True, "false": False} if kind is bool else {str(v): v for v in typing.get_args(kind)}
        if text not in known:
            raise ValueError
        return known[text]
    return kind(text)


def run_main(fn: Callable[[], object]) -> None:
    """Run a script's main and exit: 0 done, 2 the user's input is wrong (one line on standard error), 1 anything else (traceback).

    The user's errors are the ValueErrors and FileNotFoundErrors that a file of this project raised itself; one that comes out of a
    library is our bug and keeps its traceback.
    """
    try:
        fn()
    except (ValueError, FileNotFoundError) as error:
        last = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if PROJECT not in last.parents or "site-packages" in last.parts:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


# ----------------------------------------------------------------------------------------------------------------- files


def write_atomic(path: str | Path, writer: Callable[[Path], None]) -> None:
    """Let `writer` fill a temporary file beside `path`, force it to disk, then rename it: a reader sees the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        writer(temporary)
        _fsync(temporary)
        os.replace(temporary, path)
    finally:
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


def read_records(path: str | Path) -> list[tuple[str, dict]]:
    """Objects of a .jsonl file (one a line, empty lines skipped) or of a .json file (one list), each with its place in words.

    Raises FileNotFoundError when the file is missing, ValueError naming file and line (or item) for what is not a JSON object.
    """
    path = Path(path)
    if path.suffix == ".json":
        records = read_json(path)
        if not isinstance(records, list):
            raise ValueError(f"{path} holds a JSON {type(records).__name__}, expected a list of objects: write a list, or one object a line as .jsonl")
        places = [(f"{path}, item {i}", record) for i, record in enumerate(records, 1)]
    else:
        if not path.is_file():
            raise FileNotFoundError(f"{path} was not found, expected a .jsonl or .json file: check the path")
        places = []
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if line.strip():
                try:
                    places.append((f"{path}, line {number}", json.loads(line)))
                except ValueError as error:  # not JSON, or not UTF-8
                    raise ValueError(f"{path}, line {number} is not JSON ({error}): mend or delete the line") from None
    for place, record in places:
        if not isinstance(record, dict):
            raise ValueError(f"{place} is a JSON {type(record).__name__}, expected an object: mend or delete it")
    if not places:
        raise ValueError(f"{path} holds no record, expected at least one object: check the file")
    return places


def read_json(path: str | Path):
    """Read one JSON document. Raises FileNotFoundError when it is missing, ValueError with line and column when it is not JSON."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} was not found, expected a JSON file: check the path")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        reason = f"line {error.lineno}, column {error.colno}: {error.msg}"
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is not UTF-8"
    raise ValueError(f"{path} is not JSON ({reason}): mend or replace the file")
