"""Several processes calibrate as one: over any split of the data, and whatever happens to one of them."""

import copy
import functools
import itertools
import os
import re
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from cases import NVFP4
from hypothesis import given
from hypothesis import strategies as st
from models import W8A8, Products, make_config
from processes import Processes

import fxmse
from fxmse.calibration.merging import share_out
from fxmse.observers import ExactMSEObserver, Observer

ONE_BATCH = Products.make_batches(1)
IMATRIX = make_config(weights={"num_bits": 4, "strategy": "group", "group_size": 8, "observer": "imatrix_mse"})


def cut(batches, lengths):
    """Parts of ``batches``, in order; some may be empty."""
    remaining = iter(batches)
    return [list(itertools.islice(remaining, length)) for length in lengths]


def make_static_config(name):
    return make_config(inputs={"num_bits": 8, "symmetric": False, "observer": name})


def prepare(config, seed=0):
    return fxmse.prepare(torch.fx.symbolic_trace(Products(seed).eval()), config)


def get_state(observed):
    """What the observers know."""
    state = observed.state_dict()
    return copy.deepcopy({name: state[name] for name in state if "_observer." in name or "_importance." in name})


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def three():
    with Processes(3) as processes:
        yield processes


@functools.cache
def make_group(ranks):
    return dist.new_group(list(ranks)) if ranks else dist.group.WORLD


def calibrate(config, batches, *, before=(), ranks=(), seed=0, seconds=30):
    """The state of a graph that was shown ``before`` by one process and then ``batches`` by all, and its qparams."""
    observed = prepare(config, seed)
    if before:
        fxmse.calibrate(observed, before, progress=False)
    group = make_group(tuple(ranks))
    fxmse.calibrate(observed, batches, progress=False, group=group, timeout=timedelta(seconds=seconds))
    return get_state(observed), fxmse.convert(observed).state_dict()


def calibrate_alone(config, batches):
    observed = fxmse.calibrate(prepare(config), batches, progress=False)
    return get_state(observed), fxmse.convert(observed).state_dict()


def calibrate_in(processes, config, shards, **kwargs):
    """The state and the qparams that every rank ends with."""
    results = processes(calibrate, [{"batches": shard} for shard in shards], config=config, **kwargs)
    for state, qparams in results:
        assert_equal(state, results[0][0])
        assert_equal(qparams, results[0][1])
    return results[0]


@pytest.mark.parametrize("name", ["static_minmax", "exact_mse"])
@pytest.mark.parametrize("lengths", [(2, 1, 4), (3, 0, 4), (0, 0, 7)])
def test_any_split_has_the_qparams_of_one_process(three, name, lengths):
    config = make_static_config(name)
    alone, expected = three(calibrate_alone, config=config, batches=Products.make_batches())[0]
    state, qparams = calibrate_in(three, config, cut(Products.make_batches(), lengths))
    assert_equal(state, alone)
    assert_equal(qparams, expected)


@pytest.mark.parametrize("name", ["mse", "minmax"])
def test_averages_are_weighed_by_how_many_batches_they_are_of(three, name):
    config, shards = make_static_config(name), cut(Products.make_batches(), (5, 0, 2))
    first, _, last = three(calibrate_alone, [{"batches": shard} for shard in shards], config=config)
    state, _ = calibrate_in(three, config, shards)
    for end in ("min", "max"):
        tensor = f"alpha.input_observer.observer.{end}_vals"
        torch.testing.assert_close(state[tensor], (5 * first[0][tensor] + 2 * last[0][tensor]) / 7, rtol=1e-6, atol=0)
    assert state["alpha.input_observer.observer.num_values"] == 7


def test_importance_is_that_of_all_data(three):
    shards = cut(Products.make_batches(), (3, 0, 4))
    alone, expected = three(calibrate_alone, config=IMATRIX, batches=Products.make_batches())[0]
    state, qparams = calibrate_in(three, IMATRIX, shards)
    assert list(state) == list(alone)
    assert len([name for name in state if name.endswith("squares")]) == 2  # alpha, beta and gamma read one value
    for name, tensor in alone.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-6, atol=0)
    for name, tensor in expected.items():
        torch.testing.assert_close(qparams[name], tensor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["static_minmax", "exact_mse"])
