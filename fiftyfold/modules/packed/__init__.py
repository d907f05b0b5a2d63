"""Layers as they are deployed, and the folder that holds them."""
