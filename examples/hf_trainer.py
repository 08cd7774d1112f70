"""Distillation in transformers' Trainer: labels, accumulated gradients, evaluation, bf16, one process or several.

python examples/hf_trainer.py STUDENT TEACHER DATA.jsonl          (torchrun for several processes)
"""

import sys

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

from scsdpo.head import distill, head_of, hidden_states, patch_lm_head

RESPONSE = 256  # tokens at the end of every sequence; prompts are padded on the left


class DistillationTrainer(Trainer):
    """Rows have input_ids, attention_mask, labels (-100 where there is no response token), and question_weight; and

    teacher_input_ids, teacher_attention_mask: the teacher's prompt before the same response.
    """

    def __init__(self, model, *arguments, teacher, tokens=RESPONSE, **options):
        patch_lm_head(model)  # refuses here what it would refuse at the first step
        super().__init__(model, *arguments, data_collator=default_data_collator, **options)
        self.teacher, self.tokens = teacher.to(self.args.device).eval(), tokens
        self.model_accepts_loss_kwargs = True  # Trainer counts the labels of all micro-batches of a step

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad(), self.accelerator.autocast():
            teacher_hidden = hidden_states(
                self.teacher, inputs["teacher_input_ids"], inputs["teacher_attention_mask"], self.tokens
            )
        counted = num_items_in_batch is not None  # not in evaluation, where the loss is a mean over this batch
        loss = distill(
            model,
            inputs["input_ids"],
            inputs["attention_mask"],
            self.tokens,
            teacher_hidden=teacher_hidden,
            teacher_head=head_of(self.teacher),
            mask=(inputs["labels"][:, -self.tokens :] != -100).long(),
            question_weight=inputs["question_weight"],
            denominator=torch.as_tensor(num_items_in_batch).clamp(min=1) if counted else None,
            beta=0.5,
        ).loss
        if counted and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # labels of all processes; gradients are averaged
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None


def main(student, teacher, train, evaluation, tokens=RESPONSE, **options) -> DistillationTrainer:
    """student, teacher: models. train, evaluation: datasets. options: settings that replace those below."""
    settings = {
        "output_dir": "hf-trainer",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "learning_rate": 1e-6,
        "bf16": True,
        "eval_strategy": "steps",
        "remove_unused_columns": False,  # the model's forward does not name all that compute_loss reads
    }
    arguments = TrainingArguments(**{**settings, **options})
    trainer = DistillationTrainer(
        student, arguments, train_dataset=train, eval_dataset=evaluation, teacher=teacher, tokens=tokens
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    from datasets import load_dataset

    parts = load_dataset("json", data_files=sys.argv[3], split="train").train_test_split(test_size=0.1, seed=0)
    main(*(AutoModelForCausalLM.from_pretrained(x) for x in sys.argv[1:3]), parts["train"], parts["test"])
