"""Compare, measure and test trained models: one door to every evaluation.

    python evaluate.py                        compare the latest run with its control
    python evaluate.py compare RUN ...        compare runs of the same data, with the controls that
                                              a fair reading needs
    python evaluate.py exposure RUN ...       exposure bias by mask ratio (Fig. 3)
    python evaluate.py tasks TASKS RUN        tasks of lm-evaluation-harness (RULER, BABILong ...)
    python evaluate.py paper                  the paper's tables, with our scores beside them
    python evaluate.py claims                 every claim of the paper on the toy, with verdicts
    python evaluate.py lora                   what memory does to theta: one gain, taken apart
    python evaluate.py baselines              memory and other remedies for exposure bias
    python evaluate.py conversion             six ways from left to right to diffusion, compared
    python evaluate.py pretrained             the paper's claims on a pretrained base
    python evaluate.py order                  first and second order: how much phi can recall
    python evaluate.py pictures               draw every picture again from its stored numbers
    python evaluate.py lm_eval ...            lm-evaluation-harness's own command line

`python evaluate.py COMMAND --help` says what each takes. Command lines from the time before the
commands had names go on working.
"""
from __future__ import annotations

if __name__ == "__main__":  # first of all: a Ctrl-C may come while torch is imported
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback, until `begin` takes it
    import console
    console.begin()

import inspect
import os
import sys
from pathlib import Path

from backbones.block_diffusion import MODES
from files import nearest
from runs import latest_run, read_settings
from settings import (
    CHANGEABLE, Parser, add_flags, check_files, enough_memory, file_to_write, names_of, one_line,
    picture_to_write,
)


# ---- compare ------------------------------------------------------------------------------------

def add_compare_flags(parser):
    add = parser.add_argument
    add("runs", nargs="*", type=Path, help="run folders [default the latest]")
    add("--samples", type=int, default=200, help="held-out samples per cell [default 200]")
    add("--picture", type=picture_to_write, metavar="FILE", help="also draw the table there")
    add("--json", type=file_to_write, metavar="FILE", help="also write the numbers there")
    add_flags(parser, names_of("inner loop") + ["closed_book"])


def compare(arguments, changes):
    """Compare runs on held-out samples: with memory, without it, and with the controls.

    Runs that differ in the seed alone are averaged, with the spread over seeds.
    """
    from compare import print_comparison
    print_comparison(list_runs(arguments), arguments.samples, changes, arguments.json,
                     arguments.picture)


# ---- exposure -----------------------------------------------------------------------------------

def add_exposure_flags(parser):
    add = parser.add_argument
    add("runs", nargs="*", type=Path, help="run folders [default the latest]")
    add("--samples", type=int, default=200, help="held-out samples [default 200]")
    add("--out", type=picture_to_write, metavar="FILE", default="exposure.png",
        help="the picture [default exposure.png]")


def exposure(arguments, changes):
    """Measure exposure bias (Fig. 3): static and sequential loss by mask ratio, and their ratio."""
    from compare import print_exposure
    print_exposure(list_runs(arguments), arguments.samples, arguments.out)


# ---- tasks --------------------------------------------------------------------------------------

def add_tasks_flags(parser):
    add = parser.add_argument
    add("tasks", help="names, separated by commas: ruler_vt, ruler_cwe, niah_multivalue, "
        "babilong_qa1, babilong_longctx, longbench_trec ...")
    add("run", nargs="?", type=Path, help="a run folder [default the latest]")
    add("--model", help="a hub id or a folder, in place of a run")
    add("--adapt", action="store_true", help="write each prompt into fast weights first")
    add("--lengths", default="4096", help="lengths in tokens for RULER and BABILong, each on its "
        "own; BABILong has 0, 1024, 2048, 4096 ... 131072 [default 4096]")
    add("--limit", type=float, help="use only this many samples of each task and length; below 1: "
        "this share of them")
    add("--batch-size", type=int, default=1, help="requests decoded together [default 1]")
    add("--num-fewshot", type=int, help="examples in the prompt [default the task's]")
    add("--chat-template", action="store_true", help="put the prompt into the model's template")
    add("--max-length", type=int, default=0, help="cut longer prompts from the left; 0: never "
        "[default 0]")
    add("--steps", type=int, default=0, help="forward passes per answer, LLaDA2.x per block "
        "[default one per token]")
    add("--mode", choices=list(MODES), default="plain", help="LLaDA2.x, as in generate.py "
        "[default plain]")
    add("--block-length", type=int, default=0, help="as in generate.py [default one block]")
    add("--threshold", type=float, default=0.0, help="as in generate.py")
    add("--cache", choices=["none", "block"], default="none", help="as in generate.py "
        "[default none]")
    add("--mc-samples", type=int, default=128, help="Monte Carlo samples of a likelihood "
        "[default 128]")
    add("--include-path", help="a folder with task files of your own")
    add("--wait", type=int, default=600, help="seconds that RULER may take to make its samples "
        "[default 600]")
    add("--out", default="results/lm_eval", metavar="FOLDER", help="[default results/lm_eval]")
    # What a run's decoder sees of the prompt was settled in training, so no --closed-book here.
    add_flags(parser, names_of("inner loop", "loading"))


