"""The EleutherAI lm-evaluation-harness on exported folders: an optional extra, ``pip install fiftyfold[harness]``."""

from __future__ import annotations

from typing import Any

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.pretrained import load_language_model


def harness_model(folder: str, *, batch_size: int = 8, tokenizer: str | None = None) -> Any:
    """Open a causal language model for ``lm_eval.simple_evaluate(model=..., tasks=[...])``.

    The harness opens folders by itself only in a process that has imported fiftyfold; this hands it the opened model.

    Args:
        folder: an exported folder, any transformers folder, or a hub id.
        batch_size: requests at once.
        tokenizer: folder or hub id of the tokenizer; by default the model's.

    Returns:
        The harness's ``HFLM``.

    Raises:
        FiftyfoldError: if the harness is not installed, or the model cannot be opened.
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise FiftyfoldError(
            f"lm-evaluation-harness does not load here ({error}); pip install fiftyfold[harness]."
        ) from error
    model = load_language_model(folder, "model", "causal")
    return HFLM(pretrained=model, tokenizer=tokenizer or folder, batch_size=batch_size)
