"""The builder layer: environment variables, the choice of targets, load() and builds at first use."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from adamops.op_builder import BuildError, CPUAdamBuilder, OpUnavailableError, build_ext, cache, environment
from adamops.op_builder.compile import compile_op
from adamops.op_builder.compiler import Compiler
from adamops.op_builder.simd import TARGETS, choose_targets, native_cpu_flags, targets_of
from setuptools import Distribution

from adamops import op_builder


@pytest.mark.smoke
def test_get_names_the_ops_there_are():
    assert op_builder.get("cpu_adam").NAME == "cpu_adam"
    assert op_builder.get("cpu_adam") is op_builder.get("cpu_adam")
    with pytest.raises(KeyError, match="no op 'sgd'; there are cpu_adam, fused_adam, torch_adam"):
        op_builder.get("sgd")


def test_native_targets_without_py_cpuinfo(monkeypatch):
    monkeypatch.setitem(sys.modules, "cpuinfo", None)
    native_cpu_flags.cache_clear()
    monkeypatch.setenv("ADAMOPS_CPU_TARGETS", "native")
    with pytest.raises(ValueError, match="ADAMOPS_CPU_TARGETS='native' needs py-cpuinfo: pip install py-cpuinfo"):
        choose_targets(Compiler.find(), "all")


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("variable", "value", "read", "message"),
    [
        (
            "ADAMOPS_BUILD_OPS",
            "yes",
            lambda: environment.build_switch("cpu_adam"),
            "use 0 .never build., 1 .must build.",
        ),
        ("ADAMOPS_BUILD_CPU_ADAM", "2", lambda: environment.build_switch("cpu_adam"), "ADAMOPS_BUILD_CPU_ADAM='2'"),
        ("ADAMOPS_CPU_TARGETS", "avx9", lambda: environment.cpu_targets(["avx2"]), "native, all, or a list of avx2"),
        ("ADAMOPS_SIMD", "avx9", lambda: environment.simd(["avx2", "baseline"]), "use one of avx2, baseline"),
        ("MAX_JOBS", "0", environment.max_jobs, "use a positive integer"),
        ("MAX_JOBS", "many", environment.max_jobs, "MAX_JOBS='many'"),
        ("MAX_JOBS", "²", environment.max_jobs, "MAX_JOBS='²'"),
        ("ADAMOPS_CACHE_DIR", __file__, environment.check_cache_dir, "is not a folder"),
        ("ADAMOPS_CACHE_DIR", f"{__file__}/below", environment.check_cache_dir, f"{__file__} is not a folder"),
    ],
)
def test_unknown_values_are_errors_that_name_the_valid_ones(monkeypatch, variable, value, read, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        read()


def test_build_switches(monkeypatch):
    monkeypatch.delenv("ADAMOPS_BUILD_OPS", raising=False)
    monkeypatch.delenv("ADAMOPS_BUILD_CPU_ADAM", raising=False)
    assert environment.build_switch("cpu_adam")[0] is None
    monkeypatch.setenv("ADAMOPS_BUILD_OPS", "0")
    assert environment.build_switch("cpu_adam") == (False, "ADAMOPS_BUILD_OPS=0")
    monkeypatch.setenv("ADAMOPS_BUILD_CPU_ADAM", "1")
    assert environment.build_switch("cpu_adam") == (True, "ADAMOPS_BUILD_CPU_ADAM=1")


class FakeCompiler(Compiler):
    def __init__(self, machine, refuses=()):
        super().__init__(["fake"])
        self.__dict__["machine"] = machine
        self.refuses = refuses

    def accepts(self, flags):
        return not any(flag in self.refuses for flag in flags)


def names(targets):
    return [target.name for target in targets]


def test_targets_go_by_the_architecture_compiled_for():
    assert names(targets_of("x86_64")) == ["avx512", "avx2", "baseline"]
    assert [t.header for t in targets_of("riscv64")] == ["simd/scalar.h"]
    assert names(choose_targets(FakeCompiler("ppc64le"), "all").enabled) == ["baseline"]


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("value", "enabled"),
    [("", ["avx512", "avx2", "baseline"]), ("all", ["avx512", "avx2", "baseline"]), ("avx2", ["avx2", "baseline"]),
     ("baseline", ["baseline"]), ("avx512, baseline", ["avx512", "baseline"])],
)  # fmt: skip
def test_requested_targets(monkeypatch, value, enabled):
    monkeypatch.setenv("ADAMOPS_CPU_TARGETS", value)
    choice = choose_targets(FakeCompiler("x86_64"), "all")
    assert names(choice.enabled) == enabled
    assert {name for name, _ in choice.dropped} == {"avx512", "avx2", "baseline"} - set(enabled)


def test_what_the_compiler_does_not_know_is_dropped_with_the_reason(monkeypatch):
    monkeypatch.delenv("ADAMOPS_CPU_TARGETS", raising=False)
    choice = choose_targets(FakeCompiler("x86_64", refuses=["-mavx512f"]), "all")
    assert names(choice.enabled) == ["avx2", "baseline"]
    assert choice.dropped[0][0] == "avx512"
    assert "the compiler does not accept" in choice.dropped[0][1]
    assert choice.requested == "all"


def test_native_is_what_this_cpu_has(monkeypatch):
    monkeypatch.setenv("ADAMOPS_CPU_TARGETS", "native")
    monkeypatch.setattr("adamops.op_builder.simd.native_cpu_flags", lambda: frozenset({"avx2", "fma", "f16c"}))
    choice = choose_targets(FakeCompiler("x86_64"), "all")
    assert names(choice.enabled) == ["avx2", "baseline"]
    assert dict(choice.dropped)["avx512"] == "this CPU has no avx512bw, avx512dq, avx512f, avx512vl"


class Unbuilt(CPUAdamBuilder):
    """The CPU op, as if none had come with the installation."""

    MODULE = "adamops._native.missing.cpu_adam"


def test_each_failed_attempt_is_listed_and_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("ADAMOPS_CACHE_DIR", str(tmp_path))
    builder = Unbuilt()
    with pytest.raises(OpUnavailableError) as caught:
        builder.load()
    message = str(caught.value)
    assert "'cpu_adam' is not available" in message
    assert "- prebuilt extension: none came with this installation" in message
    assert "- build at run time: no C++ compiler found (set CXX, or install g++ or clang++)" in message
    assert "Install a C++ compiler" in message and "python -m adamops.report" in message
    monkeypatch.undo()
    with pytest.raises(OpUnavailableError) as again:
        builder.load()
    assert again.value is caught.value
    assert builder.is_compatible()


@pytest.mark.smoke
def test_incompatible_ops_say_why(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/nonexistent/c++ -m64")
    assert not Unbuilt().is_compatible(verbose=True)
    words = "CXX=/nonexistent/c++ -m64: there is no program '/nonexistent/c++'; name a C++ compiler"
    assert f"adamops: cpu_adam cannot be built here: {words}" in capsys.readouterr().out


@pytest.mark.parametrize("cls", [CPUAdamBuilder, op_builder.FusedAdamBuilder])
def test_a_compiler_that_answers_and_cannot_compile_is_named_with_its_output(monkeypatch, tmp_path, cls):
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\ncase $1 in --version) echo 'c++ 12.2.0';; -dumpmachine) echo x86_64-linux-gnu;;"
        " *) echo 'cannot execute cc1plus' >&2; exit 1;; esac\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    compatible = cls().compatibility()
    assert not compatible
    assert (
        compatible.reason.startswith("the compiler cannot compile: ") and "cannot execute cc1plus" in compatible.reason
    )


@pytest.mark.parametrize("content", ["#!/bin/true\n", "no program", "#!/nonexistent\n", "#!/bin/sh\necho x86_64\n"])
def test_what_is_no_compiler_is_no_reason_to_crash(monkeypatch, tmp_path, content):
    compiler = tmp_path / "c++"
    compiler.write_text(content)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    compatible = CPUAdamBuilder().compatibility()
    assert not compatible and str(compiler) in compatible.reason


def test_all_ops_are_looked_at_before_the_first_is_compiled(monkeypatch, tmp_path):
    class Impossible(Unbuilt):
        NAME = "impossible"

        def compatibility(self):
            return op_builder.Compatibility(False, "there is no way")

    compiled = []
    monkeypatch.setattr(build_ext, "compile_op", lambda *args, **kwargs: compiled.append(args))
    monkeypatch.setenv("ADAMOPS_BUILD_OPS", "1")
    distribution = Distribution({"ext_modules": build_ext.extensions([Unbuilt(), Impossible()])})
    command = build_ext.build_ext(distribution)
    command.build_lib = command.build_temp = str(tmp_path)
    command.ensure_finalized()
    words = r"^adamops: impossible must be built \(ADAMOPS_BUILD_OPS=1\) but cannot: there is no way$"
    with pytest.raises(SystemExit, match=words):
        command.run()
    assert not compiled


@pytest.mark.smoke
def test_the_compilers_output_is_in_the_exception(tmp_path):
    class Broken(Unbuilt):
        def compile_units(self):
            (tmp_path / "broken.cpp").write_text("int main() { this is no C++ }")
            return [op_builder.CompileUnit("broken.cpp")]

        def source_root(self):
            return tmp_path

        def include_paths(self):
            return []

    with pytest.raises(BuildError, match=r"(?s)broken\.cpp.*failed:.*error: .*this"):
        compile_op(Broken(), tmp_path / "out.so")
    assert not (tmp_path / "out.so").exists()


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_cache_that_others_may_write_to_is_refused(monkeypatch, tmp_path, mode):
    tmp_path.chmod(mode)
    monkeypatch.setenv("ADAMOPS_CACHE_DIR", str(tmp_path))
    with pytest.raises(BuildError, match="may be written by, other users, .*chmod 700"):
        cache.load(Unbuilt())
    assert not list(tmp_path.rglob("*.so"))


BUILD = """
    import os, time
    from adamops.op_builder import CPUAdamBuilder
    CPUAdamBuilder.MODULE = "adamops._native.missing.cpu_adam"
    started = time.perf_counter()
    module = CPUAdamBuilder().load()
    print(module.target())
