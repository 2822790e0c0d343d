"""`fused.Attention`, the twin of `torch.nn.MultiheadAttention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused import _route
from fused._attention import scaled_dot_product_attention


class Attention(nn.MultiheadAttention):
    """Multi-head attention (Vaswani et al., arXiv:1706.03762) on `fused`'s kernels.

    Constructor, `forward` and `state_dict` are those of :class:`torch.nn.MultiheadAttention`. Pass
    ``need_weights=False`` wherever the weights are not used: whoever asks for them gets the whole
    ``[N, H, L, S]`` matrix made, by PyTorch's own operators, as in stock.

    Queries that may see no key, a float32 mask with half-precision inputs and masks of any
    combination mean what they say: zeros for the former, never NaN.
    """

    def extra_repr(self) -> str:
        text = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"
        if self.dropout:
            text += f", dropout={self.dropout}"
        if self.in_proj_bias is None:
            text += ", bias=False"
        if self.bias_k is not None:
            text += ", add_bias_kv=True"
        if self.add_zero_attn:
            text += ", add_zero_attn=True"
        if not self._qkv_same_embed_dim:
            text += f", kdim={self.kdim}, vdim={self.vdim}"
        if self.batch_first:
            text += ", batch_first=True"
        return text

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`torch.nn.MultiheadAttention.forward`, whose docstring gives shapes and masks.

        Args:
            query: ``[L, N, E]``, ``[N, L, E]`` with ``batch_first``, or ``[L, E]``.
            key: ``[S, N, kdim]``, ``[N, S, kdim]`` with ``batch_first``, or ``[S, kdim]``.
            value: as key, with ``vdim``.
            key_padding_mask: ``[N, S]`` or ``[S]``; bool, True for keys to hide, or floating.
            need_weights: also return the weights, at the price of computing them.
            attn_mask: ``[L, S]`` or ``[N * H, L, S]``; bool, True for what to hide, or floating.
            average_attn_weights: average the returned weights over the heads.
            is_causal: a hint that ``attn_mask``, which must be given, is the causal mask.

        Returns:
            The output in the layout of ``query``, and the weights or None.
        """
        if need_weights or query.is_nested or key.is_nested or value.is_nested:
            why = "need_weights=True asks for the weights" if need_weights else "an input is nested"
            _route.report("attention", query.device, why)
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        batched = query.dim() == 3
        length_dim = 1 if self.batch_first or not batched else 0
        if not batched:
            query, key, value = self._unsqueeze(query, key, value)
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)

        q, k, v = self._project(query, key, value)
        heads = (self.num_heads, self.head_dim)
        # [B, H, length, D] views of what the projections left: the kernels take any strides.
        q, k, v = (t.unflatten(-1, heads).movedim(length_dim, -2) for t in (q, k, v))
        k, v, added = self._with_added_keys(k, v)
        # As in stock, the hint counts where no padding has to be merged into the mask.
        is_causal = is_causal and key_padding_mask is None
        mask = None if is_causal else _visible(attn_mask)
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (-1, self.num_heads))
        mask = _merge(mask, _visible(key_padding_mask), added)
        dropout_p = self.dropout if self.training else 0.0
        out = scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)
        out = out.movedim(-2, length_dim).flatten(-2)
        out = F.linear(out, self.out_proj.weight, self.out_proj.bias)
        return out if batched else out.squeeze(0), None

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        """Stock's errors for bad input, in stock's wording."""
        if query.dim() == 3 and self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        check = F._mha_shape_check  # type: ignore[attr-defined]
        check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                raise AssertionError(f"only bool and floating types of {name} are supported")
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use the Transformer "
                "module method `generate_square_subsequent_mask` to create this mask."
            )
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(
                f"was expecting embedding dimension of {self.embed_dim}, but got {query.shape[-1]}"
            )
        same = key.shape[:-1] == value.shape[:-1]
        if not same or (self._qkv_same_embed_dim and key.shape != value.shape):
            raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")
        batch = query.shape[1] if query.dim() == 3 else 1
        if query.dim() == 3 and key.shape[1] != batch:
            raise RuntimeError(f"key must have the batch of query ({batch}), got {key.shape[1]}")
        if key_padding_mask is not None:
            expected = tuple(key.shape[:-1] if key.dim() == 2 else (batch, key.shape[0]))
            if key_padding_mask.shape != expected:
                raise AssertionError(
                    f"Expected key_padding_mask of shape {expected}, but got "
                    f"{tuple(key_padding_mask.shape)}"
                )
        if attn_mask is not None:
            sizes = (query.shape[0], key.shape[0])
            expected = sizes if attn_mask.dim() == 2 else (batch * self.num_heads, *sizes)
            if attn_mask.shape != expected:
                raise RuntimeError(
                    f"The shape of the {attn_mask.dim()}D attn_mask is {attn_mask.shape}, but "
                    f"should be {expected}."
                )

    @staticmethod
    def _unsqueeze(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Adds the batch dimension; inputs that are one tensor stay one."""
        q = query.unsqueeze(0)
        k = q if key is query else key.unsqueeze(0)
        v = q if value is query else k if value is key else value.unsqueeze(0)
        return q, k, v

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """The input projections, as few matrix products as the inputs allow."""
        size, bias, weight = self.embed_dim, self.in_proj_bias, self.in_proj_weight
        if self._qkv_same_embed_dim and query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, dim=-1)
        if self._qkv_same_embed_dim and key is value:
            w_q, w_kv = weight.split([size, 2 * size])
            b_q, b_kv = bias.split([size, 2 * size]) if bias is not None else (None, None)
            return (F.linear(query, w_q, b_q), *F.linear(key, w_kv, b_kv).chunk(2, dim=-1))
        biases = bias.chunk(3) if bias is not None else (None, None, None)
        weights = (
            weight.chunk(3)
            if self._qkv_same_embed_dim
            else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )
        return tuple(
            F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )

    def _with_added_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Appends bias_k, bias_v and the zero key, and says how many they were."""
        added = 0
        shape = (*k.shape[:-2], 1, self.head_dim)
        if self.bias_k is not None and self.bias_v is not None:
            heads = (self.num_heads, 1, self.head_dim)
            k = torch.cat([k, self.bias_k.view(heads).to(k.dtype).expand(shape)], dim=-2)
            v = torch.cat([v, self.bias_v.view(heads).to(v.dtype).expand(shape)], dim=-2)
            added += 1
        if self.add_zero_attn:
            k = torch.cat([k, k.new_zeros(shape)], dim=-2)
            v = torch.cat([v, v.new_zeros(shape)], dim=-2)
            added += 1
        return k, v, added


def _visible(mask: Tensor | None) -> Tensor | None:
    """nn.MultiheadAttention's bool masks say what is hidden, the op's what is visible."""
    return ~mask if mask is not None and mask.dtype == torch.bool else mask


def _merge(mask: Tensor | None, padding: Tensor | None, added: int) -> Tensor | None:
    """One mask [., ., L, S + added] of an attention mask and one over the keys alone, [N, S]."""
    if padding is not None and padding.dim() == 2:
        padding = padding[:, None, None, :]
    masks = [m for m in (mask, padding) if m is not None]
    if added:  # keys that no mask hides
        masks = [F.pad(m, (0, added), value=m.dtype == torch.bool) for m in masks]
    if len(masks) < 2:
        return masks[0] if masks else None
    if all(m.dtype == torch.bool for m in masks):
        return masks[0] & masks[1]
    floats = [m for m in masks if m.dtype != torch.bool]
    for m in masks:
        if m.dtype == torch.bool:
            return torch.where(m, floats[0], -torch.inf)
    return floats[0] + floats[1]
