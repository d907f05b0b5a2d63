"""The short forms of the reliability runs; `benchmarks/reliability.py` runs the long ones."""

from __future__ import annotations

import json
import random
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.reliability import ROOT, without_places
from fiftyfold.errors import FiftyfoldError
from tests.cases import CASES
from tests.reliability.fuzz_targets import TARGETS, Target
from tests.reliability.fuzzing import Fuzzer
from tests.reliability.kills import SUBJECTS, kill_many
from tests.reliability.resume_points import SETTINGS, compare_all

_FUZZERS: dict[str, Fuzzer] = {}
QUICK = [target for target in TARGETS if target.weight >= 4]
SLOW = [target for target in TARGETS if target.weight < 4]


@pytest.fixture
def fuzzer(request, tmp_path_factory):
    """One for each target, since preparing takes longest."""
    target = request.param
    if target.name not in _FUZZERS:
        _FUZZERS[target.name] = Fuzzer(target, tmp_path_factory.mktemp("fuzz"))
    return _FUZZERS[target.name]


def bite(fuzzer: Fuzzer, seed: int, rounds: int) -> None:
    source = random.Random(seed)
    data = source.choice(fuzzer.seeds)
    for _ in range(rounds):
        data = fuzzer.target.mutate(data, source, fuzzer.target.longest)
    fuzzer.feed(data)
    assert not fuzzer.failures, json.dumps(fuzzer.failures, indent=1)


HEALTH = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.mark.parametrize("fuzzer", QUICK, ids=lambda target: target.name, indirect=True)
@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=HEALTH)
@given(seed=st.integers(0, 2**32), rounds=st.integers(1, 4))
def test_mutated_files_give_clear_errors(fuzzer, seed, rounds):
    bite(fuzzer, seed, rounds)


@pytest.mark.parametrize("fuzzer", SLOW, ids=lambda target: target.name, indirect=True)
@settings(max_examples=4, deadline=None, derandomize=True, database=None, suppress_health_check=HEALTH)
@given(seed=st.integers(0, 2**32), rounds=st.integers(1, 3))
def test_mutated_models_and_recipes_give_clear_errors(fuzzer, seed, rounds):
    bite(fuzzer, seed, rounds)


@pytest.mark.parametrize("fuzzer", QUICK, ids=lambda target: target.name, indirect=True)
@settings(max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=HEALTH)
@given(data=st.binary(max_size=300))
def test_any_bytes_give_clear_errors(fuzzer, data):
    fuzzer.feed(data)
    assert not fuzzer.failures, json.dumps(fuzzer.failures, indent=1)


def test_the_fuzzer_notices_what_it_is_there_for(tmp_path):
    import pickle
    from pathlib import Path

    def misbehave(data, folder):
        if data == b"crash":
            raise KeyError("a")
        if data == b"write":
            Path(folder.parent / "elsewhere").write_text("x")
        if data == b"unpickle":
            pickle.loads(pickle.dumps(Path("x")))
        if data == b"memory":
            raise FiftyfoldError("refused") from MemoryError()
        raise FiftyfoldError("refused")

    (tmp_path / "in").mkdir()
    fuzzer = Fuzzer(Target("odd", lambda _: [b""], misbehave), tmp_path / "in")
    for count, data in enumerate((b"fine", b"crash", b"write", b"unpickle", b"memory")):
        fuzzer.feed(data)
        assert len(fuzzer.failures) == count, fuzzer.failures


def test_results_name_no_place_of_the_machine(tmp_path):
    def stumble(data, folder):
        json.loads((folder / "missing").read_text())

    fuzzer = Fuzzer(Target("odd", lambda _: [b""], stumble), tmp_path)
    fuzzer.feed(b"x")
    written = without_places(json.dumps(fuzzer.failures))
    assert "tests/reliability/fuzzing.py" in written
    assert str(ROOT) not in written
    assert tempfile.gettempdir() not in written


@pytest.mark.slow
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_kills_change_nothing(subject, tmp_path):
    report = kill_many(subject, tmp_path, at_random=1, while_writing=1, seed=4)
    assert report.survived(), report


@pytest.mark.slow
def test_resumes_with_dropout_and_shuffling_are_exact(tmp_path):
    report = compare_all(tmp_path, CASES[-1:], SETTINGS[:1])
    assert report.identical == report.compared == 10, report.different
