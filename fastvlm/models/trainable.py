"""Select trainable parameters by name patterns, keep frozen modules in eval mode, and add LoRA adapters."""

from __future__ import annotations

import difflib
import re
from fnmatch import fnmatchcase

import torch
from torch import nn


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches: `llm` covers everything below llm, `llm.*.q_proj.weight` globs the whole name."""
    return name == pattern or name.startswith(pattern + ".") or fnmatchcase(name, pattern)


SETTINGS = ("lr", "weight_decay", "warmup_steps")
Rate = float | dict[str, float | None] | None


def select_trainable(model: nn.Module, patterns: dict[str, Rate], *, where: str = "trainable") -> dict[str, float]:
    """Map each trainable parameter's name to its learning rate. The longest matching pattern decides; null freezes.

    Raises:
        ValueError: a pattern matches no parameter, or nothing is trainable. Naming a part without parameters (such as
            pooling) is allowed, so a stage's patterns need not change when a part is exchanged.
    """
    return {name: settings["lr"] for name, settings in select_settings(model, patterns, where=where).items()}


def select_settings(
    model: nn.Module, patterns: dict[str, Rate], *, where: str = "trainable"
) -> dict[str, dict[str, float]]:
    """Map each trainable parameter's name to the settings of its pattern; see `select_trainable`.

    Args:
        patterns: pattern -> learning rate, null, or a mapping `{lr, weight_decay, warmup_steps}`.

    Returns:
        name -> `lr` and, where set, `weight_decay` and `warmup_steps`.
    """
    names = [name for name, _ in model.named_parameters()]
    bare = {name for name, child in model.named_children() if not any(True for _ in child.parameters())}
    values = {pattern: read_settings(value, where=f"{where}.{pattern}") for pattern, value in patterns.items()}
    for pattern in patterns:
        if pattern not in bare and not any(matches(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, sorted({n.split(".")[0] for n in names} | set(names)), 1, 0.4)
            hint = f"; the nearest name is {near[0]}" if near else ""
            raise ValueError(f"{where}: the pattern {pattern!r} matches no parameter of the model{hint}")
    chosen = {}
    for name in names:
        hits = [pattern for pattern in patterns if matches(name, pattern)]
        settings = values[max(hits, key=len)] if hits else None
        if settings is not None:
            chosen[name] = settings
    if not chosen:
        raise ValueError(f"{where} leaves nothing to learn; name a part with a learning rate, such as projector: 1e-3")
    return chosen


def read_settings(value: Rate, *, where: str) -> dict[str, float] | None:
    """Return a pattern's value as a mapping of settings; None means frozen.

    Raises:
        ValueError: an unknown key, or a mapping without `lr`.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        return {"lr": float(value)}
    if unknown := [key for key in value if key not in SETTINGS]:
        raise ValueError(f"{where}.{unknown[0]} is not one of {', '.join(SETTINGS)}")
    if value.get("lr") is None:
        raise ValueError(f"{where} has no lr; give one, or null in place of the mapping to freeze")
    given = {key: value[key] for key in SETTINGS if value.get(key) is not None}
    return {key: int(v) if key == "warmup_steps" else float(v) for key, v in given.items()}


def apply_trainable(model: nn.Module, rates: dict[str, float]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in rates)
        parameter.grad = None


def set_mode(module: nn.Module, training: bool) -> None:
    """Set train mode, but keep modules whose parameters are all frozen in eval mode, BatchNorm and dropout included."""
    own = list(module.parameters())
    if own and not any(p.requires_grad for p in own):
        module.eval()
        return
    module.training = training
    for child in module.children():
        set_mode(child, training)


LISTS = ("layers", "h", "blocks", "resblocks", "stages")


def named_layers(part: nn.Module) -> dict[str, nn.Module]:
    """Return a part's outermost list of layers by name: decoder layers, or an encoder's blocks or stages."""
    for name, child in part.named_modules():
        if isinstance(child, nn.ModuleList | nn.Sequential) and name.split(".")[-1] in LISTS:
            # Entries without parameters (such as an identity between two stages) do not count as layers.
            return {f"{name}.{i}": one for i, one in enumerate(child) if any(True for _ in one.parameters())}
    return {}


