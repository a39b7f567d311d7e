"""Measuring on a CPU, small and quick: cases of every operator, resuming, failed and unsupported rows, and the fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

torch = pytest.importorskip("torch", reason="needs the extra apexsim[profiling]")

from apexsim import catalog  # noqa: E402
from apexsim.costs.fitted import AttentionShape, OperatorCosts  # noqa: E402
from apexsim.costs.forms import gemm  # noqa: E402
from apexsim.costs.forms.hardware import Hardware  # noqa: E402
from apexsim.errors import BadInput  # noqa: E402
from apexsim.fitting.few import few_knots  # noqa: E402
from apexsim.fitting.own import OwnTables  # noqa: E402
from apexsim.fitting.pipeline import fit_measured  # noqa: E402
from kernels_profiling import attention, collectives, commands, kernels, points, session  # noqa: E402
from kernels_profiling.measure import TINY  # noqa: E402
from kernels_profiling.operators import CASES  # noqa: E402
from kernels_profiling.rig import BLOCK_SIZE, Rig  # noqa: E402
from kernels_profiling.tables import SIZES, Tables  # noqa: E402
from kernels_profiling.timers import time_case  # noqa: E402

CPU = torch.device("cpu")
EXPERTS = {"tokens": 8, "hidden": 64, "inter": 32, "topk": 2, "experts": 4, "tp": 1, "ep": 1, "dtype": "bf16"}
HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 16, "kv_dtype": "bf16", "window_size": 0}
# One small point of every table that has cases.
SMALL: dict[str, dict[str, Any]] = {
    "gemm": {"m": 4, "n": 64, "k": 32, "dtype": "bf16"},
    "prefill_attention": {"batch": 1, "q_len": 8, "kv_len": 24} | HEADS,
    "decode_attention": {"batch": 3, "q_len": 1, "kv_len": 20} | HEADS,
    "mixed_attention": {"chunk": 8, "history": 16, "decodes": 2, "keys": 20} | HEADS,
    "sampling": {"sequences": 2, "vocab": 100, "method": "top_p"},
    "moe": EXPERTS | {"routing": "power_law_1.2"},
    "memory_copy": {"bytes": 4096},
}


@pytest.fixture
def rig() -> Rig:
    """A CPU with a last cache of 64 KiB, so that pools are small."""
    torch.set_num_threads(1)
    return Rig(CPU, 1 << 16, None)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_cases_run_on_buffers_that_take_turns(name: str, rig: Rig) -> None:
    case = CASES[name](SMALL[name], rig)
    if name in ("gemm", "decode_attention", "prefill_attention", "memory_copy"):
        assert case.buffers > 1
        assert case.rotated_bytes > rig.cache_bytes
    timing = time_case(case, rig, 0.0)
    assert 0 < timing.latency_p10_s <= timing.latency_s <= timing.latency_p90_s
    assert timing.repeats >= 5


@pytest.mark.parametrize("kind", ["norm", "qk_norm", "rope", "activation", "embedding"])
def test_elementwise_cases_run(kind: str, rig: Rig) -> None:
    model = catalog.load("model", TINY).model_copy(update={"qk_norm": "head"})
    (point,) = [each for each in points.Rank(model, 1).elementwise(3) if each["kind"] == kind]
    assert CASES["elementwise"](point, rig).call(0) is not None


def test_turns_of_a_cache_share_no_block(rig: Rig) -> None:
    cache = rig.cache(2, 16, [40, 20])
    used = cache.tables.flatten().tolist()
    assert len(set(used)) == len(used)
    assert cache.slots(cache.tables[0, 0], BLOCK_SIZE, 1).item() == cache.tables[0, 0, 1].item() * BLOCK_SIZE


def test_paged_attention_is_attention(rig: Rig) -> None:
    """Chunks behind a history and decodes of unequal lengths, against softmax(q k) v written out."""
    lengths = [37, 12]
    cache = rig.cache(2, 16, lengths)
    tables = cache.tables[0]
    q = torch.randn(2, 4, 16).bfloat16()
    out = attention.decode_attention(q, cache.k, cache.v, tables, torch.tensor(lengths, dtype=torch.int32))
    chunk = torch.randn(5, 4, 16).bfloat16()
    prefilled = attention.prefill_attention(chunk, cache.k, cache.v, tables[0], 32)
    for at, length in enumerate(lengths):
        assert torch.allclose(out[at].float(), _plain(q[at : at + 1], cache, tables[at], length)[0], atol=2e-2)
    for at in range(5):
        row = _plain(chunk[at : at + 1], cache, tables[0], 33 + at)[0]
        assert torch.allclose(prefilled[at].float(), row, atol=2e-2)


def _plain(q: Any, cache: Any, table: Any, length: int) -> Any:
    slots = cache.slots(table, 0, length)
    k, v = (x.reshape(-1, *x.shape[2:])[slots].float().repeat_interleave(2, dim=1) for x in (cache.k, cache.v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) / 4
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def test_routed_experts_are_the_sum_of_those_chosen() -> None:
    x, logits = torch.randn(5, 16), torch.randn(5, 4)
    gate_up, down = torch.randn(4, 24, 16), torch.randn(4, 16, 12)
    weight, chosen = logits.topk(2, dim=-1)
    each = torch.stack([kernels.silu_mul(x @ gate_up[e].t()) @ down[e].t() for e in range(4)], dim=1)
    wanted = (each.gather(1, chosen[..., None].expand(-1, -1, 16)) * weight.softmax(-1)[..., None]).sum(1)
    assert torch.allclose(kernels.moe(x, logits, gate_up, down, 2), wanted, atol=1e-3)


def test_top_p_draws_likely_tokens_only() -> None:
    logits = torch.tensor([[5.0, 0.0, -5.0, 4.0]]).repeat(64, 1)
    assert set(kernels.sample_top_p(logits, 0.9).tolist()) <= {0, 3}


def test_points_of_every_table_fit_the_schema() -> None:
    """Also those that only a GPU measures."""
    models = [catalog.load("model", name) for name in ("llama-3.1-8b", "qwen3-30b-a3b")]
    for scale in (points.QUICK, points.CPU, points.CUDA):
        found = points.all_points(scale, points.ranks(models, (1, 2, 4, 8)), 2)
        assert {name for name, _ in found} == set(SIZES) - ({"sustained"} if scale is points.QUICK else set())
        assert all(set(point) == {*SIZES[name], "round"} for name, point in found)
        assert found == points.all_points(scale, points.ranks(models, (1, 2, 4, 8)), 2)


def _few(count: int) -> list[tuple[str, dict[str, Any]]]:
    return [("gemm", {"m": m, "n": 64, "k": 32, "dtype": "bf16", "round": 0}) for m in range(1, count + 1)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that knows its device: peaks need no measuring there."""
    monkeypatch.setattr("kernels_profiling.machine.PEAK_S", 0.01)
    return tmp_path


