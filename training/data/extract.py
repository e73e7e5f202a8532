"""Chunks -> question and answer pairs by rule, without a model; English and Vietnamese.

A sentence that states a price, time, date, amount, code, number of things or meaning gives one pair. In English a few
sentence patterns are turned into a question (``X costs 5 crowns`` -> ``How much does X cost?``); any other sentence
becomes a gap to fill. In Vietnamese the question word takes the place of the value, as it does in the language.
A sentence that leans on another one (``It closes …``), denies something, or holds too many values is left out.

Not covered: reasons, steps, anything that needs two sentences. Rules read words, not grammar: docs/decisions/0013
says how many of their questions were good.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from retrieval.query import POINTERS
from retrieval.types import Chunk
from training.data.pairs import Pair
from training.data.sentences import content, language, lower_first, names, sentences

GAP = "____"
SENTENCE_WORDS = range(4, 31)
MOST_VALUES = 3
"""Values in a sentence that may become a gap; with more it is a table in words."""
LONGEST_ANSWER = 12

WORD_NUMBERS = "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty|half an?"
NUMBER = rf"(?:\d[\d.,]*\d|\d|\b(?:{WORD_NUMBERS})\b)"
UNITS = (
    r"(?:working |calendar )?days?|hours?|minutes?|seconds?|weeks?|months?|years?|crowns?|euros?|dollars?|pounds?|"
    r"per ?cent|percent|%|degrees?(?: Celsius)?|°C?|°F|(?:cubic |square )?(?:centi|milli|kilo)?met(?:re|er)s?|miles?|"
    r"knots?|tonnes?|kilograms?|grams?|lit(?:re|er)s?|kilowatt-hours?|watt-hours?|volts?|megohms?|bar|mm|cm|km|kg|kW|kWh|km/h|"
    r"MW|ml|rpm|ppm|Hz|V|A|W|m|g|l|persons?|people|passengers?|pages?|points?|copies|times"
)
TIME_UNITS = r"(?:working |calendar )?days?|hours?|minutes?|seconds?|weeks?|months?|years?"
BOUND = (
    r"(?:(?:at (?:most|least)|no (?:more|less|longer|later) than|up to|about|less than|more than|under|over|minus) )?"
)
RATE = r"(?: (?:an?|per|each|every) (?:hour|minute|second|day|night|week|month|year|cubic metre|axle|person))?"
AMOUNT = rf"{BOUND}(?:[$€£]\d[\d.,]*\d|[$€£]\d|{NUMBER}(?: (?:{UNITS})(?![\w-])|[%°]C?)(?: {NUMBER} (?:minutes?|seconds?|months?|cm|mm))?)"
VALUE = AMOUNT + RATE
MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
DAYS = "(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)days?"
DATE = rf"(?:\d{{1,2}} (?:{MONTHS})(?: \d{{4}})?|(?:{MONTHS}) \d{{1,2}}(?:, \d{{4}})?)"
CLOCK = r"(?:[01]?\d|2[0-3]):[0-5]\d(?: ?[ap]\.?m\.?)?"
CODE = r"(?<![\w-])(?:Form )?[A-Z]{1,4}-?\d[\w-]*"
NO_SUBJECT = (
    r"(?!(?i:after|at|before|by|for|from|if|in|on|since|so|then|there|these|this|those|to|under|until|when|where|while|"
    r"with|whoever|whatever|anyone|nobody|nothing|only|once|no|both|some|any|most|all|such|as|between|within)\b)"
)
"""What does not begin a subject."""
VERBS = "who|which|that|is|are|was|were|has|have|had|must|may|can|if|when|costs?|be|and|or|than|not|never"
SUBJECT = rf"(?P<s>{NO_SUBJECT}(?:(?!\b(?:{VERBS})\b)[^,;:()])+?)"
TAIL = r"(?P<tail>(?: (?!(?:and|or|but|of|more|less|extra|a|an)\b)[^,;:]*?)?)"
PASSIVE = r"(?P<v>(?:always |also |only )?\w+(?:ed|n|t|ept|eld|ut|ound)(?: (?!every|each|once|for|within|by|on|to)[a-z-]+){0,4})"
LEMMAS = {"closes": "close", "opens": "open", "starts": "start", "begins": "begin", "ends": "end", "leaves": "leave"}
LEMMAS |= {"stops": "stop", "meets": "meet", "departs": "depart", "expires": "expire", "lapses": "lapse"}
HAVING = {"has": "have", "carries": "carry", "holds": "hold", "takes": "take", "needs": "need", "serves": "serve"}
SIDE = re.compile(r"\s*\((?:[a-z]+(?:-[\w]+)+|see [^)]*)\)", re.IGNORECASE)
"""A reference in parentheses to another document."""
LABEL = re.compile(r"^(?=[^:]*[\dA-Z])[A-Z][\w.-]{0,9}: ")
"""A code before what it stands for: ``P1A: an adult single …``."""
CLAUSE = re.compile(r"; |, (?:and|but|so|while|which|because|since|as|where|who|that|then) | and (?=the |an? )")
UNSURE = re.compile(
    r"\b(?:not|never|no longer|none|nor|except|unless|also|instead|otherwise|same|other|later|too|again)\b"
)

Rule = tuple[re.Pattern[str], Callable[[re.Match[str]], tuple[str, str]]]
"""A pattern over a whole clause, and its question (``{}`` for the subject) with the answer."""


def pairs(chunks: Sequence[Chunk]) -> Iterator[Pair]:
    """The pairs of `chunks`, in order; what is good enough is for ``training.data.pairs`` to say."""
    named = names(chunk.text for chunk in chunks)
    for chunk in chunks:
        spoken = language(f"{chunk.title} {chunk.heading} {chunk.text}")
        if spoken is None:
            continue
        for sentence in sentences(chunk.text):
            if any(mark in sentence for mark in ("`", "](", "://", "|", GAP)):
                continue
            pair = _entry(sentence, chunk, spoken) or (
                _vietnamese(sentence, chunk, named) if spoken == "vi" else _english(sentence, chunk, named)
            )
            if pair and len(pair.answer.split()) <= LONGEST_ANSWER:
                yield pair


def _entry(sentence: str, chunk: Chunk, spoken: str) -> Pair | None:
    """``Owner: chief engineer.`` -> what is given as owner."""
    entry = re.fullmatch(r"\**(?P<key>[^\W\d_][^\d:.,]{1,30}?)\**: (?P<value>[^:;]{2,70}?)\.?", sentence)
    if not entry or len(entry["key"].split()) > 3 or len(entry["value"].split()) > 8 or entry["key"].isupper():
        return None
    if entry["key"].lower() in ("note", "warning", "example", "caution", "lưu ý", "chú ý", "ví dụ"):
        return None
    key = entry["key"].lower()
    question = f'mục "{entry["key"]}" ghi gì?' if spoken == "vi" else f'what is given as "{key}"?'
    return Pair(question, entry["value"], sentence, chunk, spoken, cloze=True)


# -- English -----------------------------------------------------------------------------------------------------


def _english(sentence: str, chunk: Chunk, named: set[str]) -> Pair | None:
    body = LABEL.sub("", SIDE.sub("", sentence)).strip().rstrip(".!…").strip()
    words = body.split()
    if sentence.endswith("?") or len(words) not in SENTENCE_WORDS or _leans(words):
        return None
    for position, clause in enumerate(CLAUSE.split(body)):
        if position and not re.match(r"(?:the|an?|each|every|[A-Z])\b", clause):
            continue
        if UNSURE.search(clause) or _leans(clause.split()):
            continue
        for pattern, ask in RULES:
            if (found := pattern.fullmatch(clause)) and _plain_subject(found["s"]):
                frame, answer = ask(found)
                subject = lower_first(found["s"], named)
                question = frame.replace("{}", subject)
                return Pair(question, answer, sentence, chunk, "en", frame=frame, subject=subject)
    return _cloze(body, sentence, chunk)


def _leans(words: Sequence[str]) -> bool:
    """Whether a sentence needs the one before it to be understood."""
    first = [word.lower().strip(",.;:") for word in words[:4]]
    pointing = set(first) & (
        POINTERS - {"that"}
        | {"such", "one", "both", "either", "neither", "later", "then", "its", "two", "we", "our", "ours"}
    )
    return bool(pointing) or bool(
        {"it", "they", "them", "its", "she", "here", "below", "above"} & {w.lower() for w in words[:9]}
    )


def _plain_subject(subject: str) -> bool:
    return len(subject.split()) <= 9 and len(content(subject)) >= 1 and subject[0].isalnum()


def _do(subject: str) -> str:
    return "do" if _plural(subject) else "does"


def _plural(subject: str) -> bool:
    head = re.split(r" (?:of|for|in|on|at|with|from|to|above|below|up|behind|between) ", subject)[0].split()[-1]
    return (
        head.endswith("s")
        and not head.endswith(("ss", "us", "is"))
        and subject.split()[0].lower() not in ("a", "an", "each", "every")
    )


def _tense(m: re.Match[str]) -> str:
    """``costs`` is now, ``cost`` after one thing was then."""
    return "does" if m["verb"] == "costs" else "do" if _plural(m["s"]) else "did"


def _value_is(m: re.Match[str]) -> tuple[str, str]:
    return f"what {m['be']} {{}}{m['tail']}?", m["value"]


def _how_many(m: re.Match[str]) -> tuple[str, str]:
    verb = HAVING.get(m["verb"], m["verb"])
    auxiliary = "does" if m["verb"] in HAVING else "do"
    return f"how many {m['noun']} {auxiliary} {{}} {verb}{m['tail']}?", f"{m['number']} {m['noun']}"


def _rule(pattern: str, ask: Callable[[re.Match[str]], tuple[str, str]]) -> Rule:
    return re.compile(pattern), ask


RULES: tuple[Rule, ...] = (
    _rule(
        rf"{SUBJECT} (?P<verb>costs?) (?P<value>{AMOUNT}){TAIL}(?: (?:and|or|but|extra)\b.*)?",
        lambda m: (f"how much {_tense(m)} {{}} cost{m['tail']}?", m["value"]),
    ),
    _rule(
        rf"{SUBJECT} pays? (?P<value>{AMOUNT}){TAIL}",
        lambda m: (f"how much {'does' if ' pays ' in m[0] else 'do'} {{}} pay{m['tail']}?", m["value"]),
    ),
    _rule(
        rf"{SUBJECT} (?P<be>is|are) (?P<value>{AMOUNT}) (?P<adjective>long|wide|high|deep|tall|old|thick|heavy)(?:,? .*)?",
        lambda m: (f"how {m['adjective']} {m['be']} {{}}?", m["value"]),
    ),
    _rule(rf"(?=The ){SUBJECT} (?P<be>is|are) (?:set at )?(?P<value>{VALUE}){TAIL}(?: and .*)?", _value_is),
    _rule(
        rf"{SUBJECT} (?P<verb>has|have|carries|carry|holds|hold|takes|take|needs|need|serves|serve) "
        rf"(?P<number>{NUMBER}) (?P<noun>(?:(?!(?:on|in|at|of|for|with|and|or|to|from|aft|forward|by|each|per|a|an)\b)[a-z-]+ ?){{1,3}})"
        rf"(?<! ){TAIL}(?: (?:and|but) .*)?",
        _how_many,
    ),
    _rule(rf"(?P<s>{CODE}) means that (?P<value>[^;:]+?)", lambda m: ("what does {} mean?", m["value"].split(", ")[0])),
    _rule(
        rf"(?P<s>{CODE}) is (?P<value>(?:an?|the) [^,;:]+?)(?: (?:and|with|which|that)\b.*)?",
        lambda m: ("what is {}?", m["value"]),
    ),
    _rule(
        r"(?P<s>An? (?:(?!\b(?:is|of|in|on|that|who)\b)[a-z-]+ ?){1,3})(?<! ) is (?P<value>(?:an? |\d+ or more )[^,;:]+?)",
        lambda m: ("what is {}?", m["value"]),
    ),
    _rule(
        rf"{SUBJECT} (?P<verb>{'|'.join(LEMMAS)}) (?P<value>(?:at {CLOCK}|{AMOUNT} (?:before|after) [a-z]+(?: of [a-z]+)?|on {DAYS}))(?: (?:and|at|with) .*)?",
        lambda m: (f"when {_do(m['s'])} {{}} {LEMMAS[m['verb']]}?", m["value"]),
    ),
    _rule(
        rf"{SUBJECT} (?P<be>is|are) {PASSIVE} (?P<value>(?:every|each|once an?|once every|twice an?) (?:{NUMBER} )?(?:{TIME_UNITS}|morning|evening|quarter|spring|{DAYS})(?: at {CLOCK})?)"
        r"(?: (?:by|with|for|and|because) .*)?",
        lambda m: (f"how often {m['be']} {{}} {m['v']}?", m["value"]),
    ),
    _rule(
        rf"{SUBJECT} (?P<be>is|are) {PASSIVE} for (?P<value>(?:at (?:most|least) |up to |no longer than )?{NUMBER} (?:{TIME_UNITS}))(?: (?:and|in|at|then) .*)?",
        lambda m: (f"for how long {m['be']} {{}} {m['v']}?", m["value"]),
    ),
    _rule(
        rf"{SUBJECT} (?P<be>is|are) {PASSIVE} (?P<in>on|with|in) (?P<value>Form [\w-]+)(?: (?:and|by) .*)?",
        lambda m: (f"{m['in']} which form {m['be']} {{}} {m['v']}?", m["value"]),
    ),
    _rule(
        rf"{SUBJECT} (?P<be>must|may|can) (?P<v>[a-z][^,;:]*?) within (?P<value>{NUMBER} (?:{TIME_UNITS})){TAIL}",
        lambda m: (f"within what time {m['be']} {{}} {m['v']}{m['tail']}?", m["value"]),
    ),
)
ANSWERS = re.compile(
    "|".join(
        (
            rf"{DATE}",
            rf"(?:between )?{CLOCK}(?: and {CLOCK})?",
            VALUE,
            rf"(?<!and )(?<!or )(?<!, ){CODE}",
            rf"(?<= on ){DAYS}(?: (?:and|to) {DAYS})?",
            r"(?<= (?:at|by|in|to) the )[A-Z][\w'-]+(?: [A-Z][\w'-]+)+",
            r"(?<= called )(?:the )?[A-Z][\w'-]+(?: [A-Z][\w'-]+)*",
        )
    )
)


def _cloze(body: str, sentence: str, chunk: Chunk) -> Pair | None:
    """The sentence with its value taken out; the last one, which is what such a sentence mostly says."""
    values = [found for found in ANSWERS.finditer(body) if found[0].strip()]
    if not values or len(values) > MOST_VALUES:
        return None
    named_first = [found for found in values if not re.fullmatch(CODE, found[0])] or values
    value = named_first[-1]
    if value.start() == 0 or len(content(body[: value.start()] + body[value.end() :])) < 4:
        return None
    gapped = body[: value.start()] + GAP + body[value.end() :]
    question = f"what belongs in the gap: {gapped}?"
    return Pair(question, value[0].strip(), sentence, chunk, "en", cloze=True)


# -- Vietnamese --------------------------------------------------------------------------------------------------

VI_UNITS = (
    "crown|đồng|phần trăm|%|phút|giây|ngày làm việc|ngày|tuần|tháng|năm|tuổi|người|khách|lượt|chuyến|mét khối|mét|cm|mm|km|kg|"
    "gam|tấn|lít|hải lý một giờ|hải lý|độ|trang|bản|lần|chiếc|cái|nhân viên|giường|chỗ"
)
VI_NUMBER = r"(?<!ười )(?<!ươi )(?:\d[\d.,]*\d|\d|(?<!\w)(?:hai|ba|bốn|năm|sáu|bảy|tám|chín|mười)(?= (?!giờ|tháng)))"
VI_VALUES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(?<!\w)ngày \d{1,2} tháng \d{1,2}(?: năm \d{4})?"), "ngày nào"),
    (re.compile(r"(?<=lúc )\d{1,2} giờ(?: \d{1,2})?"), "mấy giờ"),
    (re.compile(rf"(?<!từ )(?<![\w.,-]){VI_NUMBER} (?P<unit>{VI_UNITS})(?!\w)"), "bao nhiêu {unit}"),
    (re.compile(r"(?<!\w)Mẫu [A-Z]+-?\d+"), "mẫu nào"),
    (re.compile(r"(?<!\w)(?P<unit>quầy|phòng|bến|cửa|cổng|làn) số \d+"), "{unit} số mấy"),
    (re.compile(r"(?<!\w)(?P<unit>tầng|mã|thẻ) (?:[A-Z][\w-]*\d\w*|\d+)"), "{unit} nào"),
    (re.compile(r"(?<!\w)thứ (?:Hai|Ba|Tư|Năm|Sáu|Bảy)(?: và (?:thứ )?(?:Hai|Ba|Tư|Năm|Sáu|Bảy))?"), "thứ mấy"),
)
VI_POINTERS = re.compile(r"(?<!\w)(?:này|đó|ấy|nó|họ|kia|sau mốc|trường hợp đó|văn bản)(?!\w)", re.IGNORECASE)
VI_UNSURE = re.compile(r"(?<!\w)(?:không|chưa|trừ|ngoài ra|vì vậy|nên)(?!\w)", re.IGNORECASE)


def _vietnamese(sentence: str, chunk: Chunk, named: set[str]) -> Pair | None:
    body = SIDE.sub("", sentence).strip().rstrip(".!…").strip()
    clause = body.split("; ")[0]
    if sentence.endswith("?") or len(clause.split()) not in SENTENCE_WORDS:
        return None
    if VI_POINTERS.search(clause) or VI_UNSURE.search(clause):
        return None
    for pattern, asking in VI_VALUES:
        values = list(pattern.finditer(clause))
        if len(values) != 1:
            continue
        (value,) = values
        question = clause[: value.start()] + asking.format(**value.groupdict()) + clause[value.end() :]
        if len(content(question)) < 4:
            continue
        question = question[:1].upper() + question[1:] if value.start() == 0 else lower_first(question, named)
        return Pair(f"{question}?", value[0], sentence, chunk, "vi")
    return None
