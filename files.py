"""Files: read, fetched from the hub, and written whole.

What is written is never half there: a run that is killed leaves the old file or the new one. What
others have written is refused, where it cannot be read, in one line that says what to do.
"""
from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from zlib import crc32

# What is fetched of a model or an adapter. Nothing here can run code: no .py, no pickle.
MODEL_FILES = [
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json",
    "tokenizer*.json", "special_tokens_map.json", "chat_template.jinja", "adapter_config.json",
    "base.json",
]
MOST_JSON = 1 << 24     # bytes of a JSON file that are read
MOST_TENSORS = 50_000   # of a model: LLaDA2.0-flash, with 100 billion weights, has 25,000
MOST_SAVED = 400_000    # of a run's checkpoint: a LoRA on that, with the state of its optimiser
FLOATS = ("F64", "F32", "F16", "BF16")  # how safetensors calls numbers that are weights


def write_whole(path, write):
    """Write a file so that at any moment it is either the old one or the new one.

    write(path) writes to a file beside it. Once all of that is on the disk, the file is renamed.
    If `write` fails, the old file stays and the new one is removed.
    """
    aside = path.with_name(path.name + ".tmp")
    try:
        write(aside)
        with open(aside, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_text(path, text):
    """Write a text file, whole."""
    write_whole(Path(path), lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path, values, indent=None):
    """Write a JSON file, whole."""
    write_text(path, json.dumps(values, indent=indent) + "\n")


def file_checksum(path):
    """CRC-32 of a file, as 8 hexadecimal digits."""
    return f"{crc32(Path(path).read_bytes()):08x}"


def read_json(path, finite=True):
    """The content of a JSON file that a stranger may have written. ValueError if there is none.

    No pipe or device is opened, nothing large is read, and a value is never ambiguous: no name
    stands twice and, if `finite`, every number is finite.
    """
    if not path.exists():
        raise ValueError(f"{path} is missing: not the folder of a model in the hub's layout")
    if not path.is_file() or path.stat().st_size > MOST_JSON:
        raise ValueError(f"{path} is no file of at most {MOST_JSON >> 20} MB")
    try:
        number = finite_number if finite else float
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_names,
                          parse_float=number, parse_constant=number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {str(error)[:200]}") from None


def unique_names(pairs):
    """The fields of a JSON object as a dict. ValueError if a name stands twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:60]!r} stands twice")
    return values


def finite_number(text):
    """A number of a JSON file. ValueError if it is none, or infinite."""
    if not math.isfinite(float(text)):
        raise ValueError(f"the number {text[:60]} is not finite")
    return float(text)


def open_tensors(path, most=MOST_TENSORS):
    """An open safetensors file. ValueError if it is none or names more than `most` tensors."""
    from safetensors import SafetensorError, safe_open
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    with open(path, "rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        # Whatever is wrong with the header, the library says. It only takes its time to do so.
        count = handle.read(min(size, 1 << 27)).count(b'"dtype"')
    if count > most:
        raise ValueError(f"{path} names {count:,} tensors; at most {most:,} are read")
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {str(error)[:200]}") from None


def read_tensor(file, name, path):
    """A tensor of an open safetensors file. ValueError if its numbers cannot be weights."""
    kind = file.get_slice(name).get_dtype()
    if kind not in FLOATS:
        raise ValueError(f"{path}: {name[:200]!r} holds {kind}, which is quantised or no weight; "
                         f"weights are {', '.join(FLOATS)}")
    return file.get_tensor(name)


def model_folder(name, wanted=MODEL_FILES):
    """The folder of a model or an adapter, which is fetched if `name` is an id of the hub."""
    if Path(name).is_dir():
        for path in (path for pattern in wanted for path in Path(name).glob(pattern)):
            if not path.is_file():  # a pipe would be waited for, a device has no end
                raise ValueError(f"{path} is not a file")
        return Path(name)
    instead = ("'toy', a folder with config.json and *.safetensors, or a hub id such as "
               "inclusionAI/LLaDA-MoE-7B-A1B-Base")
    return fetch_from_hub(name, "model", wanted, instead)


def fetch_from_hub(name, kind, wanted, instead):
    """Fetch files of a repository on the hub, or find them in its cache. Returns their folder.

    kind: model or dataset. wanted: patterns of file names. ValueError says what to give `instead`.
    It comes at once: the hub's client would try again for minutes.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise ValueError(f"there is no {kind} {name!r} here; give {instead}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError
    try:
        return Path(snapshot_download(name, repo_type=kind, allow_patterns=wanted, etag_timeout=5))
    except (HfHubHTTPError, OSError) as error:
        # The repository is unknown, closed or out of reach, and it is not in the cache either.
        reason = str(error).strip().splitlines()[0][:160]
        raise ValueError(f"{kind} {name!r} is not here and could not be fetched from the hub "
                         f"({reason}); give {instead}") from None
