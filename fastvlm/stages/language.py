"""Next-token prediction on what is learned: base, align, dense and instruct are this stage with other settings."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvlm.batch import Batch
from fastvlm.models.loss import answer_loss
from fastvlm.stages.stage import Stage


class LanguageStage(Stage):
    """Loss: sum over learned tokens / learned tokens of the whole optimiser step (all ranks, all micro-batches)."""

    def objective(self, batch: Batch) -> tuple[Tensor, Tensor | int, Tensor, dict[str, Tensor]]:
        hidden = self.model.hidden(batch)
        loss = answer_loss(hidden, batch.labels, self.model.llm.head, segment_ids=batch.segment_ids)
        source = batch.source_ids.flatten()[loss.index]
        extra = {"source": source}
        if hasattr(
            self.model.resampler, "mean_kept"
        ):  # a mean over images: NaN, which counts nowhere, where there are none
            kept = self.model.resampler.mean_kept.to(hidden)
            extra["kept_tokens"] = kept if batch.num_images else torch.full_like(kept, torch.nan)
        return loss.sum, max(1, batch.num_answer_tokens), loss.losses, extra
