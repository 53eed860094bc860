"""Losses of sequences in numpy, float64, token by token as the papers write them."""

import numpy as np

DUAL = 1.5


def token_losses(objective, bounds, new, old, advantage, fixed):
    """The losses of one sequence's tokens; `fixed`: log-probabilities where the gradient stops."""
    low, high = bounds
    ratio = np.exp(new - old)
    if objective == "cispo":
        weight = [min(max(r, 1 - low), 1 + high) for r in np.exp(fixed - old)]
        return [-w * advantage * n for w, n in zip(weight, new, strict=True)]
    if objective == "gspo":  # the sequence's likelihood ratio to the power of 1 / length
        ratio = np.full(len(new), np.prod(ratio) ** (1 / len(new)))
    losses = [max(-r * advantage, -min(max(r, 1 - low), 1 + high) * advantage) for r in ratio]
    return [min(loss, -DUAL * advantage) if advantage < 0 else loss for loss in losses]


def loss_slowly(
    objective, aggregate, bounds, new, old, advantage, length, query, limit, weight=None, fixed=None
):
    """The mean that `aggregate` names, over sequences [G, M, T] of `length` [G, M] of queries [G]."""
    fixed, sequences = new if fixed is None else fixed, {}
    for g, m in np.ndindex(*length.shape):
        own = slice(0, length[g, m])
        args = (new[g, m, own], old[g, m, own], float(advantage[g, m]), fixed[g, m, own])
        losses = np.array(token_losses(objective, bounds, *(np.asarray(x, np.float64) for x in args)))
        sequences[g, m] = losses if weight is None else losses * weight[g, m, own]
    if aggregate == "token":
        return np.mean(np.concatenate(list(sequences.values())))
    if aggregate == "sequence":
        return np.mean([np.mean(losses) for losses in sequences.values()])
    if aggregate == "prompt":
        own = [[losses for (g, _), losses in sequences.items() if query[g] == q] for q in set(query)]
        return np.mean([np.mean(np.concatenate(losses)) for losses in own])
    return sum(map(sum, sequences.values())) / (length.size * limit)
