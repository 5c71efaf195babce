"""Files of ours and of strangers: read, fetched from the hub, written whole."""
from __future__ import annotations

import json
import os
import re
from pathlib import Path
from zlib import crc32

MODEL_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*.json", "special_tokens_map.json",
               "chat_template.jinja", "adapter_config.json", "base.json"]


def write_whole(path, write):
    """Write a file so that it is either the old one or the new one, never half: aside, to disk, then renamed."""
    aside = path.with_name(path.name + ".tmp")
    try:
        write(aside)
        with open(aside, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def file_checksum(path):
    return f"{crc32(Path(path).read_bytes()):08x}"


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: not the folder of a model in the hub's layout") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def model_folder(name, wanted=MODEL_FILES):
    """A folder, or the hub's id of a model or adapter, fetched or from the cache -> folder."""
    if Path(name).is_dir():
        return Path(name)
    return fetch_from_hub(name, "model", wanted, "'toy', a folder with config.json and *.safetensors, or a hub id such as "
                          "inclusionAI/LLaDA-MoE-7B-A1B-Base")


def fetch_from_hub(name, kind, wanted, instead):
    """Files of a repository on the hub -> folder. Nothing is retried for minutes: one line says what to do instead."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise ValueError(f"there is no {kind} {name!r} here; give {instead}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError
    try:
        return Path(snapshot_download(name, repo_type=kind, allow_patterns=wanted, etag_timeout=5))
    except (HfHubHTTPError, OSError) as error:  # not found, not allowed, not reachable, and not in the cache either
        raise ValueError(f"{kind} {name!r} is not here and could not be fetched from the hub "
                         f"({str(error).strip().splitlines()[0][:160]}); give {instead}") from None
