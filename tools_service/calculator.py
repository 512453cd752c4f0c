"""A calculator for text: exact rational arithmetic by a hand-written recursive-descent grammar. Standard library only.

    sum     = product (("+" | "-") product)*
    product = unary (("*" | "/" | "//" | "%") unary)*
    unary   = ("+" | "-")* power
    power   = percent ("**" unary)?              right-associative; -2**2 is -4, as in Python
    percent = atom "%"*
    atom    = number | "(" sum ")"

`%` directly before a number or "(" is modulo (10%3 = 1, sign of the divisor as in Python); anywhere else it divides by 100
(50% = 0.5, 20%*50 = 10, 50%-3 = -2.5). `//` rounds towards minus infinity. Numbers are `5`, `5.`, `.5` and `1,234.5` (commas
in groups of three); × · ÷ − – ^ are read as * * / - - **. There is no implicit multiplication and no exponent notation.

Intermediate values are fractions, so that 10/3*3 is 10 and 0.1+0.2 is 0.3. Only a power with a non-integer exponent, or one of a
non-integer whose exact value is too long (1.005**360), is approximate (40 significant digits). The result is rounded once, half
to even, at the end: see `write`.
"""

from __future__ import annotations

import decimal
import re
from fractions import Fraction

from tools_service.protocol import ToolError, ToolStatus

MAX_CHARS = 1000
MAX_DEPTH = 50  # parentheses and chained powers
MAX_DIGITS = 400  # of numerator and denominator of every intermediate value
MAX_RESULT_DIGITS = 40  # before the point of what is written
SIGNIFICANT_DIGITS = 10  # of a result that is not an integer
MIN_DECIMALS = 2  # kept however large the integer part is
MAX_DECIMALS = 40

_MAX = 10**MAX_DIGITS
_ROUNDED_DIGITS = 60  # with which a power is computed that is written with 40
_SPELLINGS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})
_TOKEN = re.compile(
    r"[ \t\r\n]*(?:"
    r"(?P<number>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
    r"|(?P<operator>\*\*|\^|//|[-+*/%()])"
    r"|(?P<end>$))"
)


class SimpleCalculatorTool:
    """The calculator as the service runs it. Any number of threads may call one instance at once."""

    name = "SimpleCalculatorTool"
    description = "Evaluates one arithmetic expression (+ - * / // % ** and parentheses) and returns its value as a decimal number."
    idempotent = True
    max_batch = 64  # answers in microseconds: calls that wait anyway may share a request
    probe = "1+1"

    def __call__(self, argument: str) -> str:
        return calculate(argument)


def calculate(expression: str) -> str:
    """The value of `expression` as a person writes it ("24", "0.2", "-0.3333333333").

    Raises ToolError: BAD_ARGUMENTS for text that the grammar does not hold (or that is empty, too long, too deep), TOOL_ERROR
    for arithmetic that has no answer here (division by zero, an even root of a negative number, a number out of bounds).
    """
    return write(_Parser(_tokens(expression)).value())


