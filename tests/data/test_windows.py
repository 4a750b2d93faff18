import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergequant.data.overlap import overlap, sketch
from mergequant.data.windows import _pieces, check_seqlen, draw_splits, draw_windows, head_windows
from mergequant.errors import DataError, OverlapError, UsageError


def counting(count: int, first: int = 1) -> list[str]:
    """Text whose k-th token is k."""
    return [" ".join(str(i) for i in range(first, first + count))]


def test_draw_when_tokenizer_has_bos_prepends_it_and_never_repeats_a_token(tokenizer: Any) -> None:
    windows = draw_windows(counting(1000), tokenizer, samples=9, seqlen=101, seed=3)
    assert windows.tokens.shape == (9, 101)
    assert windows.begins_with_bos
    assert (windows.tokens[:, 0] == 0).all()
    text = windows.tokens[:, 1:]
    assert text.unique().numel() == 900
    assert (text.diff(dim=1) == 1).all()


@pytest.mark.parametrize("bos", ["auto", False])
def test_draw_when_without_bos_uses_the_whole_window_for_text(
    tokenizer: Any, tokenizer_without_bos: Any, bos: Any
) -> None:
    chosen = tokenizer if bos is False else tokenizer_without_bos
    windows = draw_windows(counting(1000), chosen, samples=10, seqlen=100, seed=0, bos=bos)
    assert not windows.begins_with_bos
    assert windows.tokens.unique().numel() == 1000
    assert windows.provenance()["bos"] is False


def test_draw_when_bos_is_demanded_without_token_raises(tokenizer_without_bos: Any) -> None:
    with pytest.raises(UsageError, match="BOS"):
        draw_windows(counting(100), tokenizer_without_bos, samples=1, seqlen=9, seed=0, bos=True)


