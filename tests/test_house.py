"""The house rules: who may import whom, how wide and long the code may be, how it is told.

Nothing is imported here. The files are read and parsed as text.
"""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TESTS = sorted(ROOT.glob("tests/*.py"))
SOURCES = sorted({*ROOT.glob("*.py"), *ROOT.glob("*/*.py")} - {*TESTS})

# Rooms by height. A room may import what stands on a lower line, and nothing else of ours.
FLOORS = [
    {"memdlm"},
    {"files", "console", "colors"},
    {"data"},
    {"toy", "backbones", "objectives"},
    {"settings"},
    {"runs"},
    {"compare", "pages", "memory", "cards", "trackers", "kernels"},
    {"train", "generate", "export", "decoding"},
    {"paper"},
    {"evaluate", "bench"},
    {"first_gpu"},
]
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}

# What takes seconds to import, or is not installed for everyone.
HEAVY = {"accelerate", "bitsandbytes", "datasets", "huggingface_hub", "lm_eval", "matplotlib",
         "nbclient", "nltk", "peft", "safetensors", "scipy", "tensorboard", "tokenizers",
         "transformers", "wandb"}


def module_name(path):
    """toy/model.py -> toy.model"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {module_name(path) for path in SOURCES}


def imports_of(path, inside_functions=True):
    """The modules that a file imports: `from toy import tasks` imports toy.tasks."""
    found, todo = [], [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in names if name in MODULES] or [node.module]
        elif inside_functions or not isinstance(node, ast.FunctionDef):
            todo += ast.iter_child_nodes(node)
    return found


def is_ours(module):
    return module.partition(".")[0] in HEIGHT


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_run_one_way(path):
    room = module_name(path).partition(".")[0]
    assert room in HEIGHT, f"{path.name} has no place in the order of rooms"
    for module in filter(is_ours, imports_of(path)):
        other = module.partition(".")[0]
        assert other == room or HEIGHT[other] < HEIGHT[room], f"{path.name} imports {module}"


def test_the_method_imports_torch_and_nothing_of_ours():
    found = {module.partition(".")[0] for module in imports_of(ROOT / "memdlm.py")}
    assert not {module for module in found if is_ours(module)}
    assert "torch" in found and "numpy" not in found


def test_no_file_imports_itself_by_way_of_others():
    """No circle, also within a room."""
    graph = {module_name(path): set(filter(is_ours, imports_of(path))) for path in SOURCES}
    while graph:
        free = [name for name, needs in graph.items() if not needs & graph.keys() - {name}]
        assert free, f"a circle among {', '.join(graph)}"
        for name in free:
            del graph[name]


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_heavy_packages_are_imported_where_they_are_used(path):
    top = imports_of(path, inside_functions=False)
    assert not HEAVY & {module.partition(".")[0] for module in top}


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=module_name)
def test_lines_and_functions_fit_on_a_page(path):
    text = path.read_text()
    wide = [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 100]
    assert not wide, f"{path.name}: lines {wide} are wider than 100 columns"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{path.name}: {node.name} has {length} lines"


def test_the_method_is_told_in_order():
    """Both training steps stand at the beginning; what is left at the end is variants."""
    lines = (ROOT / "memdlm.py").read_text().splitlines()
    assert len(lines) <= 760
    end_of = {node.name: node.end_lineno for node in ast.walk(ast.parse("\n".join(lines)))
              if isinstance(node, ast.FunctionDef)}
    assert end_of["mdlm_step"] < end_of["memdlm_step"] < end_of["forward"] <= 160
    last = next(i for i, line in enumerate(lines, 1) if re.match(r"# ---- .*Exposure bias", line))
    assert last <= 620
    for name in ("adapt", "denoise", "inner_loop", "sgd_step", "fast_weights", "mdlm_loss"):
        assert end_of[name] < last


def test_every_equation_of_the_paper_stands_above_its_line():
    text = (ROOT / "memdlm.py").read_text()
    for number in ("1", "2, 9", "3", "4", "5", "6", "7-8"):
        assert f"# Eq. {number}:" in text, number


def read_differences(path):
    """Each `Differs:` note of a file, up to the end of its comment or of its paragraph."""
    notes, lines = [], path.read_text().splitlines()
    for i, line in enumerate(lines):
        if "Differs:" in line:
            is_comment, end = line.lstrip().startswith("#"), i + 1
            while (lines[end].strip() and lines[end].lstrip().startswith("#") == is_comment
                   and "Differs:" not in lines[end] and '"""' not in lines[end]):
                end += 1
            notes.append(" ".join(words.strip("# ") for words in lines[i:end]))
    return notes


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_difference_says_what_ours_does(path):
    """Differs: what the paper or its code does. What we do. Why."""
    for note in read_differences(path):
        assert re.search(r"\b([Oo]urs|[Ww]e)\b", note), f"{path.name}: {note}"


def test_the_readme_fits_one_reading():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200 and len(text.split()) <= 1500


def test_the_questions_are_asked_as_people_ask_and_answered_shortly():
    text = (ROOT / "FAQ.md").read_text()
    assert max(map(len, text.splitlines())) <= 100
    for part in re.split(r"^### ", text, flags=re.M)[1:]:
        question, _, answer = part.partition("\n")
        words = re.sub(r"^(```.*?^```|## .*?|\|.*?)$", "", answer, flags=re.S | re.M).split()
        assert question[-1] in "?." and 15 <= len(words) <= 150, question


def test_the_refusals_that_are_explained_are_those_of_the_code():
    table = re.search(r"\| the line says.*?\n\n", (ROOT / "FAQ.md").read_text(), re.S)[0]
    lines = "".join(path.read_text() for path in SOURCES).replace('"\n', "").splitlines()
    code = re.sub(r'"? *f?"', "", " ".join(" ".join(lines).split()))
    phrases = re.findall(r"^\| `(.+?)` \|", table, re.M)
    assert len(phrases) >= 5
    for phrase in phrases:
        for part in re.split(r" N | \.\.\. ?|line 7: \.\.\.", phrase):
            assert part in code, phrase
