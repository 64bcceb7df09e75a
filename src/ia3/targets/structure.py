"""The paper's sites, found from a model's structure: keys, values, feed-forward inner activation.

Nothing here knows model types. An attention is a module whose children are queries, keys and values
by the names the field uses; a feed-forward layer is a down projection by its usual names whose
sizes undo those of a layer beside it. What cannot be told for sure is an error, never a guess: with
a site too many or too few a model trains and scores almost as well, and no one would notice.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..core.activations import Side, activation_of, is_wrapper, linear_features
from ..core.experts import is_experts
from ..core.names import ATTRIBUTE, Frozen, Target, modules_of, own_modules
from ..errors import IA3Error
from .fused_projections import fused_queries

Role = Literal["query", "key", "value", "keys and values", "latent", "fused", "shared"]

_INNER = "feed-forward inner activation"


def paper_targets(model: nn.Module) -> list[Target]:
    """The sites of (IA)³ as Liu et al. 2022 (section 3.3) have them, in the model's order.

    These are the outputs of every key and value projection, in self- and cross-attention, and the
    inputs of every feed-forward layer's down projection, which are its inner activation. Linear
    attention has keys and values too; a state-space mixer has none and is left out. Raises
    `IA3Error` where none is found, or one that cannot be told from the rest.
    """
    tree = _Tree(model)
    targets = [target for name in tree.attentions for target in _keys_and_values(tree, name)]
    _refuse_unknown_attention(tree)
    if not targets:
        found = layer_names(model)
        raise _left_to_caller(
            "no attention with query, key and value projections was found in "
            f"{type(model).__name__}, and the paper's sites are theirs (a recurrent or state-space "
            "model has none)" + (f"; its layers are called {found}" if found else "")
        )
    return tree.in_order([*targets, *_feedforward(tree)])


def feedforward_targets(model: nn.Module) -> list[Target]:
    """Those of `paper_targets` that are feed-forward inner activations; an error if none is."""
    tree = _Tree(model)
    return tree.in_order(_feedforward(tree))


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model by name; not those within a wrapper of PEFT's, which is one."""
    return {name: m for name, m in _modules_of(model).items() if linear_features(m)}


def _modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """A model's modules by name, without adapters' copies; of a wrapper of PEFT's, itself alone."""
    inner, modules = _within_wrappers(model), modules_of(model).items()
    return {n: m for n, m in modules if m not in inner and ATTRIBUTE not in n.split(".")}


def _within_wrappers(model: nn.Module) -> set[nn.Module]:
    parts = [m.modules() for m in model.modules() if is_wrapper(m)]
    return {part for inside in parts for part in list(inside)[1:]}


@dataclass(frozen=True)
class Parts:
    """What modules of a model are, by name, as far as that could be told.

    `down_of` is up projection -> its feed-forward layer's down projection. `attention` is all that
    is within an attention, of which `keys_and_values` are projected to these.
    """

    down_of: dict[str, str]
    attention: set[str]
    keys_and_values: set[str]


def parts_of(model: nn.Module) -> Parts:
    """The parts of a model; no error where some of them cannot be told."""
    tree = _Tree(model)
    called = {name for name, module in tree.modules.items() if _is_called_attention(module)}
    around = called | tree.attentions.keys()
    attention = {name for name in tree.modules if not around.isdisjoint(_above(name))}
    down_of: dict[str, str] = {}
    with suppress(IA3Error):
        for down in (target.name for target in _feedforward(tree) if target.side == "input"):
            layer = _above(down).index(tree.layer(down) or "")
            for above in _above(down)[: layer + 1]:
                others = [up for up in tree.projections(above) if up not in {down, *attention}]
                ups = [up for up in others if _undoes(tree, down, up)]
                if ups:
                    down_of |= dict.fromkeys(ups, down)
                    break
    roles = {name: role for parts in tree.attentions.values() for name, role in parts.items()}
    # Of a module that two share, there is only the first name.
    projections = {
        tree.projection(name)
        for name, role in roles.items()
        if role != "query" and name in tree.modules
    }
    return Parts(down_of, attention, {name for name in projections if name})


