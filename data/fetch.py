"""Download the evaluation data sets from their publishers, in the form in which they were published.

    python data/fetch.py [--tasks=boolq,rte,...] [--out=data/eval] [--list]

Then: python eval.py --tasks=boolq,rte --data=data/eval. Each archive's sha256 and each file's row count are checked. A
download that was cut continues where it stopped (OUT/.download/*.part); what is there already is left alone. Every file
is written whole or not at all. Where files go is said in data/tasks.py. The data keep their own licences, printed here
and listed in data/README.md, and are never part of this project: OUT ignores itself in git.
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
from data.tasks import (  # noqa: E402
    ARC,
    BOOLQ,
    BOOLQ_SUPERGLUE,
    GSM8K,
    HELLASWAG,
    LAMBADA,
    MMLU_FOLDER,
    OPENBOOKQA,
    PIQA,
    RTE,
    RTE_SUPERGLUE,
    TASKS,
    WINOGRANDE,
    labels_of,
)

TRIES, TIMEOUT, CHUNK = 4, 60, 1 << 20  # attempts an address gets without a new byte; seconds; bytes
AI2 = "https://ai2-public-datasets.s3.amazonaws.com"
AI2_OLD = "https://s3-us-west-2.amazonaws.com/ai2-website/data"
MOSAIC = "https://storage.googleapis.com/ai2-mosaic/public"
GLUE = "https://dl.fbaipublicfiles.com/glue"
GSM8K_COMMIT = "3101c7d5072418e28b9008a6636bde82a006892c"
GSM8K_HOME = f"https://raw.githubusercontent.com/openai/grade-school-math/{GSM8K_COMMIT}/grade_school_math/data"
HELLASWAG_HOME = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data"


@dataclass(frozen=True)
class PublishedFile:
    """One published file.

    addresses: tried in order. files: (member, target, rows), where the archive's member ends with this path; "" is the
    file itself. A member and target that end with "/" are a folder of csv files, and rows counts all of them.
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
    sources: tuple[PublishedFile, ...]


# -----------------------------------------------------------------------------
# What is published where. Sizes and sha256 are those that the Hugging Face datasets library recorded for the same
# addresses while it still held them (datasets/NAME/dataset_infos.json,
# https://github.com/huggingface/datasets/tree/2.0.0/datasets); row counts are the publishers'.


def splits(member: str, target: str, rows: dict[str, int], labels: bool = False) -> tuple[tuple[str, str, int], ...]:
    """Files of several splits, from templates of a member and a target; labels: with the labels' files beside them."""
    files = []
    for split, n in rows.items():
        file = member.format(split=split), target.format(split=split)
        files.append((*file, n))
        if labels:
            files.append((*map(labels_of, file), n))
    return tuple(files)


def whole(address: str, size: int, sha256: str, target: str, rows: int) -> PublishedFile:
    """A file that is published as it is."""
    return PublishedFile((address,), size, sha256, (("", target, rows),))


def arc_files(kind: str, rows: dict[str, int]) -> tuple[tuple[str, str, int], ...]:
    member, target = f"ARC-{kind}/ARC-{kind}-{{split}}.jsonl", ARC.format(kind=kind, split="{split}")
    return splits(member, target, rows)


