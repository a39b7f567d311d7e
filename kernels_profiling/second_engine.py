"""``second-engine``: the same load on an engine that shares nothing with ours, transformers' continuous batching."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apexsim.cli.options import with_flags
from apexsim.errors import BadInput
from kernels_profiling.live import EngineFlags, ran_on, settings_for, warm_up_load
from kernels_profiling.serving_flags import MOST_SEATS, MOST_TOKENS, LoadFlags, ModelFlags

if TYPE_CHECKING:
    import numpy as np
    import torch

    from apexsim.serving.request import Request
    from apexsim.specs.model import ModelSpec
    from apexsim.specs.workload import Requests
    from kernels_profiling.engine import EngineSettings
    from kernels_profiling.records import Served

# How long to wait for an answer before looking at the clock again.
_POLL_S = 0.001
# Of a request that is preempted, transformers forgets when its first tokens came.
_FORGOTTEN = "was preempted, and transformers forgot when its first tokens came; give more --kv-blocks"


@dataclass(frozen=True)
class LimitFlags:
    """How the engine is set, as far as it has the same settings."""

    kv_blocks: Annotated[int | None, typer.Option(min=1, help="KV blocks of 16 tokens; else all that fit.")] = None
    max_num_seqs: Annotated[int | None, typer.Option(min=1, max=MOST_SEATS, help="Most requests at a time.")] = None
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(min=1, max=MOST_TOKENS, help="Most tokens of a step.")
    ] = None


@with_flags
def second_engine(
    out: Annotated[Path, typer.Option(help="Folder: a row is added to its runs.csv.")],
    model_flags: ModelFlags,
    load_flags: LoadFlags,
    limits: LimitFlags,
    profile: Annotated[
        str | None, typer.Option(help="Device profile (name or YAML) that the row names; else the device's own name.")
    ] = None,
) -> None:
    """Serve a workload with transformers' continuous batching and random weights of the same shape."""
    check_transformers()

    from apexsim.atomic import make_folder
    from kernels_profiling.engine import check_servable
    from kernels_profiling.records import check_folder, write_run

    check_folder(make_folder(out), model_flags.model)
    load, place = load_flags.read(), model_flags.place()
    settings = settings_for(model_flags.spec(), load, EngineFlags(**vars(limits)), place)
    check_servable(settings, load)
    what = ran_on(out, settings, model_flags, profile, "second-engine")
    engine = {"engine": "transformers", "engine_version": importlib.metadata.version("transformers")}
    run_id = write_run(out, serve(settings, load), engine | what)
    typer.echo(f"{out}/runs.csv: {run_id}")


def check_transformers() -> None:
    """Raise BadInput, saying which extra to install, where transformers or its continuous batching is missing."""
    extra = "pip install 'apexsim[second-engine]'"
    if importlib.util.find_spec("transformers") is None:
        raise BadInput(f"transformers is not installed; install it with: {extra}")
    import transformers.generation.configuration_utils as found

    config = getattr(found, "ContinuousBatchingConfig", None)
    if not hasattr(config, "page_size"):
        import transformers

        said = f"5.17 is the first release whose continuous batching can be driven here; {extra}"
        raise BadInput(said, where="transformers", got=transformers.__version__)


def serve(settings: EngineSettings, load: Requests) -> Served:
    """Serve a load by the wall clock, after a like one that does not count."""
    import torch

    from kernels_profiling.transformer import check_memory

    check_memory(settings.model, settings.cache, torch.empty(0, dtype=settings.dtype, device=settings.device))
    network = build(settings.model, torch.device(settings.device), settings.dtype)
    with torch.inference_mode(), network.continuous_batching_context_manager(**_settings(settings)) as manager:
        _serve(manager, warm_up_load(load, settings.scheduler), settings)
        return _serve(manager, load, settings)


