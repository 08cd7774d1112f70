"""The operator alone: SC-SDPO's loss of a batch, the same in micro-batches, and a loss on each token's top 20.

python examples/fused_loss.py
"""

import torch

from scsdpo_kernels import TopK, linear_divergence, question_weights, scsdpo_loss, step_denominator


def main(hidden, head, teacher_hidden, rewards, question_ids, mask):
    """Three losses; each adds its gradients to hidden.grad and head.grad.

    hidden, teacher_hidden: (B, T, D), what the LM head receives where it predicts the T tokens of a response.
    head: (V, D), both sides' LM head.
    rewards, question_ids: (B,). The rollouts of a question share one id.
    mask: (B, T), 1 at response tokens that have a teacher.
    """
    # Once per optimiser step, over the whole batch: √(p̂ (1 - p̂)) of each rollout's question, divided by its mean.
    weight = question_weights(rewards, question_ids)
    total = step_denominator(mask)

    at_once = scsdpo_loss(hidden, head, teacher_hidden, question_weight=weight, mask=mask, beta=0.5).loss
    at_once.backward()

    in_parts = 0.0
    for part in torch.arange(len(mask), device=mask.device).split(2):
        loss = scsdpo_loss(
            hidden[part],
            head,
            teacher_hidden[part],
            question_weight=weight[part],
            mask=mask[part],
            denominator=total,
            beta=0.5,
        ).loss
        loss.backward()
        in_parts += loss.detach()

    # Any other weights of tokens: the loss is a sum over tokens, times their weights.
    token_weight = weight[:, None] * mask / total
    result = linear_divergence(hidden, head, teacher_hidden, token_weight=token_weight, support=TopK(20), beta=0.5)
    result.loss.backward()
    return at_once.detach(), in_parts, result.loss.detach()


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    B, T, D, V = 8, 64, 512, 32000
    hidden = torch.randn(B, T, D, device=device, dtype=torch.bfloat16)
    teacher_hidden = hidden + 0.1 * torch.randn_like(hidden)
    head = (torch.randn(V, D, device=device) / D**0.5).bfloat16()
    losses = main(
        hidden.requires_grad_(),
        head.requires_grad_(),
        teacher_hidden,
        rewards=torch.tensor([1, 0, 1, 0, 1, 0, 0, 0.0], device=device),
        question_ids=torch.arange(B, device=device) // 4,
        mask=(torch.arange(T, device=device) < torch.randint(1, T, (B, 1), device=device)).long(),
    )
    print("at once {:.6f}, in micro-batches {:.6f}, on the top 20 {:.6f}".format(*losses))
