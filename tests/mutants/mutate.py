"""What may live here: mutants of the sources, all of them in one copy of the package, and which of them is active is
chosen while it runs: `x < y` becomes `x < y + mutant(17)`, where mutant(17) is 0 unless that is the one."""

from __future__ import annotations

import ast
import copy
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).parents[2] / "src" / "muxcore"

# Module of the copy, for Python. Each process that imports it keeps in the same file which mutants it came by.
PYTHON_SWITCH = '''
import mmap
import os

active = int(os.environ.get("MUTANT", "0"))
with open(os.environ["MUTANTS_REACHED"], "r+b") as _file:
    reached = mmap.mmap(_file.fileno(), 0)


def mutant(number):
    reached[number] = 1
    return number == active


def activate(number):
    global active
    active = number
    os.environ["MUTANT"] = str(number)
'''

COMPILED_SWITCH = '''
cdef extern from *:
    """
    #ifndef MUXCORE_MUTANT
    #define MUXCORE_MUTANT
    #include <fcntl.h>
    #include <stdlib.h>
    #include <sys/mman.h>
    #include <unistd.h>
    static int muxcore_active;
    static unsigned char *muxcore_reached;
    static void muxcore_activate(int number) { muxcore_active = number; }
    __attribute__((constructor)) static void muxcore_mutants(void)
    {
        const char *text = getenv("MUTANT"), *path = getenv("MUTANTS_REACHED");
        int fd = open(path, O_RDWR | O_CLOEXEC);
        off_t size = lseek(fd, 0, SEEK_END);
        muxcore_active = text == NULL ? 0 : atoi(text);
        muxcore_reached = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (muxcore_reached == MAP_FAILED)
            abort();
        close(fd);
    }
    static inline int muxcore_mutant(int number)
    {
        muxcore_reached[number] = 1;
        return number == muxcore_active;
    }
    #endif
    """
    bint mutant "muxcore_mutant"(int number) noexcept nogil
    void activate "muxcore_activate"(int number) noexcept nogil
'''


class Mutant(NamedTuple):
    number: int
    key: str        # file, function and change: the same when other lines of the file change
    line: int

    @property
    def file(self) -> str:
        return self.key.split(" ", 1)[0]


class Register:
    """Numbers mutants, and names them."""

    def __init__(self) -> None:
        self.mutants: list[Mutant] = []
        self.times: Counter[str] = Counter()

    def new(self, file: str, function: str, line: int, change: str) -> int:
        key = f"{file} {function}: {' '.join(change.split())}"
        self.times[key] += 1
        if self.times[key] > 1:
            key += f" #{self.times[key]}"
        self.mutants.append(Mutant(len(self.mutants) + 1, key, line))
        return len(self.mutants)


# --- Python ----------------------------------------------------------------------------------------

BOUNDARIES: dict[type, type] = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}


