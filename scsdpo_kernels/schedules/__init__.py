"""What is multiplied when: from a problem to its outcome, chunk by chunk, tile by tile, or in plain PyTorch."""
