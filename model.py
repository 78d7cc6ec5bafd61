"""The networks: CLIP's image and text towers, and HLSS = image tower + frozen bank + three projections that start as
the bank.

The towers carry the parameter names of OpenAI's CLIP (Radford et al. 2021), and their sizes are read off a state dict,
so that the demo's small CLIP and the real RN50 are built by the same lines:

    >>> state = load_state("clip.pt")
    >>> tower, text = image_tower(state), text_tower(state)
"""

import glob
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

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
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = None
        if stride > 1 or channels != 4 * planes:
            self.downsample = nn.Sequential()
            self.downsample.add_module("-1", nn.AvgPool2d(stride) if stride > 1 else nn.Identity())
            self.downsample.add_module("0", nn.Conv2d(channels, 4 * planes, 1, bias=False))
            self.downsample.add_module("1", nn.BatchNorm2d(4 * planes))

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
        self.positional_embedding = nn.Parameter(torch.randn(grid * grid + 1, channels) / channels**0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(channels, channels) for _ in range(3))
        self.c_proj = nn.Linear(channels, dim)

    def forward(self, x):
        N, C, H, W = x.shape
        x = x.flatten(2).transpose(1, 2)  # [N, HW, C]
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding  # [N, 1 + HW, C]
        q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.view(N, -1, self.heads, C // self.heads).transpose(1, 2) for y in (q, k, v))  # [N, heads, *, *]
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
        self.conv1, self.bn1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv2, self.bn2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv3, self.bn3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        channels = width
        for stage, blocks in enumerate(layers):
            planes = width * 2**stage
            blocks = [Bottleneck(channels, planes, stride=2 if stage else 1),
                      *(Bottleneck(4 * planes, planes, stride=1) for _ in range(blocks - 1))]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            channels = 4 * planes
        self.attnpool = AttentionPool(image_size // 32, channels, max(1, channels // 64), dim)
        for name, parameter in self.named_parameters():  # as CLIP: a block starts as its shortcut
            if name.endswith("bn3.weight") and name.startswith("layer"):
                nn.init.zeros_(parameter)
        for projection in (self.attnpool.q_proj, self.attnpool.k_proj, self.attnpool.v_proj, self.attnpool.c_proj):
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
    """Pre-norm transformer block. [N, L, width] -> the same."""

    def __init__(self, width, heads, activation):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", ACTIVATIONS[activation]())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks. mask: [L, L] added to the attention logits, or None."""

    def __init__(self, width, layers, heads, activation):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, activation) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


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
        self.transformer = Transformer(width, layers, max(1, width // 64), activation)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, dim) * width**-0.5)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, tokens):
        N, L = tokens.shape
        mask = torch.full((L, L), float("-inf"), device=tokens.device).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding[:L]  # [N, L, width]
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(N, device=tokens.device), tokens.argmax(dim=1)] @ self.text_projection


def load_state(path):
    """The state dict in a file: float32 on the CPU. Nothing in the file is executed (weights_only)."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def _part(state, prefix):
    return {name[len(prefix):]: value for name, value in state.items() if name.startswith(prefix)}


def _count(state, prefix):
    """How many numbered children `prefix0.`, `prefix1.`, ... a state dict has."""
    return len({name[len(prefix):].split(".")[0] for name in state if name.startswith(prefix)})


def image_tower(state, image_size=None):
    """The image tower of a CLIP state dict (keys `visual.*`), sizes read off the tensors."""
    state = _part(state, "visual.") or state
    layers = [_count(state, f"layer{stage}.") for stage in (1, 2, 3, 4)]
    grid = round((len(state["attnpool.positional_embedding"]) - 1) ** 0.5)
    width, dim = len(state["conv3.weight"]), len(state["attnpool.c_proj.weight"])
    tower = ModifiedResNet(layers, width, dim, image_size or 32 * grid)
    tower.load_state_dict(state)
    return tower


def text_tower(state, activation="quickgelu"):
    """The text tower of a CLIP state dict, sizes read off the tensors, frozen and in eval mode."""
    parts = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
    state = {name: value for name, value in state.items() if name.startswith(parts)}
    vocabulary, width = state["token_embedding.weight"].shape
    tower = TextTower(vocabulary, len(state["positional_embedding"]), width, _count(state, "transformer.resblocks."),
                      state["text_projection"].shape[1], activation)
    tower.load_state_dict(state)
    return tower.eval().requires_grad_(False)


class HLSS(nn.Module):
    """Image tower, frozen bank and projections.

    tower: [N, 3, S, S] normalised images -> [N, D]. bank: {level: [K_l, D]} unit vectors. objective: a key of
    OBJECTIVES. init: of hlss's projections, "text" (the paper) or "random" (to see what the text is worth there).
    mean, std: of the channels, in [0, 1]; buffers, so that no one can embed with others than were trained with.
    """

    def __init__(self, tower, bank, objective="hlss", init="text", mean=CLIP_MEAN, std=CLIP_STD):
        super().__init__()
        self.tower, self.objective = tower, objective
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        for level in LEVELS:
            self.register_buffer(f"bank_{level}", bank[level].detach().clone())
        if objective != "hlss":
            self.projections = nn.ModuleDict({"shared": nn.Linear(tower.dim, 128)})
            return
        self.projections = nn.ModuleDict({level: nn.Linear(tower.dim, len(bank[level])) for level in LEVELS})
        if init == "text":  # W_l starts as the bank, b_l as 0: p_l starts as the similarity to each attribute
            for level, projection in self.projections.items():
                projection.weight.data.copy_(bank[level])
                projection.bias.data.zero_()

    @property
    def bank(self):
        """{level: [K_l, D]}, the frozen attribute vectors."""
        return {level: getattr(self, f"bank_{level}") for level in LEVELS}

    def encode(self, images):
        """images [N, 3, S, S] in [0, 1] -> z [N, D], L2-normalised."""
        return F.normalize(self.tower((images - self.mean) / self.std).float(), dim=1)

    def forward(self, images):
        """images [N, 3, S, S] in [0, 1] -> z [N, D] and {level: p_l = norm(W_l z + b_l) [N, K_l]}."""
        z = self.encode(images)
        if self.objective == "hlss":
            return z, {level: F.normalize(self.projections[level](z).float(), dim=1) for level in LEVELS}
        p = F.normalize(self.projections["shared"](z).float(), dim=1)
        return z, {level: p for level in OBJECTIVES[self.objective]}


def hlss_from_state(state, objective):
    """HLSS rebuilt from its own state dict: no CLIP file, no text tower, no bank file is needed."""
    bank = {level: state[f"bank_{level}"] for level in LEVELS}
    model = HLSS(image_tower(_part(state, "tower.")), bank, objective)
    model.load_state_dict(state)
    return model


def checkpoints(run):
    """The checkpoint files of a run folder, oldest first."""
    return sorted(glob.glob(os.path.join(glob.escape(run), "step-*.pt")))


def load_run(path):
    """A run folder or checkpoint file -> (HLSS on the CPU in eval mode, the checkpoint's dict). Needs nothing but that
    file."""
    if os.path.isdir(path):
        found = checkpoints(path)
        if not found:
            raise FileNotFoundError(f"{path} holds no checkpoint (step-*.pt): train first, or name a checkpoint file")
        path = found[-1]
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    return hlss_from_state(checkpoint["model"], checkpoint["config"]["objective"]).eval(), checkpoint
