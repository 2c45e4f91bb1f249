"""Which ways of reasoning a rationale shows: a reader's aid, not a reward.

Four behaviours, each found sentence by sentence by patterns on the words (English only):

* ``decomposition``: the task is split into named parts, steps, cases or sub-goals;
* ``verification``: a result that is already there is checked;
* ``backtracking``: an error is noticed, or an approach is left for another;
* ``backward_chaining``: from what is wanted to what is needed for it.

The definitions, the labelled sentences and the measured precision and recall are in ``docs/behaviors.md``.
The four are close to those of Gandhi et al., Cognitive Behaviors that Enable Self-Improving Reasoners
(arXiv 2503.01307).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

BEHAVIORS: tuple[str, ...] = ("decomposition", "verification", "backtracking", "backward_chaining")


@dataclass(frozen=True, slots=True)
class Span:
    """A sentence that shows a behaviour: ``text[start:end]``. Spans of several behaviours may coincide."""

    start: int
    end: int
    behaviour: str


def detect(sentence: str) -> frozenset[str]:
    """The behaviours that one sentence shows; see ``sentences`` for what a sentence is.

    >>> sorted(detect("Wait, that is wrong."))
    ['backtracking']
    """
    plain = _plain(sentence)
    return frozenset(name for name, pattern in _COMPILED.items() if pattern.search(plain))


def spans(text: str) -> tuple[Span, ...]:
    """Every sentence of ``text`` that shows a behaviour, once a behaviour, in reading order."""
    return tuple(
        Span(start, end, name)
        for start, end in _bounds(text)
        if (found := detect(text[start:end]))
        for name in BEHAVIORS
        if name in found
    )


def behavior_counts(text: str) -> dict[str, int]:
    """How many sentences of one rationale show each behaviour; every behaviour has an entry."""
    found = [span.behaviour for span in spans(text)]
    return {name: found.count(name) for name in BEHAVIORS}


def behavior_rates(texts: Sequence[str]) -> dict[str, float]:
    """The share of rationales, in [0, 1], that show each behaviour at least once; 0 for no rationales."""
    counts = [behavior_counts(text) for text in texts]
    return {name: sum(c[name] > 0 for c in counts) / max(1, len(counts)) for name in BEHAVIORS}


# --- sentences ------------------------------------------------------------------------------------

#: Where text may end a sentence, and the openings of blocks whose inside is never cut.
_CUT = re.compile(
    r"(?P<open>\\\[|\$\$|\[asy\]|\\begin\{(?P<env>[a-z]{1,20}\*?)\})"
    r"|(?P<newline>[\r\n\v\f\x85\u2028\u2029])"
    r"|(?P<wide>[。！？])"
    r"|(?P<mark>(?<![.!?…])[.!?…]++(?:[\"'”’)*$]|\\\))*+)(?=\s|\\\[|\Z)"
)
_CLOSE = {"\\[": "\\]", "$$": "$$", "[asy]": "[/asy]"}
_LONGEST_BLOCK = 2000
#: What follows in a longer sentence is noise and is not looked at.
_LONGEST_SENTENCE = 4000
#: What a full stop belongs to without ending the sentence. Read backwards from the stop.
_ABBREVIATION = re.compile(
    r"\b(?:mrs?|ms|dr|st|prof|jr|vs|no|nos|fig|eq|approx|cf|resp|sq|ft|oz|lbs?|hrs?|mins?|secs?|e\.g|i\.e)$",
    re.IGNORECASE,
)
_DOTTED = re.compile(r"(?:\b[a-z](?:\.[a-z])+|\betc)$", re.IGNORECASE)
#: The number of a list item: "2." or "Step 2." or "(b)." and nothing before it.
_ITEM = re.compile(
    r"[\s*#_>(-]*(?:(?:step|case|part|method)\s+)?(?:\d{1,3}|[a-z]|[ivx]{1,4})\Z", re.IGNORECASE
)
#: A formula runs on after a factorial or an abbreviation.
_RUNS_ON = re.compile(r"\s*(?:[=+/<>,;:)\]}^|-]|\*(?!\*)|\\(?:times|cdot|div|le|ge|ne|equiv)\b)")
_LOWER = re.compile(r"\s*[a-z]")


def sentences(text: str) -> list[str]:
    """``text`` cut into sentences, blanks around each left out; nothing else is lost.

    A line break ends one. Decimals, abbreviations, list numbers, factorials, display formulas and marks
    such as ``<<1+1=2>>`` do not. Any text is accepted, lone surrogates and NUL included; the time is linear
    in its length.
    """
    return [text[start:end] for start, end in _bounds(text)]


def _bounds(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each sentence, blanks around it left out."""
    start = 0
    for end in _ends(text):
        piece = text[start:end]
        if stripped := piece.strip():
            first = start + piece.index(stripped[0])
            yield first, first + len(stripped)
        start = end


def _ends(text: str) -> Iterator[int]:
    start = position = 0
    while match := _CUT.search(text, position):
        position = match.end()
        if match["open"]:
            close = _CLOSE.get(match["open"]) or f"\\end{{{match['env']}}}"
            found = text.find(close, position, position + _LONGEST_BLOCK)
            if found < 0:
                continue
            stop, position = text[position:found].rstrip()[-1:], found + len(close)
            ends = stop in (".", "!", "?") and not _LOWER.match(text, position)
        else:
            ends = not match["mark"] or _ends_sentence(text, start, match)
        if ends:
            yield position
            start = position
    yield len(text)


