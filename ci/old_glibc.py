"""Makes what a release wheel is linked with, so that it runs on older systems than the one it was built on.

    LDFLAGS=$(python ci/old_glibc.py FOLDER)

Since glibc 2.34 the functions of libpthread, libdl and librt lie in libc, each under a new symbol version beside the
old one, and a linker takes the new. FOLDER gets a stand-in for each of the former libraries whose symbols have the
newest version before 2.34; linked in front of libc, they make the linker take those. Printed are the flags for that,
which also link libstdc++ into the extension and keep what nobody calls out of it. On an older glibc there is nothing to
stand in for, and only the latter is left. Needs GCC and binutils.
"""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

MOVED = (2, 34)
# Where functions were before that; all others, as far as they moved, were in libpthread.
FORMER_LIBRARIES = {
    "libdl.so.2": r"dl\w+",
    "librt.so.1": r"(aio|lio|mq|shm|timer)_\w+",
    "libutil.so.1": r"openpty|forkpty|login|login_tty|logout|logwtmp",
    "libanl.so.1": r"gai_\w+|getaddrinfo_a",
    "libpthread.so.0": r"(?!__libc_start_main)\w+",
}
# libstdc++ asks libc (2.32) whether there are other threads, to save atomic operations if not. There are.
THREADS = '__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;\n'


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def moved_functions(libc: str) -> dict[str, str]:
    """The functions that were in another library once, each with its newest symbol version from that time."""
    versions: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for number, name in re.findall(r"\s\(?GLIBC_([\d.]+)\)?\s+(\w+)$", output("objdump", "-T", libc), re.MULTILINE):
        versions[name].add(tuple(map(int, number.split("."))))
    return {
        name: "GLIBC_" + ".".join(map(str, max(found - {MOVED})))
        for name, found in sorted(versions.items())
        if max(found) == MOVED and len(found) > 1
    }


def write_stand_in(library: Path, functions: dict[str, str]) -> None:
    """A shared library of that name which has these functions under these versions, and does nothing."""
    source, script = library.with_suffix(".c"), library.with_suffix(".map")
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in functions))
    script.write_text(
        "".join(
            f"{version} {{ {' '.join(f'{name};' for name in functions if functions[name] == version)} }};\n"
            for version in sorted(set(functions.values()))
        )
    )
    flags = [f"-Wl,-soname,{library.name}", f"-Wl,--version-script={script}"]
    output("gcc", "-shared", "-nostdlib", "-fno-builtin", "-w", str(source), *flags, "-o", str(library))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    functions = moved_functions(output("gcc", "-print-file-name=libc.so.6").strip())
    stand_ins = []
    for name, pattern in FORMER_LIBRARIES.items():
        own = {function: version for function, version in functions.items() if re.fullmatch(pattern, function)}
        functions = {function: version for function, version in functions.items() if function not in own}
        if own:
            write_stand_in(folder / name, own)
            stand_ins.append(f"-l:{name}")
    (folder / "threads.c").write_text(THREADS)
    output("gcc", "-fPIC", "-c", str(folder / "threads.c"), "-o", str(folder / "threads.o"))
    output("ar", "rcsD", str(folder / "libthreads.a"), str(folder / "threads.o"))
    # The stand-ins come after libstdc++, which needs them too.
    static = ["-Wl,-Bstatic", "-lstdc++", "-lthreads", "-Wl,-Bdynamic"]
    print("-Wl,--gc-sections", f"-L{folder.resolve()}", *static, *stand_ins)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
