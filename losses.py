"""The losses of HLSS: hierarchical vision contrast (HVC) and hierarchical alignment (HA) with text.

    python losses.py    which images of a batch attract each other, and the range of the losses

A third loss, attribute regression (AR), is ours and can replace HA. All are plain functions of
tensors and need nothing else from this project.

Under torch.distributed each process passes its own rows, which are compared with those of all
processes. Averaged over the processes, as DistributedDataParallel averages gradients, the loss is
that of one process holding all rows.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

LEVELS = ("patch", "slide", "patient")  # the paper's hierarchy, fine to coarse


def hvc(projections, ids, temperature=0.07):
    """Hierarchical vision contrast: one supervised contrastive loss per level.

        L_HVC = sum_l lambda_l SupCon(p_l, ids_l)

    projections: {level: p_l [n, K_l]}, L2-normalised. ids: {level: [n] integers}, the patch, slide
    or patient of each row. Levels are paired by name. Returns {"hvc_patch": scalar, ...}, which the
    caller weights and sums.
    """
    return {f"hvc_{at}": supcon(p, ids[at], temperature) for at, p in projections.items()}


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

    features: [n, D], L2-normalised. ids: [n] integers that mean the same on all processes. Returns
    the mean over rows, a float32 scalar: log(rows - 1) when all similarities are equal, log |P| at
    best (see `floors`). Raises ValueError if a row has no positive.
    """
    n = len(features)
    rank = dist.get_rank() if dist.is_initialized() else 0
    # In float32: dividing by tau multiplies the rounding errors of bf16 by 14.
    with torch.autocast(features.device.type, enabled=False):
        features = float32(features)
        all_features = gather(features)  # [W n, D]; gradients return to each row's process
        all_ids = gather(ids)  # [W n]

        # The mask of each row's positives.
        column = torch.arange(len(all_ids), device=ids.device)
        itself = column == column[rank * n : (rank + 1) * n, None]  # [n, W n]
        positive = (ids[:, None] == all_ids) & ~itself  # [n, W n]
        P = positive.sum(dim=1)  # [n], |P(i)|
        if (P == 0).any():
            row = int((P == 0).nonzero()[0])
            raise ValueError(
                f"row {row} (id {int(ids[row])}) has no positive: draw at least 2 views of a patch"
            )

        # A softmax over all other rows, whose log is averaged over the positives.
        logits = features @ all_features.T / temperature
        logits = logits.masked_fill(itself, float("-inf"))
        log_probability = logits.log_softmax(dim=1)
        return -(log_probability.masked_fill(~positive, 0).sum(dim=1) / P).mean()


def floors(counts):
    """The lowest value of each level's contrast on its own: log |P|, never quite reached.

    With |P| positives the best p_ij is 1 / |P|. counts: views per patch, patches per slide,
    slides per patient, ... For (2, 2, 2): log 1 = 0, log 3 and log 7. Repeats raise them.
    """
    return [math.log(math.prod(counts[: i + 1]) - 1) for i in range(len(counts))]


def ha(z, bank, temperature=1.0):
    """Hierarchical alignment: each z is drawn to its nearest attribute at each level.

        L_HA = sum_l mean_i 1/2 [KL(s(z_i) || s(t*_il)) + KL(s(t*_il) || s(z_i))]
        t*_il = argmax over t in bank[l] of cos(z_i, t)
        s = softmax over the D dimensions, at the temperature

    z: [n, D], L2-normalised; it receives the gradient. bank: {level: [K_l, D]}, frozen. Returns
    {"ha_patch": scalar, ...}. At the paper's temperature of 1 each is about |z - t|^2 / (2 D): the
    softmax of a unit vector is almost flat. A temperature near 1/sqrt(D) makes HA matter.
    """
    terms = {}
    for level, t in bank.items():
        nearest = t.detach()[nearest_attribute(z, t)]  # [n, D]
        terms[f"ha_{level}"] = symmetric_kl(z, nearest, temperature)
    return terms


def nearest_attribute(z, t):
    """The index [n] of the attribute t [K, D] closest to each z [n, D], both L2-normalised."""
    # In float32: bf16 would change one nearest attribute in a hundred.
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        return (float32(z) @ float32(t).T).argmax(dim=1)


