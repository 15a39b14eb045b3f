"""The best static list for each task, searched on that task's own training rows: what knowing the task is worth.

Run: python tests/task_lists.py --model=DIR --routers=FILE --data=data/eval --out=lists.json
     python eval.py --model=DIR --routers=FILE --control=mean:lists.json --tasks=... --against=greedy.json

A bound for whoever skips by kind of text alone: no row of another source and no router is asked, the places are those
of the router file, and what is searched is the log-probability of right answers, as eval.py asks for them. The second
command, which is eval.py's own, scores the lists on the task's items. Not part of the test command: minutes a task.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime  # noqa: E402
from data.records import Example  # noqa: E402
from data.rows import encode_pairs  # noqa: E402
from data.tasks import Question, Task, find, plain_prompt, read_questions, tasks_named  # noqa: E402
from model import load_model  # noqa: E402
from recipe.measure import measure_costs, typical_costs  # noqa: E402
from recipe.orders import greedy_order  # noqa: E402
from recipe.passes import Workload  # noqa: E402
from recipe.places import skipped_places  # noqa: E402
from runtime import setting  # noqa: E402
from tokenizer import Tokenizer, load_tokenizer  # noqa: E402


@dataclass
class ListsConfig:
    model: str = field(metadata={"help": "checkpoint folder"})
    routers: str = field(metadata={"help": "router file whose places may be skipped"})
    data: str = setting("data/eval", "folder of the tasks' files")
    tasks: tuple[str, ...] = setting(("arc_easy", "arc_challenge", "piqa", "openbookqa", "boolq"), "of eval.py")
    examples: int = setting(64, "training rows of a task, drawn by the seed")
    budget: float = setting(0.5, "share of the places that run")
    out: str = setting("lists.json", "the lists, as --control=mean:FILE reads them")
    seed: int = 1337
    dtype: str = setting("auto", "auto, float32, bfloat16, float16")


def training_rows(task: Task, cfg: ListsConfig) -> list[Question]:
    """Questions of a task that eval.py does not score. Raises ValueError where all that it has are scored."""
    pool = find(Path(cfg.data), task.pool)
    if pool is None or pool == find(Path(cfg.data), task.files):
        raise ValueError(f"{task.name}: no training rows under {cfg.data}; expected one of {', '.join(task.pool)}: "
                         "fetch them, or leave the task out of --tasks")
    questions = read_questions(pool, task)
    order = runtime.permutation(len(questions), cfg.seed, "task lists", task.name)
    return [questions[number] for number in order[: cfg.examples]]


def solved(task: Task, question: Question, tok: Tokenizer) -> Example:
    """A question with its right answer, whose tokens are predicted."""
    context = plain_prompt(task, (), question.contexts[question.gold])
    ((asked, answer),), _ = encode_pairs(tok, [context], [f" {question.choices[question.gold]}"])
    tokens = [*asked, *answer]
    return Example(tokens, len(asked), range(len(asked), len(tokens)))


def main() -> None:
    cfg = runtime.cli(ListsConfig)
    rt = runtime.setup(dtype=cfg.dtype)
    model, tok = load_model(cfg.model, cfg.routers, dtype=rt.dtype), load_tokenizer(cfg.model)
    weights, names = model.place_shares(), model.routing.names
    results = {}
    for task in tasks_named(cfg.tasks):
        work = Workload(model, [solved(task, question, tok) for question in training_rows(task, cfg)], rt)
        prices = typical_costs(measure_costs(work, cfg.seed).costs) / model.place_weights()
        order = greedy_order(work, prices, 1 - cfg.budget)
        skipped = skipped_places(order, weights, 1 - cfg.budget)
        print(f"{task.name}: skips {', '.join(names[place] for place in skipped)}", flush=True)
        results[task.name] = {"capacity_per_layer": [float(place not in skipped) for place in range(len(names))]}
    runtime.write_json(cfg.out, {"settings": vars(cfg), "results": results})


if __name__ == "__main__":
    runtime.run_main(main)
