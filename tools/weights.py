"""CLIPs by name or file, in any published layout -> one state dict; no unknown program is run."""

import hashlib
import json
import os
import re
import warnings
import zipfile
from pathlib import Path

import torch

from tools.runs import write_json, write_whole

SHA256 = {  # of OpenAI's files; it is also part of their address
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
}
OPENAI = "https://openaipublic.azureedge.net/clip/models"
CLIPS = {}  # --clip by name: address, SHA-256 (or its beginning, or "" if not given), activation
for name, sha256 in SHA256.items():
    CLIPS[name] = (f"{OPENAI}/{sha256}/{name.replace('/', '-')}.pt", sha256, "quickgelu")
# The paper starts from open_clip's RN50, trained on CC12M.
OPEN_CLIP = "https://github.com/mlfoundations/open_clip/releases/download/v0.2-weights"
CLIPS["RN50-cc12m"] = (f"{OPEN_CLIP}/rn50-quickgelu-cc12m-f000538c.pt", "f000538c", "quickgelu")
# These three were trained on histology. The Hugging Face URLs pin a revision.
HUB = "https://huggingface.co"
QUILTNET = "wisdomik/QuiltNet-B-32/resolve/8ce77289ce35a90b2f1db1137dfa4bc2df175e33"
PLIP = "vinid/plip/resolve/67ade53ddd32195868f422585f72698ef5d15094"
PLIP_SHA256 = "98a7f8d2a1f4a8fc8f6dedb3a16ff7efbe02a7ef67c93904c80bca9767c69630"
PATHGEN = "https://pub-7a38cc906afa44a4a01533c288d0b1af.r2.dev/pathgenclip.pt"
CLIPS["QuiltNet-B-32"] = (f"{HUB}/{QUILTNET}/open_clip_pytorch_model.bin", "", "gelu")
CLIPS["PLIP"] = (f"{HUB}/{PLIP}/pytorch_model.bin", PLIP_SHA256, "quickgelu")
CLIPS["PathGen-CLIP"] = (PATHGEN, "", "gelu")
HUGGING_FACE = [  # parts of tensor names: in Hugging Face's CLIPModel, in OpenAI's CLIP
    ("text_model.", ""),
    ("vision_model.", "visual."),
    ("embeddings.", ""),
    ("encoder.layers.", "transformer.resblocks."),
    ("position_embedding.weight", "positional_embedding"),
    ("patch_embedding.", "conv1."),
    ("pre_layrnorm.", "ln_pre."),  # their spelling
    ("post_layernorm.", "ln_post."),
    ("final_layer_norm.", "ln_final."),
    ("layer_norm", "ln_"),
    ("self_attn.", "attn."),
    ("fc1.", "c_fc."),
    ("fc2.", "c_proj."),
    ("visual_projection.weight", "visual.proj"),
    ("text_projection.weight", "text_projection"),
]
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def load_clip(source, activation=""):
    """The state dict of a CLIP, in float32 on the CPU, with its "activation" added.

    source: a name in CLIPS, or a file. activation: "quickgelu" or "gelu", if the file does not say.
    """
    path = find_clip(source)
    state, known = read_tensors(path)
    foreign = [name for name in state if re.search("word_embed|trunk|attn.qkv|vision_model", name)]
    if foreign or not any(name.startswith(("visual.", "tower.")) for name in state):
        raise ValueError(
            f"{path} is not a CLIP in OpenAI's layout: it has {(foreign or [*state])[0]}; give "
            "another --clip (BiomedCLIP's text tower is a BERT; CONCH and UNI come from timm)"
        )
    digest = "" if known else _sha256(path)
    for name, (_, sha256, published_with) in CLIPS.items():
        if path == cache_path(name) or (sha256 and digest.startswith(sha256)):
            known = published_with
    if not activation and not known:
        raise ValueError(
            f"{path} names no activation, and the wrong one fails silently: give "
            "--activation quickgelu (OpenAI's, PLIP) or gelu (QuiltNet, most of open_clip)"
        )
    if activation and known and activation != known:
        warnings.warn(f"--activation {activation}: {path} was trained with {known}", stacklevel=2)
    return state | {"activation": activation or known}


def find_clip(source):
    """The path of --clip, a name in CLIPS or a file. Raises FileNotFoundError."""
    if source in CLIPS:
        return published(*CLIPS[source][:2], cached=cache_path(source))
    if not os.path.isfile(source):
        raise FileNotFoundError(f"--clip {source}: neither a file nor one of {', '.join(CLIPS)}")
    return source


def cache_path(name):
    """Where a CLIP known by name is kept, in torch.hub's cache."""
    return os.path.join(torch.hub.get_dir(), "checkpoints", f"{name.replace('/', '-')}.pt")


