"""Plans of the prefill GEMM: every block of work once, nobody waits for somebody who cannot come."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergequant.ops.cuda.prefill_plan import CLOCK, MULTIPLIES, Plan, choose, configurations, seconds

SMS = 132
SHAPES = [
    (1, 64, 128),
    (129, 200, 1040),
    (300, 4096, 4096),
    (512, 12288, 4096),
    (2049, 4096, 11008),
    (777, 22016, 4096),
]


def pieces(plan: Plan, program: int, tiles: int, blocks: int) -> Iterator[tuple[int, int, int]]:
    """`Schedule` of gemm_prefill.cu in Python: (tile, first, last) in the order of one program."""
    yield from ((tile, 0, blocks) for tile in range(program, plan.whole, plan.grid))
    own = plan.grid - 1 - program
    cursor, end = (begin(plan, tiles, blocks, of) for of in (own, own + 1))
    while cursor < end:
        first = cursor % blocks
        last = min(blocks, first + end - cursor)
        yield plan.whole + cursor // blocks, first, last
        cursor += last - first


def begin(plan: Plan, tiles: int, blocks: int, of: int) -> int:
    return (tiles - plan.whole) * blocks * of // plan.grid


@pytest.mark.parametrize(("tokens", "channels", "width"), SHAPES)
@pytest.mark.parametrize("sms", [SMS, 7])
def test_schedule_when_tiles_are_divided_expect_every_block_once_and_no_deadlock(tokens, channels, width, sms) -> None:
    plans = configurations(tokens, channels, width, sms)
    assert plans
    for plan in plans:
        tiles, blocks = -(-tokens // plan.tokens) * -(-channels // plan.channels), -(-width // 128)
        assert plan.grid <= sms
        seen: set[tuple[int, int]] = set()
        contributed: dict[int, int] = {}  # range: the program that has raised its flag
        waited: list[tuple[int, int]] = []  # program, range that it waits for
        for program in range(plan.grid):
            own = plan.grid - 1 - program
            steps = list(pieces(plan, program, tiles, blocks))
            assert steps, f"{plan}: program {program} has nothing to do"
            for tile, first, last in steps:
                fresh = {(tile, block) for block in range(first, last)}
                assert fresh
                assert not fresh & seen
                seen |= fresh
                if first > 0:
                    assert own not in contributed
                    assert all(by != program for by, _ in waited), "contribute, then wait"
                    contributed[own] = program
                elif last < blocks:
                    end = (tile - plan.whole + 1) * blocks
                    others = range(own + 1, plan.grid)
                    waited += [(program, of) for of in others if begin(plan, tiles, blocks, of) < end]
        assert len(seen) == tiles * blocks
        assert sorted(of for _, of in waited) == sorted(contributed), f"{plan}: flags raised and taken differ"
        assert all(contributed[of] < program for program, of in waited), "whoever is waited for has started earlier"


@pytest.mark.parametrize("weight_bits", [4, 8])
def test_choose_when_tiles_leave_a_poor_last_round_expect_it_divided(weight_bits) -> None:
    plan = choose(512, 22016, 4096, SMS, weight_bits)
    tiles = -(-512 // plan.tokens) * -(-22016 // plan.channels)
    assert plan.whole < tiles
    even = choose(1024, 4096, 4096, SMS, weight_bits)
    assert even.whole == -(-1024 // even.tokens) * -(-4096 // even.channels)


MEASURED = json.loads((Path(__file__).parent / "prefill_h200.json").read_text())["rows"]


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row['layer']}-{row['tokens']}")
def test_choose_when_all_plans_were_measured_expect_hardly_slower_than_the_best(row) -> None:
    chosen = choose(row["tokens"], row["channels"], row["width"], SMS, 4)
    times = row["us"]
    assert str(chosen) in times, f"{chosen} took over 10 % longer than {min(times, key=times.get)}"
    assert times[str(chosen)] <= 1.04 * min(times.values())


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row['layer']}-{row['tokens']}")
def test_seconds_when_the_best_plan_was_measured_expect_its_time(row) -> None:
    problem = row["tokens"], row["channels"], row["width"]
    plans = {str(plan): plan for plan in configurations(*problem, SMS)}
    best = min(row["us"], key=row["us"].get)
    assert seconds(plans[best], *problem, 4, SMS) == pytest.approx(row["us"][best] * 1e-6, rel=0.07)


@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("sms", [78, 114, SMS, 144])
@pytest.mark.parametrize(("channels", "width"), [(6144, 4096), (4096, 14336), (10240, 8192), (57344, 8192)])
def test_choose_when_shapes_and_chips_were_not_measured_expect_most_of_the_rate(
    channels, width, sms, weight_bits
) -> None:
    tokens = 4096
    plan = choose(tokens, channels, width, sms, weight_bits)
    assert plan.tokens * plan.channels >= 192 * 128
    fastest = tokens * channels * width / (sms * MULTIPLIES * CLOCK)
    assert fastest < seconds(plan, tokens, channels, width, weight_bits, sms) < 1.25 * fastest
