"""fiftyfold: make a fine-tuned transformer up to fifty times smaller, as a file on disk."""