def published(url, sha256, path="", cached=""):
    """The path of a published file: yours, or a cached one, downloaded on first use. sha256: all of
    it, its beginning, or "" where none is known."""
    cached = cached or os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    if not path and not os.path.exists(cached):
        os.makedirs(os.path.dirname(cached), exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, cached, sha256)
        except (OSError, RuntimeError) as error:  # no network; wrong checksum
            raise ConnectionError(f"{url} failed ({error}): save the file as {cached}") from error
    path = path or cached
    if not _sha256(path).startswith(sha256):
        raise ValueError(f"{path} is not {url} (its SHA-256 differs): delete it and try again")
    return path


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def read_tensors(path):
    """({name: float32 tensor}, activation or "") of a file. ValueError if damaged or a program."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
        if head[8:] == b"{":
            checkpoint = _read_safetensors(path)
        elif head[:2] == b"PK":
            checkpoint = _read_zip(path)
        else:  # torch.save before PyTorch 1.6
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        about = checkpoint.get("clip", checkpoint)  # "clip": in checkpoints of train.py
        state = {name: about[name] for name in ("activation", "heads", "merges") if name in about}
        tensors = checkpoint.get("state_dict", checkpoint.get("model", checkpoint))
        for name in list(tensors):
            value = tensors.pop(name)  # one by one, so that memory never holds two full copies
            if torch.is_tensor(value) and not name.endswith("position_ids"):  # 0, 1, 2, ...
                name = name.removeprefix("module.")  # of DistributedDataParallel
                state[name] = value.float() if value.is_floating_point() else value
        if "visual_projection.weight" in state:
            state = _from_hugging_face(state) | _read_config(path)
    except Exception as error:  # whatever a damaged or foreign file does to its reader
        reason = f"damaged? {type(error).__name__}: delete it and download it again"
        if isinstance(error, ValueError):
            reason = error
        if asked := re.search(r"GLOBAL (\S+)", str(error)):  # from torch's unpickler
            reason = f"it asks for {asked[1]}, which was not run"
        raise ValueError(f"{path} is not a tensors-only checkpoint: {reason}") from None
    return state, state.pop("activation", "")


def _read_safetensors(path):
    """{name: tensor}. The file is the header's length in 8 bytes, the header in JSON, the data."""
    tensors = {}
    position = 0
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            data = torch.empty(end - begin, dtype=torch.uint8)
            if begin != position or file.readinto(data.numpy()) < len(data):
                raise ValueError(f"{name} overlaps another tensor, or lies outside the file")
            position = end
            tensors[name] = data.view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


def _read_zip(path):
    """What torch.save wrote, if plain values and tensors, or one of OpenAI's TorchScript files."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        damaged = archive.testzip()  # torch.load does not look at the checksums
    if damaged:
        raise ValueError(f"wrong checksum of {damaged}: delete the file and download it again")
    if not any(os.path.basename(name) == "constants.pkl" for name in names):
        return torch.load(path, map_location="cpu", weights_only=True)
    if _sha256(path) not in [sha256 for _, sha256, _ in CLIPS.values()]:
        raise ValueError(
            "it is a TorchScript program and not OpenAI's. If you trust it: python -c "
            f"\"import torch; torch.save(torch.jit.load({path!r}, 'cpu').state_dict(), 'clip.pt')\""
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated
        return torch.jit.load(path, map_location="cpu").state_dict() | {"activation": "quickgelu"}


def _from_hugging_face(theirs):
    """The tensors of Hugging Face's CLIPModel under OpenAI's names and in OpenAI's shapes."""
    state = {}
    for name, value in theirs.items():
        for part, ours in HUGGING_FACE:
            name = name.replace(part, ours)
        state[name] = value.T if name in ("visual.proj", "text_projection") else value
    for name in [name for name in state if "q_proj." in name]:
        parts = [state.pop(name.replace("q_proj.", f"{part}_proj.")) for part in "qkv"]
        state[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return state


def _read_config(path):
    """{"heads", "activation"}, if a Hugging Face config.json beside the file gives them."""
    beside = Path(path).with_name("config.json")
    config = json.loads(beside.read_text("utf-8")) if beside.exists() else {}
    vision, text = config.get("vision_config", {}), config.get("text_config", {})
    heads = {"visual": vision.get("num_attention_heads"), "text": text.get("num_attention_heads")}
    activation = {"quick_gelu": "quickgelu", "gelu": "gelu"}.get(vision.get("hidden_act"), "")
    return {"heads": heads, "activation": activation}


def export(path, model, checkpoint):
    """Writes a run's image tower, under the names of open_clip or torchvision, and PATH.json."""
    backbone = checkpoint["config"]["backbone"]
    state = model.tower.state_dict(prefix="" if backbone else "visual.")
    about = {"image_size": checkpoint["image_size"]}
    about["network"] = backbone or checkpoint["clip"]["activation"]
    about |= {"mean": model.mean.flatten().tolist(), "std": model.std.flatten().tolist()}
    write_whole(path, lambda file: torch.save(state, file))
    write_json(f"{path}.json", about)
    print(f"{path} and {path}.json; for images in [0, 1]: {about}")
