"""What is run in the SDPO fork: 16 rollouts, four of each question."""

REWARDS = [1, 0, 1, 0, *[0] * 4, 0, 0, 0, 1, *[1] * 4]

# By what a run differs from the first, `sdpo_fork.run`.
CASES = {
    "jsd": {},
    "forward KL": {"alpha": 0.0},
    "reverse KL": {"alpha": 1.0},
    "alpha 0.3": {"alpha": 0.3},
    "top-K, bucket": {"distillation_topk": 9},
    "top-K, bucket, reverse KL": {"distillation_topk": 9, "alpha": 1.0},
    "top-K, renormalised": {"distillation_topk": 9, "distillation_add_tail": False, "alpha": 0.0},
    "clipped ratio": {"is_clip": 1.3, "epochs": 2},
    "clipped ratio, top-K": {"is_clip": 1.3, "epochs": 2, "distillation_topk": 9, "weighted": True},
    "question weights": {"weighted": True},
    "question weights, top-K": {"weighted": True, "distillation_topk": 9},
    "question weights, one at a time": {"weighted": True, "micro": 1},
    "question weights beside others": {"weighted": True, "corrected": True, "micro": 4},
    "mean of sequences": {"aggregation": "seq-mean-token-mean", "weighted": True},
    "sum of sequences": {"aggregation": "seq-mean-token-sum", "micro": 4},
    "a teacher of its own": {"teacher": "ema", "weighted": True},
    "a teacher of its own, top-K": {"teacher": "ema", "distillation_topk": 9},
    "a trust region": {"teacher": "trust-region", "weighted": True, "micro": 4},
    "the sampled token": {"full_logit_distillation": False, "alpha": 1.0},
    "packed": {"packed": True, "weighted": True, "micro": 8},
}
