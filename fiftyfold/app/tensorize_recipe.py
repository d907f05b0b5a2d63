"""What one run of ``fiftyfold tensorize`` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fiftyfold.datamodules import LanguageModelingDataModule
from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.healing import HealingLoss
from fiftyfold.modules.healing_module import stage_shares
from fiftyfold.modules.learning_rate import stage_ends
from fiftyfold.modules.pretrained import Objective
from fiftyfold.modules.quantization.bitsandbytes_layers import Bits
from fiftyfold.modules.tensor_network.budget import Allocation
from fiftyfold.modules.tensor_network.tensorize import Split, check_arguments

Method = Literal["activations", "weights"]


@dataclass(frozen=True)
class TensorizeRecipe:
    """What decides one compression; the fields are the arguments of ``fiftyfold tensorize``.

    Raises:
        FiftyfoldError: if a training could not even begin with a value.
    """

    model: str
    data: str
    keep: float
    method: Method
    allocation: Allocation
    cores: int
    split: Split
    exclude: tuple[str, ...]
    objective: Objective
    epochs: int
    block_share: float
    hidden_weight: float
    learning_rate: float
    batch_size: int
    sequence_length: int | None
    limit_train: int | None
    core_bits: Literal[8] | None
    rest_bits: Bits | None
    document_separator: str
    text_column: str
    seed: int

    @property
    def quantizes_in_training(self) -> bool:
        """Whether what is decomposed is not as small yet as it is to become."""
        return self.core_bits is not None and self.method == "weights"

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise FiftyfoldError(f"epochs is {self.epochs}, but cannot be negative.")
        by_weights = self.method == "weights"
        if by_weights and self.core_bits is not None and self.epochs == 0:
            raise FiftyfoldError("core_bits quantizes networks cut by their weights in training: give epochs.")
        check_arguments(self.cores if by_weights else 2, 1, self.keep, self.split if by_weights else "even")
        stage_shares(self.block_share)
        HealingLoss(hidden=self.hidden_weight)
        if not self.learning_rate > 0:
            raise FiftyfoldError(f"learning_rate is {self.learning_rate}, but must be above 0.")


def build_text(recipe: TensorizeRecipe) -> LanguageModelingDataModule:
    """Return the recipe's text, tokenised as its model expects."""
    return LanguageModelingDataModule(
        recipe.model,
        recipe.data,
        objective=recipe.objective,
        sequence_length=recipe.sequence_length,
        document_separator=recipe.document_separator,
        text_column=recipe.text_column,
        batch_size=recipe.batch_size,
        limit_train=recipe.limit_train,
        seed=recipe.seed,
    )


def check_steps(recipe: TensorizeRecipe, text: LanguageModelingDataModule) -> None:
    """Refuse a healing too short for its phases, which would be noticed only after the decomposition.

    Raises:
        FiftyfoldError: if it is.
    """
    steps = recipe.epochs * len(text.train_dataloader())
    try:
        if steps:
            stage_ends(stage_shares(recipe.block_share), steps)
    except FiftyfoldError as error:
        raise FiftyfoldError(
            f"healing in {steps} optimizer steps has none for one of its phases; give more epochs, more text "
            "(limit_train) or block_share 0."
        ) from error
