import pytest


@pytest.mark.op("conv")
def test_conv(compare, case, contender):
    compare(case, contender)