def build(model: ModelSpec, device: torch.device, dtype: torch.dtype) -> Any:
    """A transformers model of the shape of ``model``, its weights random: Llama, or Qwen3 where heads are normed."""
    import transformers

    from apexsim.errors import Unsupported
    from kernels_profiling.transformer import check_supported

    check_supported(model)
    if model.moe:
        raise Unsupported(f"{model.name}: the second engine has no experts")
    kind = "Qwen3" if model.qk_norm else "Llama"
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=model.hidden, num_hidden_layers=model.layers, num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads, head_dim=model.head_dim, intermediate_size=model.ffn,
        vocab_size=model.vocab, max_position_embeddings=model.max_context,
        tie_word_embeddings=model.tied_embeddings, attn_implementation="sdpa", dtype=dtype,
    )  # fmt: skip
    with device:
        return getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval()


def _settings(settings: EngineSettings) -> dict[str, Any]:
    """The engine's settings, as far as it has them: greedy, no end token, no shared prefixes, the same cache."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    scheduler = settings.scheduler
    return {
        "generation_config": GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
        "continuous_batching_config": ContinuousBatchingConfig(
            page_size=scheduler.block_size,
            num_blocks=settings.kv_blocks,
            max_batch_tokens=scheduler.token_budget,
            max_requests_per_batch=scheduler.max_num_seqs,
            allow_block_sharing=False,
        ),
    }


def _serve(manager: Any, load: Requests, settings: EngineSettings) -> Served:
    """Send requests when they are due and collect their answers."""
    from kernels_profiling.engine import prompts
    from kernels_profiling.traffic import Traffic

    traffic = Traffic(load)
    tokens = prompts(traffic.requests, settings.model.vocab, settings.seed)
    answers: dict[int, Any] = {}
    began_s = time.perf_counter()
    while len(answers) < len(traffic.requests):
        now_ns = round((time.perf_counter() - began_s) * 1e9)
        for request in traffic.arrived(now_ns):
            _send(manager, request, tokens[request.index])
        answer = manager.get_result(timeout=_POLL_S)
        if answer is not None:
            request = _answered(answer, traffic.requests)
            answers[request.index] = answer
            traffic.answered([request], round((time.perf_counter() - began_s) * 1e9))
    return _served(load, traffic.requests, [answers[at] for at in range(len(answers))], began_s)


def _send(manager: Any, request: Request, tokens: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
    manager.add_request(
        tokens[: request.prompt_tokens].tolist(),
        request_id=str(request.index),
        max_new_tokens=request.output_tokens,
        record_timestamps=True,
        eos_token_id=-1,
    )


def _answered(answer: Any, requests: list[Request]) -> Request:
    """The request of an answer, checked: it has all its tokens, and the engine knows when they came."""
    request = requests[int(answer.request_id)]
    if answer.error is not None:
        raise BadInput(f"failed in the engine: {answer.error}", where=f"request {request.index + 1}")
    if len(answer.timestamps) != request.output_tokens:
        raise BadInput(_FORGOTTEN, where=f"request {request.index + 1}")
    return request


def _served(load: Requests, requests: list[Request], answers: list[Any], began_s: float) -> Served:
    """Stamps of the engine as columns, in seconds since the start."""
    import numpy as np

    from kernels_profiling.records import Served

    stamps = [np.array(answer.timestamps) - began_s for answer in answers]
    gaps_ns = np.concatenate([np.rint(np.diff(times) * 1e9).astype(np.int64) for times in stamps])
    columns = {
        "request": np.arange(len(requests)),
        "arrival_s": np.array([request.arrival_ns / 1e9 for request in requests]),
        "scheduled_s": np.array([answer.lifespan[0] - began_s for answer in answers]),
        "first_token_s": np.array([times[0] for times in stamps]),
        "last_token_s": np.array([times[-1] for times in stamps]),
        "prompt_tokens": load.prompt_tokens,
        "output_tokens": load.output_tokens,
        "preemptions": np.zeros(len(requests), dtype=np.int64),
    }
    values, counts = np.unique(gaps_ns, return_counts=True)
    return Served(load=load, requests=columns, gaps=(values, counts))
