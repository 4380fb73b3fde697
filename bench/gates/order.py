"""The order that a warp-specialised kernel relies on, read from what the compiler made of it.

Between threads of a warpgroup Triton puts its own barriers, and ptxas moves what depends on nothing. So of each Gluon
kernel it is read, in the order of the code, that

- an arrival at a barrier in shared memory, which one thread makes for its warpgroup, stands behind a barrier of the
  warpgroup since its last product was waited for, and since it last read or wrote shared memory;
- threads write shared memory only behind a barrier since one of them waited until the copy engine had read it;
- the copy engine is sent to store a tile only behind a fence since it was written, and a barrier since that;
- attention's exponentials stand in front of the wait for the product that they shall run under.
"""

import re
from collections.abc import Iterator

_PRODUCT = re.compile(r"wgmma\.wait_group")
_BARRIER = re.compile(r"\bbar(rier)?\.sync")
_SHARED = re.compile(r"\b(ld|st)\.shared|\b(st|ld)matrix")
_WRITES = re.compile(r"\bst\.shared|\bstmatrix")
_ARRIVES = re.compile(r"mbarrier\.arrive\.shared")
_STORES = re.compile(r"cp\.async\.bulk\.tensor.*global\.shared")


def faults(ptx: str, listing: str) -> list[str]:
    """What is out of order, each once; `listing` is nvdisasm's."""
    return list(dict.fromkeys([*_of_warpgroups(ptx), *_of_softmax(listing)]))


def _of_warpgroups(ptx: str) -> Iterator[str]:
    open_since = ""  # what the warpgroup has done since its last barrier
    waited_for_copies = False
    written = ""  # "", "unfenced", "fenced" since the last barrier
    for line in ptx.splitlines():
        if _PRODUCT.search(line):
            open_since = "a product"
        elif _BARRIER.search(line):
            open_since, waited_for_copies = "", False
            written = "" if written == "fenced" else written
        elif _SHARED.search(line):
            if _WRITES.search(line):
                if waited_for_copies:
                    yield "shared memory is written where one thread alone waited for its copies"
                written = "unfenced"
            open_since = "shared memory"
        elif "fence.proxy.async" in line:
            written = "fenced" if written else ""
        elif "cp.async.bulk.wait_group" in line:
            waited_for_copies = True
        elif _ARRIVES.search(line) and open_since:
            yield f"an arrival with no barrier since {open_since}"
        elif _STORES.search(line) and written:
            yield "a copy of a tile with no " + ("fence" if written == "unfenced" else "barrier since its fence")


def _of_softmax(listing: str) -> Iterator[str]:
    """In each loop with products and exponentials: these before its second wait. The first is for the scores, the other
    for p v in the forward, for do vᵀ or v doᵀ in the backward."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    loops = []
    for line in listing.splitlines():
        if found := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[found[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*(.*?)\s*;", line):
            instructions.append((found[1], found[2]))
            target = re.search(r"`\((\.L_x_\d+)\)", found[2]) if found[1].startswith("BRA") else None
            if target and target[1] in labels:
                loops.append(range(labels[target[1]], len(instructions)))
    inner = [s for s in loops if not any(o != s and o.start >= s.start and o.stop <= s.stop for o in loops)]
    for loop in inner:
        body = [instructions[i] for i in loop]
        exponentials = [i for i, (name, _) in enumerate(body) if name.startswith("MUFU.EX2")]
        waits = [i for i, (name, _) in enumerate(body) if name.startswith("WARPGROUP.DEPBAR")]
        if exponentials and waits and any(name.startswith("HGMMA") for name, _ in body):
            under = sum(i < waits[:2][-1] for i in exponentials)
            if under < 0.9 * len(exponentials):
                yield f"{len(exponentials) - under} of {len(exponentials)} exponentials stand behind the next wait"
