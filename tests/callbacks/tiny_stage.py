"""A stage of a few parameters that trains on real Batch objects, for callbacks that need a real Trainer."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fastvlm.batch import Batch
from fastvlm.tokens import IGNORE_INDEX

SOURCES = ("captions", "questions")
IMAGE_ID = 3
ROW, ROWS = 16, 4


def make_batch(step: int) -> Batch:
    """Row 0..2: a pack of 6 + 5 tokens of one source each and 5 of padding; row 3: 16 tokens. Sources alternate."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(4, 20, (ROWS, ROW), generator=generator)
    position, segment = torch.zeros_like(ids), torch.zeros_like(ids)
    source, labels = torch.full_like(ids, -1), torch.full_like(ids, IGNORE_INDEX)
    for row in range(ROWS):
        spans = [(0, 6, 0), (6, 11, 1)] if row < ROWS - 1 else [(0, 16, 0)]
        for number, (a, b, which) in enumerate(spans, 1):
            position[row, a:b] = torch.arange(b - a)
            segment[row, a:b], source[row, a:b] = number, which
            ids[row, a] = IMAGE_ID
            labels[row, b - 2 : b] = ids[row, b - 2 : b]
    skipped = ("captions_0007",) if step == 3 else ()
    answers = int((labels != IGNORE_INDEX).sum())
    images = torch.zeros(7, 3, 8, 8, dtype=torch.uint8)
    return Batch(ids, labels, position, segment, source, images, answers, SOURCES, (), None, step, skipped)


class Steps(Dataset):
    def __init__(self, first: int, last: int):
        self.steps = range(first, last)

    def __len__(self):
        return len(self.steps)

    def __getitem__(self, index):
        return make_batch(self.steps[index])


class TinyModel(nn.Module):
    image_token_id = IMAGE_ID

    def __init__(self):
        super().__init__()
        self.encoder, self.llm = nn.Embedding(20, 8), nn.Linear(8, 20)


class TinyStage(L.LightningModule):
    name = "tiny"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.sources = TinyModel(), SOURCES

    def measure(self, batch: Batch) -> dict:
        logits = self.model.llm(self.model.encoder(batch.input_ids))
        learned = batch.labels != IGNORE_INDEX
        losses = nn.functional.cross_entropy(logits[learned], batch.labels[learned], reduction="none")
        source = batch.source_ids[learned]
        sums = torch.zeros(2).index_add_(0, source, losses.detach())
        counts = torch.zeros(2).index_add_(0, source, torch.ones_like(losses))
        right = (logits[learned].argmax(-1) == batch.labels[learned]).float().mean()
        return {
            "loss": losses.sum() / batch.num_answer_tokens,
            "loss_sum": losses.sum().detach(),
            "source_loss": sums,
            "source_tokens": counts,
            "token_accuracy": right,
        }

    def training_step(self, batch, batch_idx):
        return self.measure(batch)

    def validation_step(self, batch, batch_idx):
        return self.measure(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(
            [
                {"params": self.model.encoder.parameters(), "lr": 1e-2, "name": "encoder"},
                {"params": self.model.llm.parameters(), "lr": 1e-3, "name": "llm"},
            ]
        )


class TinyData(L.LightningDataModule):
    def __init__(self, num_steps: int, *, validate: bool = True):
        super().__init__()
        self.num_steps, self.validate = num_steps, validate

    def train_dataloader(self):
        return DataLoader(Steps(self.trainer.global_step, self.num_steps), batch_size=None)

    def val_dataloader(self):
        return DataLoader(Steps(1000, 1003), batch_size=None) if self.validate else []
