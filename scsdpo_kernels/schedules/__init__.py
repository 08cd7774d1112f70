"""What is multiplied when: from a problem to its outcome, chunk by chunk, or in plain PyTorch."""