def test_what_was_seen_before_counts_once(three, name):
    config, batches = make_static_config(name), Products.make_batches()
    alone, _ = three(calibrate_alone, config=config, batches=batches)[0]
    state, _ = calibrate_in(three, config, cut(batches[3:], (1, 2, 1)), before=batches[:3])
    assert_equal(state, alone)
    _, twice = three(calibrate_alone, config=config, batches=[*batches[:3], *batches])[0]
    assert name == "static_minmax" or not all(map(torch.equal, state.values(), twice.values()))


def test_averages_from_before_weigh_as_much_as_their_batches(three):
    config, batches = make_static_config("mse"), Products.make_batches()
    shards = cut(batches[4:], (1, 1, 1))
    before = three(calibrate_alone, config=config, batches=batches[:4])[0][0]
    state, _ = calibrate_in(three, config, shards, before=batches[:4])
    added, _ = calibrate_in(three, config, shards)
    name = "omega.input_observer.observer.max_vals"
    torch.testing.assert_close(state[name], (4 * before[name] + 3 * added[name]) / 7, rtol=1e-6, atol=0)
    assert state["omega.input_observer.observer.num_values"] == 7


def test_a_group_may_be_a_part_of_the_world_or_one_process(three):
    config = make_static_config("mse")
    first, second, third = cut(Products.make_batches(), (4, 0, 3))
    shards = [{"batches": first}, {"batches": second}, {"batches": third}]
    one, other, last = three(calibrate, shards, config=config, ranks=[0, 2])
    assert_equal(one[0], last[0])
    assert one[0]["alpha.input_observer.observer.num_values"] == 7
    assert other[0] == "ValueError"
    assert "expected a process group that this process is in" in other[1]
    alone = three(calibrate_alone, config=config, batches=first)[0]
    shards[0]["batches"] = first[2:]
    of_one, *_ = three(calibrate, shards, config=config, ranks=[0], before=first[:2])
    assert_equal(of_one[0], alone[0])


def count_searches(config, batches):
    """The weights that this process has searched, of how many elements, in calibration and in conversion."""
    searched = []
    update, find_shared = Observer._update_groups, ExactMSEObserver.find_shared_global_range

    def count(observer, state, value):
        if observer.base_name == "weight":
            searched.append((observer.name, value.numel()))
        return update(observer, state, value)

    def count_shared(observers, weights):
        searched.append(("shared scale", 0))
        return find_shared(observers, weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Observer, "_update_groups", count)
        patch.setattr(ExactMSEObserver, "find_shared_global_range", staticmethod(count_shared))
        observed = prepare(config)
        for _ in range(2):
            fxmse.calibrate(observed, batches, progress=False, group=dist.group.WORLD)
        calibrated = list(searched)
        quantized = fxmse.convert(observed, group=dist.group.WORLD)
        fxmse.convert(observed)
    return calibrated, searched[len(calibrated) :], quantized.state_dict()


def merge_searches(parts):
    return sorted(name for part in parts for name, _ in part)


NAMES = [f"{name}.weight" for name in ("alpha", "beta", "gamma", "omega")]


def test_weights_are_searched_once_and_split_by_size(three):
    calibrated, converted, qparams = zip(*three(count_searches, config=W8A8, batches=ONE_BATCH), strict=True)
    assert merge_searches(calibrated) == NAMES
    # The largest is as large as two of the others.
    assert sorted([size for _, size in part] for part in calibrated) == [[128], [128, 128], [256]]
    assert merge_searches(converted) == []
    assert_equal(qparams[1], qparams[0])


