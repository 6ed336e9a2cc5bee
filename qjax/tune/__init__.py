"""Measures how launches are best cut up on this GPU: the work behind `qjax tune`."""

from qjax.tune.bar import bar
from qjax.tune.gauge import Gauge, gpu
from qjax.tune.jobs import ROWS, Job, jobs, of_checkpoint, uniform
from qjax.tune.search import OutOfTimeError, fill, known, saver, search, told, within

__all__ = [
    "ROWS",
    "Gauge",
    "Job",
    "OutOfTimeError",
    "bar",
    "fill",
    "gpu",
    "jobs",
    "known",
    "of_checkpoint",
    "saver",
    "search",
    "told",
    "uniform",
    "within",
]
