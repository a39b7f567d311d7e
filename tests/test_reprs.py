"""What a session shows of an answer, a deployment or a result: one line, and the headline where it is asked for."""

from __future__ import annotations

from test_search import question, space, toy

import apexsim
from apexsim.search.headline import headline
from apexsim.search.study import search
from apexsim.specs.slo import SLO


def test_a_study_is_shown_in_a_line() -> None:
    study = search(question(), evaluate=toy)
    assert repr(study) == f"<Study llama-3.1-70b on 8xh100-sxm by latency: win, first {study.rows[0].candidate.name}>"
    assert study.headline == headline(study)
    assert study.headline.startswith("best by latency: ")


def test_a_study_without_a_winner_says_so() -> None:
    study = search(question(slo=SLO(ttft_s=1.0), space=space(devices=1)), evaluate=toy)
    assert repr(study) == "<Study llama-3.1-70b on 1xh100-sxm by latency: none of 1 plans keeps the SLO>"


def test_a_notebook_shows_the_headline_over_the_table() -> None:
    study = search(question(), evaluate=toy)
    shown = study._repr_html_()
    assert shown.startswith("<p>best by latency: ")
    assert all(f"<td>{row.candidate.name}</td>" in shown for row in study.rows)


def test_a_deployment_and_its_result_are_shown_in_a_line() -> None:
    served = apexsim.deployment(model="llama-3.1-8b", device="a100-sxm", tensor=2, replicas=2)
    assert repr(served) == "<Deployment llama-3.1-8b, 4 x a100-sxm, tp2-pp1-dp2, vllm-v1-async>"
    assert repr(served.cluster.device) == "<DeviceProfile a100-sxm>"
    result = apexsim.simulate(served, apexsim.workload("chat", requests=5))
    assert repr(result).startswith("<SimulationResult chat, 5 of 5 requests finished in ")
    assert repr(result).endswith(f" s, {served!r}>")
