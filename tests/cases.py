"""One table of cases: what each method does to a model in training, and when.

It drives training, resume, export and reload; a new method adds its rows here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightning.pytorch.callbacks import Callback

from fiftyfold.callbacks import (
    LayerPruning,
    LayerReduction,
    MatrixCompression,
    QuantizationAwareTraining,
    TensorNetworkDecomposition,
)


@dataclass(frozen=True)
class Case:
    """Callbacks to train with, and the (operation, optimizer step) that must then stand in the log."""

    name: str
    callbacks: Callable[[], list[Callback]]
    operations: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("binary", lambda: [QuantizationAwareTraining(weight_bits=1, start=2)], (("quantize", 2),)),
    Case(
        "ternary from the start",
        lambda: [QuantizationAwareTraining(weight_bits=2, granularity="per_channel", activation_bits=None)],
        (("quantize", 0),),
    ),
    Case(
        "bits that step down",
        lambda: [QuantizationAwareTraining(weight_bits={0: 8, "epoch:1": 4, "fraction:0.75": 1})],
        (("quantize", 0), ("quantize", 4), ("quantize", 6)),
    ),
    Case(
        "static ranges, clipped",
        lambda: [
            QuantizationAwareTraining(weight_bits=3, activation_range="static", symmetric=False, clip=2.5, start=3)
        ],
        (("quantize", 3),),
    ),
    Case(
        "two quantizers",
        lambda: [
            QuantizationAwareTraining(weight_bits=4, targets=r"embed|wte", activation_bits=None, start=1),
            QuantizationAwareTraining(
                weight_bits=1,
                exclude=r"embed|wte|tied|lm_head|predictions",
                granularity="per_group",
                group_size=8,
                start=3,
            ),
        ],
        (("quantize", 1), ("quantize", 3)),
    ),
    Case("reduction", lambda: [LayerReduction(start=3)], (("reduce_layers", 3),)),
    Case("reduction from the start", lambda: [LayerReduction("last", keep=2)], (("reduce_layers", 0),)),
    Case(
        "pruning",
        lambda: [LayerPruning({2: 1, "fraction:0.625": 1}, measure_steps=2)],
        (("reduce_layers", 2), ("reduce_layers", 5)),
    ),
    Case(
        "tensorization",
        lambda: [TensorNetworkDecomposition(cores=2, bond_dimension=4, start=3)],
        (("tensorize", 3),),
    ),
    Case(
        "tensorization of everything, gradually",
        lambda: [TensorNetworkDecomposition(cores=3, bond_dimension={2: 4, "fraction:0.625": 2}, targets=".")],
        (("tensorize", 2), ("tensorize", 5)),
    ),
    Case(
        "networks chosen by the data, then in 8 bits",
        lambda: [
            # What the whole model's loss is measured as hangs on how the text is cut into batches.
            MatrixCompression(0.7, batches=2, allocation="outputs", start=2),
            QuantizationAwareTraining(weight_bits=8, activation_bits=None, granularity="per_channel", start=4),
        ],
        (("compress_matrices", 2), ("quantize", 4)),
    ),
    Case(
        "whole matrices and networks in few bits, chosen by the data",
        lambda: [MatrixCompression(0.45, batches=2, factor_bits=8, whole_bits=(4,), allocation="outputs", start=3)],
        (("compress_matrices", 3), ("quantize", 3), ("quantize", 3)),
    ),
    Case(
        "reduced, low rank, with ternary factors",
        lambda: [
            LayerReduction(start=1),
            TensorNetworkDecomposition(2, 3, split="low_rank", start=2),
            QuantizationAwareTraining(weight_bits=2, granularity="per_channel", start=4),
        ],
        (("reduce_layers", 1), ("tensorize", 2), ("quantize", 4)),
    ),
    Case(
        "all together",
        lambda: [
            TensorNetworkDecomposition(cores=2, keep=0.7, start=1),
            QuantizationAwareTraining(weight_bits={2: 2, 6: 1}),
            LayerReduction(keep=3, start=3),
            LayerPruning({5: 1}),
        ],
        (("tensorize", 1), ("quantize", 2), ("reduce_layers", 3), ("reduce_layers", 5), ("quantize", 6)),
    ),
)
