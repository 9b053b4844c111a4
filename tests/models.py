"""The zoo: real architectures with random weights and small inputs, by name.

Every entry is a function that returns a model in evaluation mode and the example inputs of one forward pass: a
tensor, a tuple of arguments, or a dictionary of keyword arguments. Transformers of Hugging Face have the real
classes and tiny sizes, so that no two sizes in one model are equal by accident.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Built = tuple[nn.Module, Any]


def _torchvision(name: str, size: int = 64, output: str | None = None, **arguments: Any) -> Callable[[], Built]:
    def build() -> Built:
        import torchvision

        found = torchvision.models
        for part in name.split("."):
            found = getattr(found, part)
        model = found(weights=None, **arguments)  # type: ignore[operator]
        return (model if output is None else TakeKey(model, output)), torch.randn(1, 3, size, size)

    return build


def _timm(name: str, size: int = 64, **arguments: Any) -> Callable[[], Built]:
    def build() -> Built:
        import timm

        return timm.create_model(name, pretrained=False, **arguments), torch.randn(1, 3, size, size)

    return build


def _language(config: str, model: str, text: bool = True, **sizes: Any) -> Callable[[], Built]:
    def build() -> Built:
        import transformers

        configured = getattr(transformers, config)(**sizes)
        built = getattr(transformers, model)(configured)
        tokens = torch.arange(1, 21).reshape(2, 10)
        if not text:
            return built, {"pixel_values": torch.randn(1, 3, configured.image_size, configured.image_size)}
        if configured.is_encoder_decoder:
            return built, {"input_ids": tokens, "decoder_input_ids": tokens[:, :6]}
        return built, {"input_ids": tokens}

    return build


class TakeKey(nn.Module):
    """The entry ``key`` of a model's dictionary of outputs."""

    def __init__(self, model: nn.Module, key: str) -> None:
        super().__init__()
        self.model, self.key = model, key

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.model(x)[self.key]
        return output


class Detector(nn.Module):
    """The convolutional part of Faster R-CNN: backbone, feature pyramid, proposal head."""

    def __init__(self) -> None:
        super().__init__()
        import torchvision

        detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        self.backbone, self.head = detector.backbone, detector.rpn.head

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = list(self.backbone(x).values())
        scores, boxes = self.head(features)
        return [*scores, *boxes]


