"""What a run leaves in its folder, so that it goes on where it was killed: checkpoint.safetensors and log.jsonl."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import runtime
from recipe.run import Job, Run, State, build, put
from router import RouterConfig, set_cuts
from runtime import collect, print0, wait_for_all

MADE = ("routers.safetensors", "adapter_model.safetensors", "summary.json")  # by the end of a run


def tensors_of(run: Run) -> dict[str, Tensor]:
    """What a checkpoint keeps of a run, by name: trained weights, the best ones, the optimizers' moments, inputs."""
    kept = {**run.weights, **{f"best.{name}": w for name, w in run.best.items()}}
    for optimizer in run.optimizers:
        for name, w in run.weights.items():
            kept |= {f"{moment}.{name}": value for moment, value in optimizer.state.get(w, {}).items()}
    return kept if run.inputs is None else {**kept, "inputs": run.inputs}


def save_checkpoint(run: Run, path: Path) -> None:
    """Write the checkpoint atomically: the run's tensors, and State as JSON."""
    about = {"state": asdict(run.state), "identity": run.identity}
    data = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors_of(run).items()},
        metadata={name: json.dumps(value) for name, value in about.items()},
    )
    runtime.write_atomic(path, lambda p: p.write_bytes(data))


def read_checkpoint(path: Path) -> tuple[State, dict, dict[str, Tensor]]:
    """State, identity and tensors of a checkpoint. Raises ValueError for one that cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            about = {name: json.loads(file.metadata()[name]) for name in ("state", "identity")}
            # cloned: mapped tensors begin at any address, and the last bit of a product depends on it
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        return State(**about["state"]), about["identity"], tensors
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint ({error!r}): delete it, or begin anew with "
                         "--overwrite") from None


def resume(job: Job, saved: tuple[State, dict]) -> Run:
    """The run whose state and tensors a checkpoint holds."""
    state, tensors = saved
    places = tuple(map(tuple, state.routing["places"]))
    job.model.add_routers(RouterConfig(**{**state.routing, "places": places}))
    run = build(job, job.workload(), state, tensors.get("inputs"))
    kept = tensors_of(run)
    put(kept.values(), [tensors[name] for name in kept])
    set_cuts(job.model, state.cut)
    print0(f"going on from step {state.step} of {job.cfg.steps}")
    return run


def clean_up(log: Path, step: int) -> None:
    """Remove what a killed run left of steps that are done again."""
    lines = []
    for line in log.read_text().splitlines() if log.exists() else ():
        try:
            done = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):  # torn by a kill
            done = False
        if done:
            lines.append(line + "\n")
    runtime.write_atomic(log, lambda p: p.write_text("".join(lines)))


def stored_dtype(cfg) -> str:
    """The dtype that --dtype=auto stood for when the run began: a resumed one keeps it, whatever the processor."""
    if cfg.train == "full":
        return "float32"
    checkpoint = Path(cfg.out) / "checkpoint.safetensors"
    if cfg.dtype == "auto" and checkpoint.exists() and not cfg.overwrite:
        return read_checkpoint(checkpoint)[0].dtype
    return cfg.dtype


def claim(job: Job) -> tuple[dict | None, tuple | None]:
    """What --out holds of this very run: its summary if it is finished, state and tensors if it has begun.

    Raises ValueError, naming every setting that differs, when another run lies there, and where ranks see different
    folders.
    """
    out, now, saved = Path(job.cfg.out), job.identity, None
    checkpoint = out / "checkpoint.safetensors"
    for half_written in out.rglob(".*.tmp") if job.rt.is_master else ():
        half_written.unlink()
    if job.cfg.overwrite and job.rt.is_master:
        for name in ("checkpoint.safetensors", "log.jsonl", *MADE):
            (out / name).unlink(missing_ok=True)
        job.end_journals()
    wait_for_all(job.rt)
    summary = finished(out, "adapter_model" if job.cfg.train == "lora" else "routers")
    if summary is not None:
        refuse_other(out, summary.get("identity", {}), now)
    elif checkpoint.exists():
        state, theirs, tensors = read_checkpoint(checkpoint)
        refuse_other(out, theirs, now)
        saved = (state, tensors)
    seen = "a finished run" if summary else f"step {saved[0].step}" if saved else "nothing"
    everyone = collect([(job.rt.rank, seen)], job.rt)  # and from here on the master writes
    if len(set(everyone)) > 1:
        raise ValueError(f"the ranks find in {out}: {', '.join(everyone)}; expected the same: give an --out on a disk "
                         "that all machines share")
    return summary, saved


def refuse_other(out: Path, saved: dict, now: dict) -> None:
    """Raise ValueError naming every setting in which a run differs from the one that lies in its folder."""
    names = [name for name in sorted({*saved, *now}) if saved.get(name) != now.get(name)]
    if names:
        differing = ", ".join(f"{name} ({saved.get(name)!r} there, {now.get(name)!r} now)" for name in names)
        raise ValueError(f"{out} holds a run with other settings: {differing}; expected the same ones to go on: give "
                         "another --out, or --overwrite to begin anew")


def finished(out: Path, made: str) -> dict | None:
    """The summary of a finished run; None where it is missing or damaged, or what the run made."""
    summary, made = out / "summary.json", out / f"{made}.safetensors"
    if not (summary.exists() and made.exists()):
        return None
    try:
        with safe_open(made, framework="pt"):  # reads where the file must end
            return dict(runtime.read_json(summary))
    except (SafetensorError, ValueError, TypeError) as error:
        print0(f"{out} holds a finished run that is damaged ({error}): its end is written again")
        return None
