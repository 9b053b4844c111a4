"""From text to numbers: bytes, a small BPE of the user's text, or the tokenizer of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ...spaces.errors import ConfigError

BYTES, BPE = "bytes", "bpe"
PAD, START = "[PAD]", "[CLS]"
#: Characters that are encoded at once; text is cut at the ends of lines.
CHUNK = 2**20


def transformers() -> Any:
    """The library. Raises ConfigError where it is not installed."""
    try:
        import transformers as library
    except ImportError as error:
        raise ConfigError("language models need transformers: pip install 'prunefront[text]'") from error
    return library


@dataclass(frozen=True)
class Vocabulary:
    """``encode`` turns texts into token ids below ``size``, one list a text, without special tokens.

    ``pad`` and ``start``: ids that fill up short texts and begin every one, for models that read whole texts; a
    checkpoint's ``tokenizer`` adds its own instead.
    """

    size: int
    encode: Callable[[list[str]], list[list[int]]]
    pad: int | None = None
    start: int | None = None
    #: Of Hugging Face, where there is one; ``export_huggingface`` takes it, to be saved beside a model.
    tokenizer: Any = None

    @property
    def padding(self) -> int:
        """What fills up short texts where the model's configuration does not say; as is usual, the end of a text where
        there is no token for it."""
        candidates = (self.pad, *(getattr(self.tokenizer, name, None) for name in ("pad_token_id", "eos_token_id")))
        return next((int(token) for token in candidates if token is not None), 0)

    def tokens(self, text: str) -> Iterator[list[int]]:
        """Those of a long text, chunk by chunk."""
        for chunk in chunks(text):
            yield self.encode([chunk])[0]


def chunks(text: str) -> Iterator[str]:
    """``text`` in pieces of about ``CHUNK`` characters that end with a line."""
    place = 0
    while place < len(text):
        end = text.find("\n", place + CHUNK)
        end = len(text) if end < 0 else end + 1
        yield text[place:end]
        place = end


def make_vocabulary(
    name: str | None, model: str | None, size: int, texts: Iterable[str], whole_texts: bool = False
) -> Vocabulary:
    """``name``: ``bytes``, ``bpe`` (``size`` tokens learnt from ``texts``), a tokenizer's folder or name; None: that of
    the checkpoint ``model``, or bytes where there is none. ``whole_texts``: with ids to pad and to start texts.

    Raises:
        ConfigError: there is no such tokenizer, or ``size`` is too small.
    """
    if name is None:
        name = model if model is not None else BYTES
    if name == BYTES:
        return _whole_bytes() if whole_texts else Vocabulary(256, lambda given: [list(t.encode()) for t in given])
    tokenizer = _trained(size, texts) if name == BPE else from_checkpoint(name)

    def encode(given: list[str]) -> list[list[int]]:
        found: list[list[int]] = tokenizer(given, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    pad, start = [tokenizer.convert_tokens_to_ids(token) if name == BPE else None for token in (PAD, START)]
    return Vocabulary(len(tokenizer), encode, pad, start, tokenizer)


def _whole_bytes() -> Vocabulary:
    """Bytes, with NUL as 256: the id that pads must be small, since some models count positions from it on."""
    return Vocabulary(258, lambda given: [[byte or 256 for byte in text.encode()] for text in given], pad=0, start=257)


def from_checkpoint(name: str) -> Any:
    """The tokenizer in a folder, or of a name on the Hugging Face hub; no code of its own is run."""
    try:
        return transformers().AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"there is no tokenizer in {name} ({_line(error)}); set task.tokenizer to bytes, bpe or a folder with one"
        ) from error


def _trained(size: int, texts: Iterable[str]) -> Any:
    """A byte-level BPE (Sennrich et al. 2016) of ``size`` tokens; the same text gives the same one."""
    library = transformers()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size < len(alphabet) + 2:
        raise ConfigError(f"task.vocab_size must be at least {len(alphabet) + 2}, the bytes and two more, not {size}")
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learnt.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(alphabet), special_tokens=[PAD, START], show_progress=False
    )
    learnt.train_from_iterator((chunk for text in texts for chunk in chunks(text)), trainer)
    return library.PreTrainedTokenizerFast(tokenizer_object=learnt, pad_token=PAD, cls_token=START)


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
