"""Would the engine start: contexts that fit, seats with room for their states, and what would do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import apexsim
from apexsim import catalog
from apexsim.cli.main import main
from apexsim.cli.memory import whether_it_starts
from apexsim.costs.memory import plan_memory
from apexsim.costs.starting import Started, start
from apexsim.errors import InfeasiblePlan
from apexsim.planning import deployment, search
from apexsim.serving.simulator import simulate
from apexsim.specs.workload import Requests


def deployed(model: str = "qwen3-32b", *, options: dict[str, Any] | None = None, **choices: Any) -> Any:
    """Qwen3-32B (a context of 40,960) leaves one H100 a cache for fewer tokens than that."""
    engine = {"engine": "vllm@0.7.3", "device": "h100-sxm", **choices}
    return deployment(model=model, engine_options=options or {}, **engine)


def started(deployment: Any) -> Started:
    return start(deployment.colocated_server())


def capacity(given: Any) -> int:
    longest = plan_memory(given.colocated_server()).max_tokens
    assert longest is not None
    return longest


def test_a_context_that_fits_is_left_alone() -> None:
    asked = deployed(tensor=2)
    engine = started(asked)
    assert (engine.server, engine.notes, engine.options) == (asked.colocated_server(), (), {})
    assert engine.memory == plan_memory(asked.colocated_server())


def test_a_models_own_context_gives_way_to_the_longest_that_starts() -> None:
    asked = deployed()
    engine = started(asked)
    longest = capacity(asked)
    assert longest < 40960
    assert engine.options["max_model_len"] == engine.server.context_limit == engine.memory.max_tokens == longest
    assert engine.notes == (
        f"max_model_len {longest:,}: a context of 40,960 tokens does not fit in the KV cache; "
        "longer requests are rejected",
    )
    again = deployed(options={"max_model_len": longest})
    assert started(again).notes == ()


@pytest.mark.parametrize(
    ("option", "idle", "usual", "why"),
    [
        ({"prefix_caching": True}, {"model": "gpt-oss-20b"}, False, "layers of gpt-oss-20b hold unequal caches"),
        ({"receive_interval": 5}, {"pipeline": 2}, 1, "a pipeline looks at arrivals in every step"),
        ({"lookahead_steps": 1}, {"pipeline": 2}, 0, "the other batches of a pipeline hide the host"),
    ],
)
def test_an_option_given_that_changes_nothing_is_noted(
    option: dict[str, Any], idle: dict[str, Any], usual: Any, why: str
) -> None:
    """Where it was given, and asks for something, and has no effect: not an engine's own default."""
    useful = {"model": "llama-3.1-8b", "engine": "vllm-v1-async", "pipeline": 1}
    ((name, _),) = option.items()
    assert idle_options(option, {**useful, **idle}) == [f"{name} has no effect: {why}"]
    for options, choices in (({}, {**useful, **idle}), ({name: usual}, {**useful, **idle}), (option, useful)):
        assert idle_options(options, choices) == []


def idle_options(options: dict[str, Any], choices: dict[str, Any]) -> list[str]:
    """What the notes of a short run say of options without effect."""
    notes = simulate(deployed(options=options, **choices), apexsim.workload("chat", requests=5)).notes
    return [note for note in notes if "has no effect" in note]


def test_an_explicit_context_that_does_not_start_says_what_would() -> None:
    longest = capacity(deployed())
    with pytest.raises(InfeasiblePlan) as caught:
        started(deployed(options={"max_model_len": 40960}))
    assert str(caught.value) == (
        f"a context of 40,960 tokens does not fit in the KV cache; needs max_model_len <= {longest:,}, "
        "or starts with tensor degree 2"
    )
    with pytest.raises(InfeasiblePlan):
        started(deployed(options={"max_model_len": longest + 1}))


def test_an_engine_that_starts_with_any_context_rejects_what_is_too_long() -> None:
    engine = started(deployed(engine="sglang-0.5", options={"max_model_len": 40960, "gpu_memory_utilization": 0.85}))
    assert engine.server.context_limit == engine.memory.max_tokens
    assert "longer requests are rejected" in engine.notes[0]


