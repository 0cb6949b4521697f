"""FSDP2 student, the loop, checkpoints, metrics and process groups."""
