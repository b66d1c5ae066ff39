# SPDX-FileCopyrightText: The monai_unlearn authors
# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from torch import nn

from monai_unlearn import Rule, compose_networks, compose_state_dicts

STATISTICS = ("1.running_mean", "1.running_var", "1.num_batches_tracked")


def network(seed):
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    made.train()(torch.randn(8, 3))  # statistics of its own
    return made.eval()


BASE, A, B = network(0), network(1), network(2)
STATES = {"a": A.state_dict(), "b": B.state_dict()}


def composed(*rules, statistics="base"):
    return compose_state_dicts(BASE.state_dict(), STATES, rules, statistics, STATISTICS)


def test_a_head_is_swapped_bit_for_bit_and_nothing_else():
    state = composed(Rule("2.*", take="a"))
    for name, value in state.items():
        expected = STATES["a"][name] if name.startswith("2.") else BASE.state_dict()[name]
        assert torch.equal(value, expected) and value is not expected


@pytest.mark.parametrize("rule,formula", [
    (Rule("*", mix={"a": 0.3}), lambda o, a, b: 0.7 * o + 0.3 * a),
    (Rule("*", mix={"a": 0.25, "b": 0.5}), lambda o, a, b: 0.25 * o + 0.25 * a + 0.5 * b),
    (Rule("*", add={"a": 1.0, "b": 1.0}), lambda o, a, b: a + b - o),
    (Rule("*", add={"a": -1.0}), lambda o, a, b: 2 * o - a),
    (Rule("*", add={}), lambda o, a, b: o),
])  # fmt: skip
def test_mixtures_and_task_vectors_have_their_closed_form(rule, formula):
    state = composed(rule)
    for name, value in BASE.state_dict().items():
        if name not in STATISTICS:
            torch.testing.assert_close(state[name], formula(value, STATES["a"][name], STATES["b"][name]))


def test_the_first_rule_that_matches_decides():
    state = composed(Rule("2.*", take="b"), Rule("*", take="a"))
    assert torch.equal(state["2.weight"], STATES["b"]["2.weight"])
    assert torch.equal(state["0.weight"], STATES["a"]["0.weight"])


@pytest.mark.parametrize("statistics", ["base", "a", "b"])
def test_statistics_follow_their_own_rule_alone(statistics):
    state = composed(Rule("*", mix={"a": 0.5}), statistics=statistics)
    source = {"base": BASE.state_dict(), **STATES}[statistics]
    assert all(torch.equal(state[name], source[name]) for name in STATISTICS)


@pytest.mark.parametrize("rules,statistics,message", [
    ([Rule("*", take="c")], "base", "no source c"),
    ([Rule("*", take="a")], "d", "no source d"),
    ([Rule("head.*", take="a")], "base", "no weight is called head"),
    ([Rule("1.running_mean", take="a")], "base", "no weight is called 1.running_mean"),
])  # fmt: skip
def test_rules_that_mean_nothing_are_refused(rules, statistics, message):
    with pytest.raises(ValueError, match=message):
        composed(*rules, statistics=statistics)


def test_a_rule_goes_one_way():
    for ways in ({}, {"take": "a", "mix": {"a": 0.5}}):
        with pytest.raises(ValueError, match="exactly one"):
            Rule("*", **ways)


def test_incompatible_models_are_refused_by_name():
    state = dict(BASE.state_dict())
    del state["2.bias"]
    with pytest.raises(ValueError, match="a and the base differ in 1 weights, such as 2.bias"):
        compose_state_dicts(BASE.state_dict(), {"a": state}, [], "base")
    state["2.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"2.bias is \(2,\) torch.float32 in the base and \(3,\)"):
        compose_state_dicts(BASE.state_dict(), {"a": state}, [], "base")
    counts = {"n": torch.tensor([1])}
    with pytest.raises(ValueError, match="n holds whole numbers"):
        compose_state_dicts(counts, {"a": {"n": torch.tensor([2])}}, [Rule("*", mix={"a": 0.5})], "base")


def test_networks_are_composed_on_a_copy_and_have_to_differ():
    before = [copy.deepcopy(one.state_dict()) for one in (BASE, A)]
    image = torch.randn(5, 3)
    made = compose_networks(BASE, {"a": A}, [{"keys": "2.*", "take": "a"}], "base", image)
    torch.testing.assert_close(made(image), A[2](BASE[1](BASE[0](image))))
    assert not made.training and not any(p.requires_grad for p in made.parameters())
    for one, state in zip((BASE, A), before):
        torch.testing.assert_close(dict(one.state_dict()), dict(state), rtol=0, atol=0)
    with pytest.raises(ValueError, match="change nothing"):
        compose_networks(BASE, {"a": A}, [{"keys": "2.*", "take": "base"}], "base", image)