def layer_names(model: nn.Module, most: int = 12) -> str:
    """What the layers in a model's blocks are called, for a message: `"q_proj, k_proj, …"`."""
    modules = modules_of(model)
    names = [name for name in own_modules(modules) if _is_projection(modules[name])]
    in_blocks = [name for name in names if any(map(str.isdigit, name.split(".")))]
    # A layer's last part, and the one before it where that is a number.
    ends = (re.search(r"[^.]*[^.\d][^.]*(\.\d+)*$", name) for name in in_blocks or names)
    known = list(dict.fromkeys(end.group() for end in ends if end is not None))
    return ", ".join(known[:most]) + (", …" if len(known) > most else "")


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of a model's blocks, by name, in the model's order.

    A block is a layer with an attention, among others in a list that is in no other such list.
    """
    tree = _Tree(model)
    return {
        name: module
        for name, module in tree.modules.items()
        if isinstance(module, nn.ModuleList)
        and name in tree.stacks
        and not any(above in tree.stacks for above in _above(name))
    }


_WORDS: dict[str, str] = {
    **dict.fromkeys(("q", "wq", "query", "queries"), "q"),
    **dict.fromkeys(("k", "wk", "key", "keys"), "k"),
    **dict.fromkeys(("v", "wv", "value", "values"), "v"),
    **dict.fromkeys(("kv", "wkv"), "kv"),
    **dict.fromkeys(("qk", "wqk"), "qk"),
    **dict.fromkeys(("qkv", "wqkv", "qkvz", "qvk"), "qkv"),
}
# Children that prepare or describe queries, keys and values without projecting tokens to them.
_BESIDE = {"pos", "position", "relative", "rel", "rotary", "bias", "norm", "layernorm", "gate"}
_CONVOLUTION = re.compile(r"s?conv(olution)?\d*d?")
# Fused projections whose names do not say so.
_FUSED_NAMES = {"c_attn", "att_proj", "W_pack", "in_proj"}
_DOWN_NAMES = {
    "down_proj", "dense_4h_to_h", "fc2", "fc_2", "fc_out", "ff2", "ffw_layer_2", "layer_2", "lin2",
    "linear2", "linear_2", "linear_fc2", "mlp_fc2", "dense2", "dense_2", "proj_down", "w2",
}  # fmt: skip
# An attention's last layer is called that too.
_LAST_NAMES = {"c_proj", "proj_out", "w_out", "wo", "Wo"}
_ATTENTION_CLASS = re.compile(r"(attention|attn)\d*$", re.IGNORECASE)
# Parts that are built like a feed-forward layer and are none.
_NO_LAYERS = re.compile(r"adapter|router|norm")
# The linear layer within a module that adds dropout, a norm or clipping to it.
_WRAPPED_NAMES = ("dense", "linear", "base_layer")


def _is_called_attention(module: nn.Module) -> bool:
    return any(_ATTENTION_CLASS.search(kind.__name__) for kind in type(module).__mro__)


def _role(name: str, attention: nn.Module) -> Role | None:
    if name in _FUSED_NAMES and _is_called_attention(attention):
        return "fused"
    parts = [part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+[0-9]*d?", name)]
    if any(part in _BESIDE or _CONVOLUTION.fullmatch(part) for part in parts):
        return None
    words = "".join(_WORDS.get(part, "") for part in parts)
    if words == "kv":
        # DeepSeek's names for the way down (a) to a latent of low rank and up again (b).
        return "latent" if {"a", "down"} & set(parts) else "keys and values"
    if "q" in words and "k" in words:
        return "fused" if "v" in words else "shared"
    roles: dict[str, Role] = {"q": "query", "k": "key", "v": "value"}
    return roles.get(words)


# -- the model as a tree ---------------------------------------------------------------------------


class _Tree:
    """A model's modules by name, and where its attention is."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # A layer of PEFT's other adapters is one projection, with what it holds.
        self.modules = _modules_of(model)
        # Name of an attention -> its children's full names and roles.
        self.attentions = {
            name: roles
            for name, module in self.modules.items()
            if (roles := _attention_roles(name, module))
        }
        # Every module that has an attention within it.
        self.holders = {holder for name in self.attentions for holder in _above(name)}
        # Lists of layers: with an item that is more than an attention alone.
        self.stacks = {
            name
            for name in self.holders
            if isinstance(self.modules[name], nn.ModuleList | nn.Sequential | nn.ModuleDict)
            and any(child in self.holders for child in self.children(name))
        }

    def children(self, name: str) -> list[str]:
        """The full names of a module's children, less those that an earlier module has too."""
        names = [f"{name}.{child}" if name else child for child in self.modules[name]._modules]
        return [child for child in names if child in self.modules]

    def projection(self, name: str) -> str | None:
        """The module itself if its output can be rescaled, or the one such that it wraps."""
        if _is_projection(self.modules[name]):
            return name
        inside = self.projections(name)
        named = [f"{name}.{child}" for child in _WRAPPED_NAMES if f"{name}.{child}" in inside]
        return named[0] if named else inside[0] if len(inside) == 1 else None

    def projections(self, name: str) -> list[str]:
        """All modules within this one, and itself, whose output can be rescaled."""
        parts = modules_of(self.modules[name]).items()
        names = {f"{name}.{child}" if child else name: part for child, part in parts}
        return [part for part, m in names.items() if part in self.modules and _is_projection(m)]

    def layer(self, name: str) -> str | None:
        """The layer, with an attention, that a module is part of.

        For a layer without attention in a list of layers with it, that is the list. `None` for what
        stands beside whole lists, as projectors and heads do.
        """
        holder = next((above for above in _above(name) if above in self.holders), None)
        beside_lists = any(holder in _above(stack) for stack in self.stacks)
        return None if beside_lists else holder

    def target(self, name: str, side: Side, why: str, frozen: Frozen = ()) -> Target:
        activation = activation_of(self.modules[name], side)
        assert activation is not None
        return Target(name, side, activation, frozen, why)

    def dim(self, name: str, side: Side) -> int:
        return self.target(name, side, "").activation.dim

    def in_order(self, targets: list[Target]) -> list[Target]:
        by_name = {target.name: target for target in targets}
        return [by_name[name] for name in self.modules if name in by_name]


