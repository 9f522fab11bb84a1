"""Language models tried before anything starts: on a few blocks, and whether their losses are for them."""

import torch

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data.rows import Rows
from akd_dist.distill.language_step import Scored, states_at
from akd_dist.distill.objectives import stages_of
from akd_dist.distill.orders import Batches
from akd_dist.distill.output_head import Head
from akd_dist.distill.sparse_losses import check_rows
from akd_dist.models.card import ModelCard
from akd_dist.models.language import LanguageModel, check_linear_head

_TRIED = 2  # blocks


def try_language_model(
    module: LanguageModel, card: ModelCard, rows: Rows, whose: str, training: recipe.Training
) -> None:
    """Refuse a language model that cannot be trained as it should be.

    Args:
        module: in any mode.
        whose: `teacher.train`, `the student small`, for the message.

    Raises:
        RefusedError: it does not take these blocks, has no logit for some id, or not the kind of head or of layers that
            its training needs; or there is no batch.
    """
    if isinstance(training, recipe.Learning) and any(stage.needs_linear_head for stage in stages_of(training)):
        check_linear_head(module, f"the squared norm of {training.objective.kind} in {whose}")
    if training.gradient_checkpointing:
        module.gradient_checkpointing_enable()
        module.gradient_checkpointing_enable(False)
    cut = Batches(len(rows), rows.labelled, training.batch, training.last_batch)
    check_some_batch(cut, card.model.label, "train blocks", whose)
    if not rows.targets:
        raise RefusedError(
            "the train blocks have nothing to learn", got="0 targets", expected="tokens that follow others"
        )
    check_rows(Head(module.output_weight), card.classes)
    inputs, _ = rows.read(0, min(_TRIED, len(rows)))
    blocks = torch.tensor(inputs)
    module.eval()
    # A model may draw random numbers here, which must not change those that its caller draws afterwards.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            states_at(module, blocks, Scored.of(blocks).places, "float32")
        except Exception as error:  # of any architecture's code
            raise RefusedError(
                f"the model {card.model.label} does not take these blocks",
                got=f"{type(error).__name__}: {error}",
                expected=f"a model of blocks of {card.input_shape[-1]:,} tokens",
            ) from error


def check_some_batch(cut: Batches, label: str, which: str, whose: str) -> None:
    """Refuse a training that has no batch at all.

    Raises:
        RefusedError: so it is.
    """
    if not len(cut.ends):
        raise RefusedError(
            f"there is no batch to train {label} on",
            got=f"{cut.passed:,} {which}, batch: {cut.batch}, last_batch: drop",
            expected=f"a batch of at most {cut.passed:,} rows",
            next=f"lower `batch`, or leave `last_batch` out, in {whose}",
        )
