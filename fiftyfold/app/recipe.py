"""What decides one compression."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fiftyfold.errors import FiftyfoldError


@dataclass(frozen=True)
class Recipe:
    """One compression of one teacher on one task; the fields are the arguments of ``fiftyfold compress``.

    Raises:
        FiftyfoldError: if a training could not even begin with a value.
    """

    teacher: str
    task: str
    data: str | None = None
    weight_bits: int = 1
    activation_bits: int | None = 8
    layers: str | list[int] = "all"
    keep: int | None = None
    targets: str | list[str] = "default"
    vocabulary: str | None = None
    stages: int = 1
    epochs: int = 6
    batch_size: int = 32
    learning_rate: float = 1e-4
    warmup: float = 0.1
    dropout: float | None = None
    max_length: int | None = None
    group_by_length: bool = False
    limit_train: int | None = None
    augmented: str | None = None
    unlabelled: str | None = None
    checks_per_epoch: int = 1
    matmul_precision: str = "highest"
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("epochs", "checks_per_epoch"):
            if getattr(self, name) < 1:
                raise FiftyfoldError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        if self.keep is not None and self.layers == "all":
            raise FiftyfoldError(
                f"keep is {self.keep}, but layers is all; name which ones with layers: every-other, first or last."
            )
        if not self.learning_rate > 0:
            raise FiftyfoldError(f"learning_rate is {self.learning_rate}, but must be above 0.")

    @property
    def bits_name(self) -> str:
        """Bit widths as the field writes them, such as W1A8."""
        return f"W{self.weight_bits}" + (f"A{self.activation_bits}" if self.activation_bits else "")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)
