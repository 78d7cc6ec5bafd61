"""The networks: CLIP's towers, HLSS with its projections; and what a run keeps on the disk.

The towers carry the parameter names of OpenAI's CLIP (Radford et al. 2021, arXiv 2103.00020), and
their sizes are read off a state dict: the demo's small CLIP and the real RN50 are the same lines.

    >>> tower = image_tower(tools.weights.load_clip("RN50"))
    >>> tower(torch.rand(2, 3, 224, 224)).shape
    torch.Size([2, 1024])

Shapes: N images or texts of L tokens, S pixels a side, D dimensions of the embedding, K_l
attributes of level l.
"""

import fcntl
import glob
import json
import os
import socket
import zipfile
from collections import OrderedDict

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from losses import exchange, float32

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, RGB in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# hlss contrasts every level, each on its own projection; hidisc every level, and simclr the finest
# alone, on one projection that they share.
OBJECTIVES = ("hlss", "hidisc", "simclr")


class Bottleneck(nn.Module):
    """ResNet bottleneck whose strides are average pools, which do not alias."""

    def __init__(self, channels, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = nn.Identity()
        if stride > 1 or channels != 4 * planes:
            conv = nn.Conv2d(channels, 4 * planes, 1, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * planes))

    def forward(self, x):
        """x: [N, channels, H, W] -> [N, 4 planes, H / stride, W / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(self.avgpool(y)))
        return F.relu(y + self.downsample(self.avgpool(x)))


class AttentionPool(nn.Module):
    """Global average pooling, then one attention step: the mean asks, the feature map answers."""

    def __init__(self, grid, channels, heads, dim):
        super().__init__()
        positions = torch.randn(grid * grid + 1, channels) / channels**0.5
        self.heads = heads
        self.positional_embedding = nn.Parameter(positions)
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.c_proj = nn.Linear(channels, dim)

    def forward(self, x):
        """x: [N, C, H, W] -> [N, D]."""
        N, C, H, W = x.shape  # images, channels, height, width
        L = 1 + H * W  # tokens: the mean and each place of the map
        d = C // self.heads  # channels of a head
        x = x.flatten(2).transpose(1, 2)  # [N, L - 1, C]
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)  # [N, L, C]
        x = x + self.positional_embedding
        q = self.q_proj(x[:, :1]).view(N, 1, self.heads, d).transpose(1, 2)  # [N, heads, 1, d]
        k = self.k_proj(x).view(N, L, self.heads, d).transpose(1, 2)  # [N, heads, L, d]
        v = self.v_proj(x).view(N, L, self.heads, d).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, k, v)  # [N, heads, 1, d]
        return self.c_proj(x.transpose(1, 2).reshape(N, C))


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: a stem of three convolutions, anti-aliased strides, attention pooling.

    layers: blocks in each of the four stages. width: channels of the stem (64 in RN50). dim: D.
    image_size: S, a multiple of 32.
    """

    def __init__(self, layers, width, dim, image_size):
        super().__init__()
        self.image_size = image_size
        self.dim = dim
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        channels = width
        for stage, count in enumerate(layers):
            planes = width * 2**stage
            blocks = [Bottleneck(channels, planes, stride=2 if stage else 1)]
            channels = 4 * planes
            blocks += [Bottleneck(channels, planes, stride=1) for _ in range(count - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool(image_size // 32, channels, max(1, channels // 64), dim)

        # As CLIP starts: a block is its shortcut, and attention has small weights.
        for name, parameter in self.named_parameters():
            if name.startswith("layer") and name.endswith("bn3.weight"):
                nn.init.zeros_(parameter)
        for name in ("q_proj", "k_proj", "v_proj", "c_proj"):
            nn.init.normal_(getattr(self.attnpool, name).weight, std=channels**-0.5)

    def forward(self, x):
        """x: [N, 3, S, S] -> [N, D]. CLIP, section 2.4, the first image encoder."""
        x = F.relu(self.bn1(self.conv1(x)))  # [N, width / 2, S / 2, S / 2]
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))  # [N, width, S / 2, S / 2]
        x = self.avgpool(x)  # [N, width, S / 4, S / 4]
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # [N, 32 width, S / 32, S / 32]
        return self.attnpool(x)


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the approximation that OpenAI's weights were trained with."""

    def forward(self, x):
        return F.silu(1.702 * x) / 1.702  # silu(y) is y sigmoid(y), in one pass over memory


ACTIVATIONS = {"quickgelu": QuickGELU, "gelu": nn.GELU}


class Block(nn.Module):
    """Transformer block with the norms first. causal: no token sees a later one."""

    def __init__(self, width, activation, causal):
        super().__init__()
        self.causal = causal
        self.ln_1 = nn.LayerNorm(width)
        self.ln_2 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, max(1, width // 64), batch_first=True)
        layers = OrderedDict(
            c_fc=nn.Linear(width, 4 * width),
            gelu=ACTIVATIONS[activation](),
            c_proj=nn.Linear(4 * width, width),
        )
        self.mlp = nn.Sequential(layers)

    def forward(self, x):
        N, L, width = x.shape  # images or texts, tokens, channels
        y = self.ln_1(x)
        mask = None
        if self.causal:
            mask = torch.full((L, L), float("-inf"), dtype=y.dtype, device=y.device).triu(1)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


def transformer(width, layers, activation, causal=False):
    """A stack of blocks, [N, L, width] -> the same, named as in CLIP: `resblocks.0`, ..."""
    blocks = [Block(width, activation, causal) for _ in range(layers)]
    return nn.Sequential(OrderedDict(resblocks=nn.Sequential(*blocks)))


class VisionTransformer(nn.Module):
    """CLIP's ViT, read out at the class token.

    patch: pixels a side, a divisor of image_size. width: channels of a token. layers: blocks.
    """

    def __init__(self, patch, width, layers, dim, image_size, activation):
        super().__init__()
        tokens = 1 + (image_size // patch) ** 2
        self.image_size = image_size
        self.dim = dim
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.ln_post = nn.LayerNorm(width)
        self.transformer = transformer(width, layers, activation)
        self.proj = nn.Parameter(torch.randn(width, dim) * width**-0.5)

    def forward(self, x):
        """x: [N, 3, S, S] -> [N, D]. CLIP, section 2.4, the second image encoder."""
        N = len(x)
        x = self.conv1(x)  # [N, width, S / patch, S / patch]
        x = x.flatten(2).transpose(1, 2)  # [N, L - 1, width]
        x = torch.cat([self.class_embedding.expand(N, 1, -1), x], dim=1)  # [N, L, width]
        x = x + self.positional_embedding
        x = self.transformer(self.ln_pre(x))
        x = self.ln_post(x[:, 0])  # [N, width]
        return x @ self.proj


class TextTower(nn.Module):
    """CLIP's text transformer: causal, read out at the end token.

    vocabulary: how many tokens there are. context: the longest text, in tokens.
    """

    def __init__(self, vocabulary, context, width, layers, dim, activation):
        super().__init__()
        self.context = context
        self.dim = dim
        self.vocabulary = vocabulary
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context, width))
        self.transformer = transformer(width, layers, activation, causal=True)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, dim) * width**-0.5)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, tokens):
        """tokens: [N, L] integers -> [N, D]. CLIP, section 2.4, the text encoder."""
        N, L = tokens.shape  # texts, tokens
        x = self.token_embedding(tokens)  # [N, L, width]
        x = x + self.positional_embedding[:L]
        x = self.ln_final(self.transformer(x))
        end = tokens.argmax(dim=1)  # it has the largest id; the padding after it is never seen
        x = x[torch.arange(N, device=tokens.device), end]  # [N, width]
        return x @ self.text_projection