ARC_SOURCE = PublishedFile(
    (f"{AI2}/arc/ARC-V1-Feb2018.zip", f"{AI2_OLD}/ARC-V1-Feb2018.zip"),
    680_841_265,
    "6d2d5ab50b2ceec6ba5f79c921be77cf2de712ea25a2b3f4fff3acc101cecfa0",
    arc_files("Challenge", {"Train": 1119, "Dev": 299, "Test": 1172})
    + arc_files("Easy", {"Train": 2251, "Dev": 570, "Test": 2376}),
)
BOOLQ_SOURCES = (
    whole(
        "https://storage.googleapis.com/boolq/train.jsonl",
        6_525_813,
        "cc7a79d44479867e8323a7b0c5c1d82edf516ca34912201f9384c3a3d098d8db",
        BOOLQ.format(split="train"),
        9427,
    ),
    whole(
        "https://storage.googleapis.com/boolq/dev.jsonl",
        2_238_726,
        "ebc29ea3808c5c611672384b3de56e83349fe38fc1fe876fd29b674d81d0a80a",
        BOOLQ.format(split="dev"),
        3270,
    ),
    PublishedFile(
        (f"{GLUE}/superglue/data/v2/BoolQ.zip",),
        4_118_001,
        "853fbe7922f70c59629f06a39e8d9ca440c3d740e760fd3b87a5ddf3dcba2436",
        splits("BoolQ/{split}.jsonl", BOOLQ_SUPERGLUE, {"train": 9427, "val": 3270}),
    ),
)
RTE_SOURCES = (
    PublishedFile(
        (f"{GLUE}/data/RTE.zip",),
        697_150,
        "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee",
        splits("RTE/{split}.tsv", RTE, {"train": 2490, "dev": 277}),
    ),
    PublishedFile(
        (f"{GLUE}/superglue/data/v2/RTE.zip",),
        750_920,
        "6310aab3f000424c9d0318a1ff20692e07c7f4aa15e8f17a5972ea0a35c398b9",
        splits("RTE/{split}.jsonl", RTE_SUPERGLUE, {"train": 2490, "val": 277}),
    ),
)
OPENBOOKQA_SOURCE = PublishedFile(
    (f"{AI2}/open-book-qa/OpenBookQA-V1-Sep2018.zip", f"{AI2_OLD}/OpenBookQA-V1-Sep2018.zip"),
    1_446_098,
    "82368cf05df2e3b309c17d162e10b888b4d768fad6e171e0a041954c8553be46",
    splits("Data/Main/{split}.jsonl", OPENBOOKQA, {"train": 4957, "dev": 500, "test": 500}),
)
PIQA_SOURCE = PublishedFile(  # the same rows as valid.jsonl of the home page, with an id each
    (f"{MOSAIC}/physicaliqa/physicaliqa-train-dev.zip",),
    1_824_009,
    "54d32a04f59a7e354396f321723c8d7ec35cc6b08506563d8d1ffcc15ce98ddd",
    splits("physicaliqa-train-dev/{split}.jsonl", PIQA, {"train": 16113}, labels=True)
    + splits("physicaliqa-train-dev/dev.jsonl", PIQA, {"valid": 1838}, labels=True),
)
MMLU_SOURCE = PublishedFile(
    ("https://people.eecs.berkeley.edu/~hendrycks/data.tar",),
    166_184_960,
    "bec563ba4bac1d6aaf04141cd7d1605d7a5ca833e38f994051e818489592989b",
    splits("data/{split}/", MMLU_FOLDER, {"dev": 285, "val": 1531, "test": 14042}),
)
WINOGRANDE_ROWS = {"train_xs": 160, "train_s": 640, "train_m": 2558, "train_l": 10234, "train_xl": 40398, "dev": 1267}
WINOGRANDE_SOURCE = PublishedFile(
    (f"{MOSAIC}/winogrande/winogrande_1.1.zip",),
    3_395_492,
    "3619ab104d8be2977b25c90ff420cb42d491707dcc75362a1e5d22bc082b7318",
    splits("winogrande_1.1/{split}.jsonl", WINOGRANDE, WINOGRANDE_ROWS, labels=True),
)
GSM8K_SOURCES = (
    whole(
        f"{GSM8K_HOME}/train.jsonl",
        4_166_206,
        "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        GSM8K.format(split="train"),
        7473,
    ),
    whole(
        f"{GSM8K_HOME}/test.jsonl",
        749_738,
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        GSM8K.format(split="test"),
        1319,
    ),
)
HELLASWAG_SOURCES = (
    whole(
        f"{HELLASWAG_HOME}/hellaswag_train.jsonl",
        47_496_131,
        "dae5e69249868cb9fe4e23ff925c60b66169564cfb7072d793cd7356a2b69f8d",
        HELLASWAG.format(split="train"),
        39905,
    ),
    whole(
        f"{HELLASWAG_HOME}/hellaswag_val.jsonl",
        12_246_618,
        "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
        HELLASWAG.format(split="val"),
        10042,
    ),
)
LAMBADA_SOURCE = whole(  # sha256 and size: tasks of lm-eval before it read the hub, and the hub's own copy
    "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
    1_819_752,
    "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
    LAMBADA.format(split="test"),
    5153,
)
NO_LICENCE = "no single licence is stated (RTE 1, 2, 3 and 5 as gathered by GLUE and SuperGLUE): research use"
DATASETS = {
    "boolq": Dataset("CC BY-SA 3.0", TASKS["boolq"].home, BOOLQ_SOURCES),
    "rte": Dataset(NO_LICENCE, TASKS["rte"].home, RTE_SOURCES),
    "openbookqa": Dataset("Apache-2.0", TASKS["openbookqa"].home, (OPENBOOKQA_SOURCE,)),
    "piqa": Dataset("AFL-3.0", TASKS["piqa"].home, (PIQA_SOURCE,)),
    "mmlu": Dataset("MIT", TASKS["mmlu_anatomy"].home, (MMLU_SOURCE,)),
    "winogrande": Dataset("CC BY", TASKS["winogrande"].home, (WINOGRANDE_SOURCE,)),
    "gsm8k": Dataset("MIT", TASKS["gsm8k"].home, GSM8K_SOURCES),
    "hellaswag": Dataset("MIT", TASKS["hellaswag"].home, HELLASWAG_SOURCES),
    "arc_challenge": Dataset("CC BY-SA 4.0", TASKS["arc_challenge"].home, (ARC_SOURCE,)),
    "arc_easy": Dataset("CC BY-SA 4.0", TASKS["arc_easy"].home, (ARC_SOURCE,)),
    "lambada_openai": Dataset("modified MIT (GPT-2's)", TASKS["lambada_openai"].home, (LAMBADA_SOURCE,)),
}


