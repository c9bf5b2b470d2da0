"""A strategy's state from round to round: what may be one, and that the strategy cannot harm the run with it."""

import re

import pytest
import torch
from helpers import assert_same_results

import fedsim
from fedsim.config import Config
from fedsim.errors import RunFailedError
from fedsim.strategies import Strategy, fedavg, fedavgm, weighted_mean

CONFIG = Config().override(
    {
        "data.dataset": "synthetic",
        "placement.mode": "serial",
        "model.name": "logistic",
        "training.local_epochs": 1,
        "clients.count": 4,
        "rounds": 4,
        "checkpoint.every_s": 3600.0,
    }
)

NO_STATES = [
    (None, "NoneType as its state"),
    ([torch.zeros(2)], "list as its state"),
    ({0: torch.zeros(2)}, "a state with the key 0"),
    ({"__metadata__": torch.zeros(2)}, "a state with the key '__metadata__'"),
    ({"step": 3}, "a state whose 'step' is int"),
    ({"moment": torch.eye(2).to_sparse()}, "a state whose 'moment' is a torch.sparse_coo tensor"),
]


@pytest.mark.parametrize(("state", "said"), NO_STATES)
def test_a_state_that_no_checkpoint_can_hold_fails_the_run_at_once(state, said):
    at_first = Strategy(lambda weights: state, fedavg().aggregate)
    with pytest.raises(
        RunFailedError, match=rf"round 0: the strategy's init gave {re.escape(said)}; .*\{{\}} for none"
    ):
        next(fedsim.rounds(CONFIG, strategy=at_first))
    later = Strategy(lambda weights: {}, lambda given, weights, updates, counts: (weights, state))
    records = fedsim.rounds(CONFIG, strategy=later)
    assert next(records).round == 0
    with pytest.raises(RunFailedError, match=f"round 1: the strategy's aggregate gave {re.escape(said)}"):
        next(records)


def in_place_tensors():
    """Server momentum that writes into all that it is given."""

    def aggregate(state, weights, updates, num_examples):
        state["velocity"].mul_(0.9).add_(weighted_mean(updates, num_examples))
        updates.zero_()
        num_examples.zero_()
        return weights.copy_(weights.double() + state["velocity"]), state

    return Strategy(fedavgm().init, aggregate)


def in_place_dictionary():
    """Server momentum that gives its state back in the dictionary that it got it in."""

    def aggregate(state, weights, updates, num_examples):
        state["velocity"] = 0.9 * state["velocity"] + weighted_mean(updates, num_examples)
        return (weights.double() + state["velocity"]).float(), state

    return Strategy(fedavgm().init, aggregate)


def kept_weights():
    """Server momentum that writes its weights into the same memory in every round."""
    memory = []

    def aggregate(state, weights, updates, num_examples):
        new, state = fedavgm().aggregate(state, weights, updates, num_examples)
        memory.append(torch.empty_like(new))
        return memory[0].copy_(new), state

    return Strategy(fedavgm().init, aggregate)


def with_gradients():
    """Server momentum whose tensors want gradients."""

    def aggregate(state, weights, updates, num_examples):
        weights, state = fedavgm().aggregate(state, weights, updates, num_examples)
        return weights.requires_grad_(), {"velocity": state["velocity"].requires_grad_()}

    return Strategy(fedavgm().init, aggregate)


def order_of_keys():
    """Server momentum in the first of many parts of a state, whatever they are called."""

    def init(weights):
        others = {f"a{number}": torch.zeros(len(weights)).double() for number in range(20)}
        return fedavgm().init(weights) | others

    def aggregate(state, weights, updates, num_examples):
        name, velocity = next(iter(state.items()))
        weights, new = fedavgm().aggregate({"velocity": velocity}, weights, updates, num_examples)
        return weights, state | {name: new["velocity"]}

    return Strategy(init, aggregate)


@pytest.mark.parametrize("make", [in_place_tensors, in_place_dictionary, kept_weights, with_gradients, order_of_keys])
def test_a_strategy_may_do_with_its_tensors_what_it_likes(tmp_path, make):
    own, calls = make(), []

    def aggregate(*given):
        calls.append(given)
        answer = own.aggregate(*given)
        if len(calls) == 3:  # the checkpoint of round 2 is yet to be written
            raise KeyboardInterrupt
        return answer

    with pytest.raises(KeyboardInterrupt):
        fedsim.run(CONFIG, results=tmp_path, name="a", strategy=Strategy(own.init, aggregate))
    resumed = fedsim.resume(tmp_path / "a", strategy=make())
    assert resumed.info["resumes"][0]["from_round"] == 3
    assert_same_results(resumed, fedsim.run(CONFIG, results=None, strategy=fedavgm()))
