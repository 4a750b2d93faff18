"""Overlap is asked for, never assumed."""

import torch

from mergequant.ops import overlap


def test_overlaps_when_nobody_asks_expect_no() -> None:
    assert not overlap.overlaps(torch.device("cpu"))


def test_overlaps_when_asked_on_a_cpu_expect_no_and_the_question_ends_with_its_block() -> None:
    with overlap.overlapping():
        assert overlap._asked.get()
        assert not overlap.overlaps(torch.device("cpu"))
        with overlap.overlapping(False):
            assert not overlap._asked.get()
        assert overlap._asked.get()
    assert not overlap._asked.get()