def symmetric_kl(z, t, temperature=1.0):
    """Symmetric KL divergence between z and t, each read as a distribution over D dimensions.

        1/2 [KL(s(z) || s(t)) + KL(s(t) || s(z))]
        = 1/2 sum_d (s(z) - s(t))_d (log s(z) - log s(t))_d
        s(x) = softmax(x / temperature)

    z, t: [n, D]. Returns the mean over rows. The code computes the second form, a sum of terms
    that are never negative, so nothing cancels when s(z) is close to s(t), as at temperature 1.
    """
    with torch.autocast(z.device.type, enabled=False):
        log_s = (float32(z) / temperature).log_softmax(dim=1)
        log_t = (float32(t) / temperature).log_softmax(dim=1)
        return 0.5 * ((log_s.exp() - log_t.exp()) * (log_s - log_t)).sum(dim=1).mean()


def attributes_used(z, t):
    """How many attributes are nearest to some image: a perplexity, from 1 (collapse) to K.

        exp(-sum_k share_k log share_k)

    share_k: the share of images whose nearest attribute is k. z: [n, D], t: [K, D], L2-normalised.
    """
    share = torch.bincount(nearest_attribute(z, t), minlength=len(t)) / len(z)
    return torch.special.entr(share).sum().exp().item()


# ------------------------------------------------------------------ ours, not part of the paper


def ar(z, bank, targets):
    """Attribute regression: z is held to the attribute scores of a frozen teacher.

        L_AR = sum_l mean_ik (s_ilk - a_ilk)^2
        s_l = standardise(z t_l^T)

    This is feature distillation restricted to what the text spans; related work: CAR-FT (arXiv
    2211.16175), Lipsum-FT (2404.00860) and LDIFS (2308.13320). z, bank: as in ha(). targets:
    {level: a_l [n, K_l]}, the teacher's standardised scores of each row's patch, slide or patient.
    Scores are standardised over the rows of all processes. Returns {"ar_patch": scalar, ...}: about
    2 for unrelated scores, and never 0 above patch level, where patches share a target.
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


def standardise(x, eps=1e-8):
    """Scales each column of x [n, K] to mean 0 and variance 1 over the rows; constants become 0.

        (x - mean) / sqrt(variance + eps)

    eps is small beside the variance of cosines, which is often below 1e-4.
    """
    variance, mean = torch.var_mean(x, dim=0, correction=0)
    return (x - mean) / (variance + eps).sqrt()


# ---------------------------------------------------------------------------- all processes as one


def gather(x):
    """All processes' rows, in rank order; a row's gradient is summed over all processes.

    x: [n, ...], of the same shape on each of W processes. Returns [W n, ...] on all of them.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _Gather.apply(x)


class _Gather(torch.autograd.Function):
    """all_gather with the full gradient.

    Every process's loss uses every row, so a row's gradient is the sum of what all processes send
    back; DDP's average makes it that of the mean over all rows. torch's all_gather has no gradient.
    """

    @staticmethod
    def forward(ctx, x):
        everyone = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, x.contiguous())
        return torch.cat(everyone)

    @staticmethod
    def backward(ctx, gradient):
        # One all_to_all: chunk i goes to process i. On gloo it is faster than a reduce_scatter.
        outgoing = torch.stack(gradient.chunk(dist.get_world_size()))
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing)
        return incoming.sum(dim=0)


def float32(x):
    """Casts bf16 and fp16 to float32; keeps float64, so that gradients can be checked."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def main():
    torch.manual_seed(0)
    print("16 images: 2 patients x 2 slides x 2 patches x 2 views.")
    print("Row 0, and which rows it attracts (+) and repels (-):")
    row = torch.arange(16)
    for level, size, floor in zip(LEVELS, (2, 4, 8), floors((2, 2, 2))):
        ids = row // size
        signs = " ".join("+" if same else "-" for same in (ids == 0)[1:])
        equal = supcon(torch.ones(16, 1), ids)
        perfect = supcon(F.one_hot(ids).float(), ids)
        print(
            f"{level:8} . {signs}   equal similarities: {equal:.2f} = log 15   "
            f"perfect: {perfect:.2f} = log {math.exp(floor):.0f}"
        )
    z, t = F.normalize(torch.randn(2, 16, 1024), dim=-1)
    print("\nAlignment of random z (D = 1024) with the nearest of 16 random attributes:")
    for temperature, words in ((1, "1 (the paper's)"), (1024**-0.5, "1/sqrt(D)")):
        print(f"temperature {words:16} {ha(z, {'patch': t}, temperature)['ha_patch']:.2g}")


if __name__ == "__main__":
    main()
