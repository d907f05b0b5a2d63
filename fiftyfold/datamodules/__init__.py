"""On what: GLUE and its augmentation."""
