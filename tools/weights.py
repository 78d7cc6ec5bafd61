"""CLIPs by name or file, in any published layout -> one state dict."""

import hashlib
import json
import os
import pickle
import re
import warnings
import zipfile

import torch

OPENAI = "https://openaipublic.azureedge.net/clip/models"
CLIPS = {  # what --clip knows by name: an address that holds the file's SHA-256, or its first eight digits
    "RN50": f"{OPENAI}/afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt",
    "RN101": f"{OPENAI}/8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599/RN101.pt",
    "RN50x4": f"{OPENAI}/7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd/RN50x4.pt",
    "ViT-B/32": f"{OPENAI}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "ViT-B/16": f"{OPENAI}/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "ViT-L/14": f"{OPENAI}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    "RN50-cc12m": "https://github.com/mlfoundations/open_clip/releases/download/v0.2-weights/rn50-quickgelu-cc12m-"
    "f000538c.pt",  # the paper's start
}
# What TorchScript archives call types and functions, and .safetensors types.
DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I64": torch.int64,
    "I32": torch.int32,
}
TORCHSCRIPT = {("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict")}


def published(url, sha256, path=""):
    """The path of a published file: `path`, or torch.hub's cache, where it is downloaded on first use.

    sha256: how its checksum begins. Raises ConnectionError when it cannot be had, ValueError when it is another file.
    """
    cached = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    if not path and not os.path.exists(path := cached):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path, sha256)
        except (OSError, RuntimeError) as error:  # no network; another checksum
            raise ConnectionError(
                f"no {url} ({error}): download it where you can and put it at {path}"
            ) from error
    with open(path, "rb") as file:
        found = hashlib.sha256(file.read()).hexdigest()
    if not found.startswith(sha256):
        raise ValueError(
            f"{path} is not {url} (SHA-256 {found}, not {sha256}): delete it and try again"
        )
    return path


def find_clip(source):
    """What --clip says, a name in CLIPS or a file -> path."""
    if source in CLIPS:
        return published(
            CLIPS[source], re.search(r"[0-9a-f]{64}|[0-9a-f]{8}(?=.pt)", CLIPS[source])[0]
        )
    if not os.path.isfile(source):
        raise FileNotFoundError(f"--clip {source}: neither a file nor one of {', '.join(CLIPS)}")
    return source


def read_torchscript(path):
    """The tensors of a TorchScript archive: (dotted name, tensor) one by one.

    torch.jit.load would compile the archive's code and run parts of it. This reads the data alone: every name in its
    pickle becomes inert here, or is refused.
    """

    class Data:  # a module, with attributes, or a tensor, with arguments
        arguments = ()

        def __init__(self, *arguments):
            self.arguments = arguments

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if module == "torch" and name in DTYPES:
                return DTYPES[name]
            if not (module.startswith("__torch__") or (module, name) in TORCHSCRIPT):
                raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
            return Data

        def persistent_load(self, storage):
            return storage

    def walk(module, prefix):
        for name, value in vars(module).items():
            if isinstance(value, Data) and not value.arguments:
                yield from walk(value, f"{prefix}{name}.")
            elif isinstance(value, Data):
                (_, dtype, key, *_), offset, size, stride, *_ = value.arguments
                data = bytearray(archive.read(f"{root}/data/{key}"))
                yield (
                    prefix + name,
                    torch.frombuffer(data, dtype=dtype).as_strided(size, stride, offset),
                )

    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].split("/")[0]
        with archive.open(f"{root}/data.pkl") as file:
            yield from walk(Unpickler(file).load(), "")


def read_safetensors(path):
    """The tensors of a .safetensors file, (name, tensor) one by one: its header's length, the header (JSON), data."""
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            file.seek(start + begin)
            data = torch.frombuffer(bytearray(file.read(end - begin)), dtype=DTYPES[entry["dtype"]])
            yield name, data.view(entry["shape"])


def load_clip(source, activation=""):
    """The state dict of a CLIP: float32 on the CPU, and under "activation" that of its transformers.

    source: a name in CLIPS or a file: OpenAI's TorchScript archive, a checkpoint or state dict of open_clip,
    .safetensors, or our own checkpoint (which has no text tower). activation: a key of ACTIVATIONS; warns if it
    contradicts the file, or if neither says it. Raises ValueError for other files; nothing in a file is executed.
    """
    path = find_clip(source)
    known = "quickgelu" if os.path.basename(path) in map(os.path.basename, CLIPS.values()) else ""
    with open(path, "rb") as file:
        head = file.read(9)
    try:
        if head[8:] == b"{":
            tensors = read_safetensors(path)
        elif head[:2] == b"PK" and any(
            name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()
        ):
            tensors = read_torchscript(path)
        else:  # mmap leaves the optimizer of a training checkpoint on the disk
            checkpoint = torch.load(
                path, map_location="cpu", weights_only=True, mmap=head[:2] == b"PK"
            )
            known = checkpoint.get("config", checkpoint).get("activation") or known
            tensors = checkpoint.get("state_dict", checkpoint.get("model", checkpoint)).items()
        state = {
            name.removeprefix("module."): value.float() if value.is_floating_point() else value
            for name, value in tensors
            if isinstance(value, torch.Tensor)
        }
    except Exception as error:  # whatever a damaged or foreign file does to its reader
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"asks for {asked[1]}, which was not run"
            if asked
            else f"damaged? {type(error).__name__}"
        )
        raise ValueError(f"{path} is not a checkpoint of tensors alone ({reason})") from None
    if not any(name.startswith(("visual.", "tower.")) for name in state):
        raise ValueError(
            f"{path} is not a CLIP: its tensors are {', '.join([*state][:3])}, ... and not visual.*"
        )
    if not (activation or known):
        warnings.warn(
            f"{path} does not say its activation, quickgelu is taken. The wrong one fails silently: "
            "open_clip's models without quickgelu in their name are gelu",
            stacklevel=2,
        )
    if activation and known and activation != known:
        warnings.warn(
            f"{path} was trained with {known}, not with --activation {activation}", stacklevel=2
        )
    return state | {"activation": activation or known or "quickgelu"}
