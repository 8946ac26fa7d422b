"""What steers the denoiser: captions and labels -> the tensors a cache holds -> the inputs of the network.

A condition has two lives.  `inputs` turns its values into what is stored beside each latent (token ids, embeddings of a
frozen encoder, class indices); `Conditioner`, inside the denoiser, turns those into what the UNet reads.  In between a
batch of them is a `Cond`, as the stream stacks it: texts that are stored without their padding (mode=masked) have it
again, zeros, and a mask beside them.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calotype.config import Condition
from calotype.data.npy import mask_of, padded
from calotype.errors import ConfigError
from calotype.model.build import instantiate
from calotype.model.digests import SMALL, text_width
from calotype.model.folders import opened, read_config, weight_files

Cond = dict[str, Tensor]  # name of a condition -> its stored form, one row per sample; NAME.mask (B, L) of mode=masked
_TOKENIZING = threading.Lock()  # a call sets the tokenizer's padding and truncation: threads would mix them up
Array = np.ndarray[Any, Any]
TEXTS = 16  # texts per call of a frozen encoder: fixed and padded, so that bits do not depend on neighbours


class Conditioner(nn.Module):
    """Stored conditions -> keyword arguments of a UNet2DConditionModel; holds the text encoders trained jointly.

    Attributes:
        cross_dim: width D of the sequence that cross-attention reads; None without one.
        classes: number of classes; the index after the last is the empty label.  None without labels.
    """

    def __init__(self, conditions: Mapping[str, Condition]) -> None:
        super().__init__()
        self.cross = [name for name, condition in conditions.items() if condition.kind == "cross"]
        self.labels = [name for name, condition in conditions.items() if condition.kind == "class"]
        if len(self.labels) > 1:
            raise ConfigError(
                f"conditions {' and '.join(self.labels)} are both kind=class: a UNet has one class embedding"
            )
        self.classes = conditions[self.labels[0]].classes if self.labels else None
        self.encoders = nn.ModuleDict(
            {name: trained_encoder(conditions[name]) for name in self.cross if conditions[name].mode == "tokens"}
        )
        widths = {
            name: _hidden_size(self.encoders[name]) if name in self.encoders else text_width(conditions[name].path)
            for name in self.cross
        }
        if len(set(widths.values())) > 1:
            raise ConfigError(
                f"conditions of kind=cross have the widths {widths}: one attention reads them, make them equal"
            )
        self.cross_dim = next(iter(widths.values()), None)

    def forward(self, cond: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Stored forms -> (encoder_hidden_states (B, L, D), encoder_attention_mask (B, L) bool, class_labels (B,)).

        Several texts are joined along L; there is a mask where one of them has one.
        """
        sequences = [
            # Stored embeddings are float16, which bf16's autocast refuses to join.
            self.encoders[name](input_ids=cond[name].long())[0] if name in self.encoders else cond[name].float()
            for name in self.cross
        ]
        hidden = torch.cat(sequences, dim=1) if sequences else None
        mask = None
        if any(mask_of(name) in cond for name in self.cross):
            whole = [each.new_ones(each.shape[:2], dtype=torch.bool) for each in sequences]
            mask = torch.cat([cond.get(mask_of(name), ones) for name, ones in zip(self.cross, whole)], dim=1)
        return hidden, mask, cond[self.labels[0]].long() if self.labels else None


def trained_encoder(condition: Condition) -> nn.Module:
    """A fresh text encoder for `mode=tokens`: vocabulary, special tokens, positions follow from tokenizer and length.

    Raises:
        ConfigError: the config contradicts the tokenizer or `length`, or the model is not a CLIP text model.
    """
    from transformers import CLIPTextModel

    tokenizer = load_tokenizer(condition.tokenizer)
    derived = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": condition.length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    settings = dict(condition.encoder.get("config", {}))
    for key, value in derived.items():
        if settings.get(key, value) != value:
            raise ConfigError(f"conditions.*.encoder.config.{key}={settings[key]} but tokenizer and length make it "
                              f"{value}: leave it out")  # fmt: skip
    model = instantiate({**condition.encoder, "config": {**settings, **derived}})
    if not isinstance(model, CLIPTextModel):
        raise ConfigError(
            f"conditions.*.encoder is a {type(model).__name__}: only transformers.CLIPTextModel is trained"
        )
    return model


