"""Compare eval.py with lm-evaluation-harness: the same weights, items and shots, item by item, with the time of each.

    pip install lm_eval transformers accelerate        # the harness is no dependency of the project
    python convert_hf.py checkpoints/smollm2-135m-instruct /tmp/hf --to_hf
    python tests/compare_lm_eval.py --model=checkpoints/smollm2-135m-instruct --hf=/tmp/hf --data=data/eval --limit=100

The harness runs its own task definitions through its Python API and hf backend, in float32; only the data come from
local files, put into the columns of the hub's data sets by this script's own readers. Times are those of tokenising and
scoring, taken in turn, one task after the other: seconds on the clock, and of the processor, which other work on the
machine disturbs less. --chat puts prompts into the model's chat template on both sides. Exit status 1 when a
log-probability differs by more than 1e-3, a prediction other than at a tie, an accuracy, or an answer.
"""

import csv
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_DATASETS_DISABLE_PROGRESS_BARS="1"
)

import lm_eval.tasks  # noqa: E402
import torch  # noqa: E402
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import eval as ours  # noqa: E402
import runtime  # noqa: E402
from data.tasks import TASKS, labels_of, locate  # noqa: E402
from lm_eval_adapter import RouterTuningLM  # noqa: E402

CLOSE = 1e-3
YAML = {
    "boolq": "super_glue/boolq/default",
    "rte": "glue/rte/default",
    "openbookqa": "openbookqa/openbookqa",
    "piqa": "piqa/piqa",
    "winogrande": "winogrande/default",
    "gsm8k": "gsm8k/gsm8k",
    "hellaswag": "hellaswag/hellaswag",
    "arc_challenge": "arc/arc_challenge",
    "arc_easy": "arc/arc_easy",
    "lambada_openai": "lambada/lambada_openai",
}
# the others are scored on validation
SPLITS = dict.fromkeys(("openbookqa", "gsm8k", "arc_challenge", "arc_easy", "lambada_openai"), "test")


@dataclass
class Config:
    model: str = field(metadata={"help": "our checkpoint folder"})
    hf: str | None = field(
        default=None, metadata={"help": "the same weights as a Hugging Face folder (convert_hf.py --to_hf)"}
    )
    routers: str | None = field(default=None, metadata={"help": "instead of --hf: our own routed model in the harness"})
    data: str = field(default="data/eval", metadata={"help": "folder of the native files"})
    tasks: tuple[str, ...] = field(default=(*YAML, "mmlu_miscellaneous"), metadata={"help": "tasks, MMLU by subject"})
    limit: int = field(default=100, metadata={"help": "items of each task"})
    fewshot: int | None = field(default=None, metadata={"help": "shots; none: the paper's"})
    batch_size: int = field(default=1, metadata={"help": "the harness's (1 is its own default)"})
    max_length: int | None = field(default=None, metadata={"help": "context length of both, to see truncation agree"})
    max_batch_tokens: int = field(default=16384, metadata={"help": "ours"})
    threads: int | None = field(default=None, metadata={"help": "of both; none: torch's choice"})
    chat: bool = field(default=False, metadata={"help": "prompts in the model's chat template, shots as turns"})
    out: str | None = field(default=None, metadata={"help": "write the figures here as JSON"})


def jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def tsv(path: Path) -> list[dict]:
    header, *lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    return [dict(zip(header.split("\t"), line.split("\t"))) for line in lines]