# ------------------------------------------------------------------ batch norm over all processes


class _Mean(torch.autograd.Function):
    """The mean of a tensor over all processes; and so, on the way back, of its gradient.

    DistributedDataParallel averages what each process finds for its own loss. What came from all
    is thus a W-th of the sum of their gradients.
    """

    @staticmethod
    def forward(ctx, x):
        return exchange([x] * dist.get_world_size()).mean(dim=0)

    @staticmethod
    def backward(ctx, gradient):
        return exchange([gradient] * dist.get_world_size()).mean(dim=0)


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm as of one process with all rows; PyTorch's SyncBatchNorm refuses the CPU.

        y = w (x - mean) / sqrt(var + eps) + b

    Mean and variance are over the rows and places of all processes, which hold equal shares.
    """

    def forward(self, x):
        """x: [N, C, H, W], the rows of this process -> the same."""
        if not self.training:
            return super().forward(x)
        values = float32(x)
        moments = torch.stack([values.mean(dim=(0, 2, 3)), values.square().mean(dim=(0, 2, 3))])
        mean, square = _Mean.apply(moments.double())  # [C]; double, for their difference is small
        var = square - mean**2
        factor = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * factor

        count = x.numel() // len(mean) * dist.get_world_size()
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.detach().to(self.running_mean), self.momentum)
        unbiased = var.detach() * count / (count - 1)
        self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        return x * factor.to(x)[:, None, None] + shift.to(x)[:, None, None]


def share_batch_norm(model):
    """Turns every batch norm of a model, in place, into one over all processes."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm2d


