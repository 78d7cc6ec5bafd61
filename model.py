"""The networks: CLIP's image and text towers, and HLSS = image tower + frozen bank + three projections that start as
the bank.

The towers carry the parameter names of OpenAI's CLIP (Radford et al. 2021), and their sizes are read off a state dict,
so that the demo's small CLIP and the real RN50 are built by the same lines:

    >>> state = load_state("RN50")  # a name of CLIPS, or a file: OpenAI's, open_clip's, .safetensors, our own
    >>> tower, text = image_tower(state), text_tower(state)
"""

import glob
import os
import zipfile
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from losses import LEVELS

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, RGB in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Which levels an objective contrasts. hlss has a projection a level, the other two share one.
OBJECTIVES = {"hlss": LEVELS, "hidisc": LEVELS, "simclr": LEVELS[:1]}


class Bottleneck(nn.Module):
    """ResNet bottleneck whose strides are average pools (anti-aliased), as in CLIP. [N, C, H, W] -> [N, 4 planes, H /
    stride, W / stride]."""

    def __init__(self, channels, planes, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = (
            nn.Conv2d(planes, planes, 3, padding=1, bias=False),
            nn.BatchNorm2d(planes),
        )
        self.conv3, self.bn3 = (
            nn.Conv2d(planes, 4 * planes, 1, bias=False),
            nn.BatchNorm2d(4 * planes),
        )
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = None
        if stride > 1 or channels != 4 * planes:
            self.downsample = nn.Sequential(
                OrderedDict(
                    {
                        "-1": nn.AvgPool2d(stride) if stride > 1 else nn.Identity(),
                        "0": nn.Conv2d(channels, 4 * planes, 1, bias=False),
                        "1": nn.BatchNorm2d(4 * planes),
                    }
                )
            )

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(self.avgpool(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class AttentionPool(nn.Module):
    """The mean of the feature map asks, the feature map answers: one attention step in place of global average
    pooling."""

    def __init__(self, grid, channels, heads, dim):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(
            torch.randn(grid * grid + 1, channels) / channels**0.5
        )
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(channels, channels) for _ in range(3))
        self.c_proj = nn.Linear(channels, dim)

    def forward(self, x):
        N, C, H, W = x.shape
        x = x.flatten(2).transpose(1, 2)  # [N, HW, C]
        x = (
            torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding
        )  # [N, 1 + HW, C]
        q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
        q, k, v = (
            y.view(N, -1, self.heads, C // self.heads).transpose(1, 2) for y in (q, k, v)
        )  # [N, heads, *, *]
        x = F.scaled_dot_product_attention(q, k, v)  # [N, heads, 1, C / heads]
        return self.c_proj(x.transpose(1, 2).reshape(N, C))  # [N, dim]


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: a stem of three convolutions, anti-aliased strides, attention pooling. [N, 3, S, S] -> [N, dim],
    S a multiple of 32.

    layers: blocks in each of the four stages. width: channels of the stem (64 in RN50). dim: D, of the embedding.
    """

    def __init__(self, layers, width, dim, image_size):
        super().__init__()
        self.image_size, self.dim = image_size, dim
        self.conv1, self.bn1 = (
            nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width // 2),
        )
        self.conv2, self.bn2 = (
            nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False),
            nn.BatchNorm2d(width // 2),
        )
        self.conv3, self.bn3 = (
            nn.Conv2d(width // 2, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.avgpool = nn.AvgPool2d(2)
        channels = width
        for stage, blocks in enumerate(layers):
            planes = width * 2**stage
            blocks = [
                Bottleneck(channels, planes, stride=2 if stage else 1),
                *(Bottleneck(4 * planes, planes, stride=1) for _ in range(blocks - 1)),
            ]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            channels = 4 * planes
        self.attnpool = AttentionPool(image_size // 32, channels, max(1, channels // 64), dim)
        for name, parameter in self.named_parameters():  # as CLIP: a block starts as its shortcut
            if name.endswith("bn3.weight") and name.startswith("layer"):
                nn.init.zeros_(parameter)
        for projection in (
            self.attnpool.q_proj,
            self.attnpool.k_proj,
            self.attnpool.v_proj,
            self.attnpool.c_proj,
        ):
            nn.init.normal_(projection.weight, std=channels**-0.5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.avgpool(F.relu(self.bn3(self.conv3(x))))  # [N, width, S / 4, S / 4]
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # [N, 32 width, S / 32, S / 32]
        return self.attnpool(x)


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the approximation that OpenAI's weights were trained with."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quickgelu": QuickGELU, "gelu": nn.GELU}


class Block(nn.Module):
    """Pre-norm transformer block. [N, L, width] -> the same. causal: no token sees a later one."""

    def __init__(self, width, activation, causal):
        super().__init__()
        self.causal = causal
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, max(1, width // 64), batch_first=True)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width),
                gelu=ACTIVATIONS[activation](),
                c_proj=nn.Linear(4 * width, width),
            )
        )

    def forward(self, x):
        L, y = x.shape[1], self.ln_1(x)
        mask = (
            torch.full((L, L), float("-inf"), dtype=y.dtype, device=y.device).triu(1)
            if self.causal
            else None
        )
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


def transformer(width, layers, activation, causal=False):
    """A stack of blocks, named as in CLIP: `transformer.resblocks.0`, ..."""
    return nn.Sequential(
        OrderedDict(
            resblocks=nn.Sequential(*(Block(width, activation, causal) for _ in range(layers)))
        )
    )


class VisionTransformer(nn.Module):
    """CLIP's ViT, read out at the class token. [N, 3, S, S] -> [N, dim], S a multiple of the patch."""

    def __init__(self, patch, width, layers, dim, image_size, activation):
        super().__init__()
        self.image_size, self.dim = image_size, dim
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(
            torch.randn((image_size // patch) ** 2 + 1, width) * width**-0.5
        )
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = transformer(width, layers, activation)
        self.proj = nn.Parameter(torch.randn(width, dim) * width**-0.5)

    def forward(self, x):
        N = len(x)
        x = self.conv1(x).flatten(2).transpose(1, 2)  # [N, L - 1, width]
        x = (
            torch.cat([self.class_embedding.expand(N, 1, -1), x], dim=1) + self.positional_embedding
        )  # [N, L, width]
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class TextTower(nn.Module):
    """CLIP's text transformer: causal, read out at the end token. tokens [N, L] -> [N, dim].

    The end token is the largest id of the vocabulary, so its place is the argmax of a row; what follows it is padding
    that the causal mask hides from it.
    """

    def __init__(self, vocabulary, context, width, layers, dim, activation):
        super().__init__()
        self.context, self.dim, self.vocabulary = context, dim, vocabulary
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context, width))
        self.transformer = transformer(width, layers, activation, causal=True)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, dim) * width**-0.5)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, tokens):
        N, L = tokens.shape
        x = self.token_embedding(tokens) + self.positional_embedding[:L]  # [N, L, width]
        x = self.ln_final(self.transformer(x))
        return x[torch.arange(N, device=tokens.device), tokens.argmax(dim=1)] @ self.text_projection


