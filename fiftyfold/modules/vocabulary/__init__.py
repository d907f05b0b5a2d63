"""Vocabularies cut to what texts need: for small models, most of a file is the embedding of tokens that never come."""

from fiftyfold.modules.vocabulary.trim import trim_vocabulary

__all__ = ["trim_vocabulary"]