# ------------------------------------------------------------------ from a state dict to a tower


def _part(state, prefix):
    """The tensors whose names begin with the prefix, without it."""
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def _count(state, prefix):
    """How many numbered children `prefix0.`, `prefix1.`, ... a state dict has."""
    return len({name.split(".")[0] for name in _part(state, prefix)})


def resize_positions(positions, grid):
    """The positional embedding of one token and a square of g x g, for a square of grid x grid.

    [1 + g^2, C] -> [1 + grid^2, C], bicubic; the first row, of the token, stays.
    """
    g = round((len(positions) - 1) ** 0.5)
    square = positions[1:].T.reshape(1, -1, g, g)  # [1, C, g, g]
    if g != grid:
        square = F.interpolate(square, size=(grid, grid), mode="bicubic", antialias=True)
    return torch.cat([positions[:1], square[0].flatten(1).T])


def image_tower(state, image_size=None, weights=True):
    """The image tower of a state dict, with its weights: CLIP's ResNet or ViT, of the dict's sizes.

    state: of a CLIP (`visual.*`) or of our own HLSS (`tower.*`). image_size: pixels, where not the
    size that it was trained with; interpolates the positional embedding. weights: False takes the
    sizes alone, and random weights. Raises ValueError if it does not fit, or if the tower is
    another.
    """
    tensors = _part(state, "visual." if "visual.conv1.weight" in state else "tower.")
    is_resnet = "attnpool.positional_embedding" in tensors
    is_vit = "class_embedding" in tensors and len(tensors["class_embedding"]) <= 1024
    if not is_resnet and not is_vit:
        raise ValueError(
            "the image tower is neither CLIP's ResNet nor its ViT (heads of 64 channels)"
        )
    positions = "attnpool.positional_embedding" if is_resnet else "positional_embedding"
    stride = 32 if is_resnet else tensors["conv1.weight"].shape[-1]  # pixels from one to the next
    if not image_size:
        image_size = stride * round((len(tensors[positions]) - 1) ** 0.5)
    if image_size % stride:
        raise ValueError(f"--image-size {image_size}: this tower needs a multiple of {stride}")
    tensors[positions] = resize_positions(tensors[positions], image_size // stride)

    with torch.device("meta" if weights else "cpu"):  # meta: shapes alone, the weights come next
        if is_resnet:
            layers = [_count(tensors, f"layer{stage}.") for stage in (1, 2, 3, 4)]
            width = len(tensors["conv3.weight"])
            dim = len(tensors["attnpool.c_proj.weight"])
            tower = ModifiedResNet(layers, width, dim, image_size)
        else:
            layers = _count(tensors, "transformer.resblocks.")
            width, dim = tensors["proj"].shape
            activation = state.get("activation", "quickgelu")
            tower = VisionTransformer(stride, width, layers, dim, image_size, activation)

    if not weights:
        return tower

    # Copies, so that training leaves the state as it is.
    for name, value in tensors.items():
        tensors[name] = value.clone(memory_format=torch.contiguous_format)
    tower.load_state_dict(tensors, assign=True)
    return tower


def text_tower(state):
    """The text tower of a CLIP's state dict, whose tensors it shares; frozen and in eval mode.

    Raises ValueError if the state has none, as that of our own HLSS.
    """
    if "token_embedding.weight" not in state:
        raise ValueError(
            "no text tower here (our own checkpoints have none): encode the bank with the CLIP "
            "that they started from (describe.py encode) and give --bank bank.pt"
        )
    vocabulary, width = state["token_embedding.weight"].shape
    context = len(state["positional_embedding"])
    layers = _count(state, "transformer.resblocks.")
    dim = state["text_projection"].shape[1]
    activation = state.get("activation", "quickgelu")
    with torch.device("meta"):  # shapes alone: the weights come next
        tower = TextTower(vocabulary, context, width, layers, dim, activation)
    # What belongs to its parts: not visual.*, not logit_scale.
    tensors = {name: state[name] for name in state if hasattr(tower, name.split(".")[0])}
    tower.load_state_dict(tensors, assign=True)
    return tower.eval().requires_grad_(False)


def backbone_tower(name, bank, weights=""):
    """A classifier of torchvision, whose last linear layer is new and gives z.

    [N, 3, S, S] -> [N, D], D as of a bank's vectors; without any there is no such layer, and D is
    the backbone's own. weights: "" for random ones, "DEFAULT" for torchvision's (a download; their
    mean and standard deviation are then at tower.normalisation), or the file of a state dict of
    this classifier. Raises ValueError if torchvision has no such classifier, or it does not fit.
    """
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(f"--backbone {name}: no classifier of torchvision, as resnet18 is one")
    default = weights == "DEFAULT"
    tower = torchvision.models.get_model(name, weights="DEFAULT" if default else None)
    linears = [path for path, module in tower.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError(f"--backbone {name}: it ends without a linear layer; take resnet18")
    if default:
        preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        tower.normalisation = preset.mean, preset.std
    elif weights:
        tensors = read_whole(weights, "name a state dict that torch.save wrote")
        needed = [n for n in tower.state_dict() if not n.startswith(linears[-1])]
        wrong = tower.load_state_dict({n: tensors[n] for n in needed if n in tensors}, strict=False)
        missing = [n for n in wrong.missing_keys if n in needed]
        if missing:
            raise ValueError(f"--backbone-weights {weights} has no {missing[0]} for a {name}")
    tower.image_size = 224
    tower.dim = tower.get_submodule(linears[-1]).in_features
    last = nn.Identity()
    vectors = [t for t in bank.values() if len(t)]
    if vectors:
        dim = vectors[0].shape[1]
        last = nn.Linear(tower.dim, dim)
        tower.dim = dim
    tower.set_submodule(linears[-1], last)
    return tower


def make_tower(config, bank, clip, image_size=None):
    """The image tower that a run starts from: the one place to change for a tower of your own.

    A tower maps normalised images [N, 3, S, S] to [N, D] and has `dim`, which is D, and
    `image_size`, the S of its views. train.py and evaluate.py both come here, also to load a
    checkpoint, whose weights then replace these. config: {flag: value}, as of train.Config. bank:
    {level: [K_l, D]}. clip: the state dict of a CLIP or of our own HLSS. image_size: in pixels,
    where not the size that the CLIP was trained with.
    """
    if config.get("backbone"):
        return backbone_tower(config["backbone"], bank, config.get("backbone_weights", ""))
    return image_tower(clip, image_size, weights=config.get("start") != "random")


# ------------------------------------------------------------------------------------------- HLSS


class HLSS(nn.Module):
    """Image tower, frozen bank and projections (Watawana et al. 2024, arXiv 2403.14616).

    tower: [N, 3, S, S] normalised images -> [N, D]. bank: {level: [K_l, D]}, one unit vector for
    each attribute; hidisc and simclr also train without any, [0, D]. objective: one of OBJECTIVES.
    Raises ValueError if bank and tower differ in D.
    """

    def __init__(self, tower, bank, objective="hlss"):
        super().__init__()
        self.tower = tower
        self.objective = objective
        self.levels = tuple(bank)  # fine to coarse
        dim = bank[self.levels[0]].shape[1]
        if dim != tower.dim:
            raise ValueError(
                f"the bank's vectors have {dim} dimensions and the image tower's {tower.dim}: "
                "encode the bank with the text tower of the same CLIP"
            )
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(CLIP_STD).view(3, 1, 1))
        self.projections = nn.ModuleDict()
        for level in self.levels:
            self.register_buffer(f"bank_{level}", bank[level].detach().clone())
            if objective == "hlss":
                # W_l starts as the bank, b_l as 0: p_l starts as the similarity to each attribute.
                projection = nn.Linear(dim, len(bank[level]))
                projection.weight.data.copy_(bank[level])
                projection.bias.data.zero_()
                self.projections[level] = projection
        if objective != "hlss":
            self.projections["shared"] = nn.Linear(dim, 128)

    @property
    def bank(self):
        """{level: [K_l, D]}, the frozen attribute vectors."""
        return {level: getattr(self, f"bank_{level}") for level in self.levels}

    def normalise(self, mean, std):
        """Sets the mean and standard deviation of the three channels, of values in [0, 1], where
        they are not CLIP's. As buffers they stay with the weights that were trained with them."""
        self.mean.copy_(torch.tensor(mean).view(3, 1, 1))
        self.std.copy_(torch.tensor(std).view(3, 1, 1))

    def encode(self, images):
        """The embedding z [N, D], L2-normalised, of images [N, 3, S, S] in [0, 1]."""
        z = self.tower((images - self.mean) / self.std)
        return F.normalize(z.float(), dim=1)

    def forward(self, images):
        """The embedding z [N, D] of images [N, 3, S, S] in [0, 1], and {level: p_l [N, K_l]}.

            p_l = norm(W_l z + b_l)

        as in the paper's hierarchical vision contrast. hidisc and simclr: one p [N, 128].
        """
        z = self.encode(images)
        projections = {}
        for name, projection in self.projections.items():
            projections[name] = F.normalize(projection(z).float(), dim=1)
        if self.objective != "hlss":
            levels = self.levels[:1] if self.objective == "simclr" else self.levels
            projections = dict.fromkeys(levels, projections["shared"])
        return z, projections


# ----------------------------------------------------------------------------- a run's checkpoints


def hlss_from_state(state, config):
    """HLSS rebuilt from its own state dict: no CLIP file, no text tower, no bank file is needed.

    config: of the run, {flag: value}.
    """
    names = [name for name in state if name.startswith("bank_")]
    bank = {name.removeprefix("bank_"): state[name] for name in names}
    clip = state | {"activation": config.get("activation", "quickgelu")}
    tower = make_tower(config | {"backbone_weights": ""}, bank, clip)
    model = HLSS(tower, bank, config["objective"])
    model.load_state_dict(state)
    return model


def write_whole(path, write):
    """Writes a file by write(file), whole or not at all.

    A crash at any moment, or a full disk, leaves what stood there before. Raises OSError.
    """
    part = f"{path}.{os.getpid()}.part"  # of this process alone
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        error = error.__context__ or error  # torch.save turns the one into the other
        if os.path.exists(part):
            os.remove(part)
        remedy = "make room and start again" if "space" in str(error) else "look at the folder"
        raise OSError(f"{path} cannot be written ({error}): {remedy}") from error
    os.replace(part, path)


def lock_folder(folder):
    """A file whose lock the kernel releases when this process ends, however it ends.

    Raises ValueError, with the other process, if there is one that holds it.
    """
    lock = open(os.path.join(folder, "lock"), "a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        raise ValueError(
            f"process {lock.read()} is training in {folder}: wait for it, or give another --out"
        ) from None
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {socket.gethostname()}")
    lock.flush()
    for path in glob.glob(os.path.join(glob.escape(folder), "*.part")):
        os.remove(path)  # of a process that was killed
    return lock


def checkpoints(run):
    """The checkpoint files of a run folder, oldest first."""
    return sorted(glob.glob(os.path.join(glob.escape(run), "step-*.pt")))


def save_checkpoint(folder, checkpoint):
    """Writes step-N.pt, N = checkpoint["step"], and keeps the newest two."""
    path = os.path.join(folder, f"step-{checkpoint['step']:07d}.pt")
    write_whole(path, lambda file: torch.save(checkpoint, file))
    for old in checkpoints(folder)[:-2]:
        os.remove(old)


def read_whole(path, remedy="take the one before"):
    """What torch.save wrote to a file, on the CPU. Raises ValueError, with its name, if damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()  # torch.load does not look at the checksums
        if member:
            raise ValueError(f"wrong checksum of {member}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever zip, pickle and torch make of a damaged file
        reason = f"{path} is damaged, or another file ({error})"
        raise ValueError(f"{reason}: {remedy}") from error


def newest_checkpoint(folder):
    """The newest checkpoint that is whole, reporting those that are not; {"step": 0} in a new run.

    Raises ValueError if there are some and none is whole: to start anew would cost the log.
    """
    paths = checkpoints(folder)
    for path in reversed(paths):
        try:
            return read_whole(path)
        except ValueError as error:
            print(error)
    if paths:
        raise ValueError(f"no checkpoint in {folder} is whole: restore one, or give another --out")
    return {"step": 0}


def load_run(path):
    """HLSS on the CPU in eval mode, and the dict of the checkpoint that it comes from.

    path: a run folder (its newest whole checkpoint) or a checkpoint file; nothing else is needed.
    Raises FileNotFoundError, or ValueError if there is no whole checkpoint of train.py.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} is neither a run folder nor a checkpoint file")
    checkpoint = newest_checkpoint(path) if os.path.isdir(path) else read_whole(path)
    if "config" not in checkpoint:
        raise ValueError(f"{path} holds no checkpoint of train.py (step-*.pt): train first")
    return hlss_from_state(checkpoint["model"], checkpoint["config"]).eval(), checkpoint


