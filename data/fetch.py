"""Download the evaluation data sets from their publishers, in the form in which they were published.

    python data/fetch.py [--tasks=boolq,rte,...] [--out=data/eval] [--list]

Then: python eval.py --tasks=boolq,rte --data=data/eval. Each archive's sha256 and each file's row count are checked. A download that was
cut continues where it stopped (OUT/.download/*.part); what is there already is left alone. Every file is written whole or not at all.
The data keep their own licences, printed here and listed in data/README.md, and are never part of this project: OUT ignores itself in git.
"""

import csv
import errno
import hashlib
import http.client
import io
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import runtime  # noqa: E402

TRIES, TIMEOUT, CHUNK = 4, 60, 1 << 20  # attempts an address gets without a new byte; seconds; bytes
AI2 = "https://ai2-public-datasets.s3.amazonaws.com"
AI2_OLD = "https://s3-us-west-2.amazonaws.com/ai2-website/data"
MOSAIC = "https://storage.googleapis.com/ai2-mosaic/public"
GLUE = "https://dl.fbaipublicfiles.com/glue"
GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data"
HELLASWAG = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data"


@dataclass(frozen=True)
class Source:
    """One published file. `files`: (member, target, rows): the archive's member that ends with this path, "" for the file itself.

    A member and target that end with "/" are a folder of csv files, and rows counts all of them. `addresses` are tried in order.
    """

    addresses: tuple[str, ...]
    size: int  # bytes
    sha256: str
    files: tuple[tuple[str, str, int], ...]

    @property
    def name(self) -> str:
        return f"{self.sha256[:8]}-{PurePosixPath(self.addresses[0]).name}"


@dataclass(frozen=True)
class Dataset:
    licence: str
    home: str
    sources: tuple[Source, ...]


