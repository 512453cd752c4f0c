"""What is done to queries, titles and passages, as pure functions. Standard library only."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter

MAX_QUERY_CHARS = 1_000  # Lucene refuses a query of more than 1,024 terms; a term takes two characters at least
MAX_TITLE_CHARS = 200  # a longer first line of `contents` is no title
CONCISE_SENTENCES = 3
LAST_WORD_CHARS = 50  # of a sentence, in which an initial or an abbreviation is looked for, with the quotes and full stops around it

_STOP_WORDS = frozenset(
    "a an and are as at be been but by did do does for from had has have he her his how i if in into is it its of on or s she such "
    "that the their then there these they this to was were what when where which who whom whose why will with you your".split()
)
_ABBREVIATIONS = frozenset(
    "dr mr mrs ms st sr jr prof gen col capt lt rev hon no vs etc c ca e.g i.e u.s u.k approx lit vol op fl b d r".split()
)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+(?=[\"'“‘(\[]?([^\W_]))")
_WORD = re.compile(r"[^\W_]+")
_PARENTHESIS = re.compile(r"\s*\([^()]*\)\s*$")


def clean_query(argument: str) -> str:
    """One line of printable text of at most MAX_QUERY_CHARS, cut between words where that is possible."""
    argument = argument[: 4 * MAX_QUERY_CHARS]
    if not argument.isprintable():
        argument = "".join(" " if unicodedata.category(char) in ("Cc", "Cs") else char for char in argument)
    return cut_chars(" ".join(argument.split()), MAX_QUERY_CHARS)


def title_key(title: str) -> str:
    """Two titles are the same where their keys are: case, accents, punctuation, underscores and a leading "the" do not count.

    A title without letters and digits ("!!!", a band) is its own key.
    """
    plain = "".join(char for char in unicodedata.normalize("NFKD", title.casefold()) if not unicodedata.combining(char))
    words = _WORD.findall(re.sub(r"['’]", "", plain))
    if len(words) > 1 and words[0] == "the":
        words = words[1:]
    return " ".join(words or plain.split())


def title_forms(title: str) -> tuple[str, str]:
    """The title as it stands and without a disambiguation in parentheses at its end ("Mercury (planet)")."""
    return title, _PARENTHESIS.sub("", title)


def title_keys(title: str) -> tuple[str, str]:
    """The keys of both forms of the title."""
    form, bare = title_forms(title)
    return title_key(form), title_key(bare)


def title_distance(query: str, title: str) -> int:
    """Which of several titles with the query's key is meant: 0 for the query itself, 1 where only the case differs, 2 for any other."""
    return 0 if title == query else 1 if title.casefold() == query.casefold() else 2


def read_raw(raw: str | None) -> tuple[str, str]:
    """(title, text) of a stored document. `raw` is JSON with `title` and `text` or `contents`, or plain text.

    Without the key `title`, a short first line of `contents` with more lines after it is the title: so Pyserini's Wikipedia
    indexes are made. A title that `contents` repeats as its first line is taken off the text.
    """
    try:
        document = json.loads(raw or "")
    except ValueError:
        return "", (raw or "").strip()
    if not isinstance(document, dict):
        return "", (raw or "").strip()
    text = next((document[key] for key in ("text", "contents") if isinstance(document.get(key), str)), "").strip()
    if isinstance(title := document.get("title"), str):
        return title.strip(), without_title(title.strip(), text)
    return split_title(text)


def without_title(title: str, text: str) -> str:
    """The text without a first line that repeats the title, in quotes or not; whole where nothing follows that line."""
    first, _, rest = text.partition("\n")
    repeats = title and " ".join(first.split()).strip('"') == title.strip('"')
    return rest.strip() if repeats and rest.strip() else text


def split_title(contents: str) -> tuple[str, str]:
    """(title, text) of a `contents` whose first line may be a title, in quotes or not."""
    first, newline, rest = contents.strip().partition("\n")
    if newline and rest.strip() and len(first) <= MAX_TITLE_CHARS:
        return first.strip().strip('"'), rest.strip()
    return "", contents.strip()


def first_paragraph(text: str) -> str:
    """Up to the first line break."""
    return text.strip().partition("\n")[0].strip()


def sentences(text: str) -> list[str]:
    """Sentences of a passage, in order. None ends before a small letter, nor with a full stop after an initial or a common abbreviation."""
    parts: list[str] = []
    for line in text.splitlines():
        start = 0
        for end in _SENTENCE_END.finditer(line):
            if end.group(1).islower():
                continue
            before = line[max(start, end.start() - LAST_WORD_CHARS) : end.start()].rstrip()
            last = before.split()[-1].rstrip(".").lstrip("(\"'“‘[").lower() if before else ""
            if before.endswith(".") and ((len(last) == 1 and last.isalpha()) or last in _ABBREVIATIONS):
                continue
            parts.append(line[start : end.end()].strip())
            start = end.end()
        parts.append(line[start:].strip())
    return [part for part in parts if part]


def concise(text: str, query: str, max_sentences: int = CONCISE_SENTENCES) -> str:
    """The sentences that share most with the query, in their original order; the first ones where none shares anything.

    A query word counts by how few of the passage's sentences hold it; equal sentences keep their order.
    """
    found = sentences(text)
    if len(found) <= max_sentences:
        return " ".join(found)
    wanted = _terms(query)
    shared = [wanted & _terms(sentence) for sentence in found]
    spread = Counter(term for terms in shared for term in terms)
    scores = [sum(math.log(1 + len(found) / spread[term]) for term in terms) for terms in shared]
    best = sorted(range(len(found)), key=lambda index: (-scores[index], index))[:max_sentences]
    return " ".join(found[index] for index in sorted(best))


def cut_chars(text: str, max_chars: int) -> str:
    """At most `max_chars` characters, ended between two words where there is a space in the last half."""
    if len(text) <= max_chars:
        return text
    cut = text[:max_chars]
    if not text[max_chars].isspace() and (space := cut.rfind(" ")) >= max_chars // 2:
        cut = cut[:space]
    return cut.rstrip()


def cut_words(text: str, max_words: int) -> str:
    """At most `max_words` words separated by white space; line breaks between those that stay are kept."""
    words = re.finditer(r"\S+", text)
    for index, word in enumerate(words):
        if index == max_words:
            return text[: word.start()].rstrip()
    return text


def _terms(text: str) -> set[str]:
    """Words that mean something, in lower case, with plural and verb endings taken off."""
    return {_stem(word) for word in _WORD.findall(text.casefold()) if word not in _STOP_WORDS}


def _stem(word: str) -> str:
    for ending in ("ing", "ed", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    return word.rstrip("e") if len(word) > 3 else word
