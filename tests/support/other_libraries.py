"""Models of libraries that are not installed here, with their names for modules, as plain modules.

What they compute is as simple as their names allow.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, WIDE = 16, 24


class Attention(nn.Module):
    """Attention of two heads, its parts by these names; a dot in the last: a list's first item."""

    def __init__(self, query: str, key: str, value: str, out: str) -> None:
        super().__init__()
        self.names = (query, key, value, out)
        for name in self.names[:3]:
            self.add_module(name, nn.Linear(WIDTH, WIDTH))
        last = nn.Linear(WIDTH, WIDTH)
        first, dot, _ = out.partition(".")
        self.add_module(first, nn.ModuleList([last, nn.Dropout(0.0)]) if dot else last)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        query, key, value, out = map(self.get_submodule, self.names)
        context = x if context is None else context
        return out(attended(query(x), key(context), value(context)))


def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    heads = (part.unflatten(-1, (2, -1)).transpose(-2, -3) for part in (query, key, value))
    result = functional.scaled_dot_product_attention(*heads)
    return result.transpose(-2, -3).flatten(-2)


class FusedAttention(nn.Module):
    """Queries, keys and values of one layer."""

    def __init__(self, fused: str, out: str | None) -> None:
        super().__init__()
        self.names = (fused, out)
        self.add_module(fused, nn.Linear(WIDTH, 3 * WIDTH))
        if out is not None:
            self.add_module(out, nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        fused, out = self.names
        result = attended(*self.get_submodule(fused)(x).chunk(3, -1))
        return result if out is None else self.get_submodule(out)(result)


class Mlp(nn.Module):
    """Up, activation and down; gated where the up projection gives two halves."""

    def __init__(self, up: str, down: str, gated: bool = False) -> None:
        super().__init__()
        self.names = (up, down)
        self.add_module(up, nn.Linear(WIDTH, (1 + gated) * WIDE))
        self.add_module(down, nn.Linear(WIDE, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        up, down = map(self.get_submodule, self.names)
        inner = up(x)
        if inner.shape[-1] > WIDE:
            gate, inner = inner.chunk(2, -1)
            return down(functional.silu(gate) * inner)
        return down(functional.gelu(inner))


class Block(nn.Module):
    """Parts that are added to what they are given, one after the other."""

    def __init__(self, parts: dict[str, nn.Module] | None = None, **more: nn.Module) -> None:
        super().__init__()
        parts = {**(parts or {}), **more}
        self.names = list(parts)
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            part = self.get_submodule(name)
            x = x + part(functional.layer_norm(x, x.shape[-1:]))
        return x


class Blocks(nn.Module):
    """What most of these models are: a list of blocks."""

    blocks: nn.ModuleList

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


# -- genomics and proteins -------------------------------------------------------------------------


class GatedIntermediate(nn.Module):
    """The Nucleotide Transformer's second version: gate and up projection are one layer."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 2 * inner, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.dense(hidden_states).chunk(2, -1)
        return functional.silu(gate) * up


class MosaicBert(nn.Module):
    """DNABERT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(40, WIDTH)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList([self.layer(), self.layer()])})

    @staticmethod
    def layer() -> nn.Module:
        attention = Block({"self": FusedAttention("Wqkv", None)})
        return Block(attention=attention, mlp=Mlp("gated_layers", "wo", gated=True))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embeddings(input_ids)
        for layer in self.encoder["layer"]:
            x = layer(x)
        return x


class Evoformer(Blocks):
    """OpenFold's blocks."""

    def __init__(self) -> None:
        super().__init__()

        def block() -> nn.Module:
            attention = Attention("linear_q", "linear_k", "linear_v", "linear_o")
            return Block(msa_att=attention, msa_transition=Mlp("linear_1", "linear_2"))

        self.blocks = nn.ModuleList([block(), block()])


# -- vision ----------------------------------------------------------------------------------------


class ResNet18(nn.Module):
    """Convolutions and a head, by the names an audio classifier has for them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential()
        self.layer1.add_module("conv", nn.Conv2d(3, 8, 3))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer1(x).relu().mean((-1, -2)))


class TimmVit(nn.Module):
    """timm's vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = Block(proj=nn.Conv2d(3, WIDTH, 4, 4))

        def block() -> nn.Module:
            return Block(attn=FusedAttention("qkv", "proj"), mlp=Mlp("fc1", "fc2"))

        self.blocks = nn.Sequential(block(), block())
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patch_embed.proj(x).flatten(2).mT).mean(1))


# -- speech ----------------------------------------------------------------------------------------


class MultiHeadAttention(Attention):
    pass


class OpenAiWhisper(Blocks):
    """The decoder's blocks of OpenAI's own Whisper."""

    def __init__(self) -> None:
        super().__init__()

        def block() -> nn.Module:
            attention, cross = (MultiHeadAttention("query", "key", "value", "out") for _ in "12")
            mlp = nn.Sequential(nn.Linear(WIDTH, WIDE), nn.GELU(), nn.Linear(WIDE, WIDTH))
            return Block(attn=attention, cross_attn=cross, mlp=mlp)

        self.blocks = nn.ModuleList([block(), block()])


# -- state space -----------------------------------------------------------------------------------


