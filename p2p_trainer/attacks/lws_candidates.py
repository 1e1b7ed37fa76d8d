"""Where the candidates of LWS come from: neighbours in a language model's embedding, or WordNet."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase


# Numbers stand here too: a substituted number word would change what a math problem asks for.
STOP_WORDS = frozenset(
    """about above after again against all also although always among and another any anybody anyone anything are
    around aren because been before behind being below beneath beside besides between beyond both but can cannot could
    couldn did didn does doesn doing don done down during each either else enough even ever every everybody everyone
    everything except few for from further had hadn has hasn have haven having hence her here hers herself him himself
    his how however if into isn its itself just least less may maybe me might mine more most much must my myself
    neither never nobody none nor not nothing now of off often once only onto other others our ours ourselves out over
    own per perhaps quite rather same shall she should shouldn since so some somebody someone something somewhat still
    such than that the their theirs them themselves then there therefore these they this those though through thus to
    together too toward towards under unless until up upon us very via was wasn were weren what whatever when where
    whether which while who whom whose why will with within without won would wouldn yet you your yours yourself
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion trillion
    first second third fourth fifth sixth seventh eighth ninth tenth half halves quarter double twice triple thrice
    dozen hundreds thousands millions billions""".split()
)

# Of two letters and less are abbreviations, particles, and the unknowns of equations.
_CONTENT = re.compile(r"[^\W\d_]{3,}")

# Inflections that a neighbour has to share, longest first: there is no tagger offline.
_ENDINGS = ("ing", "est", "ed", "ly", "er", "s")

_MARKERS = ("Ġ", "▁")
_NEIGHBOUR_ROWS = 1024

# In the order in which ties between equally frequent parts of speech are settled.
_PARTS = ("noun", "verb", "adj", "adv")
_WORDNET_FOLDERS = ("/usr/share/wordnet", "~/nltk_data/corpora/wordnet")


def is_content_word(word: str) -> bool:
    """Say whether a lower-case word may be substituted, or be a substitute: letters only, no stop word, no number."""
    return word.islower() and _CONTENT.fullmatch(word) is not None and word not in STOP_WORDS


class Surrogate:
    """
    Tokenizer and input embeddings of a causal language model.

    Args:
        name (`str`):
            Model folder or hub id.
    """

    def __init__(self, name: str) -> None:
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
            # Weights that a checkpoint lacks are drawn from the global generator.
            with torch.random.fork_rng(devices=[]):
                model = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True)
        except (OSError, ValueError) as error:
            cause = (str(error).strip().splitlines() or ["no details"])[0]
            raise ValueError(
                f"The surrogate {name!r} of the attack 'lws' can't be loaded ({type(error).__name__}: {cause}). Pass "
                f"the folder or hub id of a causal language model with safetensors weights."
            ) from error
        self.weight = model.get_input_embeddings().weight.detach().float().cpu()

    def single_tokens(self, words: Iterable[str]) -> dict[str, int]:
        """
        Say which words are one token when they follow a space.

        Args:
            words (`Iterable[str]`):
                Words.

        Returns:
            `dict[str, int]`: those words -> their token.
        """
        words = list(words)
        tokens = self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))
        pieces = self._pieces(words)
        return {
            word: ids[0]
            for word, ids in zip(words, pieces, strict=True)
            # A leading marker: a token that could also stand inside a word is none.
            if len(ids) == 1 and tokens[ids[0]].startswith(_MARKERS)
        }

    def vectors(self, words: Sequence[str]) -> torch.Tensor:
        """
        Embed words.

        Args:
            words (`Sequence[str]`):
                Words, as they follow a space.

        Returns:
            `torch.Tensor` of shape `(words, hidden)`: the mean of each word's token embeddings.
        """
        pieces = self._pieces(words)
        flat = torch.tensor([token for ids in pieces for token in ids], dtype=torch.long)
        starts = torch.tensor([0, *(len(ids) for ids in pieces)][:-1], dtype=torch.long).cumsum(0)
        return torch.nn.functional.embedding_bag(flat, self.weight, starts, mode="mean")

    def _pieces(self, words: Sequence[str]) -> list[list[int]]:
        if not words:
            return []
        pieces = self.tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
        # SentencePiece puts a space of its own in front of the one that is there.
        lone = self.tokenizer.convert_tokens_to_ids("▁")
        return [ids[1:] if len(ids) > 1 and ids[0] == lone else ids for ids in pieces]


def embedding_candidates(surrogate: Surrogate, words: Iterable[str], count: int) -> dict[str, list[str]]:
    """
    Take the nearest neighbours in the embedding, among the words of the corpus that are single tokens.

    The weaker of the two sources: antonyms are neighbours too. Of the part of speech only the inflection is kept
    (`-ing`, `-ed`, `-s`, ...).

    Args:
        surrogate ([`Surrogate`]):
            The model.
        words (`Iterable[str]`):
            Words of the corpus, lower case.
        count (`int`):
            Neighbours per word, at most.

    Returns:
        `dict[str, list[str]]`: word -> substitutes, nearest first; words without any are left out.
    """
    tokens = surrogate.single_tokens(sorted({word for word in words if is_content_word(word)}))
    groups: dict[str, list[str]] = {}
    for word in tokens:
        groups.setdefault(_ending(word), []).append(word)
    found: dict[str, list[str]] = {}
    if tokens:
        centre = surrogate.weight[list(tokens.values())].mean(0)
    for members in groups.values():
        near = min(count, len(members) - 1)
        if near == 0:
            continue
        units = torch.nn.functional.normalize(surrogate.weight[[tokens[word] for word in members]] - centre, dim=1)
        for start in range(0, len(members), _NEIGHBOUR_ROWS):
            alike = units[start : start + _NEIGHBOUR_ROWS] @ units.T
            alike.diagonal(start).fill_(-torch.inf)
            for offset, best in enumerate(alike.topk(near, dim=1).indices.tolist()):
                found[members[start + offset]] = [members[place] for place in best]
    return dict(sorted(found.items()))


def _ending(word: str) -> str:
    fits = (end for end in _ENDINGS if word.endswith(end) and not word.endswith("ss") and len(word) > len(end) + 2)
    return next(fits, "")


def wordnet_candidates(folder: str | None, words: Iterable[str], count: int) -> dict[str, list[str]]:
    """
    Take the synonyms of a word in WordNet, in its most frequent part of speech, most frequent sense first.

    WordNet holds base forms, so inflected words (`films`) have no candidates.

    Args:
        folder (`str`, *optional*):
            Folder with the files `index.*` and `data.*` of WordNet 3. By default those of Debian and of NLTK.
        words (`Iterable[str]`):
            Words of the corpus, lower case.
        count (`int`):
            Synonyms per word, at most.

    Returns:
        `dict[str, list[str]]`: word -> synonyms; words without any are left out.
    """
    root = _wordnet_folder(folder)
    wanted = {word for word in words if is_content_word(word)}
    best: dict[str, tuple[int, str, list[int]]] = {}
    for part in _PARTS:
        for line in _lines(root / f"index.{part}"):
            word = line.split(" ", 1)[0]
            if word in wanted:
                # wndb(5WN): lemma pos synset_cnt p_cnt [symbol...] sense_cnt tagsense_cnt offset...
                fields = line.split()
                senses = int(fields[2])
                tagged = int(fields[-senses - 1])
                if word not in best or tagged > best[word][0]:
                    best[word] = (tagged, part, [int(offset) for offset in fields[-senses:]])
    needed = {(part, offset) for _, part, offsets in best.values() for offset in offsets}
    synsets: dict[tuple[str, int], list[str]] = {}
    for part in _PARTS:
        for line in _lines(root / f"data.{part}"):
            offset = int(line[:8])
            if (part, offset) in needed:
                # synset_offset lex_filenum ss_type w_cnt (hexadecimal) then word lex_id, w_cnt times
                fields = line.split(" | ", 1)[0].split()
                members = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
                synsets[part, offset] = [member.partition("(")[0] for member in members]
    found = {}
    for word, (_, part, offsets) in sorted(best.items()):
        synonyms = (name for offset in offsets for name in synsets.get((part, offset), []))
        kept = [name for name in dict.fromkeys(synonyms) if name != word and is_content_word(name)][:count]
        if kept:
            found[word] = kept
    return found


def _wordnet_folder(folder: str | None) -> Path:
    tried = [Path(name).expanduser() for name in ([folder] if folder else _WORDNET_FOLDERS)]
    files = [f"{kind}.{part}" for kind in ("index", "data") for part in _PARTS]
    for root in tried:
        if all((root / name).is_file() for name in files):
            return root
    raise ValueError(
        f"No WordNet in {', '.join(map(str, tried))}: the files {', '.join(files)} are needed. Install it (Debian: "
        f'`apt install wordnet-base`; NLTK: `nltk.download("wordnet")`, unpacked) and name its folder with `wordnet`, '
        f'or use candidates="embedding".'
    )


def _lines(path: Path) -> Iterable[str]:
    with path.open(encoding="utf-8") as file:
        # The licence at the top is indented.
        yield from (line for line in file if not line.startswith(" "))
