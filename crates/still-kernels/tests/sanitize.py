"""sanitize.py LIBRARY: small cases of every kernel, for compute-sanitizer to watch:

compute-sanitizer --tool memcheck|racecheck --kernel-regex kns=still python3 sanitize.py LIBRARY
"""
import sys

import torch

import check
from still_cuda import Still

lib = Still(sys.argv[1])
cases = [(1, 4, 2, 128, 300, [4, 64], True), (2, 3, 3, 64, 257, [0, 5, 64], False), (1, 2, 1, 96, 130, [3], True)]
good = [check.check_case(lib, case, dtype, 1, True) for case in cases for dtype in (torch.bfloat16, torch.float32)]
good += [check.check_case(lib, (1, 4, 2, d, 333, [4, 64], True), dtype, 1, True, 9) for d in (64, 128) for dtype in (torch.bfloat16, torch.float32)]
good += [check.check_decode(lib, (1, 4, 2, 64, 390, [4, 40], True), dtype, 1, 253, 50) for dtype in (torch.bfloat16, torch.float32)]
good += [check.check_decode(lib, (1, 8, 2, d, 262, [4, 64], True), dtype, 1, 253) for d in (64, 128) for dtype in (torch.bfloat16, torch.float32)]
onto = [[130, 1], [3, 70], [2, 64], [128, 130]]
good += [check.check_onto(lib, (2, 4, 2, 64, 340, [4, 40], True), dtype, 1, onto, cap) for cap in (None, 50) for dtype in (torch.bfloat16, torch.float32)]
good += [
    check.check_onto(lib, (2, 4, 2, d, 340, [4, 40], True), dtype, 1, onto, cap, coding)
    for d in (64, 128) for cap in (None, 50) for coding in ("int8", "int4") for dtype in (torch.bfloat16, torch.float32)
]
sys.exit(0 if all(good) else 1)
