"""Score a finished run on a task.

python eval.py checkpoint=runs/latest task=embedded
"""

from pathlib import Path

from fastvlm.config import command


def evaluate(config):
    from fastvlm.build import build_transform, ensure_embedded, instantiate, load_run
    from fastvlm.callbacks.handoff import write_json
    from fastvlm.pipeline import build_task

    hardware = instantiate(config.hardware, key="hardware")
    hardware.apply()
    ensure_embedded(config)
    model, tokenizer, run = load_run(config.checkpoint, device=hardware.device)
    task = build_task(config.task)
    out = Path(config.out or Path(config.checkpoint) / "eval")
    images = {"image_size": run.image_size, "transform": build_transform(run)}
    results = task.run(model, tokenizer, **images, device=hardware.device, out=out)
    results["predictions"] = results.pop("examples", [])  # all of them are in predictions/
    write_json(out / "results.json", results)
    print(task.render(results))
    print(f"results: {out / 'results.json'}")
    return results["metrics"].get("test/exact_match/mean")


if __name__ == "__main__":
    command("eval", evaluate)