def _part(state, prefix):
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def _count(state, prefix):
    """How many numbered children `prefix0.`, `prefix1.`, ... a state dict has."""
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


def resize_positions(positions, grid):
    """Positional embedding of one token and a square grid, [1 + g^2, C] -> [1 + grid^2, C], bicubic."""
    first, rest = positions[:1], positions[1:]
    g = round(len(rest) ** 0.5)
    rest = rest.T.reshape(1, -1, g, g)
    rest = (
        F.interpolate(rest, size=(grid, grid), mode="bicubic", antialias=True)
        if g != grid
        else rest
    )
    return torch.cat([first, rest[0].flatten(1).T])


def image_tower(state, image_size=None):
    """The image tower of a CLIP state dict (`visual.*`) or of our own (`tower.*`), ResNet or ViT, sizes read off it.

    image_size: pixels, if not the tower's own: interpolates the positional embedding. Raises ValueError if it does not
    fit, or the tower is another.
    """
    part = _part(state, "visual.") or _part(state, "tower.")
    resnet = "attnpool.positional_embedding" in part
    if not resnet and ("class_embedding" not in part or len(part["class_embedding"]) > 1024):
        raise ValueError(
            "the image tower is neither CLIP's ResNet nor its ViT (B or L: heads of 64 channels)"
        )
    positions = "attnpool.positional_embedding" if resnet else "positional_embedding"
    stride = 32 if resnet else part["conv1.weight"].shape[-1]
    image_size = image_size or stride * round((len(part[positions]) - 1) ** 0.5)
    if image_size % stride:
        raise ValueError(f"--image-size {image_size}: this tower needs a multiple of {stride}")
    part[positions] = resize_positions(part[positions], image_size // stride)
    with torch.device("meta"):  # shapes alone: the weights come next
        if resnet:
            layers = [_count(part, f"layer{stage}.") for stage in (1, 2, 3, 4)]
            tower = ModifiedResNet(
                layers, len(part["conv3.weight"]), len(part["attnpool.c_proj.weight"]), image_size
            )
        else:
            width, dim = part["proj"].shape
            layers = _count(part, "transformer.resblocks.")
            tower = VisionTransformer(
                stride, width, layers, dim, image_size, state.get("activation", "quickgelu")
            )
    tower.load_state_dict(
        {k: v.clone(memory_format=torch.contiguous_format) for k, v in part.items()}, assign=True
    )
    return tower


def text_tower(state):
    """The text tower of a CLIP state dict, sizes read off the tensors, which it shares; frozen and in eval mode."""
    parts = (
        "transformer.",
        "token_embedding.",
        "positional_embedding",
        "ln_final.",
        "text_projection",
    )
    part = {name: value for name, value in state.items() if name.startswith(parts)}
    if "token_embedding.weight" not in part:
        raise ValueError(
            "no text tower here (our own checkpoints have none): encode the bank with the CLIP that they "
            "started from (describe.py encode) and give --bank bank.pt"
        )
    vocabulary, width = part["token_embedding.weight"].shape
    with torch.device("meta"):
        tower = TextTower(
            vocabulary,
            len(part["positional_embedding"]),
            width,
            _count(part, "transformer.resblocks."),
            part["text_projection"].shape[1],
            state.get("activation", "quickgelu"),
        )
    tower.load_state_dict(part, assign=True)
    return tower.eval().requires_grad_(False)


def backbone_tower(name, dim):
    """A classifier of torchvision with new weights, a linear layer to `dim` in place of its last. [N, 3, S, S] -> [N,
    dim]."""
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(
            f"--backbone {name}: no classifier of torchvision, as resnet18 or convnext_tiny are"
        )
    tower = torchvision.models.get_model(name, weights=None)
    *_, linear = (name for name, module in tower.named_modules() if isinstance(module, nn.Linear))
    parent, _, last = linear.rpartition(".")
    setattr(
        tower.get_submodule(parent), last, nn.Linear(tower.get_submodule(linear).in_features, dim)
    )
    tower.image_size, tower.dim = 224, dim
    return tower


# ----------------------------------------------------------------------------------------------------------- the model


class HLSS(nn.Module):
    """Image tower, frozen bank and projections.

    tower: [N, 3, S, S] normalised images -> [N, D]. bank: {level: [K_l, D]} unit vectors. objective: a key of
    OBJECTIVES. init: of hlss's projections, "text" (the paper) or "random" (to see what the text is worth there).
    """

    def __init__(self, tower, bank, objective="hlss", init="text"):
        super().__init__()
        self.tower, self.objective = tower, objective
        if bank["patch"].shape[1] != tower.dim:
            raise ValueError(
                f"the bank's vectors have {bank['patch'].shape[1]} dimensions and the image tower's "
                f"{tower.dim}: encode the bank with the text tower of the same CLIP"
            )
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(CLIP_STD).view(3, 1, 1))
        for level in LEVELS:
            self.register_buffer(f"bank_{level}", bank[level].detach().clone())
        if objective != "hlss":
            self.projections = nn.ModuleDict({"shared": nn.Linear(tower.dim, 128)})
            return
        self.projections = nn.ModuleDict(
            {level: nn.Linear(tower.dim, len(bank[level])) for level in LEVELS}
        )
        if (
            init == "text"
        ):  # W_l starts as the bank, b_l as 0: p_l starts as the similarity to each attribute
            for level, projection in self.projections.items():
                projection.weight.data.copy_(bank[level])
                projection.bias.data.zero_()

    @property
    def bank(self):
        """{level: [K_l, D]}, the frozen attribute vectors."""
        return {level: getattr(self, f"bank_{level}") for level in LEVELS}

    def normalise(self, mean, std):
        """Set mean and standard deviation of the channels, of values in [0, 1], where they are not CLIP's. They are
        buffers: no one can embed with others than were trained with."""
        self.mean.copy_(torch.tensor(mean).view(3, 1, 1))
        self.std.copy_(torch.tensor(std).view(3, 1, 1))

    def encode(self, images):
        """images [N, 3, S, S] in [0, 1] -> z [N, D], L2-normalised."""
        return F.normalize(self.tower((images - self.mean) / self.std).float(), dim=1)

    def forward(self, images):
        """images [N, 3, S, S] in [0, 1] -> z [N, D] and {level: p_l = norm(W_l z + b_l) [N, K_l]}."""
        z = self.encode(images)
        if self.objective == "hlss":
            return z, {
                level: F.normalize(self.projections[level](z).float(), dim=1) for level in LEVELS
            }
        p = F.normalize(self.projections["shared"](z).float(), dim=1)
        return z, {level: p for level in OBJECTIVES[self.objective]}


