"""The losses of HLSS: hierarchical vision contrast (HVC) and hierarchical alignment (HA) with text.

A third is ours and may take the place of the second: attribute regression (AR).

Plain functions of tensors that need nothing else of this project:

    >>> import torch
    >>> from losses import supcon
    >>> views = torch.nn.functional.normalize(torch.randn(8, 16), dim=1)
    >>> supcon(views, ids=torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))

Under torch.distributed each process passes its own rows. Every row is compared with the rows of all
processes. The mean of the processes' losses, which is what DistributedDataParallel differentiates,
is the loss of one process that holds all rows.
"""

import torch
import torch.distributed as dist

LEVELS = ("patch", "slide", "patient")  # the paper's, fine to coarse: the columns of `ids`


def exchange(parts):
    """Sends parts[i] to process i. Returns [W, ...]: what each process has sent here.

    All at once, so that everybody waits once: gloo's all_reduce goes round in a ring, and many
    small ones are most of a step. parts: W tensors of one shape.
    """
    parts = torch.stack(list(parts))
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts)
    return received


class _Gather(torch.autograd.Function):
    """all_gather whose gradient is right.

    A row of mine is a column in the loss of every process, so its gradient is the sum of what all
    of them send back. PyTorch's plain all_gather returns constants: putting one's own slice back in
    then loses the part that comes from the other processes.
    """

    @staticmethod
    def forward(ctx, x):
        everyone = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, x.contiguous())
        return torch.cat(everyone)

    @staticmethod
    def backward(ctx, gradient):
        mine = exchange(gradient.chunk(dist.get_world_size()))
        return mine.sum(dim=0)


def gather(x):
    """The rows of all processes, in the order of the ranks, differentiable.

    x: [n, ...], of the same shape on each of W processes. Returns [W n, ...] on all of them. One
    process gets its own tensor back.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _Gather.apply(x)


def float32(x):
    """bf16 and fp16 are raised to float32; float64 stays, so that gradients can be checked."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def supcon(features, ids, temperature=0.07):
    """Supervised contrastive loss: rows with the same id attract each other, all others repel.

    Khosla et al. 2020, their L_out:

        loss_i = -1/|P(i)| sum_{j in P(i)} log p_ij
        p_ij   = exp(f_i.f_j / tau) / sum_{k != i} exp(f_i.f_k / tau)

    P(i) holds the other rows with the id of row i. For ids (a, a, b, b) the mask of positives is

            a a b b
        a   . + - -        . itself: neither a positive nor in the denominator
        a   + . - -        + positive
        b   - - . +        - negative
        b   - - + .

    features: [n, D], L2-normalised. ids: [n] integers, unique over all processes. Returns a float32
    scalar, the mean over rows. With n rows in all and equal similarities it is log(n - 1), whatever
    the ids: a loss that stays there has learnt nothing. Raises ValueError if a row has no positive,
    since its loss is not defined.
    """
    n = len(features)
    rank = dist.get_rank() if dist.is_initialized() else 0
    # float32: 1 / tau = 14 amplifies what bf16 would round away
    with torch.autocast(features.device.type, enabled=False):
        features = float32(features)
        all_features = gather(features)  # [W n, D]
        all_ids = gather(ids)  # [W n]
        column = torch.arange(len(all_ids), device=ids.device)
        itself = column == column[rank * n : (rank + 1) * n, None]  # [n, W n]
        positive = (ids[:, None] == all_ids) & ~itself  # [n, W n]
        positives = positive.sum(dim=1)  # [n]
        if (positives == 0).any():
            row = int((positives == 0).nonzero()[0])
            remedy = "nothing attracts it: draw at least 2 views a patch"
            raise ValueError(
                f"row {row} (id {int(ids[row])}) has no other row with its id: {remedy}"
            )
        logits = features @ all_features.T / temperature
        logits = logits.masked_fill(itself, float("-inf"))
        log_probability = logits.log_softmax(dim=1)
        return -(log_probability.masked_fill(~positive, 0).sum(dim=1) / positives).mean()


def hvc(projections, ids, temperature=0.07):
    """Hierarchical vision contrast: one SupCon for each level.

        L_HVC = sum_l lambda_l SupCon(p_l, ids[:, l])

    Each level has its own projection and its own positives. projections: {level: [n, K_l]},
    L2-normalised, from the finest level on. ids: [n, L], for each row its patch, slide and patient,
    or whatever the levels are. Returns {"hvc_patch": scalar, ...}; the caller weights and sums.
    """
    terms = {}
    for column, (level, p) in enumerate(projections.items()):
        terms[f"hvc_{level}"] = supcon(p, ids[:, column], temperature)
    return terms


