"""Flower's SecAgg+ at the same size, by its own functions, without its network; run inside the peers' environment.

`python flower_peer.py WORDS MEMBERS ROUNDS` prints JSON: least CPU seconds of one client's round (shares, quantising,
masks, its answer), of the same without quantising, and of the server's unmasking. Every client is a neighbour of every
other, the threshold is ours, all other settings are Flower's defaults.
"""

import json
import sys
import time
from importlib import import_module
from typing import Any

import flwr
import numpy as np
from flwr.common import ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    get_parameters_shape,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

mod = import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
multiply, quantize = mod.parameters_multiply, mod.quantize
MODULUS = 1 << 32


def _set_up(states: list[Any], setup: dict[str, Any]) -> dict[str, tuple[bytes, bytes]]:
    """Everybody's public keys, by number."""
    keys = {}
    for number, state in enumerate(states):
        state.nid = number
        public = mod._setup(state, dict(setup))
        keys[str(number)] = (public[Key.PUBLIC_KEY_1], public[Key.PUBLIC_KEY_2])
    return keys


def _delivered(shared: list[dict[str, Any]]) -> dict[int, tuple[list[bytes], list[int]]]:
    """By member, the sealed shares for it and who sent each."""
    inbox: dict[int, tuple[list[bytes], list[int]]] = {n: ([], []) for n in range(len(shared))}
    for source, reply in enumerate(shared):
        for target, sealed in zip(reply[Key.DESTINATION_LIST], reply[Key.CIPHERTEXT_LIST], strict=True):
            inbox[target][0].append(sealed)
            inbox[target][1].append(source)
    return inbox


def main(words: int, members: int, rounds: int) -> None:
    """Run the client's part for one of the members, and the server's for all."""
    client, masking, server = float("inf"), float("inf"), float("inf")
    for _ in range(rounds):
        states = [mod.SecAggPlusState() for _ in range(members)]
        setup = {
            Key.SAMPLE_NUMBER: members,
            Key.SHARE_NUMBER: members,
            Key.THRESHOLD: 2 * members // 3 + 1,
            Key.CLIPPING_RANGE: 8.0,
            Key.TARGET_RANGE: 1 << 22,
            Key.MOD_RANGE: MODULUS,
            Key.MAX_WEIGHT: 1000.0,
        }
        keys = _set_up(states, setup)
        spent, quantising = [0.0], [0.0]

        def timed(call, *arguments, into=spent):  # type: ignore[no-untyped-def]
            start = time.process_time()
            result = call(*arguments)
            into[0] += time.process_time() - start
            return result

        def apart(call, timed=timed, into=quantising):  # type: ignore[no-untyped-def]
            return lambda *arguments: timed(call, *arguments, into=into)

        shared = [mod._share_keys(state, keys) for state in states[1:]]
        shared.insert(0, timed(mod._share_keys, states[0], keys))
        inbox = _delivered(shared)
        update = ndarrays_to_parameters([np.random.default_rng(0).normal(0, 1, words).astype(np.float32)])
        configs = {Key.CIPHERTEXT_LIST: inbox[0][0], Key.SOURCE_LIST: inbox[0][1]}
        mod.parameters_multiply, mod.quantize = (apart(call) for call in (multiply, quantize))
        timed(mod._collect_masked_vectors, states[0], configs, 1, update)
        everybody = list(range(members))
        timed(mod._unmask, states[0], {Key.ACTIVE_NODE_ID_LIST: everybody, Key.DEAD_NODE_ID_LIST: []})
        client = min(client, spent[0])
        masking = min(masking, spent[0] - quantising[0])

        for number, state in enumerate(states[1:], start=1):  # only their shares are needed
            for source, sealed in zip(inbox[number][1], inbox[number][0], strict=True):
                plain = mod.decrypt(state.ss2_dict[source], sealed)
                *_, seed, key = mod.share_keys_plaintext_separate(plain)
                state.rd_seed_share_dict[source], state.sk1_share_dict[source] = seed, key
        shares = {n: [state.rd_seed_share_dict[n] for state in states] for n in everybody}
        vector = [np.zeros(1, dtype=np.int64), np.random.default_rng(1).integers(0, MODULUS, words, dtype=np.int64)]
        spent[0] = 0.0

        def unmask(vector: list[np.ndarray], shares: dict = shares) -> list[np.ndarray]:
            """As SecAggPlusWorkflow.unmask_stage does without dropped clients."""
            for given in shares.values():
                secret = combine_shares(given)
                mask = pseudo_rand_gen(secret, MODULUS, get_parameters_shape(vector))
                vector = parameters_subtraction(vector, mask)
            return parameters_mod(vector, MODULUS)

        timed(unmask, parameters_addition(vector, [np.zeros(1, np.int64), np.zeros(words, np.int64)]))
        server = min(server, spent[0])
    print(json.dumps({"version": flwr.__version__, "client": client, "masking": masking, "server": server}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