def _ends_sentence(text: str, start: int, match: re.Match[str]) -> bool:
    """Whether a full stop, question or exclamation mark ends the sentence that began at ``start``."""
    mark, stop = match["mark"], match.start()
    before = text[max(start, stop - 24) : stop]
    if _RUNS_ON.match(text, match.end()):
        return False
    if mark[0] in "!?":
        return True
    if mark.startswith(("..", "…")) or _DOTTED.search(before):
        return not _LOWER.match(text, match.end())
    if _ABBREVIATION.search(before):
        return False
    return stop - start > 24 or not _ITEM.match(before)


# --- patterns -------------------------------------------------------------------------------------
#
# They are matched against a sentence in lower case in which formulas are "@", markup is gone and look-alikes
# are erased. Gaps are bounded and no repetition holds another unbounded one: the time is linear in the text.

_FORMULA = re.compile(
    r"\$\$[^$]*\$\$"
    r"|\$(?!\s)[^$]*(?<!\s)\$(?!\d)"  # a dollar sign of an amount has a blank on the wrong side
    r"|\\\((?:[^\\]|\\(?![()]))*\\\)"
    r"|\\\[(?:[^\\]|\\(?![\[\]]))*\\\]"
    r"|\\begin\{\w+\*?\}(?:[^\\]|\\(?!begin\b|end\b))*\\end\{\w+\*?\}"
)
_MARKUP = re.compile(r"<<[^<>\n]{0,200}>>|[*_#`\s]+")
_QUOTES = str.maketrans("’‘“”", "''\"\"")

#: Words of the patterns below that have another meaning in a story; they are erased first.
_LOOK_ALIKES = re.compile(
    # A person called Wait or Check.
    r"\b(?:mr|mrs|ms|miss|dr)\.? \w+"
    # A check as a cheque, a bill, a mark, a pattern; not "as a check" or "a quick check".
    r"|(?<!\bas )\b(?:a|the|each|every|his|her|their|\$?\d+(?:[.,]\d+)*) (?:\$\d[\d.,]* |dinner |rent "
    r"|pay )?checks?\b(?! that\b)"
    r"|\bcheck-?ups?\b|\bchecked (?:in|out)\b"
    r"|\bcheck(?:s|ing)? (?:in|out)\b(?= (?:\d|at|of|from|a\b|an\b|the\b|some|more|book|line|by))"
    # A prompt that is repeated, and the habit of saying so.
    r"|\bplease\b.*"
    r"|\b(?:let's|let us) (?:think|reason|solve (?:this|it)) step[- ]by[- ]step"
    # An instruction to a person of the story.
    r"|\byou (?:may|must|can) (?:check|verify) your\b"
)


def _plain(sentence: str) -> str:
    """The sentence as the patterns want it."""
    text = _FORMULA.sub(" @ ", sentence[:_LONGEST_SENTENCE].translate(_QUOTES))
    text = _MARKUP.sub(" ", text).strip().lower()
    return _LOOK_ALIKES.sub("", text)


#: Written {name} in the patterns.
_WORDS: Mapping[str, str] = {
    # The beginning of a sentence: its list number and the small words before the point.
    "start": r"^(?:\(?\d{1,2}[.)])?[^\w@✓]{0,4}"
    r"(?:(?:so|and|now|but|ok|okay|well|then|also|just|hmm+|oh|ah|thus|hence|therefore|however|alright"
    r"|right|yes)\b"
    r"[,.:!… -]{1,4}){0,3}",
    # The one who reasons, and the auxiliary verbs up to the verb proper.
    "we": r"\b(?:let's|lets|let us|let me|(?:we|i|one)(?:'ll|'d|'ve)?)"
    r"(?: (?:will|can|could|should|would|may|might|must|need to|needs to|have to|has to|want to|also|now"
    r"|then|just|"
    r"easily|quickly|first|still|only|next|try to|like to|going to)){0,4}",
    # To name a quantity as a goal: "add" and "divide" carry out a step, these announce one.
    "find": r"(?:find|determine|calculate|compute|figure out|work out|solve|count|evaluate|identify"
    r"|establish)",
    "finding": r"(?:finding|determining|calculating|computing|figuring out|working out|solving|counting"
    r"|evaluating)",
    "ordinal": r"(?:first|second|third|fourth|next|last|other|remaining|final)",
    "many": r"(?:two|three|four|five|several|\d|different|smaller|separate|the following)",
    # An answer or an intermediate result.
    "result": r"(?:answers?|results?|solutions?|totals?|sums?|values?|counts?|numbers?|work|working|math"
    r"|arithmetic|"
    r"calculations?|computations?|division|multiplication|addition|subtraction|formulas?|units|equations?"
    r"|roots?|steps)",
    # What a check ends with.
    "fits": r"(?:holds?\b|works\b|checks out|true\b|is (?:right|correct|valid|consistent)|satisf|match"
    r"|agrees?\b|confirm|"
    r"as (?:required|expected|desired|needed)|✓|✔|good\b|instead of|not equal|≠|sides (?:differ|agree"
    r"|are equal))",
    # "if this works", "whether my answer is right".
    "held": r"(?:(?:this|that|it|these|they|@|(?:my|our|the) {result}) (?:really |indeed |also )?(?:{fits}"
    r"|fits?|makes?|adds?|is reasonable|"
    r"are (?:right|correct|valid|consistent)|work|hold|agree)|my\b|our\b)",
    "way": r"(?:approach|way|method|strategy|route|idea|angle|technique|path)",
    "needs": r"(?:must|needs?|has to|have to|should|required?s?)",
}

