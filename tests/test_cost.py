"""What a step is said to cost, against counting by hand and XLA's count of FLOPs."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import TINY

from fr3e_jax.cost import pairs_of, rollout_cost, update_flops, utilisation
from fr3e_jax.models.decoder import abstract_params, graph_of
from fr3e_jax.types import Batch, Bundle, Queries, Rollouts, States, Trunks

CONFIG = dataclasses.replace(TINY, hidden_size=128, intermediate_size=512, head_dim=32, num_hidden_layers=1)


def test_flops_of_a_forward_pass_are_those_that_xla_counts():
    """One layer, since XLA has a loop once; all pairs of tokens, since it has no mask."""
    graph, size = graph_of(CONFIG), 64

    def forward(params, token):
        model = nnx.merge(graph, params)
        return model.logits(model(token, jnp.arange(size), size)[0])

    token = jax.ShapeDtypeStruct((size,), jnp.int32)
    counted = jax.jit(forward).lower(abstract_params(CONFIG), token).compile().cost_analysis()["flops"]
    ours = CONFIG.forward_flops(size, size * size, size)
    assert 0 < counted / ours - 1 < 0.05  # norms, rotations and softmax come on top


def test_pairs_are_counted_one_token_after_another():
    expected = sum(start + i + 1 for start, new in [(0, 5), (7, 3), (4, 0)] for i in range(new))
    assert pairs_of(np.array([0, 7, 4]), np.array([5, 3, 0])) == expected


def rollouts_of(length):
    length = np.array(length, np.int32)
    nothing = np.zeros((*length.shape, 8), np.float32)
    return Rollouts(nothing.astype(np.int32), nothing, nothing, nothing, length, length > 0)


QUERIES = Queries(np.zeros((2, 8), np.int32), np.array([5, 7], np.int32), np.array([0, 1], np.int32))


def test_answers_from_the_query_prefill_it_once_and_reuse_it():
    cost = rollout_cost(CONFIG, QUERIES, rollouts_of([[3, 1, 2], [4, 4, 4]]), 40)
    assert cost["tokens/generated"] == 18
    assert cost["tokens/prefilled"] == 12
    assert cost["tokens/reused"] == 2 * 5 + 2 * 7  # two of three answers to each
    assert cost["rows/decoded"] == 40
    alone = CONFIG.forward_flops(12, pairs_of(0, [5, 7]), 0)
    for query, lengths in ((5, (3, 1, 2)), (7, (4, 4, 4))):
        for new in lengths:  # the first draw runs the query's last token
            alone += CONFIG.forward_flops(new, sum(query + i for i in range(new)), new)
    assert cost["flops"] == alone


def test_restarts_reuse_their_whole_prefix_and_states_that_did_not_start_none():
    states = States(
        query=np.array([1], np.int32),
        base=np.array([0], np.int32),
        response=np.zeros((1, 8), np.int32),
        prefix_length=np.array([[0, 4, 6]], np.int32),
        valid=np.array([[True, True, False]]),
    )
    cost = rollout_cost(CONFIG, QUERIES, rollouts_of([[2, 3, 1, 1, 0, 0]]), 9, states)
    assert cost["tokens/reused"] == 7 + 7 + 11 + 11
    assert cost["tokens/prefilled"] == 0
    assert cost["tokens/generated"] == 7


def test_an_update_is_three_forward_passes_over_its_rows():
    def rows(length, start, prefix):
        number = len(length)
        token, nothing = np.zeros((number, 16), np.int32), np.zeros((number, 16), np.float32)
        numbers = [np.array(x, np.int32) for x in (length, start, [0] * number, prefix)]
        return Batch(token, *numbers[:2], nothing, nothing[:, 0], *numbers[2:])

    # The last token of a row is only a target.
    flat = Bundle(None, (rows([10], [6], [0]), rows([16], [4], [0])), (0, 0))
    assert update_flops(CONFIG, [flat]) == 3 * CONFIG.forward_flops(9 + 15, 45 + 120, 4 + 12)
    # The first 5 tokens of both once; a third row only fills the chunk up.
    trunks = Trunks(np.zeros((1, 1, 8), np.int32), np.array([[5]], np.int32))
    shared = Bundle(trunks, (rows([5, 11, 1], [1, 1, 1], [5, 5, 0]),), (8,))
    tokens, pairs = 5 + 4 + 10, 15 + (20 + 10) + (50 + 55)
    assert update_flops(CONFIG, [shared]) == 3 * CONFIG.forward_flops(tokens, pairs, 4 + 10)


TOLD = {
    "flops/update": 6e15,
    "flops/explore": 1e15,
    "time/update": 20.0,
    "time/explore": 8.0,
    "time/step": 40.0,
}


def devices(*kinds):
    return [SimpleNamespace(device_kind=kind) for kind in kinds]


@pytest.mark.parametrize(
    ("kind", "update"),
    [
        # 6e15 in 20 s on two devices: 1.5e14 a second on each.
        ("TPU v4", 0.5454545),
        ("TPU v5 lite", 0.7614213),
        ("TPU v5p", 0.3267974),
        ("TPU v6 lite", 0.1633987),
        ("NVIDIA A100-SXM4-80GB", 0.4807692),
        ("NVIDIA H100 80GB HBM3", 0.1516684),
        ("NVIDIA H200", 0.1516684),
    ],
)
def test_utilisation_is_the_share_of_all_devices_peak(kind, update):
    found = utilisation(TOLD, devices(kind, kind))
    np.testing.assert_allclose(found["flops/utilisation_update"], update, rtol=1e-6)
    # A sixth of the FLOPs in two fifths of the time.
    np.testing.assert_allclose(found["flops/utilisation_explore"], update / 6 / 0.4, rtol=1e-6)
    assert len(found) == 2


def test_utilisation_is_told_only_where_every_devices_peak_is_known():
    assert utilisation(TOLD, jax.devices()) == {}
    assert utilisation(TOLD, devices("TPU v4", "TPU v9")) == {}
    # A seventh of a card, and one with a lower peak, have names that begin like the card's.
    assert utilisation(TOLD, devices("NVIDIA H100 80GB HBM3 MIG 1g.10gb")) == {}
    assert utilisation(TOLD, devices("NVIDIA H100 PCIe")) == {}


def test_a_stage_that_took_no_time_has_no_utilisation():
    """A step that the carried states fill has no rollouts."""
    told = {"flops/update": 1e12, "flops/explore": 0.0, "time/update": 1.0, "time/explore": 0.0}
    assert list(utilisation(told, devices("TPU v4"))) == ["flops/utilisation_update"]
    assert list(utilisation({"flops/update": 1e12, "time/update": 1.0}, devices("TPU v4")))
