"""`fused.Attention`, the twin of `torch.nn.MultiheadAttention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused import _route
from fused._attention import attend, is_causal_bias, make_options, mask_of
from fused._rotary import rotary_embedding


class Attention(nn.MultiheadAttention):
    """Multi-head attention (Vaswani et al., arXiv:1706.03762) on `fused`'s kernels.

    Constructor, `forward` and `state_dict` are those of :class:`torch.nn.MultiheadAttention`, with
    keyword-only extras. Pass ``need_weights=False`` wherever the weights are not used: who asks for
    them gets the whole ``[N, H, L, S]`` matrix made, beside the kernel's output, by PyTorch's own
    operators.

    Queries that may see no key, a float32 mask with half-precision inputs and masks of any
    combination mean what they say: zeros for the former, never NaN.

    Args:
        num_kv_heads: heads of key and value, a divisor of ``num_heads``, each shared by a group of
            query heads (Ainslie et al., arXiv:2305.13245); ``num_heads`` by default. The
            projections of key and value are as much narrower.
        window: ``(left, right)``: query i sees keys i + S - L - left to i + S - L + right, -1 for
            no bound, in every call.
        softcap: bounds the scores to its size, by a tanh.
        is_causal: query i sees keys 0 to i in every call, without a mask.
        rotary_interleaved: rotary embedding turns neighbours 2d and 2d + 1 of a head together,
            instead of d and d + head_dim / 2.

    Raises:
        ValueError: ``num_kv_heads`` that does not divide ``num_heads``.
        NotImplementedError: ``window`` or ``is_causal`` with ``add_bias_kv`` or ``add_zero_attn``.
    """

    # What a stock module has not set that `fused.patch` made one of these.
    num_kv_heads: int | None = None
    window: tuple[int, int] | None = None
    softcap: float | None = None
    is_causal: bool = False
    rotary_interleaved: bool = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        window: tuple[int, int] | None = None,
        softcap: float | None = None,
        is_causal: bool = False,
        rotary_interleaved: bool = False,
    ) -> None:
        if num_kv_heads is not None and (num_kv_heads < 1 or num_heads % num_kv_heads != 0):
            raise ValueError(
                f"attention: num_kv_heads must divide num_heads ({num_heads}), got {num_kv_heads}"
            )
        if (window is not None or is_causal) and (add_bias_kv or add_zero_attn):
            raise NotImplementedError(
                "attention: add_bias_kv and add_zero_attn must be False with window or is_causal, "
                "which have no place for keys beyond the sequence, got True"
            )
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim,
            batch_first, device, dtype,
        )  # fmt: skip
        self.num_kv_heads = num_kv_heads
        self.window, self.softcap, self.is_causal = window, softcap, is_causal
        self.rotary_interleaved = rotary_interleaved
        if num_kv_heads not in (None, num_heads):
            self._narrow_key_and_value(device, dtype)

    def _narrow_key_and_value(
        self, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        size, kv_size = self.embed_dim, self._kv_heads * self.head_dim

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        if self._qkv_same_embed_dim:
            self.in_proj_weight = parameter(size + 2 * kv_size, size)
        else:
            self.k_proj_weight = parameter(kv_size, self.kdim)
            self.v_proj_weight = parameter(kv_size, self.vdim)
        if self.in_proj_bias is not None:
            self.in_proj_bias = parameter(size + 2 * kv_size)
        if self.bias_k is not None:
            self.bias_k, self.bias_v = parameter(1, 1, kv_size), parameter(1, 1, kv_size)
        self._reset_parameters()

    @property
    def _kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

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
        for name in ("num_kv_heads", "window", "softcap", "is_causal", "rotary_interleaved"):
            if getattr(self, name) != getattr(Attention, name):
                text += f", {name}={getattr(self, name)}"
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
        *,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`torch.nn.MultiheadAttention.forward`, whose docstring gives shapes and masks.

        Args:
            query: ``[L, N, E]``, ``[N, L, E]`` with ``batch_first``, or ``[L, E]``.
            key: ``[S, N, kdim]``, ``[N, S, kdim]`` with ``batch_first``, or ``[S, kdim]``.
            value: as key, with ``vdim``.
            key_padding_mask: ``[N, S]`` or ``[S]``; bool, True for keys to hide, or floating.
            need_weights: also return the weights, dropout applied, at the price of making them.
            attn_mask: ``[L, S]`` or ``[N * H, L, S]``; bool, True for what to hide, or floating.
            average_attn_weights: average the returned weights over the heads.
            is_causal: a hint that ``attn_mask``, which must be given, is the causal mask. (The
                constructor's asks for no mask.)
            rotary: cosines and sines, each ``[L, head_dim / 2]``, that turn q and k by their places
                (Su et al., arXiv:2104.09864), with L = S; narrower ones turn the first elements of
                a head, and ``[N, L, ..]`` each sequence by its own. See
                :func:`fused.functional.rotary_embedding`.

        Returns:
            The output in the layout of ``query``, and the weights or None.
        """
        if is_causal_bias(attn_mask):  # which says what to show
            attn_mask = ~mask_of(attn_mask, query.device)
        if query.is_nested or key.is_nested or value.is_nested:
            extras = (self.window, self.softcap, rotary)
            if self.is_causal or any(extra is not None for extra in extras):
                raise NotImplementedError(
                    "attention: inputs must not be nested with window, softcap, is_causal or rotary"
                )
            if self._kv_heads != self.num_heads:
                raise NotImplementedError("attention: inputs must not be nested with num_kv_heads")
            _route.report("attention", query.device, "an input is nested")
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
        # [B, H, length, D] views of what the projections left: the kernels take any strides.
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).movedim(length_dim, -2) for t in (q, k, v))
        if rotary is not None:
            q, k = rotary_embedding(q, k, *rotary, interleaved=self.rotary_interleaved)
        k, v, added = self._with_added_keys(k, v)
        # As in stock, the hint counts where no padding has to be merged into the mask.
        is_causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if is_causal else _visible(attn_mask)
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (-1, self.num_heads))
        mask = _merge(mask, _visible(key_padding_mask), added)
        options = make_options(
            q, mask, self.dropout if self.training else 0.0, is_causal or self.is_causal,
            window=self.window, softcap=self.softcap,
        )  # fmt: skip
        grouped = self._kv_heads != self.num_heads
        attended = attend(q, k, v, options, grouped, need_weights=need_weights)
        out = attended.out.movedim(-2, length_dim).flatten(-2)
        out = F.linear(out, self.out_proj.weight, self.out_proj.bias)
        weights = attended.weights
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if batched or weights is None:
            return out if batched else out.squeeze(0), weights
        return out.squeeze(0), weights.squeeze(0)

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
        # Private, and so in no stub.
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
        bias, weight = self.in_proj_bias, self.in_proj_weight
        kv_size = self._kv_heads * self.head_dim
        sizes = [self.embed_dim, kv_size, kv_size]
        if self._qkv_same_embed_dim and query is key and key is value:
            return F.linear(query, weight, bias).split(sizes, dim=-1)
        if self._qkv_same_embed_dim and key is value:
            parts = [self.embed_dim, 2 * kv_size]
            w_q, w_kv = weight.split(parts)
            b_q, b_kv = bias.split(parts) if bias is not None else (None, None)
            return (F.linear(query, w_q, b_q), *F.linear(key, w_kv, b_kv).chunk(2, dim=-1))
        biases = bias.split(sizes) if bias is not None else (None, None, None)
        weights = (
            weight.split(sizes)
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
            heads = (self._kv_heads, 1, self.head_dim)
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
