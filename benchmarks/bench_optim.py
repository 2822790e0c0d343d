import pytest


@pytest.mark.op("optim")
def test_optim(compare, case, contender):
    compare(case, contender)