def write(value: Fraction) -> str:
    """`value` in plain decimal notation, without an exponent, trailing zeros or a negative zero.

    An integer is written in full. Anything else is rounded to 10 significant digits, or to 2 decimals where that is more
    (so that the rounding error stays below 0.005). Raises ToolError above 40 integer digits, and for 1e-31 and less but 0.
    """
    whole = abs(value.numerator) // value.denominator
    if whole >= 10**MAX_RESULT_DIGITS:
        raise ToolError("result too large")
    if value.denominator == 1:
        return str(value.numerator)
    if whole:
        decimals = max(MIN_DECIMALS, SIGNIFICANT_DIGITS - len(str(whole)))
    else:  # zeros after the point are not significant
        zeros = len(str(value.denominator // abs(value.numerator))) - 1
        decimals = SIGNIFICANT_DIGITS + zeros
        if decimals > MAX_DECIMALS:
            raise ToolError("result too small")
    scaled = round(abs(value) * 10**decimals)
    head, tail = divmod(scaled, 10**decimals)
    tail_text = str(tail).rjust(decimals, "0").rstrip("0")
    sign = "-" if value < 0 and scaled else ""
    return f"{sign}{head}.{tail_text}" if tail_text else f"{sign}{head}"


def _bad(message: str) -> ToolError:
    return ToolError(message, ToolStatus.BAD_ARGUMENTS)


def _tokens(expression: str) -> list[str]:
    """Operators as they are, numbers with a leading "#", and "" at the end."""
    if len(expression) > MAX_CHARS:
        raise _bad(f"expression longer than {MAX_CHARS} characters")
    text = expression.translate(_SPELLINGS).rstrip()
    if not text:
        raise _bad("empty expression")
    tokens, position = [], 0
    while True:
        match = _TOKEN.match(text, position)
        if match is None:
            rest = text[position:].lstrip(" \t\r\n")
            raise _bad(f"unexpected character {ascii(rest[0])}")
        position = match.end()
        if match["number"]:
            tokens.append("#" + match["number"].replace(",", ""))
        elif match["operator"]:
            tokens.append("**" if match["operator"] == "^" else match["operator"])
        else:
            tokens.append("")
            return tokens


def _fits(value: Fraction) -> bool:
    return abs(value.numerator) < _MAX and value.denominator < _MAX


def _bounded(value: Fraction) -> Fraction:
    if not _fits(value):
        raise ToolError("number too large")
    return value


def _number(digits: str) -> Fraction:
    whole, _, decimals = digits.partition(".")
    if len(digits) > MAX_DIGITS:
        raise ToolError("number too large")
    return Fraction(int(whole + decimals), 10 ** len(decimals))


def _divide(left: Fraction, operator: str, right: Fraction) -> Fraction:
    if not right:
        raise ToolError("modulo by zero" if operator == "%" else "division by zero")
    if operator == "/":
        return left / right
    return Fraction(left // right) if operator == "//" else left % right


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if not base:
        if exponent < 0:
            raise ToolError("division by zero")
        return Fraction(0 if exponent else 1)
    if abs(base) == 1 and exponent.denominator == 1:
        return base if exponent.numerator % 2 else Fraction(1)
    if exponent.denominator != 1:
        if base < 0:
            raise ToolError("non-integer power of a negative number")
        return _rounded_power(base, exponent)
    # 2**(bits-1) <= |n|, so this passes over only what is out of bounds and never computes a huge power to find out.
    bits = max(abs(base.numerator).bit_length(), base.denominator.bit_length()) - 1
    if bits * abs(exponent.numerator) <= _MAX.bit_length():
        power = base**exponent.numerator
        if _fits(power) or base.denominator == 1:
            return power
    elif base.denominator == 1:
        raise ToolError("exponent too large")
    power = _rounded_power(abs(base), exponent)
    return -power if base < 0 and exponent.numerator % 2 else power


def _rounded_power(base: Fraction, exponent: Fraction) -> Fraction:
    """base**exponent of a base above 0, to 40 significant digits: exact where the answer is that short."""
    # Of a base as near to 1 as 1e-60 the logarithm has its first digit in the sixtieth place: those before it come on top.
    near = max(0, len(str(base.denominator)) - len(str(abs(base.numerator - base.denominator))) + 1)
    context = decimal.Context(_ROUNDED_DIGITS + near, Emax=9999, Emin=-9999, traps=[decimal.Overflow, decimal.InvalidOperation])
    try:
        # Not context.power, which squares its way through an exponent of hundreds of digits.
        result = context.exp(context.multiply(_decimal(exponent, context), context.ln(_decimal(base, context))))
    except decimal.DecimalException:
        raise ToolError("exponent too large") from None
    result = result.normalize(decimal.Context(prec=40, Emax=9999, Emin=-9999, traps=[]))
    if not result or abs(result.adjusted()) >= MAX_DIGITS - 40:
        raise ToolError("exponent too large")
    return Fraction(result)


def _decimal(value: Fraction, context: decimal.Context) -> decimal.Decimal:
    return context.divide(decimal.Decimal(value.numerator), decimal.Decimal(value.denominator))


class _Parser:
    """One method per rule of the grammar above; each evaluates as it reads."""

    def __init__(self, tokens: list[str]):
        self._tokens = tokens
        self._next = 0
        self._depth = 0

    def value(self) -> Fraction:
        result = self._sum()
        if self._peek() == ")":
            raise _bad("unmatched )")
        if self._peek():
            raise _bad(f"expected an operator before {self._show()}")
        return result

    def _peek(self) -> str:
        return self._tokens[self._next]

    def _show(self) -> str:
        token = self._peek().removeprefix("#")
        return (token if len(token) <= 20 else token[:20] + "...") or "the end"

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _bad(f"nested deeper than {MAX_DEPTH} levels")

    def _sum(self) -> Fraction:
        result = self._product()
        while (operator := self._peek()) in ("+", "-"):
            self._next += 1
            right = self._product()
            result = _bounded(result + right if operator == "+" else result - right)
        return result

    def _product(self) -> Fraction:
        result = self._unary()
        while (operator := self._peek()) in ("*", "/", "//", "%"):
            self._next += 1
            right = self._unary()
            result = _bounded(result * right if operator == "*" else _divide(result, operator, right))
        return result

    def _unary(self) -> Fraction:
        negative = False
        while (operator := self._peek()) in ("+", "-"):
            self._next += 1
            negative ^= operator == "-"
        result = self._power()
        return -result if negative else result

    def _power(self) -> Fraction:
        base = self._percent()
        if self._peek() != "**":
            return base
        self._next += 1
        self._deeper()
        exponent = self._unary()
        self._depth -= 1
        return _bounded(_power(base, exponent))

    def _percent(self) -> Fraction:
        result = self._atom()
        while self._peek() == "%" and not self._tokens[self._next + 1].startswith(("#", "(")):
            self._next += 1
            result = _bounded(result / 100)
        return result

    def _atom(self) -> Fraction:
        token = self._peek()
        if token.startswith("#"):
            self._next += 1
            return _number(token[1:])
        if token != "(":
            raise _bad(f"expected a number before {self._show()}")
        self._next += 1
        self._deeper()
        result = self._sum()
        self._depth -= 1
        if self._peek() != ")":
            raise _bad(f"expected ) before {self._show()}")
        self._next += 1
        return result
