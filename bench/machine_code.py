"""Reads NVIDIA's assembly: PTX, which still knows tensors by their arguments, and SASS, which is what a GPU executes.

Both have labels, branches and guards, so that one parser and one control flow graph serve the two.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

_LABEL = re.compile(r"^\s*([.$\w][\w$.]*):")
_INSTRUCTION = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(@!?%?\w+)?\s*([A-Za-z][\w.:]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"[.$][\w$.]+|\w+$")
_REGISTER = re.compile(r"%[a-z]+\d+")
# Shared memory (cp.async) is filled past the registers: 16 bytes at a time, or 4 to 8 where rows are not aligned.
_ACCESS = re.compile(r"(ld|st)\.(?:\w+\.)?global\S*?(?:\.v(\d))?\.[a-z]+(\d+)$")


@dataclass(frozen=True)
class Instruction:
    """One line of assembly; `guard` is its predicate or empty."""

    guard: str
    name: str
    operands: str


class Program:
    """The instructions of one kernel and where each may continue."""

    def __init__(self, text: str) -> None:
        self.instructions: list[Instruction] = []
        labels: dict[str, list[int]] = {}
        for line in text.splitlines():
            if label := _LABEL.match(line):
                labels.setdefault(label[1], []).append(len(self.instructions))
            elif found := _INSTRUCTION.match(line):
                self.instructions.append(Instruction(found[1] or "", found[2], found[3]))
        self.successors = [self._next(i, labels) for i in range(len(self.instructions))]

    def _next(self, index: int, labels: dict[str, list[int]]) -> list[int]:
        one, following = self.instructions[index], [index + 1] if index + 1 < len(self.instructions) else []
        kind = one.name.upper().split(".")[0]
        if kind in ("EXIT", "RET"):
            return following if one.guard else []
        if kind in ("BRX", "JMP", "JMX"):
            raise ValueError(f"a branch that this reader does not follow: {one}")
        if kind == "BRA":  # with a second predicate, or one of divergence, before its target
            target = _TARGET.search(one.operands)
            conditional = one.guard or "," in one.operands
            # Inline assembly may define a label such as waitLoop several times, each in a scope of a few lines.
            nearest = min(labels[target[0]], key=lambda at: abs(at - index))
            return [nearest, *(following if conditional else [])]
        return following

    def _works(self, body: Iterable[int]) -> dict[int, int]:
        """Return which instructions of a body do what the others are there for, and how much of it.

        Those are accesses of memory, by their bytes, and special functions. Where some accesses are 16 bytes wide, the
        others are not counted: they are for single elements and for ragged ends.
        """
        names = {i: self.instructions[i].name for i in body}
        wide = any(re.match(r"(LDG|STG).*\.128$", name) for name in names.values())
        found = {}
        for index, name in names.items():
            size = re.search(r"\.[US]?(8|16|64|128)$", name)
            if name.startswith("MUFU"):
                found[index] = 4
            elif name.startswith(("LDG", "STG")) and (not wide or name.endswith(".128")):
                found[index] = int(size[1]) // 8 if size else 4
        return found

    @cached_property
    def _search(self) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the reachable instructions, each after all that follow it, and the edges that close a loop."""
        order, closing = [], []
        state: dict[int, bool] = {0: True}  # True: on the way from the start
        stack = [(0, iter(self.successors[0]))]
        while stack:
            node, rest = stack[-1]
            for after in rest:
                if state.get(after):
                    closing.append((node, after))
                elif after not in state:
                    state[after] = True
                    stack.append((after, iter(self.successors[after])))
                    break
            else:
                state[node] = False
                order.append(node)
                stack.pop()
        return order, closing

    @cached_property
    def loops(self) -> dict[int, set[int]]:
        """Return the instructions of every loop by its first one."""
        before: dict[int, list[int]] = {}
        for node in self._search[0]:
            for after in self.successors[node]:
                before.setdefault(after, []).append(node)
        loops: dict[int, set[int]] = {}
        for node, head in self._search[1]:
            body, todo = loops.setdefault(head, {head}), [node]
            while todo:
                one = todo.pop()
                if one not in body:
                    body.add(one)
                    todo += before[one]
        return loops

    def path(self, head: int, body: Iterable[int] | None = None) -> list[int]:
        """Return the shortest way from `head` to the end of the body (of the program) among those that do most work.

        What runs in one iteration of many, such as masking one item or a ragged end, is so left out. Loops inside run
        once.
        """
        inside, closing = None if body is None else set(body), set(self._search[1])
        works = self._works(self._search[0] if inside is None else inside)
        best: dict[int, tuple[int, int, int | None]] = {}  # most work, fewest instructions (negative), next
        for node in self._search[0]:
            if inside is not None and node not in inside:
                continue
            leaves = self.instructions[node].name.upper().startswith(("EXIT", "RET"))
            ends = leaves if inside is None else (node, head) in closing
            ways = [
                (best[a][0], best[a][1], a) for a in self.successors[node] if a in best and (node, a) not in closing
            ]
            if ends:
                ways.append((0, 0, -1))
            if ways:
                work, length, after = max(ways)
                best[node] = (work + works.get(node, 0), length - 1, None if after < 0 else after)
        found: list[int] = []
        at: int | None = head
        while at is not None:
            found.append(at)
            at = best[at][2]
        return found

    def hot_path(self) -> list[int]:
        """Return one iteration of the loop that does most work of its own; the whole program if it has no loop.

        Work in a loop inside another counts four times, for the iterations that it has at least.
        """
        if not self.loops:
            return self.path(0)

        def own(head: int) -> tuple[int, int]:
            body = self.loops[head].difference(*(inner for inner in self.loops.values() if inner < self.loops[head]))
            depth = sum(self.loops[head] < outer for outer in self.loops.values())
            return sum(self._works(body).values()) * 4**depth, len(body)

        head = max(self.loops, key=own)
        return self.path(head, self.loops[head])

    def reaches(self, start: int, ends: set[int], barrier: str) -> bool:
        """Say whether any of `ends` can follow `start` without a barrier between."""
        seen, todo = set(), [start]
        while todo:
            for after in self.successors[todo.pop()]:
                if after in ends:
                    return True
                if after not in seen and not self.instructions[after].name.startswith(barrier):
                    seen.add(after)
                    todo.append(after)
        return False


