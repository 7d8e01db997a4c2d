"""Attentions: a product, a softmax of it, and a second product; with what is quantized in them."""

from __future__ import annotations

from dataclasses import dataclass

from .graph import DEQUANTIZE, QUANTIZE, Graph, Node, Operand, Product

# What may stand between the first product and the softmax, and between the softmax and the second product.
_BEFORE = frozenset(("Mul", "Div", "Add", "Sub", "Where", "Cast", "Identity", *QUANTIZE, *DEQUANTIZE))
_AFTER = frozenset(("Where", "IsNaN", "Cast", "Dropout", "Identity", "Mul", *QUANTIZE, *DEQUANTIZE))


@dataclass(frozen=True)
class Attention:
    """A product of queries and keys, its softmax, and the product with the values.

    Args:
        probabilities: the softmax, as the second product reads it.
        scores_quantizer: a QuantizeLinear between the first product and the softmax.
        mask: what masks the scores.
        guard: a Where between the softmax and the second product.
    """

    scores: Product
    softmax: Node
    context: Product
    probabilities: Operand
    values: Operand
    scores_quantizer: Node | None
    mask: Node | None
    guard: Node | None

    @property
    def inputs(self) -> dict[str, Operand]:
        return {"queries": self.scores.left, "keys": self.scores.right, "values": self.values}


def attentions(graph: Graph) -> list[Attention]:
    """The attentions of a graph that are written as products and a softmax."""
    products = {id(product.node): product for product in graph.products if product.weight is None}
    found = []
    for softmax in graph.of("Softmax"):
        before, first = _search(graph, softmax, products, forward=False)
        after, second = _search(graph, softmax, products, forward=True)
        if first is None or second is None:
            continue
        reached = {name for node in (softmax, *after) for name in node.outputs}
        left, right = second.operands
        probabilities, values = (left, right) if left.value in reached else (right, left)
        found.append(
            Attention(
                scores=first,
                softmax=softmax,
                context=second,
                probabilities=probabilities,
                values=values,
                scores_quantizer=next((node for node in before if node.quantizes), None),
                mask=next((node for node in before if node.op in ("Add", "Sub", "Where")), None),
                guard=next((node for node in after if node.op == "Where"), None),
            )
        )
    return found


def _search(
    graph: Graph, softmax: Node, products: dict[int, Product], forward: bool
) -> tuple[list[Node], Product | None]:
    """The nearest product ahead of a softmax or behind it, and the nodes on the way."""
    allowed = _AFTER if forward else _BEFORE
    on_the_way: list[Node] = []
    queue, seen = [softmax], {id(softmax)}
    while queue:
        node = queue.pop(0)
        if forward:
            neighbours = [reader for name in node.outputs for reader in graph.readers(name)]
        else:
            makers = (graph.maker(name) for name in node.inputs if name)
            neighbours = [maker for maker in makers if maker is not None]
        for neighbour in neighbours:
            if id(neighbour) in seen:
                continue
            seen.add(id(neighbour))
            if id(neighbour) in products:
                return on_the_way, products[id(neighbour)]
            if neighbour.op in allowed:
                on_the_way.append(neighbour)
                queue.append(neighbour)
    return on_the_way, None


def output_quantizer(graph: Graph, attention: Attention) -> Node | None:
    """The QuantizeLinear of an attention's result, behind what only moves it."""
    values = list(attention.context.node.outputs)
    while values:
        for reader in graph.readers(values.pop(0)):
            if reader.quantizes:
                return reader
            if graph.moves(reader):
                values.extend(reader.outputs)
    return None


def head_size(graph: Graph, attention: Attention) -> int | None:
    """Elements of a head, from the types of what the products read; None if they do not tell."""
    queries, keys = attention.scores.operands
    for operand, axis in ((queries, -1), (keys, -2), (attention.values, -1)):
        shape = graph.shape(operand.value)
        if shape and shape[axis] is not None:
            return shape[axis]
    return None


def sequence_length(graph: Graph, attention: Attention) -> int | None:
    """Keys that a query attends to; None if that is dynamic or unknown."""
    for operand, axis in ((attention.values, -2), (attention.scores.right, -1), (attention.probabilities, -1)):
        shape = graph.shape(operand.value)
        if shape and shape[axis] is not None:
            return shape[axis]
    return None