class TextEncoder(nn.Module):
    """Embedding, ``nn.TransformerEncoder``, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 48)
        layer = nn.TransformerEncoderLayer(48, 4, 80, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3)
        self.head = nn.Linear(48, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.head(self.encoder(self.embedding(tokens)).mean(dim=1))
        return output


class UNet(nn.Module):
    """Two levels down and up, with concatenated skips."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()

        def pair(inputs: int, outputs: int) -> nn.Sequential:
            first = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            return nn.Sequential(*first, nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

        self.down1, self.down2, self.middle = pair(3, width), pair(width, 2 * width), pair(2 * width, 4 * width)
        self.up2, self.up1 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.merge2, self.merge1 = pair(4 * width, 2 * width), pair(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        y = self.middle(F.max_pool2d(second, 2))
        y = self.merge2(torch.cat([self.up2(y), second], dim=1))
        output: torch.Tensor = self.head(self.merge1(torch.cat([self.up1(y), first], dim=1)))
        return output


class LstmClassifier(nn.Module):
    """A recurrent layer between linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inward = nn.Embedding(50, 16), nn.Linear(16, 24)
        self.lstm = nn.LSTM(24, 20, batch_first=True)
        self.outward, self.head = nn.Linear(20, 32), nn.Linear(32, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(F.relu(self.inward(self.embedding(tokens))))
        output: torch.Tensor = self.head(F.relu(self.outward(states[:, -1])))
        return output


def _own(make: Callable[[], nn.Module], inputs: Callable[[], Any]) -> Callable[[], Built]:
    return lambda: (make(), inputs())


def _cifar(depth: int) -> Callable[[], Built]:
    def build() -> Built:
        from prunefront.runners.tasks.cifar_resnet import CifarResNet

        return CifarResNet(depth), torch.randn(1, 3, 32, 32)

    return build


def _tokens() -> torch.Tensor:
    return torch.arange(1, 21).reshape(2, 10)


_LLAMA = {
    "vocab_size": 90,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_BERT = {
    "vocab_size": 90,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

TORCHVISION = {
    "resnet18": _torchvision("resnet18"),
    "resnet50": _torchvision("resnet50"),
    "resnext50_32x4d": _torchvision("resnext50_32x4d"),
    "densenet121": _torchvision("densenet121"),
    "googlenet": _torchvision("googlenet", init_weights=False, aux_logits=False),
    "shufflenet_v2_x1_0": _torchvision("shufflenet_v2_x1_0"),
    "mobilenet_v3_large": _torchvision("mobilenet_v3_large"),
    "efficientnet_b0": _torchvision("efficientnet_b0"),
    "convnext_tiny": _torchvision("convnext_tiny"),
    "vit_b_16": _torchvision("vit_b_16", image_size=64),
    "swin_t": _torchvision("swin_t"),
    "maxvit_t": _torchvision("maxvit_t", size=224),
    "regnet_y_400mf": _torchvision("regnet_y_400mf"),
    "deeplabv3_resnet50": _torchvision("segmentation.deeplabv3_resnet50", output="out", weights_backbone=None),
    "fasterrcnn_resnet50_fpn": _own(Detector, lambda: torch.randn(1, 3, 64, 64)),
}
TIMM = {
    "vit_base_patch16_224": _timm("vit_base_patch16_224", img_size=64),
    "deit_small_patch16_224": _timm("deit_small_patch16_224", img_size=64),
    "swin_tiny_patch4_window7_224": _timm("swin_tiny_patch4_window7_224", img_size=64),
    "mixer_b16_224": _timm("mixer_b16_224", img_size=64),
    "ghostnet_100": _timm("ghostnet_100"),
    "efficientformer_l1": _timm("efficientformer_l1", size=224),
    "mobilevit_s": _timm("mobilevit_s"),
    "fastvit_t8": _timm("fastvit_t8"),
    "coatnet_0_rw_224": _timm("coatnet_0_rw_224", img_size=64),
    "poolformer_s12": _timm("poolformer_s12"),
}
TRANSFORMERS = {
    "bert": _language("BertConfig", "BertForSequenceClassification", **_BERT),
    "roberta": _language("RobertaConfig", "RobertaForSequenceClassification", **_BERT),
    "distilbert": _language(
        "DistilBertConfig", "DistilBertForSequenceClassification", vocab_size=90, dim=48, hidden_dim=80, n_layers=3,
        n_heads=4, max_position_embeddings=64,
    ),
    "gpt2": _language(
        "GPT2Config", "GPT2LMHeadModel", vocab_size=90, n_positions=64, n_embd=48, n_layer=3, n_head=4, n_inner=80,
        bos_token_id=0, eos_token_id=0,
    ),
    "llama": _language("LlamaConfig", "LlamaForCausalLM", **_LLAMA),
    "mistral": _language("MistralConfig", "MistralForCausalLM", **_LLAMA),
    "qwen3": _language("Qwen3Config", "Qwen3ForCausalLM", **_LLAMA, head_dim=16),
    "gemma": _language("GemmaConfig", "GemmaForCausalLM", **_LLAMA, head_dim=16),
    "t5": _language(
        "T5Config", "T5ForConditionalGeneration", vocab_size=90, d_model=48, d_kv=14, d_ff=80, num_layers=3,
        num_heads=4, decoder_start_token_id=0,
    ),
    "vit": _language(
        "ViTConfig", "ViTForImageClassification", text=False, hidden_size=48, intermediate_size=80,
        num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8, num_labels=5,
    ),
    "whisper": lambda: _whisper(),
    "mixtral": _language("MixtralConfig", "MixtralForCausalLM", **_LLAMA, num_local_experts=5, num_experts_per_tok=2),
}  # fmt: skip
OWN = {
    "nn.TransformerEncoder": _own(TextEncoder, _tokens),
    "unet": _own(UNet, lambda: torch.randn(1, 3, 16, 16)),
    "lstm": _own(LstmClassifier, _tokens),
    "cifar_resnet20": _cifar(20),
    "cifar_resnet56": _cifar(56),
}
ZOO: dict[str, Callable[[], Built]] = {**TORCHVISION, **TIMM, **TRANSFORMERS, **OWN}


def _whisper() -> Built:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=90, num_mel_bins=8, d_model=48, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=80, decoder_ffn_dim=72, max_source_positions=20,
        max_target_positions=16, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    return model, {"input_features": torch.randn(1, 8, 40), "decoder_input_ids": torch.arange(1, 7)[None]}


def build(name: str, seed: int = 0) -> Built:
    """The model in evaluation mode, its weights spread out so that no unit is negligible, and its example inputs."""
    torch.manual_seed(seed)
    model, inputs = ZOO[name]()
    with torch.no_grad():
        spread(model)
    return model.eval(), inputs


def spread(model: nn.Module) -> None:
    """Make every weight matter: fresh models hold zeros, ones, layer scales of 1e-6 and untouched statistics."""
    for parameter in model.parameters():
        lone = max(parameter.shape, default=1) == parameter.numel()
        if lone or not parameter.any():
            parameter.add_(0.2 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(0.2 * torch.randn_like(buffer))
        elif name.endswith("running_var"):
            buffer.mul_(0.5 + torch.rand_like(buffer))
