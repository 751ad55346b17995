"""Token merging: the most similar patches become one (ToMe, arXiv 2210.09461, section 3 and appendix D)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

from fastvlm.models.resamplers.counts import check_at_most, check_positive


class TokenMergeResampler(nn.Module):
    """Bipartite soft matching, step by step, until `num_tokens` are left. Without parameters; any grid.

    ToMe sits in an encoder's layers and compares attention keys; behind the encoder it is the patches themselves that
    are compared. Tokens stay in reading order, because the language model reads them in order.

    Args:
        num_tokens: visual tokens of an image, at most the number of patches.
        share: of the tokens that one step may merge away, at most a half; smaller steps match better and cost more.

    Raises:
        ValueError: `share` is not in (0, 0.5], or `num_tokens` is below 1 or more than there are patches.
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
    """One step: of the tokens at even places the `num` most similar to one at an odd place are averaged into it.

    Args:
        sizes: how many patches a token stands for: it weighs as much in the mean.
        num: M = N - num; at most N // 2.
    """
    directions = F.normalize(tokens.detach(), dim=-1)
    similarity, partner = (directions[:, ::2] @ directions[:, 1::2].mT).max(dim=-1)  # (I, even places)
    chosen = similarity.topk(num, dim=-1).indices
    target = repeat(torch.arange(tokens.shape[1], device=tokens.device), "n -> i n", i=tokens.shape[0])
    target = target.scatter(1, 2 * chosen, 2 * partner.gather(1, chosen) + 1)[..., None]  # (I, N, 1)
    sums = torch.zeros_like(tokens).scatter_add(1, target.expand_as(tokens), tokens * sizes)
    counts = torch.zeros_like(sizes).scatter_add(1, target, sizes)
    gone = torch.zeros_like(target[..., 0], dtype=torch.bool).scatter(1, 2 * chosen, True)
    # A stable sort of the flags keeps the reading order of what is left.
    left = gone.long().argsort(dim=1, stable=True)[:, : tokens.shape[1] - num, None]
    counts = counts.gather(1, left)
    return sums.gather(1, left.expand(-1, -1, tokens.shape[2])) / counts, counts
