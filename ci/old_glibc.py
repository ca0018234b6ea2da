"""Creates stub libraries for linking release wheels, so that they run on older systems than the one they are built on.

    LDFLAGS=$(python ci/old_glibc.py FOLDER [PREFIX])

In glibc 2.34, the functions of libpthread, libdl and librt moved into libc. There each has a new symbol version next to
the old one, and linkers choose the new one. FOLDER receives a stub for each former library, whose symbols have their
newest version before 2.34. Linked ahead of libc, the stubs make the linker choose those versions. The script prints
the linker flags, which also link libstdc++ statically and drop unused sections. With an older glibc there is nothing to
stub, and only those two remain. Needs GCC and binutils, whose names start with PREFIX, such as aarch64-linux-gnu-.
"""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

MOVED = (2, 34)
# Where the functions were before that; moved functions that match no other pattern were in libpthread.
FORMER_LIBRARIES = {
    "libdl.so.2": r"dl\w+",
    "librt.so.1": r"(aio|lio|mq|shm|timer)_\w+",
    "libutil.so.1": r"openpty|forkpty|login|login_tty|logout|logwtmp",
    "libanl.so.1": r"gai_\w+|getaddrinfo_a",
    "libpthread.so.0": r"(?!__libc_start_main)\w+",
}
# libstdc++ asks libc (since 2.32) whether the process is single-threaded, to skip atomic operations. It is not.
THREADS = '__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;\n'


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def moved_functions(libc: str, objdump: str) -> dict[str, str]:
    """The functions that moved into libc, each with its newest symbol version from before the move."""
    versions: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for number, name in re.findall(r"\s\(?GLIBC_([\d.]+)\)?\s+(\w+)$", output(objdump, "-T", libc), re.MULTILINE):
        versions[name].add(tuple(map(int, number.split("."))))
    return {
        name: "GLIBC_" + ".".join(map(str, max(found - {MOVED})))
        for name, found in sorted(versions.items())
        if max(found) == MOVED and len(found) > 1
    }


def write_stand_in(library: Path, functions: dict[str, str], gcc: str) -> None:
    """Writes a shared library of that name, with these functions under these versions and with empty bodies."""
    source, script = library.with_suffix(".c"), library.with_suffix(".map")
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in functions))
    script.write_text(
        "".join(
            f"{version} {{ {' '.join(f'{name};' for name in functions if functions[name] == version)} }};\n"
            for version in sorted(set(functions.values()))
        )
    )
    flags = [f"-Wl,-soname,{library.name}", f"-Wl,--version-script={script}"]
    output(gcc, "-shared", "-nostdlib", "-fno-builtin", "-w", str(source), *flags, "-o", str(library))


def main(folder: Path, prefix: str = "") -> None:
    gcc = f"{prefix}gcc"
    folder.mkdir(parents=True, exist_ok=True)
    functions = moved_functions(output(gcc, "-print-file-name=libc.so.6").strip(), f"{prefix}objdump")
    stand_ins = []
    for name, pattern in FORMER_LIBRARIES.items():
        own = {function: version for function, version in functions.items() if re.fullmatch(pattern, function)}
        functions = {function: version for function, version in functions.items() if function not in own}
        if own:
            write_stand_in(folder / name, own, gcc)
            stand_ins.append(f"-l:{name}")
    (folder / "threads.c").write_text(THREADS)
    output(gcc, "-fPIC", "-c", str(folder / "threads.c"), "-o", str(folder / "threads.o"))
    output(f"{prefix}ar", "rcsD", str(folder / "libthreads.a"), str(folder / "threads.o"))
    # The stubs come after libstdc++, which needs them too.
    static = ["-Wl,-Bstatic", "-lstdc++", "-lthreads", "-Wl,-Bdynamic"]
    print("-Wl,--gc-sections", f"-L{folder.resolve()}", *static, *stand_ins)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), *sys.argv[2:])
