"""The filters of a recipe, as datatrove has them."""

from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.word_tokenizers import WordTokenizer, load_word_tokenizer

from fusedlm.config.pipeline import Filter, FineWebQuality, GopherQuality


class Words(WordTokenizer):
    """Words between white space, as in the papers of the filters."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError("no filter of a recipe needs sentences")

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        raise NotImplementedError("no filter of a recipe needs sentences")


def words_of(language: str | None) -> WordTokenizer:
    """The word tokenizer of a language.

    Raises:
        ValueError: datatrove has none, or it needs a package that is missing.
    """
    if language is None:
        return Words()
    try:
        tokenizer = load_word_tokenizer(language)
        tokenizer.word_tokenize("word")  # imports what it needs
    except (ImportError, LookupError, OSError, ValueError) as error:
        what = " ".join(str(error).split())
        raise ValueError(f"data.pipeline.language={language}: {what}; install what it names, or set null") from None
    return tokenizer


def make_filters(filters: list[Filter], language: str | None) -> list[tuple[str, BaseFilter]]:
    """Name and filter of each entry."""
    words = words_of(language)
    return [(one.type, _make(one, words)) for one in filters]


def _make(config: Filter, words: WordTokenizer) -> BaseFilter:
    if isinstance(config, GopherQuality):
        return GopherQualityFilter(
            min_doc_words=config.min_words,
            max_doc_words=config.max_words,
            min_avg_word_length=config.min_word_length,
            max_avg_word_length=config.max_word_length,
            max_symbol_word_ratio=config.max_symbols_per_word,
            max_bullet_lines_ratio=_limit(config.max_bullet_lines),
            max_ellipsis_lines_ratio=_limit(config.max_ellipsis_lines),
            max_non_alpha_words_ratio=config.min_alphabetic_words,
            min_stop_words=config.min_stop_words,
            language=words,
        )
    if isinstance(config, FineWebQuality):
        return FineWebQualityFilter(
            line_punct_thr=config.min_punctuated_lines,
            short_line_thr=config.max_short_lines,
            char_duplicates_ratio=config.max_duplicate_line_characters,
            new_line_ratio=config.max_line_breaks_per_word,
            language=words,
        )
    return GopherRepetitionFilter(
        dup_line_frac=_limit(config.max_duplicate_lines),
        dup_para_frac=_limit(config.max_duplicate_paragraphs),
        dup_line_char_frac=_limit(config.max_duplicate_line_characters),
        dup_para_char_frac=_limit(config.max_duplicate_paragraph_characters),
        language=words,
    )


def _limit(fraction: float) -> float:
    """To datatrove 0 is no limit; to a recipe it is the limit 0."""
    return fraction or 1e-12
