"""Request files: round trips, what is kept and dropped, every bad input with its line, and `resolve_workload`."""

from __future__ import annotations

import cProfile
import json
import math
import pickle
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import apexsim
from apexsim.errors import BadInput
from apexsim.io.request_files import open_requests, read_requests, write_requests
from apexsim.io.requests import resolve_workload
from apexsim.specs.laws import PoissonArrivals
from apexsim.specs.streamed import StreamedRequests
from apexsim.specs.workload import Requests

FORMATS = ("parquet", "csv", "jsonl")
GOOD = {"arrival_s": [0.0, 0.5, 2.0], "prompt_tokens": [10, 20, 30], "output_tokens": [1, 2, 3]}


def write(folder: Path, columns: dict[str, Any], form: str = "parquet") -> Path:
    """A file as a user's own tools write it."""
    path, frame = folder / f"load.{form}", pd.DataFrame(columns)
    if form == "parquet":
        frame.to_parquet(path)
    elif form == "csv":
        frame.to_csv(path, index=False)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in frame.to_dict("records")))
    return path


def text(folder: Path, content: str | bytes, form: str = "csv") -> Path:
    path = folder / f"load.{form}"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(BadInput) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    return line


# ---- reading and writing


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_is_read_as_it_is(tmp_path: Path, form: str) -> None:
    read = read_requests(write(tmp_path, GOOD, form))
    assert read.name == "load"
    assert read.arrival_s is not None
    assert {key: getattr(read, key).tolist() for key in GOOD} == GOOD
    assert (read.prompt_tokens.dtype, read.arrival_s.dtype) == (np.int64, np.float64)
    assert (read.notes, dict(read.extra)) == ((), {})


@st.composite
def requests(draw: st.DrawFn) -> Requests:
    count = draw(st.integers(1, 8))
    column = st.lists(st.integers(1, 10**6), min_size=count, max_size=count)
    arrival_s = sorted(draw(st.lists(st.floats(0, 1e6), min_size=count, max_size=count)))
    ids = st.lists(st.lists(st.integers(0, 99), max_size=3), min_size=count, max_size=count)
    prefixes = np.fromiter((np.array(each, dtype=np.int64) for each in draw(ids)), dtype=object, count=count)
    sessions = draw(st.lists(st.sampled_from(["a", "b", "c d"]), min_size=count, max_size=count))
    return Requests(
        name="x",
        arrival_s=np.array(arrival_s),
        prompt_tokens=np.array(draw(column)),
        output_tokens=np.array(draw(column)),
        extra={"turn": np.array(draw(column)), "session_id": np.array(sessions), "prefix_hash_ids": prefixes},
    )


@pytest.mark.parametrize("form", FORMATS)
@given(made=requests())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_what_is_written_is_read_back(tmp_path: Path, form: str, made: Requests) -> None:
    path = tmp_path / f"x.{form}"
    write_requests(path, made)
    back = read_requests(path)
    assert back.arrival_s is not None
    assert made.arrival_s is not None
    for key in ("arrival_s", "prompt_tokens", "output_tokens"):
        assert getattr(back, key).tolist() == getattr(made, key).tolist()
    assert back.extra["turn"].tolist() == made.extra["turn"].tolist()
    assert back.extra["session_id"].tolist() == made.extra["session_id"].tolist()
    pairs = zip(back.extra["prefix_hash_ids"], made.extra["prefix_hash_ids"], strict=True)
    assert all(a.tolist() == b.tolist() for a, b in pairs)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("form", FORMATS)
def test_optional_columns_are_kept_and_others_are_named_as_not_used(tmp_path: Path, form: str) -> None:
    extra = {"num_images": [0, 1, 2], "client_id": [7, 7, 8], "model": ["m"] * 3, "reasoning_tokens": [1, 1, 1]}
    read = read_requests(write(tmp_path, GOOD | extra, form))
    assert {key: values.tolist() for key, values in read.extra.items()} == {
        "num_images": [0, 1, 2],
        "client_id": [7, 7, 8],
    }
    assert read.notes == (f"columns of load.{form} not used: model, reasoning_tokens",)


