"""Notations of numbers other than plain digits: Chinese numerals as values, and signs, spaces and TeX rewritten."""

import re
import unicodedata
from fractions import Fraction


# Longer numbers are no answer to anything, and Python refuses integers of more than 4,300 digits.
LONGEST = 300

# Not NFKC, which makes m2 of m² and 11/2 of 1½. The fullwidth comma stays: it separates and never groups digits.
_PLAIN = str.maketrans(
    {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F) if chr(code) != "，"}
    | {sign: f"({unicodedata.normalize('NFKC', sign).replace('⁄', '/')})" for sign in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
    | {"−": "-", "–": "-", "∶": ":", "⁄": "/", "￥": "¥", "\u00a0": " ", "\u202f": " ", "\u3000": " "}
)

# `++` reads a run of digits once and never splits it, so that hostile text takes linear time.
DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3}(?![0-9]))++|[0-9]++)(?:\.[0-9]++)?+|\.[0-9]++)"
# Separators of thousands that nothing else looks like; ordinary spaces are such where a group begins with a zero, as
# no number does, and where nothing but the number is expected.
_THIN = re.compile(r"(?<=[0-9])(?:\\[,;: ]|,\\!|\{,\}|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))")
_SPACED = re.compile(r"(?<![0-9.,/])[0-9]{1,3}(?: [0-9]{3}(?![0-9]))++")

# A root, π and a fraction that is not of numbers: some number that nobody reads.
UNKNOWN = "\ufffc"
_TEX_NUMBER = rf"\{{ ?([-+]?{DECIMAL}) ?\}}"
_TEX_FRACTION = re.compile(rf"\\[cdt]?frac ?(?:{_TEX_NUMBER}|([0-9])) ?(?:{_TEX_NUMBER}|([0-9])(?![0-9]))")
_TEX_SIGN = re.compile(r"\\(?:([%$])|(times|cdot)(?![A-Za-z])|[,;:! ])|\{(,)\}|\^ ?\{ ?([-+]?[0-9]++) ?\}")
_ROOT = re.compile(
    r"\\sqrt ?(?:\[[^][{}]*+\] ?)?(?:\{[^{}]*+\}|[0-9])?|√ ?(?:[0-9.]++|\([^()]*+\))?|\\pi(?![A-Za-z])|π"
)
_OTHER_FRACTION = re.compile(r"\\[cdt]?frac(?: ?(?:\{[^{}]*+\}|[0-9]++)){0,2}")
_FRACTION_WORD = re.compile(r"(?<![0-9.])([0-9]++)分之([0-9]++)(?![0-9.])")
_MIXED = re.compile(r"(?<![0-9.])([0-9]++) ?又 ?\(?([0-9]++)/([0-9]++)\)?")
_MINUS = re.compile(r"\A(?:minus |negative |负)(?=[0-9.$¥£€])", re.IGNORECASE)

