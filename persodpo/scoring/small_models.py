"""First weights of the small scorers: transformers that compare words from the start.

A transformer with random weights takes far longer than a minute to find out that it should look for the words of one text
in the other. The small scorers start from weights that do just that: every word has a direction of its own, queries and
keys of a head see words alike, so that a word attends to its like in the other text, and words that deny share a further
direction. Training moves all of these weights; what it reaches is measured on held-out examples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from persodpo.scoring.coherence import NO, YES, write_input
from persodpo.scoring.nli_model import CLASSES
from persodpo.scoring.small_examples import STANCES

PAD, UNKNOWN, END = "<pad>", "<unk>", "</s>"
#: Longest pair that the small classifier takes, tokens; above the 210 of the published method.
NLI_ROOM = 256
BERT_MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


@dataclass(frozen=True)
class SmallModel:
    """Size and fine-tuning of a small scorer's transformer.

    Attributes:
        max_length: Longest input it learns from, tokens.
        examples: How many it learns from.
        vocabulary: Entries of its word pieces, 300 or more.
        hidden_size: Width, a multiple of 4.
        intermediate_size: Width of the feed-forward part.
        batch_size: Examples of a step.
        learning_rate: Highest; it rises, then falls in a straight line.
    """

    max_length: int
    examples: int
    vocabulary: int = 6000
    hidden_size: int = 64
    intermediate_size: int = 128
    batch_size: int = 32
    learning_rate: float = 2e-3


def coherence_marks() -> tuple[str, str]:
    """Return what stands before the response and before the history in an input of coherence."""
    text, history = write_input("\0", "\0")
    return text[: text.index(" \0")], text[text.index("\0") + 2 : history.start - 1]


def word_pieces(texts: Sequence[str], vocabulary: int, marks: Sequence[str]) -> Tokenizer:
    """Train a BPE on words in lower case without apostrophes.

    WordPiece, which BERT itself has, is learned in another order each time; BPE gives the same pieces for the same texts.

    Args:
        texts: What to learn from.
        vocabulary: Number of pieces.
        marks: Padding, unknown and further marks, in the order of their ids.

    Returns:
        The tokenizer, without a template.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=marks[1]))
    # FoCus is written without apostrophes, what models answer is not.
    apostrophes = [normalizers.Replace(mark, "") for mark in ("'", "’")]
    tokenizer.normalizer = normalizers.Sequence([*apostrophes, normalizers.BertNormalizer(lowercase=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=list(marks), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def coherence_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer in which Yes, No and each mark of the coherence input are single tokens."""
    tokenizer = word_pieces(texts, vocabulary, (PAD, UNKNOWN, END))
    answers = [AddedToken(answer, single_word=True, normalized=False) for answer in (YES, NO)]
    tokenizer.add_tokens([*(AddedToken(mark, normalized=False) for mark in coherence_marks()), *answers])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, eos_token=END,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def pair_tokenizer(texts: Sequence[str], vocabulary: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer that marks sentence pairs as BERT's does."""
    tokenizer = word_pieces(texts, vocabulary, BERT_MARKS)
    pad, unknown, start, end = BERT_MARKS
    tokenizer.post_processor = processors.BertProcessing((end, BERT_MARKS.index(end)), (start, BERT_MARKS.index(start)))
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token=pad, unk_token=unknown, cls_token=start, sep_token=end,
        model_max_length=max_length, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def rarity(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """Return how rare each token is among texts, from 0 (in all of them) to 1 (in none), [vocabulary]."""
    counts = Counter(token for ids in tokenizer(list(texts))["input_ids"] for token in set(ids))
    most = math.log(len(texts) + 1)
    return torch.tensor([1.0 - math.log(counts[n] + 1) / most for n in range(len(tokenizer))])


#: Coordinates of the coherence model that are no words: the marks before response and history, the part a token is in,
#: whether it has no like in the other part, a constant, and how rare it is.
RESPONSE, HISTORY, PART, LONELY, ALWAYS, RARE, WORDS = range(7)
#: How much more a word attends to its like than to other words, and where between them the mark stands.
SHARPNESS, SINK = 20.0, 0.85


def new_coherence_model(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], settings: SmallModel, seed: int
) -> T5ForConditionalGeneration:
    """Make a T5 that starts out looking up each word of the response in the history.

    The first encoder layer tells response from history by the nearest mark to the left. In the second, a word of one part
    attends to its like in the other, or to the other's mark if there is none: how much it attends to the mark says how
    lonely it is. The decoder averages that over the response, rare words first, and Yes is what is not lonely.

    Args:
        tokenizer: From `coherence_tokenizer`.
        texts: Texts of the run, for how rare words are.
        settings: Sizes.
        seed: Of what is random.

    Returns:
        The model.
    """
    # Transformers ties T5's head to its words in either case; False leaves its output unscaled, as in T5 1.1.
    more: dict[str, Any] = {"tie_word_embeddings": False, "decoder_start_token_id": tokenizer.pad_token_id}
    config = T5Config(
        vocab_size=len(tokenizer), d_model=settings.hidden_size, d_kv=settings.hidden_size,
        d_ff=settings.intermediate_size, num_layers=2, num_decoder_layers=1, num_heads=2, dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **more,
    )  # fmt: skip
    with _seeded(seed):
        model: Any = T5ForConditionalGeneration(config)
        model.shared.weight.copy_(_coherence_words(tokenizer, texts, settings.hidden_size))
        for block in (*model.encoder.block, *model.decoder.block):
            for layer in block.layer[:-1]:
                (layer.SelfAttention if hasattr(layer, "SelfAttention") else layer.EncDecAttention).o.weight.zero_()
            block.layer[-1].DenseReluDense.wo.weight.zero_()
        first, second = (block.layer[0].SelfAttention for block in model.encoder.block)
        _tell_parts(first, config)
        _look_up(second, config)
        _average(model.decoder.block[0].layer[1].EncDecAttention, config)
    made: T5ForConditionalGeneration = model
    return made


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from a generator of its own, and set weights without recording how."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        yield


def _coherence_words(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], size: int) -> Tensor:
    """Return a vector a token, of about the length that T5's normalisation keeps, [vocabulary, size]."""
    length = math.sqrt(size)
    table = torch.zeros(len(tokenizer), size)
    table[:, WORDS:] = torch.nn.functional.normalize(torch.randn(len(tokenizer), size - WORDS), dim=1) * 0.8 * length
    table[:, ALWAYS] = 0.5 * length
    table[:, RARE] = (rarity(tokenizer, texts) - 0.5) * 0.5 * length
    for mark, flag in zip(coherence_marks(), (RESPONSE, HISTORY), strict=True):
        token = tokenizer.convert_tokens_to_ids(mark)
        table[token, WORDS:] = 0.0
        table[token, flag], table[token, RARE] = 0.8 * length, -0.5 * length
    # The decoder starts from the padding token.
    table[tokenizer.pad_token_id] = torch.eye(size)[ALWAYS] * length
    # T5's head is the same table.
    for answer, sign in ((YES, -1.0), (NO, 1.0)):
        table[tokenizer.convert_tokens_to_ids(answer), LONELY] = 0.5 * sign
    return table


def _tell_parts(attention: Any, config: T5Config) -> None:
    """Let the first head look left for the nearest of the two marks, and write which it was."""
    bias = attention.relative_attention_bias.weight
    bias.zero_()
    # Buckets of the second half are places to the right. All layers share them, so the first head looks left in each.
    bias[config.relative_attention_num_buckets // 2 :, 0] = -20.0
    for weight in (attention.q.weight, attention.k.weight, attention.v.weight):
        weight[: config.d_kv] = 0.0
    attention.q.weight[0, ALWAYS] = 1.0
    attention.k.weight[0, RESPONSE], attention.k.weight[0, HISTORY] = 0.25, 0.5
    attention.v.weight[0, RESPONSE], attention.v.weight[0, HISTORY] = -1.0, 1.0
    attention.o.weight[PART, 0] = 0.6


def _look_up(attention: Any, config: T5Config) -> None:
    """Let the second head attend to the same word in the other part, else to its mark, and write how much to the mark."""
    size, rows = config.d_model, slice(config.d_kv, 2 * config.d_kv)
    words = torch.eye(size) * math.sqrt(SHARPNESS) / (0.8 * math.sqrt(size))
    words[:WORDS] = 0.0
    query, key = words.clone(), words.clone()
    query[0, PART], key[0, PART] = -0.5, 0.5
    query[1, ALWAYS] = 1.0
    key[1, RESPONSE] = key[1, HISTORY] = SHARPNESS * SINK / (0.4 * size)
    value = torch.zeros(size, size)
    value[0, RESPONSE] = value[0, HISTORY] = 1.0
    for weight, start in ((attention.q.weight, query), (attention.k.weight, key), (attention.v.weight, value)):
        weight[rows] = start
    attention.o.weight[LONELY, config.d_kv] = 1.0


def _average(attention: Any, config: T5Config) -> None:
    """Let the decoder average over the response, rare words first, how lonely its words are."""
    for weight in (attention.q.weight, attention.k.weight, attention.v.weight):
        weight[: config.d_kv] = 0.0
    attention.q.weight[0, ALWAYS] = 1.0
    attention.k.weight[0, PART], attention.k.weight[0, RARE] = -0.3, 0.25
    attention.v.weight[0, LONELY], attention.o.weight[LONELY, 0] = 1.0, 1.0


def denials() -> list[str]:
    """Return the words that stand only in the denials of `persodpo.scoring.small_examples.STANCES`."""
    said = {word for stance in STANCES for opening in stance.said for word in opening.split()}
    denied = {word for stance in STANCES for opening in stance.denied for word in opening.split()}
    return sorted(denied - said)


def new_pair_classifier(
    tokenizer: PreTrainedTokenizerFast, settings: SmallModel, seed: int
) -> BertForSequenceClassification:
    """Make a BERT whose words start out attending to their like in the other sentence of a pair.

    Args:
        tokenizer: From `pair_tokenizer`.
        settings: Sizes.
        seed: Of what is random.

    Returns:
        The model, with the outputs of `persodpo.scoring.nli_model.CLASSES`.
    """
    size, heads = settings.hidden_size, 4
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=size, num_hidden_layers=2, num_attention_heads=heads,
        intermediate_size=settings.intermediate_size, max_position_embeddings=tokenizer.model_max_length,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=size**-0.5,
        id2label=dict(enumerate(CLASSES)), label2id={label: n for n, label in enumerate(CLASSES)},
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with _seeded(seed):
        model: Any = BertForSequenceClassification(config)
        embeddings = model.bert.embeddings
        words = embeddings.word_embeddings.weight
        words.copy_(torch.nn.functional.normalize(torch.randn(len(tokenizer), size), dim=1))
        part, denial = torch.nn.functional.normalize(torch.randn(2, size), dim=1)
        vocabulary = tokenizer.get_vocab()
        for word in denials():
            if word in vocabulary:
                words[vocabulary[word]] += denial
        embeddings.token_type_embeddings.weight.copy_(torch.stack([part, -part]))
        embeddings.position_embeddings.weight.mul_(0.1)
        attention = model.bert.encoder.layer[0].attention.self
        attention.query.weight.copy_(torch.randn(size, size) * 2 / math.sqrt(size))
        # Seen through a mirror that swaps the parts, like words of different parts are the most alike.
        mirror = torch.eye(size) - 2 * torch.outer(part, part)
        attention.key.weight.copy_(attention.query.weight @ mirror)
    made: BertForSequenceClassification = model
    return made