# Sizes and sha256 are those recorded for the same addresses by the Hugging Face datasets library when it still held them in its repository
# (datasets/NAME/dataset_infos.json, https://github.com/huggingface/datasets/tree/2.0.0/datasets); row counts are the publishers'.
ARC = Source(
    (f"{AI2}/arc/ARC-V1-Feb2018.zip", f"{AI2_OLD}/ARC-V1-Feb2018.zip"),
    680_841_265,
    "6d2d5ab50b2ceec6ba5f79c921be77cf2de712ea25a2b3f4fff3acc101cecfa0",
    tuple(
        (f"ARC-{kind}/ARC-{kind}-{split}.jsonl", f"arc/ARC-{kind}/ARC-{kind}-{split}.jsonl", rows)
        for kind, counts in (("Challenge", (1119, 299, 1172)), ("Easy", (2251, 570, 2376)))
        for split, rows in zip(("Train", "Dev", "Test"), counts, strict=True)
    ),
)
DATASETS = {
    "boolq": Dataset(
        "CC BY-SA 3.0",
        "https://github.com/google-research-datasets/boolean-questions",
        (
            Source(
                ("https://storage.googleapis.com/boolq/train.jsonl",),
                6_525_813,
                "cc7a79d44479867e8323a7b0c5c1d82edf516ca34912201f9384c3a3d098d8db",
                (("", "boolq/train.jsonl", 9427),),
            ),
            Source(
                ("https://storage.googleapis.com/boolq/dev.jsonl",),
                2_238_726,
                "ebc29ea3808c5c611672384b3de56e83349fe38fc1fe876fd29b674d81d0a80a",
                (("", "boolq/dev.jsonl", 3270),),
            ),
            Source(
                (f"{GLUE}/superglue/data/v2/BoolQ.zip",),
                4_118_001,
                "853fbe7922f70c59629f06a39e8d9ca440c3d740e760fd3b87a5ddf3dcba2436",
                (("BoolQ/train.jsonl", "boolq/superglue/train.jsonl", 9427), ("BoolQ/val.jsonl", "boolq/superglue/val.jsonl", 3270)),
            ),
        ),
    ),
    "rte": Dataset(
        "no single licence is stated (RTE 1, 2, 3 and 5 as gathered by GLUE and SuperGLUE): research use",
        "https://gluebenchmark.com/tasks",
        (
            Source(
                (f"{GLUE}/data/RTE.zip",),
                697_150,
                "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee",
                (("RTE/train.tsv", "rte/glue/RTE/train.tsv", 2490), ("RTE/dev.tsv", "rte/glue/RTE/dev.tsv", 277)),
            ),
            Source(
                (f"{GLUE}/superglue/data/v2/RTE.zip",),
                750_920,
                "6310aab3f000424c9d0318a1ff20692e07c7f4aa15e8f17a5972ea0a35c398b9",
                (("RTE/train.jsonl", "rte/superglue/train.jsonl", 2490), ("RTE/val.jsonl", "rte/superglue/val.jsonl", 277)),
            ),
        ),
    ),
    "openbookqa": Dataset(
        "Apache-2.0",
        "https://allenai.org/data/open-book-qa",
        (
            Source(
                (f"{AI2}/open-book-qa/OpenBookQA-V1-Sep2018.zip", f"{AI2_OLD}/OpenBookQA-V1-Sep2018.zip"),
                1_446_098,
                "82368cf05df2e3b309c17d162e10b888b4d768fad6e171e0a041954c8553be46",
                tuple((f"Data/Main/{s}.jsonl", f"openbookqa/Main/{s}.jsonl", n) for s, n in (("train", 4957), ("dev", 500), ("test", 500))),
            ),
        ),
    ),
    "piqa": Dataset(
        "AFL-3.0",
        "https://yonatanbisk.com/piqa/",
        (
            Source(  # the same rows as valid.jsonl of the home page, with an id each
                (f"{MOSAIC}/physicaliqa/physicaliqa-train-dev.zip",),
                1_824_009,
                "54d32a04f59a7e354396f321723c8d7ec35cc6b08506563d8d1ffcc15ce98ddd",
                tuple(
                    (f"physicaliqa-train-dev/{theirs}{end}", f"piqa/{ours}{end}", rows)
                    for theirs, ours, rows in (("train", "train", 16113), ("dev", "valid", 1838))
                    for end in (".jsonl", "-labels.lst")
                ),
            ),
        ),
    ),
    "mmlu": Dataset(
        "MIT",
        "https://github.com/hendrycks/test",
        (
            Source(
                ("https://people.eecs.berkeley.edu/~hendrycks/data.tar",),
                166_184_960,
                "bec563ba4bac1d6aaf04141cd7d1605d7a5ca833e38f994051e818489592989b",
                tuple((f"data/{split}/", f"mmlu/data/{split}/", rows) for split, rows in (("dev", 285), ("val", 1531), ("test", 14042))),
            ),
        ),
    ),
    "winogrande": Dataset(
        "CC BY",
        "https://winogrande.allenai.org",
        (
            Source(
                (f"{MOSAIC}/winogrande/winogrande_1.1.zip",),
                3_395_492,
                "3619ab104d8be2977b25c90ff420cb42d491707dcc75362a1e5d22bc082b7318",
                tuple(
                    (f"winogrande_1.1/{split}{end}", f"winogrande/{split}{end}", rows)
                    for split, rows in zip(
                        ("train_xs", "train_s", "train_m", "train_l", "train_xl", "dev"), (160, 640, 2558, 10234, 40398, 1267), strict=True
                    )
                    for end in (".jsonl", "-labels.lst")
                ),
            ),
        ),
    ),
    "gsm8k": Dataset(
        "MIT",
        "https://github.com/openai/grade-school-math",
        (
            Source(
                (f"{GSM8K}/train.jsonl",),
                4_166_206,
                "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
                (("", "gsm8k/train.jsonl", 7473),),
            ),
            Source(
                (f"{GSM8K}/test.jsonl",),
                749_738,
                "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
                (("", "gsm8k/test.jsonl", 1319),),
            ),
        ),
    ),
    "hellaswag": Dataset(
        "MIT",
        "https://github.com/rowanz/hellaswag",
        (
            Source(
                (f"{HELLASWAG}/hellaswag_train.jsonl",),
                47_496_131,
                "dae5e69249868cb9fe4e23ff925c60b66169564cfb7072d793cd7356a2b69f8d",
                (("", "hellaswag/hellaswag_train.jsonl", 39905),),
            ),
            Source(
                (f"{HELLASWAG}/hellaswag_val.jsonl",),
                12_246_618,
                "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
                (("", "hellaswag/hellaswag_val.jsonl", 10042),),
            ),
        ),
    ),
    "arc_challenge": Dataset("CC BY-SA 4.0", "https://allenai.org/data/arc", (ARC,)),
    "arc_easy": Dataset("CC BY-SA 4.0", "https://allenai.org/data/arc", (ARC,)),
}


# ----------------------------------------------------------------------------------------------------------------- checks


def count_rows(name: str, content: bytes) -> int:
    """Rows of a jsonl, lst, tsv (without its header) or csv file. Lines end at a line feed only; csv fields may hold line feeds."""
    if name.endswith(".csv"):
        return sum(1 for _ in csv.reader(io.StringIO(content.decode("utf-8"), newline="")))
    lines = sum(1 for line in content.split(b"\n") if line.strip())
    return lines - 1 if name.endswith(".tsv") else lines


def is_present(out: Path, source: Source) -> bool:
    """Whether every file of the source lies in `out` with the right number of rows."""
    for _, target, rows in source.files:
        paths = sorted((out / target).glob("*.csv")) if target.endswith("/") else [out / target]
        if not all(path.is_file() for path in paths) or sum(count_rows(path.name, path.read_bytes()) for path in paths) != rows:
            return False
    return True


# --------------------------------------------------------------------------------------------------------------- download


