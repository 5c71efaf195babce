"""What a piece of work spends its time on: operations, and on a GPU its kernels and waits.

A GPU is asked for one kernel after the other, and works while the host asks for the next. Where the
host asks too slowly, the GPU is idle: many launches and a low share of busy time. Where the host
reads a number of the GPU, it waits until all that was asked for is done.
"""
from __future__ import annotations

import os
import re

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# How the calls of CUDA and of ROCm are named that start a kernel, and that wait for the GPU. The
# program itself never waits for the whole device; the profiler does, and it does not count.
LAUNCH = re.compile(r"(cuda|cu|hip)\w*Launch")
WAIT = re.compile(r"(cuda|cu|hip)(Stream|Event)Synchronize")
NAME = 66  # columns that a name may take; with the numbers a row takes 100


def record(work, cuda):
    """The profiler's events of a piece of work, averaged by name."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its progress is not for our users
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as profiler:
        work()
        if cuda:
            torch.cuda.synchronize()
    return profiler.key_averages()


def summarise(events, seconds, most=12):
    """The operations and kernels that take most time, [name, calls, milliseconds, share] each.

    seconds: how long the work takes when nobody watches. On a GPU there are also the numbers of
    launches and waits, and the share of the seconds in which a kernel runs.
    """
    host = [(e.key, e.count, e.self_cpu_time_total) for e in events
            if e.device_type == DeviceType.CPU]
    gpu = [(e.key, e.count, e.self_device_time_total) for e in events
           if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    out = {"seconds": seconds, "operations": pick_longest(host, most)}
    if gpu:
        def calls(kind):
            return sum(count for name, count, _ in host if kind.match(name))
        busy = sum(time for _, _, time in gpu) / 1e6
        out |= {"kernels": pick_longest(gpu, most), "launches": calls(LAUNCH),
                "waits": calls(WAIT), "busy": busy / seconds}
    return out


def pick_longest(events, most):
    """[(name, calls, microseconds)] -> the rows that take most time."""
    total = sum(time for _, _, time in events) or 1
    longest = sorted(events, key=lambda event: -event[2])[:most]
    return [[name, count, time / 1e3, time / total] for name, count, time in longest]


def summary_text(title, summary):
    """The tables of a summary, at most 100 columns wide."""
    lines = [f"{title}: {summary['seconds']:.3f} s"]
    if "kernels" in summary:
        lines.append(f"  {summary['launches']:,} launches, the host waits {summary['waits']:,} "
                     f"times, kernels run {summary['busy']:.0%} of the time")
    for kind in ("operations", "kernels"):
        if kind in summary:
            head = f"{kind}, by the {'host' if kind == 'operations' else 'GPU'}'s own time"
            lines.append(f"  {head:{NAME}} {'calls':>9} {'ms':>10} {'share':>9}")
            for name, count, time, share in summary[kind]:
                lines.append(f"  {short_name(name):{NAME}} {count:9,} {time:10.2f} {share:9.1%}")
    return "\n".join(lines) + "\n"


def short_name(name):
    """A kernel's name without what all of them begin with, in one line and NAME columns."""
    name = " ".join(re.sub(r"^void |at::native::|\(anonymous namespace\)::", "", name).split())
    return name if len(name) <= NAME else name[:NAME - 3] + "..."
