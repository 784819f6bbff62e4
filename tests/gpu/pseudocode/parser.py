"""The language of AMD's descriptions: a text as nested tuples."""

import re
from functools import lru_cache

from .values import Value

_TOKEN = re.compile(
    r"//[^\n]*|\d+'[UIFB]|\d+'-?(?:0x[0-9a-f]+|\d+)U?|0x[0-9a-fA-F]+(?:ULL|LL|U)?|\d+\.\d+F?|\d+(?:ULL|LL|U)?"
    r"|[A-Za-z_]\w*|\*\*|<<|>>|<=|>=|==|!=|<>|&&|\|\||\+=|[-+*/%&|^~!<>=?:;,.(){}\[\]]"
)
_LEVELS = (
    ("||",), ("&&",), ("|",), ("^",), ("&",), ("==", "!=", "<>"), ("<", "<=", ">", ">="), ("<<", ">>"), ("+", "-"),
    ("*", "/", "%"), ("**",),
)  # fmt: skip


class Parser:
    """Makes nested tuples of a text."""

    def __init__(self, text: str):
        self.tokens = [token for token in _TOKEN.findall(text) if not token.startswith("//")]
        self.place = 0

    def peek(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        assert not expected or token == expected, (expected, self.tokens[self.place - 8 : self.place + 4])
        self.place += 1
        return token

    def skip(self, token: str) -> bool:
        found = self.peek() == token
        self.place += found
        return found

    def block(self, *ends: str) -> list:
        statements = []
        while self.peek() not in ("", *ends):
            if not self.skip(";"):
                statements.append(self.statement())
        return statements

    def statement(self):
        word = self.peek()
        if word == "if":
            self.take()
            branches, otherwise = [], []
            while True:
                condition = self.expression()
                self.take("then")
                branches.append((condition, self.block("elsif", "else", "endif")))
                if not self.skip("elsif"):
                    break
            if self.skip("else"):
                otherwise = self.block("endif")
            self.take("endif")
            return "if", branches, otherwise
        if word == "for":
            self.take()
            name, _, first = self.take(), self.take("in"), self.expression()
            self.take(":")
            last = self.expression()
            self.take("do")
            body = self.block("endfor")
            self.take("endfor")
            return "for", name, first, last, body
        if word == "declare":
            self.take()
            name, is_list = self.take(), False
            while self.peek() not in (";", ""):
                is_list |= self.take() == "["
            return "declare", name, is_list
        if word == "return":
            self.take()
            return "return", self.expression()
        target = self.unary()
        if self.peek() == "=" and self.tokens[self.place + 1] == "lambda":
            self.take(), self.take()
            return "define", target[1], self.function()
        self.take("=")
        return "assign", target, self.expression()

    def function(self):
        self.take("(")
        names = []
        while not self.skip(")"):
            names.append(self.take())
            self.skip(",")
        self.take("(")
        is_block = self.peek() in ("declare", "if", "for", "return")
        body = self.block(")") if is_block else [("return", self.expression())]
        self.skip(";")
        self.take(")")
        return names, body

    def expression(self):
        condition = self.binary(0)
        if not self.skip("?"):
            return condition
        yes = self.expression()
        self.take(":")
        return "choose", condition, yes, self.expression()

    def binary(self, level: int):
        if level == len(_LEVELS):
            return self.unary()
        found = self.binary(level + 1)
        while self.peek() in _LEVELS[level]:
            found = "binary", self.take(), found, self.binary(level + 1)
        return found

    def unary(self):
        if self.peek() in ("-", "~", "!", "+"):
            return "unary", self.take(), self.unary()
        found = self.primary()
        while self.peek() in (".", "["):
            if self.take() == ".":
                found = "typed", found, self.take()
                continue
            first = self.expression()
            found = ("range", found, first, self.expression()) if self.skip(":") else ("item", found, first)
            self.take("]")
        return found

    def primary(self):
        token = self.take()
        if token == "(":
            found = self.expression()
            self.take(")")
            return found
        if token == "{":
            parts = [self.expression()]
            while self.skip(","):
                parts.append(self.expression())
            self.take("}")
            return "joined", parts
        if re.match(r"\d+'[UIFB]$", token):
            width, kind = token.split("'")
            self.take("(")
            found = self.expression()
            self.take(")")
            return "cast", kind.lower(), int(width), found
        if "'" in token:
            width, number = token.split("'")
            return "number", Value("u" if number.endswith("U") else "i", int(width), int(number.rstrip("U"), 0))
        if re.match(r"\d+\.\d+", token):
            return "number", Value("f", 32 if token.endswith("F") else 64, float(token.rstrip("F")))
        if token[0].isdigit():
            digits = token.rstrip("UL")
            suffix = token[len(digits) :]
            return "number", Value("u" if "U" in suffix else "i", 64 if "LL" in suffix else 32, int(digits, 0))
        if self.skip("("):
            arguments = []
            while not self.skip(")"):
                arguments.append(self.expression())
                self.skip(",")
            return "call", token, arguments
        return "name", token


@lru_cache(maxsize=512)
def parsed(text: str):
    return Parser(text).block()