def test_settings_that_follow_from_the_context_count() -> None:
    """Whole prompts (a token budget as long as the context): the longest that starts leaves room for its own step."""
    options = {"max_num_batched_tokens": None, "chunked_prefill": False, "policy": "prefill_first"}
    asked = deployed("llama-3.1-70b", engine="vllm@0.7.3", tensor=2, options=options)
    longest = started(asked).server.context_limit
    assert 0 < longest < 131072

    def holds(context: int) -> bool:
        given = deployed("llama-3.1-70b", tensor=2, options={**options, "max_model_len": context})
        return plan_memory(given.colocated_server()).holds(context)

    assert holds(longest)
    assert not holds(longest + 16)


def test_what_does_not_fit_says_what_would() -> None:
    with pytest.raises(InfeasiblePlan, match=r"weights of 131 GiB exceed .*; starts with tensor degree 4$"):
        started(deployed("llama-3.1-70b", engine="vllm@0.11.0"))
    with pytest.raises(InfeasiblePlan) as caught:
        started(deployed("llama-3.1-70b", engine="vllm@0.11.0", tensor=2))
    told = str(caught.value).split("; ")[-1].split(", or ")
    assert told[-1] == "starts with tensor degree 4"
    seats = int(told[-2].removeprefix("starts with max_num_seqs <= ").replace(",", ""))
    assert started(deployed("llama-3.1-70b", engine="vllm@0.11.0", tensor=2, options={"max_num_seqs": seats})).notes
    with pytest.raises(InfeasiblePlan):
        started(deployed("llama-3.1-70b", engine="vllm@0.11.0", tensor=2, options={"max_num_seqs": seats + 1}))


def test_no_hint_where_no_tensor_degree_of_a_node_would_do() -> None:
    with pytest.raises(InfeasiblePlan) as caught:
        started(deployed("llama-3.1-405b", device="rtx-4090"))
    assert "tensor degree" not in str(caught.value)


def test_seats_need_room_for_the_states_of_recurrent_layers() -> None:
    asked = deployed("nemotron-h-8b", engine="vllm@0.19.0")
    plan = plan_memory(asked.colocated_server())
    room = plan.blocks // plan.fixed_blocks
    assert room < asked.colocated_server().scheduler.max_num_seqs
    wanted = {"max_num_seqs": asked.colocated_server().scheduler.max_num_seqs}
    with pytest.raises(InfeasiblePlan, match=f"needs max_num_seqs <= {room:,}$"):
        started(deployed("nemotron-h-8b", engine="vllm@0.19.0", options=wanted))
    # Fewer seats leave more room: sampling for them takes less.
    assert started(deployed("nemotron-h-8b", engine="vllm@0.19.0", options={"max_num_seqs": room})).notes == ()
    # Seats that nobody gave yield, with a note.
    yielded = started(asked)
    assert yielded.server.scheduler.max_num_seqs == yielded.options["max_num_seqs"] == room
    assert yielded.notes == (f"max_num_seqs {room:,}: states of recurrent layers for 1,024 sequences do not fit",)
    assert started(deployed("nemotron-h-8b", engine="sglang-0.5")).notes == ()


def test_longer_requests_are_rejected_and_counted() -> None:
    longest = capacity(deployed())
    prompts = np.array([100, longest - 10, longest - 9, 100])
    requests = Requests(name="four", arrival_s=np.zeros(4), prompt_tokens=prompts, output_tokens=np.full(4, 10))
    result = simulate(deployed(), requests)
    assert result.request_columns["status"].tolist() == ["finished", "finished", "rejected", "finished"]
    summary = result.summary()
    assert summary["requests"]["rejected"] == 1
    assert summary["memory"]["max_model_len"] == summary["memory"]["kv_tokens"] == longest
    assert any(note.startswith(f"max_model_len {longest:,}") for note in result.notes)


def test_best_yaml_has_the_flag_that_starts_the_engine(tmp_path: Path) -> None:
    choices = {"engine": "vllm@0.7.3", "workload": "chat", "requests": 20, "rate_per_s": 1.0}
    study = search(model="qwen3-32b", devices="1xh100-sxm", out=tmp_path / "one", **choices)
    best = apexsim.deployment(tmp_path / "one" / "best.yaml")
    assert best.engine.scheduler.max_model_len == capacity(deployed())
    assert study.best is not None
    here, there = started(best).server, started(study.best).server
    assert (here.scheduler, here.engine.memory) == (there.scheduler, there.engine.memory)
    search(model="qwen3-32b", devices="2xh100-sxm", out=tmp_path / "two", **choices)
    assert apexsim.deployment(tmp_path / "two" / "best.yaml").engine.scheduler.max_model_len is None


