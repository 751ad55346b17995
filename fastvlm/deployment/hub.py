"""Export a run as a folder that `transformers` and other engines load.

python -m fastvlm.deployment.hub run=runs/latest out=exported             as a transformers class if one fits, else ours
python -m fastvlm.deployment.hub run=runs/latest out=exported form=ours   as our own class, with tokenizer and processor
python -m fastvlm.deployment.hub import=<folder> out=<folder>             convert an original LLaVA or ml-fastvlm model
python -m fastvlm.deployment.hub check=<folder>                           which engines load it, and why others do not
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from fastvlm.commands import run_command
from fastvlm.tokens import OWN

KEYS = ("run", "out", "form", "import", "check", "vision_tower")
PROCESSORS = {"AutoImageProcessor": "PartsVLMImageProcessor", "AutoProcessor": "PartsVLMProcessor"}
FORMS = ("auto", "ours", "stock")


def parse(arguments: list[str]) -> dict[str, str]:
    """Parse `key=value` arguments; `--check <folder>` means `check=<folder>`.

    Raises:
        ValueError: an argument of another form, or keys that do not go together.
    """
    import difflib

    out: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--check" and rest:
            argument = f"check={rest.pop(0)}"
        key, equals, value = argument.partition("=")
        if not equals or not value or key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1)
            hint = f"; did you mean {near[0]}=?" if near else ""
            raise ValueError(f"{argument} is not one of {', '.join(f'{k}=' for k in KEYS)}{hint}")
        out[key] = value
    given = [key for key in ("run", "import", "check") if key in out]
    if len(given) != 1:
        raise ValueError("give one of run=<run> out=<folder>, import=<folder> out=<folder>, check=<folder>")
    if given != ["check"] and "out" not in out:
        raise ValueError(f"{given[0]}={out[given[0]]} needs out=<folder>")
    if out.get("form", "auto") not in FORMS:
        raise ValueError(f"form={out['form']} is not one of {', '.join(FORMS)}")
    return out


def save_run(run: str, out: str, *, form: str = "auto") -> tuple[str, list[str]]:
    """Write a finished run's model to a folder; return the form it has there and how its inference differs.

    Args:
        form: `stock` (a class of transformers, or an error), `ours`, or `auto` (stock if a class fits, else ours).

    Raises:
        ValueError: no such run, a folder that is not empty, `form=stock` and no stock class fits, or `form=ours` and
            a pretrained model.
    """
    from omegaconf import OmegaConf

    from fastvlm.build import load_run
    from fastvlm.deployment.stock import NoStockClass, export_stock, prompt_notes
    from fastvlm.models.pretrained import PretrainedVLM

    folder = fresh_folder(out)
    model, tokenizer, config = load_run(run)
    config_dict = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    image = {key: value for key, value in (config_dict.get("image") or {}).items() if key != "augment"}
    parts = {name: (type(p).__name__, sum(x.numel() for x in p.parameters())) for name, p in model.parts.items()}
    kind, notes = "ours", []
    if isinstance(model, PretrainedVLM):
        if form == "ours":
            raise ValueError("form=ours: a pretrained model is saved in its own class of transformers; leave form out")
        kind = save_pretrained_vlm(model, tokenizer, config_dict, folder)
    else:
        stock = None
        if form != "ours":
            try:
                stock = export_stock(model, tokenizer, image_size=config.image_size, image=image)
            except NoStockClass as error:
                if form == "stock":
                    raise
                notes = [f"not saved as a class of transformers: {error}"]
        if stock is None:
            processor = save_ours(model, tokenizer, folder, image_size=config.image_size, image=image)
            notes += prompt_notes(processor, tokenizer, config.image_size)
        else:
            exported, processor, notes = stock
            exported.save_pretrained(folder)
            save_processor(processor, folder)
            kind = type(exported).__name__
    write_readme(folder, run, kind=kind, parts=parts, config=config_dict, notes=notes)
    return kind, notes


def save_ours(model, tokenizer, folder: str | Path, *, image_size: int, image: dict | None = None):
    """Save our own form: configuration, weights, tokenizer with chat template, processor, generation settings.

    Returns:
        The processor.
    """
    from transformers import GenerationConfig

    import fastvlm.auto  # noqa: F401
    from fastvlm.deployment.processing import PartsVLMImageProcessor, PartsVLMProcessor
    from fastvlm.deployment.stock import plain_tokenizer

    model.save_pretrained(folder, image_size=image_size, image=image)
    processor = PartsVLMProcessor(
        PartsVLMImageProcessor(image_size=image_size, image=image),
        plain_tokenizer(tokenizer),
        tokens_per_view=model.num_visual_tokens(image_size),
        image_token=tokenizer.image_token,
        chat_template=tokenizer.hf.chat_template,
    )
    save_processor(processor, folder)
    path = Path(folder) / "processor_config.json"
    auto = {auto: f"remote_code.{name}" for auto, name in PROCESSORS.items()}
    settings = json.loads(path.read_text())
    settings["auto_map"] = settings["image_processor"]["auto_map"] = auto  # each is read on its own
    path.write_text(json.dumps(settings, indent=2))
    code = Path(folder) / "remote_code.py"
    line = f"from fastvlm.deployment.processing import {', '.join(PROCESSORS.values())}  # noqa: F401\n"
    code.write_text(code.read_text() + line)
    ends = sorted({tokenizer.end_id, tokenizer.document_end_id})
    GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_id).save_pretrained(folder)
    return processor


def save_processor(processor, folder: str | Path) -> None:
    """Save a processor whose tokenizer adds no tokens, and say so in its settings: llama.cpp's converter asks them."""
    processor.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"add_bos_token": False, "add_eos_token": False}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False))


