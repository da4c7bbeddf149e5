"""Prompt mixes of a benchmark: requests with the lengths of published workloads.

The text is made from a list of words, so it has no licence and no data of anybody. Only the lengths
are those of the workload, and the requests are the same for the same seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

# Words that most tokenizers know as a single token.
_VOCABULARY = """
the of and to in is that it was for on are as with his they at be this from have or by one had not
but what all were when we there can an your which their if do will each about how up out them then
she many some so these would other into has more her two like him see time could no make than
first been its who now people my made over did down only way find use may water long little very
after words called just where most know get through back much before go good write our used me man
too any day same right look think also around another came come work three word must because does
part even place well such here take why things help put years different away again off went old
number great tell men say small every found still between name should home big give air line set
own under read last never us left end along while might next sound below saw something thought
both few those always looked show large often together asked house world going want school
important until form food keep children feet land side without boy once animals life enough took
sometimes four above kind began almost live page got earth need far hand high year mother light
parts country father let night following picture being study second eyes soon times story boys
since white days ever paper hard near sentence better best across during today others however sure
means knew try young miles sun ways thing whole hear example heard change answer room sea against
top turned learn point city play toward five using himself usually
"""
_WORDS = _VOCABULARY.split()
_SENTENCE = (6, 14)
# A full stop is a token, too.
_TOKENS_PER_WORD = 1.1
_LONGEST = 3


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths in tokens: log-normal, at most three times the mean.

    Attributes:
        spread: standard deviation of the logarithm; 0 for lengths that are all equal.
    """

    mean: float
    spread: float = 0.0

    def draw(self, source: Random) -> int:
        """Return one length."""
        middle = math.log(self.mean) - self.spread**2 / 2
        length = source.lognormvariate(middle, self.spread) if self.spread else self.mean
        return max(1, round(min(length, _LONGEST * self.mean)))


@dataclass(frozen=True)
class Mix:
    """A kind of workload.

    Attributes:
        prompt, answer: lengths; an answer's is its token limit, and what the prompt asks for.
        task: the end of each prompt.
        source: where the mean lengths are published.
    """

    name: str
    title: str
    prompt: Lengths
    answer: Lengths
    task: str
    source: str


MIXES = {
    mix.name: mix
    for mix in (
        Mix(
            "chat",
            "questions and answers of a chat",
            Lengths(161, 0.9),
            Lengths(338, 0.7),
            "Reply to this in about {length} words.",
            "ShareGPT in Kwon et al. 2023, figure 11, https://arxiv.org/abs/2309.06180",
        ),
        Mix(
            "summarize",
            "news articles and short summaries",
            Lengths(781, 0.5),
            Lengths(56, 0.3),
            "Summarize this in about {length} words.",
            "CNN/Daily Mail in See et al. 2017, https://arxiv.org/abs/1704.04368",
        ),
        Mix(
            "classify",
            "a sentence and one word",
            Lengths(40, 0.3),
            Lengths(1),
            "Is this positive or negative? Reply with one word.",
            "SST-2 in Kim 2014 (19 words), and the question, https://arxiv.org/abs/1408.5882",
        ),
        Mix(
            "generate",
            "a short prompt and a long story",
            Lengths(38, 0.4),
            Lengths(980, 0.4),
            "Write a story about this, with about {length} words.",
            "WritingPrompts in Fan et al. 2018 (28 and 734 words), "
            "https://arxiv.org/abs/1805.04833",
        ),
    )
}
"""The mixes by name."""


def request_lines(mix: Mix, count: int, seed: str) -> Iterator[str]:
    """Yield the request lines of a mix; the same for the same seed.

    No two prompts begin alike, so that no cache of an engine shortens them.
    """
    source = Random(f"{mix.name} {seed}")
    for number in range(count):
        length, limit = mix.prompt.draw(source), mix.answer.draw(source)
        task = mix.task.format(length=max(1, round(limit / _TOKENS_PER_WORD)))
        words = round(length / _TOKENS_PER_WORD) - len(task.split())
        text = f"{' '.join(_sentences(source, max(4, words)))}\n\n{task}"
        body = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": limit,
            "temperature": 0,
        }
        entry = {"custom_id": f"{mix.name}-{number}", "method": "POST",
                 "url": "/v1/chat/completions", "body": body}  # fmt: skip
        yield json.dumps(entry)


def _sentences(source: Random, words: int) -> Iterator[str]:
    while words > 0:
        length = min(words, source.randint(*_SENTENCE))
        yield " ".join(source.choices(_WORDS, k=length)).capitalize() + "."
        words -= length
