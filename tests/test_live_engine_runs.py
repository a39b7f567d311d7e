"""The commands that serve: the files they leave are what ``apexsim validate`` reads, and faults are one line."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from apexsim import catalog
from apexsim.serving.job import Job
from apexsim.serving.kv_cache import BlockManager
from apexsim.serving.request import Request
from apexsim.specs.workload import Requests
from apexsim.validation.replay import run_rows
from apexsim.validation.runs import read_runs

torch = pytest.importorskip("torch")

from kernels_profiling import second_engine  # noqa: E402
from kernels_profiling.commands import main  # noqa: E402
from kernels_profiling.engine import EngineSettings, LiveEngine  # noqa: E402
from kernels_profiling.paged_cache import BlockTables  # noqa: E402
from kernels_profiling.records import COLUMNS  # noqa: E402
from kernels_profiling.runner import graph_sizes, graph_widths  # noqa: E402
from kernels_profiling.swiftkv import flops_saved  # noqa: E402
from kernels_profiling.traffic import Traffic  # noqa: E402

MODEL = """
name: mini
source: test
layers: 2
hidden: 64
heads: 4
kv_heads: 2
head_dim: 16
ffn: 96
vocab: 101
max_context: 512
"""
REQUESTS = "arrival_s,prompt_tokens,output_tokens\n0.0,20,6\n0.01,35,4\n0.02,9,8\n"


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Path]:
    """A folder with a model, a load and a device profile."""
    (tmp_path / "mini.yaml").write_text(MODEL)
    (tmp_path / "load.csv").write_text(REQUESTS)
    shutil.copy(catalog.data_root() / "device_profiles" / "h100-sxm.yaml", tmp_path / "mine.yaml")
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def asked(here: Path, *more: str, command: str = "live") -> list[str]:
    given = {"--model": here / "mini.yaml", "--workload": here / "load.csv", "--out": here / "measured"}
    flags = [str(part) for flag in given.items() for part in flag]
    return [command, *flags, "--device", "cpu", "--profile", str(here / "mine.yaml"), *more]


def test_runs_are_rows_that_validate_reads_and_predicts(here: Path) -> None:
    assert main(asked(here, "--max-num-seqs", "4", "--kv-blocks", "40")) == 0
    assert main(asked(here, "--concurrency", "2", "--dtype", "bf16")) == 0
    folder = here / "measured"
    runs = read_runs(folder / "runs.csv")
    assert [run.row.workload for run in runs] == ["trace", "closed_loop"]
    assert [run.row.engine for run in runs] == ["reference", "reference"]
    assert runs[0].row.model == str((folder / "mini.yaml").resolve())
    assert runs[0].cells["device"] == "../mine.yaml"
    assert (runs[0].row.max_num_seqs, runs[0].row.kv_blocks) == (4, 40)
    for run in runs:
        served = pd.read_csv(folder / f"{run.row.run_id}.csv")
        assert served["output_tokens"].tolist() == [6, 4, 8]
        assert run.row.ttft_mean_s == pytest.approx((served["first_token_s"] - served["arrival_s"]).mean(), rel=1e-6)
        assert run.row.e2e_mean_s == pytest.approx(served["e2e_s"].mean(), rel=1e-6)
        steps = pd.read_csv(folder / f"{run.row.run_id}.steps.csv")
        assert steps["chunk_tokens"].sum() == served["prompt_tokens"].sum()
    table = run_rows(runs, jobs=1)
    assert table["status"].tolist() == ["ok", "ok"]
    assert (table["predicted_tpot_mean_s"] > 0).all()
    assert table["predicted_request_e2e_error_percent"].notna().all()


def test_a_run_without_sense_leaves_nothing_behind(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(asked(here, "--kv-blocks", "2")) == 2
    assert (
        "load: 1 of 3 requests cannot be served; request 2: 39 tokens need more than the 2" in capsys.readouterr().err
    )
    assert not list((here / "measured").iterdir())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--device", "tpu"], "--device: got 'tpu'; use cuda or cpu"),
        (["--dtype", "fp8"], "--dtype: got 'fp8'"),
        (["--engine", "vllm"], "the live engine works without lookahead_steps, prefix_caching"),
        (["--profile", "h100"], "--profile: got 'h100'; unknown device"),
        (["--swiftkv-layers", "3"], "--swiftkv-layers: got 3; give 1 to 2, the layers of mini"),
        (["--model", "qwen2.5-7b"], "qwen2.5-7b: the live engine has no biases"),
        (["--threads", "999999999"], "--threads: got 999999999; give 1 to "),
        (["--model", "llama-3.1-405b"], "--model: got 'llama-3.1-405b'; its weights take 8.12e+11 bytes and a KV"),
        (["--kv-blocks", "1000000000000000"], "a KV cache of 16000000000000000 tokens"),
        (["--max-num-seqs", "1000000000"], "'--max-num-seqs': Input should be less than or equal to 65536"),
        (["--max-num-batched-tokens", "1000000000000"], "'--max-num-batched-tokens': Input should be less than"),
    ],
)
def test_faults_are_one_line(here: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str) -> None:
    assert main(asked(here, *flags)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_heads_of_odd_width_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "mini.yaml").write_text(MODEL.replace("head_dim: 16", "head_dim: 15"))
    assert main(asked(here)) == 2
    assert "mini: the live engine has no odd heads: head_dim 15" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_one_line_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(asked(here, "--device", "cuda")) == 2
    assert "--device: got 'cuda'; torch finds no CUDA device" in capsys.readouterr().err


def test_rows_are_not_added_to_somebody_elses_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "measured").mkdir()
    (here / "measured" / "runs.csv").write_text("run_id,engine\nr,vllm\n")
    assert main(asked(here)) == 2
    assert "its columns are not those that are written here" in capsys.readouterr().err
    assert (here / "measured" / "runs.csv").read_text() == "run_id,engine\nr,vllm\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read as CSV"),
        (b"\xff\xfe", "cannot be read as CSV"),
        (",".join(COLUMNS).encode() + b"\n1,2\n", "runs.csv: row 1: got '2 cells'; a row has 47 cells"),
    ],
)
def test_a_broken_file_of_runs_is_told_and_kept(
    here: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, said: str
) -> None:
    runs = here / "measured" / "runs.csv"
    runs.parent.mkdir()
    runs.mkdir() if content is None else runs.write_bytes(content)
    assert main(asked(here)) == 2
    assert said in capsys.readouterr().err
    assert list(runs.parent.iterdir()) == [runs]
    assert content is None or runs.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "said"),
    [("requests", "cannot be made a folder: File exists"), ("mini.yaml", "mini.yaml is another model of that name")],
)
def test_what_is_in_the_way_is_told_before_serving(
    here: Path, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    (here / "measured").mkdir()
    (here / "measured" / name).write_text("another")
    assert main(asked(here)) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in (here / "measured").iterdir()] == [name]


def test_swiftkv_runs_are_kept_out_of_scores(here: Path) -> None:
    assert main(asked(here, "--swiftkv-layers", "1")) == 0
    (run,) = read_runs(here / "measured" / "runs.csv")
    assert run.row.exclude == "SwiftKV behind layer 1"


def test_swiftkv_command_prints_time_beside_flops(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = here / "saved.csv"
    flags = ["--device", "cpu", "--swiftkv-layers", "1", "--prompt-tokens", "32", "--out", str(out)]
    assert main(["swiftkv", "--model", str(here / "mini.yaml"), *flags]) == 0
    assert "mini: prompts through 1 of 2 layers" in capsys.readouterr().out
    (row,) = pd.read_csv(out).to_dict("records")
    assert row["flops_saved"] == pytest.approx(flops_saved(catalog.load("model", here / "mini.yaml"), 1, 32))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prompt-tokens", "513"], "--prompt-tokens: got 513; give at most 512, the context of mini"),
        (["--out", "nowhere/saved.csv"], "--out: got 'nowhere/saved.csv'; its folder does not exist"),
    ],
)
def test_faults_of_swiftkv_come_before_any_timing(
    here: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert main(["swiftkv", "--model", str(here / "mini.yaml"), "--device", "cpu", *flags]) == 2
    assert said in capsys.readouterr().err


def test_swiftkv_of_a_small_model_has_a_prompt_and_a_layer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "mini.yaml").write_text(MODEL.replace("layers: 2", "layers: 1").replace("512", "64"))
    assert main(["swiftkv", "--model", str(here / "mini.yaml"), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "mini: prompts through 1 of 1 layers" in said
    assert "\n64 " in said.replace("\n           ", "\n")


def test_flops_saved_by_hand(here: Path) -> None:
    model = catalog.load("model", here / "mini.yaml")
    block = 2 * (64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 96)
    whole = 2 * (3 * block + 4 * 64 * (1 + 2 + 3)) + 2 * 101 * 64
    # Two of three tokens skip all of the second layer but its keys and values.
    left_out = 2 * (block - 2 * 64 * (32 + 32)) + 4 * 64 * (1 + 2)
    assert flops_saved(model, 1, 3) == pytest.approx(left_out / whole)


def test_second_engine_says_how_to_get_it(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else found(name))
    assert main(asked(here, command="second-engine")) == 2
    assert "transformers is not installed; install it with: pip install 'apexsim[second-engine]'" in (
        capsys.readouterr().err
    )


@pytest.mark.filterwarnings("ignore")
def test_second_engine_serves_the_same_load(here: Path) -> None:
    pytest.importorskip("transformers", minversion="5.17")
    assert main(asked(here, command="second-engine")) == 0
    assert main(asked(here, "--concurrency", "2", command="second-engine")) == 0
    rows = read_runs(here / "measured" / "runs.csv")
    assert [run.row.engine for run in rows] == ["transformers"] * 2
    assert [run.row.num_requests for run in rows] == [3, 3]


class Answer:
    """An answer of the second engine, as far as it is looked at."""

    def __init__(self, request_id: str, timestamps: list[float], error: str | None = None) -> None:
        self.request_id, self.timestamps, self.error = request_id, timestamps, error
        self.lifespan = (10.0, -1.0)


def test_stamps_of_the_second_engine_become_columns() -> None:
    load = Requests(name="two", prompt_tokens=np.array([3, 3]), output_tokens=np.array([2, 3]), arrival_s=np.zeros(2))
    answers: list[Any] = [Answer("0", [10.5, 10.75]), Answer("1", [10.5, 10.75, 11.5])]
    served = second_engine._served(load, Traffic(load).requests, answers, 10.0)
    assert served.requests["first_token_s"].tolist() == [0.5, 0.5]
    assert served.requests["last_token_s"].tolist() == [0.75, 1.5]
    assert [part.tolist() for part in served.gaps] == [[250_000_000, 750_000_000], [2, 1]]


def test_padding_a_decode_batch_changes_no_token() -> None:
    """What CUDA graphs replay, without the graph: a batch filled up with sequences of nobody."""
    limits = catalog.load("engine", "reference").scheduler.model_copy(update={"max_num_seqs": 8, "block_size": 4})
    model = catalog.load("model", "llama-3.2-1b").model_copy(
        update={"layers": 2, "hidden": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn": 32, "vocab": 67}
    )
    engine = LiveEngine(EngineSettings(model=model, scheduler=limits, kv_blocks=30, longest=32))
    runner, jobs = engine.runner, [Job(Request(index, 6 + index, 4)) for index in range(3)]
    runner.known = [np.arange(job.total) + job.index for job in jobs]
    for job in jobs:
        engine._scheduler.blocks.grow(job, job.prompt_tokens)
        engine._tables.grow(job)
        job.compute(job.prompt_tokens)
    runner.run([], [(job, job.prompt_tokens) for job in jobs])
    plain = runner.run(jobs, [])
    runner._fill_decodes(jobs)
    runner._pad(3, 8)
    padded = engine.model.forward(runner._packed(8, 8, 6, ())).tolist()
    assert padded[:3] == plain


def test_graphs_cover_all_batches_and_widths() -> None:
    assert graph_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert graph_sizes(1) == [1]
    assert graph_widths(100) == [16, 32, 64, 100]
    assert graph_widths(3) == [3]


def test_block_ids_follow_the_block_managers_count() -> None:
    manager = BlockManager(6, 4, lambda tokens: -(-tokens // 4))
    tables = BlockTables(manager, seats=2, width=4)
    one, two = Job(Request(0, 8, 2)), Job(Request(1, 9, 2))
    for job, tokens in ((one, 8), (two, 9), (one, 9)):
        manager.grow(job, tokens)
        tables.grow(job)
        tables.check()
    held = [set(tables.rows[tables.row(job), : job.blocks].tolist()) for job in (one, two)]
    assert held[0].isdisjoint(held[1])
    assert held[0] | held[1] == set(range(6))
    manager.release(one)
    with pytest.raises(AssertionError, match="0 block ids are free, the block manager counts 3"):
        tables.check()
    tables.release(one)
    tables.check()


def test_closed_loop_clients_send_after_their_answers() -> None:
    load = Requests(
        name="five", prompt_tokens=np.full(5, 3), output_tokens=np.full(5, 2), concurrency=2, turnaround_s=1e-6
    )
    traffic = Traffic(load)
    first = traffic.arrived(0)
    assert [request.index for request in first] == [0, 1]
    traffic.answered(first[:1], 50)
    assert traffic.arrived(1049) == []
    assert [request.index for request in traffic.arrived(1050)] == [2]
    waves = Traffic(load.closed_loop(2, waves=True))
    first = waves.arrived(0)
    waves.answered(first[:1], 50)
    assert waves.next_ns is None
    waves.answered(first[1:], 60)
    assert [request.index for request in waves.arrived(61)] == [2, 3]