_INTEGER = "(?:[零〇一二两三四五六七八九十百万亿]|千(?![克米瓦升]))++"
_PART = f"{_INTEGER}(?:点[零〇一二三四五六七八九]++)?+"
_DIGITS = {digit: value for value, digit in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_UNITS = {"十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
_DIGIT = "[一二两三四五六七八九]"
_SECTION = re.compile(f"(?:({_DIGIT})千)?(?:零?({_DIGIT})百)?(?:零?({_DIGIT}?十))?(?:零?({_DIGIT}))?")
_SHORTENED = re.compile(f"[百千万亿]{_DIGIT}$")

# 成 is a tenth, but not in words such as 成本 and 成绩.
TENTHS = "成(?![本为立绩果品功员长熟了就])"
CHINESE_NUMBER = re.compile(f"(负?)(?:({_INTEGER})又)?({_PART})(?:分之({_PART})|({TENTHS})({_DIGIT})?)?")


def plain_notation(text: str) -> str:
    """
    Write a text with ASCII signs, fractions as `(a/b)`, and `UNKNOWN` for roots, π and fractions of no numbers.

    Args:
        text (`str`):
            Any text, with TeX or without.

    Returns:
        `str`: the text, rewritten in linear time.
    """
    text = _THIN.sub(",", text).translate(_PLAIN)
    text = _TEX_SIGN.sub(_tex_sign, text)
    text = _OTHER_FRACTION.sub(UNKNOWN, _ROOT.sub(UNKNOWN, _TEX_FRACTION.sub(_tex_fraction, text)))
    text = _MIXED.sub(r"\1(\2/\3)", _FRACTION_WORD.sub(r"(\2/\1)", text))
    return _SPACED.sub(lambda match: match[0].replace(" ", "") if " 0" in match[0] else match[0], text)


def plain_start(text: str) -> str:
    """
    Write the number at the very start of a text with a minus sign and without spaces between its thousands.

    Args:
        text (`str`):
            A text from [`plain_notation`].

    Returns:
        `str`: `-1234567 m` for `minus 1 234 567 m`.
    """
    text = _MINUS.sub("-", text)
    match = _SPACED.match(text, len(text) - len(text.lstrip("+-$¥£€ ")))
    # 1 100/200 is a mixed number.
    if not match or text.startswith("/", match.end()):
        return text
    return text[: match.start()] + match[0].replace(" ", "") + text[match.end() :]


def chinese_value(match: re.Match[str]) -> Fraction | None:
    """
    Evaluate a Chinese numeral.

    Args:
        match (`re.Match`):
            What `CHINESE_NUMBER` found: 三十五, 二分之一, 一又三分之二, 百分之二十五, 三点一四, 九成, 八成五.

    Returns:
        `Fraction` or `None`: its value; `None` if it is none (万一), may have two (三万五), divides by zero or has
        more than 300 characters.
    """
    sign, whole, first, second, tenths, hundredths = match.groups()
    if len(match[0]) > LONGEST:
        return None
    # In Chinese the denominator comes first.
    parts = [_decimal(part) for part in ((whole or "零"), (second or first), (first if second else "一"))]
    if None in parts or not parts[2] or (whole and not second):
        return None
    value = parts[0] + parts[1] / parts[2]
    if tenths:
        value = value / 10 + Fraction(_DIGITS[hundredths or "零"], 100)
    return -value if sign else value


def _tex_sign(match: re.Match[str]) -> str:
    sign, times, comma, power = match.groups()
    return sign or comma or ("×" if times else f"^{power}" if power else " ")


def _tex_fraction(match: re.Match[str]) -> str:
    top, bottom = ((match[place] or match[place + 1]).replace(",", "") for place in (1, 3))
    if len(match[0]) > LONGEST or not Fraction(bottom):
        return UNKNOWN
    value = Fraction(top) / Fraction(bottom)
    return f"{'-' if value < 0 else ''}({abs(value.numerator)}/{value.denominator})"


def _decimal(text: str) -> Fraction | None:
    whole, _, places = text.partition("点")
    value = _UNITS[whole] if whole in _UNITS else _integer(whole)
    if value is None:
        return None
    return value + Fraction(int("".join(str(_DIGITS[digit]) for digit in places) or "0"), 10 ** len(places))


def _integer(text: str) -> Fraction | None:
    # 一百二 may be 120 or a slip for 一百零二.
    if not text or _SHORTENED.search(text):
        return None
    for unit in "亿万":
        if unit in text:
            high, _, low = text.rpartition(unit)
            above, below = _integer(high), _integer(low) if low else Fraction(0)
            return None if above is None or below is None else above * _UNITS[unit] + below
    if text in ("零", "〇"):
        return Fraction(0)
    match = _SECTION.fullmatch(text.replace("〇", "零"))
    if not match:
        return None
    thousands, hundreds, tens, ones = match.groups()
    ten = 0 if tens is None else _DIGITS.get(tens[0], 1)
    return Fraction(sum(_DIGITS[d or "零"] * u for d, u in ((thousands, 1000), (hundreds, 100), (ones, 1))) + 10 * ten)