def nearest_attribute(z, t):
    """The attribute that each image is closest to by cosine: [n] integers.

    z: [n, D] and t: [K, D], both L2-normalised.
    """
    # float32: bf16 would change one nearest attribute in a hundred
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        return (float32(z) @ float32(t).T).argmax(dim=1)


def attributes_used(z, t):
    """How many attributes are nearest to some image: from 1 (collapse) to K, a perplexity.

        exp(-sum_k share_k log share_k)

    share_k is the share of z whose nearest attribute is t_k. z: [n, D], t: [K, D], L2-normalised.
    """
    share = torch.bincount(nearest_attribute(z, t), minlength=len(t)) / len(z)
    return torch.special.entr(share).sum().exp().item()


def symmetric_kl(z, t, temperature=1.0):
    """Symmetric KL divergence between z and t, each a distribution over its D dimensions.

        1/2 [KL(s(z) || s(t)) + KL(s(t) || s(z))]
        = 1/2 sum_d (s(z) - s(t))_d (log s(z) - log s(t))_d
        s(x) = softmax(x / temperature)

    z, t: [n, D]. Returns the mean over rows, a scalar. The two forms are equal term by term; the
    second, which is computed, has no cancellation when s(z) is close to s(t). For unit vectors at
    temperature 1 it always is: the divergence is about 1/D.
    """
    with torch.autocast(z.device.type, enabled=False):
        log_s = (float32(z) / temperature).log_softmax(dim=1)
        log_t = (float32(t) / temperature).log_softmax(dim=1)
        return 0.5 * ((log_s.exp() - log_t.exp()) * (log_s - log_t)).sum(dim=1).mean()


def ha(z, bank, temperature=1.0):
    """Hierarchical alignment: z is drawn to the nearest attribute of each level.

        L_HA = sum_l mean_i 1/2 [KL(s(z_i) || s(t*_il)) + KL(s(t*_il) || s(z_i))]
        t*_il = argmax over t in bank[l] of cos(z_i, t)
        s = softmax over the D dimensions, at the temperature

    z: [n, D], L2-normalised; the gradient reaches it. bank: {level: [K_l, D]}, frozen. Returns
    {"ha_patch": scalar, ...}. No gather: a row needs no other row. At the paper's temperature of 1
    the softmax over D entries of a unit vector is almost flat and the loss near zero; at a lower
    one, of about 1/sqrt(D), it has weight.
    """
    terms = {}
    for level, t in bank.items():
        nearest = t.detach()[nearest_attribute(z, t)]  # [n, D]
        terms[f"ha_{level}"] = symmetric_kl(z, nearest, temperature)
    return terms


def standardise(x, eps=1e-5):
    """Each column of x [n, K] with mean 0 and variance 1 over the rows; a constant one becomes 0.

        (x - mean) / sqrt(variance + eps)

    As batch norm (Ioffe and Szegedy 2015) does it, without factor and shift of its own.
    """
    variance, mean = torch.var_mean(x, dim=0, correction=0)
    return (x - mean) / (variance + eps).sqrt()


def ar(z, bank, targets):
    """Attribute regression, ours and not the paper's: z keeps the attribute scores of a teacher.

        L_AR = sum_l mean_ik (s_ilk - a_ilk)^2
        s_l = standardise(z t_l^T)

    What counts is which images score higher in an attribute, and not the offset or the scale that
    its words have. z: [n, D], L2-normalised; the gradient reaches it. bank: {level: [K_l, D]},
    frozen. targets: {level: a_l [n, K_l]}, the teacher's standardised scores of the same rows, or
    of the slide or patient that they are of. Mean and variance are over the rows of all processes.
    Returns {"ar_patch": scalar, ...}: 0 where the two agree, about 2 where they have nothing in
    common.
    """
    n = len(z)
    rank = dist.get_rank() if dist.is_initialized() else 0
    terms = {}
    with torch.autocast(z.device.type, enabled=False):
        all_z = gather(float32(z))  # [W n, D]
        for level, t in bank.items():
            scores = standardise(all_z @ t.detach().to(all_z).T)  # [W n, K_l]
            mine = scores[rank * n : (rank + 1) * n]
            terms[f"ar_{level}"] = (mine - targets[level]).square().mean()
    return terms