def test_a_killed_run_goes_on_where_it_stopped(folder: Path, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def killed(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return time_case(*given)

    monkeypatch.setattr(session, "time_case", killed)
    with pytest.raises(KeyboardInterrupt):
        session.Session(Tables(folder), rig, 0.0).run(_few(6), lambda _: None, None)
    first = Tables(folder).read("gemm")
    assert first is not None
    assert len(first) == 3
    session.Session(Tables(folder), rig, 0.0).run(_few(6), lambda _: None, None)
    frame = pd.read_parquet(folder / "gemm.parquet")
    assert len(frame) == 6
    assert len(calls) == 7
    assert (frame["status"] == "ok").all()


def test_a_budget_leaves_points_for_the_next_run(folder: Path, rig: Rig) -> None:
    assert session.Session(Tables(folder), rig, 0.0).run(_few(3), lambda _: None, 0.0) == 3
    assert session.Session(Tables(folder), rig, 0.0).run(_few(3), lambda _: None, None) == 0


def test_rows_say_what_failed_and_what_is_unsupported(folder: Path, rig: Rig) -> None:
    broken = ("decode_attention", SMALL["decode_attention"] | {"heads": 3, "round": 0})
    fp8 = ("gemm", SMALL["gemm"] | {"dtype": "fp8", "round": 0})
    graph = ("launch", {"kernels": 1, "mode": "graph", "round": 0})
    session.Session(Tables(folder), rig, 0.0).run([broken, fp8, graph, *_few(1)], lambda _: None, None)
    rows = {name: pd.read_parquet(folder / f"{name}.parquet") for name in ("decode_attention", "gemm", "launch")}
    assert rows["decode_attention"].loc[0, "status"] == "failed"
    assert rows["decode_attention"].loc[0, "error"]
    assert sorted(rows["gemm"]["status"]) == ["ok", "unsupported"]
    assert "CUDA" in rows["launch"].loc[0, "error"]


def test_tables_of_another_device_are_refused(folder: Path, rig: Rig) -> None:
    session.Session(Tables(folder), rig, 0.0)
    path = folder / "device.yaml"
    path.write_text(path.read_text().replace("threads: 1", "threads: 77"))
    with pytest.raises(BadInput, match=r"device.yaml.*77 threads"):
        session.Session(Tables(folder), rig, 0.0)


def test_without_a_gpu_one_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert commands.main(["measure", "--device", "cuda", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--device" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--only", ""], "--only: got ''"),
        (["--tensor", "0"], "'--tensor': Input should be greater than or equal to 1"),
        (["--tensor", "-1"], "'--tensor': Input should be greater than or equal to 1"),
        (["--held-s", "inf"], "'--held-s': Input should be less than or equal to 3600"),
        (["--threads", "999999999"], "--threads: got 999999999; give 1 to "),
        (["--model", "deepseek-v3"], "deepseek-v3: latent attention cannot be measured"),
        (["--model", "qwen3-next-80b-a3b"], "qwen3-next-80b-a3b: recurrent layers cannot be measured"),
    ],
)
def test_what_cannot_be_measured_is_told_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert commands.main(["measure", "--device", "cpu", "--out", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_two_ranks_meet_over_gloo() -> None:
    wanted = [{"collective": name, "num_gpus": 2, "bytes": 4096} for name in ("all_reduce", "send_recv")]
    found = collectives.measured(wanted, CPU)
    assert [row["status"] for row in found] == ["ok", "ok"]
    assert all(row["latency_s"] > 0 for row in found)


def test_knots_are_few_for_few_rows() -> None:
    usual = {"n": (1.0, 2.0, 3.0), "m": (1.0, 2.0, 4.0, 8.0)}
    n, m = (x.ravel() for x in np.meshgrid([64.0, 128.0], [1.0, 2.0, 3.0, 4.0, 8.0]))
    knots = few_knots(usual, [n, m], len(n))
    assert knots["n"] == (64.0, 128.0)
    assert len(knots["m"]) == 2
    assert few_knots(usual, [n, np.ones(len(n))], len(n))["m"] == (1.0,)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables as one thread of an EPYC gave them, made of three rates: what a fit must find again."""
    folder = tmp_path_factory.mktemp("recorded")
    tables = Tables(folder)
    of = points.ranks([catalog.load("model", TINY)], (1,))
    for name, point in points.all_points(points.QUICK, of, 1):
        seconds = _seconds(name, point)
        about = {"status": "ok", "kernel_source": "made up", "table_version": "1", "latency_p10_s": seconds}
        about |= {"latency_mean_s": seconds}
        tables.add(name, {**point, **about, "latency_s": seconds})
    tables.add("gemm", {**SMALL["gemm"], "round": 0, "status": "failed", "error": "out of memory"})
    tables.merge()
    (folder / "device.yaml").write_text(DEVICE, encoding="utf-8")
    return folder


def _seconds(name: str, point: dict[str, Any]) -> float:
    """A launch, bytes at 10 GB/s and FLOPs at 200 GFLOP/s, one after the other."""
    if name == "gemm":
        return 1e-5 + 2 * point["n"] * point["k"] / 1e10 + 2 * point["m"] * point["n"] * point["k"] / 2e11
    if name.endswith("attention") and "kv_len" in point:
        keys, width = point["batch"] * point["kv_len"], point["kv_heads"] * point["head_dim"]
        pairs = point["q_len"] * point["heads"] * point["head_dim"] * keys
        return 5e-5 + 12 * keys * width / 1e10 + 4 * pairs / 5e10
    if name == "elementwise":
        return 1e-5 + point["bytes"] / 1e10
    return 1e-5 + 3e-8 * point.get("sequences", 1) * point.get("vocab", 1)


DEVICE = """
device: a CPU
kind: cpu
threads: 1
datasheet:
  memory_bytes: 16000000000
  memory_bytes_per_s: 1.2e10
  flops_per_s: {bf16: 2.2e11}
  l2_bytes: 33554432
  sms: 1
  tdp_w: 10
  intra_node_bytes_per_s: 1e10
  inter_node_bytes_per_s: 1e9
  pcie_bytes_per_s: 1e10
  nccl_bytes: {1: 0}
  source: made up
price: {usd_per_hour: 0.04, source: made up, date: '2026-01-01'}
driver: Linux
library: torch
date: '2026-01-01'
"""


def test_a_fit_finds_again_what_tables_say(recorded: Path) -> None:
    profile = fit_measured("a-cpu", OwnTables(recorded))
    costs = OperatorCosts(profile)
    for m in (1, 8, 64):
        wanted = _seconds("gemm", {"m": m, "n": 4096, "k": 768})
        assert float(costs.gemm_s(m, 4096, 768, "bf16")) == pytest.approx(wanted, rel=0.08)
    shape = AttentionShape(12, 4, 64)
    sizes = {"batch": 8, "q_len": 1, "kv_len": 256, "heads": 12, "kv_heads": 4, "head_dim": 64}
    decoded = float(costs.decode_attention_s(8, np.array([256.0]), shape)[0])
    assert decoded == pytest.approx(_seconds("decode_attention", sizes), rel=0.15)
    assert profile.operators["gemm"]["bf16"].evidence == "fitted"
    assert all(op.rows_used > 0 for by_key in profile.operators.values() for op in by_key.values())


def test_one_launch_for_chunks_and_decodes_is_fitted_where_there_is_one(recorded: Path, tmp_path: Path) -> None:
    _copied(recorded, tmp_path)
    assert "mixed_attention" not in fit_measured("a-cpu", OwnTables(recorded)).operators
    frame = pd.read_parquet(tmp_path / "mixed_attention.parquet")
    frame.assign(kernel_source="FlashAttention-3, paged; one launch").to_parquet(tmp_path / "mixed_attention.parquet")
    found = fit_measured("a-gpu", OwnTables(tmp_path)).operators["mixed_attention"]["any"]
    assert found.rows_used == 8


def test_a_correction_of_mixed_batches_is_not_borrowed_where_they_were_measured(recorded: Path, tmp_path: Path) -> None:
    """The shipped one is a ratio to the shipped kernels, not to those measured here."""
    for path in recorded.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    sheet = tmp_path / "device.yaml"
    sheet.write_text(sheet.read_text().replace("kind: cpu", "kind: cuda\nprofile: l40s"))
    assert "mixed_attention" not in fit_measured("a-gpu", OwnTables(tmp_path)).operators
    (tmp_path / "mixed_attention.parquet").unlink()
    borrowed = fit_measured("a-gpu", OwnTables(tmp_path)).operators["mixed_attention"]
    assert {operator.evidence for operator in borrowed.values()} == {"estimated"}


def test_rows_beyond_the_roofline_are_dropped_and_counted(recorded: Path, tmp_path: Path) -> None:
    frame = pd.read_parquet(_copied(recorded, tmp_path) / "gemm.parquet")
    fast = frame["m"] == 256
    frame.loc[fast, ["latency_s", "latency_p10_s", "latency_mean_s"]] = 1e-6
    frame.to_parquet(tmp_path / "gemm.parquet")
    profile = fit_measured("a-cpu", OwnTables(tmp_path))
    assert sum(profile.operators["gemm"]["bf16"].rows_dropped.values()) == fast.sum() / points.QUICK.rounds


def test_the_command_fits_and_simulates(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from apexsim.cli.main import main

    out = tmp_path / "a-cpu.yaml"
    assert main(["fit", str(recorded), "--device", "a-cpu", "--out", str(out)]) == 0
    flags = ["--model", str(TINY), "--device", str(out), "--workload", "chat", "--requests", "3"]
    assert main(["simulate", *flags]) == 0
    assert main(["fit", str(recorded), "--device", "a-cpu"]) == 2
    assert "--out" in capsys.readouterr().err


def _copied(recorded: Path, target: Path) -> Path:
    for path in recorded.glob("*.*"):
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize(
    ("name", "column", "value", "said"),
    [
        ("gemm", "latency_s", np.inf, "gemm.parquet: latency_s: got inf; a measured row has a number above 0 there"),
        ("gemm", "latency_p10_s", 0.0, "gemm.parquet: latency_p10_s: got 0.0; a measured row"),
        ("gemm", "latency_s", np.nan, "gemm.parquet: latency_s: got 'nan'; row 0 is not a number"),
        ("gemm", "m", -4.0, "gemm.parquet: m: got -4.0; a measured row"),
        ("gemm", "dtype", "int3", "gemm.parquet: dtype: got 'int3'; did you mean"),
        ("decode_attention", "window_size", -1.0, "window_size: got -1.0; a measured row has a number of at least 0"),
        ("decode_attention", "kv_dtype", "zz", "decode_attention.parquet: kv_dtype: got 'zz'; known: bf16"),
        ("sampling", "vocab", 0.0, "sampling.parquet: vocab: got 0.0; a measured row"),
    ],
)
def test_a_fit_names_the_cell_that_cannot_be(
    recorded: Path, tmp_path: Path, name: str, column: str, value: Any, said: str
) -> None:
    path = _copied(recorded, tmp_path) / f"{name}.parquet"
    pd.read_parquet(path).assign(**{column: value}).to_parquet(path)
    with pytest.raises(BadInput) as caught:
        fit_measured("a-cpu", OwnTables(tmp_path))
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["gemm", "elementwise", "sampling"])
def test_two_rows_are_too_few(recorded: Path, tmp_path: Path, name: str) -> None:
    path = _copied(recorded, tmp_path) / f"{name}.parquet"
    frame = pd.read_parquet(path)
    frame[frame["method"] == "greedy" if name == "sampling" else frame["round"] >= 0].head(2).to_parquet(path)
    with pytest.raises(BadInput, match=rf"{name}.*: got 2; measure it again"):
        fit_measured("a-cpu", OwnTables(tmp_path))


def test_a_folder_without_tables_is_not_fitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from apexsim.cli.main import main

    out = tmp_path / "a-cpu.yaml"
    fit = ["fit", str(tmp_path), "--device", "a-cpu", "--out", str(out)]
    assert main(fit) == 2
    assert "TABLES: got" in (error := capsys.readouterr().err)
    assert "holds neither device.yaml, as own tables do, nor kernels/" in error
    (tmp_path / "device.yaml").write_text(DEVICE, encoding="utf-8")
    assert main(fit) == 2
    assert "no table here has a measured row" in capsys.readouterr().err
    (tmp_path / "device.yaml").write_text(f"{DEVICE}profile: h1000\n", encoding="utf-8")
    assert main(fit) == 2
    assert "device.yaml: profile: got 'h1000'; did you mean h100-sxm" in capsys.readouterr().err
    assert not out.exists()


def test_a_measuring_cut_short_is_not_fitted(recorded: Path, tmp_path: Path) -> None:
    (tmp_path / "device.yaml").write_text(DEVICE, encoding="utf-8")
    tables = Tables(tmp_path)
    tables.add("gemm", SMALL["gemm"] | {"round": 0})
    tables.flush()
    with pytest.raises(BadInput, match="run it again"):
        OwnTables(tmp_path)


def test_products_of_a_core_follow_no_tiles() -> None:
    plain = {"launch_s": 1e-5, "compute_efficiency": 0.9, "memory_efficiency": 0.9, "sharpness": 1.0, "throttle": 0.0}
    hw = Hardware(flops_per_s=2e11, bytes_per_s=2e10, l2_bytes=1 << 25, sms=1)
    rows = np.array([32.0, 48.0, 64.0])
    low, middle, high = gemm.gemm_s(gemm.shape(rows, 768, 768, "bf16"), plain | {gemm.UNTILED: 1.0}, hw)
    assert middle == pytest.approx((low + high) / 2)
