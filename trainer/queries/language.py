"""Tells bokmål, nynorsk, Danish, Swedish and English apart by their function words and their spelling."""

import re
from collections.abc import Collection
from functools import lru_cache

NAMES = {
    "nb": "Norwegian bokmål (norsk bokmål)",
    "nn": "Norwegian nynorsk (norsk nynorsk)",
    "da": "Danish (dansk)",
    "sv": "Swedish (svenska)",
}
# What a column or --language may say. Norwegian without its written form may be either.
CODES: dict[str, tuple[str, ...]] = dict.fromkeys(("nb", "nob", "no-nb", "nb-no"), ("nb",))
CODES |= dict.fromkeys(("nn", "nno", "no-nn", "nn-no"), ("nn",)) | dict.fromkeys(("no", "nor"), ("nb", "nn"))
CODES |= dict.fromkeys(("da", "dan", "da-dk"), ("da",)) | dict.fromkeys(("sv", "swe", "sv-se"), ("sv",))

# A corpus and a language model may bring this one too: it is told, and no query is asked for in it.
ENGLISH = "en"

# Words that a language must be ahead of the next by, before a text counts as its own. Passages with 30 words and more
# have such a lead: all of NorQuAD's 604 and SweQUAD's 417.
LEAD = 2
# The same for refusing a question. With one word, 0.6 % of NorQuAD's 3,806 questions and none of SweQUAD's 952 are
# refused wrongly. Of questions in another of the four languages, nine in ten are refused, but of bokmål where Danish is
# wanted, or Danish where bokmål is, 0.5 to 0.6. Two words refuse next to none wrongly, and miss two thirds of bokmål.
LEAD_OF_QUESTION = 1

# Function words, by the languages that have them. Words of all four are left out, and so are those that mean something
# else in another of them (Swedish "var", where; Danish "må", may).
WORDS = {
    "nb nn da": "og er at til for over under før mange skal vil kunne denne dette alle andre her der også begge fordi nye",
    "nb nn sv": "av blir mot ut oss skap alltid",
    "nb da": """ikke jeg et fra hvem hvor hvordan hvorfor hvilken hvilket hvilke hun være bare kun disse flere hver hvert
        samme selv hvis siden deres allerede hele ville mere meget mennesker""",
    "nb nn": "seg meg deg hadde opp inn etter mellom gjennom å ei dersom blant slik aldri igjen svært dere blei",
    "nb sv": "ett hennes heter mer",
    "nb da sv": "de ligger kommer dem en",
    "nn sv": "då sidan utan",
    "da sv": "sig mig dig blev efter nu igen aldrig",
    "nb": "hva noe noen mye ble blitt vært uten nå gjør gjøre finnes sier sånn særlig finne",
    "nn": """ikkje eg eit frå kva kven kor korleis kvifor dei ho noko nokon nokre mykje vart vorte vere vore berre desse
        hennar meir fleire kvar kvart sjølv same heiter ligg kjem gjer gjere finst seier deira viss allereie heile særleg
        medan saman nokså fyrste""",
    "da": """af hvad hvornår noget nogen nogle bliver blevet havde ud op ind mellem gennem mod uden hendes sådan gør gøre
        hedder findes siger os altid blandt især fik""",
    "sv": """och är att till inte jag ett från vad vem hur varför vilken vilket vilka hon något någon några mycket många
        blivit vara varit hade kunde ska skall vill upp in mellan genom bara också detta denna dessa alla andra flera fler
        varje samma själv där här för över första måste eftersom gör göra finns säger deras båda redan hela nya bland när
        sedan""",
    ENGLISH: "the of and was that with by it which as are what how from this who were be an have has why where",
}
# Spelling: of a word in small letters that is not above, the first pattern that it fits. Danish doubles no consonant at
# the end of a word.
SPELLING = {
    "sv": r"[äö]|ck|(ar|or|er)na$|igt$|ligen$",
    "da": r"hed(en|er|erne|s)?$|skab(et|er|s)?$|ede$|øj",
    "nn": r"heit(a|er)?$|leg(e|t)?$|ane$|ingar$",
    "nb nn": r"sjon|øy|[æø].*(kk|ll|nn|pp|ss|tt)$",
    "nb da": r"erne$|^hv",
    "nb sv": r"het(en|er)?$",
    "da sv": r"tion",
    "nb nn da": r"[æø]",
    "nb nn sv": r"(bb|dd|ff|gg|kk|ll|nn|pp|rr|ss|tt)$",
}
_BY_WORD: dict[str, frozenset[str]] = {}
for _languages, _words in WORDS.items():
    for _word in _words.split():
        _BY_WORD[_word] = _BY_WORD.get(_word, frozenset()) | frozenset(_languages.split())
_SPELLING = [(frozenset(languages.split()), re.compile(pattern)) for languages, pattern in SPELLING.items()]


@lru_cache(maxsize=200_000)
def _languages_of(word: str) -> frozenset[str]:
    if len(word) > 1 and word.isupper():  # UD is a ministry, and "ud" a word
        return frozenset()
    if found := _BY_WORD.get(word.lower()):
        return found
    if word != word.lower():  # a name is spelled alike in all of them
        return frozenset()
    return next((languages for languages, pattern in _SPELLING if pattern.search(word)), frozenset())


def votes(text: str) -> dict[str, int]:
    """How many words of a text speak for each language."""
    count = dict.fromkeys([*NAMES, ENGLISH], 0)
    for word in re.findall(r"[^\W\d_]+", text):
        for language in _languages_of(word):
            count[language] += 1
    return count


def tell(text: str, among: Collection[str] = (*NAMES, ENGLISH)) -> str | None:
    """The language of a text; None where no language is ahead of the others by LEAD words."""
    ranked = sorted(((count, language) for language, count in votes(text).items() if language in among), reverse=True)
    if len(ranked) > 1 and ranked[0][0] - ranked[1][0] < LEAD:
        return None
    return ranked[0][1]


def is_other(text: str, language: str, lead: int) -> bool:
    """Whether a text speaks for another language than this one, by at least `lead` words; too short a text does not."""
    count = votes(text)
    return max(count.values()) - count[language] >= lead
