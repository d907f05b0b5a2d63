"""What: the LightningModules, the losses, the operations and the layers that they put in."""
