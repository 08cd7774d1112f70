"""SC-SDPO with TRL: sums as questions, a reward function, and the settings of SCSDPOTrainer.

python examples/trl_sdpo.py Qwen/Qwen3-0.6B          (accelerate launch for several processes)
"""

import random
import sys

from datasets import Dataset

from scsdpo.trl import SCSDPOConfig, SCSDPOTrainer


def questions(count: int, largest: int, seed: int = 0) -> Dataset:
    """`prompt` is what the trainer reads; further columns go to the reward function."""
    numbers = random.Random(seed)
    pairs = [(numbers.randint(0, largest), numbers.randint(0, largest)) for _ in range(count)]
    rows = [{"prompt": [{"role": "user", "content": f"{a} + {b} ="}], "answer": str(a + b)} for a, b in pairs]
    return Dataset.from_list(rows)


def reward(completions, answer, **_) -> list[float]:
    """1 where the answer is among the words of a rollout. A question of which some rollouts get 1 has a weight."""
    texts = [completion[0]["content"] for completion in completions]
    return [float(right in text.split()) for text, right in zip(texts, answer, strict=True)]


def main(model, largest: int = 500, **options) -> SCSDPOTrainer:
    """model: its name or path. options: settings that replace those below, or TRL's defaults."""
    settings = {
        "output_dir": "trl-sdpo",
        "num_generations": 8,  # rollouts of a question
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "max_completion_length": 512,
        "learning_rate": 1e-6,
        "bf16": True,
        "logging_steps": 1,
        "distillation_mode": "full_logits",  # or "topk_logits", "sampled_token"
        "distillation_alpha": 0.5,  # 0 forward KL, 0.5 Jensen-Shannon, 1 reverse KL
        "question_weighting": "sc-sdpo",  # "none": plain SDPO
    }
    config = SCSDPOConfig(**{**settings, **options})
    trainer = SCSDPOTrainer(model, reward, config, train_dataset=questions(1000, largest))
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1])
