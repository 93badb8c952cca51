"""From the survivors' shares to the masks that are left in a sum.

Every secret is checked against the commitment that its owner sent with the masked vector, so a wrong share is found and
corrected where enough right ones are there. It is wrong because its owner dealt it so or because its sender changed it:
who is named depends on who quarrels with most.
"""

import hmac
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, islice

from fedmpt_core.secagg.errors import Abort, SecAggError
from fedmpt_core.secagg.keys import commit_edge, commit_self, self_mask_key
from fedmpt_core.secagg.messages import Masked, Unmasked
from fedmpt_core.secagg.shamir import Lagrange, correct

MOST_SUBSETS = 2000  # chosen: subsets of shares tried where decoding alone cannot decide


def suspects(disputes: Iterable[tuple[int, int]]) -> list[int]:
    """Members to leave out so that no dispute is left: the one with most first, of equals both. Ascending."""
    against: dict[int, set[int]] = {}
    for one, other in disputes:
        against.setdefault(one, set()).add(other)
        against.setdefault(other, set()).add(one)
    out: set[int] = set()
    while any(against.values()):
        most = max(len(others) for others in against.values())
        worst = {i for i, others in against.items() if len(others) == most}
        out |= worst
        against = {i: others - worst for i, others in against.items() if i not in worst}
    return sorted(out)


class Opening:
    """One round's shares."""

    def __init__(
        self,
        context: bytes,
        cohort: Sequence[int],
        survivors: Sequence[int],
        threshold: int,
        masked: Mapping[int, Masked],
        shares: Mapping[int, Unmasked],
    ) -> None:
        """Opens nothing yet.

        Args:
            context: of the round.
            cohort: member ids, ascending; a member's place in it gives its Shamir x.
            survivors: whose vectors are in the sum, ascending.
            threshold: shares that open a secret.
            masked: by survivor, its commitments.
            shares: by responder, at least `threshold` of them.
        """
        self._context, self._cohort, self._survivors, self._threshold = context, cohort, survivors, threshold
        self._masked, self._shares = masked, shares
        self._dropped = [m for m in cohort if m not in survivors]
        self._disputes: set[tuple[int, int]] = set()  # owner of a secret, sender of a share that does not fit
        self._lagrange: tuple[tuple[int, ...], Lagrange] | None = None

    @property
    def culprits(self) -> tuple[int, ...]:
        """Members that dealt or sent wrong shares, ascending; where it is one of two, both."""
        return tuple(suspects(self._disputes))

    def masks(self) -> tuple[list[bytes], list[bytes], list[bytes]]:
        """Mask keys left in the sum: self masks (added), edges to dropped members that were added, and subtracted.

        Raises:
            SecAggError: BAD_SHARE, a secret cannot be opened.
        """
        self_masks, plus, minus = [], [], []
        for place, u in enumerate(self._survivors):
            own = self._masked[u]
            seed = self._open(
                u,
                {m: message.self_shares[place] for m, message in self._shares.items()},
                lambda secret, own=own: hmac.compare_digest(commit_self(secret, self._context), own.self_commitment),
            )
            self_masks.append(self_mask_key(seed, self._context))
            others = [m for m in self._cohort if m != u]
            for k, d in enumerate(self._dropped):
                known = own.edge_commitments[others.index(d)]
                edge = self._open(
                    u,
                    {m: message.edge_shares[place][k] for m, message in self._shares.items()},
                    lambda secret, known=known, u=u, d=d: hmac.compare_digest(
                        commit_edge(secret, self._context, u, d), known
                    ),
                )
                (plus if u < d else minus).append(edge)
        if self._disputes:
            self._audit()
        return self_masks, plus, minus

    def _open(self, owner: int, shares: Mapping[int, bytes], fits: Callable[[bytes], bool]) -> bytes:
        """One secret; from the shares of those that are in no dispute first."""
        senders = self._trusted_first(shares)
        secret = self._combine(tuple(sorted(senders[: self._threshold])), shares)
        if secret is not None and fits(secret):
            return secret
        secret, right = self._search(owner, sorted(senders), shares, fits)
        if secret is None:
            raise SecAggError(
                Abort.BAD_SHARE,
                f"the secret of member {owner} does not open: it dealt wrong shares, or more than "
                f"{len(senders) - self._threshold} of {len(senders)} members sent wrong ones",
            )
        self._compare(owner, right, shares)
        return secret

    def _search(
        self, owner: int, senders: Sequence[int], shares: Mapping[int, bytes], fits: Callable[[bytes], bool]
    ) -> tuple[bytes | None, tuple[int, ...]]:
        xs = {self._x(m): m for m in senders}
        try:
            secret, bad = correct(list(xs), [shares[m] for m in senders], self._threshold)
            agreeing = tuple(m for x, m in xs.items() if x not in bad)
            if fits(secret):
                return secret, agreeing[: self._threshold]
            if len(agreeing) > self._threshold:
                # more shares than one needs lie on one polynomial, and it is not the one that the owner committed to
                self._disputes |= {(owner, m) for m in agreeing}
        except SecAggError:
            pass  # more wrong shares than decoding finds; the commitment still tells which subset is right
        for subset in islice(combinations(senders, self._threshold), MOST_SUBSETS):
            secret = self._combine(subset, shares)
            if secret is not None and fits(secret):
                return secret, subset
        return None, ()

    def _audit(self) -> None:
        """Once something was wrong, compare every share of every self mask, to tell who quarrels with whom."""
        for place, owner in enumerate(self._survivors):
            shares = {m: message.self_shares[place] for m, message in self._shares.items()}
            self._compare(owner, tuple(sorted(self._trusted_first(shares)[: self._threshold])), shares)

    def _compare(self, owner: int, right: tuple[int, ...], shares: Mapping[int, bytes]) -> None:
        self._disputes |= {(owner, m) for m in shares if m not in right and not self._agrees(m, right, shares)}

    def _trusted_first(self, senders: Iterable[int]) -> list[int]:
        quarrels = Counter(sender for _, sender in self._disputes)
        return sorted(senders, key=lambda m: (quarrels[m], m))

    def _agrees(self, member: int, right: tuple[int, ...], shares: Mapping[int, bytes]) -> bool:
        """Whether a share lies on the polynomial through the right ones."""
        swapped = (*right[1:], member)
        return self._combine(swapped, shares) == self._combine(right, shares)

    def _combine(self, members: tuple[int, ...], shares: Mapping[int, bytes]) -> bytes | None:
        if self._lagrange is None or self._lagrange[0] != members:
            self._lagrange = members, Lagrange([self._x(m) for m in members])
        try:
            return self._lagrange[1].combine([shares[m] for m in members])
        except SecAggError:
            return None

    def _x(self, member: int) -> int:
        return list(self._cohort).index(member) + 1
