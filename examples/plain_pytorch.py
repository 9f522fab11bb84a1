"""Distil with a training loop of your own: the teacher's stored logits through a plain DataLoader.

    akd-dist cache-teacher jobs/digits.yaml
    python examples/plain_pytorch.py jobs/digits.yaml

Takes about ten seconds on two cores. Needs nothing but akd-dist.
"""

import sys

import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils.data import DataLoader

import akd_dist

TEMPERATURE, SHARE = 4.0, 0.9  # of the softened logits, and of their loss in the whole
MEAN, STD = 0.305, 0.376  # of the digits' pixels


class Student(nn.Sequential):
    """A small network on pixels as they are stored, uint8 [n, channels, height, width]."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, classes))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits [n, classes]."""
        return super().forward((pixels / 255 - MEAN) / STD)


def distillation_loss(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Knowledge distillation (Hinton et al., 2015): the teacher's softened classes, and the labels."""
    softened = [log_softmax(one.float() / TEMPERATURE, dim=1) for one in (logits, batch["teacher_logits"])]
    from_teacher = kl_div(*softened, reduction="batchmean", log_target=True) * TEMPERATURE**2
    return SHARE * from_teacher + (1 - SHARE) * cross_entropy(logits, batch["labels"])


def main(recipe: str, epochs: int = 40) -> float:
    """Train a student and return its accuracy on the test rows."""
    train = akd_dist.distillation_dataset(recipe)
    test = akd_dist.distillation_dataset(recipe, split="test")
    torch.manual_seed(0)
    model = Student(train[0]["inputs"].numel(), train.rows.classes)
    loader = DataLoader(train, batch_size=64, shuffle=True)  # with num_workers=..., each maps the same files
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * len(loader))
    for epoch in range(epochs):
        train.set_epoch(epoch)  # the next of the views that the teacher saw
        for batch in loader:
            loss = distillation_loss(model(batch["inputs"]), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    train.verify()  # refuses if what was read turns out not to be what was written
    everything = test[range(len(test))]
    with torch.inference_mode():
        right = model(everything["inputs"]).argmax(dim=1) == everything["labels"]
    return right.float().mean().item()


if __name__ == "__main__":
    torch.set_num_threads(1)  # for a model as small as this, more only wait for each other
    print(f"test accuracy {main(sys.argv[1]):.4f}")
