"""Token selection: a learned score decides which patches the language model reads.

The scorer is DynamicViT's (arXiv 2106.02034, section 3.2), on features of the patch and of the whole image. The choice
is a hard top-k; its gradient is that of the entropy-regularised top-k, whose mask is a sigmoid around one threshold per
image (the two-state optimal transport of arXiv 2002.06504).
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from fastvlm.models.resamplers.counts import check_at_most, check_positive, side_of
from fastvlm.models.resamplers.positions import GridPositions

GRADIENTS = ("straight_through", "soft")


class TokenSelectResampler(nn.Module):
    """Keeps the patches with the highest learned scores, in reading order.

    With `min_tokens` the number varies per view: the fewest patches that hold `coverage` of the scores' softmax,
    between `min_tokens` and `num_tokens`. The data plan cannot know it before pixels are read, so a view keeps
    `num_tokens` slots in the text: its tokens take the last ones and the slots before them are zero. The VLM hides zero
    slots from attention and positions, which gives the same logits as removing them; generation does remove them.

    Args:
        num_tokens: visual tokens per view; the maximum if `min_tokens` is set.
        min_tokens: smallest number of visual tokens per view; None: every view has `num_tokens`.
        coverage: share of the scores' softmax that the kept patches must reach; only with `min_tokens`.
        gradient: `straight_through` passes the chosen patches unchanged, with the gradient of patches weighted by the
            soft mask; `soft` does weight them by it.
        temperature: temperature of the soft mask and of the softmax, in units of the score.
        positions: side of the grid of learned positions added to the patches, interpolated for other grids; 0: none.

    Attributes:
        mean_kept: mean number of tokens kept per view in the last forward pass.

    Raises:
        ValueError: `num_tokens` and `min_tokens` do not fit each other or the number of patches, or another argument is
            out of range.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        num_tokens: int,
        min_tokens: int | None = None,
        coverage: float = 0.9,
        gradient: str = "straight_through",
        temperature: float = 1.0,
        positions: int = 24,
    ):
        super().__init__()
        check_positive(num_tokens)
        if min_tokens is not None and not 1 <= min_tokens <= num_tokens:
            raise ValueError(f"resampler.min_tokens={min_tokens} must be between 1 and num_tokens={num_tokens}")
        if not 0 < coverage <= 1:
            raise ValueError(f"resampler.coverage={coverage} must be above 0 and at most 1")
        if gradient not in GRADIENTS:
            raise ValueError(f"resampler.gradient={gradient} is not one of {', '.join(GRADIENTS)}")
        if temperature <= 0:
            raise ValueError(f"resampler.temperature={temperature} must be above 0")
        self.num_tokens, self.min_tokens, self.out_dim = num_tokens, min_tokens, in_dim
        self.coverage, self.gradient, self.temperature = coverage, gradient, temperature
        self.positions = GridPositions(positions, in_dim) if positions else None
        hidden = max(8, in_dim // 4)
        self.local = nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, 2 * hidden), nn.GELU())
        # No final bias: a constant added to every score does not change the choice.
        self.score = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.GELU(), nn.Linear(hidden, 1, bias=False))
        self.mean_kept = torch.tensor(float("nan"))

    @property
    def drops_tokens(self) -> bool:
        return self.min_tokens is not None

    def num_tokens_out(self, num_patches: int) -> int:
        if self.positions is not None:
            side_of(num_patches)
        return check_at_most(self.num_tokens, num_patches)

    def scores(self, patches: Float[Tensor, "I N D"]) -> Float[Tensor, "I N"]:
        own, whole = self.local(patches).chunk(2, dim=-1)
        whole = whole.mean(dim=1, keepdim=True).expand_as(own)
        scores = self.score(torch.cat([own, whole], dim=-1)).squeeze(-1)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def counts(self, scores: Float[Tensor, "I N"]) -> Int[Tensor, "I"]:
        """Return how many patches each view keeps."""
        if self.min_tokens is None:
            return torch.full(scores.shape[:1], self.num_tokens, device=scores.device)
        shares = (scores.detach() / self.temperature).softmax(dim=1).topk(self.num_tokens).values
        enough = (shares.cumsum(dim=1) < self.coverage).sum(dim=1) + 1
        return enough.clamp(self.min_tokens, self.num_tokens)

    def forward(self, patches: Float[Tensor, "I N D"]) -> Float[Tensor, "I M D"]:
        self.num_tokens_out(patches.shape[1])
        if self.positions is not None:
            patches = self.positions(patches)
        scores = self.scores(patches)
        counts = self.counts(scores)
        self.mean_kept = counts.float().mean()
        best = scores.topk(self.num_tokens, dim=1).indices
        kept = torch.arange(self.num_tokens, device=best.device) < counts[:, None]
        # The last slot must hold a token, because the text after the image is predicted from it.
        index = torch.where(kept, best, -1).sort(dim=1).values  # empty slots first, then reading order
        kept, index = index >= 0, index.clamp(min=0)
        gate = soft_top_k(scores, counts, temperature=self.temperature).gather(1, index)
        if self.gradient == "straight_through":
            gate = (gate - gate.detach()) + 1
        tokens = patches.gather(1, repeat(index, "i m -> i m d", d=patches.shape[2]))
        return tokens * rearrange(gate * kept, "i m -> i m 1").to(tokens.dtype)


def soft_top_k(scores: Float[Tensor, "I N"], counts: Int[Tensor, "I"], *, temperature: float) -> Float[Tensor, "I N"]:
    """Return the mask in [0, 1] that maximises scores . mask + temperature * entropy and sums to `counts`.

    It is sigmoid((score - threshold) / temperature) with the threshold found by bisection. The threshold's gradient
    follows from the constant sum: d threshold / d score_j = w_j / sum(w) with w = mask * (1 - mask).
    """
    with torch.no_grad():
        # 40 temperatures beyond the extreme scores the sigmoid is numerically 0 or 1.
        low, high = scores.amin(1) - 40 * temperature, scores.amax(1) + 40 * temperature
        for _ in range(64):
            middle = (low + high) / 2
            above = torch.sigmoid((scores - middle[:, None]) / temperature).sum(1) > counts
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        mask = torch.sigmoid((scores - high[:, None]) / temperature)
        weight = mask * (1 - mask)
        weight = weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    threshold = high + (weight * (scores - scores.detach())).sum(1)
    return torch.sigmoid((scores - threshold[:, None]) / temperature)
