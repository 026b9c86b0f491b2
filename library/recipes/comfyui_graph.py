"""ComfyUI's `prompt`: a graph of nodes by id, each with its class and its inputs, which are values or links."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from library.files.picture_programs import is_json
from library.recipes.emphasis import without_networks
from library.recipes.recipe import Unreadable, as_object, json_texts, number, plain, read_object

_DEEPEST = 300  # nodes one behind the other that are followed
_TEXT_NAMES = ("text", "value", "string", "prompt", "text_0", "STRING", "text1", "populated_text", "wildcard_text")
_NUMBER_NAMES = ("value", "seed", "noise_seed", "int", "float", "number", "Number", "INT", "FLOAT", "int_value", "a")
_JOINERS = re.compile(r"concat|join|combine|append|merge|StringFunction", re.IGNORECASE)
_SAMPLER = re.compile(r"KSampler|^SamplerCustom", re.IGNORECASE)
_NO_SAMPLER = re.compile(r"Select|Config|Provider|Script|Param|Setting|Option|\bXY", re.IGNORECASE)  # beside one
_CHOOSERS = re.compile(r"switch|if ?else", re.IGNORECASE)
_CHOICES = ("select", "Input", "index", "boolean", "switch", "condition", "input")
_SIDES = (("positive", "negative"), ("text_positive", "text_negative"), ("positive_prompt", "negative_prompt"))
_PIPES = ("sdxl_tuple", "pipe", "basic_pipe", "base_ctx", "context", "ctx")  # hold several inputs of a sampler
_UNSURE = re.compile(r"random|combinatorial|wildcard", re.IGNORECASE)  # whose text is drawn anew each time
_CHANGES_TEXT = re.compile(r"replace|styler|regex|trim|substring|truncate|split", re.IGNORECASE)
_POPULATED = "populated_text"  # what such a node has drawn
DETAILER = re.compile(r"Detailer|UltimateSDUpscale|^Iterative", re.IGNORECASE)  # draw over what is there
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
            if _CHOOSERS.search(node.kind) and (chosen := chosen_of(node)) is not None:
                if as_link(chosen) is None:
                    return Node(node.id, "chosen", {"value": chosen})
                value = chosen
            elif re.search(r"reroute|^Get\w*Node$|^Any\b.*Switch", node.kind, re.IGNORECASE):
                value = next((each for each in node.inputs.values() if as_link(each)), None)
            else:
                return node
        return None

    def with_pipe(self, node: Node) -> Node:
        """A node with the inputs that come to it bundled, where it has none of that name itself."""
        merged = dict(node.inputs)
        for bundle in self.follow(node, lambda each: _first(each.inputs, _PIPES)):
            merged = dict(bundle.inputs) | merged
        return Node(node.id, node.kind, merged)

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

    def number(self, value: object, wanted: str = "value") -> str:
        """A number, or that of the node that it comes from; empty where it cannot be told.

        Args:
            value: of an input.
            wanted: what a node that holds several numbers would call it.
        """
        names = (wanted, f"{wanted}_total", *_NUMBER_NAMES)
        for node in self.follow(self.node(value), lambda each: _first(each.inputs, names)):
            given = _first(node.inputs, names)
            if given is None:
                others = [each for each in node.inputs.values() if number(each) is not None]
                given = others[0] if len(others) == 1 else None
            if as_link(given) is None:
                return plain(given) if number(given) is not None else ""
        return "" if as_link(value) else plain(value)

    def text(self, value: object, depth: int = 0, wanted: str = "text") -> str:
        """A text, or what the nodes that it comes from make; those that are not known are told of."""
        if (link := as_link(value)) is None:
            return plain(value)
        node = self.node(value)
        if node is None or depth > _DEEPEST:
            self.tell("a text that goes round in circles" if node else "a text whose node is missing")
            return ""
        unsure = _UNSURE.search(node.kind) and _POPULATED not in node.inputs
        if unsure or _CHANGES_TEXT.search(node.kind):
            self.tell(f"what {node.kind} (node {node.id}) makes of a text")
        for names in _SIDES:
            if link.slot < 2 and all(isinstance(node.inputs.get(name), str) for name in names):
                return plain(node.inputs[names[link.slot]])
        given = [name for name in node.inputs if self._may_be_text(name, node.inputs[name])]
        if _JOINERS.search(node.kind) and len(given) > 1:
            separator = next((str(node.inputs[name]) for name in _SEPARATORS if name in node.inputs), "")
            if separator in ("true", "True"):
                separator = "\n"
            separator = ", " if node.inputs.get("tidy_tags") == "yes" else separator
            pieces = [self.text(node.inputs[name], depth + 1) for name in given]
            return separator.replace("\\n", "\n").join(piece for piece in pieces if piece)
        usual = (wanted, _POPULATED, *_TEXT_NAMES)
        name = next((name for name in usual if name in given), given[0] if len(given) == 1 else "")
        if not name:
            self.tell(f"the text that node {node.id} ({node.kind}) makes")
            return ""
        text = self.text(node.inputs[name], depth + 1)
        return without_networks(text) if holds_tags(node) else text

    def _may_be_text(self, name: str, value: object) -> bool:
        if name in _SEPARATORS or name in ("clean_whitespace", "action", "tidy_tags", "mode", "result"):
            return False
        return isinstance(value, str) or as_link(value) is not None


def _first(inputs: Mapping[str, Any], names: tuple[str, ...]) -> object:
    return next((inputs[name] for name in names if name in inputs), None)


def _is_node(value: object) -> bool:
    return isinstance(as_object(value).get("class_type"), str)


def _node(name: str, value: Mapping[str, Any]) -> Node:
    return Node(name, value["class_type"], as_object(value.get("inputs")))


def holds_tags(node: Node) -> bool:
    """Whether a node loads the networks that tags in its own text name."""
    return any(name in node.inputs for name in ("model", "opt_model")) and any(
        isinstance(node.inputs.get(name), str) for name in TAGGED
    )


TAGGED = (_POPULATED, "text", "prompt")  # where such tags stand; the first counts


def chosen_of(node: Node) -> object:
    """What a switch hands on, by its number or its yes or no; None where that cannot be told."""
    given = node.inputs
    choice = next((given[name] for name in _CHOICES if type(given.get(name)) in (int, bool)), None)
    if isinstance(choice, bool):
        names = ("on_true", "true_value", "if_true") if choice else ("on_false", "false_value", "if_false")
        return _first(given, names)
    if choice is None:
        return None
    return next((value for name, value in given.items() if re.fullmatch(rf"[a-zA-Z]+_?0*{choice}", name)), None)


def is_sampler(node: Node) -> bool:
    """Whether a node draws a picture."""
    given = node.inputs
    if DETAILER.search(node.kind) or _NO_SAMPLER.search(node.kind):
        return False
    looks_like_one = any(name in given for name in ("seed", "noise_seed")) and "positive" in given and "steps" in given
    return _SAMPLER.search(node.kind) is not None or looks_like_one


def toward_latent(node: Node) -> object:
    """The input through which a picture or latents come."""
    names = ("latent_image", "samples", "latent", "pixels", "image", "images", "upscaled_image")
    return next((node.inputs[name] for name in names if as_link(node.inputs.get(name))), None)
