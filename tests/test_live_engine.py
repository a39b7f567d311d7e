"""The live engine: its tokens are those of plain forward passes, however requests were batched, cut and preempted."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from apexsim.errors import BadInput, Unsupported
from apexsim.specs.engine import SchedulerDefaults
from apexsim.specs.experts import MoESpec
from apexsim.specs.model import ModelSpec
from apexsim.specs.workload import Requests

torch = pytest.importorskip("torch")

from made_up_machine import MadeUpMachine  # noqa: E402

from kernels_profiling import attention  # noqa: E402
from kernels_profiling.clock import Clock, HostClock  # noqa: E402
from kernels_profiling.engine import EngineSettings, LiveEngine  # noqa: E402
from kernels_profiling.transformer import Packed  # noqa: E402

BLOCK = 4
DENSE = ModelSpec(
    name="small", source="test", layers=4, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=97,
    max_context=256, qk_norm="head",
)  # fmt: skip
EXPERTS = DENSE.model_copy(update={"ffn": None, "qk_norm": None, "moe": MoESpec(experts=4, active=2, ffn=32)})
LOAD = Requests(
    name="load",
    prompt_tokens=np.array([5, 30, 17, 40, 9, 23]),
    output_tokens=np.array([25, 3, 20, 8, 1, 30]),
    arrival_s=np.zeros(6),
)


def engine(
    model: ModelSpec = DENSE,
    *,
    blocks: int = 100,
    swiftkv: int | None = None,
    clock: Clock | None = None,
    **scheduler: object,
) -> LiveEngine:
    given = {"policy": "chunked_prefill", "max_num_batched_tokens": 16, "max_num_seqs": 4, "block_size": BLOCK}
    limits = SchedulerDefaults.model_validate({**given, **scheduler})
    return LiveEngine(
        EngineSettings(
            model=model,
            scheduler=limits,
            kv_blocks=blocks,
            longest=64,
            swiftkv_layers=swiftkv,
            clock=clock or HostClock(),
        )
    )


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Products this small only wait for one another on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def alone(tokens: np.ndarray, outputs: int) -> Packed:
    """A whole sequence, nothing cached, as one chunk in the first blocks; the tokens behind its last ``outputs``."""
    count = len(tokens)
    places = torch.arange(count)
    last = places[count - outputs :]
    return Packed(
        ids=torch.from_numpy(tokens),
        positions=places,
        slots=places,
        tables=torch.arange(-(-count // BLOCK), dtype=torch.int32).expand(outputs, -1),
        lengths=(last + 1).to(torch.int32),
        last=last,
        decodes=0,
        chunks=[(count, 0)],
    )


def full_recompute(served: LiveEngine) -> list[list[int]]:
    """What the same weights give behind each token, computed anew, one request at a time."""
    return [
        served.model.forward(alone(known[:-1], len(output))).tolist()
        for known, output in zip(served.runner.known, served.outputs, strict=True)
    ]


@pytest.mark.parametrize("model", [DENSE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize(
    ("blocks", "scheduler", "preempts"),
    [
        (100, {}, False),
        (100, {"max_num_batched_tokens": 512, "max_num_seqs": 8}, False),
        (14, {}, True),
        (100, {"policy": "prefill_first", "max_num_batched_tokens": 64}, False),
    ],
    ids=["chunked", "whole prompts", "short of blocks", "prompts first"],
)
def test_tokens_are_those_of_plain_passes(
    model: ModelSpec, blocks: int, scheduler: dict[str, object], preempts: bool
) -> None:
    served = engine(model, blocks=blocks, **scheduler)
    requests, _ = served.serve(LOAD)
    assert [len(output) for output in served.outputs] == LOAD.output_tokens.tolist()
    assert any(request.preemptions for request in requests) == preempts
    assert [output.tolist() for output in served.outputs] == full_recompute(served)


def one_launch_for_all(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ragged: attention.Ragged) -> torch.Tensor:
    """What FlashAttention-3 does with chunks and decodes, sequence by sequence."""
    out, starts = torch.empty_like(q), ragged.starts.tolist()
    assert starts[0] == 0
    assert starts[-1] == len(q)
    assert max(np.diff(starts)) == ragged.longest
    for row, (begin, end) in enumerate(pairwise(starts)):
        length = int(ragged.lengths[row])
        table = ragged.block_tables[row, : -(-length // BLOCK)]
        out[begin:end] = attention.prefill_attention(q[begin:end], k, v, table, length - (end - begin))
    return out


def test_tokens_are_the_same_where_chunks_and_decodes_share_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    served = engine()
    monkeypatch.setattr(served.model, "_one_launch", True)
    monkeypatch.setattr(attention, "mixed_attention", one_launch_for_all)
    served.serve(LOAD)
    monkeypatch.undo()
    assert [output.tolist() for output in served.outputs] == full_recompute(served)


def test_swiftkv_projects_later_layers_from_the_last_one_that_sees_all_tokens() -> None:
    model = engine(swiftkv=2).model
    tokens = np.arange(10) % DENSE.vocab
    packed = alone(tokens, 1)
    model.forward(packed)
    stream: tuple[torch.Tensor | None, torch.Tensor] = (None, model._embedding[packed.ids])
    turn = model._cos[packed.positions], model._sin[packed.positions]
    with torch.inference_mode():
        for index in range(2):
            stream = model._whole_layer(index, packed, turn, stream)
        hidden = stream[0] + stream[1]
        for index in (2, 3):
            layer = model._layers[index]
            normed = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.attention_norm
            values = normed @ layer.qkv[-DENSE.kv_heads * DENSE.head_dim :].T
            cached = model.values[index].flatten(0, 1)[: len(tokens)].flatten(1)
            torch.testing.assert_close(cached, values)


@pytest.mark.parametrize("blocks", [100, 14])
def test_swiftkv_is_the_same_however_it_is_batched(blocks: int) -> None:
    served = engine(blocks=blocks, swiftkv=2)
    served.serve(LOAD)
    assert [output.tolist() for output in served.outputs] == full_recompute(served)


def test_swiftkv_of_all_layers_is_the_plain_engine() -> None:
    outputs = []
    for layers in (None, DENSE.layers):
        served = engine(swiftkv=layers)
        served.serve(LOAD)
        outputs.append([output.tolist() for output in served.outputs])
    assert outputs[0] == outputs[1]


def test_stamps_are_in_order_and_a_closed_loop_keeps_its_concurrency() -> None:
    served = engine()
    requests, recorder = served.serve(LOAD.closed_loop(2))
    for request in requests:
        assert request.scheduled_ns is not None
        assert request.first_token_ns is not None
        assert request.arrival_ns <= request.scheduled_ns < request.first_token_ns <= (request.last_token_ns or 0)
    steps = recorder.steps()
    assert steps["running"].max() == 2
    assert (steps["start_ns"][1:] >= steps["end_ns"][:-1]).all()


def test_an_idle_engine_waits_for_arrivals() -> None:
    late = Requests(
        name="late", prompt_tokens=np.array([5, 5]), output_tokens=np.array([2, 2]), arrival_s=np.array([0.05, 0.3])
    )
    with MadeUpMachine() as clock:
        requests, recorder = engine(clock=clock).serve(late)
    assert [request.scheduled_ns for request in requests] == [50_000_000, 300_000_000]
    assert recorder.steps()["start_ns"].tolist()[::2] == [50_000_000, 300_000_000]


def test_the_clock_of_the_host_waits() -> None:
    clock = HostClock()
    at_ns = clock.now_ns() + 2_000_000
    clock.wait_until(at_ns)
    assert clock.now_ns() >= at_ns
    clock.wait_until(at_ns)  # past already


def test_requests_that_can_never_be_served_are_refused_before_any_work() -> None:
    with pytest.raises(BadInput, match=r"load: 4 of 6 requests cannot be served; request 2: 33 tokens need more"):
        engine(blocks=8).serve(LOAD)


def test_models_that_the_engine_has_not_are_refused_with_what_is_missing() -> None:
    with pytest.raises(Unsupported, match="small: the live engine has no biases, LayerNorm"):
        engine(DENSE.model_copy(update={"qkv_bias": True, "norm": "layer"}))
    with pytest.raises(BadInput, match="--swiftkv-layers: got 5; give 1 to 4, the layers of small"):
        engine(swiftkv=5)
