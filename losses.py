"""The two losses of HLSS: hierarchical vision contrast (HVC) and hierarchical alignment with text (HA).

Plain functions of tensors that need nothing else of this project:

    >>> import torch
    >>> from losses import supcon
    >>> views = torch.nn.functional.normalize(torch.randn(8, 16), dim=1)
    >>> supcon(views, ids=torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))

Under torch.distributed each process passes its own rows. Every row is compared with the rows of all processes, and the
mean of the processes' losses (which is what DistributedDataParallel differentiates) is the loss of one process that
holds all rows.
"""

import torch
import torch.distributed as dist

LEVELS = ("patch", "slide", "patient")  # the order of the columns of `ids`, fine to coarse


class _Gather(torch.autograd.Function):
    """all_gather whose gradient is right.

    A row of mine is a column in the loss of every process, so its gradient is the sum of what all of them send back.
    PyTorch's plain all_gather returns constants: putting one's own slice back in then loses the part that comes from
    the other processes.
    """

    @staticmethod
    def forward(ctx, x):
        everyone = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, x.contiguous())
        return torch.cat(everyone)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)  # sum over the processes
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    """[n, ...] on each of W processes -> [W n, ...] on all, in the order of the ranks, differentiable.

    Every process must pass the same shape. One process gets its own tensor back.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _Gather.apply(x)


def _float32(x):
    """bf16 and fp16 are raised to float32; float64 stays, so that the gradients can be checked numerically."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def supcon(features, ids, temperature=0.07):
    """Supervised contrastive loss (Khosla et al. 2020, L_out): rows with the same id attract, all others repel.

        loss_i = -1/|P(i)| sum_{j in P(i)} log( exp(f_i.f_j / tau) / sum_{k != i} exp(f_i.f_k / tau) )

    P(i) holds the other rows with the id of row i. For ids (a, a, b, b) the mask of positives is

            a a b b
        a   . + - -        . itself: neither a positive nor in the denominator
        a   + . - -        + positive
        b   - - . +        - negative
        b   - - + .

    features: [n, D], L2-normalised. ids: [n] integers, unique over all processes. Returns a float32 scalar, the mean
    over rows. With n rows in all and equal similarities it is log(n - 1), whatever the ids: a loss that stays there
    has learnt nothing. Raises ValueError if a row has no positive, since its loss is not defined.
    """
    n = len(features)
    rank = dist.get_rank() if dist.is_initialized() else 0
    with torch.autocast(
        features.device.type, enabled=False
    ):  # 1/tau = 14 amplifies what bf16 would round away
        features = _float32(features)
        all_features, all_ids = gather(features), gather(ids)
        column = torch.arange(len(all_ids), device=ids.device)
        itself = column == column[rank * n : (rank + 1) * n, None]  # [n, W n]
        positive = (ids[:, None] == all_ids) & ~itself
        positives = positive.sum(dim=1)
        if (positives == 0).any():
            row = int((positives == 0).nonzero()[0])
            raise ValueError(
                f"row {row} (id {int(ids[row])}) has no other row with its id, so nothing attracts it: "
                "draw at least 2 views a patch"
            )
        logits = (features @ all_features.T / temperature).masked_fill(itself, float("-inf"))
        log_probability = logits.log_softmax(dim=1)
        return -(log_probability.masked_fill(~positive, 0).sum(dim=1) / positives).mean()


def hvc(projections, ids, temperature=0.07):
    """Hierarchical vision contrast: one SupCon a level, each on the projection and with the positives of that level.

        L_HVC = sum_l lambda_l SupCon(p_l, ids[:, l])

    projections: {level: [n, K_l]}, L2-normalised, levels out of LEVELS. ids: [n, 3], the patch, slide and patient of
    each row. Returns {level: scalar}; the caller weights and sums them.
    """
    return {
        level: supcon(p, ids[:, LEVELS.index(level)], temperature)
        for level, p in projections.items()
    }


def nearest_attribute(z, t):
    """The attribute that each image is closest to by cosine. z: [n, D] and t: [K, D], both L2-normalised. Returns [n]
    integers."""
    with torch.no_grad():
        return (z.float() @ t.float().T).argmax(dim=1)


def attributes_used(z, t):
    """The perplexity of the nearest attributes, from 1 (collapse) to K. z: [n, D] and t: [K, D], L2-normalised.

    exp(-sum_k share_k log share_k),    share_k = how many of z have t_k as nearest / n
    """
    share = torch.bincount(nearest_attribute(z, t), minlength=len(t)) / len(z)
    return torch.special.entr(share).sum().exp().item()


def symmetric_kl(z, t, temperature=1.0):
    """Mean over rows of the symmetric KL divergence between z and t, each read as a distribution over its D
    dimensions.

        1/2 [KL(s(z) || s(t)) + KL(s(t) || s(z))] = 1/2 sum_d (s(z) - s(t))_d (log s(z) - log s(t))_d,    s = softmax(.
        / temperature)

    z, t: [n, D]. The two forms are equal term by term; the second has no cancellation when s(z) is close to s(t),
    which for unit vectors at temperature 1 it always is (the divergence is about 1/D).
    """
    with torch.autocast(z.device.type, enabled=False):
        log_s = (_float32(z) / temperature).log_softmax(dim=1)
        log_t = (_float32(t) / temperature).log_softmax(dim=1)
        return 0.5 * ((log_s.exp() - log_t.exp()) * (log_s - log_t)).sum(dim=1).mean()


def ha(z, bank, temperature=1.0):
    """Hierarchical alignment: z is drawn to the nearest attribute of each level.

        L_HA = sum_l mean_i 1/2 [KL(s(z_i) || s(t*_il)) + KL(s(t*_il) || s(z_i))],    t*_il = argmax_{t in bank[l]}
        cos(z_i, t)

    z: [n, D], L2-normalised; the gradient reaches it. bank: {level: [K_l, D]}, frozen. Returns {level: scalar}. No
    gather: a row needs no other row. At temperature 1 (the paper's) the softmax over D unit-vector entries is almost
    flat and the loss near zero; a lower one (about 1/sqrt(D)) makes it felt.
    """
    return {
        level: symmetric_kl(z, t.detach()[nearest_attribute(z, t)], temperature)
        for level, t in bank.items()
    }
