"""Distil with Hugging Face's Trainer: its model learns from the teacher's stored logits.

    pip install 'akd-dist[trainer]'
    akd-dist cache-teacher jobs/digits.yaml
    python examples/hugging_face_trainer.py jobs/digits.yaml

Takes about twenty seconds on two cores. The model may be any of transformers': one of images takes `inputs` as its
`pixel_values`, and one of text `input_ids` and `attention_mask`, which the batches of a recipe with `data.text` have.
"""

import sys
import tempfile
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import ImageClassifierOutput

import akd_dist

TEMPERATURE, SHARE = 4.0, 0.9  # of the softened logits, and of their loss in the whole
MEAN, STD = 0.305, 0.376  # of the digits' pixels


class Student(nn.Module):
    """A small network with the interface of transformers' models of images."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, classes))

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        """Logits [n, classes]."""
        return ImageClassifierOutput(logits=self.layers(pixel_values))


class DistillationTrainer(Trainer):
    """A Trainer whose loss is the teacher's softened classes and the labels (Hinton et al., 2015)."""

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: Any) -> Any:
        """The loss of a batch; rows without logits, such as those to evaluate on, have that of their labels."""
        outputs = model(pixel_values=(inputs["inputs"] / 255 - MEAN) / STD)
        loss = cross_entropy(outputs.logits, inputs["labels"])
        if "teacher_logits" in inputs and model.training:
            softened = [
                log_softmax(one.float() / TEMPERATURE, dim=1) for one in (outputs.logits, inputs["teacher_logits"])
            ]
            from_teacher = kl_div(*softened, reduction="batchmean", log_target=True) * TEMPERATURE**2
            loss = SHARE * from_teacher + (1 - SHARE) * loss
        return (loss, {"logits": outputs.logits}) if return_outputs else loss


def accuracy(predicted: Any) -> dict[str, float]:
    """What the Trainer reports of an evaluation."""
    return {"accuracy": float((predicted.predictions.argmax(axis=1) == predicted.label_ids).mean())}


def main(recipe: str, epochs: int = 40) -> float:
    """Train a student and return its accuracy on the test rows."""
    train = akd_dist.distillation_dataset(recipe)
    test = akd_dist.distillation_dataset(recipe, split="test")
    torch.manual_seed(0)
    student = Student(train[0]["inputs"].numel(), train.rows.classes)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=512,
            learning_rate=1e-2,
            remove_unused_columns=False,  # else the Trainer drops what the model's `forward` does not name
            label_names=["labels"],
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = DistillationTrainer(
            student,
            arguments,
            data_collator=train.collate,
            train_dataset=train,  # the Trainer tells it of each epoch, which shows its view
            eval_dataset=test,
            compute_metrics=accuracy,
        )
        trainer.train()
        return float(trainer.evaluate()["eval_accuracy"])


if __name__ == "__main__":
    torch.set_num_threads(1)  # for a model as small as this, more only wait for each other
    print(f"test accuracy {main(sys.argv[1]):.4f}")