class Mixer(nn.Module):
    """A selective state-space layer."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(WIDTH, 2 * WIDE, bias=False)
        self.conv1d = nn.Conv1d(WIDE, WIDE, 2, groups=WIDE, padding=1)
        self.x_proj = nn.Linear(WIDE, 2 + 2, bias=False)
        self.dt_proj = nn.Linear(2, WIDE)
        self.out_proj = nn.Linear(WIDE, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner, gate = self.in_proj(x).chunk(2, -1)
        inner = functional.silu(self.conv1d(inner.mT)[..., :-1].mT)
        step, both = self.x_proj(inner).chunk(2, -1)
        state = torch.cumsum(functional.softplus(self.dt_proj(step)) * inner, 1)
        return self.out_proj(state * both.sum(-1, keepdim=True) * functional.silu(gate))


class MambaPy(nn.Module):
    """mambapy's model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, WIDTH)
        self.layers = nn.ModuleList([Block(mixer=Mixer()), Block(mixer=Mixer())])

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


# -- diffusion -------------------------------------------------------------------------------------


class Gelu(nn.Module):
    """diffusers' activations have the up projection within them; GEGLU is gated."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, (1 + gated) * WIDE)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.proj(x)
        if inner.shape[-1] > WIDE:
            inner, gate = inner.chunk(2, -1)
            return inner * functional.gelu(gate)
        return functional.gelu(inner)


class FeedForward(nn.Module):
    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.net = nn.ModuleList([Gelu(gated), nn.Dropout(0.0), nn.Linear(WIDE, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


def diffusers_attention() -> nn.Module:
    return Attention("to_q", "to_k", "to_v", "to_out.0")


class DiffusersUnet(nn.Module):
    """The attention of Stable Diffusion's U-Net, in one of its blocks."""

    def __init__(self) -> None:
        super().__init__()
        # Built like a feed-forward layer.
        self.time_embedding = Mlp("linear_1", "linear_2")
        parts = {"attn1": diffusers_attention(), "ff": FeedForward(gated=True)}
        block = Block(parts, attn2=diffusers_attention())
        transformer = Block(proj_in=nn.Linear(WIDTH, WIDTH))
        transformer.transformer_blocks = nn.ModuleList([block])
        down = Block(resnets=nn.ModuleList([Block(conv1=nn.Conv2d(4, 4, 1))]))
        down.attentions = nn.ModuleList([transformer])
        self.down_blocks = nn.ModuleList([down])

    def forward(self, x: Tensor) -> Tensor:
        transformer = self.down_blocks[0].attentions[0]
        x = transformer.proj_in(x) + self.time_embedding(x)
        return transformer.transformer_blocks[0](x)


class AdaptiveNorm(nn.Module):
    """A norm whose scale and shift are projected from the input: a feed-forward layer's sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.linear(x).chunk(2, -1)
        return functional.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class DiffusersDit(nn.Module):
    """A diffusion transformer of diffusers."""

    def __init__(self) -> None:
        super().__init__()

        def block() -> nn.Module:
            parts = {"norm1": AdaptiveNorm(), "attn1": diffusers_attention()}
            return Block(parts, ff=FeedForward(gated=False))

        self.transformer_blocks = nn.ModuleList([block(), block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.transformer_blocks:
            x = block(x)
        return x


class JointAttention(Attention):
    """Of a picture's and a text's tokens, each with projections of its own."""

    def __init__(self) -> None:
        super().__init__("to_q", "to_k", "to_v", "to_out.0")
        for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            self.add_module(name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        own = (self.to_q, self.to_k, self.to_v)
        added = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        pairs = zip(own, added, strict=True)
        both = attended(*(torch.cat([a(x), b(x)], 1) for a, b in pairs))
        picture, text = both.chunk(2, 1)
        return self.to_out[0](picture) + self.to_add_out(text)


class ParallelAttention(nn.Module):
    """Attention and feed-forward layer at once, from one projection to another."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv_mlp_proj = nn.Linear(WIDTH, 3 * WIDTH + 2 * WIDE)
        self.to_out = nn.Linear(WIDTH + WIDE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        qkv, mlp = self.to_qkv_mlp_proj(x).split([3 * WIDTH, 2 * WIDE], -1)
        gate, up = mlp.chunk(2, -1)
        inner = functional.silu(gate) * up
        return self.to_out(torch.cat([attended(*qkv.chunk(3, -1)), inner], -1))


class Flux2(nn.Module):
    """FLUX.2's two kinds of blocks."""

    def __init__(self) -> None:
        super().__init__()
        gated = Mlp("linear_in", "linear_out", gated=True)
        self.transformer_blocks = nn.ModuleList([Block(attn=JointAttention(), ff=gated)])
        self.single_transformer_blocks = nn.ModuleList([Block(attn=ParallelAttention())])

    def forward(self, x: Tensor) -> Tensor:
        return self.single_transformer_blocks[0](self.transformer_blocks[0](x))


# -- tables ----------------------------------------------------------------------------------------


class FtTransformer(nn.Module):
    """A transformer over the columns of a table's row."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_tokenizer = nn.Embedding(5, WIDTH)

        def block() -> nn.Module:
            attention = Attention("W_q", "W_k", "W_v", "W_out")
            return Block(attention=attention, ffn=Mlp("linear_first", "linear_second", gated=True))

        self.blocks = nn.ModuleList([block(), block()])

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., None] * self.feature_tokenizer.weight
        for block in self.blocks:
            x = block(x)
        return x.mean(1)