def _left_to_caller(problem: str) -> IA3Error:
    return IA3Error(f"{problem}: name what to rescale in target_modules")


def _attention_roles(name: str, module: nn.Module) -> dict[str, Role]:
    """The queries, keys and values among a module's children; nothing if it is no attention."""
    if "indexer" in f"{name}.{type(module).__name__}".lower():
        # It chooses which tokens are attended to; its keys are not those that are attended to.
        return {}
    prefix = f"{name}." if name else ""
    roles = {
        prefix + child: role
        for child, part in module.named_children()
        if (role := _role(child, module)) and any(map(_is_projection, part.modules()))
    }
    found = set(roles.values())
    if {"query", "key"} <= found:
        # Where keys serve as values too, the values' place is there and empty.
        empty = [attribute for attribute, value in vars(module).items() if value is None]
        found |= {_role(child, module) or "query" for child in [*empty, *module._modules]}
    at_once = {"fused", "shared", "keys and values"}
    return roles if {"query", "key", "value"} <= found or found & at_once else {}


def _above(name: str) -> list[str]:
    """The names of the modules that a module is in, nearest first: `a.b` -> `["a", ""]`."""
    parts = name.split(".") if name else []
    return [".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)]


def _is_projection(module: nn.Module) -> bool:
    return not isinstance(module, nn.Embedding) and activation_of(module, "output") is not None


# -- keys and values -------------------------------------------------------------------------------


def _keys_and_values(tree: _Tree, attention: str) -> list[Target]:
    roles = tree.attentions[attention]
    targets = []
    for name, role in roles.items():
        # An attention may be one of another's parts; and of a module that two share, there is only
        # the first name.
        if role == "query" or name in tree.attentions or name not in tree.modules:
            continue
        projection = tree.projection(name)
        if projection is None or role == "shared":
            reason = "gives queries and keys at once" if role == "shared" else "is not one layer"
            raise _left_to_caller(
                f"{name!r} ({type(tree.modules[name]).__name__}) {reason}, so that its keys cannot "
                "be rescaled alone"
            )
        frozen: Frozen = ()
        why = {"key": "keys", "value": "values"}.get(role, "keys and values")
        size = tree.dim(projection, "output")
        if role == "latent":
            latent = _latent_size(tree, attention)
            if size == latent:
                continue
            frozen, why = ((0, latent),), "rotary keys: the latent stays one"
        elif role == "fused":
            ranges = fused_queries(tree.modules[attention], name, size)
            # In cross-attention the same name may stand for keys and values alone.
            if "query" not in roles.values():
                frozen, why = ranges, "fused q-k-v: queries stay one"
        targets.append(tree.target(projection, "output", why, frozen))
    return targets


def _latent_size(tree: _Tree, attention: str) -> int:
    """How wide the latent is that keys and values are projected from."""
    for name, role in tree.attentions[attention].items():
        projection = tree.projection(name)
        if role == "keys and values" and projection is not None:
            return tree.dim(projection, "input")
    raise _left_to_caller(
        f"attention {attention!r} ({type(tree.modules[attention]).__name__}) has a latent for keys "
        "and values and no projection from it"
    )


def _refuse_unknown_attention(tree: _Tree) -> None:
    """Every attention in a list of layers must be one whose keys and values were found."""
    for name, module in tree.modules.items():
        holders = [tree.modules[above] for above in _above(name)]
        if not any(isinstance(holder, nn.ModuleList | nn.Sequential) for holder in holders):
            continue  # an attention that pools for a head
        if isinstance(module, nn.MultiheadAttention):
            raise _left_to_caller(
                f"{name!r} is a torch.nn.MultiheadAttention, which projects to queries, keys and "
                "values with one parameter and no module whose output could be rescaled"
            )
        if (
            _is_called_attention(module)
            and name not in tree.holders
            and not any(above in tree.attentions for above in (name, *_above(name)))
            and len(tree.projections(name)) > 2
            and not any(_role(child, module) for child in module._modules)
        ):
            raise _left_to_caller(
                f"the keys and values of attention {name!r} ({type(module).__name__}) could not be "
                f"told from its parts {list(module._modules)}"
            )


# -- feed-forward layers ---------------------------------------------------------------------------


def _feedforward(tree: _Tree) -> list[Target]:
    within = [
        (name, layer)
        for name in tree.modules
        if (layer := tree.layer(name)) is not None
        and not _NO_LAYERS.search(name.removeprefix(layer).lower())
    ]
    targets, with_names = [], set()
    for name, layer in within:
        module = tree.modules[name]
        kind = type(module).__name__
        has_weights = any(weight.dim() > 1 for weight in module.parameters(recurse=False))
        if is_experts(module):
            targets.append(tree.target(name, "inner", "experts' inner activation"))
        elif "expert" in kind.lower() and has_weights and not _is_projection(module):
            raise _left_to_caller(f"{name!r} ({kind}) holds experts that cannot be rescaled")
        elif down := _down_projection(tree, name):
            targets.append(tree.target(down, "input", _INNER))
        else:
            continue
        with_names.add(layer)
    for name, layer in within:
        if layer not in with_names and (down := _plain_down_projection(tree, name)):
            targets.append(tree.target(down, "input", _INNER))
    if not targets:
        raise _left_to_caller(f"no feed-forward layer was found in {type(tree.model).__name__}")
    _refuse_unknown_feedforward(tree, {target.name for target in targets})
    return targets


def _refuse_unknown_feedforward(tree: _Tree, found: set[str]) -> None:
    """No block may widen and narrow beside its attention where no feed-forward layer was found.

    Blocks that compute both at once project from attention and inner activation together.
    """
    # The innermost first: it is the one to name, and a set has another order in each process.
    for block in sorted(tree.holders, key=lambda name: (-name.count("."), name)):
        in_list = block and _above(block)[0] in tree.stacks
        if not in_list or any(name.startswith(f"{block}.") for name in found):
            continue
        beside = [
            name
            for name in tree.projections(block)
            if linear_features(tree.modules[name])
            and not any(above in tree.attentions for above in _above(name))
            and not _NO_LAYERS.search(name.removeprefix(block).lower())
        ]
        sizes = [(tree.dim(name, "input"), tree.dim(name, "output")) for name in beside]
        if any(a < b for a, b in sizes) and any(a > b for a, b in sizes):
            raise _left_to_caller(
                f"the feed-forward layer of block {block!r} "
                f"({type(tree.modules[block]).__name__}) could not be told from its layers {beside}"
            )


def _down_projection(tree: _Tree, name: str) -> str | None:
    """The child with the name of a down projection and the sizes of one, if there is such."""
    in_attention = name in tree.attentions or _is_called_attention(tree.modules[name])
    apart = {*tree.holders, *tree.attentions, *tree.attentions.get(name, {})}
    children = [child for child in tree.children(name) if child not in apart]
    for child in children:
        last = child.rpartition(".")[2]
        named_down = last in _DOWN_NAMES or (
            not in_attention and (last in _LAST_NAMES or "output" in last.split("_"))
        )
        if named_down and (down := tree.projection(child)):
            ups = [up for other in children if other != child for up in tree.projections(other)]
            if any(_undoes(tree, down, up) for up in ups):
                return down
    return None


def _plain_down_projection(tree: _Tree, name: str) -> str | None:
    """The last of a module's children, if by their sizes all are one feed-forward layer."""
    if any(above in tree.attentions for above in (name, *_above(name))):
        return None
    # An activation may have the up projection within it.
    parts = [found for child in tree.children(name) if (found := tree.projections(child))]
    if len(parts) < 2 or any(len(found) > 1 for found in parts):
        return None
    *ups, down = (found for (found,) in parts)
    if down not in tree.children(name) or isinstance(tree.modules[down], nn.Conv2d | nn.Conv3d):
        return None  # of images, not of tokens
    widens = tree.dim(down, "input") > tree.dim(down, "output")
    return down if widens and all(_undoes(tree, down, up) for up in ups) else None


def _undoes(tree: _Tree, down: str, up: str) -> bool:
    """Whether one layer's sizes lead back to where another's come from, gated or not."""
    inner = tree.dim(down, "input")
    matches = tree.dim(up, "input") == tree.dim(down, "output")
    return matches and tree.dim(up, "output") in (inner, 2 * inner)