# --------------------------------------------------------------------------------- values -> what a cache stores


def inputs(condition: Condition, values: Sequence[Any], device: str = "cpu") -> list[Array]:
    """The stored form of each of some captions or labels.

    Returns:
        text tokens: int32 (L,); full: float16 (L, D); masked: float16 (n, D), 1 <= n <= L; label: int64 ().

    Raises:
        ConfigError: a label that is not one of the classes.
    """
    if condition.source == "label":
        return [np.array(_label(value, condition.classes)) for value in values]
    texts = [str(value) for value in values]
    if condition.mode == "tokens":
        return list(tokenize(condition.tokenizer, texts, condition.length))
    return encode_texts(condition, texts, device)


def stacked(name: str, condition: Condition, forms: Sequence[Array]) -> Cond:
    """Stored forms of a condition, as the stream gives them."""
    if condition.source == "text" and condition.mode == "masked":
        rows, mask = padded(forms, condition.length)
        return {name: torch.from_numpy(rows), mask_of(name): torch.from_numpy(mask)}
    return {name: torch.from_numpy(np.stack(forms))}


def prompted(conditions: Mapping[str, Condition], prompts: Sequence[Any], device: str = "cpu") -> Cond:
    """Conditions of one image per prompt: a text, a label, or a mapping {condition: value} where there are several."""
    found: Cond = {}
    for name, condition in conditions.items():
        for prompt in prompts:
            if isinstance(prompt, Mapping) and name not in prompt:
                raise ConfigError(f"prompt {dict(prompt)} says nothing for the condition {name!r}: add {name}: ...")
        values = [prompt[name] if isinstance(prompt, Mapping) else prompt for prompt in prompts]
        found |= stacked(name, condition, inputs(condition, values, device))
    return {name: rows.to(device) for name, rows in found.items()}


def empty(conditions: Mapping[str, Condition], device: str = "cpu") -> Cond:
    """The empty condition, one row each: what dropped samples and the unguided half of guidance see.

    Text: the tokens or embeddings of "".  Label: the index after the last class.
    """
    found: Cond = {}
    for name, condition in conditions.items():
        text = condition.source == "text"
        found |= stacked(name, condition, inputs(condition, [""], device) if text else [np.array(condition.classes)])
    return {name: rows.to(device) for name, rows in found.items()}


def dropped(cond: Cond, nothing: Cond, drop: Mapping[str, Tensor]) -> Cond:
    """Replace rows by the empty condition (classifier-free guidance, Ho & Salimans 2022).

    Args:
        cond: stored forms, B rows.
        nothing: of `empty`, one row.
        drop: name -> (B,) bool; a name left out drops nothing.
    """
    found = dict(cond)
    for name, chosen in drop.items():
        for key in (name, mask_of(name)) if mask_of(name) in cond else (name,):
            rows = chosen.to(cond[key].device).reshape(-1, *[1] * (cond[key].dim() - 1))
            found[key] = torch.where(rows, nothing[key].to(cond[key]), cond[key])
    return found


@functools.lru_cache(maxsize=8)
def load_tokenizer(tokenizer: str) -> Any:
    """The tokenizer called `small` (CLIP's layout, ships with Calotype), or one from a folder or hub id."""
    from transformers import AutoTokenizer, CLIPTokenizer

    if tokenizer == "small":
        return CLIPTokenizer(str(SMALL / "vocab.json"), str(SMALL / "merges.txt"))
    with opened(tokenizer, "tokenizer", "conditions.*.tokenizer") as folder:
        found = AutoTokenizer.from_pretrained(str(folder))
    if found.pad_token_id is None:
        raise ConfigError(f"conditions.*.tokenizer={tokenizer!r} has no padding token: give one to it")
    return found


