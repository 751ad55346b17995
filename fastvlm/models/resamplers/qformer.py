"""The image side of BLIP-2's Q-Former (arXiv 2301.12597, section 3.1), from `transformers`."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from fastvlm.models.resamplers.counts import check_at_most, check_positive


class QFormerResampler(nn.Module):
    """BERT layers over learned queries; every `cross_every`-th layer also attends to the patches.

    The defaults are BLIP-2's sizes, and the weights under `qformer` have the names of `Blip2QFormerModel`.

    Args:
        num_tokens: visual tokens per view, at most the number of patches. BLIP-2: 32.
        dim: width of the layers and of the visual tokens.
        depth: number of layers.
        heads: attention heads; must divide `dim`.
        mlp_ratio: hidden width of the feed-forward relative to `dim`.
        cross_every: layers from one cross-attention to the next, starting with the first layer.
        dropout: dropout in attention and after every projection.

    Raises:
        ValueError: `heads` does not divide `dim`, or `num_tokens` is below 1 or exceeds the number of patches.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        num_tokens: int,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        cross_every: int = 2,
        dropout: float = 0.0,
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"resampler.heads={heads} does not divide resampler.dim={dim}")
        self.num_tokens, self.out_dim = check_positive(num_tokens), dim
        self.queries = nn.Parameter(torch.randn(1, num_tokens, dim) * 0.02)
        config = Blip2QFormerConfig(
            hidden_size=dim,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=int(dim * mlp_ratio),
            encoder_hidden_size=in_dim,
            cross_attention_frequency=cross_every,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        self.qformer = Blip2QFormerModel(config)

    def num_tokens_out(self, num_patches: int) -> int:
        return check_at_most(self.num_tokens, num_patches)

    def forward(self, patches: Float[Tensor, "I N D"]) -> Float[Tensor, "I M D_out"]:
        self.num_tokens_out(patches.shape[1])
        queries = self.queries.expand(patches.shape[0], -1, -1)
        return self.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state
