"""The places where English allows an adverb: before a verb form, and at the end of a short sentence that has one.

    places("A man holds a toy.")    [6, 17]: before `holds` and at the end

Short word lists, no parser. The rules prefer no place to a bad place. tests/data/edits_*.tsv holds 200 edits per data
set, each judged by a reader. The paper gives no rules: these are ours.
"""

import re
import unicodedata

WORD = r"[^\W_]+(?:'[^\W_]+)*"


def straight(text: str) -> str:
    """The text with a straight apostrophe for each kind, and plain letters for full-width ones (NFKC where that is one
    character). The length does not change.
    """
    if not text.isascii():
        plain = (unicodedata.normalize("NFKC", c) for c in text)
        text = "".join(new if len(new) == 1 else old for old, new in zip(text, plain, strict=True))
    return re.sub("[\u2018\u2019\u02bc\u2032\uff07`\u00b4]", "'", text)


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Straight after one of these, `plays` or `holding` is a noun or an adjective, not a verb.
OPENERS = _set("""a about across after again against all almost along also always am an and another any are aren't
    around as at away back bad be because been before behind being beside best between big black blue both brown but by
    can can't cannot could couldn't did didn't different do does doesn't don't down during each empty enough even ever
    every executive few first five for four from full good great green had hadn't has hasn't have haven't he her here
    herself him himself his how i if in into is isn't it its itself just large last less like little many may me might
    more most much must my myself near never new next no not now of off often old on one only onto or orange other our
    out over own red same she should shouldn't since six small so some sometimes still than that the their them
    themselves then there these they this those though three through to too toward towards two under until up upon us
    usually very was wasn't we well were weren't what when where which while white who whom whose why will with within
    without won't would wouldn't yellow you young your yourself""")
# One of these straight after `plays` shows that it is a verb.
OBJECTS = _set("""a about across after all along an any around as at away back before behind beside by down during
    each every for four from her him his how if in inside into it its many me my near no off on onto our out outside
    over past some that the their them these this those three through to toward towards two under up us what with
    you your""")
BE = _set("is are was were isn't aren't wasn't weren't")
HAVE = _set("has have had hasn't haven't hadn't")
DO = _set("do does did don't doesn't didn't")
MODALS = _set("will can could should would might must won't can't couldn't shouldn't wouldn't")
QUESTION_WORDS = _set("what why how when where who which")
SUBJECTS = _set("i he she we they who")
DETERMINERS = _set("a an the this that these those my your his her its our their")
OFTEN = _set("always usually often also just still ever")
# Base forms that are seldom nouns.
CLEAR = _set("""accept achieve acquire add admire adopt affect afford allow announce anticipate appear apply appreciate
    arrive ask attend avoid become begin believe belong bring build buy carry celebrate choose collaborate collect
    communicate compare compete complete conclude condone confuse consider consist consume contain continue contribute
    convince cook create decide defeat deliver derail describe destroy die dig discover dominate donate earn eat
    eliminate employ enable encourage enhance enjoy enter evaporate exceed exist explain explore feel fill find follow
    forget gather get give go graduate grow happen have hear hide hire identify improve include inspire invent involve
    join keep kill know laugh learn listen live lose make marry meet melt obey observe obtain occupy occur operate
    originate outnumber own participate perform possess pray precede prefer prepare prevent prosper protect prove
    provide qualify receive recognize reduce refer reflect refuse rely remain remember remove represent require resemble
    resist satisfy save say see seem sell send sing sink sit solve speak spend steal submerge succeed suffer survive
    sustain take teach tell think threaten try understand wear withdraw write""")