def tokenize(tokenizer: str, texts: Sequence[str], length: int) -> Array:
    """Token ids, int32 (B, length): start, text, end, padding; longer texts are cut and keep their end token."""
    return np.asarray(_encoded(tokenizer, texts, length)["input_ids"], np.int32).reshape(len(texts), length)


def cut(tokenizer: str, texts: Sequence[str], length: int) -> int:
    """How many of the texts do not fit into `length` tokens, so that whoever tokenizes can say so (P5)."""
    with _TOKENIZING:
        return sum(len(ids) > length for ids in load_tokenizer(tokenizer)(list(texts))["input_ids"])


@torch.no_grad()
def encode_texts(condition: Condition, texts: Sequence[str], device: str = "cpu") -> list[Array]:
    """Last hidden states of the frozen encoder, float16 (L, D) of each text, padded to `length`; mode=masked (n, D).

    CLIP sees its padding, as in StableDiffusionPipeline; other encoders mask it, as they were trained.  No token of
    CLIP's sees what follows it, so there too the rows of a text's own tokens are the same whatever it is padded to.
    """
    model, masked = load_text_encoder(condition.path, device), condition.mode == "masked"
    found: dict[str, Array] = {}
    distinct = list(dict.fromkeys(texts))
    for start in range(0, len(distinct), TEXTS):
        part = distinct[start : start + TEXTS]
        encoded = _encoded(condition.tokenizer, part + [""] * (TEXTS - len(part)), condition.length)
        ids, mask = (torch.tensor(encoded[key], device=device) for key in ("input_ids", "attention_mask"))
        if masked:  # attention needs a row to read, also of "" where a tokenizer marks no end
            mask[mask.sum(1) == 0, 0] = 1
        hidden: Tensor = model(input_ids=ids, attention_mask=None if is_clip(model) else mask)[0].half()
        for text, rows, own in zip(part, hidden.cpu(), mask.bool().cpu()):
            found[text] = (rows[own] if masked else rows).numpy()
    if not all(np.isfinite(rows).all() for rows in found.values()):
        raise ConfigError(
            f"conditions.*.path={condition.path!r}: its embeddings do not fit into float16, as they are stored"
        )
    return [found[text] for text in texts]


@functools.lru_cache(maxsize=2)
def load_text_encoder(path: str, device: str = "cpu") -> Any:
    """A frozen text encoder in float32: the text half of CLIP, the encoder half of T5, or any other as it is."""
    from transformers import AutoModel, CLIPTextModel, T5EncoderModel, UMT5EncoderModel

    kinds = {"clip": CLIPTextModel, "clip_text_model": CLIPTextModel, "t5": T5EncoderModel, "umt5": UMT5EncoderModel}
    with opened(path, "text_encoder", "conditions.*.path") as folder:
        weight_files(folder)  # refuses a folder that has only pickles, in our words
        kind: Any = kinds.get(read_config(folder).get("model_type", ""), AutoModel)
        model = kind.from_pretrained(str(folder), use_safetensors=True, dtype=torch.float32)
    return model.eval().requires_grad_(False).to(device)


def is_clip(model: Any) -> bool:
    """Whether it is what StableDiffusionPipeline expects as its text encoder."""
    return model.config.model_type == "clip_text_model"


def _encoded(tokenizer: str, texts: Sequence[str], length: int) -> Any:
    if not texts:
        return {"input_ids": [], "attention_mask": []}
    with _TOKENIZING:
        return load_tokenizer(tokenizer)(list(texts), padding="max_length", truncation=True, max_length=length)


def _hidden_size(model: Any) -> int:
    return int(model.config.hidden_size)


def _label(value: Any, classes: int) -> int:
    try:
        found = int(value)
    except (TypeError, ValueError):
        found = -1
    if not 0 <= found < classes:
        raise ConfigError(f"{value!r} is not a label: this model knows 0 to {classes - 1}")
    return found
