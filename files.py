"""Files: read, fetched from the hub, and written whole.

What is written is never half there: a run that is killed leaves the old file or the new one. What
others have written is refused, where it cannot be read, in one line that says what to do. Nothing
is written through a link, so a stranger's folder cannot send our files elsewhere.
"""
from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
import re
import secrets
import signal
import stat
import threading
from pathlib import Path
from zlib import crc32

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What is fetched of a model or an adapter. Nothing here can run code: no .py, no pickle.
MODEL_FILES = [
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json",
    "tokenizer*.json", "special_tokens_map.json", "chat_template.jinja", "adapter_config.json",
    "base.json",
]
# The names of files that are being written: ours, and those of safetensors.
UNFINISHED = re.compile(r"[0-9a-f]{16}\.tmp|\.tmp[0-9A-Za-z]{6}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
MOST_JSON = 1 << 24     # bytes of a JSON file that are read
MOST_TENSORS = 50_000   # of a model: LLaDA2.0-flash, with 100 billion weights, has 25,000
MOST_SAVED = 400_000    # of a run's checkpoint: a LoRA on that, with the state of its optimiser
FLOATS = ("F64", "F32", "F16", "BF16")  # how safetensors calls numbers that are weights


# ---- Writing ------------------------------------------------------------------------------------

def write_whole(path, write):
    """Write a file so that at any moment it is either the old one or the new one.

    write(path) writes to a new file beside it. Once all of that is on the disk, the file is
    renamed. If `write` fails, the old file stays and the new one is removed.
    """
    path = Path(path)
    refuse_special(path)
    # Nobody can have put a link there: the name is random, and a file that exists is not opened.
    aside = path.with_name(f"{secrets.token_hex(8)}.tmp")
    try:
        handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINKS, 0o666)
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
        os.close(handle)
        write(aside)
        os.chmod(aside, mode)  # safetensors puts a file of its own there, for the owner alone
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):  # it has its name, or there is no such place
            aside.unlink()


def refuse_special(path):
    """OSError if a file at this path would replace a folder, a device or a pipe.

    /dev/stdout is a link into /proc. Other links may be replaced; what they lead to stays.
    """
    linked = path.is_symlink() and os.readlink(path).startswith("/proc/")
    if linked or (path.exists() and not path.is_file()):
        raise OSError(f"{path} is no plain file; give another name for what is to be written")


def check_target(path):
    """OSError, before any work, where `write_whole` would find later that it cannot write."""
    refuse_special(path)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise OSError(f"{path} cannot be written: {folder} is no folder that you may write to")


def sync_folder(folder):
    """Have a new name in a folder on the disk, where the system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path, text):
    """Write a text file, whole."""
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path, values, indent=None):
    """Write a JSON file, whole."""
    write_text(path, json.dumps(values, indent=indent) + "\n")


def write_tensors(path, tensors, metadata):
    """Write a safetensors file, for `write_whole`. OSError where the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def append_line(path, line):
    """Add a line to a text file, which is made if it is not there."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_LINKS, 0o666)
        with open(handle, "w", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror}") from None


# ---- A folder of ours ---------------------------------------------------------------------------

def refuse_links(*folders):
    """ValueError if something in these folders is a link, or neither a file nor a folder.

    A file with a second name elsewhere (a hard link) counts as a link. A folder may be missing.
    """
    for path in list_folders(*folders):
        try:
            found = path.lstat()
        except FileNotFoundError:  # another process has just renamed or removed it
            continue
        plain = stat.S_ISREG(found.st_mode) and found.st_nlink == 1
        if not plain and not stat.S_ISDIR(found.st_mode):
            raise ValueError(f"{path} is a link or a special file, which no run writes; put a "
                             "plain file in its place, or remove it")


def list_folders(*folders):
    """What is in these folders, one folder after the other. A folder may be missing."""
    for folder in folders:
        if folder.is_dir():
            yield from sorted(folder.iterdir())


def remove_unfinished(*folders):
    """Remove the files that a killed process of ours was writing."""
    for path in list_folders(*folders):
        if UNFINISHED.fullmatch(path.name) and stat.S_ISREG(path.lstat().st_mode):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock_folder(folder):
    """Hold a folder. ValueError if another process holds it.

    The system gives the lock back when its process ends, however it ends. Where there are no such
    locks (Windows, some network disks), nothing is locked.
    """
    path = folder / "lock"
    handle = take_lock(path) if fcntl else None
    try:
        yield
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)
            os.close(handle)


def take_lock(path):
    """Open a lock file, lock it and write our process into it. Returns the open file's number."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINKS, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 20).decode("ascii", "replace").strip() or "?"
            os.close(handle)
            raise ValueError(f"{path.parent} is in use: process {holder} trains it; wait for its "
                             "end or stop it") from None
        except OSError:
            pass  # a disk without locks
        # The process before us may have removed the file between our two calls.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                with contextlib.suppress(OSError):  # a full disk: it is locked all the same
                    os.ftruncate(handle, 0)
                    os.write(handle, f"{os.getpid()}\n".encode())
                return handle
        os.close(handle)


# ---- Reading ------------------------------------------------------------------------------------

def file_checksum(path):
    """CRC-32 of a file, as 8 hexadecimal digits."""
    checksum = 0
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            checksum = crc32(part, checksum)
    return f"{checksum:08x}"