def hub_rows(task: str, path: Path) -> list[dict]:
    """A native file in the columns that the harness's task expects from the hub."""
    if task.startswith("mmlu_"):
        with open(path, encoding="utf-8") as file:
            return [
                {"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5])} for row in csv.reader(file)
            ]
    rows = tsv(path) if path.suffix == ".tsv" else jsonl(path)
    if task == "boolq":
        return [
            {"passage": f"{r['title']} -- {r['passage']}", "question": r["question"], "label": int(r["answer"])}
            for r in rows
        ]
    if task == "rte":
        return [{**r, "label": ["entailment", "not_entailment"].index(r["label"])} for r in rows]
    if task == "piqa":
        labels = Path(labels_of(str(path))).read_text().split()
        return [
            {"goal": r["goal"], "sol1": r["sol1"], "sol2": r["sol2"], "label": int(label)}
            for r, label in zip(rows, labels)
        ]
    if task == "winogrande":
        return [{key: r[key] for key in ("sentence", "option1", "option2", "answer")} for r in rows]
    if task == "hellaswag":
        return [
            {**{key: r[key] for key in ("activity_label", "ctx_a", "ctx_b", "endings")}, "label": str(r["label"])}
            for r in rows
        ]
    if task in ("gsm8k", "lambada_openai"):
        return rows
    columns = [{key: [choice[key] for choice in r["question"]["choices"]] for key in ("text", "label")} for r in rows]
    stem = "question_stem" if task == "openbookqa" else "question"
    return [
        {stem: r["question"]["stem"], "choices": choices, "answerKey": r["answerKey"]}
        for r, choices in zip(rows, columns)
    ]


def declare(task: str, cfg: Config, folder: Path) -> str:
    """Write the task's data and a yaml that includes the harness's own definition. Returns the name of its runs."""
    paths = locate([TASKS[task]], Path(cfg.data), {task: 1})[task]
    scored = "test" if task.startswith("mmlu_") else SPLITS.get(task, "validation")
    files = {}
    for split, path in ((scored, paths[0]), ("dev" if task.startswith("mmlu_") else "train", paths[1])):
        files[split] = str(folder / f"{task}_{split}.jsonl")
        rows = hub_rows(task, path)
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if task in ("openbookqa", "arc_challenge", "arc_easy"):
        files["validation"] = files[scored]  # named by the yaml, not used
    yaml = Path(lm_eval.tasks.__file__).parent / f"{YAML.get(task, f'mmlu/default/{task}')}.yaml"
    shots = TASKS[task].shots if cfg.fewshot is None else cfg.fewshot
    name = f"local_{task}"
    (folder / f"{name}.yaml").write_text(
        f"include: {yaml}\ntask: {name}\ndataset_path: json\ndataset_name: null\nnum_fewshot: {shots}\n"
        f"dataset_kwargs:\n  data_files: {json.dumps(files)}\n",
        encoding="utf-8",
    )
    return name


class Stopwatch:
    """Adds up the seconds, on the clock and of the processor, that functions take."""

    wall = cpu = 0.0

    def around(self, work):
        def timed(*args, **kwargs):
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                return work(*args, **kwargs)
            finally:
                self.wall, self.cpu = self.wall + time.perf_counter() - wall, self.cpu + time.process_time() - cpu

        return timed


def theirs(name: str, cfg: Config, lm: HFLM, manager: TaskManager) -> tuple[list[dict], dict]:
    chat = {"apply_chat_template": True, "fewshot_as_multiturn": True} if cfg.chat else {}
    report = simple_evaluate(
        model=lm, tasks=[name], limit=cfg.limit, task_manager=manager, log_samples=True, bootstrap_iters=0, **chat
    )
    return report["samples"][name], report["results"][name]


def compare(task: str, mine: list[dict], mine_results: dict, samples: list[dict], results: dict) -> dict:
    if task == "gsm8k":
        by = {
            kind: {s["doc_id"]: s for s in samples if s["filter"] == kind}
            for kind in ("strict-match", "flexible-extract")
        }
        same = sum(
            m["prediction"] == by["strict-match"][m["index"]]["filtered_resps"][0]
            and m["prediction_flexible"] == by["flexible-extract"][m["index"]]["filtered_resps"][0]
            for m in mine
        )
        texts = sum(m["text"] == by["strict-match"][m["index"]]["resps"][0][0] for m in mine)
        names = {
            "exact_match_strict": "exact_match,strict-match",
            "exact_match_flexible": "exact_match,flexible-extract",
        }
        equal = all(abs(mine_results[ours_name] - results[name]) < 1e-9 for ours_name, name in names.items())
        return {
            "n": len(mine),
            "same_answers": same,
            "same_texts": texts,
            "equal_accuracies": equal,
            "ok": same == len(mine) and equal,
            "acc": [mine_results["exact_match_strict"], results["exact_match,strict-match"]],
        }
    worst, differ = 0.0, 0
    theirs_by_id = {s["doc_id"]: s for s in samples}
    for m in mine:
        other = [float(resp[0]) for resp in theirs_by_id[m["index"]]["filtered_resps"]]
        worst = max(worst, *(abs(a - b) for a, b in zip(m["logprobs"], other, strict=True)))
        if len(other) == 1:  # one target: is it what greedy decoding says?
            differ += m["prediction"] != theirs_by_id[m["index"]]["filtered_resps"][0][1]
            continue
        best = max(range(len(other)), key=other.__getitem__)
        differ += best != m["prediction"] and abs(other[best] - other[m["prediction"]]) > 2 * CLOSE
    known = ("acc", "acc_norm", "perplexity")
    metrics = [metric for metric in known if f"{metric},none" in results and metric in mine_results]
    close = {metric: CLOSE * results[f"{metric},none"] if metric == "perplexity" else 1e-9 for metric in metrics}
    equal = all(abs(mine_results[metric] - results[f"{metric},none"]) < close[metric] for metric in metrics)
    return {
        "n": len(mine),
        "max_difference": worst,
        "predictions_differ": differ,
        "equal_accuracies": equal,
        "ok": worst <= CLOSE and not differ and equal,
        **{metric: [mine_results[metric], results[f"{metric},none"]] for metric in metrics},
    }


def show(value) -> str:
    if isinstance(value, list):
        return "/".join(map(show, value))
    return str(value) if not isinstance(value, float) else f"{value:.2e}" if 0 < abs(value) < 0.01 else f"{value:.4g}"


def harness(cfg: Config) -> HFLM | RouterTuningLM:
    if cfg.routers:
        own = {"batch_size": cfg.batch_size, "max_length": cfg.max_length}
        return RouterTuningLM(model=cfg.model, routers=cfg.routers, **own)
    own = {"dtype": "float32", "batch_size": cfg.batch_size, "max_length": cfg.max_length}
    return HFLM(pretrained=cfg.hf, device="cpu", **own)


def compare_task(task: str, name: str, cfg: Config, folder: Path, both: tuple) -> dict:
    """Run one task on both sides. both: the harness's model, its tasks, a stopwatch for us and one for it."""
    lm, manager, *watches = both
    for watch in watches:
        watch.wall = watch.cpu = 0.0
    samples_file = folder / f"{task}.jsonl"
    own = {key: getattr(cfg, key) for key in ("model", "routers", "data", "fewshot", "limit", "max_length")}
    own |= {"max_batch_tokens": cfg.max_batch_tokens, "apply_chat_template": cfg.chat, "fewshot_by": "harness"}
    report = ours.evaluate(
        ours.EvalConfig(tasks=(task,), samples=str(samples_file), **own), runtime.setup("cpu", "float32")
    )
    samples, results = theirs(name, cfg, lm, manager)
    figures = compare(task, jsonl(samples_file), report["results"][task], samples, results)
    figures |= {"seconds": [watch.wall for watch in watches], "cpu_seconds": [watch.cpu for watch in watches]}
    return figures | {
        "ratio": watches[1].wall / watches[0].wall,
        "cpu_ratio": watches[1].cpu / watches[0].cpu,
    }


def main() -> None:
    cfg = runtime.cli(Config)
    if (cfg.hf is None) == (cfg.routers is None):
        raise ValueError(
            f"--hf is {cfg.hf} and --routers is {cfg.routers}; expected one of them: what the harness runs"
        )
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    figures = {}
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        names = {task: declare(task, cfg, folder) for task in cfg.tasks}
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        manager, lm, watches = TaskManager(include_path=str(folder)), harness(cfg), (Stopwatch(), Stopwatch())
        ours.prepare_task, ours.score_task = map(watches[0].around, (ours.prepare_task, ours.score_task))
        lm.loglikelihood = watches[1].around(partial(lm.loglikelihood, disable_tqdm=True))
        lm.generate_until = watches[1].around(partial(lm.generate_until, disable_tqdm=True))
        for task, name in names.items():
            found = figures[task] = compare_task(task, name, cfg, folder, (lm, manager, *watches))
            line = " ".join(f"{key}={show(value)}" for key, value in found.items() if key != "ok")
            print(f"{task:<24} {'ok  ' if found['ok'] else 'FAIL'} {line}", flush=True)
    if cfg.out:
        about = {"settings": vars(cfg), "lm_eval": lm_eval.__version__, "torch": torch.__version__}
        runtime.write_json(cfg.out, about | {"figures": figures})
    sys.exit(0 if all(found["ok"] for found in figures.values()) else 1)


if __name__ == "__main__":
    runtime.run_main(main)
