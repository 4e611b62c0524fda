"""Several deltas of one base into one."""

from delta_analysis.merging.average import Average
from delta_analysis.merging.conflicts import interference
from delta_analysis.merging.della import Della
from delta_analysis.merging.discard import discard_rate
from delta_analysis.merging.election import Slack
from delta_analysis.merging.fisher import Fisher
from delta_analysis.merging.merger import Merger, Tensors, check_mergeable, merge, merge_label
from delta_analysis.merging.methods import MergeMethod, Statistic
from delta_analysis.merging.regmean import RegMean
from delta_analysis.merging.statistics import Statistics, gather
from delta_analysis.merging.task_arithmetic import TaskArithmetic
from delta_analysis.merging.ties import Ties
from delta_analysis.merging.widen import Widen

__all__ = [
    "Average",
    "Della",
    "Fisher",
    "MergeMethod",
    "Merger",
    "RegMean",
    "Slack",
    "Statistic",
    "Statistics",
    "TaskArithmetic",
    "Tensors",
    "Ties",
    "Widen",
    "check_mergeable",
    "discard_rate",
    "gather",
    "interference",
    "merge",
    "merge_label",
]
