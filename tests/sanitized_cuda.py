"""Small rows through CUDA's row kernels: `compute-sanitizer python sanitized_cuda.py`."""

import torch

from scsdpo_kernels.kernels import native
from scsdpo_kernels.kernels.contract import Logits, PerRow
from scsdpo_kernels.problem import objective_of


def main() -> None:
    for rows, vocabulary in ((5000, 7), (3000, 1021), (60, 40000)):  # more than the clusters take in one turn
        for dtype in (torch.float32, torch.bfloat16):
            # rows that start at multiples of 16 bytes, as bulk copies need them
            student, teacher = (torch.randn(2, rows, -(-vocabulary // 8) * 8, device="cuda").to(dtype))[
                ..., :vocabulary
            ]
            for beta in (0.0, 0.5, 1.0):
                for row_schedule in ("cluster", "streaming"):
                    if row_schedule == "cluster" and torch.cuda.get_device_capability() < (9, 0):
                        continue
                    native.row_divergence_cuda(
                        Logits(student, teacher, difference=False, softcap=0.0),
                        PerRow(torch.ones(rows, device="cuda")),
                        objective_of(beta),
                        torch.empty_like(teacher),
                        row_schedule=row_schedule,
                    )
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
