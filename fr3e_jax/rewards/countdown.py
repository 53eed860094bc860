"""Verdicts on arithmetic puzzles: an expression of given numbers that makes a target. Nothing is evaluated
by Python: the text is parsed, and only whole numbers, + - * / and parentheses have a value.
"""

import ast
import operator
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction

LONGEST_EXPRESSION = 400  # characters; puzzles of a dozen numbers take a hundred
MOST_NESTED = 50  # nested operations

OPERATIONS: dict[type[ast.operator], tuple[str, Callable[[Fraction, Fraction], Fraction]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.truediv),
}


def value(node: ast.AST, used: list[int], operators: Collection[str], depth: int = 0) -> Fraction:
    """The value of a parsed expression; its numbers are appended to `used`.

    Raises:
      ValueError: it holds anything but whole numbers, `operators` and signs, or is nested too deeply.
      ZeroDivisionError: it divides by zero.
    """
    if depth > MOST_NESTED:
        raise ValueError("nested too deeply")
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            used.append(number)
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -value(operand, used, operators, depth + 1)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
            sign, operation = OPERATIONS[type(op)]
            if sign in operators:
                return operation(
                    value(left, used, operators, depth + 1), value(right, used, operators, depth + 1)
                )
    raise ValueError("not an arithmetic expression")


def makes(text: str, numbers: Sequence[int], target: int, operators: Collection[str] = "+-*/") -> bool:
    """Whether an expression uses each of the numbers once, and no other, and equals the target."""
    if len(text) > LONGEST_EXPRESSION:
        return False
    used: list[int] = []
    try:
        result = value(ast.parse(text.strip(), mode="eval").body, used, operators)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False
    return result == target and sorted(used) == sorted(numbers)