def hlss_from_state(state, objective, activation="quickgelu", backbone=""):
    """HLSS rebuilt from its own state dict: no CLIP file, no text tower, no bank file is needed."""
    bank = {level: state[f"bank_{level}"] for level in LEVELS}
    dim = bank["patch"].shape[1]
    tower = (
        backbone_tower(backbone, dim)
        if backbone
        else image_tower(state | {"activation": activation})
    )
    model = HLSS(tower, bank, objective)
    model.load_state_dict(state)
    return model


def write_whole(path, write):
    """Write a file by write(file). A crash at any moment, or a full disk, leaves whole what stood there before."""
    try:
        with open(path + ".part", "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch.save may turn the one into the other
        if os.path.exists(path + ".part"):
            os.remove(path + ".part")
        raise OSError(f"{path} cannot be written ({error}): make room and start again") from error
    os.replace(path + ".part", path)


def checkpoints(run):
    """The checkpoint files of a run folder, oldest first."""
    return sorted(glob.glob(os.path.join(glob.escape(run), "step-*.pt")))


def save_checkpoint(folder, checkpoint):
    """Write step-N.pt; keep the newest two."""
    write_whole(
        os.path.join(folder, f"step-{checkpoint['step']:07d}.pt"),
        lambda file: torch.save(checkpoint, file),
    )
    for old in checkpoints(folder)[:-2]:
        os.remove(old)


def newest_checkpoint(folder):
    """The newest checkpoint that is whole, reporting those that are not; {"step": 0} in a new run.

    Raises ValueError if there are some and none is whole: to start anew would cost the log.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            if part := zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums
                raise ValueError(f"wrong checksum of {part}")
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever zip, pickle and torch make of a damaged file
            print(f"{path} is damaged ({error}): taking the one before")
    if found:
        raise ValueError(f"no checkpoint in {folder} is whole: restore one, or give another --out")
    return {"step": 0}


def load_run(path):
    """A run folder (its newest whole checkpoint) or a checkpoint file -> (HLSS on the CPU in eval mode, the
    checkpoint's dict). Needs nothing but that file."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} is neither a run folder nor a checkpoint file")
    checkpoint = (
        newest_checkpoint(path)
        if os.path.isdir(path)
        else torch.load(path, "cpu", weights_only=True)
    )
    if "config" not in checkpoint:
        raise ValueError(
            f"{path} holds no checkpoint of train.py (step-*.pt): train first, or name another"
        )
    config = checkpoint["config"]
    options = {
        name: config[name] for name in ("objective", "activation", "backbone") if name in config
    }
    return hlss_from_state(checkpoint["model"], **options).eval(), checkpoint
