"""CLIPs by name or file, in any published layout -> one state dict; nothing unknown is run.

>>> state = load_clip("RN50")
>>> state["visual.conv1.weight"].dtype, state["activation"]
(torch.float32, 'quickgelu')
"""

import hashlib
import json
import os
import re
import warnings
import zipfile

import torch

from tools.runs import write_json, write_whole

OPENAI = {  # SHA-256 of OpenAI's files, which is also a part of their address
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
}
URL = "https://openaipublic.azureedge.net/clip/models/{sha256}/{file}.pt"
CLIPS = {  # what --clip knows by name: its address, SHA-256 (or its beginning, or ""), activation
    name: (URL.format(sha256=sha256, file=name.replace("/", "-")), sha256, "quickgelu")
    for name, sha256 in OPENAI.items()
}
CLIPS["RN50-cc12m"] = (  # the paper's start
    "https://github.com/mlfoundations/open_clip/releases/download/v0.2-weights/"
    "rn50-quickgelu-cc12m-f000538c.pt",
    "f000538c",
    "quickgelu",
)
# These have seen histology. Hugging Face's are of a revision, whose file stays the same.
QUILTNET = "wisdomik/QuiltNet-B-32/resolve/8ce77289ce35a90b2f1db1137dfa4bc2df175e33"
PLIP = "vinid/plip/resolve/67ade53ddd32195868f422585f72698ef5d15094"
PATHGEN = "https://pub-7a38cc906afa44a4a01533c288d0b1af.r2.dev/pathgenclip.pt"
HUB = "https://huggingface.co"
CLIPS["QuiltNet-B-32"] = (f"{HUB}/{QUILTNET}/open_clip_pytorch_model.bin", "", "gelu")
CLIPS["PLIP"] = (
    f"{HUB}/{PLIP}/pytorch_model.bin",
    "98a7f8d2a1f4a8fc8f6dedb3a16ff7efbe02a7ef67c93904c80bca9767c69630",
    "quickgelu",
)
CLIPS["PathGen-CLIP"] = (PATHGEN, "", "gelu")
HUGGING_FACE = [  # pieces of a name in Hugging Face's CLIPModel, and in OpenAI's CLIP
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
NO_CLIP = [  # a piece of a tensor's name, and what has it
    ("word_embeddings.", "its text tower is a BERT, with words of its own (as BiomedCLIP's)"),
    ("visual.trunk.", "its image tower is one of timm (as CONCH's)"),
    ("blocks.0.attn.qkv.", "it is a transformer of timm (as UNI), which has never seen words"),
    ("vision_model.", "it has no visual_projection (as a CLIPVisionModel, or a SigLIP)"),
]
SAFETENSORS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SAFETENSORS |= {"I64": torch.int64, "I32": torch.int32}


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):  # never all of a large file in memory
            digest.update(chunk)
    return digest.hexdigest()


def published(url, sha256, path="", name=""):
    """The path of a published file: `path`, or torch.hub's cache, where it is downloaded once.

    sha256: all of it, how it begins, or "". name: in the cache, where it is not the address's.
    Raises ConnectionError, or ValueError for another file.
    """
    if not path:
        path = os.path.join(torch.hub.get_dir(), "checkpoints", name or os.path.basename(url))
        if not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            try:
                torch.hub.download_url_to_file(url, path, sha256)
            except (OSError, RuntimeError) as error:  # no network; another checksum
                remedy = f"download it where you can and put it at {path}"
                raise ConnectionError(f"no {url} ({error}): {remedy}") from error
    found = _sha256(path)
    if not found.startswith(sha256):
        raise ValueError(
            f"{path} is not {url} (SHA-256 {found}, not {sha256}): delete it and try again"
        )
    return path


def find_clip(source):
    """The path of what --clip says, which is a name in CLIPS or a file."""
    if source in CLIPS:
        url, sha256, _ = CLIPS[source]
        return published(url, sha256, name=source.replace("/", "-") + os.path.splitext(url)[1])
    if not os.path.isfile(source):
        raise FileNotFoundError(f"--clip {source}: neither a file nor one of {', '.join(CLIPS)}")
    return source


def _read_safetensors(path):
    """{name: tensor} of a .safetensors file: length of the header in 8 bytes, header (JSON), data.

    Raises ValueError, with the tensor's name, where the header does not fit the data.
    """
    tensors = {}
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        size = os.path.getsize(path) - start
        header = json.loads(file.read(start - 8))
        header.pop("__metadata__", None)
        free = 0  # where the bytes begin that no tensor has taken
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            if entry["dtype"] not in SAFETENSORS:
                raise ValueError(f"{name} is of type {entry['dtype']}, which no CLIP is")
            if not free <= begin <= end <= size:
                raise ValueError(f"{name} overlaps another tensor, or lies outside of the file")
            data = torch.empty(end - begin, dtype=torch.uint8)
            file.seek(start + begin)
            file.readinto(data.numpy())
            tensors[name] = data.view(SAFETENSORS[entry["dtype"]]).view(entry["shape"])
            free = end
    return tensors