class PythonMutator(ast.NodeTransformer):
    """Only the bodies of functions: what is done once, when a module is imported, is done before one is chosen."""

    def __init__(self, file: str, register: Register) -> None:
        self.file = file
        self.register = register
        self.names: list[str] = []
        self.within = False  # a function
        self.bound: set[str] = set()  # local names of this function that have been assigned to
        self.returns_bool = False

    def switch(self, node: ast.AST, change: str) -> ast.expr:
        number = self.register.new(self.file, ".".join(self.names), getattr(node, "lineno", 0), change)
        return ast.Call(ast.Name("mutant", ast.Load()), [ast.Constant(number)], [])

    # where

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.names.append(node.name)
        self.definitions_of(node)
        self.names.pop()
        return node

    def definitions_of(self, node: ast.Module | ast.ClassDef | ast.If) -> None:
        """Outside functions."""
        for block in [node.body, node.orelse] if isinstance(node, ast.If) else [node.body]:
            block[:] = [self.visit(part) if isinstance(part, ast.ClassDef | ast.FunctionDef | ast.If) else part
                        for part in block]

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.names.append(node.name)
        outer = self.bound, self.returns_bool, self.within
        self.within = True
        self.bound = {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
        self.returns_bool = isinstance(node.returns, ast.Name) and node.returns.id == "bool"
        docstring = node.body[:1] if ast.get_docstring(node) is not None else []
        node.body = docstring + [self.visit(part) for part in node.body[len(docstring) :]]
        self.bound, self.returns_bool, self.within = outer
        self.names.pop()
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        if self.within:
            node.test = self.condition(node.test)
            self.generic_visit_of(node, "body", "orelse")
        else:
            self.definitions_of(node)
        return node

    def generic_visit_of(self, node: ast.AST, *fields: str) -> None:
        for field in fields:
            setattr(node, field, [self.visit(part) for part in getattr(node, field)])

    def visit_Module(self, node: ast.Module) -> ast.AST:
        self.definitions_of(node)
        behind = next(i for i, part in enumerate(node.body) if isinstance(part, ast.ImportFrom)) + 1
        node.body.insert(behind, ast.parse("from muxcore._mutant import mutant").body[0])
        return node

    # conditions

    def condition(self, node: ast.expr, loop: bool = False) -> ast.expr:
        """Each of its operands always true, and always false. (A loop without an end only costs time.)"""
        if isinstance(node, ast.BoolOp):
            node.values = [self.condition(value, loop) for value in node.values]
            return node
        if isinstance(node, ast.Constant):
            return node
        text = ast.unparse(node)
        if not loop:
            true = self.switch(node, f"`{text}` is true")
        false = self.switch(node, f"`{text}` is false")
        inner = self.visit(node)
        either = inner if loop else ast.BoolOp(ast.Or(), [inner, true])
        return ast.BoolOp(ast.And(), [either, ast.UnaryOp(ast.Not(), false)])

    def visit_While(self, node: ast.While) -> ast.AST:
        node.test = self.condition(node.test, loop=True)
        self.generic_visit_of(node, "body", "orelse")
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        node.test = self.condition(node.test)
        node.body, node.orelse = self.visit(node.body), self.visit(node.orelse)
        return node

    def visit_comprehension(self, node: ast.comprehension) -> ast.AST:
        node.iter = self.visit(node.iter)
        node.ifs = [self.condition(test) for test in node.ifs]
        return node

    def visit_Return(self, node: ast.Return) -> ast.AST:
        if self.returns_bool and node.value is not None and not isinstance(node.value, ast.Constant | ast.IfExp):
            node.value = self.condition(node.value)
        elif node.value is not None:
            node.value = self.visit(node.value)
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        if len(node.ops) > 1 or type(node.ops[0]) not in BOUNDARIES:
            return self.generic_visit(node)
        other = copy.deepcopy(node)
        other.ops = [BOUNDARIES[type(node.ops[0])]()]
        test = self.switch(node, f"`{ast.unparse(node)}` is `{ast.unparse(other)}`")
        return ast.IfExp(test, other, self.generic_visit(node))

    # values

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if node.value is True:
            return ast.UnaryOp(ast.Not(), self.switch(node, "True is False"))
        if node.value is False:
            return self.switch(node, "False is True")
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        one = isinstance(node.op, ast.Add | ast.Sub) and isinstance(node.right, ast.Constant) and node.right.value == 1
        text = ast.unparse(node)
        node.left = self.visit(node.left)
        if one:
            node.right = ast.BinOp(ast.Constant(1), ast.Sub(), self.switch(node, f"`{text}` is without 1"))
        else:
            node.right = self.visit(node.right)
        return node

    # Not looked into: a string's parts, and what is only for a type checker.
    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        node.body = self.visit(node.body)
        return node

    # statements

    def dropped(self, node: ast.stmt, text: str) -> ast.stmt:
        return ast.If(ast.UnaryOp(ast.Not(), self.switch(node, f"no `{text}`")), [node], [])

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        text = ast.unparse(node)
        if not isinstance(node.value, ast.Call):
            return node
        node.value = self.visit(node.value)
        return self.dropped(node, text)

    def visit_Delete(self, node: ast.Delete) -> ast.AST:
        return self.dropped(node, ast.unparse(node))

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        text = ast.unparse(node)
        node.value = self.visit(node.value)
        names = {part.id for target in node.targets for part in ast.walk(target)
                 if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
        is_bound = names <= self.bound
        self.bound |= names
        return self.dropped(node, text) if is_bound else node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        text = ast.unparse(node)
        node.value = self.visit(node.value)
        return self.dropped(node, text)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        text = ast.unparse(node)
        if node.value is not None:
            node.value = self.visit(node.value)
        if isinstance(node.target, ast.Name):
            self.bound.add(node.target.id)
            return node
        return self.dropped(node, text) if node.value is not None else node


def name_of(path: Path) -> str:
    return str(path.relative_to(SOURCE) if path.is_relative_to(SOURCE) else path.name)


def mutate_python(path: Path, register: Register) -> str:
    tree = PythonMutator(name_of(path), register).visit(ast.parse(path.read_text()))
    return ast.unparse(ast.fix_missing_locations(tree))


# --- Cython ----------------------------------------------------------------------------------------

TOKEN = re.compile(
    r"""(?P<comment>\#.*) | (?P<space>\s+) | (?P<join>\\\n)
    | (?P<string>[A-Za-z]{0,2}(?:\"\"\"(?:.|\n)*?\"\"\" | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*'))
    | (?P<name>\w+) | (?P<op><=|>=|==|!=|<<=|>>=|<<|>>|->|//=|//|\*\*|[-+*/%&|^]=|.)""",
    re.VERBOSE,
)
HEAD = re.compile(r"( *)(?:cdef|cpdef|def) (?!extern|enum|struct|class|union)(?:.*\W)?(\w+)\(")
CLOSES = {")": "(", "]": "[", "}": "{"}
STATEMENTS = ("if", "elif", "while", "assert")
NO_CALL = ("cdef", "for", "with", "try", "except", "else", "finally", "return", "raise", "import", "from", "global",
           "pass", "break", "continue", "del", "def", "yield", "@", "cimport")


class Token(NamedTuple):
    kind: str
    text: str
    start: int
    depth: int      # of brackets around it

    @property
    def end(self) -> int:
        return self.start + len(self.text)


def tokens_of(text: str, at: int = 0) -> Iterator[Token]:
    """Those of a logical line: up to a line's end outside brackets."""
    depth = 0
    while at < len(text):
        match = TOKEN.match(text, at)
        assert match is not None
        assert match.lastgroup is not None
        found, at = match[0], match.end()
        if match.lastgroup == "space" and "\n" in found and depth == 0:
            return
        if found in CLOSES:
            depth -= 1
        if match.lastgroup not in ("space", "comment", "join"):
            yield Token(match.lastgroup, found, match.start(), depth)
        if match.lastgroup == "op" and found in CLOSES.values():
            depth += 1


class CythonMutator:
    """Over the text: what is put into a line goes to places of it, so that several mutants may be in one."""

    def __init__(self, file: str, text: str, register: Register) -> None:
        self.file = file
        self.text = text
        self.register = register
        self.inserts: list[tuple[int, int, str]] = []  # (where, order, what)
        self.function = ""
        self.line = 0
        self.returns_bint = False
        self.bound: set[str] = set()

    def new(self, change: str) -> int:
        return self.register.new(self.file, self.function, self.line, change)

    def insert(self, at: int, what: str, opens: bool = False) -> None:
        """At the same place, what closes comes before what opens. An outer one is inserted before an inner one."""
        order = len(self.inserts) + 1
        self.inserts.append((at, order if opens else -order, what))

    def run(self) -> str:
        stack: list[tuple[int, str, bool]] = []  # indentation, name
        at, line = 0, 1
        while at < len(self.text):
            tokens = list(tokens_of(self.text, at + len(self.text[at:]) - len(self.text[at:].lstrip(" "))))
            if not tokens or tokens[0].start != at + self.indent(at):
                at, line = self.next_line(at, line)
                continue
            indent = self.indent(at)
            while stack and stack[-1][0] >= indent:
                stack.pop()
            code = self.text[tokens[0].start : tokens[-1].end]
            head = HEAD.match(" " * indent + code)
            if head and tokens[-1].text == ":":
                stack.append((indent, head[2], "bint " in code.split("(")[0]))
                self.bound = set()
            elif stack:
                self.function, self.line = stack[-1][1], line
                self.returns_bint = stack[-1][2]
                self.statement(tokens)
            line += self.text.count("\n", at, tokens[-1].end)
            at, line = self.next_line(tokens[-1].end, line)
        parts, last = [], 0
        for where, _, what in sorted(self.inserts):
            parts += [self.text[last:where], what]
            last = where
        return "".join(parts) + self.text[last:]

    def indent(self, at: int) -> int:
        return len(self.text[at:]) - len(self.text[at:].lstrip(" "))

    def next_line(self, at: int, line: int) -> tuple[int, int]:
        end = self.text.find("\n", at)
        return (len(self.text), line) if end < 0 else (end + 1, line + 1)

    def code(self, tokens: list[Token]) -> str:
        return self.text[tokens[0].start : tokens[-1].end]

    # statements

    def statement(self, tokens: list[Token], alone: bool = True) -> None:
        first = tokens[0].text
        if tokens[0].kind == "string" or first in ("pass", "import", "from", "global", "@", "with", "cimport", "for"):
            return
        if first in STATEMENTS:
            colon = next((i for i, token in enumerate(tokens) if token.text == ":" and token.depth == 0), len(tokens))
            self.condition(tokens[1:colon], loop=first == "while")
            self.values(tokens[1:colon])
            if tokens[colon + 1 :]:
                self.statement(tokens[colon + 1 :], alone=False)
            return
        if first == "cdef":
            equals = [i for i, token in enumerate(tokens) if token.text == "=" and token.depth == 0]
            self.bound |= {tokens[i - 1].text for i in equals}
            if equals and not any(token.text == "[" for token in tokens[: equals[0]]):
                self.values(tokens[equals[0] + 1 :])
            return
        if first == "return" and self.returns_bint and len(tokens) > 1:
            self.condition(tokens[1:])
        elif first not in NO_CALL and alone:
            self.drop(tokens)
        self.values(tokens)

    def drop(self, tokens: list[Token]) -> None:
        assigns = [i for i, token in enumerate(tokens)
                   if token.depth == 0 and re.fullmatch(r"=|[-+*/%&|^]=|//=|<<=|>>=", token.text)]
        if assigns:
            target = tokens[: assigns[-1]]
            names = {token.text for token in target if token.kind == "name"}
            local = all(token.kind == "name" or token.text in ",=" for token in target)
            is_bound = names <= self.bound
            self.bound |= names if local else set()
            if local and not is_bound and tokens[assigns[0]].text == "=":
                return
        elif tokens[-1].text != ")" or tokens[0].kind != "name":
            return
        self.insert(tokens[0].start, f"if not mutant({self.new(f'no `{self.code(tokens)}`')}): ", opens=True)

    # conditions

    def condition(self, tokens: list[Token], loop: bool = False) -> None:
        """As PythonMutator.condition."""
        if not tokens:
            return
        depth = tokens[0].depth
        cuts = [i for i, token in enumerate(tokens) if token.depth == depth and token.text in ("and", "or")]
        for begin, end in zip([0, *[cut + 1 for cut in cuts]], [*cuts, len(tokens)], strict=True):
            self.operand(tokens[begin:end], loop)

    def operand(self, tokens: list[Token], loop: bool) -> None:
        if tokens[0].text == "not" and len(tokens) > 1 and self.is_group(tokens[1:]):
            tokens = tokens[1:]
        if self.is_group(tokens):
            self.condition(tokens[1:-1], loop)
            return
        if tokens[0].text in ("True", "False", "1", "0") and len(tokens) == 1:
            return
        text = self.code(tokens)
        if loop:
            self.insert(tokens[0].start, "((not not (", opens=True)
            self.insert(tokens[-1].end, f")) and not mutant({self.new(f'`{text}` is false')}))")
        else:
            true, false = self.new(f"`{text}` is true"), self.new(f"`{text}` is false")
            self.insert(tokens[0].start, "((not not (", opens=True)
            self.insert(tokens[-1].end, f") or mutant({true})) and not mutant({false}))")

    def is_group(self, tokens: list[Token]) -> bool:
        """Whether it is one pair of brackets with a condition of several operands in it."""
        if tokens[0].text != "(" or tokens[-1].text != ")":
            return False
        inside, depth = tokens[1:-1], tokens[0].depth
        return (all(token.depth > depth for token in inside)
                and any(token.text in ("and", "or") and token.depth == depth + 1 for token in inside))

    # values

    def values(self, tokens: list[Token]) -> None:
        for i, token in enumerate(tokens):
            before = tokens[i - 1].text if i else ""
            if token.text in ("True", "False") and token.kind == "name":
                self.constant(token)
            elif token.text == "1" and before in "+-" and i > 1 and tokens[i - 2].text not in "(,=[":
                self.insert(token.start, "(", opens=True)
                number = self.new(f"`{self.code(tokens[i - 2 : i + 1])}` is without 1")
                self.insert(token.end, f" - mutant({number}))")
            elif re.fullmatch(r"F_[A-Z_]+", token.text) and not self.file.endswith("syscalls.pxd"):
                number = self.new(f"`{self.code(tokens)}` without {token.text}")
                self.insert(token.start, "(", opens=True)
                self.insert(token.end, f" * (not mutant({number})))")
            elif token.text in ("<", "<=", ">", ">=") and self.is_comparison(token):
                self.boundary(tokens, i)
            elif token.text == "if" and i:
                end = next((j for j in range(i, len(tokens)) if tokens[j].depth < token.depth
                            or (tokens[j].text == "else" and tokens[j].depth == token.depth)), len(tokens))
                self.condition(tokens[i + 1 : end])

    def constant(self, token: Token) -> None:
        number = self.new(f"{token.text} is {token.text == 'False'}")
        self.insert(token.start, "(", opens=True)
        self.insert(token.end, f" and not mutant({number}))" if token.text == "True" else f" or mutant({number}))")

    def is_comparison(self, token: Token) -> bool:
        """A cast has no space behind its `<`."""
        return self.text[token.start - 1] == " " and self.text[token.end] == " "

    def boundary(self, tokens: list[Token], i: int) -> None:
        depth = tokens[i].depth
        stops = ("and", "or", "not", "if", "else", "return", "=", ",", ":", "==", "!=", "<", "<=", ">", ">=")

        def stops_at(token: Token) -> bool:
            casts = token.text in "<>" and not self.is_comparison(token)
            return token.depth < depth or (token.depth == depth and token.text in stops and not casts)

        begin = next((j + 1 for j in range(i - 1, -1, -1) if stops_at(tokens[j])), 0)
        end = next((j for j in range(i + 1, len(tokens)) if stops_at(tokens[j])), len(tokens))
        chained = any(tokens[j].text in ("<", "<=", ">", ">=") and tokens[j].depth == depth
                      for j in (begin - 1, end) if 0 <= j < len(tokens))
        sides = tokens[begin:end]
        if chained or any(token.text in ("&", "|", "^", "<<", ">>") and token.depth == depth for token in sides):
            return
        op = tokens[i].text
        other = op.rstrip("=") if "=" in op else op + "="
        number = self.new(f"`{self.code(sides)}` is with {other}")
        at = tokens[end - 1].end if op in ("<", ">=") else tokens[i - 1].end
        self.insert(at, f" + mutant({number})")


def mutate_cython(path: Path, register: Register) -> str:
    name = name_of(path)
    text = CythonMutator(name, path.read_text(), register).run()
    if path.suffix == ".pxi":
        return text
    first = re.search(r"^(from|cimport|cdef|import) ", text, re.MULTILINE)
    if first is None:  # __init__.pxd: no code
        return text
    return text[: first.start()] + "from muxcore._switch cimport mutant\n" + text[first.start() :]