"""


# For what does not depend on the op: a module of one function, which compiles in seconds.
SMALL = """
    from pathlib import Path
    from adamops.op_builder import Compatibility, OpBuilder

    class Small(OpBuilder):
        NAME, MODULE = "small", "adamops._native.missing.small"

        def source_root(self):
            return Path("small").resolve()

        def sources(self):
            return ["small.cpp"]

        def compatibility(self):
            return Compatibility(True, "it is small")

    print(Small().load().answer())
"""
SMALL_SOURCE = """
#include <pybind11/pybind11.h>
PYBIND11_MODULE(small, module) { module.def("answer", [] { return 42; }); }
"""


@pytest.fixture
def small(tmp_path):
    """The code that loads the small op, whose source is in the folder where start() runs it."""
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "small.cpp").write_text(SMALL_SOURCE)
    return SMALL


def environment_of_build(cache, **variables):
    """With one SIMD target, as each takes a while to compile."""
    return {**os.environ, "ADAMOPS_CPU_TARGETS": "baseline", "ADAMOPS_CACHE_DIR": str(cache), **variables}


def start(cache, code=BUILD, **variables):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=cache.parent,
        env=environment_of_build(cache, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def outcome(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return out, err


@pytest.mark.slow
def test_builds_once_and_then_loads_from_the_cache(tmp_path, cpu_adam, small):
    cache = tmp_path / "cache"
    out, err = outcome(start(cache, ADAMOPS_CPU_TARGETS="native"))
    assert out == f"{cpu_adam.supported_targets()[0]}\n"
    assert "adamops: building cpu_adam for this machine, once ... done in" in err
    assert len(list(cache.glob("*/*.so"))) == 1
    assert outcome(start(cache, ADAMOPS_CPU_TARGETS="native")) == (out, "")
    for flags in ("", "-DSOMETHING_ELSE"):  # other flags, another build
        _, err = outcome(start(cache, small, CXXFLAGS=flags))
        assert "building" in err
    assert len(list(cache.glob("*/small*.so"))) == 2


@pytest.mark.slow
def test_killed_in_the_middle_of_a_build_and_two_at_once(tmp_path, small):
    cache = tmp_path / "cache"
    killed = start(cache, small)
    deadline = time.monotonic() + 60
    while not list(cache.glob("*/lock")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not list(cache.glob("*/small*.so"))
    both = [start(cache, small), start(cache, small)]
    errors = [outcome(process)[1] for process in both]
    assert sorted("building" in error for error in errors) == [False, True]
    assert len(list(cache.glob("*/small*.so"))) == 1


def test_what_went_into_a_build_is_in_its_name(monkeypatch, tmp_path):
    for name in ("ADAMOPS_CPU_TARGETS", "CXXFLAGS", "LDFLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ADAMOPS_CACHE_DIR", str(tmp_path))
    names = [cache.cached_path(Unbuilt())]
    assert cache.cached_path(Unbuilt()) == names[0]
    for name in ("CXXFLAGS", "LDFLAGS"):
        with monkeypatch.context() as changed:
            changed.setenv(name, "-g")
            names.append(cache.cached_path(Unbuilt()))
    with monkeypatch.context() as changed:  # "native" on three CPUs
        changed.setenv("ADAMOPS_CPU_TARGETS", "native")
        for flags in (set(), {"avx2", "fma", "f16c"}, set().union(*(target.cpu_flags for target in TARGETS))):
            changed.setattr("adamops.op_builder.simd.native_cpu_flags", lambda flags=flags: frozenset(flags))
            names.append(cache.cached_path(Unbuilt()))
    every_target = names.pop()
    assert every_target in names or Compiler.find().machine != "x86_64"  # a build for all is one, whoever asks for it

    class OtherSource(Unbuilt):
        def source_root(self):
            return tmp_path

    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "parallel.cpp").write_text("// shorter")
    names.append(cache.cached_path(OtherSource()))
    assert len(set(names)) == len(names)


def in_namespace(script, *arguments):
    """A command that runs a shell script where it may mount; skips the test where the system does not allow that."""
    command = ["unshare", "-rm", "sh", "-euc", script, "sh"]
    if subprocess.run([*command[:2], "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        pytest.skip("this system does not let users mount")
    return [*command, *map(str, arguments)]


def run_in_namespace(script, cache, code=BUILD):
    command = in_namespace(script, cache, sys.executable, textwrap.dedent(code))
    environment = environment_of_build(cache)
    return subprocess.run(command, cwd=cache.parent, env=environment, capture_output=True, text=True, timeout=300)


FALLS_BACK = """
    import torch, warnings
    from adamops import DeepSpeedCPUAdam
    from adamops.op_builder import CPUAdamBuilder
    CPUAdamBuilder.MODULE = "adamops._native.missing.cpu_adam"
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        DeepSpeedCPUAdam([param], lr=0.5).step()
    print(param.tolist(), len(caught))
    print(caught[0].message)
