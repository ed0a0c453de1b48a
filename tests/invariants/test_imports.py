"""Who may import whom. Read from the source, so that an import inside a function counts too."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS, METHOD = ROOT / "memdlm_kernels", ROOT / "python" / "memdlm"
OPS = sorted(path.parent.name for path in KERNELS.glob("*/op.py"))

# A module imports only those above it. The batch that data/ makes is what an objective reads.
ORDER = (
    "config schedule trajectory loss data models gated_ffn experts outer_lora four_bit block_mask "
    "sdpa recorded_keys backbone fast_weights inner_loss inner_loop inner_graph unroll objective "
    "cost inner_log checkpoint inference prompt_memory trainer sampler evaluation report "
    "key_values options training convert environment demo bias meta_bias probe ablation cli"
).split()
WITHOUT_MODULES = ("config", "schedule", "trajectory", "loss")


def imports(path):
    """Every name that a file imports, dotted: `from a.b import c` is a.b.c."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inside(package, path):
    """The names of `package` that a file imports, without the package's own."""
    prefix = package + "."
    return [name.removeprefix(prefix) for name in imports(path) if name.startswith(prefix)]


def source_files(folder):
    return sorted(folder.rglob("*.py"))


def as_id(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", source_files(KERNELS), ids=as_id)
def test_the_op_package_needs_torch_alone_and_triton_only_in_triton_files(path):
    allowed = {"torch", "memdlm_kernels"} | set(sys.stdlib_module_names)
    if path.name == "triton.py" or "_triton" in path.parts:
        allowed.add("triton")
    assert {name.split(".")[0] for name in imports(path)} <= allowed


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*/*.py")), ids=as_id)
def test_an_op_imports_no_other_op_and_a_backend_not_its_op(path):
    op = path.parent.name
    own = {
        "__init__.py": (f"{op}.op.",),
        "op.py": ("_", f"{op}."),
    }.get(path.name, ("_",))
    assert [name for name in inside("memdlm_kernels", path) if not name.startswith(own)] == []


@pytest.mark.parametrize("path", sorted(KERNELS.glob("_*.py")), ids=as_id)
def test_what_ops_share_imports_no_op(path):
    if path.name != "__init__.py":
        assert [
            name for name in inside("memdlm_kernels", path) if name.startswith(tuple(OPS))
        ] == []


@pytest.mark.parametrize("path", source_files(METHOD), ids=as_id)
def test_the_trainer_uses_public_ops_only(path):
    public = ast.literal_eval(
        next(
            node.value
            for node in ast.parse((KERNELS / "__init__.py").read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
        )
    )
    assert set(inside("memdlm_kernels", path)) <= set(public)


@pytest.mark.parametrize("path", source_files(METHOD), ids=as_id)
def test_a_module_imports_only_those_above_it(path):
    own = path.relative_to(METHOD).with_suffix("").parts[0]
    if own == "__init__":
        return
    assert own in ORDER, f"{own} has no place in the order"
    used = {name.split(".")[0] for name in inside("memdlm", path)} - {own}
    assert used <= set(ORDER[: ORDER.index(own)])


@pytest.mark.parametrize("name", WITHOUT_MODULES)
def test_the_vocabulary_of_the_method_has_no_torch_nn(name):
    used = list(imports(METHOD / f"{name}.py"))
    assert not [name for name in used if name.startswith(("torch.nn", "transformers"))]


@pytest.mark.parametrize("path", [*source_files(KERNELS), *source_files(METHOD)], ids=as_id)
def test_nothing_imports_the_tests_or_the_benchmarks(path):
    assert not {"tests", "bench"} & {name.split(".")[0] for name in imports(path)}
