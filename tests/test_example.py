"""The example of a package that adds an optimizer, docs/examples/lion: built, installed, reported, trained with.

test_rules.py has what it gets from the engine.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from plugins import python_path

EXAMPLE = Path(__file__).resolve().parent.parent / "docs" / "examples" / "lion"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXAMPLE.is_dir(), reason="needs the checkout"),
]


def install(folder, **variables):
    """Installs the example into a folder of its own; returns the environment that makes Python find it."""
    shutil.copytree(EXAMPLE, folder / "sources", ignore=shutil.ignore_patterns("build", "*.egg-info", "*.so", "*.json"))
    site = folder / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", str(site), "."]
    environment = {**os.environ, "ADAMOPS_CACHE_DIR": str(folder / "cache"), **variables}
    environment["ADAMOPS_BUILD_FUSED_LION"] = "0"  # takes minutes
    done = subprocess.run(command, cwd=folder / "sources", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {**environment, "PYTHONPATH": python_path(site)}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return install(tmp_path_factory.mktemp("example"))


def python(environment, code, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


def reported(environment):
    done = subprocess.run(
        [sys.executable, "-m", "adamops.report", "--json"], cwd="/", env=environment, capture_output=True, text=True
    )
    return {op["name"]: op for op in json.loads(done.stdout)["ops"]}


def test_the_report_shows_it_like_an_op_of_adamops(installed):
    op, ours = (reported(installed)[name] for name in ("cpu_lion", "cpu_adam"))
    assert op["ok"] and op["prebuilt"] and op["origin"] == "plugin of adamops-lion"
    assert op["in_use"] == "prebuilt extension"
    assert op["simd"] == ours["simd"]
    assert op["build"]["targets"] == ours["build"]["targets"]
    assert str(EXAMPLE.parent) not in json.dumps(op["build"])


def test_its_optimizer_follows_the_paper_with_the_same_bits_everywhere(installed, seed):
    """All dtypes and tails, against Algorithm 2 in float64, rounded where the op stores."""
    code = """
        import sys, torch
        from adamops import op_builder
        from adamops_lion.lion import Lion

        op, seed = op_builder.get("cpu_lion").load(), int(sys.argv[1])

        def train(target, threads, dtype):
            op.use_target(target)
            torch.set_num_threads(threads)
            generator = torch.Generator().manual_seed(seed)
            draw = lambda n: (torch.randn(n, generator=generator)).to(dtype)
            params = [torch.nn.Parameter(draw(n)) for n in (0, 1, 31, 33, 60_001)]
            expected = [p.detach().double() for p in params]
            averages = [torch.zeros_like(p) for p in expected]
            optimizer = Lion(params, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
            for _ in range(3):
                clear = []
                for i, p in enumerate(params):
                    p.grad = draw(p.numel())
                    g = p.grad.double()
                    update = 0.9 * averages[i] + 0.1 * g
                    # Where the two nearly cancel, roundings decide upon the sign.
                    clear.append(update.abs() >= 1e-5 * (0.9 * averages[i] - 0.1 * g).abs())
                    expected[i] = expected[i] * (1 - 1e-2 * 0.1) - 1e-2 * update.sign()
                optimizer.step()
                for i, p in enumerate(params):  # from here on with the op's own values
                    error = (p.detach().double() - expected[i]).abs()[clear[i]]
                    # Three roundings to float32, of the factor, the product and the sum; or one to the storage type.
                    bound = 2 * torch.finfo(dtype).eps * expected[i].abs().clamp(min=1e-2)[clear[i]]
                    assert (error <= bound).all(), (target, dtype, error.max())
                    expected[i] = p.detach().double()
                    averages[i] = optimizer.state[p]["exp_avg"].double()
            return torch.cat([p.detach() for p in params])

        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            first = train(op.supported_targets()[0], 1, dtype)
            for target in op.supported_targets():
                for threads in (1, 2, 5):
                    assert torch.equal(train(target, threads, dtype).view(torch.uint8), first.view(torch.uint8))
        print(len(op.supported_targets()))
    """
    out, _ = python(installed, code, str(seed))
    assert int(out) >= 1


def test_its_sign_is_right_down_to_subnormals(installed):
    code = """
        import torch
        from adamops import op_builder
        from adamops_lion.lion import Lion

        grads = torch.tensor([1e-44, -1e-44, 0.0, -0.0, 3e38, -3e38, 1e-38, float("inf"), float("nan")])
        for target in op_builder.get("cpu_lion").load().supported_targets():
            op_builder.get("cpu_lion").load().use_target(target)
            param = torch.nn.Parameter(torch.zeros(len(grads)))
            param.grad = grads.clone()
            Lion([param], lr=1.0, betas=(0.0, 0.5)).step()
            assert torch.equal(param[:8].detach(), -grads[:8].sign()) and param[8].isnan(), (target, param)
        print("right")
    """
    assert python(installed, code)[0] == "right\n"


def test_it_trains_a_model_and_resumes(installed):
    code = """
        import copy, torch
        from adamops_lion.lion import Lion
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.Tanh(), torch.nn.Linear(50, 1))
        x = torch.randn(200, 20)
        y = x[:, :1].sin()
        def train(model, optimizer, steps):
            for _ in range(steps):
                optimizer.zero_grad()
                loss = (model(x) - y).square().mean()
                loss.backward()
                optimizer.step()
            return loss.item()
        optimizer = Lion(model.parameters(), lr=1e-3, weight_decay=0.01)
        before = train(model, optimizer, 20)
        twin = copy.deepcopy(model)
        resumed = Lion(twin.parameters())
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        after = train(model, optimizer, 100)
        assert after < 0.3 * before, (before, after)
        assert train(twin, resumed, 100) == after
        print("right")
    """
    assert python(installed, code)[0] == "right\n"


def test_it_has_at_most_120_lines():
    files = [
        path
        for path in EXAMPLE.rglob("*")
        if path.suffix in (".py", ".h", ".toml", ".md") and "build" not in path.parts
    ]
    lines = {path.name: len(path.read_text().splitlines()) for path in files}
    assert len(lines) == 7 and sum(lines.values()) <= 120, lines


def test_it_is_built_at_first_use_where_it_was_not_before(tmp_path):
    environment = install(tmp_path, ADAMOPS_BUILD_OPS="0", ADAMOPS_CPU_TARGETS="baseline")
    assert reported(environment)["cpu_lion"]["in_use"] == "a build at first use, not done yet"
    code = """
        import torch
        from adamops_lion.lion import Lion
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        Lion([param], lr=0.5).step()
        print(param.tolist())
    """
    out, err = python(environment, code)
    assert out == "[0.5, 0.5, 0.5]\n"
    assert "adamops: building cpu_lion for this machine, once ... done in" in err
    assert python(environment, code) == (out, "")
    assert reported(environment)["cpu_lion"]["in_use"] == "extension built at first use, from the cache"


def test_what_it_is_made_of_is_found_in_its_own_folder_first(tmp_path):
    from adamops.op_builder import BuildError, CPUAdamBuilder

    class Own(CPUAdamBuilder):
        def source_root(self):
            return tmp_path

    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "parallel.cpp").write_text("")
    assert Own().locate("runtime/parallel.cpp") == tmp_path / "runtime" / "parallel.cpp"
    assert Own().locate("python/cpu_module.cpp") == CPUAdamBuilder().source_root() / "python" / "cpu_module.cpp"
    with pytest.raises(BuildError, match="cpu_adam has no source lost.cpp in .*"):
        Own().locate("lost.cpp")
