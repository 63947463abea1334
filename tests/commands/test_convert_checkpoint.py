"""tools/convert_checkpoint.py: both ways, through kills, within its memory, and what it says of bad input.

Checkpoints of every parallel layout are converted in tests/models/test_hf_round_trip.py.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from megavar.commands import convert as streaming
from megavar.commands import fingerprint
from megavar.commands.stored import find_stored
from megavar.errors import UserError
from megavar.models.architecture import read_architecture
from megavar.models.families import layout_table
from megavar.models.hf_stream import write_safetensors
from megavar.models.parts import Parts

ROOT = Path(__file__).parents[2]
COMMON = dict(
    vocab_size=83, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip


def write_model(path: Path, config: object, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1 + (1 if p.dim() == 1 else 0))
    model.to(dtype).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


def stored(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same_model(one: Path, other: Path) -> None:
    a, b = stored(one), stored(other)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert b[name].dtype == tensor.dtype and torch.equal(b[name], tensor), name


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()
    }


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Joining a process group leaves torchrun's variables behind; commands that other tests start must not see them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(**COMMON, tie_word_embeddings=False)
    return write_model(tmp_path_factory.mktemp("models") / "llama", config)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Qwen3Config(**COMMON, head_dim=16, tie_word_embeddings=True)
    return write_model(tmp_path_factory.mktemp("models") / "qwen", config, torch.bfloat16)


@pytest.fixture(scope="module")
def checkpoint(llama: Path, convert: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checkpoints") / "llama"
    convert(llama, "--checkpoint", out, "--shard-gib", 1e-5)
    return out


def test_there_and_back_is_bitwise(
    llama: Path,
    checkpoint: Path,
    convert: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    limit = 1e-5 * 2**30
    assert len(list((checkpoint / "weights").glob("*.distcp"))) > 3
    convert(checkpoint, "--hf", tmp_path / "hf", "--shard-gib", 1e-5, "--verify")
    said = capsys.readouterr().out
    assert "30 tensors read back, checksums equal" in said
    assert "the likeliest token is the same at 100.0% of positions" in said
    assert " x the largest tensor" in said
    assert_same_model(llama, tmp_path / "hf")
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        assert file.stat().st_size < limit + 4096 or len(load_file(file)) == 1
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (llama / name).read_bytes()
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored(llama).values())
    assert {p.name for p in tmp_path.iterdir()} == {"hf"}, "nothing else is left"
    assert not list((tmp_path / "hf").glob(".*"))
    # transformers finds a place for every weight
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values())


def test_casts_to_the_type_asked_for(qwen: Path, convert: Callable[..., None], tmp_path: Path) -> None:
    convert(qwen, "--checkpoint", tmp_path / "wide", "--dtype", "float32", "--verify")
    convert(tmp_path / "wide", "--hf", tmp_path / "float32", "--verify")
    convert(tmp_path / "wide", "--hf", tmp_path / "back", "--dtype", "bfloat16", "--verify")
    assert_same_model(qwen, tmp_path / "back")
    assert (tmp_path / "back/config.json").read_bytes() == (qwen / "config.json").read_bytes()
    wide = stored(tmp_path / "float32")
    assert all(torch.equal(wide[name], tensor.float()) for name, tensor in stored(qwen).items())
    assert json.loads((tmp_path / "float32/config.json").read_text())["dtype"] == "float32"


def test_a_mixture_as_transformer_engine_names_it(convert: Callable[..., None], tmp_path: Path) -> None:
    """Its own norm before the experts is found under either name, for neither kind of layer finds the other's."""
    mixture = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True)
    model = write_model(tmp_path / "moe", Qwen3MoeConfig(**COMMON, **mixture, head_dim=16))
    convert(model, "--checkpoint", tmp_path / "checkpoint")
    file = tmp_path / "checkpoint/weights/.metadata"
    whole = pickle.loads(file.read_bytes())
    for fused in (True, False):
        names = ["decoder.layers.pre_mlp_layernorm.weight", "decoder.layers.mlp.linear_fc1.layer_norm_weight"]
        metadata = pickle.loads(file.read_bytes()) if fused else whole
        del metadata.state_dict_metadata[names[fused]]
        file.write_bytes(pickle.dumps(metadata))
        convert(file.parent, "--model", model, "--hf", tmp_path / f"hf {fused}")
        assert_same_model(model, tmp_path / f"hf {fused}")