def save_pretrained_vlm(model, tokenizer, config: dict[str, Any], folder: Path) -> str:
    """Save a pretrained model in its own class, with its processor's files."""
    from fastvlm.models.pretrained.originals import original_config, processor_of

    if model._restore is None:
        raise ValueError("the traditional mode is two models and has no folder of one; name both: vlm=traditional")
    stock = model.restored()
    stock.save_pretrained(folder)
    path = config["vlm"]["path"]
    if original_config(path) is not None:  # such a folder has no processor's files
        processor_of(stock.config, path).save_pretrained(folder)
    else:
        copy_processor(path, folder)
    if tokenizer.template.name != OWN and tokenizer.template.image == ("", ""):
        tokenizer.save(folder)  # chat template and its tokens; the processor itself adds marks around images
    return type(stock).__name__


def copy_processor(path: str, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    source = Path(path) if Path(path).is_dir() else Path(snapshot_download(path, allow_patterns=["*.json", "*.jinja"]))
    for file in source.iterdir():
        weights = file.name == "config.json" or ".safetensors" in file.name or file.suffix in (".bin", ".md")
        if file.is_file() and not weights and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def fresh_folder(out: str) -> Path:
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"out={out} is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_readme(folder: Path, run: str, *, kind: str, parts: dict, config: dict, notes: list[str]) -> None:
    from fastvlm.deployment.card import write_card
    from fastvlm.deployment.engines import check_folder

    path = Path(run) / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    engines = [f"{'yes' if v.loads else 'no'} | {v.engine} | {v.why}" for v in check_folder(folder)]
    plain = dict(kind=kind, parts=parts, config=config, results=results, engines=engines, notes=notes)
    write_card(folder, name=folder.name, **plain)


def import_checkpoint(path: str, out: str, *, vision_tower: str | None = None) -> str:
    """Convert an original LLaVA or ml-fastvlm checkpoint to the format of transformers; return its class name."""
    from fastvlm.models.pretrained.originals import load_original, processor_of

    folder = fresh_folder(out)
    stock = load_original(path, vision_tower=vision_tower)
    stock.save_pretrained(folder)
    processor_of(stock.config, path).save_pretrained(folder)
    return type(stock).__name__


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return
    options = parse(arguments)
    if "check" in options:
        from fastvlm.deployment.engines import check_folder

        print("\n".join(map(str, check_folder(options["check"]))))
        return
    if "import" in options:
        kind, notes = import_checkpoint(options["import"], options["out"], vision_tower=options.get("vision_tower")), []
    else:
        kind, notes = save_run(options["run"], options["out"], form=options.get("form", "auto"))
    print(f"{options['out']}: {'fastvlm parts (import fastvlm.auto)' if kind == 'ours' else kind}")
    print("\n".join(f"note: {note}" for note in notes) or "no differences known")
    from fastvlm.deployment.engines import check_folder

    print("\n".join(map(str, check_folder(options["out"]))))


if __name__ == "__main__":
    run_command(main)
