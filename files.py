"""Files: read, fetched from the hub, and written whole.

What is written is never half there: a run that is killed leaves the old file or the new one. What
others have written is refused, where it cannot be read, in one line that says what to do.
"""
from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
from pathlib import Path
from zlib import crc32

# What is fetched of a model or an adapter. Nothing here can run code: no .py, no pickle.
MODEL_FILES = [
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json",
    "tokenizer*.json", "special_tokens_map.json", "chat_template.jinja", "adapter_config.json",
    "base.json",
]


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


def read_json(path):
    """The content of a JSON file that comes with a model. ValueError if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing: not the folder of a model in the hub's layout") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def model_folder(name, wanted=MODEL_FILES):
    """The folder of a model or an adapter, which is fetched if `name` is an id of the hub."""
    if Path(name).is_dir():
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


@contextlib.contextmanager
def bounded(seconds=3, extra=1 << 30):
    """A stranger's program that runs within has so much CPU time and, on Linux, so much memory.

    ValueError or MemoryError when it takes more. Only Python code can be stopped so, and only in
    the main thread; elsewhere there is no bound.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or not hasattr(signal, "setitimer"):
        yield
        return
    import resource

    def stop(number, frame):
        raise ValueError(f"it takes more than {seconds} s")

    before, limits = signal.signal(signal.SIGVTALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    # The timer rings again and again, since the program may catch the first error.
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)
    used = Path("/proc/self/statm")
    if used.exists():
        now = int(used.read_text().split()[0]) * resource.getpagesize() + extra
        if limits[0] == resource.RLIM_INFINITY or now < limits[0]:
            resource.setrlimit(resource.RLIMIT_AS, (now, limits[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGVTALRM, before)
