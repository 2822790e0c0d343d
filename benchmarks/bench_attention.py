import pytest


@pytest.mark.op("attention")
def test_attention(compare, case, contender):
    compare(case, contender)