def test_an_optional_column_without_values_is_as_good_as_absent(tmp_path: Path) -> None:
    empty = {"turn": [None] * 3, "session_id": [None] * 3, "client_id": ["a", None, "b"]}
    read = read_requests(write(tmp_path, GOOD | empty))
    assert {key: values.tolist() for key, values in read.extra.items()} == {"client_id": ["a", None, "b"]}


def test_whole_numbers_may_be_written_as_floats_and_a_csv_may_have_a_byte_order_mark(tmp_path: Path) -> None:
    content = "\ufeffarrival_s,prompt_tokens,output_tokens\n0,10.0,1e2\n\n1,20,3\n"
    read = read_requests(text(tmp_path, content))
    assert (read.prompt_tokens.tolist(), read.output_tokens.tolist()) == ([10, 20], [100, 3])


def test_equal_arrival_times_are_in_order(tmp_path: Path) -> None:
    assert len(read_requests(write(tmp_path, GOOD | {"arrival_s": [1.0, 1.0, 1.0]}))) == 3


@pytest.mark.parametrize("form", FORMATS)
def test_twenty_thousand_rows_are_read_in_fewer_calls_than_rows(tmp_path: Path, form: str) -> None:
    count = 20_000
    path = tmp_path / f"big.{form}"
    ones = np.ones(count)
    write_requests(path, Requests(name="big", prompt_tokens=ones, output_tokens=ones, arrival_s=np.arange(count)))
    read_requests(path)
    calls = cProfile.Profile()
    assert len(calls.runcall(read_requests, path)) == count
    assert sum(entry.callcount for entry in calls.getstats()) < count


def test_reference_traces_read_whole(data: Path) -> None:
    conversation = read_requests(data / "traces" / "azure-conv-2023.parquet")
    assert (len(conversation), round(conversation.rate_per_s, 2)) == (19_366, 5.53)
    mooncake = read_requests(data / "traces" / "mooncake-conversation.parquet")
    blocks = np.ceil(mooncake.prompt_tokens / 512)
    assert np.array_equal([len(ids) for ids in mooncake.extra["prefix_hash_ids"]], blocks)
    images = read_requests(data / "traces" / "servegen-mm-image-sampled.parquet")
    assert set(images.extra) == {"num_images", "image_tokens", "client_id"}


# ---- bad columns


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("arrival_s", [0.0, math.nan, 1.0], "arrival_s, row 2 (the first data row is 1): got nothing; give seconds"),
        ("arrival_s", [-1.0, 0.0, 1.0], "arrival_s, row 1 (the first data row is 1): got -1.0; give seconds"),
        ("arrival_s", [0.0, 2.0, 1.0], "arrival_s, row 3 (the first data row is 1): got 1.0; is earlier than row 2"),
        ("prompt_tokens", [10, 0, 30], "prompt_tokens, row 2 (the first data row is 1): got 0; give a whole number"),
        ("prompt_tokens", [10, 20, -5], "prompt_tokens, row 3 (the first data row is 1): got -5"),
        ("output_tokens", [1.0, 2.5, 3.0], "output_tokens, row 2 (the first data row is 1): got 2.5"),
        ("output_tokens", [1.0, math.nan, 3.0], "output_tokens, row 2 (the first data row is 1): got nothing"),
        ("output_tokens", [0, 1, 1], "output_tokens, row 1 (the first data row is 1): got 0"),
        ("prompt_tokens", ["10", "20", "many"], "prompt_tokens, row "),
        ("num_images", [0, -1, 0], "num_images, row 2 (the first data row is 1): got -1; give a whole number from 0"),
        ("num_samples", [1, 0, 1], "num_samples, row 2 (the first data row is 1): got 0; give a whole number from 1"),
        ("turn", [1.0, math.nan, 2.0], "turn, row 2 (the first data row is 1): got nothing"),
    ],
)
def test_a_bad_value_is_refused_with_file_column_row_and_remedy(
    tmp_path: Path, form: str, column: str, values: list[Any], said: str
) -> None:
    path = write(tmp_path, GOOD | {column: values}, form)
    line = refusal(lambda: read_requests(path))
    assert line.startswith(f"{path}: {said}")


