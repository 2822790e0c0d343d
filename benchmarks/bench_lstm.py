import pytest


@pytest.mark.op("lstm")
def test_lstm(compare, case, contender):
    compare(case, contender)
