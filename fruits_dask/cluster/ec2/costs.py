"""What rented machines cost, and when they have cost enough.

No price is known here: what AWS asks differs by region and changes. The user names those of the
machines in question, from https://aws.amazon.com/ec2/pricing/ or an agreement of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ...errors import ClusterError, ConfigError

_SECONDS_OF_HOUR = 3600.0
# AWS goes on to charge for machines while they shut down.
_GIVE_BACK_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How long the machines of a cluster may be used."""

    hourly: float | None
    """Price of an hour of all machines, without disks and traffic; None when it is not known."""
    max_cost: float | None
    """In the same currency."""
    max_hours: float
    """In any case."""
    clock: Callable[[], float] = time.time
    """Seconds; that of the wall, because a kept cluster outlives the process that rented it."""
    start: float = field(default_factory=time.time)
    """When the first machine was asked for, by that clock."""

    @property
    def hours(self) -> float:
        """After which the machines end by themselves, whoever watches."""
        if self.hourly is None or self.max_cost is None:
            return self.max_hours
        return min(self.max_hours, self.max_cost / self.hourly)

    def check(self) -> None:
        """Stop when the money or the time is spent.

        Raises
        ------
        ClusterError
            Saying how to go on.
        """
        hours = (self.clock() - self.start + _GIVE_BACK_SECONDS) / _SECONDS_OF_HOUR
        cost = None if self.hourly is None else self.hourly * hours
        if self.max_cost is not None and cost is not None and cost >= self.max_cost:
            spent = f"{cost:,.2f} of --max-cost {self.max_cost:,.2f}"
        elif hours >= self.max_hours:
            spent = f"{hours:.2f} of --max-hours {self.max_hours:g}"
        else:
            return
        raise ClusterError(
            f"the rented machines have used {spent}; they are given back, and what is stored "
            "stays: run again to resume, perhaps with a higher limit"
        )


def hourly_cost(
    prices: Mapping[str, float], scheduler: str, worker: str, n_workers: int
) -> float | None:
    """Add up what an hour of the machines costs.

    Parameters
    ----------
    prices : mapping of str to float
        Price of an hour, by instance type.
    scheduler, worker : str
        Instance types.
    n_workers : int
        Machines of the workers.

    Returns
    -------
    float or None
        None when a price is not known.
    """
    if scheduler not in prices or worker not in prices:
        return None
    return prices[scheduler] + n_workers * prices[worker]


def check_price(hourly: float | None, max_cost: float | None, kinds: set[str]) -> None:
    """Refuse a limit that cannot be watched, or that is spent before anything is done.

    Raises
    ------
    ConfigError
        Saying what is missing.
    """
    if max_cost is None:
        return
    if hourly is None:
        raise ConfigError(
            f"--max-cost needs the price of an hour of {' and '.join(sorted(kinds))}: set "
            "hourly_prices under [cluster], from https://aws.amazon.com/ec2/pricing/"
        )
    if max_cost / hourly * _SECONDS_OF_HOUR <= _GIVE_BACK_SECONDS:
        raise ConfigError(
            f"--max-cost {max_cost:g} is spent within a minute by machines that cost {hourly:g} an "
            "hour; raise it, or rent fewer --workers"
        )
