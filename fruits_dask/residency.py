"""In which region the bytes are, and whether they may be there."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from .errors import ConfigError
from .records import StoreOptions
from .storage import is_s3, open_store

LOCAL = "this machine"
UNSTATED = "not stated by the service"


def find_regions(addresses: Iterable[str], options: StoreOptions) -> dict[str, str]:
    """Ask the stores where they keep their bytes.

    Parameters
    ----------
    addresses : iterable of str
        Normalized addresses.
    options : StoreOptions
        How to reach S3.

    Returns
    -------
    dict of str to str
        Address -> region name, `LOCAL` for local folders, or `UNSTATED`.
    """
    return {
        address: (open_store(address, options).region(address) or UNSTATED)
        if is_s3(address)
        else LOCAL
        for address in addresses
    }


def check_regions(regions: dict[str, str], allowed: str, *, endpoint_url: str | None) -> None:
    """Refuse to go on when a bucket is outside the allowed regions.

    Parameters
    ----------
    regions : dict of str to str
        What `find_regions` returned.
    allowed : str
        Patterns separated by commas, such as ``eu-*,eusc-*``.
    endpoint_url : str or None
        Address of a service other than AWS. Only such a service may leave its region unstated:
        whoever chose it knows where it is.

    Raises
    ------
    ConfigError
        If a region matches none of the patterns.
    """
    patterns = [pattern.strip() for pattern in allowed.split(",") if pattern.strip()]
    for address, region in regions.items():
        if region == LOCAL or (region == UNSTATED and endpoint_url):
            continue
        if not any(fnmatch.fnmatchcase(region, pattern) for pattern in patterns):
            advice = f", or set --allowed-regions {region}" if region != UNSTATED else ""
            raise ConfigError(
                f"{address} is in region {region}, outside the allowed regions ({allowed}); "
                f"nothing was read. Use a bucket in an allowed region{advice}"
            )
