"""A run over two processes goes on from its checkpoint to the bit, and so does one process."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from dense import CASES, SPREADS, SWITCHED, Model
from ranks import results


@pytest.mark.parametrize("spread", SPREADS)
def test_a_checkpoint_resumes_to_the_bit_and_loads_without_ranks(world, spread):
    made = results(world, f"checkpoint {spread}")
    for rank in made:
        (loss, weights), (loss_resumed, resumed) = rank["on"], rank["resumed"]
        assert loss == loss_resumed
        assert [n for n in weights if not torch.equal(weights[n], resumed[n])] == []
    model = Model(CASES[0], seed=3)
    weights = model.state_dict()
    dcp.load({"model": weights}, checkpoint_id=str(world[1] / f"checkpoint {spread}"), no_dist=True)
    assert [n for n, w in made[0]["saved"].items() if not torch.equal(w, weights[n])] == []
    assert set(made[0]["saved"]) == set(weights)


def test_a_switch_under_fsdp_and_checkpointing_resumes_to_the_bit_and_back_compiles_nothing(world):
    for rank in results(world, SWITCHED.name):
        (loss, weights), (loss_resumed, resumed) = rank["on"], rank["resumed"]
        first, second, third = rank["recipes"]
        assert first
        assert set(map(tuple, first)) == {("bf16",)}
        assert second == [{"mxfp8"}] * len(first)
        assert third == []
        assert loss == loss_resumed
        assert [n for n in weights if not torch.equal(weights[n], resumed[n])] == []
