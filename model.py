"""HLSS: an image tower, a frozen bank of text vectors, and one projection per level.

    python model.py    the shapes, from images to z to the projections

Shapes: N images or texts, L tokens, S pixels a side, D dimensions, K_l attributes of level l.
"""

import os
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from losses import LEVELS, gather
from tools.runs import newest_checkpoint, read_whole
from tools.weights import read_tensors

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, RGB in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
OBJECTIVES = ("hlss", "hidisc", "simclr")


class HLSS(nn.Module):
    """Image tower, frozen bank and projections (Watawana et al. 2024, arXiv 2403.14616).

    tower: normalised images [N, 3, S, S] -> [N, D]; it has `dim`, its D. bank: {level: t_l
    [K_l, D]}, fine to coarse, one unit vector per attribute; [0, D] in a run without text.
    """

    def __init__(self, tower, bank, objective="hlss"):
        super().__init__()
        self.tower = tower
        self.objective = objective
        self.levels = tuple(bank)
        dim = bank[self.levels[0]].shape[1]
        if dim != tower.dim:
            raise ValueError(
                f"the bank's vectors have {dim} dimensions and the image tower's {tower.dim}: "
                "encode the bank with the text tower of the same CLIP"
            )
        mean, std = getattr(tower, "normalisation", (CLIP_MEAN, CLIP_STD))
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.projections = nn.ModuleDict()
        for level in self.levels:
            self.register_buffer(f"bank_{level}", bank[level].detach().clone())
            if objective == "hlss":
                # W_l starts as the bank and b_l as 0: p_l starts as the similarity to each
                # attribute. Both are then trained; the bank is not.
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

    def forward(self, images):
        """The embedding z [N, D] of images [N, 3, S, S] in [0, 1], and {level: p_l [N, K_l]}.

            p_l = norm(W_l z + b_l)

        hidisc has one p [N, 128] for all levels, and simclr one for the finest level alone.
        """
        z = self.encode(images)
        projections = {}
        for name, projection in self.projections.items():
            projections[name] = F.normalize(projection(z).float(), dim=1)
        if self.objective != "hlss":
            levels = self.levels[:1] if self.objective == "simclr" else self.levels
            projections = dict.fromkeys(levels, projections["shared"])
        return z, projections

    def encode(self, images):
        """The embedding z [N, D], L2-normalised, of images [N, 3, S, S] in [0, 1]."""
        z = self.tower((images - self.mean) / self.std)
        return F.normalize(z.float(), dim=1)


