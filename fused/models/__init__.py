"""Reference models, each built from stock or from fused layers by one argument.

>>> model = fused.models.GPT(layers="fused")
>>> twin = fused.models.GPT(layers="stock")
>>> twin.load_state_dict(model.state_dict())

The code is the same for both, and so are the names and shapes of the parameters: with one seed both
start from the very same values, which is what ``python -m fused train`` compares.
"""

from fused.models.convnet import ConvNet
from fused.models.gpt import GPT
from fused.models.lstm import LSTMLanguageModel

__all__ = ["GPT", "ConvNet", "LSTMLanguageModel"]