class Log:
    """log.jsonl, one JSON line at a time. All ranks know it, only rank 0 writes and speaks.

    On opening, what a killed run wrote after its last checkpoint (of step `until`) is dropped, and
    a damaged line is named.
    """

    def __init__(self, folder, until, rank):
        self.path = os.path.join(folder, "log.jsonl")
        self.lines = []
        self.silent = rank > 0
        if until:
            self.read(until)
        if not self.silent:
            content = "".join(json.dumps(line) + "\n" for line in self.lines)
            write_whole(self.path, lambda file: file.write(content.encode()))

    def read(self, until):
        """Lines up to a step."""
        lines = []
        if os.path.exists(self.path):
            with open(self.path, "rb") as file:
                lines = file.read().split(b"\n")
        elif not self.silent:
            print(f"{self.path} is gone: a new one begins after step {until}")
        *lines, unfinished = lines or [b""]  # the last is empty, or what a kill left
        for number, line in enumerate(lines, 1):
            try:
                line = json.loads(line)
                if line["step"] <= until:
                    self.lines.append(line)
            except (ValueError, TypeError, KeyError):
                if not self.silent:
                    print(f"{self.path}, line {number}, is damaged and left out")

    def write(self, **line):
        """Append a line, on the disk before a checkpoint that it describes."""
        self.lines.append(line)
        if not self.silent:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def has_probe(self, step):
        return any("probe" in line for line in self.lines if line["step"] == step)

    def probes(self):
        """{"step N": result} of the first and the last kNN probe."""
        probes = [line for line in self.lines if line.get("probe")]
        return {f"step {line['step']}": line["probe"] for line in [*probes[:1], *probes[-1:]]}