def load_run(path):
    """HLSS on the CPU in eval mode, and the checkpoint (a dict) that it was rebuilt from.

    path: a run folder, for its newest intact checkpoint, or a checkpoint file.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} is neither a run folder nor a checkpoint file")
    checkpoint = newest_checkpoint(path) if os.path.isdir(path) else read_whole(path)
    if "config" not in checkpoint:
        raise ValueError(f"{path} holds no train.py checkpoint (step-*.pt): train first")
    config, state = checkpoint["config"], checkpoint["model"]
    bank = {level: state[f"bank_{level}"] for level in checkpoint["attributes"]}
    config = config | {"backbone_weights": ""}  # the checkpoint has the weights
    tower = make_tower(config, bank, state | checkpoint["clip"], checkpoint["image_size"])
    model = HLSS(tower, bank, config["objective"])
    model.load_state_dict(state)
    return model.eval(), checkpoint


def make_tower(config, bank, clip, image_size=0):
    """The image tower that a run starts from: the one place to change for a tower of your own.

    A tower maps normalised images [N, 3, S, S] to [N, D] and has `dim`, its D, and `image_size`,
    its S. load_run() calls this too, and then replaces the weights. config: {flag: value}. bank:
    {level: [K_l, D]}. clip: state dict of a CLIP or an HLSS. image_size: 0 for the weights' own.
    """
    if config["backbone"]:
        tower = backbone_tower(config["backbone"], bank, config["backbone_weights"])
        tower.image_size = image_size or 224
    else:
        tower = image_tower(clip, image_size, weights=config["start"] != "random")
    check_tower(tower, config["backbone"] or "CLIP's tower")
    return tower


def check_tower(tower, name):
    """Raises ValueError unless a tower turns images of its size into z. Nothing is computed."""
    size = tower.image_size
    try:
        shapes = {name: value.to("meta") for name, value in tower.state_dict().items()}
        images = torch.empty(2, 3, size, size, device="meta")
        z = torch.func.functional_call(tower.train(), shapes, images)
    except Exception as error:
        raise ValueError(
            f"{name} does not take images of {size} pixels ({error}): try --image-size 224"
        ) from None
    if not torch.is_tensor(z) or z.shape != (2, tower.dim):
        raise ValueError(f"{name} does not return [N, {tower.dim}] in training: choose another one")


def backbone_tower(name, bank, weights=""):
    """A torchvision classifier whose last linear layer is replaced by a new one that gives z.

    Without a bank there is no such layer, and D is the backbone's own. weights: "" for random ones,
    "DEFAULT" for torchvision's (downloaded), or a file.
    """
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(f"--backbone {name}: not a torchvision classifier; try resnet18")
    default = "DEFAULT" if weights == "DEFAULT" else None
    tower = torchvision.models.get_model(name, weights=default)
    linears = [path for path, module in tower.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError(f"--backbone {name}: it has no linear layer; try resnet18")
    tower.dim = tower.get_submodule(linears[-1]).in_features
    tower.set_submodule(linears[-1], nn.Identity())
    if default:
        preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        tower.normalisation = preset.mean, preset.std
    elif weights:
        tensors, _ = read_tensors(weights)
        tensors = {key: t for key, t in tensors.items() if not key.startswith(f"{linears[-1]}.")}
        fill(tower, tensors, f"--backbone-weights {weights} for {name}")
    dims = [t.shape[1] for t in bank.values() if len(t)]
    if dims:
        tower.set_submodule(linears[-1], nn.Linear(tower.dim, dims[0]))
        tower.dim = dims[0]
    return tower


def fill(tower, tensors, what):
    """Loads tensors into a tower. Raises ValueError, naming the first that does not fit."""
    wanted = {name: list(value.shape) for name, value in tower.state_dict().items()}
    given = {name: list(value.shape) for name, value in tensors.items()}
    for name in sorted(wanted.keys() | given.keys()):
        here, there = wanted.get(name, "absent"), given.get(name, "missing")
        if here != there:
            raise ValueError(f"{what}: {name} is {there} but should be {here}: wrong network?")
    tower.load_state_dict(tensors, assign=True)


# ------------------------------------------------------------------------------------------------
# CLIP's towers as published, under OpenAI's names (Radford et al. 2021, arXiv 2103.00020). On a
# first reading, skip to the next file.


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
    """Attention pooling: the mean of the map is the query, the map gives keys and values."""

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
        L = 1 + H * W  # tokens: the mean and each position of the map
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

    layers: blocks of the four stages. width: channels of the stem. image_size: a multiple of 32.
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

        # CLIP's initialisation: blocks start as their shortcuts, attention with small weights.
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
    """Pre-norm transformer block. causal: no token sees a later one."""

    def __init__(self, width, heads, activation, causal):
        super().__init__()
        self.causal = causal
        self.ln_1 = nn.LayerNorm(width)
        self.ln_2 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
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


def transformer(width, layers, heads, activation, causal=False):
    """A stack of blocks, [N, L, width] -> the same, named as in CLIP: `resblocks.0`, ..."""
    blocks = [Block(width, heads, activation, causal) for _ in range(layers)]
    return nn.Sequential(OrderedDict(resblocks=nn.Sequential(*blocks)))


class VisionTransformer(nn.Module):
    """CLIP's ViT, read out at the class token. patch: pixels a side, a divisor of image_size."""

    def __init__(self, patch, width, layers, heads, dim, image_size, activation):
        super().__init__()
        tokens = 1 + (image_size // patch) ** 2
        self.image_size = image_size
        self.dim = dim
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.ln_post = nn.LayerNorm(width)
        self.transformer = transformer(width, layers, heads, activation)
        self.proj = nn.Parameter(torch.randn(width, dim) * width**-0.5)

    def forward(self, x):
        """x: [N, 3, S, S] -> [N, D]. CLIP, section 2.4, the second image encoder."""
        x = self.conv1(x)  # [N, width, S / patch, S / patch]
        x = x.flatten(2).transpose(1, 2)  # [N, L - 1, width]
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # [N, L, width]
        x = x + self.positional_embedding
        x = self.transformer(self.ln_pre(x))
        x = self.ln_post(x[:, 0])  # [N, width]
        return x @ self.proj


class TextTower(nn.Module):
    """CLIP's text transformer: causal, read out at the end token. context: the longest text."""

    def __init__(self, vocabulary, context, width, layers, heads, dim, activation):
        super().__init__()
        self.context = context
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context, width))
        self.transformer = transformer(width, layers, heads, activation, causal=True)
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


# ------------------------------------------------------------------ from a state dict to a tower


def part_of(state, prefix):
    """The tensors whose names begin with the prefix, which is removed."""
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def count_of(state, prefix):
    """How many numbered children `prefix0.`, `prefix1.`, ... a state dict has."""
    return len({name.split(".")[0] for name in part_of(state, prefix)})


