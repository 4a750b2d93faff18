import io
import json

from rich.console import Console

from mergequant.bench import BenchReport, Ceilings, Rate, Row

CEILINGS = Ceilings(4.5567, {8: 2.3, 45: 3.83}, 1.04, {"int8": Rate(1940.04, 1850), "bf16": Rate(740, 660)})
ROWS = [
    Row("decode", "bf16", 16, 2048, 16, ms=8.0123456, gb=30.1, gb_s=3800.0, vs_bf16=1.0, vs_fp8=0.92, spread=0.001,
        percent_of_ceiling=83.2, kernels=("torch.mm", "triton add_norm")),
    Row("decode", "w4a8", 16, 2048, 4, ms=2.6, vs_bf16=3.08, kernels=("tiled_linear (cuda)",)),
    Row("prefill", "w4a8", 1, 2048, 4, ms=20.9, tops=1270.0),
    Row("e2e", "w4a8", 16, 1024, 4, ms=900.0, new_tokens=256),
    Row("gemm", "w4a8", 2048, ms=0.24, tops=1600.0, what="gate_up", mode="sustained"),
    Row("memory", "w4a8", gb=3.82, vs_bf16=3.5, what="weights"),
    Row("memory", "w4a8", 16, 2048, 4, gb=8.8, vs_bf16=3.5, what="peak"),
]  # fmt: skip


def _report() -> BenchReport:
    device = {"name": "NVIDIA H200", "type": "cuda", "clocks": {"before": None, "after": None}}
    return BenchReport(
        device, {"torch": "2.11"}, {"name": "llama-2-7b"}, CEILINGS, list(ROWS), ["a note"], "mergequant bench"
    )


def test_document_has_the_promised_keys_and_is_json() -> None:
    found = json.loads(json.dumps(_report().to_dict(), allow_nan=False))
    assert {"device", "versions", "shape", "ceilings", "rows"} <= set(found)
    promised = {"phase", "batch", "context", "scheme", "kv", "ms", "gb", "tops", "vs_bf16", "vs_fp8"}
    for row in found["rows"]:
        assert promised | {"percent_of_ceiling", "kernels"} <= set(row)
    assert found["rows"][0]["ms"] == 8.012
    assert found["rows"][2]["kv"] == 4
    assert found["rows"][2]["gb"] is None
    assert found["ceilings"]["read_tb_s"] == 4.557
    assert found["ceilings"]["int8_sustained_tops"] == 1850


def test_rows_come_back_from_json() -> None:
    for row in ROWS:
        again = Row.from_dict(json.loads(json.dumps(row.to_dict())))
        assert again.to_dict() == row.to_dict()
        assert again.kernels == row.kernels


def test_tables_show_every_phase_within_the_width() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=110, highlight=False)
    for table in _report().tables():
        console.print(table)
    text = stream.getvalue()
    for words in ("3.08x", "83%", "w4a8 kv4", "16 x 1024 + 256", "1,600", "sustained", "4.56", "weights"):
        assert words in text
    assert "…" not in text


def test_report_of_a_cpu_has_no_ceilings() -> None:
    report = _report()
    report.ceilings = None
    assert report.to_dict()["ceilings"] is None
    assert len(report.tables()) == 5