def test_weights_that_wait_for_data_are_searched_once_in_conversion(three):
    calibrated, converted, qparams = zip(*three(count_searches, config=IMATRIX, batches=ONE_BATCH), strict=True)
    assert merge_searches(calibrated) == []
    assert merge_searches(converted) == NAMES
    assert all(converted)
    assert_equal(qparams[1], qparams[0])


@pytest.mark.parametrize("observer", ["memoryless_mse", "exact_mse"])
def test_weights_that_share_a_scale_are_searched_once_with_it(three, observer):
    config = make_config(weights={**NVFP4.model_dump(), "group_size": 8, "observer": observer})
    calibrated, converted, qparams = zip(*three(count_searches, config=config, batches=[]), strict=True)
    assert merge_searches(calibrated) == NAMES
    assert merge_searches(converted) == [*NAMES[:3], *["shared scale"] * (observer == "exact_mse")]
    assert all(converted)
    _, expected = three(calibrate_alone, config=config, batches=[])[0]
    for found in qparams:
        assert_equal(found, expected)


def test_weights_that_only_one_rank_knows_are_searched_again(three):
    config, before = make_config(weights={**NVFP4.model_dump(), "group_size": 8}), ONE_BATCH
    results = three(calibrate, [{}, {"before": before}, {}], config=config, batches=[])
    assert_equal(results[1][0], results[0][0])
    assert_equal(results[1][1], results[0][1])


