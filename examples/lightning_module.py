"""Distil with Lightning: a module whose training rows come with the teacher's stored logits.

    pip install 'akd-dist[lightning]'
    akd-dist cache-teacher jobs/digits.yaml
    python examples/lightning_module.py jobs/digits.yaml

Takes about twenty seconds on two cores.
"""

import sys

import pytorch_lightning as lightning
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils.data import DataLoader

import akd_dist

TEMPERATURE, SHARE = 4.0, 0.9  # of the softened logits, and of their loss in the whole
MEAN, STD = 0.305, 0.376  # of the digits' pixels


class Student(lightning.LightningModule):
    """A student that learns from the teacher's softened classes and the labels (Hinton et al., 2015)."""

    def __init__(self, recipe: str) -> None:
        super().__init__()
        self.rows = akd_dist.distillation_dataset(recipe)
        self.test_rows = akd_dist.distillation_dataset(recipe, split="test")
        inputs, classes = self.rows[0]["inputs"].numel(), self.rows.rows.classes
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, classes))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits [n, classes] of inputs as they are stored, uint8 [n, ...]."""
        return self.model((inputs / 255 - MEAN) / STD)

    def train_dataloader(self) -> DataLoader:
        """The next of the views that the teacher saw; asked for at each epoch."""
        self.rows.set_epoch(self.current_epoch)
        return DataLoader(self.rows, batch_size=64, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        """The test rows."""
        return DataLoader(self.test_rows, batch_size=512)

    def training_step(self, batch: dict[str, torch.Tensor], batch_number: int) -> torch.Tensor:
        """The loss of a batch."""
        logits = self(batch["inputs"])
        softened = [log_softmax(one.float() / TEMPERATURE, dim=1) for one in (logits, batch["teacher_logits"])]
        from_teacher = kl_div(*softened, reduction="batchmean", log_target=True) * TEMPERATURE**2
        return SHARE * from_teacher + (1 - SHARE) * cross_entropy(logits, batch["labels"])

    def test_step(self, batch: dict[str, torch.Tensor], batch_number: int) -> None:
        """The share of rows whose class it finds."""
        right = self(batch["inputs"]).argmax(dim=1) == batch["labels"]
        self.log("accuracy", right.float().mean(), batch_size=len(right))

    def configure_optimizers(self) -> dict[str, object]:
        """AdamW, whose rate falls to nothing over the steps of the training."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(recipe: str, epochs: int = 40) -> float:
    """Train a student and return its accuracy on the test rows."""
    lightning.seed_everything(0)
    student = Student(recipe)
    trainer = lightning.Trainer(
        accelerator="auto",
        max_epochs=epochs,
        reload_dataloaders_every_n_epochs=1,  # so that each epoch shows its view
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(student)
    (found,) = trainer.test(student, verbose=False)
    return found["accuracy"]


if __name__ == "__main__":
    torch.set_num_threads(1)  # for a model as small as this, more only wait for each other
    print(f"test accuracy {main(sys.argv[1]):.4f}")