# Base forms that are often nouns too: after a noun they usually count as verbs only before one of OBJECTS.
NOUNLIKE = _set("""act answer attack bake benefit break brush burn call catch change charge chase clean climb close
    cover cross cry cut dance decline dream drink drive drop dry fall feed fight finish fish fit float fly fund gaze
    glance hang harm hate heal help hit hold hug hunt hurt influence issue jump kick kiss land lay lead lean leap leave
    lie lift look love match measure mix move need nest offer open order pack paint park pass pay pick plan plant play
    pose pour practice print produce pull purchase push put race raise reach read respect rest return ride rise roll run
    sail score serve set shake share shine shoot show skate sleep slide smell smile smoke spread stand stare start stay
    stop study support surf swim swing talk taste throw tie touch travel trust turn use visit vote wait walk want wash
    watch wave win work""")
PAST = _set("""ate became began came drank drove fell flew forgot gave got grew knew ran rode sang sat saw slept spoke
    stole swam taught threw told took went wore wrote""")
PARTICIPLES = _set("""bought broke broken brought built caught done dug eaten fed felt found given gone got heard held
    hid hit kept known lay led left lit lost made met paid put read said seen sent shown sold spent stood taken thought
    thrown told understood won worn written""")
NOT_PAST = _set("""bleed bored colored excited feed gifted hundred indeed naked need sacred scared seed shed sled speed
    tired weed""")
NOT_ING = _set("""according amazing anything being boring building ceiling clothing during evening everything including
    interesting king morning nothing painting regarding something spring string thing wedding wing""")
# With a form in -ing these make a compound ("ice skating", "go fishing"), which no adverb may split.
COMPOUND = _set("apple body bull food go goes going went grocery hula ice rock roller sand ski snow water")
# What may begin the rest of a question after its subject: "Is kale ... better than spinach?".
PREDICATE = _set("""a able an better bigger capable essential familiar important larger less likely more necessary older
    popular safe safer similar smaller the unable unlikely worse""")
PLURAL = _set("people men women children humans fish police mice")
NO_ADVERB_BEFORE = OFTEN | _set("not very too so all both about sometimes never already it he she they i we you there")
NOT_LAST = _set("today now then afterwards afterward later yesterday tomorrow tonight together")


def _third_person(bases: frozenset[str]) -> frozenset[str]:
    """watches, carries, plays: both endings for each verb, since spellings that nobody uses do no harm."""
    return frozenset(form for base in bases for form in (base + "s", re.sub("y$", "i", base) + "es"))


BASE, CLEAR_S, NOUNLIKE_S = CLEAR | NOUNLIKE, _third_person(CLEAR), _third_person(NOUNLIKE)
AUXILIARIES, ACTIONS = BE | HAVE | DO | MODALS, (BASE | PAST | CLEAR_S | NOUNLIKE_S) - HAVE


def insert(text: str, place: int, word: str) -> str:
    """The text with one more word at a place from `places`, and one space. Nothing else changes."""
    gap = f"{word} " if text[place : place + 1].isalnum() else f" {word}"
    return text[:place] + gap + text[place:]


def places(text: str) -> list[int]:
    """Character offsets in `text` where an adverb may go: before a word, or after the last word of a sentence.

    Text that is all in capitals has none.
    """
    ends = [m.end() for m in re.finditer(r"(?<=[a-z\d]{2})[.?!]+(?=\s+[A-Z])", text)]
    bounds = zip([0, *ends], [*ends, len(text)], strict=True)
    return [place for start, end in bounds for place in _sentence(text, start, end)]