def tasks(arguments, changes):
    """Run tasks of lm-evaluation-harness, answered by the decoder of generate.py.

    The scores are added to scores.json in the folder --out; the harness's own files go beside it.
    """
    from paper.harness import run_tasks
    run_tasks(arguments.tasks.split(","), arguments.lengths.split(","), arguments.out,
              arguments.limit, arguments.num_fewshot, arguments.chat_template,
              arguments.include_path, arguments.wait, run=arguments.run,
              model=arguments.model, adapt=arguments.adapt, batch_size=arguments.batch_size,
              steps=arguments.steps, mode=arguments.mode, max_length=arguments.max_length,
              block_length=arguments.block_length, threshold=arguments.threshold,
              cache=arguments.cache, mc_samples=arguments.mc_samples, **changes)


# ---- paper and claims ---------------------------------------------------------------------------

def add_paper_flags(parser):
    parser.add_argument("folder", nargs="?", default="results",
                        help="where scores.json files lie [default results]")


def paper(arguments, changes):
    """Print the paper's tables, with our scores beside its numbers; a dash where none was run."""
    from paper.tables import print_tables
    print_tables(arguments.folder)


def add_claims_flags(parser):
    add = parser.add_argument
    add("--quick", action="store_true", help="shorter runs: five minutes instead of fifty")
    add("--jobs", type=int, default=os.cpu_count(),
        help="runs at a time, a thread each [default all cores]")
    add("--seeds", type=int, help="[default 5, quick 3]")
    add("--first-seed", type=int, default=0, metavar="N", help="seeds N, N + 1 ...: to confirm "
        "what was found, take seeds on which nothing was tried [default 0]")
    add("--out", default="runs/paper", metavar="FOLDER", help="[default runs/paper]")
    add("--again", type=Path, metavar="FILE", help="run nothing; judge the claims of an earlier "
        "report anew, from its values.json")


def claims(arguments, changes):
    """Test every claim of the paper on the toy, with controls and verdicts, and write a report.

    A second call goes on where the first was stopped.
    """
    if arguments.again:
        from paper.report import judge_again
        return judge_again(arguments.again)
    from paper.runs import run_claims
    run_claims(arguments.quick, arguments.jobs, arguments.seeds, arguments.out,
               arguments.first_seed)


def add_study_flags(parser):
    add = parser.add_argument
    add("--jobs", type=int, default=os.cpu_count(),
        help="runs at a time, a thread each [default all cores]")
    add("--out", metavar="FOLDER", help="[default runs/lora or runs/baselines]")


def lora(arguments, changes):
    """Take apart why a LoRA gains from memory in training: pace, noise, phi's parts, the base.

    It takes hours. A second call goes on where the first was stopped. The page is written after
    every part.
    """
    from paper.lora_rows import run_lora
    run_lora(arguments.jobs, arguments.out or "runs/lora")


def baselines(arguments, changes):
    """Compare memory with other remedies for exposure bias, at the same compute.

    A second call goes on where the first was stopped.
    """
    from paper.baselines import run_baselines
    run_baselines(arguments.jobs, arguments.out or "runs/baselines")


def add_conversion_flags(parser):
    parser.add_argument("ways", nargs="*", help="names of ways, as in the table [default all]")


def conversion(arguments, changes):
    """Convert SmolLM2 from left to right to diffusion in six ways, and compare them.

    A second call goes on where the first was stopped. Needs two packages; see paper/conversion.py.
    """
    from paper.conversion import run_conversion
    run_conversion(arguments.ways)


def add_pretrained_flags(parser):
    parser.add_argument("seeds", nargs="*", type=int, help="seeds [default 1 2 3 4 5]")


def pretrained(arguments, changes):
    """Test the paper's claims on SmolLM2, a pretrained base: a night on one core.

    A second call goes on where the first was stopped. Needs two packages; see paper/pretrained.py.
    """
    from paper.pretrained import SEEDS, run_pretrained
    run_pretrained(arguments.seeds or SEEDS)


