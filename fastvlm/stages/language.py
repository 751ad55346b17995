"""Next-token prediction on the learned tokens, used by the stages base, align, dense and instruct."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvlm.batch import Batch
from fastvlm.models.loss import answer_loss
from fastvlm.stages.stage import Stage


class LanguageStage(Stage):
    """Next-token loss: sum over learned tokens / learned tokens of the optimiser step (all ranks and micro-batches)."""

    def objective(self, batch: Batch) -> tuple[Tensor, Tensor | int, Tensor, dict[str, Tensor]]:
        hidden = self.model.hidden(batch)
        loss = answer_loss(hidden, batch.labels, self.model.llm.head, segment_ids=batch.segment_ids)
        source = batch.source_ids.flatten()[loss.index]
        extra = {"source": source}
        measured = {}
        if hasattr(self.model.resampler, "mean_kept"):
            measured["kept_tokens"] = self.model.resampler.mean_kept.to(hidden)
        total = loss.sum
        if take := getattr(self.model.encoder, "take_auxiliary", None):
            auxiliary, more = take()
            measured |= {name: value.to(hidden.device) for name, value in more.items()}
            if auxiliary is not None:  # weighted by tokens, so that the step averages it over learned tokens
                total = total + auxiliary * (batch.num_learned if batch.num_images else 0)
        # These are means over images; without images report NaN, which `Losses` ignores.
        extra |= {k: v if batch.num_images else torch.full_like(v, torch.nan) for k, v in measured.items()}
        return total, max(1, batch.num_answer_tokens), loss.losses, extra
