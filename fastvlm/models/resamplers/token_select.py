"""Token selection: a learned score says which patches the language model reads.

The scorer is DynamicViT's (arXiv 2106.02034, section 3.2): what a patch shows beside what the whole image shows. The
choice is a hard top k; it learns by the top k with entropy, whose mask is a sigmoid around one threshold an image (the
two-state optimal transport of arXiv 2002.06504).
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

    With `min_tokens` every image has a number of its own: the fewest patches that hold `coverage` of the scores'
    softmax, between `min_tokens` and `num_tokens`. Scores come from pixels and from weights that learn, so no plan made
    before reading can know that number: an image keeps `num_tokens` slots in the text, its tokens stand in the last of
    them, and the slots before are zero. The VLM hides zero slots from attention and from positions, which gives the
    same logits as leaving them out, and generation does leave them out.

    Args:
        num_tokens: visual tokens of an image: exactly so many, or with `min_tokens` at most.
        min_tokens: at least so many; None: every image keeps `num_tokens`.
        coverage: share of the softmax of scores that is enough; only with `min_tokens`.
        gradient: `straight_through` passes chosen patches as they are and learns as if they were weighted by the soft
            mask; `soft` weights them by it in earnest.
        temperature: of the soft mask and of the softmax, in units of the score.
        positions: side of the grid of learned positions added to the patches; other grids interpolate them; 0: none.

    Attributes:
        mean_kept: tokens the images of the last forward pass kept on average.

    Raises:
        ValueError: numbers of tokens that do not fit each other or the patches, or an unknown `gradient`.
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
            raise ValueError(f"resampler.gradient={gradient} is none of {', '.join(GRADIENTS)}")
        if temperature <= 0:
            raise ValueError(f"resampler.temperature={temperature} must be above 0")
        self.num_tokens, self.min_tokens, self.out_dim = num_tokens, min_tokens, in_dim
        self.coverage, self.gradient, self.temperature = coverage, gradient, temperature
        self.positions = GridPositions(positions, in_dim) if positions else None
        hidden = max(8, in_dim // 4)
        self.local = nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, 2 * hidden), nn.GELU())
        # No bias at the end: the same number added to every score changes no choice.
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
        """How many patches each image keeps."""
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
        # The last slot must hold a token: the text behind the image is predicted from it.
        index = torch.where(kept, best, -1).sort(dim=1).values  # empty slots first, then reading order
        kept, index = index >= 0, index.clamp(min=0)
        gate = soft_top_k(scores, counts, temperature=self.temperature).gather(1, index)
        if self.gradient == "straight_through":
            gate = (gate - gate.detach()) + 1
        tokens = patches.gather(1, repeat(index, "i m -> i m d", d=patches.shape[2]))
        return tokens * rearrange(gate * kept, "i m -> i m 1").to(tokens.dtype)


def soft_top_k(scores: Float[Tensor, "I N"], counts: Int[Tensor, "I"], *, temperature: float) -> Float[Tensor, "I N"]:
    """The mask in [0, 1] that maximises scores . mask + temperature * entropy and sums to `counts`.

    It is sigmoid((score - threshold) / temperature); the threshold is found by bisection, and its gradient follows from
    the sum that stays: d threshold / d score_j = w_j / sum(w) with w = mask * (1 - mask).
    """
    with torch.no_grad():
        # 40 temperatures from the last score a sigmoid is 0 or 1 to the last digit.
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