def add_order_flags(parser):
    parser.add_argument("settings", nargs="*", help="how the names of the settings to run begin: "
                        "lever, headline, rounds, steps, paper [default all]")


def order(arguments, changes):
    """Compare the outer gradients of first and second order on the toy's closed book.

    A second call goes on where the first was stopped. See paper/order.py.
    """
    from paper.order import run_order
    run_order(arguments.settings)


# ---- pictures -----------------------------------------------------------------------------------

def add_pictures_flags(parser):
    add = parser.add_argument
    add("runs", nargs="*", type=Path, help="run folders [default the pictures of results/]")
    add("--out", type=Path, metavar="FOLDER", help="[default where the numbers lie]")


def pictures(arguments, changes):
    """Draw pictures again from the numbers that are stored beside them. Nothing is measured."""
    from paper.pictures import draw_pictures
    draw_pictures(arguments.runs and list_runs(arguments), arguments.out)


# ---- The door -----------------------------------------------------------------------------------

# name -> what runs the command, what adds its flags. What runs it takes the parsed arguments, and
# those of them that change settings.
COMMANDS = {"compare": (compare, add_compare_flags), "exposure": (exposure, add_exposure_flags),
            "tasks": (tasks, add_tasks_flags), "paper": (paper, add_paper_flags),
            "claims": (claims, add_claims_flags), "lora": (lora, add_study_flags),
            "baselines": (baselines, add_study_flags),
            "conversion": (conversion, add_conversion_flags),
            "pretrained": (pretrained, add_pretrained_flags), "order": (order, add_order_flags),
            "pictures": (pictures, add_pictures_flags)}

# The flags that --help shows of commands that have more.
FIRST = {"compare": ["runs", "--samples", "--picture", "--json"],
         "tasks": ["tasks", "run", "--model", "--load-4bit", "--adapt", "--lengths", "--limit",
                   "--chat-template", "--batch-size", "--out"]}


def list_runs(arguments):
    """The run folders that were named, or the latest. ValueError if one is no run folder."""
    folders = arguments.runs or [latest_run()]
    for folder in folders:
        if not folder.exists() and (command := nearest(str(folder), COMMANDS)):
            raise ValueError(f"{folder} is no command and no run folder{command}")
        read_settings(folder)
    return folders


def check_arguments(arguments):
    """ValueError if a number is too small, or one file is to be written twice."""
    for name, least in (("samples", 2), ("jobs", 1), ("seeds", 1), ("batch_size", 1),
                        ("mc_samples", 1), ("wait", 1), ("first_seed", 0), ("steps", 0),
                        ("max_length", 0), ("block_length", 0), ("num_fewshot", 0)):
        value = getattr(arguments, name, None)
        if value is not None and value < least:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is {value}; it must be at least {least}")
    check_files(arguments, "json", "picture")


def respell(words):
    """A command line that begins with a command's name, whatever its spelling.

    An old spelling has a flag in the place of the name: --exposure, --tasks TASKS, --paper, and
    --paper toy for the claims. Without any it compares.
    """
    if not words or words[0] in COMMANDS or words[0] in ("-h", "--help"):
        return words or ["compare"]
    if "--tasks" in words:
        i = words.index("--tasks")
        return ["tasks", *words[i + 1:i + 2], *words[:i], *words[i + 2:]]
    for i, word in enumerate(words):
        if word.startswith("--tasks="):
            return ["tasks", word.partition("=")[2], *words[:i], *words[i + 1:]]
    if "--paper" in words:
        i = words.index("--paper")
        if words[i + 1:i + 2] == ["toy"]:
            return ["claims", *words[:i], *words[i + 2:]]
        return ["paper", *words[:i], *words[i + 1:]]
    if "--exposure" in words:
        return ["exposure", *(word for word in words if word != "--exposure")]
    return ["compare", *words]


def main():
    if sys.argv[1:2] == ["lm_eval"]:
        from paper.harness import lm_eval_command
        del sys.argv[1]
        with one_line(), enough_memory():
            return lm_eval_command()
    command, *words = respell(sys.argv[1:])
    if command in ("-h", "--help"):
        return print(__doc__.strip())
    run, add_command_flags = COMMANDS[command]
    parser = Parser(FIRST.get(command, ()), prog=f"evaluate.py {command}",
                    description=inspect.getdoc(run))
    add_command_flags(parser)
    arguments = parser.parse_intermixed_args(words)
    changes = {name: value for name, value in vars(arguments).items() if name in CHANGEABLE}
    with one_line(), enough_memory():
        check_arguments(arguments)
        run(arguments, changes)


if __name__ == "__main__":
    main()