_PATTERNS: Mapping[str, tuple[str, ...]] = {
    "decomposition": (
        # A heading of a step, part or case: "Step 2: ...", "Case 1.", "Step 1 is to". Not "part A costs $3".
        r"^[^\w@]{0,3}(?:\d{1,2}[.)] )?(?:step|part|stage|phase|case|subcase|task|sub-?(?:problem|goal"
        r"|task|question))"
        r" ?(?:\d{1,2}|[a-f]|[ivx]{1,4}|one|two|three|four)\b ?(?:[:.)(–—-]|$|is to\b|,)",
        # An item of a list that tells what to do: "2. Find the speed". Not "2. She has 5 eggs".
        r"^[^\w@]{0,3}(?:\d{1,2}|[a-h]|[ivx]{1,3})[.)] (?:(?:first|next|then|finally|now),? )?(?:{find}"
        r"|add|subtract|multiply|"
        r"divide|simplify|isolate|set up|convert|choose|substitute|express|write|use|apply|expand|factor"
        r"|combine|list|get|check)\b",
        # An item of a numbered list that is a title.
        r"^[^\w@]{0,3}\d{1,2}[.)] [a-z][^.:,=@]{3,60}:",
        # A list inside the sentence.
        r": ?\(?(?:a|1|i)\) [^;]{1,100}\(?(?:b|2|ii)\) ",
        # Breaking up the task; "she breaks the chocolate into 8 pieces" has another subject.
        r"(?:{start}|{we} |, )(?:break|split|divide|separate|cut|partition"
        r"|organi[sz]e)(?:ing)?\b(?! (?:both|each|by|the \w+ (?:time|amount) into))[^.;]{1,80}?"
        r"(?:\binto\b|\bdown\b|\bup\b|\bfrom\b|\bby\b (?:case|part|step)|\bin (?:two|three|four|\d)\b"
        r"|\bto (?:two|three|four|\d)\b)",
        r"(?:{start}|{we} )decompos(?:e|ing)\b|\bbreak(?:ing)? (?:it|this|that|things|the problem"
        r"|the question) (?:down|up|into)\b",
        r"\b(?:problem|question|task|calculation|computation|proof|solution|answer|integral|sum|count"
        r"|total|cost)s?"
        r" (?:naturally )?(?:has|have|breaks?(?: down)?(?: into)?|splits?(?: into)?|falls? into|consists? of|"
        r"can be \w+ (?:up |down )?(?:into|in|as)) {many}\b",
        # Parts taken one at a time.
        r"{we} (?:handle|treat|consider|deal with|tackle|do|take|look at|compute|calculate|count|solve"
        r"|work on|find|approach)\b"
        r"[^.;]{0,80}(?:separately|individually|independently|on (?:its|their) own|one (?:\w+ )?at a time"
        r"|one by one|"
        r"case by case|piece by piece|in (?:{many} )?(?:steps|stages|parts|phases)\b)",
        r"{we} (?:consider|treat|handle) separately",
        r"{we} (?:handle|treat|consider|deal with|tackle|do|take|look at|count|start with"
        r"|begin with) [^.;]{1,60}(?: first\b|, then\b|one after the other)",
        r"{we} (?:start|begin) with the\b|{we} (?:think of|view|see|write) [^.;]{1,60} as (?:two|three"
        r"|four|several|\d) ",
        r"\b(?:total|cost|sum|area|problem|answer) can be (?:split|broken|divided|separated)\b",
        r"{we} (?:need|find|get|compute|calculate) [^.;]{1,40} first (?:and|, then)|\b(?:first"
        r"|next) up\b(?: is|:|,)",
        r"(?:{we}|\bi'll) (?:handle|treat|consider|deal with|go|work|proceed"
        r"|take)\b[^.;]{0,80}(?:differently|\b(\w+) by \1\b|in turn)",
        r"\b(?:problem|question|argument|proof|solution|task)\b[^.;]{0,20} (?:has|asks for|needs"
        r"|involves) (?:two|three|four|several) \w+",
        r"{we} (?:split|divide|cut|separate) [^.;]{1,40} (?:along|according to|at)\b"
        r"|^either\b[^.]{1,80}\bwe (?:look at|consider|treat)\b",
        r"{we} (?:calculate|compute|find|handle|count) each\b[^.;]{0,60}(?:one after the other|in turn)",
        r"\bby first {finding}\b|\bintermediate (?:targets?|goals?|results?|steps?|quantit\w+)\b",
        r"\beach of the (?:\w+ )?(?:parts|pieces|cases|stages|legs|subproblems)\b",
        # Cases, with somebody who distinguishes them; not "cases of soda" or "in this case".
        r"\bthere are (?:only )?(?:two|three|four|five|several|\d) (?:\w+ )?(?:cases|scenarios|components?"
        r"|sub\w+)\b(?! of\b)",
        r"\b(?:consider|distinguish|have|treat|handle|examine|analy[sz]e|by) (?:the )?(?:following |two "
        r"|three |four |several |\d )?"
        r"(?:\w+ )?(?:cases|scenarios|possibilities)\b(?! of\b)",
        r"\bcase-?work\b|\bcase analysis\b|\bsub-?(?:problem|goal|task|question)s?\b",
        r"\b(?:consider|take|look at|treat|examine|handle) the (?:\w+ )?case\b",
        r"{start}in the {ordinal} case,",
        r"{start}for the {ordinal} (?:part|half)\b[^.;]{0,40}, {we}|{start}for the {ordinal} part\b"
        r"|\b(?:to|with|at|on) the {ordinal} (?:part|piece|sub)\b(?= ?[:,.]|$| of the (?:problem|question"
        r"|solution))",
        # A sub-goal with its place in the order: "First find how many", "Next, we need to figure out".
        r"{start}(?:first(?:ly| of all| off)?|second(?:ly)?|third(?:ly)?|as a first step"
        r"|before anything else|to (?:start|begin)(?: with)?),? (?:{we} |need to )?(?:{find}|know"
        r"|what(?:'s| is))\b",
        # "Then we find x = 3" and "then we find that" tell a result.
        r"(?:{start}|^|; )(?:next|then|after that|finally|lastly),? (?:{we} "
        r"|need to )?{find}\b(?! (?:that\b|@|\w{1,2} ?=|\w+ is\b))",
        r"{start}(?:first|next),? (?:{we} )?(?:look at|consider|take|handle|treat|assume"
        r"|suppose) the (?:\w+ )?case",
        r"\b(?:suppose|assume|consider) first\b",
        # "we first need the speed", "I will first compute": not "the first number", "he first walked".
        r"{we} first (?:need|{find})|{we} {find} first\b|\b(?:need|want|have to (?:get|know|find)) first\b|"
        r"\b(?:must|should|we|i) first (?:need|perform|know|find)\b",
        r"{we}(?: \w+){0,2} first,? (?:the|his|her) |: first\b",
        r"\bthe (?:first|next) (?:thing|step|task|goal|quantity) (?:is|to (?:find|do|know|compute)"
        r"|will be)\b",
        r"(?:{we} |{start})(?:start|begin)(?:ing)? (?:by|with) {finding}",
        r"{start}(?:start|begin) (?:by|with)\b[^.;]{1,80}\b(?:then|after that)\b",
        # Two sub-goals in a row: "once we have the radius, we can compute".
        r"{we}(?: first)?,? \w+\b[^.;]{1,120}\b(?:and|,) then (?:{find}|use|add|subtract|multiply|divide"
        r"|remove|combine)\b",
        r"{we} (?:{find}|get|take)\b[^.;]{1,80}(?:, (?:and )?then|and after that)\b",
        r"{start}(?:once|after) (?:{we} (?:have|know|find|get|{find})|{finding})\b[^.;]{1,80}, {we} {find}\b",
        # A plan in words.
        r"{start}(?:(?:my|the|our|here is the|here's the) )?(?:plan|strategy|outline|roadmap)(?: (?:is"
        r"|will be))? ?(?::|to\b)",
        r"\b(?:follow|use|take) (?:these|the following|two|three|four|several) steps\b|\bin (?:two|three"
        r"|several|\d) (?:steps|stages|parts|phases)\b",
        r"\b(?:two|three|four|several|\d) (?:things|quantities|unknowns|pieces of information)\b(?=[:.]"
        r"| (?:\w+ )?(?:to |i |we |needed)|$)",
    ),
    "verification": (
        # A check that is announced. "check" alone is a search as often ("we check the primes"), so it needs
        # something that is there already.
        r"{we}(?: go back to)? ?(?:double|triple|cross|sanity|re)[ -]?check",
        r"(?:{we}|\byou can|\beasy to|\beasily|\bcan be|\bneed(?:s)? to|\bworth) (?:quickly |easily "
        r"|also )?check(?:ed|ing)?"
        r"(?: ?[:,.]| (?:that\b|this\b|these\b|it\b|them\b|my\b|our\b|both\b|again|with\b|by\b"
        r"|the {result}|back|against|in the original|"
        r"the original|(?:if|whether) {held}|$)|$)",
        r"(?:{we}|\byou can|\beasy to|\bcan be|\beasily) (?:quickly |easily |also )?(?:verif(?:y|ied)"
        r"|confirm(?:ed)?|validate)\b",
        r"{start}(?:to |let's |for |as |proof )?(?:double[- ]?check|cross-check|sanity[- ]?check|re-?check"
        r"|verify|verification|confirm|check|"
        r"validat|verif)(?:ing|e|y)?(?: ?[:,]| (?:this\b|our\b|my\b|the {result}|with\b|back\b|against\b"
        r"|the original))",
        r"\b(?:verify|check) ?:? ?[\d@(][\d@(). ]{0,20}[-+*/x×=]",
        r"\bas a (?:\w+ )?check\b|\b(?:sanity|quick|final|consistency)[- ]check",
        r"\bto be (?:sure|safe|certain)\b|{we} (?:count|add|calculate|compute)(?: \w+){0,2} again\b"
        r"|\b(?:left|right)[- ]hand side\b[^.;]{0,60}\bsame as\b",
        r"\bmake sure (?:i|we|that (?:this|it|the {result})|this|it|my|our|the {result})\b",
        r"\bsee (?:if|whether) {held}",
        # A found value is put in, and the sentence says how it came out. Without that it is an ordinary step.
        r"\b(?:plug|substitut|put|insert)\w*\b[^;]{1,150}?(?:\b{fits}|[✓✔≠])",
        r"\b(?:plug|substitut|put|insert)\w*\b[^;]{1,60}? back (?:in|into|to) (?:the |both "
        r"|our )?(?:original|given) (?:equation|problem|condition|inequalit|question|system|statement)",
        r"\b(?:testing|test) (?:with|@|this|that|our|my|the {result}|it)\b",
        r"[✓✔]",
        r"\b(?:this|that|which|equations?|values?) (?:also |indeed )?(?:confirms?|verif(?:y|ies)) (?:that"
        r"|the|this|our|my|it)\b",
        # Judging a result.
        r"\bmakes? sense\b|\border of magnitude\b|\bas an? \w+ (?:should|must)\b|\ball (?:two |three "
        r"|four |the conditions )?hold\b",
        r"{we} check the (?:edge|special|boundary|extreme|base) case|\bworth checking\b|\b(?:confirms"
        r"|verifies) (?:it|this|that)\b|"
        r"\bgoing back to the (?:statement|question|problem)\b[^.;]{1,60}\b(?:do|does|is|are|matches"
        r"|holds?)\b",
        r"\b(?:gives|is|equals|get)\b[^.;]{1,20}, (?:exactly|just|precisely) (?:the|what|as)\b"
        r"|\bsee the same\b|\bcompar(?:ing|e) (?:this |it )?(?:with|to) the (?:first|other|previous"
        r"|original)\b",
        r"\b(?:my|our) (?:\w+ )?(?:guess|answer|result|solution|claim|assumption|work|value"
        r"|reasoning) (?:is|was) (?:indeed )?(?:right|correct|valid|true|fine)\b",
        r"\b(?:{result}|dimensions|this|that|it|which)(?: of \S+| set)? (?:is|was|are|were|seems?|looks?"
        r"|sounds?|appears?)(?: quite| very| to be| all| indeed)? "
        r"(?:reasonable|plausible|sensible|consistent|verified|confirmed|valid\b|(?:right|correct|fine"
        r"|good)(?=[.!,]|$))",
        r"{start}(?:looks|seems|sounds|correct|(?:that's|this is|that is)) ?(?:right|good|correct"
        r"|reasonable|fine)\b(?! (?:angle|triangle|number|answer))",
        r"\b(?:conditions?|constraints?|requirements?|equations?)\b[^.;,]{0,30} (?:is|are) (?:indeed |all "
        r"|both |now )?"
        r"(?:met|satisfied|fulfilled|verified)(?=[.!,;]|$)",
        r"{start}(?:does|do|is|are)\b[^?]{1,60}\b(?:fits?|satisfy|works?|match|hold|add up|make sense"
        r"|equal|give|correct|right|"
        r"reasonable|plausible|consistent)\b[^?]{0,40}\?",
        r"(?:^|, |; |\band |\bso |\bwhich )(?:this |that |it |which )?(?:also |exactly )?(?:matches"
        r"|agrees with|is consistent with|fits|equals) "
        r"(?:the (?!number of)|what|our|with|all|both)",
        r"\bwhich (?:holds|is (?:true|correct|right)|checks out|works|matches|agrees)\b",
        r"\b(?:checks? out|adds? up correctly|it (?:all )?adds up|passes the test|work(?:s)? out (?:too|as"
        r"|correctly|fine))\b|\bchecks[.!]?$",
        r"\bas (?:we )?(?:required|expected|desired|given|stated|claimed|wanted|it should)(?: be)?\b[.!,)]",
        r"\b(?:is|was) (?:exactly |just )?what (?:we|i|the (?:problem|question)|was"
        r"|is)\b[^.;]{0,20}\b(?:expected|given|wanted|said|says|states|stated|required|started|needed)\b",
        r"[=@\d] ?[,.] (?:which is )?(?:true|right|correct|yes|ok|good|works)\b[.!]?$"
        r"|{start}(?:so )?yes, \S+ is (?:right|correct)\b",
        r"\b(?:same (?:answer|result|value|total|number|thing|@|\d)|again, so)\b[^.;]{0,20}$|\b(?:got|get"
        r"|gives) \S{1,20} again\b",
        r"\b(?:go|going|went|run) (?:through|over) (?:the|my|this|our) \w+ (?:again|once more)\b",
        # Found values against the conditions; "the values that satisfy" describes them, it tests nothing.
        r"(?<!that )(?<!which )(?<!must )(?<!to )\bsatisf(?:y|ies) (?:both|all|the (?:original|given"
        r"|required|other)|our|these)\b",
        r"\bthese (?:values|numbers|solutions|pairs) (?:do |all |indeed )?(?:satisfy|work)\b",
        r"\b(?:does|do) (?:indeed |really |in fact )?(?:solve|satisfy|equal|make|add up|sum)\b",
        r"\b(?:{result}|this|it|latter|which) (?:does not|doesn't|do not|don't|fails to) (?:satisfy|match"
        r"|agree|fit|equal)\b",
        r"(?:@|\d|\b(?:{result}|it|this|both|these|function))\)? (?:indeed )?works?\b(?=,? (?:since"
        r"|because|so)\b|[.,:!]|$)",
        r"\b(?:is|are|be) extraneous\b|\bextraneous (?:solution|root)s?\b",
        r"(?:^|\band |@,? |\d,? )indeed\b(?!,? (?:construct|let|suppose|consider|if|you)\b)",
        r"\bindeed (?:@|\d|equal|less|more|greater|smaller|correct|right|true|satisf)",
        # What came out is not what should have.
        r"\bbut (?:it|this|that|we|the \w+) (?:should|was supposed to) (?:be|have)\b",
    ),
    "backtracking": (
        # "Wait" as a call, not as an event or a command; with a mere check after it, it turns nothing back.
        r"(?:^[^\w@]{0,3}|[.!?,;:…-] ?|\b(?:hmm+|oh|no|but|actually|ah|so|ok|hm) )wait\b"
        r"(?! ?(?:\d|for\b|until\b|till\b|times?\b|a (?!minute|second|moment|sec\b)|an\b|at\b|in\b"
        r"|another\b))"
        r"(?!,? let (?:me|us) (?:double|check|verify|confirm|make sure))",
        r"(?:{start}|[,;.] )(?:hold|hang) on\b(?! to\b)",
        # Own errors: the one who reasons made them. not "he made 3 mistakes", "we counted twice, so halve".
        r"\b(?:i|we)(?:'ve)? (?:\w+ ){0,4}?(?:mistake|error|slip|something wrong)s?\b"
        r"|\bmy (?:\w+ )?(?:mistake|error|bad)\b",
        r"\b(?:there's|there is|there was|there must be|found|spotted) (?:an|a|my|the"
        r"|some) (?:\w+ )?(?:mistake|error)\b(?! (?:of|margin))",
        r"\b(?:i|we)(?:'ve)? (?:(?:must have|have|had|just|also|previously|accidentally|actually"
        r"|think i) ){0,3}"
        r"(?:forgot|forgotten|overlooked|mis(?:read|understood|counted|calculated|took|interpreted|applied"
        r"|sed)|mixed up|swapped|"
        r"slipped|messed up|missed|confused|neglected|double-counted|left (?:it|that|this) out)\b",
        r"\bi (?:\w+ )?counted\b[^.;]{0,40}\btwice\b|\b(?:we|i) haven't (?:accounted|considered|included"
        r"|counted|used|taken)",
        r"\b(?:i|we) (?:was|were|am|are) wrong\b|\bi (?:shouldn't|should(?: not)?) have\b"
        r"|\bwe (?:shouldn't|should(?: not)?) have \w+(?:ed|en|t)\b|"
        r"\b(?:i|we) (?:used|took|had|have) the wrong\b|\b(?:i|we) got (?:this|that|it) wrong\b",
        r"{start}(?:that was a mistake|no[.!]?$|oops|whoops|sorry|correction|apologies)\b|{start}oh,? no\b",
        r"\bsomething (?:went|is|must be|must have gone|has gone)(?: \w+)? (?:wrong|off)\b",
        r"\b(?:my|our|this|the|that) (?:[\w-]+ ){0,2}(?:answer|result|solution|equation|assumption|guess"
        r"|calculation|formula|idea|reasoning|"
        r"approach|claim|count|total)\b[^.;,]{0,40}\b(?:is|was|must be|must have been|are|were"
        r"|turns out to be|turned out to be|proves) "
        r"(?:wrong|incorrect|flawed|off|false)\b",
        # The result is called wrong. "which is impossible, so k is not 0" is an argument.
        r"\b(?:this|that|it)(?:'s|s| is| was)? (?:\w+ )?(?:wrong|incorrect)\b(?! (?:answer|number"
        r"|turn))(?<!got it wrong)",
        r"\b(?:this|that|it)(?:'s| is| was|s)? (?:not|isn't) (?:\w+ )?(?:right|correct|what)\b(?! (?:angle"
        r"|triangle))",
        r"\b(?:this|that|it) (?:isn't|wasn't|doesn't (?:look|seem)|does not (?:look|seem)|can't be"
        r"|cannot be|can not be|couldn't be) "
        r"(?:right|correct|true)\b",
        r"\b(?:however|but),? (?:this|that|it) (?:can't|cannot|can not) be\b",
        r"(?:{start}|hmm,? )not quite\b",
        r"\bshould (?:be|have been) [^.;,]{1,30}(?:, not\b| instead\b| rather than)"
        r"|\d[^.;,]{0,20}, not \$?\d",
        r"\b(?:scratch|strike|forget|ignore|undo|discard) (?:that|this|it)\b|\bnever ?mind\b"
        r"|\bon second thou?ghts?\b",
        r"\b(?:abandon|give up on) (?:this|that|the|my|our|it)\b|\b(?:drop|ditch|discard) (?:this|that|my"
        r"|our|the) (?:\w+ )?(?:{way}|attempt)\b",
        r"{start}no[,.!:]? (?:that|thats|this|wait|it|i|not)\b",
        # "actually" that corrects, not the filler.
        r"^hmm+,? (?:but\b|no\b)|{start}actually[, ]{1,2}(?:no\b|hmm|wait|scratch|that's|that is|this is"
        r"|it's|(?:i|we) (?:need|should|have|forgot|must|can't|cannot|think))",
        # Going back or over it again.
        r"{we} start(?:ing)? (?:all )?(?:over|again|anew)\b|\bfrom scratch\b",
        r"{start}going back\b(?! to the (?:statement|question|problem)\b[^.;]{1,60}\b(?:do|does|is|are"
        r"|matches|holds?)\b)|"
        r"\bi take (?:that|it) back\b|{start}new (?:plan|approach|idea|attempt)\b|"
        r"{we} (?:throw|put|set|leave) (?:that|this|it) (?:away|out|aside)\b|\banother (?:angle|way"
        r"|look)\b(?= ?[.!:,]|$)|"
        r"^hmm+,? maybe not\b|\bdon't think (?:that|this|it)(?:'s| is) (?:right|correct|true|possible)\b|"
        r"^(?:hmm+,? |but |no,? |wait,? )?(?:this|that) (?:can't|cannot) (?:be|work|happen)\b|^(?:ugh|argh"
        r"|hmph|damn|dang)\b|"
        r"{we} (?:go|step) back(?:[.!,]|$| (?:and|to (?:the )?(?:start|beginning|original|where|my|our"
        r"|(?:\w+ )?(?:step|problem|equation|question))))",
        r"{we} (?:back up|backtrack|revisit|rethink|reconsider|re-?read|re-?examine|re-?evaluate|re-?do"
        r"|re-?calculate|restart|retry|revise|"
        r"(?:fix|correct) (?:this|that|it|my)|think (?:about (?:it|this|that) )?(?:again|differently))\b"
        r"(?!.{0,60}\bto be (?:sure|safe))(?<!safe i will redo)",
        # Another attempt.
        r"(?:{start}|{we} |\b(?:so|must|should|to) )(?:try|use|take|need|think of|switch to"
        r"|move (?:on )?to|consider|find|look for) "
        r"(?:a |an |some )?(?:different|another|other|better|easier|alternative) {way}",
        r"{we} try (?:again|(?:that|this|it) again|something (?:else|different|new)|some other)\b"
        r"|{we} (?:move on|switch|turn|return) to (?:@|the other|another)",
        r"\b(?:we|i) (?:switch|move on) to\b|\b(?:perhaps|maybe)\b[^.;]{0,40}\b(?:better|different|another"
        r"|easier) {way}|\b(?:perhaps|maybe) (?:we|i) should\b",
        r"\b(?:let's|let us|let me)\b[^.;]{1,80}\binstead\b",
        r"(?:{start}|\bso |\bbut )instead(?: of (?:that|this))?,? (?:let|we|i|note|notice|observe|use"
        r"|consider|try)\b",
        # An approach that failed: it has to be left in the same sentence, or be called hopeless.
        r"\b(?:(?:doesn't|does not|didn't|did not|won't) (?:\w+ (?:to )?)?(?:work|help|lead|fit|apply"
        r"|resemble|simplify|factor|give)|"
        r"failed|fails|impossible|negative|absurd)\b[^.;]{0,40}[,;] ?(?:so |and )?(?:let's|let me|let us"
        r"|(?:we|i) (?:try|go|need|should|must)|try)\b",
        r"(?:{start}|[,;] |\b(?:but|and) |\b(?:approach|method|idea|guess|attempt|way"
        r"|substitution) )(?:this|that|it|which)?(?: {way})? ?"
        r"(?:doesn't|does not|didn't|did not|won't|will not|isn't|is not)(?: (?:going to|\w+))? (?:work"
        r"|working|help|helping|lead anywhere)\b",
        r"\b(?:this|that|it|attempt|{way}) (?:has )?fail(?:s|ed)\b",
        r"\b(?:leads? nowhere|(?:not|n't) lead anywhere|dead end|go(?:es|ing) nowhere|(?:gets?"
        r"|getting) (?:too |very |quite )?(?:messy|complicated|ugly)|got stuck)\b",
        r"\b(?:we|one|i) (?:could|might|may)\b[^.;]{0,80}\b(?:try|continue|keep)\w*\b[^;]{0,80}\bbut\b",
        r"\b(?:you|one) (?:might|may) think\b[^;]{0,120}\bbut\b",
        r"\b(?:too (?:big|large|small|low|high|many|few)|outside the range)\b[^.;]{0,10}, (?:so|but) (?:we"
        r"|let|i|try|@)",
    ),
    "backward_chaining": (
        # Named as such; not "drove back" or "the reverse side".
        r"\bwork(?:s|ed|ing)?(?: \w+)? (?:backwards?\b|in reverse\b|back(?:,| from\b| to\b))"
        r"|\bbacktracking from\b|\bthink\w* (?:in reverse|backwards?)\b",
        r"\b(?:revers(?:e|ing)|undo(?:ing)?) (?:the|each|every|all)\b(?! (?:side|gear|direction|car))"
        r"|\bin reverse order\b",
        r"\bstart(?:ing)? (?:from|at|with) the (?:end|goal|answer|final|desired)\b",
        r"\bmust have (?:been|had)\b[^.;]{0,40}\bbefore\b|\bbefore\b[^.;]{0,60}\bmust have (?:been|had)\b",
        # One goal is exchanged for another that is enough.
        r"\bsuffic\w+ (?:to|that)\b|\bis sufficient (?:to|for us)\b|\benough (?:to|if we) (?:show|prove"
        r"|find|know|compute|determine|count|consider)\b",
        r"\b(?:only|all) (?:we |i |you )?(?:need|have)(?: is)?(?: to)? (?:find|know|show|prove|compute"
        r"|determine)\b|"
        r"\ball (?:we|i) need(?: \w+)? is\b|\bwe need only (?:find|know|show|prove|compute|determine)\b",
        r"\breduces? to (?:the problem of |the question of )?(?:\w+ing\b|how\b)|\b(?:question|problem"
        r"|task) (?:then |now )?becomes\b",
        r"\bequivalent to (?:finding|showing|proving|counting)\b|\bit (?:only )?remains to\b(?! check)"
        r"|\bfollows if\b",
        # "To find X, we need Y" with Y a quantity. "To find X, we add" tells the step itself.
        r"\bto (?!avoid)\w+\b[^;]{1,150}?,? (?:we|i|you|one)(?:'ll)?(?: (?:will|would|also|still|must"
        r"|should|first))* "
        r"(?:need|needs|must|have|has|want)(?: to)?(?: first)? (?:first )?(?:{find}|know|get|show|prove"
        r"|have (?:the|found)|the\b|its\b|two things|perform)",
        r"\bto (?!avoid)\w+\b[^;]{1,150}?,? (?:we|i|you|one) (?:must|should) (?:first )?(?:{find}|know|get"
        r"|show|prove)\b",
        r"\bbefore (?:we can |i can |{finding}|getting|answering)[^.;]{1,80}\b(?:we|i"
        r"|one) (?:first )?(?:need|must|should|have to)\b",
        r"\b(?:need|must|have to)\b[^.;]{1,60}\bbefore (?:we|i|one) can\b|\bif (?:i|we) (?:knew"
        r"|had)\b[^;]{1,60}\b(?:could|would)\b|\bwhat (?:do|would|must|should) (?:we|i|you|one) (?:need"
        r"|have|know)\b|\bwhat (?:must|should)\b[^?]{1,60}\b(?:for|so that|to)\b[^?]{1,60}\?",
        r"\brequires (?:us to|knowing|finding|the (?:number|value|length|price|cost|size|amount|total|area"
        r"|speed))\b",
        # What a wish demands: "for x to be an integer, n must ...", "to reach 100, she has to ...".
        r"\bin order for\b",
        r"(?:^|[,;(] ?|\b(?:so|that|then|thus|now|similarly"
        r"|but) )for [^;,]{1,60}? to \w+\b[^;]{0,120}?\b{needs}\b",
        r"{start}(?:in order )?to (?:reach|get|have|achieve|end up|end|earn|average|attain|win|obtain|pay"
        r"|ensure|afford|finish|break even|be)\b"
        r"[^.;]{1,80}, [^.;]{1,60}?\b(?:must|needs?|has to|have to|can \w+ at most|would need)\b",
        r"{start}to (?:reach|hit|get to|get|make|obtain|arrive at) \$?\d[^;]{0,30}, (?:i|we|one) (?:could"
        r"|can|need|must|might|would|have)\b",
        r"\bif (?:\w+ ){1,3}(?:is|are) to \w+\b|\bif (?:we|i|he|she|they) wants?\b[^;]{1,80}\b(?:must"
        r"|needs?|has to|have to)\b",
        # The goal, and what follows from wanting it.
        r"\b(?:(?:we|i)(?: want|'re (?:looking for|after)| are (?:after|(?:looking|asked|solving) for)"
        r"| need to (?:find|know))|"
        r"(?:the|our|my) (?:goal|target|aim|objective|answer|task|question) (?:is|will be|asks))\b"
        r"[^;]{1,120}(?:\b(?:so|hence|thus|which (?:means|requires)|for (?:that|this)|we want)\b"
        r"|, ?we\b)[^;]{0,60}?\b(?:must|needs?|should|has to|have to|want|look for|to be)\b",
        r"\bsince we(?:'re| are) looking for\b[^;]{1,120}\bwe (?:want|need)\b",
        r"\b(?:we|i) (?:need|want)\b[^;]{1,80}\bdepends on\b",
        r"\breason\w*[^.;]{0,12} backwards?\b|\bwhat would (?:make|have to|it take)\b|\bwould (?:have"
        r"|need) to (?:be|equal|have)\b",
        r"\bwe(?:'d| would| could) (?:know|have|find|get)\b[^.;]{1,60}\bif we (?:knew|had|could)\b"
        r"|\bsuppose we (?:already )?(?:had|knew)\b",
        r"{start}to (?:show|prove|see|establish|conclude)\b[^;]{1,100}, we (?:look for|need|want|aim)\b"
        r"|\bfor that (?:we|i) (?:need|must|want)\b",
        r"\bit only takes\b|\bso that is what (?:we|i) (?:look for|need|want)\b|\bthe (?:only"
        r"|last) (?:\w+ )?unknown\b",
        r"\bto (?:ensure|guarantee)\b|\bis enough to (?!buy|pay|cover|feed|fill|make|last)\w+",
    ),
}


def _compiled(patterns: Sequence[str]) -> re.Pattern[str]:
    joined = "|".join(f"(?:{pattern})" for pattern in patterns)
    for _ in range(3):  # words may use words
        for name, words in _WORDS.items():
            joined = joined.replace(f"{{{name}}}", words)
    return re.compile(joined)


_COMPILED: Mapping[str, re.Pattern[str]] = {name: _compiled(_PATTERNS[name]) for name in BEHAVIORS}
