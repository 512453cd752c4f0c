from __future__ import annotations

import json
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools_service.calculator import MAX_CHARS, MAX_DEPTH, calculate, write
from tools_service.protocol import ToolError, ToolStatus


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("13.1-3", "10.1"),
        ("48/2", "24"),
        ("12/60", "0.2"),
        ("0.1+0.2", "0.3"),
        ("10/3*3", "10"),
        ("1/3", "0.3333333333"),
        ("-1/3", "-0.3333333333"),
        ("2/3", "0.6666666667"),
        ("200/3", "66.66666667"),
        ("1/300", "0.003333333333"),
        ("12345678901/3", "4115226300.33"),
        ("0.99999999999", "1"),
        ("2+3*4", "14"),
        ("(2+3)*4", "20"),
        ("2-3-4", "-5"),
        ("8/4/2", "1"),
        ("7//2", "3"),
        ("-7//2", "-4"),
        ("-7%3", "2"),
        ("7%-3", "-2.93"),  # percent, then minus: a sign is no operand
        ("7%(-3)", "-2"),
        ("10%3", "1"),
        ("50%", "0.5"),
        ("50%-3", "-2.5"),
        ("20%*50", "10"),
        ("200*(10%)", "20"),
        ("10%%3", "0.1"),
        ("2**3**2", "512"),
        ("-2**2", "-4"),
        ("(-2)**2", "4"),
        ("2**-1", "0.5"),
        ("2^3", "8"),
        ("0**0", "1"),
        ("(-1)**999999999999", "-1"),
        ("2**0.5", "1.414213562"),
        ("8**(1/3)", "2"),
        ("8**(1/3)//1", "2"),
        ("71+-3", "68"),
        ("3*+6", "18"),
        ("--2", "2"),
        ("+10", "10"),
        (".5*2", "1"),
        ("5.", "5"),
        ("007", "7"),
        ("1,234.5*2", "2469"),
        ("1,000,000", "1000000"),
        (" 1 +\t2\n", "3"),
        ("2×3÷4−1", "0.5"),
        ("2·3–1", "5"),
        ("(-1)**2", "1"),
        ("(-1)**-3", "-1"),
        ("-0", "0"),
        ("0*-1", "0"),
        ("1/10**20", "0.00000000000000000001"),
        ("1/(3*10**30)", "0." + "0" * 30 + "3333333333"),
        ("1.01/10**31", "0." + "0" * 30 + "101"),
        ("10**20", "100000000000000000000"),
        ("10**300/10**300", "1"),
        ("1.005**360", "6.022575212"),
        ("1000*(1+.06/12)**(12*30)", "6022.575212"),
        ("(1+0.045/365)**365", "1.046024958"),
        ("(-1.01)**201", "-7.38917803"),
        ("(-1.01)**202", "7.463069811"),
        ("1.01**-200", "0.1366863805"),
        ("1.0000001**9999999", "2.718281421"),
    ],
)
def test_results_are_written_as_a_person_writes_them(expression, result):
    assert calculate(expression) == result


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("1/0", "division by zero"),
        ("1//(2-2)", "division by zero"),
        ("0**-1", "division by zero"),
        ("5%0", "modulo by zero"),
        ("(-8)**(1/3)", "non-integer power of a negative number"),
        ("9**9**9**9", "exponent too large"),
        ("(-1)**0.5", "non-integer power of a negative number"),
        ("2**2000", "exponent too large"),
        ("2**-(9**99)", "exponent too large"),
        ("0.5**(9**99)", "exponent too large"),
        ("2**-99999.5", "exponent too large"),
        ("1.5**9999", "exponent too large"),
        ("0.5**9999", "exponent too large"),
        ("1.5**" + "9" * 400, "exponent too large"),
        ("99999**99999.5", "exponent too large"),
        ("9" * 401, "number too large"),
        ("10**300*10**300", "number too large"),
        ("10**40", "result too large"),
        ("1/10**31", "result too small"),
        ("1/10**35", "result too small"),
    ],
)
def test_arithmetic_without_an_answer_is_a_tool_error_that_names_it(expression, message):
    with pytest.raises(ToolError) as caught:
        calculate(expression)
    assert (caught.value.status, caught.value.message) == (ToolStatus.TOOL_ERROR, message)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "empty expression"),
        (" \n", "empty expression"),
        ("abc", "unexpected character 'a'"),
        ("1 +  ?", "unexpected character '?'"),
        ("1=1", "unexpected character '='"),
        ("1e999999", "unexpected character 'e'"),
        ("1,2", "unexpected character ','"),
        ("1234,567", "unexpected character ','"),
        ("1,234,56", "unexpected character ','"),
        ("1.2.3", "expected an operator before .3"),
        ("2(3)", "expected an operator before ("),
        ("1 2", "expected an operator before 2"),
        ("(1", "expected ) before the end"),
        ("1)", "unmatched )"),
        ("()", "expected a number before )"),
        ("1+", "expected a number before the end"),
        ("*2", "expected a number before *"),
        ("٣", "unexpected character '\\u0663'"),
        ("(" * 10_000, f"expression longer than {MAX_CHARS} characters"),
        ("(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1), f"nested deeper than {MAX_DEPTH} levels"),
        ("1**" * (MAX_DEPTH + 1) + "1", f"nested deeper than {MAX_DEPTH} levels"),
    ],
)
def test_what_cannot_be_read_is_bad_arguments_with_the_reason(expression, message):
    with pytest.raises(ToolError) as caught:
        calculate(expression)
    assert (caught.value.status, caught.value.message) == (ToolStatus.BAD_ARGUMENTS, message)


