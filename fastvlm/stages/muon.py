"""Muon for hidden matrices, AdamW for everything else, as one optimiser."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` on the groups whose `kind` is "matrix", `torch.optim.AdamW` on the rest.

    Muon orthogonalises the momentum of a matrix; embeddings, heads, convolutions, vectors and adapters stay with AdamW.
    Its step is scaled to AdamW's usual size, so one learning rate serves both. Source: Jordan et al.,
    https://kellerjordan.github.io/posts/muon/; the scaling: Liu et al., arXiv:2502.16982, section 2.2.

    Args:
        params: groups as `Stage.configure_optimizers` makes them, each with `kind`.
        betas, weight_decay: AdamW's; the weight decay is Muon's too.
        momentum: Muon's, with Nesterov's look-ahead.
    """

    def __init__(
        self,
        params: Iterable[dict],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] | list[float] = (0.9, 0.98),
        weight_decay: float = 0.05,
        momentum: float = 0.95,
    ):
        groups = [{"lr": lr, "weight_decay": weight_decay, **group} for group in params]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.inner = []
        matrices = [g for g in self.param_groups if g.get("kind") == "matrix"]
        others = [g for g in self.param_groups if g.get("kind") != "matrix"]
        if matrices:
            self.inner.append(torch.optim.Muon(matrices, momentum=momentum, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.inner.append(torch.optim.AdamW(others, betas=tuple(betas)))
        self.share()

    def share(self) -> None:
        """Let both inner optimisers share this one's state and groups, so that a schedule that sets a rate here sets it
        there, and the saved state has the form of any optimiser's."""
        for optimizer in self.inner:
            ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
            optimizer.param_groups = [g for g in self.param_groups if ours.issuperset(map(id, g["params"]))]
            optimizer.state = self.state

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.inner:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.share()
