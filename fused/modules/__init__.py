"""Drop-in modules: the constructors, `state_dict` and meaning of their twins in `torch.nn`."""

from fused.modules.attention import Attention
from fused.modules.conv import Conv1d, Conv2d, Conv3d
from fused.modules.lstm import LSTM, LSTMCell

__all__ = ["LSTM", "Attention", "Conv1d", "Conv2d", "Conv3d", "LSTMCell"]