def test_infinite_arrivals_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD | {"arrival_s": [0.0, 1.0, math.inf]})
    assert "arrival_s, row 3 (the first data row is 1): got inf; give seconds" in refusal(lambda: read_requests(path))


def test_words_in_a_csv_are_found_with_their_row(tmp_path: Path) -> None:
    path = text(tmp_path, "arrival_s,prompt_tokens,output_tokens\n0,10,1\n1,many,1\n")
    assert refusal(lambda: read_requests(path)) == (
        f"{path}: prompt_tokens, row 2 (the first data row is 1): got 'many'; give a number"
    )


def test_time_stamps_are_not_seconds(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD | {"arrival_s": pd.date_range("2023-11-16", periods=3, freq="s")})
    assert "arrival_s, row 1 (the first data row is 1): got " in refusal(lambda: read_requests(path))


@pytest.mark.parametrize("form", FORMATS)
def test_a_missing_column_is_named_with_the_nearest_one(tmp_path: Path, form: str) -> None:
    columns = {"prompt_token" if key == "prompt_tokens" else key: values for key, values in GOOD.items()}
    path = write(tmp_path, columns, form)
    assert refusal(lambda: read_requests(path)) == (
        f"{path}: prompt_tokens: the column is missing; did you mean prompt_token?"
    )


def test_a_file_of_other_columns_says_which_it_has(tmp_path: Path) -> None:
    path = write(tmp_path, {"x": [1], "y": [2]})
    assert refusal(lambda: read_requests(path)) == f"{path}: arrival_s: the column is missing; known: x, y"
    path = write(tmp_path, {key: GOOD[key] for key in ("arrival_s", "prompt_tokens")})
    assert refusal(lambda: read_requests(path)).endswith("the column is missing; the file has arrival_s, prompt_tokens")


def test_a_column_given_twice_is_refused(tmp_path: Path) -> None:
    path = text(tmp_path, "arrival_s,prompt_tokens,output_tokens,arrival_s\n0,1,1,0\n")
    assert f"{path}: arrival_s: the column is there twice" in refusal(lambda: read_requests(path))


def test_prefix_ids_must_be_lists_of_whole_numbers(tmp_path: Path) -> None:
    words = write(tmp_path, GOOD | {"prefix_hash_ids": [["a"], ["b"], []]})
    assert "prefix_hash_ids: got 'list<" in refusal(lambda: read_requests(words))
    hole = write(tmp_path, GOOD | {"prefix_hash_ids": [[1], None, [2]]})
    assert "prefix_hash_ids, row 2 (the first data row is 1): give a list" in refusal(lambda: read_requests(hole))
    prose = write(tmp_path, GOOD | {"prefix_hash_ids": ["[1]", "1,2", "[3]"]}, "csv")
    assert "as JSON text such as [0, 7]" in refusal(lambda: read_requests(prose))


# ---- bad files


@pytest.mark.parametrize("form", FORMATS)
def test_files_without_requests_are_refused(tmp_path: Path, form: str) -> None:
    path = text(tmp_path, "", form)
    assert refusal(lambda: read_requests(path)) == f"{path}: is empty; give at least one request"
    header = {key: np.array([], dtype=float) for key in GOOD}
    path = text(tmp_path, "\n\n", form) if form == "jsonl" else write(tmp_path, header, form)
    assert refusal(lambda: read_requests(path)) == f"{path}: holds no request; give at least one row"