@given(st.lists(st.integers(1, 100), max_size=20), st.integers(1, 5))
def test_no_rank_has_more_to_do_than_another_by_more_than_its_last_job(sizes, num_ranks):
    owners = share_out(sizes, num_ranks)
    assert len(owners) == len(sizes)
    loads = [sum(s for s, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(num_ranks)]
    assert max(loads) - min(loads) <= max(sizes, default=0)
    assert len([load for load in loads if load]) == min(num_ranks, len(sizes))


AVERAGES = make_static_config("mse")


@pytest.mark.parametrize(
    ("config", "other", "difference"),
    [
        (AVERAGES, {"config": make_static_config("minmax")}, "gamma.input: observer is mse on rank 0 and minmax on"),
        (AVERAGES, {"config": make_config()}, "gamma.input: place is 1 on rank 0 and missing on"),
        (AVERAGES, {"seed": 1}, r"alpha.weight: checksum is -?\d+ on rank 0 and -?\d+ on"),
        (AVERAGES, {"before": ONE_BATCH}, r"gamma.input: state is empty on rank 0 and \w{12} on"),
        (IMATRIX, {"before": ONE_BATCH}, r"alpha.weight_importance: state is empty on rank 0 and \w{12} on"),
    ],
)
def test_what_the_ranks_do_not_have_in_common_is_named(three, config, other, difference):
    for kind, words in three(calibrate, [{}, {}, other], config=config, batches=ONE_BATCH):
        assert kind == "ValueError"
        assert re.search(f"the ranks do not do the same: .*{difference} rank 2. All need the same", words)


def convert_or_calibrate(is_calibrated):
    observed = fxmse.calibrate(prepare(AVERAGES), ONE_BATCH, progress=False)
    if is_calibrated:
        fxmse.convert(observed, group=dist.group.WORLD)
    else:
        fxmse.calibrate(observed, ONE_BATCH, progress=False, group=dist.group.WORLD)


def test_ranks_that_do_different_things_are_told_so(three):
    for kind, words in three(convert_or_calibrate, [{"is_calibrated": rank == 1} for rank in range(3)]):
        assert kind == "ValueError"
        assert "the call is calibrate on rank 0 and convert on rank 1" in words


def test_data_that_reaches_nothing_is_an_error_of_all(three):
    for kind, words in three(calibrate, config=W8A8, batches=[]):
        assert kind == "ValueError"
        assert re.search(r"0 batches .* showed nothing to alpha.input, beta.input, gamma.input; omega.input", words)


def fail(failing, bad):
    """What calibrating fails with, and how long it took; everything is left as it was."""
    observed, group = prepare(make_static_config("static_minmax")), dist.group.WORLD
    good, *others = Products.make_batches(3)
    fxmse.calibrate(observed, [good], progress=False, group=group)
    before, start = get_state(observed), time.monotonic()
    # The others would never end by themselves.
    batches = itertools.chain(others, bad()) if group.rank() == failing else itertools.cycle(others)
    words = ()
    try:
        fxmse.calibrate(observed, batches, progress=False, group=group, timeout=timedelta(seconds=30))
    except Exception as error:
        words = type(error).__name__, "\n".join([str(error), *getattr(error, "__notes__", [])])
    seconds = time.monotonic() - start
    assert_equal(get_state(observed), before)
    fxmse.calibrate(observed, others, progress=False, group=group)  # it can go on
    return *words, seconds


def make_nan():
    yield torch.full((2, 16), torch.nan)


def read_badly():
    time.sleep(0.2)
    raise OSError("disk on fire")
    yield


@pytest.mark.parametrize(
    ("failing", "bad", "kind", "words"),
    [
        (
            0,
            make_nan,
            "ValueError",
            "NaN or Inf in batch 3: alpha.input, beta.input, gamma.input has 32 NaN and 0 Inf among 32 elements",
        ),
        (2, read_badly, "OSError", "disk on fire"),
    ],
)
def test_the_error_of_one_rank_ends_them_all(three, failing, bad, kind, words):
    results = three(fail, failing=failing, bad=bad)
    for rank, (found_kind, found, seconds) in enumerate(results):
        assert found_kind == (kind if rank == failing else "RankError")
        assert ("" if rank == failing else f"rank {failing} failed: {kind}: ") + words in found
        assert "On every rank the observers of activations are as they were before this call" in found
        assert seconds < 25


def test_an_error_in_a_weight_is_one_of_all_ranks(three):
    results = three(calibrate_bad_weight)
    assert sorted(kind for kind, _ in results) == ["RankError", "RankError", "ValueError"]
    assert all("NaN or Inf in the weights: omega.weight has 1 NaN" in words for _, words in results)


def calibrate_bad_weight():
    observed = prepare(W8A8)
    with torch.no_grad():
        observed.get_parameter("omega.weight")[3, 4] = torch.nan
    fxmse.calibrate(observed, ONE_BATCH, progress=False, group=dist.group.WORLD)


def calibrate_until(what, victim, seconds):
    """Calibrates while something happens to a rank; the error, and how long it took."""
    observed = prepare(W8A8)
    start = time.monotonic()
    group = dist.group.WORLD

    def feed():
        yield from Products.make_batches(2)
        if what == "killed" and group.rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "hanging" and group.rank() == victim:
            time.sleep(3600)

    if what == "killed while merging" and group.rank() == victim:
        Observer.merge = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    if what == "never there" and group.rank() == victim:
        time.sleep(3600)
    try:
        fxmse.calibrate(observed, feed(), progress=False, group=group, timeout=timedelta(seconds=seconds))
    except RuntimeError as error:
        return type(error).__name__, str(error), time.monotonic() - start


@pytest.mark.parametrize(
    ("what", "victim", "seconds", "words"),
    [
        ("killed", 1, 60, "rank 1 ended without a word"),
        ("killed", 0, 60, "rank 0 ended without a word|the group's store ended: most often, that of rank 0"),
        ("killed while merging", 1, 60, "rank 1 ended without a word"),
        ("hanging", 1, 3, "rank 1 did not answer within 3 s"),
        ("never there", 2, 3, "rank 2 did not answer within 3 s"),
    ],
)
def test_a_rank_that_does_not_answer_ends_the_others(what, victim, seconds, words):
    with Processes(3) as processes:
        results = processes(calibrate_until, what=what, victim=victim, seconds=seconds, without=victim)
    for rank, result in enumerate(results):
        if rank != victim:
            kind, found, took = result
            assert kind == "RankError"
            assert re.search(words, found)
            assert took < 40