def download(source: Source, part: Path) -> None:
    """Fill `part` with the source, continuing what is there, and check its sha256. Raises ValueError with what to do."""
    reason = ""
    for address in source.addresses:
        tries = 0
        while size_of(part) < source.size and tries < TRIES:
            before = size_of(part)
            if tries:
                time.sleep(tries)
            try:
                receive(address, part, source.size)
                reason = f"the connection was cut at {size_of(part):,} of {source.size:,} bytes"
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}"
                if error.code == 416:  # what is there does not belong to the server's file
                    part.unlink(missing_ok=True)
                break
            except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            tries = 0 if size_of(part) > before else tries + 1
        if size_of(part) == source.size:
            break
    if size_of(part) < source.size:
        raise ValueError(
            f"{source.addresses[-1]} could not be fetched ({reason}), expected {source.size:,} bytes: check the network and run the same "
            f"command again, it continues at {size_of(part):,} bytes; data/README.md says where to put files fetched by hand"
        )
    with open(part, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        part.unlink()
        raise ValueError(
            f"{address} has the sha256 {found}, expected {source.sha256}: it was discarded; run the same command again, and if this comes "
            "back, the publisher changed the file"
        )


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def receive(address: str, part: Path, size: int) -> None:
    """Append to `part` what the server sends from its end on; a server that ignores the range starts it anew. Stops after `size` bytes."""
    have, shown = size_of(part), time.monotonic()
    headers = {"User-Agent": "router-tuning-fetch"} | ({"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=TIMEOUT) as reply:
        if reply.status != 206:
            have = 0
        with open(part, "ab" if have else "wb") as file:
            while have < size and (chunk := reply.read(min(CHUNK, size - have))):
                file.write(chunk)
                have += len(chunk)
                if time.monotonic() - shown > 5:
                    print(f"  {have / 1e6:,.1f} of {size / 1e6:,.1f} MB", flush=True)
                    shown = time.monotonic()


# ---------------------------------------------------------------------------------------------------------------- unpack


def target_of(name: str, source: Source) -> str | None:
    """Where an archive's member belongs, None when it is not wanted."""
    path = PurePosixPath("/", name)
    for member, target, _ in source.files:
        if member.endswith("/"):
            if path.suffix == ".csv" and not path.name.startswith(".") and f"{path.parent}/".endswith(f"/{member}"):
                return target + path.name
        elif f"{path}".endswith(f"/{member}"):
            return target
    return None


def unpack(source: Source, part: Path) -> dict[str, bytes]:
    """Target -> content of every file of a zip, a tar or a plain file. Raises ValueError when the number of rows is not the publisher's."""
    if source.files[0][0] == "":
        contents = {source.files[0][1]: part.read_bytes()}
    elif zipfile.is_zipfile(part):
        with zipfile.ZipFile(part) as archive:
            contents = {t: archive.read(name) for name in archive.namelist() if (t := target_of(name, source))}
    else:
        with tarfile.open(part) as archive:
            contents = {t: archive.extractfile(m).read() for m in archive if m.isfile() and (t := target_of(m.name, source))}
    for _, target, rows in source.files:
        found = sum(count_rows(name, content) for name, content in contents.items() if name.startswith(target))
        if found != rows:
            raise ValueError(f"{source.addresses[0]} has {found} rows for {target}, expected {rows}: fetch it by hand, see data/README.md")
    return contents


# ------------------------------------------------------------------------------------------------------------------ main


def fetch(source: Source, out: Path) -> None:
    """Bring one source's files into `out`, unless they are there. Raises ValueError with what to do."""
    names = ", ".join(target for _, target, _ in source.files)
    if is_present(out, source):
        print(f"  {names}: there already")
        return
    print(f"  {source.addresses[0]} ({source.size / 1e6:,.1f} MB)", flush=True)
    part = out / ".download" / f"{source.name}.part"
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        download(source, part)
        for target, content in unpack(source, part).items():
            runtime.write_atomic(out / target, lambda path, content=content: path.write_bytes(content))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(f"the disk is full while fetching into {out}, expected room for {names}: free some space and run again") from None
    part.unlink()
    print(f"  {names}: written")


@dataclass
class Settings:
    tasks: tuple[str, ...] = field(default=tuple(DATASETS), metadata={"help": "data sets to fetch"})
    out: str = field(default="data/eval", metadata={"help": "folder to write"})
    list: bool = field(default=False, metadata={"help": "show licences, addresses and sizes, fetch nothing"})


def main() -> None:
    settings = runtime.cli(Settings)
    if unknown := [task for task in settings.tasks if task not in DATASETS]:
        raise ValueError(f"--tasks has {', '.join(unknown)}, expected some of {', '.join(DATASETS)}: correct the name")
    out = Path(settings.out)
    if not settings.list:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".gitignore").write_text("*\n")  # others' data under others' licences
    for task in settings.tasks:
        dataset = DATASETS[task]
        print(f"{task}: licence {dataset.licence}; {dataset.home}", flush=True)
        for source in dataset.sources:
            if settings.list:
                print(f"  {source.addresses[0]} ({source.size / 1e6:,.1f} MB) -> {', '.join(target for _, target, _ in source.files)}")
            else:
                fetch(source, out)
    if not settings.list:
        shutil.rmtree(out / ".download", ignore_errors=True)


if __name__ == "__main__":
    runtime.run_main(main)