def _read_torchscript(path):
    """{"state_dict": ...} of an archive of OpenAI's. Raises ValueError for all others."""
    if _sha256(path) not in [sha256 for _, sha256, _ in CLIPS.values()]:
        raise ValueError(
            "a TorchScript archive is a program, and this one is none of OpenAI's, so it was not "
            "run. If you trust it, export its tensors, and name that file: python -c "
            f"\"import torch; torch.save(torch.jit.load({path!r}, 'cpu').state_dict(), 'clip.pt')\""
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated
        module = torch.jit.load(path, map_location="cpu")
    return {"state_dict": module.state_dict(), "activation": "quickgelu"}


def _read_zip(path):
    """What torch.save wrote to a file: tensors and plain values alone."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(os.path.basename(member.filename) == "constants.pkl" for member in members):
            return _read_torchscript(path)
        damaged = archive.testzip()  # torch.load does not look at the checksums
    if damaged:
        raise ValueError(f"wrong checksum of {damaged}")
    # mmap leaves on the disk what is not used, as an optimizer. It takes the bytes as they are.
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=stored)


def _from_hugging_face(theirs):
    """The tensors of Hugging Face's CLIPModel under OpenAI's names and in OpenAI's shapes."""
    state = {}
    for name, value in theirs.items():
        for piece, ours in HUGGING_FACE:
            name = name.replace(piece, ours)
        state[name] = value.T if name in ("visual.proj", "text_projection") else value
    for name in [name for name in state if "q_proj." in name]:
        parts = [state.pop(name.replace("q_proj.", f"{part}_proj.")) for part in "qkv"]
        state[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return state


def read_tensors(path):
    """({name: float32 tensor}, activation or "") of a file of weights, in any published layout.

    Beside a Hugging Face file, config.json tells the activation and the attention heads. Raises
    ValueError for a damaged file and for a program, which is not run.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(9)
        if head[8:] == b"{":
            checkpoint = _read_safetensors(path)
        elif head[:2] == b"PK":
            checkpoint = _read_zip(path)
        else:  # as torch.save wrote until 2020
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        known = checkpoint.get("clip", checkpoint).get("activation", "")
        tensors = checkpoint.get("state_dict", checkpoint.get("model", checkpoint))
        state = {name: checkpoint[name] for name in ("merges",) if name in checkpoint}
        if "heads" in checkpoint.get("clip", {}):  # of our own checkpoint
            state["heads"] = checkpoint["clip"]["heads"]
        for name in list(tensors):
            value = tensors.pop(name)  # one by one, so that memory never holds all of them twice
            if torch.is_tensor(value) and not name.endswith("position_ids"):  # 0, 1, 2, ...
                name = name.removeprefix("module.")  # of DistributedDataParallel
                state[name] = value.float() if value.is_floating_point() else value
    except Exception as error:  # whatever a damaged or foreign file does to its reader
        reason = str(error) if isinstance(error, ValueError) else f"damaged? {type(error).__name__}"
        asked = re.search(r"GLOBAL (\S+)", str(error))  # by torch's unpickler
        if asked:
            reason = f"it asks for {asked[1]}, which was not run"
        raise ValueError(f"{path} is not a checkpoint of tensors alone: {reason}") from None
    if "visual_projection.weight" in state:
        state = _from_hugging_face(state)
        beside = os.path.join(os.path.dirname(path), "config.json")
        if os.path.exists(beside):
            with open(beside, encoding="utf-8") as file:
                said = json.load(file)
            parts = {"visual": said.get("vision_config", {}), "text": said.get("text_config", {})}
            heads = {part: of.get("num_attention_heads") for part, of in parts.items()}
            state["heads"] = {part: number for part, number in heads.items() if number}
            known = parts["visual"].get("hidden_act", "").replace("_", "")
            known = known if known in ("quickgelu", "gelu") else ""
    return state, known


def load_clip(source, activation=""):
    """The state dict of a CLIP: float32 on the CPU, and under "activation" that of its blocks.

    source: a name in CLIPS or a file. activation: "quickgelu" or "gelu" where neither the file nor
    its SHA-256 tells it; warns if it contradicts them. Raises ValueError if nothing tells it, and
    for a file that is damaged, no CLIP, or a program.
    """
    path = find_clip(source)
    remedy = ": delete it and try again" if source in CLIPS else ""
    try:
        state, known = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{error}{remedy}") from None
    reasons = [reason for piece, reason in NO_CLIP if any(piece in name for name in state)]
    if not any(name.startswith(("visual.", "tower.")) for name in state):
        reasons.append(f"its tensors are {', '.join([*state][:3])}, ... and not visual.*")
    if reasons:
        raise ValueError(f"{path} is not a CLIP: {reasons[0]}{remedy}")
    if source in CLIPS:
        known = CLIPS[source][2]
    elif not known:
        activations = {sha256[:8]: activation for _, sha256, activation in CLIPS.values()}
        known = activations.get(_sha256(path)[:8], "")
    if not activation and not known:
        raise ValueError(
            f"{path} does not say its activation, and the wrong one fails silently: give "
            "--activation quickgelu (as OpenAI's and PLIP) or gelu (as QuiltNet, most of open_clip)"
        )
    if activation and known and activation != known:
        warnings.warn(
            f"{path} was trained with {known}, not with --activation {activation}", stacklevel=2
        )
    return state | {"activation": activation or known}


def export(path, model, checkpoint):
    """Writes a run's image tower for others to load, and beside it PATH.json: pixels, mean, std.

    A CLIP's tower has the names of CLIP and open_clip (visual.*), a backbone those of torchvision.
    """
    backbone = checkpoint["config"]["backbone"]
    prefix = "" if backbone else "visual."
    state = {prefix + name: value for name, value in model.tower.state_dict().items()}
    about = {"image_size": checkpoint["image_size"]}
    about["network"] = backbone or checkpoint["clip"]["activation"]
    about |= {"mean": model.mean.flatten().tolist(), "std": model.std.flatten().tolist()}
    write_whole(path, lambda file: torch.save(state, file))
    write_json(f"{path}.json", about)
    print(f"{path}, and {path}.json, which says of images in [0, 1]: {about}")