def layers_of(part: nn.Module) -> list[nn.Module]:
    return list(named_layers(part).values())


def last_layers(part: nn.Module, num: int, *, where: str = "last_layers") -> list[str]:
    """Return the names of a part's last `num` layers, relative to the part.

    Raises:
        ValueError: the part has no list of layers, or fewer than `num`.
    """
    names = list(named_layers(part))
    if not names:
        raise ValueError(f"{where}: no list of layers found in {type(part).__name__}")
    if num > len(names):
        what = "the language model" if where.endswith("last_layers") else type(part).__name__
        raise ValueError(f"{where}.num={num}, but {what} has {len(names)} layers")
    return names[len(names) - num :]


def adaptable(module: nn.Module) -> dict[str, type]:
    """Map the name of every layer that can take an adapter to its type."""
    # nn.MultiheadAttention reads out_proj.weight without calling its forward, so an adapter there would have no effect.
    hidden = {id(m.out_proj) for m in module.modules() if isinstance(m, nn.MultiheadAttention)}
    found = {}
    for name, m in module.named_modules():
        # The feed-forward layers of FastViT and ConvNeXt are 1 x 1 convolutions. Those of other names often have their
        # weights read without calling forward (to fold a norm into them), so an adapter would have no effect.
        pointwise = isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and name.split(".")[-1] in ("fc1", "fc2")
        if (isinstance(m, nn.Linear | nn.MultiheadAttention) or pointwise) and id(m) not in hidden:
            found[name] = type(m)
    return found


def add_lora(
    module: nn.Module,
    *,
    r: int,
    alpha: float,
    dropout: float,
    targets: list[str] | None,
    dora: bool = False,
    where: str = "lora",
):
    """Add peft's LoRA layers to `module` in place and return the tuner, which `merge_lora` takes.

    Args:
        targets: last components of layer names; None: all layers of `adaptable` except the output head.
        dora: use DoRA, which also learns magnitudes.

    Raises:
        ValueError: no layer matches a target, or no layer can take an adapter.

    Source: Hu et al., arXiv:2106.09685; DoRA: Liu et al., arXiv:2402.09353; peft's `LoraModel`.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel
    from peft.tuners.tuners_utils import cast_adapter_dtype

    layers = adaptable(module)
    if targets is None:
        one = dict(module.named_modules())
        tables = {id(m.weight) for m in one.values() if isinstance(m, nn.Embedding)}
        if hasattr(module, "get_output_embeddings"):
            tables.add(id(getattr(module.get_output_embeddings(), "weight", None)))
        # peft has no DoRA for nn.MultiheadAttention.
        chosen = [n for n, kind in layers.items() if id(getattr(one[n], "weight", None)) not in tables]
        chosen = [n for n in chosen if not (dora and layers[n] is nn.MultiheadAttention)]
        if not chosen:
            raise ValueError(f"{where}: {type(module).__name__} has no layer that takes an adapter")
    else:
        last = {name.split(".")[-1] for name in layers}
        if missing := [t for t in targets if t not in last]:
            raise ValueError(
                f"{where}.targets: no linear layer is named {', '.join(missing)}; there are {', '.join(sorted(last))}"
            )
        chosen = [name for name in layers if name.split(".")[-1] in targets]
    options = dict(r=r, lora_alpha=alpha, lora_dropout=dropout, bias="none", use_dora=dora)
    # peft matches a string as a regex against whole names; a list would also match suffixes of other names.
    pattern = "|".join(re.escape(name) for name in chosen)
    tuner = LoraModel(module, LoraConfig(target_modules=pattern, **options), "default")
    # To float32, as PeftModel does: beside weights held in 16 bits adapters are, too, and small updates would be lost.
    cast_adapter_dtype(module, "default")
    return tuner


def merge_lora(tuner) -> None:
    """Merge the adapters into the weights they adapt and restore the module's original layers."""
    with torch.no_grad():
        tuner.merge_and_unload()
