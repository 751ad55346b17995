"""Score a finished run on one task or several.

python eval.py checkpoint=runs/latest task=embedded
python eval.py checkpoint=runs/latest task=[vqav2,textvqa,chartqa] task.limit=1000
python eval.py checkpoint=runs/latest task=vqav2 predictions=answers.json    score answers stored in a file
"""

from functools import partial
from pathlib import Path

from fastvlm.config import command, compose_each, take_list


def evaluate(config, *, names=()):
    from fastvlm.build import build_task, build_transform, ensure_embedded, instantiate, load_run, load_tokenizer
    from fastvlm.callbacks.handoff import write_json
    from fastvlm.evaluation.progress import Progress
    from fastvlm.evaluation.ranks import find_ranks, start_ranks
    from fastvlm.evaluation.short_answers import ShortAnswers

    hardware = instantiate(config.hardware, key="hardware")
    hardware.apply()
    configs = compose_each(config, "task", names)
    for each in configs.values():
        ensure_embedded(each)
    tasks = {name: build_task(each.task) for name, each in configs.items()}
    alike = [name for name, task in tasks.items() if isinstance(task, ShortAnswers)]
    if len(alike) > 1:
        raise ValueError(
            f"task=[{','.join(tasks)}]: {' and '.join(alike)} write the same metrics and files; evaluate them one by "
            "one, each with its own out=<folder>"
        )
    for task in tasks.values() if not config.predictions else ():
        if hasattr(task, "require_shards"):  # of the last one too, before the first is answered for hours
            task.require_shards()
    out = Path(config.out or Path(config.checkpoint) / "eval")
    ranks = find_ranks(hardware.num_ranks)
    split = [task for task in tasks.values() if hasattr(task, "predict")] if not config.predictions else []
    if ranks.rank is None and split:
        if hardware.num_nodes > 1:
            raise ValueError(
                f"hardware.num_nodes={hardware.num_nodes}: one process starts no ranks on other machines; "
                "give the command to srun or torchrun, a task a device"
            )
        start_ranks(ranks.count)
    if ranks.rank == 0 and ranks.count < hardware.num_ranks:
        print(f"{ranks.count} of {hardware.num_ranks} ranks were started; they answer all", flush=True)
    if config.predictions or (ranks.rank is None and len(split) == len(tasks)):
        tokenizer = load_tokenizer(config.checkpoint)
    else:
        device = f"{hardware.device}:{ranks.local}" if hardware.device == "cuda" else hardware.device
        model, tokenizer, run = load_run(config.checkpoint, device=device)
        answer = {"image_size": run.image_size, "transform": build_transform(run), "device": device}
    results = {}
    for name, task in tasks.items():
        if config.predictions:
            if not hasattr(task, "score_file"):
                raise ValueError(f"predictions=...: task {name} is scored with its model alone")
            result = task.score_file(config.predictions, tokenizer, out=out)
        elif hasattr(task, "predict"):
            if ranks.rank is not None:
                with Progress(name, shown=ranks.rank == 0) as progress:
                    share = {"rank": ranks.rank, "num_ranks": ranks.count, "progress": progress}
                    task.predict(model, tokenizer, **answer, out=out, **share)
            if ranks.collects:
                answered = task.collect(out, wait=None if ranks.rank is None else 3600)
                result = task.score(answered, tokenizer=tokenizer, out=out)
        elif ranks.collects:
            result = task.run(model, tokenizer, **answer, out=out)
        if ranks.collects:
            result["predictions"] = result.pop("examples", [])  # all of them are in predictions/
            print(task.render(result), flush=True)
            write_json(out / f"{name}.json", result)  # now: a later task may fail
            results[name] = result
    if not ranks.collects:
        return None
    [only] = results.values() if len(results) == 1 else [None]
    metrics = {key: value for result in results.values() for key, value in result["metrics"].items()}
    write_json(out / "results.json", only or {"metrics": metrics, "tasks": list(results)})
    print(f"results: {out / 'results.json'}")
    return metrics.get("test/exact_match/mean", next(iter(metrics.values())))


if __name__ == "__main__":
    command("eval", partial(evaluate, names=take_list("task")))