def _sentence(text: str, start: int, end: int) -> list[int]:
    """The places in the one sentence text[start:end]."""
    spans = [m.span() for m in re.compile(WORD).finditer(straight(text), start, end)]
    raw = [text[a:b] for a, b in spans]
    w = [straight(word).lower() for word in raw]
    joined = [i > 0 and text[spans[i - 1][1] : spans[i][0]].isspace() for i in range(len(w))]
    adverb = [word.endswith("ly") and word.islower() and word not in BASE for word in raw]
    # noun: may this word end a noun phrase? object_after: may the next word begin its object or complement?
    noun = [not (w[i] in OPENERS or w[i].endswith("ing") or adverb[i]) for i in range(len(w))]
    object_after = [w[i] in OBJECTS or not raw[i][0].islower() for i in range(1, len(w))] + [False]
    # The auxiliary of a question stands before its subject. No adverb goes between them.
    inverted = [i for i in range(len(w)) if w[i] in AUXILIARIES and (not joined[i] or w[i - 1] in QUESTION_WORDS)]
    aux = inverted[0] if inverted and text[start:end].rstrip().endswith("?") else -1
    main = _main(w, noun, object_after, aux) if aux >= 0 else -1
    allowed = [i for i in range(1, len(w)) if joined[i] and raw[i].islower() and not adverb[i]]
    allowed = [i for i in allowed if w[i] not in NO_ADVERB_BEFORE]
    if text[start:end].rstrip().endswith("?"):  # What color is the sky?
        allowed = [i for i in allowed if w[i - 1] not in BE or w[i] not in DETERMINERS]
    fits = [i for i in allowed if i == main or i != aux + 1 and _fits(w, noun, object_after, i)]
    found = [spans[i][0] for i in fits]
    acts = any(w[i] in ACTIONS or w[i].endswith("ing") or _past(w[i]) for i in fits)
    open_question = aux >= 0 and (w[0] in QUESTION_WORDS or w[aux] in BE)
    if acts and not open_question and len(w) <= 10 and not adverb[-1] and w[-1] not in NOT_LAST | OPENERS:
        if not text[spans[-1][1] : end].strip(" .?!"):
            found.append(spans[-1][1])
    return found


def _main(w: list[str], noun: list[bool], object_after: list[bool], aux: int) -> int:
    """Where the predicate of a question begins, after its subject: "Did Ann ... see it?"; -1 if that is unsure."""
    if aux == 1 and w[aux] in MODALS and w[0] in ("what", "who") and w[2:] and w[2] in BASE:
        return 2  # What will ... happen?
    for i in range(aux + 2, len(w)):
        after_noun = noun[i - 1] and w[i - 1] not in BASE and not _past(w[i - 1])
        if w[aux] in BE:
            if w[i] == "to" or w[i] in QUESTION_WORDS:
                return -1
            if after_noun and (w[i] in PREDICATE or _past(w[i]) and object_after[i]):
                return i
        elif after_noun or w[i - 1] in SUBJECTS | OFTEN | {"you", "it"}:
            if w[i] in CLEAR | {"do"} or w[i] in NOUNLIKE and object_after[i]:
                return i
    return -1


def _fits(w: list[str], noun: list[bool], object_after: list[bool], i: int) -> bool:
    """May an adverb go between words i - 1 and i of a statement?"""
    prev, word = w[i - 1], w[i]
    if prev == "to":  # to ... eat
        return word in BASE - {"work", "sleep", "park"}
    if prev in BE | MODALS | DO - {"do", "does", "did"} | {"be", "been", "am"}:  # a man is ... eating
        return i > 1 and w[i - 2] not in ("there", "here", "a", "the", "trash") and word not in AUXILIARIES
    if prev in HAVE:  # they have ... eaten
        return word == "been" or _past(word)
    if prev in SUBJECTS:  # she ... eats
        return word not in OPENERS or word in HAVE
    if word.endswith("ing") and word not in NOT_ING:  # a man ... eating an apple
        phrase = noun[i - 1] and prev not in COMPOUND and not prev.endswith("'s")
        return prev in ("while", "by", "without") or phrase and object_after[i]
    if not noun[i - 1] and prev not in OFTEN:
        return False
    plural = prev in PLURAL or prev.endswith("s") and not prev.endswith(("ss", "us", "is", "'s"))
    if word in BASE and plural:  # people ... eat
        return word in CLEAR or object_after[i] or i == 1
    if word in NOUNLIKE_S and not plural or _past(word):  # a man ... plays in a park
        return object_after[i]
    return word in CLEAR_S | PAST | HAVE  # a man ... eats


def _past(word: str) -> bool:
    return word in PARTICIPLES or word.endswith("ed") and len(word) > 3 and word not in NOT_PAST
