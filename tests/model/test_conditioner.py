from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from calotype.config import Condition
from calotype.data.npy import mask_of
from calotype.errors import ConfigError
from calotype.model.conditioner import (
    Conditioner,
    cut,
    dropped,
    empty,
    encode_texts,
    inputs,
    load_tokenizer,
    prompted,
    tokenize,
)
from calotype.model.digests import SMALL
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
ENCODER = {"_target_": "transformers.CLIPTextModel", "config": {"_target_": "transformers.CLIPTextConfig", **SIZES}}
TEXT = Condition(length=8, encoder=ENCODER)
LABEL = Condition(kind="class", source="label", classes=10)
WORDS = (
    "zero one two three four five six seven eight nine ten a an the of photo handwritten digit number numeral drawing"
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = load_tokenizer("small")
    CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_common_words_are_one_token_and_anything_can_be_written() -> None:
    tokenizer = load_tokenizer("small")
    assert len(tokenizer) <= 1024
    for word in WORDS.split():
        assert len(tokenizer.tokenize(word)) == 1, word
    for text in ("naïve café", "日本語", "☃ \x00 \t?", "7+1=8"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "").replace(
            "\t", ""
        )


def test_tokens_are_clips_layout() -> None:
    ids = tokenize("small", ["seven", ""], 6)
    start, end = len(load_tokenizer("small")) - 2, len(load_tokenizer("small")) - 1
    assert ids.dtype == np.int32
    seven = load_tokenizer("small").convert_tokens_to_ids("seven</w>")
    assert ids.tolist() == [[start, seven, end, end, end, end], [start, end, end, end, end, end]]
    assert tokenize("small", [], 6).shape == (0, 6)


def test_long_texts_are_cut_keep_their_end_and_are_counted() -> None:
    texts = ["seven " * 20, "seven"]
    ids = tokenize("small", texts, 6)
    assert ids[0, -1] == len(load_tokenizer("small")) - 1
    assert cut("small", texts, 6) == 1


def test_the_shipped_files_are_what_clip_tokenizers_read(tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((SMALL / name).read_bytes())
    other = CLIPTokenizer.from_pretrained(tmp_path)
    assert other("a handwritten seven")["input_ids"] == load_tokenizer("small")("a handwritten seven")["input_ids"]


def test_stored_forms(clip: str) -> None:
    frozen = dataclasses.replace(TEXT, mode="full", path=clip, tokenizer=clip)
    masked = dataclasses.replace(frozen, mode="masked")
    assert [form.shape for form in inputs(TEXT, ["a", "b"])] == [(8,)] * 2
    assert inputs(TEXT, ["a"])[0].dtype == np.int32
    assert [(form.tolist(), form.dtype) for form in inputs(LABEL, [3, "4"])] == [(3, np.int64), (4, np.int64)]
    assert [form.shape for form in inputs(frozen, ["a", "b", "a"])] == [(8, 8)] * 3
    assert [form.shape for form in inputs(masked, ["", "a", "a b", "a " * 20])] == [(2, 8), (3, 8), (4, 8), (8, 8)]
    assert inputs(frozen, ["a"])[0].dtype == inputs(masked, ["a"])[0].dtype == np.float16
    for wrong in (10, -1, "x", None):
        with pytest.raises(ConfigError, match="0 to 9"):
            inputs(LABEL, [wrong])


def test_frozen_text_is_the_same_beside_any_other(clip: str) -> None:
    frozen = dataclasses.replace(TEXT, mode="full", path=clip, tokenizer=clip)
    texts = [f"number {index}" for index in range(20)]
    together = encode_texts(frozen, texts)
    for index in (0, 15, 16, 19):
        assert np.array_equal(encode_texts(frozen, texts[index : index + 1])[0], together[index])
    repeated = encode_texts(frozen, texts[:3] * 20 + texts)
    assert all(np.array_equal(one, together[index % 3 if index < 60 else index - 60])
               for index, one in enumerate(repeated))  # fmt: skip
    model = CLIPTextModel.from_pretrained(clip)
    with torch.no_grad():
        hidden = model(torch.from_numpy(tokenize(clip, texts[:1], 8)).long())[0]
    np.testing.assert_allclose(together[0], hidden[0], atol=2e-3, rtol=2e-3)


def test_masked_text_is_what_full_text_has_of_its_own_tokens(clip: str) -> None:
    frozen = dataclasses.replace(TEXT, mode="full", path=clip, tokenizer=clip)
    texts = ["", "seven", "a photo of seven", "a handwritten digit that is too long for this"]
    whole = encode_texts(frozen, texts)
    for length in (8, 20):
        own = encode_texts(dataclasses.replace(frozen, mode="masked", length=length), texts[:3])
        assert [len(rows) for rows in own] == [2, 3, 6]
        assert all(np.allclose(rows, all_rows[: len(rows)], atol=3e-3) for rows, all_rows in zip(own, whole))
    assert np.array_equal(encode_texts(dataclasses.replace(frozen, mode="masked"), texts)[3], whole[3])


def test_other_encoders_do_not_see_padding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    T5EncoderModel(
        T5Config(vocab_size=len(load_tokenizer("small")), d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path)
    load_tokenizer("small").save_pretrained(tmp_path)
    made = [
        encode_texts(Condition(mode=mode, path=str(tmp_path), tokenizer=str(tmp_path), length=n), ["seven"])[0][:3]
        for n in (4, 12)
        for mode in ("full", "masked")
    ]
    for other in made[1:]:
        np.testing.assert_allclose(made[0], other, atol=1e-3, rtol=1e-2)


def test_a_text_without_tokens_leaves_a_row_to_read(tmp_path: Path) -> None:
    T5EncoderModel(T5Config(vocab_size=4, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path
    )
    words = Tokenizer(WordLevel({"<pad>": 0, "a": 1, "b": 2}, "<pad>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>").save_pretrained(tmp_path)
    masked = Condition(mode="masked", path=str(tmp_path), tokenizer=str(tmp_path), length=4)
    assert [form.shape for form in inputs(masked, ["a b", ""])] == [(2, 8), (1, 8)]
    assert empty({"text": masked})["text.mask"].tolist() == [[True, False, False, False]]


def test_empty_and_dropped() -> None:
    conditions = {"text": TEXT, "label": LABEL}
    cond, nothing = prompted(conditions, [{"text": "seven", "label": 7}] * 3), empty(conditions)
    assert nothing["label"].tolist() == [10]
    assert nothing["text"].tolist() == tokenize("small", [""], 8).tolist()
    made = dropped(
        cond, nothing, {"text": torch.tensor([True, False, True]), "label": torch.tensor([False, True, False])}
    )
    assert made["label"].tolist() == [7, 10, 7]
    assert torch.equal(made["text"][0], nothing["text"][0])
    assert torch.equal(made["text"][1], cond["text"][1])
    assert made["text"].dtype == torch.int32
    with pytest.raises(ConfigError, match="label"):
        prompted(conditions, [{"text": "seven"}])


def test_a_masked_text_is_dropped_with_its_mask(clip: str) -> None:
    conditions = {"text": dataclasses.replace(TEXT, mode="masked", path=clip, tokenizer=clip)}
    cond, nothing = prompted(conditions, ["a photo of seven", "seven"]), empty(conditions)
    assert cond["text"].shape == (2, 8, 8)
    assert cond[mask_of("text")].sum(1).tolist() == [6, 3]
    assert not cond["text"][~cond[mask_of("text")]].any()
    made = dropped(cond, nothing, {"text": torch.tensor([True, False])})
    for name in cond:
        assert torch.equal(made[name], torch.stack([nothing[name][0], cond[name][1]]))
    assert made[mask_of("text")].dtype == torch.bool


def test_what_the_unet_is_given(clip: str) -> None:
    frozen = dataclasses.replace(TEXT, mode="full", path=clip, tokenizer=clip)
    both = {"text": TEXT, "frozen": frozen, "label": LABEL}
    conditioner = Conditioner(both)
    assert (conditioner.cross_dim, conditioner.classes) == (8, 10)
    prompts = [{"text": "a", "frozen": "b", "label": 3}] * 2
    hidden, mask, labels = conditioner(prompted(both, prompts))
    assert hidden.shape == (2, 16, 8)
    assert mask is None
    assert labels.tolist() == [3, 3]
    assert Conditioner({})({}) == (None, None, None)
    with torch.autocast("cpu", torch.bfloat16):  # which joins no float16, as they are stored
        assert Conditioner({"frozen": frozen})(prompted(both, prompts))[0].dtype == torch.float32
    both["frozen"] = dataclasses.replace(frozen, mode="masked")
    other, mask, _ = Conditioner(both)(prompted(both, prompts))
    assert mask.tolist() == [[True] * 8 + [True] * 3 + [False] * 5] * 2
    assert torch.equal(other[:, 8:11], hidden[:, 8:11])
    assert not other[:, 11:].any()


def test_sizes_of_a_trained_encoder_follow_from_tokenizer_and_length() -> None:
    made = Conditioner({"text": TEXT}).encoders["text"].config
    assert (made.vocab_size, made.max_position_embeddings) == (len(load_tokenizer("small")), 8)
    assert (made.bos_token_id, made.eos_token_id) == (made.vocab_size - 2, made.vocab_size - 1)
    wrong = {**ENCODER, "config": {**ENCODER["config"], "vocab_size": 77}}  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="vocab_size=77"):
        Conditioner({"text": dataclasses.replace(TEXT, encoder=wrong)})
    with pytest.raises(ConfigError, match="one class embedding"):
        Conditioner({"a": LABEL, "b": LABEL})
    wide = {**ENCODER, "config": {**ENCODER["config"], "hidden_size": 16}}  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="widths"):
        Conditioner({"a": TEXT, "b": dataclasses.replace(TEXT, encoder=wide)})
