"""Write down which operators a wheel of torch_npu has kernels for.

    pip download --no-deps torch-npu==2.14.0
    python tests/npu/extract_operators.py torch_npu-2.14.0-*.whl

The wheel carries the two lists from which its registrations are generated
(torch_npu/csrc/aten/*.yaml). A name counts if its library also has it as a string, which
is what registering by name leaves behind. So the result says what is registered, not for
which types and shapes a kernel works, nor how fast it is.
"""

import re
import sys
import zipfile
from pathlib import Path

LISTS = "torch_npu/csrc/aten/"
LIBRARY = "torch_npu/lib/libtorch_npu.so"
OUT = Path(__file__).with_name("implemented_operators.txt")
# Sections of the lists, and the namespace of what stands in them.
NAMESPACES = {"supported": "aten", "quant": "aten", "custom": "npu"}
# "- abs", "- func: abs.out", or a whole signature "  func: npu_iou(Tensor bboxes, ...)".
ENTRY = re.compile(r"^\s*(?:- )?(?:func: )?([A-Za-z_]\w*(?:\.\w+)?)(?:\(.*)?$")
SECTION = re.compile(r"^(\w+):")


def listed(text: str) -> set[str]:
    """Names with their namespaces that one list has."""
    names, namespace = set(), None
    for line in text.splitlines():
        if section := SECTION.match(line):
            namespace = NAMESPACES.get(section[1])
        elif namespace and (entry := ENTRY.match(line)):
            names.add(f"{namespace}::{entry[1]}")
    return names


def registered(names: set[str], library: bytes) -> set[str]:
    """Those of the names that the library has as a whole string."""
    strings = set(library.split(b"\0"))
    return {
        name
        for name in names
        # aten's are registered without the namespace, its own with it or as a signature.
        if name.partition("::")[2].encode() in strings or name.encode() in strings
    }


def extract(wheel: Path) -> str:
    """The text of the data file."""
    with zipfile.ZipFile(wheel) as archive:
        lists = [n for n in archive.namelist() if n.startswith(LISTS) and n.endswith(".yaml")]
        names = set().union(*(listed(archive.read(name).decode()) for name in lists))
        known = registered(names, archive.read(LIBRARY))
    head = (
        f"# Operators that {wheel.name} registers kernels for: {len(known)}.",
        f"# Listed in {', '.join(sorted(lists))}",
        f"# and found as strings in {LIBRARY}; {len(names - known)} more are listed only.",
        "# Written by tests/npu/extract_operators.py.",
    )
    return "\n".join((*head, *sorted(known), ""))


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].endswith(".whl"):
        sys.exit(__doc__)
    OUT.write_text(extract(Path(sys.argv[1])))
    print(f"{OUT}: {OUT.read_text().splitlines()[0]}")