KILLED = """
import os, signal, sys
from pathlib import Path
from megavar.commands import convert
from megavar.commands.stored import find_stored
from megavar.models import parts

at, source, out, way = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
written = 0
class Stream(parts.Stream):
    def write(self, data):
        global written
        size = super().write(data)
        written += size
        if written > at:
            self.flush()  # what the kernel has, a dead process has written
            os.kill(os.getpid(), signal.SIGKILL)
        return size
parts.Stream = Stream
limit = int(1e-5 * 2**30)
if way == "hf":
    made = convert.to_hf(find_stored(source, None), out, dtype=None, max_file_bytes=limit)
else:
    made = convert.to_megatron(source, out, dtype=None, max_file_bytes=limit)
convert.publish(made, out)
"""


@pytest.mark.parametrize("way", ["hf", "checkpoint"])
def test_killed_it_goes_on_and_ends_with_the_same_bytes(
    way: str,
    llama: Path,
    checkpoint: Path,
    convert: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = checkpoint if way == "hf" else llama
    out = tmp_path / "out"
    words = (source, f"--{way}", out, "--shard-gib", 1e-5)
    convert(*words)
    want = contents(out)
    out.rename(tmp_path / "never killed")
    total = sum(t.nbytes for t in stored(llama).values())
    for fraction in (0.4, 0.5):  # of what is left, the second time
        code = [sys.executable, "-c", KILLED, str(int(total * fraction)), str(source), str(out), way]
        done = subprocess.run(code, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
        assert not out.exists()
    [partial] = [p for p in tmp_path.iterdir() if p.name.endswith(".partial")]
    assert list(partial.rglob("*.torn")), "killed in the middle of a file"
    whole = sorted([*partial.rglob("*.safetensors"), *partial.rglob("*.distcp")])
    assert len(whole) > 2
    # One of the whole ones is damaged behind our back: its hash tells, and it is written again.
    before = {p: p.stat().st_mtime_ns for p in whole}
    damaged = bytearray(whole[1].read_bytes())
    damaged[-1] ^= 1
    whole[1].write_bytes(damaged)
    capsys.readouterr()
    convert(*words)
    assert f"{len(whole) - 1} files of an earlier start kept" in capsys.readouterr().out
    assert contents(out) == want
    assert (out / whole[0].relative_to(partial)).stat().st_mtime_ns == before[whole[0]]


def test_a_full_disk_is_said_and_survived(llama: Path, convert: Callable[..., None], tmp_path: Path) -> None:
    words = (llama, "--checkpoint", tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (34_000, hard))
    try:
        with pytest.raises(UserError, match="File too large; mend it and run this again"):
            convert(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()
    convert(*words)
    assert find_stored(tmp_path / "out", None).weights.is_dir()


def test_other_weights_begin_anew(llama: Path, checkpoint: Path, tmp_path: Path) -> None:
    streaming.to_hf(find_stored(checkpoint, None), tmp_path / "out", dtype=None, max_file_bytes=30_000)
    again = streaming.to_hf(
        find_stored(checkpoint, None), tmp_path / "out", dtype=None, max_file_bytes=30_000
    )
    assert again.kept > 3
    for change in (dict(dtype="bfloat16", max_file_bytes=30_000), dict(dtype=None, max_file_bytes=20_000)):
        made = streaming.to_hf(find_stored(checkpoint, None), tmp_path / "out", **change)
        assert made.kept == 0
    assert_same_model(llama, made.partial)


MEMORY = """
import os, sys, threading, time
from pathlib import Path
from megavar.commands import convert
from megavar.commands.stored import find_stored
from megavar.memory import return_large_blocks

return_large_blocks()  # as the tool does

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

small, large, out = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
for model in (small, large):
    seen, ended = [resident()], threading.Event()
    def sample():
        while not ended.wait(0.001):
            seen.append(resident())
    sampler = threading.Thread(target=sample)
    sampler.start()
    there = convert.to_megatron(model, out / model.name, dtype=None, max_file_bytes=1 << 26)
    convert.publish(there, out / model.name)
    stored = find_stored(out / model.name, None)
    back = convert.to_hf(stored, out / f"{model.name} hf", dtype=None, max_file_bytes=1 << 26)
    convert.compare_tensors(back)
    ended.set()
    print("REPORT", max(seen) - seen[0], there.peak_bytes, back.peak_bytes, there.largest_bytes)
"""


def test_memory_is_bounded_by_two_tensors(llama: Path, tmp_path: Path) -> None:
    """A model of 13 times the size of its largest tensor, all of its tensors large. The small one pays for imports."""
    config = json.loads((llama / "config.json").read_text())
    config |= dict(vocab_size=6144, hidden_size=1024, intermediate_size=3072, num_hidden_layers=4)
    config |= dict(num_attention_heads=8, num_key_value_heads=8, head_dim=128)
    large = tmp_path / "large"
    parts = Parts(large, {})
    (large / "config.json").write_text(json.dumps(config))
    shapes = layout_table(read_architecture(large)).checkpoint
    tensors = {name: (shape, torch.float32) for name, shape in shapes.items()}
    parts.add(
        "model.safetensors",
        lambda s: write_safetensors(s, tensors, lambda name: torch.full(shapes[name], 0.5)),
    )
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(llama), str(large), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("REPORT")]
    measured, there, back, largest = map(int, reports[1])
    total = sum(math.prod(shape) * 4 for shape in shapes.values())
    assert largest == 6144 * 1024 * 4 and total > 10 * largest
    constant = 8 << 20
    for peak in (measured, there, back):
        assert peak < 2 * largest + constant, (peak / largest, total / largest)
    assert min(there, back) > largest, "what the tool reports is no less than what it must hold"


def test_bad_input_is_one_line(
    llama: Path, qwen: Path, checkpoint: Path, convert: Callable[..., None], tmp_path: Path
) -> None:
    def refused(*words: object) -> str:
        with pytest.raises(UserError) as caught:
            convert(*words)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    out = tmp_path / "out"
    weights = checkpoint / "weights"
    assert "is no Hugging Face directory" in refused(tmp_path, "--hf", out)
    assert "a Hugging Face directory already" in refused(llama, "--hf", out)
    assert "a Megatron checkpoint already" in refused(checkpoint, "--checkpoint", out)
    assert "name its model's config by --model" in refused(weights, "--hf", out)
    assert "above 0" in refused(checkpoint, "--hf", out, "--shard-gib", 0)
    assert "reads no quantised weights" in refused(llama, "--checkpoint", out, "--quantize", "fp8")
    assert "leave --verify out" in refused(checkpoint, "--hf", out, "--quantize", "fp8", "--verify")
    int4 = (checkpoint, "--hf", out, "--quantize", "modelopt-int4", "--dtype", "bfloat16")
    assert "leave --dtype out" in refused(*int4)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for words in ((checkpoint, "--hf", tmp_path / "full"), (llama, "--checkpoint", tmp_path / "full")):
        assert "already exists; choose another" in refused(*words)

    # The config of another model, by family, by width, by what it lacks.
    assert "has shape [64, 32]" in refused(weights, "--model", qwen, "--hf", out)

    def other(**changes: object) -> Path:
        path = tmp_path / "other"
        path.mkdir(exist_ok=True)
        config = json.loads((llama / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps(config))
        return path

    said = refused(weights, "--model", other(model_type="qwen3"), "--hf", out)
    assert "q_layernorm.weight is missing; give the config.json that belongs" in said
    said = refused(weights, "--model", other(intermediate_size=64), "--hf", out)
    assert "mlp.linear_fc1.weight has shape [96, 32], config.json asks for [128, 32]" in said
    said = refused(weights, "--model", other(num_hidden_layers=2), "--hf", out)
    assert "decoder.layers.2." in said and "is unknown to a llama model and would be lost" in said
    assert "layers.3." in refused(weights, "--model", other(num_hidden_layers=4), "--hf", out)
    assert "vocab" not in refused(weights, "--model", other(vocab_size=99), "--hf", out)
    assert "model_type" in refused(weights, "--model", other(model_type="mistral"), "--hf", out)

    # A damaged checkpoint.
    copy = tmp_path / "damaged"
    copy.mkdir()
    for file in weights.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    data = copy / "__1_0.distcp"
    whole = data.read_bytes()
    words = (copy, "--model", llama, "--hf", out)
    data.write_bytes(whole[:-1])
    assert f"{data} is truncated: {len(whole) - 1} bytes" in refused(*words)
    data.unlink()
    assert f"{data} is missing" in refused(*words)
    data.write_bytes(bytes(len(whole)))
    assert f"{data}: " in refused(*words) and "is damaged" in refused(*words)
    data.write_bytes(whole)
    metadata = pickle.loads((weights / ".metadata").read_bytes())
    tensors = metadata.state_dict_metadata
    tensors["decoder.final_layernorm.weight"].properties.dtype = torch.bfloat16
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "final_layernorm.weight is bfloat16; choose the type of all by --dtype" in refused(*words)
    tensors["decoder.layers.mlp.linear_fc2.weight"].chunks.pop()
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "parts of decoder.layers.2.mlp.linear_fc2.weight are missing" in refused(*words)
    (copy / ".metadata").write_bytes(b"")
    assert ".metadata is damaged" in refused(*words)
    (copy / ".metadata").write_bytes(pickle.dumps({"no": "metadata"}))
    assert ".metadata is damaged" in refused(*words)

    # A damaged Hugging Face directory.
    broken = write_model(tmp_path / "broken", LlamaConfig(**COMMON, tie_word_embeddings=True))
    tensors = load_file(broken / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, broken / "model.safetensors")
    assert "model.norm.weight is missing" in refused(broken, "--checkpoint", out)
    save_file(tensors | {"model.norm.weight": norm}, broken / "model.safetensors")
    config = json.loads((broken / "config.json").read_text()) | {"dtype": "bfloat16"}
    (broken / "config.json").write_text(json.dumps(config))
    assert "is float32, but config.json says bfloat16; choose by --dtype" in refused(
        broken, "--checkpoint", out
    )
    assert not out.exists()


def test_a_model_too_large_for_its_logits_is_compared_by_checksums(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = streaming.to_hf(
        find_stored(checkpoint, None), tmp_path / "out", dtype=None, max_file_bytes=1 << 30
    )
    monkeypatch.setattr(fingerprint, "bytes_needed", lambda hf: 1 << 60)
    streaming.verify(made)
    said = capsys.readouterr().out
    assert "30 tensors read back, checksums equal" in said
    assert "logits are not compared: that takes 1073741824.0 GiB" in said


def test_verify_finds_a_wrong_weight(llama: Path, checkpoint: Path, tmp_path: Path) -> None:
    """A row moved in the Hugging Face directory: checksums tell, and so do the logits."""
    made = streaming.to_hf(
        find_stored(checkpoint, None), tmp_path / "out", dtype=None, max_file_bytes=1 << 30
    )
    file = made.partial / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name].roll(1, 0)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} differs from what it was converted from"):
        streaming.compare_tensors(made)
    with pytest.raises(UserError, match="logits differ by"):
        fingerprint.compare_logits(made.hf, made.weights)


def test_help_and_refusals_need_no_torch() -> None:
    code = (
        "import sys, runpy; sys.argv = ['convert_checkpoint.py', 'nowhere', '--hf', 'out']\n"
        f"try: runpy.run_path({str(ROOT / 'tools/convert_checkpoint.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False"] and done.stderr.count("\n") == 1, done.stderr
