"""An encoder that an image may leave early: each of its stages can feed the language model, and a gate says which does.

The gates halt as PonderNet's (arXiv 2107.05407, section 2.1): with lambda_k the probability of leaving at exit k for
those that came so far, exit k is taken with p_k = lambda_k * prod_{j<k} (1 - lambda_j), the last with what is left. In
training an exit is drawn from p and learns straight through; what p is expected to cost is a loss of its own. In
inference an image leaves at the first exit with lambda_k above a threshold, and what stands behind is not computed.
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

MEASURED = ("vision_tokens", "vision_gflops", "exit")


class EarlyExitEncoder(nn.Module):
    """Patches of the encoder's end, or of an earlier stage through a head that brings them to the same width.

    An image that leaves at an exit with fewer tokens than the end has stands in the last of its N places; those before
    are zero, and the VLM hides them from attention and positions (`slots.py`), as it does for `token_select`.

    Args:
        encoder: has `stage_dims`, `stage_strides`, `advance` and `finish`: FastViT here, a timm model with stages.
        exits: stages, from 0, after which an image may leave; its end always is the last exit.
        num_tokens: tokens of each exit, square numbers; None: as many as the end has, which any resampler takes.
        threshold: an image leaves where its gate says more than this.
        cost_weight: of the expected share of the whole encoder's FLOPs in the loss, in nats a learned token.

    Attributes:
        drops_tokens: whether images may have fewer than N tokens.

    Raises:
        ValueError: an encoder without stages, exits that are not its stages in order, tokens that are no square or
            differ in number from the exits; (num_patches, forward) an exit with more tokens than the end.
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
        # At first every exit is as likely as any other: 1/K leave at the first, 1/(K-1) of the rest at the second, ...
        left = range(len(exits) + 1, 1, -1)
        self.gates = nn.ModuleList(gate(dims[stage], share=1 / k) for stage, k in zip(exits, left))
        self._twin = [meta_twin(self)]  # in a list, so that it is no part of the module
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
        """Tokens of an image that leaves at each exit, the end last."""
        whole = self.encoder.num_patches(image_size)
        tokens = [whole] * len(self.exits) if self.tokens is None else self.tokens
        if max(tokens) > whole:
            raise ValueError(
                f"encoder.num_tokens={self.tokens}, but the encoder's end has {whole} tokens at "
                f"image_size={image_size}; lower encoder.num_tokens or raise the stage's image_size"
            )
        return [*tokens, whole]

    def flops_at(self, image_size: int) -> list[int]:
        """FLOPs of an image that leaves at each exit, the end last; heads and gates included."""
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
                        # An image pays for one head, that of the exit it takes.
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
        """The last forward pass's own loss (nats a learned token; None where no gate learns) and its mean cost an
        image: tokens, GFLOPs, number of the exit. A second call finds nothing."""
        cost, measured = self._cost, self._measured
        self._cost, self._measured = None, {}
        return cost, measured

    def _all_exits(
        self, images: Float[Tensor, "I 3 H W"]
    ) -> tuple[Float[Tensor, "I N D"], Int[Tensor, "I"], Float[Tensor, "I K"]]:
        """Training: every stage is computed, one exit an image is taken."""
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
        weight = F.one_hot(taken, p.shape[1]) + (p - p.detach())  # exactly 0 and 1 in value, the gradient of p
        patches = sum(w[:, None, None].to(out.dtype) * out for w, out in zip(weight.unbind(1), outs))
        return patches, taken, p

    def _leave(self, images: Float[Tensor, "I 3 H W"]) -> tuple[Float[Tensor, "I N D"], Int[Tensor, "I"]]:
        """Inference: images leave the batch on the way."""
        n, x = self.num_patches(images.shape[-1]), images
        here = torch.arange(len(images), device=images.device)
        taken = torch.full_like(here, len(self.exits))
        if images.is_meta:  # without numbers nothing is decided: every image goes all the way
            for stage in range(len(self.encoder.stage_dims)):
                x = self.encoder.advance(stage, x)
            return rearrange(self.encoder.finish(x), "i d h w -> i (h w) d"), taken
        found: list[tuple[Tensor, Tensor]] = []
        for stage in range(len(self.encoder.stage_dims)):
            x = self.encoder.advance(stage, x)
            if stage in self.exits:
                i = self.exits.index(stage)
                leaves = self.gates[i](x.mean((2, 3))).squeeze(1).sigmoid() > self.threshold
                found.append((here[leaves], self._through_head(i, x[leaves], n)))
                taken[here[leaves]] = i
                x, here = x[~leaves], here[~leaves]
                if not len(here) and len(images):
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
        """Folds the encoder's branches, in place, for inference."""
        self.encoder.reparameterize()
        return self.eval()


def exit_probabilities(logits: Float[Tensor, "I E"]) -> Float[Tensor, "I K"]:
    """Probability of each exit and of the end, from the gates of those that come so far; each row sums to 1."""
    leave, stay = F.logsigmoid(logits), F.logsigmoid(-logits).cumsum(dim=1)
    before = F.pad(stay, (1, 0))  # log probability of coming to exit k
    return (before + F.pad(leave, (0, 1))).exp()


def cells(x: Float[Tensor, "I C h w"], side: int) -> Float[Tensor, "I M C"]:
    return rearrange(F.adaptive_avg_pool2d(x, side), "i c h w -> i (h w) c")


def exit_head(in_dim: int, out_dim: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))


def gate(dim: int, *, share: float) -> nn.Module:
    """A map's mean -> the logit of leaving here; `share` of the images at first."""
    linear = nn.Linear(dim, 1)
    nn.init.zeros_(linear.weight)
    nn.init.constant_(linear.bias, math.log(share / (1 - share)))
    return nn.Sequential(nn.LayerNorm(dim, elementwise_affine=False), linear)
