"""`residency`: in which region bytes are, and whether they may be there."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import Place
from fruits_dask.errors import ConfigError, NotFoundError
from fruits_dask.records import StoreOptions
from fruits_dask.residency import LOCAL, UNSTATED, check_regions, find_regions
from servers import RecordingMoto, S3rver, S3Service

BUCKET = "s3://fruits/photos"


@pytest.mark.parametrize(
    ("region", "allowed"),
    [
        ("eu-west-3", "eu-*"),
        ("eu-central-1", "us-east-1, eu-central-1"),
        ("eusc-de-east-1", "eu-*,eusc-*"),
        ("us-east-1", "*"),
    ],
)
def test_a_bucket_in_an_allowed_region_may_be_used(region: str, allowed: str) -> None:
    check_regions({BUCKET: region}, allowed, endpoint_url=None)


@pytest.mark.parametrize(
    ("region", "allowed"),
    [
        ("us-east-1", "eu-*"),
        ("EU-WEST-3", "eu-*"),
        ("us-eu-1", "eu-*"),
        ("eu-west-3", "eu-central-1"),
        ("eu-west-3", ""),
        ("eu-west-3", " , "),
    ],
)
def test_a_bucket_elsewhere_is_refused(region: str, allowed: str) -> None:
    with pytest.raises(ConfigError, match="nothing was read") as caught:
        check_regions({"/local": LOCAL, BUCKET: region}, allowed, endpoint_url=None)
    assert BUCKET in str(caught.value)
    assert region in str(caught.value)


def test_one_bucket_elsewhere_is_enough() -> None:
    regions = {"s3://a": "eu-west-3", "s3://b": "us-east-1"}
    with pytest.raises(ConfigError, match="s3://b"):
        check_regions(regions, "eu-*", endpoint_url=None)


def test_a_chosen_service_may_leave_its_region_unstated() -> None:
    check_regions({BUCKET: UNSTATED}, "eu-*", endpoint_url="http://127.0.0.1:9000")


def test_a_chosen_service_that_states_its_region_is_held_to_it() -> None:
    with pytest.raises(ConfigError, match="us-east-1"):
        check_regions(
            {BUCKET: "us-east-1"}, "eu-*", endpoint_url="https://s3.us-east-1.amazonaws.com"
        )


def test_aws_may_not_leave_its_region_unstated() -> None:
    with pytest.raises(ConfigError, match=UNSTATED):
        check_regions({BUCKET: UNSTATED}, "eu-*", endpoint_url=None)


def test_local_folders_are_on_this_machine(tmp_path: Path) -> None:
    regions = find_regions([str(tmp_path), "/absent"], StoreOptions())
    assert regions == {str(tmp_path): LOCAL, "/absent": LOCAL}
    check_regions(regions, "eu-*", endpoint_url=None)


@pytest.mark.parametrize("region", ["eu-west-3", "us-west-2"])
def test_the_region_is_asked_of_the_service(moto_server: RecordingMoto, region: str) -> None:
    service = S3Service(name="moto", endpoint_url=moto_server.endpoint_url)
    address = f"s3://{service.new_bucket(region)}/photos"
    assert find_regions([address], service.options) == {address: region}


def test_no_object_is_touched(moto_server: RecordingMoto, moto_place: Place) -> None:
    options = StoreOptions(endpoint_url=moto_server.endpoint_url)
    bucket = moto_place.root.split("/")[2]
    find_regions([moto_place.root], options)
    paths = {(request.method, request.path.rstrip("/")) for request in moto_server.requests}
    assert paths == {("HEAD", f"/{bucket}")}


def test_a_service_without_regions_leaves_it_unstated(s3rver_process: S3rver) -> None:
    service = S3Service(name="s3rver", endpoint_url=s3rver_process.endpoint_url)
    address = f"s3://{service.new_bucket()}"
    assert find_regions([address], service.options) == {address: UNSTATED}


def test_an_absent_bucket_is_an_error(s3_service: S3Service) -> None:
    with pytest.raises(NotFoundError, match="no-such-bucket"):
        find_regions(["s3://no-such-bucket/photos"], s3_service.options)