"""


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_broken(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    done = run_in_namespace(
        'mount -t tmpfs -o size=200k,mode=700 none "$1"; "$2" -c "$3"; find "$1" -name "*.so"', cache, FALLS_BACK
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("[0.5, 0.5] 1\nadamops falls back to pure PyTorch")
    assert f"build at run time: the build cannot be written to {cache}/cpu_adam-" in done.stdout
    assert "No space left on device" in done.stdout and "; set ADAMOPS_CACHE_DIR" in done.stdout
    assert ".so" not in done.stdout.splitlines()[-1]
    assert "building cpu_adam for this machine, once ... failed" in done.stderr


@pytest.mark.slow
def test_a_read_only_cache_serves_what_it_has(tmp_path, small):
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    read_only = 'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"; "$2" -c "$3"'
    done = run_in_namespace(read_only, cache, FALLS_BACK)
    assert done.stdout.startswith("[0.5, 0.5] 1\nadamops falls back to pure PyTorch"), done.stderr
    assert f"the cache folder {cache}/cpu_adam-" in done.stdout
    assert "Read-only file system" in done.stdout and "set ADAMOPS_CACHE_DIR" in done.stdout
    outcome(start(cache, small))
    done = run_in_namespace(read_only, cache, small)
    assert (done.stdout, done.stderr) == ("42\n", "")


@pytest.mark.slow
def test_a_damaged_build_is_replaced(tmp_path, small):
    cache = tmp_path / "cache"
    outcome(start(cache, small))
    (built,) = cache.glob("*/*.so")
    whole = built.read_bytes()
    built.write_bytes(whole[:10_000])
    (built.parent / "unfinished-1.so").write_bytes(b"left by a killed build")
    _, err = outcome(start(cache, small))
    assert "building" in err
    assert built.read_bytes() == whole
    assert sorted(path.name for path in built.parent.iterdir()) == ["lock", "small.build.json", built.name]


@pytest.mark.slow
def test_a_compiler_error_is_in_the_warning(tmp_path):
    compiler = tmp_path / "broken-c++"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *parallel.cpp*) echo "out of luck" >&2; exit 1;; esac\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    out, err = outcome(start(tmp_path / "cache", FALLS_BACK, CXX=str(compiler)))
    assert out.startswith("[0.5, 0.5] 1\n") and "parallel.cpp" in out and "failed:\nout of luck" in out
    assert err.endswith("once ... failed\n")


def test_a_checkout_on_the_path_works_without_installation(tmp_path):
    """Whoever starts Python in the project's folder gets the sources there, and they find op_builder and csrc."""
    checkout = Path(__file__).resolve().parent.parent
    code = """
        import adamops
        from adamops import op_builder
        print(op_builder.__file__)
        print(op_builder.get("cpu_adam").source_root())
    """
    out, _ = outcome(start(tmp_path / "cache", code, PYTHONPATH=str(checkout)))
    assert out.splitlines() == [str(checkout / "op_builder" / "__init__.py"), str(checkout / "csrc")]
