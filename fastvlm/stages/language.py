"""Next-token prediction on what is learned: base, align, dense and instruct are this stage with other settings."""

from __future__ import annotations

from torch import Tensor

from fastvlm.batch import Batch
from fastvlm.models.loss import answer_loss
from fastvlm.stages.stage import Stage


class LanguageStage(Stage):
    """Loss: sum over learned tokens / learned tokens of the whole optimiser step (all ranks, all micro-batches)."""

    def objective(self, batch: Batch) -> tuple[Tensor, Tensor | int, Tensor, dict[str, Tensor]]:
        hidden = self.model.hidden(batch)
        loss_sum, losses, rows, columns = answer_loss(hidden, batch.labels, batch.segment_ids, self.model.llm.head)
        return loss_sum, max(1, batch.num_answer_tokens), losses, {"source": batch.source_ids[rows, columns]}
