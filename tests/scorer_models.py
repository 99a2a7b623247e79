"""Scorers' models made by hand, so small that their answers can be computed with pencil and paper."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "agree", "deny", "x"]
T5_WORDS = ["<pad>", "</s>", "<unk>", "Yes", "No", "good", "x"]


def words_only(vocabulary: list[str], unknown: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def counting_t5(folder: Path, words: list[str] = T5_WORDS) -> Path:
    """Make a T5 whose share of Yes is sigmoid(sqrt(2) g / sqrt(g^2 + r^2)) for g times "good" and r other tokens.

    All its layers pass their input on, except that the decoder attends to every token of the input alike. "good" points
    one way in two dimensions, every other token the other way; the head reads the first of them as Yes.
    """
    tokenizer = words_only(words, "<unk>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", words.index("</s>"))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = T5Config(
        vocab_size=len(words), d_model=2, d_kv=2, d_ff=2, num_layers=1, num_heads=1, decoder_start_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "layer_norm" in name else 0.0)
        model.shared.weight[:, 1] = 1.0
        model.shared.weight[words.index("good")] = torch.tensor([1.0, 0.0])
        model.shared.weight[0] = 0.0
        attention = model.decoder.block[0].layer[1].EncDecAttention
        attention.v.weight.copy_(torch.eye(2))
        attention.o.weight.copy_(torch.eye(2))
        if "Yes" in words:
            model.lm_head.weight[words.index("Yes"), 0] = 1.0
    model.save_pretrained(folder)
    return folder


def counting_bert(
    folder: Path, labels: tuple[str, ...] = ("contradiction", "neutral", "entailment"), *, max_length: int = 64
) -> Path:
    """Make a BERT that finds entailment where "agree" is commoner than "deny", contradiction where it is rarer.

    Neutral if both are as common. The first position attends to every token alike; the head compares the two words.
    """
    tokenizer = words_only(BERT_WORDS, "[UNK]")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=max_length, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    fast.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(BERT_WORDS), hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4,
        max_position_embeddings=max_length, num_labels=len(labels), id2label=dict(enumerate(labels)),
        label2id={label: n for n, label in enumerate(labels)},
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    rows = {"contradiction": [-8.0, 8.0, 0, 0], "neutral": [0, 0, 1.0, 0], "entailment": [8.0, -8.0, 0, 0]}
    heard = {"negative": "contradiction", "positive": "entailment"} | {f"label_{n}": k for n, k in enumerate(rows)}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "LayerNorm.weight" in name else 0.0)
        model.bert.embeddings.word_embeddings.weight[4] = torch.tensor([1.0, 0, 0, -1.0])
        model.bert.embeddings.word_embeddings.weight[5] = torch.tensor([0, 1.0, 0, -1.0])
        for part in (
            model.bert.encoder.layer[0].attention.self.value,
            model.bert.encoder.layer[0].attention.output.dense,
        ):
            part.weight.copy_(torch.eye(4))
        model.bert.pooler.dense.weight.copy_(torch.eye(4))
        model.bert.pooler.dense.bias[2] = 1.0
        for n, label in enumerate(labels):
            model.classifier.weight[n] = torch.tensor(rows[heard.get(label.lower(), label.lower())])
    model.save_pretrained(folder)
    return folder


def randomised(folder: Path, kind: type[PreTrainedModel], *, layers: int = 1) -> Path:
    """Give a BERT random weights, so that every token's place matters."""
    torch.manual_seed(2)
    config = BertConfig.from_pretrained(folder)
    config.hidden_size, config.num_attention_heads, config.num_hidden_layers, config.intermediate_size = (
        16,
        2,
        layers,
        32,
    )
    config.initializer_range = 0.5
    kind(config).save_pretrained(folder)
    return folder
