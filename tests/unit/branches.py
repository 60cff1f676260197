"""Finds conditions that no case sees both ways: each `if`, each operand, each loop of a source."""

import ast
from collections.abc import Callable, Iterable, Iterator


class Watched(ast.NodeTransformer):
    """Wraps each condition, each operand of one, and each loop, so that it tells how it went."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.places: dict[int, str] = {}
        self.seen: set[tuple[int, bool]] = set()

    def saw(self, number: int, value: object) -> object:
        self.seen.add((number, bool(value)))
        return value

    def went(self, number: int, items: Iterable[object]) -> Iterator[object]:
        for item in items:
            self.seen.add((number, True))
            yield item
        self.seen.add((number, False))

    @property
    def names(self) -> dict[str, Callable[..., object]]:
        """What the watched source has to find under these names."""
        return {"saw": self.saw, "went": self.went}

    def not_taken(self) -> list[str]:
        return [
            f"{self.name}{place} is never {way}"
            for number, place in self.places.items()
            for way in (True, False)
            if (number, way) not in self.seen
        ]

    def _watch(self, node: ast.expr, how: str) -> ast.expr:
        number = len(self.places)
        self.places[number] = f"line {node.lineno}: {ast.unparse(node)}"
        call = ast.Call(ast.Name(how, ast.Load()), [ast.Constant(number), node], [])
        return ast.copy_location(call, node)

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        node.test = self._watch(node.test, "saw")
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        node.test = self._watch(node.test, "saw")
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        # What stands in for a missing value, such as "", is no condition.
        node.values = [
            value if isinstance(value, ast.Constant | ast.Dict) else self._watch(value, "saw")
            for value in node.values
        ]
        return node

    def visit_For(self, node: ast.For) -> ast.AST:
        self.generic_visit(node)
        node.iter = self._watch(node.iter, "went")
        return node

    def visit_comprehension(self, node: ast.comprehension) -> ast.AST:
        self.generic_visit(node)
        node.ifs = [self._watch(condition, "saw") for condition in node.ifs]
        return node
