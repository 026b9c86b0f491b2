"""ComfyUI's `prompt`: a graph of nodes by id, each with its class and its inputs, which are values or links."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from library.files.picture_programs import is_json
from library.recipes.recipe import Unreadable, as_object, json_texts, number, plain, read_object

_DEEPEST = 300  # nodes one behind the other that are followed
_TEXT_NAMES = ("text", "value", "string", "prompt", "text_0", "STRING", "text1", "populated_text", "wildcard_text")
_NUMBER_NAMES = ("value", "seed", "noise_seed", "int", "float", "number", "Number", "INT", "FLOAT", "int_value", "a")
_JOINERS = re.compile(r"concat|join|combine|append|merge", re.IGNORECASE)
_SAMPLER = re.compile(r"^(?:KSampler(?!Select)|SamplerCustom)|\bKSampler\b", re.IGNORECASE)
DETAILER = re.compile(r"Detailer|UltimateSDUpscale", re.IGNORECASE)  # draw over parts of a picture that is there
_SEPARATORS = ("delimiter", "separator", "linebreak_addition")


@dataclass(frozen=True)
class Node:
    """A node of the graph."""

    id: str
    kind: str
    inputs: Mapping[str, Any]


@dataclass(frozen=True)
class Link:
    """The output of a node that an input is connected with."""

    node: str
    slot: int


def as_link(value: object) -> Link | None:
    """A link, `["4", 1]`; None for a value."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int) and type(value[1]) is int:
        return Link(str(value[0]), value[1])
    return None


class Graph:
    """The nodes, with what is followed through them. `untold` gathers what cannot be taken over.

    Args:
        nodes: by id.
    """

    def __init__(self, nodes: Mapping[str, Node]) -> None:
        self.nodes = nodes
        self.untold: list[str] = []

    @classmethod
    def of(cls, texts: Mapping[str, str]) -> "Graph":
        """The graph among a picture's texts.

        Raises:
            Unreadable: when there is none that is whole.
        """
        problem = Unreadable("has ComfyUI's workflow and no graph of its prompt, which alone tells values")
        for text in json_texts(texts):
            try:
                content = read_object(text, "ComfyUI")
            except Unreadable as fault:
                problem = fault
                continue
            inner = content.get("prompt")
            if isinstance(inner, str) and is_json(inner):
                inner = read_object(inner, "ComfyUI")
            for each in (content, as_object(inner)):
                nodes = {str(name): _node(str(name), node) for name, node in each.items() if _is_node(node)}
                if nodes:
                    return cls(nodes)
        raise problem

    def tell(self, what: str) -> None:
        """Note what cannot be taken over, once."""
        if what not in self.untold:
            self.untold.append(what)

    def node(self, value: object) -> Node | None:
        """The node that an input is connected with, past those that hand on what they are given."""
        seen: set[str] = set()
        while (link := as_link(value)) is not None and link.node in self.nodes and link.node not in seen:
            seen.add(link.node)
            node = self.nodes[link.node]
            if not re.search(r"reroute|^Get\w*Node$|^Any\b.*Switch", node.kind, re.IGNORECASE):
                return node
            value = next((each for each in node.inputs.values() if as_link(each)), None)
        return None

    def links(self, node: Node) -> Iterator[str]:
        """The ids of the nodes that a node is connected with, in the order of its inputs."""
        for value in node.inputs.values():
            if (link := as_link(value)) and link.node in self.nodes:
                yield link.node

    def follow(self, node: Node | None, next_of: Callable[[Node], object]) -> Iterator[Node]:
        """A chain of nodes, each connected with the next by the input that `next_of` gives."""
        seen: set[str] = set()
        while node is not None and node.id not in seen and len(seen) < _DEEPEST:
            seen.add(node.id)
            yield node
            node = self.node(next_of(node))

    # ---- values

    def number(self, value: object) -> str:
        """A number, or that of the node that it comes from; empty where it cannot be told."""
        for node in self.follow(self.node(value), lambda each: _first(each.inputs, _NUMBER_NAMES)):
            given = _first(node.inputs, _NUMBER_NAMES)
            if given is None:
                others = [each for each in node.inputs.values() if number(each) is not None]
                given = others[0] if len(others) == 1 else None
            if as_link(given) is None:
                return plain(given) if number(given) is not None else ""
        return "" if as_link(value) else plain(value)

    def text(self, value: object, depth: int = 0) -> str:
        """A text, or what the nodes that it comes from make; those that are not known are told of."""
        if as_link(value) is None:
            return plain(value)
        node = self.node(value)
        if node is None or depth > _DEEPEST:
            self.tell("a text that goes round in circles" if node else "a text whose node is missing")
            return ""
        given = [name for name in node.inputs if self._may_be_text(name, node.inputs[name])]
        if _JOINERS.search(node.kind) and len(given) > 1:
            separator = next((str(node.inputs[name]) for name in _SEPARATORS if name in node.inputs), "")
            if separator in ("true", "True"):
                separator = "\n"
            pieces = [self.text(node.inputs[name], depth + 1) for name in given]
            return separator.replace("\\n", "\n").join(piece for piece in pieces if piece)
        name = next((name for name in _TEXT_NAMES if name in given), given[0] if len(given) == 1 else "")
        if not name:
            self.tell(f"the text that node {node.id} ({node.kind}) makes")
            return ""
        return self.text(node.inputs[name], depth + 1)

    def _may_be_text(self, name: str, value: object) -> bool:
        if name in _SEPARATORS or name in ("clean_whitespace", "action", "tidy_tags", "mode"):
            return False
        return isinstance(value, str) or as_link(value) is not None


def _first(inputs: Mapping[str, Any], names: tuple[str, ...]) -> object:
    return next((inputs[name] for name in names if name in inputs), None)


def _is_node(value: object) -> bool:
    return isinstance(as_object(value).get("class_type"), str)


def _node(name: str, value: Mapping[str, Any]) -> Node:
    return Node(name, value["class_type"], as_object(value.get("inputs")))


def is_sampler(node: Node) -> bool:
    given = node.inputs
    if DETAILER.search(node.kind):
        return False
    looks_like_one = any(name in given for name in ("seed", "noise_seed")) and "positive" in given and "steps" in given
    return _SAMPLER.search(node.kind) is not None or looks_like_one


def toward_latent(node: Node) -> object:
    """The input through which a picture or latents come."""
    names = ("latent_image", "samples", "latent", "pixels", "image", "images", "upscaled_image")
    return next((node.inputs[name] for name in names if as_link(node.inputs.get(name))), None)