@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl"])
def test_unreadable_files_are_refused(tmp_path: Path, form: str) -> None:
    path = text(tmp_path, b"\x00\xff\xfe not a table \x01", form)
    assert refusal(lambda: read_requests(path)).startswith(f"{path}: ")
    absent = tmp_path / f"absent.{form}"
    line = refusal(lambda: read_requests(absent))
    assert line == f"{absent}: cannot be read: No such file or directory"


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_bytes_that_are_no_text_are_refused_in_one_line(
    tmp_path: Path, form: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = text(tmp_path, b"\xa8\n\xa8,\xa8\n" * 9, form)
    assert refusal(lambda: read_requests(path)) == f"{path}: is not UTF-8 text"
    assert capfd.readouterr().err == ""


def test_json_lines_must_be_objects(tmp_path: Path) -> None:
    for line in ("null", "[1, 2]", '"x"'):  # pyarrow ends the process on a file of nulls
        path = text(tmp_path, f"{line}\n", "jsonl")
        assert "give one JSON object a line" in refusal(lambda path=path: read_requests(path))


def test_a_truncated_parquet_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    path.write_bytes(path.read_bytes()[:-20])
    assert refusal(lambda: read_requests(path)).startswith(f"{path}: cannot be read as parquet: ")


def test_a_ragged_csv_row_and_a_broken_json_line_are_named(tmp_path: Path) -> None:
    ragged = text(tmp_path, "arrival_s,prompt_tokens,output_tokens\n0,1,1\n1,2\n")
    assert refusal(lambda: read_requests(ragged)) == (
        f"{ragged}: row 2 (the first data row is 1): got '1,2'; give 3 values, as in the header"
    )
    row = json.dumps({key: values[0] for key, values in GOOD.items()})
    broken = text(tmp_path, f"{row}\n{{oops\n", "jsonl")
    assert "in row 2 (the first data row is 1)" in refusal(lambda: read_requests(broken))
    mixed = text(tmp_path, f"{row}\n{row.replace('10', chr(34) + 'ten' + chr(34))}\n", "jsonl")
    line = refusal(lambda: read_requests(mixed))
    assert "prompt_tokens" in line
    assert "in row 2 (the first data row is 1)" in line


def test_directories_and_unknown_extensions_are_refused(tmp_path: Path) -> None:
    assert refusal(lambda: read_requests(tmp_path)).startswith(f"{tmp_path}: is a directory; give a file ending in ")
    sheet = text(tmp_path, "x", "xlsx")
    assert refusal(lambda: read_requests(sheet)) == (
        f"{sheet}: got '.xlsx'; unknown extension; give a file ending in .parquet or .csv or .jsonl"
    )
    made = Requests(name="x", prompt_tokens=np.ones(1), output_tokens=np.ones(1), arrival_s=np.zeros(1))
    assert "give a file ending in" in refusal(lambda: write_requests(sheet, made))
    nowhere = tmp_path / "no" / "x.csv"
    assert refusal(lambda: write_requests(nowhere, made)).endswith("its folder does not exist; create it first")


# ---- lengths without arrivals


def lengths_only(folder: Path, form: str = "parquet") -> Path:
    return write(folder, GOOD | {"arrival_s": [None, None, None]}, form)


@pytest.mark.parametrize("form", FORMATS)
def test_a_length_only_trace_needs_arrivals_from_its_user(tmp_path: Path, form: str) -> None:
    path = lengths_only(tmp_path, form)
    line = refusal(lambda: resolve_workload(path))
    assert line == f"{path}: arrival_s: holds no arrival times; ask for a rate or a concurrency"
    assert resolve_workload(path, concurrency=2).concurrency == 2
    drawn = resolve_workload(path, rate_per_s=2.0, seed=4)
    assert drawn.arrival_s is not None
    assert drawn.arrival_s[1] > 0
    assert drawn.notes[0] == f"load.{form} holds no arrival times"
    assert "arrival times drawn: PoissonArrivals(rate_per_s=2.0" in drawn.notes[1]


def test_a_closed_loop_is_written_without_arrivals(tmp_path: Path) -> None:
    path = tmp_path / "loop.csv"
    write_requests(path, read_requests(write(tmp_path, GOOD)).closed_loop(2))
    assert resolve_workload(path, concurrency=2).prompt_tokens.tolist() == GOOD["prompt_tokens"]


# ---- resolve_workload


def test_a_file_is_cut_first_and_then_brought_to_the_rate(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    scaled = resolve_workload(path, rate_per_s=10.0, requests=2)
    assert scaled.arrival_s is not None
    assert scaled.arrival_s.tolist() == pytest.approx([0.0, 0.1])
    assert resolve_workload(str(path), requests=9).notes == ("9 requests were asked for; load holds 3",)


def test_a_generator_keeps_its_law_at_another_rate() -> None:
    own, fast = resolve_workload("code", requests=500), resolve_workload("code", requests=500, rate_per_s=25.66)
    assert own.arrival_s is not None
    assert fast.arrival_s is not None
    assert fast.arrival_s == pytest.approx(own.arrival_s / 10)
    assert np.array_equal(own.prompt_tokens, fast.prompt_tokens)
    assert fast.notes == ()


def test_a_generator_takes_other_arrivals_and_says_so(tmp_path: Path) -> None:
    loop = resolve_workload("chat", concurrency=8, requests=20)
    assert (loop.concurrency, loop.arrival_s, len(loop)) == (8, None, 20)
    assert loop.notes[0].startswith("arrivals of chat (gamma) replaced: ClosedLoop(")
    path = tmp_path / "batch.yaml"
    fixed = "{kind: fixed, tokens: 8}"
    path.write_text(f"name: batch\nprompt_tokens: {fixed}\noutput_tokens: {fixed}\narrivals: {{kind: all_at_once}}\n")
    assert resolve_workload(path).arrival_s.max() == 0  # type: ignore[union-attr]
    assert resolve_workload(path, rate_per_s=2.0, requests=3000).rate_per_s == pytest.approx(2.0, rel=0.1)


def test_seeds_reach_the_generator() -> None:
    one, same, two = (resolve_workload("chat", requests=10, seed=seed) for seed in (1, 1, 2))
    assert one.prompt_tokens.tolist() == same.prompt_tokens.tolist() != two.prompt_tokens.tolist()


def test_an_unknown_name_gets_the_nearest_ones_and_hears_of_files() -> None:
    line = refusal(lambda: resolve_workload("sumarization"))
    assert line.startswith("--workload: got 'sumarization'; unknown workload; did you mean summarization")
    assert line.endswith("The path of a request file (.parquet or .csv or .jsonl) would do as well")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"rate_per_s": 0.0}, "--rate-per-s: got 0.0; give requests per second"),
        ({"rate_per_s": -3.0}, "--rate-per-s: got -3.0; give requests per second"),
        ({"rate_per_s": math.nan}, "--rate-per-s: got nan; give requests per second"),
        ({"rate_per_s": math.inf}, "--rate-per-s: got inf; give requests per second"),
        ({"concurrency": 0}, "--concurrency: got 0; give a whole number of at least 1"),
        ({"requests": 0}, "--requests: got 0; give a whole number of at least 1"),
        ({"seed": -1}, "--seed: got -1; give a whole number of at least 0"),
        ({"rate_per_s": 1.0, "concurrency": 2}, "--rate-per-s --concurrency: give one of them"),
    ],
)
def test_bad_flags_are_named(flags: dict[str, Any], said: str) -> None:
    assert refusal(lambda: resolve_workload("chat", **flags)).startswith(said)