# -----------------------------------------------------------------------------
# Checks


def count_rows(name: str, content: bytes) -> int:
    """Rows of a jsonl, lst, tsv (without its header) or csv file, whose fields may hold line feeds."""
    if name.endswith(".csv"):
        return sum(1 for _ in csv.reader(io.StringIO(content.decode("utf-8"), newline="")))
    lines = sum(1 for line in content.split(b"\n") if line.strip())
    return lines - 1 if name.endswith(".tsv") else lines


def is_present(out: Path, source: PublishedFile) -> bool:
    """Whether every file of the source lies in `out` with the right number of rows."""
    for _, target, rows in source.files:
        paths = sorted((out / target).glob("*.csv")) if target.endswith("/") else [out / target]
        if not all(path.is_file() for path in paths):
            return False
        if sum(count_rows(path.name, path.read_bytes()) for path in paths) != rows:
            return False
    return True


# -----------------------------------------------------------------------------
# Download


def download(source: PublishedFile, part: Path) -> None:
    """Fill `part` with the source, continuing what is there, and check its sha256. Raises ValueError with the mend."""
    reason = ""
    for address in source.addresses:
        reason = receive_all(address, part, source.size)
        if size_of(part) == source.size:
            break
    else:
        raise ValueError(
            f"{address} could not be fetched ({reason}), expected {source.size:,} bytes: check the network and run the "
            f"same command again, it continues at {size_of(part):,} bytes; data/README.md says where to put files "
            "fetched by hand"
        )
    with open(part, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        part.unlink()
        raise ValueError(
            f"{address} has the sha256 {found}, expected {source.sha256}: it was discarded; run the same command "
            "again, and if this comes back, the publisher changed the file"
        )


def receive_all(address: str, part: Path, size: int) -> str:
    """Ask an address until `part` is whole, as long as each few attempts bring something; returns why it ended."""
    tries, reason = 0, ""
    while size_of(part) < size and tries < TRIES:
        before = size_of(part)
        if tries:
            time.sleep(tries)
        try:
            receive(address, part, size)
            reason = f"the connection was cut at {size_of(part):,} of {size:,} bytes"
        except urllib.error.HTTPError as error:
            if error.code == 416:  # what is there does not belong to the server's file
                part.unlink(missing_ok=True)
            return f"HTTP {error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        tries = 0 if size_of(part) > before else tries + 1
    return reason


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def receive(address: str, part: Path, size: int) -> None:
    """Append to `part` what the server sends from its end on, up to `size` bytes; without ranges it starts anew."""
    have = size_of(part)
    headers = {"User-Agent": "router-tuning-fetch"} | ({"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=TIMEOUT) as reply:
        if reply.status != 206:
            have = 0
        with open(part, "ab" if have else "wb") as file, runtime.Progress("fetching, in bytes", size) as progress:
            progress.step(have)
            while have < size:
                chunk = reply.read(min(CHUNK, size - have))
                if not chunk:
                    return
                file.write(chunk)
                have += len(chunk)
                progress.step(len(chunk))


# -----------------------------------------------------------------------------
# Unpack


def target_of(name: str, source: PublishedFile) -> str | None:
    """Where an archive's member belongs, None when it is not wanted."""
    path = PurePosixPath("/", name)
    for member, target, _ in source.files:
        if member.endswith("/"):
            if path.suffix == ".csv" and not path.name.startswith(".") and f"{path.parent}/".endswith(f"/{member}"):
                return target + path.name
        elif f"{path}".endswith(f"/{member}"):
            return target
    return None


def unpack(source: PublishedFile, part: Path) -> dict[str, bytes]:
    """Target -> content of every file of a zip, a tar or a plain file. Raises ValueError for a wrong number of rows."""
    contents = {}
    if source.files[0][0] == "":
        contents[source.files[0][1]] = part.read_bytes()
    elif zipfile.is_zipfile(part):
        with zipfile.ZipFile(part) as archive:
            for name in archive.namelist():
                contents[target_of(name, source)] = archive.read(name) if target_of(name, source) else b""
    else:
        with tarfile.open(part) as archive:
            for member in archive:
                target = target_of(member.name, source) if member.isfile() else None
                contents[target] = archive.extractfile(member).read() if target else b""
    contents.pop(None, None)  # members that are not wanted
    for _, target, rows in source.files:
        found = sum(count_rows(name, content) for name, content in contents.items() if name.startswith(target))
        if found != rows:
            raise ValueError(
                f"{source.addresses[0]} has {found} rows for {target}, expected {rows}: fetch it by hand, see "
                "data/README.md"
            )
    return contents


def fetch(source: PublishedFile, out: Path) -> None:
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
        raise ValueError(
            f"the disk is full while fetching into {out}, expected room for {names}: free some space and run again"
        ) from None
    part.unlink()
    print(f"  {names}: written")


# -----------------------------------------------------------------------------
# Command line


@dataclass
class FetchConfig:
    tasks: tuple[str, ...] = field(default=tuple(DATASETS), metadata={"help": "data sets to fetch"})
    out: str = field(default="data/eval", metadata={"help": "folder to write"})
    list: bool = field(default=False, metadata={"help": "show licences, addresses and sizes, fetch nothing"})


def main() -> None:
    settings = runtime.cli(FetchConfig)
    unknown = [task for task in settings.tasks if task not in DATASETS]
    if unknown:
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
                targets = ", ".join(target for _, target, _ in source.files)
                print(f"  {source.addresses[0]} ({source.size / 1e6:,.1f} MB) -> {targets}")
            else:
                fetch(source, out)
    if not settings.list:
        shutil.rmtree(out / ".download", ignore_errors=True)


if __name__ == "__main__":
    runtime.run_main(main)
