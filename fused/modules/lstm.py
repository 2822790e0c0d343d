"""LSTM and LSTMCell, drop-ins for `torch.nn`'s modules of those names."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fused import _lstm, _route

_State = tuple[Tensor, Tensor]


class LSTMCell(nn.LSTMCell):
    """:class:`torch.nn.LSTMCell` on fused kernels; constructor, parameters and meaning as there."""

    def forward(self, input: Tensor, hx: _State | None = None) -> _State:
        if input.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        if hx is not None:
            for index, state in enumerate(hx):
                if state.dim() not in (1, 2):
                    raise ValueError(
                        f"LSTMCell: Expected hx[{index}] to be 1D or 2D, got {state.dim()}D instead"
                    )
        is_batched = input.dim() == 2
        if not is_batched:
            input = input.unsqueeze(0)
        if hx is None:
            h = c = input.new_zeros(input.shape[0], self.hidden_size)
        else:
            hx = hx if is_batched else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
            h, c = _lstm.pair_of_states("lstm_cell", hx)
        weight_ih = self.weight_ih  # once: a parametrization computes it anew at every look
        self._check_shapes(input, h, c, weight_ih.shape[1])
        h, c = _lstm.lstm_cell(input, (h, c), weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return (h, c) if is_batched else (h.squeeze(0), c.squeeze(0))

    def _check_shapes(self, input: Tensor, h: Tensor, c: Tensor, input_size: int) -> None:
        """What torch.lstm_cell checks, in its words."""
        if input.shape[1] != input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {input.shape[1]} expected {input_size}"
            )
        for index, state in enumerate((h, c)):
            if state.shape[0] != input.shape[0]:
                raise RuntimeError(
                    f"Input batch size {input.shape[0]} doesn't match hidden{index} batch size "
                    f"{state.shape[0]}"
                )
            if state.shape[1] != self.hidden_size:
                raise RuntimeError(
                    f"hidden{index} has inconsistent hidden_size: got {state.shape[1]}, "
                    f"expected {self.hidden_size}"
                )


class LSTM(nn.RNNBase):
    """:class:`torch.nn.LSTM` on fused kernels; constructor, parameters and meaning as there.

    Not a subclass of it, because torch.compile refuses every module that is an ``nn.LSTM``. A
    ``state_dict`` loads both ways.
    """

    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    def forward(
        self, input: Tensor | PackedSequence, hx: _State | None = None
    ) -> tuple[Tensor | PackedSequence, _State]:
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        is_batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if not is_batched:
            input = input.unsqueeze(batch_dim)
        if hx is None:
            hx = self._zero_state(input, input.shape[batch_dim])
        else:
            expected, given = (3, "batched 3-D") if is_batched else (2, "unbatched 2-D")
            if hx[0].dim() != expected or hx[1].dim() != expected:
                raise RuntimeError(
                    f"For {given} input, hx and cx should also be {expected}-D but got "
                    f"({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
                )
            if not is_batched:
                hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        self.check_forward_args(input, hx, None)
        output, h_n, c_n = self._layers(input, hx, None)
        if is_batched:
            return output, (h_n, c_n)
        return output.squeeze(batch_dim), (h_n.squeeze(1), c_n.squeeze(1))

    def _forward_packed(
        self, packed: PackedSequence, hx: _State | None
    ) -> tuple[PackedSequence, _State]:
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        if hx is None:
            # A graph that knows the order's length need not ask what batch_sizes holds.
            batch = batch_sizes[0].item() if sorted_indices is None else sorted_indices.shape[0]
            hx = self._zero_state(data, cast("int", batch))
        else:
            hx = self.permute_hidden(hx, sorted_indices)
        if not _route.is_traced(data, batch_sizes):  # nobody knows what batch_sizes holds
            self.check_forward_args(data, hx, batch_sizes)
        output, h_n, c_n = self._layers(data, hx, batch_sizes)
        result = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return result, self.permute_hidden((h_n, c_n), unsorted_indices)

    def _zero_state(self, input: Tensor, batch: int) -> _State:
        count = self.num_layers * (2 if self.bidirectional else 1)
        c0 = input.new_zeros(count, batch, self.hidden_size)
        return (input.new_zeros(count, batch, self.proj_size) if self.proj_size else c0), c0

    def _layers(
        self, input: Tensor, hx: _State, batch_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All layers and directions: output, h_n and c_n."""
        hx = _lstm.pair_of_states("lstm", hx)
        weights = [getattr(self, name) for names in self._all_weights for name in names]
        reason = _lstm.unsupported(input, *hx, *weights)
        if reason is not None:
            _route.report("lstm", input.device, reason)
            return self._stock(input, hx, weights, batch_sizes)
        if batch_sizes is None and input.shape[1 if self.batch_first else 0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        cast_tensors = _route.autocast(input.device.type, input, *hx, *weights)
        output, h0, c0, *weights = cast("tuple[Tensor, ...]", cast_tensors)
        is_cast = output is not input or h0 is not hx[0] or c0 is not hx[1]
        given_state = hx[1]
        if self.batch_first and batch_sizes is None:
            output = output.transpose(0, 1)

        per_layer = len(self._all_weights[0])
        num_directions = 2 if self.bidirectional else 1
        h_n, c_n = [], []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(num_directions):
                index = layer * num_directions + direction
                w_ih, w_hh, *rest = weights[index * per_layer : (index + 1) * per_layer]
                b_ih, b_hh = rest[:2] if self.bias else (None, None)
                w_hr = rest[-1] if self.proj_size > 0 else None
                result, h, c = _lstm.lstm_layer(
                    output, h0[index], c0[index], w_ih, w_hh, b_ih, b_hh, w_hr,
                    batch_sizes, direction == 1,
                )  # fmt: skip
                outputs.append(result)
                h_n.append(h)
                c_n.append(c)
            output = outputs[0] if num_directions == 1 else torch.cat(outputs, dim=-1)
            if self.dropout > 0 and layer < self.num_layers - 1:
                output = torch.dropout(output, self.dropout, self.training)
        if self.batch_first and batch_sizes is None:
            output = output.transpose(0, 1)
        h_last, c_last = torch.stack(h_n), torch.stack(c_n)
        if is_cast:
            return self._as_stock_casts(output, h_last, c_last, given_state, batch_sizes)
        return output, h_last, c_last

    def _as_stock_casts(
        self, output: Tensor, h_n: Tensor, c_n: Tensor, c0: Tensor, batch_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The dtypes that stock's LSTM has under autocast.

        Its library kernels are cast whole. On the CPU they take neither packed sequences nor
        projections, and there only the products are cast, so that the state keeps its dtype. (They
        do take a packed batch of equal lengths. Ours has the dtypes of every other: a graph cannot
        look at the lengths, and types that follow the data surprise.)
        """
        if batch_sizes is None and self.proj_size == 0:
            return output, h_n, c_n
        state = _lstm.state_dtype(c0, c_n)
        if self.proj_size == 0:
            output, h_n = output.to(state), h_n.to(state)
        return output, h_n, c_n.to(state)

    def _stock(
        self, input: Tensor, hx: _State, weights: list[Tensor], batch_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        options = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional)
        if batch_sizes is None:
            return torch.lstm(input, hx, weights, *options, self.batch_first)
        return torch.lstm(input, batch_sizes, hx, weights, *options)
