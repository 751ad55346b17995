"""Token merging: the most similar patches are averaged (ToMe, arXiv 2210.09461, section 3 and appendix D)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

from fastvlm.models.resamplers.counts import check_at_most, check_positive


class TokenMergeResampler(nn.Module):
    """Bipartite soft matching, repeated until `num_tokens` are left. It has no parameters and takes any grid.

    ToMe merges inside an encoder's layers and compares attention keys; here, after the encoder, the patches themselves
    are compared. Tokens stay in reading order, because the language model reads them in order.

    Args:
        num_tokens: visual tokens per view, at most the number of patches.
        share: largest share of the tokens merged in one step, at most 0.5; smaller steps match better and cost more.

    Raises:
        ValueError: `share` is not in (0, 0.5], or `num_tokens` is below 1 or exceeds the number of patches.
    """

    def __init__(self, *, in_dim: int, num_tokens: int, share: float = 0.5):
        super().__init__()
        if not 0 < share <= 0.5:
            raise ValueError(f"resampler.share={share} must be above 0 and at most 0.5: a step pairs tokens")
        self.num_tokens, self.out_dim, self.share = check_positive(num_tokens), in_dim, share

    def num_tokens_out(self, num_patches: int) -> int:
        return check_at_most(self.num_tokens, num_patches)

    def forward(self, patches: Float[Tensor, "I N D"]) -> Float[Tensor, "I M D"]:
        self.num_tokens_out(patches.shape[1])
        tokens, sizes = patches, patches.new_ones(*patches.shape[:2], 1)
        while (left := tokens.shape[1]) > self.num_tokens:
            num = min(left - self.num_tokens, max(1, int(left * self.share)))
            tokens, sizes = merge(tokens, sizes, num=num)
        return tokens


def merge(
    tokens: Float[Tensor, "I N D"], sizes: Float[Tensor, "I N 1"], *, num: int
) -> tuple[Float[Tensor, "I M D"], Float[Tensor, "I M 1"]]:
    """Merge `num` tokens: those at even indexes most similar to one at an odd index are averaged into it.

    Args:
        sizes: number of patches merged into each token so far, its weight in the mean.
        num: tokens to remove, at most N // 2, so M = N - num.

    Returns:
        The remaining tokens in reading order, and their sizes.
    """
    directions = F.normalize(tokens.detach(), dim=-1)
    similarity, partner = (directions[:, ::2] @ directions[:, 1::2].mT).max(dim=-1)  # (I, even places)
    chosen = similarity.topk(num, dim=-1).indices
    target = repeat(torch.arange(tokens.shape[1], device=tokens.device), "n -> i n", i=tokens.shape[0])
    target = target.scatter(1, 2 * chosen, 2 * partner.gather(1, chosen) + 1)[..., None]  # (I, N, 1)
    sums = torch.zeros_like(tokens).scatter_add(1, target.expand_as(tokens), tokens * sizes)
    counts = torch.zeros_like(sizes).scatter_add(1, target, sizes)
    gone = torch.zeros_like(target[..., 0], dtype=torch.bool).scatter(1, 2 * chosen, True)
    # A stable sort of the flags keeps the remaining tokens in reading order.
    left = gone.long().argsort(dim=1, stable=True)[:, : tokens.shape[1] - num, None]
    counts = counts.gather(1, left)
    return sums.gather(1, left.expand(-1, -1, tokens.shape[2])) / counts, counts
