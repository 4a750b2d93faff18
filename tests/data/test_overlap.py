import json

import numpy as np
import pytest
import torch

from mergequant.data.overlap import Sketch, ngram_hashes, overlap, refuse_overlap, sketch, sketch_from_json
from mergequant.data.overlap import sketch_to_json as to_json
from mergequant.errors import DataError, OverlapError


def random_tokens(seed: int, windows: int = 40, seqlen: int = 256) -> torch.Tensor:
    return torch.randint(0, 8192, (windows, seqlen), generator=torch.Generator().manual_seed(seed))


def test_overlap_when_texts_are_unrelated_is_zero_and_equal_is_one() -> None:
    a, b = sketch(random_tokens(0)), sketch(random_tokens(1))
    assert overlap(a, b) == 0
    assert overlap(a, a) == 1
    refuse_overlap("a", a, "b", b)


def test_overlap_when_windows_are_shifted_is_found() -> None:
    stream = random_tokens(0).flatten()
    shifted = stream[7:-249].view(-1, 256)
    with pytest.raises(OverlapError, match=r"evaluation.*calibration"):
        refuse_overlap("evaluation", sketch(shifted), "calibration", sketch(stream.view(-1, 256)))


def test_overlap_when_part_is_shared_estimates_its_share() -> None:
    a, b = random_tokens(0, 400), random_tokens(1, 400)
    b[:100] = a[:100]
    assert overlap(sketch(b), sketch(a)) == pytest.approx(0.25, abs=0.04)


def test_overlap_when_one_set_is_tiny_is_found_from_either_side() -> None:
    large = random_tokens(0, 400)
    small = sketch(large[17:18])
    assert small.modulus == 1
    with pytest.raises(OverlapError):
        refuse_overlap("small", small, "large", sketch(large))
    with pytest.raises(OverlapError):
        refuse_overlap("large", sketch(large), "small", small)


def test_ngrams_when_hashed_stay_within_windows() -> None:
    tokens = random_tokens(0, 2, 64)
    hashes = ngram_hashes(tokens, 32)
    assert hashes.shape == (2, 33)
    assert np.array_equal(hashes[1:], ngram_hashes(tokens[1:], 32))
    assert ngram_hashes(tokens, 65).shape == (2, 0)


def test_sketch_when_short_windows_use_shorter_ngrams_and_comparison_needs_equal_ones() -> None:
    short = sketch(random_tokens(0, 4, 16))
    assert short.ngram == 15
    with pytest.raises(DataError, match="15-grams and 32-grams"):
        overlap(short, sketch(random_tokens(0)))
    assert overlap(sketch(random_tokens(0), ngram=15), sketch(random_tokens(0), ngram=15)) == 1


def test_sketch_when_large_raises_the_modulus_and_stays_comparable() -> None:
    tokens = random_tokens(0, 2000)
    large = sketch(tokens)
    assert large.modulus > 16
    assert large.hashes.size <= 20_000
    assert overlap(sketch(tokens[:100]), large) == 1


def test_json_when_round_tripped_is_equal() -> None:
    value = sketch(random_tokens(0))
    back = sketch_from_json(json.loads(json.dumps(to_json(value))))
    assert np.array_equal(back.hashes, value.hashes)
    assert (back.ngram, back.modulus) == (value.ngram, value.modulus)
    assert overlap(Sketch(np.empty(0, dtype=np.uint64)), value) == 0


@pytest.mark.parametrize("change", [{"hashes": "!"}, {"hashes": "AAAA"}, {"ngram": 0}, {"modulus": None}])
def test_json_when_malformed_raises(change: dict[str, object]) -> None:
    with pytest.raises(DataError, match="sketch"):
        sketch_from_json(to_json(sketch(random_tokens(0))) | change)
    with pytest.raises(DataError, match="sketch"):
        sketch_from_json({})