@dataclass(frozen=True)
class Access:
    """One read ("ld") or write ("st") of global memory in PTX."""

    index: int
    kind: str
    size: int  # bytes of a lane


def accesses(program: Program, parameters: Sequence[str]) -> dict[str, list[Access]]:
    """Return the accesses of every tensor in the PTX of a kernel; `parameters` are names, empty where it is no pointer.

    An address is a pointer argument to which offsets were added: which one is followed from register to register.
    """
    sources: dict[str, set[str]] = {}
    changed = True
    while changed:
        changed = False
        for one in program.instructions:
            if one.name.startswith(("ld.global", "ld.shared", "st.", "cp.")):
                continue
            registers = _REGISTER.findall(one.operands)
            if parameter := re.search(r"_param_(\d+)", one.operands) if one.name.startswith("ld.param") else None:
                new = {parameters[int(parameter[1])]} if int(parameter[1]) < len(parameters) else set()
            else:
                new = set().union(*(sources.get(r, ()) for r in registers[1:]))
            if registers and not new <= sources.setdefault(registers[0], set()):
                sources[registers[0]] |= new
                changed = True
    found: dict[str, list[Access]] = {name: [] for name in parameters}
    for index, one in enumerate(program.instructions):
        places = re.findall(r"\[\s*(%\w+)", one.operands)
        if access := _ACCESS.match(one.name):
            kind, size = access[1], int(access[2] or 1) * int(access[3]) // 8
        elif one.name.startswith("cp.async") and ".global" in one.name and len(places) == 2:
            kind, size = "ld", int(one.operands.split(",")[2].strip(), 0)
        else:
            continue
        for name in sources.get(places[-1], ()):
            found[name].append(Access(index, kind, size))
    return found


def _section(binary: bytes) -> bytes:
    """Return the machine code of a cubin that holds one kernel: the section `.text.NAME` of an ELF file."""
    (table,) = struct.unpack_from("<Q", binary, 40)
    count, names = struct.unpack_from("<HH", binary, 60)
    entries = [struct.unpack_from("<I4xQQQQ", binary, table + 64 * index) for index in range(count)]
    name_table = entries[names][3]
    found = [
        binary[offset : offset + size]
        for name, _, _, offset, size in entries
        if binary.startswith(b".text.", name_table + name)
    ]
    if len(found) != 1:
        raise ValueError(f"a cubin with {len(found)} kernels, not 1")
    return found[0]


def disassemble(binaries: Sequence[bytes], tools: Path) -> list[Program]:
    """Return the SASS of each cubin, built for sm_90 with one kernel; all at once, since nvdisasm takes long to start.

    It takes one file: the code of all kernels, one after another, without the labels that a cubin would have.
    """
    sections = [_section(binary) for binary in binaries]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(sections))
        file.flush()
        command = [tools / "nvdisasm", "--binary", "SM90a", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [  # every address is a label, written as branches write it
        f"{int(address, 16):#x}:\n{instruction}"
        for address, instruction in re.findall(r"^\s*/\*([0-9a-f]+)\*/(.*)", listing, re.MULTILINE)
    ]
    programs, start = [], 0
    for section in sections:
        end = start + len(section) // 16  # bytes of an instruction
        programs.append(Program("\n".join(lines[start:end])))
        start = end
    if start != len(lines):
        raise ValueError(f"{start} instructions in the cubins, {len(lines)} disassembled")
    return programs
