"""What many of the tests here are done for: every policy, fewer and more tokens than outputs."""

import pytest

from tests.capturing import POLICIES


@pytest.fixture(params=POLICIES)
def policy(request):
    return request.param


@pytest.fixture(params=["few", "many"])
def tokens(request):
    return request.param