def heads_of(state, tower, width):
    """Attention heads of a transformer: from its file, or one per 64 channels, as in OpenAI's."""
    heads = state.get("heads", {}).get(tower)
    if not heads and width > 1024:
        raise ValueError(f"{tower} tower: how many heads? put config.json beside the weights")
    return heads or max(1, width // 64)


def image_tower(state, image_size=0, weights=True):
    """The image tower of a state dict, with its weights: CLIP's ResNet or ViT.

    state: of a CLIP (`visual.*`) or an HLSS (`tower.*`). image_size: pixels, if other
    than in training; positions are then interpolated. weights: False takes only the sizes.
    """
    tensors = part_of(state, "visual." if "visual.conv1.weight" in state else "tower.")
    is_resnet = "attnpool.positional_embedding" in tensors
    if not is_resnet and not {"class_embedding", "proj", "positional_embedding"} <= tensors.keys():
        raise ValueError("the image tower is neither CLIP's ResNet nor its ViT")
    place = "attnpool.positional_embedding" if is_resnet else "positional_embedding"
    stride = 32 if is_resnet else tensors["conv1.weight"].shape[-1]  # pixels between positions
    image_size = image_size or stride * round((len(tensors[place]) - 1) ** 0.5)
    if image_size % stride:
        raise ValueError(f"--image-size {image_size}: this tower needs a multiple of {stride}")
    tensors[place] = resize_positions(tensors[place], image_size // stride)

    with torch.device("meta" if weights else "cpu"):  # meta: shapes alone, the weights come next
        if is_resnet:
            layers = [count_of(tensors, f"layer{stage}.") for stage in (1, 2, 3, 4)]
            width, dim = len(tensors["conv3.weight"]), len(tensors["attnpool.c_proj.weight"])
            tower = ModifiedResNet(layers, width, dim, image_size)
        else:
            layers = count_of(tensors, "transformer.resblocks.")
            width, dim = tensors["proj"].shape
            heads = heads_of(state, "visual", width)
            activation = state.get("activation", "quickgelu")
            tower = VisionTransformer(stride, width, layers, heads, dim, image_size, activation)
    if weights:  # copies, so that training leaves the state as it is
        copies = {name: value.clone().contiguous() for name, value in tensors.items()}
        fill(tower, copies, "the image tower is not CLIP's")
    return tower


def resize_positions(positions, grid):
    """Positions of one token and a g x g square, [1 + g^2, C], -> [1 + grid^2, C], bicubic."""
    g = round((len(positions) - 1) ** 0.5)
    if g * g != len(positions) - 1:
        raise ValueError(f"the image tower has {len(positions) - 1} positions: not a square")
    square = positions[1:].T.reshape(1, -1, g, g)  # [1, C, g, g]
    if g != grid:
        square = F.interpolate(square, size=(grid, grid), mode="bicubic", antialias=True)
    return torch.cat([positions[:1], square[0].flatten(1).T])


def text_tower(state):
    """The text tower of a CLIP's state dict, sharing its tensors; frozen and in eval mode."""
    if "token_embedding.weight" not in state:
        raise ValueError("no text tower: give --bank a bank.pt encoded with the full CLIP")
    if "text_projection" not in state:
        raise ValueError("the text tower is not CLIP's: it has no text_projection")
    vocabulary, width = state["token_embedding.weight"].shape
    context = len(state["positional_embedding"])
    layers = count_of(state, "transformer.resblocks.")
    heads = heads_of(state, "text", width)
    activation = state.get("activation", "quickgelu")
    dim = state["text_projection"].shape[-1]
    with torch.device("meta"):  # shapes alone: the weights come next
        tower = TextTower(vocabulary, context, width, layers, heads, dim, activation)
    parts = [name for name in state if hasattr(tower, name.split(".")[0]) and name != "heads"]
    fill(tower, {name: state[name] for name in parts}, "the text tower is not CLIP's")
    return tower.eval().requires_grad_(False)


# ------------------------------------------------------------------ batch norm over all processes


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Exact batch norm over the rows of all processes; torch's SyncBatchNorm needs a GPU."""

    def _check_input_dim(self, x):
        """Accepts any number of dimensions: this class replaces BatchNorm1d, 2d and 3d."""

    def forward(self, x):
        """x: [N, C, ...], the rows of this process -> the same shape and type."""
        if not self.training:
            return super().forward(x)
        n = len(x)
        first = n * torch.distributed.get_rank()
        rows = gather(x.contiguous())  # not channels last, for which torch's variance is inexact
        return super().forward(rows)[first : first + n]


def share_batch_norm(model):
    """Makes every batch norm of a model, in place, span all processes."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = GlobalBatchNorm


def main():
    torch.manual_seed(0)
    bank = {level: F.normalize(torch.randn(k, 64), dim=1) for level, k in zip(LEVELS, (12, 10, 8))}
    model = HLSS(ModifiedResNet((1, 1, 1, 1), width=16, dim=64, image_size=64), bank)
    images = torch.rand(16, 3, 64, 64)
    z, projections = model(images)
    print(f"images {list(images.shape)} -> z {list(z.shape)}, each of length {z[0].norm():.3f}")
    for level, p in projections.items():
        start = torch.allclose(p, F.normalize(z @ bank[level].T, dim=1), atol=1e-6)
        print(f"{level:8} t {list(bank[level].shape)}, p {list(p.shape)}, p = norm(z t^T): {start}")


if __name__ == "__main__":
    main()
