"""The installed extension on CPUs that this machine is not, by user emulation: the right target and the same bits."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adamops import op_builder

CHECK = Path(__file__).parent / "kernel_check.py"
EXTENSION = op_builder.get("cpu_adam").load().__file__
# What the CPU models of QEMU 7 offer; none of them has AVX-512, which its user emulation does not know.
CPUS = {
    "Nehalem": ["baseline"],
    "SandyBridge": ["baseline"],  # AVX, but neither AVX2 nor FMA
    "Haswell": ["avx2", "baseline"],
    "EPYC": ["avx2", "baseline"],
    "Haswell,-xsave": ["baseline"],  # an operating system that does not save the wide registers
}


def check(*command):
    # -S: nothing but the standard library, as the digest must not depend on what site-packages needs.
    full = [*command, str(Path(sys.executable).resolve()), "-S", str(CHECK), EXTENSION]
    result = subprocess.run(full, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    supported, last = result.stdout.splitlines()
    target, digest = last.split()
    return supported.split()[1:], target, digest


@pytest.fixture(scope="module")
def native():
    return check()


def test_the_kernel_check_runs_without_torch(native):
    supported, target, digest = native
    assert target == supported[0]
    assert len(digest) == 64


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("qemu-x86_64"), reason="needs qemu-x86_64 (Debian package qemu-user)")
@pytest.mark.parametrize("cpu", CPUS)
def test_same_bits_on_another_cpu(cpu, native):
    supported, target, digest = check("qemu-x86_64", "-cpu", cpu)
    assert supported == CPUS[cpu]
    assert target == CPUS[cpu][0]
    assert digest == native[2]