def test_the_deepest_and_longest_allowed_expressions_are_calculated():
    assert calculate("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH) == "1"
    assert calculate("-" * (MAX_CHARS - 1) + "1") == "-1"
    assert calculate("1+" * (MAX_CHARS // 2 - 1) + "1") == str(MAX_CHARS // 2)


@pytest.mark.parametrize("digits", [2, 30, 50, 59, 60, 61, 70, 150, 390])
def test_a_root_has_forty_digits_however_near_to_one_its_base_is(digits):
    with localcontext() as context:
        context.prec = 1000
        true = (1 + Decimal(10) ** -digits) ** (Decimal(10) ** (digits - 1) + Decimal("0.5")) * 10**36
    result = calculate(f"(1+10**-{digits})**(10**{digits - 1}+0.5)*10**36")
    assert len(result) >= 39 and abs(Decimal(result) - true) <= Decimal("0.006")


@given(st.decimals("0.5", "1.5", places=4).filter(lambda base: base != 1), st.integers(-400, 400))
def test_a_power_of_a_decimal_agrees_with_the_exact_one(base, exponent):
    with localcontext() as context:
        context.prec = 2000
        true = base**exponent
    try:
        result = Decimal(calculate(f"{base}**({exponent})"))
    except ToolError as error:
        assert error.message in ("result too large", "result too small") and not Decimal("1e-30") < true < Decimal("1e39")
    else:
        assert abs(result - true) <= true * Decimal("1e-9")


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9**9",
        "*".join(["1.000001**" + "9" * 6] * 60),
        "+".join(["(1+10**-398)**(10**398)"] * 40),
        "(" * 10_000,
        "1" * 10_240,
        "1e999999",
        "9" * 400 + "**" + "9" * 400,
        "1.0000001**9999999",
        "2**0.5" + "*2**0.5" * 140,
        "+".join(f"1/{n}" for n in range(1000, 1150)),
        "-" * 999 + "1",
        "7**300*" * 100 + "1",
    ],
)
@pytest.mark.timeout(60)  # unbounded, they take hours or the whole memory
def test_adversarial_input_ends_after_a_bounded_amount_of_work(expression):
    try:
        assert calculate(expression)
    except ToolError as error:
        assert error.message


@settings(max_examples=500)
@given(st.one_of(st.text(), st.text("0123456789.,+-*/%()^ eE_×÷", max_size=60)))
def test_any_text_gives_a_number_or_a_tool_error(text):
    try:
        result = calculate(text)
    except ToolError as error:
        assert error.message and len(error.message) < 100
        assert error.status in (ToolStatus.TOOL_ERROR, ToolStatus.BAD_ARGUMENTS)
    else:
        assert calculate(result) == result


# Trees of (text, value): the text is rendered with the fewest parentheses that Python's precedence needs, and the value
# is computed beside it, so that the parser is not compared with itself.
_SUM, _PRODUCT, _UNARY, _POWER, _ATOM = range(5)


def _wrap(node, level):
    text, _, own = node
    return text if own >= level else f"({text})"


def _combine(pair):
    operator, left, right = pair
    a, b = left[1], right[1]
    if operator in "+-":
        return f"{_wrap(left, _SUM)}{operator}{_wrap(right, _PRODUCT)}", a + b if operator == "+" else a - b, _SUM
    value = {"*": lambda: a * b, "/": lambda: a / b, "//": lambda: Fraction(a // b), "%": lambda: a % b}
    # A sign directly after % would make it a percent.
    right_text = _wrap(right, _ATOM if operator == "%" else _UNARY)
    return f"{_wrap(left, _PRODUCT)}{operator}{right_text}", value[operator]() if b or operator == "*" else None, _PRODUCT


def _extend(children):
    binary = st.tuples(st.sampled_from(["+", "-", "*", "/", "//", "%"]), children, children).map(_combine)
    negated = children.map(lambda node: (f"-{_wrap(node, _UNARY)}", -node[1], _UNARY))
    percent = children.map(lambda node: (f"({_wrap(node, _ATOM)}%)", node[1] / 100, _ATOM))
    squared = children.map(lambda node: (f"{_wrap(node, _ATOM)}**2", node[1] ** 2, _POWER))
    return st.one_of(binary, negated, percent, squared).filter(lambda node: node[1] is not None and len(node[0]) < 200)


_LEAVES = st.decimals(0, 9999, places=2).map(lambda d: (format(d, "f"), Fraction(d), _ATOM)) | st.integers(0, 9999).map(
    lambda n: (format(n, ","), Fraction(n), _ATOM)
)


@settings(max_examples=500, deadline=None)
@given(st.recursive(_LEAVES, _extend, max_leaves=8))
def test_expression_trees_agree_with_fractions(node):
    text, value, _ = node
    try:
        result = Fraction(calculate(text))
    except ToolError as error:
        assert error.status is ToolStatus.TOOL_ERROR and error.message.endswith(("too large", "too small"))
        assert abs(value) >= 10**39 or 0 < abs(value) < 10**-29 or value.denominator > 10**200
    else:
        assert abs(result - value) <= abs(value) / 10**9 and abs(result - value) <= Fraction(1, 200)


@given(st.decimals(-(10**9), 10**9, places=2))
def test_numbers_of_ten_digits_are_written_exactly(number):
    text = write(Fraction(number))
    assert Decimal(text) == number and "E" not in text
    assert "." not in text or not text.endswith(("0", "."))
    assert text != "-0"


def test_every_gsm8k_annotation_comes_out_exactly(gsm8k_calculator):
    rows = [json.loads(line) for line in gsm8k_calculator.read_text().splitlines()]
    wrong = [(row, got) for row in rows if Fraction(got := calculate(row["expr"])) != Fraction(row["result"])]
    assert len(rows) == 27_998 and not wrong