def test_drawn_arrivals_of_a_file_are_those_of_the_law(tmp_path: Path) -> None:
    path = lengths_only(tmp_path)
    by_hand = read_requests(path, lengths_will_do=True).arriving(PoissonArrivals(rate_per_s=2.0), seed=4)
    assert np.array_equal(resolve_workload(path, rate_per_s=2.0, seed=4).arrival_s, by_hand.arrival_s)


# -- files that are read in parts --------------------------------------------------------------------------------------


@pytest.fixture
def long_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of 100 rows where 20 are many and 16 are read together."""
    monkeypatch.setattr("apexsim.io.request_files.MANY_ROWS", 20)
    monkeypatch.setattr("apexsim.io.request_files.PART_ROWS", 16)
    rng = np.random.default_rng(5)
    table = pa.table({
        "arrival_s": np.cumsum(rng.exponential(0.1, 100)),
        "prompt_tokens": rng.integers(1, 500, 100),
        "output_tokens": rng.integers(1, 30, 100),
        "deadline_s": rng.uniform(1, 2, 100),
        "colour": ["red"] * 100,
    })  # fmt: skip
    pq.write_table(table, tmp_path / "long.parquet")
    return tmp_path / "long.parquet"


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows,
        lambda rows: rows.head(50),
        lambda rows: rows.head(100),
        lambda rows: rows.head(1_000),
        lambda rows: rows.head(70).at_rate(3.0),
        lambda rows: rows.at_rate(2.5).head(33),
        lambda rows: rows.closed_loop(7, 0.5),
        lambda rows: rows.closed_loop(4, waves=True),
        lambda rows: rows.repeated(150),
        lambda rows: rows.all_at_once(),
        lambda rows: rows.arriving(PoissonArrivals(rate_per_s=4.0), seed=1),
    ],
)
def test_requests_that_are_read_in_parts_are_those_of_the_whole_file(
    long_file: Path, change: Callable[[Requests], Requests]
) -> None:
    streamed, held = pickle.loads(pickle.dumps(change(open_requests(long_file)))), change(read_requests(long_file))
    for figure in ("name", "notes", "concurrency", "turnaround_s", "waves", "columns"):
        assert getattr(streamed, figure) == getattr(held, figure), figure
    assert streamed.span_s == pytest.approx(held.span_s, nan_ok=True)
    assert astuple(streamed.offered) == pytest.approx(astuple(held.offered))
    assert len(streamed) == len(held)
    assert streamed.distinct_prompts.tolist() == held.distinct_prompts.tolist()
    parts = list(streamed.parts())
    for key in ("prompt_tokens", "output_tokens", "arrival_s"):
        wanted = getattr(held, key)
        assert np.array_equal(getattr(streamed, key), wanted) if wanted is not None else getattr(streamed, key) is None
        assert wanted is None or np.array_equal(np.concatenate([getattr(part, key) for part in parts]), wanted)
    assert np.array_equal(streamed.extra["deadline_s"], held.extra["deadline_s"])


def test_a_run_reads_its_requests_in_parts(long_file: Path) -> None:
    deployment = apexsim.deployment(model="llama-3.1-8b", device="h100-sxm", engine_options={"policy": "deadline"})
    runs = [apexsim.simulate(deployment, rows) for rows in (open_requests(long_file), read_requests(long_file))]
    assert isinstance(open_requests(long_file), StreamedRequests)
    assert runs[0].requests.equals(runs[1].requests)
    assert without_timing(runs[0]) == without_timing(runs[1])


@pytest.mark.parametrize(
    ("column", "row", "value"),
    [("prompt_tokens", 40, 0), ("arrival_s", 48, 0.0), ("deadline_s", 99, -1.0), ("output_tokens", 0, 1.5)],
)
def test_a_row_of_a_part_is_told_by_its_number_in_the_file(
    long_file: Path, column: str, row: int, value: float
) -> None:
    table = pq.read_table(long_file)
    values = table[column].to_numpy().astype(np.float64)
    values[row] = value
    pq.write_table(table.set_column(table.column_names.index(column), column, pa.array(values)), long_file)
    with pytest.raises(BadInput, match=f"{column}, row {row + 1} "):
        open_requests(long_file)


def without_timing(result: apexsim.SimulationResult) -> dict[str, Any]:
    return {key: value for key, value in result.summary().items() if key != "timing"}
