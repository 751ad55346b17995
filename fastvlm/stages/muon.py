"""One optimiser that uses Muon for hidden matrices and AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` for groups whose `kind` is "matrix", `torch.optim.AdamW` for the rest.

    Muon orthogonalises the momentum of a matrix; embeddings, heads, convolutions, vectors and adapters use AdamW.
    Muon's step is scaled to AdamW's usual size, so one learning rate serves both. Source: Jordan et al.,
    https://kellerjordan.github.io/posts/muon/; for the scaling, Liu et al., arXiv:2502.16982, section 2.2.

    Args:
        params: parameter groups with `kind`, as built by `Stage.configure_optimizers`.
        betas: AdamW's coefficients.
        weight_decay: weight decay of both.
        momentum: Muon's Nesterov momentum.
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
        """Share this optimiser's state and groups with both inner ones.

        Learning rates set by a scheduler then reach them, and `state_dict` has an optimiser's usual format.
        """
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
