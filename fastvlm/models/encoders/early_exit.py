"""An early-exit encoder: each of its stages can feed the language model, and learned gates choose which one does.

The gates follow PonderNet (arXiv 2107.05407, section 2.1): with lambda_k the probability of leaving at exit k for
images that reach it, exit k is taken with p_k = lambda_k * prod_{j<k} (1 - lambda_j), and the last exit with the
remaining probability. In training an exit is sampled from p with a straight-through gradient, and the expected compute
under p is an extra loss. In inference an image leaves at the first exit with lambda_k above a threshold, and the later
stages are not computed for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from fastvlm.models.encoders.multi_scale import stages_of
from fastvlm.models.flops import counting, meta_twin
from fastvlm.models.pieces import is_shard

MEASURED = ("vision_tokens", "vision_gflops", "exit")


class EarlyExitEncoder(nn.Module):
    """Encoder whose images may leave after an earlier stage, through a head that maps to the final width.

    If an exit has fewer tokens than the encoder's end, they take the last of the N positions. The positions before them
    are zero, and the VLM hides them from attention and positions (`slots.py`), as it does for `token_select`.

    Args:
        encoder: has `stage_dims`, `stage_strides`, `advance` and `finish`, as `FastViT` and timm models with stages do.
        exits: stages, counted from 0, after which an image may leave; the encoder's end is always the last exit.
        num_tokens: tokens of each exit, square numbers; None: as many as at the end, which any resampler accepts.
        threshold: in inference an image leaves where its gate's probability exceeds this.
        cost_weight: weight in the loss, in nats per learned token, of the expected share of the whole encoder's FLOPs.

    Attributes:
        drops_tokens: whether images may have fewer than N tokens.

    Raises:
        ValueError: the encoder has no stages, `exits` are not earlier stages in order, or `num_tokens` are not one
            square number per exit; (num_patches, forward) an exit has more tokens than the end.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        exits: Sequence[int],
        num_tokens: Sequence[int] | None = None,
        threshold: float = 0.5,
        cost_weight: float = 0.05,
    ):
        super().__init__()
        dims, _ = stages_of(encoder)
        exits = list(exits)
        if not exits or exits != sorted(set(exits)) or exits[0] < 0 or exits[-1] >= len(dims) - 1:
            raise ValueError(f"encoder.exits={exits} must be some of the stages 0 to {len(dims) - 2}, in order")
        if num_tokens is not None and len(num_tokens) != len(exits):
            raise ValueError(f"encoder.num_tokens has {len(num_tokens)} numbers for {len(exits)} exits")
        for number in num_tokens or ():
            if number < 1 or math.isqrt(number) ** 2 != number:
                raise ValueError(f"encoder.num_tokens: {number} is not a square number")
        if not 0 <= threshold <= 1:
            raise ValueError(f"encoder.threshold={threshold} must be between 0 and 1")
        self.encoder, self.exits, self.threshold, self.cost_weight = encoder, exits, threshold, cost_weight
        self.tokens = None if num_tokens is None else list(num_tokens)
        self.out_dim, self.stride, self.mean, self.std = encoder.out_dim, encoder.stride, encoder.mean, encoder.std
        self.heads = nn.ModuleList(exit_head(dims[stage], encoder.out_dim) for stage in exits)
        # All K exits start equally likely: 1/K leave at the first, 1/(K-1) of the rest at the second, ...
        left = range(len(exits) + 1, 1, -1)
        self.gates = nn.ModuleList(gate(dims[stage], share=1 / k) for stage, k in zip(exits, left))
        self._twin = [meta_twin(self)]  # in a list, so that it is not registered as a submodule
        self._flops: dict[int, list[int]] = {}
        self._cost: Tensor | None = None
        self._measured: dict[str, Tensor] = {}

    @property
    def drops_tokens(self) -> bool:
        return self.tokens is not None

    def grid(self, image_size: int) -> tuple[int, int]:
        return self.encoder.grid(image_size)

    def num_patches(self, image_size: int) -> int:
        self.tokens_at(image_size)
        return self.encoder.num_patches(image_size)

    def tokens_at(self, image_size: int) -> list[int]:
        """Return the number of tokens at each exit, the encoder's end last."""
        whole = self.encoder.num_patches(image_size)
        tokens = [whole] * len(self.exits) if self.tokens is None else self.tokens
        if max(tokens) > whole:
            raise ValueError(
                f"encoder.num_tokens={self.tokens}, but the encoder's end has {whole} tokens at "
                f"image_size={image_size}; lower encoder.num_tokens or raise the stage's image_size"
            )
        return [*tokens, whole]

    def flops_at(self, image_size: int) -> list[int]:
        """Return the FLOPs of an image at each exit, the encoder's end last, including heads and gates."""
        if image_size not in self._flops:
            twin, found = self._twin[0], []
            side = math.isqrt(self.encoder.num_patches(image_size))
            sides = [math.isqrt(n) for n in self.tokens] if self.tokens else [side] * len(self.exits)
            with counting() as so_far:
                x, heads = torch.zeros(1, 3, image_size, image_size, device="meta"), 0
                for stage in range(len(twin.encoder.stage_dims)):
                    x = twin.encoder.advance(stage, x)
                    if stage in self.exits:
                        i = self.exits.index(stage)
                        twin.gates[i](x.mean((2, 3)))
                        before = so_far()
                        twin.heads[i](cells(x, sides[i]))
                        # An image runs only the head of the exit it takes.
                        found.append(so_far() - heads)
                        heads += so_far() - before
                twin.encoder.finish(x)
                found.append(so_far() - heads)
            self._flops[image_size] = found
        return self._flops[image_size]

    def forward(self, images: Float[Tensor, "I 3 H W"]) -> Float[Tensor, "I N D"]:
        for size in images.shape[-2:]:
            self.grid(size)
        learns = self.training and torch.is_grad_enabled() and any(p.requires_grad for p in self.gates.parameters())
        patches, taken, p = self._all_exits(images) if learns else (*self._leave(images), None)
        size = images.shape[-1]
        flops = torch.tensor(self.flops_at(size), dtype=torch.float64).to(images.device, torch.float32)
        tokens = torch.tensor(self.tokens_at(size), device=images.device, dtype=torch.float32)
        self._cost = None if p is None else self.cost_weight * (p @ (flops / flops[-1])).mean()
        means = (tokens[taken].mean(), flops[taken].mean() / 1e9, taken.float().mean())
        self._measured = dict(zip(MEASURED, means))
        return patches

    def take_auxiliary(self) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return and clear the last forward pass's cost loss and its mean cost per image.

        Returns:
            The loss (nats per learned token; None if no gate is trained), and the means of `MEASURED`: tokens, GFLOPs,
            index of the exit. Without a forward pass since the last call None and NaN: ranks add up the same names.
        """
        cost, measured = self._cost, self._measured or {name: torch.tensor(torch.nan) for name in MEASURED}
        self._cost, self._measured = None, {}
        return cost, measured

    def _all_exits(
        self, images: Float[Tensor, "I 3 H W"]
    ) -> tuple[Float[Tensor, "I N D"], Int[Tensor, "I"], Float[Tensor, "I K"]]:
        """Run all stages and sample one exit per image (training)."""
        x, outs, logits = images, [], []
        n = self.num_patches(images.shape[-1])
        for stage in range(len(self.encoder.stage_dims)):
            x = self.encoder.advance(stage, x)
            if stage in self.exits:
                i = self.exits.index(stage)
                outs.append(F.pad(self._through_head(i, x, n), (0, 0, n - self._num(i, n), 0)))
                logits.append(self.gates[i](x.mean((2, 3))).squeeze(1))
        outs.append(rearrange(self.encoder.finish(x), "i d h w -> i (h w) d"))
        p = exit_probabilities(torch.stack(logits, dim=1).float())
        taken = torch.multinomial(p.detach(), 1).squeeze(1)
        weight = F.one_hot(taken, p.shape[1]) + (p - p.detach())  # values exactly 0 and 1, gradient of p
        patches = sum(w[:, None, None].to(out.dtype) * out for w, out in zip(weight.unbind(1), outs))
        return patches, taken, p

    def _leave(self, images: Float[Tensor, "I 3 H W"]) -> tuple[Float[Tensor, "I N D"], Int[Tensor, "I"]]:
        """Remove images from the batch as they leave (inference)."""
        n, x = self.num_patches(images.shape[-1]), images
        here = torch.arange(len(images), device=images.device)
        taken = torch.full_like(here, len(self.exits))
        if images.is_meta:  # gates have no values to compare: run every image to the end
            for stage in range(len(self.encoder.stage_dims)):
                x = self.encoder.advance(stage, x)
            return rearrange(self.encoder.finish(x), "i d h w -> i (h w) d"), taken
        # All ranks gather the shards of all stages, so none may leave one out.
        shared = any(is_shard(p) for p in self.parameters())
        found: list[tuple[Tensor, Tensor]] = []
        for stage in range(len(self.encoder.stage_dims)):
            x = self.encoder.advance(stage, x)
            if stage in self.exits:
                i = self.exits.index(stage)
                leaves = self.gates[i](x.mean((2, 3))).squeeze(1).sigmoid() > self.threshold
                found.append((here[leaves], self._through_head(i, x[leaves], n)))
                taken[here[leaves]] = i
                x, here = x[~leaves], here[~leaves]
                if not len(here) and len(images) and not shared:
                    break
        else:
            found.append((here, rearrange(self.encoder.finish(x), "i d h w -> i (h w) d")))
        patches = images.new_zeros(len(images), n, self.out_dim, dtype=found[-1][1].dtype)
        for index, out in found:
            patches[index, n - out.shape[1] :] = out.to(patches.dtype)
        return patches, taken

    def _num(self, i: int, n: int) -> int:
        return n if self.tokens is None else self.tokens[i]

    def _through_head(self, i: int, x: Float[Tensor, "I C h w"], n: int) -> Float[Tensor, "I M D"]:
        return self.heads[i](cells(x, math.isqrt(self._num(i, n))))

    def reparameterize(self) -> EarlyExitEncoder:
        """Fold the encoder's branches in place for inference."""
        self.encoder.reparameterize()
        return self.eval()


def exit_probabilities(logits: Float[Tensor, "I E"]) -> Float[Tensor, "I K"]:
    """Turn gate logits into the probability of each exit and of the end; each row sums to 1."""
    leave, stay = F.logsigmoid(logits), F.logsigmoid(-logits).cumsum(dim=1)
    before = F.pad(stay, (1, 0))  # log probability of reaching exit k
    return (before + F.pad(leave, (0, 1))).exp()


def cells(x: Float[Tensor, "I C h w"], side: int) -> Float[Tensor, "I M C"]:
    return rearrange(F.adaptive_avg_pool2d(x, side), "i c h w -> i (h w) c")


def exit_head(in_dim: int, out_dim: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))


def gate(dim: int, *, share: float) -> nn.Module:
    """Build a gate from a map's mean to the logit of leaving; initially the probability is `share`."""
    linear = nn.Linear(dim, 1)
    nn.init.zeros_(linear.weight)
    nn.init.constant_(linear.bias, math.log(share / (1 - share)))
    return nn.Sequential(nn.LayerNorm(dim, elementwise_affine=False), linear)
