"""No module of the project contains what could execute the data, weights or messages that it reads."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNPICKLERS = {"data/calvin.py", "data/cifar10.py", "envs/libero_files.py", "vla/parallel.py", "vla/released/source.py"}
"""Those with a restricted unpickler, or that name its error; `pickle.load`, `loads` and `dump` are nowhere."""
FORBIDDEN_MODULES = {"dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
FORBIDDEN_CALLS = {
    "eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load",
    "pd.read_pickle", "pandas.read_pickle", "pickle.load", "pickle.loads", "shutil.unpack_archive", "instantiate",
    "hydra.utils.instantiate", "hydra.utils.call", "hydra.utils.get_class",
}  # fmt: skip
ALLOWED = {
    ("envs/calvin_sim.py", "hydra.utils.instantiate"),  # the installed package's own configuration
}


def offences(name: str, source: str) -> list[str]:
    """What a module contains that may execute what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"imports {m}" for m in modules if m.split(".")[0] in FORBIDDEN_MODULES]
            if "pickle" in modules and (name not in UNPICKLERS or isinstance(node, ast.ImportFrom)):
                found.append("imports pickle")
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if (called in FORBIDDEN_CALLS and (name, called) not in ALLOWED) or called.endswith(".extractall"):
            found.append(f"calls {called}")
        loads = called.endswith("torch.load") or (called.endswith(".fit") and "ckpt_path" in given)
        inert = name == "vla/released/source.py" and given.get("pickle_module") == "_INERT"
        if loads and given.get("weights_only") != "True" and not inert:
            found.append(f"{called} without weights_only=True")
        found += [f"{key}=True" for key in ("allow_pickle", "trust_remote_code", "shell") if given.get(key) == "True"]
    return found


def test_no_module_executes_what_it_reads():
    files = [ROOT / "train.py", ROOT / "evaluate.py"]
    files += [file for folder in ("vla", "data", "envs", "scripts") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = {str(f.relative_to(ROOT)): offences(str(f.relative_to(ROOT)), f.read_text()) for f in files}
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import pickle", "imports pickle"),
        ("from pickle import loads", "imports pickle"),
        ("import torch; torch.load(f)", "torch.load without weights_only=True"),
        ("import torch; torch.load(f, weights_only=False)", "torch.load without weights_only=True"),
        ("trainer.fit(m, ckpt_path=p)", "trainer.fit without weights_only=True"),
        ("np.load(f, allow_pickle=True)", "allow_pickle=True"),
        ("eval(x)", "calls eval"),
        ("yaml.load(x, Loader=y)", "calls yaml.load"),
        ("hydra.utils.instantiate(c)", "calls hydra.utils.instantiate"),
        ("archive.extractall(p)", "calls archive.extractall"),
        ("A.from_pretrained(p, trust_remote_code=True)", "trust_remote_code=True"),
        ("import dill", "imports dill"),
    ],
)
def test_the_check_sees_each_offence(source, told):
    assert offences("vla/new.py", source) == [told]