# -- what engines logged at start --------------------------------------------------------------------------------------


def test_capacity_agrees_with_what_engines_logged(data: Path) -> None:
    """Whether the engine started with its context, and the KV tokens where the log has them, within 10 %."""
    rows = pd.read_csv(data / "ground_truth" / "kv_capacity" / "reports.csv")
    for _, row in rows.iterrows():
        options = {"gpu_memory_utilization": row["gpu_memory_utilization"]}
        options |= {key: int(row[key]) for key in ("max_num_batched_tokens", "max_model_len") if not pd.isna(row[key])}
        asked = deployment(
            model=row["model"], device=row["device"], tensor=int(row["tensor"]), weights=row["weight_dtype"],
            engine=f"{row['engine']}@{row['engine_version']}", kv_cache=row["kv_dtype"], engine_options=options,
        )  # fmt: skip
        try:
            started(asked)
        except InfeasiblePlan:
            assert row["starts"] == "no", row["source"]
        else:
            assert row["starts"] == "yes", row["source"]
        if not pd.isna(row["measured_kv_tokens"]):
            found = plan_memory(asked.colocated_server()).kv_tokens
            assert found == pytest.approx(row["measured_kv_tokens"], rel=0.10), row["source"]


def test_every_engine_says_where_its_memory_terms_come_from() -> None:
    for name in catalog.names("engine"):
        engine = catalog.load("engine", name)
        assert engine.memory_evidence or engine.engine in ("reference", "transformers"), name


def said_of(**choices: Any) -> str:
    asked = deployed(**choices).colocated_server()
    return whether_it_starts(asked, start(asked))


def test_show_memory_says_first_whether_it_starts() -> None:
    """Certainty: where the interval reaches below what must fit, the answer is perhaps not."""
    assert said_of(tensor=2) == "yes"
    longest = capacity(deployed())
    sure = started(deployed()).memory.figures(longest)["kv_tokens_range"][0]
    told = f"yes, with max_model_len {longest:,} or less (the model's own: 40,960; {sure:,} to be sure at 95 %)"
    assert said_of() == told
    assert said_of(options={"max_model_len": sure}) == "yes"
    unsure = said_of(options={"max_model_len": sure + 16})
    assert unsure.startswith(f"perhaps not: the KV cache of a replica holds {sure:,} to ")
    assert unsure.endswith(f"and the context (max_model_len) is {sure + 16:,}")


def test_an_engine_that_starts_with_any_context_says_what_it_rejects() -> None:
    served = started(deployed(engine="sglang-0.5", options={"gpu_memory_utilization": 0.85})).server.context_limit
    assert served < 40960
    said = said_of(engine="sglang-0.5", options={"gpu_memory_utilization": 0.85})
    assert said == f"yes; requests of more than {served:,} tokens are rejected"


def test_what_does_not_start_is_shown_with_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "memory", "--model", "llama-3.1-70b", "--device", "h100-sxm"]) == 1
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("starts: no; weights of 131 GiB exceed")
    table = {row[:40].strip(): row[40:].split() for row in rows}
    # 79.1 GiB x 0.9 less 131 GiB of weights, a full step and the reserve.
    assert table["device: weights"] == ["131", "GiB"]
    assert table["share that the engine takes"] == ["0.9", "of", "all", "of", "it"]
    lacks, full_step = (float(table[key][0]) for key in ("device: lacks, before any KV cache", "device: a full step"))
    assert lacks == pytest.approx(131 + full_step + 0.75 - 71.2, abs=0.6)
    options = ["--engine-option", "max_model_len=20000"]
    assert main(["show", "memory", "--model", "llama-3.1-70b", "--device", "h100-sxm", "--tensor", "2", *options]) == 1
    assert "KV tokens" in capsys.readouterr().out


def test_a_context_beyond_the_models_own_counts_as_that_and_says_so() -> None:
    engine = started(deployed(tensor=2, options={"max_model_len": 51_200}))
    assert engine.server.context_limit == 40_960
    assert engine.notes == ("max_model_len 51,200 is more than the context of qwen3-32b: 40,960 holds",)


def test_the_smallest_tensor_degree_may_be_one_of_several_nodes() -> None:
    with pytest.raises(InfeasiblePlan, match=r"weights of 756 GiB exceed .*starts with tensor degree 16$"):
        started(deployed("llama-3.1-405b"))
