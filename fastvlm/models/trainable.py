"""What learns: patterns over parameter names, applied once; what is frozen is also in eval mode."""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase

import torch
from torch import nn


def matches(name: str, pattern: str) -> bool:
    """`llm` matches everything below llm; `llm.*.q_proj.weight` is a glob over the whole name."""
    return name == pattern or name.startswith(pattern + ".") or fnmatchcase(name, pattern)


def select_trainable(
    model: nn.Module, patterns: dict[str, float | None], *, where: str = "trainable"
) -> dict[str, float]:
    """Parameter name -> learning rate; the longest pattern that matches a name decides, and null excludes.

    Raises:
        ValueError: a pattern matches no parameter, or nothing is left to learn. The name of a part that has no
            parameters (pooling) is fine: a stage's rates stay what they are when a part is exchanged.
    """
    names = [name for name, _ in model.named_parameters()]
    bare = {name for name, child in model.named_children() if not any(True for _ in child.parameters())}
    for pattern in patterns:
        if pattern not in bare and not any(matches(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, sorted({n.split(".")[0] for n in names} | set(names)), 1, 0.4)
            hint = f"; the nearest name is {near[0]}" if near else ""
            raise ValueError(f"{where}: the pattern {pattern!r} matches no parameter of the model{hint}")
    rates = {}
    for name in names:
        hits = [pattern for pattern in patterns if matches(name, pattern)]
        rate = patterns[max(hits, key=len)] if hits else None
        if rate is not None:
            rates[name] = float(rate)
    if not rates:
        raise ValueError(f"{where} leaves nothing to learn; name a part with a learning rate, such as projector: 1e-3")
    return rates


def apply_trainable(model: nn.Module, rates: dict[str, float]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in rates)
        parameter.grad = None


def set_mode(module: nn.Module, training: bool) -> None:
    """`train()` that leaves every module without a trainable parameter in eval, BatchNorm and dropout included."""
    own = list(module.parameters())
    if own and not any(p.requires_grad for p in own):
        module.eval()
        return
    module.training = training
    for child in module.children():
        set_mode(child, training)


def last_layers(llm: nn.Module, num: int, *, where: str = "last_layers") -> list[str]:
    """Names, below the language model, of its last `num` decoder layers."""
    for name, child in llm.named_modules():
        if isinstance(child, nn.ModuleList) and name.split(".")[-1] in ("layers", "h", "blocks"):
            if num > len(child):
                raise ValueError(f"{where}.num={num}, but the language model has {len(child)} layers")
            return [f"{name}.{i}" for i in range(len(child) - num, len(child))]
    raise ValueError(f"{where}: no list of decoder layers found in {type(llm).__name__}")


def add_lora(module: nn.Module, *, r: int, alpha: float, dropout: float, targets: list[str], where: str = "lora"):
    """Put peft's LoRA layers into `module` in place and return the tuner, which `merge_lora` takes.

    Source: Hu et al., arXiv:2106.09685; peft's `LoraModel`.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    linear = {name.split(".")[-1] for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    if missing := [t for t in targets if t not in linear]:
        raise ValueError(
            f"{where}.targets: no linear layer is named {', '.join(missing)}; there are {', '.join(sorted(linear))}"
        )
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), bias="none")
    return LoraModel(module, config, "default")


def merge_lora(tuner) -> None:
    """Fold the adapters into the weights they adapt; the module has its original layers again."""
    with torch.no_grad():
        tuner.merge_and_unload()
