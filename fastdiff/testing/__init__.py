"""Property tests for ops: ours (`python -m fastdiff verify`) and yours (`check`). Needs hypothesis: pip install fastdiff-kernels[test]."""

from ..core.case import Array, Case, Dim, Integers, OneOf
from .budget import error
from .check import check
from .properties import PROPERTIES, Subject, subjects
from .strategies import Example, examples

__all__ = ["PROPERTIES", "Array", "Case", "Dim", "Example", "Integers", "OneOf", "Subject", "check", "error", "examples", "subjects"]