def test_draw_when_seed_is_equal_repeats_and_otherwise_differs(tokenizer: Any) -> None:
    prints = [draw_windows(counting(2000), tokenizer, samples=5, seqlen=33, seed=s).fingerprint for s in (0, 0, 1, 2)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_splits_when_drawn_are_disjoint_and_keep_the_calibration_windows(tokenizer: Any) -> None:
    alone = draw_windows(counting(2000), tokenizer, samples=8, seqlen=41, seed=5)
    first, second = draw_splits(counting(2000), tokenizer, samples=8, held_out=6, seqlen=41, seed=5)
    assert first.fingerprint == alone.fingerprint
    assert second.tokens.shape == (6, 41)
    assert not set(first.tokens[:, 1:].flatten().tolist()) & set(second.tokens[:, 1:].flatten().tolist())
    _, none = draw_splits(counting(2000), tokenizer, samples=8, held_out=0, seqlen=41, seed=5)
    assert none.tokens.shape == (0, 41)


def test_splits_when_text_holds_copies_hold_out_fresh_windows_only(tokenizer: Any) -> None:
    copied = [*counting(400), *counting(400), *counting(400, first=5000)]
    for seed in range(5):
        first, second = draw_splits(copied, tokenizer, samples=4, held_out=4, seqlen=41, seed=seed)
        assert overlap(sketch(first.tokens), sketch(second.tokens)) == 0


def test_splits_when_text_only_repeats_itself_raises_overlap(tokenizer: Any) -> None:
    repeated = counting(40) * 20
    with pytest.raises(OverlapError, match="repeats itself"):
        draw_splits(repeated, tokenizer, samples=4, held_out=4, seqlen=41, seed=0)


def test_draw_when_excluding_takes_nothing_of_it(tokenizer: Any) -> None:
    seen = head_windows(counting(1000), tokenizer, samples=10, seqlen=51)
    rest = draw_windows(counting(1000), tokenizer, samples=5, seqlen=51, seed=1, exclude=[seen])
    assert rest.tokens[:, 1:].min() > 500 - 32
    with pytest.raises(OverlapError):
        draw_windows(counting(1000), tokenizer, samples=15, seqlen=51, seed=1, exclude=[seen])


def test_draw_when_text_is_too_short_suggests_what_fits(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="100 tokens, but 8 windows of 33 tokens need 256") as caught:
        draw_windows(counting(100), tokenizer, samples=8, seqlen=33, seed=0)
    samples, seqlen = (int(re.search(rf"--{o} (\d+)", str(caught.value))[1]) for o in ("samples", "seqlen"))  # type: ignore[index]
    assert len(draw_windows(counting(100), tokenizer, samples=samples, seqlen=33, seed=0)) == samples
    assert len(draw_windows(counting(100), tokenizer, samples=8, seqlen=seqlen, seed=0)) == 8


def test_head_when_consecutive_starts_at_the_first_token_and_reads_no_more_than_needed(
    tokenizer: Any, tmp_path: Path
) -> None:
    file = tmp_path / "long.txt"
    file.write_text("\n".join(" ".join(str(i) for i in range(k, k + 20)) for k in range(1, 100_000, 20)))
    windows = head_windows(str(file), tokenizer, samples=3, seqlen=11)
    assert windows.tokens[:, 1:].flatten().tolist() == list(range(1, 31))
    assert tokenizer.characters_seen < 70_000
    assert windows.stride is None
    everything = head_windows(str(file), tokenizer, samples=None, seqlen=1001)
    assert everything.tokens[:, 1:].flatten().tolist() == list(range(1, 100_001))


def test_head_when_strided_repeats_context(tokenizer: Any) -> None:
    windows = head_windows(counting(25), tokenizer, samples=None, seqlen=11, stride=5)
    assert windows.tokens[:, 1].tolist() == [1, 6, 11, 16]
    assert windows.stride == 5
    for stride in (0, 11):
        with pytest.raises(UsageError, match="--stride"):
            head_windows(counting(25), tokenizer, samples=None, seqlen=11, stride=stride)


def test_head_when_too_short_raises(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="--samples 2"):
        head_windows(counting(25), tokenizer, samples=3, seqlen=11)
    with pytest.raises(DataError, match="too short"):
        head_windows(counting(5), tokenizer, samples=None, seqlen=11)


def test_windows_when_self_needs_model_and_samples(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="--against"):
        head_windows("self", tokenizer, samples=2, seqlen=8)
    with pytest.raises(UsageError, match="--samples"):
        head_windows("self", tokenizer, samples=None, seqlen=8)


def test_windows_when_ready_tensor_is_given_is_used_as_it_is(tokenizer: Any) -> None:
    tokens = torch.arange(1, 121).view(6, 20)
    assert torch.equal(head_windows(tokens, tokenizer, samples=None, seqlen=20).tokens, tokens)
    drawn = draw_windows(tokens, tokenizer, samples=6, seqlen=20, seed=0)
    assert not drawn.begins_with_bos
    assert torch.equal(drawn.tokens.sort(dim=0).values, tokens)
    tokens[:, 0] = 0
    assert head_windows(tokens, tokenizer, samples=2, seqlen=20).begins_with_bos
    with pytest.raises(DataError, match="6 windows of 20 tokens"):
        head_windows(tokens, tokenizer, samples=7, seqlen=20)


def test_mix_when_weighted_takes_shares_of_both_files(tokenizer: Any, tmp_path: Path) -> None:
    for name, first in (("a.txt", 1), ("b.txt", 10_000)):
        (tmp_path / name).write_text(counting(1000, first)[0])
    spec = f"{tmp_path / 'a.txt'}*3+{tmp_path / 'b.txt'}*1"
    windows = draw_windows(spec, tokenizer, samples=8, seqlen=41, seed=0)
    assert int((windows.tokens[:, 1] < 10_000).sum()) == 6
    assert windows.source == spec.replace("*3", "*3.0").replace("*1", "*1.0")


@pytest.mark.parametrize(("seqlen", "limit"), [(1, None), (0, 10), (11, 10)])
def test_check_seqlen_when_impossible_raises(seqlen: int, limit: int | None) -> None:
    with pytest.raises(UsageError, match="--seqlen"):
        check_seqlen(seqlen, limit)
    check_seqlen(10, 10)


@given(st.lists(st.text("ab \n", max_size=60_000), max_size=4))
def test_pieces_when_regrouped_lose_nothing(fragments: list[str]) -> None:
    pieces = list(_pieces(iter(fragments)))
    assert "".join(pieces) == "".join(fragments)
    assert all(len(piece) <= 1 << 16 for piece in pieces)


def test_pieces_when_text_is_long_are_cut_after_newlines() -> None:
    pieces = list(_pieces(iter(["word word\n\n" * 20_000])))
    assert len(pieces) > 3
    assert all(piece.startswith("word") and piece.endswith("\n\n") for piece in pieces)
    assert all(piece.startswith(" ") for piece in list(_pieces(iter([" word" * 30_000])))[1:])
