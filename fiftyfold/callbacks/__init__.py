"""When: one thin Lightning callback per method."""

from fiftyfold.callbacks.checkpoint_io import DurableCheckpointIO
from fiftyfold.callbacks.layer_pruning import LayerPruning
from fiftyfold.callbacks.layer_reduction import LayerReduction
from fiftyfold.callbacks.matrix_compression import MatrixCompression
from fiftyfold.callbacks.quantization_aware_training import QuantizationAwareTraining
from fiftyfold.callbacks.random_states import RandomStates
from fiftyfold.callbacks.stop_on_signal import StopOnSignal
from fiftyfold.callbacks.tensor_network_decomposition import TensorNetworkDecomposition

__all__ = [
    "DurableCheckpointIO",
    "LayerPruning",
    "LayerReduction",
    "MatrixCompression",
    "QuantizationAwareTraining",
    "RandomStates",
    "StopOnSignal",
    "TensorNetworkDecomposition",
]