def folder_checksum(folder, most=1 << 20):
    """CRC-32 of a folder, as 8 hexadecimal digits.

    It is over the names and sizes of all files in it, and over the first and the last bytes of
    each, `most` of them. What the datasets library may have put there for itself does not count.
    """
    checksum = 0
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and not path.name.startswith(("cache-", "tmp")):
            size = path.stat().st_size
            checksum = crc32(f"{path.relative_to(folder).as_posix()} {size} ".encode(
                errors="surrogateescape"), checksum)
            with open(path, "rb") as file:
                checksum = crc32(file.read(most), checksum)
                file.seek(max(0, size - most))
                checksum = crc32(file.read(most), checksum)
    return f"{checksum:08x}"


def read_json(path, finite=True):
    """The content of a JSON file that a stranger may have written. ValueError if there is none.

    No pipe or device is opened, nothing large is read, and a value is never ambiguous: no name
    stands twice and, if `finite`, every number is finite.
    """
    if not path.exists():
        hint = ": not the folder of a model in the hub's layout" * path.name.endswith("config.json")
        raise ValueError(f"{path} is missing{hint}")
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


def nearest(word, names):
    """"; did you mean NAME?" with the name that is most like a mistyped word, or nothing."""
    found = difflib.get_close_matches(word, list(names), 1)
    return f"; did you mean {found[0]}?" if found else ""


# Models that are known to work, for a name that is mistyped.
KNOWN_MODELS = ("toy", "inclusionAI/LLaDA-MoE-7B-A1B-Base", "inclusionAI/LLaDA-MoE-7B-A1B-Instruct",
                "inclusionAI/LLaDA2.0-mini", "inclusionAI/LLaDA2.1-mini", "GSAI-ML/LLaDA-8B-Base",
                "GSAI-ML/LLaDA-8B-Instruct")


def model_folder(name, wanted=MODEL_FILES):
    """The folder of a model or an adapter, which is fetched if `name` is an id of the hub."""
    if Path(name).is_dir():
        for path in (path for pattern in wanted for path in Path(name).glob(pattern)):
            if not path.is_file():  # a pipe would be waited for, a device has no end
                raise ValueError(f"{path} is not a file")
        return Path(name)
    here = [path.parent.name for path in Path().glob("*/config.json")]
    instead = ("'toy', a folder with config.json and *.safetensors, or a hub id such as "
               f"inclusionAI/LLaDA-MoE-7B-A1B-Base{nearest(name, [*KNOWN_MODELS, *here])}")
    return fetch_from_hub(name, "model", wanted, instead)


def fetch_from_hub(name, kind, wanted, instead):
    """Fetch files of a repository on the hub, or find them in its cache. Returns their folder.

    kind: model or dataset. wanted: patterns of file names. ValueError says what to give `instead`.
    It comes at once: the hub's client would try again for minutes.
    """
    if not HUB_ID.fullmatch(name):
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


def size_on_hub(name, kind, wanted):
    """The bytes of a repository's files on the hub that match, or 0 if the hub does not say."""
    from huggingface_hub import HfApi
    try:
        found = HfApi().repo_info(name, repo_type=kind, files_metadata=True, timeout=5).siblings
    except (OSError, ValueError, RuntimeError):  # it is out of reach, or there is no such name
        return 0
    return sum(file.size or 0 for file in found
               if any(Path(file.rfilename).match(pattern) for pattern in wanted))


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
    def stop(number, frame):
        raise ValueError(f"it takes more than {seconds} s")

    import resource
    before, limits = signal.signal(signal.SIGVTALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    # The timer rings again and again, since the program may catch the first error.
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)
    limit_memory(extra)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGVTALRM, before)


def limit_memory(extra):
    """Let this process take so many bytes more than it has now, and no more (Linux)."""
    import resource
    used, limits = Path("/proc/self/statm"), resource.getrlimit(resource.RLIMIT_AS)
    if used.exists():
        most = int(used.read_text().split()[0]) * resource.getpagesize() + extra
        if limits[0] == resource.RLIM_INFINITY or most < limits[0]:
            resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))


def run_apart(function, seconds=10, extra=1 << 30):
    """function(), computed in a process of its own with so much CPU time and memory.

    Native code cannot be stopped within our process; a process can. The result must be JSON. Where
    processes cannot be split (Windows), there is no bound. ValueError if it takes more, if it
    raises one, or if it crashes.
    """
    if not hasattr(os, "fork"):
        return function()
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        answer_and_exit(function, theirs, seconds, extra)
    os.close(theirs)
    status = None
    try:
        with open(ours, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
    finally:
        if status is None:  # a Ctrl-C
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM):
        raise ValueError(f"it takes more than {seconds} s")
    if status:  # native code ends its process where it gets no memory
        raise ValueError("it crashes, or takes more than a gigabyte of memory")
    good, value = json.loads(answer)
    if not good:
        raise ValueError(value)
    return value


def answer_and_exit(function, pipe, seconds, extra):
    """Write [True, function()] or [False, what was wrong] to the pipe, and end this process."""
    import resource
    try:
        for number in (signal.SIGXCPU, signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # native code reports at length
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        signal.alarm(3 * seconds)  # it may also wait
        limit_memory(extra)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not in this process
        try:
            answer = [True, function()]
        except BaseException as error:
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            answer = [False, kind + reason]
        with open(pipe, "w", encoding="utf-8") as file:
            json.dump(answer, file)
    except BaseException:
        os._exit(1)
    os._exit(0)
