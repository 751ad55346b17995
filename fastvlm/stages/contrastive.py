"""CLIP's objective: match each image with its caption among the images and captions of a batch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlm.batch import Batch
from fastvlm.models.norms import frozen_statistics
from fastvlm.models.quantised import heads_of
from fastvlm.stages.stage import Stage
from fastvlm.tokens import IGNORE_INDEX


class ContrastiveStage(Stage):
    """Contrastive loss between mean-pooled patches and the language model's mean hidden state of the caption.

    Every row must hold one image and its text (`packing: false`), or nothing (a sample that could not be read): such a
    row is compared with none. All ranks' images and captions are compared. The two projections and the temperature are
    not part of the handoff. Source: Radford et al., arXiv:2103.00020; `open_clip.loss.ClipLoss`.

    Args:
        dim: width of the shared embedding space.
    """

    def __init__(self, model: nn.Module, *, dim: int = 128, **stage):
        super().__init__(model, **stage)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.image_projection = nn.Linear(model.encoder.out_dim, dim, bias=False)
            self.text_projection = nn.Linear(model.llm.dim, dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def setup(self, stage: str) -> None:
        # The loss reads hidden states, so a head that shares no weight has no gradient, for which ranks would wait.
        tables = {id(p) for m in self.model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        head = {id(p) for one in heads_of(self.model.llm) for p in one.parameters()}
        for name, parameter in self.model.named_parameters():
            if id(parameter) in head - tables:
                parameter.requires_grad_(False)
                self.learning_rates.pop(name, None)

    def objective(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        from open_clip.loss import ClipLoss

        if self._trainer is not None and (micro := self.trainer.accumulate_grad_batches) > 1:
            raise ValueError(
                f"stage {self.name} compares all images and captions of a step with each other, but the hardware cuts "
                f"a step into {micro} micro-batches; set hardware.rows_per_device=null hardware.accumulate=1, or lower "
                f"stages.{self.name}.batch_size"
            )
        filled = (batch.segment_ids > 0).any(1)  # (B,)
        slots = (batch.input_ids == self.model.image_token_id).any(1)
        rows = int(filled.sum())
        if batch.num_images != rows or int(batch.segment_ids.max()) > 1 or not torch.equal(slots, filled):
            raise ValueError(
                f"stage {self.name} needs one image and one caption a row, but has {batch.num_images} images in "
                f"{rows} rows; "
                "set packing=false and image.tiles=null and choose a mixture of captions"
            )
        seen = self.image_projection(self.pooled_patches(batch))  # (I, dim)
        image = seen.new_zeros(len(filled), seen.shape[1]).index_put((filled,), seen)  # (B, dim)
        # Mask image slots like padding, so that only the caption is encoded.
        text_mask = (batch.segment_ids > 0) & (batch.input_ids != self.model.image_token_id)
        ids = batch.input_ids.masked_fill(~text_mask, 0)
        hidden = self.model.llm.hidden(self.model.llm.embed(ids), batch.position_ids, text_mask.long())
        lengths = text_mask.sum(1, keepdim=True).clamp(min=1)
        text = self.text_projection((hidden * text_mask[..., None]).sum(1) / lengths)
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        world = self.trainer.world_size if self._trainer is not None else 1
        clip = ClipLoss(
            local_loss=True, gather_with_grad=True, rank=self.global_rank if world > 1 else 0, world_size=world
        )
        others = self.all_gather(filled).flatten() if world > 1 else filled  # (B of all ranks,)
        target = clip.get_ground_truth(image.device, len(filled)).masked_fill(~filled, IGNORE_INDEX)
        both = []
        for logits in clip.get_logits(image, text, self.logit_scale.exp().clamp(max=100)):  # (B, B of all ranks)
            logits = logits.masked_fill(~others, torch.finfo(logits.dtype).min)
            both.append(F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="sum") / max(1, rows))
        mean = (both[0] + both[1]) / 2
        loss = mean * (rows * world / others.sum().clamp(min=1))  # ranks count as many times as they have rows
        with torch.no_grad():
            best = (image @ text.T).masked_fill(~filled, -torch.inf).argmax(1)
            found = (best == torch.arange(len(filled), device=image.device))[filled].float().mean()
        denominator = loss.new_ones(())
        if self._trainer is not None:
            denominator = denominator * world * self.trainer.accumulate_grad_batches
        extra = {"source": batch.source_ids[filled, 0], "retrieval": found}
        return loss, denominator, mean.detach().expand(rows), extra

    def pooled_patches(self, batch: Batch) -> Tensor:
        """Return the mean patch (I, D_v) of each image, or without images that of a blank one.

        Other ranks wait for this one's gradients.
        """
        if batch.num_images:
            return self.model.patches(batch).mean(1)
        with frozen_statistics(self.model):
            return self.model.patches(batch.with_blank_image()).mean(1)
